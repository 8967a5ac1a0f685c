//! ICMP for IPv4 (RFC 792): echo and port unreachable.

use super::checksum::Sum;

/// Type, code, checksum and four bytes that depend on the type.
pub const HEADER_LEN: usize = 8;
/// Type: echo reply.
pub const ECHO_REPLY: u8 = 0;
/// Type: destination unreachable.
pub const UNREACHABLE: u8 = 3;
/// Code of [`UNREACHABLE`]: no listener on this port.
pub const CODE_PORT: u8 = 3;
/// Type: echo request.
pub const ECHO_REQUEST: u8 = 8;
/// Largest error message, IP header included (RFC 1812 §4.3.2.3).
pub const MAX_ERROR_PACKET: usize = 576;

/// Fills in the checksum of a whole message.
///
/// # Panics
/// When `message` is shorter than [`HEADER_LEN`].
pub fn fill_checksum(message: &mut [u8]) {
    message[2..4].fill(0);
    let checksum = Sum::of(message).checksum();
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
}
