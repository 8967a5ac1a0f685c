//! Exactly-once append: what each idempotent producer has in the log, by (partition, producer id).
//!
//! Invariant: a producer's window holds its newest batches in the order of the log, at most
//! [`WINDOW`] of them, all of its current epoch and with adjoining sequences; the batch that may
//! come next starts at `next_sequence`. The table never holds more than its limit: a producer that
//! has not been seen since the clock hand passed it last makes room for a new one (and is then
//! unknown: it is refused as out of order and starts a new epoch).
//!
//! Sequences count records and wrap from 2^31 − 1 to 0, as in Kafka.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use crate::wire::datagram::MAX_INFLIGHT_BATCHES;

/// Batches remembered of a producer in a partition; a client has no more than this many
/// unacknowledged, so each of its retransmissions finds its original offset.
pub const WINDOW: usize = MAX_INFLIGHT_BATCHES;

/// Producers that a table is able to hold: slots are numbered in 32 bits and a slot takes about
/// half a KiB.
pub const MAX_PRODUCERS: usize = 1 << 20;

/// Bytes of `producers` producers: their slots, and their part of the index.
pub const fn bytes(producers: usize) -> u64 {
    // The index has room for twice as many 4-byte entries with a byte of control each, at 7/8 of a power of two.
    (producers * (size_of::<Slot>() + 16)) as u64
}

/// Producers that a table of so many bytes holds; within 1 and [`MAX_PRODUCERS`].
pub fn producers_in(memory: u64) -> usize {
    usize::try_from(memory / bytes(1))
        .unwrap_or(MAX_PRODUCERS)
        .clamp(1, MAX_PRODUCERS)
}

const SEQUENCE_MASK: u32 = i32::MAX as u32;

/// One remembered batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Sequence of its first record.
    pub base_sequence: i32,
    /// Its number of records.
    pub records: u32,
    /// Offset of its first record.
    pub base_offset: i64,
}

/// What is to be done with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the producer's next one: append it, then [`Producers::record`] it.
    Append,
    /// It is in the log already, at this offset.
    Duplicate {
        /// −1 when it has left the window.
        base_offset: i64,
    },
    /// Batches between the last one stored and this one are missing, or the producer is unknown
    /// and this is not the start of its sequence.
    OutOfOrder,
    /// A newer instance of the producer has taken over.
    Fenced,
}

/// The producers of a shard, in memory allocated once.
pub struct Producers {
    index: HashTable<u32>,
    hasher: RandomState,
    slots: Vec<Slot>,
    limit: usize,
    hand: usize,
    evicted: u64,
}

#[derive(Clone)]
struct Slot {
    producer_id: i64,
    partition: u32,
    epoch: i16,
    /// Seen since the clock hand passed.
    referenced: bool,
    next_sequence: i32,
    /// Index of the oldest entry in `window`.
    first: u8,
    len: u8,
    window: [Entry; WINDOW],
}

/// One producer with its window, for snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProducerState<'a> {
    /// Shard-local index of the partition.
    pub partition: u32,
    /// Its id.
    pub producer_id: i64,
    /// Its epoch.
    pub epoch: i16,
    /// The sequence its next batch starts at.
    pub next_sequence: i32,
    /// The window's older part; `newer` follows.
    pub older: &'a [Entry],
    /// The window's newer part.
    pub newer: &'a [Entry],
}

impl Producers {
    /// A table of at most `limit` producers (a producer counts once for each partition it writes
    /// to), all of its memory allocated: about 560 bytes a producer.
    ///
    /// # Panics
    /// When `limit` is 0 or above [`MAX_PRODUCERS`].
    pub fn new(limit: usize) -> Self {
        assert!(
            (1..=MAX_PRODUCERS).contains(&limit),
            "a producer table of {limit} is not in 1..={MAX_PRODUCERS}"
        );
        Self {
            // Twice the need: removed keys are then cleaned up in place, never by growing.
            index: HashTable::with_capacity(2 * limit),
            hasher: RandomState::default(),
            slots: Vec::with_capacity(limit),
            limit,
            hand: 0,
            evicted: 0,
        }
    }

    /// Producers known.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Producers forgotten to make room, since the start.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Judges a batch of `records` ≥ 1 records, starting at `base_sequence` ≥ 0, without changing
    /// what is remembered (the producer counts as seen).
    pub fn check(
        &mut self,
        partition: u32,
        producer_id: i64,
        epoch: i16,
        base_sequence: i32,
        records: u32,
    ) -> Verdict {
        let fresh = |ok| {
            if ok {
                Verdict::Append
            } else {
                Verdict::OutOfOrder
            }
        };
        let Some(slot) = self.find(partition, producer_id) else {
            return fresh(base_sequence == 0);
        };
        let slot = &mut self.slots[slot];
        slot.referenced = true;
        if epoch < slot.epoch {
            return Verdict::Fenced;
        }
        if epoch > slot.epoch {
            return fresh(base_sequence == 0);
        }
        if base_sequence == slot.next_sequence {
            return Verdict::Append;
        }
        let (older, newer) = slot.window();
        if let Some(entry) = older
            .iter()
            .chain(newer)
            .find(|entry| entry.base_sequence == base_sequence && entry.records == records)
        {
            return Verdict::Duplicate {
                base_offset: entry.base_offset,
            };
        }
        // A batch that ended before the window began has been stored, if there was anything before
        // it at all: only a full window has forgotten some. Half of the sequence space counts as
        // before, so that this holds across the wrap.
        let oldest = slot.window[slot.first as usize].base_sequence;
        let end = advance(base_sequence, records);
        let before = (oldest as u32).wrapping_sub(end as u32) & SEQUENCE_MASK;
        if usize::from(slot.len) == WINDOW && before <= SEQUENCE_MASK / 2 {
            return Verdict::Duplicate { base_offset: -1 };
        }
        Verdict::OutOfOrder
    }

    /// Whether anything is remembered of a producer.
    pub fn knows(&self, partition: u32, producer_id: i64) -> bool {
        self.find(partition, producer_id).is_some()
    }

    /// Remembers a batch that is in the log now. The log is the truth: an epoch or sequence that
    /// does not follow what is known (on recovery, where older batches may be gone) starts the
    /// window anew.
    pub fn record(&mut self, partition: u32, producer_id: i64, epoch: i16, entry: Entry) {
        let slot = match self.find(partition, producer_id) {
            Some(slot) => slot,
            None => self.insert(partition, producer_id, epoch),
        };
        let slot = &mut self.slots[slot];
        slot.referenced = true;
        if slot.epoch != epoch || slot.next_sequence != entry.base_sequence {
            slot.epoch = epoch;
            slot.first = 0;
            slot.len = 0;
        }
        let at = (usize::from(slot.first) + usize::from(slot.len)) % WINDOW;
        slot.window[at] = entry;
        if usize::from(slot.len) == WINDOW {
            slot.first = ((at + 1) % WINDOW) as u8;
        } else {
            slot.len += 1;
        }
        slot.next_sequence = advance(entry.base_sequence, entry.records);
    }

    /// Replaces what is known of a producer by its window from a snapshot, oldest batch first.
    pub fn restore(
        &mut self,
        partition: u32,
        producer_id: i64,
        epoch: i16,
        window: impl Iterator<Item = Entry>,
    ) {
        if let Some(slot) = self.find(partition, producer_id) {
            self.slots[slot].len = 0;
            self.slots[slot].first = 0;
        }
        for entry in window {
            self.record(partition, producer_id, epoch, entry);
        }
    }

    /// Every producer, the next victim of the clock first, so that a restored table forgets in
    /// much the same order.
    pub fn iter(&self) -> impl Iterator<Item = ProducerState<'_>> {
        (0..self.slots.len()).map(|i| self.state(i))
    }

    /// The `i`th producer of [`Producers::iter`], `i < len()`.
    pub fn state(&self, i: usize) -> ProducerState<'_> {
        let slot = &self.slots[(self.hand + i) % self.slots.len()];
        let (older, newer) = slot.window();
        ProducerState {
            partition: slot.partition,
            producer_id: slot.producer_id,
            epoch: slot.epoch,
            next_sequence: slot.next_sequence,
            older,
            newer,
        }
    }

    fn hash(hasher: &RandomState, partition: u32, producer_id: i64) -> u64 {
        hasher.hash_one((partition, producer_id))
    }

    #[inline]
    fn find(&self, partition: u32, producer_id: i64) -> Option<usize> {
        let hash = Self::hash(&self.hasher, partition, producer_id);
        self.index
            .find(hash, |&slot| {
                let slot = &self.slots[slot as usize];
                slot.producer_id == producer_id && slot.partition == partition
            })
            .map(|&slot| slot as usize)
    }

    fn insert(&mut self, partition: u32, producer_id: i64, epoch: i16) -> usize {
        let fresh = Slot {
            producer_id,
            partition,
            epoch,
            referenced: true,
            next_sequence: 0,
            first: 0,
            len: 0,
            window: [Entry::default(); WINDOW],
        };
        let at = if self.slots.len() < self.limit {
            self.slots.push(fresh);
            self.slots.len() - 1
        } else {
            let at = self.evict();
            self.slots[at] = fresh;
            at
        };
        let (slots, hasher) = (&self.slots, &self.hasher);
        self.index.insert_unique(
            Self::hash(hasher, partition, producer_id),
            at as u32,
            |&slot| {
                let slot = &slots[slot as usize];
                Self::hash(hasher, slot.partition, slot.producer_id)
            },
        );
        at
    }

    /// Takes the first producer after the hand that was not seen for a whole turn off the index.
    fn evict(&mut self) -> usize {
        loop {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[at];
            if std::mem::take(&mut slot.referenced) {
                continue; // ends within two turns: no slot stays referenced
            }
            let hash = Self::hash(&self.hasher, slot.partition, slot.producer_id);
            if let Ok(entry) = self.index.find_entry(hash, |&slot| slot as usize == at) {
                entry.remove();
            }
            self.evicted += 1;
            return at;
        }
    }
}

impl Slot {
    fn window(&self) -> (&[Entry], &[Entry]) {
        let (first, len) = (usize::from(self.first), usize::from(self.len));
        let older = len.min(WINDOW - first);
        (
            &self.window[first..first + older],
            &self.window[..len - older],
        )
    }
}

/// The sequence after `records` records from `sequence` on.
fn advance(sequence: i32, records: u32) -> i32 {
    ((sequence as u32).wrapping_add(records) & SEQUENCE_MASK) as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn entry(base_sequence: i32, records: u32, base_offset: i64) -> Entry {
        Entry {
            base_sequence,
            records,
            base_offset,
        }
    }

    #[test]
    fn an_unknown_producer_starts_at_zero() {
        let mut table = Producers::new(4);
        assert_eq!(table.check(0, 7, 3, 5, 1), Verdict::OutOfOrder);
        assert_eq!(table.check(0, 7, 3, 0, 1), Verdict::Append);
        assert!(table.is_empty(), "check remembers nothing");
    }

    #[test]
    fn a_retransmission_gets_its_offset_until_it_leaves_the_window() {
        let mut table = Producers::new(4);
        for i in 0..40 {
            assert_eq!(table.check(1, 7, 0, i * 3, 3), Verdict::Append);
            table.record(1, 7, 0, entry(i * 3, 3, 100 + i64::from(i) * 3));
        }
        for i in 0..40 {
            let base_offset = if i < 8 { -1 } else { 100 + i64::from(i) * 3 };
            assert_eq!(
                table.check(1, 7, 0, i * 3, 3),
                Verdict::Duplicate { base_offset }
            );
        }
        assert_eq!(table.check(1, 7, 0, 123, 3), Verdict::OutOfOrder);
        // Neither a batch of its own nor older than the window: not to be called stored.
        assert_eq!(table.check(1, 7, 0, 60, 4), Verdict::OutOfOrder);
        assert_eq!(table.check(1, 7, 0, 61, 2), Verdict::OutOfOrder);
        assert_eq!(table.check(1, 7, 0, 21, 4), Verdict::OutOfOrder);
        assert_eq!(table.check(2, 7, 0, 0, 3), Verdict::Append);
    }

    #[test]
    fn a_window_that_forgot_nothing_calls_nothing_too_old() {
        let mut table = Producers::new(4);
        table.record(0, 7, 0, entry(0, 10, 0));
        assert_eq!(table.check(0, 7, 0, i32::MAX - 1, 1), Verdict::OutOfOrder);
    }

    #[test]
    fn epochs_fence_and_restart_the_sequence() {
        let mut table = Producers::new(4);
        table.record(0, 7, 2, entry(0, 5, 10));
        assert_eq!(table.check(0, 7, 1, 5, 1), Verdict::Fenced);
        assert_eq!(table.check(0, 7, 3, 5, 1), Verdict::OutOfOrder);
        assert_eq!(table.check(0, 7, 3, 0, 5), Verdict::Append);
        table.record(0, 7, 3, entry(0, 5, 15));
        assert_eq!(
            table.check(0, 7, 3, 0, 5),
            Verdict::Duplicate { base_offset: 15 }
        );
        assert_eq!(table.check(0, 7, 2, 0, 5), Verdict::Fenced);
    }

    #[test]
    fn sequences_wrap() {
        let mut table = Producers::new(1);
        let start = i32::MAX - 40;
        table.record(0, 7, 0, entry(start, 1, 0));
        let mut sequence = start;
        for i in 1..50 {
            sequence = advance(sequence, 1);
            assert_eq!(table.check(0, 7, 0, sequence, 1), Verdict::Append);
            table.record(0, 7, 0, entry(sequence, 1, i));
        }
        assert_eq!(sequence, 8);
        assert_eq!(
            table.check(0, 7, 0, 0, 1),
            Verdict::Duplicate { base_offset: 41 }
        );
        assert_eq!(
            table.check(0, 7, 0, start, 1),
            Verdict::Duplicate { base_offset: -1 }
        );
        assert_eq!(table.check(0, 7, 0, 10, 1), Verdict::OutOfOrder);
    }

    #[test]
    fn makes_room_by_forgetting_who_was_not_seen() {
        let mut table = Producers::new(3);
        for id in 0..3 {
            table.record(0, id, 0, entry(0, 1, id));
        }
        table.record(0, 3, 0, entry(0, 1, 3)); // a whole turn: forgets 0
        assert_eq!(table.check(0, 1, 0, 1, 1), Verdict::Append); // 1 is seen again
        table.record(0, 4, 0, entry(0, 1, 4)); // forgets 2
        assert_eq!(table.check(0, 1, 0, 1, 1), Verdict::Append);
        assert_eq!(table.check(0, 0, 0, 1, 1), Verdict::OutOfOrder);
        assert_eq!(table.check(0, 2, 0, 1, 1), Verdict::OutOfOrder);
        assert_eq!((table.len(), table.evicted()), (3, 2));
    }

    #[test]
    fn churn_does_not_grow_the_index() {
        let mut table = Producers::new(64);
        let bytes = table.index.allocation_size();
        for id in 0..100_000 {
            table.record(id as u32 % 3, id, 0, entry(0, 1, id));
        }
        assert_eq!(table.len(), 64);
        assert_eq!(table.index.allocation_size(), bytes);
        for id in 100_000 - 64..100_000 {
            assert_eq!(
                table.check(id as u32 % 3, id, 0, 0, 1),
                Verdict::Duplicate { base_offset: id }
            );
        }
    }

    proptest! {
        /// Against every batch ever stored, kept in a map.
        #[test]
        fn never_appends_twice_nor_skips(
            steps in prop::collection::vec((0u32..2, 0i64..2, 0i16..3, 0i32..60, 1u32..4), 1..300)
        ) {
            let mut table = Producers::new(4);
            // (partition, id) → (epoch, next sequence, stored of this epoch)
            type Known = (i16, i32, HashMap<(i32, u32), i64>);
            let mut model: HashMap<(u32, i64), Known> = HashMap::new();
            let mut offset = 0;
            for (partition, id, epoch, at, records) in steps {
                let known = model.get(&(partition, id)).cloned();
                // Half of the sequences are the right one, the others at random.
                let sequence = match &known {
                    Some(known) if at % 2 == 0 && known.0 == epoch => known.1,
                    Some(_) | None if at % 2 == 0 => 0,
                    _ => at,
                };
                let verdict = table.check(partition, id, epoch, sequence, records);
                match (&known, verdict) {
                    (Some(known), Verdict::Fenced) => prop_assert!(epoch < known.0),
                    (Some(known), Verdict::Append) => prop_assert!(
                        (epoch == known.0 && sequence == known.1) || (epoch > known.0 && sequence == 0)
                    ),
                    (Some(known), Verdict::Duplicate { base_offset: -1 }) => {
                        prop_assert!(epoch == known.0 && sequence + records as i32 <= known.1)
                    }
                    (Some(known), Verdict::Duplicate { base_offset }) => {
                        prop_assert_eq!(known.2.get(&(sequence, records)), Some(&base_offset))
                    }
                    (Some(known), Verdict::OutOfOrder) => prop_assert!(
                        (epoch == known.0 && sequence != known.1) || (epoch > known.0 && sequence != 0)
                    ),
                    (None, Verdict::Append) => prop_assert_eq!(sequence, 0),
                    (None, verdict) => {
                        prop_assert_eq!(verdict, Verdict::OutOfOrder);
                        prop_assert_ne!(sequence, 0);
                    }
                }
                if verdict == Verdict::Append {
                    table.record(partition, id, epoch, entry(sequence, records, offset));
                    let known = model.entry((partition, id)).or_insert((epoch, 0, HashMap::new()));
                    if known.0 != epoch {
                        *known = (epoch, 0, HashMap::new());
                    }
                    known.2.insert((sequence, records), offset);
                    known.1 = sequence + records as i32;
                    offset += i64::from(records);
                }
            }
        }
    }
}
