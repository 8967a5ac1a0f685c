//! Raw datagrams and lines → one record batch, written once, straight into the log's frame.
//!
//! Invariant: a batch holds the messages of a run in their order, each as one record with its
//! arrival time and no key; a datagram of lines is never split between batches. What
//! [`measure`] promises room for, [`build`] fits into.

use crate::shard::inbound::{Inbound, Kind};
use crate::wire::record_batch::{self, BatchWriter, HEADER_LEN, RAW_RECORD_OVERHEAD_MAX};

/// Batches of raw messages end at about this size: a few thousand small messages, so the header
/// costs nothing, yet small beside a consumer's fetch size and inside a core's L2 cache for the
/// checksum after the copy.
pub(crate) const TARGET_BATCH_BYTES: usize = 256 << 10;

/// Payloads are fetched this many messages ahead of the copy: about what a core keeps under way.
const PREFETCH_AHEAD: usize = 12;

/// A prefix of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Measure {
    /// Datagrams in it.
    pub taken: usize,
    /// Messages in those: what they count as.
    pub messages: u64,
    /// The most bytes that their batch can take; 0 without messages.
    pub bytes: usize,
}

/// Fetches the first two cache lines at `data` into the nearest cache; any address is allowed.
#[inline(always)]
pub(crate) fn prefetch(data: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and never faults, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(data.cast());
        _mm_prefetch::<_MM_HINT_T0>(data.wrapping_add(64).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
}

/// The lines of a payload that are messages: without their `\n` or `\r\n`, the empty ones left out.
fn lines(payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = payload;
    std::iter::from_fn(move || {
        while !rest.is_empty() {
            let (line, after) = match memchr::memchr(b'\n', rest) {
                Some(end) => (&rest[..end], &rest[end + 1..]),
                None => (rest, &rest[rest.len()..]),
            };
            rest = after;
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if !line.is_empty() {
                return Some(line);
            }
        }
        None
    })
}

/// How many messages a datagram counts as, stored or not. Cost: a scan of the payload for lines.
#[inline]
pub(crate) fn messages(item: &Inbound) -> u64 {
    match item.kind() {
        Kind::Raw => 1,
        Kind::Lines => lines(item.payload()).count() as u64,
        Kind::Produce => u64::from(record_batch::claimed_records(item.payload())),
        // Checked by the broker; a compressed batch holds more records than its bytes tell.
        Kind::Batch => record_batch::parse_header(item.payload())
            .map_or(1, |header| header.records_count.max(1) as u64),
    }
}

/// The longest prefix of `run` (raw and lines only, not empty) for a batch of at most `target`
/// bytes; a datagram alone may take up to `limit`. Nothing taken: the first datagram is larger.
#[inline]
pub(crate) fn measure(run: &[Inbound], target: usize, limit: usize) -> Measure {
    let mut measure = Measure {
        taken: 0,
        messages: 0,
        bytes: HEADER_LEN,
    };
    for item in run {
        let messages = messages(item);
        let bytes = measure.bytes + item.len() + messages as usize * RAW_RECORD_OVERHEAD_MAX;
        if bytes > target && (measure.messages > 0 || bytes > limit) {
            break;
        }
        measure = Measure {
            taken: measure.taken + 1,
            messages: measure.messages + messages,
            bytes,
        };
    }
    if measure.messages == 0 {
        measure.bytes = 0;
    }
    measure
}

/// Writes the batch of `run` into `buf`, at least as long as measured; gives its length.
#[inline]
pub(crate) fn build(run: &[Inbound], buf: &mut [u8], base_offset: i64) -> usize {
    for item in &run[..run.len().min(PREFETCH_AHEAD)] {
        prefetch(item.data());
    }
    let base_timestamp = milliseconds(run[0].time_ns());
    let mut batch = BatchWriter::new(buf, base_timestamp);
    for (i, item) in run.iter().enumerate() {
        if let Some(ahead) = run.get(i + PREFETCH_AHEAD) {
            prefetch(ahead.data());
        }
        let timestamp = milliseconds(item.time_ns());
        match item.kind() {
            Kind::Raw => batch
                .push(timestamp, None, Some(item.payload()))
                .expect("measured"),
            Kind::Lines => {
                for line in lines(item.payload()) {
                    batch.push(timestamp, None, Some(line)).expect("measured");
                }
            }
            Kind::Produce | Kind::Batch => unreachable!("a run of raw messages"),
        }
    }
    batch.finish(base_offset)
}

/// A record's timestamp.
#[inline(always)]
fn milliseconds(unix_ns: i64) -> i64 {
    unix_ns.div_euclid(1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::record_batch::{Records, validate};
    use proptest::prelude::*;

    fn inbound(bytes: &[u8], kind: Kind, time_ns: i64) -> Inbound {
        // SAFETY: the tests keep `bytes` until they are done.
        unsafe { Inbound::new(0, bytes.as_ptr(), bytes.len() as u16, time_ns, 0, kind, 0) }
    }

    #[test]
    fn lines_end_in_lf_or_crlf_and_empty_ones_are_none() {
        let of = |text: &'static str| {
            lines(text.as_bytes())
                .map(|line| std::str::from_utf8(line).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(of("a\nb\r\n\r\n\nc"), ["a", "b", "c"]);
        assert_eq!(of("a\n"), ["a"]);
        assert_eq!(of("\r\r\n"), ["\r"]);
        assert_eq!(of("\n\r\n"), Vec::<&str>::new());
        assert_eq!(of(""), Vec::<&str>::new());
    }

    #[test]
    fn a_datagram_larger_than_a_batch_stands_alone_or_is_not_taken() {
        let big = vec![b'x'; 5000];
        let small = [b'y'; 10];
        let items = [
            inbound(&small, Kind::Raw, 0),
            inbound(&big, Kind::Raw, 0),
            inbound(&small, Kind::Raw, 0),
        ];
        assert_eq!(measure(&items, 4096, 8192).taken, 1);
        assert_eq!(measure(&items[1..], 4096, 8192).taken, 1);
        assert_eq!(
            measure(&items[1..], 4096, 4096),
            Measure {
                taken: 0,
                messages: 0,
                bytes: 0
            }
        );
        let empty = inbound(b"\n\n", Kind::Lines, 0);
        assert_eq!(
            measure(&[empty], 4096, 4096),
            Measure {
                taken: 1,
                messages: 0,
                bytes: 0
            }
        );
    }

    proptest! {
        #[test]
        fn what_is_measured_fits_and_is_what_is_read_back(
            payloads in prop::collection::vec(
                (any::<bool>(), prop::collection::vec(prop::sample::select(b"xyz\r\n\n".to_vec()), 0..400),
                 -5_000_000_000i64..5_000_000_000), 1..60),
            target in 200usize..20_000,
        ) {
            let items: Vec<Inbound> = payloads
                .iter()
                .map(|(raw, bytes, time)| {
                    inbound(bytes, if *raw { Kind::Raw } else { Kind::Lines }, 1_700_000_000_000_000_000 + time)
                })
                .collect();
            let mut at = 0;
            let mut offset = 0;
            let mut read = Vec::new();
            while at < items.len() {
                let measure = measure(&items[at..], target, 1 << 20);
                prop_assert!(measure.taken > 0);
                if measure.messages > 0 {
                    let mut buf = vec![0; measure.bytes];
                    let len = build(&items[at..at + measure.taken], &mut buf, offset);
                    let header = validate(&buf[..len]).unwrap();
                    prop_assert_eq!(header.base_offset, offset);
                    prop_assert_eq!(header.records_count as u64, measure.messages);
                    prop_assert_eq!(header.producer_id, -1);
                    for record in Records::new(&buf[..len]).unwrap() {
                        let record = record.unwrap();
                        prop_assert_eq!(record.key, None);
                        read.push((record.timestamp, record.value.unwrap().to_vec()));
                    }
                    offset += measure.messages as i64;
                }
                at += measure.taken;
            }
            let mut expected = Vec::new();
            for (raw, bytes, time) in &payloads {
                let ms = (1_700_000_000_000_000_000 + time) / 1_000_000;
                if *raw {
                    expected.push((ms, bytes.clone()));
                } else {
                    for line in bytes.split(|&b| b == b'\n') {
                        let line = line.strip_suffix(b"\r").unwrap_or(line);
                        if !line.is_empty() {
                            expected.push((ms, line.to_vec()));
                        }
                    }
                }
            }
            prop_assert_eq!(read, expected);
        }
    }
}
