//! What an rx lcore hands to a shard, and the way back to the sender.
//!
//! Invariant: an [`Inbound`] borrows memory of its owner (an mbuf, or the [`BatchBuffer`] of a kernel thread,
//! which is released by its answer); between its construction and
//! the call of [`Release::release`] with that owner nobody changes that memory, and
//! the shard releases each owner exactly once.

use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use crate::wire::datagram::{AckEntry, PRODUCE_HEADER_LEN};

/// Slots of a ring from an rx lcore to a shard: at 10 M messages/s it rides out 0.8 ms of a shard
/// that does something else; 256 KiB, and as many mbufs.
pub const INBOUND_SLOTS: usize = 8192;
/// Slots of a ring of acknowledgements: as many as a full ring of single-batch datagrams brings in a
/// round of the rx lcore; 416 KiB.
pub const ACK_SLOTS: usize = 4096;

/// Length of [`ReplyTo`] in memory.
pub const REPLY_TO_LEN: usize = size_of::<ReplyTo>();

/// What the payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// One datagram, one message.
    Raw,
    /// One message a non-empty line; `\n` or `\r\n` ends a line, the last one may lack it.
    Lines,
    /// One record batch of the datagram protocol, with its header and a [`ReplyTo`] before it.
    Produce,
    /// One record batch that the broker has checked, in a [`BatchBuffer`].
    Batch,
}

impl Kind {
    /// Whether it is a record batch, whose producer is answered.
    #[inline(always)]
    pub fn is_batch(self) -> bool {
        matches!(self, Kind::Produce | Kind::Batch)
    }
}

/// A message on its way from an rx lcore to the shard; 32 bytes, so that two share a cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Inbound {
    owner: usize,
    data: *const u8,
    time_ns: i64,
    partition: u32,
    len: u16,
    kind: Kind,
    acks: i8,
}

const _: () = assert!(size_of::<Inbound>() == 32);

// SAFETY: the constructor's contract hands the memory over with the value, so it may be used on
// another thread.
unsafe impl Send for Inbound {}

impl Inbound {
    /// `owner` is the opaque buffer handle given back through [`Release`]; `data` the payload (for
    /// [`Kind::Produce`] the record batch) of `len` bytes; `time_ns` its arrival in Unix
    /// nanoseconds; `partition` the shard-local index; `acks` −1, 0 or 1 (ignored unless `Produce`).
    ///
    /// # Safety
    /// `data` is readable for `len` bytes until `owner` is released, and nobody writes there. For
    /// `Produce`, the [`PRODUCE_HEADER_LEN`] bytes before `data` are the datagram's header and the
    /// [`REPLY_TO_LEN`] bytes before that were written by [`ReplyTo::write_before`].
    #[inline(always)]
    pub unsafe fn new(
        owner: usize,
        data: *const u8,
        len: u16,
        time_ns: i64,
        partition: u32,
        kind: Kind,
        acks: i8,
    ) -> Self {
        Self {
            owner,
            data,
            time_ns,
            partition,
            len,
            kind,
            acks,
        }
    }

    /// The same message, for this shard-local partition.
    #[inline(always)]
    pub(crate) fn to_partition(self, partition: u32) -> Self {
        Self { partition, ..self }
    }

    /// The buffer's handle.
    #[inline(always)]
    pub fn owner(&self) -> usize {
        self.owner
    }

    /// Arrival, Unix nanoseconds.
    #[inline(always)]
    pub fn time_ns(&self) -> i64 {
        self.time_ns
    }

    /// Shard-local partition index; not yet checked against the shard's partitions.
    #[inline(always)]
    pub fn partition(&self) -> u32 {
        self.partition
    }

    /// What the payload is.
    #[inline(always)]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The acknowledgement level the producer asked for.
    #[inline(always)]
    pub fn acks(&self) -> i8 {
        self.acks
    }

    /// Payload length in bytes.
    #[inline(always)]
    #[allow(clippy::len_without_is_empty)] // a length in bytes, not a container
    pub fn len(&self) -> usize {
        match self.kind {
            Kind::Batch => self.owner as u32 as usize,
            _ => self.len as usize,
        }
    }

    /// The payload's address, for prefetching.
    #[inline(always)]
    pub fn data(&self) -> *const u8 {
        self.data
    }

    /// The payload; not to be called once the owner has been released.
    #[inline(always)]
    pub fn payload(&self) -> &[u8] {
        // SAFETY: readable for len bytes until released (contract of new); the shard releases
        // owners only after the last use of their messages.
        unsafe { std::slice::from_raw_parts(self.data, self.len()) }
    }

    /// The datagram header before a `Produce` batch.
    ///
    /// # Panics
    /// When the kind is not `Produce`.
    #[inline]
    pub fn produce_header(&self) -> &[u8; PRODUCE_HEADER_LEN] {
        assert_eq!(self.kind, Kind::Produce);
        // SAFETY: for Produce the header lies directly before data (contract of new); an array of
        // bytes has no alignment.
        unsafe { &*self.data.sub(PRODUCE_HEADER_LEN).cast() }
    }

    /// Whom the answer to a `Batch` goes to.
    ///
    /// # Panics
    /// When the kind is not `Batch`.
    #[inline]
    pub fn batch_way(&self) -> BatchWay {
        assert_eq!(self.kind, Kind::Batch);
        BatchWay {
            tag: (self.owner >> TAG_SHIFT) as u16,
            ring: (self.owner >> RING_SHIFT) as u8,
        }
    }

    /// The way back to the sender of a `Produce` datagram.
    ///
    /// # Panics
    /// When the kind is not `Produce`.
    #[inline]
    pub fn reply_to(&self) -> ReplyTo {
        assert_eq!(self.kind, Kind::Produce);
        // SAFETY: for Produce a ReplyTo was written there (contract of new); the read is unaligned.
        unsafe {
            ptr::read_unaligned(
                self.data
                    .sub(PRODUCE_HEADER_LEN + REPLY_TO_LEN)
                    .cast::<ReplyTo>(),
            )
        }
    }
}

/// Whom the answer to a [`Kind::Batch`] goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchWay {
    /// Comes back in the answer, as [`AckEntry::request_id`].
    pub tag: u16,
    /// Index of the ack ring.
    pub ring: u8,
}

// A Batch's owner is no handle: it is released by its answer. In its place are its bytes, 32 bits, and its way.
const TAG_SHIFT: u32 = 32;
const RING_SHIFT: u32 = 48;
const _: () = assert!(usize::BITS == 64);

/// One record batch for a shard, in memory of a kernel thread. It stays the thread's: it is given
/// back by the batch's answer, which is sent at every acknowledgement level and after the shard's last
/// use of it.
#[derive(Debug)]
pub struct BatchBuffer(Memory);

#[derive(Debug)]
enum Memory {
    Own(Arc<[u8]>),
    Part(Arc<Vec<u8>>, Range<usize>),
}

impl BatchBuffer {
    /// Copies a batch.
    ///
    /// # Panics
    /// When it has 4 GiB or more.
    pub fn new(batch: &[u8]) -> Self {
        assert!(u32::try_from(batch.len()).is_ok(), "a batch of 4 GiB");
        Self(Memory::Own(batch.into()))
    }

    /// The batch where it lies, in `memory`; `None` where it does not, or has 4 GiB or more.
    pub fn part(memory: &Arc<Vec<u8>>, batch: &[u8]) -> Option<Self> {
        let start = (batch.as_ptr() as usize).checked_sub(memory.as_ptr() as usize)?;
        let range = start..start.checked_add(batch.len())?;
        let lies_there = memory.get(range.clone())?.as_ptr() == batch.as_ptr();
        let fits = u32::try_from(batch.len()).is_ok();
        (lies_there && fits).then(|| Self(Memory::Part(Arc::clone(memory), range)))
    }

    /// The batch.
    pub fn batch(&self) -> &[u8] {
        match &self.0 {
            Memory::Own(bytes) => bytes,
            Memory::Part(bytes, range) => &bytes[range.clone()],
        }
    }

    /// Bytes of memory that it holds.
    pub fn held(&self) -> usize {
        match &self.0 {
            Memory::Own(bytes) => bytes.len(),
            Memory::Part(bytes, _) => bytes.capacity(),
        }
    }

    /// The batch, for changes before it is handed over; a part is copied first.
    pub fn batch_mut(&mut self) -> &mut [u8] {
        if let Memory::Part(..) = self.0 {
            *self = Self::new(self.batch());
        }
        match &mut self.0 {
            Memory::Own(bytes) => Arc::get_mut(bytes).expect("nobody else has it"),
            Memory::Part(..) => unreachable!("it was copied"),
        }
    }

    /// Hands the batch over: to shard-local `partition`, its answer to ack ring `ring`. `acks`: −1 for an
    /// answer when it is durable, else when it is staged.
    ///
    /// # Safety
    /// The buffer is neither changed nor dropped before the answer with this tag has been taken from the ring,
    /// or the shard has closed.
    pub unsafe fn inbound(
        &self,
        tag: u16,
        ring: u8,
        partition: u32,
        time_ns: i64,
        acks: i8,
    ) -> Inbound {
        let batch = self.batch();
        // Less than 4 GiB: `new` and `part` see to it.
        let owner = batch.len() | usize::from(tag) << TAG_SHIFT | usize::from(ring) << RING_SHIFT;
        let data = batch.as_ptr();
        // SAFETY: the buffer, which holds the bytes, stays until the answer (contract), and nobody changes them: the
        // memory of an Arc is only read while another has it, too.
        unsafe { Inbound::new(owner, data, 0, time_ns, partition, Kind::Batch, acks) }
    }
}

/// Everything an rx lcore needs to answer a sender: plain bytes, 64 of them, kept in the packet's
/// own headroom and headers while the message waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct ReplyTo {
    /// Index of the ack ring, that is of the rx lcore.
    pub rx: u8,
    /// 4 or 6.
    pub ip_version: u8,
    /// The rx lcore's own index of the port the datagram came in by.
    pub port: u16,
    /// Ethernet address of the next hop back.
    pub mac: [u8; 6],
    /// VLAN tag (12 bits), [`ReplyTo::NO_VLAN`] for none.
    pub vlan: u16,
    /// The sender's address; IPv4 in the first four bytes.
    pub peer_ip: [u8; 16],
    /// The address it was sent to; IPv4 in the first four bytes.
    pub local_ip: [u8; 16],
    /// The sender's UDP port.
    pub peer_port: u16,
    /// The UDP port it was sent to.
    pub local_port: u16,
    /// Zero; room for what a later kind of transport needs.
    pub reserved: [u8; 16],
}

const _: () = assert!(size_of::<ReplyTo>() == 64);

impl ReplyTo {
    /// The value of `vlan` for an untagged frame.
    pub const NO_VLAN: u16 = 0xffff;

    /// The way to a kernel thread: its ring is all that counts.
    pub fn ring(ring: u8) -> Self {
        Self {
            rx: ring,
            ip_version: 0,
            port: 0,
            mac: [0; 6],
            vlan: Self::NO_VLAN,
            peer_ip: [0; 16],
            local_ip: [0; 16],
            peer_port: 0,
            local_port: 0,
            reserved: [0; 16],
        }
    }

    /// Writes `self` where the shard looks for it: before the header before `batch`.
    ///
    /// # Safety
    /// The [`REPLY_TO_LEN`] + [`PRODUCE_HEADER_LEN`] bytes before `batch` are in the same buffer
    /// and the first [`REPLY_TO_LEN`] of them are writable and the caller's.
    #[inline]
    pub unsafe fn write_before(&self, batch: *mut u8) {
        // SAFETY: writable by contract; the write is unaligned.
        unsafe {
            ptr::write_unaligned(
                batch
                    .sub(PRODUCE_HEADER_LEN + REPLY_TO_LEN)
                    .cast::<ReplyTo>(),
                *self,
            )
        }
    }
}

/// What the shard hands to an rx lcore: one answer to one `Produce`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ack {
    /// To whom.
    pub reply: ReplyTo,
    /// What is said.
    pub entry: AckEntry,
}

/// Takes buffers back, in bulk.
pub trait Release {
    /// Each of `owners` came in an [`Inbound`] and is given back exactly once; the memory must not
    /// be used after.
    fn release(&mut self, owners: &[usize]);
}

/// The time of a poll round, read once for all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Monotonic nanoseconds; for linger and timeouts.
    pub mono_ns: u64,
    /// Unix nanoseconds; for what is stored.
    pub unix_ns: i64,
}

/// Messages known to be lost upstream of the shard; becomes a control batch in the partition, so
/// that a reader of the data sees the loss where it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GapReport {
    /// Shard-local index of the affected partition.
    pub partition: u32,
    /// Stable snake_case name of the reason: `ring_full`, `nic_missed`, `no_mbuf`, …
    pub reason: &'static str,
    /// Messages lost; of packets that were never seen, packets.
    pub count: u64,
    /// First moment of the loss, Unix milliseconds.
    pub from_ms: i64,
    /// Last moment of the loss, Unix milliseconds.
    pub to_ms: i64,
    /// The port they came in by.
    pub port: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_stays_where_it_lies_until_it_is_changed() {
        let input = Arc::new((0..100).collect::<Vec<u8>>());
        let mut buffer = BatchBuffer::part(&input, &input[10..90]).unwrap();
        assert_eq!(buffer.batch().as_ptr(), input[10..].as_ptr());
        assert_eq!(buffer.held(), input.capacity());
        assert_eq!(Arc::strong_count(&input), 2);
        buffer.batch_mut()[0] = 7;
        assert_eq!((buffer.batch()[0], buffer.batch()[1]), (7, 11));
        assert_eq!((buffer.held(), input[10]), (80, 10));
        assert_eq!(Arc::strong_count(&input), 1);
        // Bytes of other memory, also such as are the same.
        let other = input[10..90].to_vec();
        assert!(BatchBuffer::part(&input, &other).is_none());
        assert!(BatchBuffer::part(&Arc::new(other), &input[10..90]).is_none());
    }

    #[test]
    fn a_batch_names_its_length_and_way_of_any_size() {
        let long = Arc::new(vec![1; 70_000]);
        for buffer in [
            BatchBuffer::new(&long),
            BatchBuffer::part(&long, &long[..]).unwrap(),
            BatchBuffer::part(&long, &long[69_999..]).unwrap(),
        ] {
            for (tag, ring) in [(0, 0), (4095, 7), (u16::MAX, u8::MAX)] {
                // SAFETY: the buffer outlives the Inbound.
                let inbound = unsafe { buffer.inbound(tag, ring, 3, 5, -1) };
                assert_eq!(inbound.batch_way(), BatchWay { tag, ring });
                assert_eq!(inbound.payload(), buffer.batch());
                assert_eq!((inbound.kind(), inbound.partition()), (Kind::Batch, 3));
            }
        }
    }
}
