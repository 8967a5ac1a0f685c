//! `taffrail.toml` → a validated [`Config`].
//!
//! Invariant: a [`Config`] is consistent in itself: every name it refers to exists, every number lies
//! in its range, and no two entries claim the same thing. An error names the key, the line and what
//! is allowed. Nothing here looks at the machine; what a port or a core really offers is checked at
//! start. Every key is described in `taffrail.example.toml`, which a test parses.

pub mod kafka;
pub mod kafka_security;
pub mod memory;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use serde::Deserialize;
use toml::Spanned;

use crate::storage::lsm::codec::{Codec, UnknownCodec};
use crate::storage::lsm::rebatch::DEFAULT_TARGET;
use crate::storage::topic_settings;

/// Most partitions that one topic may have. The index of a partition is 32 bits wide everywhere;
/// this keeps a slip of the keyboard from asking for gigabytes of partition state.
pub const MAX_PARTITIONS: u32 = 100_000;
/// Most shards: a shard is an lcore, and DPDK 22.11 knows 128 of them.
pub const MAX_SHARDS: u16 = 64;
/// Longest topic name, as in Kafka.
pub const MAX_TOPIC_NAME: usize = 249;
/// Highest topic priority; the lowest is 0.
pub const MAX_PRIORITY: u8 = 7;
/// Smallest and largest WAL segment. A segment must hold many of the largest commits; above 4 GiB a
/// recovery of the last segment would take long.
const SEGMENT_SIZE: std::ops::RangeInclusive<u64> = (4 << 20)..=(4 << 30);
/// Smallest and largest staging buffer of a shard. Below 8 slots commits cannot overlap.
const STAGING_SIZE: std::ops::RangeInclusive<u64> = (4 << 20)..=(4 << 30);
/// Smallest and largest group commit: a commit must hold the largest datagram, and gains nothing
/// above 1 MiB.
const COMMIT_SIZE: std::ops::RangeInclusive<u64> = (128 << 10)..=(1 << 20);
/// Smallest and largest merged batch: below 4 KiB compression finds nothing; consumers ask for 1 MiB at
/// a time unless told otherwise.
const BATCH_TARGET: std::ops::RangeInclusive<u64> = (4 << 10)..=(1 << 20);
/// Smallest and largest MTU of a port: IPv6 needs 1,280; above 9,216 no common NIC goes.
const MTU: std::ops::RangeInclusive<u16> = 1280..=9216;
/// Smallest, largest and usual receive buffer of a kernel socket. The usual one rides out some 10 ms of small datagrams at
/// 1 M a second, each of which the kernel counts with about 800 bytes of its own; the largest is what the kernel can count.
const RECEIVE_BUFFER: std::ops::RangeInclusive<u64> = (64 << 10)..=(512 << 20);
/// See [`RECEIVE_BUFFER`].
const DEFAULT_RECEIVE_BUFFER: u64 = 8 << 20;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The configuration file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, a missing key or a value of the wrong type.
    #[error("{path}: {message}")]
    Syntax {
        /// The configuration file.
        path: PathBuf,
        /// The parser's message with line, column and the keys it knows.
        message: String,
    },
    /// A value that is well-formed but not allowed.
    #[error("{path}, line {line}: {key}: {reason}")]
    Value {
        /// The configuration file.
        path: PathBuf,
        /// Line of the value, from 1.
        line: usize,
        /// The key, with its table.
        key: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
}

/// A validated configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Where and how messages are stored.
    pub storage: Storage,
    /// Which cores do what.
    pub lcores: Lcores,
    /// How DPDK's environment is started.
    pub eal: Eal,
    /// The ports, in file order.
    pub ports: Vec<Port>,
    /// The topics, in file order.
    pub topics: Vec<Topic>,
    /// Raw UDP sources, in file order.
    pub udp: Vec<UdpSource>,
    /// The datagram protocol, where it is offered.
    pub datagram: Option<Datagram>,
    /// Kafka's protocol over the kernel's TCP, where it is offered.
    pub kafka: Option<kafka::Kafka>,
    /// How much memory the process may take.
    pub memory: memory::Memory,
    /// Unix socket on which the running server answers `taffrail stats` and `taffrail read`.
    pub control_socket: PathBuf,
}

/// `[storage]`
#[derive(Debug, Clone, PartialEq)]
pub struct Storage {
    /// Folder of the store.
    pub path: PathBuf,
    /// Number of shards, one storage lcore each.
    pub shards: u16,
    /// Bytes of a WAL segment.
    pub segment_size: u64,
    /// Segments kept preallocated and zeroed ahead of the writer.
    pub prepared_segments: u16,
    /// Bytes of a shard's staging buffer.
    pub staging_size: u64,
    /// Folder for the staging files; `None`: the hugetlbfs mount that is found.
    pub staging_dir: Option<PathBuf>,
    /// Bytes of the largest group commit.
    pub commit_size: u64,
    /// Group commits written at the same time.
    pub commits_in_flight: u16,
    /// Longest time a message may wait for others to share its commit, under load.
    pub linger: Duration,
    /// Bytes of uncompressed records to which batches are merged when they leave the WAL.
    pub batch_target: u64,
}

/// Which roles share a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// All roles take turns on one core.
    Shared,
    /// Each rx and each storage lcore has a core of its own.
    Spread,
}

/// What a poll loop does when it finds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Idle {
    /// Poll on, at 100% of the core.
    Poll,
    /// After a bounded spin: pause, then short sleeps.
    Sleep,
}

/// `[lcores]`
#[derive(Debug, Clone, PartialEq)]
pub struct Lcores {
    /// Shared or spread.
    pub layout: Layout,
    /// CPUs of the rx lcores (spread), or the one CPU of all roles (shared); empty: chosen at start.
    pub rx: Vec<u32>,
    /// CPUs of the storage lcores, one a shard (spread only); empty: chosen at start.
    pub storage: Vec<u32>,
    /// Behaviour of an idle loop.
    pub idle: Idle,
}

/// `[eal]`
#[derive(Debug, Clone, PartialEq)]
pub struct Eal {
    /// Prefix of DPDK's run-time files; unique to a process on the machine.
    pub file_prefix: String,
    /// Hugepage memory for mempools and descriptor rings, in bytes; `None`: what the ports need.
    pub memory: Option<u64>,
    /// False: ordinary pages (slow; for test machines).
    pub hugepages: bool,
    /// Further EAL arguments, passed as they are.
    pub extra_args: Vec<String>,
}

/// `[[port]]`
#[derive(Debug, Clone, PartialEq)]
pub struct Port {
    /// Name by which the rest of the file and the statistics speak of the port.
    pub name: String,
    /// The device.
    pub device: Device,
    /// Receive queues; RSS spreads flows over them.
    pub queues: u16,
    /// Descriptors of each receive and each transmit queue.
    pub descriptors: u16,
    /// Largest IP packet, in bytes.
    pub mtu: u16,
    /// VLAN id of the port's addresses, where its frames are tagged.
    pub vlan: Option<u16>,
    /// Addresses with prefix lengths.
    pub addresses: Vec<IpPrefix>,
    /// Multicast groups joined on this port.
    pub multicast: Vec<IpAddr>,
    /// Receive frames for other MAC addresses too.
    pub promiscuous: bool,
    /// Bytes of the receive buffer of each socket of a kernel port.
    pub receive_buffer: u64,
}

impl Port {
    /// Whether its datagrams come by sockets of the kernel, and not by DPDK.
    pub fn is_kernel(&self) -> bool {
        self.device == Device::Kernel
    }
}

/// How a port's device is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// A PCI address, `0000:3b:00.0`.
    Pci(String),
    /// A MAC address.
    Mac([u8; 6]),
    /// A kernel interface.
    Interface(String),
    /// A DPDK `--vdev` string.
    Vdev(String),
    /// Sockets of the kernel's UDP, without DPDK.
    Kernel,
}

/// An address with its prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpPrefix {
    /// The address.
    pub address: IpAddr,
    /// Bits of the network part.
    pub prefix: u8,
}

/// `[[topic]]`
#[derive(Debug, Clone, PartialEq)]
pub struct Topic {
    /// Kafka's rules for topic names hold.
    pub name: String,
    /// Number of partitions.
    pub partitions: u32,
    /// 0 is shed first when a shard is under pressure, 7 last.
    pub priority: u8,
    /// How its batches are compressed when they leave the WAL.
    pub compression: Codec,
    /// Settings by Kafka's names.
    pub settings: BTreeMap<String, String>,
}

/// How a datagram becomes messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// The whole payload is one message.
    Datagram,
    /// Every non-empty line is one message.
    Line,
}

/// How a raw message finds its partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Partitioning {
    /// By a hash of the sender's address and port: a sender's messages keep their order.
    Source,
    /// Burst by burst, round robin.
    Spread,
    /// Always this one.
    Fixed(u32),
}

/// `[[udp]]`
#[derive(Debug, Clone, PartialEq)]
pub struct UdpSource {
    /// Index of the port in [`Config::ports`]; `None`: all of them.
    pub port: Option<usize>,
    /// Destination UDP port.
    pub udp_port: u16,
    /// Destination group; `None`: any address of the port.
    pub group: Option<IpAddr>,
    /// Index of the topic in [`Config::topics`].
    pub topic: usize,
    /// One message a datagram or a line.
    pub split: Split,
    /// The partition's choice.
    pub partition: Partitioning,
}

/// `[datagram]`
#[derive(Debug, Clone, PartialEq)]
pub struct Datagram {
    /// Destination UDP port of the protocol on every port.
    pub udp_port: u16,
    /// Acknowledgement level named to clients that do not choose: 0, 1 or -1 (all).
    pub acks: i8,
}

// ---- the file as written ----

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    storage: RawStorage,
    #[serde(default)]
    lcores: RawLcores,
    #[serde(default)]
    eal: RawEal,
    #[serde(default, rename = "port")]
    ports: Vec<RawPort>,
    #[serde(default, rename = "topic")]
    topics: Vec<RawTopic>,
    #[serde(default)]
    udp: Vec<RawUdp>,
    datagram: Option<RawDatagram>,
    kafka: Option<kafka::RawKafka>,
    #[serde(default)]
    memory: memory::RawMemory,
    #[serde(default)]
    control: RawControl,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStorage {
    path: PathBuf,
    shards: Option<Spanned<i64>>,
    segment_size: Option<Spanned<ByteSize>>,
    prepared_segments: Option<Spanned<i64>>,
    staging_size: Option<Spanned<ByteSize>>,
    staging_dir: Option<PathBuf>,
    commit_size: Option<Spanned<ByteSize>>,
    commits_in_flight: Option<Spanned<i64>>,
    linger: Option<Spanned<String>>,
    batch_target: Option<Spanned<ByteSize>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawLcores {
    layout: Option<Layout>,
    cpu: Option<Spanned<i64>>,
    rx: Option<Spanned<Vec<u32>>>,
    storage: Option<Spanned<Vec<u32>>>,
    idle: Option<Idle>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawEal {
    file_prefix: Option<Spanned<String>>,
    memory: Option<Spanned<ByteSize>>,
    hugepages: Option<bool>,
    extra_args: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPort {
    name: Spanned<String>,
    device: Spanned<String>,
    queues: Option<Spanned<i64>>,
    descriptors: Option<Spanned<i64>>,
    mtu: Option<Spanned<i64>>,
    vlan: Option<Spanned<i64>>,
    #[serde(default)]
    addresses: Vec<Spanned<String>>,
    #[serde(default)]
    multicast: Vec<Spanned<String>>,
    promiscuous: Option<Spanned<bool>>,
    receive_buffer: Option<Spanned<ByteSize>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTopic {
    name: Spanned<String>,
    partitions: Option<Spanned<i64>>,
    priority: Option<Spanned<i64>>,
    compression: Option<Spanned<String>>,
    index: Option<Spanned<String>>,
    #[serde(default)]
    settings: BTreeMap<String, Spanned<toml::Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUdp {
    port: Option<Spanned<String>>,
    udp_port: Spanned<i64>,
    group: Option<Spanned<String>>,
    topic: Spanned<String>,
    split: Option<Split>,
    partition: Option<Spanned<toml::Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDatagram {
    udp_port: Spanned<i64>,
    acks: Option<Spanned<toml::Value>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawControl {
    socket: Option<PathBuf>,
}

/// Where the control socket lies unless the file says otherwise.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/taffrail/control.sock";

impl Config {
    /// Reads and validates the file at `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// The DPDK ports, with their places among all ports.
    pub fn dpdk_ports(&self) -> impl Iterator<Item = (usize, &Port)> {
        let ports = self.ports.iter().enumerate();
        ports.filter(|(_, port)| !port.is_kernel())
    }

    /// The ports of kernel sockets, with their places among all ports.
    pub fn kernel_ports(&self) -> impl Iterator<Item = (usize, &Port)> {
        let ports = self.ports.iter().enumerate();
        ports.filter(|(_, port)| port.is_kernel())
    }

    /// Whether a topic of the configuration keeps a key index.
    pub(crate) fn has_key_index(&self) -> bool {
        let set = |topic: &Topic| topic.settings.contains_key("index");
        self.topics.iter().any(set)
    }

    /// Validates `text`; `path` only names it in errors.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let file: File = toml::from_str(text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        Checker { text, path }.config(file)
    }
}

/// Turns the file as written into a [`Config`], with positions for its errors.
struct Checker<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Checker<'_> {
    fn error<T>(&self, at: &Spanned<T>, key: &str, reason: impl Into<String>) -> ConfigError {
        self.error_at(at.span().start, key, reason)
    }

    fn error_at(&self, position: usize, key: &str, reason: impl Into<String>) -> ConfigError {
        let before = &self.text.as_bytes()[..position.min(self.text.len())];
        ConfigError::Value {
            path: self.path.to_owned(),
            line: 1 + before.iter().filter(|&&b| b == b'\n').count(),
            key: key.to_owned(),
            reason: reason.into(),
        }
    }

    fn number<T>(
        &self,
        value: Option<Spanned<i64>>,
        key: &str,
        range: std::ops::RangeInclusive<T>,
        default: T,
    ) -> Result<T, ConfigError>
    where
        T: TryFrom<i64> + PartialOrd + std::fmt::Display + Copy,
    {
        let Some(value) = value else {
            return Ok(default);
        };
        match T::try_from(*value.get_ref()) {
            Ok(number) if range.contains(&number) => Ok(number),
            _ => Err(self.error(
                &value,
                key,
                format!(
                    "{} is not allowed; from {} to {} is",
                    value.get_ref(),
                    range.start(),
                    range.end()
                ),
            )),
        }
    }

    fn size(
        &self,
        value: Option<Spanned<ByteSize>>,
        key: &str,
        range: std::ops::RangeInclusive<u64>,
        multiple: u64,
        default: u64,
    ) -> Result<u64, ConfigError> {
        let Some(value) = value else {
            return Ok(default);
        };
        let bytes = value.get_ref().as_u64();
        if range.contains(&bytes) && bytes % multiple == 0 {
            return Ok(bytes);
        }
        Err(self.error(
            &value,
            key,
            format!(
                "{} is not allowed; a multiple of {} from {} to {} is",
                value.get_ref().display().iec(),
                ByteSize(multiple).display().iec(),
                ByteSize(*range.start()).display().iec(),
                ByteSize(*range.end()).display().iec()
            ),
        ))
    }

    fn config(&self, file: File) -> Result<Config, ConfigError> {
        let storage = self.storage(file.storage)?;
        let lcores = self.lcores(file.lcores, storage.shards)?;
        let eal = self.eal(file.eal)?;

        let mut ports = Vec::with_capacity(file.ports.len());
        let mut port_index = HashMap::new();
        for raw in file.ports {
            let name = raw.name.clone();
            let port = self.port(raw)?;
            if port_index.insert(port.name.clone(), ports.len()).is_some() {
                return Err(self.error(&name, "port.name", "another port has this name"));
            }
            ports.push(port);
        }

        let mut topics: Vec<Topic> = Vec::with_capacity(file.topics.len());
        let mut topic_index = HashMap::new();
        for raw in file.topics {
            self.topic_name(&raw.name)?;
            let name = raw.name.get_ref().clone();
            if topic_index.insert(name.clone(), topics.len()).is_some() {
                return Err(self.error(&raw.name, "topic.name", "another topic has this name"));
            }
            topics.push(Topic {
                name,
                partitions: self.number(
                    raw.partitions,
                    "topic.partitions",
                    1..=MAX_PARTITIONS,
                    1,
                )?,
                priority: self.number(raw.priority, "topic.priority", 0..=MAX_PRIORITY, 4)?,
                compression: match raw.compression {
                    None => Codec::default(),
                    Some(text) => text.get_ref().parse().map_err(|error: UnknownCodec| {
                        self.error(&text, "topic.compression", error.to_string())
                    })?,
                },
                settings: self.topic_settings(raw.settings, raw.index)?,
            });
        }

        let datagram = file.datagram.map(|raw| self.datagram(raw)).transpose()?;
        let mut udp: Vec<UdpSource> = Vec::with_capacity(file.udp.len());
        for raw in file.udp {
            let position = raw.udp_port.clone();
            let source = self.udp(raw, &ports, &port_index, &topics, &topic_index)?;
            if datagram
                .as_ref()
                .is_some_and(|d| d.udp_port == source.udp_port)
            {
                return Err(self.error(
                    &position,
                    "udp.udp_port",
                    "the datagram protocol has this UDP port; choose another",
                ));
            }
            let clash = udp.iter().any(|other| {
                other.udp_port == source.udp_port
                    && other.group == source.group
                    && (other.port == source.port || other.port.is_none() || source.port.is_none())
            });
            if clash {
                return Err(self.error(
                    &position,
                    "udp.udp_port",
                    "another [[udp]] entry has the same port, UDP port and group",
                ));
            }
            udp.push(source);
        }

        let config = Config {
            storage,
            lcores,
            eal,
            ports,
            topics,
            udp,
            datagram,
            kafka: file.kafka.map(|raw| self.kafka(raw)).transpose()?,
            memory: self.memory(&file.memory)?,
            control_socket: file
                .control
                .socket
                .unwrap_or_else(|| PathBuf::from(DEFAULT_CONTROL_SOCKET)),
        };
        self.memory_fits(&file.memory, &config)?;
        Ok(config)
    }

    fn storage(&self, raw: RawStorage) -> Result<Storage, ConfigError> {
        let staging_position = raw.staging_size.as_ref().map(|s| s.span().start);
        let linger = match raw.linger {
            None => crate::storage::DEFAULT_LINGER,
            Some(text) => match humantime::parse_duration(text.get_ref()) {
                Ok(linger) if linger <= Duration::from_secs(1) => linger,
                _ => {
                    return Err(self.error(
                        &text,
                        "storage.linger",
                        format!(
                            "\"{}\" is not allowed; a duration from \"0us\" to \"1s\" is",
                            text.get_ref()
                        ),
                    ));
                }
            },
        };
        let storage = Storage {
            path: raw.path,
            shards: self.number(raw.shards, "storage.shards", 1..=MAX_SHARDS, 1)?,
            segment_size: self.size(
                raw.segment_size,
                "storage.segment_size",
                SEGMENT_SIZE,
                1 << 20,
                256 << 20,
            )?,
            prepared_segments: self.number(
                raw.prepared_segments,
                "storage.prepared_segments",
                1..=64,
                2,
            )?,
            staging_size: self.size(
                raw.staging_size,
                "storage.staging_size",
                STAGING_SIZE,
                2 << 20,
                32 << 20,
            )?,
            staging_dir: raw.staging_dir,
            commit_size: self.size(
                raw.commit_size,
                "storage.commit_size",
                COMMIT_SIZE,
                4 << 10,
                1 << 20,
            )?,
            commits_in_flight: self.number(
                raw.commits_in_flight,
                "storage.commits_in_flight",
                1..=32,
                4,
            )?,
            linger,
            batch_target: self.size(
                raw.batch_target,
                "storage.batch_target",
                BATCH_TARGET,
                1 << 10,
                DEFAULT_TARGET as u64,
            )?,
        };
        if storage.staging_size / storage.commit_size < 2 * u64::from(storage.commits_in_flight) {
            return Err(self.error_at(
                staging_position.unwrap_or(0),
                "storage.staging_size",
                format!(
                    "must hold at least twice commits_in_flight commits: {} here",
                    ByteSize(2 * u64::from(storage.commits_in_flight) * storage.commit_size)
                        .display()
                        .iec()
                ),
            ));
        }
        Ok(storage)
    }

    fn lcores(&self, raw: RawLcores, shards: u16) -> Result<Lcores, ConfigError> {
        let layout = raw.layout.unwrap_or(Layout::Shared);
        let mut rx = Vec::new();
        if layout == Layout::Shared {
            for (list, key) in [(&raw.rx, "lcores.rx"), (&raw.storage, "lcores.storage")] {
                if let Some(list) = list {
                    return Err(self.error(
                        list,
                        key,
                        "only with layout = \"spread\"; the shared layout has `cpu`",
                    ));
                }
            }
        } else if let Some(cpu) = &raw.cpu {
            return Err(self.error(
                cpu,
                "lcores.cpu",
                "only with layout = \"shared\"; the spread layout has `rx` and `storage`",
            ));
        }
        if let Some(cpu) = raw.cpu {
            rx.push(self.number(Some(cpu), "lcores.cpu", 0..=1023u32, 0)?);
        }
        let mut seen = std::collections::HashSet::new();
        for (list, key) in [(&raw.rx, "lcores.rx"), (&raw.storage, "lcores.storage")] {
            let Some(list) = list else { continue };
            if list.get_ref().is_empty() {
                return Err(self.error(
                    list,
                    key,
                    "needs at least one CPU; leave the key out to let Taffrail choose",
                ));
            }
            for &cpu in list.get_ref() {
                if cpu > 1023 || !seen.insert(cpu) {
                    return Err(self.error(list, key, format!("CPU {cpu} is named twice or above 1023; a core has one role in the spread layout")));
                }
            }
        }
        if let Some(list) = &raw.storage
            && list.get_ref().len() != usize::from(shards)
        {
            return Err(self.error(
                list,
                "lcores.storage",
                format!(
                    "names {} CPUs for {shards} shards; name one a shard",
                    list.get_ref().len()
                ),
            ));
        }
        rx.extend(raw.rx.map(Spanned::into_inner).unwrap_or_default());
        Ok(Lcores {
            layout,
            rx,
            storage: raw.storage.map(Spanned::into_inner).unwrap_or_default(),
            idle: raw.idle.unwrap_or(Idle::Sleep),
        })
    }

    fn eal(&self, raw: RawEal) -> Result<Eal, ConfigError> {
        let file_prefix = match raw.file_prefix {
            None => "taffrail".to_owned(),
            Some(prefix) => {
                let text = prefix.get_ref();
                let fine = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
                if text.is_empty() || text.len() > 64 || !text.chars().all(fine) {
                    return Err(self.error(
                        &prefix,
                        "eal.file_prefix",
                        "1 to 64 letters, digits, '-' and '_' are allowed",
                    ));
                }
                prefix.into_inner()
            }
        };
        let memory = match raw.memory {
            None => None,
            some => Some(self.size(some, "eal.memory", (32 << 20)..=(1 << 40), 2 << 20, 0)?),
        };
        Ok(Eal {
            file_prefix,
            memory,
            hugepages: raw.hugepages.unwrap_or(true),
            extra_args: raw.extra_args.unwrap_or_default(),
        })
    }

    fn port(&self, raw: RawPort) -> Result<Port, ConfigError> {
        let name = raw.name.get_ref().clone();
        let fine = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > 32 || !name.chars().all(fine) {
            return Err(self.error(
                &raw.name,
                "port.name",
                "1 to 32 letters, digits, '-' and '_' are allowed",
            ));
        }
        let device: Device = raw
            .device
            .get_ref()
            .parse()
            .map_err(|reason: String| self.error(&raw.device, "port.device", reason))?;
        let kernel = device == Device::Kernel;
        if kernel {
            self.kernel_port(&raw)?;
        } else if let Some(buffer) = &raw.receive_buffer {
            return Err(self.error(
                buffer,
                "port.receive_buffer",
                "only with device = \"kernel\"; DPDK ports have `descriptors`",
            ));
        }
        let descriptors = raw.descriptors.clone();
        let port = Port {
            name,
            device,
            queues: self.number(raw.queues, "port.queues", 1..=64, 1)?,
            descriptors: self.number(raw.descriptors, "port.descriptors", 64..=16384, 1024)?,
            mtu: self.number(raw.mtu, "port.mtu", MTU, 1500)?,
            vlan: match raw.vlan {
                None => None,
                some => Some(self.number(some, "port.vlan", 1..=4094u16, 1)?),
            },
            addresses: raw
                .addresses
                .iter()
                .map(|text| {
                    let parsed = match kernel {
                        true => kernel_address(text.get_ref()),
                        false => text.get_ref().parse(),
                    };
                    parsed.map_err(|reason| self.error(text, "port.addresses", reason))
                })
                .collect::<Result<_, _>>()?,
            multicast: raw
                .multicast
                .iter()
                .map(|text| match text.get_ref().parse::<IpAddr>() {
                    Ok(group) if group.is_multicast() => Ok(group),
                    _ => Err(self.error(
                        text,
                        "port.multicast",
                        format!(
                            "\"{}\" is no multicast address; 224.0.0.0/4 and ff00::/8 are",
                            text.get_ref()
                        ),
                    )),
                })
                .collect::<Result<_, _>>()?,
            promiscuous: raw.promiscuous.is_some_and(Spanned::into_inner),
            receive_buffer: self.size(
                raw.receive_buffer,
                "port.receive_buffer",
                RECEIVE_BUFFER,
                1,
                DEFAULT_RECEIVE_BUFFER,
            )?,
        };
        if kernel {
            self.kernel_addresses(&port, &raw.addresses)?;
        }
        if let Some(at) = descriptors
            && !port.descriptors.is_power_of_two()
        {
            return Err(self.error(
                &at,
                "port.descriptors",
                "must be a power of two from 64 to 16384",
            ));
        }
        Ok(port)
    }

    /// Refuses what a port of kernel sockets has not.
    fn kernel_port(&self, raw: &RawPort) -> Result<(), ConfigError> {
        let numbers = [
            ("queues", &raw.queues),
            ("descriptors", &raw.descriptors),
            ("vlan", &raw.vlan),
        ];
        let numbers = numbers
            .into_iter()
            .filter_map(|(key, value)| Some((key, value.as_ref()?.span().start)));
        let promiscuous = raw.promiscuous.as_ref().map(|p| p.span().start);
        let found = numbers
            .chain(promiscuous.map(|at| ("promiscuous", at)))
            .next();
        match found {
            Some((key, at)) => Err(self.error_at(
                at,
                &format!("port.{key}"),
                "not with device = \"kernel\": interfaces and their VLANs are the kernel's",
            )),
            None if raw.addresses.is_empty() => Err(self.error(
                &raw.device,
                "port.addresses",
                "a port with device = \"kernel\" needs the addresses at which it listens: \"127.0.0.1\" and \"::1\" for \
                 senders on this machine, \"0.0.0.0\" and \"::\" for all",
            )),
            None => Ok(()),
        }
    }

    /// Refuses addresses that two sockets of a kernel port could not have.
    fn kernel_addresses(&self, port: &Port, raw: &[Spanned<String>]) -> Result<(), ConfigError> {
        for (at, (one, text)) in port.addresses.iter().zip(raw).enumerate() {
            let before = port.addresses[..at].iter().map(|a| a.address);
            let family = before.filter(|other| other.is_ipv4() == one.address.is_ipv4());
            for other in family {
                let reason = if other == one.address {
                    "is named twice"
                } else if other.is_unspecified() || one.address.is_unspecified() {
                    "stands beside an address for all of its family"
                } else {
                    continue;
                };
                let reason = format!("{} {reason}", one.address);
                return Err(self.error(text, "port.addresses", reason));
            }
        }
        Ok(())
    }

    fn topic_settings(
        &self,
        raw: BTreeMap<String, Spanned<toml::Value>>,
        index: Option<Spanned<String>>,
    ) -> Result<BTreeMap<String, String>, ConfigError> {
        let mut settings = BTreeMap::new();
        if let Some(value) = index {
            let name = topic_settings::INDEX;
            topic_settings::check(name, Some(value.get_ref()))
                .map_err(|reason| self.error(&value, "topic.index", reason))?;
            settings.insert(name.to_owned(), value.into_inner());
        }
        for (name, value) in raw {
            let key = format!("topic.settings.\"{name}\"");
            let text = match value.get_ref() {
                toml::Value::String(text) => text.clone(),
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Float(number) => number.to_string(),
                toml::Value::Boolean(flag) => flag.to_string(),
                _ => return Err(self.error(&value, &key, "a text or a number is wanted")),
            };
            topic_settings::check(&name, Some(&text))
                .map_err(|reason| self.error(&value, &key, reason))?;
            if settings.get(&name).is_some_and(|said| *said != text) {
                return Err(self.error(&value, &key, "topic.index says something else"));
            }
            settings.insert(name, text);
        }
        Ok(settings)
    }

    fn topic_name(&self, name: &Spanned<String>) -> Result<(), ConfigError> {
        let text = name.get_ref();
        let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if text.is_empty()
            || text.len() > MAX_TOPIC_NAME
            || !text.chars().all(fine)
            || text == "."
            || text == ".."
        {
            return Err(self.error(
                name,
                "topic.name",
                format!("1 to {MAX_TOPIC_NAME} letters, digits, '.', '_' and '-' are allowed, and not \".\" or \"..\""),
            ));
        }
        if text.starts_with("__") {
            return Err(self.error(
                name,
                "topic.name",
                "names that begin with \"__\" are Taffrail's own",
            ));
        }
        Ok(())
    }

    fn udp_port(&self, value: &Spanned<i64>, key: &str) -> Result<u16, ConfigError> {
        self.number(Some(value.clone()), key, 1..=u16::MAX, 1)
    }

    fn datagram(&self, raw: RawDatagram) -> Result<Datagram, ConfigError> {
        let acks = match raw.acks {
            None => -1,
            Some(value) => match value.get_ref() {
                toml::Value::Integer(level @ -1..=1) => *level as i8,
                toml::Value::String(text) if text == "all" => -1,
                _ => {
                    return Err(self.error(
                        &value,
                        "datagram.acks",
                        "0, 1 and \"all\" are allowed",
                    ));
                }
            },
        };
        Ok(Datagram {
            udp_port: self.udp_port(&raw.udp_port, "datagram.udp_port")?,
            acks,
        })
    }

    fn udp(
        &self,
        raw: RawUdp,
        ports: &[Port],
        port_index: &HashMap<String, usize>,
        topics: &[Topic],
        topic_index: &HashMap<String, usize>,
    ) -> Result<UdpSource, ConfigError> {
        let known = |names: Vec<&str>| {
            if names.is_empty() {
                "there is none".to_owned()
            } else {
                format!("there are: {}", names.join(", "))
            }
        };
        let port = match &raw.port {
            None => None,
            Some(name) => Some(*port_index.get(name.get_ref()).ok_or_else(|| {
                let names = known(ports.iter().map(|p| p.name.as_str()).collect());
                self.error(
                    name,
                    "udp.port",
                    format!("no [[port]] is named \"{}\"; {names}", name.get_ref()),
                )
            })?),
        };
        let topic = *topic_index.get(raw.topic.get_ref()).ok_or_else(|| {
            let names = known(topics.iter().map(|t| t.name.as_str()).collect());
            self.error(
                &raw.topic,
                "udp.topic",
                format!("no [[topic]] is named \"{}\"; {names}", raw.topic.get_ref()),
            )
        })?;
        let partitions = topics[topic].partitions;
        let partition = match &raw.partition {
            None => Partitioning::Source,
            Some(value) => match value.get_ref() {
                toml::Value::String(text) if text == "source" => Partitioning::Source,
                toml::Value::String(text) if text == "spread" => Partitioning::Spread,
                toml::Value::Integer(p) if (0..i64::from(partitions)).contains(p) => {
                    Partitioning::Fixed(*p as u32)
                }
                _ => {
                    return Err(self.error(
                        value,
                        "udp.partition",
                        format!(
                            "\"source\", \"spread\" and a number from 0 to {} are allowed",
                            partitions - 1
                        ),
                    ));
                }
            },
        };
        let group = match &raw.group {
            None => None,
            Some(text) => {
                let group = text
                    .get_ref()
                    .parse::<IpAddr>()
                    .ok()
                    .filter(IpAddr::is_multicast)
                    .ok_or_else(|| {
                        self.error(
                            text,
                            "udp.group",
                            format!("\"{}\" is no multicast address", text.get_ref()),
                        )
                    })?;
                let joined = |p: &Port| p.multicast.contains(&group);
                if !port.map_or_else(|| ports.iter().any(joined), |p| joined(&ports[p])) {
                    return Err(self.error(
                        text,
                        "udp.group",
                        format!(
                            "no port of this entry joins {group}: add it to the port's `multicast`"
                        ),
                    ));
                }
                Some(group)
            }
        };
        Ok(UdpSource {
            port,
            udp_port: self.udp_port(&raw.udp_port, "udp.udp_port")?,
            group,
            topic,
            split: raw.split.unwrap_or(Split::Datagram),
            partition,
        })
    }
}

impl FromStr for IpPrefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "\"{text}\" is no address with prefix length, such as \"10.0.0.2/24\" or \"fd00::2/64\""
            )
        };
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        if prefix > most || address.is_unspecified() || address.is_multicast() {
            return Err(wrong());
        }
        Ok(Self { address, prefix })
    }
}

/// An address at which kernel sockets listen: one of this machine's, or for all of them the unspecified one.
fn kernel_address(text: &str) -> Result<IpPrefix, String> {
    let address: Option<IpAddr> = text.parse().ok();
    let address = address.filter(|address| !address.is_multicast());
    let address = address.ok_or_else(|| {
        format!(
            "\"{text}\" is no address to listen at, such as \"127.0.0.1\", or \"0.0.0.0\" and \"::\" for all; prefixes \
             are the kernel's, groups go into `multicast`"
        )
    })?;
    let prefix = if address.is_ipv4() { 32 } else { 128 };
    Ok(IpPrefix { address, prefix })
}

impl FromStr for Device {
    type Err = String;

    /// Accepts a PCI address (with or without its domain), a MAC address, an interface name, a
    /// `--vdev` string or "kernel"; which of them is told by the form.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "kernel" {
            return Ok(Self::Kernel);
        }
        if let Some(pci) = pci_address(text) {
            return Ok(Self::Pci(pci));
        }
        if let Some(mac) = mac_address(text) {
            return Ok(Self::Mac(mac));
        }
        if ["net_", "eth_", "crypto_"]
            .iter()
            .any(|prefix| text.starts_with(prefix))
        {
            return Ok(Self::Vdev(text.to_owned()));
        }
        // The kernel's rule for interface names (dev_valid_name), 15 bytes at most.
        let fine = |c: char| !c.is_whitespace() && c != '/' && c != ':' && c != ',';
        if !text.is_empty() && text.len() < 16 && text.chars().all(fine) {
            return Ok(Self::Interface(text.to_owned()));
        }
        Err(format!(
            "\"{text}\" is no PCI address (0000:3b:00.0), MAC address, interface name, vdev string (net_af_packet0,iface=veth0) or \"kernel\""
        ))
    }
}

fn pci_address(text: &str) -> Option<String> {
    let full = match text.matches(':').count() {
        1 => format!("0000:{text}"),
        2 => text.to_owned(),
        _ => return None,
    };
    let (rest, function) = full.rsplit_once('.')?;
    let mut parts = rest.split(':');
    let hex = |part: Option<&str>, width: usize| {
        part.is_some_and(|p| p.len() == width && p.chars().all(|c| c.is_ascii_hexdigit()))
    };
    let fine = hex(parts.next(), 4) && hex(parts.next(), 2) && hex(parts.next(), 2);
    (fine && function.len() == 1 && ("0"..="7").contains(&function))
        .then(|| full.to_ascii_lowercase())
}

fn mac_address(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../taffrail.example.toml");
    const BASE: &str = "[storage]\npath = \"/d\"\n[[port]]\nname = \"p0\"\ndevice = \"net_null0\"\n[[topic]]\nname = \"t\"\npartitions = 2\n";

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("t.toml"))
    }

    fn refused(text: &str) -> String {
        parse(text).expect_err("should be refused").to_string()
    }

    /// The example with every commented-out default switched on.
    fn example_with_defaults() -> String {
        EXAMPLE
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) => rest,
                _ => line,
            })
            .filter(|line| !line.starts_with("rx =") && !line.starts_with("storage ="))
            .collect::<Vec<_>>()
            .join("\n")
    }

    #[test]
    fn example_is_valid_and_its_defaults_are_true() {
        let written = parse(EXAMPLE).unwrap();
        let mut explicit = parse(&example_with_defaults()).unwrap();
        // These name an example value, since their defaults are "chosen at start" or "none".
        explicit.lcores.rx.clear();
        explicit.storage.staging_dir = None;
        explicit.eal.memory = None;
        explicit.ports[0].vlan = None;
        explicit.kafka.as_mut().unwrap().listeners[0].advertised = None;
        explicit.topics[0].settings.clear();
        explicit.memory = memory::Memory::default();
        // `port = "p0"` limits the entry to that port, the default is all.
        explicit.udp[0].port = None;
        assert_eq!(written, explicit);
    }

    /// What the example shows of Kafka's security, which no default could be.
    #[test]
    fn examples_within_comments_are_valid() {
        let shown = EXAMPLE.lines().filter_map(|line| line.strip_prefix("#   "));
        let shown: String = shown.map(|line| format!("{line}\n")).collect();
        let text = format!("[storage]\npath = \"/d\"\n[kafka]\nsecurity = \"tls\"\n{shown}");
        let kafka = parse(&text).unwrap().kafka.unwrap();
        assert_eq!(kafka.listeners.len(), 1);
        assert!(kafka.listeners[0].security.sasl() && kafka.listeners[0].tls.is_some());
        assert_eq!((kafka.users.len(), kafka.super_users.len()), (1, 1));
        assert_eq!((kafka.acls.len(), kafka.quotas.len()), (2, 1));
    }

    #[test]
    fn unknown_key_names_line_and_alternatives() {
        let message = refused("[storage]\npath = \"/d\"\nsegment_sise = \"64MiB\"\n");
        assert!(message.contains("line 3"), "{message}");
        assert!(
            message.contains("segment_sise") && message.contains("segment_size"),
            "{message}"
        );
    }

    #[test]
    fn wrong_values_name_key_line_and_what_is_allowed() {
        for (addition, line, key, allowed) in [
            (
                "[datagram]\nudp_port = 70000\n",
                10,
                "datagram.udp_port",
                "65535",
            ),
            (
                "[datagram]\nudp_port = 1\nacks = 2\n",
                11,
                "datagram.acks",
                "\"all\"",
            ),
            (
                "[[udp]]\nudp_port = 1\ntopic = \"x\"\n",
                11,
                "udp.topic",
                "there are: t",
            ),
            (
                "[[udp]]\nudp_port = 1\ntopic = \"t\"\npartition = 2\n",
                12,
                "udp.partition",
                "from 0 to 1",
            ),
            (
                "[[udp]]\nudp_port = 1\ntopic = \"t\"\ngroup = \"10.0.0.1\"\n",
                12,
                "udp.group",
                "multicast",
            ),
            (
                "[[udp]]\nudp_port = 1\ntopic = \"t\"\ngroup = \"224.0.0.9\"\n",
                12,
                "udp.group",
                "multicast",
            ),
            (
                "[[udp]]\nport = \"p1\"\nudp_port = 1\ntopic = \"t\"\n",
                10,
                "udp.port",
                "there are: p0",
            ),
            ("[[topic]]\nname = \"a/b\"\n", 10, "topic.name", "letters"),
            (
                "[[topic]]\nname = \"t\"\n",
                10,
                "topic.name",
                "another topic",
            ),
            (
                "[[topic]]\nname = \"u\"\nsettings = { \"retention.ms\" = \"soon\" }\n",
                11,
                "topic.settings.\"retention.ms\"",
                "-1 to",
            ),
            (
                "[[topic]]\nname = \"u\"\nsettings = { \"retention.hours\" = 3 }\n",
                11,
                "retention.hours",
                "retention.ms",
            ),
            (
                "[[topic]]\nname = \"u\"\ncompression = \"zstd:20\"\n",
                11,
                "topic.compression",
                "from -7 to 19",
            ),
            (
                "[[topic]]\nname = \"u\"\nindex = \"value\"\n",
                11,
                "topic.index",
                "none, key",
            ),
            (
                "[[topic]]\nname = \"u\"\nindex = \"key\"\nsettings = { \"taffrail.index\" = \"none\" }\n",
                12,
                "taffrail.index",
                "topic.index says something else",
            ),
            (
                "[[topic]]\nname = \"u\"\ncompression = \"gzip\"\n",
                11,
                "topic.compression",
                "\"lz4\"",
            ),
            (
                "[[port]]\nname = \"p0\"\ndevice = \"e\"\n",
                10,
                "port.name",
                "another port",
            ),
            (
                "[[port]]\nname = \"p1\"\ndevice = \"a:b\"\n",
                11,
                "port.device",
                "PCI address",
            ),
            (
                "[[port]]\nname = \"p1\"\ndevice = \"e\"\naddresses = [\"10.0.0.1\"]\n",
                12,
                "port.addresses",
                "prefix",
            ),
            (
                "[[port]]\nname = \"p1\"\ndevice = \"e\"\ndescriptors = 1000\n",
                12,
                "port.descriptors",
                "power of two",
            ),
            (
                "[lcores]\nlayout = \"spread\"\ncpu = 1\n",
                11,
                "lcores.cpu",
                "shared",
            ),
            (
                "[lcores]\nlayout = \"spread\"\nrx = [1]\nstorage = [1]\n",
                12,
                "lcores.storage",
                "named twice",
            ),
            (
                "[lcores]\nlayout = \"spread\"\nstorage = [1, 2]\n",
                11,
                "lcores.storage",
                "1 shards",
            ),
            (
                "[eal]\nfile_prefix = \"a b\"\n",
                10,
                "eal.file_prefix",
                "letters",
            ),
        ] {
            let message = refused(&format!("{BASE}{addition}"));
            assert!(
                message.contains(&format!("line {line}:")),
                "{addition}: {message}"
            );
            assert!(
                message.contains(key) && message.contains(allowed),
                "{addition}: {message}"
            );
        }
        let message = refused("[storage]\npath = \"/d\"\nsegment_size = \"3KiB\"\n");
        assert!(
            message.contains("line 3: storage.segment_size") && message.contains("4.0 MiB"),
            "{message}"
        );
        let message = refused("[storage]\npath = \"/d\"\nbatch_target = \"2MiB\"\n");
        assert!(
            message.contains("line 3: storage.batch_target") && message.contains("1.0 MiB"),
            "{message}"
        );
        let message = refused("[storage]\npath = \"/d\"\nlinger = \"2s\"\n");
        assert!(message.contains("line 3: storage.linger"), "{message}");
        let message = refused("[storage]\npath = \"/d\"\nstaging_size = \"4MiB\"\n");
        assert!(
            message.contains("line 3: storage.staging_size"),
            "{message}"
        );
    }

    #[test]
    fn a_kernel_port_has_addresses_and_nothing_of_a_nic() {
        let port =
            |keys: &str| format!("{BASE}[[port]]\nname = \"k0\"\ndevice = \"kernel\"\n{keys}");
        let usual =
            "addresses = [\"0.0.0.0\", \"::1\", \"fe80::1\"]\nmulticast = [\"239.1.1.1\"]\n";
        let text = format!(
            "{}receive_buffer = \"1MiB\"\n[[udp]]\nport = \"k0\"\nudp_port = 9\ntopic = \"t\"\n",
            port(usual)
        );
        let config = parse(&text).unwrap();
        let addresses: Vec<String> = (config.ports[1].addresses.iter())
            .map(|a| format!("{}/{}", a.address, a.prefix))
            .collect();
        assert_eq!(addresses, ["0.0.0.0/32", "::1/128", "fe80::1/128"]);
        assert_eq!(config.ports[1].receive_buffer, 1 << 20);
        assert_eq!(config.udp[0].port, Some(1));
        let places = |ports: &mut dyn Iterator<Item = (usize, &Port)>| -> Vec<usize> {
            ports.map(|(place, _)| place).collect()
        };
        assert_eq!(places(&mut config.dpdk_ports()), [0]);
        assert_eq!(places(&mut config.kernel_ports()), [1]);
        for (keys, line, key, reason) in [
            ("", 11, "port.addresses", "\"127.0.0.1\""),
            (
                "addresses = []\n",
                11,
                "port.addresses",
                "needs the addresses",
            ),
            (
                "addresses = [\"10.0.0.1/24\"]\n",
                12,
                "port.addresses",
                "prefixes",
            ),
            (
                "addresses = [\"239.1.1.1\"]\n",
                12,
                "port.addresses",
                "`multicast`",
            ),
            (
                "addresses = [\"::1\", \"::1\"]\n",
                12,
                "port.addresses",
                "twice",
            ),
            (
                "addresses = [\"::1\",\n\"::\"]\n",
                13,
                "port.addresses",
                "all of its family",
            ),
            (
                "addresses = [\"::1\"]\nqueues = 1\n",
                13,
                "port.queues",
                "kernel",
            ),
            (
                "addresses = [\"::1\"]\nvlan = 7\n",
                13,
                "port.vlan",
                "kernel",
            ),
            (
                "addresses = [\"::1\"]\npromiscuous = false\n",
                13,
                "port.promiscuous",
                "kernel",
            ),
            (
                "addresses = [\"::1\"]\nreceive_buffer = \"1GiB\"\n",
                13,
                "port.receive_buffer",
                "512",
            ),
        ] {
            let message = refused(&port(keys));
            assert!(
                message.contains(&format!("line {line}: {key}")),
                "{keys}: {message}"
            );
            assert!(message.contains(reason), "{keys}: {message}");
        }
        let nic = "[[port]]\nname = \"p1\"\ndevice = \"e\"\nreceive_buffer = \"1MiB\"\n";
        assert!(refused(&format!("{BASE}{nic}")).contains("`descriptors`"));
    }

    #[test]
    fn clashing_sources_are_refused() {
        let twice = "[[udp]]\nudp_port = 1\ntopic = \"t\"\n[[udp]]\nport = \"p0\"\nudp_port = 1\ntopic = \"t\"\n";
        assert!(refused(&format!("{BASE}{twice}")).contains("same port"));
        let datagram = "[datagram]\nudp_port = 1\n[[udp]]\nudp_port = 1\ntopic = \"t\"\n";
        assert!(refused(&format!("{BASE}{datagram}")).contains("datagram protocol"));
    }

    #[test]
    fn devices_are_told_by_their_form() {
        let device = |text: &str| text.parse::<Device>();
        assert_eq!(device("3B:00.0"), Ok(Device::Pci("0000:3b:00.0".into())));
        assert_eq!(
            device("0000:3b:00.1"),
            Ok(Device::Pci("0000:3b:00.1".into()))
        );
        assert_eq!(
            device("52:54:00:77:00:02"),
            Ok(Device::Mac([0x52, 0x54, 0, 0x77, 0, 2]))
        );
        assert_eq!(device("enp3s0f0"), Ok(Device::Interface("enp3s0f0".into())));
        assert_eq!(device("net_null0"), Ok(Device::Vdev("net_null0".into())));
        assert_eq!(device("kernel"), Ok(Device::Kernel));
        for wrong in [
            "",
            "0000:3b:00.9",
            "a name",
            "52:54:00:77:00",
            "averyveryverylongname",
        ] {
            assert!(device(wrong).is_err(), "{wrong}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_refused_or_taken_without_panic(text in ".{0,200}") {
            let _ = parse(&text);
            let _ = parse(&format!("{BASE}{text}"));
        }
    }
}
