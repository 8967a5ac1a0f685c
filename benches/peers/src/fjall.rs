//! fjall: two keyspaces of one database.

use std::path::Path;
use std::time::Duration;

use fjall::config::CompressionPolicy;
use fjall::{CompressionType, Database, Keyspace, KeyspaceCreateOptions, PersistMode};

use crate::content::{Key, Message, decode, encode};
use crate::{CACHE, Peer, Result, THREADS};

pub struct Fjall {
    db: Database,
    trees: Trees,
    scratch: Vec<u8>,
}

#[derive(Clone)]
pub struct Trees {
    messages: Keyspace,
    keys: Keyspace,
}

impl Peer for Fjall {
    type Reader = Trees;

    fn open(dir: &Path) -> Result<Self> {
        let db = Database::builder(dir)
            .cache_size(CACHE)
            .worker_threads(THREADS)
            .open()?;
        let options = || {
            let lz4 = CompressionPolicy::all(CompressionType::Lz4);
            KeyspaceCreateOptions::default().data_block_compression_policy(lz4)
        };
        let trees = Trees {
            messages: db.keyspace("messages", options)?,
            keys: db.keyspace("keys", options)?,
        };
        Ok(Fjall {
            db,
            trees,
            scratch: Vec::new(),
        })
    }

    fn append(&mut self, offset: u64, messages: &[Message<'_>]) -> Result<()> {
        let mut batch = self.db.batch().durability(Some(PersistMode::SyncData));
        for (message, offset) in messages.iter().zip(offset..) {
            let offset = offset.to_be_bytes();
            encode(message, &mut self.scratch);
            batch.insert(&self.trees.messages, offset, &self.scratch[..]);
            batch.insert(&self.trees.keys, message.key, offset);
        }
        Ok(batch.commit()?)
    }

    fn settle(&mut self) -> Result<()> {
        self.trees.messages.rotate_memtable_and_wait()?;
        self.trees.keys.rotate_memtable_and_wait()?;
        // There is no call that waits for merges: none for a while is taken for none to come.
        let mut idle = 0;
        while idle < 20 {
            std::thread::sleep(Duration::from_millis(5));
            let busy = self.db.active_compactions() > 0 || self.db.outstanding_flushes() > 0;
            idle = if busy { 0 } else { idle + 1 };
        }
        Ok(())
    }

    fn reader(&self) -> Trees {
        self.trees.clone()
    }

    fn get(trees: &mut Trees, offset: u64, mut take: impl FnMut(Message<'_>)) -> Result<bool> {
        let found = trees.messages.get(offset.to_be_bytes())?;
        Ok(found.map(|bytes| take(decode(&bytes))).is_some())
    }

    fn find(trees: &mut Trees, key: &Key) -> Result<Option<u64>> {
        let found = trees.keys.get(key)?;
        Ok(found.map(|bytes| u64::from_be_bytes(bytes[..].try_into().expect("an offset"))))
    }

    fn scan(trees: &mut Trees, mut take: impl FnMut(u64, Message<'_>)) -> Result<()> {
        for entry in trees.messages.iter() {
            let (offset, bytes) = entry.into_inner()?;
            let offset = u64::from_be_bytes(offset[..].try_into().expect("an offset"));
            take(offset, decode(&bytes));
        }
        Ok(())
    }

    fn close(self) -> Result<()> {
        Ok(self.db.persist(PersistMode::SyncAll)?)
    }
}
