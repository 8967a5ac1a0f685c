//! What consumers hold while it is sent: right whatever becomes of segments and SSTs meanwhile.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::storage::ReadError;

/// The value of the record at an offset, as [`Shard::append`] makes it.
fn value(offset: i64, size: usize) -> Vec<u8> {
    (0..size).map(|j| (offset as usize + j % 9) as u8).collect()
}

/// Answers that are held while others are read.
const HELD: usize = 40;
const SIZE: usize = 3000;

/// Compares every record of an answer that was asked for from `from` on.
fn check(pieces: Pieces, from: i64) -> usize {
    let bytes = pieces.into_list().concat();
    let (mut at, mut next, mut scratch) = (0, from, Vec::new());
    while at < bytes.len() {
        let batch = &bytes[at..at + parse_header(&bytes[at..]).unwrap().total_len()];
        record_batch::validate(batch).unwrap();
        for record in Records::new(codec::plain(batch, &mut scratch).unwrap()).unwrap() {
            let record = record.unwrap();
            if record.offset >= from {
                assert_eq!(record.offset, next);
                assert_eq!(record.value.unwrap(), value(next, SIZE));
                next += 1;
            }
        }
        at += batch.len();
    }
    (next - from) as usize
}

/// Reads the partition from its start to its end again and again, and compares what it read long after it did.
fn follow(
    shared: &Arc<WalShared>,
    store: &Arc<Store>,
    partition: u32,
    done: &AtomicBool,
) -> (usize, usize) {
    let mut held: VecDeque<(Pieces, i64)> = VecDeque::new();
    let (mut records, mut shared_pieces) = (0, 0);
    let mut reader = LogReader::with_store(Arc::clone(shared), Arc::clone(store));
    while !done.load(Ordering::Relaxed) {
        let (mut from, end) = reader.bounds(key(partition)).unwrap();
        while from < end {
            let mut pieces = Pieces::default();
            let outcome = match reader.read_pieces(key(partition), from, 64 << 10, &mut pieces) {
                Ok(outcome) => outcome,
                // Retention was faster.
                Err(ReadError::OutOfRange { .. }) => break,
                Err(error) => panic!("{error}"),
            };
            assert_eq!(outcome.bytes, pieces.len());
            assert!(outcome.next_offset > from);
            held.push_back((pieces, from));
            from = outcome.next_offset;
            if held.len() > HELD {
                let (pieces, from) = held.pop_front().unwrap();
                shared_pieces += pieces.shared();
                records += check(pieces, from);
            }
        }
    }
    for (pieces, from) in held {
        shared_pieces += pieces.shared();
        records += check(pieces, from);
    }
    (records, shared_pieces)
}

#[test]
fn what_consumers_hold_stays_right_while_segments_and_files_go() {
    for codec in [codec::Codec::None, codec::Codec::default()] {
        let mut shard = Shard::new(Policy {
            codec,
            retention_bytes: Some(600 << 10),
            ..Policy::default()
        });
        let open = shard.open.as_ref().unwrap();
        let (shared, store) = (Arc::clone(&open.shared), Arc::clone(&open.store));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let followers: Vec<_> = (0..3)
                .map(|partition| {
                    let (shared, store, done) = (&shared, &store, &done);
                    scope.spawn(move || follow(shared, store, partition % 2, done))
                })
                .collect();
            for i in 0..400 {
                shard.append(key(i % 2), 6, SIZE);
                shard.step();
                shard.merge();
            }
            done.store(true, Ordering::Relaxed);
            for follower in followers {
                let (records, shared) = follower.join().unwrap();
                assert!(records > 0 && shared > 0, "{records} {shared}");
            }
        });
    }
}
