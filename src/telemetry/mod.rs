//! What is counted and measured, and how it leaves the process.

mod counter;

pub use counter::Counter;
