//! What an rx lcore runs: bursts from its queues, parsed in the mbuf, handed to shards; answers and
//! acknowledgements out.
//!
//! Invariants: every packet taken from a queue ends under exactly one counter of its port
//! (handled, delivered or dropped by reason), every message of a delivered packet under exactly one
//! of its topic (handed to the shard, or dropped by reason). An mbuf is either freed here or its
//! handle is in a ring. The loop allocates nothing, takes no lock and makes no system call.

use std::sync::Arc;

use super::lanes::{ACKS_A_ROUND, BURST_MOST, Lanes, ShardLink, refusal, source_hash};
use super::routes::RouteCell;
use super::{
    AckCoalescer, Demux, DropReason, Handled, NetCounters, ParseOptions, Parsed, Responder, Target,
    UdpPacket, parse, payload_offset, reply_to, udp_frame,
};
use crate::eal::{BURST, Mempool, RxBurst, RxQueue, TxBurst, TxQueue, free_handles};
use crate::shard::{Ack, Inbound, Kind, Now, REPLY_TO_LEN, Release};
use crate::wire::datagram::{PRODUCE_HEADER_LEN, Request};
use crate::wire::ethernet::NO_VLAN;

const _: () = assert!(BURST <= BURST_MOST);

/// Packets fetched ahead of the one being parsed: the payload's first line takes about as long to
/// arrive as four packets take to parse.
const PREFETCH_AHEAD: usize = 4;
/// Where an answer is written that finds no mbuf, so that its due time passes: the largest frame that
/// answers have.
const SCRATCH: usize = 2048;
/// How often the announcements (ARP, ND, group memberships) are looked after.
const ANNOUNCE_INTERVAL_NS: u64 = 10_000_000;

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

impl RxWorker {
    /// A worker; `index` is its place among the rx lcores and names it to the shards and to the topics'
    /// counters. Everything is allocated here.
    pub fn new(
        index: u8,
        ports: Vec<RxPort>,
        shards: Vec<ShardLink>,
        routes: Arc<RouteCell>,
    ) -> Self {
        Self {
            ports: ports
                .into_iter()
                .map(|port| Port {
                    port,
                    out: TxBurst::new(),
                })
                .collect(),
            lanes: Lanes::new(index, shards, routes),
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
            self.lanes.periodic(now);
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
        self.lanes.finish(now);
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
        lanes.begin();
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
        lanes.hand_over(port_index as u16, now, |owner| {
            // SAFETY: the ring did not take the message, so its owner is still this lcore's.
            unsafe { free_handles(&[owner]) };
        });
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
        lanes.take_acks(acks);
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
                    raw(route, Kind::Raw, packet, burst, i, lanes, index, now);
                    return true;
                }
                Some(Target::Lines(route)) => {
                    raw(route, Kind::Lines, packet, burst, i, lanes, index, now);
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
            lanes.index(),
            index,
        );
        let (Ok(request), Some(reply)) = (request, reply) else {
            port.counters.count_dropped(DropReason::BadDatagram);
            return false;
        };
        match request {
            Request::Hello(hello) => {
                port.counters.count_handled(Handled::Hello);
                let table = lanes.table();
                answer(port, out, |responder, room| {
                    let start = payload_offset(&reply);
                    let len = table.answer(&hello, room.get_mut(start..)?)?;
                    udp_frame(&reply, responder.interface().mac(), len, room)
                });
                false
            }
            Request::Produce(header, batch) => {
                let Some(place) = lanes.place(&header) else {
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
                let len = batch.len() as u16;
                let (start, headroom) = burst.frame_start(i);
                let offset = usize::from(packet.payload_offset) + PRODUCE_HEADER_LEN;
                if headroom + usize::from(packet.payload_offset) < REPLY_TO_LEN {
                    // No driver seen does that: mbufs have HEADROOM (128) bytes before the frame.
                    port.counters.count_dropped(DropReason::NoAnswerRoom);
                    return false;
                }
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
                        0,
                        Kind::Produce,
                        header.acks,
                    )
                };
                lanes.produce(&header, place, inbound);
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

/// A message, or lines of them, for a topic.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // the parts of one packet's context
fn raw(
    route: u16,
    kind: Kind,
    packet: &UdpPacket,
    burst: &mut RxBurst,
    i: usize,
    lanes: &mut Lanes,
    port: u16,
    now: Now,
) {
    let (start, _) = burst.frame_start(i);
    // SAFETY: parse checked that the payload lies within the frame, which nobody writes to until its owner is released;
    // taking the handle below makes the shard the one who does that.
    let inbound = unsafe {
        Inbound::new(
            burst.handle(i),
            start.add(usize::from(packet.payload_offset)),
            packet.payload_len,
            now.unix_ns,
            0,
            kind,
            0,
        )
    };
    let frame = burst.frame(i);
    let sender = || source_hash(packet.src(frame), packet.src_port);
    if lanes.raw(route, inbound, port, sender) {
        burst.take(i);
    }
}
