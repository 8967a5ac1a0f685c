//! Tests of writer, recovery and readers on real files.

mod window;

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;

use super::frame::{FRAME_ALIGN, FrameHeader, LogId, OFF_SEQ, u64_at};
use super::segment::{SegmentHeader, list_segments, segment_path, shard_dir};
use super::staging::{STAGING_HEADER, file_name};
use super::*;
use crate::memory::budget::{Part, Share};
use crate::storage::frames::FrameReader;
use crate::storage::index::{LogIndex, NOTES};
use crate::storage::small_disk::on_small_disk;
use crate::storage::{LogReader, PartitionKey, ReadError};
use crate::wire::record_batch::{BatchWriter, Records, parse_header};

const STORE: u128 = 0x7461_6666_7261_696c_0000_0000_0000_0001;
const COMMIT: usize = 64 << 10;

/// A store in a temporary folder, its staging file in one on tmpfs.
struct Place {
    store: TempDir,
    staging: TempDir,
    /// Its segments are made of older ones of the same log, full of frames.
    reusing: bool,
}

/// An older segment of the log, written from end to end.
fn old_segment() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let place = Place::reusing();
        let (mut writer, shared, ..) = place.open();
        let first = segment_path(&place.shard(), 0);
        let mut model = Model::default();
        while shared.rotations.get() < 2 {
            model.append_all(&mut writer, 8, 900);
            writer.flush().unwrap();
        }
        fs::read(first).unwrap()
    })
}

impl Place {
    fn new() -> Place {
        Place {
            store: tempfile::tempdir().unwrap(),
            staging: tempfile::tempdir_in("/dev/shm").unwrap(),
            reusing: false,
        }
    }

    fn reusing() -> Place {
        Place {
            reusing: true,
            ..Place::new()
        }
    }

    fn segment_size(&self) -> u64 {
        // The smallest there is: more of them.
        let commits = if self.reusing { 4 } else { 8 };
        commits * COMMIT as u64
    }

    /// Gives the log old segments to make new ones of.
    fn offer_old(&self, shared: &WalShared) {
        for i in 0..2 {
            let path = self.shard().join(format!("old-{i}.spare.tmp"));
            if !path.exists() {
                fs::write(&path, old_segment()).unwrap();
                shared.offer(path);
            }
        }
    }

    fn config(&self) -> WalConfig {
        WalConfig {
            segment_size: self.segment_size(),
            prepared_segments: 1,
            staging_size: 8 * COMMIT as u64,
            staging_dir: Some(self.staging.path().to_owned()),
            commit_size: COMMIT,
            linger: Duration::ZERO,
            ..WalConfig::new(self.store.path(), STORE)
        }
    }

    fn shard(&self) -> PathBuf {
        shard_dir(self.store.path(), 0)
    }

    fn staging_file(&self) -> PathBuf {
        self.staging.path().join(file_name(ID))
    }

    /// What a kill at this moment leaves: both folders as they are.
    fn copy(&self) -> Place {
        let copy = Place {
            reusing: self.reusing,
            ..Place::new()
        };
        copy_dir(self.store.path(), copy.store.path());
        copy_dir(self.staging.path(), copy.staging.path());
        // The note names the original's staging file, which lives on here.
        let _ = fs::remove_file(copy.shard().join("staging.json"));
        copy
    }

    fn open(&self) -> (WalWriter, std::sync::Arc<WalShared>, RecoveryReport, Log) {
        let mut log = Log::default();
        let (writer, shared, report) = WalWriter::open(&self.config(), 0, &mut log).unwrap();
        (writer, shared, report, log)
    }
}

const ID: LogId = LogId {
    store: STORE,
    shard: 0,
};

fn copy_dir(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir_all(&target).unwrap();
            copy_dir(&entry.path(), &target);
        } else if let Err(e) = fs::copy(entry.path(), &target) {
            // A file that is being prepared may vanish meanwhile.
            assert_eq!(e.kind(), std::io::ErrorKind::NotFound);
        }
    }
}

/// What replay gave: the batches of each partition, and the newest snapshot.
#[derive(Default, Debug, PartialEq)]
struct Log {
    batches: HashMap<PartitionKey, Vec<Vec<u8>>>,
    snapshot: Vec<u8>,
}

impl Replay for Log {
    fn snapshot(&mut self, part: &[u8], index: u32, _count: u32) {
        if index == 0 {
            assert!(self.batches.is_empty(), "the snapshot comes first");
            self.snapshot.clear();
        }
        self.snapshot.extend_from_slice(part);
    }

    fn batch(&mut self, key: PartitionKey, batch: &[u8]) {
        self.batches.entry(key).or_default().push(batch.to_vec());
    }
}

fn key(partition: u32) -> PartitionKey {
    PartitionKey {
        topic: 7,
        partition,
    }
}

fn batch(offset: i64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size + 200];
    let mut writer = BatchWriter::new(&mut bytes, 1_000_000 + offset);
    let value: Vec<u8> = (0..size).map(|i| (i as i64 * 31 + offset) as u8).collect();
    writer.push(1_000_000 + offset, None, Some(&value)).unwrap();
    let len = writer.finish(offset);
    bytes.truncate(len);
    bytes
}

/// Writes batches and remembers them with their frames.
#[derive(Default, Clone)]
struct Model {
    entries: Vec<(FrameSeq, PartitionKey, Vec<u8>)>,
    next: HashMap<PartitionKey, i64>,
}

impl Model {
    fn append(
        &mut self,
        writer: &mut WalWriter,
        partition: u32,
        size: usize,
    ) -> Result<(), Refusal> {
        let next = self.next.entry(key(partition)).or_default();
        let bytes = batch(*next, size);
        let room = writer.reserve(bytes.len() + 10)?;
        room[..bytes.len()].copy_from_slice(&bytes);
        let seq = writer.publish(key(partition), bytes.len());
        *next += 1;
        self.entries.push((seq, key(partition), bytes));
        Ok(())
    }

    fn append_all(&mut self, writer: &mut WalWriter, count: usize, size: usize) {
        for i in 0..count {
            while let Err(refusal) = self.append(writer, i as u32 % 3, size) {
                assert_eq!(refusal, Refusal::Backpressure);
                writer.poll(1, false);
                writer.wait(Duration::from_millis(10));
                std::thread::yield_now();
            }
        }
    }

    /// The log of entries up to frame `seq`.
    fn log(&self, seq: FrameSeq) -> HashMap<PartitionKey, Vec<Vec<u8>>> {
        let mut log: HashMap<PartitionKey, Vec<Vec<u8>>> = HashMap::new();
        for (at, key, bytes) in &self.entries {
            if *at <= seq {
                log.entry(*key).or_default().push(bytes.clone());
            }
        }
        log
    }

    fn all(&self) -> HashMap<PartitionKey, Vec<Vec<u8>>> {
        self.log(FrameSeq(u64::MAX))
    }
}

fn read_all(reader: &mut LogReader, key: PartitionKey, max: usize) -> Vec<Vec<u8>> {
    let mut batches = Vec::new();
    let (mut from, end) = reader.bounds(key).unwrap();
    let mut out = Vec::new();
    while from < end {
        out.clear();
        let outcome = reader.read(key, from, max, &mut out).unwrap();
        assert_eq!(outcome.bytes, out.len());
        assert!(outcome.next_offset > from);
        let mut rest = &out[..];
        while !rest.is_empty() {
            let len = parse_header(rest).unwrap().total_len();
            batches.push(rest[..len].to_vec());
            rest = &rest[len..];
        }
        from = outcome.next_offset;
    }
    batches
}

#[test]
fn what_was_written_comes_back_after_a_clean_stop() {
    writes_and_reads(&Place::new());
}

#[test]
fn what_was_written_over_older_segments_comes_back() {
    let place = Place::reusing();
    writes_and_reads(&place);
    let reused = |base: &u64| {
        let bytes = fs::read(segment_path(&place.shard(), *base)).unwrap();
        SegmentHeader::decode(&bytes).is_ok_and(|h| h.reused)
    };
    let bases = list_segments(&place.shard()).unwrap();
    assert!(bases.iter().filter(|base| reused(base)).count() > 3);
}

fn writes_and_reads(place: &Place) {
    let mut model = Model::default();
    for round in 0..3 {
        let (mut writer, shared, report, log) = place.open();
        assert_eq!(log.batches, model.all());
        assert_eq!(report.clean, round > 0);
        assert_eq!(report.cut, None);
        for _ in 0..40 {
            if place.reusing {
                place.offer_old(&shared);
            }
            model.append_all(&mut writer, 10, 3000);
        }
        writer.flush().unwrap();
        let mut live = LogReader::live(shared);
        for p in 0..3 {
            assert_eq!(read_all(&mut live, key(p), 20_000), model.all()[&key(p)]);
        }
        writer.close().unwrap();
        assert!(!place.staging_file().exists());
        let mut offline = LogReader::of_files(&place.shard(), ID).unwrap();
        for p in 0..3 {
            assert_eq!(read_all(&mut offline, key(p), 1), model.all()[&key(p)]);
        }
        assert_eq!(offline.stopped(), None);
    }
    let (writer, _, _, _) = place.open();
    writer.close().unwrap();
}

#[test]
fn published_entries_survive_a_killed_process() {
    let place = Place::new();
    let mut model = Model::default();
    for round in 0..4 {
        let (mut writer, shared, report, log) = place.open();
        assert_eq!(log.batches, model.all(), "round {round}");
        assert_eq!(report.staged_entries > 0, round > 0);
        model.append_all(&mut writer, 100 + round, 3000);
        // A reservation that is never published does not count.
        while let Err(refusal) = writer.reserve(100).map(|room| room.fill(0xee)) {
            assert_eq!(refusal, Refusal::Backpressure);
            writer.poll(1, false);
        }
        assert!(shared.durable() < model.entries.last().unwrap().0);
        drop(writer);
        assert!(place.staging_file().exists());
    }
}

#[test]
fn a_snapshot_bounds_what_is_replayed() {
    let place = Place::new();
    let (mut writer, shared, _, _) = place.open();
    let mut model = Model::default();
    let mut taken = 0;
    for i in 0..1500 {
        if writer.needs_snapshot() {
            for index in 0..3u32 {
                let part = format!("{i}:{index};");
                if let Ok(room) = writer.reserve(part.len()) {
                    room.copy_from_slice(part.as_bytes());
                    writer.publish_snapshot(index, 3, part.len());
                } else {
                    break;
                }
            }
            if !writer.needs_snapshot() {
                taken = i;
            }
        }
        model.append_all(&mut writer, 1, 2000);
        writer.poll(1, false);
    }
    writer.flush().unwrap();
    assert!(shared.rotations.get() > 3);
    assert!(taken > 0);
    let checkpoint = shared.checkpoint();
    drop(writer);
    let (writer, shared, report, log) = place.open();
    assert_eq!(report.checkpoint, Some(checkpoint));
    assert_eq!(shared.checkpoint(), checkpoint);
    assert_eq!(
        String::from_utf8(log.snapshot).unwrap(),
        format!("{taken}:0;{taken}:1;{taken}:2;")
    );
    let replayed: usize = log.batches.values().map(Vec::len).sum();
    assert_eq!(replayed, 1500 - taken);
    writer.close().unwrap();
}

#[test]
fn a_segment_can_be_ended_before_it_is_full() {
    for clean in [true, false] {
        let place = Place::new();
        let (mut writer, shared, _, _) = place.open();
        let mut model = Model::default();
        let end = |writer: &mut WalWriter| {
            while !writer.end_segment().unwrap() {
                writer.poll(1, false);
                std::thread::yield_now();
            }
        };
        for round in 1..5u64 {
            model.append_all(&mut writer, 3, 900);
            // Room in this frame, or in one that nothing else is in, and never published.
            if round % 2 == 0 {
                writer.flush().unwrap();
            }
            let free = writer.free_slots();
            let room = writer.reserve(50 << 10).map(|room| room.fill(0xee));
            end(&mut writer);
            assert!(room.is_ok() && writer.free_slots() >= free);
            assert!(writer.needs_snapshot());
            assert_eq!(shared.rotations.get(), round + 1);
        }
        // A segment of nothing but its header.
        end(&mut writer);
        model.append_all(&mut writer, 5, 900);
        if clean {
            writer.flush().unwrap();
            let mut reader = LogReader::live(std::sync::Arc::clone(&shared));
            for (key, batches) in model.all() {
                assert_eq!(read_all(&mut reader, key, 1 << 20), batches);
            }
            writer.close().unwrap();
        } else {
            drop(writer);
        }
        assert_eq!(place.open().3.batches, model.all());
    }
}

/// The frames of a log: (segment, byte in the file, header).
fn frames_of(shard: &Path) -> Vec<(PathBuf, u64, FrameHeader)> {
    let mut frames = Vec::new();
    for base in list_segments(shard).unwrap() {
        let path = segment_path(shard, base);
        let bytes = fs::read(&path).unwrap();
        let mut at = 4096;
        while at + FRAME_ALIGN <= bytes.len() {
            let Ok(header) = FrameHeader::decode(&bytes[at..], (bytes.len() - at) as u64) else {
                break;
            };
            if header.lsn != base + at as u64 {
                break;
            }
            frames.push((path.clone(), at as u64, header));
            at += header.size();
        }
    }
    frames
}

enum Hurt {
    Zero,
    Flip,
}

/// Every 512-byte sector of the last frames, zeroed or flipped: recovery ends exactly before that
/// frame when nothing behind shows that it had been durable, and refuses otherwise, naming the place.
#[test]
fn recovery_ends_exactly_at_a_torn_frame() {
    tear_everywhere(&Place::new());
}

/// The same in a segment that was an older one, whose frames lie behind the log's end.
#[test]
fn recovery_ends_exactly_at_a_torn_frame_before_older_ones() {
    tear_everywhere(&Place::reusing());
}

fn tear_everywhere(place: &Place) {
    let (mut writer, shared, _, _) = place.open();
    let mut model = Model::default();
    if place.reusing {
        place.offer_old(&shared);
        // The first two were made before there were any to reuse.
        while shared.rotations.get() < 3 {
            model.append_all(&mut writer, 1, 700);
            writer.flush().unwrap();
        }
    }
    drop(shared);
    for _ in 0..5 {
        model.append_all(&mut writer, 6, 700);
        writer.flush().unwrap();
    }
    // The last three go out together: none of them knows the others durable.
    let mut last = writer.durable();
    for _ in 0..3 {
        model.append_all(&mut writer, 6, 700);
        last = model.entries.last().unwrap().0;
        writer.seal_open(0);
    }
    writer.flush().unwrap();
    drop(writer);
    fs::remove_file(place.staging_file()).unwrap();
    fs::remove_file(place.shard().join("staging.json")).unwrap();
    let mut frames = frames_of(&place.shard());
    assert!(place.reusing || frames.len() == 8);
    frames.drain(..frames.len() - 8);
    let last_seq = last.0;
    assert_eq!(frames[7].2.seq, last_seq);
    let (first, last) = (&frames[0].0, &frames[7].0);
    assert_eq!(first, last, "one segment holds them");
    let header = SegmentHeader::decode(&fs::read(first).unwrap()).unwrap();
    assert_eq!(header.reused, place.reusing);
    let mut cut = 0;
    let mut refused = 0;
    for (path, at, header) in &frames[3..] {
        for sector in (0..header.size() as u64).step_by(512) {
            for hurt in [Hurt::Zero, Hurt::Flip] {
                let file = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(path)
                    .unwrap();
                let whole = fs::read(path).unwrap();
                let from = (at + sector) as usize;
                match hurt {
                    Hurt::Zero if whole[from..from + 512].iter().all(|&b| b == 0) => continue,
                    Hurt::Zero => file.write_all_at(&[0; 512], from as u64).unwrap(),
                    Hurt::Flip => file
                        .write_all_at(&[!whole[from + 100]], from as u64 + 100)
                        .unwrap(),
                }
                file.sync_all().unwrap();
                let mut log = Log::default();
                let opened = WalWriter::open(&place.config(), 0, &mut log);
                let known = frames.iter().any(|(_, _, h)| h.durable >= header.seq);
                match opened {
                    Ok((writer, shared, report)) => {
                        assert!(!known);
                        cut += 1;
                        assert_eq!(report.last_seq, header.seq - 1);
                        // Of the last frame without its beginning nothing shows that it was there.
                        let gone = place.reusing
                            && header.seq == last_seq
                            && sector == 0
                            && matches!(hurt, Hurt::Zero);
                        match report.cut {
                            Some(cut) => assert_eq!((&cut.path, cut.position), (path, *at)),
                            None => assert!(gone),
                        }
                        assert_eq!(log.batches, model.log(FrameSeq(header.seq - 1)));
                        drop((writer, shared));
                        // Nothing stale remains to be taken for a continuation.
                        let rest = fs::read(path).unwrap();
                        if place.reusing {
                            let base = header.lsn - at;
                            for at in (*at as usize..rest.len()).step_by(FRAME_ALIGN) {
                                let lsn = base + at as u64;
                                assert!(!FrameHeader::lies_here(&rest[at..], ID, lsn));
                            }
                        } else {
                            assert!(rest[*at as usize..].iter().all(|&b| b == 0));
                        }
                    }
                    Err(WalError::Damaged {
                        path: p, position, ..
                    }) => {
                        assert!(known);
                        refused += 1;
                        assert_eq!((&p, position), (path, *at));
                        let mut now = vec![0; whole.len()];
                        file.read_exact_at(&mut now, 0).unwrap();
                        assert_eq!(now[..from], whole[..from], "nothing was changed");
                    }
                    Err(other) => panic!("{other}"),
                }
                file.write_all_at(&whole, 0).unwrap();
                let _ = fs::remove_file(place.staging_file());
                let _ = fs::remove_file(place.shard().join("staging.json"));
            }
        }
    }
    assert!(cut > 20 && refused > 10, "{cut} {refused}");
}

#[test]
fn accepted_damage_is_cut_and_kept_aside() {
    let place = Place::new();
    let (mut writer, _, _, _) = place.open();
    let mut model = Model::default();
    for _ in 0..60 {
        model.append_all(&mut writer, 10, 3000);
        writer.flush().unwrap();
    }
    writer.close().unwrap();
    let frames = frames_of(&place.shard());
    let (path, at, header) = &frames[2];
    OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .write_all_at(&[0xff; 64], at + 512)
        .unwrap();
    let mut log = Log::default();
    let mut config = place.config();
    assert!(matches!(
        WalWriter::open(&config, 0, &mut log),
        Err(WalError::Damaged { .. })
    ));
    config.accept_damage = true;
    let (writer, _, report) = WalWriter::open(&config, 0, &mut log).unwrap();
    let cut = report.cut.unwrap();
    assert!(cut.damage && !cut.segments.is_empty());
    assert!(cut.segments.iter().all(|p| p.exists()));
    assert_eq!(log.batches, model.log(FrameSeq(header.seq - 1)));
    writer.close().unwrap();
}

#[test]
fn staging_of_another_store_boot_or_past_is_not_taken() {
    let place = Place::new();
    let (mut writer, _, _, _) = place.open();
    let mut model = Model::default();
    model.append_all(&mut writer, 5, 100);
    writer.flush().unwrap();
    drop(writer);
    let killed = place.copy();
    // All its frames are durable: an old file, as after a kill between the last commit and removal.
    let (writer, _, report, log) = place.open();
    assert_eq!((report.staged_frames, log.batches), (0, model.all()));
    writer.close().unwrap();

    // Of another store, although the name says otherwise.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(killed.staging_file())
        .unwrap();
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).unwrap();
    let rewrite = |at: usize, byte: u8| {
        let mut changed = header;
        changed[at] ^= byte;
        let crc = crc32c::crc32c(&changed[..56]);
        changed[56..60].copy_from_slice(&crc.to_le_bytes());
        file.write_all_at(&changed, 0).unwrap();
    };
    rewrite(16, 1);
    let mut log = Log::default();
    assert!(matches!(
        WalWriter::open(&killed.config(), 0, &mut log),
        Err(WalError::StagingForeign { .. })
    ));
    // Of another boot.
    rewrite(32, 1);
    let (writer, _, report, log) = killed.open();
    assert_eq!((report.staged_frames, log.batches), (0, model.all()));
    writer.close().unwrap();
}

#[test]
fn a_log_older_than_its_staging_file_is_refused() {
    let place = Place::new();
    let (mut writer, _, _, _) = place.open();
    let mut model = Model::default();
    model.append_all(&mut writer, 5, 100);
    writer.flush().unwrap();
    let backup = place.copy();
    for _ in 0..20 {
        model.append_all(&mut writer, 1, 100);
        writer.flush().unwrap();
    }
    model.append_all(&mut writer, 1, 100);
    drop(writer);
    fs::copy(place.staging_file(), backup.staging_file()).unwrap();
    let mut log = Log::default();
    assert!(matches!(
        WalWriter::open(&backup.config(), 0, &mut log),
        Err(WalError::StagingMismatch { .. })
    ));
}

#[test]
fn a_vanished_staging_file_is_reported() {
    let place = Place::new();
    let (mut writer, _, _, _) = place.open();
    Model::default().append_all(&mut writer, 5, 100);
    drop(writer);
    fs::remove_file(place.staging_file()).unwrap();
    let (_writer, _, report, _) = place.open();
    assert_eq!(report.staging_lost, Some(place.staging_file()));
}

#[test]
fn one_writer_a_log() {
    let place = Place::new();
    let (_writer, _, _, _) = place.open();
    let mut log = Log::default();
    assert!(matches!(
        WalWriter::open(&place.config(), 0, &mut log),
        Err(WalError::Locked { .. })
    ));
}

#[test]
fn a_failed_write_is_final_and_loses_nothing_staged() {
    let place = Place::new();
    let mut model = Model::default();
    let (mut writer, shared, _, _) = place.open();
    model.append_all(&mut writer, 10, 500);
    writer.flush().unwrap();
    let durable = writer.durable();
    // The descriptor now leads to a device that is always full.
    let good = std::mem::replace(
        &mut writer.segments.back_mut().unwrap().file,
        OpenOptions::new().write(true).open("/dev/full").unwrap(),
    );
    model.append_all(&mut writer, 10, 500);
    assert!(matches!(writer.flush(), Err(WalError::Failed { .. })));
    assert_eq!(writer.state(), WalState::Failed);
    assert!(shared.reason().unwrap().contains("No space left"));
    // Also when the disk would work again.
    writer.segments.back_mut().unwrap().file = good;
    for now in 1..100 {
        assert_eq!(writer.reserve(10).unwrap_err(), Refusal::Failed);
        writer.poll(now, false);
    }
    assert_eq!(writer.durable(), durable);
    let mut live = LogReader::live(shared);
    for p in 0..3 {
        assert_eq!(
            read_all(&mut live, key(p), 4096),
            model.log(durable)[&key(p)]
        );
    }
    assert!(matches!(writer.close(), Err(WalError::Failed { .. })));
    let (writer, _, report, log) = place.open();
    assert_eq!(log.batches, model.all());
    assert_eq!(report.staged_entries, 10);
    writer.close().unwrap();
}

#[test]
fn writes_that_the_kernel_did_not_take_are_submitted_again() {
    let place = Place::new();
    let config = WalConfig {
        commits_in_flight: 2,
        ..place.config()
    };
    let (mut writer, _shared, _) = WalWriter::open(&config, 0, &mut Log::default()).unwrap();
    let mut model = Model::default();
    // A segment header and a frame: as many as may be in flight, so no place is free.
    model.append_all(&mut writer, 1, 100);
    writer.seal_open(0);
    writer.push_without_submitting();
    assert_eq!(writer.in_flight(), config.commits_in_flight);
    let last = FrameSeq(1);
    let end = std::time::Instant::now() + Duration::from_secs(30);
    while writer.durable() < last {
        writer.poll(1, false);
        assert!(std::time::Instant::now() < end, "never submitted again");
    }
    writer.close().unwrap();
    let (_, _, _, log) = place.open();
    assert_eq!(log.batches, model.all());
}

#[test]
fn readers_find_offsets_and_times() {
    let place = Place::new();
    let (mut writer, shared, _, _) = place.open();
    let mut model = Model::default();
    let mut reader = LogReader::live(std::sync::Arc::clone(&shared));
    assert_eq!(reader.bounds(key(0)).unwrap(), (0, 0));
    model.append_all(&mut writer, 30, 3000);
    // Published, not durable.
    assert!(reader.bounds(key(0)).unwrap().1 < 10);
    writer.flush().unwrap();
    assert_eq!(reader.bounds(key(0)).unwrap(), (0, 10));
    let mut out = Vec::new();
    let outcome = reader.read(key(0), 4, 1, &mut out).unwrap();
    assert_eq!((outcome.batches, outcome.next_offset), (1, 5));
    assert_eq!(out, model.all()[&key(0)][4]);
    assert_eq!(reader.read(key(0), 10, 1, &mut out).unwrap().bytes, 0);
    assert!(matches!(
        reader.read(key(0), 11, 1, &mut out),
        Err(ReadError::OutOfRange {
            start: 0,
            end: 10,
            ..
        })
    ));
    // The batches' clock is wrong by decades: their frame's time counts.
    assert_eq!(reader.offset_for_time(key(0), 1_000_005).unwrap(), Some(0));
    let now = super::staging::unix_ms();
    assert_eq!(reader.offset_for_time(key(0), now + 60_000).unwrap(), None);
    // A right clock is exact.
    std::thread::sleep(Duration::from_millis(2));
    let mut bytes = vec![0; 500];
    let base = super::staging::unix_ms() - 500;
    let mut w = BatchWriter::new(&mut bytes, base);
    for i in 0..5 {
        w.push(base + i * 10, None, Some(b"x")).unwrap();
    }
    let len = w.finish(10);
    writer.reserve(len).unwrap().copy_from_slice(&bytes[..len]);
    writer.publish(key(0), len);
    writer.flush().unwrap();
    assert_eq!(reader.bounds(key(0)).unwrap(), (0, 15));
    assert_eq!(
        Records::new(&bytes[..len]).unwrap().count(),
        5,
        "a whole batch"
    );
    writer.close().unwrap();
}

/// A reader that keeps reading while the writer laps its slots and rotates sees exactly the log.
/// What the writer tells the index, and what it reads for itself where the writer's notes were lost or
/// are of an earlier run, is what a walk over the files finds.
#[test]
fn the_index_of_a_running_log_is_that_of_its_files() {
    let place = Place::new();
    let mut model = Model::default();
    let same = |writer: &mut WalWriter, shared: &std::sync::Arc<WalShared>| {
        writer.flush().unwrap();
        let mut live = LogReader::live(std::sync::Arc::clone(shared));
        live.bounds(key(0)).unwrap();
        let mut files = FrameReader::files(&place.shard(), ID);
        let index = LogIndex::new(&place.shard(), 0);
        index.catch_up(&mut files).unwrap();
        let (noted, walked) = (shared.index().dump(), index.dump());
        if noted != walked {
            let differ = noted.iter().zip(&walked).find(|(a, b)| a != b);
            panic!("{} and {} lines: {differ:?}", noted.len(), walked.len());
        }
        walked.len()
    };
    for round in 0..2 {
        let (mut writer, shared, _, _) = place.open();
        model.append_all(&mut writer, 300, 3000);
        let lines = same(&mut writer, &shared);
        assert!(lines > 3 * (round + 1), "several segments");
        // More batches of changing partitions than there is room for notes.
        shared.index().stalled(|| {
            model.append_all(&mut writer, NOTES + 1000, 61);
            writer.flush().unwrap();
        });
        same(&mut writer, &shared);
        model.append_all(&mut writer, 100, 3000);
        same(&mut writer, &shared);
        drop(writer);
    }
}

/// With next to no memory the index becomes coarser, and everything is found all the same: by offset and by time.
#[test]
fn an_index_without_memory_finds_everything() {
    let place = Place::new();
    let share = Share::alone(Part::OffsetIndex, 12_000);
    let config = WalConfig {
        segment_size: 64 * COMMIT as u64,
        index: share.clone(),
        ..place.config()
    };
    let mut model = Model::default();
    let (mut writer, shared, _) = WalWriter::open(&config, 0, &mut Log::default()).unwrap();
    let mut reader = LogReader::live(std::sync::Arc::clone(&shared));
    for _ in 0..20 {
        model.append_all(&mut writer, 300, 9000);
        writer.flush().unwrap();
        reader.bounds(key(0)).unwrap();
        let usage = share.account().usage();
        assert!(usage.used <= usage.limit, "{usage:?}");
    }
    assert!(share.account().usage().refused > 10);
    let all = model.all();
    for partition in 0..3 {
        assert_eq!(
            read_all(&mut reader, key(partition), 100_000),
            all[&key(partition)]
        );
        for offset in (0..2000).step_by(97) {
            let mut out = Vec::new();
            reader.read(key(partition), offset, 1, &mut out).unwrap();
            assert_eq!(out, all[&key(partition)][offset as usize]);
        }
    }
    drop(reader);
    drop(writer);
    drop(shared);
    assert_eq!(share.account().used(), 0);
}

#[test]
fn a_reader_beside_the_writer_sees_the_log() {
    let place = Place::new();
    let (mut writer, shared, _, _) = place.open();
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut model = Model::default();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|p| {
                let shared = std::sync::Arc::clone(&shared);
                let done = &done;
                scope.spawn(move || {
                    let mut reader = LogReader::live(std::sync::Arc::clone(&shared));
                    let (mut all, mut from) = (Vec::new(), 0);
                    loop {
                        let last = done.load(std::sync::atomic::Ordering::Acquire);
                        let mut out = Vec::new();
                        if reader.bounds(key(p)).unwrap().1 > from {
                            from = reader
                                .read(key(p), from, 50_000, &mut out)
                                .unwrap()
                                .next_offset;
                            all.extend_from_slice(&out);
                        } else if last {
                            return all;
                        }
                    }
                })
            })
            .collect();
        for i in 0..3000 {
            model.append_all(&mut writer, 3, 1000);
            writer.poll(i, false);
        }
        writer.flush().unwrap();
        done.store(true, std::sync::atomic::Ordering::Release);
        for (p, reader) in readers.into_iter().enumerate() {
            assert!(reader.join().unwrap() == model.all()[&key(p as u32)].concat());
        }
    });
    writer.close().unwrap();
}

/// A full file system: a clear refusal, reading goes on, writing resumes when there is space.
#[test]
fn a_full_disk_refuses_and_resumes() {
    let place = Place::new();
    let root = place.store.path().to_owned();
    on_small_disk(&root.clone(), 1800, move || {
        let (mut writer, shared, _, _) = place.open();
        fs::write(root.join("ballast"), vec![1; 600 << 10]).unwrap();
        let mut model = Model::default();
        let refusal = loop {
            match model.append(&mut writer, 0, 10_000) {
                Ok(()) => {}
                Err(Refusal::Backpressure) => std::thread::yield_now(),
                Err(other) => break other,
            }
            writer.poll(1, false);
        };
        assert_eq!(refusal, Refusal::Full);
        assert_eq!(writer.state(), WalState::DiskFull);
        assert!(shared.reason().unwrap().contains("No space left"));
        writer.flush().unwrap();
        let mut reader = LogReader::live(std::sync::Arc::clone(&shared));
        assert_eq!(read_all(&mut reader, key(0), 9000), model.all()[&key(0)]);
        fs::remove_file(root.join("ballast")).unwrap();
        while writer.state() != WalState::Running {
            writer.poll(1, false);
            std::thread::yield_now();
        }
        model.append_all(&mut writer, 1, 100);
        writer.close().unwrap();
        let (writer, _, _, log) = place.open();
        assert_eq!(log.batches, model.all());
        drop(writer);
    });
}

/// Tears what was in flight: frames behind `durable` lose some of their sectors.
fn tear(place: &Place, durable: u64, seed: u64) {
    let mut random = seed;
    let mut draw = move || {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        random >> 33
    };
    for (path, at, header) in frames_of(&place.shard()) {
        if header.seq <= durable {
            continue;
        }
        let reused = SegmentHeader::decode(&fs::read(&path).unwrap()).is_ok_and(|h| h.reused);
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let zeros = vec![0; header.size()];
        // What lay there before.
        let before = match reused {
            true => &old_segment()[at as usize..][..header.size()],
            false => &zeros,
        };
        match draw() % 4 {
            0 => {}
            1 => file.write_all_at(before, at).unwrap(),
            _ => {
                for (i, sector) in before.chunks(512).enumerate() {
                    if draw() % 3 == 0 {
                        file.write_all_at(sector, at + i as u64 * 512).unwrap();
                    }
                }
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Act {
    Append { partition: u32, size: usize },
    Poll,
    Wait,
    Snapshot,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        6 => (0u32..4, 1usize..9000).prop_map(|(partition, size)| Act::Append { partition, size }),
        3 => Just(Act::Poll),
        1 => Just(Act::Wait),
        1 => Just(Act::Snapshot),
    ];
    prop::collection::vec(act, 1..250)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Whatever was published survives a kill, whatever was durable survives a power cut, in order and
    /// without a hole, however what was in flight is torn; also when recovery itself is killed.
    #[test]
    fn a_kill_or_a_power_cut_loses_nothing_acknowledged(
        rounds in prop::collection::vec((acts(), any::<u64>()), 1..3),
        reusing in any::<bool>(),
    ) {
        let mut place = if reusing { Place::reusing() } else { Place::new() };
        let mut model = Model::default();
        for (acts, seed) in rounds {
            let (mut writer, shared, _, log) = place.open();
            prop_assert!(log.snapshot.is_empty() || !log.batches.is_empty() || !model.entries.is_empty());
            for act in acts {
                if reusing {
                    place.offer_old(&shared);
                }
                match act {
                    Act::Append { partition, size } => {
                        let _ = model.append(&mut writer, partition, size);
                    }
                    Act::Poll => { writer.poll(1, false); }
                    Act::Wait => writer.wait(Duration::from_millis(5)),
                    Act::Snapshot => {
                        // The state of the test's "shard": how many entries there are.
                        let part = (model.entries.len() as u64).to_le_bytes();
                        if let Ok(room) = writer.reserve(8) {
                            room.copy_from_slice(&part);
                            writer.publish_snapshot(0, 1, 8);
                        }
                    }
                }
            }
            let durable = shared.durable();
            // In flight writes may land while the copy is made: each is whole or torn below.
            let killed = place.copy();
            drop(writer);
            drop(shared);
            tear(&killed, durable.0, seed);
            let power_cut = killed.copy();
            let _ = fs::remove_file(power_cut.staging_file());

            let check = |place: &Place, least: FrameSeq| {
                let mut log = Log::default();
                let (writer, _, report) = WalWriter::open(&place.config(), 0, &mut log).unwrap();
                assert!(report.last_seq >= least.0);
                let skip = if log.snapshot.is_empty() {
                    0
                } else {
                    u64_at(&log.snapshot, 0) as usize
                };
                // Exactly the model's entries up to the last frame, less what the snapshot covers.
                let mut expected: HashMap<PartitionKey, Vec<Vec<u8>>> = HashMap::new();
                for (seq, key, bytes) in model.entries.iter().skip(skip) {
                    if seq.0 <= report.last_seq {
                        expected.entry(*key).or_default().push(bytes.clone());
                    }
                }
                assert_eq!(log.batches, expected);
                drop(writer);
                let mut offline = LogReader::of_files(&place.shard(), ID).unwrap();
                for (key, batches) in model.log(FrameSeq(report.last_seq)) {
                    assert_eq!(read_all(&mut offline, key, 30_000), batches);
                }
                report.last_seq
            };
            check(&power_cut, durable);

            // Recovery killed: only the first of the staged frames had been written again.
            let again = killed.copy();
            let published = model.entries.last().map_or(FrameSeq(0), |e| e.0);
            let last = check(&killed, published);
            let staged = again.staging_file();
            prop_assert!(staged.exists());
            for (path, at, header) in frames_of(&killed.shard()) {
                if header.seq > durable.0 && header.seq < last && seed % 2 == 0 {
                    let target = again.shard().join(path.file_name().unwrap());
                    if target.exists() {
                        let bytes = fs::read(&path).unwrap();
                        let at = at as usize;
                        OpenOptions::new().write(true).open(&target).unwrap()
                            .write_all_at(&bytes[at..at + header.size()], at as u64).unwrap();
                    }
                }
            }
            check(&again, published);
            place = again;
        }
    }
}

#[test]
fn slots_carry_their_sequence_where_recovery_looks() {
    let place = Place::new();
    let (mut writer, _, _, _) = place.open();
    Model::default().append_all(&mut writer, 1, 10);
    let bytes = fs::read(place.staging_file()).unwrap();
    assert_eq!(u64_at(&bytes, STAGING_HEADER + OFF_SEQ), 1);
}

#[test]
fn verify_tells_a_torn_tail_from_damage() {
    use crate::storage::verify::{Severity, verify};
    use crate::storage::{Catalog, TopicSpec};

    let mut place = Place::new();
    let mut catalog = Catalog::open(place.store.path()).unwrap();
    catalog
        .ensure(
            &[TopicSpec {
                name: "t".to_owned(),
                partitions: 3,
                settings: Default::default(),
            }],
            1,
        )
        .unwrap();
    let mut config = place.config();
    config.store_id = catalog.store_id();
    let mut log = Log::default();
    let (mut writer, _, _) = WalWriter::open(&config, 0, &mut log).unwrap();
    let mut model = Model::default();
    for _ in 0..40 {
        model.append_all(&mut writer, 9, 3000);
        writer.flush().unwrap();
    }
    writer.close().unwrap();
    drop(catalog);
    let mut last = (0, 0);
    let report = verify(place.store.path(), |p| last = (p.done, p.total)).unwrap();
    assert!(last.0 == last.1 && last.1 > 0);
    assert_eq!(
        (report.findings.len(), report.clean, report.shards),
        (0, 1, 1)
    );
    assert_eq!((report.batches, report.records), (360, 360));

    let frames = frames_of(&place.shard());
    let (path, at, _) = frames.last().unwrap();
    let spoil = |path: &Path, at: u64| {
        OpenOptions::new()
            .write(true)
            .open(path)
            .unwrap()
            .write_all_at(&[0xff; 8], at)
            .unwrap();
    };
    spoil(path, at + 600);
    let report = verify(place.store.path(), |_| ()).unwrap();
    assert!(report.is_sound());
    let [finding] = &report.findings[..] else {
        panic!("{:?}", report.findings);
    };
    assert_eq!(
        (&finding.path, finding.position, finding.severity),
        (path, *at, Severity::TornTail)
    );
    let (path, at, _) = &frames[5];
    spoil(path, at + 600);
    let report = verify(place.store.path(), |_| ()).unwrap();
    assert!(!report.is_sound());
    assert!(
        report
            .findings
            .iter()
            .any(|f| &f.path == path && f.position == *at && f.severity == Severity::Damage)
    );
    // The name on tmpfs goes with the folder.
    place.staging = tempfile::tempdir_in("/dev/shm").unwrap();
}

#[test]
fn a_damaged_note_of_the_staging_file_removes_nothing() {
    let place = Place::new();
    let (writer, ..) = place.open();
    writer.close().unwrap();
    let other = place.store.path().join("notes.txt");
    fs::write(&other, "not Taffrail's").unwrap();
    let note = place.shard().join("staging.json");
    let text = format!(r#"{{"path":{other:?},"boot":"0"}}"#);
    fs::write(note, text).unwrap();
    let (writer, ..) = place.open();
    writer.close().unwrap();
    assert_eq!(fs::read_to_string(other).unwrap(), "not Taffrail's");
}
