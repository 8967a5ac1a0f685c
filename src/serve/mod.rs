//! `taffrail serve`: puts the parts together, runs them, and takes them down in order.
//!
//! Start: check the machine, open the store (recovery), start DPDK and the ports, connect rx lcores
//! and shards by rings, launch the lcores, open the control socket. Stop: rx lcores stop receiving,
//! shards drain their rings and close their logs, rx lcores send the last acknowledgements, ports
//! stop. Invariant: no shard closes before every rx lcore has stopped pushing to it.

pub mod backoff;
mod lcores;
mod ports;
pub mod preflight;
mod stats;
mod store;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::config::{Config, Split};
use crate::control::server::ControlServer;
use crate::eal::lcore;
use crate::memory::spsc;
use crate::net::rx::{Choice, Place, Route, Routes, RxWorker, ShardLink, TopicRx};
use crate::net::{ServedTopic, TopicTable};
use crate::shard::{Ack, Inbound, Shard};
use crate::storage::WalState;
use crate::topology::{Machine, plan};
use lcores::{LcoreWork, Phase};
use store::OpenStore;

/// Slots of a ring from an rx lcore to a shard: at 10 M messages/s it rides out 0.8 ms of a shard
/// that does something else; 256 KiB, and as many mbufs.
const INBOUND_SLOTS: usize = 8192;
/// Slots of a ring of acknowledgements: as many as a full ring of single-batch datagrams brings in a
/// round of the rx lcore; 416 KiB.
const ACK_SLOTS: usize = 4096;
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

/// Runs the server until SIGTERM or SIGINT.
pub fn serve(config: &Config) -> Result<Summary, Error> {
    let signals = Signals::register()?;
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

    let mut store = store::open(config)?;
    let (environment, started) = ports::start(config, &plan)?;

    // Rings: from every rx lcore to every shard and back.
    let rx_lcores: Vec<usize> = (0..plan.lcores.len())
        .filter(|&i| !plan.lcores[i].queues.is_empty())
        .collect();
    let mut links: Vec<Vec<ShardLink>> = rx_lcores.iter().map(|_| Vec::new()).collect();
    let mut shards = Vec::with_capacity(store.shards.len());
    for open in store.shards.drain(..) {
        let (mut inputs, mut outlets) = (Vec::new(), Vec::new());
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
            });
        }
        let release = crate::net::rx::MbufRelease;
        shards.push(Some(Shard::new(
            open.config,
            open.recovered,
            open.wal,
            inputs,
            outlets,
            release,
        )));
    }
    let shard_views = shards
        .iter()
        .flatten()
        .zip(&store.shared)
        .map(|(shard, wal)| stats::ShardView {
            wal: Arc::clone(wal),
            stats: shard.stats(),
            partitions: shard.partition_stats(),
        })
        .collect();

    let routes = Arc::new(routes(config, &store)?);
    let mut topic_counters = Vec::new();
    let mut rx_workers = Vec::new();
    for ((index, link), ports) in links.into_iter().enumerate().zip(started.rx_ports) {
        let counters: Arc<Vec<TopicRx>> =
            Arc::new(config.topics.iter().map(|_| TopicRx::default()).collect());
        topic_counters.push(Arc::clone(&counters));
        rx_workers.push(Some(RxWorker::new(
            index as u8,
            ports,
            link,
            Arc::clone(&routes),
            counters,
        )));
    }

    // Launch.
    let phase = Arc::new(Phase::new(rx_lcores.len(), shards.len()));
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
        let work = LcoreWork::new(rx, own, config.lcores.idle);
        let id = index as u32 + 1;
        loops.push((id, planned.cpu, work.role(), work.counters()));
        let phase = Arc::clone(&phase);
        handles.push(lcore::launch(&environment, id, move || work.run(&phase))?);
    }

    let sources = Arc::new(stats::Sources {
        started: Instant::now(),
        ports: started.ports,
        topics: stats::topics(config, &store),
        topic_counters,
        shards: shard_views,
        loops,
    });
    let control = ControlServer::start(&config.control_socket, stats::answers(&sources, &store))
        .map_err(|e| format!("control socket {}: {e}", config.control_socket.display()))?;
    tracing::info!(
        "taking messages: {} ports, {} topics, {} shards; control socket {}",
        config.ports.len(),
        config.topics.len(),
        config.storage.shards,
        config.control_socket.display()
    );

    let mut watch = Watch::new(&sources, &routes);
    while !signals.stop() && handles.iter().all(|handle| !handle.is_finished()) {
        std::thread::sleep(WATCH_INTERVAL.min(signals.patience()));
        watch.look(&store);
    }
    tracing::info!("stopping: storing what has been received");
    store.maintainers.clear();
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

/// What rx lcores know of the topics.
fn routes(config: &Config, store: &OpenStore) -> Result<Routes, Error> {
    let raw = config
        .udp
        .iter()
        .map(|source| {
            let places = &store.places[source.topic];
            let (choice, places) = match source.partition {
                crate::config::Partitioning::Source => (Choice::Source, places.clone()),
                crate::config::Partitioning::Spread => (Choice::Spread, places.clone()),
                crate::config::Partitioning::Fixed(p) => (Choice::Source, vec![places[p as usize]]),
            };
            Route {
                topic: source.topic as u16,
                choice,
                priority: config.topics[source.topic].priority,
                places,
            }
        })
        .collect();
    let mut by_id: Vec<(u16, Vec<Place>)> = Vec::new();
    let mut served = Vec::new();
    for (index, topic) in config.topics.iter().enumerate() {
        let entry = store
            .catalog
            .topic(&topic.name)
            .ok_or_else(|| format!("topic {} is missing in the catalog", topic.name))?;
        let id = entry.id as usize;
        if by_id.len() <= id {
            by_id.resize(id + 1, (0, Vec::new()));
        }
        by_id[id] = (index as u16, store.places[index].clone());
        served.push(ServedTopic {
            name: topic.name.clone(),
            id: entry.id,
            partitions: topic.partitions,
        });
    }
    let acks = config.datagram.as_ref().map_or(-1, |d| d.acks);
    // A client knows nothing of the port that it reaches: the smallest MTU, less IPv6 and UDP headers.
    let mtu = config.ports.iter().map(|p| p.mtu).min().unwrap_or(1500);
    let table = TopicTable::new(served, acks, crate::shard::FULL_CREDIT, u32::from(mtu) - 48);
    Ok(Routes {
        raw,
        table,
        by_id,
        topic_of: store.topic_of.clone(),
    })
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

/// SIGTERM and SIGINT.
struct Signals {
    stop: Arc<std::sync::atomic::AtomicBool>,
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
        Ok(Self { stop })
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
    states: Vec<WalState>,
    losses: stats::Losses,
    next: Instant,
}

impl Watch {
    fn new(sources: &Arc<stats::Sources>, routes: &Arc<Routes>) -> Self {
        Self {
            states: vec![WalState::Running; sources.shards.len()],
            losses: stats::Losses::new(sources, routes),
            next: Instant::now(),
        }
    }

    fn look(&mut self, store: &OpenStore) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + WATCH_INTERVAL;
        for (shard, (shared, before)) in store.shared.iter().zip(&mut self.states).enumerate() {
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
        self.losses.report(&store.gaps);
    }
}
