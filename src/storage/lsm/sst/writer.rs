//! Writes an SST: batches in the order of (partition, offset), then the index.
//!
//! Invariant: a file has its name only when it is whole and on disk; until then it has the extension `tmp`, and
//! the next start removes it.
//!
//! Memory: 56 bytes a block and 64 a partition of the file being written, and a buffer of 128 KiB. The key index waits
//! in a file without a name until all batches are written.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::format::{
    Block, Footer, HEADER, INNER_ENTRIES, INNER_ENTRY, LEAF_ENTRIES, LEAF_ENTRY, PAGE, PageKind,
    PartitionExtent, SstInfo, TABLE_ENTRIES, TABLE_ENTRY, page, place_at, put_inner,
};
use super::{SstError, TARGET_BLOCK};
use crate::storage::PartitionKey;
use crate::storage::lsm::keys::collect::scratch;
use crate::storage::lsm::keys::{KeysError, KeysWriter};
use crate::storage::lsm::steps::step;
use crate::storage::wal::segment::sync_dir;
use crate::wire::record_batch;

/// Bytes handed to the kernel at a time, and by it to the disk: the next commit's flush waits for what was written before it,
/// 0.1 ms at 1 GB/s.
const PIECE: usize = 128 << 10;
/// Bytes of keys that are read or written at a time.
const BUFFER: usize = 1 << 20;

/// What a written file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SstMade {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of record batches.
    pub data_bytes: u64,
    /// Records.
    pub records: u64,
    /// Earliest and latest time, Unix ms.
    pub min_time: i64,
    /// See `min_time`.
    pub max_time: i64,
}

/// The block being gathered; its batches are written already.
struct Open {
    block: Block,
    /// Latest time of this block alone.
    time: i64,
}

/// A file being written. Dropped without [`SstWriter::finish`] it removes what it wrote.
pub struct SstWriter {
    path: PathBuf,
    temporary: PathBuf,
    file: Option<File>,
    buffer: Vec<u8>,
    /// Bytes written or in the buffer; and of those, the ones that the kernel was asked to write out.
    len: u64,
    flushed: u64,
    open: Option<Open>,
    /// Entries of leaf pages, and of the partition table.
    blocks: Vec<u8>,
    table: Vec<PartitionExtent>,
    records: u64,
    keys: Option<KeysWriter<BufWriter<File>>>,
}

impl SstWriter {
    /// Begins the file that will be `path`.
    pub fn create(path: &Path, info: SstInfo) -> Result<SstWriter, SstError> {
        let temporary = path.with_extension("tmp");
        let file = step()
            .and_then(|()| File::create(&temporary))
            .map_err(SstError::io("cannot create", &temporary))?;
        let mut buffer = Vec::with_capacity(PIECE + TARGET_BLOCK);
        buffer.extend_from_slice(&info.encode());
        Ok(SstWriter {
            path: path.to_owned(),
            temporary,
            file: Some(file),
            buffer,
            len: HEADER as u64,
            flushed: 0,
            open: None,
            blocks: Vec::new(),
            table: Vec::new(),
            records: 0,
            keys: None,
        })
    }

    /// Appends a record batch of `key` whose messages arrived at `time` (Unix ms) at the latest. Partitions come in
    /// ascending order, batches in the order of offsets; gaps are allowed. Cost: a CRC and a copy; a write
    /// of 128 KiB now and then.
    pub fn batch(&mut self, key: PartitionKey, batch: &[u8], time: i64) -> Result<(), SstError> {
        let wrong = |what| SstError::Order {
            path: self.temporary.clone(),
            key,
            what,
        };
        let header =
            record_batch::parse_whole(batch).map_err(|_| wrong("no whole record batch"))?;
        let records = header.records_count as u32;
        match self.table.last() {
            Some(last) if last.key > key => return Err(wrong("a partition after a later one")),
            Some(last) if last.key == key && last.end_offset > header.base_offset => {
                return Err(wrong("an offset that was written already"));
            }
            _ => {}
        }
        let fits = self.open.as_ref().is_some_and(|open| {
            open.block.key == key && open.block.len as usize + batch.len() <= TARGET_BLOCK
        });
        if !fits {
            self.close_block();
        }
        let open = self.open.get_or_insert(Open {
            block: Block {
                key,
                first_offset: header.base_offset,
                end_offset: header.base_offset,
                position: self.len,
                len: 0,
                records: 0,
                max_time: 0,
                crc: 0,
            },
            time,
        });
        let block = &mut open.block;
        block.end_offset = header.next_offset();
        block.len += batch.len() as u32;
        block.records += records;
        block.crc = crc32c::crc32c_append(block.crc, batch);
        open.time = open.time.max(time);
        let first_block = (self.blocks.len() / LEAF_ENTRY) as u64;
        match self.table.last_mut().filter(|last| last.key == key) {
            Some(extent) => {
                extent.end_offset = header.next_offset();
                extent.records += u64::from(records);
                extent.bytes += batch.len() as u64;
            }
            None => self.table.push(PartitionExtent {
                key,
                first_offset: header.base_offset,
                end_offset: header.next_offset(),
                records: u64::from(records),
                bytes: batch.len() as u64,
                min_time: i64::MAX,
                max_time: i64::MIN,
                first_block,
                keyed: false,
            }),
        }
        self.records += u64::from(records);
        self.put(batch)
    }

    /// Says that the file stands for the offsets from `first` to before `end` of `key`, the last partition written to or
    /// a later one, although compaction may have left less of them, or nothing: then `time` is when they arrived.
    pub fn cover(
        &mut self,
        key: PartitionKey,
        first: i64,
        end: i64,
        time: i64,
    ) -> Result<(), SstError> {
        self.close_block();
        let first_block = (self.blocks.len() / LEAF_ENTRY) as u64;
        match self.table.last_mut() {
            Some(last) if last.key == key => {
                last.first_offset = last.first_offset.min(first);
                last.end_offset = last.end_offset.max(end);
            }
            Some(last) if last.key > key => {
                return Err(SstError::Order {
                    path: self.temporary.clone(),
                    key,
                    what: "a partition after a later one",
                });
            }
            _ => self.table.push(PartitionExtent {
                key,
                first_offset: first,
                end_offset: end,
                records: 0,
                bytes: 0,
                min_time: time,
                max_time: time,
                first_block,
                keyed: false,
            }),
        }
        Ok(())
    }

    /// Says that the keys of the partition written to last follow ([`SstWriter::key`]), all of them.
    pub fn keyed(&mut self) -> Result<(), SstError> {
        let Some(extent) = self.table.last_mut() else {
            return Ok(());
        };
        extent.keyed = true;
        if self.keys.is_none() {
            let path = &scratch_path(&self.path);
            let new = || scratch(path).map_err(SstError::io("cannot make", path));
            let out = BufWriter::with_capacity(BUFFER, new()?);
            self.keys = Some(KeysWriter::with_scratch(out, new()?));
        }
        Ok(())
    }

    /// Adds a key of the partition for which [`SstWriter::keyed`] was called last, as it is kept
    /// ([`crate::storage::lsm::keys::kept`]), with its newest offset. Keys ascend.
    pub fn key(&mut self, kept: &[u8], offset: i64) -> Result<(), SstError> {
        let (Some(keys), Some(extent)) = (&mut self.keys, self.table.last()) else {
            return Ok(());
        };
        let added = keys.kept(extent.key, kept, offset);
        added.map_err(|error| keys_error(&self.temporary, extent.key, error))
    }

    /// Bytes of the file so far.
    pub fn bytes(&self) -> u64 {
        self.len + self.keys.as_ref().map_or(0, KeysWriter::bytes)
    }

    /// The partition written to last.
    pub fn partition(&self) -> Option<PartitionKey> {
        self.table.last().map(|extent| extent.key)
    }

    fn close_block(&mut self) {
        let Some(mut open) = self.open.take() else {
            return;
        };
        if let Some(extent) = self.table.last_mut() {
            if extent.max_time == i64::MIN {
                extent.min_time = open.time;
            }
            extent.max_time = extent.max_time.max(open.time);
            open.block.max_time = extent.max_time;
        }
        open.block.put(&mut self.blocks);
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), SstError> {
        self.buffer.extend_from_slice(bytes);
        self.len += bytes.len() as u64;
        if self.buffer.len() >= PIECE {
            self.write_out()?;
        }
        Ok(())
    }

    fn write_out(&mut self) -> Result<(), SstError> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        step()
            .and_then(|()| file.write_all(&self.buffer))
            .map_err(SstError::io("cannot write", &self.temporary))?;
        let from = self.flushed;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        // Written out steadily, the sync at the end is no burst that commits would wait behind.
        // SAFETY: the descriptor is open; the call touches no memory of the process.
        unsafe {
            libc::sync_file_range(
                file.as_raw_fd(),
                from as i64,
                (self.flushed - from) as i64,
                libc::SYNC_FILE_RANGE_WRITE,
            )
        };
        Ok(())
    }

    /// Copies the key index to where the file ends now; gives its bytes and keys.
    fn put_keys(&mut self) -> Result<(u64, u64), SstError> {
        let Some(keys) = self.keys.take() else {
            return Ok((0, 0));
        };
        let path = self.temporary.clone();
        let none = PartitionKey {
            topic: 0,
            partition: 0,
        };
        let (out, made) = keys
            .finish()
            .map_err(|error| keys_error(&path, none, error))?;
        let wrong = SstError::io("cannot write the key index of", &path);
        let file = match out.into_inner() {
            Ok(file) => file,
            Err(error) => return Err(wrong(error.into_error())),
        };
        let mut piece = vec![0; BUFFER.min(made.bytes as usize)];
        let mut at = 0;
        while at < made.bytes {
            let len = piece.len().min((made.bytes - at) as usize);
            if let Err(error) = file.read_exact_at(&mut piece[..len], at) {
                return Err(wrong(error));
            }
            self.put(&piece[..len])?;
            at += len as u64;
        }
        Ok((made.bytes, made.keys))
    }

    /// Writes the index and makes the file durable under its name.
    pub fn finish(mut self) -> Result<SstMade, SstError> {
        self.close_block();
        let data_end = self.len;
        let blocks = std::mem::take(&mut self.blocks);
        let count = (blocks.len() / LEAF_ENTRY) as u64;
        // The level that the next one points to: the first place of each of its pages.
        let mut level = Vec::new();
        let mut index_pages = 0u32;
        for leaf in blocks.chunks(LEAF_ENTRIES * LEAF_ENTRY) {
            level.push((place_at(leaf), index_pages));
            index_pages += 1;
            self.put(&page(PageKind::Leaf, leaf.len() / LEAF_ENTRY, leaf))?;
        }
        while level.len() > 1 {
            let mut above = Vec::new();
            for children in level.chunks(INNER_ENTRIES) {
                let mut entries = Vec::with_capacity(children.len() * INNER_ENTRY);
                for &(place, child) in children {
                    put_inner(&mut entries, place, child);
                }
                above.push((children[0].0, index_pages));
                index_pages += 1;
                self.put(&page(PageKind::Inner, children.len(), &entries))?;
            }
            level = above;
        }
        let table = std::mem::take(&mut self.table);
        for extents in table.chunks(TABLE_ENTRIES) {
            let mut entries = Vec::with_capacity(extents.len() * TABLE_ENTRY);
            extents.iter().for_each(|extent| extent.put(&mut entries));
            self.put(&page(PageKind::Table, extents.len(), &entries))?;
        }
        let table_pages = table.len().div_ceil(TABLE_ENTRIES) as u32;
        let (key_bytes, keys) = self.put_keys()?;
        let footer = Footer {
            file_bytes: data_end
                + (u64::from(index_pages) + u64::from(table_pages)) * PAGE as u64
                + key_bytes
                + super::format::FOOTER as u64,
            data_end,
            blocks: count,
            index_pages,
            table_pages,
            partitions: table.len() as u64,
            records: self.records,
            min_time: table
                .iter()
                .map(|extent| extent.min_time)
                .min()
                .unwrap_or(0),
            max_time: table
                .iter()
                .map(|extent| extent.max_time)
                .max()
                .unwrap_or(0),
            key_bytes,
            keys,
        };
        self.put(&footer.encode())?;
        self.write_out()?;
        let Some(file) = self.file.take() else {
            unreachable!("taken here only");
        };
        let named = (|| -> io::Result<()> {
            step()?;
            file.sync_all()?;
            step()?;
            fs::rename(&self.temporary, &self.path)?;
            step()?;
            sync_dir(self.path.parent().unwrap_or(Path::new(".")))
        })();
        if named.is_err() && step().is_ok() {
            let _ = fs::remove_file(&self.temporary);
        }
        named.map_err(SstError::io("cannot finish", &self.path))?;
        Ok(SstMade {
            file_bytes: footer.file_bytes,
            data_bytes: data_end - HEADER as u64,
            records: footer.records,
            min_time: footer.min_time,
            max_time: footer.max_time,
        })
    }
}

/// A name for what is kept aside while the file at `path` is written.
pub(in crate::storage::lsm) fn scratch_path(path: &Path) -> PathBuf {
    path.with_extension("keys.tmp")
}

fn keys_error(path: &Path, key: PartitionKey, error: KeysError) -> SstError {
    match error {
        KeysError::Io(source) => SstError::io("cannot write the key index of", path)(source),
        KeysError::Order { key, what } => SstError::Order {
            path: path.to_owned(),
            key,
            what,
        },
        KeysError::Damaged { what, .. } => SstError::Order {
            path: path.to_owned(),
            key,
            what,
        },
    }
}

impl Drop for SstWriter {
    fn drop(&mut self) {
        if self.file.take().is_some() && step().is_ok() {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}
