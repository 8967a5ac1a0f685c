//! Gathers the keys of a partition for the section of a new file: from records, and from the sections of files that
//! are merged.
//!
//! Invariants: of each key the newest offset goes into the section, and keys ascend in it. Memory: [`RUN_BYTES`] of
//! keys, less where the store's share of the budget is small; beyond that they go, sorted, into runs, files without a name that are gone with the process.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::{KeyRange, KeysError, KeysReader, KeysWriter, kept};
use crate::memory::budget::Charge;
use crate::storage::PartitionKey;
use crate::storage::lsm::codec;
use crate::storage::lsm::memory::StoreMemory;
use crate::storage::lsm::steps::step;
use crate::wire::record_batch::{BatchHeader, Records};

/// Memory of the keys that are gathered, before they become a run.
pub(crate) const RUN_BYTES: usize = 32 << 20;
/// What a key takes beside its bytes: the map's entry, and what the allocator adds.
pub(crate) const KEY_OVERHEAD: usize = 64;

/// A file to write to and read from whose name is gone already. `path` is free, and has the extension `tmp`.
pub(crate) fn scratch(path: &Path) -> io::Result<File> {
    step()?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(path)?;
    step()?;
    fs::remove_file(path)?;
    Ok(file)
}

/// The keys of one partition at a time.
pub(crate) struct Collector {
    scratch: PathBuf,
    limit: usize,
    _memory: Charge,
    partition: PartitionKey,
    keys: HashMap<Box<[u8]>, i64, foldhash::fast::RandomState>,
    bytes: usize,
    runs: Vec<Mmap>,
    plain: Vec<u8>,
}

impl Collector {
    /// `scratch`: a free name with the extension `tmp`, for runs.
    pub(crate) fn new(scratch: PathBuf, memory: &StoreMemory) -> Collector {
        let limit = memory.run_bytes().min(RUN_BYTES as u64);
        let mut charge = memory.maintenance.charge();
        charge.set(limit);
        Collector {
            scratch,
            limit: limit as usize,
            _memory: charge,
            partition: PartitionKey {
                topic: 0,
                partition: 0,
            },
            keys: HashMap::default(),
            bytes: 0,
            runs: Vec::new(),
            plain: Vec::new(),
        }
    }

    /// With runs of another size.
    #[cfg(test)]
    pub(crate) fn sized(mut self, limit: usize) -> Collector {
        self.limit = limit;
        self
    }

    /// Forgets everything; what follows is of this partition.
    pub(crate) fn begin(&mut self, partition: PartitionKey) {
        self.partition = partition;
        self.keys.clear();
        self.bytes = 0;
        self.runs.clear();
    }

    /// Adds the keys of a batch that is whole. Those of a batch that cannot be decompressed here stay unknown.
    pub(crate) fn batch(&mut self, batch: &[u8], header: &BatchHeader) -> Result<(), KeysError> {
        if header.is_control() {
            return Ok(());
        }
        let mut plain = std::mem::take(&mut self.plain);
        let records = codec::plain(batch, &mut plain).map(Records::new);
        let result = match records {
            Ok(Ok(records)) => records
                .map_while(Result::ok)
                .filter_map(|record| Some((record.key?, record.offset)))
                .try_for_each(|(key, offset)| self.add(key, offset)),
            _ => Ok(()),
        };
        self.plain = plain;
        result
    }

    /// Adds a record's key.
    pub(crate) fn add(&mut self, key: &[u8], offset: i64) -> Result<(), KeysError> {
        let kept = kept(key);
        if let Some(newest) = self.keys.get_mut(&*kept) {
            *newest = (*newest).max(offset);
            return Ok(());
        }
        self.bytes += kept.len() + KEY_OVERHEAD;
        self.keys.insert(kept.into(), offset);
        if self.bytes > self.limit {
            self.spill()?;
        }
        Ok(())
    }

    fn sorted(&mut self) -> Vec<(Box<[u8]>, i64)> {
        let mut sorted: Vec<_> = self.keys.drain().collect();
        self.bytes = 0;
        sorted.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        sorted
    }

    fn spill(&mut self) -> Result<(), KeysError> {
        let file = scratch(&self.scratch)?;
        let mut writer = KeysWriter::new(BufWriter::new(&file));
        for (kept, offset) in self.sorted() {
            writer.kept(self.partition, &kept, offset)?;
        }
        let (out, _) = writer.finish()?;
        out.into_inner().map_err(io::IntoInnerError::into_error)?;
        // SAFETY: the file has no name: nobody else writes to it or cuts it short.
        self.runs.push(unsafe { Mmap::map(&file) }?);
        Ok(())
    }

    /// Hands out every key that was added or is in a section, in order, with its newest offset; nothing below `least`
    /// counts. The collector is empty afterwards. An error names the section, where it is one's.
    pub(crate) fn drain<E>(
        &mut self,
        sections: &[KeysReader],
        least: i64,
        mut take: impl FnMut(&[u8], i64) -> Result<(), E>,
    ) -> Result<(), DrainError<E>> {
        let partition = self.partition;
        let sorted = self.sorted();
        let own = |error| DrainError::Run(error);
        let mut sources = vec![Source::Sorted(sorted.into_iter())];
        for run in &self.runs {
            let range = KeysReader::new(run).and_then(|run| run.range_kept(partition, b""));
            sources.push(Source::Range(Box::new(range.map_err(own)?), None));
        }
        for (number, section) in sections.iter().enumerate() {
            let range = section.range_kept(partition, b"");
            let range = range.map_err(|error| DrainError::Section(number, error))?;
            sources.push(Source::Range(Box::new(range), Some(number)));
        }
        let mut heap = BinaryHeap::with_capacity(sources.len());
        let mut advance = |heap: &mut BinaryHeap<_>, at: usize, mut kept: Vec<u8>| {
            if let Some(offset) = sources[at].next(&mut kept)? {
                heap.push(Reverse((kept, at, offset)));
            }
            Ok(())
        };
        for at in 0..1 + self.runs.len() + sections.len() {
            advance(&mut heap, at, Vec::new())?;
        }
        let (mut last, mut newest) = (Vec::new(), None);
        while let Some(Reverse((kept, at, offset))) = heap.pop() {
            if newest.is_some() && kept == last {
                newest = newest.max(Some(offset));
            } else {
                if let Some(offset) = newest.filter(|&offset| offset >= least) {
                    take(&last, offset).map_err(DrainError::Take)?;
                }
                last.clear();
                last.extend_from_slice(&kept);
                newest = Some(offset);
            }
            advance(&mut heap, at, kept)?;
        }
        if let Some(offset) = newest.filter(|&offset| offset >= least) {
            take(&last, offset).map_err(DrainError::Take)?;
        }
        self.runs.clear();
        Ok(())
    }
}

/// Why [`Collector::drain`] stopped.
pub(crate) enum DrainError<E> {
    /// This section cannot be read.
    Section(usize, KeysError),
    /// A run cannot be read.
    Run(KeysError),
    /// Whoever took the keys refused.
    Take(E),
}

enum Source<'a> {
    Sorted(std::vec::IntoIter<(Box<[u8]>, i64)>),
    Range(Box<KeyRange<'a>>, Option<usize>),
}

impl Source<'_> {
    /// Puts the next key into `kept`, and gives its offset.
    fn next<E>(&mut self, kept: &mut Vec<u8>) -> Result<Option<i64>, DrainError<E>> {
        let mut fill = |key: &[u8], offset| {
            kept.clear();
            kept.extend_from_slice(key);
            Some(offset)
        };
        match self {
            Source::Sorted(sorted) => {
                let next = sorted.next();
                Ok(next.and_then(|(key, offset)| fill(&key, offset)))
            }
            Source::Range(range, number) => match range.next() {
                Ok(entry) => Ok(entry.and_then(|entry| fill(entry.kept, entry.offset))),
                Err(error) => Err(match number {
                    Some(number) => DrainError::Section(*number, error),
                    None => DrainError::Run(error),
                }),
            },
        }
    }
}
