//! A bounded ring from one thread to one other, in bursts.
//!
//! Invariant: `head <= tail <= head + capacity` (free-running counters, wrapping). Slots in
//! `head..tail` are initialised and belong to the consumer, the others to the producer. A side
//! touches the slots it owns first and then publishes its own counter with Release; the other side
//! reads that counter with Acquire before it touches them.
//!
//! Each side keeps a copy of the other's counter on its own cache line and rereads it only when the
//! copy says there is no room (or nothing to take), so a burst costs at most one cache-line
//! transfer a side (the technique of FastForward and MCRingBuffer). Lines are padded to 128 bytes
//! because x86 prefetches lines in pairs.

use std::mem::MaybeUninit;

#[cfg(loom)]
use loom::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
#[cfg(not(loom))]
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// A ring holds at most this many objects; larger asks are a mistake in a configuration.
pub const MAX_CAPACITY: usize = 1 << 24;

#[repr(align(128))]
struct Padded<T>(T);

struct Shared<T> {
    /// Next slot to write; stored by the producer alone.
    tail: Padded<AtomicUsize>,
    /// Next slot to read; stored by the consumer alone.
    head: Padded<AtomicUsize>,
    slots: Slots<T>,
}

/// The writing end.
#[repr(align(128))]
pub struct Producer<T> {
    shared: Arc<Shared<T>>,
    /// Own copy of `shared.tail`.
    tail: usize,
    /// `shared.head` when last read: at most the true one.
    head_seen: usize,
}

/// The reading end.
#[repr(align(128))]
pub struct Consumer<T> {
    shared: Arc<Shared<T>>,
    /// Own copy of `shared.head`.
    head: usize,
    /// `shared.tail` when last read: at most the true one.
    tail_seen: usize,
}

/// Makes a ring of `capacity` objects and gives both of its ends; the only allocation it ever makes.
///
/// # Panics
/// When `capacity` is not a power of two in `1..=MAX_CAPACITY`.
pub fn ring<T: Copy + Send>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    assert!(
        capacity.is_power_of_two() && capacity <= MAX_CAPACITY,
        "ring capacity {capacity} is not a power of two in 1..={MAX_CAPACITY}"
    );
    let shared = Arc::new(Shared {
        tail: Padded(AtomicUsize::new(0)),
        head: Padded(AtomicUsize::new(0)),
        slots: Slots::new(capacity),
    });
    (
        Producer {
            shared: shared.clone(),
            tail: 0,
            head_seen: 0,
        },
        Consumer {
            shared,
            head: 0,
            tail_seen: 0,
        },
    )
}

impl<T: Copy + Send> Producer<T> {
    /// Appends a prefix of `items`, as many as there is room for, and gives its length.
    #[inline]
    pub fn push_burst(&mut self, items: &[T]) -> usize {
        let mut room = self.capacity() - self.tail.wrapping_sub(self.head_seen);
        if room < items.len() {
            room = self.free();
        }
        let taken = room.min(items.len());
        if taken == 0 {
            return 0;
        }
        // SAFETY: slots tail..tail+taken are free (taken <= room), so they are the producer's.
        unsafe { self.shared.slots.write(self.tail, &items[..taken]) };
        self.tail = self.tail.wrapping_add(taken);
        self.shared.tail.0.store(self.tail, Ordering::Release);
        taken
    }

    /// Appends one object; false when the ring is full.
    #[inline]
    pub fn push(&mut self, item: T) -> bool {
        self.push_burst(std::slice::from_ref(&item)) == 1
    }

    /// Free slots, freshly read: at least so many can be pushed now.
    #[inline]
    pub fn free(&mut self) -> usize {
        self.head_seen = self.shared.head.0.load(Ordering::Acquire);
        self.capacity() - self.tail.wrapping_sub(self.head_seen)
    }

    /// Objects in the ring as far as the producer knows without touching the consumer's cache line:
    /// never too small.
    #[inline]
    pub fn len_hint(&self) -> usize {
        self.tail.wrapping_sub(self.head_seen)
    }

    /// Objects the ring can hold.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.shared.slots.capacity()
    }
}

impl<T: Copy + Send> Consumer<T> {
    /// Moves the oldest objects, up to `out.len()`, to the front of `out`; gives how many were
    /// written and so are initialised.
    #[inline]
    pub fn pop_burst(&mut self, out: &mut [MaybeUninit<T>]) -> usize {
        let mut ready = self.tail_seen.wrapping_sub(self.head);
        if ready < out.len() {
            ready = self.len();
        }
        let taken = ready.min(out.len());
        if taken == 0 {
            return 0;
        }
        // SAFETY: slots head..head+taken are published (taken <= ready), so they are initialised
        // and the consumer's.
        unsafe { self.shared.slots.read(self.head, &mut out[..taken]) };
        self.head = self.head.wrapping_add(taken);
        self.shared.head.0.store(self.head, Ordering::Release);
        taken
    }

    /// Appends the oldest objects to `out`, up to `max` and never past its capacity, so without
    /// allocating; gives how many.
    #[inline]
    pub fn pop_into(&mut self, out: &mut Vec<T>, max: usize) -> usize {
        let spare = out.spare_capacity_mut();
        let room = spare.len().min(max);
        let taken = self.pop_burst(&mut spare[..room]);
        // SAFETY: pop_burst initialised the first `taken` spare elements.
        unsafe { out.set_len(out.len() + taken) };
        taken
    }

    /// Takes the oldest object.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        let mut item = [MaybeUninit::uninit()];
        // SAFETY: pop_burst says it initialised one element.
        (self.pop_burst(&mut item) == 1).then(|| unsafe { item[0].assume_init() })
    }

    /// Objects in the ring, freshly read: at least so many can be popped now.
    #[inline]
    #[allow(clippy::len_without_is_empty)] // is_empty would invite asking twice
    pub fn len(&mut self) -> usize {
        self.tail_seen = self.shared.tail.0.load(Ordering::Acquire);
        self.tail_seen.wrapping_sub(self.head)
    }

    /// Objects the ring can hold.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.shared.slots.capacity()
    }
}

#[cfg(not(loom))]
use plain::Slots;

#[cfg(not(loom))]
mod plain {
    use std::{cell::UnsafeCell, mem::MaybeUninit, ptr};

    /// The ring's memory; a counter's low bits are the slot's index.
    pub(super) struct Slots<T>(Box<[UnsafeCell<MaybeUninit<T>>]>);

    // SAFETY: read and write are unsafe and give each slot to one side at a time; objects cross
    // threads by copy, so T: Send is enough.
    unsafe impl<T: Send> Sync for Slots<T> {}

    impl<T: Copy> Slots<T> {
        pub fn new(capacity: usize) -> Self {
            Self(
                (0..capacity)
                    .map(|_| UnsafeCell::new(MaybeUninit::uninit()))
                    .collect(),
            )
        }

        #[inline(always)]
        pub fn capacity(&self) -> usize {
            self.0.len()
        }

        /// # Safety
        /// Slots `at..at + items.len()` are the caller's, and `items` is not longer than the ring.
        #[inline(always)]
        pub unsafe fn write(&self, at: usize, items: &[T]) {
            let start = at & (self.0.len() - 1);
            let first = items.len().min(self.0.len() - start);
            let base = UnsafeCell::raw_get(self.0.as_ptr()).cast::<T>();
            // SAFETY: start + first <= capacity and the rest starts at 0 and ends before start;
            // the slots are the caller's, so nobody else reads or writes them.
            unsafe {
                ptr::copy_nonoverlapping(items.as_ptr(), base.add(start), first);
                if first < items.len() {
                    ptr::copy_nonoverlapping(items.as_ptr().add(first), base, items.len() - first);
                }
            }
        }

        /// # Safety
        /// Slots `at..at + out.len()` are initialised and the caller's, and `out` is not longer
        /// than the ring.
        #[inline(always)]
        pub unsafe fn read(&self, at: usize, out: &mut [MaybeUninit<T>]) {
            let start = at & (self.0.len() - 1);
            let first = out.len().min(self.0.len() - start);
            let base = UnsafeCell::raw_get(self.0.as_ptr());
            // SAFETY: as in write.
            unsafe {
                ptr::copy_nonoverlapping(base.add(start), out.as_mut_ptr(), first);
                if first < out.len() {
                    ptr::copy_nonoverlapping(base, out.as_mut_ptr().add(first), out.len() - first);
                }
            }
        }
    }
}

#[cfg(loom)]
use checked::Slots;

/// The same memory with each access reported to loom, which fails when two sides touch one slot.
#[cfg(loom)]
mod checked {
    use loom::cell::UnsafeCell;
    use std::mem::MaybeUninit;

    pub(super) struct Slots<T>(Box<[UnsafeCell<MaybeUninit<T>>]>);

    // SAFETY: as for the plain one; loom checks it.
    unsafe impl<T: Send> Sync for Slots<T> {}

    impl<T: Copy> Slots<T> {
        pub fn new(capacity: usize) -> Self {
            Self(
                (0..capacity)
                    .map(|_| UnsafeCell::new(MaybeUninit::uninit()))
                    .collect(),
            )
        }

        pub fn capacity(&self) -> usize {
            self.0.len()
        }

        pub unsafe fn write(&self, at: usize, items: &[T]) {
            for (i, item) in items.iter().enumerate() {
                let slot = at.wrapping_add(i) & (self.0.len() - 1);
                // SAFETY: the slot is the caller's.
                self.0[slot].with_mut(|p| unsafe { (*p).write(*item) });
            }
        }

        pub unsafe fn read(&self, at: usize, out: &mut [MaybeUninit<T>]) {
            for (i, item) in out.iter_mut().enumerate() {
                let slot = at.wrapping_add(i) & (self.0.len() - 1);
                // SAFETY: the slot is the caller's and initialised.
                *item = self.0[slot].with(|p| unsafe { *p });
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    #[test]
    fn keeps_order_between_two_threads() {
        const COUNT: u64 = 200_000;
        let (mut tx, mut rx) = ring::<u64>(64);
        let sender = std::thread::spawn(move || {
            let mut next = 0;
            while next < COUNT {
                let burst: Vec<u64> = (next..COUNT.min(next + 1 + next % 40)).collect();
                let sent = tx.push_burst(&burst);
                if sent == 0 {
                    std::thread::yield_now();
                }
                next += sent as u64;
            }
        });
        let mut expected = 0;
        let mut out = Vec::with_capacity(48);
        while expected < COUNT {
            out.clear();
            if rx.pop_into(&mut out, 48) == 0 {
                std::thread::yield_now();
            }
            for &item in &out {
                assert_eq!(item, expected);
                expected += 1;
            }
        }
        sender.join().unwrap();
        assert_eq!(rx.pop(), None);
    }

    #[test]
    #[should_panic(expected = "power of two")]
    fn refuses_a_capacity_that_is_no_power_of_two() {
        let _ = ring::<u8>(6);
    }

    #[test]
    fn counters_may_wrap() {
        let (mut tx, mut rx) = ring::<u32>(4);
        let start = usize::MAX - 2;
        tx.tail = start;
        tx.head_seen = start;
        rx.head = start;
        rx.tail_seen = start;
        tx.shared.tail.0.store(start, Ordering::Relaxed);
        tx.shared.head.0.store(start, Ordering::Relaxed);
        for round in 0..10 {
            assert_eq!(tx.push_burst(&[round, round + 1, round + 2]), 3);
            assert_eq!(rx.len(), 3);
            assert_eq!(
                [rx.pop(), rx.pop(), rx.pop(), rx.pop()],
                [Some(round), Some(round + 1), Some(round + 2), None]
            );
        }
    }

    proptest! {
        #[test]
        fn behaves_like_a_bounded_queue(
            log2 in 0u32..6,
            steps in prop::collection::vec((any::<bool>(), 0usize..80), 1..200),
        ) {
            let capacity = 1usize << log2;
            let (mut tx, mut rx) = ring::<u64>(capacity);
            let mut model = VecDeque::new();
            let mut next = 0u64;
            for (push, size) in steps {
                if push {
                    let items: Vec<u64> = (next..next + size as u64).collect();
                    let sent = tx.push_burst(&items);
                    prop_assert_eq!(sent, size.min(capacity - model.len()));
                    model.extend(&items[..sent]);
                    next += sent as u64;
                } else {
                    let mut out = Vec::with_capacity(size);
                    let room = out.capacity().min(size);
                    let got = rx.pop_into(&mut out, size);
                    prop_assert_eq!(got, room.min(model.len()));
                    let expected: Vec<u64> = model.drain(..got).collect();
                    prop_assert_eq!(out, expected);
                }
                prop_assert_eq!(rx.len(), model.len());
                prop_assert!(tx.len_hint() >= model.len());
                prop_assert_eq!(tx.free(), capacity - model.len());
            }
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;

    fn exchange(capacity: usize, bursts: &'static [usize], take: usize) {
        loom::model(move || {
            let (mut tx, mut rx) = ring::<usize>(capacity);
            let total: usize = bursts.iter().sum();
            let sender = loom::thread::spawn(move || {
                let mut next = 0;
                for &burst in bursts {
                    let items: Vec<usize> = (next..next + burst).collect();
                    let mut sent = 0;
                    while sent < burst {
                        match tx.push_burst(&items[sent..]) {
                            0 => loom::thread::yield_now(),
                            n => sent += n,
                        }
                    }
                    next += burst;
                }
            });
            let mut got = Vec::with_capacity(total);
            while got.len() < total {
                if rx.pop_into(&mut got, take) == 0 {
                    loom::thread::yield_now();
                }
            }
            sender.join().unwrap();
            assert!(got.into_iter().eq(0..total));
            assert_eq!(rx.pop(), None);
        });
    }

    #[test]
    fn loom_single_objects_through_one_slot() {
        exchange(1, &[1, 1, 1], 1);
    }

    #[test]
    fn loom_bursts_that_wrap() {
        exchange(2, &[2, 1, 2], 2);
    }

    #[test]
    fn loom_burst_larger_than_the_ring() {
        exchange(2, &[3, 1], 3);
    }
}
