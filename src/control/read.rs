//! A read as the control socket and the offline command serve it.

use super::protocol::{Position, ReadAnswer};
use crate::storage::{LogReader, PartitionKey, ReadError};

/// Looks for a place that retention removes meanwhile: starts move once a second.
const ATTEMPTS: u32 = 3;

/// Where a position of `key` is, without a look at its messages. Errors are for people.
pub fn find(
    reader: &mut LogReader,
    key: PartitionKey,
    from: Position,
) -> Result<ReadAnswer, String> {
    let text = |error: crate::storage::ReadError| error.to_string();
    let (start, end) = reader.bounds(key).map_err(text)?;
    let from = match from {
        Position::Earliest => start,
        Position::Latest => end,
        Position::Offset(offset) => offset,
        Position::Time(ms) => reader
            .offset_for_time(key, ms)
            .map_err(text)?
            .unwrap_or(end),
    };
    Ok(ReadAnswer {
        from,
        start,
        high_watermark: end,
        bytes: 0,
    })
}

/// Appends whole record batches of `key` from position `from` on to `out`: at most `max_bytes`
/// bytes, or one batch. Errors are for people.
pub fn read(
    reader: &mut LogReader,
    key: PartitionKey,
    from: Position,
    max_bytes: u32,
    out: &mut Vec<u8>,
) -> Result<ReadAnswer, String> {
    let before = out.len();
    let mut left = ATTEMPTS;
    loop {
        left -= 1;
        let found = find(reader, key, from)?;
        match reader.read(key, found.from, max_bytes as usize, out) {
            Ok(outcome) => {
                return Ok(ReadAnswer {
                    high_watermark: outcome.end,
                    bytes: (out.len() - before) as u32,
                    ..found
                });
            }
            // Retention took the place between the two looks; who named no offset means what is there now.
            Err(ReadError::OutOfRange { .. })
                if left > 0 && !matches!(from, Position::Offset(_)) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}
