//! The answers of the table and its reference, in a form that can be compared.

use std::collections::BTreeSet;

use fetch_proxy::lease::{self, SettleKind};

/// An answer of the table to any question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    Nothing,
    Granted { id: u64, superseded: Option<u64> },
    Assigned { deadline: i64, settle_by: i64 },
    Extended(i64),
    Publish,
    Duplicate,
    NakUnconfirmed { ack_wait: i64 },
    Expired { forgotten: bool },
    Settled(SettleKind),
    Busy,
    Finished { after: LeaseStatus, out: bool },
    GivenBack { release: Option<i64> },
    LastAttempt,
    Swept(BTreeSet<Swept>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LeaseStatus {
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

impl From<lease::LeaseError> for Reply {
    fn from(error: lease::LeaseError) -> Self {
        match error {
            lease::LeaseError::Expired { forgotten } => Self::Expired { forgotten },
            lease::LeaseError::Settled { by } => Self::Settled(by),
            lease::LeaseError::Busy => Self::Busy,
        }
    }
}

impl From<lease::LeaseStatus> for LeaseStatus {
    fn from(after: lease::LeaseStatus) -> Self {
        match after {
            lease::LeaseStatus::Held => Self::Held,
            lease::LeaseStatus::Uncertain => Self::Uncertain,
            lease::LeaseStatus::Gone => Self::Gone,
        }
    }
}
