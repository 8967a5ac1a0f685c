//! What is counted of Kafka's protocol, by all threads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::broker::worker::Close;
use crate::wire::kafka::Api;

/// The counters; any thread may add.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Connections refused: there were as many as are allowed.
    pub refused: AtomicU64,
    /// Connections that are open.
    pub open: AtomicU64,
    requests: [AtomicU64; Api::ALL.len()],
    closed: [AtomicU64; REASONS.len()],
    /// Connections closed because they were idle.
    pub idle: AtomicU64,
    /// Connections closed because TLS failed.
    pub tls_failed: AtomicU64,
    /// Connections closed because they had not proved who they are in time.
    pub late: AtomicU64,
    /// Connections closed because they moved neither requests nor answers on while others waited for their memory.
    pub stalled: AtomicU64,
    /// Batches handed to shards.
    pub batches_in: AtomicU64,
    /// Batches that no shard was given: of unknown topics, not allowed, too large, or wrong in themselves.
    pub batches_refused: AtomicU64,
    /// Bytes of produce requests' records.
    pub bytes_in: AtomicU64,
    /// Bytes of records given to fetches.
    pub bytes_out: AtomicU64,
}

/// Names of the reasons of a close, in the order of [`Close`].
const REASONS: [(Close, &str); 6] = [
    (Close::BadLength, "bad_length"),
    (Close::Malformed, "malformed"),
    (Close::Unsupported, "unsupported"),
    (Close::UnacknowledgedFailed, "unacknowledged_failed"),
    (Close::NotProved, "not_authenticated"),
    (Close::AuthenticationFailed, "authentication_failed"),
];

impl Counters {
    /// Counts a request that was begun.
    pub fn request(&self, api: Api) {
        if let Some(at) = Api::ALL.iter().position(|&other| other == api) {
            self.requests[at].fetch_add(1, Relaxed);
        }
    }

    /// Counts a connection that the server closes.
    pub fn closed(&self, reason: Close) {
        if let Some(at) = REASONS.iter().position(|(other, _)| *other == reason) {
            self.closed[at].fetch_add(1, Relaxed);
        }
    }

    /// Counts a produce request: batches handed to shards and refused ones, and the bytes of all.
    pub fn produced(&self, batches: usize, refused: usize, bytes: usize) {
        self.batches_in.fetch_add(batches as u64, Relaxed);
        self.batches_refused.fetch_add(refused as u64, Relaxed);
        self.bytes_in.fetch_add(bytes as u64, Relaxed);
    }

    /// Counts an answered fetch.
    pub fn fetched(&self, bytes: usize) {
        self.bytes_out.fetch_add(bytes as u64, Relaxed);
    }

    /// Requests by API, those that came at all.
    pub fn requests(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        Api::ALL
            .iter()
            .zip(&self.requests)
            .map(|(api, count)| (api.name(), count.load(Relaxed)))
            .filter(|(_, count)| *count > 0)
    }

    /// Connections closed by the server, by reason.
    pub fn closes(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        REASONS
            .iter()
            .zip(&self.closed)
            .map(|((_, name), count)| (*name, count.load(Relaxed)))
            .chain([
                ("idle", self.idle.load(Relaxed)),
                ("tls_failed", self.tls_failed.load(Relaxed)),
                ("authentication_timeout", self.late.load(Relaxed)),
                ("stalled", self.stalled.load(Relaxed)),
            ])
            .filter(|(_, count)| *count > 0)
    }
}
