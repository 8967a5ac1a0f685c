//! The process's allocator: how it treats what is freed, and how much is allocated.
//!
//! By default glibc takes blocks from 128 KiB on from the kernel and gives them back, page by page faulted in again
//! and zeroed with the next request of that size, and gives back what is free at the end of a thread's heap. Requests and
//! answers of Kafka's protocol are that large all the time; the faults were a tenth of the CPU of a produce request.
//!
//! [`Counting`] counts what is allocated and not freed. Invariant: the sum over the stripes is that number at any
//! moment without allocations under way. A thread adds to one stripe, on a cache line that few others share, so
//! counting costs some nanoseconds an allocation and no contention.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering::Relaxed};

/// Blocks from this size on come from the kernel: more than a request may have by default. The largest that glibc takes.
const MMAP_FROM: i32 = 32 << 20;
/// What stays free at the end of a heap: some requests and answers in flight.
const KEPT: i32 = 32 << 20;
/// Counters; threads are spread over them.
const STRIPES: usize = 64;

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

/// Gives the kernel back what is free. Cost: a pass over all heaps under their locks, some milliseconds.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: works on the allocator's own structures, under its locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[repr(align(128))]
struct Stripe(AtomicI64);

static ALLOCATED: [Stripe; STRIPES] = [const { Stripe(AtomicI64::new(0)) }; STRIPES];
static NEXT: AtomicUsize = AtomicUsize::new(0);
static COUNTS: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The thread's stripe plus one; 0: it has none yet. Neither allocates nor is torn down.
    static STRIPE: Cell<usize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let stripe = STRIPE.get();
    let stripe = match stripe {
        0 => {
            let stripe = NEXT.fetch_add(1, Relaxed) % STRIPES + 1;
            STRIPE.set(stripe);
            COUNTS.store(true, Relaxed);
            stripe
        }
        stripe => stripe,
    };
    ALLOCATED[stripe - 1].0.fetch_add(bytes as i64, Relaxed);
}

/// Bytes that are allocated and not freed; `None`: this program's allocator is not [`Counting`]. What the C library
/// keeps beside (headers of blocks, free ones) is not in it.
pub fn allocated() -> Option<u64> {
    let sum: i64 = ALLOCATED.iter().map(|stripe| stripe.0.load(Relaxed)).sum();
    COUNTS.load(Relaxed).then(|| sum.max(0) as u64)
}

/// The C library's allocator, counted; a program names it as its `#[global_allocator]`.
pub struct Counting;

// SAFETY: every call goes to `System` as it is; counting touches memory of its own alone and does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let block = unsafe { System.alloc(layout) };
        if !block.is_null() {
            count(layout.size() as isize);
        }
        block
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let block = unsafe { System.alloc_zeroed(layout) };
        if !block.is_null() {
            count(layout.size() as isize);
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) };
        count(-(layout.size() as isize));
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        let moved = unsafe { System.realloc(block, layout, size) };
        if !moved.is_null() {
            count(size as isize - layout.size() as isize);
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allocated_is_counted_until_it_is_freed() {
        // Used by hand: a test program has one allocator for all tests.
        let stripe = |_: ()| -> i64 { ALLOCATED[STRIPE.get() - 1].0.load(Relaxed) };
        std::thread::spawn(move || {
            count(0);
            let before = stripe(());
            let layout = Layout::array::<u8>(1000).unwrap();
            // SAFETY: a layout with a size, blocks freed with the layout that they have.
            unsafe {
                let block = Counting.alloc(layout);
                let zeroed = Counting.alloc_zeroed(layout);
                assert_eq!(stripe(()) - before, 2000);
                let block = Counting.realloc(block, layout, 3000);
                assert_eq!(stripe(()) - before, 4000);
                Counting.dealloc(block, Layout::array::<u8>(3000).unwrap());
                Counting.dealloc(zeroed, layout);
            }
            assert_eq!(stripe(()) - before, 0);
            assert!(allocated().is_some());
        })
        .join()
        .unwrap();
    }
}
