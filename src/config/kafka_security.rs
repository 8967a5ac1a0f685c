//! `[[kafka.user]]`, `[[kafka.acl]]` and `[[kafka.quota]]`: who clients are, what they may do, and how much of it.

use std::collections::HashSet;
use std::net::IpAddr;

use bytesize::ByteSize;
use serde::Deserialize;
use toml::Spanned;

use super::{Checker, ConfigError};
use crate::broker::security::acl::{Operation, Operations, Pattern, Rule, Target};
use crate::broker::security::quota::{Entity, Quota};
use crate::broker::security::scram::Verifier;

/// Bytes of a user's name.
const MAX_NAME: usize = 255;
/// The name that stands for all.
const ALL: &str = "*";
/// Greatest share of the threads' time, in percent of one: all that there may be.
const MAX_PERCENT: f64 = 100.0 * super::kafka::MAX_THREADS as f64;
/// Least and greatest rate, in bytes a second.
const RATE: std::ops::RangeInclusive<u64> = 1..=(1 << 40);

/// `[[kafka.user]]`
#[derive(Debug, Clone, PartialEq)]
pub struct User {
    /// By which it logs in, and by which rules and quotas know it.
    pub name: String,
    /// What is kept of its password, one a hash.
    pub verifiers: Vec<Verifier>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawUser {
    name: Spanned<String>,
    scram: Spanned<Vec<Spanned<String>>>,
}

/// A name, or `{ prefix = "..." }`.
#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum RawPattern {
    Name(String),
    Prefix { prefix: String },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAcl {
    principal: Spanned<String>,
    host: Option<Spanned<String>>,
    topic: Option<Spanned<RawPattern>>,
    group: Option<Spanned<RawPattern>>,
    cluster: Option<bool>,
    #[serde(default)]
    allow: Vec<Spanned<String>>,
    #[serde(default)]
    deny: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawQuota {
    user: Option<Spanned<String>>,
    client_id: Option<Spanned<String>>,
    producer_byte_rate: Option<Spanned<ByteSize>>,
    consumer_byte_rate: Option<Spanned<ByteSize>>,
    request_percentage: Option<Spanned<f64>>,
}

impl Checker<'_> {
    pub(super) fn kafka_users(&self, raw: &[Spanned<RawUser>]) -> Result<Vec<User>, ConfigError> {
        let mut names = HashSet::new();
        let mut users = Vec::new();
        for user in raw {
            let RawUser { name, scram } = user.get_ref();
            self.kafka_name(name, "kafka.user.name")?;
            if !names.insert(name.get_ref()) {
                return Err(self.error(name, "kafka.user.name", "is used twice"));
            }
            let mut verifiers: Vec<Verifier> = Vec::new();
            for text in scram.get_ref() {
                // The text is not repeated: passwords can be guessed from it.
                let verifier = Verifier::parse(text.get_ref())
                    .map_err(|error| self.error(text, "kafka.user.scram", error.to_string()))?;
                if verifiers.iter().any(|v| v.hash() == verifier.hash()) {
                    let reason = format!("{} is there twice", verifier.hash().name());
                    return Err(self.error(text, "kafka.user.scram", reason));
                }
                verifiers.push(verifier);
            }
            if verifiers.is_empty() {
                return Err(self.error(
                    scram,
                    "kafka.user.scram",
                    "is empty; `taffrail user NAME` makes what belongs here",
                ));
            }
            users.push(User {
                name: name.get_ref().clone(),
                verifiers,
            });
        }
        Ok(users)
    }

    fn kafka_name(&self, name: &Spanned<String>, key: &str) -> Result<(), ConfigError> {
        let text = name.get_ref();
        if text.is_empty() || text.len() > MAX_NAME || text == ALL || text.contains('\0') {
            let reason = format!("1 to {MAX_NAME} bytes other than \"*\" are a name");
            return Err(self.error(name, key, reason));
        }
        Ok(())
    }

    pub(super) fn kafka_acls(&self, raw: &[Spanned<RawAcl>]) -> Result<Vec<Rule>, ConfigError> {
        raw.iter().map(|acl| self.kafka_acl(acl)).collect()
    }

    fn kafka_acl(&self, acl: &Spanned<RawAcl>) -> Result<Rule, ConfigError> {
        let raw = acl.get_ref();
        let principal = match raw.principal.get_ref().as_str() {
            ALL => None,
            name => {
                self.kafka_name(&raw.principal, "kafka.acl.principal")?;
                Some(name.to_owned())
            }
        };
        let host = match &raw.host {
            None => None,
            Some(host) if host.get_ref() == ALL => None,
            Some(host) => {
                let address: IpAddr = host.get_ref().parse().map_err(|_| {
                    let reason = format!("\"{}\" is no IP address", host.get_ref());
                    self.error(host, "kafka.acl.host", reason)
                })?;
                Some(address.to_canonical())
            }
        };
        let pattern = |raw: &Spanned<RawPattern>, key| match raw.get_ref() {
            RawPattern::Name(name) if name == ALL => Ok(Pattern::Any),
            RawPattern::Name(name) if !name.is_empty() => Ok(Pattern::Literal(name.clone())),
            RawPattern::Prefix { prefix } if !prefix.is_empty() => {
                Ok(Pattern::Prefix(prefix.clone()))
            }
            _ => Err(self.error(raw, key, "is empty; \"*\" stands for all")),
        };
        let target = match (&raw.topic, &raw.group, raw.cluster) {
            (Some(topic), None, None) => Target::Topic(pattern(topic, "kafka.acl.topic")?),
            (None, Some(group), None) => Target::Group(pattern(group, "kafka.acl.group")?),
            (None, None, Some(true)) => Target::Cluster,
            _ => {
                return Err(self.error(
                    acl,
                    "kafka.acl",
                    "exactly one of `topic`, `group` and `cluster = true` says what it is for",
                ));
            }
        };
        let operations = |list: &[Spanned<String>], key| -> Result<Operations, ConfigError> {
            let mut all = Vec::new();
            for name in list {
                match (name.get_ref().as_str(), Operation::of(name.get_ref())) {
                    (_, Some(operation)) => all.push(operation),
                    ("All" | "all" | ALL, None) => all.extend(Operation::ALL),
                    (other, None) => {
                        let names: Vec<&str> = Operation::ALL.iter().map(|o| o.name()).collect();
                        let reason = format!("\"{other}\" is not one of {}, All", names.join(", "));
                        return Err(self.error(name, key, reason));
                    }
                }
            }
            Ok(all.into_iter().collect())
        };
        let allow = operations(&raw.allow, "kafka.acl.allow")?;
        let deny = operations(&raw.deny, "kafka.acl.deny")?;
        if raw.allow.is_empty() && raw.deny.is_empty() {
            return Err(self.error(acl, "kafka.acl", "neither `allow` nor `deny` is given"));
        }
        Ok(Rule {
            principal,
            host,
            target,
            allow,
            deny,
        })
    }

    pub(super) fn kafka_quotas(
        &self,
        raw: &[Spanned<RawQuota>],
    ) -> Result<Vec<Quota>, ConfigError> {
        let mut quotas: Vec<Quota> = Vec::new();
        for table in raw {
            let raw = table.get_ref();
            let entity = |name: &Option<Spanned<String>>| {
                name.as_ref().map(|name| match name.get_ref().as_str() {
                    ALL => Entity::Default,
                    name => Entity::Name(name.to_owned()),
                })
            };
            let rate = |rate: &Option<Spanned<ByteSize>>, key| match rate {
                None => Ok(None),
                Some(rate) => match rate.get_ref().as_u64() {
                    bytes if RATE.contains(&bytes) => Ok(Some(bytes)),
                    _ => Err(self.error(rate, key, "a rate is 1 B to 1 TiB a second")),
                },
            };
            let time = raw.request_percentage.as_ref().map(|percent| {
                let value = *percent.get_ref();
                if value > 0.0 && value <= MAX_PERCENT {
                    return Ok(value);
                }
                let reason = format!(
                    "{value} is not allowed; above 0 and up to {MAX_PERCENT} is, where 100 is one thread"
                );
                Err(self.error(percent, "kafka.quota.request_percentage", reason))
            });
            let quota = Quota {
                user: entity(&raw.user),
                client: entity(&raw.client_id),
                produce: rate(&raw.producer_byte_rate, "kafka.quota.producer_byte_rate")?,
                fetch: rate(&raw.consumer_byte_rate, "kafka.quota.consumer_byte_rate")?,
                time: time.transpose()?,
            };
            let reason = if quota.user.is_none() && quota.client.is_none() {
                "names neither `user` nor `client_id`; \"*\" stands for each without a quota of its own"
            } else if quota.produce.is_none() && quota.fetch.is_none() && quota.time.is_none() {
                "gives none of `producer_byte_rate`, `consumer_byte_rate` and `request_percentage`"
            } else if quotas
                .iter()
                .any(|other| other.user == quota.user && other.client == quota.client)
            {
                "is for the same user and client as another; put the rates into one"
            } else {
                quotas.push(quota);
                continue;
            };
            return Err(self.error(table, "kafka.quota", reason));
        }
        Ok(quotas)
    }
}
