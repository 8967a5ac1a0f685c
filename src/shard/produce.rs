//! Record batches of the datagram protocol and of the broker: what is taken, what is refused, and how one is stored.
//!
//! Invariant: a batch that is stored was checked as a whole (length, CRC-32C, every record) and
//! differs from what its producer sent in offset and leader epoch alone; its sequence is remembered
//! exactly when it is in the log.

use crate::shard::dedupe::{Entry, Producers, Verdict};
use crate::shard::inbound::{Inbound, Kind};
use crate::shard::partition::Partitions;
use crate::storage::{Refusal, WalWriter};
use crate::wire::{
    datagram::ErrorCode,
    record_batch::{self, BatchError, BatchHeader},
};

/// The one leader epoch of a log without replicas.
const LEADER_EPOCH: i32 = 0;

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// In frame `seq`.
    Stored { base_offset: i64, seq: u64 },
    /// Was stored before.
    Duplicate { base_offset: i64 },
    /// Not stored; nothing was changed.
    Refused(ErrorCode),
    /// No room in staging now: to be tried again.
    Hold,
}

/// Checks a batch by itself. Cost: a pass over it.
fn check(batch: &[u8]) -> Result<BatchHeader, ErrorCode> {
    let header = record_batch::validate_produced(batch).map_err(|error| match error {
        BatchError::Codec(_) => ErrorCode::UnsupportedCodec,
        _ => ErrorCode::InvalidBatch,
    })?;
    let idempotent =
        header.producer_id >= 0 && header.producer_epoch >= 0 && header.base_sequence >= 0;
    if !idempotent || header.records_count < 1 {
        return Err(ErrorCode::InvalidBatch);
    }
    Ok(header)
}

/// Stores a batch in partition `index`, unless it is damaged, out of order or there already.
/// Cost: a pass for the CRC, one over the records, one copy.
pub(crate) fn append(
    item: &Inbound,
    index: usize,
    producers: &mut Producers,
    partitions: &mut Partitions,
    wal: &mut WalWriter,
) -> Outcome {
    let batch = item.payload();
    // The broker has checked its batches by itself.
    let checked = match item.kind() {
        Kind::Batch => record_batch::parse_header(batch).map_err(|_| ErrorCode::InvalidBatch),
        _ => check(batch),
    };
    let header = match checked {
        Ok(header) => header,
        Err(reason) => return Outcome::Refused(reason),
    };
    let records = header.records_count as u32;
    let idempotent = header.producer_id >= 0;
    // As on Kafka, where a producer that was forgotten goes on at its sequence.
    let forgotten =
        item.kind() == Kind::Batch && !producers.knows(index as u32, header.producer_id);
    let verdict = if !idempotent || forgotten {
        Verdict::Append
    } else {
        producers.check(
            index as u32,
            header.producer_id,
            header.producer_epoch,
            header.base_sequence,
            records,
        )
    };
    match verdict {
        Verdict::Append => {}
        Verdict::Duplicate { base_offset } => return Outcome::Duplicate { base_offset },
        Verdict::OutOfOrder => return Outcome::Refused(ErrorCode::OutOfOrder),
        Verdict::Fenced => return Outcome::Refused(ErrorCode::Fenced),
    }
    let buf = match wal.reserve(batch.len()) {
        Ok(buf) => &mut buf[..batch.len()],
        Err(Refusal::Backpressure) => return Outcome::Hold,
        Err(Refusal::Full) => return Outcome::Refused(ErrorCode::StorageFull),
        Err(Refusal::Failed) => return Outcome::Refused(ErrorCode::StorageFailed),
        Err(Refusal::TooLarge) => return Outcome::Refused(ErrorCode::TooLarge),
    };
    let partition = partitions.get(index);
    let (key, base_offset) = (partition.key, partition.next_offset);
    buf.copy_from_slice(batch);
    record_batch::set_base_offset(buf, base_offset);
    record_batch::set_leader_epoch(buf, LEADER_EPOCH);
    let seq = wal.publish(key, batch.len()).0;
    if idempotent {
        producers.record(
            index as u32,
            header.producer_id,
            header.producer_epoch,
            Entry {
                base_sequence: header.base_sequence,
                records,
                base_offset,
            },
        );
    }
    partitions.appended(index, records, batch.len(), seq);
    Outcome::Stored { base_offset, seq }
}
