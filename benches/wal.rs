//! The log alone: bytes made durable a second, and the latency of each commit, as one line of JSON.
//!
//! `cargo bench --bench wal -- --dir DIR --mb 2048 --commit 262144 --depth 4 --batch 65000`
//!
//! Batches of `--batch` bytes are copied into the log as fast as it takes them, as a shard does, into one
//! segment that is made ready before the clock starts: a second one would have its successor zeroed
//! meanwhile, on the disk that is being measured. An entry's latency runs from its publication to
//! the poll that finds it durable. `--pace N` appends one batch every N microseconds instead.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use hdrhistogram::Histogram;
use taffrail::storage::{FrameSeq, PartitionKey, Refusal, Replay, WalConfig, WalState, WalWriter};
use taffrail::wire::record_batch::BatchWriter;

/// An idle loop sleeps on the ring, as a shard's does after its spin: a spinning one loses the CPU
/// where it is shared.
const IDLE: Duration = Duration::from_millis(1);

#[derive(Parser)]
struct Args {
    /// Folder for the log, made and removed.
    #[arg(long, default_value = "target/bench-wal")]
    dir: PathBuf,
    /// Megabytes (2^20) of batches to append.
    #[arg(long, default_value_t = 256)]
    mb: u64,
    /// Bytes of the largest commit.
    #[arg(long, default_value_t = 256 << 10)]
    commit: usize,
    /// Commits in flight.
    #[arg(long, default_value_t = 4)]
    depth: usize,
    /// Bytes of a batch.
    #[arg(long, default_value_t = 65_000)]
    batch: usize,
    /// Microseconds between batches; 0: as fast as it goes.
    #[arg(long, default_value_t = 0)]
    pace: u64,
    /// Linger, microseconds.
    #[arg(long, default_value_t = 100)]
    linger: u64,
    /// Folder of the staging file.
    #[arg(long)]
    staging_dir: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

struct Nothing;

impl Replay for Nothing {
    fn snapshot(&mut self, _: &[u8], _: u32, _: u32) {}
    fn batch(&mut self, _: PartitionKey, _: &[u8]) {}
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let total = args.mb << 20;
    let _ = std::fs::remove_dir_all(&args.dir);
    std::fs::create_dir_all(&args.dir)?;
    // A frame carries its header, and a commit that did not fill is padded.
    let segment_size = (total + total / 8).next_multiple_of(1 << 20) + (4 * args.commit as u64);
    let config = WalConfig {
        commit_size: args.commit,
        commits_in_flight: args.depth,
        linger: Duration::from_micros(args.linger),
        segment_size,
        prepared_segments: 1,
        staging_dir: args.staging_dir,
        ..WalConfig::new(&args.dir, rand::random())
    };
    let (mut writer, shared, _) = WalWriter::open(&config, 0, &mut Nothing)?;
    // The first and its successor.
    while writer.prepared() < 2 {
        if let Some(reason) = shared.reason() {
            return Err(reason.into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut source = vec![0; args.batch + 200];
    let mut batch = BatchWriter::new(&mut source, 0);
    batch
        .push(
            0,
            None,
            Some(&vec![0x5a; args.batch.saturating_sub(90).max(1)]),
        )
        .map_err(|_| "the batch does not fit")?;
    let len = batch.finish(0);
    let batch = &source[..len];
    let key = PartitionKey {
        topic: 1,
        partition: 0,
    };

    let mut latency = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
    let mut waiting: VecDeque<(FrameSeq, u64)> = VecDeque::with_capacity(1 << 16);
    let clock = Instant::now();
    let now = || clock.elapsed().as_nanos() as u64;
    let mut appended = 0;
    let mut next_ns = 0;
    let mut offset = 0i64;
    while appended < total || !waiting.is_empty() {
        let mono = now();
        writer.poll(mono, false);
        let durable = writer.durable();
        while let Some(&(seq, at)) = waiting.front() {
            if seq > durable {
                break;
            }
            latency.record((mono - at).max(1))?;
            waiting.pop_front();
        }
        if writer.state() == WalState::Failed {
            return Err(shared.reason().unwrap_or_default().into());
        }
        if appended >= total {
            writer.wait(IDLE);
            continue;
        }
        if mono < next_ns {
            std::hint::spin_loop();
            continue;
        }
        match writer.reserve(len) {
            Ok(room) => {
                room.copy_from_slice(batch);
                taffrail::wire::record_batch::set_base_offset(room, offset);
                offset += 1;
                waiting.push_back((writer.publish(key, len), mono));
                appended += len as u64;
                next_ns = mono + args.pace * 1000;
            }
            Err(Refusal::Backpressure) => writer.wait(IDLE),
            Err(other) => return Err(other.into()),
        }
    }
    let seconds = clock.elapsed().as_secs_f64();
    let (commits, bytes) = (shared.commits.get(), shared.committed_bytes.get());
    let (_, hugepages) = shared.staging();
    writer.close()?;
    std::fs::remove_dir_all(&args.dir)?;
    println!(
        "{}",
        serde_json::json!({
            "mb_per_s": appended as f64 / seconds / 1e6,
            "disk_mb_per_s": bytes as f64 / seconds / 1e6,
            "seconds": seconds,
            "batches": offset,
            "commits": commits,
            "mean_commit_bytes": bytes / commits.max(1),
            "latency_us": {
                "p50": latency.value_at_quantile(0.5) as f64 / 1e3,
                "p99": latency.value_at_quantile(0.99) as f64 / 1e3,
                "p999": latency.value_at_quantile(0.999) as f64 / 1e3,
                "max": latency.max() as f64 / 1e3,
            },
            "commit_size": args.commit,
            "depth": args.depth,
            "batch": len,
            "hugepages": hugepages,
        })
    );
    Ok(())
}
