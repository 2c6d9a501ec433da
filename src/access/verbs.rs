//! Verbs: the kinds of call that a rule allows.

use std::fmt;

/// A kind of call, as rights are asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Fetch.
    Fetch,
    /// Ack, Nak and Term, for tokens of one's own principal.
    Settle,
    /// Extend, for tokens of one's own principal.
    Extend,
    /// Ack, Nak, Term and Extend, also for tokens of other principals.
    SettleAny,
    /// Reading calls for operators.
    Inspect,
    /// Changing calls for operators.
    Admin,
}

impl Verb {
    /// All verbs.
    pub const ALL: [Self; 6] =
        [Self::Fetch, Self::Settle, Self::Extend, Self::SettleAny, Self::Inspect, Self::Admin];

    /// The verb in a policy file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fetch => "fetch",
            Self::Settle => "settle",
            Self::Extend => "extend",
            Self::SettleAny => "settle-any",
            Self::Inspect => "inspect",
            Self::Admin => "admin",
        }
    }

    /// The verb with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|verb| verb.name() == name)
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// Some verbs.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct VerbSet(u8);

impl VerbSet {
    /// No verb.
    pub const NONE: Self = Self(0);

    /// The verbs that a word of a policy file allows. `work` is fetch, settle and extend. `settle-any`
    /// includes settle and extend.
    ///
    /// # Errors
    /// The words that are known, for people.
    pub fn parse(word: &str) -> Result<Self, String> {
        match (word, Verb::named(word)) {
            ("work", _) => Ok([Verb::Fetch, Verb::Settle, Verb::Extend].into_iter().collect()),
            (_, Some(Verb::SettleAny)) => {
                Ok([Verb::Settle, Verb::Extend, Verb::SettleAny].into_iter().collect())
            }
            (_, Some(verb)) => Ok([verb].into_iter().collect()),
            (_, None) => Err(format!(
                "`{word}` is no verb: it must be work, fetch, settle, extend, settle-any, inspect \
                 or admin"
            )),
        }
    }

    /// Whether the verb is among them.
    pub fn has(self, verb: Verb) -> bool {
        self.0 & verb.bit() != 0
    }

    /// The verbs of both.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl FromIterator<Verb> for VerbSet {
    fn from_iter<I: IntoIterator<Item = Verb>>(verbs: I) -> Self {
        Self(verbs.into_iter().fold(0, |bits, verb| bits | verb.bit()))
    }
}

impl fmt::Display for VerbSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Verb::ALL.into_iter().filter(|verb| self.has(*verb)).map(Verb::name);
        f.write_str(&names.collect::<Vec<_>>().join(", "))
    }
}

impl fmt::Debug for VerbSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VerbSet({self})")
    }
}
