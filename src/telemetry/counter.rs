//! A counter with one writer and any number of readers.
//!
//! Invariant: only one thread calls [`Counter::add`] on a given counter, so an increment is a plain
//! load and store (one cycle, no locked instruction); readers on other threads see a value that was
//! true at some moment and never goes back.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts events or bytes; wraps after 2^64.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter at zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds `n`. Only for the counter's single writer: two writers would lose increments.
    #[inline(always)]
    pub fn add(&self, n: u64) {
        let value = self.0.load(Ordering::Relaxed);
        self.0.store(value.wrapping_add(n), Ordering::Relaxed);
    }

    /// The present value, from any thread.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_up() {
        let counter = Counter::new();
        counter.add(2);
        counter.add(40);
        assert_eq!(counter.get(), 42);
    }
}
