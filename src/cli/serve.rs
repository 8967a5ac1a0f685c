//! `taffrail serve`: runs the server until SIGTERM or SIGINT; SIGHUP reads users and certificates again.

use std::path::PathBuf;

use super::CliResult;
use crate::config::Config;

/// Run the server
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The configuration file; taffrail.example.toml describes every key
    #[arg(long, value_name = "FILE", default_value = "taffrail.toml")]
    config: PathBuf,
}

/// Ends after a clean stop, or with the reason why there was none.
pub fn run(args: &Args) -> CliResult {
    let config = Config::load(&args.config)?;
    let summary = crate::serve::serve(&config, &args.config)?;
    println!(
        "stopped; of {} messages received in this run {} were stored",
        summary.received, summary.stored
    );
    Ok(())
}
