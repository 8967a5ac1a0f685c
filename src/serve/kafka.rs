//! Kafka's protocol over the kernel's TCP: threads, each with its listeners, connections and part of the broker.
//!
//! Every thread listens on every address (SO_REUSEPORT: the kernel spreads connections) and serves its connections alone
//! (module [`connections`](super::connections)); here is what they are given and how they start and stop.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use socket2::{Domain, Protocol, Socket, Type};

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
use crate::broker::session::Limits;
use crate::broker::settings::{self, Running};
use crate::broker::topics::{OFFSETS_TOPIC, Topics};
use crate::broker::worker::{self, Broker, ShardLink, Worker};
use crate::config::Config;
use crate::config::kafka::{Kafka, Listener, Transport};
use crate::fallback::{Kind, Sockets};
use crate::memory::budget::{Budget, Part};
use crate::memory::spsc::{Consumer, Producer};
use crate::memory::wake::Wake;
use crate::shard::link::{BatchLink, link};
use crate::shard::{Ack, Inbound, ShardStats};
use crate::storage::lsm::Store;
use crate::storage::{LogReader, WalShared, WalWriter};

use super::Error;
use super::connections::{Thread, TlsOfListeners};
use super::live::LiveTopics;
use super::{tls, topics};

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 1024;
/// What the setting "auto" means: see docs/performance.md.
const AUTO: Kind = Kind::Epoll;
/// Bytes of a record batch that clients make by default, at most (librdkafka's `message.max.bytes`).
const CLIENT_BATCH: usize = 1_000_000;
/// Of a thread's share of memory for requests, one part in so many is for what sockets receive ahead of it: as much as
/// its other parts leave.
const AHEAD_PART: u64 = 32;
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
    // The configuration allows a day at most, which 32 bits hold in milliseconds.
    let ms = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
    let groups = groups::Config {
        initial_rebalance_delay_ms: ms(kafka.group_initial_rebalance_delay),
        min_session_timeout_ms: ms(kafka.group_min_session_timeout),
        max_session_timeout_ms: ms(kafka.group_max_session_timeout),
        ..groups::Config::within(memory.account(Part::Groups).limit())
    };
    let offsets = topics.snapshot();
    let running = Running {
        max_batch: wiring.max_batch,
        offsets_partitions: offsets.find(OFFSETS_TOPIC).map_or(0, |t| t.places.len()),
        groups: &groups,
    };
    let settings = settings::of(config, kafka, &running);
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
        settings,
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
        let mut kind = match config.transport {
            Transport::Epoll => Kind::Epoll,
            Transport::Auto => AUTO,
            Transport::IoUring => Kind::IoUring,
        };
        let requests = broker.memory.account(Part::Requests).share(broker.threads);
        let ahead = (requests.bytes() / AHEAD_PART) as usize;
        for (index, (links, wake)) in workers.into_iter().zip(wakes).enumerate() {
            let mut sockets = sockets(&mut kind, &wake, ahead)?;
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
            sockets.listen(listeners)?;
            let thread = Thread::new(config, broker, index, links, wake, sockets, tls);
            let stop = Arc::clone(&stop);
            let handle = std::thread::Builder::new()
                .name(format!("kafka-{index}"))
                .spawn(move || thread.run(&stop))?;
            threads.handles.push(handle);
        }
        tracing::info!("Kafka clients: served by {}", kind.name());
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

/// The sockets of a thread that `wake` wakes. Where io_uring was left to the machine, or is asked for and not to be had,
/// `kind` becomes what there is, for the threads that follow, too.
fn sockets(kind: &mut Kind, wake: &Wake, memory: usize) -> io::Result<Sockets> {
    if *kind == Kind::IoUring {
        match Sockets::new(*kind, wake.descriptor(), memory) {
            Ok(sockets) => return Ok(sockets),
            Err(error) => {
                tracing::warn!(
                    "Kafka clients are served by epoll: io_uring cannot be used ({error}); it takes Linux 6.1"
                );
                *kind = Kind::Epoll;
            }
        }
    }
    Sockets::new(*kind, wake.descriptor(), memory)
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
    Ok(socket.into())
}
