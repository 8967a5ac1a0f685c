//! Offsets by key over all files of a store: the newest one of a key, and the keys of a range in order.
//!
//! Invariants: what lies before a partition's start is not found; damage in a key index is an error and named, never
//! another answer. An extent whose keys are not indexed (the topic had no index when it was written; a merge makes it)
//! is read as a whole.

use super::error::StoreError;
use super::keys::range::{Page, each_key};
use super::keys::{KeysReader, kept};
use super::sst::{Scan, SstError, SstReader};
use super::store::{Extent, Store, View};
use crate::storage::PartitionKey;
use crate::wire::record_batch;

impl Store {
    /// The newest offset of a record with this key in SSTs. Cost: some microseconds for each file that has the partition,
    /// from the newest on, where its index is in memory; a read of the partition in a file that has no index.
    pub fn lookup(&self, key: PartitionKey, wanted: &[u8]) -> Result<Option<i64>, StoreError> {
        let view = self.view();
        let start = view.start(key);
        let kept = kept(wanted);
        for extent in live(&view, key).iter().rev() {
            let mut found = None;
            self.each_index(key, extent, |index| {
                match index {
                    Index::Keys(reader, keys) => {
                        found = keys
                            .get_kept(key, &kept)
                            .map_err(|error| reader.keys_damaged(&error))?;
                    }
                    Index::Batch(batch, scratch) => each_key(batch, scratch, |key, offset| {
                        if key == wanted {
                            found = found.max(Some(offset));
                        }
                    }),
                }
                Ok(())
            })?;
            if let Some(offset) = found {
                // All that is older has lower offsets.
                return Ok((offset >= start).then_some(offset));
            }
        }
        Ok(None)
    }

    /// Where `offset` lies in the SSTs: the offset behind the file's part of the partition, and the newest offset there of a
    /// record with this key, as the file's index knows it; [`i64::MAX`] where it has none. `None`: `offset` is behind all of
    /// them. Cost: some microseconds.
    pub(crate) fn newest_beside(
        &self,
        key: PartitionKey,
        offset: i64,
        kept: &[u8],
    ) -> Result<Option<(i64, Option<i64>)>, StoreError> {
        let view = self.view();
        let extents = view.extents(key);
        let Some(extent) = extents.get(extents.partition_point(|e| e.end <= offset)) else {
            return Ok(None);
        };
        if !extent.keyed {
            return Ok(Some((extent.end, Some(i64::MAX))));
        }
        let mut newest = None;
        self.each_index(key, extent, |index| {
            if let Index::Keys(reader, keys) = index {
                newest = keys
                    .get_kept(key, kept)
                    .map_err(|error| reader.keys_damaged(&error))?;
            }
            Ok(())
        })?;
        Ok(Some((extent.end, newest)))
    }

    /// Offers the page the partition's keys. Cost: for each file some microseconds, and what it adds to the page.
    pub(crate) fn keys(&self, key: PartitionKey, page: &mut Page) -> Result<(), StoreError> {
        let view = self.view();
        for extent in live(&view, key).iter().rev() {
            self.each_index(key, extent, |index| {
                match index {
                    Index::Keys(reader, keys) => {
                        let range = keys.range_kept(key, page.bounds().first());
                        range
                            .and_then(|range| page.range(range))
                            .map_err(|error| reader.keys_damaged(&error))?;
                    }
                    Index::Batch(batch, scratch) => page.batch(batch, scratch),
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Calls `take` with the extent's key index; where it has none, with each batch that reaches behind the start.
    fn each_index(
        &self,
        key: PartitionKey,
        extent: &Extent,
        mut take: impl FnMut(Index) -> Result<(), SstError>,
    ) -> Result<(), StoreError> {
        let result = (|| {
            let reader = self.reader(&extent.file)?;
            if extent.keyed {
                return match reader.keys()? {
                    Some(keys) => take(Index::Keys(&reader, keys)),
                    None => Ok(()),
                };
            }
            let (mut scratch, mut scan) = (Vec::new(), None);
            for block in reader.blocks(key, -1)? {
                let block = block?;
                let scan: &mut Scan<'_> = scan.get_or_insert_with(|| {
                    let end = block.position.saturating_add(extent.bytes);
                    reader.scan(block.position, end)
                });
                let mut rest = scan.block(&block)?;
                while let Ok(header) = record_batch::parse_header(rest) {
                    let Some((batch, others)) = rest.split_at_checked(header.total_len()) else {
                        break;
                    };
                    rest = others;
                    take(Index::Batch(batch, &mut scratch))?;
                }
            }
            Ok(())
        })();
        result.map_err(|error: SstError| {
            self.damaged(&extent.file, &error);
            error.into()
        })
    }
}

enum Index<'a> {
    Keys(&'a SstReader, KeysReader<'a>),
    Batch(&'a [u8], &'a mut Vec<u8>),
}

/// The extents that reach behind the partition's start.
fn live(view: &View, key: PartitionKey) -> &[Extent] {
    let extents = view.extents(key);
    &extents[extents.partition_point(|extent| extent.end <= view.start(key))..]
}
