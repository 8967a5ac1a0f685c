//! Why a frame or a reply was given up: a closed set, one counter each.
//!
//! Invariant: every frame received is counted exactly once: delivered, handled or under one of
//! these. The names are part of the metrics' interface and do not change.

/// Why a frame went no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// Shorter than an Ethernet header, than its IP length says, or cut inside a header.
    Truncated,
    /// IP version or header length is impossible.
    BadIpHeader,
    /// The IPv4 header checksum does not hold.
    BadIpv4Checksum,
    /// The UDP checksum does not hold, or is missing over IPv6.
    BadUdpChecksum,
    /// The UDP length is below 8 or beyond the IP payload.
    BadLength,
    /// An IPv4 or IPv6 fragment; datagrams are not reassembled.
    Fragment,
    /// Neither IPv4, IPv6 nor ARP.
    UnknownEthertype,
    /// For us, but neither UDP nor a control protocol answered here.
    UnknownProtocol,
    /// A UDP port that no listener has.
    UnknownPort,
    /// A MAC or IP address that is not ours, or a group that was not joined.
    NotForUs,
    /// A VLAN tag other than the port's.
    WrongVlan,
    /// The frame lies in more than one buffer.
    MultiSegment,
    /// Malformed ARP.
    BadArp,
    /// Malformed ICMP, ICMPv6 or IGMP, or one with a wrong checksum.
    BadIcmp,
    /// The datagram protocol was not understood.
    BadDatagram,
    /// A record batch for a topic or partition that is not served; its producer is told.
    UnknownPartition,
    /// A reply was due but could not be built or sent.
    NoAnswerRoom,
    /// A source address that no host on a wire has: loopback, a group or the limited broadcast.
    BadSource,
}

impl DropReason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 18] = [
        Self::Truncated,
        Self::BadIpHeader,
        Self::BadIpv4Checksum,
        Self::BadUdpChecksum,
        Self::BadLength,
        Self::Fragment,
        Self::UnknownEthertype,
        Self::UnknownProtocol,
        Self::UnknownPort,
        Self::NotForUs,
        Self::WrongVlan,
        Self::MultiSegment,
        Self::BadArp,
        Self::BadIcmp,
        Self::BadDatagram,
        Self::UnknownPartition,
        Self::NoAnswerRoom,
        Self::BadSource,
    ];

    /// How many there are, for arrays indexed by `reason as usize`.
    pub const COUNT: usize = Self::ALL.len();

    /// The name in counters and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::BadIpHeader => "bad_ip_header",
            Self::BadIpv4Checksum => "bad_ipv4_checksum",
            Self::BadUdpChecksum => "bad_udp_checksum",
            Self::BadLength => "bad_length",
            Self::Fragment => "fragment",
            Self::UnknownEthertype => "unknown_ethertype",
            Self::UnknownProtocol => "unknown_protocol",
            Self::UnknownPort => "unknown_port",
            Self::NotForUs => "not_for_us",
            Self::WrongVlan => "wrong_vlan",
            Self::MultiSegment => "multi_segment",
            Self::BadArp => "bad_arp",
            Self::BadIcmp => "bad_icmp",
            Self::BadDatagram => "bad_datagram",
            Self::UnknownPartition => "unknown_partition",
            Self::NoAnswerRoom => "no_answer_room",
            Self::BadSource => "bad_source",
        }
    }
}

impl std::fmt::Display for DropReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_index_all_and_names_differ() {
        for (number, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, number);
            assert_eq!(
                DropReason::ALL
                    .iter()
                    .filter(|other| other.name() == reason.name())
                    .count(),
                1
            );
        }
    }
}
