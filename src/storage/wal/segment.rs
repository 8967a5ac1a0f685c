//! Segments: the files that a shard's log consists of.
//!
//! Invariant: segments tile the log. A segment's file name and header name its base LSN, the next
//! one's base is this base plus this size, and the LSN of a byte is the base plus its place in the
//! file. A segment is preallocated and was written once, with zeros or as an older segment, before its
//! name appears, so writing a frame changes no metadata. Its header is written when the first frame is, and names the sequence and CRC
//! that the log had come to; a file with a blank header is prepared but unused.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::aligned::AlignedBuf;
use super::allocate::allocate;
use super::frame::{FRAME_ALIGN, LogId, u16_at, u32_at, u64_at};

/// Bytes of a segment's header; the first frame begins behind it.
pub const SEGMENT_HEADER: usize = 4096;
/// First eight bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"TAFFSEG\0";
/// Version of the segment format.
pub const SEGMENT_VERSION: u32 = 1;
/// Flag of a header: see [`SegmentHeader::reused`].
const FLAG_REUSED: u16 = 1;
/// Segments are zeroed in writes of this size: large enough for the disk's full bandwidth.
pub const ZERO_BLOCK: usize = 1 << 20;
const CRC_AT: usize = 64;

/// A segment's header, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Whose log.
    pub id: LogId,
    /// LSN of the file's first byte.
    pub base: u64,
    /// Bytes of the file.
    pub size: u64,
    /// Sequence of the first frame.
    pub first_seq: u64,
    /// CRC of the frame before the first; 0 at the start of a log.
    pub prev_crc: u32,
    /// The file was an older segment's and still holds its bytes where this one was not written yet: what
    /// is no frame of its place counts as never written.
    pub reused: bool,
}

/// Why a file's first 4096 bytes are not a segment header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Prepared, not used yet.
    #[error("prepared but unused (blank header)")]
    Blank,
    /// Shorter than a header.
    #[error("shorter than a segment header")]
    Short,
    /// Not a segment, or damaged.
    #[error("not a Taffrail WAL segment (magic number)")]
    Magic,
    /// A newer format, or damage.
    #[error("segment version {0} is not known (this program knows {SEGMENT_VERSION})")]
    Version(u32),
    /// A newer format.
    #[error("segment flags {0:#06x} are not known (this program knows {FLAG_REUSED:#06x})")]
    Flags(u16),
    /// Damaged.
    #[error("the segment header's CRC is {found:#010x}, its bytes give {computed:#010x}")]
    Crc {
        /// What the header says.
        found: u32,
        /// What the bytes give.
        computed: u32,
    },
    /// Another store's or shard's, or a renamed file.
    #[error("the segment header names another store, shard or place than the file")]
    Foreign,
}

impl SegmentHeader {
    /// LSN of the first byte behind the segment.
    pub fn end(&self) -> u64 {
        self.base + self.size
    }

    /// Writes the header into `out`, [`SEGMENT_HEADER`] bytes.
    pub fn encode(&self, out: &mut [u8]) {
        out[..SEGMENT_HEADER].fill(0);
        out[0..8].copy_from_slice(&SEGMENT_MAGIC);
        out[8..12].copy_from_slice(&SEGMENT_VERSION.to_le_bytes());
        out[12..14].copy_from_slice(&self.id.shard.to_le_bytes());
        let flags = if self.reused { FLAG_REUSED } else { 0 };
        out[14..16].copy_from_slice(&flags.to_le_bytes());
        out[16..32].copy_from_slice(&self.id.store.to_le_bytes());
        out[32..40].copy_from_slice(&self.base.to_le_bytes());
        out[40..48].copy_from_slice(&self.size.to_le_bytes());
        out[48..56].copy_from_slice(&self.first_seq.to_le_bytes());
        out[56..60].copy_from_slice(&self.prev_crc.to_le_bytes());
        let crc = header_crc(out);
        out[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads a header; says nothing of the file's name and length.
    pub fn decode(bytes: &[u8]) -> Result<SegmentHeader, SegmentError> {
        if bytes.len() < SEGMENT_HEADER {
            return Err(SegmentError::Short);
        }
        let bytes = &bytes[..SEGMENT_HEADER];
        if bytes.iter().all(|&b| b == 0) {
            return Err(SegmentError::Blank);
        }
        if bytes[0..8] != SEGMENT_MAGIC {
            return Err(SegmentError::Magic);
        }
        let found = u32_at(bytes, CRC_AT);
        let computed = header_crc(bytes);
        if found != computed {
            return Err(SegmentError::Crc { found, computed });
        }
        let version = u32_at(bytes, 8);
        if version != SEGMENT_VERSION {
            return Err(SegmentError::Version(version));
        }
        let flags = u16_at(bytes, 14);
        if flags & !FLAG_REUSED != 0 {
            return Err(SegmentError::Flags(flags));
        }
        let mut store = [0; 16];
        store.copy_from_slice(&bytes[16..32]);
        Ok(SegmentHeader {
            id: LogId {
                store: u128::from_le_bytes(store),
                shard: u16_at(bytes, 12),
            },
            base: u64_at(bytes, 32),
            size: u64_at(bytes, 40),
            first_seq: u64_at(bytes, 48),
            prev_crc: u32_at(bytes, 56),
            reused: flags & FLAG_REUSED != 0,
        })
    }
}

/// CRC of the header block, its own field left out.
fn header_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(
        crc32c::crc32c(&bytes[..CRC_AT]),
        &bytes[CRC_AT + 4..SEGMENT_HEADER],
    )
}

/// The folder of a shard's log below the store's folder.
pub fn shard_dir(store: &Path, shard: u16) -> PathBuf {
    store.join(format!("shard-{shard:03}"))
}

/// The file of the segment with this base LSN.
pub fn segment_path(shard_dir: &Path, base: u64) -> PathBuf {
    shard_dir.join(format!("wal-{base:016x}.seg"))
}

/// The base LSN in a segment's file name; `None` for other files.
pub fn base_of(name: &str) -> Option<u64> {
    let hex = name.strip_prefix("wal-")?.strip_suffix(".seg")?;
    if hex.len() != 16 {
        return None;
    }
    u64::from_str_radix(hex, 16).ok()
}

/// Bases of the segment files in a folder, ascending.
pub fn list_segments(shard_dir: &Path) -> io::Result<Vec<u64>> {
    let mut bases = Vec::new();
    for entry in fs::read_dir(shard_dir)? {
        if let Some(base) = entry?.file_name().to_str().and_then(base_of) {
            bases.push(base);
        }
    }
    bases.sort_unstable();
    Ok(bases)
}

/// Makes a rename, creation or removal in `dir` durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Opens a segment for O_DIRECT writes.
pub fn open_direct(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}

/// Makes a file of `size` real zeros at `path` (which must not exist) by way of a temporary name,
/// durable together with its name. `next` is asked before each write, told how much is left, and says how many bytes to
/// write now, at most [`ZERO_BLOCK`]; when it says `None` the file is
/// removed and `Interrupted` returned. Cost: `size` bytes of disk writes.
pub fn create_zeroed(
    path: &Path,
    size: u64,
    mut next: impl FnMut(u64) -> Option<usize>,
) -> io::Result<File> {
    let temporary = path.with_extension("tmp");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(&temporary)?;
    let result = (|| {
        // Reserves the space first, so that a full disk is found before anything is written.
        match allocate(&file, size) {
            // File systems without fallocate: the zeros below allocate.
            Err(error) if error.raw_os_error() != Some(libc::EOPNOTSUPP) => return Err(error),
            _ => {}
        }
        let zeros = AlignedBuf::zeroed(size.min(ZERO_BLOCK as u64) as usize);
        let mut at = 0;
        while at < size {
            let Some(len) = next(size - at) else {
                return Err(io::ErrorKind::Interrupted.into());
            };
            let len = (size - at).min(len.clamp(FRAME_ALIGN, zeros.len()) as u64) as usize;
            file.write_all_at(&zeros[..len], at)?;
            at += len as u64;
        }
        give_name(&file, &temporary, path)
    })();
    match result {
        Ok(()) => Ok(file),
        Err(error) => {
            let _ = fs::remove_file(&temporary);
            Err(error)
        }
    }
}

/// Makes the file at `path` (which must not exist) of `spare`, a segment that nobody needs any more:
/// its header is blanked, the rest stays as it is, written once and for all. `None`, and the spare gone:
/// it has another size. Cost: one block written, whatever the size.
pub fn reuse(spare: &Path, path: &Path, size: u64) -> io::Result<Option<File>> {
    let result = (|| {
        let file = open_direct(spare)?;
        if file.metadata()?.len() != size {
            return Ok(None);
        }
        file.write_all_at(&AlignedBuf::zeroed(SEGMENT_HEADER), 0)?;
        give_name(&file, spare, path)?;
        Ok(Some(file))
    })();
    if !matches!(result, Ok(Some(_))) {
        let _ = fs::remove_file(spare);
    }
    result
}

/// Makes a file durable, and then its final name.
fn give_name(file: &File, temporary: &Path, path: &Path) -> io::Result<()> {
    file.sync_all()?;
    rename_new(temporary, path)?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Renames, refusing to replace a file.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let c = |p: &Path| CString::new(p.as_os_str().as_bytes()).map_err(io::Error::other);
    let (from_c, to_c) = (c(from)?, c(to)?);
    // SAFETY: both are NUL-terminated strings that live over the call.
    let rc = unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            from_c.as_ptr(),
            libc::AT_FDCWD,
            to_c.as_ptr(),
            libc::RENAME_NOREPLACE,
        )
    };
    if rc == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EINVAL) {
        return Err(error);
    }
    // A file system without RENAME_NOREPLACE; the store's lock keeps other writers out.
    if to.exists() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    fs::rename(from, to)
}
