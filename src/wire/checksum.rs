//! The Internet checksum (RFC 1071) and the pseudo-headers of IPv4 (RFC 768) and IPv6 (RFC 8200 §8.1).
//!
//! Sums are kept un-complemented as `u64` partial sums of native-endian words: the one's-complement
//! sum is independent of byte order as long as the result is stored the same way (RFC 1071 §2B).
//! Invariant: a partial sum covers an even number of bytes, except that of the last part.

/// A partial one's-complement sum; parts are combined with [`Sum::plus`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

/// `a + b` with the carry added back in: addition modulo 2⁶⁴ − 1.
#[inline(always)]
fn add(a: u64, b: u64) -> u64 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u64::from(carry)
}

impl Sum {
    /// Sums `bytes`, 8 at a time; an odd last byte is padded with zero.
    #[inline(always)]
    pub fn of(bytes: &[u8]) -> Self {
        // Two accumulators of 32-bit halves: no carries to add back inside the loop, so that it
        // vectorises. Slices here are at most 64 KiB, which cannot overflow them.
        let mut sum = 0u64;
        let mut carried = 0u64;
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            let word = u64::from_ne_bytes(*word);
            sum = sum.wrapping_add(word & 0xffff_ffff);
            carried = carried.wrapping_add(word >> 32);
        }
        let mut total = add(sum, carried);
        // The tail word by word: a copy of unknown length would be a call of memcpy.
        let mut rest = rest;
        if let Some((word, behind)) = rest.split_first_chunk::<4>() {
            total = add(total, u64::from(u32::from_ne_bytes(*word)));
            rest = behind;
        }
        if let Some((word, behind)) = rest.split_first_chunk::<2>() {
            total = add(total, u64::from(u16::from_ne_bytes(*word)));
            rest = behind;
        }
        if let [last] = rest {
            total = add(total, u64::from(u16::from_ne_bytes([*last, 0])));
        }
        Self(total)
    }

    /// The sum of both parts; the first covers an even number of bytes.
    #[inline(always)]
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self(add(self.0, other.0))
    }

    /// Adds one big-endian 16-bit word.
    #[inline(always)]
    #[must_use]
    pub fn plus_word(self, word: u16) -> Self {
        Self(add(self.0, u64::from(word.to_be())))
    }

    /// Folds to 16 bits, un-complemented, as a big-endian number.
    #[inline(always)]
    pub fn fold(self) -> u16 {
        let sum = (self.0 >> 32) + (self.0 & 0xffff_ffff);
        let sum = (sum >> 32) + (sum & 0xffff_ffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        u16::from_be(sum as u16)
    }

    /// The checksum field for what was summed with the field as zero.
    #[inline(always)]
    pub fn checksum(self) -> u16 {
        !self.fold()
    }

    /// [`Sum::checksum`] for UDP, where zero means "none" and is sent as 0xffff (RFC 768).
    #[inline(always)]
    pub fn udp_checksum(self) -> u16 {
        match self.checksum() {
            0 => 0xffff,
            checksum => checksum,
        }
    }

    /// Whether data summed with its checksum field is intact.
    #[inline(always)]
    pub fn is_valid(self) -> bool {
        self.fold() == 0xffff
    }
}

/// Sum of the pseudo-header: `addresses` are source and destination as they lie in the IP header
/// (8 or 32 bytes), `len` is the length of the upper-layer packet.
#[inline(always)]
pub fn pseudo_header(addresses: &[u8], protocol: u8, len: u16) -> Sum {
    Sum::of(addresses)
        .plus_word(u16::from(protocol))
        .plus_word(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 as written: 16-bit words, carries folded at the end.
    fn reference(bytes: &[u8]) -> u16 {
        let mut sum = 0u64;
        for pair in bytes.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
        }
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    #[test]
    fn the_example_of_rfc_1071() {
        let sum = Sum::of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.fold(), 0xddf2);
        assert_eq!(sum.checksum(), !0xddf2);
    }

    #[test]
    fn all_ones_do_not_overflow() {
        assert_eq!(
            Sum::of(&vec![0xff; 65535]).fold(),
            reference(&vec![0xff; 65535])
        );
    }

    #[test]
    fn a_zero_udp_checksum_is_sent_as_ones() {
        assert_eq!(Sum::of(&[0xff, 0xff]).checksum(), 0);
        assert_eq!(Sum::of(&[0xff, 0xff]).udp_checksum(), 0xffff);
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..150) {
            prop_assert_eq!(Sum::of(&bytes).fold(), reference(&bytes));
            let cut = (cut * 2).min(bytes.len() & !1);
            let parts = Sum::of(&bytes[..cut]).plus(Sum::of(&bytes[cut..]));
            prop_assert_eq!(parts.fold(), reference(&bytes));
            let with_word = Sum::of(&bytes).plus_word(0x1234);
            let mut even = bytes.clone();
            if even.len() % 2 == 1 { even.push(0); }
            even.extend([0x12, 0x34]);
            prop_assert_eq!(with_word.fold(), reference(&even));
        }
    }
}
