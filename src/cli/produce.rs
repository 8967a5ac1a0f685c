//! `taffrail produce`: lines from standard input, or generated messages, into a topic, with what
//! became of each.
//!
//! Invariant: every line that was read is counted once, as acknowledged (sent, with `--acks 0`) or
//! failed; the command succeeds only if none failed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{self, BufRead, IsTerminal, Write};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::CliResult;
use crate::client::{self, Event, Fate, MAX_DATAGRAM, Producer, ProducerConfig, SendError, Target};

/// Bytes of input handed over at once, and chunks that may wait: reading stays ahead of sending
/// without holding much.
const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 16;
/// Acknowledged ranges that adjoin are printed as one, at least this often.
const PRINT_EVERY: Duration = Duration::from_millis(200);
/// How long to wait for input or answers before looking at the other.
const TURN: Duration = Duration::from_millis(1);
/// Longest pause of an idle producer, after which an interrupt is noticed.
const IDLE: Duration = Duration::from_millis(100);
/// Longest latency the histogram tells apart, in microseconds.
const MAX_LATENCY_US: u64 = 600_000_000;

/// Send lines from standard input to a topic and print the offsets they got
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Topic to send to
    topic: String,
    /// The server's address for the datagram protocol; may be given several times, the first that
    /// answers is used
    #[arg(long, value_name = "HOST:PORT", required = true)]
    server: Vec<String>,
    /// Send everything to this partition
    #[arg(long, value_name = "P", conflicts_with = "key_separator")]
    partition: Option<u32>,
    /// What stands before the first SEPARATOR of a line is the message's key, and decides on its
    /// partition
    #[arg(long, value_name = "SEPARATOR")]
    key_separator: Option<String>,
    /// When a message counts as stored: 0 never asked, 1 survives the server process, all survives
    /// a power cut [default: the server's]
    #[arg(long, value_name = "LEVEL")]
    acks: Option<Acks>,
    /// Wait this long for messages to share a datagram
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    linger: Duration,
    /// Give a message up after this long without an acknowledgement
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Stable producer id; with --epoch above any used before, an older instance is shut out
    #[arg(long, value_name = "N", requires = "epoch", value_parser = clap::value_parser!(i64).range(0..))]
    producer_id: Option<i64>,
    /// Epoch of the producer id
    #[arg(long, value_name = "E", requires = "producer_id", value_parser = clap::value_parser!(i16).range(0..))]
    epoch: Option<i16>,
    /// Largest UDP payload, in bytes; server and path may ask for less
    #[arg(long, value_name = "BYTES", default_value_t = MAX_DATAGRAM)]
    max_datagram: usize,
    /// Do not print the acknowledged ranges
    #[arg(long, short)]
    quiet: bool,
    /// How to print ranges and summary
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Instead of reading lines, generate this many messages
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// With --count: bytes of each message
    #[arg(long, value_name = "BYTES", requires = "count", default_value_t = 100)]
    size: usize,
    /// Send at most this many messages a second, evenly spaced
    #[arg(long, value_name = "N")]
    rate: Option<NonZeroU64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Acks {
    #[value(name = "0")]
    None,
    #[value(name = "1")]
    Staged,
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Sends all input; an error says how many messages failed.
pub fn run(args: &Args) -> CliResult {
    let mut config = ProducerConfig::new("", &args.topic);
    config.servers = args.server.clone();
    config.acks = args.acks.map(|acks| match acks {
        Acks::None => client::Acks::None,
        Acks::Staged => client::Acks::Staged,
        Acks::All => client::Acks::Durable,
    });
    config.linger = args.linger;
    config.delivery_timeout = args.timeout;
    config.producer_id = args.producer_id;
    config.epoch = args.epoch.unwrap_or(0);
    config.max_datagram = args.max_datagram;

    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The second one ends the process at once.
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&interrupted))?;
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    let producer = Producer::connect(config)?;
    let target = args.partition.map_or(Target::Auto, Target::Partition);
    if let Some(partition) = args.partition.filter(|&p| p >= producer.partitions()) {
        return Err(format!(
            "topic {} has {} partitions, there is no partition {partition}",
            args.topic,
            producer.partitions()
        )
        .into());
    }
    let source = match args.count {
        Some(count) => Source::Generated {
            left: count,
            value: vec![b'x'; args.size],
        },
        None => Source::lines(args.key_separator.as_deref()),
    };
    let mut session = Session {
        args,
        producer,
        target,
        report: Report::new(args),
        started: Instant::now(),
        interrupted,
    };
    let input = session.send_all(source);
    // What has been read is delivered, whatever came then.
    session.finish()?;
    input
}

/// Where messages come from.
enum Source {
    Generated {
        left: u64,
        value: Vec<u8>,
    },
    Lines {
        chunks: Receiver<io::Result<Vec<u8>>>,
        chunk: Vec<u8>,
        at: usize,
        separator: Option<Vec<u8>>,
    },
}

/// The next message, if any.
enum Next<'a> {
    Message(Option<&'a [u8]>, &'a [u8]),
    NotYet,
    End,
}

impl Source {
    fn lines(separator: Option<&str>) -> Self {
        let (sender, chunks) = sync_channel(CHUNKS);
        // Not joined: it may wait for a terminal forever.
        std::thread::spawn(move || read_lines(&mut io::stdin().lock(), &sender));
        Self::Lines {
            chunks,
            chunk: Vec::new(),
            at: 0,
            separator: separator
                .filter(|text| !text.is_empty())
                .map(|text| text.as_bytes().to_vec()),
        }
    }

    /// The next message; waits up to `wait` for it.
    fn next(&mut self, wait: Duration) -> io::Result<Next<'_>> {
        match self {
            Self::Generated { left: 0, .. } => Ok(Next::End),
            Self::Generated { left, value } => {
                *left -= 1;
                Ok(Next::Message(None, value))
            }
            Self::Lines {
                chunks,
                chunk,
                at,
                separator,
            } => {
                if *at >= chunk.len() {
                    let received = if wait.is_zero() {
                        chunks.try_recv().map_err(|error| match error {
                            TryRecvError::Empty => RecvTimeoutError::Timeout,
                            TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                        })
                    } else {
                        chunks.recv_timeout(wait)
                    };
                    match received {
                        Ok(next) => *chunk = next?,
                        Err(RecvTimeoutError::Timeout) => return Ok(Next::NotYet),
                        Err(RecvTimeoutError::Disconnected) => return Ok(Next::End),
                    }
                    *at = 0;
                }
                let rest = &chunk[*at..];
                let end = memchr::memchr(b'\n', rest).unwrap_or(rest.len());
                *at += end + 1;
                let line = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]);
                Ok(match separator {
                    Some(separator) => match memchr::memmem::find(line, separator) {
                        Some(place) => {
                            Next::Message(Some(&line[..place]), &line[place + separator.len()..])
                        }
                        None => Next::Message(None, line),
                    },
                    None => Next::Message(None, line),
                })
            }
        }
    }
}

/// Reads lines into chunks of whole ones and hands them over when a chunk is full or no more is
/// there yet. Of a line that no datagram could hold only the beginning is kept, which is refused as
/// well.
fn read_lines(input: &mut impl BufRead, sender: &SyncSender<io::Result<Vec<u8>>>) {
    let mut chunk = Vec::with_capacity(CHUNK);
    let mut line_start = 0;
    loop {
        let available = match input.fill_buf() {
            Ok(available) => available,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let _ = sender.send(Err(error));
                return;
            }
        };
        if available.is_empty() {
            if !chunk.is_empty() {
                let _ = sender.send(Ok(chunk));
            }
            return;
        }
        let newline = memchr::memchr(b'\n', available);
        let taken = newline.map_or(available.len(), |at| at + 1);
        let room = (2 * MAX_DATAGRAM).saturating_sub(chunk.len() - line_start);
        let kept = newline.unwrap_or(taken).min(room);
        chunk.extend_from_slice(&available[..kept]);
        let drained = taken == available.len();
        input.consume(taken);
        if newline.is_some() {
            chunk.push(b'\n');
            line_start = chunk.len();
            if (chunk.len() >= CHUNK || drained)
                && sender.send(Ok(std::mem::take(&mut chunk))).is_err()
            {
                return;
            }
            if chunk.is_empty() {
                line_start = 0;
            }
        }
    }
}

struct Session<'a> {
    args: &'a Args,
    producer: Producer,
    target: Target,
    report: Report,
    started: Instant,
    interrupted: Arc<AtomicBool>,
}

impl Session<'_> {
    fn send_all(&mut self, mut source: Source) -> CliResult {
        let mut number = 0u64;
        while !self.interrupted.load(Ordering::Relaxed) {
            if let Some(rate) = self.args.rate {
                let due = Duration::from_secs_f64(number as f64 / rate.get() as f64);
                let early = due.saturating_sub(self.started.elapsed());
                if !early.is_zero() {
                    self.poll(early.min(IDLE))?;
                    continue;
                }
            }
            let wait = match self.producer.outstanding() {
                0 => IDLE,
                _ => Duration::ZERO,
            };
            match source.next(wait)? {
                Next::End => break,
                Next::NotYet => self.poll(TURN)?,
                Next::Message(key, value) => {
                    number += 1;
                    self.send(number, key, value)?;
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, number: u64, key: Option<&[u8]>, value: &[u8]) -> CliResult {
        self.report.sent += 1;
        self.report.bytes += (key.map_or(0, <[u8]>::len) + value.len()) as u64;
        let sent_at = Instant::now();
        loop {
            match self.producer.send(self.target, key, value) {
                Ok(ticket) => {
                    self.report.times.sent(ticket.partition, sent_at);
                    break;
                }
                Err(SendError::Full) => self.poll(TURN)?,
                Err(SendError::Io(error)) => return Err(error.into()),
                Err(error) => {
                    self.report.fail(1, &format!("message {number}: {error}"));
                    break;
                }
            }
        }
        // One at a time where the pace asks for it; a stream fills its datagrams first.
        if self.args.rate.is_some() || self.report.is_late() {
            self.poll(Duration::ZERO)?;
        }
        Ok(())
    }

    fn poll(&mut self, wait: Duration) -> CliResult {
        self.producer.poll(wait)?;
        while let Some(event) = self.producer.next_event() {
            self.report.event(event)?;
        }
        self.report.print(self.producer.outstanding() == 0)?;
        Ok(())
    }

    fn finish(mut self) -> CliResult {
        while self.producer.outstanding() > 0 {
            match self.producer.flush(IDLE) {
                Ok(()) | Err(client::FlushError::Timeout { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            self.poll(Duration::ZERO)?;
        }
        self.poll(Duration::ZERO)?;
        let seconds = self.started.elapsed().as_secs_f64();
        self.report.summary(seconds, &self.producer)?;
        match self.report.failed {
            0 => Ok(()),
            failed => {
                let sent = self.report.sent;
                let cause = match self.producer.network_error() {
                    Some(error) => format!("; the network said: {error}"),
                    None => String::new(),
                };
                Err(format!("{failed} of {sent} messages failed{cause}").into())
            }
        }
    }
}

/// When messages were sent, until they are answered.
#[derive(Default)]
struct Times(HashMap<u32, (u64, VecDeque<Option<Instant>>)>);

impl Times {
    /// The partition's next message went out.
    fn sent(&mut self, partition: u32, at: Instant) {
        let (_, times) = self.0.entry(partition).or_default();
        times.push_back(Some(at));
    }

    /// Takes the time of a message.
    fn take(&mut self, partition: u32, message: u64) -> Option<Instant> {
        let (first, times) = self.0.get_mut(&partition)?;
        let at = usize::try_from(message.checked_sub(*first)?).ok()?;
        let time = times.get_mut(at)?.take();
        while times.front().is_some_and(Option::is_none) {
            times.pop_front();
            *first += 1;
        }
        time
    }
}

/// What is told to the user.
struct Report {
    quiet: bool,
    json: bool,
    acks_expected: bool,
    sent: u64,
    bytes: u64,
    acknowledged: u64,
    failed: u64,
    times: Times,
    latency: Histogram<u64>,
    /// Acknowledged offsets by partition that are not printed yet: first, behind the last.
    ranges: BTreeMap<u32, (i64, i64)>,
    printed: Instant,
    progress: Option<ProgressBar>,
}

impl Report {
    fn new(args: &Args) -> Self {
        // Ranges on the same terminal would tear the bar.
        let visible = io::stderr().is_terminal() && (args.quiet || !io::stdout().is_terminal());
        let progress = visible.then(|| {
            let (bar, template) = match args.count {
                Some(count) => (
                    ProgressBar::new(count),
                    "{bar:30} {human_pos}/{human_len} acknowledged, {per_sec}, {eta} left",
                ),
                None => (
                    ProgressBar::new_spinner(),
                    "{spinner} {human_pos} acknowledged, {per_sec}",
                ),
            };
            let style = ProgressStyle::with_template(template);
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self {
            quiet: args.quiet,
            json: args.format == Format::Json,
            acks_expected: true,
            sent: 0,
            bytes: 0,
            acknowledged: 0,
            failed: 0,
            times: Times::default(),
            latency: Histogram::new_with_bounds(1, MAX_LATENCY_US, 3)
                .expect("the histogram's bounds are constants that it takes"),
            ranges: BTreeMap::new(),
            printed: Instant::now(),
            progress,
        }
    }

    fn is_late(&self) -> bool {
        self.printed.elapsed() >= PRINT_EVERY
    }

    fn event(&mut self, event: Event) -> io::Result<()> {
        match event {
            Event::Delivered {
                partition,
                messages,
                base_offset,
            } => {
                let now = Instant::now();
                let count = messages.end - messages.start;
                self.acknowledged += count;
                for message in messages {
                    if let Some(at) = self.times.take(partition, message) {
                        let micros = now.saturating_duration_since(at).as_micros();
                        self.latency
                            .saturating_record(u64::try_from(micros).unwrap_or(u64::MAX).max(1));
                    }
                }
                match base_offset {
                    Some(first) => self.range(partition, first, first + count as i64)?,
                    None if self.quiet => {}
                    None if self.json => self.line(
                        &json!({"partition": partition, "stored": count, "offset": null})
                            .to_string(),
                    )?,
                    None => self.line(&format!(
                        "partition {partition} {count} messages stored, offsets unknown"
                    ))?,
                }
            }
            Event::Sent {
                partition,
                messages,
            } => {
                self.acks_expected = false;
                self.acknowledged += messages.end - messages.start;
                for message in messages {
                    self.times.take(partition, message);
                }
            }
            Event::Failed {
                partition,
                messages,
                reason,
                fate,
            } => {
                let count = messages.end - messages.start;
                for message in messages {
                    self.times.take(partition, message);
                }
                let stored = match fate {
                    Fate::NotSent => "never sent",
                    Fate::Refused => "not stored",
                    Fate::Unknown => "perhaps stored",
                };
                self.fail(
                    count,
                    &format!("partition {partition}: {count} messages failed, {stored}: {reason}"),
                );
            }
            Event::ServerForgot { partition, epoch } => self.warn(&format!(
                "partition {partition}: the server no longer knows this producer, though it \
                 acknowledged messages of it; going on with epoch {epoch}"
            )),
        }
        if let Some(progress) = &self.progress {
            progress.set_position(self.acknowledged + self.failed);
        }
        Ok(())
    }

    fn fail(&mut self, count: u64, text: &str) {
        self.failed += count;
        self.warn(text);
    }

    fn warn(&self, text: &str) {
        match &self.progress {
            Some(progress) => progress.suspend(|| eprintln!("taffrail: {text}")),
            None => eprintln!("taffrail: {text}"),
        }
    }

    fn range(&mut self, partition: u32, first: i64, end: i64) -> io::Result<()> {
        if self.quiet {
            return Ok(());
        }
        match self.ranges.get_mut(&partition) {
            Some(range) if range.1 == first => range.1 = end,
            _ => {
                if let Some(range) = self.ranges.insert(partition, (first, end)) {
                    self.print_range(partition, range)?;
                }
            }
        }
        Ok(())
    }

    /// Prints what has gathered, now and then, or all of it.
    fn print(&mut self, all: bool) -> io::Result<()> {
        if all || self.is_late() {
            self.printed = Instant::now();
            for (partition, range) in std::mem::take(&mut self.ranges) {
                self.print_range(partition, range)?;
            }
        }
        Ok(())
    }

    fn print_range(&self, partition: u32, (first, end): (i64, i64)) -> io::Result<()> {
        let last = end - 1;
        if self.json {
            let range = json!({"partition": partition, "first_offset": first, "last_offset": last});
            self.line(&range.to_string())
        } else if first == last {
            self.line(&format!("partition {partition} offset {first}"))
        } else {
            self.line(&format!("partition {partition} offsets {first}-{last}"))
        }
    }

    /// A reader that has left (`| head`) must not keep the rest from being sent.
    fn line(&self, text: &str) -> io::Result<()> {
        match writeln!(io::stdout().lock(), "{text}") {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }

    fn summary(&self, seconds: f64, producer: &Producer) -> io::Result<()> {
        if let Some(progress) = &self.progress {
            progress.finish_and_clear();
        }
        let at = |quantile| self.latency.value_at_quantile(quantile);
        let answered = !self.latency.is_empty();
        let rate = self.acknowledged as f64 / seconds.max(1e-9);
        let stats = producer.stats();
        if self.json {
            let latency = answered.then(|| {
                json!({
                    "count": self.latency.len(), "min": self.latency.min(), "mean": self.latency.mean(),
                    "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "p999": at(0.999),
                    "max": self.latency.max(),
                })
            });
            let summary = json!({"summary": {
                "sent": self.sent, "acknowledged": self.acknowledged, "failed": self.failed,
                "bytes": self.bytes, "seconds": seconds, "rate": rate, "latency_us": latency,
                "datagrams": stats.datagrams, "retransmissions": stats.retransmissions,
                "timeouts": stats.timeouts, "epoch": producer.epoch(),
                "acks": producer.acks().to_wire(),
            }});
            return self.line(&summary.to_string());
        }
        let what = match self.acks_expected {
            true => "acknowledged",
            false => "sent without acknowledgement",
        };
        eprintln!(
            "{} read, {} {what}, {} failed in {seconds:.2} s: {rate:.0} messages/s, {} datagrams, {} retransmitted",
            self.sent, self.acknowledged, self.failed, stats.datagrams, stats.retransmissions
        );
        if answered {
            eprintln!(
                "acknowledged after: p50 {} µs, p99 {} µs, longest {} µs",
                at(0.5),
                at(0.99),
                self.latency.max()
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(input: &[u8]) -> Vec<Vec<u8>> {
        let (sender, receiver) = sync_channel(100_000);
        read_lines(&mut io::BufReader::with_capacity(7, input), &sender);
        drop(sender);
        receiver.iter().map(Result::unwrap).collect()
    }

    fn messages(input: &[u8], separator: Option<&[u8]>) -> Vec<(Option<Vec<u8>>, Vec<u8>)> {
        let (sender, receiver) = sync_channel(100_000);
        read_lines(&mut io::BufReader::with_capacity(7, input), &sender);
        drop(sender);
        let mut source = Source::Lines {
            chunks: receiver,
            chunk: Vec::new(),
            at: 0,
            separator: separator.map(<[u8]>::to_vec),
        };
        let mut messages = Vec::new();
        while let Next::Message(key, value) = source.next(Duration::ZERO).unwrap() {
            messages.push((key.map(<[u8]>::to_vec), value.to_vec()));
        }
        messages
    }

    #[test]
    fn lines_become_messages_however_they_end() {
        let values = |input: &[u8]| -> Vec<Vec<u8>> {
            messages(input, None).into_iter().map(|m| m.1).collect()
        };
        assert_eq!(values(b""), Vec::<Vec<u8>>::new());
        assert_eq!(values(b"one"), [b"one"]);
        assert_eq!(
            values(b"a longer line\r\n\nlast one"),
            [&b"a longer line"[..], b"", b"last one"]
        );
        let many: Vec<u8> = b"0123456789abcdef\n".repeat(20_000);
        assert_eq!(values(&many).len(), 20_000);
    }

    #[test]
    fn a_key_ends_at_the_first_separator() {
        assert_eq!(
            messages(b"k::v::w\nno key\n::\n", Some(b"::")),
            [
                (Some(b"k".to_vec()), b"v::w".to_vec()),
                (None, b"no key".to_vec()),
                (Some(Vec::new()), Vec::new()),
            ]
        );
    }

    #[test]
    fn an_endless_line_is_cut_where_it_is_too_long_anyway() {
        let mut input = vec![b'x'; 3 * MAX_DATAGRAM];
        input.extend_from_slice(b"\nshort\n");
        let lines = chunks(&input).concat();
        assert_eq!(lines.len(), 2 * MAX_DATAGRAM + 1 + 6);
        assert!(lines.ends_with(b"x\nshort\n"));
    }

    #[test]
    fn times_are_taken_in_any_order() {
        let mut times = Times::default();
        let start = Instant::now();
        for i in 0..4 {
            times.sent(3, start + Duration::from_secs(i));
        }
        let second = |s| Some(start + Duration::from_secs(s));
        assert_eq!(times.take(3, 2), second(2));
        assert_eq!(times.take(3, 2), None);
        assert_eq!(times.take(3, 0), second(0));
        assert_eq!(times.take(3, 3), second(3));
        assert_eq!(times.take(3, 1), second(1));
        assert_eq!(times.take(3, 4), None);
        times.sent(3, start);
        assert_eq!(times.take(3, 4), Some(start));
    }
}
