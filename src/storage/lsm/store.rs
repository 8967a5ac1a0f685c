//! A shard's SSTs as readers see them: which files there are, where each partition lies in them, and
//! reading from them.
//!
//! Invariants: a [`View`] never changes; an edit is durable in the manifest before a view shows it, and a
//! file is removed only when no view names it any more. Readers take the current view by one short lock
//! that is never held while anything is read or written.
//!
//! Memory: 56 bytes for each partition of each run, charged to the budget, which asks for merges where they get many; the
//! manifest's state; the cache of blocks; and the mappings of files, which hold page cache that the kernel takes back when
//! it must; at most [`MAPPED_FILES`] at a time.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cache::BlockCache;
use super::codec;
use super::error::StoreError;
use super::manifest::{self, Edit, FileMeta, Manifest, State};
use super::memory::StoreMemory;
use super::point::Touched;
use super::sst::scan::AHEAD;
use super::sst::{PartitionExtent, Scan, SstError, SstReader};
use super::steps::step;
use crate::memory::budget::Charge;
use crate::storage::PartitionKey;
use crate::storage::pieces::Pieces;
use crate::storage::reader::Outcome;
use crate::storage::wal::LogId;
use crate::storage::wal::segment::list_segments;
use crate::wire::record_batch::{self, Records};

/// Mapped files at a time; each costs the kernel a few hundred bytes and page tables for what is touched.
pub const MAPPED_FILES: usize = 4096;

type Map<V> = HashMap<PartitionKey, V, foldhash::fast::RandomState>;

/// The file of the SST with this number.
pub fn sst_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("sst-{number:016x}.sst"))
}

/// The number in an SST's file name; `None` for other files.
pub fn number_of(name: &str) -> Option<u64> {
    let hex = name.strip_prefix("sst-")?.strip_suffix(".sst")?;
    (hex.len() == 16).then(|| u64::from_str_radix(hex, 16).ok())?
}

/// Numbers of the SSTs in a folder, ascending.
pub fn list_files(dir: &Path) -> std::io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        numbers.extend(entry?.file_name().to_str().and_then(number_of));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// One SST of the store.
pub struct StoreFile {
    /// What the manifest says of it.
    pub meta: FileMeta,
    path: PathBuf,
    id: LogId,
    reader: Mutex<Option<Arc<SstReader>>>,
    /// Ticks of the store's clock of uses.
    used: AtomicU64,
    /// Removed from the manifest: the last one to let go of it removes the file.
    obsolete: AtomicBool,
    quarantined: AtomicBool,
}

impl StoreFile {
    fn new(dir: &Path, id: LogId, meta: FileMeta) -> StoreFile {
        StoreFile {
            path: sst_path(dir, meta.number),
            id,
            meta,
            reader: Mutex::new(None),
            used: AtomicU64::new(0),
            obsolete: AtomicBool::new(false),
            quarantined: AtomicBool::new(false),
        }
    }

    /// Something in it was found to be damaged.
    pub fn is_quarantined(&self) -> bool {
        self.quarantined.load(Ordering::Acquire)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The mapped file; maps it where it is not. `true`: it was not.
    fn open(&self) -> Result<(Arc<SstReader>, bool), SstError> {
        let mut reader = lock(&self.reader);
        if let Some(reader) = &*reader {
            return Ok((Arc::clone(reader), false));
        }
        let opened = Arc::new(SstReader::open(&self.path, self.id)?);
        *reader = Some(Arc::clone(&opened));
        Ok((opened, true))
    }

    /// The mapped file.
    pub fn reader(&self) -> Result<Arc<SstReader>, SstError> {
        Ok(self.open()?.0)
    }
}

impl Drop for StoreFile {
    fn drop(&mut self) {
        if *self.obsolete.get_mut() {
            // What stays because of an error is removed at the next start.
            let _ = step().and_then(|()| fs::remove_file(&self.path));
        }
    }
}

/// When a block's CRC is compared.
#[derive(Clone, Copy)]
enum Check {
    /// Each time.
    Always,
    /// The first time since its file was mapped.
    Once,
}

/// A partition in one file.
#[derive(Clone)]
pub struct Extent {
    /// The file.
    pub file: Arc<StoreFile>,
    /// First offset, and the one behind the last.
    pub first: i64,
    /// See `first`.
    pub end: i64,
    /// Latest time of arrival, Unix ms.
    pub max_time: i64,
    /// Latest time of arrival in its first block.
    pub min_time: i64,
    /// Bytes of record batches.
    pub bytes: u64,
    /// Its keys are in the file's key index.
    pub keyed: bool,
}

/// The store at a moment.
#[derive(Clone, Default)]
pub struct View {
    /// In the order of the log.
    pub files: Vec<Arc<StoreFile>>,
    /// Each partition's extents in the order of offsets.
    partitions: Map<Vec<Extent>>,
    starts: Arc<BTreeMap<PartitionKey, i64>>,
    /// What the log holds before this is in `files`.
    pub flushed_lsn: u64,
}

impl View {
    /// The partition's extents, oldest first; the first ones may lie before its start.
    pub fn extents(&self, key: PartitionKey) -> &[Extent] {
        self.partitions.get(&key).map_or(&[], Vec::as_slice)
    }

    /// All partitions that have extents.
    pub fn partitions(&self) -> impl Iterator<Item = (PartitionKey, &[Extent])> {
        self.partitions.iter().map(|(&key, list)| (key, &list[..]))
    }

    /// The offset that retention or an operator set as the partition's first; 0: none.
    pub fn start(&self, key: PartitionKey) -> i64 {
        self.starts.get(&key).copied().unwrap_or(0)
    }

    /// The partitions with such a start, and it.
    pub fn starts(&self) -> impl Iterator<Item = (PartitionKey, i64)> {
        self.starts.iter().map(|(&key, &start)| (key, start))
    }

    /// The partition's first offset here and the one behind its last; `None`: it has nothing here.
    pub fn bounds(&self, key: PartitionKey) -> Option<(i64, i64)> {
        let extents = self.extents(key);
        let start = self.start(key);
        let end = extents.last()?.end;
        let first = extents.iter().find(|e| e.end > start)?.first;
        Some((first.max(start), end))
    }

    /// Bytes of memory. Cost: a pass over all partitions.
    pub fn bytes(&self) -> u64 {
        let entry = size_of::<(PartitionKey, Vec<Extent>)>() + 1;
        let lists: usize = self.partitions.values().map(Vec::capacity).sum();
        (self.partitions.capacity() * entry * 8 / 7 + lists * size_of::<Extent>()) as u64
    }

    fn insert(&mut self, file: &Arc<StoreFile>, extents: impl Iterator<Item = PartitionExtent>) {
        for extent in extents {
            let list = self.partitions.entry(extent.key).or_default();
            let new = Extent {
                file: Arc::clone(file),
                first: extent.first_offset,
                end: extent.end_offset,
                max_time: extent.max_time,
                min_time: extent.min_time,
                bytes: extent.bytes,
                keyed: extent.keyed,
            };
            let at = list.partition_point(|e| e.file.meta.lsn_start < file.meta.lsn_start);
            list.insert(at, new);
        }
    }
}

/// Bytes and events since the start.
#[derive(Debug, Default)]
pub struct StoreStats {
    /// Segments flushed.
    pub flushes: AtomicU64,
    /// Bytes of the log that flushes read.
    pub flush_read_bytes: AtomicU64,
    /// Bytes of SSTs that flushes wrote.
    pub flush_written_bytes: AtomicU64,
    /// Expired records, and deleted topics', that went with their files or were left out of merges.
    pub records_expired: AtomicU64,
    /// Blocks found damaged.
    pub damaged_blocks: AtomicU64,
    /// ns of CPU that flushing took.
    pub flush_cpu_ns: AtomicU64,
    /// Merges that were completed.
    pub merges: AtomicU64,
    /// Bytes of record batches that merges read, those under way included, and bytes of SSTs that they wrote.
    pub merge_read_bytes: AtomicU64,
    /// See `merge_read_bytes`.
    pub merge_written_bytes: AtomicU64,
    /// ns of CPU that merging took.
    pub merge_cpu_ns: AtomicU64,
    /// Records that compaction by key dropped.
    pub records_compacted: AtomicU64,
    /// The merge that runs: bytes of record batches in its files; 0: none runs. And those it is through with.
    pub merging_bytes: AtomicU64,
    /// See `merging_bytes`.
    pub merged_bytes: AtomicU64,
    /// Why it runs; empty: none runs.
    pub merging: Mutex<&'static str>,
}

/// The SSTs of one shard. Any number of reading threads; one maintains.
pub struct Store {
    dir: PathBuf,
    id: LogId,
    view: Mutex<Arc<View>>,
    /// `None`: opened for reading.
    manifest: Option<Mutex<Manifest>>,
    clock: AtomicU64,
    mapped: AtomicU64,
    /// The next file's number, where more were handed out than the manifest knows of.
    numbers: AtomicU64,
    /// The log has grown long: flushing comes before everything else.
    pub(super) behind: AtomicBool,
    /// Blocks that single messages are read from again and again.
    pub(super) cache: BlockCache,
    pub(super) touched: Touched,
    pub(super) memory: StoreMemory,
    /// What the newest view takes.
    extents: Mutex<Charge>,
    /// Counters of maintenance and damage.
    pub stats: StoreStats,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half changed by a panic: each is replaced as a whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Opens the store in a shard's folder for writing, makes an empty one where there is none, and removes
    /// what an interrupted flush or merge left. Call it before the shard's log is opened. Cost: reads the
    /// manifest and each file's partition table.
    pub fn open(dir: &Path, id: LogId) -> Result<Arc<Store>, StoreError> {
        Store::open_within(dir, id, StoreMemory::default())
    }

    /// As [`Store::open`], with what it may take of memory.
    pub fn open_within(
        dir: &Path,
        id: LogId,
        memory: StoreMemory,
    ) -> Result<Arc<Store>, StoreError> {
        let fresh = State {
            next_number: 1,
            ..State::default()
        };
        fs::create_dir_all(dir).map_err(StoreError::io("cannot make the folder", dir))?;
        check_manifest(dir)?;
        let manifest = Manifest::open(dir, id, fresh)?;
        let state = manifest.state().clone();
        let found = check_files(dir, &state)?;
        let known: HashSet<u64> = state.files.iter().map(|f| f.number).collect();
        for number in found.into_iter().filter(|number| !known.contains(number)) {
            let path = sst_path(dir, number);
            step()
                .and_then(|()| fs::remove_file(&path))
                .map_err(StoreError::io("cannot remove", &path))?;
        }
        Ok(Arc::new(Self::build(
            dir,
            id,
            &state,
            Some(manifest),
            memory,
        )))
    }

    /// Opens the store of a stopped server for reading; changes nothing.
    pub fn open_read_only(dir: &Path, id: LogId) -> Result<Arc<Store>, StoreError> {
        check_manifest(dir)?;
        let state = manifest::load(dir, id)?.map_or_else(State::default, |loaded| loaded.state);
        check_files(dir, &state)?;
        let memory = StoreMemory::default();
        Ok(Arc::new(Self::build(dir, id, &state, None, memory)))
    }

    fn build(
        dir: &Path,
        id: LogId,
        state: &State,
        manifest: Option<Manifest>,
        memory: StoreMemory,
    ) -> Store {
        let store = Store {
            dir: dir.to_owned(),
            id,
            view: Mutex::default(),
            manifest: manifest.map(Mutex::new),
            clock: AtomicU64::new(1),
            mapped: AtomicU64::new(0),
            numbers: AtomicU64::new(0),
            behind: AtomicBool::new(false),
            cache: BlockCache::new(memory.cache.bytes()),
            touched: Touched::default(),
            extents: Mutex::new(memory.extents.charge()),
            memory,
            stats: StoreStats::default(),
        };
        store.show(state);
        store
    }

    /// Whether what is known of partitions in SSTs is close to its share of memory.
    pub(super) fn is_crowded(&self) -> bool {
        let account = self.memory.extents.account();
        account.used() > account.limit() / 8 * 7
    }

    /// The cache of blocks.
    pub fn cache(&self) -> &BlockCache {
        &self.cache
    }

    /// The shard's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whose store.
    pub fn id(&self) -> LogId {
        self.id
    }

    /// What there is now.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&lock(&self.view))
    }

    /// What is durable in the manifest, and the view of it, which keeps its files for as long as it lives.
    pub fn state(&self) -> Result<(State, Arc<View>), StoreError> {
        let Some(manifest) = &self.manifest else {
            return Err(StoreError::ReadOnly {
                dir: self.dir.clone(),
            });
        };
        let manifest = lock(manifest);
        Ok((manifest.state().clone(), self.view()))
    }

    /// Makes an edit durable and shows it.
    pub fn commit(&self, edit: &Edit) -> Result<(), StoreError> {
        let Some(manifest) = &self.manifest else {
            return Err(StoreError::ReadOnly {
                dir: self.dir.clone(),
            });
        };
        let mut manifest = lock(manifest);
        manifest.commit(edit)?;
        self.show(manifest.state());
        Ok(())
    }

    /// Notes in the manifest which files were found to be damaged since the last call; true: there were some.
    pub fn note_damage(&self) -> Result<bool, StoreError> {
        let Some(manifest) = &self.manifest else {
            return Ok(false);
        };
        let view = self.view();
        let damaged = view.files.iter().filter(|file| file.is_quarantined());
        let known = lock(manifest).state().quarantined.clone();
        let new: Vec<u64> = damaged
            .map(|file| file.meta.number)
            .filter(|number| !known.contains(number))
            .collect();
        for &number in &new {
            self.commit(&Edit::Quarantine(number))?;
        }
        Ok(!new.is_empty())
    }

    /// Puts `add` in the place of the files `remove`; false, and nothing happens, where one of these is gone by now or
    /// was found to be damaged.
    pub(super) fn replace(&self, remove: &[u64], add: Vec<FileMeta>) -> Result<bool, StoreError> {
        let Some(manifest) = &self.manifest else {
            return Err(StoreError::ReadOnly {
                dir: self.dir.clone(),
            });
        };
        let mut manifest = lock(manifest);
        let view = self.view();
        let there = |number: &u64| {
            let file = view.files.iter().find(|file| file.meta.number == *number);
            file.is_some_and(|file| !file.is_quarantined())
        };
        if !remove.iter().all(there) {
            return Ok(false);
        }
        let remove = remove.to_vec();
        manifest.commit(&Edit::Replace { remove, add })?;
        self.show(manifest.state());
        Ok(true)
    }

    /// A number for a new file, and where it is to be made. The number counts once an edit names it.
    pub fn next_file(&self) -> (u64, PathBuf) {
        let next = match &self.manifest {
            Some(manifest) => lock(manifest).state().next_number,
            None => 1,
        };
        self.numbers.fetch_max(next, Ordering::Relaxed);
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        (number, sst_path(&self.dir, number))
    }

    /// Shows `state`. Cost: one map entry for each partition of what has changed, and a pass over all.
    fn show(&self, state: &State) {
        let old = self.view();
        let mut view = View {
            flushed_lsn: state.flushed_lsn,
            starts: Arc::new(state.starts.clone()),
            ..View::default()
        };
        let before: HashMap<u64, &Arc<StoreFile>> =
            old.files.iter().map(|f| (f.meta.number, f)).collect();
        let after: HashSet<u64> = state.files.iter().map(|f| f.number).collect();
        let gone: HashSet<u64> = before
            .keys()
            .copied()
            .filter(|number| !after.contains(number))
            .collect();
        view.partitions = old.partitions.clone();
        if !gone.is_empty() {
            view.partitions.retain(|_, extents| {
                extents.retain(|e| !gone.contains(&e.file.meta.number));
                !extents.is_empty()
            });
        }
        for meta in &state.files {
            if let Some(&file) = before.get(&meta.number) {
                view.files.push(Arc::clone(file));
                continue;
            }
            let file = StoreFile::new(&self.dir, self.id, *meta);
            let known = state.quarantined.contains(&meta.number);
            file.quarantined.store(known, Ordering::Release);
            let file = Arc::new(file);
            match self.reader(&file) {
                Ok(reader) => match reader.extents() {
                    Ok(extents) => view.insert(&file, extents.into_iter()),
                    Err(error) => self.damaged(&file, &error),
                },
                Err(error) => self.damaged(&file, &error),
            }
            view.files.push(file);
        }
        for number in &gone {
            before[number].obsolete.store(true, Ordering::Release);
        }
        let bytes = view.bytes();
        let mut extents = lock(&self.extents);
        // The one before lives until its readers are through.
        let before = extents.bytes();
        extents.set(before + bytes);
        *lock(&self.view) = Arc::new(view);
        drop(old);
        extents.set(bytes);
    }

    /// The mapped file of `file`; unmaps the one not used for longest beyond [`MAPPED_FILES`].
    pub fn reader(&self, file: &StoreFile) -> Result<Arc<SstReader>, SstError> {
        let tick = self.clock.fetch_add(1, Ordering::Relaxed);
        file.used.store(tick, Ordering::Relaxed);
        let (reader, opened) = file.open()?;
        if opened && self.mapped.fetch_add(1, Ordering::Relaxed) as usize >= MAPPED_FILES {
            let view = self.view();
            let oldest = view
                .files
                .iter()
                .filter(|f| f.meta.number != file.meta.number && lock(&f.reader).is_some())
                .min_by_key(|f| f.used.load(Ordering::Relaxed));
            if let Some(oldest) = oldest
                && lock(&oldest.reader).take().is_some()
            {
                self.mapped.fetch_sub(1, Ordering::Relaxed);
            }
        }
        Ok(reader)
    }

    /// Says of a damaged file what is wrong, and keeps it from being merged away.
    pub(super) fn damaged(&self, file: &StoreFile, error: &SstError) {
        self.stats.damaged_blocks.fetch_add(1, Ordering::Relaxed);
        if !file.quarantined.swap(true, Ordering::AcqRel) {
            tracing::error!(
                "{error}; the file is not merged any more, and the rest of it is served: restore it from a backup"
            );
        }
    }

    /// The partition's first offset in the store and the one behind its last; `None`: it has nothing here.
    pub fn bounds(&self, key: PartitionKey) -> Option<(i64, i64)> {
        self.view().bounds(key)
    }

    /// Hands out record batches, from the one that holds `outcome.next_offset` on, in pieces of one or more whole ones that
    /// are not copied: at most `max_bytes` bytes, but at least one batch unless there was something before (`outcome`). Ends
    /// where the store has nothing more of the partition. Where more than a little is asked for, the disk is read ahead of
    /// the walk ([`Scan`]).
    pub fn read_with(
        &self,
        key: PartitionKey,
        max_bytes: usize,
        outcome: &mut Outcome,
        mut take: impl FnMut(&[u8]),
    ) -> Result<(), StoreError> {
        self.walk(key, max_bytes, outcome, Check::Always, |_, _, _, bytes| {
            take(bytes)
        })
    }

    /// As [`Store::read_with`], for sending. A block's CRC is compared once since its file was mapped.
    pub fn read_pieces(
        &self,
        key: PartitionKey,
        max_bytes: usize,
        outcome: &mut Outcome,
        out: &mut Pieces,
    ) -> Result<(), StoreError> {
        self.walk(
            key,
            max_bytes,
            outcome,
            Check::Once,
            |file, reader, start, bytes| out.push_sst(file, reader, start, bytes.len()),
        )
    }

    /// Walks over whole batches; `take` gets the file, where in it some lie, and these.
    fn walk(
        &self,
        key: PartitionKey,
        max_bytes: usize,
        outcome: &mut Outcome,
        check: Check,
        mut take: impl FnMut(&Arc<StoreFile>, &Arc<SstReader>, usize, &[u8]),
    ) -> Result<(), StoreError> {
        let view = self.view();
        let extents = view.extents(key);
        let first = extents.partition_point(|e| e.end <= outcome.next_offset);
        for extent in &extents[first..] {
            let result = (|| {
                let reader = self.reader(&extent.file)?;
                let (mut scan, mut asked) = (None, 0);
                let mut blocks = reader.blocks(key, outcome.next_offset)?;
                loop {
                    let number = blocks.number();
                    let Some(block) = blocks.next() else { break };
                    let block = block?;
                    if outcome.batches > 0 && outcome.bytes >= max_bytes {
                        return Ok(true);
                    }
                    let wanted = (max_bytes - outcome.bytes.min(max_bytes)) as u64;
                    let bytes = match check {
                        Check::Always => {
                            let scan: &mut Scan<'_> = scan.get_or_insert_with(|| {
                                // What is left of the partition in this file, as nearly as the table says.
                                let end = wanted.min(extent.bytes).saturating_add(block.position);
                                reader.scan(block.position, end)
                            });
                            scan.block(&block)?
                        }
                        Check::Once => {
                            if block.position + AHEAD / 2 > asked {
                                asked = reader.will_need(&block, asked, wanted.min(AHEAD));
                            }
                            reader.block_once(number, &block)?
                        }
                    };
                    let (skip, len, batches, next) = cut(
                        bytes,
                        outcome.next_offset,
                        max_bytes - outcome.bytes.min(max_bytes),
                        outcome.batches == 0,
                    );
                    if batches > 0 {
                        let start = block.position as usize + skip;
                        take(&extent.file, &reader, start, &bytes[skip..skip + len]);
                        outcome.bytes += len;
                        outcome.batches += batches;
                        outcome.next_offset = next;
                    }
                    if skip + len < bytes.len() {
                        return Ok(true);
                    }
                    // The offsets that compaction left out behind the last record.
                    outcome.next_offset = outcome.next_offset.max(block.end_offset);
                }
                outcome.next_offset = outcome.next_offset.max(extent.end);
                Ok(false)
            })();
            match result {
                Ok(false) => {}
                Ok(true) => return Ok(()),
                // What was read before the damage is served.
                Err(error) => {
                    self.damaged(&extent.file, &error);
                    if outcome.batches > 0 {
                        return Ok(());
                    }
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// The first offset, at or behind the partition's start, whose record arrived at `unix_ms` or later.
    pub fn offset_for_time(
        &self,
        key: PartitionKey,
        unix_ms: i64,
    ) -> Result<Option<i64>, StoreError> {
        let view = self.view();
        let start = view.start(key);
        for extent in view.extents(key) {
            if extent.max_time < unix_ms || extent.end <= start {
                continue;
            }
            let found = (|| {
                let reader = self.reader(&extent.file)?;
                let Some(block) = reader.locate_time(key, unix_ms)? else {
                    return Ok(None);
                };
                Ok(Some(in_block(
                    reader.block(&block)?,
                    unix_ms,
                    block.first_offset,
                )))
            })();
            match found {
                Ok(Some(offset)) => return Ok(Some(offset.max(start))),
                // Compaction dropped what arrived then.
                Ok(None) => {}
                Err(error) => {
                    let error: SstError = error;
                    self.damaged(&extent.file, &error);
                    return Err(error.into());
                }
            }
        }
        Ok(None)
    }
}

/// A store that has SSTs has a manifest, unless the log still has all of it.
pub(super) fn check_manifest(dir: &Path) -> Result<(), StoreError> {
    let list = |what: std::io::Result<Vec<u64>>| what.map_err(StoreError::io("cannot list", dir));
    if list(manifest::list(dir))?.is_empty()
        && !list(list_files(dir))?.is_empty()
        && list(list_segments(dir))?.first() != Some(&0)
    {
        return Err(StoreError::NoManifest {
            dir: dir.to_owned(),
        });
    }
    Ok(())
}

/// The files of a manifest are there, and the log goes on where they end. Returns the SSTs in the folder.
pub(super) fn check_files(dir: &Path, state: &State) -> Result<Vec<u64>, StoreError> {
    let found = list_files(dir).map_err(StoreError::io("cannot list", dir))?;
    for file in &state.files {
        if found.binary_search(&file.number).is_err() {
            return Err(StoreError::Missing {
                path: sst_path(dir, file.number),
            });
        }
    }
    // A lost edit shows as a missing file or as a gap: then what the manifest does not name may be needed.
    let bases = list_segments(dir).map_err(StoreError::io("cannot list", dir))?;
    match bases.first() {
        Some(&begins) if begins > state.flushed_lsn => Err(StoreError::Gap {
            dir: dir.to_owned(),
            flushed: state.flushed_lsn,
            begins,
        }),
        _ => Ok(found),
    }
}

/// The batches of a block from the one that holds `from` on, at most `room` bytes of them (`at_least_one`:
/// but one): bytes to skip, bytes to take, batches in them, and the offset behind the last.
fn cut(block: &[u8], from: i64, room: usize, at_least_one: bool) -> (usize, usize, u32, i64) {
    let (mut at, mut skip, mut batches, mut next) = (0, 0, 0, from);
    while let Ok(header) = record_batch::parse_header(&block[at..]) {
        let len = header.total_len();
        if header.next_offset() <= from {
            at += len;
            skip = at;
            continue;
        }
        if at + len - skip > room && !(at_least_one && batches == 0) {
            break;
        }
        at += len;
        batches += 1;
        next = header.next_offset();
    }
    (skip, at - skip, batches, next)
}

/// The first record at `unix_ms` or later by its own time, where it can be read; else the first of the
/// block.
fn in_block(block: &[u8], unix_ms: i64, first: i64) -> i64 {
    let mut scratch = Vec::new();
    let mut at = 0;
    while let Ok(header) = record_batch::parse_header(&block[at..]) {
        let batch = &block[at..at + header.total_len()];
        at += batch.len();
        if header.max_timestamp < unix_ms {
            continue;
        }
        return codec::plain(batch, &mut scratch)
            .ok()
            .and_then(|batch| Records::new(batch).ok())
            .and_then(|records| {
                records
                    .map_while(Result::ok)
                    .find(|record| record.timestamp >= unix_ms)
            })
            .map_or(header.base_offset, |record| record.offset);
    }
    first
}
