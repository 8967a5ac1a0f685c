//! Reads a shard back, its SSTs and then its log, from a running server or from files. For any ordinary thread.
//!
//! Invariant: only durable batches are returned, whole and in offset order; the writer is never
//! blocked. Readers of one running log share its index.

mod keys;

use std::path::Path;
use std::sync::Arc;

use super::PartitionKey;
use super::catalog::Catalog;
use super::frames::{FetchError, FrameReader};
use super::index::{LogIndex, batch_time};
use super::keylog::KeyLog;
use super::pieces::{Pieces, SHARE};
use super::wal::frame::{ENTRY_HEADER, Entries, EntryKind, LogId};
use super::wal::segment::shard_dir;
use super::wal::shared::WalShared;
use super::wal::window::AtHand;
use crate::storage::CatalogError;
use crate::storage::lsm::StoreError;
use crate::storage::lsm::codec;
use crate::storage::lsm::store::Store;
use crate::wire::record_batch::{self, Records};

pub use keys::{KeyRange, Message, RangeKey, RangePage};

/// Why nothing was read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The offset is not in the log.
    #[error("offset {offset} is outside the partition's bounds, {start} to {end}")]
    OutOfRange {
        /// What was asked for.
        offset: i64,
        /// First offset.
        start: i64,
        /// Offset behind the last.
        end: i64,
    },
    /// The log could not be read.
    #[error("{0}")]
    Log(#[from] FetchError),
    /// The SSTs could not be read.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// The store could not be opened.
    #[error("{0}")]
    Catalog(#[from] CatalogError),
}

/// What a read appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes appended: whole record batches, the first of which holds the offset asked for.
    pub bytes: usize,
    /// Batches appended.
    pub batches: u32,
    /// Where the next read begins.
    pub next_offset: i64,
    /// Offset behind the last durable record.
    pub end: i64,
}

enum Index {
    Live(Arc<WalShared>),
    Own(Box<LogIndex>),
}

/// Attempts of a read: each time the segment it was in may have become an SST and gone.
const ATTEMPTS: usize = 8;

/// A reader of one shard: its SSTs and, behind them, its log; one a thread.
pub struct LogReader {
    index: Index,
    frames: FrameReader,
    store: Option<Arc<Store>>,
    keys: Arc<KeyLog>,
}

impl LogReader {
    /// Of a running log alone.
    pub fn live(shared: Arc<WalShared>) -> LogReader {
        LogReader {
            frames: FrameReader::live(Arc::clone(&shared)),
            keys: Arc::clone(shared.keys()),
            index: Index::Live(shared),
            store: None,
        }
    }

    /// Of a running log and the SSTs that its segments become.
    pub fn with_store(shared: Arc<WalShared>, store: Arc<Store>) -> LogReader {
        LogReader {
            store: Some(store),
            ..Self::live(shared)
        }
    }

    /// Of the files of a stopped or killed server: the store's folder and a shard. Writes nothing;
    /// reads the shard's whole log once.
    pub fn offline(store: &Path, shard: u16) -> Result<LogReader, ReadError> {
        let catalog = Catalog::open_read_only(store)?;
        let id = LogId {
            store: catalog.store_id(),
            shard,
        };
        Self::of_files(&shard_dir(store, shard), id)
    }

    /// As [`LogReader::offline`], of a shard's folder whose store is known.
    pub fn of_files(dir: &Path, id: LogId) -> Result<LogReader, ReadError> {
        let mut frames = FrameReader::files(dir, id);
        let mut store = None;
        let mut floor = 0;
        if dir.exists() {
            let opened = Store::open_read_only(dir, id)?;
            floor = opened.view().flushed_lsn;
            store = Some(opened);
        }
        let index = LogIndex::new(dir, floor);
        if dir.exists() {
            index.catch_up(&mut frames)?;
        }
        Ok(LogReader {
            index: Index::Own(Box::new(index)),
            frames,
            store,
            keys: Arc::default(),
        })
    }

    fn index(&self) -> &LogIndex {
        match &self.index {
            Index::Live(shared) => shared.index(),
            Index::Own(index) => index,
        }
    }

    /// Looks at what became durable since the last call.
    fn refresh(&mut self) -> Result<(), FetchError> {
        if let Index::Live(shared) = &self.index {
            shared.index().catch_up(&mut self.frames)?;
        }
        Ok(())
    }

    /// Calls `read`; again where a segment of the log became an SST meanwhile, whatever was read: it may lack
    /// what was in the segment.
    fn retry<R>(
        &mut self,
        mut read: impl FnMut(&mut Self) -> Result<R, ReadError>,
    ) -> Result<R, ReadError> {
        for _ in 1..ATTEMPTS {
            let floor = self.index().floor();
            let result = read(self);
            if self.index().floor() == floor {
                return result;
            }
        }
        read(self)
    }

    /// The partition's bounds in the log alone ((0, 0): nothing), and with the SSTs. The log is looked at
    /// first: what leaves it is in the SSTs before.
    fn both_bounds(&self, key: PartitionKey) -> ((i64, i64), (i64, i64)) {
        let log = self.index().bounds(key);
        let Some(store) = &self.store else {
            return (log, log);
        };
        let view = store.view();
        let least = view.start(key);
        let (mut start, mut end) = match (view.bounds(key), log.1 > 0) {
            (Some(sst), false) => sst,
            (Some(sst), true) => (sst.0, sst.1.max(log.1)),
            (None, _) => log,
        };
        start = start.max(least);
        end = end.max(start);
        (log, (start, end))
    }

    /// First offset of the partition and the one behind its last durable record; (0, 0) where there is
    /// nothing.
    pub fn bounds(&mut self, key: PartitionKey) -> Result<(i64, i64), ReadError> {
        self.retry(|reader| {
            reader.refresh()?;
            Ok(reader.both_bounds(key).1)
        })
    }

    /// Appends whole record batches to `out`, from the one that holds `from` on, at most `max_bytes`
    /// bytes but at least one batch. At the end nothing is appended.
    pub fn read(
        &mut self,
        key: PartitionKey,
        from: i64,
        max_bytes: usize,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, ReadError> {
        let mut pieces = Pieces::default();
        let outcome = self.read_by(
            key,
            from,
            max_bytes,
            &mut pieces,
            |store, outcome, pieces| {
                store.read_with(key, max_bytes, outcome, |bytes| pieces.push_copy(bytes))
            },
        )?;
        pieces.copy_to(out);
        Ok(outcome)
    }

    /// As [`LogReader::read`], for sending: large batches are not copied. Of SSTs, a block's CRC is compared on its first
    /// visit since the file was mapped.
    pub fn read_pieces(
        &mut self,
        key: PartitionKey,
        from: i64,
        max_bytes: usize,
        out: &mut Pieces,
    ) -> Result<Outcome, ReadError> {
        self.read_by(key, from, max_bytes, out, |store, outcome, out| {
            store.read_pieces(key, max_bytes, outcome, out)
        })
    }

    /// Reads; `of_store` is how SSTs are read.
    fn read_by(
        &mut self,
        key: PartitionKey,
        from: i64,
        max_bytes: usize,
        out: &mut Pieces,
        of_store: impl Fn(&Store, &mut Outcome, &mut Pieces) -> Result<(), StoreError>,
    ) -> Result<Outcome, ReadError> {
        let len = out.len();
        self.retry(|reader| {
            out.truncate(len);
            reader.read_once(key, from, max_bytes, out, &of_store)
        })
    }

    fn read_once(
        &mut self,
        key: PartitionKey,
        from: i64,
        max_bytes: usize,
        out: &mut Pieces,
        of_store: impl Fn(&Store, &mut Outcome, &mut Pieces) -> Result<(), StoreError>,
    ) -> Result<Outcome, ReadError> {
        self.refresh()?;
        let (log, (start, end)) = self.both_bounds(key);
        if from < start || from > end {
            return Err(ReadError::OutOfRange {
                offset: from,
                start,
                end,
            });
        }
        let mut outcome = Outcome {
            bytes: 0,
            batches: 0,
            next_offset: from,
            end,
        };
        let in_log = |offset| log.1 > 0 && offset >= log.0;
        if let Some(store) = &self.store
            && !in_log(from)
        {
            of_store(store, &mut outcome, out)?;
            if outcome.batches > 0 && outcome.bytes >= max_bytes {
                return Ok(outcome);
            }
            // Behind the last SST the log goes on, perhaps after offsets that are in neither.
            if log.1 > 0 && outcome.next_offset < log.0 {
                if store
                    .view()
                    .bounds(key)
                    .is_some_and(|b| b.1 > outcome.next_offset)
                {
                    return Ok(outcome);
                }
                outcome.next_offset = log.0;
            }
        }
        self.read_log(key, max_bytes, &mut outcome, out)?;
        Ok(outcome)
    }

    fn read_log(
        &mut self,
        key: PartitionKey,
        max_bytes: usize,
        outcome: &mut Outcome,
        out: &mut Pieces,
    ) -> Result<(), ReadError> {
        let mut at_hand = AtHand::default();
        // Windows are not held by more answers than memory is meant for.
        let share = match &self.index {
            Index::Live(shared) => shared.windows().may_share(),
            Index::Own(_) => false,
        };
        while outcome.next_offset < outcome.end {
            let spans = match &self.index {
                Index::Live(shared) => {
                    shared
                        .index()
                        .find_offset(key, outcome.next_offset, &mut self.frames)?
                }
                Index::Own(index) => {
                    index.find_offset(key, outcome.next_offset, &mut self.frames)?
                }
            };
            let before = outcome.next_offset;
            for span in spans {
                let mut lsn = span.lsn;
                while lsn <= span.last_lsn {
                    let (size, full) = self.frames.with_shared_frame(
                        span.base,
                        lsn,
                        &mut at_hand,
                        |header, frame, window| {
                            for entry in Entries::new(frame, header).map_while(Result::ok) {
                                if entry.kind != EntryKind::Batch(key) {
                                    continue;
                                }
                                let Ok(batch) = record_batch::parse_whole(entry.bytes) else {
                                    continue;
                                };
                                if batch.next_offset() <= outcome.next_offset {
                                    continue;
                                }
                                if outcome.batches > 0
                                    && outcome.bytes + entry.bytes.len() > max_bytes
                                {
                                    return (header.size(), true);
                                }
                                match window.filter(|_| share && entry.bytes.len() >= SHARE) {
                                    Some((window, at)) => {
                                        let start = at + entry.at + ENTRY_HEADER;
                                        out.push_log(window, start, entry.bytes.len());
                                    }
                                    None => out.push_copy(entry.bytes),
                                }
                                outcome.bytes += entry.bytes.len();
                                outcome.batches += 1;
                                outcome.next_offset = batch.next_offset();
                            }
                            (header.size(), false)
                        },
                    )?;
                    if full || (outcome.batches > 0 && outcome.bytes >= max_bytes) {
                        return Ok(());
                    }
                    lsn += size as u64;
                }
            }
            if outcome.next_offset == before {
                break;
            }
        }
        Ok(())
    }

    /// The first offset whose record has time `unix_ms` or a later one, by arrival (see
    /// [`crate::storage::index`] for whose clock counts); `None`: all are earlier.
    pub fn offset_for_time(
        &mut self,
        key: PartitionKey,
        unix_ms: i64,
    ) -> Result<Option<i64>, ReadError> {
        self.retry(|reader| reader.offset_for_time_once(key, unix_ms))
    }

    fn offset_for_time_once(
        &mut self,
        key: PartitionKey,
        unix_ms: i64,
    ) -> Result<Option<i64>, ReadError> {
        self.refresh()?;
        let span = match &self.index {
            Index::Live(shared) => shared.index().find_time(key, unix_ms, &mut self.frames)?,
            Index::Own(index) => index.find_time(key, unix_ms, &mut self.frames)?,
        };
        let mut least = 0;
        if let Some(store) = &self.store {
            least = store.view().start(key);
            if let Some(offset) = store.offset_for_time(key, unix_ms)? {
                return Ok(Some(offset));
            }
        }
        let Some(span) = span else {
            return Ok(None);
        };
        let mut scratch = Vec::new();
        let mut lsn = span.lsn;
        while lsn <= span.last_lsn {
            let (size, found) = self.frames.with_frame(span.base, lsn, |header, frame| {
                for entry in Entries::new(frame, header).map_while(Result::ok) {
                    if entry.kind != EntryKind::Batch(key) {
                        continue;
                    }
                    let Ok(batch) = record_batch::parse_whole(entry.bytes) else {
                        continue;
                    };
                    if batch_time(&batch, header) >= unix_ms {
                        // Inside the batch the records' own times decide, where they can be read.
                        let record = codec::plain(entry.bytes, &mut scratch)
                            .ok()
                            .and_then(|batch| Records::new(batch).ok())
                            .and_then(|records| {
                                records
                                    .map_while(Result::ok)
                                    .find(|record| record.timestamp >= unix_ms)
                                    .map(|record| record.offset)
                            });
                        return (header.size(), Some(record.unwrap_or(batch.base_offset)));
                    }
                }
                (header.size(), None)
            })?;
            if let Some(offset) = found {
                return Ok(Some(offset.max(least)));
            }
            lsn += size as u64;
        }
        Ok(None)
    }

    /// Offline: what lies where the log ends, if that is not simply its end (a torn frame, damage).
    pub fn stopped(&self) -> Option<String> {
        match &self.index {
            Index::Live(_) => None,
            Index::Own(index) => index.stopped(),
        }
    }
}
