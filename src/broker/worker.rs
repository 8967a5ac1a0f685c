//! What a thread that serves connections runs: requests in, answers out, shards and logs between.
//!
//! The transport hands over the bytes it received and a connection's state, and asks for answers; nothing
//! here does network I/O. Invariants: a request is begun only when everything it may need is free (places in
//! the shards' rings, memory), else it stays unread; each begun request is completed exactly once.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::broker::batch;
use crate::broker::cluster::{self, Endpoint, MetadataRequest, Wanted};
use crate::broker::counters::Counters;
use crate::broker::fetch::{self, FetchRequest, Fetched, Part};
use crate::broker::groups::{self, Append, AppendError, AppendId};
use crate::broker::hub::{self, Hub};
use crate::broker::inflight::{InFlight, MAX_BATCHES, RequestId};
use crate::broker::list_offsets::{self, Asked};
use crate::broker::produce::{self, PartResult, ProduceRequest, Shape};
use crate::broker::producer_ids::ProducerIds;
use crate::broker::security::acl::{self, Access, Operation, Resource};
use crate::broker::security::quota::{Bucket, Direction};
use crate::broker::security::sasl::{self, Stage, Step};
use crate::broker::security::{Loaded, Proof, Security};

use crate::broker::session::{self, Framing, LENGTH_LEN, Limits, REQUEST_MIN, Session, Ticket};
use crate::broker::settings::Setting;
use crate::broker::topics::{Place, Topics};
use crate::broker::waiting::{Progress, WaitId, Waiting};
use crate::broker::{admin, throttle, waiting};
use crate::memory::budget::{Budget, Charge, Part as Account};
use crate::shard::link::{BatchAnswer, BatchLink, LINK_BATCHES};
use crate::shard::{BatchBuffer, Now, ShardStats};
use crate::storage::{LogReader, Piece, ReadError};
use crate::wire::datagram::ErrorCode;
use crate::wire::kafka::{Api, Code, Malformed, Reader, RequestHeader};
use crate::wire::record_batch;

/// Of a thread's share of memory for answers, one part in so many is not for fetches: heartbeats and commits are answered
/// while consumers do not take what they fetched.
const OTHERS_PART: u64 = 8;
/// So many parts of so many of a thread's share of memory for requests are for batches on their way to shards.
const ON_THEIR_WAY: (u64, u64) = (3, 8);
/// A fetch gets one part in so many of what is free for fetches, at most.
const FAIR_PART: u64 = 8;
/// How long a fetch waits before it looks again for memory for its answer.
const FULL_PATIENCE_NS: u64 = 20_000_000;
/// How long a request for offsets waits at most for what was stored before it to become durable: a commit takes
/// milliseconds, a disk that takes longer is in trouble.
const OFFSETS_PATIENCE_NS: u64 = 2_000_000_000;
/// The slot of tags that belong to no request: batches without an acknowledgement.
const UNANSWERED: u64 = ((1 << 24) - 1) << 40;

/// What all threads share.
pub struct Broker {
    /// The topics.
    pub topics: Arc<dyn Topics>,
    /// Ids for idempotent producers.
    pub producer_ids: ProducerIds,
    /// The store's id, as Kafka shows it.
    pub cluster_id: String,
    /// Where clients come in, by the numbers that connections have of them.
    pub listeners: Vec<Listener>,
    /// Who clients are and what they may do.
    pub security: Security,
    /// Whether unknown topics are made on demand.
    pub auto_create: bool,
    /// Partitions of topics without a number.
    pub default_partitions: u32,
    /// The settings that DescribeConfigs shows.
    pub settings: Vec<Setting>,
    /// Bounds of a connection.
    pub limits: Limits,
    /// Groups and their offsets.
    pub hub: Hub,
    /// What the broker's clock began with.
    pub started: Instant,
    /// What is counted.
    pub counters: Counters,
    /// What the threads may take of memory.
    pub memory: Budget,
    /// How many threads there are.
    pub threads: usize,
}

impl Broker {
    /// The time, by the broker's clock.
    pub fn now(&self) -> Now {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH);
        Now {
            // Nanoseconds fit 64 bits for 584 years.
            mono_ns: self.started.elapsed().as_nanos() as u64,
            unix_ns: unix.map_or(0, |t| t.as_nanos() as i64),
        }
    }
}

/// What is the same for all connections that arrive at an address.
#[derive(Debug, Clone, Default)]
pub struct Listener {
    /// What clients are told to connect to; `None`: where their connection arrived.
    pub advertised: Option<Endpoint>,
    /// What clients prove.
    pub proof: Proof,
}

/// An encoded answer, in the pieces that are to be sent one after another.
pub type Answer = Vec<Piece>;

/// Names a connection for the life of its thread.
pub type ConnectionId = u64;

/// A connection's state.
pub struct Connection {
    id: ConnectionId,
    local: SocketAddr,
    peer: SocketAddr,
    session: Session<Answer>,
    listener: usize,
    stage: Stage,
    access: Access,
    /// What held for its last request, and in which version.
    security: (u64, Arc<Loaded>),
    /// Its buckets, where there are quotas.
    rates: Option<Box<Rates>>,
    muted_until_ns: u64,
    /// Time of this thread that its requests took and that was counted, since [`Connection::charge`].
    counted_ns: u64,
}

/// The buckets of a connection.
struct Rates {
    /// Of the client id for which they were looked up.
    client: Box<str>,
    produce: Option<Arc<Bucket>>,
    fetch: Option<Arc<Bucket>>,
    time: Option<Arc<Bucket>>,
}

/// Does something, and takes the time that it took from a bucket.
fn timed<T>(bucket: Option<&Arc<Bucket>>, now: Now, work: impl FnOnce() -> T) -> T {
    let Some(bucket) = bucket else {
        return work();
    };
    let begun = Instant::now();
    let done = work();
    bucket.take(begun.elapsed().as_nanos() as usize, now.mono_ns);
    done
}

impl Connection {
    /// A new one that arrived at `local` by a listener of the broker; nobody in particular.
    pub fn new(
        id: ConnectionId,
        local: SocketAddr,
        peer: SocketAddr,
        broker: &Broker,
        listener: usize,
    ) -> Self {
        let sasl = broker.listeners.get(listener).is_none_or(|l| l.proof.sasl);
        // The version first: what is loaded in between is loaded again.
        let security = (broker.security.version(), broker.security.current());
        let rules = Arc::clone(&security.1.rules);
        Self {
            id,
            local,
            peer,
            session: Session::default(),
            listener,
            stage: match sasl {
                true => Stage::Handshake,
                false => Stage::Proved,
            },
            access: Access::new(rules, acl::ANONYMOUS, peer.ip()),
            security,
            rates: None,
            muted_until_ns: 0,
            counted_ns: 0,
        }
    }

    /// Who it is, where the transport proved it.
    pub fn set_principal(&mut self, principal: &str) {
        self.access.set_principal(principal);
    }

    /// Whether it has proved who it is, or need not.
    pub fn is_proved(&self) -> bool {
        self.stage.is_proved()
    }

    /// Leaves its requests unread for a time.
    pub fn mute(&mut self, ms: u64, now: Now) {
        if ms > 0 {
            let until = now.mono_ns.saturating_add(ms * 1_000_000);
            self.muted_until_ns = self.muted_until_ns.max(until);
        }
    }

    /// Until when its requests are left unread, in nanoseconds of the broker's clock; in the past: they are not.
    pub fn muted_until_ns(&self) -> u64 {
        self.muted_until_ns
    }

    /// Takes in what was loaded since its last request.
    fn refresh(&mut self, security: &Security) {
        let version = security.version();
        if self.security.0 != version {
            self.security = (version, security.current());
            self.access.set_rules(Arc::clone(&self.security.1.rules));
            self.rates = None;
        }
    }

    /// Its bucket of a direction.
    fn rate(&mut self, direction: Direction, now: Now) -> Option<Arc<Bucket>> {
        let quotas = &self.security.1.quotas;
        if quotas.is_empty() {
            return None;
        }
        let client = self.session.client_id();
        let rates = match &self.rates {
            Some(rates) if *rates.client == *client => rates,
            _ => {
                let of = |direction| {
                    let user = self.access.principal();
                    quotas.bucket(direction, user, client, now.mono_ns)
                };
                self.rates.insert(Box::new(Rates {
                    client: client.into(),
                    produce: of(Direction::Produce),
                    fetch: of(Direction::Fetch),
                    time: of(Direction::Time),
                }))
            }
        };
        match direction {
            Direction::Produce => rates.produce.clone(),
            Direction::Fetch => rates.fetch.clone(),
            Direction::Time => rates.time.clone(),
        }
    }

    /// Whether the time that the thread spends on it is counted.
    pub fn is_timed(&self) -> bool {
        self.rates
            .as_ref()
            .is_some_and(|rates| rates.time.is_some())
    }

    /// Counts what the transport spent on it, `spent` less what its requests took: reading, sending, encryption. As
    /// on Kafka it is waited for with the next request.
    pub fn charge(&mut self, spent: Duration, now: Now) {
        let counted = std::mem::take(&mut self.counted_ns);
        if let Some(bucket) = self.rates.as_ref().and_then(|rates| rates.time.as_ref()) {
            let rest = (spent.as_nanos() as u64).saturating_sub(counted);
            bucket.take(rest as usize, now.mono_ns);
        }
    }

    /// Its name.
    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// Its requests.
    pub fn session(&mut self) -> &mut Session<Answer> {
        &mut self.session
    }
}

/// Why a connection is closed by the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Close {
    /// A length that no request has.
    BadLength,
    /// A request that ends early or says the impossible.
    Malformed,
    /// An API that is not served, or a version of it.
    Unsupported,
    /// A produce request without acknowledgement failed; there is no other way to say so.
    UnacknowledgedFailed,
    /// It asked for something before it proved who it is.
    NotProved,
    /// It could not prove who it is.
    AuthenticationFailed,
}

/// How much was consumed, and why not more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Bytes consumed: whole requests.
    pub consumed: usize,
    /// Bytes that the next request has with its length, as far as is known.
    pub need: usize,
    /// The rest is to be shown again when something was completed, on this connection or on another.
    pub blocked: bool,
}

/// The way to a shard and back.
pub struct ShardLink {
    /// Batches there and answers back.
    pub batches: BatchLink,
    /// What it counts.
    pub stats: Arc<ShardStats>,
    /// Its log.
    pub reader: LogReader,
    /// Bytes of the largest batch that its log takes.
    pub max_batch: usize,
}

struct Link {
    link: ShardLink,
    raised: u64,
}

struct Producing {
    connection: ConnectionId,
    ticket: Ticket,
    time: Option<Arc<Bucket>>,
    shape: Shape,
}

struct Fetching {
    connection: ConnectionId,
    ticket: Ticket,
    access: Access,
    rate: Option<Arc<Bucket>>,
    time: Option<Arc<Bucket>>,
    request: FetchRequest,
    deadline_ns: u64,
}

/// A request for offsets that waits for commits on their way.
struct Listing {
    connection: ConnectionId,
    ticket: Ticket,
    time: Option<Arc<Bucket>>,
    header: RequestHeader<'static>,
    asked: Vec<(Box<str>, Vec<Asked>)>,
    access: Access,
    /// Log ends that are to become high watermarks.
    awaited: Vec<(Place, i64)>,
    deadline_ns: u64,
}

struct Sent {
    bytes: usize,
    append_time: i64,
    place: Place,
}

/// A request that was completed while its connection was not at hand.
pub struct Completed {
    /// Whose.
    pub connection: ConnectionId,
    /// Which.
    pub ticket: Ticket,
    /// What was asked.
    pub api: Api,
    /// In which version.
    pub version: i16,
    /// Its answer.
    pub answer: Answer,
    /// For how long its connection is then not read, in milliseconds.
    pub throttle_ms: u64,
}

/// A thread's part of the broker.
pub struct Worker {
    broker: Arc<Broker>,
    thread: usize,
    links: Vec<Link>,
    produces: InFlight<Producing, PartResult>,
    fetches: Waiting<Fetching>,
    fetch_of: HashMap<ConnectionId, WaitId, foldhash::fast::RandomState>,
    listings: Vec<Listing>,
    /// Batches that shards hold, by tag.
    sent: HashMap<u64, Sent, foldhash::fast::RandomState>,
    on_their_way: Charge,
    on_their_way_max: u64,
    /// What is being read, where batches may stay in it.
    input: Option<Arc<Vec<u8>>>,
    unsent: Charge,
    unsent_max: u64,
    next_unanswered: u64,
    /// The partition that the next fetch begins with.
    turn: usize,
    completed: Vec<Completed>,
    answers: Vec<BatchAnswer>,
    /// Thread 0: appends of the coordinator that wait for room, and those on their way, by tag.
    appends: VecDeque<Append>,
    appending: HashMap<u64, AppendId, foldhash::fast::RandomState>,
}

/// What a request came to.
enum Done {
    /// Its answer.
    Answer(Answer),
    /// Its answer, and the connection is to be closed.
    Last(Answer, Close),
    /// There is none.
    Silent,
    /// It will be completed later.
    Later,
    /// Not begun: something it needs is taken.
    Blocked,
}

impl From<Vec<u8>> for Done {
    fn from(answer: Vec<u8>) -> Self {
        Done::Answer(vec![answer.into()])
    }
}

impl From<Malformed> for Close {
    fn from(_: Malformed) -> Self {
        Close::Malformed
    }
}

impl Worker {
    /// A thread's part, with its way to each shard.
    pub fn new(broker: Arc<Broker>, thread: usize, links: Vec<ShardLink>) -> Self {
        let links: Vec<Link> = links
            .into_iter()
            .map(|link| Link {
                raised: link.stats.raised.load(Acquire),
                link,
            })
            .collect();
        let share = |account| broker.memory.account(account).share(broker.threads);
        let (requests, answers) = (share(Account::Requests), share(Account::Answers));
        Self {
            broker,
            thread,
            produces: InFlight::default(),
            fetches: Waiting::new(links.len()),
            fetch_of: HashMap::default(),
            listings: Vec::new(),
            sent: HashMap::default(),
            links,
            on_their_way: requests.charge(),
            on_their_way_max: requests.bytes() / ON_THEIR_WAY.1 * ON_THEIR_WAY.0,
            unsent: answers.charge(),
            unsent_max: answers.bytes(),
            next_unanswered: 0,
            input: None,
            turn: 0,
            completed: Vec::new(),
            answers: Vec::new(),
            appends: VecDeque::new(),
            appending: HashMap::default(),
        }
    }

    /// As [`Worker::received`], of the input behind its first `consumed` bytes; a batch that is most of it goes to its shard
    /// without a copy, so that others may have the memory, too, afterwards.
    pub fn received_whole(
        &mut self,
        connection: &mut Connection,
        input: &Arc<Vec<u8>>,
        consumed: usize,
        now: Now,
    ) -> Result<Received, Close> {
        self.input = Some(Arc::clone(input));
        let received = self.received(connection, &input[consumed..], now);
        self.input = None;
        received
    }

    /// Begins the requests in `input`, as many as may be begun.
    pub fn received(
        &mut self,
        connection: &mut Connection,
        input: &[u8],
        now: Now,
    ) -> Result<Received, Close> {
        let limits = self.broker.limits;
        let mut consumed = 0;
        loop {
            let rest = &input[consumed..];
            if connection.muted_until_ns > now.mono_ns {
                return Ok(Received {
                    consumed,
                    need: 0,
                    blocked: false,
                });
            }
            let sizes = match connection.stage.is_proved() {
                true => REQUEST_MIN..=limits.request,
                false if connection.stage.is_raw() => 0..=sasl::MAX_UNPROVED_REQUEST,
                false => REQUEST_MIN..=sasl::MAX_UNPROVED_REQUEST,
            };
            let request = match session::frame(rest, sizes) {
                Framing::Partial { need } => {
                    return Ok(Received {
                        consumed,
                        need,
                        blocked: false,
                    });
                }
                Framing::BadLength(_) => {
                    return Err(self.close(Close::BadLength));
                }
                Framing::Request(request) => request,
            };
            let begun = self
                .request(connection, request, now)
                .map_err(|reason| self.close(reason))?;
            if !begun {
                return Ok(Received {
                    consumed,
                    need: LENGTH_LEN + request.len(),
                    blocked: true,
                });
            }
            consumed += LENGTH_LEN + request.len();
        }
    }

    fn close(&self, reason: Close) -> Close {
        self.broker.counters.closed(reason);
        reason
    }

    /// Begins a request; false: not now.
    fn request(
        &mut self,
        connection: &mut Connection,
        request: &[u8],
        now: Now,
    ) -> Result<bool, Close> {
        connection.refresh(&self.broker.security);
        if connection.stage.is_raw() {
            self.raw_token(connection, request)?;
            return Ok(true);
        }
        let (header, mut body) = RequestHeader::read(request)?;
        let api = Api::of(header.key).ok_or(Close::Unsupported)?;
        if !api.serves(header.version) && api != Api::ApiVersions {
            return Err(Close::Unsupported);
        }
        let first = matches!(
            api,
            Api::ApiVersions | Api::SaslHandshake | Api::SaslAuthenticate
        );
        if !first && !connection.stage.is_proved() {
            return Err(Close::NotProved);
        }
        let session = &mut connection.session;
        let limits = &self.broker.limits;
        if !session.admits(api != Api::Produce, request.len(), limits) {
            return Ok(false);
        }
        if self.unsent.bytes() >= self.unsent_max {
            self.unsent.account().refuse();
            return Ok(false);
        }
        session.set_client_id(header.client_id);
        let ticket = session.begin(request.len());
        // Who has not proved who it is has no quota of its own.
        let time = match connection.stage.is_proved() {
            true => connection.rate(Direction::Time, now),
            false => None,
        };
        let begun = time.as_ref().map(|_| Instant::now());
        let done = self.handle(connection, api, &header, &mut body, ticket, now);
        let mut throttle_ms = 0;
        if let (Some(time), Some(begun)) = (&time, begun) {
            let spent = begun.elapsed().as_nanos() as u64;
            connection.counted_ns += spent;
            throttle_ms = time.take(spent as usize, now.mono_ns);
        }
        match done? {
            Done::Answer(mut answer) => {
                if throttle_ms > 0 {
                    // What is not served is answered in the oldest version.
                    let version = if api.serves(header.version) {
                        header.version
                    } else {
                        0
                    };
                    throttle::put(&mut answer, api, version, throttle_ms);
                    connection.mute(throttle_ms, now);
                }
                self.reply(connection, ticket, answer);
            }
            Done::Last(answer, reason) => {
                self.reply(connection, ticket, answer);
                return Err(reason);
            }
            Done::Silent => {
                connection.mute(throttle_ms, now);
                connection.session.answer(ticket, None, 0);
            }
            // Its completion says for how long it is throttled.
            Done::Later => {}
            Done::Blocked => {
                connection.session.undo(ticket);
                return Ok(false);
            }
        }
        self.broker.counters.request(api);
        Ok(true)
    }

    fn reply(&mut self, connection: &mut Connection, ticket: Ticket, answer: Answer) {
        let bytes = size(&answer);
        self.unsent.set(self.unsent.bytes() + bytes as u64);
        connection.session.answer(ticket, Some(answer), bytes);
    }

    /// Takes a token that came without a header.
    fn raw_token(&mut self, connection: &mut Connection, token: &[u8]) -> Result<(), Close> {
        let ticket = connection.session.begin(token.len());
        match Self::token(connection, token) {
            Step::Continue(token) | Step::Proved { token, .. } => {
                let mut answer = (token.len() as i32).to_be_bytes().to_vec();
                answer.extend_from_slice(&token);
                self.reply(connection, ticket, vec![answer.into()]);
                Ok(())
            }
            Step::Failed(..) | Step::OutOfTurn => Err(Close::AuthenticationFailed),
        }
    }

    fn token(connection: &mut Connection, token: &[u8]) -> Step {
        let users = &connection.security.1.users;
        let step = connection.stage.token(users, token);
        match &step {
            Step::Proved { user, .. } => connection.set_principal(user),
            Step::Failed(mechanism, reason) => {
                let peer = connection.peer;
                tracing::warn!("kafka: {peer} did not authenticate by {mechanism}: {reason}");
            }
            Step::Continue(_) | Step::OutOfTurn => {}
        }
        step
    }

    fn handle(
        &mut self,
        connection: &mut Connection,
        api: Api,
        header: &RequestHeader<'_>,
        body: &mut Reader<'_>,
        ticket: Ticket,
        now: Now,
    ) -> Result<Done, Close> {
        let broker = Arc::clone(&self.broker);
        let topics = &*broker.topics;
        let access = connection.access.clone();
        let access = &access;
        let listener = broker.listeners.get(connection.listener);
        let endpoint = || match listener.and_then(|l| l.advertised.as_ref()) {
            Some(endpoint) => endpoint.clone(),
            None => Endpoint {
                host: connection.local.ip().to_canonical().to_string(),
                port: connection.local.port(),
            },
        };
        Ok(match api {
            Api::Produce => return self.produce(connection, header, body, ticket, now),
            Api::Fetch => return self.fetch(connection, header, body, ticket, now),
            Api::ListOffsets => {
                return Ok(self.list_offsets(connection, header, body, ticket, now)?);
            }
            Api::Metadata => {
                let request = MetadataRequest::read(body, header.version)?;
                let makes = request.auto_create && broker.auto_create;
                self.make_topics(access, &request);
                cluster::metadata(
                    header,
                    &request,
                    &topics.snapshot(),
                    &broker.cluster_id,
                    &endpoint(),
                    access,
                    |name| match admin::check_name(name) {
                        Ok(()) if makes && !admin::may_create(access, name) => {
                            Code::TopicAuthorizationFailed
                        }
                        Ok(()) => Code::UnknownTopicOrPartition,
                        Err(error) => error.code,
                    },
                )
                .into()
            }
            Api::ApiVersions => {
                let (answer, software) = cluster::api_versions(header, body)?;
                if let Some((name, version)) = software {
                    connection.session.set_software(name, version);
                }
                answer.into()
            }
            Api::SaslHandshake => {
                let plain = listener.is_some_and(|l| l.proof.plain);
                let stage = &mut connection.stage;
                match sasl::handshake(header, body, stage, plain)? {
                    (answer, true) => answer.into(),
                    (answer, false) => Done::Last(vec![answer.into()], Close::AuthenticationFailed),
                }
            }
            Api::SaslAuthenticate => {
                let step = Self::token(connection, sasl::token(body)?);
                let answer = vec![sasl::answer(header, &step).into()];
                match step {
                    Step::Continue(_) | Step::Proved { .. } => Done::Answer(answer),
                    // A client of a listener without SASL is told that it is wrong, and may go on.
                    Step::OutOfTurn if connection.stage.is_proved() => Done::Answer(answer),
                    Step::Failed(..) | Step::OutOfTurn => {
                        Done::Last(answer, Close::AuthenticationFailed)
                    }
                }
            }
            Api::FindCoordinator => {
                cluster::find_coordinator(header, body, &endpoint(), access)?.into()
            }
            Api::DescribeCluster => {
                let id = &broker.cluster_id;
                cluster::describe_cluster(header, body, id, &endpoint(), access)?.into()
            }
            Api::CreateTopics => {
                admin::create_topics(header, body, topics, broker.default_partitions, access)?
                    .into()
            }
            Api::DeleteTopics => {
                let before = topics.snapshot();
                let answer = admin::delete_topics(header, body, topics, access)?;
                let after = topics.snapshot();
                for topic in before.all() {
                    if after.find(&topic.name).is_none() {
                        let now = group_time(now);
                        broker
                            .hub
                            .topic_deleted(Some(self.thread), now, &topic.name);
                    }
                }
                answer.into()
            }
            Api::DeleteRecords => admin::delete_records(header, body, topics, access)?.into(),
            Api::CreatePartitions => admin::create_partitions(header, body, topics, access)?.into(),
            Api::DescribeConfigs => {
                admin::describe_configs(header, body, topics, &broker.settings, access)?.into()
            }
            Api::AlterConfigs | Api::IncrementalAlterConfigs => {
                admin::alter_configs(api, header, body, topics, access)?.into()
            }
            Api::InitProducerId => self.init_producer_id(access, header, body)?.into(),
            Api::OffsetCommit
            | Api::OffsetFetch
            | Api::JoinGroup
            | Api::Heartbeat
            | Api::LeaveGroup
            | Api::SyncGroup
            | Api::DescribeGroups
            | Api::ListGroups
            | Api::DeleteGroups
            | Api::OffsetDelete => {
                let request = hub::read(api, header.version, body)?;
                let host = connection.peer.ip().to_canonical().to_string();
                broker.hub.ask(
                    self.thread,
                    connection.id,
                    ticket,
                    api,
                    header,
                    &host,
                    request,
                    access,
                    &topics.snapshot(),
                    group_time(now),
                );
                self.groups(now);
                Done::Later
            }
        })
    }

    /// Makes topics that a client asked about and that it may make by asking.
    fn make_topics(&self, access: &Access, request: &MetadataRequest<'_>) {
        let Some(wanted) = &request.topics else {
            return;
        };
        if !request.auto_create || !self.broker.auto_create {
            return;
        }
        let topics = &self.broker.topics;
        for wanted in wanted {
            if let Wanted::Name(name) = wanted
                && topics.snapshot().find(name).is_none()
                && admin::check_name(name).is_ok()
                && access.may(Operation::Describe, Resource::Topic(name))
                && admin::may_create(access, name)
            {
                // Whatever went wrong, the topic is not there, and the client is told so.
                if let Err(error) = topics.create(name, self.broker.default_partitions, &[], false)
                {
                    tracing::warn!("topic {name:?} was not made on demand: {error}");
                }
            }
        }
    }

    fn init_producer_id(
        &self,
        access: &Access,
        header: &RequestHeader<'_>,
        body: &mut Reader<'_>,
    ) -> Result<Vec<u8>, Malformed> {
        let transactional = body.nullable_string()?;
        body.i32()?;
        if header.version >= 3 {
            // A producer that lost its place gets a new id, as on Kafka.
            body.i64()?;
            body.i16()?;
        }
        body.end()?;
        let given = match transactional {
            Some(_) => Err(Code::InvalidRequest),
            None if !access.may(Operation::IdempotentWrite, Resource::Cluster)
                && !access.may_some_topic(Operation::Write) =>
            {
                Err(Code::ClusterAuthorizationFailed)
            }
            None => self.broker.producer_ids.allocate().map_err(|error| {
                tracing::error!("no producer id: {error}");
                Code::KafkaStorageError
            }),
        };
        let mut out = Api::InitProducerId.answer(header.version, header.correlation);
        out.i32(0);
        out.i16(given.as_ref().err().copied().unwrap_or(Code::None) as i16);
        out.i64(*given.as_ref().unwrap_or(&-1));
        out.i16(if given.is_ok() { 0 } else { -1 });
        out.end();
        Ok(out.finish())
    }

    fn produce(
        &mut self,
        connection: &mut Connection,
        header: &RequestHeader<'_>,
        body: &mut Reader<'_>,
        ticket: Ticket,
        now: Now,
    ) -> Result<Done, Close> {
        let len = body.remaining();
        let request = ProduceRequest::read(body)?;
        let snapshot = self.broker.topics.snapshot();
        let parts = || {
            request
                .topics
                .iter()
                .flat_map(|(name, parts)| parts.iter().map(move |part| (*name, *part)))
        };
        // Nothing is begun unless all of it can be.
        let (mut wanted, mut bytes, mut count) = (vec![0; self.links.len()], 0, 0);
        for (name, part) in parts() {
            if let Some(place) = snapshot.place(name, part.index)
                && let Some(wanted) = wanted.get_mut(usize::from(place.shard))
            {
                *wanted += 1;
            }
            bytes += part.records.len();
            count += 1;
        }
        if count >= MAX_BATCHES || wanted.iter().any(|&n| n > LINK_BATCHES) {
            return Err(Close::Malformed);
        }
        let busy = wanted
            .iter()
            .zip(&self.links)
            .any(|(&n, link)| n > link.link.batches.room());
        let held = self.on_their_way.bytes();
        let heavy = held > 0 && held + bytes as u64 > self.on_their_way_max;
        if heavy {
            self.on_their_way.account().refuse();
        }
        if busy || heavy {
            return Ok(Done::Blocked);
        }

        let throttle_ms = connection
            .rate(Direction::Produce, now)
            .map_or(0, |bucket| bucket.take(len, now.mono_ns));
        connection.mute(throttle_ms, now);
        let access = &connection.access;
        let now_ms = now.unix_ns.div_euclid(1_000_000);
        let mut results = Vec::with_capacity(count);
        let mut batches = Vec::with_capacity(count);
        for (number, (name, part)) in parts().enumerate() {
            let topic = snapshot.find(name);
            let result = match topic.and_then(|topic| Some((topic, topic.place(part.index)?))) {
                _ if !(-1..=1).contains(&request.acks) => {
                    Some(PartResult::failed(Code::InvalidRequiredAcks, None))
                }
                _ if !access.may(Operation::Write, Resource::Topic(name)) => {
                    Some(PartResult::failed(Code::TopicAuthorizationFailed, None))
                }
                _ if request.transactional => {
                    Some(PartResult::refused(&batch::Refused::Transactional))
                }
                None => Some(PartResult::failed(Code::UnknownTopicOrPartition, None)),
                Some((topic, _)) if topic.internal() => Some(PartResult::failed(
                    Code::InvalidTopicException,
                    Some("the topic is the server's own".to_owned()),
                )),
                Some((topic, place)) => {
                    let mut rules = topic.rules;
                    rules.max_bytes = rules
                        .max_bytes
                        .min(self.links[usize::from(place.shard)].link.max_batch);
                    match batch::admit(part.records, header.version, &rules, now_ms) {
                        Ok(batch::Admitted { header, changed }) => {
                            let mut buffer = self.buffer(part.records);
                            if changed {
                                record_batch::write_header(buffer.batch_mut(), &header);
                            }
                            let append_time = header.append_time().unwrap_or(-1);
                            batches.push((number, place, buffer, append_time));
                            self.broker
                                .topics
                                .received(place, header.records_count.max(0) as u64);
                            None
                        }
                        Err(reason) => Some(PartResult::refused(&reason)),
                    }
                }
            };
            results.push(result);
        }
        let refused = results.iter().filter(|result| result.is_some()).count();
        self.broker.counters.produced(batches.len(), refused, bytes);

        let shape = Shape {
            version: header.version,
            correlation: header.correlation,
            throttle_ms: throttle_ms as i32,
            topics: request
                .topics
                .iter()
                .map(|(name, parts)| ((*name).into(), parts.iter().map(|p| p.index).collect()))
                .collect(),
        };
        let id: Option<RequestId>;
        let done = if request.acks == 0 {
            id = None;
            match refused {
                0 => Ok(Done::Silent),
                // The end of the connection is all that the client hears; what was not refused is stored.
                _ => Err(Close::UnacknowledgedFailed),
            }
        } else if batches.is_empty() {
            let results: Vec<PartResult> = results.into_iter().flatten().collect();
            return Ok(produce::answer(&shape, &results).into());
        } else {
            let timeout = request.timeout_ms.clamp(1, produce::MAX_TIMEOUT_MS);
            let deadline_ns = now.mono_ns + timeout as u64 * 1_000_000;
            let producing = Producing {
                connection: connection.id,
                ticket,
                time: connection.rate(Direction::Time, now),
                shape,
            };
            id = Some(self.produces.begin(producing, results, deadline_ns));
            Ok(Done::Later)
        };
        for (number, place, buffer, append_time) in batches {
            let tag = match id {
                Some(id) => id.tag(number),
                None => self.unanswered_tag(),
            };
            self.send(tag, place, buffer, append_time, request.acks as i8, now);
        }
        done
    }

    /// A batch of the request that is being read: where it lies, if that is most of the memory it lies in.
    fn buffer(&self, batch: &[u8]) -> BatchBuffer {
        self.input
            .as_ref()
            .filter(|input| batch.len() >= input.capacity() / 2)
            .and_then(|input| BatchBuffer::part(input, batch))
            .unwrap_or_else(|| BatchBuffer::new(batch))
    }

    /// Hands a batch to its shard, which has room for it.
    fn send(
        &mut self,
        tag: u64,
        place: Place,
        buffer: BatchBuffer,
        append_time: i64,
        acks: i8,
        now: Now,
    ) {
        let bytes = buffer.held();
        let batches = &mut self.links[usize::from(place.shard)].link.batches;
        let sent = batches.send(buffer, tag, place.local, now.unix_ns, acks);
        if sent.is_err() {
            debug_assert!(false, "there was room for every batch of the request");
            let refused = BatchAnswer {
                tag,
                partition: place.local,
                base_offset: -1,
                error: ErrorCode::Busy,
                credit: 0,
            };
            self.answers.push(refused);
        }
        self.on_their_way
            .set(self.on_their_way.bytes() + bytes as u64);
        self.sent.insert(
            tag,
            Sent {
                bytes,
                append_time,
                place,
            },
        );
    }

    fn fetch(
        &mut self,
        connection: &mut Connection,
        header: &RequestHeader<'_>,
        body: &mut Reader<'_>,
        ticket: Ticket,
        now: Now,
    ) -> Result<Done, Close> {
        let request = FetchRequest::read(body, header.version, header.correlation)?;
        if request.session != 0 {
            let answer = fetch::answer(&request, Code::FetchSessionIdNotFound, 0, Vec::new());
            return Ok(Done::Answer(answer));
        }
        if self.is_full() {
            self.unsent.account().refuse();
            return Ok(Done::Blocked);
        }
        let wait = request.max_wait_ms.clamp(0, fetch::MAX_WAIT_MS);
        let fetching = Fetching {
            connection: connection.id,
            ticket,
            access: connection.access.clone(),
            rate: connection.rate(Direction::Fetch, now),
            time: connection.rate(Direction::Time, now),
            deadline_ns: now.mono_ns + wait as u64 * 1_000_000,
            request,
        };
        Ok(match self.try_fetch(fetching, now) {
            Some((_, answer, throttle_ms)) => {
                connection.mute(throttle_ms, now);
                Done::Answer(answer)
            }
            None => Done::Later,
        })
    }

    /// Bytes that are free for answers to fetches.
    fn room(&self) -> u64 {
        let fetches = self.unsent_max - self.unsent_max / OTHERS_PART;
        fetches.saturating_sub(self.unsent.bytes())
    }

    /// Whether fetches wait, since a batch of the largest size would be too much for the memory that answers may take.
    pub fn is_full(&self) -> bool {
        let largest = self.links.iter().map(|link| link.link.max_batch).max();
        self.room() < largest.unwrap_or(0) as u64
    }

    /// Reads what a fetch wants; `None`: it waits for more. Gives also for how long its client is throttled, in
    /// milliseconds.
    fn try_fetch(&mut self, fetching: Fetching, now: Now) -> Option<(Fetching, Answer, u64)> {
        if self.is_full() {
            self.unsent.account().refuse();
            let connection = fetching.connection;
            let again = now.mono_ns + FULL_PATIENCE_NS;
            let id = self.fetches.add(fetching, &[], u64::MAX, again);
            self.fetch_of.insert(connection, id);
            return None;
        }
        let request = &fetching.request;
        let snapshot = self.broker.topics.snapshot();
        let topics = &self.broker.topics;
        let mut places = Vec::new();
        let mut parts = Vec::new();
        let mut watched: Vec<(waiting::At, Progress)> = Vec::new();
        let mut codes = Vec::new();
        for (name, wanted) in request.wanted() {
            let allowed = fetching.access.may(Operation::Read, Resource::Topic(name));
            let place = snapshot
                .place(name, wanted.index)
                .filter(|place| allowed && usize::from(place.shard) < self.links.len());
            // Before the log is read, so that whatever comes after counts as new.
            let progress = place.and_then(|p| topics.progress(p.shard, p.local));
            let start = place.map_or(0, |place| topics.log_start(place));
            let code = match (place, progress) {
                _ if !allowed => Code::TopicAuthorizationFailed,
                (Some(_), Some(_)) if fetch::check_epoch(wanted.epoch) != Code::None => {
                    fetch::check_epoch(wanted.epoch)
                }
                (Some(_), Some(_)) if wanted.offset < start => Code::OffsetOutOfRange,
                (Some(place), Some(progress)) => {
                    watched.push(((place.shard, place.local), progress));
                    Code::None
                }
                _ => Code::UnknownTopicOrPartition,
            };
            codes.push((code, start));
            places.push(place);
            parts.push(Part {
                place: place.filter(|_| code == Code::None),
                offset: wanted.offset,
                max_bytes: usize::try_from(wanted.max_bytes).unwrap_or(0),
            });
        }
        self.turn = self.turn.wrapping_add(1);
        let first = self.turn % parts.len().max(1);
        let fair = self.room().div_ceil(FAIR_PART) as usize;
        let max_bytes = usize::try_from(request.max_bytes).unwrap_or(0).min(fair);
        let links = &mut self.links;
        let (reads, bytes) = fetch::read(&parts, first, max_bytes, |place, from, max, out| {
            let reader = &mut links[usize::from(place.shard)].link.reader;
            reader.read_pieces(place.key, from, max, out)
        });
        let mut failed = false;
        let results: Vec<Fetched> = reads
            .into_iter()
            .zip(codes)
            .map(|(read, (code, start))| {
                let result = match (code, read.outcome) {
                    (Code::None, Some(Ok(outcome))) => Fetched {
                        code,
                        high_watermark: outcome.end,
                        log_start: start,
                        records: read.records,
                    },
                    (Code::None, Some(Err(ReadError::OutOfRange { .. }))) => {
                        Fetched::failed(Code::OffsetOutOfRange)
                    }
                    (Code::None, Some(Err(error))) => {
                        tracing::error!("a fetch could not be read: {error}");
                        Fetched::failed(Code::KafkaStorageError)
                    }
                    (Code::None, None) => Fetched::failed(Code::UnknownTopicOrPartition),
                    (code, _) => Fetched::failed(code),
                };
                failed |= result.code != Code::None;
                result
            })
            .collect();
        let lacks = u64::try_from(request.min_bytes)
            .unwrap_or(0)
            .saturating_sub(bytes as u64);
        if lacks == 0 || failed || results.is_empty() || fetching.deadline_ns <= now.mono_ns {
            self.broker.counters.fetched(bytes);
            let rate = fetching.rate.as_ref();
            let throttle_ms = rate.map_or(0, |bucket| bucket.take(bytes, now.mono_ns));
            let throttled = throttle_ms as i32;
            let answer = fetch::answer(&fetching.request, Code::None, throttled, results);
            return Some((fetching, answer, throttle_ms));
        }
        let (connection, deadline_ns) = (fetching.connection, fetching.deadline_ns);
        let id = self.fetches.add(fetching, &watched, lacks, deadline_ns);
        self.fetch_of.insert(connection, id);
        None
    }

    /// Answers where offsets are, at once or when what was stored before is durable: with acks=1 a producer may
    /// have its answer before its messages can be read, and whoever asks then must not be told that there are none.
    fn list_offsets(
        &mut self,
        connection: &mut Connection,
        header: &RequestHeader<'_>,
        body: &mut Reader<'_>,
        ticket: Ticket,
        now: Now,
    ) -> Result<Done, Malformed> {
        let asked = list_offsets::read(body, header.version)?;
        let snapshot = self.broker.topics.snapshot();
        let mut awaited = Vec::new();
        for (name, list) in &asked {
            for part in list.iter().filter(|asked| asked.needs_end()) {
                if let Some(place) = snapshot.place(name, part.index) {
                    awaited.push((place, self.broker.topics.log_end(place)));
                }
            }
        }
        let listing = Listing {
            connection: connection.id,
            ticket,
            time: connection.rate(Direction::Time, now),
            header: RequestHeader {
                client_id: None,
                ..*header
            },
            asked: asked
                .into_iter()
                .map(|(name, list)| (name.into(), list))
                .collect(),
            awaited,
            access: connection.access.clone(),
            deadline_ns: now.mono_ns + OFFSETS_PATIENCE_NS,
        };
        if self.is_settled(&listing) {
            return Ok(self.list(&listing, now).into());
        }
        self.listings.push(listing);
        Ok(Done::Later)
    }

    /// Whether what a request for offsets waits for is durable, or gone.
    fn is_settled(&self, listing: &Listing) -> bool {
        let topics = &self.broker.topics;
        listing.awaited.iter().all(|&(place, end)| {
            topics
                .progress(place.shard, place.local)
                .is_none_or(|progress| progress.high_watermark >= end)
        })
    }

    fn list(&mut self, listing: &Listing, now: Now) -> Vec<u8> {
        let snapshot = self.broker.topics.snapshot();
        let now_ms = now.unix_ns.div_euclid(1_000_000);
        let (topics, links) = (&self.broker.topics, &mut self.links);
        list_offsets::answer(&listing.header, &listing.asked, |name, asked| {
            if !listing
                .access
                .may(Operation::Describe, Resource::Topic(name))
            {
                return Err(Code::TopicAuthorizationFailed);
            }
            let place = snapshot
                .place(name, asked.index)
                .ok_or(Code::UnknownTopicOrPartition)?;
            match fetch::check_epoch(asked.epoch) {
                Code::None => {}
                code => return Err(code),
            }
            let link = links
                .get_mut(usize::from(place.shard))
                .ok_or(Code::UnknownTopicOrPartition)?;
            let start = topics.log_start(place);
            list_offsets::find(&mut link.link.reader, place.key, asked.time, start, now_ms).map_err(
                |error| {
                    tracing::error!("offsets of {name} could not be read: {error}");
                    Code::KafkaStorageError
                },
            )
        })
    }

    /// Answers the requests for offsets that have waited enough. Gives how many.
    fn settle_listings(&mut self, now: Now) -> usize {
        let (mut at, mut work) = (0, 0);
        while let Some(listing) = self.listings.get(at) {
            if listing.deadline_ns > now.mono_ns && !self.is_settled(listing) {
                at += 1;
                continue;
            }
            let listing = self.listings.swap_remove(at);
            let answer = timed(listing.time.as_ref(), now, || self.list(&listing, now));
            self.complete(Completed {
                connection: listing.connection,
                ticket: listing.ticket,
                api: Api::ListOffsets,
                version: listing.header.version,
                answer: vec![answer.into()],
                throttle_ms: 0,
            });
            work += 1;
        }
        work
    }

    /// Takes in what shards answered and made durable, and what waited long enough. Gives the work done.
    pub fn poll(&mut self, now: Now) -> usize {
        let mut work = 0;
        for shard in 0..self.links.len() {
            let mut answers = std::mem::take(&mut self.answers);
            let batches = &mut self.links[shard].link.batches;
            batches.answers(|answer| answers.push(answer));
            work += answers.len();
            for answer in answers.drain(..) {
                self.acked(&answer, now);
            }
            self.answers = answers;
            let link = &mut self.links[shard];
            let raised = link.link.stats.raised.load(Acquire);
            if raised != link.raised {
                link.raised = raised;
                if self.fetches.watches(shard) {
                    let topics = &self.broker.topics;
                    self.fetches
                        .look(shard, |local| topics.progress(shard as u16, local));
                }
            }
        }
        work += self.groups(now);
        work += self.settle_listings(now);
        while let Some((producing, results)) = self.produces.expired(now.mono_ns) {
            work += 1;
            let late = || PartResult::failed(Code::RequestTimedOut, None);
            self.produced(
                producing,
                results.into_iter().map(|r| r.unwrap_or_else(late)),
                now,
            );
        }
        while let Some(fetching) = self.fetches.next_ready(now.mono_ns) {
            work += 1;
            self.fetch_of.remove(&fetching.connection);
            let time = fetching.time.clone();
            let tried = timed(time.as_ref(), now, || self.try_fetch(fetching, now));
            if let Some((fetching, answer, throttle_ms)) = tried {
                self.complete(Completed {
                    connection: fetching.connection,
                    ticket: fetching.ticket,
                    api: Api::Fetch,
                    version: fetching.request.version,
                    answer,
                    throttle_ms,
                });
            }
        }
        work
    }

    /// Moves the coordinator on, as far as it is this thread's, and takes its answers.
    fn groups(&mut self, now: Now) -> usize {
        if self.thread == 0 {
            self.appends
                .extend(self.broker.hub.advance(group_time(now)));
            self.append(now);
        }
        let mail = self.broker.hub.mail(self.thread);
        let work = mail.len();
        for mail in mail {
            self.complete(Completed {
                connection: mail.connection,
                ticket: mail.ticket,
                api: mail.api,
                version: mail.version,
                answer: vec![mail.answer.into()],
                throttle_ms: 0,
            });
        }
        work
    }

    /// Sends the coordinator's records to their shard, as far as there is room.
    fn append(&mut self, now: Now) {
        let snapshot = self.broker.topics.snapshot();
        while let Some(append) = self.appends.front() {
            let now_ms = now.unix_ns.div_euclid(1_000_000);
            let made = hub::batch(append, &snapshot, now_ms)
                .filter(|(place, _)| usize::from(place.shard) < self.links.len());
            let Some((place, batch)) = made else {
                let id = append.id;
                self.appends.pop_front();
                let failed = Err(AppendError::Unavailable);
                self.broker.hub.appended(group_time(now), id, failed);
                continue;
            };
            let link = &self.links[usize::from(place.shard)].link;
            if link.batches.room() == 0 {
                return;
            }
            let id = append.id;
            let too_large = batch.len() > link.max_batch;
            self.appends.pop_front();
            if too_large {
                let failed = Err(AppendError::TooLarge);
                self.broker.hub.appended(group_time(now), id, failed);
                continue;
            }
            let tag = self.unanswered_tag();
            self.appending.insert(tag, id);
            self.broker.topics.received(
                place,
                record_batch::parse_header(&batch).map_or(0, |h| h.records_count.max(0) as u64),
            );
            self.send(tag, place, BatchBuffer::new(&batch), -1, -1, now);
        }
    }

    fn unanswered_tag(&mut self) -> u64 {
        self.next_unanswered = (self.next_unanswered + 1) & ((1 << 40) - 1);
        UNANSWERED | self.next_unanswered
    }

    fn acked(&mut self, answer: &BatchAnswer, now: Now) {
        let Some(sent) = self.sent.remove(&answer.tag) else {
            return;
        };
        self.on_their_way
            .set(self.on_their_way.bytes() - sent.bytes as u64);
        if let Some(id) = self.appending.remove(&answer.tag) {
            let result = match answer.error {
                ErrorCode::None => Ok(()),
                ErrorCode::TooLarge => Err(AppendError::TooLarge),
                _ => Err(AppendError::Unavailable),
            };
            self.broker.hub.appended(group_time(now), id, result);
            return;
        }
        let start = self.broker.topics.log_start(sent.place);
        let (error, offset) = (answer.error, answer.base_offset);
        let result = PartResult::of_shard(error, offset, sent.append_time, start);
        if let Some((producing, results)) = self.produces.settle(answer.tag, result) {
            self.produced(producing, results.into_iter().flatten(), now);
        }
    }

    /// Whether there is something for [`Worker::poll`], for a look before sleeping.
    pub fn has_news(&mut self) -> bool {
        let raised = |link: &Link| link.link.stats.raised.load(Acquire) != link.raised;
        let watched = !self.fetches.is_empty() || !self.listings.is_empty();
        self.broker.hub.has_mail(self.thread)
            || self
                .links
                .iter_mut()
                .any(|link| link.link.batches.has_answers() || watched && raised(link))
    }

    fn produced(
        &mut self,
        producing: Producing,
        results: impl Iterator<Item = PartResult>,
        now: Now,
    ) {
        let answer = timed(producing.time.as_ref(), now, || {
            let results: Vec<PartResult> = results.collect();
            produce::answer(&producing.shape, &results)
        });
        self.complete(Completed {
            connection: producing.connection,
            ticket: producing.ticket,
            api: Api::Produce,
            version: producing.shape.version,
            answer: vec![answer.into()],
            throttle_ms: 0,
        });
    }

    fn complete(&mut self, completed: Completed) {
        self.unsent
            .set(self.unsent.bytes() + size(&completed.answer) as u64);
        self.completed.push(completed);
    }

    /// Answers a request of a connection that is there; its connection waits for the time that was taken.
    pub fn finish(&self, connection: &mut Connection, mut done: Completed, now: Now) {
        let time = connection.rate(Direction::Time, now);
        let owed_ms = time.map_or(0, |time| time.take(0, now.mono_ns));
        if owed_ms > done.throttle_ms {
            throttle::put(&mut done.answer, done.api, done.version, owed_ms);
        }
        connection.mute(owed_ms.max(done.throttle_ms), now);
        let bytes = size(&done.answer);
        connection
            .session
            .answer(done.ticket, Some(done.answer), bytes);
    }

    /// What was completed since the last call.
    pub fn completed(&mut self) -> Vec<Completed> {
        std::mem::take(&mut self.completed)
    }

    /// So many bytes of a connection's answers were sent.
    pub fn sent(&mut self, connection: &mut Connection, bytes: usize) {
        connection.session.sent(bytes);
        self.lost(bytes);
    }

    /// So many bytes of answers will never be sent, as their connection is gone.
    pub fn lost(&mut self, bytes: usize) {
        let left = self.unsent.bytes().saturating_sub(bytes as u64);
        self.unsent.set(left);
    }

    /// A connection is gone.
    pub fn closed(&mut self, connection: ConnectionId) {
        if let Some(id) = self.fetch_of.remove(&connection) {
            self.fetches.forget(id);
        }
        self.listings
            .retain(|listing| listing.connection != connection);
    }

    /// The next moment, in monotonic nanoseconds, at which [`Worker::poll`] has something to do by itself.
    pub fn next_deadline(&self) -> Option<u64> {
        let groups = match self.thread {
            0 => self.broker.hub.next_deadline().map(|ms| ms * 1_000_000),
            _ => None,
        };
        [
            self.produces.next_deadline(),
            self.fetches.next_deadline(),
            self.listings.iter().map(|l| l.deadline_ns).min(),
            groups,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Batches that shards hold memory of.
    pub fn on_their_way(&self) -> usize {
        self.sent.len()
    }
}

/// The time as the coordinator takes it.
pub fn group_time(now: Now) -> groups::Now {
    groups::Now {
        mono_ms: now.mono_ns / 1_000_000,
        unix_ms: now.unix_ns.div_euclid(1_000_000),
    }
}

fn size(answer: &Answer) -> usize {
    answer.iter().map(|piece| piece.len()).sum()
}
