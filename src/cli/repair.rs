//! `taffrail repair`: makes the manifests of a stopped store anew where they are missing or damaged.

use std::io::Write;
use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};

use super::CliResult;
use crate::storage::Catalog;
use crate::storage::lsm::repair::ShardRepair;
use crate::storage::repair::repair;

/// Make a missing or damaged manifest anew from the files of a stopped store; destroys nothing
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of the store
    folder: PathBuf,
    /// Say what would be done and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Prints what was found, what is left out and why.
pub fn run(args: &Args) -> CliResult {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template(
        "{bytes} {bytes_per_sec} {wide_msg}",
    )?);
    let repairs = repair(&args.folder, args.dry_run, |path, bytes| {
        bar.inc(bytes);
        if let Some(name) = path.file_name() {
            bar.set_message(name.to_string_lossy().into_owned());
        }
    });
    bar.finish_and_clear();
    let repairs = repairs?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &repairs)?;
        writeln!(out)?;
        return Ok(());
    }
    let catalog = Catalog::open_read_only(&args.folder)?;
    for repair in &repairs {
        print(repair, &catalog, args.dry_run, &mut out)?;
    }
    if repairs.iter().all(|repair| repair.problem.is_none()) {
        writeln!(
            out,
            "nothing to repair in {} shards; `taffrail verify` checks the files themselves",
            repairs.len()
        )?;
    } else if args.dry_run {
        writeln!(out, "nothing was changed (--dry-run)")?;
    } else {
        writeln!(
            out,
            "repaired; check it with `taffrail verify {}`",
            args.folder.display()
        )?;
    }
    Ok(())
}

fn print(
    repair: &ShardRepair,
    catalog: &Catalog,
    dry_run: bool,
    out: &mut impl Write,
) -> CliResult {
    let Some(problem) = &repair.problem else {
        writeln!(out, "shard {}: sound", repair.shard)?;
        return Ok(());
    };
    writeln!(out, "shard {}: {problem}", repair.shard)?;
    for note in &repair.notes {
        writeln!(out, "  note: {note}")?;
    }
    let name = |topic: u32| {
        catalog
            .topic_by_id(topic)
            .map_or_else(|| format!("topic {topic}"), |topic| topic.name.clone())
    };
    for kept in &repair.kept {
        writeln!(
            out,
            "  uses {}: LSN {} to {}, {} records, {} bytes",
            kept.path.display(),
            kept.lsn_start,
            kept.lsn_end,
            kept.records,
            kept.bytes
        )?;
        for damage in &kept.damage {
            writeln!(
                out,
                "    DAMAGE at {damage}; the rest of the file is served"
            )?;
        }
    }
    for left in &repair.left_out {
        writeln!(
            out,
            "  leaves out {}: {}; kept as {}",
            left.path.display(),
            left.why,
            left.becomes.display()
        )?;
    }
    match repair.log {
        Some((begins, ends)) => writeln!(
            out,
            "  the log is there from LSN {begins} to {ends}; before {} it is in the SSTs",
            repair.flushed_lsn
        )?,
        None => writeln!(out, "  there is no log")?,
    }
    for absent in &repair.absent {
        writeln!(
            out,
            "  {} partition {}: offsets {} to {} are in no file (compacted away, or lost)",
            name(absent.topic),
            absent.partition,
            absent.first,
            absent.end - 1
        )?;
    }
    for (path, becomes) in &repair.old_manifests {
        writeln!(out, "  {} is kept as {}", path.display(), becomes.display())?;
    }
    writeln!(
        out,
        "  {} {}: {} SSTs, first offsets of {} partitions",
        if dry_run { "would write" } else { "wrote" },
        repair.manifest.display(),
        repair.kept.len(),
        repair.starts
    )?;
    Ok(())
}
