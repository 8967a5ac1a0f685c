//! The control socket: how the operator's commands ask a running server.
//!
//! A Unix stream socket, readable by its owner only. A request is one line of JSON; the answer is one
//! line of JSON, and where it says so a number of raw bytes after it.

pub mod client;
pub mod keys;
pub mod names;
pub mod protocol;
mod read;
pub mod server;

pub use read::{find, read};
