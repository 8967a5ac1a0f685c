//! Compaction by key: which records of a partition are superseded by newer ones with the same key, and which tombstones
//! nobody needs any more.
//!
//! Invariants: of each key the newest record stays, as does the partition's very last one, whatever it is, so that readers
//! come to its end; offsets and times stay as they are. Records without a key stay, and so does everything that says
//! more than records do (control batches), that cannot be decompressed here, or that arrived too recently. A tombstone
//! goes only where nothing older of its partition is left out, and `delete.retention.ms` after the first compaction
//! for which that was so: the time is written into its batch.
//!
//! Memory: 1 bit a record, 8 bytes a batch, and the map of keys (see [`KEYS_AT_ONCE`]).
//!
//! Source: Kafka's log compaction, KIP-58 (lag), KIP-534 (delete horizon).

use std::collections::HashMap;

use twox_hash::XxHash3_128;

use super::codec;
use super::policy::Compaction;
use crate::wire::record_batch::{
    BatchHeader, CODEC_MASK, DELETE_HORIZON, LOG_APPEND_TIME, Record, Records,
};

/// Keys in memory at a time at most, some 50 MB, where the budget has room for them; a partition with more is gone through
/// once for each so many.
pub const KEYS_AT_ONCE: usize = 1 << 20;

/// What [`Plan::make`] found of a batch.
#[derive(Debug, Clone, Copy)]
struct Batch {
    /// Those that can be judged: 0 of a batch that cannot be read, whose header may count what it likes.
    records: u32,
    /// It stays as it is.
    opaque: bool,
    /// It has tombstones.
    tombstones: bool,
}

/// Which records of a partition stay.
#[derive(Debug, Default)]
pub(super) struct Plan {
    batches: Vec<Batch>,
    /// A bit a record, in the order of offsets: nothing newer has its key.
    newest: Vec<u64>,
    records: u64,
    /// When the latest record arrived that is too young, Unix ms.
    young: Option<i64>,
}

/// What is to be done with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// It goes.
    Drop,
    /// It stays as it is.
    Keep,
    /// Its records are looked at ([`Cursor::keeps`]).
    Thin {
        /// What its header says then of how long its tombstones stay.
        horizon: Option<i64>,
        /// Its tombstones go.
        tombstones_go: bool,
    },
}

/// Takes each batch of a partition, in order, with when it arrived at the latest.
pub(super) type Take<'a> = &'a mut dyn FnMut(&[u8], &BatchHeader, i64);

impl Plan {
    /// Goes through a partition as often as its keys need it; `walk` begins at its start each time. What arrived after
    /// `old_ms` is too young.
    pub(super) fn make<E>(
        old_ms: i64,
        keys_at_once: usize,
        mut walk: impl FnMut(Take) -> Result<(), E>,
    ) -> Result<Plan, E> {
        let mut plan = Plan::default();
        // Offsets would do; a record's number needs no offset twice.
        let mut newest: HashMap<u128, u64, foldhash::fast::RandomState> = HashMap::default();
        let mut scratch = Vec::new();
        let mut from = 0u128;
        loop {
            let mut to = u128::MAX;
            let (mut number, mut index) = (0, 0);
            newest.clear();
            walk(&mut |batch, header, time| {
                let plain = plain(batch, header, &mut scratch);
                if from == 0 {
                    plan.add(header, plain, time, old_ms);
                }
                let records = match plain.map(Records::new) {
                    Some(Ok(records)) if !plan.batches[index].opaque => Some(records),
                    _ => None,
                };
                for (at, record) in (number..).zip(records.into_iter().flatten()) {
                    let Some(key) = record.ok().and_then(|record| record.key) else {
                        continue;
                    };
                    let hash = XxHash3_128::oneshot(key);
                    if (from..=to).contains(&hash)
                        && let Some(before) = newest.insert(hash, at)
                    {
                        plan.newest[(before / 64) as usize] &= !(1 << (before % 64));
                    }
                    while newest.len() > keys_at_once && from < to {
                        // The others have their turn later.
                        to = from + (to - from) / 2;
                        newest.retain(|&hash, _| hash <= to);
                    }
                }
                number += u64::from(plan.batches[index].records);
                index += 1;
            })?;
            if to == u128::MAX {
                return Ok(plan);
            }
            from = to + 1;
        }
    }

    fn add(&mut self, header: &BatchHeader, plain: Option<&[u8]>, time: i64, old_ms: i64) {
        // What follows what is too young is so, too.
        if time > old_ms || self.young.is_some() {
            self.young = self.young.max(Some(time));
        }
        // As many as were read: what is plain has been compared with its count.
        let records = plain.map_or(0, |_| header.records_count as u32);
        let tombstones = plain.is_some_and(|batch| {
            let records = Records::new(batch).into_iter().flatten();
            records.flatten().any(|record| is_tombstone(&record))
        });
        self.batches.push(Batch {
            records,
            opaque: plain.is_none() || self.young.is_some(),
            tombstones,
        });
        self.records += u64::from(records);
        self.newest
            .resize(self.records.div_ceil(64) as usize, u64::MAX);
    }

    fn is_newest(&self, record: u64) -> bool {
        self.newest[(record / 64) as usize] >> (record % 64) & 1 == 1
    }

    /// To go through the partition again, and act.
    pub(super) fn cursor(&self, around: Around) -> Cursor<'_> {
        Cursor {
            plan: self,
            around,
            batch: 0,
            number: 0,
            dropped: 0,
            due_ms: self
                .young
                .map(|time| time.saturating_add(around.compaction.min_lag_ms)),
        }
    }
}

fn is_tombstone(record: &Record) -> bool {
    record.key.is_some() && record.value.is_none()
}

/// The batch's records where they can be judged one by one.
fn plain<'a>(batch: &'a [u8], header: &BatchHeader, scratch: &'a mut Vec<u8>) -> Option<&'a [u8]> {
    let known = header.attributes & !(CODEC_MASK | LOG_APPEND_TIME | DELETE_HORIZON) == 0;
    known.then(|| codec::plain(batch, scratch).ok())?
}

/// What lies around that which is compacted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Around {
    pub(super) compaction: Compaction,
    pub(super) now_ms: i64,
    /// Nothing of the partition is older.
    pub(super) oldest: bool,
    /// Nothing of the partition in SSTs is newer.
    pub(super) last: bool,
}

/// A walk along a plan.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    plan: &'a Plan,
    around: Around,
    /// The next batch, and the number of its first record.
    batch: usize,
    number: u64,
    /// Records that are gone.
    pub(super) dropped: u64,
    /// When more of the partition can go, Unix ms.
    pub(super) due_ms: Option<i64>,
}

impl Cursor<'_> {
    /// What is to become of the next batch.
    pub(super) fn next(&mut self, header: &BatchHeader) -> Action {
        let Some(&batch) = self.plan.batches.get(self.batch) else {
            return Action::Keep;
        };
        self.batch += 1;
        let first = self.number;
        self.number += u64::from(batch.records);
        if batch.opaque {
            return Action::Keep;
        }
        let newest = (first..self.number)
            .filter(|&record| self.plan.is_newest(record))
            .count() as u64;
        if newest == 0 {
            self.dropped += u64::from(batch.records);
            return Action::Drop;
        }
        let all = newest == u64::from(batch.records);
        let before = header.delete_horizon();
        let Around {
            compaction,
            now_ms,
            oldest,
            last,
        } = self.around;
        match before {
            _ if !batch.tombstones && all => Action::Keep,
            _ if !batch.tombstones => Action::Thin {
                horizon: None,
                tombstones_go: false,
            },
            Some(until) if oldest && until <= now_ms => Action::Thin {
                // The last record stays; so does what is known of it.
                horizon: before.filter(|_| last && self.number == self.plan.records),
                tombstones_go: true,
            },
            Some(until) => {
                // Where something older is left out, time alone does not help.
                if oldest {
                    self.due_ms = self.due_ms.max(Some(until));
                }
                match all {
                    true => Action::Keep,
                    false => Action::Thin {
                        horizon: before,
                        tombstones_go: false,
                    },
                }
            }
            None if oldest => {
                let until = now_ms.saturating_add(compaction.delete_retention_ms);
                self.due_ms = self.due_ms.max(Some(until));
                Action::Thin {
                    horizon: Some(until),
                    tombstones_go: false,
                }
            }
            None if all => Action::Keep,
            None => Action::Thin {
                horizon: None,
                tombstones_go: false,
            },
        }
    }

    /// Whether record `index` of the batch that [`Cursor::next`] was last called for stays.
    pub(super) fn keeps(&mut self, index: u32, record: &Record, tombstones_go: bool) -> bool {
        let records = self
            .batch
            .checked_sub(1)
            .map(|at| self.plan.batches[at].records);
        let number = self.number - u64::from(records.unwrap_or(0)) + u64::from(index);
        let end = self.around.last && number + 1 == self.plan.records;
        let stays =
            self.plan.is_newest(number) && (end || !(tombstones_go && is_tombstone(record)));
        self.dropped += u64::from(!stays);
        stays
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::record_batch::{BatchWriter, parse_header, write_header};

    /// A producer's compressed batch counts what it likes; the plan takes memory for what it reads.
    #[test]
    fn what_a_batch_claims_costs_no_memory() {
        let mut bytes = vec![0; 256];
        let mut writer = BatchWriter::new(&mut bytes, 0);
        writer.push(0, Some(b"key"), Some(b"value")).unwrap();
        let len = writer.finish(0);
        let good = bytes[..len].to_vec();
        let mut lying = good.clone();
        let header = BatchHeader {
            attributes: 1, // gzip, which is not read here
            base_offset: 1,
            records_count: i32::MAX,
            last_offset_delta: i32::MAX - 1,
            ..parse_header(&good).unwrap()
        };
        write_header(&mut lying, &header);
        let plan = Plan::make(i64::MAX, KEYS_AT_ONCE, |take| {
            for batch in [&good, &lying] {
                take(batch, &parse_header(batch).unwrap(), 0);
            }
            Ok::<(), ()>(())
        })
        .unwrap();
        assert_eq!((plan.batches.len(), plan.records), (2, 1));
        assert_eq!(plan.newest.len(), 1);
        let mut cursor = plan.cursor(Around {
            compaction: Compaction {
                delete_retention_ms: 0,
                min_lag_ms: 0,
                dirty_ratio: 0.5,
            },
            now_ms: 0,
            oldest: true,
            last: true,
        });
        for batch in [&good, &lying] {
            assert_eq!(cursor.next(&parse_header(batch).unwrap()), Action::Keep);
        }
    }
}
