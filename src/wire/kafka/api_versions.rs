//! ApiVersions: what the broker speaks.
//!
//! Source: Kafka's ApiVersionsRequest.json, ApiVersionsResponse.json; KIP-511. A version that the broker
//! does not know is answered in version 0 with error 35 and the ranges: see [`unsupported`].

use super::header::{ApiKey, ApiRange, Frame, begin_response, finish_frame};
use super::{ErrorCode, message};

message! {
    /// Asks for the versions, and says what the client is.
    pub struct ApiVersionsRequest<'a> {
        /// The client library's name.
        client_software_name: &'a str [3..],
        /// Its version.
        client_software_version: &'a str [3..],
    }

    /// The answer. Tagged fields about features are left out: there are none.
    pub struct ApiVersionsResponse {
        /// `UnsupportedVersion` in version 0 where the request's version is not known.
        error_code: ErrorCode,
        /// The ranges.
        api_keys: Vec<ApiVersion>,
        /// Milliseconds for which the client is throttled.
        throttle_time_ms: i32 [1..],
    }

    /// The versions of one API.
    pub struct ApiVersion {
        /// The API's number.
        api_key: i16,
        /// First version.
        min_version: i16,
        /// Last version.
        max_version: i16,
    }
}

impl From<&ApiRange> for ApiVersion {
    fn from(range: &ApiRange) -> Self {
        Self {
            api_key: range.api.key(),
            min_version: range.advertised_min,
            max_version: range.max,
        }
    }
}

/// The answer to an ApiVersions request of an unknown version: in version 0, with error 35 and `ranges`.
pub fn unsupported(correlation_id: i32, ranges: &[ApiRange], out: Vec<u8>) -> Frame {
    let mut writer = begin_response(ApiKey::ApiVersions, 0, correlation_id, out);
    ApiVersionsResponse {
        error_code: ErrorCode::UnsupportedVersion,
        api_keys: ranges.iter().map(ApiVersion::from).collect(),
        throttle_time_ms: 0,
    }
    .encode(&mut writer, 0);
    finish_frame(writer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::kafka::header::SUPPORTED;
    use crate::wire::kafka::oracle::check_message;

    #[test]
    fn agrees_with_the_oracle() {
        check_message!(ApiVersions, ApiVersionsRequest, |_| ApiVersionsRequest {
            client_software_name: "librdkafka",
            client_software_version: "2.16.0",
        });
        check_message!(ApiVersions, ApiVersionsResponse, |_| ApiVersionsResponse {
            error_code: ErrorCode::UnsupportedVersion,
            api_keys: SUPPORTED.iter().map(ApiVersion::from).collect(),
            throttle_time_ms: 17,
        });
    }

    #[test]
    fn an_unknown_version_is_answered_in_version_0() {
        let frame = unsupported(7, SUPPORTED, vec![1, 2, 3]);
        assert_eq!(frame.len(), frame.bytes.len());
        assert_eq!(frame.bytes[..4], (frame.len() as i32 - 4).to_be_bytes());
        assert_eq!(frame.bytes[4..8], [0, 0, 0, 7]);
        assert_eq!(frame.bytes[8..10], [0, 35]);
        assert_eq!(frame.bytes[10..14], (SUPPORTED.len() as i32).to_be_bytes());
    }
}
