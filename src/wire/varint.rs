//! Zigzag varints, as Kafka's records use them (Protocol Buffers' encoding: seven bits a byte, least
//! significant group first).
//!
//! Invariant: decoding never reads behind the slice and takes at most ten bytes.

/// Bytes of the longest varint of 64 bits.
pub const MAX_LEN: usize = 10;

/// Maps signed to unsigned so that small magnitudes stay small.
#[inline(always)]
pub const fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

/// Undoes [`zigzag`].
#[inline(always)]
pub const fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// Bytes that `value` takes.
#[inline(always)]
pub const fn len(value: i64) -> usize {
    let bits = 64 - (zigzag(value) | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

/// Writes `value` at the start of `out` and returns the bytes taken.
///
/// # Panics
/// When `out` is shorter than [`len`] of the value.
#[inline(always)]
pub fn put(out: &mut [u8], value: i64) -> usize {
    let mut rest = zigzag(value);
    let mut at = 0;
    while rest >= 0x80 {
        out[at] = rest as u8 | 0x80;
        rest >>= 7;
        at += 1;
    }
    out[at] = rest as u8;
    at + 1
}

/// Reads a varint from the start of `bytes`: the value and the bytes taken; `None` if it is cut off
/// or longer than 64 bits.
#[inline(always)]
pub fn get(bytes: &[u8]) -> Option<(i64, usize)> {
    // Most varints in records have one byte.
    let first = *bytes.first()?;
    if first < 0x80 {
        return Some((unzigzag(u64::from(first)), 1));
    }
    let mut value = u64::from(first & 0x7f);
    for (at, &byte) in bytes.iter().enumerate().take(MAX_LEN).skip(1) {
        let group = u64::from(byte & 0x7f);
        // The tenth byte holds the last bit only.
        if at == MAX_LEN - 1 && group > 1 {
            return None;
        }
        value |= group << (7 * at);
        if byte < 0x80 {
            return Some((unzigzag(value), at + 1));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_encodings() {
        let mut out = [0; MAX_LEN];
        for (value, bytes) in [
            (0, &[0x00][..]),
            (-1, &[0x01]),
            (1, &[0x02]),
            (63, &[0x7e]),
            (64, &[0x80, 0x01]),
            (300, &[0xd8, 0x04]),
            (
                i64::MIN,
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            ),
        ] {
            let taken = put(&mut out, value);
            assert_eq!(&out[..taken], bytes);
        }
    }

    #[test]
    fn cut_off_and_overlong_are_refused() {
        assert_eq!(get(&[]), None);
        assert_eq!(get(&[0x80]), None);
        assert_eq!(get(&[0xff; 10]), None);
        assert_eq!(
            get(&[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x02]),
            None
        );
    }

    proptest::proptest! {
        #[test]
        fn round_trip(value: i64) {
            let mut out = [0; MAX_LEN];
            let taken = put(&mut out, value);
            proptest::prop_assert_eq!(taken, len(value));
            proptest::prop_assert_eq!(get(&out), Some((value, taken)));
            proptest::prop_assert_eq!(get(&out[..taken - 1]), None);
        }
    }
}
