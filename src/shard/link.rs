//! A kernel thread's way to one shard: record batches there, their answers back.
//!
//! Invariants: a batch that was sent lies in its slot, untouched, until its answer is taken; every batch is
//! answered exactly once, at every acknowledgement level, unless its shard was closed with the disk full. There
//! are no more slots than places in either ring, so neither is ever full. A link that is dropped before its answers
//! came leaks the buffers that the shard may still read.

use std::sync::Arc;

use crate::memory::spsc;
use crate::memory::wake::Wake;
use crate::shard::inbound::{Ack, BatchBuffer, Inbound};
use crate::wire::datagram::ErrorCode;

/// Batches on their way from one thread to one shard at most: at 1 KiB each 4 MiB, more than a commit takes;
/// two rings of 128 KiB and 448 KiB.
pub const LINK_BATCHES: usize = 4096;
const _: () = assert!(LINK_BATCHES <= 1 << u16::BITS, "slots are tags");

/// What became of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchAnswer {
    /// As given with the batch.
    pub tag: u64,
    /// Shard-local index of the partition it was sent to.
    pub partition: u32,
    /// Offset of its first record. With [`ErrorCode::Duplicate`] that of the first time, −1 where it is no
    /// longer known; else −1 where it was not stored.
    pub base_offset: i64,
    /// [`ErrorCode::None`]: stored, and durable where that was asked for.
    pub error: ErrorCode,
    /// How loaded the shard is: batches that a producer should have outstanding in a partition at most.
    pub credit: u32,
}

/// The thread's end.
pub struct BatchLink {
    out: spsc::Producer<Inbound>,
    acks: spsc::Consumer<Ack>,
    ring: u8,
    slots: Vec<Option<(BatchBuffer, u64)>>,
    free: Vec<u16>,
    taken: Vec<Ack>,
    /// Wakes the shard's loop, where that sleeps until it is woken.
    bell: Option<Arc<Wake>>,
}

/// The shard's end: what [`crate::shard::Shard::new`] wants of it.
pub struct ShardEnd {
    /// Batches from the thread.
    pub input: spsc::Consumer<Inbound>,
    /// Answers to it.
    pub outlet: spsc::Producer<Ack>,
}

/// A link whose answers are ring `ring` of those that the shard is made with.
pub fn link(ring: u8) -> (BatchLink, ShardEnd) {
    let (out, input) = spsc::ring(LINK_BATCHES);
    let (outlet, acks) = spsc::ring(LINK_BATCHES);
    let link = BatchLink {
        out,
        acks,
        ring,
        slots: (0..LINK_BATCHES).map(|_| None).collect(),
        free: (0..=(LINK_BATCHES - 1) as u16).rev().collect(),
        taken: Vec::with_capacity(LINK_BATCHES),
        bell: None,
    };
    (link, ShardEnd { input, outlet })
}

impl BatchLink {
    /// From now on `bell` is rung for each batch.
    pub fn set_bell(&mut self, bell: Arc<Wake>) {
        self.bell = Some(bell);
    }

    /// Batches that can be sent before answers are taken.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Batches that were sent and whose answers have not been taken.
    pub fn on_their_way(&self) -> usize {
        LINK_BATCHES - self.free.len()
    }

    /// Sends a batch to shard-local `partition`; its header, CRC and records count have been checked.
    /// `time_ns`: arrival, Unix nanoseconds. `acks`: −1 for an answer when it is durable, else when it is staged.
    /// Gives the buffer back where too many are on their way.
    pub fn send(
        &mut self,
        buffer: BatchBuffer,
        tag: u64,
        partition: u32,
        time_ns: i64,
        acks: i8,
    ) -> Result<(), BatchBuffer> {
        let Some(slot) = self.free.pop() else {
            return Err(buffer);
        };
        // SAFETY: the buffer's memory stays where it is when the buffer moves, and the slot holds it until the
        // answer, which names the slot, is taken; a dropped link leaks it.
        let inbound = unsafe { buffer.inbound(slot, self.ring, partition, time_ns, acks) };
        if !self.out.push(inbound) {
            // Cannot be: there are as many places as slots.
            self.free.push(slot);
            return Err(buffer);
        }
        self.slots[usize::from(slot)] = Some((buffer, tag));
        if let Some(bell) = &self.bell {
            bell.wake();
        }
        Ok(())
    }

    /// Takes the answers that have come; gives how many.
    pub fn answers(&mut self, mut take: impl FnMut(BatchAnswer)) -> usize {
        self.taken.clear();
        let count = self.acks.pop_into(&mut self.taken, LINK_BATCHES);
        for ack in &self.taken {
            let slot = ack.entry.request_id as usize;
            let Some((_, tag)) = self.slots.get_mut(slot).and_then(Option::take) else {
                debug_assert!(false, "an answer to batch {slot}, which was not sent");
                continue;
            };
            self.free.push(slot as u16);
            take(BatchAnswer {
                tag,
                partition: ack.entry.partition,
                base_offset: ack.entry.base_offset,
                error: ack.entry.error,
                credit: ack.entry.credit,
            });
        }
        count
    }

    /// Whether answers wait, for a look before sleeping.
    pub fn has_answers(&mut self) -> bool {
        self.acks.len() > 0
    }
}

impl Drop for BatchLink {
    fn drop(&mut self) {
        for slot in &mut self.slots {
            std::mem::forget(slot.take());
        }
    }
}
