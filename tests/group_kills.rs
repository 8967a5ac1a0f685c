//! SIGKILLs in the middle of rebalances and commits: an offset whose commit was acknowledged is what the
//! restarted server answers with, or a later one of the same partition.
//!
//! The members commit ever larger offsets, leave and come back all the time, so that a kill falls into
//! joins, syncs and commits alike. TAFFRAIL_KILLS says how many; TAFFRAIL_SEED repeats a run's choices.

mod support;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kafka_protocol::messages::create_topics_request::CreatableTopic;
use kafka_protocol::messages::join_group_request::JoinGroupRequestProtocol;
use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::offset_fetch_request::OffsetFetchRequestTopic;
use kafka_protocol::messages::sync_group_request::SyncGroupRequestAssignment;
use kafka_protocol::messages::{
    CreateTopicsRequest, GroupId, HeartbeatRequest, JoinGroupRequest, LeaveGroupRequest,
    OffsetCommitRequest, OffsetFetchRequest, SyncGroupRequest, TopicName,
};
use kafka_protocol::protocol::StrBytes;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use support::Server;
use support::kafka::Connection;

const PARTITIONS: i32 = 8;
const MEMBERS: u64 = 4;
const TOPIC: &str = "orders";
const GROUP: &str = "settlement";

fn topic() -> TopicName {
    TopicName(StrBytes::from_static_str(TOPIC))
}

fn group() -> GroupId {
    GroupId(StrBytes::from_static_str(GROUP))
}

/// What the members know together.
struct Shared {
    address: SocketAddr,
    stop: AtomicBool,
    /// The last offset that was asked to be committed, of each partition.
    asked: Vec<AtomicI64>,
    /// The largest one acknowledged; -1: none.
    acknowledged: Vec<AtomicI64>,
    commits: AtomicU64,
    generations: AtomicU64,
    /// What an answer should never have said.
    wrong: Mutex<Vec<String>>,
}

/// Errors that a member of a group meets when the others come and go or the server starts again.
/// COORDINATOR_LOAD_IN_PROGRESS, COORDINATOR_NOT_AVAILABLE, NOT_COORDINATOR, ILLEGAL_GENERATION,
/// UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS, MEMBER_ID_REQUIRED.
const EXPECTED: [i16; 7] = [14, 15, 16, 22, 25, 27, 79];

enum Left {
    /// Something of [`EXPECTED`].
    Told,
    /// The connection is gone.
    Cut(io::Error),
}

impl From<io::Error> for Left {
    fn from(error: io::Error) -> Left {
        Left::Cut(error)
    }
}

impl Shared {
    fn check(&self, what: &str, error: i16) -> Result<(), Left> {
        match error {
            0 => Ok(()),
            _ if EXPECTED.contains(&error) => Err(Left::Told),
            _ => {
                self.wrong
                    .lock()
                    .unwrap()
                    .push(format!("{what}: error {error}"));
                Err(Left::Told)
            }
        }
    }

    fn member(&self, seed: u64) {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut id = StrBytes::default();
        while !self.stop.load(Ordering::Relaxed) {
            match self.connected(&mut id, &mut random) {
                Ok(()) => {}
                Err(Left::Told) => thread::sleep(Duration::from_millis(2)),
                Err(Left::Cut(error)) => {
                    assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "the server hangs");
                    thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// One membership: joins, commits for a while, and leaves.
    fn connected(&self, id: &mut StrBytes, random: &mut SmallRng) -> Result<(), Left> {
        let mut connection = Connection::open(self.address)?;
        let (generation, mine) = loop {
            let mut join = JoinGroupRequest::default()
                .with_group_id(group())
                .with_session_timeout_ms(6_000)
                .with_rebalance_timeout_ms(1_000)
                .with_member_id(id.clone())
                .with_protocol_type(StrBytes::from_static_str("consumer"));
            join.protocols = vec![
                JoinGroupRequestProtocol::default().with_name(StrBytes::from_static_str("range")),
            ];
            let joined = connection.call(5, &join)?;
            if joined.error_code == 79 {
                *id = joined.member_id;
                continue;
            }
            if joined.error_code == 25 {
                *id = StrBytes::default();
            }
            self.check("JoinGroup", joined.error_code)?;
            *id = joined.member_id.clone();
            let mut sync = SyncGroupRequest::default()
                .with_group_id(group())
                .with_generation_id(joined.generation_id)
                .with_member_id(id.clone());
            if joined.leader == joined.member_id {
                // The partitions dealt out, one byte each.
                let members = joined.members.len();
                for (i, member) in joined.members.iter().enumerate() {
                    let theirs: Vec<u8> = (0..PARTITIONS as u8)
                        .filter(|p| usize::from(*p) % members == i)
                        .collect();
                    sync.assignments.push(
                        SyncGroupRequestAssignment::default()
                            .with_member_id(member.member_id.clone())
                            .with_assignment(Bytes::from(theirs)),
                    );
                }
            }
            let synced = connection.call(3, &sync)?;
            match self.check("SyncGroup", synced.error_code) {
                Err(Left::Told) if synced.error_code == 27 => continue,
                other => other?,
            }
            break (joined.generation_id, synced.assignment);
        };
        self.generations.fetch_add(1, Ordering::Relaxed);
        for _ in 0..random.random_range(1..60) {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            if random.random_range(0..4) == 0 {
                let beat = HeartbeatRequest::default()
                    .with_group_id(group())
                    .with_generation_id(generation)
                    .with_member_id(id.clone());
                let answer = connection.call(3, &beat)?;
                self.check("Heartbeat", answer.error_code)?;
                continue;
            }
            let mut partitions = Vec::new();
            for &partition in &mine {
                let next = self.asked[usize::from(partition)].fetch_add(1, Ordering::Relaxed) + 1;
                partitions.push(
                    OffsetCommitRequestPartition::default()
                        .with_partition_index(i32::from(partition))
                        .with_committed_offset(next),
                );
            }
            let commit = OffsetCommitRequest::default()
                .with_group_id(group())
                .with_generation_id_or_member_epoch(generation)
                .with_member_id(id.clone())
                .with_topics(vec![
                    OffsetCommitRequestTopic::default()
                        .with_name(topic())
                        .with_partitions(partitions.clone()),
                ]);
            let answer = connection.call(7, &commit)?;
            for told in answer.topics.iter().flat_map(|t| &t.partitions) {
                self.check("OffsetCommit", told.error_code)?;
                let asked = partitions
                    .iter()
                    .find(|p| p.partition_index == told.partition_index)
                    .unwrap();
                self.acknowledged[told.partition_index as usize]
                    .fetch_max(asked.committed_offset, Ordering::Release);
                self.commits.fetch_add(1, Ordering::Relaxed);
            }
        }
        // Others go without a word, and are missed later.
        if random.random_range(0..8) > 0 {
            let leave = LeaveGroupRequest::default()
                .with_group_id(group())
                .with_member_id(id.clone());
            let answer = connection.call(1, &leave)?;
            *id = StrBytes::default();
            self.check("LeaveGroup", answer.error_code)?;
        }
        Ok(())
    }

    /// Compares what the server holds with what was acknowledged before it was asked.
    fn compare(&self) -> BTreeMap<i32, i64> {
        let acknowledged: Vec<i64> = self
            .acknowledged
            .iter()
            .map(|a| a.load(Ordering::Acquire))
            .collect();
        let request = OffsetFetchRequest::default()
            .with_group_id(group())
            .with_topics(Some(vec![
                OffsetFetchRequestTopic::default()
                    .with_name(topic())
                    .with_partition_indexes((0..PARTITIONS).collect()),
            ]));
        let start = Instant::now();
        let answer = loop {
            let answer = Connection::open(self.address).and_then(|mut c| c.call(5, &request));
            match answer {
                Ok(answer) if answer.error_code == 0 => break answer,
                Ok(answer) => assert!(EXPECTED.contains(&answer.error_code), "{answer:?}"),
                Err(error) => assert!(start.elapsed().as_secs() < 60, "{error}"),
            }
            thread::sleep(Duration::from_millis(5));
        };
        let mut offsets = BTreeMap::new();
        for partition in answer.topics.iter().flat_map(|t| &t.partitions) {
            assert_eq!(partition.error_code, 0);
            let index = partition.partition_index;
            let (held, told) = (partition.committed_offset, acknowledged[index as usize]);
            assert!(
                held >= told,
                "partition {index}: the server holds offset {held}, {told} was acknowledged"
            );
            assert!(held <= self.asked[index as usize].load(Ordering::Relaxed));
            offsets.insert(index, held);
        }
        assert_eq!(offsets.len(), PARTITIONS as usize);
        offsets
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn no_acknowledged_offset_is_lost_by_kills() {
    let kills = setting("TAFFRAIL_KILLS").unwrap_or(12);
    let seed = setting("TAFFRAIL_SEED").unwrap_or_else(rand::random);
    println!("TAFFRAIL_KILLS={kills} TAFFRAIL_SEED={seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let folder = tempfile::tempdir().unwrap();
    let address = support::free_address();
    let mut server = Server::start(
        folder.path(),
        None,
        "segment_size = \"4MiB\"\n",
        &format!("[kafka]\nlisten = [\"{address}\"]\ngroup_initial_rebalance_delay = \"100ms\"\n"),
    );
    let created = Connection::open(address)
        .and_then(|mut c| {
            c.call(
                4,
                &CreateTopicsRequest::default()
                    .with_timeout_ms(30_000)
                    .with_topics(vec![
                        CreatableTopic::default()
                            .with_name(topic())
                            .with_num_partitions(PARTITIONS)
                            .with_replication_factor(1),
                    ]),
            )
        })
        .unwrap();
    assert!(
        created.topics.iter().all(|t| t.error_code == 0),
        "{created:?}"
    );
    let shared = Shared {
        address,
        stop: AtomicBool::new(false),
        asked: (0..PARTITIONS).map(|_| AtomicI64::new(0)).collect(),
        acknowledged: (0..PARTITIONS).map(|_| AtomicI64::new(-1)).collect(),
        commits: AtomicU64::new(0),
        generations: AtomicU64::new(0),
        wrong: Mutex::new(Vec::new()),
    };
    thread::scope(|scope| {
        // The members end also when a check below fails.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&shared.stop);
        for member in 0..MEMBERS {
            let shared = &shared;
            let seed = random.random::<u64>() ^ member;
            scope.spawn(move || shared.member(seed));
        }
        for _ in 0..kills {
            let before = shared.commits.load(Ordering::Relaxed);
            // Something has to be lost.
            support::wait_until("commits go on", || {
                shared.commits.load(Ordering::Relaxed) > before
            });
            thread::sleep(Duration::from_millis(random.random_range(0..300)));
            server.kill();
            server.restart();
            shared.compare();
        }
        shared.stop.store(true, Ordering::Relaxed);
    });
    // Nobody commits any more: what is held now outlives a clean stop as well.
    let held = shared.compare();
    server.stop();
    server.restart();
    assert_eq!(shared.compare(), held);
    server.stop();
    let (commits, generations) = (shared.commits.into_inner(), shared.generations.into_inner());
    println!("kills {kills} commits {commits} memberships {generations} lost 0");
    assert_eq!(shared.wrong.into_inner().unwrap(), Vec::<String>::new());
    assert!(generations > kills);
}
