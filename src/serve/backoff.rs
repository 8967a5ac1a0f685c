//! What a poll loop does when it finds nothing, and what it counts.
//!
//! An idle loop spins for a bounded number of rounds, then pauses between rounds, then sleeps, longer
//! each time up to `MAX_SLEEP`; one round with work brings it back to spinning. A loop that waits
//! for its own disk writes offers its CPU instead of pausing, whatever its mode: the kernel ends a synced write by a
//! worker thread of the CPU that submitted it, and behind a loop that only spins that thread waits for the scheduler's
//! next turn, some 2.3 ms. It sleeps, too, when the disk takes longer than a disk with a protected cache does: on a
//! virtual machine the disk is a thread of the host's, which a CPU that spins may keep from running
//! (docs/performance.md, "Waiting for the disk").

use std::time::Duration;

use crate::config::Idle;
use crate::eal;
use crate::telemetry::Counter;

/// Rounds without work before the loop pauses; a round without work takes some tens of nanoseconds,
/// so this spins for about 20 µs: longer than the gaps of any busy stream.
const SPIN_ROUNDS: u32 = 512;
/// Rounds with pauses before the loop sleeps: about another 100 µs.
const PAUSE_ROUNDS: u32 = 64;
/// Rounds in which a loop that waits for the disk gives its CPU away before it sleeps: some 100 µs, in which a disk
/// with a protected cache has answered.
const YIELD_ROUNDS: u32 = 256;
/// Pause instructions in such a round; one takes 40 to 140 cycles.
const PAUSES: u32 = 32;
/// First sleep.
const MIN_SLEEP: Duration = Duration::from_micros(2);
/// Rounds without work before a loop sleeps that messages wake: a few microseconds, less than being woken takes.
const BELL_ROUNDS: u32 = 64;
/// Longest sleep: bounds what an idle server adds to the latency of the first message, and still
/// leaves an idle core asleep nearly all the time.
const MAX_SLEEP: Duration = Duration::from_micros(50);

/// Counters of one poll loop.
#[derive(Debug, Default)]
pub struct LoopCounters {
    /// Rounds that found work.
    pub busy_polls: Counter,
    /// Rounds that found none.
    pub idle_polls: Counter,
    /// Cycles in rounds with work.
    pub busy_cycles: Counter,
    /// Cycles in rounds without, and in pauses and sleeps.
    pub idle_cycles: Counter,
    /// Sleeps.
    pub sleeps: Counter,
}

/// The state of one loop.
#[derive(Debug)]
pub struct Backoff {
    mode: Idle,
    idle_rounds: u32,
    sleep: Duration,
    last: u64,
}

impl Backoff {
    /// A loop that begins now.
    pub fn new(mode: Idle) -> Self {
        Self {
            mode,
            idle_rounds: 0,
            sleep: MIN_SLEEP,
            last: eal::tsc(),
        }
    }

    /// Whether it has found nothing for so long that a loop that messages wake had better sleep.
    #[inline]
    pub fn may_be_woken(&self) -> bool {
        self.mode == Idle::Sleep && self.idle_rounds > BELL_ROUNDS
    }

    /// To be called after each round: `work` is what the round did, `waiting` whether writes of this
    /// loop are in flight. Costs a read of the time stamp counter, and the pause or sleep if it is due.
    #[inline]
    pub fn after_round(&mut self, work: usize, waiting: bool, counters: &LoopCounters) {
        if work > 0 {
            self.idle_rounds = 0;
            self.sleep = MIN_SLEEP;
            let now = eal::tsc();
            counters.busy_polls.add(1);
            counters.busy_cycles.add(now.wrapping_sub(self.last));
            self.last = now;
            return;
        }
        self.idle_rounds = self.idle_rounds.saturating_add(1);
        if self.idle_rounds > SPIN_ROUNDS {
            let rounds = SPIN_ROUNDS + YIELD_ROUNDS;
            if waiting && (self.mode == Idle::Poll || self.idle_rounds <= rounds) {
                // Back at once where nobody wants the CPU.
                std::thread::yield_now();
            } else if self.mode == Idle::Sleep {
                self.rest(counters);
            }
        }
        let now = eal::tsc();
        counters.idle_polls.add(1);
        counters.idle_cycles.add(now.wrapping_sub(self.last));
        self.last = now;
    }

    #[cold]
    fn rest(&mut self, counters: &LoopCounters) {
        if self.idle_rounds <= SPIN_ROUNDS + PAUSE_ROUNDS {
            for _ in 0..PAUSES {
                eal::pause();
            }
            return;
        }
        counters.sleeps.add(1);
        std::thread::sleep(self.sleep);
        self.sleep = (self.sleep * 2).min(MAX_SLEEP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_loop_comes_to_rest_and_back() {
        let counters = LoopCounters::default();
        let mut backoff = Backoff::new(Idle::Sleep);
        let rounds = SPIN_ROUNDS + PAUSE_ROUNDS;
        (0..rounds).for_each(|_| backoff.after_round(0, false, &counters));
        assert_eq!(counters.sleeps.get(), 0);
        (0..3).for_each(|_| backoff.after_round(0, false, &counters));
        assert_eq!(counters.sleeps.get(), 3);
        backoff.after_round(0, true, &counters);
        backoff.after_round(1, false, &counters);
        backoff.after_round(0, false, &counters);
        assert_eq!(counters.sleeps.get(), 3);
        assert_eq!(counters.busy_polls.get(), 1);
        assert_eq!(counters.idle_polls.get(), u64::from(rounds) + 5);
        assert!(counters.idle_cycles.get() > 0);
    }

    #[test]
    fn a_slow_disk_is_waited_for_asleep_unless_the_loop_is_to_poll() {
        for (mode, sleeps) in [(Idle::Sleep, 5), (Idle::Poll, 0)] {
            let counters = LoopCounters::default();
            let mut backoff = Backoff::new(mode);
            let rounds = SPIN_ROUNDS + YIELD_ROUNDS;
            (0..rounds).for_each(|_| backoff.after_round(0, true, &counters));
            assert_eq!(counters.sleeps.get(), 0);
            (0..5).for_each(|_| backoff.after_round(0, true, &counters));
            assert_eq!(counters.sleeps.get(), sleeps);
        }
    }

    #[test]
    fn pure_polling_never_sleeps() {
        let counters = LoopCounters::default();
        let mut backoff = Backoff::new(Idle::Poll);
        (0..2000).for_each(|_| backoff.after_round(0, false, &counters));
        assert_eq!(counters.sleeps.get(), 0);
    }
}
