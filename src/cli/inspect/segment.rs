//! WAL segments and staging files, frame by frame.
//!
//! What is no whole frame is shown where it lies and passed over: it may be where the log ends.

use std::io::Write;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::{Args, line, time};
use crate::cli::CliResult;
use crate::shard::snapshot;
use crate::storage::inspect::{
    EntryInfo, FrameInfo, InspectError, Item, Slot, inspect, inspect_staging,
};
use crate::storage::wal::segment::SegmentError;

/// Prints header, frames and entries; damage is shown where it lies and passed over.
pub(super) fn segment(args: &Args, out: &mut impl Write) -> CliResult {
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} {bytes}/{total_bytes}",
    )?);
    let mut result: CliResult = Ok(());
    let mut damaged = 0u64;
    let header = inspect(&args.file, |item| {
        if result.is_err() {
            return;
        }
        result = match item {
            Item::Frame(frame) if args.json => json(frame, out),
            Item::Frame(frame) => text(frame, args, out),
            Item::Damage { position, error } if args.json => {
                damaged += 1;
                let what = error.to_string();
                line(
                    &json!({"kind": "no_frame", "position": position, "what": what}),
                    out,
                )
            }
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
    let header = match header {
        Err(InspectError::Segment {
            error: SegmentError::Blank,
            ..
        }) => {
            writeln!(out, "a segment that is prepared and not used yet")?;
            return Ok(());
        }
        header => header?,
    };
    if !args.json {
        writeln!(
            out,
            "segment of shard {} of store {:032x}: {} bytes from LSN {}, first frame {}{}",
            header.id.shard,
            header.id.store,
            header.size,
            header.base,
            header.first_seq,
            if header.reused {
                ", in the file of an older segment"
            } else {
                ""
            }
        )?;
    }
    if damaged > 0 {
        tracing::info!(
            "{damaged} places hold no whole frame; `taffrail verify` tells a torn end from damage"
        );
    }
    Ok(())
}

/// Prints the slots of a staging file that hold a frame.
pub(super) fn staging(args: &Args, out: &mut impl Write) -> CliResult {
    let staging = inspect_staging(&args.file)?;
    if args.json {
        line(
            &json!({
                "kind": "staging", "store": format!("{:032x}", staging.id.store), "shard": staging.id.shard,
                "boot": staging.boot, "slots": staging.slots.len(), "slot_bytes": staging.slot_bytes,
            }),
            out,
        )?;
    } else {
        writeln!(
            out,
            "staging file of shard {} of store {:032x}, of boot {}{}: {} slots of {} bytes",
            staging.id.shard,
            staging.id.store,
            staging.boot,
            if staging.this_boot {
                " (this one)"
            } else {
                ", an earlier one"
            },
            staging.slots.len(),
            staging.slot_bytes
        )?;
    }
    for (slot, number) in staging.slots.iter().zip(0..) {
        match slot {
            Slot::Free => {}
            Slot::Frame { frame, sealed } if args.json => {
                let mut value = frame_json(frame)?;
                value["slot"] = Value::from(number);
                value["sealed"] = Value::from(*sealed);
                line(&value, out)?;
            }
            Slot::Frame { frame, sealed } => {
                let open = if *sealed { "" } else { " (not sealed)" };
                write!(out, "slot {number}{open}, ")?;
                text(frame, args, out)?;
            }
            Slot::Senseless { position, error } if args.json => {
                let what = error.to_string();
                line(
                    &json!({"kind": "no_frame", "position": position, "what": what}),
                    out,
                )?;
            }
            Slot::Senseless { position, error } => {
                writeln!(out, "slot {number}, byte {position}: {error}")?;
            }
        }
    }
    Ok(())
}

/// The frame, its snapshots with what they say.
fn frame_json(frame: &FrameInfo) -> Result<Value, serde_json::Error> {
    let mut value = serde_json::to_value(frame)?;
    for (entry, at) in frame.entries.iter().zip(0usize..) {
        if let EntryInfo::Snapshot { part, .. } = entry
            && let Some(said) = snapshot::describe(part)
        {
            let offsets = said.partitions.iter().map(|(key, next)| {
                json!({"topic": key.topic, "partition": key.partition, "next_offset": next})
            });
            value["entries"][at]["partitions"] = offsets.collect();
            let producers = said.producers.iter().map(|p| {
                json!({
                    "topic": p.key.topic, "partition": p.key.partition, "producer_id": p.producer_id,
                    "epoch": p.epoch, "next_sequence": p.next_sequence,
                })
            });
            value["entries"][at]["producers"] = producers.collect();
        }
    }
    Ok(value)
}

fn json(frame: &FrameInfo, out: &mut impl Write) -> CliResult {
    line(&frame_json(frame)?, out)
}

fn text(frame: &FrameInfo, args: &Args, out: &mut impl Write) -> CliResult {
    writeln!(
        out,
        "byte {}: frame {} of {} bytes, {} entries, {}{}",
        frame.position,
        frame.seq,
        frame.size,
        frame.entries.len(),
        time(frame.time_ms),
        if frame.clean { ", clean stop" } else { "" }
    )?;
    if args.frames {
        return Ok(());
    }
    for entry in &frame.entries {
        match entry {
            EntryInfo::Snapshot {
                index,
                count,
                bytes,
                part,
            } => {
                let said = snapshot::describe(part);
                let what = match &said {
                    Some(said) => format!(
                        "next offsets of {} partitions, {} producers",
                        said.partitions.len(),
                        said.producers.len()
                    ),
                    None => "not understood".to_owned(),
                };
                writeln!(
                    out,
                    "  snapshot part {} of {count}, {bytes} bytes: {what}",
                    index + 1
                )?;
                for (key, next) in said
                    .iter()
                    .filter(|_| args.verbose)
                    .flat_map(|s| &s.partitions)
                {
                    writeln!(
                        out,
                        "    topic {} partition {}: next offset {next}",
                        key.topic, key.partition
                    )?;
                }
                for p in said
                    .iter()
                    .filter(|_| args.verbose)
                    .flat_map(|s| &s.producers)
                {
                    writeln!(
                        out,
                        "    topic {} partition {}: producer {} epoch {}, next sequence {}",
                        p.key.topic, p.key.partition, p.producer_id, p.epoch, p.next_sequence
                    )?;
                }
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
