//! What a request for offsets by time finds.
//!
//! Source: Kafka's protocol guide (ListOffsets). A time is answered by the first offset whose record has
//! it or a later one, by arrival (see [`crate::storage::index`] for whose clock counts), with the record's
//! own timestamp.

use crate::broker::cluster::LEADER_EPOCH;
use crate::storage::lsm::codec;
use crate::storage::{LogReader, PartitionKey, ReadError};
use crate::wire::kafka::{Api, Code, Malformed, Reader, RequestHeader};
use crate::wire::record_batch::{self, Records};

/// The time that asks for the log's end.
pub const LATEST: i64 = -1;
/// The time that asks for the log's start.
pub const EARLIEST: i64 = -2;
/// The time that asks for the record with the largest time.
pub const MAX_TIMESTAMP: i64 = -3;
/// The time that asks for the first offset on local disks.
pub const EARLIEST_LOCAL: i64 = -4;

/// An offset and its record's timestamp in Unix milliseconds, −1 where it was not asked by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The offset; −1: nothing is so late.
    pub offset: i64,
    /// The record's timestamp.
    pub timestamp: i64,
}

impl Found {
    const NOTHING: Found = Found {
        offset: -1,
        timestamp: -1,
    };
}

/// What is asked of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Its number.
    pub index: i32,
    /// Leader epoch that the client knows, −1: none.
    pub epoch: i32,
    /// Unix milliseconds, or one of the numbers above.
    pub time: i64,
}

impl Asked {
    /// Whether the answer depends on where the log ends.
    pub fn needs_end(&self) -> bool {
        !matches!(self.time, EARLIEST | EARLIEST_LOCAL)
    }
}

/// Reads a request: what is asked, by topic.
pub fn read<'a>(
    body: &mut Reader<'a>,
    version: i16,
) -> Result<Vec<(&'a str, Vec<Asked>)>, Malformed> {
    body.i32()?; // replica
    if version >= 2 {
        body.i8()?; // isolation
    }
    let topics = body.array(|r| {
        let name = r.string()?;
        let asked = r.array(|r| {
            let index = r.i32()?;
            let epoch = if version >= 4 { r.i32()? } else { -1 };
            let time = r.i64()?;
            r.end()?;
            Ok(Asked { index, epoch, time })
        })?;
        r.end()?;
        Ok((name, asked))
    })?;
    body.end()?;
    Ok(topics)
}

/// The answer; `find` is asked for each partition.
pub fn answer(
    header: &RequestHeader<'_>,
    topics: &[(impl AsRef<str>, Vec<Asked>)],
    mut find: impl FnMut(&str, &Asked) -> Result<Found, Code>,
) -> Vec<u8> {
    let version = header.version;
    let mut out = Api::ListOffsets.answer(version, header.correlation);
    if version >= 2 {
        out.i32(0); // throttle time
    }
    out.array(topics.iter(), |out, (name, list)| {
        let name = name.as_ref();
        out.string(name);
        out.array(list.iter(), |out, asked| {
            let (code, found) = match find(name, asked) {
                Ok(found) => (Code::None, found),
                Err(code) => (code, Found::NOTHING),
            };
            out.i32(asked.index);
            out.i16(code as i16);
            out.i64(found.timestamp);
            out.i64(found.offset);
            if version >= 4 {
                out.i32(if found.offset < 0 { -1 } else { LEADER_EPOCH });
            }
            out.end();
        });
        out.end();
    });
    out.end();
    out.finish()
}

/// Finds an offset of a partition; `start` is its first visible offset, `now_ms` the present in Unix
/// milliseconds. Costs at most a few reads of the index and one of a batch; for [`MAX_TIMESTAMP`] forty.
pub fn find(
    reader: &mut LogReader,
    key: PartitionKey,
    time: i64,
    start: i64,
    now_ms: i64,
) -> Result<Found, ReadError> {
    let (first, end) = reader.bounds(key)?;
    let start = first.max(start).min(end);
    let plain = |offset| Found {
        offset,
        timestamp: -1,
    };
    match time {
        LATEST => Ok(plain(end)),
        EARLIEST | EARLIEST_LOCAL => Ok(plain(start)),
        MAX_TIMESTAMP => {
            if start == end {
                return Ok(Found::NOTHING);
            }
            // The latest time that finds anything, by halving. No stored time is later than its arrival;
            // a clock that was set back is allowed a day.
            let (mut finds, mut misses) = (0, now_ms.max(0) + 86_400_000);
            while misses - finds > 1 {
                let middle = finds + (misses - finds) / 2;
                match reader.offset_for_time(key, middle)? {
                    Some(_) => finds = middle,
                    None => misses = middle,
                }
            }
            at_time(reader, key, finds, start)
        }
        time if time < 0 => Ok(Found::NOTHING),
        time => at_time(reader, key, time, start),
    }
}

fn at_time(
    reader: &mut LogReader,
    key: PartitionKey,
    time: i64,
    start: i64,
) -> Result<Found, ReadError> {
    let Some(offset) = reader.offset_for_time(key, time)? else {
        return Ok(Found::NOTHING);
    };
    let offset = offset.max(start);
    let mut batch = Vec::new();
    reader.read(key, offset, 1, &mut batch)?;
    Ok(Found {
        offset,
        timestamp: timestamp_of(&batch, offset).unwrap_or(time),
    })
}

/// The timestamp of a record; of a batch whose records cannot be read, its largest one.
fn timestamp_of(batch: &[u8], offset: i64) -> Option<i64> {
    let header = record_batch::parse_header(batch).ok()?;
    let batch = batch.get(..header.total_len())?;
    let mut scratch = Vec::new();
    let record = codec::plain(batch, &mut scratch)
        .ok()
        .and_then(|plain| Records::new(plain).ok())
        .and_then(|records| {
            records
                .map_while(Result::ok)
                .find(|record| record.offset >= offset)
                .map(|record| record.timestamp)
        });
    Some(record.unwrap_or(header.max_timestamp))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::record_batch::BatchWriter;

    #[test]
    fn a_records_own_time_is_given() {
        let mut buf = vec![0; 400];
        let mut writer = BatchWriter::new(&mut buf, 1000);
        for time in [1000, 3000, 2000] {
            writer.push(time, None, Some(b"v")).unwrap();
        }
        let len = writer.finish(70);
        buf.truncate(len);
        assert_eq!(timestamp_of(&buf, 70), Some(1000));
        assert_eq!(timestamp_of(&buf, 71), Some(3000));
        assert_eq!(timestamp_of(&buf, 72), Some(2000));
        let mut header = record_batch::parse_header(&buf).unwrap();
        header.attributes = codec::SNAPPY;
        record_batch::write_header(&mut buf, &header);
        assert_eq!(timestamp_of(&buf, 70), Some(3000), "not readable here");
        assert_eq!(timestamp_of(&buf[..len - 1], 70), None);
        assert_eq!(timestamp_of(&[], 70), None);
    }
}
