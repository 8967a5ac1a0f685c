//! The key index against a sorted map, and against damage.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::storage::lsm::memory::StoreMemory;

type Model = BTreeMap<(PartitionKey, Vec<u8>), i64>;

fn partition(topic: u32, partition: u32) -> PartitionKey {
    PartitionKey { topic, partition }
}

fn write(model: &Model) -> Vec<u8> {
    let mut entries: Vec<_> = model.iter().collect();
    entries.sort_by(|a, b| a.0.0.cmp(&b.0.0).then_with(|| compare(&a.0.1, &b.0.1)));
    let mut writer = KeysWriter::new(Vec::new());
    for ((partition, key), offset) in entries {
        writer.key(*partition, key, *offset).unwrap();
    }
    let (bytes, made) = writer.finish().unwrap();
    assert_eq!(made.bytes, bytes.len() as u64);
    assert_eq!(made.keys, model.len() as u64);
    bytes
}

/// All keys of a partition from `from` on: as kept, cut or not, and their offsets.
fn range(
    reader: &KeysReader,
    of: PartitionKey,
    from: &[u8],
) -> Result<Vec<(Vec<u8>, bool, i64)>, KeysError> {
    let mut range = reader.range(of, from)?;
    let mut all = Vec::new();
    while let Some(entry) = range.next()? {
        all.push((entry.key.to_vec(), entry.cut, entry.offset));
    }
    assert!(matches!(range.next(), Ok(None)));
    Ok(all)
}

fn expected(model: &Model, of: PartitionKey, from: &[u8]) -> Vec<(Vec<u8>, bool, i64)> {
    let mut all: Vec<_> = model
        .iter()
        .filter(|((partition, key), _)| *partition == of && compare(key, from).is_ge())
        .collect();
    all.sort_by(|a, b| compare(&a.0.1, &b.0.1));
    all.into_iter()
        .map(|((_, key), &offset)| {
            let kept = key[..key.len().min(MAX_KEY)].to_vec();
            (kept, key.len() > MAX_KEY, offset)
        })
        .collect()
}

fn check(model: &Model, absent: &[(PartitionKey, Vec<u8>)]) {
    let bytes = write(model);
    let reader = KeysReader::new(&bytes).unwrap();
    assert_eq!(reader.len(), model.len() as u64);
    let findings = reader.verify();
    assert!(findings.is_empty(), "{findings:?}");
    for ((partition, key), offset) in model {
        assert_eq!(reader.get(*partition, key).unwrap(), Some(*offset));
    }
    for (partition, key) in absent {
        let expected = model.get(&(*partition, key.clone())).copied();
        assert_eq!(reader.get(*partition, key).unwrap(), expected);
        assert_eq!(
            range(&reader, *partition, key).unwrap(),
            self::expected(model, *partition, key)
        );
    }
}

fn any_key() -> impl Strategy<Value = (PartitionKey, Vec<u8>)> {
    let bytes = prop_oneof![
        4 => prop::collection::vec(0u8..3, 0..6),
        4 => (0u32..3000).prop_map(|n| format!("device/site-7/{n}").into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..300),
        // Around the longest that is kept whole, and alike at the beginning.
        2 => (0usize..40, any::<u8>()).prop_map(|(more, last)| {
            let mut key = vec![b'x'; MAX_KEY - 5 + more];
            key.push(last);
            key
        }),
    ];
    (
        0u32..3,
        prop_oneof![Just(0u32), Just(1), Just(256), Just(u32::MAX)],
        bytes,
    )
        .prop_map(|(topic, number, bytes)| (partition(topic, number), bytes))
}

proptest! {
    #[test]
    fn finds_and_ranges_as_a_sorted_map(
        model in prop::collection::btree_map(any_key(), 0i64..=i64::MAX, 0..400),
        absent in prop::collection::vec(any_key(), 0..20),
    ) {
        check(&model, &absent);
    }

    #[test]
    fn any_bytes_in_sound_pages_end_in_an_answer(
        seed in prop::collection::btree_map(any_key(), 0i64..100, 1..300),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        key in any_key(),
    ) {
        let mut bytes = write(&seed);
        for (at, byte) in changes {
            bytes[at.index(seed.len() * 20 % (1 << 16) + 32).min(4095)] = byte;
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        for page in bytes.as_chunks_mut::<PAGE>().0 {
            let crc = crc32c::crc32c(&page[4..]);
            page[..4].copy_from_slice(&crc.to_le_bytes());
        }
        if let Ok(reader) = KeysReader::new(&bytes) {
            let _ = reader.get(key.0, &key.1);
            let _ = range(&reader, key.0, &key.1);
            let _ = reader.verify();
        }
    }
}

#[test]
fn nothing_and_the_empty_key() {
    check(&Model::new(), &[(partition(0, 0), Vec::new())]);
    let model = Model::from([((partition(0, 0), Vec::new()), 7)]);
    check(
        &model,
        &[(partition(0, 1), Vec::new()), (partition(0, 0), vec![0])],
    );
}

#[test]
fn a_hundred_thousand_keys_make_a_tree_and_few_absent_ones_pass_the_filter() {
    let model: Model = (0..100_000u32)
        .map(|n| {
            (
                (
                    partition(3, n % 10),
                    format!("plant-4/pump-{n:07}").into_bytes(),
                ),
                i64::from(n),
            )
        })
        .collect();
    let bytes = write(&model);
    let reader = KeysReader::new(&bytes).unwrap();
    assert!(reader.tree > reader.leaves, "a root above the leaves");
    // Prefixes are shared: less than half of the keys' own bytes, offsets included.
    assert!(bytes.len() < 100_000 * 14, "{}", bytes.len());
    assert!(reader.verify().is_empty());
    assert_eq!(range(&reader, partition(3, 4), b"").unwrap().len(), 10_000);
    assert_eq!(
        range(&reader, partition(3, 4), b"plant-4/pump-0050000")
            .unwrap()
            .len(),
        5_000
    );
    let passed = (0..100_000u32)
        .map(|n| Stored::new(partition(3, n % 10), format!("plant-5/pump-{n}").as_bytes()))
        .filter(|stored| reader.may_hold(bloom::hash(stored.as_slice())).unwrap())
        .count();
    assert!(passed < 3_000, "{passed} of 100000");
    for n in (0..100_000).step_by(997) {
        let key = format!("plant-4/pump-{n:07}");
        assert_eq!(
            reader.get(partition(3, n % 10), key.as_bytes()).unwrap(),
            Some(i64::from(n))
        );
        assert_eq!(
            reader
                .get(partition(3, (n + 1) % 10), key.as_bytes())
                .unwrap(),
            None
        );
    }
}

#[test]
fn longest_keys_that_begin_alike_are_told_apart() {
    let model: Model = (0..200u16)
        .map(|n| {
            let mut key = vec![b'k'; 2000];
            key[996..998].copy_from_slice(&n.to_be_bytes());
            ((partition(1, 1), key), i64::from(n))
        })
        .collect();
    check(&model, &[(partition(1, 1), vec![b'k'; 2000])]);
}

#[test]
fn keys_without_common_prefixes_make_a_tree_of_three_levels() {
    let model: Model = (0..30_000u32)
        .map(|n| {
            let noise = XxHash3_128::oneshot(&n.to_le_bytes()).to_be_bytes();
            ((partition(1, 1), noise.repeat(16)), i64::from(n))
        })
        .collect();
    let bytes = write(&model);
    let reader = KeysReader::new(&bytes).unwrap();
    assert!(reader.tree - reader.leaves > 2, "a root above inner pages");
    check(&model, &[(partition(1, 1), vec![0x80])]);
}

#[test]
fn every_flipped_bit_is_found_and_no_wrong_offset_is_read() {
    let model: Model = (0..300i64)
        .map(|n| {
            (
                (
                    partition(1, (n % 3) as u32),
                    format!("key-{n}").into_bytes(),
                ),
                n * 1000,
            )
        })
        .collect();
    let whole = write(&model);
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        let Ok(reader) = KeysReader::new(&bytes) else {
            continue;
        };
        let findings = reader.verify();
        assert!(!findings.is_empty(), "byte {at}");
        let page = (at / PAGE * PAGE) as u64;
        assert!(
            findings
                .iter()
                .any(|e| matches!(e, KeysError::Damaged { position, .. } if *position == page)),
            "byte {at}: {findings:?}"
        );
        for ((partition, key), offset) in model.iter().skip(at % 7).step_by(29) {
            if let Ok(found) = reader.get(*partition, key) {
                assert_eq!(found, Some(*offset), "byte {at}");
            }
        }
    }
}

#[test]
fn a_cut_section_and_a_wrong_order_are_refused() {
    let model = Model::from([((partition(0, 0), b"a".to_vec()), 7)]);
    let whole = write(&model);
    for len in 0..whole.len() {
        assert!(KeysReader::new(&whole[..len]).is_err(), "{len}");
    }
    let mut writer = KeysWriter::new(Vec::new());
    writer.key(partition(1, 1), b"b", 0).unwrap();
    for (of, key, offset) in [
        (partition(1, 1), &b"b"[..], 1),
        (partition(1, 1), b"a", 1),
        (partition(0, 9), b"c", 1),
        (partition(1, 2), b"", -1),
    ] {
        assert!(matches!(
            writer.key(of, key, offset),
            Err(KeysError::Order { .. })
        ));
    }
    writer.key(partition(1, 2), b"", 5).unwrap();
    let (bytes, _) = writer.finish().unwrap();
    assert!(KeysReader::new(&bytes).unwrap().verify().is_empty());
}

#[test]
fn keys_beyond_what_is_in_memory_make_the_same_section() {
    let folder = tempfile::tempdir().unwrap();
    let model: Model = (0..HASHES as u32 * 2 + 70_000)
        .map(|n| ((partition(1, 1), n.to_be_bytes().to_vec()), i64::from(n)))
        .collect();
    let scratch = collect::scratch(&folder.path().join("a.tmp")).unwrap();
    let mut writer = KeysWriter::with_scratch(Vec::new(), scratch);
    for ((partition, key), offset) in &model {
        writer.key(*partition, key, *offset).unwrap();
    }
    let (bytes, made) = writer.finish().unwrap();
    assert_eq!(made.keys, model.len() as u64);
    assert!(bytes == write(&model));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

proptest! {
    #[test]
    fn collected_keys_are_merged_with_those_of_sections(
        records in prop::collection::vec(any_key(), 0..300),
        sections in prop::collection::vec(
            prop::collection::btree_map(any_key(), 0i64..1000, 0..60),
            0..4,
        ),
        least in 0i64..300,
    ) {
        let of = partition(1, 256);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tmp");
        let mut collector = collect::Collector::new(path, &StoreMemory::default()).sized(4000);
        collector.begin(of);
        let mut expected: BTreeMap<Vec<u8>, i64> = BTreeMap::new();
        let mut put = |key: &[u8], offset: i64| {
            let newest = expected.entry(kept(key).into_owned()).or_insert(offset);
            *newest = offset.max(*newest);
        };
        for ((_, key), offset) in records.iter().zip(0..) {
            collector.add(key, offset).unwrap();
            put(key, offset);
        }
        for ((partition, key), offset) in sections.iter().flatten() {
            if *partition == of {
                put(key, *offset);
            }
        }
        expected.retain(|_, offset| *offset >= least);
        let bytes: Vec<_> = sections.iter().map(write).collect();
        let readers: Vec<_> = bytes.iter().map(|b| KeysReader::new(b).unwrap()).collect();
        let mut got = Vec::new();
        let drained = collector.drain(&readers, least, |kept, offset| {
            got.push((kept.to_vec(), offset));
            Ok::<(), ()>(())
        });
        prop_assert!(drained.is_ok());
        prop_assert_eq!(got, expected.into_iter().collect::<Vec<_>>());
    }
}
