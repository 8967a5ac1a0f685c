//! Tests' oracle for what the broker reads and writes field by field: the crate kafka-protocol, whose structures
//! it must read and be read as, in every version that is served.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use kafka_protocol::messages::*;
use kafka_protocol::protocol::{Decodable, Encodable, StrBytes};

use crate::broker::cluster::{self, Endpoint, MetadataRequest as Asked, Wanted};
use crate::broker::fetch::{self, FetchRequest as Fetching, Fetched};
use crate::broker::list_offsets::{self, Found};
use crate::broker::produce::{self, PartResult, ProduceRequest as Producing, Shape};
use crate::broker::security::acl::{ANONYMOUS, Access, Rules};
use crate::broker::topics::{Place, Snapshot, Topic};
use crate::storage::{PartitionKey, Pieces};
use crate::wire::kafka::{Api, Code, Reader, RequestHeader};

fn versions(api: Api) -> impl Iterator<Item = (i16, RequestHeader<'static>)> {
    let (min, max) = api.versions();
    (min..=max).map(move |version| {
        let header = RequestHeader {
            key: api as i16,
            version,
            correlation: 7,
            client_id: None,
        };
        (version, header)
    })
}

/// The oracle's bytes of a request.
fn request(oracle: &impl Encodable, version: i16) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    oracle.encode(&mut bytes, version).unwrap();
    bytes.to_vec()
}

/// Reads `bytes` to the end with `read`; cut off anywhere they are refused.
fn reads<'a, T>(
    api: Api,
    version: i16,
    bytes: &'a [u8],
    read: impl Fn(&mut Reader<'a>) -> Result<T, crate::wire::kafka::Malformed>,
) -> T {
    let flexible = api.flexible(version);
    for len in 0..bytes.len() {
        let cut = read(&mut Reader::new(&bytes[..len], flexible));
        assert!(cut.is_err(), "{api:?} {version} cut to {len}");
    }
    let mut reader = Reader::new(bytes, flexible);
    let value = read(&mut reader).unwrap();
    assert_eq!(reader.remaining(), 0, "{api:?} {version}");
    value
}

/// Has the oracle read an answer to its last byte, and write the same bytes.
fn answers<O: Decodable + Encodable>(api: Api, version: i16, answer: &[u8]) -> O {
    let (length, frame) = answer.split_at(4);
    assert_eq!(length, (frame.len() as i32).to_be_bytes());
    let head = api.answer(version, 7).into_fields().len() - 4;
    let body = &frame[head..];
    let mut rest = Bytes::copy_from_slice(body);
    let read = O::decode(&mut rest, version).unwrap_or_else(|e| panic!("{api:?} {version}: {e:#}"));
    assert!(rest.is_empty(), "{api:?} {version}");
    assert_eq!(request(&read, version), body, "{api:?} {version}");
    read
}

fn text(text: &'static str) -> StrBytes {
    StrBytes::from_static_str(text)
}

fn endpoint() -> Endpoint {
    Endpoint {
        host: "log1".to_owned(),
        port: 9092,
    }
}

fn access() -> Access {
    let host = std::net::Ipv4Addr::LOCALHOST.into();
    Access::new(Arc::new(Rules::new(&[], &[])), ANONYMOUS, host)
}

#[test]
fn produce_agrees() {
    for (version, _) in versions(Api::Produce) {
        let part = produce_request::PartitionProduceData::default()
            .with_index(3)
            .with_records(Some(Bytes::from_static(b"batch")));
        let topic = produce_request::TopicProduceData::default()
            .with_name(TopicName(text("t")))
            .with_partition_data(vec![part]);
        let asked = ProduceRequest::default()
            .with_acks(-1)
            .with_timeout_ms(1500)
            .with_topic_data(vec![topic]);
        let bytes = request(&asked, version);
        let read = reads(Api::Produce, version, &bytes, Producing::read);
        assert_eq!((read.acks, read.timeout_ms), (-1, 1500));
        let (name, parts) = &read.topics[0];
        assert_eq!(
            (*name, parts[0].index, parts[0].records),
            ("t", 3, &b"batch"[..])
        );

        let shape = Shape {
            version,
            correlation: 7,
            throttle_ms: 9,
            topics: vec![("t".into(), vec![3, 4])],
        };
        let results = [
            PartResult {
                code: Code::None,
                base_offset: 1 << 40,
                append_time: 5,
                log_start: 2,
                message: None,
                records: Box::default(),
                record_message: "",
            },
            PartResult::failed(Code::MessageTooLarge, Some("why".to_owned())),
        ];
        let answer = produce::answer(&shape, &results);
        let read: ProduceResponse = answers(Api::Produce, version, &answer);
        let parts = &read.responses[0].partition_responses;
        assert_eq!((parts[0].index, parts[0].base_offset), (3, 1 << 40));
        assert_eq!(parts[1].error_code, Code::MessageTooLarge as i16);
    }
}

#[test]
fn fetch_agrees() {
    for (version, _) in versions(Api::Fetch) {
        let part = fetch_request::FetchPartition::default()
            .with_partition(3)
            .with_fetch_offset(1 << 40)
            .with_partition_max_bytes(1000);
        let topic = fetch_request::FetchTopic::default()
            .with_topic(TopicName(text("t")))
            .with_partitions(vec![part]);
        let asked = FetchRequest::default()
            .with_max_wait_ms(500)
            .with_min_bytes(1)
            .with_max_bytes(77)
            .with_topics(vec![topic]);
        let bytes = request(&asked, version);
        let read = reads(Api::Fetch, version, &bytes, |r| {
            Fetching::read(r, version, 7)
        });
        assert_eq!(
            (read.max_wait_ms, read.min_bytes, read.max_bytes),
            (500, 1, 77)
        );
        let (name, wanted) = read.wanted().next().unwrap();
        assert_eq!(
            (name, wanted.index, wanted.offset, wanted.max_bytes),
            ("t", 3, 1 << 40, 1000)
        );

        let mut records = Pieces::default();
        records.push_copy(b"batches");
        let result = Fetched {
            code: Code::None,
            high_watermark: 9,
            log_start: 2,
            records,
        };
        let answer = fetch::answer(&read, Code::None, 9, vec![result]).concat();
        let read: FetchResponse = answers(Api::Fetch, version, &answer);
        let part = &read.responses[0].partitions[0];
        assert_eq!((part.partition_index, part.high_watermark), (3, 9));
        assert_eq!(part.records.as_deref(), Some(&b"batches"[..]));
    }
}

#[test]
fn list_offsets_agrees() {
    for (version, header) in versions(Api::ListOffsets) {
        let part = list_offsets_request::ListOffsetsPartition::default()
            .with_partition_index(3)
            .with_timestamp(1 << 40);
        let topic = list_offsets_request::ListOffsetsTopic::default()
            .with_name(TopicName(text("t")))
            .with_partitions(vec![part]);
        let asked = ListOffsetsRequest::default().with_topics(vec![topic]);
        let bytes = request(&asked, version);
        let read = reads(Api::ListOffsets, version, &bytes, |r| {
            list_offsets::read(r, version)
        });
        assert_eq!((read[0].1[0].index, read[0].1[0].time), (3, 1 << 40));
        let answer = list_offsets::answer(&header, &read, |_, _| {
            Ok(Found {
                offset: 5,
                timestamp: 6,
            })
        });
        let read: ListOffsetsResponse = answers(Api::ListOffsets, version, &answer);
        let part = &read.topics[0].partitions[0];
        assert_eq!((part.offset, part.timestamp), (5, 6));
    }
}

#[test]
fn metadata_agrees() {
    let snapshot = Snapshot::new(vec![Topic {
        name: "there".to_owned(),
        id: 1,
        uuid: 77,
        places: vec![Place {
            shard: 0,
            local: 0,
            key: PartitionKey {
                topic: 1,
                partition: 0,
            },
        }],
        config: Vec::new(),
        rules: crate::broker::configs::rules(&[], 1 << 20),
    }]);
    for (version, header) in versions(Api::Metadata) {
        let topic = |name| {
            metadata_request::MetadataRequestTopic::default().with_name(Some(TopicName(text(name))))
        };
        let asked = MetadataRequest::default()
            .with_topics(Some(vec![topic("there"), topic("gone")]))
            .with_allow_auto_topic_creation(true);
        let bytes = request(&asked, version);
        let read = reads(Api::Metadata, version, &bytes, |r| Asked::read(r, version));
        let wanted = read.topics.as_ref().unwrap();
        assert_eq!(wanted[..], [Wanted::Name("there"), Wanted::Name("gone")]);
        let answer = cluster::metadata(
            &header,
            &read,
            &snapshot,
            "cluster",
            &endpoint(),
            &access(),
            |_| Code::UnknownTopicOrPartition,
        );
        let read: MetadataResponse = answers(Api::Metadata, version, &answer);
        assert_eq!(read.brokers[0].port, 9092);
        assert_eq!(read.topics[0].partitions.len(), 1);
        assert_eq!(read.topics[1].error_code, 3);
    }
}

#[test]
fn what_clients_ask_first_agrees() {
    for (version, header) in versions(Api::ApiVersions) {
        let asked = ApiVersionsRequest::default()
            .with_client_software_name(text("name"))
            .with_client_software_version(text("1"));
        let asked = if version >= 3 {
            asked
        } else {
            ApiVersionsRequest::default()
        };
        let bytes = request(&asked, version);
        let (answer, software) = reads(Api::ApiVersions, version, &bytes, |r| {
            cluster::api_versions(&header, r)
        });
        assert_eq!(software, (version >= 3).then_some(("name", "1")));
        let read: ApiVersionsResponse = answers(Api::ApiVersions, version, &answer);
        assert_eq!(read.api_keys.len(), Api::ALL.len());
    }
    for (version, header) in versions(Api::FindCoordinator) {
        let asked = if version < 4 {
            FindCoordinatorRequest::default().with_key(text("g"))
        } else {
            FindCoordinatorRequest::default().with_coordinator_keys(vec![text("g")])
        };
        let bytes = request(&asked, version);
        let answer = reads(Api::FindCoordinator, version, &bytes, |r| {
            cluster::find_coordinator(&header, r, &endpoint(), &access())
        });
        let _: FindCoordinatorResponse = answers(Api::FindCoordinator, version, &answer);
    }
    for (version, header) in versions(Api::DescribeCluster) {
        let bytes = request(&DescribeClusterRequest::default(), version);
        let answer = reads(Api::DescribeCluster, version, &bytes, |r| {
            cluster::describe_cluster(&header, r, "cluster", &endpoint(), &access())
        });
        let read: DescribeClusterResponse = answers(Api::DescribeCluster, version, &answer);
        assert_eq!(read.cluster_id, text("cluster"));
    }
}
