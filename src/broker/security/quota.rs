//! Quotas: how many bytes a second clients may produce and fetch, how much of the broker's threads' time they may take,
//! and how long they wait beyond that.
//!
//! Source: Kafka's documentation of client quotas, whose order of precedence holds. As on Kafka a request over the
//! quota is served, its answer says how long the client is throttled, and its connection is not read for so
//! long. Each rate is a bucket that fills within `BURST_NS`. Invariants: what was taken beyond the rate is
//! waited for; the table holds no more buckets than connections use, and those still owing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

/// Nanoseconds of a quota that may be taken at once.
const BURST_NS: u64 = 1_000_000_000;
/// The longest that one answer throttles, in milliseconds: below clients' request time-outs. What is still owed
/// then counts with the next request.
const MAX_THROTTLE_MS: u64 = 10_000;
/// The same for time, as on Kafka, where it is one window of the measurement: all requests are muted by it, those that
/// keep a member in its group among them.
const MAX_TIME_THROTTLE_MS: u64 = 1_000;
/// Buckets beyond which those that nobody uses are looked for.
const MANY: usize = 1024;

/// Whom a quota is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entity {
    /// Each that has no quota of its own.
    Default,
    /// This one.
    Name(String),
}

/// A quota: at least one of `user` and `client` is given.
#[derive(Debug, Clone, PartialEq)]
pub struct Quota {
    /// The principal.
    pub user: Option<Entity>,
    /// The client id.
    pub client: Option<Entity>,
    /// Bytes a second of produce requests.
    pub produce: Option<u64>,
    /// Bytes a second of fetched records.
    pub fetch: Option<u64>,
    /// Time of the broker's threads, in percent of one of them.
    pub time: Option<f64>,
}

/// What a rate is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Bytes in.
    Produce,
    /// Bytes out.
    Fetch,
    /// Nanoseconds of threads.
    Time,
}

impl Quota {
    /// What a unit of its rate costs, in nanoseconds; `None`: it has no such rate.
    fn cost(&self, direction: Direction) -> Option<f64> {
        let bytes = |rate: u64| 1e9 / rate.max(1) as f64;
        match direction {
            Direction::Produce => self.produce.map(bytes),
            Direction::Fetch => self.fetch.map(bytes),
            Direction::Time => self.time.map(|percent| 100.0 / percent),
        }
    }
}

/// A rate and what was taken of it.
#[derive(Debug)]
pub struct Bucket {
    ns_per_unit: f64,
    max_throttle_ms: u64,
    /// When all that was taken will have been allowed, in nanoseconds of the broker's clock.
    paid_at: AtomicU64,
}

impl Bucket {
    fn new(ns_per_unit: f64, max_throttle_ms: u64) -> Self {
        Self {
            ns_per_unit,
            max_throttle_ms,
            paid_at: AtomicU64::new(0),
        }
    }

    /// Takes so many bytes or nanoseconds; gives the milliseconds that the client is to wait.
    pub fn take(&self, units: usize, now_ns: u64) -> u64 {
        let cost = (units as f64 * self.ns_per_unit) as u64;
        let pay = |paid: u64| {
            paid.max(now_ns.saturating_sub(BURST_NS))
                .saturating_add(cost)
        };
        // The closure always gives a value.
        let before = self
            .paid_at
            .fetch_update(Relaxed, Relaxed, |paid| Some(pay(paid)));
        let owed = before.map_or(0, pay).saturating_sub(now_ns);
        owed.div_ceil(1_000_000).min(self.max_throttle_ms)
    }

    fn owes(&self, now_ns: u64) -> bool {
        self.paid_at.load(Relaxed) > now_ns.saturating_sub(BURST_NS)
    }
}

/// Whose bucket it is: user and client id, as far as the quota tells them apart.
type Key = (Direction, Option<Box<str>>, Option<Box<str>>);

/// All quotas.
#[derive(Debug, Default)]
pub struct Quotas {
    quotas: Vec<Quota>,
    buckets: Mutex<HashMap<Key, Arc<Bucket>>>,
}

impl Quotas {
    /// These.
    pub fn new(quotas: Vec<Quota>) -> Self {
        Self {
            quotas,
            buckets: Mutex::default(),
        }
    }

    /// The bucket that counts for a user's client; `None`: it has no quota.
    pub fn bucket(
        &self,
        direction: Direction,
        user: &str,
        client: &str,
        now_ns: u64,
    ) -> Option<Arc<Bucket>> {
        // The closest is that of the user by name, then by default; of each, that of the client.
        let closeness = |entity: &Option<Entity>, name: &str| match entity {
            None => Some(0),
            Some(Entity::Default) => Some(1),
            Some(Entity::Name(wanted)) => (wanted == name).then_some(2),
        };
        let (_, quota, cost) = self
            .quotas
            .iter()
            .filter_map(|quota| {
                let cost = quota.cost(direction)?;
                let close = (
                    closeness(&quota.user, user)?,
                    closeness(&quota.client, client)?,
                );
                Some((close, quota, cost))
            })
            .max_by_key(|(close, ..)| *close)?;
        let key = (
            direction,
            quota.user.as_ref().map(|_| user.into()),
            quota.client.as_ref().map(|_| client.into()),
        );
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MANY && !buckets.contains_key(&key) {
            buckets.retain(|_, bucket| Arc::strong_count(bucket) > 1 || bucket.owes(now_ns));
        }
        let most = match direction {
            Direction::Time => MAX_TIME_THROTTLE_MS,
            _ => MAX_THROTTLE_MS,
        };
        let bucket = buckets
            .entry(key)
            .or_insert_with(|| Arc::new(Bucket::new(cost, most)));
        Some(Arc::clone(bucket))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.quotas.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn a_second_is_free_and_the_rest_is_waited_for() {
        let bucket = Bucket::new(1e6, MAX_THROTTLE_MS);
        let now = 100 * S;
        assert_eq!(bucket.take(600, now), 0);
        assert_eq!(bucket.take(400, now), 0);
        assert_eq!(bucket.take(500, now), 500);
        assert_eq!(
            bucket.take(100, now + S / 2),
            100,
            "half a second later it is paid"
        );
        assert_eq!(
            bucket.take(1000, now + 100 * S),
            0,
            "it does not fill further"
        );
        assert_eq!(bucket.take(1_000_000, now + 100 * S), MAX_THROTTLE_MS);
        assert_eq!(
            bucket.take(0, now + 200 * S),
            MAX_THROTTLE_MS,
            "the rest is still owed"
        );
        assert_eq!(bucket.take(0, now + 1100 * S), 0);
    }

    #[test]
    fn time_is_a_share_of_a_thread() {
        let quotas = Quotas::new(vec![Quota {
            user: Some(Entity::Default),
            client: None,
            produce: None,
            fetch: None,
            time: Some(20.0),
        }]);
        let bucket = quotas.bucket(Direction::Time, "u", "c", 0).unwrap();
        let now = 100 * S;
        let ms = 1_000_000;
        // A second's worth at once, then five times what it took.
        assert_eq!(bucket.take(200 * ms, now), 0);
        assert_eq!(bucket.take(100 * ms, now), 500);
        assert_eq!(bucket.take(0, now + S / 2), 0);
        assert_eq!(bucket.take(10_000 * ms, now + S), MAX_TIME_THROTTLE_MS);
        assert!(quotas.bucket(Direction::Produce, "u", "c", 0).is_none());
    }

    #[test]
    fn the_closest_quota_counts() {
        let of = |user: &str, client: &str, rate| {
            let entity = |name: &str| match name {
                "" => None,
                "*" => Some(Entity::Default),
                name => Some(Entity::Name(name.to_owned())),
            };
            Quota {
                user: entity(user),
                client: entity(client),
                produce: Some(rate),
                fetch: None,
                time: None,
            }
        };
        let quotas = Quotas::new(vec![
            of("", "*", 1),
            of("", "c", 2),
            of("*", "", 3),
            of("*", "c", 4),
            of("u", "", 5),
            of("u", "*", 6),
            of("u", "c", 7),
        ]);
        let rate = |user, client| {
            let bucket = quotas.bucket(Direction::Produce, user, client, 0).unwrap();
            (1e9 / bucket.ns_per_unit).round() as u64
        };
        assert_eq!(rate("u", "c"), 7);
        assert_eq!(rate("u", "d"), 6);
        assert_eq!(rate("v", "c"), 4);
        assert_eq!(rate("v", "d"), 3);
        let direction = Direction::Fetch;
        assert!(quotas.bucket(direction, "u", "c", 0).is_none());
        let bucket = |user, client| quotas.bucket(Direction::Produce, user, client, 0).unwrap();
        assert!(Arc::ptr_eq(&bucket("v", "d"), &bucket("v", "e")));
        assert!(!Arc::ptr_eq(&bucket("v", "d"), &bucket("w", "d")));
        let quotas = Quotas::new(vec![of("", "*", 1), of("", "c", 2)]);
        let bucket = |user, client| quotas.bucket(Direction::Produce, user, client, 0).unwrap();
        assert!(Arc::ptr_eq(&bucket("v", "c"), &bucket("w", "c")));
        assert!(!Arc::ptr_eq(&bucket("v", "d"), &bucket("v", "e")));
    }

    #[test]
    fn names_that_come_and_go_take_no_memory() {
        let quotas = Quotas::new(vec![Quota {
            user: None,
            client: Some(Entity::Default),
            produce: Some(10),
            fetch: None,
            time: None,
        }]);
        for i in 0..10 * MANY {
            let now = i as u64 * S;
            let name = i.to_string();
            let bucket = quotas.bucket(Direction::Produce, "u", &name, now).unwrap();
            bucket.take(1, now);
        }
        assert!(quotas.buckets.lock().unwrap().len() <= MANY);
    }
}
