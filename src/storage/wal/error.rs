//! Why a log cannot be opened or closed; each says what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// Errors of opening, recovering and closing a log.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
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
    /// Another process writes this log.
    #[error("the log {path} is in use by another process")]
    Locked {
        /// The shard's folder.
        path: PathBuf,
    },
    /// A value of the configuration cannot be.
    #[error("[storage] {key}: {reason}")]
    Config {
        /// The key.
        key: &'static str,
        /// Why not, and what is allowed.
        reason: String,
    },
    /// No io_uring.
    #[error(
        "io_uring is not available ({source}): allow it (sysctl kernel.io_uring_disabled=0, and the system calls io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile)"
    )]
    IoUring {
        /// What the operating system said.
        source: io::Error,
    },
    /// The staging buffer cannot be registered.
    #[error(
        "cannot register {bytes} bytes of staging buffer with io_uring ({source}): raise RLIMIT_MEMLOCK (LimitMEMLOCK=infinity, ulimit -l) or grant CAP_IPC_LOCK"
    )]
    RegisterBuffers {
        /// Size of the buffer.
        bytes: usize,
        /// What the operating system said.
        source: io::Error,
    },
    /// The staging folder is not of a kind that survives a killed process.
    #[error("[storage] staging_dir {path}: {reason}")]
    StagingDir {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A staging file is there but is not this log's.
    #[error(
        "the staging file {path} belongs to another store or shard: another store's data may be in it; move it away"
    )]
    StagingForeign {
        /// The file.
        path: PathBuf,
    },
    /// A running server uses the staging file.
    #[error(
        "the staging file {path} is in use by a running server: this store is a copy of that server's, with the same id. Set another [storage] staging_dir for this one"
    )]
    StagingInUse {
        /// The file.
        path: PathBuf,
    },
    /// The staging file does not continue the log.
    #[error(
        "the staging file {path} does not continue the log: {reason}. It holds acknowledged messages; if the store's folder was restored from a backup, move the staging file away"
    )]
    StagingMismatch {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A part of the log that had been durable is unreadable.
    #[error(
        "{path} is damaged at byte {position} ({what}), but frames behind it show that it had been durable: acknowledged messages would be lost. Run `taffrail verify`; restore the file, or accept the loss explicitly"
    )]
    Damaged {
        /// The segment.
        path: PathBuf,
        /// Byte in the file.
        position: u64,
        /// What was found there.
        what: String,
    },
    /// No room to open.
    #[error("the disk of {path} is full ({source}): free at least {need} bytes")]
    DiskFull {
        /// What could not be made.
        path: PathBuf,
        /// Bytes needed.
        need: u64,
        /// What the operating system said.
        source: io::Error,
    },
    /// Writing failed earlier; final.
    #[error("the log has failed: {reason}")]
    Failed {
        /// The first error.
        reason: String,
    },
}

impl WalError {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WalError {
        let path = path.to_owned();
        move |source| WalError::Io { what, path, source }
    }
}
