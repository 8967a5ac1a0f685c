//! Kafka's record batch, magic 2: the one format in which messages are sent, stored and read.
//!
//! Source: Apache Kafka's message format document. All integers are big-endian; those inside a record
//! are zigzag varints. The CRC-32C covers everything from the attributes on, so that the base offset
//! and the leader epoch, which the log assigns, lie outside it.
//!
//! ```text
//! 0  base offset i64      21 attributes i16          43 producer id i64
//! 8  batch length i32     23 last offset delta i32   51 producer epoch i16
//! 12 leader epoch i32     27 base timestamp i64      53 base sequence i32
//! 16 magic i8 = 2         35 max timestamp i64       57 records count i32
//! 17 CRC-32C u32                                     61 records
//! ```
//!
//! Offset deltas ascend; a producer's are 0, 1, 2, …, while a batch that compaction has thinned out
//! skips some, also at its start and its end.
//!
//! Invariants: nothing here reads behind its slice or trusts a count; an uncompressed batch that
//! [`validate`] took can be walked by [`Records`] without an error.

use super::varint;

/// Bytes before the first record.
pub const HEADER_LEN: usize = 61;
/// Bytes before the part that `batch_length` counts.
const LENGTH_BASE: usize = 12;
/// Where the bytes begin that the CRC covers.
const CRC_START: usize = 21;
/// The only format version that is taken.
pub const MAGIC: i8 = 2;
/// Attributes: the codec.
pub(crate) const CODEC_MASK: i16 = 0b111;
/// Attributes: the broker's time instead of the producer's.
pub(crate) const LOG_APPEND_TIME: i16 = 1 << 3;
/// Attributes: no messages but marks for readers.
const CONTROL: i16 = 1 << 5;
/// Attributes: the base timestamp is no record's time but says until when the batch's tombstones are kept, at least;
/// written by compaction (Kafka's KIP-534). The records' times count from it all the same.
pub(crate) const DELETE_HORIZON: i16 = 1 << 6;
/// The fewest bytes that a record takes: length, attributes, two deltas, key and value lengths,
/// header count.
const RECORD_MIN: usize = 7;
/// The most bytes that a record without key and headers takes beside its value: length (5),
/// attributes (1), timestamp delta (10), offset delta (5), key length (1), value length (5), header
/// count (1).
pub const RAW_RECORD_OVERHEAD_MAX: usize = 28;

/// Why bytes are no valid record batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Fewer bytes than the header or the batch length say.
    #[error("record batch is cut off: {have} bytes of {need}")]
    Truncated {
        /// Bytes present.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// More bytes than one batch.
    #[error("{extra} bytes behind the record batch")]
    TrailingBytes {
        /// Bytes behind the batch.
        extra: usize,
    },
    /// A batch length that cannot be.
    #[error("batch length {0} is impossible")]
    Length(i32),
    /// Not format version 2.
    #[error("record batch has magic {0}, only 2 is supported")]
    Magic(i8),
    /// Damaged.
    #[error("record batch has CRC-32C {computed:08x}, its header says {stored:08x}")]
    Crc {
        /// As the header says.
        stored: u32,
        /// As the bytes say.
        computed: u32,
    },
    /// Count, last offset delta and records disagree.
    #[error(
        "record batch counts {count} records with last offset delta {last_delta}, which does not fit its records"
    )]
    Count {
        /// The header's count.
        count: i32,
        /// The header's last offset delta.
        last_delta: i32,
    },
    /// A compressed batch where only plain ones are taken.
    #[error("record batch has codec {0}, only uncompressed batches are taken here")]
    Codec(i16),
    /// Attributes that only the log itself may set, or unknown ones.
    #[error("record batch has attributes {0:#x}, which a producer may not set")]
    Attributes(i16),
    /// A record that does not fit its length.
    #[error("record {index} is malformed")]
    Record {
        /// Its place in the batch, from 0.
        index: i32,
    },
}

/// The header's fields, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// Offset of the first record.
    pub base_offset: i64,
    /// Bytes behind this field.
    pub batch_length: i32,
    /// Leader epoch; outside the CRC.
    pub partition_leader_epoch: i32,
    /// Format version.
    pub magic: i8,
    /// CRC-32C of everything from the attributes on.
    pub crc: u32,
    /// Codec (bits 0–2), timestamp type (3), transactional (4), control (5).
    pub attributes: i16,
    /// Offset of the last record less the base offset.
    pub last_offset_delta: i32,
    /// Timestamp of the first record, Unix milliseconds.
    pub base_timestamp: i64,
    /// Largest timestamp, Unix milliseconds.
    pub max_timestamp: i64,
    /// Idempotent producer, or −1.
    pub producer_id: i64,
    /// Its epoch, or −1.
    pub producer_epoch: i16,
    /// Sequence number of the first record, or −1.
    pub base_sequence: i32,
    /// Number of records.
    pub records_count: i32,
}

impl BatchHeader {
    /// Bytes of the whole batch.
    #[inline]
    pub fn total_len(&self) -> usize {
        LENGTH_BASE + self.batch_length as usize
    }

    /// The codec: 0 none, 1 gzip, 2 snappy, 3 lz4, 4 zstd.
    #[inline]
    pub fn codec(&self) -> i16 {
        self.attributes & CODEC_MASK
    }

    /// Whether the batch holds marks for readers instead of messages.
    #[inline]
    pub fn is_control(&self) -> bool {
        self.attributes & CONTROL != 0
    }

    /// Until when its tombstones are kept, Unix milliseconds, where compaction has said so.
    pub fn delete_horizon(&self) -> Option<i64> {
        (self.attributes & DELETE_HORIZON != 0).then_some(self.base_timestamp)
    }

    /// The time that counts for every record of the batch, where the broker set it.
    #[inline]
    pub fn append_time(&self) -> Option<i64> {
        (self.attributes & LOG_APPEND_TIME != 0).then_some(self.max_timestamp)
    }

    /// Offset behind the last record.
    #[inline]
    pub fn next_offset(&self) -> i64 {
        self.base_offset
            .saturating_add(i64::from(self.last_offset_delta))
            .saturating_add(1)
    }
}

#[inline(always)]
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// Reads the header; checks that the length is possible and the magic is 2, but neither the CRC nor
/// that all of the batch is there.
#[inline]
pub fn parse_header(bytes: &[u8]) -> Result<BatchHeader, BatchError> {
    let Some(bytes) = bytes.first_chunk::<HEADER_LEN>() else {
        return Err(BatchError::Truncated {
            have: bytes.len(),
            need: HEADER_LEN,
        });
    };
    let header = BatchHeader {
        base_offset: i64::from_be_bytes(array(bytes, 0)),
        batch_length: i32::from_be_bytes(array(bytes, 8)),
        partition_leader_epoch: i32::from_be_bytes(array(bytes, 12)),
        magic: bytes[16] as i8,
        crc: u32::from_be_bytes(array(bytes, 17)),
        attributes: i16::from_be_bytes(array(bytes, 21)),
        last_offset_delta: i32::from_be_bytes(array(bytes, 23)),
        base_timestamp: i64::from_be_bytes(array(bytes, 27)),
        max_timestamp: i64::from_be_bytes(array(bytes, 35)),
        producer_id: i64::from_be_bytes(array(bytes, 43)),
        producer_epoch: i16::from_be_bytes(array(bytes, 51)),
        base_sequence: i32::from_be_bytes(array(bytes, 53)),
        records_count: i32::from_be_bytes(array(bytes, 57)),
    };
    if header.magic != MAGIC {
        return Err(BatchError::Magic(header.magic));
    }
    if header.batch_length < (HEADER_LEN - LENGTH_BASE) as i32 {
        return Err(BatchError::Length(header.batch_length));
    }
    Ok(header)
}

/// Reads the header of a batch that is exactly `batch`; as [`parse_header`], and checks the length, and the
/// numbers of records and offsets against each other. The CRC is not looked at.
#[inline]
pub fn parse_whole(batch: &[u8]) -> Result<BatchHeader, BatchError> {
    let header = parse_header(batch)?;
    let total = header.total_len();
    if batch.len() < total {
        return Err(BatchError::Truncated {
            have: batch.len(),
            need: total,
        });
    }
    if batch.len() > total {
        return Err(BatchError::TrailingBytes {
            extra: batch.len() - total,
        });
    }
    if header.records_count < 1 || header.last_offset_delta < header.records_count - 1 {
        return Err(wrong_count(&header));
    }
    Ok(header)
}

/// Checks a whole batch: its length is the slice's, its CRC fits, and, where it is not compressed,
/// its records are walked: their number, their ascending offset deltas and every length.
///
/// Costs a pass for the CRC and one over the records.
pub fn validate(batch: &[u8]) -> Result<BatchHeader, BatchError> {
    let header = parse_whole(batch)?;
    let computed = crc32c::crc32c(&batch[CRC_START..]);
    if computed != header.crc {
        return Err(BatchError::Crc {
            stored: header.crc,
            computed,
        });
    }
    if header.codec() == 0 {
        validate_records(&header, &batch[HEADER_LEN..])?;
    }
    Ok(header)
}

fn wrong_count(header: &BatchHeader) -> BatchError {
    BatchError::Count {
        count: header.records_count,
        last_delta: header.last_offset_delta,
    }
}

/// Walks uncompressed records, which must be all that the header counts and nothing else.
pub(crate) fn validate_records(header: &BatchHeader, records: &[u8]) -> Result<(), BatchError> {
    if usize::try_from(header.records_count).is_ok_and(|n| n > records.len() / RECORD_MIN) {
        return Err(wrong_count(header));
    }
    let mut walk = Records::over(header, records);
    // Not by the iterator: what it makes of each record would have to be made, and is not needed.
    for index in 0..header.records_count {
        walk.record().ok_or(BatchError::Record { index })?;
    }
    if walk.rest.is_empty() {
        Ok(())
    } else {
        Err(wrong_count(header))
    }
}

/// As [`validate`], and only what a producer may send where batches are stored as they come: not
/// compressed, neither transactional nor a control batch, no attribute that is unknown, and offset
/// deltas 0, 1, 2, ….
pub fn validate_produced(batch: &[u8]) -> Result<BatchHeader, BatchError> {
    let header = parse_header(batch)?;
    if header.codec() != 0 {
        return Err(BatchError::Codec(header.codec()));
    }
    if header.attributes & !LOG_APPEND_TIME != 0 {
        return Err(BatchError::Attributes(header.attributes));
    }
    let header = validate(batch)?;
    // As many ascending deltas as there are places: none is skipped.
    if header.last_offset_delta != header.records_count - 1 {
        return Err(wrong_count(&header));
    }
    Ok(header)
}

/// Writes the header of a whole batch whose records lie behind it: the fields of `header`, except that
/// length and CRC are what the bytes say.
///
/// # Panics
/// When `batch` is shorter than a header or longer than its length field can say (2 GiB).
pub fn write_header(batch: &mut [u8], header: &BatchHeader) {
    let length = i32::try_from(batch.len() - LENGTH_BASE).expect("a batch is shorter than 2 GiB");
    batch[0..8].copy_from_slice(&header.base_offset.to_be_bytes());
    batch[8..12].copy_from_slice(&length.to_be_bytes());
    batch[12..16].copy_from_slice(&header.partition_leader_epoch.to_be_bytes());
    batch[16] = MAGIC as u8;
    batch[21..23].copy_from_slice(&header.attributes.to_be_bytes());
    batch[23..27].copy_from_slice(&header.last_offset_delta.to_be_bytes());
    batch[27..35].copy_from_slice(&header.base_timestamp.to_be_bytes());
    batch[35..43].copy_from_slice(&header.max_timestamp.to_be_bytes());
    batch[43..51].copy_from_slice(&header.producer_id.to_be_bytes());
    batch[51..53].copy_from_slice(&header.producer_epoch.to_be_bytes());
    batch[53..57].copy_from_slice(&header.base_sequence.to_be_bytes());
    batch[57..61].copy_from_slice(&header.records_count.to_be_bytes());
    let crc = crc32c::crc32c(&batch[CRC_START..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
}

/// Writes the offset of the first record into a batch; the CRC stays valid.
///
/// # Panics
/// When `batch` is shorter than a header.
#[inline]
pub fn set_base_offset(batch: &mut [u8], offset: i64) {
    batch[0..8].copy_from_slice(&offset.to_be_bytes());
}

/// Writes the leader epoch into a batch; the CRC stays valid.
///
/// # Panics
/// When `batch` is shorter than a header.
#[inline]
pub fn set_leader_epoch(batch: &mut [u8], epoch: i32) {
    batch[12..16].copy_from_slice(&epoch.to_be_bytes());
}

/// The number of messages that bytes claim to hold, whether they are a valid batch or not; at least
/// 1 and at most what could fit. Receiver and shard count by it, so that their accounts agree also
/// about batches that are refused.
#[inline]
pub fn claimed_records(batch: &[u8]) -> u32 {
    let Some(header) = batch.first_chunk::<HEADER_LEN>() else {
        return 1;
    };
    let most = ((batch.len() - HEADER_LEN) / RECORD_MIN).max(1) as i32;
    i32::from_be_bytes(array(header, 57)).clamp(1, most) as u32
}

/// Writes an idempotent producer's id, epoch and sequence into a whole batch and renews its CRC.
///
/// # Panics
/// When `batch` is shorter than a header.
#[inline]
pub fn set_producer(batch: &mut [u8], id: i64, epoch: i16, base_sequence: i32) {
    batch[43..51].copy_from_slice(&id.to_be_bytes());
    batch[51..53].copy_from_slice(&epoch.to_be_bytes());
    batch[53..57].copy_from_slice(&base_sequence.to_be_bytes());
    let crc = crc32c::crc32c(&batch[CRC_START..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
}

/// One message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its offset.
    pub offset: i64,
    /// Its timestamp, Unix milliseconds.
    pub timestamp: i64,
    /// Its key.
    pub key: Option<&'a [u8]>,
    /// Its value; `None` is a tombstone.
    pub value: Option<&'a [u8]>,
    fields: &'a [u8],
    headers: &'a [u8],
    header_count: i32,
}

impl<'a> Record<'a> {
    /// Key, value and headers as they are encoded: the part of a record that is the same in any batch.
    #[inline]
    pub fn fields(&self) -> &'a [u8] {
        self.fields
    }

    #[inline]
    pub(crate) fn encoded(&self) -> Encoded<'a> {
        Encoded {
            offset: self.offset,
            timestamp: self.timestamp,
            fields: self.fields,
        }
    }

    /// The record's headers: names and values.
    pub fn headers(&self) -> RecordHeaders<'a> {
        RecordHeaders {
            rest: self.headers,
            left: self.header_count,
        }
    }
}

/// A record whose fields were not looked into.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Encoded<'a> {
    pub(crate) offset: i64,
    pub(crate) timestamp: i64,
    /// As [`Record::fields`].
    pub(crate) fields: &'a [u8],
}

/// Iterates over the headers of a record; ends early where they are malformed.
#[derive(Debug, Clone)]
pub struct RecordHeaders<'a> {
    rest: &'a [u8],
    left: i32,
}

impl<'a> Iterator for RecordHeaders<'a> {
    type Item = (&'a [u8], Option<&'a [u8]>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.left <= 0 {
            return None;
        }
        self.left -= 1;
        let mut cursor = Cursor(self.rest);
        let name = cursor.bytes()??;
        let value = cursor.bytes()?;
        self.rest = cursor.0;
        Some((name, value))
    }
}

/// A place between two records of a batch, to begin a walk at: [`Records::mark`], [`Records::resume`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Bytes of records that were not walked yet.
    left: usize,
    index: i32,
    next_delta: i64,
}

/// Iterates over the records of an uncompressed batch; ends after the first error.
#[derive(Debug, Clone)]
pub struct Records<'a> {
    rest: &'a [u8],
    base_offset: i64,
    base_timestamp: i64,
    append_time: Option<i64>,
    index: i32,
    count: i32,
    /// The least and the largest offset delta that the next record may have.
    next_delta: i64,
    last_delta: i64,
}

impl<'a> Records<'a> {
    /// Over the records of `batch`, which must be whole and uncompressed; its CRC is not checked.
    pub fn new(batch: &'a [u8]) -> Result<Self, BatchError> {
        let header = parse_header(batch)?;
        if header.codec() != 0 {
            return Err(BatchError::Codec(header.codec()));
        }
        let total = header.total_len();
        let records = batch.get(HEADER_LEN..total).ok_or(BatchError::Truncated {
            have: batch.len(),
            need: total,
        })?;
        Ok(Self::over(&header, records))
    }

    /// Where the walk stands now.
    #[inline]
    pub fn mark(&self) -> Mark {
        Mark {
            left: self.rest.len(),
            index: self.index,
            next_delta: self.next_delta,
        }
    }

    /// A walk over the same batch from a mark on. With another batch's mark it ends, at some record, in an error.
    #[inline]
    pub fn resume(batch: &'a [u8], mark: Mark) -> Result<Self, BatchError> {
        let mut records = Self::new(batch)?;
        let skipped = records.rest.len().saturating_sub(mark.left);
        records.rest = &records.rest[skipped..];
        records.index = mark.index;
        records.next_delta = mark.next_delta;
        Ok(records)
    }

    /// Over the plain records of a batch that has this header, wherever they lie. Each record's place is checked as the
    /// walk comes to it.
    pub(crate) fn over(header: &BatchHeader, records: &'a [u8]) -> Self {
        Self {
            rest: records,
            base_offset: header.base_offset,
            base_timestamp: header.base_timestamp,
            append_time: header.append_time(),
            index: 0,
            count: header.records_count,
            next_delta: 0,
            last_delta: i64::from(header.last_offset_delta),
        }
    }

    /// The next record, of a batch that was validated: what its fields hold is not checked again. `None` at the end, and where
    /// the batch is not valid.
    #[inline(always)]
    pub(crate) fn encoded(&mut self) -> Option<Encoded<'a>> {
        if self.index >= self.count {
            return None;
        }
        self.index += 1;
        let mut outer = Cursor(self.rest);
        let length = usize::try_from(outer.varint()?).ok()?;
        let mut cursor = Cursor(outer.take(length)?);
        cursor.take(1)?; // attributes: none are defined
        let timestamp_delta = cursor.varint()?;
        let offset_delta = cursor.varint()?;
        if offset_delta < self.next_delta || offset_delta > self.last_delta {
            return None;
        }
        self.rest = outer.0;
        self.next_delta = offset_delta + 1;
        Some(Encoded {
            offset: self.base_offset.wrapping_add(offset_delta),
            timestamp: self
                .append_time
                .unwrap_or_else(|| self.base_timestamp.wrapping_add(timestamp_delta)),
            fields: cursor.0,
        })
    }

    #[inline(always)]
    fn record(&mut self) -> Option<Record<'a>> {
        let Encoded {
            offset,
            timestamp,
            fields,
        } = self.encoded()?;
        let mut cursor = Cursor(fields);
        let key = cursor.bytes()?;
        let value = cursor.bytes()?;
        let header_count = i32::try_from(cursor.varint()?).ok().filter(|&n| n >= 0)?;
        let headers = cursor.0;
        for _ in 0..header_count {
            cursor.bytes()??; // the name is not null
            cursor.bytes()?;
        }
        if !cursor.0.is_empty() {
            return None;
        }
        Some(Record {
            offset,
            timestamp,
            key,
            value,
            fields,
            headers,
            header_count,
        })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, BatchError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.index >= self.count {
            return None;
        }
        let index = self.index;
        let record = self.record();
        if record.is_none() {
            self.index = self.count;
        }
        Some(record.ok_or(BatchError::Record { index }))
    }
}

/// What is left to read.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    #[inline(always)]
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    #[inline(always)]
    fn varint(&mut self) -> Option<i64> {
        let (value, taken) = varint::get(self.0)?;
        self.0 = &self.0[taken..];
        Some(value)
    }

    /// A length and as many bytes; length −1 is null. The outer `Option` is an error.
    #[inline(always)]
    fn bytes(&mut self) -> Option<Option<&'a [u8]>> {
        match self.varint()? {
            -1 => Some(None),
            len => Some(Some(self.take(usize::try_from(len).ok()?)?)),
        }
    }
}

/// The buffer cannot hold the record; the batch is as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the record does not fit the batch")]
pub struct Full;

/// How far a [`BatchWriter`] has come, without its buffer: for owners of a buffer that add records
/// now and then.
#[derive(Debug, Clone, Copy)]
pub struct BatchProgress {
    at: usize,
    count: i32,
    base_timestamp: i64,
    max_timestamp: i64,
    producer: (i64, i16, i32),
    attributes: i16,
}

impl BatchProgress {
    /// Number of records so far.
    #[inline]
    pub fn count(&self) -> i32 {
        self.count
    }
}

/// Writes an uncompressed batch in place, without allocation.
///
/// Cost: a copy of key and value and about ten bytes for each record, one pass of CRC-32C at the end.
#[derive(Debug)]
pub struct BatchWriter<'a> {
    buf: &'a mut [u8],
    at: usize,
    count: i32,
    base_timestamp: i64,
    max_timestamp: i64,
    producer: (i64, i16, i32),
    attributes: i16,
}

impl<'a> BatchWriter<'a> {
    /// Begins a batch in `buf`; `base_timestamp` in Unix milliseconds.
    ///
    /// # Panics
    /// When `buf` is shorter than a header.
    #[inline]
    pub fn new(buf: &'a mut [u8], base_timestamp: i64) -> Self {
        assert!(buf.len() >= HEADER_LEN, "no room for a batch header");
        Self {
            buf,
            at: HEADER_LEN,
            count: 0,
            base_timestamp,
            max_timestamp: base_timestamp,
            producer: (-1, -1, -1),
            attributes: 0,
        }
    }

    /// Goes on where [`BatchWriter::suspend`] stopped; `buf` is the buffer of then.
    ///
    /// # Panics
    /// When `buf` is shorter than what has been written.
    #[inline]
    pub fn resume(buf: &'a mut [u8], progress: BatchProgress) -> Self {
        assert!(buf.len() >= progress.at, "not the buffer of this batch");
        Self {
            buf,
            at: progress.at,
            count: progress.count,
            base_timestamp: progress.base_timestamp,
            max_timestamp: progress.max_timestamp,
            producer: progress.producer,
            attributes: progress.attributes,
        }
    }

    /// Lets the buffer go until [`BatchWriter::resume`].
    #[inline]
    pub fn suspend(self) -> BatchProgress {
        BatchProgress {
            at: self.at,
            count: self.count,
            base_timestamp: self.base_timestamp,
            max_timestamp: self.max_timestamp,
            producer: self.producer,
            attributes: self.attributes,
        }
    }

    /// Makes it a batch of an idempotent producer.
    #[must_use]
    pub fn with_producer(mut self, id: i64, epoch: i16, base_sequence: i32) -> Self {
        self.producer = (id, epoch, base_sequence);
        self
    }

    /// Makes it a control batch.
    #[must_use]
    pub fn control(mut self) -> Self {
        self.attributes |= CONTROL;
        self
    }

    /// Number of records so far.
    #[inline]
    pub fn count(&self) -> i32 {
        self.count
    }

    /// Bytes so far, the header included.
    #[inline]
    #[allow(clippy::len_without_is_empty)] // a batch always has its header
    pub fn len(&self) -> usize {
        self.at
    }

    /// Whether a record without headers surely fits.
    #[inline]
    pub fn fits(&self, key_len: usize, value_len: usize) -> bool {
        self.buf.len() - self.at >= key_len + value_len + RAW_RECORD_OVERHEAD_MAX + 4
    }

    /// Appends a record; `timestamp` in Unix milliseconds.
    #[inline]
    pub fn push(
        &mut self,
        timestamp: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
    ) -> Result<(), Full> {
        let delta = timestamp.wrapping_sub(self.base_timestamp);
        let field = |bytes: Option<&[u8]>| match bytes {
            None => 1,
            Some(bytes) => varint::len(bytes.len() as i64) + bytes.len(),
        };
        let body = 1
            + varint::len(delta)
            + varint::len(i64::from(self.count))
            + field(key)
            + field(value)
            + 1;
        let total = varint::len(body as i64) + body;
        let Some(out) = self.buf.get_mut(self.at..self.at + total) else {
            return Err(Full);
        };
        let mut at = varint::put(out, body as i64);
        out[at] = 0; // attributes
        at += 1;
        at += varint::put(&mut out[at..], delta);
        at += varint::put(&mut out[at..], i64::from(self.count));
        for bytes in [key, value] {
            match bytes {
                None => at += varint::put(&mut out[at..], -1),
                Some(bytes) => {
                    at += varint::put(&mut out[at..], bytes.len() as i64);
                    out[at..at + bytes.len()].copy_from_slice(bytes);
                    at += bytes.len();
                }
            }
        }
        out[at] = 0; // no headers
        debug_assert_eq!(at + 1, total);
        self.at += total;
        self.count += 1;
        self.max_timestamp = self.max_timestamp.max(timestamp);
        Ok(())
    }

    /// Writes the header and the CRC; returns the bytes of the batch.
    ///
    /// # Panics
    /// When the batch has no record.
    #[inline]
    pub fn finish(self, base_offset: i64) -> usize {
        assert!(self.count > 0, "a batch has at least one record");
        let (producer_id, producer_epoch, base_sequence) = self.producer;
        let header = BatchHeader {
            base_offset,
            batch_length: 0,
            partition_leader_epoch: 0,
            magic: MAGIC,
            crc: 0,
            attributes: self.attributes,
            last_offset_delta: self.count - 1,
            base_timestamp: self.base_timestamp,
            max_timestamp: self.max_timestamp,
            producer_id,
            producer_epoch,
            base_sequence,
            records_count: self.count,
        };
        write_header(&mut self.buf[..self.at], &header);
        self.at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Message = (i64, Option<Vec<u8>>, Option<Vec<u8>>);

    fn written(messages: &[Message], base_offset: i64) -> Vec<u8> {
        let mut buf = vec![0; 1 << 16];
        let mut writer = BatchWriter::new(&mut buf, messages[0].0).with_producer(77, 3, 5);
        for (timestamp, key, value) in messages {
            assert!(writer.fits(
                key.as_ref().map_or(0, Vec::len),
                value.as_ref().map_or(0, Vec::len)
            ));
            writer
                .push(*timestamp, key.as_deref(), value.as_deref())
                .unwrap();
        }
        let len = writer.finish(base_offset);
        buf.truncate(len);
        buf
    }

    #[test]
    fn corrections_outside_the_crc_keep_a_batch_valid() {
        let mut batch = written(&[(1000, None, Some(b"v".to_vec()))], 0);
        set_base_offset(&mut batch, 1 << 40);
        set_leader_epoch(&mut batch, 9);
        let header = validate(&batch).unwrap();
        assert_eq!(
            (header.base_offset, header.partition_leader_epoch),
            (1 << 40, 9)
        );
        assert_eq!(header.next_offset(), (1 << 40) + 1);
        assert_eq!(
            (
                header.producer_id,
                header.producer_epoch,
                header.base_sequence
            ),
            (77, 3, 5)
        );
    }

    #[test]
    fn a_suspended_batch_goes_on_and_a_new_sequence_keeps_it_valid() {
        let mut buf = vec![0; 300];
        let mut writer = BatchWriter::new(&mut buf, 10);
        writer.push(10, None, Some(b"a")).unwrap();
        let progress = writer.suspend();
        assert_eq!(progress.count(), 1);
        let mut writer = BatchWriter::resume(&mut buf, progress);
        writer.push(12, Some(b"k"), Some(b"b")).unwrap();
        let len = writer.finish(0);
        set_producer(&mut buf[..len], 7, 2, 40);
        let header = validate(&buf[..len]).unwrap();
        assert_eq!(
            (
                header.producer_id,
                header.producer_epoch,
                header.base_sequence,
                header.max_timestamp
            ),
            (7, 2, 40, 12)
        );
        let values: Vec<_> = Records::new(&buf[..len])
            .unwrap()
            .map(|r| r.unwrap().value.unwrap())
            .collect();
        assert_eq!(values, [b"a", b"b"]);
    }

    #[test]
    fn a_full_buffer_leaves_the_batch_as_it_was() {
        let mut buf = vec![0; HEADER_LEN + 20];
        let mut writer = BatchWriter::new(&mut buf, 0);
        writer.push(0, None, Some(b"0123456789")).unwrap();
        assert_eq!(writer.push(0, None, Some(b"0123456789")), Err(Full));
        let len = writer.finish(0);
        assert_eq!(validate(&buf[..len]).unwrap().records_count, 1);
    }

    #[test]
    fn what_a_producer_may_not_set_is_refused() {
        let mut buf = vec![0; 200];
        let mut writer = BatchWriter::new(&mut buf, 0).control();
        writer.push(0, Some(b"k"), None).unwrap();
        let len = writer.finish(0);
        assert!(validate(&buf[..len]).unwrap().is_control());
        assert_eq!(
            validate_produced(&buf[..len]),
            Err(BatchError::Attributes(CONTROL))
        );
        buf[22] = 3;
        assert_eq!(validate_produced(&buf[..len]), Err(BatchError::Codec(3)));
    }

    /// A batch as compaction leaves it: `deltas` of the offsets, `last` in its header.
    fn thinned(deltas: &[i64], last: i32) -> Vec<u8> {
        let mut batch = vec![0; HEADER_LEN];
        for &delta in deltas {
            // Length, attributes, timestamp delta, offset delta, null key, null value, no headers.
            let mut delta_bytes = [0; varint::MAX_LEN];
            let len = varint::put(&mut delta_bytes, delta);
            batch.extend_from_slice(&[(2 * (5 + len)) as u8, 0, 0]);
            batch.extend_from_slice(&delta_bytes[..len]);
            batch.extend_from_slice(&[1, 1, 0]);
        }
        let header = BatchHeader {
            base_offset: 100,
            batch_length: 0,
            partition_leader_epoch: 0,
            magic: MAGIC,
            crc: 0,
            attributes: 0,
            last_offset_delta: last,
            base_timestamp: 0,
            max_timestamp: 0,
            producer_id: -1,
            producer_epoch: -1,
            base_sequence: -1,
            records_count: deltas.len() as i32,
        };
        write_header(&mut batch, &header);
        batch
    }

    #[test]
    fn skipped_offsets_are_read_but_not_taken_from_a_producer() {
        let batch = thinned(&[2, 3, 900], 901);
        assert_eq!(validate(&batch).unwrap().next_offset(), 1002);
        let offsets: Vec<_> = Records::new(&batch)
            .unwrap()
            .map(|r| r.unwrap().offset)
            .collect();
        assert_eq!(offsets, [102, 103, 1000]);
        assert!(matches!(
            validate_produced(&batch),
            Err(BatchError::Count { count: 3, .. })
        ));
        assert!(validate_produced(&thinned(&[0, 1, 2], 2)).is_ok());
        for (deltas, last) in [(&[0, 2, 2][..], 5), (&[1, 0], 5), (&[0, 6], 5), (&[-1], 0)] {
            assert!(validate(&thinned(deltas, last)).is_err(), "{deltas:?}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(
            messages in prop::collection::vec(
                (0i64..4_000_000_000_000, prop::option::of(prop::collection::vec(any::<u8>(), 0..40)),
                 prop::option::of(prop::collection::vec(any::<u8>(), 0..300))), 1..40),
            base_offset in 0i64..(1 << 60),
        ) {
            let batch = written(&messages, base_offset);
            let header = validate(&batch).unwrap();
            prop_assert_eq!(header.total_len(), batch.len());
            prop_assert_eq!(header.records_count as usize, messages.len());
            prop_assert_eq!(claimed_records(&batch) as usize, messages.len());
            prop_assert_eq!(header.max_timestamp, messages.iter().map(|m| m.0).max().unwrap());
            for (i, (record, message)) in Records::new(&batch).unwrap().zip(&messages).enumerate() {
                let record = record.unwrap();
                prop_assert_eq!(record.offset, base_offset + i as i64);
                prop_assert_eq!(record.timestamp, message.0);
                prop_assert_eq!(record.key, message.1.as_deref());
                prop_assert_eq!(record.value, message.2.as_deref());
                prop_assert_eq!(record.headers().count(), 0);
            }
        }

        #[test]
        fn a_flipped_bit_is_found(at in 0usize..200, bit in 0u8..8) {
            let mut batch = written(&[(5, Some(b"key".to_vec()), Some(vec![7; 100])), (6, None, None)], 3);
            let at = at % batch.len();
            batch[at] ^= 1 << bit;
            // Base offset and leader epoch lie outside the CRC.
            let outside = at < 8 || (12..16).contains(&at);
            prop_assert_eq!(validate(&batch).is_ok(), outside);
        }

        #[test]
        fn any_bytes_are_refused_or_taken_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (validate(&bytes), validate_produced(&bytes), claimed_records(&bytes));
            if let Ok(records) = Records::new(&bytes) {
                for record in records.flatten() {
                    record.headers().for_each(drop);
                }
            }
        }

        #[test]
        fn any_records_behind_a_true_header_are_safe(records in prop::collection::vec(any::<u8>(), 0..200), count in -1i32..50) {
            let mut batch = written(&[(0, None, None)], 0);
            batch.truncate(HEADER_LEN);
            batch.extend_from_slice(&records);
            let length = (batch.len() - LENGTH_BASE) as i32;
            batch[8..12].copy_from_slice(&length.to_be_bytes());
            batch[23..27].copy_from_slice(&count.wrapping_sub(1).to_be_bytes());
            batch[57..61].copy_from_slice(&count.to_be_bytes());
            let crc = crc32c::crc32c(&batch[CRC_START..]);
            batch[17..21].copy_from_slice(&crc.to_be_bytes());
            if validate(&batch).is_ok() {
                prop_assert_eq!(Records::new(&batch).unwrap().filter(Result::is_ok).count() as i32, count);
            }
        }
    }
}
