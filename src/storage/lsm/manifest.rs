//! The manifest: which SSTs a shard's store consists of, how far the log has been flushed, and where each
//! partition begins. A checksummed log of edits that starts with a snapshot.
//!
//! Invariants: an edit is applied in memory only after it is durable, so what the process shows has
//! happened for good. A manifest gets its name (rename) only with a whole snapshot in it; there is a moment
//! with two, then the older goes. Only the last record can be torn: anything wrong before it is damage, and
//! so is a state whose files are not there (see [`super::store`]).
//!
//! The bytes are in docs/formats.md, "Manifest".

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::error::StoreError;
use super::steps::step;
use crate::storage::PartitionKey;
use crate::storage::wal::LogId;
use crate::storage::wal::segment::sync_dir;

/// First eight bytes of a manifest.
pub const MANIFEST_MAGIC: [u8; 8] = *b"TAFFMAN\0";
/// Version of the format.
pub const MANIFEST_VERSION: u32 = 1;
const HEADER: usize = 64;
const HEADER_CRC_AT: usize = 40;
/// Length and CRC of a record.
const RECORD_HEADER: usize = 8;
/// No record is larger; 16 million trimmed partitions, or as many files.
const RECORD_MAX: usize = 256 << 20;
/// A manifest is written anew when its edits have grown to this: reading it at the start stays a matter of
/// milliseconds.
const REWRITE_AT: u64 = 4 << 20;

const TAG_SNAPSHOT: u8 = 1;
const TAG_FLUSH: u8 = 2;
const TAG_REPLACE: u8 = 3;
const TAG_TRIM: u8 = 4;
const TAG_QUARANTINE: u8 = 5;
const FILE_LEN: usize = 72;
const TRIM_LEN: usize = 16;

/// What is known of an SST without opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct FileMeta {
    /// Names the file; never reused.
    pub number: u64,
    /// What it holds of the log: LSNs from here on …
    pub lsn_start: u64,
    /// … and before this. Files with the same range are one *run*, split by partition.
    pub lsn_end: u64,
    /// Size of the file.
    pub bytes: u64,
    /// Records in it.
    pub records: u64,
    /// Bytes of record batches.
    pub data_bytes: u64,
    /// Earliest and latest time of arrival, Unix ms.
    pub min_time: i64,
    /// See `min_time`.
    pub max_time: i64,
    /// Merges it has been through; 0: flushed from the log.
    pub merges: u32,
    /// When there is more to compact in it by key, Unix s: records were too young, or are tombstones. [`NEVER_COMPACTED`]
    /// or [`COMPACTED`] where that is no matter of time.
    pub due: u32,
}

/// Nobody looked for superseded records in the file.
pub const NEVER_COMPACTED: u32 = 0;
/// Nothing in the file is superseded by anything else in it.
pub const COMPACTED: u32 = u32::MAX;

/// A change of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    /// The log up to `flushed_lsn` is in SSTs now, the last of them `add`.
    Flush {
        /// At most two: compacted topics' messages have a file of their own. None where nothing was to be kept.
        add: Vec<FileMeta>,
        /// Everything before it is flushed.
        flushed_lsn: u64,
    },
    /// A merge, or files that nobody needs any more.
    Replace {
        /// Numbers of the files that go.
        remove: Vec<u64>,
        /// What stands in their place.
        add: Vec<FileMeta>,
    },
    /// The partitions begin here from now on.
    Trim(Vec<(PartitionKey, i64)>),
    /// The file is damaged; it stays on disk, and nothing that is found to be wrong is served from it.
    Quarantine(u64),
}

/// The store as the edits made it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// The next file's number.
    pub next_number: u64,
    /// Everything of the log before it is in SSTs.
    pub flushed_lsn: u64,
    /// In the order of the log; a run's files in the order of their partitions.
    pub files: Vec<FileMeta>,
    /// First offset of each partition that does not begin where its files do.
    pub starts: BTreeMap<PartitionKey, i64>,
    /// Files known to be damaged.
    pub quarantined: BTreeSet<u64>,
}

impl State {
    /// Applies an edit.
    pub fn apply(&mut self, edit: &Edit) {
        match edit {
            Edit::Flush { add, flushed_lsn } => {
                self.flushed_lsn = self.flushed_lsn.max(*flushed_lsn);
                self.add(add.iter());
            }
            Edit::Replace { remove, add } => {
                self.files.retain(|file| !remove.contains(&file.number));
                for number in remove {
                    self.quarantined.remove(number);
                }
                self.add(add.iter());
            }
            Edit::Trim(starts) => {
                for &(key, start) in starts {
                    let entry = self.starts.entry(key).or_insert(start);
                    *entry = start.max(*entry);
                }
            }
            Edit::Quarantine(number) => {
                self.quarantined.insert(*number);
            }
        }
    }

    fn add<'a>(&mut self, files: impl Iterator<Item = &'a FileMeta>) {
        for file in files {
            self.next_number = self.next_number.max(file.number + 1);
            self.files.push(*file);
        }
        // Stable: a run's files come in the order of their partitions, that is of their numbers.
        self.files.sort_by_key(|f| (f.lsn_start, f.number));
    }
}

/// A manifest open for writing.
#[derive(Debug)]
pub struct Manifest {
    dir: PathBuf,
    id: LogId,
    number: u64,
    file: File,
    /// Bytes of the file, and of those the header and the snapshot.
    len: u64,
    snapshot_len: u64,
    state: State,
    /// A failed write: nothing more is written.
    failed: bool,
}

/// What reading a manifest gave.
#[derive(Debug)]
pub struct Loaded {
    /// The manifest.
    pub path: PathBuf,
    /// Its state.
    pub state: State,
    /// Bytes that hold whole records.
    pub len: u64,
    /// Records, the snapshot included.
    pub records: u64,
    /// Bytes behind them, of a record that was being written when the power went.
    pub torn: u64,
    number: u64,
    snapshot_len: u64,
}

/// The file of the manifest with this number.
pub fn manifest_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("manifest-{number:016x}"))
}

/// Numbers of the manifests in a folder, ascending.
pub fn list(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let number = name
            .to_str()
            .and_then(|n| n.strip_prefix("manifest-"))
            .filter(|hex| hex.len() == 16)
            .and_then(|hex| u64::from_str_radix(hex, 16).ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Reads the newest manifest of a shard's folder; `None`: there is none.
pub fn load(dir: &Path, id: LogId) -> Result<Option<Loaded>, StoreError> {
    let numbers = list(dir).map_err(StoreError::io("cannot list", dir))?;
    let Some(&number) = numbers.last() else {
        return Ok(None);
    };
    let path = manifest_path(dir, number);
    let bytes = fs::read(&path).map_err(StoreError::io("cannot read", &path))?;
    parse(&bytes, id, number)
        .map(|(state, len, snapshot_len, records)| {
            Some(Loaded {
                torn: bytes.len() as u64 - len,
                path: path.clone(),
                state,
                len,
                records,
                number,
                snapshot_len,
            })
        })
        .map_err(|(position, what)| StoreError::Manifest {
            path,
            position,
            what,
        })
}

/// State, bytes of whole records, bytes up to the snapshot's end, and records of a manifest; or the place
/// and kind of its damage.
pub fn parse(
    bytes: &[u8],
    id: LogId,
    number: u64,
) -> Result<(State, u64, u64, u64), (u64, &'static str)> {
    if read_header(bytes)? != (id, number) {
        return Err((0, "the header is of another store, shard or file"));
    }
    let mut state = State::default();
    let mut snapshot_len = 0;
    let mut count = 0;
    let len = records(bytes, &mut |position, len, record| {
        count += 1;
        match record {
            Record::Snapshot(snapshot) => {
                snapshot_len = position + len;
                state = snapshot.clone();
            }
            Record::Edit(edit) => state.apply(edit),
        }
    })?;
    Ok((state, len, snapshot_len, count))
}

/// Whose manifest, and its number.
pub fn read_header(bytes: &[u8]) -> Result<(LogId, u64), (u64, &'static str)> {
    let Some(header) = bytes.get(..HEADER) else {
        return Err((0, "shorter than a manifest's header"));
    };
    if header[..8] != MANIFEST_MAGIC {
        return Err((0, "not a Taffrail manifest (magic number)"));
    }
    let mut input = In(&header[8..]);
    let mut fields = || {
        let version = input.u32()?;
        let shard = u16::from_le_bytes(input.array()?);
        let _zero: [u8; 2] = input.array()?;
        let store = u128::from_le_bytes(input.array()?);
        Some((version, LogId { store, shard }, input.u64()?))
    };
    let Some((version, id, number)) = fields() else {
        return Err((0, "shorter than a manifest's header"));
    };
    let mut expected = [0; HEADER];
    write_header(&mut expected, id, number);
    let crc = HEADER_CRC_AT..HEADER_CRC_AT + 4;
    if header[crc.clone()] != crc32c::crc32c(&header[..HEADER_CRC_AT]).to_le_bytes() {
        return Err((0, "the header is damaged"));
    }
    if version != MANIFEST_VERSION {
        return Err((8, "the file's version is not known to this program"));
    }
    if header != expected {
        return Err((0, "the header is damaged"));
    }
    Ok((id, number))
}

/// Gives the records behind the header in order, each with its byte and its length: a snapshot, then edits.
/// Returns the bytes of the header and whole records; behind them lies a torn one, if anything. An error is the
/// place and kind of the damage; what lies before was given.
pub fn records(
    bytes: &[u8],
    each: &mut dyn FnMut(u64, u64, &Record),
) -> Result<u64, (u64, &'static str)> {
    let mut at = HEADER;
    let mut first = true;
    while at < bytes.len() {
        let position = at as u64;
        let payload = match record(&bytes[at..]) {
            Ok(payload) => payload,
            // The snapshot was whole before the file had its name.
            Err(_) if first => return Err((position, "the snapshot is damaged")),
            Err(true) => break,
            Err(false) => return Err((position, "a record's CRC is wrong, and more follows")),
        };
        let decoded = decode(payload).ok_or((position, "a record is whole but not understood"))?;
        if matches!(decoded, Record::Snapshot(_)) != first {
            return Err((position, "a snapshot comes first, and only there"));
        }
        first = false;
        let len = RECORD_HEADER + payload.len();
        each(position, len as u64, &decoded);
        at += len;
    }
    if first {
        return Err((at as u64, "there is no snapshot"));
    }
    Ok(at as u64)
}

/// The first record's payload; an error says whether it may be torn: it reaches to the end or beyond.
fn record(bytes: &[u8]) -> Result<&[u8], bool> {
    let Some((header, rest)) = bytes.split_at_checked(RECORD_HEADER) else {
        return Err(true);
    };
    let len = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let crc = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    let len_bytes = len.to_le_bytes();
    match rest.get(..len as usize) {
        Some(payload) if len > 0 => {
            let computed = crc32c::crc32c_append(crc32c::crc32c(&len_bytes), payload);
            if computed == crc {
                Ok(payload)
            } else {
                Err(payload.len() == rest.len())
            }
        }
        // A file that grew before its bytes came: zeros to the end.
        Some(_) => Err(rest.iter().all(|&b| b == 0)),
        None => Err(len as usize <= RECORD_MAX),
    }
}

fn write_header(out: &mut [u8; HEADER], id: LogId, number: u64) {
    out[..8].copy_from_slice(&MANIFEST_MAGIC);
    out[8..12].copy_from_slice(&MANIFEST_VERSION.to_le_bytes());
    out[12..14].copy_from_slice(&id.shard.to_le_bytes());
    out[16..32].copy_from_slice(&id.store.to_le_bytes());
    out[32..40].copy_from_slice(&number.to_le_bytes());
    let crc = crc32c::crc32c(&out[..HEADER_CRC_AT]);
    out[HEADER_CRC_AT..HEADER_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
}

/// A record of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// What the edits of the manifest before made; the first record.
    Snapshot(State),
    /// Any other.
    Edit(Edit),
}

fn put_file(out: &mut Vec<u8>, file: &FileMeta) {
    for field in [
        file.number,
        file.lsn_start,
        file.lsn_end,
        file.bytes,
        file.records,
        file.data_bytes,
        file.min_time as u64,
        file.max_time as u64,
    ] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.extend_from_slice(&file.merges.to_le_bytes());
    out.extend_from_slice(&file.due.to_le_bytes());
}

fn put_trims<'a>(out: &mut Vec<u8>, trims: impl ExactSizeIterator<Item = (PartitionKey, &'a i64)>) {
    out.extend_from_slice(&(trims.len() as u32).to_le_bytes());
    for (key, start) in trims {
        out.extend_from_slice(&key.topic.to_le_bytes());
        out.extend_from_slice(&key.partition.to_le_bytes());
        out.extend_from_slice(&start.to_le_bytes());
    }
}

fn put_numbers(out: &mut Vec<u8>, numbers: impl ExactSizeIterator<Item = u64>) {
    out.extend_from_slice(&(numbers.len() as u32).to_le_bytes());
    numbers.for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
}

fn put_files<'a>(out: &mut Vec<u8>, files: impl ExactSizeIterator<Item = &'a FileMeta>) {
    out.extend_from_slice(&(files.len() as u32).to_le_bytes());
    files.for_each(|file| put_file(out, file));
}

/// A record's bytes: header and payload.
fn framed(payload: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = vec![0; RECORD_HEADER];
    payload(&mut out);
    let len = ((out.len() - RECORD_HEADER) as u32).to_le_bytes();
    let crc = crc32c::crc32c_append(crc32c::crc32c(&len), &out[RECORD_HEADER..]);
    out[..4].copy_from_slice(&len);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    out
}

fn encode_snapshot(state: &State) -> Vec<u8> {
    framed(|out| {
        out.push(TAG_SNAPSHOT);
        out.extend_from_slice(&state.next_number.to_le_bytes());
        out.extend_from_slice(&state.flushed_lsn.to_le_bytes());
        put_files(out, state.files.iter());
        put_trims(out, state.starts.iter().map(|(&key, start)| (key, start)));
        put_numbers(out, state.quarantined.iter().copied());
    })
}

fn encode_edit(edit: &Edit) -> Vec<u8> {
    framed(|out| match edit {
        Edit::Flush { add, flushed_lsn } => {
            out.push(TAG_FLUSH);
            out.extend_from_slice(&flushed_lsn.to_le_bytes());
            put_files(out, add.iter());
        }
        Edit::Replace { remove, add } => {
            out.push(TAG_REPLACE);
            put_numbers(out, remove.iter().copied());
            put_files(out, add.iter());
        }
        Edit::Trim(starts) => {
            out.push(TAG_TRIM);
            put_trims(out, starts.iter().map(|(key, start)| (*key, start)));
        }
        Edit::Quarantine(number) => {
            out.push(TAG_QUARANTINE);
            out.extend_from_slice(&number.to_le_bytes());
        }
    })
}

struct In<'a>(&'a [u8]);

impl In<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_at_checked(N)?;
        self.0 = rest;
        taken.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of things of `size` bytes that the rest can hold.
    fn count(&mut self, size: usize) -> Option<usize> {
        let count = self.u32()? as usize;
        (count <= self.0.len() / size).then_some(count)
    }

    fn file(&mut self) -> Option<FileMeta> {
        let file = FileMeta {
            number: self.u64()?,
            lsn_start: self.u64()?,
            lsn_end: self.u64()?,
            bytes: self.u64()?,
            records: self.u64()?,
            data_bytes: self.u64()?,
            min_time: self.u64()? as i64,
            max_time: self.u64()? as i64,
            merges: self.u32()?,
            due: self.u32()?,
        };
        (file.number < u64::MAX && file.lsn_start <= file.lsn_end).then_some(file)
    }

    fn files(&mut self) -> Option<Vec<FileMeta>> {
        let count = self.count(FILE_LEN)?;
        (0..count).map(|_| self.file()).collect()
    }

    fn trims(&mut self) -> Option<Vec<(PartitionKey, i64)>> {
        let count = self.count(TRIM_LEN)?;
        (0..count)
            .map(|_| {
                let key = PartitionKey {
                    topic: self.u32()?,
                    partition: self.u32()?,
                };
                Some((key, self.u64()? as i64))
            })
            .collect()
    }

    fn numbers(&mut self) -> Option<Vec<u64>> {
        let count = self.count(8)?;
        (0..count).map(|_| self.u64()).collect()
    }
}

fn decode(payload: &[u8]) -> Option<Record> {
    let mut input = In(payload);
    let [tag] = input.array()?;
    let decoded = match tag {
        TAG_SNAPSHOT => {
            let mut state = State {
                next_number: input.u64()?,
                flushed_lsn: input.u64()?,
                ..State::default()
            };
            state.add(input.files()?.iter());
            state.starts = input.trims()?.into_iter().collect();
            state.quarantined = input.numbers()?.into_iter().collect();
            Record::Snapshot(state)
        }
        TAG_FLUSH => {
            let flushed_lsn = input.u64()?;
            let files = input.files()?;
            Record::Edit(Edit::Flush {
                add: files,
                flushed_lsn,
            })
        }
        TAG_REPLACE => Record::Edit(Edit::Replace {
            remove: input.numbers()?,
            add: input.files()?,
        }),
        TAG_TRIM => Record::Edit(Edit::Trim(input.trims()?)),
        TAG_QUARANTINE => Record::Edit(Edit::Quarantine(input.u64()?)),
        _ => return None,
    };
    input.0.is_empty().then_some(decoded)
}

impl Manifest {
    /// Opens the newest manifest in `dir` for writing, or makes one with `fresh` in it where there is none.
    /// What is torn is cut off.
    pub fn open(dir: &Path, id: LogId, fresh: State) -> Result<Manifest, StoreError> {
        let Some(loaded) = load(dir, id)? else {
            return Self::create(dir, id, 1, fresh);
        };
        let path = loaded.path;
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(StoreError::io("cannot open", &path))?;
        if loaded.torn > 0 {
            tracing::info!(
                path = %path.display(),
                "cutting off {} bytes of a record that was never completed",
                loaded.torn
            );
            file.set_len(loaded.len)
                .and_then(|()| file.sync_all())
                .map_err(StoreError::io("cannot shorten", &path))?;
        }
        let manifest = Manifest {
            dir: dir.to_owned(),
            id,
            number: loaded.number,
            file,
            len: loaded.len,
            snapshot_len: loaded.snapshot_len,
            state: loaded.state,
            failed: false,
        };
        manifest.remove_older()?;
        Ok(manifest)
    }

    /// Writes a manifest with nothing but a snapshot and makes it the one that counts.
    pub fn create(
        dir: &Path,
        id: LogId,
        number: u64,
        state: State,
    ) -> Result<Manifest, StoreError> {
        let path = manifest_path(dir, number);
        let temporary = path.with_extension("tmp");
        let mut bytes = [0; HEADER];
        write_header(&mut bytes, id, number);
        let mut bytes = bytes.to_vec();
        bytes.extend_from_slice(&encode_snapshot(&state));
        let file = (|| {
            step()?;
            let mut file = OpenOptions::new()
                .append(true)
                .create(true)
                .open(&temporary)?;
            file.set_len(0)?;
            step()?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            step()?;
            fs::rename(&temporary, &path)?;
            step()?;
            sync_dir(dir)?;
            Ok(file)
        })()
        .map_err(StoreError::io("cannot write", &path))?;
        let len = bytes.len() as u64;
        let manifest = Manifest {
            dir: dir.to_owned(),
            id,
            number,
            file,
            len,
            snapshot_len: len,
            state,
            failed: false,
        };
        manifest.remove_older()?;
        Ok(manifest)
    }

    fn remove_older(&self) -> Result<(), StoreError> {
        for number in list(&self.dir).map_err(StoreError::io("cannot list", &self.dir))? {
            if number < self.number {
                let path = manifest_path(&self.dir, number);
                step()
                    .and_then(|()| fs::remove_file(&path))
                    .map_err(StoreError::io("cannot remove", &path))?;
            }
        }
        Ok(())
    }

    /// What is durable.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Makes an edit durable, then applies it. Cost: one write and fdatasync. After an error the manifest
    /// takes no more edits: whether the last one is on disk is not known.
    pub fn commit(&mut self, edit: &Edit) -> Result<(), StoreError> {
        let path = manifest_path(&self.dir, self.number);
        if self.failed {
            return Err(StoreError::ManifestFailed { path });
        }
        let bytes = encode_edit(edit);
        let written = step()
            .and_then(|()| self.file.write_all(&bytes))
            .and_then(|()| step())
            .and_then(|()| self.file.sync_data());
        if let Err(error) = written {
            self.failed = true;
            return Err(StoreError::io("cannot write", &path)(error));
        }
        self.len += bytes.len() as u64;
        self.state.apply(edit);
        if self.len - self.snapshot_len > REWRITE_AT.max(self.snapshot_len) {
            // The old one is whole: a failure (no space) only leaves it longer.
            match Self::create(&self.dir, self.id, self.number + 1, self.state.clone()) {
                Ok(next) => *self = next,
                Err(error) => tracing::warn!("the manifest stays as long as it is: {error}"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: LogId = LogId {
        store: 0x1234_5678,
        shard: 3,
    };

    fn file(number: u64, lsn_start: u64, lsn_end: u64) -> FileMeta {
        FileMeta {
            number,
            lsn_start,
            lsn_end,
            bytes: 4096,
            records: number * 3,
            data_bytes: 17,
            min_time: -1,
            max_time: 5,
            merges: 1,
            due: 7,
        }
    }

    fn key(partition: u32) -> PartitionKey {
        PartitionKey {
            topic: 7,
            partition,
        }
    }

    fn edits() -> impl Strategy<Value = Edit> {
        let numbers = prop::collection::vec(0..20u64, 0..4);
        let files = prop::collection::vec(
            (0..40u64, 0..9u64, 1..9u64).prop_map(|(n, a, l)| file(n, a, a + l)),
            0..3,
        );
        prop_oneof![
            (any::<bool>(), 0..40u64, 0..1000u64).prop_map(|(some, n, lsn)| Edit::Flush {
                add: some.then(|| file(n, lsn, lsn + 10)).into_iter().collect(),
                flushed_lsn: lsn + 10,
            }),
            (numbers, files).prop_map(|(remove, add)| Edit::Replace { remove, add }),
            prop::collection::vec((0..5u32, 0..99i64), 0..5)
                .prop_map(|t| Edit::Trim(t.into_iter().map(|(p, o)| (key(p), o)).collect())),
            (0..20u64).prop_map(Edit::Quarantine),
        ]
    }

    proptest! {
        #[test]
        fn what_was_committed_is_read_back_however_the_end_is_torn(
            edits in prop::collection::vec(edits(), 1..12),
            cut in 0..400usize,
            zeros in any::<bool>(),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut manifest = Manifest::open(dir.path(), ID, State::default()).unwrap();
            let mut states = vec![(manifest.len, manifest.state().clone())];
            for edit in &edits {
                manifest.commit(edit).unwrap();
                states.push((manifest.len, manifest.state().clone()));
            }
            let path = manifest_path(dir.path(), 1);
            drop(manifest);
            let whole = fs::read(&path).unwrap();
            let (last, before) = (states.len() - 1, states[states.len() - 2].0);
            prop_assert_eq!(&load(dir.path(), ID).unwrap().unwrap().state, &states[last].1);
            // The last record, torn.
            let keep = before as usize + cut % (whole.len() - before as usize);
            let mut torn = whole[..keep].to_vec();
            if zeros {
                torn.resize(whole.len(), 0);
            }
            fs::write(&path, &torn).unwrap();
            let mut manifest = Manifest::open(dir.path(), ID, State::default()).unwrap();
            let expected = if torn == whole { last } else { last - 1 };
            prop_assert_eq!(manifest.state(), &states[expected].1);
            manifest.commit(&Edit::Quarantine(99)).unwrap();
            prop_assert!(load(dir.path(), ID).unwrap().unwrap().state.quarantined.contains(&99));
        }
    }

    #[test]
    fn any_flipped_bit_but_in_the_last_record_is_damage() {
        let dir = tempfile::tempdir().unwrap();
        let mut manifest = Manifest::open(dir.path(), ID, State::default()).unwrap();
        for n in 0..3 {
            let edit = Edit::Flush {
                add: vec![file(n, n * 10, n * 10 + 10)],
                flushed_lsn: n * 10 + 10,
            };
            manifest.commit(&edit).unwrap();
        }
        let before_last = manifest.len;
        manifest.commit(&Edit::Trim(vec![(key(1), 4)])).unwrap();
        let whole = fs::read(manifest_path(dir.path(), 1)).unwrap();
        let (state, ..) = parse(&whole, ID, 1).unwrap();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                match parse(&bytes, ID, 1) {
                    Err(_) => {}
                    Ok((got, len, ..)) => {
                        // A length that points behind the end looks like a torn record: such a state
                        // has lost files, which the store finds out (see `Store::open`).
                        assert_ne!(got, state, "byte {at} bit {bit}");
                        assert!(
                            at as u64 >= before_last || len <= at as u64,
                            "byte {at} bit {bit}: {len}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn grows_only_so_far_and_leaves_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut manifest = Manifest::open(dir.path(), ID, State::default()).unwrap();
        let trims: Vec<_> = (0..10_000).map(|p| (key(p), 1)).collect();
        for _ in 0..60 {
            manifest.commit(&Edit::Trim(trims.clone())).unwrap();
        }
        assert!(manifest.number > 1);
        assert!(manifest.len < 2 * REWRITE_AT);
        assert_eq!(list(dir.path()).unwrap(), [manifest.number]);
        let loaded = load(dir.path(), ID).unwrap().unwrap();
        assert_eq!(&loaded.state, manifest.state());
        // What a kill between the two leaves: the older one is ignored, and goes.
        fs::write(manifest_path(dir.path(), 1), b"old").unwrap();
        drop(manifest);
        let manifest = Manifest::open(dir.path(), ID, State::default()).unwrap();
        assert_eq!(list(dir.path()).unwrap(), [manifest.number]);
    }

    #[test]
    fn another_stores_manifest_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(Manifest::open(dir.path(), ID, State::default()).unwrap());
        let other = LogId { shard: 4, ..ID };
        assert!(matches!(
            Manifest::open(dir.path(), other, State::default()),
            Err(StoreError::Manifest { .. })
        ));
    }
}
