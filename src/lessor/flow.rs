//! A flow: one open Consume, between its call and the task of its consumer.
//!
//! ```text
//!  task: deliver ──▶ queue, each with a Debit ──▶ take: assign ──▶ answer, written or given back
//!                       │ closed, stalled: back      │ lease is over: left out
//!                       ▼                            ▼ the Debit moves into the lease
//!                    Debit is dropped ──▶ FlowAccount ──▶ one command for many ──▶ the pump has room
//! ```
//! A message uses credit from when the pump hands it over until its lease ends. The [`Debit`](super::flow_queue::Debit) is in one place all that
//! time, and frees the credit when it is dropped. So no way in which a lease ends can forget it.
//!
//! Leases are assigned when the client asks for the next frame. What waits until then can be taken back at no cost.

use std::{
    future::Future,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::timeout_at,
};

use super::{
    Codec, Empty, Error, Fetched, Lessor,
    consumer::{ConsumerCommand, ConsumerHandle, DeliveryGuard, Ticket},
    core::{Core, assign},
    delivery::{AnswerEnd, FetchCaller, Holding, LeaseRequest},
    flow_queue::{EndedLease, FlowEnd, FlowNews, FlowQueue, Handed, Settling},
    table::LEASES_PER_LOCK,
};
use crate::{
    broker::{Broker, ConsumerName},
    clock,
    lease::{LeaseId, LeaseOutcome},
    pump::Credit,
};

/// The request of a flow, checked and clamped.
#[derive(Debug, Clone)]
pub struct FlowParams {
    /// The consumer.
    pub name: ConsumerName,
    /// The first credit.
    pub credit: Credit,
    /// The length of the leases.
    pub holding: Holding,
    /// Most bytes of an encoded frame.
    pub max_frame_bytes: u64,
    /// The codec that payloads must fit.
    pub codec: Codec,
    /// The caller.
    pub caller: Arc<FetchCaller>,
    /// The principal that the leases belong to.
    pub principal: Arc<str>,
}

/// Why a flow gets nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlowIdle {
    /// It holds as much as its credit allows.
    Credit,
    /// This replica or the consumer holds as many leases as it may.
    LeaseLimit,
    /// NATS is away.
    Away,
    /// The consumer gives nothing out, and has so many messages left.
    Empty(Empty, u64),
}

/// An open flow. Dropping it closes it: what the client has not received goes to others.
pub struct Flow<B: Broker> {
    lessor: Lessor<B>,
    params: FlowParams,
    request: LeaseRequest,
    queue: Arc<FlowQueue>,
    handle: ConsumerHandle,
    ticket: Ticket,
    numbers: u64,
    stalled: bool,
    place: Option<OwnedSemaphorePermit>,
}

impl<B: Broker> Lessor<B> {
    /// Opens a flow. What becomes of it is told by [`Flow::end`].
    ///
    /// # Errors
    /// Nothing is granted any more, or there is no place.
    pub fn open_flow(&self, params: FlowParams) -> Result<Flow<B>, Error> {
        let place = self.admit(&params.name)?;
        let account = self.core.accounts.of(&params.principal);
        let (holding, caller) = (params.holding, params.caller.clone());
        let request = LeaseRequest { holding, caller, account };
        let ticket = Ticket(self.calls.tickets.fetch_add(1, Ordering::Relaxed));
        let mut queue = None;
        let handle = self.tell_with(&params.name, |handle, _| {
            let task = handle.clone();
            // A task that has ended knows no flow any more.
            let tell = move |news| match news {
                FlowNews::Freed => drop(task.send(ConsumerCommand::Freed(ticket))),
                FlowNews::GiveBack(granted) => task.give_back(granted),
            };
            let made = queue.insert(Arc::new(FlowQueue::new(Box::new(tell))));
            Some(ConsumerCommand::Open { ticket, credit: params.credit, queue: made.clone() })
        });
        let queue = queue.ok_or(Error::Draining)?;
        let place = Some(place);
        let lessor = self.clone();
        Ok(Flow {
            lessor,
            params,
            request,
            queue,
            handle,
            ticket,
            numbers: 0,
            stalled: false,
            place,
        })
    }
}

impl<B: Broker> Flow<B> {
    /// The consumer.
    pub fn name(&self) -> &ConsumerName {
        &self.params.name
    }

    /// Waits until something has come or ended.
    pub async fn changed(&self) {
        self.queue.account.changed().await;
    }

    /// Since when the oldest message waits to be taken. `None`: no message waits.
    pub fn waits_since(&self) -> Option<Instant> {
        self.queue.waits_since()
    }

    /// Why nothing more comes. Messages may still wait to be taken.
    pub fn end(&self) -> Option<FlowEnd> {
        self.queue.ended()
    }

    /// Frees its place: nothing more comes.
    pub fn free_place(&mut self) {
        self.place = None;
    }

    /// The leases of the client.
    pub fn leased(&self) -> usize {
        self.queue.account.leased()
    }

    /// The number of leases, and of messages that wait to be taken.
    pub fn holds(&self) -> u64 {
        self.queue.account.used().messages
    }

    /// So many leases of the client are being settled until the guard is dropped. The messages that follow them are
    /// pulled meanwhile.
    pub fn settling(&self, leases: usize) -> Settling {
        self.queue.account.settling(leases as u64)
    }

    /// Finds out why nothing comes, until `until`. `None`: it is not known, or the flow is about to end.
    pub fn idle(&self, until: Instant) -> impl Future<Output = Option<FlowIdle>> + use<B> {
        let (used, most) = (self.queue.account.used(), self.params.credit);
        let full = used.messages >= most.messages || used.bytes >= most.bytes;
        let (lessor, handle) = (self.lessor.clone(), self.handle.clone());
        let name = self.params.name.clone();
        async move {
            if full {
                return Some(FlowIdle::Credit);
            }
            let (reply, is_full) = oneshot::channel();
            let _ = handle.send(ConsumerCommand::IsFull(reply));
            if timeout_at(until.into(), is_full).await == Ok(Ok(true)) {
                return Some(FlowIdle::LeaseLimit);
            }
            match lessor.recent_info(&handle, &name, until).await {
                Ok(info) => Some(FlowIdle::Empty(Empty::of(&info), info.pending)),
                Err(Error::Unavailable(_)) => Some(FlowIdle::Away),
                Err(_) => None,
            }
        }
    }

    /// The leases that the client has no more since the last call.
    pub fn take_ended(&self) -> Vec<EndedLease> {
        self.queue.account.take_ended()
    }

    /// How a lease has ended. `None`: it has not, or it has moved to another replica.
    pub fn end_of(&self, ended: EndedLease) -> Option<Error> {
        let lease = LeaseId::new(ended.lease)?;
        Some(match self.lessor.core.table.with(|table| table.end_of(lease))? {
            LeaseOutcome::Settled { by } => Error::LeaseSettled(by),
            LeaseOutcome::Expired => Error::LeaseExpired { forgotten: false },
            LeaseOutcome::ConsumerGone => Error::ConsumerGone,
        })
    }

    /// Sets the credit. If it is lower, what waits to be taken goes back, and comes again as far as there is room.
    pub fn set_credit(&mut self, credit: Credit) {
        let before = std::mem::replace(&mut self.params.credit, credit);
        let _ = self.handle.send(ConsumerCommand::Credit(self.ticket, credit));
        if credit.messages < before.messages || credit.bytes < before.bytes {
            self.queue.clear(false);
        }
    }

    /// The credit.
    pub fn credit(&self) -> Credit {
        self.params.credit
    }

    /// The client does not read, or reads again. What waits to be taken goes to others.
    pub fn stall(&mut self, stalled: bool) {
        if std::mem::replace(&mut self.stalled, stalled) != stalled {
            let _ = self.handle.send(ConsumerCommand::Stall(self.ticket, stalled));
        }
        if stalled {
            self.queue.clear(false);
        }
    }

    /// Closes the flow. What waits to be taken goes to others, and leases stay.
    pub fn close(&mut self) {
        let _ = self.handle.send(ConsumerCommand::Close(self.ticket));
        self.queue.clear(true);
        self.place = None;
    }

    /// The client says nothing more. Leases that live as long as its stream end after their grace.
    pub fn end_kept(&self) {
        if !matches!(self.params.holding, Holding::Kept { .. }) {
            return;
        }
        let (account, now) = (&self.queue.account, clock::now());
        for step in account.leases().chunks(LEASES_PER_LOCK) {
            self.lessor.core.table.with(|table| {
                for id in step {
                    // A lease that came back may be another caller's by now.
                    let debit = table.payload(*id).and_then(|held| held.debit.as_ref());
                    if debit.is_some_and(|debit| debit.is_of(account)) {
                        table.end_kept(*id, now);
                    }
                }
            });
        }
    }

    /// Leases the next messages to the client, at most `leases` of them. `None`: no message waits, or all leases are
    /// over. Messages that fail the codec are terminated until `until`.
    pub async fn take(&mut self, leases: usize, until: Instant) -> Option<Fetched> {
        let leased = self.queue.account.leased() as u64;
        let room = self.params.credit.messages.saturating_sub(leased);
        if room == 0 {
            // The credit may have been lowered while a delivery was on its way here.
            self.queue.clear(false);
        }
        let leases = leases.min(usize::try_from(room).unwrap_or(usize::MAX));
        let max_bytes = self.params.max_frame_bytes;
        let (messages, too_large) = self.queue.next_frame(max_bytes, leases);
        let end = AnswerEnd::default();
        let now = clock::now();
        let mut numbers = self.numbers;
        let mut numbered = |handed: Handed| {
            numbers += 1;
            let debit = handed.debit.lease(numbers, handed.granted.id);
            (handed.granted, Some(debit))
        };
        let messages = messages.into_iter().map(&mut numbered).collect();
        let too_large = Vec::from_iter(too_large.map(&mut numbered));
        self.numbers = numbers;
        let core: &Core<B> = &self.lessor.core;
        let messages = assign(core, messages, (&self.request, &end), now);
        let too_large = assign(core, too_large, (&self.request, &end), now).pop();
        if messages.is_empty() && too_large.is_none() {
            return None;
        }
        let handle = self.handle.clone();
        let deliveries = DeliveryGuard::new(messages, too_large, handle, end);
        let mut fetched = Fetched::of(deliveries, self.params.codec, max_bytes);
        self.lessor.terminate_rejected(&mut fetched, until).await;
        Some(fetched)
    }
}

impl<B: Broker> Drop for Flow<B> {
    fn drop(&mut self) {
        self.close();
        self.end_kept();
    }
}
