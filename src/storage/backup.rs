//! Consistent copies of a store, also of one that a server runs on, and stores made of such copies.
//!
//! A backup is a folder that holds a store: SSTs by hard links where the file system allows (they never change), a
//! manifest of one snapshot, the log up to where it was durable, the catalog, and, last of all, `backup.json`.
//!
//! Invariants: what was durable when the backup began is in it. The manifest's state is taken first, and its files
//! are held until they have their links; the log is copied up to a place that was durable before the copy began, so
//! that no byte of it is being written; segments are not given to the log again meanwhile. The catalog is
//! copied last: it knows every topic of which the log has messages. Each shard is taken by itself, one after
//! the other within milliseconds but for the copying of its log.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::catalog::{Catalog, CatalogError, replace_file};
use super::lsm::manifest::{self, Manifest, State};
use super::lsm::store::sst_path;
use super::lsm::{Store, StoreError};
use super::repair::list_shards;
use super::wal::WalShared;
use super::wal::frame::LogId;
use super::wal::segment::{SegmentHeader, list_segments, segment_path, shard_dir, sync_dir};
use super::wal::staging::unix_ms;

/// Name of the note that makes a folder a backup.
pub const NOTE: &str = "backup.json";
const NOTE_VERSION: u32 = 1;

/// Why there is no backup, or no store made of it.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file system refused.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// No usable catalog, or another process has the store.
    #[error("{0}")]
    Catalog(#[from] CatalogError),
    /// A manifest or an SST is not as it should be.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// There is something already.
    #[error("{path} is not empty: name a folder that is, or that does not exist")]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// It would be a part of itself.
    #[error("{path} lies in the store's own folder: name another one")]
    Inside {
        /// The folder.
        path: PathBuf,
    },
    /// Messages may lie in the staging file alone.
    #[error(
        "{path} is there: the server was not stopped cleanly, and some of its messages may be in memory only; start it and make the backup while it runs, or stop it in order"
    )]
    Staged {
        /// The note of where the staging file lies.
        path: PathBuf,
    },
    /// There is no note.
    #[error("{path} is no complete backup: {reason}")]
    NoBackup {
        /// The folder.
        path: PathBuf,
        /// What is missing or wrong.
        reason: String,
    },
}

fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> BackupError + 'a {
    move |source| BackupError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// What a backup or a restored store consists of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Version of the note.
    pub version: u32,
    /// The store's id, 32 hexadecimal digits.
    pub store: String,
    /// When the backup began, Unix milliseconds.
    pub taken_ms: i64,
    /// SSTs, and of those the ones that share their bytes with the store by hard links.
    pub ssts: u64,
    /// See `ssts`.
    pub linked: u64,
    /// Bytes of SSTs.
    pub sst_bytes: u64,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// By shard.
    pub shards: Vec<ShardNote>,
}

/// A shard of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardNote {
    /// Its number.
    pub shard: u16,
    /// What the log holds before this is in SSTs.
    pub flushed_lsn: u64,
    /// The log was durable up to here.
    pub durable_lsn: u64,
    /// SSTs.
    pub ssts: u64,
}

/// A shard of a running server.
pub struct Running<'a> {
    /// Its log.
    pub log: &'a WalShared,
    /// What became of it.
    pub store: &'a Store,
}

/// A folder that is being filled; removed again unless it is finished.
struct Target {
    path: PathBuf,
    finished: bool,
}

impl Target {
    fn new(path: &Path, store: &Path) -> Result<Target, BackupError> {
        match fs::read_dir(path) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Err(BackupError::NotEmpty {
                        path: path.to_owned(),
                    });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(path).map_err(io("cannot make the folder", path))?;
            }
            Err(error) => return Err(io("cannot list", path)(error)),
        }
        let target = Target {
            path: path.to_owned(),
            finished: false,
        };
        let real = |p: &Path| p.canonicalize().map_err(io("cannot find", p));
        if real(path)?.starts_with(real(store)?) {
            return Err(BackupError::Inside {
                path: path.to_owned(),
            });
        }
        Ok(target)
    }

    fn finish(mut self, note: &Note) -> Result<(), BackupError> {
        let path = self.path.join(NOTE);
        let mut bytes = serde_json::to_vec_pretty(note).unwrap_or_default();
        bytes.push(b'\n');
        replace_file(&path, &bytes).map_err(io("cannot write", &path))?;
        self.done()
    }

    fn done(&mut self) -> Result<(), BackupError> {
        sync_dir(&self.path).map_err(io("cannot sync the folder", &self.path))?;
        if let Some(parent) = self.path.parent().filter(|p| !p.as_os_str().is_empty()) {
            sync_dir(parent).map_err(io("cannot sync the folder", parent))?;
        }
        self.finished = true;
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.finished {
            // It was empty or not there; half a backup is worth nothing.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Copies the first `len` bytes of a file, pads it with zeros to `size`, and syncs it.
fn copy(from: &Path, to: &Path, len: u64, size: u64) -> Result<(), BackupError> {
    let source = File::open(from).map_err(io("cannot open", from))?;
    let mut target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(to)
        .map_err(io("cannot create", to))?;
    let copied = io::copy(&mut source.take(len), &mut target).map_err(io("cannot copy to", to))?;
    if copied != len {
        let short = io::Error::from(io::ErrorKind::UnexpectedEof);
        return Err(io("cannot copy", from)(short));
    }
    if size > len {
        target.set_len(size).map_err(io("cannot lengthen", to))?;
    }
    target.sync_all().map_err(io("cannot sync", to))
}

/// Gives the SST its name in another folder; a copy where links are not possible. True: a link.
fn link(from: &Path, to: &Path) -> Result<bool, BackupError> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(io("cannot make", to)(error))
        }
        // Another file system, or one without links, or the most links there are.
        Err(_) => {
            let size = fs::metadata(from).map_err(io("cannot read", from))?.len();
            copy(from, to, size, size).map(|()| false)
        }
    }
}

fn ssts(from: &Path, to: &Path, state: &State, note: &mut Note) -> Result<(), BackupError> {
    for file in &state.files {
        let linked = link(&sst_path(from, file.number), &sst_path(to, file.number))?;
        note.ssts += 1;
        note.linked += u64::from(linked);
        note.sst_bytes += file.bytes;
    }
    Ok(())
}

/// Copies the segments that hold the log from `from_lsn` to `to_lsn`.
fn segments(
    from: &Path,
    to: &Path,
    from_lsn: u64,
    to_lsn: u64,
    note: &mut Note,
) -> Result<(), BackupError> {
    for base in list_segments(from).map_err(io("cannot list", from))? {
        let path = segment_path(from, base);
        let size = fs::metadata(&path).map_err(io("cannot read", &path))?.len();
        if base >= to_lsn || base.saturating_add(size) <= from_lsn {
            continue;
        }
        let len = size.min(to_lsn - base);
        copy(&path, &segment_path(to, base), len, size)?;
        note.log_bytes += len;
    }
    Ok(())
}

fn shard_folder(target: &Target, shard: u16) -> Result<PathBuf, BackupError> {
    let to = shard_dir(&target.path, shard);
    fs::create_dir_all(&to).map_err(io("cannot make the folder", &to))?;
    Ok(to)
}

fn catalog(from: &Path, target: &Target) -> Result<Catalog, BackupError> {
    let path = from.join("catalog.json");
    let bytes = fs::read(&path).map_err(io("cannot read", &path))?;
    let read = Catalog::from_bytes(&bytes, &path)?;
    let to = target.path.join("catalog.json");
    replace_file(&to, &bytes).map_err(io("cannot write", &to))?;
    Ok(read)
}

/// Copies the store in `dir`, which a server runs on, to the folder `to`. Cost: reads and writes the log that is not
/// yet flushed, and SSTs where links are not possible; meanwhile flushed segments are not used again.
pub fn running(dir: &Path, shards: &[Running<'_>], to: &Path) -> Result<Note, BackupError> {
    let target = Target::new(to, dir)?;
    let mut note = Note {
        version: NOTE_VERSION,
        taken_ms: unix_ms(),
        ..Note::default()
    };
    for running in shards {
        let id = running.log.id();
        let folder = shard_folder(&target, id.shard)?;
        let _held = running.log.hold_segments();
        // The view holds the files of the state.
        let (state, _view) = running.store.state()?;
        let checkpoint = running.log.checkpoint();
        let durable = running.log.durable_lsn();
        ssts(running.store.dir(), &folder, &state, &mut note)?;
        let begins = state.flushed_lsn.min(checkpoint);
        segments(running.log.dir(), &folder, begins, durable, &mut note)?;
        note.shards.push(ShardNote {
            shard: id.shard,
            flushed_lsn: state.flushed_lsn,
            durable_lsn: durable,
            ssts: state.files.len() as u64,
        });
        // Makes the links durable, too: it syncs the folder.
        drop(Manifest::create(&folder, id, 1, state)?);
    }
    note.store = format!("{:032x}", catalog(dir, &target)?.store_id());
    target.finish(&note)?;
    Ok(note)
}

/// Copies the store in `dir`, which no server runs on, to the folder `to`.
pub fn stopped(dir: &Path, to: &Path) -> Result<Note, BackupError> {
    // Only an existing one: opening for writing would make a store.
    Catalog::open_read_only(dir)?;
    let _lock = Catalog::open(dir)?;
    let target = Target::new(to, dir)?;
    let mut note = Note {
        version: NOTE_VERSION,
        taken_ms: unix_ms(),
        ..Note::default()
    };
    let read = catalog(dir, &target)?;
    note.store = format!("{:032x}", read.store_id());
    for shard in list_shards(dir).map_err(io("cannot list", dir))? {
        let from = shard_dir(dir, shard);
        let staged = from.join("staging.json");
        if staged.exists() {
            return Err(BackupError::Staged { path: staged });
        }
        let id = LogId {
            store: read.store_id(),
            shard,
        };
        // Says what is wrong where files are missing.
        drop(Store::open_read_only(&from, id)?);
        let state = manifest::load(&from, id)?.map_or_else(
            || State {
                next_number: 1,
                ..State::default()
            },
            |loaded| loaded.state,
        );
        let folder = shard_folder(&target, shard)?;
        ssts(&from, &folder, &state, &mut note)?;
        let mut end = 0;
        let bases = list_segments(&from).map_err(io("cannot list", &from))?;
        for &base in &bases {
            let path = segment_path(&from, base);
            // Prepared ones have no header; a server makes others.
            if used(&path)? {
                let size = fs::metadata(&path).map_err(io("cannot read", &path))?.len();
                end = base.saturating_add(size);
            }
        }
        segments(
            &from,
            &folder,
            bases.first().copied().unwrap_or(0),
            end,
            &mut note,
        )?;
        note.shards.push(ShardNote {
            shard,
            flushed_lsn: state.flushed_lsn,
            durable_lsn: end,
            ssts: state.files.len() as u64,
        });
        drop(Manifest::create(&folder, id, 1, state)?);
    }
    target.finish(&note)?;
    Ok(note)
}

/// Whether a segment has a header.
fn used(path: &Path) -> Result<bool, BackupError> {
    let mut head = Vec::new();
    File::open(path)
        .and_then(|file| file.take(4096).read_to_end(&mut head))
        .map_err(io("cannot read", path))?;
    Ok(!matches!(
        SegmentHeader::decode(&head),
        Err(super::wal::segment::SegmentError::Blank)
    ))
}

/// The note of the backup in `dir`.
pub fn note(dir: &Path) -> Result<Note, BackupError> {
    let bad = |reason: String| BackupError::NoBackup {
        path: dir.to_owned(),
        reason,
    };
    let bytes = fs::read(dir.join(NOTE)).map_err(|e| bad(format!("{NOTE}: {e}")))?;
    let note: Note = serde_json::from_slice(&bytes).map_err(|e| bad(format!("{NOTE}: {e}")))?;
    if note.version != NOTE_VERSION {
        return Err(bad(format!(
            "{NOTE} has version {}, this program knows {NOTE_VERSION}",
            note.version
        )));
    }
    Ok(note)
}

/// Makes a store in `to` of the backup in `from`, which stays as it is: SSTs by hard links where possible, all else
/// copied. The store has the id of the one that was backed up.
pub fn restore(from: &Path, to: &Path) -> Result<Note, BackupError> {
    let taken = note(from)?;
    let mut target = Target::new(to, from)?;
    let mut made = Note {
        ssts: 0,
        linked: 0,
        sst_bytes: 0,
        log_bytes: 0,
        ..taken.clone()
    };
    let read = catalog(from, &target)?;
    for shard in &taken.shards {
        let dir = shard_dir(from, shard.shard);
        let id = LogId {
            store: read.store_id(),
            shard: shard.shard,
        };
        let Some(loaded) = manifest::load(&dir, id)? else {
            return Err(BackupError::NoBackup {
                path: from.to_owned(),
                reason: format!("shard {} has no manifest", shard.shard),
            });
        };
        let folder = shard_folder(&target, shard.shard)?;
        ssts(&dir, &folder, &loaded.state, &mut made)?;
        segments(&dir, &folder, 0, u64::MAX, &mut made)?;
        drop(Manifest::create(&folder, id, 1, loaded.state)?);
    }
    target.done()?;
    Ok(made)
}
