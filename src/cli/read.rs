//! `taffrail read`: messages of a partition, or the newest ones of keys, from the running server or from a stopped one's
//! files.

mod keys;

use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::source::Source;
use super::{CliResult, ServerArgs};
use crate::control::keys::hex;
use crate::control::protocol::Position;
use crate::storage::lsm::codec;
use crate::wire::record_batch::{self, Record, Records};

/// How often `--follow` asks for news.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);

/// Read messages of a topic
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Topic to read
    topic: String,
    /// Partition to read; 0 if not given, and all of them where keys are
    #[arg(long, short)]
    partition: Option<u32>,
    /// Where to begin: an offset, "earliest" or "latest"
    #[arg(long, value_name = "OFFSET", default_value = "earliest", value_parser = parse_from, conflicts_with = "time")]
    from: Position,
    /// Begin with the first message of this time or later: RFC 3339 (2026-11-24T09:30:00Z) or Unix milliseconds
    #[arg(long, value_name = "T", value_parser = parse_time)]
    time: Option<Position>,
    /// Only the newest message with this key, in each partition that has one; the topic needs an index of its keys
    #[arg(long, value_name = "KEY", conflicts_with_all = ["from", "time", "follow"])]
    key: Option<String>,
    /// All messages with the key, oldest first, one partition after the other
    #[arg(long, requires = "key")]
    all: bool,
    /// The newest message of each key from this one on, in the order of keys
    #[arg(long, value_name = "KEY", conflicts_with_all = ["key", "from", "time", "follow"])]
    key_from: Option<String>,
    /// The newest message of each key before this one, in the order of keys
    #[arg(long, value_name = "KEY", conflicts_with_all = ["key", "from", "time", "follow"])]
    key_to: Option<String>,
    /// The newest message of each key that begins so, in the order of keys; "" for all
    #[arg(long, value_name = "PREFIX", conflicts_with_all = ["key", "key_from", "key_to", "from", "time", "follow"])]
    key_prefix: Option<String>,
    /// Keys of the arguments are in hexadecimal
    #[arg(long)]
    hex_keys: bool,
    /// Stop after this many messages
    #[arg(long, short = 'n', value_name = "N")]
    count: Option<u64>,
    /// text: the value and a newline; json: one object a line; hex: offset, time and a hexadecimal value
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Wait for further messages at the end
    #[arg(long, short)]
    follow: bool,
    /// Read the files of a stopped server in this folder instead of asking a running one
    #[arg(long, value_name = "DIR", conflicts_with_all = ["socket", "config", "follow"])]
    data: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    Text,
    Json,
    Hex,
}

pub(super) fn parse_from(text: &str) -> Result<Position, String> {
    match text {
        "earliest" => Ok(Position::Earliest),
        "latest" => Ok(Position::Latest),
        _ => match text.parse() {
            Ok(offset) if offset >= 0 => Ok(Position::Offset(offset)),
            _ => Err("an offset from 0, \"earliest\" or \"latest\" is allowed".to_owned()),
        },
    }
}

pub(super) fn parse_time(text: &str) -> Result<Position, String> {
    if let Ok(ms) = text.parse() {
        return Ok(Position::Time(ms));
    }
    let time: SystemTime = humantime::parse_rfc3339_weak(text).map_err(|e| e.to_string())?;
    let since = time.duration_since(UNIX_EPOCH).map_err(|e| e.to_string())?;
    i64::try_from(since.as_millis())
        .map(Position::Time)
        .map_err(|e| e.to_string())
}

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Whose messages are printed, and how.
pub(super) struct Shown<'a> {
    pub topic: &'a str,
    pub partition: u32,
    pub format: Format,
    /// Lines in hexadecimal begin with the partition.
    pub names_partition: bool,
}

/// Prints messages until the end, the count, or an interrupt.
pub fn run(args: &Args) -> CliResult {
    let ranges = [&args.key_from, &args.key_to, &args.key_prefix];
    if args.key.is_some() || ranges.iter().any(|bound| bound.is_some()) {
        return keys::run(args);
    }
    let partition = args.partition.unwrap_or(0);
    let mut source = Source::open(args.data.as_deref(), &args.server)?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut from = args.time.unwrap_or(args.from);
    let mut left = args.count.unwrap_or(u64::MAX);
    let shown = Shown {
        topic: &args.topic,
        partition,
        format: args.format,
        names_partition: false,
    };
    let mut batches = Vec::new();
    while left > 0 {
        batches.clear();
        let answer = source.read(&args.topic, partition, from, &mut batches)?;
        let next = print_batches(&shown, &batches, answer.from, &mut left, &mut out)?;
        from = Position::Offset(next);
        if next >= answer.high_watermark || batches.is_empty() {
            out.flush()?;
            if !args.follow {
                break;
            }
            std::thread::sleep(FOLLOW_INTERVAL);
        }
    }
    out.flush()?;
    Ok(())
}

/// Prints up to `left` messages with an offset of at least `from`; returns the offset behind the
/// last one seen.
pub(super) fn print_batches(
    shown: &Shown<'_>,
    mut batches: &[u8],
    from: i64,
    left: &mut u64,
    out: &mut impl Write,
) -> Result<i64, Error> {
    let mut next = from;
    let mut scratch = Vec::new();
    while !batches.is_empty() {
        let header = record_batch::parse_header(batches)?;
        let (batch, rest) = batches
            .split_at_checked(header.total_len())
            .ok_or("the last record batch is cut off")?;
        batches = rest;
        record_batch::validate(batch)?;
        for record in Records::new(codec::plain(batch, &mut scratch)?)? {
            let record = record?;
            if record.offset < next {
                continue;
            }
            if *left == 0 {
                return Ok(next);
            }
            next = record.offset + 1;
            if header.is_control() {
                print_gap(shown, &record, out)?;
                continue;
            }
            *left -= 1;
            print_record(shown, &record, out)?;
        }
        next = next.max(header.base_offset + i64::from(header.last_offset_delta) + 1);
    }
    Ok(next)
}

/// A message as one line of JSON. Bytes that are no UTF-8 are given in hexadecimal under another name.
#[derive(Serialize)]
struct JsonRecord<'a> {
    topic: &'a str,
    partition: u32,
    offset: i64,
    timestamp: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_hex: Option<String>,
    value: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_hex: Option<String>,
}

fn print_record(shown: &Shown<'_>, record: &Record<'_>, out: &mut impl Write) -> CliResult {
    match shown.format {
        Format::Text => {
            out.write_all(record.value.unwrap_or_default())?;
            out.write_all(b"\n")?;
        }
        Format::Json => {
            let (key, key_hex) = text_or_hex(record.key);
            let (value, value_hex) = text_or_hex(record.value);
            let line = JsonRecord {
                topic: shown.topic,
                partition: shown.partition,
                offset: record.offset,
                timestamp: record.timestamp,
                key,
                key_hex,
                value,
                value_hex,
            };
            serde_json::to_writer(&mut *out, &line)?;
            out.write_all(b"\n")?;
        }
        Format::Hex => {
            let millis = u64::try_from(record.timestamp).unwrap_or(0);
            let time = UNIX_EPOCH + Duration::from_millis(millis);
            if shown.names_partition {
                write!(out, "{} ", shown.partition)?;
            }
            write!(
                out,
                "{} {}",
                record.offset,
                humantime::format_rfc3339_millis(time)
            )?;
            if let Some(key) = record.key {
                write!(out, " key {}", hex(key))?;
            }
            match record.value {
                Some(value) => writeln!(out, " value {}", hex(value))?,
                None => writeln!(out, " no value")?,
            }
        }
    }
    Ok(())
}

/// A control batch that tells of messages lost before they reached the log.
fn print_gap(shown: &Shown<'_>, record: &Record<'_>, out: &mut impl Write) -> CliResult {
    let text = String::from_utf8_lossy(record.value.unwrap_or_default());
    if shown.format == Format::Json {
        let gap: serde_json::Value =
            serde_json::from_str(&text).unwrap_or_else(|_| text.clone().into());
        let line = serde_json::json!({
            "topic": shown.topic, "partition": shown.partition, "offset": record.offset,
            "timestamp": record.timestamp, "gap": gap,
        });
        writeln!(out, "{line}")?;
    } else {
        // Not among the values: whoever pipes them wants messages only.
        let (partition, offset) = (shown.partition, record.offset);
        eprintln!("gap at offset {offset} of partition {partition}: {text}");
    }
    Ok(())
}

fn text_or_hex(bytes: Option<&[u8]>) -> (Option<&str>, Option<String>) {
    match bytes.map(std::str::from_utf8) {
        None => (None, None),
        Some(Ok(text)) => (Some(text), None),
        Some(Err(_)) => (None, bytes.map(hex)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_understood() {
        assert_eq!(parse_from("earliest"), Ok(Position::Earliest));
        assert_eq!(parse_from("12"), Ok(Position::Offset(12)));
        assert!(parse_from("-1").is_err());
        assert_eq!(parse_time("1500"), Ok(Position::Time(1500)));
        assert_eq!(parse_time("1970-01-01T00:00:02Z"), Ok(Position::Time(2000)));
        assert!(parse_time("yesterday").is_err());
    }

    #[test]
    fn bytes_that_are_no_text_become_hexadecimal() {
        assert_eq!(text_or_hex(Some(b"a")), (Some("a"), None));
        assert_eq!(text_or_hex(Some(&[0xff, 0])), (None, Some("ff00".into())));
        assert_eq!(text_or_hex(None), (None, None));
    }
}
