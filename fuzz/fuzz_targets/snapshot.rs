//! Parts of a snapshot of a shard's state, and batches behind it, as recovery replays them: whatever they hold, the
//! state stays one that a shard can start from, and what is not understood is counted.
#![no_main]

use std::sync::Arc;

use crossbeam_queue::ArrayQueue;
use libfuzzer_sys::fuzz_target;
use taffrail::shard::{Recovered, ShardConfig};
use taffrail::storage::{PartitionKey, Replay};

fuzz_target!(|data: &[u8]| {
    let key = |partition| PartitionKey {
        topic: 1,
        partition,
    };
    let config = ShardConfig {
        partitions: vec![key(0), key(1)],
        max_producers: 8,
        max_pending_acks: 8,
        gaps: Arc::new(ArrayQueue::new(1)),
        wakes: Vec::new(),
    };
    let mut recovered = Recovered::new(&config);
    let Some((&control, input)) = data.split_first() else {
        return;
    };
    let (part, batch) = input.split_at(input.len() * usize::from(control) / 255);
    recovered.snapshot(part, 0, 1);
    let unknown = recovered.malformed();
    recovered.batch(key(u32::from(control) % 3), batch);
    assert!(recovered.malformed() <= unknown + 1);
    assert!(recovered.batches() <= 1);
});
