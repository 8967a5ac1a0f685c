//! One PRODUCE datagram in its buffer, from the first record to the last retransmission.
//!
//! Invariant: the buffer holds room for the datagram's header, then the record batch; once closed,
//! its records never change, so that a retransmission carries the same messages under the same
//! sequence.

use crate::wire::datagram::{PRODUCE_HEADER_LEN, ProduceHeader};
use crate::wire::record_batch::{self, BatchProgress, BatchWriter};

/// Bytes of a datagram that are not records, with room for one record's own fields.
pub const DATAGRAM_OVERHEAD: usize =
    PRODUCE_HEADER_LEN + record_batch::HEADER_LEN + RECORD_OVERHEAD;
/// The most bytes that a record takes beside key and value: as for a record without key, and the
/// longer length of the key.
const RECORD_OVERHEAD: usize = record_batch::RAW_RECORD_OVERHEAD_MAX + 4;

/// A batch that takes records.
#[derive(Debug)]
pub struct OpenBatch {
    buf: Box<[u8]>,
    progress: BatchProgress,
    /// Index of its first message in the partition.
    pub first: u64,
    /// When its first message came, monotonic nanoseconds.
    pub created: u64,
}

/// A batch that is complete; to be stamped before it is sent.
#[derive(Debug)]
pub struct ClosedBatch {
    buf: Box<[u8]>,
    len: usize,
    /// Its number of messages.
    pub count: u32,
    /// Index of its first message in the partition.
    pub first: u64,
    /// When its first message came, monotonic nanoseconds.
    pub created: u64,
}

impl OpenBatch {
    /// Begins a batch in `buf`, which is longer than [`DATAGRAM_OVERHEAD`].
    pub fn new(mut buf: Box<[u8]>, first: u64, mono_ns: u64, unix_ms: i64) -> Self {
        let progress = BatchWriter::new(&mut buf[PRODUCE_HEADER_LEN..], unix_ms).suspend();
        Self {
            buf,
            progress,
            first,
            created: mono_ns,
        }
    }

    /// Number of messages so far.
    pub fn count(&self) -> u32 {
        self.progress.count() as u32
    }

    /// Appends a message; false when it does not fit.
    #[inline]
    pub fn push(&mut self, unix_ms: i64, key: Option<&[u8]>, value: Option<&[u8]>) -> bool {
        let mut writer = BatchWriter::resume(&mut self.buf[PRODUCE_HEADER_LEN..], self.progress);
        let pushed = writer.push(unix_ms, key, value).is_ok();
        self.progress = writer.suspend();
        pushed
    }

    /// Completes it; there must be at least one message.
    pub fn close(mut self) -> ClosedBatch {
        let count = self.count();
        let writer = BatchWriter::resume(&mut self.buf[PRODUCE_HEADER_LEN..], self.progress);
        let len = PRODUCE_HEADER_LEN + writer.finish(0);
        ClosedBatch {
            buf: self.buf,
            len,
            count,
            first: self.first,
            created: self.created,
        }
    }

    /// Gives the buffer back.
    pub fn into_buffer(self) -> Box<[u8]> {
        self.buf
    }
}

impl ClosedBatch {
    /// Writes the producer's identity and the sequence.
    pub fn stamp(&mut self, producer_id: i64, epoch: i16, base_sequence: i32) {
        let batch = &mut self.buf[PRODUCE_HEADER_LEN..self.len];
        record_batch::set_producer(batch, producer_id, epoch, base_sequence);
    }

    /// Writes the datagram's header.
    pub fn address(&mut self, header: &ProduceHeader) {
        header.encode(&mut self.buf);
    }

    /// The whole datagram.
    pub fn datagram(&self) -> &[u8] {
        &self.buf[..self.len]
    }

    /// Gives the buffer back.
    pub fn into_buffer(self) -> Box<[u8]> {
        self.buf
    }
}
