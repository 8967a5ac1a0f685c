//! The server's topics as the broker sees them.
//!
//! Invariant: what the broker is shown is one snapshot of [`topics::Topics`], made over again only when that
//! one has changed.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use super::topics;
use crate::broker::configs;
use crate::broker::topics::{Change, OFFSETS_TOPIC, Place, Snapshot, Topic, TopicError, Topics};
use crate::broker::waiting::Progress;
use crate::net::routes::TopicCounters;
use crate::shard::PartitionStats;
use crate::storage::{CatalogError, TopicSpec};
use crate::wire::kafka::Code;

/// A partition's counters, and its topic's.
type Part = (Arc<PartitionStats>, Arc<TopicCounters>);

/// What was made of a snapshot.
struct View {
    of: Arc<topics::Snapshot>,
    snapshot: Arc<Snapshot>,
    /// By shard and local index; `None`: retired.
    parts: Vec<Vec<Option<Part>>>,
}

/// See the module.
pub(super) struct LiveTopics {
    topics: Arc<topics::Topics>,
    view: RwLock<Arc<View>>,
    max_batch: usize,
}

impl LiveTopics {
    /// Of the server's topics; `max_batch`: bytes of the largest batch that the log takes.
    pub fn new(topics: Arc<topics::Topics>, max_batch: usize) -> Self {
        let view = View::new(topics.snapshot(), max_batch);
        Self {
            topics,
            view: RwLock::new(Arc::new(view)),
            max_batch,
        }
    }

    fn view(&self) -> Arc<View> {
        let current = self.topics.snapshot();
        let view = Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner));
        if Arc::ptr_eq(&view.of, &current) {
            return view;
        }
        let view = Arc::new(View::new(current, self.max_batch));
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&view);
        view
    }
}

impl View {
    fn new(of: Arc<topics::Snapshot>, max_batch: usize) -> Self {
        let mut parts: Vec<Vec<Option<Part>>> = Vec::new();
        let mut shown = Vec::new();
        for topic in of.all() {
            let mut places = Vec::new();
            for partition in &topic.partitions {
                let (shard, local) = (partition.place.shard, partition.place.local);
                places.push(Place {
                    shard,
                    local,
                    key: partition.key,
                });
                let (shard, local) = (usize::from(shard), local as usize);
                parts.resize_with(parts.len().max(shard + 1), Vec::new);
                let list = &mut parts[shard];
                list.resize_with(list.len().max(local + 1), || None);
                list[local] = Some((Arc::clone(&partition.stats), Arc::clone(&topic.counters)));
            }
            let config: Vec<(String, String)> = topic
                .settings
                .iter()
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect();
            shown.push(Topic {
                name: topic.name.clone(),
                id: topic.id,
                uuid: topic.uuid,
                places,
                rules: configs::rules(&config, max_batch),
                config,
            });
        }
        Self {
            of,
            snapshot: Arc::new(Snapshot::new(shown)),
            parts,
        }
    }

    fn part(&self, shard: u16, local: u32) -> Option<&Part> {
        let list = self.parts.get(usize::from(shard))?;
        list.get(local as usize)?.as_ref()
    }
}

impl From<topics::TopicsError> for TopicError {
    fn from(error: topics::TopicsError) -> Self {
        use topics::TopicsError as E;
        let code = match &error {
            E::Catalog(CatalogError::Unknown { .. }) | E::NoPartition { .. } => {
                Code::UnknownTopicOrPartition
            }
            E::Catalog(CatalogError::Exists { .. }) => Code::TopicAlreadyExists,
            E::Catalog(CatalogError::Topic { .. }) => Code::InvalidRequest,
            E::Catalog(_) | E::Store(_) => Code::KafkaStorageError,
            E::Shard(_) | E::InUse { .. } | E::Memory { .. } => Code::PolicyViolation,
            E::OutOfRange { .. } => Code::OffsetOutOfRange,
            E::Stopping => Code::CoordinatorNotAvailable,
        };
        TopicError::new(code, error.to_string())
    }
}

impl Topics for LiveTopics {
    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.view().snapshot)
    }

    fn create(
        &self,
        name: &str,
        partitions: u32,
        config: &[(String, String)],
        validate_only: bool,
    ) -> Result<(), TopicError> {
        let spec = TopicSpec {
            name: name.to_owned(),
            partitions,
            settings: config.iter().cloned().collect(),
        };
        let internal = name == OFFSETS_TOPIC;
        Ok(self.topics.create(&spec, internal, validate_only)?)
    }

    fn delete(&self, name: &str) -> Result<(), TopicError> {
        Ok(self.topics.delete(name)?)
    }

    fn grow(&self, name: &str, partitions: u32, validate_only: bool) -> Result<(), TopicError> {
        Ok(self
            .topics
            .add_partitions(name, partitions, validate_only)?)
    }

    fn alter(&self, name: &str, changes: &[Change], validate_only: bool) -> Result<(), TopicError> {
        let changes: BTreeMap<String, Option<String>> = changes.iter().cloned().collect();
        Ok(self.topics.alter(name, &changes, validate_only)?)
    }

    fn delete_records(&self, place: Place, offset: i64) -> Result<i64, TopicError> {
        let snapshot = self.topics.snapshot();
        let Some(topic) = snapshot.find_id(place.key.topic) else {
            return Err(TopicError::new(
                Code::UnknownTopicOrPartition,
                "the topic is gone",
            ));
        };
        let partition = place.key.partition;
        Ok(self.topics.delete_records(&topic.name, partition, offset)?)
    }

    fn log_start(&self, place: Place) -> i64 {
        self.view()
            .part(place.shard, place.local)
            .map_or(0, |(stats, _)| stats.start_offset())
    }

    fn log_end(&self, place: Place) -> i64 {
        self.view()
            .part(place.shard, place.local)
            .map_or(0, |(stats, _)| stats.log_end())
    }

    fn received(&self, place: Place, messages: u64) {
        if let Some((_, counters)) = self.view().part(place.shard, place.local) {
            counters.kernel.receive(messages);
        }
    }

    fn progress(&self, shard: u16, local: u32) -> Option<Progress> {
        let view = self.view();
        let (stats, _) = view.part(shard, local)?;
        Some(Progress {
            high_watermark: stats.high_watermark(),
            bytes: stats.bytes.get(),
        })
    }
}
