//! `taffrail verify`: reads every file of a store and says what is not as it should be.

use std::io::Write;
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};

use super::CliResult;
use crate::storage::verify::{Severity, verify};

/// Check the files of a store: every block and frame, every record batch, every offset
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of the store
    folder: PathBuf,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Fails when something durable is damaged; a torn end, which the next start cuts off, is fine.
pub fn run(args: &Args) -> CliResult {
    // Shown on a terminal only; indicatif sees to that.
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {wide_msg}",
    )?);
    let report = verify(&args.folder, |progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        if let Some(name) = progress.path.file_name() {
            bar.set_message(name.to_string_lossy().into_owned());
        }
    });
    bar.finish_and_clear();
    let report = report?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &report)?;
        writeln!(out)?;
    } else {
        for finding in &report.findings {
            let kind = match finding.severity {
                Severity::TornTail => "torn end",
                Severity::Damage => "DAMAGE",
            };
            writeln!(
                out,
                "{kind}: {}, byte {}: {}",
                finding.path.display(),
                finding.position,
                finding.what
            )?;
        }
        writeln!(
            out,
            "{} shards ({} closed cleanly), {} segments and {} prepared, {} frames with {} batches and {} records, {} bytes; {} SSTs with {} batches and {} records, {} bytes",
            report.shards,
            report.clean,
            report.segments,
            report.prepared,
            report.frames,
            report.batches,
            report.records,
            report.bytes,
            report.ssts,
            report.sst_batches,
            report.sst_records,
            report.sst_bytes
        )?;
    }
    if report.is_sound() {
        Ok(())
    } else {
        Err(format!(
            "{} is damaged; what is whole can still be read",
            args.folder.display()
        )
        .into())
    }
}
