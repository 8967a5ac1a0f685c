//! A page of a range over keys, filled from any number of sources: the least keys between two bounds, in order, each
//! with its newest offset.
//!
//! Invariant: whatever is offered in whichever order, the page holds the `limit` least keys of it. Memory: that many
//! keys.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::super::codec;
use super::{KeyRange, KeysError};
use crate::wire::record_batch::Records;

/// Between which kept keys a range lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyBounds {
    /// Where it begins.
    pub from: Bound<Vec<u8>>,
    /// The first key behind it; `None`: there is none.
    pub to: Option<Vec<u8>>,
}

impl KeyBounds {
    /// All keys.
    pub const ALL: KeyBounds = KeyBounds {
        from: Bound::Unbounded,
        to: None,
    };

    /// Keys that begin with `prefix`.
    pub fn prefix(prefix: &[u8]) -> KeyBounds {
        let mut to = prefix.to_vec();
        while to.pop_if(|last| *last == u8::MAX).is_some() {}
        let to = to.last_mut().map(|last| *last += 1).map(|()| to);
        KeyBounds {
            from: Bound::Included(prefix.to_vec()),
            to,
        }
    }

    /// The least kept key that may be inside.
    pub(crate) fn first(&self) -> &[u8] {
        match &self.from {
            Bound::Included(from) | Bound::Excluded(from) => from,
            Bound::Unbounded => b"",
        }
    }

    fn has_begun(&self, kept: &[u8]) -> bool {
        match &self.from {
            Bound::Included(from) => kept >= from.as_slice(),
            Bound::Excluded(from) => kept > from.as_slice(),
            Bound::Unbounded => true,
        }
    }

    fn has_ended(&self, kept: &[u8]) -> bool {
        self.to.as_deref().is_some_and(|to| kept >= to)
    }
}

/// See the module.
pub(crate) struct Page<'a> {
    bounds: &'a KeyBounds,
    limit: usize,
    /// Offsets below are not there any more.
    least: i64,
    keys: BTreeMap<Vec<u8>, i64>,
}

impl Page<'_> {
    pub(crate) fn new(bounds: &KeyBounds, limit: usize, least: i64) -> Page<'_> {
        Page {
            bounds,
            limit: limit.max(1),
            least,
            keys: BTreeMap::new(),
        }
    }

    pub(crate) fn bounds(&self) -> &KeyBounds {
        self.bounds
    }

    /// Offers a kept key; false: neither it nor any greater one has a place.
    pub(crate) fn offer(&mut self, kept: &[u8], offset: i64) -> bool {
        if self.bounds.has_ended(kept) {
            return false;
        }
        if !self.bounds.has_begun(kept) || offset < self.least {
            return true;
        }
        if let Some(newest) = self.keys.get_mut(kept) {
            *newest = (*newest).max(offset);
            return true;
        }
        if self.keys.len() >= self.limit {
            match self.keys.last_entry() {
                Some(last) if last.key().as_slice() > kept => drop(last.remove()),
                _ => return false,
            }
        }
        self.keys.insert(kept.to_vec(), offset);
        true
    }

    /// Offers what a section has.
    pub(crate) fn range(&mut self, mut range: KeyRange) -> Result<(), KeysError> {
        while let Some(entry) = range.next()? {
            if !self.offer(entry.kept, entry.offset) {
                break;
            }
        }
        Ok(())
    }

    /// Offers the keys of a batch's records; what cannot be decompressed has none.
    pub(crate) fn batch(&mut self, batch: &[u8], scratch: &mut Vec<u8>) {
        each_key(batch, scratch, |key, offset| {
            self.offer(&super::kept(key), offset);
        });
    }

    /// The keys, in order; and whether there may be more behind them.
    pub(crate) fn finish(self) -> (Vec<(Vec<u8>, i64)>, bool) {
        let full = self.keys.len() >= self.limit;
        (self.keys.into_iter().collect(), full)
    }
}

/// Calls `take` with the key and the offset of each record that has a key. What cannot be decompressed has none.
pub(crate) fn each_key(batch: &[u8], scratch: &mut Vec<u8>, mut take: impl FnMut(&[u8], i64)) {
    let plain = codec::plain(batch, scratch);
    let control =
        |batch| crate::wire::record_batch::parse_header(batch).is_ok_and(|h| h.is_control());
    if let Ok(plain) = plain
        && !control(plain)
        && let Ok(records) = Records::new(plain)
    {
        for record in records.map_while(Result::ok) {
            if let Some(key) = record.key {
                take(key, record.offset);
            }
        }
    }
}
