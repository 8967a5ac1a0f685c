//! Offsets are committed, fetched, deleted and expire; groups are described, listed and deleted.
//!
//! An offset is expired when it is older than the retention: counted from its commit for groups that
//! only commit, from the time when the group lost its last member for those that have members, and for
//! stable groups of consumers from its commit where no member subscribes to its topic any more. A group
//! without members and offsets goes with the last of them.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::*;
use crate::storage::catalog::MAX_TOPIC_NAME;

/// More than a record of an offset takes in memory while it is under way, beside group, topic and
/// metadata: key and value, their owners, and what its end means.
const RECORD_COST: usize = 320;

/// Memory of an offset's record, and of its effect, while it is under way.
fn cost_under_way(group: &str, topic: &str, metadata_len: usize) -> usize {
    RECORD_COST + group.len() + topic.len() + 2 * metadata_len
}

impl Coordinator {
    pub(super) fn commit(&mut self, token: Token, version: i16, request: &OffsetCommitRequest<'_>) {
        if !self.groups.contains_key(&*request.group_id) {
            let error = if request.generation_id_or_member_epoch < 0 {
                match self.may_create(&request.group_id) {
                    true => None,
                    false => Some(Code::CoordinatorNotAvailable),
                }
            } else if version >= 9 {
                Some(Code::GroupIdNotFound)
            } else {
                Some(Code::IllegalGeneration)
            };
            if let Some(error) = error {
                let response = refused_commit(request, error);
                return self.io.answer(token, Response::OffsetCommit(response));
            }
            group_entry(&mut self.groups, &mut self.io, &request.group_id);
        }
        self.with(&request.group_id, |group, io| {
            let result = match group {
                Some(group) => group.commit(io, token, request),
                None => Err(Code::UnknownServerError),
            };
            if let Err(error) = result {
                let response = refused_commit(request, error);
                io.answer(token, Response::OffsetCommit(response));
            }
        });
    }

    pub(super) fn fetch(&mut self, token: Token, version: i16, request: &OffsetFetchRequest<'_>) {
        let response = if version >= 8 {
            OffsetFetchResponse {
                groups: request
                    .groups
                    .iter()
                    .map(|asked| OffsetFetchGroupResult {
                        group_id: asked.group_id.to_string().into(),
                        topics: self.offsets_of(&asked.group_id, asked.topics.as_deref()),
                        error_code: Code::None,
                    })
                    .collect(),
                ..OffsetFetchResponse::default()
            }
        } else {
            OffsetFetchResponse {
                topics: self.offsets_of(&request.group_id, request.topics.as_deref()),
                ..OffsetFetchResponse::default()
            }
        };
        self.io.answer(token, Response::OffsetFetch(response));
    }

    /// The committed offsets of these partitions, −1 where there is none, or of all that have one.
    fn offsets_of(
        &self,
        group: &str,
        topics: Option<&[TopicPartitions<'_>]>,
    ) -> Vec<OffsetFetchTopic<'static>> {
        let offsets = self.groups.get(group).map(|group| &group.offsets);
        match topics {
            Some(topics) => topics
                .iter()
                .map(|topic| {
                    let committed = offsets.and_then(|offsets| offsets.get(&*topic.name));
                    let partitions = topic.partition_indexes.iter().map(|&partition| {
                        let value = committed.and_then(|committed| committed.get(&partition));
                        fetched(partition, value)
                    });
                    OffsetFetchTopic {
                        name: topic.name.to_string().into(),
                        partitions: partitions.collect(),
                    }
                })
                .collect(),
            None => offsets
                .into_iter()
                .flatten()
                .map(|(topic, committed)| OffsetFetchTopic {
                    name: topic.to_string().into(),
                    partitions: committed
                        .iter()
                        .map(|(&partition, value)| fetched(partition, Some(value)))
                        .collect(),
                })
                .collect(),
        }
    }

    pub(super) fn delete_offsets(&mut self, token: Token, request: &OffsetDeleteRequest<'_>) {
        self.with(&request.group_id, |group, io| {
            let result = match group {
                Some(group) => group.delete_offsets(io, token, request),
                None => Err(Code::GroupIdNotFound),
            };
            if let Err(error_code) = result {
                let response = OffsetDeleteResponse {
                    error_code,
                    ..OffsetDeleteResponse::default()
                };
                io.answer(token, Response::OffsetDelete(response));
            }
        });
    }

    pub(super) fn describe(&mut self, token: Token, request: &DescribeGroupsRequest<'_>) {
        let groups = request
            .groups
            .iter()
            .map(|id| match self.groups.get(&**id) {
                Some(group) => group.describe(),
                None => DescribedGroup {
                    group_id: id.to_string().into(),
                    group_state: "Dead".into(),
                    ..DescribedGroup::default()
                },
            })
            .collect();
        let response = DescribeGroupsResponse {
            groups,
            ..DescribeGroupsResponse::default()
        };
        self.io.answer(token, Response::DescribeGroups(response));
    }

    pub(super) fn list(&mut self, token: Token, request: &ListGroupsRequest<'_>) {
        let wanted = |state: State| {
            request.states_filter.is_empty()
                || request
                    .states_filter
                    .iter()
                    .any(|wanted| wanted.eq_ignore_ascii_case(state.name()))
        };
        let groups = self
            .groups
            .values()
            .filter(|group| wanted(group.state))
            .map(|group| ListedGroup {
                group_id: group.id.to_string().into(),
                protocol_type: group.protocol_type.clone().unwrap_or_default().into(),
                group_state: group.state.name().into(),
            })
            .collect();
        let response = ListGroupsResponse {
            groups,
            ..ListGroupsResponse::default()
        };
        self.io.answer(token, Response::ListGroups(response));
    }

    pub(super) fn delete_groups(&mut self, token: Token, request: &DeleteGroupsRequest<'_>) {
        let results = request
            .groups_names
            .iter()
            .map(|id| DeletedGroup {
                group_id: id.to_string().into(),
                error_code: Code::None,
            })
            .collect();
        let response = DeleteGroupsResponse {
            results,
            ..DeleteGroupsResponse::default()
        };
        let job = self.io.begin_job(token, Response::DeleteGroups(response));
        let ids: BTreeSet<&str> = request.groups_names.iter().map(|id| &**id).collect();
        for id in ids {
            let result = self.with(id, |group, io| match group {
                Some(group) => group.delete(io, Some(job)),
                None => Err(Code::GroupIdNotFound),
            });
            if let Err(error) = result
                && let Some(job) = self.io.jobs.get_mut(&job)
            {
                spoil(&mut job.response, id, error);
            }
        }
        self.io.step_job(job, None);
    }

    /// Lets go of what is expired.
    pub(super) fn expire(&mut self) {
        let ids: Vec<Arc<str>> = self.groups.keys().cloned().collect();
        for id in ids {
            // A long list goes out in several rounds.
            if self.io.in_flight_bytes > self.io.config.max_in_flight_bytes / 2 {
                return;
            }
            self.with(&id, |group, io| {
                if let Some(group) = group {
                    group.expire(io);
                }
            });
        }
    }
}

fn fetched(partition: i32, value: Option<&CommittedOffset>) -> OffsetFetchPartition<'static> {
    match value {
        Some(value) => OffsetFetchPartition {
            partition_index: partition,
            committed_offset: value.offset,
            committed_leader_epoch: value.leader_epoch,
            metadata: Some(value.metadata.to_string().into()),
            error_code: Code::None,
        },
        None => OffsetFetchPartition {
            partition_index: partition,
            committed_offset: -1,
            committed_leader_epoch: -1,
            metadata: Some("".into()),
            error_code: Code::None,
        },
    }
}

/// Every partition of a commit with the same error.
pub(super) fn refused_commit(
    request: &OffsetCommitRequest<'_>,
    error_code: Code,
) -> OffsetCommitResponse<'static> {
    let topics = request
        .topics
        .iter()
        .map(|topic| TopicResults {
            name: topic.name.to_string().into(),
            partitions: topic
                .partitions
                .iter()
                .map(|partition| PartitionResult {
                    partition_index: partition.partition_index,
                    error_code,
                })
                .collect(),
        })
        .collect();
    OffsetCommitResponse {
        topics,
        ..OffsetCommitResponse::default()
    }
}

/// An error where the version has place for it: each partition, the whole, or each group.
pub(super) fn refused_fetch(
    request: &OffsetFetchRequest<'_>,
    version: i16,
    error_code: Code,
) -> OffsetFetchResponse<'static> {
    let mut response = OffsetFetchResponse::default();
    if version >= 8 {
        response.groups = request
            .groups
            .iter()
            .map(|asked| OffsetFetchGroupResult {
                group_id: asked.group_id.to_string().into(),
                topics: Vec::new(),
                error_code,
            })
            .collect();
    } else if version >= 2 {
        response.error_code = error_code;
    } else {
        response.topics = request
            .topics
            .iter()
            .flatten()
            .map(|topic| OffsetFetchTopic {
                name: topic.name.to_string().into(),
                partitions: topic
                    .partition_indexes
                    .iter()
                    .map(|&partition| OffsetFetchPartition {
                        error_code,
                        ..fetched(partition, None)
                    })
                    .collect(),
            })
            .collect();
    }
    response
}

/// Puts an error into the answer of a request whose append failed: wherever there was none yet.
pub(super) fn spoil(response: &mut Response, group: &str, error: Code) {
    let partitions = |topics: &mut Vec<TopicResults<'static>>| {
        for partition in topics.iter_mut().flat_map(|topic| &mut topic.partitions) {
            if partition.error_code == Code::None {
                partition.error_code = error;
            }
        }
    };
    match response {
        Response::OffsetCommit(response) => partitions(&mut response.topics),
        Response::OffsetDelete(response) => partitions(&mut response.topics),
        Response::DeleteGroups(response) => {
            for result in &mut response.results {
                if result.group_id == group && result.error_code == Code::None {
                    result.error_code = error;
                }
            }
        }
        _ => {}
    }
}

impl Group {
    fn validate_commit(&self, request: &OffsetCommitRequest<'_>) -> Result<(), Code> {
        let (id, instance) = (&*request.member_id, request.group_instance_id.as_deref());
        if request.generation_id_or_member_epoch < 0 && self.state == State::Empty {
            // Who assigns its partitions itself, or an administrator.
            return Ok(());
        }
        if request.generation_id_or_member_epoch >= 0 || !id.is_empty() || instance.is_some() {
            self.validate_member(id, instance)?;
            if request.generation_id_or_member_epoch != self.generation {
                return Err(Code::IllegalGeneration);
            }
        } else {
            return Err(Code::UnknownMemberId);
        }
        match self.state {
            // Before, a member may still commit what it had; now the partitions may be another's.
            State::CompletingRebalance => Err(Code::RebalanceInProgress),
            _ => Ok(()),
        }
    }

    fn commit(
        &mut self,
        io: &mut Io,
        token: Token,
        request: &OffsetCommitRequest<'_>,
    ) -> Result<(), Code> {
        self.validate_commit(request)?;
        self.renew_session(io, &request.member_id, None);
        let max_metadata = io.config.max_offset_metadata;
        let refusal = |topic: &str, metadata: &str| {
            if topic.is_empty() || topic.len() > MAX_TOPIC_NAME {
                Code::InvalidTopicException
            } else if metadata.len() > max_metadata {
                Code::OffsetMetadataTooLarge
            } else {
                Code::None
            }
        };
        let (mut growth, mut under_way) = (0, 0);
        for topic in &request.topics {
            for partition in &topic.partitions {
                let metadata = partition.committed_metadata.as_deref().unwrap_or_default();
                if refusal(&topic.name, metadata) == Code::None {
                    growth += self.growth(&topic.name, partition.partition_index, metadata.len());
                    under_way += cost_under_way(&self.id, &topic.name, metadata.len());
                }
            }
        }
        if !io.has_room(growth, under_way) {
            return Err(Code::CoordinatorNotAvailable);
        }

        let mut response = refused_commit(request, Code::None);
        let mut changes = Vec::new();
        let committed_ms = io.now.unix_ms;
        let expires_ms = Some(request.retention_time_ms)
            .filter(|&ms| ms >= 0)
            .map(|ms| committed_ms.saturating_add(ms));
        for (topic, results) in request.topics.iter().zip(&mut response.topics) {
            let name: Arc<str> = match self.offsets.get_key_value(&*topic.name) {
                Some((name, _)) => name.clone(),
                None => (&*topic.name).into(),
            };
            for (partition, result) in topic.partitions.iter().zip(&mut results.partitions) {
                let metadata = partition.committed_metadata.as_deref().unwrap_or_default();
                result.error_code = refusal(&topic.name, metadata);
                if result.error_code == Code::None {
                    let value = CommittedOffset {
                        offset: partition.committed_offset,
                        leader_epoch: partition.committed_leader_epoch,
                        metadata: metadata.into(),
                        committed_ms,
                        expires_ms,
                    };
                    changes.push((name.clone(), partition.partition_index, Some(value)));
                }
            }
        }
        let job = io.begin_job(token, Response::OffsetCommit(response));
        self.append_offsets(io, changes, Some(job));
        io.step_job(job, None);
        Ok(())
    }

    /// Appends records of offsets, in as many appends as the log's limit asks for.
    fn append_offsets(
        &mut self,
        io: &mut Io,
        changes: Vec<(Arc<str>, i32, Option<CommittedOffset>)>,
        job: Option<u64>,
    ) {
        let (mut records, mut effects, mut bytes) = (Vec::new(), Vec::new(), 0);
        for (topic, partition, value) in changes {
            let record = records::offset_record(&self.id, &topic, partition, value.as_ref());
            // Beside key and value a record takes some bytes in its batch.
            let size = record.size() + 32;
            if bytes + size > io.config.max_append_bytes && !records.is_empty() {
                let effect = Effect::Offsets(std::mem::take(&mut effects));
                self.append(io, std::mem::take(&mut records), effect, job);
                bytes = 0;
            }
            bytes += size;
            records.push(record);
            effects.push((topic, partition, value));
        }
        if !records.is_empty() {
            self.append(io, records, Effect::Offsets(effects), job);
        }
    }

    /// Deletes offsets.
    pub(super) fn forget_offsets(
        &mut self,
        io: &mut Io,
        gone: impl IntoIterator<Item = (Arc<str>, i32)>,
        job: Option<u64>,
    ) {
        let changes = gone
            .into_iter()
            .map(|(topic, partition)| (topic, partition, None))
            .collect();
        self.append_offsets(io, changes, job);
    }

    fn delete_offsets(
        &mut self,
        io: &mut Io,
        token: Token,
        request: &OffsetDeleteRequest<'_>,
    ) -> Result<(), Code> {
        if self.state != State::Empty && self.protocol_type.as_deref() != Some(CONSUMER) {
            return Err(Code::NonEmptyGroup);
        }
        let subscribed = self.subscribed_topics();
        let known = self.known_offsets();
        let (mut gone, mut under_way) = (BTreeSet::new(), 0);
        let mut topics = Vec::with_capacity(request.topics.len());
        for topic in &request.topics {
            let name: Arc<str> = (&*topic.name).into();
            let error_code = if self.is_subscribed(subscribed.as_ref(), &name) {
                Code::GroupSubscribedToTopic
            } else {
                Code::None
            };
            for partition in &topic.partitions {
                let offset = (name.clone(), partition.partition_index);
                if error_code == Code::None && known.contains(&offset) && gone.insert(offset) {
                    under_way += cost_under_way(&self.id, &name, 0);
                }
            }
            topics.push(TopicResults {
                name: topic.name.to_string().into(),
                partitions: topic
                    .partitions
                    .iter()
                    .map(|partition| PartitionResult {
                        partition_index: partition.partition_index,
                        error_code,
                    })
                    .collect(),
            });
        }
        if !io.has_room(0, under_way) {
            return Err(Code::CoordinatorNotAvailable);
        }
        let response = OffsetDeleteResponse {
            topics,
            ..OffsetDeleteResponse::default()
        };
        let job = io.begin_job(token, Response::OffsetDelete(response));
        self.forget_offsets(io, gone, Some(job));
        io.step_job(job, None);
        Ok(())
    }

    fn describe(&self) -> DescribedGroup<'static> {
        // Metadata is shown only where the group has settled on a protocol.
        let protocol = match self.state {
            State::Stable => self.protocol.as_deref().unwrap_or_default(),
            _ => "",
        };
        let members = self
            .members
            .iter()
            .map(|(id, member)| DescribedMember {
                member_id: id.to_string().into(),
                group_instance_id: member.instance_id.as_ref().map(|id| id.to_string().into()),
                client_id: member.client_id.clone().into(),
                client_host: member.client_host.clone().into(),
                member_metadata: member
                    .metadata(protocol)
                    .unwrap_or_default()
                    .to_vec()
                    .into(),
                member_assignment: member.assignment.clone().into(),
            })
            .collect();
        DescribedGroup {
            group_id: self.id.to_string().into(),
            group_state: self.state.name().into(),
            protocol_type: self.protocol_type.clone().unwrap_or_default().into(),
            protocol_data: protocol.to_owned().into(),
            members,
            ..DescribedGroup::default()
        }
    }

    /// Deletes the group with its offsets; ids that were given out and not used are forgotten.
    fn delete(&mut self, io: &mut Io, job: Option<u64>) -> Result<(), Code> {
        if self.state != State::Empty {
            return Err(Code::NonEmptyGroup);
        }
        let gone = self.known_offsets();
        let under_way = gone
            .iter()
            .map(|(topic, _)| cost_under_way(&self.id, topic, 0))
            .sum();
        if !io.has_room(0, under_way) {
            return Err(Code::CoordinatorNotAvailable);
        }
        let pending: Vec<Arc<str>> = self.pending.keys().cloned().collect();
        for id in &pending {
            self.drop_pending(io, id);
        }
        self.forget_offsets(io, gone, job);
        self.bury(io, job);
        Ok(())
    }

    /// Deletes the group's own record, if the log has one.
    fn bury(&mut self, io: &mut Io, job: Option<u64>) {
        if self.persisted {
            let record = records::group_record(&self.id, None);
            self.append(io, vec![record], Effect::Deleted, job);
        }
    }

    fn expire(&mut self, io: &mut Io) {
        // What is under way may change what is expired: the next time will do.
        if !self.in_flight.is_empty() {
            return;
        }
        let now = io.now.unix_ms;
        let retention = i64::try_from(io.config.offsets_retention_ms).unwrap_or(i64::MAX);
        let has_members = self.protocol_type.is_some();
        let subscribed = self.subscribed_topics();
        let counts_from_emptied = has_members && self.state == State::Empty;
        if has_members
            && self.state != State::Empty
            && (self.state != State::Stable || subscribed.is_none())
        {
            return;
        }
        let is_expired = |value: &CommittedOffset| match value.expires_ms {
            Some(at) => now >= at,
            None => {
                let since = match self.state_since {
                    Some(since) if counts_from_emptied => since,
                    _ => value.committed_ms,
                };
                now.saturating_sub(since) >= retention
            }
        };
        let mut gone = Vec::new();
        let mut left = false;
        for (topic, partitions) in &self.offsets {
            let keep = self.is_subscribed(subscribed.as_ref(), topic);
            for (&partition, value) in partitions {
                if keep || !is_expired(value) {
                    left = true;
                } else {
                    gone.push((topic.clone(), partition));
                }
            }
        }
        self.forget_offsets(io, gone, None);
        if !left && self.state == State::Empty && self.pending.is_empty() {
            self.bury(io, None);
        }
    }
}
