//! Scenarios of groups, random operations against the invariants, and restarts.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const SESSION_MS: u64 = 10_000;
const REBALANCE_MS: u64 = 60_000;

/// A coordinator with a log that it appends to, by hand or at once.
struct Bench {
    coordinator: Coordinator,
    now: Now,
    token: Token,
    answers: HashMap<Token, Response>,
    /// What is durable, in order.
    log: Vec<OffsetsRecord>,
    /// Appends that are not reported yet.
    appends: VecDeque<Append>,
    by_hand: bool,
    /// Restarts so far: each coordinator makes ids of its own.
    restarts: u8,
}

fn config() -> Config {
    Config {
        initial_rebalance_delay_ms: 0,
        ..Config::default()
    }
}

fn start() -> Now {
    Now {
        mono_ms: 1_000,
        unix_ms: 1_700_000_000_000,
    }
}

impl Bench {
    fn new(config: Config) -> Self {
        let mut coordinator = Coordinator::new(config, [7; 32]);
        coordinator.loaded(start());
        Self {
            coordinator,
            now: start(),
            token: 0,
            answers: HashMap::new(),
            log: Vec::new(),
            appends: VecDeque::new(),
            by_hand: false,
            restarts: 0,
        }
    }

    fn settle(&mut self) {
        loop {
            while let Some((token, response)) = self.coordinator.take_answer() {
                let previous = self.answers.insert(token, response);
                assert!(previous.is_none(), "answered twice");
            }
            while let Some(append) = self.coordinator.take_append() {
                assert!(!append.records.is_empty());
                self.appends.push_back(append);
            }
            self.coordinator.check();
            if self.by_hand || self.appends.is_empty() {
                return;
            }
            self.finish(0, Ok(()));
        }
    }

    /// Reports an append's end.
    fn finish(&mut self, index: usize, result: Result<(), AppendError>) {
        let append = self.appends.remove(index).unwrap();
        if result.is_ok() {
            self.log.extend(append.records);
        }
        self.coordinator.appended(self.now, append.id, result);
    }

    fn finish_all(&mut self) {
        while !self.appends.is_empty() {
            self.finish(0, Ok(()));
            self.settle();
        }
    }

    fn send(&mut self, version: i16, request: Request<'_>) -> Token {
        self.token += 1;
        let context = Context {
            client_id: "client",
            client_host: "/127.0.0.1",
            version,
        };
        self.coordinator
            .handle(self.now, self.token, &context, request);
        self.settle();
        self.token
    }

    fn pass(&mut self, ms: u64) {
        let end = self.now.mono_ms + ms;
        while let Some(at) = self.coordinator.next_deadline().filter(|&at| at <= end) {
            let at = at.max(self.now.mono_ms);
            self.now.unix_ms += (at - self.now.mono_ms) as i64;
            self.now.mono_ms = at;
            self.coordinator.advance(self.now);
            self.settle();
            let next = self.coordinator.next_deadline();
            assert!(next.is_none_or(|next| next > at), "time stands still");
        }
        self.now.unix_ms += (end - self.now.mono_ms) as i64;
        self.now.mono_ms = end;
    }

    fn take(&mut self, token: Token) -> Response {
        self.answers.remove(&token).expect("an answer")
    }

    fn is_open(&self, token: Token) -> bool {
        !self.answers.contains_key(&token)
    }

    fn taken_join(&mut self, token: Token) -> JoinGroupResponse<'static> {
        match self.take(token) {
            Response::JoinGroup(response) => response,
            other => panic!("{other:?}"),
        }
    }

    fn taken_sync(&mut self, token: Token) -> SyncGroupResponse<'static> {
        match self.take(token) {
            Response::SyncGroup(response) => response,
            other => panic!("{other:?}"),
        }
    }

    fn join_as(&mut self, version: i16, id: &str, instance: Option<&str>) -> Token {
        self.send(version, Request::JoinGroup(join_request(id, instance)))
    }

    /// A new dynamic member, by the way of its first request; it waits for the rebalance.
    fn join(&mut self) -> (String, Token) {
        let token = self.join_as(9, "", None);
        let refused = self.taken_join(token);
        assert_eq!(refused.error_code, Code::MemberIdRequired);
        let id = refused.member_id.into_owned();
        let token = self.join_as(9, &id, None);
        (id, token)
    }

    fn sync(&mut self, id: &str, generation: i32, assignments: &[(&str, &str)]) -> Token {
        self.sync_as(id, None, generation, assignments)
    }

    fn sync_as(
        &mut self,
        id: &str,
        instance: Option<&str>,
        generation: i32,
        assignments: &[(&str, &str)],
    ) -> Token {
        let assignments = assignments
            .iter()
            .map(|&(id, assignment)| SyncGroupAssignment {
                member_id: id.into(),
                assignment: assignment.as_bytes().into(),
            })
            .collect();
        let request = SyncGroupRequest {
            group_id: "g".into(),
            generation_id: generation,
            member_id: id.into(),
            group_instance_id: instance.map(Into::into),
            protocol_type: Some(CONSUMER.into()),
            protocol_name: Some("range".into()),
            assignments,
        };
        self.send(5, Request::SyncGroup(request))
    }

    fn beat(&mut self, id: &str, generation: i32) -> Code {
        self.beat_as(id, None, generation)
    }

    fn beat_as(&mut self, id: &str, instance: Option<&str>, generation: i32) -> Code {
        let request = HeartbeatRequest {
            group_id: "g".into(),
            generation_id: generation,
            member_id: id.into(),
            group_instance_id: instance.map(Into::into),
        };
        let token = self.send(4, Request::Heartbeat(request));
        match self.take(token) {
            Response::Heartbeat(response) => response.error_code,
            other => panic!("{other:?}"),
        }
    }

    fn leave(&mut self, members: &[(&str, Option<&str>)]) -> Vec<Code> {
        let members = members
            .iter()
            .map(|&(id, instance)| LeaveGroupMember {
                member_id: id.into(),
                group_instance_id: instance.map(Into::into),
                reason: None,
            })
            .collect();
        let request = LeaveGroupRequest {
            group_id: "g".into(),
            members,
            ..LeaveGroupRequest::default()
        };
        let token = self.send(5, Request::LeaveGroup(request));
        match self.take(token) {
            Response::LeaveGroup(response) => {
                assert_eq!(response.error_code, Code::None);
                response
                    .members
                    .iter()
                    .map(|member| member.error_code)
                    .collect()
            }
            other => panic!("{other:?}"),
        }
    }

    fn commit(&mut self, id: &str, generation: i32, offsets: &[(&str, i32, i64)]) -> Token {
        self.commit_with(id, generation, offsets, "", -1)
    }

    fn commit_with(
        &mut self,
        id: &str,
        generation: i32,
        offsets: &[(&str, i32, i64)],
        metadata: &str,
        retention_ms: i64,
    ) -> Token {
        let topics = offsets
            .iter()
            .map(|&(topic, partition, offset)| OffsetCommitTopic {
                name: topic.into(),
                partitions: vec![OffsetCommitPartition {
                    partition_index: partition,
                    committed_offset: offset,
                    committed_leader_epoch: -1,
                    committed_metadata: Some(metadata.into()),
                }],
            })
            .collect();
        let request = OffsetCommitRequest {
            group_id: "g".into(),
            generation_id_or_member_epoch: generation,
            member_id: id.into(),
            retention_time_ms: retention_ms,
            topics,
            ..OffsetCommitRequest::default()
        };
        self.send(8, Request::OffsetCommit(request))
    }

    fn committed(&mut self, token: Token) -> Vec<Code> {
        match self.take(token) {
            Response::OffsetCommit(response) => errors(&response.topics),
            other => panic!("{other:?}"),
        }
    }

    fn fetch(&mut self, topic: &str, partition: i32) -> i64 {
        let request = OffsetFetchRequest {
            group_id: "g".into(),
            topics: Some(vec![TopicPartitions {
                name: topic.into(),
                partition_indexes: vec![partition],
            }]),
            ..OffsetFetchRequest::default()
        };
        let token = self.send(7, Request::OffsetFetch(request));
        match self.take(token) {
            Response::OffsetFetch(response) => {
                assert_eq!(response.error_code, Code::None);
                response.topics[0].partitions[0].committed_offset
            }
            other => panic!("{other:?}"),
        }
    }

    fn describe(&mut self) -> DescribedGroup<'static> {
        let request = DescribeGroupsRequest {
            groups: vec!["g".into()],
            ..DescribeGroupsRequest::default()
        };
        let token = self.send(5, Request::DescribeGroups(request));
        match self.take(token) {
            Response::DescribeGroups(mut response) => response.groups.remove(0),
            other => panic!("{other:?}"),
        }
    }

    fn state(&mut self) -> String {
        self.describe().group_state.into_owned()
    }

    fn delete_group(&mut self) -> Token {
        let request = DeleteGroupsRequest {
            groups_names: vec!["g".into()],
        };
        self.send(2, Request::DeleteGroups(request))
    }

    fn deleted(&mut self, token: Token) -> Code {
        match self.take(token) {
            Response::DeleteGroups(response) => response.results[0].error_code,
            other => panic!("{other:?}"),
        }
    }

    /// A stable group of `n` members in generation 1, the leader first.
    fn stable(&mut self, n: usize) -> Vec<String> {
        let pending: Vec<String> = (0..n)
            .map(|_| {
                let token = self.join_as(9, "", None);
                self.taken_join(token).member_id.into_owned()
            })
            .collect();
        self.coordinator.io.config.initial_rebalance_delay_ms = 10;
        let joins: Vec<Token> = pending.iter().map(|id| self.join_as(9, id, None)).collect();
        self.pass(100);
        self.coordinator.io.config.initial_rebalance_delay_ms = 0;
        self.finish_rebalance(&pending, &joins, 1)
    }

    /// Syncs all members that wait in these joins; returns them with the leader first.
    fn finish_rebalance(
        &mut self,
        ids: &[String],
        joins: &[Token],
        generation: i32,
    ) -> Vec<String> {
        let mut leader = String::new();
        for (id, &token) in ids.iter().zip(joins) {
            let joined = self.taken_join(token);
            assert_eq!(joined.error_code, Code::None);
            assert_eq!(joined.generation_id, generation);
            assert_eq!(joined.member_id, *id);
            let is_leader = joined.leader == *id;
            assert_eq!(joined.members.len(), if is_leader { ids.len() } else { 0 });
            leader = joined.leader.into_owned();
        }
        let mut ordered = vec![leader.clone()];
        ordered.extend(ids.iter().filter(|&id| *id != leader).cloned());
        let assignments: Vec<(&str, &str)> =
            ids.iter().map(|id| (id.as_str(), id.as_str())).collect();
        let syncs: Vec<(String, Token)> = ordered
            .iter()
            .rev()
            .map(|id| {
                let assignments = if *id == leader { &assignments[..] } else { &[] };
                (id.clone(), self.sync(id, generation, assignments))
            })
            .collect();
        for (id, token) in syncs {
            let synced = self.taken_sync(token);
            assert_eq!(synced.error_code, Code::None);
            assert_eq!(*synced.assignment, *id.as_bytes());
            assert_eq!(synced.protocol_name.as_deref(), Some("range"));
        }
        ordered
    }

    /// What a new coordinator makes of the log.
    fn restarted(&self) -> Bench {
        let mut bench = Bench::new(self.coordinator.io.config.clone());
        bench.restarts = self.restarts.wrapping_add(1);
        let seed = [bench.restarts.wrapping_add(7); 32];
        bench.coordinator = Coordinator::new(self.coordinator.io.config.clone(), seed);
        bench.now = self.now;
        bench.log = self.log.clone();
        for record in &self.log {
            bench
                .coordinator
                .replay(&record.key, record.value.as_deref())
                .unwrap();
        }
        bench.coordinator.loaded(self.now);
        bench.settle();
        bench
    }
}

fn errors(topics: &[TopicResults<'_>]) -> Vec<Code> {
    topics
        .iter()
        .flat_map(|topic| &topic.partitions)
        .map(|partition| partition.error_code)
        .collect()
}

/// A subscription to topic "t", as consumers write it.
const SUBSCRIPTION: &[u8] = &[0, 0, 0, 0, 0, 1, 0, 1, b't', 0, 0, 0, 0];

fn join_request<'a>(id: &'a str, instance: Option<&'a str>) -> JoinGroupRequest<'a> {
    JoinGroupRequest {
        group_id: "g".into(),
        session_timeout_ms: SESSION_MS as i32,
        rebalance_timeout_ms: REBALANCE_MS as i32,
        member_id: id.into(),
        group_instance_id: instance.map(Into::into),
        protocol_type: CONSUMER.into(),
        protocols: ["range", "sticky"]
            .map(|name| JoinGroupProtocol {
                name: name.into(),
                metadata: SUBSCRIPTION.into(),
            })
            .into(),
        reason: None,
    }
}

#[test]
fn a_member_gets_an_id_joins_and_is_assigned_when_that_is_durable() {
    let mut bench = Bench::new(config());
    bench.by_hand = true;
    let (id, token) = bench.join();
    let joined = bench.taken_join(token);
    assert_eq!(joined.error_code, Code::None);
    assert_eq!((joined.generation_id, &*joined.leader), (1, &*id));
    assert_eq!(joined.protocol_name.as_deref(), Some("range"));
    assert_eq!(joined.protocol_type.as_deref(), Some("consumer"));
    assert_eq!(joined.members.len(), 1);
    assert_eq!(*joined.members[0].metadata, *SUBSCRIPTION);
    assert_eq!(bench.beat(&id, 1), Code::None);
    assert_eq!(bench.beat(&id, 2), Code::IllegalGeneration);
    assert_eq!(bench.beat("other", 1), Code::UnknownMemberId);

    let token = bench.sync(&id, 1, &[(&id, "all")]);
    assert!(bench.is_open(token), "not before it is in the log");
    assert_eq!(bench.state(), "CompletingRebalance");
    bench.finish_all();
    assert_eq!(*bench.taken_sync(token).assignment, *b"all");
    assert_eq!(bench.state(), "Stable");
    // Asked again, it gets the same at once.
    let token = bench.sync(&id, 1, &[]);
    assert_eq!(*bench.taken_sync(token).assignment, *b"all");
    // So it does when it joins again: but as the leader it may want a rebalance.
    let token = bench.join_as(9, &id, None);
    assert_eq!(bench.taken_join(token).generation_id, 2);
}

#[test]
fn the_first_rebalance_waits_for_more_members_as_long_as_they_come() {
    let mut bench = Bench::new(Config {
        initial_rebalance_delay_ms: 3_000,
        ..Config::default()
    });
    let (_, first) = bench.join();
    bench.pass(2_000);
    let (_, second) = bench.join();
    bench.pass(2_000);
    assert!(bench.is_open(first), "a member came: wait again");
    let (_, third) = bench.join();
    bench.pass(5_000);
    for token in [first, second, third] {
        assert_eq!(bench.taken_join(token).generation_id, 1);
    }
    // Never longer than the rebalance time-out.
    let mut bench = Bench::new(Config {
        initial_rebalance_delay_ms: 3_000,
        ..Config::default()
    });
    let (_, first) = bench.join();
    for _ in 0..31 {
        bench.join();
        bench.pass(2_000);
    }
    assert_eq!(bench.taken_join(first).generation_id, 1);
}

#[test]
fn a_new_member_makes_all_join_again() {
    let mut bench = Bench::new(config());
    let mut ids = bench.stable(2);
    let (third, third_join) = bench.join();
    assert!(bench.is_open(third_join));
    for id in &ids {
        assert_eq!(bench.beat(id, 1), Code::RebalanceInProgress);
    }
    // A member may commit what it has read until the new generation begins.
    let token = bench.commit(&ids[0], 1, &[("t", 0, 5)]);
    assert_eq!(bench.committed(token), [Code::None]);
    let mut joins: Vec<Token> = ids.iter().map(|id| bench.join_as(9, id, None)).collect();
    ids.push(third);
    joins.push(third_join);
    let token = bench.commit(&ids[0], 1, &[("t", 0, 6)]);
    assert_eq!(bench.committed(token), [Code::IllegalGeneration]);
    let token = bench.commit(&ids[0], 2, &[("t", 0, 6)]);
    assert_eq!(bench.committed(token), [Code::RebalanceInProgress]);
    let leader = bench.finish_rebalance(&ids, &joins, 2).remove(0);
    assert_eq!(leader, ids[0], "the leader stays");
    let token = bench.commit(&ids[0], 2, &[("t", 0, 6)]);
    assert_eq!(bench.committed(token), [Code::None]);
    assert_eq!(bench.fetch("t", 0), 6);
    assert_eq!(bench.coordinator.stats().rebalances, 2);
}

#[test]
fn who_does_not_join_in_time_is_out_and_a_leader_is_replaced() {
    let mut bench = Bench::new(config());
    let ids = bench.stable(3);
    let follower = bench.send(
        9,
        Request::JoinGroup(JoinGroupRequest {
            protocols: vec![JoinGroupProtocol {
                name: "range".into(),
                metadata: b"other topics".into(),
            }],
            ..join_request(&ids[1], None)
        }),
    );
    // The others beat, so that their sessions live, but do not join.
    for _ in 0..=REBALANCE_MS / 5_000 {
        bench.pass(5_000);
        bench.beat(&ids[0], 1);
        bench.beat(&ids[2], 1);
    }
    let joined = bench.taken_join(follower);
    assert_eq!((joined.generation_id, &*joined.leader), (2, &*ids[1]));
    assert_eq!(joined.members.len(), 1);
    assert_eq!(bench.beat(&ids[0], 1), Code::UnknownMemberId);
    let token = bench.join_as(9, &ids[0], None);
    assert_eq!(bench.taken_join(token).error_code, Code::UnknownMemberId);
}

#[test]
fn a_leader_that_dies_before_it_assigns_makes_the_others_join_again() {
    let mut bench = Bench::new(config());
    let ids = bench.stable(2);
    let joins: Vec<Token> = ids.iter().map(|id| bench.join_as(9, id, None)).collect();
    for token in joins {
        assert_eq!(bench.taken_join(token).generation_id, 2);
    }
    let waiting = bench.sync(&ids[1], 2, &[]);
    bench.pass(SESSION_MS + 1);
    let synced = bench.taken_sync(waiting);
    assert_eq!(synced.error_code, Code::RebalanceInProgress);
    let token = bench.join_as(9, &ids[1], None);
    bench.finish_rebalance(&ids[1..], &[token], 3);
    assert_eq!(bench.coordinator.stats().expired_members, 1);
}

#[test]
fn who_never_asks_for_its_assignment_is_out() {
    let mut bench = Bench::new(config());
    let ids = bench.stable(2);
    for id in &ids {
        bench.join_as(9, id, None);
    }
    let token = bench.sync(&ids[0], 2, &[]);
    assert_eq!(bench.taken_sync(token).error_code, Code::None);
    for _ in 0..=REBALANCE_MS / 5_000 {
        bench.pass(5_000);
        bench.beat(&ids[0], 2);
        bench.beat(&ids[1], 2);
    }
    assert_eq!(bench.beat(&ids[0], 2), Code::RebalanceInProgress);
    assert_eq!(bench.beat(&ids[1], 2), Code::UnknownMemberId);
}

#[test]
fn a_member_whose_session_ends_is_out_and_the_group_empties() {
    let mut bench = Bench::new(config());
    let ids = bench.stable(1);
    bench.pass(SESSION_MS - 1);
    assert_eq!(bench.beat(&ids[0], 1), Code::None);
    bench.pass(SESSION_MS - 1);
    assert_eq!(bench.state(), "Stable");
    bench.pass(2);
    assert_eq!(bench.state(), "Empty");
    // An id that was given out and never used goes too.
    let token = bench.join_as(9, "", None);
    let id = bench.taken_join(token).member_id.into_owned();
    bench.pass(SESSION_MS + 1);
    let token = bench.join_as(9, &id, None);
    assert_eq!(bench.taken_join(token).error_code, Code::UnknownMemberId);
}

#[test]
fn the_protocol_that_most_like_is_chosen_among_those_that_all_support() {
    let mut bench = Bench::new(Config {
        initial_rebalance_delay_ms: 100,
        ..Config::default()
    });
    let mut join = |names: &[&'static str]| {
        let protocols = names
            .iter()
            .map(|&name| JoinGroupProtocol {
                name: name.into(),
                metadata: name.as_bytes().into(),
            })
            .collect();
        let request = JoinGroupRequest {
            protocols,
            ..join_request("", None)
        };
        // Version 3 takes a member at once.
        bench.send(3, Request::JoinGroup(request))
    };
    let tokens = [
        join(&["only-mine", "range", "sticky"]),
        join(&["sticky", "range"]),
        join(&["sticky", "range"]),
    ];
    let stranger = join(&["unknown"]);
    let refused = bench.taken_join(stranger);
    assert_eq!(refused.error_code, Code::InconsistentGroupProtocol);
    assert_eq!(
        refused.protocol_name.as_deref(),
        Some(""),
        "not null in version 3"
    );
    bench.pass(1_000);
    for token in tokens {
        let joined = bench.taken_join(token);
        assert_eq!(joined.protocol_name.as_deref(), Some("sticky"));
        for member in joined.members {
            assert_eq!(*member.metadata, *b"sticky");
        }
    }
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let mut bench = Bench::new(config());
    let mut refused = |request: JoinGroupRequest<'_>| {
        let token = bench.send(9, Request::JoinGroup(request));
        bench.taken_join(token).error_code
    };
    for session_timeout_ms in [-1, 0, 5_999, 1_800_001] {
        let request = JoinGroupRequest {
            session_timeout_ms,
            ..join_request("", None)
        };
        assert_eq!(refused(request), Code::InvalidSessionTimeout);
    }
    let request = JoinGroupRequest {
        group_id: "".into(),
        ..join_request("", None)
    };
    assert_eq!(refused(request), Code::InvalidGroupId);
    let request = JoinGroupRequest {
        protocols: Vec::new(),
        ..join_request("", None)
    };
    assert_eq!(refused(request), Code::InconsistentGroupProtocol);
    let request = JoinGroupRequest {
        protocol_type: "".into(),
        ..join_request("", None)
    };
    assert_eq!(refused(request), Code::InconsistentGroupProtocol);
    let mut request = join_request("", None);
    request.protocols[1].name = "range".into();
    assert_eq!(refused(request), Code::InconsistentGroupProtocol);
    let request = join_request("never-given-out", None);
    assert_eq!(refused(request), Code::UnknownMemberId);
    let request = join_request("", Some(""));
    assert_eq!(refused(request), Code::InvalidRequest);
    assert_eq!(
        bench.coordinator.stats().groups,
        0,
        "nothing is left of them"
    );

    let ids = bench.stable(1);
    let request = SyncGroupRequest {
        group_id: "g".into(),
        generation_id: 1,
        member_id: Cow::from(&ids[0]),
        protocol_name: Some("sticky".into()),
        ..SyncGroupRequest::default()
    };
    let token = bench.send(5, Request::SyncGroup(request));
    let error = bench.taken_sync(token).error_code;
    assert_eq!(error, Code::InconsistentGroupProtocol);
    let token = bench.sync(&ids[0], 3, &[]);
    let error = bench.taken_sync(token).error_code;
    assert_eq!(error, Code::IllegalGeneration);
}

#[test]
fn a_static_member_starts_again_without_a_rebalance() {
    for version in [5, 9] {
        let mut bench = Bench::new(config());
        let token = bench.join_as(version, "", Some("one"));
        let old = bench.taken_join(token).member_id.into_owned();
        assert!(old.starts_with("one-"));
        let token = bench.sync_as(&old, Some("one"), 1, &[(&old, "all")]);
        assert_eq!(*bench.taken_sync(token).assignment, *b"all");

        bench.by_hand = true;
        let token = bench.join_as(version, "", Some("one"));
        assert!(bench.is_open(token), "its new id is not durable yet");
        bench.finish_all();
        let joined = bench.taken_join(token);
        let new = joined.member_id.into_owned();
        assert_eq!(joined.error_code, Code::None);
        assert_eq!(joined.generation_id, 1);
        assert_ne!(new, old);
        if version >= 9 {
            assert!(joined.skip_assignment);
            assert_eq!((&*joined.leader, joined.members.len()), (&*new, 1));
        } else {
            assert_eq!((&*joined.leader, joined.members.len()), (&*old, 0));
        }
        assert_eq!(bench.state(), "Stable");
        let token = bench.sync_as(&new, Some("one"), 1, &[]);
        assert_eq!(*bench.taken_sync(token).assignment, *b"all");

        // The old one is fenced off, after a restart too.
        let mut restarted = bench.restarted();
        for bench in [&mut bench, &mut restarted] {
            let fenced = bench.beat_as(&old, Some("one"), 1);
            assert_eq!(fenced, Code::FencedInstanceId);
            assert_eq!(bench.beat(&old, 1), Code::UnknownMemberId);
            assert_eq!(bench.beat_as(&new, Some("one"), 1), Code::None);
            let token = bench.sync_as(&old, Some("one"), 1, &[]);
            let error = bench.taken_sync(token).error_code;
            assert_eq!(error, Code::FencedInstanceId);
            let token = bench.join_as(9, &old, Some("one"));
            let error = bench.taken_join(token).error_code;
            assert_eq!(error, Code::FencedInstanceId);
            let gone = bench.leave(&[(&old, Some("one"))]);
            assert_eq!(gone, [Code::FencedInstanceId]);
        }
    }
}

#[test]
fn a_static_member_that_starts_twice_at_once_fences_the_first() {
    let mut bench = Bench::new(Config {
        initial_rebalance_delay_ms: 100,
        ..Config::default()
    });
    let first = bench.join_as(9, "", Some("one"));
    let second = bench.join_as(9, "", Some("one"));
    let error = bench.taken_join(first).error_code;
    assert_eq!(error, Code::FencedInstanceId);
    bench.pass(1_000);
    let joined = bench.taken_join(second);
    assert_eq!(joined.error_code, Code::None);
    // While the leader assigns, a restart makes it assign anew.
    let third = bench.join_as(9, "", Some("one"));
    let joined_again = bench.taken_join(third);
    assert_eq!(joined_again.generation_id, 2);
    let token = bench.sync_as(&joined.member_id, Some("one"), 1, &[]);
    let error = bench.taken_sync(token).error_code;
    assert_eq!(error, Code::FencedInstanceId);
}

#[test]
fn a_static_member_that_changes_the_groups_protocol_makes_a_rebalance() {
    let mut bench = Bench::new(config());
    let token = bench.join_as(9, "", Some("one"));
    let old = bench.taken_join(token).member_id.into_owned();
    bench.sync_as(&old, Some("one"), 1, &[(&old, "all")]);
    assert_eq!(bench.state(), "Stable");
    let mut request = join_request("", Some("one"));
    request.protocols.remove(0);
    let token = bench.send(9, Request::JoinGroup(request));
    let joined = bench.taken_join(token);
    assert_eq!(joined.generation_id, 2);
    assert_eq!(joined.protocol_name.as_deref(), Some("sticky"));
    assert!(!joined.skip_assignment);
}

#[test]
fn static_members_may_be_away_while_others_rebalance() {
    let mut bench = Bench::new(Config {
        initial_rebalance_delay_ms: 100,
        ..Config::default()
    });
    let token = bench.join_as(9, "", Some("one"));
    let (other, other_join) = bench.join();
    bench.pass(1_000);
    let one = bench.taken_join(token).member_id.into_owned();
    assert_eq!(bench.taken_join(other_join).generation_id, 1);
    let leader = bench.coordinator.groups["g"].leader.clone().unwrap();
    bench.sync(&leader, 1, &[(&one, "1"), (&other, "2")]);
    // A dynamic member leaves while the static one is silent: its place is kept until its session ends.
    assert_eq!(bench.leave(&[(&other, None)]), [Code::None]);
    assert_eq!(bench.state(), "PreparingRebalance");
    assert_eq!(
        bench.beat_as(&one, Some("one"), 1),
        Code::RebalanceInProgress
    );
    bench.pass(SESSION_MS - 1);
    assert_eq!(bench.describe().members.len(), 1);
    bench.pass(REBALANCE_MS);
    assert_eq!(bench.state(), "Empty");
}

#[test]
fn members_leave_by_ids_of_either_kind_and_many_at_once() {
    let mut bench = Bench::new(config());
    let ids = bench.stable(3);
    let pending = bench.join_as(9, "", None);
    let pending = bench.taken_join(pending).member_id.into_owned();
    let gone = bench.leave(&[
        (&ids[1], None),
        (&pending, None),
        ("unknown", None),
        ("", Some("unknown")),
        (&ids[1], None),
    ]);
    let unknown = Code::UnknownMemberId;
    assert_eq!(gone, [Code::None, Code::None, unknown, unknown, unknown]);
    assert_eq!(bench.state(), "PreparingRebalance");
    // Before version 3 there is one member, and the error is at the top.
    for (id, expected) in [(&*ids[0], Code::None), ("unknown", unknown)] {
        let request = LeaveGroupRequest {
            group_id: "g".into(),
            member_id: id.into(),
            ..LeaveGroupRequest::default()
        };
        let token = bench.send(1, Request::LeaveGroup(request));
        match bench.take(token) {
            Response::LeaveGroup(response) => assert_eq!(response.error_code, expected),
            other => panic!("{other:?}"),
        }
    }
    bench.leave(&[(&ids[2], None)]);
    assert_eq!(bench.state(), "Empty");
}

#[test]
fn a_member_that_leaves_while_it_waits_is_answered() {
    let mut bench = Bench::new(config());
    let ids = bench.stable(2);
    let (third, join) = bench.join();
    assert_eq!(bench.leave(&[(&third, None)]), [Code::None]);
    let error = bench.taken_join(join).error_code;
    assert_eq!(error, Code::UnknownMemberId);
    for id in &ids {
        bench.join_as(9, id, None);
    }
    let follower = bench.sync(&ids[1], 2, &[]);
    assert_eq!(bench.leave(&[(&ids[1], None)]), [Code::None]);
    let error = bench.taken_sync(follower).error_code;
    assert_eq!(error, Code::UnknownMemberId);
}

#[test]
fn a_request_sent_again_replaces_the_first_which_is_answered() {
    let mut bench = Bench::new(config());
    let ids = bench.stable(2);
    let first = bench.join_as(9, &ids[0], None);
    let second = bench.join_as(9, &ids[0], None);
    let error = bench.taken_join(first).error_code;
    assert_eq!(error, Code::RebalanceInProgress);
    assert!(bench.is_open(second));
    bench.join_as(9, &ids[1], None);
    assert_eq!(bench.taken_join(second).generation_id, 2);
    let first = bench.sync(&ids[1], 2, &[]);
    let second = bench.sync(&ids[1], 2, &[]);
    let error = bench.taken_sync(first).error_code;
    assert_eq!(error, Code::RebalanceInProgress);
    bench.sync(&ids[0], 2, &[(&ids[1], "one")]);
    assert_eq!(*bench.taken_sync(second).assignment, *b"one");
    // A lost answer is given again, to the leader with the members.
    bench.join_as(9, &ids[0], None);
    bench.join_as(9, &ids[1], None);
    let token = bench.join_as(9, &ids[0], None);
    let joined = bench.taken_join(token);
    assert_eq!((joined.generation_id, joined.members.len()), (3, 2));
}

#[test]
fn an_assignment_that_does_not_get_into_the_log_does_not_hold() {
    for error in [AppendError::Unavailable, AppendError::TooLarge] {
        let mut bench = Bench::new(config());
        let ids = bench.stable(2);
        bench.by_hand = true;
        for id in &ids {
            bench.join_as(9, id, None);
        }
        let follower = bench.sync(&ids[1], 2, &[]);
        let leader = bench.sync(&ids[0], 2, &[(&ids[1], "one")]);
        bench.finish(0, Err(error));
        bench.settle();
        for token in [follower, leader] {
            assert_eq!(bench.taken_sync(token).error_code, error.code());
        }
        assert_eq!(bench.state(), "PreparingRebalance");
    }
    // One that is longer than the log takes is not even tried.
    let mut bench = Bench::new(Config {
        max_append_bytes: 1_000,
        ..config()
    });
    let (id, _) = bench.join();
    let token = bench.sync(&id, 1, &[(&id, &"x".repeat(1_000))]);
    let error = bench.taken_sync(token).error_code;
    assert_eq!(error, Code::UnknownServerError);
    assert!(bench.log.is_empty());
}

#[test]
fn an_offset_shows_and_is_answered_when_it_is_durable() {
    let mut bench = Bench::new(config());
    bench.by_hand = true;
    let token = bench.commit("", -1, &[("t", 0, 5), ("u", 1, 6)]);
    assert!(bench.is_open(token));
    assert_eq!(bench.fetch("t", 0), -1);
    let later = bench.commit("", -1, &[("t", 0, 7)]);
    // The later one is reported first, and waits for the one before it.
    bench.finish(1, Ok(()));
    bench.settle();
    assert!(bench.is_open(later));
    assert_eq!(bench.fetch("t", 0), -1);
    bench.finish(0, Ok(()));
    bench.settle();
    assert_eq!(bench.committed(token), [Code::None; 2]);
    assert_eq!(bench.committed(later), [Code::None]);
    assert_eq!((bench.fetch("t", 0), bench.fetch("u", 1)), (7, 6));

    let token = bench.commit("", -1, &[("t", 0, 8)]);
    bench.finish(0, Err(AppendError::Unavailable));
    bench.settle();
    let errors = bench.committed(token);
    assert_eq!(errors, [Code::CoordinatorNotAvailable]);
    assert_eq!(bench.fetch("t", 0), 7);
}

#[test]
fn commits_are_taken_from_members_of_this_generation_and_from_nobody_else() {
    let mut bench = Bench::new(config());
    let commit = |bench: &mut Bench, id: &str, generation| {
        let token = bench.commit(id, generation, &[("t", 0, 1)]);
        bench.committed(token)[0]
    };
    assert_eq!(commit(&mut bench, "", 0), Code::IllegalGeneration);
    assert_eq!(bench.coordinator.stats().groups, 0);
    assert_eq!(commit(&mut bench, "", -1), Code::None);
    let ids = bench.stable(1);
    assert_eq!(commit(&mut bench, &ids[0], 1), Code::None);
    assert_eq!(commit(&mut bench, &ids[0], 0), Code::IllegalGeneration);
    assert_eq!(commit(&mut bench, "other", 1), Code::UnknownMemberId);
    assert_eq!(commit(&mut bench, "", -1), Code::UnknownMemberId);
    // Each partition is judged by itself.
    let token = bench.commit_with(&ids[0], 1, &[("t", 0, 1)], &"x".repeat(5_000), -1);
    let errors = bench.committed(token);
    assert_eq!(errors, [Code::OffsetMetadataTooLarge]);
    let token = bench.commit(&ids[0], 1, &[("", 0, 1), ("t", 0, 9)]);
    let errors = bench.committed(token);
    assert_eq!(errors, [Code::InvalidTopicException, Code::None]);
    assert_eq!(bench.fetch("t", 0), 9);
    // A commit keeps the session.
    for _ in 0..5 {
        bench.pass(SESSION_MS - 1);
        assert_eq!(commit(&mut bench, &ids[0], 1), Code::None);
    }
}

#[test]
fn a_long_commit_takes_several_appends_and_one_answer() {
    let mut bench = Bench::new(Config {
        max_append_bytes: 1_000,
        ..config()
    });
    bench.by_hand = true;
    let offsets: Vec<(&str, i32, i64)> = (0..100).map(|n| ("t", n, i64::from(n))).collect();
    let token = bench.commit("", -1, &offsets);
    assert!(bench.appends.len() > 5);
    for append in &bench.appends {
        let bytes: usize = append.records.iter().map(OffsetsRecord::size).sum();
        assert!(bytes <= 1_000);
    }
    while bench.appends.len() > 1 {
        bench.finish(0, Ok(()));
        bench.settle();
        assert!(bench.is_open(token));
    }
    bench.finish_all();
    assert_eq!(bench.committed(token), [Code::None; 100]);
    assert_eq!(bench.fetch("t", 99), 99);
}

#[test]
fn offsets_of_several_groups_and_of_all_topics_are_fetched() {
    let mut bench = Bench::new(config());
    bench.commit("", -1, &[("t", 0, 5), ("u", 1, 6)]);
    let group = |id: &'static str| OffsetFetchGroup {
        group_id: id.into(),
        topics: None,
    };
    let request = OffsetFetchRequest {
        groups: vec![group("g"), group("unknown")],
        ..OffsetFetchRequest::default()
    };
    let token = bench.send(8, Request::OffsetFetch(request));
    let Response::OffsetFetch(response) = bench.take(token) else {
        panic!()
    };
    assert_eq!(response.groups.len(), 2);
    let offsets: Vec<(&str, i64)> = response.groups[0]
        .topics
        .iter()
        .map(|topic| (&*topic.name, topic.partitions[0].committed_offset))
        .collect();
    assert_eq!(offsets, [("t", 5), ("u", 6)]);
    assert!(response.groups[1].topics.is_empty());
    let request = OffsetFetchRequest {
        group_id: "g".into(),
        topics: None,
        ..OffsetFetchRequest::default()
    };
    let token = bench.send(2, Request::OffsetFetch(request));
    let Response::OffsetFetch(response) = bench.take(token) else {
        panic!()
    };
    assert_eq!(response.topics.len(), 2);
}

#[test]
fn offsets_are_deleted_unless_a_member_subscribes_to_the_topic() {
    let mut bench = Bench::new(config());
    let ids = bench.stable(1);
    bench.commit(&ids[0], 1, &[("t", 0, 5), ("u", 0, 6)]);
    let request = |names: &[&'static str]| OffsetDeleteRequest {
        group_id: "g".into(),
        topics: names
            .iter()
            .map(|&name| OffsetDeleteTopic {
                name: name.into(),
                partitions: vec![OffsetDeletePartition { partition_index: 0 }],
            })
            .collect(),
    };
    let token = bench.send(0, Request::OffsetDelete(request(&["t", "u", "v"])));
    let Response::OffsetDelete(response) = bench.take(token) else {
        panic!()
    };
    assert_eq!(
        errors(&response.topics),
        [Code::GroupSubscribedToTopic, Code::None, Code::None]
    );
    assert_eq!((bench.fetch("t", 0), bench.fetch("u", 0)), (5, -1));
    let mut restarted = bench.restarted();
    assert_eq!((restarted.fetch("t", 0), restarted.fetch("u", 0)), (5, -1));
    bench.leave(&[(&ids[0], None)]);
    bench.send(0, Request::OffsetDelete(request(&["t"])));
    assert_eq!(bench.fetch("t", 0), -1);
    bench.coordinator.topic_deleted(bench.now, "t");
    bench.settle();
}

#[test]
fn groups_are_listed_described_and_deleted() {
    let mut bench = Bench::new(config());
    assert_eq!(bench.state(), "Dead");
    let token = bench.delete_group();
    assert_eq!(bench.deleted(token), Code::GroupIdNotFound);
    let ids = bench.stable(2);
    bench.commit(&ids[0], 1, &[("t", 0, 5)]);
    let described = bench.describe();
    assert_eq!(described.group_state, "Stable");
    assert_eq!(described.protocol_type, "consumer");
    assert_eq!(described.protocol_data, "range");
    assert_eq!(described.authorized_operations, i32::MIN);
    for member in &described.members {
        assert_eq!(*member.member_metadata, *SUBSCRIPTION);
        assert_eq!(*member.member_assignment, *member.member_id.as_bytes());
        assert_eq!(member.client_id, "client");
        assert_eq!(member.client_host, "/127.0.0.1");
    }
    for (filter, count) in [(vec![], 1), (vec!["stable"], 1), (vec!["Empty"], 0)] {
        let request = ListGroupsRequest {
            states_filter: filter.into_iter().map(Cow::from).collect(),
        };
        let token = bench.send(4, Request::ListGroups(request));
        let Response::ListGroups(response) = bench.take(token) else {
            panic!()
        };
        assert_eq!(response.groups.len(), count);
    }
    let token = bench.delete_group();
    assert_eq!(bench.deleted(token), Code::NonEmptyGroup);
    bench.leave(&[(&ids[0], None), (&ids[1], None)]);

    bench.by_hand = true;
    let token = bench.delete_group();
    assert!(bench.is_open(token), "not before it is durable");
    bench.finish_all();
    assert_eq!(bench.deleted(token), Code::None);
    assert_eq!(bench.state(), "Dead");
    assert_eq!(
        bench.coordinator.stats(),
        Stats {
            rebalances: 1,
            ..Stats::default()
        }
    );
    assert_eq!(bench.restarted().coordinator.stats().groups, 0);
}

#[test]
fn a_group_that_is_deleted_takes_a_commit_under_way_with_it_but_not_a_later_one() {
    let mut bench = Bench::new(config());
    bench.by_hand = true;
    bench.commit("", -1, &[("t", 0, 5)]);
    let deletion = bench.delete_group();
    bench.commit("", -1, &[("u", 0, 6)]);
    bench.finish_all();
    assert_eq!(bench.deleted(deletion), Code::None);
    let mut restarted = bench.restarted();
    for bench in [&mut bench, &mut restarted] {
        assert_eq!((bench.fetch("t", 0), bench.fetch("u", 0)), (-1, 6));
    }
    // A group that a member joins while it is deleted goes on.
    let (id, join) = bench.join();
    bench.taken_join(join);
    let token = bench.delete_group();
    assert_eq!(bench.deleted(token), Code::NonEmptyGroup);
    assert_eq!(bench.beat(&id, 1), Code::None);
    // If the log does not take the deletion, nothing is deleted.
    bench.leave(&[(&id, None)]);
    bench.finish_all();
    let token = bench.delete_group();
    while !bench.appends.is_empty() {
        bench.finish(0, Err(AppendError::Unavailable));
        bench.settle();
    }
    let error = bench.deleted(token);
    assert_eq!(error, Code::CoordinatorNotAvailable);
    assert_eq!(bench.fetch("u", 0), 6);
}

#[test]
fn offsets_expire_when_nobody_needs_them() {
    const DAY: u64 = 24 * 60 * 60 * 1000;
    // Who only commits: a week after the commit, or as long as the client said.
    let mut bench = Bench::new(config());
    bench.commit("", -1, &[("t", 0, 5)]);
    bench.commit_with("", -1, &[("short", 0, 5)], "", 3_600_000);
    bench.pass(DAY);
    assert_eq!((bench.fetch("t", 0), bench.fetch("short", 0)), (5, -1));
    let mut restarted = bench.restarted();
    for bench in [&mut bench, &mut restarted] {
        bench.pass(5 * DAY);
        assert_eq!(bench.fetch("t", 0), 5);
        bench.pass(2 * DAY);
        assert_eq!(bench.fetch("t", 0), -1);
        assert_eq!(bench.coordinator.stats().groups, 0);
        assert_eq!(bench.restarted().coordinator.stats().groups, 0);
    }
    // A group's offsets: not while it lives, unless it has let the topic go.
    let mut bench = Bench::new(config());
    let ids = bench.stable(1);
    bench.commit(&ids[0], 1, &[("t", 0, 5), ("u", 0, 6)]);
    for _ in 0..8 * DAY / 9_000 {
        bench.pass(9_000);
        assert_eq!(bench.beat(&ids[0], 1), Code::None);
    }
    assert_eq!((bench.fetch("t", 0), bench.fetch("u", 0)), (5, -1));
    // A week after its end.
    bench.leave(&[(&ids[0], None)]);
    let mut restarted = bench.restarted();
    for bench in [&mut bench, &mut restarted] {
        bench.pass(7 * DAY - 1);
        assert_eq!(bench.fetch("t", 0), 5);
        bench.pass(DAY);
        assert_eq!(bench.fetch("t", 0), -1);
        assert_eq!(bench.state(), "Dead");
    }
}

#[test]
fn a_group_has_its_greatest_size() {
    let mut bench = Bench::new(Config {
        max_group_size: 2,
        ..config()
    });
    let ids = bench.stable(2);
    let token = bench.join_as(9, "", None);
    let error = bench.taken_join(token).error_code;
    assert_eq!(error, Code::GroupMaxSizeReached);
    let token = bench.join_as(9, &ids[1], None);
    assert_eq!(bench.taken_join(token).error_code, Code::None);
    // Ids that are given out are counted too.
    let mut bench = Bench::new(Config {
        max_group_size: 2,
        ..config()
    });
    for n in 0..4 {
        let token = bench.join_as(9, "", None);
        let error = bench.taken_join(token).error_code;
        let expected = match n {
            0 | 1 => Code::MemberIdRequired,
            _ => Code::GroupMaxSizeReached,
        };
        assert_eq!(error, expected);
    }
    // A loaded group that is too large gets the chance to commit and is cut down.
    let mut bench = Bench::new(config());
    let ids = bench.stable(3);
    bench.coordinator.io.config.max_group_size = 2;
    let mut bench = bench.restarted();
    assert_eq!(bench.state(), "PreparingRebalance");
    let joins: Vec<Token> = ids.iter().map(|id| bench.join_as(9, id, None)).collect();
    let codes: Vec<Code> = joins
        .iter()
        .map(|&token| bench.taken_join(token).error_code)
        .collect();
    let full = Code::GroupMaxSizeReached;
    assert_eq!(codes, [Code::None, Code::None, full]);
}

#[test]
fn memory_has_its_limits_and_what_is_there_goes_on() {
    let limit = 1 << 20;
    let mut bench = Bench::new(Config {
        max_state_bytes: limit,
        max_in_flight_bytes: limit,
        max_groups: 500,
        ..config()
    });
    let ids = bench.stable(1);
    let token = bench.commit(&ids[0], 1, &[("t", 0, 1)]);
    assert_eq!(bench.committed(token), [Code::None]);
    // Offsets.
    let mut refused = 0;
    for n in 0..200 {
        let offsets: Vec<(&str, i32, i64)> = (0..100).map(|m| ("u", n * 100 + m, 1)).collect();
        let token = bench.commit(&ids[0], 1, &offsets);
        let refusal = bench.committed(token)[0] == Code::CoordinatorNotAvailable;
        refused += u64::from(refusal);
        assert!(bench.coordinator.stats().state_bytes <= limit);
    }
    assert!(refused > 0);
    assert_eq!(bench.coordinator.stats().refused, refused);
    // The last gap is filled one by one.
    for n in 0.. {
        let token = bench.commit(&ids[0], 1, &[("u", 1_000_000 + n, 1)]);
        if bench.committed(token) == [Code::CoordinatorNotAvailable] {
            break;
        }
    }
    // What is there can be committed again, and its members join again.
    let token = bench.commit(&ids[0], 1, &[("t", 0, 2)]);
    assert_eq!(bench.committed(token), [Code::None]);
    let token = bench.join_as(9, &ids[0], None);
    assert_eq!(bench.taken_join(token).generation_id, 2);
    let token = bench.sync(&ids[0], 2, &[]);
    assert_eq!(bench.taken_sync(token).error_code, Code::None);
    // New members are not taken, nor new groups, and none of them stays.
    let token = bench.join_as(9, "", None);
    let error = bench.taken_join(token).error_code;
    assert_eq!(error, Code::CoordinatorNotAvailable);

    // Groups.
    let mut bench = Bench::new(Config {
        max_groups: 100,
        ..config()
    });
    for n in 0..200 {
        let request = JoinGroupRequest {
            group_id: format!("group {n}").into(),
            ..join_request("", None)
        };
        let token = bench.send(9, Request::JoinGroup(request));
        let expected = match n {
            0..100 => Code::MemberIdRequired,
            _ => Code::CoordinatorNotAvailable,
        };
        assert_eq!(bench.taken_join(token).error_code, expected);
    }
    bench.pass(SESSION_MS + 1);
    assert_eq!(bench.coordinator.stats().state_bytes, 0);
    // What is under way.
    let mut bench = Bench::new(Config {
        max_in_flight_bytes: 10_000,
        ..config()
    });
    bench.by_hand = true;
    let tokens: Vec<Token> = (0..100)
        .map(|n| bench.commit("", -1, &[("t", n, 1)]))
        .collect();
    assert!(bench.coordinator.stats().in_flight_bytes <= 10_000);
    bench.finish_all();
    let codes: HashSet<Code> = tokens
        .iter()
        .flat_map(|&token| bench.committed(token))
        .collect();
    let both = [Code::None, Code::CoordinatorNotAvailable];
    assert_eq!(codes, HashSet::from(both));
    assert_eq!(bench.coordinator.stats().in_flight_bytes, 0);
}

#[test]
fn heartbeats_do_not_fill_the_timer_queue() {
    let mut bench = Bench::new(config());
    let ids = bench.stable(1);
    for n in 0..10_000 {
        bench.beat(&ids[0], 1);
        if n % 7 == 0 {
            bench.pass(1);
        }
    }
    assert_eq!(bench.coordinator.io.timers.len(), 2);
}

#[test]
fn nothing_is_served_before_all_is_loaded() {
    let mut bench = Bench::new(config());
    bench.stable(1);
    bench.coordinator = Coordinator::new(config(), [8; 32]);
    let loading = Code::CoordinatorLoadInProgress;
    let token = bench.join_as(9, "", None);
    assert_eq!(bench.taken_join(token).error_code, loading);
    let token = bench.commit("", -1, &[("t", 0, 1)]);
    assert_eq!(bench.committed(token), [loading]);
    assert_eq!(bench.describe().error_code, loading);
    let token = bench.delete_group();
    assert_eq!(bench.deleted(token), loading);
    assert_eq!(bench.beat("any", 1), Code::None, "members go on");
    for version in [1, 2, 8] {
        let partitions = TopicPartitions {
            name: "t".into(),
            partition_indexes: vec![0],
        };
        let request = OffsetFetchRequest {
            group_id: "g".into(),
            topics: Some(vec![partitions]),
            groups: vec![OffsetFetchGroup::default()],
            ..OffsetFetchRequest::default()
        };
        let token = bench.send(version, Request::OffsetFetch(request));
        let Response::OffsetFetch(response) = bench.take(token) else {
            panic!()
        };
        let error = match version {
            1 => response.topics[0].partitions[0].error_code,
            2 => response.error_code,
            _ => response.groups[0].error_code,
        };
        assert_eq!(error, loading);
    }
}

#[test]
fn members_go_on_after_a_restart_or_are_timed_out() {
    let mut bench = Bench::new(config());
    let ids = bench.stable(2);
    bench.commit(&ids[1], 1, &[("t", 0, 42)]);
    bench.pass(SESSION_MS - 1);
    let mut bench = bench.restarted();
    // Sessions begin anew.
    bench.pass(SESSION_MS - 1);
    assert_eq!(bench.beat(&ids[0], 1), Code::None);
    let token = bench.sync(&ids[0], 1, &[]);
    assert_eq!(*bench.taken_sync(token).assignment, *ids[0].as_bytes());
    let token = bench.commit(&ids[0], 1, &[("t", 1, 43)]);
    assert_eq!(bench.committed(token), [Code::None]);
    assert_eq!((bench.fetch("t", 0), bench.fetch("t", 1)), (42, 43));
    bench.pass(2);
    assert_eq!(bench.beat(&ids[0], 1), Code::RebalanceInProgress);
    let token = bench.join_as(9, &ids[0], None);
    bench.finish_rebalance(&ids[..1], &[token], 2);
}

/// What has to be the same after a restart.
type Durable = BTreeMap<String, (Vec<(String, i32, i64)>, Option<String>)>;

fn durable(coordinator: &Coordinator, states: &HashSet<String>) -> Durable {
    coordinator
        .groups
        .values()
        .filter(|group| !group.offsets.is_empty() || states.contains(&*group.id))
        .map(|group| {
            let offsets = group.offsets.iter().flat_map(|(topic, partitions)| {
                partitions
                    .iter()
                    .map(|(&partition, value)| (topic.to_string(), partition, value.offset))
            });
            let members = states.contains(&*group.id).then(|| {
                let members: Vec<String> = group
                    .members
                    .iter()
                    .map(|(id, member)| {
                        let metadata = member.metadata(group.protocol.as_deref().unwrap());
                        let assignment = &member.assignment;
                        let instance = &member.instance_id;
                        format!("{id} {instance:?} {metadata:?} {assignment:?}")
                    })
                    .collect();
                let Group {
                    generation,
                    protocol,
                    protocol_type,
                    leader,
                    ..
                } = group;
                format!("{generation} {protocol:?} {protocol_type:?} {leader:?} {members:?}")
            });
            (group.id.to_string(), (offsets.collect(), members))
        })
        .collect()
}

/// A client of the random test: it knows what it was told last.
#[derive(Debug, Clone, Default)]
struct Client {
    id: String,
    generation: i32,
    instance: Option<&'static str>,
    leads: Vec<String>,
}

#[derive(Debug, Clone)]
enum Step {
    Join {
        client: usize,
        protocols: u8,
        version: i16,
    },
    Sync {
        client: usize,
        size: usize,
    },
    Beat {
        client: usize,
    },
    Leave {
        client: usize,
    },
    Forget {
        client: usize,
    },
    Commit {
        client: usize,
        topic: u8,
        partition: i32,
        simple: bool,
    },
    DeleteOffset {
        client: usize,
        topic: u8,
    },
    DeleteGroup {
        client: usize,
    },
    DeleteTopic {
        topic: u8,
    },
    Finish {
        index: usize,
        result: bool,
    },
    FinishAll,
    Pass {
        ms: u64,
    },
    Restart,
}

fn steps() -> impl Strategy<Value = Step> {
    let client = 0..12usize;
    prop_oneof![
        10 => (client.clone(), 1..4u8, 0..10i16)
            .prop_map(|(client, protocols, version)| Step::Join { client, protocols, version }),
        10 => (client.clone(), 0..50usize).prop_map(|(client, size)| Step::Sync { client, size }),
        3 => client.clone().prop_map(|client| Step::Beat { client }),
        2 => client.clone().prop_map(|client| Step::Leave { client }),
        1 => client.clone().prop_map(|client| Step::Forget { client }),
        5 => (client.clone(), 0..3u8, 0..3i32, any::<bool>()).prop_map(
            |(client, topic, partition, simple)| Step::Commit { client, topic, partition, simple }),
        1 => (client.clone(), 0..3u8)
            .prop_map(|(client, topic)| Step::DeleteOffset { client, topic }),
        1 => client.prop_map(|client| Step::DeleteGroup { client }),
        1 => (0..3u8).prop_map(|topic| Step::DeleteTopic { topic }),
        4 => (0..5usize, prop::bool::weighted(0.8))
            .prop_map(|(index, result)| Step::Finish { index, result }),
        4 => Just(Step::FinishAll),
        6 => (0..20_000u64).prop_map(|ms| Step::Pass { ms }),
        1 => Just(Step::Restart),
    ]
}

const TOPICS: [&str; 3] = ["t", "u", "v"];

/// Runs the steps of twelve clients in three groups; checks every invariant after every step.
fn run(steps: Vec<Step>) {
    let mut bench = Bench::new(Config {
        initial_rebalance_delay_ms: 1_000,
        max_group_size: 4,
        max_append_bytes: 600,
        max_state_bytes: 40_000,
        max_in_flight_bytes: 20_000,
        retention_check_interval_ms: 50_000,
        offsets_retention_ms: 200_000,
        ..Config::default()
    });
    bench.by_hand = true;
    let mut clients = vec![Client::default(); 12];
    for (n, client) in clients.iter_mut().enumerate() {
        client.instance = [None, None, Some("one"), Some("two")][n % 4];
    }
    let group = |client: usize| ["g", "h", "i"][client % 3];
    let mut open: HashMap<Token, usize> = HashMap::new();
    for step in steps {
        match step {
            Step::Join {
                client,
                protocols,
                version,
            } => {
                let mut request = join_request(&clients[client].id, clients[client].instance);
                request.group_id = group(client).into();
                if protocols & 1 == 0 {
                    request.protocols.remove(0);
                } else if protocols & 2 == 0 {
                    request.protocols.remove(1);
                }
                let request = Request::JoinGroup(request.clone());
                open.insert(bench.send(version, request), client);
            }
            Step::Sync { client, size } => {
                let own = &clients[client];
                let assignments = own
                    .leads
                    .iter()
                    .map(|id| SyncGroupAssignment {
                        member_id: id.clone().into(),
                        assignment: vec![1; size].into(),
                    })
                    .collect();
                let request = SyncGroupRequest {
                    group_id: group(client).into(),
                    generation_id: own.generation,
                    member_id: own.id.clone().into(),
                    group_instance_id: own.instance.map(Into::into),
                    assignments,
                    ..SyncGroupRequest::default()
                };
                open.insert(bench.send(5, Request::SyncGroup(request)), client);
            }
            Step::Beat { client } => {
                let own = &clients[client];
                let request = HeartbeatRequest {
                    group_id: group(client).into(),
                    generation_id: own.generation,
                    member_id: own.id.clone().into(),
                    group_instance_id: own.instance.map(Into::into),
                };
                open.insert(bench.send(4, Request::Heartbeat(request)), client);
            }
            Step::Leave { client } => {
                let own = &clients[client];
                let request = LeaveGroupRequest {
                    group_id: group(client).into(),
                    members: vec![LeaveGroupMember {
                        member_id: own.id.clone().into(),
                        group_instance_id: own.instance.map(Into::into),
                        reason: None,
                    }],
                    ..LeaveGroupRequest::default()
                };
                open.insert(bench.send(5, Request::LeaveGroup(request)), client);
            }
            Step::Forget { client } => clients[client].id.clear(),
            Step::Commit {
                client,
                topic,
                partition,
                simple,
            } => {
                let own = &clients[client];
                let request = OffsetCommitRequest {
                    group_id: group(client).into(),
                    generation_id_or_member_epoch: if simple { -1 } else { own.generation },
                    member_id: if simple {
                        "".into()
                    } else {
                        own.id.clone().into()
                    },
                    topics: vec![OffsetCommitTopic {
                        name: TOPICS[usize::from(topic)].into(),
                        partitions: (0..=partition)
                            .map(|partition_index| OffsetCommitPartition {
                                partition_index,
                                committed_offset: bench.token as i64,
                                ..OffsetCommitPartition::default()
                            })
                            .collect(),
                    }],
                    ..OffsetCommitRequest::default()
                };
                open.insert(bench.send(8, Request::OffsetCommit(request)), client);
            }
            Step::DeleteOffset { client, topic } => {
                let request = OffsetDeleteRequest {
                    group_id: group(client).into(),
                    topics: vec![OffsetDeleteTopic {
                        name: TOPICS[usize::from(topic)].into(),
                        partitions: vec![OffsetDeletePartition { partition_index: 0 }],
                    }],
                };
                open.insert(bench.send(0, Request::OffsetDelete(request)), client);
            }
            Step::DeleteGroup { client } => {
                let request = DeleteGroupsRequest {
                    groups_names: vec![group(client).into(), "unknown".into()],
                };
                open.insert(bench.send(2, Request::DeleteGroups(request)), client);
            }
            Step::DeleteTopic { topic } => {
                bench
                    .coordinator
                    .topic_deleted(bench.now, TOPICS[usize::from(topic)]);
                bench.settle();
            }
            Step::Finish { index, result } => {
                if index < bench.appends.len() {
                    // A partition's log takes appends in order, though reports may overtake.
                    if result && index > 0 {
                        let first = &bench.appends[0].group;
                        let same = bench.appends.range(..index);
                        let group = &bench.appends[index].group;
                        if same.clone().any(|append| append.group == *group) || first == group {
                            continue;
                        }
                    }
                    let result = if result {
                        Ok(())
                    } else {
                        Err(AppendError::Unavailable)
                    };
                    bench.finish(index, result);
                    bench.settle();
                }
            }
            Step::FinishAll => bench.finish_all(),
            Step::Pass { ms } => bench.pass(ms),
            Step::Restart => {
                // What was answered is in the log; what was not is lost with its connections.
                let answers = std::mem::take(&mut bench.answers);
                let token = bench.token;
                bench = bench.restarted();
                bench.by_hand = true;
                bench.token = token;
                bench.answers = answers;
                open.retain(|token, _| bench.answers.contains_key(token));
            }
        }
        for (token, response) in std::mem::take(&mut bench.answers) {
            let client = open.remove(&token).expect("no answer without its request");
            if let Response::JoinGroup(joined) = response {
                let own = &mut clients[client];
                own.leads.clear();
                if joined.error_code == Code::None {
                    own.generation = joined.generation_id;
                    own.leads = joined
                        .members
                        .iter()
                        .map(|member| member.member_id.to_string())
                        .collect();
                }
                own.id = joined.member_id.into_owned();
            }
        }
        let stats = bench.coordinator.stats();
        assert!(stats.in_flight_bytes <= 40_000, "{stats:?}");
        assert!(stats.state_bytes <= 60_000, "{stats:?}");
    }
    // Everything under way ends: each request has its answer, and a restart finds what was.
    bench.by_hand = false;
    bench.finish_all();
    let stable: HashSet<String> = bench
        .coordinator
        .groups
        .values()
        .filter(|group| group.state == State::Stable)
        .map(|group| group.id.to_string())
        .collect();
    let restarted = bench.restarted();
    let no_members = HashSet::new();
    for states in [&stable, &no_members] {
        let find = |coordinator: &Coordinator| {
            let mut found = durable(coordinator, states);
            if !states.is_empty() {
                found.retain(|id, _| states.contains(id));
            }
            found
        };
        assert_eq!(find(&bench.coordinator), find(&restarted.coordinator));
    }
    bench.pass(10_000_000);
    for token in open.keys() {
        assert!(
            bench.answers.contains_key(token),
            "request {token} has no answer"
        );
    }
    // In the end nobody beats and nothing is left.
    assert_eq!(bench.coordinator.stats().groups, 0);
    assert_eq!(bench.coordinator.stats().state_bytes, 0);
    assert!(bench.coordinator.io.jobs.is_empty() && bench.coordinator.io.owners.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_order_of_operations_keeps_the_invariants(
        steps in prop::collection::vec(steps(), 1..150),
    ) {
        run(steps);
    }

    #[test]
    fn records_of_any_bytes_are_taken_or_refused(
        key in prop::collection::vec(any::<u8>(), 0..40),
        version in 0..4u8,
        value in prop::option::of(prop::collection::vec(any::<u8>(), 0..80)),
    ) {
        let mut coordinator = Coordinator::new(config(), [0; 32]);
        let _ = coordinator.replay(&key, value.as_deref());
        let typed = [&[0, version][..], &key].concat();
        let _ = coordinator.replay(&typed, value.as_deref());
        coordinator.loaded(start());
        coordinator.check();
    }
}
