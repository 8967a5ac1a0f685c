//! A thread that serves Kafka connections: from its sockets to its part of the broker and back.
//!
//! Which way it has to its sockets, epoll or io_uring, it does not know. Invariants: a connection whose requests cannot be
//! begun, or whose peer does not take its answers, is not read from, so it costs bounded memory; a thread sleeps only
//! when neither sockets nor shards nor deadlines have anything for it; at the stop every batch that a shard holds is
//! answered before the thread ends.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustls::{ServerConfig, ServerConnection};
use socket2::{SockRef, TcpKeepalive};

use crate::broker::session::LENGTH_LEN;
use crate::broker::worker::{Broker, Close, Connection, ShardLink, Worker};
use crate::config::kafka::Kafka;
use crate::config::memory;
use crate::fallback::{Event, Id, Kind, Message, Outbox, READ, Sockets};
use crate::memory::budget::{Charge, Part};
use crate::memory::wake::Wake;
use crate::shard::Now;

use super::intake::{Hold, Intake};
use super::tls::Stream;

/// Bytes that a request lacks from which on they are read into its own memory; fewer come with what follows them.
const DIRECT: usize = 32 << 10;
/// While others wait for memory, a connection that moves neither its request nor its answers on is closed after so long.
const STALL: Duration = Duration::from_secs(10);
/// How often every connection is looked at, for idle ones and such as stand still.
const SWEEP: Duration = Duration::from_secs(1);
/// Connections that are looked at in a row: the others' requests wait for it, some 100 µs.
const SWEEP_STEP: usize = 1024;
/// How long a stop waits for shards' answers.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// How long it then waits for sockets to take the last answers: they do at once where their peer reads.
const LAST_ANSWERS: Duration = Duration::from_millis(100);
/// A connection without traffic is probed after so long, which is what firewalls and address translation forget it after. Not
/// sooner: the kernel's timers of a minute end together every 4 s (of 5 minutes every 33 s), and of 100,000 idle connections
/// that is 7,000 probes in a row, which requests wait for.
const KEEPALIVE: Duration = Duration::from_secs(300);
/// Between probes that nobody answers, and how many there are: a peer that is gone is found a minute later, by the kernel's own
/// defaults not before the idle limit.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// See [`KEEPALIVE_INTERVAL`].
const KEEPALIVE_PROBES: u32 = 4;
/// A connection has so long for TLS and to prove who it is.
const PROOF_PATIENCE: Duration = Duration::from_secs(30);

/// TLS of each listener, the same for all threads.
pub(super) type TlsOfListeners = Arc<RwLock<Vec<Option<Arc<ServerConfig>>>>>;

/// Where the look at all connections is.
struct Sweep {
    /// The next one.
    at: usize,
    /// When it goes on.
    next: Instant,
    /// Somebody waited for memory when this round began.
    starved: bool,
}

/// What a connection has read.
#[derive(Clone, Copy)]
enum Input<'a> {
    /// Memory that is used again.
    Read(&'a [u8]),
    /// Memory that a large request has for itself.
    Whole(&'a Arc<Vec<u8>>),
}

impl<'a> Input<'a> {
    fn bytes(self) -> &'a [u8] {
        match self {
            Input::Read(bytes) => bytes,
            Input::Whole(bytes) => bytes,
        }
    }
}

struct Conn {
    stream: Stream,
    peer: SocketAddr,
    started: Instant,
    /// Who its certificate is for is known, or there is no need to.
    named: bool,
    /// When it is looked at again because it is muted, in nanoseconds of the broker's clock.
    timer: Option<u64>,
    state: Connection,
    /// Part of a request, and the memory that it has.
    input: Vec<u8>,
    hold: Hold,
    /// What the connection itself takes.
    _memory: Charge,
    /// Bytes that the request at its front has.
    need: usize,
    out: Outbox,
    /// The socket may have bytes; it may take some.
    readable: bool,
    writable: bool,
    /// A whole request could not be begun.
    blocked: bool,
    /// No more requests: what was answered is sent, then it is closed.
    closing: bool,
    /// Not before its time is over: who guesses passwords is to wait.
    held: bool,
    last: Instant,
}

/// What a thread has.
pub(super) struct Thread {
    sockets: Sockets,
    wake: Arc<Wake>,
    tls: TlsOfListeners,
    worker: Worker,
    broker: Arc<Broker>,
    conns: Vec<Option<Conn>>,
    generations: Vec<u32>,
    free: Vec<usize>,
    blocked: HashSet<usize>,
    /// Muted connections by the time at which they are read on.
    timers: BTreeSet<(u64, usize)>,
    intake: Intake,
    /// Requests were left unread because too much is unsent.
    full: bool,
    /// What a connection takes, by listener.
    costs: Vec<u64>,
    /// What the sockets hold for bytes that nobody has read.
    _ahead: Charge,
    max_connections: u64,
    idle: Duration,
    authentication_delay_ms: u64,
    sweep: Sweep,
    accepting: bool,
}

/// What is to become of a connection.
enum Fate {
    Stays,
    Goes,
}

impl Thread {
    pub(super) fn new(
        config: &Kafka,
        broker: Arc<Broker>,
        index: usize,
        links: Vec<ShardLink>,
        wake: Arc<Wake>,
        sockets: Sockets,
        tls: TlsOfListeners,
    ) -> Self {
        let costs = tls
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .map(|tls| memory::connection(tls.is_some(), sockets.kind() == Kind::IoUring))
            .collect();
        let requests = broker.memory.account(Part::Requests).share(broker.threads);
        let mut ahead = requests.charge();
        ahead.set(sockets.memory() as u64);
        let now = Instant::now();
        Self {
            sockets,
            wake,
            worker: Worker::new(Arc::clone(&broker), index, links),
            conns: Vec::new(),
            generations: Vec::new(),
            free: Vec::new(),
            blocked: HashSet::new(),
            timers: BTreeSet::new(),
            intake: Intake::new(&requests),
            full: false,
            costs,
            _ahead: ahead,
            tls,
            broker,
            max_connections: u64::from(config.max_connections),
            idle: config.idle_timeout,
            authentication_delay_ms: config.failed_authentication_delay.as_millis() as u64,
            sweep: Sweep {
                at: 0,
                next: now + SWEEP,
                starved: false,
            },
            accepting: true,
        }
    }

    fn now(&self) -> Now {
        self.broker.now()
    }

    /// Serves until `stop`.
    pub(super) fn run(mut self, stop: &AtomicBool) -> Worker {
        if let Err(error) = self.sockets.start() {
            tracing::error!("kafka: a thread cannot use its sockets: {error}");
        }
        let mut events = Vec::new();
        let mut stopping: Option<Instant> = None;
        loop {
            if stop.load(Relaxed) && stopping.is_none() {
                stopping = Some(Instant::now() + STOP_PATIENCE);
                self.accepting = false;
                self.sockets.stop_listening();
            }
            if let Some(until) = stopping
                && (self.worker.on_their_way() == 0 || Instant::now() > until)
            {
                self.send_last(&mut events);
                return self.worker;
            }
            self.wake.arm();
            let timeout = if self.worker.has_news() {
                Duration::ZERO
            } else {
                self.patience(stopping.is_some())
            };
            let waited = self.sockets.wait(timeout, &mut events);
            self.wake.disarm();
            if let Err(error) = waited {
                tracing::error!("kafka: waiting for sockets failed: {error}");
                std::thread::sleep(Duration::from_millis(10));
            }
            for event in events.drain(..) {
                self.take(event);
            }
            self.progress();
            if std::mem::replace(&mut self.full, self.worker.is_full()) && !self.full {
                for at in std::mem::take(&mut self.blocked) {
                    self.pump(at);
                }
            }
            self.unmute();
            self.sweep();
        }
    }

    /// What is answered goes out as far as the sockets take it.
    fn send_last(&mut self, events: &mut Vec<Event>) {
        for at in 0..self.conns.len() {
            self.pump(at);
        }
        let until = Instant::now() + LAST_ANSWERS;
        while self.sockets.sending() > 0
            && Instant::now() < until
            && self.sockets.wait(Duration::from_millis(1), events).is_ok()
        {
            for event in events.drain(..) {
                self.take(event);
            }
        }
    }

    /// The connection of this name, if it is still there.
    fn find(&mut self, id: Id) -> Option<(usize, &mut Conn)> {
        let at = id as u32 as usize;
        let conn = self.conns.get_mut(at)?.as_mut()?;
        (conn.state.id() == id).then_some((at, conn))
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Accepted {
                listener,
                stream,
                peer,
            } => {
                if let Err(error) = self.admit(stream, peer, listener) {
                    tracing::debug!("kafka: a connection was not taken: {error}");
                }
            }
            Event::AcceptFailed(error) => {
                tracing::warn!("kafka: a connection could not be accepted: {error}");
                self.broker.counters.refused.fetch_add(1, Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
            Event::Ready {
                id,
                readable,
                writable,
            } => {
                if let Some((at, conn)) = self.find(id) {
                    conn.readable |= readable;
                    conn.writable |= writable;
                    self.pump(at);
                }
            }
            Event::Sent { id, sent, message } => self.sent(id, sent, message),
            Event::Filled { id, read, input } => {
                let Some((at, conn)) = self.find(id) else {
                    return;
                };
                conn.input = input;
                conn.readable = true;
                match read {
                    Ok(1..) => {
                        conn.last = Instant::now();
                        self.pump(at);
                    }
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                        ) =>
                    {
                        self.pump(at);
                    }
                    Ok(0) | Err(_) => self.end(at),
                }
            }
        }
    }

    /// Pieces that were handed over come back.
    fn sent(&mut self, id: Id, sent: io::Result<usize>, message: Box<Message>) {
        let at = id as u32 as usize;
        let Some(Some(conn)) = self.conns.get_mut(at) else {
            return;
        };
        if conn.state.id() != id {
            return;
        }
        let (len, failed) = match sent {
            Ok(len) => (len, false),
            Err(_) => (0, true),
        };
        let of_answers = conn
            .stream
            .sent(&mut self.sockets, &mut conn.out, message, len);
        self.worker.sent(&mut conn.state, of_answers);
        if failed {
            return self.end(at);
        }
        conn.writable = true;
        if len > 0 {
            conn.last = Instant::now();
        }
        self.pump(at);
    }

    fn end(&mut self, at: usize) {
        if let Some(conn) = self.conns.get_mut(at).and_then(Option::take) {
            self.drop_connection(at, conn);
        }
    }

    fn patience(&self, stopping: bool) -> Duration {
        let mut patience = self.sweep.next.saturating_duration_since(Instant::now());
        if stopping {
            patience = Duration::from_millis(1);
        }
        let timer = self.timers.first().map(|(until, _)| *until);
        if let Some(deadline) = self.worker.next_deadline().into_iter().chain(timer).min() {
            let now = self.now().mono_ns;
            // Rounded up: a sleep that ends just before the deadline would be followed by a useless one.
            let left = Duration::from_nanos(deadline.saturating_sub(now));
            patience = patience.min(left + Duration::from_micros(100));
        }
        patience
    }

    fn admit(&mut self, stream: TcpStream, peer: SocketAddr, listener: usize) -> io::Result<()> {
        let counters = &self.broker.counters;
        let mut memory = Charge::new(self.broker.memory.account(Part::Connections));
        if counters.open.fetch_add(1, Relaxed) >= self.max_connections
            || !memory.try_set(self.costs[listener])
        {
            counters.open.fetch_sub(1, Relaxed);
            counters.refused.fetch_add(1, Relaxed);
            return Ok(());
        }
        counters.accepted.fetch_add(1, Relaxed);
        let at = self.free.pop().unwrap_or_else(|| {
            self.conns.push(None);
            self.generations.push(0);
            self.conns.len() - 1
        });
        let id = u64::from(self.generations[at]) << 32 | at as u64;
        let prepared = stream.set_nodelay(true).and_then(|()| -> io::Result<_> {
            let keepalive = TcpKeepalive::new()
                .with_time(KEEPALIVE)
                .with_interval(KEEPALIVE_INTERVAL)
                .with_retries(KEEPALIVE_PROBES);
            SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
            let local = stream.local_addr()?;
            let all = self.tls.read().unwrap_or_else(PoisonError::into_inner);
            let tls = all.get(listener).and_then(Option::as_ref);
            let tls = tls.map(|config| ServerConnection::new(Arc::clone(config)));
            let tls = tls.transpose().map_err(io::Error::other)?;
            Ok((local, Stream::new(self.sockets.add(stream, id)?, tls)))
        });
        let (local, stream) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.free.push(at);
                self.broker.counters.open.fetch_sub(1, Relaxed);
                return Err(error);
            }
        };
        let sasl = self.broker.listeners[listener].proof.sasl;
        self.conns[at] = Some(Conn {
            // Who logs in by SASL is known by that.
            named: sasl || matches!(stream, Stream::Plain(_)),
            stream,
            peer,
            started: Instant::now(),
            timer: None,
            state: Connection::new(id, local, peer, &self.broker, listener),
            input: Vec::new(),
            hold: Hold::default(),
            _memory: memory,
            need: 0,
            out: Outbox::default(),
            readable: true,
            writable: true,
            blocked: false,
            closing: false,
            held: false,
            last: Instant::now(),
        });
        self.pump(at);
        Ok(())
    }

    /// Takes in what the worker completed.
    fn progress(&mut self) {
        // Each turn may free what another connection waits for.
        loop {
            let now = self.now();
            let work = self.worker.poll(now);
            for done in self.worker.completed() {
                let at = done.connection as u32 as usize;
                match self.conns.get_mut(at) {
                    Some(Some(conn)) if conn.state.id() == done.connection => {
                        self.worker.finish(&mut conn.state, done, now);
                        conn.last = Instant::now();
                        self.pump(at);
                    }
                    _ => {
                        let bytes = done.answer.iter().map(|piece| piece.len()).sum();
                        self.worker.lost(bytes);
                    }
                }
            }
            if work == 0 || self.blocked.is_empty() {
                return;
            }
            for at in std::mem::take(&mut self.blocked) {
                self.pump(at);
            }
        }
    }

    /// Moves a connection on: begins requests, sends answers, reads more.
    fn pump(&mut self, at: usize) {
        let Some(mut conn) = self.conns.get_mut(at).and_then(Option::take) else {
            return;
        };
        let begun = conn.state.is_timed().then(Instant::now);
        let fate = self.turn(&mut conn);
        if let Some(begun) = begun {
            conn.state.charge(begun.elapsed(), self.now());
        }
        self.intake.settle(&mut conn.hold, &conn.input);
        match fate {
            Fate::Stays => {
                let until = conn.state.muted_until_ns();
                if conn.timer != Some(until) && until > self.now().mono_ns {
                    if let Some(before) = conn.timer.replace(until) {
                        self.timers.remove(&(before, at));
                    }
                    self.timers.insert((until, at));
                }
                if conn.blocked {
                    self.blocked.insert(at);
                }
                self.conns[at] = Some(conn);
            }
            Fate::Goes => self.drop_connection(at, conn),
        }
    }

    /// Reads on from connections whose time is over.
    fn unmute(&mut self) {
        let now = self.now().mono_ns;
        while let Some(&(until, at)) = self.timers.first()
            && until <= now
        {
            self.timers.pop_first();
            if let Some(Some(conn)) = self.conns.get_mut(at) {
                conn.timer = None;
                self.pump(at);
            }
        }
    }

    fn drop_connection(&mut self, at: usize, mut conn: Conn) {
        conn.stream.close(&mut self.sockets);
        if let Some(until) = conn.timer {
            self.timers.remove(&(until, at));
        }
        self.intake.give(std::mem::take(&mut conn.input));
        self.intake.renew(&mut conn.hold, &conn.input);
        let mut bytes = conn.out.unsent();
        while let Some(answer) = conn.state.session().next_answer() {
            bytes += answer.iter().map(|piece| piece.len()).sum::<usize>();
        }
        self.worker.lost(bytes);
        self.worker.closed(conn.state.id());
        self.broker.counters.open.fetch_sub(1, Relaxed);
        self.blocked.remove(&at);
        self.generations[at] = self.generations[at].wrapping_add(1);
        self.free.push(at);
    }

    fn turn(&mut self, conn: &mut Conn) -> Fate {
        loop {
            if !conn.closing && !conn.input.is_empty() {
                let input = std::mem::take(&mut conn.input);
                conn.input = self.begin(conn, input);
            }
            if conn.held && conn.state.muted_until_ns() > self.now().mono_ns {
                return Fate::Stays;
            }
            let unsent = conn.out.unsent();
            if self.flush(conn).is_err() {
                return Fate::Goes;
            }
            // What is sent now may have been what the next request waited for, and then nothing else would tell.
            if conn.blocked && !conn.closing && conn.out.unsent() < unsent {
                continue;
            }
            if conn.closing {
                return match conn.out.is_empty() && !conn.stream.unsent() {
                    true => Fate::Goes,
                    false => Fate::Stays,
                };
            }
            let muted = conn.state.muted_until_ns() > self.now().mono_ns;
            let held = conn.blocked || muted || conn.out.unsent() > self.broker.limits.unsent;
            if !conn.readable || held || !self.accepting {
                return Fate::Stays;
            }
            let need = conn.need.max(LENGTH_LEN);
            if !self.intake.admits(&mut conn.hold, &mut conn.input, need) {
                return Fate::Stays;
            }
            // The rest of a large request goes where the request is, without a copy between.
            let rest = conn.need.saturating_sub(conn.input.len());
            let large = rest >= DIRECT || rest > 0 && self.sockets.is_dry();
            if !conn.input.is_empty()
                && large
                && let Stream::Plain(socket) = &conn.stream
            {
                match self.sockets.fill(socket, &mut conn.input, rest) {
                    Ok(0) => return Fate::Goes,
                    Ok(_) => conn.last = Instant::now(),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        conn.readable = false;
                        return Fate::Stays;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return Fate::Goes,
                }
                continue;
            }
            match conn.stream.read(&mut self.sockets) {
                Ok(chunk) if chunk.is_empty() => {
                    self.sockets.give(chunk);
                    return Fate::Goes;
                }
                Ok(chunk) => {
                    conn.last = Instant::now();
                    if !conn.named {
                        conn.named = true;
                        if let Some(name) = conn.stream.principal() {
                            conn.state.set_principal(&name);
                        }
                    }
                    if conn.input.is_empty() {
                        let consumed = self.consume(conn, Input::Read(&chunk));
                        conn.input.extend_from_slice(&chunk[consumed..]);
                    } else {
                        if conn.input.capacity() < conn.need {
                            let more = conn.need - conn.input.len();
                            conn.input.reserve_exact(more.max(chunk.len()));
                        }
                        conn.input.extend_from_slice(&chunk);
                    }
                    self.sockets.give(chunk);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    conn.readable = false;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() == io::ErrorKind::InvalidData {
                        tracing::info!("kafka: TLS with {} failed: {error}", conn.peer);
                        self.broker.counters.tls_failed.fetch_add(1, Relaxed);
                    }
                    return Fate::Goes;
                }
            }
        }
    }

    /// Begins the requests in `input`; gives the rest.
    fn begin(&mut self, conn: &mut Conn, input: Vec<u8>) -> Vec<u8> {
        let (consumed, mut input) = if input.len() < DIRECT {
            (self.consume(conn, Input::Read(&input)), input)
        } else {
            let input = Arc::new(input);
            let consumed = self.consume(conn, Input::Whole(&input));
            match Arc::try_unwrap(input) {
                Ok(input) => (consumed, input),
                // A batch in it is on its way to its shard.
                Err(input) => {
                    let rest = input[consumed..].to_vec();
                    self.intake.renew(&mut conn.hold, &rest);
                    return rest;
                }
            }
        };
        if consumed == 0 {
            return input;
        }
        if consumed == input.len() {
            self.intake.give(std::mem::take(&mut input));
        } else if input.capacity() > READ {
            // What is left is the beginning of another request.
            let rest = input[consumed..].to_vec();
            self.intake.give(std::mem::replace(&mut input, rest));
        } else {
            input.drain(..consumed);
        }
        self.intake.renew(&mut conn.hold, &input);
        input
    }

    fn consume(&mut self, conn: &mut Conn, input: Input<'_>) -> usize {
        let now = self.now();
        let mut consumed = 0;
        loop {
            let worker = &mut self.worker;
            let received = match input {
                Input::Read(bytes) => worker.received(&mut conn.state, &bytes[consumed..], now),
                Input::Whole(bytes) => worker.received_whole(&mut conn.state, bytes, consumed, now),
            };
            match received {
                Ok(received) => {
                    consumed += received.consumed;
                    conn.need = received.need;
                    conn.blocked = received.blocked;
                    let answered = self.collect(conn);
                    // What was answered at once may have been what the next request waited for.
                    if !(received.blocked && answered && received.consumed > 0) {
                        return consumed;
                    }
                }
                Err(reason) => {
                    let session = conn.state.session();
                    tracing::info!(
                        "kafka: closed a connection of client {:?} ({}): {reason:?}",
                        session.client_id(),
                        session.software()
                    );
                    self.collect(conn);
                    conn.closing = true;
                    conn.blocked = false;
                    if reason == Close::AuthenticationFailed {
                        conn.held = true;
                        conn.state.mute(self.authentication_delay_ms, now);
                    }
                    return input.bytes().len();
                }
            }
        }
    }

    /// Moves answers to the pieces that are to be sent.
    fn collect(&mut self, conn: &mut Conn) -> bool {
        let mut any = false;
        while let Some(answer) = conn.state.session().next_answer() {
            conn.out.push(answer);
            any = true;
        }
        any
    }

    fn flush(&mut self, conn: &mut Conn) -> io::Result<()> {
        self.collect(conn);
        while conn.writable {
            if conn.out.is_empty() {
                conn.writable = conn.stream.flush(&mut self.sockets)?;
                break;
            }
            match conn.stream.send(&mut self.sockets, &mut conn.out) {
                Ok(len) => {
                    conn.last = Instant::now();
                    self.worker.sent(&mut conn.state, len);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    conn.writable = false;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Closes connections that were idle for too long, and moves on what was held by the others' memory.
    fn sweep(&mut self) {
        let now = Instant::now();
        if now < self.sweep.next {
            return;
        }
        if self.sweep.at >= self.conns.len() {
            self.sweep.at = 0;
        }
        if self.sweep.at == 0 {
            let starved = self.intake.take_starved();
            self.sweep.starved = starved | self.worker.is_full() | self.sockets.is_dry();
        }
        let starved = self.sweep.starved;
        let steps = self.conns.len().div_ceil(SWEEP_STEP).max(1);
        self.sweep.next = now + SWEEP / steps as u32;
        let first = self.sweep.at;
        self.sweep.at = self.conns.len().min(first + SWEEP_STEP);
        for at in first..self.sweep.at {
            let Some(Some(conn)) = self.conns.get_mut(at) else {
                continue;
            };
            if conn.out.let_go(now) {
                conn.stream.call_back(&mut self.sockets);
            }
            let waits = conn.state.session().waiting() > 0 || conn.timer.is_some();
            let unproved = !conn.state.is_proved() || conn.stream.handshaking();
            if unproved && now.duration_since(conn.started) > PROOF_PATIENCE {
                self.broker.counters.late.fetch_add(1, Relaxed);
                self.end(at);
            } else if !waits && now.duration_since(conn.last) > self.idle {
                self.broker.counters.idle.fetch_add(1, Relaxed);
                self.end(at);
            } else if starved
                && (conn.out.unsent() > 0 || conn.hold.is_reserved() && !conn.blocked)
                && now.duration_since(conn.last) > STALL
            {
                tracing::info!(
                    "kafka: closed the connection of {}: it stands still and holds memory that others wait for",
                    conn.peer
                );
                self.broker.counters.stalled.fetch_add(1, Relaxed);
                self.end(at);
            } else if conn.readable || conn.blocked {
                self.pump(at);
            }
        }
    }
}
