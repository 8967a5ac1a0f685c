//! `taffrail backup` and `taffrail restore`: a consistent copy of a store, and a store made of it.

use std::io::Write;
use std::path::PathBuf;

use bytesize::ByteSize;

use super::{CliResult, ServerArgs};
use crate::control::client::{ControlClient, ControlError};
use crate::storage::backup::{Note, restore as restore_store, stopped};
use crate::storage::verify::verify;

/// Copy the running server's store to a folder on its machine, consistently; large files by hard links
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder to make; it does not exist, or is empty
    folder: PathBuf,
    /// Copy the files of a stopped server in this folder instead of asking a running one
    #[arg(long, value_name = "DIR", conflicts_with_all = ["socket", "config"])]
    data: Option<PathBuf>,
    /// Print what was copied as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Returns when the copy is complete and on disk.
pub fn run(args: &Args) -> CliResult {
    let note = match &args.data {
        Some(data) => stopped(data, &args.folder)?,
        None => {
            let mut client = ControlClient::connect(&args.server.socket_path()?)?;
            // The server has another working folder.
            match client.backup(&std::path::absolute(&args.folder)?) {
                Ok(note) => note,
                Err(ControlError::Refused(reason)) => return Err(reason.into()),
                Err(error) => return Err(error.into()),
            }
        }
    };
    print(&note, args.json)?;
    if !args.json {
        println!(
            "`taffrail restore {} DIR` makes a store of it",
            args.folder.display()
        );
    }
    Ok(())
}

/// Make a store of a backup, and check it
#[derive(Debug, clap::Args)]
pub struct RestoreArgs {
    /// Folder of the backup
    backup: PathBuf,
    /// Folder of the new store: storage.path of the server's configuration; it does not exist, or is empty
    folder: PathBuf,
    /// Do not read and check all files afterwards
    #[arg(long)]
    no_verify: bool,
    /// Print what was made as JSON
    #[arg(long)]
    json: bool,
}

/// Returns when the store is complete, on disk and, unless told otherwise, checked.
pub fn restore(args: &RestoreArgs) -> CliResult {
    let note = restore_store(&args.backup, &args.folder)?;
    print(&note, args.json)?;
    if args.no_verify {
        return Ok(());
    }
    let report = verify(&args.folder, |_| ())?;
    if let Some(first) = report.findings.first().filter(|_| !report.is_sound()) {
        return Err(format!(
            "the store is damaged, as the backup is: {}, byte {}: {}; `taffrail verify {}` lists all",
            first.path.display(),
            first.position,
            first.what,
            args.folder.display()
        )
        .into());
    }
    if !args.json {
        println!(
            "checked: {} records in SSTs, {} in the log",
            report.sst_records, report.records
        );
    }
    Ok(())
}

fn print(note: &Note, json: bool) -> CliResult {
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer(&mut out, note)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(
        out,
        "store {} as of {}: {} shards, {} SSTs of {} ({} linked, {} copied), {} of log copied",
        note.store,
        super::rfc3339(note.taken_ms),
        note.shards.len(),
        note.ssts,
        ByteSize(note.sst_bytes),
        note.linked,
        note.ssts - note.linked,
        ByteSize(note.log_bytes)
    )?;
    Ok(())
}
