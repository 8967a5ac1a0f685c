//! How a fetch is read: how much of each partition, in which order.
//!
//! Source: Kafka's protocol guide (Fetch). Invariants: the first partition that has data gives at least one
//! batch, whatever its size, so that a consumer can always go on; beyond that neither a partition's limit
//! nor the request's is exceeded; which partition comes first goes round, so that a busy one cannot starve the
//! others.

use crate::broker::cluster::LEADER_EPOCH;
use crate::storage::{Outcome, Piece, Pieces, ReadError};
use crate::wire::kafka::{Api, Code, Malformed, Reader};

/// Bytes of one answer at most, whatever the client asks for: a multiple of what clients ask for by
/// default (50 MiB), less; what is left comes with its next fetch.
pub const MAX_ANSWER: usize = 16 << 20;

/// The longest that a fetch waits for data, whatever the client says.
pub const MAX_WAIT_MS: i32 = 60_000;

/// What is wanted of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Its number.
    pub index: i32,
    /// Leader epoch that the client knows, −1: none.
    pub epoch: i32,
    /// First offset.
    pub offset: i64,
    /// Bytes at most.
    pub max_bytes: i32,
}

/// A Fetch request, with names of its own: it may wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchRequest {
    /// Version of the request.
    pub version: i16,
    /// Its correlation id.
    pub correlation: i32,
    /// How long it may wait, in milliseconds.
    pub max_wait_ms: i32,
    /// Bytes that make it wait no longer.
    pub min_bytes: i32,
    /// Bytes at most.
    pub max_bytes: i32,
    /// A session of an earlier request; there are none.
    pub session: i32,
    /// What is wanted, by topic.
    pub topics: Vec<(Box<str>, Vec<Wanted>)>,
}

impl FetchRequest {
    /// Reads one.
    pub fn read(body: &mut Reader<'_>, version: i16, correlation: i32) -> Result<Self, Malformed> {
        body.i32()?; // replica
        let max_wait_ms = body.i32()?;
        let min_bytes = body.i32()?;
        let max_bytes = body.i32()?;
        body.i8()?; // isolation: without transactions both levels see the same
        let mut session = 0;
        if version >= 7 {
            session = body.i32()?;
            body.i32()?;
        }
        let topics = body.array(|r| {
            let name = r.string()?.into();
            let wanted = r.array(|r| {
                let index = r.i32()?;
                let epoch = if version >= 9 { r.i32()? } else { -1 };
                let offset = r.i64()?;
                if version >= 12 {
                    r.i32()?; // last fetched epoch
                }
                if version >= 5 {
                    r.i64()?; // a follower's log start
                }
                let max_bytes = r.i32()?;
                r.end()?;
                Ok(Wanted {
                    index,
                    epoch,
                    offset,
                    max_bytes,
                })
            })?;
            r.end()?;
            Ok((name, wanted))
        })?;
        if version >= 7 {
            body.array(|r| {
                r.string()?;
                r.array(|r| r.i32())?;
                r.end()
            })?;
        }
        if version >= 11 {
            body.string()?; // rack
        }
        body.end()?;
        Ok(Self {
            version,
            correlation,
            max_wait_ms,
            min_bytes,
            max_bytes,
            session,
            topics,
        })
    }

    /// All partitions wanted, in order, with their topic's name.
    pub fn wanted(&self) -> impl Iterator<Item = (&str, &Wanted)> {
        self.topics
            .iter()
            .flat_map(|(name, list)| list.iter().map(move |wanted| (&**name, wanted)))
    }
}

/// What a partition answers.
#[derive(Debug)]
pub struct Fetched {
    /// [`Code::None`]: `records` are what there is.
    pub code: Code,
    /// Offset behind the last durable record, −1 where it is not known.
    pub high_watermark: i64,
    /// First offset.
    pub log_start: i64,
    /// Whole record batches.
    pub records: Pieces,
}

impl Fetched {
    /// Nothing, for a reason.
    pub fn failed(code: Code) -> Self {
        Self {
            code,
            high_watermark: -1,
            log_start: -1,
            records: Pieces::default(),
        }
    }
}

/// Whether a leader epoch that a client names is the one there is.
pub fn check_epoch(epoch: i32) -> Code {
    match epoch {
        -1 | LEADER_EPOCH => Code::None,
        epoch if epoch > LEADER_EPOCH => Code::UnknownLeaderEpoch,
        _ => Code::FencedLeaderEpoch,
    }
}

/// The answer, as pieces to be sent one after another: record batches are not copied. `results` are in the
/// order of [`FetchRequest::wanted`]; the client is throttled for `throttle_ms` milliseconds.
pub fn answer(
    request: &FetchRequest,
    code: Code,
    throttle_ms: i32,
    results: Vec<Fetched>,
) -> Vec<Piece> {
    let version = request.version;
    let mut out = Api::Fetch.answer(version, request.correlation);
    let mut pieces = Vec::new();
    out.i32(throttle_ms);
    if version >= 7 {
        out.i16(code as i16);
        out.i32(0); // no session
    }
    let mut results = results.into_iter();
    let topics = if code == Code::None {
        &request.topics[..]
    } else {
        &[]
    };
    out.count(topics.len());
    for (name, list) in topics {
        out.string(name);
        out.count(list.len());
        for (wanted, result) in list.iter().zip(results.by_ref()) {
            out.i32(wanted.index);
            out.i16(result.code as i16);
            out.i64(result.high_watermark);
            out.i64(result.high_watermark); // last stable offset
            if version >= 5 {
                out.i64(result.log_start);
            }
            out.null_array(); // aborted transactions
            if version >= 11 {
                out.i32(-1); // preferred replica
            }
            out.bytes_length(result.records.len());
            if !result.records.is_empty() {
                pieces.push(Piece::from(out.split()));
                pieces.extend(result.records.into_list());
            }
            out.end();
        }
        out.end();
    }
    out.end();
    pieces.push(Piece::from(out.split()));
    let len = pieces.iter().map(|piece| piece.len()).sum::<usize>() as i32 - 4;
    if let Some(head) = pieces[0].owned_mut() {
        head[..4].copy_from_slice(&len.to_be_bytes());
    }
    pieces
}

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
    pub records: Pieces,
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
    mut read: impl FnMut(P, i64, usize, &mut Pieces) -> Result<Outcome, ReadError>,
) -> (Vec<Read>, usize) {
    let mut results: Vec<Read> = parts
        .iter()
        .map(|_| Read {
            records: Pieces::default(),
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
            result.records = Pieces::default();
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
    fn log(batches: &[usize], offset: i64, limit: usize, out: &mut Pieces) -> Outcome {
        let start = out.len();
        let mut next = offset;
        for &len in &batches[offset as usize..] {
            if out.len() > start && out.len() - start + len > limit {
                break;
            }
            out.push_copy(&vec![0; len]);
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
