//! Manifests that are lost or damaged in every way, on stores that were written as the server writes them.

use std::fs;
use std::path::Path;

use super::super::manifest::{self, Edit};
use super::super::policy::Policy;
use super::super::sst::{SstInfo, SstReader, SstWriter};
use super::super::store::{Store, sst_path};
use super::super::tests::{ID, Shard, key, records};
use super::*;
use crate::storage::LogReader;

/// A shard with messages in several SSTs and in the log.
fn shard() -> Shard {
    let mut shard = Shard::new(Policy::default());
    for i in 0..60 {
        shard.append(key(i % 4), 10, 2000);
        shard.maintain();
    }
    let files = shard.open.as_ref().unwrap().store.view().files.len();
    assert!(files >= 3, "{files} files");
    shard
}

fn planned(dir: &Path) -> ShardRepair {
    plan(dir, ID, &mut |_, _| {}).unwrap()
}

fn repaired(dir: &Path) -> ShardRepair {
    let repair = planned(dir);
    repair.apply().unwrap();
    assert_eq!(planned(dir).problem, None);
    repair
}

/// Every message, from the files alone.
fn all_is_there(shard: &Shard) {
    let mut files = LogReader::of_files(&shard.path(), ID).unwrap();
    for (&key, values) in &shard.model {
        let all: Vec<_> = (0..).zip(values.iter().cloned()).collect();
        assert!(records(&mut files, key, 0, 1 << 20) == all, "{key:?}");
    }
}

fn manifest_of(dir: &Path) -> PathBuf {
    let numbers = manifest::list(dir).unwrap();
    manifest::manifest_path(dir, *numbers.last().unwrap())
}

/// Stops the shard, does `harm` to its files, repairs, and reads all of it back, also with a writer on it.
fn survives(harm: impl FnOnce(&Path)) -> ShardRepair {
    let mut shard = shard();
    shard.stop();
    let dir = shard.path();
    harm(&dir);
    let repair = repaired(&dir);
    assert_eq!(repair.absent, []);
    all_is_there(&shard);
    shard.open();
    shard.check();
    for i in 0..20 {
        shard.append(key(i % 4), 10, 2000);
        shard.maintain();
    }
    shard.check();
    shard.restart(false);
    shard.check();
    repair
}

#[test]
fn a_sound_store_is_left_alone() {
    let mut shard = shard();
    shard.stop();
    let before = fs::read(manifest_of(&shard.path())).unwrap();
    let repair = repaired(&shard.path());
    assert_eq!(repair.problem, None);
    assert_eq!(fs::read(manifest_of(&shard.path())).unwrap(), before);
}

#[test]
fn a_removed_manifest() {
    let repair = survives(|dir| {
        fs::remove_file(manifest_of(dir)).unwrap();
        // The server does not take it for an empty store, whose other files it would remove.
        assert!(matches!(
            Store::open(dir, ID),
            Err(StoreError::NoManifest { .. })
        ));
        assert!(matches!(
            Store::open_read_only(dir, ID),
            Err(StoreError::NoManifest { .. })
        ));
    });
    assert!(repair.kept.len() >= 3 && repair.left_out.is_empty());
    assert!(repair.old_manifests.is_empty());
}

#[test]
fn a_flipped_bit_anywhere_in_the_manifest() {
    let mut shard = shard();
    shard.stop();
    let dir = shard.path();
    let path = manifest_of(&dir);
    let whole = fs::read(&path).unwrap();
    let mut found = 0;
    for at in (0..whole.len()).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&path, &bytes).unwrap();
        let repair = repaired(&dir);
        if repair.problem.is_some() {
            found += 1;
            let kept = &repair.old_manifests[0].1;
            assert_eq!(fs::read(kept).unwrap(), bytes, "the old one is kept");
            fs::remove_file(kept).unwrap();
        }
        all_is_there(&shard);
        for number in manifest::list(&dir).unwrap() {
            fs::remove_file(manifest::manifest_path(&dir, number)).unwrap();
        }
        fs::write(&path, &whole).unwrap();
    }
    assert!(found > 20, "{found} were damage");
}

#[test]
fn a_manifest_cut_short() {
    survives(|dir| {
        let path = manifest_of(dir);
        let len = fs::metadata(&path).unwrap().len();
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(len / 2)
            .unwrap();
    });
    survives(|dir| fs::write(manifest_of(dir), b"").unwrap());
}

#[test]
fn starts_are_taken_from_what_can_be_read_of_the_old_one() {
    let mut shard = shard();
    let open = shard.open.as_ref().unwrap();
    open.store.commit(&Edit::Trim(vec![(key(1), 25)])).unwrap();
    open.store.commit(&Edit::Quarantine(1)).unwrap();
    shard.stop();
    let path = manifest_of(&shard.path());
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend_from_slice(&[1, 0, 0, 0, 9, 9, 9, 9, 9, 0, 0]);
    fs::write(&path, &bytes).unwrap();
    let repair = repaired(&shard.path());
    assert!(repair.problem.is_some());
    let mut files = LogReader::of_files(&shard.path(), ID).unwrap();
    assert_eq!(files.bounds(key(1)).unwrap().0, 25);
    assert_eq!(files.bounds(key(0)).unwrap().0, 0);
    let file = |state: &State| state.quarantined.clone();
    let loaded = manifest::load(&shard.path(), ID).unwrap().unwrap();
    assert!(file(&loaded.state).is_empty(), "the file is sound");
}

/// Writes the messages of `inputs` into one file, as a merge does.
fn merge(dir: &Path, inputs: &[u64], number: u64, skip: Option<PartitionKey>) {
    let readers: Vec<SstReader> = inputs
        .iter()
        .map(|&n| SstReader::open(&sst_path(dir, n), ID).unwrap())
        .collect();
    let info = SstInfo {
        id: ID,
        number,
        lsn_start: readers[0].info().lsn_start,
        lsn_end: readers.last().unwrap().info().lsn_end,
        created_ms: 1,
    };
    let mut writer = SstWriter::create(&sst_path(dir, number), info).unwrap();
    let mut keys: BTreeSet<PartitionKey> = BTreeSet::new();
    for reader in &readers {
        keys.extend(reader.extents().unwrap().iter().map(|e| e.key));
    }
    for key in keys.into_iter().filter(|&key| Some(key) != skip) {
        for reader in &readers {
            for block in reader.blocks(key, 0).unwrap() {
                let block = block.unwrap();
                let bytes = reader.block(&block).unwrap();
                let mut at = 0;
                while at < bytes.len() {
                    let len = record_batch::parse_header(&bytes[at..])
                        .unwrap()
                        .total_len();
                    writer
                        .batch(key, &bytes[at..at + len], block.max_time)
                        .unwrap();
                    at += len;
                }
            }
        }
    }
    writer.finish().unwrap();
}

fn numbers(dir: &Path) -> Vec<u64> {
    list_files(dir).unwrap()
}

#[test]
fn merged_files_stand_for_their_inputs_and_unfinished_ones_do_not() {
    // All inputs are still there.
    let repair = survives(|dir| {
        let n = numbers(dir);
        merge(dir, &n[..2], 90, None);
        fs::remove_file(manifest_of(dir)).unwrap();
    });
    assert_eq!(repair.left_out.len(), 2);
    assert!(
        repair.left_out[0]
            .why
            .contains("merged into sst-000000000000005a.sst")
    );
    // One is gone already.
    let repair = survives(|dir| {
        let n = numbers(dir);
        merge(dir, &n[..3], 90, None);
        fs::remove_file(sst_path(dir, n[1])).unwrap();
    });
    assert_eq!(repair.left_out.len(), 2);
    // The merge lacks a partition: a file of it was still to be written.
    let repair = survives(|dir| {
        let n = numbers(dir);
        merge(dir, &n[..2], 90, Some(key(3)));
        fs::remove_file(manifest_of(dir)).unwrap();
    });
    assert_eq!(repair.left_out.len(), 1);
    assert!(repair.left_out[0].why.contains("never completed"));
    // A merge of a merge, with the same LSNs.
    let repair = survives(|dir| {
        let n = numbers(dir);
        merge(dir, &n[..3], 90, None);
        merge(dir, &[90], 91, None);
        fs::remove_file(sst_path(dir, n[0])).unwrap();
    });
    assert_eq!(repair.left_out.len(), 3);
    assert!(repair.kept[0].path.ends_with("sst-000000000000005b.sst"));
}

#[test]
fn damaged_files_are_set_aside_and_named_with_their_byte() {
    let mut shard = shard();
    shard.stop();
    let dir = shard.path();
    let n = numbers(&dir);
    // The header of the first, a block of the second.
    for (number, at) in [(n[0], 20), (n[1], 400)] {
        let mut bytes = fs::read(sst_path(&dir, number)).unwrap();
        bytes[at] ^= 4;
        fs::write(sst_path(&dir, number), bytes).unwrap();
    }
    fs::remove_file(manifest_of(&dir)).unwrap();
    let dry = planned(&dir);
    assert_eq!(numbers(&dir), n, "a plan changes nothing");
    let repair = repaired(&dir);
    assert_eq!(format!("{dry:?}"), format!("{repair:?}"));
    assert_eq!(repair.left_out.len(), 1);
    assert!(repair.left_out[0].why.contains("at byte 0"), "{repair:?}");
    assert!(repair.left_out[0].becomes.exists());
    let damaged: Vec<&Kept> = repair
        .kept
        .iter()
        .filter(|k| !k.damage.is_empty())
        .collect();
    assert_eq!(damaged.len(), 1);
    assert!(damaged[0].damage[0].contains("byte 128"), "{damaged:?}");
    // The rest is there, behind what was lost.
    let mut files = LogReader::of_files(&dir, ID).unwrap();
    for (&key, values) in &shard.model {
        let end = files.bounds(key).unwrap().1;
        assert_eq!(end, values.len() as i64);
        let last = records(&mut files, key, end - 1, 1 << 20);
        assert_eq!(last, [(end - 1, values.last().unwrap().clone())]);
    }
    // A number that was once a file's is not used again.
    let loaded = manifest::load(&dir, ID).unwrap().unwrap();
    assert!(loaded.state.next_number > *n.last().unwrap());
}

#[test]
fn what_the_log_still_holds_is_flushed_again() {
    let mut shard = Shard::new(Policy::default());
    for i in 0..8 {
        shard.append(key(i % 4), 10, 4000);
    }
    // A step recycles what earlier ones flushed: after one flush the log is still whole.
    while shard.open.as_ref().unwrap().store.view().files.is_empty() {
        assert!(shard.step());
    }
    shard.stop();
    let dir = shard.path();
    let n = numbers(&dir);
    assert_eq!((n.len(), list_segments(&dir).unwrap()[0]), (1, 0));
    let mut bytes = fs::read(sst_path(&dir, n[0])).unwrap();
    bytes[3] ^= 1;
    fs::write(sst_path(&dir, n[0]), bytes).unwrap();
    fs::write(manifest_of(&dir), b"nonsense").unwrap();
    let repair = repaired(&dir);
    assert_eq!(repair.flushed_lsn, 0);
    all_is_there(&shard);
    shard.open();
    shard.maintain();
    shard.check();
}
