//! Ethernet II frames with at most one VLAN tag (IEEE 802.3, 802.1Q) and the mapping of multicast
//! groups to addresses (RFC 1112 §6.4, RFC 2464 §7).

use std::net::{Ipv4Addr, Ipv6Addr};

/// A 48-bit address.
pub type Mac = [u8; 6];

/// Destination, source and type.
pub const HEADER_LEN: usize = 14;
/// What one 802.1Q tag adds.
pub const VLAN_TAG_LEN: usize = 4;
/// The shortest frame without its check sequence; shorter ones are padded (IEEE 802.3 §4A.2.3.2.4).
pub const MIN_FRAME_LEN: usize = 60;
/// All stations.
pub const BROADCAST: Mac = [0xff; 6];

/// Type of IPv4 (RFC 894).
pub const TYPE_IPV4: u16 = 0x0800;
/// Type of ARP (RFC 826).
pub const TYPE_ARP: u16 = 0x0806;
/// Type of a VLAN tag (IEEE 802.1Q).
pub const TYPE_VLAN: u16 = 0x8100;
/// Type of a service tag (IEEE 802.1ad).
pub const TYPE_SERVICE_VLAN: u16 = 0x88a8;
/// Type of IPv6 (RFC 2464).
pub const TYPE_IPV6: u16 = 0x86dd;

/// No VLAN tag, where a tag is a `u16`.
pub const NO_VLAN: u16 = 0xffff;
/// The 12 bits of a tag that are the VLAN's number.
pub const VLAN_ID_MASK: u16 = 0x0fff;

/// Whether this is a group address (broadcast included).
#[inline(always)]
pub const fn is_group(mac: &Mac) -> bool {
    mac[0] & 1 != 0
}

/// Bytes of the header with or without a tag.
#[inline(always)]
pub const fn header_len(vlan: u16) -> usize {
    if vlan == NO_VLAN {
        HEADER_LEN
    } else {
        HEADER_LEN + VLAN_TAG_LEN
    }
}

/// Writes the header and returns its length.
///
/// # Panics
/// When `out` is shorter than [`header_len`]`(vlan)`.
#[inline(always)]
pub fn emit(out: &mut [u8], destination: Mac, source: Mac, vlan: u16, ether_type: u16) -> usize {
    out[0..6].copy_from_slice(&destination);
    out[6..12].copy_from_slice(&source);
    if vlan == NO_VLAN {
        out[12..14].copy_from_slice(&ether_type.to_be_bytes());
        HEADER_LEN
    } else {
        out[12..14].copy_from_slice(&TYPE_VLAN.to_be_bytes());
        out[14..16].copy_from_slice(&(vlan & VLAN_ID_MASK).to_be_bytes());
        out[16..18].copy_from_slice(&ether_type.to_be_bytes());
        HEADER_LEN + VLAN_TAG_LEN
    }
}

/// Pads a frame of `len` bytes with zeros to [`MIN_FRAME_LEN`]; returns its length, `None` when
/// `out` has no room for the padding.
#[inline]
pub fn pad(out: &mut [u8], len: usize) -> Option<usize> {
    if len < MIN_FRAME_LEN {
        out.get_mut(len..MIN_FRAME_LEN)?.fill(0);
    }
    Some(len.max(MIN_FRAME_LEN))
}

/// The Ethernet address of an IPv4 group: the low 23 bits behind 01-00-5e.
pub const fn group_mac_v4(group: Ipv4Addr) -> Mac {
    let [_, b, c, d] = group.octets();
    [0x01, 0x00, 0x5e, b & 0x7f, c, d]
}

/// The Ethernet address of an IPv6 group: the low 32 bits behind 33-33.
pub const fn group_mac_v6(group: Ipv6Addr) -> Mac {
    let ip = group.octets();
    [0x33, 0x33, ip[12], ip[13], ip[14], ip[15]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_map_as_in_the_rfcs() {
        assert_eq!(
            group_mac_v4(Ipv4Addr::new(239, 129, 2, 3)),
            [0x01, 0, 0x5e, 1, 2, 3]
        );
        assert_eq!(
            group_mac_v6("ff02::1:ff12:3456".parse().unwrap()),
            [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]
        );
    }

    #[test]
    fn headers_with_and_without_tag() {
        let mut out = [0; 64];
        assert_eq!(emit(&mut out, BROADCAST, [2; 6], NO_VLAN, TYPE_ARP), 14);
        assert_eq!(out[12..14], [8, 6]);
        assert_eq!(emit(&mut out, BROADCAST, [2; 6], 100, TYPE_IPV4), 18);
        assert_eq!(out[12..18], [0x81, 0, 0, 100, 8, 0]);
        assert_eq!(pad(&mut out, 42), Some(60));
        assert_eq!(pad(&mut out[..50], 42), None);
    }
}
