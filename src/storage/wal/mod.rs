//! A shard's write-ahead log.
//!
//! Entries are written into frames in the staging file, which outlives the process; a frame is a
//! group commit, written to the segment with O_DIRECT and RWF_DSYNC by io_uring. [`writer`] is the
//! storage lcore's side, [`shared`] what other threads see, [`recovery`] what happens at the start, from what
//! [`snapshot`]s say.

pub(crate) mod aligned;
mod allocate;
pub mod error;
pub mod frame;
pub(crate) mod pin;
pub mod prepare;
pub mod recovery;
pub mod segment;
pub mod shared;
pub mod snapshot;
pub mod staging;
pub(crate) mod window;
pub mod writer;

#[cfg(all(test, not(loom)))]
mod tests;

pub use error::WalError;
pub use frame::LogId;
pub use recovery::{RecoveryReport, Replay};
pub use shared::{WalShared, WalState};
pub use writer::{DEFAULT_LINGER, FrameSeq, Refusal, WalConfig, WalWriter};
