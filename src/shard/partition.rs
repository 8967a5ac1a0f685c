//! The partitions of a shard: next offsets, what is counted of them, and how far they are durable.
//!
//! Invariant: `high_watermark <= log_end` of a partition, both grow only, and the high watermark
//! covers exactly the batches whose frame is durable. Only the shard writes; any thread reads.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use crate::storage::PartitionKey;
use crate::telemetry::Counter;
use crate::wire::datagram::ErrorCode;

/// A counter for each reason why messages were not stored, in the words their producers are told.
#[derive(Debug, Default)]
pub struct Reasons([Counter; ErrorCode::ALL.len()]);

impl Reasons {
    /// Counts `n` messages; only for the shard.
    #[inline]
    pub(crate) fn add(&self, reason: ErrorCode, n: u64) {
        self.0[reason as usize].add(n);
    }

    /// Messages of one reason.
    pub fn get(&self, reason: ErrorCode) -> u64 {
        self.0[reason as usize].get()
    }

    /// Messages of every reason.
    pub fn total(&self) -> u64 {
        self.0.iter().map(Counter::get).sum()
    }

    /// Name and messages of every reason.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        ErrorCode::ALL
            .iter()
            .filter(|code| !matches!(code, ErrorCode::None | ErrorCode::Duplicate))
            .map(|&code| (code.name(), self.get(code)))
    }
}

/// What is counted of a partition since the start, in messages: what the shard took from its rings
/// is `stored + duplicate + refused + dropped`, always, as soon as a round is over.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct PartitionStats {
    /// In the log; durable up to the high watermark.
    pub stored: Counter,
    /// Retransmissions of stored ones.
    pub duplicate: Counter,
    /// Not stored, and the producer was told.
    pub refused: Reasons,
    /// Not stored, of senders that take no answer.
    pub dropped: Reasons,
    /// Record batches stored, control batches included.
    pub batches: Counter,
    /// Bytes of those.
    pub bytes: Counter,
    /// Gap records stored; each takes an offset and is no message.
    pub gaps: Counter,
    log_end: AtomicI64,
    high_watermark: AtomicI64,
}

impl PartitionStats {
    /// Offset of the next record.
    pub fn log_end(&self) -> i64 {
        self.log_end.load(Ordering::Acquire)
    }

    /// Records below this offset survive a power cut.
    pub fn high_watermark(&self) -> i64 {
        self.high_watermark.load(Ordering::Acquire)
    }
}

/// A partition as the shard sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Partition {
    pub key: PartitionKey,
    pub next_offset: i64,
    /// Frame of the newest mark, and its number in the queue of marks.
    mark_seq: u64,
    mark_number: u64,
}

/// After frame `seq` the partition's log ended at `end`.
#[derive(Clone, Copy)]
struct Mark {
    seq: u64,
    end: i64,
    partition: u32,
}

/// The partitions of a shard by their shard-local index.
pub(crate) struct Partitions {
    list: Box<[Partition]>,
    stats: Arc<[PartitionStats]>,
    /// Waiting for their frame, oldest first: a ring of a power of two.
    marks: Box<[Mark]>,
    first: u64,
    next: u64,
}

impl Partitions {
    /// `next_offsets` go with `keys`; everything below them is durable. `frames`: how many frames
    /// can be unsettled; `frame_batches`: how many batches a frame can hold.
    pub fn new(
        keys: &[PartitionKey],
        next_offsets: &[i64],
        frames: usize,
        frame_batches: usize,
    ) -> Self {
        let list: Box<[_]> = keys
            .iter()
            .zip(next_offsets)
            .map(|(&key, &next_offset)| Partition {
                key,
                next_offset,
                mark_seq: 0,
                mark_number: 0,
            })
            .collect();
        let stats: Arc<[PartitionStats]> = next_offsets
            .iter()
            .map(|&offset| PartitionStats {
                log_end: AtomicI64::new(offset),
                high_watermark: AtomicI64::new(offset),
                ..PartitionStats::default()
            })
            .collect();
        // One mark a partition a frame; one frame more for the open one.
        let marks = (frames + 1) * list.len().min(frame_batches).max(1);
        let mark = Mark {
            seq: 0,
            end: 0,
            partition: 0,
        };
        Self {
            list,
            stats,
            marks: vec![mark; marks.next_power_of_two()].into(),
            first: 0,
            next: 0,
        }
    }

    #[inline]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    #[inline]
    pub fn get(&self, index: usize) -> &Partition {
        &self.list[index]
    }

    pub fn all(&self) -> &[Partition] {
        &self.list
    }

    #[inline]
    pub fn stats(&self, index: usize) -> &PartitionStats {
        &self.stats[index]
    }

    pub fn shared_stats(&self) -> Arc<[PartitionStats]> {
        self.stats.clone()
    }

    /// Takes a published batch of `records` records and `bytes` bytes into the books; it lies in
    /// frame `seq`.
    pub fn appended(&mut self, index: usize, records: u32, bytes: usize, seq: u64) {
        let mask = self.marks.len() as u64 - 1;
        let partition = &mut self.list[index];
        partition.next_offset += i64::from(records);
        let stats = &self.stats[index];
        stats
            .log_end
            .store(partition.next_offset, Ordering::Release);
        stats.batches.add(1);
        stats.bytes.add(bytes as u64);
        if partition.mark_seq == seq && partition.mark_number >= self.first {
            self.marks[(partition.mark_number & mask) as usize].end = partition.next_offset;
            return;
        }
        if self.next - self.first > mask {
            // Cannot be while the writer has no more frames than it said; the mark that gives way
            // only makes a high watermark late, until the partition's next one.
            debug_assert!(false, "more unsettled frames than staging slots");
            self.first += 1;
        }
        partition.mark_seq = seq;
        partition.mark_number = self.next;
        self.marks[(self.next & mask) as usize] = Mark {
            seq,
            end: partition.next_offset,
            partition: index as u32,
        };
        self.next += 1;
    }

    /// Every frame up to `seq` is durable: raises the high watermarks.
    #[inline]
    pub fn durable(&mut self, seq: u64) {
        let mask = self.marks.len() as u64 - 1;
        while self.first < self.next {
            let mark = self.marks[(self.first & mask) as usize];
            if mark.seq > seq {
                break;
            }
            self.stats[mark.partition as usize]
                .high_watermark
                .store(mark.end, Ordering::Release);
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(n: u32) -> Vec<PartitionKey> {
        (0..n)
            .map(|partition| PartitionKey {
                topic: 9,
                partition,
            })
            .collect()
    }

    #[test]
    fn high_watermarks_follow_durable_frames_exactly() {
        let mut partitions = Partitions::new(&keys(3), &[0, 100, 7], 4, 10);
        let stats = partitions.shared_stats();
        let marks = |stats: &[PartitionStats]| -> Vec<i64> {
            stats.iter().map(PartitionStats::high_watermark).collect()
        };
        assert_eq!(marks(&stats), [0, 100, 7]);
        partitions.appended(0, 5, 80, 1);
        partitions.appended(1, 1, 80, 1);
        partitions.appended(0, 5, 80, 1);
        partitions.appended(1, 2, 80, 2);
        partitions.appended(0, 1, 80, 3);
        assert_eq!(marks(&stats), [0, 100, 7]);
        partitions.durable(1);
        assert_eq!(marks(&stats), [10, 101, 7]);
        partitions.appended(1, 4, 80, 3);
        partitions.durable(2);
        assert_eq!(marks(&stats), [10, 103, 7]);
        partitions.durable(3);
        assert_eq!(marks(&stats), [11, 107, 7]);
        assert_eq!(stats[1].log_end(), 107);
        assert_eq!((stats[0].batches.get(), stats[0].bytes.get()), (3, 240));
        // A frame number that comes back after its mark was settled makes a new mark.
        partitions.appended(1, 1, 80, 3);
        partitions.durable(3);
        assert_eq!(stats[1].high_watermark(), 108);
    }

    #[test]
    fn the_queue_of_marks_holds_every_partition_of_every_frame() {
        let mut partitions = Partitions::new(&keys(5), &[0; 5], 3, 4);
        for round in 0..50u64 {
            for frame in 0..4 {
                for index in 0..4 {
                    partitions.appended((index + frame) % 5, 1, 80, round * 4 + frame as u64);
                }
            }
            partitions.durable(round * 4 + 3);
        }
        for index in 0..5 {
            let stats = partitions.stats(index);
            assert_eq!(stats.high_watermark(), stats.log_end());
        }
    }
}
