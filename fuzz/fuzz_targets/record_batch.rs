//! Bytes that claim to be a record batch. What validates can be walked without an error and counts
//! what its header says; half of the inputs get a good CRC, which mutations would never find.
#![no_main]

use libfuzzer_sys::fuzz_target;
use taffrail::wire::record_batch::{self, HEADER_LEN, Records};

fuzz_target!(|data: &[u8]| {
    let Some((&control, bytes)) = data.split_first() else {
        return;
    };
    let mut batch = bytes.to_vec();
    if control & 1 != 0 && batch.len() >= HEADER_LEN {
        let length = (batch.len() - 12) as i32;
        batch[8..12].copy_from_slice(&length.to_be_bytes());
        batch[16] = 2;
        let crc = crc32c::crc32c(&batch[21..]);
        batch[17..21].copy_from_slice(&crc.to_be_bytes());
    }
    assert!(record_batch::claimed_records(&batch) >= 1);
    let _ = record_batch::parse_header(&batch);
    let _ = record_batch::validate_produced(&batch);
    if let Ok(records) = Records::new(&batch) {
        for record in records.flatten() {
            for header in record.headers() {
                let _ = header;
            }
        }
    }
    let Ok(header) = record_batch::validate(&batch) else {
        return;
    };
    assert_eq!(header.total_len(), batch.len());
    if header.codec() == 0 {
        let mut count = 0;
        let mut next = 0;
        for record in Records::new(&batch).expect("validated") {
            let record = record.expect("validated");
            let delta = record.offset.wrapping_sub(header.base_offset);
            assert!((next..=i64::from(header.last_offset_delta)).contains(&delta));
            next = delta + 1;
            count += 1;
        }
        assert_eq!(count, i64::from(header.records_count));
    }
    record_batch::set_base_offset(&mut batch, 77);
    record_batch::set_leader_epoch(&mut batch, 3);
    let moved = record_batch::validate(&batch).expect("offset and epoch lie outside the CRC");
    assert_eq!(moved.base_offset, 77);
});
