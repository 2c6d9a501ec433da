//! The state of a consumer that a server keeps on its disk.

use std::collections::BTreeMap;

use super::types::{DeliveryId, Time};

/// A delivery that is not settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pending {
    pub newest: DeliveryId,
    /// The start of its ack clock in the leader's memory.
    pub began: Time,
    /// The start that is stored, the time at which it was written, and the start that was stored before.
    pub stored: (Time, Time, Time),
}

/// The state of a consumer that a server keeps on its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// The first stream sequence that was never delivered.
    pub next: u64,
    /// The number of deliveries so far.
    pub deliveries: u64,
    /// The deliveries that are not settled, by stream sequence.
    pub pending: BTreeMap<u64, Pending>,
    /// The number of attempts of each unsettled message.
    pub counts: BTreeMap<u64, u64>,
}

impl State {
    pub fn new(next: u64) -> Self {
        Self { next, deliveries: 0, pending: BTreeMap::new(), counts: BTreeMap::new() }
    }

    pub fn count(&self, sequence: u64) -> u64 {
        self.counts.get(&sequence).copied().unwrap_or_default()
    }

    pub fn settle(&mut self, sequence: u64) {
        self.pending.remove(&sequence);
        self.counts.remove(&sequence);
    }
}
