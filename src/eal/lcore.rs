//! Running closures on lcores, and on threads of their own where there is no EAL.

use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::environment::{EalError, Environment, words};

/// Where a launched closure leaves its result.
type Slot<T> = Arc<Mutex<Option<std::thread::Result<T>>>>;

/// A closure that runs on an lcore.
#[derive(Debug)]
pub struct LcoreHandle<T>(Running<T>);

#[derive(Debug)]
enum Running<T> {
    Lcore {
        lcore: u32,
        result: Slot<T>,
        _environment: Environment,
    },
    Thread(JoinHandle<T>),
}

type Job = Box<dyn FnOnce() + Send>;

/// What EAL calls on the lcore's thread. No panic may cross it: the job catches its own.
extern "C" fn trampoline(argument: *mut c_void) -> c_int {
    // SAFETY: launch made the argument from a Box<Job>, and EAL calls this once for it.
    let job = unsafe { Box::from_raw(argument.cast::<Job>()) };
    job();
    0
}

/// Starts `work` on worker lcore `lcore`, which must be idle.
pub fn launch<T: Send + 'static>(
    environment: &Environment,
    lcore: u32,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<LcoreHandle<T>, EalError> {
    let result: Slot<T> = Arc::new(Mutex::new(None));
    let slot = Arc::clone(&result);
    let job: Job = Box::new(move || {
        let outcome = catch_unwind(AssertUnwindSafe(work));
        *slot
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(outcome);
    });
    let argument = Box::into_raw(Box::new(job));
    // SAFETY: the trampoline takes the argument back exactly once.
    let code = unsafe { dpdk_sys::rte_eal_remote_launch(Some(trampoline), argument.cast(), lcore) };
    if code != 0 {
        // SAFETY: EAL refused, so the argument is still ours.
        drop(unsafe { Box::from_raw(argument) });
        return Err(EalError::Call {
            what: format!("lcore {lcore} does not take work"),
            reason: words(code),
        });
    }
    Ok(LcoreHandle(Running::Lcore {
        lcore,
        result,
        _environment: environment.clone(),
    }))
}

/// Starts `work` on a thread that stands for an lcore where no port needs EAL: on `cpu` alone, or where
/// the scheduler puts it.
pub fn launch_thread<T: Send + 'static>(
    name: String,
    cpu: Option<u32>,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<LcoreHandle<T>> {
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        if let Some(cpu) = cpu
            && let Err(error) = super::affinity::pin_this_thread(&[cpu])
        {
            tracing::warn!("CPU {cpu} cannot be had, the scheduler chooses: {error}");
        }
        work()
    })?;
    Ok(LcoreHandle(Running::Thread(thread)))
}

impl<T> LcoreHandle<T> {
    /// Waits for the closure's end; the error is its panic.
    pub fn join(self) -> std::thread::Result<T> {
        let (lcore, result, _environment) = match self.0 {
            Running::Thread(thread) => return thread.join(),
            Running::Lcore {
                lcore,
                result,
                _environment,
            } => (lcore, result, _environment),
        };
        // SAFETY: waits for a worker lcore; called from another thread than it.
        unsafe { dpdk_sys::rte_eal_wait_lcore(lcore) };
        let outcome = result
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        outcome.unwrap_or_else(|| Err(Box::new("the lcore ended without a result")))
    }

    /// Whether the closure has ended.
    pub fn is_finished(&self) -> bool {
        match &self.0 {
            Running::Thread(thread) => thread.is_finished(),
            Running::Lcore { result, .. } => result
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .is_some(),
        }
    }
}

/// EAL's number of the calling thread's lcore; `None` on ordinary threads.
pub fn current() -> Option<u32> {
    // SAFETY: reads a variable of this thread.
    let id = unsafe { dpdk_sys::tf_lcore_id() };
    (id < dpdk_sys::RTE_MAX_LCORE).then_some(id)
}

/// Lets the calling thread's short sleeps end on time: Linux rounds them up by 50 µs otherwise.
pub fn precise_sleeps() {
    // SAFETY: changes a number of this thread; 1 ns is the least slack, and a failure only leaves
    // the default.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}
