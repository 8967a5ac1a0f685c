//! Reads a shard's log back, from a running server or from files. For any ordinary thread.
//!
//! Invariant: only durable batches are returned, whole and in offset order; the writer is never
//! blocked. Readers of one running log share its index.

use std::path::Path;
use std::sync::Arc;

use super::PartitionKey;
use super::catalog::Catalog;
use super::frames::{FetchError, FrameReader};
use super::index::{LogIndex, batch_time};
use super::wal::frame::{Entries, EntryKind, LogId};
use super::wal::segment::shard_dir;
use super::wal::shared::WalShared;
use crate::storage::CatalogError;
use crate::storage::lsm::codec;
use crate::wire::record_batch::{self, Records};

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

/// A reader of one shard's log; one a thread.
pub struct LogReader {
    index: Index,
    frames: FrameReader,
}

impl LogReader {
    /// Of a running log.
    pub fn live(shared: Arc<WalShared>) -> LogReader {
        LogReader {
            frames: FrameReader::live(Arc::clone(&shared)),
            index: Index::Live(shared),
        }
    }

    /// Of the files of a stopped or killed server: the store's folder and a shard. Writes nothing;
    /// reads the whole shard once.
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
        let index = LogIndex::new(dir);
        if dir.exists() {
            index.catch_up(&mut frames)?;
        }
        Ok(LogReader {
            index: Index::Own(Box::new(index)),
            frames,
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

    /// First offset of the partition and the one behind its last durable record; (0, 0) where there is
    /// nothing.
    pub fn bounds(&mut self, key: PartitionKey) -> Result<(i64, i64), ReadError> {
        self.refresh()?;
        Ok(self.index().bounds(key))
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
        self.refresh()?;
        let (start, end) = self.index().bounds(key);
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
        while outcome.next_offset < end {
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
                    let (size, full) =
                        self.frames.with_frame(span.base, lsn, |header, frame| {
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
                                out.extend_from_slice(entry.bytes);
                                outcome.bytes += entry.bytes.len();
                                outcome.batches += 1;
                                outcome.next_offset = batch.next_offset();
                            }
                            (header.size(), false)
                        })?;
                    if full || (outcome.batches > 0 && outcome.bytes >= max_bytes) {
                        return Ok(outcome);
                    }
                    lsn += size as u64;
                }
            }
            if outcome.next_offset == before {
                break;
            }
        }
        Ok(outcome)
    }

    /// The first offset whose record has time `unix_ms` or a later one, by arrival (see
    /// [`crate::storage::index`] for whose clock counts); `None`: all are earlier.
    pub fn offset_for_time(
        &mut self,
        key: PartitionKey,
        unix_ms: i64,
    ) -> Result<Option<i64>, ReadError> {
        self.refresh()?;
        let span = match &self.index {
            Index::Live(shared) => shared.index().find_time(key, unix_ms, &mut self.frames)?,
            Index::Own(index) => index.find_time(key, unix_ms, &mut self.frames)?,
        };
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
            if found.is_some() {
                return Ok(found);
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
