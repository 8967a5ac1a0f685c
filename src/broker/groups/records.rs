//! What the coordinator keeps in the topic `__consumer_offsets`: the records' keys and values.
//!
//! Source: Kafka's schemas OffsetCommitKey (version 1), OffsetCommitValue (3, or 1 where the commit
//! says when it expires; 0 to 3 are read), GroupMetadataKey (2) and GroupMetadataValue (3; 0 to 3 are
//! read). A record's version is its first two bytes; no version here has tagged fields. A record
//! without a value is a tombstone. One partition of the topic holds all records of a group, in order.

use super::CommittedOffset;
use crate::wire::kafka::{Malformed, Reader, Writer};

/// The topic's name.
pub const OFFSETS_TOPIC: &str = "__consumer_offsets";

/// A record for the topic [`OFFSETS_TOPIC`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OffsetsRecord {
    /// What it is about; never empty.
    pub key: Vec<u8>,
    /// What holds from now on; `None`: nothing any more.
    pub value: Option<Vec<u8>>,
}

impl OffsetsRecord {
    /// Bytes of key and value.
    pub fn size(&self) -> usize {
        self.key.len() + self.value.as_ref().map_or(0, Vec::len)
    }
}

/// Why a record of the topic is not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Its bytes end early or make no sense.
    #[error("malformed record in {OFFSETS_TOPIC}: {0}")]
    Malformed(#[from] Malformed),
    /// A version that only a younger writer knows.
    #[error(
        "record in {OFFSETS_TOPIC} with key version {key} and value version {value} is not understood"
    )]
    Version {
        /// Version of the key.
        key: i16,
        /// Version of the value, −1 where the key is not understood.
        value: i16,
    },
}

/// A group as its last record has it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GroupValue<'a> {
    /// What its members are, such as `consumer`.
    pub protocol_type: &'a str,
    /// Number of the last rebalance.
    pub generation: i32,
    /// The protocol that was chosen.
    pub protocol: Option<&'a str>,
    /// The leader's member id.
    pub leader: Option<&'a str>,
    /// Since when it is in its state, Unix milliseconds, or −1.
    pub state_timestamp: i64,
    /// Its members.
    pub members: Vec<MemberValue<'a>>,
}

/// A member as its group's last record has it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemberValue<'a> {
    /// Its id.
    pub member_id: &'a str,
    /// Its own id, where it is a static member.
    pub group_instance_id: Option<&'a str>,
    /// The client's name.
    pub client_id: &'a str,
    /// The client's address.
    pub client_host: &'a str,
    /// Milliseconds, or −1 for the session's.
    pub rebalance_timeout_ms: i32,
    /// Milliseconds.
    pub session_timeout_ms: i32,
    /// Its metadata for the chosen protocol.
    pub subscription: &'a [u8],
    /// What the leader gave it.
    pub assignment: &'a [u8],
}

/// A record of the topic, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored<'a> {
    /// A committed offset, or the end of one.
    Offset {
        /// The group.
        group: &'a str,
        /// The topic.
        topic: &'a str,
        /// Its partition.
        partition: i32,
        /// `None`: deleted.
        value: Option<CommittedOffset>,
    },
    /// A group, or the end of one.
    Group {
        /// The group.
        group: &'a str,
        /// `None`: deleted.
        value: Option<GroupValue<'a>>,
    },
}

const OFFSET_KEY_VERSION: i16 = 1;
const GROUP_KEY_VERSION: i16 = 2;
const OFFSET_VALUE_VERSION: i16 = 3;
/// The one version that says when the offset expires.
const OFFSET_VALUE_VERSION_EXPIRING: i16 = 1;
const GROUP_VALUE_VERSION: i16 = 3;
/// The fewest bytes that a member takes in a version that is read.
const MEMBER_MIN: usize = 2 + 2 + 2 + 4 + 4 + 4;

fn versioned(version: i16) -> Writer {
    let mut writer = Writer::fields(false);
    writer.i16(version);
    writer
}

/// The record of a committed offset; `None`: its tombstone.
pub fn offset_record(
    group: &str,
    topic: &str,
    partition: i32,
    value: Option<&CommittedOffset>,
) -> OffsetsRecord {
    let mut key = versioned(OFFSET_KEY_VERSION);
    key.string(group);
    key.string(topic);
    key.i32(partition);
    let value = value.map(|value| {
        let version = match value.expires_ms {
            Some(_) => OFFSET_VALUE_VERSION_EXPIRING,
            None => OFFSET_VALUE_VERSION,
        };
        let mut writer = versioned(version);
        writer.i64(value.offset);
        if version >= 3 {
            writer.i32(value.leader_epoch);
        }
        writer.string(&value.metadata);
        writer.i64(value.committed_ms);
        if let Some(expires_ms) = value.expires_ms {
            writer.i64(expires_ms);
        }
        writer.into_fields()
    });
    OffsetsRecord {
        key: key.into_fields(),
        value,
    }
}

/// The record of a group; `None`: its tombstone.
pub fn group_record(group: &str, value: Option<&GroupValue<'_>>) -> OffsetsRecord {
    let mut key = versioned(GROUP_KEY_VERSION);
    key.string(group);
    let value = value.map(|value| {
        let mut writer = versioned(GROUP_VALUE_VERSION);
        writer.string(value.protocol_type);
        writer.i32(value.generation);
        writer.nullable_string(value.protocol);
        writer.nullable_string(value.leader);
        writer.i64(value.state_timestamp);
        writer.count(value.members.len());
        for member in &value.members {
            writer.string(member.member_id);
            writer.nullable_string(member.group_instance_id);
            writer.string(member.client_id);
            writer.string(member.client_host);
            writer.i32(member.rebalance_timeout_ms);
            writer.i32(member.session_timeout_ms);
            writer.bytes(member.subscription);
            writer.bytes(member.assignment);
        }
        writer.into_fields()
    });
    OffsetsRecord {
        key: key.into_fields(),
        value,
    }
}

/// Reads a record of the topic.
pub fn decode<'a>(key: &'a [u8], value: Option<&'a [u8]>) -> Result<Stored<'a>, RecordError> {
    let mut reader = Reader::new(key, false);
    let version = reader.i16()?;
    match version {
        0..=OFFSET_KEY_VERSION => {
            let group = reader.string()?;
            let topic = reader.string()?;
            let partition = reader.i32()?;
            let value = value
                .map(|value| decode_offset(version, value))
                .transpose()?;
            Ok(Stored::Offset {
                group,
                topic,
                partition,
                value,
            })
        }
        GROUP_KEY_VERSION => {
            let group = reader.string()?;
            let value = value
                .map(|value| decode_group(version, value))
                .transpose()?;
            Ok(Stored::Group { group, value })
        }
        _ => Err(RecordError::Version {
            key: version,
            value: -1,
        }),
    }
}

fn decode_offset(key: i16, value: &[u8]) -> Result<CommittedOffset, RecordError> {
    let mut reader = Reader::new(value, false);
    let version = reader.i16()?;
    if !(0..=OFFSET_VALUE_VERSION).contains(&version) {
        return Err(RecordError::Version {
            key,
            value: version,
        });
    }
    let offset = reader.i64()?;
    let leader_epoch = if version >= 3 { reader.i32()? } else { -1 };
    let metadata = reader.string()?.into();
    let committed_ms = reader.i64()?;
    let expires_ms = match version {
        OFFSET_VALUE_VERSION_EXPIRING => Some(reader.i64()?).filter(|&at| at != -1),
        _ => None,
    };
    Ok(CommittedOffset {
        offset,
        leader_epoch,
        metadata,
        committed_ms,
        expires_ms,
    })
}

fn decode_group(key: i16, value: &[u8]) -> Result<GroupValue<'_>, RecordError> {
    let mut reader = Reader::new(value, false);
    let version = reader.i16()?;
    if !(0..=GROUP_VALUE_VERSION).contains(&version) {
        return Err(RecordError::Version {
            key,
            value: version,
        });
    }
    let mut group = GroupValue {
        protocol_type: reader.string()?,
        generation: reader.i32()?,
        protocol: reader.nullable_string()?,
        leader: reader.nullable_string()?,
        state_timestamp: if version >= 2 { reader.i64()? } else { -1 },
        members: Vec::new(),
    };
    let count = reader.count(MEMBER_MIN)?;
    group.members.reserve_exact(count);
    for _ in 0..count {
        group.members.push(MemberValue {
            member_id: reader.string()?,
            group_instance_id: if version >= 3 {
                reader.nullable_string()?
            } else {
                None
            },
            client_id: reader.string()?,
            client_host: reader.string()?,
            rebalance_timeout_ms: if version >= 1 { reader.i32()? } else { -1 },
            session_timeout_ms: reader.i32()?,
            subscription: reader.bytes()?,
            assignment: reader.bytes()?,
        });
    }
    Ok(group)
}

/// The topics of a consumer's subscription, as the clients' own protocol of type `consumer` has it:
/// a version, then the names; what follows is left alone.
pub(super) fn subscribed_topics(subscription: &[u8]) -> Result<Vec<&str>, Malformed> {
    let mut reader = Reader::new(subscription, false);
    reader.i16()?;
    let count = reader.count(2)?;
    (0..count).map(|_| reader.string()).collect()
}

/// The partitions of a member's assignment, by topic, as the clients' own protocol of type `consumer` has it: a version,
/// then for each topic its name and partitions; what follows is left alone.
pub fn assigned_partitions(assignment: &[u8]) -> Result<Vec<(&str, Vec<i32>)>, Malformed> {
    let mut reader = Reader::new(assignment, false);
    reader.i16()?;
    reader.array(|r| Ok((r.string()?, r.array(|r| r.i32())?)))
}

/// The partition of [`OFFSETS_TOPIC`] that holds a group's records: Kafka's own choice (Java's hash of
/// the name), so that tools which read the topic look in the right place.
pub fn partition_of(group: &str, partitions: u32) -> u32 {
    let hash = group.encode_utf16().fold(0i32, |hash, unit| {
        hash.wrapping_mul(31).wrapping_add(i32::from(unit))
    });
    // As Kafka: the sign is cut off, so that the least integer has a place too.
    (hash & i32::MAX) as u32 % partitions.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offset(expires_ms: Option<i64>) -> CommittedOffset {
        CommittedOffset {
            offset: 1 << 40,
            leader_epoch: if expires_ms.is_some() { -1 } else { 7 },
            metadata: "where I stood".into(),
            committed_ms: 1_700_000_000_000,
            expires_ms,
        }
    }

    fn group() -> GroupValue<'static> {
        GroupValue {
            protocol_type: "consumer",
            generation: 12,
            protocol: Some("range"),
            leader: Some("a-1"),
            state_timestamp: 1_700_000_000_000,
            members: vec![
                MemberValue {
                    member_id: "a-1",
                    group_instance_id: Some("a"),
                    client_id: "client",
                    client_host: "/127.0.0.1",
                    rebalance_timeout_ms: 300_000,
                    session_timeout_ms: 45_000,
                    subscription: b"subscribed",
                    assignment: b"assigned",
                },
                MemberValue {
                    member_id: "b-1",
                    ..MemberValue::default()
                },
            ],
        }
    }

    #[test]
    fn offsets_come_back_as_they_were_stored() {
        for value in [Some(offset(None)), Some(offset(Some(5))), None] {
            let record = offset_record("g", "t", 3, value.as_ref());
            let stored = decode(&record.key, record.value.as_deref()).unwrap();
            let expected = Stored::Offset {
                group: "g",
                topic: "t",
                partition: 3,
                value,
            };
            assert_eq!(stored, expected);
        }
    }

    #[test]
    fn groups_come_back_as_they_were_stored() {
        for value in [Some(group()), Some(GroupValue::default()), None] {
            let record = group_record("g", value.as_ref());
            let stored = decode(&record.key, record.value.as_deref()).unwrap();
            assert_eq!(stored, Stored::Group { group: "g", value });
        }
    }

    #[test]
    fn records_cut_off_anywhere_or_of_unknown_versions_are_errors() {
        let records = [
            offset_record("g", "t", 3, Some(&offset(None))),
            group_record("g", Some(&group())),
        ];
        for record in records {
            let value = record.value.unwrap();
            for len in 0..record.key.len() {
                decode(&record.key[..len], Some(&value)).unwrap_err();
            }
            for len in 0..value.len() {
                decode(&record.key, Some(&value[..len])).unwrap_err();
            }
            let mut unknown = value.clone();
            unknown[1] = 9;
            let error = decode(&record.key, Some(&unknown)).unwrap_err();
            assert!(matches!(error, RecordError::Version { value: 9, .. }));
        }
        let error = decode(&[0, 9, 0, 0], None).unwrap_err();
        assert_eq!(error, RecordError::Version { key: 9, value: -1 });
    }

    #[test]
    fn a_subscription_names_its_topics() {
        // As the clients write it, by the oracle.
        use kafka_protocol::messages::ConsumerProtocolSubscription;
        use kafka_protocol::protocol::Encodable;
        let mut bytes = vec![0, 1];
        let subscription = ConsumerProtocolSubscription::default()
            .with_topics(vec!["a".to_owned().into(), "b".to_owned().into()]);
        subscription.encode(&mut bytes, 1).unwrap();
        assert_eq!(subscribed_topics(&bytes).unwrap(), ["a", "b"]);
        subscribed_topics(&[0, 0, 0x7f, 0xff, 0xff, 0xff]).unwrap_err();
    }

    #[test]
    fn assignments_are_read() {
        use kafka_protocol::messages::ConsumerProtocolAssignment;
        use kafka_protocol::messages::consumer_protocol_assignment::TopicPartition;
        use kafka_protocol::protocol::Encodable;
        let mut bytes = vec![0, 1];
        let topic = |name: &'static str, partitions: Vec<i32>| {
            TopicPartition::default()
                .with_topic(kafka_protocol::messages::TopicName(
                    kafka_protocol::protocol::StrBytes::from_static_str(name),
                ))
                .with_partitions(partitions)
        };
        ConsumerProtocolAssignment::default()
            .with_assigned_partitions(vec![topic("a", vec![0, 2]), topic("b", vec![])])
            .encode(&mut bytes, 1)
            .unwrap();
        let expected = vec![("a", vec![0, 2]), ("b", vec![])];
        assert_eq!(assigned_partitions(&bytes).unwrap(), expected);
        for wrong in [&[][..], &[0, 0, 0x7f, 0xff, 0xff, 0xff], &bytes[..8]] {
            assigned_partitions(wrong).unwrap_err();
        }
    }

    #[test]
    fn partitions_are_kafkas() {
        // Java: Math.abs("group".hashCode()) % 50 and others, as Kafka's tools show them.
        assert_eq!(partition_of("", 50), 0);
        assert_eq!(partition_of("a", 50), 97 % 50);
        assert_eq!(partition_of("console-consumer-1", 1), 0);
        // "polygenelubricants".hashCode() is the least integer.
        assert_eq!(partition_of("polygenelubricants", 50), 0);
    }
}
