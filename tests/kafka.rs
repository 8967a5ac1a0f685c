//! Real Kafka clients against a running server, as their users run them.
//!
//! The clients are Debian's kcat and what scripts/kafka-clients.sh installs below target/kafka-clients;
//! their cases are the scripts in tests/kafka/.

mod support;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::{ProduceRequest, TopicName};
use kafka_protocol::protocol::StrBytes;
use support::kafka::Connection;
use support::{Server, wait_until};
use taffrail::wire::record_batch::BatchWriter;

/// Groups do not wait for members that no test starts.
const SOON: &str = "group_initial_rebalance_delay = \"100ms\"\n";

/// A server with Kafka's protocol on a port of its own.
struct Kafka {
    server: Server,
    address: String,
    _folder: tempfile::TempDir,
}

impl Kafka {
    fn start(tables: &str) -> Self {
        Self::start_with("", tables)
    }

    /// With settings of the storage, too.
    fn start_with(storage: &str, tables: &str) -> Self {
        Self::start_by(&support::transport("io_uring"), storage, tables)
    }

    fn start_by(transport: &str, storage: &str, tables: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = support::free_address().to_string();
        let server = Server::start(
            folder.path(),
            None,
            storage,
            &format!("[kafka]\nlisten = [\"{address}\"]\n{SOON}{transport}{tables}"),
        );
        Self {
            server,
            address,
            _folder: folder,
        }
    }

    fn kcat(&self, args: &[&str], input: &str) -> String {
        let mut child = Command::new("kcat")
            .args(["-b", &self.address])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kcat is installed by scripts/install-deps.sh --test");
        child
            .stdin
            .take()
            .unwrap()
            .write_all(input.as_bytes())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "kcat {args:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }
}

fn clients() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/kafka-clients");
    assert!(
        path.join("installed").exists(),
        "no Kafka clients in {}: run scripts/kafka-clients.sh",
        path.display()
    );
    path
}

/// A client with its cases, as scripts/kafka-clients.sh installed them; its output goes to a file.
fn start(command: &[&Path], address: &str, log: &Path) -> std::process::Child {
    let file = std::fs::File::create(log).unwrap();
    // A guard against hangs.
    Command::new("timeout")
        .arg("600")
        .args(command)
        .arg(address)
        .env("NODE_PATH", clients().join("node_modules"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap()
}

#[test]
fn every_client_against_one_server() {
    let kafka = Kafka::start("");
    let folder = tempfile::tempdir().unwrap();
    let clients = clients();
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kafka");
    let python = clients.join("bin/python");
    let franz = clients.join("franz");
    let rust = clients.join("rust/debug/kafka-rust");
    let java = clients.join("java");
    let classes = PathBuf::from(format!("{0}:{0}/*", java.display()));
    let mut running = Vec::new();
    let mut run = |name: &'static str, needs: &Path, command: &[&Path]| {
        if !needs.exists() {
            println!(
                "{name}: not run, scripts/kafka-clients.sh did not find its language, or could not make it"
            );
            return;
        }
        let log = folder.path().join(name);
        running.push((name, start(command, &kafka.address, &log), log));
    };
    for name in ["confluent.py", "kafka_python.py", "aio.py"] {
        run(name, &python, &[&python, &scripts.join(name)]);
    }
    run(
        "kafkajs.js",
        &clients.join("node_modules"),
        &[Path::new("node"), &scripts.join("kafkajs.js")],
    );
    let javascript = clients.join("node_modules/@confluentinc/kafka-javascript");
    run(
        "confluent.js",
        &javascript,
        &[Path::new("node"), &scripts.join("confluent.js")],
    );
    run("rdkafka", &rust, &[&rust]);
    run("franz-go", &franz, &[&franz]);
    run(
        "java",
        &java,
        &[
            Path::new("java"),
            Path::new("-cp"),
            &classes,
            Path::new("Cases"),
        ],
    );
    let mut failures = String::new();
    for (name, mut child, log) in running {
        let status = child.wait().unwrap();
        let text = std::fs::read_to_string(&log).unwrap();
        for line in text.lines().filter(|l| l.starts_with("ok ")) {
            println!("{name}: {line}");
        }
        if !status.success() {
            failures.push_str(&format!("---- {name}: {status}\n{text}\n"));
        }
    }
    assert!(failures.is_empty(), "{failures}");
    let stats = kafka.server.stats();
    assert_eq!(stats.imbalances(), Vec::<String>::new());
}

#[test]
fn a_server_without_ports_starts_no_dpdk() {
    let kafka = Kafka::start("");
    let files = Path::new("/var/run/dpdk").join(kafka.server.prefix());
    assert!(!files.exists(), "{}", files.display());
    let log = kafka.server.log();
    assert!(!log.contains("EAL:"), "{log}");
    kafka.kcat(&["-P", "-t", "t"], "a\n");
    assert_eq!(kafka.kcat(&["-C", "-t", "t", "-e", "-q"], ""), "a\n");
}

#[test]
fn kcat_produces_lists_and_consumes() {
    let kafka = Kafka::start("");
    let input: String = (0..1000).map(|i| format!("key{i}:value {i}\n")).collect();
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        let topic = format!("kcat-{codec}");
        kafka.kcat(&["-P", "-t", &topic, "-K:", "-z", codec], &input);
        let output = kafka.kcat(
            &["-C", "-t", &topic, "-e", "-q", "-K:", "-o", "beginning"],
            "",
        );
        assert_eq!(output, input, "{codec}");
    }
    let listed = kafka.kcat(&["-L"], "");
    assert!(
        listed.contains("topic \"kcat-zstd\" with 1 partitions"),
        "{listed}"
    );
    let offset = kafka.kcat(&["-Q", "-t", "kcat-none:0:-1"], "");
    assert!(offset.contains("offset 1000"), "{offset}");
    let tail = kafka.kcat(&["-C", "-t", "kcat-none", "-e", "-q", "-o", "-2"], "");
    assert_eq!(tail, "value 998\nvalue 999\n");
}

/// Batches that stay where their request was read, such as are copied, and such as get the server's time; requests behind
/// one another, and the beginning of the next one behind each.
#[test]
fn large_batches_are_stored_as_they_came() {
    use kafka_protocol::messages::CreateTopicsRequest;
    use kafka_protocol::messages::create_topics_request::{CreatableTopic, CreatableTopicConfig};
    let kafka = Kafka::start("");
    let mut client = Connection::open(kafka.address.parse().unwrap()).unwrap();
    let topic = |name, time| {
        let config = CreatableTopicConfig::default()
            .with_name(StrBytes::from_static_str("message.timestamp.type"))
            .with_value(Some(StrBytes::from_static_str(time)));
        CreatableTopic::default()
            .with_name(TopicName(StrBytes::from_static_str(name)))
            .with_num_partitions(2)
            .with_replication_factor(1)
            .with_configs(vec![config])
    };
    let topics = vec![
        topic("sent", "CreateTime"),
        topic("stamped", "LogAppendTime"),
    ];
    let request = CreateTopicsRequest::default()
        .with_topics(topics)
        .with_timeout_ms(30_000);
    let created = client.call(5, &request).unwrap();
    assert!(created.topics.iter().all(|topic| topic.error_code == 0));

    let value = |request: usize, partition: usize, record: usize| {
        let mut value = format!("{request} {partition} {record} ").into_bytes();
        value.resize(1000, b'a' + (request + record) as u8 % 26);
        value
    };
    // Records of the batch for each partition: one large one, two of a half, a small one behind a large one.
    let shapes: [&[usize]; 4] = [&[120], &[40, 40], &[90, 1], &[33]];
    let (mut requests, mut expected) = (Vec::new(), [Vec::new(), Vec::new()]);
    for number in 0..24 {
        let parts = shapes[number % shapes.len()].iter().enumerate();
        let parts = parts.map(|(partition, &records)| {
            let mut bytes = vec![0; 200 + records * 1100];
            let mut writer = BatchWriter::new(&mut bytes, 0);
            for record in 0..records {
                let value = value(number, partition, record);
                writer.push(0, None, Some(&value)).unwrap();
                expected[partition].push(value);
            }
            let len = writer.finish(0);
            PartitionProduceData::default()
                .with_index(partition as i32)
                .with_records(Some(bytes::Bytes::copy_from_slice(&bytes[..len])))
        });
        let parts: Vec<_> = parts.collect();
        let data = ["sent", "stamped"].map(|name| {
            TopicProduceData::default()
                .with_name(TopicName(StrBytes::from_static_str(name)))
                .with_partition_data(parts.clone())
        });
        requests.extend(data.map(|data| {
            ProduceRequest::default()
                .with_acks(-1)
                .with_timeout_ms(30_000)
                .with_topic_data(vec![data])
        }));
    }
    for answer in client.call_all(7, &requests).unwrap() {
        let parts = &answer.responses[0].partition_responses;
        assert!(parts.iter().all(|part| part.error_code == 0), "{parts:?}");
    }
    for topic in ["sent", "stamped"] {
        for (partition, expected) in (0..).zip(&expected) {
            let stored = kafka.server.values(topic, partition, 0);
            assert_eq!(stored.len(), expected.len());
            for ((offset, value), (place, sent)) in stored.iter().zip((0..).zip(expected)) {
                assert!(
                    (*offset, value) == (place, sent),
                    "{topic} {partition} {place}"
                );
            }
        }
        let times = ["-C", "-t", topic, "-p", "0", "-e", "-q", "-f", "%T\n"];
        let times = kafka.kcat(&times, "");
        assert!(times.lines().all(|time| (time == "0") == (topic == "sent")));
        assert_eq!(times.lines().count(), expected[0].len());
    }
    let stats = kafka.server.stats();
    assert_eq!(stats.imbalances(), Vec::<String>::new());
}

/// Refused batches are counted, and what came beside them without an acknowledgement is stored.
#[test]
fn what_is_refused_is_counted() {
    let kafka = Kafka::start("");
    kafka.kcat(&["-P", "-t", "orders"], "first\n");
    // More than a commit of the tests' servers takes.
    let large = "x".repeat(300_000);
    let batch = |value: &[u8]| {
        let mut bytes = vec![0; value.len() + 200];
        let mut writer = BatchWriter::new(&mut bytes, 0);
        writer.push(0, None, Some(value)).unwrap();
        let len = writer.finish(0);
        bytes::Bytes::copy_from_slice(&bytes[..len])
    };
    let request = |acks, topics: &[(&'static str, &[u8])]| {
        let topic = |&(name, value): &(&'static str, &[u8])| {
            TopicProduceData::default()
                .with_name(TopicName(StrBytes::from_static_str(name)))
                .with_partition_data(vec![
                    PartitionProduceData::default().with_records(Some(batch(value))),
                ])
        };
        ProduceRequest::default()
            .with_acks(acks)
            .with_timeout_ms(30_000)
            .with_topic_data(topics.iter().map(topic).collect())
    };
    let connect = || Connection::open(kafka.address.parse().unwrap()).unwrap();
    let answer = connect()
        .call(7, &request(-1, &[("orders", large.as_bytes())]))
        .unwrap();
    let part = &answer.responses[0].partition_responses[0];
    assert_eq!(part.error_code, 10, "MESSAGE_TOO_LARGE");
    // Nobody is told but by the end of the connection.
    let mixed = request(0, &[("orders", b"beside"), ("nowhere", b"lost")]);
    assert!(connect().call(7, &mixed).is_err());
    wait_until("what came beside is stored", || {
        let read = kafka.kcat(&["-C", "-t", "orders", "-e", "-q", "-o", "-1"], "");
        read == "beside\n"
    });
    let stats = kafka.server.stats();
    assert_eq!(stats.imbalances(), Vec::<String>::new());
    let counted = stats.kafka.unwrap();
    assert_eq!((counted.batches_in, counted.batches_refused), (2, 2));
}

/// More connections than are looked at in a row, of which one is in use.
#[test]
fn of_many_connections_the_idle_ones_are_closed() {
    use kafka_protocol::messages::MetadataRequest;
    const IDLE: usize = 2500;
    taffrail::serve::preflight::raise_files();
    let kafka = Kafka::start("idle_timeout = \"4s\"\n");
    let address = kafka.address.parse().unwrap();
    let mut used = Connection::open(address).unwrap();
    let mut idle: Vec<_> = (0..IDLE)
        .map(|_| Connection::open(address).unwrap())
        .collect();
    let stats = || kafka.server.stats().kafka.unwrap();
    wait_until("all are taken", || {
        used.call(9, &MetadataRequest::default()).unwrap();
        stats().accepted == IDLE as u64 + 1
    });
    wait_until("the idle ones are closed", || {
        used.call(9, &MetadataRequest::default()).unwrap();
        stats().connections == 1
    });
    for connection in &mut idle {
        let mut nothing = [0];
        assert_eq!(connection.stream().read(&mut nothing).unwrap(), 0);
    }
}

/// A peer that is gone without a word is found before the idle limit, by probes that thousands of connections do not send
/// in the same moment.
#[test]
fn a_silent_connection_is_probed_after_minutes() {
    let kafka = Kafka::start("");
    let address: std::net::SocketAddr = kafka.address.parse().unwrap();
    let mut connection = Connection::open(address).unwrap();
    let client = connection.stream().local_addr().unwrap();
    // Ports in hexadecimal, the state "established", then which timer runs (2: keep-alive) and for how many hundredths of a second.
    let ends = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let port = |end: &str| u16::from_str_radix(end.split(':').nth(1)?, 16).ok();
        let (local, remote) = (port(words.next()?)?, port(words.next()?)?);
        let timer = words.nth(2)?.strip_prefix("02:")?;
        let left = u64::from_str_radix(timer, 16).ok()?;
        ((local, remote) == (address.port(), client.port())).then_some(left)
    };
    let mut left = None;
    wait_until("the connection has its timer", || {
        let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
        left = sockets.lines().find_map(ends);
        left.is_some()
    });
    let seconds = left.unwrap() / 100;
    assert!((120..=300).contains(&seconds), "{seconds} s");
}

/// In every version: the broker's settings with their sources, those that are asked for, and why others are not to be
/// had; no request changes them.
#[test]
fn the_broker_s_settings_are_shown_and_not_changed() {
    use kafka_protocol::messages::alter_configs_request::{AlterConfigsResource, AlterableConfig};
    use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
    use kafka_protocol::messages::{
        AlterConfigsRequest, DescribeConfigsRequest, IncrementalAlterConfigsRequest,
        incremental_alter_configs_request as incremental,
    };
    const BROKER: i8 = 4;
    let (fixed, default) = (4, 5);
    let kafka = Kafka::start("default_partitions = 3\ngroup_max_session_timeout = \"20m\"\n");
    let mut client = Connection::open(kafka.address.parse().unwrap()).unwrap();
    let resource = |name: &'static str, keys: Option<Vec<&'static str>>| {
        let keys = keys.map(|keys| keys.into_iter().map(StrBytes::from_static_str).collect());
        DescribeConfigsResource::default()
            .with_resource_type(BROKER)
            .with_resource_name(StrBytes::from_static_str(name))
            .with_configuration_keys(keys)
    };
    for version in 1..=4 {
        let request = DescribeConfigsRequest::default()
            .with_include_synonyms(true)
            .with_include_documentation(version >= 3)
            .with_resources(vec![
                resource("0", None),
                resource("0", Some(vec!["num.partitions", "no.such.setting"])),
                resource("", None),
                resource("7", None),
            ]);
        let answer = client.call(version, &request).unwrap();
        let [all, some, dynamic, other] = &answer.results[..] else {
            panic!("{answer:?}")
        };
        let listeners = format!("PLAINTEXT://{}", kafka.address);
        for (name, value, source) in [
            ("listeners", &*listeners, fixed),
            ("num.partitions", "3", fixed),
            ("group.max.session.timeout.ms", "1200000", fixed),
            ("group.min.session.timeout.ms", "6000", default),
            ("default.replication.factor", "1", default),
            ("auto.create.topics.enable", "true", default),
            ("log.retention.ms", "-1", default),
        ] {
            let found = all.configs.iter().find(|c| &*c.name == name).unwrap();
            assert_eq!(found.value.as_deref(), Some(value), "{name}");
            assert!(found.read_only && !found.is_sensitive, "{name}");
            assert_eq!(found.config_source, source, "{name}");
            let synonyms: Vec<i8> = found.synonyms.iter().map(|s| s.source).collect();
            let expected = if source == fixed { vec![4, 5] } else { vec![5] };
            assert_eq!(synonyms, expected, "{name}");
            if version >= 3 {
                let text = found.documentation.as_ref().unwrap();
                assert!(!text.is_empty(), "{name}");
            }
        }
        let names: Vec<&str> = some.configs.iter().map(|c| &*c.name).collect();
        assert_eq!(names, ["num.partitions"]);
        assert!(dynamic.error_code == 0 && dynamic.configs.is_empty());
        let invalid_request = 42;
        assert_eq!(other.error_code, invalid_request);
        assert!(other.error_message.as_ref().unwrap().contains("no broker"));
    }
    let name = StrBytes::from_static_str("num.partitions");
    let changed = AlterConfigsResource::default()
        .with_resource_type(BROKER)
        .with_resource_name(StrBytes::from_static_str("0"))
        .with_configs(vec![
            AlterableConfig::default()
                .with_name(name.clone())
                .with_value(Some(StrBytes::from_static_str("9"))),
        ]);
    let request = AlterConfigsRequest::default().with_resources(vec![changed]);
    let altered = client.call(2, &request).unwrap().responses.remove(0);
    let changed = incremental::AlterConfigsResource::default()
        .with_resource_type(BROKER)
        .with_configs(vec![
            incremental::AlterableConfig::default()
                .with_name(name)
                .with_value(Some(StrBytes::from_static_str("9"))),
        ]);
    let request = IncrementalAlterConfigsRequest::default().with_resources(vec![changed]);
    let incremental = client.call(1, &request).unwrap().responses.remove(0);
    for (code, message) in [
        (altered.error_code, altered.error_message),
        (incremental.error_code, incremental.error_message),
    ] {
        assert_eq!(code, 42);
        assert!(message.unwrap().contains("configuration file"));
    }
}

/// A batch that is refused for some of its records names them.
#[test]
fn records_at_fault_are_named() {
    let kafka = Kafka::start(
        "[[topic]]\nname = \"keyed\"\nsettings = { \"cleanup.policy\" = \"compact\" }\n",
    );
    let mut client = Connection::open(kafka.address.parse().unwrap()).unwrap();
    let mut bytes = vec![0; 400];
    let mut writer = BatchWriter::new(&mut bytes, 0);
    for key in [Some(&b"a"[..]), None, Some(b"b"), None] {
        writer.push(0, key, Some(b"value")).unwrap();
    }
    let len = writer.finish(0);
    let data = PartitionProduceData::default()
        .with_records(Some(bytes::Bytes::copy_from_slice(&bytes[..len])));
    let request = ProduceRequest::default()
        .with_acks(-1)
        .with_timeout_ms(30_000)
        .with_topic_data(vec![
            TopicProduceData::default()
                .with_name(TopicName(StrBytes::from_static_str("keyed")))
                .with_partition_data(vec![data]),
        ]);
    for version in [8, 9, 11] {
        let answer = client.call(version, &request).unwrap();
        let part = &answer.responses[0].partition_responses[0];
        let invalid_record = 87;
        assert_eq!(part.error_code, invalid_record);
        let named: Vec<(i32, Option<&str>)> = part
            .record_errors
            .iter()
            .map(|e| (e.batch_index, e.batch_index_error_message.as_deref()))
            .collect();
        let text = Some("the record has no key");
        assert_eq!(named, [(1, text), (3, text)]);
        assert!(part.error_message.as_ref().unwrap().contains("2 have none"));
    }
}

/// By either transport: answers in order to requests sent at once, small ones and such as arrive in many parts; the limit
/// of connections; peers that stop in the middle or take no answers cost others nothing; the stop with all of them there.
#[test]
fn both_transports_serve_alike() {
    use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
    use kafka_protocol::messages::{FetchRequest, MetadataRequest};
    const CONNECTIONS: usize = 12;
    let name = || TopicName(StrBytes::from_static_str("orders"));
    let produce = |value: &[u8]| {
        let mut bytes = vec![0; value.len() + 200];
        let mut writer = BatchWriter::new(&mut bytes, 0);
        writer.push(0, None, Some(value)).unwrap();
        let len = writer.finish(0);
        let data = PartitionProduceData::default()
            .with_records(Some(bytes::Bytes::copy_from_slice(&bytes[..len])));
        ProduceRequest::default()
            .with_acks(-1)
            .with_timeout_ms(30_000)
            .with_topic_data(vec![
                TopicProduceData::default()
                    .with_name(name())
                    .with_partition_data(vec![data]),
            ])
    };
    let fetch = |offset| {
        let partition = FetchPartition::default()
            .with_fetch_offset(offset)
            .with_partition_max_bytes(1 << 20);
        FetchRequest::default()
            .with_min_bytes(1)
            .with_max_bytes(1 << 20)
            .with_topics(vec![
                FetchTopic::default()
                    .with_topic(name())
                    .with_partitions(vec![partition]),
            ])
    };
    for transport in ["epoll", "io_uring"] {
        let line = format!("transport = \"{transport}\"\n");
        let tables = format!("max_connections = {CONNECTIONS}\n");
        let mut kafka = Kafka::start_by(&line, "", &tables);
        let served = format!("served by {transport}");
        assert!(kafka.server.log().contains(&served), "{served}");
        let address: std::net::SocketAddr = kafka.address.parse().unwrap();
        let mut client = Connection::open(address).unwrap();
        client.call(9, &MetadataRequest::default()).unwrap();
        kafka.kcat(&["-L", "-t", "orders"], "");

        let sizes = [10, 40_000, 200_000, 70_000, 1, 150_000, 33_000, 5];
        let requests: Vec<_> = (0..48)
            .map(|at| produce(&vec![b'a' + at as u8 % 26; sizes[at % sizes.len()]]))
            .collect();
        let answers = client.call_all(9, &requests).unwrap();
        for (at, answer) in answers.iter().enumerate() {
            let part = &answer.responses[0].partition_responses[0];
            assert_eq!((part.error_code, part.base_offset), (0, at as i64));
        }
        let requests: Vec<_> = (0..48).map(fetch).collect();
        let answers = client.call_all(11, &requests).unwrap();
        for (at, answer) in answers.iter().enumerate() {
            let records = answer.responses[0].partitions[0].records.as_ref().unwrap();
            let header = taffrail::wire::record_batch::parse_header(records).unwrap();
            assert_eq!(header.base_offset, at as i64);
            let value = vec![b'a' + at as u8 % 26; sizes[at % sizes.len()]];
            assert!(records.windows(value.len()).any(|bytes| bytes == value));
        }

        // Peers that stop in the middle of a request, and one that takes no answers.
        let mut idle = Vec::new();
        for at in 0..4 {
            let mut part = Connection::open(address).unwrap();
            let message = part.message(9, &produce(&[7; 200_000])).unwrap();
            part.stream()
                .write_all(&message[..1 + 40_000 * at])
                .unwrap();
            idle.push(part);
        }
        let mut deaf = Connection::open(address).unwrap();
        deaf.stream().set_nonblocking(true).unwrap();
        let message = deaf.message(11, &fetch(2)).unwrap();
        let mut sent = 0;
        while sent < 100_000 && deaf.stream().write_all(&message).is_ok() {
            sent += message.len();
        }
        wait_until("it is seen that nobody takes them", || {
            client.call(11, &fetch(0)).unwrap();
            kafka.server.stats().kafka.unwrap().connections == 6
        });
        // What nobody takes is not in the way of others: with one connection's share they go on.
        for _ in 0..200 {
            client.call(11, &fetch(0)).unwrap();
        }
        let stats = kafka.server.stats().kafka.unwrap();
        assert_eq!(stats.connections, 6, "{transport}: {:?}", stats.closed);
        // Two of them go.
        idle.truncate(2);
        wait_until("their ends are seen", || {
            kafka.server.stats().kafka.unwrap().connections == 4
        });
        let mut more: Vec<_> = (4..CONNECTIONS + 3)
            .map(|_| Connection::open(address).unwrap())
            .collect();
        let answered = more
            .iter_mut()
            .filter_map(|c| c.call(9, &MetadataRequest::default()).ok())
            .count();
        assert_eq!(answered, CONNECTIONS - 4, "{transport}");
        client.call(9, &MetadataRequest::default()).unwrap();

        kafka.server.stop();
        let mut left = Vec::new();
        assert!(matches!(
            client.stream().read_to_end(&mut left),
            Ok(0) | Err(_)
        ));
    }
}

/// Whoever takes more of a thread than the quota allows is told to wait, by every kind of request, and not read
/// meanwhile.
#[test]
fn a_quota_bounds_the_time_that_requests_take() {
    use kafka_protocol::messages::{
        FetchRequest, GroupId, HeartbeatRequest, ListGroupsRequest, MetadataRequest,
    };
    let kafka =
        Kafka::start("[[kafka.quota]]\nclient_id = \"taffrail-test\"\nrequest_percentage = 0.01\n");
    kafka.kcat(&["-P", "-t", "orders"], "first\n");
    let mut connection = Connection::open(kafka.address.parse().unwrap()).unwrap();
    // Where the machine stood still some time is free again, so one request may not be enough.
    let mut throttled = |what: &str, call: &mut dyn FnMut(&mut Connection) -> i32| {
        for _ in 0..100 {
            let begun = std::time::Instant::now();
            let ms = call(&mut connection);
            if ms > 0 {
                // At least: the next request is not read before.
                let next = MetadataRequest::default().with_topics(Some(Vec::new()));
                connection.call(9, &next).unwrap();
                assert!(begun.elapsed().as_millis() >= ms as u128, "{what}");
                return;
            }
        }
        panic!("{what} is not throttled");
    };
    throttled("Metadata", &mut |c| {
        c.call(12, &MetadataRequest::default())
            .unwrap()
            .throttle_time_ms
    });
    // Answered later, by the coordinator and by a shard.
    throttled("ListGroups", &mut |c| {
        c.call(4, &ListGroupsRequest::default())
            .unwrap()
            .throttle_time_ms
    });
    throttled("Heartbeat", &mut |c| {
        let group = GroupId(StrBytes::from_static_str("nobody"));
        let beat = HeartbeatRequest::default().with_group_id(group);
        c.call(4, &beat).unwrap().throttle_time_ms
    });
    let mut stored = 1;
    throttled("Produce", &mut |c| {
        let mut bytes = vec![0; 200];
        let mut writer = BatchWriter::new(&mut bytes, 0);
        writer.push(0, None, Some(b"value")).unwrap();
        let len = writer.finish(0);
        let data = PartitionProduceData::default()
            .with_records(Some(bytes::Bytes::copy_from_slice(&bytes[..len])));
        let topic = TopicProduceData::default()
            .with_name(TopicName(StrBytes::from_static_str("orders")))
            .with_partition_data(vec![data]);
        let produce = ProduceRequest::default()
            .with_acks(-1)
            .with_timeout_ms(30_000)
            .with_topic_data(vec![topic]);
        let answer = c.call(9, &produce).unwrap();
        assert_eq!(answer.responses[0].partition_responses[0].error_code, 0);
        stored += 1;
        answer.throttle_time_ms
    });
    throttled("Fetch", &mut |c| {
        let fetch = FetchRequest::default()
            .with_max_wait_ms(1)
            .with_min_bytes(1)
            .with_max_bytes(1 << 20);
        c.call(12, &fetch).unwrap().throttle_time_ms
    });
    // Others are not bounded by it, and what was throttled is done.
    let all = kafka.kcat(&["-C", "-t", "orders", "-e", "-q", "-o", "beginning"], "");
    assert_eq!(all.lines().count(), stored);
    assert_eq!(kafka.server.stats().imbalances(), Vec::<String>::new());
}

#[test]
fn what_was_acknowledged_is_there_after_a_kill() {
    let mut kafka = Kafka::start("");
    let input: String = (0..500).map(|i| format!("{i}\n")).collect();
    kafka.kcat(
        &["-P", "-t", "kept", "-X", "enable.idempotence=true"],
        &input,
    );
    kafka.kcat(
        &[
            "-G",
            "a-group",
            "-X",
            "auto.offset.reset=earliest",
            "-c",
            "200",
            "-q",
            "kept",
        ],
        "",
    );
    kafka.server.kill();
    kafka.server.restart();
    let output = kafka.kcat(&["-C", "-t", "kept", "-e", "-q", "-o", "beginning"], "");
    assert_eq!(output, input);
    let rest = kafka.kcat(&["-G", "a-group", "-c", "300", "-q", "kept"], "");
    let expected: String = (200..500).map(|i| format!("{i}\n")).collect();
    assert_eq!(rest, expected, "the group goes on where it committed");
    kafka.server.stop();
    kafka.server.restart();
    wait_until("the topic after a clean restart", || {
        kafka
            .kcat(&["-L"], "")
            .contains("topic \"kept\" with 1 partitions")
    });
}

#[test]
fn compacted_topics_keep_the_newest_of_each_key_and_so_do_committed_offsets() {
    let mut kafka = Kafka::start_with(
        "segment_size = \"4MiB\"\nprepared_segments = 1\n",
        "[[topic]]\nname = \"state\"\nsettings = { \"cleanup.policy\" = \"compact\", \"min.cleanable.dirty.ratio\" = 0.1 }\n\
         [[topic]]\nname = \"events\"\n",
    );
    let line = |key: u32, n: u32| format!("k{key}:{n} {}\n", "x".repeat(1000));
    let fill = |kafka: &Kafka, from: u32| {
        let input: String = (from..from + 5000).map(|n| line(n % 50, n)).collect();
        kafka.kcat(
            &["-P", "-t", "state", "-K:", "-X", "batch.size=65536"],
            &input,
        );
    };
    let commits = |kafka: &Kafka| -> usize {
        let topics = kafka.server.client().topics().unwrap();
        let offsets = topics
            .iter()
            .find(|t| t.name == "__consumer_offsets")
            .unwrap();
        (0..offsets.partitions.len() as u32)
            .map(|partition| {
                kafka
                    .server
                    .values("__consumer_offsets", partition, 0)
                    .len()
            })
            .sum()
    };
    let consume = |kafka: &Kafka, count: &str| {
        let args = [
            "-G",
            "group",
            "-X",
            "auto.offset.reset=earliest",
            "-c",
            count,
            "-q",
        ];
        kafka.kcat(&[&args[..], &["events"]].concat(), "")
    };
    let input: String = (0..100).map(|n| format!("{n}\n")).collect();
    kafka.kcat(&["-P", "-t", "events"], &input);
    for _ in 0..5 {
        assert_eq!(consume(&kafka, "10").lines().count(), 10);
    }
    let before = commits(&kafka);
    assert!(before >= 5, "{before} commits");
    for round in 0..3 {
        fill(&kafka, round * 5000);
    }
    // The commits were in the first segment, and so is what came of them.
    wait_until("old records are compacted away", || {
        let stats = kafka.server.stats();
        stats
            .shards
            .iter()
            .map(|s| s.records_compacted)
            .sum::<u64>()
            > 5000
            && commits(&kafka) < before
    });
    let read = |kafka: &Kafka| -> Vec<(String, u32)> {
        let args = ["-C", "-t", "state", "-e", "-q", "-K:", "-o", "beginning"];
        let text = kafka.kcat(&args, "");
        let parts = text.lines().map(|line| line.split_once(':').unwrap());
        parts
            .map(|(key, value)| {
                let number = value.split(' ').next().unwrap();
                (key.to_owned(), number.parse().unwrap())
            })
            .collect()
    };
    let newest = |kafka: &Kafka| -> std::collections::BTreeMap<String, u32> {
        let all = read(kafka);
        assert!(all.len() < 12_000, "{} records", all.len());
        // In the order they were produced in, and the newest of each key at the end.
        assert!(all.is_sorted_by(|a, b| a.1 < b.1));
        all.into_iter().collect()
    };
    let expected: std::collections::BTreeMap<String, u32> = (0..50)
        .map(|key| (format!("k{key}"), 14_950 + key))
        .collect();
    assert_eq!(newest(&kafka), expected);
    let stats = kafka.server.stats();
    assert!(
        stats
            .shards
            .iter()
            .any(|s| s.merges > 0 && s.write_amplification() > Some(1.0))
    );
    assert_eq!(stats.imbalances(), Vec::<String>::new());
    kafka.server.kill();
    kafka.server.restart();
    assert_eq!(newest(&kafka), expected);
    // The group goes on where it was.
    let next = consume(&kafka, "10");
    assert!(next.starts_with("50\n"), "{next}");
    kafka.server.stop();
    support::run(
        env!("CARGO_BIN_EXE_taffrail"),
        &["verify", kafka.server.data().to_str().unwrap()],
    );
}
