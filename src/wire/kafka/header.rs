//! Frames and their headers, and the table of the APIs and versions spoken here.
//!
//! Source: "The Kafka protocol guide". A frame is a length (int32, of what follows), a header and a
//! message. The header's version follows from the API and its version: requests have a client id from
//! header version 1 on and tagged fields from 2 on, answers have tagged fields from 1 on. The client id
//! is never compact. The answer to ApiVersions always has header version 0, since it is read by clients
//! that do not yet know what the broker speaks.

use super::primitives::{DecodeError, Gap, Reader, Writer};

/// Bytes of the length before every frame.
pub const LENGTH_LEN: usize = 4;
/// Bytes that every request's frame has: API key, version, correlation id.
pub const REQUEST_MIN: usize = 8;

macro_rules! api_keys {
    ($($name:ident = $key:literal, flexible $flexible:expr;)*) => {
        /// The APIs that a header can name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(i16)]
        pub enum ApiKey {
            $(#[doc = concat!("Key ", $key, ".")] $name = $key,)*
        }

        impl ApiKey {
            /// The API of a key; `None` for one that is not known here.
            pub fn from_key(key: i16) -> Option<Self> {
                match key {
                    $($key => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The name, as Kafka has it.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }

            /// The first version with the compact forms and tagged fields.
            pub fn first_flexible(self) -> i16 {
                match self {
                    $(Self::$name => $flexible,)*
                }
            }
        }
    };
}

/// No version of the API is flexible.
const NEVER: i16 = i16::MAX;

api_keys! {
    Produce = 0, flexible 9;
    Fetch = 1, flexible 12;
    ListOffsets = 2, flexible 6;
    Metadata = 3, flexible 9;
    OffsetCommit = 8, flexible 8;
    OffsetFetch = 9, flexible 6;
    FindCoordinator = 10, flexible 3;
    JoinGroup = 11, flexible 6;
    Heartbeat = 12, flexible 4;
    LeaveGroup = 13, flexible 4;
    SyncGroup = 14, flexible 4;
    DescribeGroups = 15, flexible 5;
    ListGroups = 16, flexible 3;
    SaslHandshake = 17, flexible NEVER;
    ApiVersions = 18, flexible 3;
    CreateTopics = 19, flexible 5;
    DeleteTopics = 20, flexible 4;
    DeleteRecords = 21, flexible 2;
    InitProducerId = 22, flexible 2;
    OffsetForLeaderEpoch = 23, flexible 4;
    DescribeAcls = 29, flexible 2;
    CreateAcls = 30, flexible 2;
    DeleteAcls = 31, flexible 2;
    DescribeConfigs = 32, flexible 4;
    AlterConfigs = 33, flexible 2;
    SaslAuthenticate = 36, flexible 2;
    CreatePartitions = 37, flexible 2;
    DeleteGroups = 42, flexible 2;
    IncrementalAlterConfigs = 44, flexible 1;
    OffsetDelete = 47, flexible NEVER;
    DescribeCluster = 60, flexible 0;
}

impl ApiKey {
    /// The number on the wire.
    pub fn key(self) -> i16 {
        self as i16
    }

    /// Whether `version` has the compact forms.
    pub fn is_flexible(self, version: i16) -> bool {
        version >= self.first_flexible()
    }

    /// The versions spoken here; `None` where the API is not.
    pub fn range(self) -> Option<&'static ApiRange> {
        SUPPORTED.iter().find(|range| range.api == self)
    }
}

/// The versions of an API that are read and written here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApiRange {
    /// The API.
    pub api: ApiKey,
    /// The first version.
    pub min: i16,
    /// The last version.
    pub max: i16,
    /// The first version to advertise. For Produce it lies below `min`, since librdkafka before 2.8.1
    /// compresses only for brokers that claim version 0.
    pub advertised_min: i16,
}

const fn range(api: ApiKey, min: i16, max: i16) -> ApiRange {
    ApiRange {
        api,
        min,
        max,
        advertised_min: min,
    }
}

/// The APIs and versions spoken here, ascending by key. What a broker advertises is at most this.
pub const SUPPORTED: &[ApiRange] = &[
    ApiRange {
        advertised_min: 0,
        ..range(ApiKey::Produce, 3, 11)
    },
    range(ApiKey::Fetch, 4, 16),
    range(ApiKey::ListOffsets, 1, 7),
    range(ApiKey::Metadata, 0, 13),
    range(ApiKey::ApiVersions, 0, 4),
    range(ApiKey::InitProducerId, 0, 4),
    range(ApiKey::OffsetForLeaderEpoch, 2, 4),
    range(ApiKey::DescribeCluster, 0, 1),
];

/// Why a request's header cannot be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// An API that is not spoken here.
    #[error("unknown API {key} (version {version})")]
    UnknownApi {
        /// The API's number.
        key: i16,
        /// Its version.
        version: i16,
    },
    /// A version that is not spoken here. ApiVersions answers it in version 0 with its error 35.
    #[error("version {version} of {} is not supported", api.name())]
    UnsupportedVersion {
        /// The API.
        api: ApiKey,
        /// Its version.
        version: i16,
        /// What an answer has to carry.
        correlation_id: i32,
    },
    /// Malformed bytes.
    #[error(transparent)]
    Malformed(#[from] DecodeError),
}

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader<'a> {
    /// The API.
    pub api: ApiKey,
    /// Its version.
    pub version: i16,
    /// Chosen by the client, repeated in the answer.
    pub correlation_id: i32,
    /// The client's name for itself.
    pub client_id: Option<&'a str>,
}

impl<'a> RequestHeader<'a> {
    /// Reads the header from a frame (without its length) and gives it with a reader of the message.
    pub fn decode(frame: &'a [u8]) -> Result<(Self, Reader<'a>), HeaderError> {
        let mut reader = Reader::new(frame, false);
        let key = reader.int16()?;
        let version = reader.int16()?;
        let correlation_id = reader.int32()?;
        let Some(range) = ApiKey::from_key(key).and_then(ApiKey::range) else {
            return Err(HeaderError::UnknownApi { key, version });
        };
        let api = range.api;
        if version < range.min || version > range.max {
            return Err(HeaderError::UnsupportedVersion {
                api,
                version,
                correlation_id,
            });
        }
        let client_id = reader.nullable_string()?;
        reader.set_flexible(api.is_flexible(version));
        reader.tagged_fields()?;
        let header = Self {
            api,
            version,
            correlation_id,
            client_id,
        };
        Ok((header, reader))
    }

    /// Begins a request's frame in `out`, for a client: the length, which [`finish_frame`] fills in, and
    /// the header.
    pub fn encode(&self, out: Vec<u8>) -> Writer {
        let mut writer = Writer::with_buffer(out, false);
        writer.int32(0);
        writer.int16(self.api.key());
        writer.int16(self.version);
        writer.int32(self.correlation_id);
        writer.nullable_string(self.client_id);
        writer.set_flexible(self.api.is_flexible(self.version));
        writer.tagged_fields();
        writer
    }

    /// Begins the answer to this request, see [`begin_response`].
    pub fn response(&self, out: Vec<u8>) -> Writer {
        begin_response(self.api, self.version, self.correlation_id, out)
    }
}

/// Whether answers of the API have header version 1, which ends with tagged fields.
fn response_header_tagged(api: ApiKey, version: i16) -> bool {
    api != ApiKey::ApiVersions && api.is_flexible(version)
}

/// Begins an answer's frame in `out`, whose bytes are discarded but whose memory is used again: the
/// length, which [`finish_frame`] fills in, and the header.
pub fn begin_response(api: ApiKey, version: i16, correlation_id: i32, mut out: Vec<u8>) -> Writer {
    out.clear();
    let mut writer = Writer::with_buffer(out, response_header_tagged(api, version));
    writer.int32(0);
    writer.int32(correlation_id);
    writer.tagged_fields();
    writer.set_flexible(api.is_flexible(version));
    writer
}

/// Reads an answer's header, for a client: the correlation id, and a reader of the message.
pub fn decode_response(
    api: ApiKey,
    version: i16,
    frame: &[u8],
) -> Result<(i32, Reader<'_>), DecodeError> {
    let mut reader = Reader::new(frame, response_header_tagged(api, version));
    let correlation_id = reader.int32()?;
    reader.tagged_fields()?;
    reader.set_flexible(api.is_flexible(version));
    Ok((correlation_id, reader))
}

/// A frame to send: bytes with gaps that are filled by records which lie elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Frame {
    /// All bytes but those of the gaps.
    pub bytes: Vec<u8>,
    /// The gaps, ascending; none in most answers.
    pub gaps: Vec<Gap>,
}

/// A part of a frame to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// These of the frame's bytes.
    Bytes(std::ops::Range<usize>),
    /// The records of the gap with this number, counted from 0 over the gaps.
    Gap(usize),
}

impl Frame {
    /// Bytes to send in all, the frame's length and the gaps included.
    pub fn len(&self) -> usize {
        self.bytes.len() + self.gaps.iter().map(|gap| gap.len).sum::<usize>()
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What to send, in order; no part is empty.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let starts = std::iter::once(0).chain(self.gaps.iter().map(|gap| gap.at));
        let ends = self.gaps.iter().map(|gap| gap.at);
        starts
            .zip(ends.chain(std::iter::once(self.bytes.len())))
            .enumerate()
            .flat_map(|(at, (start, end))| {
                let gap = at.checked_sub(1).map(Segment::Gap);
                let bytes = (start < end).then_some(Segment::Bytes(start..end));
                gap.into_iter().chain(bytes)
            })
    }
}

/// Ends a frame that [`begin_response`] or [`RequestHeader::encode`] began: fills in its length.
pub fn finish_frame(mut writer: Writer) -> Frame {
    let len = writer.len().saturating_sub(LENGTH_LEN);
    writer.patch_int32(0, len as i32);
    let (bytes, gaps) = writer.into_parts();
    Frame { bytes, gaps }
}

/// Why the bytes of a connection are no frame; the connection cannot be used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("request of {len} bytes; {REQUEST_MIN} to {max} are taken")]
pub struct FrameError {
    /// The length as read.
    pub len: i32,
    /// The most that is taken.
    pub max: usize,
}

/// The length of the frame that `input` begins with, without the four bytes of the length itself;
/// `None` where these are not yet there. Lengths below [`REQUEST_MIN`] and above `max` are errors.
pub fn frame_len(input: &[u8], max: usize) -> Result<Option<usize>, FrameError> {
    let Some(length) = input.first_chunk::<LENGTH_LEN>() else {
        return Ok(None);
    };
    let len = i32::from_be_bytes(*length);
    if len < REQUEST_MIN as i32 || len as usize > max {
        return Err(FrameError { len, max });
    }
    Ok(Some(len as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use kafka_protocol::messages;
    use kafka_protocol::protocol::{Encodable, StrBytes};

    #[test]
    fn table_is_sorted_and_known_to_the_oracle() {
        assert!(SUPPORTED.windows(2).all(|pair| pair[0].api < pair[1].api));
        for range in SUPPORTED {
            let oracle = messages::ApiKey::try_from(range.api.key()).unwrap();
            assert_eq!(format!("{oracle:?}"), range.api.name());
            assert!(range.advertised_min <= range.min && range.min <= range.max);
            assert!(range.max <= oracle.valid_versions().max);
            for version in range.min..=range.max {
                let header = oracle.request_header_version(version);
                assert_eq!(header == 2, range.api.is_flexible(version), "{range:?}");
                let header = oracle.response_header_version(version);
                assert_eq!(header == 1, response_header_tagged(range.api, version));
            }
        }
    }

    #[test]
    fn headers_agree_with_the_oracle() {
        for range in SUPPORTED {
            for version in range.min..=range.max {
                for client_id in [None, Some(""), Some("client")] {
                    let oracle = messages::RequestHeader::default()
                        .with_request_api_key(range.api.key())
                        .with_request_api_version(version)
                        .with_correlation_id(-5)
                        .with_client_id(client_id.map(StrBytes::from_static_str));
                    let oracle_version = messages::ApiKey::try_from(range.api.key())
                        .unwrap()
                        .request_header_version(version);
                    let mut bytes = BytesMut::new();
                    oracle.encode(&mut bytes, oracle_version).unwrap();
                    bytes.extend_from_slice(&[42]);
                    let (header, mut reader) = RequestHeader::decode(&bytes).unwrap();
                    assert_eq!(reader.int8(), Ok(42));
                    assert_eq!((header.api, header.version), (range.api, version));
                    assert_eq!((header.correlation_id, header.client_id), (-5, client_id));

                    let mut writer = header.encode(Vec::new());
                    writer.int8(42);
                    let frame = finish_frame(writer);
                    assert_eq!(frame.bytes[..4], (bytes.len() as i32).to_be_bytes());
                    assert_eq!(frame.bytes[4..], bytes);
                    for len in 0..bytes.len() - 1 {
                        assert!(RequestHeader::decode(&bytes[..len]).is_err());
                    }

                    let mut writer = header.response(vec![1; 99]);
                    writer.int8(42);
                    let frame = finish_frame(writer);
                    let (id, mut reader) =
                        decode_response(range.api, version, &frame.bytes[4..]).unwrap();
                    assert_eq!((id, reader.int8()), (-5, Ok(42)));
                    assert_eq!(reader.finish(), Ok(()));
                }
            }
        }
    }

    #[test]
    fn what_is_not_spoken_is_told_apart() {
        let frame = |key: i16, version: i16| {
            let mut writer = Writer::new(false);
            writer.int16(key);
            writer.int16(version);
            writer.int32(9);
            writer.into_bytes()
        };
        assert_eq!(
            RequestHeader::decode(&frame(999, 3)).unwrap_err(),
            HeaderError::UnknownApi {
                key: 999,
                version: 3
            }
        );
        assert_eq!(
            RequestHeader::decode(&frame(18, 99)).unwrap_err(),
            HeaderError::UnsupportedVersion {
                api: ApiKey::ApiVersions,
                version: 99,
                correlation_id: 9
            }
        );
    }

    #[test]
    fn frame_lengths_have_limits() {
        assert_eq!(frame_len(&[0, 0, 0], 100), Ok(None));
        assert_eq!(frame_len(&[0, 0, 0, 100, 1], 100), Ok(Some(100)));
        for len in [-1, 0, 7, 101, i32::MAX, i32::MIN] {
            assert!(frame_len(&len.to_be_bytes(), 100).is_err());
        }
    }

    #[test]
    fn segments_leave_out_nothing_and_repeat_nothing() {
        let mut writer = begin_response(ApiKey::ApiVersions, 0, 1, Vec::new());
        writer.gap(5);
        writer.gap(0);
        writer.int8(1);
        writer.gap(7);
        let frame = finish_frame(writer);
        assert_eq!(frame.len(), 8 + 4 + 5 + 4 + 1 + 4 + 7);
        assert_eq!(frame.bytes[..4], (frame.len() as i32 - 4).to_be_bytes());
        assert_eq!(
            frame.segments().collect::<Vec<_>>(),
            [
                Segment::Bytes(0..12),
                Segment::Gap(0),
                Segment::Bytes(12..21),
                Segment::Gap(1)
            ]
        );
    }
}
