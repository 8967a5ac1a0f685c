//! Reads an SST where it is mapped.
//!
//! Invariants: nothing is handed out before its checksum was compared, a page's on the first visit since the file was
//! mapped (on every one it would be half the cost of finding a message in memory), a block's on every read, but for
//! consumers, who compare the batches' own CRCs, on the first ([`SstReader::block_once`]); no number in the file is
//! trusted beyond that, so that a crafted file ends in an error. What is handed out are slices of the mapping: nothing is
//! copied, but single blocks for single messages ([`SstReader::read_block`]).
//!
//! A mapped file must not be cut short while it is used: the process would get SIGBUS, as it would where the disk
//! fails to read a page. Files of the store are never written to again once they have their name.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Advice, Mmap};

use super::SstError;
use super::format::{
    Block, FOOTER, Footer, HEADER, INNER_ENTRY, LEAF_ENTRIES, LEAF_ENTRY, PAGE, PageKind,
    PartitionExtent, SstInfo, TABLE_ENTRY, check, child_of, entries, place_at,
};
use super::scan::Scan;
use crate::storage::PartitionKey;
use crate::storage::lsm::keys::{KeysError, KeysReader};
use crate::storage::wal::LogId;

/// Bytes that the kernel is asked for in a call: of more than a request of the disk holds (`max_sectors_kb`) it
/// would silently read the beginning only, and the rest a page at a time as it is touched.
const ASK: u64 = 512 << 10;
/// Leaf pages that a walk asks the kernel for at a time: some 6 MB of blocks.
const LEAVES_AHEAD: u64 = 32;

enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

/// An open SST; any number of threads may read it at the same time.
pub struct SstReader {
    path: PathBuf,
    bytes: Bytes,
    info: SstInfo,
    footer: Footer,
    /// A bit for each page: its checksum was compared.
    checked: Box<[AtomicU64]>,
    /// As `checked`, of the key index.
    checked_keys: Box<[AtomicU64]>,
    /// The same for each block, where consumers read from it.
    checked_blocks: OnceLock<Box<[AtomicU64]>>,
    /// The file, where it is sent from; `None`: it could not be opened.
    file: OnceLock<Option<File>>,
    /// The same, where blocks are read that lie here and there.
    scattered: OnceLock<Option<File>>,
}

impl SstReader {
    /// Maps the file and checks header and footer. Cost: some system calls; touches two pages.
    pub fn open(path: &Path, id: LogId) -> Result<SstReader, SstError> {
        let file = File::open(path).map_err(SstError::io("cannot open", path))?;
        // SAFETY: files of the store are never written to or cut short after they got their name (module
        // comment); the store's lock keeps other writers out.
        let map = unsafe { Mmap::map(&file) }.map_err(SstError::io("cannot map", path))?;
        // Blocks are read here and there; a scan asks for more by itself (`will_need`).
        let _ = map.advise(Advice::Random);
        Self::of(Bytes::Mapped(map), path, Some(id))
    }

    /// Of bytes in memory, of any store; for tests and tools.
    pub fn from_bytes(bytes: Vec<u8>, path: &Path) -> Result<SstReader, SstError> {
        Self::of(Bytes::Owned(bytes), path, None)
    }

    /// As [`SstReader::open`], of any store and shard; for tools.
    pub fn open_any(path: &Path) -> Result<SstReader, SstError> {
        let file = File::open(path).map_err(SstError::io("cannot open", path))?;
        // SAFETY: as in `open`.
        let map = unsafe { Mmap::map(&file) }.map_err(SstError::io("cannot map", path))?;
        Self::of(Bytes::Mapped(map), path, None)
    }

    fn of(bytes: Bytes, path: &Path, id: Option<LogId>) -> Result<SstReader, SstError> {
        let all: &[u8] = match &bytes {
            Bytes::Mapped(map) => map,
            Bytes::Owned(vec) => vec,
        };
        let damaged = |position: usize, what| SstError::Damaged {
            path: path.to_owned(),
            position: position as u64,
            what,
        };
        let info = SstInfo::decode(all).map_err(|what| damaged(0, what))?;
        if id.is_some_and(|id| id != info.id) {
            return Err(damaged(0, "the file is another store's or shard's"));
        }
        let footer =
            Footer::decode(all).map_err(|what| damaged(all.len().saturating_sub(FOOTER), what))?;
        let pages = u64::from(footer.index_pages) + u64::from(footer.table_pages);
        Ok(SstReader {
            path: path.to_owned(),
            checked: bits(pages),
            checked_keys: bits(footer.key_bytes / PAGE as u64),
            checked_blocks: OnceLock::new(),
            file: OnceLock::new(),
            scattered: OnceLock::new(),
            bytes,
            info,
            footer,
        })
    }

    /// All bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Owned(vec) => vec,
        }
    }

    /// Where the file comes from.
    pub fn info(&self) -> &SstInfo {
        &self.info
    }

    /// What the file holds.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file, open for reading, for as long as it has its name when this is called first; `None`: it is not in a file,
    /// or cannot be opened.
    pub fn file(&self) -> Option<&File> {
        self.file.get_or_init(|| self.open_again()).as_ref()
    }

    /// As [`SstReader::file`], of which the kernel reads what it is asked for: where neighbours of a page happen to be in
    /// memory it would take the next read for a stream's, and read ahead.
    fn scattered(&self) -> Option<&File> {
        let open = || {
            let file = self.open_again()?;
            // SAFETY: the descriptor is open; the call touches no memory. Only a hint.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
            Some(file)
        };
        self.scattered.get_or_init(open).as_ref()
    }

    fn open_again(&self) -> Option<File> {
        match &self.bytes {
            Bytes::Mapped(_) => File::open(&self.path).ok(),
            Bytes::Owned(_) => None,
        }
    }

    fn damaged(&self, position: u64, what: &'static str) -> SstError {
        SstError::Damaged {
            path: self.path.clone(),
            position,
            what,
        }
    }

    /// Entries of page `number`, counted from the index's first, table pages behind the index's.
    pub(super) fn page(&self, number: u32, kind: PageKind, size: usize) -> Result<&[u8], SstError> {
        let position = self.footer.data_end + u64::from(number) * PAGE as u64;
        if number >= self.footer.index_pages + self.footer.table_pages {
            return Err(self.damaged(position, "the index names a page that is not there"));
        }
        let at = position as usize;
        let page = &self.bytes()[at..at + PAGE];
        // Where two threads come first, both check.
        let (checked, bit) = (&self.checked[number as usize / 64], 1 << (number % 64));
        let seen = checked.load(Ordering::Relaxed);
        if seen & bit == 0 {
            if seen == 0 {
                // One request instead of 64: whoever looks here and there comes to the neighbours as well.
                let first = self.footer.data_end + u64::from(number / 64) * 64 * PAGE as u64;
                self.ask(first, 64 * PAGE as u64);
            }
            check(page).map_err(|what| self.damaged(position, what))?;
            checked.fetch_or(bit, Ordering::Relaxed);
        }
        entries(page, kind, size).map_err(|what| self.damaged(position, what))
    }

    /// All partitions, in order. Cost: reads the partition table.
    pub fn extents(&self) -> Result<Vec<PartitionExtent>, SstError> {
        let mut extents = Vec::new();
        for number in 0..self.footer.table_pages {
            let page = self.page(
                self.footer.index_pages + number,
                PageKind::Table,
                TABLE_ENTRY,
            )?;
            extents.extend(page.chunks_exact(TABLE_ENTRY).map(PartitionExtent::get));
        }
        if extents.len() as u64 != self.footer.partitions {
            return Err(self.damaged(self.footer.data_end, "the partition table is not complete"));
        }
        Ok(extents)
    }

    /// The key index; `None`: the file has none. Cost: on the first call of all the CRC of a page.
    pub fn keys(&self) -> Result<Option<KeysReader<'_>>, SstError> {
        if self.footer.key_bytes == 0 {
            return Ok(None);
        }
        let at = self.footer.keys_at() as usize;
        let section = &self.bytes()[at..at + self.footer.key_bytes as usize];
        let keys = KeysReader::over(section, Some(&self.checked_keys));
        let keys = keys.map_err(|error| self.keys_damaged(&error))?;
        if keys.len() != self.footer.keys {
            let what = "the footer counts other keys than the key index does";
            return Err(self.damaged(at as u64, what));
        }
        Ok(Some(keys))
    }

    /// What is wrong in the key index, with its place in the file.
    pub(crate) fn keys_damaged(&self, error: &KeysError) -> SstError {
        match error {
            KeysError::Damaged { position, what } => {
                self.damaged(self.footer.keys_at().saturating_add(*position), what)
            }
            _ => self.damaged(self.footer.keys_at(), "the key index cannot be read"),
        }
    }

    /// Block `number` of the index.
    pub fn block_at(&self, number: u64) -> Result<Block, SstError> {
        self.entry(self.leaf(number / LEAF_ENTRIES as u64)?, number)
    }

    fn leaf(&self, page: u64) -> Result<&[u8], SstError> {
        let page = u32::try_from(page).unwrap_or(u32::MAX);
        self.page(page, PageKind::Leaf, LEAF_ENTRY)
    }

    /// Block `number` in its leaf page.
    fn entry(&self, leaf: &[u8], number: u64) -> Result<Block, SstError> {
        let at = (number % LEAF_ENTRIES as u64) as usize * LEAF_ENTRY;
        match leaf.get(at..at + LEAF_ENTRY) {
            Some(entry) => Ok(Block::get(entry)),
            None => Err(self.damaged(
                self.footer.data_end,
                "a leaf page has fewer entries than its place",
            )),
        }
    }

    /// The number of the first block behind (`key`, `offset`): `blocks` where there is none.
    fn upper_bound(&self, key: PartitionKey, offset: i64) -> Result<u64, SstError> {
        self.descend(key, offset, |_| ())
    }

    /// As [`SstReader::upper_bound`]; `visit` gets the numbers of the index's pages on the way.
    fn descend(
        &self,
        key: PartitionKey,
        offset: i64,
        mut visit: impl FnMut(u32),
    ) -> Result<u64, SstError> {
        if self.footer.blocks == 0 {
            return Ok(0);
        }
        let leaves = self.footer.leaves();
        let mut number = self.footer.index_pages - 1;
        while number >= leaves {
            visit(number);
            let page = self.page(number, PageKind::Inner, INNER_ENTRY)?;
            let behind = behind(page, INNER_ENTRY, (key, offset));
            let child = child_of(&page[behind.saturating_sub(1) * INNER_ENTRY..]);
            if child >= number {
                let position = self.footer.data_end + u64::from(number) * PAGE as u64;
                return Err(self.damaged(position, "an index page points upwards"));
            }
            number = child;
        }
        visit(number);
        let page = self.page(number, PageKind::Leaf, LEAF_ENTRY)?;
        let behind = behind(page, LEAF_ENTRY, (key, offset)) as u64;
        Ok(u64::from(number) * LEAF_ENTRIES as u64 + behind)
    }

    /// The number of the first block of `key` that ends behind `offset`; `None`: there is none.
    /// Cost: a page for each level of the index, some 0.2 µs each where it is in memory.
    fn locate_number(&self, key: PartitionKey, offset: i64) -> Result<Option<u64>, SstError> {
        let behind = self.upper_bound(key, offset)?;
        if behind > 0 {
            let block = self.block_at(behind - 1)?;
            if block.key == key && block.end_offset > offset {
                return Ok(Some(behind - 1));
            }
        }
        if behind < self.footer.blocks && self.block_at(behind)?.key == key {
            return Ok(Some(behind));
        }
        Ok(None)
    }

    /// The first block of `key` that ends behind `offset`.
    pub fn locate(&self, key: PartitionKey, offset: i64) -> Result<Option<Block>, SstError> {
        self.locate_number(key, offset)?
            .map(|number| self.block_at(number))
            .transpose()
    }

    /// Tells the kernel that the pages of the index on the way to `offset` are in use. What is touched in a mapping that is read
    /// at random does not count as used (Linux's `vma_has_recency`), so that the index would go as soon as blocks that are read
    /// once. Cost: a system call a level, some 0.3 µs.
    pub fn keep_index(&self, key: PartitionKey, offset: i64) -> Result<(), SstError> {
        let Some(file) = self.scattered() else {
            return Ok(());
        };
        self.descend(key, offset, |number| {
            let at = self.footer.data_end + u64::from(number) * PAGE as u64;
            // Only a hint: whoever needs the page finds out whether it can be read.
            let _ = file.read_at(&mut [0], at);
        })?;
        Ok(())
    }

    /// The first block of `key` that holds a message that arrived at `unix_ms` or later.
    pub fn locate_time(&self, key: PartitionKey, unix_ms: i64) -> Result<Option<Block>, SstError> {
        // Offsets are not negative.
        let mut from = self.upper_bound(key, -1)?;
        let mut to = self.upper_bound(key, i64::MAX)?;
        let end = to;
        // `max_time` never falls within a partition.
        while from < to {
            let middle = from + (to - from) / 2;
            if self.block_at(middle)?.max_time < unix_ms {
                from = middle + 1;
            } else {
                to = middle;
            }
        }
        if from == end {
            return Ok(None);
        }
        let block = self.block_at(from)?;
        Ok((block.key == key).then_some(block))
    }

    /// Bytes of the blocks of `key` that end at `offset` or before.
    pub fn bytes_before(&self, key: PartitionKey, offset: i64) -> Result<u64, SstError> {
        let Some(first) = self.locate(key, -1)? else {
            return Ok(0);
        };
        let end = match self.locate(key, offset)? {
            Some(block) => block.position,
            None => {
                let behind = self.upper_bound(key, i64::MAX)?;
                let last = self.block_at(behind.saturating_sub(1))?;
                last.position.saturating_add(u64::from(last.len))
            }
        };
        Ok(end.saturating_sub(first.position))
    }

    /// The first block of `key` behind which, itself included, at most `bytes` bytes of the partition lie; `None`: even
    /// the last block is larger.
    pub fn locate_last_bytes(
        &self,
        key: PartitionKey,
        bytes: u64,
    ) -> Result<Option<Block>, SstError> {
        let mut from = self.upper_bound(key, -1)?;
        let mut to = self.upper_bound(key, i64::MAX)?;
        if from == to {
            return Ok(None);
        }
        let (behind, last) = (to, self.block_at(to - 1)?);
        let end = last.position.saturating_add(u64::from(last.len));
        while from < to {
            let middle = from + (to - from) / 2;
            if end.saturating_sub(self.block_at(middle)?.position) > bytes {
                from = middle + 1;
            } else {
                to = middle;
            }
        }
        (from < behind).then(|| self.block_at(from)).transpose()
    }

    /// The blocks of `key` from the one that ends behind `from` on.
    pub fn blocks(&self, key: PartitionKey, from: i64) -> Result<Blocks<'_>, SstError> {
        Ok(Blocks {
            reader: self,
            key,
            next: self.locate_number(key, from)?.unwrap_or(u64::MAX),
            leaf: None,
            asked: 0,
        })
    }

    /// The batches of a block, checked against its CRC. Cost: some 2 µs for 64 KiB in memory.
    pub fn block(&self, block: &Block) -> Result<&[u8], SstError> {
        self.block_checked(block, |bytes| check_block(bytes, block, &self.path))
    }

    /// As [`SstReader::block`], read into `buffer` where the file is mapped: for blocks that lie here and there and are
    /// mostly not in memory. Two faults cost more than a call, and leave their pages in the page table.
    pub fn read_block<'a>(
        &'a self,
        block: &Block,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], SstError> {
        let Some(file) = self.scattered() else {
            return self.block(block);
        };
        let range = self.range(block)?;
        buffer.resize(range.len(), 0);
        file.read_exact_at(buffer, block.position)
            .map_err(SstError::io("cannot read", &self.path))?;
        check_block(buffer, block, &self.path)?;
        Ok(buffer)
    }

    /// As [`SstReader::block`] of block `number` of the index, whose CRC is compared on the first such call since the
    /// file was mapped: for batches whose own CRC their readers compare.
    pub fn block_once(&self, number: u64, block: &Block) -> Result<&[u8], SstError> {
        let checked = self
            .checked_blocks
            .get_or_init(|| bits(self.footer.blocks))
            .get((number / 64) as usize);
        let bit = 1 << (number % 64);
        self.block_checked(block, |bytes| {
            if checked.is_some_and(|word| word.load(Ordering::Relaxed) & bit != 0) {
                return Ok(());
            }
            check_block(bytes, block, &self.path)?;
            if let Some(word) = checked {
                word.fetch_or(bit, Ordering::Relaxed);
            }
            Ok(())
        })
    }

    fn block_checked(
        &self,
        block: &Block,
        check: impl FnOnce(&[u8]) -> Result<(), SstError>,
    ) -> Result<&[u8], SstError> {
        let bytes = &self.bytes()[self.range(block)?];
        check(bytes)?;
        Ok(bytes)
    }

    /// Where the block lies in the file.
    fn range(&self, block: &Block) -> Result<Range<usize>, SstError> {
        let end = block.position.checked_add(u64::from(block.len));
        if block.position < HEADER as u64 || end.is_none_or(|end| end > self.footer.data_end) {
            return Err(SstError::Block {
                path: self.path.clone(),
                block: *block,
                what: "the index names bytes that are not there",
            });
        }
        let at = block.position as usize;
        Ok(at..at + block.len as usize)
    }

    /// A walk over the blocks in bytes `from` to `end` of the file, in order, at the rate of the disk.
    pub fn scan(&self, from: u64, end: u64) -> Scan<'_> {
        Scan::new(self, from, end)
    }

    /// The file is mapped and not in memory of the process.
    pub(super) fn is_mapped(&self) -> bool {
        matches!(self.bytes, Bytes::Mapped(_))
    }

    /// How many pages of the `len` bytes from `position` on, a page's beginning, are in the page cache.
    pub(super) fn resident(&self, position: u64, len: usize) -> usize {
        let Bytes::Mapped(map) = &self.bytes else {
            return 0;
        };
        let at = (position as usize).min(map.len());
        let len = len.min(map.len() - at);
        let mut pages = [0u8; 256];
        let len = len.min(pages.len() * PAGE);
        // SAFETY: the range lies in the mapping, which `self` keeps, and there is a byte for each of its pages; the
        // mapping begins at a page, and so does the range.
        let done = unsafe {
            let address = map.as_ptr().add(at).cast_mut().cast();
            libc::mincore(address, len, pages.as_mut_ptr())
        };
        match done {
            0 => pages.iter().filter(|&&page| page & 1 == 1).count(),
            _ => 0,
        }
    }

    /// Asks the kernel to read a block, and up to `ahead` bytes from its beginning, but not what lies before byte
    /// `asked` of the file, which it was asked for already. Returns the byte where that ends.
    pub fn will_need(&self, block: &Block, asked: u64, ahead: u64) -> u64 {
        let end = block.position.saturating_add(ahead.max(block.len.into()));
        let end = end.min(self.footer.data_end);
        let start = block.position.max(asked);
        self.ask(start, end.saturating_sub(start));
        end.max(asked)
    }

    /// Asks the kernel for `len` bytes from byte `position` on; 0: for nothing.
    pub(super) fn ask(&self, position: u64, len: u64) {
        if let Bytes::Mapped(map) = &self.bytes {
            let end = position.saturating_add(len).min(map.len() as u64);
            let mut at = position;
            while at < end {
                let piece = (end - at).min(ASK);
                // Only a hint.
                let _ = map.advise_range(Advice::WillNeed, at as usize, piece as usize);
                at += piece;
            }
        }
    }
}

/// Compares a block's checksum.
pub(super) fn check_block(bytes: &[u8], block: &Block, path: &Path) -> Result<(), SstError> {
    if crc32c::crc32c(bytes) == block.crc {
        return Ok(());
    }
    Err(SstError::Block {
        path: path.to_owned(),
        block: *block,
        what: "the block's CRC is wrong",
    })
}

/// So many bits, all 0.
fn bits(count: u64) -> Box<[AtomicU64]> {
    (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()
}

/// How many entries of a page have `place` or an earlier one.
fn behind(page: &[u8], size: usize, place: (PartitionKey, i64)) -> usize {
    let (mut from, mut to) = (0, page.len() / size);
    while from < to {
        let middle = (from + to) / 2;
        if place_at(&page[middle * size..]) <= place {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    from
}

/// Blocks of one partition, in order.
pub struct Blocks<'a> {
    reader: &'a SstReader,
    key: PartitionKey,
    next: u64,
    /// The leaf page that was checked last: one check serves all of its entries.
    leaf: Option<(u64, &'a [u8])>,
    /// The kernel was asked for the leaf pages before this one.
    asked: u64,
}

impl<'a> Blocks<'a> {
    /// The number in the index of the next block.
    pub fn number(&self) -> u64 {
        self.next
    }

    fn block(&mut self, number: u64) -> Result<Block, SstError> {
        let page = number / LEAF_ENTRIES as u64;
        let leaf = match self.leaf {
            Some((at, leaf)) if at == page => leaf,
            // A walk that goes on beyond its first leaf asks for the following ones before they are needed.
            Some(_) if page + LEAVES_AHEAD / 2 > self.asked => {
                let end = (page + LEAVES_AHEAD).min(self.reader.footer.leaves().into());
                let start = self.asked.max(page);
                self.reader.ask(
                    self.reader.footer.data_end + start * PAGE as u64,
                    end.saturating_sub(start) * PAGE as u64,
                );
                self.asked = page + LEAVES_AHEAD;
                self.reader.leaf(page)?
            }
            _ => self.reader.leaf(page)?,
        };
        self.leaf = Some((page, leaf));
        self.reader.entry(leaf, number)
    }
}

impl Iterator for Blocks<'_> {
    type Item = Result<Block, SstError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.reader.footer.blocks {
            return None;
        }
        match self.block(self.next) {
            Ok(block) if block.key == self.key => {
                self.next += 1;
                Some(Ok(block))
            }
            Ok(_) => None,
            Err(error) => {
                self.next = u64::MAX;
                Some(Err(error))
            }
        }
    }
}
