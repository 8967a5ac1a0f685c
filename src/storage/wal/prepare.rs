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

use super::segment::{create_zeroed, reuse, segment_path};
use super::shared::WalShared;

/// How often a full disk is tried again.
const RETRY: Duration = Duration::from_millis(200);
/// The queue is looked at at least this often; the writer also wakes the thread.
const PERIOD: Duration = Duration::from_millis(500);

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
            None => create_zeroed(&path, size, || {
                // With one segment in hand there is time: leave half of the disk to the commits.
                if !queue.is_empty() {
                    thread::sleep(written.elapsed().min(Duration::from_millis(20)));
                }
                written = Instant::now();
                !stop.load(Ordering::Relaxed)
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
