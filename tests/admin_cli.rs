//! `taffrail topic`, `group` and `consume`, run as operators run them, against a server that Kafka's clients use: what
//! the commands did is what kcat sees, and the other way round.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use support::{Network, SERVER_V4, Server, wait_until};

/// A server with Kafka's protocol on a port of its own.
struct Kafka {
    server: Server,
    address: String,
    _folder: tempfile::TempDir,
}

impl Kafka {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = support::free_address().to_string();
        let tables = format!(
            "[kafka]\nlisten = [\"{address}\"]\ngroup_initial_rebalance_delay = \"100ms\"\n[[topic]]\nname = \"configured\"\npartitions = 2\n"
        );
        let server = Server::start(folder.path(), None, "shards = 2", &tables);
        Self {
            server,
            address,
            _folder: folder,
        }
    }

    /// Runs a command of `taffrail` for this server.
    fn taffrail(&self, args: &[&str]) -> Output {
        taffrail(&self.server, args)
    }

    /// As [`Kafka::taffrail`]; what it printed.
    fn done(&self, args: &[&str]) -> String {
        done(&self.taffrail(args), args)
    }

    fn json(&self, args: &[&str]) -> Value {
        let args = [args, &["--json"]].concat();
        serde_json::from_str(&self.done(&args)).unwrap()
    }

    fn refused(&self, args: &[&str], says: &str) {
        refused(&self.taffrail(args), args, says);
    }

    fn kcat(&self, args: &[&str], input: &str) -> String {
        let mut child = Command::new("timeout")
            .args(["120", "kcat", "-b", &self.address])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        done(&output, args)
    }

    fn produce(&self, topic: &str, partition: u32, values: std::ops::Range<u32>) {
        let input: String = values.map(|n| format!("{partition}-{n}\n")).collect();
        let partition = partition.to_string();
        self.kcat(&["-P", "-t", topic, "-p", &partition], &input);
    }

    /// The messages that a member of a group gets, so many.
    fn group(&self, group: &str, topic: &str, count: usize) -> Vec<String> {
        let count = count.to_string();
        let earliest = ["-X", "auto.offset.reset=earliest", "-q", "-c", &count];
        let args = [&["-G", group], &earliest[..], &[topic]].concat();
        let got = sorted(&self.kcat(&args, ""));
        wait_until("the member to leave", || {
            self.json(&["group", "describe", group])["state"] == "Empty"
        });
        got
    }
}

fn taffrail(server: &Server, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_taffrail"))
        .args(args)
        .arg("--socket")
        .arg(server.socket())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn done(output: &Output, args: &[&str]) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn refused(output: &Output, args: &[&str], says: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert!(stderr.contains(says), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
}

fn sorted(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// A child that is killed when its test fails.
struct Running(Child);

impl Running {
    fn signal(&self, signal: i32) {
        // SAFETY: kill has no memory effects, and the child was not waited for.
        unsafe { libc::kill(self.0.id() as i32, signal) };
    }

    /// Interrupts it; gives whether it ended well.
    fn interrupt(&mut self) -> bool {
        self.signal(libc::SIGINT);
        self.0.wait().unwrap().success()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `taffrail consume` that goes on, and its lines.
fn follow(server: &Server, args: &[&str]) -> (Running, impl Iterator<Item = String> + use<>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_taffrail"))
        .args(["consume", "--follow", "--socket"])
        .arg(server.socket())
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (Running(child), lines.map(Result::unwrap))
}

#[test]
fn topics_are_made_listed_described_altered_and_deleted() {
    let mut kafka = Kafka::start();
    let create = ["topic", "create", "orders", "--partitions", "2"];
    kafka.done(&[&create[..], &["-c", "retention.ms=60000"]].concat());
    kafka.refused(&create, "already");
    kafka.done(&[&create[..], &["--if-not-exists"]].concat());
    let listed = kafka.kcat(&["-L"], "");
    assert!(
        listed.contains("topic \"orders\" with 2 partitions"),
        "{listed}"
    );

    kafka.produce("orders", 1, 0..100);
    kafka.kcat(&["-P", "-t", "configured", "-p", "0"], "one\n");
    let list = kafka.json(&["topic", "list"]);
    let of = |list: &Value, name: &str| {
        let list = list.as_array().unwrap();
        list.iter().find(|t| t["topic"] == name).unwrap().clone()
    };
    let orders = of(&list, "orders");
    assert_eq!(
        (&orders["offsets"], &orders["internal"]),
        (&100.into(), &false.into())
    );
    assert_eq!(orders["config"]["retention.ms"], "60000");
    let second = &orders["partitions"][1];
    assert_eq!((&second["start"], &second["end"]), (&0.into(), &100.into()));
    // A message has some bytes beside its value.
    assert!(orders["bytes"].as_u64().unwrap() > 500, "{orders}");
    assert_eq!(of(&list, "configured")["offsets"], 1);
    assert_eq!(of(&list, "__consumer_offsets")["internal"], true);
    let table = kafka.done(&["topic", "list"]);
    let line = table.lines().find(|l| l.contains("orders ")).unwrap();
    assert!(line.contains("0..100") && line.contains(" 2 "), "{table}");

    // Settings and partitions, of a topic that the configuration made.
    let alter = ["topic", "alter", "configured"];
    let changes = [
        "--config",
        "cleanup.policy=compact",
        "-c",
        "max.message.bytes=2000",
    ];
    kafka.done(&[&alter[..], &changes, &["-p", "5"]].concat());
    let shown = kafka.json(&["topic", "describe", "configured"]);
    assert_eq!(shown["config"]["cleanup.policy"], "compact");
    assert_eq!(shown["effective_config"]["retention.ms"], "-1");
    assert_eq!(shown["partitions"].as_array().unwrap().len(), 5);
    kafka.done(&[&alter[..], &["--delete-config", "cleanup.policy"]].concat());
    let text = kafka.done(&["topic", "describe", "configured"]);
    let line = |name: &str| text.lines().find(|l| l.contains(name)).unwrap();
    assert!(line("cleanup.policy").contains("default"), "{text}");
    assert!(!line("max.message.bytes").contains("default"), "{text}");
    // The setting holds for clients: kcat is told that it is too large.
    let large = "x".repeat(5000) + "\n";
    let output = Command::new("timeout")
        .args([
            "60",
            "sh",
            "-c",
            "printf %s \"$0\" | kcat -b \"$1\" -P -t configured -p 4",
        ])
        .args([&large, &kafka.address])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.to_lowercase().contains("too large"), "{said}");

    for (args, says) in [
        (&["describe", "ordres"][..], "did you mean \"orders\"?"),
        (&["alter", "orders", "-p", "2"], "not shrink"),
        (&["alter", "orders", "-c", "retention.ms=soon"], "-1 to"),
        (
            &["alter", "orders", "-c", "retention.hours=1"],
            "there are: ",
        ),
        (&["alter", "orders"], "nothing to change"),
        (&["create", "a/b"], "not allowed"),
        (&["delete", "orders"], "--yes"),
        (&["delete", "orders", "nothing", "--yes"], "no topic"),
        (&["delete", "__consumer_offsets", "--yes"], "own"),
    ] {
        kafka.refused(&[&["topic"], args].concat(), says);
    }
    // Wrong usage.
    let output = kafka.taffrail(&["topic", "alter"]);
    assert_eq!(output.status.code(), Some(2));
    let output = kafka.taffrail(&["group", "reset", "g", "--to", "somewhere"]);
    assert_eq!(output.status.code(), Some(2));

    // The configuration names the server, too, where `--config` also takes settings.
    let config = kafka.server.config_path().display().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_taffrail"))
        .args([
            "topic",
            "alter",
            "orders",
            "--config",
            &config,
            "--config",
            "retention.ms=5",
        ])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");

    kafka.server.stop();
    kafka.server.restart();
    let shown = kafka.json(&["topic", "describe", "orders"]);
    assert_eq!(shown["config"]["retention.ms"], "5");
    kafka.done(&["topic", "delete", "orders", "configured", "-y"]);
    let listed = kafka.kcat(&["-L"], "");
    assert!(
        !listed.contains("orders") && !listed.contains("configured"),
        "{listed}"
    );
    kafka.server.stop();
}

/// Arguments that reset the group "readers".
fn reset<'a>(to: &[&'a str]) -> Vec<&'a str> {
    [&["group", "reset", "readers", "--to"], to].concat()
}

#[test]
fn groups_are_described_reset_and_deleted() {
    let kafka = Kafka::start();
    kafka.done(&["topic", "create", "orders", "-p", "2"]);
    kafka.produce("orders", 0, 0..10);
    kafka.produce("orders", 1, 0..10);
    assert_eq!(kafka.group("readers", "orders", 20).len(), 20);
    let describe = || kafka.json(&["group", "describe", "readers"]);
    let place = |described: &Value, partition: usize| {
        let p = &described["partitions"][partition];
        (
            p["committed"].as_i64(),
            p["end"].as_i64(),
            p["lag"].as_i64(),
        )
    };
    let described = describe();
    assert_eq!(described["state"], "Empty");
    for partition in 0..2 {
        assert_eq!(place(&described, partition), (Some(10), Some(10), Some(0)));
    }
    kafka.produce("orders", 1, 10..15);
    assert_eq!(place(&describe(), 1), (Some(10), Some(15), Some(5)));
    let list = kafka.json(&["group", "list"]);
    assert_eq!(
        list,
        serde_json::json!([{
            "group": "readers", "state": "Empty", "protocol_type": "consumer",
        }])
    );
    let text = kafka.done(&["group", "describe", "readers"]);
    assert!(
        text.contains("lag 5") && text.contains("0 members"),
        "{text}"
    );

    // While it has a member nothing is reset.
    let member = Command::new("kcat")
        .args([
            "-b",
            &kafka.address,
            "-G",
            "readers",
            "-X",
            "client.id=reader7",
            "-u",
            "orders",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut member = Running(member);
    let mut got = BufReader::new(member.0.stdout.take().unwrap()).lines();
    for n in 10..15 {
        assert_eq!(got.next().unwrap().unwrap(), format!("1-{n}"));
    }
    wait_until("the member's partitions", || {
        let described = describe();
        let members = described["members"].as_array().unwrap().clone();
        described["state"] == "Stable"
            && members.len() == 1
            && members[0]["client_id"] == "reader7"
            && members[0]["assignment"] == serde_json::json!({"orders": [0, 1]})
    });
    let text = kafka.done(&["group", "describe", "readers"]);
    assert!(text.contains("orders:0,1"), "{text}");
    kafka.refused(&reset(&["earliest"]), "1 members");
    kafka.refused(&["group", "delete", "readers"], "has members");
    let consume = ["consume", "orders", "--group", "readers"];
    kafka.refused(&consume, "1 members");
    member.interrupt();
    wait_until("the member to leave", || describe()["state"] == "Empty");

    // Where a reset says, Kafka's clients go on.
    let dry = kafka.json(&reset(&["earliest", "--dry-run"]));
    assert_eq!(
        (&dry[1]["before"], &dry[1]["committed"]),
        (&15.into(), &0.into())
    );
    assert_eq!(place(&describe(), 1).0, Some(15), "nothing was set");
    kafka.done(&reset(&["earliest", "--topic", "orders:1"]));
    assert_eq!(place(&describe(), 1), (Some(0), Some(15), Some(15)));
    let again: Vec<String> = (0..15).map(|n| format!("1-{n}")).collect();
    let mut expected = again.clone();
    expected.sort();
    assert_eq!(kafka.group("readers", "orders", 15), expected);
    kafka.done(&reset(&["shift", "-2"]));
    let expected = ["0-8", "0-9", "1-13", "1-14"];
    assert_eq!(kafka.group("readers", "orders", 4), expected);
    kafka.done(&reset(&["offset", "12"]));
    let described = describe();
    assert_eq!(
        place(&described, 0).0,
        Some(10),
        "what is behind the end is the end"
    );
    assert_eq!(place(&described, 1).0, Some(12));
    kafka.done(&reset(&["time", "1970-01-01T00:00:00Z"]));
    assert_eq!(place(&describe(), 0).0, Some(0));
    kafka.done(&reset(&["latest"]));
    assert_eq!(place(&describe(), 0), (Some(10), Some(10), Some(0)));

    // A group that is not there begins where it is set; without a topic nobody knows where.
    let fresh = [
        "group", "reset", "fresh", "--to", "offset", "8", "--topic", "orders",
    ];
    kafka.refused(&fresh[..6], "no group \"fresh\"");
    kafka.done(&fresh);
    assert_eq!(kafka.group("fresh", "orders", 9).len(), 9);
    kafka.refused(
        &["group", "describe", "reader"],
        "did you mean \"readers\"?",
    );
    kafka.refused(
        &reset(&["latest", "--topic", "order"]),
        "did you mean \"orders\"?",
    );
    kafka.refused(
        &reset(&["latest", "--topic", "orders:2"]),
        "partitions 0 to 1",
    );

    kafka.done(&["group", "delete", "fresh"]);
    kafka.refused(&["group", "delete", "fresh"], "no group");
    // The offsets go with their topic, and the group with the last of them.
    kafka.done(&["topic", "delete", "orders", "--yes"]);
    wait_until("the topic's offsets to go", || {
        let list = kafka.json(&["group", "list"]);
        list.as_array().unwrap().is_empty()
            || describe()["partitions"].as_array().unwrap().is_empty()
    });
}

#[test]
fn consume_follows_all_partitions_and_commits_for_a_group() {
    let mut kafka = Kafka::start();
    kafka.produce("configured", 0, 0..3);
    kafka.produce("configured", 1, 0..3);
    let all = kafka.done(&["consume", "configured"]);
    assert_eq!(sorted(&all), ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]);
    let some = kafka.done(&[
        "consume",
        "configured",
        "-p",
        "1",
        "--from",
        "1",
        "--format",
        "hex",
    ]);
    assert!(
        some.starts_with("1 1 ") && some.contains(" value 312d31\n1 2 "),
        "{some}"
    );
    let one = kafka.done(&["consume", "configured", "-n", "1", "--format", "json"]);
    let one: Value = serde_json::from_str(&one).unwrap();
    assert_eq!(
        (&one["partition"], &one["value"]),
        (&0.into(), &"0-0".into())
    );
    assert_eq!(
        kafka.done(&["consume", "configured", "--from", "latest"]),
        ""
    );
    kafka.refused(&["consume", "configred"], "did you mean \"configured\"?");
    kafka.refused(
        &["consume", "configured", "-p", "2"],
        "partitions 0 to 1, not 2",
    );

    // What comes is printed, of partitions that are new, too; an interrupt is a good end.
    let (mut running, mut lines) = follow(&kafka.server, &["configured", "--from", "latest"]);
    // Until it is there nothing is behind its place.
    let mut sent = 3;
    let mut first = None;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| lines.next());
        while !reader.is_finished() {
            kafka.produce("configured", 1, sent..sent + 1);
            sent += 1;
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        first = reader.join().unwrap();
    });
    assert!(first.unwrap().starts_with("1-"));
    kafka.done(&["topic", "alter", "configured", "--partitions", "3"]);
    kafka.kcat(&["-P", "-t", "configured", "-p", "2"], "newest\n");
    assert!(lines.any(|line| line == "newest"));
    assert!(running.interrupt());

    // A group: what was printed is committed, and Kafka's clients go on behind it.
    let printed = kafka.done(&["consume", "configured", "--group", "tools", "-p", "0"]);
    assert_eq!(printed, "0-0\n0-1\n0-2\n");
    kafka.produce("configured", 0, 3..5);
    let group = ["consume", "configured", "--group", "tools", "-p", "0"];
    assert_eq!(kafka.done(&[&group[..], &["-n", "1"]].concat()), "0-3\n");
    let described = kafka.json(&["group", "describe", "tools"]);
    let committed = &described["partitions"][0];
    assert_eq!(
        (&committed["committed"], &committed["lag"]),
        (&4.into(), &1.into())
    );
    kafka.done(&[
        "group",
        "reset",
        "tools",
        "--to",
        "latest",
        "--topic",
        "configured:1,2",
    ]);
    assert_eq!(kafka.group("tools", "configured", 1), ["0-4"]);
    assert_eq!(kafka.done(&group), "");

    // Interrupted, it commits what it printed; also over a kill of the server nothing is left out.
    let (mut running, mut lines) = follow(&kafka.server, &["configured", "--group", "tools"]);
    kafka.produce("configured", 0, 5..8);
    assert_eq!(
        lines.by_ref().take(3).collect::<Vec<_>>(),
        ["0-5", "0-6", "0-7"]
    );
    assert!(running.interrupt());
    kafka.server.kill();
    kafka.server.restart();
    kafka.produce("configured", 0, 8..9);
    assert_eq!(kafka.group("tools", "configured", 1), ["0-8"]);
    assert_eq!(kafka.server.stats().imbalances(), Vec::<String>::new());

    // A server that stops ends who follows, which is no good end.
    let (mut running, mut lines) = follow(&kafka.server, &["configured"]);
    lines.next().unwrap();
    kafka.server.stop();
    assert!(!running.0.wait().unwrap().success());
}

#[test]
fn a_server_without_kafka_has_topics_and_no_groups() {
    let (network, folder) = (Network::new(), tempfile::tempdir().unwrap());
    let tables = format!("{}[datagram]\nudp_port = 7420\n", network.port());
    let mut server = Server::start(folder.path(), Some(&network.server), "", &tables);
    let args = ["topic", "create", "ticks"];
    done(&taffrail(&server, &args), &args);
    let (mut running, mut lines) = follow(&server, &["ticks"]);
    let produce = || {
        let mut child = network
            .producer
            .command(env!("CARGO_BIN_EXE_taffrail"))
            .args(["produce", "ticks", "--server", &format!("{SERVER_V4}:7420")])
            .args(["--quiet", "--timeout", "20s"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let _ = input.write_all(b"tick\n");
        drop(input);
        child.wait().unwrap().success()
    };
    // The rx lcores look for new topics every few milliseconds.
    wait_until("the new topic", produce);
    assert_eq!(lines.next().unwrap(), "tick");
    assert!(running.interrupt());
    for args in [
        &["group", "list"][..],
        &["consume", "ticks", "--group", "g"],
    ] {
        refused(&taffrail(&server, args), args, "no [kafka]");
    }
    server.stop();
}
