//! Single messages by offset.
//!
//! A block that is read once is decompressed into a buffer of the thread and forgotten; one that is read again
//! soon is kept decompressed in the cache ([`super::cache`]), where its messages cost a microsecond. So reads all
//! over a large store neither fill the cache with what nobody asks for again nor pay for preparing it.

use std::cell::RefCell;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU32, Ordering};

use foldhash::fast::FixedState;

use super::codec::{self, CodecError};
use super::error::StoreError;
use super::sst::SstError;
use super::store::Store;
use crate::storage::PartitionKey;
use crate::wire::record_batch::{self, BatchError, Record};

/// Blocks that are remembered as read once: 64 KiB of memory.
const TOUCHED: usize = 1 << 14;

/// Which blocks were read lately: a table of tags, the newer takes the older's place. A tag that fits by chance
/// costs a block prepared for nothing.
pub(super) struct Touched(Box<[AtomicU32]>);

impl Default for Touched {
    fn default() -> Self {
        Touched((0..TOUCHED).map(|_| AtomicU32::new(0)).collect())
    }
}

impl Touched {
    /// Notes a read; true: the block was noted before.
    fn again(&self, file: u64, position: u64) -> bool {
        let hash = FixedState::default().hash_one((file, position));
        let tag = (hash >> 32) as u32 | 1;
        self.0[hash as usize % TOUCHED].swap(tag, Ordering::Relaxed) == tag
    }
}

/// What a thread reads into.
#[derive(Default)]
struct Buffers {
    block: Vec<u8>,
    plain: Vec<u8>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

impl Store {
    /// Hands the message at `offset` to `take`; `None`: there is none in SSTs. Cost: about 1 µs where its block is in
    /// the cache; else reading its block, its CRC, and decompressing its batch.
    pub fn record<R>(
        &self,
        key: PartitionKey,
        offset: i64,
        take: impl FnOnce(&Record<'_>) -> R,
    ) -> Result<Option<R>, StoreError> {
        let view = self.view();
        let extents = view.extents(key);
        let Some(extent) = extents.get(extents.partition_point(|e| e.end <= offset)) else {
            return Ok(None);
        };
        if offset < extent.first.max(view.start(key)) {
            return Ok(None);
        }
        let damaged = |error: SstError| {
            self.damaged(&extent.file, &error);
            StoreError::from(error)
        };
        let unreadable = |source| StoreError::Codec {
            path: extent.file.path().to_owned(),
            source,
        };
        let reader = self.reader(&extent.file).map_err(damaged)?;
        let Some(block) = reader.locate(key, offset).map_err(damaged)? else {
            return Ok(None);
        };
        if block.first_offset > offset {
            return Ok(None);
        }
        let file = extent.file.meta.number;
        if let Some(cached) = self.cache.get(file, block.position) {
            return Ok(cached.record(offset).map(|record| take(&record)));
        }
        BUFFERS.with_borrow_mut(|buffers| {
            let (bytes, plain) = (&mut buffers.block, &mut buffers.plain);
            reader.keep_index(key, offset).map_err(damaged)?;
            let batches = reader.read_block(&block, bytes).map_err(damaged)?;
            if self.touched.again(file, block.position) {
                let load = || -> Result<_, CodecError> { Ok(batches) };
                let cached = self
                    .cache
                    .block(file, block.position, load)
                    .map_err(unreadable)?;
                return Ok(cached.record(offset).map(|record| take(&record)));
            }
            let Some(batch) = batch_of(batches, offset).map_err(|e| unreadable(e.into()))? else {
                return Ok(None);
            };
            for record in codec::unchecked_records(batch, plain).map_err(unreadable)? {
                let record = record.map_err(|e| unreadable(e.into()))?;
                if record.offset >= offset {
                    return Ok((record.offset == offset).then(|| take(&record)));
                }
            }
            Ok(None)
        })
    }
}

/// The batch among `batches` that holds `offset`, or ends behind it.
fn batch_of(mut batches: &[u8], offset: i64) -> Result<Option<&[u8]>, BatchError> {
    while !batches.is_empty() {
        let header = record_batch::parse_header(batches)?;
        let len = header.total_len();
        let (batch, rest) = batches.split_at_checked(len).ok_or(BatchError::Truncated {
            have: batches.len(),
            need: len,
        })?;
        if header.next_offset() > offset {
            return Ok(Some(batch));
        }
        batches = rest;
    }
    Ok(None)
}
