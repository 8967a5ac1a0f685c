//! Formats on the wire, sans-io: bytes in, values out, and back.

pub mod arp;
pub mod checksum;
pub mod datagram;
pub mod ethernet;
pub mod icmp;
pub mod icmpv6;
pub mod igmp;
pub mod ipv4;
pub mod ipv6;
pub mod kafka;
pub mod record_batch;
pub mod udp;
pub mod varint;
