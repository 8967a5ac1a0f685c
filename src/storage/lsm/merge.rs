//! Merges SSTs into larger ones: batches of each partition in the order of offsets, without those before its start and
//! those of deleted topics, and, of compacted topics, without what newer records supersede.
//!
//! Invariants: what readers may still ask for is in the new file or has been superseded by a record that is; a
//! partition's range of offsets stays whole, whatever compaction leaves of it. The old files stand until the
//! manifest names the new one, and go when nobody reads them any more. A kill at any step leaves either.
//!
//! Cost: reads what is in the files once, that of compacted topics twice; batches of the target's size are copied
//! as they are, plain ones where compression does nothing for the partition (`effect`). Key indexes are merged from those of the files; records are read for them where a file has none of a topic
//! that is to have one, and where a topic is compacted. Memory: as `compact` and `keys::collect`, and a file being written.

use std::sync::{Arc, PoisonError};
#[cfg(all(test, not(loom)))]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::compact::{Action, Around, KEYS_AT_ONCE, Plan};
use super::effect::Effects;
use super::error::StoreError;
use super::flush::{Output, WORKING_SET, keys_failed, unix_ms};
use super::keys::KeysError;
use super::keys::collect::{Collector, DrainError};
use super::maintain::cpu_ns;
use super::manifest::{COMPACTED, FileMeta, NEVER_COMPACTED};
use super::memory::keys_bytes;
use super::pace::Pace;
use super::pick::{Job, Shape, pick};
use super::policy::{Known, Policies};
use super::rebatch::Rebatcher;
use super::sst::{SstError, SstInfo};
use super::steps::step;
use super::store::{Extent, Store, StoreFile, View, sst_path};
use crate::storage::PartitionKey;
use crate::wire::record_batch::{self, BatchHeader};

/// Bytes that a merge is read ahead of, be it beyond the partition's end: the next one's blocks follow.
const READ_AHEAD: u64 = 4 << 20;
/// While the log waits to be flushed a merge stops for [`CRAWL`] after so many bytes.
const CRAWL_BYTES: u64 = 1 << 20;
/// See [`CRAWL_BYTES`]: some 20 MB/s are left to it, so that it comes to an end.
const CRAWL: Duration = Duration::from_millis(50);
/// Where no file has come or gone, time and settings may still ask for a merge: looking costs a pass over all extents.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// A merge begins only where the disk has room for so many times what it reads: the log comes first.
const ROOM: u64 = 2;

/// Merges a store's files, one job at a time.
pub struct Merger {
    store: Arc<Store>,
    policies: Policies,
    batch_target: usize,
    keys_at_once: usize,
    shape: Shape,
    stop: Arc<AtomicBool>,
    /// At full speed.
    hurry: bool,
    /// What compression does for what was stored plain, in each partition.
    effects: Effects,
    /// It has said that the disk is too full.
    said_full: bool,
    /// Where nothing was to be done the last time, and when that was.
    idle: Option<(Arc<View>, Instant)>,
}

/// Why a merge ended early.
enum Stopped {
    /// As asked.
    Asked,
    /// This file cannot be read.
    Damaged(Arc<StoreFile>, SstError),
    Failed(StoreError),
}

impl From<StoreError> for Stopped {
    fn from(error: StoreError) -> Stopped {
        Stopped::Failed(error)
    }
}

impl Merger {
    /// `stop` ends a job before its time.
    pub fn new(
        store: Arc<Store>,
        policies: Policies,
        batch_target: usize,
        stop: Arc<AtomicBool>,
    ) -> Merger {
        let memory = &store.memory;
        let shape = Shape::default();
        Merger {
            keys_at_once: memory.keys_at_once().min(KEYS_AT_ONCE),
            shape: Shape {
                merged_max: memory.merged_max().min(shape.merged_max),
                ..shape
            },
            store,
            policies,
            batch_target,
            stop,
            hurry: false,
            effects: Effects::default(),
            said_full: false,
            idle: None,
        }
    }

    /// At full speed: nobody has to be left CPU and disk to.
    pub fn hurried(mut self) -> Merger {
        self.hurry = true;
        self
    }

    /// With other limits than the server's.
    #[cfg(test)]
    pub(super) fn sized(mut self, keys_at_once: usize, shape: Shape) -> Merger {
        (self.keys_at_once, self.shape) = (keys_at_once, shape);
        self
    }

    /// Does the most useful merge there is; false: none. Cost: up to a rewrite of the store's compacted topics.
    pub fn step(&mut self) -> Result<bool, StoreError> {
        let view = self.store.view();
        if let Some((seen, when)) = &self.idle
            && Arc::ptr_eq(seen, &view)
            && when.elapsed() < LOOK_AGAIN
        {
            return Ok(false);
        }
        let merged = self.step_at(unix_ms())?;
        self.idle = (!merged).then(|| (view, Instant::now()));
        Ok(merged)
    }

    pub(super) fn step_at(&mut self, now_ms: i64) -> Result<bool, StoreError> {
        let view = self.store.view();
        let mut policies = Known::new(&self.policies);
        let mut shape = self.shape;
        if self.store.is_crowded() {
            // Fewer files take less of the budget.
            shape.fan_in = 2;
        }
        let picked = pick(&self.store, &view, &mut policies, shape, now_ms)?;
        let Some(job) = picked else {
            return Ok(false);
        };
        if !self.has_room(&job) {
            return Ok(false);
        }
        let cpu = cpu_ns();
        let stats = &self.store.stats;
        let bytes = job.inputs.iter().map(|file| file.meta.data_bytes).sum();
        stats.merged_bytes.store(0, Ordering::Relaxed);
        stats.merging_bytes.store(bytes, Ordering::Relaxed);
        let says = |why| *stats.merging.lock().unwrap_or_else(PoisonError::into_inner) = why;
        says(job.why);
        let mut effects = std::mem::take(&mut self.effects);
        let result = self.run(&view, &job, &mut policies, &mut effects, now_ms);
        self.effects = effects;
        says("");
        stats.merging_bytes.store(0, Ordering::Relaxed);
        stats.merged_bytes.store(0, Ordering::Relaxed);
        let took = cpu_ns().saturating_sub(cpu);
        stats.merge_cpu_ns.fetch_add(took, Ordering::Relaxed);
        match result {
            Ok(()) => Ok(true),
            Err(Stopped::Asked) => Ok(false),
            Err(Stopped::Damaged(file, error)) => {
                self.store.damaged(&file, &error);
                Ok(true)
            }
            Err(Stopped::Failed(error)) => Err(error),
        }
    }

    fn has_room(&mut self, job: &Job) -> bool {
        let bytes: u64 = job.inputs.iter().map(|file| file.meta.bytes).sum();
        let available = available(self.store.dir());
        let full = available.is_some_and(|available| available < bytes * ROOM);
        if full && !self.said_full {
            tracing::warn!(
                "{} SSTs of {bytes} bytes are not merged ({}): {} has {} bytes left; merging goes on when there is room",
                job.inputs.len(),
                job.why,
                self.store.dir().display(),
                available.unwrap_or(0),
            );
        }
        self.said_full = full;
        !full
    }

    fn run(
        &self,
        view: &View,
        job: &Job,
        policies: &mut Known,
        effects: &mut Effects,
        now_ms: i64,
    ) -> Result<(), Stopped> {
        let numbers: Vec<u64> = job.inputs.iter().map(|file| file.meta.number).collect();
        let mut partitions: Vec<(PartitionKey, Vec<Extent>)> = view
            .partitions()
            .map(|(key, extents)| {
                let start = view.start(key);
                let own = extents.iter().filter(|extent| {
                    extent.end > start && numbers.contains(&extent.file.meta.number)
                });
                (key, own.cloned().collect())
            })
            .filter(|(_, own): &(_, Vec<Extent>)| !own.is_empty())
            .collect();
        partitions.sort_by_key(|&(key, _)| key);
        let mut outputs = Outputs::new(&self.store, job, self.shape.merged_max);
        let mut charge = self.store.memory.maintenance.charge();
        charge.set(WORKING_SET);
        let mut rebatcher: Option<Rebatcher> = None;
        let mut source = Source {
            store: &self.store,
            stop: &self.stop,
            pace: Pace::new(self.hurry),
            crawled: 0,
        };
        let mut collector = None;
        let mut dropped = 0;
        for (key, extents) in &partitions {
            let policy = policies.of(key.topic);
            if policy.deleted {
                continue;
            }
            if rebatcher.as_ref().is_none_or(|r| r.codec() != policy.codec) {
                rebatcher = Some(Rebatcher::new(policy.codec, self.batch_target));
            }
            let Some(rebatcher) = &mut rebatcher else {
                continue;
            };
            let part = Part {
                key: *key,
                extents,
                start: view.start(*key),
                indexed: policy.indexed,
            };
            rebatcher.begin(effects.of(*key));
            dropped += match policy.compaction {
                Some(compaction) => {
                    let all = view.extents(*key);
                    let live = all.partition_point(|extent| extent.end <= part.start);
                    let is = |a: Option<&Extent>, b: Option<&Extent>| {
                        a.map(|e| e.file.meta.number) == b.map(|e| e.file.meta.number)
                    };
                    let around = Around {
                        compaction,
                        now_ms,
                        oldest: is(all.get(live), extents.first()),
                        last: is(all.last(), extents.last()),
                    };
                    charge.set(WORKING_SET + keys_bytes(self.keys_at_once));
                    let old = now_ms.saturating_sub(compaction.min_lag_ms);
                    let plan = Plan::make(old, self.keys_at_once, |take| {
                        source.walk(&part, &mut |batch, header, time| {
                            take(batch, header, time);
                            Ok(())
                        })
                    })?;
                    let keys = &mut collector;
                    compacted(
                        &mut source,
                        &part,
                        &plan,
                        around,
                        rebatcher,
                        &mut outputs,
                        keys,
                    )?
                }
                None => {
                    copied(&mut source, &part, rebatcher, &mut outputs, &mut collector)?;
                    0
                }
            };
            effects.note(*key, rebatcher.effect());
            let read: u64 = extents.iter().map(|extent| extent.bytes).sum();
            let merged = &self.store.stats.merged_bytes;
            merged.fetch_add(read, Ordering::Relaxed);
        }
        let added = outputs.finish()?;
        let (count, written) = (added.len(), added.iter().map(|file| file.bytes).sum());
        let before: u64 = job.inputs.iter().map(|file| file.meta.records).sum();
        let after: u64 = added.iter().map(|file| file.records).sum();
        // Whether a failed edit is on disk is not known: the files stay for the next start to judge.
        outputs.made.clear();
        if !self.store.replace(&numbers, added.clone())? {
            outputs.made = added;
            return Ok(());
        }
        let stats = &self.store.stats;
        stats.merges.fetch_add(1, Ordering::Relaxed);
        stats
            .merge_written_bytes
            .fetch_add(written, Ordering::Relaxed);
        stats
            .records_compacted
            .fetch_add(dropped, Ordering::Relaxed);
        let expired = before.saturating_sub(after + dropped);
        stats.records_expired.fetch_add(expired, Ordering::Relaxed);
        tracing::debug!(
            "{}: {} SSTs became {count} ({written} bytes), {dropped} records were superseded",
            job.why,
            numbers.len(),
        );
        Ok(())
    }
}

/// A partition in the files of a job.
struct Part<'a> {
    key: PartitionKey,
    /// Those that reach behind its start.
    extents: &'a [Extent],
    start: i64,
    /// Its keys are to be indexed.
    indexed: bool,
}

impl Part<'_> {
    /// The offsets that the merged file stands for, where its first batch begins at `written`. Never more than were there.
    fn range(&self, written: Option<i64>) -> (i64, i64) {
        let (first, end) = match self.extents {
            [first, .., last] => (first.first, last.end),
            [one] => (one.first, one.end),
            [] => (self.start, self.start),
        };
        let trimmed = written.unwrap_or(self.start).min(self.start);
        (first.max(trimmed), end)
    }

    fn time(&self) -> i64 {
        self.extents
            .iter()
            .map(|extent| extent.max_time)
            .max()
            .unwrap_or(0)
    }
}

/// Takes a batch, and the latest time at which it arrived, Unix ms.
type Consume<'a> = &'a mut dyn FnMut(&[u8], &BatchHeader, i64) -> Result<(), StoreError>;

/// Reads the files of a job at the pace that is left to it.
struct Source<'a> {
    store: &'a Store,
    stop: &'a AtomicBool,
    pace: Pace,
    crawled: u64,
}

impl Source<'_> {
    /// Calls `take` with every batch of a partition that reaches behind its start, and the latest time at which it arrived.
    fn walk(&mut self, part: &Part, take: Consume) -> Result<(), Stopped> {
        let mut time = i64::MIN;
        for extent in part.extents {
            let damaged = |error| match error {
                SstError::Io { .. } => Stopped::Failed(error.into()),
                error => Stopped::Damaged(Arc::clone(&extent.file), error),
            };
            let reader = self.store.reader(&extent.file).map_err(damaged)?;
            let mut scan = None;
            for block in reader.blocks(part.key, part.start).map_err(damaged)? {
                let block = block.map_err(damaged)?;
                let scan = scan.get_or_insert_with(|| {
                    let ahead = extent.bytes.max(READ_AHEAD);
                    reader.scan(block.position, block.position.saturating_add(ahead))
                });
                let bytes = scan.block(&block).map_err(damaged)?;
                time = time.max(block.max_time);
                let mut rest = bytes;
                while !rest.is_empty() {
                    let header = record_batch::parse_header(rest)
                        .ok()
                        .filter(|header| header.total_len() <= rest.len());
                    let Some(header) = header else {
                        return Err(damaged(SstError::Block {
                            path: reader.path().to_owned(),
                            block,
                            what: "bytes that are no record batch",
                        }));
                    };
                    let (batch, others) = rest.split_at(header.total_len());
                    rest = others;
                    if header.next_offset() > part.start {
                        take(batch, &header, time)?;
                    }
                }
                self.worked(bytes.len() as u64)?;
            }
        }
        Ok(())
    }

    fn worked(&mut self, bytes: u64) -> Result<(), Stopped> {
        if self.stop.load(Ordering::Acquire) {
            return Err(Stopped::Asked);
        }
        let read = &self.store.stats.merge_read_bytes;
        read.fetch_add(bytes, Ordering::Relaxed);
        self.pace.worked(bytes as usize);
        self.crawled += bytes;
        if self.crawled >= CRAWL_BYTES {
            self.crawled = 0;
            if self.store.behind.load(Ordering::Relaxed) {
                std::thread::sleep(CRAWL);
            }
        }
        Ok(())
    }
}

/// Puts a partition's batches into the output; small ones are merged.
fn copied(
    source: &mut Source,
    part: &Part,
    rebatcher: &mut Rebatcher,
    outputs: &mut Outputs,
    keys: &mut Option<Collector>,
) -> Result<(), Stopped> {
    let mut sink = outputs.sink(part, NEVER_COMPACTED)?;
    source.walk(part, &mut |batch, _, time| {
        sink.push(rebatcher, batch, time)
    })?;
    sink.end(rebatcher, part, None)?;
    if part.indexed {
        copied_keys(source, part, &mut sink, keys)?;
    }
    Ok(())
}

/// Merges the key indexes of a partition; those of files that have none are made of the records.
fn copied_keys(
    source: &mut Source,
    part: &Part,
    sink: &mut Sink,
    keys: &mut Option<Collector>,
) -> Result<(), Stopped> {
    let output = &mut sink.open.output;
    let path = output.path.clone();
    let collector = output.collector(keys, part.key, &source.store.memory);
    let (keyed, others): (Vec<Extent>, Vec<Extent>) = part
        .extents
        .iter()
        .cloned()
        .partition(|extent| extent.keyed);
    if !others.is_empty() {
        let rest = Part {
            extents: &others,
            ..*part
        };
        source.walk(&rest, &mut |batch, header, _| {
            let kept = collector.batch(batch, header);
            kept.map_err(|error| keys_failed(&path, error))
        })?;
    }
    let damaged = |at: usize| {
        let file = Arc::clone(&keyed[at].file);
        move |error| match error {
            SstError::Io { .. } => Stopped::Failed(error.into()),
            error => Stopped::Damaged(file, error),
        }
    };
    let mut readers = Vec::with_capacity(keyed.len());
    for (at, extent) in keyed.iter().enumerate() {
        readers.push(source.store.reader(&extent.file).map_err(damaged(at))?);
    }
    let (mut sections, mut of) = (Vec::new(), Vec::new());
    for (at, reader) in readers.iter().enumerate() {
        sections.extend(reader.keys().map_err(damaged(at))?);
        of.resize(sections.len(), at);
    }
    // What was dropped with its whole batch is not there any more.
    let least = sink.first.unwrap_or(i64::MAX);
    let drained = output.keys(part.key, collector, &sections, least);
    drained.map_err(|error| match error {
        DrainError::Section(number, error) => {
            let at = of[number];
            damaged(at)(readers[at].keys_damaged(&error))
        }
        DrainError::Run(error) => Stopped::Failed(keys_failed(&path, error)),
        DrainError::Take(error) => Stopped::Failed(error),
    })
}

/// As [`copied`], without what the plan lets go; gives how many records that were. The index has the keys of what stays.
fn compacted(
    source: &mut Source,
    part: &Part,
    plan: &Plan,
    around: Around,
    rebatcher: &mut Rebatcher,
    outputs: &mut Outputs,
    keys: &mut Option<Collector>,
) -> Result<u64, Stopped> {
    let mut sink = outputs.sink(part, COMPACTED)?;
    let path = sink.open.output.path.clone();
    let failed = |error: KeysError| keys_failed(&path, error);
    let mut keys = match part.indexed {
        true => Some(
            sink.open
                .output
                .collector(keys, part.key, &source.store.memory),
        ),
        false => None,
    };
    let mut cursor = plan.cursor(around);
    source.walk(part, &mut |batch, header, time| match cursor.next(header) {
        Action::Drop => Ok(()),
        Action::Keep => {
            if let Some(keys) = &mut keys {
                keys.batch(batch, header).map_err(failed)?;
            }
            sink.push(rebatcher, batch, time)
        }
        Action::Thin {
            horizon,
            tombstones_go,
        } => {
            let mut index = 0;
            let mut collected = Ok(());
            let keep = |record: &record_batch::Record| {
                index += 1;
                let stays = cursor.keeps(index - 1, record, tombstones_go);
                if stays
                    && collected.is_ok()
                    && let (Some(keys), Some(key)) = (&mut keys, record.key)
                {
                    collected = keys.add(key, record.offset);
                }
                stays
            };
            let thinned = rebatcher.push_thinned(batch, horizon, keep, &mut |batch| {
                sink.put(batch, time);
            });
            collected.map_err(failed)?;
            match thinned {
                Ok(()) => sink.check(),
                // More than there need be is no harm.
                Err(_) => {
                    if let Some(keys) = &mut keys {
                        keys.batch(batch, header).map_err(failed)?;
                    }
                    sink.push(rebatcher, batch, time)
                }
            }
        }
    })?;
    sink.end(rebatcher, part, cursor.due_ms)?;
    if let Some(keys) = keys {
        let drained = sink.open.output.keys(part.key, keys, &[], 0);
        drained.map_err(|error| match error {
            DrainError::Section(_, error) | DrainError::Run(error) => failed(error),
            DrainError::Take(error) => error,
        })?;
    }
    Ok(cursor.dropped)
}

/// The files that a job makes: those of compacted topics apart from the others.
struct Outputs<'a> {
    store: &'a Store,
    /// Bytes at which a file ends with its partition.
    most: u64,
    /// Of what it makes the log's range, the files and how often they were merged.
    info: SstInfo,
    merges: u32,
    open: [Option<Open>; 2],
    /// Whole files that the manifest does not name yet.
    made: Vec<FileMeta>,
}

struct Open {
    output: Output,
    due: u32,
}

/// The output of a partition.
struct Sink<'a> {
    key: PartitionKey,
    open: &'a mut Open,
    /// Where the first batch begins.
    first: Option<i64>,
    failed: Option<StoreError>,
}

impl<'a> Outputs<'a> {
    fn new(store: &'a Store, job: &Job, most: u64) -> Outputs<'a> {
        let metas = || job.inputs.iter().map(|file| &file.meta);
        Outputs {
            store,
            most,
            info: SstInfo {
                id: store.id(),
                number: 0,
                lsn_start: metas().map(|meta| meta.lsn_start).min().unwrap_or(0),
                lsn_end: metas().map(|meta| meta.lsn_end).max().unwrap_or(0),
                created_ms: unix_ms(),
            },
            merges: metas().map(|meta| meta.merges).max().unwrap_or(0) + 1,
            open: [None, None],
            made: Vec::new(),
        }
    }

    /// Where the partition goes; `due`: what is said of a file without anything to wait for.
    fn sink(&mut self, part: &Part, due: u32) -> Result<Sink<'_>, StoreError> {
        let kind = usize::from(due == COMPACTED);
        let most = self.most;
        let full = |open: &Open| {
            let writer = open.output.writer.as_ref();
            writer.is_some_and(|writer| writer.bytes() >= most)
        };
        if self.open[kind].as_ref().is_some_and(full) {
            self.close(kind)?;
        }
        let store = self.store;
        let info = self.info;
        let open = self.open[kind].get_or_insert_with(|| {
            let (number, path) = store.next_file();
            Open {
                output: Output {
                    path,
                    info: SstInfo { number, ..info },
                    writer: None,
                },
                due,
            }
        });
        Ok(Sink {
            key: part.key,
            open,
            first: None,
            failed: None,
        })
    }

    fn close(&mut self, kind: usize) -> Result<(), StoreError> {
        if let Some(open) = self.open[kind].take()
            && let Some(meta) = open.output.finish()?
        {
            self.made.push(FileMeta {
                merges: self.merges,
                due: open.due,
                ..meta
            });
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<Vec<FileMeta>, StoreError> {
        self.close(0)?;
        self.close(1)?;
        Ok(self.made.clone())
    }
}

impl Drop for Outputs<'_> {
    fn drop(&mut self) {
        for file in &self.made {
            // What stays because of an error is removed at the next start.
            let path = sst_path(self.store.dir(), file.number);
            let _ = step().and_then(|()| std::fs::remove_file(path));
        }
    }
}

impl Sink<'_> {
    fn put(&mut self, batch: &[u8], time: i64) {
        if self.first.is_none() {
            self.first = record_batch::parse_header(batch)
                .ok()
                .map(|h| h.base_offset);
        }
        self.open
            .output
            .put(self.key, batch, time, &mut self.failed);
    }

    fn check(&mut self) -> Result<(), StoreError> {
        self.failed.take().map_or(Ok(()), Err)
    }

    fn push(
        &mut self,
        rebatcher: &mut Rebatcher,
        batch: &[u8],
        time: i64,
    ) -> Result<(), StoreError> {
        if rebatcher
            .push(batch, &mut |batch| self.put(batch, time))
            .is_err()
        {
            // It was stored as it is, and nothing here knows better.
            rebatcher.finish(&mut |batch| self.put(batch, time));
            self.put(batch, time);
        }
        self.check()
    }

    /// Ends the partition; `due_ms`: when more of it can go.
    fn end(
        &mut self,
        rebatcher: &mut Rebatcher,
        part: &Part,
        due_ms: Option<i64>,
    ) -> Result<(), StoreError> {
        let time = part.time();
        rebatcher.finish(&mut |batch| self.put(batch, time));
        self.check()?;
        let (first, end) = part.range(self.first);
        self.open.output.cover(self.key, first, end, time)?;
        if let Some(ms) = due_ms {
            let seconds = (ms.saturating_add(999) / 1000).clamp(1, i64::from(COMPACTED) - 1) as u32;
            self.open.due = match self.open.due {
                COMPACTED => seconds,
                due => due.max(seconds),
            };
        }
        Ok(())
    }
}

/// Bytes that the file system has left for us.
fn available(dir: &std::path::Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes()).ok()?;
    // SAFETY: all zeros is a valid statvfs.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` is a string that ends in 0, `stat` a statvfs to write to.
    let result = unsafe { libc::statvfs(path.as_ptr(), &mut stat) };
    (result == 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize))
}
