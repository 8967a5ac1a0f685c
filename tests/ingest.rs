//! A kernel host on one end of a veth pair, `taffrail serve` on the other: ping, raw UDP over IPv4 and
//! IPv6, lines, multicast, unknown ports; stored, accounted for and read back, also after a restart.

mod support;

use std::net::{IpAddr, SocketAddr, UdpSocket};

use support::{Network, PRODUCER_V4, SERVER_V4, SERVER_V6, Server, run, wait_until};
use taffrail::control::protocol::total;

const TABLES: &str = r#"
[[topic]]
name = "ticks"
partitions = 2
[[topic]]
name = "logs"
[[udp]]
udp_port = 5000
topic = "ticks"
partition = 0
[[udp]]
udp_port = 5001
topic = "ticks"
partition = 1
[[udp]]
udp_port = 514
topic = "logs"
split = "line"
"#;

fn server(network: &Network, folder: &tempfile::TempDir, port_keys: &str) -> Server {
    let tables = format!("{}{port_keys}\n{TABLES}", network.port());
    Server::start(folder.path(), Some(&network.server), "", &tables)
}

/// Sends `messages` from the producer to `to`, slowly enough for a veth queue.
fn send(network: &Network, to: &str, port: u16, messages: &[Vec<u8>]) {
    network.producer.inside(|| {
        let to = SocketAddr::new(to.parse::<IpAddr>().unwrap(), port);
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        for (i, message) in messages.iter().enumerate() {
            socket.send_to(message, to).unwrap();
            if i % 32 == 31 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    });
}

fn numbered(prefix: &str, count: usize) -> Vec<Vec<u8>> {
    (0..count)
        .map(|i| format!("{prefix} {i}").into_bytes())
        .collect()
}

/// Says where two lists differ first; whole lists would bury it.
fn assert_same(found: &[Vec<u8>], expected: &[Vec<u8>]) {
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(
            String::from_utf8_lossy(found),
            String::from_utf8_lossy(expected),
            "message {i}"
        );
    }
    assert_eq!(found.len(), expected.len());
}

fn values(server: &Server, topic: &str, partition: u32) -> Vec<Vec<u8>> {
    let records = server.values(topic, partition, 0);
    for (i, (offset, _)) in records.iter().enumerate() {
        assert_eq!(*offset, i as i64, "offsets are dense");
    }
    records.into_iter().map(|(_, value)| value).collect()
}

#[test]
fn a_linux_host_pings_both_families_without_set_up() {
    let (network, folder) = (Network::new(), tempfile::tempdir().unwrap());
    let server = server(&network, &folder, "");
    for address in [SERVER_V4, SERVER_V6] {
        let output = run(
            "ip",
            &[
                "netns",
                "exec",
                &network.producer.name,
                "ping",
                "-c",
                "5",
                "-i",
                "0.05",
                "-W",
                "5",
                address,
            ],
        );
        assert!(output.contains(" 0% packet loss"), "{output}");
    }
    let large = [
        "netns",
        "exec",
        &network.producer.name,
        "ping",
        "-c",
        "2",
        "-s",
        "1400",
        "-W",
        "5",
        SERVER_V4,
    ];
    assert!(run("ip", &large).contains(" 0% packet loss"));
    assert_eq!(server.stats().imbalances(), Vec::<String>::new());
}

#[test]
fn raw_datagrams_and_lines_are_stored_in_order_and_survive_a_restart() {
    let (network, folder) = (Network::new(), tempfile::tempdir().unwrap());
    let mut server = server(&network, &folder, "");
    network.resolve(SERVER_V4);
    network.resolve(SERVER_V6);
    let (four, six) = (numbered("four", 500), numbered("six", 500));
    send(&network, SERVER_V4, 5000, &four);
    send(&network, SERVER_V6, 5001, &six);
    let lines: Vec<Vec<u8>> = vec![
        b"one\ntwo\r\n\nthree".to_vec(),
        b"four\n".to_vec(),
        b"\n\r\n".to_vec(),
    ];
    send(&network, SERVER_V4, 514, &lines);
    let stats = server.settled(1004);
    assert_eq!(
        stats
            .topics
            .iter()
            .find(|t| t.name == "logs")
            .unwrap()
            .stored,
        4
    );
    assert_same(&values(&server, "ticks", 0), &four);
    assert_same(&values(&server, "ticks", 1), &six);
    let expected: Vec<Vec<u8>> = [&b"one"[..], b"two", b"three", b"four"]
        .iter()
        .map(|l| l.to_vec())
        .collect();
    assert_same(&values(&server, "logs", 0), &expected);

    server.stop();
    let binary = env!("CARGO_BIN_EXE_taffrail");
    let data = server.data();
    let data = data.to_str().unwrap();
    let text = run(
        binary,
        &[
            "read",
            "ticks",
            "--partition",
            "1",
            "--from",
            "490",
            "--data",
            data,
        ],
    );
    assert_eq!(
        text,
        (490..500).map(|i| format!("six {i}\n")).collect::<String>()
    );
    run(binary, &["verify", data]);

    server.restart();
    assert_same(&values(&server, "ticks", 0), &four);
    send(&network, SERVER_V4, 5000, &numbered("more", 10));
    server.settled(1014);
    let after = values(&server, "ticks", 0);
    assert_eq!(after.len(), 510);
    assert_eq!(after[509], b"more 9");
    let socket = server.socket();
    let text = run(
        binary,
        &[
            "read",
            "ticks",
            "--from",
            "508",
            "-n",
            "1",
            "--format",
            "json",
            "--socket",
            socket.to_str().unwrap(),
        ],
    );
    let line: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (line["offset"].as_i64(), line["value"].as_str()),
        (Some(508), Some("more 8"))
    );
}

#[test]
fn multicast_groups_are_joined_and_received() {
    let (network, folder) = (Network::new(), tempfile::tempdir().unwrap());
    let tables = "multicast = [\"239.1.2.3\"]\n";
    let server = server(&network, &folder, tables);
    let messages = numbered("group", 50);
    send(&network, "239.1.2.3", 5000, &messages);
    // Not joined: must not be stored.
    send(&network, "239.9.9.9", 5000, &numbered("other", 50));
    send(&network, SERVER_V4, 5000, &numbered("end", 1));
    server.settled(51);
    let mut expected = messages;
    expected.push(b"end 0".to_vec());
    assert_same(&values(&server, "ticks", 0), &expected);
}

#[test]
fn what_is_not_stored_is_under_its_counter() {
    let (network, folder) = (Network::new(), tempfile::tempdir().unwrap());
    let server = server(&network, &folder, "");
    send(&network, SERVER_V4, 9999, &numbered("nobody", 20));
    // Larger than the MTU: the kernel below AF_PACKET puts the fragments together again, and the result
    // does not fit a packet slot.
    send(&network, SERVER_V4, 5000, &[vec![b'x'; 4000]]);
    send(&network, SERVER_V4, 5000, &numbered("end", 1));
    let stats = server.settled(1);
    let port = &stats.ports[0];
    assert_eq!(port.dropped.get("unknown_port"), Some(&20), "{port:?}");
    assert_eq!(port.dropped.get("truncated"), Some(&1), "{port:?}");
    assert_eq!(port.delivered, 1);
    assert_eq!(
        total(&port.handled) + total(&port.dropped) + 1,
        port.received
    );
    // The kernel was told that nobody listens there.
    let refused = network.producer.inside(|| {
        let socket = UdpSocket::bind((PRODUCER_V4, 0)).unwrap();
        socket.connect((SERVER_V4, 9999)).unwrap();
        socket.set_read_timeout(Some(support::PATIENCE)).unwrap();
        // Port-unreachable answers are rate-limited: ask more than once.
        (0..50).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(100));
            let sent = socket.send(b"x");
            sent.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
        })
    });
    assert!(refused, "no ICMP port unreachable came back");
}

#[test]
fn messages_leave_the_log_compressed_and_the_oldest_go() {
    let (network, folder) = (Network::new(), tempfile::tempdir().unwrap());
    let tables = format!(
        "{}\n[[topic]]\nname = \"kept\"\n[[topic]]\nname = \"short\"\nsettings = {{ \"retention.bytes\" = 1 }}\n\
         [[udp]]\nudp_port = 5000\ntopic = \"kept\"\n[[udp]]\nudp_port = 5001\ntopic = \"short\"\n",
        network.port()
    );
    let storage = "segment_size = \"4MiB\"\nprepared_segments = 1\n";
    let mut server = Server::start(folder.path(), Some(&network.server), storage, &tables);
    network.resolve(SERVER_V4);
    // Three segments of each.
    let messages: Vec<Vec<u8>> = (0..12_000)
        .map(|i| format!("{i} {}", "telemetry ".repeat(100)).into_bytes())
        .collect();
    send(&network, SERVER_V4, 5000, &messages);
    send(&network, SERVER_V4, 5001, &messages);
    let stored = |server: &Server| -> Vec<u64> {
        let stats = server.stats();
        stats.topics.iter().map(|topic| topic.stored).collect()
    };
    wait_until("both topics are stored", || {
        stored(&server).iter().sum::<u64>() + 200 > 2 * messages.len() as u64
    });
    let start = |server: &Server| server.client().topics().unwrap()[1].partitions[0].start;
    wait_until("the oldest messages of one topic are gone", || {
        start(&server) > 0
    });
    let first = values(&server, "kept", 0);
    assert!(first.iter().all(|value| messages.contains(value)));
    let begins = start(&server);
    let rest = server.values("short", 0, begins);
    assert_eq!(rest[0].0, begins);
    assert!(rest.windows(2).all(|pair| pair[0].0 + 1 == pair[1].0));
    let files = |server: &Server| {
        let shard = server.data().join("shard-000");
        let names = std::fs::read_dir(shard)
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        let names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        let count = |end: &str| names.iter().filter(|name| name.ends_with(end)).count();
        (count(".sst"), count(".seg"))
    };
    let (ssts, segments) = files(&server);
    assert!(
        ssts >= 2 && segments <= 5,
        "{ssts} SSTs, {segments} segments"
    );
    server.kill();
    server.restart();
    assert_same(&values(&server, "kept", 0), &first);
    assert!(start(&server) >= begins);
    server.stop();
    let data = server.data();
    run(
        env!("CARGO_BIN_EXE_taffrail"),
        &["verify", data.to_str().unwrap()],
    );
    let read = run(
        env!("CARGO_BIN_EXE_taffrail"),
        &[
            "read",
            "kept",
            "--count",
            "1",
            "--data",
            data.to_str().unwrap(),
        ],
    );
    assert!(read.contains("telemetry telemetry"), "{read}");
}
