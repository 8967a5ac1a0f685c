//! Blocks of SSTs as they are read most: decompressed, and with the places of their records.
//!
//! A message of a hot block is found without its block's CRC, decompression or a walk over the batch: by
//! halving the places of every fourth record, then over at most three others. Keyed by file number and byte in
//! the file, neither of which ever gets other content: nothing is invalidated, what is no longer read goes.
//!
//! Eviction, sharding and locks are `quick_cache`'s (S3-FIFO, which a scan does not flush). Invariant: the blocks
//! in the cache weigh no more than the budget; a reader keeps what it holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use foldhash::fast::RandomState;
use quick_cache::sync::Cache;
use quick_cache::{Lifecycle, Weighter};

use super::codec::{self, CodecError, MAX_PLAIN};
use crate::wire::record_batch::{self, BatchError, Mark, Record, Records};

/// Records from one known place to the next.
const SPACING: usize = 4;
/// What an entry takes beside its block: the cache's own, and the block's fields. An estimate, rounded up.
const OVERHEAD: usize = 256;
/// Bytes of a block as it mostly is, for the first size of the cache's tables.
const TYPICAL: usize = 16 << 10;

/// A place in a block to begin walking at.
#[derive(Clone, Copy)]
struct Place {
    /// Offset of the record there.
    offset: i64,
    /// Byte of its batch in the block.
    batch: u32,
    mark: Mark,
}

/// A block's batches, not compressed.
pub struct CachedBlock {
    bytes: Box<[u8]>,
    places: Box<[Place]>,
}

impl CachedBlock {
    /// Of successive whole batches, each checked and decompressed. Cost: as [`codec::decompress`], and a walk over
    /// all records. Batches of a codec that is not read here, or of more than 64 MiB plain, are refused.
    pub fn new(batches: &[u8]) -> Result<CachedBlock, CodecError> {
        let mut bytes = Vec::new();
        let mut places = Vec::new();
        let mut scratch = Vec::new();
        let mut rest = batches;
        while !rest.is_empty() {
            let len = record_batch::parse_header(rest)?.total_len();
            let (batch, behind) = rest.split_at_checked(len).ok_or(BatchError::Truncated {
                have: rest.len(),
                need: len,
            })?;
            rest = behind;
            let limit = MAX_PLAIN - bytes.len();
            codec::decompress(batch, limit, &mut scratch)?;
            if scratch.len() > limit {
                return Err(CodecError::TooLarge { limit: MAX_PLAIN });
            }
            let at = bytes.len() as u32;
            let mut records = Records::new(&scratch)?;
            let mut index = 0;
            loop {
                let mark = records.mark();
                let Some(record) = records.next() else { break };
                let record = record?;
                if index % SPACING == 0 {
                    places.push(Place {
                        offset: record.offset,
                        batch: at,
                        mark,
                    });
                }
                index += 1;
            }
            bytes.extend_from_slice(&scratch);
        }
        Ok(CachedBlock {
            bytes: bytes.into(),
            places: places.into(),
        })
    }

    /// The batches as codec none, one behind the other.
    pub fn batches(&self) -> &[u8] {
        &self.bytes
    }

    /// The record with this offset; `None`: the block has none. Cost: some 0.1 µs, no allocation.
    pub fn record(&self, offset: i64) -> Option<Record<'_>> {
        let behind = self.places.partition_point(|place| place.offset <= offset);
        let place = &self.places[behind.checked_sub(1)?];
        // What `new` walked is walked again: there are no errors.
        Records::resume(&self.bytes[place.batch as usize..], place.mark)
            .ok()?
            .map_while(Result::ok)
            .find(|record| record.offset >= offset)
            .filter(|record| record.offset == offset)
    }

    /// Bytes of memory, the cache's own share included.
    pub fn weight(&self) -> usize {
        self.bytes.len() + size_of_val(&*self.places) + OVERHEAD
    }
}

/// A block: file number and byte in the file.
type Key = (u64, u64);

#[derive(Clone)]
struct Weigh;

impl Weighter<Key, Arc<CachedBlock>> for Weigh {
    fn weight(&self, _: &Key, block: &Arc<CachedBlock>) -> u64 {
        block.weight() as u64
    }
}

/// Counts what is evicted.
#[derive(Clone, Default)]
struct Evictions(Arc<AtomicU64>);

impl Lifecycle<Key, Arc<CachedBlock>> for Evictions {
    type RequestState = ();

    fn on_evict(&self, _: &mut Self::RequestState, _: Key, _: Arc<CachedBlock>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a cache did so far, and holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheStats {
    /// Reads that found their block.
    pub hits: u64,
    /// Reads that did not.
    pub misses: u64,
    /// Blocks that made room for others, or were too large for the cache.
    pub evictions: u64,
    /// Blocks held.
    pub blocks: u64,
    /// Bytes held.
    pub bytes: u64,
    /// Bytes that may be held.
    pub budget: u64,
}

/// A cache of blocks; any number of threads may use it at the same time.
pub struct BlockCache {
    cache: Cache<Key, Arc<CachedBlock>, Weigh, RandomState, Evictions>,
    evictions: Evictions,
}

impl BlockCache {
    /// A cache of `budget` bytes, in shards that share it evenly: a block of more than a shard's part is not kept.
    pub fn new(budget: u64) -> BlockCache {
        let evictions = Evictions::default();
        let blocks = usize::try_from(budget).unwrap_or(usize::MAX) / TYPICAL;
        BlockCache {
            cache: Cache::with(
                blocks.max(1),
                budget,
                Weigh,
                RandomState::default(),
                evictions.clone(),
            ),
            evictions,
        }
    }

    /// The block at byte `position` of SST `file`; where it is not here, of what `load` gives, whole batches. Of
    /// several threads that miss the same block one loads it and the others wait. Cost of a hit: about 50 ns.
    pub fn block<'a, E: From<CodecError>>(
        &self,
        file: u64,
        position: u64,
        load: impl FnOnce() -> Result<&'a [u8], E>,
    ) -> Result<Arc<CachedBlock>, E> {
        self.cache.get_or_insert_with(&(file, position), || {
            Ok(Arc::new(CachedBlock::new(load()?)?))
        })
    }

    /// The block at byte `position` of SST `file`, where it is here.
    pub fn get(&self, file: u64, position: u64) -> Option<Arc<CachedBlock>> {
        self.cache.get(&(file, position))
    }

    /// Changes what it may hold; what does not fit goes at once.
    pub fn set_budget(&self, budget: u64) {
        self.cache.set_capacity(budget);
    }

    /// What it did so far.
    pub fn stats(&self) -> CacheStats {
        CacheStats {
            hits: self.cache.hits(),
            misses: self.cache.misses(),
            evictions: self.evictions.0.load(Ordering::Relaxed),
            blocks: self.cache.len() as u64,
            bytes: self.cache.weight(),
            budget: self.cache.capacity(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::lsm::{Codec, Rebatcher};
    use crate::wire::record_batch::BatchWriter;
    use proptest::prelude::*;

    /// `count` batches of `records` each from `first` on, with a gap of 3 offsets between them.
    fn batches(first: i64, count: i64, records: i64, codec: Codec) -> Vec<u8> {
        let mut out = Vec::new();
        let mut rebatcher = Rebatcher::new(codec, 1 << 20);
        for number in 0..count {
            let base = first + number * (records + 3);
            let mut buf = vec![0; 200 + records as usize * 80];
            let mut writer = BatchWriter::new(&mut buf, 1000);
            for i in 0..records {
                let value = format!("value of offset {}", base + i);
                let key = format!("{}", base + i);
                writer
                    .push(1000 + i, Some(key.as_bytes()), Some(value.as_bytes()))
                    .unwrap();
            }
            let len = writer.finish(base);
            let mut take = |batch: &[u8]| out.extend_from_slice(batch);
            rebatcher.push(&buf[..len], &mut take).unwrap();
            if number % 2 == 1 {
                rebatcher.finish(&mut take);
            }
        }
        rebatcher.finish(&mut |batch: &[u8]| out.extend_from_slice(batch));
        out
    }

    proptest! {
        #[test]
        fn every_record_is_found_and_no_other(
            first in 0i64..1 << 40, count in 1i64..6, records in 1i64..70,
            codec in prop_oneof![Just(Codec::None), Just(Codec::Lz4), Just(Codec::default())],
        ) {
            let block = CachedBlock::new(&batches(first, count, records, codec)).unwrap();
            for offset in first - 2..first + count * (records + 3) + 2 {
                let number = offset - first;
                let there = number >= 0
                    && number / (records + 3) < count
                    && number % (records + 3) < records;
                match block.record(offset) {
                    Some(record) => {
                        prop_assert!(there, "{offset}");
                        prop_assert_eq!(record.offset, offset);
                        prop_assert_eq!(record.timestamp, 1000 + number % (records + 3));
                        let value = format!("value of offset {offset}");
                        prop_assert_eq!(record.value, Some(value.as_bytes()));
                    }
                    None => prop_assert!(!there, "{offset}"),
                }
            }
        }
    }

    #[test]
    fn damaged_and_cut_blocks_are_refused() {
        let whole = batches(0, 2, 5, Codec::default());
        for len in 1..whole.len() {
            assert!(CachedBlock::new(&whole[..len]).is_err(), "{len}");
        }
        for at in 21..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 4;
            assert!(CachedBlock::new(&bytes).is_err(), "{at}");
        }
        assert!(CachedBlock::new(&[]).unwrap().record(0).is_none());
    }

    #[test]
    fn a_block_is_loaded_once_and_an_error_is_not_kept() {
        let cache = BlockCache::new(64 << 20);
        let bytes = batches(10, 1, 5, Codec::Lz4);
        let refused = cache.block(1, 128, || Err(CodecError::Unsupported(1)));
        assert_eq!(refused.err(), Some(CodecError::Unsupported(1)));
        let load = || -> Result<_, CodecError> { Ok(&bytes[..]) };
        let block = cache.block(1, 128, load).unwrap();
        let again = cache
            .block(1, 128, || -> Result<&[u8], CodecError> { unreachable!() })
            .unwrap();
        assert!(Arc::ptr_eq(&block, &again));
        assert!(!Arc::ptr_eq(&block, &cache.block(2, 128, load).unwrap()));
        let stats = cache.stats();
        assert_eq!((stats.blocks, stats.hits, stats.evictions), (2, 1, 0));
        assert_eq!(stats.bytes, 2 * block.weight() as u64);
    }

    #[test]
    fn the_budget_holds_and_readers_keep_what_they_have() {
        let cache = BlockCache::new(16 << 20);
        let bytes = batches(0, 1, 500, Codec::default());
        let load = || -> Result<_, CodecError> { Ok(&bytes[..]) };
        let first = cache.block(0, 0, load).unwrap();
        let fits = (16 << 20) / first.weight() as u64;
        for file in 1..4 * fits {
            cache.block(file, 0, load).unwrap();
            assert!(cache.stats().bytes <= 16 << 20);
        }
        let stats = cache.stats();
        assert!(stats.blocks <= fits && stats.blocks > fits / 2, "{stats:?}");
        assert_eq!(stats.evictions, 4 * fits - stats.blocks);
        cache.set_budget(4 << 20);
        assert!(cache.stats().bytes <= 4 << 20 && cache.stats().budget >= 4 << 20);
        assert_eq!(first.record(499).unwrap().offset, 499);
    }
}
