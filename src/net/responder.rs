//! The little that a host must say besides its service: ARP, neighbour discovery, echo, group
//! membership, port unreachable.
//!
//! Sans-io: frames in, at most one frame out per call, in the caller's buffer. Group membership is
//! reported at start, when asked, and every [`ROUND_NS`], so that switches which snoop keep
//! forwarding even where nobody asks.
//!
//! Invariants: never answers a group's or broadcast's sender address, nor an error with an error
//! (RFC 1122 §3.2.2, RFC 4443 §2.4); answers to unknown ports are limited in rate.
//!
//! MLD queries are answered with version 2 reports whatever their version; IGMP falls back to
//! version 2 while a querier of that version is heard (RFC 3376 §7.2.1).

use super::interface::{ALL_NODES_V6, ALL_SYSTEMS_V4, Interface, Relation};
use super::parse::{ControlPacket, Parsed, UdpPacket, array};
use super::reply::reply_to;
use crate::wire::ethernet::{self, Mac};
use crate::wire::icmpv6::record;
use crate::wire::{arp, icmp, icmpv6, igmp, ipv4, ipv6};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Between the first two announcements.
const SECOND_ROUND_NS: u64 = 1_000_000_000;
/// Between further announcements: the default query interval (RFC 3376 §8.2, RFC 3810 §9.2).
pub const ROUND_NS: u64 = 125_000_000_000;
/// How long a version 2 querier is remembered: 2 query intervals and the response time (RFC 3376 §8.12).
const V2_QUERIER_NS: u64 = 260_000_000_000;
/// Port-unreachable messages a second; a scan or a stray stream must not become a stream back.
const UNREACHABLE_PER_SECOND: u64 = 100;
/// Such messages at once.
const UNREACHABLE_BURST: u64 = 20;
/// Where MLDv2 reports go (RFC 3810 §5.2.14).
const MLD2_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x16);

/// What a round of announcements says next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Arp(usize),
    Advertisement(usize),
    Igmp(usize),
    Mld(usize),
    Done,
}

/// One port's answers and announcements.
#[derive(Debug)]
pub struct Responder {
    interface: Interface,
    /// Groups to report: all but all-systems.
    report_v4: Vec<Ipv4Addr>,
    /// Groups to report: all but all-nodes.
    report_v6: Vec<Ipv6Addr>,
    step: Step,
    rounds: u32,
    next_round_ns: u64,
    /// First group that a general query's answer still lacks.
    igmp_due: Option<usize>,
    mld_due: Option<usize>,
    /// The latest time the caller named.
    now_ns: u64,
    v2_until_ns: u64,
    unreachable_tokens: u64,
    unreachable_refill_ns: u64,
}

impl Responder {
    /// For one port; on a port with several rx lcores, one of them should call
    /// [`Responder::periodic`].
    pub fn new(interface: Interface) -> Self {
        let mut report_v4 = interface.groups_v4().to_vec();
        report_v4.retain(|group| *group != ALL_SYSTEMS_V4);
        let mut report_v6 = interface.groups_v6().to_vec();
        report_v6.retain(|group| *group != ALL_NODES_V6);
        Self {
            interface,
            report_v4,
            report_v6,
            step: Step::Done,
            rounds: 0,
            next_round_ns: 0,
            igmp_due: None,
            mld_due: None,
            now_ns: 0,
            v2_until_ns: 0,
            unreachable_tokens: UNREACHABLE_BURST,
            unreachable_refill_ns: 0,
        }
    }

    /// Who we are.
    pub fn interface(&self) -> &Interface {
        &self.interface
    }

    /// Answers a control message into `out`; returns the frame's length, `None` when no answer is
    /// due or `out` is too short for it.
    ///
    /// # Panics
    /// When `parsed` is not of `frame`.
    pub fn handle(&mut self, frame: &[u8], parsed: &Parsed, out: &mut [u8]) -> Option<usize> {
        match parsed {
            Parsed::Arp(packet) => self.arp(frame, packet, out),
            Parsed::Icmp(packet) => self.icmp(frame, packet, out),
            Parsed::Icmpv6(packet) => self.icmpv6(frame, packet, out),
            Parsed::Igmp(packet) => self.igmp(frame, packet, out),
            Parsed::Udp(_) | Parsed::Drop(_) => None,
        }
    }

    /// The frame's sender, unless it is no single station.
    fn sender(frame: &[u8]) -> Option<Mac> {
        let mac = array::<6>(frame, 6);
        (!ethernet::is_group(&mac)).then_some(mac)
    }

    /// An IPv4 address that a single other host may have.
    fn is_peer_v4(&self, address: [u8; 4]) -> bool {
        !matches!(address[0], 0 | 127 | 224..)
            && self.interface.relation_v4(address) == Relation::Foreign
    }

    /// An IPv6 address that a single other host may have.
    fn is_peer_v6(&self, address: [u8; 16]) -> bool {
        address[0] != 0xff
            && u128::from_be_bytes(address) > 1
            && self.interface.relation_v6(address) == Relation::Foreign
    }

    fn arp(&self, frame: &[u8], packet: &ControlPacket, out: &mut [u8]) -> Option<usize> {
        let request = arp::Packet::parse(&frame[usize::from(packet.offset)..])?;
        if request.operation != arp::REQUEST
            || self.interface.relation_v4(request.target_ip) != Relation::Own
            || self.interface.relation_v4(request.sender_ip) == Relation::Own
            || ethernet::is_group(&request.sender_mac)
        {
            return None;
        }
        self.emit_arp(
            out,
            request.sender_mac,
            arp::Packet {
                operation: arp::REPLY,
                sender_mac: self.interface.mac(),
                sender_ip: request.target_ip,
                target_mac: request.sender_mac,
                target_ip: request.sender_ip,
            },
        )
    }

    fn emit_arp(&self, out: &mut [u8], to: Mac, packet: arp::Packet) -> Option<usize> {
        let start = ethernet::header_len(self.interface.vlan());
        let end = start + arp::LEN;
        let message = out.get_mut(..end)?;
        self.emit_ethernet(message, to, ethernet::TYPE_ARP);
        packet.emit(&mut message[start..]);
        ethernet::pad(out, end)
    }

    fn emit_ethernet(&self, out: &mut [u8], to: Mac, ether_type: u16) -> usize {
        ethernet::emit(
            out,
            to,
            self.interface.mac(),
            self.interface.vlan(),
            ether_type,
        )
    }

    /// Writes Ethernet and IPv4 headers; returns where the message of `len` bytes goes and ends.
    fn emit_v4(
        &self,
        out: &mut [u8],
        to: Mac,
        header: ipv4::Header,
    ) -> Option<std::ops::Range<usize>> {
        let ip = ethernet::header_len(self.interface.vlan());
        let start = ip + header.len();
        let end = start + usize::from(header.payload_len);
        let frame = out.get_mut(..end)?;
        self.emit_ethernet(frame, to, ethernet::TYPE_IPV4);
        header.emit(&mut frame[ip..]);
        Some(start..end)
    }

    /// As `emit_v4`, for IPv6.
    fn emit_v6(
        &self,
        out: &mut [u8],
        to: Mac,
        header: ipv6::Header,
    ) -> Option<std::ops::Range<usize>> {
        let ip = ethernet::header_len(self.interface.vlan());
        let start = ip + ipv6::HEADER_LEN;
        let end = start + usize::from(header.payload_len);
        let frame = out.get_mut(..end)?;
        self.emit_ethernet(frame, to, ethernet::TYPE_IPV6);
        header.emit(&mut frame[ip..]);
        Some(start..end)
    }

    fn icmp(&self, frame: &[u8], packet: &ControlPacket, out: &mut [u8]) -> Option<usize> {
        let message = message(frame, packet);
        let ip = &frame[usize::from(packet.ip_offset)..];
        let peer = array(ip, ipv4::SOURCE);
        if packet.relation != Relation::Own
            || message[..2] != [icmp::ECHO_REQUEST, 0]
            || !self.is_peer_v4(peer)
        {
            return None;
        }
        let range = self.emit_v4(
            out,
            Self::sender(frame)?,
            ipv4::Header {
                source: array(ip, ipv4::DESTINATION),
                destination: peer,
                protocol: ipv4::PROTOCOL_ICMP,
                ttl: ipv4::DEFAULT_TTL,
                router_alert: false,
                payload_len: packet.len,
            },
        )?;
        let end = range.end;
        let answer = &mut out[range];
        answer.copy_from_slice(message);
        answer[0] = icmp::ECHO_REPLY;
        icmp::fill_checksum(answer);
        ethernet::pad(out, end)
    }

    fn icmpv6(&mut self, frame: &[u8], packet: &ControlPacket, out: &mut [u8]) -> Option<usize> {
        let ip = &frame[usize::from(packet.ip_offset)..];
        match message(frame, packet)[0] {
            icmpv6::ECHO_REQUEST => self.echo_v6(frame, packet, out),
            icmpv6::NEIGHBOUR_SOLICITATION if ip[7] == icmpv6::NEIGHBOUR_HOP_LIMIT => {
                self.solicited(frame, packet, out)
            }
            // A query comes from a router on this link (RFC 3810 §5.1.14).
            icmpv6::MLD_QUERY
                if ip[7] == 1
                    && Ipv6Addr::from(array::<16>(ip, ipv6::SOURCE)).is_unicast_link_local() =>
            {
                self.mld_query(message(frame, packet), out)
            }
            _ => None,
        }
    }

    fn echo_v6(&self, frame: &[u8], packet: &ControlPacket, out: &mut [u8]) -> Option<usize> {
        let message = message(frame, packet);
        let ip = &frame[usize::from(packet.ip_offset)..];
        let peer = array(ip, ipv6::SOURCE);
        let source = match packet.relation {
            Relation::Own => array(ip, ipv6::DESTINATION),
            Relation::Group => self.interface.source_v6(peer)?,
            Relation::Broadcast | Relation::Foreign => return None,
        };
        if message.len() < icmp::HEADER_LEN || message[1] != 0 || !self.is_peer_v6(peer) {
            return None;
        }
        let range = self.emit_v6(
            out,
            Self::sender(frame)?,
            ipv6::Header {
                source,
                destination: peer,
                next_header: ipv6::NEXT_ICMPV6,
                hop_limit: ipv6::DEFAULT_HOP_LIMIT,
                payload_len: packet.len,
            },
        )?;
        let end = range.end;
        let answer = &mut out[range];
        answer.copy_from_slice(message);
        answer[0] = icmpv6::ECHO_REPLY;
        icmpv6::fill_checksum(answer, &both(source, peer));
        ethernet::pad(out, end)
    }

    fn solicited(&self, frame: &[u8], packet: &ControlPacket, out: &mut [u8]) -> Option<usize> {
        let ip = &frame[usize::from(packet.ip_offset)..];
        let target = icmpv6::solicitation_target(message(frame, packet))?;
        let peer: [u8; 16] = array(ip, ipv6::SOURCE);
        if packet.relation == Relation::Foreign
            || self.interface.relation_v6(target) != Relation::Own
        {
            return None;
        }
        if peer == [0; 16] {
            // Somebody wants to take the address: all nodes shall hear that it is ours (RFC 4861 §7.2.4).
            return self.advertise(
                out,
                ethernet::group_mac_v6(ALL_NODES_V6),
                ALL_NODES_V6.octets(),
                icmpv6::FLAG_OVERRIDE,
                target,
            );
        }
        if !self.is_peer_v6(peer) {
            return None;
        }
        self.advertise(
            out,
            Self::sender(frame)?,
            peer,
            icmpv6::FLAG_SOLICITED | icmpv6::FLAG_OVERRIDE,
            target,
        )
    }

    fn advertise(
        &self,
        out: &mut [u8],
        to: Mac,
        destination: [u8; 16],
        flags: u8,
        target: [u8; 16],
    ) -> Option<usize> {
        let range = self.emit_v6(
            out,
            to,
            ipv6::Header {
                source: target,
                destination,
                next_header: ipv6::NEXT_ICMPV6,
                hop_limit: icmpv6::NEIGHBOUR_HOP_LIMIT,
                payload_len: icmpv6::ADVERTISEMENT_LEN as u16,
            },
        )?;
        let end = range.end;
        let answer = &mut out[range];
        icmpv6::emit_advertisement(answer, flags, target, self.interface.mac());
        icmpv6::fill_checksum(answer, &both(target, destination));
        ethernet::pad(out, end)
    }

    fn igmp(&mut self, frame: &[u8], packet: &ControlPacket, out: &mut [u8]) -> Option<usize> {
        let query = message(frame, packet);
        if query[0] != igmp::QUERY {
            return None;
        }
        if query.len() < igmp::V3_QUERY_LEN {
            self.v2_until_ns = self.now_ns.saturating_add(V2_QUERIER_NS);
        }
        let group = Ipv4Addr::from(array::<4>(query, 4));
        if group.is_unspecified() {
            self.igmp_due = Some(0);
            return self.igmp_answer(out);
        }
        let index = self.report_v4.iter().position(|own| *own == group)?;
        self.igmp_report(index, 1, record::IS_EXCLUDE, out)
            .map(|(len, _)| len)
    }

    fn igmp_answer(&mut self, out: &mut [u8]) -> Option<usize> {
        let from = self.igmp_due.take()?;
        let (len, next) = self.igmp_report(from, usize::MAX, record::IS_EXCLUDE, out)?;
        self.igmp_due = (next < self.report_v4.len()).then_some(next);
        Some(len)
    }

    /// Reports up to `most` groups beginning with number `from`; returns the frame's length and
    /// the first group left out.
    fn igmp_report(
        &self,
        from: usize,
        most: usize,
        kind: u8,
        out: &mut [u8],
    ) -> Option<(usize, usize)> {
        let groups = self.report_v4.get(from..)?;
        let first = *groups.first()?;
        let source = self
            .interface
            .ipv4()
            .first()
            .map_or([0; 4], |(ip, _)| ip.octets());
        let version2 = self.now_ns < self.v2_until_ns;
        let header_len = ipv4::HEADER_LEN + ipv4::ROUTER_ALERT.len();
        let room = usize::from(self.interface.mtu())
            .min(
                out.len()
                    .saturating_sub(ethernet::header_len(self.interface.vlan())),
            )
            .saturating_sub(header_len + igmp::HEADER_LEN);
        let count = if version2 {
            1
        } else {
            groups.len().min(most).min(room / igmp::V3_RECORD_LEN)
        };
        if count == 0 {
            return None;
        }
        let (destination, len) = if version2 {
            (first.octets(), igmp::HEADER_LEN)
        } else {
            (
                igmp::V3_REPORT_DESTINATION,
                igmp::HEADER_LEN + count * igmp::V3_RECORD_LEN,
            )
        };
        let range = self.emit_v4(
            out,
            ethernet::group_mac_v4(destination.into()),
            ipv4::Header {
                source,
                destination,
                protocol: ipv4::PROTOCOL_IGMP,
                ttl: 1,
                router_alert: true,
                payload_len: len as u16,
            },
        )?;
        let end = range.end;
        let report = &mut out[range];
        report.fill(0);
        if version2 {
            report[0] = igmp::V2_REPORT;
            report[4..8].copy_from_slice(&destination);
        } else {
            report[0] = igmp::V3_REPORT;
            report[6..8].copy_from_slice(&(count as u16).to_be_bytes());
            let records = report[igmp::HEADER_LEN..].chunks_exact_mut(igmp::V3_RECORD_LEN);
            for (record, group) in records.zip(groups) {
                record[0] = kind;
                record[4..8].copy_from_slice(&group.octets());
            }
        }
        icmp::fill_checksum(report);
        Some((ethernet::pad(out, end)?, from + count))
    }

    fn mld_query(&mut self, query: &[u8], out: &mut [u8]) -> Option<usize> {
        if query.len() < icmpv6::MLD_QUERY_LEN {
            return None;
        }
        let group = Ipv6Addr::from(array::<16>(query, 8));
        if group.is_unspecified() {
            self.mld_due = Some(0);
            return self.mld_answer(out);
        }
        let index = self.report_v6.iter().position(|own| *own == group)?;
        self.mld_report(index, 1, record::IS_EXCLUDE, out)
            .map(|(len, _)| len)
    }

    fn mld_answer(&mut self, out: &mut [u8]) -> Option<usize> {
        let from = self.mld_due.take()?;
        let (len, next) = self.mld_report(from, usize::MAX, record::IS_EXCLUDE, out)?;
        self.mld_due = (next < self.report_v6.len()).then_some(next);
        Some(len)
    }

    /// As `igmp_report`, for IPv6.
    fn mld_report(
        &self,
        from: usize,
        most: usize,
        kind: u8,
        out: &mut [u8],
    ) -> Option<(usize, usize)> {
        let groups = self.report_v6.get(from..)?;
        let source = self.interface.source_v6(MLD2_ROUTERS.octets())?;
        let hop_by_hop = ipv6::ROUTER_ALERT_MLD.len();
        let room = usize::from(self.interface.mtu())
            .min(
                out.len()
                    .saturating_sub(ethernet::header_len(self.interface.vlan())),
            )
            .saturating_sub(ipv6::HEADER_LEN + hop_by_hop + icmpv6::MLD2_REPORT_HEADER_LEN);
        let count = groups.len().min(most).min(room / icmpv6::MLD2_RECORD_LEN);
        if count == 0 {
            return None;
        }
        let len = hop_by_hop + icmpv6::MLD2_REPORT_HEADER_LEN + count * icmpv6::MLD2_RECORD_LEN;
        let destination = MLD2_ROUTERS.octets();
        let range = self.emit_v6(
            out,
            ethernet::group_mac_v6(MLD2_ROUTERS),
            ipv6::Header {
                source,
                destination,
                next_header: ipv6::NEXT_HOP_BY_HOP,
                hop_limit: 1,
                payload_len: len as u16,
            },
        )?;
        let end = range.end;
        let payload = &mut out[range];
        payload[..hop_by_hop].copy_from_slice(&ipv6::ROUTER_ALERT_MLD);
        let report = &mut payload[hop_by_hop..];
        report.fill(0);
        report[0] = icmpv6::MLD2_REPORT;
        report[6..8].copy_from_slice(&(count as u16).to_be_bytes());
        let records =
            report[icmpv6::MLD2_REPORT_HEADER_LEN..].chunks_exact_mut(icmpv6::MLD2_RECORD_LEN);
        for (record, group) in records.zip(groups) {
            record[0] = kind;
            record[4..20].copy_from_slice(&group.octets());
        }
        icmpv6::fill_checksum(report, &both(source, destination));
        Some((ethernet::pad(out, end)?, from + count))
    }

    /// Tells the sender that nobody listens on the port; `None` when that must not be said (to a
    /// group's datagram, too often) or `out` is too short.
    ///
    /// # Panics
    /// When `packet` is not of `frame`.
    pub fn unknown_port(
        &mut self,
        frame: &[u8],
        packet: &UdpPacket,
        now_ns: u64,
        out: &mut [u8],
    ) -> Option<usize> {
        if packet.relation != Relation::Own {
            return None;
        }
        let way = reply_to(frame, packet, &self.interface, 0, 0)?;
        if !self.take_token(now_ns) {
            return None;
        }
        let original = &frame[usize::from(packet.ip_offset)
            ..usize::from(packet.payload_offset) + usize::from(packet.payload_len)];
        // The message quotes as much of the packet as fits the largest error message.
        if packet.ip_version == 4 {
            let most = icmp::MAX_ERROR_PACKET - ipv4::HEADER_LEN - icmp::HEADER_LEN;
            let quoted = &original[..original.len().min(most)];
            let range = self.emit_v4(
                out,
                way.mac,
                ipv4::Header {
                    source: array(&way.local_ip, 0),
                    destination: array(&way.peer_ip, 0),
                    protocol: ipv4::PROTOCOL_ICMP,
                    ttl: ipv4::DEFAULT_TTL,
                    router_alert: false,
                    payload_len: (icmp::HEADER_LEN + quoted.len()) as u16,
                },
            )?;
            let end = range.end;
            let error = &mut out[range];
            error[..8].copy_from_slice(&[icmp::UNREACHABLE, icmp::CODE_PORT, 0, 0, 0, 0, 0, 0]);
            error[8..].copy_from_slice(quoted);
            icmp::fill_checksum(error);
            ethernet::pad(out, end)
        } else {
            let most = icmpv6::MAX_ERROR_PACKET - ipv6::HEADER_LEN - icmp::HEADER_LEN;
            let quoted = &original[..original.len().min(most)];
            let range = self.emit_v6(
                out,
                way.mac,
                ipv6::Header {
                    source: way.local_ip,
                    destination: way.peer_ip,
                    next_header: ipv6::NEXT_ICMPV6,
                    hop_limit: ipv6::DEFAULT_HOP_LIMIT,
                    payload_len: (icmp::HEADER_LEN + quoted.len()) as u16,
                },
            )?;
            let end = range.end;
            let error = &mut out[range];
            error[..8].copy_from_slice(&[icmpv6::UNREACHABLE, icmpv6::CODE_PORT, 0, 0, 0, 0, 0, 0]);
            error[8..].copy_from_slice(quoted);
            icmpv6::fill_checksum(error, &both(way.local_ip, way.peer_ip));
            ethernet::pad(out, end)
        }
    }

    fn take_token(&mut self, now_ns: u64) -> bool {
        const NS_PER_TOKEN: u64 = 1_000_000_000 / UNREACHABLE_PER_SECOND;
        let elapsed = now_ns.saturating_sub(self.unreachable_refill_ns);
        let earned = elapsed / NS_PER_TOKEN;
        if earned > 0 {
            self.unreachable_tokens = self
                .unreachable_tokens
                .saturating_add(earned)
                .min(UNREACHABLE_BURST);
            self.unreachable_refill_ns = now_ns - elapsed % NS_PER_TOKEN;
        }
        match self.unreachable_tokens.checked_sub(1) {
            Some(left) => {
                self.unreachable_tokens = left;
                true
            }
            None => false,
        }
    }

    /// What is to be said now without being asked; to be called again until `None`, then every
    /// few milliseconds. `now_ns` is monotonic.
    ///
    /// Gratuitous ARP (RFC 5227 §3), unsolicited advertisements (RFC 4861 §7.2.6) and membership
    /// reports: in the first round at once, a second later again, then every [`ROUND_NS`].
    pub fn periodic(&mut self, now_ns: u64, out: &mut [u8]) -> Option<usize> {
        self.now_ns = now_ns;
        if let Some(len) = self.igmp_answer(out).or_else(|| self.mld_answer(out)) {
            return Some(len);
        }
        if self.step == Step::Done && now_ns >= self.next_round_ns {
            self.step = Step::Arp(0);
            self.rounds = self.rounds.saturating_add(1);
            self.next_round_ns = now_ns.saturating_add(if self.rounds == 1 {
                SECOND_ROUND_NS
            } else {
                ROUND_NS
            });
        }
        // Only the first two rounds are joins; later ones repeat the state.
        let kind = if self.rounds <= 2 {
            record::TO_EXCLUDE
        } else {
            record::IS_EXCLUDE
        };
        while self.step != Step::Done {
            if let Some(len) = self.announce(kind, out) {
                return Some(len);
            }
        }
        None
    }

    /// Says one thing and goes on to the next; a thing that does not fit is left out.
    fn announce(&mut self, kind: u8, out: &mut [u8]) -> Option<usize> {
        match self.step {
            Step::Arp(index) => {
                let Some(&(ip, _)) = self.interface.ipv4().get(index) else {
                    self.step = Step::Advertisement(0);
                    return None;
                };
                self.step = Step::Arp(index + 1);
                self.emit_arp(
                    out,
                    ethernet::BROADCAST,
                    arp::Packet {
                        operation: arp::REQUEST,
                        sender_mac: self.interface.mac(),
                        sender_ip: ip.octets(),
                        target_mac: [0; 6],
                        target_ip: ip.octets(),
                    },
                )
            }
            Step::Advertisement(index) => {
                let Some(&(ip, _)) = self.interface.ipv6().get(index) else {
                    self.step = Step::Igmp(0);
                    return None;
                };
                self.step = Step::Advertisement(index + 1);
                self.advertise(
                    out,
                    ethernet::group_mac_v6(ALL_NODES_V6),
                    ALL_NODES_V6.octets(),
                    icmpv6::FLAG_OVERRIDE,
                    ip.octets(),
                )
            }
            Step::Igmp(from) => {
                let report = self.igmp_report(from, usize::MAX, kind, out);
                self.step = report.map_or(Step::Mld(0), |(_, next)| Step::Igmp(next));
                report.map(|(len, _)| len)
            }
            Step::Mld(from) => {
                let report = self.mld_report(from, usize::MAX, kind, out);
                self.step = report.map_or(Step::Done, |(_, next)| Step::Mld(next));
                report.map(|(len, _)| len)
            }
            Step::Done => None,
        }
    }
}

fn message<'a>(frame: &'a [u8], packet: &ControlPacket) -> &'a [u8] {
    &frame[usize::from(packet.offset)..][..usize::from(packet.len)]
}

/// Source and destination side by side, as a pseudo-header sums them.
fn both(source: [u8; 16], destination: [u8; 16]) -> [u8; 32] {
    let mut addresses = [0; 32];
    addresses[..16].copy_from_slice(&source);
    addresses[16..].copy_from_slice(&destination);
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{DropReason, InterfaceConfig, ParseOptions, parse, payload_offset, udp_frame};
    use crate::shard::ReplyTo;
    use proptest::prelude::*;
    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire as oracle;

    const OUR_MAC: Mac = [2, 0, 0, 0, 0, 1];
    const PEER_MAC: Mac = [2, 0, 0, 0, 0, 2];
    const OUR_V4: [u8; 4] = [10, 0, 0, 1];
    const PEER_V4: [u8; 4] = [10, 0, 0, 2];

    fn our_v6() -> Ipv6Addr {
        "fd00::1".parse().unwrap()
    }

    fn peer_v6() -> Ipv6Addr {
        "fd00::2".parse().unwrap()
    }

    fn responder(vlan: Option<u16>) -> Responder {
        Responder::new(Interface::new(&InterfaceConfig {
            mac: OUR_MAC,
            addresses: vec![
                ("10.0.0.1".parse().unwrap(), 24),
                ("fd00::1".parse().unwrap(), 64),
            ],
            groups: vec!["239.1.1.1".parse().unwrap(), "ff05::7".parse().unwrap()],
            vlan,
            mtu: 1500,
            promiscuous: false,
        }))
    }

    fn header(to: Mac, ether_type: oracle::EthernetProtocol) -> Vec<u8> {
        let repr = oracle::EthernetRepr {
            src_addr: oracle::EthernetAddress(PEER_MAC),
            dst_addr: oracle::EthernetAddress(to),
            ethertype: ether_type,
        };
        let mut bytes = vec![0; 14];
        repr.emit(&mut oracle::EthernetFrame::new_unchecked(&mut bytes));
        bytes
    }

    fn v4(to: Mac, destination: [u8; 4], protocol: u8, message: &[u8]) -> Vec<u8> {
        let mut frame = header(to, oracle::EthernetProtocol::Ipv4);
        let repr = oracle::Ipv4Repr {
            src_addr: PEER_V4.into(),
            dst_addr: destination.into(),
            next_header: protocol.into(),
            payload_len: message.len(),
            hop_limit: 1,
        };
        let mut ip = vec![0; 20];
        repr.emit(
            &mut oracle::Ipv4Packet::new_unchecked(&mut ip),
            &ChecksumCapabilities::default(),
        );
        frame.extend(ip);
        frame.extend(message);
        frame
    }

    fn v6(
        source: Ipv6Addr,
        destination: Ipv6Addr,
        hop_limit: u8,
        repr: &oracle::Icmpv6Repr,
    ) -> Vec<u8> {
        let to = if destination.is_multicast() {
            ethernet::group_mac_v6(destination)
        } else {
            OUR_MAC
        };
        let mut frame = header(to, oracle::EthernetProtocol::Ipv6);
        let mut ip = vec![0; 40 + repr.buffer_len()];
        oracle::Ipv6Repr {
            src_addr: source,
            dst_addr: destination,
            next_header: oracle::IpProtocol::Icmpv6,
            payload_len: repr.buffer_len(),
            hop_limit,
        }
        .emit(&mut oracle::Ipv6Packet::new_unchecked(&mut ip[..]));
        repr.emit(
            &source,
            &destination,
            &mut oracle::Icmpv6Packet::new_unchecked(&mut ip[40..]),
            &ChecksumCapabilities::default(),
        );
        frame.extend(ip);
        frame
    }

    /// Puts a tag into an untagged frame.
    fn tagged(mut frame: Vec<u8>, vlan: u16) -> Vec<u8> {
        let [high, low] = vlan.to_be_bytes();
        frame.splice(12..12, [0x81, 0, high, low]);
        frame
    }

    fn answer(responder: &mut Responder, frame: &[u8]) -> Option<Vec<u8>> {
        let parsed = parse(frame, &ParseOptions::new(responder.interface()));
        assert!(!matches!(parsed, Parsed::Drop(_)), "{parsed:?}");
        let mut out = [0xee; 2048];
        let len = responder.handle(frame, &parsed, &mut out)?;
        assert!(len >= ethernet::MIN_FRAME_LEN);
        Some(out[..len].to_vec())
    }

    /// Payload of a frame that goes to `to` and comes from us.
    fn ethernet_payload(frame: &[u8], to: Mac, kind: oracle::EthernetProtocol) -> &[u8] {
        let ethernet = oracle::EthernetFrame::new_checked(frame).unwrap();
        assert_eq!(ethernet.src_addr().0, OUR_MAC);
        assert_eq!(ethernet.dst_addr().0, to);
        assert_eq!(ethernet.ethertype(), kind);
        ethernet.payload()
    }

    fn ipv4_payload(frame: &[u8], to: Mac) -> (oracle::Ipv4Repr, &[u8]) {
        let bytes = ethernet_payload(frame, to, oracle::EthernetProtocol::Ipv4);
        let packet = oracle::Ipv4Packet::new_checked(bytes).unwrap();
        assert!(packet.verify_checksum());
        let repr = oracle::Ipv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap();
        (repr, packet.payload())
    }

    fn ipv6_payload(frame: &[u8], to: Mac) -> (oracle::Ipv6Repr, &[u8]) {
        let bytes = ethernet_payload(frame, to, oracle::EthernetProtocol::Ipv6);
        let packet = oracle::Ipv6Packet::new_checked(bytes).unwrap();
        (oracle::Ipv6Repr::parse(&packet).unwrap(), packet.payload())
    }

    fn icmpv6_repr<'a>(ip: &oracle::Ipv6Repr, bytes: &'a [u8]) -> oracle::Icmpv6Repr<'a> {
        let packet = oracle::Icmpv6Packet::new_checked(bytes).unwrap();
        oracle::Icmpv6Repr::parse(
            &ip.src_addr,
            &ip.dst_addr,
            &packet,
            &ChecksumCapabilities::default(),
        )
        .unwrap()
    }

    fn arp_request(target: [u8; 4]) -> Vec<u8> {
        let repr = oracle::ArpRepr::EthernetIpv4 {
            operation: oracle::ArpOperation::Request,
            source_hardware_addr: oracle::EthernetAddress(PEER_MAC),
            source_protocol_addr: PEER_V4.into(),
            target_hardware_addr: oracle::EthernetAddress([0; 6]),
            target_protocol_addr: target.into(),
        };
        let mut frame = header(ethernet::BROADCAST, oracle::EthernetProtocol::Arp);
        let mut bytes = vec![0; 28];
        repr.emit(&mut oracle::ArpPacket::new_unchecked(&mut bytes));
        frame.extend(bytes);
        frame
    }

    #[test]
    fn arp_is_answered_for_our_address_only() {
        let mut responder = responder(None);
        let reply = answer(&mut responder, &arp_request(OUR_V4)).unwrap();
        let bytes = ethernet_payload(&reply, PEER_MAC, oracle::EthernetProtocol::Arp);
        assert_eq!(
            oracle::ArpRepr::parse(&oracle::ArpPacket::new_checked(bytes).unwrap()).unwrap(),
            oracle::ArpRepr::EthernetIpv4 {
                operation: oracle::ArpOperation::Reply,
                source_hardware_addr: oracle::EthernetAddress(OUR_MAC),
                source_protocol_addr: OUR_V4.into(),
                target_hardware_addr: oracle::EthernetAddress(PEER_MAC),
                target_protocol_addr: PEER_V4.into(),
            }
        );
        assert_eq!(answer(&mut responder, &arp_request([10, 0, 0, 9])), None);
    }

    #[test]
    fn answers_carry_the_ports_tag() {
        let mut responder = responder(Some(7));
        let reply = answer(&mut responder, &tagged(arp_request(OUR_V4), 7)).unwrap();
        assert_eq!(reply[12..18], [0x81, 0, 0, 7, 8, 6]);
        for frame in [arp_request(OUR_V4), tagged(arp_request(OUR_V4), 8)] {
            assert_eq!(
                parse(&frame, &ParseOptions::new(responder.interface())),
                Parsed::Drop(DropReason::WrongVlan)
            );
        }
    }

    #[test]
    fn echo_is_answered() {
        let mut responder = responder(None);
        let repr = oracle::Icmpv4Repr::EchoRequest {
            ident: 3,
            seq_no: 4,
            data: b"hello",
        };
        let mut bytes = vec![0; repr.buffer_len()];
        repr.emit(
            &mut oracle::Icmpv4Packet::new_unchecked(&mut bytes),
            &ChecksumCapabilities::default(),
        );
        let reply = answer(&mut responder, &v4(OUR_MAC, OUR_V4, 1, &bytes)).unwrap();
        let (ip, payload) = ipv4_payload(&reply, PEER_MAC);
        assert_eq!(
            (ip.src_addr.octets(), ip.dst_addr.octets()),
            (OUR_V4, PEER_V4)
        );
        let packet = oracle::Icmpv4Packet::new_checked(payload).unwrap();
        assert_eq!(
            oracle::Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap(),
            oracle::Icmpv4Repr::EchoReply {
                ident: 3,
                seq_no: 4,
                data: b"hello"
            }
        );
        let broadcast = v4(ethernet::BROADCAST, [10, 0, 0, 255], 1, &bytes);
        assert_eq!(answer(&mut responder, &broadcast), None);

        let repr = oracle::Icmpv6Repr::EchoRequest {
            ident: 3,
            seq_no: 4,
            data: b"hello",
        };
        let reply = answer(&mut responder, &v6(peer_v6(), our_v6(), 64, &repr)).unwrap();
        let (ip, payload) = ipv6_payload(&reply, PEER_MAC);
        assert_eq!((ip.src_addr, ip.dst_addr), (our_v6(), peer_v6()));
        assert_eq!(
            icmpv6_repr(&ip, payload),
            oracle::Icmpv6Repr::EchoReply {
                ident: 3,
                seq_no: 4,
                data: b"hello"
            }
        );
    }

    #[test]
    fn solicitations_are_answered() {
        let mut responder = responder(None);
        let repr = oracle::Icmpv6Repr::Ndisc(oracle::NdiscRepr::NeighborSolicit {
            target_addr: our_v6(),
            lladdr: Some(oracle::RawHardwareAddress::from_bytes(&PEER_MAC)),
        });
        let group = super::super::solicited_node(our_v6());
        let reply = answer(&mut responder, &v6(peer_v6(), group, 255, &repr)).unwrap();
        let (ip, payload) = ipv6_payload(&reply, PEER_MAC);
        assert_eq!(ip.hop_limit, 255);
        assert_eq!(ip.dst_addr, peer_v6());
        assert_eq!(
            icmpv6_repr(&ip, payload),
            oracle::Icmpv6Repr::Ndisc(oracle::NdiscRepr::NeighborAdvert {
                flags: oracle::NdiscNeighborFlags::SOLICITED | oracle::NdiscNeighborFlags::OVERRIDE,
                target_addr: our_v6(),
                lladdr: Some(oracle::RawHardwareAddress::from_bytes(&OUR_MAC)),
            })
        );
        // From behind a router, and for another address.
        assert_eq!(
            answer(&mut responder, &v6(peer_v6(), group, 254, &repr)),
            None
        );
        let other = oracle::Icmpv6Repr::Ndisc(oracle::NdiscRepr::NeighborSolicit {
            target_addr: peer_v6(),
            lladdr: None,
        });
        assert_eq!(
            answer(&mut responder, &v6(peer_v6(), group, 255, &other)),
            None
        );
        // Another node tries to take our address.
        let probe = oracle::Icmpv6Repr::Ndisc(oracle::NdiscRepr::NeighborSolicit {
            target_addr: our_v6(),
            lladdr: None,
        });
        let reply = answer(
            &mut responder,
            &v6(Ipv6Addr::UNSPECIFIED, group, 255, &probe),
        )
        .unwrap();
        let (ip, _) = ipv6_payload(&reply, [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(ip.dst_addr, ALL_NODES_V6);
    }

    /// Group and record type of each record of an IGMPv3 report.
    fn igmp3_records(bytes: &[u8]) -> Vec<(u8, [u8; 4])> {
        assert_eq!(bytes[0], 0x22);
        assert!(crate::wire::checksum::Sum::of(bytes).is_valid());
        let records = bytes[8..].chunks_exact(8);
        assert_eq!(records.len(), usize::from(bytes[7]));
        records
            .map(|record| (record[0], array(record, 4)))
            .collect()
    }

    #[test]
    fn membership_queries_are_answered() {
        let mut responder = responder(None);
        let query = |group: [u8; 4], len| {
            let mut bytes = vec![0; len];
            bytes[..2].copy_from_slice(&[0x11, 100]);
            bytes[4..8].copy_from_slice(&group);
            icmp::fill_checksum(&mut bytes);
            let to = if group == [0; 4] {
                [224, 0, 0, 1]
            } else {
                group
            };
            v4(ethernet::group_mac_v4(to.into()), to, 2, &bytes)
        };
        let reply = answer(&mut responder, &query([0; 4], 12)).unwrap();
        let (ip, payload) = ipv4_payload(&reply, [1, 0, 0x5e, 0, 0, 22]);
        assert_eq!(ip.hop_limit, 1);
        assert_eq!(igmp3_records(payload), [(2, [239, 1, 1, 1])]);
        let reply = answer(&mut responder, &query([239, 1, 1, 1], 8)).unwrap();
        let (ip, payload) = ipv4_payload(&reply, [1, 0, 0x5e, 1, 1, 1]);
        assert_eq!(ip.dst_addr.octets(), [239, 1, 1, 1]);
        let igmp = oracle::IgmpPacket::new_checked(payload).unwrap();
        assert!(igmp.verify_checksum());
        assert_eq!(
            oracle::IgmpRepr::parse(&igmp).unwrap(),
            oracle::IgmpRepr::MembershipReport {
                group_addr: [239, 1, 1, 1].into(),
                version: oracle::IgmpVersion::Version2
            }
        );

        let query = oracle::Icmpv6Repr::Mld(oracle::MldRepr::Query {
            max_resp_code: 1,
            mcast_addr: Ipv6Addr::UNSPECIFIED,
            s_flag: false,
            qrv: 2,
            qqic: 125,
            num_srcs: 0,
            data: &[],
        });
        let router = "fe80::9".parse().unwrap();
        let reply = answer(&mut responder, &v6(router, ALL_NODES_V6, 1, &query)).unwrap();
        let (ip, payload) = ipv6_payload(&reply, [0x33, 0x33, 0, 0, 0, 0x16]);
        assert_eq!(ip.next_header, oracle::IpProtocol::HopByHop);
        assert_eq!(payload[..8], [58, 0, 5, 2, 0, 0, 1, 0]);
        let oracle::Icmpv6Repr::Mld(oracle::MldRepr::Report {
            nr_mcast_addr_rcrds,
            data,
        }) = icmpv6_repr(&ip, &payload[8..])
        else {
            panic!("no report")
        };
        let groups: Vec<Ipv6Addr> = data
            .chunks_exact(20)
            .map(|record| array::<16>(record, 4).into())
            .collect();
        assert_eq!(usize::from(nr_mcast_addr_rcrds), groups.len());
        assert_eq!(groups, responder.report_v6);
        assert!(groups.contains(&"ff05::7".parse().unwrap()));
        assert!(answer(&mut responder, &v6(peer_v6(), ALL_NODES_V6, 1, &query)).is_none());
    }

    fn datagram(v6: bool, payload: usize) -> Vec<u8> {
        let mut way = ReplyTo {
            rx: 0,
            ip_version: if v6 { 6 } else { 4 },
            port: 0,
            mac: OUR_MAC,
            vlan: ReplyTo::NO_VLAN,
            peer_ip: our_v6().octets(),
            local_ip: peer_v6().octets(),
            peer_port: 9,
            local_port: 1000,
            reserved: [0; 16],
        };
        if !v6 {
            way.peer_ip[..4].copy_from_slice(&OUR_V4);
            way.local_ip[..4].copy_from_slice(&PEER_V4);
        }
        let mut frame = vec![0x5a; payload_offset(&way) + payload.max(60)];
        let len = udp_frame(&way, PEER_MAC, payload, &mut frame).unwrap();
        frame.truncate(len);
        frame
    }

    #[test]
    fn unknown_ports_are_reported_at_a_limited_rate() {
        let mut responder = responder(None);
        let mut out = [0; 2048];
        for (v6, payload) in [(false, 10), (false, 1400), (true, 10), (true, 1400)] {
            let frame = datagram(v6, payload);
            let Parsed::Udp(packet) = parse(&frame, &ParseOptions::new(responder.interface()))
            else {
                panic!("no datagram")
            };
            let len = responder
                .unknown_port(&frame, &packet, 0, &mut out)
                .unwrap();
            if v6 {
                let (ip, payload) = ipv6_payload(&out[..len], PEER_MAC);
                assert!(ip.payload_len <= 1240);
                let oracle::Icmpv6Repr::DstUnreachable { reason, header, .. } =
                    icmpv6_repr(&ip, payload)
                else {
                    panic!("no error")
                };
                assert_eq!(reason, oracle::Icmpv6DstUnreachable::PortUnreachable);
                assert_eq!((header.src_addr, header.dst_addr), (peer_v6(), our_v6()));
            } else {
                let (ip, payload) = ipv4_payload(&out[..len], PEER_MAC);
                assert!(ip.payload_len <= 556);
                let packet = oracle::Icmpv4Packet::new_checked(payload).unwrap();
                assert!(packet.verify_checksum());
                if frame.len() > 600 {
                    // The oracle does not read errors that quote a part of a packet only.
                    assert_eq!((payload[0], payload[1]), (3, 3));
                    assert_eq!(payload[8..], frame[14..14 + 548]);
                    continue;
                }
                let oracle::Icmpv4Repr::DstUnreachable { reason, header, .. } =
                    oracle::Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap()
                else {
                    panic!("no error")
                };
                assert_eq!(reason, oracle::Icmpv4DstUnreachable::PortUnreachable);
                assert_eq!(header.src_addr.octets(), PEER_V4);
            }
        }
        let frame = datagram(false, 10);
        let Parsed::Udp(packet) = parse(&frame, &ParseOptions::new(responder.interface())) else {
            panic!("no datagram")
        };
        let mut sent = |now_ns| {
            (0..1000)
                .filter(|_| {
                    responder
                        .unknown_port(&frame, &packet, now_ns, &mut out)
                        .is_some()
                })
                .count()
        };
        assert_eq!(sent(0), 16);
        assert_eq!(sent(9_999_999), 0);
        assert_eq!(sent(10_000_000), 1);
        assert_eq!(sent(60_000_000_000), 20);
    }

    #[test]
    fn announcements_come_twice_and_then_every_round() {
        let mut responder = responder(None);
        let mut out = [0; 2048];
        let mut round = |now_ns| {
            let mut frames = Vec::new();
            while let Some(len) = responder.periodic(now_ns, &mut out) {
                frames.push(out[..len].to_vec());
            }
            frames
        };
        let first = round(5);
        // ARP, two advertisements, one report of each family.
        assert_eq!(first.len(), 5);
        let arp = ethernet_payload(
            &first[0],
            ethernet::BROADCAST,
            oracle::EthernetProtocol::Arp,
        );
        let arp = arp::Packet::parse(arp).unwrap();
        assert_eq!((arp.sender_ip, arp.target_ip), (OUR_V4, OUR_V4));
        for (frame, address) in first[1..3]
            .iter()
            .zip([our_v6(), super::super::link_local(OUR_MAC)])
        {
            let (ip, payload) = ipv6_payload(frame, [0x33, 0x33, 0, 0, 0, 1]);
            assert_eq!(
                icmpv6_repr(&ip, payload),
                oracle::Icmpv6Repr::Ndisc(oracle::NdiscRepr::NeighborAdvert {
                    flags: oracle::NdiscNeighborFlags::OVERRIDE,
                    target_addr: address,
                    lladdr: Some(oracle::RawHardwareAddress::from_bytes(&OUR_MAC)),
                })
            );
        }
        let (_, igmp) = ipv4_payload(&first[3], [1, 0, 0x5e, 0, 0, 22]);
        assert_eq!(igmp3_records(igmp), [(4, [239, 1, 1, 1])]);
        ipv6_payload(&first[4], [0x33, 0x33, 0, 0, 0, 0x16]);

        assert_eq!(round(999_999_999), Vec::<Vec<u8>>::new());
        assert_eq!(round(5 + SECOND_ROUND_NS), first);
        assert_eq!(round(4 + SECOND_ROUND_NS + ROUND_NS).len(), 0);
        let third = round(5 + SECOND_ROUND_NS + ROUND_NS);
        assert_eq!(third[..3], first[..3]);
        let (_, igmp) = ipv4_payload(&third[3], [1, 0, 0x5e, 0, 0, 22]);
        assert_eq!(igmp3_records(igmp), [(2, [239, 1, 1, 1])]);
    }

    #[test]
    fn many_groups_take_several_reports() {
        let groups: Vec<std::net::IpAddr> = (0..500u32)
            .flat_map(|n| {
                [
                    Ipv4Addr::from(0xef00_0000 | n).into(),
                    Ipv6Addr::from((0xff05u128 << 112) | u128::from(n)).into(),
                ]
            })
            .collect();
        let mut responder = Responder::new(Interface::new(&InterfaceConfig {
            mac: OUR_MAC,
            addresses: vec![("10.0.0.1".parse().unwrap(), 24)],
            groups,
            vlan: Some(5),
            mtu: 1500,
            promiscuous: false,
        }));
        let mut out = [0; 1518];
        let (mut v4_groups, mut v6_groups) = (0, 0);
        while let Some(len) = responder.periodic(0, &mut out) {
            assert!(len <= 1518);
            match out[16..18] {
                [8, 0] => v4_groups += usize::from(out[18 + 24 + 7]),
                [0x86, 0xdd] if out[18 + 6] == 0 => v6_groups += usize::from(out[18 + 48 + 7]),
                _ => {}
            }
        }
        assert_eq!((v4_groups, v6_groups), (500, 501));
    }

    /// Well-formed frames of all kinds, to be mutated.
    fn samples() -> Vec<Vec<u8>> {
        let solicitation = oracle::Icmpv6Repr::Ndisc(oracle::NdiscRepr::NeighborSolicit {
            target_addr: our_v6(),
            lladdr: None,
        });
        let mut options = datagram(false, 20);
        options[14] = 0x46;
        let mut report = responder(None);
        let mut out = [0; 2048];
        let mut all = vec![
            arp_request(OUR_V4),
            datagram(false, 20),
            datagram(true, 20),
            options,
            v6(peer_v6(), our_v6(), 255, &solicitation),
            v4(OUR_MAC, OUR_V4, 1, &[8, 0, 0xf7, 0xff, 0, 0, 0, 0]),
            v4(OUR_MAC, OUR_V4, 2, &[0x11, 0, 0xee, 0xff, 0, 0, 0, 0]),
        ];
        while let Some(len) = report.periodic(0, &mut out) {
            all.push(out[..len].to_vec());
        }
        all
    }

    fn exercise(frame: &[u8], promiscuous: bool, trust: bool, room: usize) {
        let interface = Interface::new(&InterfaceConfig {
            mac: OUR_MAC,
            addresses: vec![
                ("10.0.0.1".parse().unwrap(), 24),
                ("fd00::1".parse().unwrap(), 64),
            ],
            groups: vec!["224.0.0.22".parse().unwrap(), "ff02::16".parse().unwrap()],
            vlan: None,
            mtu: 1500,
            promiscuous,
        });
        let mut options = ParseOptions::new(&interface);
        options.l3_good = trust;
        options.l4_good = trust;
        options.partial_checksums = !trust;
        let parsed = parse(frame, &options);
        let mut responder = Responder::new(interface.clone());
        let mut out = vec![0; room];
        if let Some(len) = responder.handle(frame, &parsed, &mut out) {
            assert!(len <= room);
        }
        if let Parsed::Udp(packet) = parsed {
            assert!(packet.payload(frame).len() <= frame.len());
            if let Some(len) = responder.unknown_port(frame, &packet, 0, &mut out) {
                assert!(len <= room);
            }
            let _ = reply_to(frame, &packet, &interface, 0, 0);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn mutated_frames_are_safe(
            sample in any::<prop::sample::Index>(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            cut in prop::option::of(any::<prop::sample::Index>()), promiscuous: bool, trust: bool, room in 0usize..1600,
        ) {
            let samples = samples();
            let mut frame = sample.get(&samples).clone();
            for (at, value) in changes {
                let at = at.index(frame.len());
                frame[at] = value;
            }
            if let Some(cut) = cut {
                frame.truncate(cut.index(frame.len()));
            }
            exercise(&frame, promiscuous, trust, room);
        }

        #[test]
        fn any_bytes_are_safe(mut frame in prop::collection::vec(any::<u8>(), 0..200), kind in 0usize..4, promiscuous: bool, trust: bool) {
            if frame.len() > 14 {
                frame[..6].copy_from_slice(&OUR_MAC);
                frame[12..14].copy_from_slice(&[[8, 0], [0x86, 0xdd], [8, 6], [0x81, 0]][kind]);
            }
            exercise(&frame, promiscuous, trust, 2048);
        }
    }
}
