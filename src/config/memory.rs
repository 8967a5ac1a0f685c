//! `[memory]`: how much the process may take, and the plan of what each part of it gets.
//!
//! A [`Plan`] gives every part what it needs at least (its minimum), then spreads the rest by weight up to what a part can
//! make use of; what is over goes to the block cache, or to the rest where the cache's size is configured. Invariant: the limits' sum is the budget, and no limit is below
//! its part's minimum. What a thing costs is measured by `cargo bench --bench memory` (docs/performance.md, "Memory").

use bytesize::ByteSize;
use serde::Deserialize;
use toml::Spanned;

use super::{Checker, Config, ConfigError};
use crate::config::kafka::Transport;
use crate::memory::budget::{Budget, Part};
use crate::shard::link::LINK_BATCHES;
use crate::shard::{
    ACK_SLOTS, Ack, BatchBuffer, DEFAULT_PENDING_ACKS, INBOUND_SLOTS, Inbound, dedupe,
};
use crate::storage::wal::window;
use crate::storage::{index, keylog};

/// Bytes of a partition: its counters, its place in the shard, and the topics' tables.
pub const PARTITION: u64 = 1280;
/// What is known of a partition in some ten SSTs.
const PARTITION_IN_SSTS: u64 = 640;
/// Bytes of an idle Kafka connection.
const CONNECTION: u64 = 1 << 10;
/// What it takes more by io_uring: its place in the ring's table, and the list of what it receives.
const RING_CONNECTION: u64 = 512;
/// What it takes with TLS.
const TLS_CONNECTION: u64 = 32 << 10;
/// The server at rest: its code's own data, threads' stacks, the lcores' and DPDK's tables.
const AT_REST: u64 = 40 << 20;
/// A reader's window on the log; every thread that reads has one for each shard.
const READER: u64 = 1 << 20;
/// Threads of a shard beside its lcore: flush, merge, index, segments; and the control socket's reader.
const SHARD_THREADS: u64 = 5;
/// What flushing and merging of a shard needs at least: a working set each, and lists.
const MAINTENANCE_MIN: u64 = 32 << 20;
/// More than this makes no merge better.
const MAINTENANCE_MAX: u64 = 256 << 20;
/// A cache smaller than this does not hold the blocks that a few readers are at.
const CACHE_MIN: u64 = 4 << 20;
/// Producers that a shard remembers at least.
const PRODUCERS_MIN: u64 = 256;
/// Bytes that they take unless the configuration says more: some 65,000.
const PRODUCERS_MAX: u64 = 36 << 20;
/// One part in so many of a segment is for the producers that are known when it begins.
const SNAPSHOT_PART: u64 = 4;
/// Answers under way of a Kafka thread, at least and at most.
const ANSWERS: (u64, u64) = (8 << 20, 512 << 20);
/// Requests of a Kafka thread at most; at least so many of the largest.
const REQUESTS_MAX: u64 = 768 << 20;
/// See [`REQUESTS_MAX`]: what arrives, what has arrived, and what is on its way to shards.
const REQUESTS_MIN: u64 = 4;
/// Groups: several of the largest appends; 100,000 groups with 20 offsets each.
const GROUPS: (u64, u64) = (8 << 20, 320 << 20);
/// Connections that there is room for at least.
const CONNECTIONS_MIN: u64 = 64;
/// The offset index of a shard: some points of the segments that are not yet flushed; 4 million points.
const INDEX: (u64, u64) = (1 << 20, 192 << 20);
/// Bytes of the index that a partition takes at least: its range in each segment that is not flushed.
const INDEX_PARTITION: u64 = 512;
/// Keys of a shard's log, where a topic has an index of them; more is not used.
const KEYS_MIN: u64 = 16 << 20;
/// See [`KEYS_MIN`].
const KEYS_MAX: u64 = (keylog::ACTIVE_BYTES + keylog::RUNS_BYTES) as u64;
/// Windows of a shard's log.
const WINDOWS: (u64, u64) = (window::LEAST as u64, window::MOST as u64);
/// Heap that the allocator holds back, and all that has no account of its own.
const REST_MAX: u64 = 1 << 30;
/// Without a budget in the configuration: one part in so many of the machine's memory. The rest is the page cache's, in
/// which SSTs are read.
const MACHINE_PART: u64 = 4;
/// Smallest and largest budget.
const BUDGET: std::ops::RangeInclusive<u64> = (64 << 20)..=(64 << 40);

/// `[memory]`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Memory {
    /// Bytes that the process may take; `None`: worked out from the machine.
    pub budget: Option<u64>,
    /// Bytes of parts that are given theirs.
    pub shares: [Option<u64>; Part::ALL.len()],
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawMemory {
    budget: Option<Spanned<ByteSize>>,
    partitions: Option<Spanned<ByteSize>>,
    dedupe: Option<Spanned<ByteSize>>,
    offset_index: Option<Spanned<ByteSize>>,
    key_index: Option<Spanned<ByteSize>>,
    log_windows: Option<Spanned<ByteSize>>,
    block_cache: Option<Spanned<ByteSize>>,
    kafka_requests: Option<Spanned<ByteSize>>,
    kafka_answers: Option<Spanned<ByteSize>>,
    kafka_connections: Option<Spanned<ByteSize>>,
    groups: Option<Spanned<ByteSize>>,
    flush_merge: Option<Spanned<ByteSize>>,
}

impl RawMemory {
    fn share(&self, part: Part) -> Option<&Spanned<ByteSize>> {
        match part {
            Part::Partitions => self.partitions.as_ref(),
            Part::Dedupe => self.dedupe.as_ref(),
            Part::OffsetIndex => self.offset_index.as_ref(),
            Part::KeyIndex => self.key_index.as_ref(),
            Part::LogWindows => self.log_windows.as_ref(),
            Part::BlockCache => self.block_cache.as_ref(),
            Part::Requests => self.kafka_requests.as_ref(),
            Part::Answers => self.kafka_answers.as_ref(),
            Part::Connections => self.kafka_connections.as_ref(),
            Part::Groups => self.groups.as_ref(),
            Part::Maintenance => self.flush_merge.as_ref(),
            Part::Mempools | Part::Staging | Part::Rings | Part::Rest => None,
        }
    }
}

impl Checker<'_> {
    /// The table as it is; whether it is enough for what is configured is told by [`Checker::memory_fits`].
    pub(super) fn memory(&self, raw: &RawMemory) -> Result<Memory, ConfigError> {
        let mut memory = Memory {
            budget: raw.budget.as_ref().map(|b| b.get_ref().as_u64()),
            ..Memory::default()
        };
        if let Some(budget) = &raw.budget {
            self.size(Some(budget.clone()), "memory.budget", BUDGET, 1, 0)?;
        }
        for part in Part::ALL {
            memory.shares[part as usize] = raw.share(part).map(|share| share.get_ref().as_u64());
        }
        Ok(memory)
    }

    /// Refuses a budget, or a share of it, that is too small for the rest of the configuration.
    pub(super) fn memory_fits(&self, raw: &RawMemory, config: &Config) -> Result<(), ConfigError> {
        let facts = Facts {
            available: u64::MAX,
            ..Facts::default()
        };
        let minima = minima(config, &facts);
        for part in Part::ALL {
            if let Some(share) = raw.share(part)
                && share.get_ref().as_u64() < minima[part as usize]
            {
                let least = iec(minima[part as usize]);
                let key = format!("memory.{}", part.name());
                let have = share.get_ref().display().iec();
                let reason =
                    format!("{have} is too small for what is configured: at least {least}");
                return Err(self.error(share, &key, reason));
            }
        }
        match (&raw.budget, Plan::new(config, &facts)) {
            (Some(budget), Err(error)) => {
                Err(self.error(budget, "memory.budget", error.to_string()))
            }
            _ => Ok(()),
        }
    }
}

/// What the machine and the store add to the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Facts {
    /// Bytes that this process may have.
    pub available: u64,
    /// Bytes of packet buffers and descriptors.
    pub mempools: u64,
    /// Partitions that the store has; those of the configuration are the least.
    pub partitions: u64,
}

/// What each part may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The budget.
    pub total: u64,
    /// What the configuration says; else it was worked out from the machine.
    pub configured: bool,
    limits: [u64; Part::ALL.len()],
    minima: [u64; Part::ALL.len()],
}

/// A budget that what is configured does not fit into.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{have} is too small for what is configured: at least {need} ({parts}); raise budget in [memory], or lower what takes it"
)]
pub struct TooSmall {
    /// The budget.
    pub have: ByteSize,
    /// The least that is needed.
    pub need: ByteSize,
    /// Each part, with its minimum.
    pub parts: String,
}

fn iec(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// What a part can be given beyond its minimum: its weight, and the most that it can make use of.
fn wants(part: Part, config: &Config, minimum: u64) -> (u64, u64) {
    let shards = u64::from(config.storage.shards);
    let kafka = config.kafka.as_ref();
    let threads = kafka.map_or(0, |kafka| u64::from(kafka.threads));
    match part {
        Part::Mempools | Part::Staging | Part::Rings => (0, minimum),
        Part::Partitions => (6, 1 << 40),
        Part::Dedupe => (4, shards * dedupe::bytes(producers(config, PRODUCERS_MAX))),
        Part::OffsetIndex => (8, minimum.max(shards * INDEX.1)),
        // The index of a topic that a client makes: it has no other minimum.
        Part::KeyIndex => (6, minimum.max(shards * KEYS_MAX)),
        Part::LogWindows => (6, shards * WINDOWS.1),
        Part::BlockCache => (25, u64::MAX),
        Part::Requests => (12, threads * REQUESTS_MAX),
        Part::Answers => (14, threads * ANSWERS.1),
        Part::Connections => (
            4,
            kafka.map_or(0, |k| u64::from(k.max_connections) * costliest(config)),
        ),
        Part::Groups => (5, kafka.map_or(0, |_| GROUPS.1)),
        Part::Maintenance => (10, shards * MAINTENANCE_MAX),
        Part::Rest => (12, minimum.max(REST_MAX)),
    }
}

/// Producers that a shard remembers in `memory` bytes. All of them are written into each new segment of the log, of which
/// that is to be a small part.
pub fn producers(config: &Config, memory: u64) -> usize {
    let written = config.storage.segment_size / SNAPSHOT_PART;
    dedupe::producers_in(memory.min(written))
}

/// Bytes of an idle Kafka connection, with TLS or without, by io_uring or by epoll.
pub fn connection(tls: bool, ring: bool) -> u64 {
    let plain = if tls { TLS_CONNECTION } else { CONNECTION };
    plain + if ring { RING_CONNECTION } else { 0 }
}

/// Bytes of a connection to the costliest listener.
fn costliest(config: &Config) -> u64 {
    let Some(kafka) = &config.kafka else {
        return connection(false, false);
    };
    let tls = kafka.listeners.iter().any(|l| l.tls.is_some());
    connection(tls, kafka.transport == Transport::IoUring)
}

/// Bytes of rings and of tables whose size is fixed.
pub fn rings(config: &Config) -> u64 {
    let shards = u64::from(config.storage.shards);
    let threads = config.kafka.as_ref().map_or(0, |k| u64::from(k.threads));
    let lcores = match config.dpdk_ports().next() {
        None => 0,
        Some(_) => config.lcores.rx.len().max(1) as u64,
    };
    let receivers = lcores + u64::from(config.kernel_ports().next().is_some());
    let (inbound, ack) = (size_of::<Inbound>() as u64, size_of::<Ack>() as u64);
    let slot = size_of::<Option<(BatchBuffer, u64)>>() as u64 + 4 + ack;
    let to_kafka = LINK_BATCHES as u64 * (inbound + ack + slot);
    let to_lcore = INBOUND_SLOTS as u64 * inbound + ACK_SLOTS as u64 * ack;
    let own = DEFAULT_PENDING_ACKS as u64 * ack + index::NOTES_BYTES;
    shards * (threads * to_kafka + receivers * to_lcore + own)
}

fn partitions(config: &Config, facts: &Facts) -> u64 {
    let configured = config.topics.iter().map(|t| u64::from(t.partitions)).sum();
    facts.partitions.max(configured)
}

fn minima(config: &Config, facts: &Facts) -> [u64; Part::ALL.len()] {
    let storage = &config.storage;
    let shards = u64::from(storage.shards);
    let partitions = partitions(config, facts);
    let kafka = config.kafka.as_ref();
    let threads = kafka.map_or(0, |kafka| u64::from(kafka.threads));
    Part::ALL.map(|part| match part {
        Part::Mempools => facts.mempools,
        Part::Staging => shards * storage.staging_size,
        Part::Rings => rings(config),
        // Clients' own topics, and the server's, want some room.
        Part::Partitions => (partitions + 256) * (PARTITION + PARTITION_IN_SSTS),
        Part::Dedupe => shards * dedupe::bytes(PRODUCERS_MIN as usize),
        Part::OffsetIndex => shards * INDEX.0 + partitions * INDEX_PARTITION,
        Part::KeyIndex => match config.has_key_index() {
            true => shards * KEYS_MIN,
            false => 0,
        },
        Part::LogWindows => shards * WINDOWS.0,
        Part::BlockCache => shards * CACHE_MIN,
        Part::Requests => kafka.map_or(0, |k| threads * REQUESTS_MIN * k.max_request),
        Part::Answers => threads * ANSWERS.0,
        Part::Connections => kafka.map_or(0, |_| CONNECTIONS_MIN * costliest(config)),
        Part::Groups => kafka.map_or(0, |_| GROUPS.0),
        Part::Maintenance => shards * MAINTENANCE_MIN,
        Part::Rest => AT_REST + shards * (threads + SHARD_THREADS) * READER,
    })
}

impl Plan {
    /// What each part gets. An error names each part's minimum.
    pub fn new(config: &Config, facts: &Facts) -> Result<Plan, TooSmall> {
        let minima = minima(config, facts);
        let shares = config.memory.shares;
        let mut limits = [0; Part::ALL.len()];
        for part in Part::ALL {
            let at = part as usize;
            limits[at] = shares[at].unwrap_or(minima[at]).max(minima[at]);
        }
        let need = limits.iter().fold(0u64, |sum, &n| sum.saturating_add(n));
        let configured = config.memory.budget.is_some();
        let total = match config.memory.budget {
            Some(budget) => budget,
            None if facts.available / 10 * 9 < need => facts.available / 10 * 9,
            None => (facts.available / MACHINE_PART).max(need + need / 8),
        };
        if total < need {
            let parts = Part::ALL.into_iter().filter(|&p| limits[p as usize] > 0);
            let named = parts.map(|part| format!("{} {}", part.name(), iec(limits[part as usize])));
            return Err(TooSmall {
                have: ByteSize(total),
                need: ByteSize(need),
                parts: named.collect::<Vec<_>>().join(", "),
            });
        }
        let sink = match shares[Part::BlockCache as usize] {
            Some(_) => Part::Rest,
            None => Part::BlockCache,
        };
        spread(&mut limits, total - need, sink, |part| {
            match shares[part as usize] {
                Some(_) => (0, 0),
                None => wants(part, config, minima[part as usize]),
            }
        });
        Ok(Plan {
            total,
            configured,
            limits,
            minima,
        })
    }

    /// What a part may take.
    pub fn limit(&self, part: Part) -> u64 {
        self.limits[part as usize]
    }

    /// What a part needs at least.
    pub fn minimum(&self, part: Part) -> u64 {
        self.minima[part as usize]
    }

    /// The accounts.
    pub fn budget(&self) -> Budget {
        Budget::new(self.total, |part| self.limit(part))
    }
}

/// Adds `rest` to `limits` by weight, no part beyond its most; what nobody wants goes to `sink`.
fn spread(limits: &mut [u64], mut rest: u64, sink: Part, wants: impl Fn(Part) -> (u64, u64)) {
    loop {
        let open: Vec<(Part, u64, u64)> = Part::ALL
            .into_iter()
            .map(|part| {
                let (weight, most) = wants(part);
                (part, weight, most.saturating_sub(limits[part as usize]))
            })
            .filter(|&(_, weight, room)| weight > 0 && room > 0)
            .collect();
        let weights: u64 = open.iter().map(|&(_, weight, _)| weight).sum();
        let before = rest;
        if weights > 0 {
            for (part, weight, room) in open {
                let part_of_it =
                    (u128::from(before) * u128::from(weight) / u128::from(weights)) as u64;
                let more = part_of_it.min(room).min(rest);
                limits[part as usize] += more;
                rest -= more;
            }
        }
        // What rounding leaves is a few bytes.
        if rest == before || rest < 1024 {
            limits[sink as usize] += rest;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    const BASE: &str = "[storage]\npath = \"/d\"\n";

    fn parse(text: &str) -> Config {
        Config::parse(text, Path::new("t.toml")).unwrap()
    }

    fn refused(text: &str) -> String {
        Config::parse(text, Path::new("t.toml"))
            .expect_err("should be refused")
            .to_string()
    }

    fn machine(gib: u64) -> Facts {
        Facts {
            available: gib << 30,
            ..Facts::default()
        }
    }

    fn sum(plan: &Plan) -> u64 {
        Part::ALL.iter().map(|&part| plan.limit(part)).sum()
    }

    #[test]
    fn the_default_is_a_quarter_of_the_machine() {
        let config = parse(&format!("{BASE}[kafka]\n"));
        let plan = Plan::new(&config, &machine(16)).unwrap();
        assert!(!plan.configured);
        assert_eq!((plan.total, sum(&plan)), (4 << 30, 4 << 30));
        assert_eq!(plan.limit(Part::Staging), 32 << 20);
        assert!(plan.limit(Part::BlockCache) >= 512 << 20);
        let small = Plan::new(&config, &machine(1)).unwrap();
        assert!(
            small.total >= 200 << 20 && small.total <= 512 << 20,
            "{small:?}"
        );
        assert_eq!(sum(&small), small.total);
    }

    #[test]
    fn a_machine_that_is_too_small_says_what_takes_it() {
        let config = parse(&format!("{BASE}shards = 16\n[kafka]\n"));
        let error = Plan::new(&config, &machine(1)).unwrap_err().to_string();
        for part in [
            "staging 512.0 MiB",
            "flush_merge 512.0 MiB",
            "kafka_requests 64.0 MiB",
        ] {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
    }

    #[test]
    fn a_budget_that_is_too_small_is_refused_with_line_and_parts() {
        let message = refused(&format!("{BASE}[kafka]\n[memory]\nbudget = \"100MiB\"\n"));
        for part in [
            "line 5: memory.budget",
            "100.0 MiB is too small",
            "staging 32.0 MiB",
            "kafka_requests 64.0 MiB",
            "at least",
        ] {
            assert!(message.contains(part), "no {part:?} in {message}");
        }
        assert!(refused(&format!("{BASE}[memory]\nbudget = \"1MiB\"\n")).contains("64.0 MiB"));
        let message = refused(&format!("{BASE}[memory]\nblock_cache = \"1MiB\"\n"));
        assert!(
            message.contains("line 4: memory.block_cache") && message.contains("at least 4.0 MiB"),
            "{message}"
        );
        let message = refused(&format!(
            "{BASE}[memory]\nbudget = \"512MiB\"\nblock_cache = \"500MiB\"\n"
        ));
        assert!(message.contains("block_cache 500.0 MiB"), "{message}");
    }

    #[test]
    fn shares_are_as_configured() {
        let config = parse(&format!(
            "{BASE}[memory]\nbudget = \"1GiB\"\nblock_cache = \"300MiB\"\ndedupe = \"50MiB\"\n"
        ));
        let plan = Plan::new(&config, &machine(16)).unwrap();
        assert_eq!(plan.limit(Part::Dedupe), 50 << 20);
        assert_eq!(plan.limit(Part::BlockCache), 300 << 20);
        assert_eq!(sum(&plan), 1 << 30);
        // No Kafka: nothing for it.
        assert_eq!(plan.limit(Part::Requests), 0);
        assert!(plan.configured);
    }

    proptest! {
        #[test]
        fn the_sum_is_the_budget_and_minima_hold(
            mib in 64u64..1 << 20, shards in 1u16..8, threads in 1u16..8, partitions in 1u32..20_000,
            kafka in any::<bool>(), mempools in 0u64..1 << 30,
        ) {
            let kafka = match kafka {
                true => format!("[kafka]\nthreads = {threads}\n"),
                false => String::new(),
            };
            let mut config = parse(&format!(
                "{BASE}shards = {shards}\n{kafka}[[topic]]\nname = \"t\"\npartitions = {partitions}\n"
            ));
            config.memory.budget = Some(mib << 20);
            let facts = Facts { mempools, ..machine(16) };
            if let Ok(plan) = Plan::new(&config, &facts) {
                prop_assert_eq!(sum(&plan), mib << 20);
                for part in Part::ALL {
                    prop_assert!(plan.limit(part) >= plan.minimum(part));
                }
                prop_assert!(plan.limit(Part::Requests) <= u64::from(threads) * REQUESTS_MAX);
            }
        }
    }
}
