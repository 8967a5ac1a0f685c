//! Memory that the data path works in: rings, hugepage regions, pools.

pub mod allocator;
pub mod spsc;
pub mod wake;
