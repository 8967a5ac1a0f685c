//! The broker's own settings by Kafka's names, as DescribeConfigs shows them.
//!
//! Source: the broker configurations in Kafka's documentation. Invariant: a setting is listed only where it means
//! something here, with the value that the running server goes by. All come from the server's file or are fixed;
//! none is changed by a request.

use crate::broker::cluster::NODE;
use crate::broker::groups;
use crate::config::Config;
use crate::config::kafka::{self, Kafka, Listener};
use crate::storage::topic_settings::{self, Kind};

/// A setting of the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Kafka's name.
    pub name: &'static str,
    /// What its value looks like.
    pub kind: Kind,
    /// Its value; `None`: it has none.
    pub value: Option<String>,
    /// Its value where the file says nothing else.
    pub default: Option<String>,
    /// What it does.
    pub doc: &'static str,
}

impl Setting {
    /// Whether the file gives it another value than its default.
    pub fn is_set(&self) -> bool {
        self.value != self.default
    }
}

/// What the broker's settings follow from beside the configuration.
#[derive(Debug, Clone)]
pub struct Running<'a> {
    /// Bytes of the largest batch that every shard takes.
    pub max_batch: usize,
    /// Partitions of the topic of committed offsets.
    pub offsets_partitions: usize,
    /// The coordinator's settings.
    pub groups: &'a groups::Config,
}

/// Settings of topics that have a broker's name, too: what holds for topics that do not set them.
const OF_TOPICS: &[(&str, &str)] = &[
    ("compression.type", "compression.type"),
    ("log.cleaner.delete.retention.ms", "delete.retention.ms"),
    (
        "log.cleaner.min.cleanable.ratio",
        "min.cleanable.dirty.ratio",
    ),
    ("log.cleaner.min.compaction.lag.ms", "min.compaction.lag.ms"),
    ("log.cleanup.policy", "cleanup.policy"),
    (
        "log.message.timestamp.after.max.ms",
        "message.timestamp.after.max.ms",
    ),
    (
        "log.message.timestamp.before.max.ms",
        "message.timestamp.before.max.ms",
    ),
    ("log.message.timestamp.type", "message.timestamp.type"),
    ("log.retention.bytes", "retention.bytes"),
    ("log.retention.ms", "retention.ms"),
    ("min.insync.replicas", "min.insync.replicas"),
];

/// All settings, by name.
pub fn of(config: &Config, kafka: &Kafka, running: &Running<'_>) -> Vec<Setting> {
    let mut all = Vec::new();
    let mut add = |name, kind, value: Option<String>, default: Option<String>, doc| {
        all.push(Setting {
            name,
            kind,
            value,
            default,
            doc,
        });
    };
    for (name, of_topic) in OF_TOPICS {
        if let Some(setting) = topic_settings::find(of_topic) {
            let value = Some(setting.default.to_owned());
            add(name, setting.kind, value.clone(), value, setting.doc);
        }
    }

    let mut number = |name, kind, value: u128, default: u128, doc| {
        add(
            name,
            kind,
            Some(value.to_string()),
            Some(default.to_string()),
            doc,
        );
    };
    number(
        "num.partitions",
        Kind::Int,
        kafka.default_partitions.into(),
        kafka::DEFAULT_PARTITIONS.into(),
        "partitions of topics that are made without a number",
    );
    number(
        "num.network.threads",
        Kind::Int,
        kafka.threads.into(),
        kafka::DEFAULT_THREADS.into(),
        "threads that serve connections",
    );
    number(
        "max.connections",
        Kind::Int,
        kafka.max_connections.into(),
        kafka::DEFAULT_CONNECTIONS.into(),
        "connections in all",
    );
    number(
        "connections.max.idle.ms",
        Kind::Long,
        kafka.idle_timeout.as_millis(),
        kafka::DEFAULT_IDLE_TIMEOUT.as_millis(),
        "a connection without a request for so long is closed",
    );
    number(
        "connection.failed.authentication.delay.ms",
        Kind::Int,
        kafka.failed_authentication_delay.as_millis(),
        kafka::DEFAULT_AUTHENTICATION_DELAY.as_millis(),
        "how long the answer to a failed login is held back",
    );
    number(
        "socket.request.max.bytes",
        Kind::Int,
        kafka.max_request.into(),
        kafka::DEFAULT_REQUEST.into(),
        "bytes of the largest request",
    );
    number(
        "group.initial.rebalance.delay.ms",
        Kind::Int,
        kafka.group_initial_rebalance_delay.as_millis(),
        kafka::DEFAULT_REBALANCE_DELAY.as_millis(),
        "how long an empty group waits for more members before its first rebalance",
    );
    number(
        "group.min.session.timeout.ms",
        Kind::Int,
        kafka.group_min_session_timeout.as_millis(),
        kafka::DEFAULT_MIN_SESSION.as_millis(),
        "shortest session time-out that a member of a group may ask for",
    );
    number(
        "group.max.session.timeout.ms",
        Kind::Int,
        kafka.group_max_session_timeout.as_millis(),
        kafka::DEFAULT_MAX_SESSION.as_millis(),
        "longest session time-out that a member of a group may ask for",
    );

    let mut fixed = |name, kind, value: String, doc| {
        add(name, kind, Some(value.clone()), Some(value), doc);
    };
    let groups = running.groups;
    let limit = topic_settings::DEFAULT_MAX_MESSAGE.parse::<usize>();
    let limit = limit.unwrap_or(usize::MAX).min(running.max_batch);
    let minutes = groups.offsets_retention_ms / 60_000;
    for (name, kind, value, doc) in [
        (
            "broker.id",
            Kind::Int,
            NODE.to_string(),
            "the only broker's number",
        ),
        (
            "node.id",
            Kind::Int,
            NODE.to_string(),
            "the only broker's number",
        ),
        (
            "default.replication.factor",
            Kind::Int,
            "1".to_owned(),
            "there is one replica",
        ),
        (
            "offsets.topic.replication.factor",
            Kind::Short,
            "1".to_owned(),
            "there is one replica",
        ),
        (
            "offsets.topic.num.partitions",
            Kind::Int,
            running.offsets_partitions.to_string(),
            "partitions of the topic of committed offsets",
        ),
        (
            "message.max.bytes",
            Kind::Int,
            limit.to_string(),
            "bytes of the largest record batch, where the topic does not say less; the log's largest commit bounds it",
        ),
        (
            "delete.topic.enable",
            Kind::Boolean,
            "true".to_owned(),
            "topics can be deleted",
        ),
        (
            "group.max.size",
            Kind::Int,
            groups.max_group_size.to_string(),
            "most members of a group",
        ),
        (
            "offset.metadata.max.bytes",
            Kind::Int,
            groups.max_offset_metadata.to_string(),
            "bytes of the note that comes with a committed offset",
        ),
        (
            "offsets.retention.minutes",
            Kind::Int,
            minutes.to_string(),
            "how long offsets of a group without members are kept",
        ),
        (
            "offsets.retention.check.interval.ms",
            Kind::Long,
            groups.retention_check_interval_ms.to_string(),
            "how often offsets that nobody keeps are looked for",
        ),
    ] {
        fixed(name, kind, value, doc);
    }

    add(
        "auto.create.topics.enable",
        Kind::Boolean,
        Some(kafka.auto_create_topics.to_string()),
        Some(kafka::DEFAULT_AUTO_CREATE.to_string()),
        "whether a client that asks for an unknown topic makes it",
    );
    add(
        "log.dirs",
        Kind::List,
        Some(config.storage.path.display().to_string()),
        None,
        "the store's folder",
    );
    let listeners = kafka.listeners.iter();
    let listeners: Vec<String> = listeners
        .map(|l| format!("{}://{}", protocol(l), l.address))
        .collect();
    add(
        "listeners",
        Kind::List,
        Some(listeners.join(",")),
        Some(format!("PLAINTEXT://{}", kafka::DEFAULT_LISTEN)),
        "addresses that are listened on, with their protection",
    );
    let advertised = kafka.listeners.iter().filter_map(|listener| {
        let advertised = listener.advertised.as_ref()?;
        let host = match advertised.host.contains(':') {
            true => format!("[{}]", advertised.host),
            false => advertised.host.clone(),
        };
        Some(format!(
            "{}://{host}:{}",
            protocol(listener),
            advertised.port
        ))
    });
    let advertised: Vec<String> = advertised.collect();
    add(
        "advertised.listeners",
        Kind::List,
        (!advertised.is_empty()).then(|| advertised.join(",")),
        None,
        "where clients are told to connect to; a listener that is not named here: the address at which they arrived",
    );
    all.sort_by_key(|setting| setting.name);
    all
}

/// Kafka's name of a listener's protection.
fn protocol(listener: &Listener) -> &'static str {
    match (listener.security.sasl(), listener.security.tls()) {
        (false, false) => "PLAINTEXT",
        (false, true) => "SSL",
        (true, false) => "SASL_PLAINTEXT",
        (true, true) => "SASL_SSL",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    fn settings(kafka: &str) -> Vec<Setting> {
        let text = format!("[storage]\npath = \"/d\"\n[kafka]\n{kafka}");
        let config = Config::parse(&text, Path::new("t.toml")).unwrap();
        let running = Running {
            max_batch: 1000,
            offsets_partitions: 16,
            groups: &groups::Config::default(),
        };
        of(&config, config.kafka.as_ref().unwrap(), &running)
    }

    fn value<'a>(settings: &'a [Setting], name: &str) -> Option<&'a str> {
        let setting = settings.iter().find(|s| s.name == name).unwrap();
        setting.value.as_deref()
    }

    #[test]
    fn the_file_s_values_are_shown_and_told_from_defaults() {
        let settings = settings(
            "listen = [\"127.0.0.1:1\", \"[::1]:2\"]\nadvertised = \"[fd00::1]:9\"\ndefault_partitions = 7\n\
             auto_create_topics = false\nidle_timeout = \"2s\"\ngroup_min_session_timeout = \"1s\"\n",
        );
        for (name, shown, set) in [
            (
                "listeners",
                "PLAINTEXT://127.0.0.1:1,PLAINTEXT://[::1]:2",
                true,
            ),
            (
                "advertised.listeners",
                "PLAINTEXT://[fd00::1]:9,PLAINTEXT://[fd00::1]:9",
                true,
            ),
            ("num.partitions", "7", true),
            ("auto.create.topics.enable", "false", true),
            ("connections.max.idle.ms", "2000", true),
            ("group.min.session.timeout.ms", "1000", true),
            ("group.max.session.timeout.ms", "1800000", false),
            ("group.initial.rebalance.delay.ms", "3000", false),
            ("max.connections", "100000", false),
            ("log.retention.ms", "-1", false),
            ("message.max.bytes", "1000", false),
            ("offsets.retention.minutes", "10080", false),
            ("log.dirs", "/d", true),
        ] {
            let setting = settings.iter().find(|s| s.name == name).unwrap();
            assert_eq!(
                (setting.value.as_deref(), setting.is_set()),
                (Some(shown), set),
                "{name}"
            );
        }
    }

    #[test]
    fn nothing_but_the_folder_is_set_by_an_empty_table_and_names_are_sorted() {
        let settings = settings("");
        let set: Vec<&str> = settings
            .iter()
            .filter(|s| s.is_set())
            .map(|s| s.name)
            .collect();
        assert_eq!(set, ["log.dirs"]);
        assert_eq!(value(&settings, "advertised.listeners"), None);
        let names: BTreeSet<&str> = settings.iter().map(|s| s.name).collect();
        assert_eq!(names.len(), settings.len());
        assert!(settings.is_sorted_by_key(|s| s.name));
        assert!(OF_TOPICS.iter().all(|(name, _)| names.contains(name)));
    }
}
