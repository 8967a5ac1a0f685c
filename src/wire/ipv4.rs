//! The IPv4 header (RFC 791).

use super::checksum::Sum;

/// Header without options.
pub const HEADER_LEN: usize = 20;
/// Offset of the source address; the destination follows.
pub const SOURCE: usize = 12;
/// Offset of the destination address.
pub const DESTINATION: usize = 16;
/// Protocol number of ICMP (RFC 792).
pub const PROTOCOL_ICMP: u8 = 1;
/// Protocol number of IGMP (RFC 2236).
pub const PROTOCOL_IGMP: u8 = 2;
/// Protocol number of UDP (RFC 768).
pub const PROTOCOL_UDP: u8 = 17;
/// The "more fragments" bit and the 13 bits of the fragment offset.
pub const FRAGMENT_MASK: u16 = 0x3fff;
/// The "don't fragment" bit.
pub const DONT_FRAGMENT: u16 = 0x4000;
/// Time to live of what we send (RFC 1700's recommendation).
pub const DEFAULT_TTL: u8 = 64;
/// The router alert option (RFC 2113), required of IGMP (RFC 3376 §4).
pub const ROUTER_ALERT: [u8; 4] = [0x94, 0x04, 0, 0];

/// What `Header::emit` writes.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    /// Source address.
    pub source: [u8; 4],
    /// Destination address.
    pub destination: [u8; 4],
    /// Protocol number of the payload.
    pub protocol: u8,
    /// Time to live.
    pub ttl: u8,
    /// Whether to carry [`ROUTER_ALERT`].
    pub router_alert: bool,
    /// Bytes behind the header.
    pub payload_len: u16,
}

impl Header {
    /// Bytes of the header.
    #[allow(clippy::len_without_is_empty)] // a length in bytes, not a container
    pub const fn len(&self) -> usize {
        if self.router_alert {
            HEADER_LEN + ROUTER_ALERT.len()
        } else {
            HEADER_LEN
        }
    }

    /// Writes the header, checksum included, with "don't fragment" and identification 0 (RFC 6864
    /// §4.1); returns its length.
    ///
    /// # Panics
    /// When `out` is shorter than [`Header::len`] or the packet longer than 65 535 bytes.
    #[inline]
    pub fn emit(&self, out: &mut [u8]) -> usize {
        let len = self.len();
        let out = &mut out[..len];
        out[0] = 0x40 | (len / 4) as u8;
        out[1] = 0;
        out[2..4].copy_from_slice(&(self.payload_len + len as u16).to_be_bytes());
        out[4..6].fill(0);
        out[6..8].copy_from_slice(&DONT_FRAGMENT.to_be_bytes());
        out[8] = self.ttl;
        out[9] = self.protocol;
        out[10..12].fill(0);
        out[12..16].copy_from_slice(&self.source);
        out[16..20].copy_from_slice(&self.destination);
        if self.router_alert {
            out[20..24].copy_from_slice(&ROUTER_ALERT);
        }
        let checksum = Sum::of(out).checksum();
        out[10..12].copy_from_slice(&checksum.to_be_bytes());
        len
    }
}
