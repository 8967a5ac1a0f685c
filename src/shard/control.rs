//! Adding and retiring partitions of a running shard, from another thread.
//!
//! Invariants: whoever changes the partitions allocates and frees, never the shard's loop: a [`Change`]
//! goes to the shard with all the memory it needs and comes back with what is left over. A shard-local index
//! names one partition for the whole life of the shard, so that a message on its way to a retired one is
//! refused and never reaches another. The shard looks for changes after it took messages and before it stores
//! them: a message that was sent after a partition was added finds it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;

use super::partition::{Limits, NewPartition, PartitionStats, Tables};
use super::shard::MAX_PARTITIONS;
use crate::memory::wake::Wake;
use crate::storage::PartitionKey;

/// Changes on their way at most.
const CHANGES: usize = 64;
/// A shard looks for changes in every round; one that did not for so long has stopped.
const PATIENCE: Duration = Duration::from_secs(10);
/// Tables grow by a quarter, and at least by so many partitions.
const MIN_GROWTH: usize = 64;

/// Why a shard's partitions were not changed. Nothing was changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The shard's loop stands still.
    #[error(
        "the shard took no change of its partitions for 10 s: it has stopped or is stuck; see the log"
    )]
    Stuck,
    /// No more indexes.
    #[error(
        "a shard can have {MAX_PARTITIONS} partitions between two starts, deleted ones included: use more shards, or restart"
    )]
    TooMany,
}

/// One change of a shard's partitions.
pub(crate) struct Change {
    /// Larger tables; afterwards the old ones.
    pub tables: Option<Tables>,
    /// To be added, in the order of their indexes.
    pub add: std::vec::IntoIter<NewPartition>,
    /// To be retired, with counters to leave in the place of theirs.
    pub retire: Vec<(u32, Arc<PartitionStats>)>,
}

/// The way to the shard and back.
pub(crate) struct Changes {
    pub asked: ArrayQueue<Box<Change>>,
    pub done: ArrayQueue<Box<Change>>,
}

impl Changes {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            asked: ArrayQueue::new(CHANGES),
            done: ArrayQueue::new(CHANGES),
        })
    }
}

/// Changes one shard's partitions; for one thread at a time.
pub struct ShardControl {
    changes: Arc<Changes>,
    limits: Limits,
    /// Indexes given, and those that the shard's tables will have room for.
    len: usize,
    capacity: usize,
    on_their_way: usize,
    /// What retired partitions' late messages are counted in; nobody reads it.
    retired: Arc<PartitionStats>,
    /// Wakes the shard's loop, where that sleeps until it is woken.
    bell: Option<Arc<Wake>>,
}

impl ShardControl {
    pub(crate) fn new(
        changes: Arc<Changes>,
        limits: Limits,
        partitions: usize,
        bell: Option<Arc<Wake>>,
    ) -> Self {
        Self {
            changes,
            limits,
            len: partitions,
            capacity: partitions,
            on_their_way: 0,
            retired: Arc::default(),
            bell,
        }
    }

    /// Indexes given so far; the next partition gets this one.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the shard has no partition.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes sure that the next change, of `more` new partitions, will not fail. May wait for the shard.
    pub fn reserve(&mut self, more: usize) -> Result<(), ControlError> {
        if self.len + more >= MAX_PARTITIONS {
            return Err(ControlError::TooMany);
        }
        let start = Instant::now();
        loop {
            while self.changes.done.pop().is_some() {
                self.on_their_way -= 1;
            }
            if self.on_their_way < CHANGES {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                return Err(ControlError::Stuck);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Adds partitions; gives their indexes and counters. Messages may be sent to them at once. Waits only
    /// where [`ShardControl::reserve`] would.
    pub fn add(
        &mut self,
        keys: &[PartitionKey],
    ) -> Result<Vec<(u32, Arc<PartitionStats>)>, ControlError> {
        self.reserve(keys.len())?;
        let first = self.len as u32;
        let added: Vec<NewPartition> = keys.iter().map(|&key| (key, Arc::default())).collect();
        let given = (first..)
            .zip(&added)
            .map(|(index, (_, stats))| (index, Arc::clone(stats)));
        let given = given.collect();
        self.len += keys.len();
        let mut tables = None;
        if self.len > self.capacity {
            self.capacity = (self.len + (self.len / 4).max(MIN_GROWTH)).min(MAX_PARTITIONS - 1);
            tables = Some(Tables::new(self.capacity, self.limits));
        }
        self.ask(Change {
            tables,
            add: added.into_iter(),
            retire: Vec::new(),
        });
        Ok(given)
    }

    /// Retires partitions: what still arrives for them is refused as unknown.
    pub fn retire(&mut self, indexes: &[u32]) -> Result<(), ControlError> {
        self.reserve(0)?;
        let retire = indexes
            .iter()
            .map(|&index| (index, Arc::clone(&self.retired)))
            .collect();
        self.ask(Change {
            tables: None,
            add: Vec::new().into_iter(),
            retire,
        });
        Ok(())
    }

    fn ask(&mut self, change: Change) {
        self.on_their_way += 1;
        let pushed = self.changes.asked.push(Box::new(change));
        debug_assert!(pushed.is_ok(), "reserve found room");
        if let Some(bell) = &self.bell {
            bell.wake();
        }
    }
}
