//! The datagram protocol: acknowledged, exactly-once produce over UDP, one message a datagram.
//!
//! Specified byte by byte in `docs/formats.md`; all integers are big-endian. A datagram begins with
//! [`MAGIC`], [`VERSION`], its kind and two flag bytes that are zero.
//!
//! Invariants: decoding never reads behind the slice, never allocates, and refuses what it does not
//! know; `encode` followed by `decode` gives the value back.

/// "TAFD".
pub const MAGIC: u32 = 0x5441_4644;
/// Version of the protocol.
pub const VERSION: u8 = 1;
/// Bytes common to all kinds.
pub const HEADER_LEN: usize = 8;
/// Bytes of a PRODUCE datagram before its record batch.
pub const PRODUCE_HEADER_LEN: usize = 32;
/// Bytes of a WELCOME.
pub const WELCOME_LEN: usize = 36;
/// Bytes of an ACK before its entries.
pub const ACK_HEADER_LEN: usize = 12;
/// Bytes of an entry of an ACK.
pub const ACK_ENTRY_LEN: usize = 40;
/// Longest topic name, as in Kafka.
pub const MAX_TOPIC_NAME: usize = 249;
/// Batches that one producer may have unacknowledged in one partition; the server remembers as many,
/// so that a retransmission within the window is answered with its first offset.
pub const MAX_INFLIGHT_BATCHES: usize = 32;
/// Set in producer ids that clients draw themselves; the server never assigns one with it.
pub const CLIENT_PRODUCER_ID_BIT: i64 = 1 << 62;

const KIND_HELLO: u8 = 1;
const KIND_WELCOME: u8 = 2;
const KIND_PRODUCE: u8 = 3;
const KIND_ACK: u8 = 4;

/// Why a datagram was not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DatagramError {
    /// Too few bytes for its kind.
    #[error("datagram is cut off")]
    Truncated,
    /// Not this protocol.
    #[error("datagram does not begin with the protocol's magic")]
    Magic,
    /// Another version.
    #[error("datagram has protocol version {0}, only {VERSION} is known")]
    Version(u8),
    /// An unknown kind, or one that this side does not take.
    #[error("datagram has unknown kind {0}")]
    Kind(u8),
    /// A field with a value that is not allowed.
    #[error("datagram has a field with an impossible value")]
    Field,
}

/// What the server says of a batch or a greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum ErrorCode {
    /// Done.
    None = 0,
    /// Stored already; the offset is the first one's, or −1 where it is no longer known.
    Duplicate = 1,
    /// The sequence does not follow the last one stored: something before it is missing.
    OutOfOrder = 2,
    /// A newer epoch of this producer has been seen.
    Fenced = 3,
    /// The record batch is malformed.
    InvalidBatch = 4,
    /// No such topic or partition.
    UnknownPartition = 5,
    /// The disk is full; may be tried again.
    StorageFull = 6,
    /// The shard stopped after a write error.
    StorageFailed = 7,
    /// The shard is under pressure; may be tried again.
    Busy = 8,
    /// Compressed batches are not taken here.
    UnsupportedCodec = 9,
    /// The batch is larger than a commit.
    TooLarge = 10,
    /// The acknowledgement level is none of 0, 1 and −1.
    InvalidAcks = 11,
}

impl ErrorCode {
    /// All codes, in order of their numbers.
    pub const ALL: [Self; 12] = [
        Self::None,
        Self::Duplicate,
        Self::OutOfOrder,
        Self::Fenced,
        Self::InvalidBatch,
        Self::UnknownPartition,
        Self::StorageFull,
        Self::StorageFailed,
        Self::Busy,
        Self::UnsupportedCodec,
        Self::TooLarge,
        Self::InvalidAcks,
    ];

    /// The code with this number.
    pub fn from_u16(code: u16) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Its name in counters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Duplicate => "duplicate",
            Self::OutOfOrder => "out_of_order",
            Self::Fenced => "fenced",
            Self::InvalidBatch => "invalid_batch",
            Self::UnknownPartition => "unknown_partition",
            Self::StorageFull => "storage_full",
            Self::StorageFailed => "storage_failed",
            Self::Busy => "busy",
            Self::UnsupportedCodec => "unsupported_codec",
            Self::TooLarge => "too_large",
            Self::InvalidAcks => "invalid_acks",
        }
    }

    /// What it means, for people.
    pub const fn text(self) -> &'static str {
        match self {
            Self::None => "done",
            Self::Duplicate => "stored before",
            Self::OutOfOrder => "an earlier sequence number is missing",
            Self::Fenced => "a producer with this id and a newer epoch exists",
            Self::InvalidBatch => "the record batch is malformed",
            Self::UnknownPartition => "there is no such topic or partition",
            Self::StorageFull => "the server's disk is full",
            Self::StorageFailed => "the server's disk failed; its log names the error",
            Self::Busy => "the server is under pressure",
            Self::UnsupportedCodec => "compressed record batches are not taken over this protocol",
            Self::TooLarge => "the record batch is too large",
            Self::InvalidAcks => "the acknowledgement level is none of 0, 1 and -1",
        }
    }

    /// Whether the same batch may succeed later without any change.
    pub const fn retriable(self) -> bool {
        matches!(self, Self::OutOfOrder | Self::StorageFull | Self::Busy)
    }
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.text())
    }
}

/// Client → server: which topic is this, and may I?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello<'a> {
    /// Echoed in the answer.
    pub request_id: u64,
    /// Topic name.
    pub topic: &'a str,
}

/// Server → client: the answer to a [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// Of the greeting.
    pub request_id: u64,
    /// [`ErrorCode::None`] or [`ErrorCode::UnknownPartition`].
    pub error: ErrorCode,
    /// Acknowledgement level for clients that do not choose.
    pub default_acks: i8,
    /// The topic's id, for PRODUCE.
    pub topic_id: u32,
    /// Its number of partitions.
    pub partitions: u32,
    /// Batches that may be unacknowledged in one partition at the start.
    pub credit: u32,
    /// Largest UDP payload that the server takes, in bytes.
    pub max_datagram: u32,
}

/// Client → server: the header before one record batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProduceHeader {
    /// From the [`Welcome`].
    pub topic_id: u32,
    /// Partition number.
    pub partition: u32,
    /// 0, 1 or −1 (all); other values are answered with [`ErrorCode::InvalidAcks`].
    pub acks: i8,
    /// Echoed in the acknowledgement.
    pub request_id: u64,
}

/// Server → client: what became of one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct AckEntry {
    /// Of the PRODUCE.
    pub request_id: u64,
    /// Of the PRODUCE.
    pub topic_id: u32,
    /// Of the PRODUCE.
    pub partition: u32,
    /// Offset of the batch's first record, or −1.
    pub base_offset: i64,
    /// Of the batch.
    pub base_sequence: i32,
    /// Of the batch.
    pub producer_epoch: i16,
    /// What became of it.
    pub error: ErrorCode,
    /// Batches that the producer may have unacknowledged in this partition from now on.
    pub credit: u32,
}

/// What a server may receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request<'a> {
    /// A greeting.
    Hello(Hello<'a>),
    /// A record batch: header and bytes, which are not looked at.
    Produce(ProduceHeader, &'a [u8]),
}

/// What a client may receive.
#[derive(Debug, Clone)]
pub enum Response<'a> {
    /// The answer to a greeting.
    Welcome(Welcome),
    /// Acknowledgements.
    Ack(AckEntries<'a>),
}

/// The entries of an ACK datagram.
#[derive(Debug, Clone)]
pub struct AckEntries<'a>(&'a [u8]);

#[inline(always)]
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Checks the common header and returns the kind.
#[inline(always)]
fn kind(bytes: &[u8]) -> Result<u8, DatagramError> {
    let header = bytes
        .first_chunk::<HEADER_LEN>()
        .ok_or(DatagramError::Truncated)?;
    if u32::from_be_bytes(array(header, 0)) != MAGIC {
        return Err(DatagramError::Magic);
    }
    if header[4] != VERSION {
        return Err(DatagramError::Version(header[4]));
    }
    if header[6] != 0 || header[7] != 0 {
        return Err(DatagramError::Field);
    }
    Ok(header[5])
}

fn put_header(out: &mut [u8], kind: u8) {
    out[0..4].copy_from_slice(&MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&[VERSION, kind, 0, 0]);
}

impl<'a> Request<'a> {
    /// Reads a datagram that came to a server.
    #[inline]
    pub fn decode(bytes: &'a [u8]) -> Result<Self, DatagramError> {
        match kind(bytes)? {
            KIND_PRODUCE => {
                let (header, batch) = bytes
                    .split_at_checked(PRODUCE_HEADER_LEN)
                    .ok_or(DatagramError::Truncated)?;
                Ok(Self::Produce(ProduceHeader::from_bytes(header), batch))
            }
            KIND_HELLO => {
                let rest = &bytes[HEADER_LEN..];
                let fixed = rest.first_chunk::<10>().ok_or(DatagramError::Truncated)?;
                let len = usize::from(u16::from_be_bytes(array(fixed, 8)));
                let name = rest.get(10..10 + len).ok_or(DatagramError::Truncated)?;
                if len == 0 || len > MAX_TOPIC_NAME || rest.len() != 10 + len {
                    return Err(DatagramError::Field);
                }
                let topic = std::str::from_utf8(name).map_err(|_| DatagramError::Field)?;
                Ok(Self::Hello(Hello {
                    request_id: u64::from_be_bytes(array(fixed, 0)),
                    topic,
                }))
            }
            other => Err(DatagramError::Kind(other)),
        }
    }
}

impl Hello<'_> {
    /// Writes the datagram at the start of `out`; returns its length.
    ///
    /// # Panics
    /// When the topic name is empty or longer than [`MAX_TOPIC_NAME`], or `out` too short for it.
    pub fn encode(&self, out: &mut [u8]) -> usize {
        let name = self.topic.as_bytes();
        assert!(
            (1..=MAX_TOPIC_NAME).contains(&name.len()),
            "topic names have 1 to {MAX_TOPIC_NAME} bytes"
        );
        put_header(out, KIND_HELLO);
        out[8..16].copy_from_slice(&self.request_id.to_be_bytes());
        out[16..18].copy_from_slice(&(name.len() as u16).to_be_bytes());
        out[18..18 + name.len()].copy_from_slice(name);
        18 + name.len()
    }
}

impl ProduceHeader {
    /// Reads the fields behind the common header, which must have been checked.
    ///
    /// # Panics
    /// When `bytes` is shorter than [`PRODUCE_HEADER_LEN`].
    #[inline]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self {
            topic_id: u32::from_be_bytes(array(bytes, 8)),
            partition: u32::from_be_bytes(array(bytes, 12)),
            acks: bytes[16] as i8,
            request_id: u64::from_be_bytes(array(bytes, 24)),
        }
    }

    /// Writes header and fields; the record batch goes behind them.
    ///
    /// # Panics
    /// When `out` is shorter than [`PRODUCE_HEADER_LEN`].
    #[inline]
    pub fn encode(&self, out: &mut [u8]) -> usize {
        put_header(out, KIND_PRODUCE);
        out[8..12].copy_from_slice(&self.topic_id.to_be_bytes());
        out[12..16].copy_from_slice(&self.partition.to_be_bytes());
        out[16] = self.acks as u8;
        out[17..24].fill(0);
        out[24..32].copy_from_slice(&self.request_id.to_be_bytes());
        PRODUCE_HEADER_LEN
    }
}

impl Welcome {
    /// Writes the datagram.
    ///
    /// # Panics
    /// When `out` is shorter than [`WELCOME_LEN`].
    pub fn encode(&self, out: &mut [u8]) -> usize {
        put_header(out, KIND_WELCOME);
        out[8..16].copy_from_slice(&self.request_id.to_be_bytes());
        out[16..18].copy_from_slice(&(self.error as u16).to_be_bytes());
        out[18] = self.default_acks as u8;
        out[19] = 0;
        out[20..24].copy_from_slice(&self.topic_id.to_be_bytes());
        out[24..28].copy_from_slice(&self.partitions.to_be_bytes());
        out[28..32].copy_from_slice(&self.credit.to_be_bytes());
        out[32..36].copy_from_slice(&self.max_datagram.to_be_bytes());
        WELCOME_LEN
    }
}

impl AckEntry {
    /// Writes the entry.
    ///
    /// # Panics
    /// When `out` is shorter than [`ACK_ENTRY_LEN`].
    #[inline]
    pub fn encode(&self, out: &mut [u8]) -> usize {
        out[0..8].copy_from_slice(&self.request_id.to_be_bytes());
        out[8..12].copy_from_slice(&self.topic_id.to_be_bytes());
        out[12..16].copy_from_slice(&self.partition.to_be_bytes());
        out[16..24].copy_from_slice(&self.base_offset.to_be_bytes());
        out[24..28].copy_from_slice(&self.base_sequence.to_be_bytes());
        out[28..30].copy_from_slice(&self.producer_epoch.to_be_bytes());
        out[30..32].copy_from_slice(&(self.error as u16).to_be_bytes());
        out[32..36].copy_from_slice(&self.credit.to_be_bytes());
        out[36..40].fill(0);
        ACK_ENTRY_LEN
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            request_id: u64::from_be_bytes(array(bytes, 0)),
            topic_id: u32::from_be_bytes(array(bytes, 8)),
            partition: u32::from_be_bytes(array(bytes, 12)),
            base_offset: i64::from_be_bytes(array(bytes, 16)),
            base_sequence: i32::from_be_bytes(array(bytes, 24)),
            producer_epoch: i16::from_be_bytes(array(bytes, 28)),
            error: ErrorCode::from_u16(u16::from_be_bytes(array(bytes, 30)))?,
            credit: u32::from_be_bytes(array(bytes, 32)),
        })
    }
}

/// Writes the part of an ACK datagram before its `count` entries.
///
/// # Panics
/// When `out` is shorter than [`ACK_HEADER_LEN`].
#[inline]
pub fn encode_ack_header(count: u16, out: &mut [u8]) -> usize {
    put_header(out, KIND_ACK);
    out[8..10].copy_from_slice(&count.to_be_bytes());
    out[10..12].fill(0);
    ACK_HEADER_LEN
}

/// The most entries of an ACK within `payload` bytes of UDP payload.
#[inline]
pub const fn ack_capacity(payload: usize) -> usize {
    payload.saturating_sub(ACK_HEADER_LEN) / ACK_ENTRY_LEN
}

impl<'a> Response<'a> {
    /// Reads a datagram that came to a client.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, DatagramError> {
        match kind(bytes)? {
            KIND_WELCOME => {
                if bytes.len() < WELCOME_LEN {
                    return Err(DatagramError::Truncated);
                }
                Ok(Self::Welcome(Welcome {
                    request_id: u64::from_be_bytes(array(bytes, 8)),
                    error: ErrorCode::from_u16(u16::from_be_bytes(array(bytes, 16)))
                        .ok_or(DatagramError::Field)?,
                    default_acks: bytes[18] as i8,
                    topic_id: u32::from_be_bytes(array(bytes, 20)),
                    partitions: u32::from_be_bytes(array(bytes, 24)),
                    credit: u32::from_be_bytes(array(bytes, 28)),
                    max_datagram: u32::from_be_bytes(array(bytes, 32)),
                }))
            }
            KIND_ACK => {
                let (header, entries) = bytes
                    .split_at_checked(ACK_HEADER_LEN)
                    .ok_or(DatagramError::Truncated)?;
                let count = usize::from(u16::from_be_bytes(array(header, 8)));
                let entries = entries
                    .get(..count * ACK_ENTRY_LEN)
                    .ok_or(DatagramError::Truncated)?;
                if entries
                    .chunks_exact(ACK_ENTRY_LEN)
                    .any(|entry| AckEntry::decode(entry).is_none())
                {
                    return Err(DatagramError::Field);
                }
                Ok(Self::Ack(AckEntries(entries)))
            }
            other => Err(DatagramError::Kind(other)),
        }
    }
}

impl Iterator for AckEntries<'_> {
    type Item = AckEntry;

    fn next(&mut self) -> Option<AckEntry> {
        let (entry, rest) = self.0.split_at_checked(ACK_ENTRY_LEN)?;
        self.0 = rest;
        AckEntry::decode(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn codes_have_their_numbers() {
        for (number, code) in ErrorCode::ALL.into_iter().enumerate() {
            assert_eq!(code as usize, number);
            assert_eq!(ErrorCode::from_u16(number as u16), Some(code));
        }
        assert_eq!(ErrorCode::from_u16(12), None);
    }

    #[test]
    fn a_produce_header_has_these_bytes() {
        let mut out = [0xee; PRODUCE_HEADER_LEN];
        ProduceHeader {
            topic_id: 1,
            partition: 2,
            acks: -1,
            request_id: 3,
        }
        .encode(&mut out);
        let expected = b"TAFD\x01\x03\0\0\0\0\0\x01\0\0\0\x02\xff\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x03";
        assert_eq!(&out, expected);
    }

    #[test]
    fn the_wrong_side_and_version_are_refused() {
        let mut out = [0; 64];
        let len = Hello {
            request_id: 1,
            topic: "t",
        }
        .encode(&mut out);
        assert_eq!(
            Response::decode(&out[..len]).err(),
            Some(DatagramError::Kind(1))
        );
        out[4] = 2;
        assert_eq!(
            Request::decode(&out[..len]).err(),
            Some(DatagramError::Version(2))
        );
        out[0] = 0;
        assert_eq!(
            Request::decode(&out[..len]).err(),
            Some(DatagramError::Magic)
        );
    }

    proptest! {
        #[test]
        fn requests_round_trip(request_id: u64, topic in "[a-z]{1,249}", topic_id: u32, partition: u32, acks: i8) {
            let mut out = [0; 300];
            let hello = Hello { request_id, topic: &topic };
            let len = hello.encode(&mut out);
            prop_assert_eq!(Request::decode(&out[..len]), Ok(Request::Hello(hello)));
            prop_assert_eq!(Request::decode(&out[..len - 1]).err(), Some(DatagramError::Truncated));
            let header = ProduceHeader { topic_id, partition, acks, request_id };
            let len = header.encode(&mut out);
            out[len] = 9;
            prop_assert_eq!(Request::decode(&out[..len + 1]), Ok(Request::Produce(header, &[9])));
        }

        #[test]
        fn responses_round_trip(
            request_id: u64, ids: (u32, u32), base_offset: i64, base_sequence: i32, producer_epoch: i16,
            error in 0u16..12, credit: u32, count in 0u16..30,
        ) {
            let error = ErrorCode::from_u16(error).unwrap();
            let entry = AckEntry {
                request_id, topic_id: ids.0, partition: ids.1, base_offset, base_sequence, producer_epoch, error, credit,
            };
            let mut out = [0; 1472];
            let mut len = encode_ack_header(count, &mut out);
            for _ in 0..count {
                len += entry.encode(&mut out[len..]);
            }
            prop_assert!(ack_capacity(out.len()) >= usize::from(count));
            let Ok(Response::Ack(entries)) = Response::decode(&out[..len]) else { panic!("no ack") };
            prop_assert_eq!(entries.collect::<Vec<_>>(), vec![entry; usize::from(count)]);
            let welcome = Welcome {
                request_id, error, default_acks: -1, topic_id: ids.0, partitions: ids.1, credit, max_datagram: 1472,
            };
            let len = welcome.encode(&mut out);
            let Ok(Response::Welcome(decoded)) = Response::decode(&out[..len]) else { panic!("no welcome") };
            prop_assert_eq!(decoded, welcome);
        }

        #[test]
        fn any_bytes_are_safe(mut bytes in prop::collection::vec(any::<u8>(), 0..120), kind in 0u8..6, head: bool) {
            if head && bytes.len() >= HEADER_LEN {
                put_header(&mut bytes, kind);
            }
            let _ = Request::decode(&bytes);
            if let Ok(Response::Ack(entries)) = Response::decode(&bytes) {
                entries.for_each(drop);
            }
        }
    }
}
