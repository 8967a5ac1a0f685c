//! A shard's log and store as a plain struct, for whoever wants them without a server: tests, tools, comparisons.
//!
//! Made of what a server's shard is made of: [`WalWriter`], [`Store`], [`Maintainer`], [`LogReader`]. One thread writes; others
//! read through [`Engine::reader`]. Invariants: reads see what is durable, that is what was written before the last
//! [`Engine::sync`] and perhaps more; a batch is there as a whole or not at all; a call that fails has written nothing; offsets go
//! on where they were, also after a kill. A folder is an engine's or a server's: an engine has no catalog, and would forget a
//! server's producers.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::catalog::{CATALOG_FILE, LOCK_FILE, lock_file};
use super::lsm::cache::CacheStats;
use super::lsm::rebatch::DEFAULT_TARGET;
use super::lsm::{
    MaintainConfig, Maintainer, Maintenance, Merger, Policy, Store, StoreError, StoreMemory,
};
use super::reader::KeyRange;
use super::wal::segment::shard_dir;
use super::wal::snapshot::{self, Item, PART_MAX, PARTITIONS_A_PART, PartWriter};
use super::wal::{LogId, RecoveryReport, Replay};
use super::{KeyBounds, LogReader, Message, Outcome, PartitionKey, ReadError, Refusal};
use super::{WalConfig, WalError, WalShared, WalState, WalWriter};
use crate::wire::record_batch::{self, BatchWriter, HEADER_LEN, RAW_RECORD_OVERHEAD_MAX, Record};

/// An engine is a store's only shard.
const SHARD: u16 = 0;
/// Most that a record takes in a batch beside its key and value.
pub const RECORD_OVERHEAD: usize = RAW_RECORD_OVERHEAD_MAX + 4;
/// How long a writer sleeps that waits for the disk or for a segment to be prepared.
const PATIENCE: Duration = Duration::from_micros(100);

type Ends = HashMap<PartitionKey, i64, foldhash::fast::RandomState>;

/// Why an engine refuses.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The log cannot be opened, or a write has failed: then it takes nothing more.
    #[error("{0}")]
    Wal(#[from] WalError),
    /// The SSTs cannot be opened, written or merged.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// Nothing could be read.
    #[error("{0}")]
    Read(#[from] ReadError),
    /// The disk is full: make room, and write again.
    #[error("{dir}: the disk is full; make room and write again")]
    Full {
        /// The engine's folder.
        dir: PathBuf,
    },
    /// More than fits a commit.
    #[error(
        "a batch of {bytes} bytes is larger than a commit, {most}: write fewer records at a time"
    )]
    TooLarge {
        /// What it may take, [`RECORD_OVERHEAD`] bytes a record beside keys and values.
        bytes: usize,
        /// What it may take at most.
        most: usize,
    },
    /// A batch of no records.
    #[error("a batch has at least one record")]
    Empty,
    /// Somebody else has the folder open.
    #[error("{dir} is in use by another engine or server")]
    Locked {
        /// The engine's folder.
        dir: PathBuf,
    },
    /// The folder is a server's.
    #[error(
        "{dir} is a server's store: start a server on it, or give the engine a folder of its own"
    )]
    Foreign {
        /// The folder.
        dir: PathBuf,
    },
    /// The operating system refused.
    #[error("{what} {dir}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The engine's folder.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// How an engine works.
#[derive(Clone)]
pub struct EngineConfig {
    /// Folder, store id, sizes and memory of the log; where the SSTs end is found out.
    pub wal: WalConfig,
    /// What the SSTs may take of memory.
    pub memory: StoreMemory,
    /// What is to become of each topic.
    pub maintain: MaintainConfig,
    /// Flushes and merges on two threads, as a server does; false: only [`Engine::compact`] does.
    pub threads: bool,
}

impl EngineConfig {
    /// With the server's sizes and threads, and one policy for all topics.
    pub fn new(dir: impl Into<PathBuf>, store_id: u128, policy: Policy) -> EngineConfig {
        EngineConfig {
            wal: WalConfig::new(dir, store_id),
            memory: StoreMemory::default(),
            maintain: MaintainConfig {
                batch_target: DEFAULT_TARGET,
                policies: Arc::new(move |_| policy.clone()),
                started: Arc::new(|_, _| {}),
            },
            threads: true,
        }
    }
}

/// A record to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewRecord<'a> {
    /// Its time, Unix ms.
    pub timestamp: i64,
    /// Its key.
    pub key: Option<&'a [u8]>,
    /// Its value; `None`: a tombstone.
    pub value: Option<&'a [u8]>,
}

/// What an engine holds, and has done since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Partitions that were ever written to.
    pub partitions: u64,
    /// Group commits, and their bytes.
    pub commits: u64,
    /// See `commits`.
    pub committed_bytes: u64,
    /// The log is durable up to here …
    pub durable_lsn: u64,
    /// … and in SSTs up to here.
    pub flushed_lsn: u64,
    /// SSTs, their bytes, and records in them.
    pub ssts: u64,
    /// See `ssts`.
    pub sst_bytes: u64,
    /// See `ssts`.
    pub sst_records: u64,
    /// Segments flushed.
    pub flushes: u64,
    /// Merges, and bytes of SSTs that flushes and merges wrote.
    pub merges: u64,
    /// See `merges`.
    pub written_bytes: u64,
    /// Records that compaction by key dropped.
    pub records_compacted: u64,
    /// Records that retention dropped.
    pub records_expired: u64,
    /// Blocks found damaged.
    pub damaged_blocks: u64,
    /// The cache of decompressed blocks.
    pub cache: CacheStats,
}

/// See the module.
pub struct Engine {
    /// `None`: nobody flushes and merges but [`Engine::compact`].
    maintainer: Option<Maintainer>,
    wal: WalWriter,
    shared: Arc<WalShared>,
    store: Arc<Store>,
    reader: LogReader,
    /// The offset behind each partition's last record.
    ends: Ends,
    config: EngineConfig,
    recovery: RecoveryReport,
    opened: Instant,
    /// Batches may have been written since the segment began.
    used: bool,
    _lock: File,
}

/// What the log says of where partitions end.
#[derive(Default)]
struct Recovered {
    ends: Ends,
    /// There is something in it that no engine wrote.
    foreign: bool,
}

impl Recovered {
    fn end(&mut self, key: PartitionKey, end: i64) {
        let known = self.ends.entry(key).or_insert(end);
        *known = end.max(*known);
    }
}

impl Replay for Recovered {
    fn snapshot(&mut self, part: &[u8], _: u32, _: u32) {
        let Some(items) = snapshot::parse(part) else {
            self.foreign = true;
            return;
        };
        for item in items {
            match item {
                Item::Partition(key, end) => self.end(key, end),
                Item::Producer { .. } => self.foreign = true,
            }
        }
    }

    fn batch(&mut self, key: PartitionKey, batch: &[u8]) {
        if let Ok(header) = record_batch::parse_whole(batch) {
            self.end(key, header.next_offset());
        }
    }
}

impl Engine {
    /// Opens the engine in a folder, or makes one. Cost: as recovering the log and opening the store.
    pub fn open(config: EngineConfig) -> Result<Engine, EngineError> {
        let dir = config.wal.dir.clone();
        let io = |what| {
            let dir = dir.clone();
            move |source| EngineError::Io { what, dir, source }
        };
        fs::create_dir_all(&dir).map_err(io("cannot make the folder"))?;
        // As for a server's store: before anything in it is touched.
        let lock = lock_file(&dir.join(LOCK_FILE)).map_err(io("cannot lock"))?;
        let lock = lock.ok_or_else(|| EngineError::Locked { dir: dir.clone() })?;
        if dir.join(CATALOG_FILE).exists() {
            return Err(EngineError::Foreign { dir });
        }
        let id = LogId {
            store: config.wal.store_id,
            shard: SHARD,
        };
        let store = Store::open_within(&shard_dir(&dir, SHARD), id, config.memory.clone())?;
        let view = store.view();
        let wal_config = WalConfig {
            flushed_lsn: view.flushed_lsn,
            ..config.wal.clone()
        };
        let mut recovered = Recovered::default();
        let (wal, shared, recovery) = WalWriter::open(&wal_config, SHARD, &mut recovered)?;
        if recovered.foreign {
            return Err(EngineError::Foreign { dir });
        }
        for (key, extents) in view.partitions() {
            recovered.end(key, extents.last().map_or(0, |extent| extent.end));
        }
        for (key, start) in view.starts() {
            recovered.end(key, start);
        }
        let mut engine = Engine {
            maintainer: None,
            reader: LogReader::with_store(Arc::clone(&shared), Arc::clone(&store)),
            wal,
            shared,
            store,
            used: !recovered.ends.is_empty(),
            ends: recovered.ends,
            config,
            recovery,
            opened: Instant::now(),
            _lock: lock,
        };
        engine.snapshot()?;
        engine.maintain()?;
        Ok(engine)
    }

    /// Starts the threads, where there are to be any.
    fn maintain(&mut self) -> Result<(), EngineError> {
        if self.config.threads {
            let (store, shared) = (Arc::clone(&self.store), Arc::clone(&self.shared));
            let started = Maintainer::start(store, shared, self.config.maintain.clone());
            self.maintainer = Some(started.map_err(|source| EngineError::Io {
                what: "cannot start a thread for",
                dir: self.config.wal.dir.clone(),
                source,
            })?);
        }
        Ok(())
    }

    /// What was found, kept and cut off when it was opened.
    pub fn recovery(&self) -> &RecoveryReport {
        &self.recovery
    }

    /// Writes a record; gives its offset. It survives the process from now on, a power cut after the next [`Engine::sync`].
    pub fn write(&mut self, key: PartitionKey, record: NewRecord) -> Result<i64, EngineError> {
        self.write_batch(key, &[record])
    }

    /// Writes records as one batch; gives the offset of the first. It survives the process from now on, a power cut after the
    /// next [`Engine::sync`]. Waits where the disk does not keep up.
    pub fn write_batch(
        &mut self,
        key: PartitionKey,
        records: &[NewRecord],
    ) -> Result<i64, EngineError> {
        let first = records.first().ok_or(EngineError::Empty)?;
        let field = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        let room = |r: &NewRecord| field(r.key) + field(r.value) + RECORD_OVERHEAD;
        let room = HEADER_LEN + records.iter().map(room).sum::<usize>();
        // Of a segment that the last write began; with this one an error would come too late.
        self.snapshot()?;
        let offset = self.ends.get(&key).copied().unwrap_or(0);
        let mut writer = BatchWriter::new(self.reserve(room)?, first.timestamp);
        for record in records {
            writer
                .push(record.timestamp, record.key, record.value)
                .expect("there is room for all");
        }
        let len = writer.finish(offset);
        self.wal.publish(key, len);
        self.ends.insert(key, offset + records.len() as i64);
        self.used = true;
        self.poll(true);
        Ok(offset)
    }

    /// Room in the log; waits for the disk where it must.
    fn reserve(&mut self, len: usize) -> Result<&mut [u8], EngineError> {
        loop {
            match self.wal.reserve(len) {
                // Taken below, which the borrow checker understands; nothing is between.
                Ok(_) => break,
                Err(Refusal::Backpressure) => self.wait(),
                Err(refusal) => return Err(self.refused(refusal, len)),
            }
        }
        let most = self.wal.max_entry();
        self.wal
            .reserve(len)
            .map_err(|_| EngineError::TooLarge { bytes: len, most })
    }

    fn refused(&self, refusal: Refusal, bytes: usize) -> EngineError {
        match refusal {
            Refusal::TooLarge => EngineError::TooLarge {
                bytes,
                most: self.wal.max_entry(),
            },
            Refusal::Full | Refusal::Backpressure => EngineError::Full {
                dir: self.config.wal.dir.clone(),
            },
            Refusal::Failed => EngineError::Wal(WalError::Failed {
                reason: self.shared.reason().unwrap_or_default(),
            }),
        }
    }

    /// Reaps and submits commits; `loaded`: more will be written.
    fn poll(&mut self, loaded: bool) -> usize {
        let now = self.opened.elapsed().as_nanos() as u64;
        self.wal.poll(now, loaded)
    }

    fn wait(&mut self) {
        if self.poll(false) == 0 {
            if self.wal.in_flight() == 0 {
                // A segment is being prepared.
                std::thread::sleep(PATIENCE);
            }
            self.wal.wait(PATIENCE);
        }
    }

    /// Writes where partitions end, where a segment has begun.
    fn snapshot(&mut self) -> Result<(), EngineError> {
        if !self.wal.needs_snapshot() {
            return Ok(());
        }
        let ends: Vec<_> = self.ends.iter().map(|(&key, &end)| (key, end)).collect();
        let mut parts: Vec<&[_]> = ends.chunks(PARTITIONS_A_PART).collect();
        if parts.is_empty() {
            parts.push(&[]);
        }
        let count = parts.len() as u32;
        for (part, index) in parts.into_iter().zip(0..) {
            let mut writer = PartWriter::new(self.reserve(PART_MAX)?);
            for &(key, end) in part {
                writer.partition(key, end);
            }
            let len = writer.finish();
            self.wal.publish_snapshot(index, count, len);
        }
        Ok(())
    }

    /// Waits until everything that was written is on disk.
    pub fn sync(&mut self) -> Result<(), EngineError> {
        self.snapshot()?;
        Ok(self.wal.flush()?)
    }

    /// Ends the log's segment, so that what is in it can move into SSTs; syncs. Segments end by themselves when they are full.
    /// Nothing happens where nothing was written since the last time.
    pub fn rotate(&mut self) -> Result<(), EngineError> {
        self.sync()?;
        if !self.used {
            return Ok(());
        }
        loop {
            match self.wal.end_segment() {
                Ok(true) => break,
                Ok(false) => self.wait(),
                Err(refusal) => return Err(self.refused(refusal, 0)),
            }
        }
        self.used = false;
        self.sync()
    }

    /// Flushes the segments that have ended, drops what retention lets go, and merges SSTs, until there is nothing to do; all
    /// of it on this thread and at full speed. A merge that one of the engine's own threads was at begins again.
    pub fn compact(&mut self) -> Result<(), EngineError> {
        // One maintains at a time.
        self.maintainer = None;
        let done = self.compact_here();
        self.maintain()?;
        Ok(done?)
    }

    fn compact_here(&self) -> Result<(), StoreError> {
        let (store, config) = (&self.store, &self.config.maintain);
        let shared = Arc::clone(&self.shared);
        let mut maintenance = Maintenance::new(Arc::clone(store), shared, config.clone()).hurried();
        let (policies, target) = (Arc::clone(&config.policies), config.batch_target);
        let mut merger = Merger::new(Arc::clone(store), policies, target, Arc::default()).hurried();
        while maintenance.step()? || merger.step()? {}
        Ok(())
    }

    /// A reader for another thread, with all that can be read: ranges of offsets, times, keys.
    pub fn reader(&self) -> LogReader {
        LogReader::with_store(Arc::clone(&self.shared), Arc::clone(&self.store))
    }

    /// The record at `offset`; `None`: there is none.
    pub fn read(&mut self, key: PartitionKey, offset: i64) -> Result<Option<Message>, EngineError> {
        Ok(self.reader.message(key, offset)?)
    }

    /// Appends whole record batches to `out`: see [`LogReader::read`].
    pub fn read_batch(
        &mut self,
        key: PartitionKey,
        from: i64,
        max_bytes: usize,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, EngineError> {
        Ok(self.reader.read(key, from, max_bytes, out)?)
    }

    /// The first offset of a partition, and the one behind its last durable record.
    pub fn bounds(&mut self, key: PartitionKey) -> Result<(i64, i64), EngineError> {
        Ok(self.reader.bounds(key)?)
    }

    /// The newest record with this key.
    pub fn lookup(
        &mut self,
        key: PartitionKey,
        wanted: &[u8],
    ) -> Result<Option<Message>, EngineError> {
        Ok(self.reader.newest(key, wanted)?)
    }

    /// Hands the records with this key to `take`, oldest first: see [`LogReader::history`].
    pub fn history(
        &mut self,
        key: PartitionKey,
        wanted: &[u8],
        from: i64,
        take: impl FnMut(&Record<'_>) -> bool,
    ) -> Result<Option<i64>, EngineError> {
        Ok(self.reader.history(key, wanted, from, take)?)
    }

    /// The keys between `bounds` in order, with their newest offsets.
    pub fn range(&mut self, key: PartitionKey, bounds: KeyBounds) -> KeyRange<'_> {
        self.reader.range(key, bounds)
    }

    /// Whether it takes records.
    pub fn state(&self) -> WalState {
        self.wal.state()
    }

    /// What it holds, and has done.
    pub fn statistics(&self) -> EngineStats {
        let (view, stats) = (self.store.view(), &self.store.stats);
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        EngineStats {
            partitions: self.ends.len() as u64,
            commits: self.shared.commits.get(),
            committed_bytes: self.shared.committed_bytes.get(),
            durable_lsn: self.shared.durable_lsn(),
            flushed_lsn: view.flushed_lsn,
            ssts: view.files.len() as u64,
            sst_bytes: view.files.iter().map(|file| file.meta.bytes).sum(),
            sst_records: view.files.iter().map(|file| file.meta.records).sum(),
            flushes: count(&stats.flushes),
            merges: count(&stats.merges),
            written_bytes: count(&stats.flush_written_bytes) + count(&stats.merge_written_bytes),
            records_compacted: count(&stats.records_compacted),
            records_expired: count(&stats.records_expired),
            damaged_blocks: count(&stats.damaged_blocks),
            cache: self.store.cache().stats(),
        }
    }

    /// Stops the threads, syncs, and marks the log as cleanly closed. Dropped without it, an engine is like a killed process.
    pub fn close(mut self) -> Result<(), EngineError> {
        self.maintainer = None;
        self.sync()?;
        Ok(self.wal.close()?)
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
