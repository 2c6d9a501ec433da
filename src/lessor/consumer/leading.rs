//! Who leads a consumer that is not led by the one server that we are connected to, and whether that
//! can be relied on just now.
//!
//! A new leader, and one that has started anew, hands out at once what was published more than an
//! ack wait ago and is not settled, whoever holds it, and nobody is told. So after any sign that
//! there may be one (a settlement that did not arrive, a lost connection, INFO without an answer) the
//! consumer is *in doubt*: nothing of it is settled, released or kept alive until INFO has said who
//! leads. If it is another one, all leases are distrusted back to when the old one was last seen. So
//! they are where the same one may have been away without that showing (no copies, or a server
//! before 2.12) and somebody has missed it; and where INFO knows of fewer deliveries than before:
//! after a change those that it does not know are lost; without a change the consumer was reset, and
//! all are void. Never decides about a lease itself.

use std::time::Instant;

use super::ConsumerTask;
use crate::{
    broker::{Broker, ConsumerInfo},
    lessor::table::LEASES_PER_LOCK,
};

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
    /// Since then somebody has found nobody who leads.
    missed: bool,
}

impl Leading {
    pub(super) fn new(now: Instant) -> Self {
        Self { asked_at: now, seen_at: now, known: 0, delivered: 0, missed: false }
    }

    pub(super) fn seen_at(&self) -> Instant {
        self.seen_at
    }

    /// The highest delivery that is known, if `arrived` is the highest that has arrived.
    pub(super) fn known(&self, arrived: u64) -> u64 {
        arrived.max(self.delivered)
    }

    /// `arrived`: the highest delivery that has.
    pub(super) fn asks(&mut self, arrived: u64, now: Instant) {
        (self.known, self.asked_at) = (self.known(arrived), now);
    }

    /// Deliveries are counted anew.
    pub(super) fn forget(&mut self) {
        (self.known, self.delivered) = (0, 0);
    }
}

impl<B: Broker> ConsumerTask<B> {
    /// There may be another leader: asks, and asks anew if the answer on its way may not know.
    pub(super) fn doubt(&mut self, now: Instant) {
        if let Some(spec) = self.spec.as_ref().filter(|spec| spec.is_led_elsewhere()) {
            spec.leadership.doubt();
            (self.asking, self.ask_at) = (None, now);
        }
    }

    /// Nobody leads it at this moment, as far as can be seen.
    pub(super) fn missed(&mut self, now: Instant) {
        self.leading.missed = true;
        self.sighted.unsure();
        self.ask_at = now;
        self.doubt(now);
    }

    /// A settlement was not answered: the leader was not there, unless it is the connection that
    /// was not.
    pub(super) fn unanswered(&mut self, now: Instant) {
        if self.up() && self.lessor.broker.link() == self.link {
            self.missed(now);
        } else {
            self.doubt(now);
        }
    }

    /// INFO says who leads, and how much that remembers.
    pub(super) fn led_by(&mut self, info: &ConsumerInfo, now: Instant) {
        let Leading { asked_at, seen_at, known, missed, .. } = self.leading;
        let delivered = info.delivered;
        self.leading = Leading { seen_at: asked_at, delivered, missed: false, ..self.leading };
        let Some(spec) = &self.spec else { return };
        let changed = spec.leadership.pass_to(info.leader) != info.leader;
        // That a server which is alone has started anew, its connection tells sooner.
        let another = changed && spec.is_led_elsewhere();
        let missed = missed && !spec.leader_shows;
        let forgotten = delivered < known;
        if another || missed || forgotten {
            let consumer = &self.name;
            tracing::info!(%consumer, another, missed, forgotten, "its leader may have forgotten");
            self.distrust(seen_at);
        }
        if forgotten {
            if changed {
                // A server that crashed knows what it had stored: only what is newer is lost.
                let id = spec.id;
                self.lessor.in_steps(|table, after| {
                    table.lose_after(id, delivered, after, LEASES_PER_LOCK)
                });
            } else {
                self.reset(delivered, now);
                self.leading.delivered = delivered;
            }
            self.seen = (delivered, info.delivered_stream);
        }
        self.spec.iter().for_each(|spec| spec.leadership.be_sure());
    }
}
