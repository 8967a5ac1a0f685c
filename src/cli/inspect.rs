//! `taffrail inspect`: shows what a WAL segment holds, frame by frame.

use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressStyle};

use super::CliResult;
use crate::storage::inspect::{EntryInfo, FrameInfo, Item, inspect};

/// Show the frames and entries of a WAL segment
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file, shard-000/wal-0000000000000000.seg
    file: PathBuf,
    /// One JSON object a frame
    #[arg(long)]
    json: bool,
    /// Frames only, without their entries
    #[arg(long, conflicts_with = "json")]
    frames: bool,
}

/// Prints header, frames and entries; damage is shown where it lies and passed over.
pub fn run(args: &Args) -> CliResult {
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} {bytes}/{total_bytes}",
    )?);
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut result: CliResult = Ok(());
    let mut damaged = 0u64;
    let header = inspect(&args.file, |item| {
        if result.is_err() {
            return;
        }
        result = match item {
            Item::Frame(frame) if args.json => json(frame, &mut out),
            Item::Frame(frame) => text(frame, args.frames, &mut out),
            Item::Damage { position, error } => {
                damaged += 1;
                writeln!(out, "byte {position}: {error}").map_err(Into::into)
            }
            Item::Progress { done, total } => {
                bar.set_length(total);
                bar.set_position(done);
                Ok(())
            }
        };
    });
    bar.finish_and_clear();
    result?;
    let header = header?;
    if !args.json {
        writeln!(
            out,
            "segment of shard {} of store {:032x}: {} bytes from LSN {}, first frame {}",
            header.id.shard, header.id.store, header.size, header.base, header.first_seq
        )?;
    }
    out.flush()?;
    if damaged > 0 {
        tracing::info!(
            "{damaged} places hold no whole frame; `taffrail verify` tells a torn end from damage"
        );
    }
    Ok(())
}

fn json(frame: &FrameInfo, out: &mut impl Write) -> CliResult {
    serde_json::to_writer(&mut *out, frame)?;
    writeln!(out)?;
    Ok(())
}

fn text(frame: &FrameInfo, frames_only: bool, out: &mut impl Write) -> CliResult {
    let time = UNIX_EPOCH + Duration::from_millis(u64::try_from(frame.time_ms).unwrap_or(0));
    writeln!(
        out,
        "byte {}: frame {} of {} bytes, {} entries, {}{}",
        frame.position,
        frame.seq,
        frame.size,
        frame.entries.len(),
        humantime::format_rfc3339_millis(time),
        if frame.clean { ", clean stop" } else { "" }
    )?;
    if frames_only {
        return Ok(());
    }
    for entry in &frame.entries {
        match entry {
            EntryInfo::Snapshot {
                index,
                count,
                bytes,
            } => {
                writeln!(
                    out,
                    "  snapshot part {} of {count}, {bytes} bytes",
                    index + 1
                )?;
            }
            EntryInfo::Batch {
                topic,
                partition,
                bytes,
                base_offset,
                records,
                producer_id,
                base_sequence,
                control,
                error,
                ..
            } => {
                write!(
                    out,
                    "  topic {topic} partition {partition} offset {base_offset}: {records} records, {bytes} bytes"
                )?;
                if *producer_id >= 0 {
                    write!(out, ", producer {producer_id} sequence {base_sequence}")?;
                }
                if *control {
                    write!(out, ", control batch")?;
                }
                if let Some(error) = error {
                    write!(out, ", DAMAGED: {error}")?;
                }
                writeln!(out)?;
            }
        }
    }
    Ok(())
}
