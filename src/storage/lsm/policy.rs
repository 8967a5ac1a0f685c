//! What is to become of a topic's messages once they leave the write-ahead log.

use std::sync::Arc;

use super::codec::Codec;

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
            deleted: false,
        }
    }
}

/// Gives the present policy of a topic by its id. Called a few times a segment, never on an lcore.
pub type Policies = Arc<dyn Fn(u32) -> Policy + Send + Sync>;
