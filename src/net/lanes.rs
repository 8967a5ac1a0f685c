//! The ways from a receiver (an rx lcore, or the thread of kernel UDP) to the shards and back: which partition a message
//! goes to, what is shed, what a full ring drops, and the acknowledgements.
//!
//! It does not know how datagrams come in, nor what their buffers are. Invariant: every message of a delivered packet ends
//! under exactly one counter of its topic (handed to the shard, or dropped by reason), and what raw messages are lost here
//! leaves a gap in the log. The buffer of a message is the shard's once `Lanes::hand_over` has pushed it, else the
//! receiver's. Nothing allocates, waits or makes a system call but to wake a shard that sleeps.

use std::sync::Arc;

use crossbeam_queue::ArrayQueue;

use super::TopicTable;
use super::routes::{Choice, Place, RouteCell, Routes};
use crate::memory::spsc;
use crate::memory::wake::Wake;
use crate::shard::{Ack, GapReport, Inbound, Kind, Now, messages};
use crate::wire::datagram::{AckEntry, ErrorCode, ProduceHeader};
use crate::wire::record_batch;

/// Messages handed over at a time at most: a receiver's burst.
pub(super) const BURST_MOST: usize = 64;
/// Acknowledgements taken from the shards' rings in one round; bounds the round's length.
pub(super) const ACKS_A_ROUND: usize = 256;
/// A gap is reported when the first of its messages is this old: one record tells of all that were
/// lost meanwhile.
const GAP_INTERVAL_NS: i64 = 1_000_000_000;

/// The connection to one shard.
pub struct ShardLink {
    /// Messages to the shard.
    pub out: spsc::Producer<Inbound>,
    /// Acknowledgements from it.
    pub acks: spsc::Consumer<Ack>,
    /// Gap reports to it.
    pub gaps: Arc<ArrayQueue<GapReport>>,
    /// Its partitions.
    pub partitions: usize,
    /// Wakes the shard's loop, where that sleeps until it is woken.
    pub bell: Option<Arc<Wake>>,
}

/// The ways to the shards.
pub(super) struct Lanes {
    /// This receiver's place among the receivers.
    index: u8,
    shards: Vec<Outgoing>,
    routes: Arc<Routes>,
    /// Where newer ones come from, and the version of these.
    cell: Arc<RouteCell>,
    version: u64,
    /// Grows by one a burst, for [`Choice::Spread`].
    turn: u32,
    /// The shard whose acknowledgements are taken first.
    first: usize,
}

/// Messages for a shard that are not in its ring yet.
struct Outgoing {
    link: ShardLink,
    batch: Vec<Inbound>,
    /// Topics with a lower priority are shed in this burst.
    shed_below: u8,
    /// By local partition.
    gaps: Vec<Gap>,
    /// Partitions with an open gap.
    open: Vec<u32>,
}

/// Lost messages of one partition that no report has told of yet.
#[derive(Clone, Copy, Default)]
struct Gap {
    count: u64,
    from_ns: i64,
    to_ns: i64,
    port: u16,
    reason: &'static str,
}

impl Lanes {
    /// Of the receiver with this place among them all, which names it to the shards and to the topics' counters.
    pub(super) fn new(index: u8, shards: Vec<ShardLink>, routes: Arc<RouteCell>) -> Self {
        let shards = shards
            .into_iter()
            .map(|link| Outgoing {
                batch: Vec::with_capacity(BURST_MOST),
                shed_below: 0,
                gaps: vec![Gap::default(); link.partitions],
                open: Vec::with_capacity(link.partitions),
                link,
            })
            .collect();
        Self {
            index,
            shards,
            routes: routes.current(),
            cell: routes,
            // Whatever was published since is taken over at the first look.
            version: u64::MAX,
            turn: 0,
            first: 0,
        }
    }

    /// This receiver's place.
    #[inline(always)]
    pub(super) fn index(&self) -> u8 {
        self.index
    }

    /// Names and ids, for greetings.
    #[inline]
    pub(super) fn table(&self) -> &TopicTable {
        &self.routes.table
    }

    /// Tells the shards of losses that are a second old, and takes newer routes over.
    pub(super) fn periodic(&mut self, now: Now) {
        self.report_gaps(now.unix_ns, GAP_INTERVAL_NS);
        self.cell.refresh(&mut self.version, &mut self.routes);
    }

    /// Tells the shards of every loss, whatever its age; for a clean stop.
    pub(super) fn finish(&mut self, now: Now) {
        self.report_gaps(now.unix_ns, 0);
    }

    /// Begins a burst: looks how full the shards' rings are.
    #[inline]
    pub(super) fn begin(&mut self) {
        self.turn = self.turn.wrapping_add(1);
        for shard in &mut self.shards {
            shard.shed_below = shed_below(&mut shard.link.out);
        }
    }

    /// A message, or lines of them, for raw source `route`; its partition is chosen here, where need be by `hash` of the
    /// sender. False: it was shed, and its buffer is still the caller's.
    #[inline(always)]
    pub(super) fn raw(
        &mut self,
        route: u16,
        message: Inbound,
        port: u16,
        hash: impl FnOnce() -> u64,
    ) -> bool {
        let route = &self.routes.raw[usize::from(route)];
        let choice = match route.choice {
            _ if route.places.len() == 1 => 0,
            Choice::Source => hash() as usize % route.places.len(),
            Choice::Spread => self.turn as usize % route.places.len(),
        };
        let place = route.places[choice];
        let count = messages(&message);
        let counters = &route.counters.receivers[usize::from(self.index)];
        counters.received.add(count);
        let shard = &mut self.shards[usize::from(place.shard)];
        if route.priority < shard.shed_below {
            counters.shed.add(count);
            shard.note_gap(place.local, count, port, "shed", message.time_ns());
            return false;
        }
        shard.batch.push(message.to_partition(place.local));
        true
    }

    /// Where a record batch of the datagram protocol goes; `None`: there is no such partition.
    #[inline]
    pub(super) fn place(&self, header: &ProduceHeader) -> Option<Place> {
        let served = self.routes.by_id.get(header.topic_id as usize)?.as_ref()?;
        served.places.get(header.partition as usize).copied()
    }

    /// A record batch for `place`, which [`Lanes::place`] gave in the same burst.
    #[inline]
    pub(super) fn produce(&mut self, header: &ProduceHeader, place: Place, message: Inbound) {
        let served = self.routes.by_id.get(header.topic_id as usize);
        if let Some(Some(served)) = served {
            let counters = &served.counters.receivers[usize::from(self.index)];
            let claimed = record_batch::claimed_records(message.payload());
            counters.received.add(u64::from(claimed));
        }
        self.shards[usize::from(place.shard)]
            .batch
            .push(message.to_partition(place.local));
    }

    /// Ends a burst: pushes its messages into the shards' rings, and accounts for what did not fit, whose buffers `free`
    /// gets.
    #[inline]
    pub(super) fn hand_over(&mut self, port: u16, now: Now, mut free: impl FnMut(usize)) {
        for index in 0..self.shards.len() {
            let shard = &mut self.shards[index];
            if shard.batch.is_empty() {
                continue;
            }
            let taken = shard.link.out.push_burst(&shard.batch);
            if let Some(bell) = &shard.link.bell {
                bell.wake();
            }
            if taken < shard.batch.len() {
                self.ring_full(index, taken, port, now, &mut free);
            }
            self.shards[index].batch.clear();
        }
    }

    /// Drops what is behind the first `taken` messages of a shard's batch.
    #[cold]
    fn ring_full(
        &mut self,
        index: usize,
        taken: usize,
        port: u16,
        now: Now,
        free: &mut impl FnMut(usize),
    ) {
        let shard = &mut self.shards[index];
        for at in taken..shard.batch.len() {
            let inbound = shard.batch[at];
            let count = messages(&inbound);
            let topics = &self.routes.topic_of[index];
            if let Some(Some(topic)) = topics.get(inbound.partition() as usize) {
                let counters = &topic.receivers[usize::from(self.index)];
                counters.ring_full.add(count);
            }
            // A producer of the datagram protocol retransmits: nothing is lost.
            if inbound.kind() != Kind::Produce {
                shard.note_gap(inbound.partition(), count, port, "ring_full", now.unix_ns);
            }
            free(inbound.owner());
        }
    }

    /// Takes acknowledgements from the shards' rings until `acks` holds [`ACKS_A_ROUND`], beginning with another shard each
    /// time, so that none keeps the others' from their turn.
    #[inline]
    pub(super) fn take_acks(&mut self, acks: &mut Vec<Ack>) {
        let shards = self.shards.len();
        self.first = if self.first + 1 < shards {
            self.first + 1
        } else {
            0
        };
        for i in 0..shards {
            let at = (self.first + i) % shards;
            let room = ACKS_A_ROUND.saturating_sub(acks.len());
            self.shards[at].link.acks.pop_into(acks, room);
        }
    }

    /// Whether acknowledgements wait, for a look before sleeping.
    pub(super) fn has_acks(&mut self) -> bool {
        let mut shards = self.shards.iter_mut();
        shards.any(|shard| shard.link.acks.len() > 0)
    }

    /// Tells the shards of messages that were lost before them, where the loss is older than `age_ns`.
    fn report_gaps(&mut self, unix_ns: i64, age_ns: i64) {
        for shard in &mut self.shards {
            let Outgoing {
                gaps, open, link, ..
            } = shard;
            open.retain(|&local| {
                let gap = &mut gaps[local as usize];
                if unix_ns.saturating_sub(gap.from_ns) < age_ns {
                    return true;
                }
                let report = GapReport {
                    partition: local,
                    reason: gap.reason,
                    count: gap.count,
                    from_ms: gap.from_ns / 1_000_000,
                    to_ms: gap.to_ns / 1_000_000,
                    port: gap.port,
                };
                // A full queue keeps the gap open: it is told of later, with more in it.
                let told = link.gaps.push(report).is_ok();
                if told {
                    *gap = Gap::default();
                }
                !told
            });
        }
    }
}

impl Outgoing {
    #[cold]
    fn note_gap(&mut self, local: u32, count: u64, port: u16, reason: &'static str, unix_ns: i64) {
        let Some(gap) = self.gaps.get_mut(local as usize) else {
            return;
        };
        if gap.count == 0 {
            *gap = Gap {
                count: 0,
                from_ns: unix_ns,
                to_ns: unix_ns,
                port,
                reason,
            };
            self.open.push(local);
        }
        gap.count += count;
        gap.to_ns = unix_ns;
    }
}

/// Tells a producer that its partition does not exist.
#[cold]
pub(super) fn refusal(header: &ProduceHeader, batch: &[u8]) -> AckEntry {
    let parsed = record_batch::parse_header(batch).ok();
    AckEntry {
        request_id: header.request_id,
        topic_id: header.topic_id,
        partition: header.partition,
        base_offset: -1,
        base_sequence: parsed.map_or(-1, |h| h.base_sequence),
        producer_epoch: parsed.map_or(-1, |h| h.producer_epoch),
        error: ErrorCode::UnknownPartition,
        credit: 1,
    }
}

/// Spreads senders over partitions: FNV-1a over address and port, which mixes well enough for that and
/// costs a multiplication a byte.
#[inline]
pub(super) fn source_hash(address: &[u8], port: u16) -> u64 {
    let port = port.to_be_bytes();
    let hash = address
        .iter()
        .chain(&port)
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
    hash ^ (hash >> 32)
}

/// The priority below which topics are shed: 0 (nothing) while the ring is at most half full, then
/// one more for each further sixteenth, up to 7 (all but the highest). The hint is from the last time
/// that the consumer was looked at, so it can only be too high: then it is looked at again.
#[inline]
fn shed_below(ring: &mut spsc::Producer<Inbound>) -> u8 {
    let capacity = ring.capacity();
    if 2 * ring.len_hint() <= capacity {
        return 0;
    }
    let used = capacity - ring.free();
    ((16 * used / capacity).saturating_sub(8)).min(7) as u8
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn shedding_follows_the_ring_up_and_down() {
        // SAFETY: the memory is static, and nothing is released.
        let message = unsafe { Inbound::new(0, b"x".as_ptr(), 1, 0, 0, Kind::Raw, 0) };
        let (mut producer, mut consumer) = spsc::ring::<Inbound>(64);
        let levels: Vec<u8> = (0..64)
            .map(|_| {
                assert!(producer.push(message));
                shed_below(&mut producer)
            })
            .collect();
        assert!(levels[..35].iter().all(|&level| level == 0), "{levels:?}");
        assert!(levels.is_sorted(), "{levels:?}");
        assert_eq!(levels[63], 7);
        while consumer.pop().is_some() {}
        assert_eq!(shed_below(&mut producer), 0);
    }
}
