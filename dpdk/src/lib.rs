//! Raw bindings to the distribution's DPDK, and a C shim for its inline functions and per-lcore
//! variables. No policy: safe types are in Taffrail's `eal`.

#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals)]
#![allow(
    unsafe_op_in_unsafe_fn,
    unnecessary_transmutes,
    rustdoc::all,
    clippy::all
)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
