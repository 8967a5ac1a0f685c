//! Which messages retention lets go, and which files nobody needs any more.
//!
//! A partition's start moves to the end of an extent whose messages all arrived too long ago, by the server's clock and
//! not by what producers say, or that lies before the newest bytes it may keep. A file goes when every partition in
//! it begins behind it; what a later merge meets before a partition's start it leaves out.
//!
//! Source: Kafka's log retention (`retention.ms`, `retention.bytes`); extents stand for its segments.

use super::manifest::Edit;
use super::policy::Policy;
use super::store::View;
use crate::storage::PartitionKey;

/// The starts that have to move now; also gives how many records go.
pub(super) fn expired(
    view: &View,
    now_ms: i64,
    policy: &mut dyn FnMut(u32) -> Policy,
) -> Vec<(PartitionKey, i64)> {
    let mut trims = Vec::new();
    let mut topic: Option<(u32, Policy)> = None;
    for (key, extents) in view.partitions() {
        if topic.as_ref().is_none_or(|(id, _)| *id != key.topic) {
            topic = Some((key.topic, policy(key.topic)));
        }
        let Some((_, policy)) = &topic else { continue };
        let start = view.start(key);
        let live = extents.partition_point(|extent| extent.end <= start);
        let mut rest = &extents[live..];
        let mut bytes: u64 = rest.iter().map(|extent| extent.bytes).sum();
        let mut new = start;
        while let Some((oldest, others)) = rest.split_first() {
            let too_old = policy
                .retention_ms
                .is_some_and(|ms| oldest.max_time < now_ms.saturating_sub(ms));
            // As Kafka: the oldest goes when the others are enough.
            let too_many = policy
                .retention_bytes
                .is_some_and(|most| bytes - oldest.bytes >= most);
            if !(policy.deleted || too_old || too_many) {
                break;
            }
            new = oldest.end;
            bytes -= oldest.bytes;
            rest = others;
        }
        if new > start {
            trims.push((key, new));
        }
    }
    trims
}

/// The files that have nothing behind their partitions' starts, as the edit that removes them.
pub(super) fn unneeded(view: &View) -> Option<Edit> {
    let mut needed: std::collections::HashSet<u64> = std::collections::HashSet::new();
    for (key, extents) in view.partitions() {
        let start = view.start(key);
        let live = extents.iter().filter(|extent| extent.end > start);
        needed.extend(live.map(|extent| extent.file.meta.number));
    }
    let remove: Vec<u64> = view
        .files
        .iter()
        // What is damaged stays for whoever can make something of it.
        .filter(|file| !needed.contains(&file.meta.number) && !file.is_quarantined())
        .map(|file| file.meta.number)
        .collect();
    (!remove.is_empty()).then_some(Edit::Replace {
        remove,
        add: Vec::new(),
    })
}
