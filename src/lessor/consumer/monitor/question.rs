//! Whether CONSUMER.INFO is asked, and when it is asked next.
//!
//! ```text
//!    ┌──────── nobody needs the answer ────────▶ UNNEEDED
//!   DUE ◀────────────── a sign ─────────────────────┘
//!    │ ▲
//!    ▼ │ answered, or dropped
//!   OPEN
//! ```

use std::time::Instant;

/// See the [module](self).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Question {
    /// It is to be asked then.
    Due(Instant),
    /// It is due, and nobody needs the answer.
    Unneeded,
    /// It was asked.
    Open {
        /// When.
        at: Instant,
        /// The highest consumer sequence that was known then. The answer need not know later ones.
        known: u64,
    },
}

impl Question {
    pub(super) fn is_open(self) -> bool {
        matches!(self, Self::Open { .. })
    }

    /// When it is to be asked.
    pub(super) fn due_at(self) -> Option<Instant> {
        match self {
            Self::Due(at) => Some(at),
            Self::Unneeded | Self::Open { .. } => None,
        }
    }

    /// It is to be asked now, if somebody needs the answer.
    pub(super) fn is_due(self, now: Instant) -> bool {
        match self {
            Self::Due(at) => at <= now,
            Self::Unneeded => true,
            Self::Open { .. } => false,
        }
    }

    /// If it is not open, it is to be asked at this time, whatever was planned.
    pub(super) fn plan(&mut self, at: Instant) {
        if !self.is_open() {
            *self = Self::Due(at);
        }
    }

    /// If it is not open, it is to be asked at this time at the latest.
    pub(super) fn plan_by(&mut self, at: Instant) {
        if self.due_at().is_none_or(|due| at < due) {
            self.plan(at);
        }
    }

    /// It is to be asked, and an answer to the open one does not count. Returns whether there was an open one.
    pub(super) fn drop_open(&mut self, now: Instant) -> bool {
        let open = self.is_open();
        *self = Self::Due(now);
        open
    }
}
