//! The LSM store behind a shard's write-ahead log: what was flushed from it, merged and compressed.
//!
//! [`codec`] compresses and decompresses record batches as Kafka does; [`rebatch`] merges successive
//! batches of a partition into larger ones.

pub mod codec;
pub mod rebatch;

pub use codec::{Codec, CodecError};
pub use rebatch::{RebatchError, Rebatcher};
