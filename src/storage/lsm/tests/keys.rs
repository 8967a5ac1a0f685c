//! Searches by key: against what is there, before a partition's start, with an index that came later, with a damaged one,
//! and beside flushes.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::super::manifest::{self, Edit};
use super::super::policy::Policy;
use super::super::sst::SstReader;
use super::{ID, Message, Shard, key, value};
use crate::storage::{KeyBounds, LogReader, PartitionKey};

/// What is found by key is the newest of what there is, one by one and in order.
pub(super) fn check_keys(reader: &mut LogReader, key: PartitionKey, there: &[(i64, Message)]) {
    let mut newest: BTreeMap<u8, (i64, &Option<Vec<u8>>)> = BTreeMap::new();
    for (offset, (key, value)) in there {
        key.map(|key| newest.insert(key, (*offset, value)));
    }
    for wanted in 0..26 {
        let expected = newest.get(&wanted).copied();
        let found = reader.lookup(key, &[wanted]).unwrap();
        assert_eq!(found, expected.map(|(offset, _)| offset), "key {wanted}");
        let message = reader.newest(key, &[wanted]).unwrap();
        let found = message.as_ref().map(|m| (m.offset, &m.value));
        assert_eq!(found, expected, "key {wanted}");
    }
    for wanted in [0, 7, 25] {
        let all = there.iter().filter(|(_, (key, _))| *key == Some(wanted));
        let all: Vec<_> = all.map(|(offset, (_, value))| (*offset, value)).collect();
        let middle = all.get(all.len() / 2).map_or(0, |(offset, _)| *offset);
        for (from, at_once) in [
            (0, usize::MAX),
            (0, 2),
            (middle, 1),
            (middle + 1, usize::MAX),
        ] {
            let (mut found, mut next) = (Vec::new(), Some(from));
            while let Some(from) = next {
                let before = found.len();
                let more = reader.history(key, &[wanted], from, |record| {
                    let room = found.len() - before < at_once;
                    if room {
                        found.push((record.offset, record.value.map(<[u8]>::to_vec)));
                    }
                    room
                });
                next = more.unwrap();
                assert!(next.is_none_or(|next| next > from));
            }
            let expected = all.iter().filter(|(offset, _)| *offset >= from);
            let expected: Vec<_> = expected.map(|(o, value)| (*o, (*value).clone())).collect();
            assert_eq!(found, expected, "key {wanted} from {from}");
        }
    }
    assert_eq!(reader.history(key, &[1; 2000], 0, |_| true).unwrap(), None);
    assert_eq!(reader.lookup(key, b"").unwrap(), None);
    assert_eq!(reader.lookup(key, &[1; 2000]).unwrap(), None);
    for (bounds, from, to, limit) in [
        (KeyBounds::ALL, 0, 256, 1000),
        (KeyBounds::ALL, 0, 256, 2),
        (KeyBounds::prefix(&[3]), 3, 4, 1),
        (
            KeyBounds {
                to: Some(vec![11]),
                ..KeyBounds::prefix(&[5])
            },
            5,
            11,
            3,
        ),
    ] {
        let inside = |key: u8| (from..to).contains(&u32::from(key));
        let expected: Vec<(Vec<u8>, i64)> = newest
            .iter()
            .filter(|(key, _)| inside(**key))
            .map(|(key, (offset, _))| (vec![*key], *offset))
            .collect();
        let (mut found, mut rest) = (Vec::new(), Some(bounds));
        while let Some(bounds) = rest {
            let page = reader.keys(key, &bounds, limit).unwrap();
            assert!(page.keys.len() <= limit);
            found.extend(page.keys.into_iter().map(|key| (key.kept, key.offset)));
            rest = page.rest;
        }
        assert_eq!(found, expected);
    }
}

/// A shard whose topic 2 has an index, with keys in several SSTs and in the log.
fn keyed() -> Shard {
    let mut shard = Shard::new(Policy::default());
    shard.indexed = true;
    shard.restart(true);
    let mut n = 0;
    while shard.open.as_ref().unwrap().store.view().files.len() < 3 {
        n += 1;
        let message = |i: u8| {
            (
                Some((n + i) % 24),
                (!i.is_multiple_of(5)).then(|| value(2000, n.into())),
            )
        };
        shard.append_keyed(key(1), (0..9).map(message).collect());
        shard.append(key(0), 2, 300);
        shard.maintain();
    }
    shard.append_keyed(
        key(1),
        vec![(Some(23), None), (Some(7), Some(value(10, 3)))],
    );
    shard
}

fn keyed_files(shard: &Shard) -> usize {
    let view = shard.open.as_ref().unwrap().store.view();
    let extents = view.extents(key(1));
    assert_eq!(view.extents(key(0)).iter().filter(|e| e.keyed).count(), 0);
    extents.iter().filter(|extent| extent.keyed).count()
}

#[test]
fn keys_before_the_start_are_not_found() {
    let mut shard = keyed();
    assert_eq!(keyed_files(&shard), 3);
    let end = shard.keyed[&key(1)].len() as i64;
    for start in [4, end / 2, end - 12, end - 1, end] {
        let store = &shard.open.as_ref().unwrap().store;
        store.commit(&Edit::Trim(vec![(key(1), start)])).unwrap();
        let there = |shard: &Shard| shard.messages(key(1), start, 1 << 30);
        check_keys(&mut shard.reader(), key(1), &there(&shard));
        while shard.merge() {}
        check_keys(&mut shard.reader(), key(1), &there(&shard));
        for file in &shard.open.as_ref().unwrap().store.view().files {
            let report = file.reader().unwrap().verify(|_| {});
            assert_eq!(report.findings, []);
        }
        shard.restart(false);
        check_keys(&mut shard.reader(), key(1), &there(&shard));
    }
}

#[test]
fn an_index_that_is_switched_on_later_is_made_by_merges() {
    let mut shard = Shard::new(Policy::default());
    while shard.open.as_ref().unwrap().store.view().files.len() < 2 {
        let message = |i: u8| (Some(i), Some(value(2000, i.into())));
        shard.append_keyed(key(1), (0..9).map(message).collect());
        shard.maintain();
    }
    assert_eq!(keyed_files(&shard), 0);
    shard.check();
    shard.indexed = true;
    shard.restart(true);
    while shard.merge() {}
    assert_eq!(keyed_files(&shard), 2);
    shard.check();
    shard.indexed = false;
    shard.restart(true);
    // What is there stays until something else rewrites it.
    assert!(!shard.merge());
    assert_eq!(keyed_files(&shard), 2);
    shard.check();
}

#[test]
fn a_damaged_key_index_is_named_and_the_rest_is_found() {
    let mut shard = keyed();
    let path = {
        let view = shard.open.as_ref().unwrap().store.view();
        view.extents(key(1))[2].file.path().to_owned()
    };
    shard.stop();
    let whole = fs::read(&path).unwrap();
    let at = {
        let reader = SstReader::open_any(&path).unwrap();
        reader.footer().keys_at() as usize
    };
    let mut bytes = whole.clone();
    bytes[at + 100] ^= 2;
    fs::write(&path, &bytes).unwrap();
    shard.open();
    let mut reader = shard.reader();
    // The newest records of some keys are in the log, those of others behind the damage.
    let found: Vec<_> = (0..26).map(|n| reader.lookup(key(1), &[n])).collect();
    assert!(matches!(found[7], Ok(Some(_))));
    let errors: Vec<String> = found
        .iter()
        .filter_map(|found| Some(found.as_ref().err()?.to_string()))
        .collect();
    assert!(!errors.is_empty());
    for error in &errors {
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(error.contains(&format!("at byte {at}")), "{error}");
    }
    assert!(reader.keys(key(1), &KeyBounds::ALL, 100).is_err());
    // Messages are read as before, and the file is not merged away.
    assert_eq!(
        shard.messages(key(1), 0, 1 << 30).len(),
        shard.keyed[&key(1)].len()
    );
    shard.maintain();
    let state = manifest::load(&shard.path(), ID).unwrap().unwrap().state;
    assert_eq!(state.quarantined.len(), 1);
    let report = SstReader::open_any(&path).unwrap().verify(|_| {});
    assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
    assert_eq!(report.findings[0].position, at as u64);
    assert!(report.findings[0].what.contains("key index"));
    shard.stop();
    fs::write(&path, whole).unwrap();
    shard.open();
    shard.check();
}

#[test]
fn a_search_beside_flushes_never_misses_a_key() {
    let mut shard = Shard::new(Policy::default());
    shard.indexed = true;
    shard.restart(true);
    let open = shard.open.as_ref().unwrap();
    let (shared, store) = (Arc::clone(&open.shared), Arc::clone(&open.store));
    let written = Arc::new(AtomicI64::new(0));
    let searcher = std::thread::spawn({
        let written = Arc::clone(&written);
        move || {
            let mut reader = LogReader::with_store(shared, store);
            let mut last = 0;
            loop {
                let before = written.load(Ordering::Acquire);
                if before < 0 {
                    return last;
                }
                // The record with key 1 of each batch is its last one.
                let found = reader.lookup(key(1), &[1]).unwrap();
                let found = found.map_or(0, |offset| offset + 1);
                assert!(found >= before && found >= last, "{found} {before} {last}");
                let page = reader.keys(key(1), &KeyBounds::ALL, 10).unwrap();
                let ranged = page.keys.first().map_or(0, |key| key.offset + 2);
                assert!(ranged >= found, "{ranged} {found}");
                last = ranged;
            }
        }
    });
    for n in 0..300 {
        let message = |key| (Some(key), Some(value(3000, n)));
        shard.append_keyed(key(1), [0, 1].map(message).to_vec());
        let end = shard.keyed[&key(1)].len() as i64;
        written.store(end, Ordering::Release);
        shard.step();
    }
    written.store(-1, Ordering::Release);
    searcher.join().unwrap();
    shard.check();
}
