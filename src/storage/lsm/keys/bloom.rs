//! A split-block bloom filter, so that a key that is not there costs no search.
//!
//! Source: the filter of Apache Parquet (its BloomFilter document): blocks of 256 bits, eight words of 32,
//! one bit a word; the key's hash is XXH64 with seed 0. Invariant: a key that was added is always found.

use twox_hash::XxHash64;

/// Bytes of a block.
pub(super) const BLOCK: usize = 32;
/// Bits for each key: about one absent key in a hundred is taken for present.
pub(super) const BITS_PER_KEY: u64 = 10;
/// Parquet's odd constants, one for each word.
const SALT: [u32; 8] = [
    0x47b6_137b,
    0x4497_4d91,
    0x8824_ad5b,
    0xa2b7_289d,
    0x7054_95c7,
    0x2df1_424b,
    0x9efc_4947,
    0x5c6b_fb31,
];

pub(super) fn hash(key: &[u8]) -> u64 {
    XxHash64::oneshot(0, key)
}

/// Blocks for so many keys: at least one.
pub(super) fn blocks_for(keys: u64) -> u64 {
    keys.saturating_mul(BITS_PER_KEY)
        .div_ceil(BLOCK as u64 * 8)
        .max(1)
}

/// The block of a hash among `blocks`, of which there are fewer than 2^32.
pub(super) fn block_of(hash: u64, blocks: u64) -> u64 {
    ((hash >> 32) * blocks) >> 32
}

/// The bit of word `word`.
fn bit(hash: u64, word: usize) -> u32 {
    1 << ((hash as u32).wrapping_mul(SALT[word]) >> 27)
}

/// Adds a hash to its block.
pub(super) fn add(block: &mut [u8], hash: u64) {
    for (word, bytes) in block.as_chunks_mut::<4>().0.iter_mut().enumerate().take(8) {
        *bytes = (u32::from_le_bytes(*bytes) | bit(hash, word)).to_le_bytes();
    }
}

/// Whether a hash may have been added to its block.
pub(super) fn has(block: &[u8], hash: u64) -> bool {
    block
        .as_chunks::<4>()
        .0
        .iter()
        .enumerate()
        .take(8)
        .all(|(word, bytes)| u32::from_le_bytes(*bytes) & bit(hash, word) != 0)
}
