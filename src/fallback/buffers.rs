//! The buffers that the kernel receives into ahead of the readers: a ring of them, shared with it.
//!
//! Source: io_uring_register_buf_ring(3). Invariants: a buffer is either the kernel's (in the ring), or out as a
//! [`Vec`] that its number names, never both; the ring has as many entries as there are buffers, so it is never full.

use std::io;
use std::sync::atomic::{AtomicU16, Ordering::Release};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;
use memmap2::MmapMut;

/// Bytes of a buffer: the requests of clients that wait for answers fit, and of larger requests the rest goes where the
/// request is.
pub(super) const BUFFER: usize = 16 << 10;
/// Buffers at least and at most.
const BUFFERS: (usize, usize) = (16, 256);
/// The number of the only group.
pub(super) const GROUP: u16 = 0;

/// A ring of buffers.
pub(super) struct Buffers {
    entries: MmapMut,
    /// Those that are out are empty here.
    buffers: Vec<Vec<u8>>,
    tail: u16,
    free: usize,
}

impl Buffers {
    /// Buffers of some `memory` bytes in all, registered with `ring`.
    pub(super) fn new(ring: &IoUring, memory: usize) -> io::Result<Self> {
        let count = (memory / BUFFER).clamp(BUFFERS.0, BUFFERS.1);
        // A power of two, as the kernel wants it.
        let count = 1 << count.ilog2();
        let mut entries = MmapMut::map_anon(count * size_of::<BufRingEntry>())?;
        let at = entries.as_mut_ptr() as u64;
        // SAFETY: the mapping has that many entries and is kept, at its place, as long as `self`, which its owner keeps
        // until the kernel uses it no longer.
        unsafe {
            ring.submitter()
                .register_buf_ring_with_flags(at, count as u16, GROUP, 0)?;
        }
        let mut all = Self {
            entries,
            buffers: vec![Vec::new(); count],
            tail: 0,
            free: 0,
        };
        for number in 0..count {
            all.give(number as u16, vec![0; BUFFER]);
        }
        Ok(all)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.buffers.len()
    }

    /// How many the kernel has.
    pub(super) fn free(&self) -> usize {
        self.free
    }

    /// Takes a buffer that the kernel says it has filled.
    pub(super) fn take(&mut self, number: u16) -> Vec<u8> {
        self.free -= 1;
        std::mem::take(&mut self.buffers[usize::from(number)])
    }

    /// Gives the kernel a buffer to fill.
    pub(super) fn give(&mut self, number: u16, mut buffer: Vec<u8>) {
        debug_assert!(buffer.len() == BUFFER && self.buffers[usize::from(number)].is_empty());
        let at = usize::from(self.tail) & (self.buffers.len() - 1);
        let base = self.entries.as_mut_ptr().cast::<BufRingEntry>();
        // SAFETY: the mapping has as many entries as there are buffers, page-aligned, all zero at first, which is an
        // entry; this one is not the kernel's, as not all buffers are.
        let entry = unsafe { &mut *base.add(at) };
        entry.set_addr(buffer.as_mut_ptr() as u64);
        entry.set_len(BUFFER as u32);
        entry.set_bid(number);
        self.buffers[usize::from(number)] = buffer;
        self.tail = self.tail.wrapping_add(1);
        self.free += 1;
        // SAFETY: the tail lies in the first entry, aligned, and the kernel reads it as an atomic.
        let tail = unsafe { &*BufRingEntry::tail(base).cast::<AtomicU16>() };
        tail.store(self.tail, Release);
    }
}
