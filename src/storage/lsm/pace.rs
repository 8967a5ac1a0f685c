//! How fast background work goes: it leaves the disk and the CPU to the messages that come in.
//!
//! Between slices of work the thread sleeps as long as the slice took, so that it takes at most half of what
//! there is; when it has fallen behind it does not.

use std::time::{Duration, Instant};

/// Bytes between two looks at the clock: some 0.1 to 0.5 ms of work, so that a message that has to wait for it waits no
/// longer than for its commit.
const SLICE: usize = 128 << 10;
/// A slice that took longer was held up by something else.
const LONGEST: Duration = Duration::from_millis(50);

/// The pace of one job.
#[derive(Debug)]
pub struct Pace {
    bytes: usize,
    since: Instant,
    /// Do not sleep.
    hurry: bool,
}

impl Pace {
    /// `hurry`: at full speed.
    pub fn new(hurry: bool) -> Pace {
        Pace {
            bytes: 0,
            since: Instant::now(),
            hurry,
        }
    }

    /// So many bytes were worked through since the last call. May sleep.
    pub fn worked(&mut self, bytes: usize) {
        self.bytes += bytes;
        if self.bytes < SLICE {
            return;
        }
        self.bytes = 0;
        if !self.hurry {
            std::thread::sleep(self.since.elapsed().min(LONGEST));
        }
        self.since = Instant::now();
    }
}
