//! How the deliveries of one consumer arrive: on which connection its inbox is, what is pulled there, and
//! the permits and bytes that pulls may use. Owns the inbox. Decides nothing about the consumer.
//!
//! ```text
//!            opened                    the connection is lost
//!   CLOSED ──────────▶ OPEN ─────────────────────────────────▶ CLOSED
//!                       │ the connection was replaced, or its own one is not needed any more;
//!                       │ and the last pull has ended
//!                       ▼
//!                     LEFT: nothing is pulled there, and it is still listened to for 5 s
//! ```
//! 1. A pull is open only with a lease permit for each message that it may bring, and with a share of the
//!    connection's bytes.
//! 2. An inbox is opened only on the connection that the task knows of.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::OwnedSemaphorePermit;

use super::{
    leases::nine_tenths,
    send_bound::{ArrivedDelivery, SendBound},
    sharing::{PullPlaces, Sharing, wire_size},
    single_answer::SingleAnswer,
};
use crate::{
    broker::{
        Arrival, Broker, ConnectionKind, ConsumerName, Inbox, InboxEvent, Link, PullEnd,
        PullRequest,
    },
    clock,
    lessor::{core::Core, shares::Explained, turn::Turn},
    pump::{Allowance, Demand, PullOutcome},
};

/// The deliveries of a pull have arrived by then: a pull lasts for less, and what it brings can be on its
/// way for some time.
const PULL_AFTERMATH: Duration = Duration::from_secs(10);
/// An inbox that was left is listened to for this long.
const LINGER: Duration = Duration::from_secs(5);

/// See the [module](self).
pub(super) struct Subscription<B: Broker> {
    core: Arc<Core<B>>,
    name: ConsumerName,
    /// The connection as the task knows it.
    link: Link,
    inbox: Option<B::Inbox>,
    /// The inbox before, if it was left in good order.
    previous: Option<PreviousInbox<B::Inbox>>,
    /// The number of the shared connection that the inbox is on. `None`: it has a connection of its own.
    epoch: Option<u64>,
    /// The permit for a connection of its own.
    dedicated: Option<OwnedSemaphorePermit>,
    arrivals: Vec<Arrival>,
    /// Something was there to pull, when INFO was read.
    backlog: bool,
    /// A pull has passed a limit of the consumer, and no pull has ended in good order since.
    limit_passed: bool,
    /// When the inbox was last pulled on.
    last_pull_at: Option<Instant>,
    send_bound: SendBound,
    /// Permits of the lease table for what the open pull may still bring.
    permits: Option<OwnedSemaphorePermit>,
    turn: Turn,
    sharing: Sharing,
    single_answer: SingleAnswer,
}

/// An inbox that is not pulled on any more. Deliveries of its last pull may arrive after the end of the pull.
struct PreviousInbox<I> {
    inbox: I,
    until: Instant,
    arrivals: Vec<Arrival>,
    send_bound: SendBound,
}

/// The event that [`Subscription::next`] has waited for.
pub(super) enum SubscriptionEvent {
    /// The connection is another one, or there is none any more.
    Link(Link),
    /// Something came through the inbox.
    Inbox(InboxEvent),
    /// Something came through the inbox that was left.
    Previous(InboxEvent),
    /// A lease permit is free, or bytes of the connection are.
    Free,
}

/// The arrivals.
#[derive(Default)]
pub(super) struct Arrived {
    pub(super) deliveries: Vec<ArrivedDelivery>,
    /// Ends of pulls, each behind all that the pull has brought.
    pub(super) ends: Vec<(u64, PullEnd)>,
}

impl Arrived {
    /// The consumer sequence and the stream sequence of each delivery.
    pub(super) fn sequences(&self) -> Vec<(u64, u64)> {
        let deliveries = self.deliveries.iter().map(|one| &one.delivery);
        deliveries.map(|one| (one.consumer_sequence, one.stream_sequence)).collect()
    }
}

impl<B: Broker> Subscription<B> {
    pub(super) fn new(core: Arc<Core<B>>, name: ConsumerName) -> Self {
        Self {
            link: core.broker.link(),
            turn: core.table.turn(),
            sharing: Sharing::new(&core.shares, &name),
            core,
            name,
            inbox: None,
            previous: None,
            epoch: None,
            dedicated: None,
            arrivals: Vec::new(),
            backlog: false,
            limit_passed: false,
            last_pull_at: None,
            send_bound: SendBound::default(),
            permits: None,
            single_answer: SingleAnswer::default(),
        }
    }

    /// Waits for the next thing to happen. Cancel-safe.
    pub(super) async fn next(&mut self) -> SubscriptionEvent {
        let bell = self.sharing.bell();
        let Self { core, link, inbox, arrivals, previous, turn, .. } = self;
        tokio::select! {
            biased;
            link = core.broker.link_change(link) => SubscriptionEvent::Link(link),
            event = next_late(previous) => SubscriptionEvent::Previous(event),
            event = next(inbox, arrivals) => SubscriptionEvent::Inbox(event),
            () = turn.called() => SubscriptionEvent::Free,
            () = bell.notified() => SubscriptionEvent::Free,
        }
    }

    /// When something changes here if nothing else happens.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.sharing.next_deadline()
    }

    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    pub(super) fn set_link(&mut self, link: Link) {
        self.link = link;
    }

    /// The broker is on the connection that the task knows of.
    pub(super) fn is_link_current(&self) -> bool {
        self.core.broker.link() == self.link
    }

    /// INFO was read: whether something is there to pull.
    pub(super) fn set_backlog(&mut self, backlog: bool) {
        self.backlog = backlog;
    }

    pub(super) fn is_open(&self) -> bool {
        self.inbox.is_some()
    }

    /// The inbox has a connection of its own.
    pub(super) fn is_dedicated(&self) -> bool {
        self.dedicated.is_some()
    }

    /// The connection that the inbox is on was replaced while it served. Nothing more is pulled on it, and
    /// it is left when the last pull has ended.
    pub(super) fn is_outdated(&self) -> bool {
        let Link::Up(server) = &self.link else { return false };
        self.is_open() && self.epoch.is_some_and(|epoch| epoch != server.epoch)
    }

    /// No pull is open that could still bring anything.
    pub(super) fn is_quiet(&self) -> bool {
        self.permits.as_ref().is_none_or(|permits| permits.num_permits() == 0)
    }

    /// Opens an inbox on a connection of this kind. If all dedicated connections are taken, the inbox is on
    /// the shared one. Returns whether there is an inbox now.
    pub(super) async fn open(&mut self, kind: ConnectionKind) -> bool {
        let Link::Up(server) = &self.link else { return false };
        if !self.is_link_current() {
            // The inbox would be on a connection that the task does not know of yet.
            return false;
        }
        let epoch = server.epoch;
        if kind == ConnectionKind::Dedicated {
            self.dedicated = self.core.dedicated.clone().try_acquire_owned().ok();
        }
        let shared = self.dedicated.is_none();
        let kind = if shared { ConnectionKind::Shared } else { ConnectionKind::Dedicated };
        match self.core.broker.open(&self.name, kind).await {
            Ok(inbox) => {
                (self.inbox, self.last_pull_at) = (Some(inbox), None);
                self.epoch = shared.then_some(epoch);
                self.sharing.move_to(kind, self.backlog);
                true
            }
            // The link says so in a moment.
            Err(error) => {
                self.dedicated = None;
                tracing::debug!(consumer = %self.name, %error, "no inbox could be opened");
                false
            }
        }
    }

    /// The connection of the inbox broke by what it brought. Returns which kind it was, if something of this
    /// consumer may have been on its way: a replicated consumer can send a delivery after the end of a pull.
    pub(super) fn broke(&mut self, now: Instant) -> Option<ConnectionKind> {
        self.sharing.cut(self.epoch);
        self.last_pull_at.filter(|at| now < *at + PULL_AFTERMATH)?;
        Some(if self.is_dedicated() { ConnectionKind::Dedicated } else { ConnectionKind::Shared })
    }

    /// Leaves the inbox in good order. To be followed by [`Subscription::close`].
    pub(super) fn leave(&mut self, now: Instant) {
        let until = now + LINGER;
        let send_bound = std::mem::take(&mut self.send_bound);
        let previous = |inbox| PreviousInbox { inbox, until, arrivals: Vec::new(), send_bound };
        self.previous = self.inbox.take().map(previous);
    }

    /// Drops an inbox that was left, when its time is over.
    pub(super) fn drop_previous(&mut self, now: Instant) {
        self.previous = self.previous.take().filter(|previous| now < previous.until);
    }

    /// The inbox is gone. Returns whether it had a connection of its own.
    pub(super) fn close(&mut self) -> bool {
        self.inbox = None;
        self.permits = None;
        self.sharing.lost();
        self.single_answer.lost();
        self.send_bound.lost();
        self.dedicated.take().is_some()
    }

    /// The size that a pull may have, if it is due. `may`: nothing else is against it. `left`: leases that the
    /// consumer may still have.
    pub(super) fn allow(
        &mut self,
        demand: Option<Demand>,
        may: bool,
        left: impl FnOnce() -> usize,
        now: Instant,
    ) -> Option<Allowance> {
        if demand.is_none() || !self.is_open() {
            self.turn.leave();
        }
        // A consumer that may not pull for a moment keeps its place in line.
        let may = may && self.is_open() && !self.is_outdated();
        let allowed = demand.filter(|_| may).and_then(|demand| {
            let max_payload = self.link.server()?.max_payload;
            let (left, free) = (left(), self.turn.free());
            match (left, free) {
                (0, _) => self.turn.leave(),
                (_, 0) => self.turn.enter(),
                _ => {}
            }
            if left == 0 || free == 0 {
                return None;
            }
            let idle = self.core.table.idle_share();
            let places = PullPlaces { most: left.min(nine_tenths(free)), idle };
            let allowed = self.sharing.allow(&demand, places, max_payload, now);
            if allowed.is_none() {
                // A consumer that waits for bytes keeps no permit from others.
                self.turn.leave();
            }
            Some(allowed)
        });
        if allowed.is_none() {
            self.sharing.rest();
        }
        allowed.flatten()
    }

    /// Sends a pull. Returns whether it was sent: others may have taken the permits, or the connection is gone.
    pub(super) async fn pull(&mut self, pull: PullRequest) -> bool {
        self.permits = None;
        self.permits = self.turn.take(pull.batch);
        self.sharing.issued(pull.no, pull.batch, pull.max_bytes);
        let sent_at = clock::now();
        let sent = match (&self.permits, &mut self.inbox) {
            (Some(_), Some(inbox)) => inbox.pull(pull).await.is_ok(),
            _ => false,
        };
        if sent {
            let now = clock::now();
            self.last_pull_at = Some(now);
            self.send_bound.pulled(pull.no, pull.batch, sent_at, pull.expires);
            self.single_answer.issued(pull.no, pull.batch, now + pull.expires);
        } else {
            self.permits = None;
            self.sharing.unsent();
        }
        sent
    }

    /// If no pull is `open`, nothing is to come. Returns whether permits were kept for something.
    pub(super) fn free_permits(&mut self, open: bool, now: Instant) -> bool {
        self.sharing.settle(open, now);
        !open && self.permits.take().is_some()
    }

    /// Takes what has come through the inbox, and looks whether answers to pulls are lost on their way.
    pub(super) fn take(&mut self, now: Instant) -> Arrived {
        let mut arrivals = std::mem::take(&mut self.arrivals);
        let mut send_bound = std::mem::take(&mut self.send_bound);
        let arrived = self.sort(&mut arrivals, &mut send_bound, now);
        (self.arrivals, self.send_bound) = (arrivals, send_bound);
        arrived
    }

    /// Something came through the inbox that was left. Takes it, unless that inbox is gone.
    pub(super) fn take_late(&mut self, event: InboxEvent, now: Instant) -> Option<Arrived> {
        let mut previous = self.previous.take().filter(|_| event == InboxEvent::Arrived)?;
        let arrived = self.sort(&mut previous.arrivals, &mut previous.send_bound, now);
        self.previous = Some(previous);
        Some(arrived)
    }

    fn sort(
        &mut self,
        arrivals: &mut Vec<Arrival>,
        send_bound: &mut SendBound,
        now: Instant,
    ) -> Arrived {
        let mut arrived = Arrived::default();
        for arrival in arrivals.drain(..) {
            match arrival {
                Arrival::Message(delivery) => {
                    let missed = self.single_answer.arrived(delivery.consumer_sequence, now);
                    if let Some(missed) = missed {
                        tracing::warn!(
                            consumer = %self.name,
                            missed,
                            "only the first message of each pull arrives: the export of the \
                             JetStream API needs response_type: stream"
                        );
                    }
                    let sent_after = send_bound.arrived(now);
                    arrived.deliveries.push(ArrivedDelivery { delivery, sent_after });
                }
                Arrival::End { no, end } => {
                    self.single_answer.ended(no);
                    send_bound.ended(no);
                    arrived.ends.push((no, end));
                }
            }
        }
        let sizes = arrived.deliveries.iter().map(|one| wire_size(&one.delivery));
        if let Some(no) = self.sharing.arrived(sizes) {
            send_bound.ended(no);
            self.single_answer.ended(no);
            arrived.ends.push((no, PullEnd::Spent));
        }
        arrived
    }

    /// The permits for what arrives.
    pub(super) fn permits(&mut self) -> &mut Option<OwnedSemaphorePermit> {
        &mut self.permits
    }

    /// The end of a pull was heard. Returns what it means to the pump.
    pub(super) fn ended(&mut self, no: u64, end: &PullEnd) -> PullOutcome {
        let outcome = match end {
            PullEnd::Done => {
                self.limit_passed = false;
                PullOutcome::Done
            }
            PullEnd::RequestsPending => PullOutcome::RequestsPending,
            PullEnd::TooLarge => PullOutcome::TooLarge,
            PullEnd::Spent => PullOutcome::Spent,
            PullEnd::Busy(_)
            | PullEnd::LeaderGone
            | PullEnd::ConsumerGone
            | PullEnd::Permission(_)
            | PullEnd::Other(_) => PullOutcome::Refused,
        };
        self.sharing.ended(no, outcome);
        outcome
    }

    /// A pull has passed a limit of the consumer. Returns whether the pull before it has, too.
    pub(super) fn passes_limit(&mut self) -> bool {
        std::mem::replace(&mut self.limit_passed, true)
    }

    /// Whether the bytes that were on their way explain why the connection was cut.
    pub(super) fn explain_cut(&self, now: Instant) -> Option<Explained> {
        self.sharing.explain(now)
    }
}

/// Waits for what comes through the inbox, while there is one.
async fn next<I: Inbox>(inbox: &mut Option<I>, into: &mut Vec<Arrival>) -> InboxEvent {
    match inbox {
        Some(inbox) => inbox.next(into).await,
        None => std::future::pending().await,
    }
}

/// The same of an inbox that was left.
async fn next_late<I: Inbox>(previous: &mut Option<PreviousInbox<I>>) -> InboxEvent {
    match previous {
        Some(previous) => previous.inbox.next(&mut previous.arrivals).await,
        None => std::future::pending().await,
    }
}
