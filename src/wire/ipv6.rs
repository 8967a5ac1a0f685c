//! The IPv6 header and the extension headers that may precede UDP and ICMPv6 (RFC 8200).

/// The fixed header.
pub const HEADER_LEN: usize = 40;
/// Offset of the source address; the destination follows.
pub const SOURCE: usize = 8;
/// Offset of the destination address.
pub const DESTINATION: usize = 24;
/// Next header: hop-by-hop options; only directly behind the fixed header.
pub const NEXT_HOP_BY_HOP: u8 = 0;
/// Next header: UDP.
pub const NEXT_UDP: u8 = 17;
/// Next header: routing.
pub const NEXT_ROUTING: u8 = 43;
/// Next header: fragment.
pub const NEXT_FRAGMENT: u8 = 44;
/// Of a fragment header's bytes 2 and 3: the offset and the "more fragments" bit.
pub const FRAGMENT_MASK: u16 = 0xfff9;
/// Next header: ICMPv6 (RFC 4443).
pub const NEXT_ICMPV6: u8 = 58;
/// Next header: destination options.
pub const NEXT_DESTINATION: u8 = 60;
/// Hop limit of what we send to peers.
pub const DEFAULT_HOP_LIMIT: u8 = 64;
/// A hop-by-hop header that holds the router alert "MLD" (RFC 2711) and padding, as MLD requires
/// (RFC 3810 §5); the first byte is the next header.
pub const ROUTER_ALERT_MLD: [u8; 8] = [NEXT_ICMPV6, 0, 5, 2, 0, 0, 1, 0];

/// What [`Header::emit`] writes.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    /// Source address.
    pub source: [u8; 16],
    /// Destination address.
    pub destination: [u8; 16],
    /// What follows.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Bytes behind the fixed header.
    pub payload_len: u16,
}

impl Header {
    /// Writes the fixed header; returns its length.
    ///
    /// # Panics
    /// When `out` is shorter than [`HEADER_LEN`].
    #[inline]
    pub fn emit(&self, out: &mut [u8]) -> usize {
        out[0..4].copy_from_slice(&[0x60, 0, 0, 0]);
        out[4..6].copy_from_slice(&self.payload_len.to_be_bytes());
        out[6] = self.next_header;
        out[7] = self.hop_limit;
        out[8..24].copy_from_slice(&self.source);
        out[24..40].copy_from_slice(&self.destination);
        HEADER_LEN
    }
}
