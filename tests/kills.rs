//! SIGKILL at random moments under load: whatever a producer was told is stored is in the log, once,
//! at the offset it was told, in the order it was sent.
//!
//! A real server on a DPDK virtual device takes messages from several idempotent producers (acks=1 and
//! acks=all, some on the same partitions) and from a raw UDP sender, and is killed again and again:
//! under load, while it starts or recovers, right behind a rotation, at the very moment an
//! acknowledgement arrives, during a clean stop. It is started again on the same store; the producers
//! notice nothing but lost datagrams and go on with their sequences.
//!
//! Settings: TAFFRAIL_KILLS (8), TAFFRAIL_SEED (random, printed), TAFFRAIL_STAGING (/dev/shm: a folder
//! on tmpfs or hugetlbfs for the staging files).

mod support;

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use support::{Network, PATIENCE, SERVER_V4, Server, run, wait_until};
use taffrail::client::{Acks, Event, Producer, ProducerConfig, Target};
use taffrail::storage::lsm::codec;
use taffrail::storage::{Catalog, LogReader};
use taffrail::wire::record_batch::{self, Records};

/// Two shards, so that two logs recover; the smallest segments, so that rotations abound.
const STORAGE: &str = r#"shards = 2
segment_size = "4MiB"
staging_size = "4MiB"
commit_size = "128KiB"
"#;
const TABLES: &str = r#"
[datagram]
udp_port = 9700
[[topic]]
name = "alpha"
partitions = 3
[[topic]]
name = "beta"
partitions = 2
[[topic]]
name = "noise"
[[udp]]
udp_port = 5000
topic = "noise"
"#;
const TOPICS: [(&str, u32); 2] = [("alpha", 3), ("beta", 2)];
const DATAGRAM_PORT: u16 = 9700;
const NOISE_PORT: u16 = 5000;
/// Kills between two checks of the whole log.
const CHECK_EVERY: u64 = 25;
/// A producer's turn: so many messages at most, then a pause; all of them together send some
/// thousand messages a second, so that a log of hundreds of kills stays small.
const TURN_MESSAGES: u64 = 24;
const TURN: Duration = Duration::from_millis(3);
/// A round of load before the kill.
const LOAD: Duration = Duration::from_millis(350);
/// A cycle that takes longer is worth a line.
const SLOW: Duration = Duration::from_secs(3);
/// A start takes about so long.
const START: Duration = Duration::from_millis(300);

/// What the producers are to do.
const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// One producer, seen from the test.
struct Party {
    number: usize,
    topic: usize,
    acks: Acks,
    stable_id: Option<i64>,
    ledger: Mutex<Ledger>,
}

/// What a producer sent and was told.
#[derive(Default)]
struct Ledger {
    /// By partition and message: the acknowledged offset, −1 while there is none.
    offsets: Vec<Vec<i64>>,
    /// Sent and not acknowledged.
    outstanding: u64,
    /// What must never be reported.
    troubles: Vec<String>,
    retransmissions: u64,
}

struct Shared {
    seed: u64,
    parties: Vec<Party>,
    command: AtomicU8,
    /// Acknowledged messages of all producers.
    acknowledged: AtomicU64,
    /// Sent raw messages.
    noise: AtomicU64,
    /// Whether somebody else keeps the disk busy.
    disk_busy: AtomicBool,
}

/// A message's content follows from its place, so that the log can be checked without a copy.
fn content(seed: u64, producer: usize, partition: usize, message: u64) -> Vec<u8> {
    let mut text = format!("{producer} {partition} {message} ").into_bytes();
    let mut filler = SmallRng::seed_from_u64(
        seed ^ (producer as u64) << 56 ^ (partition as u64) << 48 ^ message,
    );
    let longest: usize = if filler.random_ratio(1, 8) { 1200 } else { 300 };
    let len = filler.random_range(0..longest);
    text.extend((0..len).map(|_| filler.random::<u8>()));
    text
}

/// The numbers at the start of a content.
fn place(value: &[u8]) -> Option<(usize, usize, u64)> {
    let mut fields = value.splitn(4, |&b| b == b' ');
    let mut number = || {
        std::str::from_utf8(fields.next()?)
            .ok()?
            .parse::<u64>()
            .ok()
    };
    Some((number()? as usize, number()? as usize, number()?))
}

/// Sends until it is told to stop; a pause lets it come to rest.
fn produce(shared: &Shared, party: &Party) {
    let (topic, partitions) = TOPICS[party.topic];
    let mut config = ProducerConfig::new(format!("{SERVER_V4}:{DATAGRAM_PORT}"), topic);
    config.acks = Some(party.acks);
    config.producer_id = party.stable_id;
    config.connect_timeout = PATIENCE;
    // Nothing may fail by time: a machine under load is slow, not wrong.
    config.delivery_timeout = Duration::from_secs(600);
    config.retry_max = Duration::from_millis(100);
    let mut producer = Producer::connect(config).unwrap();
    let mut rng = SmallRng::seed_from_u64(shared.seed ^ 0x5eed ^ party.number as u64);
    let mut next = vec![0u64; partitions as usize];
    while shared.command.load(Ordering::Acquire) != STOP {
        let turn = Instant::now() + TURN;
        if shared.command.load(Ordering::Acquire) == RUN && producer.outstanding() < 512 {
            for _ in 0..rng.random_range(1..=TURN_MESSAGES) {
                let partition = rng.random_range(0..partitions);
                let at = partition as usize;
                let value = content(shared.seed, party.number, at, next[at]);
                let mut ledger = party.ledger.lock().unwrap();
                let ticket = producer
                    .send(Target::Partition(partition), None, &value)
                    .unwrap();
                assert_eq!((ticket.partition, ticket.message), (partition, next[at]));
                next[at] += 1;
                ledger.offsets[at].push(-1);
                ledger.outstanding += 1;
            }
        }
        loop {
            let left = turn.saturating_duration_since(Instant::now());
            producer.poll(left).unwrap();
            let mut ledger = party.ledger.lock().unwrap();
            while let Some(event) = producer.next_event() {
                take(&mut ledger, &shared.acknowledged, event);
            }
            ledger.retransmissions = producer.stats().retransmissions;
            if left.is_zero() {
                break;
            }
        }
    }
}

fn take(ledger: &mut Ledger, acknowledged: &AtomicU64, event: Event) {
    let Event::Delivered {
        partition,
        messages,
        base_offset: Some(base_offset),
    } = event
    else {
        // Failed, forgotten, or delivered without an offset: none of it may come of a kill.
        ledger.troubles.push(format!("{event:?}"));
        return;
    };
    let count = messages.end - messages.start;
    for (offset, message) in (base_offset..).zip(messages) {
        let place = &mut ledger.offsets[partition as usize][message as usize];
        if *place != -1 {
            ledger
                .troubles
                .push(format!("message {message} was acknowledged twice"));
        }
        *place = offset;
    }
    ledger.outstanding -= count;
    acknowledged.fetch_add(count, Ordering::Release);
}

/// Raw datagrams: what is lost while the server is down is lost, the rest is stored once.
fn make_noise(shared: &Shared) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let to: SocketAddr = format!("{SERVER_V4}:{NOISE_PORT}").parse().unwrap();
    while shared.command.load(Ordering::Acquire) != STOP {
        std::thread::sleep(Duration::from_millis(2));
        if shared.command.load(Ordering::Acquire) == RUN {
            let number = shared.noise.fetch_add(1, Ordering::Relaxed);
            // The queue may be full: the message is lost before it was sent.
            let _ = socket.send_to(format!("noise {number}").as_bytes(), to);
        }
    }
}

/// A neighbour on the server's disk: commits queue up behind its writes, so that kills find many frames
/// in the staging file alone.
fn keep_disk_busy(shared: &Shared, path: &Path) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    let block = vec![0x55; 8 << 20];
    let mut at = 0;
    while shared.command.load(Ordering::Acquire) != STOP {
        if shared.disk_busy.load(Ordering::Relaxed) {
            file.write_all_at(&block, at).unwrap();
            at = (at + block.len() as u64) % (64 << 20);
            file.sync_data().unwrap();
        } else {
            std::thread::sleep(TURN);
        }
    }
}

/// What is wrong with a log; all zero when nothing is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Faults {
    /// Acknowledged, and not in the log.
    lost: u64,
    /// In the log twice.
    duplicate: u64,
    /// In the log at another offset than acknowledged, with another content, out of order, or in a
    /// place where nothing belongs.
    wrong: u64,
}

impl AddAssign for Faults {
    fn add_assign(&mut self, other: Self) {
        self.lost += other.lost;
        self.duplicate += other.duplicate;
        self.wrong += other.wrong;
    }
}

/// What has been checked of the log so far, and what was found.
#[derive(Default)]
struct Audit {
    /// By topic and partition: the next offset to check.
    next_offset: HashMap<(String, u32), i64>,
    /// By producer and partition: the message that comes next.
    next_message: HashMap<(usize, usize), u64>,
    next_noise: u64,
    noise: u64,
    gaps: u64,
    faults: Faults,
    examples: Vec<String>,
}

impl Audit {
    fn fault(&mut self, faults: Faults, what: impl FnOnce() -> String) {
        self.faults += faults;
        if self.examples.len() < 20 {
            self.examples.push(what());
        }
    }

    fn wrong(&mut self, what: impl FnOnce() -> String) {
        let wrong = Faults {
            wrong: 1,
            ..Faults::default()
        };
        self.fault(wrong, what);
    }

    /// Reads what the log has got since the last call, from the files of a stopped server to which
    /// everything sent was acknowledged.
    fn check(&mut self, shared: &Shared, data: &Path) {
        let catalog = Catalog::open_read_only(data).unwrap();
        let mut readers: Vec<LogReader> = (0..2)
            .map(|shard| LogReader::offline(data, shard).unwrap())
            .collect();
        let mut bytes = Vec::new();
        for topic in catalog.topics() {
            for (partition, &shard) in topic.shards.iter().enumerate() {
                let reader = &mut readers[usize::from(shard)];
                let key = topic.key(partition as u32).unwrap();
                let end = reader.bounds(key).unwrap().1;
                let name = (topic.name.clone(), partition as u32);
                let mut next = self.next_offset.get(&name).copied().unwrap_or(0);
                while next < end {
                    bytes.clear();
                    reader.read(key, next, 1 << 20, &mut bytes).unwrap();
                    next = self.batches(shared, &topic.name, partition, next, &bytes);
                }
                self.next_offset.insert(name, next);
            }
        }
        // Everything is acknowledged, so every message sent must have been met.
        for party in &shared.parties {
            let ledger = party.ledger.lock().unwrap();
            for (partition, offsets) in ledger.offsets.iter().enumerate() {
                let met = *self
                    .next_message
                    .entry((party.number, partition))
                    .or_default();
                let missing = (offsets.len() as u64).saturating_sub(met);
                if missing > 0 {
                    let lost = Faults {
                        lost: missing,
                        ..Faults::default()
                    };
                    self.next_message
                        .insert((party.number, partition), offsets.len() as u64);
                    self.fault(lost, || {
                        format!("producer {}: messages {met} to {} of partition {partition} are not in the log", party.number, offsets.len() - 1)
                    });
                }
            }
        }
    }

    fn batches(
        &mut self,
        shared: &Shared,
        topic: &str,
        partition: usize,
        mut next: i64,
        mut bytes: &[u8],
    ) -> i64 {
        let began = next;
        let mut scratch = Vec::new();
        while !bytes.is_empty() {
            let header = record_batch::parse_header(bytes).unwrap();
            let (batch, rest) = bytes.split_at(header.total_len());
            bytes = rest;
            record_batch::validate(batch).unwrap();
            for record in Records::new(codec::plain(batch, &mut scratch).unwrap()).unwrap() {
                let record = record.unwrap();
                if record.offset < began {
                    // Seen by the last check; since then a flush has merged its batch with later ones.
                    continue;
                }
                if record.offset < next {
                    self.wrong(|| {
                        format!("{topic}-{partition}: offset {} comes again", record.offset)
                    });
                    continue;
                }
                if record.offset != next {
                    self.wrong(|| {
                        format!(
                            "{topic}-{partition}: offset {} follows {}",
                            record.offset,
                            next - 1
                        )
                    });
                }
                next = record.offset + 1;
                let value = record.value.unwrap_or_default();
                if header.is_control() {
                    self.gaps += 1;
                } else if topic == "noise" {
                    self.raw(shared, value);
                } else {
                    self.message(shared, partition, record.offset, value);
                }
            }
        }
        next
    }

    fn raw(&mut self, shared: &Shared, value: &[u8]) {
        let number = value
            .strip_prefix(b"noise ")
            .and_then(|rest| std::str::from_utf8(rest).ok()?.parse::<u64>().ok());
        match number {
            Some(number) if number < shared.noise.load(Ordering::Relaxed) => {
                if number < self.next_noise {
                    let duplicate = Faults {
                        duplicate: 1,
                        ..Faults::default()
                    };
                    self.fault(duplicate, || {
                        format!("raw message {number} comes again or late")
                    });
                }
                self.next_noise = number + 1;
                self.noise += 1;
            }
            _ => self.wrong(|| format!("raw message {:?}", String::from_utf8_lossy(value))),
        }
    }

    fn message(&mut self, shared: &Shared, partition: usize, offset: i64, value: &[u8]) {
        let Some((producer, _, message)) = place(value)
            .filter(|&(producer, at, _)| producer < shared.parties.len() && at == partition)
        else {
            self.wrong(|| format!("offset {offset} holds a message of nobody"));
            return;
        };
        let who = move || format!("producer {producer}, partition {partition}, message {message}");
        let expected = self.next_message.entry((producer, partition)).or_default();
        let before = *expected;
        if message < before {
            let duplicate = Faults {
                duplicate: 1,
                ..Faults::default()
            };
            self.fault(duplicate, || format!("{} comes again", who()));
            return;
        }
        *expected = message + 1;
        if message > before {
            let lost = Faults {
                lost: message - before,
                ..Faults::default()
            };
            self.fault(lost, || format!("{} follows message {before}", who()));
        }
        let told = {
            let ledger = shared.parties[producer].ledger.lock().unwrap();
            let told = ledger.offsets[partition].get(message as usize).copied();
            told.unwrap_or(-1)
        };
        if told != offset {
            self.wrong(|| format!("{} is at offset {offset}, told was {told}", who()));
        }
        if value != content(shared.seed, producer, partition, message) {
            self.wrong(|| format!("{} has another content", who()));
        }
    }

    /// On the files as a kill left them, without the staging file: what acks=all was told of is there.
    fn check_durable(&mut self, shared: &Shared, data: &Path) {
        // What was told is read first: nobody is told anything while the server is dead.
        let told: Vec<_> = shared
            .parties
            .iter()
            .filter(|party| party.acks == Acks::Durable)
            .map(|party| {
                let ledger = party.ledger.lock().unwrap();
                let newest = |offsets: &Vec<i64>| offsets.iter().rev().take(2048).max().copied();
                let newest: Vec<i64> = ledger
                    .offsets
                    .iter()
                    .map(|offsets| newest(offsets).unwrap_or(-1))
                    .collect();
                (party.topic, newest)
            })
            .collect();
        let catalog = Catalog::open_read_only(data).unwrap();
        let mut readers: Vec<LogReader> = (0..2)
            .map(|shard| LogReader::offline(data, shard).unwrap())
            .collect();
        for (topic, newest) in told {
            let topic = catalog.topic(TOPICS[topic].0).unwrap();
            for (partition, &offset) in newest.iter().enumerate() {
                let key = topic.key(partition as u32).unwrap();
                let reader = &mut readers[usize::from(topic.shards[partition])];
                let end = reader.bounds(key).unwrap().1;
                if offset >= end {
                    let lost = Faults {
                        lost: (offset - end + 1) as u64,
                        ..Faults::default()
                    };
                    self.fault(lost, || {
                        format!(
                            "{}-{partition}: acks=all was told offset {offset}, the files end at {end}",
                            topic.name
                        )
                    });
                }
            }
        }
    }
}

/// When to kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Moment {
    /// After some time under load.
    Load,
    /// While it starts and recovers.
    Start,
    /// Right after a segment was begun.
    Rotation,
    /// As an acknowledgement arrives.
    Answer,
    /// During a clean stop.
    Stop,
}

/// Segments with a header, over both shards.
fn segments_begun(data: &Path) -> usize {
    use std::os::unix::fs::FileExt;
    let mut begun = 0;
    for shard in 0..2 {
        let Ok(entries) = std::fs::read_dir(data.join(format!("shard-{shard:03}"))) else {
            continue;
        };
        let mut paths: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "seg"))
            .collect();
        paths.sort();
        // Only the newest can be unused.
        let blank = |path: &PathBuf| {
            let mut magic = [0; 8];
            std::fs::File::open(path)
                .and_then(|file| file.read_exact_at(&mut magic, 0))
                .is_err()
                || magic == [0; 8]
        };
        let unused = paths.iter().rev().take(4).filter(|p| blank(p)).count();
        begun += paths.len() - unused;
    }
    begun
}

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

#[test]
fn no_acknowledged_message_is_lost_or_doubled_by_kills() {
    let kills = setting("TAFFRAIL_KILLS").unwrap_or(8);
    let seed = setting("TAFFRAIL_SEED").unwrap_or_else(rand::random);
    let staging = std::env::var("TAFFRAIL_STAGING").unwrap_or_else(|_| "/dev/shm".to_owned());
    let mut rng = SmallRng::seed_from_u64(seed);
    // One commit at a time leaves most in the staging file alone; several leave holes on the disk.
    let in_flight = if rng.random() { 1 } else { 4 };
    println!("TAFFRAIL_KILLS={kills} TAFFRAIL_SEED={seed}, {in_flight} commits in flight");

    let (network, folder) = (Network::new(), tempfile::tempdir().unwrap());
    let tables = format!("{}{TABLES}", network.port());
    let mut server = Server::prepare(
        folder.path(),
        Some(&network.server),
        Path::new(&staging),
        &format!("{STORAGE}commits_in_flight = {in_flight}\n"),
        &tables,
    );
    server.restart();
    let party = |number, topic, acks, stable_id| Party {
        number,
        topic,
        acks,
        stable_id,
        ledger: Mutex::new(Ledger {
            offsets: vec![Vec::new(); TOPICS[topic].1 as usize],
            ..Ledger::default()
        }),
    };
    let shared = Arc::new(Shared {
        seed,
        parties: vec![
            party(0, 0, Acks::Staged, None),
            party(1, 0, Acks::Durable, None),
            party(2, 0, Acks::Staged, Some(42)),
            party(3, 1, Acks::Durable, Some(42)),
            party(4, 1, Acks::Staged, None),
        ],
        command: AtomicU8::new(RUN),
        acknowledged: AtomicU64::new(0),
        noise: AtomicU64::new(0),
        disk_busy: AtomicBool::new(false),
    });
    let mut audit = Audit::default();
    let mut moments: HashMap<Moment, u64> = HashMap::new();
    let (mut starts, mut start_time, mut slowest) = (0u32, Duration::ZERO, Duration::ZERO);
    let began = Instant::now();

    std::thread::scope(|scope| {
        let network = &network;
        // However the scope ends, the threads must.
        let stop = StopOnDrop(&shared);
        for party in &shared.parties {
            let shared = &shared;
            scope.spawn(move || network.producer.inside(|| produce(shared, party)));
        }
        let noise = &shared;
        scope.spawn(move || network.producer.inside(|| make_noise(noise)));
        let (busy, path) = (&shared, folder.path().join("neighbour"));
        scope.spawn(move || keep_disk_busy(busy, &path));
        wait_for_answers(&shared, 100);

        let data = server.data();
        let (mut done, mut next_check) = (0, CHECK_EVERY);
        while done < kills {
            let moment = match rng.random_range(0..20) {
                0..8 => Moment::Load,
                8..11 => Moment::Start,
                11..14 => Moment::Rotation,
                14..18 => Moment::Answer,
                _ => Moment::Stop,
            };
            let pause = rng.random_range(Duration::ZERO..LOAD);
            let cycle = Instant::now();
            let busy = rng.random_bool(0.5);
            shared.disk_busy.store(busy, Ordering::Relaxed);
            match moment {
                Moment::Load => std::thread::sleep(pause),
                // Killed once in any case, to come to a start; then again before it is over.
                Moment::Start => {
                    std::thread::sleep(pause);
                    server.kill();
                    for _ in 0..rng.random_range(1..4) {
                        server.spawn();
                        std::thread::sleep(rng.random_range(Duration::ZERO..START));
                        server.kill();
                        done += 1;
                        *moments.entry(moment).or_default() += 1;
                    }
                    server.spawn();
                    std::thread::sleep(rng.random_range(Duration::ZERO..START));
                }
                Moment::Rotation => {
                    let before = segments_begun(&data);
                    let end = Instant::now() + 4 * LOAD;
                    while segments_begun(&data) == before && Instant::now() < end {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    std::thread::sleep(rng.random_range(Duration::ZERO..Duration::from_millis(3)));
                }
                Moment::Answer => {
                    std::thread::sleep(pause / 4);
                    let before = shared.acknowledged.load(Ordering::Acquire);
                    let end = Instant::now() + LOAD;
                    while shared.acknowledged.load(Ordering::Acquire) == before
                        && Instant::now() < end
                    {
                        std::thread::yield_now();
                    }
                }
                Moment::Stop => {
                    std::thread::sleep(pause);
                    server.terminate();
                    std::thread::sleep(rng.random_range(Duration::ZERO..Duration::from_millis(80)));
                }
            }
            let killed = cycle.elapsed();
            server.kill();
            shared.disk_busy.store(false, Ordering::Relaxed);
            done += 1;
            *moments.entry(moment).or_default() += 1;
            if rng.random_ratio(1, 8) {
                audit.check_durable(&shared, &data);
            }

            let start = Instant::now();
            server.restart();
            let took = start.elapsed();
            (starts, start_time, slowest) = (starts + 1, start_time + took, slowest.max(took));
            // Producers that get through show that it works again; load comes with them.
            let answered = shared.acknowledged.load(Ordering::Acquire);
            wait_for_answers(&shared, answered + 1);
            if cycle.elapsed() > SLOW {
                println!(
                    "slow: kill {done} ({moment:?}) after {killed:.1?}, start {took:.1?}, answers after {:.1?}",
                    cycle.elapsed()
                );
            }

            if done >= next_check || done >= kills {
                next_check = done + CHECK_EVERY;
                settle_and_check(&mut server, &shared, &mut audit);
                if done < kills {
                    server.restart();
                    shared.command.store(RUN, Ordering::Release);
                }
            }
        }
        drop(stop);
    });

    let log = server.log();
    let staged_only: u64 = log
        .lines()
        .filter(|line| line.contains("only in the staging file"))
        .filter_map(|line| {
            let (before, _) = line.split_once(" batches in ")?;
            before.rsplit(' ').next()?.parse::<u64>().ok()
        })
        .sum();
    for line in log.lines() {
        if line.contains(" ERROR ") || line.contains("is gone") || line.contains("panicked") {
            audit.wrong(|| format!("the server said: {line}"));
        }
    }
    let (mut staged, mut durable, mut retransmissions) = (0, 0, 0);
    for party in &shared.parties {
        let ledger = party.ledger.lock().unwrap();
        for trouble in &ledger.troubles {
            audit.wrong(|| format!("producer {}: {trouble}", party.number));
        }
        let messages: usize = ledger.offsets.iter().map(Vec::len).sum();
        match party.acks {
            Acks::Durable => durable += messages,
            _ => staged += messages,
        }
        retransmissions += ledger.retransmissions;
    }
    let mut moments: Vec<_> = moments.into_iter().collect();
    moments.sort();
    let Faults {
        lost,
        duplicate,
        wrong,
    } = audit.faults;
    println!(
        "kills {} {moments:?} in {:.0?}; start {:.0?} on average, {slowest:.0?} at most; {retransmissions} retransmissions; \
         {staged_only} batches were only staged; {} raw messages of {}; {} gap records",
        moments.iter().map(|(_, n)| n).sum::<u64>(),
        began.elapsed(),
        start_time / starts.max(1),
        audit.noise,
        shared.noise.load(Ordering::Relaxed),
        audit.gaps,
    );
    println!(
        "acknowledged {} acks1 {staged} all {durable} lost {lost} duplicate {duplicate} wrong {wrong}",
        staged + durable
    );
    assert_eq!(audit.faults, Faults::default(), "{:#?}", audit.examples);
    assert!(staged > 0 && durable > 0 && audit.noise > 0);
}

/// Tells the threads to end, also when the test fails.
struct StopOnDrop<'a>(&'a Shared);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.command.store(STOP, Ordering::Release);
    }
}

fn wait_for_answers(shared: &Shared, count: u64) {
    wait_until("acknowledgements", || {
        shared.acknowledged.load(Ordering::Acquire) >= count
    });
}

fn at_rest(shared: &Shared) -> bool {
    let parties = shared.parties.iter();
    parties
        .map(|party| party.ledger.lock().unwrap().outstanding)
        .all(|outstanding| outstanding == 0)
}

impl Shared {
    fn retransmissions(&self) -> u64 {
        let parties = self.parties.iter();
        parties
            .map(|party| party.ledger.lock().unwrap().retransmissions)
            .sum()
    }

    /// A line for each producer.
    fn describe(&self) -> String {
        let mut text = String::new();
        for party in &self.parties {
            let ledger = party.ledger.lock().unwrap();
            text.push_str(&format!(
                "producer {} ({:?}): {} outstanding, troubles {:?}\n",
                party.number, party.acks, ledger.outstanding, ledger.troubles
            ));
        }
        text
    }
}

/// Lets the producers come to rest, checks the server's accounts, stops it and reads its whole log.
fn settle_and_check(server: &mut Server, shared: &Shared, audit: &mut Audit) {
    shared.command.store(PAUSE, Ordering::Release);
    let start = Instant::now();
    while !at_rest(shared) {
        if start.elapsed() > PATIENCE {
            let before = shared.retransmissions();
            // Do the producers still try?
            std::thread::sleep(Duration::from_secs(3));
            panic!(
                "producers do not come to rest:\n{}{} retransmissions in the last 3 s\n{:#?}",
                shared.describe(),
                shared.retransmissions() - before,
                server.stats()
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // Whether what was acknowledged is there is for the audit to say.
    server.settled(0);
    server.stop();
    let data = server.data();
    let verified = run(
        env!("CARGO_BIN_EXE_taffrail"),
        &["verify", data.to_str().unwrap()],
    );
    assert!(!verified.contains("DAMAGE"), "{verified}");
    audit.check(shared, &data);
}
