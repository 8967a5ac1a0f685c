//! A server whose only port is the kernel's: raw UDP and the datagram protocol over loopback, both families, without
//! DPDK, namespaces or huge pages. What was acknowledged survives SIGKILL, once and in order; everything that was sent is
//! stored or under a counter.

mod support;

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use support::{Network, SERVER_V4, Server, run, wait_until};
use taffrail::control::protocol::{PortStats, Stats, total};
use taffrail::wire::datagram::{Hello, PRODUCE_HEADER_LEN, ProduceHeader};

const BINARY: &str = env!("CARGO_BIN_EXE_taffrail");
/// Datagrams sent before a pause: less than any socket's buffer holds.
const BURST: usize = 64;

/// UDP ports that were free on all addresses of both families a moment ago.
fn free_ports<const N: usize>() -> [u16; N] {
    let mut held = Vec::new();
    while held.len() < N {
        let six = UdpSocket::bind("[::]:0").unwrap();
        held.push((six.local_addr().unwrap().port(), six));
    }
    let mut ports = held.iter().map(|(port, _)| *port);
    std::array::from_fn(|_| ports.next().unwrap())
}

/// The tables of a server that listens at `addresses`, and its UDP ports: datagrams for partition 0 and 1 of `ticks`, lines
/// for `logs`, the datagram protocol, which all topics can be reached by.
fn tables(addresses: &str, more: &str) -> (String, [u16; 4]) {
    let ports @ [zero, one, lines, datagram] = free_ports();
    let text = format!(
        r#"[[port]]
name = "k0"
device = "kernel"
addresses = [{addresses}]
{more}
[[topic]]
name = "ticks"
partitions = 2
[[topic]]
name = "logs"
[[topic]]
name = "acked"
partitions = 2
[[udp]]
port = "k0"
udp_port = {zero}
topic = "ticks"
partition = 0
[[udp]]
udp_port = {one}
topic = "ticks"
partition = 1
[[udp]]
udp_port = {lines}
topic = "logs"
split = "line"
[datagram]
udp_port = {datagram}
"#
    );
    (text, ports)
}

fn client(to: SocketAddr) -> UdpSocket {
    let any = if to.is_ipv4() {
        "127.0.0.1:0"
    } else {
        "[::1]:0"
    };
    let socket = UdpSocket::bind(any).unwrap();
    let time = Some(support::PATIENCE);
    socket.set_read_timeout(time).unwrap();
    socket
}

fn send(to: SocketAddr, messages: &[Vec<u8>]) {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    for burst in messages.chunks(BURST) {
        for message in burst {
            socket.send_to(message, to).unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

fn numbered(prefix: &str, count: usize) -> Vec<Vec<u8>> {
    (0..count)
        .map(|i| format!("{prefix} {i}").into_bytes())
        .collect()
}

fn values(server: &Server, topic: &str, partition: u32) -> Vec<Vec<u8>> {
    let records = server.values(topic, partition, 0);
    for (i, (offset, _)) in records.iter().enumerate() {
        assert_eq!(*offset, i as i64, "offsets are dense");
    }
    records.into_iter().map(|(_, value)| value).collect()
}

/// Says where two lists differ first; whole lists would bury it.
fn assert_same(found: &[Vec<u8>], expected: &[Vec<u8>]) {
    let text = |value: &[u8]| String::from_utf8_lossy(&value[..value.len().min(100)]).into_owned();
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            found == expected,
            "message {i}: {} for {}",
            text(found),
            text(expected)
        );
    }
    assert_eq!(found.len(), expected.len());
}

fn port(stats: &Stats) -> &PortStats {
    assert_eq!(stats.ports.len(), 1);
    &stats.ports[0]
}

/// `taffrail produce acked`, which reads lines from its input.
fn produce(to: SocketAddr, partition: &str, acks: &str) -> Child {
    Command::new(BINARY)
        .args(["produce", "acked", "--server", &to.to_string()])
        .args(["--partition", partition, "--acks", acks])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for it to end well, and to have `count` messages acknowledged.
fn acknowledged(mut child: Child, count: usize) {
    drop(child.stdin.take());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let expected = format!("{count} read, {count} acknowledged, 0 failed");
    assert!(text.contains(&expected), "{text}");
}

fn write(child: &mut Child, lines: &[Vec<u8>]) {
    let mut text = Vec::new();
    for line in lines {
        text.extend_from_slice(line);
        text.push(b'\n');
    }
    let input = child.stdin.as_mut().unwrap();
    input.write_all(&text).unwrap();
    input.flush().unwrap();
}

#[test]
fn raw_and_acknowledged_messages_of_both_families_are_stored_and_survive() {
    let folder = tempfile::tempdir().unwrap();
    let (tables, [zero, one, lines, datagram]) = tables("\"127.0.0.1\", \"::1\"", "");
    let mut server = Server::start(folder.path(), None, "", &tables);
    let (four, six) = (numbered("four", 500), numbered("six", 500));
    send(at("127.0.0.1", zero), &four);
    send(at("::1", one), &six);
    let text = b"one\ntwo\r\n\nthree".to_vec();
    send(
        at("::1", lines),
        &[text, b"four\n".to_vec(), b"\n".to_vec()],
    );
    // Raw messages have no acknowledgement: they are safe once they are seen to be stored.
    server.settled(1004);
    let (first, second) = (numbered("first", 700), numbered("second", 700));
    let mut child = produce(at("127.0.0.1", datagram), "0", "all");
    write(&mut child, &first);
    acknowledged(child, first.len());
    let mut child = produce(at("::1", datagram), "1", "1");
    write(&mut child, &second);
    acknowledged(child, second.len());
    // Killed at once: acks=1 is in staging alone.
    let stats = server.stats();
    server.kill();

    let expected: Vec<Vec<u8>> = ["one", "two", "three", "four"]
        .iter()
        .map(|line| line.as_bytes().to_vec())
        .collect();
    assert_eq!(stats.imbalances(), Vec::<String>::new());
    let counts = port(&stats);
    assert_eq!(
        (counts.name.as_str(), counts.device.as_str()),
        ("k0", "kernel")
    );
    assert_eq!(counts.handled.get("hello"), Some(&2), "{counts:?}");
    assert_eq!(total(&counts.dropped), 0, "{counts:?}");
    assert_eq!(total(&counts.nic), 0, "{counts:?}");
    assert_eq!(counts.received, counts.delivered + 2);
    // A datagram a message, and batches of the datagram protocol, each acknowledged.
    assert!(counts.delivered > 1003 && counts.sent > 2, "{counts:?}");

    server.restart();
    assert_same(&values(&server, "ticks", 0), &four);
    assert_same(&values(&server, "ticks", 1), &six);
    assert_same(&values(&server, "acked", 0), &first);
    assert_same(&values(&server, "acked", 1), &second);
    assert_same(&values(&server, "logs", 0), &expected);
    send(at("127.0.0.1", zero), &numbered("more", 10));
    let stats = server.settled(1004 + 1400 + 10);
    assert_eq!(port(&stats).delivered, 10);
    server.stop();
    run(BINARY, &["verify", server.data().to_str().unwrap()]);
}

#[test]
fn a_producer_goes_on_over_kills_and_every_message_is_there_once_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let (tables, [.., datagram]) = tables("\"127.0.0.1\", \"::1\"", "");
    let mut server = Server::start(folder.path(), None, "", &tables);
    let ways = [("127.0.0.1", "0", "all"), ("::1", "1", "1")];
    let mut producers: Vec<(Child, Vec<Vec<u8>>)> = ways
        .iter()
        .map(|(ip, partition, acks)| {
            let sent = numbered(&format!("to {partition} {}", "x".repeat(200)), 4000);
            (produce(at(ip, datagram), partition, acks), sent)
        })
        .collect();
    for part in 0..4 {
        let before: u64 = server.stats().topics.iter().map(|t| t.received).sum();
        for (child, sent) in &mut producers {
            write(child, &sent[part * 1000..(part + 1) * 1000]);
        }
        if part < 3 {
            // Some of it is under way, and not all.
            wait_until("messages on their way", || {
                server
                    .stats()
                    .topics
                    .iter()
                    .map(|t| t.received)
                    .sum::<u64>()
                    > before
            });
            server.kill();
            server.restart();
        }
    }
    for (number, (child, sent)) in producers.into_iter().enumerate() {
        acknowledged(child, sent.len());
        assert_same(&values(&server, "acked", number as u32), &sent);
    }
    let stats = server.settled(8000);
    assert_eq!(port(&stats).nic.get("errors"), None);
    server.stop();
    run(BINARY, &["verify", server.data().to_str().unwrap()]);
}

#[test]
fn any_address_answers_from_the_one_that_was_asked_and_groups_are_joined() {
    let folder = tempfile::tempdir().unwrap();
    let more = "multicast = [\"239.77.1.1\"]\n";
    let (mut tables, [zero, ..]) = tables("\"0.0.0.0\", \"::\"", more);
    tables = tables.replace(
        "[datagram]",
        &format!(
            "[[udp]]\nudp_port = {zero}\ngroup = \"239.77.1.1\"\ntopic = \"logs\"\n[datagram]"
        ),
    );
    let datagram: u16 = tables
        .rsplit("udp_port = ")
        .next()
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    // A group is joined by the kernel's routes where all addresses are listened at: a namespace has one for it.
    let space = support::Netns::new();
    run(
        "ip",
        &[
            "-n",
            &space.name,
            "route",
            "add",
            "224.0.0.0/4",
            "dev",
            "lo",
        ],
    );
    let server = Server::start(folder.path(), Some(&space), "", &tables);
    space.inside(|| {
        let lines = numbered("line", 50);
        for (ip, partition) in [("127.0.0.9", "0"), ("::1", "1")] {
            let mut child = produce(at(ip, datagram), partition, "all");
            write(&mut child, &lines);
            acknowledged(child, lines.len());
        }
        let socket = socket2::Socket::from(client(at("127.0.0.1", zero)));
        socket.set_multicast_if_v4(&Ipv4Addr::LOCALHOST).unwrap();
        let socket = UdpSocket::from(socket);
        for i in 0..20 {
            let message = format!("group {i}");
            socket
                .send_to(message.as_bytes(), at("239.77.1.1", zero))
                .unwrap();
            // Not joined by the port: must not be stored.
            socket.send_to(b"other", at("239.77.1.2", zero)).unwrap();
        }
        send(at("127.0.0.1", zero), &numbered("own", 5));
    });
    let stats = server.settled(125);
    assert_same(&values(&server, "logs", 0), &numbered("group", 20));
    assert_same(&values(&server, "ticks", 0), &numbered("own", 5));
    assert_eq!(total(&port(&stats).dropped), 0);
}

#[test]
fn a_port_of_one_address_has_its_groups_on_that_interface() {
    let folder = tempfile::tempdir().unwrap();
    // Its own group: tests run side by side.
    let group = format!(
        "239.{}.{}.9",
        std::process::id() % 250,
        std::process::id() / 250 % 250
    );
    let more = format!("multicast = [\"{group}\"]\n");
    let (tables, [zero, ..]) = tables("\"127.0.0.1\"", &more);
    let server = Server::start(folder.path(), None, "", &tables);
    let socket = socket2::Socket::from(client(at("127.0.0.1", zero)));
    socket.set_multicast_if_v4(&Ipv4Addr::LOCALHOST).unwrap();
    let socket = UdpSocket::from(socket);
    for message in numbered("group", 20) {
        socket.send_to(&message, at(&group, zero)).unwrap();
    }
    server.settled(20);
    assert_same(&values(&server, "ticks", 0), &numbered("group", 20));
}

#[test]
fn datagrams_of_any_length_are_messages() {
    let folder = tempfile::tempdir().unwrap();
    let (tables, [zero, one, ..]) = tables("\"127.0.0.1\", \"::1\"", "receive_buffer = \"64MiB\"");
    let server = Server::start(folder.path(), None, "", &tables);
    let of = |len: usize| vec![b'a' + (len % 26) as u8; len];
    let lengths = [1, 2047, 2048, 2049, 9000, 65_507];
    let messages: Vec<Vec<u8>> = lengths.into_iter().map(of).collect();
    send(at("127.0.0.1", zero), &messages);
    // More at a time than there are buffers for large ones.
    let many: Vec<Vec<u8>> = (0..600).map(|i| of(60_000 + i)).collect();
    send(at("::1", one), &many);
    let stats = server.settled(606);
    assert_eq!(port(&stats).received, 606);
    assert_same(&values(&server, "ticks", 0), &messages);
    assert_same(&values(&server, "ticks", 1), &many);
}

#[test]
fn beside_a_dpdk_port_each_has_its_own_buffers_back() {
    let folder = tempfile::tempdir().unwrap();
    let network = Network::new();
    let (tables, [_, one, ..]) = tables("\"127.0.0.1\"", "");
    let tables = format!("{}{tables}", network.port());
    let server = Server::start(folder.path(), Some(&network.server), "", &tables);
    network.resolve(SERVER_V4);
    // More than either has buffers, to one partition.
    let (nic, kernel) = (numbered("nic", 20_000), numbered("kernel", 20_000));
    std::thread::scope(|scope| {
        scope.spawn(|| network.producer.inside(|| send(at(SERVER_V4, one), &nic)));
        scope.spawn(|| {
            network
                .server
                .inside(|| send(at("127.0.0.1", one), &kernel))
        });
    });
    let stats = server.settled(40_000);
    assert_eq!(stats.ports.len(), 2);
    assert!(
        stats.ports.iter().all(|port| port.delivered == 20_000),
        "{:?}",
        stats.ports
    );
    let found = values(&server, "ticks", 1);
    let (of_kernel, of_nic) = found
        .into_iter()
        .partition(|value| value.starts_with(b"kernel"));
    let [of_kernel, of_nic]: [Vec<Vec<u8>>; 2] = [of_kernel, of_nic];
    assert_same(&of_kernel, &kernel);
    assert_same(&of_nic, &nic);
}

#[test]
fn what_is_malformed_is_counted_and_costs_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (tables, [zero, _, _, datagram]) = tables("\"127.0.0.1\", \"::1\"", "");
    let server = Server::start(folder.path(), None, "", &tables);
    let to = at("127.0.0.1", datagram);
    let socket = client(to);
    let mut hello = [0; 64];
    let len = Hello {
        request_id: 7,
        topic: "acked",
    }
    .encode(&mut hello);
    // Cut greetings, other protocols, nothing at all; more of them than there are buffers.
    let mut bad = 0;
    for round in 0..12_000 {
        let datagram: &[u8] = match round % 4 {
            0 => &hello[..round / 4 % len],
            1 => b"GET / HTTP/1.1\r\n",
            2 => &[],
            _ => &[0xff; 4000],
        };
        socket.send_to(datagram, to).unwrap();
        bad += 1;
        if round % BURST == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    // Batches for partitions that there are not are refused.
    let mut produce = [0; PRODUCE_HEADER_LEN + 100];
    for partition in [99, 0] {
        let header = ProduceHeader {
            topic_id: u32::MAX,
            partition,
            acks: -1,
            request_id: 3,
        };
        header.encode(&mut produce);
        socket.send_to(&produce, to).unwrap();
        assert!(socket.recv(&mut [0; 2048]).unwrap() > 0, "a refusal");
    }
    send(at("127.0.0.1", zero), &numbered("end", 1));
    let stats = server.settled(1);
    let counts = port(&stats);
    let lost = counts.nic.get("missed").copied().unwrap_or(0);
    assert_eq!(
        counts.dropped.get("bad_datagram"),
        Some(&(bad - lost)),
        "{counts:?}"
    );
    assert_eq!(
        counts.dropped.get("unknown_partition"),
        Some(&2),
        "{counts:?}"
    );
    assert_eq!((counts.delivered, counts.received), (1, bad - lost + 3));
    // Nothing was lost of what the pool has: it goes on.
    send(at("::1", zero), &numbered("after", 1000));
    server.settled(1001);
}

#[test]
fn what_the_kernel_drops_is_counted_and_leaves_a_gap() {
    let folder = tempfile::tempdir().unwrap();
    let (tables, [zero, ..]) = tables("\"127.0.0.1\"", "receive_buffer = \"64KiB\"");
    let server = Server::start(folder.path(), None, "", &tables);
    // The thread cannot take anything meanwhile.
    server.pause();
    let socket = client(at("127.0.0.1", zero));
    let sent = 5000;
    for i in 0..sent {
        let message = format!("message {i}");
        socket
            .send_to(message.as_bytes(), at("127.0.0.1", zero))
            .unwrap();
    }
    server.go_on();
    let mut last = server.stats();
    wait_until("every datagram is accounted for", || {
        last = server.stats();
        let counts = port(&last);
        counts.received + total(&counts.nic) == sent && last.topics[0].in_flight == 0
    });
    assert_eq!(last.imbalances(), Vec::<String>::new());
    let missed = port(&last).nic["missed"];
    assert!(missed > 0 && missed < sent, "{missed}");
    let gap = |server: &Server| {
        let found = server.values("ticks", 0, 0).into_iter();
        let mut found = found.map(|(_, value)| String::from_utf8(value).unwrap());
        found.find(|value| value.contains("socket_full"))
    };
    wait_until("a gap record", || gap(&server).is_some());
    let gap = gap(&server).unwrap();
    assert!(gap.contains(&format!("\"count\":{missed}")), "{gap}");
}

#[test]
fn an_address_that_cannot_be_had_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (tables, [zero, ..]) = tables("\"127.0.0.1\"", "");
    let taken = UdpSocket::bind(("127.0.0.1", zero)).unwrap();
    let mut server = Server::prepare(folder.path(), None, "/dev/shm".as_ref(), "", &tables);
    let ended = |server: &mut Server, reason: &str| {
        server.spawn();
        let status = server.wait_end();
        assert!(!status.success());
        assert!(server.log().contains(reason), "{}", server.log());
    };
    ended(
        &mut server,
        &format!("port k0: cannot listen at UDP 127.0.0.1:{zero}: "),
    );
    drop(taken);
    let text = std::fs::read_to_string(server.config_path()).unwrap();
    let foreign: IpAddr = "192.0.2.77".parse().unwrap();
    let text = text.replace("\"127.0.0.1\"", &format!("\"{foreign}\""));
    std::fs::write(server.config_path(), text).unwrap();
    ended(
        &mut server,
        "no interface of this machine has the address 192.0.2.77",
    );
}
