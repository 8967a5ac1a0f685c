//! The client library of the datagram protocol: acknowledged, exactly-once produce over UDP from
//! any Linux host, with the kernel's own sockets.
//!
//! [`Producer`] batches messages by partition, sends them, and reports what became of each. It has
//! no thread of its own: call [`Producer::poll`] regularly, and whenever its events are wanted.
//!
//! ```no_run
//! use std::time::Duration;
//! use taffrail::client::{Event, Producer, ProducerConfig, Target};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut producer = Producer::connect(ProducerConfig::new("192.0.2.10:9094", "ticks"))?;
//! for i in 0..1000 {
//!     let value = format!("tick {i}");
//!     producer.send_wait(Target::Auto, Some(b"EURUSD"), value.as_bytes())?;
//! }
//! producer.flush(Duration::from_secs(10))?;
//! while let Some(event) = producer.next_event() {
//!     match event {
//!         Event::Delivered { partition, messages, base_offset } => {
//!             println!("partition {partition}: messages {messages:?} from offset {base_offset:?}")
//!         }
//!         other => eprintln!("{other:?}"),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What is promised
//!
//! - A message reported [`Event::Delivered`] is in the log exactly once, at the offset reported,
//!   as durable as the [`Acks`] level says; also when datagrams were lost, doubled or reordered and
//!   when the server was restarted meanwhile.
//! - Messages of one partition are in the log in the order in which they were sent.
//! - A message that cannot be delivered within [`ProducerConfig::delivery_timeout`] is reported
//!   [`Event::Failed`], with the reason and with its [`Fate`]: whether it may be in the log all the
//!   same. A message that has once left this machine never gets another sequence number unless the
//!   server has proved that it does not hold it, so the library itself never doubles a message;
//!   sending a message again whose fate is [`Fate::Unknown`] may.
//! - Memory is bounded by [`ProducerConfig::max_buffered_bytes`]; [`SendError::Full`] says so.
//!
//! Across a restart of the *client*, exactly-once is in the hands of the application, which alone
//! knows which messages it had handed over: with a random producer id (the default) the new
//! instance is another producer. With a configured producer id, start each instance with an epoch
//! above all that the last one used ([`Producer::epoch`]; the first of them plus one where no failure
//! was reported): the server then refuses whatever of the old instance is still under way, and
//! what has been stored can be read back from the log to find where to go on. An epoch that has been
//! used before would let the server take new messages for old ones; where that shows, the partition
//! fails with [`FailReason::EpochReused`].

mod batch;
mod machine;
#[cfg(test)]
mod model;
mod partitioner;
mod producer;
mod rtt;
#[cfg(test)]
mod simulation;
mod udp;

use std::io;
use std::ops::Range;
use std::time::Duration;

pub use machine::{Machine, Now, Stats, Transmit};
pub use partitioner::{Target, partition_of_key};
pub use producer::Producer;

use crate::wire::datagram::{ErrorCode, MAX_TOPIC_NAME};

/// When a message counts as delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acks {
    /// `acks=0`: never answered; messages may be lost without a word.
    None,
    /// `acks=1`: in the server's staging memory, which survives its process but not a power cut.
    Staged,
    /// `acks=all`: on disk.
    Durable,
}

impl Acks {
    /// As the protocol writes it.
    pub const fn to_wire(self) -> i8 {
        match self {
            Self::None => 0,
            Self::Staged => 1,
            Self::Durable => -1,
        }
    }

    /// What the protocol's number means.
    pub const fn from_wire(acks: i8) -> Option<Self> {
        match acks {
            0 => Some(Self::None),
            1 => Some(Self::Staged),
            -1 => Some(Self::Durable),
            _ => None,
        }
    }
}

/// What a [`Producer`] is to do.
#[derive(Debug, Clone)]
pub struct ProducerConfig {
    /// Addresses of the server, `host:port` each, tried in turn until one answers.
    pub servers: Vec<String>,
    /// The topic.
    pub topic: String,
    /// Acknowledgement level; `None` takes the server's default.
    pub acks: Option<Acks>,
    /// How long a message may wait for others to share its datagram. With zero it goes out at the
    /// next poll, unless the window is full, in which case messages gather all the same.
    pub linger: Duration,
    /// Largest UDP payload to send, in bytes; the server's limit and the path's MTU bound it too.
    pub max_datagram: usize,
    /// A stable producer id (≥ 0); `None` draws a random one.
    pub producer_id: Option<i64>,
    /// Epoch to begin with; only of use with a stable producer id.
    pub epoch: i16,
    /// How long a message may take from `send` to its acknowledgement before it fails.
    pub delivery_timeout: Duration,
    /// How long to wait for a server to answer the greeting.
    pub connect_timeout: Duration,
    /// Retransmission timeout before the first round trip has been measured.
    pub retry_initial: Duration,
    /// Shortest retransmission timeout.
    pub retry_min: Duration,
    /// Longest retransmission timeout.
    pub retry_max: Duration,
    /// Bytes of buffers that messages may take, from `send` to their acknowledgement.
    pub max_buffered_bytes: usize,
}

impl ProducerConfig {
    /// For one server and topic, with the defaults: the server's acknowledgement level, no linger,
    /// a random producer id, two minutes to deliver, 32 MiB of buffers.
    pub fn new(server: impl Into<String>, topic: impl Into<String>) -> Self {
        Self {
            servers: vec![server.into()],
            topic: topic.into(),
            acks: None,
            linger: Duration::ZERO,
            max_datagram: MAX_DATAGRAM,
            producer_id: None,
            epoch: 0,
            delivery_timeout: Duration::from_secs(120),
            connect_timeout: Duration::from_secs(10),
            retry_initial: Duration::from_millis(250),
            retry_min: Duration::from_millis(20),
            retry_max: Duration::from_secs(1),
            max_buffered_bytes: 32 << 20,
        }
    }

    /// Refuses what cannot work, before anything is sent.
    pub fn check(&self) -> Result<(), ConnectError> {
        let wrong = |what| Err(ConnectError::Config(what));
        if self.topic.is_empty() || self.topic.len() > MAX_TOPIC_NAME {
            return wrong("a topic name has 1 to 249 bytes");
        }
        if self.servers.is_empty() {
            return wrong("no server address is given");
        }
        if !(MIN_DATAGRAM..=MAX_DATAGRAM).contains(&self.max_datagram) {
            return wrong("max_datagram must be 256 to 65507 bytes");
        }
        if self.producer_id.is_some_and(|id| id < 0) || self.epoch < 0 {
            return wrong("producer id and epoch must not be negative");
        }
        if self.producer_id.is_some() && self.acks == Some(Acks::None) {
            return wrong("a producer id is of no use without acknowledgements (acks 1 or all)");
        }
        Ok(())
    }
}

/// Smallest datagram worth the name: headers and a record of some bytes.
pub const MIN_DATAGRAM: usize = 256;
/// Largest UDP payload over IPv4.
pub const MAX_DATAGRAM: usize = 65_507;

/// A message's place among those sent to its partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    /// The partition it goes to.
    pub partition: u32,
    /// Counts the messages of this producer in that partition, from 0; events name ranges of it.
    pub message: u64,
}

/// What became of messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// In the log, as durable as asked for.
    Delivered {
        /// Their partition.
        partition: u32,
        /// The messages ([`Ticket::message`]).
        messages: Range<u64>,
        /// Offset of the first one, the others follow without a gap; `None` when they are known to
        /// be stored but the answer that named the offset was lost for good.
        base_offset: Option<i64>,
    },
    /// Handed to the network with `acks=0`; nothing more will be known of them.
    Sent {
        /// Their partition.
        partition: u32,
        /// The messages.
        messages: Range<u64>,
    },
    /// Given up.
    Failed {
        /// Their partition.
        partition: u32,
        /// The messages.
        messages: Range<u64>,
        /// Why.
        reason: FailReason,
        /// Whether they may be in the log.
        fate: Fate,
    },
    /// The server no longer knows this producer, though it had acknowledged messages of it: it has
    /// lost or dropped state. What was unacknowledged is sent under a new epoch; messages
    /// acknowledged before are worth checking where the server's storage was replaced.
    ServerForgot {
        /// The partition.
        partition: u32,
        /// The epoch used from now on.
        epoch: i16,
    },
}

/// Whether failed messages may be in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fate {
    /// They never left this machine.
    NotSent,
    /// The server refused every transmission. (A copy that the network itself made could still
    /// arrive.)
    Refused,
    /// At least one transmission was never answered: they may be stored, now or a little later.
    Unknown,
}

/// Why messages failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum FailReason {
    /// Nobody answered in time.
    #[error("not acknowledged within the delivery timeout; the server does not answer")]
    Timeout,
    /// Refused until the delivery timeout ended.
    #[error("not accepted within the delivery timeout: {0}")]
    TimeoutRefused(ErrorCode),
    /// Refused for good.
    #[error("refused: {0}")]
    Refused(ErrorCode),
    /// An earlier message of the partition failed, which ended the sequence they were part of.
    #[error("an earlier message of the partition failed after both had been sent")]
    Predecessor,
    /// Another instance of this producer, with a newer epoch, has taken over the partition.
    #[error("another instance of this producer with a newer epoch has taken over")]
    Fenced,
    /// The server has seen this producer id and epoch before.
    #[error("this producer id and epoch were used before; start with a higher epoch")]
    EpochReused,
    /// The configured producer id has no epoch left.
    #[error("the producer id has no epoch left; choose another id")]
    EpochsExhausted,
    /// The producer was closed first.
    #[error("the producer was closed before they were acknowledged")]
    Closed,
}

/// Why a message was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The buffers are full; poll, then try again.
    #[error("the producer's buffers are full; poll until acknowledgements free some")]
    Full,
    /// There is no such partition.
    #[error("partition {partition} does not exist: the topic has {partitions}")]
    Partition {
        /// As asked for.
        partition: u32,
        /// As there are.
        partitions: u32,
    },
    /// Key and value do not fit a datagram.
    #[error("a message of {size} bytes is too large: key and value may have {limit} together")]
    TooLarge {
        /// Its key and value, in bytes.
        size: usize,
        /// The most that fits, in bytes.
        limit: usize,
    },
    /// The partition takes no more messages from this producer.
    #[error("partition {partition} takes no more messages from this producer: {reason}")]
    PartitionFailed {
        /// The partition.
        partition: u32,
        /// Why.
        reason: FailReason,
    },
    /// The server's answer to the greeting has not come yet.
    #[error("not connected yet")]
    NotConnected,
    /// The socket failed.
    #[error("socket: {0}")]
    Io(#[from] io::Error),
}

/// Why there is no producer.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// A setting that cannot work.
    #[error("producer configuration: {0}")]
    Config(&'static str),
    /// A name without an address, or a socket that could not be made.
    #[error("server {server}: {source}")]
    Server {
        /// As configured.
        server: String,
        /// The system's error.
        source: io::Error,
    },
    /// Nobody answered.
    #[error(
        "no answer from {servers} within {seconds:.1} s; is it the datagram protocol's UDP port?"
    )]
    NoAnswer {
        /// All that were tried.
        servers: String,
        /// How long.
        seconds: f64,
    },
    /// The server said no.
    #[error("topic {topic}: {error}")]
    Refused {
        /// The topic asked for.
        topic: String,
        /// The server's answer.
        error: ErrorCode,
    },
    /// The answer makes no sense.
    #[error("the server's greeting is unusable: {0}")]
    Welcome(&'static str),
}

/// Not everything was delivered in time.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// Messages are still under way.
    #[error("{outstanding} messages are not acknowledged yet")]
    Timeout {
        /// How many.
        outstanding: u64,
    },
    /// The socket failed.
    #[error("socket: {0}")]
    Io(#[from] io::Error),
}
