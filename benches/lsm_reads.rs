//! Reads that the LSM store answers from memory: `cargo bench --no-default-features --bench lsm_reads`.
//!
//! `record`: one message of 200 bytes by offset from the block cache, at random among 2,048 blocks of about 64 KiB
//! (128 MiB, more than the CPU caches hold). `key`: newest offset of a key, at random among a million, and of keys
//! that are not there.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use taffrail::storage::PartitionKey;
use taffrail::storage::lsm::Codec;
use taffrail::storage::lsm::cache::BlockCache;
use taffrail::storage::lsm::codec::{CodecError, Compressor};
use taffrail::storage::lsm::keys::{KeysReader, KeysWriter};
use taffrail::wire::record_batch::{self, BatchWriter};

const BLOCKS: i64 = 2048;
const RECORDS: i64 = 300;
const KEYS: u64 = 1_000_000;

/// Weyl steps: far apart, and no cost of their own.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 29)
}

fn record(c: &mut Criterion) {
    let cache = BlockCache::new(512 << 20);
    let mut compressor = Compressor::new(Codec::default());
    for block in 0..BLOCKS {
        let mut plain = vec![0; RECORDS as usize * 240];
        let mut writer = BatchWriter::new(&mut plain, 1_700_000_000_000);
        for i in 0..RECORDS {
            let value = format!("{:0200}", block * RECORDS + i);
            writer
                .push(1_700_000_000_000, None, Some(value.as_bytes()))
                .unwrap();
        }
        let len = writer.finish(block * RECORDS);
        plain.truncate(len);
        let header = record_batch::parse_header(&plain).unwrap();
        let batch = compressor.batch(&header, &mut plain);
        cache
            .block(1, block as u64, || -> Result<_, CodecError> { Ok(batch) })
            .unwrap();
    }
    assert_eq!(cache.stats().blocks, BLOCKS as u64);
    let mut group = c.benchmark_group("record");
    group.throughput(Throughput::Elements(1));
    let mut state = 1;
    group.bench_function("hot", |b| {
        b.iter(|| {
            let offset = (random(&mut state) % (BLOCKS * RECORDS) as u64) as i64;
            let block = cache
                .block(
                    1,
                    (offset / RECORDS) as u64,
                    || -> Result<&[u8], CodecError> { unreachable!("all blocks are there") },
                )
                .unwrap();
            let record = block.record(offset).unwrap();
            assert_eq!(record.offset, offset);
            black_box(record.value.unwrap().len())
        })
    });
    group.finish();
}

fn key(c: &mut Criterion) {
    let partition = PartitionKey {
        topic: 1,
        partition: 0,
    };
    let mut writer = KeysWriter::new(Vec::new());
    for n in 0..KEYS {
        let key = format!("site-12/device-{n:08}");
        writer.key(partition, key.as_bytes(), n as i64).unwrap();
    }
    let (bytes, _) = writer.finish().unwrap();
    println!(
        "key index: {:.1} bytes a key",
        bytes.len() as f64 / KEYS as f64
    );
    let reader = KeysReader::new(&bytes).unwrap();
    let mut group = c.benchmark_group("key");
    group.throughput(Throughput::Elements(1));
    let mut state = 1;
    let mut key = *b"site-12/device-00000000";
    let set = |n: u64, key: &mut [u8; 23]| {
        let mut n = n;
        for digit in key[15..].iter_mut().rev() {
            *digit = b'0' + (n % 10) as u8;
            n /= 10;
        }
    };
    group.bench_function("there", |b| {
        b.iter(|| {
            let n = random(&mut state) % KEYS;
            set(n, &mut key);
            assert_eq!(reader.get(partition, &key).unwrap(), Some(n as i64));
        })
    });
    group.bench_function("absent", |b| {
        b.iter(|| {
            set(KEYS + random(&mut state) % KEYS, &mut key);
            assert_eq!(reader.get(partition, &key).unwrap(), None);
        })
    });
    group.finish();
}

criterion_group!(benches, record, key);
criterion_main!(benches);
