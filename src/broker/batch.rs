//! What a record batch must be to be stored: checked once, when it comes in.
//!
//! Source: Kafka's protocol guide (Produce: one batch of magic 2 a partition from version 3 on) and the
//! checks of its broker. Invariant: a batch that [`admit`] took is whole, has the CRC of its bytes, counts
//! its offsets without gaps, has a codec that Kafka knows and no attribute that a producer may not set;
//! if it is not compressed, its records were walked. The records of a compressed one are stored as they are:
//! whoever reads them finds what their producer made.

use crate::storage::lsm::codec::{GZIP, LZ4, SNAPPY, ZSTD};
use crate::wire::record_batch::{
    self, BatchError, BatchHeader, CODEC_MASK, HEADER_LEN, LOG_APPEND_TIME, Record, Records,
};

/// Attributes: part of a transaction.
const TRANSACTIONAL: i16 = 1 << 4;
/// Attributes: marks for readers.
const CONTROL: i16 = 1 << 5;
/// The first version of Produce whose batches may have codec 4.
pub const ZSTD_SINCE: i16 = 7;

/// What the topic asks of its batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// `max.message.bytes`: bytes of the largest batch.
    pub max_bytes: usize,
    /// `message.timestamp.type` is LogAppendTime.
    pub append_time: bool,
    /// `message.timestamp.before.max.ms` and `…after.max.ms`: how far a record's time may lie from the
    /// broker's; `i64::MAX`: as far as it likes.
    pub before_ms: i64,
    /// See `before_ms`.
    pub after_ms: i64,
    /// `cleanup.policy` names compact: every record needs a key.
    pub keyed: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            max_bytes: usize::MAX,
            append_time: false,
            before_ms: i64::MAX,
            after_ms: i64::MAX,
            keyed: false,
        }
    }
}

/// Why a batch is not stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Damaged on its way.
    #[error("{0}")]
    Corrupt(BatchError),
    /// Not what a producer may send.
    #[error("{0}")]
    Invalid(String),
    /// One record is not what a producer may send.
    #[error("{0}")]
    Record(BatchError, i32),
    /// Records without a key in a topic that is compacted.
    #[error("a compacted topic takes records with keys only: {} have none", .0.len())]
    Keyless(Vec<i32>),
    /// Larger than the topic takes.
    #[error("the record batch has {bytes} bytes, the topic takes {limit} (max.message.bytes)")]
    TooLarge {
        /// Its bytes.
        bytes: usize,
        /// What is taken.
        limit: usize,
    },
    /// A codec that this version of the request does not have, or none has.
    #[error("record batches with codec {0} are not taken in this version of Produce")]
    Codec(i16),
    /// A time outside the topic's bounds.
    #[error(
        "a record's time {time} is too far from the broker's, {now} (message.timestamp.before.max.ms and after.max.ms)"
    )]
    Timestamp {
        /// Unix milliseconds.
        time: i64,
        /// Unix milliseconds.
        now: i64,
        /// Places of the records in the batch, as far as they can be told: it may be compressed.
        records: Vec<i32>,
    },
    /// Transactions are not offered.
    #[error("transactions are not supported")]
    Transactional,
}

impl Refused {
    /// Places in the batch of the records that are at fault, ascending, and what is wrong with each; none where it is
    /// the batch as a whole.
    pub fn records(&self) -> (&[i32], &'static str) {
        match self {
            Refused::Record(_, index) => (std::slice::from_ref(index), "the record is malformed"),
            Refused::Keyless(records) => (records, "the record has no key"),
            Refused::Timestamp { records, .. } => {
                (records, "the record's time is too far from the broker's")
            }
            _ => (&[], ""),
        }
    }
}

/// Checks the records of one partition of a Produce request of `version`, `now` in Unix milliseconds; gives the header that
/// the batch is to have. Where that is not its own, it has to be written into it ([`record_batch::write_header`]): with
/// the broker's time, or without its mark.
///
/// Costs a pass for the CRC and, for plain batches, one over the records.
pub fn admit(records: &[u8], version: i16, rules: &Rules, now: i64) -> Result<Admitted, Refused> {
    if records.is_empty() {
        return Err(Refused::Invalid(
            "a partition of a Produce request has exactly one record batch, not none".to_owned(),
        ));
    }
    let header = record_batch::parse_header(records).map_err(|error| match error {
        BatchError::Magic(_) => Refused::Invalid(error.to_string()),
        error => Refused::Corrupt(error),
    })?;
    if records.len() > header.total_len() {
        return Err(Refused::Invalid(
            "a partition of a Produce request has exactly one record batch, not more".to_owned(),
        ));
    }
    if records.len() > rules.max_bytes {
        return Err(Refused::TooLarge {
            bytes: records.len(),
            limit: rules.max_bytes,
        });
    }
    match header.codec() {
        0 | GZIP | SNAPPY | LZ4 => {}
        ZSTD if version >= ZSTD_SINCE => {}
        codec => return Err(Refused::Codec(codec)),
    }
    if header.attributes & TRANSACTIONAL != 0 {
        return Err(Refused::Transactional);
    }
    if header.attributes & CONTROL != 0 {
        return Err(Refused::Invalid(
            "clients cannot write control batches".to_owned(),
        ));
    }
    if header.attributes & !(CODEC_MASK | LOG_APPEND_TIME) != 0 {
        return Err(Refused::Invalid(
            BatchError::Attributes(header.attributes).to_string(),
        ));
    }
    let header = record_batch::validate(records).map_err(|error| match error {
        BatchError::Crc { .. } | BatchError::Truncated { .. } | BatchError::Length(_) => {
            Refused::Corrupt(error)
        }
        BatchError::Record { index } => Refused::Record(error, index),
        error => Refused::Invalid(error.to_string()),
    })?;
    if header.last_offset_delta != header.records_count - 1 {
        return Err(Refused::Invalid(format!(
            "the record batch counts {} records with last offset delta {}",
            header.records_count, header.last_offset_delta
        )));
    }
    if header.producer_id >= 0 && (header.producer_epoch < 0 || header.base_sequence < 0) {
        return Err(Refused::Invalid(format!(
            "producer {} has epoch {} and sequence {}",
            header.producer_id, header.producer_epoch, header.base_sequence
        )));
    }
    if rules.keyed {
        let keyless = places(records, &header, |record| record.key.is_none());
        if !keyless.is_empty() {
            return Err(Refused::Keyless(keyless));
        }
    }
    let stamped = stamp(records, header, rules, now)?;
    Ok(Admitted {
        changed: stamped != header,
        header: stamped,
    })
}

/// A batch that may be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// The header that it is stored with.
    pub header: BatchHeader,
    /// It came with another one.
    pub changed: bool,
}

/// Places of the records of which something is so; of a compressed batch, whose records are not read, none.
fn places(batch: &[u8], header: &BatchHeader, mut so: impl FnMut(&Record<'_>) -> bool) -> Vec<i32> {
    if header.codec() != 0 {
        return Vec::new();
    }
    // A batch of records that were walked: those in it are its records' number.
    let records = Records::new(batch).into_iter().flatten().flatten();
    let found = (0..).zip(records).filter(|(_, record)| so(record));
    found.map(|(place, _)| place).collect()
}

/// Checks the batch's times, or sets the broker's; gives the header that it is to have.
fn stamp(
    records: &[u8],
    header: BatchHeader,
    rules: &Rules,
    now: i64,
) -> Result<BatchHeader, Refused> {
    let marked = header.attributes & LOG_APPEND_TIME != 0;
    if rules.append_time {
        return Ok(BatchHeader {
            attributes: header.attributes | LOG_APPEND_TIME,
            max_timestamp: now,
            ..header
        });
    }
    if rules.before_ms < i64::MAX || rules.after_ms < i64::MAX {
        let far = |time: i64| {
            let (early, late) = (now.saturating_sub(time), time.saturating_sub(now));
            early > rules.before_ms || late > rules.after_ms
        };
        let mut first = None;
        let records = places(records, &header, |record| {
            let far = far(record.timestamp);
            if far {
                first.get_or_insert(record.timestamp);
            }
            far
        });
        let all = [header.base_timestamp, header.max_timestamp];
        if let Some(time) = first.or(all.into_iter().find(|&time| far(time))) {
            return Err(Refused::Timestamp { time, now, records });
        }
    }
    if marked {
        // The broker's mark on a topic that has the producer's time: as Kafka, without it.
        return Ok(BatchHeader {
            attributes: header.attributes & !LOG_APPEND_TIME,
            ..header
        });
    }
    Ok(header)
}

const _: () = assert!(HEADER_LEN == 61);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::record_batch::BatchWriter;
    use proptest::prelude::*;

    const NOW: i64 = 1_800_000_000_000;

    fn batch(key: Option<&[u8]>) -> Vec<u8> {
        batch_of(&[(key, NOW - 5), (key, NOW - 4)])
    }

    /// Of records with these keys and times, the first one's being the base.
    fn batch_of(records: &[(Option<&[u8]>, i64)]) -> Vec<u8> {
        let mut buf = vec![0; 400];
        let mut writer = BatchWriter::new(&mut buf, records[0].1);
        for &(key, time) in records {
            writer.push(time, key, Some(b"one")).unwrap();
        }
        let len = writer.finish(0);
        buf.truncate(len);
        buf
    }

    fn with(change: impl FnOnce(&mut BatchHeader)) -> Vec<u8> {
        let mut batch = batch(None);
        let mut header = record_batch::parse_header(&batch).unwrap();
        change(&mut header);
        record_batch::write_header(&mut batch, &header);
        batch
    }

    /// The header of a batch that is taken, as it is with the changes that are asked for.
    fn take(batch: &[u8], rules: &Rules) -> Result<BatchHeader, Refused> {
        let Admitted { header, changed } = admit(batch, 9, rules, NOW)?;
        let mut batch = batch.to_vec();
        if changed {
            record_batch::write_header(&mut batch, &header);
        }
        let stored = record_batch::validate(&batch).unwrap();
        assert_eq!(
            BatchHeader { crc: 0, ..stored },
            BatchHeader { crc: 0, ..header }
        );
        assert_eq!(changed, stored.crc != header.crc);
        Ok(header)
    }

    #[test]
    fn every_codec_of_kafka_is_taken_as_it_is() {
        let rules = Rules::default();
        for codec in [GZIP, SNAPPY, LZ4, ZSTD] {
            let batch = with(|h| h.attributes = codec);
            assert_eq!(take(&batch, &rules).unwrap().codec(), codec);
        }
        assert_eq!(
            take(&with(|h| h.attributes = 5), &rules),
            Err(Refused::Codec(5))
        );
        let zstd = with(|h| h.attributes = ZSTD);
        assert_eq!(admit(&zstd, 6, &rules, NOW), Err(Refused::Codec(ZSTD)));
    }

    #[test]
    fn what_a_producer_may_not_send_is_refused() {
        let rules = Rules::default();
        let invalid = |batch: &[u8]| matches!(take(batch, &rules), Err(Refused::Invalid(_)));
        assert!(invalid(&[]));
        assert!(invalid(&[batch(None), batch(None)].concat()));
        assert!(invalid(&with(|h| h.attributes = CONTROL)));
        assert!(invalid(&with(|h| h.attributes = 1 << 6)));
        assert!(invalid(&with(|h| h.last_offset_delta = 7)));
        assert!(invalid(&with(
            |h| (h.attributes, h.last_offset_delta) = (GZIP, 7)
        )));
        assert!(invalid(&with(|h| h.records_count = 3)));
        assert!(invalid(&with(|h| h.producer_id = 4)));
        assert_eq!(
            take(&with(|h| h.attributes = TRANSACTIONAL), &rules),
            Err(Refused::Transactional)
        );
        let mut magic = batch(None);
        magic[16] = 1;
        assert!(invalid(&magic));
        let mut damaged = batch(None);
        *damaged.last_mut().unwrap() ^= 1;
        assert!(matches!(take(&damaged, &rules), Err(Refused::Corrupt(_))));
        let cut = &batch(None)[..70];
        assert!(matches!(take(cut, &rules), Err(Refused::Corrupt(_))));
        let small = Rules {
            max_bytes: 80,
            ..rules
        };
        assert!(matches!(
            take(&batch(None), &small),
            Err(Refused::TooLarge { limit: 80, .. })
        ));
    }

    #[test]
    fn a_compacted_topic_needs_keys() {
        let rules = Rules {
            keyed: true,
            ..Rules::default()
        };
        let none = take(&batch(None), &rules).unwrap_err();
        assert_eq!(none.records().0, [0, 1]);
        assert!(take(&batch(Some(b"k")), &rules).is_ok());
        let mixed = batch_of(&[
            (Some(b"a"), NOW),
            (None, NOW),
            (Some(b"b"), NOW),
            (None, NOW),
        ]);
        assert_eq!(take(&mixed, &rules), Err(Refused::Keyless(vec![1, 3])));
        // What cannot be read is taken.
        let compressed = with(|h| h.attributes = GZIP);
        assert!(take(&compressed, &rules).is_ok());
    }

    #[test]
    fn a_record_that_is_malformed_is_named() {
        let mut batch = batch_of(&[(Some(b"a"), NOW), (Some(b"b"), NOW)]);
        let header = record_batch::parse_header(&batch).unwrap();
        // The second record's key length.
        let at = HEADER_LEN + (batch.len() - HEADER_LEN) / 2 + 4;
        assert_eq!(batch[at], 2);
        batch[at] = 126;
        record_batch::write_header(&mut batch, &header);
        let refused = take(&batch, &Rules::default()).unwrap_err();
        assert_eq!(refused.records().0, [1], "{refused}");
    }

    #[test]
    fn times_are_the_brokers_or_within_the_bounds() {
        let append = Rules {
            append_time: true,
            ..Rules::default()
        };
        let header = take(&batch(None), &append).unwrap();
        assert_eq!(header.append_time(), Some(NOW));
        let marked = with(|h| h.attributes = LOG_APPEND_TIME);
        assert_eq!(
            take(&marked, &Rules::default()).unwrap().append_time(),
            None
        );
        let bounds = Rules {
            before_ms: 10,
            after_ms: 20,
            ..Rules::default()
        };
        assert!(take(&batch(None), &bounds).is_ok());
        for time in [NOW - 11, NOW + 21, i64::MIN, i64::MAX] {
            let batch = with(|h| h.max_timestamp = time);
            assert!(matches!(
                take(&batch, &bounds),
                Err(Refused::Timestamp { .. })
            ));
        }
        let times = [NOW, NOW - 11, NOW + 20, NOW + 21, NOW - 10];
        let records: Vec<_> = times.iter().map(|&time| (None, time)).collect();
        let refused = Refused::Timestamp {
            time: NOW - 11,
            now: NOW,
            records: vec![1, 3],
        };
        assert_eq!(take(&batch_of(&records), &bounds), Err(refused));
        // A header that hides them.
        let mut hidden = batch_of(&records);
        let mut header = record_batch::parse_header(&hidden).unwrap();
        header.max_timestamp = NOW;
        record_batch::write_header(&mut hidden, &header);
        let refused = take(&hidden, &bounds).unwrap_err();
        assert_eq!(refused.records().0, [1, 3]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_taken_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), version in 0i16..12) {
            let _ = admit(&bytes, version, &Rules::default(), NOW);
        }
    }
}
