//! Reading by key, as users do: `taffrail read` with keys against a running server, the same server after it was killed,
//! its files, a backup, and a store whose key index is damaged. Messages come from kcat.

mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use support::Server;
use taffrail::control::client::ControlClient;
use taffrail::control::protocol::TopicChange;

const PARTITIONS: u32 = 2;

struct Store {
    server: Server,
    address: String,
    folder: tempfile::TempDir,
    /// By key: the newest value in each partition; `None`: a tombstone.
    newest: BTreeMap<String, BTreeMap<u32, Option<String>>>,
    sent: usize,
}

impl Store {
    fn start() -> Store {
        let folder = tempfile::tempdir().unwrap();
        let address = support::free_address().to_string();
        let tables = format!(
            "[kafka]\nlisten = [\"{address}\"]\n\
             [[topic]]\nname = \"devices\"\npartitions = {PARTITIONS}\nindex = \"key\"\n\
             [[topic]]\nname = \"plain\"\n"
        );
        let mut server = Server::prepare(
            folder.path(),
            None,
            Path::new("/dev/shm"),
            "segment_size = \"4MiB\"\nshards = 2",
            &tables,
        );
        server.restart();
        Store {
            server,
            address,
            folder,
            newest: BTreeMap::new(),
            sent: 0,
        }
    }

    /// Sends `count` messages to each partition, every 50th a tombstone; all are acknowledged on return.
    fn send(&mut self, count: usize) {
        for partition in 0..PARTITIONS {
            let mut lines = String::new();
            for n in self.sent..self.sent + count {
                let (key, value) = message(partition, n);
                lines += &format!("{key}|{}\n", value.as_deref().unwrap_or(""));
                self.newest.entry(key).or_default().insert(partition, value);
            }
            produce(&self.address, "devices", partition, &lines);
        }
        self.sent += count;
    }

    fn ssts(&self) -> Vec<PathBuf> {
        let mut all = Vec::new();
        for shard in ["shard-000", "shard-001"] {
            let folder = self.server.data().join(shard);
            let files = std::fs::read_dir(folder).into_iter().flatten();
            all.extend(
                files
                    .map(|entry| entry.unwrap().path())
                    .filter(|path| path.extension().is_some_and(|extension| extension == "sst")),
            );
        }
        all.sort();
        all
    }

    /// Every key is found as it was sent, one by one and in order; `from`: where `taffrail read` looks.
    fn check(&self, from: &[&str]) {
        let every = self.newest.keys().step_by(17);
        for key in every.chain(self.newest.keys().last()) {
            let lines = success(&read(&["--key", key, "--format", "json"], from));
            self.check_lines(&lines, |k| k == key);
        }
        for key in ["shared-021", "own-1-011"] {
            let lines = success(&read(&["--key", key, "--all", "--format", "json"], from));
            let all = (0..PARTITIONS).flat_map(|p| (0..self.sent).map(move |n| (p, n)));
            let all = all.filter_map(|(partition, n)| {
                let (own, value) = message(partition, n);
                (own == key).then(|| (own, u64::from(partition), value))
            });
            assert_eq!(found(&lines), all.collect::<Vec<_>>());
        }
        type Inside<'a> = &'a dyn Fn(&str) -> bool;
        let ranges: [(&[&str], Inside<'_>); 4] = [
            (&["--key-prefix", ""], &|_| true),
            (&["--key-prefix", "shared-01"], &|k| {
                k.starts_with("shared-01")
            }),
            (&["--key-from", "own-1-05", "--key-to", "shared-03"], &|k| {
                ("own-1-05".."shared-03").contains(&k)
            }),
            // The same in hexadecimal.
            (&["--key-prefix", "6f776e2d30", "--hex-keys"], &|k| {
                k.starts_with("own-0")
            }),
        ];
        for (arguments, inside) in ranges {
            let arguments = [arguments, &["--format", "json"]].concat();
            self.check_lines(&success(&read(&arguments, from)), inside);
        }
        let two = success(&read(&["--key-prefix", "", "--count", "2"], from));
        assert_eq!(two.lines().count(), 2);
        let one = success(&read(
            &["--key-from", "shared", "-p", "1", "--format", "json"],
            from,
        ));
        assert!(one.lines().all(|line| line.contains("\"partition\":1")));
        assert!(failure(&read(&["--key", "absent"], from)).contains("no message with this key"));
    }

    fn check_lines(&self, lines: &str, inside: impl Fn(&str) -> bool) {
        let mut expected = Vec::new();
        for (key, values) in self.newest.iter().filter(|(key, _)| inside(key)) {
            for (partition, value) in values {
                expected.push((key.clone(), u64::from(*partition), value.clone()));
            }
        }
        assert_eq!(found(lines), expected);
    }
}

/// Key, partition and value of each line of JSON.
fn found(lines: &str) -> Vec<(String, u64, Option<String>)> {
    let lines = lines.lines().map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = |name: &str| line[name].as_str().map(str::to_owned);
        (
            text("key").unwrap(),
            line["partition"].as_u64().unwrap(),
            text("value"),
        )
    });
    lines.collect()
}

/// Message `n` of a partition. Some keys are in both partitions, some in one.
fn message(partition: u32, n: usize) -> (String, Option<String>) {
    let key = match n % 3 {
        0 => format!("shared-{:03}", n * 7 % 90),
        _ => format!("own-{partition}-{:03}", n * 11 % 120),
    };
    let noise: String = (0..20)
        .map(|i| format!("{:08x}", (n as u64 * 2654435761 + i * 40503) as u32))
        .collect();
    let value = (n % 50 != 7).then(|| format!("{partition} {n} {noise}"));
    (key, value)
}

fn produce(address: &str, topic: &str, partition: u32, lines: &str) {
    let mut child = Command::new("kcat")
        .args(["-b", address, "-P", "-t", topic, "-K", "|", "-Z"])
        .args(["-p", &partition.to_string(), "-X", "batch.size=65536"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("kcat is installed by scripts/install-deps.sh --test");
    let mut input = child.stdin.take().unwrap();
    input.write_all(lines.as_bytes()).unwrap();
    drop(input);
    assert!(child.wait().unwrap().success());
}

fn taffrail(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_taffrail"))
        .args(arguments)
        .output()
        .unwrap()
}

fn read(arguments: &[&str], from: &[&str]) -> Output {
    taffrail(&[&["read", "devices"], arguments, from].concat())
}

fn success(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn failure(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn keys_are_found_live_after_a_kill_offline_and_in_a_backup() {
    let mut store = Store::start();
    let socket = store.server.socket().to_str().unwrap().to_owned();
    let live = ["--socket", &socket];
    store.send(300);
    store.check(&live);
    while store.ssts().len() < 4 {
        store.send(6000);
        store.check(&live);
    }
    store.server.kill();
    store.server.restart();
    store.check(&live);
    store.send(200);
    store.check(&live);
    let copy = store.folder.path().join("copy");
    success(&taffrail(&[
        "backup",
        copy.to_str().unwrap(),
        "--socket",
        &socket,
    ]));
    store.server.stop();
    let data = store.server.data().to_str().unwrap().to_owned();
    store.check(&["--data", &data]);
    let restored = store.folder.path().join("restored");
    success(&taffrail(&[
        "restore",
        copy.to_str().unwrap(),
        restored.to_str().unwrap(),
    ]));
    store.check(&["--data", restored.to_str().unwrap()]);
    success(&taffrail(&["verify", &data]));

    // Damage in a key index is named, and messages are read as before.
    let path = store.ssts()[0].clone();
    let shown = success(&taffrail(&["inspect", path.to_str().unwrap()]));
    assert!(shown.contains("an index of"), "{shown}");
    assert!(shown.contains(", keys indexed"), "{shown}");
    let json = success(&taffrail(&["inspect", path.to_str().unwrap(), "--json"]));
    let first: serde_json::Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    let at = first["keys_at"].as_u64().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[at as usize + 40] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let report = taffrail(&["verify", &data]);
    assert_eq!(report.status.code(), Some(1));
    let text = String::from_utf8_lossy(&report.stdout);
    assert!(
        text.contains("key index") && text.contains(path.to_str().unwrap()),
        "{text}"
    );
    let error = failure(&read(&["--key-prefix", ""], &["--data", &data]));
    assert!(error.contains(path.to_str().unwrap()), "{error}");
    assert!(error.contains(&format!("at byte {at}")), "{error}");
    for partition in ["0", "1"] {
        let all = success(&read(&["-p", partition], &["--data", &data]));
        assert_eq!(all.lines().count(), store.sent);
    }
}

#[test]
fn an_index_is_switched_on_while_the_server_runs() {
    let mut store = Store::start();
    let socket = store.server.socket().to_str().unwrap().to_owned();
    produce(&store.address, "plain", 0, "a|1\nb|2\na|3\n");
    let ask = || taffrail(&["read", "plain", "--key", "a", "--socket", &socket]);
    assert!(failure(&ask()).contains("has no index of its keys"));
    let mut client = ControlClient::connect(&store.server.socket()).unwrap();
    let setting = |value: &str| TopicChange::Alter {
        name: "plain".to_owned(),
        settings: BTreeMap::from([("taffrail.index".to_owned(), Some(value.to_owned()))]),
    };
    assert!(client.change(setting("value")).is_err());
    client.change(setting("key")).unwrap();
    assert_eq!(success(&ask()), "3\n");
    produce(&store.address, "plain", 0, "a|4\n");
    assert_eq!(success(&ask()), "4\n");
    client.change(setting("none")).unwrap();
    assert!(failure(&ask()).contains("has no index of its keys"));
    store.server.stop();
    let data = store.server.data().to_str().unwrap().to_owned();
    let offline = taffrail(&["read", "plain", "--key", "a", "--data", &data]);
    assert!(failure(&offline).contains("has no index of its keys"));
}
