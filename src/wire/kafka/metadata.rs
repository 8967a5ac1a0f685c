//! Metadata and DescribeCluster: brokers, topics, and which broker leads which partition.
//!
//! Source: Kafka's MetadataRequest.json, MetadataResponse.json, DescribeClusterRequest.json,
//! DescribeClusterResponse.json; KIP-516 for topic ids.

use std::borrow::Cow;

use super::{ErrorCode, Uuid, message};

/// Authorized operations that were not asked for.
pub const NO_OPERATIONS: i32 = i32::MIN;

message! {
    /// Asks for some topics or all.
    pub struct MetadataRequest<'a> {
        /// The topics; `None` (in version 0 an empty list, see [`MetadataRequest::wants_all`]) for all.
        topics: Option<Vec<MetadataRequestTopic<'a>>>,
        /// Whether a missing topic may be created.
        allow_auto_topic_creation: bool [4..; true],
        /// Whether the cluster's authorized operations are asked for.
        include_cluster_authorized_operations: bool [8..=10],
        /// Whether the topics' authorized operations are asked for.
        include_topic_authorized_operations: bool [8..],
    }

    /// A topic, by name or id.
    pub struct MetadataRequestTopic<'a> {
        /// Zero where the name is given.
        topic_id: Uuid [10..],
        /// Null, from version 10 on, where the id is given.
        name: Option<&'a str>,
    }

    /// The answer.
    pub struct MetadataResponse<'a> {
        /// Milliseconds for which the client is throttled.
        throttle_time_ms: i32 [3..],
        /// The brokers.
        brokers: Vec<MetadataResponseBroker<'a>>,
        /// The cluster's id.
        cluster_id: Option<Cow<'a, str>> [2..],
        /// The broker that takes changes of topics; −1 for none.
        controller_id: i32 [1..; -1],
        /// The topics.
        topics: Vec<MetadataResponseTopic<'a>>,
        /// Bits of the operations that the client may do, or [`NO_OPERATIONS`].
        cluster_authorized_operations: i32 [8..=10; NO_OPERATIONS],
        /// An error of the whole request.
        error_code: ErrorCode [13..],
    }

    /// A broker, as clients reach it.
    pub struct MetadataResponseBroker<'a> {
        /// Its id.
        node_id: i32,
        /// Name or address.
        host: Cow<'a, str>,
        /// TCP port.
        port: i32,
        /// Its rack.
        rack: Option<Cow<'a, str>> [1..],
    }

    /// A topic.
    pub struct MetadataResponseTopic<'a> {
        /// Its error.
        error_code: ErrorCode,
        /// Its name; null, from version 12 on, for an unknown id.
        name: Option<Cow<'a, str>>,
        /// Its id; zero for an unknown name.
        topic_id: Uuid [10..],
        /// Whether clients should leave it alone.
        is_internal: bool [1..],
        /// Its partitions.
        partitions: Vec<MetadataResponsePartition>,
        /// Bits of the operations that the client may do, or [`NO_OPERATIONS`].
        topic_authorized_operations: i32 [8..; NO_OPERATIONS],
    }

    /// A partition.
    pub struct MetadataResponsePartition {
        /// Its error.
        error_code: ErrorCode,
        /// Its number.
        partition_index: i32,
        /// The broker to produce to and fetch from; −1 for none.
        leader_id: i32,
        /// How often leadership changed.
        leader_epoch: i32 [7..; -1],
        /// All brokers that hold it.
        replica_nodes: Vec<i32>,
        /// Those that are in sync.
        isr_nodes: Vec<i32>,
        /// Those that are not reachable.
        offline_replicas: Vec<i32> [5..],
    }
}

impl MetadataRequest<'_> {
    /// Whether all topics are asked for.
    pub fn wants_all(&self, version: i16) -> bool {
        match &self.topics {
            None => true,
            Some(topics) => version == 0 && topics.is_empty(),
        }
    }
}

message! {
    /// Asks for the brokers alone.
    pub struct DescribeClusterRequest {
        /// Whether the cluster's authorized operations are asked for.
        include_cluster_authorized_operations: bool,
        /// 1 for brokers, 2 for controllers.
        endpoint_type: i8 [1..; 1],
    }

    /// The answer.
    pub struct DescribeClusterResponse<'a> {
        /// Milliseconds for which the client is throttled.
        throttle_time_ms: i32,
        /// The error.
        error_code: ErrorCode,
        /// What it says.
        error_message: Option<Cow<'a, str>>,
        /// As asked for.
        endpoint_type: i8 [1..; 1],
        /// The cluster's id.
        cluster_id: Cow<'a, str>,
        /// The broker that takes changes of topics; −1 for none.
        controller_id: i32,
        /// The brokers.
        brokers: Vec<DescribeClusterBroker<'a>>,
        /// Bits of the operations that the client may do, or [`NO_OPERATIONS`].
        cluster_authorized_operations: i32 [0..; NO_OPERATIONS],
    }

    /// A broker, as clients reach it.
    pub struct DescribeClusterBroker<'a> {
        /// Its id.
        broker_id: i32,
        /// Name or address.
        host: Cow<'a, str>,
        /// TCP port.
        port: i32,
        /// Its rack.
        rack: Option<Cow<'a, str>>,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::kafka::oracle::check_message;

    #[test]
    fn agrees_with_the_oracle() {
        check_message!(Metadata, MetadataRequest, |version| MetadataRequest {
            topics: Some(vec![
                MetadataRequestTopic {
                    topic_id: if version >= 10 {
                        Uuid([7; 16])
                    } else {
                        Uuid::ZERO
                    },
                    name: Some("first"),
                },
                MetadataRequestTopic {
                    topic_id: Uuid::ZERO,
                    name: Some("second"),
                },
            ]),
            allow_auto_topic_creation: version < 4,
            include_cluster_authorized_operations: (8..=10).contains(&version),
            include_topic_authorized_operations: version >= 8,
        });
        check_message!(Metadata, 1..=13, MetadataRequest, MetadataRequest, |_| {
            MetadataRequest::default()
        });
        check_message!(Metadata, MetadataResponse, |version| MetadataResponse {
            throttle_time_ms: 5,
            brokers: vec![MetadataResponseBroker {
                node_id: 3,
                host: "broker.example".into(),
                port: 9092,
                rack: Some("r1".into()),
            }],
            cluster_id: Some("cluster".into()),
            controller_id: 3,
            topics: vec![MetadataResponseTopic {
                error_code: ErrorCode::LeaderNotAvailable,
                name: Some("first".into()),
                topic_id: Uuid([9; 16]),
                is_internal: true,
                partitions: vec![
                    MetadataResponsePartition {
                        error_code: ErrorCode::None,
                        partition_index: 11,
                        leader_id: 3,
                        leader_epoch: 4,
                        replica_nodes: vec![3, 5],
                        isr_nodes: vec![3],
                        offline_replicas: vec![5],
                    },
                    MetadataResponsePartition::default(),
                ],
                topic_authorized_operations: if version >= 8 { 77 } else { NO_OPERATIONS },
            }],
            cluster_authorized_operations: 99,
            error_code: ErrorCode::RequestTimedOut,
        });
        check_message!(DescribeCluster, DescribeClusterRequest, |version| {
            DescribeClusterRequest {
                include_cluster_authorized_operations: true,
                endpoint_type: 1 + i8::from(version >= 1),
            }
        });
        check_message!(DescribeCluster, DescribeClusterResponse, |version| {
            DescribeClusterResponse {
                throttle_time_ms: 5,
                error_code: ErrorCode::InvalidRequest,
                error_message: ErrorCode::InvalidRequest.message_field(),
                endpoint_type: 1 + i8::from(version >= 1),
                cluster_id: "cluster".into(),
                controller_id: 2,
                brokers: vec![DescribeClusterBroker {
                    broker_id: 2,
                    host: "h".into(),
                    port: 9092,
                    rack: None,
                }],
                cluster_authorized_operations: 6,
            }
        });
    }
}
