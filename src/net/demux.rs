//! Which route a datagram takes: destination group, then destination port.
//!
//! Invariant: an entry for a group wins over one for any address; built once, then read only. A
//! lookup is one load from a table of 128 KiB, of which a running server touches a few lines.

use std::net::IpAddr;

use super::interface::Relation;
use super::parse::UdpPacket;

/// What to do with a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The payload is one message of the route with this index.
    Raw(u16),
    /// Every non-empty line is a message of the route with this index.
    Lines(u16),
    /// The datagram protocol.
    Datagram,
}

/// A listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    /// Destination UDP port.
    pub udp_port: u16,
    /// Only datagrams to this group; `None`: to any of our addresses or groups.
    pub group: Option<IpAddr>,
    /// Where they go.
    pub target: Target,
}

/// Two listeners want the same datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("two listeners share UDP port {udp_port}{}; give one of them another port or group", match group { Some(group) => format!(" of group {group}"), None => String::new() })]
pub struct DuplicateListener {
    /// The port.
    pub udp_port: u16,
    /// The group.
    pub group: Option<IpAddr>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// As in the IP header, IPv4 in the first four bytes; of no meaning unless `ip_version` is set.
    group: [u8; 16],
    /// 4 or 6 for a group, 0 for any address.
    ip_version: u8,
    /// Whether the next entry has the same port.
    more: bool,
    target: Target,
}

/// The table.
#[derive(Debug, Clone)]
pub struct Demux {
    /// By UDP port: 0, or 1 + index of the port's first entry.
    by_port: Box<[u16; 65536]>,
    entries: Vec<Entry>,
}

impl Demux {
    /// Builds the table; at most 65 535 listeners, more are a caller's error.
    pub fn new(listeners: &[Listener]) -> Result<Self, DuplicateListener> {
        let mut sorted = listeners.to_vec();
        // Groups first: `None` sorts last.
        sorted
            .sort_by_key(|listener| (listener.udp_port, listener.group.is_none(), listener.group));
        for pair in sorted.windows(2) {
            if pair[0].udp_port == pair[1].udp_port && pair[0].group == pair[1].group {
                return Err(DuplicateListener {
                    udp_port: pair[0].udp_port,
                    group: pair[0].group,
                });
            }
        }
        let mut by_port: Box<[u16; 65536]> = vec![0; 65536]
            .into_boxed_slice()
            .try_into()
            .expect("the table was just made with this length");
        let mut entries = Vec::with_capacity(sorted.len());
        for (index, listener) in sorted.iter().enumerate() {
            let first = &mut by_port[usize::from(listener.udp_port)];
            if *first == 0 {
                *first = u16::try_from(index + 1).expect("at most 65535 listeners");
            }
            let mut group = [0; 16];
            let ip_version = match listener.group {
                None => 0,
                Some(IpAddr::V4(ip)) => {
                    group[..4].copy_from_slice(&ip.octets());
                    4
                }
                Some(IpAddr::V6(ip)) => {
                    group = ip.octets();
                    6
                }
            };
            entries.push(Entry {
                group,
                ip_version,
                more: sorted
                    .get(index + 1)
                    .is_some_and(|next| next.udp_port == listener.udp_port),
                target: listener.target,
            });
        }
        Ok(Self { by_port, entries })
    }

    /// Where a parsed datagram goes; `None`: nobody listens.
    ///
    /// # Panics
    /// When `packet` is not of `frame`.
    #[inline(always)]
    pub fn lookup(&self, frame: &[u8], packet: &UdpPacket) -> Option<Target> {
        let first = self.by_port[usize::from(packet.dst_port)];
        let entry = self.entries.get(usize::from(first.checked_sub(1)?))?;
        if entry.ip_version == 0 {
            return Some(entry.target);
        }
        self.lookup_group(usize::from(first) - 1, frame, packet)
    }

    /// As [`Demux::lookup`], for a datagram to this UDP port of one of our addresses, or of the group that it was sent to.
    pub fn target(&self, udp_port: u16, group: Option<IpAddr>) -> Option<Target> {
        let first = self.by_port[usize::from(udp_port)];
        let first = usize::from(first.checked_sub(1)?);
        match group {
            None => self.find(first, Relation::Own, 4, &[0; 4]),
            Some(IpAddr::V4(ip)) => self.find(first, Relation::Group, 4, &ip.octets()),
            Some(IpAddr::V6(ip)) => self.find(first, Relation::Group, 6, &ip.octets()),
        }
    }

    fn lookup_group(&self, first: usize, frame: &[u8], packet: &UdpPacket) -> Option<Target> {
        self.find(first, packet.relation, packet.ip_version, packet.dst(frame))
    }

    /// The first entry from `first` on, of the same UDP port, that takes a datagram to `destination`.
    fn find(
        &self,
        first: usize,
        relation: Relation,
        ip_version: u8,
        destination: &[u8],
    ) -> Option<Target> {
        for entry in &self.entries[first..] {
            if entry.ip_version == 0
                || (relation == Relation::Group
                    && entry.ip_version == ip_version
                    && entry.group[..destination.len()] == *destination)
            {
                return Some(entry.target);
            }
            if !entry.more {
                break;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(frame: &mut [u8; 64], destination: &str, dst_port: u16) -> UdpPacket {
        let destination: IpAddr = destination.parse().unwrap();
        let ip_version = match destination {
            IpAddr::V4(ip) => {
                frame[30..34].copy_from_slice(&ip.octets());
                4
            }
            IpAddr::V6(ip) => {
                frame[38..54].copy_from_slice(&ip.octets());
                6
            }
        };
        UdpPacket {
            payload_offset: 62,
            payload_len: 0,
            ip_offset: 14,
            src_port: 1,
            dst_port,
            ip_version,
            relation: if destination.is_multicast() {
                Relation::Group
            } else {
                Relation::Own
            },
        }
    }

    #[test]
    fn a_group_wins_over_any_address() {
        let group = |udp_port, group: &str, target| Listener {
            udp_port,
            group: Some(group.parse().unwrap()),
            target,
        };
        let any = |udp_port, target| Listener {
            udp_port,
            group: None,
            target,
        };
        let demux = Demux::new(&[
            any(514, Target::Lines(0)),
            group(514, "239.0.0.2", Target::Raw(2)),
            group(514, "239.0.0.1", Target::Raw(1)),
            group(515, "ff05::1", Target::Raw(3)),
            any(65535, Target::Datagram),
        ])
        .unwrap();
        let mut frame = [0; 64];
        for (destination, port, expected) in [
            ("10.0.0.1", 514, Some(Target::Lines(0))),
            ("239.0.0.1", 514, Some(Target::Raw(1))),
            ("239.0.0.2", 514, Some(Target::Raw(2))),
            ("239.0.0.3", 514, Some(Target::Lines(0))),
            ("ff05::1", 514, Some(Target::Lines(0))),
            ("ff05::1", 515, Some(Target::Raw(3))),
            ("ff05::2", 515, None),
            ("fd00::2", 515, None),
            ("fd00::2", 65535, Some(Target::Datagram)),
            ("fd00::2", 0, None),
            ("fd00::2", 513, None),
        ] {
            let packet = packet(&mut frame, destination, port);
            assert_eq!(
                demux.lookup(&frame, &packet),
                expected,
                "{destination} {port}"
            );
            let group: Option<IpAddr> = destination.parse().ok().filter(IpAddr::is_multicast);
            assert_eq!(demux.target(port, group), expected, "{destination} {port}");
        }
    }

    #[test]
    fn doubles_are_refused() {
        let listener = Listener {
            udp_port: 9,
            group: None,
            target: Target::Raw(0),
        };
        let error = Demux::new(&[listener, listener]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "two listeners share UDP port 9; give one of them another port or group"
        );
    }
}
