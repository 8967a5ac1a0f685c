//! A UDP payload that came to the server: decode, and what is understood encodes to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use taffrail::net::{ServedTopic, TopicTable};
use taffrail::wire::datagram::{PRODUCE_HEADER_LEN, Request};
use taffrail::wire::record_batch;

fuzz_target!(|data: &[u8]| {
    match Request::decode(data) {
        Ok(Request::Hello(hello)) => {
            let mut out = [0; 512];
            let len = hello.encode(&mut out);
            assert_eq!(&out[..len], data);
            let table = TopicTable::new(
                vec![ServedTopic {
                    name: "a".into(),
                    id: 1,
                    partitions: 1,
                }],
                -1,
                32,
                1472,
            );
            assert!(table.answer(&hello, &mut out).is_some());
        }
        Ok(Request::Produce(header, batch)) => {
            let mut out = [0; PRODUCE_HEADER_LEN];
            header.encode(&mut out);
            // Bytes 17 to 23 are ignored.
            assert_eq!(out[..17], data[..17]);
            assert_eq!(out[24..], data[24..PRODUCE_HEADER_LEN]);
            assert!(record_batch::claimed_records(batch) >= 1);
            let _ = record_batch::validate_produced(batch);
        }
        Err(_) => {}
    }
});
