//! Clients over the kernel's own TCP stack: where a DPDK port cannot be reached, and for the Kafka
//! protocol until the DPDK TCP engine carries it.
//!
//! # The contract between a transport and a protocol
//!
//! A transport moves bytes, a [`Service`] knows what they mean and does no I/O. One event loop runs
//! on a thread with one service; nothing here is shared between threads, so a service needs no lock
//! and need not be `Send`. [`testing`] is a transport in memory; all
//! drive the same [`Endpoint`], which holds all rules below.
//!
//! 1. [`Service::accept`] comes first, [`Service::closed`] last, each once for a [`ConnectionId`]. An id is
//!    never used again: a slot's generation goes up with each connection.
//! 2. [`Service::received`] sees all bytes that are not yet consumed, in one piece
//!    ([`Input::bytes`]). It consumes whole requests ([`Input::consume`], or [`Input::take`] to
//!    own one) and returns when it has not enough for one; before that it says by
//!    [`Input::need`] how long the bytes must be to make it worth another call (Kafka: 4 for the
//!    length, then 4 + length). More than [`Limits::request`] closes the connection. Without
//!    `need` it is called again with the next byte.
//! 3. `received` is not called while the connection is *blocked*: after [`Flow::Pause`] (until
//!    [`Connections::resume`]), while more than [`Limits::output`] of answers are unsent, while
//!    more than [`Limits::in_flight`] of taken requests are not dropped, or while the whole
//!    thread's memory is used up. The transport then reads no more from the peer, whose TCP window closes.
//!    Inside `received`, a service that meets [`Output::is_full`] or its own limit may
//!    return with whole requests left; it is called again as soon as the connection is not blocked.
//! 4. Answers are pushed to an [`Output`] in the order in which they shall be sent, at any
//!    time: in `received`, or in [`Service::poll`] through [`Connections::get`]. Pieces are sent
//!    in order, as owned bytes or as shared slices (a mapped SST) without a copy.
//! 5. `poll` is called once in each turn of the loop, and says when it wants to be called again at the
//!    latest ([`Next`]). Other threads get it called by the loop's `Wake`: the loop arms it *before*
//!    `poll`, so what was pushed to a ring before the wake is seen by that `poll` or the next.
//! 6. When the peer has closed its sending half, or the server stops, and `received` has consumed
//!    what it can, [`Service::ended`] is called once. [`Flow::Close`] sends what is queued and closes;
//!    [`Flow::Continue`] says that answers are still owed: the service closes later by [`Connections::close`].
//! 7. A [`Request`] stays where it is in memory until dropped, also when its connection is closed
//!    before: it may be lent to a shard. Dropping it gives the buffer back and unblocks the connection.
//!
//! Cost to count with: an idle connection holds no buffer.

mod buffer;
mod connections;
mod counters;
mod endpoint;
pub mod testing;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::time::Duration;

pub use buffer::Request;
pub use connections::{Connections, Input, Output, Piece};
pub use counters::{Counters, CountersSnapshot};
pub use endpoint::{Admission, Endpoint, Status};

pub use crate::shard::Now;

/// Names a connection within its event loop; never used for two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId {
    /// Index in the loop's table.
    pub slot: u32,
    /// How often the slot was used before; wraps after 2^32 connections in one slot.
    pub generation: u32,
}

impl ConnectionId {
    /// As one number, to travel through a ring.
    pub fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    /// The id that [`to_u64`](Self::to_u64) gave.
    pub fn from_u64(value: u64) -> Self {
        Self {
            slot: value as u32,
            generation: (value >> 32) as u32,
        }
    }
}

/// Both ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The client's address.
    pub remote: SocketAddr,
    /// The address it reached.
    pub local: SocketAddr,
    /// Index of the listener in the configuration it came in by.
    pub listener: usize,
}

/// What the transport shall do with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Read on.
    Continue,
    /// Do not call `received` until [`Connections::resume`].
    Pause,
    /// Send what is queued, then close.
    Close,
    /// Close at once; what is queued is lost.
    Abort,
}

/// When [`Service::poll`] wants to be called again, at the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// At once: there is more to do than it did in this turn.
    Now,
    /// At this monotonic time ([`Now::mono_ns`]).
    At(u64),
    /// When something happens.
    Event,
}

/// Why input ends, for [`Service::ended`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The peer closed its sending half.
    Peer,
    /// The server stops; what waits for something to happen (a long poll) should be answered now.
    Stop,
}

impl End {
    fn reason(self) -> CloseReason {
        match self {
            Self::Peer => CloseReason::Peer,
            Self::Stop => CloseReason::Stop,
        }
    }
}

/// Why a connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CloseReason {
    /// The peer closed it.
    Peer,
    /// The peer reset it, or the network failed.
    Reset,
    /// The service asked for it.
    Service,
    /// Nothing was sent or received for [`Limits::idle`].
    Idle,
    /// The peer took no byte of an answer for [`Limits::slow_reader`].
    SlowReader,
    /// A request was not complete after [`Limits::slow_request`].
    SlowRequest,
    /// A request is longer than [`Limits::request`].
    RequestTooLarge,
    /// No memory became free for [`Limits::slow_request`].
    Memory,
    /// The server stops.
    Stop,
    /// The TLS handshake or a TLS record failed.
    Tls,
}

impl CloseReason {
    /// All of them, by their number.
    pub const ALL: [Self; 10] = [
        Self::Peer,
        Self::Reset,
        Self::Service,
        Self::Idle,
        Self::SlowReader,
        Self::SlowRequest,
        Self::RequestTooLarge,
        Self::Memory,
        Self::Stop,
        Self::Tls,
    ];

    /// Stable snake_case name, for statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Reset => "reset",
            Self::Service => "service",
            Self::Idle => "idle",
            Self::SlowReader => "slow_reader",
            Self::SlowRequest => "slow_request",
            Self::RequestTooLarge => "request_too_large",
            Self::Memory => "memory",
            Self::Stop => "stop",
            Self::Tls => "tls",
        }
    }
}

/// A protocol over connections; see the module's contract.
pub trait Service {
    /// What the protocol keeps for a connection.
    type Connection;

    /// A new connection; `None` refuses it.
    fn accept(&mut self, id: ConnectionId, peer: &Peer, now: Now) -> Option<Self::Connection>;

    /// Consumes what it can of the bytes received so far.
    fn received(
        &mut self,
        connection: &mut Self::Connection,
        id: ConnectionId,
        input: &mut Input<'_>,
        out: &mut Output,
        now: Now,
    ) -> Flow;

    /// No further byte will come.
    fn ended(
        &mut self,
        connection: &mut Self::Connection,
        id: ConnectionId,
        end: End,
        out: &mut Output,
        now: Now,
    ) -> Flow {
        let _ = (connection, id, end, out, now);
        Flow::Close
    }

    /// Does what does not come from a peer's bytes: acknowledgements, high watermarks, timers.
    fn poll(&mut self, connections: &mut Connections<Self::Connection>, now: Now) -> Next;

    /// The connection is gone.
    fn closed(&mut self, id: ConnectionId, connection: Self::Connection, reason: CloseReason);
}

/// Bounds on what peers can cost. Byte limits are of one thread unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections of all threads together.
    pub connections: usize,
    /// Connections of one source address (IPv6: one /64), all threads together.
    pub connections_per_source: usize,
    /// Longest request in bytes.
    pub request: usize,
    /// A connection with more unsent answer bytes is not read from. One answer may exceed it.
    pub output: usize,
    /// A connection with more bytes of taken requests is not read from. One request may exceed it.
    pub in_flight: usize,
    /// Bytes of receive buffers, taken requests and owned answer pieces of one thread. Beyond, nothing
    /// more is read; at a quarter more, who sends is closed.
    pub memory: usize,
    /// A connection that neither sends nor takes a byte for so long is closed.
    pub idle: Duration,
    /// A peer that takes no byte of an answer for so long is closed.
    pub slow_reader: Duration,
    /// A request must be complete so long after its first byte.
    pub slow_request: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 200_000,
            connections_per_source: 50_000,
            // Kafka's socket.request.max.bytes.
            request: 100 << 20,
            output: 4 << 20,
            in_flight: 16 << 20,
            memory: 1 << 30,
            // Kafka's connections.max.idle.ms.
            idle: Duration::from_secs(600),
            slow_reader: Duration::from_secs(30),
            slow_request: Duration::from_secs(60),
        }
    }
}
