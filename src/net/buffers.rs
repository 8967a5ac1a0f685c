//! Buffers of the datagrams that kernel sockets receive, and their way back from the shards.
//!
//! Two sizes: what an Ethernet frame carries, as many as messages can be on their way to shards, and the largest datagram,
//! a few. Each has [`REPLY_TO_LEN`] bytes before the payload, as an mbuf has headroom. Invariants: a buffer is the pool's, or
//! the receiver's that took it, or a shard's, which sends its number back through the ring of its own; the memory lives until
//! pool and rings are both gone. A handle is an odd number, so it is told from an mbuf's, which is an address.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::memory::spsc;
use crate::shard::REPLY_TO_LEN;

/// Bytes of payload in a small buffer: more than an Ethernet frame carries.
pub const SMALL: usize = 2048;
/// Bytes of payload in a large buffer: more than any UDP datagram has.
pub const LARGE: usize = 65_536;
/// From one buffer to the next: whole cache lines.
const SMALL_STRIDE: usize = REPLY_TO_LEN + SMALL;
const LARGE_STRIDE: usize = REPLY_TO_LEN + LARGE;
const _: () = assert!(REPLY_TO_LEN == 64 && SMALL.is_multiple_of(64) && LARGE.is_multiple_of(64));
/// Numbers taken from a ring at a time.
const TAKE: usize = 256;

/// Bytes that a pool of so many small and large buffers takes. Of the system's memory it takes what was used of it.
pub const fn bytes(small: usize, large: usize) -> u64 {
    (small * SMALL_STRIDE + large * LARGE_STRIDE) as u64
}

/// The buffers themselves.
struct Memory {
    start: NonNull<u8>,
    layout: Layout,
    small: usize,
    large: usize,
}

// SAFETY: it owns plain bytes; who may touch which of them is told by the numbers that go around, each of which is in one
// place at a time.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and nobody else frees it.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// The receiver's end.
pub struct Pool {
    memory: Arc<Memory>,
    free_small: Vec<u32>,
    free_large: Vec<u32>,
    back: Vec<spsc::Consumer<u32>>,
    taken: Vec<u32>,
}

/// A shard's end: gives buffers back.
pub struct Return {
    _memory: Arc<Memory>,
    ring: spsc::Producer<u32>,
}

/// A pool of so many buffers, whose messages go to `shards` shards, and the ways back from them.
///
/// # Panics
/// When there are none, or more than memory can address.
pub fn pool(small: usize, large: usize, shards: usize) -> (Pool, Vec<Return>) {
    let size = small * SMALL_STRIDE + large * LARGE_STRIDE;
    assert!(size > 0, "a pool without buffers");
    let layout = Layout::from_size_align(size, 64).expect("the sizes are small");
    // SAFETY: the size is not zero.
    let start = unsafe { alloc_zeroed(layout) };
    let Some(start) = NonNull::new(start) else {
        handle_alloc_error(layout)
    };
    let memory = Arc::new(Memory {
        start,
        layout,
        small,
        large,
    });
    // A ring holds every number, so none is ever full.
    let capacity = (small + large).next_power_of_two();
    let (returns, back) = (0..shards)
        .map(|_| {
            let (ring, back) = spsc::ring(capacity);
            let end = Return {
                _memory: Arc::clone(&memory),
                ring,
            };
            (end, back)
        })
        .unzip();
    // The lowest numbers are taken first, so that of a server at rest few are ever touched.
    let pool = Pool {
        memory,
        free_small: (0..small as u32).rev().collect(),
        free_large: (small as u32..(small + large) as u32).rev().collect(),
        back,
        taken: Vec::with_capacity(TAKE),
    };
    (pool, returns)
}

/// The handle of buffer `number`.
#[inline]
pub fn handle(number: u32) -> usize {
    (number as usize) << 1 | 1
}

/// The number of the buffer with this handle; `None`: it is somebody else's.
#[inline]
pub fn number(handle: usize) -> Option<u32> {
    (handle & 1 == 1).then_some((handle >> 1) as u32)
}

impl Pool {
    /// Takes back what shards have given.
    pub fn collect(&mut self) {
        for at in 0..self.back.len() {
            loop {
                self.taken.clear();
                if self.back[at].pop_into(&mut self.taken, TAKE) == 0 {
                    break;
                }
                for i in 0..self.taken.len() {
                    self.give(self.taken[i]);
                }
            }
        }
    }

    /// How many small and how many large ones are free.
    pub fn free(&self) -> (usize, usize) {
        (self.free_small.len(), self.free_large.len())
    }

    /// A small one.
    pub fn take_small(&mut self) -> Option<u32> {
        self.free_small.pop()
    }

    /// A large one.
    pub fn take_large(&mut self) -> Option<u32> {
        self.free_large.pop()
    }

    /// Takes one back that was taken from here and that nobody uses any more.
    pub fn give(&mut self, number: u32) {
        if (number as usize) < self.memory.small {
            self.free_small.push(number);
        } else {
            self.free_large.push(number);
        }
    }

    /// Where the payload of a buffer begins; [`SMALL`] or [`LARGE`] bytes, and [`REPLY_TO_LEN`] before it. Who has taken the
    /// buffer may write there.
    ///
    /// # Panics
    /// When there is no such buffer.
    #[inline]
    pub fn payload(&self, number: u32) -> *mut u8 {
        let (number, memory) = (number as usize, &self.memory);
        assert!(number < memory.small + memory.large, "no such buffer");
        let offset = match number.checked_sub(memory.small) {
            None => number * SMALL_STRIDE,
            Some(large) => memory.small * SMALL_STRIDE + large * LARGE_STRIDE,
        };
        // SAFETY: within the allocation, as the number is one of a buffer's.
        unsafe { memory.start.as_ptr().add(offset + REPLY_TO_LEN) }
    }
}

impl Return {
    /// Gives buffers back whose handles these are, in bulk.
    pub fn give(&mut self, handles: &[usize]) {
        let mut numbers = [0; TAKE];
        for handles in handles.chunks(TAKE) {
            let mut count = 0;
            for number in handles.iter().filter_map(|&handle| number(handle)) {
                numbers[count] = number;
                count += 1;
            }
            let pushed = self.ring.push_burst(&numbers[..count]);
            debug_assert_eq!(pushed, count, "there are no more numbers than places");
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn buffers_lie_apart_and_come_back_by_their_shards() {
        let (mut pool, mut returns) = pool(600, 3, 2);
        assert_eq!(pool.free(), (600, 3));
        let mut taken: Vec<(u32, usize)> = Vec::new();
        while let Some(number) = pool.take_small() {
            taken.push((number, SMALL));
        }
        while let Some(number) = pool.take_large() {
            taken.push((number, LARGE));
        }
        assert_eq!((taken.len(), pool.free()), (603, (0, 0)));
        for (number, len) in &taken {
            let payload = pool.payload(*number);
            assert_eq!(payload as usize % 64, 0);
            // SAFETY: the buffer was taken; its headroom belongs to it.
            unsafe {
                payload
                    .sub(REPLY_TO_LEN)
                    .write_bytes(*number as u8, REPLY_TO_LEN + len)
            };
        }
        for (number, len) in &taken {
            let payload = pool.payload(*number);
            // SAFETY: written above.
            let (first, last) = unsafe { (*payload.sub(REPLY_TO_LEN), *payload.add(len - 1)) };
            assert_eq!((first, last), (*number as u8, *number as u8));
        }
        let handles: Vec<usize> = taken.iter().map(|&(number, _)| handle(number)).collect();
        assert!(handles.iter().all(|handle| handle & 1 == 1));
        assert_eq!(number(handles[5]), Some(taken[5].0));
        assert_eq!(number(0x7f00_0000_1000), None);
        let (one, other) = handles.split_at(400);
        returns[0].give(one);
        returns[1].give(other);
        pool.collect();
        assert_eq!(pool.free(), (600, 3));
        assert_eq!(bytes(600, 3), 600 * (64 + 2048) + 3 * (64 + 65_536));
    }

    #[test]
    fn the_memory_outlives_the_pool_while_a_shard_has_some_of_it() {
        let (mut pool, mut returns) = pool(2, 0, 1);
        let taken = pool.take_small().unwrap();
        let payload = pool.payload(taken);
        drop(pool);
        // SAFETY: the shard's end keeps the memory, and the buffer was taken.
        unsafe { payload.write(7) };
        returns[0].give(&[handle(taken)]);
    }
}
