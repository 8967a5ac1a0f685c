//! What a storage lcore runs: drain rings, build batches, append, acknowledge.
//!
//! Nothing here knows DPDK: messages come over rings as [`Inbound`], buffers go back through
//! [`Release`], answers leave over rings as [`Ack`].

mod ack;
mod control;
mod credit;
pub mod dedupe;
mod gap;
mod inbound;
pub mod link;
mod partition;
mod produce;
mod raw;
#[allow(clippy::module_inception)] // the poll loop is the shard
mod shard;
pub mod snapshot;

pub use crate::wire::datagram::PRODUCE_HEADER_LEN;
pub use control::{ControlError, ShardControl};
pub use credit::{CRITICAL_CREDIT, FULL_CREDIT, PRESSED_CREDIT};
pub use gap::GAP_RECORD_TYPE;
pub use inbound::{
    ACK_SLOTS, Ack, BatchBuffer, BatchWay, GapReport, INBOUND_SLOTS, Inbound, Kind, Now,
    REPLY_TO_LEN, Release, ReplyTo,
};
pub use partition::{PartitionStats, Reasons};
pub(crate) use raw::messages;
pub use shard::{CloseError, DEFAULT_PENDING_ACKS, ROUND_MESSAGES, Shard, ShardConfig, ShardStats};
pub use snapshot::Recovered;

#[cfg(test)]
mod tests;
