//! Pools of mbufs.

use std::ffi::CString;
use std::ptr::NonNull;
use std::sync::Arc;

use super::environment::{EalError, Environment, last_error};
use super::mbuf::Mbuf;

/// Bytes before the packet in a fresh mbuf.
pub const HEADROOM: usize = dpdk_sys::RTE_PKTMBUF_HEADROOM as usize;
/// Mbufs that an lcore keeps for itself, so that most allocations touch no shared memory.
const CACHE: u32 = 256;

/// A pool of mbufs in hugepage memory; clones share it.
#[derive(Debug, Clone)]
pub struct Mempool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    raw: NonNull<dpdk_sys::rte_mempool>,
    count: u32,
    _environment: Environment,
}

// SAFETY: DPDK's mempools are made for use by several threads at once; the default operations are
// multi-producer, multi-consumer.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Mempool {
    /// Makes a pool of `count` mbufs with `data_room` bytes each, [`HEADROOM`] included, on NUMA
    /// node `node` (`None`: any). Costs about `count` × (`data_room` + 192) bytes.
    pub fn new(
        environment: &Environment,
        name: &str,
        count: u32,
        data_room: u16,
        node: Option<u32>,
    ) -> Result<Self, EalError> {
        let c_name = CString::new(name).map_err(|_| EalError::Argument(name.to_owned()))?;
        let node = node.map_or(-1, |n| n as i32);
        let cache = CACHE.min(count / 2);
        // SAFETY: the name is NUL-terminated and copied; all else is plain numbers.
        let raw = unsafe {
            dpdk_sys::rte_pktmbuf_pool_create(c_name.as_ptr(), count, cache, 0, data_room, node)
        };
        let raw = NonNull::new(raw).ok_or_else(|| EalError::Call {
            what: format!(
                "mempool {name} of {count} mbufs with {data_room} bytes ({} MiB) cannot be made; raise [eal] memory or reserve hugepages (scripts/hugepages.sh apply)",
                (u64::from(count) * (u64::from(data_room) + 192)) >> 20
            ),
            reason: last_error(),
        })?;
        Ok(Self {
            inner: Arc::new(Inner {
                raw,
                count,
                _environment: environment.clone(),
            }),
        })
    }

    /// An empty mbuf, unless the pool has none left. Costs a few nanoseconds on an lcore.
    #[inline]
    pub fn allocate(&self) -> Option<Mbuf> {
        // SAFETY: the pool is valid as long as self.
        let raw = unsafe { dpdk_sys::tf_mbuf_alloc(self.inner.raw.as_ptr()) };
        // SAFETY: a fresh mbuf has no other owner.
        NonNull::new(raw).map(|raw| unsafe { Mbuf::from_raw(raw) })
    }

    /// Mbufs in the pool and in lcores' caches. Walks the caches: for statistics only.
    pub fn available(&self) -> u32 {
        // SAFETY: the pool is valid as long as self.
        unsafe { dpdk_sys::rte_mempool_avail_count(self.inner.raw.as_ptr()) }
    }

    /// Mbufs in all.
    pub fn count(&self) -> u32 {
        self.inner.count
    }

    pub(super) fn as_ptr(&self) -> *mut dpdk_sys::rte_mempool {
        self.inner.raw.as_ptr()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: ports hold the pools of their queues, so nothing uses this one any more.
        unsafe { dpdk_sys::rte_mempool_free(self.raw.as_ptr()) };
    }
}
