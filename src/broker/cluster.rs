//! What a client asks first: versions, metadata, the cluster, the coordinator. One node, always leader,
//! controller and coordinator.

use crate::broker::security::acl::{Access, Operation, Resource};
use crate::broker::topics::{Snapshot, Topic};
use crate::wire::kafka::{Api, Code, Malformed, Reader, RequestHeader, Writer};

/// The id of the only node.
pub const NODE: i32 = 0;
/// The only leader epoch of a log without replicas.
pub const LEADER_EPOCH: i32 = 0;
/// What clients are told of operations they did not ask about.
const NO_OPERATIONS: i32 = i32::MIN;

/// Where clients are told to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// A name or an address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// A client's software and its version.
pub type Software<'a> = (&'a str, &'a str);

/// The answer to ApiVersions of any version, and what the client calls its software.
pub fn api_versions<'a>(
    header: &RequestHeader<'_>,
    body: &mut Reader<'a>,
) -> Result<(Vec<u8>, Option<Software<'a>>), Malformed> {
    let served = Api::ApiVersions.serves(header.version);
    let version = if served { header.version } else { 0 };
    let mut software = None;
    if served && version >= 3 {
        software = Some((body.string()?, body.string()?));
        body.end()?;
    }
    let mut out = Api::ApiVersions.answer(version, header.correlation);
    out.i16(if served {
        Code::None
    } else {
        Code::UnsupportedVersion
    } as i16);
    out.array(Api::ALL.iter(), |out, api| {
        let (min, max) = api.advertised();
        out.i16(*api as i16);
        out.i16(min);
        out.i16(max);
        out.end();
    });
    if version >= 1 {
        out.i32(0); // throttle time
    }
    out.end();
    Ok((out.finish(), software))
}

/// A topic that metadata is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted<'a> {
    /// By name.
    Name(&'a str),
    /// By id.
    Uuid(u128),
}

/// A Metadata request.
#[derive(Debug)]
pub struct MetadataRequest<'a> {
    /// `None`: all topics.
    pub topics: Option<Vec<Wanted<'a>>>,
    /// Unknown topics may be made.
    pub auto_create: bool,
    /// What the client may do to the server is to be told.
    pub cluster_operations: bool,
    /// What it may do to each topic.
    pub topic_operations: bool,
}

impl<'a> MetadataRequest<'a> {
    /// Reads one.
    pub fn read(body: &mut Reader<'a>, version: i16) -> Result<Self, Malformed> {
        let topics = body.nullable_array(|r| {
            let uuid = if version >= 10 { r.uuid()? } else { 0 };
            let wanted = match r.nullable_string()? {
                Some(name) => Wanted::Name(name),
                None if uuid != 0 => Wanted::Uuid(uuid),
                None => Wanted::Name(""),
            };
            r.end()?;
            Ok(wanted)
        })?;
        let topics = topics.filter(|list| version >= 1 || !list.is_empty());
        let auto_create = version < 4 || body.bool()?;
        let cluster_operations = (8..=10).contains(&version) && body.bool()?;
        let topic_operations = version >= 8 && body.bool()?;
        body.end()?;
        Ok(Self {
            topics,
            auto_create,
            cluster_operations,
            topic_operations,
        })
    }
}

/// What a client may do, where it asked.
fn operations(asked: bool, access: &Access, resource: Resource<'_>) -> i32 {
    match asked {
        true => access.operations(resource),
        false => NO_OPERATIONS,
    }
}

/// The answer to Metadata; `refusal` says why a topic that is not there was not made. Topics that the client may not
/// describe are not there for it.
pub fn metadata(
    header: &RequestHeader<'_>,
    request: &MetadataRequest<'_>,
    snapshot: &Snapshot,
    cluster_id: &str,
    endpoint: &Endpoint,
    access: &Access,
    refusal: impl Fn(&str) -> Code,
) -> Vec<u8> {
    let version = header.version;
    let mut out = Api::Metadata.answer(version, header.correlation);
    if version >= 3 {
        out.i32(0);
    }
    out.count(1);
    broker(&mut out, endpoint, version >= 1);
    if version >= 2 {
        out.nullable_string(Some(cluster_id));
    }
    if version >= 1 {
        out.i32(NODE);
    }
    let sees = |name: &str| access.may(Operation::Describe, Resource::Topic(name));
    let allowed = |name: &str| operations(request.topic_operations, access, Resource::Topic(name));
    match &request.topics {
        None => {
            let all = snapshot.all().iter();
            let seen: Vec<&Topic> = all.filter(|topic| sees(&topic.name)).collect();
            out.array(seen.into_iter(), |out, topic| {
                metadata_topic(out, version, Ok(topic), allowed(&topic.name));
            });
        }
        Some(wanted) => out.array(wanted.iter(), |out, wanted| {
            let (found, name, uuid) = match wanted {
                Wanted::Name(name) => (snapshot.find(name), Some(*name), 0),
                Wanted::Uuid(uuid) => (snapshot.find_uuid(*uuid), None, *uuid),
            };
            let found = found.filter(|topic| sees(&topic.name));
            let code = match (found, name) {
                (Some(_), _) => Code::None,
                (None, Some(name)) if !sees(name) => Code::TopicAuthorizationFailed,
                (None, Some(name)) => refusal(name),
                (None, None) => Code::UnknownTopicId,
            };
            let operations = found.map_or(NO_OPERATIONS, |topic| allowed(&topic.name));
            metadata_topic(out, version, found.ok_or((code, name, uuid)), operations);
        }),
    }
    if (8..=10).contains(&version) {
        let asked = request.cluster_operations;
        out.i32(operations(asked, access, Resource::Cluster));
    }
    out.end();
    out.finish()
}

fn metadata_topic(
    out: &mut Writer,
    version: i16,
    topic: Result<&Topic, (Code, Option<&str>, u128)>,
    operations: i32,
) {
    let (code, name, uuid) = match topic {
        Ok(topic) => (Code::None, Some(topic.name.as_str()), topic.uuid),
        Err(error) => error,
    };
    out.i16(code as i16);
    if version >= 12 {
        out.nullable_string(name);
    } else {
        out.string(name.unwrap_or_default());
    }
    if version >= 10 {
        out.uuid(uuid);
    }
    if version >= 1 {
        out.bool(topic.is_ok_and(Topic::internal));
    }
    let partitions = topic.map_or(0, |topic| topic.places.len());
    out.array(0..partitions, |out, index| {
        out.i16(Code::None as i16);
        out.i32(index as i32);
        out.i32(NODE);
        if version >= 7 {
            out.i32(LEADER_EPOCH);
        }
        for _ in ["replicas", "in sync"] {
            out.count(1);
            out.i32(NODE);
        }
        if version >= 5 {
            out.count(0); // offline
        }
        out.end();
    });
    if version >= 8 {
        out.i32(operations);
    }
    out.end();
}

fn broker(out: &mut Writer, endpoint: &Endpoint, rack: bool) {
    out.i32(NODE);
    out.string(&endpoint.host);
    out.i32(i32::from(endpoint.port));
    if rack {
        out.nullable_string(None);
    }
    out.end();
}

/// The answer to DescribeCluster.
pub fn describe_cluster(
    header: &RequestHeader<'_>,
    body: &mut Reader<'_>,
    cluster_id: &str,
    endpoint: &Endpoint,
    access: &Access,
) -> Result<Vec<u8>, Malformed> {
    let asked = body.bool()?;
    // 1: the brokers; 2: controllers, which have no addresses of their own here.
    let kind = if header.version >= 1 { body.i8()? } else { 1 };
    body.end()?;
    let mut out = Api::DescribeCluster.answer(header.version, header.correlation);
    out.i32(0);
    let (code, message) = match kind {
        1 => (Code::None, None),
        _ => (
            Code::InvalidRequest,
            Some("only brokers can be described: there is no controller of its own"),
        ),
    };
    out.i16(code as i16);
    out.nullable_string(message);
    if header.version >= 1 {
        out.i8(kind);
    }
    out.string(cluster_id);
    out.i32(NODE);
    out.count(usize::from(code == Code::None));
    if code == Code::None {
        broker(&mut out, endpoint, true);
    }
    out.i32(operations(asked, access, Resource::Cluster));
    out.end();
    Ok(out.finish())
}

/// The answer to FindCoordinator: this node, for groups.
pub fn find_coordinator(
    header: &RequestHeader<'_>,
    body: &mut Reader<'_>,
    endpoint: &Endpoint,
    access: &Access,
) -> Result<Vec<u8>, Malformed> {
    let version = header.version;
    let mut keys = Vec::new();
    if version < 4 {
        keys.push(body.string()?);
    }
    let kind = if version >= 1 { body.i8()? } else { 0 };
    if version >= 4 {
        keys = body.array(|r| r.string())?;
    }
    body.end()?;
    let outcome = |key: &str| match kind {
        0 if !access.may(Operation::Describe, Resource::Group(key)) => (
            Code::GroupAuthorizationFailed,
            Some(Code::GroupAuthorizationFailed.message()),
        ),
        0 => (Code::None, None),
        1 => (Code::InvalidRequest, Some("transactions are not supported")),
        _ => (Code::InvalidRequest, Some("only groups have a coordinator")),
    };
    let mut out = Api::FindCoordinator.answer(version, header.correlation);
    let place = |out: &mut Writer, found: bool| {
        out.i32(if found { NODE } else { -1 });
        out.string(if found { &endpoint.host } else { "" });
        out.i32(if found { i32::from(endpoint.port) } else { -1 });
    };
    if version >= 1 {
        out.i32(0);
    }
    if version >= 4 {
        out.array(keys.iter(), |out, key| {
            let (code, message) = outcome(key);
            out.string(key);
            place(out, code == Code::None);
            out.i16(code as i16);
            out.nullable_string(message);
            out.end();
        });
    } else {
        let (code, message) = outcome(keys.first().copied().unwrap_or_default());
        out.i16(code as i16);
        if version >= 1 {
            out.nullable_string(message);
        }
        place(&mut out, code == Code::None);
    }
    out.end();
    Ok(out.finish())
}
