//! The catalog: the store's id, its topics, and the shard of each partition.
//!
//! Invariant: ids are never reused and a partition never changes its shard, so that entries in the log
//! keep their meaning. `catalog.json` is replaced as a whole (write, fsync, rename, fsync the folder):
//! after a power cut it is the old one or the new one. One process writes a store at a time, held by a
//! lock on the file `lock`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::PartitionKey;
use super::wal::segment::sync_dir;

/// Version of catalog.json.
pub const CATALOG_VERSION: u32 = 1;
/// Kafka's limit for a topic's name.
pub const MAX_TOPIC_NAME: usize = 249;
/// More partitions of one topic are taken for a slip of the finger.
pub const MAX_PARTITIONS: u32 = 100_000;

/// Why a catalog cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
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
    /// Another process has the store.
    #[error(
        "the store {path} is in use by another process: stop it, or read through its control socket"
    )]
    Locked {
        /// The store's folder.
        path: PathBuf,
    },
    /// There is no store.
    #[error("{path} is no Taffrail store (it has no catalog.json)")]
    Missing {
        /// The store's folder.
        path: PathBuf,
    },
    /// The file is not understood.
    #[error(
        "{path}: {reason}; restore it from a backup, or make it by hand as docs/formats.md says"
    )]
    Damaged {
        /// catalog.json
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A topic as asked for cannot be.
    #[error("topic {name:?}: {reason}")]
    Topic {
        /// The topic's name.
        name: String,
        /// Why not, and what is allowed.
        reason: String,
    },
}

/// A topic that the configuration asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicSpec {
    /// 1 to 249 of `a-z A-Z 0-9 . _ -`.
    pub name: String,
    /// Number of partitions; may grow, never shrink.
    pub partitions: u32,
}

/// A topic of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topic {
    /// Never reused.
    pub id: u32,
    /// Unique name.
    pub name: String,
    /// The shard of each partition.
    pub shards: Vec<u16>,
}

impl Topic {
    /// Number of partitions.
    pub fn partitions(&self) -> u32 {
        self.shards.len() as u32
    }

    /// The key of a partition; `None` where the topic has no such partition.
    pub fn key(&self, partition: u32) -> Option<PartitionKey> {
        (partition < self.partitions()).then_some(PartitionKey {
            topic: self.id,
            partition,
        })
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    store: String,
    next_topic: u32,
    topics: Vec<Topic>,
}

/// An open catalog. A writable one holds the store's lock until it is dropped.
#[derive(Debug)]
pub struct Catalog {
    dir: PathBuf,
    contents: Contents,
    store: u128,
    lock: Option<File>,
}

/// Takes the lock on `path`, making the file; `None`: another process has it.
pub(crate) fn lock_file(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    // SAFETY: the descriptor is open; flock touches no memory.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(Some(file));
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock {
        return Ok(None);
    }
    Err(error)
}

/// Replaces `path` as a whole: after a power cut it holds the old bytes or the new ones.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_TOPIC_NAME || name == "." || name == ".." {
        return Err(format!(
            "a name has 1 to {MAX_TOPIC_NAME} characters and is not \".\" or \"..\""
        ));
    }
    match name
        .chars()
        .find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')))
    {
        Some(c) => Err(format!(
            "{c:?} is not allowed in a name; allowed are a-z A-Z 0-9 . _ -"
        )),
        None => Ok(()),
    }
}

impl Catalog {
    /// Opens the store in `dir` for writing and makes it where there is none. Takes the lock.
    pub fn open(dir: &Path) -> Result<Catalog, CatalogError> {
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| CatalogError::Io { what, path, source }
        };
        fs::create_dir_all(dir).map_err(io("cannot make the folder", dir))?;
        let lock_path = dir.join("lock");
        let lock = lock_file(&lock_path)
            .map_err(io("cannot lock", &lock_path))?
            .ok_or_else(|| CatalogError::Locked {
                path: dir.to_owned(),
            })?;
        match Self::load(dir) {
            Ok(mut catalog) => {
                catalog.lock = Some(lock);
                Ok(catalog)
            }
            Err(CatalogError::Missing { .. }) => {
                // Logs without a catalog: their topics are unknown, a new store id would disown them.
                if dir.join("shard-000").exists() {
                    return Err(CatalogError::Damaged {
                        path: dir.join("catalog.json"),
                        reason: "the file is missing although the store has logs".to_owned(),
                    });
                }
                let store: u128 = rand::rng().random();
                let catalog = Catalog {
                    dir: dir.to_owned(),
                    contents: Contents {
                        version: CATALOG_VERSION,
                        store: format!("{store:032x}"),
                        next_topic: 1,
                        topics: Vec::new(),
                    },
                    store,
                    lock: Some(lock),
                };
                catalog.save(&catalog.contents)?;
                Ok(catalog)
            }
            Err(error) => Err(error),
        }
    }

    /// Opens a store for reading, whether a server runs on it or not. Writes nothing.
    pub fn open_read_only(dir: &Path) -> Result<Catalog, CatalogError> {
        Self::load(dir)
    }

    fn load(dir: &Path) -> Result<Catalog, CatalogError> {
        let path = dir.join("catalog.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(CatalogError::Missing {
                    path: dir.to_owned(),
                });
            }
            Err(source) => {
                return Err(CatalogError::Io {
                    what: "cannot read",
                    path,
                    source,
                });
            }
        };
        let damaged = |reason: String| CatalogError::Damaged {
            path: path.clone(),
            reason,
        };
        let contents: Contents =
            serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if contents.version != CATALOG_VERSION {
            return Err(damaged(format!(
                "version {} is not known (this program knows {CATALOG_VERSION})",
                contents.version
            )));
        }
        // from_str_radix takes a sign, too.
        let digits = contents.store.bytes().all(|b| b.is_ascii_hexdigit());
        let store = u128::from_str_radix(&contents.store, 16)
            .ok()
            .filter(|_| digits && contents.store.len() == 32)
            .ok_or_else(|| damaged("the store id is not 32 hexadecimal digits".to_owned()))?;
        for (i, topic) in contents.topics.iter().enumerate() {
            if let Err(reason) = check_name(&topic.name) {
                return Err(damaged(format!("topic {:?}: {reason}", topic.name)));
            }
            // Shards are counted in u16, so none has the number u16::MAX.
            if topic.shards.is_empty()
                || topic.shards.len() > MAX_PARTITIONS as usize
                || topic.shards.contains(&u16::MAX)
            {
                return Err(damaged(format!(
                    "topic {:?}: it has 1 to {MAX_PARTITIONS} partitions, in shards 0 to {}",
                    topic.name,
                    u16::MAX - 1
                )));
            }
            if topic.id >= contents.next_topic
                || contents.topics[..i]
                    .iter()
                    .any(|t| t.id == topic.id || t.name == topic.name)
            {
                return Err(damaged(format!(
                    "topic {:?}: its id or name is taken twice",
                    topic.name
                )));
            }
        }
        Ok(Catalog {
            dir: dir.to_owned(),
            contents,
            store,
            lock: None,
        })
    }

    fn save(&self, contents: &Contents) -> Result<(), CatalogError> {
        let path = self.dir.join("catalog.json");
        let mut bytes = serde_json::to_vec_pretty(contents).expect("plain data serializes");
        bytes.push(b'\n');
        replace_file(&path, &bytes).map_err(|source| CatalogError::Io {
            what: "cannot write",
            path,
            source,
        })
    }

    /// Makes sure that the topics exist with at least these partitions, spread over `shards` shards.
    /// All or nothing, durable on return. Refuses to shrink a topic, and a number of shards that
    /// leaves an existing partition without its shard.
    pub fn ensure(&mut self, topics: &[TopicSpec], shards: u16) -> Result<(), CatalogError> {
        let refuse = |name: &str, reason: String| {
            Err(CatalogError::Topic {
                name: name.to_owned(),
                reason,
            })
        };
        let shards = shards.max(1);
        let mut next = self.contents.clone();
        for topic in &next.topics {
            if let Some(shard) = topic.shards.iter().find(|&&s| s >= shards) {
                return refuse(
                    &topic.name,
                    format!(
                        "it has partitions in shard {shard}, but only {shards} shards are configured: set [storage] shards to at least {}",
                        shard + 1
                    ),
                );
            }
        }
        // Partitions go to the shard that has the fewest, the lowest number first.
        let mut load = vec![0usize; usize::from(shards)];
        for shard in next.topics.iter().flat_map(|t| &t.shards) {
            load[usize::from(*shard)] += 1;
        }
        for spec in topics {
            if let Err(reason) = check_name(&spec.name) {
                return refuse(&spec.name, reason);
            }
            if spec.partitions == 0 || spec.partitions > MAX_PARTITIONS {
                return refuse(
                    &spec.name,
                    format!("1 to {MAX_PARTITIONS} partitions are allowed"),
                );
            }
            let at = match next.topics.iter().position(|t| t.name == spec.name) {
                Some(at) => at,
                None => {
                    let id = next.next_topic;
                    let Some(following) = id.checked_add(1) else {
                        return refuse(
                            &spec.name,
                            "the store has given out all topic ids".to_owned(),
                        );
                    };
                    next.topics.push(Topic {
                        id,
                        name: spec.name.clone(),
                        shards: Vec::new(),
                    });
                    next.next_topic = following;
                    next.topics.len() - 1
                }
            };
            let have = next.topics[at].partitions();
            if spec.partitions < have {
                return refuse(
                    &spec.name,
                    format!(
                        "it has {have} partitions; a topic may grow but not shrink (asked for {})",
                        spec.partitions
                    ),
                );
            }
            for _ in have..spec.partitions {
                let shard = (0..shards)
                    .min_by_key(|&s| load[usize::from(s)])
                    .unwrap_or(0);
                load[usize::from(shard)] += 1;
                next.topics[at].shards.push(shard);
            }
        }
        if next.topics != self.contents.topics {
            self.save(&next)?;
            self.contents = next;
        }
        Ok(())
    }

    /// The topic with this name.
    pub fn topic(&self, name: &str) -> Option<&Topic> {
        self.contents.topics.iter().find(|t| t.name == name)
    }

    /// The topic with this id.
    pub fn topic_by_id(&self, id: u32) -> Option<&Topic> {
        self.contents.topics.iter().find(|t| t.id == id)
    }

    /// All topics, oldest first.
    pub fn topics(&self) -> &[Topic] {
        &self.contents.topics
    }

    /// The store's random id.
    pub fn store_id(&self) -> u128 {
        self.store
    }

    /// The store's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// True when this process holds the store's lock.
    pub fn is_writable(&self) -> bool {
        self.lock.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, partitions: u32) -> TopicSpec {
        TopicSpec {
            name: name.to_owned(),
            partitions,
        }
    }

    #[test]
    fn ids_and_shards_stay() {
        let dir = tempfile::tempdir().unwrap();
        let mut catalog = Catalog::open(dir.path()).unwrap();
        catalog.ensure(&[spec("a", 3), spec("b", 1)], 2).unwrap();
        let (store, before) = (catalog.store_id(), catalog.topics().to_vec());
        assert_eq!(before[0].shards, [0, 1, 0]);
        assert_eq!(before[1].shards, [1]);
        drop(catalog);
        let mut catalog = Catalog::open(dir.path()).unwrap();
        assert_eq!(catalog.store_id(), store);
        catalog.ensure(&[spec("c", 1), spec("a", 5)], 2).unwrap();
        let a = catalog.topic("a").unwrap();
        assert_eq!(
            (a.id, &a.shards[..3]),
            (before[0].id, &before[0].shards[..])
        );
        assert_eq!(a.partitions(), 5);
        assert_eq!(catalog.topic("c").unwrap().id, 3);
        assert_eq!(
            Catalog::open_read_only(dir.path()).unwrap().topics(),
            catalog.topics()
        );
    }

    #[test]
    fn refuses_what_would_lose_data() {
        let dir = tempfile::tempdir().unwrap();
        let mut catalog = Catalog::open(dir.path()).unwrap();
        catalog.ensure(&[spec("a", 3)], 2).unwrap();
        let before = catalog.topics().to_vec();
        for (specs, shards) in [
            (vec![spec("new", 1), spec("a", 2)], 2),
            (vec![], 1),
            (vec![spec("sp ace", 1)], 2),
            (vec![spec("", 1)], 2),
            (vec![spec("z", 0)], 2),
        ] {
            catalog.ensure(&specs, shards).unwrap_err();
            assert_eq!(catalog.topics(), before, "refused as a whole");
        }
        assert!(matches!(
            Catalog::open(dir.path()),
            Err(CatalogError::Locked { .. })
        ));
    }

    #[test]
    fn a_store_without_its_catalog_is_not_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        drop(Catalog::open(dir.path()).unwrap());
        fs::create_dir(dir.path().join("shard-000")).unwrap();
        fs::remove_file(dir.path().join("catalog.json")).unwrap();
        assert!(matches!(
            Catalog::open(dir.path()),
            Err(CatalogError::Damaged { .. })
        ));
        fs::write(dir.path().join("catalog.json"), "{").unwrap();
        assert!(matches!(
            Catalog::open(dir.path()),
            Err(CatalogError::Damaged { .. })
        ));
    }

    #[test]
    fn a_catalog_has_only_topics_that_could_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.json");
        let write = |store: &str, next: u32, name: &str, shards: &str| {
            let text = format!(
                r#"{{"version":1,"store":"{store}","next_topic":{next},"topics":[{{"id":1,"name":"{name}","shards":{shards}}}]}}"#
            );
            fs::write(&path, text).unwrap();
        };
        const STORE: &str = "0123456789abcdef0123456789abcdef";
        for (store, name, shards) in [
            (STORE, " orders", "[0]"),
            (STORE, "..", "[0]"),
            (STORE, "orders", "[]"),
            (STORE, "orders", "[65535]"),
            ("+123456789abcdef0123456789abcdef", "orders", "[0]"),
            ("1", "orders", "[0]"),
        ] {
            write(store, 2, name, shards);
            assert!(
                matches!(Catalog::open(dir.path()), Err(CatalogError::Damaged { .. })),
                "{store} {name:?} {shards}"
            );
        }
        // The last id is never given out: there would be no next one.
        write(STORE, u32::MAX, "orders", "[0]");
        let mut catalog = Catalog::open(dir.path()).unwrap();
        catalog.ensure(&[spec("new", 1)], 1).unwrap_err();
        assert_eq!(catalog.topics().len(), 1);
    }
}
