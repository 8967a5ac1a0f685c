//! Produce: record batches for partitions.
//!
//! Source: Kafka's ProduceRequest.json, ProduceResponse.json. A request can name many partitions and
//! hold many megabytes, so that it is checked in one walk over its bytes and then walked again by the
//! broker: [`ProduceRequest`] allocates nothing.

use std::borrow::Cow;

use super::{DecodeError, ErrorCode, Reader, Records, message};

/// A request that was found well-formed; its partitions are read from the bytes as they are walked.
#[derive(Debug, Clone, Copy)]
pub struct ProduceRequest<'a> {
    /// Null outside transactions.
    pub transactional_id: Option<&'a str>,
    /// 0 for no answer, 1 for the leader, −1 for all.
    pub acks: i16,
    /// Milliseconds that the client waits.
    pub timeout_ms: i32,
    topics: usize,
    partitions: usize,
    reader: Reader<'a>,
}

/// The record batches for one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProducePartition<'a> {
    /// Number of the topic in the request, from 0: partitions of one topic follow each other.
    pub topic_at: usize,
    /// The topic's name.
    pub topic: &'a str,
    /// The partition's number.
    pub index: i32,
    /// One record batch or more, unchecked; `None` for null.
    pub records: Option<&'a [u8]>,
}

/// The fewest bytes of a partition: its number, the records' length, tagged fields.
fn partition_min(flexible: bool) -> usize {
    if flexible { 4 + 1 + 1 } else { 4 + 4 }
}

/// The fewest bytes of a topic: its name, a count, tagged fields.
fn topic_min(flexible: bool) -> usize {
    if flexible { 1 + 1 + 1 } else { 2 + 4 }
}

impl<'a> ProduceRequest<'a> {
    /// Reads the request and checks all of its lengths and counts. All versions have the same fields.
    pub fn decode(reader: &mut Reader<'a>, _version: i16) -> Result<Self, DecodeError> {
        let transactional_id = reader.nullable_string()?;
        let acks = reader.int16()?;
        let timeout_ms = reader.int32()?;
        let topics = reader.count(topic_min(reader.is_flexible()))?;
        let request = Self {
            transactional_id,
            acks,
            timeout_ms,
            topics,
            partitions: 0,
            reader: *reader,
        };
        let mut walk = request.partitions();
        let mut partitions = 0;
        while walk.step()?.is_some() {
            partitions += 1;
        }
        *reader = walk.reader;
        reader.tagged_fields()?;
        Ok(Self {
            partitions,
            ..request
        })
    }

    /// How many topics there are, repetitions and topics without partitions included.
    pub fn topic_count(&self) -> usize {
        self.topics
    }

    /// How many partitions there are, repetitions included.
    pub fn partition_count(&self) -> usize {
        self.partitions
    }

    /// The partitions, in order.
    pub fn partitions(&self) -> ProducePartitions<'a> {
        ProducePartitions {
            reader: self.reader,
            topics_left: self.topics,
            topics_begun: 0,
            topic: "",
            partitions_left: 0,
        }
    }
}

/// Walks the partitions of a [`ProduceRequest`].
#[derive(Debug, Clone)]
pub struct ProducePartitions<'a> {
    reader: Reader<'a>,
    topics_left: usize,
    topics_begun: usize,
    topic: &'a str,
    partitions_left: usize,
}

impl<'a> ProducePartitions<'a> {
    fn step(&mut self) -> Result<Option<ProducePartition<'a>>, DecodeError> {
        let reader = &mut self.reader;
        while self.partitions_left == 0 {
            if self.topics_left == 0 {
                return Ok(None);
            }
            self.topics_left -= 1;
            self.topics_begun += 1;
            self.topic = reader.string()?;
            self.partitions_left = reader.count(partition_min(reader.is_flexible()))?;
            if self.partitions_left == 0 {
                reader.tagged_fields()?;
            }
        }
        let index = reader.int32()?;
        let records = reader.nullable_bytes()?;
        reader.tagged_fields()?;
        self.partitions_left -= 1;
        if self.partitions_left == 0 {
            reader.tagged_fields()?;
        }
        Ok(Some(ProducePartition {
            topic_at: self.topics_begun - 1,
            topic: self.topic,
            index,
            records,
        }))
    }
}

impl<'a> Iterator for ProducePartitions<'a> {
    type Item = ProducePartition<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        // `decode` has walked the same bytes without an error.
        self.step().ok().flatten()
    }
}

message! {
    /// The request as a client writes it, or a test.
    pub struct ProduceRequestParts<'a> {
        /// Null outside transactions.
        transactional_id: Option<&'a str>,
        /// 0 for no answer, 1 for the leader, −1 for all.
        acks: i16,
        /// Milliseconds that the client waits.
        timeout_ms: i32,
        /// Records by topic.
        topic_data: Vec<TopicProduceData<'a>>,
    }

    /// Records for one topic.
    pub struct TopicProduceData<'a> {
        /// Its name.
        name: Cow<'a, str>,
        /// Records by partition.
        partition_data: Vec<PartitionProduceData<'a>>,
    }

    /// Records for one partition.
    pub struct PartitionProduceData<'a> {
        /// Its number.
        index: i32,
        /// Record batches.
        records: Records<'a>,
    }

    /// The answer.
    pub struct ProduceResponse<'a> {
        /// Results by topic.
        responses: Vec<TopicProduceResponse<'a>>,
        /// Milliseconds for which the client is throttled.
        throttle_time_ms: i32 [1..],
    }

    /// Results for one topic.
    pub struct TopicProduceResponse<'a> {
        /// Its name.
        name: Cow<'a, str>,
        /// Results by partition.
        partition_responses: Vec<PartitionProduceResponse<'a>>,
    }

    /// The result for one partition.
    pub struct PartitionProduceResponse<'a> {
        /// Its number.
        index: i32,
        /// The error.
        error_code: ErrorCode,
        /// The first record's offset; −1 with an error.
        base_offset: i64 [0..; -1],
        /// The broker's time in Unix milliseconds where the topic is stamped with it, otherwise −1.
        log_append_time_ms: i64 [2..; -1],
        /// The partition's first offset.
        log_start_offset: i64 [5..; -1],
        /// Records that caused the error.
        record_errors: Vec<BatchIndexAndErrorMessage<'a>> [8..],
        /// What the error says.
        error_message: Option<Cow<'a, str>> [8..],
    }

    /// A record that caused an error.
    pub struct BatchIndexAndErrorMessage<'a> {
        /// Its place in the batch.
        batch_index: i32,
        /// Why.
        batch_index_error_message: Option<Cow<'a, str>>,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::kafka::oracle::check_message;
    use crate::wire::kafka::{ApiKey, Writer, oracle};
    use kafka_protocol::messages::ProduceRequest as Theirs;

    fn parts() -> ProduceRequestParts<'static> {
        let partition = |index, records| PartitionProduceData { index, records };
        ProduceRequestParts {
            transactional_id: Some("tx"),
            acks: -1,
            timeout_ms: 30_000,
            topic_data: vec![
                TopicProduceData {
                    name: "first".into(),
                    partition_data: vec![
                        partition(3, Records::Bytes(b"batches")),
                        partition(4, Records::Bytes(b"")),
                    ],
                },
                TopicProduceData::default(),
                TopicProduceData {
                    name: "second".into(),
                    partition_data: vec![partition(0, Records::Null)],
                },
            ],
        }
    }

    #[test]
    fn agrees_with_the_oracle() {
        let range = ApiKey::Produce.range().unwrap();
        for version in range.min..=range.max {
            let walk = |reader: &mut Reader<'_>| {
                let request = ProduceRequest::decode(reader, version)?;
                let walked: Vec<_> = request.partitions().collect();
                assert_eq!(walked.len(), request.partition_count());
                assert_eq!(request.topic_count(), 3);
                assert_eq!(
                    walked,
                    [
                        (0, "first", 3, Some(&b"batches"[..])),
                        (0, "first", 4, Some(b"")),
                        (2, "second", 0, None)
                    ]
                    .map(|(topic_at, topic, index, records)| {
                        ProducePartition {
                            topic_at,
                            topic,
                            index,
                            records,
                        }
                    })
                );
                Ok(format!(
                    "transactional_id: {:?}, acks: {}, timeout_ms: {}",
                    request.transactional_id, request.acks, request.timeout_ms
                ))
            };
            oracle::check::<Theirs>(ApiKey::Produce, version, &parts(), walk);
        }
        check_message!(Produce, ProduceResponse, |version| ProduceResponse {
            responses: vec![TopicProduceResponse {
                name: "first".into(),
                partition_responses: vec![
                    PartitionProduceResponse {
                        index: 3,
                        error_code: ErrorCode::InvalidRecord,
                        base_offset: 1 << 40,
                        log_append_time_ms: 1_700_000_000_000,
                        log_start_offset: if version >= 5 { 17 } else { -1 },
                        record_errors: if version >= 8 {
                            vec![BatchIndexAndErrorMessage {
                                batch_index: 2,
                                batch_index_error_message: Some("no key".into()),
                            }]
                        } else {
                            Vec::new()
                        },
                        error_message: (version >= 8).then(|| "bad".into()),
                    },
                    PartitionProduceResponse::default(),
                ],
            }],
            throttle_time_ms: 250,
        });
    }

    #[test]
    fn a_twelve_byte_body_cannot_claim_two_thousand_million_topics() {
        for version in [3, 11] {
            let mut writer = Writer::new(version >= 9);
            writer.nullable_string(None);
            writer.int16(1);
            writer.int32(1000);
            writer.nullable_count(Some(0x7fff_fffe));
            let bytes = writer.into_bytes();
            let mut reader = Reader::new(&bytes, version >= 9);
            assert!(matches!(
                ProduceRequest::decode(&mut reader, version),
                Err(DecodeError::Count { .. })
            ));
        }
    }
}
