//! The write-ahead log and its readers; knows nothing of networks.
//!
//! [`catalog`] says which topics there are and in which shard each partition lies; [`wal`] is a
//! shard's log: its writer and its recovery; [`reader`] reads it back by offset, time and key, from a
//! running server or from files; [`engine`] is all of a shard without a server; [`verify`] and [`inspect`] look at the files
//! themselves.

pub mod backup;
pub mod catalog;
pub mod engine;
pub mod export;
mod frames;
pub mod index;
pub mod inspect;
pub(crate) mod keylog;
pub mod lsm;
mod mapped;
pub mod pieces;
pub mod reader;
pub mod repair;
#[cfg(all(test, not(loom)))]
mod small_disk;
pub mod topic_settings;
pub mod verify;
pub mod wal;

pub use catalog::{Catalog, CatalogError, Topic, TopicSpec};
pub use engine::{Engine, EngineConfig, EngineError, EngineStats, NewRecord};
pub use lsm::keys::range::KeyBounds;
pub use pieces::{Piece, Pieces};
pub use reader::{LogReader, Message, Outcome, RangeKey, RangePage, ReadError};
pub use wal::{
    DEFAULT_LINGER, FrameSeq, RecoveryReport, Refusal, Replay, WalConfig, WalError, WalShared,
    WalState, WalWriter,
};

/// A partition of the store, by ids that never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PartitionKey {
    /// [`Topic::id`].
    pub topic: u32,
    /// From 0.
    pub partition: u32,
}
