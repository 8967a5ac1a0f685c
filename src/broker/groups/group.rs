//! A group: its members, what they wait for, its committed offsets, and the account of all of it.
//!
//! Invariants: votes, the number of members that wait in a rebalance, static ids and the bytes charged
//! follow from members and offsets, and change only in the functions of this file. A member's parked
//! requests are answered before it goes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use super::records::{self, GroupValue, MemberValue, OffsetsRecord};
use super::timers::Timer;
use super::{AppendError, CommittedOffset, Io, Response, Token};
use crate::wire::kafka::Code;
use crate::wire::kafka::groups::{JoinGroupProtocol, JoinGroupResponse, SyncGroupResponse};

/// The type of protocol whose metadata the coordinator can read: that of consumers.
pub(super) const CONSUMER: &str = "consumer";

/// Memory that is charged for each group, member, protocol and offset beside their bytes: structures,
/// nodes of maps, entries of the timer queue.
pub(super) const GROUP_COST: usize = 1024;
const MEMBER_COST: usize = 768;
const PROTOCOL_COST: usize = 192;
const TOPIC_COST: usize = 256;
const OFFSET_COST: usize = 128;

/// Where a group is in its life, by Kafka's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Without members.
    Empty,
    /// Waiting for members to join.
    PreparingRebalance,
    /// All have joined; waiting for the leader's assignment.
    CompletingRebalance,
    /// Every member has, or can fetch, its assignment.
    Stable,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::Empty => "Empty",
            State::PreparingRebalance => "PreparingRebalance",
            State::CompletingRebalance => "CompletingRebalance",
            State::Stable => "Stable",
        }
    }
}

/// A JoinGroup that is answered when the rebalance is through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parked {
    pub token: Token,
    pub version: i16,
}

/// One protocol of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Protocol {
    pub name: String,
    pub metadata: Vec<u8>,
}

#[derive(Debug, Default)]
pub(super) struct Member {
    pub instance_id: Option<Box<str>>,
    pub client_id: String,
    pub client_host: String,
    pub rebalance_timeout_ms: u32,
    pub session_timeout_ms: u32,
    /// What it supports, best first.
    pub protocols: Vec<Protocol>,
    pub assignment: Vec<u8>,
    pub join: Option<Parked>,
    pub sync: Option<Token>,
    /// It has not been through a rebalance yet.
    pub is_new: bool,
    /// When its session ends, unless it waits for an answer.
    pub deadline: u64,
    /// Where its entry stands in the timer queue: never behind the deadline while there is one.
    pub timer: Option<u64>,
}

impl Member {
    pub fn cost(&self, id: &str) -> usize {
        let protocols: usize = self
            .protocols
            .iter()
            .map(|protocol| PROTOCOL_COST + 2 * protocol.name.len() + protocol.metadata.len())
            .sum();
        MEMBER_COST
            + id.len()
            + 2 * self.instance_id.as_ref().map_or(0, |id| id.len())
            + self.client_id.len()
            + self.client_host.len()
            + protocols
            + self.assignment.len()
    }

    /// Its metadata for a protocol.
    pub fn metadata(&self, protocol: &str) -> Option<&[u8]> {
        self.protocols
            .iter()
            .find(|own| own.name == protocol)
            .map(|own| &own.metadata[..])
    }

    /// Whether it supports just these, in this order.
    pub fn matches(&self, protocols: &[JoinGroupProtocol<'_>]) -> bool {
        self.protocols.len() == protocols.len()
            && self
                .protocols
                .iter()
                .zip(protocols)
                .all(|(own, other)| own.name == other.name && own.metadata == *other.metadata)
    }

    /// Whether it may stay though it sends no heartbeats: it waits for an answer.
    pub fn waits(&self) -> bool {
        !self.is_new && (self.join.is_some() || self.sync.is_some())
    }
}

/// What an append's end means.
#[derive(Debug)]
pub(super) enum Effect {
    /// Offsets were committed or (`None`) deleted.
    Offsets(Vec<(Arc<str>, i32, Option<CommittedOffset>)>),
    /// The leader's assignment.
    Assignment {
        generation: i32,
        assignments: Vec<(Arc<str>, Vec<u8>)>,
    },
    /// A static member came back under a new id.
    StaticJoin {
        member: Arc<str>,
        generation: i32,
        leader_before: Option<Arc<str>>,
    },
    /// The group has lost its last member.
    Emptied,
    /// The group was deleted.
    Deleted,
}

impl Effect {
    /// Its own memory, and that of the records that belong to it, beside their bytes.
    fn cost(&self) -> usize {
        const RECORD: usize = 2 * size_of::<OffsetsRecord>();
        match self {
            Effect::Offsets(changes) => changes
                .iter()
                .map(|(_, _, value)| {
                    let metadata = value.as_ref().map_or(0, |value| value.metadata.len());
                    RECORD + OFFSET_COST + metadata
                })
                .sum(),
            Effect::Assignment { assignments, .. } => assignments
                .iter()
                .map(|(_, assignment)| RECORD + assignment.len())
                .sum(),
            _ => RECORD,
        }
    }
}

/// An append that is not yet known to be durable.
#[derive(Debug)]
pub(super) struct InFlight {
    pub id: u64,
    pub effect: Effect,
    pub job: Option<u64>,
    pub bytes: usize,
    pub done: Option<Result<(), AppendError>>,
}

/// What happens when a group's time to join is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JoinTimer {
    /// The first rebalance waits on as long as members come, while `left_ms` lasts.
    Initial { delay_ms: u64, left_ms: u64 },
    /// Who has not joined is out.
    Complete,
}

#[derive(Debug)]
pub(super) struct Group {
    pub id: Arc<str>,
    pub state: State,
    /// The rebalance under way began with no members: it ends by its timer alone.
    pub initial: bool,
    pub new_member_added: bool,
    pub generation: i32,
    pub protocol_type: Option<String>,
    pub protocol: Option<String>,
    pub leader: Option<Arc<str>>,
    pub members: BTreeMap<Arc<str>, Member>,
    static_members: HashMap<Box<str>, Arc<str>>,
    /// Ids that were given out and not used yet; each with its place in the timer queue.
    pub pending: HashMap<Arc<str>, u64>,
    votes: HashMap<String, usize>,
    joining: usize,
    /// Members that have not asked for the assignment of this generation.
    pub owe_sync: BTreeSet<Arc<str>>,
    pub join_timer: Option<(u64, JoinTimer)>,
    pub sync_timer: Option<u64>,
    /// Unix milliseconds.
    pub state_since: Option<i64>,
    pub offsets: BTreeMap<Arc<str>, BTreeMap<i32, CommittedOffset>>,
    pub in_flight: VecDeque<InFlight>,
    /// The log has (or will have) a record of the group itself.
    pub persisted: bool,
    /// What the account holds for it.
    charged: usize,
}

impl Group {
    pub fn new(id: Arc<str>, io: &mut Io) -> Self {
        let charged = GROUP_COST + id.len();
        io.state_bytes += charged;
        Self {
            id,
            state: State::Empty,
            initial: false,
            new_member_added: false,
            generation: 0,
            protocol_type: None,
            protocol: None,
            leader: None,
            members: BTreeMap::new(),
            static_members: HashMap::new(),
            pending: HashMap::new(),
            votes: HashMap::new(),
            joining: 0,
            owe_sync: BTreeSet::new(),
            join_timer: None,
            sync_timer: None,
            state_since: None,
            offsets: BTreeMap::new(),
            in_flight: VecDeque::new(),
            persisted: false,
            charged,
        }
    }

    /// Whether nothing would be lost with it.
    pub fn is_disposable(&self) -> bool {
        self.state == State::Empty
            && self.pending.is_empty()
            && self.offsets.is_empty()
            && self.in_flight.is_empty()
            && !self.persisted
    }

    /// Gives its memory back; the group must be disposable.
    pub fn dispose(self, io: &mut Io) {
        io.state_bytes -= self.charged;
    }

    fn charge(&mut self, io: &mut Io, before: usize, after: usize) {
        self.charged = self.charged + after - before;
        io.state_bytes = io.state_bytes + after - before;
    }

    pub fn set_state(&mut self, io: &Io, state: State) {
        self.state = state;
        self.state_since = Some(io.now.unix_ms);
    }

    // Members.

    pub fn add_member(&mut self, io: &mut Io, id: Arc<str>, protocol_type: &str, member: Member) {
        if self.members.is_empty() {
            self.protocol_type = Some(protocol_type.to_owned());
        }
        self.drop_pending(io, &id);
        if let Some(instance) = &member.instance_id {
            self.static_members.insert(instance.clone(), id.clone());
        }
        self.vote(&member.protocols, true);
        self.joining += usize::from(member.join.is_some());
        self.leader.get_or_insert_with(|| id.clone());
        self.charge(io, 0, member.cost(&id));
        let previous = self.members.insert(id, member);
        debug_assert!(previous.is_none());
    }

    /// Removes a member; what it waits for is answered with "unknown member".
    pub fn remove_member(&mut self, io: &mut Io, id: &str) {
        self.finish_join(io, id, Code::UnknownMemberId);
        self.finish_sync(io, id, Code::UnknownMemberId);
        let Some((id, member)) = self.members.remove_entry(id) else {
            return;
        };
        self.charge(io, member.cost(&id), 0);
        self.vote(&member.protocols, false);
        if let Some(instance) = &member.instance_id {
            self.static_members.remove(instance);
        }
        if let Some(at) = member.timer {
            io.timers
                .remove(at, Timer::Session(self.id.clone(), id.clone()));
        }
        self.owe_sync.remove(&id);
        if self.leader.as_ref() == Some(&id) {
            self.leader = self.members.keys().next().cloned();
        }
    }

    /// Gives a static member's place to its next life; the old one's requests are fenced off.
    pub fn replace_member(&mut self, io: &mut Io, old: &str, new: Arc<str>) {
        self.finish_join(io, old, Code::FencedInstanceId);
        self.finish_sync(io, old, Code::FencedInstanceId);
        let Some((old, mut member)) = self.members.remove_entry(old) else {
            return;
        };
        if let Some(at) = member.timer.take() {
            io.timers
                .remove(at, Timer::Session(self.id.clone(), old.clone()));
        }
        self.charge(io, old.len(), new.len());
        if let Some(instance) = &member.instance_id {
            self.static_members.insert(instance.clone(), new.clone());
        }
        if self.leader.as_ref() == Some(&old) {
            self.leader = Some(new.clone());
        }
        if self.owe_sync.remove(&old) {
            self.owe_sync.insert(new.clone());
        }
        self.members.insert(new, member);
    }

    /// Takes over what a member says of itself when it joins again.
    pub fn update_member(
        &mut self,
        io: &mut Io,
        id: &str,
        protocols: Vec<Protocol>,
        rebalance_timeout_ms: u32,
        session_timeout_ms: u32,
    ) {
        let Some(member) = self.members.get_mut(id) else {
            return;
        };
        let before = member.cost(id);
        member.rebalance_timeout_ms = rebalance_timeout_ms;
        member.session_timeout_ms = session_timeout_ms;
        let old = std::mem::replace(&mut member.protocols, protocols);
        let after = member.cost(id);
        let new = std::mem::take(&mut member.protocols);
        self.vote(&old, false);
        self.vote(&new, true);
        if let Some(member) = self.members.get_mut(id) {
            member.protocols = new;
        }
        self.charge(io, before, after);
    }

    pub fn set_assignment(&mut self, io: &mut Io, id: &str, assignment: Vec<u8>) {
        if let Some(member) = self.members.get_mut(id) {
            let (before, after) = (member.assignment.len(), assignment.len());
            member.assignment = assignment;
            self.charge(io, before, after);
        }
    }

    pub fn static_member(&self, instance: &str) -> Option<&Arc<str>> {
        self.static_members.get(instance)
    }

    /// Whether a request's sender is a member, and the one that it says it is.
    pub fn validate_member(&self, id: &str, instance: Option<&str>) -> Result<(), Code> {
        if let Some(instance) = instance {
            match self.static_members.get(instance) {
                None => return Err(Code::UnknownMemberId),
                Some(owner) if **owner != *id => return Err(Code::FencedInstanceId),
                Some(_) => {}
            }
        }
        if self.members.contains_key(id) {
            Ok(())
        } else {
            Err(Code::UnknownMemberId)
        }
    }

    pub fn add_pending(&mut self, io: &mut Io, id: Arc<str>, timeout_ms: u32) {
        let at = io.now.mono_ms + u64::from(timeout_ms);
        io.timers
            .insert(at, Timer::Session(self.id.clone(), id.clone()));
        self.charge(io, 0, MEMBER_COST + id.len());
        self.pending.insert(id, at);
    }

    /// Forgets an id that was given out; whether there was one.
    pub fn drop_pending(&mut self, io: &mut Io, id: &str) -> bool {
        let Some((id, at)) = self.pending.remove_entry(id) else {
            return false;
        };
        self.charge(io, MEMBER_COST + id.len(), 0);
        io.timers.remove(at, Timer::Session(self.id.clone(), id));
        true
    }

    /// The session goes on for the member's own time, or for `timeout_ms`.
    pub fn renew_session(&mut self, io: &mut Io, id: &str, timeout_ms: Option<u32>) {
        let Some((key, member)) = self.members.get_key_value(id) else {
            return;
        };
        let key = key.clone();
        let timeout_ms = timeout_ms.unwrap_or(member.session_timeout_ms);
        let deadline = io.now.mono_ms + u64::from(timeout_ms);
        let old = member.timer;
        let member = self.members.get_mut(id).expect("just found");
        member.deadline = deadline;
        // An earlier entry finds the new deadline when it is due, so that heartbeats need not move it.
        if old.is_none_or(|at| at > deadline) {
            member.timer = Some(deadline);
            if let Some(at) = old {
                io.timers
                    .remove(at, Timer::Session(self.id.clone(), key.clone()));
            }
            io.timers
                .insert(deadline, Timer::Session(self.id.clone(), key));
        }
    }

    // Parked requests.

    /// Parks a JoinGroup; one that the member sent before is told to come again.
    pub fn park_join(&mut self, io: &mut Io, id: &str, parked: Parked) {
        let Some(member) = self.members.get_mut(id) else {
            return;
        };
        if let Some(older) = member.join.replace(parked) {
            let response = refused_join(older.version, id, Code::RebalanceInProgress);
            io.answer(older.token, Response::JoinGroup(response));
        } else {
            self.joining += 1;
        }
    }

    /// Answers a member's parked JoinGroup, if there is one, with an error.
    pub fn finish_join(&mut self, io: &mut Io, id: &str, error: Code) {
        self.finish_join_with(io, id, |version| {
            // Who is unknown has to ask for a new id.
            let id = match error {
                Code::UnknownMemberId => "",
                _ => id,
            };
            refused_join(version, id, error)
        });
    }

    /// Answers a member's parked JoinGroup, if there is one; its session goes on from now.
    pub fn finish_join_with(
        &mut self,
        io: &mut Io,
        id: &str,
        response: impl FnOnce(i16) -> JoinGroupResponse<'static>,
    ) {
        let parked = self
            .members
            .get_mut(id)
            .and_then(|member| member.join.take());
        if let Some(parked) = parked {
            self.joining -= 1;
            let response = response(parked.version);
            io.answer(parked.token, Response::JoinGroup(response));
            self.renew_session(io, id, None);
        }
    }

    /// Parks a SyncGroup; one that the member sent before is told to come again.
    pub fn park_sync(&mut self, io: &mut Io, id: &str, token: Token) {
        if let Some(member) = self.members.get_mut(id)
            && let Some(older) = member.sync.replace(token)
        {
            io.answer(older, refused_sync(Code::RebalanceInProgress));
        }
    }

    /// Answers a member's parked SyncGroup, if there is one; its session goes on from now.
    pub fn finish_sync(&mut self, io: &mut Io, id: &str, error: Code) {
        let Some(member) = self.members.get_mut(id) else {
            return;
        };
        let Some(token) = member.sync.take() else {
            return;
        };
        let response = match error {
            Code::None => self.assignment_of(id),
            error => refused_sync(error),
        };
        io.answer(token, response);
        self.renew_session(io, id, None);
    }

    /// The answer to SyncGroup of a member that has its assignment.
    pub fn assignment_of(&self, id: &str) -> Response {
        Response::SyncGroup(SyncGroupResponse {
            protocol_type: self.protocol_type.clone().map(Into::into),
            protocol_name: self.protocol.clone().map(Into::into),
            assignment: self
                .members
                .get(id)
                .map_or_else(Vec::new, |member| member.assignment.clone())
                .into(),
            ..SyncGroupResponse::default()
        })
    }

    pub fn has_all_joined(&self) -> bool {
        self.joining == self.members.len() && self.pending.is_empty()
    }

    pub fn joining(&self) -> usize {
        self.joining
    }

    /// The longest time that one of the members asks for, in milliseconds; at least 1.
    pub fn rebalance_timeout_ms(&self) -> u64 {
        self.members
            .values()
            .map(|member| u64::from(member.rebalance_timeout_ms))
            .max()
            .unwrap_or(0)
            .max(1)
    }

    // Protocols.

    fn vote(&mut self, protocols: &[Protocol], add: bool) {
        for protocol in protocols {
            if add {
                *self.votes.entry(protocol.name.clone()).or_default() += 1;
            } else if let Some(count) = self.votes.get_mut(&protocol.name) {
                *count -= 1;
                if *count == 0 {
                    self.votes.remove(&protocol.name);
                }
            }
        }
    }

    fn is_supported_by_all(&self, protocol: &str) -> bool {
        self.votes.get(protocol).copied().unwrap_or(0) == self.members.len()
    }

    /// Whether a member with these protocols fits in.
    pub fn supports(&self, protocol_type: &str, protocols: &[JoinGroupProtocol<'_>]) -> bool {
        if self.state == State::Empty {
            !protocol_type.is_empty() && !protocols.is_empty()
        } else {
            self.protocol_type.as_deref() == Some(protocol_type)
                && protocols
                    .iter()
                    .any(|protocol| self.is_supported_by_all(&protocol.name))
        }
    }

    /// The protocol that most members like best among those that all support; the leader's order
    /// decides between equals.
    pub fn select_protocol(&self) -> Option<String> {
        let mut likes: HashMap<&str, usize> = HashMap::new();
        for member in self.members.values() {
            let liked = member
                .protocols
                .iter()
                .find(|protocol| self.is_supported_by_all(&protocol.name))?;
            *likes.entry(&liked.name).or_default() += 1;
        }
        let leader = self.members.get(self.leader.as_ref()?)?;
        let mut best = None;
        for protocol in &leader.protocols {
            if let Some(&count) = likes.get(&protocol.name[..])
                && best.is_none_or(|(most, _)| count > most)
            {
                best = Some((count, &protocol.name));
            }
        }
        // What others like best is supported by the leader too, so there is one.
        best.map(|(_, name)| name.clone())
    }

    /// The topics that members subscribe to; `None` where that cannot be known.
    pub fn subscribed_topics(&self) -> Option<HashSet<&str>> {
        if self.protocol_type.as_deref() != Some(CONSUMER) {
            return None;
        }
        let mut topics = HashSet::new();
        for member in self.members.values() {
            let metadata = member.metadata(self.protocol.as_ref()?)?;
            topics.extend(records::subscribed_topics(metadata).ok()?);
        }
        Some(topics)
    }

    /// Whether the topic is in a set of [`Group::subscribed_topics`]. Consumers whose topics are not
    /// known may subscribe to any.
    pub fn is_subscribed(&self, topics: Option<&HashSet<&str>>, topic: &str) -> bool {
        match topics {
            Some(topics) => topics.contains(topic),
            None => self.protocol_type.as_deref() == Some(CONSUMER),
        }
    }

    // Offsets.

    pub fn put_offset(
        &mut self,
        io: &mut Io,
        topic: &Arc<str>,
        partition: i32,
        value: CommittedOffset,
    ) {
        let mut after = OFFSET_COST + value.metadata.len();
        let partitions = match self.offsets.get_mut(topic) {
            Some(partitions) => partitions,
            None => {
                after += TOPIC_COST + topic.len();
                self.offsets.entry(topic.clone()).or_default()
            }
        };
        match partitions.insert(partition, value) {
            Some(old) => {
                let before = OFFSET_COST + old.metadata.len();
                self.charge(io, before, after);
            }
            None => {
                io.offsets += 1;
                self.charge(io, 0, after);
            }
        }
    }

    pub fn remove_offset(&mut self, io: &mut Io, topic: &str, partition: i32) {
        let Some(partitions) = self.offsets.get_mut(topic) else {
            return;
        };
        let Some(old) = partitions.remove(&partition) else {
            return;
        };
        let mut before = OFFSET_COST + old.metadata.len();
        if partitions.is_empty() {
            self.offsets.remove(topic);
            before += TOPIC_COST + topic.len();
        }
        io.offsets -= 1;
        self.charge(io, before, 0);
    }

    /// Memory that a commit would take beyond what there is.
    pub fn growth(&self, topic: &str, partition: i32, metadata_len: usize) -> usize {
        match self.offsets.get(topic) {
            None => TOPIC_COST + topic.len() + OFFSET_COST + metadata_len,
            Some(partitions) => match partitions.get(&partition) {
                None => OFFSET_COST + metadata_len,
                Some(old) => metadata_len.saturating_sub(old.metadata.len()),
            },
        }
    }

    /// Every offset that is committed or about to be.
    pub fn known_offsets(&self) -> BTreeSet<(Arc<str>, i32)> {
        let committed = self.offsets.iter().flat_map(|(topic, partitions)| {
            partitions
                .keys()
                .map(|&partition| (topic.clone(), partition))
        });
        let under_way = self.in_flight.iter().filter_map(|append| {
            let Effect::Offsets(changes) = &append.effect else {
                return None;
            };
            Some(
                changes
                    .iter()
                    .filter(|(_, _, value)| value.is_some())
                    .map(|(topic, partition, _)| (topic.clone(), *partition)),
            )
        });
        committed.chain(under_way.flatten()).collect()
    }

    // Records.

    /// Has records appended; `effect` comes when they are durable.
    pub fn append(
        &mut self,
        io: &mut Io,
        records: Vec<OffsetsRecord>,
        effect: Effect,
        job: Option<u64>,
    ) {
        let bytes = records.iter().map(OffsetsRecord::size).sum::<usize>() + effect.cost();
        match effect {
            Effect::Offsets(_) => {}
            Effect::Deleted => self.persisted = false,
            _ => self.persisted = true,
        }
        let id = io.append(&self.id, records, bytes, job);
        self.in_flight.push_back(InFlight {
            id,
            effect,
            job,
            bytes,
            done: None,
        });
    }

    /// The group's record with these assignments; others' are empty.
    pub fn record(&self, mut assignment: impl FnMut(&str, &Member) -> Vec<u8>) -> OffsetsRecord {
        let assignments: Vec<Vec<u8>> = self
            .members
            .iter()
            .map(|(id, member)| assignment(id, member))
            .collect();
        let protocol = self.protocol.as_deref();
        let members = self
            .members
            .iter()
            .zip(&assignments)
            .map(|((id, member), assignment)| MemberValue {
                member_id: id,
                group_instance_id: member.instance_id.as_deref(),
                client_id: &member.client_id,
                client_host: &member.client_host,
                rebalance_timeout_ms: i32::try_from(member.rebalance_timeout_ms)
                    .unwrap_or(i32::MAX),
                session_timeout_ms: i32::try_from(member.session_timeout_ms).unwrap_or(i32::MAX),
                subscription: protocol
                    .and_then(|protocol| member.metadata(protocol))
                    .unwrap_or_default(),
                assignment,
            })
            .collect();
        let value = GroupValue {
            protocol_type: self.protocol_type.as_deref().unwrap_or_default(),
            generation: self.generation,
            protocol,
            leader: self.leader.as_deref(),
            state_timestamp: self.state_since.unwrap_or(-1),
            members,
        };
        records::group_record(&self.id, Some(&value))
    }

    #[cfg(test)]
    pub fn check(&self) -> usize {
        let mut votes: HashMap<String, usize> = HashMap::new();
        let mut charged = GROUP_COST + self.id.len();
        for (id, member) in &self.members {
            charged += member.cost(id);
            for protocol in &member.protocols {
                *votes.entry(protocol.name.clone()).or_default() += 1;
            }
            if let Some(instance) = &member.instance_id {
                assert_eq!(self.static_members.get(instance), Some(id));
            }
            assert!(member.timer.is_some() || member.waits(), "{member:?}");
            assert!(member.timer.is_none_or(|at| at <= member.deadline));
        }
        for id in self.pending.keys() {
            charged += MEMBER_COST + id.len();
            assert!(!self.members.contains_key(id));
        }
        for (topic, partitions) in &self.offsets {
            charged += TOPIC_COST + topic.len();
            assert!(!partitions.is_empty());
            for value in partitions.values() {
                charged += OFFSET_COST + value.metadata.len();
            }
        }
        let joining = self
            .members
            .values()
            .filter(|member| member.join.is_some())
            .count();
        assert_eq!(votes, self.votes);
        assert_eq!(joining, self.joining);
        assert_eq!(charged, self.charged);
        assert_eq!(
            self.static_members.len(),
            self.members
                .values()
                .filter(|member| member.instance_id.is_some())
                .count()
        );
        match &self.leader {
            Some(leader) => assert!(self.members.contains_key(leader)),
            None => assert!(self.members.is_empty()),
        }
        assert!(self.owe_sync.iter().all(|id| self.members.contains_key(id)));
        match self.state {
            State::Empty => assert!(self.members.is_empty()),
            State::PreparingRebalance => {
                assert!(self.join_timer.is_some());
                assert!(self.members.values().all(|member| member.sync.is_none()));
            }
            State::CompletingRebalance | State::Stable => {
                assert!(!self.members.is_empty());
                let protocol = self.protocol.as_deref().expect("a protocol was chosen");
                for member in self.members.values() {
                    assert!(member.metadata(protocol).is_some());
                    assert!(self.state != State::Stable || member.sync.is_none());
                }
                assert_eq!(self.sync_timer.is_some(), !self.owe_sync.is_empty());
            }
        }
        self.charged
    }
}

/// The refusal of a JoinGroup.
pub(super) fn refused_join(version: i16, id: &str, error: Code) -> JoinGroupResponse<'static> {
    JoinGroupResponse {
        error_code: error,
        generation_id: -1,
        protocol_name: protocol_field(version, None),
        member_id: id.to_owned().into(),
        ..JoinGroupResponse::default()
    }
}

/// The refusal of a SyncGroup.
pub(super) fn refused_sync(error: Code) -> Response {
    Response::SyncGroup(SyncGroupResponse {
        error_code: error,
        ..SyncGroupResponse::default()
    })
}

/// The protocol's name in a JoinGroup's answer, which could not be null before version 7.
pub(super) fn protocol_field(
    version: i16,
    protocol: Option<&str>,
) -> Option<std::borrow::Cow<'static, str>> {
    match protocol {
        None if version < 7 => Some("".into()),
        protocol => protocol.map(|protocol| protocol.to_owned().into()),
    }
}
