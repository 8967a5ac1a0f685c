//! Turns a sealed WAL segment into an SST: batches of each partition in the order of offsets, small ones
//! merged into larger ones and compressed. Compacted topics get an SST of their own: see `pick`.
//!
//! Invariant: every batch of the segment's frames is in the SSTs, but those of deleted topics and those
//! before their partition's start. A damaged segment gives what can still be read of it, and is kept.
//!
//! Cost: reads the segment twice, the second time mapped, from the page cache; 40 bytes of memory a batch, as far as the budget
//! allows: with more batches it is read more often. Where keys are indexed, batches are decompressed once more, and memory
//! as `keys::collect`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::batches::Batches;
use super::effect::Effects;
use super::error::StoreError;
use super::keys::collect::{Collector, DrainError};
use super::keys::{KeysError, KeysReader};
use super::manifest::{FileMeta, NEVER_COMPACTED};
use super::memory::StoreMemory;
use super::pace::Pace;
use super::policy::Policy;
use super::rebatch::Rebatcher;
use super::sst::{SstError, SstInfo, SstWriter, scratch_path};
use super::store::Store;
use crate::storage::PartitionKey;
use crate::storage::frames::{Cursor, FetchError, FrameReader};
use crate::storage::mapped::Mapped;
use crate::storage::wal::frame::{FRAME_ALIGN, FrameHeader};
use crate::storage::wal::segment::segment_path;
use crate::wire::record_batch;

/// Bytes that a flush or a merge works in beside its lists: two files' buffers, the batch that is gathered and compressed,
/// a compressor and a decompressor, what a merge reads ahead, and where compression does nothing.
pub(super) const WORKING_SET: u64 = 8 << 20;

/// What a flush made.
#[derive(Debug)]
pub struct Flushed {
    /// The SSTs; none where nothing was to be kept.
    pub files: Vec<FileMeta>,
    /// Where the segment ends.
    pub end_lsn: u64,
    /// Frames that could not be read: byte in the segment and what was found there.
    pub damage: Vec<(u64, String)>,
    /// Batches that are whole by their frame's CRC and yet no valid record batches; they are dropped, since
    /// no reader could make anything of them.
    pub invalid: u64,
}

/// Flushes the segment at `base`, whose frames are all durable and which nobody writes to. `effects` go from one flush to
/// the next.
pub(super) fn flush(
    store: &Store,
    base: u64,
    target: usize,
    policy: &mut dyn FnMut(u32) -> Policy,
    effects: &mut Effects,
    pace: &mut Pace,
) -> Result<Flushed, StoreError> {
    let view = store.view();
    let mut reader = FrameReader::files(store.dir(), store.id());
    let header = reader.header(base)?;
    let path = segment_path(store.dir(), base);
    let memory = &store.memory;
    let mut batches = Batches::new(
        Cursor::at_start(&header),
        &path,
        memory.flush_bytes(),
        &memory.maintenance,
    );
    let mut charge = memory.maintenance.charge();
    charge.set(WORKING_SET);
    let mut flushed = Flushed {
        files: Vec::new(),
        end_lsn: header.end(),
        damage: Vec::new(),
        invalid: 0,
    };
    let mut segment = Mapped::open(&path).map_err(StoreError::io("cannot map", &path))?;
    // Of the topics that are not compacted, and of those that are.
    let mut outputs = [(); 2].map(|()| {
        let (number, path) = store.next_file();
        Output {
            path,
            info: SstInfo {
                id: store.id(),
                number,
                lsn_start: view.flushed_lsn.max(base),
                lsn_end: header.end(),
                created_ms: unix_ms(),
            },
            writer: None,
        }
    });
    let mut rebatcher: Option<(Policy, Rebatcher)> = None;
    let mut collector: Option<Collector> = None;
    while let Some(range) = batches.next(&mut reader, &view, pace)? {
        let own = batches.entries(range);
        let key = own[0].key;
        let wanted = policy(key.topic);
        if wanted.deleted {
            continue;
        }
        if rebatcher
            .as_ref()
            .is_none_or(|(p, _)| p.codec != wanted.codec)
        {
            rebatcher = Some((wanted.clone(), Rebatcher::new(wanted.codec, target)));
        }
        let Some((_, rebatcher)) = &mut rebatcher else {
            continue;
        };
        let output = &mut outputs[usize::from(wanted.compaction.is_some())];
        let mut keys = wanted
            .indexed
            .then(|| output.collector(&mut collector, key, memory));
        let mut failed = None;
        let mut time = i64::MIN;
        rebatcher.begin(effects.of(key));
        for entry in own {
            let batch = segment.bytes(entry.at, entry.len as usize);
            let batch = batch.map_err(StoreError::io("cannot read", &path))?;
            time = time.max(entry.time);
            let pushed = rebatcher.push(batch, &mut |batch| {
                output.put(key, batch, time, &mut failed);
            });
            flushed.invalid += u64::from(pushed.is_err());
            if let Some(keys) = &mut keys
                && pushed.is_ok()
                && let Ok(header) = record_batch::parse_header(batch)
            {
                let kept = keys.batch(batch, &header);
                kept.map_err(|error| keys_failed(&output.path, error))?;
            }
            pace.worked(entry.len as usize);
        }
        rebatcher.finish(&mut |batch| output.put(key, batch, time, &mut failed));
        effects.note(key, rebatcher.effect());
        if let Some(error) = failed {
            return Err(error);
        }
        if let Some(keys) = keys {
            let drained = output.keys(key, keys, &[], 0);
            drained.map_err(|error| match error {
                DrainError::Section(_, error) | DrainError::Run(error) => {
                    keys_failed(&output.path, error)
                }
                DrainError::Take(error) => error,
            })?;
        }
    }
    for output in outputs {
        flushed.files.extend(output.finish()?);
    }
    flushed.damage = batches.damage;
    // What was read of the segment is not read again.
    advise_unneeded(segment.file());
    Ok(flushed)
}

/// Calls `take` with every frame of a segment. Behind damage it looks for the next whole frame of the same
/// segment.
pub(super) fn collect(
    reader: &mut FrameReader,
    mut cursor: Cursor,
    path: &Path,
    mut take: impl FnMut(&FrameHeader, &[u8]),
) -> Result<Vec<(u64, String)>, StoreError> {
    let mut damage = Vec::new();
    loop {
        match cursor.step(reader, &mut take) {
            Ok(Some(())) => continue,
            Ok(None) => return Ok(damage),
            Err(error) if error.is_blank() && !follows(reader, &cursor)? => return Ok(damage),
            Err(error @ FetchError::Io { .. }) => return Err(error.into()),
            Err(error) => damage.push((cursor.lsn - cursor.base, error.to_string())),
        }
        tracing::error!(path = %path.display(), "{}", damage[damage.len() - 1].1);
        if !resume(reader, &mut cursor)? {
            return Ok(damage);
        }
    }
}

/// Whether a whole frame lies behind the cursor: then the blank at the cursor is damage.
fn follows(reader: &mut FrameReader, cursor: &Cursor) -> Result<bool, StoreError> {
    let mut behind = *cursor;
    resume(reader, &mut behind)
}

/// Moves the cursor to the next whole frame of its segment; false: there is none.
fn resume(reader: &mut FrameReader, cursor: &mut Cursor) -> Result<bool, StoreError> {
    let mut lsn = cursor.lsn + FRAME_ALIGN as u64;
    while lsn + FRAME_ALIGN as u64 <= cursor.segment_end() {
        match reader.with_frame(cursor.base, lsn, |header, _| (header.seq, header.prev_crc)) {
            Ok((seq, prev_crc)) if seq >= cursor.next_seq => {
                (cursor.lsn, cursor.next_seq, cursor.prev_crc) = (lsn, seq, prev_crc);
                return Ok(true);
            }
            Ok(_) => {}
            Err(error @ FetchError::Io { .. }) => return Err(error.into()),
            Err(_) => {}
        }
        lsn += FRAME_ALIGN as u64;
    }
    Ok(false)
}

/// An SST that is made when its first batch comes.
pub(super) struct Output {
    pub(super) path: PathBuf,
    pub(super) info: SstInfo,
    pub(super) writer: Option<SstWriter>,
}

impl Output {
    /// Writes a batch; keeps the first error.
    pub(super) fn put(
        &mut self,
        key: PartitionKey,
        batch: &[u8],
        time: i64,
        failed: &mut Option<StoreError>,
    ) {
        if failed.is_some() {
            return;
        }
        let result = (|| {
            let writer = match &mut self.writer {
                Some(writer) => writer,
                none => none.insert(SstWriter::create(&self.path, self.info)?),
            };
            writer.batch(key, batch, time)
        })();
        *failed = result.err().map(StoreError::from);
    }

    /// Says for which offsets the file stands: see [`SstWriter::cover`].
    pub(super) fn cover(
        &mut self,
        key: PartitionKey,
        first: i64,
        end: i64,
        time: i64,
    ) -> Result<(), StoreError> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => none.insert(SstWriter::create(&self.path, self.info)?),
        };
        Ok(writer.cover(key, first, end, time)?)
    }

    /// A collector for the keys of a partition that goes to this file; made once, in `slot`.
    pub(super) fn collector<'a>(
        &self,
        slot: &'a mut Option<Collector>,
        key: PartitionKey,
        memory: &StoreMemory,
    ) -> &'a mut Collector {
        let collector = slot.get_or_insert_with(|| {
            // Not the writer's own name.
            Collector::new(scratch_path(&self.path).with_extension("runs.tmp"), memory)
        });
        collector.begin(key);
        collector
    }

    /// Writes the keys of `key`, the partition written to last, that were collected and those in sections of other files,
    /// but for offsets before `least`. Nothing where the file has nothing of the partition.
    pub(super) fn keys(
        &mut self,
        key: PartitionKey,
        collected: &mut Collector,
        sections: &[KeysReader],
        least: i64,
    ) -> Result<(), DrainError<StoreError>> {
        let Some(writer) = &mut self.writer else {
            return Ok(());
        };
        if writer.partition() != Some(key) {
            return Ok(());
        }
        let take = |error: SstError| DrainError::Take(error.into());
        writer.keyed().map_err(take)?;
        collected.drain(sections, least, |kept, offset| {
            writer.key(kept, offset).map_err(StoreError::from)
        })
    }

    /// Ends the file; `None`: nothing was written.
    pub(super) fn finish(self) -> Result<Option<FileMeta>, StoreError> {
        let Some(writer) = self.writer else {
            return Ok(None);
        };
        let made = writer.finish()?;
        Ok(Some(FileMeta {
            number: self.info.number,
            lsn_start: self.info.lsn_start,
            lsn_end: self.info.lsn_end,
            bytes: made.file_bytes,
            records: made.records,
            data_bytes: made.data_bytes,
            min_time: made.min_time,
            max_time: made.max_time,
            merges: 0,
            due: NEVER_COMPACTED,
        }))
    }
}

/// The files that keys of the file at `path` are collected in failed.
pub(super) fn keys_failed(path: &Path, error: KeysError) -> StoreError {
    let source = match error {
        KeysError::Io(source) => source,
        other => std::io::Error::other(other),
    };
    StoreError::io("cannot collect keys for", path)(source)
}

pub(super) fn unix_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |t| t.as_millis() as i64)
}

/// Tells the kernel that the file's pages need not stay.
pub(super) fn advise_unneeded(file: &File) {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open; fadvise touches no memory of the process.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}
