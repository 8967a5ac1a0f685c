//! `taffrail export`: a topic's messages as a Parquet file or as Kafka's own log folders.

use std::io::Write;
use std::path::PathBuf;

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};

use super::source::Source;
use super::{CliResult, ServerArgs};
use crate::control::protocol::Position;
use crate::storage::export::kafka_log::SEGMENT_BYTES;
use crate::storage::export::{KafkaLog, ParquetFile};
use crate::wire::record_batch;

/// Write the messages of a topic, as there are at the start, to a Parquet file or to Kafka's log folders
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("format").required(true).args(["parquet", "kafka_log"])))]
pub struct Args {
    /// Topic to export
    topic: String,
    /// A Parquet file to make: partition, offset, timestamp, key, value, headers
    #[arg(long, value_name = "FILE")]
    parquet: Option<PathBuf>,
    /// A folder to make, with a folder of Kafka's segments for each partition
    #[arg(long, value_name = "DIR")]
    kafka_log: Option<PathBuf>,
    /// Only these partitions
    #[arg(long, short, value_name = "N", value_delimiter = ',')]
    partition: Vec<u32>,
    /// With --kafka-log: most bytes of a segment, up to 1 GiB
    #[arg(long, value_name = "BYTES", default_value_t = ByteSize(SEGMENT_BYTES), requires = "kafka_log")]
    segment_bytes: ByteSize,
    /// Print what was written as JSON
    #[arg(long)]
    json: bool,
    /// Read the files of a stopped server in this folder instead of asking a running one
    #[arg(long, value_name = "DIR", conflicts_with_all = ["socket", "config"])]
    data: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

enum Sink {
    Parquet(Box<ParquetFile>),
    KafkaLog(Box<KafkaLog>),
}

/// Returns when all of it is on disk.
pub fn run(args: &Args) -> CliResult {
    let mut source = Source::open(args.data.as_deref(), &args.server)?;
    let count = source.partitions(&args.topic)?;
    let mut partitions = args.partition.clone();
    partitions.sort_unstable();
    partitions.dedup();
    if partitions.is_empty() {
        partitions = (0..count).collect();
    }
    if let Some(unknown) = partitions.iter().find(|&&partition| partition >= count) {
        return Err(format!(
            "topic {} has partitions 0 to {}, not {unknown}",
            args.topic,
            count - 1
        )
        .into());
    }
    let mut sink = match (&args.parquet, &args.kafka_log) {
        (Some(path), _) => Sink::Parquet(Box::new(ParquetFile::create(path)?)),
        (None, Some(dir)) => Sink::KafkaLog(Box::new(KafkaLog::create(
            dir,
            &args.topic,
            args.segment_bytes.as_u64(),
        )?)),
        (None, None) => return Err("--parquet or --kafka-log is needed".into()),
    };
    let bar = ProgressBar::new(partitions.len() as u64);
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} partition {pos} of {len} {wide_msg}",
    )?);
    for partition in partitions {
        export(&mut source, &args.topic, partition, &mut sink, &bar)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let done = match sink {
        Sink::Parquet(file) => file.finish()?,
        Sink::KafkaLog(log) => log.finish()?,
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &done)?;
        writeln!(out)?;
    } else {
        let path = args.parquet.as_ref().or(args.kafka_log.as_ref());
        writeln!(
            out,
            "{} messages in {} files, {} in {}",
            done.messages,
            done.files,
            ByteSize(done.bytes),
            path.map_or_else(String::new, |p| p.display().to_string())
        )?;
    }
    if done.control > 0 {
        let what = match args.parquet {
            Some(_) => "are left out",
            None => "are among them as control batches, which Kafka's clients skip",
        };
        tracing::info!("{} records of gaps {what}", done.control);
    }
    Ok(())
}

/// Reads a partition up to where it ended at the first read.
fn export(
    source: &mut Source,
    topic: &str,
    partition: u32,
    sink: &mut Sink,
    bar: &ProgressBar,
) -> CliResult {
    let mut batches = Vec::new();
    let first = source.read(topic, partition, Position::Earliest, &mut batches)?;
    let end = first.high_watermark;
    let mut next = first.from;
    if let Sink::KafkaLog(log) = sink {
        log.partition(partition, next)?;
    }
    loop {
        let mut rest = &batches[..];
        let before = next;
        while !rest.is_empty() && next < end {
            let header = record_batch::parse_header(rest)?;
            let (batch, behind) = rest
                .split_at_checked(header.total_len())
                .ok_or("the last record batch is cut off")?;
            rest = behind;
            match sink {
                Sink::Parquet(file) => file.batch(partition, batch, next, end)?,
                Sink::KafkaLog(log) => log.batch(batch)?,
            }
            next = header.next_offset();
        }
        bar.set_message(format!("offset {next} of {end}"));
        if next >= end || next == before {
            return Ok(());
        }
        batches.clear();
        let from = Position::Offset(next);
        if let Err(error) = source.read(topic, partition, from, &mut batches) {
            // Retention may have passed us by; any other error shows again.
            let start = source.read(topic, partition, Position::Earliest, &mut batches);
            match start {
                Ok(answer) if answer.from > next => {
                    tracing::warn!(
                        "partition {partition}: offsets {next} to {} were removed meanwhile",
                        answer.from - 1
                    );
                    next = answer.from;
                }
                _ => return Err(error),
            }
        }
    }
}
