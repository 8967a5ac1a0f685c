//! ListOffsets and OffsetForLeaderEpoch: offsets by time, by place and by epoch.
//!
//! Source: Kafka's ListOffsetsRequest.json, ListOffsetsResponse.json, OffsetForLeaderEpochRequest.json,
//! OffsetForLeaderEpochResponse.json.

use std::borrow::Cow;

use super::{ErrorCode, message};

/// Timestamp that asks for the offset behind the last record.
pub const LATEST: i64 = -1;
/// Timestamp that asks for the first offset.
pub const EARLIEST: i64 = -2;
/// Timestamp that asks for the record with the largest timestamp (version 7 on).
pub const MAX_TIMESTAMP: i64 = -3;

message! {
    /// Asks for offsets.
    pub struct ListOffsetsRequest<'a> {
        /// −1 for consumers.
        replica_id: i32 [0..; -1],
        /// 0 read uncommitted, 1 read committed.
        isolation_level: i8 [2..],
        /// The partitions.
        topics: Vec<ListOffsetsTopic<'a>>,
    }

    /// A topic's partitions.
    pub struct ListOffsetsTopic<'a> {
        /// Its name.
        name: &'a str,
        /// Its partitions.
        partitions: Vec<ListOffsetsPartition>,
    }

    /// What is asked about a partition.
    pub struct ListOffsetsPartition {
        /// Its number.
        partition_index: i32,
        /// The leader epoch that the client knows, or −1.
        current_leader_epoch: i32 [4..; -1],
        /// Unix milliseconds, [`LATEST`], [`EARLIEST`] or [`MAX_TIMESTAMP`].
        timestamp: i64,
    }

    /// The answer.
    pub struct ListOffsetsResponse<'a> {
        /// Milliseconds for which the client is throttled.
        throttle_time_ms: i32 [2..],
        /// Offsets by topic.
        topics: Vec<ListOffsetsTopicResponse<'a>>,
    }

    /// Offsets of one topic.
    pub struct ListOffsetsTopicResponse<'a> {
        /// Its name.
        name: Cow<'a, str>,
        /// Offsets by partition.
        partitions: Vec<ListOffsetsPartitionResponse>,
    }

    /// The offset in one partition.
    pub struct ListOffsetsPartitionResponse {
        /// Its number.
        partition_index: i32,
        /// The error.
        error_code: ErrorCode,
        /// The found record's timestamp, −1 for none.
        timestamp: i64 [0..; -1],
        /// The offset, −1 for none.
        offset: i64 [0..; -1],
        /// The record's leader epoch, or −1.
        leader_epoch: i32 [4..; -1],
    }

    /// Asks where leader epochs end.
    pub struct OffsetForLeaderEpochRequest<'a> {
        /// −1 or −2 for consumers.
        replica_id: i32 [3..; -2],
        /// The partitions.
        topics: Vec<OffsetForLeaderTopic<'a>>,
    }

    /// A topic's partitions.
    pub struct OffsetForLeaderTopic<'a> {
        /// Its name.
        topic: &'a str,
        /// Its partitions.
        partitions: Vec<OffsetForLeaderPartition>,
    }

    /// What is asked about a partition.
    pub struct OffsetForLeaderPartition {
        /// Its number.
        partition: i32,
        /// The leader epoch that the client knows, or −1.
        current_leader_epoch: i32 [2..; -1],
        /// The epoch to look up.
        leader_epoch: i32,
    }

    /// The answer.
    pub struct OffsetForLeaderEpochResponse<'a> {
        /// Milliseconds for which the client is throttled.
        throttle_time_ms: i32 [2..],
        /// Offsets by topic.
        topics: Vec<OffsetForLeaderTopicResult<'a>>,
    }

    /// Offsets of one topic.
    pub struct OffsetForLeaderTopicResult<'a> {
        /// Its name.
        topic: Cow<'a, str>,
        /// Offsets by partition.
        partitions: Vec<EpochEndOffset>,
    }

    /// Where an epoch ends in a partition.
    pub struct EpochEndOffset {
        /// The error.
        error_code: ErrorCode,
        /// The partition's number.
        partition: i32,
        /// The largest epoch not above the one asked for, or −1.
        leader_epoch: i32 [1..; -1],
        /// The offset behind its last record, or −1.
        end_offset: i64 [0..; -1],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::kafka::oracle::check_message;

    #[test]
    fn agrees_with_the_oracle() {
        check_message!(ListOffsets, ListOffsetsRequest, |version| {
            ListOffsetsRequest {
                replica_id: -1,
                isolation_level: i8::from(version >= 2),
                topics: vec![ListOffsetsTopic {
                    name: "first",
                    partitions: vec![ListOffsetsPartition {
                        partition_index: 3,
                        current_leader_epoch: if version >= 4 { 5 } else { -1 },
                        timestamp: EARLIEST,
                    }],
                }],
            }
        });
        check_message!(ListOffsets, ListOffsetsResponse, |version| {
            ListOffsetsResponse {
                throttle_time_ms: if version >= 2 { 6 } else { 0 },
                topics: vec![ListOffsetsTopicResponse {
                    name: "first".into(),
                    partitions: vec![
                        ListOffsetsPartitionResponse {
                            partition_index: 3,
                            error_code: ErrorCode::OffsetNotAvailable,
                            timestamp: 1_700_000_000_000,
                            offset: 12,
                            leader_epoch: if version >= 4 { 5 } else { -1 },
                        },
                        ListOffsetsPartitionResponse::default(),
                    ],
                }],
            }
        });
        check_message!(OffsetForLeaderEpoch, OffsetForLeaderEpochRequest, |_| {
            OffsetForLeaderEpochRequest {
                replica_id: -2,
                topics: vec![OffsetForLeaderTopic {
                    topic: "first",
                    partitions: vec![OffsetForLeaderPartition {
                        partition: 1,
                        current_leader_epoch: 2,
                        leader_epoch: 3,
                    }],
                }],
            }
        });
        check_message!(OffsetForLeaderEpoch, OffsetForLeaderEpochResponse, |_| {
            OffsetForLeaderEpochResponse {
                throttle_time_ms: 1,
                topics: vec![OffsetForLeaderTopicResult {
                    topic: "first".into(),
                    partitions: vec![EpochEndOffset {
                        error_code: ErrorCode::FencedLeaderEpoch,
                        partition: 2,
                        leader_epoch: 3,
                        end_offset: 4,
                    }],
                }],
            }
        });
    }
}
