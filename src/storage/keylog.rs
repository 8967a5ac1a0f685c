//! The keys of a shard's log that is not in SSTs yet: from (partition, key) to the newest offset.
//!
//! Filled from durable frames by ordinary threads, the one that keeps [`super::index`] and those that look keys up, which
//! read the rest of the way first: a search knows all that was durable when it began. It follows the log's index: what
//! that has let go, because a flush committed, goes here, too. Topics that nobody wants take nothing here, and where no
//! topic is wanted nothing is read.
//!
//! Memory, within the shard's share of the budget: at most [`ACTIVE_BYTES`] in a sorted map, then compact runs in the format of an SST's key index, of at most
//! [`RUNS_BYTES`] in all; beyond that the oldest runs go, and their part of the log is read at each search, until
//! it has been flushed. Invariant: every record with a key of a topic that is wanted, between the oldest segment's
//! start and `next`, is in the map, in a run, or in the stretch of a run that went.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::PartitionKey;
use super::frames::{FetchError, FrameReader};
use super::index::Span;
use super::lsm::keys::collect::KEY_OVERHEAD;
use super::lsm::keys::range::{Page, each_key};
use super::lsm::keys::{KeysReader, KeysWriter, kept};
use super::wal::frame::{Entries, EntryKind};
use crate::memory::budget::{Charge, Share};
use crate::wire::record_batch;

/// Memory of the sorted map.
pub const ACTIVE_BYTES: usize = 8 << 20;
/// Memory of all runs of a shard: some four million keys.
pub const RUNS_BYTES: usize = 64 << 20;
/// Frames read while the lock is held once.
const FRAMES_A_TURN: usize = 16;

/// A segment of the log as far as it is indexed: its base, and the LSNs of its first frame and behind its last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) base: u64,
    pub(crate) from: u64,
    pub(crate) to: u64,
}

/// See the module.
#[derive(Default)]
pub(crate) struct KeyLog {
    state: Mutex<State>,
    wanted: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Topics that the log was found to have or that are wanted, and whether they are.
    topics: HashMap<u32, bool>,
    /// Ascending; the last is being read.
    segments: VecDeque<Segment>,
    /// Segments before this have gone.
    floor: u64,
    /// Grows when what was read is forgotten, to be read again.
    generation: u64,
    /// Keys of the last segment that are in no run yet, below their partition, and from where on they are.
    active: BTreeMap<PartitionKey, BTreeMap<Box<[u8]>, i64>>,
    active_bytes: usize,
    active_from: u64,
    run_bytes: usize,
    limits: Option<(usize, usize)>,
    /// What is in memory; `None`: nobody counts it.
    charge: Option<Charge>,
    scratch: Vec<u8>,
}

struct Segment {
    base: u64,
    /// LSN of the next frame to read.
    next: u64,
    runs: Vec<Run>,
}

struct Run {
    /// LSNs of its first frame and behind its last.
    from: u64,
    to: u64,
    /// `None`: gone.
    section: Option<Vec<u8>>,
}

/// What is known of a key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Known {
    /// Its newest offset in memory.
    pub(crate) offset: Option<i64>,
    /// Stretches that may have newer ones, the newest first.
    pub(crate) scan: Vec<Span>,
}

impl State {
    fn limits(&self) -> (usize, usize) {
        self.limits.unwrap_or((ACTIVE_BYTES, RUNS_BYTES))
    }

    /// Takes a frame's keys.
    fn add(&mut self, header: &super::wal::frame::FrameHeader, frame: &[u8]) {
        for entry in Entries::new(frame, header).map_while(Result::ok) {
            let EntryKind::Batch(key) = entry.kind else {
                continue;
            };
            let wanted = *self.topics.entry(key.topic).or_insert(false);
            if !wanted || record_batch::parse_whole(entry.bytes).is_err() {
                continue;
            }
            let active = self.active.entry(key).or_default();
            let bytes = &mut self.active_bytes;
            each_key(entry.bytes, &mut self.scratch, |key, offset| {
                let kept = kept(key);
                match active.get_mut(&*kept) {
                    Some(newest) => *newest = offset,
                    None => {
                        *bytes += kept.len() + KEY_OVERHEAD;
                        active.insert(kept.into(), offset);
                    }
                }
            });
        }
    }

    /// Makes a run of what is in the map.
    fn freeze(&mut self) {
        let active = std::mem::take(&mut self.active);
        self.active_bytes = 0;
        let Some(segment) = self.segments.back_mut() else {
            return;
        };
        let (from, to) = (self.active_from, segment.next);
        self.active_from = to;
        let mut writer = KeysWriter::new(Vec::new());
        let mut keys = active.into_iter().flat_map(|(partition, keys)| {
            keys.into_iter()
                .map(move |(kept, at)| (partition, kept, at))
        });
        let written = keys.try_for_each(|(partition, kept, at)| writer.kept(partition, &kept, at));
        let section = written.and_then(|()| writer.finish());
        // In order and into memory nothing fails; if it did, the stretch would be read.
        let section = section.ok().map(|(section, _)| section);
        self.run_bytes += section.as_ref().map_or(0, Vec::len);
        segment.runs.push(Run { from, to, section });
        let most = self.limits().1;
        let runs = self
            .segments
            .iter_mut()
            .flat_map(|segment| &mut segment.runs);
        for run in runs {
            if self.run_bytes <= most {
                break;
            }
            if let Some(section) = run.section.take() {
                self.run_bytes -= section.len();
                if let Some(charge) = &self.charge {
                    charge.account().refuse();
                }
            }
        }
        // What went and lies together is read together.
        for segment in &mut self.segments {
            segment.runs.dedup_by(|next, kept| {
                let gone = next.section.is_none() && kept.section.is_none();
                if gone {
                    kept.to = next.to;
                }
                gone
            });
        }
    }

    /// Tells the account what is held.
    fn settle(&mut self) {
        if let Some(charge) = &mut self.charge {
            charge.set((self.active_bytes + self.run_bytes) as u64);
        }
    }

    /// Reads a frame, or enters a segment; false: nothing more.
    fn step(
        &mut self,
        stretches: &[Stretch],
        reader: &mut FrameReader,
    ) -> Result<bool, FetchError> {
        let at = self.segments.back().map_or(self.floor, |last| last.base);
        let mut later = stretches.iter().filter(|stretch| stretch.base >= at);
        let Some(mut stretch) = later.next() else {
            return Ok(false);
        };
        if let Some(last) = self.segments.back()
            && last.base == stretch.base
            && last.next >= stretch.to
        {
            match later.next() {
                Some(next) => stretch = next,
                None => return Ok(false),
            }
        }
        if self
            .segments
            .back()
            .is_none_or(|last| last.base != stretch.base)
        {
            if self.active_bytes > 0 {
                self.freeze();
            }
            self.segments.push_back(Segment {
                base: stretch.base,
                next: stretch.from,
                runs: Vec::new(),
            });
            self.active_from = stretch.from;
            return Ok(true);
        }
        let Some(next) = self.segments.back().map(|last| last.next) else {
            return Ok(false);
        };
        let size = reader.with_frame(stretch.base, next, |header, frame| {
            self.add(header, frame);
            header.size()
        })?;
        if let Some(last) = self.segments.back_mut() {
            last.next += size as u64;
        }
        if self.active_bytes > self.limits().0 {
            self.freeze();
        }
        self.settle();
        Ok(true)
    }

    /// Lets go what the log's index has let go.
    fn release(&mut self, floor: u64) {
        self.floor = self.floor.max(floor);
        while self.segments.front().is_some_and(|s| s.base < self.floor)
            && let Some(gone) = self.segments.pop_front()
        {
            for run in gone.runs {
                self.run_bytes -= run.section.map_or(0, |section| section.len());
            }
            if self.segments.is_empty() {
                self.active.clear();
                self.active_bytes = 0;
            }
        }
        self.settle();
    }

    /// The stretches and runs of the log, the newest first.
    fn runs(&self) -> impl Iterator<Item = (u64, &Run)> {
        let segments = self.segments.iter().rev();
        segments.flat_map(|s| s.runs.iter().rev().map(|run| (s.base, run)))
    }
}

impl KeyLog {
    /// With as much memory as the share has, and the module's limits allow.
    pub(crate) fn within(share: &Share) -> KeyLog {
        let bytes = usize::try_from(share.bytes()).unwrap_or(usize::MAX);
        let active = (bytes / 8).min(ACTIVE_BYTES);
        let state = State {
            limits: Some((active, (bytes - active).min(RUNS_BYTES))),
            charge: Some(share.charge()),
            ..State::default()
        };
        KeyLog {
            state: Mutex::new(state),
            wanted: AtomicBool::new(false),
        }
    }

    /// With other limits than the server's.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn limit(&self, active: usize, runs: usize) {
        self.lock().limits = Some((active, runs));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves at worst a frame half added, which is added again.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows a topic from now on; where the log has something of it that was passed over, it is read again.
    pub(crate) fn want(&self, topic: u32) {
        let mut state = self.lock();
        if state.topics.insert(topic, true) == Some(false) {
            let floor = state.floor;
            state.release(u64::MAX);
            state.floor = floor;
            state.generation += 1;
        }
        self.wanted.store(true, Ordering::Relaxed);
    }

    /// Whether any topic is wanted.
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// Reads what the log's index has and this has not, and lets go what lies before `floor`. The lock is given up between
    /// turns. Gives what [`KeyLog::lookup`] and [`KeyLog::keys`] ask for.
    pub(crate) fn catch_up(
        &self,
        floor: u64,
        stretches: &[Stretch],
        reader: &mut FrameReader,
    ) -> Result<u64, FetchError> {
        loop {
            let mut state = self.lock();
            state.release(floor);
            for _ in 0..FRAMES_A_TURN {
                if !state.step(stretches, reader)? {
                    return Ok(state.generation);
                }
            }
        }
    }

    /// The newest offset of a kept key, as far as [`KeyLog::catch_up`] has come; `None`: it has to be called again.
    pub(crate) fn lookup(
        &self,
        generation: u64,
        partition: PartitionKey,
        kept: &[u8],
    ) -> Option<Known> {
        let state = self.lock();
        if state.generation != generation {
            return None;
        }
        let active = state.active.get(&partition).and_then(|keys| keys.get(kept));
        let mut known = Known {
            offset: active.copied(),
            scan: Vec::new(),
        };
        for (base, run) in state.runs() {
            if known.offset.is_some() {
                break;
            }
            let keys = run.section.as_deref().map(KeysReader::new);
            match keys.map(|keys| keys?.get_kept(partition, kept)) {
                Some(Ok(offset)) => known.offset = offset,
                _ => known.scan.push(run.span(base)),
            }
        }
        Some(known)
    }

    /// Offers the page a partition's keys; returns the stretches that have to be read for more. `None`: as
    /// [`KeyLog::lookup`].
    pub(crate) fn keys(
        &self,
        generation: u64,
        partition: PartitionKey,
        page: &mut Page,
    ) -> Option<Vec<Span>> {
        let state = self.lock();
        if state.generation != generation {
            return None;
        }
        if let Some(keys) = state.active.get(&partition) {
            let bounds = (
                std::ops::Bound::Included(page.bounds().first()),
                std::ops::Bound::Unbounded,
            );
            for (kept, offset) in keys.range::<[u8], _>(bounds) {
                if !page.offer(kept, *offset) {
                    break;
                }
            }
        }
        let mut scan = Vec::new();
        for (base, run) in state.runs() {
            let keys = run.section.as_deref().map(KeysReader::new);
            let offered = keys.map(|keys| {
                let range = keys?.range_kept(partition, page.bounds().first())?;
                page.range(range)
            });
            if !matches!(offered, Some(Ok(()))) {
                scan.push(run.span(base));
            }
        }
        Some(scan)
    }
}

impl Run {
    fn span(&self, base: u64) -> Span {
        Span {
            base,
            lsn: self.from,
            last_lsn: self.to - 1,
        }
    }
}

/// Calls `take` with each batch of a partition in a stretch of the log.
pub(crate) fn scan(
    span: Span,
    partition: PartitionKey,
    reader: &mut FrameReader,
    mut take: impl FnMut(&[u8]),
) -> Result<(), FetchError> {
    let mut lsn = span.lsn;
    while lsn <= span.last_lsn {
        lsn += reader.with_frame(span.base, lsn, |header, frame| {
            for entry in Entries::new(frame, header).map_while(Result::ok) {
                if entry.kind == EntryKind::Batch(partition)
                    && record_batch::parse_whole(entry.bytes).is_ok()
                {
                    take(entry.bytes);
                }
            }
            header.size() as u64
        })?;
    }
    Ok(())
}
