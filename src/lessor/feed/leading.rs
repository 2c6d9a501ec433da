//! Who leads a replicated consumer, and whether that can be relied on just now.
//!
//! A new leader hands out at once what was published more than an ack wait ago and is not settled,
//! whoever holds it, and nobody is told. So after any sign that there may be one (a settlement that
//! did not arrive, a lost connection, INFO without an answer) the consumer is *in doubt*: nothing
//! of it is settled or kept alive until INFO has said who leads. If it is another one, all leases
//! are distrusted back to when the old one was last seen. Never decides about a lease itself.

use std::time::Instant;

use super::FeedTask;
use crate::broker::{Broker, Leader};

#[derive(Debug)]
pub(super) struct Leading {
    /// When the present question was asked.
    asked_at: Instant,
    /// When the last question was asked that named the present leader.
    seen_at: Instant,
}

impl Leading {
    pub(super) fn new(now: Instant) -> Self {
        Self { asked_at: now, seen_at: now }
    }

    pub(super) fn asks(&mut self, now: Instant) {
        self.asked_at = now;
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

    /// INFO says who leads.
    pub(super) fn led_by(&mut self, leader: Leader) {
        let Leading { asked_at, seen_at } = self.leading;
        self.leading.seen_at = asked_at;
        let Some(facts) = &self.facts else { return };
        // That a server which is alone has started anew, its connection tells sooner.
        if facts.lead.pass_to(leader) != leader && facts.replicated {
            tracing::info!(consumer = %self.name, "another server leads it");
            self.distrust(seen_at);
        }
        facts.lead.be_sure();
    }
}
