//! A shard's log as a killed server leaves it: a WAL segment and a staging file of frames that mutations make, each 256
//! bytes of the input the start of a 4096-byte block or of a slot. Bits of the first byte give them right places, CRCs
//! and chain. Opening either refuses and changes nothing, or gives a log that after a clean close opens again, clean
//! (an empty one has no mark of it) and uncut, with the same batches.
#![no_main]

use std::fs;
use std::path::{Path, PathBuf};

use libfuzzer_sys::fuzz_target;
use taffrail::storage::wal::LogId;
use taffrail::storage::wal::frame::{FRAME_ALIGN, FRAME_HEADER, frame_crc};
use taffrail::storage::wal::segment::{SEGMENT_HEADER, SegmentHeader, segment_path, shard_dir};
use taffrail::storage::wal::staging::{STAGING_HEADER, STAGING_MAGIC, STAGING_VERSION, file_name};
use taffrail::storage::{PartitionKey, Replay, WalConfig, WalError, WalWriter};

const ID: LogId = LogId {
    store: 0x5eed,
    shard: 1,
};
const PIECE: usize = 256;
/// The smallest that the writer takes.
const SLOT: usize = 64 << 10;
const SLOTS: usize = 4;

/// Where the log has come to.
struct Place {
    lsn: usize,
    seq: u64,
    prev: u32,
}

impl Place {
    /// Makes the frame at the start of `bytes` the log's next one, and sealed; false where it does not fit.
    fn put(&mut self, bytes: &mut [u8]) -> bool {
        let payload = u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
        let size = (FRAME_HEADER + payload).next_multiple_of(FRAME_ALIGN);
        if size > bytes.len() {
            return false;
        }
        let frame = &mut bytes[..size];
        frame[..5].copy_from_slice(b"TAFF\x01");
        frame[6..8].copy_from_slice(&ID.shard.to_le_bytes());
        frame[8..16].copy_from_slice(&self.seq.to_le_bytes());
        frame[24..32].copy_from_slice(&(self.lsn as u64).to_le_bytes());
        frame[48..56].copy_from_slice(&(ID.store as u64).to_le_bytes());
        frame[56..60].copy_from_slice(&self.prev.to_le_bytes());
        self.prev = frame_crc(frame);
        frame[60..64].copy_from_slice(&self.prev.to_le_bytes());
        self.seq += 1;
        self.lsn += size;
        true
    }
}

#[derive(Default, PartialEq, Debug)]
struct Seen {
    snapshot: Vec<Vec<u8>>,
    batches: Vec<(PartitionKey, Vec<u8>)>,
}

impl Replay for Seen {
    fn snapshot(&mut self, part: &[u8], index: u32, count: u32) {
        assert!(index < count && index as usize == self.snapshot.len() && self.batches.is_empty());
        self.snapshot.push(part.to_vec());
    }
    fn batch(&mut self, key: PartitionKey, batch: &[u8]) {
        self.batches.push((key, batch.to_vec()));
    }
}

fn boot() -> u128 {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    u128::from_str_radix(&text.trim().replace('-', ""), 16).unwrap()
}

fn files(dirs: [&Path; 2]) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = dirs
        .iter()
        .flat_map(|dir| fs::read_dir(dir).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file() && path.file_name().unwrap() != "lock")
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

/// A folder in memory; scripts/fuzz.sh names one that it removes.
fn scratch() -> PathBuf {
    std::env::var_os("TMPDIR").map_or("/dev/shm".into(), PathBuf::from)
}

fuzz_target!(|data: &[u8]| {
    let [control, split, input @ ..] = data else {
        return;
    };
    let root = scratch().join(format!("recovery-{}", std::process::id()));
    let _ = fs::remove_dir_all(&root);
    let (log, staging) = (shard_dir(&root, ID.shard), root.join("staging"));
    fs::create_dir_all(&log).unwrap();
    fs::create_dir_all(&staging).unwrap();

    let pieces: Vec<&[u8]> = input.chunks(PIECE).collect();
    let (in_log, in_slots) = pieces.split_at(pieces.len().min(usize::from(split % 8)));
    let mut bytes = vec![0; SEGMENT_HEADER + 8 * FRAME_ALIGN];
    let size = bytes.len() as u64;
    SegmentHeader {
        id: ID,
        base: 0,
        size,
        first_seq: 1,
        prev_crc: 0,
        reused: split & 16 != 0,
    }
    .encode(&mut bytes);
    for (piece, block) in in_log
        .iter()
        .zip(bytes[SEGMENT_HEADER..].chunks_mut(FRAME_ALIGN))
    {
        block[..piece.len()].copy_from_slice(piece);
    }
    let mut place = Place {
        lsn: SEGMENT_HEADER,
        seq: 1,
        prev: 0,
    };
    if control & 1 != 0 {
        for _ in in_log {
            let at = place.lsn;
            if at + FRAME_ALIGN > bytes.len() || !place.put(&mut bytes[at..]) {
                break;
            }
        }
    }
    if control & 2 != 0 {
        let flip = (usize::from(*split) << 7) % bytes.len();
        bytes[flip] ^= 1;
    }
    if control & 4 == 0 || !in_log.is_empty() {
        fs::write(segment_path(&log, 0), &bytes).unwrap();
    }

    if control & 8 != 0 {
        let mut staged = vec![0; STAGING_HEADER + SLOTS * SLOT];
        staged[..8].copy_from_slice(&STAGING_MAGIC);
        staged[8..12].copy_from_slice(&STAGING_VERSION.to_le_bytes());
        staged[12..14].copy_from_slice(&ID.shard.to_le_bytes());
        staged[16..32].copy_from_slice(&ID.store.to_le_bytes());
        staged[32..48].copy_from_slice(&boot().to_be_bytes());
        staged[48..52].copy_from_slice(&(SLOTS as u32).to_le_bytes());
        staged[52..56].copy_from_slice(&(SLOT as u32).to_le_bytes());
        let crc = crc32c::crc32c(&staged[..56]);
        staged[56..60].copy_from_slice(&crc.to_le_bytes());
        for (piece, slot) in in_slots
            .iter()
            .zip(staged[STAGING_HEADER..].chunks_mut(SLOT))
        {
            slot[..piece.len()].copy_from_slice(piece);
            if control & 16 != 0 {
                // Behind the segment comes the next one's header.
                let room = (size as usize).saturating_sub(place.lsn);
                let payload = u32::from_le_bytes(slot[16..20].try_into().unwrap()) as usize;
                if room != 0 && FRAME_HEADER + payload > room {
                    place.lsn = size as usize + SEGMENT_HEADER;
                }
                place.put(slot);
                // As a kill before the seal leaves it.
                if control & 32 != 0 {
                    slot[56..64].fill(0);
                }
            }
        }
        if control & 64 != 0 {
            staged[usize::from(*split) % 64] ^= 1;
        }
        fs::write(staging.join(file_name(ID)), &staged).unwrap();
    }

    let config = WalConfig {
        segment_size: 4 * SLOT as u64,
        prepared_segments: 1,
        staging_size: (SLOTS * SLOT) as u64,
        staging_dir: Some(staging.clone()),
        commit_size: SLOT,
        accept_damage: control & 128 != 0,
        ..WalConfig::new(&root, ID.store)
    };
    let before = files([&log, &staging]);
    let mut first = Seen::default();
    match WalWriter::open(&config, ID.shard, &mut first) {
        Ok((writer, _, report)) => {
            assert_eq!(report.batches_replayed as usize, first.batches.len());
            writer.close().expect("closes");
            let mut second = Seen::default();
            let (writer, _, again) =
                WalWriter::open(&config, ID.shard, &mut second).expect("opens again");
            assert!(
                (again.clean || again.last_seq == 0)
                    && again.cut.is_none()
                    && again.staged_frames == 0,
                "{again:?}"
            );
            assert!(again.last_seq >= report.last_seq && again.end_lsn >= report.end_lsn);
            // A snapshot among the staged frames stands for what was before it.
            assert!(
                first.batches.ends_with(&second.batches),
                "{report:?} {again:?}"
            );
            if report.staged_frames == 0 {
                assert_eq!(first, second);
            }
            writer.close().expect("closes again");
        }
        Err(
            WalError::Damaged { .. }
            | WalError::StagingMismatch { .. }
            | WalError::StagingForeign { .. },
        ) => assert!(before == files([&log, &staging]), "refused, and changed"),
        Err(error) => panic!("{error}"),
    }
    fs::remove_dir_all(&root).unwrap();
});
