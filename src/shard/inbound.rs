//! What an rx lcore hands to a shard, and the way back to the sender.
//!
//! Invariant: an [`Inbound`] borrows memory of its owner (an mbuf); between its construction and
//! the call of [`Release::release`] with that owner nobody but the shard touches that memory, and
//! the shard releases each owner exactly once.

use std::ptr;

use crate::wire::datagram::{AckEntry, PRODUCE_HEADER_LEN};

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
        self.len as usize
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
        unsafe { std::slice::from_raw_parts(self.data, self.len as usize) }
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
