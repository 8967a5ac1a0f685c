//! Snapshots of everything that is counted, and the answers of the control socket.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_queue::ArrayQueue;

use super::backoff::LoopCounters;
use super::ports::{PortView, received_by_kernel};
use super::topics::{Partition, Snapshot, Topic, Topics};
use crate::broker::worker::Broker;
use crate::control::protocol::{
    KafkaStats, LcoreStats, PartitionInfo, PortStats, Reasons, ShardStats, Stats, TopicChange,
    TopicInfo, TopicStats,
};
use crate::control::server::Answers;
use crate::net::rx::Place;
use crate::net::{DropReason, Handled};
use crate::shard::GapReport;
use crate::storage::backup;
use crate::storage::lsm::Store;
use crate::storage::reader::LogReader;
use crate::storage::{TopicSpec, WalShared, WalState};

/// Everything that has counters.
pub(super) struct Sources {
    pub started: Instant,
    pub ports: Vec<PortView>,
    pub topics: Arc<Topics>,
    pub shards: Vec<ShardView>,
    /// EAL's number, CPU, role and counters of each poll loop.
    pub loops: Vec<(u32, u32, &'static str, Arc<LoopCounters>)>,
    /// Where Kafka's protocol is offered.
    pub kafka: std::sync::OnceLock<Arc<Broker>>,
}

/// One shard's counters.
pub(super) struct ShardView {
    pub wal: Arc<WalShared>,
    pub stats: Arc<crate::shard::ShardStats>,
    pub store: Arc<Store>,
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
    /// Reads every counter. The shards' are read before the receivers', so that a message in between
    /// shows as in flight and never as surplus.
    pub(super) fn snapshot(&self) -> Stats {
        let snapshot = self.topics.snapshot();
        let mut topics: Vec<TopicStats> = snapshot.all().iter().map(|t| topic(t)).collect();
        for (view, topic) in snapshot.all().iter().zip(&mut topics) {
            let counters = &view.counters;
            for (reason, count) in counters.kernel.refused() {
                add(&mut topic.refused, reason, count);
            }
            for lcore in &counters.lcores {
                add(&mut topic.dropped, "ring_full", lcore.ring_full.get());
                add(&mut topic.dropped, "shed", lcore.shed.get());
            }
            let lcores = counters.lcores.iter().map(|lcore| lcore.received.get());
            topic.received = counters.kernel.received() + lcores.sum::<u64>();
            topic.in_flight = topic.received as i64 - topic.accounted() as i64;
        }
        Stats {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            unix_ms: unix_ms(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            topics,
            kafka: self.kafka.get().map(|broker| kafka(broker)),
            ports: self.ports.iter().map(port).collect(),
            shards: self
                .shards
                .iter()
                .enumerate()
                .map(|(number, view)| shard(number, view))
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
}

/// What shards say of a topic.
fn topic(view: &Topic) -> TopicStats {
    let mut stats = TopicStats {
        name: view.name.clone(),
        ..TopicStats::default()
    };
    for partition in &view.partitions {
        let counters = &partition.stats;
        stats.stored += counters.stored.get();
        stats.duplicate += counters.duplicate.get();
        stats.stored_bytes += counters.bytes.get();
        for (name, count) in counters.refused.iter() {
            add(&mut stats.refused, name, count);
        }
        for (name, count) in counters.dropped.iter() {
            add(&mut stats.dropped, name, count);
        }
        stats.partitions.push(PartitionInfo {
            shard: partition.place.shard,
            start: counters.start_offset(),
            high_watermark: counters.high_watermark(),
        });
    }
    stats
}

fn kafka(broker: &Broker) -> KafkaStats {
    let counters = &broker.counters;
    let named = |pairs: &mut dyn Iterator<Item = (&'static str, u64)>| {
        pairs
            .map(|(name, count)| (name.to_owned(), count))
            .collect()
    };
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let groups = broker.hub.stats();
    KafkaStats {
        connections: count(&counters.open),
        accepted: count(&counters.accepted),
        refused: count(&counters.refused),
        closed: named(&mut counters.closes()),
        requests: named(&mut counters.requests()),
        batches_in: count(&counters.batches_in),
        batches_refused: count(&counters.batches_refused),
        bytes_in: count(&counters.bytes_in),
        bytes_out: count(&counters.bytes_out),
        groups: groups.groups as u64,
        members: groups.members as u64,
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

fn shard(number: usize, view: &ShardView) -> ShardStats {
    use std::sync::atomic::Ordering::Relaxed;
    let (shared, stats, files) = (&view.wal, &view.stats, &view.store);
    let ssts = files.view();
    let files = &files.stats;
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
        ssts: ssts.files.len() as u64,
        sst_bytes: ssts.files.iter().map(|file| file.meta.bytes).sum(),
        flushed_bytes: files.flush_read_bytes.load(Relaxed),
        flush_cpu_ns: files.flush_cpu_ns.load(Relaxed),
        flush_written_bytes: files.flush_written_bytes.load(Relaxed),
        merges: files.merges.load(Relaxed),
        merge_read_bytes: files.merge_read_bytes.load(Relaxed),
        merge_written_bytes: files.merge_written_bytes.load(Relaxed),
        merge_cpu_ns: files.merge_cpu_ns.load(Relaxed),
        merging: files
            .merging
            .lock()
            .map_or(String::new(), |why| (*why).to_owned()),
        merging_bytes: files.merging_bytes.load(Relaxed),
        merged_bytes: files.merged_bytes.load(Relaxed),
        records_compacted: files.records_compacted.load(Relaxed),
        records_expired: files.records_expired.load(Relaxed),
        damaged_blocks: files.damaged_blocks.load(Relaxed),
        pending_acks: stats.pending_acks.load(Relaxed),
        credit: stats.credit.load(Relaxed),
        queued: stats.queued.load(Relaxed),
        producers: stats.producers.load(Relaxed),
    }
}

/// How long a backup waits for what was acknowledged with `acks=1` to be on disk.
const SETTLE: Duration = Duration::from_secs(10);

/// Waits until all that is stored now is durable.
fn settle(topics: &Topics) -> Result<(), String> {
    let since = Instant::now();
    let snapshot = topics.snapshot();
    let partitions = || snapshot.all().iter().flat_map(|topic| &topic.partitions);
    let ends: Vec<i64> = partitions().map(|p| p.stats.log_end()).collect();
    while partitions()
        .zip(&ends)
        .any(|(partition, &end)| partition.stats.high_watermark() < end)
    {
        if since.elapsed() > SETTLE {
            return Err(format!(
                "what the server has taken did not become durable within {} s: see the shards' states in `taffrail stats`",
                SETTLE.as_secs()
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// What the control socket answers.
pub(super) fn answers(
    sources: &Arc<Sources>,
    shared: &[Arc<WalShared>],
    stores: &[Arc<Store>],
    folder: &Path,
) -> Answers {
    let readers: Arc<Vec<Mutex<LogReader>>> = Arc::new(
        shared
            .iter()
            .zip(stores)
            .map(|(shared, files)| {
                Mutex::new(LogReader::with_store(Arc::clone(shared), Arc::clone(files)))
            })
            .collect(),
    );
    let stats = Arc::clone(sources);
    let (topics, readers_of_topics) = (Arc::clone(&sources.topics), Arc::clone(&readers));
    let (logs, files, backup_topics) = (
        shared.to_vec(),
        stores.to_vec(),
        Arc::clone(&sources.topics),
    );
    let folder = folder.to_owned();
    let (read_topics, change_topics) = (Arc::clone(&sources.topics), Arc::clone(&sources.topics));
    Answers {
        stats: Box::new(move || stats.snapshot()),
        topics: Box::new(move || {
            let bounds = |partition: &Partition| {
                let shard = partition.place.shard;
                let (start, high_watermark) = readers_of_topics
                    .get(usize::from(shard))
                    .and_then(|reader| lock(reader).bounds(partition.key).ok())
                    .unwrap_or((0, 0));
                PartitionInfo {
                    shard,
                    start: start.max(partition.stats.start_offset()),
                    high_watermark,
                }
            };
            let info = |topic: &Arc<Topic>| TopicInfo {
                name: topic.name.clone(),
                partitions: topic.partitions.iter().map(bounds).collect(),
            };
            topics.snapshot().all().iter().map(info).collect()
        }),
        read: Box::new(move |topic, partition, from, max_bytes, out| {
            let partition = find(&read_topics.snapshot(), topic, partition)?;
            let mut reader = lock(&readers[usize::from(partition.place.shard)]);
            crate::control::read(&mut reader, partition.key, from, max_bytes, out)
        }),
        backup: Box::new(move |to| {
            settle(&backup_topics)?;
            let shards: Vec<backup::Running> = logs
                .iter()
                .zip(&files)
                .map(|(log, store)| backup::Running { log, store })
                .collect();
            backup::running(&folder, &shards, to).map_err(|error| error.to_string())
        }),
        change: Box::new(move |change| {
            let changed = match change {
                TopicChange::Create {
                    name,
                    partitions,
                    settings,
                } => {
                    let spec = TopicSpec {
                        name,
                        partitions,
                        settings,
                    };
                    change_topics.create(&spec, false, false)
                }
                TopicChange::Delete { name } => change_topics.delete(&name),
                TopicChange::AddPartitions { name, partitions } => {
                    change_topics.add_partitions(&name, partitions, false)
                }
                TopicChange::Alter { name, settings } => {
                    change_topics.alter(&name, &settings, false)
                }
            };
            changed.map_err(|error| error.to_string())
        }),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn find(snapshot: &Snapshot, topic: &str, partition: u32) -> Result<Partition, String> {
    let Some(found) = snapshot.find(topic) else {
        let names: Vec<&str> = snapshot.all().iter().map(|t| t.name.as_str()).collect();
        return Err(format!(
            "there is no topic \"{topic}\"; there are: {}",
            names.join(", ")
        ));
    };
    let found = found.partitions.get(partition as usize).cloned();
    found.ok_or_else(|| {
        let last = snapshot
            .find(topic)
            .map_or(0, |t| t.partitions.len().saturating_sub(1));
        format!("topic {topic} has partitions 0 to {last}")
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
    pub(super) fn new(sources: &Arc<Sources>) -> Self {
        let routes = sources.topics.routes().current();
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
