//! The settings of topics as requests carry them: pairs of name and value.

use crate::broker::batch::Rules;
pub use crate::storage::topic_settings::{Kind, SETTINGS, Setting, find};

/// Whether a setting may have this value; else what is wrong and what is allowed.
pub fn check(name: &str, value: &str) -> Result<(), String> {
    crate::storage::topic_settings::check(name, Some(value))
}

/// A setting's value in a topic's configuration, or its default.
pub fn value<'a>(config: &'a [(String, String)], name: &str) -> &'a str {
    match config.iter().find(|(key, _)| key == name) {
        Some((_, value)) => value,
        None => find(name).map_or("", |setting| setting.default),
    }
}

/// What a topic's configuration asks of its batches; `most` is what the log can take.
pub fn rules(config: &[(String, String)], most: usize) -> Rules {
    let number = |name| value(config, name).parse::<i64>().unwrap_or(i64::MAX);
    Rules {
        max_bytes: usize::try_from(number("max.message.bytes"))
            .unwrap_or(0)
            .min(most),
        append_time: value(config, "message.timestamp.type") == "LogAppendTime",
        before_ms: number("message.timestamp.before.max.ms"),
        after_ms: number("message.timestamp.after.max.ms"),
        keyed: value(config, "cleanup.policy")
            .split(',')
            .any(|policy| policy.trim() == "compact"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_follow_the_settings() {
        let set = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        assert_eq!(rules(&[], usize::MAX).max_bytes, 1_048_588);
        assert_eq!(rules(&[], 1000).max_bytes, 1000);
        let config = set(&[
            ("cleanup.policy", "compact,delete"),
            ("message.timestamp.type", "LogAppendTime"),
            ("max.message.bytes", "77"),
        ]);
        let rules = rules(&config, usize::MAX);
        assert!(rules.keyed && rules.append_time && rules.max_bytes == 77);
    }
}
