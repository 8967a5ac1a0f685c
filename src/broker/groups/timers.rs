//! What the coordinator has to do later, in order of time.
//!
//! Invariant: an entry is removed exactly when its owner says so, so the queue holds at most one entry
//! for each member and two for each group, however often clients ask for new times.

use std::collections::BTreeSet;
use std::sync::Arc;

/// What is due.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// A member's session may have ended: group, member.
    Session(Arc<str>, Arc<str>),
    /// A group's members had time enough to join.
    Join(Arc<str>),
    /// A group's members had time enough to ask for their assignment.
    Sync(Arc<str>),
    /// Offsets and groups that nobody needs any more are looked for.
    Expire,
}

/// The queue; times are monotonic milliseconds.
#[derive(Debug, Default)]
pub(super) struct Timers(BTreeSet<(u64, Timer)>);

impl Timers {
    /// When the first is due.
    pub fn first(&self) -> Option<u64> {
        self.0.first().map(|&(at, _)| at)
    }

    /// Takes the first that is due by `now`.
    pub fn pop_due(&mut self, now: u64) -> Option<(u64, Timer)> {
        if self.first()? > now {
            return None;
        }
        self.0.pop_first()
    }

    pub fn insert(&mut self, at: u64, timer: Timer) {
        self.0.insert((at, timer));
    }

    /// Removes the entry that stands at `at`.
    pub fn remove(&mut self, at: u64, timer: Timer) {
        self.0.remove(&(at, timer));
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}
