//! A recorded capture goes in, and every packet of it is found in the log or under its counter, one for
//! one: what is expected is written by tests/pcap/make_capture.py from the protocols' specifications.
//! Then damaged packets, by the thousand, for which the sums must hold.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Server, run, wait_until};
use taffrail::control::protocol::{PortStats, Reasons, Stats, TopicStats, total};

/// Its scapy is Debian's.
const PYTHON: &str = "/usr/bin/python3";
const GENERATOR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pcap/make_capture.py");

const TABLES: &str = r#"
[[topic]]
name = "ticks"
[[topic]]
name = "logs"
[[topic]]
name = "groups"
[[topic]]
name = "acked"
partitions = 2
[[topic]]
name = "tagged"
[[udp]]
udp_port = 5000
topic = "ticks"
[[udp]]
udp_port = 5000
group = "239.1.2.4"
topic = "groups"
port = "p0"
[[udp]]
udp_port = 514
topic = "logs"
split = "line"
[[udp]]
udp_port = 5001
topic = "tagged"
port = "p1"
[datagram]
udp_port = 9700
"#;

#[derive(Deserialize)]
struct Expected {
    ports: BTreeMap<String, ExpectedPort>,
    topics: BTreeMap<String, ExpectedTopic>,
}

#[derive(Deserialize)]
struct ExpectedPort {
    packets: u64,
    delivered: u64,
    handled: Reasons,
    dropped: Reasons,
}

#[derive(Deserialize)]
struct ExpectedTopic {
    received: u64,
    stored: u64,
    duplicate: u64,
    refused: Reasons,
    /// By partition, in order; each character is a byte.
    messages: BTreeMap<String, Vec<String>>,
}

/// A server whose ports play the captures of `folder`, p0.pcap and p1.pcap.
fn server(folder: &Path) -> Server {
    let port = |number: u8, vlan: &str| {
        let file = |name: &str| {
            folder
                .join(format!("p{number}{name}.pcap"))
                .display()
                .to_string()
        };
        format!(
            "[[port]]\nname = \"p{number}\"\ndevice = \"net_pcap{number},rx_pcap={},tx_pcap={}\"\n\
             addresses = [\"10.{net}.0.2/24\", \"fd{net}::2/64\"]\n{vlan}\n",
            file(""),
            file("-out"),
            net = 77 + number
        )
    };
    let multicast = "multicast = [\"239.1.2.3\", \"239.1.2.4\", \"ff15::77\"]";
    let tables = format!("{}{}{TABLES}", port(0, multicast), port(1, "vlan = 100"));
    Server::start(folder, None, "", &tables)
}

/// Waits until `packets` were received and everything is durable; then no account may be off.
fn settled(server: &Server, packets: u64) -> Stats {
    let mut last = Stats::default();
    wait_until(&format!("{packets} packets"), || {
        last = server.stats();
        let durable =
            |t: &TopicStats| -> i64 { t.partitions.iter().map(|p| p.high_watermark).sum() };
        last.ports.iter().map(|p| p.received).sum::<u64>() >= packets
            && last
                .topics
                .iter()
                .all(|t| t.in_flight == 0 && durable(t) as u64 >= t.stored)
            && last.shards.iter().all(|s| s.pending_acks == 0)
    });
    assert_eq!(last.imbalances(), Vec::<String>::new());
    last
}

fn port<'a>(stats: &'a Stats, name: &str) -> &'a PortStats {
    stats.ports.iter().find(|p| p.name == name).unwrap()
}

fn topic<'a>(stats: &'a Stats, name: &str) -> &'a TopicStats {
    stats.topics.iter().find(|t| t.name == name).unwrap()
}

fn values(server: &Server, topic: &str, partition: u32) -> Vec<Vec<u8>> {
    let records = server.values(topic, partition, 0);
    for (i, (offset, _)) in records.iter().enumerate() {
        assert_eq!(*offset, i as i64, "offsets are dense");
    }
    records.into_iter().map(|(_, value)| value).collect()
}

fn play(seed: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    run(PYTHON, &[GENERATOR, "make", path, seed]);
    let text = std::fs::read(folder.path().join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_slice(&text).unwrap();
    // The generator's own account must close, or it expects nothing of some packet.
    for (name, port) in &expected.ports {
        let sum = port.delivered + total(&port.handled) + total(&port.dropped);
        assert_eq!(port.packets, sum, "{name}");
    }
    let mut server = server(folder.path());
    let stats = settled(&server, expected.ports.values().map(|p| p.packets).sum());

    for (name, expected) in &expected.ports {
        let found = port(&stats, name);
        assert_eq!(found.dropped, expected.dropped, "{name}, seed {seed}");
        assert_eq!(found.handled, expected.handled, "{name}, seed {seed}");
        assert_eq!(found.delivered, expected.delivered, "{name}, seed {seed}");
        assert_eq!(found.received, expected.packets, "{name}, seed {seed}");
        assert_eq!(found.nic, Reasons::new(), "{name}");
        assert_eq!(found.send_dropped, 0, "{name}");
    }
    for (name, expected) in &expected.topics {
        let found = topic(&stats, name);
        assert_eq!(found.refused, expected.refused, "{name}, seed {seed}");
        assert_eq!(found.dropped, Reasons::new(), "{name}, seed {seed}");
        assert_eq!(
            (found.received, found.stored, found.duplicate),
            (expected.received, expected.stored, expected.duplicate),
            "{name}, seed {seed}"
        );
        for partition in 0..found.partitions.len() {
            let messages = expected.messages.get(&partition.to_string());
            let expected: Vec<Vec<u8>> = messages
                .into_iter()
                .flatten()
                .map(|m| {
                    m.chars()
                        .map(|c| u8::try_from(u32::from(c)).unwrap())
                        .collect()
                })
                .collect();
            let found = values(&server, name, partition as u32);
            let differs = found.iter().zip(&expected).position(|(f, e)| f != e);
            assert_eq!(differs, None, "{name}/{partition}, seed {seed}");
            assert_eq!(
                found.len(),
                expected.len(),
                "{name}/{partition}, seed {seed}"
            );
        }
    }
    let sent: BTreeMap<String, u64> = server
        .stats()
        .ports
        .iter()
        .map(|p| (p.name.clone(), p.sent))
        .collect();
    // Stopped, so that the driver has written everything: answers and acknowledgements.
    server.stop();
    let text = run(PYTHON, &[GENERATOR, "check", path]);
    let written: BTreeMap<String, u64> = serde_json::from_str(&text).unwrap();
    for (name, sent) in sent {
        // Announcements go on until the stop.
        assert!(written[&name] >= sent, "{name}: {written:?}, {sent} sent");
    }
}

#[test]
fn every_packet_of_a_capture_is_in_the_log_or_under_its_counter() {
    for seed in ["1", "2"] {
        play(seed);
    }
}

/// The frames of a little-endian capture file.
fn read_pcap(path: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes[..4], 0xa1b2_c3d4_u32.to_le_bytes());
    let mut rest = &bytes[24..];
    let mut frames = Vec::new();
    while !rest.is_empty() {
        let len = u32::from_le_bytes(rest[8..12].try_into().unwrap()) as usize;
        frames.push(rest[16..16 + len].to_vec());
        rest = &rest[16 + len..];
    }
    frames
}

fn write_pcap(path: &Path, frames: &[Vec<u8>]) {
    let mut out = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65535, 1] {
        out.extend(word.to_le_bytes());
    }
    for frame in frames {
        for word in [0, 0, frame.len() as u32, frame.len() as u32] {
            out.extend(word.to_le_bytes());
        }
        out.extend(frame);
    }
    std::fs::write(path, out).unwrap();
}

/// Damages a frame as a broken sender or wire would: bits, bytes, lengths, cuts, additions.
fn damage(frame: &mut Vec<u8>, rng: &mut StdRng) {
    for _ in 0..rng.random_range(1..=3) {
        if frame.len() < 2 {
            return;
        }
        // Headers are worth more than payloads.
        let most = if rng.random_bool(0.7) {
            frame.len().min(96)
        } else {
            frame.len()
        };
        let at = rng.random_range(0..most);
        match rng.random_range(0..7) {
            0 => frame[at] ^= 1 << rng.random_range(0..8),
            1 => frame[at] = rng.random(),
            2 => frame.truncate(at.max(1)),
            3 => frame.insert(at, rng.random()),
            4 => {
                frame.remove(at);
            }
            5 => frame[at] = [0, 1, 0x7f, 0x80, 0xff][rng.random_range(0..5)],
            _ => frame.extend((0..rng.random_range(1..64)).map(|_| rng.random::<u8>())),
        }
    }
}

#[test]
fn the_sums_hold_for_damaged_packets() {
    const FRAMES: usize = 20_000;
    const SEED: u64 = 0x7461_6666;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    run(PYTHON, &[GENERATOR, "make", path, "3"]);
    let mut rng = StdRng::seed_from_u64(SEED);
    let mut played = Vec::new();
    for name in ["p0.pcap", "p1.pcap"] {
        let file = folder.path().join(name);
        let originals = read_pcap(&file);
        let frames: Vec<Vec<u8>> = (0..FRAMES / 2)
            .map(|_| {
                let mut frame = originals[rng.random_range(0..originals.len())].clone();
                damage(&mut frame, &mut rng);
                frame
            })
            .collect();
        write_pcap(&file, &frames);
        played.push(frames);
    }
    let packets = FRAMES as u64;
    let server = server(folder.path());
    let stats = settled(&server, packets);
    let received: u64 = stats.ports.iter().map(|p| p.received).sum();
    let dropped: u64 = stats.ports.iter().map(|p| total(&p.dropped)).sum();
    let handled: u64 = stats.ports.iter().map(|p| total(&p.handled)).sum();
    let delivered: u64 = stats.ports.iter().map(|p| p.delivered).sum();
    assert_eq!(received, packets);
    assert_eq!(received, dropped + handled + delivered);
    // Damage behind or outside of what is checked leaves a packet good: some of each must be there.
    assert!(
        delivered > 0 && handled > 0 && dropped > packets / 2,
        "{stats:?}"
    );
    for topic in &stats.topics {
        assert_eq!(topic.in_flight, 0);
        assert_eq!(topic.received, topic.accounted(), "{}", topic.name);
        let in_log: usize = (0..topic.partitions.len())
            .map(|p| values(&server, &topic.name, p as u32).len())
            .sum();
        assert_eq!(in_log as u64, topic.stored, "{}", topic.name);
    }
    // What was stored comes from the packets: it is found in them, in their order.
    for (topic, frames) in [
        ("ticks", &played[0]),
        ("groups", &played[0]),
        ("tagged", &played[1]),
    ] {
        let mut frames = frames.iter();
        for (i, value) in values(&server, topic, 0).iter().enumerate() {
            assert!(
                frames.any(|frame| memchr::memmem::find(frame, value).is_some()),
                "{topic}: message {i} is in no frame behind the one before: {:?}",
                String::from_utf8_lossy(value)
            );
        }
    }
}
