//! Topics that are made, grown, configured and deleted while `taffrail serve` runs: producers of the datagram
//! protocol find them, accounts stay exact, and a kill at any moment leaves what was answered.

mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::process::Stdio;

use support::{Network, SERVER_V4, Server, wait_until};
use taffrail::control::client::ControlError;
use taffrail::control::protocol::TopicChange;

const TABLES: &str = r#"
[[topic]]
name = "fed"
settings = { "retention.ms" = 5000, "cleanup.policy" = "delete" }
[[udp]]
udp_port = 5000
topic = "fed"
[datagram]
udp_port = 7420
"#;

fn create(name: &str, partitions: u32) -> TopicChange {
    TopicChange::Create {
        name: name.to_owned(),
        partitions,
        settings: BTreeMap::new(),
    }
}

fn delete(name: &str) -> TopicChange {
    TopicChange::Delete {
        name: name.to_owned(),
    }
}

fn grow(name: &str, partitions: u32) -> TopicChange {
    TopicChange::AddPartitions {
        name: name.to_owned(),
        partitions,
    }
}

fn refused(result: Result<(), ControlError>, says: &str) {
    match result {
        Err(ControlError::Refused(reason)) => assert!(reason.contains(says), "{reason}"),
        other => panic!("{other:?}"),
    }
}

/// Sends lines with `taffrail produce`; gives whether all were acknowledged.
fn produce(network: &Network, topic: &str, partition: u32, lines: &[String]) -> bool {
    let mut child = network
        .producer
        .command(env!("CARGO_BIN_EXE_taffrail"))
        .args(["produce", topic, "--server", &format!("{SERVER_V4}:7420")])
        .args(["--partition", &partition.to_string(), "--quiet"])
        .args(["--timeout", "20s"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let _ = input.write_all((lines.join("\n") + "\n").as_bytes());
    drop(input);
    child.wait().unwrap().success()
}

fn lines(name: &str, count: usize) -> Vec<String> {
    (0..count).map(|i| format!("{name} {i}")).collect()
}

fn values(server: &Server, topic: &str, partition: u32) -> Vec<String> {
    let records = server.values(topic, partition, 0);
    let text = |value: Vec<u8>| String::from_utf8(value).unwrap();
    records.into_iter().map(|(_, v)| text(v)).collect()
}

#[test]
fn producers_find_topics_made_while_the_server_runs() {
    let (network, folder) = (Network::new(), tempfile::tempdir().unwrap());
    let tables = format!("{}{TABLES}", network.port());
    let mut server = Server::start(folder.path(), Some(&network.server), "shards = 2", &tables);
    let mut client = server.client();

    client.change(create("made", 3)).unwrap();
    refused(client.change(create("made", 1)), "already");
    refused(client.change(create("a/b", 1)), "not allowed");
    refused(client.change(create("none", 0)), "partitions");
    refused(client.change(grow("made", 3)), "not shrink");
    refused(client.change(delete("nobody")), "no topic");
    refused(client.change(delete("fed")), "[[udp]]");

    // The rx lcores look for new topics every few milliseconds.
    wait_until("the new topic", || {
        produce(&network, "made", 2, &lines("first", 1))
    });
    assert!(produce(&network, "made", 0, &lines("zero", 200)));
    client.change(grow("made", 5)).unwrap();
    wait_until("the new partition", || {
        produce(&network, "made", 4, &lines("four", 1))
    });
    assert_eq!(values(&server, "made", 0), lines("zero", 200));
    assert_eq!(values(&server, "made", 4), lines("four", 1));
    let stats = server.settled(202);
    let made = stats.topics.iter().find(|t| t.name == "made").unwrap();
    assert_eq!((made.stored, made.partitions.len()), (202, 5));

    // Made anew it is another topic, and empty.
    client.change(delete("made")).unwrap();
    assert!(client.topics().unwrap().iter().all(|t| t.name != "made"));
    client.change(create("made", 1)).unwrap();
    assert_eq!(values(&server, "made", 0), Vec::<String>::new());
    wait_until("the topic made anew", || {
        produce(&network, "made", 0, &lines("again", 1))
    });
    let settings = [("retention.ms".to_owned(), Some("77".to_owned()))];
    client
        .change(TopicChange::Alter {
            name: "made".to_owned(),
            settings: settings.into(),
        })
        .unwrap();
    let catalog = |server: &Server| -> serde_json::Value {
        let bytes = std::fs::read(server.data().join("catalog.json")).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    };
    let setting = |catalog: &serde_json::Value, name: &str| {
        let topics = catalog["topics"].as_array().unwrap();
        let topic = topics.iter().find(|t| t["name"] == name).unwrap();
        topic["settings"]["retention.ms"].clone()
    };
    let before = catalog(&server);
    assert_eq!(setting(&before, "made"), "77");
    assert_eq!(setting(&before, "fed"), "5000");

    for kill in [true, false] {
        if kill {
            server.kill();
        } else {
            server.stop();
        }
        server.restart();
        assert_eq!(catalog(&server), before);
        assert_eq!(values(&server, "made", 0), lines("again", 1));
    }
    assert!(produce(&network, "made", 0, &lines("more", 3)));
    assert_eq!(values(&server, "made", 0).len(), 4);
    server.settled(3);
    server.stop();
}

/// Kills the server while topics come and go: what was answered is so, what was not is either so or not, and
/// every topic there is takes messages.
#[test]
fn kills_leave_the_topics_that_were_answered() {
    const ROUNDS: usize = 12;
    let (network, folder) = (Network::new(), tempfile::tempdir().unwrap());
    let tables = format!("{}{TABLES}", network.port());
    let mut server = Server::start(folder.path(), Some(&network.server), "shards = 2", &tables);
    // Name and partitions, as answered.
    let mut known: BTreeMap<String, usize> = BTreeMap::new();
    known.insert("fed".to_owned(), 1);
    for round in 0..ROUNDS {
        let (done, open) = std::thread::scope(|scope| {
            let socket = server.socket();
            let known = &known;
            let worker = scope.spawn(move || {
                let mut done = known.clone();
                let mut open: Option<(String, Vec<Option<usize>>)> = None;
                let Ok(mut client) = taffrail::control::client::ControlClient::connect(&socket)
                else {
                    return (done, open);
                };
                for i in 0.. {
                    let name = format!("t{round}-{}", i / 3);
                    let before = done.get(&name).copied();
                    let (change, after) = match i % 3 {
                        0 => (create(&name, 2), Some(2)),
                        1 => (grow(&name, 4), Some(4)),
                        _ if i % 2 == 0 => (delete(&name), None),
                        _ => continue,
                    };
                    if client.change(change).is_err() {
                        open = Some((name, vec![before, after]));
                        break;
                    }
                    match after {
                        Some(partitions) => done.insert(name, partitions),
                        None => done.remove(&name),
                    };
                }
                (done, open)
            });
            // From a moment to some dozens of changes.
            std::thread::sleep(std::time::Duration::from_millis(
                3 * round as u64 * round as u64,
            ));
            server.kill();
            worker.join().unwrap()
        });
        server.restart();
        let found: BTreeMap<String, usize> = server
            .client()
            .topics()
            .unwrap()
            .into_iter()
            .map(|topic| (topic.name, topic.partitions.len()))
            .collect();
        let mut expected = done;
        if let Some((name, states)) = open {
            let state = found.get(&name).copied();
            assert!(
                states.contains(&state),
                "{name} is {state:?}, not one of {states:?}"
            );
            match state {
                Some(partitions) => expected.insert(name, partitions),
                None => expected.remove(&name),
            };
        }
        assert_eq!(found, expected, "round {round}");
        known = expected;
    }
    let newest = known.keys().next_back().unwrap().clone();
    assert!(produce(&network, &newest, 0, &lines("alive", 5)));
    assert_eq!(values(&server, &newest, 0), lines("alive", 5));
    server.settled(5);
    server.stop();
}
