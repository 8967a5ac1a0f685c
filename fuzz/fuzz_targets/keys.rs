//! Pages that claim to be a key index, each given a good CRC, which mutations would never find: reads end in an
//! answer or an error, a range ascends; and the index that is made of the input's own pieces holds exactly them.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use taffrail::storage::PartitionKey;
use taffrail::storage::lsm::keys::{KeysReader, KeysWriter, PAGE};

fuzz_target!(|data: &[u8]| {
    let partition = PartitionKey {
        topic: 1,
        partition: 2,
    };
    let mut section = data.to_vec();
    // Short inputs are a page at a time: the rest of each page is zeros.
    section.resize(data.len().next_multiple_of(PAGE), 0);
    for page in section.as_chunks_mut::<PAGE>().0 {
        let crc = crc32c::crc32c(&page[4..]);
        page[..4].copy_from_slice(&crc.to_le_bytes());
    }
    let probe = &data[..data.len().min(20)];
    if let Ok(reader) = KeysReader::new(&section) {
        let _ = reader.get(partition, probe);
        let sound = reader.verify().is_empty();
        if let Ok(mut range) = reader.range(partition, probe) {
            let mut last = None;
            while let Ok(Some(entry)) = range.next() {
                assert!(entry.offset >= 0);
                let key = entry.key.to_vec();
                assert!(!sound || entry.cut || last.as_ref().is_none_or(|last| *last < key));
                last = Some(key);
            }
        }
    }
    let pieces: BTreeMap<&[u8], i64> = data.split(|&b| b == 0).zip(0..).collect();
    let mut writer = KeysWriter::new(Vec::new());
    // Keys that long are in the order of their hashes.
    for (key, offset) in pieces.iter().filter(|(key, _)| key.len() <= 1000) {
        writer.key(partition, key, *offset).expect("in order");
    }
    let (bytes, _) = writer.finish().expect("a Vec takes all");
    let reader = KeysReader::new(&bytes).expect("just made");
    assert!(reader.verify().is_empty());
    for (key, offset) in pieces.iter().filter(|(key, _)| key.len() <= 1000) {
        assert_eq!(reader.get(partition, key).expect("sound"), Some(*offset));
    }
});
