//! A transport in memory: feeds bytes in any pieces to a service and collects its answers. For tests,
//! fuzzing and benchmarks of protocols without a network.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use super::{Admission, ConnectionId, Counters, Endpoint, Limits, Next, Now, Peer, Piece, Service};

/// Some Unix time, so that what is stored looks like it.
const START_UNIX_NS: i64 = 1_750_000_000_000_000_000;

/// A service with peers that the test plays; time stands still unless moved.
pub struct Memory<S: Service> {
    /// The rules and the service.
    pub endpoint: Endpoint<S>,
    /// The time that the service sees.
    pub now: Now,
    /// Its counters.
    pub counters: Arc<Counters>,
    peers: HashMap<ConnectionId, Side>,
    next_port: u16,
}

#[derive(Default)]
struct Side {
    /// Sent by the test, not yet read by the transport.
    to_server: Vec<u8>,
    /// Sent by the service, not yet taken by the test.
    to_client: Vec<u8>,
    half_closed: bool,
    told_end: bool,
    closed: bool,
    /// How many bytes the peer takes before the test reads; a slow reader has few.
    window: usize,
}

impl<S: Service> Memory<S> {
    /// No connection yet.
    pub fn new(service: S, limits: Limits) -> Self {
        let counters = Arc::<Counters>::default();
        Self {
            endpoint: Endpoint::new(
                service,
                limits,
                Arc::<Admission>::default(),
                Arc::clone(&counters),
            ),
            now: Now {
                mono_ns: 1,
                unix_ns: START_UNIX_NS,
            },
            counters,
            peers: HashMap::new(),
            next_port: 1024,
        }
    }

    /// A new connection; `None` when it was refused.
    pub fn connect(&mut self) -> Option<ConnectionId> {
        self.next_port = self.next_port.wrapping_add(1).max(1024);
        let port = self.next_port;
        self.connect_from(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
    }

    /// A new connection from an address.
    pub fn connect_from(&mut self, remote: SocketAddr) -> Option<ConnectionId> {
        let peer = Peer {
            remote,
            local: SocketAddr::from((Ipv4Addr::LOCALHOST, 9092)),
            listener: 0,
        };
        let id = self.endpoint.accept(&peer, self.now)?;
        let side = Side {
            window: usize::MAX,
            ..Side::default()
        };
        self.peers.insert(id, side);
        Some(id)
    }

    /// Queues bytes from the peer as one segment or as many as the server has room for; call
    /// [`turn`](Self::turn) to have them delivered. Ignored once the connection is closed.
    pub fn send(&mut self, id: ConnectionId, bytes: &[u8]) {
        if let Some(side) = self.peers.get_mut(&id) {
            side.to_server.extend_from_slice(bytes);
        }
    }

    /// Sends each of the pieces and has it delivered before the next.
    pub fn send_pieces<'a>(
        &mut self,
        id: ConnectionId,
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) {
        for piece in pieces {
            self.send(id, piece);
            self.turn();
        }
    }

    /// The peer closes its sending half.
    pub fn half_close(&mut self, id: ConnectionId) {
        if let Some(side) = self.peers.get_mut(&id) {
            side.half_closed = true;
        }
    }

    /// The peer resets the connection.
    pub fn reset(&mut self, id: ConnectionId) {
        self.endpoint.reset(id);
    }

    /// From now on the peer takes so many bytes beyond those that [`take`](Self::take) took.
    pub fn window(&mut self, id: ConnectionId, bytes: usize) {
        if let Some(side) = self.peers.get_mut(&id) {
            side.window = bytes;
        }
    }

    /// What the service sent and the test has not taken yet.
    pub fn take(&mut self, id: ConnectionId) -> Vec<u8> {
        self.peers
            .get_mut(&id)
            .map(|side| std::mem::take(&mut side.to_client))
            .unwrap_or_default()
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&self, id: ConnectionId) -> bool {
        self.peers.get(&id).is_none_or(|side| side.closed)
    }

    /// Bytes that the server has not read.
    pub fn unread(&self, id: ConnectionId) -> usize {
        self.peers.get(&id).map_or(0, |side| side.to_server.len())
    }

    /// Moves the time.
    pub fn advance_time(&mut self, by: std::time::Duration) {
        self.now.mono_ns += by.as_nanos() as u64;
        self.now.unix_ns += by.as_nanos() as i64;
    }

    /// One turn of the loop: delivers what may be read, polls the service, sends.
    pub fn turn(&mut self) -> Next {
        let mut ids: Vec<_> = self.peers.keys().copied().collect();
        ids.sort();
        for &id in &ids {
            let Some(status) = self.endpoint.status(id) else {
                continue;
            };
            let Some(side) = self.peers.get_mut(&id) else {
                continue;
            };
            if status.read && !side.to_server.is_empty() {
                let bytes = std::mem::take(&mut side.to_server);
                self.endpoint.receive(id, &bytes, self.now);
            } else if status.read && side.half_closed && !side.told_end {
                side.told_end = true;
                self.endpoint.end_of_input(id);
            }
        }
        let next = self.endpoint.poll(self.now);
        let mut work = false;
        while let Some(id) = self.endpoint.next_changed() {
            work |= self.act(id);
        }
        if work { Next::Now } else { next }
    }

    /// Turns until nothing more happens without new bytes or time.
    ///
    /// # Panics
    /// When that is not so after a million turns.
    pub fn run(&mut self) -> Next {
        for _ in 0..1_000_000 {
            let before = self.progress();
            let next = self.turn();
            if next != Next::Now && self.progress() == before {
                return next;
            }
        }
        panic!("the service never comes to rest");
    }

    fn progress(&self) -> (u64, u64, usize) {
        let told = self.peers.values().filter(|side| side.told_end).count();
        (
            self.counters.bytes_in.get(),
            self.counters.bytes_out.get(),
            self.endpoint.len() + told,
        )
    }

    fn act(&mut self, id: ConnectionId) -> bool {
        let Some(status) = self.endpoint.status(id) else {
            return false;
        };
        let Some(side) = self.peers.get_mut(&id) else {
            return false;
        };
        if status.close || status.abort {
            side.closed = true;
            self.endpoint.closed(id);
            return true;
        }
        if !status.send || side.to_client.len() >= side.window {
            return false;
        }
        let mut pieces = Vec::new();
        self.endpoint.take_pieces(id, &mut pieces, 64, 1 << 20);
        let bytes: usize = pieces.iter().map(Piece::len).sum();
        for piece in &pieces {
            side.to_client.extend_from_slice(piece.bytes());
        }
        self.endpoint.sent(id, bytes, &pieces, self.now);
        true
    }

    /// Lets the peers that have room again take more.
    pub fn drain(&mut self) {
        let ids: Vec<_> = self.peers.keys().copied().collect();
        for id in ids {
            self.act(id);
        }
    }
}
