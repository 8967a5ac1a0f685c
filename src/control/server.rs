//! The answering side of the control socket: ordinary threads, one a connection.
//!
//! Invariant: a client can cost a thread, a request line and one read buffer, nothing more; beyond
//! [`MAX_CONNECTIONS`] new ones are turned away. No lcore ever waits for any of it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;

use crate::storage::backup::Note;

use super::keys::{Keys, KeysAnswer};
use super::protocol::{
    Answer, CommittedOffsets, GroupInfo, GroupSummary, MAX_READ, MAX_REQUEST, MAX_WAIT_MS,
    Position, ReadAnswer, Request, Stats, TopicChange, TopicInfo,
};

/// Connections served at the same time: operators and scrapers, not clients.
pub const MAX_CONNECTIONS: usize = 64;
/// How often waiting threads look whether the server stops.
const TICK: Duration = Duration::from_millis(50);
/// A client that does not take its answer for this long is cut off.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// A read: topic, partition, position, most bytes, and where the batches go.
pub type ReadFn =
    dyn Fn(&str, u32, Position, u32, &mut Vec<u8>) -> Result<ReadAnswer, String> + Send + Sync;

/// Where a position of a topic's partition is.
pub type FindFn = dyn Fn(&str, u32, Position) -> Result<ReadAnswer, String> + Send + Sync;

/// Waits for messages of a topic, from one offset a partition on, for a time at most.
pub type WaitFn = dyn Fn(&str, &[i64], Duration) -> Result<Vec<i64>, String> + Send + Sync;

/// A read by key: topic, partition, keys, most bytes, and where the records go.
pub type KeysFn =
    dyn Fn(&str, u32, &Keys, u32, &mut Vec<u8>) -> Result<KeysAnswer, String> + Send + Sync;

/// A change of the topics.
pub type ChangeFn = dyn Fn(TopicChange) -> Result<(), String> + Send + Sync;

/// Copies the store to a folder.
pub type BackupFn = dyn Fn(&Path) -> Result<Note, String> + Send + Sync;

/// What the server can answer.
pub struct Answers {
    /// Takes a snapshot of the counters.
    pub stats: Box<dyn Fn() -> Stats + Send + Sync>,
    /// Lists the topics.
    pub topics: Box<dyn Fn() -> Vec<TopicInfo> + Send + Sync>,
    /// Reads record batches.
    pub read: Box<ReadFn>,
    /// Finds a position.
    pub find: Box<FindFn>,
    /// Waits for messages.
    pub wait: Box<WaitFn>,
    /// Reads records by key.
    pub keys: Box<KeysFn>,
    /// Changes topics.
    pub change: Box<ChangeFn>,
    /// Copies the store.
    pub backup: Box<BackupFn>,
    /// The consumer groups.
    pub groups: Box<dyn Groups>,
}

/// What the server can answer about consumer groups; errors are for people.
pub trait Groups: Send + Sync {
    /// Lists them.
    fn list(&self) -> Result<Vec<GroupSummary>, String>;
    /// Describes one.
    fn describe(&self, group: &str) -> Result<GroupInfo, String>;
    /// Sets committed offsets of one without members; durable on return.
    fn commit(&self, group: &str, offsets: &CommittedOffsets) -> Result<(), String>;
    /// Deletes one without members; durable on return.
    fn delete(&self, group: &str) -> Result<(), String>;
}

/// A listening control socket. Dropping it stops its threads and removes the socket.
pub struct ControlServer {
    path: PathBuf,
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
}

struct Shared {
    answers: Answers,
    stop: AtomicBool,
    connections: AtomicUsize,
}

impl ControlServer {
    /// Listens at `path`, making its folder. A socket that a killed server left behind is replaced;
    /// one that a living server answers on is an error of kind `AddrInUse`.
    pub fn start(path: &Path, answers: Answers) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        if path.exists() {
            if UnixStream::connect(path).is_ok() {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    format!(
                        "another server answers at {}: give each its own [control] socket",
                        path.display()
                    ),
                ));
            }
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            answers,
            stop: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
        });
        let accept = std::thread::Builder::new().name("control".into()).spawn({
            let shared = Arc::clone(&shared);
            move || accept_loop(&listener, &shared)
        })?;
        Ok(Self {
            path: path.to_owned(),
            shared,
            accept: Some(accept),
        })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(accept) = self.accept.take() {
            // A panicked accept thread has nothing left to stop.
            let _ = accept.join();
        }
        // The socket may be gone already; there is nothing to do about it then.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn accept_loop(listener: &UnixListener, shared: &Arc<Shared>) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    while !shared.stop.load(Ordering::Relaxed) {
        threads.retain(|thread| !thread.is_finished());
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait_for_client(listener);
                continue;
            }
            // No descriptors left, say: it would fail again at once.
            Err(_) => {
                std::thread::sleep(TICK);
                continue;
            }
        };
        if shared.connections.load(Ordering::Relaxed) >= MAX_CONNECTIONS {
            let refusal =
                Answer::<()>::Error(format!("{MAX_CONNECTIONS} clients are connected already"));
            let _ = send(&stream, &refusal, &[]);
            continue;
        }
        shared.connections.fetch_add(1, Ordering::Relaxed);
        let thread = std::thread::Builder::new()
            .name("control-client".into())
            .spawn({
                let shared = Arc::clone(shared);
                move || {
                    // A broken connection concerns its client alone.
                    let _ = serve(&stream, &shared);
                    shared.connections.fetch_sub(1, Ordering::Relaxed);
                }
            });
        match thread {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                shared.connections.fetch_sub(1, Ordering::Relaxed);
                tracing::warn!("no thread for a control client: {error}");
            }
        }
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// Returns when somebody connects, or after a tick.
fn wait_for_client(listener: &UnixListener) {
    let mut descriptor = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one descriptor, of a listener that outlives the call.
    unsafe { libc::poll(&mut descriptor, 1, TICK.as_millis() as i32) };
}

/// Answers one client until it leaves or the server stops.
fn serve(stream: &UnixStream, shared: &Shared) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    let mut input = BufReader::new(stream);
    let mut line = Vec::new();
    let mut batches = Vec::new();
    loop {
        let room = (MAX_REQUEST + 1 - line.len()) as u64;
        match (&mut input).take(room).read_until(b'\n', &mut line) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                if shared.stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                continue;
            }
            Err(error) => return Err(error),
        }
        if line.last() != Some(&b'\n') {
            if line.len() <= MAX_REQUEST {
                continue;
            }
            return send(
                stream,
                &Answer::<()>::Error(format!("a request has at most {MAX_REQUEST} bytes")),
                &[],
            );
        }
        match serde_json::from_slice(&line) {
            Err(error) => send(
                stream,
                &Answer::<()>::Error(format!("request not understood: {error}")),
                &[],
            )?,
            Ok(Request::Stats) => send(stream, &Answer::Ok((shared.answers.stats)()), &[])?,
            Ok(Request::Topics) => send(stream, &Answer::Ok((shared.answers.topics)()), &[])?,
            Ok(Request::Change(change)) => reply(stream, (shared.answers.change)(change))?,
            Ok(Request::Backup { to }) => reply(stream, (shared.answers.backup)(&to))?,
            Ok(Request::Find {
                topic,
                partition,
                from,
            }) => reply(stream, (shared.answers.find)(&topic, partition, from))?,
            Ok(Request::Wait {
                topic,
                offsets,
                wait_ms,
            }) => {
                let time = Duration::from_millis(wait_ms.min(MAX_WAIT_MS));
                reply(stream, (shared.answers.wait)(&topic, &offsets, time))?;
            }
            Ok(Request::Groups) => reply(stream, shared.answers.groups.list())?,
            Ok(Request::Group { group }) => {
                reply(stream, shared.answers.groups.describe(&group))?;
            }
            Ok(Request::Commit { group, offsets }) => {
                reply(stream, shared.answers.groups.commit(&group, &offsets))?;
            }
            Ok(Request::DeleteGroup { group }) => {
                reply(stream, shared.answers.groups.delete(&group))?;
            }
            Ok(Request::Read {
                topic,
                partition,
                from,
                max_bytes,
            }) => {
                batches.clear();
                let most = max_bytes.min(MAX_READ);
                match (shared.answers.read)(&topic, partition, from, most, &mut batches) {
                    Ok(answer) => send(stream, &Answer::Ok(answer), &batches)?,
                    Err(reason) => send(stream, &Answer::<()>::Error(reason), &[])?,
                }
            }
            Ok(Request::Keys {
                topic,
                partition,
                keys,
                max_bytes,
            }) => {
                batches.clear();
                let most = max_bytes.min(MAX_READ);
                match (shared.answers.keys)(&topic, partition, &keys, most, &mut batches) {
                    Ok(answer) => send(stream, &Answer::Ok(answer), &batches)?,
                    Err(reason) => send(stream, &Answer::<()>::Error(reason), &[])?,
                }
            }
        }
        line.clear();
    }
}

fn reply<T: Serialize>(stream: &UnixStream, result: Result<T, String>) -> io::Result<()> {
    let answer = match result {
        Ok(value) => Answer::Ok(value),
        Err(reason) => Answer::Error(reason),
    };
    send(stream, &answer, &[])
}

fn send<T: Serialize>(mut stream: &UnixStream, answer: &Answer<T>, bytes: &[u8]) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::client::{ControlClient, ControlError};
    use super::*;

    struct Nobody;

    impl Groups for Nobody {
        fn list(&self) -> Result<Vec<GroupSummary>, String> {
            Ok(Vec::new())
        }
        fn describe(&self, group: &str) -> Result<GroupInfo, String> {
            Err(format!("no group {group}"))
        }
        fn commit(&self, group: &str, offsets: &CommittedOffsets) -> Result<(), String> {
            Err(format!("{group}: {offsets:?}"))
        }
        fn delete(&self, _: &str) -> Result<(), String> {
            Ok(())
        }
    }

    fn answers() -> Answers {
        Answers {
            stats: Box::new(|| Stats {
                uptime_ms: 5,
                ..Stats::default()
            }),
            topics: Box::new(Vec::new),
            change: Box::new(|change| Err(format!("no: {change:?}"))),
            backup: Box::new(|to| Err(format!("not to {}", to.display()))),
            find: Box::new(|topic, _, _| Err(format!("no topic \"{topic}\""))),
            wait: Box::new(|_, offsets, time| {
                Ok(vec![offsets.len() as i64, time.as_millis() as i64])
            }),
            groups: Box::new(Nobody),
            keys: Box::new(|topic, partition, keys, _, out| {
                out.extend_from_slice(b"record");
                assert_eq!((topic, partition), ("t", 4));
                Ok(KeysAnswer {
                    rest: Some(keys.clone()),
                    bytes: 6,
                })
            }),
            read: Box::new(|topic, partition, from, most, out| {
                if topic != "t" {
                    return Err(format!("no topic \"{topic}\""));
                }
                out.extend_from_slice(b"batches");
                let from = if let Position::Offset(offset) = from {
                    offset
                } else {
                    0
                };
                Ok(ReadAnswer {
                    from,
                    start: i64::from(partition),
                    high_watermark: i64::from(most),
                    bytes: 7,
                })
            }),
        }
    }

    #[test]
    fn answers_several_requests_and_survives_nonsense() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub/control.sock");
        let server = ControlServer::start(&path, answers()).unwrap();
        let mut client = ControlClient::connect(&path).unwrap();
        assert_eq!(client.stats().unwrap().uptime_ms, 5);
        let mut out = Vec::new();
        let answer = client
            .read("t", 3, Position::Offset(9), 100, &mut out)
            .unwrap();
        assert_eq!(
            (answer.from, answer.start, answer.high_watermark),
            (9, 3, 100)
        );
        assert_eq!(out, b"batches");
        let keys = Keys::One("6b".to_owned());
        let answer = client.keys("t", 4, &keys, 100, &mut out).unwrap();
        assert_eq!(answer.rest, Some(keys));
        assert_eq!(out, b"batchesrecord");
        let refused = client.read("x", 0, Position::Earliest, 1, &mut out);
        assert!(matches!(refused, Err(ControlError::Refused(reason)) if reason.contains("\"x\"")));

        let mut nonsense = UnixStream::connect(&path).unwrap();
        nonsense.write_all(b"{\"read\":{}}\n").unwrap();
        nonsense.write_all(&vec![b'x'; MAX_REQUEST + 10]).unwrap();
        let mut text = String::new();
        nonsense.read_to_string(&mut text).unwrap_or(0);
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(text.contains("not understood") && text.contains("at most"));

        assert_eq!(client.topics().unwrap(), []);
        assert_eq!(client.groups().unwrap(), []);
        client.delete_group("g").unwrap();
        let offsets = [("t".to_owned(), [(2, 7)].into())].into();
        let refused = client.commit("g", offsets).unwrap_err().to_string();
        assert_eq!(refused, "g: {\"t\": {2: 7}}");
        let ends = vec![i64::MAX; 10_000];
        let waited = client.wait("t", &ends, Duration::from_secs(3600)).unwrap();
        assert_eq!(waited, [10_000, MAX_WAIT_MS as i64]);
        let refused = client.backup(Path::new("/there"));
        assert!(matches!(refused, Err(ControlError::Refused(reason)) if reason == "not to /there"));
        let second = ControlServer::start(&path, answers());
        assert_eq!(
            second.err().map(|e| e.kind()),
            Some(io::ErrorKind::AddrInUse)
        );
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn replaces_the_socket_of_a_killed_server() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _server = ControlServer::start(&path, answers()).unwrap();
        assert!(ControlClient::connect(&path).unwrap().stats().is_ok());
    }
}
