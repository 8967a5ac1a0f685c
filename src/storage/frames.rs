//! Reads frames one after another, from the staging slots of a running log or from its files.
//!
//! Invariant: a frame is handed out only after its place, length and CRC were checked; of a running
//! log only durable frames are. Consumers read files by windows (see [`super::wal::window`]); everyone else
//! reads them with pread through the page cache, or, a second time, mapped. The kernel keeps the page cache coherent with
//! O_DIRECT writes: it drops the cached pages of a range before and after such a write, and only completed writes are read
//! here.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::mapped::Mapped;
use super::wal::frame::{FRAME_ALIGN, FRAME_HEADER, FrameError, FrameHeader, LogId};
use super::wal::segment::{SEGMENT_HEADER, SegmentError, SegmentHeader, segment_path};
use super::wal::shared::WalShared;
use super::wal::window::{AtHand, Window};

/// First read of a place: a few commits.
const WINDOW_MIN: usize = 64 << 10;
/// Reads grow to this while they go on in sequence.
const WINDOW_MAX: usize = 1 << 20;

/// Why a frame could not be had.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The file system refused.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The segment.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The segment's header is not what it should be.
    #[error("{path}: {error}")]
    Segment {
        /// The segment.
        path: PathBuf,
        /// What is wrong.
        error: SegmentError,
    },
    /// The frame has left the staging slots, and the file was not to be read.
    #[error("the frame is no longer in memory")]
    NotStaged,
    /// There is no such frame.
    #[error("{path} at byte {position}: {error}")]
    Frame {
        /// The segment.
        path: PathBuf,
        /// Byte in the file.
        position: u64,
        /// What is there.
        error: FrameError,
    },
}

impl FetchError {
    /// True where no segment of that name exists.
    pub fn is_missing(&self) -> bool {
        matches!(self, FetchError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// True where nothing was written: the end of a segment or of the log.
    pub fn is_blank(&self) -> bool {
        matches!(
            self,
            FetchError::Frame {
                error: FrameError::Blank,
                ..
            } | FetchError::Segment {
                error: SegmentError::Blank,
                ..
            }
        )
    }
}

struct OpenSegment {
    header: SegmentHeader,
    file: File,
    path: PathBuf,
    /// Where it is read mapped.
    map: Option<Mapped>,
}

/// Reads a log's frames; one a thread.
pub(crate) struct FrameReader {
    id: LogId,
    dir: PathBuf,
    live: Option<Arc<WalShared>>,
    /// Do not touch the disk for a frame that has left the staging slots.
    pub(crate) staged_only: bool,
    mapped: bool,
    segment: Option<OpenSegment>,
    window: Vec<u8>,
    window_lsn: u64,
    window_size: usize,
}

impl FrameReader {
    /// Of a running log.
    pub(crate) fn live(shared: Arc<WalShared>) -> FrameReader {
        let mut reader = Self::files(shared.dir(), shared.id());
        reader.live = Some(shared);
        reader
    }

    /// Of files that nobody writes to.
    pub(crate) fn files(dir: &Path, id: LogId) -> FrameReader {
        FrameReader {
            id,
            dir: dir.to_owned(),
            live: None,
            staged_only: false,
            mapped: false,
            segment: None,
            window: Vec::new(),
            window_lsn: 0,
            window_size: WINDOW_MIN,
        }
    }

    /// As [`FrameReader::files`], mapped: of frames that were read before ([`Mapped`] says why).
    pub(crate) fn read_before(dir: &Path, id: LogId) -> FrameReader {
        FrameReader {
            mapped: true,
            ..Self::files(dir, id)
        }
    }

    /// Behind this no frame is durable; unknown (the maximum) for files.
    pub(crate) fn limit(&self) -> u64 {
        self.live.as_ref().map_or(u64::MAX, |s| s.durable_lsn())
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The header of the segment at `base`, checked against the file's name and length.
    pub(crate) fn header(&mut self, base: u64) -> Result<SegmentHeader, FetchError> {
        if let Some(open) = &self.segment
            && open.header.base == base
        {
            return Ok(open.header);
        }
        let path = segment_path(&self.dir, base);
        let (file, header) = open_segment(&path, base, self.id)?;
        let map = self.mapped.then(|| Mapped::open(&path)).transpose();
        let map = map.map_err(|source| FetchError::Io {
            path: path.clone(),
            source,
        })?;
        self.window.clear();
        self.segment = Some(OpenSegment {
            header,
            file,
            path,
            map,
        });
        Ok(header)
    }

    /// Calls `f` with the frame at `lsn` in the segment at `base`, its place and CRC checked.
    pub(crate) fn with_frame<R>(
        &mut self,
        base: u64,
        lsn: u64,
        f: impl FnOnce(&FrameHeader, &[u8]) -> R,
    ) -> Result<R, FetchError> {
        let mut f = Some(f);
        if let Some(shared) = &self.live
            && let Some(result) =
                shared.with_staged(lsn, |header, frame| f.take().map(|f| f(header, frame)))
            && let Some(result) = result
        {
            return Ok(result);
        }
        let header = self.header(base)?;
        if self.staged_only
            && let Some(shared) = &self.live
            // The rest of a segment may be blank: then the next one's first frame is what is staged.
            && shared
                .with_staged(header.end() + SEGMENT_HEADER as u64, |_, _| ())
                .is_none()
        {
            return Err(FetchError::NotStaged);
        }
        let end = header.end().min(self.limit());
        let id = self.id;
        let path_error = |reader: &Self, error| FetchError::Frame {
            path: segment_path(&reader.dir, base),
            position: lsn - base,
            error,
        };
        let head = self.bytes(lsn, FRAME_HEADER, end)?;
        if header.reused && !FrameHeader::lies_here(head, id, lsn) {
            return Err(path_error(self, FrameError::Blank));
        }
        let room = header.end().saturating_sub(lsn);
        let frame = match FrameHeader::decode(head, room) {
            Ok(frame) => frame,
            Err(error) => return Err(path_error(self, error)),
        };
        if let Err(error) = frame.check_place(self.id, lsn) {
            return Err(path_error(self, error));
        }
        let bytes = self.bytes(lsn, frame.size(), end)?;
        debug_assert_eq!(frame.check_place(id, lsn), Ok(()));
        if let Err(error) = frame.check_crc(bytes) {
            return Err(path_error(self, error));
        }
        Ok(f.take().map(|f| f(&frame, bytes)).expect("called once"))
    }

    /// As [`FrameReader::with_frame`]; of a running log's files by way of its windows, of which `f` then also gets the
    /// one that has the frame, and where the frame begins in it.
    pub(crate) fn with_shared_frame<R>(
        &mut self,
        base: u64,
        lsn: u64,
        at_hand: &mut AtHand,
        f: impl FnOnce(&FrameHeader, &[u8], Option<(&Arc<Window>, usize)>) -> R,
    ) -> Result<R, FetchError> {
        let Some(shared) = &self.live else {
            return self.with_frame(base, lsn, |header, frame| f(header, frame, None));
        };
        let mut f = Some(f);
        let staged = shared.with_staged(lsn, |header, frame| {
            f.take().map(|f| f(header, frame, None))
        });
        if let Some(Some(result)) = staged {
            return Ok(result);
        }
        let found = shared
            .windows()
            .frame(base, lsn, shared.durable_lsn(), at_hand);
        let (header, range) = found?;
        let window = at_hand.window().expect("the frame lies in it");
        let frame = &window.bytes()[range.clone()];
        Ok(f.take()
            .map(|f| f(&header, frame, Some((window, range.start))))
            .expect("called once"))
    }

    /// `len` bytes at `lsn` of the open segment. `end`: where valid bytes end now.
    fn bytes(&mut self, lsn: u64, len: usize, end: u64) -> Result<&[u8], FetchError> {
        let Some(segment) = &mut self.segment else {
            unreachable!("header() was called");
        };
        let position = lsn - segment.header.base;
        let short = |path: &Path, got| FetchError::Frame {
            path: path.to_owned(),
            position,
            error: FrameError::Length {
                payload: (len - FRAME_HEADER.min(len)) as u32,
                room: got,
            },
        };
        if let Some(map) = &mut segment.map {
            let path = &segment.path;
            return map.bytes(position, len).map_err(|_| short(path, 0));
        }
        let inside = lsn >= self.window_lsn
            && lsn + len as u64 <= self.window_lsn + self.window.len() as u64;
        if !inside {
            let sequential = lsn >= self.window_lsn
                && lsn <= self.window_lsn + self.window.len() as u64
                && !self.window.is_empty();
            self.window_size = if sequential {
                (self.window_size * 2).min(WINDOW_MAX)
            } else {
                WINDOW_MIN
            };
            let want = self.window_size.max(len);
            let room = end.saturating_sub(lsn).min(want as u64) as usize;
            self.window.resize(room.max(len), 0);
            let error = |source| FetchError::Io {
                path: segment.path.clone(),
                source,
            };
            self.window_lsn = lsn;
            let mut got = 0;
            while got < self.window.len() {
                match segment
                    .file
                    .read_at(&mut self.window[got..], position + got as u64)
                {
                    Ok(0) => break,
                    Ok(n) => got += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => {
                        self.window.clear();
                        return Err(error(e));
                    }
                }
            }
            self.window.truncate(got);
            if got < len {
                self.window.clear();
                return Err(short(&segment.path, got as u64));
            }
        }
        let at = (lsn - self.window_lsn) as usize;
        Ok(&self.window[at..at + len])
    }
}

/// Opens a segment for reading and checks its header against name and log; a file shorter than its
/// header says is taken (the rest is damage that reading finds).
pub(crate) fn open_segment(
    path: &Path,
    base: u64,
    id: LogId,
) -> Result<(File, SegmentHeader), FetchError> {
    let io = |source| FetchError::Io {
        path: path.to_owned(),
        source,
    };
    let bad = |error| FetchError::Segment {
        path: path.to_owned(),
        error,
    };
    let file = File::open(path).map_err(io)?;
    let mut bytes = [0; SEGMENT_HEADER];
    let mut got = 0;
    while got < SEGMENT_HEADER {
        match file.read_at(&mut bytes[got..], got as u64) {
            Ok(0) => return Err(bad(SegmentError::Short)),
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(io(e)),
        }
    }
    let header = check_header(&bytes, path, base, id)?;
    Ok((file, header))
}

/// The header of the segment at `path`, checked against name and log.
pub(crate) fn check_header(
    bytes: &[u8],
    path: &Path,
    base: u64,
    id: LogId,
) -> Result<SegmentHeader, FetchError> {
    let bad = |error| FetchError::Segment {
        path: path.to_owned(),
        error,
    };
    let header = SegmentHeader::decode(bytes).map_err(bad)?;
    if header.id != id
        || header.base != base
        || header.size < (SEGMENT_HEADER + FRAME_ALIGN) as u64
        || header.base.checked_add(header.size).is_none()
        // No log comes that far: its sequences cannot overflow.
        || header.first_seq > u64::MAX / 2
    {
        return Err(bad(SegmentError::Foreign));
    }
    Ok(header)
}

/// Where a walk over the log stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) base: u64,
    pub(crate) size: u64,
    pub(crate) lsn: u64,
    pub(crate) next_seq: u64,
    pub(crate) prev_crc: u32,
}

impl Cursor {
    /// At the first frame of a segment.
    pub(crate) fn at_start(header: &SegmentHeader) -> Cursor {
        Cursor {
            base: header.base,
            size: header.size,
            lsn: header.base + SEGMENT_HEADER as u64,
            next_seq: header.first_seq,
            prev_crc: header.prev_crc,
        }
    }

    pub(crate) fn segment_end(&self) -> u64 {
        self.base + self.size
    }

    /// Calls `f` with the next frame of this segment and steps over it; `Ok(None)`: the segment has no
    /// room for another.
    pub(crate) fn step<R>(
        &mut self,
        reader: &mut FrameReader,
        f: impl FnOnce(&FrameHeader, &[u8]) -> R,
    ) -> Result<Option<R>, FetchError> {
        if self.lsn + FRAME_ALIGN as u64 > self.segment_end() {
            return Ok(None);
        }
        let (lsn, next_seq, prev_crc) = (self.lsn, self.next_seq, self.prev_crc);
        let stepped = reader.with_frame(self.base, lsn, |header, frame| {
            header.check_chain(next_seq, prev_crc)?;
            Ok((header.size(), header.crc, f(header, frame)))
        })?;
        let (size, crc, result) = stepped.map_err(|error| FetchError::Frame {
            path: segment_path(reader.dir(), self.base),
            position: lsn - self.base,
            error,
        })?;
        self.lsn += size as u64;
        self.next_seq += 1;
        self.prev_crc = crc;
        Ok(Some(result))
    }

    /// Goes on to the next segment if its header names exactly this place.
    pub(crate) fn next_segment(&self, reader: &mut FrameReader) -> Result<Cursor, FetchError> {
        let base = self.segment_end();
        let header = reader.header(base)?;
        let wrong = |error| FetchError::Frame {
            path: segment_path(reader.dir(), base),
            position: 0,
            error,
        };
        if header.first_seq != self.next_seq {
            return Err(wrong(FrameError::Sequence {
                found: header.first_seq,
                expected: self.next_seq,
            }));
        }
        if header.prev_crc != self.prev_crc {
            return Err(wrong(FrameError::Chain {
                found: header.prev_crc,
                expected: self.prev_crc,
            }));
        }
        Ok(Cursor::at_start(&header))
    }
}
