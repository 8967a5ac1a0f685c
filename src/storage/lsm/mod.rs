//! The LSM store behind a shard's write-ahead log: what was flushed from it, merged and compressed.
//!
//! [`codec`] compresses and decompresses record batches as Kafka does; [`rebatch`] merges successive
//! batches of a partition into larger ones; [`keys`] is the index from message keys to offsets, `by_key` searches it
//! over all files; [`cache`] holds
//! decompressed blocks; [`repair`] makes a lost manifest anew.

mod batches;
mod by_key;
pub mod cache;
pub mod codec;
mod compact;
mod effect;
pub mod error;
pub mod flush;
pub mod keys;
pub mod maintain;
pub mod manifest;
mod memory;
pub mod merge;
pub mod pace;
mod pick;
mod point;
pub mod policy;
pub mod rebatch;
pub mod repair;
mod retain;
pub mod sst;
mod steps;
pub mod store;
#[cfg(all(test, not(loom)))]
mod tests;

pub use codec::{Codec, CodecError};
pub use error::StoreError;
pub use maintain::{MaintainConfig, Maintainer, Maintenance, Started};
pub use memory::StoreMemory;
pub use merge::Merger;
pub use policy::{Compaction, Policies, Policy};
pub use rebatch::{RebatchError, Rebatcher};
pub use store::Store;
