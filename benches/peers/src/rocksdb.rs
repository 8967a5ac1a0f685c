//! RocksDB: two column families of one database.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType,
    Options, WriteBatch, WriteOptions,
};

use crate::content::{Key, Message, decode, encode};
use crate::{CACHE, Peer, Result, THREADS};

const MESSAGES: &str = "messages";
const KEYS: &str = "keys";

pub struct Rocks {
    db: Arc<DB>,
    scratch: Vec<u8>,
}

fn family<'a>(db: &'a DB, name: &str) -> &'a ColumnFamily {
    db.cf_handle(name).expect("it was opened")
}

impl Peer for Rocks {
    type Reader = Arc<DB>;

    fn open(dir: &Path) -> Result<Self> {
        let mut blocks = BlockBasedOptions::default();
        blocks.set_block_cache(&Cache::new_lru_cache(CACHE as usize));
        blocks.set_bloom_filter(10.0, false);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.increase_parallelism(THREADS as i32);
        options.set_compression_type(DBCompressionType::Lz4);
        options.set_block_based_table_factory(&blocks);
        let families = [MESSAGES, KEYS];
        let families = families.map(|name| ColumnFamilyDescriptor::new(name, options.clone()));
        Ok(Rocks {
            db: Arc::new(DB::open_cf_descriptors(&options, dir, families)?),
            scratch: Vec::new(),
        })
    }

    fn append(&mut self, offset: u64, messages: &[Message<'_>]) -> Result<()> {
        let (tree, keys) = (family(&self.db, MESSAGES), family(&self.db, KEYS));
        let mut batch = WriteBatch::default();
        for (message, offset) in messages.iter().zip(offset..) {
            let offset = offset.to_be_bytes();
            encode(message, &mut self.scratch);
            batch.put_cf(tree, offset, &self.scratch);
            batch.put_cf(keys, message.key, offset);
        }
        let mut options = WriteOptions::default();
        options.set_sync(true);
        Ok(self.db.write_opt(batch, &options)?)
    }

    fn settle(&mut self) -> Result<()> {
        let families = [MESSAGES, KEYS].map(|name| family(&self.db, name));
        for family in families {
            self.db.flush_cf(family)?;
        }
        // In the words of properties, which older libraries have, too.
        let busy = |name| -> Result<bool> {
            let counts = families.map(|family| self.db.property_int_value_cf(family, name));
            Ok(counts.into_iter().collect::<std::result::Result<Vec<_>, _>>()? != [Some(0); 2])
        };
        while busy("rocksdb.compaction-pending")? || busy("rocksdb.num-running-compactions")? {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn reader(&self) -> Arc<DB> {
        Arc::clone(&self.db)
    }

    fn get(db: &mut Arc<DB>, offset: u64, mut take: impl FnMut(Message<'_>)) -> Result<bool> {
        let found = db.get_pinned_cf(family(db, MESSAGES), offset.to_be_bytes())?;
        Ok(found.map(|bytes| take(decode(&bytes))).is_some())
    }

    fn find(db: &mut Arc<DB>, key: &Key) -> Result<Option<u64>> {
        let found = db.get_pinned_cf(family(db, KEYS), key)?;
        Ok(found.map(|bytes| u64::from_be_bytes(bytes[..].try_into().expect("an offset"))))
    }

    fn scan(db: &mut Arc<DB>, mut take: impl FnMut(u64, Message<'_>)) -> Result<()> {
        let mut entries = db.raw_iterator_cf(family(db, MESSAGES));
        entries.seek_to_first();
        while let Some((offset, bytes)) = entries.item() {
            let offset = u64::from_be_bytes(offset.try_into().expect("an offset"));
            take(offset, decode(bytes));
            entries.next();
        }
        Ok(entries.status()?)
    }

    fn close(self) -> Result<()> {
        Ok(())
    }
}
