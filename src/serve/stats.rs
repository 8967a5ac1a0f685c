//! Snapshots of everything that is counted, and the answers of the control socket.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crossbeam_queue::ArrayQueue;

use super::backoff::LoopCounters;
use super::ports::{PortView, received_by_kernel};
use super::store::OpenStore;
use crate::config::Config;
use crate::control::protocol::{
    LcoreStats, PartitionInfo, PortStats, Reasons, ShardStats, Stats, TopicInfo, TopicStats,
};
use crate::control::server::Answers;
use crate::net::rx::{Place, Routes, TopicRx};
use crate::net::{DropReason, Handled};
use crate::shard::{GapReport, PartitionStats};
use crate::storage::reader::LogReader;
use crate::storage::{PartitionKey, WalShared, WalState};

/// Everything that has counters.
pub(super) struct Sources {
    pub started: Instant,
    pub ports: Vec<PortView>,
    pub topics: Vec<TopicView>,
    /// By rx lcore, then by topic.
    pub topic_counters: Vec<Arc<Vec<TopicRx>>>,
    pub shards: Vec<ShardView>,
    /// EAL's number, CPU, role and counters of each poll loop.
    pub loops: Vec<(u32, u32, &'static str, Arc<LoopCounters>)>,
}

/// One shard's counters.
pub(super) struct ShardView {
    pub wal: Arc<WalShared>,
    pub stats: Arc<crate::shard::ShardStats>,
    pub partitions: Vec<Arc<PartitionStats>>,
}

/// A topic and where its partitions are.
pub(super) struct TopicView {
    pub name: String,
    pub places: Vec<Place>,
}

pub(super) fn topics(config: &Config, store: &OpenStore) -> Vec<TopicView> {
    config
        .topics
        .iter()
        .zip(&store.places)
        .map(|(t, p)| TopicView {
            name: t.name.clone(),
            places: p.clone(),
        })
        .collect()
}

fn add(reasons: &mut Reasons, name: &str, count: u64) {
    if count > 0 {
        *reasons.entry(name.to_owned()).or_default() += count;
    }
}

fn unix_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |t| t.as_millis() as i64)
}

impl Sources {
    fn partition(&self, place: &Place) -> &PartitionStats {
        &self.shards[usize::from(place.shard)].partitions[place.local as usize]
    }

    /// Reads every counter. The shards' are read before the receivers', so that a message in between
    /// shows as in flight and never as surplus.
    pub(super) fn snapshot(&self) -> Stats {
        let mut topics: Vec<TopicStats> = self.topics.iter().map(|view| self.topic(view)).collect();
        for (index, topic) in topics.iter_mut().enumerate() {
            let mut dropped = (0, 0);
            for lcore in &self.topic_counters {
                dropped.0 += lcore[index].ring_full.get();
                dropped.1 += lcore[index].shed.get();
            }
            topic.received = self
                .topic_counters
                .iter()
                .map(|lcore| lcore[index].received.get())
                .sum();
            add(&mut topic.dropped, "ring_full", dropped.0);
            add(&mut topic.dropped, "shed", dropped.1);
            topic.in_flight = topic.received as i64 - topic.accounted() as i64;
        }
        Stats {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            unix_ms: unix_ms(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            topics,
            ports: self.ports.iter().map(port).collect(),
            shards: self
                .shards
                .iter()
                .enumerate()
                .map(|(number, view)| shard(number, &view.wal, &view.stats))
                .collect(),
            lcores: self
                .loops
                .iter()
                .map(|(lcore, cpu, role, counters)| LcoreStats {
                    lcore: *lcore,
                    cpu: *cpu,
                    role: (*role).to_owned(),
                    busy_polls: counters.busy_polls.get(),
                    idle_polls: counters.idle_polls.get(),
                    busy_cycles: counters.busy_cycles.get(),
                    idle_cycles: counters.idle_cycles.get(),
                    sleeps: counters.sleeps.get(),
                })
                .collect(),
        }
    }

    fn topic(&self, view: &TopicView) -> TopicStats {
        let mut stats = TopicStats {
            name: view.name.clone(),
            ..TopicStats::default()
        };
        for place in &view.places {
            let partition = self.partition(place);
            stats.stored += partition.stored.get();
            stats.duplicate += partition.duplicate.get();
            stats.stored_bytes += partition.bytes.get();
            for (name, count) in partition.refused.iter() {
                add(&mut stats.refused, name, count);
            }
            for (name, count) in partition.dropped.iter() {
                add(&mut stats.dropped, name, count);
            }
            stats.partitions.push(PartitionInfo {
                shard: place.shard,
                start: 0,
                high_watermark: partition.high_watermark(),
            });
        }
        stats
    }
}

fn port(view: &PortView) -> PortStats {
    let mut stats = PortStats {
        name: view.name.clone(),
        device: view.port.device().to_owned(),
        driver: view.port.driver().to_owned(),
        mac: view.port.mac().map(|b| format!("{b:02x}")).join(":"),
        link: view.port.link().to_string(),
        ..PortStats::default()
    };
    for counters in &view.counters {
        // A burst's packets are counted one by one as handled or dropped, its sum at the end.
        for handled in Handled::ALL {
            add(
                &mut stats.handled,
                handled.name(),
                counters.handled[handled as usize].get(),
            );
        }
        for reason in DropReason::ALL {
            add(
                &mut stats.dropped,
                reason.name(),
                counters.dropped[reason as usize].get(),
            );
        }
        stats.delivered += counters.delivered.get();
        stats.received += counters.received.get();
        for (queue, received) in &counters.queues {
            let queue = usize::from(*queue);
            stats.queues.resize(stats.queues.len().max(queue + 1), 0);
            stats.queues[queue] += received.get();
        }
        stats.received_bytes += counters.bytes.get();
        stats.sent += counters.sent.get();
        stats.send_dropped += counters.send_dropped.get();
    }
    let nic = view.port.stats();
    add(&mut stats.nic, "missed", nic.rx_missed);
    add(&mut stats.nic, "errors", nic.rx_errors);
    add(&mut stats.nic, "no_mbuf", nic.rx_no_mbuf);
    add(&mut stats.nic, "not_delivered", not_delivered(view, &nic));
    stats
}

/// What the kernel received on the interface below an AF_PACKET port and did not hand to the driver:
/// its ring was full, which the driver does not count, or the kernel put fragments together first.
fn not_delivered(view: &PortView, nic: &crate::eal::PortStats) -> u64 {
    match &view.interface {
        Some((name, before)) => received_by_kernel(name).saturating_sub(before + nic.rx_packets),
        None => 0,
    }
}

fn shard(number: usize, shared: &WalShared, stats: &crate::shard::ShardStats) -> ShardStats {
    use std::sync::atomic::Ordering::Relaxed;
    let state = match shared.state() {
        WalState::Running => "running".to_owned(),
        WalState::DiskFull => "disk full".to_owned(),
        WalState::Failed => format!("failed: {}", shared.reason().unwrap_or_default()),
        WalState::Closed => "closed".to_owned(),
    };
    ShardStats {
        shard: number as u16,
        state,
        commits: shared.commits.get(),
        committed_bytes: shared.committed_bytes.get(),
        segments: crate::storage::wal::segment::list_segments(shared.dir())
            .map_or(0, |list| list.len() as u64),
        pending_acks: stats.pending_acks.load(Relaxed),
        credit: stats.credit.load(Relaxed),
        queued: stats.queued.load(Relaxed),
        producers: stats.producers.load(Relaxed),
    }
}

/// What the control socket answers.
pub(super) fn answers(sources: &Arc<Sources>, store: &OpenStore) -> Answers {
    // All topics of the store can be read, also those that the configuration no longer names.
    let catalog: Vec<(String, Vec<(u16, PartitionKey)>)> = store
        .catalog
        .topics()
        .iter()
        .map(|topic| {
            let keys = topic
                .shards
                .iter()
                .zip(0..)
                .filter_map(|(&shard, p)| Some((shard, topic.key(p)?)));
            (topic.name.clone(), keys.collect())
        })
        .collect();
    let catalog = Arc::new(catalog);
    let readers: Arc<Vec<Mutex<LogReader>>> = Arc::new(
        store
            .shared
            .iter()
            .zip(&store.stores)
            .map(|(shared, files)| {
                Mutex::new(LogReader::with_store(Arc::clone(shared), Arc::clone(files)))
            })
            .collect(),
    );
    let stats = Arc::clone(sources);
    let (topic_names, topic_readers) = (Arc::clone(&catalog), Arc::clone(&readers));
    Answers {
        stats: Box::new(move || stats.snapshot()),
        topics: Box::new(move || {
            topic_names
                .iter()
                .map(|(name, keys)| TopicInfo {
                    name: name.clone(),
                    partitions: keys
                        .iter()
                        .map(|&(shard, key)| {
                            let (start, high_watermark) = topic_readers
                                .get(usize::from(shard))
                                .and_then(|reader| lock(reader).bounds(key).ok())
                                .unwrap_or((0, 0));
                            PartitionInfo {
                                shard,
                                start,
                                high_watermark,
                            }
                        })
                        .collect(),
                })
                .collect()
        }),
        read: Box::new(move |topic, partition, from, max_bytes, out| {
            let (shard, key) = find(&catalog, topic, partition)?;
            let reader = readers.get(usize::from(shard)).ok_or_else(|| {
                format!(
                    "shard {shard} of partition {partition} is not open; raise [storage] shards"
                )
            })?;
            crate::control::read(&mut lock(reader), key, from, max_bytes, out)
        }),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn find(
    catalog: &[(String, Vec<(u16, PartitionKey)>)],
    topic: &str,
    partition: u32,
) -> Result<(u16, PartitionKey), String> {
    let Some((_, keys)) = catalog.iter().find(|(name, _)| name == topic) else {
        let names: Vec<&str> = catalog.iter().map(|(name, _)| name.as_str()).collect();
        return Err(format!(
            "there is no topic \"{topic}\"; there are: {}",
            names.join(", ")
        ));
    };
    keys.get(partition as usize).copied().ok_or_else(|| {
        format!(
            "topic {topic} has partitions 0 to {}",
            keys.len().saturating_sub(1)
        )
    })
}

/// Turns what NICs lost into gap records: nobody knows whose messages they were, so every partition
/// that the port feeds with raw messages gets one.
pub(super) struct Losses {
    sources: Arc<Sources>,
    /// By port: reason and the count that has been told.
    told: Vec<[(&'static str, u64); 3]>,
    /// The partitions that raw messages go to.
    places: Vec<Place>,
    last_ms: i64,
}

impl Losses {
    pub(super) fn new(sources: &Arc<Sources>, routes: &Arc<Routes>) -> Self {
        let mut places: Vec<Place> = routes
            .raw
            .iter()
            .flat_map(|route| route.places.iter().copied())
            .collect();
        places.sort_by_key(|place| (place.shard, place.local));
        places.dedup();
        Self {
            told: sources.ports.iter().map(counts).collect(),
            sources: Arc::clone(sources),
            places,
            last_ms: unix_ms(),
        }
    }

    /// Reports what was lost since the last call.
    pub(super) fn report(&mut self, queues: &[Arc<ArrayQueue<GapReport>>]) {
        let now = unix_ms();
        for (index, (view, told)) in self.sources.ports.iter().zip(&mut self.told).enumerate() {
            for (before, (reason, count)) in told.iter_mut().zip(counts(view)) {
                if count <= before.1 {
                    continue;
                }
                for place in &self.places {
                    let report = GapReport {
                        partition: place.local,
                        reason,
                        count: count - before.1,
                        from_ms: self.last_ms,
                        to_ms: now,
                        port: index as u16,
                    };
                    // A full queue is full of reports of the same kind.
                    let _ = queues[usize::from(place.shard)].push(report);
                }
                before.1 = count;
            }
        }
        self.last_ms = now;
    }
}

/// What the device counts as lost.
fn counts(view: &PortView) -> [(&'static str, u64); 3] {
    let nic = view.port.stats();
    [
        ("nic_missed", nic.rx_missed),
        ("nic_errors", nic.rx_errors),
        ("no_mbuf", nic.rx_no_mbuf),
    ]
}
