//! The `taffrail` command; each subcommand is a file under `cli/`.
fn main() {}
