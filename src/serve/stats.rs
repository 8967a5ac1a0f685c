//! Snapshots of everything that is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crossbeam_queue::ArrayQueue;

use super::backoff::LoopCounters;
use super::ports::{PortView, Source, received_by_kernel};
use super::topics::{Partition, Topic, Topics};
use crate::broker::worker::Broker;
use crate::control::protocol::{
    KafkaStats, LcoreStats, PartitionInfo, PortStats, Reasons, ShardStats, Stats, TopicStats,
};
use crate::fallback::udp::UdpSocket;
use crate::net::routes::Place;
use crate::net::{DropReason, Handled};
use crate::shard::GapReport;
use crate::storage::lsm::Store;
use crate::storage::{WalShared, WalState};

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
    pub memory: super::memory::Gauges,
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
        let topics = snapshot.all().iter();
        let mut topics: Vec<TopicStats> = topics.map(|t| self.topic(t)).collect();
        for (view, topic) in snapshot.all().iter().zip(&mut topics) {
            let counters = &view.counters;
            for (reason, count) in counters.kernel.refused() {
                add(&mut topic.refused, reason, count);
            }
            for lcore in &counters.receivers {
                add(&mut topic.dropped, "ring_full", lcore.ring_full.get());
                add(&mut topic.dropped, "shed", lcore.shed.get());
            }
            let lcores = counters.receivers.iter().map(|lcore| lcore.received.get());
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
            memory: Some(self.memory.look()),
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

    /// What shards say of a topic.
    fn topic(&self, view: &Topic) -> TopicStats {
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
            stats.partitions.push(self.partition(partition));
        }
        stats
    }

    /// Where a partition lies and how large it is. Costs a look at each segment of its shard's log.
    pub(super) fn partition(&self, partition: &Partition) -> PartitionInfo {
        let shard = partition.place.shard;
        let mut info = PartitionInfo {
            shard,
            start: partition.stats.start_offset(),
            high_watermark: partition.stats.high_watermark(),
            bytes: 0,
        };
        if let Some(view) = self.shards.get(usize::from(shard)) {
            let (key, files) = (partition.key, view.store.view());
            info.start = info.start.max(files.start(key));
            let extents = files.extents(key).iter();
            let live = extents.filter(|extent| extent.end > info.start);
            info.bytes = live.map(|extent| extent.bytes).sum::<u64>()
                + view.wal.index().bytes_from(key, info.start);
        }
        info
    }
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
        ..PortStats::default()
    };
    match &view.source {
        Source::Dpdk { port, .. } => {
            stats.device = port.device().to_owned();
            stats.driver = port.driver().to_owned();
            stats.mac = port.mac().map(|b| format!("{b:02x}")).join(":");
            stats.link = port.link().to_string();
        }
        Source::Kernel(sockets) => {
            stats.device = "kernel".to_owned();
            stats.driver = "udp".to_owned();
            stats.link = format!("{} sockets", sockets.len());
        }
    }
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
    match &view.source {
        Source::Dpdk { port, interface } => {
            let nic = port.stats();
            add(&mut stats.nic, "missed", nic.rx_missed);
            add(&mut stats.nic, "errors", nic.rx_errors);
            add(&mut stats.nic, "no_mbuf", nic.rx_no_mbuf);
            let lost = not_delivered(interface.as_ref(), nic.rx_packets);
            add(&mut stats.nic, "not_delivered", lost);
        }
        Source::Kernel(sockets) => add(&mut stats.nic, "missed", dropped(sockets)),
    }
    stats
}

/// What the kernel dropped at sockets.
fn dropped(sockets: &[Arc<UdpSocket>]) -> u64 {
    sockets.iter().map(|socket| socket.dropped()).sum()
}

/// What the kernel received on the interface below an AF_PACKET port and did not hand to the driver:
/// its ring was full, which the driver does not count, or the kernel put fragments together first.
fn not_delivered(interface: Option<&(String, u64)>, received: u64) -> u64 {
    match interface {
        Some((name, before)) => received_by_kernel(name).saturating_sub(before + received),
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

/// Turns what NICs and sockets lost into gap records: nobody knows whose messages they were, so every partition
/// that the port feeds with raw messages gets one.
pub(super) struct Losses {
    sources: Arc<Sources>,
    /// By port: reason and the count that has been told.
    told: Vec<Vec<(&'static str, u64)>>,
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

/// What the device, or the kernel, counts as lost.
fn counts(view: &PortView) -> Vec<(&'static str, u64)> {
    match &view.source {
        Source::Dpdk { port, .. } => {
            let nic = port.stats();
            vec![
                ("nic_missed", nic.rx_missed),
                ("nic_errors", nic.rx_errors),
                ("no_mbuf", nic.rx_no_mbuf),
            ]
        }
        Source::Kernel(sockets) => vec![("socket_full", dropped(sockets))],
    }
}
