//! Shows what a segment or a staging file holds, frame by frame.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::PartitionKey;
use super::lsm::codec;
use super::wal::frame::{Entries, EntryKind, FRAME_ALIGN, FRAME_HEADER, FrameError, FrameHeader};
use super::wal::frame::{LogId, OFF_SEQ, u16_at, u32_at, u64_at};
use super::wal::segment::{SEGMENT_HEADER, SegmentError, SegmentHeader};
use super::wal::staging::{STAGING_HEADER, STAGING_MAGIC, STAGING_VERSION, boot_id};
use crate::wire::record_batch;

/// Why a file cannot be shown at all.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The file system refused.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Not a segment.
    #[error("{path}: {error}")]
    Segment {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: SegmentError,
    },
    /// Not a staging file.
    #[error("{path} at byte {position}: {what}")]
    Staging {
        /// The file.
        path: PathBuf,
        /// Byte in the file.
        position: u64,
        /// What is wrong.
        what: &'static str,
    },
}

/// One entry, for show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EntryInfo {
    /// A record batch.
    Batch {
        /// Topic id.
        topic: u32,
        /// Partition.
        partition: u32,
        /// Bytes.
        bytes: usize,
        /// First offset.
        base_offset: i64,
        /// Records.
        records: i32,
        /// Largest timestamp, Unix milliseconds.
        max_timestamp: i64,
        /// -1: none.
        producer_id: i64,
        /// Sequence of the first record.
        base_sequence: i32,
        /// A gap record or other control batch.
        control: bool,
        /// What is wrong with the batch, if anything.
        error: Option<String>,
    },
    /// Part of a snapshot.
    Snapshot {
        /// From 0.
        index: u32,
        /// Parts.
        count: u32,
        /// Bytes.
        bytes: usize,
        /// They: for whoever knows what a shard keeps in its snapshots.
        #[serde(skip)]
        part: Vec<u8>,
    },
}

/// One frame, for show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FrameInfo {
    /// Byte in the file.
    pub position: u64,
    /// Bytes on disk.
    pub size: usize,
    /// Sequence.
    pub seq: u64,
    /// Place in the log.
    pub lsn: u64,
    /// Durable mark at sealing.
    pub durable: u64,
    /// Time of sealing, Unix milliseconds.
    pub time_ms: i64,
    /// Marks a clean stop.
    pub clean: bool,
    /// Entries.
    pub entries: Vec<EntryInfo>,
}

/// What goes to the caller as the file is read.
#[derive(Debug)]
pub enum Item<'a> {
    /// The next frame.
    Frame(&'a FrameInfo),
    /// What lies where no frame does; the search goes on behind it.
    Damage {
        /// Byte in the file.
        position: u64,
        /// What is there.
        error: FrameError,
    },
    /// Bytes read of the file's length.
    Progress {
        /// So far.
        done: u64,
        /// In all.
        total: u64,
    },
}

/// `scratch` is for what is compressed.
fn entry_info(kind: EntryKind, bytes: &[u8], scratch: &mut Vec<u8>) -> EntryInfo {
    match kind {
        EntryKind::Snapshot { index, count } => EntryInfo::Snapshot {
            index,
            count,
            bytes: bytes.len(),
            part: bytes.to_vec(),
        },
        EntryKind::Batch(PartitionKey { topic, partition }) => {
            let parsed = record_batch::parse_header(bytes);
            let error = match &parsed {
                Ok(_) => codec::verify(bytes, scratch).err().map(|e| e.to_string()),
                Err(e) => Some(e.to_string()),
            };
            let h = parsed.ok();
            EntryInfo::Batch {
                topic,
                partition,
                bytes: bytes.len(),
                base_offset: h.map_or(-1, |h| h.base_offset),
                records: h.map_or(0, |h| h.records_count),
                max_timestamp: h.map_or(-1, |h| h.max_timestamp),
                producer_id: h.map_or(-1, |h| h.producer_id),
                base_sequence: h.map_or(-1, |h| h.base_sequence),
                control: h.is_some_and(|h| h.is_control()),
                error,
            }
        }
    }
}

/// Reads a segment file from its header to its end; frames behind damage are found again. Returns the
/// header. Cost: reads the file once.
pub fn inspect(path: &Path, mut each: impl FnMut(Item<'_>)) -> Result<SegmentHeader, InspectError> {
    let io = |source| InspectError::Io {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    let mut head = vec![0; SEGMENT_HEADER.min(len as usize)];
    file.read_exact_at(&mut head, 0).map_err(io)?;
    let header = SegmentHeader::decode(&head).map_err(|error| InspectError::Segment {
        path: path.to_owned(),
        error,
    })?;
    let mut at = SEGMENT_HEADER as u64;
    let mut frame = Vec::new();
    let mut in_damage = false;
    let mut scratch = Vec::new();
    while at + FRAME_ALIGN as u64 <= len {
        frame.resize(FRAME_ALIGN, 0);
        file.read_exact_at(&mut frame, at).map_err(io)?;
        let lsn = header.base.wrapping_add(at);
        let checked = if header.reused && !FrameHeader::lies_here(&frame, header.id, lsn) {
            Err(FrameError::Blank)
        } else {
            FrameHeader::decode(&frame, len - at).and_then(|h| {
                h.check_place(header.id, lsn)?;
                Ok(h)
            })
        };
        let checked = match checked {
            Ok(h) => {
                frame.resize(h.size(), 0);
                debug_assert!(frame.len() >= FRAME_HEADER);
                file.read_exact_at(&mut frame, at).map_err(io)?;
                h.check_crc(&frame).map(|()| h)
            }
            Err(e) => Err(e),
        };
        match checked {
            Ok(h) => {
                in_damage = false;
                let entries = Entries::new(&frame, &h)
                    .map_while(Result::ok)
                    .map(|e| entry_info(e.kind, e.bytes, &mut scratch))
                    .collect();
                each(Item::Frame(&FrameInfo {
                    position: at,
                    size: h.size(),
                    seq: h.seq,
                    lsn: h.lsn,
                    durable: h.durable,
                    time_ms: h.time_ms,
                    clean: h.is_clean(),
                    entries,
                }));
                at += h.size() as u64;
            }
            Err(error) => {
                if error != FrameError::Blank && !in_damage {
                    each(Item::Damage {
                        position: at,
                        error,
                    });
                    in_damage = true;
                }
                at += FRAME_ALIGN as u64;
            }
        }
        each(Item::Progress {
            done: at.min(len),
            total: len,
        });
    }
    Ok(header)
}

/// A staging file, for show.
#[derive(Debug)]
pub struct Staging {
    /// Whose log.
    pub id: LogId,
    /// The kernel's id of the boot that it is of, in hexadecimal.
    pub boot: String,
    /// That is the present one.
    pub this_boot: bool,
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// By number.
    pub slots: Vec<Slot>,
}

/// What a slot of a staging file holds.
#[derive(Debug)]
pub enum Slot {
    /// Nothing yet.
    Free,
    /// The entries that were published.
    Frame {
        /// They, and the frame's place; its position is the slot's.
        frame: FrameInfo,
        /// The frame is complete, with a right CRC: it was or is being written to the disk.
        sealed: bool,
    },
    /// Neither.
    Senseless {
        /// Byte in the file.
        position: u64,
        /// What is wrong.
        error: FrameError,
    },
}

/// Reads a staging file. Of a running server's file some slots may look senseless: it writes to them.
pub fn inspect_staging(path: &Path) -> Result<Staging, InspectError> {
    let bytes = std::fs::read(path).map_err(|source| InspectError::Io {
        path: path.to_owned(),
        source,
    })?;
    let bad = |position, what| InspectError::Staging {
        path: path.to_owned(),
        position,
        what,
    };
    let Some(header) = bytes.get(..STAGING_HEADER) else {
        return Err(bad(0, "shorter than a staging file's header"));
    };
    if header[..8] != STAGING_MAGIC {
        return Err(bad(0, "not a Taffrail staging file (magic number)"));
    }
    if u32_at(header, 56) != crc32c::crc32c(&header[..56]) {
        return Err(bad(56, "the header's CRC is wrong"));
    }
    if u32_at(header, 8) != STAGING_VERSION {
        return Err(bad(8, "the file's version is not known to this program"));
    }
    let (count, slot_bytes) = (u32_at(header, 48), u64::from(u32_at(header, 52)));
    let room = (bytes.len() - STAGING_HEADER) as u64;
    if slot_bytes < FRAME_HEADER as u64 || u64::from(count) * slot_bytes > room {
        return Err(bad(48, "its slots do not fit the file"));
    }
    let mut scratch = Vec::new();
    let slots = bytes[STAGING_HEADER..]
        .chunks_exact(slot_bytes as usize)
        .take(count as usize)
        .zip(0u64..)
        .map(|(slot, number)| {
            let position = STAGING_HEADER as u64 + number * slot_bytes;
            let header = match FrameHeader::decode(slot, slot_bytes) {
                _ if u64_at(slot, OFF_SEQ) == 0 => return Slot::Free,
                Ok(header) => header,
                Err(error) => return Slot::Senseless { position, error },
            };
            let entries = Entries::new(slot, &header)
                .map_while(Result::ok)
                .map(|e| entry_info(e.kind, e.bytes, &mut scratch))
                .collect();
            let sealed = slot
                .get(..header.size())
                .is_some_and(|frame| header.check_crc(frame).is_ok());
            let frame = FrameInfo {
                position,
                size: header.size(),
                seq: header.seq,
                lsn: header.lsn,
                durable: header.durable,
                time_ms: header.time_ms,
                clean: header.is_clean(),
                entries,
            };
            Slot::Frame { frame, sealed }
        })
        .collect();
    let mut store = [0; 16];
    store.copy_from_slice(&header[16..32]);
    Ok(Staging {
        id: LogId {
            store: u128::from_le_bytes(store),
            shard: u16_at(header, 12),
        },
        boot: header[32..48].iter().map(|b| format!("{b:02x}")).collect(),
        this_boot: header[32..48] == boot_id(),
        slot_bytes,
        slots,
    })
}
