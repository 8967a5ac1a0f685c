//! The settings of topics, by Kafka's names, and Taffrail's own: what may be set, to what, and what it is otherwise.
//!
//! Kafka's settings that are not listed have no effect here: a client that sets one is told so, instead of
//! believing it. Source: the topic configurations in Kafka's documentation.

use std::collections::BTreeMap;

/// What a setting's value looks like; the numbers are the protocol's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// true or false.
    Boolean = 1,
    /// A word.
    String = 2,
    /// 32 bits.
    Int = 3,
    /// 16 bits.
    Short = 4,
    /// 64 bits.
    Long = 5,
    /// A decimal fraction.
    Double = 6,
    /// Words with commas between.
    List = 7,
}

/// A setting.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Kafka's name.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// Its value where none is set.
    pub default: &'static str,
    /// What it does.
    pub doc: &'static str,
    allowed: Allowed,
}

#[derive(Debug, Clone, Copy)]
enum Allowed {
    Number(i64, i64),
    Fraction,
    Words(&'static [&'static str]),
}

/// `max.message.bytes` where none is set, as in Kafka: 1 MiB and the bytes before a batch's length.
pub const DEFAULT_MAX_MESSAGE: &str = "1048588";

/// Taffrail's own setting: which index a topic has.
pub const INDEX: &str = "taffrail.index";
/// Its value where keys are indexed.
pub const INDEX_KEY: &str = "key";

/// Every setting, by name.
pub const SETTINGS: &[Setting] = &[
    Setting {
        name: "cleanup.policy",
        kind: Kind::List,
        default: "delete",
        doc: "delete: batches go when they are too old or too many; compact: the newest record of each key stays",
        allowed: Allowed::Words(&["delete", "compact"]),
    },
    Setting {
        name: "compression.type",
        kind: Kind::String,
        default: "producer",
        doc: "codec of long-term storage; producer: as the server is configured",
        allowed: Allowed::Words(&["producer", "uncompressed", "lz4", "zstd"]),
    },
    Setting {
        name: "delete.retention.ms",
        kind: Kind::Long,
        default: "86400000",
        doc: "how long a compacted topic keeps records without a value, from the first compaction on that meets them",
        allowed: Allowed::Number(0, i64::MAX),
    },
    Setting {
        name: "max.message.bytes",
        kind: Kind::Int,
        default: DEFAULT_MAX_MESSAGE,
        doc: "bytes of the largest record batch",
        allowed: Allowed::Number(0, i32::MAX as i64),
    },
    Setting {
        name: "message.timestamp.after.max.ms",
        kind: Kind::Long,
        default: "9223372036854775807",
        doc: "how far a record's time may lie in the future",
        allowed: Allowed::Number(0, i64::MAX),
    },
    Setting {
        name: "message.timestamp.before.max.ms",
        kind: Kind::Long,
        default: "9223372036854775807",
        doc: "how far a record's time may lie in the past",
        allowed: Allowed::Number(0, i64::MAX),
    },
    Setting {
        name: "message.timestamp.type",
        kind: Kind::String,
        default: "CreateTime",
        doc: "whose clock gives a record's time: CreateTime the producer's, LogAppendTime the server's",
        allowed: Allowed::Words(&["CreateTime", "LogAppendTime"]),
    },
    Setting {
        name: "min.cleanable.dirty.ratio",
        kind: Kind::Double,
        default: "0.5",
        doc: "share of a compacted topic that is rewritten before it is compacted again",
        allowed: Allowed::Fraction,
    },
    Setting {
        name: "min.compaction.lag.ms",
        kind: Kind::Long,
        default: "0",
        doc: "how long a record of a compacted topic stays, whatever follows it",
        allowed: Allowed::Number(0, i64::MAX),
    },
    Setting {
        name: "min.insync.replicas",
        kind: Kind::Int,
        default: "1",
        doc: "there is one replica",
        allowed: Allowed::Number(1, 1),
    },
    Setting {
        name: "retention.bytes",
        kind: Kind::Long,
        default: "-1",
        doc: "bytes of a partition that are kept; -1: all",
        allowed: Allowed::Number(-1, i64::MAX),
    },
    Setting {
        name: "retention.ms",
        kind: Kind::Long,
        default: "-1",
        doc: "how long records are kept, by the server's clock; -1: for ever",
        allowed: Allowed::Number(-1, i64::MAX),
    },
    Setting {
        name: "segment.bytes",
        kind: Kind::Int,
        default: "1073741824",
        doc: "taken and shown for tools that set it; the size of segments is the server's to choose",
        allowed: Allowed::Number(14, i32::MAX as i64),
    },
    Setting {
        name: "segment.ms",
        kind: Kind::Long,
        default: "604800000",
        doc: "taken and shown for tools that set it; the server chooses when it writes a segment out",
        allowed: Allowed::Number(1, i64::MAX),
    },
    Setting {
        name: INDEX,
        kind: Kind::String,
        default: "none",
        doc: "key: an index finds the newest record of a key, and keys in order; none: there is no index",
        allowed: Allowed::Words(&["none", INDEX_KEY]),
    },
];

/// Whether a topic with these settings has an index of its keys.
pub fn is_indexed(settings: &BTreeMap<String, String>) -> bool {
    value(settings, INDEX) == INDEX_KEY
}

/// The setting of a name.
pub fn find(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.name == name)
}

/// Whether there is such a setting and it may have this value; else what is wrong and what is allowed.
pub fn check(name: &str, value: Option<&str>) -> Result<(), String> {
    let Some(setting) = find(name) else {
        let names: Vec<&str> = SETTINGS.iter().map(|s| s.name).collect();
        return Err(format!(
            "{name:?} is no setting of a topic here; there are: {}",
            names.join(", ")
        ));
    };
    let Some(value) = value else {
        return Ok(());
    };
    let fine = match setting.allowed {
        Allowed::Number(min, max) => value
            .parse::<i64>()
            .is_ok_and(|number| (min..=max).contains(&number)),
        Allowed::Fraction => value
            .parse::<f64>()
            .is_ok_and(|number| (0.0..=1.0).contains(&number)),
        Allowed::Words(words) if setting.kind == Kind::List => {
            value.split(',').all(|word| words.contains(&word.trim()))
        }
        Allowed::Words(words) => words.contains(&value),
    };
    if fine {
        return Ok(());
    }
    let allowed = match setting.allowed {
        Allowed::Number(min, max) => format!("{min} to {max}"),
        Allowed::Fraction => "0 to 1".to_owned(),
        Allowed::Words(words) => words.join(", "),
    };
    Err(format!("{name} cannot be {value:?}; allowed: {allowed}"))
}

/// A setting's value among a topic's settings, or its default.
pub fn value<'a>(settings: &'a BTreeMap<String, String>, name: &str) -> &'a str {
    match settings.get(name) {
        Some(value) => value,
        None => find(name).map_or("", |setting| setting.default),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_allowed_and_names_are_sorted() {
        for setting in SETTINGS {
            check(setting.name, Some(setting.default)).unwrap();
        }
        assert!(SETTINGS.is_sorted_by_key(|s| s.name));
    }

    #[test]
    fn wrong_values_are_named_with_what_is_allowed() {
        for (name, value, says) in [
            ("retention.ms", "-2", "-1 to"),
            ("retention.ms", "soon", "-1 to"),
            ("cleanup.policy", "keep", "delete, compact"),
            ("cleanup.policy", "", "delete, compact"),
            ("min.cleanable.dirty.ratio", "2", "0 to 1"),
            ("min.insync.replicas", "2", "1 to 1"),
            ("retention.minutes", "1", "retention.ms"),
            ("taffrail.index", "value", "none, key"),
        ] {
            let message = check(name, Some(value)).unwrap_err();
            assert!(message.contains(says), "{message}");
        }
        check("cleanup.policy", Some("compact, delete")).unwrap();
        check("retention.ms", None).unwrap();
        check("retention.minutes", None).unwrap_err();
        let mut settings = BTreeMap::new();
        assert_eq!(value(&settings, "retention.ms"), "-1");
        settings.insert("retention.ms".to_owned(), "5".to_owned());
        assert_eq!(value(&settings, "retention.ms"), "5");
    }
}
