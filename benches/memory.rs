//! What things cost in memory: a server is started, given so many of a thing, and asked what it allocated for them.
//!
//! `cargo bench --bench memory` prints, for each thing, bytes of the heap and of resident pages, each: partitions, idle Kafka
//! connections, idempotent producers, stored messages in 1, 1,000 and 10,000 partitions (log indexed, then in SSTs), and
//! partitions of an SST. Heap is what is allocated and not freed (`taffrail stats`), so figures repeat to a few bytes;
//! resident pages depend on what the allocator had left. Nothing is timed.

#[path = "../tests/support/mod.rs"]
mod support;

use std::net::SocketAddr;

use bytes::Bytes;
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::{ApiVersionsRequest, ProduceRequest, TopicName};
use kafka_protocol::protocol::StrBytes;
use support::kafka::Connection;
use support::{Server, wait_until};
use taffrail::config::memory::PARTITION;
use taffrail::control::protocol::{MemoryStats, Stats, TopicChange};
use taffrail::wire::record_batch::BatchWriter;

/// Bytes of a message.
const MESSAGE: usize = 100;
/// Messages of a batch.
const BATCH: usize = 10;
/// Messages that are stored in all.
const MESSAGES: usize = 500_000;
const CONNECTIONS: usize = 2000;
const PRODUCERS: usize = 10_000;

struct Bench {
    server: Server,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Bench {
    fn start() -> Bench {
        Self::start_by("epoll")
    }

    fn start_by(transport: &str) -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let address = support::free_address();
        let tables = format!(
            "[kafka]\nlisten = [\"{address}\"]\ntransport = \"{transport}\"\n[memory]\nbudget = \"2GiB\"\n[[topic]]\nname = \"warm\"\n"
        );
        let storage = "segment_size = \"32MiB\"\n";
        let server = Server::start(folder.path(), None, storage, &tables);
        let bench = Bench {
            server,
            address,
            _folder: folder,
        };
        // The first of everything makes tables that the next ones use.
        let mut connection = bench.connect();
        bench.produce(&mut connection, "warm", &[0], None);
        bench
    }

    fn connect(&self) -> Connection {
        let mut connection = Connection::open(self.address).unwrap();
        connection.call(0, &ApiVersionsRequest::default()).unwrap();
        connection
    }

    fn topic(&self, name: &str, partitions: u32) {
        let change = TopicChange::Create {
            name: name.to_owned(),
            partitions,
            settings: Default::default(),
        };
        self.server.client().change(change).unwrap();
    }

    /// A batch to each of the partitions, in one request.
    fn produce(
        &self,
        connection: &mut Connection,
        name: &str,
        partitions: &[u32],
        id: Option<i64>,
    ) {
        let records = batch(id);
        let data = |&partition: &u32| {
            PartitionProduceData::default()
                .with_index(partition as i32)
                .with_records(Some(records.clone()))
        };
        let topic = TopicProduceData::default()
            .with_name(TopicName(StrBytes::from_string(name.to_owned())))
            .with_partition_data(partitions.iter().map(data).collect());
        let request = ProduceRequest::default()
            .with_acks(-1)
            .with_timeout_ms(30_000)
            .with_topic_data(vec![topic]);
        let answer = connection.call(7, &request).unwrap();
        for part in &answer.responses[0].partition_responses {
            assert_eq!(part.error_code, 0);
        }
    }

    /// What idle connections take.
    fn idle(&self, what: &str) {
        let mut idle = Vec::new();
        self.measure(what, CONNECTIONS, "kafka_connections", || {
            idle.extend((0..CONNECTIONS).map(|_| self.connect()));
        });
    }

    fn stats(&self) -> (Stats, MemoryStats) {
        let stats = self.server.stats();
        let memory = stats.memory.clone().unwrap();
        (stats, memory)
    }

    /// When nothing moves any more.
    fn memory(&self) -> MemoryStats {
        let mut last = self.stats().1;
        wait_until("memory to come to rest", || {
            std::thread::sleep(std::time::Duration::from_millis(500));
            let now = self.stats().1;
            let still = now.heap == last.heap;
            last = now;
            still
        });
        last
    }

    /// Runs `work` and prints what it left, for each of `count`.
    fn measure(&self, what: &str, count: usize, account: &str, work: impl FnOnce()) {
        let before = self.memory();
        work();
        let after = self.memory();
        let each = |of: &dyn Fn(&MemoryStats) -> u64| {
            (of(&after) as f64 - of(&before) as f64) / count as f64
        };
        println!(
            "{what:52} {count:>8} × {:>9.1} heap, {:>9.1} resident; account {account}: {:.1}",
            each(&|m| m.heap.unwrap_or(0)),
            each(&|m| m.taken),
            each(&|m| m.account(account).map_or(0, |a| a.used)),
        );
    }
}

/// A batch of messages that differ.
fn batch(producer: Option<i64>) -> Bytes {
    let mut bytes = vec![0; 200 + BATCH * (MESSAGE + 40)];
    let mut writer = BatchWriter::new(&mut bytes, 1000);
    for i in 0..BATCH {
        let value: Vec<u8> = (0..MESSAGE).map(|j| (i * 31 + j * 7) as u8).collect();
        writer.push(1000, None, Some(&value)).unwrap();
    }
    let len = writer.finish(0);
    bytes.truncate(len);
    if let Some(id) = producer {
        bytes[43..51].copy_from_slice(&id.to_be_bytes());
        bytes[51..57].copy_from_slice(&[0; 6]);
        let crc = crc32c::crc32c(&bytes[21..]);
        bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    }
    bytes.into()
}

fn main() {
    let bench = Bench::start();
    let at_rest = bench.memory();
    println!(
        "at rest: {:.1} MiB taken, {:.1} MiB allocated",
        at_rest.taken as f64 / f64::from(1 << 20),
        at_rest.heap.unwrap_or(0) as f64 / f64::from(1 << 20)
    );
    bench.measure("partition", 10_000, "partitions", || {
        bench.topic("parts", 10_000)
    });
    bench.idle("idle Kafka connection by epoll");
    Bench::start_by("io_uring").idle("idle Kafka connection by io_uring");
    let mut connection = bench.connect();
    bench.measure(
        "idempotent producer of a partition",
        PRODUCERS,
        "dedupe",
        || {
            for id in 0..PRODUCERS {
                bench.produce(&mut connection, "warm", &[0], Some(id as i64 + 1));
            }
        },
    );
    drop((connection, bench));

    for partitions in [1u32, 1_000, 10_000] {
        let bench = Bench::start();
        bench.topic("t", partitions);
        let mut connection = bench.connect();
        let name = format!("message of {MESSAGE} bytes, {BATCH} a batch, {partitions} partitions");
        bench.measure(&name, MESSAGES, "offset_index", || {
            let mut next = 0;
            for _ in 0..MESSAGES / BATCH / 100 {
                let list: Vec<u32> = (0..100).map(|i| (next + i) % partitions).collect();
                next = (next + 100) % partitions;
                bench.produce(&mut connection, "t", &list, None);
            }
        });
        let (stats, memory) = bench.stats();
        let runs: u64 = stats.shards.iter().map(|shard| shard.ssts).sum();
        let of = |name| memory.account(name).map_or(0, |account| account.used);
        println!(
            "  of it: {} SSTs; partitions {} bytes, offset index {} bytes, block cache {} bytes, rest {:.1} MiB",
            runs,
            of("partitions"),
            of("offset_index"),
            of("block_cache"),
            of("rest") as f64 / f64::from(1 << 20)
        );
        if runs > 0 {
            let extents = of("partitions").saturating_sub(u64::from(partitions + 17) * PARTITION);
            println!(
                "  a partition in an SST: {:.1} bytes",
                extents as f64 / (runs * u64::from(partitions)) as f64
            );
        }
    }
}
