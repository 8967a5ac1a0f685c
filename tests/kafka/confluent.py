"""confluent-kafka (librdkafka) against a running server: one line `ok CASE` or `not ok CASE: why` each."""

import sys
import threading
import time
import uuid

from confluent_kafka import (Consumer, ConsumerGroupTopicPartitions, KafkaError, KafkaException, Producer,
                             TopicPartition)
from confluent_kafka.admin import (AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewPartitions,
                                   NewTopic, OffsetSpec, ResourceType)

from common import PATIENCE, case, run, unique

BOOTSTRAP = sys.argv[1]
BASE = {"bootstrap.servers": BOOTSTRAP}


ADMIN = AdminClient(BASE)


def admin():
    return ADMIN


def create(partitions=1, **config):
    name = unique()
    for future in admin().create_topics([NewTopic(name, partitions, 1, config=config)]).values():
        future.result(PATIENCE)
    return name


def produce(topic, values, key=None, partition=-1, **config):
    """Produces and waits; gives the offsets by value."""
    offsets, errors = {}, []

    def delivered(error, message):
        if error is not None:
            errors.append(error)
        else:
            offsets[message.value()] = (message.partition(), message.offset())

    producer = Producer(BASE | config)
    for value in values:
        producer.produce(topic, value, key=key, partition=partition, on_delivery=delivered)
        producer.poll(0)
    assert producer.flush(PATIENCE) == 0, "messages were not delivered in time"
    assert not errors, errors[0]
    return offsets


def consume(topics, count, group=None, **config):
    consumer = Consumer(BASE | {"group.id": group or unique(), "auto.offset.reset": "earliest"} | config)
    consumer.subscribe(topics)
    got, end = [], time.time() + PATIENCE
    while len(got) < count:
        assert time.time() < end, f"{len(got)} of {count} messages came"
        message = consumer.poll(0.5)
        if message is None:
            continue
        if message.error():
            raise KafkaException(message.error())
        got.append(message)
    return consumer, got


@case
def produce_and_consume_in_order():
    topic = create()
    values = [b"%d" % i for i in range(10_000)]
    offsets = produce(topic, values)
    assert [offsets[v] for v in values] == [(0, i) for i in range(len(values))]
    consumer, got = consume([topic], len(values))
    consumer.close()
    assert [m.value() for m in got] == values
    assert [m.offset() for m in got] == list(range(len(values)))


@case
def keys_headers_and_nulls():
    topic = create()
    producer = Producer(BASE)
    producer.produce(topic, None, key=b"gone", headers=[("a", b"1"), ("b", None)])
    producer.produce(topic, b"", key=None)
    assert producer.flush(PATIENCE) == 0
    consumer, got = consume([topic], 2)
    consumer.close()
    assert (got[0].key(), got[0].value(), got[0].headers()) == (b"gone", None, [("a", b"1"), ("b", None)])
    assert (got[1].key(), got[1].value()) == (None, b"")


@case
def every_codec():
    topic = create()
    values = []
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"]:
        mine = [b"%s %d " % (codec.encode(), i) + b"x" * 200 for i in range(500)]
        produce(topic, mine, **{"compression.type": codec, "linger.ms": 50})
        values += mine
    consumer, got = consume([topic], len(values), **{"check.crcs": True})
    consumer.close()
    assert [m.value() for m in got] == values


@case
def idempotent_producer():
    topic = create(3)
    values = [b"%d" % i for i in range(5000)]
    offsets = produce(topic, values, **{"enable.idempotence": True})
    assert len(offsets) == len(values)
    consumer, got = consume([topic], len(values))
    consumer.close()
    assert sorted(int(m.value()) for m in got) == list(range(5000))


@case
def every_acks():
    topic = create()
    for acks in ["0", "1", "all"]:
        produce(topic, [acks.encode()], acks=acks)
    consumer, got = consume([topic], 3)
    consumer.close()
    assert [m.value() for m in got] == [b"0", b"1", b"all"]


@case
def too_large_a_message_is_refused():
    topic = create(**{"max.message.bytes": "10000"})
    try:
        produce(topic, [b"x" * 20_000])
    except AssertionError as error:
        assert error.args[0].code() == KafkaError.MSG_SIZE_TOO_LARGE, error
    else:
        raise AssertionError("it was taken")


@case
def offsets_and_seek_by_time():
    topic = create()
    producer = Producer(BASE)
    for i in range(100):
        producer.produce(topic, b"%d" % i, timestamp=1_700_000_000_000 + i * 1000)
    assert producer.flush(PATIENCE) == 0
    consumer = Consumer(BASE | {"group.id": unique()})
    assert consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=PATIENCE) == (0, 100)
    start = int(time.time() * 1000)
    produce(topic, [b"later"])
    [found] = consumer.offsets_for_times([TopicPartition(topic, 0, start)], timeout=PATIENCE)
    assert found.offset == 100, found
    [none] = consumer.offsets_for_times([TopicPartition(topic, 0, start + 3_600_000)], timeout=PATIENCE)
    assert none.offset == -1 or none.offset == 101, none
    consumer.assign([found])
    message = consumer.poll(PATIENCE)
    assert message.value() == b"later"
    consumer.close()


@case
def a_group_rebalances_and_remembers():
    topic = create(4)
    group = unique()
    values = [b"%d" % i for i in range(400)]
    produce(topic, values)
    seen, lock, stop, owned = [], threading.Lock(), threading.Event(), {}

    def member(name):
        consumer = Consumer(BASE | {"group.id": group, "auto.offset.reset": "earliest",
                                    "session.timeout.ms": 10_000, "enable.auto.commit": False,
                                    "partition.assignment.strategy": "cooperative-sticky"})
        consumer.subscribe([topic])
        while not stop.is_set():
            message = consumer.poll(0.2)
            owned[name] = len(consumer.assignment())
            if message is not None and not message.error():
                with lock:
                    seen.append(message.value())
                consumer.commit(message, asynchronous=False)
        consumer.close()

    threads = [threading.Thread(target=member, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    end = time.time() + PATIENCE
    while len(set(seen)) < len(values) or sorted(owned.values()) != [2, 2]:
        assert time.time() < end, (len(set(seen)), owned)
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    produce(topic, [b"after"])
    consumer, got = consume([topic], 1, group=group)
    consumer.close()
    assert got[0].value() == b"after", "committed offsets were forgotten"


@case
def static_membership():
    topic = create(2)
    group = unique()
    produce(topic, [b"1", b"2"])
    config = {"group.instance.id": "one", "session.timeout.ms": 30_000}
    consumer, got = consume([topic], 2, group=group, **config)
    consumer.close()
    produce(topic, [b"3"])
    begin = time.time()
    consumer, got = consume([topic], 1, group=group, **config)
    consumer.close()
    assert got[0].value() == b"3" and time.time() - begin < 20


@case
def topics_are_made_described_grown_and_deleted():
    topic = create(2, **{"retention.ms": "3600000"})
    a = admin()
    meta = a.list_topics(topic, timeout=PATIENCE)
    assert len(meta.topics[topic].partitions) == 2 and len(meta.brokers) == 1
    try:
        list(a.create_topics([NewTopic(topic, 1, 1)]).values())[0].result(PATIENCE)
        raise AssertionError("made twice")
    except KafkaException as error:
        assert error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS, error
    list(a.create_partitions([NewPartitions(topic, 5)]).values())[0].result(PATIENCE)
    assert len(a.list_topics(topic, timeout=PATIENCE).topics[topic].partitions) == 5
    resource = ConfigResource(ResourceType.TOPIC, topic)
    config = list(a.describe_configs([resource]).values())[0].result(PATIENCE)
    assert config["retention.ms"].value == "3600000", config["retention.ms"]
    change = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[
        ConfigEntry("retention.ms", "7200000", incremental_operation=AlterConfigOpType.SET)])
    list(a.incremental_alter_configs([change]).values())[0].result(PATIENCE)
    config = list(a.describe_configs([resource]).values())[0].result(PATIENCE)
    assert config["retention.ms"].value == "7200000", config["retention.ms"]
    list(a.delete_topics([topic]).values())[0].result(PATIENCE)
    assert topic not in a.list_topics(timeout=PATIENCE).topics


@case
def settings_of_the_broker_are_shown():
    resource = ConfigResource(ResourceType.BROKER, "0")
    config = admin().describe_configs([resource])[resource].result(PATIENCE)
    assert config["default.replication.factor"].value == "1" and config["max.connections"].is_read_only, config


@case
def records_without_a_key_are_told_from_others():
    topic = create(1, **{"cleanup.policy": "compact"})
    codes = {}
    producer = Producer(BASE | {"linger.ms": 500})
    for number, key in enumerate([b"a", None, b"b", None]):
        producer.produce(topic, b"v", key=key,
                         on_delivery=lambda error, _, number=number: codes.update({number: error and error.code()}))
    # In one batch, as it lingers: flush() would send what is there.
    end = time.monotonic() + PATIENCE
    while len(codes) < 4 and time.monotonic() < end:
        producer.poll(0.1)
    mine, other = KafkaError.INVALID_RECORD, KafkaError._INVALID_DIFFERENT_RECORD
    assert codes == {0: other, 1: mine, 2: other, 3: mine}, codes


@case
def cluster_groups_and_list_offsets_of_the_admin():
    topic = create()
    group = unique()
    produce(topic, [b"1", b"2", b"3"])
    consumer, _ = consume([topic], 3, group=group)
    consumer.commit(asynchronous=False)
    consumer.close()
    a = admin()
    cluster = a.describe_cluster(request_timeout=PATIENCE).result(PATIENCE)
    assert len(cluster.nodes) == 1 and cluster.cluster_id
    groups = a.list_consumer_groups(request_timeout=PATIENCE).result(PATIENCE)
    assert group in [g.group_id for g in groups.valid], groups.errors
    described = list(a.describe_consumer_groups([group], request_timeout=PATIENCE).values())[0].result(PATIENCE)
    assert described.state.name == "EMPTY", described.state
    listed = list(a.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)]).values())[0].result(PATIENCE)
    assert [(p.topic, p.offset) for p in listed.topic_partitions] == [(topic, 3)]
    offsets = a.list_offsets({TopicPartition(topic, 0): OffsetSpec.latest()})
    assert list(offsets.values())[0].result(PATIENCE).offset == 3
    list(a.delete_consumer_groups([group], request_timeout=PATIENCE).values())[0].result(PATIENCE)
    groups = a.list_consumer_groups(request_timeout=PATIENCE).result(PATIENCE)
    assert group not in [g.group_id for g in groups.valid]


@case
def records_are_deleted_up_to_an_offset():
    topic = create()
    produce(topic, [b"%d" % i for i in range(20)])
    deleted = admin().delete_records([TopicPartition(topic, 0, 15)])
    assert list(deleted.values())[0].result(PATIENCE).low_watermark == 15
    consumer, got = consume([topic], 5)
    consumer.close()
    assert [m.offset() for m in got] == list(range(15, 20))


@case
def a_poll_waits_and_is_woken():
    topic = create()
    consumer = Consumer(BASE | {"group.id": unique(), "fetch.wait.max.ms": 20_000})
    consumer.assign([TopicPartition(topic, 0, 0)])
    assert consumer.poll(1.0) is None
    timer = threading.Timer(1.0, lambda: produce(topic, [b"now"]))
    timer.start()
    begin = time.time()
    message = consumer.poll(PATIENCE)
    consumer.close()
    assert message.value() == b"now" and time.time() - begin < 10, "the fetch was not woken"


@case
def unknown_topics_are_made_on_demand():
    topic = unique()
    produce(topic, [b"first"])
    consumer, got = consume([topic], 1)
    consumer.close()
    assert got[0].value() == b"first"


run()
