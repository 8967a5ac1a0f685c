//! Whether compressing a partition's batches is worth the work: what was compressed or encrypted before it was sent does
//! not get smaller, and trying took most of a flush.
//!
//! After a batch that did not get smaller (by [`WORTH_PART`]) the next one is tried, after the second in a row one is
//! passed over, then 3, 7, 15, and from then on [`PASS_MOST`] after each that was tried in vain. One that gets smaller
//! ends this. So what changes is noticed after at most [`PASS_MOST`] batches, and what stays as it is costs one trial in
//! 32 batches.

use std::collections::HashMap;

use crate::storage::PartitionKey;

/// A batch is stored compressed where that takes away at least one part in so many: readers decompress less for nothing.
pub(super) const WORTH_PART: usize = 10;
/// Batches that are stored as they are, at most, before one is tried again: 3% of the work of compressing all, and half a
/// megabyte of the default batches until a change shows.
const PASS_MOST: u8 = 31;
/// Batches with fewer bytes of records are always tried, and say nothing of larger ones where they do not get smaller.
const SMALL: usize = 1 << 10;
/// Partitions whose effect is remembered: some 400 KiB.
const PARTITIONS: usize = 1 << 14;

/// What compression did of late for a partition's batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Effect {
    /// How many are passed over after the next one that is tried in vain.
    pass: u8,
    /// How many are to be passed over now.
    left: u8,
}

impl Effect {
    /// Whether the last one that was tried was tried in vain.
    pub(super) fn is_vain(&self) -> bool {
        self.pass > 0
    }

    /// Whether the next batch, of so many bytes of records, is to be stored as it is. Counts it then.
    pub(super) fn passes(&mut self, records: usize) -> bool {
        if self.left == 0 || records < SMALL {
            return false;
        }
        self.left -= 1;
        true
    }

    /// Notes what came of a batch that was tried.
    pub(super) fn tried(&mut self, records: usize, smaller: bool) {
        if smaller {
            *self = Effect::default();
        } else if records >= SMALL {
            self.left = self.pass;
            self.pass = (2 * self.pass + 1).min(PASS_MOST);
        }
    }
}

/// The effect in each partition, from one flush or merge to the next: of ten thousand partitions each has a batch or two.
#[derive(Debug, Default)]
pub(super) struct Effects(HashMap<PartitionKey, Effect, foldhash::fast::RandomState>);

impl Effects {
    pub(super) fn of(&self, key: PartitionKey) -> Effect {
        self.0.get(&key).copied().unwrap_or_default()
    }

    pub(super) fn note(&mut self, key: PartitionKey, effect: Effect) {
        if effect == Effect::default() {
            self.0.remove(&key);
            return;
        }
        // Those of topics that are gone go as well. What is forgotten is tried again.
        if self.0.len() >= PARTITIONS {
            self.0.clear();
        }
        self.0.insert(key, effect);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: usize = 16 << 10;

    /// The numbers of the batches that are tried among `count` that do not get smaller.
    fn tried(effect: &mut Effect, count: usize) -> Vec<usize> {
        let mut tried = Vec::new();
        for n in 0..count {
            if !effect.passes(LARGE) {
                effect.tried(LARGE, false);
                tried.push(n);
            }
        }
        tried
    }

    #[test]
    fn the_longer_in_vain_the_rarer_it_is_tried_up_to_a_limit() {
        let mut effect = Effect::default();
        let seen = tried(&mut effect, 200);
        assert_eq!(seen, [0, 1, 3, 7, 15, 31, 63, 95, 127, 159, 191]);
    }

    #[test]
    fn one_that_gets_smaller_ends_it() {
        let mut effect = Effect::default();
        tried(&mut effect, 1000);
        let passed = (0..1000).take_while(|_| effect.passes(LARGE)).count();
        assert!(passed <= usize::from(PASS_MOST));
        effect.tried(LARGE, true);
        assert_eq!(effect, Effect::default());
        assert!(!effect.passes(LARGE));
    }

    #[test]
    fn small_batches_are_tried_and_prove_nothing_against() {
        let mut effect = Effect::default();
        for _ in 0..100 {
            assert!(!effect.passes(100));
            effect.tried(100, false);
        }
        assert_eq!(effect, Effect::default());
        tried(&mut effect, 100);
        assert!(!effect.passes(100));
    }

    #[test]
    fn no_more_partitions_are_remembered_than_there_is_room_for() {
        let key = |partition| PartitionKey {
            topic: 1,
            partition,
        };
        let mut effects = Effects::default();
        let mut vain = Effect::default();
        vain.tried(LARGE, false);
        for n in 0..3 * PARTITIONS as u32 / 2 {
            effects.note(key(n), vain);
            assert_eq!(effects.of(key(n)), vain);
            assert!(effects.0.len() <= PARTITIONS);
        }
        effects.note(key(20_000), Effect::default());
        assert_eq!(effects.of(key(20_000)), Effect::default());
    }
}
