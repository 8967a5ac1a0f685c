//! `taffrail serve`: puts the parts together, runs them, and takes them down in order.
//!
//! Start: check the machine, open the store (recovery), start DPDK and the ports, connect rx lcores
//! and shards by rings, launch the lcores, open the control socket. Stop: rx lcores stop receiving,
//! shards drain their rings and close their logs, rx lcores send the last acknowledgements, ports
//! stop. Invariant: no shard closes before every rx lcore has stopped pushing to it.

mod answers;
pub mod backoff;
mod connections;
mod intake;
mod kafka;
mod kernel_udp;
mod lcores;
mod live;
mod memory;
mod news;
mod ports;
pub mod preflight;
mod release;
mod stats;
mod store;
pub mod tls;
mod topics;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;

use crate::config::{Config, Split};
use crate::control::server::ControlServer;
use crate::eal::lcore;
use crate::memory::budget::Part;
use crate::memory::spsc;
use crate::memory::wake::Wake;
use crate::net::lanes::ShardLink;
use crate::net::routes::Choice;
use crate::net::rx::RxWorker;
use crate::shard::{ACK_SLOTS, Ack, GapReport, INBOUND_SLOTS, Inbound, Shard};
use crate::storage::{WalShared, WalState};
use crate::topology::{Machine, Plan, plan};
use lcores::{LcoreWork, Phase};
use release::BufferRelease;
use topics::{RawSource, RouteBase, Topics};

/// How often the main thread looks at the shards' states and the NICs' losses.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

type Error = Box<dyn std::error::Error + Send + Sync>;

/// What the server stored in its life, for the last line of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Messages stored.
    pub stored: u64,
    /// Messages received.
    pub received: u64,
}

/// Runs the server until SIGTERM or SIGINT. SIGHUP has it read users, rules, quotas and certificates from `file`, the
/// configuration's, again.
pub fn serve(config: &Config, file: &Path) -> Result<Summary, Error> {
    let signals = Signals::register()?;
    crate::memory::allocator::keep_freed();
    preflight::raise_files();
    let mut fatal = Vec::new();
    for finding in preflight::check(config, &preflight::Facts::gather(config)) {
        if finding.fatal {
            fatal.push(finding.text);
        } else {
            tracing::warn!("{}", finding.text);
        }
    }
    if !fatal.is_empty() {
        return Err(format!("this machine is not ready:\n  {}", fatal.join("\n  ")).into());
    }
    let plan = plan(config, &Machine::discover()?)?;
    for note in &plan.notes {
        tracing::info!("{note}");
    }

    let mempools = packet_memory(config, &plan);
    let mut store = store::open(config, mempools)?;
    let (environment, mut started) = ports::start(config, &plan)?;
    let mut kernel = kernel_udp::open(config)?;

    // Rings: from every receiver, rx lcores and the thread of kernel UDP, to every shard and back.
    let rx_lcores: Vec<usize> = (0..plan.lcores.len())
        .filter(|&i| !plan.lcores[i].queues.is_empty())
        .collect();
    let receivers = rx_lcores.len() + usize::from(kernel.is_some());
    let mut links: Vec<Vec<ShardLink>> = (0..receivers).map(|_| Vec::new()).collect();
    let mut shards = Vec::with_capacity(store.shards.len());
    let mut bell_of_shard = Vec::with_capacity(store.shards.len());
    // Threads of Kafka's protocol have their rings behind those of the receivers.
    let mut kafka = kafka::Wiring::new(config.kafka.as_ref())?;
    // Whoever waits for messages at the control socket.
    let news = news::News::new()?;
    // A loop that receives packets polls; one that does not is woken.
    let bells = bells(&plan)?;
    for (shard, mut open) in store.shards.drain(..).enumerate() {
        let (mut inputs, mut outlets) = (Vec::new(), Vec::new());
        let lcore = plan
            .lcores
            .iter()
            .position(|lcore| lcore.shards.iter().any(|&s| usize::from(s) == shard));
        let bell = lcore.and_then(|lcore| bells[lcore].as_ref());
        bell_of_shard.push(bell.cloned());
        for link in &mut links {
            let (out, input) = spsc::ring::<Inbound>(INBOUND_SLOTS);
            let (outlet, acks) = spsc::ring::<Ack>(ACK_SLOTS);
            inputs.push(input);
            outlets.push(outlet);
            link.push(ShardLink {
                out,
                acks,
                gaps: Arc::clone(&open.config.gaps),
                partitions: open.config.partitions.len(),
                bell: bell.cloned(),
            });
        }
        open.config.wakes = kafka.wakes();
        open.config.wakes.push(news.wake());
        open.config
            .wakes
            .extend(kernel.as_ref().map(kernel_udp::Wiring::wake));
        kafka.connect(links.len(), &open.wal, bell, &mut inputs, &mut outlets);
        let buffers = kernel.as_mut().and_then(|kernel| kernel.buffers_of(shard));
        let release = BufferRelease::new(buffers);
        shards.push(Some(Shard::new(
            open.config,
            open.recovered,
            open.wal,
            inputs,
            outlets,
            release,
        )));
    }
    let controls = shards.iter().flatten().zip(bell_of_shard);
    let controls = controls.map(|(shard, bell)| shard.control(bell)).collect();
    let partitions: Vec<_> = shards
        .iter()
        .flatten()
        .map(Shard::partition_stats)
        .collect();
    let shard_stats: Vec<_> = shards.iter().flatten().map(Shard::stats).collect();
    let memory = memory::Gauges::new(
        &store.memory,
        config,
        mempools,
        store.stores.clone(),
        shard_stats.clone(),
    );
    let store_id = store.catalog.store_id();
    let topics = Topics::new(
        store.catalog,
        controls,
        &partitions,
        receivers,
        route_base(config),
        store.stores.clone(),
        store.memory.account(Part::Partitions),
    );
    let maintainers = store::maintain(config, &store.stores, &store.shared, &topics)?;
    let shard_views = shards
        .iter()
        .flatten()
        .zip(store.shared.iter().zip(&store.stores))
        .map(|(shard, (wal, files))| stats::ShardView {
            wal: Arc::clone(wal),
            stats: shard.stats(),
            store: Arc::clone(files),
        })
        .collect();

    let phase = Arc::new(Phase::new(receivers, shards.len()));
    let kernel = match kernel {
        Some(mut kernel) => {
            started.ports.append(&mut kernel.views);
            let links = links.pop().unwrap_or_default();
            let (index, phase) = (rx_lcores.len() as u8, Arc::clone(&phase));
            Some(kernel.work(index, links, topics.routes(), phase)?)
        }
        None => None,
    };
    started.ports.sort_by_key(|(place, _)| *place);

    let mut rx_workers = Vec::new();
    for ((index, link), ports) in links.into_iter().enumerate().zip(started.rx_ports) {
        rx_workers.push(Some(RxWorker::new(
            index as u8,
            ports,
            link,
            topics.routes(),
        )));
    }

    // Launch.
    let mut handles = Vec::new();
    let mut loops = Vec::new();
    for (index, planned) in plan.lcores.iter().enumerate() {
        let rx = rx_lcores
            .iter()
            .position(|&i| i == index)
            .and_then(|place| rx_workers[place].take());
        let own: Vec<_> = planned
            .shards
            .iter()
            .filter_map(|&s| shards[usize::from(s)].take().map(|shard| (s, shard)))
            .collect();
        let work = LcoreWork::new(rx, own, config.lcores.idle, bells[index].clone());
        let id = index as u32 + 1;
        loops.push((id, planned.cpu, work.role(), work.counters()));
        let phase = Arc::clone(&phase);
        let work = move || work.run(&phase);
        handles.push(match &environment {
            Some(environment) => lcore::launch(environment, id, work)?,
            None => {
                // Whoever names CPUs has set them aside; else the threads share them with the others.
                let named = !config.lcores.rx.is_empty() || !config.lcores.storage.is_empty();
                lcore::launch_thread(format!("lcore-{id}"), named.then_some(planned.cpu), work)?
            }
        });
    }

    if let Some(work) = kernel {
        let work = move || {
            work();
            Vec::new()
        };
        handles.push(lcore::launch_thread("kernel-udp".to_owned(), None, work)?);
    }

    let sources = Arc::new(stats::Sources {
        started: Instant::now(),
        ports: started.ports.into_iter().map(|(_, view)| view).collect(),
        topics: Arc::clone(&topics),
        shards: shard_views,
        loops,
        kafka: std::sync::OnceLock::new(),
        memory,
    });
    let logs = kafka::Logs {
        shared: store.shared.clone(),
        stores: store.stores.clone(),
    };
    // Before the control socket: a server that answers there serves everything.
    let threads = match &config.kafka {
        Some(settings) => {
            let memory = &store.memory;
            let broker = kafka::broker(settings, config, &topics, &logs, store_id, &kafka, memory)?;
            sources.memory.set_broker(&broker);
            let _ = sources.kafka.set(Arc::clone(&broker));
            Some(kafka.start(settings, &broker, shard_stats, &logs)?)
        }
        None => None,
    };
    let folder = &config.storage.path;
    let waits = news.start()?;
    let control = ControlServer::start(
        &config.control_socket,
        answers::answers(&sources, &store.shared, &store.stores, folder, &news),
    )
    .map_err(|e| format!("control socket {}: {e}", config.control_socket.display()))?;
    tracing::info!(
        "taking messages: {} ports, {} topics, {} shards; control socket {}",
        config.ports.len(),
        topics.snapshot().all().len(),
        config.storage.shards,
        config.control_socket.display()
    );

    let mut watch = Watch::new(&sources, store.shared, store.gaps);
    while !signals.stop() && handles.iter().all(|handle| !handle.is_finished()) {
        std::thread::sleep(WATCH_INTERVAL.min(signals.patience()));
        watch.look();
        if signals.reload.swap(false, Ordering::Relaxed) {
            match reload(file, threads.as_ref(), &sources) {
                Ok(()) => tracing::info!(
                    "read users, rules, quotas and certificates again from {}",
                    file.display()
                ),
                Err(error) => tracing::error!("nothing was changed: {error}"),
            }
        }
    }
    tracing::info!("stopping: storing what has been received");
    topics.stop();
    drop(maintainers);
    // Their buffers live until the shards, which may still read them, have closed.
    let workers = threads.map(kafka::Threads::stop);
    if let Some(broker) = sources.kafka.get() {
        broker.hub.close();
    }
    drop(waits);
    phase.stop();
    let mut failure: Option<Error> = None;
    for handle in handles {
        match handle.join() {
            Ok(errors) => failure = errors.into_iter().next().map(Into::into).or(failure),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
                failure = Some(format!("an lcore panicked: {}", text.unwrap_or_default()).into());
            }
        }
    }
    drop(workers);
    let last = sources.snapshot();
    drop(control);
    for imbalance in last.imbalances() {
        tracing::error!("the accounts do not add up: {imbalance}");
    }
    let sum = |field: fn(&crate::control::protocol::TopicStats) -> u64| {
        last.topics.iter().map(field).sum()
    };
    let summary = Summary {
        stored: sum(|t| t.stored),
        received: sum(|t| t.received),
    };
    match failure {
        Some(error) => Err(error),
        None => Ok(summary),
    }
}

/// Reads the configuration again, for what may change while the server runs.
fn reload(
    file: &Path,
    threads: Option<&kafka::Threads>,
    sources: &stats::Sources,
) -> Result<(), Error> {
    let (Some(threads), Some(broker)) = (threads, sources.kafka.get()) else {
        return Err("this server does not serve Kafka's protocol".into());
    };
    let config = Config::load(file)?;
    let kafka = config
        .kafka
        .ok_or("[kafka] is gone from the configuration: that takes a restart")?;
    threads.reload(&kafka, broker)
}

/// Bytes of packet buffers and descriptors of all ports.
pub(crate) fn packet_memory(config: &Config, plan: &Plan) -> u64 {
    ports::memory(config, plan) + kernel_udp::memory(config)
}

/// What wakes each lcore; `None`: it polls queues, which wake nobody.
fn bells(plan: &Plan) -> std::io::Result<Vec<Option<Arc<Wake>>>> {
    let bell = |lcore: &crate::topology::Lcore| {
        let woken = plan.lcores.iter().all(|l| l.queues.is_empty()) && lcore.queues.is_empty();
        woken.then(|| Wake::new().map(Arc::new)).transpose()
    };
    plan.lcores.iter().map(bell).collect()
}

/// What the configuration says of the ways to the topics.
fn route_base(config: &Config) -> RouteBase {
    let raw = config.udp.iter().map(|source| {
        let topic = &config.topics[source.topic];
        let (choice, partition) = match source.partition {
            crate::config::Partitioning::Source => (Choice::Source, None),
            crate::config::Partitioning::Spread => (Choice::Spread, None),
            crate::config::Partitioning::Fixed(partition) => (Choice::Source, Some(partition)),
        };
        RawSource {
            topic: topic.name.clone(),
            choice,
            priority: topic.priority,
            partition,
        }
    });
    // A client knows nothing of the port that it reaches: the smallest MTU, less IPv6 and UDP headers.
    let mtu = config.ports.iter().map(|p| p.mtu).min().unwrap_or(1500);
    RouteBase {
        default_acks: config.datagram.as_ref().map_or(-1, |d| d.acks),
        max_datagram: u32::from(mtu) - 48,
        raw: raw.collect(),
    }
}

/// Listeners of a port.
fn listeners(config: &Config, port: usize) -> Vec<crate::net::Listener> {
    use crate::net::{Listener, Target};
    let raw = config
        .udp
        .iter()
        .enumerate()
        .filter(|(_, source)| source.port.is_none_or(|p| p == port));
    let raw = raw.map(|(index, source)| Listener {
        udp_port: source.udp_port,
        group: source.group,
        target: match source.split {
            Split::Datagram => Target::Raw(index as u16),
            Split::Line => Target::Lines(index as u16),
        },
    });
    let datagram = config.datagram.iter().map(|d| Listener {
        udp_port: d.udp_port,
        group: None,
        target: Target::Datagram,
    });
    raw.chain(datagram).collect()
}

/// SIGTERM and SIGINT; SIGHUP.
struct Signals {
    stop: Arc<std::sync::atomic::AtomicBool>,
    reload: Arc<std::sync::atomic::AtomicBool>,
}

impl Signals {
    fn register() -> Result<Self, Error> {
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
            // A second signal ends the process at once, as an impatient operator expects; what is
            // acknowledged is safe.
            signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stop))?;
            signal_hook::flag::register(signal, Arc::clone(&stop))?;
        }
        let reload = Arc::new(std::sync::atomic::AtomicBool::new(false));
        signal_hook::flag::register(signal_hook::consts::SIGHUP, Arc::clone(&reload))?;
        Ok(Self { stop, reload })
    }

    fn stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// How long the main thread may sleep: a signal ends the sleep by itself.
    fn patience(&self) -> Duration {
        Duration::from_millis(50)
    }
}

/// The main thread's view of what should not go unnoticed.
struct Watch {
    shared: Vec<Arc<WalShared>>,
    gaps: Vec<Arc<ArrayQueue<GapReport>>>,
    states: Vec<WalState>,
    losses: stats::Losses,
    sources: Arc<stats::Sources>,
    next: Instant,
}

impl Watch {
    fn new(
        sources: &Arc<stats::Sources>,
        shared: Vec<Arc<WalShared>>,
        gaps: Vec<Arc<ArrayQueue<GapReport>>>,
    ) -> Self {
        Self {
            shared,
            gaps,
            states: vec![WalState::Running; sources.shards.len()],
            losses: stats::Losses::new(sources),
            sources: Arc::clone(sources),
            next: Instant::now(),
        }
    }

    fn look(&mut self) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + WATCH_INTERVAL;
        for (shard, (shared, before)) in self.shared.iter().zip(&mut self.states).enumerate() {
            let state = shared.state();
            if state != *before {
                *before = state;
                let reason = shared.reason().unwrap_or_default();
                match state {
                    WalState::Running => tracing::info!("shard {shard} takes messages again"),
                    WalState::DiskFull => tracing::error!(
                        "shard {shard} refuses messages, the disk is full: {reason}"
                    ),
                    WalState::Failed => tracing::error!(
                        "shard {shard} has stopped and acknowledges nothing more: {reason}; what is stored can still be read"
                    ),
                    WalState::Closed => {}
                }
            }
        }
        self.losses.report(&self.gaps);
        self.sources.memory.look();
    }
}
