//! The batches of a sealed WAL segment, partition by partition, in the order of offsets.
//!
//! The list of them is kept within a number of bytes: where a segment has more batches, it is gone through several times,
//! each time for the partitions that come next. Invariant: partitions come in ascending order, each once and whole; a
//! partition that has more batches than fit is listed nevertheless.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::error::StoreError;
use super::flush::collect;
use super::pace::Pace;
use super::store::View;
use crate::memory::budget::{Charge, Share};
use crate::storage::PartitionKey;
use crate::storage::frames::{Cursor, FrameReader};
use crate::storage::index::batch_time;
use crate::storage::wal::frame::{ENTRY_HEADER, Entries, EntryKind};
use crate::wire::record_batch;

/// A batch in the segment.
pub(super) struct Entry {
    pub(super) key: PartitionKey,
    pub(super) offset: i64,
    /// Byte in the file, and bytes.
    pub(super) at: u64,
    pub(super) len: u32,
    pub(super) time: i64,
}

/// The batches of one segment.
pub(super) struct Batches {
    start: Cursor,
    path: PathBuf,
    most: usize,
    entries: Vec<Entry>,
    /// Entries that were given.
    given: usize,
    /// The partitions up to this one have been listed; and whether there are others behind it.
    listed: Option<PartitionKey>,
    more: bool,
    charge: Charge,
    /// What could not be read, as the first pass found it.
    pub(super) damage: Vec<(u64, String)>,
}

impl Batches {
    /// Of the segment at `path` that begins at `start`; the list takes at most `bytes`, charged to `memory`.
    pub(super) fn new(start: Cursor, path: &Path, bytes: u64, memory: &Share) -> Batches {
        Batches {
            start,
            path: path.to_owned(),
            // A list that grows has twice the memory for a moment.
            most: (bytes as usize / (2 * size_of::<Entry>())).max(1),
            entries: Vec::new(),
            given: 0,
            listed: None,
            more: true,
            charge: memory.charge(),
            damage: Vec::new(),
        }
    }

    /// The next partition's batches: of [`Batches::entries`], those in the range; `None`: there is none.
    pub(super) fn next(
        &mut self,
        reader: &mut FrameReader,
        view: &View,
        pace: &mut Pace,
    ) -> Result<Option<Range<usize>>, StoreError> {
        if self.given == self.entries.len() {
            if !self.more {
                return Ok(None);
            }
            self.list(reader, view, pace)?;
        }
        let Some(first) = self.entries.get(self.given) else {
            return Ok(None);
        };
        let rest = &self.entries[self.given..];
        let count = rest.iter().take_while(|e| e.key == first.key).count();
        let from = self.given;
        self.given += count;
        Ok(Some(from..self.given))
    }

    /// The batches that are listed.
    pub(super) fn entries(&self, range: Range<usize>) -> &[Entry] {
        &self.entries[range]
    }

    /// Lists the partitions behind those that were.
    fn list(
        &mut self,
        reader: &mut FrameReader,
        view: &View,
        pace: &mut Pace,
    ) -> Result<(), StoreError> {
        let first_pass = self.listed.is_none();
        let (listed, most, base) = (self.listed, self.most, self.start.base);
        let entries = &mut self.entries;
        entries.clear();
        let mut upto: Option<PartitionKey> = None;
        let mut full_at = most;
        let damage = collect(reader, self.start, &self.path, |header, frame| {
            for entry in Entries::new(frame, header).map_while(Result::ok) {
                let EntryKind::Batch(key) = entry.kind else {
                    continue;
                };
                if listed.is_some_and(|l| key <= l) || upto.is_some_and(|u| key > u) {
                    continue;
                }
                let Ok(batch) = record_batch::parse_header(entry.bytes) else {
                    continue;
                };
                if batch.next_offset() <= view.start(key) {
                    continue;
                }
                entries.push(Entry {
                    key,
                    offset: batch.base_offset,
                    at: header.lsn - base + (entry.at + ENTRY_HEADER) as u64,
                    len: entry.bytes.len() as u32,
                    time: batch_time(&batch, header),
                });
                if entries.len() > full_at {
                    let cut = halve(entries);
                    upto = cut.or(upto);
                    // One partition alone is listed whole.
                    full_at = match cut {
                        Some(_) => most,
                        None => usize::MAX,
                    };
                }
            }
            pace.worked(header.size());
        })?;
        if first_pass {
            self.damage = damage;
        }
        let bytes = self.entries.capacity() * size_of::<Entry>();
        self.charge.set(self.charge.bytes().max(bytes as u64));
        if upto.is_some() {
            self.charge.account().refuse();
        }
        // Stable, and offsets of a partition already ascend.
        self.entries.sort_by_key(|entry| (entry.key, entry.offset));
        self.given = 0;
        self.more = upto.is_some();
        self.listed = upto.or(self.listed);
        Ok(())
    }
}

/// Leaves the lower half of the partitions, in the order in which they were; gives the last one that stays. `None`: there
/// is one alone.
fn halve(entries: &mut Vec<Entry>) -> Option<PartitionKey> {
    let mut keys: Vec<PartitionKey> = entries.iter().map(|entry| entry.key).collect();
    let (mut least, middle) = (keys[0], keys.len() / 2);
    for &key in &keys {
        least = least.min(key);
    }
    let (_, &mut middle, _) = keys.select_nth_unstable(middle);
    let last = if middle > least {
        // The largest below the middle: what has the middle's key may be most of them.
        keys.into_iter().filter(|&key| key < middle).max()?
    } else if keys.iter().any(|&key| key > least) {
        least
    } else {
        return None;
    };
    entries.retain(|entry| entry.key <= last);
    Some(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(keys: &[u32]) -> Vec<Entry> {
        let entry = |(&partition, at)| Entry {
            key: PartitionKey {
                topic: 1,
                partition,
            },
            offset: 0,
            at,
            len: 0,
            time: 0,
        };
        keys.iter().zip(0..).map(entry).collect()
    }

    fn halved(keys: &[u32]) -> (Option<u32>, Vec<u32>) {
        let mut list = entries(keys);
        let last = halve(&mut list);
        assert!(list.is_sorted_by_key(|entry| entry.at));
        (
            last.map(|key| key.partition),
            list.iter().map(|entry| entry.key.partition).collect(),
        )
    }

    #[test]
    fn the_lower_partitions_stay() {
        assert_eq!(halved(&[4, 1, 3, 2]), (Some(2), vec![1, 2]));
        assert_eq!(halved(&[1, 9, 9, 9, 9]), (Some(1), vec![1]));
        assert_eq!(halved(&[1, 1, 1, 1, 9]), (Some(1), vec![1, 1, 1, 1]));
        assert_eq!(halved(&[5, 5, 5]), (None, vec![5, 5, 5]));
    }
}
