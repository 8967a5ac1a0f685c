//! Safe types over DPDK. Outside this folder nothing names `dpdk_sys`.
//!
//! Invariants: an [`Environment`] lives at least as long as everything made under it (the types hold
//! a clone of it); a queue handle exists once and is used by one thread at a time; an mbuf has one
//! owner.

pub mod affinity;
mod environment;
pub mod lcore;
mod mbuf;
mod mempool;
mod port;
mod ring;

pub use environment::{EalArgs, EalError, Environment};
pub use mbuf::{BURST, Mbuf, MbufHandle, RxBurst, TxBurst, free_handles};
pub use mempool::{HEADROOM, Mempool};
pub use port::{Link, Port, PortConfig, PortError, PortStats, RxQueue, TxQueue};
pub use ring::Ring;

/// The time stamp counter, in cycles.
#[inline(always)]
pub fn tsc() -> u64 {
    // SAFETY: reads a counter.
    unsafe { dpdk_sys::tf_rdtsc() }
}

/// Cycles of the time stamp counter a second.
pub fn tsc_hz() -> u64 {
    // SAFETY: reads a value that EAL measured at its start.
    unsafe { dpdk_sys::rte_get_tsc_hz() }
}

/// Tells the CPU that this is a spin loop.
#[inline(always)]
pub fn pause() {
    std::hint::spin_loop();
}
