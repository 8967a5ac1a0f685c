//! The key index of a file: from (partition, message key) to the newest offset.
//!
//! A section of whole pages: a B+ tree written level by level, leaves first, its root last; a bloom filter;
//! a page that describes both. Strings are the partition's topic and number, big-endian, and the key, so that
//! their order as bytes is that of (topic, partition, key). A key above [`MAX_KEY`] bytes is kept as its first
//! [`MAX_KEY`] bytes and 16 bytes of XXH3-128 of all of it: those that begin alike are ordered by hash, and whoever
//! needs certainty compares the record's own key. docs/formats.md, "Key index".
//!
//! What a string has of the key is the *kept* key ([`kept`]); kept keys are told apart and ordered as bytes.
//!
//! Invariants: every page's CRC is compared before anything in it is used; whatever the bytes are, reading ends
//! in an answer or in a [`KeysError`].

mod bloom;
pub(crate) mod collect;
mod page;
pub(crate) mod range;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use twox_hash::XxHash3_128;

use self::page::{HEADER, Kind, MAX_STRING, PageBuilder, Walk, common};
use super::super::PartitionKey;

pub use page::PAGE;

/// Bytes of the longest key that is kept whole.
pub const MAX_KEY: usize = 1000;
const PARTITION: usize = 8;
const LONG: usize = MAX_KEY + 16;
const _: () = assert!(PARTITION + LONG == MAX_STRING);
/// Bytes of the longest kept key.
pub const MAX_KEPT: usize = LONG;
/// Hashes for the filter in memory, 8 MiB; more wait in the scratch file, where there is one.
const HASHES: usize = 1 << 20;
/// Pages of a filter that are made in one pass over the hashes in the scratch file: 32 MiB, of 26 million keys.
const BLOOM_PAGES: u64 = 8192;
/// Blocks of the bloom filter in a page.
const BLOOM_BLOCKS: u64 = ((PAGE - HEADER) / bloom::BLOCK) as u64;

/// Why a key index cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The writer below refused.
    #[error("cannot write the key index: {0}")]
    Io(#[from] io::Error),
    /// Keys must ascend strictly in the order of [`compare`], offsets must not be negative.
    #[error("topic {} partition {}: {what}", key.topic, key.partition)]
    Order {
        /// Whose key.
        key: PartitionKey,
        /// What was wrong with it.
        what: &'static str,
    },
    /// The section is not whole.
    #[error("key index at byte {position}: {what}")]
    Damaged {
        /// Byte in the section.
        position: u64,
        /// What is wrong.
        what: &'static str,
    },
}

/// A partition and key as they are indexed.
#[derive(Clone)]
struct Stored {
    bytes: [u8; MAX_STRING],
    len: usize,
}

/// A key as the index keeps it: itself up to [`MAX_KEY`] bytes, else its first [`MAX_KEY`] bytes and 16 of its hash.
/// What is of [`MAX_KEPT`] bytes is always a cut key: none that is kept whole is as long.
pub fn kept(key: &[u8]) -> Cow<'_, [u8]> {
    if key.len() <= MAX_KEY {
        return Cow::Borrowed(key);
    }
    let mut kept = Vec::with_capacity(LONG);
    kept.extend_from_slice(&key[..MAX_KEY]);
    kept.extend_from_slice(&XxHash3_128::oneshot(key).to_be_bytes());
    Cow::Owned(kept)
}

impl Stored {
    #[cfg(test)]
    fn new(partition: PartitionKey, key: &[u8]) -> Stored {
        Stored::kept(partition, &kept(key))
    }

    /// Of a kept key; what is longer than any is cut off.
    fn kept(partition: PartitionKey, kept: &[u8]) -> Stored {
        let mut bytes = [0; MAX_STRING];
        bytes[..4].copy_from_slice(&partition.topic.to_be_bytes());
        bytes[4..PARTITION].copy_from_slice(&partition.partition.to_be_bytes());
        let kept = &kept[..kept.len().min(LONG)];
        let len = PARTITION + kept.len();
        bytes[PARTITION..len].copy_from_slice(kept);
        Stored { bytes, len }
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The order in which keys of one partition are written and read: as bytes; keys above [`MAX_KEY`] bytes that begin
/// alike, by their hash.
pub fn compare(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
    if a.len() <= MAX_KEY || b.len() <= MAX_KEY {
        return a[..a.len().min(LONG)].cmp(&b[..b.len().min(LONG)]);
    }
    let hashed = |key: &[u8]| XxHash3_128::oneshot(key);
    a[..MAX_KEY]
        .cmp(&b[..MAX_KEY])
        .then_with(|| hashed(a).cmp(&hashed(b)))
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeysMade {
    /// Keys.
    pub keys: u64,
    /// Bytes of the section, a multiple of [`PAGE`].
    pub bytes: u64,
}

/// Writes a section. Memory: about 30 bytes a leaf page, and 8 a key for the filter, with a scratch file at most
/// 40 MiB. Cost: a hash and a copy a key; writes of a page at a time, so `W` should be buffered.
pub struct KeysWriter<W> {
    out: W,
    keys: u64,
    /// For hashes beyond [`HASHES`], and how many are in it.
    scratch: Option<(File, u64)>,
    builder: PageBuilder,
    pages: u32,
    /// For each finished page of the level: what separates it from the one before, and its number.
    level: Vec<(Box<[u8]>, u32)>,
    first: Vec<u8>,
    last: Vec<u8>,
    hashes: Vec<u64>,
}

impl<W: Write> KeysWriter<W> {
    /// Begins a section where `out` stands.
    pub fn new(out: W) -> Self {
        KeysWriter {
            out,
            keys: 0,
            scratch: None,
            builder: PageBuilder::default(),
            pages: 0,
            level: Vec::new(),
            first: Vec::new(),
            last: Vec::new(),
            hashes: Vec::new(),
        }
    }

    /// As [`KeysWriter::new`], with an empty file, for what would take memory without bounds.
    pub fn with_scratch(out: W, scratch: File) -> Self {
        KeysWriter {
            scratch: Some((scratch, 0)),
            ..Self::new(out)
        }
    }

    /// Bytes of what was written of the section so far.
    pub fn bytes(&self) -> u64 {
        u64::from(self.pages) * PAGE as u64
    }

    /// Adds a key; partitions ascend, and keys within one as [`compare`] says, each once.
    pub fn key(
        &mut self,
        partition: PartitionKey,
        key: &[u8],
        offset: i64,
    ) -> Result<(), KeysError> {
        self.kept(partition, &kept(key), offset)
    }

    /// As [`KeysWriter::key`], of a kept key: these ascend as bytes.
    pub fn kept(
        &mut self,
        partition: PartitionKey,
        kept: &[u8],
        offset: i64,
    ) -> Result<(), KeysError> {
        let wrong = |what| KeysError::Order {
            key: partition,
            what,
        };
        let value = u64::try_from(offset).map_err(|_| wrong("a negative offset"))?;
        if kept.len() > LONG {
            return Err(wrong("a key that is longer than what is kept of any"));
        }
        let stored = Stored::kept(partition, kept);
        let string = stored.as_slice();
        if self.keys > 0 && self.last.as_slice() >= string {
            return Err(wrong("a key that is not behind the one before"));
        }
        if !self.builder.push(string, value) {
            self.leaf()?;
            // Any string that lies behind the last page's and not behind this one separates them.
            let len = common(&self.last, string) + 1;
            self.first.clear();
            self.first.extend_from_slice(&string[..len]);
            self.builder.push(string, value);
        }
        self.last.clear();
        self.last.extend_from_slice(string);
        self.keys += 1;
        self.hashes.push(bloom::hash(string));
        if self.hashes.len() >= HASHES
            && let Some((file, count)) = &mut self.scratch
        {
            let bytes: Vec<u8> = self.hashes.iter().flat_map(|h| h.to_le_bytes()).collect();
            file.write_all_at(&bytes, *count * 8)?;
            *count += self.hashes.len() as u64;
            self.hashes.clear();
        }
        Ok(())
    }

    fn leaf(&mut self) -> Result<(), KeysError> {
        let page = self.builder.finish(Kind::Leaf);
        self.out.write_all(&page)?;
        self.level.push((self.first.as_slice().into(), self.pages));
        self.pages += 1;
        Ok(())
    }

    /// Writes the upper levels, the filter and the description; gives back the writer below, neither flushed nor
    /// synced.
    pub fn finish(mut self) -> Result<(W, KeysMade), KeysError> {
        if !self.builder.is_empty() {
            self.leaf()?;
        }
        let leaves = self.pages;
        let mut level = std::mem::take(&mut self.level);
        while level.len() > 1 {
            let mut above: Vec<(Box<[u8]>, u32)> = Vec::new();
            let mut first = None;
            for (separator, child) in level {
                if !self.builder.push(&separator, u64::from(child)) {
                    let page = self.builder.finish(Kind::Inner);
                    self.out.write_all(&page)?;
                    above.extend(first.take().map(|first| (first, self.pages)));
                    self.pages += 1;
                    self.builder.push(&separator, u64::from(child));
                }
                first.get_or_insert(separator);
            }
            let page = self.builder.finish(Kind::Inner);
            self.out.write_all(&page)?;
            above.extend(first.map(|first| (first, self.pages)));
            self.pages += 1;
            level = above;
        }
        let keys = self.keys;
        let blocks = if keys == 0 {
            0
        } else {
            bloom::blocks_for(keys)
        };
        let bloom_pages = blocks.div_ceil(BLOOM_BLOCKS);
        let mut first = 0;
        while first < bloom_pages {
            let count = (bloom_pages - first).min(BLOOM_PAGES);
            self.filter(blocks, first, count)?;
            first += count;
        }
        let mut end = [0; PAGE];
        end[16..24].copy_from_slice(&keys.to_le_bytes());
        end[24..32].copy_from_slice(&u64::from(leaves).to_le_bytes());
        end[32..40].copy_from_slice(&u64::from(self.pages).to_le_bytes());
        end[40..48].copy_from_slice(&blocks.to_le_bytes());
        page::seal(&mut end, Kind::End, 0, 0);
        self.out.write_all(&end)?;
        let bytes = (u64::from(self.pages) + bloom_pages + 1) * PAGE as u64;
        Ok((self.out, KeysMade { keys, bytes }))
    }

    /// Writes `count` pages of the filter, from page `first` on.
    fn filter(&mut self, blocks: u64, first: u64, count: u64) -> Result<(), KeysError> {
        let mut pages = vec![[0; PAGE]; count as usize];
        let from = first * BLOOM_BLOCKS;
        let mut add = |hash: u64| {
            let block = bloom::block_of(hash, blocks).wrapping_sub(from);
            if let Some(page) = pages.get_mut((block / BLOOM_BLOCKS) as usize) {
                let at = HEADER + (block % BLOOM_BLOCKS) as usize * bloom::BLOCK;
                bloom::add(&mut page[at..at + bloom::BLOCK], hash);
            }
        };
        if let Some((file, spilled)) = &self.scratch {
            let mut bytes = vec![0; HASHES.min(*spilled as usize) * 8];
            let mut at = 0;
            while at < *spilled * 8 {
                let piece = bytes.len().min((*spilled * 8 - at) as usize);
                file.read_exact_at(&mut bytes[..piece], at)?;
                let hashes = bytes[..piece].as_chunks::<8>().0;
                hashes.iter().for_each(|h| add(u64::from_le_bytes(*h)));
                at += piece as u64;
            }
        }
        self.hashes.iter().for_each(|&hash| add(hash));
        for (page, number) in pages.iter_mut().zip(first..) {
            let held = (blocks - number * BLOOM_BLOCKS).min(BLOOM_BLOCKS);
            let bytes = held as usize * bloom::BLOCK;
            page::seal(page, Kind::Bloom, held as u16, bytes as u16);
            self.out.write_all(page)?;
        }
        Ok(())
    }
}

/// A section where it lies, in a mapped file or in memory.
#[derive(Clone, Copy)]
pub struct KeysReader<'a> {
    pages: &'a [[u8; PAGE]],
    /// A bit for each page: its CRC was compared. `None`: it is on every visit.
    checked: Option<&'a [AtomicU64]>,
    keys: u64,
    leaves: u64,
    tree: u64,
    blocks: u64,
}

impl<'a> KeysReader<'a> {
    /// Over the bytes of a whole section; reads its last page.
    pub fn new(section: &'a [u8]) -> Result<Self, KeysError> {
        Self::over(section, None)
    }

    /// As [`KeysReader::new`]; each page's CRC is compared on its first visit only, which its bit in `checked` notes.
    pub fn over(section: &'a [u8], checked: Option<&'a [AtomicU64]>) -> Result<Self, KeysError> {
        let damaged = |what| KeysError::Damaged {
            position: section.len().saturating_sub(PAGE) as u64,
            what,
        };
        let (pages, rest) = section.as_chunks::<PAGE>();
        let (Some(end), []) = (pages.last(), rest) else {
            return Err(damaged("the section is cut short"));
        };
        check(pages, checked, pages.len() as u64 - 1, Kind::End)?;
        let field = |at: usize| {
            let mut out = [0; 8];
            out.copy_from_slice(&end[at..at + 8]);
            u64::from_le_bytes(out)
        };
        let reader = KeysReader {
            pages,
            checked,
            keys: field(16),
            leaves: field(24),
            tree: field(32),
            blocks: field(40),
        };
        let expected = reader
            .tree
            .checked_add(reader.blocks.div_ceil(BLOOM_BLOCKS))
            .and_then(|pages| pages.checked_add(1));
        if expected != Some(pages.len() as u64)
            || reader.leaves > reader.tree
            || (reader.keys == 0) != (reader.leaves == 0)
            || (reader.keys == 0) != (reader.blocks == 0)
            || (reader.leaves == 0) != (reader.tree == 0)
            || reader.blocks > u64::from(u32::MAX)
        {
            return Err(damaged("the section's description does not fit it"));
        }
        Ok(reader)
    }

    /// Keys in the section.
    pub fn len(&self) -> u64 {
        self.keys
    }

    /// True where there are none.
    pub fn is_empty(&self) -> bool {
        self.keys == 0
    }

    fn damaged(page: u64, what: &'static str) -> KeysError {
        KeysError::Damaged {
            position: page * PAGE as u64,
            what,
        }
    }

    fn may_hold(&self, hash: u64) -> Result<bool, KeysError> {
        let block = bloom::block_of(hash, self.blocks);
        let number = self.tree + block / BLOOM_BLOCKS;
        // `new` made sure that the page is there.
        let page = check(self.pages, self.checked, number, Kind::Bloom)?;
        let at = HEADER + (block % BLOOM_BLOCKS) as usize * bloom::BLOCK;
        Ok(bloom::has(&page[at..at + bloom::BLOCK], hash))
    }

    fn walk(&self, number: u64, kind: Kind) -> Result<Walk<'a>, KeysError> {
        let page = check(self.pages, self.checked, number, kind)?;
        Walk::new(page).map_err(|what| Self::damaged(number, what))
    }

    /// The leaf that holds `string`, if any does.
    fn leaf_of(&self, string: &[u8]) -> Result<u64, KeysError> {
        let mut number = self.tree - 1;
        while number >= self.leaves {
            let damaged = |what| Self::damaged(number, what);
            let mut walk = self.walk(number, Kind::Inner)?;
            walk.skip_to(string).map_err(damaged)?;
            let mut child = None;
            while walk.step().map_err(damaged)? {
                if child.is_some() && walk.string() > string {
                    break;
                }
                child = Some(walk.value());
            }
            number = child
                .filter(|&child| child < number)
                .ok_or_else(|| damaged("an index page points upwards"))?;
        }
        Ok(number)
    }

    /// The newest offset of a key. Cost: a page of the filter where the key is not there (but for one in a hundred),
    /// else that and one for each level of the tree, some 0.3 µs each in memory; no allocation.
    pub fn get(&self, partition: PartitionKey, key: &[u8]) -> Result<Option<i64>, KeysError> {
        self.get_kept(partition, &kept(key))
    }

    /// As [`KeysReader::get`], of a kept key.
    pub fn get_kept(&self, partition: PartitionKey, kept: &[u8]) -> Result<Option<i64>, KeysError> {
        if self.is_empty() {
            return Ok(None);
        }
        let stored = Stored::kept(partition, kept);
        let string = stored.as_slice();
        if !self.may_hold(bloom::hash(string))? {
            return Ok(None);
        }
        let number = self.leaf_of(string)?;
        let damaged = |what| Self::damaged(number, what);
        let mut walk = self.walk(number, Kind::Leaf)?;
        walk.skip_to(string).map_err(damaged)?;
        while walk.step().map_err(damaged)? {
            if walk.string() >= string {
                return Ok((walk.string() == string)
                    .then(|| i64::try_from(walk.value()).ok())
                    .flatten());
            }
        }
        Ok(None)
    }

    /// The keys of a partition that are not less than `from`, in order.
    pub fn range(&self, partition: PartitionKey, from: &[u8]) -> Result<KeyRange<'a>, KeysError> {
        self.range_kept(partition, &kept(from))
    }

    /// As [`KeysReader::range`], from a kept key on.
    pub fn range_kept(
        &self,
        partition: PartitionKey,
        from: &[u8],
    ) -> Result<KeyRange<'a>, KeysError> {
        let stored = Stored::kept(partition, from);
        let mut range = KeyRange {
            reader: *self,
            partition: [0; PARTITION],
            number: self.leaves,
            walk: None,
            pending: false,
        };
        range.partition.copy_from_slice(&stored.bytes[..PARTITION]);
        if self.is_empty() {
            return Ok(range);
        }
        let number = self.leaf_of(stored.as_slice())?;
        let damaged = |what| Self::damaged(number, what);
        let mut walk = self.walk(number, Kind::Leaf)?;
        walk.skip_to(stored.as_slice()).map_err(damaged)?;
        while !range.pending && walk.step().map_err(damaged)? {
            range.pending = walk.string() >= stored.as_slice();
        }
        range.number = number;
        range.walk = Some(walk);
        Ok(range)
    }

    /// Checks every page, the order of all keys, that the filter knows each and that the tree leads to each leaf;
    /// returns what is wrong. Cost: reads the section once, and searches once for each leaf.
    pub fn verify(&self) -> Vec<KeysError> {
        let mut findings = Vec::new();
        let mut keys = 0;
        let mut last: Option<Vec<u8>> = None;
        for number in 0..self.leaves {
            let result = (|| -> Result<(), KeysError> {
                let damaged = |what| Self::damaged(number, what);
                let mut walk = self.walk(number, Kind::Leaf)?;
                let mut first = true;
                while walk.step().map_err(damaged)? {
                    let string = walk.string();
                    if last.as_deref().is_some_and(|last| last >= string)
                        || string.len() < PARTITION
                    {
                        return Err(damaged("a key is out of order"));
                    }
                    if i64::try_from(walk.value()).is_err() {
                        return Err(damaged("an offset is impossible"));
                    }
                    if first && self.leaf_of(string)? != number {
                        return Err(damaged("the tree does not lead to this page"));
                    }
                    if !self.may_hold(bloom::hash(string))? {
                        return Err(damaged("the filter does not know a key"));
                    }
                    first = false;
                    keys += 1;
                    let last = last.get_or_insert_default();
                    last.clear();
                    last.extend_from_slice(string);
                }
                Ok(())
            })();
            findings.extend(result.err());
        }
        for number in self.leaves..self.tree {
            let result = self.walk(number, Kind::Inner).and_then(|mut walk| {
                while walk.step().map_err(|what| Self::damaged(number, what))? {}
                Ok(())
            });
            findings.extend(result.err());
        }
        for number in self.tree..self.pages.len() as u64 - 1 {
            findings.extend(check(self.pages, self.checked, number, Kind::Bloom).err());
        }
        if findings.is_empty() && keys != self.keys {
            let end = self.pages.len() as u64 - 1;
            findings.push(Self::damaged(
                end,
                "the section counts other keys than there are",
            ));
        }
        findings
    }
}

/// A page whose CRC and kind are right.
fn check<'a>(
    pages: &'a [[u8; PAGE]],
    checked: Option<&[AtomicU64]>,
    number: u64,
    kind: Kind,
) -> Result<&'a [u8; PAGE], KeysError> {
    let damaged = |what| KeysReader::damaged(number, what);
    let page = &pages[number as usize];
    let bit = 1 << (number % 64);
    let word = checked.and_then(|checked| checked.get((number / 64) as usize));
    // Where two threads come first, both check.
    if word.is_none_or(|word| word.load(Ordering::Relaxed) & bit == 0) {
        page::check_crc(page).map_err(damaged)?;
        word.map(|word| word.fetch_or(bit, Ordering::Relaxed));
    }
    page::check_kind(page, kind).map_err(damaged)?;
    Ok(page)
}

/// A key of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyEntry<'a> {
    /// The key as it is kept: see [`kept`].
    pub kept: &'a [u8],
    /// The key, or the first [`MAX_KEY`] bytes of it.
    pub key: &'a [u8],
    /// The key is longer than what is kept of it.
    pub cut: bool,
    /// Its newest offset.
    pub offset: i64,
}

/// Keys of one partition, in order; made by [`KeysReader::range`]. No iterator, since an entry is borrowed
/// from it: nothing is allocated for a key.
pub struct KeyRange<'a> {
    reader: KeysReader<'a>,
    partition: [u8; PARTITION],
    number: u64,
    walk: Option<Walk<'a>>,
    /// The walk stands on an entry that was not given yet.
    pending: bool,
}

impl KeyRange<'_> {
    /// The next key; `None` behind the last of the partition. After an error it ends.
    #[allow(clippy::should_implement_trait)] // lends what it gives
    pub fn next(&mut self) -> Result<Option<KeyEntry<'_>>, KeysError> {
        match self.advance() {
            Ok(true) => {}
            other => {
                self.walk = None;
                return other.map(|_| None);
            }
        }
        let Some(walk) = &self.walk else {
            return Ok(None);
        };
        let key = &walk.string()[PARTITION..];
        Ok(Some(KeyEntry {
            kept: key,
            cut: key.len() > MAX_KEY,
            key: &key[..key.len().min(MAX_KEY)],
            offset: i64::try_from(walk.value())
                .map_err(|_| KeysReader::damaged(self.number, "an offset is impossible"))?,
        }))
    }

    fn advance(&mut self) -> Result<bool, KeysError> {
        while let Some(walk) = &mut self.walk {
            let damaged = |what| KeysReader::damaged(self.number, what);
            if std::mem::take(&mut self.pending) || walk.step().map_err(damaged)? {
                return Ok(walk.string().starts_with(&self.partition));
            }
            self.number += 1;
            self.walk = if self.number < self.reader.leaves {
                Some(self.reader.walk(self.number, Kind::Leaf)?)
            } else {
                None
            };
        }
        Ok(false)
    }
}
