//! Log and SSTs together against a model in memory: appends, flushes, merges, compaction by key, clean stops and kills
//! between any two steps on the file system, in random order; what was durable is read back, whole, in order, by
//! offset, by time and by key, whether keys are indexed or not.

mod keys;

mod pieces;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use self::keys::check_keys;
use super::codec::{self, Codec};
use super::flush::unix_ms;
use super::maintain::{MaintainConfig, Maintenance};
use super::manifest::Edit;
use super::merge::Merger;
use super::pick::Shape;
use super::policy::{Compaction, Policy};
use super::steps;
use super::store::{Store, View};
use super::{StoreError, StoreMemory};
use crate::memory::budget::{Part, Share};
use crate::storage::wal::segment::{list_segments, shard_dir};
use crate::storage::wal::{LogId, Replay};
use crate::storage::{LogReader, PartitionKey, Pieces, WalConfig, WalShared, WalWriter};
use crate::wire::record_batch::{self, BatchWriter, Record, Records, parse_header};

const STORE: u128 = 42;
const COMMIT: usize = 64 << 10;
pub(super) const ID: LogId = LogId {
    store: STORE,
    shard: 0,
};

pub(super) fn key(partition: u32) -> PartitionKey {
    PartitionKey {
        topic: 1 + partition % 2,
        partition,
    }
}

/// Key and value.
pub(super) type Message = (Option<u8>, Option<Vec<u8>>);

/// Merges of few small files, with few keys in memory.
const KEYS: usize = 3;
const SHAPE: Shape = Shape {
    fan_in: 3,
    tier: 32 << 10,
    merged_max: 600 << 10,
};

struct Nothing;
impl Replay for Nothing {
    fn snapshot(&mut self, _: &[u8], _: u32, _: u32) {}
    fn batch(&mut self, _: PartitionKey, _: &[u8]) {}
}

/// For a list of 16 batches.
const FLUSH_BYTES: u64 = 16 * 80;

/// A shard as the server runs it, but for its threads.
pub(super) struct Shard {
    dir: TempDir,
    staging: TempDir,
    pub(super) policy: Policy,
    /// Topic 2 is compacted by key; a topic that ever was may lack records.
    pub(super) compaction: Option<Compaction>,
    /// Topic 2 has an index of its keys.
    pub(super) indexed: bool,
    loose: bool,
    /// The mergers' clock is so much ahead, in ms.
    pub(super) ahead: i64,
    pub(super) open: Option<Open>,
    /// The values of each partition, from its first offset on.
    pub(super) model: BTreeMap<PartitionKey, Vec<Vec<u8>>>,
    /// Those of topic 2's partitions, where they have keys.
    pub(super) keyed: BTreeMap<PartitionKey, Vec<Message>>,
    now_ns: u64,
}

pub(super) struct Open {
    pub(super) wal: WalWriter,
    pub(super) shared: Arc<WalShared>,
    pub(super) store: Arc<Store>,
    pub(super) maintenance: Maintenance,
    pub(super) merger: Merger,
}

impl Shard {
    pub(super) fn new(policy: Policy) -> Shard {
        let mut shard = Shard {
            dir: tempfile::tempdir().unwrap(),
            staging: tempfile::tempdir_in("/dev/shm").unwrap(),
            policy,
            compaction: None,
            indexed: false,
            loose: false,
            ahead: 0,
            open: None,
            model: BTreeMap::new(),
            keyed: BTreeMap::new(),
            now_ns: 1,
        };
        shard.open();
        shard
    }

    pub(super) fn path(&self) -> std::path::PathBuf {
        shard_dir(self.dir.path(), 0)
    }

    pub(super) fn open(&mut self) {
        fs::create_dir_all(self.path()).unwrap();
        // A segment has more batches than a flush may list at a time.
        let memory = StoreMemory {
            maintenance: Share::alone(Part::Maintenance, FLUSH_BYTES * 4),
            ..StoreMemory::default()
        };
        let store = Store::open_within(&self.path(), ID, memory).unwrap();
        self.open_log(store);
    }

    fn open_log(&mut self, store: Arc<Store>) {
        self.loose |= self.compaction.is_some();
        let config = WalConfig {
            segment_size: 4 * COMMIT as u64,
            prepared_segments: 1,
            staging_size: 8 * COMMIT as u64,
            staging_dir: Some(self.staging.path().to_owned()),
            commit_size: COMMIT,
            linger: Duration::ZERO,
            flushed_lsn: store.view().flushed_lsn,
            ..WalConfig::new(self.dir.path(), STORE)
        };
        let (wal, shared, _) = WalWriter::open(&config, 0, &mut Nothing).unwrap();
        // Keys of the log in several runs, and few of them in memory.
        shared.keys().limit(6 * 65, 2 * 3 * 4096);
        let (policy, compaction, indexed) = (self.policy.clone(), self.compaction, self.indexed);
        let config = MaintainConfig {
            batch_target: 4096,
            policies: Arc::new(move |topic| Policy {
                compaction: compaction.filter(|_| topic == 2),
                indexed: indexed && topic == 2,
                ..policy.clone()
            }),
            started: Arc::new(|_, _| {}),
        };
        let policies = Arc::clone(&config.policies);
        let merger = Merger::new(Arc::clone(&store), policies, 4096, Arc::default());
        let merger = merger.sized(KEYS, SHAPE);
        let maintenance = Maintenance::new(Arc::clone(&store), Arc::clone(&shared), config);
        self.open = Some(Open {
            wal,
            shared,
            store,
            maintenance,
            merger,
        });
    }

    /// Appends a batch of `records` records and waits until it is durable.
    pub(super) fn append(&mut self, key: PartitionKey, records: usize, size: usize) {
        let base = self.model.entry(key).or_default().len();
        let value = |i: usize| -> Vec<u8> {
            let bytes = (0..size).map(|j| (base + i + j % 9) as u8);
            bytes.collect()
        };
        self.append_values(key, (0..records).map(value).collect());
    }

    /// As [`Shard::append`], of these values.
    pub(super) fn append_values(&mut self, key: PartitionKey, new: Vec<Vec<u8>>) {
        let values = self.model.entry(key).or_default();
        let base = values.len() as i64;
        let room: usize = new.iter().map(|value| value.len() + 40).sum();
        let mut bytes = vec![0; 200 + room];
        let mut writer = BatchWriter::new(&mut bytes, 1000);
        for value in new {
            writer.push(1000 + base, None, Some(&value)).unwrap();
            values.push(value);
        }
        let len = writer.finish(base);
        self.publish(Some(key), &bytes[..len]);
        self.settle();
    }

    /// As [`Shard::append`], with keys and tombstones, to a partition of topic 2.
    pub(super) fn append_keyed(&mut self, key: PartitionKey, messages: Vec<Message>) {
        let base = self.keyed.entry(key).or_default().len() as i64;
        let room: usize = messages
            .iter()
            .map(|m| m.1.as_ref().map_or(0, Vec::len))
            .sum();
        let mut bytes = vec![0; 200 + room + messages.len() * 50];
        let mut writer = BatchWriter::new(&mut bytes, 1000);
        for (key, value) in &messages {
            let key = key.map(|key| [key]);
            let key = key.as_ref().map(|key| &key[..]);
            writer.push(1000 + base, key, value.as_deref()).unwrap();
        }
        let len = writer.finish(base);
        self.publish(Some(key), &bytes[..len]);
        self.settle();
        self.keyed.get_mut(&key).unwrap().extend(messages);
    }

    fn publish(&mut self, key: Option<PartitionKey>, bytes: &[u8]) {
        let open = self.open.as_mut().unwrap();
        loop {
            if let Ok(room) = open.wal.reserve(bytes.len()) {
                room[..bytes.len()].copy_from_slice(bytes);
                match key {
                    Some(key) => open.wal.publish(key, bytes.len()),
                    None => open.wal.publish_snapshot(0, 1, bytes.len()),
                };
                break;
            }
            self.now_ns += 1000;
            open.wal.poll(self.now_ns, false);
            // What writes may share the CPU with others that wait.
            std::thread::yield_now();
        }
    }

    fn settle(&mut self) {
        // A new segment begins with the shard's state.
        if self.open.as_ref().unwrap().wal.needs_snapshot() {
            self.publish(None, b"state");
        }
        self.open.as_mut().unwrap().wal.flush().unwrap();
    }

    pub(super) fn step(&mut self) -> bool {
        self.open.as_mut().unwrap().maintenance.step().unwrap()
    }

    pub(super) fn maintain(&mut self) {
        while self.step() {}
    }

    /// A clean stop.
    pub(super) fn stop(&mut self) {
        let open = self.open.take().unwrap();
        drop(open.maintenance);
        drop(open.merger);
        open.wal.close().unwrap();
    }

    pub(super) fn merge(&mut self) -> bool {
        self.try_merge().unwrap()
    }

    pub(super) fn try_merge(&mut self) -> Result<bool, StoreError> {
        let now = unix_ms() + self.ahead;
        self.open.as_mut().unwrap().merger.step_at(now)
    }

    /// Kills the process after `steps` steps of flushing and merging; the next start, too, where steps are left.
    fn crash(&mut self, steps: u32, merge_first: bool) {
        steps::allow(Some(steps));
        for turn in 0.. {
            let merge = (turn % 2 == 0) == merge_first;
            let open = self.open.as_mut().unwrap();
            let result = match merge {
                true => self.try_merge(),
                false => open.maintenance.step(),
            };
            if result.is_err() || steps::is_dead() || (turn > 6 && matches!(result, Ok(false))) {
                break;
            }
        }
        let open = self.open.take().unwrap();
        drop((
            open.maintenance,
            open.merger,
            open.wal,
            open.store,
            open.shared,
        ));
        if let Ok(store) = Store::open(&self.path(), ID) {
            drop(store);
        }
        steps::allow(None);
        self.open();
    }

    /// A clean stop, or what a kill leaves; and a start.
    pub(super) fn restart(&mut self, clean: bool) {
        let open = self.open.take().unwrap();
        drop(open.maintenance);
        match clean {
            true => open.wal.close().unwrap(),
            false => drop(open.wal),
        }
        self.open();
    }

    pub(super) fn reader(&self) -> LogReader {
        let open = self.open.as_ref().unwrap();
        LogReader::with_store(Arc::clone(&open.shared), Arc::clone(&open.store))
    }

    /// All records of a partition from `from` on, as (offset, value).
    pub(super) fn read(&self, key: PartitionKey, from: i64, max: usize) -> Vec<(i64, Vec<u8>)> {
        records(&mut self.reader(), key, from, max)
    }

    pub(super) fn check(&self) {
        for (&key, values) in &self.model {
            let all: Vec<_> = (0..).zip(values.iter().cloned()).collect();
            assert_eq!(
                self.reader().bounds(key).unwrap(),
                (0, values.len() as i64),
                "{key:?}"
            );
            assert_eq!(self.read(key, 0, 1 << 30), all, "{key:?}");
            assert_eq!(self.read(key, 0, 1), all, "{key:?}");
            let middle = values.len() / 2;
            assert_eq!(
                self.read(key, middle as i64, 5000),
                all[middle..],
                "{key:?}"
            );
            let first = self.reader().offset_for_time(key, 0).unwrap();
            assert_eq!(first, (!values.is_empty()).then_some(0));
        }
        for (&key, messages) in &self.keyed {
            let bounds = (0, messages.len() as i64);
            assert_eq!(self.reader().bounds(key).unwrap(), bounds, "{key:?}");
            // However far back a reader begins, it sees what counts. What is still in the log may be seen, too.
            for (from, max) in [(0, 1 << 30), (0, 1), (bounds.1 / 2, 5000)] {
                let read = self.messages(key, from, max);
                self.check_keyed(messages, from, &read);
            }
            let first = self.reader().offset_for_time(key, 0).unwrap();
            let read = self.messages(key, first.unwrap(), 1 << 20);
            self.check_keyed(messages, 0, &read);
            check_keys(&mut self.reader(), key, &self.messages(key, 0, 1 << 30));
        }
    }

    /// What is read of a partition is what was written, but for what a compacted topic may lose.
    fn check_keyed(&self, written: &[Message], from: i64, read: &[(i64, Message)]) {
        assert!(read.is_sorted_by(|a, b| a.0 < b.0));
        let mut last: BTreeMap<u8, (i64, bool)> = BTreeMap::new();
        for (offset, (key, value)) in (0..).zip(written) {
            key.map(|key| last.insert(key, (offset, value.is_none())));
        }
        let there: BTreeMap<i64, &Message> = read.iter().map(|(at, m)| (*at, m)).collect();
        let waits = self.compaction.is_some_and(|c| c.min_lag_ms > self.ahead);
        for (offset, message) in (0..).zip(written).skip(from as usize) {
            match there.get(&offset) {
                Some(read) => assert_eq!(*read, message, "offset {offset}"),
                None => {
                    assert!(self.loose && !waits, "offset {offset} is gone");
                    let key = message.0.expect("without a key a record stays");
                    let (newest, tombstone) = last[&key];
                    let kept = self.compaction.map_or(0, |c| c.delete_retention_ms);
                    let superseded = newest > offset;
                    let expired = tombstone && kept <= self.ahead;
                    assert!(
                        superseded || expired,
                        "offset {offset}: {message:?} is gone"
                    );
                    assert!(offset + 1 < written.len() as i64, "the last record is gone");
                }
            }
        }
        // Who applies one after the other ends up with the same.
        let mut state: BTreeMap<u8, &Option<Vec<u8>>> = BTreeMap::new();
        for (_, (key, value)) in read {
            key.map(|key| state.insert(key, value));
        }
        last.retain(|_, (offset, _)| *offset >= from);
        for (key, (offset, tombstone)) in last {
            match state.get(&key) {
                Some(value) => assert_eq!(**value, written[offset as usize].1, "key {key}"),
                None => assert!(tombstone, "key {key}"),
            }
        }
    }

    pub(super) fn messages(&self, key: PartitionKey, from: i64, max: usize) -> Vec<(i64, Message)> {
        messages(&mut self.reader(), key, from, max)
    }
}

/// As [`Shard::messages`], by any reader.
fn messages(
    reader: &mut LogReader,
    key: PartitionKey,
    from: i64,
    max: usize,
) -> Vec<(i64, Message)> {
    let mut out = Vec::new();
    each(reader, key, from, max, |record| {
        let key = record.key.map(|key| key[0]);
        out.push((record.offset, (key, record.value.map(<[u8]>::to_vec))));
    });
    out
}

/// As [`Shard::read`], by any reader.
pub(super) fn records(
    reader: &mut LogReader,
    key: PartitionKey,
    from: i64,
    max: usize,
) -> Vec<(i64, Vec<u8>)> {
    let mut out = Vec::new();
    each(reader, key, from, max, |record| {
        out.push((record.offset, record.value.unwrap_or_default().to_vec()));
    });
    out
}

fn each(
    reader: &mut LogReader,
    key: PartitionKey,
    from: i64,
    max: usize,
    mut take: impl FnMut(&Record),
) {
    let (mut next, mut scratch) = (from, Vec::new());
    loop {
        let mut bytes = Vec::new();
        let outcome = reader.read(key, next, max, &mut bytes).unwrap();
        let mut at = 0;
        while at < bytes.len() {
            let batch = &bytes[at..at + parse_header(&bytes[at..]).unwrap().total_len()];
            for record in Records::new(codec::plain(batch, &mut scratch).unwrap()).unwrap() {
                let record = record.unwrap();
                assert!(record.timestamp >= 1000);
                if record.offset >= next {
                    take(&record);
                }
            }
            at += batch.len();
        }
        if outcome.next_offset == next {
            return;
        }
        next = outcome.next_offset;
    }
}

#[derive(Debug, Clone)]
enum Op {
    Append(u32, usize, usize),
    /// Messages with keys; how large their values are.
    Keyed(u32, Vec<(Option<u8>, bool)>, usize),
    /// So many bytes that a segment is full, and its flush.
    Fill(u32, u8),
    Step,
    Merge,
    Check,
    Restart(bool),
    /// The process dies after so many steps on the file system.
    Crash(u32, bool),
    /// Time goes on, in minutes.
    Later(i64),
    /// Somebody reads for long.
    Hold,
    /// The topic is compacted from now on, or no longer.
    Flip,
    /// Its keys are indexed from now on, or no longer.
    Index,
}

fn ops() -> impl Strategy<Value = Op> {
    let keyed = (
        prop::option::weighted(0.95, 0..8u8),
        prop::bool::weighted(0.25),
    );
    let messages = prop::collection::vec(keyed, 1..12);
    prop_oneof![
        6 => (0..3u32, 1..20usize, 0..3000usize).prop_map(|(p, n, s)| Op::Append(2 * p, n, s)),
        8 => (0..3u32, messages, 0..3000usize).prop_map(|(p, m, s)| Op::Keyed(2 * p + 1, m, s)),
        5 => (0..6u32, any::<u8>()).prop_map(|(p, n)| Op::Fill(p, n)),
        4 => Just(Op::Step),
        4 => Just(Op::Merge),
        1 => Just(Op::Check),
        1 => any::<bool>().prop_map(Op::Restart),
        3 => (0..40u32, any::<bool>()).prop_map(|(n, first)| Op::Crash(n, first)),
        1 => (1..90i64).prop_map(Op::Later),
        1 => Just(Op::Hold),
        1 => Just(Op::Flip),
        1 => Just(Op::Index),
    ]
}

fn compactions() -> impl Strategy<Value = Option<Compaction>> {
    const HOUR: i64 = 3_600_000;
    let lag = prop_oneof![3 => Just(0), 1 => Just(HOUR)];
    let compaction = (prop_oneof![Just(0), Just(HOUR)], lag, 0..=10u32);
    let compaction = compaction.prop_map(|(retention, min_lag_ms, ratio)| Compaction {
        delete_retention_ms: retention,
        min_lag_ms,
        dirty_ratio: f64::from(ratio) / 10.0,
    });
    prop::option::weighted(0.9, compaction)
}

fn codecs() -> impl Strategy<Value = Codec> {
    prop_oneof![2 => Just(Codec::None), 2 => Just(Codec::Lz4), 1 => Just(Codec::default())]
}

fn value(size: usize, n: usize) -> Vec<u8> {
    (0..size).map(|i| (i % 11 + n) as u8).collect()
}

/// What somebody reads for long: files, and answers with what they held when they were read.
#[derive(Default)]
struct Held {
    view: Option<Arc<View>>,
    answers: Vec<(Pieces, Vec<u8>)>,
}

impl Held {
    fn take(&mut self, shard: &Shard) {
        self.view = Some(shard.open.as_ref().unwrap().store.view());
        for &key in shard.model.keys().chain(shard.keyed.keys()) {
            let mut reader = shard.reader();
            let (mut from, end) = reader.bounds(key).unwrap();
            while from < end {
                let mut pieces = Pieces::default();
                let read = reader
                    .read_pieces(key, from, 64 << 10, &mut pieces)
                    .unwrap();
                let mut bytes = Vec::new();
                pieces.copy_to(&mut bytes);
                self.answers.push((pieces, bytes));
                if read.next_offset == from {
                    break;
                }
                from = read.next_offset;
            }
        }
    }

    /// Lets go, when the answers are what they were.
    fn end(&mut self) {
        self.view = None;
        for (pieces, bytes) in self.answers.drain(..) {
            assert_eq!(pieces.into_list().concat(), bytes);
        }
    }
}

fn apply(shard: &mut Shard, op: Op, held: &mut Held) {
    match op {
        Op::Append(partition, records, size) => shard.append(key(partition), records, size),
        Op::Keyed(partition, keys, size) => {
            let messages = keys.into_iter().enumerate();
            let messages = messages
                .map(|(n, (key, none))| (key, (!none).then(|| value(size, n))))
                .collect();
            shard.append_keyed(key(partition), messages);
        }
        Op::Fill(partition, n) => {
            let files = |shard: &Shard| shard.open.as_ref().unwrap().store.view().flushed_lsn;
            let before = files(shard);
            while files(shard) == before {
                match partition % 2 {
                    0 => shard.append(key(partition), 18, 3000),
                    _ => {
                        let messages = (0..18).map(|i| {
                            let key = n.wrapping_mul(31).wrapping_add(i) % 24;
                            (Some(key), Some(value(3000, usize::from(i))))
                        });
                        shard.append_keyed(key(partition), messages.collect());
                    }
                }
                shard.step();
            }
        }
        Op::Step => drop(shard.step()),
        Op::Merge => drop(shard.merge()),
        Op::Check => shard.check(),
        Op::Restart(clean) => {
            held.end();
            shard.restart(clean);
        }
        Op::Crash(steps, merge_first) => {
            held.end();
            shard.crash(steps, merge_first);
            shard.check();
        }
        Op::Later(minutes) => shard.ahead += minutes * 60_000,
        Op::Hold => {
            held.end();
            held.take(shard);
        }
        Op::Flip => {
            shard.compaction = match shard.compaction {
                Some(_) => None,
                // What was dropped under other settings is not held against these.
                None => Some(Compaction {
                    delete_retention_ms: 0,
                    ..Compaction::default()
                }),
            };
            held.end();
            shard.restart(true);
        }
        Op::Index => {
            shard.indexed = !shard.indexed;
            held.end();
            shard.restart(true);
        }
    }
    for file in held.view.iter().flat_map(|view| &view.files) {
        assert!(file.path().exists(), "a file that somebody reads is gone");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]
    #[test]
    fn what_is_durable_is_read_whatever_happens(
        codec in codecs(),
        compaction in compactions(),
        indexed in prop::bool::weighted(0.8),
        ops in prop::collection::vec(ops(), 1..60),
    ) {
        let mut shard = Shard::new(Policy { codec, ..Policy::default() });
        shard.compaction = compaction;
        shard.indexed = indexed;
        shard.restart(true);
        let mut held = Held::default();
        for op in ops {
            apply(&mut shard, op, &mut held);
        }
        shard.check();
        shard.maintain();
        while shard.merge() {}
        shard.check();
        held.end();
        // Nothing lies about that the store does not name.
        let view = shard.open.as_ref().unwrap().store.view();
        let named: Vec<_> = view.files.iter().map(|file| file.meta.number).collect();
        let mut found = super::store::list_files(&shard.path()).unwrap();
        found.retain(|number| !named.contains(number));
        prop_assert_eq!(found, Vec::<u64>::new());
        for file in &view.files {
            let report = file.reader().unwrap().verify(|_| {});
            prop_assert!(report.findings.is_empty(), "{:?}", report.findings);
        }
        let files = LogReader::of_files(&shard.path(), ID);
        prop_assert!(files.is_ok());
        let mut files = files.unwrap();
        for (&key, values) in &shard.model {
            let all: Vec<_> = (0..).zip(values.iter().cloned()).collect();
            prop_assert_eq!(records(&mut files, key, 0, 1 << 20), all);
        }
        for &key in shard.keyed.keys() {
            let there = messages(&mut files, key, 0, 1 << 20);
            check_keys(&mut files, key, &there);
        }
        // By now every file has the index that the topic is to have.
        for (key, extents) in view.partitions() {
            for extent in extents {
                prop_assert!(extent.keyed || !shard.indexed || key.topic != 2);
            }
        }
    }
}

/// Sequences tried; TAFFRAIL_CASES for more.
fn cases() -> u32 {
    std::env::var("TAFFRAIL_CASES").map_or(48, |n| n.parse().unwrap())
}

#[test]
fn a_segment_that_has_left_the_log_is_not_read_while_the_walk_stands_in_it() {
    let mut shard = Shard::new(Policy::default());
    shard.append(key(0), 10, 100);
    let shared = Arc::clone(&shard.open.as_ref().unwrap().shared);
    let mut reader = LogReader::live(Arc::clone(&shared));
    assert_eq!(reader.bounds(key(0)).unwrap(), (0, 10));
    assert!(reader.offset_for_time(key(0), 0).unwrap().is_some());
    // Whoever looks now must find the same as when the walk has left the segment: there is no sign of that.
    let (index, end) = (shared.index(), 4 * COMMIT as u64);
    assert_eq!(index.release(end), 0);
    for _ in 0..2 {
        assert_eq!(index.bounds(key(0)), (0, 0));
        assert_eq!(reader.bounds(key(0)).unwrap(), (0, 0));
        assert_eq!(reader.message(key(0), 3).unwrap(), None);
        assert_eq!(reader.offset_for_time(key(0), 0).unwrap(), None);
        shard.append(key(1), 10, 100);
    }
    assert_eq!(reader.bounds(key(1)).unwrap(), (0, 0));
}

#[test]
fn flushed_segments_are_used_again_and_the_log_stays_short() {
    let mut shard = Shard::new(Policy::default());
    for i in 0..400 {
        shard.append(key(i % 3), 10, 1000);
        shard.maintain();
    }
    let open = shard.open.as_ref().unwrap();
    assert!(open.store.view().files.len() > 10);
    // The one written to, the one ready, and what recovery may still need.
    assert!(list_segments(&shard.path()).unwrap().len() <= 4);
    let written = open.shared.committed_bytes.get();
    let kept: u64 = open.store.view().files.iter().map(|f| f.meta.bytes).sum();
    assert!(
        kept * 3 < written,
        "{kept} of {written} bytes: values like these compress"
    );
    shard.check();
    shard.restart(false);
    shard.check();
}

#[test]
fn a_reader_beside_flushes_never_misses_a_record() {
    let mut shard = Shard::new(Policy::default());
    let open = shard.open.as_ref().unwrap();
    let (shared, store) = (Arc::clone(&open.shared), Arc::clone(&open.store));
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let follower = std::thread::spawn({
        let done = Arc::clone(&done);
        move || {
            let mut rounds = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let mut reader = LogReader::with_store(Arc::clone(&shared), Arc::clone(&store));
                let read = records(&mut reader, key(0), 0, 1 << 16);
                let offsets: Vec<i64> = read.iter().map(|r| r.0).collect();
                assert!(
                    offsets.iter().copied().eq(0..offsets.len() as i64),
                    "{offsets:?}"
                );
                rounds += 1;
            }
            rounds
        }
    });
    for _ in 0..300 {
        shard.append(key(0), 5, 1500);
        shard.step();
    }
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(follower.join().unwrap() > 0);
    shard.check();
}

#[test]
fn a_lost_file_or_edit_is_refused_and_named() {
    let mut shard = Shard::new(Policy::default());
    while shard.open.as_ref().unwrap().store.view().files.len() < 2 {
        shard.append(key(0), 10, 2000);
        shard.maintain();
    }
    let path = shard.path();
    // The last flushed segment goes once the index, a thread, has passed it.
    let flushed = shard.open.as_ref().unwrap().store.view().flushed_lsn;
    while list_segments(&path).unwrap()[0] < flushed {
        shard.maintain();
        std::thread::sleep(Duration::from_millis(1));
    }
    let open = shard.open.take().unwrap();
    let sst = open.store.view().files[0].path().to_owned();
    drop(open.maintenance);
    open.wal.close().unwrap();
    drop((open.store, open.shared));
    let away = sst.with_extension("away");
    fs::rename(&sst, &away).unwrap();
    let error = Store::open(&path, ID).err().unwrap().to_string();
    assert!(error.contains(sst.to_str().unwrap()), "{error}");
    fs::rename(&away, &sst).unwrap();
    // The last edit, torn: its segment is gone already, so this must not pass as a shorter store.
    let manifest = super::manifest::manifest_path(&path, 1);
    let bytes = fs::read(&manifest).unwrap();
    fs::write(&manifest, &bytes[..bytes.len() - 1]).unwrap();
    let refused = Store::open_read_only(&path, ID)
        .err()
        .map(|e| e.to_string());
    assert!(refused.is_some_and(|e| e.contains("repair")));
    assert!(sst.exists());
}

#[test]
fn retention_drops_whole_files_and_moves_the_start() {
    let mut shard = Shard::new(Policy::default());
    let fill = |shard: &mut Shard, files: usize| {
        while shard.open.as_ref().unwrap().store.view().files.len() < files {
            shard.append(key(0), 10, 2000);
            shard.append(key(1), 1, 100);
            shard.maintain();
        }
    };
    fill(&mut shard, 5);
    let view = shard.open.as_ref().unwrap().store.view();
    let keep = view.extents(key(0))[3..].iter().map(|e| e.bytes).sum();
    let start = view.extents(key(0))[3].first;
    let paths: Vec<_> = view.files.iter().map(|f| f.path().to_owned()).collect();
    drop(view);
    // By bytes: only the one partition has so many.
    shard.policy.retention_bytes = Some(keep);
    shard.restart(false);
    shard.maintain();
    let end = shard.model[&key(0)].len() as i64;
    assert_eq!(shard.reader().bounds(key(0)).unwrap(), (start, end));
    assert_eq!(shard.reader().bounds(key(1)).unwrap().0, 0);
    assert_eq!(shard.read(key(0), start, 1 << 20).len() as i64, end - start);
    assert!(
        shard
            .reader()
            .read(key(0), start - 1, 1, &mut Vec::new())
            .is_err()
    );
    assert_eq!(
        shard.reader().offset_for_time(key(0), 0).unwrap(),
        Some(start)
    );
    // The other partition needs all files.
    assert!(paths.iter().all(|path| path.exists()));
    // By age: everything in SSTs arrived some milliseconds ago.
    std::thread::sleep(Duration::from_millis(5));
    shard.policy.retention_ms = Some(1);
    shard.restart(true);
    shard.maintain();
    let (start, end) = shard.reader().bounds(key(1)).unwrap();
    let values = &shard.model[&key(1)];
    assert_eq!(end, values.len() as i64);
    let rest: Vec<_> = (start..)
        .zip(values[start as usize..].iter().cloned())
        .collect();
    assert_eq!(shard.read(key(1), start, 1 << 20), rest);
    assert!(paths.iter().all(|path| !path.exists()));
    shard.restart(false);
    assert_eq!(shard.reader().bounds(key(1)).unwrap(), (start, end));
    // What follows is as before.
    shard.append(key(1), 2, 10);
    assert_eq!(shard.read(key(1), end, 1 << 20).len(), 2);
}

#[test]
fn a_damaged_block_is_noted_and_the_rest_is_read() {
    let mut shard = Shard::new(Policy::default());
    while shard.open.as_ref().unwrap().store.view().files.len() < 3 {
        shard.append(key(0), 10, 2000);
        shard.append(key(1), 5, 300);
        shard.maintain();
    }
    let view = shard.open.as_ref().unwrap().store.view();
    let path = view.files[1].path().to_owned();
    let (first, end) = (view.extents(key(1))[1].first, view.extents(key(1))[1].end);
    drop(view);
    let open = shard.open.take().unwrap();
    drop(open.maintenance);
    open.wal.close().unwrap();
    drop((open.store, open.shared));
    // The first byte of messages: of partition 0 or 1, whose topics differ.
    let mut bytes = fs::read(&path).unwrap();
    bytes[super::sst::format::HEADER + 70] ^= 4;
    fs::write(&path, &bytes).unwrap();
    shard.open();
    // Topic 1 comes first, that is partition 0.
    let mut reader = shard.reader();
    let error = reader
        .read(key(0), 0, 1 << 30, &mut Vec::new())
        .map(|o| o.next_offset);
    let damaged = error.unwrap();
    let error = reader
        .read(key(0), damaged, 1 << 20, &mut Vec::new())
        .unwrap_err();
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
    let of_other = shard.read(key(1), first, 1 << 20);
    assert!(of_other.iter().any(|(offset, _)| *offset == end - 1));
    shard.maintain();
    let state = super::manifest::load(&shard.path(), ID)
        .unwrap()
        .unwrap()
        .state;
    assert_eq!(state.quarantined.len(), 1);
    shard.restart(false);
    let view = shard.open.as_ref().unwrap().store.view();
    assert_eq!(
        view.files
            .iter()
            .filter(|file| file.is_quarantined())
            .count(),
        1
    );
}

#[test]
fn single_messages_are_found_whether_kept_or_not() {
    let mut shard = Shard::new(Policy::default());
    while shard.open.as_ref().unwrap().store.view().files.len() < 3 {
        shard.append(key(0), 10, 2000);
        shard.append(key(1), 3, 100);
        shard.maintain();
    }
    let store = Arc::clone(&shard.open.as_ref().unwrap().store);
    // Read once, read again and kept, read from the cache.
    for _ in 0..3 {
        for partition in [0, 1] {
            let (first, end) = store.bounds(key(partition)).unwrap();
            assert_eq!(first, 0);
            for offset in 0..end {
                let found = store
                    .record(key(partition), offset, |record| {
                        (record.offset, record.value.map(<[u8]>::to_vec))
                    })
                    .unwrap();
                let value = shard.model[&key(partition)][offset as usize].clone();
                assert_eq!(found, Some((offset, Some(value))));
            }
            for outside in [-1, end, i64::MAX] {
                assert_eq!(store.record(key(partition), outside, |_| ()).unwrap(), None);
            }
        }
        assert_eq!(store.record(key(2), 0, |_| ()).unwrap(), None);
    }
    assert!(store.cache.stats().hits > 0);
    // Before the partition's start there is nothing any more.
    store.commit(&Edit::Trim(vec![(key(0), 5)])).unwrap();
    assert_eq!(store.record(key(0), 4, |_| ()).unwrap(), None);
    assert_eq!(store.record(key(0), 5, |r| r.offset).unwrap(), Some(5));
}

#[test]
fn a_damaged_block_is_no_message() {
    let mut shard = Shard::new(Policy::default());
    while shard.open.as_ref().unwrap().store.view().files.is_empty() {
        shard.append(key(0), 10, 2000);
        shard.maintain();
    }
    let path = {
        let view = shard.open.as_ref().unwrap().store.view();
        view.files[0].path().to_owned()
    };
    shard.open = None;
    let mut bytes = fs::read(&path).unwrap();
    bytes[1000] ^= 1;
    fs::write(&path, bytes).unwrap();
    let store = Store::open_read_only(path.parent().unwrap(), ID).unwrap();
    assert!(store.record(key(0), 0, |_| ()).is_err());
    assert!(store.view().files[0].is_quarantined());
    let last = store.bounds(key(0)).unwrap().1 - 1;
    assert_eq!(
        store.record(key(0), last, |r| r.offset).unwrap(),
        Some(last)
    );
}
