//! Requests that change topics: create, delete, grow, configure, delete records.
//!
//! Source: the Kafka protocol guide. Each entry of a request is answered for itself; what one does is
//! durable before the answer.

use std::collections::{HashMap, HashSet};

use crate::broker::cluster::NODE;
use crate::broker::configs::{self, Setting};
use crate::broker::security::acl::{Access, Operation, Resource};
use crate::broker::settings;
use crate::broker::topics::{Change, Topic, TopicError, Topics};
use crate::config::{MAX_PARTITIONS, MAX_TOPIC_NAME};
use crate::wire::kafka::{Api, Code, Malformed, Reader, RequestHeader, Writer};

/// Resource type of a topic.
const TOPIC: i8 = 2;
/// Resource type of a broker.
const BROKER: i8 = 4;
/// Source of a value: the server's file.
const OF_BROKER: i8 = 4;
/// Source of a value: set for the topic.
const OF_TOPIC: i8 = 1;
/// Source of a value: the default.
const DEFAULT: i8 = 5;

type Outcome = Result<(), TopicError>;

fn invalid<T>(code: Code, message: impl Into<String>) -> Result<T, TopicError> {
    Err(TopicError::new(code, message))
}

/// Whether a topic may have this name.
pub fn check_name(name: &str) -> Result<(), TopicError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty()
        || name.len() > MAX_TOPIC_NAME
        || name == "."
        || name == ".."
        || !name.chars().all(fine)
    {
        return invalid(
            Code::InvalidTopicException,
            format!(
                "a topic's name has 1 to {MAX_TOPIC_NAME} of the characters a-z A-Z 0-9 . _ - and is not \".\" or \"..\""
            ),
        );
    }
    Ok(())
}

fn check_config<'a>(pairs: impl Iterator<Item = (&'a str, Option<&'a str>)>) -> Outcome {
    for (name, value) in pairs {
        let checked = match value {
            Some(value) => configs::check(name, value),
            None if configs::find(name).is_some() => Ok(()),
            None => configs::check(name, ""),
        };
        if let Err(message) = checked {
            return invalid(Code::InvalidConfig, message);
        }
    }
    Ok(())
}

fn code(outcome: &Outcome) -> i16 {
    outcome.as_ref().map_or_else(|e| e.code, |()| Code::None) as i16
}

fn message(outcome: &Outcome) -> Option<&str> {
    outcome.as_ref().err().map(|e| e.message.as_str())
}

/// Whether the client may do this to a topic; the error says no more than that it may not.
fn allowed(access: &Access, operation: Operation, name: &str) -> Outcome {
    match access.may(operation, Resource::Topic(name)) {
        true => Ok(()),
        false => not_allowed(Code::TopicAuthorizationFailed),
    }
}

fn not_allowed<T>(code: Code) -> Result<T, TopicError> {
    invalid(code, code.message())
}

/// Whether the client may make a topic of this name.
pub fn may_create(access: &Access, name: &str) -> bool {
    let create = Operation::Create;
    access.may(create, Resource::Cluster) || access.may(create, Resource::Topic(name))
}

struct NewTopic<'a> {
    name: &'a str,
    partitions: i32,
    replicas: i16,
    assignments: Vec<(i32, Vec<i32>)>,
    config: Vec<(&'a str, Option<&'a str>)>,
}

/// CreateTopics; topics without a number of partitions get `default_partitions`.
pub fn create_topics(
    header: &RequestHeader<'_>,
    body: &mut Reader<'_>,
    topics: &dyn Topics,
    default_partitions: u32,
    access: &Access,
) -> Result<Vec<u8>, Malformed> {
    let version = header.version;
    let list = body.array(|r| {
        let name = r.string()?;
        let partitions = r.i32()?;
        let replicas = r.i16()?;
        let assignments = r.array(|r| {
            let index = r.i32()?;
            let brokers = r.array(|r| r.i32())?;
            r.end()?;
            Ok((index, brokers))
        })?;
        let config = r.array(|r| {
            let pair = (r.string()?, r.nullable_string()?);
            r.end()?;
            Ok(pair)
        })?;
        r.end()?;
        Ok(NewTopic {
            name,
            partitions,
            replicas,
            assignments,
            config,
        })
    })?;
    body.i32()?; // timeout: it is done when it is answered
    let validate_only = body.bool()?;
    body.end()?;

    let mut times: HashMap<&str, u32> = HashMap::new();
    for topic in &list {
        *times.entry(topic.name).or_default() += 1;
    }
    let mut seen = HashSet::new();
    let mut results: Vec<(&NewTopic<'_>, u32, Outcome)> = Vec::new();
    for topic in list.iter().filter(|topic| seen.insert(topic.name)) {
        let partitions = match may_create(access, topic.name) {
            true => partitions_of(topic, default_partitions),
            false => not_allowed(Code::TopicAuthorizationFailed),
        };
        let outcome = if times[topic.name] > 1 {
            invalid(Code::InvalidRequest, "the request names the topic twice")
        } else {
            partitions.clone().and_then(|partitions| {
                let config: Vec<(String, String)> = topic
                    .config
                    .iter()
                    .filter_map(|(k, v)| Some(((*k).to_owned(), (*v)?.to_owned())))
                    .collect();
                topics.create(topic.name, partitions, &config, validate_only)
            })
        };
        results.push((topic, partitions.unwrap_or_default(), outcome));
    }

    let snapshot = topics.snapshot();
    let mut out = Api::CreateTopics.answer(version, header.correlation);
    out.i32(0);
    out.array(results.iter(), |out, (topic, partitions, outcome)| {
        out.string(topic.name);
        if version >= 7 {
            let made = snapshot.find(topic.name).filter(|_| outcome.is_ok());
            out.uuid(made.map_or(0, |t| t.uuid));
        }
        out.i16(code(outcome));
        out.nullable_string(message(outcome));
        if version >= 5 {
            if outcome.is_ok() {
                out.i32(*partitions as i32);
                out.i16(1);
                let config: Vec<(String, String)> = topic
                    .config
                    .iter()
                    .filter_map(|(k, v)| Some(((*k).to_owned(), (*v)?.to_owned())))
                    .collect();
                out.array(configs::SETTINGS.iter(), |out, setting| {
                    let (value, source) = shown(&config, setting);
                    out.string(setting.name);
                    out.nullable_string(Some(value));
                    out.bool(false);
                    out.i8(source);
                    out.bool(false);
                    out.end();
                });
            } else {
                out.i32(-1);
                out.i16(-1);
                out.null_array();
            }
        }
        out.end();
    });
    out.end();
    Ok(out.finish())
}

fn partitions_of(topic: &NewTopic<'_>, default_partitions: u32) -> Result<u32, TopicError> {
    check_name(topic.name)?;
    check_config(topic.config.iter().copied())?;
    if !topic.assignments.is_empty() {
        if topic.partitions != -1 || topic.replicas != -1 {
            return invalid(
                Code::InvalidRequest,
                "with an assignment the numbers of partitions and replicas are both -1",
            );
        }
        let mut indexes: Vec<i32> = topic.assignments.iter().map(|a| a.0).collect();
        indexes.sort_unstable();
        let whole = indexes.iter().zip(0..).all(|(&index, i)| index == i);
        if !whole || topic.assignments.iter().any(|(_, brokers)| brokers != &[0]) {
            return invalid(
                Code::InvalidReplicaAssignment,
                "partitions are numbered from 0, each on broker 0, the only one",
            );
        }
    } else if topic.replicas != -1 && topic.replicas != 1 {
        return invalid(
            Code::InvalidReplicationFactor,
            format!(
                "replication factor {} is not possible: there is one broker",
                topic.replicas
            ),
        );
    }
    let partitions = match (topic.assignments.len(), topic.partitions) {
        (0, -1) => Some(default_partitions),
        (0, n) => u32::try_from(n).ok(),
        (n, _) => u32::try_from(n).ok(),
    };
    match partitions {
        Some(n) if (1..=MAX_PARTITIONS).contains(&n) => Ok(n),
        _ => invalid(
            Code::InvalidPartitions,
            format!("a topic has 1 to {MAX_PARTITIONS} partitions"),
        ),
    }
}

/// DeleteTopics.
pub fn delete_topics(
    header: &RequestHeader<'_>,
    body: &mut Reader<'_>,
    topics: &dyn Topics,
    access: &Access,
) -> Result<Vec<u8>, Malformed> {
    let version = header.version;
    let list: Vec<(Option<&str>, u128)> = if version >= 6 {
        body.array(|r| {
            let topic = (r.nullable_string()?, r.uuid()?);
            r.end()?;
            Ok(topic)
        })?
    } else {
        body.array(|r| Ok((Some(r.string()?), 0)))?
    };
    body.i32()?;
    body.end()?;
    let snapshot = topics.snapshot();
    let results: Vec<_> = list
        .iter()
        .map(|&(name, uuid)| {
            let found = match name {
                Some(name) => snapshot.find(name),
                // What the client may not see is not there.
                None => snapshot
                    .find_uuid(uuid)
                    .filter(|topic| access.may(Operation::Describe, Resource::Topic(&topic.name))),
            };
            let outcome = match (found, name) {
                (_, Some(name)) if !access.may(Operation::Delete, Resource::Topic(name)) => {
                    not_allowed(Code::TopicAuthorizationFailed)
                }
                (Some(topic), None)
                    if !access.may(Operation::Delete, Resource::Topic(&topic.name)) =>
                {
                    not_allowed(Code::TopicAuthorizationFailed)
                }
                (Some(topic), _) if topic.internal() => {
                    invalid(Code::InvalidTopicException, "the topic is the server's own")
                }
                (Some(topic), _) => topics.delete(&topic.name),
                (None, Some(name)) => Err(TopicError::unknown(name)),
                (None, None) => invalid(Code::UnknownTopicId, "there is no topic of this id"),
            };
            let name = name.or(found.map(|t| t.name.as_str()));
            (name, found.map_or(uuid, |t| t.uuid), outcome)
        })
        .collect();
    let mut out = Api::DeleteTopics.answer(version, header.correlation);
    out.i32(0);
    out.array(results.iter(), |out, (name, uuid, outcome)| {
        out.nullable_string(*name);
        if version >= 6 {
            out.uuid(*uuid);
        }
        out.i16(code(outcome));
        if version >= 5 {
            out.nullable_string(message(outcome));
        }
        out.end();
    });
    out.end();
    Ok(out.finish())
}

/// CreatePartitions.
pub fn create_partitions(
    header: &RequestHeader<'_>,
    body: &mut Reader<'_>,
    topics: &dyn Topics,
    access: &Access,
) -> Result<Vec<u8>, Malformed> {
    let list = body.array(|r| {
        let (name, count) = (r.string()?, r.i32()?);
        let assigned = r.nullable_array(|r| {
            let brokers = r.array(|r| r.i32())?;
            r.end()?;
            Ok(brokers)
        })?;
        r.end()?;
        Ok((name, count, assigned))
    })?;
    body.i32()?;
    let validate_only = body.bool()?;
    body.end()?;
    let mut out = Api::CreatePartitions.answer(header.version, header.correlation);
    out.i32(0);
    out.array(list.iter(), |out, (name, count, assigned)| {
        let snapshot = topics.snapshot();
        let outcome = match (snapshot.find(name), u32::try_from(*count)) {
            _ if !access.may(Operation::Alter, Resource::Topic(name)) => {
                not_allowed(Code::TopicAuthorizationFailed)
            }
            (None, _) => Err(TopicError::unknown(name)),
            (Some(topic), _) if topic.internal() => {
                invalid(Code::InvalidTopicException, "the topic is the server's own")
            }
            (Some(topic), Ok(count))
                if count as usize > topic.places.len() && count <= MAX_PARTITIONS =>
            {
                let more = count as usize - topic.places.len();
                let fine = |list: &Vec<Vec<i32>>| {
                    list.len() == more && list.iter().all(|brokers| brokers == &[0])
                };
                if assigned.as_ref().is_none_or(fine) {
                    topics.grow(name, count, validate_only)
                } else {
                    invalid(
                        Code::InvalidReplicaAssignment,
                        "each new partition is on broker 0, the only one",
                    )
                }
            }
            (Some(topic), _) => invalid(
                Code::InvalidPartitions,
                format!(
                    "the topic has {} partitions; it may grow up to {MAX_PARTITIONS} and not shrink",
                    topic.places.len()
                ),
            ),
        };
        out.string(name);
        out.i16(code(&outcome));
        out.nullable_string(message(&outcome));
        out.end();
    });
    out.end();
    Ok(out.finish())
}

/// DeleteRecords. `high_watermark` of a partition.
pub fn delete_records(
    header: &RequestHeader<'_>,
    body: &mut Reader<'_>,
    topics: &dyn Topics,
    access: &Access,
) -> Result<Vec<u8>, Malformed> {
    let list = body.array(|r| {
        let name = r.string()?;
        let parts = r.array(|r| {
            let part = (r.i32()?, r.i64()?);
            r.end()?;
            Ok(part)
        })?;
        r.end()?;
        Ok((name, parts))
    })?;
    body.i32()?;
    body.end()?;
    let snapshot = topics.snapshot();
    let mut out = Api::DeleteRecords.answer(header.version, header.correlation);
    out.i32(0);
    out.array(list.iter(), |out, (name, parts)| {
        out.string(name);
        out.array(parts.iter(), |out, &(index, offset)| {
            let result = match snapshot.place(name, index) {
                _ if !access.may(Operation::Delete, Resource::Topic(name)) => {
                    Err(Code::TopicAuthorizationFailed)
                }
                None => Err(Code::UnknownTopicOrPartition),
                Some(_) if snapshot.find(name).is_some_and(Topic::internal) => {
                    Err(Code::PolicyViolation)
                }
                Some(place) => {
                    let end = topics
                        .progress(place.shard, place.local)
                        .map_or(0, |p| p.high_watermark);
                    match offset {
                        -1 => topics.delete_records(place, end).map_err(|e| e.code),
                        offset if (0..=end).contains(&offset) => {
                            topics.delete_records(place, offset).map_err(|e| e.code)
                        }
                        _ => Err(Code::OffsetOutOfRange),
                    }
                }
            };
            out.i32(index);
            out.i64(*result.as_ref().unwrap_or(&-1));
            out.i16(result.err().unwrap_or(Code::None) as i16);
            out.end();
        });
        out.end();
    });
    out.end();
    Ok(out.finish())
}

/// A setting's value in a configuration, and where it comes from.
fn shown<'a>(config: &'a [(String, String)], setting: &Setting) -> (&'a str, i8) {
    let set = config.iter().any(|(name, _)| name == setting.name);
    (
        configs::value(config, setting.name),
        if set { OF_TOPIC } else { DEFAULT },
    )
}

/// A setting as DescribeConfigs tells it.
struct Described<'a> {
    name: &'a str,
    value: Option<&'a str>,
    source: i8,
    default: Option<&'a str>,
    kind: configs::Kind,
    doc: &'a str,
    read_only: bool,
}

fn of_topic(topic: &Topic) -> Vec<Described<'_>> {
    let all = configs::SETTINGS.iter().map(|setting| {
        let (value, source) = shown(&topic.config, setting);
        Described {
            name: setting.name,
            value: Some(value),
            source,
            default: Some(setting.default),
            kind: setting.kind,
            doc: setting.doc,
            read_only: false,
        }
    });
    all.collect()
}

fn of_broker(settings: &[settings::Setting]) -> Vec<Described<'_>> {
    let all = settings.iter().map(|setting| Described {
        name: setting.name,
        value: setting.value.as_deref(),
        source: if setting.is_set() { OF_BROKER } else { DEFAULT },
        default: setting.default.as_deref(),
        kind: setting.kind,
        doc: setting.doc,
        read_only: true,
    });
    all.collect()
}

/// Refuses the number of a broker that there is not; without one a request means what holds for all brokers.
fn check_broker(name: &str) -> Outcome {
    if name.is_empty() || name.parse() == Ok(NODE) {
        return Ok(());
    }
    invalid(
        Code::InvalidRequest,
        format!("there is no broker {name:?}; the only one has the number {NODE}"),
    )
}

/// DescribeConfigs, of topics and of the broker, whose settings are `own`.
pub fn describe_configs(
    header: &RequestHeader<'_>,
    body: &mut Reader<'_>,
    topics: &dyn Topics,
    own: &[settings::Setting],
    access: &Access,
) -> Result<Vec<u8>, Malformed> {
    let version = header.version;
    let list = body.array(|r| {
        let (kind, name) = (r.i8()?, r.string()?);
        let keys = r.nullable_array(|r| r.string())?;
        r.end()?;
        Ok((kind, name, keys))
    })?;
    let synonyms = body.bool()?;
    let documented = version >= 3 && body.bool()?;
    body.end()?;
    let snapshot = topics.snapshot();
    let mut out = Api::DescribeConfigs.answer(version, header.correlation);
    out.i32(0);
    out.array(list.iter(), |out, (kind, name, keys)| {
        let found = match *kind {
            TOPIC if !access.may(Operation::DescribeConfigs, Resource::Topic(name)) => {
                not_allowed(Code::TopicAuthorizationFailed)
            }
            BROKER if !access.may(Operation::DescribeConfigs, Resource::Cluster) => {
                not_allowed(Code::ClusterAuthorizationFailed)
            }
            TOPIC => snapshot
                .find(name)
                .map(of_topic)
                .ok_or_else(|| TopicError::unknown(name)),
            // What was changed for all brokers by requests: nothing.
            BROKER if name.is_empty() => Ok(Vec::new()),
            BROKER => check_broker(name).map(|()| of_broker(own)),
            _ => invalid(
                Code::InvalidRequest,
                "only topics and the broker have settings",
            ),
        };
        let (outcome, mut settings) = match found {
            Ok(settings) => (Ok(()), settings),
            Err(error) => (Err(error), Vec::new()),
        };
        out.i16(code(&outcome));
        out.nullable_string(message(&outcome));
        out.i8(*kind);
        out.string(name);
        if let Some(keys) = keys.as_ref().filter(|keys| !keys.is_empty()) {
            settings.retain(|setting| keys.contains(&setting.name));
        }
        out.array(settings.iter(), |out, setting| {
            out.string(setting.name);
            out.nullable_string(setting.value);
            out.bool(setting.read_only);
            out.i8(setting.source);
            out.bool(false);
            if synonyms {
                let own = (setting.source != DEFAULT).then_some((setting.value, setting.source));
                let default = setting.default.map(|value| (Some(value), DEFAULT));
                let all: Vec<(Option<&str>, i8)> = own.into_iter().chain(default).collect();
                out.array(all.iter(), |out, (value, source)| {
                    out.string(setting.name);
                    out.nullable_string(*value);
                    out.i8(*source);
                    out.end();
                });
            } else {
                out.count(0);
            }
            if version >= 3 {
                out.i8(setting.kind as i8);
                out.nullable_string(documented.then_some(setting.doc));
            }
            out.end();
        });
        out.end();
    });
    out.end();
    Ok(out.finish())
}

struct Alteration<'a> {
    kind: i8,
    name: &'a str,
    /// Name, operation and value; AlterConfigs has no operation.
    changes: Vec<(&'a str, Option<i8>, Option<&'a str>)>,
}

/// AlterConfigs (all settings of a topic anew) and IncrementalAlterConfigs (some of them).
pub fn alter_configs(
    api: Api,
    header: &RequestHeader<'_>,
    body: &mut Reader<'_>,
    topics: &dyn Topics,
    access: &Access,
) -> Result<Vec<u8>, Malformed> {
    let incremental = api == Api::IncrementalAlterConfigs;
    let list = body.array(|r| {
        let (kind, name) = (r.i8()?, r.string()?);
        let changes = r.array(|r| {
            let name = r.string()?;
            let operation = if incremental { Some(r.i8()?) } else { None };
            let value = r.nullable_string()?;
            r.end()?;
            Ok((name, operation, value))
        })?;
        r.end()?;
        Ok(Alteration {
            kind,
            name,
            changes,
        })
    })?;
    let validate_only = body.bool()?;
    body.end()?;
    let mut out = api.answer(header.version, header.correlation);
    out.i32(0);
    out.array(list.iter(), |out: &mut Writer, alteration| {
        let outcome = alter(alteration, topics, access, validate_only);
        out.i16(code(&outcome));
        out.nullable_string(message(&outcome));
        out.i8(alteration.kind);
        out.string(alteration.name);
        out.end();
    });
    out.end();
    Ok(out.finish())
}

fn alter(
    alteration: &Alteration<'_>,
    topics: &dyn Topics,
    access: &Access,
    validate_only: bool,
) -> Outcome {
    if alteration.kind == TOPIC {
        allowed(access, Operation::AlterConfigs, alteration.name)?;
    } else if !access.may(Operation::AlterConfigs, Resource::Cluster) {
        return not_allowed(Code::ClusterAuthorizationFailed);
    }
    if alteration.kind == BROKER {
        check_broker(alteration.name)?;
        return invalid(
            Code::InvalidRequest,
            "the broker's settings are not changed by requests: they are in the server's configuration file, and take a restart",
        );
    }
    if alteration.kind != TOPIC {
        return invalid(
            Code::InvalidRequest,
            "only topics and the broker have settings",
        );
    }
    let snapshot = topics.snapshot();
    let Some(topic) = snapshot.find(alteration.name) else {
        return Err(TopicError::unknown(alteration.name));
    };
    let mut changes: Vec<Change> = Vec::new();
    if alteration.changes.iter().all(|change| change.1.is_none()) {
        // All that is not named goes back to its default.
        for (name, _) in &topic.config {
            if !alteration.changes.iter().any(|change| change.0 == name) {
                changes.push((name.clone(), None));
            }
        }
    }
    for &(name, operation, value) in &alteration.changes {
        check_config([(name, None)].into_iter())?;
        let now = configs::value(&topic.config, name);
        let words = || {
            now.split(',')
                .map(str::trim)
                .filter(|word| !word.is_empty())
        };
        let given = |value: Option<&str>| match value {
            Some(value) => Ok(value.to_owned()),
            None => invalid(Code::InvalidConfig, format!("{name} has no value")),
        };
        let value = match operation {
            None => value.map(str::to_owned),
            Some(0) => Some(given(value)?),
            Some(1) => None,
            Some(operation @ 2..=3) => {
                if configs::find(name).is_none_or(|s| s.kind != configs::Kind::List) {
                    return invalid(Code::InvalidConfig, format!("{name} is no list"));
                }
                let value = given(value)?;
                let other: Vec<&str> = value.split(',').map(str::trim).collect();
                let kept = words().filter(|word| !other.contains(word));
                let mut list: Vec<&str> = kept.collect();
                if operation == 2 {
                    list.extend(&other);
                }
                Some(list.join(","))
            }
            Some(other) => {
                return invalid(
                    Code::InvalidRequest,
                    format!("operation {other} is not known"),
                );
            }
        };
        changes.push((name.to_owned(), value));
    }
    check_config(
        changes
            .iter()
            .filter_map(|(name, value)| Some((name.as_str(), Some(value.as_deref()?)))),
    )?;
    topics.alter(alteration.name, &changes, validate_only)
}
