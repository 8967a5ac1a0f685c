//! A frame from the network: parse, demultiplex, answer. Nothing may panic, offsets lie within the
//! frame, answers within their buffer, and an answer to a datagram is itself well-formed.
//!
//! Checksums would keep mutations out, so that half of the inputs count as verified by the NIC and
//! ICMP checksums are made good.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use taffrail::net::{
    AckCoalescer, Demux, Interface, InterfaceConfig, Listener, ParseOptions, Parsed, Responder,
    Target, parse, reply_to,
};
use taffrail::wire::checksum::{Sum, pseudo_header};
use taffrail::wire::datagram::{AckEntry, ErrorCode};

const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn interface(mac: [u8; 6], host: u8, promiscuous: bool, vlan: Option<u16>) -> Interface {
    Interface::new(&InterfaceConfig {
        mac,
        addresses: vec![
            (format!("10.0.0.{host}").parse().expect("an address"), 8),
            (format!("fd00::{host}").parse().expect("an address"), 64),
        ],
        groups: vec![
            "239.1.1.1".parse().expect("a group"),
            "ff05::7".parse().expect("a group"),
        ],
        vlan,
        mtu: 1500,
        promiscuous,
    })
}

static INTERFACES: LazyLock<[Interface; 4]> = LazyLock::new(|| {
    [
        interface(OUR_MAC, 1, false, None),
        interface(OUR_MAC, 1, true, None),
        interface(OUR_MAC, 1, false, Some(7)),
        interface(OUR_MAC, 1, true, Some(7)),
    ]
});

static DEMUX: LazyLock<Demux> = LazyLock::new(|| {
    Demux::new(&[
        Listener {
            udp_port: 514,
            group: None,
            target: Target::Raw(0),
        },
        Listener {
            udp_port: 514,
            group: Some("239.1.1.1".parse().expect("a group")),
            target: Target::Lines(1),
        },
        Listener {
            udp_port: 9092,
            group: None,
            target: Target::Datagram,
        },
    ])
    .expect("listeners differ")
});

/// Makes the checksum of an untagged ICMP, IGMP or ICMPv6 message without IP options good, as a
/// sender would.
fn fix_control_checksum(frame: &mut [u8]) {
    match frame {
        [_, _, _, _, _, _, _, _, _, _, _, _, 8, 0, 0x45, ..]
            if frame.len() >= 42 && frame[23] < 3 =>
        {
            let len = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
            if let Some(message) = frame.get_mut(34..14 + len).filter(|m| m.len() >= 8) {
                message[2..4].fill(0);
                let checksum = Sum::of(message).checksum();
                message[2..4].copy_from_slice(&checksum.to_be_bytes());
            }
        }
        [_, _, _, _, _, _, _, _, _, _, _, _, 0x86, 0xdd, ..]
            if frame.len() >= 62 && frame[20] == 58 =>
        {
            let len = u16::from_be_bytes([frame[18], frame[19]]);
            let (ip, rest) = frame.split_at_mut(54);
            if let Some(message) = rest.get_mut(..usize::from(len)).filter(|m| m.len() >= 4) {
                message[2..4].fill(0);
                let sum = pseudo_header(&ip[22..54], 58, len).plus(Sum::of(message));
                message[2..4].copy_from_slice(&sum.checksum().to_be_bytes());
            }
        }
        _ => {}
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&control, bytes)) = data.split_first() else {
        return;
    };
    let mut frame = bytes.to_vec();
    let interface = &INTERFACES[usize::from(control & 3)];
    let mut options = ParseOptions::new(interface);
    options.l3_good = control & 4 != 0;
    options.l4_good = control & 8 != 0;
    options.partial_checksums = control & 16 != 0;
    if control & 32 != 0 {
        options.stripped_vlan = 7;
    }
    if control & 64 != 0 {
        fix_control_checksum(&mut frame);
    }
    let room = if control & 128 != 0 { 2048 } else { 64 };
    let parsed = parse(&frame, &options);
    let mut responder = Responder::new(interface.clone());
    let mut out = [0; 2048];
    let out = &mut out[..room];
    let mut sent = responder.handle(&frame, &parsed, out);
    if let Parsed::Udp(packet) = parsed {
        assert!(packet.payload(&frame).len() == usize::from(packet.payload_len));
        let _ = DEMUX.lookup(&frame, &packet);
        if let Some(reply) = reply_to(&frame, &packet, interface, 0, 0) {
            let mut acks = AckCoalescer::new(2);
            assert!(acks.push(
                reply,
                AckEntry {
                    request_id: 1,
                    topic_id: 1,
                    partition: 0,
                    base_offset: 0,
                    base_sequence: 0,
                    producer_epoch: 0,
                    error: ErrorCode::None,
                    credit: 1,
                }
            ));
            if let Some(Ok(ack)) = acks.next_frame(OUR_MAC, 1500, out) {
                // Whoever takes all frames and has the peer's address reads it.
                let peer = Interface::new(&InterfaceConfig {
                    mac: PEER_MAC,
                    addresses: vec![if packet.ip_version == 4 {
                        let [a, b, c, d, ..] = reply.peer_ip;
                        (std::net::Ipv4Addr::new(a, b, c, d).into(), 32)
                    } else {
                        (std::net::Ipv6Addr::from(reply.peer_ip).into(), 128)
                    }],
                    groups: Vec::new(),
                    vlan: (interface.vlan() == 7).then_some(7),
                    mtu: 1500,
                    promiscuous: true,
                });
                let answer = parse(&out[..ack.len], &ParseOptions::new(&peer));
                assert!(matches!(answer, Parsed::Udp(_)), "{answer:?}");
            }
        }
        sent = responder.unknown_port(&frame, &packet, 0, out);
    }
    assert!(sent.is_none_or(|len| len >= 60 && len <= room));
    // A query may have left more to say than fitted.
    for _ in 0..64 {
        if responder.periodic(0, out).is_none() {
            return;
        }
    }
    panic!("announcements do not end");
});
