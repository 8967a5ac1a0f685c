//! What an rx lcore runs: parse, demultiplex, answer.
//!
//! Everything here is sans-io: frames are byte slices, nothing allocates once it is constructed.

pub mod buffers;
mod counters;
mod demux;
mod drop_reason;
mod interface;
pub mod kernel;
pub mod lanes;
mod parse;
mod reply;
mod responder;
pub mod routes;
#[cfg(feature = "dpdk")]
pub mod rx;
mod service;

pub use counters::{Handled, NetCounters};
pub use demux::{Demux, DuplicateListener, Listener, Target};
pub use drop_reason::DropReason;
pub use interface::{Interface, InterfaceConfig, Relation, link_local, solicited_node};
pub use parse::{ControlPacket, ParseOptions, Parsed, UdpPacket, parse};
pub use reply::{AckCoalescer, AckFrame, payload_capacity, payload_offset, reply_to, udp_frame};
pub use responder::{ROUND_NS, Responder};
pub use service::{ServedTopic, TopicTable};
