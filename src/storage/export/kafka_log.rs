//! Partitions as Kafka's own log folders: `TOPIC-PARTITION/` with segments of whole record batches, named by their
//! first offset in 20 digits (`.log`), and their sparse indexes by offset (`.index`) and time (`.timeindex`).
//!
//! Invariants: batches are written as they are, bit for bit. An entry of the offset index names the last offset of the
//! batch that begins at its position; one of the time index the largest timestamp so far and the last offset of the
//! batch that has it. Offsets in an index count from the segment's first and fit 32 bits.
//!
//! Source: Kafka's `LogSegment`, `OffsetIndex` and `TimeIndex` (index interval 4096 bytes, its default); checked with
//! Kafka's `DumpLogSegments`, see docs/compatibility.md.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::{ExportError, Exported};
use crate::storage::wal::segment::sync_dir;
use crate::wire::record_batch;

/// Bytes between two entries of an index: Kafka's `index.interval.bytes`.
const INDEX_INTERVAL: u64 = 4096;
/// Kafka's `log.segment.bytes`: positions in an index are 32 bits with a sign.
pub const SEGMENT_BYTES: u64 = 1 << 30;

/// A folder of Kafka's log folders being written.
pub struct KafkaLog {
    dir: PathBuf,
    topic: String,
    segment_bytes: u64,
    partition: Option<Partition>,
    /// Partitions that begin behind their first batch's first offset.
    starts: Vec<(u32, i64)>,
    done: Exported,
}

struct Partition {
    number: u32,
    dir: PathBuf,
    start: i64,
    segment: Option<Segment>,
    /// No batch yet.
    fresh: bool,
}

struct Segment {
    base: i64,
    log: BufWriter<File>,
    path: PathBuf,
    bytes: u64,
    since_entry: u64,
    index: Vec<u8>,
    times: Vec<u8>,
    last_time: i64,
    /// Largest timestamp, and the last offset of the batch that has it.
    newest: (i64, i64),
}

fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ExportError + 'a {
    move |source| ExportError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

fn create(path: &Path) -> Result<File, ExportError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(io("cannot create", path))
}

impl Segment {
    fn create(dir: &Path, base: i64) -> Result<Segment, ExportError> {
        let path = dir.join(format!("{base:020}.log"));
        Ok(Segment {
            base,
            log: BufWriter::with_capacity(1 << 20, create(&path)?),
            path,
            bytes: 0,
            since_entry: 0,
            index: Vec::new(),
            times: Vec::new(),
            last_time: -1,
            newest: (-1, base),
        })
    }

    fn time_entry(&mut self) {
        let (time, offset) = self.newest;
        if time > self.last_time {
            self.last_time = time;
            self.times.extend_from_slice(&time.to_be_bytes());
            let relative = (offset - self.base) as i32;
            self.times.extend_from_slice(&relative.to_be_bytes());
        }
    }

    fn append(
        &mut self,
        header: &record_batch::BatchHeader,
        batch: &[u8],
    ) -> Result<(), ExportError> {
        let last = header.next_offset() - 1;
        self.log
            .write_all(batch)
            .map_err(io("cannot write", &self.path))?;
        if header.max_timestamp > self.newest.0 {
            self.newest = (header.max_timestamp, last);
        }
        if self.since_entry > INDEX_INTERVAL {
            self.index
                .extend_from_slice(&((last - self.base) as i32).to_be_bytes());
            self.index
                .extend_from_slice(&(self.bytes as i32).to_be_bytes());
            self.time_entry();
            self.since_entry = 0;
        }
        self.since_entry += batch.len() as u64;
        self.bytes += batch.len() as u64;
        Ok(())
    }

    fn finish(mut self, done: &mut Exported) -> Result<(), ExportError> {
        // As when Kafka rolls a segment: the newest timestamp is always in the index.
        self.time_entry();
        let log = self
            .log
            .into_inner()
            .map_err(|e| io("cannot write", &self.path)(e.into_error()))?;
        log.sync_all().map_err(io("cannot sync", &self.path))?;
        for (extension, bytes) in [("index", &self.index), ("timeindex", &self.times)] {
            let path = self.path.with_extension(extension);
            let mut file = create(&path)?;
            file.write_all(bytes)
                .and_then(|()| file.sync_all())
                .map_err(io("cannot write", &path))?;
        }
        done.bytes += self.bytes + (self.index.len() + self.times.len()) as u64;
        done.files += 3;
        Ok(())
    }
}

impl KafkaLog {
    /// Begins in `dir`, which is empty or does not exist. A segment has at most `segment_bytes` bytes, unless a single
    /// batch is larger.
    pub fn create(dir: &Path, topic: &str, segment_bytes: u64) -> Result<KafkaLog, ExportError> {
        fs::create_dir_all(dir).map_err(io("cannot make the folder", dir))?;
        let mut entries = fs::read_dir(dir).map_err(io("cannot list", dir))?;
        if let Some(Ok(entry)) = entries.next() {
            return Err(ExportError::Exists { path: entry.path() });
        }
        Ok(KafkaLog {
            dir: dir.to_owned(),
            topic: topic.to_owned(),
            segment_bytes: segment_bytes.min(SEGMENT_BYTES),
            partition: None,
            starts: Vec::new(),
            done: Exported::default(),
        })
    }

    /// Begins a partition whose first message has offset `start`. Its batches follow in the order of offsets.
    pub fn partition(&mut self, number: u32, start: i64) -> Result<(), ExportError> {
        self.end_partition()?;
        let dir = self.dir.join(format!("{}-{number}", self.topic));
        fs::create_dir(&dir).map_err(io("cannot make the folder", &dir))?;
        self.partition = Some(Partition {
            number,
            dir,
            start,
            segment: None,
            fresh: true,
        });
        Ok(())
    }

    /// Appends a batch to the partition that was begun last.
    pub fn batch(&mut self, batch: &[u8]) -> Result<(), ExportError> {
        let Some(partition) = &mut self.partition else {
            return Ok(());
        };
        let number = partition.number;
        let header = record_batch::parse_whole(batch).map_err(|error| ExportError::Batch {
            partition: number,
            error,
        })?;
        if std::mem::take(&mut partition.fresh) && header.base_offset < partition.start {
            self.starts.push((number, partition.start));
        }
        let full = partition.segment.as_ref().is_some_and(|segment| {
            segment.bytes + batch.len() as u64 > self.segment_bytes
                || header.next_offset() - segment.base > i64::from(i32::MAX)
        });
        if full && let Some(segment) = partition.segment.take() {
            segment.finish(&mut self.done)?;
        }
        let segment = match &mut partition.segment {
            Some(segment) => segment,
            slot => slot.insert(Segment::create(&partition.dir, header.base_offset)?),
        };
        segment.append(&header, batch)?;
        let count = header.records_count as u64;
        match header.is_control() {
            true => self.done.control += count,
            false => self.done.messages += count,
        }
        Ok(())
    }

    fn end_partition(&mut self) -> Result<(), ExportError> {
        let Some(mut partition) = self.partition.take() else {
            return Ok(());
        };
        let segment = match partition.segment.take() {
            Some(segment) => segment,
            // Kafka's partitions have a segment where they have nothing else.
            None => Segment::create(&partition.dir, partition.start)?,
        };
        segment.finish(&mut self.done)?;
        sync_dir(&partition.dir).map_err(io("cannot sync the folder", &partition.dir))
    }

    /// Completes the last partition; all of it is on disk on return.
    pub fn finish(mut self) -> Result<Exported, ExportError> {
        self.end_partition()?;
        if !self.starts.is_empty() {
            // Kafka's checkpoint of log start offsets: version, number of entries, entries.
            let path = self.dir.join("log-start-offset-checkpoint");
            let mut text = format!("0\n{}\n", self.starts.len());
            for (partition, start) in &self.starts {
                text.push_str(&format!("{} {partition} {start}\n", self.topic));
            }
            let mut file = create(&path)?;
            file.write_all(text.as_bytes())
                .and_then(|()| file.sync_all())
                .map_err(io("cannot write", &path))?;
            self.done.files += 1;
        }
        sync_dir(&self.dir).map_err(io("cannot sync the folder", &self.dir))?;
        Ok(self.done)
    }
}
