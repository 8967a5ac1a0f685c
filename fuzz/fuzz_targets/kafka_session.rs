//! Whole connections of Kafka clients, on the broker's own worker and a shard whose log lies in memory: requests in any
//! pieces, cut off anywhere, of any length and version, in any order, on several connections at a time, by clients that
//! are slow, vanish, log in or do not.
//!
//! The bytes of an input are steps (see [`Step`]). Between them the broker runs as the server's thread runs it, with the
//! limits that the server has by default. Asserted, beside that nothing panics:
//! - it comes to rest, and every request that was begun is answered once its time is over, in the order in which they came;
//! - answers have the length they say;
//! - what it holds in memory stays below [`MEMORY_MAX`], and below [`LEFT_MAX`] when the clients are gone.
#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use libfuzzer_sys::fuzz_target;
use taffrail::broker::configs;
use taffrail::broker::counters::Counters;
use taffrail::broker::groups::{self, Coordinator};
use taffrail::broker::hub::Hub;
use taffrail::broker::producer_ids::ProducerIds;
use taffrail::broker::security::acl::Rules;
use taffrail::broker::security::quota::Quotas;
use taffrail::broker::security::sasl::Users;
use taffrail::broker::security::scram::{Hash, Verifier};
use taffrail::broker::security::{Loaded, Proof, Security};
use taffrail::broker::session::{LENGTH_LEN, Limits};
use taffrail::broker::topics::{Change, OFFSETS_TOPIC, Place, Snapshot, Topic, TopicError, Topics};
use taffrail::broker::waiting::Progress;
use taffrail::broker::worker::{Broker, Connection, Listener, ShardLink, Worker};
use taffrail::memory::budget::Budget;
use taffrail::memory::wake::Wake;
use taffrail::shard::link::link;
use taffrail::shard::{Now, PartitionStats, Recovered, Release, Shard, ShardConfig};
use taffrail::storage::wal::{WalConfig, WalShared, WalWriter};
use taffrail::storage::{LogReader, PartitionKey};
use taffrail::wire::kafka::groups::*;
use taffrail::wire::kafka::{Api, Code, Reader, RequestHeader, Writer};
use taffrail::wire::record_batch::BatchWriter;

/// What each account of memory allows: answers under way and requests stay far below the limit that is asserted.
const PART: u64 = 16 << 20;
/// What a run of one input may hold at most beyond what there was before. A fetch takes an eighth of the 256 MiB that
/// answers may take, and [`CLIENTS`] connections have one each before they are not read on; what has arrived of a
/// request is in the input as well.
const MEMORY_MAX: usize = 96 << 20;
/// What an input may leave when its clients are gone: offsets that it committed, what producers and topics there are,
/// and tables that have grown for them; and windows of the log, which are kept for later readers for a while.
const LEFT_MAX: usize = (4 << 20) + LOG_MAX as usize;
/// Connections at a time.
const CLIENTS: usize = 3;
/// Unsent bytes beyond which a connection's requests are not read, as in the server.
const UNSENT_MAX: usize = 1 << 20;
/// Inputs until everything is made anew, and bytes of the log until then.
const INPUTS: usize = 2000;
const LOG_MAX: u64 = 24 << 20;
/// A guard against hangs, of real time.
const PATIENCE: Duration = Duration::from_secs(8);
/// Partitions that there can be.
const PARTITIONS: u32 = 24;
const STORE: u128 = 0x5e55;
const DAY_NS: u64 = 24 * 3600 * 1_000_000_000;

/// Counts what is allocated.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: memory is the system's, as asked; only sums are kept beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(
            LIVE.fetch_add(layout.size(), Relaxed) + layout.size(),
            Relaxed,
        );
        // SAFETY: as asked.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as asked.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Requests as clients make them, to begin with.
const REQUESTS: [&[u8]; 16] = [
    include_bytes!("../seeds/kafka/alter_configs"),
    include_bytes!("../seeds/kafka/api_versions"),
    include_bytes!("../seeds/kafka/create_partitions"),
    include_bytes!("../seeds/kafka/create_topics"),
    include_bytes!("../seeds/kafka/delete_records"),
    include_bytes!("../seeds/kafka/delete_topics"),
    include_bytes!("../seeds/kafka/describe_configs"),
    include_bytes!("../seeds/kafka/fetch"),
    include_bytes!("../seeds/kafka/join_group"),
    include_bytes!("../seeds/kafka/list_offsets"),
    include_bytes!("../seeds/kafka/metadata"),
    include_bytes!("../seeds/kafka/offset_commit"),
    include_bytes!("../seeds/kafka/offset_fetch"),
    include_bytes!("../seeds/kafka/produce"),
    include_bytes!("../seeds/kafka/several"),
    include_bytes!("../seeds/kafka/sync_group"),
];

/// The topics, on a shard whose partitions are there from the beginning.
struct Catalog {
    state: Mutex<State>,
    stats: Vec<Arc<PartitionStats>>,
}

struct State {
    snapshot: Arc<Snapshot>,
    free: Vec<u32>,
    next_id: u32,
}

fn key(local: u32) -> PartitionKey {
    PartitionKey {
        topic: 100 + local,
        partition: 0,
    }
}

impl Catalog {
    fn change<T>(&self, change: impl FnOnce(&mut State, &mut Vec<Topic>) -> T) -> T {
        let mut state = self.state.lock().unwrap();
        let mut topics = state.snapshot.all().to_vec();
        let result = change(&mut state, &mut topics);
        state.snapshot = Arc::new(Snapshot::new(topics));
        result
    }

    fn take(state: &mut State, count: u32) -> Result<Vec<Place>, TopicError> {
        let rest = state.free.len().checked_sub(count as usize);
        let rest = rest.ok_or_else(|| TopicError::new(Code::PolicyViolation, "too many"))?;
        let place = |local| Place {
            shard: 0,
            local,
            key: key(local),
        };
        Ok(state.free.drain(rest..).map(place).collect())
    }
}

impl Topics for Catalog {
    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.state.lock().unwrap().snapshot)
    }

    fn create(
        &self,
        name: &str,
        partitions: u32,
        config: &[(String, String)],
        validate_only: bool,
    ) -> Result<(), TopicError> {
        assert!(partitions > 0 && !name.is_empty() && name.len() < 250);
        self.change(|state, topics| {
            if topics.iter().any(|topic| topic.name == name) {
                return Err(TopicError::new(Code::TopicAlreadyExists, "it is there"));
            }
            if validate_only {
                return Ok(());
            }
            let places = Self::take(state, partitions)?;
            state.next_id += 1;
            topics.push(Topic {
                name: name.to_owned(),
                id: state.next_id,
                uuid: state.next_id.into(),
                places,
                config: config.to_vec(),
                rules: configs::rules(config, usize::MAX),
            });
            Ok(())
        })
    }

    fn delete(&self, name: &str) -> Result<(), TopicError> {
        self.change(|state, topics| {
            let at = topics.iter().position(|topic| topic.name == name);
            let topic = topics.remove(at.ok_or_else(|| TopicError::unknown(name))?);
            for place in topic.places {
                let stats = &self.stats[place.local as usize];
                stats.raise_start(stats.log_end());
                state.free.push(place.local);
            }
            Ok(())
        })
    }

    fn grow(&self, name: &str, partitions: u32, validate_only: bool) -> Result<(), TopicError> {
        self.change(|state, topics| {
            let topic = topics.iter_mut().find(|topic| topic.name == name);
            let topic = topic.ok_or_else(|| TopicError::unknown(name))?;
            let more = partitions.checked_sub(topic.places.len() as u32);
            let more = more.filter(|&more| more > 0);
            let more = more.ok_or_else(|| TopicError::new(Code::InvalidPartitions, "not more"))?;
            if !validate_only {
                topic.places.extend(Self::take(state, more)?);
            }
            Ok(())
        })
    }

    fn alter(&self, name: &str, changes: &[Change], validate_only: bool) -> Result<(), TopicError> {
        self.change(|_, topics| {
            let topic = topics.iter_mut().find(|topic| topic.name == name);
            let topic = topic.ok_or_else(|| TopicError::unknown(name))?;
            if validate_only {
                return Ok(());
            }
            for (name, value) in changes {
                topic.config.retain(|(known, _)| known != name);
                topic
                    .config
                    .extend(value.clone().map(|value| (name.clone(), value)));
            }
            topic.rules = configs::rules(&topic.config, usize::MAX);
            Ok(())
        })
    }

    fn delete_records(&self, place: Place, offset: i64) -> Result<i64, TopicError> {
        let stats = &self.stats[place.local as usize];
        if !(0..=stats.high_watermark()).contains(&offset) {
            return Err(TopicError::new(Code::OffsetOutOfRange, "out of range"));
        }
        stats.raise_start(offset);
        Ok(stats.start_offset())
    }

    fn log_start(&self, place: Place) -> i64 {
        self.stats[place.local as usize].start_offset()
    }

    fn log_end(&self, place: Place) -> i64 {
        self.stats[place.local as usize].log_end()
    }

    fn received(&self, _: Place, _: u64) {}

    fn progress(&self, shard: u16, local: u32) -> Option<Progress> {
        assert_eq!(shard, 0);
        let stats = &self.stats[local as usize];
        Some(Progress {
            high_watermark: stats.high_watermark(),
            bytes: stats.bytes.get(),
        })
    }
}

/// No lcore hands buffers to this shard.
struct Nobody;

impl Release for Nobody {
    fn release(&mut self, owners: &[usize]) {
        assert!(owners.is_empty());
    }
}

/// A client's connection, from both sides.
struct Client {
    state: Connection,
    /// Sent and not read by the server, in the pieces it arrives in.
    wire: VecDeque<Vec<u8>>,
    /// Read and not begun.
    input: Vec<u8>,
    /// Answers that the client has not taken.
    out: VecDeque<Vec<u8>>,
    unsent: usize,
    blocked: bool,
    closing: bool,
    /// The client takes nothing.
    slow: bool,
    /// What it took and that is no whole answer yet.
    got: Vec<u8>,
    /// Correlation ids of what was begun and takes an answer; `None`: not known, since tokens of SASL have none, and a
    /// request may have closed the connection.
    expected: Option<VecDeque<i32>>,
    /// Member id and generation, as the last answer to a JoinGroup said.
    joined: Option<(String, i32)>,
}

impl Client {
    /// Takes what the server sent; checks that it is answers. Gives the bytes.
    fn take(&mut self) -> usize {
        let mut bytes = 0;
        for piece in self.out.drain(..) {
            bytes += piece.len();
            self.got.extend_from_slice(&piece);
        }
        self.unsent -= bytes;
        let mut at = 0;
        while let Some(len) = self.got[at..].first_chunk::<4>() {
            let len = i32::from_be_bytes(*len);
            assert!(len >= 0, "an answer of {len} bytes");
            let Some(answer) = self.got[at + 4..].get(..len as usize) else {
                break;
            };
            at += 4 + answer.len();
            let mut reader = Reader::new(answer.get(4..).unwrap_or_default(), false);
            if let Ok(joined) = JoinGroupResponse::decode(&mut reader, 2)
                && reader.remaining() == 0
            {
                self.joined = Some((joined.member_id.into_owned(), joined.generation_id));
            }
            if let Some(expected) = &mut self.expected {
                let id = i32::from_be_bytes(*answer.first_chunk().unwrap());
                assert_eq!(expected.pop_front(), Some(id), "an answer out of turn");
            }
        }
        self.got.drain(..at);
        bytes
    }
}

struct World {
    root: PathBuf,
    worker: Worker,
    shard: Shard<Nobody>,
    log: Arc<WalShared>,
    broker: Arc<Broker>,
    now: Now,
    clients: [Option<Client>; CLIENTS],
    next_id: u64,
    inputs: usize,
    /// See [`Client::joined`].
    joined: (String, i32),
}

impl World {
    fn new() -> World {
        static WORLDS: AtomicUsize = AtomicUsize::new(0);
        // A folder in memory; scripts/fuzz.sh names one that it removes.
        let scratch = std::env::var_os("TMPDIR").map_or("/dev/shm".into(), PathBuf::from);
        let number = WORLDS.fetch_add(1, Relaxed);
        let root = scratch.join(format!("session-{}-{number}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        let config = ShardConfig {
            partitions: (0..PARTITIONS).map(key).collect(),
            max_producers: 64,
            max_pending_acks: 64,
            gaps: Arc::new(ArrayQueue::new(4)),
            wakes: Vec::new(),
        };
        let mut recovered = Recovered::new(&config);
        let wal_config = WalConfig {
            segment_size: 8 << 20,
            prepared_segments: 1,
            staging_size: 1 << 20,
            commit_size: 256 << 10,
            staging_dir: Some(root.clone()),
            ..WalConfig::new(&root, STORE)
        };
        let (wal, shared, _) = WalWriter::open(&wal_config, 0, &mut recovered).unwrap();
        let max_batch = wal.max_entry();
        let (batches, end) = link(0);
        let (inputs, outlets) = (vec![end.input], vec![end.outlet]);
        let shard = Shard::new(config, recovered, wal, inputs, outlets, Nobody);
        let topics = Catalog {
            stats: shard.partition_stats(),
            state: Mutex::new(State {
                snapshot: Arc::default(),
                free: (0..PARTITIONS).collect(),
                next_id: 0,
            }),
        };
        let compact = [("cleanup.policy".to_owned(), "compact".to_owned())];
        topics.create(OFFSETS_TOPIC, 4, &compact, false).unwrap();
        topics.create("t", 2, &[], false).unwrap();
        let now = Now {
            mono_ns: 1,
            unix_ns: 1_750_000_000_000_000_000,
        };
        let mut coordinator = Coordinator::new(groups::Config::default(), [7; 32]);
        coordinator.loaded(groups::Now {
            mono_ms: 0,
            unix_ms: now.unix_ns / 1_000_000,
        });
        let verifier = Verifier::new(Hash::Sha256, "secret");
        let broker = Arc::new(Broker {
            topics: Arc::new(topics),
            producer_ids: ProducerIds::open(&root).unwrap(),
            cluster_id: "cluster".to_owned(),
            listeners: vec![
                Listener::default(),
                Listener {
                    advertised: None,
                    proof: Proof {
                        sasl: true,
                        plain: true,
                    },
                },
            ],
            security: Security::new(Loaded {
                users: Users::new([("user".to_owned(), vec![verifier])]),
                rules: Arc::new(Rules::new(&[], &[])),
                quotas: Quotas::default(),
            }),
            auto_create: true,
            default_partitions: 1,
            settings: Vec::new(),
            limits: Limits::default(),
            hub: Hub::new(coordinator, vec![Arc::new(Wake::new().unwrap())]),
            started: Instant::now(),
            counters: Counters::default(),
            memory: Budget::new(1 << 30, |_| PART),
            threads: 1,
        });
        let link = ShardLink {
            batches,
            stats: shard.stats(),
            reader: LogReader::live(Arc::clone(&shared)),
            max_batch,
        };
        World {
            root,
            worker: Worker::new(Arc::clone(&broker), 0, vec![link]),
            shard,
            log: shared,
            broker,
            now,
            clients: [const { None }; CLIENTS],
            next_id: 0,
            inputs: 0,
            joined: (String::new(), -1),
        }
    }

    /// A connection, opened where there is none.
    fn client(&mut self, at: usize, listener: usize) -> &mut Client {
        let World {
            clients,
            next_id,
            broker,
            ..
        } = self;
        clients[at].get_or_insert_with(|| {
            *next_id += 1;
            let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 9092));
            let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, 20_000));
            Client {
                state: Connection::new(*next_id, local, peer, broker, listener),
                wire: VecDeque::new(),
                input: Vec::new(),
                out: VecDeque::new(),
                unsent: 0,
                blocked: false,
                closing: false,
                slow: false,
                got: Vec::new(),
                expected: (listener == 0).then(VecDeque::new),
                joined: None,
            }
        })
    }

    /// The connection is gone.
    fn close(&mut self, at: usize) {
        let Some(mut client) = self.clients[at].take() else {
            return;
        };
        let mut bytes = client.unsent;
        while let Some(answer) = client.state.session().next_answer() {
            bytes += answer.iter().map(|piece| piece.len()).sum::<usize>();
        }
        self.worker.lost(bytes);
        self.worker.closed(client.state.id());
    }

    /// Moves a connection on as the server's thread does: begins requests, sends answers, reads more.
    fn pump(&mut self, at: usize) {
        let Some(mut client) = self.clients[at].take() else {
            return;
        };
        loop {
            if !client.closing && !client.input.is_empty() {
                self.begin(&mut client);
            }
            while let Some(answer) = client.state.session().next_answer() {
                client.unsent += answer.iter().map(|piece| piece.len()).sum::<usize>();
                client.out.extend(answer.iter().map(|piece| piece.to_vec()));
            }
            if !client.slow {
                let bytes = client.take();
                self.worker.sent(&mut client.state, bytes);
                if let Some(joined) = client.joined.take() {
                    self.joined = joined;
                }
                if client.blocked && !client.closing && bytes > 0 {
                    continue;
                }
            }
            if client.closing && client.out.is_empty() {
                self.clients[at] = Some(client);
                return self.close(at);
            }
            let muted = client.state.muted_until_ns() > self.now.mono_ns;
            if client.closing || client.blocked || muted || client.unsent > UNSENT_MAX {
                break;
            }
            let Some(piece) = client.wire.pop_front() else {
                break;
            };
            client.input.extend_from_slice(&piece);
        }
        self.clients[at] = Some(client);
    }

    fn begin(&mut self, client: &mut Client) {
        loop {
            let (worker, state, now) = (&mut self.worker, &mut client.state, self.now);
            let received = if client.input.len() % 2 == 0 {
                worker.received(state, &client.input, now)
            } else {
                // Batches may stay in the memory, and hold it until their shard has them.
                let input = Arc::new(std::mem::take(&mut client.input));
                let received = worker.received_whole(state, &input, 0, now);
                client.input = Arc::try_unwrap(input).unwrap_or_else(|held| held.to_vec());
                received
            };
            let Ok(received) = received else {
                // Some of what came before it may have been begun, and is answered.
                client.expected = None;
                client.closing = true;
                client.blocked = false;
                client.input.clear();
                return;
            };
            assert!(received.consumed <= client.input.len());
            let mut begun = &client.input[..received.consumed];
            while let (Some(expected), false) = (&mut client.expected, begun.is_empty()) {
                let len = i32::from_be_bytes(*begun.first_chunk().unwrap()) as usize;
                let (request, rest) = begun[LENGTH_LEN..].split_at(len);
                let (header, mut body) = RequestHeader::read(request).unwrap();
                let silent = header.key == Api::Produce as i16 && {
                    body.nullable_string().unwrap();
                    body.i16() == Ok(0)
                };
                if !silent {
                    expected.push_back(header.correlation);
                }
                begun = rest;
            }
            client.input.drain(..received.consumed);
            client.blocked = received.blocked;
            let before = client.unsent;
            while let Some(answer) = client.state.session().next_answer() {
                client.unsent += answer.iter().map(|piece| piece.len()).sum::<usize>();
                client.out.extend(answer.iter().map(|piece| piece.to_vec()));
            }
            // What was answered at once may have been what the next request waited for.
            if !(received.blocked && client.unsent > before && received.consumed > 0) {
                return;
            }
        }
    }

    /// Runs broker and shard until nothing more happens at this time.
    fn run(&mut self) {
        let guard = Instant::now();
        loop {
            // Time enough for the log's linger; no client's time-out is as short.
            self.now.mono_ns += 1000;
            let mut work = self.shard.poll(self.now) + self.worker.poll(self.now);
            for done in self.worker.completed() {
                work += 1;
                let mut clients = self.clients.iter_mut().flatten();
                match clients.find(|client| client.state.id() == done.connection) {
                    Some(client) => self.worker.finish(&mut client.state, done, self.now),
                    None => {
                        let bytes = done.answer.iter().map(|piece| piece.len()).sum();
                        self.worker.lost(bytes);
                    }
                }
            }
            for at in 0..CLIENTS {
                self.pump(at);
            }
            let quiet = self.shard.is_quiet() && self.worker.on_their_way() == 0;
            if work == 0 && quiet && !self.worker.has_news() {
                return;
            }
            assert!(guard.elapsed() < PATIENCE, "it does not come to rest");
            if work == 0 {
                std::thread::yield_now();
            }
        }
    }

    fn advance(&mut self, ns: u64) {
        self.now.mono_ns += ns;
        self.now.unix_ns += ns as i64;
    }

    /// A request of the group that was joined.
    fn group_request(&self, which: u8) -> Vec<u8> {
        let group_id = "g".into();
        let member_id = self.joined.0.as_str().into();
        let generation_id = self.joined.1;
        let mut body = Writer::fields(false);
        let (api, version) = match which % 5 {
            0 => {
                let request = JoinGroupRequest {
                    group_id,
                    session_timeout_ms: 6000,
                    rebalance_timeout_ms: 6000,
                    member_id,
                    group_instance_id: None,
                    protocol_type: "consumer".into(),
                    protocols: vec![JoinGroupProtocol {
                        name: "range".into(),
                        metadata: b"topics".as_slice().into(),
                    }],
                    reason: None,
                };
                request.encode(&mut body, 2);
                (Api::JoinGroup, 2)
            }
            1 => {
                let request = SyncGroupRequest {
                    group_id,
                    generation_id,
                    assignments: vec![SyncGroupAssignment {
                        member_id: self.joined.0.as_str().into(),
                        assignment: b"mine".as_slice().into(),
                    }],
                    member_id,
                    group_instance_id: None,
                    protocol_type: None,
                    protocol_name: None,
                };
                request.encode(&mut body, 1);
                (Api::SyncGroup, 1)
            }
            2 => {
                let request = HeartbeatRequest {
                    group_id,
                    generation_id,
                    member_id,
                    group_instance_id: None,
                };
                request.encode(&mut body, 1);
                (Api::Heartbeat, 1)
            }
            3 => {
                let request = OffsetCommitRequest {
                    group_id,
                    generation_id_or_member_epoch: generation_id,
                    member_id,
                    group_instance_id: None,
                    retention_time_ms: -1,
                    topics: vec![OffsetCommitTopic {
                        name: "t".into(),
                        partitions: vec![OffsetCommitPartition {
                            partition_index: 0,
                            committed_offset: 1,
                            committed_leader_epoch: -1,
                            committed_metadata: Some("note".into()),
                        }],
                    }],
                };
                request.encode(&mut body, 2);
                (Api::OffsetCommit, 2)
            }
            _ => {
                let request = LeaveGroupRequest {
                    group_id,
                    member_id,
                    members: Vec::new(),
                };
                request.encode(&mut body, 1);
                (Api::LeaveGroup, 1)
            }
        };
        framed(api, version, &body.into_fields())
    }

    /// One input, up to its end.
    fn play(&mut self, mut data: &[u8]) {
        let (mut at, mut listener) = (0, 0);
        while let Some(step) = Step::read(&mut data) {
            match step {
                Step::Use(client, on) => (at, listener) = (client, on),
                Step::Bytes(bytes) => self.send(at, listener, bytes.to_vec()),
                Step::Request(number, place, change, cut) => {
                    let mut bytes = REQUESTS[number % REQUESTS.len()].to_vec();
                    let place = place % bytes.len();
                    bytes[place] ^= change;
                    bytes.truncate(bytes.len() - cut.min(bytes.len()));
                    self.send(at, listener, bytes);
                }
                Step::Produce(settings) => self.send(at, listener, produce(settings)),
                Step::Group(which) => {
                    let bytes = self.group_request(which);
                    self.send(at, listener, bytes);
                }
                Step::LogIn(right) => {
                    let handshake = framed(Api::SaslHandshake, 1, b"\0\x05PLAIN");
                    let token: &[u8] = match right {
                        true => b"\0\0\0\x0c\0user\0secret",
                        false => b"\0\0\0\x0b\0user\0wrong",
                    };
                    let token = framed(Api::SaslAuthenticate, 0, token);
                    self.send(at, listener, [handshake, token].concat());
                }
                Step::Run => self.run(),
                Step::Time(ns) => {
                    self.advance(ns);
                    self.run();
                }
                Step::Close => self.close(at),
                Step::Slow(slow) => self.client(at, listener).slow = slow,
            }
        }
        // Whoever waits for something is answered when its time is over, whatever others do.
        for client in self.clients.iter_mut().flatten() {
            client.slow = false;
        }
        self.run();
        // Of a client that asks to join again and again, one request after the other waits for its time.
        let clients = self.clients.iter().flatten();
        let asked = clients.map(|client| client.wire.len()).max().unwrap_or(0);
        for _ in 0..40 + asked {
            self.advance(DAY_NS);
            self.run();
        }
        for client in self.clients.iter_mut().flatten() {
            assert_eq!(client.state.session().waiting(), 0, "waits for ever");
            assert!(!client.blocked, "blocked for ever");
            assert!(client.wire.is_empty() && client.out.is_empty());
            assert!(
                client.expected.iter().all(VecDeque::is_empty),
                "not answered"
            );
        }
        for at in 0..CLIENTS {
            self.close(at);
        }
        self.run();
    }

    fn send(&mut self, at: usize, listener: usize, bytes: Vec<u8>) {
        self.client(at, listener).wire.push_back(bytes);
        self.pump(at);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// What is done next.
enum Step<'a> {
    /// This client, and at which listener it connects if it does: 1 has SASL.
    Use(usize, usize),
    /// It sends these bytes.
    Bytes(&'a [u8]),
    /// It sends a request of a usual client with a byte changed, and so many cut off.
    Request(usize, usize, u8, usize),
    /// It sends a valid batch.
    Produce([u8; 6]),
    /// It sends a request as the member that joined the group last.
    Group(u8),
    LogIn(bool),
    /// Broker and shard run.
    Run,
    Time(u64),
    /// It vanishes.
    Close,
    /// It takes no answers, or does again.
    Slow(bool),
}

impl<'a> Step<'a> {
    fn read(data: &mut &'a [u8]) -> Option<Step<'a>> {
        fn take<const N: usize>(data: &mut &[u8]) -> Option<[u8; N]> {
            let (taken, rest) = data.split_first_chunk::<N>()?;
            *data = rest;
            Some(*taken)
        }
        let [step] = take(data)?;
        Some(match step % 11 {
            0 => {
                let [which] = take(data)?;
                Step::Use(usize::from(which) % CLIENTS, usize::from(which >= 128))
            }
            1 | 2 => {
                let len = usize::from(u16::from_le_bytes(take(data)?));
                let (bytes, rest) = data.split_at(len.min(data.len()));
                *data = rest;
                Step::Bytes(bytes)
            }
            3 => {
                let [number, place, change, cut] = take(data)?;
                // Mostly nothing is cut off.
                let cut = usize::from(cut).saturating_sub(192);
                Step::Request(number.into(), place.into(), change, cut)
            }
            4 => Step::Produce(take(data)?),
            5 => Step::Group(take::<1>(data)?[0]),
            6 => Step::LogIn(take::<1>(data)?[0] % 4 > 0),
            7 => Step::Run,
            8 => Step::Time(1 << (take::<1>(data)?[0] % 52)),
            9 => Step::Close,
            _ => Step::Slow(take::<1>(data)?[0] % 2 == 0),
        })
    }
}

/// A request with its length and header.
fn framed(api: Api, version: i16, body: &[u8]) -> Vec<u8> {
    let mut bytes = (10 + body.len() as i32).to_be_bytes().to_vec();
    bytes.extend((api as i16).to_be_bytes());
    bytes.extend(version.to_be_bytes());
    bytes.extend(7i32.to_be_bytes());
    bytes.extend(0u16.to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// A produce request whose batch is right, to a partition that there is, or not.
fn produce([acks, partition, producer, sequence, records, size]: [u8; 6]) -> Vec<u8> {
    let mut batch = vec![0; 200 + (usize::from(records) + 1) * (usize::from(size) + 40)];
    let mut writer = BatchWriter::new(&mut batch, 1_750_000_000_000);
    if producer < 128 {
        writer = writer.with_producer((producer % 4).into(), 0, sequence.into());
    }
    for _ in 0..=records {
        let value = vec![size; size.into()];
        writer
            .push(1_750_000_000_000, Some(&[size]), Some(&value))
            .unwrap();
    }
    let len = writer.finish(0);
    let mut body = (i16::from(acks % 4) - 2).to_be_bytes().to_vec();
    body.extend(1000i32.to_be_bytes());
    body.extend(1i32.to_be_bytes());
    body.extend(b"\0\x01t");
    body.extend(1i32.to_be_bytes());
    body.extend(i32::from(partition % 4).to_be_bytes());
    body.extend((len as i32).to_be_bytes());
    body.extend_from_slice(&batch[..len]);
    // Before version 3 there was no transactional id, here null.
    framed(Api::Produce, 3, &[&[0xff, 0xff][..], &body].concat())
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

fuzz_target!(|data: &[u8]| {
    WORLD.with_borrow_mut(|slot| {
        let stale = |world: &World| world.inputs >= INPUTS || world.log.durable_lsn() > LOG_MAX;
        if slot.as_ref().is_some_and(stale) {
            *slot = None;
        }
        let world = slot.get_or_insert_with(World::new);
        world.inputs += 1;
        let before = LIVE.load(Relaxed);
        PEAK.store(before, Relaxed);
        world.play(data);
        let (peak, left) = (PEAK.load(Relaxed), LIVE.load(Relaxed));
        let (peak, left) = (peak.saturating_sub(before), left.saturating_sub(before));
        assert!(peak < MEMORY_MAX, "{peak} bytes were held");
        assert!(left < LEFT_MAX, "{left} bytes are held when all are gone");
    });
});
