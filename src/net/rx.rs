//! What an rx lcore runs: bursts from its queues, parsed in the mbuf, handed to shards; answers and
//! acknowledgements out.
//!
//! Invariants: every packet taken from a queue ends under exactly one counter of its port
//! (handled, delivered or dropped by reason), every message of a delivered packet under exactly one
//! of its topic (handed to the shard, or dropped by reason). An mbuf is either freed here or its
//! handle is in a ring. The loop allocates nothing, takes no lock and makes no system call.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_queue::ArrayQueue;

use super::{
    AckCoalescer, Demux, DropReason, Handled, NetCounters, ParseOptions, Parsed, Responder, Target,
    TopicTable, UdpPacket, parse, payload_offset, reply_to, udp_frame,
};
use crate::eal::{BURST, Mempool, RxBurst, RxQueue, TxBurst, TxQueue, free_handles};
use crate::memory::spsc;
use crate::shard::{Ack, GapReport, Inbound, Kind, Now, REPLY_TO_LEN, Release, messages};
use crate::telemetry::Counter;
use crate::wire::datagram::{AckEntry, ErrorCode, PRODUCE_HEADER_LEN, ProduceHeader, Request};
use crate::wire::ethernet::NO_VLAN;
use crate::wire::record_batch;

/// Packets fetched ahead of the one being parsed: the payload's first line takes about as long to
/// arrive as four packets take to parse.
const PREFETCH_AHEAD: usize = 4;
/// Acknowledgements taken from a shard's ring in one round; bounds the round's length.
const ACKS_A_ROUND: usize = 256;
/// A gap is reported when the first of its messages is this old: one record tells of all that were
/// lost meanwhile.
const GAP_INTERVAL_NS: i64 = 1_000_000_000;
/// Where an answer is written that finds no mbuf, so that its due time passes: the largest frame that
/// answers have.
const SCRATCH: usize = 2048;
/// How often the announcements (ARP, ND, group memberships) are looked after.
const ANNOUNCE_INTERVAL_NS: u64 = 10_000_000;

/// Where a raw UDP source leads.
#[derive(Debug, Clone)]
pub struct Route {
    /// The topic's counters.
    pub counters: Arc<TopicCounters>,
    /// How a partition is chosen.
    pub choice: Choice,
    /// 0 is shed first, 7 last.
    pub priority: u8,
    /// The partitions to choose from.
    pub places: Vec<Place>,
}

/// How a route chooses among its places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// By the sender's address and port.
    Source,
    /// Burst by burst, in turn.
    Spread,
}

/// Where a partition lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its shard.
    pub shard: u16,
    /// Its index within the shard.
    pub local: u32,
}

/// A topic as producers of the datagram protocol reach it.
#[derive(Debug)]
pub struct ServedRoute {
    /// Its counters.
    pub counters: Arc<TopicCounters>,
    /// Its partitions.
    pub places: Vec<Place>,
}

/// What every rx lcore knows of the topics.
#[derive(Debug)]
pub struct Routes {
    /// Raw UDP sources; the index in a [`Target`] is one into it.
    pub raw: Vec<Route>,
    /// Names and ids, for greetings.
    pub table: TopicTable,
    /// By topic id; `None` for ids that are not served.
    pub by_id: Vec<Option<Arc<ServedRoute>>>,
    /// By shard and local index: the topic's counters; `None` where it was deleted.
    pub topic_of: Vec<Vec<Option<Arc<TopicCounters>>>>,
}

/// The routes of the moment, for every rx lcore. Whoever publishes newer ones also frees the older ones, when
/// no lcore uses them any more.
#[derive(Debug)]
pub struct RouteCell {
    version: AtomicU64,
    routes: Mutex<RouteList>,
}

#[derive(Debug)]
struct RouteList {
    current: Arc<Routes>,
    old: Vec<Arc<Routes>>,
}

impl RouteCell {
    /// With the routes to begin with.
    pub fn new(routes: Routes) -> Self {
        Self {
            version: AtomicU64::new(0),
            routes: Mutex::new(RouteList {
                current: Arc::new(routes),
                old: Vec::new(),
            }),
        }
    }

    /// The newest routes.
    pub fn current(&self) -> Arc<Routes> {
        let list = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&list.current)
    }

    /// Replaces them; the lcores take them over within some milliseconds.
    pub fn publish(&self, routes: Routes) {
        let mut list = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut list.current, Arc::new(routes));
        list.old.push(old);
        list.old.retain(|routes| Arc::strong_count(routes) > 1);
        drop(list);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Replaces `routes` where there are newer ones than version `seen`. Never waits, allocates or frees.
    #[inline]
    fn refresh(&self, seen: &mut u64, routes: &mut Arc<Routes>) {
        let version = self.version.load(Ordering::Acquire);
        if version != *seen
            && let Ok(list) = self.routes.try_lock()
        {
            *routes = Arc::clone(&list.current);
            *seen = version;
        }
    }
}

/// What is counted of a topic before its messages are in a shard's hands.
#[derive(Debug)]
pub struct TopicCounters {
    /// By rx lcore; written by that lcore alone.
    pub lcores: Box<[TopicRx]>,
    /// Of all kernel threads.
    pub kernel: TopicKernel,
}

impl TopicCounters {
    /// For so many rx lcores.
    pub fn new(lcores: usize) -> Self {
        Self {
            lcores: (0..lcores).map(|_| TopicRx::default()).collect(),
            kernel: TopicKernel::default(),
        }
    }
}

/// What kernel threads count of a topic, in messages.
#[derive(Debug, Default)]
pub struct TopicKernel {
    received: AtomicU64,
    refused: [AtomicU64; ErrorCode::ALL.len()],
}

impl TopicKernel {
    /// Counts messages that a shard is going to get; to be called before they are sent to it.
    #[inline]
    pub fn receive(&self, messages: u64) {
        self.received.fetch_add(messages, Ordering::Relaxed);
    }

    /// Counts messages as received and refused by the thread itself.
    pub fn refuse(&self, reason: ErrorCode, messages: u64) {
        // Readers look at what became of messages first.
        self.received.fetch_add(messages, Ordering::Relaxed);
        self.refused[reason as usize].fetch_add(messages, Ordering::Release);
    }

    /// Messages received.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Acquire)
    }

    /// Messages refused before any shard saw them, by reason.
    pub fn refused(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        ErrorCode::ALL.iter().map(|&code| {
            (
                code.name(),
                self.refused[code as usize].load(Ordering::Acquire),
            )
        })
    }
}

/// What an rx lcore counts of a topic, in messages.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct TopicRx {
    /// Found in packets.
    pub received: Counter,
    /// Not handed over: the shard's ring was full.
    pub ring_full: Counter,
    /// Not handed over: shed by priority.
    pub shed: Counter,
}

/// Gives mbufs back to their pools.
#[derive(Debug, Default, Clone, Copy)]
pub struct MbufRelease;

impl Release for MbufRelease {
    #[inline]
    fn release(&mut self, owners: &[usize]) {
        // SAFETY: owners are handles that rx lcores took from their bursts, and a shard releases each
        // once, after its last use of the memory (contract of Release).
        unsafe { free_handles(owners) };
    }
}

/// A port as one rx lcore sees it.
pub struct RxPort {
    /// Receive queues of this lcore.
    pub rx: Vec<RxQueue>,
    /// Its transmit queue.
    pub tx: TxQueue,
    /// Where answers take their mbufs from.
    pub pool: Mempool,
    /// Knows the port's addresses; answers ARP, ND, ICMP, IGMP and MLD.
    pub responder: Responder,
    /// UDP ports → targets.
    pub demux: Demux,
    /// Counters of this lcore for the port.
    pub counters: Arc<NetCounters>,
    /// Whether the peer's kernel may leave UDP checksums to a NIC that does not exist.
    pub partial_checksums: bool,
    /// Whether this lcore announces the port's addresses and groups: one lcore a port does.
    pub announces: bool,
}

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
}

/// What an rx lcore runs.
pub struct RxWorker {
    ports: Vec<Port>,
    lanes: Lanes,
    burst: RxBurst,
    acks: Vec<Ack>,
    coalescer: AckCoalescer,
    next_announce_ns: u64,
}

/// A port and the frames that wait to be sent by it.
struct Port {
    port: RxPort,
    out: TxBurst,
}

/// The ways to the shards.
struct Lanes {
    /// This lcore's place among the rx lcores.
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

impl RxWorker {
    /// A worker; `index` is its place among the rx lcores and names it to the shards and to the topics'
    /// counters. Everything is allocated here.
    pub fn new(
        index: u8,
        ports: Vec<RxPort>,
        shards: Vec<ShardLink>,
        routes: Arc<RouteCell>,
    ) -> Self {
        let shards = shards
            .into_iter()
            .map(|link| Outgoing {
                batch: Vec::with_capacity(BURST),
                shed_below: 0,
                gaps: vec![Gap::default(); link.partitions],
                open: Vec::with_capacity(link.partitions),
                link,
            })
            .collect();
        Self {
            ports: ports
                .into_iter()
                .map(|port| Port {
                    port,
                    out: TxBurst::new(),
                })
                .collect(),
            lanes: Lanes {
                index,
                shards,
                routes: routes.current(),
                cell: routes,
                // Whatever was published since is taken over at the first look.
                version: u64::MAX,
                turn: 0,
                first: 0,
            },
            burst: RxBurst::new(),
            acks: Vec::with_capacity(ACKS_A_ROUND),
            coalescer: AckCoalescer::new(ACKS_A_ROUND),
            next_announce_ns: 0,
        }
    }

    /// One round over all queues, rings and timers; returns the packets and acknowledgements moved.
    #[inline]
    pub fn poll(&mut self, now: Now) -> usize {
        let mut work = 0;
        for port in 0..self.ports.len() {
            for queue in 0..self.ports[port].port.rx.len() {
                work += self.receive(port, queue, now);
            }
        }
        work += self.acknowledge();
        if now.mono_ns >= self.next_announce_ns {
            self.next_announce_ns = now.mono_ns + ANNOUNCE_INTERVAL_NS;
            for port in &mut self.ports {
                port.announce(now);
            }
            self.lanes.report_gaps(now.unix_ns, GAP_INTERVAL_NS);
            let Lanes {
                cell,
                version,
                routes,
                ..
            } = &mut self.lanes;
            cell.refresh(version, routes);
        }
        for port in &mut self.ports {
            port.flush();
        }
        work
    }

    /// Sends acknowledgements without receiving; for a clean stop.
    pub fn send_acks(&mut self) -> usize {
        let count = self.acknowledge();
        for port in &mut self.ports {
            port.flush();
        }
        count
    }

    /// Reports every open gap, whatever its age; for a clean stop.
    pub fn finish(&mut self, now: Now) {
        self.lanes.report_gaps(now.unix_ns, 0);
    }

    /// Takes one burst from a queue and hands on what it holds.
    #[inline]
    fn receive(&mut self, port_index: usize, queue: usize, now: Now) -> usize {
        let Self {
            ports,
            lanes,
            burst,
            acks,
            ..
        } = self;
        let port = &mut ports[port_index];
        let count = port.port.rx[queue].receive(burst);
        if count == 0 {
            return 0;
        }
        lanes.turn = lanes.turn.wrapping_add(1);
        for shard in &mut lanes.shards {
            shard.shed_below = shed_below(&mut shard.link.out);
        }
        for i in 0..2 * PREFETCH_AHEAD {
            burst.prefetch_mbuf(i);
        }
        for i in 0..PREFETCH_AHEAD {
            burst.prefetch_data(i);
        }
        let (mut bytes, mut delivered) = (0, 0);
        for i in 0..count {
            burst.prefetch_mbuf(i + 2 * PREFETCH_AHEAD);
            burst.prefetch_data(i + PREFETCH_AHEAD);
            bytes += burst.frame(i).len() as u64;
            delivered += u64::from(port.packet(port_index as u16, burst, i, lanes, acks, now));
        }
        let counters = &port.port.counters;
        counters.received.add(count as u64);
        if let Some((_, received)) = counters.queues.get(queue) {
            received.add(count as u64);
        }
        counters.bytes.add(bytes);
        counters.delivered.add(delivered);
        lanes.hand_over(port_index as u16, now);
        // What no shard took over.
        burst.free_rest();
        count
    }

    /// Sends acknowledgements, as many to a datagram as its peer's fit.
    #[inline]
    fn acknowledge(&mut self) -> usize {
        let Self {
            ports,
            lanes,
            acks,
            coalescer,
            ..
        } = self;
        // Begins with another shard each round, so that none keeps the others' from their turn.
        let shards = lanes.shards.len();
        lanes.first = if lanes.first + 1 < shards {
            lanes.first + 1
        } else {
            0
        };
        for i in 0..shards {
            let at = (lanes.first + i) % shards;
            let room = ACKS_A_ROUND.saturating_sub(acks.len());
            lanes.shards[at].link.acks.pop_into(acks, room);
        }
        let count = acks.len();
        if count == 0 {
            return 0;
        }
        for ack in acks.drain(..) {
            // A shard echoes what this lcore wrote, and there is room: both hold ACKS_A_ROUND.
            let known = usize::from(ack.reply.port) < ports.len();
            let taken = known && coalescer.push(ack.reply, ack.entry);
            debug_assert!(
                taken,
                "an acknowledgement for a port that this lcore does not have"
            );
        }
        while let Some(reply) = coalescer.peek() {
            let Port { port, out } = &mut ports[usize::from(reply.port)];
            let (mac, mtu) = (
                port.responder.interface().mac(),
                port.responder.interface().mtu(),
            );
            let mut built = true;
            answer(port, out, |_, room| {
                match coalescer.next_frame(mac, mtu, room) {
                    Some(Ok(frame)) => Some(frame.len),
                    Some(Err(_)) | None => {
                        built = false;
                        None
                    }
                }
            });
            if !built {
                port.counters.send_dropped.add(1);
            }
        }
        count
    }
}

/// Builds a frame with `write` and queues it; one that finds no mbuf is counted.
#[inline]
fn answer(
    port: &mut RxPort,
    out: &mut TxBurst,
    write: impl FnOnce(&mut Responder, &mut [u8]) -> Option<usize>,
) -> bool {
    let Some(mut mbuf) = port.pool.allocate() else {
        port.counters.send_dropped.add(1);
        // Whoever waits for the answer asks again; a frame that was due is not due any more.
        write(&mut port.responder, &mut [0; SCRATCH]);
        return false;
    };
    let Some(len) = write(&mut port.responder, mbuf.room()) else {
        return false;
    };
    mbuf.set_len(len);
    if out.is_full() {
        send(port, out);
    }
    let pushed = out.push(mbuf);
    debug_assert!(pushed.is_ok());
    true
}

/// Sends what waits.
#[inline]
fn send(port: &RxPort, out: &mut TxBurst) {
    let wanted = out.len();
    let sent = port.tx.send(out);
    port.counters.sent.add(sent as u64);
    port.counters.send_dropped.add((wanted - sent) as u64);
}

impl Port {
    /// Deals with packet `i` of a burst; true if it carried messages.
    #[inline(always)]
    fn packet(
        &mut self,
        index: u16,
        burst: &mut RxBurst,
        i: usize,
        lanes: &mut Lanes,
        acks: &mut Vec<Ack>,
        now: Now,
    ) -> bool {
        let Self { port, out } = self;
        if !burst.one_segment(i) {
            port.counters.count_dropped(DropReason::MultiSegment);
            return false;
        }
        let (l3_good, l4_good) = burst.checksums_good(i);
        let options = ParseOptions {
            interface: port.responder.interface(),
            l3_good,
            l4_good,
            partial_checksums: port.partial_checksums,
            stripped_vlan: NO_VLAN,
        };
        let frame = burst.frame(i);
        let parsed = parse(frame, &options);
        let handled = match &parsed {
            Parsed::Udp(packet) => match port.demux.lookup(frame, packet) {
                Some(Target::Raw(route)) => {
                    lanes.raw(route, Kind::Raw, packet, burst, i, index, now);
                    return true;
                }
                Some(Target::Lines(route)) => {
                    lanes.raw(route, Kind::Lines, packet, burst, i, index, now);
                    return true;
                }
                Some(Target::Datagram) => {
                    return self.datagram(index, packet, burst, i, lanes, acks, now);
                }
                None => {
                    port.counters.count_dropped(DropReason::UnknownPort);
                    answer(port, out, |responder, room| {
                        responder.unknown_port(frame, packet, now.mono_ns, room)
                    });
                    return false;
                }
            },
            Parsed::Drop(reason) => {
                port.counters.count_dropped(*reason);
                return false;
            }
            Parsed::Arp(_) => Handled::Arp,
            Parsed::Icmp(_) => Handled::Icmp,
            Parsed::Icmpv6(_) => Handled::Icmpv6,
            Parsed::Igmp(_) => Handled::Igmp,
        };
        port.counters.count_handled(handled);
        answer(port, out, |responder, room| {
            responder.handle(frame, &parsed, room)
        });
        false
    }

    /// A datagram of the datagram protocol; true if it carried a record batch for one of our
    /// partitions.
    #[allow(clippy::too_many_arguments)] // the parts of one packet's context
    fn datagram(
        &mut self,
        index: u16,
        packet: &UdpPacket,
        burst: &mut RxBurst,
        i: usize,
        lanes: &mut Lanes,
        acks: &mut Vec<Ack>,
        now: Now,
    ) -> bool {
        let Self { port, out } = self;
        let frame = burst.frame(i);
        let request = Request::decode(packet.payload(frame));
        let reply = reply_to(
            frame,
            packet,
            port.responder.interface(),
            lanes.index,
            index,
        );
        let (Ok(request), Some(reply)) = (request, reply) else {
            port.counters.count_dropped(DropReason::BadDatagram);
            return false;
        };
        match request {
            Request::Hello(hello) => {
                port.counters.count_handled(Handled::Hello);
                let table = &lanes.routes.table;
                answer(port, out, |responder, room| {
                    let start = payload_offset(&reply);
                    let len = table.answer(&hello, room.get_mut(start..)?)?;
                    udp_frame(&reply, responder.interface().mac(), len, room)
                });
                false
            }
            Request::Produce(header, batch) => {
                let served = lanes.routes.by_id.get(header.topic_id as usize);
                let place = served.and_then(Option::as_ref).and_then(|served| {
                    let counters = &served.counters.lcores[usize::from(lanes.index)];
                    Some((counters, *served.places.get(header.partition as usize)?))
                });
                let Some((counters, place)) = place else {
                    port.counters.count_dropped(DropReason::UnknownPartition);
                    // Where the round has no room for the refusal, the producer asks again.
                    if header.acks != 0 && acks.len() < ACKS_A_ROUND {
                        acks.push(Ack {
                            reply,
                            entry: refusal(&header, batch),
                        });
                    }
                    return false;
                };
                let claimed = u64::from(record_batch::claimed_records(batch));
                let len = batch.len() as u16;
                let (start, headroom) = burst.frame_start(i);
                let offset = usize::from(packet.payload_offset) + PRODUCE_HEADER_LEN;
                if headroom + usize::from(packet.payload_offset) < REPLY_TO_LEN {
                    // No driver seen does that: mbufs have HEADROOM (128) bytes before the frame.
                    port.counters.count_dropped(DropReason::NoAnswerRoom);
                    return false;
                }
                counters.received.add(claimed);
                // SAFETY: parse and decode checked that header and batch lie within the frame, and the
                // 64 bytes before the datagram's header were just found to be this packet's own headers
                // and headroom, which nobody needs any more. The handle goes with the message, so the
                // memory is the shard's until it releases it.
                let inbound = unsafe {
                    let batch = start.add(offset);
                    reply.write_before(batch);
                    Inbound::new(
                        burst.take(i),
                        batch,
                        len,
                        now.unix_ns,
                        place.local,
                        Kind::Produce,
                        header.acks,
                    )
                };
                lanes.shards[usize::from(place.shard)].batch.push(inbound);
                true
            }
        }
    }

    /// Sends announcements that are due: a handful at the start, none most of the time.
    fn announce(&mut self, now: Now) {
        let Self { port, out } = self;
        if port.announces {
            while answer(port, out, |responder, room| {
                responder.periodic(now.mono_ns, room)
            }) {}
        }
    }

    #[inline]
    fn flush(&mut self) {
        if !self.out.is_empty() {
            send(&self.port, &mut self.out);
        }
    }
}

/// Tells a producer that its partition does not exist.
#[cold]
fn refusal(header: &ProduceHeader, batch: &[u8]) -> AckEntry {
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

impl Lanes {
    /// A message, or lines of them, for a topic.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // the parts of one packet's context
    fn raw(
        &mut self,
        route: u16,
        kind: Kind,
        packet: &UdpPacket,
        burst: &mut RxBurst,
        i: usize,
        port: u16,
        now: Now,
    ) {
        let route = &self.routes.raw[usize::from(route)];
        let choice = match route.choice {
            _ if route.places.len() == 1 => 0,
            Choice::Source => source_hash(packet, burst.frame(i)) as usize % route.places.len(),
            Choice::Spread => self.turn as usize % route.places.len(),
        };
        let place = route.places[choice];
        let (start, _) = burst.frame_start(i);
        // SAFETY: parse checked that the payload lies within the frame, which nobody writes to until
        // its owner is released; taking the handle below makes the shard the one who does that.
        let inbound = |owner| unsafe {
            let data = start.add(usize::from(packet.payload_offset));
            Inbound::new(
                owner,
                data,
                packet.payload_len,
                now.unix_ns,
                place.local,
                kind,
                0,
            )
        };
        let count = messages(&inbound(0));
        let counters = &route.counters.lcores[usize::from(self.index)];
        counters.received.add(count);
        let shard = &mut self.shards[usize::from(place.shard)];
        if route.priority < shard.shed_below {
            counters.shed.add(count);
            shard.note_gap(place.local, count, port, "shed", now.unix_ns);
            return;
        }
        shard.batch.push(inbound(burst.take(i)));
    }

    /// Pushes the batches into their rings and accounts for what did not fit.
    #[inline]
    fn hand_over(&mut self, port: u16, now: Now) {
        for index in 0..self.shards.len() {
            let shard = &mut self.shards[index];
            if shard.batch.is_empty() {
                continue;
            }
            let taken = shard.link.out.push_burst(&shard.batch);
            if taken < shard.batch.len() {
                self.ring_full(index, taken, port, now);
            }
            self.shards[index].batch.clear();
        }
    }

    /// Drops what is behind the first `taken` messages of a shard's batch.
    #[cold]
    fn ring_full(&mut self, index: usize, taken: usize, port: u16, now: Now) {
        let shard = &mut self.shards[index];
        for at in taken..shard.batch.len() {
            let inbound = shard.batch[at];
            let count = messages(&inbound);
            let topics = &self.routes.topic_of[index];
            if let Some(Some(topic)) = topics.get(inbound.partition() as usize) {
                topic.lcores[usize::from(self.index)].ring_full.add(count);
            }
            // A producer of the datagram protocol retransmits: nothing is lost.
            if inbound.kind() != Kind::Produce {
                shard.note_gap(inbound.partition(), count, port, "ring_full", now.unix_ns);
            }
            // SAFETY: the ring did not take the message, so its owner is still this lcore's.
            unsafe { free_handles(&[inbound.owner()]) };
        }
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

/// Spreads senders over partitions: FNV-1a over address and port, which mixes well enough for that and
/// costs a multiplication a byte.
#[inline]
fn source_hash(packet: &UdpPacket, frame: &[u8]) -> u64 {
    let port = packet.src_port.to_be_bytes();
    let hash = packet
        .src(frame)
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

#[cfg(test)]
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
