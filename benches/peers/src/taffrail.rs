//! Taffrail's engine: one partition whose topic has an index of its keys.

use std::path::Path;

use taffrail::memory::budget::{Part, Share};
use taffrail::storage::lsm::codec::{MAX_PLAIN, decompress};
use taffrail::storage::lsm::{Codec, Policy, StoreMemory};
use taffrail::storage::{Engine, EngineConfig, LogReader, NewRecord, PartitionKey};
use taffrail::wire::record_batch::{Record, Records, parse_header};

use crate::content::{Key, Message};
use crate::{CACHE, Peer, Result};

const PARTITION: PartitionKey = PartitionKey {
    topic: 1,
    partition: 0,
};
/// Bytes of whole batches that are read at a time.
const READ: usize = 1 << 20;

pub struct Taffrail(Engine);

fn message<'a>(record: &Record<'a>) -> Message<'a> {
    Message {
        time: record.timestamp,
        key: record.key.unwrap_or_default(),
        value: record.value.unwrap_or_default(),
    }
}

impl Peer for Taffrail {
    type Reader = LogReader;

    fn open(dir: &Path) -> Result<Self> {
        let policy = Policy {
            codec: Codec::Lz4,
            indexed: true,
            ..Policy::default()
        };
        let config = EngineConfig {
            memory: StoreMemory {
                cache: Share::alone(Part::BlockCache, CACHE),
                ..StoreMemory::default()
            },
            ..EngineConfig::new(dir, 7, policy)
        };
        Ok(Taffrail(Engine::open(config)?))
    }

    fn append(&mut self, offset: u64, messages: &[Message<'_>]) -> Result<()> {
        let records: Vec<_> = messages
            .iter()
            .map(|message| NewRecord {
                timestamp: message.time,
                key: Some(message.key),
                value: Some(message.value),
            })
            .collect();
        let first = self.0.write_batch(PARTITION, &records)?;
        assert_eq!(first as u64, offset);
        Ok(self.0.sync()?)
    }

    fn settle(&mut self) -> Result<()> {
        self.0.rotate()?;
        Ok(self.0.compact()?)
    }

    fn reader(&self) -> LogReader {
        self.0.reader()
    }

    fn get(reader: &mut LogReader, offset: u64, mut take: impl FnMut(Message<'_>)) -> Result<bool> {
        let found = reader.record(PARTITION, offset as i64, |record| take(message(record)))?;
        Ok(found.is_some())
    }

    fn find(reader: &mut LogReader, key: &Key) -> Result<Option<u64>> {
        Ok(reader.lookup(PARTITION, key)?.map(|offset| offset as u64))
    }

    fn scan(reader: &mut LogReader, mut take: impl FnMut(u64, Message<'_>)) -> Result<()> {
        let (mut from, end) = reader.bounds(PARTITION)?;
        let (mut bytes, mut plain) = (Vec::new(), Vec::new());
        while from < end {
            bytes.clear();
            from = reader.read(PARTITION, from, READ, &mut bytes)?.next_offset;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (batch, behind) = rest.split_at(parse_header(rest)?.total_len());
                decompress(batch, MAX_PLAIN, &mut plain)?;
                for record in Records::new(&plain)? {
                    let record = record?;
                    take(record.offset as u64, message(&record));
                }
                rest = behind;
            }
        }
        Ok(())
    }

    fn close(self) -> Result<()> {
        Ok(self.0.close()?)
    }
}
