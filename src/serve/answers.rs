//! What the control socket answers, beside the counters.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::news::News;
use super::stats::Sources;
use super::topics::{Partition, Snapshot, Topic, Topics};
use crate::broker::groups::records::assigned_partitions;
use crate::broker::groups::{Request, Response};
use crate::broker::topics::OFFSETS_TOPIC;
use crate::broker::worker::{Broker, group_time};
use crate::control::keys::{no_index, read_keys};
use crate::control::names;
use crate::control::protocol::{
    CommittedOffsets, GroupInfo, GroupMember, GroupPartition, GroupSummary, TopicChange, TopicInfo,
};
use crate::control::server::{Answers, Groups};
use crate::storage::backup;
use crate::storage::lsm::Store;
use crate::storage::reader::LogReader;
use crate::storage::{TopicSpec, WalShared, topic_settings};
use crate::wire::kafka::Code;
use crate::wire::kafka::groups::*;

/// How long a backup waits for what was acknowledged with `acks=1` to be on disk.
const SETTLE: Duration = Duration::from_secs(10);

/// Waits until all that is stored now is durable.
fn settle(topics: &Topics) -> Result<(), String> {
    let since = Instant::now();
    let snapshot = topics.snapshot();
    let partitions = || snapshot.all().iter().flat_map(|topic| &topic.partitions);
    let ends: Vec<i64> = partitions().map(|p| p.stats.log_end()).collect();
    while partitions()
        .zip(&ends)
        .any(|(partition, &end)| partition.stats.high_watermark() < end)
    {
        if since.elapsed() > SETTLE {
            return Err(format!(
                "what the server has taken did not become durable within {} s: see the shards' states in `taffrail stats`",
                SETTLE.as_secs()
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// What the control socket answers of an open server.
pub(super) fn answers(
    sources: &Arc<Sources>,
    shared: &[Arc<WalShared>],
    stores: &[Arc<Store>],
    folder: &Path,
    news: &Arc<News>,
) -> Answers {
    let readers = || -> Vec<Mutex<LogReader>> {
        shared
            .iter()
            .zip(stores)
            .map(|(shared, files)| {
                Mutex::new(LogReader::with_store(Arc::clone(shared), Arc::clone(files)))
            })
            .collect()
    };
    // A search where records have to be read for their keys takes long: the others do not wait for it.
    let (readers, readers_of_keys) = (Arc::new(readers()), readers());
    let at = {
        let (topics, readers) = (Arc::clone(&sources.topics), Arc::clone(&readers));
        move |topic: &str, partition, from, max_bytes, out: &mut Vec<u8>| {
            let partition = find(&topics.snapshot(), topic, partition)?;
            let mut reader = lock(&readers[usize::from(partition.place.shard)]);
            crate::control::read(&mut reader, partition.key, from, max_bytes, out)
        }
    };
    let of_position = {
        let topics = Arc::clone(&sources.topics);
        move |topic: &str, partition, from| {
            let partition = find(&topics.snapshot(), topic, partition)?;
            let mut reader = lock(&readers[usize::from(partition.place.shard)]);
            crate::control::find(&mut reader, partition.key, from)
        }
    };
    let (logs, files, folder) = (shared.to_vec(), stores.to_vec(), folder.to_owned());
    let backup_topics = Arc::clone(&sources.topics);
    Answers {
        stats: Box::new({
            let sources = Arc::clone(sources);
            move || sources.snapshot()
        }),
        topics: Box::new({
            let sources = Arc::clone(sources);
            move || {
                let info = |topic: &Arc<Topic>| TopicInfo {
                    name: topic.name.clone(),
                    internal: topic.internal,
                    settings: topic.settings.clone(),
                    partitions: topic
                        .partitions
                        .iter()
                        .map(|partition| sources.partition(partition))
                        .collect(),
                };
                sources.topics.snapshot().all().iter().map(info).collect()
            }
        }),
        read: Box::new(at),
        find: Box::new(of_position),
        keys: Box::new({
            let topics = Arc::clone(&sources.topics);
            move |topic, partition, keys, max_bytes, out| {
                let snapshot = topics.snapshot();
                let found = find(&snapshot, topic, partition)?;
                let settings = snapshot.find(topic).map(|topic| &topic.settings);
                if !settings.is_some_and(topic_settings::is_indexed) {
                    return Err(no_index(topic));
                }
                let mut reader = lock(&readers_of_keys[usize::from(found.place.shard)]);
                read_keys(&mut reader, found.key, keys, max_bytes, out)
            }
        }),
        wait: Box::new({
            let (topics, news) = (Arc::clone(&sources.topics), Arc::clone(news));
            move |topic, offsets, time| {
                let look = |at_once: bool| match ends(&topics.snapshot(), topic) {
                    Err(gone) => Some(Err(gone)),
                    Ok(ends) => {
                        let news = ends.len() > offsets.len()
                            || ends.iter().zip(offsets).any(|(end, offset)| end > offset);
                        (news || at_once).then_some(Ok(ends))
                    }
                };
                let found = news.wait(time, || look(false));
                let found = found.map_err(|stopping| stopping.to_string())?;
                found
                    .or_else(|| look(true))
                    .unwrap_or_else(|| Ok(Vec::new()))
            }
        }),
        backup: Box::new(move |to| {
            settle(&backup_topics)?;
            let shards: Vec<backup::Running> = logs
                .iter()
                .zip(&files)
                .map(|(log, store)| backup::Running { log, store })
                .collect();
            backup::running(&folder, &shards, to).map_err(|error| error.to_string())
        }),
        change: Box::new({
            let (sources, news) = (Arc::clone(sources), Arc::clone(news));
            move |asked| {
                change(&sources, asked)?;
                // Who follows a topic looks whether it has more partitions, or is gone.
                news.wake().wake();
                Ok(())
            }
        }),
        groups: Box::new(LiveGroups {
            sources: Arc::clone(sources),
        }),
    }
}

/// The offset behind the newest durable message of each of a topic's partitions.
fn ends(snapshot: &Snapshot, topic: &str) -> Result<Vec<i64>, String> {
    let found = snapshot.find(topic).ok_or_else(|| unknown(snapshot, topic));
    let end = |partition: &Partition| partition.stats.high_watermark();
    Ok(found?.partitions.iter().map(end).collect())
}

fn change(sources: &Sources, change: TopicChange) -> Result<(), String> {
    let topics = &sources.topics;
    let known = |name: &str| {
        let snapshot = topics.snapshot();
        match snapshot.find(name) {
            None => Err(unknown(&snapshot, name)),
            Some(topic) if topic.internal => Err(format!("topic {name} is the server's own")),
            Some(_) => Ok(()),
        }
    };
    let changed = match change {
        TopicChange::Create {
            name,
            partitions,
            settings,
        } => {
            if name == OFFSETS_TOPIC {
                return Err(format!("topic {name} is the server's own"));
            }
            let spec = TopicSpec {
                name,
                partitions,
                settings,
            };
            topics.create(&spec, false, false)
        }
        TopicChange::Delete { name } => {
            known(&name)?;
            let deleted = topics.delete(&name);
            if deleted.is_ok()
                && let Some(broker) = sources.kafka.get()
            {
                let now = group_time(broker.now());
                broker.hub.topic_deleted(None, now, &name);
            }
            deleted
        }
        TopicChange::AddPartitions { name, partitions } => {
            known(&name)?;
            topics.add_partitions(&name, partitions, false)
        }
        TopicChange::Alter { name, settings } => {
            known(&name)?;
            topics.alter(&name, &settings, false)
        }
    };
    changed.map_err(|error| error.to_string())
}

/// The coordinator's groups, where Kafka's protocol is served.
struct LiveGroups {
    sources: Arc<Sources>,
}

impl LiveGroups {
    fn broker(&self) -> Result<&Broker, String> {
        let broker = self.sources.kafka.get().map(|broker| &**broker);
        broker.ok_or_else(|| {
            "this server has no consumer groups: its configuration has no [kafka]".to_owned()
        })
    }

    fn call(&self, request: Request<'_>) -> Result<Response, String> {
        let broker = self.broker()?;
        let response = broker.hub.call(request, group_time(broker.now()));
        response.map_err(|error| error.to_string())
    }

    fn described(&self, group: &str) -> Result<DescribedGroup<'static>, String> {
        let request = DescribeGroupsRequest {
            groups: vec![group.into()],
            ..DescribeGroupsRequest::default()
        };
        match self.call(Request::DescribeGroups(request))? {
            Response::DescribeGroups(mut answer) if answer.groups.len() == 1 => {
                let described = answer.groups.remove(0);
                refused(group, described.error_code)?;
                Ok(described)
            }
            other => Err(unexpected(&other)),
        }
    }

    fn offsets(&self, group: &str) -> Result<Vec<OffsetFetchTopic<'static>>, String> {
        let request = OffsetFetchRequest {
            groups: vec![OffsetFetchGroup {
                group_id: group.into(),
                topics: None,
            }],
            ..OffsetFetchRequest::default()
        };
        match self.call(Request::OffsetFetch(request))? {
            Response::OffsetFetch(mut answer) if answer.groups.len() == 1 => {
                let fetched = answer.groups.remove(0);
                refused(group, fetched.error_code)?;
                Ok(fetched.topics)
            }
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(response: &Response) -> String {
    format!("the coordinator answered something else: {response:?}")
}

/// What a refusal means for an operator.
fn refused(group: &str, code: Code) -> Result<(), String> {
    Err(match code {
        Code::None => return Ok(()),
        Code::NonEmptyGroup
        | Code::UnknownMemberId
        | Code::IllegalGeneration
        | Code::RebalanceInProgress => {
            format!(
                "group {group} has members: stop them first, `taffrail group describe {group}` names them"
            )
        }
        Code::GroupIdNotFound => format!("there is no group {group}"),
        code => format!("group {group}: {}", code.message()),
    })
}

impl Groups for LiveGroups {
    fn list(&self) -> Result<Vec<GroupSummary>, String> {
        let mut groups: Vec<GroupSummary> =
            match self.call(Request::ListGroups(ListGroupsRequest::default()))? {
                Response::ListGroups(answer) => answer
                    .groups
                    .into_iter()
                    .map(|group| GroupSummary {
                        group: group.group_id.into_owned(),
                        state: group.group_state.into_owned(),
                        protocol_type: group.protocol_type.into_owned(),
                    })
                    .collect(),
                other => return Err(unexpected(&other)),
            };
        groups.sort_by(|a, b| a.group.cmp(&b.group));
        Ok(groups)
    }

    fn describe(&self, group: &str) -> Result<GroupInfo, String> {
        let described = self.described(group)?;
        let consumer = described.protocol_type == "consumer";
        let mut members = Vec::new();
        let mut readers: HashMap<(String, u32), String> = HashMap::new();
        for member in described.members {
            let mut assignment: BTreeMap<String, Vec<u32>> = BTreeMap::new();
            // Without an assignment yet there is nothing in it; that of other types is not known.
            if consumer && let Ok(topics) = assigned_partitions(&member.member_assignment) {
                for (topic, partitions) in topics {
                    let mut partitions: Vec<u32> =
                        partitions.into_iter().map(|p| p.max(0) as u32).collect();
                    partitions.sort_unstable();
                    for &partition in &partitions {
                        let id = member.member_id.clone().into_owned();
                        readers.insert((topic.to_owned(), partition), id);
                    }
                    assignment.insert(topic.to_owned(), partitions);
                }
            }
            members.push(GroupMember {
                member: member.member_id.into_owned(),
                instance: member.group_instance_id.map(|id| id.into_owned()),
                client_id: member.client_id.into_owned(),
                host: member.client_host.into_owned(),
                assignment,
            });
        }
        members.sort_by(|a, b| a.member.cmp(&b.member));
        let snapshot = self.sources.topics.snapshot();
        let mut partitions: BTreeMap<(String, u32), GroupPartition> = BTreeMap::new();
        let mut add = |topic: &str, partition: u32, committed: Option<i64>, metadata: String| {
            let found = snapshot.find(topic);
            let stats = found
                .and_then(|t| t.partitions.get(partition as usize))
                .map(|p| &p.stats);
            let end = stats.map(|stats| stats.high_watermark());
            let key = (topic.to_owned(), partition);
            let member = readers.get(&key).cloned();
            partitions.entry(key).or_insert_with(|| GroupPartition {
                topic: topic.to_owned(),
                partition,
                committed,
                metadata,
                start: stats.map(|stats| stats.start_offset()),
                end,
                lag: end
                    .zip(committed)
                    .map(|(end, committed)| (end - committed).max(0)),
                member,
            });
        };
        for topic in self.offsets(group)? {
            for partition in topic.partitions {
                let index = partition.partition_index.max(0) as u32;
                let metadata = partition.metadata.unwrap_or_default().into_owned();
                let committed = Some(partition.committed_offset).filter(|&offset| offset >= 0);
                add(&topic.name, index, committed, metadata);
            }
        }
        for member in &members {
            for (topic, list) in &member.assignment {
                for &partition in list {
                    add(topic, partition, None, String::new());
                }
            }
        }
        Ok(GroupInfo {
            group: group.to_owned(),
            state: described.group_state.into_owned(),
            protocol_type: described.protocol_type.into_owned(),
            assignor: described.protocol_data.into_owned(),
            members,
            partitions: partitions.into_values().collect(),
        })
    }

    fn commit(&self, group: &str, offsets: &CommittedOffsets) -> Result<(), String> {
        let snapshot = self.sources.topics.snapshot();
        let mut topics = Vec::new();
        for (topic, partitions) in offsets {
            let mut list = Vec::new();
            for (&partition, &offset) in partitions {
                find(&snapshot, topic, partition)?;
                if offset < 0 {
                    return Err(format!("{topic} {partition}: {offset} is no offset"));
                }
                list.push(OffsetCommitPartition {
                    partition_index: partition as i32,
                    committed_offset: offset,
                    committed_leader_epoch: -1,
                    committed_metadata: None,
                });
            }
            topics.push(OffsetCommitTopic {
                name: topic.as_str().into(),
                partitions: list,
            });
        }
        let request = OffsetCommitRequest {
            group_id: group.into(),
            generation_id_or_member_epoch: -1,
            retention_time_ms: -1,
            topics,
            ..OffsetCommitRequest::default()
        };
        match self.call(Request::OffsetCommit(request))? {
            Response::OffsetCommit(answer) => {
                let partitions = answer.topics.iter().flat_map(|topic| &topic.partitions);
                partitions
                    .into_iter()
                    .try_for_each(|partition| refused(group, partition.error_code))
            }
            other => Err(unexpected(&other)),
        }
    }

    fn delete(&self, group: &str) -> Result<(), String> {
        let request = DeleteGroupsRequest {
            groups_names: vec![group.into()],
        };
        match self.call(Request::DeleteGroups(request))? {
            Response::DeleteGroups(answer) => answer
                .results
                .iter()
                .try_for_each(|result| refused(group, result.error_code)),
            other => Err(unexpected(&other)),
        }
    }
}

fn unknown(snapshot: &Snapshot, topic: &str) -> String {
    names::unknown_topic(topic, snapshot.all().iter().map(|t| t.name.as_str()))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn find(snapshot: &Snapshot, topic: &str, partition: u32) -> Result<Partition, String> {
    let Some(found) = snapshot.find(topic) else {
        return Err(unknown(snapshot, topic));
    };
    let found = found.partitions.get(partition as usize).cloned();
    found.ok_or_else(|| {
        let last = snapshot
            .find(topic)
            .map_or(0, |t| t.partitions.len().saturating_sub(1));
        format!("topic {topic} has partitions 0 to {last}")
    })
}
