//! A server with a small budget of memory under more load than that has room for: thousands of partitions, producers and
//! connections, and consumers that ask for much and take nothing. Every account keeps its limit, what the kernel says of
//! the process agrees with the accounts, those who behave are served, and nothing acknowledged is lost.

mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Bytes, BytesMut};
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::{FetchRequest, ProduceRequest, RequestHeader, TopicName};
use kafka_protocol::protocol::{Encodable, Request, StrBytes};
use rand::{Rng, SeedableRng};
use support::kafka::Connection;
use support::{Server, wait_until};
use taffrail::control::protocol::{MemoryStats, Stats, TopicChange};
use taffrail::wire::record_batch::BatchWriter;

/// Partitions of the topic that all producers write to.
const PARTITIONS: u32 = 2000;
/// Idempotent producers of each writer, more together than the server may remember.
const PRODUCERS: u32 = 1000;
const WRITERS: u32 = 2;
/// Bytes of the topic that is fetched, and of its batches.
const BIG: usize = 24 << 20;
const BIG_BATCH: usize = 200_000;
/// Consumers that do not take what they asked for, and how often each asks: more than the kernel's buffers hold.
const DEAF: usize = 8;
const ASKED: usize = 40;
/// What the process takes and its accounts differ by so much at most, in bytes: code, stacks, and what the C library holds
/// back on one side, pages of rings that have not been touched on the other.
const BOUND: u64 = 32 << 20;

const MEMORY: &str =
    "[memory]\nbudget = \"192MiB\"\ndedupe = \"512KiB\"\nkafka_answers = \"9MiB\"\n";

fn topic(name: &'static str) -> TopicName {
    TopicName(StrBytes::from_static_str(name))
}

/// A batch with one record; `producer`: its id, with sequence 0.
fn batch(value: &[u8], producer: Option<i64>) -> Bytes {
    let mut bytes = vec![0; value.len() + 200];
    let mut writer = BatchWriter::new(&mut bytes, 1000);
    writer.push(1000, None, Some(value)).unwrap();
    let len = writer.finish(0);
    bytes.truncate(len);
    if let Some(id) = producer {
        // Kafka's record batch, version 2: producer id, epoch, sequence; the CRC is of what follows it.
        bytes[43..51].copy_from_slice(&id.to_be_bytes());
        bytes[51..57].copy_from_slice(&[0; 6]);
        let crc = crc32c::crc32c(&bytes[21..]);
        bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    }
    bytes.into()
}

fn produce(name: &'static str, partition: i32, records: Bytes) -> ProduceRequest {
    let data = PartitionProduceData::default()
        .with_index(partition)
        .with_records(Some(records));
    let topic = TopicProduceData::default()
        .with_name(topic(name))
        .with_partition_data(vec![data]);
    ProduceRequest::default()
        .with_acks(-1)
        .with_timeout_ms(30_000)
        .with_topic_data(vec![topic])
}

fn fetch(offset: i64) -> FetchRequest {
    let partition = FetchPartition::default()
        .with_fetch_offset(offset)
        .with_partition_max_bytes(64 << 20);
    let topic = FetchTopic::default()
        .with_topic(topic("big"))
        .with_partitions(vec![partition]);
    FetchRequest::default()
        .with_replica_id((-1).into())
        .with_max_wait_ms(100)
        .with_min_bytes(1)
        .with_max_bytes(64 << 20)
        .with_session_epoch(-1)
        .with_topics(vec![topic])
}

fn frame<R: Request>(version: i16, request: &R) -> Vec<u8> {
    let mut body = BytesMut::new();
    RequestHeader::default()
        .with_request_api_key(R::KEY)
        .with_request_api_version(version)
        .encode(&mut body, R::header_version(version))
        .unwrap();
    request.encode(&mut body, version).unwrap();
    let mut frame = (body.len() as u32).to_be_bytes().to_vec();
    frame.extend_from_slice(&body);
    frame
}

/// Asks again and again, and takes nothing.
fn deaf(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    for _ in 0..ASKED {
        stream.write_all(&frame(11, &fetch(0))).unwrap();
    }
    stream
}

/// What an operator sees.
fn stats(server: &Server) -> Stats {
    let output = Command::new(env!("CARGO_BIN_EXE_taffrail"))
        .args(["stats", "--json", "--socket"])
        .arg(server.socket())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn check(memory: &MemoryStats) {
    for account in &memory.accounts {
        assert!(
            account.used <= account.limit && account.over == 0 || account.name == "rest",
            "{account:?}"
        );
    }
    let others = memory
        .accounts
        .iter()
        .filter(|account| account.name != "rest");
    let accounted: u64 = others.map(|account| account.used).sum();
    assert!(accounted.abs_diff(memory.taken) <= BOUND, "{memory:?}");
    assert!(memory.taken <= memory.budget, "{memory:?}");
    assert!(
        memory
            .heap
            .is_some_and(|heap| heap > 0 && heap <= memory.anonymous + BOUND)
    );
}

#[test]
fn a_small_budget_holds_under_load_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let address = support::free_address();
    let mut server = Server::start(
        folder.path(),
        None,
        "segment_size = \"4MiB\"\n",
        &format!(
            "[kafka]\nlisten = [\"{address}\"]\nmax_request = \"1MiB\"\nauto_create_topics = false\n{MEMORY}\
             [[topic]]\nname = \"many\"\npartitions = {PARTITIONS}\n[[topic]]\nname = \"big\"\ncompression = \"none\"\n"
        ),
    );
    let output = support::run(
        env!("CARGO_BIN_EXE_taffrail"),
        &["check", "--config", server.config_path().to_str().unwrap()],
    );
    for part in [
        "memory: 192.0 MiB (as configured)",
        "kafka_answers",
        "9.0 MiB",
        "sum",
    ] {
        assert!(output.contains(part), "no {part:?} in {output}");
    }

    let mut filler = Connection::open(address).unwrap();
    let mut noise = rand::rngs::StdRng::seed_from_u64(7);
    for _ in 0..BIG / BIG_BATCH {
        let mut value = vec![0; BIG_BATCH];
        noise.fill_bytes(&mut value);
        let answer = filler
            .call(7, &produce("big", 0, batch(&value, None)))
            .unwrap();
        assert_eq!(answer.responses[0].partition_responses[0].error_code, 0);
    }

    let acknowledged: Mutex<BTreeMap<u32, Vec<Vec<u8>>>> = Mutex::default();
    let done = AtomicBool::new(false);
    let deaf: Vec<TcpStream> = (0..DEAF).map(|_| deaf(address)).collect();
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let acknowledged = &acknowledged;
                scope.spawn(move || {
                    let mut connection = Connection::open(address).unwrap();
                    for number in 0..PRODUCERS {
                        let id = i64::from(writer * PRODUCERS + number + 1);
                        let partition = (writer + number * 7) % PARTITIONS;
                        let value = format!("of producer {id}").into_bytes();
                        let request = produce("many", partition as i32, batch(&value, Some(id)));
                        let answer = connection.call(7, &request).unwrap();
                        let part = &answer.responses[0].partition_responses[0];
                        assert_eq!(part.error_code, 0);
                        let mut all = acknowledged.lock().unwrap();
                        all.entry(partition).or_default().push(value);
                    }
                })
            })
            .collect();
        let watcher = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                check(&stats(&server).memory.unwrap());
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        });
        for writer in writers {
            writer.join().unwrap();
        }
        // Whoever takes nothing has filled the share of all, and is closed for it.
        wait_until("deaf consumers to be closed", || {
            let kafka = stats(&server).kafka.unwrap();
            kafka
                .closed
                .get("stalled")
                .is_some_and(|&closed| closed > 0)
        });
        // One that reads gets everything.
        let mut reader = Connection::open(address).unwrap();
        let (mut bytes, mut offset) = (0, 0);
        while bytes < BIG / BIG_BATCH * BIG_BATCH {
            let answer = reader.call(11, &fetch(offset)).unwrap();
            let part = &answer.responses[0].partitions[0];
            assert_eq!(part.error_code, 0);
            let mut rest = &part.records.as_ref().unwrap()[..];
            while !rest.is_empty() {
                let header = taffrail::wire::record_batch::parse_header(rest).unwrap();
                rest = &rest[header.total_len()..];
                bytes += BIG_BATCH * header.records_count as usize;
                offset = header.next_offset();
            }
        }
        done.store(true, Ordering::Relaxed);
        watcher.join().unwrap();
    });
    drop(deaf);

    let memory = stats(&server).memory.unwrap();
    check(&memory);
    let of = |name| memory.account(name).unwrap();
    assert!(of("kafka_answers").refused > 0, "{memory:?}");
    assert!(
        of("kafka_answers").peak <= of("kafka_answers").limit,
        "{memory:?}"
    );
    assert!(of("dedupe").refused > 0, "{memory:?}");
    assert!(
        of("partitions").used >= u64::from(PARTITIONS) * 512,
        "{memory:?}"
    );
    assert!(
        of("offset_index").peak > 0 && of("flush_merge").peak > 0,
        "{memory:?}"
    );
    // What there is no room for is refused with the reason.
    let change = TopicChange::Create {
        name: "more".to_owned(),
        partitions: 90_000,
        settings: BTreeMap::new(),
    };
    let refused = server.client().change(change).unwrap_err().to_string();
    assert!(
        refused.contains("there is no memory for 90000 more partitions"),
        "{refused}"
    );

    server.kill();
    server.restart();
    let all = acknowledged.into_inner().unwrap();
    assert_eq!(
        all.values().map(Vec::len).sum::<usize>(),
        (WRITERS * PRODUCERS) as usize
    );
    for (partition, mut expected) in all {
        let records = server.values("many", partition, 0);
        let mut stored: Vec<Vec<u8>> = records.into_iter().map(|(_, value)| value).collect();
        stored.sort();
        expected.sort();
        assert_eq!(stored, expected, "partition {partition}");
    }
    check(&stats(&server).memory.unwrap());
    server.stop();
}
