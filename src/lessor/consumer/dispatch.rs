//! Handing over: lends leases to those who waited for them, and takes back what nobody took.

use std::time::Instant;

use super::{Answer, Command, ConsumerTask};
use crate::{
    broker::Broker,
    clock,
    lease::GivenBack,
    lessor::{
        Error,
        delivery::{GrantedDelivery, LeasedDelivery, Loan},
        spec::encoded_size,
        table::Hold,
    },
    pump::{WaiterId, Why},
};

impl<B: Broker> ConsumerTask<B> {
    /// Takes in who else is about to join, so that one pull is for all of them: callers that were
    /// answered together come back together.
    pub(super) async fn gather(&mut self) {
        if self.pump.waiters() > 0 {
            tokio::task::yield_now().await;
        }
        while let Ok(command) = self.commands.try_recv() {
            self.command(command, clock::now());
        }
    }

    pub(super) fn answer(
        &mut self,
        id: WaiterId,
        messages: Vec<GrantedDelivery>,
        too_large: Option<GrantedDelivery>,
        why: Why,
        now: Instant,
    ) {
        let Some(waiter) = self.waiters.remove(&id) else {
            return self.take_back(messages.into_iter().chain(too_large).collect(), now);
        };
        self.tickets.remove(&waiter.ticket);
        let found = !messages.is_empty() || too_large.is_some();
        let messages = self.lend(messages, &waiter.lease, now);
        let too_large = self.lend(Vec::from_iter(too_large), &waiter.lease, now).pop();
        if found && messages.is_empty() && too_large.is_none() && now < waiter.want.until {
            // All that it had was lost in the meantime; the call goes on waiting.
            return self.join(waiter, now);
        }
        if !found && why == Why::Down {
            let away = Error::Unavailable(self.why_away());
            let _ = waiter.reply.send(Err(away));
            return;
        }
        let (draining, feed) = (why == Why::Draining, self.feed.clone());
        // Where nobody takes it, it comes back as a command.
        let _ = waiter.reply.send(Ok(Answer { messages, too_large, draining, feed }));
    }

    /// Makes the leases the caller's own. What was lost in the meantime is left out. Without the right
    /// to ack, no lease is longer than the ack wait: nothing could keep it.
    pub(super) fn lend(
        &self,
        parcels: Vec<GrantedDelivery>,
        lease: &Loan,
        now: Instant,
    ) -> Vec<LeasedDelivery> {
        self.lessor.books.with(|table| {
            let lend = |parcel: GrantedDelivery| {
                let length = lease.length.filter(|wanted| {
                    let ack_wait = parcel.facts.ack_wait_of(parcel.delivery.delivery_count);
                    *wanted < ack_wait || parcel.facts.ack_right.refused().is_none()
                });
                let lent = table.lend(parcel.id, length, now).ok()?;
                table.note(parcel.id, |hold| hold.worker = Some(lease.worker.clone()));
                let (deadline, settle_by) = (lent.deadline, lent.settle_by);
                let leader = parcel.facts.lead.leader();
                Some(LeasedDelivery { id: parcel.id, deadline, settle_by, leader, parcel })
            };
            parcels.into_iter().filter_map(lend).collect()
        })
    }

    /// An answer that nobody took goes to the next waiter.
    pub(super) fn take_back(&mut self, parcels: Vec<GrantedDelivery>, now: Instant) {
        self.lessor.books.with(|table| {
            for parcel in &parcels {
                table.note(parcel.id, |hold| hold.worker = None);
                if parcel.last_attempt() {
                    table.keep(parcel.id, now);
                }
            }
        });
        let sized = |parcel: GrantedDelivery| {
            let (size, last) = (encoded_size(&parcel.delivery), parcel.last_attempt());
            (parcel, size, last)
        };
        self.pump.unhanded(parcels.into_iter().map(sized).collect(), now);
    }

    /// Gives deliveries back to JetStream that nobody here wants.
    pub(super) fn release(&self, parcels: Vec<GrantedDelivery>, now: Instant) {
        // Those that stay are dropped after the lock is: freeing places wakes others.
        let back: Vec<GivenBack<Hold>> = self.lessor.books.with(|table| {
            parcels.iter().filter_map(|parcel| table.give_back(parcel.id, now)).collect()
        });
        let released = back.into_iter().filter_map(|back| Some((back.payload, back.release?)));
        self.lessor.release(released.collect());
    }

    /// Nobody waits any more, and no lease is held of which it would have to know who leads.
    pub(super) fn drained(&mut self, now: Instant) -> bool {
        if !self.draining || self.pump.waiters() > 0 || self.sighted.is_busy() {
            return false;
        }
        let unhanded = self.pump.take_parked();
        // Nobody can take it any more, and an heir would not have the message itself.
        let last = unhanded.iter().filter(|parcel| parcel.last_attempt()).count();
        if last > 0 {
            let consumer = &self.name;
            tracing::warn!(%consumer, last, "last attempts that nobody has taken are let go");
        }
        self.release(unhanded, now);
        self.held() == 0
    }

    pub(super) fn fail_waiters(&mut self, error: &Error, now: Instant) {
        for id in self.pump.fail(now) {
            if let Some(waiter) = self.waiters.remove(&id) {
                self.tickets.remove(&waiter.ticket);
                let _ = waiter.reply.send(Err(error.clone()));
            }
        }
    }

    /// Answers whoever is left, and those who join in the last moment.
    pub(super) fn finish(mut self, end: &Error) {
        if self.sighted.contradicted() {
            // Nobody is left to find out which of the two it is.
            self.end_leases();
        }
        if self.held() > 0 {
            self.facts.iter().cloned().for_each(|facts| self.lessor.leave(facts));
        }
        self.commands.close();
        self.lessor.forget_feed(&self.name);
        // Nobody is left to end it.
        self.facts.iter().for_each(|facts| facts.lead.be_sure());
        let now = clock::now();
        self.fail_waiters(end, now);
        for curious in self.curious.drain(..) {
            let _ = curious.send(Err(end.clone()));
        }
        let mut unhanded = self.pump.take_parked();
        unhanded.extend(self.take_kept_back());
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Join { reply, .. } => drop(reply.send(Err(end.clone()))),
                Command::GiveBack(parcels) => unhanded.extend(parcels),
                Command::Know(reply) => drop(reply.send(Err(end.clone()))),
                Command::Leave(_) | Command::Doubt | Command::Heard(..) => {}
            }
        }
        self.release(unhanded, now);
    }
}
