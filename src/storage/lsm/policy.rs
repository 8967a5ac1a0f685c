//! What is to become of a topic's messages once they leave the write-ahead log.

use std::sync::Arc;

use super::codec::Codec;

/// A day, in milliseconds.
const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// The store's side of a topic's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// How its batches are compressed.
    pub codec: Codec,
    /// Messages are dropped when they arrived longer ago than this, in ms (Kafka's `retention.ms`);
    /// `None`: never.
    pub retention_ms: Option<i64>,
    /// A partition's oldest messages are dropped when it has more bytes in SSTs than this
    /// (`retention.bytes`); `None`: never.
    pub retention_bytes: Option<u64>,
    /// Only the newest record of each key is kept (`cleanup.policy` has `compact`).
    pub compact: bool,
    /// How long a record without value, which deletes its key, is kept for readers that follow
    /// (`delete.retention.ms`).
    pub delete_retention_ms: i64,
    /// Messages can be looked up by key (`index = "key"`).
    pub index_keys: bool,
    /// The topic was deleted: nothing of it is kept.
    pub deleted: bool,
}

impl Default for Policy {
    /// Keeps everything.
    fn default() -> Self {
        Policy {
            codec: Codec::default(),
            retention_ms: None,
            retention_bytes: None,
            compact: false,
            delete_retention_ms: DAY_MS,
            index_keys: false,
            deleted: false,
        }
    }
}

/// Gives the present policy of a topic by its id. Called a few times a segment, never on an lcore.
pub type Policies = Arc<dyn Fn(u32) -> Policy + Send + Sync>;
