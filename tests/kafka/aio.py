"""aiokafka against a running server: one line `ok CASE` or `not ok CASE: why` each."""

import asyncio
import sys
import time

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from common import PATIENCE, case, run, unique

BOOTSTRAP = sys.argv[1]


def asynchronous(function):
    def call():
        asyncio.run(asyncio.wait_for(function(), 2 * PATIENCE))
    call.__name__ = function.__name__
    return call


async def create(partitions=1):
    name = unique()
    admin = AIOKafkaAdminClient(bootstrap_servers=BOOTSTRAP)
    await admin.start()
    answer = await admin.create_topics([NewTopic(name, partitions, 1)])
    await admin.close()
    assert all(error[1] == 0 for error in answer.topic_errors), answer
    return name


async def produce(topic, values, **config):
    producer = AIOKafkaProducer(bootstrap_servers=BOOTSTRAP, **config)
    await producer.start()
    futures = [await producer.send(topic, value) for value in values]
    metadata = await asyncio.gather(*futures)
    await producer.stop()
    return metadata


async def consume(topic, count, **config):
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=BOOTSTRAP, auto_offset_reset="earliest", **config)
    await consumer.start()
    got = []
    while len(got) < count:
        got.append(await asyncio.wait_for(consumer.getone(), PATIENCE))
    return consumer, got


@case
@asynchronous
async def produce_and_consume_in_order():
    topic = await create()
    values = [b"%d" % i for i in range(5000)]
    metadata = await produce(topic, values)
    assert [m.offset for m in metadata] == list(range(len(values)))
    consumer, got = await consume(topic, len(values))
    await consumer.stop()
    assert [m.value for m in got] == values


@case
@asynchronous
async def every_codec():
    topic = await create()
    values = []
    for codec in [None, "gzip", "snappy", "lz4", "zstd"]:
        mine = [b"%s %d " % (str(codec).encode(), i) + b"x" * 200 for i in range(300)]
        await produce(topic, mine, compression_type=codec, linger_ms=50)
        values += mine
    consumer, got = await consume(topic, len(values))
    await consumer.stop()
    assert [m.value for m in got] == values


@case
@asynchronous
async def idempotent_producer():
    topic = await create()
    values = [b"%d" % i for i in range(2000)]
    await produce(topic, values, enable_idempotence=True)
    consumer, got = await consume(topic, len(values))
    await consumer.stop()
    assert [m.value for m in got] == values


# This client's default is acks=1: it has its answer before the message is on disk, and asks at once.
@case
@asynchronous
async def seek_by_time():
    topic = await create()
    await produce(topic, [b"before"])
    await asyncio.sleep(0.05)
    moment = int(time.time() * 1000)
    await produce(topic, [b"after"])
    partition = TopicPartition(topic, 0)
    consumer = AIOKafkaConsumer(bootstrap_servers=BOOTSTRAP)
    await consumer.start()
    consumer.assign([partition])
    found = (await consumer.offsets_for_times({partition: moment}))[partition]
    assert found.offset == 1, found
    consumer.seek(partition, found.offset)
    assert (await asyncio.wait_for(consumer.getone(), PATIENCE)).value == b"after"
    await consumer.stop()


@case
@asynchronous
async def a_group_rebalances_and_remembers():
    topic, group = await create(4), unique()
    await produce(topic, [b"%d" % i for i in range(400)])
    config = {"group_id": group, "session_timeout_ms": 10_000, "heartbeat_interval_ms": 500}
    members = []
    seen = set()
    end = time.time() + PATIENCE
    while len(seen) < 400 or len(members) < 2 or [len(m.assignment()) for m in members] != [2, 2]:
        assert time.time() < end, (len(seen), [len(m.assignment()) for m in members])
        if len(members) < 2:
            member = AIOKafkaConsumer(topic, bootstrap_servers=BOOTSTRAP, auto_offset_reset="earliest", **config)
            await member.start()
            members.append(member)
        for member in members:
            for messages in (await member.getmany(timeout_ms=100)).values():
                seen.update(m.value for m in messages)
    for member in members:
        await member.commit()
        await member.stop()
    await produce(topic, [b"after"])
    consumer, got = await consume(topic, 1, **config)
    await consumer.stop()
    assert got[0].value == b"after", "committed offsets were forgotten"


run()
