//! A UDP payload that came to a client: decode, and what is understood encodes to what it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use taffrail::wire::datagram::{ACK_ENTRY_LEN, ACK_HEADER_LEN, Response, WELCOME_LEN};

fuzz_target!(|data: &[u8]| {
    match Response::decode(data) {
        Ok(Response::Welcome(welcome)) => {
            let mut out = [0; WELCOME_LEN];
            welcome.encode(&mut out);
            assert_eq!(out[..19], data[..19]);
            assert_eq!(out[20..], data[20..WELCOME_LEN]);
        }
        Ok(Response::Ack(entries)) => {
            let bytes = data[ACK_HEADER_LEN..].chunks_exact(ACK_ENTRY_LEN);
            let mut count = 0;
            for (entry, bytes) in entries.zip(bytes) {
                let mut out = [0; ACK_ENTRY_LEN];
                entry.encode(&mut out);
                assert_eq!(out[..36], bytes[..36]);
                count += 1;
            }
            assert_eq!(count, u16::from_be_bytes([data[8], data[9]]));
        }
        Err(_) => {}
    }
});
