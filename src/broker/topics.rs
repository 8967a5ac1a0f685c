//! What the broker knows of topics, and what it can ask of whoever keeps them.

use std::collections::HashMap;
use std::sync::Arc;

use crate::broker::batch::Rules;
use crate::storage::PartitionKey;
use crate::wire::kafka::Code;

/// The internal topic of committed offsets.
pub const OFFSETS_TOPIC: &str = "__consumer_offsets";

/// Where a partition is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// Its shard.
    pub shard: u16,
    /// Its index there.
    pub local: u32,
    /// Its key in the log.
    pub key: PartitionKey,
}

/// A topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// Its name.
    pub name: String,
    /// Its number in the store.
    pub id: u32,
    /// Its id on the wire.
    pub uuid: u128,
    /// Its partitions.
    pub places: Vec<Place>,
    /// Settings that differ from their defaults, by Kafka's names.
    pub config: Vec<(String, String)>,
    /// What its batches must be.
    pub rules: Rules,
}

impl Topic {
    /// Whether clients cannot write to it.
    pub fn internal(&self) -> bool {
        self.name == OFFSETS_TOPIC
    }

    /// A partition by its number.
    pub fn place(&self, partition: i32) -> Option<Place> {
        self.places.get(usize::try_from(partition).ok()?).copied()
    }
}

/// All topics at a moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    topics: Vec<Topic>,
    by_name: HashMap<String, usize>,
    by_uuid: HashMap<u128, usize>,
}

impl Snapshot {
    /// Of these topics.
    pub fn new(topics: Vec<Topic>) -> Self {
        let names = topics.iter().zip(0..);
        Self {
            by_name: names.clone().map(|(t, i)| (t.name.clone(), i)).collect(),
            by_uuid: names.map(|(t, i)| (t.uuid, i)).collect(),
            topics,
        }
    }

    /// All of them, oldest first.
    pub fn all(&self) -> &[Topic] {
        &self.topics
    }

    /// By name.
    pub fn find(&self, name: &str) -> Option<&Topic> {
        self.topics.get(*self.by_name.get(name)?)
    }

    /// By id on the wire.
    pub fn find_uuid(&self, uuid: u128) -> Option<&Topic> {
        self.topics.get(*self.by_uuid.get(&uuid)?)
    }

    /// A partition by its topic's name and its number.
    pub fn place(&self, name: &str, partition: i32) -> Option<Place> {
        self.find(name)?.place(partition)
    }
}

/// Why topics were not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TopicError {
    /// As the client is told.
    pub code: Code,
    /// What is wrong, and what is allowed.
    pub message: String,
}

impl TopicError {
    /// An error with its message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// There is no such topic.
    pub fn unknown(name: &str) -> Self {
        Self::new(
            Code::UnknownTopicOrPartition,
            format!("there is no topic {name:?}"),
        )
    }
}

/// A change of a setting; `None`: back to its default.
pub type Change = (String, Option<String>);

/// Whoever keeps the topics: the server, and a store in memory in tests. Every method may be called on any
/// thread; those that change something return when the change is durable.
pub trait Topics: Send + Sync {
    /// All topics; cheap.
    fn snapshot(&self) -> Arc<Snapshot>;

    /// Makes a topic; its name and number of partitions have been checked. Nothing is made where
    /// `validate_only`.
    fn create(
        &self,
        name: &str,
        partitions: u32,
        config: &[(String, String)],
        validate_only: bool,
    ) -> Result<(), TopicError>;

    /// Deletes a topic with its messages.
    fn delete(&self, name: &str) -> Result<(), TopicError>;

    /// Gives a topic more partitions.
    fn grow(&self, name: &str, partitions: u32, validate_only: bool) -> Result<(), TopicError>;

    /// Changes settings.
    fn alter(&self, name: &str, changes: &[Change], validate_only: bool) -> Result<(), TopicError>;

    /// Moves the start of a partition up to an offset, which is not behind its high watermark; gives the new
    /// start.
    fn delete_records(&self, place: Place, offset: i64) -> Result<i64, TopicError>;

    /// First offset that is visible.
    fn log_start(&self, place: Place) -> i64;

    /// Offset behind the last record stored in a partition, durable or not.
    fn log_end(&self, place: Place) -> i64;

    /// Counts messages that are handed to a partition's shard.
    fn received(&self, place: Place, messages: u64);

    /// How far a partition has come; `None`: it is gone.
    fn progress(&self, shard: u16, local: u32) -> Option<crate::broker::waiting::Progress>;
}
