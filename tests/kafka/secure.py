"""Clients that log in, and what they are refused: one line `ok CASE` or `not ok CASE: why` each."""

import asyncio
import concurrent.futures
import ssl
import sys
import time

import aiokafka
import kafka
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import (AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewPartitions,
                                   NewTopic, ResourceType)
from kafka.errors import KafkaError as PythonError

from common import PATIENCE, case, run, unique

SASL_TLS, SASL, CA = sys.argv[1].split(",")
PASSWORD = "correct horse"
MECHANISMS = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]


def confluent(user, mechanism="SCRAM-SHA-256", password=PASSWORD, **more):
    return {"bootstrap.servers": SASL_TLS, "security.protocol": "SASL_SSL", "ssl.ca.location": CA,
            "sasl.mechanisms": mechanism, "sasl.username": user, "sasl.password": password,
            **{key if key.endswith("_cb") else key.replace("_", "."): value for key, value in more.items()}}


def python(user, mechanism, password=PASSWORD, **more):
    return dict(bootstrap_servers=SASL_TLS, security_protocol="SASL_SSL", ssl_cafile=CA, sasl_mechanism=mechanism,
                sasl_plain_username=user, sasl_plain_password=password, **more)


def make(*names, partitions=1):
    """Makes topics as the one who may do everything."""
    admin = AdminClient(confluent("root"))
    futures = admin.create_topics([NewTopic(n, partitions, 1) for n in names])
    for future in futures.values():
        future.result(PATIENCE)


def send(config, topic, values):
    """Sends values; gives the error code of each, 0 where it was stored."""
    errors = []
    producer = Producer({"batch.size": 50_000, **config})
    for value in values:
        producer.produce(topic, value, on_delivery=lambda error, _: errors.append(error.code() if error else 0))
    assert producer.flush(PATIENCE) == 0
    return errors


def receive(config, topic, count):
    consumer = Consumer(config)
    consumer.subscribe([topic])
    got, until = [], time.monotonic() + PATIENCE
    while len(got) < count:
        assert time.monotonic() < until, f"{len(got)} of {count} messages came"
        message = consumer.poll(1)
        if message is None:
            continue
        if message.error():
            raise KafkaException(message.error())
        got.append(message.value())
    consumer.commit(asynchronous=False)
    consumer.close()
    return got


def refused(code, call):
    """The call fails with this code."""
    try:
        result = call()
    except KafkaException as error:
        assert error.args[0].code() == code, error
    except PythonError as error:
        assert getattr(error, "errno", None) == code, repr(error)
    else:
        raise AssertionError(f"not refused: {result}")


@case
def confluent_logs_in_and_rebalances():
    for mechanism in MECHANISMS:
        topic = unique()
        make(topic, partitions=2)
        values = [b"%d" % i * 50 for i in range(2000)]
        assert send(confluent("root", mechanism, enable_idempotence=True), topic, values) == [0] * len(values)
        config = confluent("root", mechanism, group_id=topic, auto_offset_reset="earliest")
        assert sorted(receive(config, topic, len(values))) == sorted(values)


@case
def kafka_python_logs_in():
    for mechanism in MECHANISMS:
        topic = unique()
        make(topic)
        producer = kafka.KafkaProducer(**python("root", mechanism))
        values = [b"%d" % i * 50 for i in range(1000)]
        for value in values:
            producer.send(topic, value)
        producer.flush(PATIENCE)
        producer.close()
        consumer = kafka.KafkaConsumer(topic, **python("root", mechanism), group_id=topic,
                                       auto_offset_reset="earliest", consumer_timeout_ms=PATIENCE * 1000)
        got = []
        for message in consumer:
            got.append(message.value)
            if len(got) == len(values):
                break
        consumer.close()
        assert got == values, f"{len(got)} of {len(values)} messages, the first {got[:1]}"


@case
def aiokafka_logs_in():
    async def both(mechanism):
        topic = unique()
        make(topic)
        config = dict(bootstrap_servers=SASL_TLS, security_protocol="SASL_SSL", sasl_mechanism=mechanism,
                      ssl_context=ssl.create_default_context(cafile=CA), sasl_plain_username="root",
                      sasl_plain_password=PASSWORD)
        producer = aiokafka.AIOKafkaProducer(**config)
        await producer.start()
        for i in range(100):
            await producer.send_and_wait(topic, b"%d" % i)
        await producer.stop()
        consumer = aiokafka.AIOKafkaConsumer(topic, **config, auto_offset_reset="earliest")
        await consumer.start()
        got = [(await asyncio.wait_for(consumer.getone(), PATIENCE)).value for _ in range(100)]
        await consumer.stop()
        assert got == [b"%d" % i for i in range(100)]

    for mechanism in MECHANISMS:
        asyncio.run(both(mechanism))


@case
def wrong_passwords_are_refused():
    def one(mechanism, user, password):
        errors = []
        client = AdminClient(confluent(user, mechanism, password, error_cb=errors.append))
        refused(KafkaError._TRANSPORT, lambda: client.list_topics(timeout=2))
        client.poll(1)
        assert KafkaError._AUTHENTICATION in [error.code() for error in errors], errors
        try:
            kafka.KafkaProducer(**python(user, mechanism, password), bootstrap_timeout_ms=2000)
        except PythonError:
            pass
        else:
            raise AssertionError("kafka-python logged in")

    # Side by side: a client tries until its time is over.
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for attempt in [threads.submit(one, mechanism, *login) for mechanism in MECHANISMS
                        for login in [("root", "wrong password"), ("nobody", PASSWORD)]]:
            attempt.result()


@case
def topics_that_are_not_allowed_are_hidden_and_refused():
    make("log-a", "log-b", "log-secret", "other")
    writer, reader = confluent("writer"), confluent("reader")
    denied = KafkaError.TOPIC_AUTHORIZATION_FAILED
    assert send(writer, "log-a", [b"1", b"2"]) == [0, 0]
    assert send(confluent("writer", enable_idempotence=True), "log-b", [b"1"]) == [0]
    for config, topic in [(writer, "other"), (writer, "log-secret"), (writer, "log-new-made-by-asking"),
                          (reader, "log-a"), (reader, "log-b")]:
        assert send(config, topic, [b"x"]) == [denied], topic
    # Rights to write say nothing of reading, and the other way round; what is hidden is not listed.
    assert set(AdminClient(writer).list_topics(timeout=PATIENCE).topics) == {"log-a", "log-b"}
    assert set(AdminClient(reader).list_topics(timeout=PATIENCE).topics) == {"log-a"}
    everything = set(AdminClient(confluent("root")).list_topics(timeout=PATIENCE).topics)
    assert {"log-a", "log-b", "log-secret", "other"} <= everything
    assert "log-new-made-by-asking" not in everything
    listed = AdminClient(reader).list_topics("log-b", timeout=PATIENCE).topics["log-b"]
    assert listed.error.code() == denied and not listed.partitions
    # The topic's name is not taken from the client's cache: the fetch itself is refused.
    consumer = Consumer(confluent("writer", group_id="unused"))
    consumer.assign([TopicPartition("log-a", 0, 0)])
    until, code = time.monotonic() + PATIENCE, None
    while code != denied and time.monotonic() < until:
        message = consumer.poll(1)
        assert message is None or message.error(), "a writer read"
        # The group is not allowed either, which librdkafka reports first.
        code = message and message.error().code()
    consumer.close()
    assert code == denied, code
    # An idempotent producer of someone who may write nowhere gets no id.
    producer = Producer(confluent("reader", enable_idempotence=True))

    def ask():
        producer.produce("log-a", b"x")
        producer.flush(5)
        return producer.list_topics(timeout=PATIENCE)

    refused(KafkaError.CLUSTER_AUTHORIZATION_FAILED, ask)


@case
def groups_that_are_not_allowed_are_refused():
    make("log-a") if "log-a" not in AdminClient(confluent("root")).list_topics(timeout=PATIENCE).topics else None
    send(confluent("root"), "log-a", [b"%d" % i for i in range(20)])
    config = confluent("reader", group_id="readers", auto_offset_reset="earliest")
    assert len(receive(config, "log-a", 20)) == 20
    denied = KafkaError.GROUP_AUTHORIZATION_FAILED
    refused(denied, lambda: receive({**config, "group.id": "others"}, "log-a", 1))
    reader, root = AdminClient(confluent("reader")), AdminClient(confluent("root"))
    # A group of someone else, which the reader does not see.
    receive(confluent("root", group_id="roots", auto_offset_reset="earliest"), "log-a", 20)
    listed = [g.group_id for g in reader.list_consumer_groups().result(PATIENCE).valid]
    assert listed == ["readers"], listed
    listed = [g.group_id for g in root.list_consumer_groups().result(PATIENCE).valid]
    assert {"readers", "roots"} <= set(listed), listed
    described = reader.describe_consumer_groups(["readers", "roots"])
    assert described["readers"].result(PATIENCE).group_id == "readers"
    refused(denied, lambda: described["roots"].result(PATIENCE))
    refused(denied, lambda: reader.delete_consumer_groups(["readers"])["readers"].result(PATIENCE))
    # Committed offsets of topics that one may not describe.
    member = Consumer(confluent("reader", group_id="readers"))
    for partition in member.committed([TopicPartition("log-a", 0), TopicPartition("log-b", 0)], timeout=PATIENCE):
        code = partition.error and partition.error.code()
        expected = None if partition.topic == "log-a" else KafkaError.TOPIC_AUTHORIZATION_FAILED
        assert code == expected, partition
    member.close()


@case
def administration_is_refused():
    admin = AdminClient(confluent("writer"))
    denied = KafkaError.TOPIC_AUTHORIZATION_FAILED
    topic = "log-" + unique()
    refused(denied, lambda: admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(PATIENCE))
    make(topic)
    refused(denied, lambda: admin.delete_topics([topic])[topic].result(PATIENCE))
    refused(denied, lambda: admin.create_partitions([NewPartitions(topic, 2)])[topic].result(PATIENCE))
    records = admin.delete_records([TopicPartition(topic, 0, 0)])
    refused(denied, lambda: [f.result(PATIENCE) for f in records.values()])
    resource = ConfigResource(ResourceType.TOPIC, topic)
    refused(denied, lambda: admin.describe_configs([resource])[resource].result(PATIENCE))
    changed = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[
        ConfigEntry("retention.ms", "1", incremental_operation=AlterConfigOpType.SET)])
    refused(denied, lambda: admin.incremental_alter_configs([changed])[changed].result(PATIENCE))
    broker = ConfigResource(ResourceType.BROKER, "0")
    refused(KafkaError.CLUSTER_AUTHORIZATION_FAILED, lambda: admin.describe_configs([broker])[broker].result(PATIENCE))
    root = AdminClient(confluent("root"))
    assert root.describe_configs([resource])[resource].result(PATIENCE)["retention.ms"].value != "1"
    root.delete_topics([topic])[topic].result(PATIENCE)


@case
def quotas_throttle():
    topic = unique()
    make(topic)
    throttled = []
    config = confluent("writer", throttle_cb=lambda event: throttled.append(event.throttle_time), linger_ms=5)
    values = [b"x" * 10_000 for _ in range(60)]
    assert send(config, topic, values) == [0] * len(values)
    assert any(seconds > 0 for seconds in throttled), "600 KB at 200 KB/s were not throttled"
    throttled.clear()
    config = confluent("writer", group_id=topic, auto_offset_reset="earliest", max_partition_fetch_bytes=100_000,
                       throttle_cb=lambda event: throttled.append(event.throttle_time))
    assert receive(config, topic, len(values)) == values
    assert any(seconds > 0 for seconds in throttled), "a consumer was not throttled"
    # Someone without a quota is not.
    throttled.clear()
    config = confluent("root", throttle_cb=lambda event: throttled.append(event.throttle_time))
    assert send(config, topic, values) == [0] * len(values)
    assert throttled == [], throttled


run()
