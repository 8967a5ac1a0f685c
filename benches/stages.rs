//! Cycles and nanoseconds a message for each stage of the path of a raw datagram, one core, with
//! 22-byte and 200-byte payloads: parse, ring, batch (write the records), CRC, and a whole round of
//! the shard on a real log (ring to staging, release and commit included).
//!
//! `cargo bench --bench stages [-- DIR]`; the log lies below DIR (default: the temporary folder).
//! Packets lie in 2 KiB buffers of a pool that is larger than the L2 cache, as mbufs do, and each
//! stage meets them cold. Figures are the median of many bursts.

use std::{hint::black_box, mem::MaybeUninit, path::PathBuf, sync::Arc, time::Instant};

use crossbeam_queue::ArrayQueue;
use taffrail::{
    memory::spsc,
    net::{Interface, InterfaceConfig, ParseOptions, Parsed, parse},
    shard::{Inbound, Kind, Now, Recovered, Release, Shard, ShardConfig},
    storage::{
        PartitionKey,
        wal::{WalConfig, WalWriter},
    },
    wire::record_batch::{BatchWriter, HEADER_LEN},
};

/// Messages of a round.
const ROUND: usize = 512;
/// Packet buffers: 64 MiB of them.
const BUFFERS: usize = 32_768;
const BUFFER: usize = 2048;
/// Where a frame begins in its buffer, as in an mbuf.
const HEADROOM: usize = 128;
const HEADERS: usize = 14 + 20 + 8;
/// Rounds of each measurement.
const ROUNDS: usize = 2000;
/// The receive burst of an rx lcore.
const BURST: usize = 32;

/// The time stamp counter.
#[inline(always)]
fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: reads a counter that every x86-64 CPU has.
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        use std::sync::OnceLock;
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

/// Cycles of the counter in a nanosecond.
fn cycles_a_ns() -> f64 {
    let (start, from) = (Instant::now(), cycles());
    while start.elapsed().as_millis() < 200 {}
    (cycles() - from) as f64 / start.elapsed().as_nanos() as f64
}

fn ones_complement(bytes: &[u8], start: u32) -> u32 {
    bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .fold(start, |sum, word| sum + word)
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// An Ethernet, IPv4 and UDP frame with right checksums.
fn frame(payload: usize, number: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADERS + payload];
    frame[..6].copy_from_slice(&MAC);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    frame[12..14].copy_from_slice(&0x0800u16.to_be_bytes());
    let ip = &mut frame[14..34];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&(28 + payload as u16).to_be_bytes());
    ip[8] = 64;
    ip[9] = 17;
    ip[12..16].copy_from_slice(&[10, 0, 0, 2]);
    ip[16..20].copy_from_slice(&[10, 0, 0, 1]);
    let sum = fold(ones_complement(ip, 0));
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame[34..36].copy_from_slice(&5000u16.to_be_bytes());
    frame[36..38].copy_from_slice(&6000u16.to_be_bytes());
    frame[38..40].copy_from_slice(&(8 + payload as u16).to_be_bytes());
    for (i, byte) in frame[HEADERS..].iter_mut().enumerate() {
        *byte = (number * 7 + i * 13) as u8;
    }
    let pseudo = ones_complement(&frame[26..34], 17 + 8 + payload as u32);
    let sum = fold(ones_complement(&frame[34..], pseudo));
    frame[40..42].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// Packets in their buffers; the next round's are always those not touched for longest.
struct Packets {
    memory: Vec<u8>,
    payload: usize,
    next: usize,
}

impl Packets {
    fn new(payload: usize) -> Packets {
        let mut memory = vec![0; BUFFERS * BUFFER];
        for (number, buffer) in memory.chunks_exact_mut(BUFFER).enumerate() {
            let frame = frame(payload, number);
            buffer[HEADROOM..HEADROOM + frame.len()].copy_from_slice(&frame);
        }
        Packets {
            memory,
            payload,
            next: 0,
        }
    }

    fn frames(&mut self, count: usize) -> impl Iterator<Item = &[u8]> {
        let start = self.next;
        self.next = (self.next + count) % BUFFERS;
        let len = HEADERS + self.payload;
        let memory = &self.memory;
        (0..count).map(move |i| {
            let at = (start + i) % BUFFERS * BUFFER + HEADROOM;
            &memory[at..at + len]
        })
    }

    fn inbound(&mut self, count: usize, time_ns: i64, out: &mut Vec<Inbound>) {
        let payload = self.payload;
        out.clear();
        for frame in self.frames(count) {
            // SAFETY: the packets outlive every use, and nobody writes to them.
            out.push(unsafe {
                let data = frame.as_ptr().add(HEADERS);
                Inbound::new(
                    data as usize,
                    data,
                    payload as u16,
                    time_ns,
                    0,
                    Kind::Raw,
                    0,
                )
            });
        }
    }
}

/// A free list, as a mempool's per-lcore cache: handles are put on a stack.
struct FreeList(Vec<usize>);

impl Release for FreeList {
    fn release(&mut self, owners: &[usize]) {
        if self.0.len() + owners.len() > self.0.capacity() {
            self.0.clear();
        }
        self.0.extend_from_slice(owners);
    }
}

fn median(mut samples: Vec<u64>, messages: usize) -> f64 {
    samples.sort_unstable();
    samples[samples.len() / 2] as f64 / messages as f64
}

fn prefetch(data: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(data.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
}

fn parse_stage(packets: &mut Packets, l4_good: bool) -> f64 {
    let interface = Interface::new(&InterfaceConfig {
        mac: MAC,
        addresses: vec![("10.0.0.1".parse().expect("an address"), 24)],
        ..InterfaceConfig::default()
    });
    let options = ParseOptions {
        l3_good: l4_good,
        l4_good,
        ..ParseOptions::new(&interface)
    };
    let mut samples = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let frames: Vec<&[u8]> = packets.frames(BURST).collect();
        let from = cycles();
        // As an rx lcore does: fetch the burst's headers, then look.
        for frame in &frames {
            prefetch(frame.as_ptr());
        }
        for frame in &frames {
            let parsed = parse(frame, &options);
            assert!(matches!(black_box(parsed), Parsed::Udp(_)));
        }
        samples.push(cycles() - from);
    }
    median(samples, BURST)
}

/// Both ends on one core; between two, see `rings`.
fn ring_stage(packets: &mut Packets) -> f64 {
    let (mut tx, mut rx) = spsc::ring::<Inbound>(4096);
    let mut burst = Vec::with_capacity(BURST);
    let mut out = [MaybeUninit::uninit(); BURST];
    let mut samples = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        packets.inbound(BURST, 0, &mut burst);
        let from = cycles();
        let sent = tx.push_burst(black_box(&burst));
        let got = rx.pop_burst(&mut out);
        samples.push(cycles() - from);
        assert_eq!((sent, got), (BURST, BURST));
        black_box(&out);
    }
    median(samples, BURST)
}

/// Records written from cold packets, without and then with header and CRC.
fn batch_stage(packets: &mut Packets) -> (f64, f64) {
    let mut buf = vec![0; ROUND * (packets.payload + 32) + HEADER_LEN];
    let (mut write, mut crc) = (Vec::with_capacity(ROUNDS), Vec::with_capacity(ROUNDS));
    let mut items = Vec::with_capacity(ROUND);
    for _ in 0..ROUNDS {
        packets.inbound(ROUND, 1_700_000_000_000_000_000, &mut items);
        let from = cycles();
        let mut batch = BatchWriter::new(&mut buf, 1_700_000_000_000);
        for (i, item) in items.iter().enumerate() {
            if let Some(ahead) = items.get(i + 12) {
                prefetch(ahead.payload().as_ptr());
                prefetch(ahead.payload().as_ptr().wrapping_add(64));
            }
            batch
                .push(1_700_000_000_000, None, Some(item.payload()))
                .expect("there is room");
        }
        let middle = cycles();
        black_box(batch.finish(0));
        crc.push(cycles() - middle);
        write.push(middle - from);
    }
    (median(write, ROUND), median(crc, ROUND))
}

struct Whole {
    /// Rounds that stored messages.
    store: f64,
    /// Everything, commits and waiting for the disk included.
    all: f64,
    messages: u64,
    bytes: u64,
    seconds: f64,
}

/// Rounds of a whole shard on a real log.
fn shard_stage(packets: &mut Packets, dir: &std::path::Path) -> Whole {
    let dir = tempfile::tempdir_in(dir).expect("a folder for the log");
    let config = ShardConfig {
        partitions: vec![PartitionKey {
            topic: 1,
            partition: 0,
        }],
        max_producers: 64,
        max_pending_acks: 64,
        gaps: Arc::new(ArrayQueue::new(1)),
        wakes: Vec::new(),
    };
    let mut recovered = Recovered::new(&config);
    let (wal, shared, _) =
        WalWriter::open(&WalConfig::new(dir.path(), 7), 0, &mut recovered).expect("the log opens");
    let (mut tx, rx) = spsc::ring::<Inbound>(4096);
    let release = FreeList(Vec::with_capacity(1 << 16));
    let mut shard = Shard::new(config, recovered, wal, vec![rx], vec![], release);
    let stats = shard.partition_stats();
    let start = Instant::now();
    let now = || Now {
        mono_ns: start.elapsed().as_nanos() as u64,
        unix_ns: 1_700_000_000_000_000_000,
    };
    let mut items = Vec::with_capacity(ROUND);
    let mut samples = Vec::with_capacity(ROUNDS);
    let mut total = 0;
    let begin = Instant::now();
    while samples.len() < ROUNDS {
        packets.inbound(ROUND, 1_700_000_000_000_000_000, &mut items);
        let sent = tx.push_burst(&items);
        let stored = stats[0].stored.get();
        let from = cycles();
        shard.poll(now());
        let took = cycles() - from;
        total += took;
        // Held-back rounds cost time too, but are no measure of the work.
        if stats[0].stored.get() - stored == ROUND as u64 && sent == ROUND {
            samples.push(took);
        }
    }
    let stored = stats[0].stored.get();
    shard.drain_and_close(now).expect("the log closes");
    let seconds = begin.elapsed().as_secs_f64();
    Whole {
        store: median(samples, ROUND),
        all: total as f64 / stored as f64,
        messages: stats[0].stored.get(),
        bytes: shared.committed_bytes.get(),
        seconds,
    }
}

fn main() {
    let dir = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'))
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let per_ns = cycles_a_ns();
    println!("time stamp counter: {per_ns:.2} cycles a ns");
    println!("| stage | 22 bytes: cycles | ns | 200 bytes: cycles | ns |");
    println!("| --- | ---: | ---: | ---: | ---: |");
    let mut rows: Vec<(&str, Vec<f64>)> = [
        "parse, checksums verified in software",
        "parse, checksums verified by the NIC",
        "ring, both ends",
        "batch: records written from cold packets",
        "batch: header and CRC-32C",
        "shard round: pop to staging, release, commit share",
        "shard in all, with rounds that waited for the disk",
    ]
    .map(|name| (name, Vec::new()))
    .into();
    let mut notes = Vec::new();
    for payload in [22, 200] {
        let mut packets = Packets::new(payload);
        let (write, crc) = batch_stage(&mut packets);
        let software = parse_stage(&mut packets, false);
        let nic = parse_stage(&mut packets, true);
        let ring = ring_stage(&mut packets);
        let whole = shard_stage(&mut packets, &dir);
        let figures = [software, nic, ring, write, crc, whole.store, whole.all];
        for (row, figure) in rows.iter_mut().zip(figures) {
            row.1.push(figure);
        }
        notes.push(format!(
            "{payload} bytes: {} messages durable in {:.2} s ({:.1} M/s, {:.0} MB/s to the disk)",
            whole.messages,
            whole.seconds,
            whole.messages as f64 / whole.seconds / 1e6,
            whole.bytes as f64 / whole.seconds / 1e6,
        ));
    }
    for (name, figures) in rows {
        print!("| {name} |");
        for figure in figures {
            print!(" {figure:.0} | {:.1} |", figure / per_ns);
        }
        println!();
    }
    for note in notes {
        println!("{note}");
    }
}
