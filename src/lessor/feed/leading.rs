//! Who leads a replicated consumer, and whether that can be relied on just now.
//!
//! A new leader hands out at once what was published more than an ack wait ago and is not settled,
//! whoever holds it, and nobody is told. So after any sign that there may be one (a settlement that
//! did not arrive, a lost connection, INFO without an answer) the consumer is *in doubt*: nothing
//! of it is settled or kept alive until INFO has said who leads. If it is another one, all leases
//! are distrusted back to when the old one was last seen; so they are if INFO knows of fewer
//! deliveries than before, and those that it does not know are lost. Never decides about a lease
//! itself.

use std::time::Instant;

use super::{FeedTask, STEP};
use crate::broker::{Broker, ConsumerInfo};

#[derive(Debug)]
pub(super) struct Leading {
    /// When the present question was asked.
    asked_at: Instant,
    /// When the last question was asked that named the present leader.
    seen_at: Instant,
    /// The highest delivery, by its consumer sequence, that was known when the present question was
    /// asked. What has arrived since then, its answer need not know.
    known: u64,
    /// The highest delivery that the last answer knew.
    delivered: u64,
}

impl Leading {
    pub(super) fn new(now: Instant) -> Self {
        Self { asked_at: now, seen_at: now, known: 0, delivered: 0 }
    }

    /// `arrived`: the highest delivery that has.
    pub(super) fn asks(&mut self, arrived: u64, now: Instant) {
        (self.known, self.asked_at) = (arrived.max(self.delivered), now);
    }
}

impl<B: Broker> FeedTask<B> {
    /// There may be another leader: asks, and asks anew if the answer on its way may not know.
    pub(super) fn doubt(&mut self, now: Instant) {
        if let Some(facts) = self.facts.as_ref().filter(|facts| facts.replicated) {
            facts.lead.doubt();
            (self.asking, self.ask_at) = (None, now);
        }
    }

    /// INFO says who leads, and how much that remembers.
    pub(super) fn led_by(&mut self, info: &ConsumerInfo) {
        let Leading { asked_at, seen_at, known, .. } = self.leading;
        (self.leading.seen_at, self.leading.delivered) = (asked_at, info.delivered);
        let Some(facts) = &self.facts else { return };
        // That a server which is alone has started anew, its connection tells sooner.
        let another = facts.lead.pass_to(info.leader) != info.leader && facts.replicated;
        let forgotten = info.delivered < known;
        if another || forgotten {
            let consumer = &self.name;
            tracing::info!(%consumer, another, forgotten, "what its leader has promised is in doubt");
            self.distrust(seen_at);
        }
        if forgotten {
            let (id, delivered) = (facts.id, info.delivered);
            self.lessor.in_steps(|table, after| table.lose_after(id, delivered, after, STEP));
            self.seen = (info.delivered, info.delivered_stream);
        }
        facts.lead.be_sure();
    }
}
