//! Reading by key: the newest record of a key, and the keys of a range in order, from the log and the SSTs.
//!
//! Invariant: a search knows all that was durable when it began. The log is looked at first, the SSTs second, as for
//! offsets: what leaves the log is in the SSTs before. Of topics that have no index of their keys the same is
//! found, at the cost of reading their part of the SSTs. All records of a key are found by reading the files that the
//! indexes name.

use std::ops::Bound;

use super::{ATTEMPTS, LogReader, ReadError};
use crate::storage::PartitionKey;
use crate::storage::keylog::scan;
use crate::storage::lsm::codec;
use crate::storage::lsm::keys::kept;
use crate::storage::lsm::keys::range::{KeyBounds, Page, each_key};
use crate::storage::pieces::Pieces;
use crate::wire::record_batch::{self, Record, Records};

/// A record by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Its offset.
    pub offset: i64,
    /// Its time, Unix ms.
    pub timestamp: i64,
    /// Its key.
    pub key: Option<Vec<u8>>,
    /// Its value; `None`: a tombstone.
    pub value: Option<Vec<u8>>,
}

impl Message {
    /// A copy of a record.
    pub fn of(record: &Record<'_>) -> Message {
        Message {
            offset: record.offset,
            timestamp: record.timestamp,
            key: record.key.map(<[u8]>::to_vec),
            value: record.value.map(<[u8]>::to_vec),
        }
    }
}

/// A key of a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeKey {
    /// As it is kept: see [`kept`].
    pub kept: Vec<u8>,
    /// The newest offset of a record that has it.
    pub offset: i64,
}

/// A piece of a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangePage {
    /// In order.
    pub keys: Vec<RangeKey>,
    /// What is left of the range; `None`: nothing.
    pub rest: Option<KeyBounds>,
}

/// The keys of a range, page by page; made by [`LogReader::range`]. After an error it ends.
pub struct KeyRange<'a> {
    reader: &'a mut LogReader,
    key: PartitionKey,
    page: std::vec::IntoIter<RangeKey>,
    rest: Option<KeyBounds>,
}

/// Bytes that [`LogReader::history`] reads in a call, so that who asks hears of it in time.
const HISTORY_BYTES: usize = 64 << 20;
/// And at a time.
const HISTORY_STEP: usize = 1 << 20;

/// Keys that a [`KeyRange`] asks for at a time.
const PAGE: usize = 512;

impl Iterator for KeyRange<'_> {
    type Item = Result<RangeKey, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(key) = self.page.next() {
                return Some(Ok(key));
            }
            let bounds = self.rest.take()?;
            match self.reader.keys(self.key, &bounds, PAGE) {
                Ok(page) => (self.page, self.rest) = (page.keys.into_iter(), page.rest),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl LogReader {
    /// The keys between `bounds` in order, with their newest offsets. Each page of them knows all that was durable when
    /// it was read.
    pub fn range(&mut self, key: PartitionKey, bounds: KeyBounds) -> KeyRange<'_> {
        KeyRange {
            reader: self,
            key,
            page: Vec::new().into_iter(),
            rest: Some(bounds),
        }
    }

    /// The record at `offset`; `None`: there is none.
    pub fn message(
        &mut self,
        key: PartitionKey,
        offset: i64,
    ) -> Result<Option<Message>, ReadError> {
        self.record(key, offset, Message::of)
    }

    /// The newest offset of a record with this key. Cost: see [`crate::storage::lsm::Store::lookup`] and
    /// `storage::keylog`.
    pub fn lookup(&mut self, key: PartitionKey, wanted: &[u8]) -> Result<Option<i64>, ReadError> {
        self.retry(|reader| reader.lookup_once(key, wanted))
    }

    fn lookup_once(&mut self, key: PartitionKey, wanted: &[u8]) -> Result<Option<i64>, ReadError> {
        let kept = kept(wanted);
        let known = loop {
            let generation = self.refresh_keys(key.topic)?;
            if let Some(known) = self.keys.lookup(generation, key, &kept) {
                break known;
            }
        };
        let (mut newest, mut scratch) = (known.offset, Vec::new());
        for span in known.scan {
            let mut found = None;
            scan(span, key, &mut self.frames, |batch| {
                each_key(batch, &mut scratch, |key, offset| {
                    if key == wanted {
                        found = found.max(Some(offset));
                    }
                });
            })?;
            if found.is_some() {
                newest = found;
                break;
            }
        }
        let Some(store) = &self.store else {
            return Ok(newest);
        };
        match newest {
            Some(offset) => Ok((offset >= store.view().start(key)).then_some(offset)),
            None => Ok(store.lookup(key, wanted)?),
        }
    }

    /// The least `limit` keys between `bounds`, with their newest offsets. The next page begins where this one's `rest`
    /// says, and knows what has come meanwhile. Cost: as [`LogReader::lookup`], and a microsecond for each key and file.
    pub fn keys(
        &mut self,
        key: PartitionKey,
        bounds: &KeyBounds,
        limit: usize,
    ) -> Result<RangePage, ReadError> {
        self.retry(|reader| reader.keys_once(key, bounds, limit))
    }

    fn keys_once(
        &mut self,
        key: PartitionKey,
        bounds: &KeyBounds,
        limit: usize,
    ) -> Result<RangePage, ReadError> {
        let start = self
            .store
            .as_ref()
            .map_or(0, |store| store.view().start(key));
        let mut page = Page::new(bounds, limit, start);
        let spans = loop {
            let generation = self.refresh_keys(key.topic)?;
            if let Some(spans) = self.keys.keys(generation, key, &mut page) {
                break spans;
            }
        };
        let mut scratch = Vec::new();
        for span in spans {
            scan(span, key, &mut self.frames, |batch| {
                page.batch(batch, &mut scratch);
            })?;
        }
        if let Some(store) = &self.store {
            store.keys(key, &mut page)?;
        }
        let (keys, full) = page.finish();
        let last = keys.last().filter(|_| full).map(|(kept, _)| kept.clone());
        Ok(RangePage {
            rest: last.map(|last| KeyBounds {
                from: Bound::Excluded(last),
                to: bounds.to.clone(),
            }),
            keys: keys
                .into_iter()
                .map(|(kept, offset)| RangeKey { kept, offset })
                .collect(),
        })
    }

    /// Brings what is known of the log's keys up to what is durable.
    fn refresh_keys(&mut self, topic: u32) -> Result<u64, ReadError> {
        self.refresh()?;
        self.keys.want(topic);
        let (floor, stretches) = self.index().stretches();
        Ok(self.keys.catch_up(floor, &stretches, &mut self.frames)?)
    }

    /// The newest record with this key; a tombstone is one. Records that go while they are looked for, because
    /// newer ones supersede them, make it look again.
    pub fn newest(
        &mut self,
        key: PartitionKey,
        wanted: &[u8],
    ) -> Result<Option<Message>, ReadError> {
        for _ in 0..ATTEMPTS {
            let Some(offset) = self.lookup(key, wanted)? else {
                return Ok(None);
            };
            if let Some(message) = self.message(key, offset)? {
                return Ok(Some(message).filter(|message| message.key.as_deref() == Some(wanted)));
            }
        }
        Ok(None)
    }

    /// The newest record of a key of a range; `None`: it is not there any more.
    pub fn newest_of(
        &mut self,
        key: PartitionKey,
        found: &RangeKey,
    ) -> Result<Option<Message>, ReadError> {
        match self.message(key, found.offset)? {
            Some(message) => Ok(Some(message)),
            // What superseded it can only be named where the key is whole.
            None if found.kept.len() < crate::storage::lsm::keys::MAX_KEPT => {
                self.newest(key, &found.kept)
            }
            None => Ok(None),
        }
    }

    /// Hands the records with this key from offset `from` on to `take`, oldest first, until it says false. `Some`: where the
    /// next call goes on, because `take` wanted no more or enough was read; `None`: there are no more. Cost: a search in
    /// the index of each SST, and reading the partition in those that have the key, and in the log; some 64 MiB at most.
    pub fn history(
        &mut self,
        key: PartitionKey,
        wanted: &[u8],
        from: i64,
        mut take: impl FnMut(&Record<'_>) -> bool,
    ) -> Result<Option<i64>, ReadError> {
        let Some(newest) = self.lookup(key, wanted)? else {
            return Ok(None);
        };
        let kept = kept(wanted);
        let (mut at, mut left) = (from.max(0), HISTORY_BYTES);
        let (mut bytes, mut scratch) = (Vec::new(), Vec::new());
        while at <= newest {
            if let Some(store) = &self.store
                && let Some((end, last)) = store.newest_beside(key, at, &kept)?
                && last.is_none_or(|last| last < at)
            {
                at = end;
                continue;
            }
            if left == 0 {
                return Ok(Some(at));
            }
            bytes.clear();
            let outcome = match self.read(key, at, HISTORY_STEP.min(left), &mut bytes) {
                Ok(outcome) => outcome,
                // Retention, or a merge that leaves out, goes on meanwhile.
                Err(ReadError::OutOfRange { start, .. }) if at < start => {
                    at = start;
                    continue;
                }
                Err(error) => return Err(error),
            };
            left = left.saturating_sub(outcome.bytes.max(1));
            let mut rest = &bytes[..];
            while let Ok(header) = record_batch::parse_header(rest) {
                let Some((batch, others)) = rest.split_at_checked(header.total_len()) else {
                    break;
                };
                rest = others;
                let plain = codec::plain(batch, &mut scratch).map(Records::new);
                let (false, Ok(Ok(records))) = (header.is_control(), plain) else {
                    continue;
                };
                for record in records.map_while(Result::ok) {
                    let meant = record.offset >= at && record.key == Some(wanted);
                    if meant && !take(&record) {
                        return Ok(Some(record.offset));
                    }
                }
            }
            if outcome.next_offset <= at {
                break;
            }
            at = outcome.next_offset;
        }
        Ok(None)
    }

    /// Hands the record at `offset` to `take`; `None`: there is none.
    pub fn record<R>(
        &mut self,
        key: PartitionKey,
        offset: i64,
        mut take: impl FnMut(&Record<'_>) -> R,
    ) -> Result<Option<R>, ReadError> {
        self.retry(|reader| reader.record_once(key, offset, &mut take))
    }

    fn record_once<R>(
        &mut self,
        key: PartitionKey,
        offset: i64,
        take: &mut impl FnMut(&Record<'_>) -> R,
    ) -> Result<Option<R>, ReadError> {
        self.refresh()?;
        let (log, (start, end)) = self.both_bounds(key);
        if offset < start || offset >= end {
            return Ok(None);
        }
        if log.1 == 0 || offset < log.0 {
            return match &self.store {
                Some(store) => Ok(store.record(key, offset, |record| take(record))?),
                None => Ok(None),
            };
        }
        let (mut pieces, mut bytes, mut scratch) = (Pieces::default(), Vec::new(), Vec::new());
        let mut outcome = super::Outcome {
            bytes: 0,
            batches: 0,
            next_offset: offset,
            end,
        };
        self.read_log(key, 1, &mut outcome, &mut pieces)?;
        pieces.copy_to(&mut bytes);
        let plain = match record_batch::parse_header(&bytes) {
            Ok(_) => codec::plain(&bytes, &mut scratch).ok(),
            Err(_) => None,
        };
        let mut records = plain.and_then(|plain| Records::new(plain).ok());
        let found = records
            .iter_mut()
            .flatten()
            .map_while(Result::ok)
            .find(|record| record.offset == offset);
        Ok(found.map(|record| take(&record)))
    }
}
