//! What the thread of kernel UDP runs: bursts from its sockets, handed to shards; greetings and acknowledgements out.
//!
//! It does for kernel sockets what `rx.rs` does for queues of NICs, and keeps the same invariants: every datagram taken from
//! a socket ends under exactly one counter of its port, every message of a delivered one under exactly one of its topic. A
//! datagram is taken only while there is a buffer for it whatever its length; what the thread does not take waits in the
//! socket, and what does not fit there the kernel drops and counts. What is not delivered costs nothing: its buffer is used
//! for the next datagram.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use super::buffers::{LARGE, Pool, SMALL, handle, number};
use super::lanes::{ACKS_A_ROUND, BURST_MOST, Lanes, ShardLink, refusal, source_hash};
use super::routes::RouteCell;
use super::{AckCoalescer, Demux, DropReason, Handled, NetCounters, Target};
use crate::fallback::udp::{BURST, Readiness, Receiver, SEND_ROOM, Sender, UdpSocket, Way};
use crate::shard::{Ack, Inbound, Kind, Now, ReplyTo};
use crate::wire::datagram::{PRODUCE_HEADER_LEN, ProduceHeader, Request};

const _: () = assert!(BURST <= BURST_MOST);

/// How often gaps and newer routes are looked after, unless the thread sleeps.
const PERIOD_NS: u64 = 10_000_000;
/// IPv6 and UDP headers: what an acknowledgement's payload leaves of the MTU at least.
const HEADERS: usize = 48;

/// A port whose datagrams come by kernel sockets.
pub struct KernelPort {
    /// Its place among all ports, for gap reports.
    pub number: u16,
    /// UDP ports → targets.
    pub demux: Demux,
    /// What is counted of it.
    pub counters: Arc<NetCounters>,
    /// Largest IP packet that answers make.
    pub mtu: u16,
    /// Its sockets.
    pub sockets: Vec<Arc<UdpSocket>>,
}

/// A socket, and whether it may have datagrams.
struct Listening {
    socket: Arc<UdpSocket>,
    udp_port: u16,
    /// Its port's place among `ports`.
    port: usize,
    ready: bool,
}

/// What the thread runs.
pub struct KernelWorker {
    ports: Vec<KernelPort>,
    sockets: Vec<Listening>,
    readiness: Readiness,
    lanes: Lanes,
    pool: Pool,
    /// Small buffers for the next burst.
    slots: Vec<u32>,
    receiver: Receiver,
    sender: Sender,
    acks: Vec<Ack>,
    coalescer: AckCoalescer,
    next_period_ns: u64,
}

impl KernelWorker {
    /// A worker of these ports; `index` is its place among the receivers. `wake` ends its sleep. Everything is allocated
    /// here.
    ///
    /// # Panics
    /// When `pool` has no buffers for a burst.
    pub fn new(
        index: u8,
        ports: Vec<KernelPort>,
        shards: Vec<ShardLink>,
        routes: Arc<RouteCell>,
        mut pool: Pool,
        wake: RawFd,
    ) -> io::Result<Self> {
        let mut readiness = Readiness::new(wake)?;
        let mut sockets = Vec::new();
        for (place, port) in ports.iter().enumerate() {
            for socket in &port.sockets {
                readiness.add(socket, sockets.len())?;
                sockets.push(Listening {
                    socket: Arc::clone(socket),
                    udp_port: socket.address().port(),
                    port: place,
                    ready: true,
                });
            }
        }
        let slots = (0..BURST).map(|_| pool.take_small().expect("buffers for a burst"));
        Ok(Self {
            slots: slots.collect(),
            ports,
            sockets,
            readiness,
            lanes: Lanes::new(index, shards, routes),
            pool,
            receiver: Receiver::new(LARGE - SMALL),
            sender: Sender::new(),
            acks: Vec::with_capacity(ACKS_A_ROUND),
            coalescer: AckCoalescer::new(ACKS_A_ROUND),
            next_period_ns: 0,
        })
    }

    /// One round over the sockets that may have datagrams, the shards' rings and the timers; gives the datagrams and
    /// acknowledgements moved.
    pub fn poll(&mut self, now: Now) -> usize {
        // First, since the thread may have slept: newer routes hold for what has come meanwhile.
        if now.mono_ns >= self.next_period_ns {
            self.next_period_ns = now.mono_ns + PERIOD_NS;
            self.lanes.periodic(now);
        }
        let mut work = 0;
        for at in 0..self.sockets.len() {
            if self.sockets[at].ready {
                work += self.receive(at, now);
            }
        }
        work += self.acknowledge();
        self.flush();
        work
    }

    /// Sends acknowledgements without receiving; for a clean stop.
    pub fn send_acks(&mut self) -> usize {
        let count = self.acknowledge();
        self.flush();
        count
    }

    /// Reports every open gap, whatever its age; for a clean stop.
    pub fn finish(&mut self, now: Now) {
        self.lanes.finish(now);
    }

    /// Whether acknowledgements wait, for a look before sleeping.
    pub fn has_acks(&mut self) -> bool {
        self.lanes.has_acks()
    }

    /// Whether sockets may have datagrams that were not taken for lack of buffers.
    pub fn is_starved(&self) -> bool {
        self.sockets.iter().any(|listening| listening.ready)
    }

    /// Sleeps until a socket has datagrams, the thread is woken, or the time is over.
    pub fn wait(&mut self, time: Duration) -> io::Result<()> {
        let sockets = &mut self.sockets;
        self.readiness
            .wait(time, |number| sockets[number].ready = true)
    }

    /// Takes one burst from a socket and hands on what it holds.
    fn receive(&mut self, at: usize, now: Now) -> usize {
        self.pool.collect();
        // Each datagram may take its buffer along, or need a large one.
        let (small, large) = self.pool.free();
        let most = small.min(large).min(BURST);
        if most == 0 {
            return 0;
        }
        let (pool, slots) = (&self.pool, &self.slots);
        let listening = &mut self.sockets[at];
        // SAFETY: the slots are buffers that were taken from the pool and given to nobody yet, SMALL bytes each.
        let received = unsafe {
            let place = |i: usize| pool.payload(slots[i]);
            self.receiver.receive(&listening.socket, most, SMALL, place)
        };
        let count = match received {
            Ok(count) => count,
            Err(error) => {
                // A call that a signal ended is made again. After any other failure than to have none, the next datagram
                // says that there are some.
                listening.ready = error.kind() == io::ErrorKind::Interrupted;
                return 0;
            }
        };
        let (port, udp_port) = (listening.port, listening.udp_port);
        self.lanes.begin();
        let (mut bytes, mut delivered) = (0, 0);
        for i in 0..count {
            bytes += self.receiver.arrival(i).len as u64;
            delivered += u64::from(self.datagram(at, port, udp_port, i, now));
        }
        let port = &self.ports[port];
        port.counters.received.add(count as u64);
        port.counters.bytes.add(bytes);
        port.counters.delivered.add(delivered);
        let pool = &mut self.pool;
        self.lanes.hand_over(port.number, now, |owner| {
            if let Some(number) = number(owner) {
                pool.give(number);
            }
        });
        count
    }

    /// Deals with datagram `i` of a burst; true if it carried messages.
    fn datagram(&mut self, at: usize, port: usize, udp_port: u16, i: usize, now: Now) -> bool {
        let arrival = self.receiver.arrival(i);
        let counters = &self.ports[port].counters;
        if arrival.cut || arrival.len > LARGE - 1 {
            counters.count_dropped(DropReason::Truncated);
            return false;
        }
        let way = arrival.way;
        let Some(target) = self.ports[port].demux.target(udp_port, group(&way)) else {
            counters.count_dropped(DropReason::UnknownPort);
            return false;
        };
        let buffer = self.whole(i, arrival.len);
        let taken = match target {
            Target::Raw(route) => self.raw(route, Kind::Raw, buffer, arrival.len, &way, port, now),
            Target::Lines(route) => {
                self.raw(route, Kind::Lines, buffer, arrival.len, &way, port, now)
            }
            Target::Datagram => self.request(at, port, buffer, arrival.len, &way, now),
        };
        // Raw messages that were shed are counted as delivered, as those of NICs are.
        let delivered = taken || !matches!(target, Target::Datagram);
        match (taken, buffer == self.slots[i]) {
            (true, true) => {
                let next = self.pool.take_small();
                self.slots[i] = next.expect("a buffer for each datagram of the burst");
            }
            (false, false) => self.pool.give(buffer),
            _ => {}
        }
        delivered
    }

    /// The buffer that holds all of datagram `i`: the one that it came into, or a large one to which it is copied.
    fn whole(&mut self, i: usize, len: usize) -> u32 {
        let small = self.slots[i];
        if len <= SMALL {
            return small;
        }
        let large = self.pool.take_large();
        // As many were free as the burst has datagrams.
        let large = large.expect("a large buffer for each datagram of the burst");
        let (from, to) = (self.pool.payload(small), self.pool.payload(large));
        let rest = self.receiver.rest(i, len - SMALL);
        // SAFETY: both buffers are this worker's, with SMALL and LARGE bytes; the rest ends within LARGE, as `len` was
        // checked to be less.
        unsafe {
            to.copy_from_nonoverlapping(from, SMALL);
            to.add(SMALL)
                .copy_from_nonoverlapping(rest.as_ptr(), rest.len());
        }
        large
    }

    /// A message, or lines of them, for a topic; true if its buffer is the shard's from now on.
    #[allow(clippy::too_many_arguments)] // the parts of one datagram's context
    fn raw(
        &mut self,
        route: u16,
        kind: Kind,
        buffer: u32,
        len: usize,
        way: &Way,
        port: usize,
        now: Now,
    ) -> bool {
        let data = self.pool.payload(buffer);
        // SAFETY: the buffer holds `len` bytes of payload, and nobody writes to it until it comes back; where it is not
        // taken the message is forgotten here.
        let message =
            unsafe { Inbound::new(handle(buffer), data, len as u16, now.unix_ns, 0, kind, 0) };
        let sender = || source_hash(peer(way), way.peer_port);
        let number = self.ports[port].number;
        self.lanes.raw(route, message, number, sender)
    }

    /// A datagram of the datagram protocol; true if it carried a record batch for one of our partitions, whose buffer is
    /// the shard's from now on.
    fn request(
        &mut self,
        at: usize,
        port: usize,
        buffer: u32,
        len: usize,
        way: &Way,
        now: Now,
    ) -> bool {
        let data = self.pool.payload(buffer);
        // SAFETY: the buffer is this worker's and holds `len` bytes of payload.
        let payload = unsafe { std::slice::from_raw_parts(data, len) };
        let counters = &self.ports[port].counters;
        let (Ok(request), true) = (Request::decode(payload), answerable(way)) else {
            counters.count_dropped(DropReason::BadDatagram);
            return false;
        };
        match request {
            Request::Hello(hello) => {
                counters.count_handled(Handled::Hello);
                let room = room(&mut self.sender, &self.sockets, &self.ports);
                if let Some(len) = self.lanes.table().answer(&hello, room) {
                    self.sender.push(at, way, len);
                }
                false
            }
            Request::Produce(header, batch) => {
                let reply = reply_to(way, self.lanes.index(), at as u16);
                let Some(place) = self.lanes.place(&header) else {
                    counters.count_dropped(DropReason::UnknownPartition);
                    self.refuse(&header, batch, reply);
                    return false;
                };
                let len = batch.len() as u16;
                // SAFETY: decode checked that the header lies within the payload, and every buffer has room for a ReplyTo
                // before that. The handle goes with the message, so the memory is the shard's until it comes back.
                let message = unsafe {
                    let batch = data.add(PRODUCE_HEADER_LEN);
                    reply.write_before(batch);
                    let (owner, time) = (handle(buffer), now.unix_ns);
                    Inbound::new(owner, batch, len, time, 0, Kind::Produce, header.acks)
                };
                self.lanes.produce(&header, place, message);
                true
            }
        }
    }

    /// Tells a producer that its partition does not exist. Where the round has no room for that, the producer asks again.
    #[cold]
    fn refuse(&mut self, header: &ProduceHeader, batch: &[u8], reply: ReplyTo) {
        if header.acks != 0 && self.acks.len() < ACKS_A_ROUND {
            let entry = refusal(header, batch);
            self.acks.push(Ack { reply, entry });
        }
    }

    /// Sends acknowledgements, as many to a datagram as its peer's fit.
    fn acknowledge(&mut self) -> usize {
        self.lanes.take_acks(&mut self.acks);
        let count = self.acks.len();
        for ack in self.acks.drain(..) {
            // A shard echoes what this worker wrote, and there is room: both hold ACKS_A_ROUND.
            let known = usize::from(ack.reply.port) < self.sockets.len();
            let taken = known && self.coalescer.push(ack.reply, ack.entry);
            debug_assert!(taken, "an acknowledgement for a socket that there is not");
        }
        while let Some(&reply) = self.coalescer.peek() {
            let at = usize::from(reply.port);
            let port = &self.ports[self.sockets[at].port];
            let most = (usize::from(port.mtu) - HEADERS).min(SEND_ROOM);
            let room = room(&mut self.sender, &self.sockets, &self.ports);
            match self.coalescer.next_payload(&mut room[..most]) {
                Some(Ok((_, len))) => self.sender.push(at, &way_back(&reply), len),
                Some(Err(_)) | None => port.counters.send_dropped.add(1),
            }
        }
        count
    }

    fn flush(&mut self) {
        flush(&mut self.sender, &self.sockets, &self.ports);
    }
}

/// Where the next answer is written; sends those that wait where there is no room.
fn room<'a>(sender: &'a mut Sender, sockets: &[Listening], ports: &[KernelPort]) -> &'a mut [u8] {
    if sender.is_full() {
        flush(sender, sockets, ports);
    }
    sender.room()
}

fn flush(sender: &mut Sender, sockets: &[Listening], ports: &[KernelPort]) {
    sender.send(
        |at| &*sockets[at].socket,
        |at, sent, lost| {
            let counters = &ports[sockets[at].port].counters;
            counters.sent.add(sent);
            counters.send_dropped.add(lost);
        },
    );
}

/// The sender's address, 4 or 16 bytes.
fn peer(way: &Way) -> &[u8] {
    match way.ip_version {
        4 => &way.peer_ip[..4],
        _ => &way.peer_ip,
    }
}

fn ip(version: u8, bytes: &[u8; 16]) -> IpAddr {
    match version {
        4 => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
        _ => Ipv6Addr::from(*bytes).into(),
    }
}

/// The group that a datagram was sent to, if it was.
fn group(way: &Way) -> Option<IpAddr> {
    Some(ip(way.ip_version, &way.to)).filter(IpAddr::is_multicast)
}

/// Whether an answer can reach the sender.
fn answerable(way: &Way) -> bool {
    let peer = ip(way.ip_version, &way.peer_ip);
    way.peer_port != 0 && !peer.is_multicast() && !peer.is_unspecified()
}

/// The way back as a shard keeps it; `socket` is this worker's number of it.
fn reply_to(way: &Way, receiver: u8, socket: u16) -> ReplyTo {
    let mut reply = ReplyTo {
        ip_version: way.ip_version,
        port: socket,
        peer_ip: way.peer_ip,
        local_ip: way.local_ip,
        peer_port: way.peer_port,
        ..ReplyTo::ring(receiver)
    };
    reply.reserved[..4].copy_from_slice(&way.scope.to_ne_bytes());
    reply
}

/// The inverse of [`reply_to`].
fn way_back(reply: &ReplyTo) -> Way {
    let [a, b, c, d, ..] = reply.reserved;
    Way {
        ip_version: reply.ip_version,
        peer_ip: reply.peer_ip,
        peer_port: reply.peer_port,
        scope: u32::from_ne_bytes([a, b, c, d]),
        to: [0; 16],
        local_ip: reply.local_ip,
    }
}
