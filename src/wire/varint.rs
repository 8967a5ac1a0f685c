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
    // Records have varints of one to three bytes, of lengths and of deltas, and the same ones again and again: each has its
    // branch, which is predicted, where a loop's end is not.
    match *bytes {
        [a, ..] if a < 0x80 => Some((unzigzag(u64::from(a)), 1)),
        [a, b, ..] if b < 0x80 => Some((unzigzag(u64::from(a & 0x7f) | u64::from(b) << 7), 2)),
        [a, b, c, ..] if c < 0x80 => {
            let low = u64::from(a & 0x7f) | u64::from(b & 0x7f) << 7;
            Some((unzigzag(low | u64::from(c) << 14), 3))
        }
        _ => match get_long(bytes) {
            (_, 0) => None,
            (value, taken) => Some((unzigzag(value), taken)),
        },
    }
}

/// As [`get`], of any length, before [`unzigzag`]; 0 bytes taken: `None`. So it comes back in registers, and so do the callers'
/// own results stay there.
#[cold]
fn get_long(bytes: &[u8]) -> (u64, usize) {
    let mut value = 0;
    for (at, &byte) in bytes.iter().take(MAX_LEN).enumerate() {
        let group = u64::from(byte & 0x7f);
        // The tenth byte holds the last bit only.
        if at == MAX_LEN - 1 && group > 1 {
            break;
        }
        value |= group << (7 * at);
        if byte < 0x80 {
            return (value, at + 1);
        }
    }
    (0, 0)
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

        /// Cut off after every byte, of every length.
        #[test]
        fn each_length_alike(bits in 0u32..64, value: i64) {
            let value = value >> bits;
            let mut out = [0; MAX_LEN];
            let taken = put(&mut out, value);
            proptest::prop_assert_eq!(get(&out[..taken]), Some((value, taken)));
            proptest::prop_assert_eq!(get_long(&out[..taken]), (zigzag(value), taken));
            for cut in 0..taken {
                proptest::prop_assert_eq!(get(&out[..cut]), None);
            }
        }
    }
}
