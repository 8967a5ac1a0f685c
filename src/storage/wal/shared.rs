//! What other threads may see of a running log: how far it is durable, its state, its durable frames.
//!
//! Invariant: `durable_lsn` and `durable` only grow, and only over frames whose write and all earlier
//! writes were completed by the disk. After a failure they never move again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use crossbeam_queue::ArrayQueue;

use super::frame::{FrameHeader, LogId};
use super::pin::SlotPin;
use super::segment::segment_path;
use super::staging::Staging;
use super::window::Windows;
use super::writer::FrameSeq;
use crate::memory::budget::Share;
use crate::memory::spsc;
use crate::storage::index::{LogIndex, Note};
use crate::storage::keylog::KeyLog;
use crate::telemetry::Counter;

/// Whether the log takes entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum WalState {
    /// Yes.
    Running = 0,
    /// No: no segment could be prepared. Taken up again when there is space; reading goes on.
    DiskFull = 1,
    /// No, for good: a write failed. Reading goes on; staged entries are recovered at the next start.
    Failed = 2,
    /// Closed or dropped by its writer.
    Closed = 3,
}

/// Segments that wait to be used again; more are removed.
const RECYCLED: usize = 2;
/// Most slots that readers hold at a time: a quarter, so that the writer always finds others.
const PINNED_SHARE: usize = 4;

#[repr(align(64))]
struct Line<T>(T);

/// Shared between the writer and any number of other threads.
pub struct WalShared {
    id: LogId,
    dir: PathBuf,
    durable: Line<AtomicU64>,
    durable_lsn: AtomicU64,
    checkpoint: AtomicU64,
    state: Line<AtomicU8>,
    failure: OnceLock<String>,
    prepare_failing: AtomicBool,
    prepare_error: Mutex<Option<String>>,
    pub(crate) staging: Staging,
    pub(crate) pins: Box<[SlotPin]>,
    pinned: AtomicUsize,
    index: LogIndex,
    keys: Arc<KeyLog>,
    windows: Arc<Windows>,
    /// Files of segments that nobody needs any more, to be used again.
    recycled: ArrayQueue<PathBuf>,
    /// Held for reading by whoever copies segments, for writing while one is given away.
    hold: RwLock<()>,
    /// Commits that the disk completed.
    pub commits: Counter,
    /// Bytes of frames made durable, padding included.
    pub committed_bytes: Counter,
    /// Segments begun.
    pub rotations: Counter,
}

impl WalShared {
    #[allow(clippy::too_many_arguments)] // what recovery found, each used once
    pub(crate) fn new(
        id: LogId,
        dir: PathBuf,
        staging: Staging,
        durable: u64,
        durable_lsn: u64,
        checkpoint: u64,
        flushed_lsn: u64,
        notes: spsc::Consumer<Note>,
        index: &Share,
        keys: &Share,
        windows: &Share,
    ) -> WalShared {
        WalShared {
            id,
            pins: (0..staging.slots()).map(|_| SlotPin::new()).collect(),
            index: LogIndex::live(&dir, flushed_lsn, notes, index),
            keys: Arc::new(KeyLog::within(keys)),
            windows: Windows::new(&dir, id, windows),
            dir,
            durable: Line(AtomicU64::new(durable)),
            durable_lsn: AtomicU64::new(durable_lsn),
            checkpoint: AtomicU64::new(checkpoint),
            state: Line(AtomicU8::new(WalState::Running as u8)),
            failure: OnceLock::new(),
            prepare_failing: AtomicBool::new(false),
            prepare_error: Mutex::new(None),
            staging,
            pinned: AtomicUsize::new(0),
            recycled: ArrayQueue::new(RECYCLED),
            hold: RwLock::new(()),
            commits: Counter::new(),
            committed_bytes: Counter::new(),
            rotations: Counter::new(),
        }
    }

    /// Whose log.
    pub fn id(&self) -> LogId {
        self.id
    }

    /// The shard's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Entries of frames up to this one survive a power cut.
    pub fn durable(&self) -> FrameSeq {
        FrameSeq(self.durable.0.load(Ordering::Acquire))
    }

    /// The durable log ends here.
    pub fn durable_lsn(&self) -> u64 {
        self.durable_lsn.load(Ordering::Acquire)
    }

    /// Where recovery would begin to replay: the newest durable complete snapshot.
    pub fn checkpoint(&self) -> u64 {
        self.checkpoint.load(Ordering::Acquire)
    }

    /// Whether the log takes entries.
    pub fn state(&self) -> WalState {
        match self.state.0.load(Ordering::Acquire) {
            0 => WalState::Running,
            1 => WalState::DiskFull,
            2 => WalState::Failed,
            _ => WalState::Closed,
        }
    }

    /// Why the log does not take entries, in words; `None` while it does.
    pub fn reason(&self) -> Option<String> {
        match self.state() {
            WalState::Failed => self.failure.get().cloned(),
            WalState::DiskFull => self
                .prepare_error
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            WalState::Running | WalState::Closed => None,
        }
    }

    /// The staging file, and whether it lies in hugepages.
    pub fn staging(&self) -> (&Path, bool) {
        (self.staging.path(), self.staging.hugepages)
    }

    pub(crate) fn index(&self) -> &LogIndex {
        &self.index
    }

    /// The keys of what the index has.
    pub(crate) fn keys(&self) -> &Arc<KeyLog> {
        &self.keys
    }

    pub(crate) fn windows(&self) -> &Arc<Windows> {
        &self.windows
    }

    /// The segment at `base` is in the store's files: its own becomes a later segment or goes. Not before
    /// the index has let go of it and recovery no longer begins in it. Waits while segments are held.
    pub(crate) fn recycle(&self, base: u64) -> io::Result<()> {
        let _alone = self.hold.write().unwrap_or_else(PoisonError::into_inner);
        let path = segment_path(&self.dir, base);
        self.windows.forget(base);
        // Recovery removes what has this extension.
        let spare = path.with_extension("spare.tmp");
        fs::rename(&path, &spare)?;
        match self.recycled.push(spare) {
            Ok(()) => Ok(()),
            Err(spare) => fs::remove_file(spare),
        }
    }

    /// As [`WalShared::recycle`], of any file.
    #[cfg(all(test, not(loom)))]
    pub(super) fn offer(&self, spare: PathBuf) {
        let _ = self.recycled.push(spare);
    }

    /// Keeps all segments that there are as they are, but for what is appended, while the guard lives. Maintenance may
    /// wait for it; the writer does not.
    pub(crate) fn hold_segments(&self) -> RwLockReadGuard<'_, ()> {
        self.hold.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// A file to make the next segment of.
    pub(crate) fn take_recycled(&self) -> Option<PathBuf> {
        self.recycled.pop()
    }

    pub(crate) fn set_state(&self, state: WalState) {
        self.state.0.store(state as u8, Ordering::Release);
    }

    pub(crate) fn fail(&self, reason: String) {
        let _ = self.failure.set(reason);
        self.set_state(WalState::Failed);
    }

    pub(crate) fn set_prepare_error(&self, error: Option<String>) {
        let failing = error.is_some();
        *self
            .prepare_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = error;
        self.prepare_failing.store(failing, Ordering::Release);
    }

    pub(crate) fn prepare_failing(&self) -> bool {
        self.prepare_failing.load(Ordering::Acquire)
    }

    pub(crate) fn set_durable(&self, seq: u64, lsn: u64) {
        self.durable_lsn.store(lsn, Ordering::Release);
        self.durable.0.store(seq, Ordering::Release);
    }

    pub(crate) fn set_checkpoint(&self, lsn: u64) {
        self.checkpoint.store(lsn, Ordering::Release);
    }

    /// Calls `f` with the durable frame at `lsn` if it still lies in a staging slot. `f` should only
    /// copy or scan: it holds the slot.
    pub(crate) fn with_staged<R>(
        &self,
        lsn: u64,
        f: impl FnOnce(&FrameHeader, &[u8]) -> R,
    ) -> Option<R> {
        struct Unpin<'a>(&'a WalShared, Option<&'a SlotPin>);
        impl Drop for Unpin<'_> {
            fn drop(&mut self) {
                if let Some(pin) = self.1 {
                    pin.unpin();
                }
                self.0.pinned.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let held = self.pinned.fetch_add(1, Ordering::Relaxed);
        let mut guard = Unpin(self, None);
        if held >= (self.pins.len() / PINNED_SHARE).max(1) {
            return None;
        }
        let slot = self.pins.iter().position(|pin| pin.try_pin(lsn))?;
        guard.1 = Some(&self.pins[slot]);
        // SAFETY: pinned until `guard` goes, which outlives the slices.
        let bytes = unsafe { self.staging.frame(slot, self.staging.slot_bytes()) };
        let header = FrameHeader::decode(bytes, bytes.len() as u64).ok()?;
        Some(f(&header, &bytes[..header.size()]))
    }
}
