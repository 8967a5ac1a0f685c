//! The bytes of a segment that nobody writes to, mapped, for those who go through it a second time: a system call and a
//! copy for each batch would cost more than small batches are worth.
//!
//! Invariants: the file is not written to nor cut short meanwhile; a sealed segment is recycled by the thread that flushes
//! it, later, and recovery is alone. A page that the disk fails to read is SIGBUS, as in an SST: whoever maps a segment has
//! read all that it will touch before, in a way that gives errors.
//!
//! Memory: page tables' of [`RESIDENT`]; the pages are the page cache's.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};

/// Bytes that stay mapped at a time: a process with a whole segment mapped would seem to take that much memory.
const RESIDENT: usize = 8 << 20;
/// Pages, for the calls that want whole ones.
const PAGE: usize = 4096;

/// A segment.
pub(crate) struct Mapped {
    file: File,
    map: Mmap,
    /// What was touched since the last release lies in these bytes.
    from: usize,
    end: usize,
}

impl Mapped {
    /// Of a segment that nobody writes to.
    pub(crate) fn open(path: &Path) -> io::Result<Mapped> {
        let file = File::open(path)?;
        // SAFETY: the segment is not written to, nor cut short, while it is mapped (module comment).
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Mapped {
            file,
            map,
            from: 0,
            end: 0,
        })
    }

    /// `len` bytes from byte `at` on.
    pub(crate) fn bytes(&mut self, at: u64, len: usize) -> io::Result<&[u8]> {
        let short = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let at = usize::try_from(at).map_err(|_| short())?;
        let end = at.checked_add(len).filter(|&end| end <= self.map.len());
        let end = end.ok_or_else(short)?;
        if at < self.from || end - self.from > RESIDENT {
            self.release();
            self.from = at / PAGE * PAGE;
            self.end = self.from;
        }
        self.end = self.end.max(end);
        Ok(&self.map[at..end])
    }

    fn release(&self) {
        let advice = UncheckedAdvice::DontNeed;
        // SAFETY: the mapping is of a file and not written to: what is touched again is read from the file again. No
        // slice of it lives, since `bytes` borrows all of it. Only a hint.
        let _ = unsafe {
            self.map
                .unchecked_advise_range(advice, self.from, self.end - self.from)
        };
    }

    /// The segment's file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_files_wherever_they_lie() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("segment");
        let all: Vec<u8> = (0..3 * RESIDENT as u32 / 4 + 50)
            .flat_map(u32::to_le_bytes)
            .collect();
        std::fs::write(&path, &all).unwrap();
        let mut mapped = Mapped::open(&path).unwrap();
        let len = all.len();
        for _ in 0..2 {
            let mut at = 7;
            while at < len {
                let want = (at % 3 * 1000 + 10).min(len - at);
                let found = mapped.bytes(at as u64, want).unwrap();
                assert!(found == &all[at..at + want]);
                at += 70_001;
            }
        }
        // More than is kept at a time.
        assert!(mapped.bytes(5, len - 5).unwrap() == &all[5..]);
        for (at, want) in [(len as u64, 1), (len as u64 - 4, 5), (u64::MAX, 9)] {
            let error = mapped.bytes(at, want).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
