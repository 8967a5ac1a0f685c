//! Checks an SST as a whole: every page, block and batch, their order, that all sums agree, and that the key index has
//! every key with its newest offset, and nothing else.

use std::collections::HashSet;

use crate::storage::PartitionKey;
use crate::storage::lsm::codec;
use crate::storage::lsm::keys::range::each_key;
use crate::storage::lsm::keys::{KeysError, KeysReader};
use crate::wire::record_batch;

use super::format::{Block, HEADER, INNER_ENTRY, PageKind, PartitionExtent, child_of, place_at};
use super::{Scan, SstError, SstReader};

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SstFinding {
    /// Byte in the file.
    pub position: u64,
    /// The messages concerned: partition, first offset, and the one behind the last; `None`: not known.
    pub messages: Option<(PartitionKey, i64, i64)>,
    /// What was found.
    pub what: String,
}

/// What was checked and found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SstReport {
    /// Blocks of the index.
    pub blocks: u64,
    /// Record batches that are whole.
    pub batches: u64,
    /// Records in them.
    pub records: u64,
    /// Partitions in the table.
    pub extents: Vec<PartitionExtent>,
    /// Keys in the key index.
    pub keys: u64,
    /// In the order of the file.
    pub findings: Vec<SstFinding>,
}

impl SstReader {
    /// Checks everything; `progress` gets the bytes of each block. Cost: reads the file once, decompresses all; where keys
    /// are indexed, a search for each record.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> SstReport {
        let mut report = SstReport::default();
        let mut sums: Vec<PartitionExtent> = Vec::new();
        let mut position = HEADER as u64;
        let mut scratch = Vec::new();
        let mut scan = self.scan(position, self.footer().data_end);
        let mut number = 0;
        let mut keys = self.keys_to_verify();
        while number < self.footer().blocks {
            let block = match self.block_at(number) {
                Ok(block) => block,
                Err(error) => {
                    report.add(&error, None);
                    // The rest of the page is as unreadable.
                    number += super::format::LEAF_ENTRIES as u64
                        - number % super::format::LEAF_ENTRIES as u64;
                    continue;
                }
            };
            report.blocks += 1;
            self.check_block(
                &mut scan,
                &block,
                number,
                &mut position,
                &mut sums,
                &mut scratch,
                &mut keys,
                &mut report,
            );
            progress(u64::from(block.len));
            number += 1;
        }
        if position != self.footer().data_end && report.findings.is_empty() {
            report.find(position, None, "bytes that no block names");
        }
        for number in self.footer().leaves()..self.footer().index_pages {
            if let Err(error) = self.check_inner(number) {
                report.add(&error, None);
            }
        }
        match self.extents() {
            Ok(extents) => {
                if report.findings.is_empty() && !fits(&extents, &sums) {
                    let at = self.footer().data_end;
                    report.find(
                        at,
                        None,
                        "the partition table does not say what the blocks hold",
                    );
                }
                report.extents = extents;
            }
            Err(error) => report.add(&error, None),
        }
        if report.findings.is_empty() && report.records != self.footer().records {
            let at = self.footer().file_bytes;
            report.find(at, None, "the footer counts other records than there are");
        }
        self.verify_keys(keys, &mut report);
        report
    }

    /// The key index, where it can be read, and whose keys it has.
    fn keys_to_verify(&self) -> Option<Keys<'_>> {
        let section = self.keys().ok()??;
        let partitions = self.extents().ok()?;
        let keyed = partitions.iter().filter(|extent| extent.keyed);
        Some(Keys {
            section,
            keyed: keyed.map(|extent| extent.key).collect(),
            newest: 0,
        })
    }

    /// What is wrong in the key index itself, and in what it says of the records.
    fn verify_keys(&self, keys: Option<Keys>, report: &mut SstReport) {
        let at = self.footer().keys_at();
        let sound = report.findings.is_empty();
        match self.keys() {
            Ok(None) => {
                if report.extents.iter().any(|extent| extent.keyed) {
                    report.find(
                        at,
                        None,
                        "keys are to be indexed, and there is no key index",
                    );
                }
            }
            Ok(Some(section)) => {
                report.keys = section.len();
                let findings = section.verify();
                for error in &findings {
                    let (position, what) = match error {
                        KeysError::Damaged { position, what } => (*position, *what),
                        _ => (0, "it cannot be read"),
                    };
                    report.find(at + position, None, &format!("key index: {what}"));
                }
                let known = keys.is_none_or(|keys| keys.newest == section.len());
                if sound && findings.is_empty() && !known {
                    let what = "key index: it has keys that no record has, or at other offsets";
                    report.find(at, None, what);
                }
            }
            Err(error) => report.add(&error, None),
        }
    }

    #[allow(clippy::too_many_arguments)] // what the walk has come to, each a different thing
    fn check_block(
        &self,
        scan: &mut Scan<'_>,
        block: &Block,
        number: u64,
        position: &mut u64,
        sums: &mut Vec<PartitionExtent>,
        scratch: &mut Vec<u8>,
        keys: &mut Option<Keys>,
        report: &mut SstReport,
    ) {
        let messages = Some((block.key, block.first_offset, block.end_offset));
        if block.position != *position {
            report.find(
                block.position,
                messages,
                "a block does not follow the one before it",
            );
        }
        *position = block.position.saturating_add(u64::from(block.len));
        let bytes = match scan.block(block) {
            Ok(bytes) => bytes,
            Err(error) => return report.add(&error, messages),
        };
        let (mut at, mut next, mut records) = (0, block.first_offset, 0u64);
        while at < bytes.len() {
            let batch = match record_batch::parse_header(&bytes[at..]) {
                Ok(header) if header.total_len() <= bytes.len() - at => {
                    &bytes[at..at + header.total_len()]
                }
                _ => {
                    let what = "bytes that are no record batch";
                    return report.find(block.position + at as u64, messages, what);
                }
            };
            match codec::verify(batch, scratch) {
                Ok(header) if header.base_offset >= next => {
                    next = header.next_offset();
                    records += header.records_count as u64;
                    report.batches += 1;
                    if let Some(keys) = keys
                        && !keys.know(block.key, batch, scratch)
                    {
                        let what = "the key index does not have a record's key, or an older offset";
                        report.find(block.position + at as u64, messages, what);
                    }
                }
                Ok(header) => {
                    let what = format!(
                        "offset {} where {next} or more comes next",
                        header.base_offset
                    );
                    report.find(block.position + at as u64, messages, &what);
                }
                Err(error) => report.find(block.position + at as u64, messages, &error.to_string()),
            }
            at += batch.len();
        }
        report.records += records;
        if next != block.end_offset || records != u64::from(block.records) {
            report.find(
                block.position,
                messages,
                "the index entry does not say what the block holds",
            );
        }
        match sums.last_mut() {
            Some(sum) if sum.key == block.key => {
                if sum.end_offset > block.first_offset || sum.max_time > block.max_time {
                    report.find(block.position, messages, "a block is out of order");
                }
                // A block's own latest time is known only where it is the latest so far.
                sum.max_time = block.max_time;
                sum.end_offset = block.end_offset;
                sum.records += records;
                sum.bytes += u64::from(block.len);
            }
            last => {
                if last.is_some_and(|last| last.key > block.key) {
                    report.find(block.position, messages, "a partition is out of order");
                }
                sums.push(PartitionExtent {
                    key: block.key,
                    first_offset: block.first_offset,
                    end_offset: block.end_offset,
                    records,
                    bytes: u64::from(block.len),
                    min_time: block.max_time,
                    max_time: block.max_time,
                    first_block: number,
                    keyed: false,
                });
            }
        }
    }

    /// An inner page's entries ascend and point downwards.
    fn check_inner(&self, number: u32) -> Result<(), SstError> {
        let page = self.page(number, PageKind::Inner, INNER_ENTRY)?;
        let mut before = None;
        for entry in page.chunks_exact(INNER_ENTRY) {
            let place = place_at(entry);
            if child_of(entry) >= number || before.is_some_and(|before| before >= place) {
                return Err(SstError::Damaged {
                    path: self.path().to_owned(),
                    position: self.footer().data_end
                        + u64::from(number) * super::format::PAGE as u64,
                    what: "an index page is out of order",
                });
            }
            before = Some(place);
        }
        Ok(())
    }
}

/// The key index while records are compared with it.
struct Keys<'a> {
    section: KeysReader<'a>,
    keyed: HashSet<PartitionKey>,
    /// Records that it names.
    newest: u64,
}

impl Keys<'_> {
    /// Whether it has all keys of a batch, at their offsets or later ones. What cannot be read of it is found elsewhere.
    fn know(&mut self, key: PartitionKey, batch: &[u8], scratch: &mut Vec<u8>) -> bool {
        let mut all = true;
        if self.keyed.contains(&key) {
            each_key(batch, scratch, |wanted, offset| {
                match self.section.get(key, wanted) {
                    Ok(Some(newest)) if newest >= offset => {
                        self.newest += u64::from(newest == offset);
                    }
                    Ok(_) => all = false,
                    Err(_) => {}
                }
            });
        }
        all
    }
}

/// Whether the partition table says what the blocks hold. It may stand for more offsets than there are: compaction drops
/// records, also the first or the last of a partition, or all.
fn fits(table: &[PartitionExtent], sums: &[PartitionExtent]) -> bool {
    let mut sums = sums.iter().peekable();
    let whole = table.iter().is_sorted_by(|a, b| a.key < b.key)
        && table.iter().all(|extent| {
            let Some(sum) = sums.next_if(|sum| sum.key == extent.key) else {
                return extent.records == 0
                    && extent.bytes == 0
                    && extent.first_offset < extent.end_offset;
            };
            let widened = PartitionExtent {
                first_offset: extent.first_offset,
                end_offset: extent.end_offset,
                keyed: extent.keyed,
                ..*sum
            };
            *extent == widened
                && extent.first_offset <= sum.first_offset
                && extent.end_offset >= sum.end_offset
        });
    whole && sums.next().is_none()
}

impl SstReport {
    fn find(&mut self, position: u64, messages: Option<(PartitionKey, i64, i64)>, what: &str) {
        self.findings.push(SstFinding {
            position,
            messages,
            what: what.to_owned(),
        });
    }

    fn add(&mut self, error: &SstError, messages: Option<(PartitionKey, i64, i64)>) {
        match error {
            SstError::Damaged { position, what, .. } => self.find(*position, messages, what),
            SstError::Block { block, what, .. } => self.find(block.position, messages, what),
            other => self.find(0, messages, &other.to_string()),
        }
    }
}
