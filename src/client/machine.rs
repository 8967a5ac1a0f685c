//! The producer as a state machine: messages, datagrams and time in; datagrams and events out.
//!
//! Does no I/O and reads no clock, so that a test can run it through years of loss and restarts in
//! a second.
//!
//! Invariants, per partition:
//! - Batches that have been sent form a prefix of the queue, at most [`WINDOW`] long, with adjoining
//!   sequences of one epoch: the server remembers as many, so each retransmission is recognised.
//! - A batch that has been sent keeps epoch and sequence until it is acknowledged or failed. It gets
//!   new ones in one case only: the server refuses, as out of order, a batch that was sent when all
//!   before it had been acknowledged. A server that takes sequences only in order then holds none of
//!   the batches behind it either.
//! - Each message is reported exactly once, as delivered, sent or failed.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ops::Range;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};

use super::batch::{ClosedBatch, DATAGRAM_OVERHEAD, OpenBatch};
use super::partitioner::{Target, partition_of_key};
use super::rtt::RttEstimator;
use super::{
    Acks, ConnectError, Event, FailReason, Fate, MIN_DATAGRAM, ProducerConfig, SendError, Ticket,
};
use crate::wire::datagram::{
    AckEntry, CLIENT_PRODUCER_ID_BIT, ErrorCode, Hello, MAX_INFLIGHT_BATCHES, MAX_TOPIC_NAME,
    ProduceHeader, Response, Welcome,
};

/// Batches from the oldest unacknowledged one to the newest sent one.
const WINDOW: usize = MAX_INFLIGHT_BATCHES;
/// Bits of a request id that count the transmissions of a batch; the others name the batch.
const ATTEMPT_BITS: u32 = 16;
/// First wait after the server said that it is under pressure.
const BUSY_HOLD_NS: u64 = 2_000_000;
/// First wait after the server said that it cannot store; a disk is not freed in microseconds.
const STORAGE_HOLD_NS: u64 = 20_000_000;
/// Longest such wait: how late the end of an outage may be noticed.
const MAX_HOLD_NS: u64 = 1_000_000_000;
/// Transmissions of a batch that the server may call malformed before it is believed: a bit may
/// have flipped on the way.
const MAX_INVALID: u8 = 3;
/// Between two greetings, at first and at most.
const HELLO_RETRY_NS: (u64, u64) = (50_000_000, 1_000_000_000);
/// Events that may wait for the application before no more messages are taken; each is about 64
/// bytes.
const MAX_EVENTS: usize = 1 << 16;
/// Reordering that is not taken for loss, as a part of the round trip (RFC 8985, 6.2).
const REORDER_PART: u64 = 4;
const NEVER: u64 = u64::MAX;

/// The time, read once for a round of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Monotonic nanoseconds.
    pub mono_ns: u64,
    /// Unix milliseconds; the messages' timestamps.
    pub unix_ms: i64,
}

/// Names a datagram that is to be sent; see [`Machine::datagram`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit(Source);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Hello,
    Batch { partition: u32, id: u64 },
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Messages taken by `send`.
    pub accepted: u64,
    /// Messages reported delivered, or sent with `acks=0`.
    pub delivered: u64,
    /// Messages reported failed.
    pub failed: u64,
    /// PRODUCE datagrams, retransmissions included.
    pub datagrams: u64,
    /// Retransmissions.
    pub retransmissions: u64,
    /// Retransmission timeouts.
    pub timeouts: u64,
    /// Refusals, all reasons.
    pub refusals: u64,
    /// Datagrams and entries that fit nothing under way: late, doubled or foreign.
    pub stray: u64,
    /// Epochs begun after the first.
    pub epoch_bumps: u64,
}

#[derive(Debug)]
enum Link {
    Greeting {
        request_id: u64,
        retry_at: u64,
        wait: u64,
        due: bool,
    },
    Up,
    Refused(ErrorCode),
    Unusable(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// To be sent, for the first time or again.
    Queued,
    InFlight,
    /// Reported; keeps its place until it is the oldest.
    Acked,
    /// Refused for good; fails when it is the oldest.
    Doomed(FailReason),
}

#[derive(Debug)]
struct Batch {
    /// Gone once acknowledged.
    body: Option<ClosedBatch>,
    count: u32,
    first: u64,
    created: u64,
    state: State,
    epoch: i16,
    base_sequence: i32,
    /// Transmissions so far.
    attempts: u32,
    /// Of those, a prefix that was refused.
    refused: u32,
    invalid: u8,
    /// Place of the last transmission among all of the partition.
    order: u64,
    sent_at: u64,
    /// Everything before it had been acknowledged when it was last sent.
    sole: bool,
}

impl Batch {
    fn messages(&self) -> Range<u64> {
        self.first..self.first + u64::from(self.count)
    }

    fn fate(&self) -> Fate {
        if self.attempts == 0 {
            Fate::NotSent
        } else if self.refused == self.attempts {
            Fate::Refused
        } else {
            Fate::Unknown
        }
    }
}

#[derive(Debug)]
struct Partition {
    producer_id: i64,
    epoch: i16,
    next_sequence: i32,
    next_message: u64,
    open: Option<OpenBatch>,
    batches: VecDeque<Batch>,
    /// Id of `batches[0]`; ids are consecutive.
    front_id: u64,
    /// How many of `batches` have been sent.
    sent: usize,
    /// How many of `batches` are in flight.
    in_flight: usize,
    /// All sent ones are in flight or acknowledged, sent in order of their sequences.
    clean: bool,
    next_order: u64,
    /// Largest order that was acknowledged.
    acked_order: u64,
    /// Losses of transmissions before this one have been answered by a smaller window already.
    recover_order: u64,
    /// Congestion window, in batches.
    congestion: usize,
    /// The server's credit, in batches.
    credit: u32,
    backoff: u32,
    rto_base: u64,
    /// When a batch overtaken by an acknowledgement counts as lost.
    reorder_at: u64,
    hold_until: u64,
    holds: u32,
    last_refusal: Option<ErrorCode>,
    /// The server stored a batch of this epoch on its first transmission.
    established: bool,
    flushing: bool,
    fatal: Option<FailReason>,
    /// In the ready queue.
    ready: bool,
    /// Earliest entry in the heap of timers.
    timer: u64,
}

/// Everything of a batch but its partition, to be put into an event.
type Outcome = (Range<u64>, FailReason, Fate);

/// The producer's state machine. Drive it with [`Machine::receive`], [`Machine::tick`],
/// [`Machine::poll_transmit`] and [`Machine::next_event`], not later than [`Machine::deadline`].
#[derive(Debug)]
pub struct Machine {
    topic: String,
    producer_id: Option<i64>,
    first_epoch: i16,
    acks: Option<Acks>,
    linger: u64,
    delivery_timeout: u64,
    max_datagram: usize,
    max_buffered: usize,
    link: Link,
    topic_id: u32,
    level: Acks,
    rtt: RttEstimator,
    partitions: Vec<Partition>,
    ready: VecDeque<u32>,
    timers: BinaryHeap<Reverse<(u64, u32)>>,
    /// Partitions touched by the datagram at hand.
    touched: Vec<u32>,
    /// Partitions whose timers have run out.
    expired: Vec<u32>,
    /// Partitions whose `acks=0` batches are with the network.
    handed_over: Vec<u32>,
    pool: Vec<Box<[u8]>>,
    buffers: usize,
    max_buffers: usize,
    sticky: u32,
    highest_epoch: i16,
    events: VecDeque<Event>,
    hello: Vec<u8>,
    stats: Stats,
    rng: SmallRng,
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(NEVER)
}

impl Machine {
    /// A machine that greets the server first. The configuration has been checked; `max_datagram`
    /// bounds the configured one (the path's MTU); `seed` is random.
    pub fn new(config: &ProducerConfig, max_datagram: usize, seed: u64, now: Now) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let request_id = rng.random();
        let mut hello = vec![0; 18 + MAX_TOPIC_NAME];
        let len = Hello {
            request_id,
            topic: &config.topic,
        }
        .encode(&mut hello);
        hello.truncate(len);
        Self {
            topic: config.topic.clone(),
            producer_id: config.producer_id,
            first_epoch: config.epoch,
            acks: config.acks,
            linger: nanos(config.linger),
            delivery_timeout: nanos(config.delivery_timeout),
            max_datagram: config.max_datagram.min(max_datagram).max(MIN_DATAGRAM),
            max_buffered: config.max_buffered_bytes,
            link: Link::Greeting {
                request_id,
                retry_at: now.mono_ns,
                wait: HELLO_RETRY_NS.0,
                due: true,
            },
            topic_id: 0,
            level: Acks::Durable,
            rtt: RttEstimator::new(
                nanos(config.retry_initial),
                nanos(config.retry_min),
                nanos(config.retry_max),
            ),
            partitions: Vec::new(),
            ready: VecDeque::new(),
            timers: BinaryHeap::new(),
            touched: Vec::new(),
            expired: Vec::new(),
            handed_over: Vec::new(),
            pool: Vec::new(),
            buffers: 0,
            max_buffers: 0,
            sticky: 0,
            highest_epoch: config.epoch,
            events: VecDeque::new(),
            hello,
            stats: Stats::default(),
            rng,
        }
    }

    /// Whether the server has answered the greeting: `Ok(false)` while not.
    pub fn connected(&self) -> Result<bool, ConnectError> {
        match self.link {
            Link::Greeting { .. } => Ok(false),
            Link::Up => Ok(true),
            Link::Refused(error) => Err(ConnectError::Refused {
                topic: self.topic.clone(),
                error,
            }),
            Link::Unusable(what) => Err(ConnectError::Welcome(what)),
        }
    }

    /// Number of partitions; 0 before the greeting is answered.
    pub fn partitions(&self) -> u32 {
        self.partitions.len() as u32
    }

    /// The acknowledgement level in use.
    pub fn acks(&self) -> Acks {
        self.level
    }

    /// The producer id of partition 0 and the highest epoch used in any partition.
    pub fn identity(&self) -> (Option<i64>, i16) {
        let id = self.partitions.first().map(|p| p.producer_id);
        (id, self.highest_epoch)
    }

    /// Key and value may have this many bytes together.
    pub fn max_message(&self) -> usize {
        self.max_datagram.saturating_sub(DATAGRAM_OVERHEAD)
    }

    /// Counts so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The smoothed round trip, acknowledgement included, in nanoseconds.
    pub fn round_trip_ns(&self) -> Option<u64> {
        self.rtt.smoothed()
    }

    /// Messages taken and not yet reported.
    pub fn outstanding(&self) -> u64 {
        self.stats.accepted - self.stats.delivered - self.stats.failed
    }

    /// The oldest event.
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Whether an event is there.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Whether a partition has something to send.
    pub fn has_transmits(&self) -> bool {
        !self.ready.is_empty() || matches!(self.link, Link::Greeting { due: true, .. })
    }

    /// Partitions that wait to send.
    pub fn ready_partitions(&self) -> usize {
        self.ready.len()
    }

    /// Takes a message. Cost: a copy of key and value.
    #[inline]
    pub fn send(
        &mut self,
        now: Now,
        target: Target,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
    ) -> Result<Ticket, SendError> {
        let partitions = self.partitions.len() as u32;
        if partitions == 0 {
            return Err(SendError::NotConnected);
        }
        let size = key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len);
        if size > self.max_message() {
            return Err(SendError::TooLarge {
                size,
                limit: self.max_message(),
            });
        }
        if self.events.len() >= MAX_EVENTS {
            return Err(SendError::Full);
        }
        let mut index = match (target, key) {
            (Target::Partition(partition), _) if partition >= partitions => {
                return Err(SendError::Partition {
                    partition,
                    partitions,
                });
            }
            (Target::Partition(partition), _) => partition,
            (Target::Auto, Some(key)) => partition_of_key(key, partitions),
            (Target::Auto, None) => self.sticky,
        };
        let mut pushed = self.push(index, now, key, value)?;
        if !pushed {
            self.close_open(index);
            if target == Target::Auto && key.is_none() {
                if self.sticky == index {
                    self.sticky = (index + 1) % partitions;
                }
                index = self.sticky;
                pushed = self.push(index, now, key, value)?;
                if !pushed {
                    self.close_open(index);
                }
            }
        }
        if !pushed {
            let buffer = self.buffer().ok_or(SendError::Full)?;
            let partition = &mut self.partitions[index as usize];
            let mut open = OpenBatch::new(buffer, partition.next_message, now.mono_ns, now.unix_ms);
            pushed = open.push(now.unix_ms, key, value);
            debug_assert!(pushed, "a message within max_message fits an empty batch");
            partition.open = Some(open);
            self.make_ready(index);
            self.schedule(index, now.mono_ns);
        }
        let partition = &mut self.partitions[index as usize];
        let message = partition.next_message;
        partition.next_message += 1;
        self.stats.accepted += 1;
        Ok(Ticket {
            partition: index,
            message,
        })
    }

    /// Appends to the partition's open batch, if there is one and it has room.
    #[inline]
    fn push(
        &mut self,
        index: u32,
        now: Now,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
    ) -> Result<bool, SendError> {
        let partition = &mut self.partitions[index as usize];
        if let Some(reason) = partition.fatal {
            return Err(SendError::PartitionFailed {
                partition: index,
                reason,
            });
        }
        let open = partition.open.as_mut();
        Ok(open.is_some_and(|open| open.push(now.unix_ms, key, value)))
    }

    fn close_open(&mut self, index: u32) {
        let partition = &mut self.partitions[index as usize];
        if let Some(open) = partition.open.take() {
            partition.close(open);
            self.make_ready(index);
        }
    }

    /// Lets everything out without waiting for linger.
    pub fn flush(&mut self) {
        for index in 0..self.partitions() {
            let partition = &mut self.partitions[index as usize];
            if partition.open.is_some() {
                partition.flushing = true;
                self.make_ready(index);
            }
        }
    }

    /// Fails all that is not acknowledged; nothing more is sent.
    pub fn abort(&mut self) {
        for index in 0..self.partitions() {
            self.fail_all(index, FailReason::Closed);
        }
    }

    /// When [`Machine::tick`] has something to do, monotonic nanoseconds.
    pub fn deadline(&self) -> Option<u64> {
        let greeting = match self.link {
            Link::Greeting { retry_at, .. } => Some(retry_at),
            _ => None,
        };
        let timer = self.timers.peek().map(|&Reverse((at, _))| at);
        match (greeting, timer) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Does what the time asks for.
    pub fn tick(&mut self, now: Now) {
        if let Link::Greeting {
            retry_at,
            wait,
            due,
            ..
        } = &mut self.link
            && *retry_at <= now.mono_ns
        {
            *due = true;
            *retry_at = now.mono_ns.saturating_add(*wait);
            *wait = (*wait * 2).min(HELLO_RETRY_NS.1);
        }
        // Each partition once: what is due again at once waits for poll_transmit.
        let mut expired = std::mem::take(&mut self.expired);
        while let Some(&Reverse((at, index))) = self.timers.peek()
            && at <= now.mono_ns
        {
            self.timers.pop();
            let partition = &mut self.partitions[index as usize];
            // A timer that was set anew for earlier has left this entry behind.
            if partition.timer == at {
                partition.timer = NEVER;
                expired.push(index);
            }
        }
        for index in expired.drain(..) {
            self.expire(index, now.mono_ns);
            self.schedule(index, now.mono_ns);
        }
        self.expired = expired;
    }

    /// Takes a datagram from the server.
    pub fn receive(&mut self, now: Now, datagram: &[u8]) {
        match Response::decode(datagram) {
            Err(_) => self.stats.stray += 1,
            Ok(Response::Welcome(welcome)) => self.welcome(&welcome),
            Ok(Response::Ack(entries)) => {
                for entry in entries {
                    self.acknowledge(now.mono_ns, &entry);
                }
                let mut touched = std::mem::take(&mut self.touched);
                for index in touched.drain(..) {
                    self.settle(index, now.mono_ns);
                    self.make_ready(index);
                    self.schedule(index, now.mono_ns);
                }
                self.touched = touched;
            }
        }
    }

    /// Chooses the datagrams to be sent now, at most `limit`, and appends them to `out`. They count
    /// as sent; their bytes are at [`Machine::datagram`] until the next call of another `&mut`
    /// method that may free them. Calling again says that the former ones are with the network.
    pub fn poll_transmit(&mut self, now: Now, limit: usize, out: &mut Vec<Transmit>) {
        self.release_handed_over();
        if let Link::Greeting { due, .. } = &mut self.link {
            if std::mem::take(due) {
                out.push(Transmit(Source::Hello));
            }
            return;
        }
        let mut turns = self.ready.len();
        while turns > 0
            && out.len() < limit
            && let Some(index) = self.ready.pop_front()
        {
            turns -= 1;
            self.partitions[index as usize].ready = false;
            self.transmit(index, now.mono_ns, limit, out);
            if out.len() >= limit {
                // Perhaps not done; its next turn comes after the others'.
                self.make_ready(index);
            }
            self.schedule(index, now.mono_ns);
        }
    }

    /// The bytes of a datagram; `None` when it is no longer of use.
    pub fn datagram(&self, transmit: Transmit) -> Option<&[u8]> {
        match transmit.0 {
            Source::Hello => Some(&self.hello),
            Source::Batch { partition, id } => {
                let partition = self.partitions.get(partition as usize)?;
                let at = usize::try_from(id.checked_sub(partition.front_id)?).ok()?;
                Some(partition.batches.get(at)?.body.as_ref()?.datagram())
            }
        }
    }

    fn welcome(&mut self, welcome: &Welcome) {
        match self.link {
            Link::Greeting { request_id, .. } if request_id == welcome.request_id => {}
            _ => {
                self.stats.stray += 1;
                return;
            }
        }
        if welcome.error != ErrorCode::None {
            self.link = Link::Refused(welcome.error);
            return;
        }
        let default = Acks::from_wire(welcome.default_acks);
        let Some(level) = self.acks.or(default) else {
            self.link = Link::Unusable("its default acknowledgement level is unknown");
            return;
        };
        if welcome.partitions == 0 || welcome.partitions > MAX_PARTITIONS {
            self.link = Link::Unusable("its number of partitions is impossible");
            return;
        }
        if (welcome.max_datagram as usize) < MIN_DATAGRAM {
            self.link = Link::Unusable("it takes no datagram of 256 bytes");
            return;
        }
        self.level = level;
        self.topic_id = welcome.topic_id;
        self.max_datagram = self.max_datagram.min(welcome.max_datagram as usize);
        self.max_buffers = (self.max_buffered / self.max_datagram).max(2);
        let id = match self.producer_id {
            // Without acknowledgements each batch has an epoch of its own, which would use up those
            // of a stable id.
            Some(id) if level != Acks::None => id,
            _ => self.random_id(),
        };
        for _ in 0..welcome.partitions {
            // Ids of batches begin anywhere, so that an answer to an earlier instance with the same
            // port finds nothing here.
            let front_id = self.rng.random::<u64>() >> (ATTEMPT_BITS + 1);
            self.partitions.push(Partition::new(
                id,
                self.first_epoch,
                front_id,
                welcome.credit,
            ));
        }
        self.sticky = self.rng.random_range(0..welcome.partitions);
        self.link = Link::Up;
    }

    fn random_id(&mut self) -> i64 {
        CLIENT_PRODUCER_ID_BIT | (self.rng.next_u64() as i64 & (CLIENT_PRODUCER_ID_BIT - 1))
    }

    fn buffer(&mut self) -> Option<Box<[u8]>> {
        if let Some(buffer) = self.pool.pop() {
            return Some(buffer);
        }
        if self.buffers >= self.max_buffers {
            return None;
        }
        self.buffers += 1;
        Some(vec![0; self.max_datagram].into_boxed_slice())
    }

    fn make_ready(&mut self, index: u32) {
        let partition = &mut self.partitions[index as usize];
        if !partition.ready {
            partition.ready = true;
            self.ready.push_back(index);
        }
    }

    /// Sets the partition's timer, unless an earlier one is set.
    fn schedule(&mut self, index: u32, now: u64) {
        let at = self.due(index, now);
        let partition = &mut self.partitions[index as usize];
        if at < partition.timer {
            partition.timer = at;
            self.timers.push(Reverse((at, index)));
        }
    }

    fn due(&self, index: u32, now: u64) -> u64 {
        let partition = &self.partitions[index as usize];
        let oldest = match (partition.batches.front(), &partition.open) {
            (Some(batch), _) => batch.created,
            (None, Some(open)) => open.created,
            (None, None) => return NEVER,
        };
        let mut at = oldest.saturating_add(self.delivery_timeout);
        if partition.in_flight > 0 {
            at = at.min(
                partition
                    .rto_base
                    .saturating_add(self.rtt.timeout(partition.backoff)),
            );
            at = at.min(partition.reorder_at);
        }
        if partition.hold_until > now {
            return at.min(partition.hold_until);
        }
        // While it is not clean, an answer or the timeout makes the partition ready.
        if let Some(open) = &partition.open
            && partition.clean
            && partition.sent == partition.batches.len()
            && partition.in_flight < partition.limit()
            && partition.sent < WINDOW
        {
            at = at.min(open.created.saturating_add(self.linger));
        }
        at
    }

    /// A timer of the partition has run out.
    fn expire(&mut self, index: u32, now: u64) {
        let rto = self.rtt.timeout(self.partitions[index as usize].backoff);
        let partition = &mut self.partitions[index as usize];
        if partition.in_flight > 0 && partition.rto_base.saturating_add(rto) <= now {
            partition.lose_before(NEVER);
            partition.congestion = 1;
            partition.recover_order = partition.next_order;
            partition.backoff = (partition.backoff + 1).min(16);
            partition.rto_base = now;
            self.stats.timeouts += 1;
        } else if partition.in_flight > 0 && partition.reorder_at <= now {
            let before = partition.acked_order;
            partition.lose_before(before);
            partition.shrink();
        }
        self.settle(index, now);
        self.make_ready(index);
    }

    /// Goes on with this sequence in each partition, all of which are idle.
    #[cfg(test)]
    pub(super) fn jump_to_sequence(&mut self, sequence: i32) {
        for partition in &mut self.partitions {
            partition.next_sequence = sequence;
        }
    }

    /// Takes one answer.
    fn acknowledge(&mut self, now: u64, entry: &AckEntry) {
        let known = matches!(self.link, Link::Up) && entry.topic_id == self.topic_id;
        let Some(partition) = self
            .partitions
            .get_mut(entry.partition as usize)
            .filter(|_| known)
        else {
            self.stats.stray += 1;
            return;
        };
        let id = entry.request_id >> ATTEMPT_BITS;
        let at = match id.checked_sub(partition.front_id) {
            Some(at) if at < partition.sent as u64 => at as usize,
            _ => {
                self.stats.stray += 1;
                return;
            }
        };
        if self.touched.last() != Some(&entry.partition) {
            self.touched.push(entry.partition);
        }
        let batch = &mut partition.batches[at];
        let last = u64::from(batch.attempts.max(1) - 1);
        let attempt = entry.request_id & ATTEMPT_MASK;
        let latest = attempt == last & ATTEMPT_MASK;
        if attempt > last {
            self.stats.stray += 1;
            return;
        }
        partition.credit = entry.credit;
        if matches!(entry.error, ErrorCode::None | ErrorCode::Duplicate) {
            if batch.epoch != entry.producer_epoch
                || batch.base_sequence != entry.base_sequence
                || matches!(batch.state, State::Acked | State::Doomed(_))
            {
                self.stats.stray += 1;
                return;
            }
            if entry.error == ErrorCode::None {
                partition.established = true;
                if latest {
                    self.rtt.sample(now.saturating_sub(batch.sent_at));
                }
            } else if self.producer_id.is_some()
                && ((!partition.established && batch.attempts == 1) || entry.base_offset < 0)
            {
                // Stored before, yet sent for the first time; or so long ago that the server has
                // forgotten where, though it remembers a whole window. This was not us.
                self.fail_all(entry.partition, FailReason::EpochReused);
                return;
            }
            if latest {
                partition.acked_order = partition.acked_order.max(batch.order);
            }
            if batch.state == State::InFlight {
                partition.in_flight -= 1;
            }
            batch.state = State::Acked;
            partition.backoff = 0;
            partition.holds = 0;
            partition.hold_until = 0;
            partition.last_refusal = None;
            partition.rto_base = now;
            partition.congestion = (partition.congestion + 1).min(WINDOW);
            let messages = batch.messages();
            let body = batch.body.take();
            self.recycle(body);
            let base_offset = (entry.base_offset >= 0).then_some(entry.base_offset);
            self.deliver(entry.partition, messages, base_offset);
            return;
        }
        self.stats.refusals += 1;
        if batch.state != State::InFlight || !latest {
            self.stats.stray += 1;
            return;
        }
        partition.in_flight -= 1;
        partition.clean = false;
        partition.rto_base = now;
        batch.state = State::Queued;
        if batch.refused + 1 == batch.attempts {
            batch.refused += 1;
        }
        let order = batch.order;
        match entry.error {
            ErrorCode::OutOfOrder => {
                if batch.sole {
                    if batch.base_sequence == 0 {
                        // No server has a reason for this; do not spin.
                        partition.hold(now, BUSY_HOLD_NS);
                    } else {
                        self.begin_anew(entry.partition);
                    }
                    return;
                }
                // Whatever was sent before it and not stored has been refused or lost.
                partition.lose_before(order);
                partition.shrink_for(order);
            }
            ErrorCode::Busy => {
                partition.last_refusal = Some(entry.error);
                partition.hold(now, BUSY_HOLD_NS);
                partition.shrink_for(order);
            }
            ErrorCode::StorageFull | ErrorCode::StorageFailed => {
                partition.last_refusal = Some(entry.error);
                partition.hold(now, STORAGE_HOLD_NS);
                partition.congestion = 1;
            }
            ErrorCode::InvalidBatch if batch.invalid + 1 < MAX_INVALID => {
                batch.invalid += 1;
                partition.last_refusal = Some(entry.error);
                partition.hold(now, BUSY_HOLD_NS);
            }
            ErrorCode::Fenced => self.fail_all(entry.partition, FailReason::Fenced),
            error => batch.state = State::Doomed(FailReason::Refused(error)),
        }
    }

    /// After answers or time: lets go of what is done, gives up what is too late.
    fn settle(&mut self, index: u32, now: u64) {
        let acks_expected = self.level != Acks::None;
        loop {
            let partition = &mut self.partitions[index as usize];
            partition.pop_acked();
            let Some(front) = partition.batches.front() else {
                break;
            };
            let late = front.created.saturating_add(self.delivery_timeout) <= now;
            if let State::Doomed(reason) = front.state {
                self.abandon(index, reason);
            } else if !late {
                break;
            } else if partition.sent == 0 {
                let batch = partition.take_front();
                let reason = partition.timeout_reason();
                self.failed(index, (batch.messages(), reason, Fate::NotSent));
                self.recycle(batch.body);
            } else if !acks_expected {
                // With the network already; the next poll reports it sent.
                break;
            } else if partition
                .batches
                .iter()
                .take(partition.sent)
                .any(|b| b.state == State::Acked)
            {
                // A later one of the same sequence is stored, so this one is.
                if partition.batches[0].state == State::InFlight {
                    partition.in_flight -= 1;
                }
                let batch = partition.take_front();
                self.deliver(index, batch.messages(), None);
                self.recycle(batch.body);
            } else {
                let reason = partition.timeout_reason();
                self.abandon(index, reason);
            }
        }
        let partition = &mut self.partitions[index as usize];
        if partition.batches.is_empty()
            && let Some(open) = partition
                .open
                .take_if(|open| open.created.saturating_add(self.delivery_timeout) <= now)
        {
            let messages = open.first..open.first + u64::from(open.count());
            let reason = partition.timeout_reason();
            self.pool.push(open.into_buffer());
            self.failed(index, (messages, reason, Fate::NotSent));
        }
        // An acknowledgement has overtaken the oldest batch: lost, unless its own is just late.
        let smoothed = self.rtt.smoothed().unwrap_or(0);
        let partition = &mut self.partitions[index as usize];
        let overtaken = partition.batches.front().is_some_and(|front| {
            front.state == State::InFlight && front.order < partition.acked_order
        });
        if !overtaken {
            partition.reorder_at = NEVER;
        } else if partition.reorder_at == NEVER {
            partition.reorder_at = now.saturating_add(smoothed / REORDER_PART);
        }
    }

    /// Sends what the window allows.
    fn transmit(&mut self, index: u32, now: u64, limit: usize, out: &mut Vec<Transmit>) {
        let partition = &mut self.partitions[index as usize];
        if partition.hold_until > now {
            return;
        }
        let window = partition.limit();
        let acks = self.level;
        let mut at = 0;
        let mut in_flight = 0;
        let mut order = 0;
        if partition.clean {
            at = partition.sent;
            in_flight = partition.in_flight;
        }
        while at < WINDOW && out.len() < limit {
            if at == partition.batches.len() {
                // Only a batch that can go out at once is closed before it is full.
                let due = |open: &OpenBatch| {
                    partition.flushing || open.created.saturating_add(self.linger) <= now
                };
                if in_flight >= window || !partition.open.as_ref().is_some_and(due) {
                    break;
                }
                if let Some(open) = partition.open.take() {
                    partition.close(open);
                    partition.flushing = false;
                    if self.sticky == index {
                        self.sticky = (self.sticky + 1) % self.partitions.len() as u32;
                    }
                }
                return self.transmit(index, now, limit, out);
            }
            let sole = at == 0;
            let first_time = at >= partition.sent;
            let batch = &mut partition.batches[at];
            match batch.state {
                State::Acked => {}
                State::Doomed(_) => break,
                // Its predecessor was sent again after it: it was refused or will be a duplicate.
                // Nothing new before that is known.
                State::InFlight if batch.order < order => break,
                State::InFlight => {
                    order = batch.order;
                    in_flight += 1;
                }
                State::Queued => {
                    if in_flight >= window {
                        break;
                    }
                    let Some(body) = &mut batch.body else { break };
                    if first_time {
                        if acks == Acks::None && partition.next_sequence != 0 {
                            // Unanswered batches never retransmit, so a lost one would leave a gap
                            // and the server refuse all after it: each is a sequence of its own.
                            if partition.epoch == i16::MAX {
                                partition.producer_id = CLIENT_PRODUCER_ID_BIT
                                    | (self.rng.next_u64() as i64 & (CLIENT_PRODUCER_ID_BIT - 1));
                                partition.epoch = 0;
                            } else {
                                partition.epoch += 1;
                            }
                            partition.next_sequence = 0;
                        }
                        batch.epoch = partition.epoch;
                        batch.base_sequence = partition.next_sequence;
                        body.stamp(partition.producer_id, batch.epoch, batch.base_sequence);
                        partition.next_sequence = advance(partition.next_sequence, batch.count);
                        partition.sent = at + 1;
                    } else {
                        self.stats.retransmissions += 1;
                    }
                    let id = partition.front_id + at as u64;
                    body.address(&ProduceHeader {
                        topic_id: self.topic_id,
                        partition: index,
                        acks: acks.to_wire(),
                        request_id: id << ATTEMPT_BITS | u64::from(batch.attempts) & ATTEMPT_MASK,
                    });
                    batch.attempts += 1;
                    batch.state = State::InFlight;
                    batch.sent_at = now;
                    batch.order = partition.next_order;
                    batch.sole = sole;
                    order = partition.next_order;
                    partition.next_order += 1;
                    if partition.in_flight == 0 || sole {
                        partition.rto_base = now;
                    }
                    partition.in_flight += 1;
                    in_flight += 1;
                    self.stats.datagrams += 1;
                    out.push(Transmit(Source::Batch {
                        partition: index,
                        id,
                    }));
                }
            }
            at += 1;
        }
        partition.refresh_clean();
        if acks == Acks::None && partition.sent > 0 {
            partition.in_flight = 0;
            self.handed_over.push(index);
        }
    }

    /// `acks=0`: the network has them, that is all.
    fn release_handed_over(&mut self) {
        let mut handed_over = std::mem::take(&mut self.handed_over);
        for index in handed_over.drain(..) {
            while self.partitions[index as usize].sent > 0 {
                let partition = &mut self.partitions[index as usize];
                let batch = partition.take_front();
                let messages = batch.messages();
                self.stats.delivered += u64::from(batch.count);
                self.recycle(batch.body);
                self.events.push_back(Event::Sent {
                    partition: index,
                    messages,
                });
            }
            self.make_ready(index);
        }
        self.handed_over = handed_over;
    }

    /// Gives up all that has been sent in the partition, because the oldest of it failed for
    /// `reason`, and begins a new epoch.
    fn abandon(&mut self, index: u32, reason: FailReason) {
        let partition = &mut self.partitions[index as usize];
        let sent = partition.sent;
        partition.in_flight = 0;
        let mut reason = reason;
        for _ in 0..sent {
            let batch = self.partitions[index as usize].take_front();
            if batch.state != State::Acked {
                self.failed(index, (batch.messages(), reason, batch.fate()));
                reason = FailReason::Predecessor;
            }
            self.recycle(batch.body);
        }
        self.bump(index);
    }

    /// The server refused the oldest batch, sent when all before it was acknowledged: it has
    /// forgotten this producer, and holds neither it nor anything behind it. These get new sequences.
    fn begin_anew(&mut self, index: u32) {
        let partition = &mut self.partitions[index as usize];
        partition.pop_acked();
        partition.lose_before(NEVER);
        // No late answer may find a batch under its old id.
        partition.front_id += partition.batches.len() as u64;
        partition
            .batches
            .retain(|batch| batch.state != State::Acked);
        // What has been sent is numbered anew when it is sent again, as if for the first time.
        for batch in partition.batches.iter_mut().take(partition.sent) {
            batch.refused = batch.attempts;
        }
        partition.sent = 0;
        self.bump(index);
        let partition = &self.partitions[index as usize];
        if partition.fatal.is_none() {
            let epoch = partition.epoch;
            self.events.push_back(Event::ServerForgot {
                partition: index,
                epoch,
            });
        }
    }

    /// Begins a new epoch in the partition; nothing of the old one is in its window.
    fn bump(&mut self, index: u32) {
        if self.partitions[index as usize].epoch == i16::MAX {
            if self.producer_id.is_some() {
                self.fail_all(index, FailReason::EpochsExhausted);
                return;
            }
            let id = self.random_id();
            let partition = &mut self.partitions[index as usize];
            partition.producer_id = id;
            partition.epoch = -1;
        }
        let partition = &mut self.partitions[index as usize];
        partition.epoch += 1;
        partition.next_sequence = 0;
        // An epoch that was used before shows in the first one.
        partition.established = true;
        partition.clean = true;
        partition.congestion = 1;
        partition.recover_order = partition.next_order;
        self.highest_epoch = self.highest_epoch.max(partition.epoch);
        self.stats.epoch_bumps += 1;
    }

    /// The partition is of no more use, or the producer is closed.
    fn fail_all(&mut self, index: u32, reason: FailReason) {
        let partition = &mut self.partitions[index as usize];
        partition.fatal = Some(reason);
        partition.in_flight = 0;
        if let Some(open) = partition.open.take() {
            partition.close(open);
        }
        while !self.partitions[index as usize].batches.is_empty() {
            let batch = self.partitions[index as usize].take_front();
            if batch.state != State::Acked {
                self.failed(index, (batch.messages(), reason, batch.fate()));
            }
            self.recycle(batch.body);
        }
    }

    fn recycle(&mut self, body: Option<ClosedBatch>) {
        if let Some(body) = body {
            self.pool.push(body.into_buffer());
        }
    }

    fn failed(&mut self, partition: u32, (messages, reason, fate): Outcome) {
        self.stats.failed += messages.end - messages.start;
        self.events.push_back(Event::Failed {
            partition,
            messages,
            reason,
            fate,
        });
    }

    fn deliver(&mut self, partition: u32, messages: Range<u64>, base_offset: Option<i64>) {
        self.stats.delivered += messages.end - messages.start;
        // Neighbours become one event.
        if let Some(Event::Delivered {
            partition: last,
            messages: before,
            base_offset: Some(offset),
        }) = self.events.back_mut()
            && *last == partition
            && before.end == messages.start
            && base_offset == Some(*offset + (before.end - before.start) as i64)
        {
            before.end = messages.end;
            return;
        }
        self.events.push_back(Event::Delivered {
            partition,
            messages,
            base_offset,
        });
    }
}

const ATTEMPT_MASK: u64 = (1 << ATTEMPT_BITS) - 1;
/// More partitions than any server has; a greeting that claims more is not believed.
const MAX_PARTITIONS: u32 = 100_000;

/// Sequences count records and wrap from 2^31 − 1 to 0, as in Kafka.
fn advance(sequence: i32, records: u32) -> i32 {
    ((sequence as u32).wrapping_add(records) & i32::MAX as u32) as i32
}

impl Partition {
    fn new(producer_id: i64, epoch: i16, front_id: u64, credit: u32) -> Self {
        Self {
            producer_id,
            epoch,
            next_sequence: 0,
            next_message: 0,
            open: None,
            batches: VecDeque::new(),
            front_id,
            sent: 0,
            in_flight: 0,
            clean: true,
            next_order: 1,
            acked_order: 0,
            recover_order: 0,
            congestion: WINDOW,
            credit,
            backoff: 0,
            rto_base: 0,
            reorder_at: NEVER,
            hold_until: 0,
            holds: 0,
            last_refusal: None,
            established: false,
            flushing: false,
            fatal: None,
            ready: false,
            timer: NEVER,
        }
    }

    /// Batches that may be in flight. One always may: its answer brings new credit.
    fn limit(&self) -> usize {
        self.congestion
            .min(self.credit.min(WINDOW as u32) as usize)
            .max(1)
    }

    fn close(&mut self, open: OpenBatch) {
        let body = open.close();
        self.batches.push_back(Batch {
            count: body.count,
            first: body.first,
            created: body.created,
            body: Some(body),
            state: State::Queued,
            epoch: 0,
            base_sequence: 0,
            attempts: 0,
            refused: 0,
            invalid: 0,
            order: 0,
            sent_at: 0,
            sole: false,
        });
    }

    /// Removes the oldest batch. The caller accounts for `in_flight`.
    fn take_front(&mut self) -> Batch {
        let batch = self.batches.pop_front().expect("there is an oldest batch");
        self.front_id += 1;
        self.sent = self.sent.saturating_sub(1);
        batch
    }

    fn pop_acked(&mut self) {
        while self
            .batches
            .front()
            .is_some_and(|batch| batch.state == State::Acked)
        {
            self.take_front();
        }
    }

    /// What is in flight and was sent before `order` is to be sent again.
    fn lose_before(&mut self, order: u64) {
        for batch in self.batches.iter_mut().take(self.sent) {
            if batch.state == State::InFlight && batch.order < order {
                batch.state = State::Queued;
                self.in_flight -= 1;
                self.clean = false;
            }
        }
    }

    /// Whether the sent ones are in flight in order again.
    fn refresh_clean(&mut self) {
        if self.clean {
            return;
        }
        let mut order = 0;
        self.clean = self
            .batches
            .iter()
            .take(self.sent)
            .all(|batch| match batch.state {
                State::Acked => true,
                State::InFlight if batch.order > order => {
                    order = batch.order;
                    true
                }
                _ => false,
            });
    }

    /// Halves the window, once for all losses of a round trip.
    fn shrink_for(&mut self, order: u64) {
        if order >= self.recover_order {
            self.shrink();
        }
    }

    fn shrink(&mut self) {
        self.congestion = (self.congestion / 2).max(1);
        self.recover_order = self.next_order;
    }

    /// Sends nothing for a while, longer each time in a row.
    fn hold(&mut self, now: u64, base: u64) {
        if now >= self.hold_until {
            self.hold_until = now.saturating_add((base << self.holds.min(16)).min(MAX_HOLD_NS));
            self.holds += 1;
        }
    }

    fn timeout_reason(&self) -> FailReason {
        match self.last_refusal {
            Some(error) => FailReason::TimeoutRefused(error),
            None => FailReason::Timeout,
        }
    }
}
