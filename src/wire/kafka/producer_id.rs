//! InitProducerId: the identity by which an idempotent producer's batches are told apart.
//!
//! Source: Kafka's InitProducerIdRequest.json, InitProducerIdResponse.json; KIP-98, KIP-360.

use super::{ErrorCode, message};

message! {
    /// Asks for an id, or for the next epoch of one.
    pub struct InitProducerIdRequest<'a> {
        /// Null for an idempotent producer outside transactions.
        transactional_id: Option<&'a str>,
        /// Milliseconds after which an idle transaction is aborted.
        transaction_timeout_ms: i32,
        /// The id whose epoch is to be raised, or −1.
        producer_id: i64 [3..; -1],
        /// Its epoch, or −1.
        producer_epoch: i16 [3..; -1],
    }

    /// The answer.
    pub struct InitProducerIdResponse {
        /// Milliseconds for which the client is throttled.
        throttle_time_ms: i32,
        /// The error.
        error_code: ErrorCode,
        /// The id, or −1.
        producer_id: i64 [0..; -1],
        /// Its epoch.
        producer_epoch: i16 [0..; -1],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::kafka::oracle::check_message;

    #[test]
    fn agrees_with_the_oracle() {
        check_message!(InitProducerId, InitProducerIdRequest, |version| {
            InitProducerIdRequest {
                transactional_id: (version % 2 == 0).then_some("tx"),
                transaction_timeout_ms: 60_000,
                producer_id: if version >= 3 { 1 << 33 } else { -1 },
                producer_epoch: if version >= 3 { 7 } else { -1 },
            }
        });
        check_message!(InitProducerId, InitProducerIdResponse, |_| {
            InitProducerIdResponse {
                throttle_time_ms: 1,
                error_code: ErrorCode::ProducerFenced,
                producer_id: 1 << 33,
                producer_epoch: 8,
            }
        });
    }
}
