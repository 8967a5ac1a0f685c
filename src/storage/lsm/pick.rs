//! Which SSTs are merged next.
//!
//! Files are of a *kind*: those of compacted topics and those of all others are kept apart, so that a large topic is not
//! rewritten because a small one beside it is compacted. Files of a kind whose ranges of the log overlap are one
//! *unit*; units follow each other as the log does, and merging neighbours keeps each partition's files in the order of its
//! offsets. Units with a damaged file, or with a file of both kinds, are not merged with others.
//!
//! Merging is size-tiered (as Cassandra's and RocksDB's universal compaction): a byte is written again once a tier, so
//! about three times until it is in a file of [`MERGED_MAX`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::manifest::{COMPACTED, NEVER_COMPACTED};
use super::policy::Known;
use super::sst::SstError;
use super::store::{Store, StoreFile, View};
use crate::storage::PartitionKey;

/// Fewest files that size-tiered merging takes at once: more, and each byte is rewritten less often; fewer, and a partition
/// lies in fewer files.
pub const FAN_IN: usize = 8;
/// Most files of one merge: what it holds open and walks side by side stays small.
pub const FAN_MAX: usize = 32;
/// Bytes of the files of the lowest tier; each tier above takes files [`FAN_IN`] times as large.
pub const TIER: u64 = 16 << 20;
/// Bytes of a merged file, at most: retention rewrites and drops files, and a merge needs as much room as its files take.
pub const MERGED_MAX: u64 = 2 << 30;
/// A file is rewritten without what nobody can read any more when that is one part in so many of it.
const GARBAGE_PART: u64 = 2;
/// Partitions that are due for compaction have to be one part in so many of what is rewritten with them.
const DUE_PART: u64 = 4;

/// How much is merged at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) fan_in: usize,
    pub(super) tier: u64,
    pub(super) merged_max: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Shape {
            fan_in: FAN_IN,
            tier: TIER,
            merged_max: MERGED_MAX,
        }
    }
}

/// A merge to be done.
pub(super) struct Job {
    /// Neighbours, oldest first.
    pub(super) inputs: Vec<Arc<StoreFile>>,
    /// For the log: why.
    pub(super) why: &'static str,
}

/// Kinds of a file: bits.
const LOG: u8 = 1;
const COMPACT: u8 = 2;

#[derive(Clone, Copy, Default)]
struct About {
    kinds: u8,
    /// Bytes that are before their partition's start, or a deleted topic's.
    garbage: u64,
    /// It lacks the keys of a topic that has an index by now.
    lacks_keys: bool,
}

/// Files of a kind that are merged together or not at all.
struct Unit<'a> {
    files: Vec<&'a Arc<StoreFile>>,
    lsn_end: u64,
    bytes: u64,
    /// Not to be merged with others.
    barrier: bool,
}

/// The most useful merge; `None`: there is nothing to do. Cost: a pass over all extents.
pub(super) fn pick(
    store: &Store,
    view: &View,
    policies: &mut Known,
    shape: Shape,
    now_ms: i64,
) -> Result<Option<Job>, SstError> {
    let about = look(store, view, policies)?;
    let of = |file: &StoreFile| about.get(&file.meta.number).copied().unwrap_or_default();
    let job = |files: &[&Arc<StoreFile>], why| {
        let inputs = files.iter().map(|&file| Arc::clone(file)).collect();
        Ok(Some(Job { inputs, why }))
    };
    let whole = || view.files.iter().filter(|file| !file.is_quarantined());
    if let Some(file) = whole().find(|file| of(file).kinds == LOG | COMPACT) {
        return job(&[file], "a topic's cleanup.policy changed");
    }
    let compact = units(view, COMPACT, &of);
    for stretch in compact.split(|unit| unit.barrier) {
        if is_due(view, policies, stretch, now_ms) {
            let files: Vec<_> = stretch.iter().flat_map(|unit| unit.files.clone()).collect();
            return job(&files, "compaction by key");
        }
    }
    let log = units(view, LOG, &of);
    for kind in [&log, &compact] {
        if let Some(units) = neighbours(kind, shape) {
            let files: Vec<_> = units.iter().flat_map(|unit| unit.files.clone()).collect();
            return job(&files, "small files");
        }
    }
    if let Some(file) = whole().find(|file| of(file).lacks_keys) {
        return job(&[file], "a topic got an index of its keys");
    }
    let mut wasteful = whole().filter(|file| {
        let about = of(file);
        about.kinds != 0
            && about.garbage > 0
            && about.garbage >= file.meta.data_bytes / GARBAGE_PART
    });
    match wasteful.next() {
        Some(file) => job(&[file], "expired messages"),
        None => Ok(None),
    }
}

fn look(store: &Store, view: &View, policies: &mut Known) -> Result<HashMap<u64, About>, SstError> {
    let mut about: HashMap<u64, About> = HashMap::new();
    for (key, extents) in view.partitions() {
        let policy = policies.of(key.topic);
        let (deleted, compact) = (policy.deleted, policy.compaction.is_some());
        let indexed = policy.indexed;
        let start = view.start(key);
        for extent in extents {
            let file = about.entry(extent.file.meta.number).or_default();
            if deleted {
                file.garbage += extent.bytes;
                continue;
            }
            file.kinds |= if compact { COMPACT } else { LOG };
            file.lacks_keys |= indexed && !extent.keyed && extent.end > start;
            if extent.end <= start {
                file.garbage += extent.bytes;
            } else if extent.first < start && !extent.file.is_quarantined() {
                let reader = store.reader(&extent.file);
                match reader.and_then(|reader| reader.bytes_before(key, start)) {
                    Ok(before) => file.garbage += before,
                    Err(error @ SstError::Io { .. }) => return Err(error),
                    Err(error) => store.damaged(&extent.file, &error),
                }
            }
        }
    }
    Ok(about)
}

fn units<'a>(view: &'a View, kind: u8, of: &dyn Fn(&StoreFile) -> About) -> Vec<Unit<'a>> {
    let mut units: Vec<Unit> = Vec::new();
    for file in &view.files {
        let kinds = of(file).kinds;
        let damaged = file.is_quarantined();
        // What is in a file that cannot be read is not known.
        if kinds & kind == 0 && !damaged {
            continue;
        }
        let barrier = damaged || kinds != kind;
        match units.last_mut() {
            Some(unit) if file.meta.lsn_start < unit.lsn_end => {
                unit.files.push(file);
                unit.lsn_end = unit.lsn_end.max(file.meta.lsn_end);
                unit.bytes += file.meta.bytes;
                unit.barrier |= barrier;
            }
            _ => units.push(Unit {
                files: vec![file],
                lsn_end: file.meta.lsn_end,
                bytes: file.meta.bytes,
                barrier,
            }),
        }
    }
    units
}

/// Neighbouring units of similar size, of the lowest tier that has enough of them. None of them is more than half of the
/// whole, so that a large one is not rewritten for a little that is new.
fn neighbours<'a, 'b>(units: &'b [Unit<'a>], shape: Shape) -> Option<&'b [Unit<'a>]> {
    let mut limit = shape.tier;
    while limit < shape.merged_max {
        for stretch in units.split(|unit| unit.barrier || unit.bytes >= limit) {
            for from in 0..stretch.len().saturating_sub(shape.fan_in - 1) {
                let (mut sum, mut largest, mut files) = (0, 0, 0);
                let mut found = None;
                for (count, unit) in (1..).zip(&stretch[from..]) {
                    sum += unit.bytes;
                    largest = largest.max(unit.bytes);
                    files += unit.files.len();
                    if sum > shape.merged_max || files > FAN_MAX {
                        break;
                    }
                    if count >= shape.fan_in && largest * 2 <= sum {
                        found = Some(&stretch[from..from + count]);
                    }
                }
                if found.is_some() {
                    return found;
                }
            }
        }
        limit *= shape.fan_in as u64;
    }
    None
}

/// Whether compacting all of these units gains enough: enough is new in them since their oldest was compacted, or the
/// time has come that something in it waited for.
fn is_due(view: &View, policies: &mut Known, units: &[Unit], now_ms: i64) -> bool {
    let Some((oldest, newer)) = units.split_first() else {
        return false;
    };
    let clean = oldest
        .files
        .iter()
        .all(|file| file.meta.due != NEVER_COMPACTED);
    let waited = oldest.files.iter().any(|file| {
        let due = file.meta.due;
        due != NEVER_COMPACTED && due != COMPACTED && i64::from(due) <= now_ms / 1000
    });
    if waited {
        return true;
    }
    let dirty: HashSet<u64> = newer
        .iter()
        .chain(if clean {
            &[]
        } else {
            std::slice::from_ref(oldest)
        })
        .flat_map(|unit| unit.files.iter().map(|file| file.meta.number))
        .collect();
    if dirty.is_empty() {
        return false;
    }
    let all: HashSet<u64> = units
        .iter()
        .flat_map(|unit| unit.files.iter().map(|file| file.meta.number))
        .collect();
    let (mut due, mut sum) = (0, 0);
    for (key, extents) in view.partitions() {
        let Some(compaction) = policies.of(key.topic).compaction else {
            continue;
        };
        let (bytes, new) = shares(
            view,
            key,
            extents,
            &all,
            &dirty,
            now_ms - compaction.min_lag_ms,
        );
        sum += bytes;
        if new > 0 && new as f64 >= compaction.dirty_ratio * bytes as f64 {
            due += bytes;
        }
    }
    due > 0 && due >= sum / DUE_PART
}

/// Bytes of a partition in files of `all`, and those of them that are new and old enough.
fn shares(
    view: &View,
    key: PartitionKey,
    extents: &[super::store::Extent],
    all: &HashSet<u64>,
    dirty: &HashSet<u64>,
    old: i64,
) -> (u64, u64) {
    let (mut bytes, mut new) = (0, 0);
    let start = view.start(key);
    for extent in extents.iter().filter(|extent| extent.end > start) {
        let number = extent.file.meta.number;
        if all.contains(&number) {
            bytes += extent.bytes;
            if dirty.contains(&number) && extent.max_time <= old {
                new += extent.bytes;
            }
        }
    }
    (bytes, new)
}
