//! What is to become of a topic's messages once they leave the write-ahead log.

use std::collections::HashMap;
use std::sync::Arc;

use super::codec::Codec;

/// The store's side of a topic's settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// How its batches are compressed.
    pub codec: Codec,
    /// Messages are dropped when they arrived longer ago than this, in ms (Kafka's `retention.ms`);
    /// `None`: never.
    pub retention_ms: Option<i64>,
    /// A partition's oldest messages are dropped when it has more bytes in SSTs than this
    /// (`retention.bytes`); `None`: never.
    pub retention_bytes: Option<u64>,
    /// Only the newest record of each key is kept (`cleanup.policy` names compact); `None`: all are.
    pub compaction: Option<Compaction>,
    /// Its files have an index of its records' keys.
    pub indexed: bool,
    /// The topic was deleted: nothing of it is kept.
    pub deleted: bool,
}

/// How a topic is compacted by key.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compaction {
    /// Records without a value (tombstones) stay for so long after the first compaction that met them, in ms
    /// (`delete.retention.ms`): until then every reader that began with older records has seen them.
    pub delete_retention_ms: i64,
    /// Records that arrived less long ago, in ms, stay as they are (`min.compaction.lag.ms`).
    pub min_lag_ms: i64,
    /// The share of a partition's bytes that are new since it was compacted, from which on it is compacted again
    /// (`min.cleanable.dirty.ratio`).
    pub dirty_ratio: f64,
}

impl Default for Compaction {
    /// Kafka's defaults.
    fn default() -> Self {
        Compaction {
            delete_retention_ms: 24 * 3600 * 1000,
            min_lag_ms: 0,
            dirty_ratio: 0.5,
        }
    }
}

impl Default for Policy {
    /// Keeps everything.
    fn default() -> Self {
        Policy {
            codec: Codec::default(),
            retention_ms: None,
            retention_bytes: None,
            compaction: None,
            indexed: false,
            deleted: false,
        }
    }
}

/// The policies of topics as they were when they were first asked for, so that one decision sees one state of things.
pub(super) struct Known {
    ask: Policies,
    known: HashMap<u32, Policy>,
}

impl Known {
    pub(super) fn new(ask: &Policies) -> Known {
        Known {
            ask: Arc::clone(ask),
            known: HashMap::new(),
        }
    }

    pub(super) fn of(&mut self, topic: u32) -> &Policy {
        self.known.entry(topic).or_insert_with(|| (self.ask)(topic))
    }
}

/// Gives the present policy of a topic by its id. Called a few times a segment, never on an lcore.
pub type Policies = Arc<dyn Fn(u32) -> Policy + Send + Sync>;
