//! What a request of a Kafka client means.

pub mod admin;
pub mod batch;
pub mod cluster;
pub mod configs;
pub mod counters;
pub mod fetch;
pub mod groups;
pub mod hub;
pub mod inflight;
pub mod list_offsets;
#[cfg(test)]
mod oracle;
pub mod produce;
pub mod producer_ids;
pub mod security;
pub mod session;
pub mod settings;
mod throttle;
pub mod topics;
pub mod waiting;
pub mod worker;
