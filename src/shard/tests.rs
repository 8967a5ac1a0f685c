//! The shard as a whole, on a real log in a temporary folder, against a model: offsets are dense,
//! nothing is stored twice, acknowledgements are honest, every message is accounted for and every
//! buffer released exactly once, over any number of restarts.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    rc::Rc,
    sync::{Arc, atomic::Ordering},
};

use crossbeam_queue::ArrayQueue;
use proptest::prelude::*;

use super::{
    Ack, BatchBuffer, GapReport, Inbound, Kind, Now, PRODUCE_HEADER_LEN, REPLY_TO_LEN, Recovered,
    Release, ReplyTo, Shard, ShardConfig, ShardControl,
    link::{self, BatchLink},
};
use crate::memory::spsc;
use crate::storage::lsm::codec;
use crate::storage::{
    LogReader, PartitionKey, Replay, WalConfig, WalState, WalWriter,
    wal::{LogId, segment::shard_dir},
};
use crate::wire::{
    datagram::{ErrorCode, ProduceHeader},
    record_batch::{self, BatchWriter, Records},
};

/// Buffers under way by their handle; releasing an unknown one fails the test.
#[derive(Clone, Default)]
struct Pool(Rc<RefCell<HashMap<usize, Box<[u8]>>>>);

impl Pool {
    fn put(&self, bytes: Vec<u8>) -> (usize, *const u8) {
        let bytes = bytes.into_boxed_slice();
        let data = bytes.as_ptr();
        let mut pool = self.0.borrow_mut();
        // Handles come in no order and are reused, like addresses.
        let owner = (0..).find(|i| !pool.contains_key(i)).unwrap();
        pool.insert(owner, bytes);
        (owner, data)
    }
}

impl Release for Pool {
    fn release(&mut self, owners: &[usize]) {
        for owner in owners {
            let mut bytes = self
                .0
                .borrow_mut()
                .remove(owner)
                .expect("released twice or never handed over");
            bytes.fill(0xee); // a later look would be noticed
        }
    }
}

/// Offset and value of a record; `None` for control records.
type Stored = (i64, Option<Vec<u8>>);

/// What the log holds of each partition, as recovery sees it.
#[derive(Default)]
struct Contents {
    records: BTreeMap<PartitionKey, Vec<Stored>>,
}

impl Contents {
    /// Reads the log back from its files, as any reader would.
    fn read(dir: &Place, partitions: u32) -> Contents {
        let mut contents = Contents::default();
        let id = LogId {
            store: STORE,
            shard: 0,
        };
        let mut reader = LogReader::of_files(&shard_dir(dir.disk.path(), 0), id).unwrap();
        for key in keys(partitions) {
            let (mut from, end) = reader.bounds(key).unwrap();
            assert_eq!(from, 0);
            while from < end {
                let mut bytes = Vec::new();
                let outcome = reader.read(key, from, 1 << 20, &mut bytes).unwrap();
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let len = record_batch::parse_header(rest).unwrap().total_len();
                    contents.batch(key, &rest[..len]);
                    rest = &rest[len..];
                }
                from = outcome.next_offset;
            }
        }
        contents
    }

    fn batch(&mut self, key: PartitionKey, batch: &[u8]) {
        let header = record_batch::validate(batch).expect("the log holds valid batches");
        let mut scratch = Vec::new();
        let batch = codec::plain(batch, &mut scratch).expect("a codec that is read here");
        let list = self.records.entry(key).or_default();
        for record in Records::new(batch).unwrap() {
            let record = record.unwrap();
            let value = (!header.is_control()).then(|| record.value.unwrap().to_vec());
            list.push((record.offset, value));
        }
    }
}

/// The store that the tests' logs belong to.
const STORE: u128 = 0x5eed;

const TOPIC: u32 = 77;

struct Bench {
    shard: Shard<Pool>,
    pool: Pool,
    inputs: Vec<spsc::Producer<Inbound>>,
    acks: spsc::Consumer<Ack>,
    gaps: Arc<ArrayQueue<GapReport>>,
    control: ShardControl,
    link: BatchLink,
    contents: Contents,
    mono_ns: u64,
}

/// Where a log lies, and its staging file, which must be in memory.
struct Place {
    disk: tempfile::TempDir,
    memory: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        Place {
            disk: tempfile::tempdir().unwrap(),
            memory: tempfile::tempdir_in("/dev/shm").unwrap(),
        }
    }
}

fn keys(partitions: u32) -> Vec<PartitionKey> {
    (0..partitions)
        .map(|partition| PartitionKey {
            topic: TOPIC,
            partition,
        })
        .collect()
}

impl Bench {
    fn open(dir: &Place, partitions: u32, max_pending_acks: usize) -> Bench {
        let gaps = Arc::new(ArrayQueue::new(64));
        let config = ShardConfig {
            partitions: keys(partitions),
            max_producers: 64,
            max_pending_acks,
            gaps: gaps.clone(),
            wakes: Vec::new(),
        };
        let mut recovered = Recovered::new(&config);
        let wal = open_wal(dir, &mut recovered);
        let contents = Contents::read(dir, partitions);
        assert_eq!(recovered.malformed(), 0);
        let (inputs, mut rings): (Vec<_>, Vec<_>) = (0..2).map(|_| spsc::ring(1024)).unzip();
        let (ack_tx, acks) = spsc::ring(4096);
        let (link, end) = link::link(1);
        rings.push(end.input);
        let pool = Pool::default();
        let outlets = vec![ack_tx, end.outlet];
        let shard = Shard::new(config, recovered, wal, rings, outlets, pool.clone());
        Bench {
            pool,
            inputs,
            acks,
            gaps,
            control: shard.control(None),
            link,
            shard,
            contents,
            mono_ns: 1,
        }
    }

    fn send(&mut self, partition: u32, kind: Kind, bytes: Vec<u8>, at: usize, acks: i8) {
        let len = (bytes.len() - at) as u16;
        let (owner, start) = self.pool.put(bytes);
        // SAFETY: the pool keeps the bytes until they are released; `at` leaves room for what
        // lies before a Produce batch.
        let inbound = unsafe {
            let data = start.add(at);
            Inbound::new(
                owner,
                data,
                len,
                1_700_000_000_123_456_789,
                partition,
                kind,
                acks,
            )
        };
        assert!(self.inputs[partition as usize % 2].push(inbound));
    }

    fn raw(&mut self, partition: u32, value: &[u8]) {
        self.send(partition, Kind::Raw, value.to_vec(), 0, 0);
    }

    fn lines(&mut self, partition: u32, text: &[u8]) {
        self.send(partition, Kind::Lines, text.to_vec(), 0, 0);
    }

    fn produce(&mut self, partition: u32, request_id: u64, acks: i8, batch: &[u8]) {
        let at = REPLY_TO_LEN + PRODUCE_HEADER_LEN;
        let mut bytes = vec![0; at + batch.len()];
        ProduceHeader {
            topic_id: TOPIC,
            partition,
            acks,
            request_id,
        }
        .encode(&mut bytes[REPLY_TO_LEN..]);
        bytes[at..].copy_from_slice(batch);
        // SAFETY: `at` bytes lie before the batch and are ours.
        unsafe { reply().write_before(bytes[at..].as_mut_ptr()) };
        self.send(partition, Kind::Produce, bytes, at, acks);
    }

    fn poll(&mut self) -> usize {
        self.mono_ns += 100_000;
        self.shard.poll(Now {
            mono_ns: self.mono_ns,
            unix_ns: 1_700_000_000_200_000_000,
        })
    }

    /// Polls until nothing is held and everything is durable.
    fn settle(&mut self) {
        let guard = std::time::Instant::now();
        loop {
            self.poll();
            let stats = self.shard.partition_stats();
            let durable = stats.iter().all(|p| p.high_watermark() == p.log_end());
            if self.pool.0.borrow().is_empty()
                && durable
                && self.gaps.is_empty()
                && self.shard.is_idle()
            {
                return;
            }
            assert!(guard.elapsed().as_secs() < 60, "the log does not settle");
            std::thread::yield_now();
        }
    }

    fn answers(&mut self) -> Vec<Ack> {
        std::iter::from_fn(|| self.acks.pop()).collect()
    }

    fn close(mut self) {
        let start = std::time::Instant::now();
        self.shard
            .drain_and_close(|| Now {
                mono_ns: start.elapsed().as_nanos() as u64,
                unix_ns: 1_700_000_000_300_000_000,
            })
            .unwrap();
        assert!(self.pool.0.borrow().is_empty(), "a buffer was not released");
    }
}

fn reply() -> ReplyTo {
    ReplyTo {
        rx: 0,
        ip_version: 4,
        port: 3,
        mac: [2, 0, 0, 0, 0, 9],
        vlan: ReplyTo::NO_VLAN,
        peer_ip: [7; 16],
        local_ip: [8; 16],
        peer_port: 4000,
        local_port: 5000,
        reserved: [0; 16],
    }
}

fn batch(id: i64, epoch: i16, sequence: i32, values: &[Vec<u8>]) -> Vec<u8> {
    let mut buf = vec![0; 256 + values.iter().map(|v| v.len() + 64).sum::<usize>()];
    let mut writer =
        BatchWriter::new(&mut buf, 1_600_000_000_000).with_producer(id, epoch, sequence);
    for value in values {
        writer.push(1_600_000_000_000, None, Some(value)).unwrap();
    }
    let len = writer.finish(0);
    buf.truncate(len);
    buf
}

fn values(contents: &Contents, partition: u32) -> Vec<Vec<u8>> {
    let key = PartitionKey {
        topic: TOPIC,
        partition,
    };
    let list = contents.records.get(&key).cloned().unwrap_or_default();
    for (at, (offset, _)) in list.iter().enumerate() {
        assert_eq!(*offset, at as i64, "offsets are dense");
    }
    list.into_iter().filter_map(|(_, value)| value).collect()
}

#[test]
fn raw_lines_and_batches_are_stored_in_order_and_answered() {
    let dir = Place::new();
    let mut bench = Bench::open(&dir, 3, 16);
    bench.raw(0, b"one");
    bench.raw(1, b"other");
    bench.lines(0, b"two\r\n\nthree\n\r\nfour");
    bench.produce(
        0,
        900,
        1,
        &batch(5, 0, 0, &[b"five".to_vec(), b"six".to_vec()]),
    );
    bench.raw(0, b"");
    bench.lines(2, b"\n\r\n");
    bench.produce(0, 901, -1, &batch(5, 0, 2, &[b"seven".to_vec()]));
    bench.settle();
    let mut answers = bench.answers();
    answers.sort_by_key(|ack| ack.entry.request_id);
    assert_eq!(answers.len(), 2);
    for (ack, (id, offset, sequence)) in answers.iter().zip([(900, 4, 0), (901, 7, 2)]) {
        assert_eq!(ack.reply, reply());
        assert_eq!(ack.entry.request_id, id);
        assert_eq!((ack.entry.topic_id, ack.entry.partition), (TOPIC, 0));
        assert_eq!(ack.entry.base_offset, offset);
        assert_eq!(ack.entry.base_sequence, sequence);
        assert_eq!(ack.entry.producer_epoch, 0);
        assert_eq!(ack.entry.error, ErrorCode::None);
        assert_eq!(ack.entry.credit, 32);
    }
    let stats = bench.shard.partition_stats();
    let counts: Vec<_> = stats
        .iter()
        .map(|p| (p.stored.get(), p.log_end()))
        .collect();
    assert_eq!(counts, [(8, 8), (1, 1), (0, 0)]);
    bench.close();
    let again = Bench::open(&dir, 3, 16);
    let expected: Vec<Vec<u8>> = ["one", "two", "three", "four", "five", "six", "", "seven"]
        .iter()
        .map(|s| s.as_bytes().to_vec())
        .collect();
    assert_eq!(values(&again.contents, 0), expected);
    assert_eq!(values(&again.contents, 1), [b"other".to_vec()]);
    assert_eq!(again.shard.partition_stats()[0].high_watermark(), 8);
}

#[test]
fn acks_all_waits_for_the_disk_and_so_does_a_retransmission() {
    let dir = Place::new();
    let mut bench = Bench::open(&dir, 1, 16);
    bench.settle();
    let first = batch(9, 0, 0, &[b"x".to_vec()]);
    bench.produce(0, 1, -1, &first);
    bench.produce(0, 2, -1, &first);
    bench.produce(0, 3, 1, &first);
    // Storing is one round; every answer given is checked against what is durable then.
    let mut seen = Vec::new();
    for _ in 0..100_000 {
        bench.poll();
        let durable = bench.shard.partition_stats()[0].high_watermark();
        for ack in bench.answers() {
            assert!(ack.entry.request_id == 3 || durable == 1, "told too early");
            assert_eq!(ack.entry.base_offset, 0);
            seen.push((ack.entry.request_id, ack.entry.error));
        }
        if seen.len() == 3 {
            break;
        }
        std::thread::yield_now();
    }
    seen.sort_by_key(|&(id, _)| id);
    assert_eq!(
        seen,
        [
            (1, ErrorCode::None),
            (2, ErrorCode::Duplicate),
            (3, ErrorCode::Duplicate)
        ]
    );
    let stats = bench.shard.partition_stats();
    assert_eq!((stats[0].stored.get(), stats[0].duplicate.get()), (1, 2));
    bench.close();
}

#[test]
fn refusals_say_why_and_are_counted_by_claimed_records() {
    let dir = Place::new();
    let mut bench = Bench::open(&dir, 2, 16);
    let two = |epoch, sequence| batch(5, epoch, sequence, &[b"a".to_vec(), b"b".to_vec()]);
    bench.produce(0, 0, 1, &two(1, 0));
    bench.produce(0, 1, 1, &two(1, 4));
    bench.produce(0, 2, 1, &two(0, 2));
    let mut damaged = two(1, 2);
    *damaged.last_mut().unwrap() ^= 1;
    bench.produce(0, 3, 1, &damaged);
    bench.produce(0, 4, 3, &two(1, 2));
    let mut compressed = two(1, 2);
    compressed[22] |= 3;
    let crc = crc32c::crc32c(&compressed[21..]);
    compressed[17..21].copy_from_slice(&crc.to_be_bytes());
    bench.produce(0, 5, 1, &compressed);
    bench.produce(0, 6, 0, &two(1, 9)); // also acks=0 is told of a refusal
    bench.produce(0, 7, 1, &[]);
    bench.produce(9, 8, 1, &two(1, 0));
    bench.raw(9, b"stray");
    bench.settle();
    let mut answers: Vec<_> = bench
        .answers()
        .iter()
        .map(|ack| (ack.entry.request_id, ack.entry.error))
        .collect();
    answers.sort_by_key(|&(id, _)| id);
    assert_eq!(
        answers,
        [
            (0, ErrorCode::None),
            (1, ErrorCode::OutOfOrder),
            (2, ErrorCode::Fenced),
            (3, ErrorCode::InvalidBatch),
            (4, ErrorCode::InvalidAcks),
            (5, ErrorCode::UnsupportedCodec),
            (6, ErrorCode::OutOfOrder),
            (7, ErrorCode::InvalidBatch),
            (8, ErrorCode::UnknownPartition),
        ]
    );
    let stats = bench.shard.partition_stats();
    assert_eq!(stats[0].stored.get(), 2);
    assert_eq!(stats[0].refused.get(ErrorCode::OutOfOrder), 4);
    assert_eq!(stats[0].refused.get(ErrorCode::Fenced), 2);
    assert_eq!(stats[0].refused.total(), 13);
    let shard = bench.shard.stats();
    assert_eq!(shard.stray.refused.get(ErrorCode::UnknownPartition), 2);
    assert_eq!(shard.stray.dropped.get(ErrorCode::UnknownPartition), 1);
    bench.close();
}

#[test]
fn too_many_waiting_for_the_disk_are_refused_as_busy() {
    let dir = Place::new();
    let mut bench = Bench::open(&dir, 1, 4);
    for i in 0..10 {
        bench.produce(0, i as u64, -1, &batch(5, 0, i, &[b"v".to_vec()]));
    }
    bench.settle();
    let answers = bench.answers();
    let of = |code| answers.iter().filter(|ack| ack.entry.error == code).count();
    // Those behind the refused one do not follow what is stored, unless the queue was full still.
    assert_eq!(of(ErrorCode::None), 4);
    assert_eq!(of(ErrorCode::Busy), 6);
    assert_eq!(
        bench.shard.partition_stats()[0]
            .refused
            .get(ErrorCode::Busy),
        6
    );
    bench.close();
}

#[test]
fn a_flood_is_held_back_and_loses_nothing() {
    let dir = Place::new();
    let mut bench = Bench::open(&dir, 2, 16);
    let value = vec![b'z'; 8000];
    let mut sent = 0u64;
    for _ in 0..40 {
        for i in 0..100 {
            if bench.inputs[i % 2].free() > 0 {
                bench.raw(i as u32 % 2, &value);
                sent += 1;
            }
        }
        bench.poll();
    }
    bench.settle();
    let stats = bench.shard.partition_stats();
    assert_eq!(stats.iter().map(|p| p.stored.get()).sum::<u64>(), sent);
    assert!(stats.iter().all(|p| p.dropped.total() == 0));
    bench.close();
}

#[test]
fn losses_upstream_leave_a_gap_record() {
    let dir = Place::new();
    let mut bench = Bench::open(&dir, 2, 16);
    let report = GapReport {
        partition: 1,
        reason: "ring_full",
        count: 12,
        from_ms: 5,
        to_ms: 6,
        port: 0,
    };
    bench.raw(1, b"before");
    bench.poll();
    bench.gaps.push(report).unwrap();
    bench
        .gaps
        .push(GapReport {
            partition: 2,
            ..report
        })
        .unwrap();
    bench.poll();
    bench.raw(1, b"after");
    bench.settle();
    let stats = bench.shard.partition_stats();
    assert_eq!(
        (
            stats[1].gaps.get(),
            stats[1].stored.get(),
            stats[1].log_end()
        ),
        (1, 2, 3)
    );
    assert_eq!(bench.shard.stats().gaps_lost.get(), 1);
    bench.close();
    let again = Bench::open(&dir, 2, 16);
    assert_eq!(
        values(&again.contents, 1),
        [b"before".to_vec(), b"after".to_vec()]
    );
}

#[test]
fn a_partition_no_longer_served_keeps_its_offset() {
    let dir = Place::new();
    let mut bench = Bench::open(&dir, 3, 16);
    for i in 0..3 {
        bench.raw(2, format!("v{i}").as_bytes());
    }
    bench.close();
    for _ in 0..2 {
        let mut fewer = Bench::open(&dir, 1, 16);
        fewer.raw(0, b"here");
        fewer.close();
    }
    let again = Bench::open(&dir, 3, 16);
    assert_eq!(again.shard.partition_stats()[2].log_end(), 3);
    assert_eq!(again.shard.partition_stats()[0].log_end(), 2);
}

/// One step of the model-based test.
#[derive(Clone, Debug)]
enum Step {
    Raw {
        partition: u32,
        len: usize,
    },
    Lines {
        partition: u32,
        lines: Vec<u8>,
    },
    /// The next batch of a producer, or an old one again, or one with a hole before it.
    Produce {
        partition: u32,
        producer: i64,
        acks: i8,
        records: usize,
        how: How,
    },
    Gap {
        partition: u32,
    },
    Poll,
    Settle,
    /// Gone without a word, as after SIGKILL; then opened again.
    Kill,
    Restart,
}

#[derive(Clone, Copy, Debug)]
enum How {
    Next,
    Again(usize),
    Skip,
    NewEpoch,
    OldEpoch,
}

fn step(partitions: u32) -> impl Strategy<Value = Step> {
    let how = prop_oneof![
        6 => Just(How::Next),
        3 => (0usize..6).prop_map(How::Again),
        1 => Just(How::Skip),
        1 => Just(How::NewEpoch),
        1 => Just(How::OldEpoch),
    ];
    prop_oneof![
        6 => (0..partitions, 0usize..3000).prop_map(|(partition, len)| Step::Raw { partition, len }),
        2 => (0..partitions, prop::collection::vec(prop::sample::select(b"ab\r\n\n".to_vec()), 0..60))
            .prop_map(|(partition, lines)| Step::Lines { partition, lines }),
        10 => (0..partitions, 0i64..3, -1i8..2, 1usize..5, how).prop_map(
            |(partition, producer, acks, records, how)| Step::Produce { partition, producer, acks, records, how }
        ),
        1 => (0..partitions).prop_map(|partition| Step::Gap { partition }),
        6 => Just(Step::Poll),
        1 => Just(Step::Settle),
        1 => Just(Step::Kill),
        1 => Just(Step::Restart),
    ]
}

/// What a producer knows: its epoch and the batches it sent in it.
#[derive(Clone, Default)]
struct Sender {
    epoch: i16,
    next: i32,
    sent: Vec<(i32, Vec<Vec<u8>>)>,
}

#[derive(Default)]
struct Model {
    senders: HashMap<(u32, i64), Sender>,
    requests: HashMap<u64, Request>,
    next_request: u64,
    next_value: u64,
    /// Values told to be stored: (partition, offset) → value.
    acknowledged: HashMap<(u32, i64), Vec<u8>>,
    /// By partition: messages handed to the shard in this life of it.
    given: Vec<u64>,
}

#[derive(Clone)]
struct Request {
    partition: u32,
    acks: i8,
    values: Vec<Vec<u8>>,
    /// A valid answer to it may be an offset.
    producer: (u32, i64),
    epoch: i16,
}

impl Model {
    fn value(&mut self, len: usize) -> Vec<u8> {
        self.next_value += 1;
        let mut value = format!("{:08}", self.next_value).into_bytes();
        value.resize(len.max(8), b'.');
        value
    }

    /// Takes the answers so far and checks each for honesty.
    fn answers(&mut self, bench: &mut Bench) {
        let stats = bench.shard.partition_stats();
        for ack in bench.answers() {
            let request = &self.requests[&ack.entry.request_id];
            assert_eq!(ack.entry.partition, request.partition);
            let stats = &stats[request.partition as usize];
            match ack.entry.error {
                ErrorCode::None | ErrorCode::Duplicate => {
                    if ack.entry.base_offset < 0 {
                        assert_eq!(ack.entry.error, ErrorCode::Duplicate);
                        continue;
                    }
                    let end = ack.entry.base_offset + request.values.len() as i64;
                    let limit = if request.acks == -1 {
                        stats.high_watermark()
                    } else {
                        stats.log_end()
                    };
                    assert!(end <= limit, "told of {end} where the log is at {limit}");
                    for (offset, value) in (ack.entry.base_offset..).zip(&request.values) {
                        let before = self
                            .acknowledged
                            .insert((request.partition, offset), value.clone());
                        assert!(before.is_none_or(|before| before == *value));
                    }
                }
                ErrorCode::OutOfOrder | ErrorCode::Fenced => {
                    let sender = &self.senders[&request.producer];
                    // The producer sends again from where it knows; a new epoch starts afresh.
                    assert!(request.epoch <= sender.epoch);
                }
                other => panic!("answered {other:?}"),
            }
        }
    }

    /// After a round of an idle shard everything given is in one counter.
    fn accounts(&self, bench: &Bench) {
        for (partition, stats) in bench.shard.partition_stats().iter().enumerate() {
            let sum = stats.stored.get()
                + stats.duplicate.get()
                + stats.refused.total()
                + stats.dropped.total();
            assert_eq!(sum, self.given[partition], "partition {partition}");
            assert_eq!(stats.dropped.total(), 0);
        }
    }

    fn check_log(&self, contents: &Contents, partitions: u32) {
        let mut all = std::collections::HashSet::new();
        for partition in 0..partitions {
            for value in values(contents, partition) {
                // Lines are not unique by nature; the others are.
                if value.len() >= 8 {
                    assert!(all.insert(value), "stored twice");
                }
            }
        }
        for ((partition, offset), value) in &self.acknowledged {
            let key = PartitionKey {
                topic: TOPIC,
                partition: *partition,
            };
            assert_eq!(
                contents.records[&key][*offset as usize].1.as_ref(),
                Some(value)
            );
        }
    }
}

fn play(dir: &Place, steps: &[Step]) {
    const PARTITIONS: u32 = 3;
    let mut bench = Bench::open(dir, PARTITIONS, 64);
    let mut model = Model {
        given: vec![0; PARTITIONS as usize],
        ..Model::default()
    };
    for step in steps {
        if bench.inputs.iter_mut().any(|input| input.free() < 8) {
            bench.settle();
        }
        match step {
            Step::Raw { partition, len } => {
                let value = model.value(*len);
                bench.raw(*partition, &value);
                model.given[*partition as usize] += 1;
            }
            Step::Lines { partition, lines } => {
                bench.lines(*partition, lines);
                let messages = lines
                    .split(|&b| b == b'\n')
                    .filter(|line| !line.is_empty() && *line != b"\r")
                    .count();
                model.given[*partition as usize] += messages as u64;
            }
            Step::Produce {
                partition,
                producer,
                acks,
                records,
                how,
            } => {
                let key = (*partition, *producer);
                let mut sender = model.senders.get(&key).cloned().unwrap_or_default();
                let fresh: Vec<_> = (0..*records).map(|_| model.value(8)).collect();
                let (epoch, sequence, values) = match *how {
                    How::Again(back) if back < sender.sent.len() => {
                        let (sequence, values) = sender.sent[sender.sent.len() - 1 - back].clone();
                        (sender.epoch, sequence, values)
                    }
                    How::Skip => (sender.epoch, sender.next + 7, fresh),
                    How::OldEpoch if sender.epoch > 0 => (sender.epoch - 1, 0, fresh),
                    How::NewEpoch => {
                        sender = Sender {
                            epoch: sender.epoch + 1,
                            ..Sender::default()
                        };
                        sender.next = *records as i32;
                        sender.sent.push((0, fresh.clone()));
                        (sender.epoch, 0, fresh)
                    }
                    _ => {
                        let sequence = sender.next;
                        sender.next += *records as i32;
                        sender.sent.push((sequence, fresh.clone()));
                        (sender.epoch, sequence, fresh)
                    }
                };
                model.senders.insert(key, sender);
                model.next_request += 1;
                let request = Request {
                    partition: *partition,
                    acks: *acks,
                    values: values.clone(),
                    producer: key,
                    epoch,
                };
                model.given[*partition as usize] += values.len() as u64;
                model.requests.insert(model.next_request, request);
                bench.produce(
                    *partition,
                    model.next_request,
                    *acks,
                    &batch(*producer, epoch, sequence, &values),
                );
            }
            Step::Gap { partition } => {
                let report = GapReport {
                    partition: *partition,
                    reason: "ring_full",
                    count: 3,
                    from_ms: 1,
                    to_ms: 2,
                    port: 0,
                };
                let _ = bench.gaps.push(report);
            }
            Step::Poll => {
                bench.poll();
                model.answers(&mut bench);
            }
            Step::Settle => {
                bench.settle();
                model.answers(&mut bench);
                model.accounts(&bench);
            }
            Step::Kill => {
                model.answers(&mut bench);
                drop(bench);
                bench = Bench::open(dir, PARTITIONS, 64);
                model.check_log(&bench.contents, PARTITIONS);
                model.given.fill(0);
                // The producers send again what the shard may never have seen.
                for ((partition, producer), sender) in &model.senders {
                    for (sequence, values) in &sender.sent {
                        model.next_request += 1;
                        let request = Request {
                            partition: *partition,
                            acks: -1,
                            values: values.clone(),
                            producer: (*partition, *producer),
                            epoch: sender.epoch,
                        };
                        model.requests.insert(model.next_request, request);
                        model.given[*partition as usize] += values.len() as u64;
                        if bench.inputs.iter_mut().any(|input| input.free() < 8) {
                            bench.settle();
                        }
                        bench.produce(
                            *partition,
                            model.next_request,
                            -1,
                            &batch(*producer, sender.epoch, *sequence, values),
                        );
                    }
                }
            }
            Step::Restart => {
                bench.settle();
                model.answers(&mut bench);
                model.accounts(&bench);
                bench.close();
                bench = Bench::open(dir, PARTITIONS, 64);
                model.check_log(&bench.contents, PARTITIONS);
                model.given.fill(0);
            }
        }
    }
    bench.settle();
    model.answers(&mut bench);
    model.accounts(&bench);
    bench.close();
    let last = Bench::open(dir, PARTITIONS, 64);
    model.check_log(&last.contents, PARTITIONS);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn agrees_with_the_model(steps in prop::collection::vec(step(3), 1..120)) {
        let dir = Place::new();
        play(&dir, &steps);
    }
}

/// A small log, so that slots run out and segments end.
fn open_wal(dir: &Place, replay: &mut impl Replay) -> WalWriter {
    let config = WalConfig {
        segment_size: 1 << 20,
        prepared_segments: 2,
        staging_size: 512 << 10,
        commit_size: 64 << 10,
        staging_dir: Some(dir.memory.path().to_owned()),
        ..WalConfig::new(dir.disk.path(), STORE)
    };
    let (wal, _, _) = WalWriter::open(&config, 0, replay).unwrap();
    assert_eq!(wal.state(), WalState::Running);
    wal
}

/// A batch for a kernel thread's link.
fn plain(producer: (i64, i16, i32), values: &[&[u8]]) -> BatchBuffer {
    let mut buf = vec![0; 4096];
    let mut writer = BatchWriter::new(&mut buf, 7);
    if producer.0 >= 0 {
        writer = writer.with_producer(producer.0, producer.1, producer.2);
    }
    for value in values {
        writer.push(7, None, Some(value)).unwrap();
    }
    let len = writer.finish(0);
    BatchBuffer::new(&buf[..len])
}

impl Bench {
    fn batch(&mut self, buffer: BatchBuffer, tag: u64, partition: u32, acks: i8) {
        self.link.send(buffer, tag, partition, 5, acks).unwrap();
    }

    /// Tag, offset and error of the batches answered, by tag.
    fn said(&mut self) -> Vec<(u64, i64, ErrorCode)> {
        let mut all = Vec::new();
        self.link
            .answers(|answer| all.push((answer.tag, answer.base_offset, answer.error)));
        all.sort_by_key(|answer| answer.0);
        all
    }
}

const NONE: ErrorCode = ErrorCode::None;
const NOBODY: (i64, i16, i32) = (-1, -1, -1);

#[test]
fn batches_of_kernel_threads_are_stored_and_answered_at_every_level() {
    let dir = Place::new();
    let mut bench = Bench::open(&dir, 1, 64);
    for (tag, acks) in [(10, 0), (11, 1), (12, -1)] {
        bench.batch(plain(NOBODY, &[b"a", b"b"]), tag, 0, acks);
    }
    bench.settle();
    assert_eq!(bench.said(), [(10, 0, NONE), (11, 2, NONE), (12, 4, NONE)]);
    assert_eq!(bench.link.on_their_way(), 0);
    assert!(bench.shard.stats().raised.load(Ordering::Relaxed) > 0);
    // An unknown producer may begin anywhere, as in Kafka; then its sequence counts.
    for (tag, (epoch, sequence)) in (0..).zip([(3, 50), (3, 50), (3, 52), (2, 51), (4, 9), (4, 0)])
    {
        bench.batch(plain((9, epoch, sequence), &[b"x"]), tag, 0, -1);
        bench.settle();
    }
    let expected = [
        (0, 6, NONE),
        (1, 6, ErrorCode::Duplicate),
        (2, -1, ErrorCode::OutOfOrder),
        (3, -1, ErrorCode::Fenced),
        (4, -1, ErrorCode::OutOfOrder),
        (5, 7, NONE),
    ];
    assert_eq!(bench.said(), expected);
    // Sequences wrap.
    bench.batch(plain((8, 0, i32::MAX), &[b"x"]), 0, 0, -1);
    bench.batch(plain((8, 0, 0), &[b"x"]), 1, 0, -1);
    bench.settle();
    assert_eq!(bench.said(), [(0, 8, NONE), (1, 9, NONE)]);
    // A compressed batch counts by its header, not by its bytes.
    let plain_batch = plain(NOBODY, &[&[b'z'; 20][..]; 100]);
    let header = record_batch::parse_header(plain_batch.batch()).unwrap();
    let mut compressor = codec::Compressor::new(codec::Codec::Lz4);
    let compressed = BatchBuffer::new(compressor.batch(&header, &mut plain_batch.batch().to_vec()));
    assert!(compressed.batch().len() < plain_batch.batch().len() / 2);
    bench.batch(compressed, 1, 0, -1);
    bench.settle();
    assert_eq!(bench.said(), [(1, 10, NONE)]);
    let stats = bench.shard.partition_stats();
    assert_eq!((stats[0].stored.get(), stats[0].duplicate.get()), (110, 1));
    // One that no frame can hold.
    let max = bench.shard.wal().unwrap().max_entry();
    let mut large = vec![0; max + 1];
    large[..plain_batch.batch().len()].copy_from_slice(plain_batch.batch());
    let length = (large.len() - 12) as u32;
    large[8..12].copy_from_slice(&length.to_be_bytes());
    bench.batch(BatchBuffer::new(&large), 2, 0, -1);
    bench.settle();
    assert_eq!(bench.said(), [(2, -1, ErrorCode::TooLarge)]);
    bench.close();
    let again = Bench::open(&dir, 1, 64);
    assert_eq!(values(&again.contents, 0).len(), 110);
    assert_eq!(again.shard.partition_stats()[0].high_watermark(), 110);
}

#[test]
fn more_batches_than_may_wait_for_the_disk_are_held_back() {
    let dir = Place::new();
    let mut bench = Bench::open(&dir, 1, 4);
    for tag in 0..link::LINK_BATCHES as u64 {
        bench.batch(plain(NOBODY, &[b"v"]), tag, 0, -1);
    }
    let one_more = bench.link.send(plain(NOBODY, &[b"v"]), 0, 0, 5, -1);
    assert!(one_more.is_err(), "more than the rings hold");
    let guard = std::time::Instant::now();
    let mut offsets = Vec::new();
    while bench.link.on_their_way() > 0 {
        bench.poll();
        bench.link.answers(|answer| {
            assert_eq!(answer.error, NONE);
            offsets.push(answer.base_offset);
        });
        assert!(guard.elapsed().as_secs() < 60);
    }
    assert_eq!(offsets, (0..link::LINK_BATCHES as i64).collect::<Vec<_>>());
    bench.close();
}

#[test]
fn partitions_come_and_go_while_it_runs() {
    let dir = Place::new();
    let mut bench = Bench::open(&dir, 1, 64);
    let gone = ErrorCode::UnknownPartition;
    bench.batch(plain(NOBODY, &[b"c"]), 0, 1, -1);
    bench.settle();
    assert_eq!(bench.said(), [(0, -1, gone)]);
    // More than the tables hold; messages sent at once find them.
    let added = bench.control.add(&keys(200)[1..]).unwrap();
    assert_eq!(added.len(), 199);
    for &(index, _) in &added {
        bench.batch(plain((5, 0, 0), &[b"d"]), u64::from(index), index, -1);
        bench.raw(index, b"e");
    }
    bench.raw(0, b"f");
    bench.settle();
    let said = bench.said();
    assert_eq!(said.len(), 199);
    assert!(
        said.iter()
            .all(|&(_, offset, error)| offset <= 1 && error == NONE)
    );
    assert!(added.iter().all(|(_, stats)| stats.high_watermark() == 2));
    bench.control.retire(&[1, 7]).unwrap();
    bench.batch(plain((5, 0, 1), &[b"g"]), 7, 7, -1);
    bench.raw(1, b"g");
    bench.batch(plain((5, 0, 1), &[b"g"]), 8, 8, -1);
    bench.settle();
    assert_eq!(bench.said(), [(7, -1, gone), (8, 2, NONE)]);
    assert_eq!(added[6].1.log_end(), 2, "nothing more came to partition 7");
    assert_eq!(bench.shard.stats().stray.dropped.get(gone), 1);
    // An index is not given twice, and the queue of changes does not fill up.
    for i in 0..200u32 {
        let key = PartitionKey {
            topic: TOPIC + 1,
            partition: i,
        };
        assert_eq!(bench.control.add(&[key]).unwrap()[0].0, 200 + i);
        bench.poll();
    }
    bench.close();
    // At the next start they are all known, until their topic is said to be gone.
    let bench = Bench::open(&dir, 200, 64);
    let ends: Vec<i64> = bench
        .shard
        .partition_stats()
        .iter()
        .map(|p| p.log_end())
        .collect();
    assert_eq!((ends[0], ends[1], ends[8], ends[199]), (1, 2, 3, 2));
    bench.close();
}

#[test]
fn a_killed_shard_knows_the_partitions_that_were_added() {
    let dir = Place::new();
    let mut bench = Bench::open(&dir, 1, 64);
    bench.control.add(&keys(3)[1..]).unwrap();
    for partition in 0..3 {
        bench.batch(plain((5, 0, 0), &[b"d", b"e"]), 1, partition, -1);
    }
    bench.settle();
    drop(bench);
    let mut bench = Bench::open(&dir, 3, 64);
    for partition in 0..3 {
        bench.batch(plain((5, 0, 0), &[b"d", b"e"]), 1, partition, -1);
        bench.batch(plain((5, 0, 2), &[b"f"]), 2, partition, -1);
        bench.settle();
        assert_eq!(bench.said(), [(1, 0, ErrorCode::Duplicate), (2, 2, NONE)]);
    }
    bench.close();
}
