//! Round-trip estimation and the retransmission timeout, after RFC 6298.
//!
//! Invariant: the timeout lies between the configured bounds, backed off or not. Only answers that
//! name the transmission they answer are sampled, so Karn's ambiguity does not arise.

/// Smoothed round trip, its variance and the timeout they give; all in nanoseconds.
#[derive(Debug, Clone)]
pub struct RttEstimator {
    smoothed: u64,
    variance: u64,
    initial: u64,
    min: u64,
    max: u64,
}

impl RttEstimator {
    /// `initial` is the timeout before the first sample; `min` and `max` bound every timeout.
    pub fn new(initial: u64, min: u64, max: u64) -> Self {
        let max = max.max(1);
        let min = min.clamp(1, max);
        Self {
            smoothed: 0,
            variance: 0,
            initial: initial.clamp(min, max),
            min,
            max,
        }
    }

    /// Takes one measured round trip.
    pub fn sample(&mut self, rtt: u64) {
        if self.smoothed == 0 {
            self.smoothed = rtt.max(1);
            self.variance = rtt / 2;
            return;
        }
        // RFC 6298, 2.3: beta = 1/4 and alpha = 1/8, the variance first.
        let error = self.smoothed.abs_diff(rtt);
        self.variance = self.variance - self.variance / 4 + error / 4;
        self.smoothed = (self.smoothed - self.smoothed / 8 + rtt / 8).max(1);
    }

    /// The smoothed round trip; `None` before the first sample.
    pub fn smoothed(&self) -> Option<u64> {
        (self.smoothed != 0).then_some(self.smoothed)
    }

    /// The retransmission timeout, doubled `backoff` times.
    pub fn timeout(&self, backoff: u32) -> u64 {
        let base = match self.smoothed() {
            None => self.initial,
            Some(smoothed) => smoothed
                .saturating_add(self.variance.saturating_mul(4))
                .clamp(self.min, self.max),
        };
        base.saturating_mul(1 << backoff.min(20)).min(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn first_sample_gives_three_round_trips() {
        let mut rtt = RttEstimator::new(250 * MS, MS, 2_000 * MS);
        assert_eq!(rtt.timeout(0), 250 * MS);
        rtt.sample(10 * MS);
        assert_eq!(rtt.timeout(0), 30 * MS);
        assert_eq!(rtt.timeout(2), 120 * MS);
        assert_eq!(rtt.timeout(60), 2_000 * MS);
    }

    #[test]
    fn a_steady_round_trip_converges_to_it_and_keeps_the_floor() {
        let mut rtt = RttEstimator::new(250 * MS, 20 * MS, 2_000 * MS);
        for _ in 0..200 {
            rtt.sample(4 * MS);
        }
        assert!(rtt.smoothed().unwrap().abs_diff(4 * MS) < MS / 10);
        assert_eq!(rtt.timeout(0), 20 * MS);
        for _ in 0..20 {
            rtt.sample(100 * MS);
        }
        assert!(rtt.timeout(0) > 100 * MS);
    }

    #[test]
    fn extreme_samples_do_not_overflow() {
        let mut rtt = RttEstimator::new(u64::MAX, 1, u64::MAX);
        rtt.sample(u64::MAX);
        rtt.sample(0);
        rtt.sample(u64::MAX);
        assert!(rtt.timeout(20) >= rtt.timeout(0));
    }
}
