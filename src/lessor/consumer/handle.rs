//! The way to the task behind a consumer: what it can be asked for, and what a Fetch is answered. Decides
//! nothing.

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use crate::{
    broker::{BrokerError, ConsumerInfo, Leader},
    lease::LeaseId,
    lessor::{
        Error,
        attempt_call::FirstAnswer,
        delivery::{
            AnswerEnd, GrantedDelivery, LeaseRequest, LeasedDelivery, Rejected, RejectedCause,
        },
        flow_queue::FlowQueue,
        sighting::Sighting,
        spec::ConsumerSpec,
    },
    metrics::ConsumerMeter,
    pump::{Credit, Want},
};
use tokio::sync::{Mutex, mpsc, oneshot};

/// Names one open Fetch to its consumer's task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::lessor) struct Ticket(pub(in crate::lessor) u64);

/// The answer to a Fetch.
#[derive(Debug)]
pub(in crate::lessor) struct FetchAnswer {
    pub(in crate::lessor) deliveries: DeliveryGuard,
    pub(in crate::lessor) draining: bool,
}

/// The deliveries of an answer, from the answer of the consumer's task until the answer is written to its
/// client. A guard that is dropped before [`DeliveryGuard::deliver`] gives them back.
#[derive(Debug)]
pub struct DeliveryGuard {
    pub(in crate::lessor) messages: Vec<LeasedDelivery>,
    pub(in crate::lessor) rejected: Vec<Rejected>,
    /// The way back. `None`: the messages stay leased if the answer is not written, because an earlier answer has
    /// them, too.
    pub(in crate::lessor) handle: Option<ConsumerHandle>,
    /// The attempt of which this is the first answer.
    pub(in crate::lessor) attempt: Option<FirstAnswer>,
    pub(in crate::lessor) end: AnswerEnd,
}

impl DeliveryGuard {
    /// Guards an answer of messages, and of a message that does not fit even alone.
    pub(in crate::lessor) fn new(
        messages: Vec<LeasedDelivery>,
        too_large: Option<LeasedDelivery>,
        handle: ConsumerHandle,
        end: AnswerEnd,
    ) -> Self {
        let cause = RejectedCause::TooLarge;
        let rejected = too_large.map(|leased| Rejected { leased, cause, held: true });
        let rejected = Vec::from_iter(rejected);
        Self { messages, rejected, handle: Some(handle), attempt: None, end }
    }

    /// Guards the answer to a repeated call, or an answer of nothing.
    pub(in crate::lessor) fn again(messages: Vec<LeasedDelivery>, rejected: Vec<Rejected>) -> Self {
        Self { messages, rejected, handle: None, attempt: None, end: AnswerEnd::default() }
    }

    /// The leases that the answer brings.
    pub(in crate::lessor) fn leases(&self) -> impl Iterator<Item = LeaseId> {
        let held = self.rejected.iter().filter(|rejected| rejected.held);
        self.messages.iter().chain(held.map(|rejected| &rejected.leased)).map(|leased| leased.id)
    }

    /// The messages, each leased.
    pub fn messages(&self) -> &[LeasedDelivery] {
        &self.messages
    }

    /// Messages that could not be given as asked.
    pub fn rejected(&self) -> &[Rejected] {
        &self.rejected
    }

    /// The end of the last lease; `None` without a lease.
    pub fn ends_at(&self) -> Option<Instant> {
        let rejected = self.rejected.iter().map(|rejected| &rejected.leased);
        self.messages.iter().chain(rejected).map(|leased| leased.deadline).max()
    }

    /// From now on the messages are the client's.
    pub fn deliver(&self) {
        // The messages of a repeated call were counted before.
        if self.end.set(true).is_err() || self.handle.is_none() {
            return;
        }
        if let Some(first) = self.messages.first() {
            let deliveries = || self.messages.iter().map(LeasedDelivery::delivery);
            let bytes = deliveries().map(|delivery| delivery.payload.len()).sum();
            let redelivered = deliveries().filter(|delivery| delivery.delivery_count > 1).count();
            first.granted.spec.meter.written(self.messages.len(), bytes, redelivered);
        }
    }
}

impl Drop for DeliveryGuard {
    fn drop(&mut self) {
        let Some(handle) = self.handle.as_ref().filter(|_| self.end.set(false).is_ok()) else {
            return;
        };
        self.attempt.take().into_iter().for_each(FirstAnswer::forget);
        let held = self.rejected.drain(..).filter(|rejected| rejected.held);
        let unhanded = self.messages.drain(..).chain(held.map(|rejected| rejected.leased));
        let unhanded: Vec<GrantedDelivery> = unhanded.map(|leased| leased.granted).collect();
        if let Some(first) = unhanded.first() {
            first.spec.meter.unwritten(unhanded.len());
        }
        handle.give_back(unhanded);
    }
}

/// The place of the answer to a Fetch.
pub(in crate::lessor) type FetchReply = oneshot::Sender<Result<FetchAnswer, Error>>;

/// A question for the spec.
pub(in crate::lessor) struct SpecQuestion {
    /// The consumer that somebody else has read. If this task knows another one, it reads INFO first.
    pub(in crate::lessor) created: Option<Arc<str>>,
    /// The leader that somebody else knows. If this task knows another one, it reads INFO first.
    pub(in crate::lessor) leader: Option<Leader>,
    pub(in crate::lessor) reply: oneshot::Sender<Result<Arc<ConsumerSpec>, Error>>,
}

/// The state of the task of one consumer.
#[derive(Debug, Clone)]
pub struct TaskState {
    /// Open Fetch calls.
    pub waiters: usize,
    /// Messages that they still want.
    pub wanted: usize,
    /// Messages that the open pull may still bring. 0: no pull is open.
    pub pulled: usize,
    /// Messages that wait for the next caller.
    pub parked: usize,
    /// INFO as it was read last, and when.
    pub info: Option<(Instant, ConsumerInfo)>,
    /// Why nothing is pulled now, for people. `None`: nothing is against it.
    pub suspended: Option<String>,
}

/// A request to the task of a consumer.
pub(in crate::lessor) enum ConsumerCommand {
    /// One more Fetch waits.
    Join { ticket: Ticket, want: Want, lease: LeaseRequest, reply: FetchReply },
    /// A Fetch has gone.
    Leave(Ticket),
    /// One more flow opens.
    Open { ticket: Ticket, credit: Credit, queue: Arc<FlowQueue> },
    /// A flow has another credit.
    Credit(Ticket, Credit),
    /// A flow has freed credit, as its account says.
    Freed(Ticket),
    /// The client of a flow does not read, or reads again.
    Stall(Ticket, bool),
    /// A flow has gone.
    Close(Ticket),
    /// A flow asks whether the consumer, or this replica, has as many leases as it may.
    IsFull(oneshot::Sender<bool>),
    /// Nobody has taken these deliveries.
    GiveBack(Vec<GrantedDelivery>),
    /// A caller had these deliveries and has given them back. Their leases are the proxy's own.
    Return(Vec<GrantedDelivery>),
    /// A settlement was not answered: another server may lead the consumer. `missed`: nobody led it then, unless
    /// the connection is another one by now.
    Doubt { missed: bool },
    /// INFO was read for something else, and names this leader.
    Led(Leader),
    /// A settlement was published for something else, with this outcome.
    Acked(Result<(), BrokerError>),
    /// Leases of the consumer, with consumer sequences between these two, were taken over from another replica.
    Adopted((u64, u64)),
    /// Another replica has seen something of the consumer. The sender is answered, or dropped, when nothing
    /// that the sighting voids is settled here any more.
    Heard(Sighting, oneshot::Sender<()>),
    /// Somebody wants the spec, as soon as it is known on the present connection.
    Know(SpecQuestion),
    /// An operator asks for the state of the task. The loop of the task answers.
    Describe(oneshot::Sender<TaskState>),
}

/// The way to the task of a consumer.
#[derive(Debug, Clone)]
pub(in crate::lessor) struct ConsumerHandle {
    commands: mpsc::UnboundedSender<ConsumerCommand>,
    /// INFO for answers without messages, and when it was read.
    pub(in crate::lessor) recent_info: Arc<Mutex<Option<(Instant, ConsumerInfo)>>>,
    /// The meter of the consumer, once JetStream knows it.
    pub(in crate::lessor) meter: Arc<OnceLock<ConsumerMeter>>,
}

impl ConsumerHandle {
    /// A handle, and where its task receives the commands.
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<ConsumerCommand>) {
        let (commands, receiver) = mpsc::unbounded_channel();
        (Self { commands, recent_info: Arc::default(), meter: Arc::default() }, receiver)
    }

    /// # Errors
    /// The task has ended; the command comes back.
    pub(in crate::lessor) fn send(&self, command: ConsumerCommand) -> Result<(), ConsumerCommand> {
        self.commands.send(command).map_err(|refused| refused.0)
    }

    pub(in crate::lessor) fn leave(&self, ticket: Ticket) {
        // A task that has ended has no callers left.
        let _ = self.send(ConsumerCommand::Leave(ticket));
    }

    pub(in crate::lessor) fn give_back(&self, granted: Vec<GrantedDelivery>) {
        if !granted.is_empty() {
            // A task that has ended leaves its deliveries to the clocks of the lease table.
            let _ = self.send(ConsumerCommand::GiveBack(granted));
        }
    }

    pub(in crate::lessor) fn has_ended(&self) -> bool {
        self.commands.is_closed()
    }
}
