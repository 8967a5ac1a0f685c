//! Reads by key as the control socket and the offline command serve them.
//!
//! Keys travel in hexadecimal, as the index keeps them (docs/formats.md, "Key index"); records as record batches of one
//! record each, which has the record's offset, time, key and value.

use std::ops::Bound;

use serde::{Deserialize, Serialize};

use crate::storage::lsm::keys::kept;
use crate::storage::{KeyBounds, LogReader, Message, PartitionKey, RangeKey};
use crate::wire::record_batch::{BatchWriter, HEADER_LEN};

/// Most keys in an answer: each costs a search for its record.
const KEYS_AT_ONCE: usize = 1024;
/// What a record takes in a batch of its own beside the header, its key and its value.
const RECORD_OVERHEAD: usize = 64;

/// Which keys are asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keys {
    /// One, whole.
    One(String),
    /// All records of one, oldest first.
    All {
        /// The key, whole.
        key: String,
        /// Offsets before this one are not meant.
        from: i64,
    },
    /// All between two, in order.
    Range {
        /// The first one; `None`: the least of all.
        from: Option<String>,
        /// `from` itself is not meant.
        #[serde(default)]
        after: bool,
        /// The first one behind the range; `None`: there is none.
        to: Option<String>,
    },
}

/// Precedes the records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysAnswer {
    /// What is left of the range or of the key's records; `None`: nothing.
    pub rest: Option<Keys>,
    /// Bytes of record batches that follow this line.
    pub bytes: u32,
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// The bytes of hexadecimal digits; `None`: it is something else.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        return None;
    };
    let digit = |c: u8| (c as char).to_digit(16).map(|digit| digit as u8);
    pairs
        .iter()
        .map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?))
        .collect()
}

/// What to say of a topic that has no index.
pub fn no_index(topic: &str) -> String {
    format!(
        "topic \"{topic}\" has no index of its keys: say index = \"key\" for it in the configuration, or set its taffrail.index to key"
    )
}

impl Keys {
    /// All keys of a range.
    pub fn range(bounds: &KeyBounds) -> Keys {
        let (from, after) = match &bounds.from {
            Bound::Included(from) => (Some(hex(from)), false),
            Bound::Excluded(from) => (Some(hex(from)), true),
            Bound::Unbounded => (None, false),
        };
        Keys::Range {
            from,
            after,
            to: bounds.to.as_deref().map(hex),
        }
    }
}

/// Appends the newest records of keys of a partition, or all of one key, to `out`: at most `max_bytes` bytes, or one record. A key that is not
/// there has none. Errors are for people.
pub fn read_keys(
    reader: &mut LogReader,
    partition: PartitionKey,
    keys: &Keys,
    max_bytes: u32,
    out: &mut Vec<u8>,
) -> Result<KeysAnswer, String> {
    let before = out.len();
    let bytes = |text: &str| unhex(text).ok_or_else(|| format!("{text:?} is not hexadecimal"));
    let wrong = |error: crate::storage::ReadError| error.to_string();
    let mut rest = None;
    match keys {
        Keys::One(key) => {
            let message = reader.newest(partition, &bytes(key)?).map_err(wrong)?;
            message.iter().for_each(|message| put(message, out));
        }
        Keys::All { key, from } => {
            let next = reader
                .history(partition, &bytes(key)?, *from, |record| {
                    let room = out.len() - before < max_bytes as usize;
                    if room {
                        put(&Message::of(record), out);
                    }
                    room
                })
                .map_err(wrong)?;
            rest = next.map(|from| Keys::All {
                key: key.clone(),
                from,
            });
        }
        Keys::Range { from, after, to } => {
            let bounds = KeyBounds {
                from: match from {
                    None => Bound::Unbounded,
                    Some(from) if *after => Bound::Excluded(bytes(from)?),
                    Some(from) => Bound::Included(bytes(from)?),
                },
                to: to.as_deref().map(bytes).transpose()?,
            };
            let page = reader
                .keys(partition, &bounds, KEYS_AT_ONCE)
                .map_err(wrong)?;
            rest = page.rest.as_ref().map(Keys::range);
            for key in &page.keys {
                if out.len() - before >= max_bytes as usize {
                    rest = Some(Keys::range(&KeyBounds {
                        from: Bound::Included(key.kept.clone()),
                        ..bounds
                    }));
                    break;
                }
                let message = reader.newest_of(partition, key).map_err(wrong)?;
                message
                    .iter()
                    .filter(|message| has(message, key))
                    .for_each(|message| put(message, out));
            }
        }
    }
    Ok(KeysAnswer {
        rest,
        bytes: (out.len() - before) as u32,
    })
}

/// A key index that was made by somebody else may lead anywhere.
fn has(message: &Message, key: &RangeKey) -> bool {
    let own = message.key.as_deref().map(kept);
    own.is_some_and(|own| *own == key.kept)
}

fn put(message: &Message, out: &mut Vec<u8>) {
    let field = |bytes: &Option<Vec<u8>>| bytes.as_ref().map_or(0, Vec::len);
    let room = HEADER_LEN + RECORD_OVERHEAD + field(&message.key) + field(&message.value);
    let at = out.len();
    out.resize(at + room, 0);
    let mut writer = BatchWriter::new(&mut out[at..], message.timestamp);
    let (key, value) = (message.key.as_deref(), message.value.as_deref());
    let len = match writer.push(message.timestamp, key, value) {
        Ok(()) => writer.finish(message.offset),
        // There is room for it.
        Err(_) => 0,
    };
    out.truncate(at + len);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::record_batch::{Records, validate};

    #[test]
    fn hexadecimal_is_read_back_and_other_text_refused() {
        assert_eq!(unhex(&hex(b"\x00\xffa")), Some(b"\x00\xffa".to_vec()));
        assert_eq!(unhex("AbcD"), Some(vec![0xab, 0xcd]));
        for wrong in ["a", "0g", "é0", "+1"] {
            assert_eq!(unhex(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn records_travel_whole() {
        let mut out = b"before".to_vec();
        let message = Message {
            offset: 77,
            timestamp: -5,
            key: Some(b"k".to_vec()),
            value: None,
        };
        put(&message, &mut out);
        let batch = &out[6..];
        validate(batch).unwrap();
        let record = Records::new(batch).unwrap().next().unwrap().unwrap();
        assert_eq!((record.offset, record.timestamp), (77, -5));
        assert_eq!((record.key, record.value), (Some(&b"k"[..]), None));
    }

    #[test]
    fn ranges_keep_their_bounds() {
        let prefix = KeyBounds::prefix(b"a\xff\xff");
        assert_eq!(prefix.to, Some(b"b".to_vec()));
        assert_eq!(KeyBounds::prefix(b"\xff").to, None);
        assert_eq!(
            Keys::range(&prefix),
            Keys::Range {
                from: Some("61ffff".to_owned()),
                after: false,
                to: Some("62".to_owned())
            }
        );
    }
}
