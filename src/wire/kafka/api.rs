//! API keys, the versions of each that are served, and the header of a request.

use super::{Malformed, Reader, Writer};

macro_rules! apis {
    ($($name:ident = $key:literal, $min:literal ..= $max:literal, flexible $flexible:literal;)*) => {
        /// A kind of request.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(i16)]
        #[allow(missing_docs)] // Kafka's own names
        pub enum Api {
            $($name = $key,)*
        }

        impl Api {
            /// All that are served.
            pub const ALL: &[Api] = &[$(Api::$name,)*];

            /// The API of a key.
            pub fn of(key: i16) -> Option<Api> {
                match key {
                    $($key => Some(Api::$name),)*
                    _ => None,
                }
            }

            /// First and last version that is served.
            pub fn versions(self) -> (i16, i16) {
                match self {
                    $(Api::$name => ($min, $max),)*
                }
            }

            /// The first version with compact lengths and tagged fields.
            fn first_flexible(self) -> i16 {
                match self {
                    $(Api::$name => $flexible,)*
                }
            }

            /// Kafka's name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Api::$name => stringify!($name),)*
                }
            }
        }
    };
}

apis! {
    Produce = 0, 3..=11, flexible 9;
    Fetch = 1, 4..=12, flexible 12;
    ListOffsets = 2, 1..=7, flexible 6;
    Metadata = 3, 0..=12, flexible 9;
    OffsetCommit = 8, 2..=8, flexible 8;
    OffsetFetch = 9, 1..=8, flexible 6;
    FindCoordinator = 10, 0..=4, flexible 3;
    JoinGroup = 11, 0..=9, flexible 6;
    Heartbeat = 12, 0..=4, flexible 4;
    LeaveGroup = 13, 0..=5, flexible 4;
    SyncGroup = 14, 0..=5, flexible 4;
    DescribeGroups = 15, 0..=5, flexible 5;
    ListGroups = 16, 0..=4, flexible 3;
    SaslHandshake = 17, 0..=1, flexible 99;
    ApiVersions = 18, 0..=4, flexible 3;
    CreateTopics = 19, 2..=7, flexible 5;
    DeleteTopics = 20, 1..=6, flexible 4;
    DeleteRecords = 21, 0..=2, flexible 2;
    InitProducerId = 22, 0..=4, flexible 2;
    DescribeConfigs = 32, 1..=4, flexible 4;
    AlterConfigs = 33, 0..=2, flexible 2;
    SaslAuthenticate = 36, 0..=2, flexible 2;
    CreatePartitions = 37, 0..=3, flexible 2;
    DeleteGroups = 42, 0..=2, flexible 2;
    IncrementalAlterConfigs = 44, 0..=1, flexible 1;
    OffsetDelete = 47, 0..=0, flexible 99;
    DescribeCluster = 60, 0..=1, flexible 0;
}

impl Api {
    /// Whether this version is served.
    pub fn serves(self, version: i16) -> bool {
        let (min, max) = self.versions();
        (min..=max).contains(&version)
    }

    /// What ApiVersions says: older librdkafka takes a least version of Produce above 0 for a broker without
    /// compression, so it is named as 0; what is below 3 is then refused as unsupported.
    pub fn advertised(self) -> (i16, i16) {
        match self {
            Api::Produce => (0, self.versions().1),
            _ => self.versions(),
        }
    }

    /// Whether this version has compact lengths and tagged fields.
    pub fn flexible(self, version: i16) -> bool {
        version >= self.first_flexible()
    }

    /// An answer of this version.
    pub fn answer(self, version: i16, correlation: i32) -> Writer {
        let flexible = self.flexible(version);
        // A client that does not know the broker's version must understand the header of ApiVersions.
        Writer::answer(correlation, flexible, flexible && self != Api::ApiVersions)
    }
}

/// What a request begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader<'a> {
    /// The API's key, known or not.
    pub key: i16,
    /// Its version, served or not.
    pub version: i16,
    /// Comes back in the answer.
    pub correlation: i32,
    /// What the client calls itself.
    pub client_id: Option<&'a str>,
}

impl<'a> RequestHeader<'a> {
    /// Reads the header of a request, and leaves the reader at its body. Of an API or a version that is not
    /// served nothing behind the correlation id is read.
    pub fn read(request: &'a [u8]) -> Result<(Self, Reader<'a>), Malformed> {
        let mut reader = Reader::new(request, false);
        let mut header = Self {
            key: reader.i16()?,
            version: reader.i16()?,
            correlation: reader.i32()?,
            client_id: None,
        };
        if let Some(api) = Api::of(header.key)
            && api.serves(header.version)
        {
            header.client_id = reader.nullable_string()?;
            if api.flexible(header.version) {
                reader.set_flexible(true);
                reader.end()?;
            }
        }
        Ok((header, reader))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use kafka_protocol::messages;
    use kafka_protocol::protocol::{Encodable, StrBytes};

    #[test]
    fn the_table_is_sorted_and_agrees_with_the_oracle() {
        let keys: Vec<i16> = Api::ALL.iter().map(|&api| api as i16).collect();
        assert!(keys.is_sorted());
        for &api in Api::ALL {
            let oracle = messages::ApiKey::try_from(api as i16).unwrap();
            assert_eq!(format!("{oracle:?}"), api.name());
            let (min, max) = api.versions();
            for version in min..=max {
                let tagged = oracle.request_header_version(version) == 2;
                assert_eq!(tagged, api.flexible(version), "{api:?} {version}");
                let tagged = oracle.response_header_version(version) == 1;
                let answer = api.answer(version, 7).into_fields();
                assert_eq!(tagged, answer.len() == 9, "{api:?} {version}");
            }
        }
    }

    #[test]
    fn headers_agree_with_the_oracle() {
        for &api in Api::ALL {
            let oracle = messages::ApiKey::try_from(api as i16).unwrap();
            for version in api.versions().0..=api.versions().1 {
                for client_id in [None, Some(""), Some("client")] {
                    let header = messages::RequestHeader::default()
                        .with_request_api_key(api as i16)
                        .with_request_api_version(version)
                        .with_correlation_id(-5)
                        .with_client_id(client_id.map(StrBytes::from_static_str));
                    let mut bytes = BytesMut::new();
                    let header_version = oracle.request_header_version(version);
                    header.encode(&mut bytes, header_version).unwrap();
                    bytes.extend_from_slice(&[42]);
                    let (header, mut reader) = RequestHeader::read(&bytes).unwrap();
                    assert_eq!(reader.i8(), Ok(42));
                    assert_eq!((header.key, header.version), (api as i16, version));
                    assert_eq!((header.correlation, header.client_id), (-5, client_id));
                    for len in 0..bytes.len() - 1 {
                        assert!(RequestHeader::read(&bytes[..len]).is_err());
                    }
                }
            }
        }
    }

    #[test]
    fn headers_of_both_kinds_are_read() {
        let old = [0, 3, 0, 1, 0, 0, 0, 7, 0, 2, b'm', b'e', 42];
        let (header, mut rest) = RequestHeader::read(&old).unwrap();
        assert_eq!(
            (
                header.key,
                header.version,
                header.correlation,
                header.client_id
            ),
            (3, 1, 7, Some("me"))
        );
        assert_eq!(rest.i8(), Ok(42));
        let flexible = [0, 18, 0, 3, 0, 0, 0, 7, 0xff, 0xff, 1, 0, 1, 9, 42];
        let (header, mut rest) = RequestHeader::read(&flexible).unwrap();
        assert_eq!(header.client_id, None);
        assert_eq!(rest.i8(), Ok(42));
        let future = [0, 18, 0, 99, 0, 0, 0, 7, 1];
        assert_eq!(RequestHeader::read(&future).unwrap().0.version, 99);
        assert!(RequestHeader::read(&old[..7]).is_err());
        assert!(RequestHeader::read(&old[..11]).is_err());
    }
}
