//! Where a shard's buffers go when it is through with them: to DPDK's pools, or to the thread of kernel UDP.
//!
//! Invariant: the handle of a kernel buffer is odd and an mbuf's, an address, is even; so each goes back to its owner.

use crate::net::buffers::{Return, number};
use crate::net::rx::MbufRelease;
use crate::shard::Release;

/// Of one shard.
pub(super) struct BufferRelease {
    kernel: Option<Return>,
}

impl BufferRelease {
    /// `kernel`: the way back to the thread of kernel UDP, where there is one.
    pub(super) fn new(kernel: Option<Return>) -> Self {
        Self { kernel }
    }
}

impl Release for BufferRelease {
    #[inline]
    fn release(&mut self, owners: &[usize]) {
        let Some(kernel) = &mut self.kernel else {
            return MbufRelease.release(owners);
        };
        let is_kernel = |owner: &usize| number(*owner).is_some();
        for run in owners.chunk_by(|a, b| is_kernel(a) == is_kernel(b)) {
            if is_kernel(&run[0]) {
                kernel.give(run);
            } else {
                MbufRelease.release(run);
            }
        }
    }
}
