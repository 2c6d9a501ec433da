//! One Consume as the desk sees it. Pure.

use std::{collections::BTreeMap, time::Instant};

use crate::pb::ConsumeCredit;

/// An open stream.
#[derive(Debug)]
pub(super) struct WorkStream {
    /// When the last frame came, or when it was opened.
    pub(super) heard: Instant,
    pub(super) is_started: bool,
    /// The proxy has answered.
    pub(super) is_served: bool,
    pub(super) is_half_closed: bool,
    /// The keys of the settlements without a result, by the id of their frame.
    pub(super) sent: BTreeMap<u64, Vec<u64>>,
    last_settle: u64,
    /// The last credit that was sent, and its id.
    credit: Option<u32>,
    credit_sent: u64,
    credit_in_force: u64,
}

impl WorkStream {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            heard: now,
            is_started: false,
            is_served: false,
            is_half_closed: false,
            sent: BTreeMap::new(),
            last_settle: 0,
            credit: None,
            credit_sent: 0,
            credit_in_force: 0,
        }
    }

    pub(super) fn hear(&mut self, now: Instant, credit_id: u64) {
        (self.heard, self.is_served) = (now, true);
        self.credit_in_force = self.credit_in_force.max(credit_id);
    }

    /// The credit to send, if it is another than the last.
    pub(super) fn credit(&mut self, leases: u32, bytes: u64) -> Option<ConsumeCredit> {
        if self.credit == Some(leases) {
            return None;
        }
        self.credit = Some(leases);
        self.credit_sent += 1;
        let max_bytes = Some(bytes);
        Some(ConsumeCredit { id: self.credit_sent, max_leases: Some(leases), max_bytes })
    }

    /// Whether no message can come any more.
    pub(super) fn is_paused(&self) -> bool {
        self.credit == Some(0) && self.credit_in_force == self.credit_sent
    }

    /// The id of a frame with the settlements of these keys.
    pub(super) fn send(&mut self, keys: Vec<u64>) -> u64 {
        self.last_settle += 1;
        self.sent.insert(self.last_settle, keys);
        self.last_settle
    }
}
