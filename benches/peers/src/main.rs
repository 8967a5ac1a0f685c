//! Taffrail's store beside fjall and RocksDB on the same work: messages appended by offset with an index of their keys,
//! single messages read by offset, offsets looked up by key, everything read in order. Run by `benches/bars/store-vs-peers.sh`.
//!
//! The rules, the same for all:
//!
//! - Messages: telemetry (`benches/lsm/telemetry.rs`, about 200 bytes of JSON) with its time, and a key of 16 bytes, one of
//!   [`KEYS`] at random. The content repeats after [`CONTENT`] bytes, which no compressor's window reaches; keys and offsets do not.
//! - Appended by one thread in batches of so many messages; each batch is on the disk (fdatasync or its like) before the next.
//!   Taffrail's engine writes a batch and syncs. The others write one batch to a tree from offset to message (time, key, value)
//!   and one from key to offset, with a synced log; offsets and keys are in big-endian order.
//! - LZ4 for all blocks at all levels; checksums compared as each does by default; block caches of [`CACHE`] bytes; bloom filters
//!   on; two threads to flush and merge; everything else as each has it by default.
//! - What is read is compared with what was written.
//!
//! Each command is a process of its own and prints one line of JSON.

mod content;
mod fjall;
#[cfg(feature = "rocksdb")]
mod rocksdb;
mod taffrail;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand, ValueEnum};

use content::{Content, Key, Message, random};

/// Bytes of each store's block cache.
const CACHE: u64 = 64 << 20;
/// Threads that flush and merge: Taffrail's engine has two.
const THREADS: usize = 2;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A store under test.
trait Peer: Sized {
    /// Reads on one thread.
    type Reader: Send;

    /// Opens it, or makes it.
    fn open(dir: &Path) -> Result<Self>;
    /// Appends messages, the first at `offset`; they are durable then.
    fn append(&mut self, offset: u64, messages: &[Message<'_>]) -> Result<()>;
    /// Waits until everything is in sorted files, and nothing is due to be merged.
    fn settle(&mut self) -> Result<()>;
    fn reader(&self) -> Self::Reader;
    /// Hands the message at `offset` to `take`; false: there is none.
    fn get(reader: &mut Self::Reader, offset: u64, take: impl FnMut(Message<'_>)) -> Result<bool>;
    /// The newest offset of a key.
    fn find(reader: &mut Self::Reader, key: &Key) -> Result<Option<u64>>;
    /// Hands all messages to `take`, in order, with their offsets.
    fn scan(reader: &mut Self::Reader, take: impl FnMut(u64, Message<'_>)) -> Result<()>;
    /// Closes it.
    fn close(self) -> Result<()>;
}

#[derive(Clone, Copy, ValueEnum)]
enum Store {
    Taffrail,
    Fjall,
    #[cfg(feature = "rocksdb")]
    Rocksdb,
}

#[derive(Parser)]
struct Args {
    store: Store,
    dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a store.
    Append {
        #[arg(long)]
        messages: u64,
        /// Messages that are written and synced at a time.
        #[arg(long, default_value_t = 1000)]
        batch: u64,
    },
    /// Reads single messages at random.
    Point {
        /// How many there are, or among how many of the first to read.
        #[arg(long)]
        messages: u64,
        #[arg(long, default_value_t = 1)]
        threads: u32,
        #[arg(long, default_value_t = 5.0)]
        seconds: f64,
        /// Reads all of them twice before.
        #[arg(long)]
        warm: bool,
    },
    /// Looks keys up at random.
    Key {
        /// How many messages there are.
        #[arg(long)]
        messages: u64,
        #[arg(long, default_value_t = 5.0)]
        seconds: f64,
    },
    /// Reads everything in order.
    Scan {
        #[arg(long)]
        messages: u64,
        /// So often; the last time counts.
        #[arg(long, default_value_t = 1)]
        passes: u32,
    },
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.store {
        Store::Taffrail => run::<taffrail::Taffrail>(&args),
        Store::Fjall => run::<fjall::Fjall>(&args),
        #[cfg(feature = "rocksdb")]
        Store::Rocksdb => run::<rocksdb::Rocks>(&args),
    }
}

fn run<P: Peer>(args: &Args) -> Result<()> {
    let content = Content::new();
    let store = P::open(&args.dir)?;
    match args.command {
        Command::Append { messages, batch } => append(store, &content, messages, batch),
        Command::Point {
            messages,
            threads,
            seconds,
            warm,
        } => point(store, &content, messages, threads, seconds, warm),
        Command::Key { messages, seconds } => key(store, &content, messages, seconds),
        Command::Scan { messages, passes } => scan(store, &content, messages, passes),
    }
}

fn append<P: Peer>(mut store: P, content: &Content, messages: u64, batch: u64) -> Result<()> {
    let clock = Instant::now();
    let mut offset = 0;
    while offset < messages {
        let end = messages.min(offset + batch);
        let keys: Vec<Key> = (offset..end).map(content::key).collect();
        let batch: Vec<Message<'_>> = (offset..end)
            .zip(&keys)
            .map(|(offset, key)| content.message(offset, key))
            .collect();
        store.append(offset, &batch)?;
        offset = end;
    }
    let appended = clock.elapsed().as_secs_f64();
    store.settle()?;
    let settled = clock.elapsed().as_secs_f64();
    store.close()?;
    println!(
        "{}",
        serde_json::json!({
            "messages": messages, "seconds": appended, "per_s": messages as f64 / appended,
            "settled_seconds": settled, "settled_per_s": messages as f64 / settled,
            "cpu_seconds": cpu(),
        })
    );
    Ok(())
}

fn point<P: Peer>(
    store: P,
    content: &Content,
    messages: u64,
    threads: u32,
    seconds: f64,
    warm: bool,
) -> Result<()> {
    let get = |reader: &mut P::Reader, offset| -> Result<()> {
        let found = P::get(reader, offset, |message| content.check(offset, message))?;
        assert!(found, "message {offset} is missing");
        Ok(())
    };
    if warm {
        let mut reader = store.reader();
        for offset in (0..messages).chain(0..messages) {
            get(&mut reader, offset)?;
        }
    }
    let time = Duration::from_secs_f64(seconds);
    let readers: Vec<_> = (0..threads).map(|_| store.reader()).collect();
    let clock = Instant::now();
    let counts: Vec<Result<u64>> = std::thread::scope(|scope| {
        let workers: Vec<_> = readers
            .into_iter()
            .zip(1u64..)
            .map(|(mut reader, n)| {
                scope.spawn(move || {
                    let (mut state, mut count) = (n << 32 | u64::from(std::process::id()), 0);
                    while clock.elapsed() < time {
                        for _ in 0..if warm { 1000 } else { 1 } {
                            get(&mut reader, random(&mut state) % messages)?;
                            count += 1;
                        }
                    }
                    Ok(count)
                })
            })
            .collect();
        let counts = workers.into_iter().map(|w| w.join().expect("no panic"));
        counts.collect()
    });
    let seconds = clock.elapsed().as_secs_f64();
    let count: u64 = counts.into_iter().sum::<Result<u64>>()?;
    println!(
        "{}",
        serde_json::json!({ "reads": count, "seconds": seconds, "per_s": count as f64 / seconds, "threads": threads })
    );
    store.close()
}

fn key<P: Peer>(store: P, content: &Content, messages: u64, seconds: f64) -> Result<()> {
    let mut reader = store.reader();
    let time = Duration::from_secs_f64(seconds);
    let mut find = |state: &mut u64| -> Result<()> {
        // Of a message that is there: its key is found at this or a later one.
        let offset = random(state) % messages;
        let key = content::key(offset);
        let newest = P::find(&mut reader, &key)?.expect("the key is there");
        assert!(newest >= offset && content::key(newest) == key);
        Ok(())
    };
    // The index is warm then.
    let mut state = 1;
    let clock = Instant::now();
    while clock.elapsed() < time {
        find(&mut state)?;
    }
    let (clock, mut count) = (Instant::now(), 0);
    while clock.elapsed() < time {
        for _ in 0..100 {
            find(&mut state)?;
            count += 1;
        }
    }
    let seconds = clock.elapsed().as_secs_f64();
    // What it says is right, too.
    let (mut reader, offset) = (store.reader(), messages / 2);
    P::get(&mut reader, offset, |message| {
        content.check(offset, message)
    })?;
    println!(
        "{}",
        serde_json::json!({ "lookups": count, "seconds": seconds, "per_s": f64::from(count) / seconds })
    );
    store.close()
}

fn scan<P: Peer>(store: P, content: &Content, messages: u64, passes: u32) -> Result<()> {
    let mut reader = store.reader();
    let mut seconds = 0.0;
    for _ in 0..passes {
        let clock = Instant::now();
        let mut next = 0;
        P::scan(&mut reader, |offset, message| {
            assert_eq!(offset, next);
            next += 1;
            content.check(offset, message);
        })?;
        assert_eq!(next, messages, "messages are missing");
        seconds = clock.elapsed().as_secs_f64();
    }
    println!(
        "{}",
        serde_json::json!({ "messages": messages, "seconds": seconds, "per_s": messages as f64 / seconds })
    );
    store.close()
}

/// Seconds of CPU that the process has taken, user and system.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|f| f.parse::<f64>().ok());
    (ticks(12).unwrap_or(0.0) + ticks(13).unwrap_or(0.0)) / 100.0
}
