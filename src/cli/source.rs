//! Where messages come from: a running server, or a stopped one's files.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use super::ServerArgs;
use crate::control::client::{ControlClient, ControlError};
use crate::control::keys::{Keys, no_index, read_keys};
use crate::control::protocol::{Position, ReadAnswer};
use crate::control::{names, read};
use crate::storage::{Catalog, LogReader, PartitionKey, topic_settings};

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Bytes asked for at a time: large enough that a round trip to the server costs little.
const CHUNK: u32 = 1 << 20;
/// Of files it grows to this while reading goes on: then the disk is read at its own rate.
const CHUNK_MAX: u32 = 16 << 20;

/// Where batches come from.
pub(super) enum Source {
    Server(ControlClient),
    Files(Box<Files>),
}

/// A stopped server's files, and the readers of the shards that were read.
pub(super) struct Files {
    folder: PathBuf,
    catalog: Catalog,
    readers: BTreeMap<u16, LogReader>,
    chunk: u32,
}

impl Source {
    /// The files in `data`, else the running server.
    pub(super) fn open(data: Option<&Path>, server: &ServerArgs) -> Result<Source, Error> {
        Ok(match data {
            Some(folder) => Source::Files(Box::new(Files {
                folder: folder.to_owned(),
                catalog: Catalog::open_read_only(folder)?,
                readers: BTreeMap::new(),
                chunk: CHUNK,
            })),
            None => Source::Server(ControlClient::connect(&server.socket_path()?)?),
        })
    }

    /// Number of partitions of a topic.
    pub(super) fn partitions(&mut self, topic: &str) -> Result<u32, Error> {
        match self {
            Source::Server(client) => {
                let topics = client.topics()?;
                match topics.iter().find(|t| t.name == topic) {
                    Some(topic) => Ok(topic.partitions.len() as u32),
                    None => {
                        let names = topics.iter().map(|t| t.name.as_str());
                        Err(names::unknown_topic(topic, names).into())
                    }
                }
            }
            Source::Files(files) => Ok(files.topic(topic)?.partitions()),
        }
    }

    /// Appends whole batches from a position on to `out`.
    pub(super) fn read(
        &mut self,
        topic: &str,
        partition: u32,
        from: Position,
        out: &mut Vec<u8>,
    ) -> Result<ReadAnswer, Error> {
        match self {
            Source::Server(client) => match client.read(topic, partition, from, CHUNK, out) {
                Ok(answer) => Ok(answer),
                Err(ControlError::Refused(reason)) => Err(reason.into()),
                Err(error) => Err(error.into()),
            },
            Source::Files(files) => files.read(topic, partition, from, out),
        }
    }

    /// Appends the newest records of keys to `out`; gives what is left of the range.
    pub(super) fn keys(
        &mut self,
        topic: &str,
        partition: u32,
        keys: &Keys,
        max_bytes: u32,
        out: &mut Vec<u8>,
    ) -> Result<Option<Keys>, Error> {
        let answer = match self {
            Source::Server(client) => match client.keys(topic, partition, keys, max_bytes, out) {
                Err(ControlError::Refused(reason)) => return Err(reason.into()),
                answer => answer?,
            },
            Source::Files(files) => {
                if !topic_settings::is_indexed(&files.topic(topic)?.settings) {
                    return Err(no_index(topic).into());
                }
                let (reader, key) = files.reader(topic, partition)?;
                read_keys(reader, key, keys, max_bytes, out)?
            }
        };
        Ok(answer.rest)
    }
}

impl Files {
    fn topic(&self, name: &str) -> Result<&crate::storage::Topic, Error> {
        let names = self.catalog.topics().iter().map(|t| t.name.as_str());
        let found = self.catalog.topic(name);
        found.ok_or_else(|| names::unknown_topic(name, names).into())
    }

    /// The reader of a partition's shard, and the partition's key.
    fn reader(
        &mut self,
        topic: &str,
        partition: u32,
    ) -> Result<(&mut LogReader, PartitionKey), Error> {
        let topic = self.topic(topic)?;
        let key = topic.key(partition).ok_or_else(|| {
            format!(
                "topic {} has partitions 0 to {}",
                topic.name,
                topic.partitions() - 1
            )
        })?;
        let shard = topic.shards[partition as usize];
        let reader = match self.readers.entry(shard) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(slot) => slot.insert(LogReader::offline(&self.folder, shard)?),
        };
        Ok((reader, key))
    }

    fn read(
        &mut self,
        topic: &str,
        partition: u32,
        from: Position,
        out: &mut Vec<u8>,
    ) -> Result<ReadAnswer, Error> {
        let chunk = self.chunk;
        self.chunk = (chunk * 2).min(CHUNK_MAX);
        let (reader, key) = self.reader(topic, partition)?;
        Ok(read(reader, key, from, chunk, out)?)
    }
}
