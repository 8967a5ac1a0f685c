//! Load on a Kafka broker, Taffrail or another: what the bars kafka-throughput.sh and kafka-connections.sh run.
//!
//! `kafka_load produce|consume --address A --topic T --size BYTES --count N --partitions P` sends or fetches N messages
//! with next to no work of its own: batches are made beforehand, fetched ones are counted by their headers. Prints
//! `R messages a second`. `kafka_load connections --address A --topic T --busy B --rate R --seconds S --idle N
//! --pid SERVER` measures the latency of B connections that send R messages a second together, first alone, then with
//! N idle connections beside them, and the server's memory; they may take `--patience` seconds to open. Source: Kafka's
//! protocol guide, Produce 7, Fetch 11.

use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use mio::{Events, Interest, Poll, Token};
use socket2::{Domain, SockAddr, Socket, Type};
use taffrail::wire::record_batch::{self, BatchWriter};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Bytes of a produced batch: what clients that batch well send, less than Kafka's limit of 1 MB.
const BATCH: usize = 500_000;
/// Produce requests on their way.
const IN_FLIGHT: usize = 8;
/// Bytes of a partition in a fetch, and of all.
const FETCH: (i32, i32) = (4 << 20, 16 << 20);
/// Connections of one source address: fewer than half of the ephemeral ports. The kernel looks through one half before it
/// takes ports of the other, for each connection anew.
const OF_ADDRESS: usize = 10_000;
/// How long idle connections may take to open, and messages to be acknowledged, unless the caller says more: an emulated
/// machine is some twenty times slower.
const PATIENCE: Duration = Duration::from_secs(120);
/// Connections that are being opened at a time, fewer than a listener's backlog.
const OPENING: usize = 256;

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1).filter(|w| w != "--bench");
    let Some(mode) = words.next() else {
        println!("kafka_load: run by benches/bars/kafka-*.sh");
        return Ok(());
    };
    let words: Vec<String> = words.collect();
    let options: HashMap<&str, &str> = words
        .chunks_exact(2)
        .map(|pair| (pair[0].trim_start_matches('-'), &*pair[1]))
        .collect();
    let text = |name: &str| {
        options
            .get(name)
            .copied()
            .ok_or(format!("--{name} is missing"))
    };
    let number = |name: &str| -> Result<usize> { Ok(text(name)?.parse()?) };
    let address: SocketAddr = text("address")?.parse()?;
    let topic = text("topic")?;
    match &*mode {
        "produce" => produce(
            address,
            topic,
            number("size")?,
            number("count")?,
            number("partitions")?,
        ),
        "consume" => consume(address, topic, number("count")?, number("partitions")?),
        "connections" => connections(&Plan {
            address,
            topic,
            busy: number("busy")?,
            rate: number("rate")?,
            time: Duration::from_secs(number("seconds")? as u64),
            idle: number("idle")?,
            pid: number("pid")?,
            patience: match options.get("patience") {
                Some(seconds) => Duration::from_secs(seconds.parse()?),
                None => PATIENCE,
            },
        }),
        mode => Err(format!("no mode {mode:?}").into()),
    }
}

/// A request with its length, from its API key, version and body.
fn request(key: i16, version: i16, correlation: i32, body: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = vec![0; 4];
    out.extend(key.to_be_bytes());
    out.extend(version.to_be_bytes());
    out.extend(correlation.to_be_bytes());
    string(&mut out, "kafka-load");
    body(&mut out);
    let len = out.len() as i32 - 4;
    out[..4].copy_from_slice(&len.to_be_bytes());
    out
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as i16).to_be_bytes());
    out.extend(text.as_bytes());
}

fn int(out: &mut Vec<u8>, value: i32) {
    out.extend(value.to_be_bytes());
}

/// A Produce request with acks=all for one partition.
fn produce_request(topic: &str, partition: i32, batch: &[u8]) -> Vec<u8> {
    request(0, 7, 0, |out| {
        out.extend((-1i16).to_be_bytes()); // no transaction
        out.extend((-1i16).to_be_bytes()); // acks=all
        int(out, 30_000);
        int(out, 1);
        string(out, topic);
        int(out, 1);
        int(out, partition);
        int(out, batch.len() as i32);
        out.extend(batch);
    })
}

fn batch(size: usize, count: usize) -> Vec<u8> {
    let mut buffer = vec![0; 200 + count * (size + 30)];
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |t| t.as_millis() as i64);
    let mut writer = BatchWriter::new(&mut buffer, now);
    let value = vec![b'x'; size];
    for _ in 0..count {
        writer.push(now, None, Some(&value)).expect("there is room");
    }
    let len = writer.finish(0);
    buffer.truncate(len);
    buffer
}

/// Reads big-endian fields.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or("an answer ends early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn i16(&mut self) -> Result<i16> {
        Ok(i16::from_be_bytes(self.take(2)?.try_into()?))
    }

    fn i32(&mut self) -> Result<i32> {
        Ok(i32::from_be_bytes(self.take(4)?.try_into()?))
    }

    fn string(&mut self) -> Result<()> {
        let len = self.i16()?;
        self.take(len.max(0) as usize).map(drop)
    }
}

/// Checks the answer to a Produce request for one partition.
fn check_produced(answer: &[u8]) -> Result<()> {
    let mut fields = Fields(answer);
    fields.i32()?; // correlation
    fields.i32()?;
    fields.string()?;
    fields.i32()?;
    fields.i32()?; // partition
    match fields.i16()? {
        0 => Ok(()),
        code => Err(format!("a batch was refused with error {code}").into()),
    }
}

fn read_answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Result<()> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    buffer.resize(i32::from_be_bytes(len) as usize, 0);
    Ok(stream.read_exact(buffer)?)
}

fn produce(
    address: SocketAddr,
    topic: &str,
    size: usize,
    count: usize,
    partitions: usize,
) -> Result<()> {
    let each = (BATCH / (size + 10)).max(1);
    let batch = batch(size, each);
    let requests: Vec<Vec<u8>> = (0..partitions)
        .map(|partition| produce_request(topic, partition as i32, &batch))
        .collect();
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let (total, mut answered) = (count.div_ceil(each), 0);
    let mut answer = Vec::new();
    let start = Instant::now();
    for sent in 0..total {
        stream.write_all(&requests[sent % partitions])?;
        if sent + 1 - answered >= IN_FLIGHT {
            read_answer(&mut stream, &mut answer)?;
            check_produced(&answer)?;
            answered += 1;
        }
    }
    for _ in answered..total {
        read_answer(&mut stream, &mut answer)?;
        check_produced(&answer)?;
    }
    let rate = (total * each) as f64 / start.elapsed().as_secs_f64();
    println!("{rate:.0} messages a second");
    Ok(())
}

fn consume(address: SocketAddr, topic: &str, count: usize, partitions: usize) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut offsets = vec![0i64; partitions];
    let (mut answer, mut messages) = (Vec::new(), 0);
    let (start, mut empty) = (Instant::now(), 0);
    while messages < count {
        let fetch = request(1, 11, 0, |out| {
            int(out, -1);
            int(out, 500); // longest wait
            int(out, 1);
            int(out, FETCH.1);
            out.push(0);
            int(out, 0); // no session
            int(out, -1);
            int(out, 1);
            string(out, topic);
            int(out, partitions as i32);
            for (partition, offset) in offsets.iter().enumerate() {
                int(out, partition as i32);
                int(out, -1);
                out.extend(offset.to_be_bytes());
                out.extend((-1i64).to_be_bytes());
                int(out, FETCH.0);
            }
            int(out, 0);
            string(out, "");
        });
        stream.write_all(&fetch)?;
        read_answer(&mut stream, &mut answer)?;
        let before = messages;
        let mut fields = Fields(&answer);
        fields.take(4 + 4 + 2 + 4)?;
        for _ in 0..fields.i32()? {
            fields.string()?;
            for _ in 0..fields.i32()? {
                let partition = fields.i32()? as usize;
                let code = fields.i16()?;
                if code != 0 {
                    return Err(format!("partition {partition} answers error {code}").into());
                }
                fields.take(3 * 8)?;
                for _ in 0..fields.i32()? {
                    fields.take(16)?;
                }
                fields.i32()?;
                let len = fields.i32()?.max(0) as usize;
                let mut records = fields.take(len)?;
                // A broker may send part of a batch at the end.
                while let Ok(header) = record_batch::parse_header(records)
                    && records.len() >= header.total_len()
                {
                    messages += header.records_count as usize;
                    offsets[partition] = header.next_offset();
                    records = &records[header.total_len()..];
                }
            }
        }
        empty = if messages == before { empty + 1 } else { 0 };
        if empty > 20 {
            return Err(format!("{messages} of {count} messages are there").into());
        }
    }
    let rate = messages as f64 / start.elapsed().as_secs_f64();
    println!("{rate:.0} messages a second");
    Ok(())
}

/// What `connections` is to do.
struct Plan<'a> {
    address: SocketAddr,
    topic: &'a str,
    busy: usize,
    rate: usize,
    time: Duration,
    idle: usize,
    pid: usize,
    patience: Duration,
}

/// A connection that sends one message after another.
struct Busy {
    stream: mio::net::TcpStream,
    /// When its messages were to be sent; the first one is on its way.
    due: VecDeque<Instant>,
    input: Vec<u8>,
}

fn connections(plan: &Plan<'_>) -> Result<()> {
    let mut busy = Vec::new();
    let mut poll = Poll::new()?;
    for at in 0..plan.busy {
        let stream = TcpStream::connect(plan.address)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let mut stream = mio::net::TcpStream::from_std(stream);
        poll.registry()
            .register(&mut stream, Token(at), Interest::READABLE)?;
        busy.push(Busy {
            stream,
            due: VecDeque::new(),
            input: Vec::new(),
        });
    }
    // Paths, caches, files.
    run(plan, &mut poll, &mut busy, plan.time / 4)?;
    let alone = run(plan, &mut poll, &mut busy, plan.time)?;
    let (before, kernel) = (resident(plan.pid)?, kernel_memory()?);
    let start = Instant::now();
    let idle = open(plan)?;
    println!(
        "{} idle connections opened in {:.1} s",
        idle.len(),
        start.elapsed().as_secs_f64()
    );
    let (after, kernel_after) = (resident(plan.pid)?, kernel_memory()?);
    let among = run(plan, &mut poll, &mut busy, plan.time)?;
    for (name, h) in [("alone", &alone), ("among idle", &among)] {
        println!(
            "busy {name}: {} messages, p50 {} p99 {} p99.9 {} us",
            h.len(),
            h.value_at_quantile(0.5),
            h.value_at_quantile(0.99),
            h.value_at_quantile(0.999)
        );
    }
    let each = |before: u64, after: u64| {
        after.saturating_sub(before) as f64 * 1024.0 / idle.len().max(1) as f64
    };
    println!(
        "kernel bytes an idle connection, both ends: {:.0}",
        each(kernel, kernel_after)
    );
    println!("bytes an idle connection: {:.0}", each(before, after));
    println!(
        "p99 ratio: {:.2}",
        among.value_at_quantile(0.99) as f64 / alone.value_at_quantile(0.99) as f64
    );
    drop(idle);
    Ok(())
}

/// Kibibytes of a process's memory that are in use.
fn resident(pid: usize) -> Result<u64> {
    kib(&format!("/proc/{pid}/status"), &["VmRSS:"])
}

/// Kibibytes of kernel memory for objects such as sockets.
fn kernel_memory() -> Result<u64> {
    kib("/proc/meminfo", &["Slab:"])
}

fn kib(path: &str, names: &[&str]) -> Result<u64> {
    let text = std::fs::read_to_string(path)?;
    let values = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        names
            .contains(&name)
            .then(|| words.next()?.parse::<u64>().ok())?
    });
    Ok(values.sum())
}

/// Opens the idle connections, each having said ApiVersions, as a client's do.
fn open(plan: &Plan<'_>) -> Result<Vec<mio::net::TcpStream>> {
    let hello = request(18, 0, 0, |_| {});
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(OPENING);
    let mut streams: Vec<mio::net::TcpStream> = Vec::with_capacity(plan.idle);
    let (mut opening, mut buffer) = (0, [0; 4096]);
    let mut answered = 0;
    let until = Instant::now() + plan.patience;
    while answered < plan.idle {
        if Instant::now() > until {
            return Err(format!("{answered} of {} connections were answered", plan.idle).into());
        }
        while streams.len() < plan.idle && opening < OPENING {
            let at = streams.len();
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            let source = Ipv4Addr::new(127, 0, 1, (at / OF_ADDRESS + 1) as u8);
            socket.bind(&SockAddr::from(SocketAddr::from((source, 0))))?;
            match socket.connect(&plan.address.into()) {
                Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
                    return Err(error.into());
                }
                _ => {}
            }
            let mut stream = mio::net::TcpStream::from_std(socket.into());
            let interest = Interest::READABLE | Interest::WRITABLE;
            poll.registry().register(&mut stream, Token(at), interest)?;
            streams.push(stream);
            opening += 1;
        }
        poll.poll(&mut events, Some(Duration::from_secs(5)))?;
        for event in &events {
            let stream = &mut streams[event.token().0];
            if event.is_readable() {
                match stream.read(&mut buffer) {
                    Ok(0) => return Err("the server closed a connection".into()),
                    Ok(_) => {
                        poll.registry().deregister(stream)?;
                        opening -= 1;
                        answered += 1;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            } else if event.is_writable() {
                stream.write_all(&hello)?;
            }
        }
    }
    Ok(streams)
}

/// Sends messages for `time` at the plan's rate, each busy connection in turn; gives the times from when each was to be
/// sent to its acknowledgement, in microseconds.
fn run(
    plan: &Plan<'_>,
    poll: &mut Poll,
    busy: &mut [Busy],
    time: Duration,
) -> Result<Histogram<u64>> {
    let message = produce_request(plan.topic, 0, &batch(100, 1));
    let mut times = Histogram::<u64>::new(3)?;
    let mut events = Events::with_capacity(1024);
    let gap = Duration::from_secs(1) / plan.rate as u32;
    let (start, mut sent, mut open) = (Instant::now(), 0u32, 0usize);
    let total = (time.as_secs_f64() * plan.rate as f64) as u32;
    let mut buffer = [0; 4096];
    while sent < total || open > 0 {
        let now = Instant::now();
        if now > start + time + plan.patience {
            return Err(format!("{open} messages are not acknowledged").into());
        }
        while sent < total && start + gap * sent <= now {
            let conn = &mut busy[sent as usize % plan.busy];
            conn.due.push_back(start + gap * sent);
            if conn.due.len() == 1 {
                conn.stream.write_all(&message)?;
            }
            sent += 1;
            open += 1;
        }
        let next = match sent < total {
            true => (start + gap * sent).saturating_duration_since(Instant::now()),
            false => Duration::from_secs(1),
        };
        poll.poll(&mut events, Some(next))?;
        for event in &events {
            let conn = &mut busy[event.token().0];
            loop {
                match conn.stream.read(&mut buffer) {
                    Ok(0) => return Err("the server closed a busy connection".into()),
                    Ok(len) => conn.input.extend_from_slice(&buffer[..len]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error.into()),
                }
            }
            while let Some(len) = conn.input.first_chunk::<4>() {
                let end = 4 + i32::from_be_bytes(*len) as usize;
                if conn.input.len() < end {
                    break;
                }
                check_produced(&conn.input[4..end])?;
                conn.input.drain(..end);
                if let Some(due) = conn.due.pop_front() {
                    times.record(due.elapsed().as_micros() as u64)?;
                    open -= 1;
                }
                if !conn.due.is_empty() {
                    conn.stream.write_all(&message)?;
                }
            }
        }
    }
    Ok(times)
}
