//! How much a sender may have outstanding: what each acknowledgement says of the shard's load.
//!
//! Invariant: the level changes only past a mark of its own on the way up and a lower one on the
//! way down, so that a load near a mark does not make the credit flutter; credit is never 0, so a
//! sender always has a batch under way whose acknowledgement can raise it again.

/// Credit of a shard at ease: the whole window.
pub const FULL_CREDIT: u32 = super::dedupe::WINDOW as u32;
/// Credit under pressure: about what fits while the rings drain.
pub const PRESSED_CREDIT: u32 = 4;
/// Credit of a shard that is about to shed.
pub const CRITICAL_CREDIT: u32 = 1;

/// Input ring fill, in percent, from which a level begins and below which it ends.
const RING_PRESSED: (usize, usize) = (50, 25);
const RING_CRITICAL: (usize, usize) = (85, 60);
/// Staging slots in use, in percent, likewise: the disk is behind.
const STAGING_PRESSED: (usize, usize) = (75, 50);
const STAGING_CRITICAL: (usize, usize) = (95, 80);

/// Load as a producer is told of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Everything is taken.
    #[default]
    Ease,
    /// Rings or staging fill up.
    Pressed,
    /// About to shed.
    Critical,
}

/// The shard's present level.
#[derive(Debug, Default)]
pub struct Credit {
    level: Level,
}

impl Credit {
    /// Takes the fullest input ring's fill and the staging slots in use, each in percent.
    pub fn update(&mut self, ring: usize, staging: usize) {
        let past = |level: Level, (begin, end): (usize, usize), fill: usize| {
            fill >= if self.level >= level { end } else { begin }
        };
        self.level = if past(Level::Critical, RING_CRITICAL, ring)
            || past(Level::Critical, STAGING_CRITICAL, staging)
        {
            Level::Critical
        } else if past(Level::Pressed, RING_PRESSED, ring)
            || past(Level::Pressed, STAGING_PRESSED, staging)
        {
            Level::Pressed
        } else {
            Level::Ease
        };
    }

    /// Batches a producer may have outstanding in a partition.
    #[inline]
    pub fn batches(&self) -> u32 {
        match self.level {
            Level::Ease => FULL_CREDIT,
            Level::Pressed => PRESSED_CREDIT,
            Level::Critical => CRITICAL_CREDIT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_have_hysteresis() {
        let mut credit = Credit::default();
        let mut levels = |fills: &[(usize, usize)]| {
            fills
                .iter()
                .map(|&(ring, staging)| {
                    credit.update(ring, staging);
                    credit.batches()
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(
            levels(&[(49, 0), (50, 0), (30, 0), (49, 0), (24, 0), (49, 0)]),
            [32, 4, 4, 4, 32, 32]
        );
        assert_eq!(
            levels(&[(85, 0), (61, 0), (59, 0), (84, 0), (20, 0)]),
            [1, 1, 4, 4, 32]
        );
        assert_eq!(
            levels(&[
                (0, 74),
                (0, 75),
                (0, 95),
                (0, 85),
                (0, 79),
                (0, 51),
                (0, 49)
            ]),
            [32, 4, 1, 1, 4, 4, 32]
        );
    }
}
