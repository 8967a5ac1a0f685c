//! Manifests, the CRCs of header and records made right: refused with a byte inside the file, or a state in the order
//! of the log, whose next number is free; and what is read of a part is a state that the whole came through.
#![no_main]

use libfuzzer_sys::fuzz_target;
use taffrail::storage::lsm::manifest::{Record, State, parse, read_header, records};
use taffrail::storage::wal::LogId;

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    if bytes.len() >= 64 {
        let crc = crc32c::crc32c(&bytes[..40]);
        bytes[40..44].copy_from_slice(&crc.to_le_bytes());
        let mut at = 64;
        while let Some(header) = bytes.get(at..at + 8) {
            let len = u32::from_le_bytes(header[..4].try_into().unwrap()) as usize;
            let Some(end) = at
                .checked_add(8 + len)
                .filter(|&end| end <= bytes.len() && len > 0)
            else {
                break;
            };
            let crc =
                crc32c::crc32c_append(crc32c::crc32c(&bytes[at..at + 4]), &bytes[at + 8..end]);
            bytes[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
            at = end;
        }
    }
    let mut states = vec![State::default()];
    let mut behind = 64;
    let read = records(&bytes, &mut |position, len, record| {
        assert_eq!(position, behind, "records follow each other");
        behind = position + len;
        let mut state = states.last().cloned().unwrap_or_default();
        match record {
            Record::Snapshot(snapshot) => state = snapshot.clone(),
            Record::Edit(edit) => state.apply(edit),
        }
        states.push(state);
    });
    assert!(behind <= bytes.len().max(64) as u64);
    let Ok((id, number)) = read_header(&bytes) else {
        assert!(parse(&bytes, LogId { store: 0, shard: 0 }, 0).is_err());
        return;
    };
    match parse(&bytes, id, number) {
        Ok((state, len, snapshot_len, count)) => {
            assert_eq!(read, Ok(len));
            assert_eq!(len, behind);
            assert!(snapshot_len <= len && len <= bytes.len() as u64);
            assert_eq!(count as usize, states.len() - 1);
            assert_eq!(Some(&state), states.last());
            assert!(state.files.is_sorted_by_key(|f| (f.lsn_start, f.number)));
            assert!(state.files.iter().all(|f| f.number < state.next_number));
        }
        Err((position, _)) => {
            assert_eq!(read, Err((position, read.unwrap_err().1)));
            assert!(position <= bytes.len() as u64);
        }
    }
});
