//! How a fetch is read: how much of each partition, in which order.
//!
//! Source: Kafka's protocol guide (Fetch). Invariants: the first partition that has data gives at least one
//! batch, whatever its size, so that a consumer can always go on; beyond that neither a partition's limit
//! nor the request's is exceeded; which partition comes first goes round, so that a busy one cannot starve the
//! others.

use crate::storage::{Outcome, ReadError};

/// Bytes of one answer at most, whatever the client asks for: a multiple of what clients ask for by
/// default (50 MiB), less; what is left comes with its next fetch.
pub const MAX_ANSWER: usize = 16 << 20;

/// What a partition is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part<P> {
    /// The partition; `None`: it is not there and is not read.
    pub place: Option<P>,
    /// First offset wanted.
    pub offset: i64,
    /// Bytes wanted at most.
    pub max_bytes: usize,
}

/// What was read of a partition.
#[derive(Debug)]
pub struct Read {
    /// Whole record batches.
    pub records: Vec<u8>,
    /// How it went; `None`: not there.
    pub outcome: Option<Result<Outcome, ReadError>>,
}

/// Reads `parts`, the `first`th one first, at most `max_bytes` in all but for the first batch. `read` appends
/// batches of a place from an offset, at most so many bytes but at least one batch. Gives the results in
/// the order of `parts`, and the bytes.
pub fn read<P: Copy>(
    parts: &[Part<P>],
    first: usize,
    max_bytes: usize,
    mut read: impl FnMut(P, i64, usize, &mut Vec<u8>) -> Result<Outcome, ReadError>,
) -> (Vec<Read>, usize) {
    let mut results: Vec<Read> = parts
        .iter()
        .map(|_| Read {
            records: Vec::new(),
            outcome: None,
        })
        .collect();
    let max_bytes = max_bytes.min(MAX_ANSWER);
    let mut total = 0;
    for step in 0..parts.len() {
        let at = (first + step) % parts.len();
        let (part, result) = (&parts[at], &mut results[at]);
        let Some(place) = part.place else { continue };
        let room = max_bytes.saturating_sub(total);
        let limit = part.max_bytes.min(room);
        let outcome = read(place, part.offset, limit, &mut result.records);
        if result.records.len() > limit && total > 0 {
            // A batch that is larger than what is left: it comes first another time.
            result.records = Vec::new();
        }
        total += result.records.len();
        result.outcome = Some(outcome);
    }
    (results, total)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log whose batches have these lengths, one offset each.
    fn log(batches: &[usize], offset: i64, limit: usize, out: &mut Vec<u8>) -> Outcome {
        let start = out.len();
        let mut next = offset;
        for &len in &batches[offset as usize..] {
            if out.len() > start && out.len() - start + len > limit {
                break;
            }
            out.resize(out.len() + len, 0);
            next += 1;
            if out.len() - start >= limit {
                break;
            }
        }
        Outcome {
            bytes: out.len() - start,
            batches: (next - offset) as u32,
            next_offset: next,
            end: batches.len() as i64,
        }
    }

    fn part(place: usize, offset: i64, max_bytes: usize) -> Part<usize> {
        Part {
            place: Some(place),
            offset,
            max_bytes,
        }
    }

    fn lens(parts: &[Part<usize>], first: usize, max: usize, logs: &[&[usize]]) -> Vec<usize> {
        let (results, total) = read(parts, first, max, |place, offset, limit, out| {
            Ok(log(logs[place], offset, limit, out))
        });
        let lens: Vec<usize> = results.iter().map(|r| r.records.len()).collect();
        assert_eq!(lens.iter().sum::<usize>(), total);
        lens
    }

    #[test]
    fn limits_hold_but_for_the_first_batch() {
        let logs: [&[usize]; 3] = [&[100, 100, 100], &[500], &[40]];
        let all = [part(0, 0, 1000), part(1, 0, 1000), part(2, 0, 1000)];
        assert_eq!(lens(&all, 0, 10_000, &logs), [300, 500, 40]);
        assert_eq!(lens(&all, 0, 240, &logs), [200, 0, 40]);
        assert_eq!(lens(&all, 1, 240, &logs), [0, 500, 0]);
        assert_eq!(lens(&all, 2, 240, &logs), [200, 0, 40]);
        assert_eq!(lens(&all, 0, 0, &logs), [100, 0, 0]);
        let small = [part(0, 1, 1), part(1, 0, 1)];
        assert_eq!(lens(&small, 0, 10_000, &logs), [100, 0]);
        assert_eq!(
            lens(&[part(0, 3, 100), part(1, 0, 1)], 0, 1, &logs),
            [0, 500]
        );
    }

    #[test]
    fn partitions_that_are_not_there_are_left_out() {
        let parts = [
            Part {
                place: None,
                offset: 0,
                max_bytes: 10,
            },
            part(0, 0, 10),
        ];
        let (results, total) = read(&parts, 0, 10, |_, offset, limit, out| {
            Ok(log(&[7], offset, limit, out))
        });
        assert!(results[0].outcome.is_none() && results[1].outcome.is_some());
        assert_eq!(total, 7);
        let (results, total) = read::<usize>(&[], 3, 10, |_, _, _, _| unreachable!());
        assert!(results.is_empty() && total == 0);
    }
}
