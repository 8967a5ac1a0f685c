//! Opening the store: catalog, topics, and each shard's log with its recovered state.

use std::collections::HashMap;
use std::sync::Arc;

use crossbeam_queue::ArrayQueue;

use crate::config::Config;
use crate::config::memory::{Facts, Plan, producers};
use crate::memory::budget::{Budget, Part};
use crate::shard::{DEFAULT_PENDING_ACKS, GapReport, Recovered, ShardConfig};
use crate::storage::lsm::{
    Codec, Compaction, MaintainConfig, Maintainer, Policies, Policy, Started, Store, StoreMemory,
};
use crate::storage::topic_settings;
use crate::storage::wal::LogId;
use crate::storage::wal::segment::shard_dir;
use crate::storage::{
    Catalog, PartitionKey, RecoveryReport, TopicSpec, WalConfig, WalShared, WalWriter,
};

use super::Error;
use super::topics::{Snapshot, Topics};

/// Gap reports that may wait for a shard; a full queue delays reports, it loses none.
const GAP_QUEUE: usize = 1024;

/// A shard that is ready to be run.
pub(super) struct OpenShard {
    pub config: ShardConfig,
    pub recovered: Recovered,
    pub wal: WalWriter,
}

/// The store.
pub(super) struct OpenStore {
    pub catalog: Catalog,
    pub shards: Vec<OpenShard>,
    pub shared: Vec<Arc<WalShared>>,
    /// By shard: what its log became.
    pub stores: Vec<Arc<Store>>,
    pub gaps: Vec<Arc<ArrayQueue<GapReport>>>,
    /// What all of the process may take.
    pub memory: Budget,
}

/// Opens or makes the store and recovers every shard. `mempools`: what packet buffers take.
pub(super) fn open(config: &Config, mempools: u64) -> Result<OpenStore, Error> {
    let mut catalog = Catalog::open(&config.storage.path)?;
    let specs: Vec<TopicSpec> = config
        .topics
        .iter()
        .map(|t| TopicSpec {
            name: t.name.clone(),
            partitions: t.partitions,
            settings: t.settings.clone(),
        })
        .collect();
    catalog.ensure(&specs, config.storage.shards)?;
    for spec in &specs {
        let have = catalog.topic(&spec.name).map_or(0, |t| t.partitions());
        if have > spec.partitions {
            tracing::warn!(
                "topic {} has {have} partitions, the configuration says {}: a topic never shrinks",
                spec.name,
                spec.partitions
            );
        }
    }

    let count = usize::from(config.storage.shards);
    let facts = Facts {
        available: crate::memory::process::available(),
        mempools,
        partitions: catalog
            .topics()
            .iter()
            .map(|t| u64::from(t.partitions()))
            .sum(),
    };
    let memory = Plan::new(config, &facts)?.budget();
    let producers = producers(config, memory.account(Part::Dedupe).share(count).bytes());
    let mut keys: Vec<Vec<PartitionKey>> = vec![Vec::new(); count];
    for (topic, places) in catalog
        .topics()
        .iter()
        .zip(super::topics::places(&catalog, count))
    {
        for (place, partition) in places.iter().zip(0..) {
            keys[usize::from(place.shard)].push(PartitionKey {
                topic: topic.id,
                partition,
            });
        }
    }

    let (mut shards, mut shared, mut gaps) = (Vec::new(), Vec::new(), Vec::new());
    let mut stores = Vec::new();
    for (shard, partitions) in keys.into_iter().enumerate() {
        let queue = Arc::new(ArrayQueue::new(GAP_QUEUE));
        let shard_config = ShardConfig {
            partitions,
            max_producers: producers,
            max_pending_acks: DEFAULT_PENDING_ACKS,
            gaps: Arc::clone(&queue),
            wakes: Vec::new(),
        };
        let mut recovered = Recovered::new(&shard_config);
        let id = LogId {
            store: catalog.store_id(),
            shard: shard as u16,
        };
        let dir = shard_dir(&config.storage.path, id.shard);
        let files = Store::open_within(&dir, id, StoreMemory::of(&memory, count))?;
        let wal_config = WalConfig {
            segment_size: config.storage.segment_size,
            prepared_segments: usize::from(config.storage.prepared_segments),
            staging_size: config.storage.staging_size,
            staging_dir: config.storage.staging_dir.clone(),
            commit_size: config.storage.commit_size as usize,
            commits_in_flight: usize::from(config.storage.commits_in_flight),
            linger: config.storage.linger,
            flushed_lsn: files.view().flushed_lsn,
            index: memory.account(Part::OffsetIndex).share(count),
            keys: memory.account(Part::KeyIndex).share(count),
            windows: memory.account(Part::LogWindows).share(count),
            ..WalConfig::new(&config.storage.path, catalog.store_id())
        };
        let (wal, view, report) = WalWriter::open(&wal_config, shard as u16, &mut recovered)?;
        recovered.forget(|topic| catalog.is_deleted(topic));
        tell(shard, &report);
        if recovered.malformed() > 0 {
            tracing::warn!(
                "shard {shard}: {} entries are whole but not understood: written by a newer version?",
                recovered.malformed()
            );
        }
        stores.push(files);
        shards.push(OpenShard {
            config: shard_config,
            recovered,
            wal,
        });
        shared.push(view);
        gaps.push(queue);
    }
    Ok(OpenStore {
        catalog,
        shards,
        shared,
        stores,
        gaps,
        memory,
    })
}

/// Starts the thread of each shard that moves messages from the log into SSTs and drops what retention lets go, as the
/// topics' settings say at the time.
pub(super) fn maintain(
    config: &Config,
    stores: &[Arc<Store>],
    logs: &[Arc<WalShared>],
    topics: &Arc<Topics>,
) -> Result<Vec<Maintainer>, Error> {
    let codecs: HashMap<String, Codec> = config
        .topics
        .iter()
        .map(|topic| (topic.name.clone(), topic.compression))
        .collect();
    let policies: Policies = Arc::new({
        let topics = Arc::clone(topics);
        move |id| policy(&topics.snapshot(), &codecs, id)
    });
    let started: Started = Arc::new({
        let topics = Arc::clone(topics);
        move |key, start| {
            let snapshot = topics.snapshot();
            let topic = snapshot.find_id(key.topic);
            if let Some(partition) = topic.and_then(|t| t.partitions.get(key.partition as usize)) {
                partition.stats.raise_start(start);
            }
        }
    });
    let start = |(files, wal): (&Arc<Store>, &Arc<WalShared>)| {
        let config = MaintainConfig {
            batch_target: config.storage.batch_target as usize,
            policies: Arc::clone(&policies),
            started: Arc::clone(&started),
        };
        Ok(Maintainer::start(
            Arc::clone(files),
            Arc::clone(wal),
            config,
        )?)
    };
    stores.iter().zip(logs).map(start).collect()
}

/// What is to become of a topic's messages: Kafka's settings, and the codec that the configuration names where those leave
/// it to the server.
fn policy(topics: &Snapshot, codecs: &HashMap<String, Codec>, id: u32) -> Policy {
    let Some(topic) = topics.find_id(id) else {
        return Policy {
            deleted: topics.is_deleted(id),
            ..Policy::default()
        };
    };
    let value = |name| topic_settings::value(&topic.settings, name);
    let limit = |name| value(name).parse::<i64>().ok().filter(|&limit| limit >= 0);
    let cleanup = |wanted| {
        let mut words = value("cleanup.policy").split(',');
        words.any(|word| word.trim() == wanted)
    };
    let (delete, compact) = (cleanup("delete"), cleanup("compact"));
    let defaults = Compaction::default();
    Policy {
        codec: match value("compression.type") {
            "uncompressed" => Codec::None,
            "lz4" => Codec::Lz4,
            "zstd" => Codec::default(),
            _ => codecs.get(&topic.name).copied().unwrap_or_default(),
        },
        retention_ms: limit("retention.ms").filter(|_| delete),
        retention_bytes: limit("retention.bytes")
            .filter(|_| delete)
            .map(|n| n as u64),
        compaction: compact.then(|| Compaction {
            delete_retention_ms: limit("delete.retention.ms")
                .unwrap_or(defaults.delete_retention_ms),
            min_lag_ms: limit("min.compaction.lag.ms").unwrap_or(defaults.min_lag_ms),
            dirty_ratio: value("min.cleanable.dirty.ratio")
                .parse()
                .unwrap_or(defaults.dirty_ratio),
        }),
        indexed: topic_settings::is_indexed(&topic.settings),
        deleted: false,
    }
}

/// What recovery read, kept and cut off, for the log.
fn tell(shard: usize, report: &RecoveryReport) {
    if report.frames_read == 0 && report.staged_frames == 0 && report.cut.is_none() {
        tracing::info!("shard {shard}: the log is new");
        return;
    }
    tracing::info!(
        "shard {shard}: {}; read {} frames ({} bytes) of {} segments in {:?}, replayed {} batches, the log ends at LSN {}",
        if report.clean {
            "was closed cleanly"
        } else {
            "was not closed cleanly"
        },
        report.frames_read,
        report.bytes_read,
        report.segments_read,
        report.took,
        report.batches_replayed,
        report.end_lsn
    );
    if report.staged_frames > 0 {
        tracing::info!(
            "shard {shard}: {} batches in {} frames were only in the staging file and are on disk now",
            report.staged_entries,
            report.staged_frames
        );
    }
    if let Some(path) = &report.staging_lost {
        tracing::warn!(
            "shard {shard}: the staging file {} of this boot is gone: messages acknowledged with acks=1 and not yet committed are lost",
            path.display()
        );
    }
    if let Some(cut) = &report.cut {
        tracing::warn!(
            "shard {shard}: cut off {} bytes behind byte {} of {}: {}",
            cut.bytes,
            cut.position,
            cut.path.display(),
            cut.reason
        );
    }
}
