//! Taffrail: a kernel-bypass message log.
//!
//! Arrows between modules point down only: `cli` → (`serve`, `shard`, `net`, `client`) →
//! (`storage`, `wire`, `eal`, `memory`). `storage` and `wire` know nothing of DPDK; without the
//! feature `dpdk` they, the client library and the offline tools build on any Linux machine.

pub mod broker;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
#[cfg(feature = "dpdk")]
pub mod eal;
pub mod fallback;
pub mod memory;
pub mod net;
#[cfg(feature = "dpdk")]
pub mod serve;
pub mod shard;
pub mod storage;
pub mod telemetry;
#[cfg(feature = "dpdk")]
pub mod topology;
pub mod wire;
