//! What a storage lcore runs: drain rings, build batches, append, acknowledge.
//!
//! Nothing here knows DPDK: messages come over rings as [`Inbound`], buffers go back through
//! [`Release`].

mod inbound;

pub use inbound::{
    GapReport, Inbound, Kind, Now, PRODUCE_HEADER_LEN, REPLY_TO_LEN, Release, ReplyTo,
};
