//! The loop that every lcore runs, and the order in which the loops end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::backoff::{Backoff, LoopCounters};
use super::release::BufferRelease;
use crate::config::Idle;
use crate::eal::{BURST, lcore};
use crate::memory::wake::Wake;
use crate::net::rx::RxWorker;
use crate::shard::{CloseError, Now, ROUND_MESSAGES, Shard};

/// How long a loop sleeps that messages and changes wake: what the beginning of a stop, which wakes nobody, waits for. A
/// thousandth of a CPU; 1 ms was a hundredth.
const BELL_SLEEP: Duration = Duration::from_millis(20);

/// How long it sleeps while commits are on their way, whose ends wake it: the linger of what waits behind them, which
/// wakes nobody, may come late by so much.
const COMMIT_SLEEP: Duration = Duration::from_micros(200);

/// How far a stop has come.
#[derive(Debug)]
pub(super) struct Phase {
    stopping: AtomicBool,
    receiving: AtomicUsize,
    open_shards: AtomicUsize,
}

impl Phase {
    pub(super) fn new(receivers: usize, shards: usize) -> Self {
        Self {
            stopping: AtomicBool::new(false),
            receiving: AtomicUsize::new(receivers),
            open_shards: AtomicUsize::new(shards),
        }
    }

    /// Begins the stop.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Whether it has begun: receivers receive no more.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// A receiver has stopped pushing to shards.
    pub(super) fn received(&self) {
        self.receiving.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether no shard will answer any more.
    pub(super) fn are_shards_closed(&self) -> bool {
        self.open_shards.load(Ordering::Acquire) == 0
    }
}

/// What one lcore runs.
pub(super) struct LcoreWork {
    rx: Option<RxWorker>,
    shards: Vec<(u16, Shard<BufferRelease>)>,
    idle: Idle,
    /// Wakes it, where all that gives it messages rings.
    bell: Option<Arc<Wake>>,
    counters: Arc<LoopCounters>,
}

/// Reads the clocks once a round.
pub(super) struct Clock(Instant);

impl Clock {
    /// Whose monotonic time begins now.
    pub(super) fn new() -> Self {
        Self(Instant::now())
    }

    #[inline(always)]
    pub(super) fn now(&self) -> Now {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH);
        Now {
            // Nanoseconds fit 64 bits for 584 years.
            mono_ns: self.0.elapsed().as_nanos() as u64,
            unix_ns: unix.map_or(0, |t| t.as_nanos() as i64),
        }
    }
}

impl LcoreWork {
    pub(super) fn new(
        rx: Option<RxWorker>,
        shards: Vec<(u16, Shard<BufferRelease>)>,
        idle: Idle,
        bell: Option<Arc<Wake>>,
    ) -> Self {
        Self {
            rx,
            shards,
            idle,
            bell,
            counters: Arc::default(),
        }
    }

    /// For the statistics.
    pub(super) fn role(&self) -> &'static str {
        match (&self.rx, self.shards.is_empty()) {
            (Some(_), false) => "rx+storage",
            (Some(_), true) => "rx",
            (None, _) => "storage",
        }
    }

    pub(super) fn counters(&self) -> Arc<LoopCounters> {
        Arc::clone(&self.counters)
    }

    /// Polls until the stop, then goes through its phases. Returns what went wrong at the end.
    pub(super) fn run(mut self, phase: &Phase) -> Vec<CloseError> {
        lcore::precise_sleeps();
        let clock = Clock::new();
        let mut backoff = Backoff::new(self.idle);
        let rings: Vec<_> = (self.shards.iter())
            .filter_map(|(_, shard)| shard.wal().map(|wal| wal.ring_fd()))
            .collect();
        while !phase.is_stopping() {
            let mut now = clock.now();
            let mut work = 0;
            // Armed before the last look at the rings.
            let bell = self.bell.as_ref().filter(|_| backoff.may_be_woken());
            if let Some(bell) = bell {
                bell.arm();
            }
            if let Some(rx) = &mut self.rx {
                work += rx.poll(now);
                // Several bursts for each round of the shards, as they have where lcores are spread.
                while !self.shards.is_empty() && (BURST..ROUND_MESSAGES).contains(&work) {
                    now = clock.now();
                    match rx.poll(now) {
                        0 => break,
                        more => work += more,
                    }
                }
            }
            let (mut waiting, mut quiet) = (false, true);
            for (_, shard) in &mut self.shards {
                work += shard.poll(now);
                waiting |= !shard.is_idle();
                quiet &= shard.is_quiet();
            }
            if let Some(bell) = bell {
                if work == 0 {
                    self.counters.sleeps.add(1);
                    match quiet {
                        true => bell.sleep(&[], BELL_SLEEP),
                        false => bell.sleep(&rings, COMMIT_SLEEP),
                    }
                }
                bell.disarm();
                if work == 0 {
                    continue;
                }
            }
            backoff.after_round(work, waiting, &self.counters);
        }

        if let Some(rx) = &mut self.rx {
            rx.finish(clock.now());
            phase.received();
        }
        // Shards close once nobody pushes to them any more; until then they go on, so that rings move.
        while phase.receiving.load(Ordering::Acquire) > 0 {
            for (_, shard) in &mut self.shards {
                shard.poll(clock.now());
            }
            std::hint::spin_loop();
        }
        let mut errors = Vec::new();
        for (number, mut shard) in self.shards.drain(..) {
            if let Err(error) = shard.drain_and_close(|| clock.now()) {
                tracing::error!("shard {number}: {error}");
                errors.push(error);
            }
            phase.open_shards.fetch_sub(1, Ordering::AcqRel);
        }
        if let Some(rx) = &mut self.rx {
            loop {
                let last = phase.are_shards_closed();
                while rx.send_acks() > 0 {}
                if last {
                    break;
                }
                std::hint::spin_loop();
            }
        }
        errors
    }
}
