//! The crate rdkafka (librdkafka) against a running server: one line `ok CASE` or `not ok CASE: why` each.

use std::collections::BTreeSet;
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_executor::block_on;
use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, NewPartitions, NewTopic, ResourceSpecifier,
    TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Headers, Message, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext};
use rdkafka::{ClientContext, Offset, TopicPartitionList};

type Outcome = Result<(), Box<dyn Error>>;

/// A guard against hangs, not a measurement.
const PATIENCE: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_millis(100);

fn unique() -> String {
    format!("t-{:012x}", rand::random::<u64>() >> 16)
}

fn unix_ms() -> i64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.map_or(0, |time| time.as_millis() as i64)
}

/// What became of messages: partition and offset, in the order of the answers.
#[derive(Clone, Default)]
struct Delivered(Arc<Mutex<Vec<Result<(i32, i64), KafkaError>>>>);

impl ClientContext for Delivered {}

impl ProducerContext for Delivered {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, _: ()) {
        let result = match result {
            Ok(message) => Ok((message.partition(), message.offset())),
            Err((error, _)) => Err(error.clone()),
        };
        self.0.lock().expect("no panic in callbacks").push(result);
    }
}

/// A running server.
struct Server(String);

impl Server {
    fn config(&self, settings: &[(&str, &str)]) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.0);
        for (name, value) in settings {
            config.set(*name, *value);
        }
        config
    }

    fn admin(&self) -> Result<AdminClient<DefaultClientContext>, KafkaError> {
        self.config(&[]).create()
    }

    fn create(&self, partitions: i32, settings: &[(&str, &str)]) -> Result<String, Box<dyn Error>> {
        let name = unique();
        let mut topic = NewTopic::new(&name, partitions, TopicReplication::Fixed(1));
        for (name, value) in settings {
            topic = topic.set(name, value);
        }
        for made in block_on(self.admin()?.create_topics([&topic], &options()))? {
            made.map_err(|(name, error)| format!("{name}: {error}"))?;
        }
        Ok(name)
    }

    /// Produces and waits; gives partitions and offsets.
    fn produce(
        &self,
        topic: &str,
        values: &[String],
        settings: &[(&str, &str)],
    ) -> Result<Vec<(i32, i64)>, Box<dyn Error>> {
        let delivered = Delivered::default();
        let producer: BaseProducer<Delivered> = self
            .config(settings)
            .create_with_context(delivered.clone())?;
        for value in values {
            let record: BaseRecord<'_, (), str> = BaseRecord::to(topic).payload(value);
            producer.send(record).map_err(|(error, _)| error)?;
            producer.poll(Duration::ZERO);
        }
        producer.flush(PATIENCE)?;
        let delivered = std::mem::take(&mut *delivered.0.lock().expect("no panic in callbacks"));
        Ok(delivered.into_iter().collect::<Result<_, _>>()?)
    }

    fn consumer(
        &self,
        group: &str,
        settings: &[(&str, &str)],
    ) -> Result<BaseConsumer, Box<dyn Error>> {
        let mut config = self.config(&[("group.id", group), ("auto.offset.reset", "earliest")]);
        for (name, value) in settings {
            config.set(*name, *value);
        }
        Ok(config.create()?)
    }

    /// Reads as a member of a group.
    fn consume(
        &self,
        topic: &str,
        count: usize,
        group: &str,
    ) -> Result<Vec<OwnedMessage>, Box<dyn Error>> {
        let consumer = self.consumer(group, &[("check.crcs", "true")])?;
        consumer.subscribe(&[topic])?;
        let got = take(&consumer, count)?;
        consumer.commit_consumer_state(CommitMode::Sync)?;
        Ok(got)
    }
}

fn take(consumer: &BaseConsumer, count: usize) -> Result<Vec<OwnedMessage>, Box<dyn Error>> {
    let (mut got, end) = (Vec::new(), Instant::now() + PATIENCE);
    while got.len() < count {
        if Instant::now() > end {
            return Err(format!("{} of {count} messages came", got.len()).into());
        }
        if let Some(message) = consumer.poll(TICK) {
            got.push(message?.detach());
        }
    }
    Ok(got)
}

fn options() -> AdminOptions {
    AdminOptions::new()
        .request_timeout(Some(PATIENCE))
        .operation_timeout(Some(PATIENCE))
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}

fn values(messages: &[OwnedMessage]) -> Vec<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let payloads = messages.iter().map(|m| m.payload().map(text));
    payloads.map(Option::unwrap_or_default).collect()
}

fn produce_and_consume_in_order(server: &Server) -> Outcome {
    let topic = server.create(1, &[])?;
    let sent = numbers(10_000);
    let offsets = server.produce(&topic, &sent, &[])?;
    assert!(offsets.into_iter().eq((0..10_000).map(|n| (0, n))));
    let got = server.consume(&topic, sent.len(), &unique())?;
    assert_eq!(values(&got), sent);
    assert!(got.iter().map(Message::offset).eq(0..10_000));
    Ok(())
}

fn keys_headers_and_nulls(server: &Server) -> Outcome {
    let topic = server.create(1, &[])?;
    let producer: BaseProducer = server.config(&[]).create()?;
    let none: Option<&str> = None;
    let headers = OwnedHeaders::new()
        .insert(Header {
            key: "a",
            value: Some("1"),
        })
        .insert(Header {
            key: "b",
            value: none,
        });
    let gone: BaseRecord<'_, str, ()> = BaseRecord::to(&topic).key("gone").headers(headers);
    producer.send(gone).map_err(|(error, _)| error)?;
    let empty: BaseRecord<'_, (), str> = BaseRecord::to(&topic).payload("");
    producer.send(empty).map_err(|(error, _)| error)?;
    producer.flush(PATIENCE)?;
    let got = server.consume(&topic, 2, &unique())?;
    assert_eq!((got[0].key(), got[0].payload()), (Some(&b"gone"[..]), None));
    let headers = got[0].headers().ok_or("no headers came")?;
    assert_eq!(
        (headers.get(0).key, headers.get(0).value),
        ("a", Some(&b"1"[..]))
    );
    assert_eq!((headers.get(1).key, headers.get(1).value), ("b", None));
    assert_eq!((got[1].key(), got[1].payload()), (None, Some(&b""[..])));
    Ok(())
}

fn every_codec(server: &Server) -> Outcome {
    let topic = server.create(1, &[])?;
    let mut sent = Vec::new();
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        let mine: Vec<String> = (0..500)
            .map(|n| format!("{codec} {n} {}", "x".repeat(200)))
            .collect();
        let settings = [("compression.type", codec), ("linger.ms", "50")];
        server.produce(&topic, &mine, &settings)?;
        sent.extend(mine);
    }
    assert_eq!(
        values(&server.consume(&topic, sent.len(), &unique())?),
        sent
    );
    Ok(())
}

fn idempotent_producer(server: &Server) -> Outcome {
    let topic = server.create(3, &[])?;
    let sent = numbers(5000);
    let offsets = server.produce(&topic, &sent, &[("enable.idempotence", "true")])?;
    assert_eq!(
        offsets.into_iter().collect::<BTreeSet<_>>().len(),
        sent.len()
    );
    let got = server.consume(&topic, sent.len(), &unique())?;
    let got: BTreeSet<String> = values(&got).into_iter().collect();
    assert_eq!(got, sent.into_iter().collect());
    Ok(())
}

fn every_acks(server: &Server) -> Outcome {
    let topic = server.create(1, &[])?;
    for acks in ["0", "1", "all"] {
        server.produce(&topic, &[acks.to_owned()], &[("acks", acks)])?;
    }
    assert_eq!(
        values(&server.consume(&topic, 3, &unique())?),
        ["0", "1", "all"]
    );
    Ok(())
}

fn too_large_a_message_is_refused(server: &Server) -> Outcome {
    let topic = server.create(1, &[("max.message.bytes", "10000")])?;
    let refused = server.produce(&topic, &["x".repeat(20_000)], &[]);
    let error = refused.err().ok_or("it was taken")?;
    let code = error.downcast::<KafkaError>()?.rdkafka_error_code();
    assert_eq!(code, Some(RDKafkaErrorCode::MessageSizeTooLarge));
    Ok(())
}

fn seek_by_time(server: &Server) -> Outcome {
    let topic = server.create(1, &[])?;
    server.produce(&topic, &numbers(100), &[])?;
    std::thread::sleep(Duration::from_millis(50));
    let moment = unix_ms();
    server.produce(&topic, &["later".to_owned()], &[])?;
    let consumer = server.consumer(&unique(), &[])?;
    assert_eq!(consumer.fetch_watermarks(&topic, 0, PATIENCE)?, (0, 101));
    let at = |ms| -> Result<Offset, Box<dyn Error>> {
        let mut asked = TopicPartitionList::new();
        asked.add_partition_offset(&topic, 0, Offset::Offset(ms))?;
        let found = consumer.offsets_for_times(asked, PATIENCE)?;
        Ok(found.elements()[0].offset())
    };
    assert_eq!(at(0)?, Offset::Offset(0));
    assert_eq!(at(moment)?, Offset::Offset(100));
    assert_eq!(at(moment + 3_600_000)?, Offset::End);
    let mut begin = TopicPartitionList::new();
    begin.add_partition_offset(&topic, 0, Offset::Beginning)?;
    consumer.assign(&begin)?;
    assert_eq!(values(&take(&consumer, 1)?), ["0"]);
    consumer.seek(&topic, 0, at(moment)?, PATIENCE)?;
    assert_eq!(values(&take(&consumer, 1)?), ["later"]);
    Ok(())
}

/// Two members share the partitions, one goes, and the other has them all; then the group goes on where it was.
fn a_group_rebalances_and_remembers(server: &Server, assignor: &str) -> Outcome {
    let topic = server.create(4, &[])?;
    let (group, sent) = (unique(), numbers(400));
    server.produce(&topic, &sent, &[])?;
    let seen = Mutex::new(BTreeSet::new());
    let owned = [Mutex::new(0), Mutex::new(0)];
    let stop = [AtomicBool::new(false), AtomicBool::new(false)];
    let member = |number: usize| -> Result<(), String> {
        let settings = [
            ("session.timeout.ms", "10000"),
            ("enable.auto.commit", "false"),
            ("partition.assignment.strategy", assignor),
        ];
        let text = |error: &dyn std::fmt::Display| format!("member {number}: {error}");
        let consumer = server.consumer(&group, &settings).map_err(|e| text(&e))?;
        consumer.subscribe(&[&topic]).map_err(|e| text(&e))?;
        while !stop[number].load(Ordering::Relaxed) {
            let message = consumer.poll(TICK).and_then(Result::ok);
            let count = consumer.assignment().map_err(|e| text(&e))?.count();
            *owned[number].lock().expect("no panic") = count;
            let Some(message) = message else { continue };
            let value = String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned();
            // A commit may fall into a rebalance; then the message comes again.
            if consumer.commit_message(&message, CommitMode::Sync).is_ok() {
                seen.lock().expect("no panic").insert(value);
            }
        }
        *owned[number].lock().expect("no panic") = 0;
        Ok(())
    };
    let wait = |what: &str, so: &dyn Fn() -> bool| -> Result<(), String> {
        let end = Instant::now() + PATIENCE;
        while !so() {
            if Instant::now() > end {
                return Err(format!("waited too long for {what}"));
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    };
    let count = |number: usize| *owned[number].lock().expect("no panic");
    std::thread::scope(|scope| -> Outcome {
        let first = scope.spawn(|| member(0));
        let second = scope.spawn(|| member(1));
        let result = wait(
            "two members with two partitions each and all messages",
            &|| {
                (count(0), count(1)) == (2, 2) && seen.lock().expect("no panic").len() == sent.len()
            },
        );
        stop[1].store(true, Ordering::Relaxed);
        let left = result.and_then(|()| wait("one member with all", &|| count(0) == 4));
        stop[0].store(true, Ordering::Relaxed);
        for member in [first, second] {
            member.join().map_err(|_| "a member panicked")??;
        }
        Ok(left?)
    })?;
    server.produce(&topic, &["after".to_owned()], &[])?;
    let got = server.consume(&topic, 1, &group)?;
    assert_eq!(values(&got), ["after"], "committed offsets were forgotten");
    Ok(())
}

fn cooperative_group(server: &Server) -> Outcome {
    a_group_rebalances_and_remembers(server, "cooperative-sticky")
}

fn eager_group(server: &Server) -> Outcome {
    a_group_rebalances_and_remembers(server, "range")
}

fn topics_are_made_grown_configured_and_deleted(server: &Server) -> Outcome {
    let topic = server.create(2, &[("retention.ms", "3600000")])?;
    let admin = server.admin()?;
    let partitions = || -> Result<usize, KafkaError> {
        let metadata = admin.inner().fetch_metadata(Some(&topic), PATIENCE)?;
        Ok(metadata.topics()[0].partitions().len())
    };
    assert_eq!(partitions()?, 2);
    let again = NewTopic::new(&topic, 1, TopicReplication::Fixed(1));
    let made = block_on(admin.create_topics([&again], &options()))?.remove(0);
    assert_eq!(
        made.err().map(|e| e.1),
        Some(RDKafkaErrorCode::TopicAlreadyExists)
    );
    let more = NewPartitions::new(&topic, 5);
    let grown = block_on(admin.create_partitions([&more], &options()))?.remove(0);
    assert!(grown.is_ok(), "{grown:?}");
    assert_eq!(partitions()?, 5);
    let resource = ResourceSpecifier::Topic(&topic);
    let retention = || -> Result<Option<String>, Box<dyn Error>> {
        let described = block_on(admin.describe_configs([&resource], &options()))?.remove(0)?;
        let entry = described.get("retention.ms").ok_or("no retention.ms")?;
        Ok(entry.value.clone())
    };
    assert_eq!(retention()?.as_deref(), Some("3600000"));
    let change = AlterConfig::new(resource.clone()).set("retention.ms", "7200000");
    let altered = block_on(admin.alter_configs([&change], &options()))?.remove(0);
    assert!(altered.is_ok(), "{altered:?}");
    assert_eq!(retention()?.as_deref(), Some("7200000"));
    let deleted = block_on(admin.delete_topics(&[&topic], &options()))?.remove(0);
    assert!(deleted.is_ok(), "{deleted:?}");
    let left = admin.inner().fetch_metadata(None, PATIENCE)?;
    assert!(left.topics().iter().all(|left| left.name() != topic));
    Ok(())
}

fn records_are_deleted_up_to_an_offset(server: &Server) -> Outcome {
    let topic = server.create(1, &[])?;
    server.produce(&topic, &numbers(20), &[])?;
    let mut before = TopicPartitionList::new();
    before.add_partition_offset(&topic, 0, Offset::Offset(15))?;
    let deleted = block_on(server.admin()?.delete_records(&before, &options()))?;
    assert_eq!(deleted.elements()[0].offset(), Offset::Offset(15));
    let got = server.consume(&topic, 5, &unique())?;
    assert!(got.iter().map(Message::offset).eq(15..20));
    Ok(())
}

fn main() -> ExitCode {
    type Case = (&'static str, fn(&Server) -> Outcome);
    macro_rules! cases {
        ($($name:ident),* $(,)?) => { [$((stringify!($name), $name)),*] };
    }
    let cases: [Case; 11] = cases![
        produce_and_consume_in_order,
        keys_headers_and_nulls,
        every_codec,
        idempotent_producer,
        every_acks,
        too_large_a_message_is_refused,
        seek_by_time,
        cooperative_group,
        eager_group,
        topics_are_made_grown_configured_and_deleted,
        records_are_deleted_up_to_an_offset,
    ];
    let mut args = std::env::args().skip(1);
    let server = Server(args.next().expect("usage: kafka-rust ADDRESS [CASE...]"));
    let wanted: Vec<String> = args.collect();
    let mut failed = false;
    for (name, case) in cases {
        if !wanted.is_empty() && !wanted.iter().any(|wanted| wanted == name) {
            continue;
        }
        // A failed case must not hide the others; what it asserted is printed by the panic.
        let why = match catch_unwind(AssertUnwindSafe(|| case(&server))) {
            Ok(Ok(())) => {
                println!("ok {name}");
                continue;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "panicked".to_owned(),
        };
        println!("not ok {name}: {why}");
        failed = true;
    }
    ExitCode::from(u8::from(failed))
}
