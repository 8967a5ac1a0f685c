//! The accounts of memory as they are now, and what keeps the process within its budget.
//!
//! Most parts charge what they take themselves; for the others it is asked here, every time somebody looks. What no part
//! accounts for is the *rest*: what the kernel says that the process takes, less all accounts. Invariant: while the
//! process takes more than its budget, the block cache is made smaller by as much as is too much, down to its minimum;
//! it gets its share back, a little at a time, when there is room.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::broker::worker::Broker;
use crate::config::Config;
use crate::config::memory::rings;
use crate::control::protocol::{AccountStats, MemoryStats};
use crate::memory::allocator;
use crate::memory::budget::{Budget, Charge, Part};
use crate::memory::process::Process;
use crate::shard::{ShardStats, dedupe};
use crate::storage::lsm::Store;

/// What a cache that gave way keeps, one part in so many of its share.
const CACHE_KEEPS: u64 = 16;
/// A cache that gave way gets so much of the budget back at a time, one part in so many, where as much is free.
const STEP: u64 = 64;
/// How often the allocator is asked for what it holds back, at most: it stops all allocations for milliseconds.
const GIVE_BACK: Duration = Duration::from_secs(5);

/// What is looked at.
pub(super) struct Gauges {
    budget: Budget,
    stores: Vec<Arc<Store>>,
    shards: Vec<Arc<ShardStats>>,
    broker: OnceLock<Arc<Broker>>,
    state: Mutex<State>,
}

struct State {
    dedupe: Charge,
    cache: Charge,
    groups: Charge,
    rest: Charge,
    /// Bytes that the caches were made smaller by.
    cut: u64,
    given_back: Option<Instant>,
    /// The log says that the budget is exceeded.
    said: bool,
    _fixed: [Charge; 3],
}

impl Gauges {
    pub(super) fn new(
        budget: &Budget,
        config: &Config,
        mempools: u64,
        stores: Vec<Arc<Store>>,
        shards: Vec<Arc<ShardStats>>,
    ) -> Gauges {
        let charge = |part, bytes| {
            let mut charge = Charge::new(budget.account(part));
            charge.set(bytes);
            charge
        };
        let staging = u64::from(config.storage.shards) * config.storage.staging_size;
        Gauges {
            stores,
            shards,
            broker: OnceLock::new(),
            state: Mutex::new(State {
                dedupe: charge(Part::Dedupe, 0),
                cache: charge(Part::BlockCache, 0),
                groups: charge(Part::Groups, 0),
                rest: charge(Part::Rest, 0),
                cut: 0,
                given_back: None,
                said: false,
                _fixed: [
                    charge(Part::Mempools, mempools),
                    charge(Part::Staging, staging),
                    charge(Part::Rings, rings(config)),
                ],
            }),
            budget: budget.clone(),
        }
    }

    /// From now on groups are looked at, too.
    pub(super) fn set_broker(&self, broker: &Arc<Broker>) {
        let _ = self.broker.set(Arc::clone(broker));
    }

    /// Reads all accounts, and does what keeps the process within its budget. Cost: some 50 µs.
    pub(super) fn look(&self) -> MemoryStats {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.ask(&mut state);
        let process = Process::now();
        let others = self.budget.usage().filter(|usage| usage.part != Part::Rest);
        let accounted: u64 = others.map(|usage| usage.used).sum();
        state.rest.set(process.taken().saturating_sub(accounted));
        self.keep(&mut state, process.taken());
        let account = |usage: crate::memory::budget::Usage| AccountStats {
            name: usage.part.name().to_owned(),
            limit: usage.limit,
            used: usage.used,
            peak: usage.peak,
            refused: usage.refused,
            over: usage.over,
            at_limit: usage.part.at_limit().to_owned(),
        };
        MemoryStats {
            budget: self.budget.total(),
            taken: process.taken(),
            accounts: self.budget.usage().map(account).collect(),
            anonymous: process.anonymous,
            shared: process.shared,
            huge: process.huge,
            file: process.file,
            peak_resident: process.peak,
            heap: allocator::allocated(),
        }
    }

    fn ask(&self, state: &mut State) {
        let sum = |of: fn(&ShardStats) -> u64| self.shards.iter().map(|shard| of(shard)).sum();
        let producers: u64 = sum(|shard| shard.producers.load(Relaxed));
        state.dedupe.set(dedupe::bytes(producers as usize));
        let dedupe = self.budget.account(Part::Dedupe);
        dedupe.set_refused(sum(|shard| shard.producers_evicted.load(Relaxed)));
        let caches = || self.stores.iter().map(|store| store.cache().stats());
        state.cache.set(caches().map(|cache| cache.bytes).sum());
        let cache = self.budget.account(Part::BlockCache);
        cache.set_refused(caches().map(|cache| cache.evictions).sum());
        if let Some(broker) = self.broker.get() {
            let groups = broker.hub.stats();
            let bytes = groups.state_bytes + groups.in_flight_bytes;
            state.groups.set(bytes as u64);
            self.budget
                .account(Part::Groups)
                .set_refused(groups.refused);
        }
    }

    /// Takes from the block cache what is too much, or gives it back.
    fn keep(&self, state: &mut State, taken: u64) {
        let total = self.budget.total();
        let limit = self.budget.account(Part::BlockCache).limit();
        let most = limit - limit / CACHE_KEEPS;
        let step = total / STEP;
        let over = taken.saturating_sub(total);
        let cut = match over {
            0 if taken + 2 * step < total => state.cut.saturating_sub(step),
            0 => state.cut,
            // What the caches do not hold is not to be had from them.
            over => (limit.saturating_sub(state.cache.bytes()).max(state.cut) + over).min(most),
        };
        if cut != state.cut {
            state.cut = cut;
            let each = (limit - cut) / self.stores.len().max(1) as u64;
            for store in &self.stores {
                store.cache().set_budget(each);
            }
        }
        let mib = |bytes: u64| bytes >> 20;
        if over > 0 {
            self.budget.account(Part::Rest).refuse();
            let due = |last: Instant| last.elapsed() > GIVE_BACK;
            if state.given_back.is_none_or(due) {
                allocator::give_back();
                state.given_back = Some(Instant::now());
            }
            if !state.said {
                tracing::warn!(
                    "the process takes {} MiB, its budget is {} MiB: the block cache gives way, to {} MiB; `taffrail stats` says what takes it",
                    mib(taken),
                    mib(total),
                    mib(limit - cut)
                );
            }
            state.said = true;
        } else if state.cut == 0 {
            state.said = false;
        }
    }
}
