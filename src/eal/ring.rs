//! DPDK's ring. The data path uses `memory::spsc`, which is faster; this one speaks with DPDK and
//! stands beside it in the benchmark.

use std::ffi::CString;
use std::ptr::NonNull;

use super::environment::{EalError, Environment, last_error};

/// A single-producer, single-consumer ring of pointer-sized values.
#[derive(Debug)]
pub struct Ring {
    raw: NonNull<dpdk_sys::rte_ring>,
    _environment: Environment,
}

// SAFETY: a ring may be used from two threads, one on each end; which is the callers' contract.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    /// A ring with room for `capacity` − 1 values; `capacity` is a power of two.
    pub fn new(environment: &Environment, name: &str, capacity: u32) -> Result<Self, EalError> {
        let c_name = CString::new(name).map_err(|_| EalError::Argument(name.to_owned()))?;
        let flags = dpdk_sys::RING_F_SP_ENQ | dpdk_sys::RING_F_SC_DEQ;
        // SAFETY: the name is NUL-terminated and copied; all else is plain numbers.
        let raw = unsafe { dpdk_sys::rte_ring_create(c_name.as_ptr(), capacity, -1, flags) };
        let raw = NonNull::new(raw).ok_or_else(|| EalError::Call {
            what: format!("ring {name} with {capacity} slots cannot be made (a power of two?)"),
            reason: last_error(),
        })?;
        Ok(Self {
            raw,
            _environment: environment.clone(),
        })
    }

    /// Enqueues a prefix of `values`; returns its length.
    ///
    /// # Safety
    /// Only one thread at a time enqueues.
    #[inline]
    pub unsafe fn enqueue_burst(&self, values: &[usize]) -> usize {
        // SAFETY: the array holds pointer-sized values; the one producer is the caller's contract.
        unsafe {
            dpdk_sys::tf_ring_enqueue_burst(
                self.raw.as_ptr(),
                values.as_ptr().cast(),
                values.len() as u32,
            ) as usize
        }
    }

    /// Dequeues into a prefix of `values`; returns its length.
    ///
    /// # Safety
    /// Only one thread at a time dequeues.
    #[inline]
    pub unsafe fn dequeue_burst(&self, values: &mut [usize]) -> usize {
        // SAFETY: the array holds pointer-sized values; the one consumer is the caller's contract.
        unsafe {
            dpdk_sys::tf_ring_dequeue_burst(
                self.raw.as_ptr(),
                values.as_mut_ptr().cast(),
                values.len() as u32,
            ) as usize
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: self is the last user.
        unsafe { dpdk_sys::rte_ring_free(self.raw.as_ptr()) };
    }
}
