//! The parts of a snapshot: a shard's state inside its own log, offsets and producer windows.
//!
//! Invariant: a part stands for itself, and one that is malformed is refused as a whole. A part is at most [`PART_MAX`] bytes;
//! all integers are little-endian:
//!
//! ```text
//! part      = magic u32 ("TFSN"), version u16 (1), reserved u16, items u32, items…
//! partition = tag u8 (1), topic u32, partition u32, next_offset i64
//! producer  = tag u8 (2), topic u32, partition u32, producer_id i64, epoch i16, batches u8,
//!             batches × { base_sequence i32, records u32, base_offset i64 }   oldest first
//! ```
//!
//! Producers come in the order in which the table would forget them.

use super::frame::{FRAME_HEADER, entry_size};
use super::writer::MIN_COMMIT;
use crate::storage::PartitionKey;

/// First four bytes of a part.
pub const PART_MAGIC: [u8; 4] = *b"TFSN";
/// Version of the format.
pub const PART_VERSION: u16 = 1;
/// No part is larger: it fits the smallest commit, and is small beside most, so that it never wastes much of one.
pub const PART_MAX: usize = 60 << 10;
const _: () = assert!(PART_MAX + FRAME_HEADER + entry_size(0) <= MIN_COMMIT);

const PART_HEADER: usize = 12;
const TAG_PARTITION: u8 = 1;
const TAG_PRODUCER: u8 = 2;
const PARTITION_LEN: usize = 17;
const PRODUCER_HEAD: usize = 20;
/// Bytes of one of a producer's batches.
pub(crate) const BATCH_LEN: usize = 16;

/// Partitions that fit a part.
pub(crate) const PARTITIONS_A_PART: usize = (PART_MAX - PART_HEADER) / PARTITION_LEN;

/// Producers with `window` batches each that fit a part.
pub(crate) const fn producers_a_part(window: usize) -> usize {
    (PART_MAX - PART_HEADER) / (PRODUCER_HEAD + window * BATCH_LEN)
}

/// Writes a part.
pub(crate) struct PartWriter<'a> {
    buf: &'a mut [u8],
    at: usize,
    items: u32,
}

impl PartWriter<'_> {
    /// Into `buf`, [`PART_MAX`] bytes.
    pub(crate) fn new(buf: &mut [u8]) -> PartWriter<'_> {
        let (at, items) = (0, 0);
        let mut part = PartWriter { buf, at, items };
        part.put(&PART_MAGIC);
        part.put(&PART_VERSION.to_le_bytes());
        part.put(&[0; 2]);
        part.put(&[0; 4]); // items, at the end
        part
    }

    fn put(&mut self, bytes: &[u8]) {
        self.buf[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    fn item(&mut self, tag: u8, key: PartitionKey) {
        self.put(&[tag]);
        self.put(&key.topic.to_le_bytes());
        self.put(&key.partition.to_le_bytes());
        self.items += 1;
    }

    /// Adds a partition.
    pub(crate) fn partition(&mut self, key: PartitionKey, next_offset: i64) {
        self.item(TAG_PARTITION, key);
        self.put(&next_offset.to_le_bytes());
    }

    /// Adds a producer; `batches` calls of [`PartWriter::batch`] follow, the oldest first.
    pub(crate) fn producer(&mut self, key: PartitionKey, id: i64, epoch: i16, batches: u8) {
        self.item(TAG_PRODUCER, key);
        self.put(&id.to_le_bytes());
        self.put(&epoch.to_le_bytes());
        self.put(&[batches]);
    }

    /// Adds a batch of the producer.
    pub(crate) fn batch(&mut self, base_sequence: i32, records: u32, base_offset: i64) {
        self.put(&base_sequence.to_le_bytes());
        self.put(&records.to_le_bytes());
        self.put(&base_offset.to_le_bytes());
    }

    /// Ends the part; gives its length.
    pub(crate) fn finish(self) -> usize {
        self.buf[8..12].copy_from_slice(&self.items.to_le_bytes());
        self.at
    }
}

/// One thing that a part says.
pub(crate) enum Item<'a> {
    Partition(PartitionKey, i64),
    Producer {
        key: PartitionKey,
        producer_id: i64,
        epoch: i16,
        /// Its batches: [`batches`].
        window: &'a [u8],
    },
}

struct In<'a>(&'a [u8]);

impl<'a> In<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn key(&mut self) -> Option<PartitionKey> {
        Some(PartitionKey {
            topic: u32::from_le_bytes(self.array()?),
            partition: u32::from_le_bytes(self.array()?),
        })
    }

    fn item(&mut self) -> Option<Item<'a>> {
        match self.array()? {
            [TAG_PARTITION] => Some(Item::Partition(
                self.key()?,
                i64::from_le_bytes(self.array()?),
            )),
            [TAG_PRODUCER] => {
                let key = self.key()?;
                let producer_id = i64::from_le_bytes(self.array()?);
                let epoch = i16::from_le_bytes(self.array()?);
                let [batches] = self.array()?;
                let window = self.take(usize::from(batches) * BATCH_LEN)?;
                Some(Item::Producer {
                    key,
                    producer_id,
                    epoch,
                    window,
                })
            }
            _ => None,
        }
    }
}

/// Items of a part; `None` when it is malformed, before anything of it is used.
pub(crate) fn parse(part: &[u8]) -> Option<Vec<Item<'_>>> {
    let mut input = In(part);
    if input.array()? != PART_MAGIC || u16::from_le_bytes(input.array()?) != PART_VERSION {
        return None;
    }
    let _reserved: [u8; 2] = input.array()?;
    let count = u32::from_le_bytes(input.array()?);
    // The smallest item bounds what a wrong count can make us allocate.
    let mut items = Vec::with_capacity((count as usize).min(part.len() / PARTITION_LEN));
    for _ in 0..count {
        items.push(input.item()?);
    }
    input.0.is_empty().then_some(items)
}

/// Sequence, records and offset of each batch of a producer.
pub(crate) fn batches(window: &[u8]) -> impl Iterator<Item = (i32, u32, i64)> + '_ {
    window.as_chunks::<BATCH_LEN>().0.iter().map(|bytes| {
        let [s0, s1, s2, s3, r0, r1, r2, r3, offset @ ..] = *bytes;
        (
            i32::from_le_bytes([s0, s1, s2, s3]),
            u32::from_le_bytes([r0, r1, r2, r3]),
            i64::from_le_bytes(offset),
        )
    })
}
