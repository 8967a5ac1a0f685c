//! The throttle time in an answer that is written already.
//!
//! Source: Kafka's message definitions of the answers. How long a client is to wait is known only when its request was
//! served, so the time is put in behind; that which an answer has stays where it is longer.

use crate::broker::worker::Answer;
use crate::wire::kafka::Api;

/// Where an answer has its throttle time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// So many bytes behind the answer's header.
    Front(usize),
    /// So many bytes before its end.
    Back(usize),
}

/// `None`: the version has none.
fn place(api: Api, version: i16) -> Option<Place> {
    // Empty tagged fields.
    let tail = usize::from(api.flexible(version));
    let (since, place) = match api {
        Api::SaslHandshake | Api::SaslAuthenticate => return None,
        Api::Produce | Api::ApiVersions => (1, Place::Back(4 + tail)),
        // Behind the error code.
        Api::OffsetDelete => (0, Place::Front(2)),
        Api::FindCoordinator
        | Api::Heartbeat
        | Api::LeaveGroup
        | Api::SyncGroup
        | Api::DescribeGroups
        | Api::ListGroups
        | Api::Fetch
        | Api::DeleteTopics => (1, Place::Front(0)),
        Api::ListOffsets | Api::JoinGroup | Api::CreateTopics => (2, Place::Front(0)),
        Api::Metadata | Api::OffsetCommit | Api::OffsetFetch => (3, Place::Front(0)),
        Api::DeleteRecords
        | Api::InitProducerId
        | Api::DescribeConfigs
        | Api::AlterConfigs
        | Api::CreatePartitions
        | Api::DeleteGroups
        | Api::IncrementalAlterConfigs
        | Api::DescribeCluster => (0, Place::Front(0)),
    };
    (version >= since).then_some(place)
}

/// Makes an answer, with its length before it, say that the client is throttled for `ms` milliseconds.
pub fn put(answer: &mut Answer, api: Api, version: i16, ms: u64) {
    // Length and correlation id; tagged fields.
    let header = 8 + usize::from(api.flexible(version) && api != Api::ApiVersions);
    let field = match place(api, version) {
        None => None,
        Some(Place::Front(at)) => answer
            .first_mut()
            .and_then(|piece| piece.owned_mut()?.get_mut(header + at..)?.first_chunk_mut()),
        Some(Place::Back(at)) => answer.last_mut().and_then(|piece| {
            let at = piece.len().checked_sub(at)?;
            piece.owned_mut()?.get_mut(at..)?.first_chunk_mut()
        }),
    };
    if let Some(field) = field {
        let ms = i32::try_from(ms).unwrap_or(i32::MAX);
        *field = i32::from_be_bytes(*field).max(ms).to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use kafka_protocol::messages;
    use kafka_protocol::protocol::{Decodable, Encodable};

    /// Each served version of each API with a throttle time, by the oracle's answer.
    #[test]
    fn every_answer_has_it_where_the_oracle_reads_it() {
        let mut seen = 0;
        macro_rules! check {
            ($($api:ident $response:ident $since:literal;)*) => {$({
                let (min, max) = Api::$api.versions();
                for version in min..=max {
                    let mut body = BytesMut::new();
                    let response = messages::$response::default();
                    response.encode(&mut body, version).unwrap();
                    // Length and header.
                    let mut bytes = Api::$api.answer(version, 7).into_fields();
                    let header = bytes.len();
                    bytes.extend_from_slice(&body);
                    let mut answer: Answer = vec![bytes.into()];
                    let read = |answer: &Answer| {
                        let mut body = bytes::Bytes::copy_from_slice(&answer[0][header..]);
                        let read = messages::$response::decode(&mut body, version).unwrap();
                        assert!(body.is_empty());
                        read.throttle_time_ms
                    };
                    put(&mut answer, Api::$api, version, 5_000);
                    let has = version >= $since;
                    let what = format!("{:?} {version}", Api::$api);
                    assert_eq!(read(&answer), if has { 5_000 } else { 0 }, "{what}");
                    put(&mut answer, Api::$api, version, 70);
                    assert_eq!(read(&answer), if has { 5_000 } else { 0 }, "{what}");
                }
                seen += 1;
            })*};
        }
        check! {
            Produce ProduceResponse 1;
            Fetch FetchResponse 1;
            ListOffsets ListOffsetsResponse 2;
            Metadata MetadataResponse 3;
            OffsetCommit OffsetCommitResponse 3;
            OffsetFetch OffsetFetchResponse 3;
            FindCoordinator FindCoordinatorResponse 1;
            JoinGroup JoinGroupResponse 2;
            Heartbeat HeartbeatResponse 1;
            LeaveGroup LeaveGroupResponse 1;
            SyncGroup SyncGroupResponse 1;
            DescribeGroups DescribeGroupsResponse 1;
            ListGroups ListGroupsResponse 1;
            ApiVersions ApiVersionsResponse 1;
            CreateTopics CreateTopicsResponse 2;
            DeleteTopics DeleteTopicsResponse 1;
            DeleteRecords DeleteRecordsResponse 0;
            InitProducerId InitProducerIdResponse 0;
            DescribeConfigs DescribeConfigsResponse 0;
            AlterConfigs AlterConfigsResponse 0;
            CreatePartitions CreatePartitionsResponse 0;
            DeleteGroups DeleteGroupsResponse 0;
            IncrementalAlterConfigs IncrementalAlterConfigsResponse 0;
            OffsetDelete OffsetDeleteResponse 0;
            DescribeCluster DescribeClusterResponse 0;
        }
        let without = Api::ALL
            .iter()
            .filter(|&&api| place(api, i16::MAX).is_none());
        assert_eq!(seen, Api::ALL.len() - without.count());
    }

    #[test]
    fn answers_without_it_or_cut_off_do_no_harm() {
        for len in 0..20 {
            let before = vec![0xff; len];
            let mut answer: Answer = vec![before.clone().into()];
            put(&mut answer, Api::SaslHandshake, 1, 9);
            assert_eq!(answer[0][..], before);
            put(&mut answer, Api::Metadata, 12, 9);
            assert_eq!(answer[0][..] != before, len >= 13, "{len}");
            put(&mut answer, Api::Produce, 9, 9);
            assert_eq!(answer[0].len(), len);
        }
        put(&mut Vec::new(), Api::Fetch, 12, 9);
    }
}
