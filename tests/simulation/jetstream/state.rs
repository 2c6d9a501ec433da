//! The state of a consumer, as the leader has it in memory and as copies and disks have it.

use std::collections::BTreeMap;

use super::types::{DeliveryId, Time};

/// A delivery that is not settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pending {
    pub newest: DeliveryId,
    /// The consumer sequence of the first attempt. Later attempts keep it (trackPending).
    first: u64,
    /// The start of its ack clock, and `BEFORE`.
    pub began: Time,
}

/// A change of a consumer's state, as the leader writes it to its disk or to the other copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// An attempt. Its ack clock is stored with the time of publication (consumer.go:5785).
    Delivered {
        sequence: u64,
        attempt: u64,
        newest: DeliveryId,
        published: Time,
    },
    /// The start of its ack clock has another value.
    Moved {
        sequence: u64,
        began: Time,
    },
    Settled {
        sequence: u64,
    },
    /// All attempts are over, so it is no longer pending. The number of its attempts stays.
    Exhausted {
        sequence: u64,
    },
    /// Messages before this sequence do not match the filter.
    Skipped {
        next: u64,
    },
    Reset {
        next: u64,
    },
}

/// All below these sequences is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Floor {
    consumer: u64,
    stream: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// The first stream sequence that was never looked at.
    pub next: u64,
    /// The highest stream sequence that was delivered.
    pub last: u64,
    /// The number of deliveries so far.
    pub deliveries: u64,
    /// The deliveries that are not settled, by stream sequence.
    pub pending: BTreeMap<u64, Pending>,
    /// The number of attempts of each message that is not settled, also after the last attempt.
    attempts: BTreeMap<u64, u64>,
    floor: Floor,
}

impl State {
    pub fn new(next: u64) -> Self {
        Self {
            next,
            last: next - 1,
            deliveries: 0,
            pending: BTreeMap::new(),
            attempts: BTreeMap::new(),
            floor: Floor { consumer: 0, stream: next - 1 },
        }
    }

    pub fn attempts(&self, sequence: u64) -> u64 {
        self.attempts.get(&sequence).copied().unwrap_or_default()
    }

    /// Whether a Nak with this consumer sequence is ignored, although it is answered (consumer.go:3253).
    /// After a reset, or at a new consumer of the same name, many old Naks are.
    pub fn ignores_nak(&self, consumer_sequence: u64) -> bool {
        consumer_sequence <= self.floor.consumer || consumer_sequence > self.deliveries + 1
    }

    pub fn record(&mut self, entry: &Entry) {
        match *entry {
            Entry::Delivered { sequence, attempt, newest, published } => {
                self.next = self.next.max(sequence + 1);
                self.last = self.last.max(sequence);
                self.deliveries += 1;
                self.attempts.insert(sequence, attempt);
                let new = Pending { newest, first: self.deliveries, began: published };
                let pending = self.pending.entry(sequence).or_insert(new);
                (pending.newest, pending.began) = (newest, published);
            }
            Entry::Moved { sequence, began } => {
                if let Some(pending) = self.pending.get_mut(&sequence) {
                    pending.began = began;
                }
            }
            Entry::Settled { sequence } => {
                self.end(sequence);
                self.attempts.remove(&sequence);
            }
            Entry::Exhausted { sequence } => self.end(sequence),
            Entry::Skipped { next } => self.next = self.next.max(next),
            Entry::Reset { next } => *self = Self::new(next),
        }
    }

    /// It is no longer pending, so the floor may rise (consumer.go: moveAckFloor).
    fn end(&mut self, sequence: u64) {
        let Some(ended) = self.pending.remove(&sequence) else { return };
        if self.pending.is_empty() {
            self.floor = Floor { consumer: self.deliveries, stream: self.next - 1 };
        } else if ended.first == self.floor.consumer + 1 {
            let next = self.pending.range(sequence + 1..).next();
            self.floor = match next {
                Some((next, pending)) => Floor { consumer: pending.first - 1, stream: next - 1 },
                None => Floor { consumer: ended.first, stream: sequence },
            };
        }
    }
}
