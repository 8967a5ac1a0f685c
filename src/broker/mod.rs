//! What a request of a Kafka client means.

pub mod batch;
pub mod fetch;
pub mod groups;
pub mod inflight;
pub mod list_offsets;
pub mod producer_ids;
pub mod session;
pub mod waiting;
