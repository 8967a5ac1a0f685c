//! What an rx lcore hands to a shard, and the way back to the sender.
//!
//! Invariant: an [`Inbound`] borrows memory of its owner (an mbuf, or the [`BatchBuffer`] of a kernel thread,
//! which is released by its answer); between its construction and
//! the call of [`Release::release`] with that owner nobody but the shard touches that memory, and
//! the shard releases each owner exactly once.

use std::ptr::{self, NonNull};

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
            Kind::Batch => self.batch_head().len as usize,
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

    /// What lies before a `Batch`.
    ///
    /// # Panics
    /// When the kind is not `Batch`.
    #[inline]
    pub fn batch_head(&self) -> BatchHead {
        assert_eq!(self.kind, Kind::Batch);
        // SAFETY: a Batch is made by BatchBuffer::inbound alone, which wrote a head there; the read is
        // unaligned.
        unsafe { ptr::read_unaligned(self.data.sub(BATCH_HEAD_LEN).cast::<BatchHead>()) }
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

/// What lies before a [`Kind::Batch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct BatchHead {
    /// Comes back in the answer, as [`AckEntry::request_id`].
    pub tag: u64,
    /// Bytes of the batch.
    pub len: u32,
    /// Index of the ack ring.
    pub ring: u32,
}

const BATCH_HEAD_LEN: usize = size_of::<BatchHead>();

/// Memory of a kernel thread that holds one record batch for a shard. It stays the thread's: it is given
/// back by the batch's answer, which is sent at every acknowledgement level and after the shard's last
/// use of it.
#[derive(Debug)]
pub struct BatchBuffer(NonNull<[u8]>);

// SAFETY: it owns plain bytes.
unsafe impl Send for BatchBuffer {}

impl BatchBuffer {
    /// Copies a batch.
    ///
    /// # Panics
    /// When it has 4 GiB or more.
    pub fn new(batch: &[u8]) -> Self {
        assert!(u32::try_from(batch.len()).is_ok(), "a batch of 4 GiB");
        let mut bytes = Vec::with_capacity(BATCH_HEAD_LEN + batch.len());
        bytes.resize(BATCH_HEAD_LEN, 0);
        bytes.extend_from_slice(batch);
        // A Box would claim to be the only way to its bytes each time it is moved.
        Self(NonNull::from(Box::leak(bytes.into_boxed_slice())))
    }

    /// The batch.
    pub fn batch(&self) -> &[u8] {
        // SAFETY: the bytes are this buffer's until it is dropped; a shard that has them only reads.
        let bytes = unsafe { self.0.as_ref() };
        &bytes[BATCH_HEAD_LEN..]
    }

    /// The batch, for changes before it is handed over.
    pub fn batch_mut(&mut self) -> &mut [u8] {
        // SAFETY: the bytes are this buffer's alone (contract of `inbound`).
        let bytes = unsafe { self.0.as_mut() };
        &mut bytes[BATCH_HEAD_LEN..]
    }

    /// Hands the batch over: to shard-local `partition`, its answer to ack ring `ring`. `acks`: −1 for an
    /// answer when it is durable, else when it is staged.
    ///
    /// # Safety
    /// The buffer is neither changed nor dropped before the answer with this tag has been taken from the ring,
    /// or the shard has closed.
    pub unsafe fn inbound(
        &mut self,
        tag: u64,
        ring: u32,
        partition: u32,
        time_ns: i64,
        acks: i8,
    ) -> Inbound {
        let head = BatchHead {
            tag,
            len: (self.0.len() - BATCH_HEAD_LEN) as u32,
            ring,
        };
        let start = self.0.as_ptr().cast::<u8>();
        // SAFETY: the buffer begins with BATCH_HEAD_LEN bytes of its own; the write is unaligned. The data
        // behind it stay as they are until the answer (contract).
        unsafe {
            ptr::write_unaligned(start.cast::<BatchHead>(), head);
            let data = start.add(BATCH_HEAD_LEN);
            Inbound::new(0, data, 0, time_ns, partition, Kind::Batch, acks)
        }
    }
}

impl Drop for BatchBuffer {
    fn drop(&mut self) {
        // SAFETY: made by leaking a Box, and nobody else drops it.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
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
