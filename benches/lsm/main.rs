//! What the store behind the log can do, by itself: `cargo bench --bench lsm -- COMMAND`.
//!
//! `build` makes a store of telemetry (`telemetry.rs`) through the library. `scan` reads it in order and whole, `point`
//! reads single messages at random by offset, `open` opens it. `compress` merges and compresses the same messages without
//! a disk. `flush` fills a log and moves it into SSTs, which it merges. `recover` fills a log, stops without closing it, and
//! recovers it. Each prints one line of JSON.
//!
//! The store's content repeats after 64 MB of plain messages, which building it would take minutes without; only the offsets
//! differ. Nothing in the reading can profit: every block is checked, and decompressed, by itself.

mod telemetry;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use taffrail::storage::lsm::codec::decompress;
use taffrail::storage::lsm::manifest::{Edit, FileMeta};
use taffrail::storage::lsm::rebatch::DEFAULT_TARGET;
use taffrail::storage::lsm::sst::{SstInfo, SstWriter};
use taffrail::storage::lsm::{
    Codec, MaintainConfig, Maintenance, Merger, Policies, Policy, Rebatcher, Store,
};
use taffrail::storage::wal::LogId;
use taffrail::storage::wal::segment::shard_dir;
use taffrail::storage::{
    Outcome, PartitionKey, Refusal, Replay, WalConfig, WalShared, WalState, WalWriter,
};
use taffrail::wire::record_batch::{self, BatchWriter};
use telemetry::{Telemetry, random};

const ID: LogId = LogId { store: 7, shard: 0 };
/// Plain bytes of the content that repeats.
const CONTENT: usize = 64 << 20;
/// Bytes of a producer's batch.
const PRODUCED: usize = 16 << 10;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
    /// Given by cargo.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a store.
    Build {
        dir: PathBuf,
        /// Megabytes (2^20) on disk.
        #[arg(long, default_value_t = 512)]
        mb: u64,
        #[arg(long, default_value_t = 1)]
        partitions: u32,
        /// Files.
        #[arg(long, default_value_t = 4)]
        files: u32,
        #[arg(long, default_value_t = Codec::default())]
        codec: Codec,
        #[arg(long, default_value_t = DEFAULT_TARGET)]
        target: usize,
        /// Instead of `mb`: messages in all, the same ones in each partition and file.
        #[arg(long)]
        messages: Option<u64>,
    },
    /// Reads all of it in order.
    Scan {
        dir: PathBuf,
        /// Bytes of a read, which hands out pieces as they come.
        #[arg(long, default_value_t = 1 << 30)]
        read: usize,
        /// So often; the last pass is the one that is measured.
        #[arg(long, default_value_t = 1)]
        passes: u32,
    },
    /// Single messages at random.
    Point {
        dir: PathBuf,
        #[arg(long, default_value_t = 1)]
        threads: u32,
        #[arg(long, default_value_t = 10.0)]
        seconds: f64,
        /// Among the first so many offsets only; each block of them is read twice before the clock starts.
        #[arg(long)]
        hot: Option<i64>,
    },
    /// Opens it.
    Open { dir: PathBuf },
    /// Merges and compresses in memory.
    Compress {
        #[arg(long, default_value_t = DEFAULT_TARGET)]
        target: usize,
        #[arg(long, default_value_t = Codec::default())]
        codec: Codec,
    },
    /// Fills a log, flushes its sealed segments, and merges the SSTs: CPU of each.
    Flush {
        dir: PathBuf,
        #[arg(long, default_value_t = 1024)]
        mb: u64,
        /// Values of 1 KiB that do not get smaller, instead of telemetry.
        #[arg(long)]
        noise: bool,
        /// Bytes of a producer's batch.
        #[arg(long, default_value_t = PRODUCED)]
        batch: usize,
        #[arg(long, default_value_t = 4)]
        partitions: u32,
    },
    /// Fills a log, and recovers it.
    Recover {
        dir: PathBuf,
        #[arg(long, default_value_t = 1024)]
        mb: u64,
        /// Only fills it, and leaves the process without closing it.
        #[arg(long)]
        fill: bool,
    },
}

fn main() -> Result<()> {
    match Args::parse().command {
        Command::Build {
            dir,
            mb,
            partitions,
            files,
            codec,
            target,
            messages,
        } => build(&dir, mb << 20, partitions, files, codec, target, messages),
        Command::Scan { dir, read, passes } => scan(&dir, read, passes),
        Command::Point {
            dir,
            threads,
            seconds,
            hot,
        } => point(&dir, threads, Duration::from_secs_f64(seconds), hot),
        Command::Open { dir } => open(&dir),
        Command::Compress { target, codec } => compress(target, codec),
        Command::Flush {
            dir,
            mb,
            noise,
            batch,
            partitions,
        } => flush(&dir, mb << 20, noise, batch, partitions),
        Command::Recover { dir, mb, fill } => recover(&dir, mb << 20, fill),
    }
}

fn key(partition: u32) -> PartitionKey {
    PartitionKey {
        topic: 1,
        partition,
    }
}

/// Producers' batches, `bytes` of them or `messages`, and the bytes of the values.
fn produced(bytes: usize, messages: u64) -> (Vec<Vec<u8>>, u64) {
    let mut telemetry = Telemetry::new(1);
    batches_of(bytes, messages, PRODUCED, 300, |writer| {
        let (time, value) = telemetry.next();
        writer.push(time, None, Some(value)).expect("it fits");
        value.len() as u64
    })
}

/// As [`produced`], in batches of `batch` bytes, of what `push` pushes: a message with a value of up to `most` bytes.
fn batches_of(
    bytes: usize,
    messages: u64,
    batch: usize,
    most: usize,
    mut push: impl FnMut(&mut BatchWriter) -> u64,
) -> (Vec<Vec<u8>>, u64) {
    let (mut batches, mut offset, mut size, mut values) = (Vec::new(), 0, 0, 0);
    while size < bytes && (offset as u64) < messages {
        let mut buffer = vec![0; batch];
        let mut writer = BatchWriter::new(&mut buffer, 1_700_000_000_000);
        let mut count = 0;
        while writer.fits(0, most) && offset as u64 + count < messages {
            values += push(&mut writer);
            count += 1;
        }
        let len = writer.finish(offset);
        buffer.truncate(len);
        offset += count as i64;
        size += len;
        batches.push(buffer);
    }
    (batches, values)
}

/// The same, merged and compressed.
fn merged(batches: &[Vec<u8>], codec: Codec, target: usize) -> Result<Vec<Vec<u8>>> {
    let mut out = Vec::new();
    let mut rebatcher = Rebatcher::new(codec, target);
    for batch in batches {
        rebatcher.push(batch, &mut |batch: &[u8]| out.push(batch.to_vec()))?;
    }
    rebatcher.finish(&mut |batch: &[u8]| out.push(batch.to_vec()));
    Ok(out)
}

fn build(
    dir: &Path,
    bytes: u64,
    partitions: u32,
    files: u32,
    codec: Codec,
    target: usize,
    messages: Option<u64>,
) -> Result<()> {
    let part = messages.map(|all| all / u64::from(partitions) / u64::from(files));
    let (batches, _) = produced(CONTENT, part.unwrap_or(u64::MAX));
    let mut content = merged(&batches, codec, target)?;
    let store = Store::open(dir, ID)?;
    let mut next = vec![0; partitions as usize];
    let each = bytes / u64::from(files) / u64::from(partitions);
    let mut at = 0;
    for n in 0..files {
        let (number, path) = store.next_file();
        let info = SstInfo {
            id: ID,
            number,
            lsn_start: u64::from(n) << 30,
            lsn_end: u64::from(n + 1) << 30,
            created_ms: 0,
        };
        let mut writer = SstWriter::create(&path, info)?;
        for partition in 0..partitions {
            let mut size = 0;
            let mut left = content.len();
            let next = &mut next[partition as usize];
            while part.map_or(size < each, |_| left > 0) {
                let count = content.len();
                let batch = &mut content[at][..];
                at = (at + 1) % count;
                let count = record_batch::parse_header(batch)?.records_count;
                record_batch::set_base_offset(batch, *next);
                *next += i64::from(count);
                writer.batch(key(partition), batch, 1_700_000_000_000 + *next)?;
                size += batch.len() as u64;
                left -= 1;
            }
        }
        let made = writer.finish()?;
        store.commit(&Edit::Flush {
            add: vec![FileMeta {
                number,
                lsn_start: info.lsn_start,
                lsn_end: info.lsn_end,
                bytes: made.file_bytes,
                records: made.records,
                data_bytes: made.data_bytes,
                min_time: made.min_time,
                max_time: made.max_time,
                merges: 0,
                due: 0,
            }],
            flushed_lsn: info.lsn_end,
        })?;
    }
    let view = store.view();
    let records: u64 = view.files.iter().map(|f| f.meta.records).sum();
    let bytes: u64 = view.files.iter().map(|f| f.meta.bytes).sum();
    println!(
        "{}",
        serde_json::json!({ "messages": records, "bytes": bytes, "files": files })
    );
    Ok(())
}

fn scan(dir: &Path, read: usize, passes: u32) -> Result<()> {
    let store = Store::open_read_only(dir, ID)?;
    let mut seconds = 0.0;
    let (mut bytes, mut batches) = (0, 0u64);
    let view = store.view();
    let mut partitions: Vec<_> = view.partitions().map(|(key, _)| key).collect();
    partitions.sort();
    for _ in 0..passes {
        (bytes, batches) = (0, 0);
        let clock = Instant::now();
        for &key in &partitions {
            let (start, end) = store.bounds(key).ok_or("no messages")?;
            let mut from = start;
            while from < end {
                let mut outcome = Outcome {
                    bytes: 0,
                    batches: 0,
                    next_offset: from,
                    end,
                };
                store.read_with(key, read, &mut outcome, |piece| {
                    black_box(piece);
                })?;
                from = outcome.next_offset;
                bytes += outcome.bytes;
                batches += u64::from(outcome.batches);
            }
        }
        seconds = clock.elapsed().as_secs_f64();
    }
    println!(
        "{}",
        serde_json::json!({ "bytes": bytes, "batches": batches, "seconds": seconds, "mb_per_s": bytes as f64 / 1e6 / seconds })
    );
    Ok(())
}

fn point(dir: &Path, threads: u32, time: Duration, hot: Option<i64>) -> Result<()> {
    let store = Store::open_read_only(dir, ID)?;
    let (start, end) = store.bounds(key(0)).ok_or("no messages")?;
    let end = hot.map_or(end, |hot| end.min(start + hot));
    let read = |store: &Store, offset| -> Result<usize> {
        let found = store.record(key(0), offset, |record| {
            assert_eq!(record.offset, offset);
            record.value.map_or(0, <[u8]>::len)
        })?;
        Ok(found.ok_or("a message is missing")?)
    };
    if hot.is_some() {
        for _ in 0..2 {
            let mut offset = start;
            while offset < end {
                read(&store, offset)?;
                offset += 20;
            }
        }
    }
    let clock = Instant::now();
    let counts: Vec<u64> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|n| {
                let store = Arc::clone(&store);
                scope.spawn(move || {
                    let mut state = u64::from(n) << 32 | u64::from(std::process::id());
                    let mut count = 0;
                    while clock.elapsed() < time {
                        for _ in 0..if hot.is_some() { 1000 } else { 1 } {
                            let offset = (random(&mut state) % (end - start) as u64) as i64;
                            black_box(read(&store, start + offset).expect("it was written"));
                            count += 1;
                        }
                    }
                    count
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("no read panics"))
            .collect()
    });
    let (count, seconds) = (counts.iter().sum::<u64>(), clock.elapsed().as_secs_f64());
    println!(
        "{}",
        serde_json::json!({ "reads": count, "seconds": seconds, "per_s": count as f64 / seconds, "threads": threads })
    );
    Ok(())
}

fn open(dir: &Path) -> Result<()> {
    let clock = Instant::now();
    let store = Store::open(dir, ID)?;
    let seconds = clock.elapsed().as_secs_f64();
    let view = store.view();
    let messages: u64 = view.files.iter().map(|f| f.meta.records).sum();
    println!(
        "{}",
        serde_json::json!({ "messages": messages, "partitions": view.partitions().count(), "files": view.files.len(), "seconds": seconds })
    );
    Ok(())
}

fn compress(target: usize, codec: Codec) -> Result<()> {
    let (batches, values) = produced(CONTENT, u64::MAX);
    let plain: usize = batches.iter().map(Vec::len).sum();
    let clock = Instant::now();
    let out = merged(&batches, codec, target)?;
    let packed = clock.elapsed().as_secs_f64();
    let stored: usize = out.iter().map(Vec::len).sum();
    let mut buffer = Vec::new();
    let clock = Instant::now();
    for batch in &out {
        decompress(batch, 64 << 20, &mut buffer)?;
    }
    let unpacked = clock.elapsed().as_secs_f64();
    println!(
        "{}",
        serde_json::json!({
            "codec": codec.to_string(), "target": target, "ratio": plain as f64 / stored as f64,
            "value_bytes_ratio": values as f64 / stored as f64, "batch_bytes": stored / out.len(),
            "compress_mb_per_s": plain as f64 / 1e6 / packed, "decompress_mb_per_s": plain as f64 / 1e6 / unpacked,
            "decompress_us_a_batch": unpacked * 1e6 / out.len() as f64,
        })
    );
    Ok(())
}

#[derive(Default)]
struct Count(u64);

impl Replay for Count {
    fn snapshot(&mut self, _: &[u8], _: u32, _: u32) {}
    fn batch(&mut self, _: PartitionKey, _: &[u8]) {
        self.0 += 1;
    }
}

/// Bytes of a value of noise.
const NOISE: usize = 1024;
/// Bytes of a segment that is flushed.
const SEGMENT: u64 = 64 << 20;

fn flush(dir: &Path, bytes: u64, noise: bool, batch: usize, partitions: u32) -> Result<()> {
    let staging = tempfile::tempdir_in("/dev/shm")?;
    std::fs::create_dir_all(dir)?;
    let config = WalConfig {
        staging_dir: Some(staging.path().to_owned()),
        segment_size: SEGMENT,
        ..WalConfig::new(dir, ID.store)
    };
    let (mut writer, shared, _) = WalWriter::open(&config, ID.shard, &mut Count::default())?;
    let store = Store::open(&shard_dir(dir, ID.shard), ID)?;
    let (batches, _) = match noise {
        false => {
            let mut telemetry = Telemetry::new(1);
            batches_of(CONTENT, u64::MAX, batch, 300, |writer| {
                let (time, value) = telemetry.next();
                writer.push(time, None, Some(value)).expect("it fits");
                value.len() as u64
            })
        }
        true => {
            let (mut state, mut value) = (1, [0; NOISE]);
            batches_of(CONTENT, u64::MAX, batch, NOISE + 20, |writer| {
                for word in value.chunks_exact_mut(8) {
                    word.copy_from_slice(&random(&mut state).to_le_bytes());
                }
                let pushed = writer.push(1_700_000_000_000, None, Some(&value));
                pushed.expect("it fits");
                NOISE as u64
            })
        }
    };
    fill(&mut writer, &shared, &batches, bytes, partitions)?;
    let policies: Policies = Arc::new(|_| Policy::default());
    let config = MaintainConfig {
        batch_target: DEFAULT_TARGET,
        policies: Arc::clone(&policies),
        started: Arc::new(|_, _| {}),
    };
    let mut maintenance = Maintenance::new(Arc::clone(&store), Arc::clone(&shared), config);
    let clock = Instant::now();
    while maintenance.step()? {}
    let flushing = clock.elapsed().as_secs_f64();
    let mut merger = Merger::new(Arc::clone(&store), policies, DEFAULT_TARGET, Arc::default());
    let clock = Instant::now();
    while merger.step()? {}
    let merging = clock.elapsed().as_secs_f64();
    let of = |count: &AtomicU64| count.load(Ordering::Relaxed) as f64;
    let stats = &store.stats;
    println!(
        "{}",
        serde_json::json!({
            "flushed_mb": of(&stats.flush_read_bytes) / 1e6, "flush_written_mb": of(&stats.flush_written_bytes) / 1e6,
            "flush_seconds": flushing, "flush_cpu_ns_a_byte": of(&stats.flush_cpu_ns) / of(&stats.flush_read_bytes),
            "merged_mb": of(&stats.merge_read_bytes) / 1e6, "merge_seconds": merging,
            "merge_cpu_ns_a_byte": of(&stats.merge_cpu_ns) / of(&stats.merge_read_bytes),
        })
    );
    writer.close()?;
    Ok(())
}

fn recover(dir: &Path, bytes: u64, only_fill: bool) -> Result<()> {
    // Staging of a killed process would be recovered as well; what is measured is the disk.
    let staging = tempfile::tempdir_in("/dev/shm")?.keep();
    std::fs::create_dir_all(dir)?;
    let config = WalConfig {
        staging_dir: Some(staging.clone()),
        ..WalConfig::new(dir, 7)
    };
    let clock = Instant::now();
    let mut replay = Count::default();
    let (mut writer, shared, _) = WalWriter::open(&config, 0, &mut replay)?;
    let seconds = clock.elapsed().as_secs_f64();
    std::fs::remove_dir_all(&staging)?;
    if !only_fill {
        println!(
            "{}",
            serde_json::json!({ "batches": replay.0, "seconds": seconds, "mb_per_s": bytes as f64 / 1e6 / seconds })
        );
        return Ok(());
    }
    let (batches, _) = produced(CONTENT, u64::MAX);
    let n = fill(&mut writer, &shared, &batches, bytes, 100)?;
    println!("{}", serde_json::json!({ "batches": n, "bytes": bytes }));
    // As a kill would: nothing is closed.
    std::process::exit(0);
}

/// Appends `bytes` of the batches, over and over, to the partitions in turn, and waits until they are durable; gives how
/// many that were.
fn fill(
    writer: &mut WalWriter,
    shared: &WalShared,
    batches: &[Vec<u8>],
    bytes: u64,
    partitions: u32,
) -> Result<usize> {
    let clock = Instant::now();
    let mut left = bytes;
    let mut n = 0;
    let mut next = vec![0; partitions as usize];
    while left > 0 || writer.has_pending() || writer.in_flight() > 0 {
        writer.poll(clock.elapsed().as_nanos() as u64, false);
        if writer.state() == WalState::Failed {
            return Err(shared.reason().unwrap_or_default().into());
        }
        if left == 0 {
            writer.wait(Duration::from_millis(1));
            continue;
        }
        let batch = &batches[n % batches.len()];
        let partition = n as u32 % partitions;
        match writer.reserve(batch.len()) {
            Ok(room) => {
                let room = &mut room[..batch.len()];
                room.copy_from_slice(batch);
                let next: &mut i64 = &mut next[partition as usize];
                record_batch::set_base_offset(room, *next);
                *next += i64::from(record_batch::parse_header(batch)?.records_count);
                writer.publish(key(partition), batch.len());
                left = left.saturating_sub(batch.len() as u64);
                n += 1;
            }
            Err(Refusal::Backpressure) => writer.wait(Duration::from_millis(1)),
            Err(other) => return Err(other.into()),
        }
    }
    Ok(n)
}
