//! Log and SSTs together against a model in memory: appends, flushes, clean stops and kills in random order; what
//! was durable is read back, whole, in order, by offset and by time.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use super::codec;
use super::maintain::{MaintainConfig, Maintenance};
use super::policy::Policy;
use super::store::Store;
use crate::storage::wal::segment::{list_segments, shard_dir};
use crate::storage::wal::{LogId, Replay};
use crate::storage::{LogReader, PartitionKey, WalConfig, WalShared, WalWriter};
use crate::wire::record_batch::{BatchWriter, Records, parse_header};

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

struct Nothing;
impl Replay for Nothing {
    fn snapshot(&mut self, _: &[u8], _: u32, _: u32) {}
    fn batch(&mut self, _: PartitionKey, _: &[u8]) {}
}

/// A shard as the server runs it, but for its threads.
pub(super) struct Shard {
    dir: TempDir,
    staging: TempDir,
    pub(super) policy: Policy,
    pub(super) open: Option<Open>,
    /// The values of each partition, from its first offset on; `None`: compaction may have dropped it.
    pub(super) model: BTreeMap<PartitionKey, Vec<Vec<u8>>>,
    now_ns: u64,
}

pub(super) struct Open {
    pub(super) wal: WalWriter,
    pub(super) shared: Arc<WalShared>,
    pub(super) store: Arc<Store>,
    pub(super) maintenance: Maintenance,
}

impl Shard {
    pub(super) fn new(policy: Policy) -> Shard {
        let mut shard = Shard {
            dir: tempfile::tempdir().unwrap(),
            staging: tempfile::tempdir_in("/dev/shm").unwrap(),
            policy,
            open: None,
            model: BTreeMap::new(),
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
        let store = Store::open(&self.path(), ID).unwrap();
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
        let policy = self.policy.clone();
        let config = MaintainConfig {
            batch_target: 4096,
            policies: Arc::new(move |_| policy.clone()),
            started: Arc::new(|_, _| {}),
        };
        let maintenance = Maintenance::new(Arc::clone(&store), Arc::clone(&shared), config);
        self.open = Some(Open {
            wal,
            shared,
            store,
            maintenance,
        });
    }

    /// Appends a batch of `records` records and waits until it is durable.
    pub(super) fn append(&mut self, key: PartitionKey, records: usize, size: usize) {
        let values = self.model.entry(key).or_default();
        let base = values.len() as i64;
        let mut bytes = vec![0; 200 + records * (size + 40)];
        let mut writer = BatchWriter::new(&mut bytes, 1000);
        for i in 0..records {
            let value: Vec<u8> = (0..size)
                .map(|j| (base as usize + i + j % 9) as u8)
                .collect();
            writer.push(1000 + base, None, Some(&value)).unwrap();
            values.push(value);
        }
        let len = writer.finish(base);
        self.publish(Some(key), &bytes[..len]);
        self.settle();
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
        open.wal.close().unwrap();
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
    }
}

/// As [`Shard::read`], by any reader.
pub(super) fn records(
    reader: &mut LogReader,
    key: PartitionKey,
    from: i64,
    max: usize,
) -> Vec<(i64, Vec<u8>)> {
    let (mut next, mut out, mut scratch) = (from, Vec::new(), Vec::new());
    loop {
        let mut bytes = Vec::new();
        let outcome = reader.read(key, next, max, &mut bytes).unwrap();
        let mut at = 0;
        while at < bytes.len() {
            let batch = &bytes[at..at + parse_header(&bytes[at..]).unwrap().total_len()];
            for record in Records::new(codec::plain(batch, &mut scratch).unwrap()).unwrap() {
                let record = record.unwrap();
                if record.offset >= next {
                    out.push((record.offset, record.value.unwrap_or_default().to_vec()));
                }
            }
            at += batch.len();
        }
        if outcome.next_offset == next {
            return out;
        }
        next = outcome.next_offset;
    }
}

#[derive(Debug, Clone)]
enum Op {
    Append(u32, usize, usize),
    Step,
    Check,
    Restart(bool),
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (0..5u32, 1..20usize, 0..3000usize).prop_map(|(p, n, s)| Op::Append(p, n, s)),
        4 => Just(Op::Step),
        1 => Just(Op::Check),
        1 => any::<bool>().prop_map(Op::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]
    #[test]
    fn what_is_durable_is_read_whatever_happens(ops in prop::collection::vec(ops(), 1..60)) {
        let mut shard = Shard::new(Policy::default());
        for op in ops {
            match op {
                Op::Append(partition, records, size) => shard.append(key(partition), records, size),
                Op::Step => { shard.step(); }
                Op::Check => shard.check(),
                Op::Restart(clean) => shard.restart(clean),
            }
        }
        shard.check();
        shard.maintain();
        shard.check();
        let files = LogReader::of_files(&shard.path(), ID);
        prop_assert!(files.is_ok());
        let mut files = files.unwrap();
        for (&key, values) in &shard.model {
            let all: Vec<_> = (0..).zip(values.iter().cloned()).collect();
            prop_assert_eq!(records(&mut files, key, 0, 1 << 20), all);
        }
    }
}

/// Sequences tried; TAFFRAIL_CASES for more.
fn cases() -> u32 {
    std::env::var("TAFFRAIL_CASES").map_or(48, |n| n.parse().unwrap())
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
