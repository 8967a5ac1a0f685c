//! Why the store behind a log cannot be opened, written or read; each says what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use super::codec::CodecError;
use super::sst::SstError;
use crate::storage::frames::FetchError;

/// Errors of the LSM store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system or the disk refused.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The manifest is not understood.
    #[error(
        "{path} at byte {position}: {what}; `taffrail repair` makes a new manifest from the files"
    )]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Byte in the file.
        position: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// There are SSTs and no manifest.
    #[error("{dir} has SSTs and no manifest; `taffrail repair` makes a new one from the files")]
    NoManifest {
        /// The shard's folder.
        dir: PathBuf,
    },
    /// A new manifest does not make the store whole.
    #[error("{dir} has a new manifest and still cannot be opened: {what}")]
    NotRepaired {
        /// The shard's folder.
        dir: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A write of the manifest failed earlier.
    #[error(
        "{path} takes no more edits since a write failed; mend the disk and start the server again"
    )]
    ManifestFailed {
        /// The manifest.
        path: PathBuf,
    },
    /// A file that the manifest names is not there.
    #[error(
        "{path} is missing; restore it, or let `taffrail repair` make a new manifest without it"
    )]
    Missing {
        /// The SST.
        path: PathBuf,
    },
    /// The log begins behind what is flushed.
    #[error(
        "{dir}: the log was flushed up to LSN {flushed} and begins at {begins}: a manifest edit or a segment is lost; `taffrail repair` makes a new manifest from the files"
    )]
    Gap {
        /// The shard's folder.
        dir: PathBuf,
        /// Where the SSTs end.
        flushed: u64,
        /// Where the log begins.
        begins: u64,
    },
    /// Opened for reading only.
    #[error("{dir} was opened for reading")]
    ReadOnly {
        /// The shard's folder.
        dir: PathBuf,
    },
    /// An SST is damaged, or cannot be read.
    #[error("{0}")]
    Sst(#[from] SstError),
    /// A batch cannot be decompressed.
    #[error("{path}: {source}")]
    Codec {
        /// The SST.
        path: PathBuf,
        /// Why.
        source: CodecError,
    },
    /// The log could not be read.
    #[error("{0}")]
    Log(#[from] FetchError),
}

impl StoreError {
    /// For `map_err`: the error with what was tried, and where.
    pub(crate) fn io<'a>(
        what: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| StoreError::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }

    /// True where the disk has no room.
    pub fn is_full(&self) -> bool {
        matches!(self, StoreError::Io { source, .. }
            if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG)))
    }
}
