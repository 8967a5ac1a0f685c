//! What a shard's store may take of memory.

use super::flush::WORKING_SET;
use crate::memory::budget::{Budget, Part, Share};

/// Cache of decompressed blocks of a store without a budget.
const CACHE_BYTES: u64 = 64 << 20;
/// What flushing and merging of such a store may take.
const MAINTENANCE_BYTES: u64 = 160 << 20;
/// Of its share less two working sets, one part in so many is for each of: the flush's list of batches, or the keys that it or a merge gathers for an
/// index; compaction's keys (two); files' indexes.
const QUARTER: u64 = 4;
/// Bytes of the table of keys, each: an entry of 32 bytes with a byte of control; while it grows, half as much again.
const KEY: u64 = 50;
/// Bytes that an SST under way keeps for each block.
const BLOCK: u64 = 56;
/// Bytes that a block mostly has.
const BLOCK_BYTES: u64 = 16 << 10;

/// Merged files may have so many bytes in any case: with smaller ones merging would not end.
const MERGED_MIN: u64 = 64 << 20;

/// The shares of one shard's store.
#[derive(Debug, Clone)]
pub struct StoreMemory {
    /// Decompressed blocks.
    pub cache: Share,
    /// Where partitions lie in the SSTs.
    pub extents: Share,
    /// Flushing and merging.
    pub maintenance: Share,
}

impl Default for StoreMemory {
    fn default() -> StoreMemory {
        StoreMemory {
            cache: Share::alone(Part::BlockCache, CACHE_BYTES),
            extents: Share::alone(Part::Partitions, u64::MAX),
            maintenance: Share::alone(Part::Maintenance, MAINTENANCE_BYTES),
        }
    }
}

impl StoreMemory {
    /// One of `shards` stores' part of a budget.
    pub fn of(budget: &Budget, shards: usize) -> StoreMemory {
        let share = |part| budget.account(part).share(shards);
        StoreMemory {
            cache: share(Part::BlockCache),
            extents: share(Part::Partitions),
            maintenance: share(Part::Maintenance),
        }
    }

    /// What a flush and a merge at the same time have for their lists.
    fn lists(&self) -> u64 {
        self.maintenance.bytes().saturating_sub(2 * WORKING_SET)
    }

    /// Bytes of the list of a segment's batches, while it is flushed.
    pub(super) fn flush_bytes(&self) -> u64 {
        self.lists() / QUARTER
    }

    /// Bytes of the keys that are gathered for an index before they go to disk.
    pub(super) fn run_bytes(&self) -> u64 {
        self.lists() / QUARTER
    }

    /// Keys that compaction has in memory at a time: seven eighths of a power of two, since the table doubles.
    pub(super) fn keys_at_once(&self) -> usize {
        let room = (self.lists() / 2 / KEY).clamp(1 << 10, 1 << 24);
        let places = 1u64 << room.ilog2();
        (places / 8 * 7) as usize
    }

    /// Bytes of a merged file whose index stays within the share.
    pub(super) fn merged_max(&self) -> u64 {
        (self.lists() / QUARTER / 2 / BLOCK * BLOCK_BYTES).max(MERGED_MIN)
    }
}

/// What `keys` keys take.
pub(super) fn keys_bytes(keys: usize) -> u64 {
    keys as u64 * KEY * 8 / 7
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_cut_to_the_share() {
        let of = |bytes| StoreMemory {
            maintenance: Share::alone(Part::Maintenance, bytes),
            ..StoreMemory::default()
        };
        let small = of(32 << 20);
        assert!(keys_bytes(small.keys_at_once()) <= 8 << 20);
        assert_eq!(small.flush_bytes(), 4 << 20);
        assert!(small.merged_max() >= 512 << 20);
        let large = StoreMemory::default();
        assert!(large.keys_at_once() > 900_000 && large.merged_max() > 2 << 30);
        assert!(keys_bytes(large.keys_at_once()) <= 80 << 20);
        assert!(of(0).keys_at_once() > 0);
    }
}
