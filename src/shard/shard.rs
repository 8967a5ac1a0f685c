//! The body of a storage lcore's poll loop.
//!
//! Invariant: a message taken from an input ring is, when its round is over, either held back
//! (staging was full; nothing is popped until it is through) or accounted for exactly once as
//! stored, duplicate, refused or dropped, and its buffer released exactly once. Messages of a
//! partition keep their order. A producer is told of a batch only after it is in staging (acks=1)
//! or durable (acks=−1).

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crossbeam_queue::ArrayQueue;

use crate::memory::spsc;
use crate::memory::wake::Wake;
use crate::shard::{
    ack::{Outlets, Pending},
    control::{Changes, ShardControl},
    credit::Credit,
    gap::{self, GAP_BATCH_MAX},
    inbound::{Ack, GapReport, Inbound, Kind, Now, Release, ReplyTo},
    partition::{Limits, PartitionStats, Partitions},
    produce::{self, Outcome},
    raw::{self, TARGET_BATCH_BYTES},
    snapshot::{Recovered, State},
};
use crate::storage::wal::snapshot::PART_MAX;
use crate::storage::{PartitionKey, Refusal, WalError, WalState, WalWriter};
use crate::telemetry::Counter;
use crate::wire::{
    datagram::{AckEntry, ErrorCode, ProduceHeader},
    record_batch,
};

/// Messages handled in one round: enough to make a batch a partition out of small messages, few
/// enough that their descriptors stay in the nearest cache.
pub const ROUND_MESSAGES: usize = 512;

/// So many messages at hand make a round that need not hurry to commit: more will be there when it ends.
const LOADED_MESSAGES: usize = ROUND_MESSAGES / 2;

/// Gap reports stored in one round, so that a flood of them cannot starve messages.
const ROUND_GAPS: usize = 8;

/// Acknowledgements that may wait for the disk by default (7 MiB): 65,536 batches are more than
/// staging holds of all but tiny ones.
pub const DEFAULT_PENDING_ACKS: usize = 65_536;

/// Partitions a shard can have: their messages are grouped through a table of two bytes each.
pub const MAX_PARTITIONS: usize = 1 << 20;

/// A clean stop gives up after so long without progress of the log (a disk that stays full).
const CLOSE_STALL_NS: u64 = 5_000_000_000;

/// What a shard is made of.
#[derive(Clone, Debug)]
pub struct ShardConfig {
    /// The partitions it owns; the position is the shard-local index of [`Inbound`].
    pub partitions: Vec<PartitionKey>,
    /// Producers remembered, counted once a partition.
    pub max_producers: usize,
    /// Acknowledgements that may wait for the disk; [`DEFAULT_PENDING_ACKS`].
    pub max_pending_acks: usize,
    /// Where losses upstream are reported.
    pub gaps: Arc<ArrayQueue<GapReport>>,
    /// Kernel threads to be woken when answers or high watermarks may interest them.
    pub wakes: Vec<Arc<Wake>>,
}

/// What is counted and shown of a shard; written by the shard alone.
#[derive(Debug, Default)]
pub struct ShardStats {
    /// Messages that named no partition of the shard; they count nowhere else.
    pub stray: PartitionStats,
    /// Acknowledgements handed to rx lcores.
    pub acks_sent: Counter,
    /// Acknowledgements that found their ring full; the producer retransmits.
    pub acks_lost: Counter,
    /// Gap reports that could not be stored, because the log failed or the partition is unknown.
    pub gaps_lost: Counter,
    /// Snapshots of the shard's state written into the log.
    pub snapshots: Counter,
    /// Rounds that ended because staging was full.
    pub backpressure: Counter,
    /// Producers forgotten to make room.
    pub producers_evicted: AtomicU64,
    /// Producers known.
    pub producers: AtomicU64,
    /// Messages in the input rings and held back, at the last round that looked.
    pub queued: AtomicU64,
    /// Acknowledgements waiting for the disk.
    pub pending_acks: AtomicU64,
    /// Credit that acknowledgements carry now.
    pub credit: AtomicU64,
    /// Grows whenever a high watermark was raised.
    pub raised: AtomicU64,
}

/// Why a clean stop was not clean.
#[derive(Debug, thiserror::Error)]
pub enum CloseError {
    /// The log did not take what was left within five seconds.
    #[error(
        "the log took nothing for 5 s: {held} messages were not stored and {pending} acknowledgements not sent; \
         free space on its disk before the next start"
    )]
    Stalled {
        /// Datagrams given up, counted as dropped or refused.
        held: usize,
        /// Acknowledgements given up.
        pending: usize,
    },
    /// The log failed.
    #[error(transparent)]
    Wal(#[from] WalError),
}

/// A storage lcore's state. Everything is allocated by [`Shard::new`].
pub struct Shard<R: Release> {
    wal: Option<WalWriter>,
    core: Core<R>,
}

struct Core<R> {
    partitions: Partitions,
    orphans: Vec<(PartitionKey, i64)>,
    producers: crate::shard::dedupe::Producers,
    inputs: Vec<spsc::Consumer<Inbound>>,
    /// The input that the next round starts with.
    turn: usize,
    outlets: Outlets,
    release: R,
    /// This round's messages, in the order they came; between rounds those held back.
    items: Vec<Inbound>,
    /// The same by partition, each partition's in order.
    sorted: Vec<Inbound>,
    touched: Vec<u32>,
    owners: Vec<usize>,
    /// Answers that need not wait, of this round.
    answers: Vec<Ack>,
    pending: Pending,
    /// The newest frame that anything was published in.
    last_seq: u64,
    credit: Credit,
    staging_slots: usize,
    gaps: Arc<ArrayQueue<GapReport>>,
    changes: Arc<Changes>,
    wakes: Vec<Arc<Wake>>,
    /// Something was answered or made durable since the sleepers were woken last.
    news: bool,
    held_gap: Option<GapReport>,
    /// Next part of a snapshot under way, and its number of parts.
    snapshot: Option<(u32, u32)>,
    stats: Arc<ShardStats>,
}

impl<R: Release> Shard<R> {
    /// A shard on a log that has just been opened with `recovered` as its replay. `acks` are the
    /// rings back by the rx lcore's index (`ReplyTo::rx`).
    ///
    /// # Panics
    /// When `recovered` was made for other partitions, or a limit of `config` is out of range.
    pub fn new(
        config: ShardConfig,
        recovered: Recovered,
        wal: WalWriter,
        inputs: Vec<spsc::Consumer<Inbound>>,
        acks: Vec<spsc::Producer<Ack>>,
        release: R,
    ) -> Self {
        assert_eq!(
            config.partitions, recovered.keys,
            "recovered for other partitions"
        );
        assert!(
            config.partitions.len() < MAX_PARTITIONS,
            "{} partitions in a shard, at most {MAX_PARTITIONS} are possible",
            config.partitions.len()
        );
        let staging_slots = wal.slots();
        let partitions = Partitions::new(&recovered.keys, &recovered.next_offsets, limits(&wal));
        let last_seq = wal.durable().0;
        let core = Core {
            partitions,
            orphans: recovered.orphans,
            producers: recovered.producers,
            inputs,
            turn: 0,
            outlets: Outlets::new(acks),
            release,
            items: Vec::with_capacity(ROUND_MESSAGES),
            sorted: Vec::with_capacity(ROUND_MESSAGES),
            touched: Vec::with_capacity(ROUND_MESSAGES),
            owners: Vec::with_capacity(ROUND_MESSAGES),
            answers: Vec::with_capacity(ROUND_MESSAGES),
            pending: Pending::new(config.max_pending_acks),
            last_seq,
            credit: Credit::default(),
            staging_slots,
            gaps: config.gaps,
            changes: Changes::new(),
            wakes: config.wakes,
            news: false,
            held_gap: None,
            snapshot: None,
            stats: Arc::new(ShardStats::default()),
        };
        core.publish_gauges(0);
        Self {
            wal: Some(wal),
            core,
        }
    }

    /// Counters and gauges of the shard, for any thread.
    pub fn stats(&self) -> Arc<ShardStats> {
        self.core.stats.clone()
    }

    /// Counters and offsets of its partitions, by shard-local index, for any thread.
    pub fn partition_stats(&self) -> Vec<Arc<PartitionStats>> {
        self.core.partitions.shared_stats()
    }

    /// Adds and retires its partitions; `bell` wakes its loop. To be called once, before the shard runs.
    ///
    /// # Panics
    /// When the shard has been closed.
    pub fn control(&self, bell: Option<Arc<Wake>>) -> ShardControl {
        let wal = self.wal.as_ref().expect("the shard is open");
        ShardControl::new(
            Arc::clone(&self.core.changes),
            limits(wal),
            self.core.partitions.len(),
            bell,
        )
    }

    /// Whether nothing is held back and no answer waits for the disk.
    pub fn is_idle(&self) -> bool {
        self.core.items.is_empty() && self.core.held_gap.is_none() && self.core.pending.len() == 0
    }

    /// Whether it has nothing to do by itself, so that its loop may sleep for long if new messages end the sleep.
    pub fn is_quiet(&self) -> bool {
        self.is_idle()
            && self.core.snapshot.is_none()
            && self.wal.as_ref().is_none_or(|wal| !wal.has_pending())
    }

    /// The log's writer; `None` once closed.
    pub fn wal(&self) -> Option<&WalWriter> {
        self.wal.as_ref()
    }

    /// One round: takes messages, stores and answers them, moves the log on. Gives the work done; 0
    /// means that the loop may back off. Never blocks, allocates or logs.
    pub fn poll(&mut self, now: Now) -> usize {
        match &mut self.wal {
            Some(wal) => self.core.poll(wal, now),
            None => 0,
        }
    }

    /// Stores what is in the rings (whose writers have stopped), waits until it is durable and
    /// acknowledged, snapshots the state and closes the log. What the log cannot take is accounted
    /// for as storage full or failed. `clock` is read once a round.
    pub fn drain_and_close(&mut self, mut clock: impl FnMut() -> Now) -> Result<(), CloseError> {
        let Some(mut wal) = self.wal.take() else {
            return Ok(());
        };
        let core = &mut self.core;
        let mut progress = clock().mono_ns;
        let mut stalled = None;
        let mut final_snapshot = false;
        loop {
            let now = clock();
            if core.poll(&mut wal, now) > 0 {
                progress = now.mono_ns;
            }
            let idle = core.items.is_empty()
                && core.inputs.iter_mut().all(|input| input.len() == 0)
                && core.pending.len() == 0;
            let running = wal.state() == WalState::Running;
            let reported = core.gaps.is_empty() && core.held_gap.is_none();
            if idle && (!running || (reported && final_snapshot && core.snapshot.is_none())) {
                break;
            }
            if idle && reported && !final_snapshot {
                final_snapshot = true;
                core.snapshot.get_or_insert((0, core.state().parts()));
            }
            if now.mono_ns.saturating_sub(progress) > CLOSE_STALL_NS {
                stalled = Some(core.give_up(ErrorCode::StorageFull));
                break;
            }
            std::hint::spin_loop();
        }
        core.publish_gauges(0);
        let closed = wal.close();
        // The close waited for the disk; nothing is left in flight after it.
        if let Some((held, pending)) = stalled {
            return Err(CloseError::Stalled { held, pending });
        }
        closed?;
        core.partitions.durable(u64::MAX);
        Wake::wake_all(&core.wakes);
        Ok(())
    }
}

/// What bounds the frames whose batches are not durable yet.
fn limits(wal: &WalWriter) -> Limits {
    Limits {
        frames: wal.slots(),
        frame_batches: wal.max_entry() / record_batch::HEADER_LEN + 1,
    }
}

/// How far a step came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Done,
    /// Staging is full, or a snapshot comes first.
    Held,
}

impl<R: Release> Core<R> {
    fn poll(&mut self, wal: &mut WalWriter, now: Now) -> usize {
        let mut work = 0;
        let queued = self.look(wal);
        if self.write_snapshot(wal) == Flow::Done
            && self.store_gaps(wal, now, &mut work) == Flow::Done
        {
            if self.items.is_empty() && queued > 0 {
                self.pop();
            }
            // After the messages were taken, so that none comes before its partition.
            if !self.changes.asked.is_empty() {
                work += self.change();
            }
            if !self.items.is_empty() {
                work += self.round(wal);
            }
        }
        work += wal.poll(now.mono_ns, queued >= LOADED_MESSAGES);
        work += self.settle(wal);
        if std::mem::take(&mut self.news) {
            Wake::wake_all(&self.wakes);
        }
        if work > 0 || queued > 0 {
            self.publish_gauges(queued);
        }
        work
    }

    /// Adds and retires partitions; gives how many changes there were.
    #[cold]
    fn change(&mut self) -> usize {
        let mut count = 0;
        while let Some(mut change) = self.changes.asked.pop() {
            if let Some(tables) = &mut change.tables {
                self.partitions.grow(tables);
            }
            for partition in change.add.by_ref() {
                self.partitions.add(partition);
            }
            for (index, stats) in &mut change.retire {
                self.partitions.retire(*index as usize, stats);
            }
            let back = self.changes.done.push(change);
            debug_assert!(back.is_ok(), "as many may come back as were asked");
            count += 1;
        }
        // A snapshot that was held up by a full disk counts the partitions that there were.
        if self.snapshot.is_some() {
            self.snapshot = Some((0, self.state().parts()));
        }
        count
    }

    /// Reads the load: sets the credit and gives the messages that wait.
    fn look(&mut self, wal: &WalWriter) -> usize {
        let (mut queued, mut fullest) = (self.items.len(), 0);
        for input in &mut self.inputs {
            let len = input.len();
            queued += len;
            fullest = fullest.max(len * 100 / input.capacity());
        }
        let slots = self.staging_slots.max(1);
        let used = slots.saturating_sub(wal.free_slots());
        self.credit.update(fullest, used * 100 / slots);
        queued
    }

    /// Fills `items` from the rings, beginning with another ring each time.
    fn pop(&mut self) {
        let rings = self.inputs.len();
        for i in 0..rings {
            // A fair share each, and what earlier ones left over.
            let room = ROUND_MESSAGES - self.items.len();
            let share = room.div_ceil(rings - i);
            self.inputs[(self.turn + i) % rings].pop_into(&mut self.items, share);
        }
        self.turn = (self.turn + 1) % rings;
    }

    /// Sorts `items` by partition, stores them, releases the buffers of all that are through and
    /// keeps the others in `items`. Gives how many are through.
    fn round(&mut self, wal: &mut WalWriter) -> usize {
        self.group();
        let sorted = std::mem::take(&mut self.sorted);
        let strays = self.partitions.len();
        let mut at = 0;
        while at < sorted.len() {
            let index = (sorted[at].partition() as usize).min(strays);
            let len = sorted[at..]
                .iter()
                .take_while(|item| (item.partition() as usize).min(strays) == index)
                .count();
            let run = &sorted[at..at + len];
            let (through, flow) = if index == strays || self.partitions.get(index).retired {
                self.stray(run);
                (len, Flow::Done)
            } else {
                self.store(wal, index, run)
            };
            at += through;
            if flow == Flow::Held {
                self.stats.backpressure.add(1);
                break;
            }
        }
        let through = at;
        self.items.clear();
        self.items.extend_from_slice(&sorted[through..]);
        self.owners.clear();
        self.owners.extend(
            sorted[..through]
                .iter()
                .filter(|item| item.kind() != Kind::Batch)
                .map(Inbound::owner),
        );
        self.sorted = sorted;
        // Answers were built from the buffers; from here on nothing looks into them.
        if !self.owners.is_empty() {
            self.release.release(&self.owners);
        }
        if !self.answers.is_empty() {
            let credit = self.credit.batches();
            for ack in &mut self.answers {
                ack.entry.credit = credit;
            }
            let stats = &self.stats;
            self.outlets
                .send(&self.answers, &stats.acks_sent, &stats.acks_lost);
            self.answers.clear();
            self.news = true;
        }
        through
    }

    /// `items` → `sorted`, by partition in the order of their first message; a counting sort, stable.
    fn group(&mut self) {
        let strays = self.partitions.len();
        let place = |item: &Inbound| (item.partition() as usize).min(strays);
        self.sorted.clear();
        self.touched.clear();
        for item in &self.items {
            let index = place(item);
            if self.partitions.tables.places[index] == 0 {
                self.touched.push(index as u32);
            }
            self.partitions.tables.places[index] += 1;
        }
        if let [only] = self.touched[..] {
            self.partitions.tables.places[only as usize] = 0;
            std::mem::swap(&mut self.items, &mut self.sorted);
            return;
        }
        let mut start = 0;
        for &index in &self.touched {
            let count =
                std::mem::replace(&mut self.partitions.tables.places[index as usize], start);
            start += count;
        }
        // Any value will do: each element is overwritten below.
        self.sorted.extend_from_slice(&self.items);
        for item in &self.items {
            let at = &mut self.partitions.tables.places[place(item)];
            self.sorted[usize::from(*at)] = *item;
            *at += 1;
        }
        for &index in &self.touched {
            self.partitions.tables.places[index as usize] = 0;
        }
    }

    /// Stores a run of one partition's messages; gives how many are through.
    fn store(&mut self, wal: &mut WalWriter, index: usize, run: &[Inbound]) -> (usize, Flow) {
        let mut at = 0;
        while at < run.len() {
            if wal.needs_snapshot() && self.write_snapshot(wal) == Flow::Held {
                return (at, Flow::Held);
            }
            let through = if run[at].kind().is_batch() {
                if let Some(next) = run.get(at + 1) {
                    raw::prefetch(next.data());
                }
                usize::from(self.produce(wal, index, &run[at]) == Flow::Done)
            } else {
                let raw = run[at..]
                    .iter()
                    .take_while(|item| !item.kind().is_batch())
                    .count();
                self.raw(wal, index, &run[at..at + raw])
            };
            if through == 0 {
                return (at, Flow::Held);
            }
            at += through;
        }
        (at, Flow::Done)
    }

    /// Stores a prefix of a run of raw messages and lines as one batch; gives its length, 0 when
    /// staging is full.
    fn raw(&mut self, wal: &mut WalWriter, index: usize, run: &[Inbound]) -> usize {
        let limit = wal.max_entry();
        let measure = raw::measure(run, TARGET_BATCH_BYTES.min(limit), limit);
        if measure.taken == 0 {
            let messages = raw::messages(&run[0]);
            let stats = self.partitions.stats(index);
            stats.dropped.add(ErrorCode::TooLarge, messages);
            return 1;
        }
        if measure.messages == 0 {
            return measure.taken;
        }
        let reason = match wal.reserve(measure.bytes) {
            Ok(buf) => {
                let partition = self.partitions.get(index);
                let key = partition.key;
                let len = raw::build(&run[..measure.taken], buf, partition.next_offset);
                let seq = wal.publish(key, len).0;
                self.last_seq = seq;
                self.partitions
                    .appended(index, measure.messages as u32, len, seq);
                self.partitions.stats(index).stored.add(measure.messages);
                return measure.taken;
            }
            Err(Refusal::Backpressure) => return 0,
            Err(Refusal::Full) => ErrorCode::StorageFull,
            Err(Refusal::Failed) => ErrorCode::StorageFailed,
            Err(Refusal::TooLarge) => ErrorCode::TooLarge,
        };
        let stats = self.partitions.stats(index);
        stats.dropped.add(reason, measure.messages);
        measure.taken
    }

    /// Stores or refuses one record batch and answers its producer.
    fn produce(&mut self, wal: &mut WalWriter, index: usize, item: &Inbound) -> Flow {
        let acks = item.acks();
        let outcome = if !(-1..=1).contains(&acks) {
            Outcome::Refused(ErrorCode::InvalidAcks)
        } else if acks == -1 && self.pending.is_full() {
            match item.kind() {
                // Its connection waits; nothing is to be retransmitted.
                Kind::Batch => Outcome::Hold,
                _ => Outcome::Refused(ErrorCode::Busy),
            }
        } else {
            produce::append(item, index, &mut self.producers, &mut self.partitions, wal)
        };
        let messages = raw::messages(item);
        let stats = self.partitions.stats(index);
        let (error, base_offset) = match outcome {
            Outcome::Stored { base_offset, seq } => {
                self.last_seq = seq;
                stats.stored.add(messages);
                (ErrorCode::None, base_offset)
            }
            Outcome::Duplicate { base_offset } => {
                stats.duplicate.add(messages);
                (ErrorCode::Duplicate, base_offset)
            }
            Outcome::Refused(reason) => {
                stats.refused.add(reason, messages);
                (reason, -1)
            }
            Outcome::Hold => return Flow::Held,
        };
        let stored = !matches!(outcome, Outcome::Refused(_));
        // The answer to a Batch also gives its memory back.
        if acks == 0 && stored && item.kind() == Kind::Produce {
            return Flow::Done;
        }
        let ack = answer(item, error, base_offset);
        // What is stored or was is durable at the latest with the newest frame.
        if acks == -1 && stored && self.last_seq > wal.durable().0 {
            self.pending.push(self.last_seq, ack);
        } else {
            self.answers.push(ack);
        }
        Flow::Done
    }

    /// Accounts for messages of no partition of this shard.
    fn stray(&mut self, run: &[Inbound]) {
        for item in run {
            let stats = &self.stats.stray;
            let messages = raw::messages(item);
            if item.kind().is_batch() {
                stats.refused.add(ErrorCode::UnknownPartition, messages);
                self.answers
                    .push(answer(item, ErrorCode::UnknownPartition, -1));
            } else {
                stats.dropped.add(ErrorCode::UnknownPartition, messages);
            }
        }
    }

    /// Stores reports of losses upstream.
    fn store_gaps(&mut self, wal: &mut WalWriter, now: Now, work: &mut usize) -> Flow {
        for _ in 0..ROUND_GAPS {
            let Some(report) = self.held_gap.take().or_else(|| self.gaps.pop()) else {
                break;
            };
            let index = report.partition as usize;
            if index >= self.partitions.len() {
                self.stats.gaps_lost.add(1);
                continue;
            }
            match wal.reserve(GAP_BATCH_MAX) {
                Ok(buf) => {
                    let partition = self.partitions.get(index);
                    let (key, offset) = (partition.key, partition.next_offset);
                    let now_ms = now.unix_ns.div_euclid(1_000_000);
                    let len = gap::build(&report, now_ms, buf, offset);
                    let seq = wal.publish(key, len).0;
                    self.last_seq = seq;
                    self.partitions.appended(index, 1, len, seq);
                    self.partitions.stats(index).gaps.add(1);
                    *work += 1;
                }
                Err(Refusal::Failed | Refusal::TooLarge) => self.stats.gaps_lost.add(1),
                // A disk with room again will take it; messages are still to be answered.
                Err(Refusal::Full) => {
                    self.held_gap = Some(report);
                    break;
                }
                Err(Refusal::Backpressure) => {
                    self.held_gap = Some(report);
                    return Flow::Held;
                }
            }
            if wal.needs_snapshot() && self.write_snapshot(wal) == Flow::Held {
                return Flow::Held;
            }
        }
        Flow::Done
    }

    /// Writes the snapshot that a new segment begins with, as far as there is room.
    fn write_snapshot(&mut self, wal: &mut WalWriter) -> Flow {
        if self.snapshot.is_none() {
            if !wal.needs_snapshot() {
                return Flow::Done;
            }
            self.snapshot = Some((0, self.state().parts()));
        }
        while let Some((index, count)) = self.snapshot {
            match wal.reserve(PART_MAX) {
                Ok(buf) => {
                    let state = State {
                        partitions: self.partitions.all(),
                        orphans: &self.orphans,
                        producers: &self.producers,
                    };
                    let len = state.write(index, buf);
                    self.last_seq = wal.publish_snapshot(index, count, len).0;
                    self.snapshot = (index + 1 < count).then_some((index + 1, count));
                    if self.snapshot.is_none() {
                        self.stats.snapshots.add(1);
                    }
                }
                Err(Refusal::Backpressure) => return Flow::Held,
                // Nothing else will be stored either: whoever asks is refused.
                Err(Refusal::Full | Refusal::Failed | Refusal::TooLarge) => return Flow::Done,
            }
        }
        Flow::Done
    }

    fn state(&self) -> State<'_> {
        State {
            partitions: self.partitions.all(),
            orphans: &self.orphans,
            producers: &self.producers,
        }
    }

    /// Raises high watermarks and answers those who waited for the disk.
    fn settle(&mut self, wal: &WalWriter) -> usize {
        let durable = wal.durable().0;
        if self.partitions.durable(durable) {
            let raised = self.stats.raised.load(Ordering::Relaxed);
            self.stats.raised.store(raised + 1, Ordering::Release);
            self.news = true;
        }
        if self.pending.len() == 0 {
            return 0;
        }
        let credit = self.credit.batches();
        let (stats, outlets) = (&self.stats, &mut self.outlets);
        let mut send = |acks: &[Ack]| outlets.send(acks, &stats.acks_sent, &stats.acks_lost);
        let mut settled = self.pending.settle(durable, credit, None, &mut send);
        if wal.state() == WalState::Failed {
            let failed = Some(ErrorCode::StorageFailed);
            settled += self.pending.settle(u64::MAX, credit, failed, &mut send);
        }
        self.news |= settled > 0;
        settled
    }

    /// Accounts for what is held back as lost for `reason`; gives messages and acknowledgements.
    fn give_up(&mut self, reason: ErrorCode) -> (usize, usize) {
        let mut held = 0;
        loop {
            for item in std::mem::take(&mut self.items) {
                let index = item.partition() as usize;
                let stats = if index < self.partitions.len() {
                    self.partitions.stats(index)
                } else {
                    &self.stats.stray
                };
                if item.kind().is_batch() {
                    stats.refused.add(reason, raw::messages(&item));
                    self.outlets.send(
                        &[answer(&item, reason, -1)],
                        &self.stats.acks_sent,
                        &self.stats.acks_lost,
                    );
                } else {
                    stats.dropped.add(reason, raw::messages(&item));
                }
                if item.kind() != Kind::Batch {
                    self.release.release(&[item.owner()]);
                }
                held += 1;
            }
            self.items.reserve(ROUND_MESSAGES);
            if !self.inputs.is_empty() {
                self.pop();
            }
            if self.items.is_empty() {
                break;
            }
        }
        while self.held_gap.take().or_else(|| self.gaps.pop()).is_some() {
            self.stats.gaps_lost.add(1);
        }
        (held, self.pending.len())
    }

    fn publish_gauges(&self, queued: usize) {
        let stats = &self.stats;
        let put = |gauge: &AtomicU64, value: usize| gauge.store(value as u64, Ordering::Relaxed);
        put(&stats.queued, queued);
        put(&stats.producers, self.producers.len());
        put(&stats.pending_acks, self.pending.len());
        put(&stats.credit, self.credit.batches() as usize);
        stats
            .producers_evicted
            .store(self.producers.evicted(), Ordering::Relaxed);
    }
}

/// The answer to a batch; its credit is set when it leaves.
fn answer(item: &Inbound, error: ErrorCode, base_offset: i64) -> Ack {
    if item.kind() == Kind::Batch {
        let way = item.batch_way();
        return Ack {
            reply: ReplyTo::ring(way.ring),
            entry: AckEntry {
                request_id: way.tag.into(),
                topic_id: 0,
                partition: item.partition(),
                base_offset,
                base_sequence: -1,
                producer_epoch: -1,
                error,
                credit: 0,
            },
        };
    }
    let header = ProduceHeader::from_bytes(item.produce_header());
    // A batch too damaged to have a header is named by its request alone.
    let (base_sequence, producer_epoch) = record_batch::parse_header(item.payload())
        .map_or((-1, -1), |h| (h.base_sequence, h.producer_epoch));
    Ack {
        reply: item.reply_to(),
        entry: AckEntry {
            request_id: header.request_id,
            topic_id: header.topic_id,
            partition: header.partition,
            base_offset,
            base_sequence,
            producer_epoch,
            error,
            credit: 0,
        },
    }
}
