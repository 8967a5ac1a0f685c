//! Messages that commit, fetch and delete offsets.

use std::borrow::Cow;

use crate::wire::kafka::{Code, message};

message! {
    /// Commits offsets; generation −1 without a member id is a client that assigns its partitions itself.
    pub struct OffsetCommitRequest<'a> {
        group_id: Cow<'a, str>,
        generation_id_or_member_epoch: i32,
        member_id: Cow<'a, str>,
        group_instance_id: Option<Cow<'a, str>> [7..],
        retention_time_ms: i64 [2..=4; -1],
        topics: Vec<OffsetCommitTopic<'a>>,
    }

    /// Offsets of a topic.
    pub struct OffsetCommitTopic<'a> {
        name: Cow<'a, str>,
        partitions: Vec<OffsetCommitPartition<'a>>,
    }

    /// The offset of the next message to be read.
    pub struct OffsetCommitPartition<'a> {
        partition_index: i32,
        committed_offset: i64,
        committed_leader_epoch: i32 [6..; -1],
        committed_metadata: Option<Cow<'a, str>>,
    }

    /// How it went for each partition.
    pub struct OffsetCommitResponse<'a> {
        throttle_time_ms: i32 [3..],
        topics: Vec<TopicResults<'a>>,
    }

    /// A topic's results.
    pub struct TopicResults<'a> {
        name: Cow<'a, str>,
        partitions: Vec<PartitionResult>,
    }

    /// A partition's result.
    pub struct PartitionResult {
        partition_index: i32,
        error_code: Code,
    }

    /// Asks for the committed offsets of one group (until version 7) or several; null topics ask for all.
    pub struct OffsetFetchRequest<'a> {
        group_id: Cow<'a, str> [0..=7],
        topics: Option<Vec<TopicPartitions<'a>>> [0..=7; Some(Vec::new())],
        groups: Vec<OffsetFetchGroup<'a>> [8..],
        require_stable: bool [7..],
    }

    /// A group that is asked for.
    pub struct OffsetFetchGroup<'a> {
        group_id: Cow<'a, str>,
        topics: Option<Vec<TopicPartitions<'a>>>,
    }

    /// A topic and partitions of it.
    pub struct TopicPartitions<'a> {
        name: Cow<'a, str>,
        partition_indexes: Vec<i32>,
    }

    /// Committed offsets; −1 where there is none.
    pub struct OffsetFetchResponse<'a> {
        throttle_time_ms: i32 [3..],
        topics: Vec<OffsetFetchTopic<'a>> [0..=7],
        error_code: Code [2..=7],
        groups: Vec<OffsetFetchGroupResult<'a>> [8..],
    }

    /// A topic's committed offsets.
    pub struct OffsetFetchTopic<'a> {
        name: Cow<'a, str>,
        partitions: Vec<OffsetFetchPartition<'a>>,
    }

    /// A partition's committed offset.
    pub struct OffsetFetchPartition<'a> {
        partition_index: i32,
        committed_offset: i64,
        committed_leader_epoch: i32 [5..; -1],
        metadata: Option<Cow<'a, str>>,
        error_code: Code,
    }

    /// A group's committed offsets.
    pub struct OffsetFetchGroupResult<'a> {
        group_id: Cow<'a, str>,
        topics: Vec<OffsetFetchTopic<'a>>,
        error_code: Code,
    }

    /// Deletes committed offsets.
    pub struct OffsetDeleteRequest<'a> {
        group_id: Cow<'a, str>,
        topics: Vec<OffsetDeleteTopic<'a>>,
    }

    /// A topic whose offsets go.
    pub struct OffsetDeleteTopic<'a> {
        name: Cow<'a, str>,
        partitions: Vec<OffsetDeletePartition>,
    }

    /// A partition whose offset goes.
    pub struct OffsetDeletePartition {
        partition_index: i32,
    }

    /// How it went for each partition.
    pub struct OffsetDeleteResponse<'a> {
        error_code: Code,
        throttle_time_ms: i32,
        topics: Vec<TopicResults<'a>>,
    }
}
