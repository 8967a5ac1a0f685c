//! ICMPv6 (RFC 4443), neighbour discovery (RFC 4861) and MLD (RFC 2710, RFC 3810).

use super::checksum::{Sum, pseudo_header};
use super::ipv6::NEXT_ICMPV6;

/// Type, code and checksum.
pub const HEADER_LEN: usize = 4;
/// Type: destination unreachable.
pub const UNREACHABLE: u8 = 1;
/// Code of [`UNREACHABLE`]: no listener on this port.
pub const CODE_PORT: u8 = 4;
/// Type: echo request.
pub const ECHO_REQUEST: u8 = 128;
/// Type: echo reply.
pub const ECHO_REPLY: u8 = 129;
/// Type: MLD query, all versions.
pub const MLD_QUERY: u8 = 130;
/// Type: neighbour solicitation.
pub const NEIGHBOUR_SOLICITATION: u8 = 135;
/// Type: neighbour advertisement.
pub const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Type: MLDv2 report.
pub const MLD2_REPORT: u8 = 143;
/// Neighbour advertisement: the answer to a solicitation.
pub const FLAG_SOLICITED: u8 = 0x40;
/// Neighbour advertisement: replaces what a cache holds.
pub const FLAG_OVERRIDE: u8 = 0x20;
/// Option: Ethernet address of the target (RFC 4861 §4.6.1).
pub const OPTION_TARGET_ADDRESS: u8 = 2;
/// A solicitation or advertisement without options.
pub const NEIGHBOUR_LEN: usize = 24;
/// An advertisement with the option.
pub const ADVERTISEMENT_LEN: usize = NEIGHBOUR_LEN + 8;
/// Hop limit of neighbour discovery: 255 shows that no router was on the way (RFC 4861 §7.1).
pub const NEIGHBOUR_HOP_LIMIT: u8 = 255;
/// Shortest MLD query, version 1.
pub const MLD_QUERY_LEN: usize = 24;
/// An MLDv2 report before its records.
pub const MLD2_REPORT_HEADER_LEN: usize = 8;
/// A group record without sources.
pub const MLD2_RECORD_LEN: usize = 20;
/// Largest error message, IP header included: the minimum MTU (RFC 4443 §2.4 c).
pub const MAX_ERROR_PACKET: usize = 1280;

/// Fills in the checksum of a whole message; `addresses` are source and destination.
///
/// # Panics
/// When `message` is shorter than [`HEADER_LEN`] or longer than 65 535 bytes.
pub fn fill_checksum(message: &mut [u8], addresses: &[u8]) {
    message[2..4].fill(0);
    let len = u16::try_from(message.len()).expect("an IPv6 payload has at most 65535 bytes");
    let checksum = pseudo_header(addresses, NEXT_ICMPV6, len)
        .plus(Sum::of(message))
        .checksum();
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
}

/// Reads a neighbour solicitation: its target, when the message is well-formed (RFC 4861 §7.1.1).
pub fn solicitation_target(message: &[u8]) -> Option<[u8; 16]> {
    if message.len() < NEIGHBOUR_LEN || message[0] != NEIGHBOUR_SOLICITATION || message[1] != 0 {
        return None;
    }
    let mut options = &message[NEIGHBOUR_LEN..];
    while !options.is_empty() {
        // Lengths count 8 bytes; zero is forbidden.
        let len = usize::from(*options.get(1)?) * 8;
        if len == 0 {
            return None;
        }
        options = options.get(len..)?;
    }
    let target: [u8; 16] = message[8..24].try_into().ok()?;
    (target[0] != 0xff).then_some(target)
}

/// Writes a neighbour advertisement without its checksum; returns its length.
///
/// # Panics
/// When `out` is shorter than [`ADVERTISEMENT_LEN`].
pub fn emit_advertisement(out: &mut [u8], flags: u8, target: [u8; 16], mac: [u8; 6]) -> usize {
    out[..8].copy_from_slice(&[NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0]);
    out[8..24].copy_from_slice(&target);
    out[24..26].copy_from_slice(&[OPTION_TARGET_ADDRESS, 1]);
    out[26..32].copy_from_slice(&mac);
    ADVERTISEMENT_LEN
}

/// Group record types of MLDv2 (RFC 3810 §5.2.12) and IGMPv3 (RFC 3376 §4.2.12).
pub mod record {
    /// Current state: everything but no source, that is, a plain member.
    pub const IS_EXCLUDE: u8 = 2;
    /// State change to the same: joins.
    pub const TO_EXCLUDE: u8 = 4;
}
