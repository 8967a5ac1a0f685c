//! Formats on the wire, sans-io: bytes in, values out, and back.

pub mod datagram;
pub mod record_batch;
pub mod varint;
