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
    start: AtomicI64,
}

impl PartitionStats {
    /// Of a partition whose log ends at `end`, all of it durable.
    pub(crate) fn new(end: i64) -> Self {
        Self {
            log_end: AtomicI64::new(end),
            high_watermark: AtomicI64::new(end),
            ..Self::default()
        }
    }

    /// Offset of the first record that readers are shown.
    pub fn start_offset(&self) -> i64 {
        self.start.load(Ordering::Acquire)
    }

    /// Moves the start up to `offset`, never down. For whoever keeps it across restarts, on any thread;
    /// the shard does not touch it.
    pub fn raise_start(&self, offset: i64) {
        self.start.fetch_max(offset, Ordering::AcqRel);
    }

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
#[derive(Clone, Debug)]
pub(crate) struct Partition {
    pub key: PartitionKey,
    pub next_offset: i64,
    /// Its topic was deleted: it takes no more messages.
    pub retired: bool,
    stats: Arc<PartitionStats>,
    /// Frame of the newest mark, and its number in the queue of marks.
    mark_seq: u64,
    mark_number: u64,
}

impl Partition {
    fn new(key: PartitionKey, next_offset: i64, stats: Arc<PartitionStats>) -> Self {
        Self {
            key,
            next_offset,
            retired: false,
            stats,
            mark_seq: 0,
            mark_number: 0,
        }
    }
}

/// After frame `seq` the partition's log ended at `end`.
#[derive(Clone, Copy)]
struct Mark {
    seq: u64,
    end: i64,
    partition: u32,
}

/// What bounds the queue of marks: how many frames can be unsettled, and how many batches one can hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub frames: usize,
    pub frame_batches: usize,
}

/// The memory of a number of partitions: allocated by whoever adds some, so that the shard's loop need not.
pub(crate) struct Tables {
    list: Vec<Partition>,
    /// Waiting for their frame, oldest first: a ring of a power of two.
    marks: Box<[Mark]>,
    /// By partition and one more: the shard's, to group messages; zero.
    pub places: Box<[u16]>,
}

impl Tables {
    /// For at most `capacity` partitions.
    pub fn new(capacity: usize, limits: Limits) -> Self {
        // One mark a partition a frame; one frame more for the open one.
        let marks = (limits.frames + 1) * capacity.min(limits.frame_batches).max(1);
        let mark = Mark {
            seq: 0,
            end: 0,
            partition: 0,
        };
        Self {
            list: Vec::with_capacity(capacity),
            marks: vec![mark; marks.next_power_of_two()].into(),
            places: vec![0; capacity + 1].into(),
        }
    }

    /// Partitions that there is room for.
    pub fn capacity(&self) -> usize {
        self.places.len() - 1
    }
}

/// A partition to be added.
pub(crate) type NewPartition = (PartitionKey, Arc<PartitionStats>);

/// The partitions of a shard by their shard-local index.
pub(crate) struct Partitions {
    pub tables: Tables,
    first: u64,
    next: u64,
}

impl Partitions {
    /// `next_offsets` go with `keys`; everything below them is durable.
    pub fn new(keys: &[PartitionKey], next_offsets: &[i64], limits: Limits) -> Self {
        let mut tables = Tables::new(keys.len(), limits);
        tables
            .list
            .extend(keys.iter().zip(next_offsets).map(|(&key, &offset)| {
                Partition::new(key, offset, Arc::new(PartitionStats::new(offset)))
            }));
        Self {
            tables,
            first: 0,
            next: 0,
        }
    }

    #[inline]
    pub fn len(&self) -> usize {
        self.tables.list.len()
    }

    /// Moves into larger tables and leaves the old ones in their place, to be dropped elsewhere. Cost: a copy.
    pub fn grow(&mut self, tables: &mut Tables) {
        debug_assert!(tables.list.is_empty() && tables.capacity() >= self.len());
        tables.list.append(&mut self.tables.list);
        let (old, new) = (
            self.tables.marks.len() as u64 - 1,
            tables.marks.len() as u64 - 1,
        );
        for number in self.first..self.next {
            tables.marks[(number & new) as usize] = self.tables.marks[(number & old) as usize];
        }
        std::mem::swap(&mut self.tables, tables);
    }

    /// Adds a partition as the next index; there must be room.
    pub fn add(&mut self, (key, stats): NewPartition) {
        debug_assert!(self.len() < self.tables.capacity());
        self.tables
            .list
            .push(Partition::new(key, stats.log_end(), stats));
    }

    /// Takes no more messages for a partition; its index stays taken, so that what is still on its way
    /// to it never reaches another. Its counters are exchanged for `stats`, to be dropped elsewhere.
    pub fn retire(&mut self, index: usize, stats: &mut Arc<PartitionStats>) {
        if let Some(partition) = self.tables.list.get_mut(index) {
            partition.retired = true;
            std::mem::swap(&mut partition.stats, stats);
        }
    }

    #[inline]
    pub fn get(&self, index: usize) -> &Partition {
        &self.tables.list[index]
    }

    pub fn all(&self) -> &[Partition] {
        &self.tables.list
    }

    #[inline]
    pub fn stats(&self, index: usize) -> &PartitionStats {
        &self.tables.list[index].stats
    }

    pub fn shared_stats(&self) -> Vec<Arc<PartitionStats>> {
        self.all().iter().map(|p| Arc::clone(&p.stats)).collect()
    }

    /// Takes a published batch of `records` records and `bytes` bytes into the books; it lies in
    /// frame `seq`.
    pub fn appended(&mut self, index: usize, records: u32, bytes: usize, seq: u64) {
        let Tables { list, marks, .. } = &mut self.tables;
        let mask = marks.len() as u64 - 1;
        let partition = &mut list[index];
        partition.next_offset += i64::from(records);
        let stats = &partition.stats;
        stats
            .log_end
            .store(partition.next_offset, Ordering::Release);
        stats.batches.add(1);
        stats.bytes.add(bytes as u64);
        if partition.mark_seq == seq && partition.mark_number >= self.first {
            marks[(partition.mark_number & mask) as usize].end = partition.next_offset;
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
        marks[(self.next & mask) as usize] = Mark {
            seq,
            end: partition.next_offset,
            partition: index as u32,
        };
        self.next += 1;
    }

    /// Every frame up to `seq` is durable: raises the high watermarks. Gives whether there was one to raise.
    #[inline]
    pub fn durable(&mut self, seq: u64) -> bool {
        let Tables { list, marks, .. } = &self.tables;
        let mask = marks.len() as u64 - 1;
        let before = self.first;
        while self.first < self.next {
            let mark = marks[(self.first & mask) as usize];
            if mark.seq > seq {
                break;
            }
            list[mark.partition as usize]
                .stats
                .high_watermark
                .store(mark.end, Ordering::Release);
            self.first += 1;
        }
        self.first > before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(frames: usize, frame_batches: usize) -> Limits {
        Limits {
            frames,
            frame_batches,
        }
    }

    #[test]
    fn marks_and_counters_survive_growth_and_retirement() {
        let limits = limits(4, 10);
        let mut partitions = Partitions::new(&keys(2), &[0, 0], limits);
        for seq in 1..4 {
            partitions.appended(0, 1, 80, seq);
            partitions.appended(1, 1, 80, seq);
        }
        assert!(partitions.durable(1));
        let mut tables = Tables::new(5, limits);
        partitions.grow(&mut tables);
        for key in keys(5).into_iter().skip(2) {
            partitions.add((key, Arc::new(PartitionStats::new(0))));
        }
        partitions.appended(4, 7, 80, 3);
        let stats = partitions.shared_stats();
        let mut retired = Arc::new(PartitionStats::default());
        partitions.retire(1, &mut retired);
        assert!(Arc::ptr_eq(&retired, &stats[1]));
        assert!(partitions.durable(3));
        let marks: Vec<i64> = stats.iter().map(|p| p.high_watermark()).collect();
        assert_eq!(marks, [3, 1, 0, 0, 7]);
        assert!(!partitions.durable(9));
    }

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
        let mut partitions = Partitions::new(&keys(3), &[0, 100, 7], limits(4, 10));
        let stats = partitions.shared_stats();
        let marks = |stats: &[Arc<PartitionStats>]| -> Vec<i64> {
            stats.iter().map(|p| p.high_watermark()).collect()
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
        let mut partitions = Partitions::new(&keys(5), &[0; 5], limits(3, 4));
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
