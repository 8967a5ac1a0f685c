//! The group coordinator: consumer groups by Kafka's classic protocol, and committed offsets.
//!
//! Source: Apache Kafka's group coordinator, whose states, answers and time-outs are kept (KIP-62
//! rebalance time-outs, KIP-134 delay of the first rebalance, KIP-345 static members, KIP-394 member
//! ids, KIP-211 expiry of offsets). Which member gets which partitions is the members' own affair, so
//! eager and cooperative assignors look alike from here.
//!
//! Sans-io: one plain structure with neither clock nor thread nor disk. Requests go in with a token
//! ([`Coordinator::handle`]), answers come out with it ([`Coordinator::take_answer`]), at once or
//! later. What must be kept comes out as an [`Append`] to the topic `__consumer_offsets`
//! ([`records::OFFSETS_TOPIC`]); whoever owns the coordinator writes it as one batch to the partition
//! [`records::partition_of`] the group, waits until it is durable, and says so
//! ([`Coordinator::appended`]). Time passes by [`Coordinator::advance`], not later than
//! [`Coordinator::next_deadline`]. After a restart [`Coordinator::replay`] takes the topic's records
//! in order and [`Coordinator::loaded`] opens it for requests.
//!
//! Invariants:
//! - Every token is answered exactly once, with what then holds.
//! - What an answer says is committed is in the log: offsets, assignments and the ids of static members
//!   are answered only when their records are durable, and show only then.
//! - Appends of one group take effect in the order in which they came out, in whichever order they are
//!   reported.
//! - Memory is bounded by [`Config`]: state and unfinished appends are charged before they are taken
//!   on, and a request beyond the limit is refused with an error that lets the client try again.

pub mod access;
mod group;
mod offsets;
mod rebalance;
pub mod records;
#[cfg(test)]
mod tests;
mod timers;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use self::group::{CONSUMER, Effect, Group, InFlight, Member, Protocol, State};
use self::records::{OffsetsRecord, RecordError, Stored};
use self::timers::{Timer, Timers};
use crate::wire::kafka::groups::*;
use crate::wire::kafka::{Code, Writer};

/// Names a request in its answer; the caller's own.
pub type Token = u64;

/// Names an append in the report of its end.
pub type AppendId = u64;

/// Longest id or name that is taken, in bytes: Kafka's limit for strings is 32,767, but no name needs
/// that, and they are charged to memory.
const MAX_NAME: usize = 4096;
/// Kafka's limit for a group instance id, the same as for topics.
const MAX_INSTANCE_ID: usize = 249;
/// Most protocols of one member; clients have as many as they have assignors.
const MAX_PROTOCOLS: usize = 64;

/// The coordinator's settings; the names in comments are Kafka's.
#[derive(Debug, Clone)]
pub struct Config {
    /// group.min.session.timeout.ms
    pub min_session_timeout_ms: u32,
    /// group.max.session.timeout.ms
    pub max_session_timeout_ms: u32,
    /// group.initial.rebalance.delay.ms
    pub initial_rebalance_delay_ms: u32,
    /// How long a new member may wait for the end of a rebalance before it has to ask again, in
    /// milliseconds.
    pub new_member_join_timeout_ms: u32,
    /// group.max.size: most members of a group, and most ids given out and not used.
    pub max_group_size: usize,
    /// Most groups.
    pub max_groups: usize,
    /// offset.metadata.max.bytes
    pub max_offset_metadata: usize,
    /// offsets.retention.minutes, here in milliseconds.
    pub offsets_retention_ms: u64,
    /// offsets.retention.check.interval.ms
    pub retention_check_interval_ms: u64,
    /// Most bytes of keys and values in one append; more offsets make more appends. A group whose
    /// record is longer cannot be.
    pub max_append_bytes: usize,
    /// Most bytes that groups, members and offsets may take.
    pub max_state_bytes: usize,
    /// Most bytes in appends that are not finished.
    pub max_in_flight_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            min_session_timeout_ms: 6_000,
            max_session_timeout_ms: 1_800_000,
            initial_rebalance_delay_ms: 3_000,
            new_member_join_timeout_ms: 300_000,
            // Kafka sets no limit; a rebalance costs the leader a message of all members' metadata.
            max_group_size: 10_000,
            max_groups: 100_000,
            max_offset_metadata: 4_096,
            offsets_retention_ms: 7 * 24 * 60 * 60 * 1000,
            retention_check_interval_ms: 600_000,
            // With the batch's header and the records' own fields below 1 MiB.
            max_append_bytes: 900_000,
            max_state_bytes: 256 << 20,
            max_in_flight_bytes: 64 << 20,
        }
    }
}

impl Config {
    /// Of a coordinator that may take so many bytes: a fifth of them for appends.
    pub fn within(bytes: u64) -> Self {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        Self {
            max_in_flight_bytes: bytes / 5,
            max_state_bytes: bytes - bytes / 5,
            ..Self::default()
        }
    }
}

/// The time of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// Milliseconds of a clock that never goes back.
    pub mono_ms: u64,
    /// Unix milliseconds, for what is stored.
    pub unix_ms: i64,
}

/// Where a request comes from.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// The client's name in the request's header.
    pub client_id: &'a str,
    /// The client's address.
    pub client_host: &'a str,
    /// The request's version.
    pub version: i16,
}

/// A request.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // Kafka's own names
pub enum Request<'a> {
    JoinGroup(JoinGroupRequest<'a>),
    SyncGroup(SyncGroupRequest<'a>),
    Heartbeat(HeartbeatRequest<'a>),
    LeaveGroup(LeaveGroupRequest<'a>),
    /// Partitions that do not exist, or that the client may not read, are the caller's to leave out
    /// and to answer.
    OffsetCommit(OffsetCommitRequest<'a>),
    OffsetFetch(OffsetFetchRequest<'a>),
    OffsetDelete(OffsetDeleteRequest<'a>),
    DescribeGroups(DescribeGroupsRequest<'a>),
    ListGroups(ListGroupsRequest<'a>),
    DeleteGroups(DeleteGroupsRequest<'a>),
}

/// An answer, without throttle time.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // Kafka's own names
pub enum Response {
    JoinGroup(JoinGroupResponse<'static>),
    SyncGroup(SyncGroupResponse<'static>),
    Heartbeat(HeartbeatResponse),
    LeaveGroup(LeaveGroupResponse<'static>),
    OffsetCommit(OffsetCommitResponse<'static>),
    OffsetFetch(OffsetFetchResponse<'static>),
    OffsetDelete(OffsetDeleteResponse<'static>),
    DescribeGroups(DescribeGroupsResponse<'static>),
    ListGroups(ListGroupsResponse<'static>),
    DeleteGroups(DeleteGroupsResponse<'static>),
}

impl Response {
    /// Writes the answer's body in the request's version.
    pub fn encode(&self, writer: &mut Writer, version: i16) {
        match self {
            Response::JoinGroup(response) => response.encode(writer, version),
            Response::SyncGroup(response) => response.encode(writer, version),
            Response::Heartbeat(response) => response.encode(writer, version),
            Response::LeaveGroup(response) => response.encode(writer, version),
            Response::OffsetCommit(response) => response.encode(writer, version),
            Response::OffsetFetch(response) => response.encode(writer, version),
            Response::OffsetDelete(response) => response.encode(writer, version),
            Response::DescribeGroups(response) => response.encode(writer, version),
            Response::ListGroups(response) => response.encode(writer, version),
            Response::DeleteGroups(response) => response.encode(writer, version),
        }
    }
}

/// Records to be appended to the topic `__consumer_offsets`, in order and as one batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Append {
    /// For [`Coordinator::appended`].
    pub id: AppendId,
    /// Whose records they are: all appends of a group go to one partition, in order.
    pub group: Arc<str>,
    /// At least one.
    pub records: Vec<OffsetsRecord>,
}

/// Why records are not in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The log takes no batch of this size.
    #[error("the records are longer than the log takes")]
    TooLarge,
    /// The log takes nothing for now, or nothing any more.
    #[error("the log does not take records")]
    Unavailable,
}

impl AppendError {
    /// As clients are told.
    fn code(self) -> Code {
        match self {
            AppendError::TooLarge => Code::UnknownServerError,
            AppendError::Unavailable => Code::CoordinatorNotAvailable,
        }
    }
}

/// A committed offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommittedOffset {
    /// Offset of the next message to be read.
    pub offset: i64,
    /// Epoch of the leader that the client read from, or −1.
    pub leader_epoch: i32,
    /// The client's own note.
    pub metadata: Box<str>,
    /// When it was committed, Unix milliseconds.
    pub committed_ms: i64,
    /// When it expires, Unix milliseconds, where the client said so.
    pub expires_ms: Option<i64>,
}

/// Figures for operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Groups.
    pub groups: usize,
    /// Members of all groups.
    pub members: usize,
    /// Committed offsets.
    pub offsets: usize,
    /// Bytes charged for them.
    pub state_bytes: usize,
    /// Bytes in appends that are not finished.
    pub in_flight_bytes: usize,
    /// Rebalances that ended with an assignment, since the start.
    pub rebalances: u64,
    /// Members whose session ran out, since the start.
    pub expired_members: u64,
    /// Requests refused because memory or number of groups reached its limit, since the start.
    pub refused: u64,
}

/// A request that waits for appends.
#[derive(Debug)]
struct Job {
    token: Token,
    response: Response,
    left: usize,
}

/// What groups share: settings, time, queues, account.
#[derive(Debug)]
struct Io {
    config: Config,
    now: Now,
    timers: Timers,
    answers: VecDeque<(Token, Response)>,
    appends: VecDeque<Append>,
    /// The group of each append under way.
    owners: HashMap<AppendId, Arc<str>>,
    jobs: HashMap<u64, Job>,
    last_id: u64,
    rng: StdRng,
    state_bytes: usize,
    in_flight_bytes: usize,
    offsets: usize,
    rebalances: u64,
    expired_members: u64,
    refused: u64,
}

impl Io {
    fn answer(&mut self, token: Token, response: Response) {
        self.answers.push_back((token, response));
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn append(
        &mut self,
        group: &Arc<str>,
        records: Vec<OffsetsRecord>,
        bytes: usize,
        job: Option<u64>,
    ) -> AppendId {
        let id = self.next_id();
        self.in_flight_bytes += bytes;
        self.owners.insert(id, group.clone());
        if let Some(job) = job.and_then(|job| self.jobs.get_mut(&job)) {
            job.left += 1;
        }
        self.appends.push_back(Append {
            id,
            group: group.clone(),
            records,
        });
        id
    }

    /// A request whose answer waits for the appends that will name it.
    fn begin_job(&mut self, token: Token, response: Response) -> u64 {
        let id = self.next_id();
        let job = Job {
            token,
            response,
            left: 0,
        };
        self.jobs.insert(id, job);
        id
    }

    /// One of a job's appends has ended, or (`None`) all have been asked for.
    fn step_job(&mut self, id: u64, result: Option<(&str, Result<(), AppendError>)>) {
        let Some(job) = self.jobs.get_mut(&id) else {
            return;
        };
        if let Some((group, result)) = result {
            job.left -= 1;
            if let Err(error) = result {
                offsets::spoil(&mut job.response, group, error.code());
            }
        }
        if job.left == 0
            && let Some(job) = self.jobs.remove(&id)
        {
            self.answer(job.token, job.response);
        }
    }

    /// Whether so many bytes more fit; counts it where they do not.
    fn has_room(&mut self, state: usize, in_flight: usize) -> bool {
        let fits = self.state_bytes.saturating_add(state) <= self.config.max_state_bytes
            && self.in_flight_bytes.saturating_add(in_flight) <= self.config.max_in_flight_bytes;
        self.refused += u64::from(!fits);
        fits
    }

    /// A member id that nobody can guess: the client's name (or instance id) and a random UUID.
    fn new_member_id(&mut self, prefix: &str) -> Arc<str> {
        let prefix = prefix.get(..prefix.len().min(255)).unwrap_or("client");
        // Version 4, variant 1 (RFC 9562).
        let bits = self.rng.random::<u128>() & !(0xf << 76) & !(3 << 62) | 4 << 76 | 2 << 62;
        let hex = format!("{bits:032x}");
        let uuid = [
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..],
        ]
        .join("-");
        format!("{prefix}-{uuid}").into()
    }
}

/// The coordinator of all groups.
#[derive(Debug)]
pub struct Coordinator {
    groups: HashMap<Arc<str>, Group>,
    io: Io,
    loading: bool,
    /// When the next look for expired offsets is due; its place in the timer queue.
    expiry_at: u64,
}

impl Coordinator {
    /// A coordinator that loads: requests are refused until [`Coordinator::loaded`]. `seed` must be
    /// random, for member ids come from it.
    pub fn new(config: Config, seed: [u8; 32]) -> Self {
        let io = Io {
            config,
            now: Now::default(),
            timers: Timers::default(),
            answers: VecDeque::new(),
            appends: VecDeque::new(),
            owners: HashMap::new(),
            jobs: HashMap::new(),
            last_id: 0,
            rng: StdRng::from_seed(seed),
            state_bytes: 0,
            in_flight_bytes: 0,
            offsets: 0,
            rebalances: 0,
            expired_members: 0,
            refused: 0,
        };
        Self {
            groups: HashMap::new(),
            io,
            loading: true,
            expiry_at: 0,
        }
    }

    // Loading.

    /// Takes a record of the topic, in the order of its partition. A record that is not understood is
    /// an error and changes nothing; the next ones can be taken all the same.
    pub fn replay(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), RecordError> {
        match records::decode(key, value)? {
            Stored::Offset {
                group: id,
                topic,
                partition,
                value: Some(value),
            } => {
                let group = group_entry(&mut self.groups, &mut self.io, id);
                let topic = group
                    .offsets
                    .get_key_value(topic)
                    .map_or_else(|| topic.into(), |(name, _)| name.clone());
                group.put_offset(&mut self.io, &topic, partition, value);
            }
            Stored::Offset {
                group: id,
                topic,
                partition,
                value: None,
            } => {
                if let Some(group) = self.groups.get_mut(id) {
                    group.remove_offset(&mut self.io, topic, partition);
                    self.settle(id);
                }
            }
            Stored::Group {
                group: id,
                value: Some(value),
            } => {
                let group = group_entry(&mut self.groups, &mut self.io, id);
                group.restore(&mut self.io, &value);
            }
            Stored::Group {
                group: id,
                value: None,
            } => {
                if let Some(group) = self.groups.get_mut(id) {
                    group.restore(&mut self.io, &Default::default());
                    group.persisted = false;
                    self.settle(id);
                }
            }
        }
        Ok(())
    }

    /// All records were replayed: members' sessions begin anew and requests are served.
    pub fn loaded(&mut self, now: Now) {
        self.io.now = now;
        self.loading = false;
        for group in self.groups.values_mut() {
            group.resume(&mut self.io);
        }
        self.schedule_expiry();
    }

    // Requests.

    /// Takes a request; its answer comes with `token`, which no other request under way may have.
    pub fn handle(&mut self, now: Now, token: Token, context: &Context<'_>, request: Request<'_>) {
        self.io.now = now;
        if let Err(error) = self.admit(&request) {
            let response = refusal(&request, context.version, error);
            self.io.answer(token, response);
            return;
        }
        match request {
            Request::JoinGroup(request) => self.join(token, context, &request),
            Request::SyncGroup(request) => {
                self.with(&request.group_id, |group, io| match group {
                    Some(group) => group.sync(io, token, &request),
                    None => io.answer(token, group::refused_sync(Code::UnknownMemberId)),
                });
            }
            Request::Heartbeat(request) => {
                self.with(&request.group_id, |group, io| {
                    let error_code = match group {
                        Some(group) => group.heartbeat(io, &request),
                        None => Code::UnknownMemberId,
                    };
                    let response = HeartbeatResponse {
                        error_code,
                        ..HeartbeatResponse::default()
                    };
                    io.answer(token, Response::Heartbeat(response));
                });
            }
            Request::LeaveGroup(request) => self.leave(token, context.version, request),
            Request::OffsetCommit(request) => self.commit(token, context.version, &request),
            Request::OffsetFetch(request) => self.fetch(token, context.version, &request),
            Request::OffsetDelete(request) => self.delete_offsets(token, &request),
            Request::DescribeGroups(request) => self.describe(token, &request),
            Request::ListGroups(request) => self.list(token, &request),
            Request::DeleteGroups(request) => self.delete_groups(token, &request),
        }
        self.advance(now);
    }

    /// Takes the next answer.
    pub fn take_answer(&mut self) -> Option<(Token, Response)> {
        self.io.answers.pop_front()
    }

    /// Takes the next append; they are to be written in this order.
    pub fn take_append(&mut self) -> Option<Append> {
        self.io.appends.pop_front()
    }

    /// An append has ended: its records are durable, or they are not in the log and never will be.
    pub fn appended(&mut self, now: Now, id: AppendId, result: Result<(), AppendError>) {
        self.io.now = now;
        let Some(owner) = self.io.owners.remove(&id) else {
            return;
        };
        self.with(&owner, |group, io| {
            let Some(group) = group else { return };
            if let Some(append) = group.in_flight.iter_mut().find(|append| append.id == id) {
                append.done = Some(result);
            }
            while let Some(InFlight {
                done: Some(result), ..
            }) = group.in_flight.front()
            {
                let result = *result;
                if let Some(append) = group.in_flight.pop_front() {
                    io.in_flight_bytes -= append.bytes;
                    group.apply(io, append.effect, result);
                    if let Some(job) = append.job {
                        io.step_job(job, Some((&owner, result)));
                    }
                }
            }
        });
        self.advance(now);
    }

    /// When [`Coordinator::advance`] is to be called next, in milliseconds of the monotonic clock.
    pub fn next_deadline(&self) -> Option<u64> {
        self.io.timers.first()
    }

    /// Does what is due by `now`.
    pub fn advance(&mut self, now: Now) {
        self.io.now = now;
        while let Some((at, timer)) = self.io.timers.pop_due(now.mono_ms) {
            let id = match &timer {
                Timer::Session(group, _) | Timer::Join(group) | Timer::Sync(group) => group.clone(),
                Timer::Expire => {
                    self.expire();
                    self.schedule_expiry();
                    continue;
                }
            };
            self.with(&id, |group, io| {
                let Some(group) = group else { return };
                match timer {
                    Timer::Session(_, member) => group.session_due(io, at, &member),
                    Timer::Join(_) => group.join_due(io),
                    Timer::Sync(_) => group.sync_due(io),
                    Timer::Expire => {}
                }
            });
        }
    }

    /// A topic was deleted: its offsets go with it.
    pub fn topic_deleted(&mut self, now: Now, topic: &str) {
        self.io.now = now;
        for group in self.groups.values_mut() {
            let gone: Vec<(Arc<str>, i32)> = group
                .known_offsets()
                .into_iter()
                .filter(|(name, _)| **name == *topic)
                .collect();
            group.forget_offsets(&mut self.io, gone, None);
        }
    }

    /// Figures for operators; costs a walk over the groups.
    pub fn stats(&self) -> Stats {
        Stats {
            groups: self.groups.len(),
            members: self.groups.values().map(|group| group.members.len()).sum(),
            offsets: self.io.offsets,
            state_bytes: self.io.state_bytes,
            in_flight_bytes: self.io.in_flight_bytes,
            rebalances: self.io.rebalances,
            expired_members: self.io.expired_members,
            refused: self.io.refused,
        }
    }

    fn schedule_expiry(&mut self) {
        self.io.timers.remove(self.expiry_at, Timer::Expire);
        self.expiry_at = self.io.now.mono_ms + self.io.config.retention_check_interval_ms.max(1);
        self.io.timers.insert(self.expiry_at, Timer::Expire);
    }

    /// Runs `f` on a group and lets the group go if nothing is left of it.
    fn with<R>(&mut self, id: &str, f: impl FnOnce(Option<&mut Group>, &mut Io) -> R) -> R {
        let result = f(self.groups.get_mut(id), &mut self.io);
        self.settle(id);
        result
    }

    fn settle(&mut self, id: &str) {
        if self.groups.get(id).is_some_and(Group::is_disposable)
            && let Some(group) = self.groups.remove(id)
        {
            group.dispose(&mut self.io);
        }
    }

    /// Whether a new group may be.
    fn may_create(&mut self, id: &str) -> bool {
        if self.groups.len() >= self.io.config.max_groups {
            self.io.refused += 1;
            return false;
        }
        self.io.has_room(group::GROUP_COST + id.len(), 0)
    }

    /// What is refused whatever the group's state.
    fn admit(&self, request: &Request<'_>) -> Result<(), Code> {
        let (group, may_be_empty) = match request {
            Request::JoinGroup(request) => (&request.group_id, false),
            Request::SyncGroup(request) => (&request.group_id, false),
            Request::Heartbeat(request) => (&request.group_id, false),
            Request::LeaveGroup(request) => (&request.group_id, false),
            Request::OffsetDelete(request) => (&request.group_id, false),
            // Kafka's old consumers committed without a group id.
            Request::OffsetCommit(request) => (&request.group_id, true),
            Request::OffsetFetch(request) => (&request.group_id, true),
            Request::DescribeGroups(_) | Request::ListGroups(_) | Request::DeleteGroups(_) => {
                return self.admit_loaded(request);
            }
        };
        if group.len() > MAX_NAME || group.is_empty() && !may_be_empty {
            return Err(Code::InvalidGroupId);
        }
        self.admit_loaded(request)?;
        let Request::JoinGroup(request) = request else {
            return Ok(());
        };
        let config = &self.io.config;
        let sessions = config.min_session_timeout_ms..=config.max_session_timeout_ms;
        if !u32::try_from(request.session_timeout_ms).is_ok_and(|ms| sessions.contains(&ms)) {
            return Err(Code::InvalidSessionTimeout);
        }
        let instance = request.group_instance_id.as_deref();
        if instance.is_some_and(|id| id.is_empty() || id.len() > MAX_INSTANCE_ID) {
            return Err(Code::InvalidRequest);
        }
        let names: std::collections::HashSet<&str> = request
            .protocols
            .iter()
            .take(MAX_PROTOCOLS + 1)
            .map(|protocol| &*protocol.name)
            .collect();
        if request.protocols.len() > MAX_PROTOCOLS
            || names.len() < request.protocols.len()
            || names.iter().any(|name| name.len() > MAX_NAME)
            || request.protocol_type.len() > MAX_NAME
        {
            return Err(Code::InconsistentGroupProtocol);
        }
        Ok(())
    }

    fn admit_loaded(&self, request: &Request<'_>) -> Result<(), Code> {
        match request {
            _ if !self.loading => Ok(()),
            _ => Err(Code::CoordinatorLoadInProgress),
        }
    }

    #[cfg(test)]
    fn check(&self) {
        let charged: usize = self.groups.values().map(Group::check).sum();
        assert_eq!(charged, self.io.state_bytes);
        let in_flight: usize = self
            .groups
            .values()
            .flat_map(|group| &group.in_flight)
            .map(|append| append.bytes)
            .sum();
        assert_eq!(in_flight, self.io.in_flight_bytes);
        let offsets: usize = self
            .groups
            .values()
            .flat_map(|group| group.offsets.values())
            .map(|partitions| partitions.len())
            .sum();
        assert_eq!(offsets, self.io.offsets);
        assert!(!self.groups.values().any(Group::is_disposable));
        let timers: usize = self
            .groups
            .values()
            .map(|group| {
                let sessions = group
                    .members
                    .values()
                    .filter(|member| member.timer.is_some());
                sessions.count()
                    + group.pending.len()
                    + usize::from(group.join_timer.is_some())
                    + usize::from(group.sync_timer.is_some())
            })
            .sum();
        assert_eq!(self.io.timers.len(), timers + usize::from(!self.loading));
    }
}

fn group_entry<'g>(
    groups: &'g mut HashMap<Arc<str>, Group>,
    io: &mut Io,
    id: &str,
) -> &'g mut Group {
    let id: Arc<str> = match groups.get_key_value(id) {
        Some((id, _)) => id.clone(),
        None => id.into(),
    };
    groups
        .entry(id.clone())
        .or_insert_with(|| Group::new(id, io))
}

/// The answer to a request that is refused as a whole.
fn refusal(request: &Request<'_>, version: i16, error: Code) -> Response {
    match request {
        Request::JoinGroup(request) => {
            Response::JoinGroup(group::refused_join(version, &request.member_id, error))
        }
        Request::SyncGroup(_) => group::refused_sync(error),
        // While the coordinator loads, a member can do nothing better than go on.
        Request::Heartbeat(_) => Response::Heartbeat(HeartbeatResponse {
            error_code: match error {
                Code::CoordinatorLoadInProgress => Code::None,
                error => error,
            },
            ..HeartbeatResponse::default()
        }),
        Request::LeaveGroup(_) => Response::LeaveGroup(LeaveGroupResponse {
            error_code: error,
            ..LeaveGroupResponse::default()
        }),
        Request::OffsetCommit(request) => {
            Response::OffsetCommit(offsets::refused_commit(request, error))
        }
        Request::OffsetFetch(request) => {
            Response::OffsetFetch(offsets::refused_fetch(request, version, error))
        }
        Request::OffsetDelete(_) => Response::OffsetDelete(OffsetDeleteResponse {
            error_code: error,
            ..OffsetDeleteResponse::default()
        }),
        Request::DescribeGroups(request) => Response::DescribeGroups(DescribeGroupsResponse {
            groups: request
                .groups
                .iter()
                .map(|id| DescribedGroup {
                    error_code: error,
                    group_id: id.to_string().into(),
                    ..DescribedGroup::default()
                })
                .collect(),
            ..DescribeGroupsResponse::default()
        }),
        Request::ListGroups(_) => Response::ListGroups(ListGroupsResponse {
            error_code: error,
            ..ListGroupsResponse::default()
        }),
        Request::DeleteGroups(request) => Response::DeleteGroups(DeleteGroupsResponse {
            results: request
                .groups_names
                .iter()
                .map(|id| DeletedGroup {
                    group_id: id.to_string().into(),
                    error_code: error,
                })
                .collect(),
            ..DeleteGroupsResponse::default()
        }),
    }
}
