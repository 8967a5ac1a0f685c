//! Reads a long stretch of an SST in order, at the rate of the disk.
//!
//! What is in the page cache is taken from there; what is not is read around it, with O_DIRECT, in large requests of
//! which several are in flight: faults in the mapping, even where the kernel was asked ahead, cost a third of the disk's
//! rate (order-0 pages, and their reclaim), and what a scan reads once would push out what others read again and again.
//!
//! Short stretches, and those of file systems without O_DIRECT, are read from the mapping, the kernel being asked ahead.
//!
//! Invariant: a block is handed out after its checksum was compared, wherever it came from.
//!
//! Memory: 4 MiB (`SLOTS` × `CHUNK`) while a scan lives that has read around the cache.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use io_uring::{IoUring, opcode, types};

use super::format::Block;
use super::reader::{SstReader, check_block};
use super::{SstError, format};
use crate::storage::wal::aligned::AlignedBuf;

/// Bytes of a request: the largest that common disks take in one piece.
const CHUNK: usize = 512 << 10;
/// Requests in flight.
const SLOTS: usize = 8;
/// A stretch below this is not worth the setting up (about half a millisecond).
const WORTH: u64 = 8 << 20;
/// From a mapping: so many bytes are asked for at a time, the next ones when half of them are left.
pub(in crate::storage::lsm) const AHEAD: u64 = 16 << 20;
/// Pages of a chunk.
const PAGES: usize = CHUNK / format::PAGE;
/// A chunk is taken from the page cache where at least so many of its pages are there.
const RESIDENT: usize = PAGES * 3 / 4;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// The page cache has it, or the disk refused: then the mapping says so in the way it always does.
    Mapped,
    Flying,
    /// So many bytes were read.
    Read(usize),
}

/// Requests on their way into the buffer. Dropped, it waits for them.
struct Direct {
    ring: IoUring,
    file: File,
    buffer: AlignedBuf,
    slots: [Slot; SLOTS],
}

impl Direct {
    fn open(path: &Path) -> io::Result<Direct> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)?;
        Ok(Direct {
            ring: IoUring::new(SLOTS as u32)?,
            file,
            buffer: AlignedBuf::zeroed(SLOTS * CHUNK),
            slots: [Slot::Mapped; SLOTS],
        })
    }

    /// Begins to read chunk `number` into its slot.
    fn submit(&mut self, number: u64) {
        let slot = slot_of(number);
        self.wait(slot);
        let at = self.buffer[slot * CHUNK..].as_mut_ptr();
        let read = opcode::Read::new(types::Fd(self.file.as_raw_fd()), at, CHUNK as u32)
            .offset(number * CHUNK as u64)
            .build()
            .user_data(slot as u64);
        // SAFETY: the descriptor and the buffer live until the request is done: `drop` waits for it; the slot's part
        // of the buffer is not looked at while it is `Flying`.
        let pushed = unsafe { self.ring.submission().push(&read) };
        self.slots[slot] = match pushed {
            Ok(()) => Slot::Flying,
            Err(_) => Slot::Mapped,
        };
    }

    /// Waits until nothing is on its way into the slot.
    fn wait(&mut self, slot: usize) {
        while self.slots[slot] == Slot::Flying {
            let waited = self.ring.submit_and_wait(1);
            for done in self.ring.completion() {
                self.slots[done.user_data() as usize % SLOTS] = match done.result() {
                    len @ 0.. => Slot::Read(len as usize),
                    _ => Slot::Mapped,
                };
            }
            match waited {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Out of memory for a moment: what is in flight still comes to an end, and the buffer must wait for it.
                Err(_) => std::thread::yield_now(),
            }
        }
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        (0..SLOTS).for_each(|slot| self.wait(slot));
    }
}

fn slot_of(chunk: u64) -> usize {
    (chunk % SLOTS as u64) as usize
}

/// Where byte `position` of the file lies in the buffer.
fn place(position: u64) -> usize {
    (position % (SLOTS * CHUNK) as u64) as usize
}

/// A walk over bytes `from` to `end` of a file.
pub struct Scan<'a> {
    reader: &'a SstReader,
    end: u64,
    /// Whether to read around the page cache; and with what, from the first chunk on that is not in it.
    around: bool,
    direct: Option<Direct>,
    /// Chunks that were asked for end before this one; or, from the mapping, bytes before this one.
    next: u64,
    asked: u64,
    /// A block that does not lie in one piece in the buffer.
    scratch: Vec<u8>,
}

impl<'a> Scan<'a> {
    /// Of the blocks that lie in bytes `from` to `end` of the file, in their order.
    pub(super) fn new(reader: &'a SstReader, from: u64, end: u64) -> Scan<'a> {
        let end = end.min(reader.footer().data_end);
        Scan {
            around: reader.is_mapped() && end.saturating_sub(from) >= WORTH,
            reader,
            end,
            direct: None,
            next: from / CHUNK as u64,
            asked: 0,
            scratch: Vec::new(),
        }
    }

    /// The batches of a block, checked against its CRC. Blocks come in the order of the file. Cost: as the disk's, some
    /// 0.06 ns a byte for the checksum.
    pub fn block(&mut self, block: &Block) -> Result<&[u8], SstError> {
        let end = block.position.saturating_add(u64::from(block.len));
        if !self.around {
            if block.position + AHEAD / 2 > self.asked {
                let ahead = self.end.saturating_sub(block.position).min(AHEAD);
                self.asked = self.reader.will_need(block, self.asked, ahead);
            }
            return self.reader.block(block);
        }
        let first = block.position / CHUNK as u64;
        let behind = end.div_ceil(CHUNK as u64);
        // Behind the stretch, or larger than the buffer: then the mapping has it, or finds it damaged.
        if end > self.end || behind - first > SLOTS as u64 {
            return self.reader.block(block);
        }
        self.next = self.next.max(first);
        let last = self.end.div_ceil(CHUNK as u64).min(first + SLOTS as u64);
        while self.next < last && self.around {
            self.ask(self.next);
            self.next += 1;
        }
        let Some(direct) = &mut self.direct else {
            return self.reader.block(block);
        };
        let (mut at, mut left) = (place(block.position), block.len as usize);
        for chunk in first..behind {
            let slot = slot_of(chunk);
            direct.wait(slot);
            let here = left.min(CHUNK - at % CHUNK);
            match direct.slots[slot] {
                Slot::Read(len) if at % CHUNK + here <= len => {}
                _ => return self.reader.block(block),
            }
            (at, left) = (0, left - here);
        }
        let (at, len) = (place(block.position), block.len as usize);
        let bytes = match direct.buffer.get(at..at + len) {
            Some(bytes) => bytes,
            // Around the end of the buffer.
            None => {
                let (head, rest) = (&direct.buffer[at..], at + len - direct.buffer.len());
                self.scratch.clear();
                self.scratch.extend_from_slice(head);
                self.scratch.extend_from_slice(&direct.buffer[..rest]);
                &self.scratch
            }
        };
        check_block(bytes, block, self.reader.path())?;
        Ok(bytes)
    }

    /// Begins to read a chunk, where the page cache does not have it.
    fn ask(&mut self, chunk: u64) {
        let position = chunk * CHUNK as u64;
        let cached = self.reader.resident(position, CHUNK) >= RESIDENT;
        if !cached && self.direct.is_none() {
            match Direct::open(self.reader.path()) {
                Ok(direct) => self.direct = Some(direct),
                // No O_DIRECT, or no io_uring.
                Err(_) => self.around = false,
            }
        }
        match &mut self.direct {
            Some(direct) if !cached => direct.submit(chunk),
            direct => {
                // What little the page cache lacks.
                self.reader.ask(position, CHUNK as u64);
                if let Some(direct) = direct {
                    direct.wait(slot_of(chunk));
                    direct.slots[slot_of(chunk)] = Slot::Mapped;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::super::{SstInfo, SstWriter};
    use super::*;
    use crate::storage::PartitionKey;
    use crate::storage::wal::LogId;
    use crate::wire::record_batch::BatchWriter;

    const ID: LogId = LogId { store: 1, shard: 0 };
    const KEY: PartitionKey = PartitionKey {
        topic: 3,
        partition: 0,
    };

    /// Blocks of all sizes: smaller than a page, across chunks, across the buffer's end, larger than the buffer.
    fn file(dir: &Path) -> std::path::PathBuf {
        let path = dir.join("a.sst");
        let info = SstInfo {
            id: ID,
            number: 1,
            lsn_start: 0,
            lsn_end: 4096,
            created_ms: 0,
        };
        let mut writer = SstWriter::create(&path, info).unwrap();
        let sizes = [100, 3000, 70_000, 700_000, 9000];
        for n in 0..100 {
            let size = match n {
                60 => SLOTS * CHUNK + 1,
                n => sizes[n % sizes.len()],
            };
            let mut bytes = vec![0; size + 200];
            let mut batch = BatchWriter::new(&mut bytes, 1000);
            batch.push(1000, None, Some(&vec![n as u8; size])).unwrap();
            let len = batch.finish(n as i64);
            writer.batch(KEY, &bytes[..len], 1000).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    fn forget(path: &Path) {
        super::super::super::flush::advise_unneeded(&File::open(path).unwrap());
    }

    fn blocks(reader: &SstReader) -> Vec<Block> {
        let blocks = reader.blocks(KEY, 0).unwrap();
        blocks.collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn a_scan_gives_what_the_mapping_gives() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path());
        let reader = SstReader::open(&path, ID).unwrap();
        let blocks = blocks(&reader);
        let end = reader.footer().data_end;
        assert!(end > 2 * WORTH);
        for from in [0, 7, 41] {
            for cached in [0, blocks.len() / 3, blocks.len()] {
                forget(&path);
                blocks[..cached].iter().for_each(|block| {
                    reader.block(block).unwrap();
                });
                let mut scan = reader.scan(blocks[from].position, end);
                for block in &blocks[from..] {
                    let found = scan.block(block).unwrap().to_vec();
                    assert!(found == reader.block(block).unwrap());
                }
                // The mapping's reads above brought it into the page cache, if anything did.
                assert!(cached < blocks.len() || scan.direct.is_none());
            }
        }
    }

    #[test]
    fn a_scan_finds_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path());
        let damaged = {
            let blocks = blocks(&SstReader::open(&path, ID).unwrap());
            blocks[blocks.len() / 2]
        };
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"\xee", damaged.position + 80).unwrap();
        file.sync_all().unwrap();
        forget(&path);
        let reader = SstReader::open(&path, ID).unwrap();
        let mut scan = reader.scan(0, u64::MAX);
        for block in blocks(&reader) {
            let found = scan.block(&block).map(<[u8]>::len);
            if block.position == damaged.position {
                assert!(matches!(found, Err(SstError::Block { .. })), "{found:?}");
            } else {
                assert_eq!(found.unwrap(), block.len as usize);
            }
        }
    }
}
