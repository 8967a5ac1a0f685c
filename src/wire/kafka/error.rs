//! Kafka's error codes, as answers carry them.
//!
//! Source: "The Kafka protocol guide", section error codes; names and messages are Kafka's own. Codes
//! that no API spoken here can answer with are left out; read from a peer they become
//! [`Code::UnknownServerError`].

use super::{Field, Malformed, Reader, Writer};

macro_rules! error_codes {
    ($($variant:ident = $code:literal, $name:literal, $message:literal;)*) => {
        /// An error code; `None` is success.
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(i16)]
        pub enum Code {
            $(#[doc = $name] $variant = $code,)*
        }

        impl Code {
            /// The code's meaning.
            pub fn from_code(code: i16) -> Self {
                match code {
                    $($code => Self::$variant,)*
                    _ => Self::UnknownServerError,
                }
            }

            /// Kafka's name of it, such as `UNKNOWN_TOPIC_OR_PARTITION`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// Kafka's default message; empty for `None`.
            pub fn message(self) -> &'static str {
                match self {
                    $(Self::$variant => $message,)*
                }
            }

            #[cfg(test)]
            const ALL: &[Code] = &[$(Self::$variant),*];
        }
    };
}

error_codes! {
    UnknownServerError = -1, "UNKNOWN_SERVER_ERROR",
        "The server experienced an unexpected error when processing the request.";
    None = 0, "NONE",
        "";
    OffsetOutOfRange = 1, "OFFSET_OUT_OF_RANGE",
        "The requested offset is not within the range of offsets maintained by the server.";
    CorruptMessage = 2, "CORRUPT_MESSAGE",
        "This message has failed its CRC checksum, exceeds the valid size, has a null key for a compacted topic, or is otherwise corrupt.";
    UnknownTopicOrPartition = 3, "UNKNOWN_TOPIC_OR_PARTITION",
        "This server does not host this topic-partition.";
    InvalidFetchSize = 4, "INVALID_FETCH_SIZE",
        "The requested fetch size is invalid.";
    LeaderNotAvailable = 5, "LEADER_NOT_AVAILABLE",
        "There is no leader for this topic-partition as we are in the middle of a leadership election.";
    NotLeaderOrFollower = 6, "NOT_LEADER_OR_FOLLOWER",
        "This broker is not the leader for this partition.";
    RequestTimedOut = 7, "REQUEST_TIMED_OUT",
        "The request timed out.";
    BrokerNotAvailable = 8, "BROKER_NOT_AVAILABLE",
        "The broker is not available.";
    ReplicaNotAvailable = 9, "REPLICA_NOT_AVAILABLE",
        "The replica is not available for the requested topic-partition.";
    MessageTooLarge = 10, "MESSAGE_TOO_LARGE",
        "The request included a message larger than the max message size the server will accept.";
    StaleControllerEpoch = 11, "STALE_CONTROLLER_EPOCH",
        "The controller moved to another broker.";
    OffsetMetadataTooLarge = 12, "OFFSET_METADATA_TOO_LARGE",
        "The metadata field of the offset request was too large.";
    NetworkException = 13, "NETWORK_EXCEPTION",
        "The server disconnected before a response was received.";
    CoordinatorLoadInProgress = 14, "COORDINATOR_LOAD_IN_PROGRESS",
        "The coordinator is loading and hence can't process requests.";
    CoordinatorNotAvailable = 15, "COORDINATOR_NOT_AVAILABLE",
        "The coordinator is not available.";
    NotCoordinator = 16, "NOT_COORDINATOR",
        "This is not the correct coordinator.";
    InvalidTopicException = 17, "INVALID_TOPIC_EXCEPTION",
        "The request attempted to perform an operation on an invalid topic.";
    RecordListTooLarge = 18, "RECORD_LIST_TOO_LARGE",
        "The request included message batch larger than the configured segment size on the server.";
    NotEnoughReplicas = 19, "NOT_ENOUGH_REPLICAS",
        "Messages are rejected since there are fewer in-sync replicas than required.";
    NotEnoughReplicasAfterAppend = 20, "NOT_ENOUGH_REPLICAS_AFTER_APPEND",
        "Messages are written to the log, but to fewer in-sync replicas than required.";
    InvalidRequiredAcks = 21, "INVALID_REQUIRED_ACKS",
        "Produce request specified an invalid value for required acks.";
    IllegalGeneration = 22, "ILLEGAL_GENERATION",
        "Specified group generation id is not valid.";
    InconsistentGroupProtocol = 23, "INCONSISTENT_GROUP_PROTOCOL",
        "The group member's supported protocols are incompatible with those of existing members or first group member tried to join with empty protocol type or empty protocol list.";
    InvalidGroupId = 24, "INVALID_GROUP_ID",
        "The group id is invalid.";
    UnknownMemberId = 25, "UNKNOWN_MEMBER_ID",
        "The coordinator is not aware of this member.";
    InvalidSessionTimeout = 26, "INVALID_SESSION_TIMEOUT",
        "The session timeout is not within the range allowed by the broker.";
    RebalanceInProgress = 27, "REBALANCE_IN_PROGRESS",
        "The group is rebalancing, so a rejoin is needed.";
    InvalidCommitOffsetSize = 28, "INVALID_COMMIT_OFFSET_SIZE",
        "The committing offset data size is not valid.";
    TopicAuthorizationFailed = 29, "TOPIC_AUTHORIZATION_FAILED",
        "Topic authorization failed.";
    GroupAuthorizationFailed = 30, "GROUP_AUTHORIZATION_FAILED",
        "Group authorization failed.";
    ClusterAuthorizationFailed = 31, "CLUSTER_AUTHORIZATION_FAILED",
        "Cluster authorization failed.";
    InvalidTimestamp = 32, "INVALID_TIMESTAMP",
        "The timestamp of the message is out of acceptable range.";
    UnsupportedSaslMechanism = 33, "UNSUPPORTED_SASL_MECHANISM",
        "The broker does not support the requested SASL mechanism.";
    IllegalSaslState = 34, "ILLEGAL_SASL_STATE",
        "Request is not valid given the current SASL state.";
    UnsupportedVersion = 35, "UNSUPPORTED_VERSION",
        "The version of API is not supported.";
    TopicAlreadyExists = 36, "TOPIC_ALREADY_EXISTS",
        "Topic with this name already exists.";
    InvalidPartitions = 37, "INVALID_PARTITIONS",
        "Number of partitions is below 1.";
    InvalidReplicationFactor = 38, "INVALID_REPLICATION_FACTOR",
        "Replication factor is below 1 or larger than the number of available brokers.";
    InvalidReplicaAssignment = 39, "INVALID_REPLICA_ASSIGNMENT",
        "Replica assignment is invalid.";
    InvalidConfig = 40, "INVALID_CONFIG",
        "Configuration is invalid.";
    NotController = 41, "NOT_CONTROLLER",
        "This is not the correct controller for this cluster.";
    InvalidRequest = 42, "INVALID_REQUEST",
        "This most likely occurs because of a request being malformed by the client library or the message was sent to an incompatible broker.";
    UnsupportedForMessageFormat = 43, "UNSUPPORTED_FOR_MESSAGE_FORMAT",
        "The message format version on the broker does not support the request.";
    PolicyViolation = 44, "POLICY_VIOLATION",
        "Request parameters do not satisfy the configured policy.";
    OutOfOrderSequenceNumber = 45, "OUT_OF_ORDER_SEQUENCE_NUMBER",
        "The broker received an out of order sequence number.";
    DuplicateSequenceNumber = 46, "DUPLICATE_SEQUENCE_NUMBER",
        "The broker received a duplicate sequence number.";
    InvalidProducerEpoch = 47, "INVALID_PRODUCER_EPOCH",
        "Producer attempted to produce with an old epoch.";
    InvalidTxnState = 48, "INVALID_TXN_STATE",
        "The producer attempted a transactional operation in an invalid state.";
    InvalidProducerIdMapping = 49, "INVALID_PRODUCER_ID_MAPPING",
        "The producer attempted to use a producer id which is not currently assigned to its transactional id.";
    InvalidTransactionTimeout = 50, "INVALID_TRANSACTION_TIMEOUT",
        "The transaction timeout is larger than the maximum value allowed by the broker.";
    ConcurrentTransactions = 51, "CONCURRENT_TRANSACTIONS",
        "The producer attempted to update a transaction while another concurrent operation on the same transaction was ongoing.";
    TransactionCoordinatorFenced = 52, "TRANSACTION_COORDINATOR_FENCED",
        "The transaction coordinator sending a marker is no longer the current coordinator for a given producer.";
    TransactionalIdAuthorizationFailed = 53, "TRANSACTIONAL_ID_AUTHORIZATION_FAILED",
        "Transactional id authorization failed.";
    SecurityDisabled = 54, "SECURITY_DISABLED",
        "Security features are disabled.";
    OperationNotAttempted = 55, "OPERATION_NOT_ATTEMPTED",
        "The broker did not attempt to execute this operation.";
    KafkaStorageError = 56, "KAFKA_STORAGE_ERROR",
        "Disk error when trying to access log file on the disk.";
    LogDirNotFound = 57, "LOG_DIR_NOT_FOUND",
        "The user-specified log directory is not found in the broker config.";
    SaslAuthenticationFailed = 58, "SASL_AUTHENTICATION_FAILED",
        "SASL authentication failed.";
    UnknownProducerId = 59, "UNKNOWN_PRODUCER_ID",
        "The broker could not locate the producer metadata associated with the producer id in question.";
    ReassignmentInProgress = 60, "REASSIGNMENT_IN_PROGRESS",
        "A partition reassignment is in progress.";
    DelegationTokenAuthDisabled = 61, "DELEGATION_TOKEN_AUTH_DISABLED",
        "Delegation token feature is not enabled.";
    DelegationTokenNotFound = 62, "DELEGATION_TOKEN_NOT_FOUND",
        "Delegation token is not found on server.";
    DelegationTokenOwnerMismatch = 63, "DELEGATION_TOKEN_OWNER_MISMATCH",
        "Specified principal is not valid owner or renewer.";
    DelegationTokenRequestNotAllowed = 64, "DELEGATION_TOKEN_REQUEST_NOT_ALLOWED",
        "Delegation token requests are not allowed on plaintext or one-way SSL channels and on delegation token authenticated channels.";
    DelegationTokenAuthorizationFailed = 65, "DELEGATION_TOKEN_AUTHORIZATION_FAILED",
        "Delegation token authorization failed.";
    DelegationTokenExpired = 66, "DELEGATION_TOKEN_EXPIRED",
        "Delegation token is expired.";
    InvalidPrincipalType = 67, "INVALID_PRINCIPAL_TYPE",
        "Supplied principal type is not supported.";
    NonEmptyGroup = 68, "NON_EMPTY_GROUP",
        "The group is not empty.";
    GroupIdNotFound = 69, "GROUP_ID_NOT_FOUND",
        "The group id does not exist.";
    FetchSessionIdNotFound = 70, "FETCH_SESSION_ID_NOT_FOUND",
        "The fetch session id was not found.";
    InvalidFetchSessionEpoch = 71, "INVALID_FETCH_SESSION_EPOCH",
        "The fetch session epoch is invalid.";
    ListenerNotFound = 72, "LISTENER_NOT_FOUND",
        "There is no listener on the leader broker that matches the listener on which metadata request was processed.";
    TopicDeletionDisabled = 73, "TOPIC_DELETION_DISABLED",
        "Topic deletion is disabled.";
    FencedLeaderEpoch = 74, "FENCED_LEADER_EPOCH",
        "The leader epoch in the request is older than the epoch on the broker.";
    UnknownLeaderEpoch = 75, "UNKNOWN_LEADER_EPOCH",
        "The leader epoch in the request is newer than the epoch on the broker.";
    UnsupportedCompressionType = 76, "UNSUPPORTED_COMPRESSION_TYPE",
        "The requesting client does not support the compression type of given partition.";
    StaleBrokerEpoch = 77, "STALE_BROKER_EPOCH",
        "Broker epoch has changed.";
    OffsetNotAvailable = 78, "OFFSET_NOT_AVAILABLE",
        "The leader high watermark has not caught up from a recent leader election so the offsets cannot be guaranteed to be monotonically increasing.";
    MemberIdRequired = 79, "MEMBER_ID_REQUIRED",
        "The group member needs to have a valid member id before actually entering a consumer group.";
    PreferredLeaderNotAvailable = 80, "PREFERRED_LEADER_NOT_AVAILABLE",
        "The preferred leader was not available.";
    GroupMaxSizeReached = 81, "GROUP_MAX_SIZE_REACHED",
        "The consumer group has reached its max size.";
    FencedInstanceId = 82, "FENCED_INSTANCE_ID",
        "The broker rejected this static consumer since another consumer with the same group.instance.id has registered with a different member.id.";
    EligibleLeadersNotAvailable = 83, "ELIGIBLE_LEADERS_NOT_AVAILABLE",
        "Eligible topic partition leaders are not available.";
    ElectionNotNeeded = 84, "ELECTION_NOT_NEEDED",
        "Leader election not needed for topic partition.";
    NoReassignmentInProgress = 85, "NO_REASSIGNMENT_IN_PROGRESS",
        "No partition reassignment is in progress.";
    GroupSubscribedToTopic = 86, "GROUP_SUBSCRIBED_TO_TOPIC",
        "Deleting offsets of a topic is forbidden while the consumer group is actively subscribed to it.";
    InvalidRecord = 87, "INVALID_RECORD",
        "This record has failed the validation on broker and hence will be rejected.";
    UnstableOffsetCommit = 88, "UNSTABLE_OFFSET_COMMIT",
        "There are unstable offsets that need to be cleared.";
    ThrottlingQuotaExceeded = 89, "THROTTLING_QUOTA_EXCEEDED",
        "The throttling quota has been exceeded.";
    ProducerFenced = 90, "PRODUCER_FENCED",
        "There is a newer producer with the same transactional id which fences the current one.";
    ResourceNotFound = 91, "RESOURCE_NOT_FOUND",
        "A request illegally referred to a resource that does not exist.";
    DuplicateResource = 92, "DUPLICATE_RESOURCE",
        "A request illegally referred to the same resource twice.";
    UnacceptableCredential = 93, "UNACCEPTABLE_CREDENTIAL",
        "Requested credential would not meet criteria for acceptability.";
    FeatureUpdateFailed = 96, "FEATURE_UPDATE_FAILED",
        "Unable to update finalized features due to an unexpected server error.";
    UnknownTopicId = 100, "UNKNOWN_TOPIC_ID",
        "This server does not host this topic id.";
    InconsistentTopicId = 103, "INCONSISTENT_TOPIC_ID",
        "The log's topic id did not match the topic id in the request.";
    FetchSessionTopicIdError = 106, "FETCH_SESSION_TOPIC_ID_ERROR",
        "The fetch session encountered inconsistent topic id usage.";
}

impl Code {
    /// The number on the wire.
    pub fn code(self) -> i16 {
        self as i16
    }

    /// Whether this is an error.
    pub fn is_error(self) -> bool {
        self != Self::None
    }

    /// The message as a field has it: null for success.
    pub fn message_field<'a>(self) -> Option<std::borrow::Cow<'a, str>> {
        self.is_error().then(|| self.message().into())
    }
}

#[allow(clippy::derivable_impls)]
impl Default for Code {
    fn default() -> Self {
        Self::None
    }
}

impl std::fmt::Debug for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.code(), self.name())
    }
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl<'a> Field<'a> for Code {
    fn read(reader: &mut Reader<'a>, _: i16) -> Result<Self, Malformed> {
        reader.i16().map(Self::from_code)
    }
    fn write(&self, writer: &mut Writer, _: i16) {
        writer.i16(self.code());
    }
    fn min_len(_: bool, _: i16) -> usize {
        2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kafka_protocol::error::ParseResponseErrorCode;

    #[test]
    fn codes_and_names_are_kafkas() {
        for &error in Code::ALL {
            assert_eq!(Code::from_code(error.code()), error);
            if error.is_error() {
                let oracle = error.code().err().unwrap();
                let name = error.name().replace('_', "").to_lowercase();
                assert_eq!(format!("{oracle:?}").to_lowercase(), name);
            }
        }
        assert_eq!(Code::from_code(12345), Code::UnknownServerError);
    }
}
