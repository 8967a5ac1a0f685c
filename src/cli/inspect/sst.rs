//! An SST: where it comes from, its partitions and, with `--verbose`, its blocks and batches.

use std::io::Write;

use serde_json::json;

use super::{Args, Names, line, time};
use crate::cli::CliResult;
use crate::storage::lsm::codec;
use crate::storage::lsm::sst::{Block, SstReader};
use crate::wire::record_batch;

/// Prints the file, and fails where anything of it is damaged. Cost: reads all of it.
pub(super) fn show(args: &Args, names: &Names, out: &mut impl Write) -> CliResult {
    let reader = SstReader::open_any(&args.file)?;
    let (info, footer) = (reader.info(), reader.footer());
    let report = reader.verify(|_| ());
    let (index, table) = (footer.index_pages, footer.table_pages);
    if args.json {
        let value = json!({
            "kind": "sst", "store": format!("{:032x}", info.id.store), "shard": info.id.shard,
            "number": info.number, "lsn_start": info.lsn_start, "lsn_end": info.lsn_end,
            "created_ms": info.created_ms, "bytes": footer.file_bytes, "data_end": footer.data_end,
            "blocks": footer.blocks, "batches": report.batches, "index_pages": index, "table_pages": table,
            "partitions": footer.partitions, "records": footer.records,
            "min_time": footer.min_time, "max_time": footer.max_time,
            "keys": footer.keys, "keys_at": footer.keys_at(), "key_bytes": footer.key_bytes,
        });
        line(&value, out)?;
    } else {
        writeln!(
            out,
            "SST {} of shard {} of store {:032x}: {} bytes, LSN {} to {}, made {}",
            info.number,
            info.id.shard,
            info.id.store,
            footer.file_bytes,
            info.lsn_start,
            info.lsn_end,
            time(info.created_ms)
        )?;
        writeln!(
            out,
            "{} records in {} batches in {} blocks, bytes 128 to {}; {index} index pages and {table} of the partition table up to byte {}; the footer at byte {}",
            footer.records,
            report.batches,
            footer.blocks,
            footer.data_end,
            footer.keys_at(),
            footer.file_bytes - 128
        )?;
        writeln!(
            out,
            "{} partitions, arrived {} to {}",
            footer.partitions,
            time(footer.min_time),
            time(footer.max_time)
        )?;
        if footer.key_bytes > 0 {
            writeln!(
                out,
                "an index of {} keys, {} bytes from byte {} on",
                footer.keys,
                footer.key_bytes,
                footer.keys_at()
            )?;
        }
    }
    for extent in &report.extents {
        let (topic, partition) = (extent.key.topic, extent.key.partition);
        if args.json {
            let value = json!({
                "kind": "partition", "topic": topic, "partition": partition,
                "first_offset": extent.first_offset, "end_offset": extent.end_offset,
                "records": extent.records, "bytes": extent.bytes, "first_block": extent.first_block,
                "min_time": extent.min_time, "max_time": extent.max_time, "keyed": extent.keyed,
            });
            line(&value, out)?;
        } else {
            writeln!(
                out,
                "{} partition {partition}: offsets {} to {}, {} records, {} bytes from block {} on, up to {}{}",
                names.topic(topic),
                extent.first_offset,
                extent.end_offset - 1,
                extent.records,
                extent.bytes,
                extent.first_block,
                time(extent.max_time),
                if extent.keyed { ", keys indexed" } else { "" }
            )?;
        }
        if args.verbose {
            for (block, number) in reader.blocks(extent.key, -1)?.zip(extent.first_block..) {
                // What cannot be read is among the findings below.
                let Ok(block) = block else { break };
                show_block(args, &reader, &block, number, out)?;
            }
        }
    }
    for finding in &report.findings {
        let what = match finding.messages {
            Some((key, first, end)) => format!(
                "{}; topic {} partition {}, offsets {first} to {}",
                finding.what,
                key.topic,
                key.partition,
                end - 1
            ),
            None => finding.what.clone(),
        };
        if args.json {
            let value = json!({"kind": "damage", "position": finding.position, "what": what});
            line(&value, out)?;
        } else {
            writeln!(out, "DAMAGE at byte {}: {what}", finding.position)?;
        }
    }
    match report.findings.first() {
        None => Ok(()),
        Some(first) => Err(format!(
            "{} is damaged at byte {}: {}",
            args.file.display(),
            first.position,
            first.what
        )
        .into()),
    }
}

fn show_block(
    args: &Args,
    reader: &SstReader,
    block: &Block,
    number: u64,
    out: &mut impl Write,
) -> CliResult {
    let bytes = reader.block(block).unwrap_or_default();
    let mut batches = Vec::new();
    let mut at = 0;
    while let Ok(header) = record_batch::parse_header(&bytes[at..]) {
        if header.total_len() > bytes.len() - at {
            break;
        }
        batches.push((block.position + at as u64, header));
        at += header.total_len();
    }
    if args.json {
        let list: Vec<_> = batches
            .iter()
            .map(|(position, batch)| {
                json!({
                    "position": position, "bytes": batch.total_len(), "base_offset": batch.base_offset,
                    "last_offset": batch.next_offset() - 1, "records": batch.records_count,
                    "compression": codec::name(batch.codec()), "max_timestamp": batch.max_timestamp,
                    "producer_id": batch.producer_id, "base_sequence": batch.base_sequence,
                    "control": batch.is_control(),
                })
            })
            .collect();
        let value = json!({
            "kind": "block", "number": number, "topic": block.key.topic, "partition": block.key.partition,
            "position": block.position, "bytes": block.len, "first_offset": block.first_offset,
            "end_offset": block.end_offset, "records": block.records, "max_time": block.max_time,
            "crc": block.crc, "batches": list,
        });
        return line(&value, out);
    }
    writeln!(
        out,
        "  block {number} at byte {}: {} bytes, offsets {} to {}, {} records, CRC {:#010x}",
        block.position,
        block.len,
        block.first_offset,
        block.end_offset - 1,
        block.records,
        block.crc
    )?;
    for (position, batch) in batches {
        writeln!(
            out,
            "    batch at byte {position}: {} bytes, offsets {} to {}, {} records, {}{}",
            batch.total_len(),
            batch.base_offset,
            batch.next_offset() - 1,
            batch.records_count,
            codec::name(batch.codec()),
            if batch.is_control() { ", control" } else { "" }
        )?;
    }
    Ok(())
}
