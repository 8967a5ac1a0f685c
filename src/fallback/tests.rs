//! Both ways to sockets against the same peers, played over loopback: order, bounds, ends, and what comes late.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use super::*;
use crate::memory::wake::Wake;

pub(super) const KINDS: [Kind; 2] = [Kind::Epoll, Kind::IoUring];
/// A guard against hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that the kernel is to hold for a socket.
const KERNEL: usize = 64 << 10;
/// The least memory that a ring has.
const LEAST: usize = 0;

struct Conn {
    socket: Socket,
    out: Outbox,
    readable: bool,
    writable: bool,
    /// Part of a request, while it is not lent.
    input: Vec<u8>,
    /// Bytes of it that are read without a chunk between; then it is echoed.
    rest: usize,
    ended: bool,
}

/// A server that echoes.
struct Server {
    sockets: Sockets,
    _wake: Wake,
    address: SocketAddr,
    conns: HashMap<Id, Conn>,
    events: Vec<Event>,
    next: Id,
    /// Nobody is read from.
    holds: bool,
    /// Bytes of each connection that are read without a chunk between, from its first byte on.
    direct: usize,
}

impl Server {
    fn new(kind: Kind, memory: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        // Its connections have it from the listener: the kernel holds little, so it is this code that does not.
        let socket = socket2::SockRef::from(&listener);
        socket.set_recv_buffer_size(KERNEL).unwrap();
        let address = listener.local_addr().unwrap();
        let wake = Wake::new().unwrap();
        let mut sockets = Sockets::new(kind, wake.descriptor(), memory).unwrap();
        sockets.listen(vec![listener]).unwrap();
        sockets.start().unwrap();
        Self {
            sockets,
            _wake: wake,
            address,
            conns: HashMap::new(),
            events: Vec::new(),
            next: 1,
            holds: false,
            direct: 0,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    fn turn(&mut self) {
        let time = Duration::from_millis(1);
        let mut events = std::mem::take(&mut self.events);
        self.sockets.wait(time, &mut events).unwrap();
        for event in events.drain(..) {
            self.take(event);
        }
        self.events = events;
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "{what}");
            self.turn();
        }
    }

    fn take(&mut self, event: Event) {
        let id = match event {
            Event::Accepted { stream, .. } => {
                let id = self.next;
                self.next += 1;
                let socket = self.sockets.add(stream, id).unwrap();
                let conn = Conn {
                    socket,
                    out: Outbox::default(),
                    readable: true,
                    writable: true,
                    input: Vec::new(),
                    rest: self.direct,
                    ended: false,
                };
                self.conns.insert(id, conn);
                id
            }
            Event::AcceptFailed(error) => panic!("{error}"),
            Event::Ready {
                id,
                readable,
                writable,
            } => {
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.readable |= readable;
                    conn.writable |= writable;
                }
                id
            }
            Event::Sent { id, sent, message } => {
                let Ok(len) = sent else {
                    if let Some(conn) = self.conns.remove(&id) {
                        self.sockets.close(conn.socket);
                    }
                    return;
                };
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.out.sent(&mut self.sockets, message, len);
                    conn.writable = true;
                }
                id
            }
            Event::Filled { id, read, input } => {
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.input = input;
                    conn.readable = true;
                    match read {
                        Ok(len @ 1..) => conn.rest -= len,
                        _ => conn.ended = true,
                    }
                }
                id
            }
        };
        self.pump(id);
    }

    fn pump(&mut self, id: Id) {
        let Some(mut conn) = self.conns.remove(&id) else {
            return;
        };
        if self.step(&mut conn) {
            self.conns.insert(id, conn);
        } else {
            self.sockets.close(conn.socket);
        }
    }

    /// Echoes what has come; false: it is over.
    fn step(&mut self, conn: &mut Conn) -> bool {
        while conn.readable && !conn.ended && !self.holds {
            if conn.rest > 0 {
                match self.sockets.fill(&conn.socket, &mut conn.input, conn.rest) {
                    Ok(0) => conn.ended = true,
                    Ok(len) => conn.rest -= len,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        conn.readable = false;
                    }
                    Err(_) => return false,
                }
                continue;
            }
            if !conn.input.is_empty() {
                conn.out.push(vec![std::mem::take(&mut conn.input).into()]);
            }
            match self.sockets.read(&conn.socket) {
                Ok(chunk) => {
                    conn.ended |= chunk.is_empty();
                    conn.out.push(vec![chunk.to_vec().into()]);
                    self.sockets.give(chunk);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => conn.readable = false,
                Err(_) => return false,
            }
        }
        while conn.writable && !conn.out.is_empty() {
            match conn.out.send(&mut self.sockets, &conn.socket) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => conn.writable = false,
                Err(_) => return false,
            }
        }
        !conn.ended || !conn.out.is_empty()
    }

    /// Reads from everybody from now on.
    fn read_all(&mut self) {
        self.holds = false;
        let ids: Vec<Id> = self.conns.keys().copied().collect();
        for id in ids {
            self.pump(id);
        }
    }
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Sends bytes in parts, reads as many, and ends; the thread gives what came back.
fn peer(mut stream: TcpStream, seed: u64, len: usize) -> std::thread::JoinHandle<bool> {
    std::thread::spawn(move || {
        let all = bytes(seed, len);
        let mut reader = stream.try_clone().unwrap();
        let sent = all.clone();
        let writer = std::thread::spawn(move || {
            let mut random = StdRng::seed_from_u64(seed);
            let mut rest = &sent[..];
            while !rest.is_empty() {
                let (part, after) = rest.split_at(random.random_range(1..200_000).min(rest.len()));
                stream.write_all(part).unwrap();
                rest = after;
            }
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        reader.read_to_end(&mut back).unwrap();
        writer.join().unwrap();
        back == all
    })
}

#[test]
fn everything_comes_back_in_order_through_both() {
    for kind in KINDS {
        for direct in [0, 300_000] {
            let mut server = Server::new(kind, LEAST);
            server.direct = direct;
            let peers: Vec<_> = (0..12)
                .map(|seed| peer(server.connect(), seed, 300_000 + seed as usize * 99_999))
                .collect();
            server.until("all peers have ended", |server| {
                server.next == 13 && server.conns.is_empty()
            });
            for peer in peers {
                assert!(peer.join().unwrap(), "{kind:?}");
            }
        }
    }
}

#[test]
fn a_connection_that_is_not_read_costs_bounded_memory() {
    for kind in KINDS {
        let mut server = Server::new(kind, LEAST);
        let stream = server.connect();
        let socket = socket2::SockRef::from(&stream);
        socket.set_send_buffer_size(KERNEL).unwrap();
        // It is received from before it is held.
        server.until("it is there", |server| server.conns.len() == 1);
        server.holds = true;
        stream.set_nonblocking(true).unwrap();
        let all = bytes(1, 8 << 20);
        let (mut sent, mut stuck) = (0, 0);
        while stuck < 50 {
            match (&stream).write(&all[sent..]) {
                Ok(len) => (sent, stuck) = (sent + len, 0),
                Err(_) => stuck += 1,
            }
            server.turn();
        }
        assert!(sent < all.len() / 2, "{kind:?} took {sent} bytes");
        if let Some(ring) = server.sockets.ring() {
            let (copied, taken) = ring.held();
            assert!(
                copied <= LEAST_BYTES && taken <= LEAST_BYTES,
                "{copied} {taken}"
            );
            assert!(copied > 0, "it was received from ahead");
        }
        stream.set_nonblocking(false).unwrap();
        server.read_all();
        let rest = all[sent..].to_vec();
        let mut reader = stream.try_clone().unwrap();
        let writer = std::thread::spawn(move || {
            (&stream).write_all(&rest).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let back = std::thread::spawn(move || {
            let mut back = Vec::new();
            reader.read_to_end(&mut back).unwrap();
            back
        });
        server.until("it has ended", |server| server.conns.is_empty());
        writer.join().unwrap();
        assert!(back.join().unwrap() == all, "{kind:?}");
        if let Some(ring) = server.sockets.ring() {
            assert_eq!(ring.held(), (0, 0));
        }
    }
}

/// Bytes of the fewest buffers that a ring has.
const LEAST_BYTES: usize = 16 * super::buffers::BUFFER;

#[test]
fn when_buffers_run_out_others_wait_and_a_begun_request_goes_on() {
    const PEERS: usize = 40;
    let mut server = Server::new(Kind::IoUring, LEAST);
    let streams: Vec<TcpStream> = (0..PEERS).map(|_| server.connect()).collect();
    server.until("all are there", |server| server.conns.len() == PEERS);
    server.holds = true;
    let peers = streams.into_iter().zip(0..);
    let peers: Vec<_> = peers.map(|(s, seed)| peer(s, seed, 100_000)).collect();
    server.until("there are none left", |server| server.sockets.is_dry());
    // One whose request has memory is read although there are none.
    let large = server.connect();
    server.direct = 1 << 20;
    server.until("it is there", |server| server.conns.len() == PEERS + 1);
    server.holds = false;
    let id = PEERS as Id + 1;
    let all = bytes(77, 1 << 20);
    let writer = std::thread::spawn(move || {
        (&large).write_all(&all).unwrap();
        let mut back = vec![0; all.len()];
        (&large).read_exact(&mut back).unwrap();
        back == all
    });
    server.pump(id);
    // The others are not pumped: nothing but `fill` moves.
    let start = Instant::now();
    while server.conns[&id].rest > 0 {
        assert!(start.elapsed() < PATIENCE);
        let mut events = Vec::new();
        server
            .sockets
            .wait(Duration::from_millis(1), &mut events)
            .unwrap();
        for event in events {
            if matches!(&event, Event::Filled { .. }) {
                server.take(event);
            } else {
                server.events.push(event);
            }
        }
    }
    server.read_all();
    server.until("all have their bytes", |_| {
        writer.is_finished() && peers.iter().all(|peer| peer.is_finished())
    });
    assert!(writer.join().unwrap());
    for peer in peers {
        assert!(peer.join().unwrap());
    }
    server.until("buffers are there again", |server| !server.sockets.is_dry());
}

/// Connections are closed while the kernel receives, fills and sends for them, and others take their places.
#[test]
fn what_comes_late_finds_nobody() {
    let mut server = Server::new(Kind::IoUring, LEAST);
    let mut random = StdRng::seed_from_u64(3);
    let mut peers: Vec<(TcpStream, Id)> = Vec::new();
    for round in 0..600u64 {
        let (stream, id) = (server.connect(), server.next);
        server.direct = [0, 50_000][random.random_range(0..2)];
        server.until("it is there", |server| server.next == id + 1);
        // Some send in part, some are sent what they do not read.
        stream.set_nonblocking(true).unwrap();
        let _ = (&stream).write(&bytes(round, random.random_range(0..40_000)));
        if random.random_ratio(1, 3)
            && let Some(conn) = server.conns.get_mut(&id)
        {
            conn.out.push(vec![vec![7; 8 << 20].into()]);
            server.pump(id);
        }
        peers.push((stream, id));
        if random.random_ratio(1, 2) {
            server.turn();
        }
        while peers.len() > random.random_range(0..10) {
            let (stream, id) = peers.swap_remove(random.random_range(0..peers.len()));
            // Either side ends it.
            if random.random_ratio(1, 2)
                && let Some(conn) = server.conns.remove(&id)
            {
                server.sockets.close(conn.socket);
            }
            drop(stream);
        }
    }
    peers.clear();
    server.until("all have ended", |server| server.conns.is_empty());
    // A new one is served as if nothing had been.
    server.direct = 0;
    let last = peer(server.connect(), 5, 500_000);
    server.until("it has its bytes", |_| last.is_finished());
    assert!(last.join().unwrap());
    server.until("all have ended", |server| server.conns.is_empty());
    let ring = server.sockets.ring().unwrap();
    assert_eq!((ring.held(), ring.sending()), ((0, 0), 0));
    assert!(ring.slots() < 30, "{} slots", ring.slots());
}

#[test]
fn the_end_comes_with_everything_under_way() {
    for kind in KINDS {
        let mut server = Server::new(kind, LEAST);
        server.direct = 1 << 20;
        let peers: Vec<TcpStream> = (0..20).map(|_| server.connect()).collect();
        server.until("all are there", |server| server.conns.len() == 20);
        for (at, mut stream) in peers.iter().enumerate() {
            stream.write_all(&bytes(at as u64, 10_000)).unwrap();
        }
        for (at, conn) in server.conns.values_mut().enumerate() {
            if at % 2 == 0 {
                conn.out.push(vec![vec![1; 16 << 20].into()]);
            }
        }
        server.read_all();
        server.turn();
        drop(server);
        for mut stream in peers {
            // To the end, or a reset for what was not read.
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
}

#[test]
fn nobody_is_accepted_after_the_listeners_have_gone() {
    for kind in KINDS {
        let mut server = Server::new(kind, LEAST);
        let first = peer(server.connect(), 1, 10);
        server.until("it has its bytes", |_| first.is_finished());
        assert!(first.join().unwrap());
        server.sockets.stop_listening();
        server.until("connections are refused", |server| {
            TcpStream::connect(server.address).is_err()
        });
    }
}

#[test]
fn a_wake_ends_a_sleep() {
    for kind in KINDS {
        let wake = Wake::new().unwrap();
        let mut sockets = Sockets::new(kind, wake.descriptor(), LEAST).unwrap();
        sockets.start().unwrap();
        for _ in 0..3 {
            wake.arm();
            std::thread::scope(|scope| {
                scope.spawn(|| wake.wake());
                let start = Instant::now();
                sockets.wait(PATIENCE, &mut Vec::new()).unwrap();
                assert!(start.elapsed() < PATIENCE);
            });
            wake.disarm();
        }
    }
}
