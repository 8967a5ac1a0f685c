//! `taffrail serve`: puts the parts together and keeps them running.

pub mod preflight;
