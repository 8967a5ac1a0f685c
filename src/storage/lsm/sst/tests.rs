//! Against a model in memory; every byte flipped; files cut short.

use std::collections::BTreeMap;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::storage::wal::LogId;
use crate::wire::record_batch::BatchWriter;

const INFO: SstInfo = SstInfo {
    id: LogId {
        store: 0x77,
        shard: 2,
    },
    number: 5,
    lsn_start: 4096,
    lsn_end: 8192,
    created_ms: 99,
};

fn key(topic: u32, partition: u32) -> PartitionKey {
    PartitionKey { topic, partition }
}

/// A batch of `records` records at `base`, each with a value of `size` bytes.
fn batch(base: i64, records: usize, size: usize) -> Vec<u8> {
    let mut buf = vec![0; 100 + records * (size + 40)];
    let mut writer = BatchWriter::new(&mut buf, 1000);
    for i in 0..records {
        let value = vec![(base as usize + i) as u8; size];
        writer.push(1000, None, Some(&value)).unwrap();
    }
    let len = writer.finish(base);
    buf.truncate(len);
    buf
}

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("a.sst")
    }
}

type Model = BTreeMap<PartitionKey, Vec<(i64, i64, Vec<u8>, i64)>>;

/// Writes the model's batches: (first offset, end, bytes, time).
fn write(place: &Place, model: &Model) -> SstMade {
    let mut writer = SstWriter::create(&place.path(), INFO).unwrap();
    for (&key, batches) in model {
        for (_, _, bytes, time) in batches {
            writer.batch(key, bytes, *time).unwrap();
        }
    }
    writer.finish().unwrap()
}

fn check(reader: &SstReader, model: &Model) {
    let extents = reader.extents().unwrap();
    assert_eq!(extents.len(), model.len());
    for (extent, (&key, batches)) in extents.iter().zip(model) {
        let all: Vec<u8> = batches.iter().flat_map(|b| b.2.clone()).collect();
        assert_eq!(extent.key, key);
        assert_eq!(extent.first_offset, batches[0].0);
        assert_eq!(extent.end_offset, batches.last().unwrap().1);
        assert_eq!(extent.bytes, all.len() as u64);
        assert_eq!(extent.max_time, batches.iter().map(|b| b.3).max().unwrap());
        let mut read = Vec::new();
        for block in reader.blocks(key, 0).unwrap() {
            read.extend_from_slice(reader.block(&block.unwrap()).unwrap());
        }
        assert_eq!(read, all);
        for (first, end, _, time) in batches {
            for offset in [*first, *end - 1] {
                let block = reader.locate(key, offset).unwrap().unwrap();
                assert!(block.first_offset <= offset && offset < block.end_offset);
            }
            // The first block whose latest time so far is as late.
            let block = reader.locate_time(key, *time).unwrap().unwrap();
            assert!(block.max_time >= *time && block.first_offset <= *first);
            let before = reader.blocks(key, 0).unwrap().map(Result::unwrap);
            assert!(
                before
                    .take_while(|b| *b != block)
                    .all(|b| b.max_time < *time)
            );
        }
        let end = batches.last().unwrap().1;
        assert_eq!(reader.locate(key, end).unwrap(), None);
        assert_eq!(reader.locate_time(key, i64::MAX).unwrap(), None);
    }
    for absent in [key(0, 0), key(3, 1_000_000), key(u32::MAX, 0)] {
        assert_eq!(reader.locate(absent, 0).unwrap(), None);
        assert_eq!(reader.locate_time(absent, 0).unwrap(), None);
        assert_eq!(reader.blocks(absent, 0).unwrap().count(), 0);
    }
    let report = reader.verify(|_| {});
    assert_eq!(report.findings, []);
    assert_eq!(
        report.batches,
        model.values().map(Vec::len).sum::<usize>() as u64
    );
}

/// Partitions with batches of some records, sizes, gaps and times.
fn models(partitions: usize, batches: usize) -> impl Strategy<Value = Model> {
    let one = (1..4usize, 0..200usize, 0..3i64, 0..100i64);
    let many = prop::collection::vec(one, 1..batches);
    prop::collection::btree_map((1..3u32, 0..40u32), many, 0..partitions).prop_map(|map| {
        map.into_iter()
            .map(|((topic, partition), list)| {
                let mut next = 0;
                let list = list
                    .into_iter()
                    .map(|(records, size, gap, time)| {
                        let base = next + gap;
                        next = base + records as i64;
                        (base, next, batch(base, records, size), time)
                    })
                    .collect();
                (key(topic, partition), list)
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn reads_what_was_written(model in models(12, 30)) {
        let place = Place::new();
        let made = write(&place, &model);
        prop_assert_eq!(made.file_bytes, std::fs::metadata(place.path()).unwrap().len());
        check(&SstReader::open(&place.path(), INFO.id).unwrap(), &model);
    }
}

#[test]
fn ten_thousand_partitions_make_a_tree_of_three_levels() {
    let mut model = Model::new();
    for partition in 0..13_000 {
        let base = i64::from(partition % 7);
        let time = i64::from(partition);
        model.insert(
            key(4, partition),
            vec![(base, base + 1, batch(base, 1, 8), time)],
        );
    }
    let place = Place::new();
    write(&place, &model);
    let reader = SstReader::open(&place.path(), INFO.id).unwrap();
    assert!(reader.footer().index_pages > reader.footer().leaves() + 1);
    check(&reader, &model);
}

#[test]
fn a_large_partition_has_many_blocks() {
    let mut list = Vec::new();
    for i in 0..3000 {
        let base = i * 3;
        list.push((base, base + 3, batch(base, 3, 9000), i / 10));
    }
    let model = Model::from([(key(1, 1), list)]);
    let place = Place::new();
    write(&place, &model);
    check(&SstReader::open(&place.path(), INFO.id).unwrap(), &model);
}

#[test]
fn every_flipped_bit_is_found_and_nothing_wrong_is_read() {
    let mut model = Model::new();
    for partition in 0..3 {
        let list = (0..4)
            .map(|i| (i * 2, i * 2 + 2, batch(i * 2, 2, 20), i))
            .collect();
        model.insert(key(1, partition), list);
    }
    let place = Place::new();
    write(&place, &model);
    let whole = std::fs::read(place.path()).unwrap();
    check(
        &SstReader::from_bytes(whole.clone(), &place.path()).unwrap(),
        &model,
    );
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        let Ok(reader) = SstReader::from_bytes(bytes, &place.path()) else {
            continue;
        };
        assert_ne!(reader.verify(|_| {}).findings, [], "byte {at}");
        for (&key, batches) in &model {
            for block in reader
                .blocks(key, 0)
                .into_iter()
                .flatten()
                .map_while(Result::ok)
            {
                if let Ok(read) = reader.block(&block) {
                    let all: Vec<u8> = batches.iter().flat_map(|b| b.2.clone()).collect();
                    assert_eq!(read, all, "byte {at}");
                }
            }
        }
    }
    for len in 0..whole.len() {
        assert!(SstReader::from_bytes(whole[..len].to_vec(), &place.path()).is_err());
    }
}

/// A batch of a record for each key.
fn keyed_batch(base: i64, keys: &[&str]) -> Vec<u8> {
    let mut buf = vec![0; 100 + keys.len() * 60];
    let mut writer = BatchWriter::new(&mut buf, 1000);
    for key in keys {
        writer.push(1000, Some(key.as_bytes()), None).unwrap();
    }
    let len = writer.finish(base);
    buf.truncate(len);
    buf
}

/// Two partitions whose keys are indexed as said, and one between whose keys are not.
fn write_keyed(place: &Place, keys: &[(u32, &str, i64)]) -> Vec<u8> {
    let mut writer = SstWriter::create(&place.path(), INFO).unwrap();
    for partition in 0..3 {
        let whose = key(1, partition);
        let batch = keyed_batch(10, &["b", "a", "b"]);
        writer.batch(whose, &batch, 5).unwrap();
        if partition != 1 {
            writer.keyed().unwrap();
        }
        for (_, kept, offset) in keys.iter().filter(|(of, _, _)| *of == partition) {
            writer.key(kept.as_bytes(), *offset).unwrap();
        }
    }
    let made = writer.finish().unwrap();
    let bytes = std::fs::read(place.path()).unwrap();
    assert_eq!(made.file_bytes, bytes.len() as u64);
    assert_eq!(std::fs::read_dir(place.0.path()).unwrap().count(), 1);
    bytes
}

const KEYS: [(u32, &str, i64); 4] = [(0, "a", 11), (0, "b", 12), (2, "a", 11), (2, "b", 12)];

#[test]
fn a_key_index_that_says_something_else_than_the_records_is_found() {
    let place = Place::new();
    let reader = |bytes: Vec<u8>| SstReader::from_bytes(bytes, &place.path()).unwrap();
    let sound = reader(write_keyed(&place, &KEYS));
    let report = sound.verify(|_| {});
    assert_eq!((&report.findings[..], report.keys), (&[][..], 4));
    let keyed: Vec<bool> = report.extents.iter().map(|extent| extent.keyed).collect();
    assert_eq!(keyed, [true, false, true]);
    let keys = sound.keys().unwrap().unwrap();
    assert_eq!(keys.get(key(1, 2), b"b").unwrap(), Some(12));
    assert_eq!(keys.get(key(1, 1), b"b").unwrap(), None);
    let change = |at: usize, to: (u32, &'static str, i64)| {
        let mut keys = KEYS;
        keys[at] = to;
        keys
    };
    for wrong in [
        change(1, (0, "b", 10)),
        change(1, (0, "b", 13)),
        change(0, (0, "aa", 11)),
        change(3, (2, "c", 12)),
    ] {
        let found = reader(write_keyed(&place, &wrong)).verify(|_| {}).findings;
        assert!(!found.is_empty(), "{wrong:?}");
        assert!(found[0].what.contains("key index"), "{found:?}");
    }
    let more: Vec<_> = KEYS.iter().copied().chain([(2, "c", 12)]).collect();
    assert_eq!(
        reader(write_keyed(&place, &more))
            .verify(|_| {})
            .findings
            .len(),
        1
    );
    assert_eq!(
        reader(write_keyed(&place, &KEYS[1..]))
            .verify(|_| {})
            .findings
            .len(),
        1
    );
}

#[test]
fn every_flipped_bit_of_a_file_with_a_key_index_is_found() {
    let place = Place::new();
    let whole = write_keyed(&place, &KEYS);
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        let Ok(reader) = SstReader::from_bytes(bytes, &place.path()) else {
            continue;
        };
        assert_ne!(reader.verify(|_| {}).findings, [], "byte {at}");
        let Ok(Some(keys)) = reader.keys() else {
            continue;
        };
        for (partition, wanted, offset) in KEYS {
            if let Ok(found) = keys.get(key(1, partition), wanted.as_bytes()) {
                assert_eq!(found, Some(offset), "byte {at}");
            }
        }
    }
    for len in 0..whole.len() {
        assert!(SstReader::from_bytes(whole[..len].to_vec(), &place.path()).is_err());
    }
}

#[test]
fn files_of_version_1_are_read() {
    let place = Place::new();
    let model = Model::from([(key(1, 1), vec![(0, 2, batch(0, 2, 9), 7)])]);
    write(&place, &model);
    let mut bytes = std::fs::read(place.path()).unwrap();
    assert_eq!(bytes[8], 2);
    for (version, fine) in [(1, true), (0, false), (3, false)] {
        bytes[8] = version;
        let crc = crc32c::crc32c(&bytes[..64]);
        bytes[64..68].copy_from_slice(&crc.to_le_bytes());
        match SstReader::from_bytes(bytes.clone(), &place.path()) {
            Ok(reader) => {
                assert!(fine);
                check(&reader, &model);
                assert!(reader.keys().unwrap().is_none());
            }
            Err(error) => assert!(!fine && error.to_string().contains("version")),
        }
    }
}

#[test]
fn damage_names_the_messages_and_the_rest_is_read() {
    let mut model = Model::new();
    for partition in 0..3 {
        let base = i64::from(partition) * 10;
        model.insert(
            key(1, partition),
            vec![(base, base + 2, batch(base, 2, 20), 0)],
        );
    }
    let place = Place::new();
    write(&place, &model);
    let mut bytes = std::fs::read(place.path()).unwrap();
    let second = format::HEADER + batch(0, 2, 20).len();
    // The leader epoch, which the batch's own CRC does not cover.
    bytes[second + 12] ^= 1;
    let reader = SstReader::from_bytes(bytes, &place.path()).unwrap();
    let found = reader.verify(|_| {}).findings;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].messages, Some((key(1, 1), 10, 12)));
    assert_eq!(found[0].position, second as u64);
    let block = reader.locate(key(1, 1), 10).unwrap().unwrap();
    let error = reader.block(&block).unwrap_err().to_string();
    assert!(error.contains("partition 1, offsets 10 to 11"), "{error}");
    let block = reader.locate(key(1, 2), 20).unwrap().unwrap();
    assert_eq!(reader.block(&block).unwrap(), batch(20, 2, 20));
}

#[test]
fn what_comes_out_of_order_is_refused_and_leaves_no_file() {
    let place = Place::new();
    let mut writer = SstWriter::create(&place.path(), INFO).unwrap();
    writer.batch(key(1, 1), &batch(5, 2, 1), 0).unwrap();
    assert!(writer.batch(key(1, 1), &batch(6, 2, 1), 0).is_err());
    assert!(writer.batch(key(1, 0), &batch(9, 1, 1), 0).is_err());
    assert!(writer.batch(key(1, 2), b"short", 0).is_err());
    let mut long = batch(7, 1, 1);
    long.push(0);
    assert!(writer.batch(key(1, 2), &long, 0).is_err());
    drop(writer);
    assert_eq!(std::fs::read_dir(place.0.path()).unwrap().count(), 0);
    let writer = SstWriter::create(&place.path(), INFO).unwrap();
    writer.finish().unwrap();
    let reader = SstReader::open(&place.path(), INFO.id).unwrap();
    check(&reader, &Model::new());
    let other = LogId {
        shard: 9,
        ..INFO.id
    };
    assert!(SstReader::open(&place.path(), other).is_err());
}
