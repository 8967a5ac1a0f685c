// kafkajs against a running server: one line `ok CASE` or `not ok CASE: why` each.

const { Kafka, logLevel, CompressionTypes } = require('kafkajs');
const assert = require('assert');
const crypto = require('crypto');

const PATIENCE = 60_000; // a guard against hangs, not a measurement
const kafka = new Kafka({ clientId: 'kafkajs-test', brokers: [process.argv[2]], logLevel: logLevel.ERROR });
const unique = () => 't-' + crypto.randomBytes(6).toString('hex');

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

async function produce(topic, values, config = {}, extra = {}) {
  const producer = kafka.producer(config);
  await producer.connect();
  const answer = await producer.send({ topic, messages: values.map((value) => ({ value })), ...extra });
  await producer.disconnect();
  return answer;
}

// Runs a member of a group until `done(got)`; gives what came.
async function consume(topic, groupId, done) {
  const consumer = kafka.consumer({ groupId, sessionTimeout: 10_000 });
  const got = [];
  await consumer.connect();
  await consumer.subscribe({ topics: [topic], fromBeginning: true });
  await new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`${got.length} messages came`)), PATIENCE);
    consumer.run({
      eachMessage: async ({ partition, message }) => {
        got.push({ partition, offset: message.offset, value: message.value && message.value.toString() });
        if (done(got)) {
          clearTimeout(timer);
          resolve();
        }
      },
    }).catch(reject);
  });
  await consumer.disconnect();
  return got;
}

const cases = {
  async produce_and_consume_in_order() {
    const topic = await create();
    const values = Array.from({ length: 2000 }, (_, i) => `${i}`);
    const [answer] = await produce(topic, values);
    assert.strictEqual(answer.errorCode, 0);
    const got = await consume(topic, unique(), (all) => all.length === values.length);
    assert.deepStrictEqual(got.map((m) => m.value), values);
  },

  async gzip() {
    const topic = await create();
    await produce(topic, ['a', 'b'], {}, { compression: CompressionTypes.GZIP });
    const got = await consume(topic, unique(), (all) => all.length === 2);
    assert.deepStrictEqual(got.map((m) => m.value), ['a', 'b']);
  },

  async idempotent_producer() {
    const topic = await create();
    await produce(topic, ['a', 'b', 'c'], { idempotent: true, maxInFlightRequests: 1 });
    const got = await consume(topic, unique(), (all) => all.length === 3);
    assert.deepStrictEqual(got.map((m) => m.value), ['a', 'b', 'c']);
  },

  async a_group_remembers() {
    const topic = await create(3);
    const group = unique();
    await produce(topic, ['1', '2', '3', '4']);
    await consume(topic, group, (all) => all.length === 4);
    await produce(topic, ['after']);
    const got = await consume(topic, group, (all) => all.some((m) => m.value === 'after'));
    assert.ok(got.length <= 5);
    await withAdmin(async (admin) => {
      const { groups } = await admin.listGroups();
      assert.ok(groups.some((g) => g.groupId === group));
      const [offsets] = await admin.fetchOffsets({ groupId: group, topics: [topic] });
      const committed = offsets.partitions.map((p) => Math.max(0, Number(p.offset)));
      assert.strictEqual(committed.reduce((a, b) => a + b, 0), 5);
    });
  },

  async offsets_and_time() {
    const topic = await create();
    await produce(topic, ['before']);
    await new Promise((resolve) => setTimeout(resolve, 50));
    const moment = Date.now();
    await produce(topic, ['after']);
    await withAdmin(async (admin) => {
      const [ends] = await admin.fetchTopicOffsets(topic);
      assert.deepStrictEqual([ends.low, ends.high], ['0', '2']);
      const [found] = await admin.fetchTopicOffsetsByTimestamp(topic, moment);
      assert.strictEqual(found.offset, '1');
    });
  },

  async topics_are_made_and_deleted() {
    const topic = await create(2);
    await withAdmin(async (admin) => {
      assert.ok((await admin.listTopics()).includes(topic));
      const { topics } = await admin.fetchTopicMetadata({ topics: [topic] });
      assert.strictEqual(topics[0].partitions.length, 2);
      await admin.createPartitions({ topicPartitions: [{ topic, count: 4 }] });
      const configs = await admin.describeConfigs({ resources: [{ type: 2, name: topic }], includeSynonyms: false });
      assert.ok(configs.resources[0].configEntries.some((e) => e.configName === 'retention.ms'));
      await admin.deleteTopics({ topics: [topic] });
      assert.ok(!(await admin.listTopics()).includes(topic));
    });
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
