//! The storage lcore's side of the log: reserve, publish, poll.
//!
//! [`WalWriter::reserve`] and [`WalWriter::publish`] touch only the staging slot of the open frame: a
//! few ns, no allocation, no lock, no system call. [`WalWriter::poll`] reaps completed writes and
//! submits the next ones. Invariants: frames are numbered and placed in the order in which they were
//! opened; `durable` moves over a frame only when its write and all writes before it (segment headers
//! too) were completed in full; after one failed or short write it never moves again.
//!
//! A group commit goes out at once when nothing is in flight and its writer is at leisure; otherwise, where
//! there is a free place, when the frame holds 256 KiB or its oldest entry has waited for the linger; and
//! when the frame is full. A commit costs the CPU some 25 µs on a virtual disk, whatever its size: at
//! leisure that is spent for latency, under load it would be taken from the messages.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use io_uring::{IoUring, opcode, types};

use super::aligned::AlignedBuf;
use super::error::WalError;
use super::frame::{EntryKind, FLAG_CLEAN, FRAME_ALIGN, FRAME_HEADER, LogId, entry_size};
use super::prepare::{Prepared, Preparer};
use super::recovery::{self, RecoveryReport, Replay};
use super::segment::{
    SEGMENT_HEADER, SegmentHeader, ZERO_BLOCK, create_zeroed, segment_path, shard_dir,
};
use super::shared::{WalShared, WalState};
use super::staging::{Sealed, Staging};
use super::window;
use crate::memory::budget::{Part, Share};
use crate::memory::spsc;
use crate::storage::PartitionKey;
use crate::storage::catalog::lock_file;
use crate::storage::frames::{FetchError, FrameReader};
use crate::storage::index::{BatchesNote, DEFAULT_BYTES, FrameNote, NOTES, Note};
use crate::storage::keylog;
use crate::wire::record_batch;

/// Memory of a log's keys where no budget is shared out.
const KEYS: u64 = (keylog::ACTIVE_BYTES + keylog::RUNS_BYTES) as u64;
/// More commits in flight only add latency (measured: 64 KiB at depth 16 doubles p50 over depth 4).
pub const MAX_IN_FLIGHT: usize = 64;
/// A frame must hold a datagram's batch, and a commit below this wastes the disk.
pub const MIN_COMMIT: usize = 64 << 10;
/// Slots hold a frame each; io_uring takes a registered buffer of up to 1 GiB.
pub const MAX_STAGING: u64 = 1 << 30;
/// Slots are packed with 32 bits of length and readers' scans are linear in their number.
pub const MAX_SLOTS: u64 = 4096;
/// A frame of this size or more does not wait for company: 256 KiB writes reach the disk's bandwidth.
const EAGER: usize = 256 << 10;
/// Two commits of a middling disk; well below the millisecond that an acknowledgement may take.
pub const DEFAULT_LINGER: Duration = Duration::from_micros(500);
/// The index follows the log at this distance when nobody reads.
const INDEX_PERIOD: Duration = Duration::from_millis(10);

/// Commits of fewer bytes in that time leave the disk to spare for reading what the index missed.
const INDEX_QUIET: u64 = 256 << 10;

/// Sequence number of a frame; an entry is durable when `durable()` has reached its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct FrameSeq(pub u64);

/// Why there is no room for an entry now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// All slots wait for the disk, or the next segment is not ready: try again after a poll.
    #[error("the log waits for the disk")]
    Backpressure,
    /// The disk is full; passes when space returns.
    #[error("the disk is full")]
    Full,
    /// The log has failed, for good.
    #[error("the log has failed")]
    Failed,
    /// The entry is larger than [`WalWriter::max_entry`].
    #[error("the entry is larger than a commit")]
    TooLarge,
}

/// How a log is written.
#[derive(Debug, Clone)]
pub struct WalConfig {
    /// The store's folder.
    pub dir: PathBuf,
    /// The store's id, of the catalog.
    pub store_id: u128,
    /// Bytes of a segment; a multiple of 4096, at least four commits.
    pub segment_size: u64,
    /// Segments kept ready ahead of the writer.
    pub prepared_segments: usize,
    /// Bytes of the staging buffer: commits in flight plus those that wait for the disk.
    pub staging_size: u64,
    /// Folder of the staging file (hugetlbfs or tmpfs); `None`: found.
    pub staging_dir: Option<PathBuf>,
    /// Bytes of the largest group commit; a multiple of 4096. Bounds the size of an entry.
    pub commit_size: usize,
    /// Group commits in flight, 1 to [`MAX_IN_FLIGHT`].
    pub commits_in_flight: usize,
    /// Longest wait of an entry for company under load: while other commits are in flight, or more entries
    /// are at hand.
    pub linger: Duration,
    /// What lies before this is in the store's files and is not looked for in the log.
    pub flushed_lsn: u64,
    /// What the index of the log may take of memory.
    pub index: Share,
    /// And the keys of what is in the log, of topics with a key index.
    pub keys: Share,
    /// And the stretches of it that readers share.
    pub windows: Share,
    /// Open a log that has lost a durable part, without what lies behind the damage. What is cut is
    /// kept under another name.
    pub accept_damage: bool,
}

impl WalConfig {
    /// The measured defaults: 256 MiB segments, 32 slots of 1 MiB, 4 in flight.
    pub fn new(dir: impl Into<PathBuf>, store_id: u128) -> WalConfig {
        WalConfig {
            dir: dir.into(),
            store_id,
            segment_size: 256 << 20,
            prepared_segments: 2,
            staging_size: 32 << 20,
            staging_dir: None,
            commit_size: 1 << 20,
            commits_in_flight: 4,
            linger: DEFAULT_LINGER,
            flushed_lsn: 0,
            index: Share::alone(Part::OffsetIndex, DEFAULT_BYTES),
            keys: Share::alone(Part::KeyIndex, KEYS),
            windows: Share::alone(Part::LogWindows, window::MOST as u64),
            accept_damage: false,
        }
    }

    fn check(&self) -> Result<usize, WalError> {
        let bad = |key, reason: String| Err(WalError::Config { key, reason });
        if !self.commit_size.is_multiple_of(FRAME_ALIGN)
            || self.commit_size < MIN_COMMIT
            || self.commit_size > super::frame::MAX_FRAME
        {
            return bad(
                "commit_size",
                format!(
                    "must be a multiple of 4096 from {MIN_COMMIT} to {}",
                    super::frame::MAX_FRAME
                ),
            );
        }
        let slots = self.staging_size / self.commit_size as u64;
        if !(4..=MAX_SLOTS).contains(&slots) || self.staging_size > MAX_STAGING {
            return bad(
                "staging_size",
                format!("must be 4 to {MAX_SLOTS} times commit_size and at most {MAX_STAGING}"),
            );
        }
        if !self.segment_size.is_multiple_of(FRAME_ALIGN as u64)
            || self.segment_size < 4 * self.commit_size as u64
            || self.segment_size > 1 << 40
        {
            return bad(
                "segment_size",
                "must be a multiple of 4096, at least 4 times commit_size, at most 1 TiB"
                    .to_owned(),
            );
        }
        if self.commits_in_flight == 0 || self.commits_in_flight > MAX_IN_FLIGHT {
            return bad("commits_in_flight", format!("must be 1 to {MAX_IN_FLIGHT}"));
        }
        if self.prepared_segments == 0 || self.prepared_segments > 1024 {
            return bad("prepared_segments", "must be 1 to 1024".to_owned());
        }
        Ok(slots as usize)
    }
}

/// The frame that entries are being added to.
struct Open {
    slot: usize,
    used: usize,
    entries: u32,
    seq: u64,
    lsn: u64,
    /// When `poll` first saw an entry in it; 0: not yet.
    since_ns: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// The header of the segment with this number.
    Header,
    /// The frame in this slot.
    Frame { slot: usize },
}

/// A write, sealed or in flight.
struct Op {
    what: What,
    /// Number of the segment, counted from this writer's first.
    segment: u64,
    seq: u64,
    lsn: u64,
    len: usize,
    done: bool,
}

/// A segment that is written to.
pub(super) struct Active {
    number: u64,
    pub(super) file: File,
    base: u64,
    size: u64,
    header: AlignedBuf,
    /// Writes not yet completed.
    pending: usize,
}

/// The single writer of a shard's log. May be made on one thread and moved to another.
pub struct WalWriter {
    shared: Arc<WalShared>,
    ring: IoUring,
    depth: usize,
    linger_ns: u64,
    eager: usize,
    slot_bytes: usize,
    busy: Vec<bool>,
    free: usize,
    cursor: usize,
    open: Option<Open>,
    reserved: Option<usize>,
    sealed: VecDeque<Op>,
    in_flight: VecDeque<Op>,
    /// Number of the op at the front of `in_flight`.
    front: u64,
    pub(super) segments: VecDeque<Active>,
    next_segment: u64,
    first: Option<Prepared>,
    preparer: Option<Preparer>,
    indexer: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
    notes: spsc::Producer<Note>,
    /// The newest batches of the open frame, of one partition, that the index was not told of yet.
    noted: Option<BatchesNote>,
    /// The index was not told of all batches of the open frame: the ring was full.
    notes_lost: bool,
    next_seq: u64,
    next_lsn: u64,
    prev_crc: u32,
    needs_snapshot: bool,
    snapshot_lsn: u64,
    /// (sequence of the last part's frame, LSN of the first part's): a checkpoint once durable.
    checkpoints: VecDeque<(u64, u64)>,
    /// Nothing was written since the log was found cleanly closed.
    still_clean: bool,
    unsubmitted: usize,
    _lock: File,
}

impl WalWriter {
    /// Opens the log of `shard`, makes it durable up to its last staged entry, and replays the shard's
    /// state into `replay`. Cost: reads the log from the last checkpoint on.
    pub fn open(
        config: &WalConfig,
        shard: u16,
        replay: &mut impl Replay,
    ) -> Result<(WalWriter, Arc<WalShared>, RecoveryReport), WalError> {
        let slots = config.check()?;
        let id = LogId {
            store: config.store_id,
            shard,
        };
        let dir = shard_dir(&config.dir, shard);
        fs::create_dir_all(&dir).map_err(WalError::io("cannot make the folder", &dir))?;
        super::segment::sync_dir(&config.dir)
            .map_err(WalError::io("cannot sync the folder", &config.dir))?;
        let lock_path = dir.join("lock");
        let lock = lock_file(&lock_path)
            .map_err(WalError::io("cannot lock", &lock_path))?
            .ok_or_else(|| WalError::Locked { path: dir.clone() })?;
        // Fails early and clearly, before anything is changed.
        let ring = IoUring::builder()
            .build((MAX_IN_FLIGHT * 2) as u32)
            .map_err(|source| WalError::IoUring { source })?;
        let recovered = recovery::recover(config, id, &dir, replay)?;

        let staging =
            Staging::create(config.staging_dir.as_deref(), id, slots, config.commit_size)?;
        let (ptr, len) = staging.slot_area();
        let buffers = [libc::iovec {
            iov_base: ptr.cast(),
            iov_len: len,
        }];
        let ready = (|| {
            // SAFETY: the mapping lives in `shared`, which the writer keeps until the ring is gone.
            unsafe { ring.submitter().register_buffers(&buffers) }
                .map_err(|source| WalError::RegisterBuffers { bytes: len, source })?;
            recovery::write_pointer(&dir, staging.path())
        })();
        if let Err(error) = ready {
            let _ = staging.remove();
            return Err(error);
        }

        let mut next_base = recovered.next_base;
        let tail_room = recovered
            .tail
            .as_ref()
            .map_or(0, |t| t.header.end() - recovered.next_lsn);
        let mut first = None;
        if tail_room < (config.commit_size + FRAME_ALIGN) as u64 {
            let path = segment_path(&dir, next_base);
            let file = match create_zeroed(&path, config.segment_size, |_| Some(ZERO_BLOCK)) {
                Ok(file) => Some(file),
                // With a log to read the store opens, refusing writes until there is space.
                Err(e) if is_full(&e) && recovered.tail.is_some() => None,
                Err(e) => {
                    let _ = staging.remove();
                    let _ = recovery::remove_pointer(&dir);
                    return Err(if is_full(&e) {
                        WalError::DiskFull {
                            path,
                            need: config.segment_size,
                            source: e,
                        }
                    } else {
                        WalError::io("cannot prepare the segment", &path)(e)
                    });
                }
            };
            if let Some(file) = file {
                first = Some(Prepared {
                    file,
                    path,
                    base: next_base,
                    size: config.segment_size,
                    reused: false,
                });
                next_base += config.segment_size;
            }
        }
        let (notes, index_notes) = spsc::ring(NOTES);
        let shared = Arc::new(WalShared::new(
            id,
            dir,
            staging,
            recovered.last_seq,
            recovered.next_lsn,
            recovered.checkpoint,
            config.flushed_lsn,
            index_notes,
            &config.index,
            &config.keys,
            &config.windows,
        ));
        let preparer = Preparer::start(
            Arc::clone(&shared),
            next_base,
            config.segment_size,
            config.prepared_segments,
        )
        .map_err(WalError::io("cannot start a thread for", shared.dir()))?;
        let mut segments = VecDeque::with_capacity(4);
        let mut next_segment = 0;
        if let Some(tail) = recovered.tail {
            segments.push_back(Active {
                number: 0,
                file: tail.file,
                base: tail.header.base,
                size: tail.header.size,
                header: AlignedBuf::zeroed(SEGMENT_HEADER),
                pending: 0,
            });
            next_segment = 1;
        }
        let indexer = start_indexer(&shared)
            .map_err(WalError::io("cannot start a thread for", shared.dir()))?;
        let writer = WalWriter {
            shared: Arc::clone(&shared),
            ring,
            depth: config.commits_in_flight,
            linger_ns: config.linger.as_nanos().min(u128::from(u64::MAX)) as u64,
            eager: EAGER.min(config.commit_size),
            slot_bytes: config.commit_size,
            busy: vec![false; slots],
            free: slots,
            cursor: 0,
            open: None,
            reserved: None,
            sealed: VecDeque::with_capacity(slots + 8),
            in_flight: VecDeque::with_capacity(MAX_IN_FLIGHT),
            front: 0,
            segments,
            next_segment,
            first,
            preparer: Some(preparer),
            indexer: Some(indexer),
            notes,
            noted: None,
            notes_lost: false,
            next_seq: recovered.last_seq + 1,
            next_lsn: recovered.next_lsn,
            prev_crc: recovered.last_crc,
            needs_snapshot: false,
            snapshot_lsn: 0,
            checkpoints: VecDeque::with_capacity(8),
            still_clean: recovered.clean,
            unsubmitted: 0,
            _lock: lock,
        };
        Ok((writer, shared, recovered.report))
    }

    /// Most bytes of one entry.
    pub fn max_entry(&self) -> usize {
        self.slot_bytes - FRAME_HEADER - entry_size(0)
    }

    /// Room for one entry of at most `len` bytes in the open frame. What is written there counts only
    /// after [`WalWriter::publish`]; another call gives the room up.
    #[inline]
    pub fn reserve(&mut self, len: usize) -> Result<&mut [u8], Refusal> {
        if len > self.max_entry() {
            return Err(Refusal::TooLarge);
        }
        let fits = |open: &Open, bytes| open.used + entry_size(len) <= bytes;
        if !self
            .open
            .as_ref()
            .is_some_and(|open| fits(open, self.slot_bytes))
        {
            self.next_frame()?;
        } else if self.shared.state() == WalState::Failed {
            return Err(Refusal::Failed);
        }
        let Some(open) = &self.open else {
            return Err(Refusal::Backpressure);
        };
        self.reserved = Some(len);
        // SAFETY: the open frame's slot is the writer's; the slice borrows self mutably.
        Ok(unsafe { self.shared.staging.room(open.slot, open.used, len) })
    }

    /// Adds the reserved entry, shortened to `len` bytes, as a record batch of `key`. From here on it
    /// survives a killed process; it is durable when [`WalWriter::durable`] reaches the result.
    ///
    /// # Panics
    /// Without a reservation of at least `len` bytes: that would be a bug of the caller.
    #[inline]
    pub fn publish(&mut self, key: PartitionKey, len: usize) -> FrameSeq {
        self.note(key, len);
        self.publish_as(EntryKind::Batch(key), len).0
    }

    /// Tells the index of the batch in the reserved room.
    #[inline]
    fn note(&mut self, key: PartitionKey, len: usize) {
        let Some(open) = &self.open else { return };
        // SAFETY: the open frame's slot is the writer's, and the slice is gone before it is written to.
        let bytes = unsafe { self.shared.staging.room(open.slot, open.used, len) };
        // The index passes over what is no batch, too.
        let Ok(batch) = record_batch::parse_whole(bytes) else {
            return;
        };
        if let Some(noted) = self.noted.as_mut().filter(|noted| noted.key == key) {
            noted.end = noted.end.max(batch.next_offset());
            noted.max_time = noted.max_time.max(batch.max_timestamp);
            noted.bytes += bytes.len() as u64;
            return;
        }
        let new = BatchesNote {
            seq: open.seq,
            key,
            first: batch.base_offset,
            end: batch.next_offset(),
            max_time: batch.max_timestamp,
            bytes: bytes.len() as u64,
        };
        if let Some(noted) = self.noted.replace(new) {
            self.notes_lost |= !self.notes.push(Note::Batches(noted));
        }
    }

    /// Adds the reserved entry as part `index` of `count` of a snapshot of the shard's state. Parts are
    /// published in order; the last one ends [`WalWriter::needs_snapshot`].
    pub fn publish_snapshot(&mut self, index: u32, count: u32, len: usize) -> FrameSeq {
        let (seq, lsn) = self.publish_as(EntryKind::Snapshot { index, count }, len);
        if index == 0 {
            self.snapshot_lsn = lsn;
        }
        if index + 1 == count {
            self.needs_snapshot = false;
            self.checkpoints.push_back((seq.0, self.snapshot_lsn));
        }
        seq
    }

    #[inline]
    fn publish_as(&mut self, kind: EntryKind, len: usize) -> (FrameSeq, u64) {
        let reserved = self.reserved.take().expect("publish follows reserve");
        assert!(len <= reserved, "an entry longer than its reservation");
        let open = self.open.as_mut().expect("a reservation has a frame");
        self.shared
            .staging
            .publish(open.slot, open.used, open.entries, kind, len);
        open.used += entry_size(len);
        open.entries += 1;
        (FrameSeq(open.seq), open.lsn)
    }

    /// True after a new segment was begun: the shard then writes its state as snapshot parts, so that
    /// recovery can begin there. May wait; until then recovery begins earlier.
    pub fn needs_snapshot(&self) -> bool {
        self.needs_snapshot
    }

    /// The frame up to which all entries are durable.
    #[inline]
    pub fn durable(&self) -> FrameSeq {
        self.shared.durable()
    }

    /// Whether the log takes entries.
    pub fn state(&self) -> WalState {
        self.shared.state()
    }

    /// Slots that are neither filled nor in flight: what [`WalWriter::reserve`] can still open without
    /// the disk.
    #[inline]
    pub fn free_slots(&self) -> usize {
        self.free
    }

    /// All slots.
    pub fn slots(&self) -> usize {
        self.busy.len()
    }

    /// Segments ready for use.
    pub fn prepared(&self) -> usize {
        self.preparer.as_ref().map_or(0, Preparer::ready) + usize::from(self.first.is_some())
    }

    /// Commits in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// True when something published is not yet durable.
    pub fn has_pending(&self) -> bool {
        !self.in_flight.is_empty()
            || !self.sealed.is_empty()
            || self.open.as_ref().is_some_and(|o| o.entries > 0)
    }

    /// The io_uring's descriptor: readable when a commit has completed.
    pub fn ring_fd(&self) -> i32 {
        self.ring.as_raw_fd()
    }

    /// Seals the open frame if there is one with entries, and opens the next.
    #[cold]
    fn next_frame(&mut self) -> Result<(), Refusal> {
        self.reserved = None;
        if self.shared.state() == WalState::Failed {
            return Err(Refusal::Failed);
        }
        self.seal_open(0);
        self.open_frame(false)
    }

    fn open_frame(&mut self, closing: bool) -> Result<(), Refusal> {
        // A frame that was opened and never used is used now.
        if self.open.is_some() {
            return Ok(());
        }
        // Behind every frame there stays room for the empty one that marks a clean stop.
        let need = if closing {
            FRAME_ALIGN
        } else {
            self.slot_bytes + FRAME_ALIGN
        } as u64;
        let room = self
            .segments
            .back()
            .map_or(0, |s| (s.base + s.size).saturating_sub(self.next_lsn));
        if room < need {
            self.rotate()?;
        }
        let slot = self.take_slot().ok_or(Refusal::Backpressure)?;
        self.shared.staging.begin(
            slot,
            self.next_seq,
            self.next_lsn,
            self.shared.durable().0,
            self.prev_crc,
        );
        self.open = Some(Open {
            slot,
            used: FRAME_HEADER,
            entries: 0,
            seq: self.next_seq,
            lsn: self.next_lsn,
            since_ns: 0,
        });
        self.next_seq += 1;
        Ok(())
    }

    fn take_slot(&mut self) -> Option<usize> {
        let slots = self.busy.len();
        for i in 0..slots {
            let slot = (self.cursor + i) % slots;
            if !self.busy[slot] && self.shared.pins[slot].try_reclaim() {
                self.busy[slot] = true;
                self.free -= 1;
                self.cursor = (slot + 1) % slots;
                return Some(slot);
            }
        }
        None
    }

    /// Ends the segment here: what is written from now on goes to the next one, whose snapshot is due. False: that one is
    /// not ready yet; poll, and call again. Gives up room that was reserved and not published.
    pub fn end_segment(&mut self) -> Result<bool, Refusal> {
        if self.shared.state() == WalState::Failed {
            return Err(Refusal::Failed);
        }
        self.reserved = None;
        self.seal_open(0);
        if let Some(unused) = self.open.take() {
            // The next frame has its number, and its slot, where nothing else may be found after a kill.
            self.next_seq = unused.seq;
            self.busy[unused.slot] = false;
            self.free += 1;
            self.cursor = unused.slot;
        }
        match self.rotate() {
            Ok(()) => Ok(true),
            Err(Refusal::Backpressure) => Ok(false),
            Err(refusal) => Err(refusal),
        }
    }

    /// Begins the next segment. Once a segment.
    fn rotate(&mut self) -> Result<(), Refusal> {
        let prepared = match self.first.take() {
            Some(first) => Some(first),
            None => self.preparer.as_ref().and_then(Preparer::take),
        };
        let Some(prepared) = prepared else {
            if self.shared.prepare_failing() {
                if self.shared.state() == WalState::Running {
                    self.shared.set_state(WalState::DiskFull);
                }
                return Err(Refusal::Full);
            }
            return Err(Refusal::Backpressure);
        };
        if self.shared.state() == WalState::DiskFull {
            self.shared.set_state(WalState::Running);
        }
        let mut header = AlignedBuf::zeroed(SEGMENT_HEADER);
        SegmentHeader {
            id: self.shared.id(),
            base: prepared.base,
            size: prepared.size,
            first_seq: self.next_seq,
            prev_crc: self.prev_crc,
            reused: prepared.reused,
        }
        .encode(&mut header);
        let number = self.next_segment;
        self.next_segment += 1;
        self.sealed.push_back(Op {
            what: What::Header,
            segment: number,
            seq: self.next_seq - 1,
            lsn: prepared.base,
            len: SEGMENT_HEADER,
            done: false,
        });
        self.segments.push_back(Active {
            number,
            file: prepared.file,
            base: prepared.base,
            size: prepared.size,
            header,
            pending: 1,
        });
        tracing::debug!(path = %prepared.path.display(), "segment begun");
        self.next_lsn = prepared.base + SEGMENT_HEADER as u64;
        self.needs_snapshot = true;
        self.shared.rotations.add(1);
        Ok(())
    }

    /// Seals the open frame if it has entries (or `flags`), and queues it.
    pub(super) fn seal_open(&mut self, flags: u8) {
        let Some(open) = self.open.take_if(|open| open.entries > 0 || flags != 0) else {
            return;
        };
        let Sealed { size, crc, time_ms } =
            self.shared
                .staging
                .seal(open.slot, open.used, self.shared.durable().0, flags);
        let segment = self.segments.back_mut().expect("a frame has a segment");
        segment.pending += 1;
        if let Some(noted) = self.noted.take() {
            self.notes_lost |= !self.notes.push(Note::Batches(noted));
        }
        // A frame without its note is read by the index.
        if !std::mem::take(&mut self.notes_lost) {
            self.notes.push(Note::Frame(FrameNote {
                seq: open.seq,
                lsn: open.lsn,
                len: size as u32,
                crc,
                prev_crc: self.prev_crc,
                time_ms,
                base: segment.base,
                size: segment.size,
            }));
        }
        self.prev_crc = crc;
        self.next_lsn = open.lsn + size as u64;
        self.still_clean = flags & FLAG_CLEAN != 0;
        self.sealed.push_back(Op {
            what: What::Frame { slot: open.slot },
            segment: segment.number,
            seq: open.seq,
            lsn: open.lsn,
            len: size,
            done: false,
        });
    }

    /// Reaps completed writes and submits what may go out. `mono_ns`: a monotonic clock; `loaded`: more
    /// entries are at hand, so that a commit may wait for them even if the disk is free. Returns the
    /// number of writes completed and submitted; 0: nothing to do. A system call only when something
    /// is submitted.
    #[inline]
    pub fn poll(&mut self, mono_ns: u64, loaded: bool) -> usize {
        let mut work = 0;
        if !self.in_flight.is_empty() {
            work += self.reap();
        }
        // What the kernel did not take last time is submitted again, also when no place is free.
        if self.in_flight.len() < self.depth || self.unsubmitted > 0 {
            work += self.submit_ready(mono_ns, loaded, false);
        }
        // Space has returned: say so without waiting for somebody to try.
        if work == 0 && self.shared.state() == WalState::DiskFull && self.prepared() > 0 {
            self.shared.set_state(WalState::Running);
        }
        work
    }

    fn submit_ready(&mut self, mono_ns: u64, loaded: bool, flush: bool) -> usize {
        let mut pushed = 0;
        if self.shared.state() == WalState::Failed {
            return 0;
        }
        while self.in_flight.len() < self.depth {
            if self.sealed.is_empty() {
                let idle = self.in_flight.is_empty() && !loaded;
                let (eager, linger) = (self.eager, self.linger_ns);
                let Some(open) = self.open.as_mut().filter(|o| o.entries > 0) else {
                    break;
                };
                if open.since_ns == 0 {
                    open.since_ns = mono_ns.max(1);
                }
                let due = flush
                    || idle
                    || open.used >= eager
                    || mono_ns.saturating_sub(open.since_ns) >= linger;
                if !due {
                    break;
                }
                self.reserved = None;
                self.seal_open(0);
            }
            let Some(op) = self.sealed.pop_front() else {
                break;
            };
            self.push(op);
            pushed += 1;
        }
        if self.unsubmitted > 0 {
            self.enter(0);
        }
        pushed
    }

    /// Puts a write into the submission queue; the queue is larger than the depth.
    fn push(&mut self, op: Op) {
        let segment = self
            .segments
            .iter()
            .find(|s| s.number == op.segment)
            .expect("a queued write keeps its segment");
        let fd = types::Fd(segment.file.as_raw_fd());
        let offset = op.lsn - segment.base;
        let number = self.front + self.in_flight.len() as u64;
        let entry = match op.what {
            What::Frame { slot } => {
                opcode::WriteFixed::new(fd, self.shared.staging.slot_ptr(slot), op.len as u32, 0)
                    .offset(offset)
                    .rw_flags(libc::RWF_DSYNC)
                    .build()
            }
            What::Header => opcode::Write::new(fd, segment.header.as_ptr(), op.len as u32)
                .offset(offset)
                .rw_flags(libc::RWF_DSYNC)
                .build(),
        }
        .user_data(number);
        // SAFETY: buffer and descriptor live until the write has completed: slots and segments are
        // given up in `reap` only, and drop waits for all that is in flight.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(
            pushed.is_ok(),
            "the submission queue is larger than the depth"
        );
        self.in_flight.push_back(op);
        self.unsubmitted += 1;
    }

    /// Leaves all sealed frames as when the kernel did not take them (EAGAIN, EBUSY).
    #[cfg(all(test, not(loom)))]
    pub(super) fn push_without_submitting(&mut self) {
        while let Some(op) = self.sealed.pop_front() {
            self.push(op);
        }
    }

    fn enter(&mut self, want: usize) {
        match self.ring.submit_and_wait(want) {
            Ok(submitted) => self.unsubmitted = self.unsubmitted.saturating_sub(submitted),
            Err(error) => match error.raw_os_error() {
                // Not taken this time; the next poll submits again.
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                _ => self.fail(format!("io_uring refuses to submit: {error}")),
            },
        }
    }

    #[cold]
    fn fail(&mut self, reason: String) {
        if self.shared.state() != WalState::Failed {
            tracing::error!(
                shard = self.shared.id().shard,
                "the log has failed: {reason}"
            );
            self.shared.fail(reason);
        }
    }

    fn reap(&mut self) -> usize {
        let mut reaped = 0;
        let mut failure = None;
        {
            let mut completions = self.ring.completion();
            completions.sync();
            for completion in &mut completions {
                reaped += 1;
                let at = completion.user_data().wrapping_sub(self.front) as usize;
                let Some(op) = self.in_flight.get_mut(at) else {
                    continue;
                };
                op.done = true;
                let result = completion.result();
                if result != op.len as i32 && failure.is_none() {
                    let segment = self.segments.iter().find(|s| s.number == op.segment);
                    let at = op.lsn - segment.map_or(0, |s| s.base);
                    let path = segment_path(self.shared.dir(), op.lsn - at);
                    failure = Some(if result < 0 {
                        format!(
                            "writing {} bytes at {at} of {}: {}",
                            op.len,
                            path.display(),
                            io::Error::from_raw_os_error(-result)
                        )
                    } else {
                        format!(
                            "writing {} bytes at {at} of {}: only {result} were written",
                            op.len,
                            path.display()
                        )
                    });
                }
            }
        }
        if let Some(reason) = failure {
            self.fail(reason);
        }
        if reaped > 0 {
            self.advance();
        }
        reaped
    }

    /// Moves `durable` over completed writes at the front.
    fn advance(&mut self) {
        let failed = self.shared.state() == WalState::Failed;
        let mut durable = None;
        while self.in_flight.front().is_some_and(|op| op.done) {
            let Some(op) = self.in_flight.pop_front() else {
                break;
            };
            self.front += 1;
            if failed {
                // Its slot stays as it is, for recovery.
                continue;
            }
            if let What::Frame { slot } = op.what {
                durable = Some((op.seq, op.lsn + op.len as u64));
                self.shared.commits.add(1);
                self.shared.committed_bytes.add(op.len as u64);
                self.shared.pins[slot].open_to_readers(op.lsn);
                self.busy[slot] = false;
                self.free += 1;
            }
            while let Some(segment) = self.segments.front_mut() {
                if segment.number == op.segment {
                    segment.pending -= 1;
                }
                if segment.pending == 0 && self.segments.len() > 1 {
                    self.segments.pop_front();
                } else {
                    break;
                }
            }
        }
        if let Some((seq, lsn)) = durable {
            self.shared.set_durable(seq, lsn);
            while let Some(&(last, lsn)) = self.checkpoints.front() {
                if last > seq {
                    break;
                }
                self.checkpoints.pop_front();
                self.shared.set_checkpoint(lsn);
            }
        }
    }

    /// Sleeps until a commit completes, at most `timeout`; returns at once when none is in flight. For
    /// an idle loop; the next [`WalWriter::poll`] reaps.
    pub fn wait(&mut self, timeout: Duration) {
        if self.in_flight.is_empty() {
            return;
        }
        let timespec = types::Timespec::from(timeout);
        let args = types::SubmitArgs::new().timespec(&timespec);
        // A timeout (ETIME) and a signal are no failures; whatever else is wrong shows at the next
        // submission.
        if let Ok(submitted) = self.ring.submitter().submit_with_args(1, &args) {
            self.unsubmitted = self.unsubmitted.saturating_sub(submitted);
        }
    }

    /// Writes everything that was published and waits until it is durable.
    pub fn flush(&mut self) -> Result<(), WalError> {
        while self.has_pending() && self.shared.state() != WalState::Failed {
            self.submit_ready(0, false, true);
            if !self.in_flight.is_empty() {
                self.enter(1);
                self.reap();
            }
        }
        self.check_failed()
    }

    fn check_failed(&self) -> Result<(), WalError> {
        if self.shared.state() == WalState::Failed {
            return Err(WalError::Failed {
                reason: self.shared.reason().unwrap_or_default(),
            });
        }
        Ok(())
    }

    /// Makes everything durable, marks the log cleanly closed and removes the staging file. On an error
    /// the staging file stays, and the next start recovers from it.
    pub fn close(mut self) -> Result<(), WalError> {
        self.flush()?;
        let room = self
            .segments
            .back()
            .map_or(0, |s| (s.base + s.size).saturating_sub(self.next_lsn));
        if !self.still_clean && room >= FRAME_ALIGN as u64 {
            // Readers let go of their slots within microseconds.
            while self.open_frame(true) == Err(Refusal::Backpressure) {
                std::thread::yield_now();
            }
            self.seal_open(FLAG_CLEAN);
            self.flush()?;
        }
        recovery::remove_pointer(self.shared.dir())?;
        self.shared
            .staging
            .remove()
            .map_err(WalError::io("cannot remove", self.shared.staging.path()))
    }
}

impl Drop for WalWriter {
    /// Without [`WalWriter::close`] this is like a killed process: what is in flight completes, nothing
    /// more is written, and the staging file stays for recovery.
    fn drop(&mut self) {
        while !self.in_flight.is_empty() {
            let before = self.in_flight.len();
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(_) if self.unsubmitted >= before => break,
                Err(_) => std::thread::yield_now(),
            }
            self.reap();
        }
        self.preparer = None;
        if let Some((stop, handle)) = self.indexer.take() {
            stop.store(true, Ordering::Relaxed);
            handle.thread().unpark();
            let _ = handle.join();
        }
        if self.shared.state() != WalState::Failed {
            self.shared.set_state(WalState::Closed);
        }
        // Readers may keep the file open for longer.
        self.shared.staging.unlock();
    }
}

/// The thread that keeps the index close behind the log, while frames are still in memory.
fn start_indexer(shared: &Arc<WalShared>) -> io::Result<(Arc<AtomicBool>, JoinHandle<()>)> {
    let stop = Arc::new(AtomicBool::new(false));
    let handle = std::thread::Builder::new()
        .name(format!("wal-index-{}", shared.id().shard))
        .spawn({
            let (shared, stop) = (Arc::clone(shared), Arc::clone(&stop));
            move || {
                let mut reader = FrameReader::live(Arc::clone(&shared));
                let mut said = false;
                let mut committed = 0;
                while !stop.load(Ordering::Relaxed) {
                    // Under load only frames in memory: reading the file would take the disk from the
                    // commits, and pages in its cache make O_DIRECT writes leave the fast path.
                    let now = shared.committed_bytes.get();
                    reader.staged_only = now - committed > INDEX_QUIET;
                    committed = now;
                    match shared.index().catch_up(&mut reader) {
                        Ok(()) | Err(FetchError::NotStaged) => {}
                        Err(error) if !said => {
                            tracing::error!(
                                shard = shared.id().shard,
                                "cannot index the log: {error}"
                            );
                            said = true;
                        }
                        Err(_) => {}
                    }
                    if shared.keys().is_wanted() {
                        let (floor, stretches) = shared.index().stretches();
                        // A segment may go meanwhile; what stays unread is read by who looks a key up, or refused.
                        let _ = shared.keys().catch_up(floor, &stretches, &mut reader);
                    }
                    std::thread::park_timeout(INDEX_PERIOD);
                }
            }
        })?;
    Ok((stop, handle))
}

fn is_full(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG)
    )
}
