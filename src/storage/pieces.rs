//! What is read of a log as a list of pieces: memory of its own, stretches of the log's windows and of SSTs.
//!
//! Record batches go from where they lie to the socket without being gathered first. Invariant: the bytes of a piece
//! never change, for as long as it lives: a window is never written to again, an SST never, and its file stays while
//! a piece of it lives. What a piece holds beside its own bytes: a window (1 MiB mostly), or an SST that may have
//! been merged away; so whoever keeps pieces for long makes them their own ([`Piece::own`]).

use std::borrow::Borrow;
use std::fs::File;
use std::ops::Deref;
use std::sync::Arc;

use super::lsm::sst::SstReader;
use super::lsm::store::StoreFile;
use super::wal::window::Window;

/// Batches of fewer bytes are copied: a piece costs about as much as copying so much.
pub const SHARE: usize = 4 << 10;
/// Bytes of memory that copied batches are gathered in, at least and at most: doubled from piece to piece.
const CHUNKS: (usize, usize) = (1 << 10, 256 << 10);

enum Source {
    Owned(Vec<u8>),
    Log(Arc<Window>),
    Sst {
        reader: Arc<SstReader>,
        /// Keeps the file's name.
        _file: Arc<StoreFile>,
    },
}

/// A stretch of bytes.
pub struct Piece {
    source: Source,
    start: usize,
    end: usize,
}

impl Piece {
    /// Whether the bytes are memory of its own.
    pub fn is_owned(&self) -> bool {
        matches!(self.source, Source::Owned(_))
    }

    /// Copies the bytes from byte `from` on into memory of its own and lets go of where they lie; what lies before
    /// is then no part of it.
    pub fn own(&mut self, from: usize) {
        *self = Piece::from(self[from..].to_vec());
    }

    /// The file that the bytes are in, and where; `None`: they are not in a file, or it cannot be opened now.
    pub fn file(&self) -> Option<(&File, u64)> {
        match &self.source {
            Source::Sst { reader, .. } => reader.file().map(|file| (file, self.start as u64)),
            Source::Owned(_) | Source::Log(_) => None,
        }
    }

    /// The bytes where they may be changed, which they may not be where others have them, too.
    pub fn owned_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.source {
            Source::Owned(bytes) => Some(&mut bytes[self.start..self.end]),
            Source::Log(_) | Source::Sst { .. } => None,
        }
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all = match &self.source {
            Source::Owned(bytes) => bytes,
            Source::Log(window) => window.bytes(),
            Source::Sst { reader, .. } => reader.bytes(),
        };
        &all[self.start..self.end]
    }
}

impl Borrow<[u8]> for Piece {
    fn borrow(&self) -> &[u8] {
        self
    }
}

impl From<Vec<u8>> for Piece {
    fn from(bytes: Vec<u8>) -> Self {
        Piece {
            start: 0,
            end: bytes.len(),
            source: Source::Owned(bytes),
        }
    }
}

impl std::fmt::Debug for Piece {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let source = match self.source {
            Source::Owned(_) => "owned",
            Source::Log(_) => "log",
            Source::Sst { .. } => "sst",
        };
        write!(f, "{} bytes, {source}", self.len())
    }
}

/// Pieces in order.
#[derive(Debug, Default)]
pub struct Pieces {
    list: Vec<Piece>,
    len: usize,
}

impl Pieces {
    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces.
    pub fn into_list(self) -> Vec<Piece> {
        self.list
    }

    /// How many pieces are not memory of their own.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn shared(&self) -> usize {
        self.list.iter().filter(|piece| !piece.is_owned()).count()
    }

    /// Appends all bytes to `out`.
    pub fn copy_to(&self, out: &mut Vec<u8>) {
        out.reserve(self.len);
        for piece in &self.list {
            out.extend_from_slice(piece);
        }
    }

    /// Leaves only the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        while let Some(last) = self.list.last_mut()
            && self.len > len
        {
            let cut = (self.len - len).min(last.len());
            last.end -= cut;
            self.len -= cut;
            if let Source::Owned(bytes) = &mut last.source {
                bytes.truncate(last.end);
            }
            if last.is_empty() {
                self.list.pop();
            }
        }
    }

    /// Appends a copy.
    pub fn push_copy(&mut self, bytes: &[u8]) {
        if let Some(Piece {
            source: Source::Owned(last),
            end,
            ..
        }) = self.list.last_mut()
            && last.capacity() - last.len() >= bytes.len()
        {
            last.extend_from_slice(bytes);
            *end = last.len();
        } else {
            let room = self.len.clamp(CHUNKS.0, CHUNKS.1).max(bytes.len());
            let mut chunk = Vec::with_capacity(room);
            chunk.extend_from_slice(bytes);
            self.list.push(Piece::from(chunk));
        }
        self.len += bytes.len();
    }

    /// Appends bytes of a window, from byte `start` of it on.
    pub(crate) fn push_log(&mut self, window: &Arc<Window>, start: usize, len: usize) {
        self.push(Piece {
            source: Source::Log(Arc::clone(window)),
            start,
            end: start + len,
        });
    }

    /// Appends bytes of an SST, from byte `start` of the file on.
    pub fn push_sst(
        &mut self,
        file: &Arc<StoreFile>,
        reader: &Arc<SstReader>,
        start: usize,
        len: usize,
    ) {
        if let Some(Piece {
            source: Source::Sst { reader: last, .. },
            end,
            ..
        }) = self.list.last_mut()
            && Arc::ptr_eq(last, reader)
            && *end == start
        {
            *end += len;
            self.len += len;
            return;
        }
        self.push(Piece {
            source: Source::Sst {
                reader: Arc::clone(reader),
                _file: Arc::clone(file),
            },
            start,
            end: start + len,
        });
    }

    fn push(&mut self, piece: Piece) {
        self.len += piece.len();
        self.list.push(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_gathered_and_cut_off_anywhere() {
        let mut bytes = Vec::new();
        let mut pieces = Pieces::default();
        for i in 0..200usize {
            let part = vec![i as u8; i * 7 % 90];
            bytes.extend_from_slice(&part);
            pieces.push_copy(&part);
        }
        assert!(pieces.list.len() < 8, "{:?}", pieces.list);
        for len in (0..=bytes.len()).rev().step_by(13) {
            pieces.truncate(len);
            let mut out = Vec::new();
            pieces.copy_to(&mut out);
            assert_eq!(out, bytes[..len]);
            assert_eq!(pieces.len(), len);
        }
        pieces.truncate(0);
        pieces.push_copy(b"again");
        assert_eq!(pieces.into_list().concat(), b"again");
    }
}
