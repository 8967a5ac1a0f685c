//! Reserving a file's space ahead of writing it.
//!
//! Invariant: a signal is no failure. hugetlbfs ends `fallocate` with EINTR as soon as the thread has
//! anything to attend to (also io_uring's notices to the thread, which no handler ever sees), and asks
//! before every page.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Reserves the space of a file's first `len` bytes and lengthens it to at least that. Cost: on tmpfs
/// and hugetlbfs the pages are made; on a disk only the file system's notes are.
pub(crate) fn allocate(file: &File, len: u64) -> io::Result<()> {
    let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
    uninterrupted(|| {
        // SAFETY: the descriptor is open; fallocate touches no memory.
        match unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    })
}

/// Calls again until the answer is another than EINTR; for calls that go on where they were, or begin
/// anew without harm.
pub(super) fn uninterrupted(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

#[cfg(all(test, not(miri), not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_file_has_its_space() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        allocate(&file, 3 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 3 << 20);
        assert!(allocate(&file, u64::MAX).is_err());
    }

    #[test]
    fn a_signal_does_not_end_it_and_a_failure_does() {
        let mut answers = [libc::EINTR, libc::EINTR, 0, libc::EINTR, libc::ENOSPC, 0].into_iter();
        let mut call = || match answers.next() {
            Some(0) => Ok(()),
            Some(error) => Err(io::Error::from_raw_os_error(error)),
            None => panic!("called once more"),
        };
        uninterrupted(&mut call).unwrap();
        let failed = uninterrupted(&mut call).unwrap_err();
        assert_eq!(failed.raw_os_error(), Some(libc::ENOSPC));
        uninterrupted(&mut call).unwrap();
    }
}
