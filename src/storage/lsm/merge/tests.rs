//! What merging and compaction leave, step by step; that nothing is lost is the model's to say (`super::super::tests`).

use std::collections::BTreeMap;

use super::super::codec::Codec;
use super::super::policy::{Compaction, Policy};
use super::super::repair;
use super::super::store::View;
use super::super::tests::{ID, Message, Shard, key};
use super::*;

const HOUR: i64 = 3_600_000;

fn view(shard: &Shard) -> Arc<View> {
    shard.open.as_ref().unwrap().store.view()
}

fn merge_all(shard: &mut Shard) {
    while shard.merge() {}
}

/// With the server's sizes, and these policies.
fn merge_as_the_server(shard: &Shard, policies: impl Fn(u32) -> Policy + Send + Sync + 'static) {
    let store = Arc::clone(&shard.open.as_ref().unwrap().store);
    let mut merger = Merger::new(store, Arc::new(policies), 4096, Arc::default());
    while merger.step().unwrap() {}
}

/// Appends until a segment is full and flushed.
fn fill(shard: &mut Shard, mut append: impl FnMut(&mut Shard)) {
    let before = view(shard).flushed_lsn;
    while view(shard).flushed_lsn == before {
        append(shard);
        shard.maintain();
    }
}

fn numbered(shard: &mut Shard) {
    shard.append(key(0), 18, 3000);
    shard.append(key(2), 1, 500);
}

fn text(n: u32) -> Option<Vec<u8>> {
    Some(n.to_le_bytes().repeat(400))
}

/// A shard whose topic 2 is compacted.
fn compacted(compaction: Compaction) -> Shard {
    let mut shard = Shard::new(Policy::default());
    shard.compaction = Some(compaction);
    shard.restart(true);
    shard
}

/// What is in SSTs of the partition: offset, key, whether it has a value.
fn stored(shard: &Shard, key: PartitionKey) -> Vec<(i64, Option<u8>, bool)> {
    let (view, mut out, mut scratch) = (view(shard), Vec::new(), Vec::new());
    for extent in view.extents(key) {
        let reader = extent.file.reader().unwrap();
        for block in reader.blocks(key, 0).unwrap() {
            let mut rest = reader.block(&block.unwrap()).unwrap();
            while let Ok(header) = record_batch::parse_header(rest) {
                let (batch, others) = rest.split_at(header.total_len());
                rest = others;
                let plain = super::super::codec::plain(batch, &mut scratch).unwrap();
                for record in record_batch::Records::new(plain).unwrap() {
                    let record = record.unwrap();
                    out.push((
                        record.offset,
                        record.key.map(|k| k[0]),
                        record.value.is_some(),
                    ));
                }
            }
        }
    }
    out
}

#[test]
fn small_files_become_large_ones_and_stay_while_they_are_read() {
    let mut shard = Shard::new(Policy::default());
    for _ in 0..12 {
        fill(&mut shard, numbered);
    }
    let before = view(&shard);
    assert_eq!(before.files.len(), 12);
    merge_all(&mut shard);
    let after = view(&shard);
    assert!(after.files.len() <= 4, "{} files", after.files.len());
    assert!(after.files.iter().any(|file| file.meta.merges > 0));
    let sum = |view: &View, of: fn(&FileMeta) -> u64| -> u64 {
        view.files.iter().map(|file| of(&file.meta)).sum()
    };
    assert_eq!(sum(&before, |m| m.records), sum(&after, |m| m.records));
    shard.check();
    // Somebody still reads the old ones.
    assert!(before.files.iter().all(|file| file.path().exists()));
    let gone: Vec<_> = before
        .files
        .iter()
        .filter(|old| {
            !after
                .files
                .iter()
                .any(|new| new.meta.number == old.meta.number)
        })
        .map(|file| file.path().to_owned())
        .collect();
    drop(before);
    assert!(gone.len() > 8 && gone.iter().all(|path| !path.exists()));
    let stats = &shard.open.as_ref().unwrap().store.stats;
    let written = stats.merge_written_bytes.load(Ordering::Relaxed);
    assert!(written >= sum(&after, |m| if m.merges > 0 { m.bytes } else { 0 }));
    assert!(stats.merge_read_bytes.load(Ordering::Relaxed) > 0);
    assert_eq!(stats.merging_bytes.load(Ordering::Relaxed), 0);
}

/// The codec of each batch of a partition in SSTs, with its first offset.
fn codecs(shard: &Shard, key: PartitionKey) -> Vec<(i64, i16)> {
    let (view, mut out) = (view(shard), Vec::new());
    for extent in view.extents(key) {
        let reader = extent.file.reader().unwrap();
        for block in reader.blocks(key, 0).unwrap() {
            let mut rest = reader.block(&block.unwrap()).unwrap();
            while let Ok(header) = record_batch::parse_header(rest) {
                rest = &rest[header.total_len()..];
                out.push((header.base_offset, header.codec()));
            }
        }
    }
    out
}

#[test]
fn what_does_not_get_smaller_stays_plain_until_it_does() {
    let mut shard = Shard::new(Policy::default());
    let zstd = Codec::default().id();
    let mut state = 1u64;
    let mut noise = |shard: &mut Shard| {
        let mut byte = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let value = |_: u32| -> Vec<u8> { std::iter::repeat_with(&mut byte).take(900).collect() };
        shard.append_values(key(0), (0..20).map(value).collect());
        // Beside a partition that gets smaller all the time.
        shard.append(key(2), 20, 900);
    };
    for _ in 0..3 {
        fill(&mut shard, &mut noise);
    }
    let change = shard.model[&key(0)].len() as i64;
    for _ in 0..6 {
        fill(&mut shard, |shard| {
            shard.append(key(0), 20, 900);
            shard.append(key(2), 20, 900);
        });
    }
    let check = |shard: &Shard| {
        assert!(codecs(shard, key(2)).iter().all(|&(_, id)| id == zstd));
        let found = codecs(shard, key(0));
        let first = found.iter().position(|&(_, id)| id == zstd).unwrap();
        // At most 31 batches of four messages are late, and one may have messages of both kinds.
        let late = found[first].0 - change;
        assert!((-4..=32 * 4).contains(&late), "{late}");
        assert!(found.len() > first + 30);
        assert!(found[first..].iter().all(|&(_, id)| id == zstd));
    };
    check(&shard);
    merge_all(&mut shard);
    check(&shard);
    shard.check();
}

#[test]
fn merging_writes_each_byte_a_few_times() {
    let mut shard = Shard::new(Policy::default());
    for _ in 0..60 {
        fill(&mut shard, numbered);
        merge_all(&mut shard);
    }
    let stats = &shard.open.as_ref().unwrap().store.stats;
    let flushed = stats.flush_written_bytes.load(Ordering::Relaxed);
    let merged = stats.merge_written_bytes.load(Ordering::Relaxed);
    // Tiers of three files each, 60 files: at most log3(60) merges of each byte, and one more.
    assert!(merged < flushed * 5, "{merged} of {flushed}");
    assert!(view(&shard).files.len() < 15);
    shard.check();
}

#[test]
fn the_newest_record_of_each_key_stays_and_tombstones_go_in_time() {
    let mut shard = compacted(Compaction {
        delete_retention_ms: HOUR,
        ..Compaction::default()
    });
    let part = key(1);
    for round in 0..4u32 {
        fill(&mut shard, |shard| {
            let messages = (0..20).map(|k| (Some(k), text(round)));
            shard.append_keyed(part, messages.collect());
            shard.append(key(0), 2, 100);
        });
    }
    shard.append_keyed(part, (5..10).map(|k| (Some(k), None)).collect());
    shard.append_keyed(part, vec![(None, text(7)), (None, text(8))]);
    // The last ones stay in the log.
    fill(&mut shard, |shard| shard.append(key(0), 18, 3000));
    shard.append_keyed(part, vec![(Some(0), text(9))]);
    merge_all(&mut shard);
    let kept = stored(&shard, part);
    let newest: BTreeMap<Option<u8>, usize> = kept.iter().fold(BTreeMap::new(), |mut all, r| {
        *all.entry(r.1).or_default() += 1;
        all
    });
    assert_eq!(newest[&None], 2);
    assert!((0..20).all(|k| newest[&Some(k)] == 1), "{newest:?}");
    assert_eq!(kept.iter().filter(|r| !r.2).count(), 5, "tombstones wait");
    shard.check();
    let stats = &shard.open.as_ref().unwrap().store.stats;
    assert!(stats.records_compacted.load(Ordering::Relaxed) > 100);
    // There is nothing to do until their time has come.
    shard.ahead += HOUR - 60_000;
    assert!(!shard.merge());
    shard.ahead += 120_000;
    merge_all(&mut shard);
    let kept = stored(&shard, part);
    assert_eq!(kept.len(), 15 + 2);
    assert!(kept.iter().all(|r| r.2));
    shard.check();
    shard.restart(false);
    shard.check();
    assert!(!shard.merge());
}

#[test]
fn the_last_record_stays_even_as_a_tombstone() {
    let mut shard = compacted(Compaction {
        delete_retention_ms: 0,
        dirty_ratio: 0.0,
        ..Compaction::default()
    });
    let part = key(1);
    shard.append_keyed(part, vec![(Some(1), text(1)), (Some(1), None)]);
    for _ in 0..3 {
        fill(&mut shard, |shard| shard.append(key(0), 18, 3000));
        shard.ahead += HOUR;
        merge_all(&mut shard);
    }
    assert_eq!(stored(&shard, part), [(1, Some(1), false)]);
    shard.check();
    shard.append_keyed(part, vec![(Some(2), text(1))]);
    for _ in 0..3 {
        fill(&mut shard, |shard| shard.append(key(0), 18, 3000));
        shard.ahead += HOUR;
        merge_all(&mut shard);
    }
    assert_eq!(stored(&shard, part), [(2, Some(2), true)]);
    // A reader that stands before what is gone comes to what follows, and time leads there, too.
    assert_eq!(shard.messages(part, 0, 1)[0].0, 2);
    assert_eq!(shard.reader().bounds(part).unwrap(), (0, 3));
    assert_eq!(shard.reader().offset_for_time(part, 0).unwrap(), Some(2));
}

#[test]
fn records_stay_as_long_as_the_lag_says() {
    let mut shard = compacted(Compaction {
        min_lag_ms: HOUR,
        ..Compaction::default()
    });
    let part = key(1);
    let append = |shard: &mut Shard| {
        let messages: Vec<Message> = (0..20).map(|k| (Some(k), text(k.into()))).collect();
        shard.append_keyed(part, messages);
    };
    fill(&mut shard, append);
    fill(&mut shard, append);
    let all = stored(&shard, part);
    merge_all(&mut shard);
    assert_eq!(stored(&shard, part), all);
    shard.ahead += HOUR + 60_000;
    merge_all(&mut shard);
    assert_eq!(stored(&shard, part).len(), 20);
    shard.check();
}

#[test]
fn a_topic_that_is_compacted_from_now_on_gets_files_of_its_own() {
    let mut shard = Shard::new(Policy::default());
    for round in 0..4 {
        fill(&mut shard, |shard| {
            shard.append_keyed(key(1), (0..20).map(|k| (Some(k), text(round))).collect());
            shard.append(key(0), 3, 1000);
        });
    }
    shard.compaction = Some(Compaction::default());
    shard.restart(true);
    merge_all(&mut shard);
    assert_eq!(stored(&shard, key(1)).len(), 20);
    let view = view(&shard);
    let of = |key| -> Vec<u64> {
        let extents = view.extents(key);
        extents.iter().map(|e| e.file.meta.number).collect()
    };
    assert!(of(key(1)).iter().all(|number| !of(key(0)).contains(number)));
    shard.check();
    shard.compaction = None;
    shard.restart(false);
    merge_all(&mut shard);
    shard.check();
}

#[test]
fn deleted_topics_and_trimmed_offsets_are_left_out() {
    let mut shard = Shard::new(Policy::default());
    for _ in 0..6 {
        fill(&mut shard, |shard| {
            shard.append(key(0), 2, 1000);
            shard.append_keyed(key(1), (0..30).map(|n| (None, text(n))).collect());
        });
    }
    merge_all(&mut shard);
    let before: u64 = view(&shard).files.iter().map(|f| f.meta.bytes).sum();
    shard.restart(true);
    // Topic 2 was deleted a moment ago.
    merge_as_the_server(&shard, |topic| Policy {
        deleted: topic == 2,
        ..Policy::default()
    });
    shard.keyed.clear();
    let view = view(&shard);
    let merged: Vec<_> = view.files.iter().filter(|f| f.meta.merges > 1).collect();
    assert!(!merged.is_empty());
    for file in merged {
        let extents = file.reader().unwrap().extents().unwrap();
        assert!(extents.iter().all(|extent| extent.key.topic == 1));
    }
    let after: u64 = view.files.iter().map(|f| f.meta.bytes).sum();
    assert!(after * 3 < before * 2, "{after} of {before}");
    shard.check();
}

#[test]
fn retention_cuts_into_merged_files_and_its_garbage_is_rewritten() {
    let plain = || Policy {
        codec: super::super::Codec::None,
        ..Policy::default()
    };
    let mut shard = Shard::new(plain());
    for _ in 0..9 {
        fill(&mut shard, |shard| shard.append(key(0), 18, 3000));
    }
    merge_as_the_server(&shard, move |_| plain());
    assert_eq!(view(&shard).files.len(), 1);
    let all: u64 = view(&shard).extents(key(0)).iter().map(|e| e.bytes).sum();
    shard.policy.retention_bytes = Some(all / 4);
    shard.restart(true);
    shard.maintain();
    let start = view(&shard).start(key(0));
    let end = view(&shard).extents(key(0)).last().unwrap().end;
    assert!(start > end / 2 && start < end * 7 / 8, "{start} of {end}");
    merge_as_the_server(&shard, move |_| plain());
    let left: u64 = view(&shard).extents(key(0)).iter().map(|e| e.bytes).sum();
    assert!(left <= all / 4 + all / 8, "{left} of {all}");
    assert_eq!(shard.reader().bounds(key(0)).unwrap().0, start);
    let values = &shard.model[&key(0)];
    let rest: Vec<_> = (start..)
        .zip(values[start as usize..].iter().cloned())
        .collect();
    assert_eq!(shard.read(key(0), start, 1 << 30), rest);
    let rewritten = view(&shard).files[0].meta.merges;
    assert_eq!(rewritten, 2, "once is enough");
}

#[test]
fn a_damaged_file_is_left_where_it_is() {
    let mut shard = Shard::new(Policy::default());
    for _ in 0..7 {
        fill(&mut shard, numbered);
    }
    let path = view(&shard).files[3].path().to_owned();
    shard.stop();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[super::super::sst::format::HEADER + 70] ^= 4;
    std::fs::write(&path, &bytes).unwrap();
    shard.open();
    merge_all(&mut shard);
    shard.maintain();
    assert!(path.exists());
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    let view = view(&shard);
    assert!(view.files.iter().any(|file| file.is_quarantined()));
    assert!(view.files.len() < 7, "the others are merged");
}

#[test]
fn a_lost_manifest_is_made_anew_whatever_was_merged() {
    let mut shard = compacted(Compaction::default());
    for merge in [false, true, false] {
        for round in 0..4 {
            fill(&mut shard, |shard| {
                numbered(shard);
                shard.append_keyed(key(1), (0..20).map(|k| (Some(k), text(round))).collect());
            });
        }
        if merge {
            merge_all(&mut shard);
        }
        shard.stop();
        for entry in std::fs::read_dir(shard.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.to_str().unwrap().contains("manifest-") {
                std::fs::remove_file(path).unwrap();
            }
        }
        let plan = repair::plan(&shard.path(), ID, &mut |_, _| {}).unwrap();
        assert_eq!((plan.left_out.len(), plan.absent.len()), (0, 0));
        plan.apply().unwrap();
        shard.open();
        shard.check();
    }
}
