//! What a storage lcore runs: drain rings, build batches, append, acknowledge.
//!
//! Nothing here knows DPDK: messages come over rings as [`Inbound`], buffers go back through
//! [`Release`], answers leave over rings as [`Ack`].

pub mod credit;
pub mod dedupe;
mod inbound;

pub use crate::wire::datagram::PRODUCE_HEADER_LEN;
pub use inbound::{Ack, GapReport, Inbound, Kind, Now, REPLY_TO_LEN, Release, ReplyTo};
