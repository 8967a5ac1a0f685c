//! Memory that the data path works in: rings, hugepage regions, pools; and the accounts of all of it.

pub mod allocator;
pub mod budget;
pub mod pool;
pub mod process;
pub mod spsc;
pub mod wake;
