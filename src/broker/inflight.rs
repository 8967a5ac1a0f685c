//! Produce requests whose batches are on their way through shards.
//!
//! Invariants: a request is given back exactly once, when the last of its batches was answered or its time
//! is over, with one result a batch; an answer that comes after that is recognised by its tag's generation and
//! ignored. A tag is: slot (24 bits), generation of the slot (16), batch of the request (24).

use std::collections::BTreeSet;

/// Requests on their way at most: the slot's bits of a tag.
const MAX_REQUESTS: usize = 1 << 24;
/// Batches of a request at most: the batch's bits of a tag.
pub const MAX_BATCHES: usize = 1 << 24;

/// Names a request in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    slot: u32,
    generation: u16,
}

impl RequestId {
    /// The tag of one of its batches.
    ///
    /// # Panics
    /// When `batch` is not below [`MAX_BATCHES`].
    pub fn tag(self, batch: usize) -> u64 {
        assert!(batch < MAX_BATCHES, "batch {batch} of one request");
        u64::from(self.slot) << 40 | u64::from(self.generation) << 24 | batch as u64
    }
}

fn parts(tag: u64) -> (usize, u16, usize) {
    (
        (tag >> 40) as usize,
        (tag >> 24) as u16,
        (tag & (MAX_BATCHES as u64 - 1)) as usize,
    )
}

struct Entry<R, T> {
    request: R,
    results: Vec<Option<T>>,
    missing: usize,
    deadline_ns: u64,
}

struct Slot<R, T> {
    generation: u16,
    entry: Option<Entry<R, T>>,
}

/// The requests of a thread: `R` is what is needed to answer one, `T` the result of a batch.
pub struct InFlight<R, T> {
    slots: Vec<Slot<R, T>>,
    free: Vec<u32>,
    deadlines: BTreeSet<(u64, u32)>,
}

/// A request that is through: `None` are the batches that were not answered in time.
pub type Finished<R, T> = (R, Vec<Option<T>>);

impl<R, T> Default for InFlight<R, T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            deadlines: BTreeSet::new(),
        }
    }
}

impl<R, T> InFlight<R, T> {
    /// Requests on their way.
    pub fn len(&self) -> usize {
        self.deadlines.len()
    }

    /// Whether none is on its way.
    pub fn is_empty(&self) -> bool {
        self.deadlines.is_empty()
    }

    /// Takes a request in whose batches have these results so far, at least one of them not yet.
    ///
    /// # Panics
    /// When every batch has its result, or 16 million requests are on their way.
    pub fn begin(&mut self, request: R, results: Vec<Option<T>>, deadline_ns: u64) -> RequestId {
        let missing = results.iter().filter(|r| r.is_none()).count();
        assert!(missing > 0, "a request that waits for nothing");
        let slot = self.free.pop().unwrap_or_else(|| {
            assert!(self.slots.len() < MAX_REQUESTS, "too many requests");
            self.slots.push(Slot {
                generation: 0,
                entry: None,
            });
            (self.slots.len() - 1) as u32
        });
        self.deadlines.insert((deadline_ns, slot));
        let place = &mut self.slots[slot as usize];
        place.entry = Some(Entry {
            request,
            results,
            missing,
            deadline_ns,
        });
        RequestId {
            slot,
            generation: place.generation,
        }
    }

    /// Takes the answer to a batch; gives its request when that was the last one.
    pub fn settle(&mut self, tag: u64, result: T) -> Option<Finished<R, T>> {
        let (slot, generation, batch) = parts(tag);
        let place = self.slots.get_mut(slot)?;
        if place.generation != generation {
            return None;
        }
        let entry = place.entry.as_mut()?;
        let held = entry.results.get_mut(batch)?;
        if held.is_none() {
            *held = Some(result);
            entry.missing -= 1;
        }
        if entry.missing > 0 {
            return None;
        }
        self.take(slot)
    }

    /// The next moment, in monotonic nanoseconds, at which a request has waited long enough.
    pub fn next_deadline(&self) -> Option<u64> {
        self.deadlines.first().map(|d| d.0)
    }

    /// A request that has waited until `now_ns`.
    pub fn expired(&mut self, now_ns: u64) -> Option<Finished<R, T>> {
        let &(deadline, slot) = self.deadlines.first()?;
        if deadline > now_ns {
            return None;
        }
        self.take(slot as usize)
    }

    fn take(&mut self, slot: usize) -> Option<Finished<R, T>> {
        let place = &mut self.slots[slot];
        let entry = place.entry.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.deadlines.remove(&(entry.deadline_ns, slot as u32));
        self.free.push(slot as u32);
        Some((entry.request, entry.results))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_through_with_its_last_batch() {
        let mut flights = InFlight::default();
        let a = flights.begin("a", vec![None, Some(7), None], 100);
        let b = flights.begin("b", vec![None], 50);
        assert_eq!(flights.settle(a.tag(2), 2), None);
        assert_eq!(flights.settle(a.tag(2), 3), None, "counted once");
        assert_eq!(flights.settle(b.tag(0), 9), Some(("b", vec![Some(9)])));
        assert_eq!(flights.settle(b.tag(0), 9), None);
        assert_eq!(
            flights.settle(a.tag(0), 1),
            Some(("a", vec![Some(1), Some(7), Some(2)]))
        );
        assert!(flights.is_empty());
        assert_eq!(flights.settle(u64::MAX, 1), None);
    }

    #[test]
    fn late_answers_do_not_reach_the_next_request_in_the_slot() {
        let mut flights = InFlight::default();
        let a = flights.begin("a", vec![None, None], 100);
        flights.settle(a.tag(0), 1);
        assert_eq!(flights.next_deadline(), Some(100));
        assert_eq!(flights.expired(99), None);
        assert_eq!(flights.expired(100), Some(("a", vec![Some(1), None])));
        let b = flights.begin("b", vec![None, None], 200);
        assert_eq!((b.slot, b.generation), (a.slot, a.generation + 1));
        assert_eq!(flights.settle(a.tag(1), 5), None);
        flights.settle(b.tag(1), 6);
        assert_eq!(
            flights.settle(b.tag(0), 7),
            Some(("b", vec![Some(7), Some(6)]))
        );
        assert_eq!(flights.len(), 0);
    }
}
