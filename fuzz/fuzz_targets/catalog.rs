//! catalog.json: what is taken has topics that are found by name and id, and can be added to and read again; what is
//! not is refused in words that name the file, which stays as it was.
#![no_main]

use std::fs;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use taffrail::storage::{Catalog, TopicSpec};

/// A folder in memory; scripts/fuzz.sh names one that it removes.
fn scratch() -> PathBuf {
    std::env::var_os("TMPDIR").map_or("/dev/shm".into(), PathBuf::from)
}

fuzz_target!(|data: &[u8]| {
    let dir = scratch().join(format!("catalog-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let path = dir.join("catalog.json");
    fs::write(&path, data).unwrap();
    match Catalog::open(&dir) {
        Err(error) => {
            assert!(error.to_string().contains("catalog.json"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), data);
        }
        Ok(mut catalog) => {
            let shards = catalog
                .topics()
                .iter()
                .flat_map(|t| &t.shards)
                .max()
                .map_or(1, |s| s.saturating_add(1));
            let mut wanted = Vec::new();
            for topic in catalog.topics() {
                assert_eq!(catalog.topic(&topic.name), Some(topic));
                assert_eq!(catalog.topic_by_id(topic.id), Some(topic));
                wanted.push(TopicSpec {
                    name: topic.name.clone(),
                    partitions: topic.partitions(),
                    settings: topic.settings.clone(),
                });
            }
            let old = catalog.topics().to_vec();
            catalog
                .ensure(&wanted, shards)
                .expect("what it has, it may have");
            assert_eq!(catalog.topics(), old);
            wanted.push(TopicSpec {
                name: "added".to_owned(),
                partitions: 2,
                settings: Default::default(),
            });
            if catalog.ensure(&wanted, shards).is_ok() {
                let again = Catalog::open_read_only(&dir).expect("it wrote it itself");
                assert_eq!(again.topics(), catalog.topics());
                assert_eq!(again.store_id(), catalog.store_id());
            }
        }
    }
});
