//! The shard's state inside its own log, and back: offsets and producer windows.
//!
//! Invariant: state = newest snapshot + the batches behind it. A snapshot is written before
//! anything else of a new segment and at a clean stop, so recovery never needs an older segment to
//! know what a producer has stored. Restoring sets each partition and producer to what the part
//! says and forgets nothing, so an incomplete snapshot (the process died in it) does no harm on top
//! of the batches before it.
//!
//! The parts are specified in [`crate::storage::wal::snapshot`].

use std::collections::HashMap;

use crate::shard::dedupe::{Entry, Producers, WINDOW};
use crate::shard::partition::Partition;
use crate::shard::shard::ShardConfig;
use crate::storage::wal::snapshot::{
    Item, PARTITIONS_A_PART, PartWriter, batches, parse, producers_a_part,
};
use crate::storage::{PartitionKey, Replay};
use crate::wire::record_batch;

const PRODUCERS_A_PART: usize = producers_a_part(WINDOW);

/// Parts that a snapshot of so many partitions and producers has; at least one.
pub(crate) fn parts(partitions: usize, producers: usize) -> u32 {
    (partitions.div_ceil(PARTITIONS_A_PART) + producers.div_ceil(PRODUCERS_A_PART)).max(1) as u32
}

/// The state that parts are written from; it must not change between the parts of a snapshot.
pub(crate) struct State<'a> {
    pub partitions: &'a [Partition],
    /// Partitions of the log that the shard no longer serves.
    pub orphans: &'a [(PartitionKey, i64)],
    pub producers: &'a Producers,
}

impl State<'_> {
    /// Parts of this state.
    pub fn parts(&self) -> u32 {
        parts(
            self.partitions.len() + self.orphans.len(),
            self.producers.len(),
        )
    }

    /// Writes part `index < parts()` into `buf` (`PART_MAX` bytes); gives its length.
    pub fn write(&self, index: u32, buf: &mut [u8]) -> usize {
        let mut part = PartWriter::new(buf);
        let partitions = self.partitions.len() + self.orphans.len();
        let first_producers = partitions.div_ceil(PARTITIONS_A_PART);
        let index = index as usize;
        if index < first_producers {
            let from = index * PARTITIONS_A_PART;
            let to = (from + PARTITIONS_A_PART).min(partitions);
            for i in from..to {
                let (key, next_offset) = match self.partitions.get(i) {
                    Some(partition) => (partition.key, partition.next_offset),
                    None => self.orphans[i - self.partitions.len()],
                };
                part.partition(key, next_offset);
            }
        } else {
            let from = (index - first_producers) * PRODUCERS_A_PART;
            let to = (from + PRODUCERS_A_PART).min(self.producers.len());
            for i in from..to {
                let producer = self.producers.state(i);
                part.producer(
                    self.partitions[producer.partition as usize].key,
                    producer.producer_id,
                    producer.epoch,
                    (producer.older.len() + producer.newer.len()) as u8,
                );
                for entry in producer.older.iter().chain(producer.newer) {
                    part.batch(entry.base_sequence, entry.records, entry.base_offset);
                }
            }
        }
        part.finish()
    }
}

fn entries(window: &[u8]) -> impl Iterator<Item = Entry> + '_ {
    batches(window).map(|(base_sequence, records, base_offset)| Entry {
        base_sequence,
        records,
        base_offset,
    })
}

/// What a part says, for show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Next offset of each partition.
    pub partitions: Vec<(PartitionKey, i64)>,
    /// Producers whose batches are remembered.
    pub producers: Vec<ProducerDescription>,
}

/// A producer in a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProducerDescription {
    /// The partition.
    pub key: PartitionKey,
    /// Its id.
    pub producer_id: i64,
    /// Its epoch.
    pub epoch: i16,
    /// The sequence number that comes next; −1: no batch of this epoch is remembered.
    pub next_sequence: i32,
}

/// What a part says; `None`: it is malformed, or of a newer version.
pub fn describe(part: &[u8]) -> Option<Description> {
    let mut said = Description {
        partitions: Vec::new(),
        producers: Vec::new(),
    };
    for item in parse(part)? {
        match item {
            Item::Partition(key, next) => said.partitions.push((key, next)),
            Item::Producer {
                key,
                producer_id,
                epoch,
                window,
            } => said.producers.push(ProducerDescription {
                key,
                producer_id,
                epoch,
                next_sequence: entries(window).last().map_or(-1, |entry| {
                    entry.base_sequence.wrapping_add(entry.records as i32) & i32::MAX
                }),
            }),
        }
    }
    Some(said)
}

/// A shard's state while its log is read back: give it to `WalWriter::open`, then to `Shard::new`.
pub struct Recovered {
    pub(crate) keys: Vec<PartitionKey>,
    pub(crate) next_offsets: Vec<i64>,
    pub(crate) producers: Producers,
    pub(crate) orphans: Vec<(PartitionKey, i64)>,
    index: HashMap<PartitionKey, usize>,
    batches: u64,
    malformed: u64,
}

impl Recovered {
    /// An empty log's state, for the partitions of `config`; allocates what the shard will need.
    pub fn new(config: &ShardConfig) -> Self {
        Self {
            keys: config.partitions.clone(),
            next_offsets: vec![0; config.partitions.len()],
            producers: Producers::new(config.max_producers),
            orphans: Vec::new(),
            index: config.partitions.iter().copied().zip(0..).collect(),
            batches: 0,
            malformed: 0,
        }
    }

    /// Record batches read back.
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// Batches and snapshot parts that were whole by their frame's CRC and yet not understood:
    /// written by a newer version, or a defect.
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    /// Forgets what the log holds of partitions that nobody serves and whose topic `is_deleted`.
    pub fn forget(&mut self, is_deleted: impl Fn(u32) -> bool) {
        self.orphans.retain(|(key, _)| !is_deleted(key.topic));
        let served = self.keys.len();
        self.index.retain(|_, index| *index < served);
        let orphans = self.orphans.iter().map(|(key, _)| *key);
        self.index.extend(orphans.zip(served..));
    }

    fn next_offset(&mut self, key: PartitionKey) -> &mut i64 {
        match self.index.get(&key) {
            Some(&index) if index < self.keys.len() => &mut self.next_offsets[index],
            Some(&index) => &mut self.orphans[index - self.keys.len()].1,
            None => {
                self.index.insert(key, self.keys.len() + self.orphans.len());
                self.orphans.push((key, 0));
                let last = self.orphans.len() - 1;
                &mut self.orphans[last].1
            }
        }
    }

    fn served(&self, key: PartitionKey) -> Option<u32> {
        self.index
            .get(&key)
            .filter(|&&index| index < self.keys.len())
            .map(|&index| index as u32)
    }
}

impl Replay for Recovered {
    fn snapshot(&mut self, part: &[u8], _index: u32, _count: u32) {
        let Some(items) = parse(part) else {
            self.malformed += 1;
            return;
        };
        for item in items {
            match item {
                Item::Partition(key, next) => {
                    let known = self.next_offset(key);
                    *known = next.max(*known);
                }
                Item::Producer {
                    key,
                    producer_id,
                    epoch,
                    window,
                } => {
                    // Without its partition served a producer has nothing to repeat.
                    if let Some(partition) = self.served(key) {
                        self.producers
                            .restore(partition, producer_id, epoch, entries(window));
                    }
                }
            }
        }
    }

    fn batch(&mut self, key: PartitionKey, batch: &[u8]) {
        let Ok(header) = record_batch::parse_header(batch) else {
            self.malformed += 1;
            return;
        };
        self.batches += 1;
        let known = self.next_offset(key);
        *known = header.next_offset().max(*known);
        if header.producer_id >= 0
            && let Some(partition) = self.served(key)
        {
            self.producers.record(
                partition,
                header.producer_id,
                header.producer_epoch,
                Entry {
                    base_sequence: header.base_sequence,
                    records: header.records_count.max(0) as u32,
                    base_offset: header.base_offset,
                },
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::dedupe::Verdict;
    use crate::shard::partition::{Limits, Partitions};
    use crate::storage::wal::snapshot::PART_MAX;
    use crossbeam_queue::ArrayQueue;
    use proptest::prelude::*;
    use std::sync::Arc;

    const LIMITS: Limits = Limits {
        frames: 4,
        frame_batches: 100,
    };

    fn config(partitions: u32) -> ShardConfig {
        ShardConfig {
            partitions: (0..partitions)
                .map(|partition| PartitionKey {
                    topic: 4,
                    partition,
                })
                .collect(),
            max_producers: 500,
            max_pending_acks: 1,
            gaps: Arc::new(ArrayQueue::new(1)),
            wakes: Vec::new(),
        }
    }

    fn written(state: &State<'_>) -> Vec<Vec<u8>> {
        (0..state.parts())
            .map(|index| {
                let mut buf = vec![0xaa; PART_MAX];
                let len = state.write(index, &mut buf);
                buf.truncate(len);
                buf
            })
            .collect()
    }

    #[test]
    fn comes_back_as_it_was_in_several_parts() {
        let config = config(5000);
        let offsets: Vec<i64> = (0..5000).map(|i| i * 3).collect();
        let partitions = Partitions::new(&config.partitions, &offsets, LIMITS);
        let mut producers = Producers::new(500);
        for id in 0..400i64 {
            for i in 0..(id % 40) as i32 + 1 {
                let entry = Entry {
                    base_sequence: i * 2,
                    records: 2,
                    base_offset: id * 100 + i64::from(i),
                };
                producers.record(id as u32 * 7, id, (id % 3) as i16, entry);
            }
        }
        let gone = PartitionKey {
            topic: 3,
            partition: 1,
        };
        let state = State {
            partitions: partitions.all(),
            orphans: &[(gone, 99)],
            producers: &producers,
        };
        let parts = written(&state);
        assert!(parts.len() > 4, "{} parts", parts.len());
        assert!(parts.iter().all(|part| part.len() <= PART_MAX));

        let mut recovered = Recovered::new(&config);
        // What lies before a snapshot in its segment is replayed first and must do no harm.
        recovered.producers.record(
            7,
            1,
            1,
            Entry {
                base_sequence: 2,
                records: 2,
                base_offset: 101,
            },
        );
        // A snapshot that broke off, then a whole one.
        for part in parts.iter().take(2).chain(&parts) {
            recovered.snapshot(part, 0, 0);
        }
        assert_eq!(recovered.malformed(), 0);
        assert_eq!(recovered.next_offsets, offsets);
        assert_eq!(recovered.orphans, [(gone, 99)]);
        assert_eq!(recovered.producers.len(), producers.len());
        let sorted = |producers: &Producers| {
            let mut all: Vec<_> = producers
                .iter()
                .map(|p| {
                    (
                        p.partition,
                        p.producer_id,
                        p.epoch,
                        p.next_sequence,
                        [p.older, p.newer].concat(),
                    )
                })
                .collect();
            all.sort_by_key(|p| (p.0, p.1));
            all
        };
        assert_eq!(sorted(&recovered.producers), sorted(&producers));
        assert_eq!(
            recovered.producers.check(7, 1, 1, 0, 2),
            Verdict::Duplicate { base_offset: 100 }
        );
    }

    #[test]
    fn an_empty_shard_has_a_snapshot_too() {
        let config = config(0);
        let state = State {
            partitions: &[],
            orphans: &[],
            producers: &Producers::new(1),
        };
        let parts = written(&state);
        assert_eq!(parts.len(), 1);
        let mut recovered = Recovered::new(&config);
        recovered.snapshot(&parts[0], 0, 1);
        assert_eq!(recovered.malformed(), 0);
    }

    proptest! {
        #[test]
        fn damage_is_counted_and_never_panics(
            at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<prop::sample::Index>(),
            noise in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let config = config(3);
            let partitions = Partitions::new(&config.partitions, &[1, 2, 3], LIMITS);
            let mut producers = Producers::new(4);
            producers.record(1, 8, 0, Entry { base_sequence: 0, records: 1, base_offset: 1 });
            let state = State { partitions: partitions.all(), orphans: &[], producers: &producers };
            for part in written(&state) {
                let mut recovered = Recovered::new(&config);
                let mut damaged = part.clone();
                damaged[at.index(part.len())] = value;
                recovered.snapshot(&damaged, 0, 1);
                recovered.batch(config.partitions[0], &damaged);
                let mut recovered = Recovered::new(&config);
                recovered.snapshot(&part[..cut.index(part.len())], 0, 1);
                prop_assert_eq!(recovered.malformed(), 1);
                recovered.snapshot(&noise, 0, 1);
            }
        }
    }
}
