//! What Kafka clients send: framed, and each API's request read, answered where that needs no server. A request
//! of a group that is understood says the same when it is written and read again.
#![no_main]

use std::path::Path;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use taffrail::broker::cluster::{self, Endpoint, MetadataRequest};
use taffrail::broker::fetch::FetchRequest;
use taffrail::broker::produce::ProduceRequest;
use taffrail::broker::security::acl::{ANONYMOUS, Access, Rules};
use taffrail::broker::security::sasl::{self, MAX_UNPROVED_REQUEST, Stage, Users};
use taffrail::broker::session::{Framing, REQUEST_MIN, frame};
use taffrail::broker::settings::{self, Running, Setting};
use taffrail::broker::topics::{Change, Place, Snapshot, Topic, TopicError, Topics};
use taffrail::broker::waiting::Progress;
use taffrail::broker::{admin, configs, groups, hub, list_offsets};
use taffrail::config::Config;
use taffrail::storage::PartitionKey;
use taffrail::wire::kafka::groups::*;
use taffrail::wire::kafka::{Api, Reader, RequestHeader, Writer};

/// The broker's settings, as of a table without keys.
static SETTINGS: LazyLock<Vec<Setting>> = LazyLock::new(|| {
    let text = "[storage]\npath = \"/d\"\n[kafka]\n";
    let config = Config::parse(text, Path::new("t.toml")).unwrap();
    let running = Running {
        max_batch: 1 << 20,
        offsets_partitions: 16,
        groups: &groups::Config::default(),
    };
    settings::of(&config, config.kafka.as_ref().unwrap(), &running)
});

/// A topic `t` of two partitions; every change is taken.
struct Fixed(Arc<Snapshot>);

impl Topics for Fixed {
    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.0)
    }
    fn create(
        &self,
        _: &str,
        partitions: u32,
        _: &[(String, String)],
        _: bool,
    ) -> Result<(), TopicError> {
        assert!(partitions > 0);
        Ok(())
    }
    fn delete(&self, _: &str) -> Result<(), TopicError> {
        Ok(())
    }
    fn grow(&self, _: &str, _: u32, _: bool) -> Result<(), TopicError> {
        Ok(())
    }
    fn alter(&self, _: &str, _: &[Change], _: bool) -> Result<(), TopicError> {
        Ok(())
    }
    fn delete_records(&self, _: Place, offset: i64) -> Result<i64, TopicError> {
        Ok(offset)
    }
    fn log_start(&self, _: Place) -> i64 {
        0
    }
    fn log_end(&self, _: Place) -> i64 {
        10
    }
    fn received(&self, _: Place, _: u64) {}
    fn progress(&self, _: u16, _: u32) -> Option<Progress> {
        Some(Progress {
            high_watermark: 10,
            bytes: 1000,
        })
    }
}

fn topics() -> Fixed {
    let place = |partition| Place {
        shard: 0,
        local: partition,
        key: PartitionKey {
            topic: 1,
            partition,
        },
    };
    Fixed(Arc::new(Snapshot::new(vec![Topic {
        name: "t".to_owned(),
        id: 1,
        uuid: 7,
        places: vec![place(0), place(1)],
        rules: configs::rules(&[], 1 << 20),
        config: Vec::new(),
    }])))
}

macro_rules! again {
    ($type:ident, $body:expr, $api:expr, $version:expr) => {{
        let flexible = $api.flexible($version);
        let mut reader = Reader::new($body, flexible);
        if let Ok(request) = $type::decode(&mut reader, $version) {
            let mut writer = Writer::fields(flexible);
            request.encode(&mut writer, $version);
            let bytes = writer.into_fields();
            let mut reader = Reader::new(&bytes, flexible);
            assert_eq!($type::decode(&mut reader, $version).as_ref(), Ok(&request));
            assert_eq!(reader.remaining(), 0);
        }
    }};
}

fn request(bytes: &[u8], topics: &Fixed) {
    let Ok((header, body)) = RequestHeader::read(bytes) else {
        return;
    };
    let Some(api) = Api::of(header.key) else {
        return;
    };
    let version = header.version;
    if !api.serves(version) && api != Api::ApiVersions {
        return;
    }
    let host = std::net::Ipv4Addr::LOCALHOST.into();
    let access = &Access::new(Arc::new(Rules::new(&[], &[])), ANONYMOUS, host);
    let endpoint = Endpoint {
        host: "localhost".to_owned(),
        port: 9092,
    };
    let mut reader: Reader<'_> = body.clone();
    let reader = &mut reader;
    let answer = match api {
        Api::ApiVersions => cluster::api_versions(&header, reader).map(|a| a.0),
        Api::DescribeCluster => cluster::describe_cluster(&header, reader, "id", &endpoint, access),
        Api::FindCoordinator => cluster::find_coordinator(&header, reader, &endpoint, access),
        Api::CreateTopics => admin::create_topics(&header, reader, topics, 1, access),
        Api::DeleteTopics => admin::delete_topics(&header, reader, topics, access),
        Api::CreatePartitions => admin::create_partitions(&header, reader, topics, access),
        Api::DeleteRecords => admin::delete_records(&header, reader, topics, access),
        Api::DescribeConfigs => admin::describe_configs(&header, reader, topics, &SETTINGS, access),
        Api::AlterConfigs | Api::IncrementalAlterConfigs => {
            admin::alter_configs(api, &header, reader, topics, access)
        }
        Api::SaslHandshake => {
            sasl::handshake(&header, reader, &mut Stage::Handshake, true).map(|a| a.0)
        }
        Api::SaslAuthenticate => {
            if let Ok(token) = sasl::token(reader)
                && token.len() <= MAX_UNPROVED_REQUEST
            {
                let users = Users::new([]);
                let mechanism =
                    sasl::Mechanism::Scram(taffrail::broker::security::scram::Hash::Sha256);
                let mut stage = Stage::Chosen {
                    mechanism,
                    raw: false,
                };
                stage.token(&users, token);
                stage.token(&users, token);
                assert!(!stage.is_proved());
            }
            return;
        }
        Api::Produce => {
            let _ = ProduceRequest::read(reader);
            return;
        }
        Api::Fetch => {
            let _ = FetchRequest::read(reader, version, header.correlation);
            return;
        }
        Api::ListOffsets => {
            let _ = list_offsets::read(reader, version);
            return;
        }
        Api::Metadata => {
            let _ = MetadataRequest::read(reader, version);
            return;
        }
        _ => {
            let _ = hub::read(api, version, &body);
            let rest = body.rest();
            match api {
                Api::JoinGroup => again!(JoinGroupRequest, rest, api, version),
                Api::SyncGroup => again!(SyncGroupRequest, rest, api, version),
                Api::Heartbeat => again!(HeartbeatRequest, rest, api, version),
                Api::LeaveGroup => again!(LeaveGroupRequest, rest, api, version),
                Api::OffsetCommit => again!(OffsetCommitRequest, rest, api, version),
                Api::OffsetFetch => again!(OffsetFetchRequest, rest, api, version),
                Api::OffsetDelete => again!(OffsetDeleteRequest, rest, api, version),
                Api::DescribeGroups => again!(DescribeGroupsRequest, rest, api, version),
                Api::ListGroups => again!(ListGroupsRequest, rest, api, version),
                Api::DeleteGroups => again!(DeleteGroupsRequest, rest, api, version),
                _ => {}
            }
            return;
        }
    };
    if let Ok(answer) = answer {
        // The length and the correlation id come first.
        assert_eq!(answer[4..8], header.correlation.to_be_bytes());
        let len = i32::from_be_bytes(answer[..4].try_into().unwrap());
        assert_eq!(len as usize, answer.len() - 4);
    }
}

fuzz_target!(|data: &[u8]| {
    let topics = topics();
    let mut rest = data;
    loop {
        match frame(rest, REQUEST_MIN..=1 << 20) {
            Framing::Request(bytes) => {
                assert!(bytes.len() + 4 <= rest.len());
                request(bytes, &topics);
                rest = &rest[bytes.len() + 4..];
            }
            Framing::Partial { need } => {
                assert!(need > rest.len());
                // As if the length had been right.
                request(rest.get(4..).unwrap_or_default(), &topics);
                return;
            }
            Framing::BadLength(_) => {
                request(&rest[4..], &topics);
                return;
            }
        }
    }
});
