//! Wakes ordinary threads when something became durable.
//!
//! The shards wake one thread, and only while somebody waits; that one has the others look. Invariants: who waits
//! looks after the shards were asked to wake, so nothing is waited for that has come; the shards' loops pay at
//! most one system call each `PAUSE`, however many wait.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::memory::wake::Wake;

/// Least time between two wake-ups.
const PAUSE: Duration = Duration::from_millis(5);
/// Longest sleep of the thread; it wakes nobody.
const SLEEP: Duration = Duration::from_secs(60);

/// Nothing will be waited for any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server is stopping")]
pub(super) struct Stopping;

#[derive(Default)]
struct State {
    waiting: usize,
    /// Grows with every wake-up.
    turn: u64,
    stopped: bool,
}

/// See the module.
pub(super) struct News {
    wake: Arc<Wake>,
    state: Mutex<State>,
    /// Somebody waits, or it is over.
    begun: Condvar,
    /// There was a wake-up, or it is over.
    woken: Condvar,
}

/// The running thread; dropping it ends all waits, and it.
pub(super) struct Running {
    news: Arc<News>,
    thread: Option<JoinHandle<()>>,
}

impl News {
    /// Of shards that have [`News::wake`] among those they wake.
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            wake: Arc::new(Wake::new()?),
            state: Mutex::default(),
            begun: Condvar::new(),
            woken: Condvar::new(),
        }))
    }

    /// For the shards.
    pub(super) fn wake(&self) -> Arc<Wake> {
        Arc::clone(&self.wake)
    }

    /// Starts the thread.
    pub(super) fn start(self: &Arc<Self>) -> io::Result<Running> {
        let news = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name("news".into())
            .spawn(move || news.run())?;
        Ok(Running {
            news: Arc::clone(self),
            thread: Some(thread),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let state = self.lock();
            let waiting = self
                .begun
                .wait_while(state, |state| state.waiting == 0 && !state.stopped);
            if waiting.unwrap_or_else(PoisonError::into_inner).stopped {
                return;
            }
            self.wake.arm();
            let mut state = self.lock();
            if state.stopped {
                return;
            }
            state.turn += 1;
            drop(state);
            self.woken.notify_all();
            self.wake.sleep(&[], SLEEP);
            self.wake.disarm();
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits until `look` finds something, for `time` at most; `None`: it did not.
    pub(super) fn wait<T>(
        &self,
        time: Duration,
        mut look: impl FnMut() -> Option<T>,
    ) -> Result<Option<T>, Stopping> {
        if let Some(found) = look() {
            return Ok(Some(found));
        }
        let until = Instant::now() + time;
        let mut state = self.lock();
        state.waiting += 1;
        self.begun.notify_one();
        let found = loop {
            let (turn, left) = (state.turn, until.saturating_duration_since(Instant::now()));
            if state.stopped {
                break Err(Stopping);
            }
            if left.is_zero() {
                break Ok(None);
            }
            let waited = self
                .woken
                .wait_timeout_while(state, left, |state| state.turn == turn && !state.stopped);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if let Some(found) = look() {
                break Ok(Some(found));
            }
        };
        state.waiting -= 1;
        found
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.news.lock().stopped = true;
        self.news.begun.notify_all();
        self.news.woken.notify_all();
        self.news.wake.wake();
        if let Some(thread) = self.thread.take() {
            // A panicked thread wakes nobody any more; there is nothing left to stop.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

    #[test]
    fn who_waits_misses_nothing_and_the_end_ends_all_waits() {
        let news = News::new().unwrap();
        let running = news.start().unwrap();
        let count = AtomicU64::new(0);
        let hour = Duration::from_secs(3600);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for next in 1..=50 {
                        let look = || (count.load(SeqCst) >= next).then_some(());
                        assert_eq!(news.wait(hour, look), Ok(Some(())));
                    }
                });
            }
            for i in 0..50u64 {
                std::thread::sleep(Duration::from_micros(i * 300));
                count.fetch_add(1, SeqCst);
                news.wake().wake();
            }
        });
        assert_eq!(news.wait(Duration::from_millis(1), || None::<()>), Ok(None));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| news.wait(hour, || None::<()>));
            drop(running);
            assert_eq!(waiter.join().unwrap(), Err(Stopping));
        });
        assert_eq!(news.wait(hour, || None::<()>), Err(Stopping));
    }
}
