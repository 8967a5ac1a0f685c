//! Fetch: record batches of partitions.
//!
//! Source: Kafka's FetchRequest.json, FetchResponse.json; KIP-227 for sessions, KIP-516 for topic ids,
//! KIP-903 for the replica's state. An answer's records are usually [`Records::Gap`]: the frame made of
//! it then says between which of its bytes they are to be sent, so that they are never copied here.

use std::borrow::Cow;

use super::{ErrorCode, Records, Uuid, message};

message! {
    /// Asks for records. From version 15 on a follower's id is a tagged field, which is skipped.
    pub struct FetchRequest<'a> {
        /// −1 for consumers.
        replica_id: i32 [..=14; -1],
        /// Milliseconds to wait for `min_bytes`.
        max_wait_ms: i32,
        /// Bytes to wait for.
        min_bytes: i32,
        /// The most bytes of all partitions, beside a first batch that is larger.
        max_bytes: i32 [3..; i32::MAX],
        /// 0 read uncommitted, 1 read committed.
        isolation_level: i8 [4..],
        /// The session, 0 for none.
        session_id: i32 [7..],
        /// −1 for no session, 0 to begin one.
        session_epoch: i32 [7..; -1],
        /// The partitions.
        topics: Vec<FetchTopic<'a>>,
        /// Partitions to drop from the session.
        forgotten_topics_data: Vec<ForgottenTopic<'a>> [7..],
        /// The consumer's rack.
        rack_id: &'a str [11..],
    }

    /// A topic's partitions.
    pub struct FetchTopic<'a> {
        /// Its name.
        topic: &'a str [..=12],
        /// Its id.
        topic_id: Uuid [13..],
        /// Its partitions.
        partitions: Vec<FetchPartition>,
    }

    /// Where to read in a partition.
    pub struct FetchPartition {
        /// Its number.
        partition: i32,
        /// The leader epoch that the client knows, or −1.
        current_leader_epoch: i32 [9..; -1],
        /// The first offset wanted.
        fetch_offset: i64,
        /// The epoch of the last record fetched, or −1.
        last_fetched_epoch: i32 [12..; -1],
        /// A follower's first offset, otherwise −1.
        log_start_offset: i64 [5..; -1],
        /// The most bytes, beside a first batch that is larger.
        partition_max_bytes: i32,
    }

    /// Partitions to drop from the session.
    pub struct ForgottenTopic<'a> {
        /// The topic's name.
        topic: &'a str [..=12],
        /// Its id.
        topic_id: Uuid [13..],
        /// Its partitions.
        partitions: Vec<i32>,
    }

    /// The answer.
    pub struct FetchResponse<'a> {
        /// Milliseconds for which the client is throttled.
        throttle_time_ms: i32,
        /// An error of the session.
        error_code: ErrorCode [7..],
        /// The session; 0 declines one.
        session_id: i32 [7..],
        /// Records by topic.
        responses: Vec<FetchableTopicResponse<'a>>,
    }

    /// Records of one topic.
    pub struct FetchableTopicResponse<'a> {
        /// Its name.
        topic: Cow<'a, str> [..=12],
        /// Its id.
        topic_id: Uuid [13..],
        /// Records by partition.
        partitions: Vec<PartitionData<'a>>,
    }

    /// Records of one partition.
    pub struct PartitionData<'a> {
        /// Its number.
        partition_index: i32,
        /// The error.
        error_code: ErrorCode,
        /// The offset behind the last record that consumers see; −1 with an error.
        high_watermark: i64 [0..; -1],
        /// The offset behind the last record outside open transactions.
        last_stable_offset: i64 [4..; -1],
        /// The first offset.
        log_start_offset: i64 [5..; -1],
        /// Aborted transactions; null for read uncommitted.
        aborted_transactions: Option<Vec<AbortedTransaction>> [4..],
        /// A broker to read from instead, or −1.
        preferred_read_replica: i32 [11..; -1],
        /// Record batches; the first may begin before the offset asked for.
        records: Records<'a>,
    }

    /// A transaction whose records are to be skipped.
    pub struct AbortedTransaction {
        /// Its producer.
        producer_id: i64,
        /// Its first offset.
        first_offset: i64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::kafka::header::{
        ApiKey, Segment, begin_response, decode_response, finish_frame,
    };
    use crate::wire::kafka::oracle::check_message;

    fn name(version: i16, name: &'static str) -> &'static str {
        if version <= 12 { name } else { "" }
    }

    fn id(version: i16) -> Uuid {
        Uuid([if version <= 12 { 0 } else { 6 }; 16])
    }

    fn response(version: i16, records: [Records<'_>; 3]) -> FetchResponse<'_> {
        let [first, second, third] = records.map(|records| PartitionData {
            partition_index: 5,
            error_code: ErrorCode::OffsetOutOfRange,
            high_watermark: 100,
            last_stable_offset: 99,
            log_start_offset: if version >= 5 { 12 } else { -1 },
            aborted_transactions: Some(vec![AbortedTransaction {
                producer_id: 8,
                first_offset: 9,
            }]),
            preferred_read_replica: if version >= 11 { 2 } else { -1 },
            records,
        });
        let topic = |partitions| FetchableTopicResponse {
            topic: name(version, "first").into(),
            topic_id: id(version),
            partitions,
        };
        FetchResponse {
            throttle_time_ms: 3,
            error_code: if version >= 7 {
                ErrorCode::FetchSessionIdNotFound
            } else {
                ErrorCode::None
            },
            session_id: if version >= 7 { 44 } else { 0 },
            responses: vec![topic(vec![first, second]), topic(vec![third])],
        }
    }

    #[test]
    fn agrees_with_the_oracle() {
        check_message!(Fetch, FetchRequest, |version| FetchRequest {
            replica_id: if version <= 14 { 1 } else { -1 },
            max_wait_ms: 500,
            min_bytes: 1,
            max_bytes: 50 << 20,
            isolation_level: 1,
            session_id: if version >= 7 { 44 } else { 0 },
            session_epoch: if version >= 7 { 3 } else { -1 },
            topics: vec![FetchTopic {
                topic: name(version, "first"),
                topic_id: id(version),
                partitions: vec![FetchPartition {
                    partition: 5,
                    current_leader_epoch: if version >= 9 { 7 } else { -1 },
                    fetch_offset: 1 << 50,
                    last_fetched_epoch: if version >= 12 { 8 } else { -1 },
                    log_start_offset: if version >= 5 { 9 } else { -1 },
                    partition_max_bytes: 1 << 20,
                }],
            }],
            forgotten_topics_data: if version >= 7 {
                vec![ForgottenTopic {
                    topic: name(version, "gone"),
                    topic_id: id(version),
                    partitions: vec![1, 2],
                }]
            } else {
                Vec::new()
            },
            rack_id: if version >= 11 { "r1" } else { "" },
        });
        check_message!(Fetch, FetchResponse, |version| response(
            version,
            [Records::Bytes(b"batch"), Records::Null, Records::Bytes(&[])]
        ));
    }

    #[test]
    fn gaps_filled_with_the_records_are_the_same_answer() {
        let records = [&b"one batch"[..], b"", b"another"];
        for version in 4..=16 {
            let whole = response(version, records.map(Records::Bytes));
            let gaps = response(version, records.map(|records| Records::Gap(records.len())));
            let [whole, gaps] = [whole, gaps].map(|response| {
                let mut writer = begin_response(ApiKey::Fetch, version, 77, Vec::new());
                response.encode(&mut writer, version);
                finish_frame(writer)
            });
            let mut sent = Vec::new();
            for segment in gaps.segments() {
                match segment {
                    Segment::Bytes(range) => sent.extend_from_slice(&gaps.bytes[range]),
                    // The second is empty and has no gap.
                    Segment::Gap(at) => sent.extend_from_slice(records[at * 2]),
                }
            }
            assert_eq!(sent, whole.bytes);
            assert_eq!(gaps.len(), whole.len());
            let (id, mut reader) = decode_response(ApiKey::Fetch, version, &sent[4..]).unwrap();
            let decoded = FetchResponse::decode(&mut reader, version).unwrap();
            assert_eq!(id, 77);
            assert_eq!(decoded, response(version, records.map(Records::Bytes)));
        }
    }
}
