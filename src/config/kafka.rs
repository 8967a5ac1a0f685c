//! `[kafka]`: the listeners of Kafka's protocol and what they allow.

use std::net::SocketAddr;
use std::time::Duration;

use bytesize::ByteSize;
use serde::Deserialize;
use toml::Spanned;

use super::{Checker, ConfigError, MAX_PARTITIONS};

/// Smallest and largest request that is taken. Below 1 MiB clients' default batches do not fit; a request is held
/// in memory as a whole.
const REQUEST_SIZE: std::ops::RangeInclusive<u64> = (1 << 20)..=(128 << 20);
/// Most listening addresses.
const MAX_LISTENERS: usize = 16;
/// Most threads that serve connections.
const MAX_THREADS: u16 = 64;
/// Most connections; the limit of open files bounds them too.
const MAX_CONNECTIONS: u32 = 1_000_000;

/// What clients must prove.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Security {
    /// Nothing: whoever reaches the address may do everything.
    None,
}

/// Where clients are told to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertised {
    /// A name or an address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// `[kafka]`
#[derive(Debug, Clone, PartialEq)]
pub struct Kafka {
    /// Addresses to listen on.
    pub listen: Vec<SocketAddr>,
    /// What metadata names; `None`: the address that the client's connection arrived at.
    pub advertised: Option<Advertised>,
    /// Security of the listeners.
    pub security: Security,
    /// Threads that serve connections.
    pub threads: u16,
    /// Connections in all; further ones are closed at once.
    pub max_connections: u32,
    /// Bytes of the largest request.
    pub max_request: u64,
    /// A connection without a request for so long is closed.
    pub idle_timeout: Duration,
    /// Whether a client that asks for an unknown topic makes it.
    pub auto_create_topics: bool,
    /// Partitions of topics that are made without a number.
    pub default_partitions: u32,
}

impl Kafka {
    /// Whether every listener is reachable from this machine alone.
    pub fn is_local(&self) -> bool {
        self.listen.iter().all(|a| a.ip().is_loopback())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawKafka {
    listen: Option<Spanned<Vec<Spanned<String>>>>,
    advertised: Option<Spanned<String>>,
    security: Option<Security>,
    threads: Option<Spanned<i64>>,
    max_connections: Option<Spanned<i64>>,
    max_request: Option<Spanned<ByteSize>>,
    idle_timeout: Option<Spanned<String>>,
    auto_create_topics: Option<bool>,
    default_partitions: Option<Spanned<i64>>,
}

impl Checker<'_> {
    pub(super) fn kafka(&self, raw: RawKafka) -> Result<Kafka, ConfigError> {
        let mut listen = Vec::new();
        let mut open = None;
        match &raw.listen {
            None => listen.push(SocketAddr::from(([127, 0, 0, 1], 9092))),
            Some(list) => {
                if list.get_ref().is_empty() || list.get_ref().len() > MAX_LISTENERS {
                    return Err(self.error(
                        list,
                        "kafka.listen",
                        format!("1 to {MAX_LISTENERS} addresses are allowed; leave the table out to switch Kafka off"),
                    ));
                }
                for text in list.get_ref() {
                    let address: SocketAddr = text.get_ref().parse().map_err(|_| {
                        self.error(
                            text,
                            "kafka.listen",
                            format!("\"{}\" is no address with port, such as \"127.0.0.1:9092\" or \"[::1]:9092\"", text.get_ref()),
                        )
                    })?;
                    if listen.contains(&address) {
                        return Err(self.error(text, "kafka.listen", "is named twice"));
                    }
                    if !address.ip().is_loopback() {
                        open.get_or_insert_with(|| text.clone());
                    }
                    listen.push(address);
                }
            }
        }
        if let (Some(text), None) = (&open, raw.security) {
            return Err(self.error(
                text,
                "kafka.listen",
                format!(
                    "{} can be reached from other machines, and clients prove nothing: set security = \"none\" if everyone who reaches it may read, write and delete everything",
                    text.get_ref()
                ),
            ));
        }
        let advertised = raw
            .advertised
            .map(|text| {
                advertised(text.get_ref()).ok_or_else(|| {
                    self.error(
                        &text,
                        "kafka.advertised",
                        format!("\"{}\" is no name or address with port, such as \"log1.example.com:9092\"", text.get_ref()),
                    )
                })
            })
            .transpose()?;
        let idle_timeout = match raw.idle_timeout {
            None => Duration::from_secs(600),
            Some(text) => match humantime::parse_duration(text.get_ref()) {
                Ok(time) if (1..=86_400).contains(&time.as_secs()) => time,
                _ => {
                    return Err(self.error(
                        &text,
                        "kafka.idle_timeout",
                        format!(
                            "\"{}\" is not allowed; a duration from \"1s\" to \"1d\" is",
                            text.get_ref()
                        ),
                    ));
                }
            },
        };
        Ok(Kafka {
            listen,
            advertised,
            security: raw.security.unwrap_or(Security::None),
            threads: self.number(raw.threads, "kafka.threads", 1..=MAX_THREADS, 1)?,
            max_connections: self.number(
                raw.max_connections,
                "kafka.max_connections",
                1..=MAX_CONNECTIONS,
                100_000,
            )?,
            max_request: self.size(
                raw.max_request,
                "kafka.max_request",
                REQUEST_SIZE,
                1,
                16 << 20,
            )?,
            idle_timeout,
            auto_create_topics: raw.auto_create_topics.unwrap_or(true),
            default_partitions: self.number(
                raw.default_partitions,
                "kafka.default_partitions",
                1..=MAX_PARTITIONS,
                1,
            )?,
        })
    }
}

/// `host:port`, an IPv6 address in brackets.
fn advertised(text: &str) -> Option<Advertised> {
    let (host, port) = text.rsplit_once(':')?;
    let port = port.parse().ok().filter(|&port| port != 0)?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    // Kafka writes a host as a string of up to 32,767 bytes; a name of the DNS has 253 at most.
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
    if host.is_empty() || host.len() > 253 || !host.chars().all(fine) {
        return None;
    }
    Some(Advertised {
        host: host.to_owned(),
        port,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use std::path::Path;

    fn parse(kafka: &str) -> Result<Kafka, String> {
        let text = format!("[storage]\npath = \"/d\"\n[kafka]\n{kafka}");
        match Config::parse(&text, Path::new("t.toml")) {
            Ok(config) => Ok(config.kafka.unwrap()),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn listens_on_loopback_unless_the_operator_chose() {
        let kafka = parse("").unwrap();
        assert_eq!(kafka.listen, ["127.0.0.1:9092".parse().unwrap()]);
        assert!(kafka.is_local());
        let message = parse("listen = [\"127.0.0.1:1\", \"0.0.0.0:9092\"]").unwrap_err();
        assert!(
            message.contains("line 4: kafka.listen") && message.contains("security"),
            "{message}"
        );
        let kafka = parse("listen = [\"[::]:9092\"]\nsecurity = \"none\"").unwrap();
        assert!(!kafka.is_local());
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        for (text, key) in [
            ("listen = []", "kafka.listen"),
            ("listen = [\"localhost:9092\"]", "kafka.listen"),
            (
                "listen = [\"127.0.0.1:1\", \"127.0.0.1:1\"]",
                "kafka.listen",
            ),
            ("advertised = \"host\"", "kafka.advertised"),
            ("advertised = \"host:0\"", "kafka.advertised"),
            ("advertised = \"::1:9092\"", "kafka.advertised"),
            ("threads = 0", "kafka.threads"),
            ("max_request = \"1KiB\"", "kafka.max_request"),
            ("idle_timeout = \"0s\"", "kafka.idle_timeout"),
            ("default_partitions = 0", "kafka.default_partitions"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(key), "{text}: {message}");
        }
        assert!(parse("security = \"tls\"").is_err());
    }

    #[test]
    fn advertised_takes_names_and_addresses() {
        let of = |text: &str| advertised(text).map(|a| (a.host, a.port));
        assert_eq!(of("a.b-c:1"), Some(("a.b-c".to_owned(), 1)));
        assert_eq!(of("[fd00::1]:9092"), Some(("fd00::1".to_owned(), 9092)));
    }
}
