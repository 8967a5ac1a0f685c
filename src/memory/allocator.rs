//! How the C library's allocator treats what is freed.
//!
//! By default glibc takes blocks from 128 KiB on from the kernel and gives them back, page by page faulted in again
//! and zeroed with the next request of that size, and gives back what is free at the end of a thread's heap. Requests and
//! answers of Kafka's protocol are that large all the time; the faults were a tenth of the CPU of a produce request.

/// Blocks from this size on come from the kernel: more than a request may have by default. The largest that glibc takes.
const MMAP_FROM: i32 = 32 << 20;
/// What stays free at the end of a heap: some requests and answers in flight.
const KEPT: i32 = 32 << 20;

/// Lets freed blocks stay with the process. For the start of a server.
pub fn keep_freed() {
    // glibc's alone; elsewhere the allocator stays as it is.
    #[cfg(target_env = "gnu")]
    // SAFETY: sets two numbers of the allocator, under its lock; a refusal leaves the defaults.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_FROM);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}
