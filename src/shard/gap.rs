//! Gap records: a loss known upstream, told to the readers of the partition where it happened.
//!
//! Invariant: a gap is a control batch of one record (attributes bit 5, which Kafka clients skip):
//! key = version i16 0, type i16 [`GAP_RECORD_TYPE`], both big-endian; value = a JSON object
//! `{"reason","count","from_ms","to_ms","port"}`. It takes one offset and counts as no message.

use std::io::Write;

use crate::shard::inbound::GapReport;
use crate::wire::record_batch::BatchWriter;

/// Type of a control record that reports a gap; Kafka's own are 0 (abort) and 1 (commit) up to 6.
pub const GAP_RECORD_TYPE: i16 = 100;

/// Room that a gap's batch needs at most.
pub(crate) const GAP_BATCH_MAX: usize = 512;

/// A reason is cut here, so that the room suffices whatever it is.
const REASON_MAX: usize = 64;

/// Writes the batch of a gap into `buf` ([`GAP_BATCH_MAX`] bytes); gives its length.
pub(crate) fn build(report: &GapReport, now_ms: i64, buf: &mut [u8], base_offset: i64) -> usize {
    let mut key = [0; 4];
    key[2..].copy_from_slice(&GAP_RECORD_TYPE.to_be_bytes());
    let mut value = [0; 320];
    let room = value.len();
    let mut cursor = &mut value[..];
    let reason = report.reason.get(..REASON_MAX).unwrap_or(report.reason);
    // Names are snake_case words; anything else would break the JSON and is replaced.
    let mut name = [b'_'; REASON_MAX];
    let len = reason.len().min(REASON_MAX);
    for (to, from) in name.iter_mut().zip(reason.bytes()) {
        if from.is_ascii_alphanumeric() {
            *to = from;
        }
    }
    let name = std::str::from_utf8(&name[..len]).unwrap_or("unknown");
    write!(
        cursor,
        r#"{{"reason":"{name}","count":{},"from_ms":{},"to_ms":{},"port":{}}}"#,
        report.count, report.from_ms, report.to_ms, report.port
    )
    .expect("five numbers and a short name fit");
    let used = room - cursor.len();
    let mut batch = BatchWriter::new(buf, now_ms).control();
    batch
        .push(now_ms, Some(&key), Some(&value[..used]))
        .expect("fits GAP_BATCH_MAX");
    batch.finish(base_offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::record_batch;

    fn check(report: &GapReport, reason: &str) {
        let mut buf = [0; GAP_BATCH_MAX];
        let len = build(report, 1_700_000_000_000, &mut buf, 41);
        let header = record_batch::validate(&buf[..len]).unwrap();
        assert_eq!(header.attributes & 0x20, 0x20);
        assert_eq!((header.base_offset, header.records_count), (41, 1));
        let record = record_batch::Records::new(&buf[..len])
            .unwrap()
            .next()
            .unwrap()
            .unwrap();
        assert_eq!(record.key, Some(&[0, 0, 0, 100][..]));
        let value: serde_json::Value = serde_json::from_slice(record.value.unwrap()).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"reason": reason, "count": report.count, "from_ms": report.from_ms,
                "to_ms": report.to_ms, "port": report.port})
        );
    }

    #[test]
    fn is_a_control_batch_with_json() {
        let report = GapReport {
            partition: 3,
            reason: "ring_full",
            count: 17,
            from_ms: 1_700_000_000_000,
            to_ms: 1_700_000_000_250,
            port: 1,
        };
        check(&report, "ring_full");
    }

    #[test]
    fn the_largest_fits_and_a_strange_reason_does_not_break_it() {
        let mut report = GapReport {
            partition: 0,
            reason: "a\"b\\",
            count: u64::MAX,
            from_ms: i64::MIN,
            to_ms: i64::MIN,
            port: u16::MAX,
        };
        check(&report, "a_b_");
        report.reason = "abcdefghijabcdefghijabcdefghijabcdefghijabcdefghijabcdefghijabcdefghij";
        check(
            &report,
            "abcdefghijabcdefghijabcdefghijabcdefghijabcdefghijabcdefghijabcd",
        );
    }
}
