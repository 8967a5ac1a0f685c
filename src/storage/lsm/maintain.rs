//! The threads that move a shard's messages from its log into SSTs and drop what retention lets go, and that merge
//! SSTs. Ordinary threads of low priority; never an lcore. There are two of them, since a merge takes long and the log
//! does not wait.
//!
//! Invariant: whatever a step made is durable and in the manifest before what it was made of goes. A kill between
//! any two steps costs work, nothing else.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::effect::Effects;
use super::error::StoreError;
use super::flush::{flush, unix_ms};
use super::manifest::Edit;
use super::merge::Merger;
use super::pace::Pace;
use super::policy::Policies;
use super::retain::{expired, unneeded};
use super::store::Store;
use crate::storage::PartitionKey;
use crate::storage::wal::WalShared;
use crate::storage::wal::segment::{SEGMENT_HEADER, list_segments, segment_path};

/// How often the thread looks for work: a disk of 2.5 GB/s fills a segment of 256 MiB in about this time.
const PERIOD: Duration = Duration::from_millis(100);
/// After an error the next attempt waits: a full disk does not empty itself sooner.
const RETRY: Duration = Duration::from_secs(2);
/// So many segments behind, flushing goes at full speed: the log must not grow without end.
const BEHIND: usize = 3;
/// How often retention is looked at: a pass over all partitions, for what is counted in hours.
const RETAIN_PERIOD: Duration = Duration::from_secs(1);
/// How often a merge is looked for: a pass over all partitions' extents, and files come seldom.
const MERGE_PERIOD: Duration = Duration::from_secs(1);
/// Nice value of the thread: what the messages leave of the CPU.
const NICE: i32 = 10;

/// Takes the first offset of a partition.
pub type Started = Arc<dyn Fn(PartitionKey, i64) + Send + Sync>;

/// What maintenance needs to know.
#[derive(Clone)]
pub struct MaintainConfig {
    /// Bytes of records in a merged batch.
    pub batch_target: usize,
    /// What is to become of each topic.
    pub policies: Policies,
    /// Is told where each partition begins that does not begin at 0, at the start and when it changes.
    pub started: Started,
}

/// The running threads; they stop when it is dropped.
pub struct Maintainer {
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Stop {
    stop: Arc<AtomicBool>,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Stop {
    fn sleep(&self, time: Duration) {
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.stop.load(Ordering::Acquire) {
            let _unlocked = self.wake.wait_timeout(guard, time);
        }
    }

    /// Starts a thread that steps, and sleeps for `idle` where there is nothing to do.
    fn spawn(
        self: &Arc<Self>,
        name: &str,
        shard: u16,
        idle: Duration,
        mut step: impl FnMut() -> Result<bool, StoreError> + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let stop = Arc::clone(self);
        std::thread::Builder::new()
            .name(format!("{name}-{shard}"))
            .spawn(move || {
                lower_priority();
                let mut said = String::new();
                while !stop.stop.load(Ordering::Acquire) {
                    match step() {
                        Ok(true) => said.clear(),
                        Ok(false) => stop.sleep(idle),
                        Err(error) => {
                            let text = error.to_string();
                            if text != said {
                                tracing::error!(
                                    shard,
                                    "cannot tidy the store: {text}; trying again"
                                );
                                said = text;
                            }
                            stop.sleep(RETRY);
                        }
                    }
                }
            })
    }
}

impl Maintainer {
    /// Starts the threads for a shard.
    pub fn start(
        store: Arc<Store>,
        wal: Arc<WalShared>,
        config: MaintainConfig,
    ) -> io::Result<Maintainer> {
        let mut maintainer = Maintainer {
            stop: Arc::default(),
            threads: Vec::new(),
        };
        let stop = &maintainer.stop;
        let mut merger = Merger::new(
            Arc::clone(&store),
            Arc::clone(&config.policies),
            config.batch_target,
            Arc::clone(&stop.stop),
        );
        let shard = store.id().shard;
        let mut maintenance = Maintenance::new(store, wal, config);
        let flush = stop.spawn("store", shard, PERIOD, move || maintenance.step())?;
        maintainer.threads.push(flush);
        let merge = maintainer
            .stop
            .spawn("merge", shard, MERGE_PERIOD, move || merger.step())?;
        maintainer.threads.push(merge);
        Ok(maintainer)
    }
}

impl Drop for Maintainer {
    fn drop(&mut self) {
        {
            let _guard = self
                .stop
                .lock
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            self.stop.stop.store(true, Ordering::Release);
        }
        self.stop.wake.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The work of flushing and retention, step by step; the thread's, or a test's.
pub struct Maintenance {
    store: Arc<Store>,
    wal: Arc<WalShared>,
    config: MaintainConfig,
    /// At full speed.
    hurry: bool,
    /// What compression does in each partition.
    effects: Effects,
    /// When retention was last looked at.
    retained: Option<Instant>,
}

impl Maintenance {
    /// Of a shard whose log has been opened.
    pub fn new(store: Arc<Store>, wal: Arc<WalShared>, config: MaintainConfig) -> Maintenance {
        for (key, start) in store.view().starts() {
            (config.started)(key, start);
        }
        Maintenance {
            store,
            wal,
            config,
            hurry: false,
            effects: Effects::default(),
            retained: None,
        }
    }

    /// At full speed: nobody has to be left CPU and disk to.
    pub fn hurried(mut self) -> Maintenance {
        self.hurry = true;
        self
    }

    /// Does the most urgent thing there is to do; false: nothing. Cost: up to a segment's flush.
    pub fn step(&mut self) -> Result<bool, StoreError> {
        let dir = self.store.dir().to_owned();
        let bases = list_segments(&dir).map_err(StoreError::io("cannot list", &dir))?;
        let recycled = self.recycle(&bases)?;
        Ok(self.flush_next(&bases)? || self.retain()? || recycled)
    }

    /// Moves partitions' starts as retention asks, and removes the files that are left without a message.
    fn retain(&mut self) -> Result<bool, StoreError> {
        if self
            .retained
            .is_some_and(|last| last.elapsed() < RETAIN_PERIOD)
        {
            return Ok(false);
        }
        self.retained = Some(Instant::now());
        let policies = Arc::clone(&self.config.policies);
        for topic in self.wal.index().topics() {
            if policies(topic).indexed {
                self.wal.keys().want(topic);
            }
        }
        let trims = expired(&self.store, &self.store.view(), unix_ms(), &mut |topic| {
            policies(topic)
        })?;
        let any = !trims.is_empty() | self.store.note_damage()?;
        if !trims.is_empty() {
            let edit = Edit::Trim(trims);
            self.store.commit(&edit)?;
            if let Edit::Trim(trims) = edit {
                trims
                    .iter()
                    .for_each(|&(key, start)| (self.config.started)(key, start));
            }
        }
        let view = self.store.view();
        if let Some(edit) = unneeded(&view) {
            if let Edit::Replace { remove, .. } = &edit {
                let gone = view
                    .files
                    .iter()
                    .filter(|f| remove.contains(&f.meta.number));
                let records = gone.map(|file| file.meta.records).sum();
                let stats = &self.store.stats;
                stats.records_expired.fetch_add(records, Ordering::Relaxed);
            }
            self.store.commit(&edit)?;
        }
        Ok(any)
    }

    /// Flushes the oldest sealed segment.
    fn flush_next(&mut self, bases: &[u64]) -> Result<bool, StoreError> {
        let flushed = self.store.view().flushed_lsn;
        let durable = self.wal.durable_lsn();
        // Sealed: a frame of the next segment is durable.
        let sealed: Vec<u64> = bases
            .windows(2)
            .filter(|pair| pair[0] >= flushed && durable > pair[1] + SEGMENT_HEADER as u64)
            .map(|pair| pair[0])
            .collect();
        let behind = sealed.len() >= BEHIND;
        self.store.behind.store(behind, Ordering::Relaxed);
        let Some(&base) = sealed.first() else {
            return Ok(false);
        };
        let cpu = cpu_ns();
        let mut pace = Pace::new(behind || self.hurry);
        let policies = Arc::clone(&self.config.policies);
        let done = flush(
            &self.store,
            base,
            self.config.batch_target,
            &mut |topic| policies(topic),
            &mut self.effects,
            &mut pace,
        )?;
        let stats = &self.store.stats;
        let written = done.files.iter().map(|file| file.bytes).sum();
        self.store.commit(&Edit::Flush {
            add: done.files,
            flushed_lsn: done.end_lsn,
        })?;
        stats.flushes.fetch_add(1, Ordering::Relaxed);
        stats
            .flush_read_bytes
            .fetch_add(done.end_lsn - base, Ordering::Relaxed);
        stats
            .flush_written_bytes
            .fetch_add(written, Ordering::Relaxed);
        stats
            .flush_cpu_ns
            .fetch_add(cpu_ns().saturating_sub(cpu), Ordering::Relaxed);
        if done.invalid > 0 {
            tracing::error!(
                path = %segment_path(self.store.dir(), base).display(),
                "{} entries are no valid record batches and were left out", done.invalid
            );
        }
        if !done.damage.is_empty() {
            // What could not be read stays for whoever can make something of it.
            let path = segment_path(self.store.dir(), base);
            let kept = path.with_extension("seg.damaged");
            std::fs::rename(&path, &kept).map_err(StoreError::io("cannot rename", &path))?;
            tracing::error!(
                "the rest of the segment is in SSTs; it is kept as {}",
                kept.display()
            );
        }
        // From here on readers look for it in the SST.
        self.wal.index().release(done.end_lsn);
        Ok(true)
    }

    /// Gives flushed segments that recovery does not need to the log again.
    fn recycle(&self, bases: &[u64]) -> Result<bool, StoreError> {
        let flushed = self.store.view().flushed_lsn;
        let needed = self.wal.index().release(flushed).min(self.wal.checkpoint());
        let mut any = false;
        for pair in bases.windows(2) {
            let (base, end) = (pair[0], pair[1]);
            if end > flushed || end > needed {
                break;
            }
            let path = segment_path(self.store.dir(), base);
            self.wal
                .recycle(base)
                .map_err(StoreError::io("cannot recycle", &path))?;
            any = true;
        }
        Ok(any)
    }
}

/// CPU time of this thread, in ns.
pub(super) fn cpu_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a timespec to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Lets the messages have the CPU first. Without the right to, it stays as it was.
fn lower_priority() {
    // SAFETY: changes the calling thread's nice value alone; touches no memory.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::gettid() as libc::id_t, NICE) };
}
