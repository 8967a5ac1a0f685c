//! SIGKILL while the store works: segments are flushed, SSTs merged, topics compacted by key and messages expired at
//! the moments of the kills, and what was acknowledged is where it was, once, or went because its time had come.
//!
//! A server with small segments takes messages from idempotent producers over Kafka's protocol (acks=1 and acks=all),
//! one for each partition, so that message n of a partition has offset n and its content follows from that. It is
//! killed under load, as files are begun, while merges run, as the manifest is written, as retention moves a
//! start, during starts and stops. After each start everything is read: topics that keep all have all; where
//! retention deletes, the start never goes back and passes nothing that may stay; of compacted topics every key's newest
//! record is there, what is missing was superseded by an acknowledged one, and what was gone stays gone.
//! What the kills interrupted is counted from the files they left.
//!
//! Settings: TAFFRAIL_KILLS (10), TAFFRAIL_SEED (random, printed), TAFFRAIL_STAGING (/dev/shm: a folder
//! on tmpfs or hugetlbfs for the staging files).

mod support;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::{InitProducerIdRequest, ProduceRequest, TopicName};
use kafka_protocol::protocol::StrBytes;
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use support::kafka::Connection;
use support::{PATIENCE, Server, run, wait_until};
use taffrail::control::client::{ControlClient, ControlError};
use taffrail::control::protocol::{Position, ReadAnswer, ShardStats};
use taffrail::storage::Catalog;
use taffrail::storage::lsm::codec;
use taffrail::storage::lsm::manifest::{self, FileMeta};
use taffrail::storage::wal::LogId;
use taffrail::storage::wal::segment::shard_dir;
use taffrail::wire::record_batch::{self, BatchWriter, Records};

/// The smallest segments, so that flushes abound; one shard, so that its files are merged often.
const STORAGE: &str = r#"segment_size = "4MiB"
staging_size = "4MiB"
commit_size = "256KiB"
"#;

/// What a topic keeps.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Keeps {
    All,
    /// `retention.bytes`.
    Bytes(u64),
    /// `retention.ms`.
    Age(i64),
    /// The newest record of each key: `min.compaction.lag.ms`, `delete.retention.ms`.
    Newest(i64, i64),
}

struct Kind {
    name: &'static str,
    keeps: Keeps,
    /// Pause between two batches.
    pause: Duration,
}

const fn kind(name: &'static str, keeps: Keeps, pause_ms: u64) -> Kind {
    Kind {
        name,
        keeps,
        pause: Duration::from_millis(pause_ms),
    }
}

/// Each has two partitions, the first written with acks=all, the second with acks=1. What keeps all gets little, since all
/// of it is read after each kill.
const TOPICS: [Kind; 5] = [
    kind("all", Keeps::All, 160),
    kind("bytes", Keeps::Bytes(2 << 20), 30),
    kind("age", Keeps::Age(3000), 40),
    kind("keys", Keeps::Newest(0, 0), 30),
    kind("lagging", Keeps::Newest(1000, 2000), 60),
];
const PARTITIONS: u32 = 2;
/// Keys of a compacted partition: enough that merging them takes a while.
const KEYS: u32 = 1500;
/// Records of a batch, at most.
const BATCH: usize = 48;
/// Bytes of a value, at most.
const VALUE: usize = 2000;
/// SSTs hold more than values, by less than one part in so many: values do not compress.
const OVERHEAD_PART: u64 = 12;
/// A batch, or a block, that retention by bytes cuts in between.
const BLOCK: u64 = 64 << 10;
/// A round of load before the kill.
const LOAD: Duration = Duration::from_millis(500);
/// So long the test waits for a moment; then it kills as it is.
const MOMENT: Duration = Duration::from_secs(3);
/// A start takes about so long.
const START: Duration = Duration::from_millis(150);
/// Kills beyond those asked for, where not everything has been interrupted by then.
const MORE: u64 = 200;

/// What the producers are to do.
const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

fn unix_ms() -> i64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    time.as_millis() as i64
}

/// One partition and its producer.
struct Part {
    topic: usize,
    partition: u32,
    /// The producer's id and epoch.
    identity: (i64, i16),
    written: Mutex<Written>,
    /// Messages acknowledged, that is the offset of the next one.
    acknowledged: AtomicI64,
    at_rest: AtomicBool,
}

/// What was sent, by offset.
#[derive(Default)]
struct Written {
    /// Unix ms before it was sent the first time.
    times: Vec<i64>,
    /// Bytes of all values up to it.
    bytes: Vec<u64>,
}

struct Shared {
    seed: u64,
    address: SocketAddr,
    socket: PathBuf,
    parts: Vec<Part>,
    command: AtomicU8,
    /// The run of the server that counts now, and its counters as they were seen last.
    life: AtomicU64,
    seen: Mutex<(u64, Option<ShardStats>)>,
    troubles: Mutex<Vec<String>>,
}

impl Shared {
    fn kind(&self, part: &Part) -> &'static Kind {
        &TOPICS[part.topic]
    }

    fn name(&self, part: &Part) -> String {
        format!("{}-{}", self.kind(part).name, part.partition)
    }

    /// Key and value of a message.
    fn message(&self, part: &Part, offset: i64) -> (Option<u32>, Option<Vec<u8>>) {
        let place = (part.topic as u64) << 56 ^ u64::from(part.partition) << 48 ^ offset as u64;
        let mut rng = SmallRng::seed_from_u64(self.seed ^ place);
        let compacted = matches!(self.kind(part).keeps, Keeps::Newest(..));
        let key = compacted.then(|| rng.random_range(0..KEYS));
        if compacted && rng.random_ratio(1, 12) {
            return (key, None);
        }
        let mut value = format!("{} {offset} ", self.name(part)).into_bytes();
        let (from, len) = (value.len(), rng.random_range(0..VALUE));
        value.resize(from + len, 0);
        rng.fill_bytes(&mut value[from..]);
        (key, Some(value))
    }

    fn trouble(&self, what: String) {
        self.troubles.lock().unwrap().push(what);
    }

    /// Sends until it is told to stop; a pause lets it come to rest.
    fn produce(&self, part: &Part) {
        let name = TopicName(StrBytes::from_static_str(self.kind(part).name));
        let mut rng = SmallRng::seed_from_u64(
            self.seed ^ 0x5eed ^ (part.topic as u64) << 8 ^ u64::from(part.partition),
        );
        let (id, epoch) = part.identity;
        let mut connection = None;
        let acks = if part.partition == 0 { -1 } else { 1 };
        let mut buffer = vec![0; BATCH * (VALUE + 100) + 200];
        loop {
            match self.command.load(Ordering::Acquire) {
                RUN => {}
                PAUSE => {
                    part.at_rest.store(true, Ordering::Release);
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                _ => return,
            }
            let base = part.acknowledged.load(Ordering::Relaxed);
            let count = rng.random_range(1..=BATCH) as i64;
            let now = unix_ms();
            let mut writer =
                BatchWriter::new(&mut buffer, now).with_producer(id, epoch, base as i32);
            {
                let mut written = part.written.lock().unwrap();
                for offset in base..base + count {
                    let (key, value) = self.message(part, offset);
                    let key = key.map(u32::to_be_bytes);
                    let key = key.as_ref().map(|key| &key[..]);
                    writer.push(now, key, value.as_deref()).unwrap();
                    let before = written.bytes.last().copied().unwrap_or(0);
                    written
                        .bytes
                        .push(before + value.map_or(0, |v| v.len() as u64));
                    written.times.push(now);
                }
            }
            let len = writer.finish(0);
            let batch = Bytes::copy_from_slice(&buffer[..len]);
            let data = PartitionProduceData::default()
                .with_index(part.partition as i32)
                .with_records(Some(batch));
            let topic = TopicProduceData::default()
                .with_name(name.clone())
                .with_partition_data(vec![data]);
            let request = ProduceRequest::default()
                .with_acks(acks)
                .with_timeout_ms(30_000)
                .with_topic_data(vec![topic]);
            while !self.deliver(part, &mut connection, &request, base) {
                if self.command.load(Ordering::Acquire) == STOP {
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            part.acknowledged.store(base + count, Ordering::Release);
            std::thread::sleep(self.kind(part).pause.mul_f64(rng.random_range(0.5..1.5)));
        }
    }

    /// Sends a request once; true: it was acknowledged. False: to be sent again, as every idempotent producer does.
    fn deliver(
        &self,
        part: &Part,
        connection: &mut Option<Connection>,
        request: &ProduceRequest,
        base: i64,
    ) -> bool {
        let answer = (|| -> io::Result<_> {
            if connection.is_none() {
                *connection = Some(Connection::open(self.address)?);
            }
            match connection {
                Some(open) => open.call(7, request),
                None => Err(io::ErrorKind::NotConnected.into()),
            }
        })();
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "the server hangs");
                *connection = None;
                return false;
            }
        };
        let told = &answer.responses[0].partition_responses[0];
        if told.error_code == 0 {
            if told.base_offset != base {
                let (name, at) = (self.name(part), told.base_offset);
                self.trouble(format!("{name}: message {base} was put at offset {at}"));
            }
            return true;
        }
        // REQUEST_TIMED_OUT: the disk is slow, not wrong.
        if told.error_code != 7 {
            let (name, error) = (self.name(part), told.error_code);
            self.trouble(format!("{name}: message {base}: error {error}"));
        }
        false
    }

    /// Keeps the counters of the running server, which a kill takes with it.
    fn sample(&self) {
        let mut client: Option<ControlClient> = None;
        while self.command.load(Ordering::Acquire) != STOP {
            std::thread::sleep(Duration::from_millis(4));
            let life = self.life.load(Ordering::Acquire);
            if client.is_none() {
                client = ControlClient::connect(&self.socket).ok();
            }
            let stats = client.as_mut().and_then(|client| client.stats().ok());
            match stats {
                Some(mut stats) => {
                    *self.seen.lock().unwrap() = (life, stats.shards.pop());
                }
                None => client = None,
            }
        }
    }

    /// The counters of this run of the server as they were seen last.
    fn seen(&self) -> Option<ShardStats> {
        let seen = self.seen.lock().unwrap();
        let now = self.life.load(Ordering::Acquire);
        seen.1.clone().filter(|_| seen.0 == now)
    }
}

/// What is wrong with the log; all zero when nothing is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Faults {
    /// Acknowledged, to be kept, and not there.
    lost: u64,
    /// There and not sent, or more often than sent.
    doubled: u64,
    /// Another content at an offset than was acknowledged there.
    wrong: u64,
    /// Gone before, and there again.
    back: u64,
}

/// A partition as it was read the last time.
#[derive(Default, Clone)]
struct Seen {
    start: i64,
    /// By offset, of compacted topics: it was gone.
    gone: Vec<bool>,
}

#[derive(Default)]
struct Audit {
    parts: Vec<Seen>,
    faults: Faults,
    examples: Vec<String>,
    records: u64,
}

/// Reads a partition from a position on.
type Read<'a> = &'a mut dyn FnMut(Position, &mut Vec<u8>) -> Result<ReadAnswer, ControlError>;

/// Reads where a partition begins. Retention may move the start between the server's look at it and its read.
fn earliest(read: Read) -> ReadAnswer {
    for _ in 0..10 {
        match read(Position::Earliest, &mut Vec::new()) {
            Ok(told) => return told,
            Err(ControlError::Refused(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the start is refused again and again");
}

impl Audit {
    fn fault(&mut self, count: fn(&mut Faults) -> &mut u64, n: u64, what: impl FnOnce() -> String) {
        *count(&mut self.faults) += n;
        if self.examples.len() < 20 {
            self.examples.push(what());
        }
    }

    /// Reads everything from the running server, to which everything sent was acknowledged.
    fn check(&mut self, shared: &Shared, server: &Server) {
        self.parts.resize(shared.parts.len(), Seen::default());
        let mut client = server.client();
        for at in 0..shared.parts.len() {
            self.check_part(shared, &mut client, at);
        }
    }

    fn check_part(&mut self, shared: &Shared, client: &mut ControlClient, at: usize) {
        let part = &shared.parts[at];
        let (kind, name) = (shared.kind(part), shared.name(part));
        let written = part.written.lock().unwrap();
        let end = part.acknowledged.load(Ordering::Acquire);
        let mut read = |from, out: &mut Vec<u8>| -> Result<ReadAnswer, ControlError> {
            client.read(kind.name, part.partition, from, 1 << 20, out)
        };
        // With acks=1 the answer comes before the commit.
        let mut told = earliest(&mut read);
        let patience = Instant::now() + PATIENCE;
        while told.high_watermark < end && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(2));
            told = earliest(&mut read);
        }
        let high = told.high_watermark;
        if high > end {
            let more = (high - end) as u64;
            self.fault(
                |f| &mut f.doubled,
                more,
                || format!("{name} ends at {high}, {end} messages were sent"),
            );
        }
        self.check_start(shared, at, &written, told.start, end);
        let mut next = told.start;
        // Where the next read begins, and what is missing: by offset.
        let mut position = next;
        let mut gone = vec![false; end as usize];
        let (mut bytes, mut scratch) = (Vec::new(), Vec::new());
        while next < end {
            bytes.clear();
            if let Err(error) = read(Position::Offset(position), &mut bytes) {
                // Retention may have been here.
                let told = earliest(&mut read);
                assert!(told.start > position, "{name} from {position}: {error}");
                self.check_start(shared, at, &written, told.start, end);
                (next, position) = (told.start, told.start);
                continue;
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let header = record_batch::parse_header(rest).unwrap();
                let (batch, behind) = rest.split_at(header.total_len());
                rest = behind;
                record_batch::validate(batch).unwrap();
                let plain = codec::plain(batch, &mut scratch).unwrap();
                for record in Records::new(plain).unwrap() {
                    let record = record.unwrap();
                    let offset = record.offset;
                    // Before what was asked for, in its batch; or beyond what was sent, and counted above.
                    if offset < next || offset >= end {
                        continue;
                    }
                    self.missing(&mut gone, &name, kind, next..offset);
                    next = offset + 1;
                    self.records += 1;
                    let (key, value) = shared.message(part, offset);
                    let key = key.map(u32::to_be_bytes);
                    let key = key.as_ref().map(|key| &key[..]);
                    if (record.key, record.value) != (key, value.as_deref()) {
                        let begins = record.value.unwrap_or_default();
                        let begins = String::from_utf8_lossy(&begins[..begins.len().min(16)]);
                        self.fault(
                            |f| &mut f.wrong,
                            1,
                            || format!("{name}: offset {offset} holds {begins:?}"),
                        );
                    }
                }
                position = position.max(header.next_offset());
            }
            if bytes.is_empty() {
                break;
            }
        }
        self.missing(&mut gone, &name, kind, next..end);
        if let Keeps::Newest(lag, tombstones) = kind.keeps {
            self.check_keys(shared, at, &written, &gone, (lag, tombstones));
        }
    }

    /// These offsets were not there.
    fn missing(&mut self, gone: &mut [bool], name: &str, kind: &Kind, range: std::ops::Range<i64>) {
        if range.is_empty() {
            return;
        }
        if matches!(kind.keeps, Keeps::Newest(..)) {
            gone[range.start as usize..range.end as usize].fill(true);
            return;
        }
        let count = (range.end - range.start) as u64;
        self.fault(
            |f| &mut f.lost,
            count,
            || format!("{name}: offsets {range:?} are not there"),
        );
    }

    /// The start is where it was or further on, and what is before it had to go.
    fn check_start(&mut self, shared: &Shared, at: usize, written: &Written, start: i64, end: i64) {
        let part = &shared.parts[at];
        let name = shared.name(part);
        let before = std::mem::replace(&mut self.parts[at].start, start);
        if start < before {
            self.fault(
                |f| &mut f.back,
                (before - start) as u64,
                || format!("{name} begins at {start}, and began at {before}"),
            );
        }
        if start == 0 {
            return;
        }
        let (last, now) = (start as usize - 1, unix_ms());
        let may = match shared.kind(part).keeps {
            Keeps::All | Keeps::Newest(..) => false,
            _ if start > end => false,
            // Its arrival is a later moment, if by less than a millisecond.
            Keeps::Age(ms) => written.times[last] + ms <= now + 1,
            Keeps::Bytes(limit) => {
                let kept = written.bytes[end as usize - 1] - written.bytes[last];
                kept + kept / OVERHEAD_PART + BLOCK >= limit
            }
        };
        if !may {
            self.fault(
                |f| &mut f.lost,
                1,
                || format!("{name} begins at {start}: offset {last} was to stay"),
            );
        }
    }

    /// What is missing of a compacted partition may be missing, for good.
    fn check_keys(
        &mut self,
        shared: &Shared,
        at: usize,
        written: &Written,
        gone: &[bool],
        (lag, tombstones): (i64, i64),
    ) {
        let part = &shared.parts[at];
        let (name, now) = (shared.name(part), unix_ms() + 1);
        let mut newest: BTreeMap<u32, (usize, bool)> = BTreeMap::new();
        let mut keys = Vec::with_capacity(gone.len());
        for offset in 0..gone.len() {
            let (key, value) = shared.message(part, offset as i64);
            let key = key.unwrap();
            newest.insert(key, (offset, value.is_none()));
            keys.push(key);
        }
        for (offset, &gone) in gone.iter().enumerate() {
            let (last, tombstone) = newest[&keys[offset]];
            if !gone {
                if self.parts[at].gone.get(offset) == Some(&true) {
                    self.fault(
                        |f| &mut f.back,
                        1,
                        || format!("{name}: offset {offset} was gone, and is there again"),
                    );
                }
                continue;
            }
            let age = now - written.times[offset];
            let superseded = last > offset && age >= lag;
            let expired = last == offset && tombstone && age >= lag.max(tombstones);
            if !(superseded || expired) || offset + 1 == keys.len() {
                self.fault(|f| &mut f.lost, 1, || {
                    format!("{name}: offset {offset} is gone after {age} ms; the newest of its key is {last}")
                });
            }
        }
        // A tombstone goes after all that it supersedes, else that would come back to life.
        for (offset, &key) in keys.iter().enumerate() {
            let (last, _) = newest[&key];
            if !gone[offset] && gone[last] {
                self.fault(
                    |f| &mut f.back,
                    1,
                    || {
                        format!(
                            "{name}: offset {offset} outlives the tombstone at {last} of its key"
                        )
                    },
                );
            }
        }
        self.parts[at].gone = gone.to_vec();
    }
}

/// When to kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    /// After some time under load.
    Load,
    /// While it starts.
    Start,
    /// Right after a file was begun.
    File,
    /// While a merge runs.
    Merge,
    /// Right after the manifest was written to.
    Edit,
    /// Right after retention moved a start.
    Trim,
    /// During a clean stop.
    Stop,
}

/// What was going on when the server was killed, by the files it left.
#[derive(Debug, Default)]
struct Interrupted {
    flushes: u64,
    merges: u64,
    /// Files of neither, since nothing had been written to them.
    begun: u64,
    /// SSTs that a merge had replaced, or retention emptied, and that still lay there.
    removals: u64,
    torn_edits: u64,
}

impl Interrupted {
    /// Adds what lies in the store's folder. The server is dead.
    fn look(&mut self, data: &Path) {
        let id = LogId {
            store: Catalog::open_read_only(data).unwrap().store_id(),
            shard: 0,
        };
        let dir = shard_dir(data, 0);
        let Some(loaded) = manifest::load(&dir, id).unwrap() else {
            return;
        };
        let state = loaded.state;
        self.torn_edits += u64::from(loaded.torn > 0);
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap().to_owned();
            let Some((number, kind)) = file
                .strip_prefix("sst-")
                .and_then(|name| name.split_once('.'))
            else {
                continue;
            };
            let number = u64::from_str_radix(number, 16).unwrap();
            if kind == "sst" && state.files.iter().any(|file| file.number == number) {
                continue;
            }
            // docs/formats.md: the LSNs that it holds.
            let mut lsns = [0; 16];
            let header = std::fs::File::open(&path).unwrap();
            if header.read_exact_at(&mut lsns, 40).is_err() {
                self.begun += 1;
                continue;
            }
            let lsn = |at: usize| u64::from_le_bytes(lsns[at..at + 8].try_into().unwrap());
            let (from, to) = (lsn(0), lsn(8));
            let made_of = |file: &FileMeta| {
                file.number < number && from <= file.lsn_start && file.lsn_end <= to
            };
            if from >= state.flushed_lsn {
                self.flushes += 1;
            } else if kind == "tmp" || state.files.iter().any(made_of) {
                self.merges += 1;
            } else {
                self.removals += 1;
            }
        }
    }
}

/// Bytes of the manifest, and the folder's newest unfinished file: what changes as the store works.
fn traces(data: &Path) -> (u64, Option<String>) {
    let (mut bytes, mut newest) = (0, None);
    for entry in std::fs::read_dir(shard_dir(data, 0))
        .into_iter()
        .flatten()
        .flatten()
    {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        if name.starts_with("manifest-") {
            bytes += entry.metadata().map_or(0, |metadata| metadata.len());
        } else if name.starts_with("sst-") && name.ends_with(".tmp") {
            newest = newest.max(Some(name));
        }
    }
    (bytes, newest)
}

/// Waits until it is so, or the moment has passed.
fn wait_for(every: Duration, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + MOMENT;
    while !so() && Instant::now() < end {
        std::thread::sleep(every);
    }
}

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Sums over the runs of the server.
#[derive(Debug, Default)]
struct Work {
    flushed_bytes: u64,
    merges: u64,
    compacted: u64,
    expired: u64,
}

impl Work {
    fn add(&mut self, stats: Option<ShardStats>) {
        let Some(stats) = stats else { return };
        self.flushed_bytes += stats.flushed_bytes;
        self.merges += stats.merges;
        self.compacted += stats.records_compacted;
        self.expired += stats.records_expired;
    }
}

/// Lets the producers come to rest, with everything acknowledged.
fn settle(shared: &Shared) {
    shared.command.store(PAUSE, Ordering::Release);
    // Whoever still sends says so again only when it has seen the command.
    for part in &shared.parts {
        part.at_rest.store(false, Ordering::Release);
    }
    wait_until("the producers' rest", || {
        let mut parts = shared.parts.iter();
        parts.all(|part| part.at_rest.load(Ordering::Acquire))
    });
}

#[test]
fn kills_during_flushes_merges_and_retention_lose_nothing() {
    let kills = setting("TAFFRAIL_KILLS").unwrap_or(10);
    let seed = setting("TAFFRAIL_SEED").unwrap_or_else(rand::random);
    let staging = std::env::var("TAFFRAIL_STAGING").unwrap_or_else(|_| "/dev/shm".to_owned());
    println!("TAFFRAIL_KILLS={kills} TAFFRAIL_SEED={seed}");
    let mut rng = SmallRng::seed_from_u64(seed);

    let folder = tempfile::tempdir().unwrap();
    let address = support::free_address();
    let mut tables = format!("[kafka]\nlisten = [\"{address}\"]\n");
    for kind in &TOPICS {
        let settings = match kind.keeps {
            Keeps::All => String::new(),
            Keeps::Bytes(bytes) => format!("\"retention.bytes\" = {bytes}"),
            Keeps::Age(ms) => format!("\"retention.ms\" = {ms}"),
            Keeps::Newest(lag, tombstones) => format!(
                "\"cleanup.policy\" = \"compact\", \"min.cleanable.dirty.ratio\" = 0.1, \
                 \"min.compaction.lag.ms\" = {lag}, \"delete.retention.ms\" = {tombstones}"
            ),
        };
        tables.push_str(&format!(
            "[[topic]]\nname = \"{}\"\npartitions = {PARTITIONS}\nsettings = {{ {settings} }}\n",
            kind.name
        ));
    }
    let mut server = Server::prepare(folder.path(), None, Path::new(&staging), STORAGE, &tables);
    server.restart();
    let data = server.data();
    let mut connection = Connection::open(address).unwrap();
    let mut part = |at: usize| Part {
        topic: at / PARTITIONS as usize,
        partition: at as u32 % PARTITIONS,
        identity: {
            let asked = InitProducerIdRequest::default().with_transactional_id(None);
            let answer = connection.call(1, &asked).unwrap();
            assert_eq!(answer.error_code, 0);
            (answer.producer_id.0, answer.producer_epoch)
        },
        written: Mutex::default(),
        acknowledged: AtomicI64::new(0),
        at_rest: AtomicBool::new(false),
    };
    let shared = Shared {
        seed,
        address,
        socket: server.socket(),
        parts: (0..TOPICS.len() * PARTITIONS as usize)
            .map(&mut part)
            .collect(),
        command: AtomicU8::new(RUN),
        life: AtomicU64::new(0),
        seen: Mutex::default(),
        troubles: Mutex::default(),
    };
    let mut audit = Audit::default();
    let (mut work, mut interrupted) = (Work::default(), Interrupted::default());
    let mut moments: BTreeMap<Moment, u64> = BTreeMap::new();
    let mut done = 0;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let shared = &shared;
        // However the scope ends, the threads must.
        let stop = StopOnDrop(shared);
        for part in &shared.parts {
            scope.spawn(move || shared.produce(part));
        }
        scope.spawn(move || shared.sample());
        let mut kill = |server: &mut Server, moment| {
            server.kill();
            work.add(shared.seen());
            shared.life.fetch_add(1, Ordering::AcqRel);
            interrupted.look(&data);
            *moments.entry(moment).or_default() += 1;
            done += 1;
            let everything = work.flushed_bytes > 0
                && work.merges > 0
                && work.compacted > 0
                && work.expired > 0
                && interrupted.flushes + interrupted.merges > 0;
            done >= kills && (everything || done >= kills + MORE)
        };
        loop {
            shared.command.store(RUN, Ordering::Release);
            let moment = match rng.random_range(0..20) {
                0..4 => Moment::Load,
                4..6 => Moment::Start,
                6..9 => Moment::File,
                9..14 => Moment::Merge,
                14..17 => Moment::Edit,
                17..19 => Moment::Trim,
                _ => Moment::Stop,
            };
            let mut later = |most: u64| {
                let most = Duration::from_millis(most);
                std::thread::sleep(rng.random_range(Duration::ZERO..most));
            };
            later(LOAD.as_millis() as u64);
            match moment {
                Moment::Load => {}
                Moment::Start => {
                    kill(&mut server, moment);
                    server.spawn();
                    later(START.as_millis() as u64);
                }
                Moment::File => {
                    let before = traces(&data).1;
                    wait_for(Duration::from_micros(200), || {
                        let now = traces(&data).1;
                        now.is_some() && now != before
                    });
                    later(5);
                }
                Moment::Merge => {
                    let merging = |stats: ShardStats| !stats.merging.is_empty();
                    wait_for(Duration::from_millis(1), || {
                        shared.seen().is_some_and(merging)
                    });
                    later(40);
                }
                Moment::Edit => {
                    let before = traces(&data).0;
                    wait_for(Duration::from_micros(200), || traces(&data).0 != before);
                    later(3);
                }
                Moment::Trim => {
                    let mut client = server.client();
                    let mut starts = || -> Vec<i64> {
                        let topics = client.topics().unwrap();
                        let parts = topics.iter().flat_map(|topic| &topic.partitions);
                        parts.map(|part| part.start).collect()
                    };
                    let before = starts();
                    wait_for(Duration::from_millis(1), || starts() != before);
                    later(5);
                }
                Moment::Stop => {
                    server.terminate();
                    later(60);
                }
            }
            let enough = kill(&mut server, moment);
            server.restart();
            settle(shared);
            audit.check(shared, &server);
            if enough {
                break;
            }
        }
        drop(stop);
    });
    let stats = server.settled(0);
    assert_eq!(stats.imbalances(), Vec::<String>::new());
    server.stop();
    let verified = run(
        env!("CARGO_BIN_EXE_taffrail"),
        &["verify", data.to_str().unwrap()],
    );
    assert!(!verified.contains("DAMAGE"), "{verified}");
    for line in server.log().lines() {
        if line.contains(" ERROR ") || line.contains("panicked") {
            audit.fault(|f| &mut f.wrong, 1, || format!("the server said: {line}"));
        }
    }
    let troubles = shared.troubles.into_inner().unwrap();
    audit.faults.wrong += troubles.len() as u64;
    // First what was told, then what was read.
    audit.examples.splice(0..0, troubles.into_iter().take(10));
    let acknowledged = |acks: u32| -> i64 {
        let parts = shared.parts.iter().filter(|part| part.partition == acks);
        parts.map(|p| p.acknowledged.load(Ordering::Relaxed)).sum()
    };
    let (all, staged) = (acknowledged(0), acknowledged(1));
    let Interrupted {
        flushes,
        merges,
        begun,
        removals,
        torn_edits,
    } = interrupted;
    println!(
        "kills {done} {moments:?} in {:.0?}; at least {} MiB flushed, {} merges ended, {} records compacted, {} expired; \
         {} records read",
        began.elapsed(),
        work.flushed_bytes >> 20,
        work.merges,
        work.compacted,
        work.expired,
        audit.records,
    );
    println!(
        "interrupted flushes {flushes} merges {merges} empty {begun} removals {removals} edits {torn_edits}"
    );
    let Faults {
        lost,
        doubled,
        wrong,
        back,
    } = audit.faults;
    println!(
        "acknowledged {} acks1 {staged} all {all} lost {lost} doubled {doubled} wrong {wrong} back {back}",
        staged + all
    );
    assert_eq!(audit.faults, Faults::default(), "{:#?}", audit.examples);
    // Else the kills showed nothing.
    assert!(work.flushed_bytes > 0 && work.merges > 0, "{work:?}");
    assert!(work.compacted > 0 && work.expired > 0, "{work:?}");
    assert!(flushes + merges > 0);
}

/// Tells the threads to end, also when the test fails.
struct StopOnDrop<'a>(&'a Shared);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.command.store(STOP, Ordering::Release);
    }
}
