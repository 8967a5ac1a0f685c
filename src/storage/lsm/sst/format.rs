//! The bytes of an SST: header, pages of the block index and of the partition table, footer.
//!
//! A file is: header, record batches, pages, the key index, footer. Pages are 4096 bytes with a CRC each. The block index is a
//! B+ tree written level by level, leaves first, so that the root is its last page; its entries have a fixed
//! size, so a page is searched by halving. Little-endian, but for the batches. docs/formats.md, "SST".

use crate::storage::PartitionKey;
use crate::storage::wal::LogId;

/// First eight bytes of an SST.
pub const SST_MAGIC: [u8; 8] = *b"TAFFSST\0";
/// Last eight bytes of an SST.
pub const SST_END: [u8; 8] = *b"\0TSSFFAT";
/// Version of the format. Version 1 had no key index; it is read.
pub const SST_VERSION: u32 = 2;
/// The oldest version that is read.
const SST_VERSION_MIN: u32 = 1;
/// Bytes of the header; the first batch begins behind it.
pub const HEADER: usize = 128;
/// Bytes of the footer.
pub const FOOTER: usize = 128;
/// Bytes of a page: one of the disk's and the page cache's.
pub const PAGE: usize = 4096;
/// Bytes before a page's entries: CRC u32, kind u8, 0, number of entries u16, 8 × 0.
pub const PAGE_HEADER: usize = 16;
/// Entries of a leaf page, of an inner page, and of a page of the partition table.
pub const LEAF_ENTRIES: usize = (PAGE - PAGE_HEADER) / LEAF_ENTRY;
/// See [`LEAF_ENTRIES`].
pub const INNER_ENTRIES: usize = (PAGE - PAGE_HEADER) / INNER_ENTRY;
/// See [`LEAF_ENTRIES`].
pub const TABLE_ENTRIES: usize = (PAGE - PAGE_HEADER) / TABLE_ENTRY;
pub(super) const LEAF_ENTRY: usize = 56;
pub(super) const INNER_ENTRY: usize = 24;
pub(super) const TABLE_ENTRY: usize = 64;
/// Bit of an extent's last field: its keys are indexed.
const KEYED: u64 = 1 << 63;
const HEADER_CRC_AT: usize = 64;
const FOOTER_CRC_AT: usize = 112;

/// What a page holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PageKind {
    /// [`Block`]s.
    Leaf = 1,
    /// First key of each child page, and its number.
    Inner = 2,
    /// [`PartitionExtent`]s.
    Table = 3,
}

/// Where a file comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SstInfo {
    /// Whose store.
    pub id: LogId,
    /// Names the file.
    pub number: u64,
    /// What it holds of the log: LSNs from here on …
    pub lsn_start: u64,
    /// … and before this.
    pub lsn_end: u64,
    /// When it was made, Unix ms.
    pub created_ms: i64,
}

/// One or more successive record batches of a partition: an entry of the block index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Whose.
    pub key: PartitionKey,
    /// Base offset of the first batch.
    pub first_offset: i64,
    /// The offset behind the last batch.
    pub end_offset: i64,
    /// Byte in the file.
    pub position: u64,
    /// Bytes.
    pub len: u32,
    /// Records.
    pub records: u32,
    /// Latest time of arrival, Unix ms, of this and all earlier blocks of the partition in the file.
    pub max_time: i64,
    /// CRC-32C of the bytes: offset and leader epoch of a batch lie outside its own.
    pub crc: u32,
}

/// A partition in a file: an entry of the partition table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartitionExtent {
    /// Whose.
    pub key: PartitionKey,
    /// First offset.
    pub first_offset: i64,
    /// The offset behind the last.
    pub end_offset: i64,
    /// Records.
    pub records: u64,
    /// Bytes of record batches, which lie in one piece.
    pub bytes: u64,
    /// Latest time of arrival in its first block, Unix ms.
    pub min_time: i64,
    /// Latest time of arrival.
    pub max_time: i64,
    /// Its first block's number in the block index.
    pub first_block: u64,
    /// Its keys are in the file's key index, all of them.
    pub keyed: bool,
}

/// The end of a file: where everything lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Footer {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Where the batches end and the pages begin.
    pub data_end: u64,
    /// Blocks in the index.
    pub blocks: u64,
    /// Pages of the index, its root the last; 0: no blocks.
    pub index_pages: u32,
    /// Pages of the partition table.
    pub table_pages: u32,
    /// Partitions in the table.
    pub partitions: u64,
    /// Records in the file.
    pub records: u64,
    /// Earliest and latest time, Unix ms; 0 and 0 in an empty file.
    pub min_time: i64,
    /// See `min_time`.
    pub max_time: i64,
    /// Bytes of the key index, which lies behind the pages; 0: there is none.
    pub key_bytes: u64,
    /// Keys in it.
    pub keys: u64,
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut out = [0; 4];
    out.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(out)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(out)
}

fn key_at(bytes: &[u8], at: usize) -> PartitionKey {
    PartitionKey {
        topic: u32_at(bytes, at),
        partition: u32_at(bytes, at + 4),
    }
}

fn put_key(out: &mut Vec<u8>, key: PartitionKey) {
    out.extend_from_slice(&key.topic.to_le_bytes());
    out.extend_from_slice(&key.partition.to_le_bytes());
}

impl SstInfo {
    pub(super) fn encode(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        out[0..8].copy_from_slice(&SST_MAGIC);
        out[8..12].copy_from_slice(&SST_VERSION.to_le_bytes());
        out[12..14].copy_from_slice(&self.id.shard.to_le_bytes());
        out[16..32].copy_from_slice(&self.id.store.to_le_bytes());
        out[32..40].copy_from_slice(&self.number.to_le_bytes());
        out[40..48].copy_from_slice(&self.lsn_start.to_le_bytes());
        out[48..56].copy_from_slice(&self.lsn_end.to_le_bytes());
        out[56..64].copy_from_slice(&self.created_ms.to_le_bytes());
        let crc = crc32c::crc32c(&out[..HEADER_CRC_AT]);
        out[HEADER_CRC_AT..HEADER_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<SstInfo, &'static str> {
        let Some(header) = bytes.get(..HEADER) else {
            return Err("shorter than an SST's header");
        };
        if header[0..8] != SST_MAGIC {
            return Err("not a Taffrail SST (magic number)");
        }
        if u32_at(header, HEADER_CRC_AT) != crc32c::crc32c(&header[..HEADER_CRC_AT])
            || header[HEADER_CRC_AT + 4..].iter().any(|&b| b != 0)
            || header[14..16] != [0, 0]
        {
            return Err("the header is damaged");
        }
        if !(SST_VERSION_MIN..=SST_VERSION).contains(&u32_at(header, 8)) {
            return Err("the file's version is not known to this program");
        }
        let mut store = [0; 16];
        store.copy_from_slice(&header[16..32]);
        Ok(SstInfo {
            id: LogId {
                store: u128::from_le_bytes(store),
                shard: u16::from_le_bytes([header[12], header[13]]),
            },
            number: u64_at(header, 32),
            lsn_start: u64_at(header, 40),
            lsn_end: u64_at(header, 48),
            created_ms: u64_at(header, 56) as i64,
        })
    }
}

impl Footer {
    pub(super) fn encode(&self) -> [u8; FOOTER] {
        let mut out = [0; FOOTER];
        for (at, field) in [
            self.file_bytes,
            self.data_end,
            self.blocks,
            u64::from(self.index_pages),
            u64::from(self.table_pages),
            self.partitions,
            self.records,
            self.min_time as u64,
            self.max_time as u64,
            self.key_bytes,
            self.keys,
        ]
        .into_iter()
        .enumerate()
        {
            out[at * 8..at * 8 + 8].copy_from_slice(&field.to_le_bytes());
        }
        let crc = crc32c::crc32c(&out[..FOOTER_CRC_AT]);
        out[FOOTER_CRC_AT..FOOTER_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        out[FOOTER - 8..].copy_from_slice(&SST_END);
        out
    }

    /// Reads the footer at the end of `bytes`, the whole file, and checks that everything it names is inside.
    pub(super) fn decode(bytes: &[u8]) -> Result<Footer, &'static str> {
        if bytes.len() < HEADER + FOOTER {
            return Err("shorter than header and footer");
        }
        let footer = &bytes[bytes.len() - FOOTER..];
        if footer[FOOTER - 8..] != SST_END
            || u32_at(footer, FOOTER_CRC_AT) != crc32c::crc32c(&footer[..FOOTER_CRC_AT])
            || footer[FOOTER_CRC_AT + 4..FOOTER - 8] != [0; 4]
        {
            return Err("the footer is damaged, or the file is cut short");
        }
        let field = |n: usize| u64_at(footer, n * 8);
        let pages = |n: usize| u32::try_from(field(n)).map_err(|_| "impossible number of pages");
        let footer = Footer {
            file_bytes: field(0),
            data_end: field(1),
            blocks: field(2),
            index_pages: pages(3)?,
            table_pages: pages(4)?,
            partitions: field(5),
            records: field(6),
            min_time: field(7) as i64,
            max_time: field(8) as i64,
            key_bytes: field(9),
            keys: field(10),
        };
        let pages = u64::from(footer.index_pages) + u64::from(footer.table_pages);
        let end = footer.data_end.checked_add(pages * PAGE as u64);
        let end = end.and_then(|end| end.checked_add(footer.key_bytes));
        if footer.file_bytes != bytes.len() as u64
            || footer.data_end < HEADER as u64
            || end != Some(footer.file_bytes - FOOTER as u64)
            || !footer.key_bytes.is_multiple_of(PAGE as u64)
            || (footer.key_bytes == 0 && footer.keys > 0)
            || footer.partitions.div_ceil(TABLE_ENTRIES as u64) != u64::from(footer.table_pages)
            || footer.blocks.div_ceil(LEAF_ENTRIES as u64) > u64::from(footer.index_pages)
        {
            return Err("the footer does not fit the file");
        }
        Ok(footer)
    }

    /// Where the key index begins.
    pub fn keys_at(&self) -> u64 {
        let pages = u64::from(self.index_pages) + u64::from(self.table_pages);
        self.data_end + pages * PAGE as u64
    }

    /// Leaf pages of the index.
    pub(super) fn leaves(&self) -> u32 {
        self.blocks.div_ceil(LEAF_ENTRIES as u64) as u32
    }
}

impl Block {
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        put_key(out, self.key);
        out.extend_from_slice(&self.first_offset.to_le_bytes());
        out.extend_from_slice(&self.end_offset.to_le_bytes());
        out.extend_from_slice(&self.position.to_le_bytes());
        out.extend_from_slice(&self.len.to_le_bytes());
        out.extend_from_slice(&self.records.to_le_bytes());
        out.extend_from_slice(&self.max_time.to_le_bytes());
        out.extend_from_slice(&self.crc.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
    }

    pub(super) fn get(entry: &[u8]) -> Block {
        Block {
            key: key_at(entry, 0),
            first_offset: u64_at(entry, 8) as i64,
            end_offset: u64_at(entry, 16) as i64,
            position: u64_at(entry, 24),
            len: u32_at(entry, 32),
            records: u32_at(entry, 36),
            max_time: u64_at(entry, 40) as i64,
            crc: u32_at(entry, 48),
        }
    }
}

/// The place that an entry of a leaf or an inner page begins with.
pub(super) fn place_at(entry: &[u8]) -> (PartitionKey, i64) {
    (key_at(entry, 0), u64_at(entry, 8) as i64)
}

/// An entry of an inner page: the first place below it, and the child's page number in the index.
pub(super) fn put_inner(out: &mut Vec<u8>, place: (PartitionKey, i64), child: u32) {
    put_key(out, place.0);
    out.extend_from_slice(&place.1.to_le_bytes());
    out.extend_from_slice(&child.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
}

pub(super) fn child_of(entry: &[u8]) -> u32 {
    u32_at(entry, 16)
}

impl PartitionExtent {
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        put_key(out, self.key);
        for field in [
            self.first_offset as u64,
            self.end_offset as u64,
            self.records,
            self.bytes,
            self.min_time as u64,
            self.max_time as u64,
            self.first_block | if self.keyed { KEYED } else { 0 },
        ] {
            out.extend_from_slice(&field.to_le_bytes());
        }
    }

    pub(super) fn get(entry: &[u8]) -> PartitionExtent {
        let field = |n: usize| u64_at(entry, 8 + n * 8);
        PartitionExtent {
            key: key_at(entry, 0),
            first_offset: field(0) as i64,
            end_offset: field(1) as i64,
            records: field(2),
            bytes: field(3),
            min_time: field(4) as i64,
            max_time: field(5) as i64,
            first_block: field(6) & !KEYED,
            keyed: field(6) & KEYED != 0,
        }
    }
}

/// A page of `count` entries, their bytes in `entries`.
pub(super) fn page(kind: PageKind, count: usize, entries: &[u8]) -> [u8; PAGE] {
    let mut out = [0; PAGE];
    out[4] = kind as u8;
    out[6..8].copy_from_slice(&(count as u16).to_le_bytes());
    out[PAGE_HEADER..PAGE_HEADER + entries.len()].copy_from_slice(entries);
    let crc = crc32c::crc32c(&out[4..]);
    out[..4].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Compares a page with its CRC. Cost: a CRC of 4 KiB.
pub(super) fn check(page: &[u8]) -> Result<(), &'static str> {
    if u32_at(page, 0) != crc32c::crc32c(&page[4..]) {
        return Err("a page's CRC is wrong");
    }
    Ok(())
}

/// The entries of a page that was checked, `size` bytes each; its kind is compared.
pub(super) fn entries(page: &[u8], kind: PageKind, size: usize) -> Result<&[u8], &'static str> {
    let count = usize::from(u16::from_le_bytes([page[6], page[7]]));
    if page[4] != kind as u8 || count == 0 || count > (PAGE - PAGE_HEADER) / size {
        return Err("a page is of another kind than its place");
    }
    Ok(&page[PAGE_HEADER..PAGE_HEADER + count * size])
}
