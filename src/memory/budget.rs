//! What the process may take of memory, part by part, and what each part takes.
//!
//! An [`Account`] is one part's: a limit that the plan of the configuration gave it, and lock-free counters. Whoever
//! holds memory of a part says so in its account: by a [`Charge`] where one owner keeps the sum of what it holds, by
//! [`Account::try_take`] and [`Account::give`] where many come and go.
//!
//! Invariants: `used` is the sum of all charges and of what was taken and not given back; [`Account::try_take`] never
//! carries it beyond the limit. Owners that cannot refuse ([`Charge::set`]) keep themselves below their part of the limit
//! by dropping what can be had again; where they cannot, `used` shows it and [`Account::over`] counts it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A part of the process that has an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Packet buffers and descriptors of DPDK's ports.
    Mempools,
    /// Staging buffers of the shards.
    Staging,
    /// Rings between threads, and tables of fixed size.
    Rings,
    /// Topics, partitions, and where each lies in the SSTs.
    Partitions,
    /// Idempotent producers.
    Dedupe,
    /// Where batches lie in the log.
    OffsetIndex,
    /// Keys of the log that is not in SSTs, of topics with a key index.
    KeyIndex,
    /// Stretches of the log that readers share.
    LogWindows,
    /// Decompressed blocks of SSTs.
    BlockCache,
    /// Kafka requests that have not arrived whole, and batches on their way to shards.
    Requests,
    /// Answers to Kafka clients that are not sent.
    Answers,
    /// Open Kafka connections.
    Connections,
    /// Consumer groups and their offsets.
    Groups,
    /// Flushing the log and merging SSTs.
    Maintenance,
    /// Everything else: code, stacks, readers' buffers, and what the allocator holds back.
    Rest,
}

impl Part {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Part; 15] = [
        Part::Mempools,
        Part::Staging,
        Part::Rings,
        Part::Partitions,
        Part::Dedupe,
        Part::OffsetIndex,
        Part::KeyIndex,
        Part::LogWindows,
        Part::BlockCache,
        Part::Requests,
        Part::Answers,
        Part::Connections,
        Part::Groups,
        Part::Maintenance,
        Part::Rest,
    ];

    /// Its name in statistics and in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Part::Mempools => "mempools",
            Part::Staging => "staging",
            Part::Rings => "rings",
            Part::Partitions => "partitions",
            Part::Dedupe => "dedupe",
            Part::OffsetIndex => "offset_index",
            Part::KeyIndex => "key_index",
            Part::LogWindows => "log_windows",
            Part::BlockCache => "block_cache",
            Part::Requests => "kafka_requests",
            Part::Answers => "kafka_answers",
            Part::Connections => "kafka_connections",
            Part::Groups => "groups",
            Part::Maintenance => "flush_merge",
            Part::Rest => "rest",
        }
    }

    /// What happens when it is at its limit, in words for operators.
    pub fn at_limit(self) -> &'static str {
        match self {
            Part::Mempools | Part::Staging | Part::Rings => "of fixed size",
            Part::Partitions => "no more partitions are made",
            Part::Dedupe => "the producer not seen for longest is forgotten",
            Part::OffsetIndex => "the index becomes coarser",
            Part::KeyIndex => "older parts of the log are read at each search",
            Part::LogWindows => "readers copy from them",
            Part::BlockCache => "blocks not read for long go",
            Part::Requests => "requests stay unread",
            Part::Answers => "fetches wait, whoever takes no answers is closed",
            Part::Connections => "new connections are closed",
            Part::Groups => "groups' requests are refused",
            Part::Maintenance => "more passes, smaller merges",
            Part::Rest => "the block cache gives way",
        }
    }
}

/// One part's account. Any number of threads; no locks.
#[derive(Debug)]
pub struct Account {
    part: Part,
    limit: u64,
    used: AtomicU64,
    peak: AtomicU64,
    refused: AtomicU64,
    over: AtomicU64,
}

/// An account at a moment, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Whose.
    pub part: Part,
    /// What it may take.
    pub limit: u64,
    /// What it takes.
    pub used: u64,
    /// The most that it took since the start.
    pub peak: u64,
    /// How often something had to go, to wait or was refused because the limit was reached.
    pub refused: u64,
    /// How often the limit was exceeded nevertheless.
    pub over: u64,
}

impl Account {
    /// An account of its own, as tests and tools need it.
    pub fn new(part: Part, limit: u64) -> Arc<Account> {
        Arc::new(Account {
            part,
            limit,
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            over: AtomicU64::new(0),
        })
    }

    /// Whose.
    pub fn part(&self) -> Part {
        self.part
    }

    /// Bytes that the part may take.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// What each of `owners` may take, where they share evenly.
    pub fn share(self: &Arc<Self>, owners: usize) -> Share {
        Share {
            bytes: self.limit / owners.max(1) as u64,
            account: Arc::clone(self),
        }
    }

    /// Bytes that the part takes.
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Takes `bytes` if they are within the limit; false, and counted as refused, if not.
    pub fn try_take(&self, bytes: u64) -> bool {
        let mut used = self.used.load(Relaxed);
        loop {
            let Some(more) = used.checked_add(bytes).filter(|&more| more <= self.limit) else {
                self.refused.fetch_add(1, Relaxed);
                return false;
            };
            match self
                .used
                .compare_exchange_weak(used, more, Relaxed, Relaxed)
            {
                Ok(_) => {
                    self.peak.fetch_max(more, Relaxed);
                    return true;
                }
                Err(now) => used = now,
            }
        }
    }

    /// Takes `bytes` whatever the limit is.
    pub fn take(&self, bytes: u64) {
        let used = self.used.fetch_add(bytes, Relaxed).saturating_add(bytes);
        self.peak.fetch_max(used, Relaxed);
        if used > self.limit {
            self.over.fetch_add(1, Relaxed);
        }
    }

    /// Gives back what was taken.
    pub fn give(&self, bytes: u64) {
        let before = self.used.fetch_sub(bytes, Relaxed);
        debug_assert!(
            before >= bytes,
            "{}: more given than taken",
            self.part.name()
        );
    }

    /// Something had to go, to wait, or was refused.
    pub fn refuse(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    /// So many times in all something had to go or was refused, as its owner counted.
    pub fn set_refused(&self, times: u64) {
        self.refused.store(times, Relaxed);
    }

    /// How often the limit was exceeded.
    pub fn over(&self) -> u64 {
        self.over.load(Relaxed)
    }

    /// The account now.
    pub fn usage(&self) -> Usage {
        Usage {
            part: self.part,
            limit: self.limit,
            used: self.used(),
            peak: self.peak.load(Relaxed),
            refused: self.refused.load(Relaxed),
            over: self.over(),
        }
    }
}

/// What one owner may take of a part.
#[derive(Debug, Clone)]
pub struct Share {
    account: Arc<Account>,
    bytes: u64,
}

impl Share {
    /// Of an account of its own, as tools and tests have it.
    pub fn alone(part: Part, bytes: u64) -> Share {
        Account::new(part, bytes).share(1)
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whose.
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// To charge what the owner holds.
    pub fn charge(&self) -> Charge {
        Charge::new(&self.account)
    }
}

/// What one owner holds of a part; given back when it is dropped.
#[derive(Debug)]
pub struct Charge {
    account: Arc<Account>,
    bytes: u64,
}

impl Charge {
    /// Of an owner that holds nothing yet.
    pub fn new(account: &Arc<Account>) -> Charge {
        Charge {
            account: Arc::clone(account),
            bytes: 0,
        }
    }

    /// The account.
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Bytes that the owner holds.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The owner holds `bytes` now. Cost: nothing where that is as before, else an atomic addition.
    pub fn set(&mut self, bytes: u64) {
        if bytes > self.bytes {
            self.account.take(bytes - self.bytes);
        } else if bytes < self.bytes {
            self.account.give(self.bytes - bytes);
        }
        self.bytes = bytes;
    }

    /// As [`Charge::set`] where that stays within the account's limit; else false, counted as refused, and as before.
    pub fn try_set(&mut self, bytes: u64) -> bool {
        if bytes > self.bytes && !self.account.try_take(bytes - self.bytes) {
            return false;
        }
        if bytes < self.bytes {
            self.account.give(self.bytes - bytes);
        }
        self.bytes = bytes;
        true
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.account.give(self.bytes);
    }
}

/// All accounts.
#[derive(Debug, Clone)]
pub struct Budget {
    total: u64,
    accounts: [Arc<Account>; Part::ALL.len()],
}

impl Budget {
    /// With what each part may take.
    pub fn new(total: u64, limit: impl Fn(Part) -> u64) -> Budget {
        Budget {
            total,
            accounts: Part::ALL.map(|part| Account::new(part, limit(part))),
        }
    }

    /// Without limits, for tools and tests.
    pub fn unlimited() -> Budget {
        Budget::new(u64::MAX, |_| u64::MAX)
    }

    /// Bytes that the whole process may take.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// A part's account.
    pub fn account(&self, part: Part) -> &Arc<Account> {
        &self.accounts[part as usize]
    }

    /// All accounts now.
    pub fn usage(&self) -> impl Iterator<Item = Usage> + '_ {
        self.accounts.iter().map(|account| account.usage())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_in_the_order_of_their_numbers() {
        for (at, part) in Part::ALL.into_iter().enumerate() {
            assert_eq!(part as usize, at);
        }
        let budget = Budget::new(100, |part| part as u64);
        assert_eq!(budget.account(Part::Groups).limit(), Part::Groups as u64);
        assert_eq!(budget.account(Part::Groups).part(), Part::Groups);
        assert_eq!(budget.usage().count(), Part::ALL.len());
    }

    #[test]
    fn nothing_is_taken_beyond_the_limit() {
        let account = Account::new(Part::Answers, 100);
        assert!(account.try_take(60));
        assert!(!account.try_take(41));
        assert!(!account.try_take(u64::MAX));
        assert!(account.try_take(40));
        account.give(30);
        let usage = account.usage();
        assert_eq!(
            (usage.used, usage.peak, usage.refused, usage.over),
            (70, 100, 2, 0)
        );
        assert_eq!(account.share(3).bytes(), 33);
        assert_eq!(account.share(0).bytes(), 100);
    }

    #[test]
    fn who_cannot_refuse_is_seen_to_exceed() {
        let account = Account::new(Part::OffsetIndex, 100);
        account.take(101);
        account.give(101);
        let usage = account.usage();
        assert_eq!(
            (usage.used, usage.peak, usage.refused, usage.over),
            (0, 101, 0, 1)
        );
    }

    #[test]
    fn charges_follow_their_owner_and_go_with_it() {
        let account = Account::new(Part::Dedupe, 100);
        let mut one = Charge::new(&account);
        let mut two = Charge::new(&account);
        one.set(50);
        two.set(30);
        one.set(20);
        assert_eq!((account.used(), one.bytes(), two.bytes()), (50, 20, 30));
        assert!(!two.try_set(81));
        assert!(two.try_set(80));
        assert!(two.try_set(10));
        assert_eq!((account.used(), two.bytes()), (30, 10));
        drop(one);
        assert_eq!(account.used(), 10);
        drop(two);
        assert_eq!((account.used(), account.usage().peak), (0, 100));
    }

    #[test]
    fn threads_never_take_more_than_there_is() {
        let account = Account::new(Part::Requests, 1000);
        std::thread::scope(|scope| {
            for thread in 1..=4u64 {
                let account = &account;
                scope.spawn(move || {
                    for _ in 0..20_000 {
                        if account.try_take(thread * 100) {
                            assert!(account.used() <= 1000);
                            account.give(thread * 100);
                        }
                    }
                });
            }
        });
        let usage = account.usage();
        assert!(usage.used == 0 && usage.peak <= 1000, "{usage:?}");
    }
}
