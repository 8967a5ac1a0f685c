//! Ids for idempotent producers: never given twice, also not after a crash.
//!
//! Invariant: every id below the number in the file may have been given, none at or above it was. The file
//! is replaced, and synced, before the first id of a block is given out; a restart skips what was left of the
//! block.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::storage::catalog::replace_file;

/// Ids reserved by one write of the file, as in Kafka.
const BLOCK: i64 = 1000;
/// Name of the file in the store's folder.
pub const FILE_NAME: &str = "producer-ids.json";
/// Version of the file.
const VERSION: u32 = 1;

/// Why no id was given.
#[derive(Debug, thiserror::Error)]
pub enum ProducerIdError {
    /// The file system refused.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The file is not understood.
    #[error(
        "{path}: {reason}; write {{\"version\": 1, \"next\": N}} with an N above every producer id in use"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// All of them were given.
    #[error("there are no producer ids left")]
    Exhausted,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    next: i64,
}

/// The ids of a store; for any thread.
#[derive(Debug)]
pub struct ProducerIds {
    path: PathBuf,
    block: Mutex<Block>,
}

#[derive(Debug)]
struct Block {
    next: i64,
    end: i64,
}

impl ProducerIds {
    /// Of the store in `dir`. Writes nothing yet.
    pub fn open(dir: &Path) -> Result<Self, ProducerIdError> {
        let path = dir.join(FILE_NAME);
        let damaged = |reason: String| ProducerIdError::Damaged {
            path: path.clone(),
            reason,
        };
        let next = match fs::read(&path) {
            Ok(bytes) => {
                let file: File =
                    serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
                if file.version != VERSION || file.next < 0 {
                    return Err(damaged(format!(
                        "version {} with next {} is not known",
                        file.version, file.next
                    )));
                }
                file.next
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(source) => {
                return Err(ProducerIdError::Io {
                    what: "cannot read",
                    path,
                    source,
                });
            }
        };
        Ok(Self {
            path,
            block: Mutex::new(Block { next, end: next }),
        })
    }

    /// A new id. Once in a thousand calls it waits for the disk.
    pub fn allocate(&self) -> Result<i64, ProducerIdError> {
        let mut block = self.block.lock().unwrap_or_else(PoisonError::into_inner);
        if block.next == block.end {
            let end = block
                .next
                .checked_add(BLOCK)
                .ok_or(ProducerIdError::Exhausted)?;
            let file = File {
                version: VERSION,
                next: end,
            };
            let mut bytes = serde_json::to_vec(&file).expect("plain data serializes");
            bytes.push(b'\n');
            replace_file(&self.path, &bytes).map_err(|source| ProducerIdError::Io {
                what: "cannot write",
                path: self.path.clone(),
                source,
            })?;
            block.end = end;
        }
        block.next += 1;
        Ok(block.next - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_id_is_given_twice_over_restarts_and_threads() {
        let dir = tempfile::tempdir().unwrap();
        let mut seen = HashSet::new();
        for _ in 0..3 {
            let ids = ProducerIds::open(dir.path()).unwrap();
            let given: Vec<i64> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            (0..700)
                                .map(|_| ids.allocate().unwrap())
                                .collect::<Vec<_>>()
                        })
                    })
                    .collect();
                threads
                    .into_iter()
                    .flat_map(|t| t.join().unwrap())
                    .collect()
            });
            assert_eq!(given.len(), 2800);
            for id in given {
                assert!(id >= 0 && seen.insert(id), "{id} was given twice");
            }
        }
    }

    #[test]
    fn a_damaged_file_is_not_taken_for_none() {
        let dir = tempfile::tempdir().unwrap();
        for text in [
            "",
            "{",
            "{\"version\":2,\"next\":5}",
            "{\"version\":1,\"next\":-5}",
        ] {
            fs::write(dir.path().join(FILE_NAME), text).unwrap();
            assert!(matches!(
                ProducerIds::open(dir.path()),
                Err(ProducerIdError::Damaged { .. })
            ));
        }
        let path = dir.path().join(FILE_NAME);
        fs::write(&path, "{\"version\":1,\"next\":9223372036854775800}").unwrap();
        let ids = ProducerIds::open(dir.path()).unwrap();
        assert!(matches!(ids.allocate(), Err(ProducerIdError::Exhausted)));
        fs::remove_file(&path).unwrap();
        let ids = ProducerIds::open(dir.path()).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(ids.allocate(), Err(ProducerIdError::Io { .. })));
        fs::remove_dir(&path).unwrap();
        assert_eq!(
            ids.allocate().unwrap(),
            0,
            "a failed write gave nothing away"
        );
    }
}
