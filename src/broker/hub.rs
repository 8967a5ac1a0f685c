//! The group coordinator as the threads of the broker share it.
//!
//! One coordinator, behind a lock: group requests are few. Any thread hands requests in and takes answers out, its
//! own and those of others' connections, which it leaves in their mailbox. Threads without connections, the
//! operator's, ask by [`Hub::call`]. Invariant: only thread 0 takes appends, so that those of a group reach its
//! shard in the order in which they came out.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::broker::groups::access::{self, Refused};
use crate::broker::groups::records::{OFFSETS_TOPIC, partition_of};
use crate::broker::groups::{
    Append, AppendError, AppendId, Context, Coordinator, Now, Request, Response, Stats, Token,
};
use crate::broker::security::acl::Access;
use crate::broker::session::Ticket;
use crate::broker::topics::{Place, Snapshot};
use crate::broker::worker::ConnectionId;
use crate::memory::wake::Wake;
use crate::storage::lsm::codec;
use crate::storage::{LogReader, ReadError};
use crate::wire::kafka::groups::*;
use crate::wire::kafka::{Api, Malformed, Reader, RequestHeader};
use crate::wire::record_batch::{BatchWriter, HEADER_LEN, RAW_RECORD_OVERHEAD_MAX, Records};

/// Bytes read of the offsets topic at a time when it is loaded.
const LOAD: usize = 1 << 20;
/// How long [`Hub::call`] waits: a commit takes milliseconds.
const CALL_PATIENCE: Duration = Duration::from_secs(20);
/// The number of no thread.
const NOBODY: usize = usize::MAX;

/// A request on its way through the coordinator.
struct Asked {
    thread: usize,
    connection: ConnectionId,
    ticket: Ticket,
    api: Api,
    version: i16,
    correlation: i32,
    /// What the coordinator was not asked.
    refused: Refused,
}

/// An answer for a connection of some thread.
pub struct Mail {
    /// Whose.
    pub connection: ConnectionId,
    /// To which request.
    pub ticket: Ticket,
    /// What was asked.
    pub api: Api,
    /// In which version.
    pub version: i16,
    /// Encoded.
    pub answer: Vec<u8>,
}

/// Why a call has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The threads that move the coordinator on have ended, or are about to.
    #[error("the server is stopping")]
    Stopping,
    /// What the answer waits for did not become durable in time.
    #[error("no answer within {} s: see the shards' states in `taffrail stats`", CALL_PATIENCE.as_secs())]
    TimedOut,
}

struct Inner {
    coordinator: Coordinator,
    asked: HashMap<Token, Asked>,
    calls: HashMap<Token, SyncSender<Response>>,
    closed: bool,
    next_token: Token,
    mail: Vec<VecDeque<Mail>>,
}

/// The coordinator, for all threads.
pub struct Hub {
    inner: Mutex<Inner>,
    wakes: Vec<Arc<Wake>>,
}

/// Reads a group request of an API that is one.
pub fn read<'a>(api: Api, version: i16, body: &Reader<'a>) -> Result<Request<'a>, Malformed> {
    let malformed = Malformed {
        at: body.position(),
    };
    let reader = &mut body.clone();
    let request = match api {
        Api::JoinGroup => JoinGroupRequest::decode(reader, version).map(Request::JoinGroup),
        Api::SyncGroup => SyncGroupRequest::decode(reader, version).map(Request::SyncGroup),
        Api::Heartbeat => HeartbeatRequest::decode(reader, version).map(Request::Heartbeat),
        Api::LeaveGroup => LeaveGroupRequest::decode(reader, version).map(Request::LeaveGroup),
        Api::OffsetCommit => {
            OffsetCommitRequest::decode(reader, version).map(Request::OffsetCommit)
        }
        Api::OffsetFetch => OffsetFetchRequest::decode(reader, version).map(Request::OffsetFetch),
        Api::OffsetDelete => {
            OffsetDeleteRequest::decode(reader, version).map(Request::OffsetDelete)
        }
        Api::DescribeGroups => {
            DescribeGroupsRequest::decode(reader, version).map(Request::DescribeGroups)
        }
        Api::ListGroups => ListGroupsRequest::decode(reader, version).map(Request::ListGroups),
        Api::DeleteGroups => {
            DeleteGroupsRequest::decode(reader, version).map(Request::DeleteGroups)
        }
        _ => return Err(malformed),
    };
    request.map_err(|_| malformed)
}

impl Hub {
    /// Of a coordinator that has loaded; `wakes` end the threads' sleep, by their number.
    pub fn new(coordinator: Coordinator, wakes: Vec<Arc<Wake>>) -> Self {
        Self {
            inner: Mutex::new(Inner {
                coordinator,
                asked: HashMap::new(),
                calls: HashMap::new(),
                closed: false,
                next_token: 0,
                mail: wakes.iter().map(|_| VecDeque::new()).collect(),
            }),
            wakes,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands in a request of a connection of `thread`; its answer comes as mail.
    #[allow(clippy::too_many_arguments)] // who asks, what, and in which way it is to be answered
    pub fn ask(
        &self,
        thread: usize,
        connection: ConnectionId,
        ticket: Ticket,
        api: Api,
        header: &RequestHeader<'_>,
        host: &str,
        mut request: Request<'_>,
        access: &Access,
        snapshot: &Snapshot,
        now: Now,
    ) {
        let refused = match access::check(&mut request, access, snapshot) {
            Ok(refused) => refused,
            Err(response) => {
                let answer = encode(api, header.version, header.correlation, &response);
                let mail = Mail {
                    connection,
                    ticket,
                    api,
                    version: header.version,
                    answer,
                };
                if let Some(mailbox) = self.lock().mail.get_mut(thread) {
                    mailbox.push_back(mail);
                }
                return;
            }
        };
        let context = Context {
            client_id: header.client_id.unwrap_or_default(),
            client_host: host,
            version: header.version,
        };
        let mut inner = self.lock();
        inner.next_token += 1;
        let token = inner.next_token;
        inner.asked.insert(
            token,
            Asked {
                thread,
                connection,
                ticket,
                api,
                version: header.version,
                correlation: header.correlation,
                refused,
            },
        );
        inner.coordinator.handle(now, token, &context, request);
        self.deliver(inner, thread);
    }

    /// Hands in a request that no client sent, of an API's newest version, and waits for its answer: who may ask is
    /// the caller's to know. Blocks for a commit where the request needs one; not for the broker's threads.
    pub fn call(&self, request: Request<'_>, now: Now) -> Result<Response, CallError> {
        let context = Context {
            client_id: "",
            client_host: "",
            // Above every version with a difference that the coordinator makes.
            version: i16::MAX,
        };
        let (sender, answer) = sync_channel(1);
        let mut inner = self.lock();
        if inner.closed {
            return Err(CallError::Stopping);
        }
        inner.next_token += 1;
        let token = inner.next_token;
        inner.calls.insert(token, sender);
        inner.coordinator.handle(now, token, &context, request);
        self.deliver(inner, NOBODY);
        answer.recv_timeout(CALL_PATIENCE).map_err(|error| {
            self.lock().calls.remove(&token);
            match error {
                RecvTimeoutError::Timeout => CallError::TimedOut,
                RecvTimeoutError::Disconnected => CallError::Stopping,
            }
        })
    }

    /// Ends all calls: the threads have ended.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        inner.calls.clear();
    }

    /// Leaves answers in the mailboxes, and wakes whoever else has something to do.
    fn deliver(&self, mut inner: MutexGuard<'_, Inner>, thread: usize) {
        let mut others = Vec::new();
        while let Some((token, mut response)) = inner.coordinator.take_answer() {
            let Some(asked) = inner.asked.remove(&token) else {
                if let Some(call) = inner.calls.remove(&token) {
                    // Who has waited long enough is gone.
                    let _ = call.send(response);
                }
                continue;
            };
            asked.refused.complete(&mut response);
            let mail = Mail {
                connection: asked.connection,
                ticket: asked.ticket,
                api: asked.api,
                version: asked.version,
                answer: encode(asked.api, asked.version, asked.correlation, &response),
            };
            if asked.thread != thread && !others.contains(&asked.thread) {
                others.push(asked.thread);
            }
            if let Some(mailbox) = inner.mail.get_mut(asked.thread) {
                mailbox.push_back(mail);
            }
        }
        drop(inner);
        if thread != 0 && !others.contains(&0) {
            // Appends and deadlines are thread 0's.
            others.push(0);
        }
        for other in others {
            if let Some(wake) = self.wakes.get(other) {
                wake.wake();
            }
        }
    }

    /// Takes the mail of a thread.
    pub fn mail(&self, thread: usize) -> VecDeque<Mail> {
        let mut inner = self.lock();
        inner
            .mail
            .get_mut(thread)
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// Whether a thread has mail, or, thread 0, something is due.
    pub fn has_mail(&self, thread: usize) -> bool {
        self.lock().mail.get(thread).is_some_and(|m| !m.is_empty())
    }

    /// Thread 0: does what is due and takes what is to be written.
    pub fn advance(&self, now: Now) -> Vec<Append> {
        let mut inner = self.lock();
        inner.coordinator.advance(now);
        let mut appends = Vec::new();
        while let Some(append) = inner.coordinator.take_append() {
            appends.push(append);
        }
        self.deliver(inner, 0);
        appends
    }

    /// Thread 0: an append has ended.
    pub fn appended(&self, now: Now, id: AppendId, result: Result<(), AppendError>) {
        let mut inner = self.lock();
        inner.coordinator.appended(now, id, result);
        self.deliver(inner, 0);
    }

    /// When [`Hub::advance`] is to be called next, in milliseconds of the coordinator's clock.
    pub fn next_deadline(&self) -> Option<u64> {
        self.lock().coordinator.next_deadline()
    }

    /// A topic was deleted; `thread` is the caller's number, `None` where it serves no connections.
    pub fn topic_deleted(&self, thread: Option<usize>, now: Now, topic: &str) {
        let mut inner = self.lock();
        inner.coordinator.topic_deleted(now, topic);
        self.deliver(inner, thread.unwrap_or(NOBODY));
    }

    /// Figures for operators.
    pub fn stats(&self) -> Stats {
        self.lock().coordinator.stats()
    }
}

fn encode(api: Api, version: i16, correlation: i32, response: &Response) -> Vec<u8> {
    let mut out = api.answer(version, correlation);
    response.encode(&mut out, version);
    out.finish()
}

/// Where an append goes, and as what batch; `None`: the topic is not there.
pub fn batch(append: &Append, snapshot: &Snapshot, now_ms: i64) -> Option<(Place, Vec<u8>)> {
    let topic = snapshot.find(OFFSETS_TOPIC)?;
    let partition = partition_of(&append.group, topic.places.len() as u32);
    let place = topic.place(partition as i32)?;
    let room = |bytes: usize| bytes + RAW_RECORD_OVERHEAD_MAX + 8;
    let len: usize = append.records.iter().map(|r| room(r.size())).sum();
    let mut bytes = vec![0; HEADER_LEN + len];
    let mut writer = BatchWriter::new(&mut bytes, now_ms);
    for record in &append.records {
        writer
            .push(now_ms, Some(&record.key), record.value.as_deref())
            .ok()?;
    }
    let len = writer.finish(0);
    bytes.truncate(len);
    Some((place, bytes))
}

/// Replays a partition of the offsets topic; gives the number of records.
pub fn load(
    coordinator: &mut Coordinator,
    reader: &mut LogReader,
    place: Place,
) -> Result<u64, ReadError> {
    let (mut offset, mut records) = (reader.bounds(place.key)?.0, 0);
    let (mut bytes, mut scratch) = (Vec::new(), Vec::new());
    loop {
        bytes.clear();
        let outcome = reader.read(place.key, offset, LOAD, &mut bytes)?;
        let mut rest = &bytes[..];
        while let Ok(header) = crate::wire::record_batch::parse_header(rest) {
            let Some((batch, behind)) = rest.split_at_checked(header.total_len()) else {
                break;
            };
            rest = behind;
            if header.is_control() {
                continue;
            }
            let Ok(plain) = codec::plain(batch, &mut scratch) else {
                tracing::error!("a batch of committed offsets at {offset} cannot be read");
                continue;
            };
            for record in Records::new(plain).into_iter().flatten().flatten() {
                let Some(key) = record.key else { continue };
                if let Err(error) = coordinator.replay(key, record.value) {
                    tracing::warn!(
                        "a record of committed offsets at {} is not understood: {error}",
                        record.offset
                    );
                }
                records += 1;
            }
        }
        if outcome.next_offset >= outcome.end || outcome.next_offset == offset {
            return Ok(records);
        }
        offset = outcome.next_offset;
    }
}
