//! `taffrail consume`: the messages of a topic's partitions as they come, and for a group how far it is.
//!
//! A group's offsets are committed by hand, without membership: only while it has no members, which the server
//! checks with each commit. Invariant: what is committed was written to standard output before, so what a
//! crash leaves uncommitted is printed again, and nothing is left out.

use std::collections::HashMap;
use std::io::{BufWriter, StdoutLock, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::read::{Format, Shown, parse_from, parse_time, print_batches};
use super::{CliResult, ServerArgs};
use crate::control::client::{ControlClient, ControlError};
use crate::control::names;
use crate::control::protocol::Position;

/// Bytes asked for at a time.
const CHUNK: u32 = 1 << 20;
/// How often a group's offsets are committed while messages are printed.
const COMMIT_INTERVAL: Duration = Duration::from_secs(1);
/// How long the server is asked to wait for messages; it answers at once when there are some.
const WAIT: Duration = Duration::from_secs(10);

/// Print the messages of a topic, of all its partitions or some
///
/// Without --follow it ends where the topic ended when it began; with it, it goes on until it is interrupted. Messages
/// of a partition come in order; those of different partitions in any.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Topic to consume
    topic: String,
    /// Only these partitions
    #[arg(long, short, value_name = "P", value_delimiter = ',')]
    partition: Vec<u32>,
    /// Where to begin: an offset, "earliest" or "latest" [default: earliest]
    #[arg(long, value_name = "OFFSET", value_parser = parse_from, conflicts_with = "time")]
    from: Option<Position>,
    /// Begin with the first message of this time or later: RFC 3339 (2026-11-24T09:30:00Z) or Unix milliseconds
    #[arg(long, value_name = "T", value_parser = parse_time)]
    time: Option<Position>,
    /// Wait for further messages at the end, also of new partitions, until interrupted
    #[arg(long, short)]
    follow: bool,
    /// Stop after this many messages
    #[arg(long, short = 'n', value_name = "N")]
    count: Option<u64>,
    /// Begin where this consumer group is, and commit what was printed; --from and --time are for partitions without a
    /// committed offset. The group must have no members.
    #[arg(long, short, value_name = "GROUP")]
    group: Option<String>,
    /// text: the value and a newline; json: one object a line; hex: partition, offset, time and a hexadecimal value
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    #[command(flatten)]
    server: ServerArgs,
}

type Error = Box<dyn std::error::Error + Send + Sync>;

/// A partition that is printed.
struct Part {
    partition: u32,
    /// Offset of the next message.
    next: i64,
    /// What was printed ends here, as far as the group's offsets say.
    committed: i64,
    /// Where to read up to.
    end: i64,
}

struct Consumer<'a> {
    args: &'a Args,
    client: ControlClient,
    interrupt: Arc<Interrupt>,
    parts: Vec<Part>,
    /// Partitions of the topic, printed or not.
    known: usize,
    left: u64,
    out: BufWriter<StdoutLock<'static>>,
    next_commit: Instant,
}

/// Prints messages until the end, the count, or an interrupt.
pub fn run(args: &Args) -> CliResult {
    let mut client = ControlClient::connect(&args.server.socket_path()?)?;
    let topics = client.topics()?;
    let Some(topic) = topics.iter().find(|topic| topic.name == args.topic) else {
        let names = topics.iter().map(|topic| topic.name.as_str());
        return Err(names::unknown_topic(&args.topic, names).into());
    };
    let known = topic.partitions.len();
    let mut partitions = args.partition.clone();
    partitions.sort_unstable();
    partitions.dedup();
    if let Some(unknown) = partitions.iter().find(|&&p| p as usize >= known) {
        let (name, last) = (&args.topic, known - 1);
        return Err(format!("topic {name} has partitions 0 to {last}, not {unknown}").into());
    }
    if partitions.is_empty() {
        partitions = (0..known as u32).collect();
    }
    let committed = match &args.group {
        Some(group) => committed(&mut client, group, &args.topic)?,
        None => HashMap::new(),
    };
    let interrupt = Interrupt::register()?;
    let mut consumer = Consumer {
        args,
        client,
        interrupt,
        parts: Vec::new(),
        known,
        left: args.count.unwrap_or(u64::MAX),
        out: BufWriter::new(std::io::stdout().lock()),
        next_commit: Instant::now() + COMMIT_INTERVAL,
    };
    for partition in partitions {
        let from = match committed.get(&partition) {
            Some(&offset) => Position::Offset(offset),
            None => args.time.or(args.from).unwrap_or(Position::Earliest),
        };
        consumer.add(partition, from)?;
    }
    let result = match consumer.follow() {
        // The interrupt may have ended a request.
        Err(_) if consumer.interrupt.is_set() => Ok(()),
        result => result,
    };
    if args.group.is_some() {
        if consumer.interrupt.is_set() {
            consumer.client = ControlClient::connect(&args.server.socket_path()?)?;
        }
        // What was printed before a failure is printed; the failure is what is told.
        let committed = consumer.commit();
        result?;
        return committed;
    }
    consumer.out.flush()?;
    result
}

/// The group's offsets in a topic.
fn committed(
    client: &mut ControlClient,
    group: &str,
    topic: &str,
) -> Result<HashMap<u32, i64>, Error> {
    let info = client.group(group)?;
    if !info.members.is_empty() {
        return Err(format!(
            "group {group} has {} members, who commit its offsets: `taffrail group describe {group}` names them; consume without --group, or with another",
            info.members.len()
        )
        .into());
    }
    let own = info.partitions.iter().filter(|p| p.topic == topic);
    Ok(own
        .filter_map(|p| Some((p.partition, p.committed?)))
        .collect())
}

impl Consumer<'_> {
    /// Takes a partition in; a position outside of what there is is moved to its nearer end.
    fn add(&mut self, partition: u32, from: Position) -> CliResult {
        let topic = &self.args.topic;
        let found = self.client.find(topic, partition, from)?;
        let next = found.from.clamp(found.start, found.high_watermark);
        if next != found.from {
            eprintln!(
                "partition {partition}: offset {} is outside of {} to {}: begins at {next}",
                found.from, found.start, found.high_watermark
            );
        }
        self.parts.push(Part {
            partition,
            next,
            committed: next,
            end: found.high_watermark,
        });
        Ok(())
    }

    fn follow(&mut self) -> CliResult {
        loop {
            while self.round()? {}
            if self.left == 0 || self.interrupt.is_set() {
                return Ok(());
            }
            if self.args.group.is_some() {
                self.commit()?;
            } else {
                self.out.flush()?;
            }
            if !self.args.follow {
                return Ok(());
            }
            self.wait()?;
        }
    }

    /// Reads a chunk of each partition that has more; false: none has, or it is over.
    fn round(&mut self) -> Result<bool, Error> {
        let mut more = false;
        for at in 0..self.parts.len() {
            if self.left == 0 || self.interrupt.is_set() {
                return Ok(false);
            }
            if self.parts[at].next >= self.parts[at].end {
                continue;
            }
            self.chunk(at)?;
            more = true;
            if self.args.group.is_some() && self.next_commit <= Instant::now() {
                self.commit()?;
            }
        }
        Ok(more)
    }

    fn chunk(&mut self, at: usize) -> CliResult {
        let part = &mut self.parts[at];
        let topic = &self.args.topic;
        let mut batches = Vec::new();
        let from = Position::Offset(part.next);
        match self
            .client
            .read(topic, part.partition, from, CHUNK, &mut batches)
        {
            Ok(_) => {}
            Err(ControlError::Refused(reason)) => {
                // Retention may have been faster.
                let found = self
                    .client
                    .find(topic, part.partition, Position::Earliest)?;
                if found.start <= part.next {
                    return Err(reason.into());
                }
                eprintln!(
                    "partition {}: the messages {} to {} are gone",
                    part.partition,
                    part.next,
                    found.start - 1
                );
                part.next = found.start;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
        let shown = Shown {
            topic,
            partition: part.partition,
            format: self.args.format,
            names_partition: true,
        };
        let before = part.next;
        part.next = print_batches(&shown, &batches, before, &mut self.left, &mut self.out)?;
        if part.next == before && self.left > 0 {
            // Nothing is behind this place but what compaction took out.
            part.next = part.end;
        }
        Ok(())
    }

    /// Waits until there is more.
    fn wait(&mut self) -> CliResult {
        let mut offsets = vec![i64::MAX; self.known];
        for part in &self.parts {
            offsets[part.partition as usize] = part.next;
        }
        self.interrupt.during(&self.client)?;
        let ends = self.client.wait(&self.args.topic, &offsets, WAIT)?;
        for part in &mut self.parts {
            let end = ends.get(part.partition as usize).copied();
            part.end = end.unwrap_or(part.end);
        }
        if self.args.partition.is_empty() {
            for partition in self.known..ends.len() {
                self.add(partition as u32, Position::Earliest)?;
            }
        }
        self.known = self.known.max(ends.len());
        Ok(())
    }

    /// Commits what was printed.
    fn commit(&mut self) -> CliResult {
        self.out.flush()?;
        self.next_commit = Instant::now() + COMMIT_INTERVAL;
        let Some(group) = &self.args.group else {
            return Ok(());
        };
        let moved: std::collections::BTreeMap<u32, i64> = self
            .parts
            .iter()
            .filter(|part| part.next != part.committed)
            .map(|part| (part.partition, part.next))
            .collect();
        if !moved.is_empty() {
            let offsets = [(self.args.topic.clone(), moved)].into();
            self.client.commit(group, offsets)?;
        }
        for part in &mut self.parts {
            part.committed = part.next;
        }
        Ok(())
    }
}

/// SIGINT and SIGTERM: they end a wait at once; a second one ends the process.
struct Interrupt {
    set: AtomicBool,
    /// The connection that waits.
    waits: Mutex<Option<UnixStream>>,
}

impl Interrupt {
    fn register() -> std::io::Result<Arc<Self>> {
        let interrupt = Arc::new(Self {
            set: AtomicBool::new(false),
            waits: Mutex::new(None),
        });
        let signals = [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM];
        let mut signals = signal_hook::iterator::Signals::new(signals)?;
        let own = Arc::clone(&interrupt);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    if own.set.swap(true, Ordering::SeqCst) {
                        std::process::exit(128 + signal);
                    }
                    let waits = own.waits.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(stream) = &*waits {
                        // It may have ended by itself.
                        let _ = stream.shutdown(Shutdown::Both);
                    }
                }
            })?;
        Ok(interrupt)
    }

    fn is_set(&self) -> bool {
        self.set.load(Ordering::SeqCst)
    }

    /// From now on an interrupt ends what the client waits for.
    fn during(&self, client: &ControlClient) -> std::io::Result<()> {
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        if waits.is_none() {
            *waits = Some(client.handle()?);
        }
        if self.is_set()
            && let Some(stream) = &*waits
        {
            // The signal came before there was something to end.
            let _ = stream.shutdown(Shutdown::Both);
        }
        Ok(())
    }
}
