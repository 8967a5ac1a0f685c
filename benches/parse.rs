//! Cost of reading a received frame: `cargo bench --no-default-features --bench parse`.
//!
//! Frames are in cache; `nic` means that the NIC verified the checksums, `software` that nobody did.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use taffrail::net::{
    Demux, Interface, InterfaceConfig, Listener, ParseOptions, Parsed, Target, parse,
    payload_offset, udp_frame,
};
use taffrail::shard::ReplyTo;

const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// 64 frames from 64 senders with payloads of `payload` bytes.
fn frames(v6: bool, payload: usize) -> Vec<Vec<u8>> {
    (0..64u8)
        .map(|sender| {
            let mut way = ReplyTo {
                rx: 0,
                ip_version: if v6 { 6 } else { 4 },
                port: 0,
                mac: OUR_MAC,
                vlan: ReplyTo::NO_VLAN,
                peer_ip: [0; 16],
                local_ip: [0; 16],
                peer_port: 514,
                local_port: 1000 + u16::from(sender),
                reserved: [0; 16],
            };
            let (peer, local): (&[u8], &[u8]) = if v6 {
                (
                    &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
                    &[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
                )
            } else {
                (&[10, 0, 0, 1], &[10, 0, 0, 2])
            };
            way.peer_ip[..peer.len()].copy_from_slice(peer);
            way.local_ip[..local.len()].copy_from_slice(local);
            let mut frame = vec![0x61; (payload_offset(&way) + payload).max(60)];
            let len = udp_frame(&way, [2, 0, 0, 0, 0, 2], payload, &mut frame)
                .expect("the buffer was made for it");
            frame.truncate(len);
            frame
        })
        .collect()
}

fn parsing(c: &mut Criterion) {
    let interface = Interface::new(&InterfaceConfig {
        mac: OUR_MAC,
        addresses: vec![
            ("10.0.0.1".parse().expect("an address"), 24),
            ("fd00::1".parse().expect("an address"), 64),
        ],
        groups: Vec::new(),
        vlan: None,
        mtu: 1500,
        promiscuous: false,
    });
    let demux = Demux::new(&[Listener {
        udp_port: 514,
        group: None,
        target: Target::Raw(0),
    }])
    .expect("one listener");
    let mut group = c.benchmark_group("parse_and_demux_64_frames");
    group.throughput(criterion::Throughput::Elements(64));
    for (v6, payload, nic) in [
        (false, 22, true),
        (false, 22, false),
        (false, 200, false),
        (false, 1472, false),
        (true, 22, true),
        (true, 200, false),
    ] {
        let frames = frames(v6, payload);
        let mut options = ParseOptions::new(&interface);
        options.l3_good = nic;
        options.l4_good = nic;
        let name = format!(
            "ipv{}/{payload}B/{}",
            if v6 { 6 } else { 4 },
            if nic { "nic" } else { "software" }
        );
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut found = 0;
                for frame in &frames {
                    let frame = black_box(frame.as_slice());
                    if let Parsed::Udp(packet) = parse(frame, &options) {
                        found += usize::from(demux.lookup(frame, &packet).is_some());
                    }
                }
                assert_eq!(found, 64);
                found
            })
        });
    }
    group.finish();
}

criterion_group!(benches, parsing);
criterion_main!(benches);
