//! What of a group request its client may not do: taken out before the coordinator sees it, and put into the
//! answer.
//!
//! Source: Kafka's table of operations and resources. Members read their group, and the topics whose offsets
//! they commit; offsets are seen by those who may describe group and topic.

use std::borrow::Cow;

use super::{Request, Response};
use crate::broker::security::acl::{Access, Operation, Resource};
use crate::broker::topics::Snapshot;
use crate::wire::kafka::Code;
use crate::wire::kafka::groups::*;

/// Partitions of a topic, and why they were taken out.
struct Partitions {
    group: String,
    topic: String,
    indexes: Vec<i32>,
    code: Code,
}

/// What was taken out of a request.
pub struct Refused {
    access: Access,
    /// The group whose partitions are taken out, empty in a request for one.
    group: String,
    partitions: Vec<Partitions>,
    /// Groups, of a request for several.
    groups: Vec<String>,
    /// The answer says what the client may do to each group.
    operations: bool,
}

/// Takes out what is not allowed, and partitions that are not there out of a commit. What is returned goes to
/// [`Refused::complete`] with the coordinator's answer; an error is the answer, and nobody else is asked.
#[allow(clippy::result_large_err)] // moved once, for a request that is refused
pub fn check(
    request: &mut Request<'_>,
    access: &Access,
    snapshot: &Snapshot,
) -> Result<Refused, Response> {
    let mut refused = Refused {
        access: access.clone(),
        group: String::new(),
        partitions: Vec::new(),
        groups: Vec::new(),
        operations: false,
    };
    let group = |operation, id: &str| access.may(operation, Resource::Group(id));
    let topic = |operation, name: &str| access.may(operation, Resource::Topic(name));
    let code = Code::GroupAuthorizationFailed;
    match request {
        Request::JoinGroup(join) => {
            if !group(Operation::Read, &join.group_id) {
                return Err(Response::JoinGroup(JoinGroupResponse {
                    error_code: code,
                    generation_id: -1,
                    protocol_name: Some("".into()),
                    member_id: own(&join.member_id),
                    ..JoinGroupResponse::default()
                }));
            }
        }
        Request::SyncGroup(sync) => {
            if !group(Operation::Read, &sync.group_id) {
                return Err(Response::SyncGroup(SyncGroupResponse {
                    error_code: code,
                    ..SyncGroupResponse::default()
                }));
            }
        }
        Request::Heartbeat(beat) => {
            if !group(Operation::Read, &beat.group_id) {
                return Err(Response::Heartbeat(HeartbeatResponse {
                    error_code: code,
                    ..HeartbeatResponse::default()
                }));
            }
        }
        Request::LeaveGroup(leave) => {
            if !group(Operation::Read, &leave.group_id) {
                return Err(Response::LeaveGroup(LeaveGroupResponse {
                    error_code: code,
                    ..LeaveGroupResponse::default()
                }));
            }
        }
        Request::OffsetCommit(commit) => {
            let member = group(Operation::Read, &commit.group_id);
            for asked in &mut commit.topics {
                let code = match topic(Operation::Read, &asked.name) {
                    _ if !member => code,
                    false => Code::TopicAuthorizationFailed,
                    true => Code::UnknownTopicOrPartition,
                };
                let mut gone = Vec::new();
                asked.partitions.retain(|partition| {
                    let index = partition.partition_index;
                    let fine = code == Code::UnknownTopicOrPartition
                        && snapshot.place(&asked.name, index).is_some();
                    if !fine {
                        gone.push(index);
                    }
                    fine
                });
                refused.partitions(&asked.name, gone, code);
            }
            commit.topics.retain(|topic| !topic.partitions.is_empty());
            if !member {
                let mut answer = Response::OffsetCommit(OffsetCommitResponse::default());
                refused.complete(&mut answer);
                return Err(answer);
            }
        }
        Request::OffsetFetch(fetch) => {
            // Without a list of groups it is a request of an older version, for one.
            let one = fetch.groups.is_empty();
            if one && !group(Operation::Describe, &fetch.group_id) {
                for asked in fetch.topics.iter().flatten() {
                    refused.partitions(&asked.name, asked.partition_indexes.clone(), code);
                }
                let mut response = OffsetFetchResponse {
                    error_code: code,
                    ..OffsetFetchResponse::default()
                };
                refused.put_offsets("", &mut response.topics);
                return Err(Response::OffsetFetch(response));
            }
            fetch.groups.retain(|asked| {
                let may = group(Operation::Describe, &asked.group_id);
                if !may {
                    refused.groups.push(asked.group_id.to_string());
                }
                may
            });
            let lists = fetch
                .groups
                .iter_mut()
                .map(|g| (&*g.group_id, &mut g.topics));
            for (id, topics) in lists.chain([("", &mut fetch.topics)]) {
                refused.group = id.to_owned();
                topics.iter_mut().for_each(|topics| {
                    topics.retain(|asked| {
                        let may = topic(Operation::Describe, &asked.name);
                        if !may {
                            let code = Code::TopicAuthorizationFailed;
                            refused.partitions(&asked.name, asked.partition_indexes.clone(), code);
                        }
                        may
                    });
                });
            }
        }
        Request::OffsetDelete(delete) => {
            if !group(Operation::Delete, &delete.group_id) {
                return Err(Response::OffsetDelete(OffsetDeleteResponse {
                    error_code: code,
                    ..OffsetDeleteResponse::default()
                }));
            }
            delete.topics.retain(|asked| {
                let may = topic(Operation::Read, &asked.name);
                if !may {
                    let all = asked.partitions.iter().map(|p| p.partition_index).collect();
                    refused.partitions(&asked.name, all, Code::TopicAuthorizationFailed);
                }
                may
            });
        }
        Request::DescribeGroups(describe) => {
            refused.operations = describe.include_authorized_operations;
            refused.take(&mut describe.groups, Operation::Describe);
        }
        Request::DeleteGroups(delete) => {
            refused.take(&mut delete.groups_names, Operation::Delete);
        }
        Request::ListGroups(_) => {}
    }
    Ok(refused)
}

fn own(text: &str) -> Cow<'static, str> {
    Cow::Owned(text.to_owned())
}

impl Refused {
    fn partitions(&mut self, topic: &str, indexes: Vec<i32>, code: Code) {
        if !indexes.is_empty() {
            self.partitions.push(Partitions {
                group: self.group.clone(),
                topic: topic.to_owned(),
                indexes,
                code,
            });
        }
    }

    fn take(&mut self, groups: &mut Vec<Cow<'_, str>>, operation: Operation) {
        groups.retain(|id| {
            let may = self.access.may(operation, Resource::Group(id));
            if !may {
                self.groups.push(id.to_string());
            }
            may
        });
    }

    fn results(&self) -> impl Iterator<Item = TopicResults<'static>> + '_ {
        self.partitions.iter().map(|refused| {
            let result = |&partition_index: &i32| PartitionResult {
                partition_index,
                error_code: refused.code,
            };
            TopicResults {
                name: own(&refused.topic),
                partitions: refused.indexes.iter().map(result).collect(),
            }
        })
    }

    fn put_offsets(&self, group: &str, topics: &mut Vec<OffsetFetchTopic<'static>>) {
        for refused in self.partitions.iter().filter(|p| p.group == group) {
            let nothing = |&partition_index: &i32| OffsetFetchPartition {
                partition_index,
                committed_offset: -1,
                committed_leader_epoch: -1,
                metadata: Some("".into()),
                error_code: refused.code,
            };
            topics.push(OffsetFetchTopic {
                name: own(&refused.topic),
                partitions: refused.indexes.iter().map(nothing).collect(),
            });
        }
    }

    /// Puts what was taken out into the answer, and takes out of it what the client may not see.
    pub fn complete(&self, response: &mut Response) {
        let access = &self.access;
        let sees = |name: &str| access.may(Operation::Describe, Resource::Topic(name));
        let code = Code::GroupAuthorizationFailed;
        match response {
            Response::OffsetCommit(commit) => commit.topics.extend(self.results()),
            Response::OffsetDelete(delete) if delete.error_code == Code::None => {
                delete.topics.extend(self.results());
            }
            Response::OffsetFetch(fetch) => {
                fetch.topics.retain(|topic| sees(&topic.name));
                self.put_offsets("", &mut fetch.topics);
                for group in &mut fetch.groups {
                    group.topics.retain(|topic| sees(&topic.name));
                    self.put_offsets(&group.group_id, &mut group.topics);
                }
                let refused = self.groups.iter().map(|id| OffsetFetchGroupResult {
                    group_id: own(id),
                    topics: Vec::new(),
                    error_code: code,
                });
                fetch.groups.extend(refused);
            }
            Response::DescribeGroups(described) => {
                if self.operations {
                    for group in &mut described.groups {
                        let resource = Resource::Group(&group.group_id);
                        group.authorized_operations = access.operations(resource);
                    }
                }
                let refused = self.groups.iter().map(|id| DescribedGroup {
                    error_code: code,
                    group_id: own(id),
                    authorized_operations: i32::MIN,
                    ..DescribedGroup::default()
                });
                described.groups.extend(refused);
            }
            Response::DeleteGroups(deleted) => {
                let refused = self.groups.iter().map(|id| DeletedGroup {
                    group_id: own(id),
                    error_code: code,
                });
                deleted.results.extend(refused);
            }
            Response::ListGroups(listed) if !access.may(Operation::Describe, Resource::Cluster) => {
                listed.groups.retain(|group| {
                    access.may(Operation::Describe, Resource::Group(&group.group_id))
                });
            }
            _ => {}
        }
    }
}
