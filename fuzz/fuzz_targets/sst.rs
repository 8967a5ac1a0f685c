//! SSTs, every CRC in them made right, which mutations would never find: reads end in an answer or an error and
//! stay inside the file, and a file in which `verify` finds nothing gives every block that its partitions name.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use taffrail::storage::PartitionKey;
use taffrail::storage::lsm::sst::SstReader;
use taffrail::storage::lsm::sst::format::{FOOTER, HEADER, PAGE, PAGE_HEADER};

fn crc(bytes: &mut [u8], at: usize, of: std::ops::Range<usize>) {
    let crc = crc32c::crc32c(&bytes[of]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

fn u64_at(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap_or(usize::MAX)
}

/// Gives blocks, pages, header and footer the CRCs that they would have.
fn make_right(bytes: &mut [u8]) {
    if bytes.len() < HEADER + FOOTER {
        return;
    }
    crc(bytes, 64, 0..64);
    let footer = bytes.len() - FOOTER;
    let data_end = u64_at(bytes, footer + 8).min(footer);
    for page in (data_end..footer).step_by(PAGE) {
        if page + PAGE > footer {
            break;
        }
        if bytes[page + 4] == 1 {
            // A leaf: byte in the file, length and CRC of each block.
            for entry in (page + PAGE_HEADER..page + PAGE - 56).step_by(56) {
                let (at, len) = (
                    u64_at(bytes, entry + 24),
                    u64_at(bytes, entry + 32) & 0xffff_ffff,
                );
                if let Some(end) = at.checked_add(len).filter(|&end| end <= data_end) {
                    crc(bytes, entry + 48, at..end);
                }
            }
        }
        crc(bytes, page, page + 4..page + PAGE);
    }
    crc(bytes, footer + 112, footer..footer + 112);
}

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    make_right(&mut bytes);
    let Ok(reader) = SstReader::from_bytes(bytes, Path::new("fuzz.sst")) else {
        return;
    };
    let mut read = 0;
    let report = reader.verify(|bytes| read += bytes);
    let sound = report.findings.is_empty();
    let asked = PartitionKey {
        topic: u32::from(data[0]),
        partition: u32::from(data[1]),
    };
    let _ = reader.locate(asked, i64::from(data[2]));
    let extents = reader.extents();
    assert!(!sound || extents.is_ok());
    if let Ok(Some(keys)) = reader.keys() {
        let wanted = &data[..data.len().min(9)];
        let _ = keys.get(asked, wanted);
        if let Ok(mut range) = keys.range(asked, wanted) {
            let mut entries = 0;
            loop {
                match range.next() {
                    Ok(Some(entry)) => assert!(entry.offset >= 0),
                    Ok(None) => break,
                    Err(_) => {
                        assert!(!sound);
                        break;
                    }
                }
                entries += 1;
            }
            assert!(!sound || entries <= report.keys);
        }
    }
    let mut records = 0;
    for extent in extents.unwrap_or_default().iter().take(64) {
        let _ = reader.locate(extent.key, extent.first_offset);
        let _ = reader.locate_time(extent.key, extent.max_time);
        for number in 0..4 {
            let Some(number) = extent.first_block.checked_add(number) else {
                break;
            };
            match reader.block_at(number) {
                Ok(block) => {
                    let bytes = reader.block(&block);
                    reader.will_need(&block, 0, 1 << 20);
                    assert!(!sound || bytes.is_ok_and(|b| b.len() == block.len as usize));
                }
                Err(_) => assert!(!sound || number >= reader.footer().blocks),
            }
        }
        if let Ok(blocks) = reader.blocks(extent.key, 0) {
            let _ = blocks
                .take(64)
                .filter_map(Result::ok)
                .map(|b| reader.block(&b).map(<[u8]>::len))
                .count();
        }
        records += extent.records;
    }
    assert!(!sound || report.extents.len() > 64 || records == report.records);
});
