//! The staging file: the frames that are not yet durable, in memory that outlives the process.
//!
//! A file on hugetlbfs (or tmpfs, where no hugepages are reserved) of equal slots, each with one frame.
//! Invariant: a slot's published length, stored atomically, covers whole entries only, and a slot is
//! given to another frame only when its frame is durable. So whatever instruction a kill hits, the
//! frames behind the last durable one are in the file, complete up to their published length.
//! The file holds nothing of value once all its frames are durable; it is made anew at each start.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::allocate::{allocate, uninterrupted};
use super::error::WalError;
use super::frame::{
    ENTRY_HEADER, EntryKind, FRAME_HEADER, FRAME_MAGIC, FRAME_VERSION, LogId, OFF_CRC, OFF_DURABLE,
    OFF_FLAGS, OFF_LSN, OFF_PREV_CRC, OFF_PUBLISHED, OFF_SEQ, OFF_SHARD, OFF_STORE, OFF_TIME,
    OFF_VERSION, align_frame, entry_size, frame_crc, pack_published, u16_at, u32_at,
    unpack_published,
};

/// Bytes of the file's header; the slots follow.
pub const STAGING_HEADER: usize = 4096;
/// First eight bytes of a staging file in use.
pub const STAGING_MAGIC: [u8; 8] = *b"TAFFSTG\0";
/// Version of the staging format.
pub const STAGING_VERSION: u32 = 1;
/// Sizes are rounded up to this: the hugepage size that is asked for.
const HUGEPAGE: usize = 2 << 20;
const CRC_AT: usize = 56;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// A shared mapping of a whole file.
struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: plain shared memory; who may touch which byte when is the slots' protocol.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, len: usize) -> io::Result<Mapping> {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let ptr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if ptr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ptr = NonNull::new(ptr.cast()).ok_or(io::ErrorKind::Other)?;
        Ok(Mapping { ptr, len })
    }

    /// Faults all pages in, on this thread's NUMA node, so that running out is an error here and not
    /// a SIGBUS later.
    fn populate(&self) -> io::Result<()> {
        let populated = uninterrupted(|| {
            // SAFETY: the range is this mapping.
            let rc = unsafe {
                libc::madvise(
                    self.ptr.as_ptr().cast(),
                    self.len,
                    libc::MADV_POPULATE_WRITE,
                )
            };
            match rc {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
        match populated {
            // Before Linux 5.14: the reservation at mmap (hugetlbfs) or fallocate (tmpfs) must do.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and nothing borrows from it any more.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

/// The id of this boot: staging memory does not survive the next one.
pub(crate) fn boot_id() -> [u8; 16] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).unwrap_or(0).to_be_bytes()
}

fn fs_type(path: &Path) -> io::Result<(i64, u64)> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    // SAFETY: statfs is plain data, all zeros is a value of it.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` is NUL-terminated, `stat` is a place to write to.
    if unsafe { libc::statfs(path.as_ptr(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((stat.f_type as i64, stat.f_bsize as u64))
}

/// The mounted hugetlbfs folders with 2 MiB pages.
fn hugetlbfs_mounts() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let path = fields.nth(1)?;
            (fields.next()? == "hugetlbfs").then(|| PathBuf::from(path.replace("\\040", " ")))
        })
        .filter(|path| fs_type(path).is_ok_and(|(_, page)| page == HUGEPAGE as u64))
        .collect()
}

/// Where staging files may lie, best first.
pub(crate) fn candidate_dirs(configured: Option<&Path>) -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = configured.map(Path::to_owned).into_iter().collect();
    dirs.extend(hugetlbfs_mounts());
    dirs.push(PathBuf::from("/dev/shm"));
    dirs.dedup();
    dirs
}

/// The name of a log's staging file.
pub fn file_name(id: LogId) -> String {
    format!("taffrail-{:032x}-{}.staging", id.store, id.shard)
}

/// A staging file in use by this process.
pub(crate) struct Staging {
    map: Mapping,
    file: File,
    path: PathBuf,
    slots: usize,
    slot_bytes: usize,
    id: LogId,
    /// False: ordinary pages.
    pub(crate) hugepages: bool,
}

impl Staging {
    /// Makes the file: in `configured`, else on a hugetlbfs mount with room, else on /dev/shm (said in
    /// the log). No file of that name may exist in the folder.
    pub(crate) fn create(
        configured: Option<&Path>,
        id: LogId,
        slots: usize,
        slot_bytes: usize,
    ) -> Result<Staging, WalError> {
        let name = file_name(id);
        if let Some(dir) = configured {
            let bad = |reason: String| WalError::StagingDir {
                path: dir.to_owned(),
                reason,
            };
            let (kind, _) = fs_type(dir).map_err(|e| bad(e.to_string()))?;
            if kind != HUGETLBFS_MAGIC && kind != TMPFS_MAGIC {
                return Err(bad("must be on hugetlbfs or tmpfs".to_owned()));
            }
            return Self::create_at(&dir.join(name), id, slots, slot_bytes).map_err(|e| {
                bad(format!(
                    "{e}; {} bytes are needed",
                    Self::size(slots, slot_bytes)
                ))
            });
        }
        let mut why = "no hugetlbfs with 2 MiB pages is mounted".to_owned();
        for dir in hugetlbfs_mounts() {
            match Self::create_at(&dir.join(&name), id, slots, slot_bytes) {
                Ok(staging) => return Ok(staging),
                Err(error) => why = format!("{}: {error}", dir.display()),
            }
        }
        tracing::warn!(
            shard = id.shard,
            "staging uses ordinary pages in /dev/shm ({why}); reserve hugepages with scripts/hugepages.sh"
        );
        let dir = Path::new("/dev/shm");
        Self::create_at(&dir.join(name), id, slots, slot_bytes).map_err(|e| WalError::StagingDir {
            path: dir.to_owned(),
            reason: format!("{e}; {} bytes are needed", Self::size(slots, slot_bytes)),
        })
    }

    fn size(slots: usize, slot_bytes: usize) -> usize {
        (STAGING_HEADER + slots * slot_bytes).next_multiple_of(HUGEPAGE)
    }

    fn create_at(path: &Path, id: LogId, slots: usize, slot_bytes: usize) -> io::Result<Staging> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        let made = (|| {
            // Tells a copy of this store that the file is in use; goes with the process.
            file.try_lock()?;
            let size = Self::size(slots, slot_bytes);
            let hugepages = fs_type(path)?.0 == HUGETLBFS_MAGIC;
            file.set_len(size as u64)?;
            allocate(&file, size as u64)?;
            let map = Mapping::new(&file, size)?;
            map.populate()?;
            let mut header = [0u8; STAGING_HEADER];
            header[0..8].copy_from_slice(&STAGING_MAGIC);
            header[8..12].copy_from_slice(&STAGING_VERSION.to_le_bytes());
            header[12..14].copy_from_slice(&id.shard.to_le_bytes());
            header[16..32].copy_from_slice(&id.store.to_le_bytes());
            header[32..48].copy_from_slice(&boot_id());
            header[48..52].copy_from_slice(&(slots as u32).to_le_bytes());
            header[52..56].copy_from_slice(&(slot_bytes as u32).to_le_bytes());
            let crc = crc32c::crc32c(&header[..CRC_AT]);
            header[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
            // SAFETY: the mapping is larger than a header and nobody else knows it yet.
            unsafe {
                std::ptr::copy_nonoverlapping(header.as_ptr(), map.ptr.as_ptr(), STAGING_HEADER);
            }
            Ok((map, hugepages))
        })();
        match made {
            Ok((map, hugepages)) => Ok(Staging {
                map,
                file,
                path: path.to_owned(),
                slots,
                slot_bytes,
                id,
                hugepages,
            }),
            Err(error) => {
                let _ = fs::remove_file(path);
                Err(error)
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    pub(crate) fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// The memory to register with io_uring: all slots.
    pub(crate) fn slot_area(&self) -> (*mut u8, usize) {
        (self.slot_ptr(0), self.slots * self.slot_bytes)
    }

    pub(crate) fn slot_ptr(&self, slot: usize) -> *mut u8 {
        assert!(slot < self.slots);
        // SAFETY: inside the mapping by construction.
        unsafe {
            self.map
                .ptr
                .as_ptr()
                .add(STAGING_HEADER + slot * self.slot_bytes)
        }
    }

    /// Writer: puts the header of an empty frame into a slot it owns. The sequence is stored last: a
    /// kill in between leaves a slot that recovery passes over.
    pub(crate) fn begin(&self, slot: usize, seq: u64, lsn: u64, durable: u64, prev_crc: u32) {
        let ptr = self.slot_ptr(slot);
        // SAFETY: the writer owns the slot (it is in no other state than free), offsets are inside the
        // header, and the two words are 8-byte aligned as slots are page-aligned.
        unsafe {
            word(ptr, OFF_SEQ).store(0, Ordering::Release);
            word(ptr, OFF_PUBLISHED).store(0, Ordering::Release);
            put(ptr, 0, FRAME_MAGIC.to_le_bytes());
            put(ptr, OFF_VERSION, [FRAME_VERSION]);
            put(ptr, OFF_FLAGS, [0]);
            put(ptr, OFF_SHARD, self.id.shard.to_le_bytes());
            put(ptr, OFF_LSN, lsn.to_le_bytes());
            put(ptr, OFF_DURABLE, durable.to_le_bytes());
            put(ptr, OFF_TIME, unix_ms().to_le_bytes());
            put(ptr, OFF_STORE, self.id.store_tag().to_le_bytes());
            put(ptr, OFF_PREV_CRC, prev_crc.to_le_bytes());
            put(ptr, OFF_CRC, [0; 4]);
            word(ptr, OFF_SEQ).store(seq, Ordering::Release);
        }
    }

    /// Writer: room of `len` bytes for an entry's content behind `used` bytes of the open frame.
    ///
    /// # Safety
    /// The writer owns the slot and holds no other slice of this range.
    #[inline]
    #[allow(clippy::mut_from_ref)] // the slot's protocol gives the writer exclusive access
    pub(crate) unsafe fn room(&self, slot: usize, used: usize, len: usize) -> &mut [u8] {
        assert!(used + entry_size(len) <= self.slot_bytes);
        // SAFETY: checked to be inside the slot; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.slot_ptr(slot).add(used + ENTRY_HEADER), len) }
    }

    /// Writer: makes the entry whose content lies behind `used` part of the frame. After this it
    /// survives a killed process.
    #[inline]
    pub(crate) fn publish(
        &self,
        slot: usize,
        used: usize,
        entries: u32,
        kind: EntryKind,
        len: usize,
    ) {
        let end = used + entry_size(len);
        assert!(end <= self.slot_bytes);
        let ptr = self.slot_ptr(slot);
        // SAFETY: inside the slot, which the writer owns; the word is aligned.
        unsafe {
            put(ptr, used, kind.encode(len as u32));
            let content_end = used + ENTRY_HEADER + len;
            std::ptr::write_bytes(ptr.add(content_end), 0, end - content_end);
            word(ptr, OFF_PUBLISHED).store(
                pack_published((end - FRAME_HEADER) as u32, entries + 1),
                Ordering::Release,
            );
        }
    }

    /// Writer: completes the frame of `used` bytes: padding, time, durable mark, CRC. A kill in between leaves a wrong CRC; recovery then seals the frame itself.
    pub(crate) fn seal(&self, slot: usize, used: usize, durable: u64, flags: u8) -> Sealed {
        let size = align_frame(used);
        let ptr = self.slot_ptr(slot);
        // SAFETY: the writer owns the slot; `size` is at most the slot's size, a multiple of the
        // alignment.
        let frame = unsafe { std::slice::from_raw_parts_mut(ptr, size) };
        seal_frame(frame, used, durable, flags)
    }

    /// The first `len` bytes of a slot.
    ///
    /// # Safety
    /// The slot is pinned, or owned by the calling writer, as long as the slice lives.
    pub(crate) unsafe fn frame(&self, slot: usize, len: usize) -> &[u8] {
        assert!(len <= self.slot_bytes);
        // SAFETY: inside the slot, and by the caller's promise nobody writes to it.
        unsafe { std::slice::from_raw_parts(self.slot_ptr(slot), len) }
    }

    /// Lets others open the file: its writer is gone.
    pub(crate) fn unlock(&self) {
        // Of a file that is open it does not fail.
        let _ = self.file.unlock();
    }

    /// Removes the file; the mapping lives on until drop.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let _ = &self.file;
        fs::remove_file(&self.path)
    }
}

/// What sealing a frame gave.
pub(crate) struct Sealed {
    /// Bytes, a multiple of the alignment.
    pub(crate) size: usize,
    pub(crate) crc: u32,
    /// When, Unix milliseconds.
    pub(crate) time_ms: i64,
}

/// Completes a frame in place.
pub(crate) fn seal_frame(frame: &mut [u8], used: usize, durable: u64, flags: u8) -> Sealed {
    let size = align_frame(used);
    let frame = &mut frame[..size];
    frame[used..].fill(0);
    frame[OFF_FLAGS] = flags;
    frame[OFF_DURABLE..OFF_DURABLE + 8].copy_from_slice(&durable.to_le_bytes());
    let time_ms = unix_ms();
    frame[OFF_TIME..OFF_TIME + 8].copy_from_slice(&time_ms.to_le_bytes());
    let crc = frame_crc(frame);
    frame[OFF_CRC..OFF_CRC + 4].copy_from_slice(&crc.to_le_bytes());
    Sealed { size, crc, time_ms }
}

/// The word at `offset` of a slot.
///
/// # Safety
/// `ptr + offset` is a valid, 8-byte aligned place in the mapping while the reference lives.
unsafe fn word<'a>(ptr: *mut u8, offset: usize) -> &'a AtomicU64 {
    // SAFETY: by the caller's promise.
    unsafe { AtomicU64::from_ptr(ptr.add(offset).cast()) }
}

/// # Safety
/// `ptr + offset .. + N` is memory that only the caller writes to.
#[inline(always)]
unsafe fn put<const N: usize>(ptr: *mut u8, offset: usize, bytes: [u8; N]) {
    // SAFETY: by the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), ptr.add(offset), N) }
}

/// Now, Unix milliseconds (vDSO, no system call).
pub(crate) fn unix_ms() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as i64)
}

/// What a staging file of an earlier process holds.
pub(crate) struct Leftover {
    pub(crate) path: PathBuf,
    /// Frames by sequence: each header, published payload and padding up to the alignment.
    pub(crate) frames: Vec<Vec<u8>>,
}

/// What was found at a path.
pub(crate) enum Found {
    /// No file.
    Nothing,
    /// A file that was never used, or is of another boot; worthless.
    Stale(PathBuf),
    /// Frames (perhaps none).
    Leftover(Leftover),
}

/// Reads the staging file at `path`, if there is one, keeping frames with a sequence above `after`.
/// Changes nothing.
pub(crate) fn read(path: &Path, id: LogId, after: u64) -> Result<Found, WalError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(e) => return Err(WalError::io("cannot open the staging file", path)(e)),
    };
    let io = |e| WalError::io("cannot read the staging file", path)(e);
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(WalError::StagingInUse {
                path: path.to_owned(),
            });
        }
        Err(TryLockError::Error(error)) => return Err(io(error)),
    }
    let size = file.metadata().map_err(io)?.len();
    let mut header = [0u8; STAGING_HEADER];
    if size < STAGING_HEADER as u64 {
        return Ok(Found::Stale(path.to_owned()));
    }
    file.read_exact_at(&mut header, 0).map_err(io)?;
    // Without a header the writer never got to use the file.
    if header[..CRC_AT + 4].iter().all(|&b| b == 0) {
        return Ok(Found::Stale(path.to_owned()));
    }
    let mismatch = |reason: String| WalError::StagingMismatch {
        path: path.to_owned(),
        reason,
    };
    if header[32..48] != boot_id() {
        return Ok(Found::Stale(path.to_owned()));
    }
    if header[0..8] != STAGING_MAGIC || u32_at(&header, CRC_AT) != crc32c::crc32c(&header[..CRC_AT])
    {
        // The header is written by one copy that a kill may cut short; then no slot is in use.
        let mut seqs = [0u8; 8];
        let _ = file.read_at(&mut seqs, (STAGING_HEADER + OFF_SEQ) as u64);
        if seqs == [0; 8] {
            return Ok(Found::Stale(path.to_owned()));
        }
        return Err(mismatch("its header is damaged".to_owned()));
    }
    if u32_at(&header, 8) != STAGING_VERSION {
        return Err(mismatch(format!(
            "its version {} is not known",
            u32_at(&header, 8)
        )));
    }
    if header[16..32] != id.store.to_le_bytes() || u16_at(&header, 12) != id.shard {
        return Err(WalError::StagingForeign {
            path: path.to_owned(),
        });
    }
    let (slots, slot_bytes) = (u32_at(&header, 48) as u64, u32_at(&header, 52) as u64);
    if slot_bytes < FRAME_HEADER as u64 || STAGING_HEADER as u64 + slots * slot_bytes > size {
        return Err(mismatch("its slots do not fit the file".to_owned()));
    }
    let mut frames = Vec::new();
    for slot in 0..slots {
        let at = STAGING_HEADER as u64 + slot * slot_bytes;
        let mut head = [0u8; FRAME_HEADER];
        file.read_exact_at(&mut head, at).map_err(io)?;
        let seq = super::frame::u64_at(&head, OFF_SEQ);
        let (payload, _) = unpack_published(super::frame::u64_at(&head, OFF_PUBLISHED));
        let clean = head[OFF_FLAGS] & super::frame::FLAG_CLEAN != 0;
        if seq <= after || (payload == 0 && !clean) {
            continue;
        }
        let size = align_frame(FRAME_HEADER + payload as usize);
        if size as u64 > slot_bytes {
            return Err(mismatch(format!("frame {seq} is larger than its slot")));
        }
        let mut frame = vec![0; size];
        file.read_exact_at(&mut frame, at).map_err(io)?;
        frames.push(frame);
    }
    frames.sort_by_key(|f| super::frame::u64_at(f, OFF_SEQ));
    Ok(Found::Leftover(Leftover {
        path: path.to_owned(),
        frames,
    }))
}
