//! The steps on the file system that the store's files are made, named and removed by.
//!
//! In the server [`step`] is nothing. A test says how many steps are left: then the process is as good as dead, every
//! further step fails, and what lies on disk is what a kill at that place leaves.

use std::io;

#[cfg(test)]
thread_local! {
    static LEFT: std::cell::Cell<Option<u32>> = const { std::cell::Cell::new(None) };
}

/// Is called before each step. Fails in tests that end the process here.
#[inline]
pub(super) fn step() -> io::Result<()> {
    #[cfg(test)]
    if let Some(left) = LEFT.get() {
        if left == 0 {
            return Err(io::Error::other("killed by the test"));
        }
        LEFT.set(Some(left - 1));
    }
    Ok(())
}

/// Lets this thread do so many more steps; `None`: any number.
#[cfg(test)]
pub(super) fn allow(steps: Option<u32>) {
    LEFT.set(steps);
}

/// Whether the test's process is dead by now.
#[cfg(test)]
pub(super) fn is_dead() -> bool {
    LEFT.get() == Some(0)
}
