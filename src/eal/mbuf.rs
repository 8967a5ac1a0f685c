//! Mbufs: packet buffers. All knowledge of their layout is in this file.
//!
//! Fields are read from Rust; DPDK is called once a burst.

use std::ptr::NonNull;

use dpdk_sys::rte_mbuf;

/// Packets received or sent by one call. 32 is what drivers vectorise for; 64 halves the cost of the
/// call where a queue runs full.
pub const BURST: usize = 64;

/// An mbuf that something outside DPDK owns, as a plain number; 0 is none.
pub type MbufHandle = usize;

/// A packet buffer with one segment, freed when dropped.
#[derive(Debug)]
#[repr(transparent)]
pub struct Mbuf(NonNull<rte_mbuf>);

// SAFETY: an mbuf may be used on any thread by its one owner.
unsafe impl Send for Mbuf {}

impl Mbuf {
    /// # Safety
    /// `raw` is a valid mbuf, and nobody else owns it.
    #[inline(always)]
    pub(super) unsafe fn from_raw(raw: NonNull<rte_mbuf>) -> Self {
        Self(raw)
    }

    /// The bytes of the packet.
    #[inline]
    pub fn data(&self) -> &[u8] {
        // SAFETY: self owns the mbuf, and data_off and data_len describe initialised memory of it.
        unsafe {
            let m = self.0.as_ptr();
            std::slice::from_raw_parts(
                (*m).buf_addr.cast::<u8>().add((*m).data_off as usize),
                (*m).data_len as usize,
            )
        }
    }

    /// All bytes that a packet written into this mbuf may have.
    #[inline]
    pub fn room(&mut self) -> &mut [u8] {
        // SAFETY: self owns the mbuf; from data_off to buf_len the buffer belongs to it. The memory is
        // hugepage memory that was zeroed or written before, so it is initialised.
        unsafe {
            let m = self.0.as_ptr();
            let offset = (*m).data_off as usize;
            std::slice::from_raw_parts_mut(
                (*m).buf_addr.cast::<u8>().add(offset),
                (*m).buf_len as usize - offset,
            )
        }
    }

    /// Says how long the packet in [`Mbuf::room`] is.
    ///
    /// # Panics
    /// When it is longer than the room.
    #[inline]
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.room().len(), "packet longer than its mbuf");
        // SAFETY: self owns the mbuf; the length is within its buffer.
        unsafe {
            let m = self.0.as_ptr();
            (*m).data_len = len as u16;
            (*m).pkt_len = len as u32;
        }
    }

    /// Gives up ownership; [`free_handles`] takes it back.
    #[inline]
    pub fn into_handle(self) -> MbufHandle {
        let raw = self.0.as_ptr() as usize;
        std::mem::forget(self);
        raw
    }
}

impl Drop for Mbuf {
    fn drop(&mut self) {
        // SAFETY: self owns the mbuf and is gone after this.
        unsafe { dpdk_sys::tf_mbuf_free(self.0.as_ptr()) };
    }
}

/// Frees mbufs in bulk.
///
/// # Safety
/// Each handle came from [`RxBurst::take`] or [`Mbuf::into_handle`] and is freed once; nothing uses
/// the mbufs' memory any more.
#[inline]
pub unsafe fn free_handles(handles: &[MbufHandle]) {
    // SAFETY: a handle is a pointer to an mbuf that the caller owns; the call writes nothing into the
    // array.
    unsafe {
        dpdk_sys::tf_mbuf_free_bulk(handles.as_ptr().cast_mut().cast(), handles.len() as u32)
    };
}

/// Packets of one receive call. What is not taken is freed by [`RxBurst::free_rest`] or on drop.
#[derive(Debug)]
pub struct RxBurst {
    pub(super) mbufs: [*mut rte_mbuf; BURST],
    pub(super) len: usize,
}

// SAFETY: the burst owns its mbufs.
unsafe impl Send for RxBurst {}

impl Default for RxBurst {
    fn default() -> Self {
        Self::new()
    }
}

impl RxBurst {
    /// An empty burst.
    pub const fn new() -> Self {
        Self {
            mbufs: [std::ptr::null_mut(); BURST],
            len: 0,
        }
    }

    /// Number of packets received.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was received.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Asks the CPU to fetch the mbuf of packet `i`, so that its fields are there soon.
    #[inline(always)]
    pub fn prefetch_mbuf(&self, i: usize) {
        if i < self.len {
            prefetch(self.mbufs[i].cast());
        }
    }

    /// Asks the CPU to fetch the first bytes of packet `i`.
    #[inline(always)]
    pub fn prefetch_data(&self, i: usize) {
        if i < self.len {
            // SAFETY: entries below len are valid mbufs unless taken, and taken ones are still mapped.
            unsafe {
                let m = self.mbufs[i];
                if !m.is_null() {
                    prefetch((*m).buf_addr.cast::<u8>().add((*m).data_off as usize));
                }
            }
        }
    }

    /// The mbuf of packet `i`.
    ///
    /// # Panics
    /// When there is no such packet or it was taken.
    #[inline(always)]
    fn mbuf(&self, i: usize) -> *mut rte_mbuf {
        let m = self.mbufs[..self.len][i];
        assert!(!m.is_null(), "packet was taken");
        m
    }

    /// The bytes of packet `i` in its first segment.
    #[inline(always)]
    pub fn frame(&self, i: usize) -> &[u8] {
        let m = self.mbuf(i);
        // SAFETY: the burst owns the mbuf; data_off and data_len describe what the driver wrote.
        unsafe {
            std::slice::from_raw_parts(
                (*m).buf_addr.cast::<u8>().add((*m).data_off as usize),
                (*m).data_len as usize,
            )
        }
    }

    /// Address of the first byte of packet `i`, and how many writable bytes lie before it.
    #[inline(always)]
    pub fn frame_start(&mut self, i: usize) -> (*mut u8, usize) {
        let m = self.mbuf(i);
        // SAFETY: the burst owns the mbuf; the start lies in its buffer.
        unsafe {
            (
                (*m).buf_addr.cast::<u8>().add((*m).data_off as usize),
                (*m).data_off as usize,
            )
        }
    }

    /// Whether packet `i` is in one piece.
    #[inline(always)]
    pub fn one_segment(&self, i: usize) -> bool {
        // SAFETY: the burst owns the mbuf.
        unsafe { (*self.mbuf(i)).nb_segs == 1 }
    }

    /// Whether the NIC vouches for (IP header checksum, UDP checksum) of packet `i`.
    ///
    /// DPDK's `L4_CKSUM_NONE` vouches too: the data is known to be whole, while the checksum field holds
    /// something else. Virtio says so of packets that the host's own kernel sent, whose checksum no
    /// device has filled in.
    #[inline(always)]
    pub fn checksums_good(&self, i: usize) -> (bool, bool) {
        // SAFETY: the burst owns the mbuf.
        let flags = unsafe { (*self.mbuf(i)).ol_flags };
        vouched(flags)
    }

    /// The handle of packet `i`, for whoever will own it once it is taken.
    #[inline(always)]
    pub fn handle(&self, i: usize) -> MbufHandle {
        self.mbuf(i) as usize
    }

    /// Takes packet `i` out of the burst; the handle goes to [`free_handles`] later.
    #[inline(always)]
    pub fn take(&mut self, i: usize) -> MbufHandle {
        let m = self.mbuf(i);
        self.mbufs[i] = std::ptr::null_mut();
        m as usize
    }

    /// Frees what was not taken, in bulk, and empties the burst.
    #[inline]
    pub fn free_rest(&mut self) {
        let mut kept = 0;
        for i in 0..self.len {
            let m = self.mbufs[i];
            self.mbufs[kept] = m;
            kept += usize::from(!m.is_null());
        }
        self.len = 0;
        if kept > 0 {
            // SAFETY: the first `kept` entries are mbufs that the burst owned until now.
            unsafe { dpdk_sys::tf_mbuf_free_bulk(self.mbufs.as_mut_ptr(), kept as u32) };
        }
    }
}

impl Drop for RxBurst {
    fn drop(&mut self) {
        self.free_rest();
    }
}

/// Packets to be sent together.
#[derive(Debug)]
pub struct TxBurst {
    pub(super) mbufs: [*mut rte_mbuf; BURST],
    pub(super) len: usize,
}

// SAFETY: the burst owns its mbufs.
unsafe impl Send for TxBurst {}

impl Default for TxBurst {
    fn default() -> Self {
        Self::new()
    }
}

impl TxBurst {
    /// An empty burst.
    pub const fn new() -> Self {
        Self {
            mbufs: [std::ptr::null_mut(); BURST],
            len: 0,
        }
    }

    /// Number of packets waiting.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether no further packet fits.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.len == BURST
    }

    /// Adds a packet; gives it back when the burst is full.
    #[inline]
    pub fn push(&mut self, mbuf: Mbuf) -> Result<(), Mbuf> {
        if self.is_full() {
            return Err(mbuf);
        }
        self.mbufs[self.len] = mbuf.into_handle() as *mut rte_mbuf;
        self.len += 1;
        Ok(())
    }
}

impl Drop for TxBurst {
    fn drop(&mut self) {
        // SAFETY: the first `len` entries are mbufs that the burst owns.
        unsafe { dpdk_sys::tf_mbuf_free_bulk(self.mbufs.as_mut_ptr(), self.len as u32) };
    }
}

/// Which checksums (IP header, UDP) the receive flags of an mbuf vouch for.
#[inline(always)]
fn vouched(flags: u64) -> (bool, bool) {
    let ip = flags & dpdk_sys::RTE_MBUF_F_RX_IP_CKSUM_MASK;
    let l4 = flags & dpdk_sys::RTE_MBUF_F_RX_L4_CKSUM_MASK;
    (
        ip == dpdk_sys::RTE_MBUF_F_RX_IP_CKSUM_GOOD,
        l4 == dpdk_sys::RTE_MBUF_F_RX_L4_CKSUM_GOOD || l4 == dpdk_sys::RTE_MBUF_F_RX_L4_CKSUM_NONE,
    )
}

/// Asks the CPU to fetch a cache line for reading.
#[inline(always)]
fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no effect on memory, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch(address.cast(), std::arch::x86_64::_MM_HINT_T0);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_to_be_whole_is_vouched_for() {
        use dpdk_sys::{
            RTE_MBUF_F_RX_IP_CKSUM_BAD, RTE_MBUF_F_RX_IP_CKSUM_GOOD, RTE_MBUF_F_RX_L4_CKSUM_BAD,
            RTE_MBUF_F_RX_L4_CKSUM_GOOD, RTE_MBUF_F_RX_L4_CKSUM_NONE,
        };
        assert_eq!(vouched(0), (false, false));
        assert_eq!(vouched(RTE_MBUF_F_RX_L4_CKSUM_NONE), (false, true));
        assert_eq!(
            vouched(RTE_MBUF_F_RX_IP_CKSUM_GOOD | RTE_MBUF_F_RX_L4_CKSUM_GOOD),
            (true, true)
        );
        assert_eq!(
            vouched(RTE_MBUF_F_RX_IP_CKSUM_BAD | RTE_MBUF_F_RX_L4_CKSUM_BAD),
            (false, false)
        );
    }
}
