//! Where messages go: what receivers know of topics and partitions, and what they count of them.
//!
//! Invariant: a receiver holds one version of the routes through a burst, and takes newer ones over between bursts without
//! waiting, allocating or freeing: whoever publishes frees what nobody holds any more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::TopicTable;
use crate::telemetry::Counter;
use crate::wire::datagram::ErrorCode;

/// Where a raw UDP source leads.
#[derive(Debug, Clone)]
pub struct Route {
    /// The topic's counters.
    pub counters: Arc<TopicCounters>,
    /// How a partition is chosen.
    pub choice: Choice,
    /// 0 is shed first, 7 last.
    pub priority: u8,
    /// The partitions to choose from.
    pub places: Vec<Place>,
}

/// How a route chooses among its places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// By the sender's address and port.
    Source,
    /// Burst by burst, in turn.
    Spread,
}

/// Where a partition lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its shard.
    pub shard: u16,
    /// Its index within the shard.
    pub local: u32,
}

/// A topic as producers of the datagram protocol reach it.
#[derive(Debug)]
pub struct ServedRoute {
    /// Its counters.
    pub counters: Arc<TopicCounters>,
    /// Its partitions.
    pub places: Vec<Place>,
}

/// What every receiver knows of the topics.
#[derive(Debug)]
pub struct Routes {
    /// Raw UDP sources; the index in a [`Target`](super::Target) is one into it.
    pub raw: Vec<Route>,
    /// Names and ids, for greetings.
    pub table: TopicTable,
    /// By topic id; `None` for ids that are not served.
    pub by_id: Vec<Option<Arc<ServedRoute>>>,
    /// By shard and local index: the topic's counters; `None` where it was deleted.
    pub topic_of: Vec<Vec<Option<Arc<TopicCounters>>>>,
}

/// The routes of the moment, for every receiver. Whoever publishes newer ones also frees the older ones, when
/// no receiver uses them any more.
#[derive(Debug)]
pub struct RouteCell {
    version: AtomicU64,
    routes: Mutex<RouteList>,
}

#[derive(Debug)]
struct RouteList {
    current: Arc<Routes>,
    old: Vec<Arc<Routes>>,
}

impl RouteCell {
    /// With the routes to begin with.
    pub fn new(routes: Routes) -> Self {
        Self {
            version: AtomicU64::new(0),
            routes: Mutex::new(RouteList {
                current: Arc::new(routes),
                old: Vec::new(),
            }),
        }
    }

    /// The newest routes.
    pub fn current(&self) -> Arc<Routes> {
        let list = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&list.current)
    }

    /// Replaces them; receivers take them over within some milliseconds.
    pub fn publish(&self, routes: Routes) {
        let mut list = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut list.current, Arc::new(routes));
        list.old.push(old);
        list.old.retain(|routes| Arc::strong_count(routes) > 1);
        drop(list);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Replaces `routes` where there are newer ones than version `seen`. Never waits, allocates or frees.
    #[inline]
    pub(super) fn refresh(&self, seen: &mut u64, routes: &mut Arc<Routes>) {
        let version = self.version.load(Ordering::Acquire);
        if version != *seen
            && let Ok(list) = self.routes.try_lock()
        {
            *routes = Arc::clone(&list.current);
            *seen = version;
        }
    }
}

/// What is counted of a topic before its messages are in a shard's hands.
#[derive(Debug)]
pub struct TopicCounters {
    /// By receiver (rx lcores, then the thread of kernel UDP); written by that one alone.
    pub receivers: Box<[TopicRx]>,
    /// Of all threads of Kafka's protocol.
    pub kernel: TopicKernel,
}

impl TopicCounters {
    /// For so many receivers.
    pub fn new(receivers: usize) -> Self {
        Self {
            receivers: (0..receivers).map(|_| TopicRx::default()).collect(),
            kernel: TopicKernel::default(),
        }
    }
}

/// What kernel threads count of a topic, in messages.
#[derive(Debug, Default)]
pub struct TopicKernel {
    received: AtomicU64,
    refused: [AtomicU64; ErrorCode::ALL.len()],
}

impl TopicKernel {
    /// Counts messages that a shard is going to get; to be called before they are sent to it.
    #[inline]
    pub fn receive(&self, messages: u64) {
        self.received.fetch_add(messages, Ordering::Relaxed);
    }

    /// Counts messages as received and refused by the thread itself.
    pub fn refuse(&self, reason: ErrorCode, messages: u64) {
        // Readers look at what became of messages first.
        self.received.fetch_add(messages, Ordering::Relaxed);
        self.refused[reason as usize].fetch_add(messages, Ordering::Release);
    }

    /// Messages received.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Acquire)
    }

    /// Messages refused before any shard saw them, by reason.
    pub fn refused(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        ErrorCode::ALL.iter().map(|&code| {
            (
                code.name(),
                self.refused[code as usize].load(Ordering::Acquire),
            )
        })
    }
}

/// What a receiver counts of a topic, in messages.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct TopicRx {
    /// Found in packets.
    pub received: Counter,
    /// Not handed over: the shard's ring was full.
    pub ring_full: Counter,
    /// Not handed over: shed by priority.
    pub shed: Counter,
}
