// @confluentinc/kafka-javascript (librdkafka) against a running server: one line `ok CASE` or `not ok CASE: why` each.

const { KafkaJS, AdminClient } = require('@confluentinc/kafka-javascript');
const assert = require('assert');
const crypto = require('crypto');

const PATIENCE = 60_000; // a guard against hangs, not a measurement
const BASE = { 'bootstrap.servers': process.argv[2] };
const kafka = new KafkaJS.Kafka({ kafkaJS: { brokers: [process.argv[2]], logLevel: KafkaJS.logLevel.ERROR } });
const unique = () => 't-' + crypto.randomBytes(6).toString('hex');
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function withAdmin(work) {
  const admin = kafka.admin();
  await admin.connect();
  try {
    return await work(admin);
  } finally {
    await admin.disconnect();
  }
}

async function create(numPartitions = 1) {
  const topic = unique();
  await withAdmin((admin) => admin.createTopics({ topics: [{ topic, numPartitions, replicationFactor: 1 }] }));
  return topic;
}

async function produce(topic, values, config = {}) {
  const producer = kafka.producer(config);
  await producer.connect();
  try {
    return await producer.send({ topic, messages: values.map((value) => ({ value })) });
  } finally {
    await producer.disconnect();
  }
}

async function until(what, so) {
  const end = Date.now() + PATIENCE;
  while (!(await so())) {
    assert.ok(Date.now() < end, `waited too long for ${what}`);
    await sleep(50);
  }
}

// A member of a group; what comes goes to `take`.
async function join(topic, groupId, take, config = {}) {
  const consumer = kafka.consumer({
    'group.id': groupId, 'auto.offset.reset': 'earliest', 'session.timeout.ms': 10_000, ...config,
  });
  await consumer.connect();
  await consumer.subscribe({ topics: [topic] });
  await consumer.run({
    eachMessage: async ({ partition, message }) => {
      take({ partition, offset: message.offset, value: message.value && message.value.toString() });
    },
  });
  return consumer;
}

// Runs a member of a group until `count` messages have come.
async function consume(topic, groupId, count, config = {}) {
  const got = [];
  const consumer = await join(topic, groupId, (message) => got.push(message), config);
  try {
    await until(`${count} messages`, () => got.length >= count);
  } finally {
    await consumer.disconnect();
  }
  return got;
}

async function rebalance(assignor) {
  const topic = await create(4);
  const group = unique();
  const values = Array.from({ length: 400 }, (_, i) => `${i}`);
  await produce(topic, values);
  const seen = new Set();
  const config = { 'partition.assignment.strategy': assignor };
  const member = () => join(topic, group, (message) => seen.add(message.value), config);
  const members = [await member(), await member()];
  const counts = () => members.map((consumer) => consumer.assignment().length);
  try {
    await until('all messages, and two partitions each', () => seen.size === values.length
      && counts().every((count) => count === 2));
    await members.pop().disconnect();
    await until('one member with all', () => counts()[0] === 4);
  } finally {
    await Promise.all(members.map((consumer) => consumer.disconnect()));
  }
  await produce(topic, ['after']);
  const got = await consume(topic, group, 1);
  assert.strictEqual(got[0].value, 'after', 'committed offsets were forgotten');
  await withAdmin(async (admin) => {
    const { groups } = await admin.listGroups();
    assert.ok(groups.some((listed) => listed.groupId === group));
    const [offsets] = await admin.fetchOffsets({ groupId: group, topics: [topic] });
    const committed = offsets.partitions.map((p) => Math.max(0, Number(p.offset)));
    assert.strictEqual(committed.reduce((a, b) => a + b, 0), values.length + 1);
    await admin.deleteGroups([group]);
  });
}

const cases = {
  async produce_and_consume_in_order() {
    const topic = await create();
    const values = Array.from({ length: 5000 }, (_, i) => `${i}`);
    await produce(topic, values);
    const got = await consume(topic, unique(), values.length);
    assert.deepStrictEqual(got.map((m) => m.value), values);
    assert.deepStrictEqual(got.map((m) => m.offset), values);
  },

  async every_codec() {
    const topic = await create();
    const values = [];
    for (const codec of ['none', 'gzip', 'snappy', 'lz4', 'zstd']) {
      const mine = Array.from({ length: 200 }, (_, i) => `${codec} ${i} ${'x'.repeat(200)}`);
      await produce(topic, mine, { 'compression.codec': codec });
      values.push(...mine);
    }
    const got = await consume(topic, unique(), values.length, { 'check.crcs': true });
    assert.deepStrictEqual(got.map((m) => m.value), values);
  },

  async idempotent_producer() {
    const topic = await create();
    const values = Array.from({ length: 1000 }, (_, i) => `${i}`);
    await produce(topic, values, { 'enable.idempotence': true });
    const got = await consume(topic, unique(), values.length);
    assert.deepStrictEqual(got.map((m) => m.value), values);
  },

  async every_acks() {
    const topic = await create();
    for (const acks of [0, 1, -1]) {
      await produce(topic, [`${acks}`], { acks });
    }
    const got = await consume(topic, unique(), 3);
    assert.deepStrictEqual(got.map((m) => m.value), ['0', '1', '-1']);
  },

  eager_group: () => rebalance('range'),

  cooperative_group: () => rebalance('cooperative-sticky'),

  async seek_by_time() {
    const topic = await create();
    await produce(topic, ['before', 'between']);
    await sleep(50);
    const moment = Date.now();
    await produce(topic, ['after']);
    const offset = await withAdmin(async (admin) => {
      const [ends] = await admin.fetchTopicOffsets(topic);
      assert.deepStrictEqual([ends.low, ends.high], ['0', '3']);
      const [found] = await admin.fetchTopicOffsetsByTimestamp(topic, moment);
      return found.offset;
    });
    assert.strictEqual(offset, '2');
    const got = [];
    const consumer = await join(topic, unique(), (message) => got.push(message.value));
    try {
      await until('all messages', () => got.length === 3);
      consumer.seek({ topic, partition: 0, offset });
      await until('the message after the moment', () => got.length === 4);
    } finally {
      await consumer.disconnect();
    }
    assert.deepStrictEqual(got, ['before', 'between', 'after', 'after']);
  },

  async topics_are_made_grown_and_deleted() {
    const topic = await create(2);
    const grow = new Promise((resolve, reject) => {
      const admin = AdminClient.create(BASE);
      admin.createPartitions(topic, 4, PATIENCE, (error) => {
        admin.disconnect();
        if (error) reject(error);
        else resolve();
      });
    });
    await withAdmin(async (admin) => {
      assert.ok((await admin.listTopics()).includes(topic));
      const partitions = async () => (await admin.fetchTopicMetadata({ topics: [topic] }))[0].partitions.length;
      await grow;
      await until('four partitions', async () => (await partitions()) === 4);
      await admin.deleteTopics({ topics: [topic] });
      assert.ok(!(await admin.listTopics()).includes(topic));
    });
  },

  async records_are_deleted_up_to_an_offset() {
    const topic = await create();
    await produce(topic, Array.from({ length: 20 }, (_, i) => `${i}`));
    await withAdmin((admin) => admin.deleteTopicRecords({ topic, partitions: [{ partition: 0, offset: '15' }] }));
    const got = await consume(topic, unique(), 5);
    assert.deepStrictEqual(got.map((m) => m.offset), ['15', '16', '17', '18', '19']);
  },
};

(async () => {
  let failed = 0;
  const wanted = process.argv.slice(3);
  for (const [name, run] of Object.entries(cases)) {
    if (wanted.length > 0 && !wanted.includes(name)) continue;
    try {
      await run();
      console.log(`ok ${name}`);
    } catch (error) {
      failed += 1;
      console.log(`not ok ${name}: ${error}`);
      console.error(error);
    }
  }
  process.exit(failed ? 1 : 0);
})();
