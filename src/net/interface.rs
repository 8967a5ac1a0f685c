//! Who we are on one port: addresses, groups and VLAN.
//!
//! Invariant: built once, never changed while packets flow; the checks compare with a handful of
//! entries and allocate nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::wire::ethernet::{self, Mac, NO_VLAN};

/// Every host is in this group (RFC 1112 §4).
pub const ALL_SYSTEMS_V4: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 1);
/// Every node is in this group (RFC 4291 §2.7.1).
pub const ALL_NODES_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// What an [`Interface`] is made from.
#[derive(Debug, Clone, Default)]
pub struct InterfaceConfig {
    /// Ethernet address of the port.
    pub mac: Mac,
    /// Addresses with their prefix lengths, both families.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Groups to join.
    pub groups: Vec<IpAddr>,
    /// The VLAN whose tagged frames are ours; without it, untagged ones.
    pub vlan: Option<u16>,
    /// Bytes of an IP packet.
    pub mtu: u16,
    /// Take frames to any Ethernet address; the IP destination must be ours all the same.
    pub promiscuous: bool,
}

/// One port's identity.
#[derive(Debug, Clone)]
pub struct Interface {
    mac: Mac,
    vlan: u16,
    mtu: u16,
    promiscuous: bool,
    ipv4: Vec<(Ipv4Addr, u8)>,
    ipv6: Vec<(Ipv6Addr, u8)>,
    groups_v4: Vec<Ipv4Addr>,
    groups_v6: Vec<Ipv6Addr>,
    /// Of all groups of both families, as `mac_number`, without doubles.
    group_macs: Vec<u64>,
    mac_number: u64,
    /// The first address of each family again, beside the MAC: most packets go there. Zero without one.
    first_v4: u32,
    first_v6: u128,
    /// Addresses as native numbers.
    unicast_v4: Vec<u32>,
    broadcast_v4: Vec<u32>,
    unicast_v6: Vec<u128>,
    group_numbers_v4: Vec<u32>,
    group_numbers_v6: Vec<u128>,
}

#[inline(always)]
fn mac_number(mac: &Mac) -> u64 {
    let mut wide = [0; 8];
    wide[..6].copy_from_slice(mac);
    u64::from_ne_bytes(wide)
}

/// The link-local address made from an Ethernet address (RFC 4291 appendix A).
pub fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let word = |high, low| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(
        0xfe80,
        0,
        0,
        0,
        word(a ^ 2, b),
        word(c, 0xff),
        word(0xfe, d),
        word(e, f),
    )
}

/// The group in which an address is looked for (RFC 4291 §2.7.1).
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let ip = address.octets();
    Ipv6Addr::new(
        0xff02,
        0,
        0,
        0,
        0,
        1,
        0xff00 | u16::from(ip[13]),
        u16::from_be_bytes([ip[14], ip[15]]),
    )
}

/// How an address relates to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// One of our own addresses.
    Own,
    /// A broadcast address of our networks.
    Broadcast,
    /// A group we are in.
    Group,
    /// None of these.
    Foreign,
}

impl Interface {
    /// A link-local IPv6 address is added when none is configured; the all-nodes and
    /// solicited-node groups always.
    pub fn new(config: &InterfaceConfig) -> Self {
        let mut ipv4 = Vec::new();
        let mut ipv6 = Vec::new();
        for &(address, prefix) in &config.addresses {
            match address {
                IpAddr::V4(ip) => ipv4.push((ip, prefix.min(32))),
                IpAddr::V6(ip) => ipv6.push((ip, prefix.min(128))),
            }
        }
        if !ipv6.iter().any(|(ip, _)| ip.is_unicast_link_local()) {
            ipv6.push((link_local(config.mac), 64));
        }
        let mut groups_v4 = Vec::new();
        let mut groups_v6 = Vec::new();
        for group in &config.groups {
            match group {
                IpAddr::V4(ip) if ip.is_multicast() => groups_v4.push(*ip),
                IpAddr::V6(ip) if ip.is_multicast() => groups_v6.push(*ip),
                _ => {}
            }
        }
        if !ipv4.is_empty() || !groups_v4.is_empty() {
            groups_v4.push(ALL_SYSTEMS_V4);
        }
        groups_v6.push(ALL_NODES_V6);
        groups_v6.extend(ipv6.iter().map(|(ip, _)| solicited_node(*ip)));
        groups_v4.sort_unstable();
        groups_v4.dedup();
        groups_v6.sort_unstable();
        groups_v6.dedup();
        let mut group_macs: Vec<u64> = groups_v4
            .iter()
            .map(|ip| mac_number(&ethernet::group_mac_v4(*ip)))
            .chain(
                groups_v6
                    .iter()
                    .map(|ip| mac_number(&ethernet::group_mac_v6(*ip))),
            )
            .collect();
        group_macs.sort_unstable();
        group_macs.dedup();
        let mut broadcast_v4 = vec![u32::MAX];
        // A network of 31 or 32 bits has no broadcast address (RFC 3021).
        broadcast_v4.extend(
            ipv4.iter()
                .filter(|(_, prefix)| *prefix < 31)
                .map(|(ip, prefix)| u32::from(*ip) | (u32::MAX >> prefix)), // prefix < 31: no overflow
        );
        Self {
            mac: config.mac,
            vlan: config.vlan.unwrap_or(NO_VLAN),
            mtu: config.mtu,
            promiscuous: config.promiscuous,
            first_v4: ipv4.first().map_or(0, |(ip, _)| u32::from(*ip)),
            first_v6: ipv6.first().map_or(0, |(ip, _)| u128::from(*ip)),
            unicast_v4: ipv4.iter().map(|(ip, _)| u32::from(*ip)).collect(),
            unicast_v6: ipv6.iter().map(|(ip, _)| u128::from(*ip)).collect(),
            group_numbers_v4: groups_v4.iter().map(|ip| u32::from(*ip)).collect(),
            group_numbers_v6: groups_v6.iter().map(|ip| u128::from(*ip)).collect(),
            broadcast_v4,
            group_macs,
            mac_number: mac_number(&config.mac),
            ipv4,
            ipv6,
            groups_v4,
            groups_v6,
        }
    }

    /// The port's Ethernet address.
    #[inline(always)]
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// The VLAN's number, [`NO_VLAN`] for untagged.
    #[inline(always)]
    pub fn vlan(&self) -> u16 {
        self.vlan
    }

    /// Bytes of an IP packet.
    #[inline(always)]
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// IPv4 addresses with prefix lengths.
    pub fn ipv4(&self) -> &[(Ipv4Addr, u8)] {
        &self.ipv4
    }

    /// IPv6 addresses with prefix lengths, a link-local one among them.
    pub fn ipv6(&self) -> &[(Ipv6Addr, u8)] {
        &self.ipv6
    }

    /// IPv4 groups in ascending order, `224.0.0.1` included.
    pub fn groups_v4(&self) -> &[Ipv4Addr] {
        &self.groups_v4
    }

    /// IPv6 groups in ascending order, `ff02::1` and the solicited-node groups included.
    pub fn groups_v6(&self) -> &[Ipv6Addr] {
        &self.groups_v6
    }

    /// Ethernet addresses of all groups, for the NIC's filter.
    pub fn group_macs(&self) -> impl Iterator<Item = Mac> {
        self.group_macs.iter().map(|number| {
            let mut mac = [0; 6];
            mac.copy_from_slice(&number.to_ne_bytes()[..6]);
            mac
        })
    }

    /// Whether a frame to this address is for us: ours, broadcast, or a group's.
    #[inline(always)]
    pub fn accepts_mac(&self, mac: &Mac) -> bool {
        let number = mac_number(mac);
        number == self.mac_number || self.accepts_other_mac(mac, number)
    }

    fn accepts_other_mac(&self, mac: &Mac, number: u64) -> bool {
        self.promiscuous
            || (ethernet::is_group(mac)
                && (*mac == ethernet::BROADCAST || self.group_macs.contains(&number)))
    }

    /// What an IPv4 destination is to us.
    #[inline(always)]
    pub fn relation_v4(&self, address: [u8; 4]) -> Relation {
        let number = u32::from_be_bytes(address);
        if number == self.first_v4 && number != 0 {
            return Relation::Own;
        }
        self.other_relation_v4(number)
    }

    fn other_relation_v4(&self, number: u32) -> Relation {
        if self.unicast_v4.contains(&number) {
            Relation::Own
        } else if self.group_numbers_v4.contains(&number) {
            Relation::Group
        } else if self.broadcast_v4.contains(&number) {
            Relation::Broadcast
        } else {
            Relation::Foreign
        }
    }

    /// What an IPv6 destination is to us.
    #[inline(always)]
    pub fn relation_v6(&self, address: [u8; 16]) -> Relation {
        let number = u128::from_be_bytes(address);
        if number == self.first_v6 {
            return Relation::Own;
        }
        self.other_relation_v6(number)
    }

    fn other_relation_v6(&self, number: u128) -> Relation {
        if self.unicast_v6.contains(&number) {
            Relation::Own
        } else if self.group_numbers_v6.contains(&number) {
            Relation::Group
        } else {
            Relation::Foreign
        }
    }

    /// Our address from which to speak to `peer`: one of the same network, else the first.
    pub fn source_v4(&self, peer: [u8; 4]) -> Option<[u8; 4]> {
        let peer = u32::from_be_bytes(peer);
        let near = |(ip, prefix): &&(Ipv4Addr, u8)| {
            let host_bits = u32::MAX.checked_shr(u32::from(*prefix)).unwrap_or(0);
            (u32::from(*ip) ^ peer) & !host_bits == 0
        };
        self.ipv4
            .iter()
            .find(near)
            .or(self.ipv4.first())
            .map(|(ip, _)| ip.octets())
    }

    /// Our address from which to speak to `peer`: one of the same scope, in the same network where
    /// there is one (RFC 6724 rules 2 and 8, as far as one interface goes).
    pub fn source_v6(&self, peer: [u8; 16]) -> Option<[u8; 16]> {
        let peer = Ipv6Addr::from(peer);
        let local = peer.is_unicast_link_local()
            || (peer.octets()[0] == 0xff && peer.octets()[1] & 0xf == 2);
        let same_scope = |(ip, _): &&(Ipv6Addr, u8)| ip.is_unicast_link_local() == local;
        let near = |(ip, prefix): &&(Ipv6Addr, u8)| {
            let host_bits = u128::MAX.checked_shr(u32::from(*prefix)).unwrap_or(0);
            (u128::from(*ip) ^ u128::from(peer)) & !host_bits == 0
        };
        self.ipv6
            .iter()
            .find(|entry| same_scope(entry) && near(entry))
            .or_else(|| self.ipv6.iter().find(same_scope))
            .or(self.ipv6.first())
            .map(|(ip, _)| ip.octets())
    }

    /// Whether an IPv4 packet to this address is for us.
    #[inline(always)]
    pub fn accepts_v4(&self, address: [u8; 4]) -> bool {
        self.relation_v4(address) != Relation::Foreign
    }

    /// Whether an IPv6 packet to this address is for us.
    #[inline(always)]
    pub fn accepts_v6(&self, address: [u8; 16]) -> bool {
        self.relation_v6(address) != Relation::Foreign
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface() -> Interface {
        Interface::new(&InterfaceConfig {
            mac: [0x02, 0, 0, 0xaa, 0xbb, 0xcc],
            addresses: vec![
                ("10.1.2.3".parse().unwrap(), 24),
                ("fd00::1:2".parse().unwrap(), 64),
            ],
            groups: vec!["239.1.1.1".parse().unwrap(), "ff05::9".parse().unwrap()],
            vlan: None,
            mtu: 1500,
            promiscuous: false,
        })
    }

    #[test]
    fn a_link_local_address_and_its_groups_are_added() {
        let interface = interface();
        let local: Ipv6Addr = "fe80::aa:bbcc".parse().unwrap();
        // EUI-64 of 02:00:00:aa:bb:cc: the universal bit flips to 0, ff:fe goes into the middle.
        let expected: Ipv6Addr = "fe80::ff:feaa:bbcc".parse().unwrap();
        assert_ne!(local, expected);
        assert_eq!(interface.ipv6()[1], (expected, 64));
        for group in ["ff02::1", "ff02::1:ff01:2", "ff02::1:ffaa:bbcc", "ff05::9"] {
            let group: Ipv6Addr = group.parse().unwrap();
            assert_eq!(interface.relation_v6(group.octets()), Relation::Group);
            assert!(interface.accepts_mac(&ethernet::group_mac_v6(group)));
        }
    }

    #[test]
    fn addresses_are_told_apart() {
        let interface = interface();
        assert_eq!(interface.relation_v4([10, 1, 2, 3]), Relation::Own);
        assert_eq!(interface.relation_v4([10, 1, 2, 255]), Relation::Broadcast);
        assert_eq!(interface.relation_v4([255; 4]), Relation::Broadcast);
        assert_eq!(interface.relation_v4([239, 1, 1, 1]), Relation::Group);
        assert_eq!(interface.relation_v4([224, 0, 0, 1]), Relation::Group);
        assert_eq!(interface.relation_v4([239, 1, 1, 2]), Relation::Foreign);
        assert!(!interface.accepts_v4([10, 1, 2, 4]));
        assert!(interface.accepts_mac(&[0x02, 0, 0, 0xaa, 0xbb, 0xcc]));
        assert!(interface.accepts_mac(&ethernet::BROADCAST));
        assert!(!interface.accepts_mac(&[0x02, 0, 0, 0xaa, 0xbb, 0xcd]));
        assert!(!interface.accepts_mac(&[1, 0, 0x5e, 1, 1, 2]));
        assert_eq!(interface.group_macs().count(), 6);
    }
}
