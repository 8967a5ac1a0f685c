//! Buffers for requests: pooled by size class, at a stable address, counted.
//!
//! Invariant: `in_use` is the sum of the capacities of all [`Buffer`]s that are out; a buffer goes back
//! (or is freed) exactly once, when it is dropped. A buffer never grows, so its bytes never move.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use super::ConnectionId;

/// Smallest class; control requests of Kafka clients fit.
const MIN_CLASS: usize = 512;
/// Classes are powers of two from [`MIN_CLASS`] to 1 MiB; longer buffers are not kept.
const CLASSES: usize = 12;
/// Free bytes kept for each class, so that a burst of large requests does not stay in memory.
const KEPT_PER_CLASS: usize = 4 << 20;

/// Free buffers of one thread, and how much is out.
#[derive(Debug, Default)]
pub(super) struct Pool {
    free: RefCell<[Vec<Vec<u8>>; CLASSES]>,
    in_use: Cell<usize>,
    /// Requests that were dropped: whose, and of how many bytes.
    dropped: RefCell<Vec<(ConnectionId, usize)>>,
}

impl Pool {
    pub(super) fn in_use(&self) -> usize {
        self.in_use.get()
    }

    /// An empty buffer for at least `capacity` bytes.
    pub(super) fn get(self: &Rc<Self>, capacity: usize) -> Buffer {
        let bytes = match class(capacity) {
            Some(class) => self.free.borrow_mut()[class]
                .pop()
                .unwrap_or_else(|| Vec::with_capacity(MIN_CLASS << class)),
            None => Vec::with_capacity(capacity),
        };
        self.in_use.set(self.in_use.get() + bytes.capacity());
        Buffer {
            bytes,
            pool: Rc::clone(self),
        }
    }

    /// Moves the list of requests dropped since the last call to `into`.
    pub(super) fn take_dropped(&self, into: &mut Vec<(ConnectionId, usize)>) {
        into.append(&mut self.dropped.borrow_mut());
    }

    fn put(&self, mut bytes: Vec<u8>) {
        let capacity = bytes.capacity();
        self.in_use.set(self.in_use.get() - capacity);
        if let Some(class) = class(capacity)
            && capacity == MIN_CLASS << class
        {
            let free = &mut self.free.borrow_mut()[class];
            if (free.len() + 1) * capacity <= KEPT_PER_CLASS {
                bytes.clear();
                free.push(bytes);
            }
        }
    }
}

/// The class whose buffers hold `capacity` bytes.
fn class(capacity: usize) -> Option<usize> {
    let size = capacity.max(MIN_CLASS).checked_next_power_of_two()?;
    let class = (size / MIN_CLASS).trailing_zeros() as usize;
    (class < CLASSES).then_some(class)
}

/// A buffer that goes back to its pool when dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    pool: Rc<Pool>,
}

impl Buffer {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Bytes that still fit.
    pub(super) fn room(&self) -> usize {
        self.bytes.capacity() - self.bytes.len()
    }

    /// Appends bytes that fit.
    ///
    /// # Panics
    /// When they do not: growing would move what is there.
    pub(super) fn append(&mut self, more: &[u8]) {
        assert!(more.len() <= self.room(), "a buffer does not grow");
        self.bytes.extend_from_slice(more);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.put(std::mem::take(&mut self.bytes));
    }
}

/// A request's bytes, owned: they stay at their address until the value is dropped, and may be lent to a
/// shard meanwhile. It counts against its connection's [`Limits::in_flight`](super::Limits::in_flight),
/// and against the thread's memory, until then.
#[derive(Debug)]
pub struct Request {
    buffer: Buffer,
    range: Range<usize>,
    id: ConnectionId,
}

impl Request {
    pub(super) fn new(buffer: Buffer, range: Range<usize>, id: ConnectionId) -> Self {
        debug_assert!(range.end <= buffer.bytes.len());
        Self { buffer, range, id }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer.bytes[self.range.clone()]
    }

    /// The bytes, to be changed (what a validated batch must carry and does not yet).
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.buffer.bytes[self.range.clone()]
    }

    /// Whose request it is.
    pub fn connection(&self) -> ConnectionId {
        self.id
    }
}

impl std::ops::Deref for Request {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.bytes()
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let held = self.range.len();
        self.buffer.pool.dropped.borrow_mut().push((self.id, held));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_are_counted() {
        let pool = Rc::new(Pool::default());
        let mut buffer = pool.get(600);
        assert_eq!((buffer.capacity(), pool.in_use()), (1024, 1024));
        buffer.append(&[7; 600]);
        let address = buffer.bytes().as_ptr();
        drop(buffer);
        assert_eq!(pool.in_use(), 0);
        let again = pool.get(1000);
        assert_eq!(again.bytes(), b"");
        assert_eq!(again.bytes().as_ptr(), address);
        let large = pool.get(3 << 20);
        assert_eq!(pool.in_use(), 1024 + large.capacity());
        drop((again, large));
        assert_eq!(pool.in_use(), 0);
        let all: Vec<_> = (0..9).map(|_| pool.get(1 << 20)).collect();
        drop(all);
        assert_eq!(
            pool.free.borrow()[CLASSES - 1].len(),
            4,
            "only so many are kept"
        );
    }

    #[test]
    fn a_dropped_request_says_whose_it_was() {
        let pool = Rc::new(Pool::default());
        let mut buffer = pool.get(10);
        buffer.append(b"0123456789");
        let id = ConnectionId::from_u64(5 << 32 | 9);
        let request = Request::new(buffer, 4..10, id);
        assert_eq!((&*request, request.connection()), (&b"456789"[..], id));
        let mut dropped = Vec::new();
        pool.take_dropped(&mut dropped);
        assert!(dropped.is_empty());
        drop(request);
        pool.take_dropped(&mut dropped);
        assert_eq!(dropped, [(id, 6)]);
    }
}
