//! The asking side of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::storage::backup::Note;

use super::keys::{Keys, KeysAnswer};
use super::protocol::{
    Answer, CommittedOffsets, GroupInfo, GroupSummary, MAX_READ, Position, ReadAnswer, Request,
    Stats, TopicChange, TopicInfo,
};

/// A server that takes longer than this to answer hangs.
const TIMEOUT: Duration = Duration::from_secs(30);
/// A copy to another disk may take so long.
const BACKUP_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Why no answer came.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error(
        "no Taffrail server answers at {path} ({source}): is `taffrail serve` running, and is this its [control] socket?"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the server broke: {0}")]
    Io(#[from] io::Error),
    /// The answer makes no sense: another version, perhaps.
    #[error(
        "the server's answer is not understood ({0}): are server and command of the same version?"
    )]
    Answer(#[from] serde_json::Error),
    /// The server refused.
    #[error("{0}")]
    Refused(String),
}

/// A connection; one request at a time.
pub struct ControlClient {
    stream: BufReader<UnixStream>,
}

impl ControlClient {
    /// Connects to the server whose control socket is at `path`.
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let open = || -> io::Result<UnixStream> {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.set_write_timeout(Some(TIMEOUT))?;
            Ok(stream)
        };
        let stream = open().map_err(|source| ControlError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// The counters.
    pub fn stats(&mut self) -> Result<Stats, ControlError> {
        self.ask(&Request::Stats)
    }

    /// The topics and their bounds.
    pub fn topics(&mut self) -> Result<Vec<TopicInfo>, ControlError> {
        self.ask(&Request::Topics)
    }

    /// Changes topics; it is durable and in force on return.
    pub fn change(&mut self, change: TopicChange) -> Result<(), ControlError> {
        self.ask(&Request::Change(change))
    }

    /// Where a position of a partition is.
    pub fn find(
        &mut self,
        topic: &str,
        partition: u32,
        from: Position,
    ) -> Result<ReadAnswer, ControlError> {
        self.ask(&Request::Find {
            topic: topic.to_owned(),
            partition,
            from,
        })
    }

    /// Waits until a partition has a durable message at its offset or behind, or there are more partitions than
    /// offsets, or `time` is over, which the server may shorten; gives the offset behind each partition's newest one.
    pub fn wait(
        &mut self,
        topic: &str,
        offsets: &[i64],
        time: Duration,
    ) -> Result<Vec<i64>, ControlError> {
        self.ask(&Request::Wait {
            topic: topic.to_owned(),
            offsets: offsets.to_vec(),
            wait_ms: time.as_millis() as u64,
        })
    }

    /// Another handle of the connection: shutting it down ends a wait.
    pub fn handle(&self) -> io::Result<UnixStream> {
        self.stream.get_ref().try_clone()
    }

    /// The consumer groups.
    pub fn groups(&mut self) -> Result<Vec<GroupSummary>, ControlError> {
        self.ask(&Request::Groups)
    }

    /// A consumer group; its state is `Dead` where there is none.
    pub fn group(&mut self, group: &str) -> Result<GroupInfo, ControlError> {
        self.ask(&Request::Group {
            group: group.to_owned(),
        })
    }

    /// Sets committed offsets of a group without members; durable on return.
    pub fn commit(&mut self, group: &str, offsets: CommittedOffsets) -> Result<(), ControlError> {
        self.ask(&Request::Commit {
            group: group.to_owned(),
            offsets,
        })
    }

    /// Deletes a group without members; durable on return.
    pub fn delete_group(&mut self, group: &str) -> Result<(), ControlError> {
        self.ask(&Request::DeleteGroup {
            group: group.to_owned(),
        })
    }

    /// Copies the store to the folder `to`, an absolute path. Takes as long as copying the log does.
    pub fn backup(&mut self, to: &Path) -> Result<Note, ControlError> {
        self.stream
            .get_ref()
            .set_read_timeout(Some(BACKUP_TIMEOUT))?;
        let note = self.ask(&Request::Backup { to: to.to_owned() });
        self.stream.get_ref().set_read_timeout(Some(TIMEOUT))?;
        note
    }

    /// Appends whole record batches from position `from` on to `out`; at most `max_bytes` bytes, or
    /// one batch.
    pub fn read(
        &mut self,
        topic: &str,
        partition: u32,
        from: Position,
        max_bytes: u32,
        out: &mut Vec<u8>,
    ) -> Result<ReadAnswer, ControlError> {
        let max_bytes = max_bytes.min(MAX_READ);
        let answer: ReadAnswer = self.ask(&Request::Read {
            topic: topic.to_owned(),
            partition,
            from,
            max_bytes,
        })?;
        let expected = u64::from(answer.bytes);
        if (&mut self.stream).take(expected).read_to_end(out)? as u64 != expected {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(answer)
    }

    /// Appends the newest records of keys of a partition to `out`, as record batches; at most `max_bytes` bytes, or one.
    pub fn keys(
        &mut self,
        topic: &str,
        partition: u32,
        keys: &Keys,
        max_bytes: u32,
        out: &mut Vec<u8>,
    ) -> Result<KeysAnswer, ControlError> {
        let answer: KeysAnswer = self.ask(&Request::Keys {
            topic: topic.to_owned(),
            partition,
            keys: keys.clone(),
            max_bytes: max_bytes.min(MAX_READ),
        })?;
        let expected = u64::from(answer.bytes);
        if (&mut self.stream).take(expected).read_to_end(out)? as u64 != expected {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(answer)
    }

    fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ControlError> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)?;
        let mut answer = Vec::new();
        if self.stream.read_until(b'\n', &mut answer)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        match serde_json::from_slice(&answer)? {
            Answer::Ok(value) => Ok(value),
            Answer::Error(reason) => Err(ControlError::Refused(reason)),
        }
    }
}
