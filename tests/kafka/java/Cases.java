// Kafka's own Java clients against a running server: one line `ok CASE` or `not ok CASE: why` each.

import java.time.Duration;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.UUID;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.Future;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.NewTopic;
import org.apache.kafka.clients.admin.OffsetSpec;
import org.apache.kafka.clients.consumer.ConsumerRecord;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.consumer.OffsetAndTimestamp;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.clients.producer.RecordMetadata;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.errors.TopicExistsException;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.StringSerializer;

public class Cases {
    // A guard against hangs, not a measurement.
    static final Duration PATIENCE = Duration.ofSeconds(60);
    static String address;

    interface Case {
        void run() throws Exception;
    }

    static Map<String, Object> config(Object... pairs) {
        Map<String, Object> config = new HashMap<>();
        config.put("bootstrap.servers", address);
        for (int i = 0; i < pairs.length; i += 2) config.put((String) pairs[i], pairs[i + 1]);
        return config;
    }

    static void check(boolean holds, Object what) {
        if (!holds) throw new IllegalStateException(String.valueOf(what));
    }

    static String unique() {
        return "t-" + UUID.randomUUID();
    }

    static String create(int partitions) throws Exception {
        String topic = unique();
        try (Admin admin = Admin.create(config())) {
            admin.createTopics(List.of(new NewTopic(topic, partitions, (short) 1))).all().get();
        }
        return topic;
    }

    static List<RecordMetadata> produce(String topic, int count, Object... pairs) throws Exception {
        List<Future<RecordMetadata>> sent = new ArrayList<>();
        try (var producer = new KafkaProducer<>(config(pairs), new StringSerializer(), new StringSerializer())) {
            for (int i = 0; i < count; i++) {
                sent.add(producer.send(new ProducerRecord<>(topic, "k" + i, "" + i)));
            }
        }
        List<RecordMetadata> done = new ArrayList<>();
        for (var one : sent) done.add(one.get());
        return done;
    }

    static KafkaConsumer<String, String> consumer(String group, Object... pairs) {
        Map<String, Object> config = config(pairs);
        config.put("group.id", group);
        config.put("auto.offset.reset", "earliest");
        config.put("enable.auto.commit", "false");
        return new KafkaConsumer<>(config, new StringDeserializer(), new StringDeserializer());
    }

    static List<ConsumerRecord<String, String>> poll(KafkaConsumer<String, String> consumer, int count) {
        List<ConsumerRecord<String, String>> got = new ArrayList<>();
        long end = System.nanoTime() + PATIENCE.toNanos();
        while (got.size() < count) {
            check(System.nanoTime() < end, got.size() + " of " + count + " records came");
            consumer.poll(Duration.ofMillis(200)).forEach(got::add);
        }
        return got;
    }

    static void inOrder() throws Exception {
        String topic = create(1);
        // The client's default: idempotent, acks=all.
        List<RecordMetadata> sent = produce(topic, 10_000);
        try (var consumer = consumer(unique())) {
            consumer.subscribe(List.of(topic));
            var got = poll(consumer, sent.size());
            for (int i = 0; i < got.size(); i++) {
                check(got.get(i).offset() == i && sent.get(i).offset() == i, got.get(i));
                check(got.get(i).value().equals("" + i) && got.get(i).key().equals("k" + i), got.get(i));
            }
        }
    }

    static void everyCodec() throws Exception {
        for (String codec : List.of("none", "gzip", "snappy", "lz4", "zstd")) {
            String topic = create(2);
            produce(topic, 1000, "compression.type", codec, "linger.ms", 20);
            try (var consumer = consumer(unique(), "check.crcs", true)) {
                consumer.subscribe(List.of(topic));
                poll(consumer, 1000);
            }
        }
    }

    static void everyAcks() throws Exception {
        String topic = create(1);
        for (String acks : List.of("0", "1", "all")) produce(topic, 100, "acks", acks, "enable.idempotence", false);
    }

    static void groups(String assignor) throws Exception {
        String topic = create(4);
        String group = unique();
        String name = "org.apache.kafka.clients.consumer." + assignor;
        produce(topic, 1000);
        try (var first = consumer(group, "partition.assignment.strategy", name)) {
            first.subscribe(List.of(topic));
            check(poll(first, 1000).size() == 1000, "all of it");
            first.commitSync();
            try (var second = consumer(group, "partition.assignment.strategy", name)) {
                second.subscribe(List.of(topic));
                long end = System.nanoTime() + PATIENCE.toNanos();
                while (first.assignment().size() != 2 || second.assignment().size() != 2) {
                    check(System.nanoTime() < end, first.assignment() + " and " + second.assignment());
                    check(first.poll(Duration.ofMillis(100)).isEmpty(), "seen again");
                    check(second.poll(Duration.ofMillis(100)).isEmpty(), "seen again");
                }
            }
            // The other's leaving may show only now, and what is not committed then comes again.
            produce(topic, 100);
            Set<String> later = new HashSet<>();
            while (later.size() < 100) poll(first, 1).forEach(record -> later.add(record.value()));
        }
    }

    static void seekByTime() throws Exception {
        String topic = create(1);
        TopicPartition partition = new TopicPartition(topic, 0);
        produce(topic, 7);
        // Found by when they arrived: the time has to pass.
        Thread.sleep(50);
        long from = System.currentTimeMillis();
        Thread.sleep(50);
        produce(topic, 3);
        try (var consumer = consumer(unique())) {
            OffsetAndTimestamp found = consumer.offsetsForTimes(Map.of(partition, from)).get(partition);
            check(found != null && found.offset() == 7 && found.timestamp() >= from, found);
            check(consumer.offsetsForTimes(Map.of(partition, from + 3_600_000)).get(partition) == null, "in an hour");
            consumer.assign(List.of(partition));
            consumer.seek(partition, found.offset());
            check(poll(consumer, 3).get(0).value().equals("0"), "the first of the later ones");
        }
    }

    static void createsAndDeletes() throws Exception {
        String topic = create(3);
        try (Admin admin = Admin.create(config())) {
            try {
                admin.createTopics(List.of(new NewTopic(topic, 1, (short) 1))).all().get();
                check(false, "created twice");
            } catch (ExecutionException error) {
                check(error.getCause() instanceof TopicExistsException, error.getCause());
            }
            var described = admin.describeTopics(List.of(topic)).allTopicNames().get().get(topic);
            check(described.partitions().size() == 3, described);
            TopicPartition partition = new TopicPartition(topic, 0);
            long end = admin.listOffsets(Map.of(partition, OffsetSpec.latest())).partitionResult(partition).get().offset();
            check(end == 0, end);
            admin.deleteTopics(Set.of(topic)).all().get();
            check(!admin.listTopics().names().get().contains(topic), "still there");
        }
    }

    public static void main(String[] arguments) {
        address = arguments[0];
        Map<String, Case> cases = new java.util.LinkedHashMap<>();
        cases.put("produce_and_consume_in_order", Cases::inOrder);
        cases.put("every_codec", Cases::everyCodec);
        cases.put("every_acks", Cases::everyAcks);
        cases.put("groups_eager", () -> groups("RangeAssignor"));
        cases.put("groups_cooperative", () -> groups("CooperativeStickyAssignor"));
        cases.put("seek_by_time", Cases::seekByTime);
        cases.put("creates_and_deletes_topics", Cases::createsAndDeletes);
        boolean failed = false;
        for (var one : cases.entrySet()) {
            try {
                one.getValue().run();
                System.out.println("ok " + one.getKey());
            } catch (Throwable error) {
                failed = true;
                System.out.println("not ok " + one.getKey() + ": " + error);
                error.printStackTrace(System.out);
            }
        }
        System.exit(failed ? 1 : 0);
    }
}
