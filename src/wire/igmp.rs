//! IGMP (version 2: RFC 2236, version 3: RFC 3376).

/// A version 2 message, and a version 3 report before its records.
pub const HEADER_LEN: usize = 8;
/// Type: membership query, all versions.
pub const QUERY: u8 = 0x11;
/// Type: version 2 report.
pub const V2_REPORT: u8 = 0x16;
/// Type: version 3 report.
pub const V3_REPORT: u8 = 0x22;
/// Shortest version 3 query; those of 8 bytes are older.
pub const V3_QUERY_LEN: usize = 12;
/// A group record without sources.
pub const V3_RECORD_LEN: usize = 8;
/// Where version 3 reports go (RFC 3376 §4.2.14).
pub const V3_REPORT_DESTINATION: [u8; 4] = [224, 0, 0, 22];
