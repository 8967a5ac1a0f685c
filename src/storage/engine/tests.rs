//! The engine against a model in memory, with and without threads of its own, closed and killed; readers beside it; what it
//! refuses.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::*;
use crate::storage::small_disk::on_small_disk;
use crate::storage::wal::segment::list_segments;
use crate::storage::{Catalog, TopicSpec};
use crate::wire::record_batch::{Records, parse_header};

const PARTITIONS: u32 = 3;

fn key(partition: u32) -> PartitionKey {
    PartitionKey {
        topic: 1,
        partition,
    }
}

struct Place {
    dir: tempfile::TempDir,
    staging: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place {
            dir: tempfile::tempdir().unwrap(),
            staging: tempfile::tempdir_in("/dev/shm").unwrap(),
        }
    }

    /// Small segments, keys indexed, no threads.
    fn config(&self) -> EngineConfig {
        self.with(Policy {
            indexed: true,
            ..Policy::default()
        })
    }

    fn with(&self, policy: Policy) -> EngineConfig {
        let mut config = EngineConfig::new(self.dir.path(), 5, policy);
        config.wal = WalConfig {
            segment_size: 256 << 10,
            staging_size: 512 << 10,
            commit_size: 64 << 10,
            prepared_segments: 1,
            staging_dir: Some(self.staging.path().to_owned()),
            ..config.wal
        };
        config.maintain.batch_target = 4096;
        config.threads = false;
        config
    }

    fn open(&self) -> Engine {
        Engine::open(self.config()).unwrap()
    }

    fn segments(&self) -> usize {
        list_segments(&shard_dir(self.dir.path(), SHARD))
            .unwrap()
            .len()
    }
}

fn record(value: &[u8]) -> NewRecord<'_> {
    NewRecord {
        timestamp: 1,
        key: None,
        value: Some(value),
    }
}

type Written = Vec<(Option<Vec<u8>>, Option<Vec<u8>>)>;

#[derive(Debug, Clone)]
enum Op {
    Write(u32, Written),
    Sync,
    Rotate,
    Compact,
    Close,
    Kill,
}

fn ops() -> impl Strategy<Value = Op> {
    let name = prop::option::weighted(0.9, (0..30u8).prop_map(|n| format!("k{n}").into()));
    let value = prop::option::weighted(0.9, prop::collection::vec(any::<u8>(), 0..600));
    let records = prop::collection::vec((name, value), 1..12);
    prop_oneof![
        10 => (0..PARTITIONS, records).prop_map(|(p, records)| Op::Write(p, records)),
        2 => Just(Op::Sync),
        1 => Just(Op::Rotate),
        1 => Just(Op::Compact),
        1 => Just(Op::Close),
        1 => Just(Op::Kill),
    ]
}

/// Offset, key and value of all records of a partition that whole batches hold.
fn in_batches(engine: &mut Engine, partition: u32, max: usize) -> Vec<(i64, Message)> {
    let (mut found, mut from) = (Vec::new(), 0);
    loop {
        let mut bytes = Vec::new();
        let outcome = engine.read_batch(key(partition), from, max, &mut bytes);
        let outcome = outcome.unwrap();
        let (mut rest, mut scratch) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let (batch, behind) = rest.split_at(parse_header(rest).unwrap().total_len());
            rest = behind;
            let plain = crate::storage::lsm::codec::plain(batch, &mut scratch).unwrap();
            let records = Records::new(plain).unwrap().map(Result::unwrap);
            // Small batches may be merged between two reads: the next one then has more before `from`.
            found.extend(
                records
                    .filter(|record| record.offset >= from)
                    .map(|record| {
                        let message = Message {
                            offset: record.offset,
                            timestamp: record.timestamp,
                            key: record.key.map(<[u8]>::to_vec),
                            value: record.value.map(<[u8]>::to_vec),
                        };
                        (record.offset, message)
                    }),
            );
        }
        from = outcome.next_offset;
        if from >= outcome.end {
            return found;
        }
    }
}

fn check(engine: &mut Engine, model: &BTreeMap<u32, Written>) {
    engine.sync().unwrap();
    for (&partition, written) in model {
        let end = written.len() as i64;
        assert_eq!(engine.bounds(key(partition)).unwrap(), (0, end));
        let mut newest = BTreeMap::new();
        let mut all = Vec::new();
        for (offset, (name, value)) in (0..).zip(written) {
            let message = engine.read(key(partition), offset).unwrap().unwrap();
            assert_eq!((message.offset, message.timestamp), (offset, 1000 + offset));
            assert_eq!((&message.key, &message.value), (name, value));
            all.push((offset, message.clone()));
            if let Some(name) = name {
                newest.insert(name.clone(), message);
            }
        }
        assert_eq!(engine.read(key(partition), end).unwrap(), None);
        assert_eq!(engine.read(key(partition), -1).unwrap(), None);
        assert_eq!(in_batches(engine, partition, 1), all);
        assert_eq!(in_batches(engine, partition, 1 << 30), all);
        for (name, message) in &newest {
            let found = engine.lookup(key(partition), name).unwrap();
            assert_eq!(found.as_ref(), Some(message));
        }
        assert_eq!(engine.lookup(key(partition), b"none").unwrap(), None);
        let found: Vec<_> = engine
            .range(key(partition), KeyBounds::prefix(b"k1"))
            .map(|found| found.map(|found| (found.kept, found.offset)).unwrap())
            .collect();
        let expected: Vec<_> = newest
            .into_iter()
            .filter(|(name, _)| name.starts_with(b"k1"))
            .map(|(name, message)| (name, message.offset))
            .collect();
        assert_eq!(found, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn what_was_written_is_read_whatever_happens(
        ops in prop::collection::vec(ops(), 1..40), threads: bool,
    ) {
        let place = Place::new();
        let open = || Engine::open(EngineConfig { threads, ..place.config() }).unwrap();
        let mut engine = open();
        let mut model: BTreeMap<u32, Written> = BTreeMap::new();
        for op in ops {
            match op {
                Op::Write(partition, records) => {
                    let written = model.entry(partition).or_default();
                    let end = written.len() as i64;
                    let new: Vec<NewRecord> = (end..)
                        .zip(&records)
                        .map(|(offset, (name, value))| NewRecord {
                            timestamp: 1000 + offset,
                            key: name.as_deref(),
                            value: value.as_deref(),
                        })
                        .collect();
                    let offset = match &new[..] {
                        [one] => engine.write(key(partition), *one),
                        more => engine.write_batch(key(partition), more),
                    };
                    prop_assert_eq!(offset.unwrap(), end);
                    written.extend(records);
                }
                Op::Sync => engine.sync().unwrap(),
                Op::Rotate => engine.rotate().unwrap(),
                Op::Compact => engine.compact().unwrap(),
                Op::Close => {
                    engine.close().unwrap();
                    engine = open();
                    prop_assert!(engine.recovery().clean || model.is_empty());
                }
                Op::Kill => {
                    // Also what was not synced: the staging file outlives a process.
                    drop(engine);
                    engine = open();
                }
            }
        }
        check(&mut engine, &model);
        engine.rotate().unwrap();
        engine.compact().unwrap();
        check(&mut engine, &model);
        let stats = engine.statistics();
        prop_assert_eq!(stats.partitions, model.len() as u64);
        prop_assert_eq!(stats.sst_records, model.values().map(Vec::len).sum::<usize>() as u64);
        prop_assert!(stats.flushed_lsn <= stats.durable_lsn);
        prop_assert_eq!(stats.ssts == 0, model.is_empty());
    }
}

#[test]
fn rotate_and_compact_move_the_log_into_files() {
    let place = Place::new();
    let mut engine = place.open();
    engine.rotate().unwrap();
    engine.compact().unwrap();
    assert_eq!(
        engine.statistics(),
        EngineStats {
            cache: engine.statistics().cache,
            ..EngineStats::default()
        }
    );
    for round in 1..=10u64 {
        engine.write(key(0), record(&[7; 1000])).unwrap();
        engine.write(key(1), record(&[8; 1000])).unwrap();
        engine.rotate().unwrap();
        // Nothing was written since: the segment stays.
        engine.rotate().unwrap();
        engine.compact().unwrap();
        let stats = engine.statistics();
        assert_eq!((stats.flushes, stats.sst_records), (round, 2 * round));
        assert!(stats.sst_bytes > 0 && stats.written_bytes >= stats.sst_bytes);
        assert!(stats.commits >= 2 * round && stats.committed_bytes >= stats.commits * 4096);
    }
    // Eight neighbours of about the same size are merged.
    let stats = engine.statistics();
    assert!(stats.merges > 0 && stats.ssts < 10, "{stats:?}");
    // Few stay of those in the files: one that the index has not passed yet; the one written to, one ready, one being made so.
    assert!(place.segments() <= 4, "{}", place.segments());
    for offset in 0..10 {
        assert!(engine.read(key(1), offset).unwrap().is_some());
    }
    engine.close().unwrap();
    let engine = place.open();
    let reopened = engine.statistics();
    assert_eq!(
        (reopened.ssts, reopened.sst_bytes, reopened.flushed_lsn),
        (stats.ssts, stats.sst_bytes, stats.flushed_lsn)
    );
    assert_eq!((reopened.partitions, reopened.merges), (2, 0));
}

#[test]
fn retention_and_compaction_by_key_work_and_offsets_go_on() {
    let place = Place::new();
    let config = place.with(Policy {
        retention_bytes: Some(0),
        ..Policy::default()
    });
    let mut engine = Engine::open(config.clone()).unwrap();
    for n in 0..5 {
        assert_eq!(engine.write(key(0), record(b"old")).unwrap(), n);
    }
    engine.rotate().unwrap();
    engine.compact().unwrap();
    assert_eq!(engine.bounds(key(0)).unwrap(), (5, 5));
    assert_eq!(engine.read(key(0), 2).unwrap(), None);
    let stats = engine.statistics();
    assert_eq!((stats.records_expired, stats.ssts), (5, 0));
    drop(engine);
    let mut engine = Engine::open(config).unwrap();
    assert_eq!(engine.write(key(0), record(b"new")).unwrap(), 5);
    drop(engine);

    let place = Place::new();
    let mut engine = Engine::open(place.with(Policy {
        compaction: Some(crate::storage::lsm::Compaction::default()),
        ..Policy::default()
    }))
    .unwrap();
    for n in 0..50u8 {
        let name = [n % 5];
        let new = NewRecord {
            key: Some(&name),
            ..record(b"value")
        };
        engine.write(key(0), new).unwrap();
    }
    engine.rotate().unwrap();
    engine.compact().unwrap();
    assert_eq!(engine.statistics().records_compacted, 45);
    assert_eq!(engine.read(key(0), 44).unwrap(), None);
    // Without an index of the keys, too.
    assert_eq!(engine.lookup(key(0), &[4]).unwrap().unwrap().offset, 49);
    assert_eq!(engine.write(key(0), record(b"more")).unwrap(), 50);
}

#[test]
fn readers_beside_the_writer_see_what_is_synced() {
    const BATCHES: i64 = 600;
    let place = Place::new();
    let mut config = place.config();
    config.threads = true;
    let mut engine = Engine::open(config).unwrap();
    let done = AtomicBool::new(false);
    let name = |offset: i64| format!("key-{}", offset % 100);
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for partition in 0..2 {
            let mut reader = engine.reader();
            let done = &done;
            workers.push(scope.spawn(move || {
                let mut seen = 0;
                loop {
                    let last = done.load(Ordering::Acquire);
                    let (start, end) = reader.bounds(key(partition)).unwrap();
                    assert!(start == 0 && end >= seen, "{start} {end} {seen}");
                    // Once each, and one long ago.
                    for offset in (seen..end).chain((end > 0).then_some(end / 2)) {
                        let found = reader.message(key(partition), offset).unwrap().unwrap();
                        assert_eq!(found.offset, offset);
                        assert_eq!(found.key, Some(name(offset).into_bytes()));
                        assert_eq!(found.value.unwrap().len() as i64, 500 + offset % 7);
                    }
                    if end > 100 {
                        let newest = reader.newest(key(partition), name(end).as_bytes());
                        assert!(newest.unwrap().unwrap().offset >= end - 100);
                    }
                    seen = end;
                    if last {
                        return seen;
                    }
                }
            }));
        }
        for n in 0..BATCHES {
            for partition in 0..2 {
                let from = n * 5;
                let fields: Vec<_> = (from..from + 5)
                    .map(|offset| (name(offset), vec![1; 500 + (offset % 7) as usize]))
                    .collect();
                let records: Vec<_> = fields
                    .iter()
                    .map(|(name, value)| NewRecord {
                        timestamp: 1,
                        key: Some(name.as_bytes()),
                        value: Some(value),
                    })
                    .collect();
                let offset = engine.write_batch(key(partition), &records).unwrap();
                assert_eq!(offset, from);
            }
            match n % 50 {
                0 => engine.compact().unwrap(),
                10 => engine.rotate().unwrap(),
                n if n % 5 == 0 => engine.sync().unwrap(),
                _ => {}
            }
        }
        engine.rotate().unwrap();
        engine.compact().unwrap();
        done.store(true, Ordering::Release);
        for worker in workers {
            assert_eq!(worker.join().unwrap(), BATCHES * 5);
        }
    });
    let stats = engine.statistics();
    assert_eq!(stats.sst_records, BATCHES as u64 * 10);
    assert!(stats.flushes > 10 && stats.damaged_blocks == 0);
    engine.close().unwrap();
}

#[test]
fn many_partitions_come_back_from_the_snapshot() {
    let place = Place::new();
    let mut engine = place.open();
    // More than one part of a snapshot holds.
    let count = PARTITIONS_A_PART as u32 * 2 + 10;
    for partition in 0..count {
        engine.write(key(partition), record(b"x")).unwrap();
    }
    engine.rotate().unwrap();
    engine.compact().unwrap();
    drop(engine);
    // Their ends are not read from the files' tables alone.
    let mut engine = place.open();
    assert_eq!(engine.recovery().batches_replayed, 0);
    assert_eq!(engine.statistics().partitions, u64::from(count));
    for partition in [0, 1, count / 2, count - 1] {
        assert_eq!(engine.write(key(partition), record(b"y")).unwrap(), 1);
    }
}

#[test]
fn what_does_not_fit_is_refused_and_the_rest_goes_on() {
    let place = Place::new();
    let mut engine = place.open();
    let large = vec![0; 70 << 10];
    let refused = engine.write(key(0), record(&large));
    assert!(matches!(refused, Err(EngineError::TooLarge { bytes, most }) if bytes > most));
    let refused = engine.write_batch(key(0), &[]);
    assert!(matches!(refused, Err(EngineError::Empty)));
    // Many segments: each write that finds no room waits for the disk.
    for n in 0..100 {
        let offset = engine.write(key(0), record(&large[..40 << 10])).unwrap();
        assert_eq!(offset, n);
    }
    // As much as there is room for.
    let most = engine.wal.max_entry() - HEADER_LEN - RECORD_OVERHEAD;
    assert_eq!(engine.write(key(0), record(&large[..most])).unwrap(), 100);
    let refused = engine.write(key(0), record(&large[..most + 1]));
    assert!(matches!(refused, Err(EngineError::TooLarge { .. })));
    engine.close().unwrap();
    let mut engine = place.open();
    assert_eq!(engine.bounds(key(0)).unwrap(), (0, 101));
    assert_eq!(engine.write(key(0), record(b"next")).unwrap(), 101);
}

#[test]
fn a_folder_has_one_owner() {
    let place = Place::new();
    let mut engine = place.open();
    engine.write(key(0), record(b"x")).unwrap();
    let second = Engine::open(place.config());
    assert!(matches!(second, Err(EngineError::Locked { .. })));
    assert!(
        Catalog::open(place.dir.path()).is_err(),
        "a server beside it"
    );
    engine.close().unwrap();
    // No server takes an engine's folder for its own: the topics are unknown.
    assert!(Catalog::open(place.dir.path()).is_err());
    let mut other = place.config();
    other.wal.store_id += 1;
    assert!(matches!(
        Engine::open(other),
        Err(EngineError::Store(_) | EngineError::Wal(_))
    ));

    let served = Place::new();
    let mut catalog = Catalog::open(served.dir.path()).unwrap();
    let topic = TopicSpec {
        name: "t".to_owned(),
        partitions: 1,
        settings: BTreeMap::new(),
    };
    catalog.ensure(&[topic], 1).unwrap();
    let beside = Engine::open(served.config());
    assert!(matches!(beside, Err(EngineError::Locked { .. })));
    drop(catalog);
    let taken = Engine::open(served.config());
    assert!(matches!(taken, Err(EngineError::Foreign { .. })));
    // The catalog lost, the log still has what only a server writes.
    fs::remove_file(served.dir.path().join(CATALOG_FILE)).unwrap();
    let mut recovered = Recovered::default();
    let wal = served.config().wal;
    let (mut writer, _, _) = WalWriter::open(&wal, SHARD, &mut recovered).unwrap();
    let mut part = PartWriter::new(writer.reserve(PART_MAX).unwrap());
    part.producer(key(0), 1, 0, 0);
    let len = part.finish();
    writer.publish_snapshot(0, 1, len);
    writer.close().unwrap();
    let taken = Engine::open(served.config());
    assert!(matches!(taken, Err(EngineError::Foreign { .. })));
}

#[test]
fn after_a_failed_write_nothing_is_taken_and_everything_is_read() {
    let place = Place::new();
    let mut engine = place.open();
    engine.write(key(0), record(b"kept")).unwrap();
    engine.sync().unwrap();
    engine.shared.fail("the disk is gone".to_owned());
    let errors = [
        engine.write(key(0), record(b"refused")).map(drop),
        engine.sync(),
        engine.rotate(),
    ];
    for error in errors {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("the disk is gone"), "{error}");
    }
    assert_eq!(engine.state(), WalState::Failed);
    let found = engine.read(key(0), 0).unwrap().unwrap();
    assert_eq!(found.value.unwrap(), b"kept");
    drop(engine);
    assert_eq!(place.open().bounds(key(0)).unwrap(), (0, 1));
}

#[test]
fn a_full_disk_refuses_and_resumes() {
    let place = Place::new();
    let root = place.dir.path().to_owned();
    on_small_disk(&root.clone(), 1800, move || {
        let mut engine = place.open();
        fs::write(root.join("ballast"), vec![1; 600 << 10]).unwrap();
        let value = vec![3; 10_000];
        let mut end = 0;
        let refused = loop {
            match engine.write(key(0), record(&value)) {
                Ok(offset) => end = offset + 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(refused, EngineError::Full { .. }), "{refused}");
        assert_eq!(engine.state(), WalState::DiskFull);
        engine.sync().unwrap();
        assert_eq!(engine.bounds(key(0)).unwrap(), (0, end));
        fs::remove_file(root.join("ballast")).unwrap();
        // The thread that makes segments tries again by itself.
        let offset = loop {
            match engine.write(key(0), record(&value)) {
                Ok(offset) => break offset,
                Err(error) => assert!(matches!(error, EngineError::Full { .. }), "{error}"),
            }
            std::thread::sleep(PATIENCE);
        };
        assert_eq!(offset, end, "a write that was refused left nothing");
        engine.close().unwrap();
        assert_eq!(place.open().bounds(key(0)).unwrap(), (0, end + 1));
    });
}
