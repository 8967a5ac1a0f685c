//! Which messages retention lets go, and which files nobody needs any more.
//!
//! A partition's start moves to the end of an extent whose messages all arrived too long ago, by the server's clock and
//! not by what producers say, or that lies before the newest bytes it may keep. Within an extent, a merged one may be
//! large, it moves to a block, once a part of what may be kept is too much: not every second by a little. A file goes
//! when every partition in it begins behind it; what a later merge meets before a partition's start it leaves out.
//!
//! Source: Kafka's log retention (`retention.ms`, `retention.bytes`); extents and blocks stand for its segments.

use super::manifest::Edit;
use super::policy::Policy;
use super::sst::{Block, SstError};
use super::store::{Extent, Store, View};
use crate::storage::PartitionKey;

/// Within an extent the start moves when one part in so many of what may be kept is too much.
const SLACK_PART: i64 = 8;

/// The starts that have to move now.
pub(super) fn expired(
    store: &Store,
    view: &View,
    now_ms: i64,
    policy: &mut dyn FnMut(u32) -> Policy,
) -> Result<Vec<(PartitionKey, i64)>, SstError> {
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
        if let Some(oldest) = rest.first() {
            new = new.max(within(store, key, oldest, bytes, now_ms, policy)?);
        }
        if new > start {
            trims.push((key, new));
        }
    }
    Ok(trims)
}

/// Where the partition is to begin in its oldest extent; 0: as it does. `bytes`: its bytes from that extent on.
fn within(
    store: &Store,
    key: PartitionKey,
    oldest: &Extent,
    bytes: u64,
    now_ms: i64,
    policy: &Policy,
) -> Result<i64, SstError> {
    // A flushed extent goes as a whole; looking into each would cost what it gains.
    if oldest.file.meta.merges == 0 || oldest.file.is_quarantined() {
        return Ok(0);
    }
    let mut new = 0;
    let looked = |found: Result<Option<Block>, SstError>| match found {
        Ok(block) => Ok(block.map_or(0, |block| block.first_offset)),
        Err(error @ SstError::Io { .. }) => Err(error),
        Err(error) => {
            store.damaged(&oldest.file, &error);
            Ok(0)
        }
    };
    let reader = || store.reader(&oldest.file);
    if let Some(ms) = policy.retention_ms {
        let slack = ms / SLACK_PART;
        let cutoff = now_ms.saturating_sub(ms);
        if oldest.min_time < cutoff.saturating_sub(slack) {
            new = looked(reader().and_then(|reader| reader.locate_time(key, cutoff)))?;
        }
    }
    if let Some(most) = policy.retention_bytes {
        let slack = most / SLACK_PART as u64;
        if bytes > most.saturating_add(slack) {
            // What the newer extents leave of it.
            let own = most.saturating_sub(bytes - oldest.bytes);
            let first = reader().and_then(|reader| reader.locate_last_bytes(key, own));
            new = new.max(looked(first)?);
        }
    }
    Ok(new)
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
