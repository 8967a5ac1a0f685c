//! The `taffrail` command; each subcommand is a file under `cli/`.

use std::process::ExitCode;

use clap::Parser;
use taffrail::cli::Cli;
use taffrail::memory::allocator::Counting;

/// So that `taffrail stats` can tell what is allocated from what the C library holds back.
#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    taffrail::cli::run(Cli::parse())
}
