//! What a transport's thread counts.

use crate::telemetry::Counter;

use super::CloseReason;

/// Counters of one thread; that thread alone writes them. Connections open now =
/// accepted − the sum of closed.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections taken.
    pub accepted: Counter,
    /// Connections refused for the limit on all of them, or the service refused them.
    pub refused: Counter,
    /// Connections refused for the limit on one source address.
    pub refused_source: Counter,
    /// Accepting failed (no descriptors, no kernel memory).
    pub accept_errors: Counter,
    /// Connections closed, by [`CloseReason`].
    pub closed: [Counter; CloseReason::ALL.len()],
    /// Bytes received from peers.
    pub bytes_in: Counter,
    /// Bytes that the kernel took for peers.
    pub bytes_out: Counter,
    /// Calls of a service that consumed input.
    pub consumed: Counter,
    /// Times that a connection was no longer read from, for any limit.
    pub blocked: Counter,
    /// Turns of the event loop: system calls that submit and wait.
    pub turns: Counter,
    /// Bytes of receive buffers, taken requests and unsent answers now.
    pub memory: std::sync::atomic::AtomicUsize,
}

/// Sums over threads at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[allow(missing_docs)] // as in Counters
pub struct CountersSnapshot {
    pub accepted: u64,
    pub open: u64,
    pub refused: u64,
    pub refused_source: u64,
    pub accept_errors: u64,
    pub closed: std::collections::BTreeMap<&'static str, u64>,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub consumed: u64,
    pub blocked: u64,
    pub turns: u64,
    pub memory: u64,
}

impl CountersSnapshot {
    /// The sum of all threads' counters.
    pub fn of<'a>(threads: impl IntoIterator<Item = &'a Counters>) -> Self {
        let mut sum = Self::default();
        for counters in threads {
            let mut closed = 0;
            for (reason, counter) in CloseReason::ALL.iter().zip(&counters.closed) {
                closed += counter.get();
                *sum.closed.entry(reason.name()).or_default() += counter.get();
            }
            // Read after the closed ones, so that open is never negative.
            let accepted = counters.accepted.get();
            sum.accepted += accepted;
            sum.open += accepted.saturating_sub(closed);
            sum.refused += counters.refused.get();
            sum.refused_source += counters.refused_source.get();
            sum.accept_errors += counters.accept_errors.get();
            sum.bytes_in += counters.bytes_in.get();
            sum.bytes_out += counters.bytes_out.get();
            sum.consumed += counters.consumed.get();
            sum.blocked += counters.blocked.get();
            sum.turns += counters.turns.get();
            sum.memory += counters.memory.load(std::sync::atomic::Ordering::Relaxed) as u64;
        }
        sum
    }
}
