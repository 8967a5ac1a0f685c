//! Repairs a stopped store: makes the manifest of each shard anew whose own is missing or damaged. See
//! [`super::lsm::repair`].

use std::path::{Path, PathBuf};

use super::catalog::{Catalog, CatalogError};
use super::lsm::StoreError;
use super::lsm::repair::{ShardRepair, plan};
use super::wal::frame::LogId;
use super::wal::segment::shard_dir;

/// Why a store cannot be repaired.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// No usable catalog, or a server runs on the store.
    #[error("{0}")]
    Catalog(#[from] CatalogError),
    /// The files of a shard cannot be read or written.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// The file system refused.
    #[error("cannot list {path}: {source}")]
    Io {
        /// The folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

/// Numbers of the shards that have a folder in the store `dir`, ascending.
pub fn list_shards(dir: &Path) -> std::io::Result<Vec<u16>> {
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix("shard-"));
        shards.extend(number.and_then(|n| n.parse::<u16>().ok()));
    }
    shards.sort_unstable();
    Ok(shards)
}

/// Looks at every shard of the store in `dir` and, unless it is a `dry_run`, makes new manifests where they are
/// needed. Takes the store's lock. `progress` gets the file being read and bytes read of it.
pub fn repair(
    dir: &Path,
    dry_run: bool,
    mut progress: impl FnMut(&Path, u64),
) -> Result<Vec<ShardRepair>, RepairError> {
    // Only an existing one: opening for writing would make a store.
    Catalog::open_read_only(dir)?;
    let catalog = Catalog::open(dir)?;
    let shards = list_shards(dir).map_err(|source| RepairError::Io {
        path: dir.to_owned(),
        source,
    })?;
    let mut repairs = Vec::new();
    for shard in shards {
        let id = LogId {
            store: catalog.store_id(),
            shard,
        };
        let repair = plan(&shard_dir(dir, shard), id, &mut progress)?;
        if !dry_run {
            repair.apply()?;
        }
        repairs.push(repair);
    }
    Ok(repairs)
}
