//! A compressed record batch. Half of the inputs get a good CRC. What decompresses is within the limit and is a
//! valid batch of the same offsets and records.
#![no_main]

use libfuzzer_sys::fuzz_target;
use taffrail::storage::lsm::codec::{decompress, plain, verify};
use taffrail::wire::record_batch::{self, HEADER_LEN, Records};

const LIMIT: usize = 1 << 16;

fuzz_target!(|data: &[u8]| {
    let Some((&control, bytes)) = data.split_first() else {
        return;
    };
    let mut batch = bytes.to_vec();
    if control & 1 != 0 && batch.len() >= HEADER_LEN {
        let length = (batch.len() - 12) as i32;
        batch[8..12].copy_from_slice(&length.to_be_bytes());
        batch[16] = 2;
        // One of the five codecs.
        batch[21..23].copy_from_slice(&i16::from((control >> 1) % 5).to_be_bytes());
        let crc = crc32c::crc32c(&batch[21..]);
        batch[17..21].copy_from_slice(&crc.to_be_bytes());
    }
    let mut out = Vec::new();
    if decompress(&batch, LIMIT, &mut out).is_ok() {
        assert!(out.len() <= LIMIT);
        let before = record_batch::parse_header(&batch).expect("it was decompressed");
        let after = record_batch::validate(&out).expect("what decompresses is valid");
        assert_eq!(after.codec(), 0);
        assert_eq!(
            (
                before.base_offset,
                before.last_offset_delta,
                before.records_count
            ),
            (
                after.base_offset,
                after.last_offset_delta,
                after.records_count
            )
        );
        let records = Records::new(&out).expect("validated");
        assert_eq!(
            records.map(|r| r.expect("validated")).count() as i32,
            after.records_count
        );
    }
    let mut scratch = Vec::new();
    let _ = plain(&batch, &mut scratch);
    let _ = verify(&batch, &mut scratch);
});
