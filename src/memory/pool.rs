//! Buffers that are used again, by classes of size.
//!
//! For the buffers of requests, which are as large as a client's batches and come and go thousands of times a second: from a
//! pool they come without the allocator's splitting and joining, so a long-running server's heap does not fray. One
//! owner, no lock. There are four classes to each doubling of size, so a buffer is at most a quarter larger than it need be.
//! Invariants: a buffer lies in the largest class that its capacity holds; what is kept is at most the bound, and charged
//! to the account.

use std::sync::Arc;

use super::budget::{Account, Charge};

/// Smallest class: what is smaller costs the allocator next to nothing.
const MIN: usize = 4 << 10;
/// Classes of each doubling.
const STEPS: usize = 4;
/// Classes: up to 32 MiB, from where on the allocator asks the kernel each time.
const CLASSES: usize = 13 * STEPS + 1;

/// What a pool did so far, and keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolStats {
    /// Buffers asked for.
    pub taken: u64,
    /// Of those, the ones that were there.
    pub reused: u64,
    /// Buffers kept.
    pub kept: u64,
    /// Bytes of them.
    pub kept_bytes: u64,
}

/// The pool.
#[derive(Debug)]
pub struct Pool {
    classes: [Vec<Vec<u8>>; CLASSES],
    bound: u64,
    charge: Charge,
    stats: PoolStats,
}

/// The smallest class whose buffers hold `len` bytes.
fn class_for(len: usize) -> Option<usize> {
    let len = len.max(MIN);
    let step = (1 << len.ilog2()) / STEPS;
    let class = (len.ilog2() - MIN.ilog2()) as usize * STEPS + len.div_ceil(step) - STEPS;
    Some(class).filter(|&class| class < CLASSES)
}

/// The largest class whose buffers this capacity can serve as.
fn class_of(capacity: usize) -> Option<usize> {
    if capacity < MIN {
        return None;
    }
    let step = (1 << capacity.ilog2()) / STEPS;
    let class = (capacity.ilog2() - MIN.ilog2()) as usize * STEPS + capacity / step - STEPS;
    Some(class).filter(|&class| class < CLASSES)
}

/// Bytes of a class's buffers.
fn size_of_class(class: usize) -> usize {
    ((STEPS + class % STEPS) * (MIN / STEPS)) << (class / STEPS)
}

impl Pool {
    /// A pool that keeps at most `bound` bytes, charged to `account`.
    pub fn new(account: &Arc<Account>, bound: u64) -> Pool {
        Pool {
            classes: [const { Vec::new() }; CLASSES],
            bound,
            charge: Charge::new(account),
            stats: PoolStats::default(),
        }
    }

    /// An empty buffer with room for `len` bytes: a kept one where there is one.
    pub fn take(&mut self, len: usize) -> Vec<u8> {
        self.stats.taken += 1;
        let Some(class) = class_for(len) else {
            return Vec::with_capacity(len);
        };
        match self.classes[class].pop() {
            Some(buffer) => {
                self.stats.reused += 1;
                self.forget(&buffer);
                buffer
            }
            None => Vec::with_capacity(size_of_class(class)),
        }
    }

    /// Takes a buffer back; beyond the bound, and what is no class's, is freed.
    pub fn give(&mut self, mut buffer: Vec<u8>) {
        let Some(class) = class_of(buffer.capacity()) else {
            return;
        };
        let bytes = buffer.capacity() as u64;
        if self.stats.kept_bytes + bytes > self.bound {
            return;
        }
        if !self.charge.try_set(self.stats.kept_bytes + bytes) {
            return;
        }
        buffer.clear();
        self.stats.kept += 1;
        self.stats.kept_bytes += bytes;
        self.classes[class].push(buffer);
    }

    /// Frees everything that is kept.
    pub fn clear(&mut self) {
        self.classes = [const { Vec::new() }; CLASSES];
        (self.stats.kept, self.stats.kept_bytes) = (0, 0);
        self.charge.set(0);
    }

    fn forget(&mut self, buffer: &Vec<u8>) {
        self.stats.kept -= 1;
        self.stats.kept_bytes -= buffer.capacity() as u64;
        self.charge.set(self.stats.kept_bytes);
    }

    /// What it did so far, and keeps.
    pub fn stats(&self) -> PoolStats {
        self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::budget::Part;
    use proptest::prelude::*;

    #[test]
    fn a_buffer_comes_back_for_what_fits_it() {
        let account = Account::new(Part::Requests, 1 << 20);
        let mut pool = Pool::new(&account, 1 << 20);
        let mut buffer = pool.take(7169);
        assert_eq!(buffer.capacity(), 8192);
        buffer.extend_from_slice(b"x");
        let place = buffer.as_ptr();
        pool.give(buffer);
        assert_eq!(account.used(), 8192);
        assert_eq!(pool.take(9000).capacity(), 10 << 10);
        let again = pool.take(8192);
        assert!(again.is_empty() && again.as_ptr() == place);
        assert_eq!(account.used(), 0);
        let stats = pool.stats();
        assert_eq!((stats.taken, stats.reused, stats.kept), (3, 1, 0));
        pool.give(again);
        pool.clear();
        assert_eq!((account.used(), pool.stats().kept_bytes), (0, 0));
    }

    #[test]
    fn classes_are_a_quarter_apart() {
        for class in 0..CLASSES {
            let size = size_of_class(class);
            assert_eq!(
                (class_for(size), class_of(size)),
                (Some(class), Some(class))
            );
            assert_eq!(class_for(size - 1), Some(class));
            assert_ne!(class_for(size + 1), Some(class));
            assert_ne!(class_of(size - 1), Some(class));
        }
        assert_eq!(size_of_class(CLASSES - 1), 32 << 20);
    }

    #[test]
    fn neither_bound_nor_account_is_exceeded() {
        let account = Account::new(Part::Requests, 10_000);
        let mut pool = Pool::new(&account, 20_000);
        let buffers: Vec<_> = (0..3).map(|_| pool.take(1)).collect();
        buffers.into_iter().for_each(|buffer| pool.give(buffer));
        assert_eq!((pool.stats().kept, account.used()), (2, 8192));
        pool.give(Vec::with_capacity(100));
        pool.give(Vec::with_capacity(64 << 20));
        assert_eq!(pool.stats().kept, 2);
        drop(pool);
        assert_eq!(account.used(), 0);
    }

    proptest! {
        #[test]
        fn what_is_kept_is_charged(steps in prop::collection::vec((any::<bool>(), 0usize..70_000), 1..200)) {
            let account = Account::new(Part::Requests, 200_000);
            let mut pool = Pool::new(&account, 150_000);
            let mut held = Vec::new();
            for (take, len) in steps {
                if take {
                    let mut buffer = pool.take(len);
                    prop_assert!(buffer.capacity() >= len && buffer.is_empty());
                    // As a request may: larger than it was asked for.
                    buffer.resize(len + len % 3 * 5000, 1);
                    held.push(buffer);
                } else if let Some(buffer) = held.pop() {
                    pool.give(buffer);
                }
                let kept: usize = pool.classes.iter().flatten().map(Vec::capacity).sum();
                prop_assert_eq!(kept as u64, account.used());
                prop_assert!(kept <= 150_000);
            }
        }
    }
}
