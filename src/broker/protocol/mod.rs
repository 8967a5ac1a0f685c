//! Kafka's protocol as bytes: primitive types, headers, API keys with the versions that are served, error
//! codes. Sans-io.
//!
//! Source: the Kafka protocol guide and its message definitions. Invariants: nothing reads behind its slice;
//! a count or length from outside is checked against the bytes that remain before anything is reserved,
//! so a request makes the server hold no more memory than a small multiple of its own size.

pub mod api;
pub mod error;
mod read;
mod write;

pub use api::{Api, RequestHeader};
pub use error::Code;
pub use read::{Malformed, Reader};
pub use write::Writer;
