//! Handing over: lends leases to those who waited for them, and takes back what nobody took.

use std::time::Instant;

use super::{ConsumerCommand, ConsumerTask, FetchAnswer};
use crate::{
    broker::Broker,
    clock,
    lease::GivenBack,
    lessor::{
        Error,
        delivery::{GrantedDelivery, LeaseRequest, LeasedDelivery},
        spec::encoded_size,
        table::HeldDelivery,
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
        let (draining, handle) = (why == Why::Draining, self.handle.clone());
        // Where nobody takes it, it comes back as a command.
        let _ = waiter.reply.send(Ok(FetchAnswer { messages, too_large, draining, handle }));
    }

    /// Makes the leases the caller's own. What was lost in the meantime is left out. Without the right
    /// to ack, no lease is longer than the ack wait: nothing could keep it.
    pub(super) fn lend(
        &self,
        granted_deliveries: Vec<GrantedDelivery>,
        lease: &LeaseRequest,
        now: Instant,
    ) -> Vec<LeasedDelivery> {
        self.lessor.table.with(|table| {
            let lend = |granted: GrantedDelivery| {
                let length = lease.length.filter(|wanted| {
                    let ack_wait = granted.spec.ack_wait_of(granted.delivery.delivery_count);
                    *wanted < ack_wait || granted.spec.ack_right.refused().is_none()
                });
                let lent = table.assign(granted.id, length, now).ok()?;
                table.note(granted.id, |hold| hold.worker = Some(lease.worker.clone()));
                let (deadline, settle_by) = (lent.deadline, lent.settle_by);
                let leader = granted.spec.leadership.leader();
                Some(LeasedDelivery { id: granted.id, deadline, settle_by, leader, granted })
            };
            granted_deliveries.into_iter().filter_map(lend).collect()
        })
    }

    /// An answer that nobody took goes to the next waiter.
    pub(super) fn take_back(&mut self, granted_deliveries: Vec<GrantedDelivery>, now: Instant) {
        self.lessor.table.with(|table| {
            for granted in &granted_deliveries {
                table.note(granted.id, |hold| hold.worker = None);
                if granted.last_attempt() {
                    table.keep(granted.id, now);
                }
            }
        });
        let sized = |granted: GrantedDelivery| {
            let (size, last) = (encoded_size(&granted.delivery), granted.last_attempt());
            (granted, size, last)
        };
        self.pump.unhanded(granted_deliveries.into_iter().map(sized).collect(), now);
    }

    /// Gives deliveries back to JetStream that nobody here wants.
    pub(super) fn release(&self, granted_deliveries: Vec<GrantedDelivery>, now: Instant) {
        // Those that stay are dropped after the lock is: freeing places wakes others.
        let back: Vec<GivenBack<HeldDelivery>> = self.lessor.table.with(|table| {
            granted_deliveries
                .iter()
                .filter_map(|granted| table.give_back(granted.id, now))
                .collect()
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
        let last = unhanded.iter().filter(|granted| granted.last_attempt()).count();
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
            self.spec.iter().cloned().for_each(|spec| self.lessor.leave(spec));
        }
        self.commands.close();
        self.lessor.forget_handle(&self.name);
        // Nobody is left to end it.
        self.spec.iter().for_each(|spec| spec.leadership.be_sure());
        let now = clock::now();
        self.fail_waiters(end, now);
        for curious in self.curious.drain(..) {
            let _ = curious.send(Err(end.clone()));
        }
        let mut unhanded = self.pump.take_parked();
        unhanded.extend(self.take_kept_back());
        while let Ok(command) = self.commands.try_recv() {
            match command {
                ConsumerCommand::Join { reply, .. } => drop(reply.send(Err(end.clone()))),
                ConsumerCommand::GiveBack(granted_deliveries) => {
                    unhanded.extend(granted_deliveries)
                }
                ConsumerCommand::Know(reply) => drop(reply.send(Err(end.clone()))),
                ConsumerCommand::Leave(_) | ConsumerCommand::Doubt | ConsumerCommand::Heard(..) => {
                }
            }
        }
        self.release(unhanded, now);
    }
}
