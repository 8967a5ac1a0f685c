//! The `taffrail` command: arguments, and what the subcommands share.
//!
//! Results go to standard output, progress and the log to standard error, so that output can be
//! piped. Exit codes: 0 done, 1 failed, 2 wrong usage (clap's).

mod backup;
mod check;
mod consume;
mod export;
mod group;
mod inspect;
pub mod produce;
mod read;
mod repair;
mod send_udp;
#[cfg(feature = "dpdk")]
mod serve;
mod source;
mod stats;
mod table;
mod topic;
mod user;
mod verify;

use std::error::Error;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use clap::{Parser, Subcommand};

use crate::config::{Config, DEFAULT_CONTROL_SOCKET};

/// What a subcommand ends with.
pub type CliResult = Result<(), Box<dyn Error + Send + Sync>>;

/// A kernel-bypass message log: UDP and TCP in at line rate, durable before acknowledged, read by
/// offset, time and key.
#[derive(Debug, Parser)]
#[command(name = "taffrail", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[cfg(feature = "dpdk")]
    Serve(serve::Args),
    Check(check::Args),
    Topic(topic::Args),
    Group(group::Args),
    Produce(produce::Args),
    Consume(consume::Args),
    Stats(stats::Args),
    Read(read::Args),
    SendUdp(send_udp::Args),
    Verify(verify::Args),
    Inspect(inspect::Args),
    Repair(repair::Args),
    Export(export::Args),
    Backup(backup::Args),
    Restore(backup::RestoreArgs),
    User(user::Args),
}

/// Runs the subcommand and reports its error as one line.
pub fn run(cli: Cli) -> ExitCode {
    start_log();
    let result = match cli.command {
        #[cfg(feature = "dpdk")]
        Command::Serve(args) => serve::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Topic(args) => topic::run(&args),
        Command::Group(args) => group::run(&args),
        Command::Produce(args) => produce::run(&args),
        Command::Consume(args) => consume::run(&args),
        Command::Stats(args) => stats::run(&args),
        Command::Read(args) => read::run(&args),
        Command::SendUdp(args) => send_udp::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Repair(args) => repair::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Backup(args) => backup::run(&args),
        Command::Restore(args) => backup::restore(&args),
        Command::User(args) => user::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads our output has left (`| head`): nothing is wrong.
        Err(error) if is_broken_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(cause) = source {
                let cause_text = cause.to_string();
                if !text.contains(&cause_text) {
                    text = format!("{text}: {cause_text}");
                }
                source = cause.source();
            }
            eprintln!("taffrail: {text}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// The log goes to standard error; `TAFFRAIL_LOG` chooses its level (default `info`).
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TAFFRAIL_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

/// A time in Unix milliseconds, for people.
fn rfc3339(unix_ms: i64) -> String {
    let time = UNIX_EPOCH + Duration::from_millis(u64::try_from(unix_ms).unwrap_or(0));
    humantime::format_rfc3339_millis(time).to_string()
}

/// How to find the running server.
#[derive(Debug, Clone, clap::Args)]
pub struct ServerArgs {
    /// Control socket of the running server
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    pub socket: Option<PathBuf>,
    /// Configuration of the running server, which names its control socket
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl ServerArgs {
    /// The control socket's path.
    pub fn socket_path(&self) -> Result<PathBuf, Box<dyn Error + Send + Sync>> {
        match (&self.socket, &self.config) {
            (Some(path), _) => Ok(path.clone()),
            (None, Some(file)) => Ok(Config::load(file)?.control_socket),
            (None, None) => Ok(PathBuf::from(DEFAULT_CONTROL_SOCKET)),
        }
    }
}
