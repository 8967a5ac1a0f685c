//! `taffrail read --key` and ranges of keys: the newest message of each key, over all partitions in the order of keys, or
//! all messages of one key, partition by partition.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io::{BufWriter, Write};
use std::ops::Bound;

use super::super::CliResult;
use super::super::source::Source;
use super::{Args, Error, Shown, print_record};
use crate::control::keys::{Keys, hex, unhex};
use crate::storage::KeyBounds;
use crate::storage::lsm::keys::{MAX_KEY, kept};
use crate::wire::record_batch::{self, Records};

/// Bytes of messages that are asked for at a time, over all partitions.
const CHUNK: u32 = 4 << 20;
/// And in one partition at the least.
const CHUNK_MIN: u32 = 64 << 10;

/// A record batch of one record.
type Found = (Vec<u8>, Vec<u8>);

/// Prints what the arguments ask for.
pub(super) fn run(args: &Args) -> CliResult {
    let asked = asked(args)?;
    let mut source = Source::open(args.data.as_deref(), &args.server)?;
    let partitions: Vec<u32> = match args.partition {
        Some(partition) => vec![partition],
        None => (0..source.partitions(&args.topic)?).collect(),
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    let chunk = (CHUNK / partitions.len().max(1) as u32).max(CHUNK_MIN);
    let mut queues: Vec<Queue> = partitions
        .iter()
        .map(|&partition| Queue {
            partition,
            found: VecDeque::new(),
            rest: Some(asked.clone()),
        })
        .collect();
    // The next key of each partition.
    let mut heap = BinaryHeap::new();
    for (at, queue) in queues.iter_mut().enumerate() {
        let next = queue.next(&mut source, &args.topic, chunk)?;
        heap.extend(next.map(|(key, batch)| Reverse((key, at, batch))));
    }
    let mut left = args.count.unwrap_or(u64::MAX);
    let mut printed = 0;
    while left > 0
        && let Some(Reverse((_, at, batch))) = heap.pop()
    {
        let queue = &mut queues[at];
        let shown = Shown {
            topic: &args.topic,
            partition: queue.partition,
            format: args.format,
            names_partition: false,
        };
        for record in Records::new(&batch)? {
            print_record(&shown, &record?, &mut out)?;
        }
        (left, printed) = (left - 1, printed + 1);
        let next = queue.next(&mut source, &args.topic, chunk)?;
        heap.extend(next.map(|(key, batch)| Reverse((key, at, batch))));
    }
    out.flush()?;
    match (&asked, printed) {
        (Keys::One(_) | Keys::All { .. }, 0) if args.count != Some(0) => {
            Err(format!("topic \"{}\" has no message with this key", args.topic).into())
        }
        _ => Ok(()),
    }
}

/// What is left of a partition.
struct Queue {
    partition: u32,
    found: VecDeque<Found>,
    rest: Option<Keys>,
}

impl Queue {
    /// The next key, and its newest record.
    fn next(
        &mut self,
        source: &mut Source,
        topic: &str,
        chunk: u32,
    ) -> Result<Option<Found>, Error> {
        while self.found.is_empty()
            && let Some(keys) = self.rest.take()
        {
            let mut bytes = Vec::new();
            self.rest = source.keys(topic, self.partition, &keys, chunk, &mut bytes)?;
            let mut batches = &bytes[..];
            while !batches.is_empty() {
                let len = record_batch::parse_header(batches)?.total_len();
                let (batch, rest) = batches
                    .split_at_checked(len)
                    .ok_or("the last record is cut off")?;
                batches = rest;
                record_batch::validate(batch)?;
                let record = Records::new(batch)?.next().transpose()?;
                let key = record.and_then(|record| record.key).unwrap_or_default();
                self.found
                    .push_back((kept(key).into_owned(), batch.to_vec()));
            }
        }
        Ok(self.found.pop_front())
    }
}

/// The keys that the arguments name.
fn asked(args: &Args) -> Result<Keys, Error> {
    let bytes = |text: &str| match args.hex_keys {
        false => Ok(text.as_bytes().to_vec()),
        true => unhex(text).ok_or_else(|| format!("\"{text}\" is not hexadecimal")),
    };
    if let Some(key) = &args.key {
        let key = hex(&bytes(key)?);
        return Ok(match args.all {
            true => Keys::All { key, from: 0 },
            false => Keys::One(key),
        });
    }
    let bound = |text: &str| {
        let bound = bytes(text)?;
        match bound.len() <= MAX_KEY {
            true => Ok(bound),
            false => Err(format!("a range's bounds have at most {MAX_KEY} bytes")),
        }
    };
    let bounds = match &args.key_prefix {
        Some(prefix) => KeyBounds::prefix(&bound(prefix)?),
        None => KeyBounds {
            from: match &args.key_from {
                Some(from) => Bound::Included(bound(from)?),
                None => Bound::Unbounded,
            },
            to: args.key_to.as_deref().map(bound).transpose()?,
        },
    };
    Ok(Keys::range(&bounds))
}
