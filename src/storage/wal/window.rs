//! Windows: stretches of a log's segments in memory, read once for all readers, past the page cache.
//!
//! Segments are written past the page cache, so reading them through it would cost a copy, and pages there make
//! later writes to the same segment leave the kernel's fast path. A window is read with O_DIRECT into memory of its
//! own, is never changed after, and lives for as long as someone holds it: what is sent from it is right whatever
//! becomes of the segment meanwhile. A reader that goes on in sequence has the next windows read ahead by a thread.
//!
//! Invariants: a window begins where a frame begins and holds durable bytes only, as the segment had them when they
//! were read; a frame is handed out only after its place was compared, and its CRC, once a window. A segment that was
//! given to a later place of the log while it was read shows other frames, and so gives an error.
//!
//! Memory: when windows, answers' on their way included, fill the shard's share of the budget, readers copy from them
//! instead of holding them ([`Windows::may_share`]); half of it at most is kept for later readers, for [`KEPT`].

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::aligned::AlignedBuf;
use super::frame::{FRAME_ALIGN, FRAME_HEADER, FrameError, FrameHeader, LogId};
use super::segment::{SEGMENT_HEADER, SegmentHeader, segment_path};
use crate::memory::budget::{Charge, Share};
use crate::storage::frames::{FetchError, check_header};

/// Bytes of a window, or of its first frame where that is larger: a request that disks serve at full bandwidth. Tests'
/// segments are small, and are to have several.
const WINDOW: usize = if cfg!(test) { 32 << 10 } else { 1 << 20 };
/// Memory that makes no reader faster when there is more of it; and what a few readers need.
pub const MOST: usize = 64 << 20;
/// See [`MOST`].
pub const LEAST: usize = 8 << 20;
/// Windows read ahead of one that is read in sequence: enough to keep a disk busy while the one at hand is sent.
const AHEAD: usize = 4;
/// Open segments: readers are mostly in the same one or two.
const SEGMENTS: usize = 4;
/// Buffers that wait to be used again; memory that was just given back costs page faults to have anew.
const SPARE: usize = 8;
/// How long what nobody reads is kept.
const KEPT: Duration = Duration::from_secs(10);
/// Requests to read ahead that wait; more are forgotten.
const ASKED: usize = 16;

/// Buffers of [`WINDOW`] bytes, how many windows there are, and how many there may be before readers copy.
struct Pool {
    spare: Mutex<Spare>,
    alive: AtomicUsize,
    most: usize,
}

/// Buffers to be used again, and the account of all there are.
struct Spare {
    buffers: Vec<AlignedBuf>,
    charge: Charge,
}

/// A stretch of a segment.
pub(crate) struct Window {
    base: u64,
    lsn: u64,
    /// Bytes of `buffer` that are the segment's.
    len: usize,
    /// `None` while it is dropped.
    buffer: Option<AlignedBuf>,
    /// A bit for each place where a frame may begin: its CRC was compared.
    checked: Box<[AtomicU64]>,
    /// Someone has read from it.
    read: AtomicBool,
    pool: Arc<Pool>,
}

impl Window {
    /// Its bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |b| &b[..self.len])
    }

    fn end(&self) -> u64 {
        self.lsn + self.len as u64
    }

    fn covers(&self, base: u64, lsn: u64, len: usize) -> bool {
        self.base == base && lsn >= self.lsn && lsn + len as u64 <= self.end()
    }

    /// The frame at `lsn`, of which at least the header is here: `Err` with its bytes where the rest is not.
    fn frame(
        &self,
        segment: &Segment,
        id: LogId,
        lsn: u64,
    ) -> Result<Result<(FrameHeader, Range<usize>), usize>, FrameError> {
        let at = (lsn - self.lsn) as usize;
        let head = &self.bytes()[at..];
        if segment.header.reused && !FrameHeader::lies_here(head, id, lsn) {
            return Err(FrameError::Blank);
        }
        let header = FrameHeader::decode(head, segment.header.end().saturating_sub(lsn))?;
        header.check_place(id, lsn)?;
        let Some(bytes) = head.get(..header.size()) else {
            return Ok(Err(header.size()));
        };
        let number = at / FRAME_ALIGN;
        let (checked, bit) = (&self.checked[number / 64], 1 << (number % 64));
        // Where two threads come first, both check.
        if checked.load(Ordering::Relaxed) & bit == 0 {
            header.check_crc(bytes)?;
            checked.fetch_or(bit, Ordering::Relaxed);
        }
        Ok(Ok((header, at..at + header.size())))
    }

    /// Where the first frame begins that is not whole here, as far as frames can be followed.
    fn behind(&self) -> u64 {
        let mut at = 0;
        while let Some(head) = self.bytes().get(at..)
            && let Ok(header) = FrameHeader::decode(head, (self.len - at) as u64)
        {
            at += header.size();
        }
        self.lsn + at as u64
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.pool.alive.fetch_sub(1, Ordering::Relaxed);
        if let Some(buffer) = self.buffer.take() {
            let mut spare = lock(&self.pool.spare);
            if buffer.len() == WINDOW && spare.buffers.len() < SPARE {
                spare.buffers.push(buffer);
            } else {
                let left = spare.charge.bytes() - buffer.len() as u64;
                spare.charge.set(left);
            }
        }
    }
}

/// An open segment.
pub(crate) struct Segment {
    header: SegmentHeader,
    file: File,
    path: PathBuf,
}

struct Cached {
    window: Weak<Window>,
    /// `None`: it goes with its last holder.
    kept: Option<Arc<Window>>,
    used: Instant,
}

#[derive(Default)]
struct State {
    /// The one used last comes last.
    segments: Vec<Arc<Segment>>,
    cached: Vec<Cached>,
    /// Stretches that are being read.
    loading: Vec<Range<u64>>,
}

impl State {
    fn find(&mut self, base: u64, lsn: u64, len: usize) -> Option<Arc<Window>> {
        let now = Instant::now();
        self.cached.iter_mut().rev().find_map(|cached| {
            let window = cached.window.upgrade()?;
            if !window.covers(base, lsn, len) {
                return None;
            }
            cached.used = now;
            Some(window)
        })
    }

    fn keep(&mut self, window: &Arc<Window>, most: usize) {
        self.cached
            .retain(|cached| cached.window.strong_count() > 0);
        let kept = self.cached.iter().filter(|c| c.kept.is_some()).count();
        let oldest = self.cached.iter_mut().filter(|c| c.kept.is_some());
        if kept >= most
            && let Some(oldest) = oldest.min_by_key(|cached| cached.used)
        {
            oldest.kept = None;
        }
        self.cached.push(Cached {
            window: Arc::downgrade(window),
            kept: Some(Arc::clone(window)),
            used: Instant::now(),
        });
    }
}

/// What is to be read ahead: the segment, the frame to begin at, and where durable bytes end.
#[derive(Clone, Copy)]
struct Ahead {
    base: u64,
    lsn: u64,
    end: u64,
}

/// The windows of a log; any number of threads.
pub(crate) struct Windows {
    dir: PathBuf,
    id: LogId,
    state: Mutex<State>,
    loaded: Condvar,
    pool: Arc<Pool>,
    ahead: OnceLock<Option<SyncSender<Ahead>>>,
}

/// The window that a reader is in.
#[derive(Default)]
pub(crate) struct AtHand(Option<(Arc<Segment>, Arc<Window>)>);

impl AtHand {
    pub(crate) fn window(&self) -> Option<&Arc<Window>> {
        self.0.as_ref().map(|(_, window)| window)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is whole between any two statements that may panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Windows {
    pub(crate) fn new(dir: &Path, id: LogId, share: &Share) -> Arc<Windows> {
        let bytes = usize::try_from(share.bytes()).unwrap_or(usize::MAX);
        Arc::new(Windows {
            dir: dir.to_owned(),
            id,
            state: Mutex::default(),
            loaded: Condvar::new(),
            pool: Arc::new(Pool {
                spare: Mutex::new(Spare {
                    buffers: Vec::new(),
                    charge: share.charge(),
                }),
                alive: AtomicUsize::new(0),
                most: bytes.clamp(LEAST, MOST) / (1 << 20),
            }),
            ahead: OnceLock::new(),
        })
    }

    /// Whether a reader may hold windows for longer than it takes to copy from them.
    pub(crate) fn may_share(&self) -> bool {
        self.pool.alive.load(Ordering::Relaxed) <= self.pool.most
    }

    /// Lets go of a segment that is about to become another one.
    pub(crate) fn forget(&self, base: u64) {
        let mut state = lock(&self.state);
        state.segments.retain(|open| open.header.base != base);
        state
            .cached
            .retain(|cached| cached.window.upgrade().is_some_and(|w| w.base != base));
    }

    /// Gets the frame at `lsn` in the segment at `base`, place and CRC compared: its header, and where it lies in the
    /// window that is `at_hand` then. `durable`: where valid bytes end now. Cost: nothing where the window at hand has
    /// it, else a look-up, else one read of the disk.
    pub(crate) fn frame(
        self: &Arc<Self>,
        base: u64,
        lsn: u64,
        durable: u64,
        at_hand: &mut AtHand,
    ) -> Result<(FrameHeader, Range<usize>), FetchError> {
        let mut need = FRAME_HEADER;
        loop {
            let (segment, window) = match &at_hand.0 {
                Some(at_hand) if at_hand.1.covers(base, lsn, need) => at_hand,
                _ => at_hand
                    .0
                    .insert(self.window(base, lsn, need, durable, true)?),
            };
            let found = window.frame(segment, self.id, lsn);
            let found = found.map_err(|error| FetchError::Frame {
                path: segment.path.clone(),
                position: lsn - base,
                error,
            })?;
            match found {
                Ok(found) => return Ok(found),
                // It crosses the window's end. The next one begins with it, and is long enough.
                Err(size) => need = size,
            }
        }
    }

    /// The window that holds `need` bytes from `lsn` on. `reads`: for a reader, not ahead of one.
    fn window(
        self: &Arc<Self>,
        base: u64,
        lsn: u64,
        need: usize,
        durable: u64,
        reads: bool,
    ) -> Result<(Arc<Segment>, Arc<Window>), FetchError> {
        let mut state = lock(&self.state);
        let segment = self.segment(&mut state, base)?;
        let end = segment.header.end().min(durable);
        let room = end.saturating_sub(lsn);
        loop {
            if let Some(window) = state.find(base, lsn, need) {
                drop(state);
                if reads && !window.read.swap(true, Ordering::Relaxed) {
                    self.ask_ahead(&window, end);
                }
                return Ok((segment, window));
            }
            if !state.loading.iter().any(|range| range.contains(&lsn)) {
                break;
            }
            let woken = self.loaded.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        let len = room.min(need.max(WINDOW) as u64) as usize;
        if len < need {
            return Err(short(&segment, lsn, need, len));
        }
        let sequential = lsn > base && state.find(base, lsn - 1, 1).is_some();
        let range = lsn..lsn + len as u64;
        state.loading.push(range.clone());
        drop(state);
        let loaded = self.load(&segment, lsn, len, need);
        let mut state = lock(&self.state);
        if let Some(at) = state.loading.iter().position(|other| *other == range) {
            state.loading.swap_remove(at);
        }
        if let Ok(window) = &loaded {
            window.read.store(reads, Ordering::Relaxed);
            state.keep(window, self.pool.most / 2);
        }
        drop(state);
        self.loaded.notify_all();
        let window = loaded?;
        if reads && sequential {
            self.ask_ahead(&window, end);
        }
        Ok((segment, window))
    }

    fn load(
        &self,
        segment: &Segment,
        lsn: u64,
        len: usize,
        need: usize,
    ) -> Result<Arc<Window>, FetchError> {
        let spare = match len <= WINDOW {
            true => lock(&self.pool.spare).buffers.pop(),
            false => None,
        };
        let buffer = spare.unwrap_or_else(|| {
            let buffer = AlignedBuf::zeroed(len.max(WINDOW));
            let mut spare = lock(&self.pool.spare);
            let held = spare.charge.bytes() + buffer.len() as u64;
            spare.charge.set(held);
            buffer
        });
        self.pool.alive.fetch_add(1, Ordering::Relaxed);
        let mut window = Window {
            base: segment.header.base,
            lsn,
            len: 0,
            buffer: Some(buffer),
            checked: (0..len.div_ceil(FRAME_ALIGN * 64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            read: AtomicBool::new(false),
            pool: Arc::clone(&self.pool),
        };
        let position = lsn - segment.header.base;
        let buffer = window
            .buffer
            .as_mut()
            .map_or(&mut [][..], |b| &mut b[..len]);
        let got =
            read_direct(&segment.file, buffer, position).map_err(|source| FetchError::Io {
                path: segment.path.clone(),
                source,
            })?;
        window.len = got;
        if got < need {
            return Err(short(segment, lsn, need, got));
        }
        Ok(Arc::new(window))
    }

    /// The open segment at `base`.
    fn segment(&self, state: &mut State, base: u64) -> Result<Arc<Segment>, FetchError> {
        if let Some(at) = state.segments.iter().position(|s| s.header.base == base) {
            let segment = state.segments.remove(at);
            state.segments.push(Arc::clone(&segment));
            return Ok(segment);
        }
        let path = segment_path(&self.dir, base);
        let io = |source| FetchError::Io {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .map_err(io)?;
        let mut bytes = AlignedBuf::zeroed(SEGMENT_HEADER);
        let got = read_direct(&file, &mut bytes, 0).map_err(io)?;
        let header = check_header(&bytes[..got], &path, base, self.id)?;
        let segment = Arc::new(Segment { header, file, path });
        if state.segments.len() >= SEGMENTS {
            state.segments.remove(0);
        }
        state.segments.push(Arc::clone(&segment));
        Ok(segment)
    }

    /// Has what lies behind a window read, by a thread that is started with the first call.
    fn ask_ahead(self: &Arc<Self>, window: &Window, end: u64) {
        let lsn = window.behind();
        if lsn + FRAME_ALIGN as u64 > end {
            return;
        }
        let thread = self.ahead.get_or_init(|| {
            let (ask, asked) = sync_channel(ASKED);
            let windows = Arc::downgrade(self);
            std::thread::Builder::new()
                .name(format!("wal-ahead-{}", self.id.shard))
                .spawn(move || read_ahead(&windows, &asked))
                // Without the thread readers wait for the disk themselves.
                .inspect_err(|error| tracing::warn!("nothing is read ahead of consumers: {error}"))
                .ok()
                .map(|_| ask)
        });
        if let Some(thread) = thread {
            // Full: it is busy with what readers need first.
            let _ = thread.try_send(Ahead {
                base: window.base,
                lsn,
                end,
            });
        }
    }

    /// Lets go of what nobody has read for long; true: something is kept.
    fn tidy(&self) -> bool {
        let mut state = lock(&self.state);
        let gone = |cached: &Cached| cached.used.elapsed() > KEPT;
        state.cached.retain(|cached| !gone(cached));
        let any = !state.cached.is_empty();
        if !any {
            state.segments.clear();
        }
        drop(state);
        if !any {
            let mut spare = lock(&self.pool.spare);
            let bytes: usize = spare.buffers.drain(..).map(|buffer| buffer.len()).sum();
            let left = spare.charge.bytes() - bytes as u64;
            spare.charge.set(left);
        }
        any
    }
}

/// What the thread does until the windows go.
fn read_ahead(windows: &Weak<Windows>, asked: &Receiver<Ahead>) {
    let mut kept = true;
    loop {
        let ask = match kept {
            true => asked.recv_timeout(KEPT / 4),
            false => asked.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        let Some(windows) = windows.upgrade() else {
            return;
        };
        match ask {
            Ok(ask) => {
                kept = true;
                let mut lsn = ask.lsn;
                for _ in 0..AHEAD {
                    if lsn + FRAME_ALIGN as u64 > ask.end {
                        break;
                    }
                    // Whoever needs what cannot be read meets the error.
                    let read = windows.window(ask.base, lsn, FRAME_HEADER, ask.end, false);
                    let Ok((_, window)) = read else { break };
                    let behind = window.behind();
                    if behind <= lsn {
                        break;
                    }
                    lsn = behind;
                }
            }
            Err(RecvTimeoutError::Timeout) => kept = windows.tidy(),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn short(segment: &Segment, lsn: u64, need: usize, got: usize) -> FetchError {
    FetchError::Frame {
        path: segment.path.clone(),
        position: lsn - segment.header.base,
        error: FrameError::Length {
            payload: (need - FRAME_HEADER.min(need)) as u32,
            room: got as u64,
        },
    }
}

/// Fills `buffer` from byte `position` on, all aligned; fewer bytes where the file ends.
fn read_direct(file: &File, buffer: &mut [u8], position: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], position + got as u64) {
            Ok(0) => break,
            Ok(n) => {
                got += n;
                if n % FRAME_ALIGN != 0 {
                    // The end of the file.
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}
