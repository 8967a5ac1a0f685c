//! The client against the model of the server, over a network that loses, doubles, delays and
//! reorders: what the library promises, for thousands of histories, each from its seed.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::ops::Range;
use std::time::Duration;

use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::model::{ModelServer, Mood};
use super::{
    Acks, Event, FailReason, Fate, Machine, Now, ProducerConfig, SendError, Target, Ticket,
    Transmit,
};
use crate::wire::datagram::ErrorCode;

const MS: u64 = 1_000_000;

/// Arrival, serial number, way, bytes.
type Datagram = (u64, u64, To, Vec<u8>);

/// The way of a datagram.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum To {
    Server,
    Client,
}

#[derive(Clone, Debug)]
struct Scenario {
    seed: u64,
    messages: u64,
    partitions: u32,
    acks: Acks,
    /// In a thousand.
    loss: u32,
    doubled: u32,
    /// Shortest delay and what may come on top, in microseconds.
    delay: (u64, u64),
    /// The disk, in microseconds.
    commit: u64,
    linger_ms: u64,
    /// A message every so many microseconds on average.
    pace: u64,
    delivery_ms: u64,
    /// (at ms, for ms, what).
    troubles: Vec<(u64, u64, Trouble)>,
    configured_id: bool,
}

#[derive(Clone, Copy, Debug)]
enum Trouble {
    /// Unreachable; then back with all it had acknowledged, and perhaps not the rest.
    Restart {
        lose_tail: bool,
    },
    Refuses(ErrorCode),
    Credit(u32),
    /// Nothing passes, the server lives on.
    Partitioned,
}

#[derive(Debug)]
struct Outcome {
    delivered: u64,
    failed: u64,
    stats: super::Stats,
    forgot: u64,
    end_ms: u64,
}

struct Sim {
    rng: SmallRng,
    scenario: Scenario,
    now: u64,
    machine: Machine,
    server: ModelServer,
    /// Datagrams under way, by arrival.
    network: BinaryHeap<Reverse<Datagram>>,
    serial: u64,
    cut: bool,
    /// Commits under way: (when durable, partition, batches then in its log).
    commits: VecDeque<(u64, u32, usize)>,
    durable: Vec<usize>,
    events: Vec<Event>,
    /// Of each message, by its number.
    tickets: Vec<Ticket>,
}

impl Sim {
    fn new(scenario: Scenario) -> Self {
        let mut config = ProducerConfig::new("model:1", "t");
        config.acks = Some(scenario.acks);
        config.linger = Duration::from_millis(scenario.linger_ms);
        config.delivery_timeout = Duration::from_millis(scenario.delivery_ms);
        config.max_buffered_bytes = 400 * 200;
        if scenario.configured_id && scenario.acks != Acks::None {
            config.producer_id = Some(5);
            config.epoch = 3;
        }
        let now = 5_000;
        Self {
            rng: SmallRng::seed_from_u64(scenario.seed),
            now,
            machine: Machine::new(&config, 1400, scenario.seed ^ 0xabc, at(now)),
            server: ModelServer::new(scenario.partitions),
            network: BinaryHeap::new(),
            serial: 0,
            cut: false,
            commits: VecDeque::new(),
            durable: vec![0; scenario.partitions as usize],
            events: Vec::new(),
            tickets: Vec::new(),
            scenario,
        }
    }

    /// Hands a datagram to the network at `time`.
    fn put(&mut self, time: u64, to: To, bytes: &[u8]) {
        if self.cut {
            return;
        }
        let copies = 1 + u32::from(self.rng.random_range(0..1000) < self.scenario.doubled);
        for _ in 0..copies {
            if self.rng.random_range(0..1000) < self.scenario.loss {
                continue;
            }
            let (base, jitter) = self.scenario.delay;
            let mut delay = (base + self.rng.random_range(0..=jitter)) * 1000;
            if self.rng.random_range(0..200) == 0 {
                delay += self.rng.random_range(0..50) * jitter * 1000;
            }
            self.serial += 1;
            self.network
                .push(Reverse((time + delay, self.serial, to, bytes.to_vec())));
        }
    }

    fn deliver(&mut self, to: To, bytes: &[u8]) {
        match to {
            To::Client => self.machine.receive(at(self.now), bytes),
            To::Server => {
                if self.server.mood == Mood::Down {
                    return;
                }
                let before: Vec<usize> = self.logs();
                let answer = self.server.answer(bytes);
                let mut time = self.now;
                for (index, (&old, new)) in before.iter().zip(self.logs()).enumerate() {
                    if new > old && self.scenario.acks == Acks::Durable {
                        time += self.scenario.commit * 1000;
                        self.commits.push_back((time, index as u32, new));
                    } else if new > old {
                        self.durable[index] = new;
                    }
                }
                // What is known but not durable yet is not answered before it is.
                if self.scenario.acks == Acks::Durable {
                    time = self.commits.iter().map(|c| c.0).fold(time, u64::max);
                }
                if let Some(answer) = answer {
                    self.put(time, To::Client, &answer);
                }
            }
        }
    }

    fn logs(&self) -> Vec<usize> {
        let partitions = self.server.partitions.iter();
        partitions.map(|p| p.len()).collect()
    }

    fn settle_commits(&mut self) {
        while let Some(&(time, partition, len)) = self.commits.front()
            && time <= self.now
        {
            self.commits.pop_front();
            let durable = &mut self.durable[partition as usize];
            *durable = len.max(*durable);
        }
    }

    fn transmit(&mut self) {
        loop {
            let mut out: Vec<Transmit> = Vec::new();
            self.machine.poll_transmit(at(self.now), 7, &mut out);
            if out.is_empty() {
                break;
            }
            for transmit in out {
                let bytes = self
                    .machine
                    .datagram(transmit)
                    .expect("a datagram just chosen")
                    .to_vec();
                self.put(self.now, To::Server, &bytes);
            }
        }
        while let Some(event) = self.machine.next_event() {
            self.events.push(event);
        }
    }

    fn trouble(&mut self, trouble: Trouble, begins: bool) {
        match (trouble, begins) {
            (Trouble::Restart { lose_tail }, true) => {
                self.server.mood = Mood::Down;
                self.settle_commits();
                self.commits.clear();
                // Answers that were still to come are lost with the process.
                let now = self.now;
                let ready = |Reverse((time, _, to, _)): &Reverse<Datagram>| {
                    *to == To::Server || *time <= now
                };
                self.network.retain(ready);
                if lose_tail && self.scenario.acks == Acks::Durable {
                    for (partition, &keep) in self.server.partitions.iter_mut().zip(&self.durable) {
                        partition.truncate(keep);
                    }
                }
                self.durable = self.logs();
            }
            (Trouble::Restart { .. } | Trouble::Refuses(_), false) => {
                self.server.mood = Mood::Well;
            }
            (Trouble::Refuses(code), true) => self.server.mood = Mood::Refusing(code),
            (Trouble::Credit(credit), true) => self.server.credit = credit,
            (Trouble::Credit(_), false) => self.server.credit = 32,
            (Trouble::Partitioned, cut) => self.cut = cut,
        }
    }

    fn run(mut self) -> Outcome {
        let mut todo: VecDeque<(u64, Trouble, bool)> = VecDeque::new();
        let mut changes: Vec<(u64, Trouble, bool)> = self
            .scenario
            .troubles
            .iter()
            .flat_map(|&(from, len, what)| {
                [
                    (from * MS, what, true),
                    ((from + len.max(1)) * MS, what, false),
                ]
            })
            .collect();
        changes.sort_by_key(|change| change.0);
        todo.extend(changes);
        let mut sent = 0u64;
        let mut next_send = self.now;
        let mut steps = 0u64;
        loop {
            steps += 1;
            assert!(steps < 3_000_000, "does not end: {:?}", self.scenario);
            let done = sent == self.scenario.messages && self.machine.outstanding() == 0;
            if done && self.network.is_empty() {
                break;
            }
            let mut next = u64::MAX;
            if let Some(Reverse(datagram)) = self.network.peek() {
                next = next.min(datagram.0);
            }
            if let Some(deadline) = self.machine.deadline().filter(|_| !done) {
                next = next.min(deadline);
            }
            if sent < self.scenario.messages {
                next = next.min(next_send);
            }
            if let Some(change) = todo.front() {
                next = next.min(change.0);
            }
            assert!(next < u64::MAX, "nothing left to do, but not done");
            self.now = self.now.max(next);
            self.settle_commits();
            while let Some(&(time, what, begins)) = todo.front()
                && time <= self.now
            {
                todo.pop_front();
                self.trouble(what, begins);
            }
            while let Some(Reverse(datagram)) = self.network.peek()
                && datagram.0 <= self.now
                && let Some(Reverse((_, _, to, bytes))) = self.network.pop()
            {
                self.deliver(to, &bytes);
            }
            self.machine.tick(at(self.now));
            while sent < self.scenario.messages && next_send <= self.now {
                match self.offer(sent) {
                    Ok(()) => sent += 1,
                    Err(SendError::PartitionFailed { .. }) => {
                        self.scenario.messages = sent;
                    }
                    Err(SendError::Full | SendError::NotConnected) => {
                        next_send = self.now + 3 * MS;
                        break;
                    }
                    Err(error) => panic!("{error}"),
                }
                next_send += self.rng.random_range(0..=2 * self.scenario.pace) * 1000;
            }
            if sent == self.scenario.messages && self.rng.random_range(0..4) == 0 {
                self.machine.flush();
            }
            self.transmit();
        }
        self.judge()
    }

    fn offer(&mut self, number: u64) -> Result<(), SendError> {
        let mut value = number.to_be_bytes().to_vec();
        value.resize(8 + self.rng.random_range(0..60), b'x');
        let (target, key) = match self.rng.random_range(0..3) {
            0 => {
                let partition = self.rng.random_range(0..self.scenario.partitions);
                (Target::Partition(partition), None)
            }
            1 => (Target::Auto, Some(&value[6..8])),
            _ => (Target::Auto, None),
        };
        self.machine
            .send(at(self.now), target, key, Some(&value))
            .map(|ticket| self.tickets.push(ticket))
    }

    /// Holds the log against the reports.
    fn judge(&self) -> Outcome {
        let scenario = &self.scenario;
        let stats = *self.machine.stats();
        let mut reported: HashMap<u32, Vec<Range<u64>>> = HashMap::new();
        let mut places: Vec<HashMap<i64, Vec<usize>>> = Vec::new();
        // Numbers in the log, by partition. Those of one partition were sent in rising order,
        // so a log that rises strictly holds nothing twice and everything in order.
        let mut logs: Vec<Vec<u64>> = Vec::new();
        for partition in &self.server.partitions {
            let numbers: Vec<u64> = partition
                .values()
                .iter()
                .map(|value| u64::from_be_bytes(value[..8].try_into().unwrap()))
                .collect();
            assert!(
                numbers.is_sorted_by(|a, b| a < b),
                "doubled or out of order: {numbers:?} {scenario:?}"
            );
            logs.push(numbers);
            places.push(HashMap::new());
        }
        let (mut delivered, mut failed, mut forgot) = (0, 0, 0);
        let mut stored_by_report = vec![0u64; logs.len()];
        let mut may_be_stored = vec![0u64; logs.len()];
        for event in &self.events {
            match event {
                Event::Delivered {
                    partition,
                    messages,
                    base_offset,
                } => {
                    assert_ne!(scenario.acks, Acks::None);
                    let n = messages.end - messages.start;
                    delivered += n;
                    stored_by_report[*partition as usize] += n;
                    reported
                        .entry(*partition)
                        .or_default()
                        .push(messages.clone());
                    if let Some(offset) = base_offset {
                        for i in 0..n as i64 {
                            places[*partition as usize]
                                .entry(offset + i)
                                .or_default()
                                .push((messages.start as i64 + i) as usize);
                        }
                    }
                }
                Event::Sent {
                    partition,
                    messages,
                } => {
                    assert_eq!(scenario.acks, Acks::None);
                    may_be_stored[*partition as usize] += messages.end - messages.start;
                    delivered += messages.end - messages.start;
                    reported
                        .entry(*partition)
                        .or_default()
                        .push(messages.clone());
                }
                Event::Failed {
                    partition,
                    messages,
                    fate,
                    reason,
                } => {
                    let n = messages.end - messages.start;
                    failed += n;
                    reported
                        .entry(*partition)
                        .or_default()
                        .push(messages.clone());
                    let certain = match fate {
                        Fate::NotSent => true,
                        Fate::Refused => scenario.doubled == 0,
                        Fate::Unknown => false,
                    };
                    if !certain {
                        may_be_stored[*partition as usize] += n;
                    }
                    assert_ne!(*reason, FailReason::Fenced, "{scenario:?}");
                }
                Event::ServerForgot { .. } => forgot += 1,
            }
        }
        // Each message has exactly one report.
        let mut total = 0;
        for ranges in reported.values_mut() {
            ranges.sort_by_key(|range| range.start);
            let mut next = 0;
            for range in ranges {
                assert_eq!(
                    range.start, next,
                    "unreported or reported twice: {scenario:?}"
                );
                next = range.end;
            }
            total += next;
        }
        assert_eq!(total, stats.accepted);
        assert_eq!((delivered, failed), (stats.delivered, stats.failed));
        // What is stored was delivered or may be stored; what was delivered is stored.
        for (index, log) in logs.iter().enumerate() {
            let stored = log.len() as u64;
            let (least, extra) = (stored_by_report[index], may_be_stored[index]);
            assert!(
                (least..=least + extra).contains(&stored),
                "partition {index} holds {stored} of {least} delivered and {extra} uncertain: {scenario:?}"
            );
            for (&offset, messages) in &places[index] {
                assert_eq!(messages.len(), 1, "two messages at offset {offset}");
                assert!((offset as usize) < log.len());
            }
            // Offsets rise with the messages, and so do the numbers in the log: with as many
            // failed ones left out, each message must be where its report says.
            let mut by_offset: Vec<(i64, usize)> =
                places[index].iter().map(|(&o, m)| (o, m[0])).collect();
            by_offset.sort_unstable();
            assert!(by_offset.is_sorted_by(|a, b| a.1 < b.1), "{scenario:?}");
            for (offset, message) in by_offset {
                let number = log[offset as usize];
                assert_eq!(
                    self.sent_as(index as u32, number),
                    message as u64,
                    "another message at offset {offset}: {scenario:?}"
                );
            }
        }
        Outcome {
            delivered,
            failed,
            stats,
            forgot,
            end_ms: self.now / MS,
        }
    }

    /// The place of the message with this number among those of its partition.
    fn sent_as(&self, partition: u32, number: u64) -> u64 {
        let ticket = self.tickets[number as usize];
        assert_eq!(ticket.partition, partition);
        ticket.message
    }
}

fn at(mono_ns: u64) -> Now {
    Now {
        mono_ns,
        unix_ms: 1_700_000_000_000 + (mono_ns / MS) as i64,
    }
}

fn quiet(seed: u64) -> Scenario {
    Scenario {
        seed,
        messages: 500,
        partitions: 2,
        acks: Acks::Durable,
        loss: 0,
        doubled: 0,
        delay: (100, 0),
        commit: 300,
        linger_ms: 0,
        pace: 20,
        delivery_ms: 5_000,
        troubles: Vec::new(),
        configured_id: false,
    }
}

#[test]
fn without_loss_nothing_is_sent_twice() {
    for seed in 0..20 {
        let outcome = Sim::new(quiet(seed)).run();
        assert_eq!((outcome.delivered, outcome.failed), (500, 0));
        assert_eq!(outcome.stats.retransmissions, 0, "{outcome:?}");
        assert_eq!(outcome.stats.timeouts, 0);
        assert_eq!(outcome.stats.stray, 0);
    }
}

#[test]
fn linger_gathers_messages() {
    let mut slow = quiet(1);
    slow.pace = 400;
    let single = Sim::new(slow.clone()).run().stats.datagrams;
    slow.linger_ms = 8;
    let gathered = Sim::new(slow).run().stats.datagrams;
    assert!(gathered * 3 < single, "{gathered} against {single}");
}

#[test]
fn a_lossy_network_costs_retransmissions_only() {
    for seed in 0..50 {
        let mut scenario = quiet(seed);
        scenario.loss = 100;
        scenario.doubled = 50;
        scenario.delay = (100, 400);
        let outcome = Sim::new(scenario).run();
        assert_eq!((outcome.delivered, outcome.failed), (500, 0), "{outcome:?}");
        assert!(outcome.stats.retransmissions > 0);
    }
}

#[test]
fn a_restart_is_survived_exactly_once() {
    for seed in 0..50 {
        let mut scenario = quiet(seed);
        scenario.commit = 4_000;
        scenario.troubles = vec![
            (
                2,
                700,
                Trouble::Restart {
                    lose_tail: seed % 2 == 0,
                },
            ),
            (720, 50, Trouble::Restart { lose_tail: true }),
        ];
        let outcome = Sim::new(scenario).run();
        assert_eq!((outcome.delivered, outcome.failed), (500, 0), "{outcome:?}");
        assert_eq!(outcome.forgot, 0);
    }
}

#[test]
fn a_full_disk_is_outlasted_or_named() {
    let mut scenario = quiet(3);
    scenario.troubles = vec![(1, 2_000, Trouble::Refuses(ErrorCode::StorageFull))];
    let outcome = Sim::new(scenario.clone()).run();
    assert_eq!((outcome.delivered, outcome.failed), (500, 0), "{outcome:?}");
    scenario.troubles = vec![(1, 60_000, Trouble::Refuses(ErrorCode::StorageFull))];
    scenario.messages = 200;
    let mut sim = Sim::new(scenario);
    sim.machine.tick(at(sim.now));
    let outcome = sim.run();
    assert!(outcome.failed > 0 && outcome.end_ms < 70_000, "{outcome:?}");
}

/// Runs a machine by hand against the model, without a network.
struct Direct {
    machine: Machine,
    server: ModelServer,
    now: u64,
}

impl Direct {
    fn new(configure: impl FnOnce(&mut ProducerConfig)) -> Self {
        let mut config = ProducerConfig::new("model:1", "t");
        config.delivery_timeout = Duration::from_secs(2);
        configure(&mut config);
        Self {
            machine: Machine::new(&config, 1400, 9, at(0)),
            server: ModelServer::new(1),
            now: 0,
        }
    }

    fn send(&mut self, value: &str) {
        self.machine
            .send(at(self.now), Target::Auto, None, Some(value.as_bytes()))
            .unwrap();
    }

    /// All that wants to be sent now, without passing it on.
    fn outgoing(&mut self) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        self.machine.tick(at(self.now));
        self.machine.poll_transmit(at(self.now), 64, &mut out);
        out.iter()
            .map(|&t| self.machine.datagram(t).unwrap().to_vec())
            .collect()
    }

    /// One round trip of a millisecond.
    fn exchange(&mut self) {
        for datagram in self.outgoing() {
            if let Some(answer) = self.server.answer(&datagram) {
                self.machine.receive(at(self.now + MS), &answer);
            }
        }
        self.now += MS;
    }

    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.machine.next_event()).collect()
    }
}

fn delivered(messages: Range<u64>, base_offset: i64) -> Event {
    Event::Delivered {
        partition: 0,
        messages,
        base_offset: Some(base_offset),
    }
}

#[test]
fn a_server_that_lost_its_state_gets_a_new_epoch() {
    let mut direct = Direct::new(|_| {});
    direct.exchange();
    direct.send("a");
    direct.exchange();
    assert_eq!(direct.events(), [delivered(0..1, 0)]);
    direct.server = ModelServer::new(1);
    direct.send("b");
    direct.exchange();
    direct.exchange();
    let forgot = Event::ServerForgot {
        partition: 0,
        epoch: 1,
    };
    assert_eq!(direct.events(), [forgot, delivered(1..2, 0)]);
    assert_eq!(direct.server.partitions[0].values(), [b"b"]);
    assert_eq!(direct.machine.identity().1, 1);
}

#[test]
fn a_newer_instance_fences_the_older() {
    let config = |epoch| {
        move |config: &mut ProducerConfig| {
            config.producer_id = Some(8);
            config.epoch = epoch;
        }
    };
    let mut old = Direct::new(config(0));
    old.exchange();
    old.send("a");
    old.exchange();
    let mut new = Direct::new(config(1));
    new.server = old.server;
    new.exchange();
    new.send("b");
    new.exchange();
    assert_eq!(new.events(), [delivered(0..1, 1)]);
    old.server = new.server;
    old.events();
    old.send("c");
    old.exchange();
    assert_eq!(
        old.events(),
        [Event::Failed {
            partition: 0,
            messages: 1..2,
            reason: FailReason::Fenced,
            fate: Fate::Refused,
        }]
    );
    let refused = old
        .machine
        .send(at(old.now), Target::Auto, None, Some(b"d"));
    assert!(matches!(refused, Err(SendError::PartitionFailed { .. })));
    assert_eq!(old.server.partitions[0].values(), [b"a", b"b"]);
}

#[test]
fn an_epoch_used_before_is_not_taken_for_success() {
    let configure = |config: &mut ProducerConfig| config.producer_id = Some(8);
    let mut first = Direct::new(configure);
    first.exchange();
    first.send("a");
    first.exchange();
    let mut second = Direct::new(configure);
    second.server = first.server;
    second.exchange();
    second.send("b");
    second.exchange();
    assert!(matches!(
        second.events()[..],
        [Event::Failed {
            reason: FailReason::EpochReused,
            ..
        }]
    ));
}

#[test]
fn a_timeout_of_unknown_fate_starts_a_new_epoch_and_keeps_what_was_not_sent() {
    let mut direct = Direct::new(|_| {});
    direct.exchange();
    direct.send("lost");
    assert_eq!(direct.outgoing().len(), 1);
    // Retransmissions, none of which arrives; the window is down to one batch.
    for _ in 0..15 {
        direct.now += 100 * MS;
        direct.outgoing();
    }
    direct.send("later");
    direct.now += 600 * MS;
    direct.exchange();
    direct.exchange();
    assert_eq!(
        direct.events(),
        [
            Event::Failed {
                partition: 0,
                messages: 0..1,
                reason: FailReason::Timeout,
                fate: Fate::Unknown,
            },
            delivered(1..2, 0)
        ]
    );
    assert_eq!(direct.machine.identity().1, 1);
}

#[test]
fn an_answer_lost_for_good_is_still_a_delivery() {
    let mut direct = Direct::new(|_| {});
    direct.exchange();
    direct.send("a");
    let first = direct.outgoing();
    direct.send("b");
    let second = direct.outgoing();
    direct.server.answer(&first[0]);
    let answer = direct.server.answer(&second[0]).unwrap();
    direct.now += MS;
    direct.machine.receive(at(direct.now), &answer);
    assert_eq!(direct.events(), [delivered(1..2, 1)]);
    direct.now += 3_000 * MS;
    direct.machine.tick(at(direct.now));
    assert_eq!(
        direct.events(),
        [Event::Delivered {
            partition: 0,
            messages: 0..1,
            base_offset: None
        }]
    );
}

#[test]
fn sequences_wrap_as_the_server_counts() {
    let mut direct = Direct::new(|_| {});
    direct.exchange();
    direct.send("first");
    direct.exchange();
    direct.machine.jump_to_sequence(i32::MAX - 3);
    for state in direct.server.partitions[0].producers.values_mut() {
        state.next_sequence = i32::MAX - 3;
    }
    for _ in 0..8 {
        direct.send("x");
        direct.exchange();
    }
    assert_eq!(direct.machine.outstanding(), 0);
    assert_eq!(direct.server.partitions[0].values().len(), 9);
    assert_eq!(direct.machine.stats().refusals, 0);
}

#[test]
fn foreign_and_damaged_datagrams_change_nothing() {
    let mut direct = Direct::new(|_| {});
    direct.exchange();
    direct.send("a");
    let datagram = direct.outgoing().remove(0);
    let answer = direct.server.answer(&datagram).unwrap();
    for at_byte in 0..answer.len() {
        // The fields that name the batch, and the header; not offset, error and credit.
        if (28..36).contains(&at_byte) || at_byte >= 42 || (10..12).contains(&at_byte) {
            continue;
        }
        let mut damaged = answer.clone();
        damaged[at_byte] ^= 0x40;
        direct.machine.receive(at(MS), &damaged);
        assert_eq!(direct.machine.outstanding(), 1, "byte {at_byte}");
    }
    for len in 0..answer.len() {
        direct.machine.receive(at(MS), &answer[..len]);
    }
    assert_eq!(direct.machine.outstanding(), 1);
    direct.machine.receive(at(MS), &answer);
    direct.machine.receive(at(MS), &answer);
    assert_eq!(direct.events(), [delivered(0..1, 0)]);
}

#[test]
fn memory_is_bounded() {
    let mut direct = Direct::new(|config| config.max_buffered_bytes = 4_000);
    direct.exchange();
    let mut taken = 0;
    let full = loop {
        match direct
            .machine
            .send(at(MS), Target::Auto, None, Some(&[7; 100]))
        {
            Ok(_) => taken += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(full, SendError::Full));
    assert!((10..40).contains(&taken), "{taken}");
    direct.exchange();
    direct.exchange();
    assert_eq!(direct.machine.outstanding(), 0);
    assert!(
        direct
            .machine
            .send(at(direct.now), Target::Auto, None, Some(b"x"))
            .is_ok()
    );
}

#[test]
fn without_acknowledgements_a_loss_stops_nothing() {
    let mut scenario = quiet(4);
    scenario.acks = Acks::None;
    scenario.loss = 200;
    let sim = Sim::new(scenario);
    let outcome = sim.run();
    assert_eq!((outcome.delivered, outcome.failed), (500, 0));
}

fn troubles() -> impl Strategy<Value = (u64, u64, Trouble)> {
    let trouble = prop_oneof![
        any::<bool>().prop_map(|lose_tail| Trouble::Restart { lose_tail }),
        prop::sample::select(vec![
            ErrorCode::StorageFull,
            ErrorCode::StorageFailed,
            ErrorCode::Busy,
            ErrorCode::InvalidBatch,
        ])
        .prop_map(Trouble::Refuses),
        (0u32..8).prop_map(Trouble::Credit),
        Just(Trouble::Partitioned),
    ];
    (0u64..60, 0u64..500, trouble)
}

prop_compose! {
    fn scenarios()(
        seed: u64, messages in 1u64..300, partitions in 1u32..4,
        acks in prop::sample::select(vec![Acks::Durable, Acks::Durable, Acks::Staged, Acks::None]),
        loss in prop_oneof![Just(0u32), 0u32..50, 50u32..400], doubled in prop_oneof![Just(0u32), 0u32..300],
        delay in (1u64..2_000, prop_oneof![Just(0u64), 0u64..5_000]), commit in 0u64..20_000,
        linger_ms in prop_oneof![Just(0u64), 0u64..20], pace in 0u64..400, delivery_ms in prop_oneof![20u64..400, 2_000u64..8_000],
        troubles in prop::collection::vec(troubles(), 0..4), configured_id: bool,
    ) -> Scenario {
        Scenario {
            seed, messages, partitions, acks, loss, doubled, delay, commit, linger_ms, pace, delivery_ms, troubles,
            configured_id,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// The promises hold in any history; `Sim::judge` names them.
    #[test]
    fn promises_hold(scenario in scenarios()) {
        Sim::new(scenario).run();
    }
}
