//! The `taffrail` command; each subcommand is a file under `cli/`.

use std::process::ExitCode;

use clap::Parser;
use taffrail::cli::Cli;

fn main() -> ExitCode {
    taffrail::cli::run(Cli::parse())
}
