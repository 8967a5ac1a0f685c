//! Produce requests: what they hold, and their answers.
//!
//! Source: the Kafka protocol guide, Produce 3 to 11.

use crate::broker::batch::Refused;
use crate::wire::datagram::ErrorCode;
use crate::wire::kafka::{Api, Code, Malformed, Reader};

/// The longest that a batch waits for its acknowledgement, whatever the client says.
pub const MAX_TIMEOUT_MS: i32 = 60_000;

/// With more records at fault than this, the batch's message alone says why: an answer is then no longer than the
/// records, which take 7 bytes each at least.
const EXPLAINED: usize = 64;

/// The records for one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part<'a> {
    /// Its number.
    pub index: i32,
    /// One record batch, not yet checked; empty for null.
    pub records: &'a [u8],
}

/// A Produce request.
#[derive(Debug, PartialEq, Eq)]
pub struct ProduceRequest<'a> {
    /// It belongs to a transaction.
    pub transactional: bool,
    /// 0, 1 or −1, not yet checked.
    pub acks: i16,
    /// How long the client wants to wait, in milliseconds.
    pub timeout_ms: i32,
    /// The records by topic.
    pub topics: Vec<(&'a str, Vec<Part<'a>>)>,
}

impl<'a> ProduceRequest<'a> {
    /// Reads one. Copies no records.
    pub fn read(body: &mut Reader<'a>) -> Result<Self, Malformed> {
        let transactional = body.nullable_string()?.is_some();
        let acks = body.i16()?;
        let timeout_ms = body.i32()?;
        let topics = body.array(|r| {
            let name = r.string()?;
            let parts = r.array(|r| {
                let index = r.i32()?;
                let records = r.nullable_bytes()?.unwrap_or_default();
                r.end()?;
                Ok(Part { index, records })
            })?;
            r.end()?;
            Ok((name, parts))
        })?;
        body.end()?;
        Ok(Self {
            transactional,
            acks,
            timeout_ms,
            topics,
        })
    }
}

/// What became of the records of one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartResult {
    /// [`Code::None`]: stored as the acknowledgement level says.
    pub code: Code,
    /// Offset of the first record, −1 where it is not known.
    pub base_offset: i64,
    /// The broker's time, −1 where records have their producer's.
    pub append_time: i64,
    /// First offset of the partition.
    pub log_start: i64,
    /// What went wrong, where the code does not say all.
    pub message: Option<Box<str>>,
    /// Places in the batch of the records that are at fault, ascending; none: the batch as a whole.
    pub records: Box<[i32]>,
    /// What is wrong with each of them.
    pub record_message: &'static str,
}

impl PartResult {
    /// Not stored.
    pub fn failed(code: Code, message: Option<String>) -> Self {
        Self {
            code,
            base_offset: -1,
            append_time: -1,
            log_start: -1,
            message: message.map(Into::into),
            records: Box::default(),
            record_message: "",
        }
    }

    /// What the client is told of a failure.
    fn explanation(&self) -> Option<&str> {
        let failed = self.code != Code::None;
        failed.then(|| self.message.as_deref().unwrap_or(self.code.message()))
    }

    /// Not stored, because of the batch itself.
    pub fn refused(reason: &Refused) -> Self {
        let code = match reason {
            Refused::Corrupt(_) => Code::CorruptMessage,
            Refused::Invalid(_) | Refused::Record(..) | Refused::Keyless(_) => Code::InvalidRecord,
            Refused::TooLarge { .. } => Code::MessageTooLarge,
            Refused::Codec(_) => Code::UnsupportedCompressionType,
            Refused::Timestamp { .. } => Code::InvalidTimestamp,
            Refused::Transactional => Code::InvalidTxnState,
        };
        let (records, record_message) = reason.records();
        Self {
            records: records.into(),
            record_message,
            ..Self::failed(code, Some(reason.to_string()))
        }
    }

    /// As a shard says. Every refusal is one that a client either repeats or gives up in the way that it
    /// does with Kafka.
    pub fn of_shard(error: ErrorCode, base_offset: i64, append_time: i64, log_start: i64) -> Self {
        let code = match error {
            // Stored so long ago that its offset is forgotten; clients take it as stored.
            ErrorCode::Duplicate if base_offset < 0 => Code::DuplicateSequenceNumber,
            ErrorCode::None | ErrorCode::Duplicate => {
                return Self {
                    code: Code::None,
                    base_offset,
                    append_time,
                    log_start,
                    message: None,
                    records: Box::default(),
                    record_message: "",
                };
            }
            ErrorCode::UnknownPartition => Code::UnknownTopicOrPartition,
            ErrorCode::InvalidBatch => Code::CorruptMessage,
            ErrorCode::UnsupportedCodec => Code::UnsupportedCompressionType,
            ErrorCode::TooLarge => Code::MessageTooLarge,
            ErrorCode::OutOfOrder => Code::OutOfOrderSequenceNumber,
            ErrorCode::Fenced => Code::InvalidProducerEpoch,
            ErrorCode::StorageFull | ErrorCode::StorageFailed => Code::KafkaStorageError,
            ErrorCode::InvalidAcks => Code::InvalidRequiredAcks,
            // Nothing was stored, and a later try may be: clients repeat on this one.
            ErrorCode::Busy => Code::RequestTimedOut,
        };
        Self::failed(code, Some(error.name().replace('_', " ")))
    }
}

/// What is needed to answer a request whose body is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Version of the request.
    pub version: i16,
    /// Its correlation id.
    pub correlation: i32,
    /// For how long its client is throttled, in milliseconds.
    pub throttle_ms: i32,
    /// Topics and the numbers of their partitions.
    pub topics: Vec<(Box<str>, Vec<i32>)>,
}

/// The answer, with one result for each partition in the order of the request.
pub fn answer(shape: &Shape, results: &[PartResult]) -> Vec<u8> {
    let version = shape.version;
    let mut out = Api::Produce.answer(version, shape.correlation);
    let mut results = results.iter();
    out.array(shape.topics.iter(), |out, (name, parts)| {
        out.string(name);
        out.array(
            parts
                .iter()
                .zip(results.by_ref().take(parts.len()).collect::<Vec<_>>()),
            |out, (index, result)| {
                out.i32(*index);
                out.i16(result.code as i16);
                out.i64(result.base_offset);
                out.i64(result.append_time);
                if version >= 5 {
                    out.i64(result.log_start);
                }
                if version >= 8 {
                    let each = (result.records.len() <= EXPLAINED).then_some(result.record_message);
                    out.array(result.records.iter(), |out, place| {
                        out.i32(*place);
                        out.nullable_string(each);
                        out.end();
                    });
                    out.nullable_string(result.explanation());
                }
                out.end();
            },
        );
        out.end();
    });
    out.i32(shape.throttle_ms);
    out.end();
    out.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::kafka::Writer;

    #[test]
    fn requests_of_both_kinds_are_read() {
        for flexible in [false, true] {
            let mut out = Writer::fields(flexible);
            out.nullable_string(None);
            out.i16(-1);
            out.i32(1500);
            out.count(1);
            out.string("t");
            out.count(2);
            for (index, records) in [(0, Some(&b"abc"[..])), (7, None)] {
                out.i32(index);
                out.nullable_bytes(records);
                out.end();
            }
            out.end();
            out.end();
            let bytes = out.into_fields();
            let request = ProduceRequest::read(&mut Reader::new(&bytes, flexible)).unwrap();
            assert_eq!(
                (request.transactional, request.acks, request.timeout_ms),
                (false, -1, 1500)
            );
            let parts: Vec<_> = request.topics[0]
                .1
                .iter()
                .map(|p| (p.index, p.records))
                .collect();
            assert_eq!(parts, [(0, &b"abc"[..]), (7, &[][..])]);
            for cut in 0..bytes.len() {
                assert!(ProduceRequest::read(&mut Reader::new(&bytes[..cut], flexible)).is_err());
            }
        }
    }

    #[test]
    fn the_records_at_fault_are_named_and_every_failure_is_explained() {
        use bytes::Buf;
        use kafka_protocol::messages::ProduceResponse;
        use kafka_protocol::protocol::Decodable;
        let many: Vec<i32> = (0..100).collect();
        let results = [
            PartResult::refused(&Refused::Keyless(vec![1, 4])),
            PartResult::refused(&Refused::Keyless(many.clone())),
            PartResult::failed(Code::TopicAuthorizationFailed, None),
            PartResult::of_shard(ErrorCode::None, 7, -1, 0),
        ];
        for version in 3..=11 {
            let shape = Shape {
                version,
                correlation: 1,
                throttle_ms: 0,
                topics: vec![("t".into(), vec![0, 1, 2, 3])],
            };
            let answer = answer(&shape, &results);
            let mut rest = &answer[if version >= 9 { 9 } else { 8 }..];
            let read = ProduceResponse::decode(&mut rest, version).unwrap();
            assert!(!rest.has_remaining());
            let parts = &read.responses[0].partition_responses;
            let named = |part: usize| -> Vec<(i32, Option<String>)> {
                let errors = parts[part].record_errors.iter();
                errors
                    .map(|e| {
                        let text = e.batch_index_error_message.as_ref();
                        (e.batch_index, text.map(ToString::to_string))
                    })
                    .collect()
            };
            let said = |part: usize| parts[part].error_message.as_ref().map(ToString::to_string);
            if version < 8 {
                assert!((0..4).all(|part| named(part).is_empty() && said(part).is_none()));
                continue;
            }
            let text = Some("the record has no key".to_owned());
            assert_eq!(named(0), [(1, text.clone()), (4, text)]);
            assert!(said(0).unwrap().contains("2 have none"));
            let indexes: Vec<i32> = named(1).iter().map(|e| e.0).collect();
            assert!(indexes == many && named(1).iter().all(|e| e.1.is_none()));
            assert!(named(2).is_empty() && named(3).is_empty());
            assert_eq!(
                said(2).as_deref(),
                Some(Code::TopicAuthorizationFailed.message())
            );
            assert_eq!(said(3), None);
        }
    }

    #[test]
    fn every_reason_of_a_shard_is_an_error_of_kafka() {
        for reason in ErrorCode::ALL {
            let result = PartResult::of_shard(reason, 5, -1, 0);
            let good = matches!(reason, ErrorCode::None | ErrorCode::Duplicate);
            assert_eq!(result.code == Code::None, good, "{reason:?}");
            assert_eq!(result.base_offset, if good { 5 } else { -1 });
        }
    }
}
