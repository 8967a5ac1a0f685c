//! The control socket's lines, read by the server (requests) and by commands (answers): what is understood says the
//! same when it is written and read again, and its accounts can be added up.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use taffrail::control::keys::KeysAnswer;
use taffrail::control::protocol::{Answer, ReadAnswer, Request, Stats, TopicInfo};

fn again<T: Serialize + DeserializeOwned + PartialEq + Debug>(line: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(line).ok()?;
    let text = serde_json::to_vec(&value).expect("plain data serializes");
    assert!(!text.contains(&b'\n'), "a line is one line");
    assert_eq!(
        serde_json::from_slice::<T>(&text).expect("its own words"),
        value
    );
    Some(value)
}

fuzz_target!(|line: &[u8]| {
    again::<Request>(line);
    again::<Answer<ReadAnswer>>(line);
    again::<Answer<KeysAnswer>>(line);
    again::<Answer<Vec<TopicInfo>>>(line);
    if let Some(Answer::Ok(stats)) = again::<Answer<Stats>>(line) {
        let accounts = stats.ports.len() + stats.topics.len();
        assert!(stats.imbalances().len() <= accounts);
    }
});
