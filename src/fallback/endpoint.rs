//! The rules of the contract, without I/O: what a transport drives.
//!
//! Invariants: bytes reach the service in order and once; nothing is read beyond a limit, apart from what was
//! already received when it was reached; each connection is closed exactly once. `memory` is what
//! buffers, requests and owned answer pieces hold.

use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use super::buffer::Pool;
use super::connections::{Ended, Entry, Inbox, Io};
use super::{
    CloseReason, ConnectionId, Connections, Counters, End, Flow, Input, Limits, Next, Now, Output,
    Peer, Piece, Service,
};

/// The time-outs of a connection are looked at once in so many sweeps; a sweep each
/// [`SWEEP_NS`] looks at one slot in so many, so that no turn of the loop takes long.
const SWEEPS: usize = 8;
/// Nanoseconds between sweeps: each connection is looked at once a second.
const SWEEP_NS: u64 = 125_000_000;

/// Counts connections of all threads, in all and by source.
#[derive(Debug, Default)]
pub struct Admission {
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    sources: HashMap<IpAddr, usize>,
}

/// Why a connection was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    All,
    Source,
}

impl Admission {
    fn admit(&self, source: IpAddr, limits: &Limits) -> Result<(), Refusal> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.all >= limits.connections {
            return Err(Refusal::All);
        }
        let of_source = counts.sources.entry(source).or_default();
        if *of_source >= limits.connections_per_source {
            return Err(Refusal::Source);
        }
        *of_source += 1;
        counts.all += 1;
        Ok(())
    }

    fn leave(&self, source: IpAddr) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.all -= 1;
        if let Some(count) = counts.sources.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                counts.sources.remove(&source);
            }
        }
    }
}

/// What counts as one source: an IPv4 address (mapped or not), or an IPv6 /64, which one host owns.
fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => {
            let mut octets = v6.octets();
            octets[8..].fill(0);
            IpAddr::from(octets)
        }
    }
}

/// What the transport shall do for a connection now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Bytes may be read from the peer.
    pub read: bool,
    /// There are bytes to send.
    pub send: bool,
    /// Nothing is left to send: close.
    pub close: bool,
    /// Close without sending what is being sent.
    pub abort: bool,
}

/// One loop's service with its connections.
pub struct Endpoint<S: Service> {
    service: S,
    connections: Connections<S::Connection>,
    limits: Limits,
    pool: Rc<Pool>,
    admission: Arc<Admission>,
    counters: Arc<Counters>,
    /// Owned bytes of all outputs.
    outputs: usize,
    /// Connections that were blocked for the thread's memory alone.
    starved: Vec<ConnectionId>,
    /// Connections whose [`Status`] may have changed.
    changed: Vec<ConnectionId>,
    dropped: Vec<(ConnectionId, usize)>,
    next_sweep: u64,
    sweep: usize,
    stopping: bool,
}

impl<S: Service> Endpoint<S> {
    /// A service without connections. `admission` is common to all threads of a server.
    pub fn new(
        service: S,
        limits: Limits,
        admission: Arc<Admission>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            service,
            connections: Connections::new(),
            limits,
            pool: Rc::default(),
            admission,
            counters,
            outputs: 0,
            starved: Vec::new(),
            changed: Vec::new(),
            dropped: Vec::new(),
            next_sweep: 0,
            sweep: 0,
            stopping: false,
        }
    }

    /// The service.
    pub fn service(&self) -> &S {
        &self.service
    }

    /// The service, to be changed by whoever set it up.
    pub fn service_mut(&mut self) -> &mut S {
        &mut self.service
    }

    /// Connections open.
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Bytes of receive buffers, taken requests and unsent owned answer pieces.
    pub fn memory(&self) -> usize {
        self.pool.in_use() + self.outputs
    }

    /// A connection came in; `None`: it is to be closed at once.
    pub fn accept(&mut self, peer: &Peer, now: Now) -> Option<ConnectionId> {
        let source = source_of(peer.remote.ip());
        if self.stopping {
            self.counters.refused.add(1);
            return None;
        }
        if let Err(refusal) = self.admission.admit(source, &self.limits) {
            match refusal {
                Refusal::All => self.counters.refused.add(1),
                Refusal::Source => self.counters.refused_source.add(1),
            }
            return None;
        }
        let id = self.connections.reserve();
        let Some(state) = self.service.accept(id, peer, now) else {
            self.connections.forget(id);
            self.admission.leave(source);
            self.counters.refused.add(1);
            return None;
        };
        let io = Io {
            id,
            source,
            inbox: Inbox::default(),
            out: Output::new(self.limits.output),
            in_flight: 0,
            counted: 0,
            paused: false,
            blocked: false,
            starved: false,
            ended: Ended::No,
            closing: None,
            abort: false,
            active: now.mono_ns,
            request_since: None,
            output_since: None,
        };
        self.connections.insert(id, Entry { state, io });
        self.counters.accepted.add(1);
        self.connections.touch(id);
        Some(id)
    }

    /// Bytes came from the peer. They are used up: what cannot be consumed is kept.
    pub fn receive(&mut self, id: ConnectionId, bytes: &[u8], now: Now) {
        self.counters.bytes_in.add(bytes.len() as u64);
        if let Some(entry) = self.connections.entry_mut(id) {
            entry.io.active = now.mono_ns;
            self.advance(id, bytes, now);
            self.connections.touch(id);
        }
    }

    /// The peer will send no more.
    pub fn end_of_input(&mut self, id: ConnectionId) {
        if let Some(entry) = self.connections.entry_mut(id)
            && entry.io.ended == Ended::No
        {
            entry.io.ended = Ended::Pending(End::Peer);
            self.connections.touch(id);
        }
    }

    /// The connection is broken; nothing can be sent.
    pub fn reset(&mut self, id: ConnectionId) {
        self.close(id, CloseReason::Reset);
    }

    fn close(&mut self, id: ConnectionId, reason: CloseReason) {
        if let Some(entry) = self.connections.entry_mut(id) {
            entry.io.close(reason, true);
            self.connections.touch(id);
        }
    }

    /// Moves pieces to send to `into`, up to `max_pieces` and (by whole pieces) `max_bytes`.
    pub fn take_pieces(
        &mut self,
        id: ConnectionId,
        into: &mut Vec<Piece>,
        max_pieces: usize,
        max_bytes: usize,
    ) {
        if let Some(entry) = self.connections.entry_mut(id) {
            entry.io.out.take_pieces(into, max_pieces, max_bytes);
        }
    }

    /// `bytes` of the taken pieces were sent; `finished` are the pieces with no byte left to send.
    pub fn sent(&mut self, id: ConnectionId, bytes: usize, finished: &[Piece], now: Now) {
        self.counters.bytes_out.add(bytes as u64);
        let Some(entry) = self.connections.entry_mut(id) else {
            return;
        };
        let io = &mut entry.io;
        io.out.sent(bytes);
        io.out.finished(finished);
        if bytes > 0 {
            io.active = now.mono_ns;
            io.output_since = (!io.out.is_empty()).then_some(now.mono_ns);
        }
        self.connections.touch(id);
    }

    /// Lets the service do what it has to, then settles everything. Call it once a turn.
    pub fn poll(&mut self, now: Now) -> Next {
        self.count_dropped();
        let next = self.service.poll(&mut self.connections, now);
        self.count_dropped();
        if now.mono_ns >= self.next_sweep {
            self.sweep(now);
        }
        self.settle(now);
        if !self.starved.is_empty() && self.memory() < self.limits.memory {
            for id in std::mem::take(&mut self.starved) {
                if let Some(entry) = self.connections.entry_mut(id) {
                    entry.io.starved = false;
                    self.connections.touch(id);
                }
            }
            self.settle(now);
        }
        self.counters.memory.store(self.memory(), Ordering::Relaxed);
        let sweep = self.next_sweep;
        match next {
            _ if self.connections.has_touched() => Next::Now,
            Next::At(at) if !self.is_empty() => Next::At(at.min(sweep)),
            Next::Event if !self.is_empty() => Next::At(sweep),
            next => next,
        }
    }

    /// A connection whose status may have changed since it was last named here.
    pub fn next_changed(&mut self) -> Option<ConnectionId> {
        self.changed.pop()
    }

    /// What to do for a connection; `None` when it is gone.
    pub fn status(&self, id: ConnectionId) -> Option<Status> {
        let io = &self.connections.entry(id)?.io;
        Some(Status {
            read: io.closing.is_none() && !io.blocked && !io.paused && io.ended == Ended::No,
            send: io.out.queued() > 0,
            close: io.closing.is_some() && io.out.is_empty(),
            abort: io.abort,
        })
    }

    /// The transport has closed the connection: the service is told, and the id is used up.
    pub fn closed(&mut self, id: ConnectionId) {
        let Some(entry) = self.connections.remove(id) else {
            return;
        };
        let Entry { state, io } = entry;
        self.outputs -= io.counted;
        self.admission.leave(io.source);
        let reason = io.closing.unwrap_or(CloseReason::Reset);
        self.counters.closed[reason as usize].add(1);
        self.service.closed(id, state, reason);
    }

    /// Takes no more connections and no more input; each connection is closed when it owes
    /// nothing more.
    pub fn stop(&mut self) {
        self.stopping = true;
        let ids: Vec<_> = self.connections.ids().collect();
        for id in ids {
            if let Some(entry) = self.connections.entry_mut(id)
                && entry.io.ended == Ended::No
            {
                entry.io.ended = Ended::Pending(End::Stop);
            }
            self.connections.touch(id);
        }
    }

    /// Closes whatever is still open.
    pub fn abort_all(&mut self) {
        let ids: Vec<_> = self.connections.ids().collect();
        for id in ids {
            self.close(id, CloseReason::Stop);
        }
    }

    fn count_dropped(&mut self) {
        let mut dropped = std::mem::take(&mut self.dropped);
        self.pool.take_dropped(&mut dropped);
        for (id, bytes) in dropped.drain(..) {
            if let Some(entry) = self.connections.entry_mut(id) {
                entry.io.in_flight -= bytes;
                if entry.io.blocked {
                    self.connections.touch(id);
                }
            }
        }
        self.dropped = dropped;
    }

    fn settle(&mut self, now: Now) {
        while let Some(id) = self.connections.pop_touched() {
            self.settle_one(id, now);
            self.changed.push(id);
        }
    }

    fn settle_one(&mut self, id: ConnectionId, now: Now) {
        self.advance(id, &[], now);
        let Some(entry) = self.connections.entry_mut(id) else {
            return;
        };
        if let Ended::Pending(end) = entry.io.ended
            && entry.io.closing.is_none()
            && (end == End::Stop || !entry.io.blocked && !entry.io.paused)
        {
            entry.io.ended = Ended::Told(end);
            entry.io.inbox = Inbox::default();
            entry.io.request_since = None;
            let flow = self
                .service
                .ended(&mut entry.state, id, end, &mut entry.io.out, now);
            let reason = end.reason();
            match flow {
                Flow::Continue | Flow::Pause => {}
                Flow::Close => entry.io.close(reason, false),
                Flow::Abort => entry.io.close(reason, true),
            }
        }
        let io = &mut entry.io;
        if io.out.is_empty() {
            io.output_since = None;
        } else if io.output_since.is_none() {
            io.output_since = Some(now.mono_ns);
        }
        self.outputs = self.outputs + io.out.owned - io.counted;
        io.counted = io.out.owned;
    }

    /// Calls the service while there is something for it and the connection is not blocked.
    fn advance(&mut self, id: ConnectionId, mut fresh: &[u8], now: Now) {
        let Some(entry) = self.connections.entry_mut(id) else {
            return;
        };
        let Entry { state, io } = entry;
        loop {
            if io.closing.is_some() || matches!(io.ended, Ended::Told(_)) {
                break;
            }
            let memory = self.pool.in_use() + self.outputs;
            let starved = memory >= self.limits.memory;
            if memory / 5 >= self.limits.memory / 4 && !fresh.is_empty() {
                // What came before reading stopped everywhere is not kept without bound.
                io.close(CloseReason::Memory, true);
                break;
            }
            let blocked = io.out.is_full() || io.in_flight >= self.limits.in_flight || starved;
            if blocked && !io.blocked {
                self.counters.blocked.add(1);
            }
            if starved && !io.starved {
                io.starved = true;
                self.starved.push(id);
            }
            io.blocked = blocked;
            if blocked || io.paused {
                io.inbox.append(fresh, &self.pool);
                break;
            }
            if io.inbox.len() > 0 {
                let missing = io.inbox.need.saturating_sub(io.inbox.len());
                let (now_used, rest) = fresh.split_at(missing.min(fresh.len()));
                io.inbox.append(now_used, &self.pool);
                fresh = rest;
                if io.inbox.len() < io.inbox.need {
                    break;
                }
            } else if fresh.is_empty() {
                break;
            }
            let from_inbox = io.inbox.len() > 0;
            let mut input = Input {
                inbox: &mut io.inbox,
                fresh: if from_inbox { &[] } else { fresh },
                pool: &self.pool,
                id,
                consumed: 0,
                taken: 0,
                needed: 0,
            };
            let flow = self
                .service
                .received(state, id, &mut input, &mut io.out, now);
            let (consumed, taken, needed) = (input.consumed, input.taken, input.needed);
            let left = input.bytes().len();
            if !from_inbox {
                fresh = &fresh[fresh.len() - left..];
            }
            io.in_flight += taken;
            self.outputs = self.outputs + io.out.owned - io.counted;
            io.counted = io.out.owned;
            if consumed > 0 {
                self.counters.consumed.add(1);
                io.request_since = None;
            }
            match flow {
                Flow::Continue => {}
                Flow::Pause => io.paused = true,
                Flow::Close => io.close(CloseReason::Service, false),
                Flow::Abort => io.close(CloseReason::Service, true),
            }
            if io.closing.is_some() {
                break;
            }
            if needed > self.limits.request {
                io.close(CloseReason::RequestTooLarge, false);
                break;
            }
            // Without progress, or where the service wants more than there is, more must come. A service
            // that stopped for a limit is called again with what is left.
            io.inbox.need = if needed > left || consumed == 0 {
                needed.max(left + 1)
            } else {
                0
            };
            if io.inbox.need > left && !from_inbox && !io.paused {
                io.inbox.append(fresh, &self.pool);
                break;
            }
        }
        // The time of a request that is incomplete counts only while the peer is to blame.
        let waits = io.closing.is_none() && io.inbox.len() > 0 && io.inbox.len() < io.inbox.need;
        if !waits {
            io.request_since = None;
        } else if io.request_since.is_none() {
            io.request_since = Some(now.mono_ns);
        }
    }

    /// Looks at the time-outs of one slot in [`SWEEPS`].
    fn sweep(&mut self, now: Now) {
        self.next_sweep = now.mono_ns + SWEEP_NS;
        self.sweep = (self.sweep + 1) % SWEEPS;
        let since = |start: u64| now.mono_ns.saturating_sub(start);
        let idle = self.limits.idle.as_nanos() as u64;
        let slow_reader = self.limits.slow_reader.as_nanos() as u64;
        let slow_request = self.limits.slow_request.as_nanos() as u64;
        let starving = self.memory() >= self.limits.memory;
        for slot in (self.sweep..self.connections.slots()).step_by(SWEEPS) {
            let Some(id) = self.connections.id_in(slot) else {
                continue;
            };
            let Some(Entry { io, .. }) = self.connections.entry(id) else {
                continue;
            };
            let reason = if io.output_since.is_some_and(|at| since(at) >= slow_reader) {
                CloseReason::SlowReader
            } else if io.request_since.is_some_and(|at| since(at) >= slow_request) {
                if starving && io.blocked {
                    CloseReason::Memory
                } else {
                    CloseReason::SlowRequest
                }
            } else if starving && io.blocked && since(io.active) >= slow_request {
                CloseReason::Memory
            } else if since(io.active) >= idle && io.in_flight == 0 && io.out.is_empty() {
                CloseReason::Idle
            } else {
                continue;
            };
            self.close(id, reason);
        }
    }
}
