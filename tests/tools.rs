//! The tools for a store's files, on files that `taffrail serve` wrote: inspect, verify, repair, backup, export.

mod support;

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

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
        let mut kafka = Self::prepare();
        kafka.server.restart();
        kafka
    }

    /// Not yet started.
    fn prepare() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = support::free_address().to_string();
        let tables = format!(
            "[kafka]\nlisten = [\"{address}\"]\n[[topic]]\nname = \"orders\"\npartitions = {PARTITIONS}\n"
        );
        let server = Server::prepare(
            folder.path(),
            None,
            Path::new("/dev/shm"),
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

    /// Sends `count` messages to each partition; all are acknowledged on return.
    fn send(&mut self, count: usize) {
        for partition in 0..PARTITIONS {
            let sent = self.sent.entry(partition).or_default();
            produce(&self.address, partition, sent.len(), count);
            sent.extend((sent.len()..sent.len() + count).map(|n| value(partition, n)));
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
        for (&partition, values) in &self.sent {
            let lines = read(store, partition);
            assert_eq!(lines.len(), values.len(), "partition {partition}");
            assert!(lines.iter().eq(values), "partition {partition}");
        }
    }
}

/// Message `n` of a partition: some 300 bytes.
fn value(partition: u32, n: usize) -> String {
    let noise: String = (0..30)
        .map(|i| format!("{:08x}", (n as u64 * 2654435761 + i * 40503) as u32))
        .collect();
    format!("order {n} of {partition} {noise}")
}

/// Sends messages `from` to `from + count` of a partition; all are acknowledged on return.
fn produce(address: &str, partition: u32, from: usize, count: usize) {
    let mut child = Command::new("kcat")
        .args(["-b", address, "-P", "-t", "orders", "-K", "|"])
        .args(["-p", &partition.to_string(), "-H", "origin=test"])
        .args(["-X", "batch.size=65536"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("kcat is installed by scripts/install-deps.sh --test");
    let mut input = BufWriter::new(child.stdin.take().unwrap());
    for n in from..from + count {
        writeln!(input, "key {}|{}", n % 7, value(partition, n)).unwrap();
    }
    drop(input.into_inner().unwrap());
    assert!(child.wait().unwrap().success());
}

/// Messages of a partition, from the files of a stopped server.
fn read(store: &Path, partition: u32) -> Vec<String> {
    let output = taffrail(&[
        "read",
        "orders",
        "--partition",
        &partition.to_string(),
        "--data",
        store.to_str().unwrap(),
    ]);
    success(&output).lines().map(str::to_owned).collect()
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
        (1000, "at byte 128"),
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

#[test]
fn backups_of_a_server_under_load_have_all_that_was_acknowledged() {
    let mut kafka = Kafka::start();
    kafka.fill();
    let config = kafka.server.config_path().to_str().unwrap().to_owned();
    let folder = kafka.folder.path().to_owned();
    let acknowledged: Vec<AtomicUsize> = (0..PARTITIONS)
        .map(|p| AtomicUsize::new(kafka.sent[&p].len()))
        .collect();
    let now = || -> Vec<usize> {
        acknowledged
            .iter()
            .map(|n| n.load(Ordering::Acquire))
            .collect()
    };
    for round in 0..5 {
        let (backup, store) = (
            folder.join(format!("backup{round}")),
            folder.join(format!("restored{round}")),
        );
        let (backup, path) = (backup.to_str().unwrap(), store.to_str().unwrap());
        // The load ends with the backup: what it sends makes all that is read below longer.
        let done = AtomicBool::new(false);
        let (begun, mut before) = (now(), Vec::new());
        let said = std::thread::scope(|scope| {
            for partition in 0..PARTITIONS {
                let (address, done, acknowledged) = (&kafka.address, &done, &acknowledged);
                scope.spawn(move || {
                    let count = &acknowledged[partition as usize];
                    while !done.load(Ordering::Relaxed) {
                        let from = count.load(Ordering::Relaxed);
                        produce(address, partition, from, 1000);
                        count.store(from + 1000, Ordering::Release);
                    }
                });
            }
            // Ends the load also where something below fails.
            struct Done<'a>(&'a AtomicBool);
            impl Drop for Done<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Relaxed);
                }
            }
            let _done = Done(&done);
            wait_until("load on every partition", || {
                before = now();
                before.iter().zip(&begun).all(|(now, begun)| now > begun)
            });
            success(&taffrail(&["backup", backup, "--config", &config]))
        });
        assert!(!said.contains(" 0 linked"), "{said}");
        let said = success(&taffrail(&["restore", backup, path]));
        assert!(said.contains("checked: "), "{said}");
        success(&taffrail(&["verify", path]));
        for (partition, &count) in (0..).zip(&before) {
            let read = read(&store, partition);
            assert!(
                read.len() >= count,
                "round {round} partition {partition}: {} of {count}",
                read.len()
            );
            let all = (0..read.len()).map(|n| value(partition, n));
            assert!(read.iter().cloned().eq(all), "round {round}");
        }
    }

    // Refusals.
    let backup = folder.join("backup4");
    let other = folder.join("other");
    let text = failure(&taffrail(&[
        "backup",
        backup.to_str().unwrap(),
        "--config",
        &config,
    ]));
    assert!(text.contains("is not empty"), "{text}");
    let inside = kafka.server.data().join("backup");
    let inside = inside.to_str().unwrap();
    let text = failure(&taffrail(&["backup", inside, "--config", &config]));
    assert!(text.contains("own folder"), "{text}");
    assert!(!Path::new(inside).exists());
    let data = kafka.server.data();
    let (data, other) = (data.to_str().unwrap(), other.to_str().unwrap());
    let text = failure(&taffrail(&["restore", data, other]));
    assert!(text.contains("no complete backup"), "{text}");
    let text = failure(&taffrail(&["backup", other, "--data", data]));
    assert!(text.contains("in use by another process"), "{text}");

    // A copy beside the server that it was made of must not take that one's staging file.
    let twin = folder.join("twin");
    std::fs::create_dir(&twin).unwrap();
    let twin_config = twin.join("taffrail.toml");
    let text = std::fs::read_to_string(kafka.server.config_path())
        .unwrap()
        .replace(data, folder.join("restored4").to_str().unwrap());
    std::fs::write(&twin_config, text).unwrap();
    let serve = ["serve", "--config", twin_config.to_str().unwrap()];
    let text = failure(&taffrail(&serve));
    assert!(text.contains("in use by a running server"), "{text}");

    // A killed server's store may lack what was in memory; a stopped one's is copied as it is.
    kafka.server.kill();
    let text = failure(&taffrail(&["backup", other, "--data", data]));
    assert!(text.contains("not stopped cleanly"), "{text}");
    kafka.server.restart();
    kafka.server.stop();
    success(&taffrail(&["backup", other, "--data", data]));

    // A server starts from it.
    let mut second = Kafka::prepare();
    second.sent = (0..PARTITIONS)
        .map(|p| (p, read(Path::new(data), p)))
        .collect();
    let store = second.server.data();
    success(&taffrail(&["restore", other, store.to_str().unwrap()]));
    second.server.restart();
    second.send(6000);
    second.server.stop();
    success(&taffrail(&["verify", store.to_str().unwrap()]));
    second.check(&store);
    // What it did with its files has left the backup alone.
    success(&taffrail(&["verify", other]));
}

/// A row of an export: offset, key, value and headers.
type Row = (
    i64,
    Option<Vec<u8>>,
    Option<Vec<u8>>,
    Vec<(String, Vec<u8>)>,
);

/// Reads a Parquet file with its library's own reader, by partition.
fn parquet_rows(path: &Path) -> BTreeMap<u32, Vec<Row>> {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::Field;
    let reader = SerializedFileReader::new(std::fs::File::open(path).unwrap()).unwrap();
    let mut rows: BTreeMap<u32, Vec<Row>> = BTreeMap::new();
    let bytes = |field: &Field| match field {
        Field::Bytes(bytes) => Some(bytes.data().to_vec()),
        Field::Null => None,
        other => panic!("{other:?}"),
    };
    for row in reader.get_row_iter(None).unwrap() {
        let row = row.unwrap();
        let fields: Vec<(&String, &Field)> = row.get_column_iter().collect();
        let names: Vec<&str> = fields.iter().map(|f| f.0.as_str()).collect();
        assert_eq!(
            names,
            [
                "partition",
                "offset",
                "timestamp",
                "key",
                "value",
                "headers"
            ]
        );
        let (Field::Int(partition), Field::Long(offset)) = (fields[0].1, fields[1].1) else {
            panic!("{row:?}");
        };
        let Field::TimestampMillis(time) = fields[2].1 else {
            panic!("{row:?}");
        };
        assert!(*time > 1_700_000_000_000);
        let Field::ListInternal(list) = fields[5].1 else {
            panic!("{row:?}");
        };
        let headers = list.elements().iter().map(|element| {
            let Field::Group(group) = element else {
                panic!("{element:?}");
            };
            let pair: Vec<&Field> = group.get_column_iter().map(|f| f.1).collect();
            let Field::Str(name) = pair[0] else {
                panic!("{element:?}");
            };
            (name.clone(), bytes(pair[1]).unwrap())
        });
        rows.entry(*partition as u32).or_default().push((
            *offset,
            bytes(fields[3].1),
            bytes(fields[4].1),
            headers.collect(),
        ));
    }
    rows
}

/// Reads the segments of one of Kafka's log folders with the decoder of the crate kafka-protocol, and checks the
/// indexes against the log.
fn kafka_rows(folder: &Path) -> (Vec<Row>, usize) {
    use bytes::{Buf, Bytes};
    use kafka_protocol::records::{Compression, RecordBatchDecoder};
    let mut rows: Vec<Row> = Vec::new();
    let logs: Vec<PathBuf> = files(folder, "0")
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "log"))
        .collect();
    for path in &logs {
        let base: i64 = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
        assert_eq!(base, rows.last().map_or(0, |row| row.0 + 1));
        let whole = Bytes::from(std::fs::read(path).unwrap());
        // By position: last offset and largest timestamp.
        let mut batches: BTreeMap<i32, (i64, i64)> = BTreeMap::new();
        let mut rest = whole.clone();
        while rest.has_remaining() {
            let position = (whole.len() - rest.len()) as i32;
            let decompress = |bytes: &mut Bytes, compression: Compression| match compression {
                Compression::None => Ok(bytes.clone()),
                Compression::Zstd => Ok(Bytes::from(zstd::decode_all(&bytes[..])?)),
                other => panic!("{other:?}"),
            };
            let set =
                RecordBatchDecoder::decode_with_custom_compression(&mut rest, Some(decompress))
                    .unwrap();
            let newest = set.records.iter().map(|r| r.timestamp).max().unwrap();
            batches.insert(position, (set.records.last().unwrap().offset, newest));
            for record in set.records {
                let headers = record.headers.iter().map(|(name, value)| {
                    (name.as_str().to_owned(), value.as_ref().unwrap().to_vec())
                });
                rows.push((
                    record.offset,
                    record.key.as_ref().map(|k| k.to_vec()),
                    record.value.as_ref().map(|v| v.to_vec()),
                    headers.collect(),
                ));
            }
        }
        let index = std::fs::read(path.with_extension("index")).unwrap();
        assert_eq!(index.len() % 8, 0);
        assert!(whole.len() < 100_000 || !index.is_empty());
        for entry in index.chunks(8) {
            let offset = i32::from_be_bytes(entry[..4].try_into().unwrap());
            let position = i32::from_be_bytes(entry[4..].try_into().unwrap());
            assert_eq!(batches[&position].0, base + i64::from(offset));
        }
        let times = std::fs::read(path.with_extension("timeindex")).unwrap();
        assert!(times.len() % 12 == 0 && !times.is_empty());
        let mut before = -1;
        for entry in times.chunks(12) {
            let time = i64::from_be_bytes(entry[..8].try_into().unwrap());
            let offset = base + i64::from(i32::from_be_bytes(entry[8..].try_into().unwrap()));
            assert!(time > before);
            before = time;
            assert!(batches.values().any(|&batch| batch == (offset, time)));
        }
    }
    (rows, logs.len())
}

#[test]
fn what_is_exported_is_what_was_sent() {
    let mut kafka = Kafka::start();
    kafka.fill();
    let folder = kafka.folder.path().to_owned();
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let config = kafka.server.config_path().to_str().unwrap().to_owned();
    let data = kafka.server.data().to_str().unwrap().to_owned();
    let expected: BTreeMap<u32, Vec<Row>> = kafka
        .sent
        .iter()
        .map(|(&partition, values)| {
            let row = |(n, value): (usize, &String)| {
                let key = format!("key {}", n % 7).into_bytes();
                let header = ("origin".to_owned(), b"test".to_vec());
                let value = value.clone().into_bytes();
                (n as i64, Some(key), Some(value), vec![header])
            };
            (partition, values.iter().enumerate().map(row).collect())
        })
        .collect();

    // Of the running server, then of its files.
    for (round, source) in [["--config", &config], ["--data", &data]]
        .iter()
        .enumerate()
    {
        if round == 1 {
            kafka.server.stop();
        }
        let file = path(&format!("{round}.parquet"));
        let said = success(&taffrail(
            &[&["export", "orders", "--parquet", &file][..], source].concat(),
        ));
        assert!(said.contains("messages in 1 files"), "{said}");
        assert!(parquet_rows(Path::new(&file)) == expected);
        let log = path(&format!("kafka{round}"));
        let args = ["export", "orders", "--kafka-log", &log];
        let small = ["--segment-bytes", "1MiB"];
        success(&taffrail(&[&args[..], &small, source].concat()));
        for (partition, rows) in &expected {
            let (read, segments) = kafka_rows(&Path::new(&log).join(format!("orders-{partition}")));
            assert!(&read == rows, "partition {partition}");
            assert!(segments > 1, "{segments} segments");
        }
    }

    // Some partitions only; and what is refused.
    let file = path("some.parquet");
    let some = [
        "export",
        "orders",
        "--data",
        &data,
        "--parquet",
        &file,
        "-p",
    ];
    success(&taffrail(&[&some[..], &["2,1"]].concat()));
    let rows = parquet_rows(Path::new(&file));
    assert_eq!(rows.keys().copied().collect::<Vec<_>>(), [1, 2]);
    let text = failure(&taffrail(&[&some[..], &["1"]].concat()));
    assert!(text.contains("is there already"), "{text}");
    std::fs::remove_file(&file).unwrap();
    let text = failure(&taffrail(&[&some[..], &["7"]].concat()));
    assert!(text.contains("partitions 0 to 2, not 7"), "{text}");
    let text = failure(&taffrail(&[
        "export",
        "nothing",
        "--data",
        &data,
        "--parquet",
        &file,
    ]));
    assert!(text.contains("there are: "), "{text}");
    assert!(!Path::new(&file).exists());
}
