//! Tests' oracle: the crate kafka-protocol reads what is written here and writes what is read here.
//!
//! Structures are compared by their `Debug` text: both sides call the fields by Kafka's names, so that
//! each field with a value of its own that is printed here must be printed by the oracle with the same
//! value, at the same place among the fields of that name.

use std::collections::HashMap;
use std::fmt::Debug;

use bytes::{Bytes, BytesMut};
use kafka_protocol::protocol::{Decodable, Encodable};

use super::{Api, Field, Malformed, Reader, Writer};

/// The fields in `text` that hold a number, a string, a flag or nothing, by name and in order.
fn leaves(text: &str) -> HashMap<String, Vec<String>> {
    let mut out: HashMap<String, Vec<String>> = HashMap::new();
    let bytes = text.as_bytes();
    let mut name = String::new();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                let start = at;
                at += 1;
                while bytes[at] != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                at += 1;
                out.entry(name.clone())
                    .or_default()
                    .push(text[start..at].into());
            }
            byte if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.') => {
                let start = at;
                while at < bytes.len()
                    && (bytes[at].is_ascii_alphanumeric()
                        || matches!(bytes[at], b'-' | b'_' | b'.'))
                {
                    at += 1;
                }
                let word = &text[start..at];
                match bytes.get(at) {
                    Some(b':') => name = word.into(),
                    // A structure, `Some(`, or an error code, whose name follows its number.
                    Some(b'(' | b'{') => {}
                    Some(b' ') if bytes.get(at + 1) == Some(&b'{') => {}
                    Some(b' ') if bytes.get(at + 1) == Some(&b'(') => {
                        out.entry(name.clone()).or_default().push(word.into());
                        while bytes[at] != b')' {
                            at += 1;
                        }
                    }
                    _ => out.entry(name.clone()).or_default().push(word.into()),
                }
            }
            _ => at += 1,
        }
    }
    out
}

/// Panics unless every field of `ours` has the value that `theirs` has.
pub fn assert_same(ours: &dyn Debug, theirs: &dyn Debug, context: &str) {
    let (ours, theirs) = (format!("{ours:?}"), format!("{theirs:?}"));
    let their_leaves = leaves(&theirs);
    for (name, values) in leaves(&ours) {
        // The oracle may have more of the name: fields that are only tagged and not written here.
        assert!(
            their_leaves
                .get(&name)
                .is_some_and(|theirs| theirs.starts_with(&values)),
            "{context}: field {name}\nours   {ours}\ntheirs {theirs}"
        );
    }
}

/// Writes `ours`, has the oracle read it to the last byte and write it again, reads that, and compares
/// all: the bytes, the values read, and the fields with the oracle's. What is cut off must be an error.
///
/// Fields that `version` lacks are compared by their defaults. Returns the bytes.
pub fn check<'a, O: Encodable + Decodable + Debug>(
    api: Api,
    version: i16,
    ours: &(impl Field<'a> + Debug),
    reread: impl Fn(&mut Reader<'_>) -> Result<String, Malformed>,
) -> Vec<u8> {
    let context = format!("{api:?} version {version}");
    let flexible = api.flexible(version);
    let mut writer = Writer::fields(flexible);
    ours.write(&mut writer, version);
    let written = writer.into_fields();
    let mut rest = Bytes::copy_from_slice(&written);
    let theirs =
        O::decode(&mut rest, version).unwrap_or_else(|error| panic!("{context}: {error:#}"));
    assert!(
        rest.is_empty(),
        "{context}: the oracle leaves {}",
        rest.len()
    );
    let mut again = BytesMut::new();
    theirs.encode(&mut again, version).unwrap();
    assert_eq!(written, again, "{context}");

    let mut reader = Reader::new(&again, flexible);
    let reread_text = reread(&mut reader).unwrap_or_else(|error| panic!("{context}: {error}"));
    assert_eq!(reader.remaining(), 0, "{context}");
    assert_same(&Verbatim(&reread_text), &theirs, &context);

    for len in 0..written.len() {
        let mut reader = Reader::new(&written[..len], flexible);
        assert!(
            reread(&mut reader).is_err(),
            "{context}: cut to {len} bytes"
        );
    }
    written
}

struct Verbatim<'a>(&'a str);

impl Debug for Verbatim<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

/// Checks a message against the oracle's structure in all versions of its API (or the ones given).
macro_rules! check_message {
    ($api:ident, $versions:expr, $ours:ident, $theirs:ident, $value:expr) => {
        for version in $versions {
            let value: $ours = $value(version);
            crate::wire::kafka::oracle::check::<kafka_protocol::messages::$theirs>(
                crate::wire::kafka::Api::$api,
                version,
                &value,
                |reader| $ours::decode(reader, version).map(|message| format!("{message:?}")),
            );
        }
    };
}
pub(crate) use check_message;
