//! Performs what the machines of one consumer decide: tells them what happens, and does their steps with
//! the parts that hold the inbox, the leases and the replies. Decides nothing, and waits for nothing: the
//! loop is `task`'s.
//!
//! 1. Nothing is pulled before INFO was read on this very connection: a lease that the server has forgotten
//!    must end before its message can arrive again.
//! 2. Every delivery that arrives is leased in the table before anybody sees it.
//! 3. The steps of the monitor are done before anything else happens to the consumer.

mod monitor_steps;

use std::{sync::Arc, time::Instant};

use tokio::sync::oneshot;

use super::{
    announcer::{Announcer, HeldBack},
    callers::{Caller, Callers, DecidedAnswer},
    handle::{ConsumerCommand, ConsumerHandle},
    info::InfoQuestion,
    leases::ConsumerLeases,
    monitor::{CallerWants, Monitor, MonitorStep},
    poison::PoisonWatch,
    quarantine::SearchResult,
    subscription::{Arrived, Subscription, SubscriptionEvent},
};
use crate::{
    broker::{Broker, ConsumerInfo, ConsumerName, InboxEvent, InfoError, PullEnd, PullRequest},
    clock,
    lessor::{
        Error, core::Core, delivery::GrantedDelivery, flow_queue::FlowEnd, sighting::Sighting,
        spec::ConsumerSpec,
    },
    metrics::ReleaseCause,
    pump::{Allowance, PullOutcome, Step},
};

/// See the [module](self).
pub(super) struct Performer<B: Broker> {
    core: Arc<Core<B>>,
    name: ConsumerName,
    pub(super) monitor: Monitor,
    pub(super) leases: ConsumerLeases<B>,
    /// The callers, and the pump.
    pub(super) callers: Callers,
    pub(super) subscription: Subscription<B>,
    pub(super) announcer: Announcer,
    pub(super) info: InfoQuestion<B>,
    /// The search for poison, and the quarantine.
    pub(super) poison: PoisonWatch<B>,
}

impl<B: Broker> Performer<B> {
    pub(super) fn new(core: Arc<Core<B>>, name: ConsumerName, handle: ConsumerHandle) -> Self {
        let now = clock::now();
        let (spec, known) =
            core.take_left(&name).map_or((None, None), |(spec, known)| (Some(spec), known));
        let leases = ConsumerLeases::new(core.clone(), name.clone(), spec);
        let subscription = Subscription::new(core.clone(), name.clone());
        let server = subscription.link().server().map(AsRef::as_ref);
        Self {
            monitor: Monitor::new(server, known, now),
            leases,
            callers: Callers::new(handle, now),
            subscription,
            announcer: Announcer::default(),
            info: InfoQuestion::new(core.clone(), name.clone()),
            poison: PoisonWatch::new(core.clone(), name.clone()),
            name,
            core,
        }
    }

    /// Does what the monitor says, and opens an inbox once INFO was read on this connection.
    pub(super) async fn prepare(&mut self) {
        let now = clock::now();
        if !self.monitor.is_connected() {
            return;
        }
        if self.silent_at().is_some_and(|at| at <= now) {
            self.monitor.doubt(now);
        }
        // An answer that is due goes first: while the consumer moves, it would say that NATS is away.
        if self.callers.pump.next_deadline(now).is_none_or(|due| due > now) {
            self.move_on(now);
        }
        let waiting = self.callers.are_waiting();
        let pull = waiting && !self.callers.pump.has_pull();
        let wants = CallerWants { waiting: waiting || self.callers.is_spec_wanted(), pull };
        while let Some(step) = self.monitor.step(wants, || self.leases.held() > 0, now) {
            self.do_step(step, None);
        }
        let barred = self.poison.is_searching() || self.poison.suspended(now).is_some();
        if !self.subscription.is_open() && self.monitor.is_read_here() && !barred {
            let kind = self.poison.quarantine.connection();
            if self.subscription.open(kind).await {
                self.callers.pump.up(now);
            }
        }
    }

    /// When a question that has no answer becomes a sign that another server may lead. If INFO does not show a new
    /// leader, a second question would say nothing, so the first one stays.
    pub(super) fn silent_at(&self) -> Option<Instant> {
        let shown = self.leases.spec().is_some_and(|spec| spec.replicated && spec.leader_shows);
        self.info.silent_at().filter(|_| shown && !self.monitor.in_doubt())
    }

    /// Leaves an inbox that is not where the consumer belongs: on a connection that was replaced, or on one
    /// of its own without need any more. Its last pull has ended.
    fn move_on(&mut self, now: Instant) {
        self.subscription.drop_previous(now);
        if !self.subscription.is_quiet() {
            return;
        }
        let released = self.poison.quarantine.release(now) && self.subscription.is_dedicated();
        if self.subscription.is_outdated() || released {
            tracing::info!(consumer = %self.name, "the consumer returns to the shared connection");
            self.subscription.leave(now);
            self.monitor.ask(now);
            self.disconnected(now);
        }
    }

    /// Does what the pump says, until it has nothing more to say.
    pub(super) async fn perform(&mut self) {
        loop {
            let now = clock::now();
            let step = self.callers.step(now, Allowance::NONE);
            // A pull whose end was never told keeps no permit either: others may be waiting for it.
            let open = self.callers.pump.has_pull();
            let freed = self.subscription.free_permits(open, now);
            match step.or_else(|| self.step_to_pull(now)) {
                None if freed => {}
                None => return,
                Some(Step::Pull { no, batch, expires, no_wait, max_bytes }) => {
                    self.pull(PullRequest { no, batch, expires, no_wait, max_bytes }).await;
                }
                Some(Step::Answer { waiter, messages, too_large, why }) => {
                    let answer = DecidedAnswer { waiter, messages, too_large, why };
                    let away = || self.info.why_away(self.subscription.link());
                    self.callers.answer(answer, &self.leases, away, now);
                }
                Some(Step::Deliver { flow, messages }) => self.callers.deliver(flow, messages, now),
                Some(Step::Over { flow }) => self.callers.over(flow),
                Some(Step::Overdue { message }) => {
                    self.leases.release(vec![message], ReleaseCause::Surplus, now);
                }
            }
        }
    }

    /// The pump's next step, if that is a pull and nothing is against it.
    fn step_to_pull(&mut self, now: Instant) -> Option<Step<GrantedDelivery>> {
        let demand = self.callers.pump.demand(now);
        let may = self.monitor.may_pull(now) && !self.announcer.is_announcing();
        let allowed = self.subscription.allow(demand, may, || self.leases.left(), now)?;
        self.callers.step(now, allowed)
    }

    async fn pull(&mut self, pull: PullRequest) {
        let sent = self.subscription.pull(pull).await;
        let now = clock::now();
        if !sent {
            // The pump tries again.
            self.callers.pump.ended(pull.no, PullOutcome::Refused, now);
        } else if let Some(spec) = self.leases.spec() {
            self.poison.quarantine.pulled(spec.longest_ack_wait(), now);
        }
    }

    pub(super) fn subscribed(&mut self, event: SubscriptionEvent, now: Instant) {
        match event {
            SubscriptionEvent::Link(link) => {
                self.monitor.linked(link.server().map(AsRef::as_ref), now);
                self.subscription.set_link(link);
                self.obey(None);
            }
            SubscriptionEvent::Inbox(InboxEvent::Arrived) => {
                let mut arrived = self.subscription.take(now);
                let void = self.monitor.arrived(&arrived.sequences(), now);
                self.obey(None);
                drop(arrived.deliveries.drain(..void));
                self.lease(arrived, now);
            }
            SubscriptionEvent::Inbox(InboxEvent::Lost) => self.disconnected(now),
            SubscriptionEvent::Inbox(InboxEvent::Broken) => {
                if let Some(kind) = self.subscription.broke(now) {
                    self.poison.quarantine.connection_broke(kind);
                    self.monitor.reread();
                    self.monitor.ask(now);
                }
                self.disconnected(now);
            }
            SubscriptionEvent::Previous(event) => {
                if let Some(arrived) = self.subscription.take_late(event, now) {
                    self.monitor.arrived_late(&arrived.sequences());
                    self.lease(arrived, now);
                }
            }
            SubscriptionEvent::Free => {}
        }
    }

    /// Leases what has arrived. If the consumer is gone, so are its deliveries; the ends of pulls count.
    fn lease(&mut self, arrived: Arrived, now: Instant) {
        let granted = self.leases.grant(arrived.deliveries, self.subscription.permits(), now);
        for granted in granted {
            self.hand_on(HeldBack::Message(granted), now);
        }
        for (no, end) in arrived.ends {
            self.hand_on(HeldBack::End(no, end), now);
        }
    }

    /// Tells the pump, once the other replicas know all that they must.
    fn hand_on(&mut self, arrived: HeldBack, now: Instant) {
        if self.announcer.is_announcing() {
            return self.announcer.hold_back(arrived);
        }
        match arrived {
            HeldBack::Message(granted) => self.callers.arrived(granted, now),
            HeldBack::End(no, end) => self.pull_ended(no, end, now),
        }
    }

    /// A pull has ended. Some ends say more than that.
    fn pull_ended(&mut self, no: u64, end: PullEnd, now: Instant) {
        let outcome = self.subscription.ended(no, &end);
        match end {
            PullEnd::Busy(why) => {
                // A limit that INFO tells is kept from the next pull on. A limit that it does not tell, like
                // too many pulls of others, is for the callers to know.
                self.monitor.ask(now);
                if self.subscription.passes_limit() || why.contains("MaxWaiting") {
                    self.callers.fail(&Error::ConsumerBusy(why), now);
                }
            }
            PullEnd::LeaderGone => self.monitor.leader_gone(now),
            PullEnd::ConsumerGone => self.monitor.missed(now),
            PullEnd::Permission(subject) => {
                self.callers.fail(&Error::Permission(subject), now);
                self.disconnected(now);
                self.monitor.reread();
            }
            PullEnd::Other(why) => {
                tracing::warn!(consumer = %self.name, why, "a pull was refused");
            }
            PullEnd::Done | PullEnd::RequestsPending | PullEnd::TooLarge | PullEnd::Spent => {}
        }
        self.obey(None);
        self.callers.pull_ended(no, outcome, now);
        self.subscription.free_permits(self.callers.pump.has_pull(), now);
    }

    fn disconnected(&mut self, now: Instant) {
        let dedicated = self.subscription.close();
        self.monitor.inbox_lost(dedicated, now);
        self.obey(None);
        self.callers.down(now);
    }

    /// # Errors
    /// Why the task ends: the consumer is not there, or not one to lease from.
    pub(super) fn answered(
        &mut self,
        info: &Result<ConsumerInfo, InfoError>,
        now: Instant,
    ) -> Result<(), Error> {
        let (answer, error) = self.info.read(info);
        if let Ok(info) = info {
            self.subscription.set_backlog(info.pending > 0 || info.ack_pending > 0);
        }
        self.monitor.answered(answer, self.subscription.is_outdated(), now);
        let stop = self.obey(info.as_ref().ok());
        if let (Ok(info), Some(spec)) = (info, self.leases.spec()) {
            spec.meter.seen(info.pending, info.ack_pending, now);
        }
        if self.monitor.away(now).is_some() && self.monitor.is_connected() {
            self.info.log_failure(now);
        }
        if let Some(spec) = self.spec_here().filter(|_| info.is_ok()).cloned() {
            self.callers.tell_spec(&Ok(spec));
        }
        let Some(error) = error.filter(|_| stop) else { return Ok(()) };
        // NATS takes half a second to say this. A consumer may be there for those who came meanwhile.
        let gone = matches!(info, Err(InfoError::NoStream | InfoError::NoConsumer));
        if gone && self.callers.fail_earlier(&error, self.info.asked_at(), now) {
            self.monitor.ask(now);
            return Ok(());
        }
        Err(error)
    }

    pub(super) fn searched(&mut self, result: &SearchResult, now: Instant) {
        let found = matches!(result, SearchResult::Found { .. });
        let cut = self.subscription.explain_cut(now).filter(|_| !found);
        if let Some(error) = self.poison.searched(result, cut, now) {
            self.callers.fail(&error, now);
        }
    }

    pub(super) fn command(&mut self, command: ConsumerCommand, now: Instant) {
        match command {
            ConsumerCommand::Join { ticket, want, lease, reply } => {
                self.callers.came(now);
                let caller = Caller { ticket, want, lease, reply, came_at: now };
                // Messages that nobody has taken need no more leases. A last attempt waits without limit.
                let untaken = self.callers.pump.parked() > 0;
                let full = || self.leases.refusal().filter(|_| !untaken);
                match self.poison.suspended(now).or_else(full) {
                    Some(refusal) => caller.refuse(refusal),
                    None => self.callers.join(caller, now),
                }
            }
            ConsumerCommand::Leave(ticket) => self.callers.leave(ticket, now),
            ConsumerCommand::Return(granted) => self.callers.returned(granted, now),
            ConsumerCommand::Open { ticket, credit, queue } => {
                self.callers.came(now);
                match self.poison.suspended(now) {
                    Some(refusal) => queue.end(FlowEnd::Failed(refusal)),
                    None => self.callers.open(ticket, credit, queue, now),
                }
            }
            ConsumerCommand::Credit(ticket, credit) => self.callers.set_credit(ticket, credit, now),
            ConsumerCommand::Freed(ticket) => self.callers.freed(ticket, now),
            ConsumerCommand::Stall(ticket, stalled) => self.callers.stall(ticket, stalled, now),
            ConsumerCommand::Close(ticket) => self.callers.close(ticket, now),
            ConsumerCommand::IsFull(reply) => {
                let _ = reply.send(self.leases.refusal().is_some());
            }
            ConsumerCommand::GiveBack(granted) => {
                self.callers.take_back(granted, &self.leases, now);
            }
            ConsumerCommand::Doubt { missed } => {
                let connected = missed && self.subscription.is_link_current();
                self.monitor.unanswered(connected, now);
            }
            ConsumerCommand::Led(leader) => {
                let known = self.leases.spec().map(|spec| spec.leadership.leader());
                if known.is_some_and(|known| known != leader) {
                    self.monitor.doubt(now);
                }
            }
            ConsumerCommand::Acked(outcome) => self.leases.learn(&outcome),
            ConsumerCommand::Adopted(sequences) => self.monitor.adopted(sequences, now),
            ConsumerCommand::Describe(_) => {}
            ConsumerCommand::Heard(sighting, reply) => self.heard(&sighting, reply, now),
            ConsumerCommand::Know(question) => {
                self.callers.came(now);
                self.callers.want_spec(question);
                if let Some(spec) = self.spec_here().cloned() {
                    self.callers.tell_known_spec(&spec);
                }
                if self.callers.is_spec_wanted() {
                    self.monitor.ask_again(now);
                }
            }
        }
        self.obey(None);
    }

    /// Another replica has seen something. `reply` is answered, or dropped, when nothing that this voids is
    /// settled here any more.
    fn heard(&mut self, sighting: &Sighting, reply: oneshot::Sender<()>, now: Instant) {
        let held = self.leases.held() > 0;
        let wait = self.monitor.heard(sighting, held, now);
        self.obey(None);
        if wait {
            self.callers.wait_for_info(reply);
        }
    }

    /// The spec, if INFO was read on the present connection.
    fn spec_here(&self) -> Option<&Arc<ConsumerSpec>> {
        self.leases.spec().filter(|_| self.monitor.is_read_here())
    }

    /// The other replicas know. The arrivals that were held back continue.
    pub(super) fn others_know(&mut self, now: Instant) {
        self.leases.announce(false);
        for arrived in self.announcer.finish() {
            self.hand_on(arrived, now);
        }
    }

    /// Tells callers that NATS is away, if it is for so long.
    pub(super) fn tell_outage(&mut self, now: Instant) {
        let Some((since, long_at)) = self.monitor.away(now) else { return };
        let unread = || Error::Unavailable("the consumer cannot be read".to_owned());
        let error = self.info.why_away(self.subscription.link()).unwrap_or_else(unread);
        self.callers.fail_since(&error, Some(since).filter(|_| now < long_at), now);
    }
}
