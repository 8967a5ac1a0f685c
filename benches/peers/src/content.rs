//! The messages that all stores get.

#[path = "../../lsm/telemetry.rs"]
mod telemetry;

use std::ops::Range;

use telemetry::Telemetry;
pub use telemetry::random;

/// Bytes of values after which the content repeats.
pub const CONTENT: usize = 64 << 20;
/// Different keys.
pub const KEYS: u64 = 1_000_000;

/// A message's key.
pub type Key = [u8; 16];

/// A message.
#[derive(Clone, Copy)]
pub struct Message<'a> {
    /// Unix ms.
    pub time: i64,
    pub key: &'a [u8],
    pub value: &'a [u8],
}

/// Values, and when they were sent.
pub struct Content {
    bytes: Vec<u8>,
    values: Vec<(i64, Range<usize>)>,
}

impl Content {
    pub fn new() -> Content {
        let mut telemetry = Telemetry::new(1);
        let (mut bytes, mut values) = (Vec::with_capacity(CONTENT + 512), Vec::new());
        while bytes.len() < CONTENT {
            let (time, value) = telemetry.next();
            let from = bytes.len();
            bytes.extend_from_slice(value);
            values.push((time, from..bytes.len()));
        }
        Content { bytes, values }
    }

    /// The message at `offset`, whose key is `key`.
    pub fn message<'a>(&'a self, offset: u64, key: &'a Key) -> Message<'a> {
        let (time, range) = &self.values[offset as usize % self.values.len()];
        Message {
            time: *time,
            key,
            value: &self.bytes[range.clone()],
        }
    }

    /// Whether a message is the one at `offset`.
    pub fn check(&self, offset: u64, found: Message<'_>) {
        let key = key(offset);
        let wanted = self.message(offset, &key);
        assert_eq!(found.time, wanted.time, "message {offset}");
        assert!(
            found.key == wanted.key && found.value == wanted.value,
            "message {offset}"
        );
    }
}

/// The key of the message at `offset`.
pub fn key(offset: u64) -> Key {
    let mut state = offset.wrapping_mul(0x2545_f491_4f6c_dd1d);
    let mut n = random(&mut state) % KEYS;
    let mut key = *b"device-000000000";
    for digit in key[7..].iter_mut().rev() {
        *digit = b'0' + (n % 10) as u8;
        n /= 10;
    }
    key
}

/// A message as the value of a key-value store: time, length of the key, key, value.
pub fn encode(message: &Message<'_>, out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&message.time.to_be_bytes());
    out.push(message.key.len() as u8);
    out.extend_from_slice(message.key);
    out.extend_from_slice(message.value);
}

/// Back from [`encode`].
pub fn decode(bytes: &[u8]) -> Message<'_> {
    let (time, rest) = bytes.split_first_chunk().expect("a time");
    let (len, rest) = rest.split_first().expect("a key's length");
    let (key, value) = rest.split_at(usize::from(*len));
    Message {
        time: i64::from_be_bytes(*time),
        key,
        value,
    }
}
