//! What the table and its reference answer, in words that can be compared.

use std::collections::BTreeSet;

use fetch_proxy::lease::{self, Kind};

/// What the table answers, whatever was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    Nothing,
    Granted { id: u64, superseded: Option<u64> },
    Assigned { deadline: i64, settle_by: i64 },
    Extended(i64),
    Publish,
    Duplicate,
    Expired { forgotten: bool },
    Settled(Kind),
    Busy,
    Finished { after: After, out: bool },
    GivenBack { release: Option<i64> },
    Swept(BTreeSet<Swept>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    Held,
    Uncertain,
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Swept {
    Progress(u64),
    Lapsed(u64, Option<i64>),
    Lost(u64),
}

impl From<lease::Refusal> for Reply {
    fn from(refusal: lease::Refusal) -> Self {
        match refusal {
            lease::Refusal::Expired { forgotten } => Self::Expired { forgotten },
            lease::Refusal::Settled { by } => Self::Settled(by),
            lease::Refusal::Busy => Self::Busy,
        }
    }
}

impl From<lease::After> for After {
    fn from(after: lease::After) -> Self {
        match after {
            lease::After::Held => Self::Held,
            lease::After::Uncertain => Self::Uncertain,
            lease::After::Gone => Self::Gone,
        }
    }
}
