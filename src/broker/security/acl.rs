//! Who may do what: access rules with Kafka's meaning.
//!
//! Source: Kafka's documentation of its standard authorizer. A rule that denies beats every rule that allows;
//! what no rule allows is denied; a super user is not asked. Who may read, write, delete or alter a thing may
//! describe it, and who may alter its configuration may see it; a denial implies nothing. Where there is
//! neither a rule nor a super user, everyone may do everything.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

/// Who a connection is that proved nothing.
pub const ANONYMOUS: &str = "ANONYMOUS";

/// What is done; the numbers are Kafka's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // Kafka's own names
pub enum Operation {
    Read = 3,
    Write = 4,
    Create = 5,
    Delete = 6,
    Alter = 7,
    Describe = 8,
    DescribeConfigs = 10,
    AlterConfigs = 11,
    IdempotentWrite = 12,
}

impl Operation {
    /// All of them.
    pub const ALL: [Operation; 9] = [
        Operation::Read,
        Operation::Write,
        Operation::Create,
        Operation::Delete,
        Operation::Alter,
        Operation::Describe,
        Operation::DescribeConfigs,
        Operation::AlterConfigs,
        Operation::IdempotentWrite,
    ];

    /// Kafka's name.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "Read",
            Operation::Write => "Write",
            Operation::Create => "Create",
            Operation::Delete => "Delete",
            Operation::Alter => "Alter",
            Operation::Describe => "Describe",
            Operation::DescribeConfigs => "DescribeConfigs",
            Operation::AlterConfigs => "AlterConfigs",
            Operation::IdempotentWrite => "IdempotentWrite",
        }
    }

    /// The operation of a name; case does not count.
    pub fn of(name: &str) -> Option<Operation> {
        let mut all = Self::ALL.into_iter();
        all.find(|operation| operation.name().eq_ignore_ascii_case(name))
    }
}

/// A set of operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Operations(u16);

impl Operations {
    /// All there are.
    pub fn all() -> Self {
        Operation::ALL.into_iter().collect()
    }

    /// Whether one is among them.
    pub fn has(self, operation: Operation) -> bool {
        self.0 & 1 << operation as u16 != 0
    }

    /// With what it implies where it is allowed.
    fn with_implied(mut self) -> Self {
        use Operation::*;
        if [Read, Write, Delete, Alter]
            .into_iter()
            .any(|o| self.has(o))
        {
            self.0 |= 1 << Describe as u16;
        }
        if self.has(AlterConfigs) {
            self.0 |= 1 << DescribeConfigs as u16;
        }
        self
    }
}

impl FromIterator<Operation> for Operations {
    fn from_iter<I: IntoIterator<Item = Operation>>(operations: I) -> Self {
        let bits = operations.into_iter().map(|o| 1 << o as u16);
        Self(bits.fold(0, |all, bit: u16| all | bit))
    }
}

/// A thing that is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource<'a> {
    /// A topic by name.
    Topic(&'a str),
    /// A group by id.
    Group(&'a str),
    /// The server itself.
    Cluster,
}

/// Which names a rule is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pattern {
    /// All.
    Any,
    /// This one.
    Literal(String),
    /// Those that begin so.
    Prefix(String),
}

impl Pattern {
    fn fits(&self, name: &str) -> bool {
        match self {
            Pattern::Any => true,
            Pattern::Literal(literal) => literal == name,
            Pattern::Prefix(prefix) => name.starts_with(&**prefix),
        }
    }
}

/// Which things a rule is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Topics.
    Topic(Pattern),
    /// Groups.
    Group(Pattern),
    /// The server itself.
    Cluster,
}

impl Target {
    fn fits(&self, resource: Resource<'_>) -> bool {
        match (self, resource) {
            (Target::Topic(pattern), Resource::Topic(name))
            | (Target::Group(pattern), Resource::Group(name)) => pattern.fits(name),
            (Target::Cluster, Resource::Cluster) => true,
            _ => false,
        }
    }
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Whom it is for; `None`: everyone.
    pub principal: Option<String>,
    /// From where; `None`: anywhere.
    pub host: Option<IpAddr>,
    /// What it is for.
    pub target: Target,
    /// What it allows.
    pub allow: Operations,
    /// What it denies.
    pub deny: Operations,
}

/// All rules.
#[derive(Debug, Default)]
pub struct Rules {
    open: bool,
    super_users: HashSet<String>,
    /// Those for everyone.
    everyone: Vec<Rule>,
    by_principal: HashMap<String, Vec<Rule>>,
}

impl Rules {
    /// Of these; without any, everything is allowed.
    pub fn new(super_users: &[String], rules: &[Rule]) -> Self {
        let mut all = Self {
            open: super_users.is_empty() && rules.is_empty(),
            super_users: super_users.iter().cloned().collect(),
            ..Self::default()
        };
        for rule in rules {
            let mut rule = rule.clone();
            rule.allow = rule.allow.with_implied();
            match &rule.principal {
                None => all.everyone.push(rule),
                Some(name) => {
                    let list = all.by_principal.entry(name.clone()).or_default();
                    list.push(rule);
                }
            }
        }
        all
    }

    /// Whether everything is allowed.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// The rules for someone at a place.
    fn of<'a>(&'a self, principal: &str, host: IpAddr) -> impl Iterator<Item = &'a Rule> {
        let own = self
            .by_principal
            .get(principal)
            .map_or(&[][..], Vec::as_slice);
        let rules = self.everyone.iter().chain(own);
        rules.filter(move |rule| rule.host.is_none_or(|wanted| wanted == host))
    }
}

/// Who a connection is, and what that allows.
#[derive(Debug, Clone)]
pub struct Access {
    rules: Arc<Rules>,
    principal: Arc<str>,
    host: IpAddr,
}

impl Access {
    /// Of a connection from `host`.
    pub fn new(rules: Arc<Rules>, principal: &str, host: IpAddr) -> Self {
        Self {
            rules,
            principal: principal.into(),
            host: host.to_canonical(),
        }
    }

    /// Other rules hold from now on.
    pub fn set_rules(&mut self, rules: Arc<Rules>) {
        self.rules = rules;
    }

    /// Becomes someone.
    pub fn set_principal(&mut self, principal: &str) {
        self.principal = principal.into();
    }

    /// Who it is.
    pub fn principal(&self) -> &str {
        &self.principal
    }

    fn unasked(&self) -> bool {
        self.rules.open || self.rules.super_users.contains(&*self.principal)
    }

    /// Whether it may do this.
    pub fn may(&self, operation: Operation, resource: Resource<'_>) -> bool {
        if self.unasked() {
            return true;
        }
        let mut allowed = false;
        for rule in self.rules.of(&self.principal, self.host) {
            if rule.target.fits(resource) {
                if rule.deny.has(operation) {
                    return false;
                }
                allowed |= rule.allow.has(operation);
            }
        }
        allowed
    }

    /// Whether it may do this to some topic, as Kafka asks for idempotent producers: some rule allows it, and
    /// none denies it for all that that rule is for.
    pub fn may_some_topic(&self, operation: Operation) -> bool {
        if self.unasked() {
            return true;
        }
        let rules = || self.rules.of(&self.principal, self.host);
        let denied = |allowed: &Pattern| {
            rules().filter(|rule| rule.deny.has(operation)).any(|rule| {
                match (&rule.target, allowed) {
                    (Target::Topic(Pattern::Any), _) => true,
                    (
                        Target::Topic(denied @ Pattern::Prefix(_)),
                        Pattern::Literal(name) | Pattern::Prefix(name),
                    ) => denied.fits(name),
                    (Target::Topic(denied), allowed) => denied == allowed,
                    _ => false,
                }
            })
        };
        rules()
            .filter(|rule| rule.allow.has(operation))
            .any(|rule| match &rule.target {
                Target::Topic(pattern) => !denied(pattern),
                _ => false,
            })
    }

    /// What it may do to a thing, as the bits by which Kafka tells clients.
    pub fn operations(&self, resource: Resource<'_>) -> i32 {
        use Operation::*;
        let sensible: &[Operation] = match resource {
            Resource::Topic(_) => &[
                Read,
                Write,
                Create,
                Delete,
                Alter,
                Describe,
                DescribeConfigs,
                AlterConfigs,
            ],
            Resource::Group(_) => &[Read, Delete, Describe],
            Resource::Cluster => &[
                Create,
                Alter,
                Describe,
                DescribeConfigs,
                AlterConfigs,
                IdempotentWrite,
            ],
        };
        sensible
            .iter()
            .filter(|&&operation| self.may(operation, resource))
            .fold(0, |bits, &operation| bits | 1 << operation as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::Operation::*;
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn rule(
        principal: Option<&str>,
        target: Target,
        allow: &[Operation],
        deny: &[Operation],
    ) -> Rule {
        Rule {
            principal: principal.map(str::to_owned),
            host: None,
            target,
            allow: allow.iter().copied().collect(),
            deny: deny.iter().copied().collect(),
        }
    }

    fn topic(pattern: Pattern) -> Target {
        Target::Topic(pattern)
    }

    fn of(rules: &[Rule], principal: &str) -> Access {
        Access::new(
            Arc::new(Rules::new(&["root".to_owned()], rules)),
            principal,
            HERE,
        )
    }

    #[test]
    fn without_rules_everything_is_allowed_and_with_them_nothing_else() {
        let open = Access::new(Arc::new(Rules::new(&[], &[])), "me", HERE);
        assert!(open.may(Write, Resource::Topic("t")) && open.may_some_topic(Write));
        let closed = of(&[], "me");
        assert!(!closed.may(Describe, Resource::Topic("t")) && !closed.may_some_topic(Write));
        assert!(of(&[], "root").may(Alter, Resource::Cluster));
    }

    #[test]
    fn names_are_matched_as_the_pattern_says() {
        let rules = [
            rule(
                Some("me"),
                topic(Pattern::Literal("one".into())),
                &[Read],
                &[],
            ),
            rule(
                Some("me"),
                topic(Pattern::Prefix("log-".into())),
                &[Write],
                &[],
            ),
            rule(None, Target::Group(Pattern::Any), &[Read], &[]),
        ];
        let me = of(&rules, "me");
        assert!(me.may(Read, Resource::Topic("one")));
        assert!(!me.may(Read, Resource::Topic("one2")) && me.may(Read, Resource::Group("x")));
        assert!(me.may(Write, Resource::Topic("log-a")) && !me.may(Write, Resource::Topic("log")));
        assert!(!me.may(Read, Resource::Cluster));
        let you = of(&rules, "you");
        assert!(!you.may(Read, Resource::Topic("one")) && you.may(Read, Resource::Group("one")));
    }

    #[test]
    fn a_denial_beats_what_is_allowed_and_implies_nothing() {
        let rules = [
            rule(Some("me"), topic(Pattern::Any), &[Read, AlterConfigs], &[]),
            rule(None, topic(Pattern::Prefix("secret".into())), &[], &[Read]),
        ];
        let me = of(&rules, "me");
        assert!(
            me.may(Describe, Resource::Topic("t")) && me.may(DescribeConfigs, Resource::Topic("t"))
        );
        assert!(!me.may(Write, Resource::Topic("t")) && !me.may(Delete, Resource::Topic("t")));
        assert!(!me.may(Read, Resource::Topic("secret1")));
        assert!(
            me.may(Describe, Resource::Topic("secret1")),
            "only Read is denied"
        );
        assert_eq!(
            me.operations(Resource::Topic("t")),
            1 << 3 | 1 << 8 | 1 << 10 | 1 << 11
        );
        assert!(of(&rules, "root").may(Read, Resource::Topic("secret1")));
    }

    #[test]
    fn a_rule_may_be_for_a_host_alone() {
        let mut there = rule(Some("me"), Target::Cluster, &[Create], &[]);
        there.host = Some("192.0.2.1".parse().unwrap());
        assert!(!of(&[there.clone()], "me").may(Create, Resource::Cluster));
        let rules = Arc::new(Rules::new(&[], &[there]));
        let host: IpAddr = "::ffff:192.0.2.1".parse().unwrap();
        assert!(Access::new(rules, "me", host).may(Create, Resource::Cluster));
    }

    #[test]
    fn some_topic_is_one_that_is_not_denied() {
        let allowed = rule(
            Some("me"),
            topic(Pattern::Literal("a1".into())),
            &[Write],
            &[],
        );
        let deny = |pattern| rule(None, topic(pattern), &[], &[Write]);
        assert!(of(std::slice::from_ref(&allowed), "me").may_some_topic(Write));
        assert!(!of(std::slice::from_ref(&allowed), "me").may_some_topic(Read));
        for (pattern, left) in [
            (Pattern::Any, false),
            (Pattern::Prefix("a".into()), false),
            (Pattern::Literal("a1".into()), false),
            (Pattern::Literal("a2".into()), true),
        ] {
            let rules = [allowed.clone(), deny(pattern.clone())];
            assert_eq!(of(&rules, "me").may_some_topic(Write), left, "{pattern:?}");
        }
    }
}
