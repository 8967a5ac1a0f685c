//! Where the batches of a partition lie: by offset and by time.
//!
//! Of a running log, built from the writer's `Note`s of what it seals, in the order of the log; where
//! notes are missing (the log of an earlier run, a ring that was full) and of a stopped log's files, by
//! reading the log. Never written to disk. For each segment and partition: the range of
//! offsets and times, and *points*, each the place of a frame in which the partition has a batch; a new
//! point at most every [`SPACING`] bytes of log. Invariant: every batch of the indexed log lies in the
//! span (`lsn` to `last_lsn`) of exactly one point of its partition and segment, or the segment's points
//! were dropped. Memory: what its share of the budget allows. Beyond it the oldest segments' points go, and are made again
//! when they are read; then those of the segment that is being written are joined, so that a read scans more of the log.
//! Some 60 bytes a partition and segment stay in any case.
//!
//! The time of a batch is its largest timestamp, but no later than the time its frame was sealed and no
//! more than [`RESIDENCE_MS`] earlier: a producer's wrong clock cannot hide a message.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::PartitionKey;
use super::frames::{Cursor, FetchError, FrameReader};
use super::keylog::Stretch;
use super::wal::frame::{Entries, EntryKind, FrameHeader};
use super::wal::segment::{SEGMENT_HEADER, list_segments};
use crate::memory::budget::{Charge, Part, Share};
use crate::memory::spsc;
use crate::wire::record_batch;

/// Bytes of log between two points of a partition; what a read scans at most before its offset.
pub const SPACING: u64 = 64 << 10;
/// Bytes of the index of a shard that has no budget: 4 million points.
pub const DEFAULT_BYTES: u64 = 192 << 20;
/// Points at most so far apart are joined where memory is short: no segment is larger.
const SPACING_MAX: u64 = 4 << 30;
/// A message is at most this old when its frame is sealed; more is a wrong clock.
pub const RESIDENCE_MS: i64 = 1000;
/// Spans given at a time: as much of the log as a fetch mostly reads, 4 MiB, or more.
const SPANS: usize = 64;
/// Frames indexed while the lock is held once.
const FRAMES_A_TURN: usize = 64;
/// Notes on their way to the index, 1 MiB a shard: what 10,000 partitions leave in a commit, and the
/// commits of several periods of the index thread where partitions are few.
pub(crate) const NOTES: usize = 16_384;
/// Bytes of those.
pub(crate) const NOTES_BYTES: u64 = (NOTES * size_of::<Note>()) as u64;

type Map<V> = HashMap<PartitionKey, V, foldhash::fast::RandomState>;

/// The offsets and times of a partition in a segment.
#[derive(Debug, Clone, Copy)]
struct Range {
    first: i64,
    end: i64,
    max_time: i64,
    /// Of its record batches.
    bytes: u64,
    /// Frames that hold the partition's first and last batch.
    first_lsn: u64,
    last_lsn: u64,
}

/// A place to begin reading at.
#[derive(Debug, Clone, Copy)]
struct Point {
    /// First offset in the span.
    first: i64,
    max_time: i64,
    lsn: u64,
    /// Last frame of the span with a batch of the partition.
    last_lsn: u64,
}

/// What the writer tells of a frame: first its batches, then, when it is sealed, the frame.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Note {
    /// Successive batches of one partition.
    Batches(BatchesNote),
    /// The frame; all of its batches were told of.
    Frame(FrameNote),
}

/// Successive batches of one partition in a frame.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchesNote {
    /// The frame.
    pub(crate) seq: u64,
    pub(crate) key: PartitionKey,
    /// First offset, and the one behind the last.
    pub(crate) first: i64,
    pub(crate) end: i64,
    /// Largest timestamp.
    pub(crate) max_time: i64,
    /// Their bytes.
    pub(crate) bytes: u64,
}

/// A sealed frame.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FrameNote {
    pub(crate) seq: u64,
    pub(crate) lsn: u64,
    pub(crate) len: u32,
    pub(crate) crc: u32,
    pub(crate) prev_crc: u32,
    pub(crate) time_ms: i64,
    /// Its segment: base and size.
    pub(crate) base: u64,
    pub(crate) size: u64,
}

struct Segment {
    cursor: Cursor,
    start: Cursor,
    ranges: Map<Range>,
    /// `None`: dropped.
    points: Option<Map<Vec<Point>>>,
    /// Bytes of log between two points.
    spacing: u64,
    /// Bytes of the lists of points.
    lists: usize,
}

struct State {
    segments: VecDeque<Segment>,
    /// Segments that begin before this are not indexed: what they hold is in the store's files.
    floor: u64,
    /// Bytes of the segments' tables and lists.
    bytes: usize,
    limit: usize,
    charge: Charge,
    /// Why the walk stopped short, offline.
    stopped: Option<String>,
    notes: Option<spsc::Consumer<Note>>,
    /// The oldest note of a frame that is not indexed yet, and its batches.
    frame: Option<FrameNote>,
    batches: Vec<BatchesNote>,
}

impl State {
    /// The segments that are read: what ends at the floor or before is looked for in the store's files, also while the
    /// walk still stands in it.
    fn readable(&self) -> impl Iterator<Item = (usize, &Segment)> {
        let segments = self.segments.iter().enumerate();
        segments.filter(|(_, segment)| segment.cursor.segment_end() > self.floor)
    }

    /// Makes `frame` the oldest frame noted and not indexed, if there is one.
    fn next_frame(&mut self) -> Option<FrameNote> {
        let notes = self.notes.as_mut()?;
        while self.frame.is_none() {
            match notes.pop()? {
                Note::Batches(batches) => {
                    // Those of a frame whose own note was lost.
                    if self.batches.last().is_some_and(|b| b.seq != batches.seq) {
                        self.batches.clear();
                    }
                    self.batches.push(batches);
                }
                Note::Frame(frame) => {
                    if self.batches.last().is_some_and(|b| b.seq != frame.seq) {
                        self.batches.clear();
                    }
                    self.frame = Some(frame);
                }
            }
        }
        self.frame
    }

    fn drop_frame(&mut self) {
        self.frame = None;
        self.batches.clear();
    }

    /// Keeps what it holds below the limit: the points of the oldest segments go, but those of `wanted`; then those that
    /// stay, the live segment's too, are joined.
    fn shed(&mut self, wanted: Option<usize>) {
        let last = self.segments.len().saturating_sub(1);
        for at in (0..last).filter(|&at| Some(at) != wanted) {
            if self.bytes <= self.limit {
                break;
            }
            self.shrink(at, |segment| {
                segment.forget();
                true
            });
        }
        for at in wanted.into_iter().chain([last]) {
            while self.bytes > self.limit && self.shrink(at, Segment::coarsen) {}
        }
        self.settle();
    }

    /// Makes a segment smaller; false: it cannot be.
    fn shrink(&mut self, at: usize, how: impl FnOnce(&mut Segment) -> bool) -> bool {
        let Some(segment) = self.segments.get_mut(at) else {
            return false;
        };
        if segment.points.is_none() {
            return false;
        }
        let before = segment.bytes();
        let shrunk = how(segment);
        self.bytes = self.bytes + segment.bytes() - before;
        if shrunk {
            self.charge.account().refuse();
        }
        shrunk
    }

    fn settle(&mut self) {
        self.charge.set(self.bytes as u64);
    }
}

/// The frames to scan for something: `lsn` to `last_lsn` in the segment at `base`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) base: u64,
    pub(crate) lsn: u64,
    pub(crate) last_lsn: u64,
}

/// The index of one shard's log.
pub struct LogIndex {
    dir: PathBuf,
    state: Mutex<State>,
}

/// Bytes of a table: an entry and a byte of control for each place, seven eighths of which can be taken.
fn table_bytes<V>(table: &Map<V>) -> usize {
    table.capacity() * (size_of::<(PartitionKey, V)>() + 1) * 8 / 7
}

/// The time by which a batch is found.
pub(crate) fn batch_time(header: &record_batch::BatchHeader, frame: &FrameHeader) -> i64 {
    arrival(header.max_timestamp, frame.time_ms)
}

/// `timestamp`, but within [`RESIDENCE_MS`] before the frame was sealed.
fn arrival(timestamp: i64, sealed: i64) -> i64 {
    timestamp.clamp(sealed.saturating_sub(RESIDENCE_MS), sealed)
}

impl Segment {
    fn new(start: Cursor) -> Segment {
        Segment {
            cursor: start,
            start,
            ranges: Map::default(),
            points: Some(Map::default()),
            spacing: SPACING,
            lists: 0,
        }
    }

    /// Bytes of memory, but for the structure itself.
    fn bytes(&self) -> usize {
        let points = self.points.as_ref().map_or(0, table_bytes);
        table_bytes(&self.ranges) + points + self.lists
    }

    /// Lets the points go.
    fn forget(&mut self) {
        self.points = None;
        self.lists = 0;
    }

    /// Joins points, so that there are about half as many; false: they are as far apart as can be.
    fn coarsen(&mut self) -> bool {
        let Some(points) = &mut self.points else {
            return false;
        };
        if self.spacing >= SPACING_MAX {
            return false;
        }
        self.spacing *= 2;
        self.lists = 0;
        for list in points.values_mut() {
            list.dedup_by(|next, kept| {
                let joined = next.lsn - kept.lsn < self.spacing;
                if joined {
                    kept.last_lsn = next.last_lsn;
                    kept.max_time = kept.max_time.max(next.max_time);
                }
                joined
            });
            list.shrink_to_fit();
            self.lists += list.capacity() * size_of::<Point>();
        }
        true
    }

    /// Adds a frame.
    fn add(&mut self, header: &FrameHeader, frame: &[u8]) {
        for entry in Entries::new(frame, header).map_while(Result::ok) {
            let EntryKind::Batch(key) = entry.kind else {
                continue;
            };
            let Ok(batch) = record_batch::parse_whole(entry.bytes) else {
                continue;
            };
            let time = batch_time(&batch, header);
            self.add_batches(
                key,
                header.lsn,
                batch.base_offset,
                batch.next_offset(),
                time,
                entry.bytes.len() as u64,
            );
        }
    }

    /// Adds batches of a partition in the frame at `lsn`, the newest one.
    fn add_batches(
        &mut self,
        key: PartitionKey,
        lsn: u64,
        first: i64,
        end: i64,
        time: i64,
        bytes: u64,
    ) {
        self.ranges
            .entry(key)
            .and_modify(|range| {
                range.end = range.end.max(end);
                range.max_time = range.max_time.max(time);
                range.bytes += bytes;
                range.last_lsn = lsn;
            })
            .or_insert(Range {
                first,
                end,
                max_time: time,
                bytes,
                first_lsn: lsn,
                last_lsn: lsn,
            });
        let Some(points) = &mut self.points else {
            return;
        };
        let points = points.entry(key).or_default();
        match points.last_mut() {
            Some(point) if lsn - point.lsn < self.spacing => {
                point.last_lsn = lsn;
                point.max_time = point.max_time.max(time);
            }
            _ => {
                let before = points.capacity();
                points.push(Point {
                    first,
                    max_time: time,
                    lsn,
                    last_lsn: lsn,
                });
                self.lists += (points.capacity() - before) * size_of::<Point>();
            }
        }
    }

    /// The spans of a partition's batches, from the one that may hold what is looked for on, [`SPANS`] at most.
    fn spans(&self, key: PartitionKey, skip: impl Fn(&[Point]) -> usize) -> Vec<Span> {
        let base = self.cursor.base;
        match &self.points {
            Some(points) => {
                let points = points.get(&key).map_or(&[][..], Vec::as_slice);
                points[skip(points).min(points.len())..]
                    .iter()
                    .take(SPANS)
                    .map(|p| Span {
                        base,
                        lsn: p.lsn,
                        last_lsn: p.last_lsn,
                    })
                    .collect()
            }
            None => self
                .ranges
                .get(&key)
                .map(|r| Span {
                    base,
                    lsn: r.first_lsn,
                    last_lsn: r.last_lsn,
                })
                .into_iter()
                .collect(),
        }
    }
}

impl LogIndex {
    /// Of a stopped log's files, from the segment at `floor` or behind it on.
    pub(crate) fn new(dir: &Path, floor: u64) -> LogIndex {
        LogIndex::within(
            dir,
            floor,
            &Share::alone(Part::OffsetIndex, DEFAULT_BYTES),
            None,
        )
    }

    /// Of a running log whose writer has the other end of `notes`.
    pub(crate) fn live(
        dir: &Path,
        floor: u64,
        notes: spsc::Consumer<Note>,
        memory: &Share,
    ) -> LogIndex {
        LogIndex::within(dir, floor, memory, Some(notes))
    }

    fn within(
        dir: &Path,
        floor: u64,
        memory: &Share,
        notes: Option<spsc::Consumer<Note>>,
    ) -> LogIndex {
        LogIndex {
            dir: dir.to_owned(),
            state: Mutex::new(State {
                segments: VecDeque::new(),
                floor,
                bytes: 0,
                limit: usize::try_from(memory.bytes()).unwrap_or(usize::MAX),
                charge: memory.charge(),
                stopped: None,
                notes,
                frame: None,
                batches: Vec::new(),
            }),
        }
    }

    /// Forgets the segments that end at `lsn` or before: what they hold is in the store's files. Returns
    /// where the oldest segment begins that it still needs, to be read or to be indexed.
    pub(crate) fn release(&self, lsn: u64) -> u64 {
        let mut state = self.lock();
        state.floor = state.floor.max(lsn);
        // The last segment stays: the walk goes on from there. It is not read any more, so that nobody sees it go later.
        while state.segments.len() > 1
            && state
                .segments
                .front()
                .is_some_and(|s| s.cursor.segment_end() <= lsn)
        {
            if let Some(gone) = state.segments.pop_front() {
                state.bytes -= gone.bytes();
            }
        }
        state.settle();
        state
            .segments
            .front()
            .map_or(state.floor, |segment| segment.cursor.base)
    }

    /// Bytes of a partition's record batches in segments that end behind `offset`, as far as is indexed.
    #[cfg(feature = "dpdk")] // the running server asks
    pub(crate) fn bytes_from(&self, key: PartitionKey, offset: i64) -> u64 {
        let state = self.lock();
        state
            .readable()
            .filter_map(|(_, segment)| segment.ranges.get(&key))
            .filter(|range| range.end > offset)
            .map(|range| range.bytes)
            .sum()
    }

    /// What lies before this is in the store's files; the segments behind it that are indexed, and how far.
    pub(crate) fn stretches(&self) -> (u64, Vec<Stretch>) {
        let state = self.lock();
        let stretch = |segment: &Segment| Stretch {
            base: segment.cursor.base,
            from: segment.start.lsn,
            to: segment.cursor.lsn,
        };
        let segments = state.segments.iter();
        let stretches = segments.filter(|segment| segment.cursor.base >= state.floor);
        (state.floor, stretches.map(stretch).collect())
    }

    /// The topics that the log has. Cost: a pass over all partitions in it.
    pub(crate) fn topics(&self) -> BTreeSet<u32> {
        let state = self.lock();
        let ranges = state.segments.iter().flat_map(|s| s.ranges.keys());
        ranges.map(|key| key.topic).collect()
    }

    /// What lies before this is no longer looked for in the log.
    pub(crate) fn floor(&self) -> u64 {
        self.lock().floor
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between any two frames: a panic elsewhere spoils nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Indexes everything that is durable now. Cost: only what is new; the lock is given up between
    /// turns. Offline, ends where the log ends.
    pub(crate) fn catch_up(&self, reader: &mut FrameReader) -> Result<(), FetchError> {
        let limit = reader.limit();
        loop {
            let mut state = self.lock();
            for _ in 0..FRAMES_A_TURN {
                if !self.step(&mut state, reader, limit)? {
                    return Ok(());
                }
            }
        }
    }

    /// Indexes one frame or enters a segment; false: nothing more.
    fn step(
        &self,
        state: &mut State,
        reader: &mut FrameReader,
        limit: u64,
    ) -> Result<bool, FetchError> {
        let live = limit != u64::MAX;
        if state.stopped.is_some() {
            return Ok(false);
        }
        // The writer notes a frame before it is written: what is durable and not noted was lost on the
        // way, or is of an earlier run. `limit` was read before.
        if let Some(done) = Self::step_note(state, limit) {
            return Ok(done);
        }
        let Some(segment) = state.segments.back_mut() else {
            if limit == 0 {
                return Ok(false);
            }
            return self.enter_first(state, reader);
        };
        if live && segment.cursor.lsn >= limit {
            return Ok(false);
        }
        let mut cursor = segment.cursor;
        let before = segment.bytes();
        let stopped = match cursor.step(reader, |header, frame| segment.add(header, frame)) {
            Ok(Some(())) => {
                segment.cursor = cursor;
                state.bytes += segment.bytes() - before;
                state.shed(None);
                return Ok(true);
            }
            Ok(None) => None,
            // The writer left the segment's rest blank.
            Err(e) if e.is_blank() && (!live || limit > cursor.segment_end()) => Some(e),
            Err(e) if live => return Err(e),
            Err(e) => Some(e),
        };
        match cursor.next_segment(reader) {
            Ok(next) => {
                state.segments.push_back(Segment::new(next));
                Ok(true)
            }
            Err(e) if live => Err(e),
            Err(next) => {
                // Offline: the end of the log. Worth a word where it is not blank.
                let why = match stopped {
                    Some(e) if !e.is_blank() => Some(e.to_string()),
                    _ if next.is_missing() || next.is_blank() => None,
                    _ => Some(next.to_string()),
                };
                state.stopped = Some(why.unwrap_or_default());
                Ok(false)
            }
        }
    }

    /// Indexes the oldest noted frame, if it is the one that follows; `None`: the log is to be read.
    fn step_note(state: &mut State, limit: u64) -> Option<bool> {
        let frame = state.next_frame()?;
        let last = state.segments.back()?.cursor;
        let end = frame.lsn + u64::from(frame.len);
        if end <= last.lsn {
            state.drop_frame();
            return Some(true);
        }
        if frame.seq != last.next_seq || frame.prev_crc != last.prev_crc {
            return None;
        }
        if end > limit {
            return Some(false);
        }
        if frame.base != last.base {
            if frame.base != last.segment_end() {
                return None;
            }
            state.segments.push_back(Segment::new(Cursor {
                base: frame.base,
                size: frame.size,
                lsn: frame.base + SEGMENT_HEADER as u64,
                ..last
            }));
        }
        let segment = state.segments.back_mut()?;
        let before = segment.bytes();
        for batches in &state.batches {
            segment.add_batches(
                batches.key,
                frame.lsn,
                batches.first,
                batches.end,
                arrival(batches.max_time, frame.time_ms),
                batches.bytes,
            );
        }
        segment.cursor.lsn = end;
        segment.cursor.next_seq += 1;
        segment.cursor.prev_crc = frame.crc;
        state.bytes += segment.bytes() - before;
        state.drop_frame();
        state.shed(None);
        Some(true)
    }

    fn enter_first(&self, state: &mut State, reader: &mut FrameReader) -> Result<bool, FetchError> {
        let bases = list_segments(&self.dir).map_err(|source| FetchError::Io {
            path: self.dir.clone(),
            source,
        })?;
        let floor = state.floor;
        let Some(&base) = bases.iter().find(|&&base| base >= floor) else {
            return Ok(false);
        };
        match reader.header(base) {
            Ok(header) => {
                state
                    .segments
                    .push_back(Segment::new(Cursor::at_start(&header)));
                Ok(true)
            }
            Err(e) if e.is_blank() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Makes a segment's points again.
    fn restore(
        &self,
        state: &mut State,
        at: usize,
        reader: &mut FrameReader,
    ) -> Result<(), FetchError> {
        if state.segments[at].points.is_some() {
            return Ok(());
        }
        let mut segment = Segment::new(state.segments[at].start);
        let end = state.segments[at].cursor.lsn;
        let mut cursor = segment.start;
        while cursor.lsn < end {
            let stepped = cursor.step(reader, |header, frame| segment.add(header, frame))?;
            if stepped.is_none() {
                break;
            }
        }
        segment.cursor = state.segments[at].cursor;
        state.bytes = state.bytes + segment.bytes() - state.segments[at].bytes();
        state.segments[at] = segment;
        state.shed(Some(at));
        Ok(())
    }

    /// First offset and the one behind the last; (0, 0) where the log has nothing of the partition.
    pub(crate) fn bounds(&self, key: PartitionKey) -> (i64, i64) {
        let state = self.lock();
        let mut ranges = state.readable().filter_map(|(_, s)| s.ranges.get(&key));
        let Some(first) = ranges.next() else {
            return (0, 0);
        };
        (first.first, ranges.fold(first.end, |end, r| r.end.max(end)))
    }

    /// The first spans of the first segment that has offset `from` or a later one; the last of several ends behind it.
    pub(crate) fn find_offset(
        &self,
        key: PartitionKey,
        from: i64,
        reader: &mut FrameReader,
    ) -> Result<Vec<Span>, FetchError> {
        let mut state = self.lock();
        let has = |s: &Segment| s.ranges.get(&key).is_some_and(|r| r.end > from);
        let Some((at, _)) = state.readable().find(|(_, s)| has(s)) else {
            return Ok(Vec::new());
        };
        self.restore(&mut state, at, reader)?;
        Ok(state.segments[at].spans(key, |points| {
            points
                .partition_point(|p| p.first <= from)
                .saturating_sub(1)
        }))
    }

    /// The span of the first batch with time `ms` or later; `None`: there is none.
    pub(crate) fn find_time(
        &self,
        key: PartitionKey,
        ms: i64,
        reader: &mut FrameReader,
    ) -> Result<Option<Span>, FetchError> {
        let mut state = self.lock();
        let has = |s: &Segment| s.ranges.get(&key).is_some_and(|r| r.max_time >= ms);
        let Some((at, _)) = state.readable().find(|(_, s)| has(s)) else {
            return Ok(None);
        };
        self.restore(&mut state, at, reader)?;
        let spans = state.segments[at].spans(key, |points| {
            points
                .iter()
                .position(|p| p.max_time >= ms)
                .unwrap_or(points.len())
        });
        Ok(spans.first().copied())
    }

    /// Offline: why the log ends where it does, if not simply there.
    pub(crate) fn stopped(&self) -> Option<String> {
        self.lock().stopped.clone().filter(|s| !s.is_empty())
    }

    /// Everything it holds, in an order of its own, to compare.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn dump(&self) -> Vec<String> {
        let state = self.lock();
        let mut lines = Vec::new();
        for segment in &state.segments {
            for (key, range) in &segment.ranges {
                let points = segment.points.as_ref().and_then(|p| p.get(key));
                let base = segment.cursor.base;
                lines.push(format!("{base} {key:?} {range:?} {points:?}"));
            }
        }
        lines.sort();
        lines
    }

    /// Keeps the index as it is while `f` runs.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn stalled<R>(&self, f: impl FnOnce() -> R) -> R {
        let _state = self.lock();
        f()
    }
}
