//! Kafka's protocol over the kernel's TCP: threads, each with its listeners, connections and part of the broker.
//!
//! Every thread listens on every address (SO_REUSEPORT: the kernel spreads connections) and serves its
//! connections alone. Invariants: a connection whose requests cannot be begun, or whose peer does not take its
//! answers, is not read from, so it costs bounded memory; a thread sleeps only when neither sockets nor shards
//! nor deadlines have anything for it; at the stop every batch that a shard holds is answered before the
//! thread ends.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use mio::net::{TcpListener, TcpStream};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustls::ServerConfig;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

use rand::RngExt;

use crate::broker::cluster::Endpoint;
use crate::broker::counters::Counters;
use crate::broker::groups::{self, Coordinator};
use crate::broker::hub::{self, Hub};
use crate::broker::producer_ids::ProducerIds;
use crate::broker::security::acl::Rules;
use crate::broker::security::quota::Quotas;
use crate::broker::security::sasl::Users;
use crate::broker::security::{Loaded, Proof, Security};
use crate::broker::session::{LENGTH_LEN, Limits};
use crate::broker::topics::{OFFSETS_TOPIC, Topics};
use crate::broker::worker::{self, Broker, Close, Connection, ShardLink, Worker};
use crate::config::Config;
use crate::config::kafka::{Kafka, Listener};
use crate::config::memory;
use crate::memory::budget::{Budget, Charge, Part};
use crate::memory::spsc::{Consumer, Producer};
use crate::memory::wake::Wake;
use crate::shard::link::{BatchLink, link};
use crate::shard::{Ack, Inbound, Now, ShardStats};
use crate::storage::lsm::Store;
use crate::storage::{LogReader, WalShared, WalWriter};

use super::Error;
use super::intake::{Hold, Intake};
use super::live::LiveTopics;
use super::send::Outbox;
use super::tls::{self, Transport};
use super::topics;

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 1024;
/// Bytes read at a time: several requests of a usual producer, one read for a whole fetch request.
const READ: usize = 128 << 10;
/// Bytes that a request lacks from which on they are read into its own memory; fewer come with what follows them.
const DIRECT: usize = 32 << 10;
/// Unsent bytes beyond which a connection's requests are not read.
const MAX_CONNECTION_UNSENT: usize = 1 << 20;
/// While others wait for memory, a connection that moves neither its request nor its answers on is closed after so long.
const STALL: Duration = Duration::from_secs(10);
/// Events taken at a time.
const EVENTS: usize = 1024;
/// How often idle connections are looked for.
const SWEEP: Duration = Duration::from_secs(1);
/// How long a stop waits for shards' answers.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// A connection without traffic is probed after so long.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// Bytes of a record batch that clients make by default, at most (librdkafka's `message.max.bytes`).
const CLIENT_BATCH: usize = 1_000_000;
/// A connection has so long for TLS and to prove who it is.
const PROOF_PATIENCE: Duration = Duration::from_secs(30);

const WAKE: Token = Token(usize::MAX);
/// Tokens from here on are listeners.
const LISTENERS: usize = usize::MAX - 1024;

/// Partitions of the topic of committed offsets where there is none yet: they spread groups over shards.
const OFFSETS_PARTITIONS: u32 = 16;

/// The threads' ways to the shards, while the server is put together.
pub(super) struct Wiring {
    wakes: Vec<Arc<Wake>>,
    links: Vec<Vec<BatchLink>>,
    max_batch: usize,
}

impl Wiring {
    pub(super) fn new(config: Option<&Kafka>) -> io::Result<Self> {
        let threads = config.map_or(0, |kafka| usize::from(kafka.threads));
        let wakes: Result<Vec<_>, _> = (0..threads).map(|_| Wake::new().map(Arc::new)).collect();
        Ok(Self {
            wakes: wakes?,
            links: (0..threads).map(|_| Vec::new()).collect(),
            max_batch: usize::MAX,
        })
    }

    pub(super) fn wakes(&self) -> Vec<Arc<Wake>> {
        self.wakes.clone()
    }

    /// Connects every thread to the next shard, behind its first `rings` rings. `bell` wakes the shard's loop.
    pub(super) fn connect(
        &mut self,
        rings: usize,
        wal: &WalWriter,
        bell: Option<&Arc<Wake>>,
        inputs: &mut Vec<Consumer<Inbound>>,
        outlets: &mut Vec<Producer<Ack>>,
    ) {
        self.max_batch = self.max_batch.min(wal.max_entry());
        for (thread, links) in self.links.iter_mut().enumerate() {
            let (mut batches, end) = link((rings + thread) as u8);
            if let Some(bell) = bell {
                batches.set_bell(Arc::clone(bell));
            }
            inputs.push(end.input);
            outlets.push(end.outlet);
            links.push(batches);
        }
    }

    /// Starts the threads.
    pub(super) fn start(
        self,
        config: &Kafka,
        broker: &Arc<Broker>,
        stats: Vec<Arc<ShardStats>>,
        logs: &Logs,
    ) -> Result<Threads, Error> {
        let max_batch = self.max_batch;
        let workers = self.links.into_iter().map(|links| {
            let links = links.into_iter().zip(&stats).zip(logs.readers());
            links
                .map(|((batches, stats), reader)| ShardLink {
                    batches,
                    stats: Arc::clone(stats),
                    reader,
                    max_batch,
                })
                .collect()
        });
        let threads = Threads::start(config, broker, workers.collect(), self.wakes)?;
        for (listener, address) in config.listeners.iter().zip(&threads.addresses) {
            say(listener, address, broker.security.current().rules.is_open());
        }
        Ok(threads)
    }
}

/// Says what a listener is open for.
fn say(listener: &Listener, address: &SocketAddr, open: bool) {
    let (tls, sasl) = (listener.security.tls(), listener.security.sasl());
    let encrypted = if tls { "TLS" } else { "not encrypted" };
    let who = match (sasl, listener.proves()) {
        (true, _) => "clients log in by SASL",
        (false, true) => "clients have certificates",
        (false, false) => "clients prove nothing",
    };
    tracing::info!("Kafka clients: listening on {address}: {encrypted}, {who}");
    if listener.is_local() {
        return;
    }
    if !listener.proves() {
        let may = match open {
            true => "may read, write and delete everything",
            false => "may do what the rules allow to everyone",
        };
        tracing::warn!("Kafka clients prove nothing at {address}: whoever reaches it {may}");
    } else if open {
        tracing::warn!(
            "Kafka clients at {address}: there are no [[kafka.acl]] and no super_users, so whoever logs in may read, write and delete everything"
        );
    }
    if !tls {
        tracing::warn!(
            "Kafka clients at {address}: what they send and fetch can be read and changed on its way"
        );
    }
}

/// The shards' logs, for reading.
pub(super) struct Logs {
    pub shared: Vec<Arc<WalShared>>,
    pub stores: Vec<Arc<Store>>,
}

impl Logs {
    /// A reader of each.
    fn readers(&self) -> impl Iterator<Item = LogReader> + '_ {
        let shards = self.shared.iter().zip(&self.stores);
        shards.map(|(shared, files)| LogReader::with_store(Arc::clone(shared), Arc::clone(files)))
    }
}

/// What the threads share; loads the committed offsets.
pub(super) fn broker(
    kafka: &Kafka,
    config: &Config,
    topics: &Arc<topics::Topics>,
    logs: &Logs,
    store_id: u128,
    wiring: &Wiring,
    memory: &Budget,
) -> Result<Arc<Broker>, Error> {
    if wiring.max_batch < CLIENT_BATCH {
        tracing::warn!(
            "Kafka clients: record batches of more than {} bytes are refused, and clients send up to {CLIENT_BATCH} unless told otherwise: raise [storage] commit_size",
            wiring.max_batch
        );
    }
    let topics = Arc::new(LiveTopics::new(Arc::clone(topics), wiring.max_batch));
    if topics.snapshot().find(OFFSETS_TOPIC).is_none() {
        let set = [("cleanup.policy".to_owned(), "compact".to_owned())];
        topics.create(OFFSETS_TOPIC, OFFSETS_PARTITIONS, &set, false)?;
    }
    let started = Instant::now();
    let groups = groups::Config::within(memory.account(Part::Groups).limit());
    let mut coordinator = Coordinator::new(groups, rand::rng().random());
    let mut readers: Vec<LogReader> = logs.readers().collect();
    let mut records = 0;
    for place in topics
        .snapshot()
        .find(OFFSETS_TOPIC)
        .map_or(&[][..], |topic| &topic.places)
    {
        if let Some(reader) = readers.get_mut(usize::from(place.shard)) {
            records += hub::load(&mut coordinator, reader, *place)?;
        }
    }
    let unix_ms = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |t| t.as_millis() as i64);
    coordinator.loaded(groups::Now {
        mono_ms: started.elapsed().as_millis() as u64,
        unix_ms,
    });
    let stats = coordinator.stats();
    tracing::info!(
        "Kafka groups: {} groups with {} committed offsets, from {records} records",
        stats.groups,
        stats.offsets
    );
    Ok(Arc::new(Broker {
        topics,
        producer_ids: ProducerIds::open(&config.storage.path)?,
        cluster_id: format!("{store_id:032x}"),
        listeners: kafka
            .listeners
            .iter()
            .map(|listener| worker::Listener {
                advertised: listener.advertised.as_ref().map(|a| Endpoint {
                    host: a.host.clone(),
                    port: a.port,
                }),
                proof: Proof {
                    sasl: listener.security.sasl(),
                    plain: listener.security.tls() || listener.is_local(),
                },
            })
            .collect(),
        security: Security::new(security(kafka)),
        auto_create: kafka.auto_create_topics,
        default_partitions: kafka.default_partitions,
        limits: Limits {
            request: kafka.max_request as usize,
            ..Limits::default()
        },
        hub: Hub::new(coordinator, wiring.wakes()),
        started,
        counters: Counters::default(),
        memory: memory.clone(),
        threads: usize::from(kafka.threads),
    }))
}

/// What a configuration says of clients.
fn security(kafka: &Kafka) -> Loaded {
    let users = kafka.users.iter();
    Loaded {
        users: Users::new(users.map(|user| (user.name.clone(), user.verifiers.clone()))),
        rules: Arc::new(Rules::new(&kafka.super_users, &kafka.acls)),
        quotas: Quotas::new(kafka.quotas.clone()),
    }
}

/// TLS of each listener, the same for all threads.
type TlsOfListeners = Arc<RwLock<Vec<Option<Arc<ServerConfig>>>>>;

/// Reads the listeners' files.
fn load_tls(listeners: &[Listener]) -> Result<Vec<Option<Arc<ServerConfig>>>, String> {
    let tls = listeners.iter().map(|listener| listener.tls.as_ref());
    tls.map(|files| files.map(tls::load).transpose()).collect()
}

/// Running threads.
pub(super) struct Threads {
    tls: TlsOfListeners,
    listeners: Vec<Listener>,
    stop: Arc<AtomicBool>,
    wakes: Vec<Arc<Wake>>,
    handles: Vec<std::thread::JoinHandle<Worker>>,
    /// Where they listen.
    addresses: Vec<SocketAddr>,
}

impl Threads {
    /// Starts a thread for each of `workers`, whose sleep `wakes` end.
    fn start(
        config: &Kafka,
        broker: &Arc<Broker>,
        workers: Vec<Vec<ShardLink>>,
        wakes: Vec<Arc<Wake>>,
    ) -> Result<Self, Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let tls = Arc::new(RwLock::new(load_tls(&config.listeners)?));
        let mut threads = Self {
            tls: Arc::clone(&tls),
            listeners: config.listeners.clone(),
            stop: Arc::clone(&stop),
            wakes: wakes.clone(),
            handles: Vec::new(),
            addresses: config.listeners.iter().map(|l| l.address).collect(),
        };
        for (index, (links, wake)) in workers.into_iter().zip(wakes).enumerate() {
            let mut listeners = Vec::new();
            for address in &mut threads.addresses {
                let listener = listen(*address)
                    .map_err(|e| format!("kafka: cannot listen on {address}: {e}"))?;
                // Port 0 is the kernel's to choose once, for all threads.
                *address = listener.local_addr()?;
                listeners.push(listener);
            }
            let broker = Arc::clone(broker);
            let tls = Arc::clone(&tls);
            let thread = Thread::new(config, broker, index, links, wake, listeners, tls)?;
            let stop = Arc::clone(&stop);
            let handle = std::thread::Builder::new()
                .name(format!("kafka-{index}"))
                .spawn(move || thread.run(&stop))?;
            threads.handles.push(handle);
        }
        Ok(threads)
    }

    /// Takes users, rules, quotas and certificates from another configuration: all of it, or, with an error, nothing.
    /// They hold for new connections, and rules and quotas for the next request of every connection.
    pub(super) fn reload(&self, kafka: &Kafka, broker: &Broker) -> Result<(), Error> {
        let fixed = |l: &Listener| (l.address, l.advertised.clone(), l.security);
        let (before, after) = (
            self.listeners.iter().map(fixed),
            kafka.listeners.iter().map(fixed),
        );
        if !before.eq(after) {
            return Err(
                "listeners, their `advertised` and `security` change by a restart only".into(),
            );
        }
        let tls = load_tls(&kafka.listeners)?;
        let security = security(kafka);
        let open = security.rules.is_open();
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = tls;
        broker.security.replace(security);
        for (listener, address) in kafka.listeners.iter().zip(&self.addresses) {
            say(listener, address, open);
        }
        Ok(())
    }

    /// Stops them: no new requests; returns once shards have answered. What is returned is to be dropped when
    /// the shards have closed.
    pub(super) fn stop(self) -> Vec<Worker> {
        self.stop.store(true, Relaxed);
        for wake in &self.wakes {
            wake.wake();
        }
        let joined = self.handles.into_iter().map(|handle| handle.join());
        joined
            .filter_map(|result| match result {
                Ok(worker) => Some(worker),
                Err(_) => {
                    tracing::error!("a thread of Kafka's protocol panicked");
                    None
                }
            })
            .collect()
    }
}

/// Bytes of a connection.
fn cost(tls: bool) -> u64 {
    match tls {
        true => memory::TLS_CONNECTION,
        false => memory::CONNECTION,
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into()))
}

/// Appends what a socket has, `rest` bytes at most, to part of a request that lacks so many.
fn read_more(stream: &TcpStream, input: &mut Vec<u8>, rest: usize) -> io::Result<usize> {
    input.reserve_exact(rest);
    let len = SockRef::from(stream).recv(&mut input.spare_capacity_mut()[..rest])?;
    // SAFETY: recv has written that many bytes of the spare capacity.
    unsafe { input.set_len(input.len() + len) };
    Ok(len)
}

struct Conn {
    stream: Transport,
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

struct Thread {
    poll: Poll,
    wake: Arc<Wake>,
    listeners: Vec<TcpListener>,
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
    scratch: Vec<u8>,
    max_connections: u64,
    idle: Duration,
    authentication_delay_ms: u64,
    next_sweep: Instant,
    accepting: bool,
}

/// What is to become of a connection.
enum Fate {
    Stays,
    Goes,
}

impl Thread {
    fn new(
        config: &Kafka,
        broker: Arc<Broker>,
        index: usize,
        links: Vec<ShardLink>,
        wake: Arc<Wake>,
        mut listeners: Vec<TcpListener>,
        tls: TlsOfListeners,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        let registry = poll.registry();
        registry.register(&mut SourceFd(&wake.descriptor()), WAKE, Interest::READABLE)?;
        for (index, listener) in listeners.iter_mut().enumerate() {
            registry.register(listener, Token(LISTENERS + index), Interest::READABLE)?;
        }
        let costs = tls
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .map(|tls| cost(tls.is_some()))
            .collect();
        let now = Instant::now();
        Ok(Self {
            poll,
            wake,
            listeners,
            worker: Worker::new(Arc::clone(&broker), index, links),
            conns: Vec::new(),
            generations: Vec::new(),
            free: Vec::new(),
            blocked: HashSet::new(),
            timers: BTreeSet::new(),
            intake: Intake::new(&broker.memory.account(Part::Requests).share(broker.threads)),
            full: false,
            costs,
            scratch: vec![0; READ],
            tls,
            broker,
            max_connections: u64::from(config.max_connections),
            idle: config.idle_timeout,
            authentication_delay_ms: config.failed_authentication_delay.as_millis() as u64,
            next_sweep: now + SWEEP,
            accepting: true,
        })
    }

    fn now(&self) -> Now {
        self.broker.now()
    }

    fn run(mut self, stop: &AtomicBool) -> Worker {
        let mut events = Events::with_capacity(EVENTS);
        let mut stopping: Option<Instant> = None;
        loop {
            if stop.load(Relaxed) && stopping.is_none() {
                stopping = Some(Instant::now() + STOP_PATIENCE);
                self.accepting = false;
                self.listeners.clear();
            }
            if let Some(until) = stopping
                && (self.worker.on_their_way() == 0 || Instant::now() > until)
            {
                // What is answered goes out as far as the sockets take it.
                for at in 0..self.conns.len() {
                    self.pump(at);
                }
                return self.worker;
            }
            self.wake.arm();
            let timeout = if self.worker.has_news() {
                Duration::ZERO
            } else {
                self.patience(stopping.is_some())
            };
            let polled = self.poll.poll(&mut events, Some(timeout));
            self.wake.disarm();
            if let Err(error) = polled
                && error.kind() != io::ErrorKind::Interrupted
            {
                tracing::error!("kafka: waiting for sockets failed: {error}");
                std::thread::sleep(Duration::from_millis(10));
            }
            for event in &events {
                match event.token() {
                    WAKE => {}
                    Token(token) if token >= LISTENERS => self.accept(token - LISTENERS),
                    Token(at) => {
                        if let Some(Some(conn)) = self.conns.get_mut(at) {
                            conn.readable |= event.is_readable() || event.is_read_closed();
                            conn.writable |= event.is_writable() || event.is_error();
                            self.pump(at);
                        }
                    }
                }
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

    fn patience(&self, stopping: bool) -> Duration {
        let mut patience = SWEEP;
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

    fn accept(&mut self, listener: usize) {
        loop {
            let Some(socket) = self.listeners.get(listener) else {
                return;
            };
            match socket.accept() {
                Ok((stream, peer)) => {
                    if let Err(error) = self.admit(stream, peer, listener) {
                        tracing::debug!("kafka: a connection was not taken: {error}");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Such as no more descriptors: the listener stays readable, so it is asked again.
                    tracing::warn!("kafka: a connection could not be accepted: {error}");
                    self.broker.counters.refused.fetch_add(1, Relaxed);
                    std::thread::sleep(Duration::from_millis(1));
                    return;
                }
            }
        }
    }

    fn admit(
        &mut self,
        mut stream: TcpStream,
        peer: SocketAddr,
        listener: usize,
    ) -> io::Result<()> {
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
        let prepared = stream.set_nodelay(true).and_then(|()| -> io::Result<_> {
            SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))?;
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll
                .registry()
                .register(&mut stream, Token(at), interest)?;
            let local = stream.local_addr()?;
            let all = self.tls.read().unwrap_or_else(PoisonError::into_inner);
            let tls = all.get(listener).and_then(Option::as_ref);
            Ok((local, Transport::new(stream, tls)?))
        });
        let (local, stream) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.free.push(at);
                self.broker.counters.open.fetch_sub(1, Relaxed);
                return Err(error);
            }
        };
        let id = u64::from(self.generations[at]) << 32 | at as u64;
        let sasl = self.broker.listeners[listener].proof.sasl;
        self.conns[at] = Some(Conn {
            // Who logs in by SASL is known by that.
            named: sasl || matches!(stream, Transport::Plain(_)),
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
                        self.worker.sent(bytes);
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
        conn.stream.close();
        if let Some(until) = conn.timer {
            self.timers.remove(&(until, at));
        }
        self.intake.give(std::mem::take(&mut conn.input));
        self.intake.renew(&mut conn.hold, &conn.input);
        let mut bytes = conn.out.unsent();
        while let Some(answer) = conn.state.session().next_answer() {
            bytes += answer.iter().map(|piece| piece.len()).sum::<usize>();
        }
        self.worker.sent(bytes);
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
            if self.flush(conn).is_err() {
                return Fate::Goes;
            }
            if conn.closing {
                return match conn.out.is_empty() && !conn.stream.unsent() {
                    true => Fate::Goes,
                    false => Fate::Stays,
                };
            }
            let muted = conn.state.muted_until_ns() > self.now().mono_ns;
            let held = conn.blocked || muted || conn.out.unsent() > MAX_CONNECTION_UNSENT;
            if !conn.readable || held || !self.accepting {
                return Fate::Stays;
            }
            let need = conn.need.max(LENGTH_LEN);
            if !self.intake.admits(&mut conn.hold, &mut conn.input, need) {
                return Fate::Stays;
            }
            // The rest of a large request goes where the request is, without a copy between.
            let rest = conn.need.saturating_sub(conn.input.len());
            let plain = matches!(conn.stream, Transport::Plain(_));
            let direct = plain && !conn.input.is_empty() && rest >= DIRECT;
            let read = match &conn.stream {
                Transport::Plain(stream) if direct => read_more(stream, &mut conn.input, rest),
                _ => conn.stream.read(&mut self.scratch),
            };
            match read {
                Ok(0) => return Fate::Goes,
                Ok(len) => {
                    conn.last = Instant::now();
                    if !conn.named {
                        conn.named = true;
                        if let Some(name) = conn.stream.principal() {
                            conn.state.set_principal(&name);
                        }
                    }
                    if direct {
                        if len < rest {
                            continue;
                        }
                        let input = std::mem::take(&mut conn.input);
                        conn.input = self.begin(conn, input);
                    } else if conn.input.is_empty() {
                        let scratch = std::mem::take(&mut self.scratch);
                        let consumed = self.consume(conn, &scratch[..len]);
                        conn.input.extend_from_slice(&scratch[consumed..len]);
                        self.scratch = scratch;
                    } else {
                        if conn.input.capacity() < conn.need {
                            let more = conn.need - conn.input.len();
                            conn.input.reserve_exact(more.max(len));
                        }
                        conn.input.extend_from_slice(&self.scratch[..len]);
                        if conn.input.len() < conn.need {
                            continue;
                        }
                        let input = std::mem::take(&mut conn.input);
                        conn.input = self.begin(conn, input);
                    }
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
    fn begin(&mut self, conn: &mut Conn, mut input: Vec<u8>) -> Vec<u8> {
        let consumed = self.consume(conn, &input);
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

    fn consume(&mut self, conn: &mut Conn, input: &[u8]) -> usize {
        let now = self.now();
        let mut consumed = 0;
        loop {
            match self
                .worker
                .received(&mut conn.state, &input[consumed..], now)
            {
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
                    return input.len();
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
                conn.writable = conn.stream.flush()?;
                break;
            }
            match conn.out.write(&mut conn.stream) {
                Ok(len) => {
                    conn.last = Instant::now();
                    self.worker.sent(len);
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
        if now < self.next_sweep {
            return;
        }
        self.next_sweep = now + SWEEP;
        let starved = self.intake.take_starved() | self.worker.is_full();
        for at in 0..self.conns.len() {
            let Some(Some(conn)) = self.conns.get_mut(at) else {
                continue;
            };
            conn.out.let_go(now);
            let waits = conn.state.session().waiting() > 0 || conn.timer.is_some();
            let unproved = !conn.state.is_proved() || conn.stream.handshaking();
            if unproved && now.duration_since(conn.started) > PROOF_PATIENCE {
                self.broker.counters.late.fetch_add(1, Relaxed);
                if let Some(conn) = self.conns[at].take() {
                    self.drop_connection(at, conn);
                }
            } else if !waits && now.duration_since(conn.last) > self.idle {
                self.broker.counters.idle.fetch_add(1, Relaxed);
                if let Some(conn) = self.conns[at].take() {
                    self.drop_connection(at, conn);
                }
            } else if starved
                && (conn.out.unsent() > 0 || conn.hold.is_reserved() && !conn.blocked)
                && now.duration_since(conn.last) > STALL
            {
                tracing::info!(
                    "kafka: closed the connection of {}: it stands still and holds memory that others wait for",
                    conn.peer
                );
                self.broker.counters.stalled.fetch_add(1, Relaxed);
                if let Some(conn) = self.conns[at].take() {
                    self.drop_connection(at, conn);
                }
            } else if conn.readable || conn.blocked {
                self.pump(at);
            }
        }
    }
}
