//! The catalog: the store's id, its topics with their settings, and the shard of each partition.
//!
//! Invariant: ids are never reused and a partition never changes its shard, so that entries in the log
//! keep their meaning: a topic id below the next one that no topic has is one of a deleted topic. `catalog.json` is replaced as a whole (write, fsync, rename, fsync the folder):
//! after a power cut it is the old one or the new one. One process writes a store at a time, held by a
//! lock on the file `lock`.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::PartitionKey;
use super::topic_settings;
use super::wal::segment::sync_dir;

/// The catalog in a store's folder.
pub(crate) const CATALOG_FILE: &str = "catalog.json";
/// Held by whoever writes in the folder.
pub(crate) const LOCK_FILE: &str = "lock";
/// Version of catalog.json. Version 1 knew no settings; it is read, and written as this one.
pub const CATALOG_VERSION: u32 = 2;
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
    /// There is no such topic.
    #[error("there is no topic {name:?}")]
    Unknown {
        /// The name asked for.
        name: String,
    },
    /// The name is taken.
    #[error("there is a topic {name:?} already")]
    Exists {
        /// The topic's name.
        name: String,
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
    /// Settings to be set, by the names of [`topic_settings::SETTINGS`].
    pub settings: BTreeMap<String, String>,
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
    /// Settings that were set, by the names of [`topic_settings::SETTINGS`]; the others have their defaults.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub settings: BTreeMap<String, String>,
    /// Kept by the server for itself; clients do not write to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub internal: bool,
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
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
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

fn check_settings(settings: &BTreeMap<String, String>) -> Result<(), String> {
    settings
        .iter()
        .try_for_each(|(name, value)| topic_settings::check(name, Some(value)))
}

fn check_partitions(name: &str, partitions: u32) -> Result<(), CatalogError> {
    if partitions == 0 || partitions > MAX_PARTITIONS {
        return refuse(
            name,
            format!("1 to {MAX_PARTITIONS} partitions are allowed, not {partitions}"),
        );
    }
    Ok(())
}

fn refuse<T>(name: &str, reason: String) -> Result<T, CatalogError> {
    Err(CatalogError::Topic {
        name: name.to_owned(),
        reason,
    })
}

impl Contents {
    /// Adds a topic without partitions; gives its place.
    fn push(&mut self, name: &str) -> Result<usize, CatalogError> {
        check_name(name).or_else(|reason| refuse(name, reason))?;
        let id = self.next_topic;
        let Some(following) = id.checked_add(1) else {
            return refuse(name, "the store has given out all topic ids".to_owned());
        };
        self.next_topic = following;
        self.topics.push(Topic {
            id,
            name: name.to_owned(),
            shards: Vec::new(),
            settings: BTreeMap::new(),
            internal: false,
        });
        Ok(self.topics.len() - 1)
    }

    /// Gives the topic at `at` at least `partitions` partitions. They go to the shard that has the fewest, the
    /// lowest number first.
    fn grow(&mut self, at: usize, partitions: u32, shards: u16) -> Result<(), CatalogError> {
        check_partitions(&self.topics[at].name, partitions)?;
        let mut load = vec![0usize; usize::from(shards)];
        for &shard in self.topics.iter().flat_map(|t| &t.shards) {
            if let Some(load) = load.get_mut(usize::from(shard)) {
                *load += 1;
            }
        }
        for _ in self.topics[at].partitions()..partitions {
            let shard = (0..shards)
                .min_by_key(|&s| load[usize::from(s)])
                .unwrap_or(0);
            load[usize::from(shard)] += 1;
            self.topics[at].shards.push(shard);
        }
        Ok(())
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
        let lock_path = dir.join(LOCK_FILE);
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
                        path: dir.join(CATALOG_FILE),
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
        let path = dir.join(CATALOG_FILE);
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
        Ok(Catalog {
            dir: dir.to_owned(),
            ..Self::from_bytes(&bytes, &path)?
        })
    }

    /// Of the bytes of a catalog file, `path`; for tools. It cannot be changed.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Catalog, CatalogError> {
        let damaged = |reason: String| CatalogError::Damaged {
            path: path.to_owned(),
            reason,
        };
        let mut contents: Contents =
            serde_json::from_slice(bytes).map_err(|e| damaged(e.to_string()))?;
        if contents.version == 1 {
            contents.version = CATALOG_VERSION;
        }
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
            if let Err(reason) = check_settings(&topic.settings) {
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
            dir: path.parent().unwrap_or(Path::new("")).to_owned(),
            contents,
            store,
            lock: None,
        })
    }

    fn save(&self, contents: &Contents) -> Result<(), CatalogError> {
        let path = self.dir.join(CATALOG_FILE);
        let mut bytes = serde_json::to_vec_pretty(contents).expect("plain data serializes");
        bytes.push(b'\n');
        replace_file(&path, &bytes).map_err(|source| CatalogError::Io {
            what: "cannot write",
            path,
            source,
        })
    }

    /// Makes sure that the topics exist with at least these partitions, spread over `shards` shards, and have
    /// these settings; others that they have stay. All or nothing, durable on return. A topic with more
    /// partitions keeps them. Refuses a number of shards that leaves an existing partition without its shard.
    pub fn ensure(&mut self, topics: &[TopicSpec], shards: u16) -> Result<(), CatalogError> {
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
        for spec in topics {
            check_settings(&spec.settings).or_else(|reason| refuse(&spec.name, reason))?;
            let at = match next.topics.iter().position(|t| t.name == spec.name) {
                Some(at) => at,
                None => next.push(&spec.name)?,
            };
            next.grow(at, spec.partitions, shards)?;
            next.topics[at].settings.extend(spec.settings.clone());
        }
        self.replace(next)
    }

    /// Makes a topic, with its partitions spread over `shards` shards. Durable on return.
    pub fn create(
        &mut self,
        spec: &TopicSpec,
        internal: bool,
        shards: u16,
    ) -> Result<&Topic, CatalogError> {
        self.check_new(spec)?;
        let mut next = self.contents.clone();
        let at = next.push(&spec.name)?;
        next.grow(at, spec.partitions, shards.max(1))?;
        next.topics[at].settings = spec.settings.clone();
        next.topics[at].internal = internal;
        self.replace(next)?;
        Ok(&self.contents.topics[at])
    }

    /// Whether [`Catalog::create`] would make this topic; changes nothing.
    pub fn check_new(&self, spec: &TopicSpec) -> Result<(), CatalogError> {
        check_name(&spec.name).or_else(|reason| refuse(&spec.name, reason))?;
        check_settings(&spec.settings).or_else(|reason| refuse(&spec.name, reason))?;
        check_partitions(&spec.name, spec.partitions)?;
        match self.topic(&spec.name) {
            Some(_) => Err(CatalogError::Exists {
                name: spec.name.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Forgets a topic; its id stays used. Durable on return.
    pub fn delete(&mut self, name: &str) -> Result<Topic, CatalogError> {
        let at = self.position(name)?;
        let mut next = self.contents.clone();
        let topic = next.topics.remove(at);
        self.replace(next)?;
        Ok(topic)
    }

    /// Gives a topic `partitions` partitions in all, which must be more than it has. Durable on return.
    pub fn grow(
        &mut self,
        name: &str,
        partitions: u32,
        shards: u16,
    ) -> Result<&Topic, CatalogError> {
        let at = self.check_grow(name, partitions)?;
        let mut next = self.contents.clone();
        next.grow(at, partitions, shards.max(1))?;
        self.replace(next)?;
        Ok(&self.contents.topics[at])
    }

    /// Whether [`Catalog::grow`] would do it; changes nothing. Gives the topic's place in [`Catalog::topics`].
    pub fn check_grow(&self, name: &str, partitions: u32) -> Result<usize, CatalogError> {
        let at = self.position(name)?;
        check_partitions(name, partitions)?;
        let have = self.contents.topics[at].partitions();
        if partitions <= have {
            return refuse(
                name,
                format!(
                    "it has {have} partitions; a topic may grow but not shrink (asked for {partitions})"
                ),
            );
        }
        Ok(at)
    }

    /// Sets settings, or with `None` puts them back to their defaults. All or nothing, durable on return.
    pub fn alter(
        &mut self,
        name: &str,
        changes: &BTreeMap<String, Option<String>>,
    ) -> Result<&Topic, CatalogError> {
        let at = self.check_alter(name, changes)?;
        let mut next = self.contents.clone();
        let settings = &mut next.topics[at].settings;
        for (key, value) in changes {
            match value {
                Some(value) => settings.insert(key.clone(), value.clone()),
                None => settings.remove(key),
            };
        }
        self.replace(next)?;
        Ok(&self.contents.topics[at])
    }

    /// Whether [`Catalog::alter`] would do it; changes nothing. Gives the topic's place in [`Catalog::topics`].
    pub fn check_alter(
        &self,
        name: &str,
        changes: &BTreeMap<String, Option<String>>,
    ) -> Result<usize, CatalogError> {
        let at = self.position(name)?;
        for (key, value) in changes {
            topic_settings::check(key, value.as_deref()).or_else(|reason| refuse(name, reason))?;
        }
        Ok(at)
    }

    fn position(&self, name: &str) -> Result<usize, CatalogError> {
        let at = self.contents.topics.iter().position(|t| t.name == name);
        at.ok_or_else(|| CatalogError::Unknown {
            name: name.to_owned(),
        })
    }

    fn replace(&mut self, next: Contents) -> Result<(), CatalogError> {
        if next.topics != self.contents.topics {
            self.save(&next)?;
            self.contents = next;
        }
        Ok(())
    }

    /// Whether a topic had this id and was deleted: what the log holds of it is nobody's.
    pub fn is_deleted(&self, id: u32) -> bool {
        id < self.contents.next_topic && self.topic_by_id(id).is_none()
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

    /// Topic ids from this one on have not been given.
    pub fn next_id(&self) -> u32 {
        self.contents.next_topic
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
            settings: BTreeMap::new(),
        }
    }

    #[test]
    fn topics_come_grow_change_and_go_durably() {
        let dir = tempfile::tempdir().unwrap();
        let mut catalog = Catalog::open(dir.path()).unwrap();
        let set = |pairs: &[(&str, Option<&str>)]| -> BTreeMap<String, Option<String>> {
            let owned = |&(k, v): &(&str, Option<&str>)| (k.to_owned(), v.map(str::to_owned));
            pairs.iter().map(owned).collect()
        };
        let mut a = spec("a", 3);
        a.settings.insert("retention.ms".into(), "1000".into());
        assert_eq!(catalog.create(&a, false, 2).unwrap().shards, [0, 1, 0]);
        catalog.create(&spec("b", 1), true, 2).unwrap();
        assert!(matches!(
            catalog.create(&a, false, 2),
            Err(CatalogError::Exists { .. })
        ));
        a.name = "c".into();
        a.settings.insert("retention.ms".into(), "soon".into());
        assert!(matches!(
            catalog.create(&a, false, 2),
            Err(CatalogError::Topic { .. })
        ));
        assert_eq!(catalog.grow("a", 4, 2).unwrap().shards, [0, 1, 0, 0]);
        for partitions in [0, 4, MAX_PARTITIONS + 1] {
            assert!(catalog.grow("a", partitions, 2).is_err());
        }
        let changes = set(&[("retention.ms", None), ("cleanup.policy", Some("compact"))]);
        catalog.alter("a", &changes).unwrap();
        assert!(catalog.alter("a", &set(&[("no.such", None)])).is_err());
        assert!(matches!(
            catalog.alter("x", &changes),
            Err(CatalogError::Unknown { .. })
        ));
        // Fewer partitions in the configuration change nothing.
        let mut less = spec("a", 2);
        less.settings.insert("retention.ms".into(), "7".into());
        catalog.ensure(&[less], 2).unwrap();
        let (a, b) = (catalog.topic("a").unwrap(), catalog.topic("b").unwrap());
        assert_eq!(a.partitions(), 4);
        assert_eq!(a.settings.len(), 2);
        assert!(b.internal && !a.internal);
        let topics = catalog.topics().to_vec();
        drop(catalog);
        let mut catalog = Catalog::open(dir.path()).unwrap();
        assert_eq!(catalog.topics(), topics);
        assert_eq!(catalog.delete("b").unwrap().id, 2);
        assert!(catalog.is_deleted(2) && !catalog.is_deleted(1) && !catalog.is_deleted(3));
        assert!(catalog.delete("b").is_err());
        assert_eq!(catalog.create(&spec("b", 1), false, 2).unwrap().id, 3);
    }

    #[test]
    fn the_first_version_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"version":1,"store":"000000000000000000000000000000ab","next_topic":2,
            "topics":[{"id":1,"name":"a","shards":[0]}]}"#;
        fs::write(dir.path().join("catalog.json"), text).unwrap();
        let mut catalog = Catalog::open(dir.path()).unwrap();
        catalog.grow("a", 2, 1).unwrap();
        let written = fs::read_to_string(dir.path().join("catalog.json")).unwrap();
        assert!(written.contains("\"version\": 2"), "{written}");
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
            (vec![spec("new", 1), spec("a", 0)], 2),
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
