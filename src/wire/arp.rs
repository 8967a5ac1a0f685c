//! ARP for IPv4 over Ethernet (RFC 826).

use super::ethernet::Mac;

/// Bytes of a packet.
pub const LEN: usize = 28;
/// Operation: who has this address?
pub const REQUEST: u16 = 1;
/// Operation: I have.
pub const REPLY: u16 = 2;
/// Hardware type Ethernet, protocol IPv4, address lengths 6 and 4.
const FIXED: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// A packet's fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// [`REQUEST`] or [`REPLY`].
    pub operation: u16,
    /// Ethernet address of the sender.
    pub sender_mac: Mac,
    /// IPv4 address of the sender; zero in a probe (RFC 5227).
    pub sender_ip: [u8; 4],
    /// Ethernet address of the target; meaningless in a request.
    pub target_mac: Mac,
    /// IPv4 address of the target.
    pub target_ip: [u8; 4],
}

impl Packet {
    /// Reads a packet; `None` when it is cut off, not IPv4 over Ethernet, or neither request nor
    /// reply. Bytes behind it are padding.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; LEN] = bytes.first_chunk()?;
        let operation = u16::from_be_bytes([bytes[6], bytes[7]]);
        if bytes[..6] != FIXED || !(operation == REQUEST || operation == REPLY) {
            return None;
        }
        Some(Self {
            operation,
            sender_mac: bytes[8..14].try_into().ok()?,
            sender_ip: bytes[14..18].try_into().ok()?,
            target_mac: bytes[18..24].try_into().ok()?,
            target_ip: bytes[24..28].try_into().ok()?,
        })
    }

    /// Writes the packet; returns its length.
    ///
    /// # Panics
    /// When `out` is shorter than [`LEN`].
    pub fn emit(&self, out: &mut [u8]) -> usize {
        out[..6].copy_from_slice(&FIXED);
        out[6..8].copy_from_slice(&self.operation.to_be_bytes());
        out[8..14].copy_from_slice(&self.sender_mac);
        out[14..18].copy_from_slice(&self.sender_ip);
        out[18..24].copy_from_slice(&self.target_mac);
        out[24..28].copy_from_slice(&self.target_ip);
        LEN
    }
}
