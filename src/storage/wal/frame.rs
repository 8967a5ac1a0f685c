//! The frame: what one group commit writes, in the staging file and in a segment alike.
//!
//! Invariant: every bit of a frame on disk, padding included, is under its CRC-32C or is that CRC;
//! and a frame names its place (store, shard, sequence, LSN) and its predecessor's CRC. So a torn,
//! stale or foreign frame is never taken for the next one. A frame also says how far the log was
//! durable when it was sealed: a frame found *behind* a damaged one thereby proves whether the damaged
//! one had once been durable (damage, which needs a human) or not (a torn tail, which recovery cuts).
//! Integers are little-endian. The layout is specified in docs/formats.md.

use crate::storage::PartitionKey;

#[cfg(target_endian = "big")]
compile_error!("the storage formats are little-endian and are written in place");

/// Frames begin and end at multiples of this: the largest logical block of the disks that O_DIRECT
/// is used on.
pub const FRAME_ALIGN: usize = 4096;
/// Bytes of a frame's header.
pub const FRAME_HEADER: usize = 64;
/// Bytes of an entry's header.
pub const ENTRY_HEADER: usize = 16;
/// Entries begin at multiples of this inside a frame.
pub const ENTRY_ALIGN: usize = 8;
/// First four bytes of a frame.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"TAFF");
/// Version of the frame format.
pub const FRAME_VERSION: u8 = 1;
/// No frame is larger; bounds what a reader of a damaged file allocates.
pub const MAX_FRAME: usize = 64 << 20;
/// Flag: the writer closed the log with this frame; nothing was in flight.
pub const FLAG_CLEAN: u8 = 1;

pub(crate) const OFF_VERSION: usize = 4;
pub(crate) const OFF_FLAGS: usize = 5;
pub(crate) const OFF_SHARD: usize = 6;
pub(crate) const OFF_SEQ: usize = 8;
pub(crate) const OFF_PUBLISHED: usize = 16;
pub(crate) const OFF_LSN: usize = 24;
pub(crate) const OFF_DURABLE: usize = 32;
pub(crate) const OFF_TIME: usize = 40;
pub(crate) const OFF_STORE: usize = 48;
pub(crate) const OFF_PREV_CRC: usize = 56;
pub(crate) const OFF_CRC: usize = 60;

/// Which log a frame belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogId {
    /// Random id of the store, made with it.
    pub store: u128,
    /// Shard number.
    pub shard: u16,
}

impl LogId {
    /// The part of the store's id that each frame carries.
    pub(crate) fn store_tag(self) -> u64 {
        self.store as u64
    }
}

/// A frame's header, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// [`FLAG_CLEAN`] or 0.
    pub flags: u8,
    /// Shard number.
    pub shard: u16,
    /// Sequence number; the first frame of a log is 1.
    pub seq: u64,
    /// Bytes of entries.
    pub payload: u32,
    /// Number of entries.
    pub entries: u32,
    /// Where the frame lies in the log.
    pub lsn: u64,
    /// Every frame up to this one was durable when this one was sealed.
    pub durable: u64,
    /// When the frame was sealed, Unix milliseconds.
    pub time_ms: i64,
    /// Low half of the store's id.
    pub store_tag: u64,
    /// CRC of the frame before.
    pub prev_crc: u32,
    /// CRC-32C of the whole frame but this field.
    pub crc: u32,
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// All zero where the magic number would be, or an older segment's bytes: never written.
    #[error("never written")]
    Blank,
    /// Something else lies there.
    #[error("no frame begins here (magic number {0:#010x})")]
    Magic(u32),
    /// A newer format, or damage.
    #[error("frame version {0} is not known (this program knows {FRAME_VERSION})")]
    Version(u8),
    /// The length makes no sense, or reaches past the file or buffer.
    #[error("the frame claims {payload} bytes of payload where {room} fit")]
    Length {
        /// What the header says.
        payload: u32,
        /// What there is room for.
        room: u64,
    },
    /// Another store's or shard's frame.
    #[error("the frame belongs to another store or shard")]
    Foreign,
    /// A frame of another place.
    #[error("the frame says it lies at LSN {found}, it was found at {expected}")]
    Lsn {
        /// What the header says.
        found: u64,
        /// Where it was read.
        expected: u64,
    },
    /// Not the next frame.
    #[error("frame sequence {found} where {expected} comes next")]
    Sequence {
        /// What the header says.
        found: u64,
        /// What comes next.
        expected: u64,
    },
    /// Next by number, but it follows another frame.
    #[error(
        "the frame follows a frame with CRC {found:#010x}; the one before has {expected:#010x}"
    )]
    Chain {
        /// What the header says.
        found: u32,
        /// CRC of the frame before.
        expected: u32,
    },
    /// Torn or damaged.
    #[error("the frame's CRC is {found:#010x}, its bytes give {computed:#010x}")]
    Crc {
        /// What the header says.
        found: u32,
        /// What the bytes give.
        computed: u32,
    },
    /// The frame is whole but its entries are not: a writer's error.
    #[error("entry {index} at byte {at} of the frame does not fit the payload")]
    Entry {
        /// Number of the entry.
        index: u32,
        /// Byte inside the frame.
        at: usize,
    },
}

#[inline]
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[inline]
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

#[inline]
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

/// Rounds up to a multiple of the frame alignment.
#[inline]
pub const fn align_frame(len: usize) -> usize {
    len.next_multiple_of(FRAME_ALIGN)
}

/// Bytes that an entry with `len` bytes of content takes in a frame.
#[inline]
pub const fn entry_size(len: usize) -> usize {
    ENTRY_HEADER + len.next_multiple_of(ENTRY_ALIGN)
}

/// Packs the published length and the entry count into the word that is stored atomically.
#[inline]
pub(crate) const fn pack_published(payload: u32, entries: u32) -> u64 {
    payload as u64 | (entries as u64) << 32
}

#[inline]
pub(crate) const fn unpack_published(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

/// CRC-32C of a whole frame; `frame` is header, payload and padding.
pub fn frame_crc(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..OFF_CRC]), &frame[FRAME_HEADER..])
}

impl FrameHeader {
    /// Decodes the header at the start of `bytes` without looking at the CRC. `room`: bytes from the
    /// frame's start to the end of where it may lie. Cost: a few ns.
    pub fn decode(bytes: &[u8], room: u64) -> Result<FrameHeader, FrameError> {
        if bytes.len() < FRAME_HEADER {
            return Err(FrameError::Length {
                payload: 0,
                room: bytes.len() as u64,
            });
        }
        match u32_at(bytes, 0) {
            FRAME_MAGIC => {}
            0 => return Err(FrameError::Blank),
            other => return Err(FrameError::Magic(other)),
        }
        if bytes[OFF_VERSION] != FRAME_VERSION {
            return Err(FrameError::Version(bytes[OFF_VERSION]));
        }
        let (payload, entries) = unpack_published(u64_at(bytes, OFF_PUBLISHED));
        let header = FrameHeader {
            flags: bytes[OFF_FLAGS],
            shard: u16_at(bytes, OFF_SHARD),
            seq: u64_at(bytes, OFF_SEQ),
            payload,
            entries,
            lsn: u64_at(bytes, OFF_LSN),
            durable: u64_at(bytes, OFF_DURABLE),
            time_ms: u64_at(bytes, OFF_TIME) as i64,
            store_tag: u64_at(bytes, OFF_STORE),
            prev_crc: u32_at(bytes, OFF_PREV_CRC),
            crc: u32_at(bytes, OFF_CRC),
        };
        if header.size() > MAX_FRAME || header.size() as u64 > room {
            return Err(FrameError::Length { payload, room });
        }
        Ok(header)
    }

    /// Bytes of the frame on disk: a multiple of [`FRAME_ALIGN`].
    pub fn size(&self) -> usize {
        align_frame(FRAME_HEADER + self.payload as usize)
    }

    /// True for the frame that ends a cleanly closed log.
    pub fn is_clean(&self) -> bool {
        self.flags & FLAG_CLEAN != 0
    }

    /// Checks that this is a frame of log `id` lying at `lsn`.
    pub fn check_place(&self, id: LogId, lsn: u64) -> Result<(), FrameError> {
        if self.store_tag != id.store_tag() || self.shard != id.shard {
            return Err(FrameError::Foreign);
        }
        if self.lsn != lsn {
            return Err(FrameError::Lsn {
                found: self.lsn,
                expected: lsn,
            });
        }
        Ok(())
    }

    /// Whether a frame of this log and place begins at the start of `bytes`, whole or not. In a file that
    /// was an older segment, all else was not written since. Cost: a few ns.
    pub fn lies_here(bytes: &[u8], id: LogId, lsn: u64) -> bool {
        bytes.len() >= FRAME_HEADER
            && u32_at(bytes, 0) == FRAME_MAGIC
            && u64_at(bytes, OFF_STORE) == id.store_tag()
            && u16_at(bytes, OFF_SHARD) == id.shard
            && u64_at(bytes, OFF_LSN) == lsn
    }

    /// Checks that this frame follows the one before.
    pub fn check_chain(&self, next_seq: u64, prev_crc: u32) -> Result<(), FrameError> {
        if self.seq != next_seq {
            return Err(FrameError::Sequence {
                found: self.seq,
                expected: next_seq,
            });
        }
        if self.prev_crc != prev_crc {
            return Err(FrameError::Chain {
                found: self.prev_crc,
                expected: prev_crc,
            });
        }
        Ok(())
    }

    /// Checks the CRC; `frame` is the whole frame ([`FrameHeader::size`] bytes).
    pub fn check_crc(&self, frame: &[u8]) -> Result<(), FrameError> {
        let computed = frame_crc(frame);
        if computed != self.crc {
            return Err(FrameError::Crc {
                found: self.crc,
                computed,
            });
        }
        Ok(())
    }
}

/// What an entry holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A record batch of a partition.
    Batch(PartitionKey),
    /// Part `index` of `count` of a snapshot of the shard's state.
    Snapshot {
        /// From 0.
        index: u32,
        /// Parts of the snapshot.
        count: u32,
    },
}

const KIND_BATCH: u8 = 1;
const KIND_SNAPSHOT: u8 = 2;

impl EntryKind {
    /// Encodes an entry's header for `len` bytes of content.
    #[inline]
    pub(crate) fn encode(self, len: u32) -> [u8; ENTRY_HEADER] {
        let (kind, a, b) = match self {
            EntryKind::Batch(key) => (KIND_BATCH, key.topic, key.partition),
            EntryKind::Snapshot { index, count } => (KIND_SNAPSHOT, index, count),
        };
        let mut out = [0; ENTRY_HEADER];
        out[0..4].copy_from_slice(&len.to_le_bytes());
        out[4] = kind;
        out[8..12].copy_from_slice(&a.to_le_bytes());
        out[12..16].copy_from_slice(&b.to_le_bytes());
        out
    }
}

/// One entry of a frame.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// What it is.
    pub kind: EntryKind,
    /// Its content.
    pub bytes: &'a [u8],
    /// Byte inside the frame where the entry's header begins.
    pub at: usize,
}

/// Iterates over the entries of a frame; ends after the first error.
pub struct Entries<'a> {
    frame: &'a [u8],
    at: usize,
    end: usize,
    index: u32,
    count: u32,
}

impl<'a> Entries<'a> {
    /// `frame` holds at least header and payload of a frame whose header is `header`.
    pub fn new(frame: &'a [u8], header: &FrameHeader) -> Entries<'a> {
        Entries {
            frame,
            at: FRAME_HEADER,
            end: (FRAME_HEADER + header.payload as usize).min(frame.len()),
            index: 0,
            count: header.entries,
        }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, FrameError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.index == self.count {
            // The entries must fill the payload exactly.
            if self.at == self.end {
                return None;
            }
            let error = FrameError::Entry {
                index: self.index,
                at: self.at,
            };
            self.at = self.end;
            return Some(Err(error));
        }
        let at = self.at;
        let error = FrameError::Entry {
            index: self.index,
            at,
        };
        let parsed = (|| {
            let header = self.frame.get(at..at + ENTRY_HEADER)?;
            let len = u32_at(header, 0) as usize;
            let end = at.checked_add(entry_size(len))?;
            if end > self.end {
                return None;
            }
            let (a, b) = (u32_at(header, 8), u32_at(header, 12));
            let kind = match header[4] {
                KIND_BATCH => EntryKind::Batch(PartitionKey {
                    topic: a,
                    partition: b,
                }),
                KIND_SNAPSHOT => EntryKind::Snapshot { index: a, count: b },
                _ => return None,
            };
            self.at = end;
            Some(Entry {
                kind,
                bytes: &self.frame[at + ENTRY_HEADER..at + ENTRY_HEADER + len],
                at,
            })
        })();
        match parsed {
            Some(entry) => {
                self.index += 1;
                Some(Ok(entry))
            }
            None => {
                self.index = self.count;
                self.at = self.end;
                Some(Err(error))
            }
        }
    }
}
