//! The topics of a running server: found by name and id, made, grown, configured and deleted, on any thread.
//!
//! Invariants: the catalog is durable before anybody sees a change, and a partition is known to its shard before
//! it is shown to those who send. A [`Snapshot`] never changes: who holds one sees the topics of one moment. What is
//! sent to a partition that was deleted meanwhile is refused as unknown.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::config::memory::PARTITION;
use crate::memory::budget::Account;
use crate::net::routes::{Place, Route, RouteCell, Routes, ServedRoute, TopicCounters};
use crate::net::{ServedTopic, TopicTable};
use crate::shard::{ControlError, PartitionStats, ShardControl};
use crate::storage::lsm::manifest::Edit;
use crate::storage::lsm::{Store, StoreError};
use crate::storage::{Catalog, CatalogError, PartitionKey, TopicSpec};

/// Why topics were not changed.
#[derive(Debug, thiserror::Error)]
pub enum TopicsError {
    /// The catalog refuses, or cannot be written.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The shard's manifest cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A shard cannot take the change.
    #[error(transparent)]
    Shard(#[from] ControlError),
    /// The configuration needs the topic.
    #[error(
        "topic {name:?} is where a [[udp]] source of the configuration leads: take that out first"
    )]
    InUse {
        /// The topic's name.
        name: String,
    },
    /// There is no such partition.
    #[error("topic {name:?} has no partition {partition}")]
    NoPartition {
        /// The topic's name.
        name: String,
        /// The partition asked for.
        partition: u32,
    },
    /// Records can only be deleted where there are some.
    #[error("offset {offset} is outside partition {partition} of topic {name:?}, {start} to {end}")]
    OutOfRange {
        /// The topic's name.
        name: String,
        /// The partition.
        partition: u32,
        /// The offset asked for.
        offset: i64,
        /// First offset.
        start: i64,
        /// High watermark.
        end: i64,
    },
    /// The budget has no room for the partitions.
    #[error(
        "there is no memory for {partitions} more partitions: {used} of {limit} bytes for partitions are taken; raise `budget`, or `partitions`, in [memory]"
    )]
    Memory {
        /// Partitions asked for.
        partitions: u64,
        /// What partitions take.
        used: u64,
        /// What they may take.
        limit: u64,
    },
    /// The server is being stopped.
    #[error("the server is stopping")]
    Stopping,
}

/// A partition.
#[derive(Debug, Clone)]
pub struct Partition {
    /// Where it lives.
    pub place: Place,
    /// Its name in the log.
    pub key: PartitionKey,
    /// Its counters, offsets and high watermark.
    pub stats: Arc<PartitionStats>,
}

/// A topic as it is at a moment.
#[derive(Debug, Clone)]
pub struct Topic {
    /// Its number in the store, never given twice.
    pub id: u32,
    /// The id that Kafka's clients see: the same for as long as the topic lives, another for one that is
    /// made anew under the same name.
    pub uuid: u128,
    /// Its name.
    pub name: String,
    /// Kept by the server for itself.
    pub internal: bool,
    /// Settings that were set; see [`crate::storage::topic_settings`].
    pub settings: BTreeMap<String, String>,
    /// Its partitions, by number.
    pub partitions: Vec<Partition>,
    /// What came in for it.
    pub counters: Arc<TopicCounters>,
}

/// All topics at a moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    topics: Vec<Arc<Topic>>,
    by_name: HashMap<String, usize>,
    /// Topic ids from this one on have not been given.
    next_id: u32,
}

impl Snapshot {
    /// Oldest first.
    pub fn all(&self) -> &[Arc<Topic>] {
        &self.topics
    }

    /// By name.
    pub fn find(&self, name: &str) -> Option<&Arc<Topic>> {
        self.topics.get(*self.by_name.get(name)?)
    }

    /// By number.
    pub fn find_id(&self, id: u32) -> Option<&Arc<Topic>> {
        // Ids are given in order and topics are kept in it.
        let at = self
            .topics
            .binary_search_by_key(&id, |topic| topic.id)
            .ok()?;
        self.topics.get(at)
    }

    /// Whether a topic had this number and was deleted: what the store holds of it may go.
    pub fn is_deleted(&self, id: u32) -> bool {
        id < self.next_id && self.find_id(id).is_none()
    }
}

/// What the rx lcores' routes are made of beside the topics.
pub struct RouteBase {
    /// Acknowledgement level told to clients that do not choose.
    pub default_acks: i8,
    /// UDP payload in bytes that a client may send.
    pub max_datagram: u32,
    /// Raw UDP sources: how each leads to its topic.
    pub raw: Vec<RawSource>,
}

/// A raw UDP source.
pub struct RawSource {
    /// Name of its topic, which cannot be deleted.
    pub topic: String,
    /// How it chooses.
    pub choice: crate::net::routes::Choice,
    /// 0 is shed first, 7 last.
    pub priority: u8,
    /// Only this partition.
    pub partition: Option<u32>,
}

/// The topics; shared by all threads.
pub struct Topics {
    inner: Mutex<Inner>,
    current: RwLock<Arc<Snapshot>>,
    routes: Arc<RouteCell>,
    /// By shard: where partitions' starts are kept.
    stores: Vec<Arc<Store>>,
    stopping: AtomicBool,
    /// Of partitions.
    memory: Arc<Account>,
}

/// Memory that is given back unless it is kept.
struct Room<'a>(&'a Account, u64);

impl Room<'_> {
    fn keep(mut self) {
        self.1 = 0;
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.0.give(self.1);
    }
}

struct Inner {
    catalog: Catalog,
    shards: Vec<ShardControl>,
    rx_lcores: usize,
    /// Raw sources lead to the partitions that there were at the start: a sender's messages keep their order.
    raw: Vec<Route>,
    default_acks: i8,
    max_datagram: u32,
    pinned: HashSet<String>,
    topics: Vec<Arc<Topic>>,
}

/// A stable id for Kafka's clients, of the store and the topic's number: two steps of a 128-bit mix (the
/// multiplier of PCG), with the marks of a random UUID (RFC 9562, version 4).
fn uuid(store: u128, id: u32) -> u128 {
    const MULTIPLIER: u128 = 0x2360_ED05_1FC6_5DA4_4385_DF64_9FCC_F645;
    let mut x = store ^ (u128::from(id) << 64 | u128::from(id));
    for _ in 0..2 {
        x = x.wrapping_mul(MULTIPLIER).wrapping_add(MULTIPLIER | 1);
        x ^= x >> 64;
    }
    (x & !(0xf << 76) & !(0x3 << 62)) | 0x4 << 76 | 0x2 << 62
}

impl Topics {
    /// The topics of an open store: `partitions` are the counters of each shard by local index, as
    /// `places` numbers them.
    pub fn new(
        catalog: Catalog,
        shards: Vec<ShardControl>,
        partitions: &[Vec<Arc<PartitionStats>>],
        rx_lcores: usize,
        base: RouteBase,
        stores: Vec<Arc<Store>>,
        memory: &Arc<Account>,
    ) -> Arc<Self> {
        let known = catalog.topics().iter().map(|t| u64::from(t.partitions()));
        memory.take(known.sum::<u64>() * PARTITION);
        let places = places(&catalog, shards.len());
        let topics: Vec<Arc<Topic>> = catalog
            .topics()
            .iter()
            .zip(places)
            .map(|(topic, places)| {
                let partitions = places
                    .into_iter()
                    .zip(0..)
                    .map(|(place, partition)| Partition {
                        place,
                        key: PartitionKey {
                            topic: topic.id,
                            partition,
                        },
                        stats: Arc::clone(
                            &partitions[usize::from(place.shard)][place.local as usize],
                        ),
                    });
                Arc::new(Topic {
                    id: topic.id,
                    uuid: uuid(catalog.store_id(), topic.id),
                    name: topic.name.clone(),
                    internal: topic.internal,
                    settings: topic.settings.clone(),
                    partitions: partitions.collect(),
                    counters: Arc::new(TopicCounters::new(rx_lcores)),
                })
            })
            .collect();
        let raw = base
            .raw
            .iter()
            .filter_map(|source| {
                let topic = topics.iter().find(|topic| topic.name == source.topic)?;
                let all = topic.partitions.iter().map(|partition| partition.place);
                let places: Vec<Place> = match source.partition {
                    Some(partition) => all.skip(partition as usize).take(1).collect(),
                    None => all.collect(),
                };
                Some(Route {
                    counters: Arc::clone(&topic.counters),
                    choice: source.choice,
                    priority: source.priority,
                    places,
                })
            })
            .collect();
        let inner = Inner {
            catalog,
            shards,
            rx_lcores,
            raw,
            default_acks: base.default_acks,
            max_datagram: base.max_datagram,
            pinned: base.raw.into_iter().map(|source| source.topic).collect(),
            topics,
        };
        Arc::new(Self {
            current: RwLock::new(Arc::new(inner.snapshot())),
            routes: Arc::new(RouteCell::new(inner.routes())),
            inner: Mutex::new(inner),
            stores,
            stopping: AtomicBool::new(false),
            memory: Arc::clone(memory),
        })
    }

    /// Takes memory for more partitions.
    fn room(&self, partitions: u32) -> Result<Room<'_>, TopicsError> {
        let partitions = u64::from(partitions);
        match self.memory.try_take(partitions * PARTITION) {
            true => Ok(Room(&self.memory, partitions * PARTITION)),
            false => Err(TopicsError::Memory {
                partitions,
                used: self.memory.used(),
                limit: self.memory.limit(),
            }),
        }
    }

    /// All topics now. Costs a reference count.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// What rx lcores look messages up in.
    pub fn routes(&self) -> Arc<RouteCell> {
        Arc::clone(&self.routes)
    }

    /// Changes nothing from now on: the shards are about to close.
    pub fn stop(&self) {
        // Whoever changes something now is waited for.
        let _inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        self.stopping.store(true, Ordering::Release);
    }

    fn lock(&self) -> Result<MutexGuard<'_, Inner>, TopicsError> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if self.stopping.load(Ordering::Acquire) {
            return Err(TopicsError::Stopping);
        }
        Ok(inner)
    }

    fn publish(&self, inner: &Inner) {
        let snapshot = Arc::new(inner.snapshot());
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = snapshot;
        self.routes.publish(inner.routes());
    }

    /// Makes a topic; messages for it are taken when this returns. Blocks for a write of the catalog. With
    /// `check_only` nothing is made.
    pub fn create(
        &self,
        spec: &TopicSpec,
        internal: bool,
        check_only: bool,
    ) -> Result<(), TopicsError> {
        let mut inner = self.lock()?;
        inner.catalog.check_new(spec)?;
        inner.reserve(spec.partitions as usize)?;
        let room = self.room(spec.partitions)?;
        if check_only {
            return Ok(());
        }
        let shards = inner.shards.len() as u16;
        let made = inner.catalog.create(spec, internal, shards)?;
        let (id, places) = (made.id, made.shards.clone());
        let partitions = inner.add(id, 0, &places)?;
        let topic = Topic {
            id,
            uuid: uuid(inner.catalog.store_id(), id),
            name: spec.name.clone(),
            internal,
            settings: spec.settings.clone(),
            partitions,
            counters: Arc::new(TopicCounters::new(inner.rx_lcores)),
        };
        inner.topics.push(Arc::new(topic));
        self.publish(&inner);
        room.keep();
        Ok(())
    }

    /// Deletes a topic with its messages; what still arrives for it is refused.
    pub fn delete(&self, name: &str) -> Result<(), TopicsError> {
        let mut inner = self.lock()?;
        if inner.pinned.contains(name) {
            return Err(TopicsError::InUse {
                name: name.to_owned(),
            });
        }
        inner.reserve(0)?;
        let gone = inner.catalog.delete(name)?;
        let at = inner.topics.iter().position(|topic| topic.id == gone.id);
        let topic = at.map(|at| inner.topics.remove(at));
        self.publish(&inner);
        let mut retire = vec![Vec::new(); inner.shards.len()];
        for partition in topic.iter().flat_map(|topic| &topic.partitions) {
            retire[usize::from(partition.place.shard)].push(partition.place.local);
        }
        for (shard, indexes) in inner.shards.iter_mut().zip(&retire) {
            if !indexes.is_empty() {
                shard.retire(indexes)?;
                self.memory.give(indexes.len() as u64 * PARTITION);
            }
        }
        Ok(())
    }

    /// Gives a topic `partitions` partitions in all. With `check_only` nothing is done.
    pub fn add_partitions(
        &self,
        name: &str,
        partitions: u32,
        check_only: bool,
    ) -> Result<(), TopicsError> {
        let mut inner = self.lock()?;
        let at = inner.catalog.check_grow(name, partitions)?;
        let have = inner.catalog.topics()[at].partitions();
        inner.reserve((partitions - have) as usize)?;
        let room = self.room(partitions - have)?;
        if check_only {
            return Ok(());
        }
        let shards = inner.shards.len() as u16;
        let grown = inner.catalog.grow(name, partitions, shards)?;
        let (id, places) = (grown.id, grown.shards[have as usize..].to_vec());
        let added = inner.add(id, have, &places)?;
        inner.edit(id, |topic| topic.partitions.extend(added));
        self.publish(&inner);
        room.keep();
        Ok(())
    }

    /// Sets settings, or with `None` puts them back to their defaults. With `check_only` nothing is done.
    pub fn alter(
        &self,
        name: &str,
        changes: &BTreeMap<String, Option<String>>,
        check_only: bool,
    ) -> Result<(), TopicsError> {
        let mut inner = self.lock()?;
        inner.catalog.check_alter(name, changes)?;
        if check_only {
            return Ok(());
        }
        let altered = inner.catalog.alter(name, changes)?;
        let (id, settings) = (altered.id, altered.settings.clone());
        inner.edit(id, |topic| topic.settings = settings);
        self.publish(&inner);
        Ok(())
    }

    /// Moves the start of a partition up to `offset`, at most its high watermark, which −1 stands for; gives the
    /// start. Readers no longer see what lies before it.
    pub fn delete_records(
        &self,
        name: &str,
        partition: u32,
        offset: i64,
    ) -> Result<i64, TopicsError> {
        let snapshot = self.snapshot();
        let topic = snapshot.find(name).ok_or_else(|| CatalogError::Unknown {
            name: name.to_owned(),
        })?;
        let found = topic.partitions.get(partition as usize);
        let stats = &found
            .ok_or_else(|| TopicsError::NoPartition {
                name: name.to_owned(),
                partition,
            })?
            .stats;
        let (start, end) = (stats.start_offset(), stats.high_watermark());
        let offset = if offset == -1 { end } else { offset };
        if offset < 0 || offset > end {
            return Err(TopicsError::OutOfRange {
                name: name.to_owned(),
                partition,
                offset,
                start,
                end,
            });
        }
        if offset > start {
            let key = PartitionKey {
                topic: topic.id,
                partition,
            };
            if let Some(store) = found.and_then(|p| self.stores.get(usize::from(p.place.shard))) {
                store.commit(&Edit::Trim(vec![(key, offset)]))?;
            }
            stats.raise_start(offset);
        }
        Ok(stats.start_offset())
    }
}

impl Inner {
    /// Makes sure that the shards will take a change with so many partitions more.
    fn reserve(&mut self, partitions: usize) -> Result<(), TopicsError> {
        for shard in &mut self.shards {
            shard.reserve(partitions)?;
        }
        Ok(())
    }

    /// Tells the shards of a topic's new partitions, from number `first` on, each in its shard.
    fn add(
        &mut self,
        topic: u32,
        first: u32,
        shards: &[u16],
    ) -> Result<Vec<Partition>, TopicsError> {
        let mut keys = vec![Vec::new(); self.shards.len()];
        for (partition, &shard) in (first..).zip(shards) {
            keys[usize::from(shard)].push(PartitionKey { topic, partition });
        }
        let mut added = Vec::with_capacity(shards.len());
        for (shard, keys) in keys.iter().enumerate().filter(|(_, keys)| !keys.is_empty()) {
            for ((local, stats), &key) in self.shards[shard].add(keys)?.into_iter().zip(keys) {
                added.push(Partition {
                    place: Place {
                        shard: shard as u16,
                        local,
                    },
                    key,
                    stats,
                });
            }
        }
        added.sort_by_key(|partition| partition.key.partition);
        Ok(added)
    }

    fn edit(&mut self, id: u32, edit: impl FnOnce(&mut Topic)) {
        if let Some(topic) = self.topics.iter_mut().find(|topic| topic.id == id) {
            let mut changed = Topic::clone(topic);
            edit(&mut changed);
            *topic = Arc::new(changed);
        }
    }

    fn snapshot(&self) -> Snapshot {
        let topics = self.topics.clone();
        let numbered = topics.iter().zip(0..);
        Snapshot {
            by_name: numbered.map(|(t, i)| (t.name.clone(), i)).collect(),
            next_id: self.catalog.next_id(),
            topics,
        }
    }

    fn routes(&self) -> Routes {
        let ids = self.topics.last().map_or(0, |topic| topic.id as usize + 1);
        let mut by_id: Vec<Option<Arc<ServedRoute>>> = (0..ids).map(|_| None).collect();
        let mut topic_of: Vec<Vec<_>> = self.shards.iter().map(|s| vec![None; s.len()]).collect();
        let mut served = Vec::new();
        for topic in &self.topics {
            let places: Vec<Place> = topic.partitions.iter().map(|p| p.place).collect();
            for place in &places {
                topic_of[usize::from(place.shard)][place.local as usize] =
                    Some(Arc::clone(&topic.counters));
            }
            // Nobody but the server writes to its own topics.
            if topic.internal {
                continue;
            }
            by_id[topic.id as usize] = Some(Arc::new(ServedRoute {
                counters: Arc::clone(&topic.counters),
                places,
            }));
            served.push(ServedTopic {
                name: topic.name.clone(),
                id: topic.id,
                partitions: topic.partitions.len() as u32,
            });
        }
        Routes {
            raw: self.raw.clone(),
            table: TopicTable::new(
                served,
                self.default_acks,
                crate::shard::FULL_CREDIT,
                self.max_datagram,
            ),
            by_id,
            topic_of,
        }
    }
}

/// Where the partitions of each topic of a catalog lie: a shard's local indexes follow the order of the catalog.
pub(super) fn places(catalog: &Catalog, shards: usize) -> Vec<Vec<Place>> {
    let mut next = vec![0u32; shards];
    let topics = catalog.topics().iter();
    topics
        .map(|topic| {
            let shards = topic.shards.iter().map(|&shard| {
                let local = next[usize::from(shard)];
                next[usize::from(shard)] += 1;
                Place { shard, local }
            });
            shards.collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_stable_distinct_and_well_formed() {
        assert_eq!(uuid(7, 1), uuid(7, 1));
        let mut seen = HashSet::new();
        for store in 0..50u128 {
            for id in 0..200 {
                let uuid = uuid(store << 90 | store, id);
                assert!(seen.insert(uuid));
                assert_eq!((uuid >> 76 & 0xf, uuid >> 62 & 0x3), (4, 2));
            }
        }
    }
}
