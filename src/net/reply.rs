//! Frames back to a sender, and many acknowledgements in one datagram.
//!
//! Invariants: nothing is sent to a group or from one; no datagram exceeds the MTU (answers are
//! never fragmented); every UDP checksum is filled in, IPv6 requires it (RFC 8200 §8.1).

use super::drop_reason::DropReason;
use super::interface::{Interface, Relation};
use super::parse::{UdpPacket, array};
use crate::shard::ReplyTo;
use crate::wire::datagram::{self, ACK_ENTRY_LEN, AckEntry};
use crate::wire::{ethernet, ipv4, ipv6, udp};

/// The way back to the sender of `packet`, `rx` and `port` being the caller's own indices.
///
/// `None` where there is none: the sender has a group's or no address or port 0, or none of our
/// addresses can be the source of an answer to a group's datagram.
///
/// # Panics
/// When `packet` is not of `frame`.
#[inline]
pub fn reply_to(
    frame: &[u8],
    packet: &UdpPacket,
    interface: &Interface,
    rx: u8,
    port: u16,
) -> Option<ReplyTo> {
    let mac = array::<6>(frame, 6);
    if ethernet::is_group(&mac) || packet.src_port == 0 {
        return None;
    }
    let mut peer_ip = [0; 16];
    let mut local_ip = [0; 16];
    let (source, destination) = (packet.src(frame), packet.dst(frame));
    peer_ip[..source.len()].copy_from_slice(source);
    local_ip[..destination.len()].copy_from_slice(destination);
    if packet.ip_version == 4 {
        let peer = array(&peer_ip, 0);
        // Loopback and group sources are impossible on a wire (RFC 1122 §3.2.1.3).
        if matches!(peer[0], 0 | 127 | 224..) || interface.relation_v4(peer) != Relation::Foreign {
            return None;
        }
        if packet.relation != Relation::Own {
            local_ip[..4].copy_from_slice(&interface.source_v4(peer)?);
        }
    } else {
        if peer_ip[0] == 0xff || matches!(u128::from_be_bytes(peer_ip), 0 | 1) {
            return None;
        }
        if packet.relation != Relation::Own {
            local_ip = interface.source_v6(peer_ip)?;
        }
    }
    Some(ReplyTo {
        rx,
        ip_version: packet.ip_version,
        port,
        mac,
        vlan: interface.vlan(),
        peer_ip,
        local_ip,
        peer_port: packet.src_port,
        local_port: packet.dst_port,
        reserved: [0; 16],
    })
}

const _: () = assert!(ReplyTo::NO_VLAN == ethernet::NO_VLAN);

const fn ip_header_len(reply: &ReplyTo) -> usize {
    if reply.ip_version == 4 {
        ipv4::HEADER_LEN
    } else {
        ipv6::HEADER_LEN
    }
}

/// Bytes of a frame before the UDP payload.
#[inline]
pub const fn payload_offset(reply: &ReplyTo) -> usize {
    ethernet::header_len(reply.vlan) + ip_header_len(reply) + udp::HEADER_LEN
}

/// Bytes of UDP payload within an IP packet of `mtu` bytes.
#[inline]
pub const fn payload_capacity(reply: &ReplyTo, mtu: u16) -> usize {
    (mtu as usize).saturating_sub(ip_header_len(reply) + udp::HEADER_LEN)
}

/// Writes the headers before a payload of `payload_len` bytes that lies at [`payload_offset`] of
/// `buf`; returns the frame's length, `None` when `buf` is too short or the payload too long.
#[inline]
pub fn udp_frame(
    reply: &ReplyTo,
    src_mac: ethernet::Mac,
    payload_len: usize,
    buf: &mut [u8],
) -> Option<usize> {
    let start = payload_offset(reply);
    let end = start.checked_add(payload_len)?;
    let udp_len = u16::try_from(payload_len + udp::HEADER_LEN).ok()?;
    // The IPv4 total length counts its header too.
    udp_len.checked_add(ipv4::HEADER_LEN as u16)?;
    let frame = buf.get_mut(..end)?;
    let ether_type = if reply.ip_version == 4 {
        ethernet::TYPE_IPV4
    } else {
        ethernet::TYPE_IPV6
    };
    let ip = ethernet::emit(frame, reply.mac, src_mac, reply.vlan, ether_type);
    let mut addresses = [0; 32];
    let addresses = if reply.ip_version == 4 {
        let header = ipv4::Header {
            source: array(&reply.local_ip, 0),
            destination: array(&reply.peer_ip, 0),
            protocol: ipv4::PROTOCOL_UDP,
            ttl: ipv4::DEFAULT_TTL,
            router_alert: false,
            payload_len: udp_len,
        };
        header.emit(&mut frame[ip..]);
        addresses[..4].copy_from_slice(&header.source);
        addresses[4..8].copy_from_slice(&header.destination);
        &addresses[..8]
    } else {
        let header = ipv6::Header {
            source: reply.local_ip,
            destination: reply.peer_ip,
            next_header: ipv6::NEXT_UDP,
            hop_limit: ipv6::DEFAULT_HOP_LIMIT,
            payload_len: udp_len,
        };
        header.emit(&mut frame[ip..]);
        addresses[..16].copy_from_slice(&header.source);
        addresses[16..].copy_from_slice(&header.destination);
        &addresses[..]
    };
    udp::emit(
        &mut frame[start - udp::HEADER_LEN..],
        addresses,
        reply.local_port,
        reply.peer_port,
    );
    ethernet::pad(buf, end)
}

/// A frame full of acknowledgements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AckFrame {
    /// Bytes of the frame.
    pub len: usize,
    /// Acknowledgements in it.
    pub entries: usize,
}

/// Collects acknowledgements and packs those for the same peer together, in their order.
#[derive(Debug)]
pub struct AckCoalescer {
    pending: Vec<(ReplyTo, AckEntry)>,
}

impl AckCoalescer {
    /// Room for `capacity` acknowledgements; allocates 104 bytes for each, once.
    pub fn new(capacity: usize) -> Self {
        Self {
            pending: Vec::with_capacity(capacity),
        }
    }

    /// Adds one; `false` when there is no room, then frames must be taken first.
    #[inline]
    #[must_use]
    pub fn push(&mut self, reply: ReplyTo, entry: AckEntry) -> bool {
        if self.pending.len() == self.pending.capacity() {
            return false;
        }
        self.pending.push((reply, entry));
        true
    }

    /// How many are pending.
    #[inline]
    pub fn len(&self) -> usize {
        self.pending.len()
    }

    /// Whether none is pending.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Whom the next frame goes to; its `port` is the one to send by.
    #[inline]
    pub fn peek(&self) -> Option<&ReplyTo> {
        self.pending.first().map(|(reply, _)| reply)
    }

    /// Writes the frame for the peer of [`AckCoalescer::peek`], with as many of its
    /// acknowledgements as `mtu` and `buf` have room for; `None` when none is pending. Where not
    /// even one fits, one is given up and named by the error.
    ///
    /// Cost: one pass over what is pending.
    pub fn next_frame(
        &mut self,
        src_mac: ethernet::Mac,
        mtu: u16,
        buf: &mut [u8],
    ) -> Option<Result<AckFrame, DropReason>> {
        let reply = *self.peek()?;
        let start = payload_offset(&reply);
        let room = buf
            .len()
            .saturating_sub(start)
            .min(payload_capacity(&reply, mtu));
        let payload = buf.get_mut(start..start + room).unwrap_or_default();
        let (entries, len) = match self.next_payload(payload)? {
            Ok(found) => found,
            Err(reason) => return Some(Err(reason)),
        };
        Some(
            udp_frame(&reply, src_mac, len, buf)
                .map(|len| AckFrame { len, entries })
                .ok_or(DropReason::NoAnswerRoom),
        )
    }

    /// As [`AckCoalescer::next_frame`], but the UDP payload alone, at the start of `buf`: gives its acknowledgements and
    /// its length.
    pub fn next_payload(&mut self, buf: &mut [u8]) -> Option<Result<(usize, usize), DropReason>> {
        let reply = *self.peek()?;
        let capacity = datagram::ack_capacity(buf.len()).min(usize::from(u16::MAX));
        if capacity == 0 {
            self.pending.remove(0);
            return Some(Err(DropReason::NoAnswerRoom));
        }
        let mut entries = 0;
        let mut at = datagram::ACK_HEADER_LEN;
        self.pending.retain(|(other, entry)| {
            if entries == capacity || *other != reply {
                return true;
            }
            entry.encode(&mut buf[at..at + ACK_ENTRY_LEN]);
            at += ACK_ENTRY_LEN;
            entries += 1;
            false
        });
        datagram::encode_ack_header(entries as u16, buf);
        Some(Ok((entries, at)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{InterfaceConfig, ParseOptions, Parsed, parse};
    use crate::wire::datagram::{ErrorCode, Response};
    use proptest::prelude::*;

    const SERVER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn interface(mac: [u8; 6], v4: &str, v6: &str, vlan: Option<u16>) -> Interface {
        Interface::new(&InterfaceConfig {
            mac,
            addresses: vec![(v4.parse().unwrap(), 24), (v6.parse().unwrap(), 64)],
            groups: vec!["239.1.1.1".parse().unwrap(), "ff05::7".parse().unwrap()],
            vlan,
            mtu: 1500,
            promiscuous: false,
        })
    }

    fn pair(vlan: Option<u16>) -> (Interface, Interface) {
        (
            interface(SERVER_MAC, "10.0.0.1", "fd00::1", vlan),
            interface(CLIENT_MAC, "10.0.0.2", "fd00::2", vlan),
        )
    }

    /// The client's way to the server; what the server answers comes back by its mirror image.
    fn to_server(v6: bool, vlan: Option<u16>) -> ReplyTo {
        let mut reply = ReplyTo {
            rx: 3,
            ip_version: if v6 { 6 } else { 4 },
            port: 5,
            mac: SERVER_MAC,
            vlan: vlan.unwrap_or(ReplyTo::NO_VLAN),
            peer_ip: [0; 16],
            local_ip: [0; 16],
            peer_port: 9092,
            local_port: 40000,
            reserved: [0; 16],
        };
        if v6 {
            reply.peer_ip[..2].copy_from_slice(&[0xfd, 0]);
            reply.local_ip[..2].copy_from_slice(&[0xfd, 0]);
            (reply.peer_ip[15], reply.local_ip[15]) = (1, 2);
        } else {
            reply.peer_ip[..4].copy_from_slice(&[10, 0, 0, 1]);
            reply.local_ip[..4].copy_from_slice(&[10, 0, 0, 2]);
        }
        reply
    }

    fn entry(request_id: u64) -> AckEntry {
        AckEntry {
            request_id,
            topic_id: 1,
            partition: 2,
            base_offset: 3,
            base_sequence: 4,
            producer_epoch: 5,
            error: ErrorCode::None,
            credit: 6,
        }
    }

    fn udp(parsed: Parsed) -> UdpPacket {
        match parsed {
            Parsed::Udp(packet) => packet,
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn what_is_sent_is_parsed_and_answered(
            payload in prop::collection::vec(any::<u8>(), 0..1450), v6: bool, vlan in prop::option::of(1u16..4095),
        ) {
            let (server, client) = pair(vlan);
            let way = to_server(v6, vlan);
            let mut frame = [0xee; 2000];
            let start = payload_offset(&way);
            frame[start..start + payload.len()].copy_from_slice(&payload);
            let len = udp_frame(&way, CLIENT_MAC, payload.len(), &mut frame).unwrap();
            let packet = udp(parse(&frame[..len], &ParseOptions::new(&server)));
            prop_assert_eq!(packet.payload(&frame), &payload[..]);
            prop_assert_eq!((packet.src_port, packet.dst_port), (40000, 9092));
            prop_assert_eq!(packet.relation, Relation::Own);
            let back = reply_to(&frame, &packet, &server, 3, 5).unwrap();
            let mut expected = way;
            expected.mac = CLIENT_MAC;
            std::mem::swap(&mut expected.peer_ip, &mut expected.local_ip);
            std::mem::swap(&mut expected.peer_port, &mut expected.local_port);
            prop_assert_eq!(back, expected);
            let mut answer = [0; 2000];
            let len = udp_frame(&back, SERVER_MAC, 10, &mut answer).unwrap();
            let packet = udp(parse(&answer[..len], &ParseOptions::new(&client)));
            prop_assert_eq!(packet.payload(&answer), &[0; 10]);
        }
    }

    #[test]
    fn a_groups_datagram_is_answered_from_our_own_address() {
        let (server, _) = pair(None);
        for v6 in [false, true] {
            let mut way = to_server(v6, None);
            let own = way.peer_ip;
            if v6 {
                way.peer_ip = "ff05::7".parse::<std::net::Ipv6Addr>().unwrap().octets();
                way.mac = [0x33, 0x33, 0, 0, 0, 7];
            } else {
                way.peer_ip[..4].copy_from_slice(&[239, 1, 1, 1]);
                way.mac = [1, 0, 0x5e, 1, 1, 1];
            }
            let mut frame = [0; 128];
            let len = udp_frame(&way, CLIENT_MAC, 4, &mut frame).unwrap();
            let packet = udp(parse(&frame[..len], &ParseOptions::new(&server)));
            assert_eq!(packet.relation, Relation::Group);
            assert_eq!(
                reply_to(&frame, &packet, &server, 0, 0).unwrap().local_ip,
                own
            );
            frame[6] |= 1;
            assert_eq!(reply_to(&frame, &packet, &server, 0, 0), None);
        }
    }

    #[test]
    fn acknowledgements_for_a_peer_share_datagrams_in_order() {
        let mut acks = AckCoalescer::new(100);
        let (a, mut b) = (to_server(false, None), to_server(true, None));
        b.port = 6;
        for id in 0..100 {
            assert!(acks.push(if id % 2 == 0 { a } else { b }, entry(id)));
        }
        assert!(!acks.push(a, entry(100)));
        let mut seen = [Vec::new(), Vec::new()];
        let mut frames = 0;
        let mut buf = [0; 1600];
        while let Some(port) = acks.peek().map(|reply| reply.port) {
            let frame = acks
                .next_frame(SERVER_MAC, 1500, &mut buf)
                .unwrap()
                .unwrap();
            frames += 1;
            assert!(frame.len <= 1514);
            let start = payload_offset(if port == 5 { &a } else { &b });
            let Ok(Response::Ack(entries)) = Response::decode(&buf[start..frame.len]) else {
                panic!("no ack")
            };
            let before = seen[usize::from(port - 5)].len();
            seen[usize::from(port - 5)].extend(entries.map(|entry| entry.request_id));
            assert_eq!(seen[usize::from(port - 5)].len(), before + frame.entries);
        }
        // 36 fit in 1472 bytes over IPv4 and 35 in 1452 over IPv6.
        assert_eq!(frames, 4);
        assert_eq!(seen[0], (0..100).step_by(2).collect::<Vec<_>>());
        assert_eq!(seen[1], (1..100).step_by(2).collect::<Vec<_>>());
        assert!(acks.is_empty() && acks.next_frame(SERVER_MAC, 1500, &mut buf).is_none());
    }

    #[test]
    fn no_room_gives_up_one() {
        let mut acks = AckCoalescer::new(2);
        assert!(acks.push(to_server(false, None), entry(1)));
        assert!(acks.push(to_server(false, None), entry(2)));
        assert_eq!(
            acks.next_frame(SERVER_MAC, 1500, &mut [0; 93]),
            Some(Err(DropReason::NoAnswerRoom))
        );
        assert_eq!(acks.len(), 1);
        assert_eq!(
            acks.next_frame(SERVER_MAC, 1500, &mut [0; 94]),
            Some(Ok(AckFrame {
                len: 94,
                entries: 1
            }))
        );
    }
}
