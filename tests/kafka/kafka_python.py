"""kafka-python against a running server: one line `ok CASE` or `not ok CASE: why` each."""

import sys
import threading
import time

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic

from common import PATIENCE, case, run, unique

BOOTSTRAP = sys.argv[1]


def create(partitions=1):
    name = unique()
    admin = KafkaAdminClient(bootstrap_servers=BOOTSTRAP)
    admin.create_topics([NewTopic(name=name, num_partitions=partitions, replication_factor=1)])
    admin.close()
    return name


def produce(topic, values, **config):
    producer = KafkaProducer(bootstrap_servers=BOOTSTRAP, **config)
    futures = [producer.send(topic, value) for value in values]
    producer.flush(PATIENCE)
    metadata = [future.get(PATIENCE) for future in futures]
    producer.close()
    return metadata


def consume(topic, count, **config):
    consumer = KafkaConsumer(topic, bootstrap_servers=BOOTSTRAP, auto_offset_reset="earliest",
                             consumer_timeout_ms=PATIENCE * 1000, **config)
    got = []
    for message in consumer:
        got.append(message)
        if len(got) == count:
            break
    assert len(got) == count, f"{len(got)} of {count} messages came"
    return consumer, got


@case
def produce_and_consume_in_order():
    topic = create()
    values = [b"%d" % i for i in range(5000)]
    metadata = produce(topic, values)
    assert [m.offset for m in metadata] == list(range(len(values)))
    consumer, got = consume(topic, len(values))
    consumer.close()
    assert [m.value for m in got] == values


@case
def every_codec():
    topic = create()
    values = []
    for codec in [None, "gzip", "snappy", "lz4", "zstd"]:
        mine = [b"%s %d " % (str(codec).encode(), i) + b"x" * 200 for i in range(300)]
        produce(topic, mine, compression_type=codec, linger_ms=50)
        values += mine
    consumer, got = consume(topic, len(values))
    consumer.close()
    assert [m.value for m in got] == values


@case
def idempotent_producer():
    topic = create()
    values = [b"%d" % i for i in range(2000)]
    produce(topic, values, enable_idempotence=True)
    consumer, got = consume(topic, len(values))
    consumer.close()
    assert [m.value for m in got] == values


@case
def seek_by_time():
    topic = create()
    produce(topic, [b"before"])
    time.sleep(0.05)
    moment = int(time.time() * 1000)
    produce(topic, [b"after"])
    partition = TopicPartition(topic, 0)
    consumer = KafkaConsumer(bootstrap_servers=BOOTSTRAP, consumer_timeout_ms=PATIENCE * 1000)
    consumer.assign([partition])
    assert consumer.beginning_offsets([partition]) == {partition: 0}
    assert consumer.end_offsets([partition]) == {partition: 2}
    found = consumer.offsets_for_times({partition: moment})[partition]
    assert found.offset == 1 and found.timestamp >= moment, found
    consumer.seek(partition, found.offset)
    assert next(consumer).value == b"after"
    consumer.close()


@case
def a_group_rebalances_and_remembers():
    topic = create(4)
    group = unique()
    produce(topic, [b"%d" % i for i in range(400)])
    seen, lock, stop, owned = set(), threading.Lock(), threading.Event(), {}

    def member(name):
        consumer = KafkaConsumer(topic, bootstrap_servers=BOOTSTRAP, group_id=group,
                                 auto_offset_reset="earliest", session_timeout_ms=10_000,
                                 heartbeat_interval_ms=500)
        while not stop.is_set():
            for messages in consumer.poll(200).values():
                with lock:
                    seen.update(m.value for m in messages)
            owned[name] = len(consumer.assignment())
        consumer.close()

    threads = [threading.Thread(target=member, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.5)
    end = time.time() + PATIENCE
    while len(seen) < 400 or sorted(owned.values()) != [2, 2]:
        assert time.time() < end, (len(seen), owned)
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    produce(topic, [b"after"])
    consumer, got = consume(topic, 1, group_id=group)
    consumer.close()
    assert got[0].value == b"after", "committed offsets were forgotten"


@case
def topics_and_groups_of_the_admin():
    topic = create(3)
    admin = KafkaAdminClient(bootstrap_servers=BOOTSTRAP)
    assert topic in admin.list_topics()
    [described] = admin.describe_topics([topic])
    assert len(described["partitions"]) == 3, described
    assert admin.describe_cluster()["cluster_id"]
    admin.delete_topics([topic])
    assert topic not in admin.list_topics()
    admin.close()


run()
