//! The UDP header (RFC 768; over IPv6 RFC 8200 §8.1).

use super::checksum::{Sum, pseudo_header};
use super::ipv4::PROTOCOL_UDP;

/// Ports, length and checksum.
pub const HEADER_LEN: usize = 8;

/// Writes the header before a payload that is in place already: `out` is header and payload,
/// `addresses` are source and destination as they lie in the IP header (8 or 32 bytes).
///
/// # Panics
/// When `out` is shorter than [`HEADER_LEN`] or longer than 65 535 bytes.
#[inline]
pub fn emit(out: &mut [u8], addresses: &[u8], source_port: u16, destination_port: u16) {
    let len = u16::try_from(out.len()).expect("a UDP datagram has at most 65535 bytes");
    out[0..2].copy_from_slice(&source_port.to_be_bytes());
    out[2..4].copy_from_slice(&destination_port.to_be_bytes());
    out[4..6].copy_from_slice(&len.to_be_bytes());
    out[6..8].fill(0);
    let checksum = pseudo_header(addresses, PROTOCOL_UDP, len)
        .plus(Sum::of(out))
        .udp_checksum();
    out[6..8].copy_from_slice(&checksum.to_be_bytes());
}
