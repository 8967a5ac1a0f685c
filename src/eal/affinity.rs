//! Which CPUs a thread may run on.
//!
//! EAL pins the thread that starts it, and a thread inherits the mask of the one that makes it: a
//! helper thread made on a worker lcore would share that lcore's CPU. Invariant: the mask given back
//! here is the process's own, taken before EAL changed it. Source: `sched_setaffinity(2)`.

use std::sync::OnceLock;

/// The mask at the process's start.
static ALLOWED: OnceLock<Vec<u32>> = OnceLock::new();

/// The calling thread's CPUs in ascending order.
fn of_this_thread() -> std::io::Result<Vec<u32>> {
    // SAFETY: a CPU set is an array of integers; all zeros is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes at most the size given.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok((0..libc::CPU_SETSIZE as u32)
        // SAFETY: the number is below CPU_SETSIZE.
        .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu as usize, &set) })
        .collect())
}

/// The CPUs that the process may use, as they were when this was first called, which
/// [`super::Environment::start`] does before EAL pins anything. Costs a system call the first time.
pub fn allowed_at_start() -> std::io::Result<&'static [u32]> {
    if let Some(allowed) = ALLOWED.get() {
        return Ok(allowed);
    }
    let now = of_this_thread()?;
    Ok(ALLOWED.get_or_init(|| now))
}

/// Lets the calling thread run on all CPUs that the process had at its start. For ordinary threads;
/// an lcore stays where EAL put it. Costs one system call.
pub fn unpin_this_thread() -> std::io::Result<()> {
    pin_this_thread(allowed_at_start()?)
}

/// Lets the calling thread run on these CPUs alone. Costs one system call.
pub fn pin_this_thread(cpus: &[u32]) -> std::io::Result<()> {
    // SAFETY: as in `of_this_thread`.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus.iter().filter(|cpu| **cpu < libc::CPU_SETSIZE as u32) {
        // SAFETY: the number is below CPU_SETSIZE.
        unsafe { libc::CPU_SET(cpu as usize, &mut set) };
    }
    // SAFETY: the call reads the size given.
    if unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}
