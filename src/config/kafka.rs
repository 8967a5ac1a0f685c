//! `[kafka]`: the listeners of Kafka's protocol and what they allow.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use serde::Deserialize;
use toml::Spanned;

use super::kafka_security::{RawAcl, RawQuota, RawUser, User};
use super::{Checker, ConfigError, MAX_PARTITIONS};
use crate::broker::security::acl::Rule;
use crate::broker::security::quota::Quota;

/// Smallest and largest request that is taken. Below 1 MiB clients' default batches do not fit; a request is held
/// in memory as a whole.
const REQUEST_SIZE: RangeInclusive<u64> = (1 << 20)..=(128 << 20);
/// Most listening addresses.
const MAX_LISTENERS: usize = 16;
/// Most threads that serve connections.
pub(super) const MAX_THREADS: u16 = 64;
/// Most connections; the limit of open files bounds them too.
const MAX_CONNECTIONS: u32 = 1_000_000;

/// How long a connection may be idle.
const IDLE_TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(86_400);
/// How long the answer to a failed login may wait: a connection has 30 seconds to prove who it is.
const AUTHENTICATION_DELAY: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(10);

/// How long an empty group may wait for members, at most: a first member is not answered meanwhile.
const REBALANCE_DELAY: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(600);
/// Session time-outs of groups' members: a beat takes a round trip, and who is silent for a day is gone.
const SESSION_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(86_400);

/// Where is listened if nothing is said.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:9092";
/// `threads`
pub const DEFAULT_THREADS: u16 = 1;
/// `max_connections`
pub const DEFAULT_CONNECTIONS: u32 = 100_000;
/// `max_request`
pub const DEFAULT_REQUEST: u64 = 16 << 20;
/// `idle_timeout`
pub const DEFAULT_IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// `failed_authentication_delay`, as in Kafka.
pub const DEFAULT_AUTHENTICATION_DELAY: Duration = Duration::from_millis(100);
/// `auto_create_topics`, as in Kafka.
pub const DEFAULT_AUTO_CREATE: bool = true;
/// `default_partitions`, as in Kafka.
pub const DEFAULT_PARTITIONS: u32 = 1;
/// `group_initial_rebalance_delay`, as in Kafka.
pub const DEFAULT_REBALANCE_DELAY: Duration = Duration::from_secs(3);
/// `group_min_session_timeout`, as in Kafka.
pub const DEFAULT_MIN_SESSION: Duration = Duration::from_secs(6);
/// `group_max_session_timeout`, as in Kafka.
pub const DEFAULT_MAX_SESSION: Duration = Duration::from_secs(1800);

/// How a listener is protected; Kafka's names in parentheses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Security {
    /// Not at all (PLAINTEXT).
    None,
    /// Encrypted; clients prove who they are by certificates where `client_ca` is given (SSL).
    Tls,
    /// Clients prove who they are, what follows can be read and changed on its way (SASL_PLAINTEXT).
    Sasl,
    /// Encrypted, and clients prove who they are (SASL_SSL).
    SaslTls,
}

impl Security {
    /// Whether connections are encrypted.
    pub fn tls(self) -> bool {
        matches!(self, Security::Tls | Security::SaslTls)
    }

    /// Whether clients authenticate by SASL.
    pub fn sasl(self) -> bool {
        matches!(self, Security::Sasl | Security::SaslTls)
    }
}

/// How the threads are told of their sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// What was found to be better.
    #[default]
    Auto,
    /// io_uring, where the kernel has it.
    IoUring,
    /// epoll.
    Epoll,
}

/// The files of TLS, in PEM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The server's certificate, and those between it and its authority.
    pub cert: PathBuf,
    /// The key of the certificate.
    pub key: PathBuf,
    /// Authorities of clients' certificates; then clients need one.
    pub client_ca: Option<PathBuf>,
}

/// Where clients are told to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertised {
    /// A name or an address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// An address that is listened on.
#[derive(Debug, Clone, PartialEq)]
pub struct Listener {
    /// It.
    pub address: SocketAddr,
    /// What metadata names; `None`: the address that the client's connection arrived at.
    pub advertised: Option<Advertised>,
    /// Its protection.
    pub security: Security,
    /// Where it has TLS.
    pub tls: Option<Tls>,
}

impl Listener {
    /// Whether it is reachable from this machine alone.
    pub fn is_local(&self) -> bool {
        self.address.ip().is_loopback()
    }

    /// Whether clients prove who they are.
    pub fn proves(&self) -> bool {
        let certificates = self.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        self.security.sasl() || certificates
    }
}

/// `[kafka]`
#[derive(Debug, Clone, PartialEq)]
pub struct Kafka {
    /// Addresses to listen on.
    pub listeners: Vec<Listener>,
    /// Who can log in.
    pub users: Vec<User>,
    /// Who may do everything.
    pub super_users: Vec<String>,
    /// Access rules; without any, and without super users, everyone may do everything.
    pub acls: Vec<Rule>,
    /// Bytes a second, and time.
    pub quotas: Vec<Quota>,
    /// Threads that serve connections.
    pub threads: u16,
    /// How they are told of their sockets.
    pub transport: Transport,
    /// Connections in all; further ones are closed at once.
    pub max_connections: u32,
    /// Bytes of the largest request.
    pub max_request: u64,
    /// A connection without a request for so long is closed.
    pub idle_timeout: Duration,
    /// How long the answer to a login that failed is held back, and its connection with it.
    pub failed_authentication_delay: Duration,
    /// Whether a client that asks for an unknown topic makes it.
    pub auto_create_topics: bool,
    /// Partitions of topics that are made without a number.
    pub default_partitions: u32,
    /// How long an empty group waits for more members before its first rebalance.
    pub group_initial_rebalance_delay: Duration,
    /// Shortest session time-out that a member of a group may ask for.
    pub group_min_session_timeout: Duration,
    /// Longest one.
    pub group_max_session_timeout: Duration,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawKafka {
    listen: Option<Spanned<Vec<Spanned<String>>>>,
    advertised: Option<Spanned<String>>,
    security: Option<Spanned<Security>>,
    tls: Option<Spanned<Tls>>,
    #[serde(default, rename = "listener")]
    listeners: Vec<RawListener>,
    #[serde(default, rename = "user")]
    users: Vec<Spanned<RawUser>>,
    super_users: Option<Vec<Spanned<String>>>,
    #[serde(default, rename = "acl")]
    acls: Vec<Spanned<RawAcl>>,
    #[serde(default, rename = "quota")]
    quotas: Vec<Spanned<RawQuota>>,
    threads: Option<Spanned<i64>>,
    transport: Option<Transport>,
    max_connections: Option<Spanned<i64>>,
    max_request: Option<Spanned<ByteSize>>,
    idle_timeout: Option<Spanned<String>>,
    failed_authentication_delay: Option<Spanned<String>>,
    auto_create_topics: Option<bool>,
    default_partitions: Option<Spanned<i64>>,
    group_initial_rebalance_delay: Option<Spanned<String>>,
    group_min_session_timeout: Option<Spanned<String>>,
    group_max_session_timeout: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawListener {
    listen: Spanned<String>,
    advertised: Option<Spanned<String>>,
    security: Option<Spanned<Security>>,
    tls: Option<Spanned<Tls>>,
}

impl Checker<'_> {
    pub(super) fn kafka(&self, raw: RawKafka) -> Result<Kafka, ConfigError> {
        let users = self.kafka_users(&raw.users)?;
        let listeners = self.kafka_listeners(&raw, !users.is_empty())?;
        if let Some(user) = raw.users.first()
            && !listeners.iter().any(|l| l.security.sasl())
        {
            return Err(self.error(
                user,
                "kafka.user",
                "no listener asks clients who they are: set its security = \"sasl_tls\" (or \"sasl\")",
            ));
        }
        let acls = self.kafka_acls(&raw.acls)?;
        let quotas = self.kafka_quotas(&raw.quotas)?;
        let super_users = raw.super_users.unwrap_or_default();
        let idle_timeout = self.kafka_duration(
            raw.idle_timeout,
            "kafka.idle_timeout",
            IDLE_TIMEOUT,
            DEFAULT_IDLE_TIMEOUT,
        )?;
        let failed_authentication_delay = self.kafka_duration(
            raw.failed_authentication_delay,
            "kafka.failed_authentication_delay",
            AUTHENTICATION_DELAY,
            DEFAULT_AUTHENTICATION_DELAY,
        )?;
        let group_initial_rebalance_delay = self.kafka_duration(
            raw.group_initial_rebalance_delay,
            "kafka.group_initial_rebalance_delay",
            REBALANCE_DELAY,
            DEFAULT_REBALANCE_DELAY,
        )?;
        let (shortest, longest) = (
            raw.group_min_session_timeout.clone(),
            raw.group_max_session_timeout.clone(),
        );
        let group_min_session_timeout = self.kafka_duration(
            raw.group_min_session_timeout,
            "kafka.group_min_session_timeout",
            SESSION_TIMEOUT,
            DEFAULT_MIN_SESSION,
        )?;
        let group_max_session_timeout = self.kafka_duration(
            raw.group_max_session_timeout,
            "kafka.group_max_session_timeout",
            SESSION_TIMEOUT,
            DEFAULT_MAX_SESSION,
        )?;
        if group_min_session_timeout > group_max_session_timeout
            && let Some(text) = shortest.or(longest)
        {
            return Err(self.error(
                &text,
                "kafka.group_min_session_timeout",
                format!(
                    "\"{}\" is more than group_max_session_timeout, \"{}\"",
                    humantime::format_duration(group_min_session_timeout),
                    humantime::format_duration(group_max_session_timeout)
                ),
            ));
        }
        Ok(Kafka {
            listeners,
            users,
            super_users: super_users.into_iter().map(Spanned::into_inner).collect(),
            acls,
            quotas,
            threads: self.number(
                raw.threads,
                "kafka.threads",
                1..=MAX_THREADS,
                DEFAULT_THREADS,
            )?,
            transport: raw.transport.unwrap_or_default(),
            max_connections: self.number(
                raw.max_connections,
                "kafka.max_connections",
                1..=MAX_CONNECTIONS,
                DEFAULT_CONNECTIONS,
            )?,
            max_request: self.size(
                raw.max_request,
                "kafka.max_request",
                REQUEST_SIZE,
                1,
                DEFAULT_REQUEST,
            )?,
            idle_timeout,
            failed_authentication_delay,
            auto_create_topics: raw.auto_create_topics.unwrap_or(DEFAULT_AUTO_CREATE),
            default_partitions: self.number(
                raw.default_partitions,
                "kafka.default_partitions",
                1..=MAX_PARTITIONS,
                DEFAULT_PARTITIONS,
            )?,
            group_initial_rebalance_delay,
            group_min_session_timeout,
            group_max_session_timeout,
        })
    }

    fn kafka_duration(
        &self,
        text: Option<Spanned<String>>,
        key: &str,
        allowed: RangeInclusive<Duration>,
        default: Duration,
    ) -> Result<Duration, ConfigError> {
        let Some(text) = text else {
            return Ok(default);
        };
        match humantime::parse_duration(text.get_ref()) {
            Ok(time) if allowed.contains(&time) => Ok(time),
            _ => {
                let reason = format!(
                    "\"{}\" is not allowed; a duration from \"{}\" to \"{}\" is",
                    text.get_ref(),
                    humantime::format_duration(*allowed.start()),
                    humantime::format_duration(*allowed.end()),
                );
                Err(self.error(&text, key, reason))
            }
        }
    }

    /// The addresses of `listen`, which share one protection, and those of `[[kafka.listener]]`.
    fn kafka_listeners(&self, raw: &RawKafka, users: bool) -> Result<Vec<Listener>, ConfigError> {
        let mut listeners = Vec::new();
        let mut add = |text: &Spanned<String>,
                       key: &str,
                       advertised: Option<&Spanned<String>>,
                       security: Option<&Spanned<Security>>,
                       tls: Option<&Spanned<Tls>>|
         -> Result<(), ConfigError> {
            let listener = self.kafka_listener(text, key, advertised, security, tls, users)?;
            if listeners
                .iter()
                .any(|other: &Listener| other.address == listener.address)
            {
                return Err(self.error(text, key, "is named twice"));
            }
            if listeners.len() == MAX_LISTENERS {
                let reason = format!("at most {MAX_LISTENERS} addresses are listened on");
                return Err(self.error(text, key, reason));
            }
            listeners.push(listener);
            Ok(())
        };
        let default = Spanned::new(0..0, DEFAULT_LISTEN.to_owned());
        let list: Vec<&Spanned<String>> = match &raw.listen {
            None if raw.listeners.is_empty() => vec![&default],
            None => Vec::new(),
            Some(list) if list.get_ref().is_empty() => {
                return Err(self.error(
                    list,
                    "kafka.listen",
                    format!("1 to {MAX_LISTENERS} addresses are allowed; leave the table out to switch Kafka off"),
                ));
            }
            Some(list) => list.get_ref().iter().collect(),
        };
        for text in list {
            let (advertised, security) = (raw.advertised.as_ref(), raw.security.as_ref());
            add(text, "kafka.listen", advertised, security, raw.tls.as_ref())?;
        }
        for listener in &raw.listeners {
            add(
                &listener.listen,
                "kafka.listener.listen",
                listener.advertised.as_ref(),
                listener.security.as_ref().or(raw.security.as_ref()),
                listener.tls.as_ref().or(raw.tls.as_ref()),
            )?;
        }
        let given = raw.listeners.iter().map(|l| &l.tls).chain([&raw.tls]);
        for tls in given.flatten() {
            if !listeners
                .iter()
                .any(|l| l.tls.as_ref() == Some(tls.get_ref()))
            {
                return Err(self.error(
                    tls,
                    "kafka.tls",
                    "no listener has TLS: set its security = \"sasl_tls\" (or \"tls\")",
                ));
            }
        }
        Ok(listeners)
    }

    fn kafka_listener(
        &self,
        text: &Spanned<String>,
        key: &str,
        advertised_text: Option<&Spanned<String>>,
        security: Option<&Spanned<Security>>,
        tls: Option<&Spanned<Tls>>,
        users: bool,
    ) -> Result<Listener, ConfigError> {
        let address: SocketAddr = text.get_ref().parse().map_err(|_| {
            self.error(
                text,
                key,
                format!(
                    "\"{}\" is no address with port, such as \"127.0.0.1:9092\" or \"[::1]:9092\"",
                    text.get_ref()
                ),
            )
        })?;
        let Some(chosen) = security
            .map(|security| *security.get_ref())
            .or(address.ip().is_loopback().then_some(Security::None))
        else {
            return Err(self.error(
                text,
                key,
                format!(
                    "{} can be reached from other machines: set security = \"sasl_tls\" with `tls` and [[kafka.user]], or security = \"none\" if everyone who reaches it may read, write and delete everything",
                    text.get_ref()
                ),
            ));
        };
        if let Some(security) = security {
            if chosen.tls() && tls.is_none() {
                return Err(self.error(
                    security,
                    "kafka.security",
                    "TLS needs tls = { cert = \"FILE\", key = \"FILE\" }",
                ));
            }
            if chosen.sasl() && !users {
                return Err(self.error(
                    security,
                    "kafka.security",
                    "SASL needs users: `taffrail user NAME` makes a [[kafka.user]]",
                ));
            }
        }
        let advertised = advertised_text
            .map(|text| {
                advertised(text.get_ref()).ok_or_else(|| {
                    self.error(
                        text,
                        "kafka.advertised",
                        format!("\"{}\" is no name or address with port, such as \"log1.example.com:9092\"", text.get_ref()),
                    )
                })
            })
            .transpose()?;
        Ok(Listener {
            address,
            advertised,
            security: chosen,
            tls: tls
                .filter(|_| chosen.tls())
                .map(|tls| tls.get_ref().clone()),
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
        assert_eq!(kafka.listeners.len(), 1);
        assert_eq!(
            kafka.listeners[0].address,
            "127.0.0.1:9092".parse().unwrap()
        );
        assert!(kafka.listeners[0].is_local());
        let message = parse("listen = [\"127.0.0.1:1\", \"0.0.0.0:9092\"]").unwrap_err();
        assert!(
            message.contains("line 4: kafka.listen") && message.contains("security"),
            "{message}"
        );
        let kafka = parse("listen = [\"[::]:9092\"]\nsecurity = \"none\"").unwrap();
        assert!(!kafka.listeners[0].is_local());
    }

    const VERIFIER: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

    #[test]
    fn listeners_users_rules_and_quotas_are_read() {
        let kafka = parse(&format!(
            r#"
            listen = ["127.0.0.1:1"]
            super_users = ["root"]
            [[kafka.listener]]
            listen = "0.0.0.0:2"
            advertised = "log1:2"
            security = "sasl_tls"
            tls = {{ cert = "c", key = "k", client_ca = "a" }}
            [[kafka.user]]
            name = "me"
            scram = ["{VERIFIER}"]
            [[kafka.acl]]
            principal = "me"
            host = "::ffff:192.0.2.1"
            topic = {{ prefix = "log-" }}
            allow = ["Read", "write"]
            [[kafka.acl]]
            principal = "*"
            group = "*"
            deny = ["All"]
            [[kafka.quota]]
            user = "*"
            producer_byte_rate = "1MiB"
            request_percentage = 50
            "#
        ))
        .unwrap();
        let [local, far] = &kafka.listeners[..] else {
            panic!("{:?}", kafka.listeners)
        };
        assert!(local.security == Security::None && local.tls.is_none() && !local.proves());
        assert!(far.security.sasl() && far.tls.is_some() && far.proves());
        assert_eq!(far.advertised.as_ref().unwrap().host, "log1");
        assert!(kafka.users[0].verifiers[0].fits(b"pencil"));
        use crate::broker::security::acl::{Operation, Operations, Pattern, Target};
        let [first, second] = &kafka.acls[..] else {
            panic!("{:?}", kafka.acls)
        };
        assert_eq!(first.target, Target::Topic(Pattern::Prefix("log-".into())));
        assert!(first.allow.has(Operation::Write) && !first.allow.has(Operation::Delete));
        assert_eq!(first.host, Some("192.0.2.1".parse().unwrap()));
        assert_eq!(second.target, Target::Group(Pattern::Any));
        assert_eq!((&second.principal, second.deny), (&None, Operations::all()));
        assert_eq!(kafka.quotas[0].produce, Some(1 << 20));
        assert_eq!(kafka.quotas[0].time, Some(50.0));
        assert_eq!(
            kafka.failed_authentication_delay,
            Duration::from_millis(100)
        );
    }

    #[test]
    fn what_protects_nothing_is_refused() {
        let user = format!("[[kafka.user]]\nname = \"me\"\nscram = [\"{VERIFIER}\"]");
        let tls = "tls = { cert = \"c\", key = \"k\" }";
        let acl = |rest: &str| format!("[[kafka.acl]]\nprincipal = \"me\"\n{rest}");
        for (text, key) in [
            ("security = \"tls\"".to_owned(), "kafka.security"),
            ("security = \"sasl\"".to_owned(), "kafka.security"),
            (user.clone(), "kafka.user"),
            (tls.to_owned(), "kafka.tls"),
            (
                format!("security = \"sasl\"\n{user}\n{user}"),
                "kafka.user.name",
            ),
            (
                "security = \"sasl\"\n[[kafka.user]]\nname = \"me\"\nscram = [\"password\"]"
                    .to_owned(),
                "kafka.user.scram",
            ),
            (
                "[[kafka.listener]]\nlisten = \"0.0.0.0:1\"".to_owned(),
                "kafka.listener.listen",
            ),
            (acl("allow = [\"Read\"]"), "kafka.acl"),
            (acl("topic = \"t\""), "kafka.acl"),
            (
                acl("topic = \"t\"\ngroup = \"g\"\nallow = [\"Read\"]"),
                "kafka.acl",
            ),
            (acl("topic = \"t\"\nallow = [\"Look\"]"), "kafka.acl.allow"),
            (
                acl("topic = { prefix = \"\" }\nallow = [\"Read\"]"),
                "kafka.acl.topic",
            ),
            (
                acl("host = \"here\"\ntopic = \"t\"\nallow = [\"Read\"]"),
                "kafka.acl.host",
            ),
            (
                "[[kafka.quota]]\nproducer_byte_rate = \"1MiB\"".to_owned(),
                "kafka.quota",
            ),
            ("[[kafka.quota]]\nuser = \"me\"".to_owned(), "kafka.quota"),
            (
                "[[kafka.quota]]\nuser = \"me\"\nrequest_percentage = 0".to_owned(),
                "kafka.quota.request_percentage",
            ),
        ] {
            let message = parse(&text).unwrap_err();
            assert!(message.contains(&format!("{key}:")), "{text}: {message}");
            assert!(!message.contains("password\""), "{message}");
        }
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
            (
                "failed_authentication_delay = \"1m\"",
                "kafka.failed_authentication_delay",
            ),
            ("default_partitions = 0", "kafka.default_partitions"),
            (
                "group_initial_rebalance_delay = \"1h\"",
                "kafka.group_initial_rebalance_delay",
            ),
            (
                "group_min_session_timeout = \"0s\"",
                "kafka.group_min_session_timeout",
            ),
            (
                "group_max_session_timeout = \"2 days\"",
                "kafka.group_max_session_timeout",
            ),
            (
                "group_max_session_timeout = \"5s\"",
                "kafka.group_min_session_timeout: \"6s\" is more than group_max_session_timeout, \"5s\"",
            ),
            (
                "group_min_session_timeout = \"1h\"",
                "kafka.group_min_session_timeout",
            ),
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
