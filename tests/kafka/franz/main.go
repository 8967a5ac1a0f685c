// franz-go against a running server: one line `ok CASE` or `not ok CASE: why` each.
package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
)

// A guard against hangs, not a measurement.
const patience = 60 * time.Second

var address = os.Args[1]

func client(ctx context.Context, options ...kgo.Opt) (*kgo.Client, error) {
	return kgo.NewClient(append([]kgo.Opt{kgo.SeedBrokers(address), kgo.WithContext(ctx)}, options...)...)
}

func unique() string {
	bytes := make([]byte, 6)
	_, _ = rand.Read(bytes)
	return "t-" + hex.EncodeToString(bytes)
}

func create(ctx context.Context, partitions int32) (string, error) {
	c, err := client(ctx)
	if err != nil {
		return "", err
	}
	defer c.Close()
	topic := unique()
	answer, err := kadm.NewClient(c).CreateTopic(ctx, partitions, 1, nil, topic)
	return topic, errors.Join(err, answer.Err)
}

// Produces values in order to one partition, or where the keys say; gives the records with their offsets.
func produce(ctx context.Context, topic string, count int, options ...kgo.Opt) ([]*kgo.Record, error) {
	c, err := client(ctx, options...)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	records := make([]*kgo.Record, count)
	for i := range records {
		value := fmt.Appendf(nil, "%d", i)
		records[i] = &kgo.Record{Topic: topic, Key: value, Value: value,
			Headers: []kgo.RecordHeader{{Key: "n", Value: value}}}
	}
	return records, c.ProduceSync(ctx, records...).FirstErr()
}

func consume(ctx context.Context, c *kgo.Client, count int) ([]*kgo.Record, error) {
	var got []*kgo.Record
	for len(got) < count {
		fetches := c.PollFetches(ctx)
		if err := fetches.Err0(); err != nil {
			return got, fmt.Errorf("%d of %d records came: %w", len(got), count, err)
		}
		for _, err := range fetches.Errors() {
			return got, err.Err
		}
		got = append(got, fetches.Records()...)
	}
	return got, nil
}

func inOrder(ctx context.Context) error {
	topic, err := create(ctx, 1)
	if err != nil {
		return err
	}
	// The client's default: idempotent, acks=all, Snappy.
	produced, err := produce(ctx, topic, 10_000)
	if err != nil {
		return err
	}
	c, err := client(ctx, kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		return err
	}
	defer c.Close()
	got, err := consume(ctx, c, len(produced))
	if err != nil {
		return err
	}
	for i, record := range got {
		want := fmt.Sprint(i)
		if record.Offset != int64(i) || produced[i].Offset != int64(i) || string(record.Value) != want ||
			string(record.Key) != want || string(record.Headers[0].Value) != want {
			return fmt.Errorf("record %d is %v at %d", i, record, produced[i].Offset)
		}
	}
	return nil
}

func everyCodec(ctx context.Context) error {
	for _, codec := range []kgo.CompressionCodec{kgo.NoCompression(), kgo.GzipCompression(), kgo.SnappyCompression(),
		kgo.Lz4Compression(), kgo.ZstdCompression()} {
		topic, err := create(ctx, 1)
		if err != nil {
			return err
		}
		if _, err := produce(ctx, topic, 500, kgo.ProducerBatchCompression(codec)); err != nil {
			return err
		}
		c, err := client(ctx, kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
		if err != nil {
			return err
		}
		_, err = consume(ctx, c, 500)
		c.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func everyAcks(ctx context.Context) error {
	topic, err := create(ctx, 1)
	if err != nil {
		return err
	}
	for _, acks := range []kgo.Acks{kgo.NoAck(), kgo.LeaderAck(), kgo.AllISRAcks()} {
		if _, err := produce(ctx, topic, 100, kgo.DisableIdempotentWrite(), kgo.RequiredAcks(acks)); err != nil {
			return err
		}
	}
	return nil
}

// A second member comes and goes; every record is seen, and what was committed is not seen again.
func groupRebalances(ctx context.Context) error {
	topic, err := create(ctx, 4)
	if err != nil {
		return err
	}
	if _, err := produce(ctx, topic, 2_000); err != nil {
		return err
	}
	group := unique()
	join := func() (*kgo.Client, error) {
		return client(ctx, kgo.ConsumerGroup(group), kgo.ConsumeTopics(topic), kgo.DisableAutoCommit(),
			kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	}
	first, err := join()
	if err != nil {
		return err
	}
	got, err := consume(ctx, first, 2_000)
	if err == nil {
		err = first.CommitUncommittedOffsets(ctx)
	}
	if err != nil {
		first.Close()
		return err
	}
	second, err := join()
	if err != nil {
		first.Close()
		return err
	}
	defer second.Close()
	// Both poll, so that the balance can be found again; then the first leaves.
	shared, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for shared.Err() == nil {
			first.PollFetches(shared)
		}
	}()
	c, err := client(ctx)
	if err != nil {
		stop()
		return err
	}
	defer c.Close()
	for {
		described, err := kadm.NewClient(c).DescribeGroups(ctx, group)
		if err != nil {
			stop()
			return err
		}
		if d := described[group]; d.State == "Stable" && len(d.Members) == 2 {
			break
		}
		poll, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		second.PollFetches(poll)
		cancel()
	}
	stop()
	<-done
	first.Close()
	if _, err := produce(ctx, topic, 500); err != nil {
		return err
	}
	rest, err := consume(ctx, second, 500)
	if err != nil {
		return err
	}
	if len(got) != 2_000 || len(rest) != 500 {
		return fmt.Errorf("%d and %d records came", len(got), len(rest))
	}
	return nil
}

func seekByTime(ctx context.Context) error {
	topic, err := create(ctx, 1)
	if err != nil {
		return err
	}
	c, err := client(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	var from int64
	for i := range 10 {
		if i == 7 {
			// Found by when they arrived: the time has to pass.
			time.Sleep(50 * time.Millisecond)
			from = time.Now().UnixMilli()
			time.Sleep(50 * time.Millisecond)
		}
		if err := c.ProduceSync(ctx, &kgo.Record{Topic: topic, Value: []byte{byte(i)}}).FirstErr(); err != nil {
			return err
		}
	}
	reader, err := client(ctx, kgo.ConsumeTopics(topic), kgo.ConsumeStartOffset(kgo.NewOffset().AfterMilli(from)))
	if err != nil {
		return err
	}
	defer reader.Close()
	got, err := consume(ctx, reader, 3)
	if err == nil && (got[0].Offset != 7 || len(got) != 3) {
		err = fmt.Errorf("%d records from offset %d", len(got), got[0].Offset)
	}
	return err
}

func createsAndDeletes(ctx context.Context) error {
	topic, err := create(ctx, 3)
	if err != nil {
		return err
	}
	c, err := client(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	admin := kadm.NewClient(c)
	again, err := admin.CreateTopic(ctx, 1, 1, nil, topic)
	if !errors.Is(errors.Join(err, again.Err), kerr.TopicAlreadyExists) {
		return fmt.Errorf("created twice: %v, %v", err, again.Err)
	}
	listed, err := admin.ListTopics(ctx, topic)
	if err != nil || len(listed[topic].Partitions) != 3 {
		return fmt.Errorf("listed: %v, %w", listed, err)
	}
	if _, err := admin.DeleteTopic(ctx, topic); err != nil {
		return err
	}
	listed, err = admin.ListTopics(ctx)
	if err != nil || listed.Has(topic) {
		return fmt.Errorf("still there: %v, %w", listed.Names(), err)
	}
	return nil
}

func main() {
	failed := false
	for _, c := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"produce_and_consume_in_order", inOrder},
		{"every_codec", everyCodec},
		{"every_acks", everyAcks},
		{"group_rebalances", groupRebalances},
		{"seek_by_time", seekByTime},
		{"creates_and_deletes_topics", createsAndDeletes},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		if err := c.run(ctx); err != nil {
			failed = true
			fmt.Printf("not ok %s: %v\n", c.name, err)
		} else {
			fmt.Printf("ok %s\n", c.name)
		}
		cancel()
	}
	if failed {
		os.Exit(1)
	}
}
