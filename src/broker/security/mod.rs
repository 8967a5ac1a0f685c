//! Who clients are, what they may do, and how much of it.

pub mod acl;
pub mod quota;
pub mod sasl;
pub mod scram;

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, PoisonError, RwLock};

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

/// What the configuration says of clients at a time.
pub struct Loaded {
    /// Users.
    pub users: Users,
    /// Access rules.
    pub rules: Arc<Rules>,
    /// Quotas.
    pub quotas: Quotas,
}

impl Default for Loaded {
    /// No users, no rules, no quotas.
    fn default() -> Self {
        Self {
            users: Users::new([]),
            rules: Arc::new(Rules::new(&[], &[])),
            quotas: Quotas::default(),
        }
    }
}

/// The broker's security. Invariant: it is changed as a whole; whoever looks sees what was loaded at one time.
#[derive(Default)]
pub struct Security {
    current: RwLock<Arc<Loaded>>,
    /// Grows behind each change.
    version: AtomicU64,
}

impl Security {
    /// As loaded.
    pub fn new(loaded: Loaded) -> Self {
        Self {
            current: RwLock::new(Arc::new(loaded)),
            version: AtomicU64::new(0),
        }
    }

    /// What holds now.
    pub fn current(&self) -> Arc<Loaded> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes something else hold, for the next request of every connection.
    pub fn replace(&self, loaded: Loaded) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(loaded);
        self.version.fetch_add(1, Release);
    }

    /// Differs from an earlier one if something else may hold since.
    pub fn version(&self) -> u64 {
        self.version.load(Acquire)
    }
}
