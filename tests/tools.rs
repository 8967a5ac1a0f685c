//! The tools for a store's files, on files that `taffrail serve` wrote: inspect, verify, repair.

mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use support::{Server, wait_until};

const PARTITIONS: u32 = 3;

/// A server with Kafka's protocol on a port of its own, and what was acknowledged by it.
struct Kafka {
    server: Server,
    address: String,
    folder: tempfile::TempDir,
    /// By partition: values in order.
    sent: BTreeMap<u32, Vec<String>>,
}

impl Kafka {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Free a moment ago; the server asks for it again at once, and after each restart.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = format!("127.0.0.1:{port}");
        let tables = format!(
            "[kafka]\nlisten = [\"{address}\"]\n[[topic]]\nname = \"orders\"\npartitions = {PARTITIONS}\n"
        );
        let server = Server::start(
            folder.path(),
            None,
            "segment_size = \"4MiB\"\nshards = 1",
            &tables,
        );
        Self {
            server,
            address,
            folder,
            sent: BTreeMap::new(),
        }
    }

    /// Sends `count` messages of some 300 bytes to each partition; all are acknowledged on return.
    fn send(&mut self, count: usize) {
        for partition in 0..PARTITIONS {
            let values = self.sent.entry(partition).or_default();
            let new: Vec<String> = (values.len()..values.len() + count)
                .map(|n| {
                    let noise: String = (0..30)
                        .map(|i| format!("{:08x}", (n as u64 * 2654435761 + i * 40503) as u32))
                        .collect();
                    format!("order {n} of {partition} {noise}")
                })
                .collect();
            let mut child = Command::new("kcat")
                .args(["-b", &self.address, "-P", "-t", "orders", "-K", "|"])
                .args(["-p", &partition.to_string(), "-H", "origin=test"])
                .args(["-X", "batch.size=65536"])
                .stdin(Stdio::piped())
                .spawn()
                .expect("kcat is installed by scripts/install-deps.sh --test");
            let mut input = child.stdin.take().unwrap();
            for value in &new {
                writeln!(input, "key {}|{value}", value.len() % 7).unwrap();
            }
            drop(input);
            assert!(child.wait().unwrap().success());
            values.extend(new);
        }
    }

    fn shard(&self) -> PathBuf {
        self.server.data().join("shard-000")
    }

    /// Sends until there are some SSTs, and a log behind them.
    fn fill(&mut self) {
        for _ in 0..3 {
            let before = files(&self.shard(), "sst-").len();
            self.send(5500);
            wait_until("an SST", || files(&self.shard(), "sst-").len() > before);
        }
        self.send(100);
    }

    /// Every message that was acknowledged, from the files of the stopped server in `store`.
    fn check(&self, store: &Path) {
        for (partition, values) in &self.sent {
            let output = taffrail(&[
                "read",
                "orders",
                "--partition",
                &partition.to_string(),
                "--data",
                store.to_str().unwrap(),
            ]);
            let text = success(&output);
            let lines: Vec<&str> = text.lines().collect();
            assert_eq!(lines.len(), values.len(), "partition {partition}");
            assert!(lines.iter().eq(values.iter()), "partition {partition}");
        }
    }
}

/// Files of a folder whose name begins with `prefix`, in order.
fn files(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with(prefix) && path.extension().is_none_or(|e| e != "tmp")
        })
        .collect();
    files.sort();
    files
}

fn taffrail(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_taffrail"))
        .args(args)
        .output()
        .unwrap()
}

fn success(output: &Output) -> String {
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{out}{err}");
    out.into_owned()
}

/// What a command that fails says.
fn failure(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    text
}

fn inspect(path: &Path, more: &[&str]) -> Output {
    let mut args = vec!["inspect", path.to_str().unwrap()];
    args.extend(more);
    taffrail(&args)
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn every_file_is_shown_and_a_damaged_one_refused_with_its_byte() {
    let mut kafka = Kafka::start();
    kafka.fill();
    let staging = files(&kafka.shard(), "staging.json").remove(0);
    assert!(success(&inspect(&staging, &[])).contains("\"path\""));
    let note: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&staging).unwrap()).unwrap();
    let shown = success(&inspect(Path::new(note["path"].as_str().unwrap()), &[]));
    assert!(shown.contains("(this one)"), "{shown}");
    kafka.server.stop();
    let shard = kafka.shard();

    let catalog = success(&inspect(&kafka.server.data().join("catalog.json"), &[]));
    assert!(
        catalog.contains("(orders): 3 partitions in shards 0 × 3"),
        "{catalog}"
    );
    assert!(success(&inspect(&shard.join("lock"), &[])).contains("a lock"));

    let ssts = files(&shard, "sst-");
    let mut records = 0;
    for path in &ssts {
        let text = success(&inspect(path, &["--verbose"]));
        assert!(text.contains("(orders) partition 2: offsets"), "{text}");
        assert!(text.contains("block 0 at byte 128:"), "{text}");
        let lines: Vec<serde_json::Value> = success(&inspect(path, &["--json", "-v"]))
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let of = |kind: &str, field: &str| -> u64 {
            lines
                .iter()
                .filter(|l| l["kind"] == kind)
                .map(|l| l[field].as_u64().unwrap())
                .sum()
        };
        assert_eq!(of("sst", "records"), of("partition", "records"));
        assert_eq!(of("sst", "records"), of("block", "records"));
        records += of("sst", "records");
    }
    let manifest = files(&shard, "manifest-").remove(0);
    let text = success(&inspect(&manifest, &[]));
    assert!(text.contains("byte 64: snapshot: 0 SSTs"), "{text}");
    assert_eq!(
        text.matches("flush up to LSN").count(),
        ssts.len(),
        "{text}"
    );
    let json = success(&inspect(&manifest, &["--json"]));
    let state: serde_json::Value = serde_json::from_str(json.lines().last().unwrap()).unwrap();
    let listed = state["files"].as_array().unwrap();
    let sum: u64 = listed.iter().map(|f| f["records"].as_u64().unwrap()).sum();
    assert_eq!(sum, records);

    for segment in files(&shard, "wal-") {
        let text = success(&inspect(&segment, &["-v"]));
        if !text.contains("not used yet") {
            assert!(text.contains("partition 1: next offset"), "{text}");
        }
    }

    // Damage: a header, a block, an index page, the footer; then the manifest, the catalog.
    let sst = &ssts[0];
    let whole = std::fs::read(sst).unwrap();
    for (at, says) in [
        (2, "at byte 0"),
        (45, "at byte 0"),
        (5000, "at byte 128"),
        (whole.len() - 128 - 4096 * 2 + 99, "damaged at byte"),
        (whole.len() - 50, "the footer is damaged"),
    ] {
        flip(sst, at);
        let text = failure(&inspect(sst, &[]));
        assert!(
            text.contains(says) && text.contains(sst.to_str().unwrap()),
            "{at}: {text}"
        );
        std::fs::write(sst, &whole).unwrap();
    }
    flip(&manifest, 70);
    let text = failure(&inspect(&manifest, &[]));
    assert!(
        text.contains("is damaged at byte 64") && text.contains(manifest.to_str().unwrap()),
        "{text}"
    );
    let catalog = kafka.server.data().join("catalog.json");
    let text = std::fs::read_to_string(&catalog).unwrap();
    std::fs::write(&catalog, text.replace("\"topics\"", "\"topics")).unwrap();
    let said = failure(&inspect(&catalog, &[]));
    assert!(said.contains("is damaged at byte"), "{said}");
    let nothing = kafka.folder.path().join("nothing");
    std::fs::write(&nothing, b"nothing known").unwrap();
    assert!(failure(&inspect(&nothing, &[])).contains("at byte 0"));
}

#[test]
fn a_store_without_its_manifest_is_repaired() {
    let mut kafka = Kafka::start();
    kafka.fill();
    let data = kafka.server.data();
    let store = data.to_str().unwrap();
    let text = failure(&taffrail(&["repair", store]));
    assert!(text.contains("in use by another process"), "{text}");
    kafka.server.stop();
    let shard = kafka.shard();
    let manifest = files(&shard, "manifest-").remove(0);
    let whole = std::fs::read(&manifest).unwrap();
    assert!(success(&taffrail(&["repair", store])).contains("nothing to repair"));
    let long = whole.len();

    type Harm<'a> = &'a dyn Fn(&Path);
    let harms: [(&str, Harm); 4] = [
        ("removed", &|path| std::fs::remove_file(path).unwrap()),
        ("flipped", &|path| flip(path, long / 2)),
        ("cut short", &|path| {
            std::fs::write(path, &whole[..40]).unwrap()
        }),
        ("cut in the middle", &|path| {
            std::fs::write(path, &whole[..long * 2 / 3]).unwrap()
        }),
    ];
    for (what, harm) in harms {
        for path in files(&shard, "manifest-") {
            std::fs::remove_file(path).unwrap();
        }
        std::fs::write(&manifest, &whole).unwrap();
        harm(&manifest);
        let before = std::fs::read(&manifest).ok();
        let dry = success(&taffrail(&["repair", store, "--dry-run"]));
        assert!(dry.contains("nothing was changed"), "{what}: {dry}");
        assert_eq!(std::fs::read(&manifest).ok(), before, "{what}");
        failure(&taffrail(&["read", "orders", "--data", store]));
        let report = success(&taffrail(&["repair", store]));
        assert!(
            report.contains("uses ") && report.contains("wrote "),
            "{what}: {report}"
        );
        if let Some(before) = before {
            let mut kept = manifest.clone().into_os_string();
            kept.push(".old");
            assert_eq!(std::fs::read(kept).unwrap(), before, "{what}");
        }
        success(&taffrail(&["verify", store]));
        kafka.check(&data);
    }
    // The server goes on with it.
    kafka.server.restart();
    kafka.send(3000);
    kafka.server.stop();
    success(&taffrail(&["verify", store]));
    kafka.check(&data);
}
