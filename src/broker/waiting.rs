//! Fetches that wait for data: who waits for which partition, and whom a raised high watermark wakes.
//!
//! Invariants: a waiting fetch is woken when its partitions gained as many bytes as it lacks, when one of them
//! is gone, or at its deadline, whichever is first, and exactly once; looking after a shard costs time for
//! the partitions of that shard that are waited for, whatever else the shard holds. What a partition
//! gained is counted as bytes of batches stored, so it is an estimate where those are not durable yet:
//! a fetch may be woken early, and then waits again, never late.

use std::collections::BTreeSet;

use hashbrown::HashMap;

/// A partition's place: its shard and its local index there.
pub type At = (u16, u32);

/// How far a partition has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Offset behind the last durable record.
    pub high_watermark: i64,
    /// Bytes of batches stored in all.
    pub bytes: u64,
}

/// Names a waiting fetch until it is woken or forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WaitId(u32);

struct Waiter<R> {
    request: R,
    parts: Vec<At>,
    deadline_ns: u64,
    lacks: u64,
}

struct Watch {
    seen: Progress,
    ids: Vec<u32>,
}

/// The waiting fetches of a thread, each with a request `R`.
pub struct Waiting<R> {
    slots: Vec<Option<Waiter<R>>>,
    free: Vec<u32>,
    /// By shard, then by local index.
    watched: Vec<HashMap<u32, Watch, foldhash::fast::RandomState>>,
    deadlines: BTreeSet<(u64, u32)>,
    ready: Vec<u32>,
}

impl<R> Waiting<R> {
    /// For partitions of so many shards.
    pub fn new(shards: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            watched: (0..shards).map(|_| HashMap::default()).collect(),
            deadlines: BTreeSet::new(),
            ready: Vec::new(),
        }
    }

    /// Fetches that wait.
    pub fn len(&self) -> usize {
        self.deadlines.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.deadlines.is_empty()
    }

    /// Whether partitions of `shard` are waited for.
    pub fn watches(&self, shard: usize) -> bool {
        self.watched.get(shard).is_some_and(|w| !w.is_empty())
    }

    /// The next moment, in monotonic nanoseconds, at which a fetch has waited long enough.
    pub fn next_deadline(&self) -> Option<u64> {
        self.deadlines.first().map(|d| d.0)
    }

    /// Lets a fetch wait until its partitions, which were seen at this progress when it was read, gained
    /// `lacks` bytes. Partitions of shards that are not there are not waited for.
    pub fn add(
        &mut self,
        request: R,
        parts: &[(At, Progress)],
        lacks: u64,
        deadline_ns: u64,
    ) -> WaitId {
        let id = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            (self.slots.len() - 1) as u32
        });
        let mut places = Vec::with_capacity(parts.len());
        for &((shard, local), seen) in parts {
            let Some(watched) = self.watched.get_mut(usize::from(shard)) else {
                continue;
            };
            let watch = watched.entry(local).or_insert_with(|| Watch {
                seen,
                ids: Vec::new(),
            });
            // A request may name a partition twice; it is told once.
            if watch.ids.last() != Some(&id) {
                watch.ids.push(id);
                places.push((shard, local));
            }
        }
        self.slots[id as usize] = Some(Waiter {
            request,
            parts: places,
            deadline_ns,
            lacks,
        });
        self.deadlines.insert((deadline_ns, id));
        WaitId(id)
    }

    /// Looks at the partitions of `shard` that are waited for; `progress` gives each one's, `None` where
    /// it is gone. Those whose fetches have enough can be taken by [`Waiting::next_ready`].
    pub fn look(&mut self, shard: usize, mut progress: impl FnMut(u32) -> Option<Progress>) {
        let Some(watched) = self.watched.get_mut(shard) else {
            return;
        };
        for (&local, watch) in watched.iter_mut() {
            let gained = match progress(local) {
                Some(now) if now.high_watermark > watch.seen.high_watermark => {
                    // At least one: the bytes may have been counted before they were durable.
                    let gained = now.bytes.saturating_sub(watch.seen.bytes).max(1);
                    watch.seen = now;
                    gained
                }
                Some(_) => continue,
                None => u64::MAX,
            };
            for &id in &watch.ids {
                let Some(waiter) = &mut self.slots[id as usize] else {
                    continue;
                };
                if waiter.lacks > 0 {
                    waiter.lacks = waiter.lacks.saturating_sub(gained);
                    if waiter.lacks == 0 {
                        self.ready.push(id);
                    }
                }
            }
        }
    }

    /// The next fetch that has enough, or has waited until `now_ns`; it waits no more.
    pub fn next_ready(&mut self, now_ns: u64) -> Option<R> {
        let id = match self.ready.pop() {
            Some(id) => id,
            None => {
                let &(deadline, id) = self.deadlines.first()?;
                if deadline > now_ns {
                    return None;
                }
                id
            }
        };
        self.take(id)
    }

    /// Forgets a fetch whose connection is gone.
    pub fn forget(&mut self, id: WaitId) -> Option<R> {
        self.ready.retain(|&ready| ready != id.0);
        self.take(id.0)
    }

    fn take(&mut self, id: u32) -> Option<R> {
        let waiter = self.slots.get_mut(id as usize)?.take()?;
        self.deadlines.remove(&(waiter.deadline_ns, id));
        for (shard, local) in waiter.parts {
            let watched = &mut self.watched[usize::from(shard)];
            if let Some(watch) = watched.get_mut(&local) {
                if let Some(at) = watch.ids.iter().position(|&other| other == id) {
                    watch.ids.swap_remove(at);
                }
                if watch.ids.is_empty() {
                    watched.remove(&local);
                }
            }
        }
        self.free.push(id);
        Some(waiter.request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(high_watermark: i64, bytes: u64) -> Progress {
        Progress {
            high_watermark,
            bytes,
        }
    }

    #[test]
    fn wakes_those_who_have_enough() {
        let mut waiting = Waiting::new(2);
        waiting.add("one byte", &[((0, 3), at(10, 100))], 1, 1000);
        waiting.add(
            "much",
            &[((0, 3), at(10, 100)), ((1, 0), at(0, 0))],
            500,
            2000,
        );
        waiting.look(0, |_| Some(at(10, 180)));
        assert_eq!(waiting.next_ready(0), None, "stored, and not durable");
        waiting.look(0, |_| Some(at(11, 180)));
        assert_eq!(waiting.next_ready(0), Some("one byte"));
        assert_eq!(waiting.next_ready(0), None);
        waiting.look(1, |_| Some(at(7, 419)));
        assert_eq!(waiting.next_ready(0), None);
        waiting.look(1, |_| Some(at(8, 420)));
        assert_eq!(waiting.next_ready(0), Some("much"));
        assert!(waiting.is_empty() && !waiting.watches(0) && !waiting.watches(1));
    }

    #[test]
    fn deadlines_and_deleted_partitions_wake() {
        let mut waiting = Waiting::new(1);
        waiting.add(1, &[((0, 0), at(0, 0))], 10, 50);
        waiting.add(2, &[((0, 1), at(0, 0))], 10, 60);
        let gone = waiting.add(3, &[((0, 1), at(0, 0)), ((7, 0), at(0, 0))], 10, 5);
        assert_eq!(waiting.forget(gone), Some(3));
        assert_eq!(waiting.next_deadline(), Some(50));
        assert_eq!(waiting.next_ready(49), None);
        assert_eq!(waiting.next_ready(50), Some(1));
        waiting.look(0, |_| None);
        assert_eq!(waiting.next_ready(50), Some(2));
        assert_eq!(waiting.next_deadline(), None);
    }

    proptest! {
        /// Against fetches that look at everything themselves: none is woken late, none twice.
        #[test]
        fn nobody_sleeps_over_data(steps in prop::collection::vec((0u8..4, 0u32..4, 1u64..100), 1..200)) {
            let mut waiting = Waiting::new(2);
            let mut state = [at(0, 0); 4];
            type Sleeper = (WaitId, usize, Vec<u32>, [Progress; 4], u64);
            let mut open: Vec<Sleeper> = Vec::new();
            let mut next = 0;
            let place = |p: u32| ((p % 2) as u16, p / 2);
            for (step, p, n) in steps {
                match step {
                    0 => {
                        let parts: Vec<u32> = (0..4).filter(|q| q % (p + 1) == 0).collect();
                        let seen: Vec<_> = parts.iter().map(|&q| (place(q), state[q as usize])).collect();
                        let id = waiting.add(next, &seen, n, u64::MAX);
                        open.push((id, next, parts, state, n));
                        next += 1;
                    }
                    1 | 2 => {
                        let s = &mut state[p as usize];
                        *s = at(s.high_watermark + 1, s.bytes + n);
                    }
                    _ if !open.is_empty() && n % 4 == 0 => {
                        let (id, request, ..) = open.swap_remove(n as usize % open.len());
                        prop_assert_eq!(waiting.forget(id), Some(request));
                    }
                    _ => {}
                }
                for shard in 0..2u32 {
                    waiting.look(shard as usize, |local| Some(state[(local * 2 + shard) as usize]));
                }
                while let Some(request) = waiting.next_ready(0) {
                    let at = open.iter().position(|o| o.1 == request);
                    prop_assert!(at.is_some(), "{} was woken twice", request);
                    open.swap_remove(at.unwrap());
                }
                for (_, request, parts, seen, lacks) in &open {
                    let gained: u64 = parts.iter().map(|&q| state[q as usize].bytes - seen[q as usize].bytes).sum();
                    prop_assert!(gained < *lacks, "{} sleeps", request);
                }
                prop_assert_eq!(waiting.len(), open.len());
            }
        }
    }
}
