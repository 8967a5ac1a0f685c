//! What an rx lcore counts of one port.
//!
//! Invariant: `received` is the sum of `delivered`, all of `handled` and all of `dropped`.

use super::drop_reason::DropReason;
use crate::telemetry::Counter;

/// A protocol answered or looked at here, as opposed to delivered to a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Handled {
    /// ARP.
    Arp,
    /// ICMP.
    Icmp,
    /// ICMPv6, neighbour discovery and MLD included.
    Icmpv6,
    /// IGMP.
    Igmp,
    /// A greeting of the datagram protocol, which no shard sees.
    Hello,
}

impl Handled {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Arp, Self::Icmp, Self::Icmpv6, Self::Igmp, Self::Hello];
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// The name in counters and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Arp => "arp",
            Self::Icmp => "icmp",
            Self::Icmpv6 => "icmpv6",
            Self::Igmp => "igmp",
            Self::Hello => "hello",
        }
    }
}

/// Counters of one rx lcore and port; written by that lcore alone.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Frames received.
    pub received: Counter,
    /// `received` by queue: the number of each queue that the lcore polls, and its frames.
    pub queues: Vec<(u16, Counter)>,
    /// Bytes of those frames, without check sequences.
    pub bytes: Counter,
    /// Frames handed to shards.
    pub delivered: Counter,
    /// Frames of control protocols, by `Handled as usize`.
    pub handled: [Counter; Handled::COUNT],
    /// Frames given up, by `DropReason as usize`.
    pub dropped: [Counter; DropReason::COUNT],
    /// Frames sent.
    pub sent: Counter,
    /// Frames that the NIC's transmit queue had no room for.
    pub send_dropped: Counter,
}

impl NetCounters {
    /// Counters of an lcore that polls these queues, in this order.
    pub fn new(queues: impl IntoIterator<Item = u16>) -> Self {
        let queues = queues.into_iter().map(|queue| (queue, Counter::new()));
        Self {
            queues: queues.collect(),
            ..Self::default()
        }
    }

    /// Counts one frame as handled.
    #[inline(always)]
    pub fn count_handled(&self, handled: Handled) {
        self.handled[handled as usize].add(1);
    }

    /// Counts one frame as dropped.
    #[inline(always)]
    pub fn count_dropped(&self, reason: DropReason) {
        self.dropped[reason as usize].add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_own_counter() {
        let counters = NetCounters::default();
        for (number, handled) in Handled::ALL.into_iter().enumerate() {
            counters.count_handled(handled);
            assert_eq!(counters.handled[number].get(), 1);
            assert!(!handled.name().is_empty());
        }
        for (number, reason) in DropReason::ALL.into_iter().enumerate() {
            counters.count_dropped(reason);
            assert_eq!(counters.dropped[number].get(), 1);
        }
    }
}
