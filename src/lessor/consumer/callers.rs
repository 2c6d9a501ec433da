//! Everybody who waits for the task of a consumer: open Fetch calls, calls that want to know the spec, and
//! replicas that wait until INFO has been read. Owns their replies, and the pump, which says who is answered
//! when and with what. Decides nothing itself.
//!
//! Each of them is answered once, also when the task ends.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{
    handle::{ConsumerHandle, DeliveryGuard, FetchAnswer, FetchReply, SpecQuestion, Ticket},
    leases::ConsumerLeases,
    open_flows::OpenFlows,
};
use crate::{
    broker::Broker,
    lessor::{
        Error,
        delivery::{AnswerEnd, GrantedDelivery, LeaseRequest},
        flow_queue::{FlowEnd, FlowQueue},
        metered,
        spec::{ConsumerSpec, encoded_size},
    },
    metrics::{ConsumerMeter, PullResult, PumpState, ShownPump},
    pump::{Allowance, Credit, FlowId, PullLimits, PullOutcome, Pump, Step, WaiterId, Want, Why},
};

/// A task without callers and leases ends after this.
const MAX_IDLE: Duration = Duration::from_secs(600);

/// One open Fetch.
pub(super) struct Caller {
    pub(super) ticket: Ticket,
    pub(super) want: Want,
    pub(super) lease: LeaseRequest,
    pub(super) reply: FetchReply,
    pub(super) came_at: Instant,
}

/// An answer as the pump has decided it.
pub(super) struct DecidedAnswer {
    pub(super) waiter: WaiterId,
    pub(super) messages: Vec<GrantedDelivery>,
    pub(super) too_large: Option<GrantedDelivery>,
    pub(super) why: Why,
}

/// See the [module](self).
pub(super) struct Callers {
    pub(super) pump: Pump<GrantedDelivery>,
    /// The way to the task, for answers that are not taken.
    handle: ConsumerHandle,
    waiting: BTreeMap<WaiterId, Caller>,
    tickets: HashMap<Ticket, WaiterId>,
    flows: OpenFlows,
    want_spec: Vec<SpecQuestion>,
    replicas: Vec<oneshot::Sender<()>>,
    /// When somebody came last.
    last_came_at: Instant,
    /// What the metrics show; `None` until JetStream knows the consumer.
    shown: Option<ShownPump>,
}

impl Callers {
    pub(super) fn new(handle: ConsumerHandle, now: Instant) -> Self {
        // Until INFO is read, nothing is pulled.
        let limits = PullLimits {
            max_batch: 1,
            max_unsettled: u32::MAX,
            max_expires: Duration::MAX,
            max_request_bytes: None,
            park: Duration::from_secs(1),
            linger: Duration::ZERO,
        };
        Self {
            pump: Pump::new(limits),
            handle,
            waiting: BTreeMap::new(),
            tickets: HashMap::new(),
            flows: OpenFlows::default(),
            want_spec: Vec::new(),
            replicas: Vec::new(),
            last_came_at: now,
            shown: None,
        }
    }

    /// JetStream knows the consumer. The name stays, so the first meter is that of all incarnations.
    pub(super) fn known(&mut self, meter: &ConsumerMeter) {
        let meter = self.handle.meter.get_or_init(|| meter.clone());
        self.shown.get_or_insert_with(|| meter.pump());
    }

    /// Shows the pump in the metrics.
    pub(super) fn show(&mut self) {
        let waiters = self.count();
        if let Some(shown) = &mut self.shown {
            let wanted = self.pump.wanted();
            let (pulled, parked) = (self.pump.pulled(), self.pump.parked());
            shown.show(PumpState { waiters, wanted, pulled, parked });
        }
    }

    /// A message has arrived.
    pub(super) fn arrived(&mut self, granted: GrantedDelivery, now: Instant) {
        let (size, last) = (encoded_size(&granted.delivery), granted.last_attempt());
        self.pull_may_end(PullResult::Full, |pump| pump.arrived(granted, size, last, now));
    }

    /// The end of a pull was heard.
    pub(super) fn pull_ended(&mut self, no: u64, outcome: PullOutcome, now: Instant) {
        self.pull_may_end(metered::pull(outcome), |pump| pump.ended(no, outcome, now));
    }

    /// The connection is lost.
    pub(super) fn down(&mut self, now: Instant) {
        self.pull_may_end(PullResult::Lost, |pump| pump.down(now));
    }

    /// The next step of the pump.
    pub(super) fn step(
        &mut self,
        now: Instant,
        allowed: Allowance,
    ) -> Option<Step<GrantedDelivery>> {
        self.pull_may_end(PullResult::Unheard, |pump| pump.step(now, allowed))
    }

    /// Counts the open pull if `act` ends it.
    fn pull_may_end<R>(
        &mut self,
        end: PullResult,
        act: impl FnOnce(&mut Pump<GrantedDelivery>) -> R,
    ) -> R {
        let open = self.pump.has_pull();
        let result = act(&mut self.pump);
        if open && !self.pump.has_pull() {
            self.handle.meter.get().iter().for_each(|meter| meter.pulled(end));
        }
        result
    }

    /// Those who wait for messages.
    pub(super) fn count(&self) -> usize {
        self.pump.waiters() + self.pump.flows()
    }

    /// Somebody waits for messages.
    pub(super) fn are_waiting(&self) -> bool {
        self.count() > 0
    }

    /// One more flow.
    pub(super) fn open(
        &mut self,
        ticket: Ticket,
        credit: Credit,
        queue: Arc<FlowQueue>,
        now: Instant,
    ) {
        let id = self.pump.open_flow(credit, now);
        self.flows.add(id, ticket, queue, now);
    }

    /// A flow has another credit.
    pub(super) fn set_credit(&mut self, ticket: Ticket, credit: Credit, now: Instant) {
        self.flows.id(ticket).into_iter().for_each(|id| self.pump.set_credit(id, credit, now));
    }

    /// A flow has freed credit, or is about to.
    pub(super) fn freed(&mut self, ticket: Ticket, now: Instant) {
        if let Some(id) = self.flows.id(ticket)
            && let Some(queue) = self.flows.queue(id)
        {
            let (freed, settling) = queue.account.take_freed();
            self.pump.freed(id, freed, now);
            self.pump.settling(id, settling, now);
        }
    }

    /// The client of a flow does not read, or reads again.
    pub(super) fn stall(&mut self, ticket: Ticket, stalled: bool, now: Instant) {
        self.flows.id(ticket).into_iter().for_each(|id| self.pump.stall_flow(id, stalled, now));
    }

    /// A flow has gone.
    pub(super) fn close(&mut self, ticket: Ticket, now: Instant) {
        if let Some(id) = self.flows.id(ticket) {
            self.pump.close_flow(id, now);
            self.flows.end(id, FlowEnd::Over);
        }
    }

    /// The pump has messages for a flow.
    pub(super) fn deliver(&self, id: FlowId, messages: Vec<(GrantedDelivery, u64)>, now: Instant) {
        match self.flows.queue(id) {
            Some(queue) => queue.deliver(messages, now),
            None => {
                self.handle.give_back(messages.into_iter().map(|(granted, _)| granted).collect())
            }
        }
    }

    /// A flow gets nothing more, because of a drain.
    pub(super) fn over(&mut self, id: FlowId) {
        self.flows.end(id, FlowEnd::Over);
    }

    /// When nobody has come for so long that the task may end.
    pub(super) fn idle_at(&self) -> Instant {
        self.last_came_at + MAX_IDLE
    }

    /// Somebody has come, who is refused or waits.
    pub(super) fn came(&mut self, now: Instant) {
        self.last_came_at = now;
    }

    /// One more caller waits for messages.
    pub(super) fn join(&mut self, caller: Caller, now: Instant) {
        let id = self.pump.join(caller.want.clone(), now);
        self.tickets.insert(caller.ticket, id);
        self.waiting.insert(id, caller);
    }

    /// A caller has gone.
    pub(super) fn leave(&mut self, ticket: Ticket, now: Instant) {
        if let Some(id) = self.tickets.remove(&ticket) {
            self.waiting.remove(&id);
            self.pump.leave(id, now);
        }
    }

    /// Answers a caller. `away` says why NATS is away, if it is known to be.
    pub(super) fn answer<B: Broker>(
        &mut self,
        answer: DecidedAnswer,
        leases: &ConsumerLeases<B>,
        away: impl FnOnce() -> Option<Error>,
        now: Instant,
    ) {
        let DecidedAnswer { waiter, messages, too_large, why } = answer;
        let Some(caller) = self.take(waiter) else {
            return self.take_back(messages.into_iter().chain(too_large).collect(), leases, now);
        };
        let found = !messages.is_empty() || too_large.is_some();
        let end = AnswerEnd::default();
        let messages = leases.assign(messages, (&caller.lease, &end), now);
        let too_large = leases.assign(Vec::from_iter(too_large), (&caller.lease, &end), now).pop();
        if found && messages.is_empty() && too_large.is_none() && now < caller.want.until {
            // All that it had was lost meanwhile; the call continues to wait.
            return self.join(caller, now);
        }
        // If nothing is known against NATS, the call itself finds out why there is nothing.
        if !found
            && why == Why::Down
            && let Some(error) = away()
        {
            return caller.refuse(error);
        }
        let (draining, handle) = (why == Why::Draining, self.handle.clone());
        let deliveries = DeliveryGuard::new(messages, too_large, handle, end);
        // If nobody takes the answer, its messages come back as a command.
        let _ = caller.reply.send(Ok(FetchAnswer { deliveries, draining }));
    }

    /// Nobody has taken these: they go to the next caller.
    pub(super) fn take_back<B: Broker>(
        &mut self,
        granted: Vec<GrantedDelivery>,
        leases: &ConsumerLeases<B>,
        now: Instant,
    ) {
        leases.take_back(&granted, now);
        self.pump.unhanded(sized(granted), now);
    }

    /// Their caller has given these back: they go to the next caller, of this replica or of another one.
    pub(super) fn returned(&mut self, granted: Vec<GrantedDelivery>, now: Instant) {
        self.pump.returned(sized(granted), now);
    }

    /// Tells an error to those who had come by `asked_at`. Returns whether others wait.
    pub(super) fn fail_earlier(&mut self, error: &Error, asked_at: Instant, now: Instant) -> bool {
        let earlier = |_: &_, caller: &mut Caller| caller.came_at <= asked_at;
        for (id, caller) in self.waiting.extract_if(.., earlier) {
            self.tickets.remove(&caller.ticket);
            self.pump.leave(id, now);
            caller.refuse(error.clone());
        }
        for id in self.flows.fail(error, |came_at| came_at <= asked_at) {
            self.pump.close_flow(id, now);
        }
        !self.waiting.is_empty() || !self.flows.is_empty()
    }

    /// Tells all who wait for messages of an error.
    pub(super) fn fail(&mut self, error: &Error, now: Instant) {
        self.fail_since(error, None, now);
    }

    /// The same, but of flows only those that have come since then.
    pub(super) fn fail_since(&mut self, error: &Error, since: Option<Instant>, now: Instant) {
        for id in self.pump.fail(now) {
            if let Some(caller) = self.take(id) {
                caller.refuse(error.clone());
            }
        }
        let late = |came_at| since.is_none_or(|since| came_at >= since);
        for id in self.flows.fail(error, late) {
            self.pump.close_flow(id, now);
        }
    }

    /// Whether somebody waits who hears at once that NATS is away since then.
    pub(super) fn are_impatient(&self, away_since: Instant) -> bool {
        self.pump.waiters() > 0 || self.flows.any_since(away_since)
    }

    /// Whether there are flows.
    pub(super) fn has_flows(&self) -> bool {
        !self.flows.is_empty()
    }

    /// Somebody wants to know the spec.
    pub(super) fn want_spec(&mut self, question: SpecQuestion) {
        self.want_spec.push(question);
    }

    /// Whether somebody still waits for the spec.
    pub(super) fn is_spec_wanted(&self) -> bool {
        !self.want_spec.is_empty()
    }

    /// Tells the spec to those who want this one.
    pub(super) fn tell_known_spec(&mut self, spec: &Arc<ConsumerSpec>) {
        let right = |wanted: &mut SpecQuestion| {
            wanted.created.as_ref().is_none_or(|created| *created == spec.created)
                && wanted.leader.is_none_or(|leader| leader == spec.leadership.leader())
        };
        for question in self.want_spec.extract_if(.., right) {
            let _ = question.reply.send(Ok(spec.clone()));
        }
    }

    /// Tells the spec that was just read, or why there is none, to all who want to know it.
    pub(super) fn tell_spec(&mut self, spec: &Result<Arc<ConsumerSpec>, Error>) {
        for question in self.want_spec.drain(..) {
            let _ = question.reply.send(spec.clone());
        }
    }

    /// A replica waits until INFO has been read.
    pub(super) fn wait_for_info(&mut self, reply: oneshot::Sender<()>) {
        self.replicas.push(reply);
    }

    pub(super) fn has_replicas(&self) -> bool {
        !self.replicas.is_empty()
    }

    /// INFO was read.
    pub(super) fn answer_replicas(&mut self) {
        for reply in self.replicas.drain(..) {
            let _ = reply.send(());
        }
    }

    fn take(&mut self, id: WaiterId) -> Option<Caller> {
        let caller = self.waiting.remove(&id)?;
        self.tickets.remove(&caller.ticket);
        Some(caller)
    }
}

impl Caller {
    pub(super) fn refuse(self, error: Error) {
        let _ = self.reply.send(Err(error));
    }
}

/// Each delivery with its size, and whether it is the last attempt.
fn sized(granted: Vec<GrantedDelivery>) -> Vec<(GrantedDelivery, u64, bool)> {
    let sized = |granted: GrantedDelivery| {
        let (size, last) = (encoded_size(&granted.delivery), granted.last_attempt());
        (granted, size, last)
    };
    granted.into_iter().map(sized).collect()
}
