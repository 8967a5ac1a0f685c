//! What happens at the start: find where the log ends, add what the staging file still holds, replay.
//!
//! Rules. (1) The log ends at the first frame that is blank, torn or does not follow its predecessor,
//! unless the next segment's header names exactly the place the log has come to. (2) If any whole frame
//! behind that end says that the missing one had been durable, this is damage and not a torn tail:
//! opening is refused, nothing is changed. (3) Otherwise what lies behind the end was never
//! acknowledged as durable; it is zeroed before the log goes on, so that it can never be taken for a
//! continuation. (4) Frames of the staging file of this boot that follow exactly are written to where
//! they belong, sealed as they were, before anything is removed: a kill during recovery leaves the
//! next one the same work.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::aligned::AlignedBuf;
use super::allocate::allocate;
use super::error::WalError;
use super::frame::{
    Entries, EntryKind, FRAME_ALIGN, FRAME_HEADER, FRAME_MAGIC, FrameError, FrameHeader, LogId,
    u32_at,
};
use super::segment::{
    SEGMENT_HEADER, SegmentError, SegmentHeader, ZERO_BLOCK, create_zeroed, list_segments,
    open_direct, segment_path, sync_dir,
};
use super::staging::{self, Found, Leftover, boot_id, seal_frame};
use super::writer::WalConfig;
use crate::storage::PartitionKey;
use crate::storage::catalog::replace_file;
use crate::storage::frames::{Cursor, FetchError, FrameReader};

/// Takes the shard's state back, in the log's order.
pub trait Replay {
    /// Part `index` of `count` of the newest complete snapshot; comes before any batch.
    fn snapshot(&mut self, part: &[u8], index: u32, count: u32);
    /// A record batch that the log holds behind the snapshot's first part.
    fn batch(&mut self, key: PartitionKey, batch: &[u8]);
}

/// What recovery cut off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cut {
    /// The segment in which the log ends.
    pub path: PathBuf,
    /// Byte in the file.
    pub position: u64,
    /// What was found there.
    pub reason: String,
    /// Bytes behind it that were zeroed, never acknowledged as durable unless `damage`.
    pub bytes: u64,
    /// Segments behind it that were removed or, with `damage`, renamed.
    pub segments: Vec<PathBuf>,
    /// True when a durable part was given up, as asked.
    pub damage: bool,
}

/// What recovery read, kept and cut.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RecoveryReport {
    /// Segments read.
    pub segments_read: u64,
    /// Frames read and checked.
    pub frames_read: u64,
    /// Bytes of those frames.
    pub bytes_read: u64,
    /// Batches replayed.
    pub batches_replayed: u64,
    /// The last durable frame; 0: the log was empty.
    pub last_seq: u64,
    /// The log's end.
    pub end_lsn: u64,
    /// Where replay began; `None`: at the start of the log.
    pub checkpoint: Option<u64>,
    /// The log had been closed cleanly.
    pub clean: bool,
    /// Frames taken from the staging file.
    pub staged_frames: u64,
    /// Entries in them.
    pub staged_entries: u64,
    /// A staging file of this boot is gone: messages acknowledged with `acks=1` may be lost.
    pub staging_lost: Option<PathBuf>,
    /// What was cut off.
    pub cut: Option<Cut>,
    /// How long it took.
    pub took: Duration,
}

/// The segment that the log goes on in.
pub(crate) struct Tail {
    pub(crate) file: File,
    pub(crate) header: SegmentHeader,
}

pub(crate) struct Recovered {
    pub(crate) tail: Option<Tail>,
    pub(crate) last_seq: u64,
    pub(crate) next_lsn: u64,
    pub(crate) last_crc: u32,
    pub(crate) next_base: u64,
    pub(crate) checkpoint: u64,
    pub(crate) clean: bool,
    pub(crate) report: RecoveryReport,
}

/// One segment, walked.
struct Walk {
    header: SegmentHeader,
    end: Cursor,
    stop: Option<FetchError>,
    max_durable: u64,
    clean: bool,
    frames: u64,
    /// (index, count, LSN of the frame, byte in the frame) of each snapshot part.
    parts: Vec<(u32, u32, u64, usize)>,
}

/// What the walk over the newest part of a log found.
pub(crate) struct Chain {
    walks: Vec<Walk>,
    /// LSN and byte of the first part of the newest complete snapshot.
    snapshot: Option<(u64, usize)>,
}

fn walk(reader: &mut FrameReader, header: SegmentHeader) -> Result<Walk, WalError> {
    let mut walk = Walk {
        header,
        end: Cursor::at_start(&header),
        stop: None,
        max_durable: 0,
        clean: false,
        frames: 0,
        parts: Vec::new(),
    };
    loop {
        let (parts, max_durable, clean) = (&mut walk.parts, &mut walk.max_durable, &mut walk.clean);
        let stepped = walk.end.step(reader, |header, frame| {
            *max_durable = header.durable.max(*max_durable);
            *clean = header.is_clean();
            for entry in Entries::new(frame, header) {
                let entry = entry?;
                if let EntryKind::Snapshot { index, count } = entry.kind {
                    parts.push((index, count, header.lsn, entry.at));
                }
            }
            Ok::<(), FrameError>(())
        });
        match stepped {
            Ok(None) => return Ok(walk),
            Ok(Some(Ok(()))) => walk.frames += 1,
            Ok(Some(Err(error))) => {
                // A whole frame with senseless entries is a writer's error: never cut it silently.
                return Err(WalError::Damaged {
                    path: segment_path(reader.dir(), header.base),
                    position: walk.end.lsn - header.base,
                    what: error.to_string(),
                });
            }
            Err(FetchError::Io { path, source }) => {
                return Err(WalError::Io {
                    what: "cannot read",
                    path,
                    source,
                });
            }
            Err(stop) => {
                walk.stop = Some(stop);
                return Ok(walk);
            }
        }
    }
}

/// The first part of the last complete run of parts.
fn newest_snapshot<'a>(
    parts: impl Iterator<Item = &'a (u32, u32, u64, usize)>,
) -> Option<(u64, usize)> {
    let mut newest = None;
    let mut run: Option<(u32, u32, u64, usize)> = None;
    for &(index, count, lsn, at) in parts {
        run = match run {
            _ if index == 0 => Some((1, count, lsn, at)),
            Some((next, c, l, a)) if next == index && c == count => Some((next + 1, c, l, a)),
            _ => None,
        };
        if let Some((next, count, lsn, at)) = run
            && next == count
        {
            newest = Some((lsn, at));
            run = None;
        }
    }
    newest
}

/// Walks back from the newest segment until a complete snapshot and the proof that everything before
/// was durable are found, or the log's first segment.
fn find_chain(reader: &mut FrameReader, headers: &[SegmentHeader]) -> Result<Chain, WalError> {
    let mut chain = Chain {
        walks: Vec::new(),
        snapshot: None,
    };
    for (i, &header) in headers.iter().enumerate().rev() {
        let walked = walk(reader, header)?;
        let linked = chain.walks.first().is_some_and(|next| {
            next.header.base == walked.end.segment_end()
                && next.header.first_seq == walked.end.next_seq
                && next.header.prev_crc == walked.end.prev_crc
        });
        if !linked {
            chain.walks.clear();
        }
        chain.walks.insert(0, walked);
        chain.snapshot = newest_snapshot(chain.walks.iter().flat_map(|w| &w.parts));
        let proven = chain
            .walks
            .iter()
            .any(|w| w.max_durable >= header.first_seq.saturating_sub(1));
        if i == 0 || (proven && chain.snapshot.is_some()) {
            break;
        }
    }
    Ok(chain)
}

/// To compare with: a byte at a time would take longer than the disk does.
static ZEROS: [u8; FRAME_ALIGN] = [0; FRAME_ALIGN];

/// What lies behind the end of the log in a file.
struct Behind {
    /// First and last block that was written, as byte positions (end exclusive).
    dirty: Option<(u64, u64)>,
    /// A whole frame that says the log had been durable up to or beyond `seq`.
    proof: bool,
    len: u64,
}

/// Looks at a file from byte `from` on, for frames of any age. What was written there is what is not zero
/// or, in a `reused` file and one whose header was never written, the beginnings of frames of that place.
fn look_behind(
    path: &Path,
    base: u64,
    id: LogId,
    from: u64,
    seq: u64,
    reused: bool,
    sample: Option<u64>,
) -> Result<Behind, WalError> {
    let read = |e| WalError::io("cannot read", path)(e);
    let file = File::open(path).map_err(read)?;
    let len = file.metadata().map_err(read)?.len();
    let mut behind = Behind {
        dirty: None,
        proof: false,
        len,
    };
    let mut block = vec![0u8; 1 << 20];
    let mut placed_only = reused;
    let mut at = from;
    while at < len {
        // A prepared segment was not written to: its start answers for the rest.
        if let Some(sample) = sample
            && at - from >= sample
            && behind.dirty.is_none()
        {
            break;
        }
        let want = (len - at).min(block.len() as u64) as usize;
        file.read_exact_at(&mut block[..want], at).map_err(read)?;
        if at == 0 {
            placed_only |= SegmentHeader::decode(&block[..want]) == Err(SegmentError::Blank);
        }
        for (i, part) in block[..want].chunks(FRAME_ALIGN).enumerate() {
            if part == &ZEROS[..part.len()] {
                continue;
            }
            let position = at + (i * FRAME_ALIGN) as u64;
            if placed_only && !FrameHeader::lies_here(part, id, base + position) {
                continue;
            }
            let start = behind.dirty.map_or(position, |(start, _)| start);
            behind.dirty = Some((start, position + part.len() as u64));
            if behind.proof || part.len() < FRAME_HEADER || u32_at(part, 0) != FRAME_MAGIC {
                continue;
            }
            let Ok(header) = FrameHeader::decode(part, len - position) else {
                continue;
            };
            if header.durable < seq || header.check_place(id, base + position).is_err() {
                continue;
            }
            let mut frame = vec![0; header.size()];
            file.read_exact_at(&mut frame, position).map_err(read)?;
            behind.proof = header.check_crc(&frame).is_ok();
        }
        at += want as u64;
    }
    Ok(behind)
}

/// Bytes of a file without a header that are looked at before it is taken for prepared and unused.
const SAMPLE: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Pointer {
    path: PathBuf,
    boot: String,
}

fn pointer_path(dir: &Path) -> PathBuf {
    dir.join("staging.json")
}

fn boot_hex() -> String {
    format!("{:032x}", u128::from_be_bytes(boot_id()))
}

/// Notes where the staging file lies, durably, before it is used.
pub(crate) fn write_pointer(dir: &Path, staging: &Path) -> Result<(), WalError> {
    let path = pointer_path(dir);
    let pointer = Pointer {
        path: staging.to_owned(),
        boot: boot_hex(),
    };
    let bytes = serde_json::to_vec(&pointer).expect("plain data serializes");
    replace_file(&path, &bytes).map_err(WalError::io("cannot write", &path))
}

/// Removes the note: nothing of the staging file is needed any more.
pub(crate) fn remove_pointer(dir: &Path) -> Result<(), WalError> {
    let path = pointer_path(dir);
    match fs::remove_file(&path) {
        Ok(()) => sync_dir(dir).map_err(WalError::io("cannot sync the folder", dir)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(WalError::io("cannot remove", &path)(e)),
    }
}

pub(crate) fn recover(
    config: &WalConfig,
    id: LogId,
    dir: &Path,
    replay: &mut impl Replay,
) -> Result<Recovered, WalError> {
    let began = Instant::now();
    let mut report = RecoveryReport::default();
    // What an interrupted preparation left.
    for entry in fs::read_dir(dir).map_err(WalError::io("cannot list", dir))? {
        let path = entry.map_err(WalError::io("cannot list", dir))?.path();
        if path.extension().is_some_and(|e| e == "tmp") {
            fs::remove_file(&path).map_err(WalError::io("cannot remove", &path))?;
        }
    }
    let bases = list_segments(dir).map_err(WalError::io("cannot list", dir))?;
    let mut reader = FrameReader::files(dir, id);
    let mut headers = Vec::new();
    for &base in &bases {
        match reader.header(base) {
            Ok(header) => headers.push(header),
            Err(FetchError::Io { path, source }) => {
                return Err(WalError::Io {
                    what: "cannot read",
                    path,
                    source,
                });
            }
            Err(_) => {}
        }
    }
    let chain = find_chain(&mut reader, &headers)?;
    for w in &chain.walks {
        report.segments_read += 1;
        report.frames_read += w.frames;
        report.bytes_read += w.end.lsn - w.header.base;
    }

    let (mut last_seq, mut last_crc, mut next_lsn, mut tail_header, mut clean) =
        match chain.walks.last() {
            Some(w) => (
                w.end.next_seq - 1,
                w.end.prev_crc,
                w.end.lsn,
                Some(w.header),
                w.clean,
            ),
            None => (0, 0, 0, None, false),
        };
    // A first segment whose header alone was written: an empty log.
    let position = next_lsn - tail_header.map_or(0, |h| h.base);
    let tail_path = tail_header.map(|h| segment_path(dir, h.base));

    // Rule 2: is what lies behind the end proof of a loss?
    let mut proof = false;
    let mut dirty = None;
    if let (Some(header), Some(path)) = (tail_header, &tail_path) {
        let behind = look_behind(
            path,
            header.base,
            id,
            position,
            last_seq + 1,
            header.reused,
            None,
        )?;
        // A file cut short (only damage does that) is lengthened again when it is zeroed.
        dirty = behind.dirty;
        if behind.len < header.size {
            dirty = Some((dirty.map_or(behind.len, |d| d.0), header.size));
        }
        proof |= behind.proof;
    }
    let mut beyond = Vec::new();
    for &base in &bases {
        if tail_header.is_some_and(|h| base <= h.base) {
            continue;
        }
        let path = segment_path(dir, base);
        let behind = look_behind(&path, base, id, 0, last_seq + 1, false, Some(SAMPLE))?;
        proof |= behind.proof;
        beyond.push((path, behind.dirty.is_some()));
    }
    // The log's first segment is gone or unreadable, and no snapshot stands in for it.
    let headless =
        chain.snapshot.is_none() && chain.walks.first().is_some_and(|w| w.header.first_seq != 1);
    let stop = chain.walks.last().and_then(|w| w.stop.as_ref()).map_or(
        "the end of the segment".to_owned(),
        |stop| match stop {
            FetchError::Frame { error, .. } => error.to_string(),
            other => other.to_string(),
        },
    );
    if (proof || headless) && !config.accept_damage {
        return Err(WalError::Damaged {
            path: tail_path.unwrap_or_else(|| dir.to_owned()),
            position,
            what: if headless {
                "segments before it are missing and it holds no snapshot".to_owned()
            } else {
                stop
            },
        });
    }

    // Staged frames, read before anything is changed.
    let name = staging::file_name(id);
    let pointer: Option<Pointer> = fs::read(pointer_path(dir))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        // Old staging files are removed: a note never points to anything else.
        .filter(|pointer: &Pointer| pointer.path.ends_with(&name));
    let mut paths: Vec<PathBuf> = staging::candidate_dirs(config.staging_dir.as_deref())
        .into_iter()
        .map(|d| d.join(&name))
        .collect();
    if let Some(pointer) = &pointer {
        paths.push(pointer.path.clone());
    }
    paths.sort();
    paths.dedup();
    let mut old_files = Vec::new();
    let mut leftovers = Vec::new();
    for path in &paths {
        match staging::read(path, id, last_seq)? {
            Found::Nothing => {}
            Found::Stale(path) => old_files.push(path),
            Found::Leftover(leftover) => {
                old_files.push(leftover.path.clone());
                if !leftover.frames.is_empty() {
                    leftovers.push(leftover);
                }
            }
        }
    }
    if let Some(pointer) = &pointer
        && pointer.boot == boot_hex()
        && !old_files.contains(&pointer.path)
        && !clean
    {
        tracing::warn!(
            path = %pointer.path.display(),
            "the staging file of this boot is gone: messages acknowledged with acks=1 may be lost"
        );
        report.staging_lost = Some(pointer.path.clone());
    }
    if let [first, second, ..] = &leftovers[..] {
        return Err(WalError::StagingMismatch {
            path: second.path.clone(),
            reason: format!("so does {}", first.path.display()),
        });
    }
    let staged = match leftovers.pop() {
        Some(leftover) => {
            match plan(
                leftover,
                id,
                last_seq,
                last_crc,
                next_lsn,
                tail_header,
                config,
            ) {
                // With the damage accepted, what was staged behind it has no place any more.
                Err(WalError::StagingMismatch { .. }) if config.accept_damage && proof => {
                    Vec::new()
                }
                other => other?,
            }
        }
        None => Vec::new(),
    };

    // From here on files change. First what is unreachable goes, so that names are free.
    let mut cut_segments = Vec::new();
    for (path, used) in beyond {
        if proof {
            let aside = path.with_extension("cut");
            fs::rename(&path, &aside).map_err(WalError::io("cannot rename", &path))?;
            cut_segments.push(aside);
        } else {
            fs::remove_file(&path).map_err(WalError::io("cannot remove", &path))?;
            if used {
                cut_segments.push(path);
            }
        }
    }
    sync_dir(dir).map_err(WalError::io("cannot sync the folder", dir))?;

    let end_position = position;
    let mut tail = match (tail_header, &tail_path) {
        (Some(header), Some(path)) => Some(Tail {
            file: open_direct(path).map_err(WalError::io("cannot open", path))?,
            header,
        }),
        _ => None,
    };
    for mut frame in staged {
        if frame.new_segment {
            let base = frame.header.lsn - SEGMENT_HEADER as u64;
            let path = segment_path(dir, base);
            // The dirty rest of the segment that ends here.
            if let (Some(t), Some((_, end))) = (&tail, dirty.take()) {
                zero(&t.file, next_lsn - t.header.base, end).map_err(WalError::io(
                    "cannot write",
                    &segment_path(dir, t.header.base),
                ))?;
            }
            tail = Some(begin_segment(
                &path,
                SegmentHeader {
                    id,
                    base,
                    size: config.segment_size,
                    first_seq: frame.header.seq,
                    prev_crc: last_crc,
                    reused: false,
                },
            )?);
        }
        let Some(t) = &tail else {
            unreachable!("the plan begins a segment where there is none");
        };
        let path = segment_path(dir, t.header.base);
        if !frame.sealed {
            let used = FRAME_HEADER + frame.header.payload as usize;
            frame.bytes[super::frame::OFF_PREV_CRC..][..4].copy_from_slice(&last_crc.to_le_bytes());
            let crc = seal_frame(&mut frame.bytes, used, last_seq, 0).crc;
            frame.header.crc = crc;
        }
        t.file
            .write_all_at(&frame.bytes, frame.header.lsn - t.header.base)
            .map_err(WalError::io("cannot write", &path))?;
        last_seq = frame.header.seq;
        last_crc = frame.header.crc;
        next_lsn = frame.header.lsn + frame.bytes.len() as u64;
        clean = frame.sealed && frame.header.is_clean();
        report.staged_frames += 1;
        report.staged_entries += u64::from(frame.header.entries);
    }
    if let Some(t) = &tail {
        let path = segment_path(dir, t.header.base);
        let from = next_lsn - t.header.base;
        if let Some((_, end)) = dirty
            && end > from
        {
            zero(&t.file, from, end).map_err(WalError::io("cannot write", &path))?;
            report.cut = Some(Cut {
                path: path.clone(),
                position: from,
                reason: stop,
                bytes: end - from,
                segments: cut_segments,
                damage: proof,
            });
        } else if !cut_segments.is_empty() {
            report.cut = Some(Cut {
                path: path.clone(),
                position: end_position,
                reason: stop,
                bytes: 0,
                segments: cut_segments,
                damage: proof,
            });
        }
        t.file
            .sync_all()
            .map_err(WalError::io("cannot sync", &path))?;
        tail_header = Some(t.header);
    }

    // Everything is durable: the old staging files have served. The note goes first, so that a kill
    // in between does not look like a lost file.
    remove_pointer(dir)?;
    for path in old_files {
        fs::remove_file(&path).map_err(WalError::io("cannot remove", &path))?;
    }

    let first = chain.walks.first().map(|w| w.header).or(tail_header);
    if let Some(first) = first {
        replay_from(
            dir,
            id,
            first,
            chain.snapshot,
            last_seq,
            replay,
            &mut report,
        )?;
    }
    report.last_seq = last_seq;
    report.end_lsn = next_lsn;
    report.clean = clean;
    report.checkpoint = chain.snapshot.map(|(lsn, _)| lsn);
    report.took = began.elapsed();
    Ok(Recovered {
        next_base: tail_header.map_or(0, |h| h.end()),
        checkpoint: chain
            .snapshot
            .map_or(first.map_or(0, |h| h.base), |(lsn, _)| lsn),
        tail,
        last_seq,
        next_lsn,
        last_crc,
        clean,
        report,
    })
}

/// A staged frame with its place.
struct Staged {
    header: FrameHeader,
    bytes: AlignedBuf,
    sealed: bool,
    new_segment: bool,
}

/// Checks that the staged frames continue the log exactly, and where each goes.
fn plan(
    leftover: Leftover,
    id: LogId,
    mut last_seq: u64,
    mut last_crc: u32,
    mut next_lsn: u64,
    tail: Option<SegmentHeader>,
    config: &WalConfig,
) -> Result<Vec<Staged>, WalError> {
    let path = leftover.path;
    let mismatch = |reason: String| WalError::StagingMismatch {
        path: path.clone(),
        reason,
    };
    let mut segment_end = tail.map_or(0, |t| t.end());
    let mut planned: Vec<Staged> = Vec::new();
    for frame in leftover.frames {
        let mut header =
            FrameHeader::decode(&frame, frame.len() as u64).map_err(|e| mismatch(e.to_string()))?;
        let sealed = header.check_crc(&frame).is_ok();
        if header.payload == 0 && !sealed {
            continue;
        }
        // A frame that was still open can only be the last.
        if let Some(before) = planned.last()
            && !before.sealed
        {
            return Err(mismatch(format!(
                "frame {} was open although frame {} follows",
                before.header.seq, header.seq
            )));
        }
        header
            .check_place(id, header.lsn)
            .and_then(|()| header.check_chain(last_seq + 1, last_crc))
            .map_err(|e| mismatch(e.to_string()))?;
        if let Some(Err(error)) = Entries::new(&frame, &header).find(Result::is_err) {
            return Err(mismatch(format!("frame {}: {error}", header.seq)));
        }
        let size = frame.len() as u64;
        let new_segment = header.lsn != next_lsn || tail.is_none() && planned.is_empty();
        if new_segment {
            if header.lsn != segment_end + SEGMENT_HEADER as u64 {
                return Err(mismatch(format!(
                    "frame {} lies at LSN {}, the log has come to {next_lsn}",
                    header.seq, header.lsn
                )));
            }
            segment_end += config
                .segment_size
                .max((SEGMENT_HEADER as u64 + size).next_multiple_of(FRAME_ALIGN as u64));
        }
        if header.lsn + size > segment_end {
            return Err(mismatch(format!(
                "frame {} does not fit its segment",
                header.seq
            )));
        }
        let mut bytes = AlignedBuf::zeroed(frame.len());
        bytes.copy_from_slice(&frame);
        if !sealed {
            // The CRC is made when it is written; nothing follows it.
            header.crc = 0;
        }
        last_seq = header.seq;
        last_crc = header.crc;
        next_lsn = header.lsn + size;
        planned.push(Staged {
            header,
            bytes,
            sealed,
            new_segment,
        });
    }
    Ok(planned)
}

/// Makes a segment and writes its header, durably.
fn begin_segment(path: &Path, header: SegmentHeader) -> Result<Tail, WalError> {
    let file = create_zeroed(path, header.size, |_| Some(ZERO_BLOCK)).map_err(|source| {
        if matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) {
            WalError::DiskFull {
                path: path.to_owned(),
                need: header.size,
                source,
            }
        } else {
            WalError::Io {
                what: "cannot make the segment",
                path: path.to_owned(),
                source,
            }
        }
    })?;
    let mut block = AlignedBuf::zeroed(SEGMENT_HEADER);
    header.encode(&mut block);
    file.write_all_at(&block, 0)
        .and_then(|()| file.sync_all())
        .map_err(WalError::io("cannot write", path))?;
    Ok(Tail { file, header })
}

/// Zeroes `from..end` of a file opened with O_DIRECT; both multiples of the alignment.
fn zero(file: &File, from: u64, end: u64) -> io::Result<()> {
    let end = end.next_multiple_of(FRAME_ALIGN as u64);
    let zeros = AlignedBuf::zeroed(end.saturating_sub(from).min(1 << 20) as usize);
    // Its failure shows when writing.
    let _ = allocate(file, end);
    let mut at = from;
    while at < end {
        let len = (end - at).min(zeros.len() as u64) as usize;
        file.write_all_at(&zeros[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

/// Replays the log from the snapshot (or the first segment walked) to its last frame.
fn replay_from(
    dir: &Path,
    id: LogId,
    first: SegmentHeader,
    snapshot: Option<(u64, usize)>,
    last_seq: u64,
    replay: &mut impl Replay,
    report: &mut RecoveryReport,
) -> Result<(), WalError> {
    // All of it was read when the chain was looked for, or written since.
    let mut reader = FrameReader::read_before(dir, id);
    let mut cursor = Cursor::at_start(&first);
    let failed = |e: FetchError| match e {
        FetchError::Io { path, source } => WalError::Io {
            what: "cannot read",
            path,
            source,
        },
        other => WalError::Damaged {
            path: dir.to_owned(),
            position: 0,
            what: other.to_string(),
        },
    };
    // The next part of the chosen snapshot; parts of later, incomplete ones are passed over.
    let mut next_part = snapshot.map(|_| 0);
    while cursor.next_seq <= last_seq {
        if snapshot.is_some_and(|(lsn, _)| cursor.segment_end() <= lsn) {
            cursor = walk_past(&cursor, &mut reader).map_err(failed)?;
            continue;
        }
        let stepped = cursor.step(&mut reader, |header, frame| {
            for entry in Entries::new(frame, header) {
                let entry = entry?;
                if let Some((lsn, at)) = snapshot
                    && (header.lsn, entry.at) < (lsn, at)
                {
                    continue;
                }
                match entry.kind {
                    EntryKind::Batch(key) => {
                        report.batches_replayed += 1;
                        replay.batch(key, entry.bytes);
                    }
                    EntryKind::Snapshot { index, count } => {
                        if next_part == Some(index) {
                            replay.snapshot(entry.bytes, index, count);
                            next_part = (index + 1 < count).then_some(index + 1);
                        }
                    }
                }
            }
            Ok::<(), FrameError>(())
        });
        match stepped {
            Ok(Some(Ok(()))) => {}
            Ok(Some(Err(error))) => {
                return Err(WalError::Damaged {
                    path: segment_path(dir, cursor.base),
                    position: cursor.lsn - cursor.base,
                    what: error.to_string(),
                });
            }
            Ok(None) => cursor = cursor.next_segment(&mut reader).map_err(failed)?,
            Err(e) if e.is_blank() => {
                cursor = cursor.next_segment(&mut reader).map_err(failed)?;
            }
            Err(e) => return Err(failed(e)),
        }
    }
    Ok(())
}

/// From a segment that replay does not need to the start of the next.
fn walk_past(cursor: &Cursor, reader: &mut FrameReader) -> Result<Cursor, FetchError> {
    let header = reader.header(cursor.segment_end())?;
    Ok(Cursor::at_start(&header))
}
