//! Requests and answers of the control socket.
//!
//! Invariant of every account: what came in equals the sum of what became of it. [`PortStats`] counts
//! packets, [`TopicStats`] messages; [`Stats::imbalances`] names each account that does not add up.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Longest request line: the ends of all partitions that a topic may have fit.
pub const MAX_REQUEST: usize = 1 << 20;
/// Most bytes of record batches in one answer.
pub const MAX_READ: u32 = 4 << 20;
/// Longest wait for news, in milliseconds: below what a client takes for a server that hangs.
pub const MAX_WAIT_MS: u64 = 15_000;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// The counters: answered with [`Stats`].
    Stats,
    /// The topics and the bounds of their partitions: answered with a list of [`TopicInfo`].
    Topics,
    /// Whole record batches from a position on: answered with [`ReadAnswer`] and the bytes.
    Read {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
        /// Where to begin.
        from: Position,
        /// Most bytes wanted; one batch is returned even if it is larger.
        max_bytes: u32,
    },
    /// Where a position is: answered with [`ReadAnswer`] and no bytes.
    Find {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
        /// The position.
        from: Position,
    },
    /// Waits until a partition of a topic has a durable message at or behind its offset in `offsets`, or there are
    /// more partitions than offsets, or the time is over: answered with the offset behind the newest durable message of
    /// each partition.
    Wait {
        /// Topic name.
        topic: String,
        /// By partition number.
        offsets: Vec<i64>,
        /// Longest wait, in milliseconds; [`MAX_WAIT_MS`] at most.
        wait_ms: u64,
    },
    /// The newest records of keys: answered with [`KeysAnswer`](super::keys::KeysAnswer) and the bytes.
    Keys {
        /// Topic name.
        topic: String,
        /// Partition number.
        partition: u32,
        /// Which keys.
        keys: super::keys::Keys,
        /// Most bytes wanted; one record is returned even if it is larger.
        max_bytes: u32,
    },
    /// A change of the topics: answered with nothing, when it is durable and in force.
    Change(TopicChange),
    /// The consumer groups: answered with a list of [`GroupSummary`].
    Groups,
    /// A consumer group: answered with [`GroupInfo`].
    Group {
        /// Its name.
        group: String,
    },
    /// Sets committed offsets of a group without members, which is made if it is not there: answered with nothing,
    /// when they are durable.
    Commit {
        /// Its name.
        group: String,
        /// Offsets of the next message to be read.
        offsets: CommittedOffsets,
    },
    /// Deletes a group without members, with its offsets: answered with nothing, when it is durable.
    DeleteGroup {
        /// Its name.
        group: String,
    },
    /// A copy of the store: answered with a [`Note`](crate::storage::backup::Note) when it is complete.
    Backup {
        /// The folder to make, an absolute path.
        to: std::path::PathBuf,
    },
}

/// Offsets by topic and partition.
pub type CommittedOffsets = BTreeMap<String, BTreeMap<u32, i64>>;

/// A change of a running server's topics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TopicChange {
    /// A new topic.
    Create {
        /// Its name.
        name: String,
        /// Its number of partitions.
        partitions: u32,
        /// Settings by Kafka's names.
        #[serde(default)]
        settings: BTreeMap<String, String>,
    },
    /// A topic and its messages go.
    Delete {
        /// Its name.
        name: String,
    },
    /// A topic gets more partitions.
    AddPartitions {
        /// Its name.
        name: String,
        /// How many it has then in all.
        partitions: u32,
    },
    /// Settings are changed; those that are null get their defaults.
    Alter {
        /// The topic's name.
        name: String,
        /// Settings by Kafka's names.
        settings: BTreeMap<String, Option<String>>,
    },
}

/// Where a read begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Position {
    /// The oldest message kept.
    Earliest,
    /// Behind the newest one.
    Latest,
    /// This offset.
    Offset(i64),
    /// The first message with this time or a later one, in Unix milliseconds.
    Time(i64),
}

/// The answer's first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer<T> {
    /// As asked.
    Ok(T),
    /// Refused, and why.
    Error(String),
}

/// Precedes the bytes of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadAnswer {
    /// The offset that the read began at; the first batch may begin below it.
    pub from: i64,
    /// The oldest offset kept.
    pub start: i64,
    /// The offset behind the newest durable message.
    pub high_watermark: i64,
    /// Bytes of record batches that follow this line.
    pub bytes: u32,
}

/// A topic and its partitions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicInfo {
    /// Its name.
    pub name: String,
    /// Kept by the server for itself.
    #[serde(default)]
    pub internal: bool,
    /// Settings that were set, by Kafka's names.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// Its partitions by number.
    pub partitions: Vec<PartitionInfo>,
}

/// A consumer group in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSummary {
    /// Its name.
    pub group: String,
    /// Kafka's word for its state; `Empty`: it has no members.
    pub state: String,
    /// `consumer`; empty: it only commits offsets.
    pub protocol_type: String,
}

/// A consumer group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupInfo {
    /// Its name.
    pub group: String,
    /// Kafka's word for its state; `Empty`: it has no members, `Dead`: there is no such group.
    pub state: String,
    /// `consumer`; empty: it only commits offsets.
    pub protocol_type: String,
    /// The assignor that its members agreed on.
    pub assignor: String,
    /// Its members.
    pub members: Vec<GroupMember>,
    /// Its committed offsets, and the assigned partitions without one, by topic and partition.
    pub partitions: Vec<GroupPartition>,
}

/// A member of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMember {
    /// Its id.
    pub member: String,
    /// Its name as a static member.
    pub instance: Option<String>,
    /// What its client calls itself.
    pub client_id: String,
    /// Its client's address.
    pub host: String,
    /// The partitions that it reads, by topic.
    pub assignment: BTreeMap<String, Vec<u32>>,
}

/// How far a group is in a partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupPartition {
    /// Topic name.
    pub topic: String,
    /// Partition number.
    pub partition: u32,
    /// Offset of the next message to be read; `None`: nothing was committed.
    pub committed: Option<i64>,
    /// The client's own note.
    #[serde(default)]
    pub metadata: String,
    /// The oldest offset kept; `None`: the partition is gone.
    pub start: Option<i64>,
    /// The offset behind the newest durable message.
    pub end: Option<i64>,
    /// Messages between the committed offset and the end.
    pub lag: Option<i64>,
    /// The member that reads it.
    pub member: Option<String>,
}

/// The bounds of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionInfo {
    /// Its shard.
    pub shard: u16,
    /// The oldest offset kept.
    pub start: i64,
    /// The offset behind the newest durable message.
    pub high_watermark: i64,
    /// Bytes of its record batches on disk, as far as they are not wholly before the start.
    #[serde(default)]
    pub bytes: u64,
}

/// Counts by reason; reasons that did not occur are left out.
pub type Reasons = BTreeMap<String, u64>;

/// Everything the server counts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Version of the server.
    pub version: String,
    /// Unix time of this snapshot, in milliseconds.
    pub unix_ms: i64,
    /// Milliseconds since the server took its first packet.
    pub uptime_ms: u64,
    /// Packets, port by port.
    pub ports: Vec<PortStats>,
    /// Messages, topic by topic.
    pub topics: Vec<TopicStats>,
    /// Kafka's protocol, where it is offered.
    #[serde(default)]
    pub kafka: Option<KafkaStats>,
    /// What the process takes of memory, and for what.
    #[serde(default)]
    pub memory: Option<MemoryStats>,
    /// WAL and staging, shard by shard.
    pub shards: Vec<ShardStats>,
    /// Poll loops.
    pub lcores: Vec<LcoreStats>,
}

/// Packets of one port: received = handled + delivered + dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortStats {
    /// Name in the configuration.
    pub name: String,
    /// DPDK's name of the device; `kernel` for a port of kernel sockets.
    pub device: String,
    /// DPDK driver.
    pub driver: String,
    /// MAC address.
    pub mac: String,
    /// Link state in words.
    pub link: String,
    /// Packets that an rx lcore took from the port's queues; datagrams taken from its sockets.
    pub received: u64,
    /// Those packets by receive queue.
    #[serde(default)]
    pub queues: Vec<u64>,
    /// Bytes of those packets; of datagrams, their payload.
    pub received_bytes: u64,
    /// Packets answered or used by the port itself, by protocol.
    pub handled: Reasons,
    /// Packets that carried messages.
    pub delivered: u64,
    /// Packets that carried none or were damaged, by reason.
    pub dropped: Reasons,
    /// Packets sent: answers and acknowledgements.
    pub sent: u64,
    /// Packets that the transmit queue did not take.
    pub send_dropped: u64,
    /// Lost before an rx lcore saw them: the NIC's own counts (missed, errors, no mbuf), or the kernel's
    /// of full sockets (missed).
    pub nic: Reasons,
}

/// Messages of one topic: received = stored + duplicate + refused + dropped + in flight.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicStats {
    /// Its name.
    pub name: String,
    /// Messages that the rx lcores found in packets.
    pub received: u64,
    /// Messages in the log.
    pub stored: u64,
    /// Retransmissions of messages that are in the log already.
    pub duplicate: u64,
    /// Messages whose producer was told why they were not stored, by reason.
    pub refused: Reasons,
    /// Messages lost, by reason.
    pub dropped: Reasons,
    /// Messages between an rx lcore and their shard at the moment of the snapshot.
    pub in_flight: i64,
    /// Bytes of stored messages, with the overhead of their batches.
    pub stored_bytes: u64,
    /// The partitions' bounds by number.
    pub partitions: Vec<PartitionInfo>,
}

/// One shard.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardStats {
    /// Its number.
    pub shard: u16,
    /// `running`, `disk full` or `failed: …`.
    pub state: String,
    /// Group commits made durable.
    pub commits: u64,
    /// Bytes made durable, with frame headers and padding.
    pub committed_bytes: u64,
    /// WAL segments on disk.
    pub segments: u64,
    /// SSTs, and their bytes.
    #[serde(default)]
    pub ssts: u64,
    /// See `ssts`.
    #[serde(default)]
    pub sst_bytes: u64,
    /// Since the start: bytes of the log that were flushed, ns of CPU that took, and bytes of SSTs it made.
    #[serde(default)]
    pub flushed_bytes: u64,
    /// See `flushed_bytes`.
    #[serde(default)]
    pub flush_cpu_ns: u64,
    /// See `flushed_bytes`.
    #[serde(default)]
    pub flush_written_bytes: u64,
    /// Since the start: merges of SSTs, bytes of batches they read, bytes of SSTs they wrote, and ns of CPU that took.
    #[serde(default)]
    pub merges: u64,
    /// See `merges`.
    #[serde(default)]
    pub merge_read_bytes: u64,
    /// See `merges`.
    #[serde(default)]
    pub merge_written_bytes: u64,
    /// See `merges`.
    #[serde(default)]
    pub merge_cpu_ns: u64,
    /// Why a merge runs; empty: none does.
    #[serde(default)]
    pub merging: String,
    /// The merge that runs: bytes of batches in its files (0: none runs), and of those what it is through with.
    #[serde(default)]
    pub merging_bytes: u64,
    /// See `merging_bytes`.
    #[serde(default)]
    pub merged_bytes: u64,
    /// Records that newer ones with the same key superseded, and tombstones, that compaction dropped since the start.
    #[serde(default)]
    pub records_compacted: u64,
    /// Expired records, and deleted topics', that left the disk since the start.
    #[serde(default)]
    pub records_expired: u64,
    /// Reads that met a damaged block of an SST.
    #[serde(default)]
    pub damaged_blocks: u64,
    /// Acknowledgements that wait for the disk.
    pub pending_acks: u64,
    /// Batches that producers may have outstanding in a partition, now.
    pub credit: u64,
    /// Inbound messages waiting in the shard's rings.
    pub queued: u64,
    /// Known idempotent producers, counted once a partition.
    pub producers: u64,
}

impl ShardStats {
    /// Bytes of SSTs written for each byte that came from the log, since the start: merges write it again. `None`:
    /// nothing came yet.
    pub fn write_amplification(&self) -> Option<f64> {
        let written = self.flush_written_bytes + self.merge_written_bytes;
        (self.flush_written_bytes > 0).then(|| written as f64 / self.flush_written_bytes as f64)
    }
}

/// Memory, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStats {
    /// What the process may take.
    pub budget: u64,
    /// What it takes: `anonymous` + `shared` + `huge`.
    pub taken: u64,
    /// What for. The last account is the rest, for which nobody accounts.
    pub accounts: Vec<AccountStats>,
    /// Pages of no file: heap, stacks.
    pub anonymous: u64,
    /// Pages of files in memory: staging on tmpfs.
    pub shared: u64,
    /// Pages of hugetlbfs.
    pub huge: u64,
    /// Mapped pages of files, which the kernel takes back when it must: SSTs, the program.
    pub file: u64,
    /// The most that `anonymous`, `shared` and `file` were together.
    pub peak_resident: u64,
    /// What is allocated and not freed of the heap.
    pub heap: Option<u64>,
}

/// One account of memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountStats {
    /// Its name, as in `[memory]`.
    pub name: String,
    /// What it may take.
    pub limit: u64,
    /// What it takes.
    pub used: u64,
    /// The most that it took since the start; of some parts, when somebody looked.
    pub peak: u64,
    /// How often something had to go, to wait or was refused because of the limit.
    pub refused: u64,
    /// How often it took more than the limit.
    pub over: u64,
    /// What happens at the limit.
    pub at_limit: String,
}

impl MemoryStats {
    /// The account with this name.
    pub fn account(&self, name: &str) -> Option<&AccountStats> {
        self.accounts.iter().find(|account| account.name == name)
    }
}

/// One poll loop.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LcoreStats {
    /// EAL's number.
    pub lcore: u32,
    /// CPU it is pinned to.
    pub cpu: u32,
    /// `rx`, `storage` or `rx+storage`.
    pub role: String,
    /// Loop rounds that found work.
    pub busy_polls: u64,
    /// Loop rounds that found none.
    pub idle_polls: u64,
    /// TSC cycles in rounds with work.
    pub busy_cycles: u64,
    /// TSC cycles in rounds without.
    pub idle_cycles: u64,
    /// Times the loop slept.
    pub sleeps: u64,
}

/// Sum over the reasons; as every sum here it stops at `u64::MAX`, which only a nonsensical answer reaches.
pub fn total(reasons: &Reasons) -> u64 {
    sum(reasons.values().copied())
}

fn sum(counts: impl IntoIterator<Item = u64>) -> u64 {
    counts.into_iter().fold(0, u64::saturating_add)
}

impl PortStats {
    /// What became of the packets; equals `received`.
    pub fn accounted(&self) -> u64 {
        sum([total(&self.handled), self.delivered, total(&self.dropped)])
    }
}

impl TopicStats {
    /// What became of the messages; equals `received` when nothing is in flight.
    pub fn accounted(&self) -> u64 {
        sum([
            self.stored,
            self.duplicate,
            total(&self.refused),
            total(&self.dropped),
        ])
    }
}

impl Stats {
    /// Accounts that do not add up, in words; empty when all do. Messages in flight are no
    /// imbalance: on a server that receives, a snapshot always has some.
    pub fn imbalances(&self) -> Vec<String> {
        let ports = self
            .ports
            .iter()
            .filter(|port| port.received != port.accounted())
            .map(|port| {
                format!(
                    "port {}: received {} packets, accounted for {}",
                    port.name,
                    port.received,
                    port.accounted()
                )
            });
        let topics = self
            .topics
            .iter()
            .filter(|topic| {
                topic.in_flight < 0
                    || topic.received != sum([topic.accounted(), topic.in_flight as u64])
            })
            .map(|topic| {
                format!(
                    "topic {}: received {} messages, accounted for {}",
                    topic.name,
                    topic.received,
                    topic.accounted()
                )
            });
        ports.chain(topics).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_plain_json() {
        let read = Request::Read {
            topic: "t".into(),
            partition: 1,
            from: Position::Offset(7),
            max_bytes: 10,
        };
        let text = serde_json::to_string(&read).unwrap();
        assert_eq!(
            text,
            r#"{"read":{"topic":"t","partition":1,"from":{"offset":7},"max_bytes":10}}"#
        );
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), read);
        assert_eq!(
            serde_json::from_str::<Request>("\"stats\"").unwrap(),
            Request::Stats
        );
    }

    #[test]
    fn imbalances_are_named() {
        let mut topic = TopicStats {
            name: "t".into(),
            received: 10,
            stored: 6,
            duplicate: 1,
            ..Default::default()
        };
        topic.refused.insert("fenced".into(), 1);
        topic.dropped.insert("ring_full".into(), 2);
        let mut stats = Stats {
            topics: vec![topic],
            ..Default::default()
        };
        assert_eq!(stats.imbalances(), Vec::<String>::new());
        stats.topics[0].received = 11;
        assert_eq!(stats.imbalances().len(), 1);
        stats.topics[0].in_flight = 1;
        assert_eq!(stats.imbalances(), Vec::<String>::new());
        stats.topics[0].duplicate = u64::MAX;
        assert_eq!(
            stats.imbalances().len(),
            1,
            "a nonsensical answer adds up to no panic"
        );
        stats.topics.clear();
        stats.ports.push(PortStats {
            name: "p".into(),
            received: 1,
            ..Default::default()
        });
        assert_eq!(
            stats.imbalances(),
            ["port p: received 1 packets, accounted for 0"]
        );
    }
}

/// What is counted of Kafka's protocol since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KafkaStats {
    /// Connections that are open.
    pub connections: u64,
    /// Connections accepted.
    pub accepted: u64,
    /// Connections refused, because there were as many as are allowed or the machine had no more descriptors.
    pub refused: u64,
    /// Connections closed by the server, by reason.
    pub closed: Reasons,
    /// Requests by API.
    pub requests: Reasons,
    /// Record batches handed to shards.
    pub batches_in: u64,
    /// Record batches that were refused before: of unknown topics, not allowed, too large, or wrong in themselves.
    pub batches_refused: u64,
    /// Bytes of records produced.
    pub bytes_in: u64,
    /// Bytes of records fetched.
    pub bytes_out: u64,
    /// Consumer groups.
    pub groups: u64,
    /// Their members.
    pub members: u64,
}
