//! taffrail.toml: whatever it says, it is taken or refused in words that name the file.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use taffrail::config::Config;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match Config::parse(text, Path::new("t.toml")) {
        Ok(config) => assert!(config.storage.shards > 0),
        Err(error) => assert!(error.to_string().contains("t.toml"), "{error}"),
    }
});
