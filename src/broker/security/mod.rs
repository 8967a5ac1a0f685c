//! Who clients are, what they may do, and how much of it.

pub mod acl;
pub mod quota;
pub mod sasl;
pub mod scram;

use std::sync::Arc;

use acl::Rules;
use quota::Quotas;
use sasl::Users;

/// What clients prove at a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Proof {
    /// Who they are, by SASL, before anything else.
    pub sasl: bool,
    /// The mechanism PLAIN is offered: nobody can read the password on its way.
    pub plain: bool,
}

/// The broker's security.
pub struct Security {
    /// Users.
    pub users: Users,
    /// Access rules.
    pub rules: Arc<Rules>,
    /// Quotas.
    pub quotas: Quotas,
}

impl Default for Security {
    /// No users, no rules, no quotas.
    fn default() -> Self {
        Self {
            users: Users::new([]),
            rules: Arc::new(Rules::new(&[], &[])),
            quotas: Quotas::default(),
        }
    }
}
