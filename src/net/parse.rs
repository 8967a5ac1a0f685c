//! One pass over a received frame: what is it, where is its payload, or why is it dropped.
//!
//! Checks in this order, the first that fails names the drop: Ethernet length, VLAN, destination
//! MAC, type; IP version, lengths and header checksum; destination address; source address;
//! fragments; protocol; then UDP length and checksum. So a frame that is not for us is `not_for_us` whatever it carries.
//!
//! Invariants: no byte outside the frame is read and no input panics; offsets in the result lie
//! within the frame (frames beyond 65 535 bytes are seen cut to that).
//!
//! Sources: RFC 791, RFC 8200, RFC 768, RFC 826, RFC 1122 §3.2.1.

use super::drop_reason::DropReason;
use super::interface::{Interface, Relation};
use crate::wire::checksum::{Sum, pseudo_header};
use crate::wire::ethernet::{self, Mac, NO_VLAN};
use crate::wire::{arp, ipv4, ipv6, udp};

/// Extension headers walked before a packet is refused; real ones have at most three.
const MAX_EXTENSION_HEADERS: usize = 8;

/// What is known of a frame besides its bytes.
#[derive(Debug, Clone, Copy)]
pub struct ParseOptions<'a> {
    /// Who we are.
    pub interface: &'a Interface,
    /// The NIC found the IPv4 header checksum good.
    pub l3_good: bool,
    /// The NIC found the UDP checksum good.
    pub l4_good: bool,
    /// Also take a UDP checksum field that holds only the folded, un-complemented sum of the
    /// pseudo-header. Linux leaves that in packets whose checksum a device was to finish
    /// (`CHECKSUM_PARTIAL`); on veth and tap no device does, and AF_PACKET and AF_XDP show it so.
    pub partial_checksums: bool,
    /// The VLAN id that the NIC or kernel took out of the frame, [`NO_VLAN`] for none.
    pub stripped_vlan: u16,
}

impl<'a> ParseOptions<'a> {
    /// Everything is checked in software.
    pub fn new(interface: &'a Interface) -> Self {
        Self {
            interface,
            l3_good: false,
            l4_good: false,
            partial_checksums: false,
            stripped_vlan: NO_VLAN,
        }
    }
}

/// A UDP datagram for one of our addresses or groups; offsets count from the frame's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpPacket {
    /// Of the UDP payload.
    pub payload_offset: u16,
    /// Bytes of UDP payload.
    pub payload_len: u16,
    /// Of the IP header.
    pub ip_offset: u16,
    /// Sender's port.
    pub src_port: u16,
    /// Our port.
    pub dst_port: u16,
    /// 4 or 6.
    pub ip_version: u8,
    /// What the destination address is to us; never foreign.
    pub relation: Relation,
}

/// A control message; offsets count from the frame's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlPacket {
    /// Of the IP header; of the ARP packet for ARP.
    pub ip_offset: u16,
    /// Of the message.
    pub offset: u16,
    /// Bytes of the message, without padding.
    pub len: u16,
    /// What the destination address is to us; foreign for groups whose ICMPv6 is only looked at.
    pub relation: Relation,
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// A datagram, checksum verified.
    Udp(UdpPacket),
    /// Well-formed ARP.
    Arp(ControlPacket),
    /// ICMP over IPv4, checksum verified.
    Icmp(ControlPacket),
    /// ICMPv6, checksum verified.
    Icmpv6(ControlPacket),
    /// IGMP, checksum verified.
    Igmp(ControlPacket),
    /// Nothing for us.
    Drop(DropReason),
}

impl UdpPacket {
    /// The payload within its frame.
    ///
    /// # Panics
    /// When `frame` is not the frame that was parsed.
    #[inline(always)]
    pub fn payload<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        &frame[usize::from(self.payload_offset)..][..usize::from(self.payload_len)]
    }

    /// The sender's address, 4 or 16 bytes.
    ///
    /// # Panics
    /// When `frame` is not the frame that was parsed.
    #[inline(always)]
    pub fn src<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        let ip = usize::from(self.ip_offset);
        if self.ip_version == 4 {
            &frame[ip + ipv4::SOURCE..][..4]
        } else {
            &frame[ip + ipv6::SOURCE..][..16]
        }
    }

    /// The address it was sent to, 4 or 16 bytes.
    ///
    /// # Panics
    /// When `frame` is not the frame that was parsed.
    #[inline(always)]
    pub fn dst<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        let ip = usize::from(self.ip_offset);
        if self.ip_version == 4 {
            &frame[ip + ipv4::DESTINATION..][..4]
        } else {
            &frame[ip + ipv6::DESTINATION..][..16]
        }
    }
}

#[inline(always)]
pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[inline(always)]
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// The value of an option, or return with the reason to drop.
///
/// The functions below return [`Parsed`] itself instead of a `Result` of it: the compiler builds that
/// in place, while taking it out of a `Result` copied it by wider loads than it had been stored by,
/// which stalls until the stores have left the pipeline.
macro_rules! require {
    ($option:expr, $reason:expr) => {
        match $option {
            Some(value) => value,
            None => return Parsed::Drop($reason),
        }
    };
}

/// Reads `frame`, which begins with the Ethernet destination and has no check sequence behind it.
///
/// Cost: the headers, plus one pass over the UDP payload unless the NIC verified the checksum.
#[inline]
pub fn parse(frame: &[u8], options: &ParseOptions<'_>) -> Parsed {
    let frame = &frame[..frame.len().min(usize::from(u16::MAX))];
    parse_ethernet(frame, options)
}

#[inline(always)]
fn parse_ethernet(frame: &[u8], options: &ParseOptions<'_>) -> Parsed {
    let header: &[u8; ethernet::HEADER_LEN] = require!(frame.first_chunk(), DropReason::Truncated);
    let mut ether_type = be16(header, 12);
    let mut vlan = options.stripped_vlan;
    let mut offset = ethernet::HEADER_LEN;
    if ether_type == ethernet::TYPE_VLAN || ether_type == ethernet::TYPE_SERVICE_VLAN {
        // A second tag, and one of a provider's network, belong to no VLAN of ours.
        if vlan != NO_VLAN || ether_type == ethernet::TYPE_SERVICE_VLAN {
            return Parsed::Drop(DropReason::WrongVlan);
        }
        let tag: &[u8; 4] = require!(frame[offset..].first_chunk(), DropReason::Truncated);
        vlan = be16(tag, 0) & ethernet::VLAN_ID_MASK;
        ether_type = be16(tag, 2);
        offset += ethernet::VLAN_TAG_LEN;
        if ether_type == ethernet::TYPE_VLAN || ether_type == ethernet::TYPE_SERVICE_VLAN {
            return Parsed::Drop(DropReason::WrongVlan);
        }
    }
    // VLAN 0 only carries a priority (IEEE 802.1Q §9.6): such a frame counts as untagged.
    let vlan = if vlan == 0 { NO_VLAN } else { vlan };
    let interface = options.interface;
    if vlan != interface.vlan() {
        return Parsed::Drop(DropReason::WrongVlan);
    }
    let mac: Mac = array(header, 0);
    if !interface.accepts_mac(&mac) {
        // Of link-local groups that are not ours, ICMPv6 is looked at all the same.
        if ether_type == ethernet::TYPE_IPV6 && mac[0] == 0x33 && mac[1] == 0x33 {
            return match parse_ipv6(frame, offset, options) {
                parsed @ Parsed::Icmpv6(_) => parsed,
                _ => Parsed::Drop(DropReason::NotForUs),
            };
        }
        return Parsed::Drop(DropReason::NotForUs);
    }
    match ether_type {
        ethernet::TYPE_IPV4 => parse_ipv4(frame, offset, options),
        ethernet::TYPE_IPV6 => parse_ipv6(frame, offset, options),
        ethernet::TYPE_ARP => parse_arp(frame, offset),
        _ => Parsed::Drop(DropReason::UnknownEthertype),
    }
}

#[inline(never)]
fn parse_arp(frame: &[u8], offset: usize) -> Parsed {
    let _ = require!(arp::Packet::parse(&frame[offset..]), DropReason::BadArp);
    Parsed::Arp(ControlPacket {
        ip_offset: offset as u16,
        offset: offset as u16,
        len: arp::LEN as u16,
        relation: Relation::Foreign,
    })
}

#[inline(always)]
fn parse_ipv4(frame: &[u8], offset: usize, options: &ParseOptions<'_>) -> Parsed {
    let ip = &frame[offset..];
    let fixed: &[u8; ipv4::HEADER_LEN] = require!(ip.first_chunk(), DropReason::Truncated);
    let header_len = usize::from(fixed[0] & 0x0f) * 4;
    if fixed[0] >> 4 != 4 || header_len < ipv4::HEADER_LEN {
        return Parsed::Drop(DropReason::BadIpHeader);
    }
    let header_valid = if header_len == ipv4::HEADER_LEN {
        options.l3_good || Sum::of(fixed).is_valid()
    } else {
        let header = require!(ip.get(..header_len), DropReason::Truncated);
        options.l3_good || Sum::of(header).is_valid()
    };
    if !header_valid {
        return Parsed::Drop(DropReason::BadIpv4Checksum);
    }
    let total_len = usize::from(be16(fixed, 2));
    if total_len < header_len {
        return Parsed::Drop(DropReason::BadIpHeader);
    }
    // Bytes behind the total length are Ethernet padding.
    let packet = require!(ip.get(..total_len), DropReason::Truncated);
    let relation = options
        .interface
        .relation_v4(array(fixed, ipv4::DESTINATION));
    if relation == Relation::Foreign {
        return Parsed::Drop(DropReason::NotForUs);
    }
    // Loopback, groups, reserved, limited broadcast (RFC 1122 §3.2.1.3): must not be taken.
    if matches!(fixed[ipv4::SOURCE], 127 | 224..) {
        return Parsed::Drop(DropReason::BadSource);
    }
    if be16(fixed, 6) & ipv4::FRAGMENT_MASK != 0 {
        return Parsed::Drop(DropReason::Fragment);
    }
    let payload = &packet[header_len..];
    let payload_offset = offset + header_len;
    match fixed[9] {
        ipv4::PROTOCOL_UDP => {
            let (src_port, dst_port, len) =
                match parse_udp(payload, &fixed[ipv4::SOURCE..], false, options) {
                    Ok(found) => found,
                    Err(reason) => return Parsed::Drop(reason),
                };
            Parsed::Udp(UdpPacket {
                payload_offset: (payload_offset + udp::HEADER_LEN) as u16,
                payload_len: len,
                ip_offset: offset as u16,
                src_port,
                dst_port,
                ip_version: 4,
                relation,
            })
        }
        protocol @ (ipv4::PROTOCOL_ICMP | ipv4::PROTOCOL_IGMP) => {
            // Both have a header of 8 bytes and a checksum over the message alone.
            if payload.len() < 8 || !Sum::of(payload).is_valid() {
                return Parsed::Drop(DropReason::BadIcmp);
            }
            let packet = ControlPacket {
                ip_offset: offset as u16,
                offset: payload_offset as u16,
                len: payload.len() as u16,
                relation,
            };
            if protocol == ipv4::PROTOCOL_ICMP {
                Parsed::Icmp(packet)
            } else {
                Parsed::Igmp(packet)
            }
        }
        _ => Parsed::Drop(DropReason::UnknownProtocol),
    }
}

#[inline]
fn parse_ipv6(frame: &[u8], offset: usize, options: &ParseOptions<'_>) -> Parsed {
    let ip = &frame[offset..];
    let fixed: &[u8; ipv6::HEADER_LEN] = require!(ip.first_chunk(), DropReason::Truncated);
    if fixed[0] >> 4 != 6 {
        return Parsed::Drop(DropReason::BadIpHeader);
    }
    let payload_len = usize::from(be16(fixed, 4));
    let packet = require!(
        ip.get(..ipv6::HEADER_LEN + payload_len),
        DropReason::Truncated
    );
    let destination: [u8; 16] = array(fixed, ipv6::DESTINATION);
    let relation = options.interface.relation_v6(destination);
    // Neighbour discovery and MLD talk to groups we need not be in: theirs is looked at below.
    let link_local_group = destination[0] == 0xff && destination[1] & 0x0f == 2;
    if relation == Relation::Foreign && !link_local_group {
        return Parsed::Drop(DropReason::NotForUs);
    }
    // A group or loopback (RFC 4291 §2.5.3, §2.7): must not be taken.
    let source: [u8; 16] = array(fixed, ipv6::SOURCE);
    if source[0] == 0xff || u128::from_be_bytes(source) == 1 {
        return Parsed::Drop(if relation == Relation::Foreign {
            DropReason::NotForUs
        } else {
            DropReason::BadSource
        });
    }
    let mut next_header = fixed[6];
    let mut at = ipv6::HEADER_LEN;
    if next_header != ipv6::NEXT_UDP {
        (next_header, at) = match skip_extension_headers(packet, next_header) {
            Ok(found) => found,
            Err(_) if relation == Relation::Foreign => return Parsed::Drop(DropReason::NotForUs),
            Err(reason) => return Parsed::Drop(reason),
        };
    }
    if relation == Relation::Foreign && next_header != ipv6::NEXT_ICMPV6 {
        return Parsed::Drop(DropReason::NotForUs);
    }
    let payload = &packet[at..];
    let payload_offset = offset + at;
    match next_header {
        ipv6::NEXT_UDP => {
            let (src_port, dst_port, len) =
                match parse_udp(payload, &fixed[ipv6::SOURCE..], true, options) {
                    Ok(found) => found,
                    Err(reason) => return Parsed::Drop(reason),
                };
            Parsed::Udp(UdpPacket {
                payload_offset: (payload_offset + udp::HEADER_LEN) as u16,
                payload_len: len,
                ip_offset: offset as u16,
                src_port,
                dst_port,
                ip_version: 6,
                relation,
            })
        }
        ipv6::NEXT_ICMPV6 => {
            let len = payload.len() as u16;
            let sum = pseudo_header(&fixed[ipv6::SOURCE..], ipv6::NEXT_ICMPV6, len)
                .plus(Sum::of(payload));
            // Type, code and checksum are common to all messages (RFC 4443 §2.1).
            if payload.len() < 4 || !sum.is_valid() {
                return Parsed::Drop(DropReason::BadIcmp);
            }
            Parsed::Icmpv6(ControlPacket {
                ip_offset: offset as u16,
                offset: payload_offset as u16,
                len,
                relation,
            })
        }
        _ => Parsed::Drop(DropReason::UnknownProtocol),
    }
}

/// Finds the first header that is no extension header; `packet` begins with the fixed header.
#[inline(never)]
fn skip_extension_headers(packet: &[u8], first: u8) -> Result<(u8, usize), DropReason> {
    let mut next_header = first;
    let mut at = ipv6::HEADER_LEN;
    for index in 0..MAX_EXTENSION_HEADERS {
        match next_header {
            ipv6::NEXT_HOP_BY_HOP if index > 0 => return Err(DropReason::BadIpHeader),
            ipv6::NEXT_HOP_BY_HOP | ipv6::NEXT_DESTINATION | ipv6::NEXT_ROUTING => {}
            ipv6::NEXT_FRAGMENT => {}
            _ => return Ok((next_header, at)),
        }
        let fixed: &[u8; 8] = packet[at..].first_chunk().ok_or(DropReason::Truncated)?;
        if next_header == ipv6::NEXT_FRAGMENT {
            // Offset 0 and nothing to follow: a whole packet (RFC 8200 §4.5, RFC 6946).
            if be16(fixed, 2) & ipv6::FRAGMENT_MASK != 0 {
                return Err(DropReason::Fragment);
            }
            next_header = fixed[0];
            at += fixed.len();
            continue;
        }
        let len = 8 + usize::from(fixed[1]) * 8;
        let header = packet.get(at..at + len).ok_or(DropReason::Truncated)?;
        if next_header == ipv6::NEXT_ROUTING {
            // With segments left the packet is on its way to somebody else (RFC 8200 §4.4).
            if header[3] != 0 {
                return Err(DropReason::BadIpHeader);
            }
        } else {
            check_options(&header[2..])?;
        }
        next_header = header[0];
        at += len;
    }
    Err(DropReason::BadIpHeader)
}

/// Options whose type asks that an ignorant receiver drop the packet (RFC 8200 §4.2), and
/// malformed ones, are refused; none needs to be understood here.
fn check_options(mut options: &[u8]) -> Result<(), DropReason> {
    while let [kind, rest @ ..] = options {
        if *kind == 0 {
            options = rest; // Pad1
            continue;
        }
        if kind >> 6 != 0 {
            return Err(DropReason::BadIpHeader);
        }
        let [len, rest @ ..] = rest else {
            return Err(DropReason::BadIpHeader);
        };
        options = rest
            .get(usize::from(*len)..)
            .ok_or(DropReason::BadIpHeader)?;
    }
    Ok(())
}

/// Checks a UDP header and checksum; `addresses` are the IP header's two. Returns source port,
/// destination port and payload length.
#[inline(always)]
fn parse_udp(
    payload: &[u8],
    addresses: &[u8],
    checksum_required: bool,
    options: &ParseOptions<'_>,
) -> Result<(u16, u16, u16), DropReason> {
    let header: &[u8; udp::HEADER_LEN] = payload.first_chunk().ok_or(DropReason::Truncated)?;
    let len = be16(header, 4);
    if usize::from(len) < udp::HEADER_LEN || usize::from(len) > payload.len() {
        return Err(DropReason::BadLength);
    }
    let checksum = be16(header, 6);
    if checksum == 0 {
        if checksum_required {
            return Err(DropReason::BadUdpChecksum);
        }
    } else if !options.l4_good {
        let pseudo = pseudo_header(addresses, ipv4::PROTOCOL_UDP, len);
        let sum = pseudo.plus(Sum::of(&payload[..usize::from(len)]));
        let partial = options.partial_checksums && checksum == pseudo.fold();
        if !sum.is_valid() && !partial {
            return Err(DropReason::BadUdpChecksum);
        }
    }
    Ok((
        be16(header, 0),
        be16(header, 2),
        len - udp::HEADER_LEN as u16,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::InterfaceConfig;
    use std::net::{Ipv4Addr, Ipv6Addr};

    const OUR_MAC: Mac = [2, 0, 0, 0, 0, 1];
    const PEER_MAC: Mac = [2, 0, 0, 0, 0, 2];
    const OUR_V4: [u8; 4] = [10, 0, 0, 1];
    const GROUP_V4: [u8; 4] = [239, 1, 1, 1];

    fn our_v6() -> [u8; 16] {
        "fd00::1".parse::<Ipv6Addr>().unwrap().octets()
    }

    fn interface(vlan: Option<u16>) -> Interface {
        Interface::new(&InterfaceConfig {
            mac: OUR_MAC,
            addresses: vec![
                ("10.0.0.1".parse().unwrap(), 24),
                ("fd00::1".parse().unwrap(), 64),
            ],
            groups: vec![Ipv4Addr::from(GROUP_V4).into()],
            vlan,
            mtu: 1500,
            promiscuous: false,
        })
    }

    /// Parses with everything checked in software.
    fn check(frame: &[u8]) -> Parsed {
        let interface = interface(None);
        parse(frame, &ParseOptions::new(&interface))
    }

    #[track_caller]
    fn assert_drop(frame: &[u8], reason: DropReason) {
        assert_eq!(check(frame), Parsed::Drop(reason));
    }

    #[track_caller]
    fn assert_payload(frame: &[u8], payload: &[u8]) {
        match check(frame) {
            Parsed::Udp(packet) => assert_eq!(packet.payload(frame), payload),
            other => panic!("{other:?}"),
        }
    }

    /// A frame whose IP payload is `payload`, with `options` behind the fixed header.
    fn frame_v4(to: [u8; 4], protocol: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
        let mac = match to {
            OUR_V4 => OUR_MAC,
            [224..240, ..] => ethernet::group_mac_v4(to.into()),
            _ => OUR_MAC,
        };
        let mut frame = vec![0; 14];
        ethernet::emit(&mut frame, mac, PEER_MAC, NO_VLAN, ethernet::TYPE_IPV4);
        let mut ip = [0; 20];
        ipv4::Header {
            source: [10, 0, 0, 2],
            destination: to,
            protocol,
            ttl: 64,
            router_alert: false,
            payload_len: (options.len() + payload.len()) as u16,
        }
        .emit(&mut ip);
        frame.extend(ip);
        frame.extend(options);
        frame[14] = 0x40 | (5 + options.len() / 4) as u8;
        fix_v4(&mut frame);
        frame.extend(payload);
        frame
    }

    fn fix_v4(frame: &mut [u8]) {
        let len = usize::from(frame[14] & 15) * 4;
        frame[24..26].fill(0);
        let checksum = Sum::of(&frame[14..14 + len]).checksum();
        frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    }

    fn datagram(addresses: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 8];
        bytes.extend(payload);
        udp::emit(&mut bytes, addresses, 1000, 514);
        bytes
    }

    fn udp_v4(to: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let mut addresses = [10, 0, 0, 2, 0, 0, 0, 0];
        addresses[4..].copy_from_slice(&to);
        frame_v4(to, 17, &[], &datagram(&addresses, payload))
    }

    /// A frame with extension headers `chain` (the first's number is `first`) before a datagram.
    fn udp_v6(first: u8, chain: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 14];
        ethernet::emit(&mut frame, OUR_MAC, PEER_MAC, NO_VLAN, ethernet::TYPE_IPV6);
        let source = "fd00::2".parse::<Ipv6Addr>().unwrap().octets();
        let mut addresses = source.to_vec();
        addresses.extend(our_v6());
        let udp = datagram(&addresses, payload);
        let mut ip = [0; 40];
        ipv6::Header {
            source,
            destination: our_v6(),
            next_header: first,
            hop_limit: 64,
            payload_len: (chain.len() + udp.len()) as u16,
        }
        .emit(&mut ip);
        frame.extend(ip);
        frame.extend(chain);
        frame.extend(udp);
        frame
    }

    #[test]
    fn datagrams_with_options_headers_and_padding() {
        let mut frame = udp_v4(OUR_V4, b"message");
        assert_payload(&frame, b"message");
        frame.extend([0xaa; 20]);
        assert_payload(&frame, b"message");
        assert_payload(&udp_v4(GROUP_V4, b"message"), b"message");
        assert_payload(&udp_v4([10, 0, 0, 255], b"message"), b"message");
        assert_payload(&udp_v4(OUR_V4, b""), b"");
        let udp = datagram(&[10, 0, 0, 2, 10, 0, 0, 1], b"odd");
        assert_payload(&frame_v4(OUR_V4, 17, &[1; 40], &udp), b"odd");
        assert_payload(&udp_v6(17, &[], b"message"), b"message");
        // Hop-by-hop, destination and routing headers, one after the other.
        let chain = [
            [60, 0, 5, 2, 0, 0, 1, 0],
            [43, 0, 1, 4, 0, 0, 0, 0],
            [17, 0, 0, 0, 0, 0, 0, 0],
        ];
        assert_payload(&udp_v6(0, chain.as_flattened(), b"message"), b"message");
    }

    #[test]
    fn every_cut_is_noticed() {
        for frame in [udp_v4(OUR_V4, b"message"), udp_v6(17, &[], b"message")] {
            for len in 0..frame.len() {
                assert_drop(&frame[..len], DropReason::Truncated);
            }
        }
        assert_drop(&frame_v4(OUR_V4, 17, &[], &[0; 7]), DropReason::Truncated);
        assert_drop(
            &udp_v6(0, &[17, 9, 0, 0, 0, 0, 0, 0], b""),
            DropReason::Truncated,
        );
    }

    #[test]
    fn broken_ip_headers() {
        let good = udp_v4(OUR_V4, b"message");
        for (byte, reason) in [
            (0x55, DropReason::BadIpHeader),
            (0x44, DropReason::BadIpHeader),
        ] {
            let mut frame = good.clone();
            frame[14] = byte;
            assert_drop(&frame, reason);
        }
        let mut frame = good.clone();
        frame[22] ^= 1;
        assert_drop(&frame, DropReason::BadIpv4Checksum);
        let mut frame = good.clone();
        frame[16..18].copy_from_slice(&[0, 19]);
        fix_v4(&mut frame);
        assert_drop(&frame, DropReason::BadIpHeader);
        let mut frame = udp_v6(17, &[], b"message");
        frame[14] = 0x40;
        assert_drop(&frame, DropReason::BadIpHeader);
        for chain in [
            [17, 0, 0xc2, 4, 0, 0, 0, 0], // an option that must be understood
            [17, 0, 1, 5, 0, 0, 0, 0],    // an option beyond its header
            [0, 0, 1, 4, 0, 0, 0, 0],     // a second hop-by-hop header
        ] {
            assert_drop(&udp_v6(0, &chain, b"message"), DropReason::BadIpHeader);
        }
        assert_drop(
            &udp_v6(43, &[17, 0, 0, 1, 0, 0, 0, 0], b"message"),
            DropReason::BadIpHeader,
        );
        assert_drop(
            &udp_v6(60, [[60, 0, 1, 4, 0, 0, 0, 0]; 9].as_flattened(), b""),
            DropReason::BadIpHeader,
        );
    }

    #[test]
    fn broken_datagrams() {
        let good = udp_v4(OUR_V4, b"message");
        for len in [7, 16] {
            let mut frame = good.clone();
            frame[39] = len;
            assert_drop(&frame, DropReason::BadLength);
        }
        let mut frame = good.clone();
        *frame.last_mut().unwrap() ^= 0x10;
        assert_drop(&frame, DropReason::BadUdpChecksum);
        let mut frame = good.clone();
        frame[40..42].fill(0);
        assert_payload(&frame, b"message");
        let mut frame = udp_v6(17, &[], b"message");
        frame[60..62].fill(0);
        assert_drop(&frame, DropReason::BadUdpChecksum);
    }

    #[test]
    fn what_is_not_for_us() {
        let good = udp_v4(OUR_V4, b"message");
        for mac in [
            [2, 0, 0, 0, 0, 3],
            [1, 0, 0x5e, 1, 1, 2],
            [1, 0x80, 0xc2, 0, 0, 0],
        ] {
            let mut frame = good.clone();
            frame[..6].copy_from_slice(&mac);
            assert_drop(&frame, DropReason::NotForUs);
        }
        for to in [[10, 0, 0, 3], [239, 2, 1, 1]] {
            let mut frame = udp_v4(to, b"message");
            frame[..6].copy_from_slice(&OUR_MAC);
            assert_drop(&frame, DropReason::NotForUs);
            // Whatever else is wrong with it.
            frame[20] = 0x20;
            frame[23] = 6;
            fix_v4(&mut frame);
            assert_drop(&frame, DropReason::NotForUs);
        }
        let mut frame = udp_v6(17, &[], b"message");
        frame[53] = 9;
        assert_drop(&frame, DropReason::NotForUs);
        // A datagram to a link-local group that was not joined.
        let group: Ipv6Addr = "ff02::fb".parse().unwrap();
        frame[38..54].copy_from_slice(&group.octets());
        frame[..6].copy_from_slice(&ethernet::group_mac_v6(group));
        assert_drop(&frame, DropReason::NotForUs);
    }

    #[test]
    fn icmpv6_of_other_groups_is_looked_at() {
        let group: Ipv6Addr = "ff02::2".parse().unwrap();
        let source = "fe80::9".parse::<Ipv6Addr>().unwrap().octets();
        let mut frame = vec![0; 14 + 40 + 8];
        ethernet::emit(
            &mut frame,
            ethernet::group_mac_v6(group),
            PEER_MAC,
            NO_VLAN,
            ethernet::TYPE_IPV6,
        );
        ipv6::Header {
            source,
            destination: group.octets(),
            next_header: 58,
            hop_limit: 255,
            payload_len: 8,
        }
        .emit(&mut frame[14..]);
        frame[54] = 133; // router solicitation
        let mut addresses = source.to_vec();
        addresses.extend(group.octets());
        crate::wire::icmpv6::fill_checksum(&mut frame[54..], &addresses);
        assert!(
            matches!(check(&frame), Parsed::Icmpv6(packet) if packet.relation == Relation::Foreign)
        );
        frame[57] ^= 1;
        assert_drop(&frame, DropReason::NotForUs);
    }

    #[test]
    fn fragments_and_other_protocols() {
        for field in [[0x20, 0], [0, 1], [0x60, 0]] {
            let mut frame = udp_v4(OUR_V4, b"message");
            frame[20..22].copy_from_slice(&field);
            fix_v4(&mut frame);
            assert_drop(&frame, DropReason::Fragment);
        }
        assert_drop(
            &udp_v6(44, &[17, 0, 0, 1, 0, 0, 0, 1], b"message"),
            DropReason::Fragment,
        );
        assert_drop(
            &udp_v6(44, &[17, 0, 0x05, 0xc8, 0, 0, 0, 1], b"message"),
            DropReason::Fragment,
        );
        assert_drop(
            &udp_v6(44, &[44, 0, 0, 0, 0, 0, 0, 1, 17, 0, 0, 8], b"message"),
            DropReason::Fragment,
        );
        // Offset 0 and nothing to follow: a whole packet. The reserved bits mean nothing.
        for reserved in [0, 2, 6] {
            let header = [17, 0xff, 0, reserved, 0, 0, 0, 1];
            assert_payload(&udp_v6(44, &header, b"message"), b"message");
        }
        assert_drop(
            &frame_v4(OUR_V4, 6, &[], &[0; 20]),
            DropReason::UnknownProtocol,
        );
        assert_drop(&udp_v6(6, &[], b"message"), DropReason::UnknownProtocol);
        assert_drop(&udp_v6(59, &[], b"message"), DropReason::UnknownProtocol);
        assert_drop(
            &frame_v4(OUR_V4, 1, &[], &[8, 0, 0, 0, 0, 0, 0, 0]),
            DropReason::BadIcmp,
        );
        assert_drop(&frame_v4(OUR_V4, 2, &[], &[0xff; 7]), DropReason::BadIcmp);
        let mut frame = udp_v4(OUR_V4, b"message");
        frame[12..14].copy_from_slice(&[0x88, 0xcc]);
        assert_drop(&frame, DropReason::UnknownEthertype);
        frame[12..14].copy_from_slice(&[8, 6]);
        assert_drop(&frame, DropReason::BadArp);
    }

    #[test]
    fn impossible_sources() {
        for source in [[127, 0, 0, 1], [224, 0, 0, 1], [240, 0, 0, 1], [255; 4]] {
            let mut frame = udp_v4(OUR_V4, b"message");
            frame[26..30].copy_from_slice(&source);
            fix_v4(&mut frame);
            assert_drop(&frame, DropReason::BadSource);
            // For somebody else, it is that first of all.
            frame[33] = 9;
            fix_v4(&mut frame);
            assert_drop(&frame, DropReason::NotForUs);
        }
        for source in ["::1", "ff02::1", "ffff::"] {
            let mut frame = udp_v6(17, &[], b"message");
            let source: Ipv6Addr = source.parse().unwrap();
            frame[22..38].copy_from_slice(&source.octets());
            assert_drop(&frame, DropReason::BadSource);
            frame[53] = 9;
            assert_drop(&frame, DropReason::NotForUs);
        }
    }

    #[test]
    fn vlans() {
        let untagged = udp_v4(OUR_V4, b"message");
        let tagged = |tags: &[[u8; 4]]| {
            let mut frame = untagged.clone();
            frame.splice(12..12, tags.iter().flatten().copied());
            frame
        };
        let seven = tagged(&[[0x81, 0, 0xe0, 7]]);
        let priority = tagged(&[[0x81, 0, 0xe0, 0]]);
        let double = tagged(&[[0x81, 0, 0, 7], [0x81, 0, 0, 7]]);
        let service = tagged(&[[0x88, 0xa8, 0, 7]]);
        for (vlan, frame, stripped, good) in [
            (None, &untagged, NO_VLAN, true),
            (None, &priority, NO_VLAN, true),
            (None, &untagged, 0, true),
            (None, &untagged, 7, false),
            (None, &seven, NO_VLAN, false),
            (None, &double, NO_VLAN, false),
            (None, &service, NO_VLAN, false),
            (Some(7), &seven, NO_VLAN, true),
            (Some(7), &untagged, 7, true),
            (Some(7), &untagged, NO_VLAN, false),
            (Some(7), &priority, NO_VLAN, false),
            (Some(7), &double, NO_VLAN, false),
            (Some(7), &seven, 7, false),
            (Some(8), &seven, NO_VLAN, false),
        ] {
            let interface = interface(vlan);
            let mut options = ParseOptions::new(&interface);
            options.stripped_vlan = stripped;
            match parse(frame, &options) {
                Parsed::Udp(packet) if good => assert_eq!(packet.payload(frame), b"message"),
                Parsed::Drop(DropReason::WrongVlan) if !good => {}
                other => panic!("{vlan:?} {frame:?} {other:?}"),
            }
        }
        assert_drop(&priority[..17], DropReason::Truncated);
    }

    #[test]
    fn checksums_the_nic_or_nobody_verified() {
        let interface = interface(None);
        let mut options = ParseOptions::new(&interface);
        let mut frame = udp_v4(OUR_V4, b"message");
        let pseudo = pseudo_header(&frame[26..34], 17, 15).fold();
        frame[40..42].copy_from_slice(&pseudo.to_be_bytes());
        assert_eq!(
            parse(&frame, &options),
            Parsed::Drop(DropReason::BadUdpChecksum)
        );
        options.partial_checksums = true;
        assert!(matches!(parse(&frame, &options), Parsed::Udp(_)));
        frame[41] ^= 1;
        assert_eq!(
            parse(&frame, &options),
            Parsed::Drop(DropReason::BadUdpChecksum)
        );
        options.l4_good = true;
        assert!(matches!(parse(&frame, &options), Parsed::Udp(_)));
        frame[24] ^= 1;
        assert_eq!(
            parse(&frame, &options),
            Parsed::Drop(DropReason::BadIpv4Checksum)
        );
        options.l3_good = true;
        assert!(matches!(parse(&frame, &options), Parsed::Udp(_)));
    }
}
