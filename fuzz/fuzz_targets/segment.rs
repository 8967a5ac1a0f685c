//! A WAL segment of frames that mutations make: each 256 bytes of the input are the start of a 4096-byte
//! block. Every second input gets right places, CRCs and chain, which mutations would never find. The reader gives
//! only whole batches, in order, within the bounds it tells, and inspecting agrees with it on what is damaged.
#![no_main]

use std::cell::OnceCell;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use taffrail::storage::inspect::{EntryInfo, Item, inspect};
use taffrail::storage::wal::LogId;
use taffrail::storage::wal::frame::{FRAME_ALIGN, FRAME_HEADER, frame_crc};
use taffrail::storage::wal::segment::{SEGMENT_HEADER, SegmentHeader, segment_path};
use taffrail::storage::{LogReader, PartitionKey};
use taffrail::wire::record_batch;

const ID: LogId = LogId {
    store: 0x5eed,
    shard: 1,
};
const PIECE: usize = 256;

thread_local! {
    static DIR: OnceCell<PathBuf> = const { OnceCell::new() };
}

/// Gives the frames their places, CRCs and chain.
fn mend(bytes: &mut [u8]) {
    let (mut at, mut seq, mut prev) = (SEGMENT_HEADER, 1u64, 0u32);
    while at + FRAME_ALIGN <= bytes.len() {
        let payload = u32::from_le_bytes(bytes[at + 16..at + 20].try_into().unwrap()) as usize;
        let size = (FRAME_HEADER + payload).next_multiple_of(FRAME_ALIGN);
        if size > bytes.len() - at {
            return;
        }
        let frame = &mut bytes[at..at + size];
        frame[..5].copy_from_slice(b"TAFF\x01");
        frame[6..8].copy_from_slice(&ID.shard.to_le_bytes());
        frame[8..16].copy_from_slice(&seq.to_le_bytes());
        frame[24..32].copy_from_slice(&(at as u64).to_le_bytes());
        frame[48..56].copy_from_slice(&(ID.store as u64).to_le_bytes());
        frame[56..60].copy_from_slice(&prev.to_le_bytes());
        prev = frame_crc(frame);
        frame[60..64].copy_from_slice(&prev.to_le_bytes());
        seq += 1;
        at += size;
    }
}

/// A folder in memory; scripts/fuzz.sh names one that it removes.
fn scratch() -> PathBuf {
    std::env::var_os("TMPDIR").map_or("/dev/shm".into(), PathBuf::from)
}

fuzz_target!(|data: &[u8]| {
    let Some((&control, input)) = data.split_first() else {
        return;
    };
    let blocks = input.len().div_ceil(PIECE).clamp(1, 16);
    let mut bytes = vec![0; SEGMENT_HEADER + blocks * FRAME_ALIGN];
    let header = SegmentHeader {
        id: ID,
        base: 0,
        size: bytes.len() as u64,
        first_seq: 1,
        prev_crc: 0,
        reused: control & 4 != 0,
    };
    header.encode(&mut bytes);
    for (piece, block) in input
        .chunks(PIECE)
        .zip(bytes[SEGMENT_HEADER..].chunks_mut(FRAME_ALIGN))
    {
        block[..piece.len()].copy_from_slice(piece);
    }
    if control & 1 != 0 {
        mend(&mut bytes);
    }
    if control & 2 != 0 {
        let flip = (usize::from(control) << 6) % bytes.len();
        bytes[flip] ^= 1;
    }
    let dir = DIR.with(|dir| {
        dir.get_or_init(|| {
            let dir = scratch().join(format!("segment-{}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            dir
        })
        .clone()
    });
    let path = segment_path(&dir, 0);
    std::fs::write(&path, &bytes).unwrap();

    let mut keys = Vec::new();
    let _ = inspect(&path, |item| {
        if let Item::Frame(frame) = item {
            assert!(frame.position as usize + frame.size <= bytes.len());
            for entry in &frame.entries {
                if let EntryInfo::Batch {
                    topic, partition, ..
                } = entry
                {
                    keys.push(PartitionKey {
                        topic: *topic,
                        partition: *partition,
                    });
                }
            }
        }
    });
    let Ok(mut reader) = LogReader::of_files(&dir, ID) else {
        return;
    };
    for key in keys {
        let (start, end) = reader.bounds(key).unwrap();
        let mut out = Vec::new();
        if let Ok(outcome) = reader.read(key, start, 1 << 20, &mut out) {
            assert_eq!(outcome.bytes, out.len());
            let mut at = 0;
            for _ in 0..outcome.batches {
                let batch = record_batch::parse_header(&out[at..]).expect("only batches");
                at += batch.total_len();
            }
            assert_eq!(at, out.len());
            assert!(outcome.next_offset <= outcome.end && outcome.end == end);
        }
        let _ = reader.offset_for_time(key, 0);
    }
});
