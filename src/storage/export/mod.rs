//! Messages in the formats of others: [`parquet`] for queries, [`kafka_log`] as Kafka keeps them.

pub mod kafka_log;
pub mod parquet;

use std::io;
use std::path::PathBuf;

pub use kafka_log::KafkaLog;
pub use parquet::ParquetFile;

use super::lsm::CodecError;
use crate::wire::record_batch::BatchError;

/// Why messages were not exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The file system refused.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// There is something already.
    #[error("{path} is there already: name another one, or remove it")]
    Exists {
        /// The file or folder.
        path: PathBuf,
    },
    /// What was read is no record batch.
    #[error("partition {partition}: {error}")]
    Batch {
        /// The partition.
        partition: u32,
        /// What is wrong with it.
        error: BatchError,
    },
    /// It cannot be decompressed.
    #[error("partition {partition}: {error}")]
    Codec {
        /// The partition.
        partition: u32,
        /// What is wrong with it.
        error: CodecError,
    },
    /// The Parquet file could not be written.
    #[error("cannot write {path}: {error}")]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the library said.
        error: ::parquet::errors::ParquetError,
    },
}

/// What was exported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Exported {
    /// Messages.
    pub messages: u64,
    /// Records that are no messages: of gaps and other control batches.
    pub control: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Files.
    pub files: u64,
}
