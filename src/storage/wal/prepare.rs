//! The thread that keeps segments ready, so that the writer never waits for the file system.
//!
//! Invariant: what the writer takes is preallocated, was written once (with real zeros, or as an older
//! segment), and is durable with its final name and a blank header. A disk without room is retried every `RETRY`; the writer meanwhile
//! refuses when it has used up what is ready.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;

use super::segment::{ZERO_BLOCK, create_zeroed, reuse, segment_path};
use super::shared::WalShared;

/// How often a full disk is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// The queue is looked at at least this often; the writer also wakes the thread.
const PERIOD: Duration = Duration::from_millis(500);

/// What a commit can wait for behind the zeros while there is time: 0.4 ms of a disk of 600 MB/s.
const SMALL_BLOCK: usize = 256 << 10;
/// A pause where there is much time: 12 MB/s are left to the zeros.
const CRAWL: Duration = Duration::from_millis(20);
/// A pause beside an idle log, in times that the write took: an eighth of the disk's time is left to the zeros. With all of it
/// single messages were read half as fast for the first seconds after a start.
const IDLE_PAUSE: u32 = 7;

/// A segment ready for the writer.
pub(crate) struct Prepared {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    pub(crate) base: u64,
    pub(crate) size: u64,
    /// It was an older segment.
    pub(crate) reused: bool,
}

/// The writer's end.
pub(crate) struct Preparer {
    queue: Arc<ArrayQueue<Prepared>>,
    stop: Arc<AtomicBool>,
    thread: Thread,
    handle: Option<JoinHandle<()>>,
}

impl Preparer {
    /// Starts the thread; it prepares segments of `size` bytes from `next_base` on, `count` ahead.
    pub(crate) fn start(
        shared: Arc<WalShared>,
        next_base: u64,
        size: u64,
        count: usize,
    ) -> io::Result<Preparer> {
        let queue = Arc::new(ArrayQueue::new(count.max(1)));
        let stop = Arc::new(AtomicBool::new(false));
        let handle = thread::Builder::new()
            .name(format!("wal-prepare-{}", shared.id().shard))
            .spawn({
                let (queue, stop) = (Arc::clone(&queue), Arc::clone(&stop));
                move || run(&shared, &queue, &stop, next_base, size)
            })?;
        Ok(Preparer {
            queue,
            stop,
            thread: handle.thread().clone(),
            handle: Some(handle),
        })
    }

    /// Takes the next segment, if one is ready. Once a segment: wakes the thread.
    pub(crate) fn take(&self) -> Option<Prepared> {
        let prepared = self.queue.pop()?;
        self.thread.unpark();
        Some(prepared)
    }

    pub(crate) fn ready(&self) -> usize {
        self.queue.len()
    }
}

impl Drop for Preparer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.unpark();
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}

/// How fast zeros are written: the log, whose commits wait behind them in the disk's queue, leaves the more to them the
/// nearer it comes to needing the segment. Where it is idle they take a part of the disk's time: a server that has just started
/// may be read from.
struct Pace {
    durable: u64,
}

impl Pace {
    /// How long to wait, and how much to write then, where `left` bytes are missing of the segment of `size` bytes at
    /// `base`, the log is durable up to `durable`, and the last write took `took`.
    fn next(
        &mut self,
        took: Duration,
        durable: u64,
        base: u64,
        size: u64,
        left: u64,
    ) -> (Duration, usize) {
        let idle = std::mem::replace(&mut self.durable, durable) == durable;
        // The log needs the segment after so many bytes more than are missing of it.
        let lead = base.saturating_sub(durable).saturating_sub(left);
        if lead < size / 8 {
            (Duration::ZERO, ZERO_BLOCK)
        } else if idle {
            ((took * IDLE_PAUSE).min(CRAWL), SMALL_BLOCK)
        } else if lead < size / 4 {
            ((took * 3).min(CRAWL), SMALL_BLOCK)
        } else {
            (CRAWL, SMALL_BLOCK)
        }
    }
}

fn run(
    shared: &WalShared,
    queue: &ArrayQueue<Prepared>,
    stop: &AtomicBool,
    mut base: u64,
    size: u64,
) {
    while !stop.load(Ordering::Relaxed) {
        if queue.is_full() {
            thread::park_timeout(PERIOD);
            continue;
        }
        let path = segment_path(shared.dir(), base);
        let mut pace = Pace {
            durable: shared.durable_lsn(),
        };
        let mut written = Instant::now();
        let old = match shared.take_recycled() {
            // What is wrong with it is no reason not to make a new one.
            Some(spare) => reuse(&spare, &path, size).unwrap_or_else(|error| {
                tracing::warn!(spare = %spare.display(), "not used again: {error}");
                None
            }),
            None => None,
        };
        let reused = old.is_some();
        let made = match old {
            Some(file) => Ok(file),
            None => create_zeroed(&path, size, |left| {
                let durable = shared.durable_lsn();
                let (wait, block) = pace.next(written.elapsed(), durable, base, size, left);
                thread::sleep(wait);
                written = Instant::now();
                (!stop.load(Ordering::Relaxed)).then_some(block)
            }),
        };
        match made {
            Ok(file) => {
                shared.set_prepare_error(None);
                let _ = queue.push(Prepared {
                    file,
                    path,
                    base,
                    size,
                    reused,
                });
                base += size;
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::Interrupted {
                    shared.set_prepare_error(Some(format!("{}: {error}", path.display())));
                }
                if !stop.load(Ordering::Relaxed) {
                    thread::park_timeout(RETRY);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_leave_the_disk_to_commits_and_are_ready_in_time() {
        const SIZE: u64 = 256 << 20;
        // What the disk writes while a commit of the log is written: the log takes all that is left to it.
        for log in [0, 4 << 10, 64 << 10, 768 << 10] {
            let mut pace = Pace { durable: 1 };
            let (mut durable, base, mut left) = (1, SIZE, SIZE);
            let mut slowed = false;
            while left > 0 {
                let took = Duration::from_micros(100);
                let (wait, block) = pace.next(took, durable, base, SIZE, left);
                if log == 0 {
                    // All of the disk's time until there is a lead, and then an eighth of it.
                    let eighth = wait == took * IDLE_PAUSE && block == SMALL_BLOCK;
                    assert!(eighth || !slowed && wait.is_zero());
                }
                slowed |= !wait.is_zero();
                left -= (block as u64).min(left);
                // A pause lets the log have the disk for itself.
                let commits = 1 + wait.as_micros() as u64 / 1000;
                durable += log * commits;
                assert!(durable < base, "the log waits for its segment");
            }
            assert!(slowed);
        }
    }
}
