//! Makes a shard's manifest anew from its SSTs and its log, where it is missing, damaged or names files that are
//! not there.
//!
//! Invariants: nothing is destroyed. The old manifests are kept beside the new one under another name, and so is
//! each SST that the new one does not name. The new one names no two files that hold the same of the log, and every
//! message that a whole file or the log holds is in the store afterwards.
//!
//! How files are chosen. An SST's header says what it holds of the log. A merge makes files that hold what its
//! inputs held, and those go only when the manifest that names the new ones is durable. So where files overlap, the
//! merged ones count if they have messages that the others lack (an input is gone: the merge had been completed) or
//! if they have as much; if they have less, it is a merge that was never completed.

#[cfg(all(test, not(loom)))]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::error::StoreError;
use super::manifest::{self, FileMeta, Manifest, NEVER_COMPACTED, Record, State};
use super::sst::format::HEADER;
use super::sst::{PartitionExtent, SstInfo, SstReader, SstReport};
use super::store::{check_files, check_manifest, list_files, sst_path};
use crate::storage::PartitionKey;
use crate::storage::frames::{Cursor, FrameReader};
use crate::storage::wal::frame::{Entries, EntryKind, LogId};
use crate::storage::wal::segment::{list_segments, segment_path, sync_dir};
use crate::wire::record_batch;

/// An SST that the new manifest names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// The file.
    pub path: PathBuf,
    /// What it holds of the log …
    pub lsn_start: u64,
    /// … up to here.
    pub lsn_end: u64,
    /// Its bytes.
    pub bytes: u64,
    /// Records in it.
    pub records: u64,
    /// Damage in it, each with its byte; the rest of the file is served.
    pub damage: Vec<String>,
}

/// An SST that it does not name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// The file.
    pub path: PathBuf,
    /// Its name from then on.
    pub becomes: PathBuf,
    /// Why.
    pub why: String,
}

/// Offsets of a partition that are in no file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Absent {
    /// Topic id.
    pub topic: u32,
    /// Partition.
    pub partition: u32,
    /// The first one, and the one behind the last.
    pub first: i64,
    /// See `first`.
    pub end: i64,
}

/// What is wrong in a shard, and what is to be done about it.
#[derive(Debug, Clone, Serialize)]
pub struct ShardRepair {
    /// Shard.
    pub shard: u16,
    /// What is wrong with its manifest; `None`: nothing, and nothing is done.
    pub problem: Option<String>,
    /// In the order of the log.
    pub kept: Vec<Kept>,
    /// In the order of their numbers.
    pub left_out: Vec<LeftOut>,
    /// Where the log begins that is behind the SSTs, and where its last segment ends; `None`: there is no log.
    pub log: Option<(u64, u64)>,
    /// What the log holds before this is in SSTs.
    pub flushed_lsn: u64,
    /// Offsets that are in no file: compacted away, or lost.
    pub absent: Vec<Absent>,
    /// First offsets of partitions that the old manifest, as far as it can be read, says.
    pub starts: usize,
    /// What else has to be known.
    pub notes: Vec<String>,
    /// Old manifests, and their names from then on.
    pub old_manifests: Vec<(PathBuf, PathBuf)>,
    /// The new one.
    pub manifest: PathBuf,
    #[serde(skip)]
    dir: PathBuf,
    #[serde(skip)]
    id: LogId,
    #[serde(skip)]
    number: u64,
    #[serde(skip)]
    state: State,
}

/// An SST that can be read.
struct Candidate {
    info: SstInfo,
    meta: FileMeta,
    extents: Vec<PartitionExtent>,
    report: SstReport,
}

/// Files of one flush or merge.
#[derive(Clone)]
struct Run {
    start: u64,
    end: u64,
    files: Vec<usize>,
}

impl Run {
    fn overlaps(&self, other: &Run) -> bool {
        self.start < other.end && other.start < self.end
    }
}

/// Looks at a shard; changes nothing. `progress` gets the file and bytes read of it. The store's lock must be held.
/// Cost: reads every SST, and the log, where something is wrong; else the manifest and each file's table.
pub fn plan(
    dir: &Path,
    id: LogId,
    progress: &mut dyn FnMut(&Path, u64),
) -> Result<ShardRepair, StoreError> {
    let bases = list_segments(dir).map_err(StoreError::io("cannot list", dir))?;
    let numbers = list_files(dir).map_err(StoreError::io("cannot list", dir))?;
    let mut repair = ShardRepair {
        shard: id.shard,
        problem: problem(dir, id)?,
        kept: Vec::new(),
        left_out: Vec::new(),
        log: log_range(dir, &bases)?,
        flushed_lsn: 0,
        absent: Vec::new(),
        starts: 0,
        notes: Vec::new(),
        old_manifests: Vec::new(),
        manifest: PathBuf::new(),
        dir: dir.to_owned(),
        id,
        number: 0,
        state: State::default(),
    };
    if repair.problem.is_none() {
        return Ok(repair);
    }
    let old = salvage(&mut repair)?;
    let mut candidates = Vec::new();
    for &number in &numbers {
        let path = sst_path(dir, number);
        match candidate(&path, id, number, progress) {
            Ok(candidate) => candidates.push(candidate),
            Err(why) => repair.leave_out(&path, "damaged", why),
        }
    }
    let chosen = choose(&candidates, &mut repair);
    let chosen = behind_the_log(&candidates, chosen, &mut repair);
    repair.left_out.sort_by(|a, b| a.path.cmp(&b.path));

    let mut state = State {
        next_number: next_number(dir)?.max(old.next_number),
        flushed_lsn: repair.flushed_lsn,
        starts: old.starts.clone(),
        ..State::default()
    };
    let known: HashMap<u64, &FileMeta> = old.files.iter().map(|f| (f.number, f)).collect();
    for &at in &chosen {
        let candidate = &candidates[at];
        let mut meta = candidate.meta;
        if let Some(before) = known.get(&meta.number)
            && before.lsn_start == meta.lsn_start
            && before.lsn_end == meta.lsn_end
        {
            (meta.merges, meta.due) = (before.merges, before.due);
        }
        state.files.push(meta);
        if !candidate.report.findings.is_empty() {
            state.quarantined.insert(meta.number);
        }
        let said = candidate.report.findings.iter();
        repair.kept.push(Kept {
            path: sst_path(dir, meta.number),
            lsn_start: meta.lsn_start,
            lsn_end: meta.lsn_end,
            bytes: meta.bytes,
            records: meta.records,
            damage: said
                .map(|f| format!("byte {}: {}", f.position, f.what))
                .collect(),
        });
    }
    state.files.sort_by_key(|f| (f.lsn_start, f.number));
    repair
        .kept
        .sort_by(|a, b| (a.lsn_start, &a.path).cmp(&(b.lsn_start, &b.path)));
    repair.starts = state.starts.len();
    if repair.log.is_none() && !state.files.is_empty() {
        repair.notes.push(
            "there is no log behind the SSTs: what they hold can be read and exported, but the offsets that were given last are not known; do not let a server write to it".to_owned(),
        );
    } else if let Some((_, end)) = repair.log
        && end < state.flushed_lsn
    {
        repair.notes.push(format!(
            "the log ends at LSN {end}, before the SSTs do: segments are missing; restore them before a server writes to it"
        ));
    }
    repair.absent = absent(dir, id, &bases, &state, &candidates, &chosen);
    repair.state = state;
    Ok(repair)
}

impl ShardRepair {
    fn leave_out(&mut self, path: &Path, suffix: &str, why: String) {
        self.left_out.push(LeftOut {
            path: path.to_owned(),
            becomes: free_name(path, suffix),
            why,
        });
    }

    /// Does what the plan says. A kill between any two steps leaves what another repair makes the same of.
    pub fn apply(&self) -> Result<(), StoreError> {
        if self.problem.is_none() {
            return Ok(());
        }
        for file in &self.left_out {
            // Before the manifest: a server removes files that it does not name.
            fs::rename(&file.path, &file.becomes)
                .map_err(StoreError::io("cannot rename", &file.path))?;
        }
        for (path, becomes) in &self.old_manifests {
            fs::hard_link(path, becomes)
                .or_else(|_| fs::copy(path, becomes).map(drop))
                .map_err(StoreError::io("cannot keep", path))?;
        }
        sync_dir(&self.dir).map_err(StoreError::io("cannot sync the folder", &self.dir))?;
        drop(Manifest::create(
            &self.dir,
            self.id,
            self.number,
            self.state.clone(),
        )?);
        match problem(&self.dir, self.id)? {
            None => Ok(()),
            Some(what) => Err(StoreError::NotRepaired {
                dir: self.dir.clone(),
                what,
            }),
        }
    }
}

/// Why the store in a shard's folder would not open.
fn problem(dir: &Path, id: LogId) -> Result<Option<String>, StoreError> {
    let checked = check_manifest(dir).and_then(|()| match manifest::load(dir, id)? {
        Some(loaded) => check_files(dir, &loaded.state).map(drop),
        None => check_files(dir, &State::default()).map(drop),
    });
    match checked {
        Ok(()) => Ok(None),
        Err(error @ StoreError::Io { .. }) => Err(error),
        Err(error) => Ok(Some(error.to_string())),
    }
}

fn log_range(dir: &Path, bases: &[u64]) -> Result<Option<(u64, u64)>, StoreError> {
    let (Some(&first), Some(&last)) = (bases.first(), bases.last()) else {
        return Ok(None);
    };
    let path = segment_path(dir, last);
    let len = fs::metadata(&path)
        .map_err(StoreError::io("cannot read", &path))?
        .len();
    Ok(Some((first, last.saturating_add(len))))
}

/// A name beside `path` that nothing has.
fn free_name(path: &Path, suffix: &str) -> PathBuf {
    let name = |n: u32| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{suffix}"));
        if n > 0 {
            name.push(n.to_string());
        }
        PathBuf::from(name)
    };
    (0..)
        .map(name)
        .find(|path| !path.exists())
        .unwrap_or_else(|| name(0))
}

/// What the old manifests say as far as they can be read: where partitions begin, and the next number. Notes their
/// new names, and that of the manifest to come.
fn salvage(repair: &mut ShardRepair) -> Result<State, StoreError> {
    let dir = repair.dir.clone();
    let mut old = State::default();
    let numbers = manifest::list(&dir).map_err(StoreError::io("cannot list", &dir))?;
    for &number in &numbers {
        let path = manifest::manifest_path(&dir, number);
        let bytes = fs::read(&path).map_err(StoreError::io("cannot read", &path))?;
        if manifest::read_header(&bytes) == Ok((repair.id, number)) {
            let mut state = State::default();
            let read = manifest::records(&bytes, &mut |_, _, record| match record {
                Record::Snapshot(snapshot) => state = snapshot.clone(),
                Record::Edit(edit) => state.apply(edit),
            });
            if let Err((position, what)) = read {
                let text = format!(
                    "{} at byte {position}: {what}; what lies before says where {} partitions begin",
                    path.display(),
                    state.starts.len()
                );
                repair.notes.push(text);
            }
            for (&key, &start) in &state.starts {
                let entry = old.starts.entry(key).or_insert(start);
                *entry = start.max(*entry);
            }
            old.next_number = old.next_number.max(state.next_number);
            old.files = state.files;
        } else {
            repair.notes.push(format!(
                "{} at byte 0: its header is damaged; nothing of it is used",
                path.display()
            ));
        }
        let becomes = free_name(&path, "old");
        repair.old_manifests.push((path, becomes));
    }
    if old.starts.is_empty() {
        repair.notes.push(
            "where partitions begin is not known: messages that retention or an operator removed may be there again until they are removed once more".to_owned(),
        );
    }
    repair.number = numbers.last().map_or(1, |last| last + 1);
    repair.manifest = manifest::manifest_path(&dir, repair.number);
    Ok(old)
}

/// A number that no SST of the folder has had, whatever it is called now.
fn next_number(dir: &Path) -> Result<u64, StoreError> {
    let io = StoreError::io("cannot list", dir);
    let mut next = 1;
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => return Err(io(error)),
    };
    for entry in entries.flatten() {
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.strip_prefix("sst-")?.get(..16))
            .and_then(|hex| u64::from_str_radix(hex, 16).ok());
        if let Some(number) = number.filter(|&n| n < u64::MAX) {
            next = next.max(number + 1);
        }
    }
    Ok(next)
}

fn candidate(
    path: &Path,
    id: LogId,
    number: u64,
    progress: &mut dyn FnMut(&Path, u64),
) -> Result<Candidate, String> {
    let reader = SstReader::open(path, id).map_err(|error| error.to_string())?;
    let info = *reader.info();
    if info.number != number {
        return Err(format!(
            "its header says that it is file {}: it was given another name",
            info.number
        ));
    }
    let extents = reader.extents().map_err(|error| error.to_string())?;
    let report = reader.verify(|bytes| progress(path, bytes));
    let footer = reader.footer();
    Ok(Candidate {
        info,
        meta: FileMeta {
            number,
            lsn_start: info.lsn_start,
            lsn_end: info.lsn_end,
            bytes: footer.file_bytes,
            records: footer.records,
            data_bytes: footer.data_end - HEADER as u64,
            min_time: footer.min_time,
            max_time: footer.max_time,
            merges: 0,
            due: NEVER_COMPACTED,
        },
        extents,
        report,
    })
}

/// The files by flush or merge. Files of one run have the same LSNs, and their partitions ascend with their numbers;
/// where they begin anew, another merge made them.
fn runs(candidates: &[Candidate]) -> Vec<Run> {
    let mut by_range: BTreeMap<(u64, u64), Vec<usize>> = BTreeMap::new();
    for (at, candidate) in candidates.iter().enumerate() {
        let range = (candidate.info.lsn_start, candidate.info.lsn_end);
        by_range.entry(range).or_default().push(at);
    }
    let mut runs = Vec::new();
    for ((start, end), mut files) in by_range {
        files.sort_by_key(|&at| candidates[at].info.number);
        let mut last: Option<(PartitionKey, i64)> = None;
        for at in files {
            let extents = &candidates[at].extents;
            let first = extents.first().map(|e| (e.key, e.first_offset));
            if last.is_none() || first.is_none() || first < last {
                runs.push(Run {
                    start,
                    end,
                    files: Vec::new(),
                });
            }
            if let Some(run) = runs.last_mut() {
                run.files.push(at);
            }
            last = extents.last().map(|e| (e.key, e.end_offset)).or(last);
        }
    }
    runs
}

type Spans = BTreeMap<PartitionKey, Vec<(i64, i64)>>;

/// Offsets that whole blocks of the files hold, by partition, ascending and joined.
fn spans<'a>(candidates: &[Candidate], files: impl Iterator<Item = &'a usize>) -> Spans {
    let mut spans = Spans::new();
    for &at in files {
        let candidate = &candidates[at];
        for extent in &candidate.extents {
            let mut from = extent.first_offset;
            let list = spans.entry(extent.key).or_default();
            let mut damaged: Vec<(i64, i64)> = candidate
                .report
                .findings
                .iter()
                .filter_map(|f| f.messages.filter(|m| m.0 == extent.key))
                .map(|(_, first, end)| (first, end))
                .collect();
            damaged.sort_unstable();
            for (first, end) in damaged {
                if first > from {
                    list.push((from, first));
                }
                from = from.max(end);
            }
            if from < extent.end_offset {
                list.push((from, extent.end_offset));
            }
        }
    }
    for list in spans.values_mut() {
        list.sort_unstable();
        list.dedup_by(|next, before| {
            let joined = next.0 <= before.1;
            if joined {
                before.1 = before.1.max(next.1);
            }
            joined
        });
    }
    spans
}

/// Whether there is an offset that both have.
fn intersect(a: &Spans, b: &Spans) -> bool {
    a.iter().any(|(key, list)| {
        let others = b.get(key).map_or(&[][..], Vec::as_slice);
        list.iter().any(|span| {
            others
                .iter()
                .any(|other| span.0 < other.1 && other.0 < span.1)
        })
    })
}

/// Offsets of `a` that `b` lacks, as how many and an example.
fn lacks(a: &Spans, b: &Spans) -> Option<(u64, PartitionKey, i64)> {
    let mut found: Option<(u64, PartitionKey, i64)> = None;
    for (&key, list) in a {
        let others = b.get(&key).map_or(&[][..], Vec::as_slice);
        for &(first, end) in list {
            let mut from = first;
            for &(other, other_end) in others {
                if other_end <= from || from >= end {
                    continue;
                }
                if other > from {
                    let count = (other.min(end) - from) as u64;
                    found = Some(found.map_or((count, key, from), |f| (f.0 + count, f.1, f.2)));
                }
                from = from.max(other_end);
            }
            if from < end {
                let count = (end - from) as u64;
                found = Some(found.map_or((count, key, from), |f| (f.0 + count, f.1, f.2)));
            }
        }
    }
    found
}

fn names(candidates: &[Candidate], runs: &[Run]) -> String {
    let files = runs.iter().flat_map(|run| &run.files);
    let names: Vec<String> = files
        .map(|&at| format!("sst-{:016x}.sst", candidates[at].info.number))
        .collect();
    names.join(", ")
}

/// The files of which no two hold the same of the log; says of the others why not.
fn choose(candidates: &[Candidate], repair: &mut ShardRepair) -> Vec<usize> {
    let mut all = runs(candidates);
    // The narrow ones first; of the same width the older ones: each is compared with what was chosen before.
    all.sort_by_key(|run| (run.end - run.start, run.files.first().copied()));
    let mut chosen: Vec<Run> = Vec::new();
    for run in all {
        let new = spans(candidates, run.files.iter());
        // Compacted topics have files of their own for the same part of the log.
        let (under, rest): (Vec<Run>, Vec<Run>) = chosen
            .iter()
            .cloned()
            .partition(|c| c.overlaps(&run) && intersect(&spans(candidates, c.files.iter()), &new));
        if under.is_empty() {
            chosen.push(run);
            continue;
        }
        let old = spans(candidates, under.iter().flat_map(|r| &r.files));
        let only_old = lacks(&old, &new);
        if lacks(&new, &old).is_some() || only_old.is_none() {
            let by = names(candidates, std::slice::from_ref(&run));
            let mut why = format!("merged into {by}");
            if let Some((count, key, offset)) = only_old {
                why = format!(
                    "{why}, which left out {count} offsets of it (topic {} partition {} offset {offset} and so on)",
                    key.topic, key.partition
                );
            }
            for &at in under.iter().flat_map(|r| &r.files) {
                let path = sst_path(&repair.dir, candidates[at].info.number);
                repair.leave_out(&path, "unused", why.clone());
            }
            chosen = rest;
            chosen.push(run);
        } else {
            let why = format!(
                "a merge that was never completed: all of it is in {}",
                names(candidates, &under)
            );
            for &at in &run.files {
                let path = sst_path(&repair.dir, candidates[at].info.number);
                repair.leave_out(&path, "unused", why.clone());
            }
        }
    }
    chosen.iter().flat_map(|run| run.files.clone()).collect()
}

/// Finds up to where SSTs hold the log without a gap, as far as it is still there, and leaves out what lies behind:
/// it is in the log, and flushed again.
fn behind_the_log(
    candidates: &[Candidate],
    mut chosen: Vec<usize>,
    repair: &mut ShardRepair,
) -> Vec<usize> {
    chosen.sort_by_key(|&at| (candidates[at].info.lsn_start, candidates[at].info.number));
    let ends = chosen.iter().map(|&at| candidates[at].info.lsn_end).max();
    let Some((begins, _)) = repair.log else {
        repair.flushed_lsn = ends.unwrap_or(0);
        return chosen;
    };
    let mut flushed = begins;
    for &at in &chosen {
        let info = &candidates[at].info;
        if info.lsn_start <= flushed {
            flushed = flushed.max(info.lsn_end);
        }
    }
    repair.flushed_lsn = flushed;
    if let Some(ends) = ends.filter(|&ends| ends < begins) {
        repair.notes.push(format!(
            "neither an SST nor a segment holds the log from LSN {ends} to {begins}: nothing of it was kept, or a file is missing"
        ));
    }
    let (keep, again): (Vec<usize>, Vec<usize>) = chosen
        .into_iter()
        .partition(|&at| candidates[at].info.lsn_start < flushed);
    for at in again {
        let path = sst_path(&repair.dir, candidates[at].info.number);
        let why = format!(
            "the log has all of it, and from LSN {flushed} on a file before it is missing: it is flushed again"
        );
        repair.leave_out(&path, "unused", why);
    }
    keep
}

/// Offsets between the first and the last of each partition that neither the chosen files nor the log behind them
/// hold. Damaged blocks are not meant: they are reported with their file.
fn absent(
    dir: &Path,
    id: LogId,
    bases: &[u64],
    state: &State,
    candidates: &[Candidate],
    chosen: &[usize],
) -> Vec<Absent> {
    let mut spans: BTreeMap<PartitionKey, BTreeSet<(i64, i64)>> = BTreeMap::new();
    for &at in chosen {
        for extent in &candidates[at].extents {
            let list = spans.entry(extent.key).or_default();
            list.insert((extent.first_offset, extent.end_offset));
        }
    }
    // The log's first batch of each partition; the log itself has no gaps within a partition.
    let mut first: HashMap<PartitionKey, i64> = HashMap::new();
    let mut frames = FrameReader::files(dir, id);
    for &base in bases.iter().filter(|&&base| base >= state.flushed_lsn) {
        let Ok(header) = frames.header(base) else {
            continue;
        };
        let mut cursor = Cursor::at_start(&header);
        // What cannot be read of the log is for `verify` and the server's recovery to judge.
        while let Ok(Some(())) = cursor.step(&mut frames, |header, frame| {
            for entry in Entries::new(frame, header).map_while(Result::ok) {
                if let EntryKind::Batch(key) = entry.kind
                    && let Ok(batch) = record_batch::parse_header(entry.bytes)
                {
                    first.entry(key).or_insert(batch.base_offset);
                }
            }
        }) {}
    }
    for (key, offset) in first {
        spans.entry(key).or_default().insert((offset, offset));
    }
    let mut absent = Vec::new();
    for (key, list) in spans {
        let mut next: Option<i64> = None;
        for (from, end) in list {
            if let Some(next) = next.filter(|&next| next < from) {
                absent.push(Absent {
                    topic: key.topic,
                    partition: key.partition,
                    first: next,
                    end: from,
                });
            }
            next = Some(next.map_or(end, |next| next.max(end)));
        }
    }
    absent
}
