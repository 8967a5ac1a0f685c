//! Messages of consumer groups and committed offsets.
//!
//! Source: Kafka's message definitions of FindCoordinator, JoinGroup, SyncGroup, Heartbeat, LeaveGroup,
//! OffsetCommit, OffsetFetch, OffsetDelete, DescribeGroups, ListGroups and DeleteGroups, each Request and
//! Response.

pub mod admin;
pub mod membership;
pub mod offsets;

pub use admin::*;
pub use membership::*;
pub use offsets::*;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::kafka::Code;
    use crate::wire::kafka::oracle::check_message;

    const ERROR: Code = Code::CoordinatorNotAvailable;

    fn since<T>(version: i16, first: i16, value: T) -> Option<T> {
        (version >= first).then_some(value)
    }

    #[test]
    fn membership_agrees_with_the_oracle() {
        check_message!(
            JoinGroup,
            2..=9,
            JoinGroupRequest,
            JoinGroupRequest,
            |version| {
                JoinGroupRequest {
                    group_id: "g".into(),
                    session_timeout_ms: 10_000,
                    rebalance_timeout_ms: 60_000,
                    member_id: "m".into(),
                    group_instance_id: since(version, 5, "i".into()),
                    protocol_type: "consumer".into(),
                    protocols: vec![JoinGroupProtocol {
                        name: "range".into(),
                        metadata: b""[..].into(),
                    }],
                    reason: since(version, 8, "why".into()),
                }
            }
        );
        check_message!(
            JoinGroup,
            2..=9,
            JoinGroupResponse,
            JoinGroupResponse,
            |version| {
                JoinGroupResponse {
                    throttle_time_ms: 7,
                    error_code: ERROR,
                    generation_id: 3,
                    protocol_type: since(version, 7, "consumer".into()),
                    protocol_name: Some("range".into()),
                    leader: "l".into(),
                    skip_assignment: version >= 9,
                    member_id: "m".into(),
                    members: vec![JoinGroupMember {
                        member_id: "m".into(),
                        group_instance_id: since(version, 5, "i".into()),
                        metadata: b""[..].into(),
                    }],
                }
            }
        );
        check_message!(
            SyncGroup,
            0..=5,
            SyncGroupRequest,
            SyncGroupRequest,
            |version| {
                SyncGroupRequest {
                    group_id: "g".into(),
                    generation_id: 3,
                    member_id: "m".into(),
                    group_instance_id: since(version, 3, "i".into()),
                    protocol_type: since(version, 5, "consumer".into()),
                    protocol_name: since(version, 5, "range".into()),
                    assignments: vec![SyncGroupAssignment {
                        member_id: "m".into(),
                        assignment: b""[..].into(),
                    }],
                }
            }
        );
        check_message!(
            SyncGroup,
            1..=5,
            SyncGroupResponse,
            SyncGroupResponse,
            |version| {
                SyncGroupResponse {
                    throttle_time_ms: 7,
                    error_code: ERROR,
                    protocol_type: since(version, 5, "consumer".into()),
                    protocol_name: since(version, 5, "range".into()),
                    assignment: b""[..].into(),
                }
            }
        );
        check_message!(
            Heartbeat,
            0..=4,
            HeartbeatRequest,
            HeartbeatRequest,
            |version| {
                HeartbeatRequest {
                    group_id: "g".into(),
                    generation_id: 3,
                    member_id: "m".into(),
                    group_instance_id: since(version, 3, "i".into()),
                }
            }
        );
        check_message!(
            Heartbeat,
            1..=4,
            HeartbeatResponse,
            HeartbeatResponse,
            |_| {
                HeartbeatResponse {
                    throttle_time_ms: 7,
                    error_code: ERROR,
                }
            }
        );
        check_message!(
            LeaveGroup,
            0..=5,
            LeaveGroupRequest,
            LeaveGroupRequest,
            |version| {
                let member = LeaveGroupMember {
                    member_id: "m".into(),
                    group_instance_id: Some("i".into()),
                    reason: since(version, 5, "why".into()),
                };
                LeaveGroupRequest {
                    group_id: "g".into(),
                    member_id: if version < 3 { "m".into() } else { "".into() },
                    members: since(version, 3, member).into_iter().collect(),
                }
            }
        );
        check_message!(
            LeaveGroup,
            1..=5,
            LeaveGroupResponse,
            LeaveGroupResponse,
            |version| {
                let member = LeaveGroupResult {
                    member_id: "m".into(),
                    group_instance_id: Some("i".into()),
                    error_code: ERROR,
                };
                LeaveGroupResponse {
                    throttle_time_ms: 7,
                    error_code: ERROR,
                    members: since(version, 3, member).into_iter().collect(),
                }
            }
        );
    }

    fn results() -> Vec<TopicResults<'static>> {
        vec![TopicResults {
            name: "t".into(),
            partitions: vec![PartitionResult {
                partition_index: 3,
                error_code: ERROR,
            }],
        }]
    }

    #[test]
    fn offsets_agree_with_the_oracle() {
        check_message!(
            OffsetCommit,
            2..=9,
            OffsetCommitRequest,
            OffsetCommitRequest,
            |version| {
                OffsetCommitRequest {
                    group_id: "g".into(),
                    generation_id_or_member_epoch: 3,
                    member_id: "m".into(),
                    group_instance_id: since(version, 7, "i".into()),
                    retention_time_ms: if version <= 4 { 5 } else { -1 },
                    topics: vec![OffsetCommitTopic {
                        name: "t".into(),
                        partitions: vec![OffsetCommitPartition {
                            partition_index: 3,
                            committed_offset: 1 << 40,
                            committed_leader_epoch: if version >= 6 { 4 } else { -1 },
                            committed_metadata: Some("note".into()),
                        }],
                    }],
                }
            }
        );
        check_message!(
            OffsetCommit,
            3..=9,
            OffsetCommitResponse,
            OffsetCommitResponse,
            |_| {
                OffsetCommitResponse {
                    throttle_time_ms: 7,
                    topics: results(),
                }
            }
        );
        check_message!(
            OffsetFetch,
            1..=8,
            OffsetFetchRequest,
            OffsetFetchRequest,
            |version| {
                let topics = Some(vec![TopicPartitions {
                    name: "t".into(),
                    partition_indexes: vec![3, 4],
                }]);
                if version < 8 {
                    OffsetFetchRequest {
                        group_id: "g".into(),
                        topics,
                        require_stable: version == 7,
                        ..OffsetFetchRequest::default()
                    }
                } else {
                    let group = |id: &'static str, topics| OffsetFetchGroup {
                        group_id: id.into(),
                        topics,
                    };
                    OffsetFetchRequest {
                        groups: vec![group("g", topics), group("h", None)],
                        require_stable: true,
                        ..OffsetFetchRequest::default()
                    }
                }
            }
        );
        check_message!(
            OffsetFetch,
            3..=8,
            OffsetFetchResponse,
            OffsetFetchResponse,
            |version| {
                let topics = vec![OffsetFetchTopic {
                    name: "t".into(),
                    partitions: vec![OffsetFetchPartition {
                        partition_index: 3,
                        committed_offset: 1 << 40,
                        committed_leader_epoch: if version >= 5 { 4 } else { -1 },
                        metadata: Some("note".into()),
                        error_code: ERROR,
                    }],
                }];
                if version < 8 {
                    OffsetFetchResponse {
                        throttle_time_ms: 7,
                        topics,
                        error_code: ERROR,
                        ..OffsetFetchResponse::default()
                    }
                } else {
                    OffsetFetchResponse {
                        throttle_time_ms: 7,
                        groups: vec![OffsetFetchGroupResult {
                            group_id: "g".into(),
                            topics,
                            error_code: ERROR,
                        }],
                        ..OffsetFetchResponse::default()
                    }
                }
            }
        );
        check_message!(
            OffsetDelete,
            0..=0,
            OffsetDeleteRequest,
            OffsetDeleteRequest,
            |_| {
                OffsetDeleteRequest {
                    group_id: "g".into(),
                    topics: vec![OffsetDeleteTopic {
                        name: "t".into(),
                        partitions: vec![OffsetDeletePartition { partition_index: 3 }],
                    }],
                }
            }
        );
        check_message!(
            OffsetDelete,
            0..=0,
            OffsetDeleteResponse,
            OffsetDeleteResponse,
            |_| {
                OffsetDeleteResponse {
                    error_code: ERROR,
                    throttle_time_ms: 7,
                    topics: results(),
                }
            }
        );
    }

    #[test]
    fn administration_agrees_with_the_oracle() {
        check_message!(
            FindCoordinator,
            1..=4,
            FindCoordinatorRequest,
            FindCoordinatorRequest,
            |version| FindCoordinatorRequest {
                key: if version < 4 { "g".into() } else { "".into() },
                key_type: 1,
                coordinator_keys: since(version, 4, "g".into()).into_iter().collect(),
            }
        );
        check_message!(
            FindCoordinator,
            1..=4,
            FindCoordinatorResponse,
            FindCoordinatorResponse,
            |version| if version < 4 {
                FindCoordinatorResponse {
                    throttle_time_ms: 7,
                    error_code: ERROR,
                    error_message: Some("why".into()),
                    node_id: 5,
                    host: "h".into(),
                    port: 9092,
                    ..FindCoordinatorResponse::default()
                }
            } else {
                FindCoordinatorResponse {
                    throttle_time_ms: 7,
                    coordinators: vec![FoundCoordinator {
                        key: "g".into(),
                        node_id: 5,
                        host: "h".into(),
                        port: 9092,
                        error_code: ERROR,
                        error_message: None,
                    }],
                    ..FindCoordinatorResponse::default()
                }
            }
        );
        check_message!(
            DescribeGroups,
            0..=5,
            DescribeGroupsRequest,
            DescribeGroupsRequest,
            |version| DescribeGroupsRequest {
                groups: vec!["g".into(), "h".into()],
                include_authorized_operations: version >= 3,
            }
        );
        check_message!(
            DescribeGroups,
            1..=5,
            DescribeGroupsResponse,
            DescribeGroupsResponse,
            |version| DescribeGroupsResponse {
                throttle_time_ms: 7,
                groups: vec![DescribedGroup {
                    error_code: ERROR,
                    group_id: "g".into(),
                    group_state: "Stable".into(),
                    protocol_type: "consumer".into(),
                    protocol_data: "range".into(),
                    members: vec![DescribedMember {
                        member_id: "m".into(),
                        group_instance_id: since(version, 4, "i".into()),
                        client_id: "c".into(),
                        client_host: "h".into(),
                        member_metadata: b""[..].into(),
                        member_assignment: b""[..].into(),
                    }],
                    authorized_operations: if version >= 3 { 8 } else { i32::MIN },
                }],
            }
        );
        check_message!(
            ListGroups,
            0..=4,
            ListGroupsRequest,
            ListGroupsRequest,
            |version| {
                ListGroupsRequest {
                    states_filter: since(version, 4, "Stable".into()).into_iter().collect(),
                }
            }
        );
        check_message!(
            ListGroups,
            1..=4,
            ListGroupsResponse,
            ListGroupsResponse,
            |version| {
                ListGroupsResponse {
                    throttle_time_ms: 7,
                    error_code: ERROR,
                    groups: vec![ListedGroup {
                        group_id: "g".into(),
                        protocol_type: "consumer".into(),
                        group_state: since(version, 4, "Stable".into()).unwrap_or_default(),
                    }],
                }
            }
        );
        check_message!(
            DeleteGroups,
            0..=2,
            DeleteGroupsRequest,
            DeleteGroupsRequest,
            |_| {
                DeleteGroupsRequest {
                    groups_names: vec!["g".into(), "h".into()],
                }
            }
        );
        check_message!(
            DeleteGroups,
            0..=2,
            DeleteGroupsResponse,
            DeleteGroupsResponse,
            |_| {
                DeleteGroupsResponse {
                    throttle_time_ms: 7,
                    results: vec![DeletedGroup {
                        group_id: "g".into(),
                        error_code: ERROR,
                    }],
                }
            }
        );
    }

    #[test]
    fn bytes_agree_with_the_oracle() {
        use crate::wire::kafka::Writer;
        use kafka_protocol::messages;
        use kafka_protocol::protocol::Decodable;
        let metadata = b"\0\x01\xff metadata".as_slice();
        for (version, flexible) in [(5, false), (9, true)] {
            let request = JoinGroupRequest {
                protocols: vec![JoinGroupProtocol {
                    name: "range".into(),
                    metadata: metadata.into(),
                }],
                ..JoinGroupRequest::default()
            };
            let mut writer = Writer::fields(flexible);
            request.encode(&mut writer, version);
            let mut bytes = bytes::Bytes::from(writer.into_fields());
            let theirs = messages::JoinGroupRequest::decode(&mut bytes, version).unwrap();
            assert_eq!(theirs.protocols[0].metadata, metadata);
        }
        for (version, flexible) in [(3, false), (5, true)] {
            let request = SyncGroupRequest {
                assignments: vec![SyncGroupAssignment {
                    member_id: "m".into(),
                    assignment: metadata.into(),
                }],
                ..SyncGroupRequest::default()
            };
            let mut writer = Writer::fields(flexible);
            request.encode(&mut writer, version);
            let mut bytes = bytes::Bytes::from(writer.into_fields());
            let theirs = messages::SyncGroupRequest::decode(&mut bytes, version).unwrap();
            assert_eq!(theirs.assignments[0].assignment, metadata);
        }
    }

    #[test]
    fn the_first_versions_are_read_too() {
        use crate::wire::kafka::Reader;
        // JoinGroup 0 and 1, by Kafka's message definitions.
        let tail = b"\0\x01m\0\x08consumer\0\0\0\x01\0\x05range\0\0\0\x01x";
        let session = b"\0\x01g\0\0\x27\x10".as_slice();
        let zero = [session, tail].concat();
        let one = [session, b"\0\0\xea\x60", tail].concat();
        for (version, bytes, rebalance_timeout_ms) in [(0, zero, -1), (1, one, 60_000)] {
            let mut reader = Reader::new(&bytes, false);
            let request = JoinGroupRequest::decode(&mut reader, version).unwrap();
            assert_eq!(reader.remaining(), 0);
            assert_eq!(request.session_timeout_ms, 10_000);
            assert_eq!(request.rebalance_timeout_ms, rebalance_timeout_ms);
            assert_eq!(request.protocols[0].name, "range");
        }
        let mut reader = Reader::new(b"\0\x01g", false);
        let request = FindCoordinatorRequest::decode(&mut reader, 0).unwrap();
        assert_eq!((&*request.key, request.key_type), ("g", 0));
    }
}
