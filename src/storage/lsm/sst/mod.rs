//! Sorted string tables: the immutable files that a shard's messages are kept in.
//!
//! [`mod@format`] has the bytes, [`writer`] makes a file, [`reader`] maps and reads it.

pub mod format;
pub mod reader;
pub mod scan;
#[cfg(test)]
mod tests;
pub mod verify;
pub mod writer;

use std::io;
use std::path::{Path, PathBuf};

pub use format::{Block, PartitionExtent, SstInfo};
pub use reader::{Blocks, SstReader};
pub use scan::Scan;
pub use verify::{SstFinding, SstReport};
pub(in crate::storage::lsm) use writer::scratch_path;
pub use writer::{SstMade, SstWriter};

use crate::storage::PartitionKey;

/// Bytes of batches in a block, unless a single one is larger: what a read of one message fetches and checks. A page of
/// the disk: a merged batch of the default size, compressed, is mostly a block by itself, and small ones share one.
pub const TARGET_BLOCK: usize = 4 << 10;

/// Why an SST cannot be written or read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SstError {
    /// The file system refused.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the operating system said.
        source: std::sync::Arc<io::Error>,
    },
    /// What was to be written came in the wrong order, or is no record batch.
    #[error("{path}: topic {} partition {}: {what}", key.topic, key.partition)]
    Order {
        /// The file being written.
        path: PathBuf,
        /// Whose batch.
        key: PartitionKey,
        /// What was wrong with it.
        what: &'static str,
    },
    /// The file is not whole.
    #[error("{path} at byte {position}: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Byte in the file.
        position: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A block of messages is not whole.
    #[error(
        "{path} at byte {}: {what}; topic {} partition {}, offsets {} to {} cannot be read",
        block.position, block.key.topic, block.key.partition, block.first_offset, block.end_offset - 1
    )]
    Block {
        /// The file.
        path: PathBuf,
        /// The block.
        block: Block,
        /// What is wrong.
        what: &'static str,
    },
}

impl SstError {
    pub(super) fn io<'a>(
        what: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| SstError::Io {
            what,
            path: path.to_owned(),
            source: std::sync::Arc::new(source),
        }
    }

    /// True where the disk has no room.
    pub fn is_full(&self) -> bool {
        matches!(self, SstError::Io { source, .. }
            if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG)))
    }
}
