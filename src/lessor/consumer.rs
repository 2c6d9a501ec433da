//! The task behind one consumer: it performs what its pump decides, on an inbox of the broker.
//!
//! ```text
//!            INFO read            inbox opened             connection lost
//!  LEARNING ───────────▶ KNOWN ──────────────▶ PULLING ───────────────────▶ LEARNING
//!     │ no such consumer (after a second look), unsuitable, no rights: waiters are told, the feed ends
//! ```
//! A connection that broke by what it brought is looked into before it goes on (`suspecting`).
//!
//! 1. nothing is pulled before INFO was read on this very connection: a lease that the server has
//!    forgotten must end before its message can arrive anew;
//! 2. every delivery that arrives is leased in the table before anybody sees it;
//! 3. every waiter is answered once, also when the feed ends;
//! 4. it stays while leases are held, in a drain too: it alone hears that another server leads.

mod counting;
mod dispatch;
mod knowing;
mod leading;
mod pull;
mod quarantine;
mod sharing;
mod sighted;
mod single;
mod suspecting;

use std::{
    collections::HashMap,
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{Mutex, OwnedSemaphorePermit, mpsc, oneshot};

use self::{
    knowing::Unread,
    knowing::answer,
    leading::Leading,
    pull::next,
    quarantine::{Looked, Quarantine},
    sharing::Sharing,
    sighted::{Sighted, told},
    suspecting::{Looking, PreviousInbox, late, looked},
};
use super::{
    Error, Lessor,
    delivery::{GrantedDelivery, LeaseRequest, LeasedDelivery},
    sighting::Sighting,
    spec::ConsumerSpec,
    turn::Turn,
};
use crate::{
    broker::{Arrival, Broker, ConsumerInfo, ConsumerName, InboxEvent, InfoError, Link},
    clock,
    pump::{PullLimits, Pump, WaiterId, Want},
};

/// A waiter with nothing is told so when NATS has been away for this long: long enough for a
/// reconnect to go unnoticed, short enough to try another replica.
const OUTAGE_NOTICE: Duration = Duration::from_secs(2);
/// Bounds one CONSUMER.INFO, and spaces two that failed.
const INFO_TIMEOUT: Duration = Duration::from_secs(2);
const INFO_RETRY: Duration = Duration::from_millis(250);
/// A feed without waiters and leases ends after this.
const MAX_IDLE: Duration = Duration::from_secs(600);

/// Names one open Fetch to its feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ticket(pub(super) u64);

/// What a waiter is told. It may be dropped at any point of its way to a caller who has gone; then
/// what it carries is given back.
#[derive(Debug)]
pub(super) struct FetchAnswer {
    pub(super) messages: Vec<LeasedDelivery>,
    pub(super) too_large: Option<LeasedDelivery>,
    pub(super) draining: bool,
    pub(super) handle: ConsumerHandle,
}

impl Drop for FetchAnswer {
    fn drop(&mut self) {
        let unhanded = self.messages.drain(..).chain(self.too_large.take());
        self.handle.give_back(unhanded.map(|leased| leased.granted).collect());
    }
}

type Reply = oneshot::Sender<Result<FetchAnswer, Error>>;

/// What is asked of a feed.
pub(super) enum ConsumerCommand {
    Join {
        ticket: Ticket,
        want: Want,
        lease: LeaseRequest,
        reply: Reply,
    },
    Leave(Ticket),
    GiveBack(Vec<GrantedDelivery>),
    /// Somebody has seen a sign of another leader.
    Doubt,
    /// Another replica has seen something of the consumer; see [`Lessor::heard_of`].
    Heard(Sighting, oneshot::Sender<()>),
    /// What the consumer is, as soon as it is known on this connection.
    Know(oneshot::Sender<Result<Arc<ConsumerSpec>, Error>>),
}

/// The way to a consumer's feed.
#[derive(Debug, Clone)]
pub(super) struct ConsumerHandle {
    commands: mpsc::UnboundedSender<ConsumerCommand>,
    /// INFO for answers without messages, and when it was read.
    pub(super) recent_info: Arc<Mutex<Option<(Instant, ConsumerInfo)>>>,
}

impl ConsumerHandle {
    /// Whether the feed is there to take it; a feed that has ended gives it back.
    pub(super) fn send(&self, command: ConsumerCommand) -> Result<(), ConsumerCommand> {
        self.commands.send(command).map_err(|refused| refused.0)
    }

    pub(super) fn leave(&self, ticket: Ticket) {
        // A feed that has ended has no waiters left.
        let _ = self.send(ConsumerCommand::Leave(ticket));
    }

    pub(super) fn give_back(&self, granted_deliveries: Vec<GrantedDelivery>) {
        if !granted_deliveries.is_empty() {
            // A feed that has ended leaves its deliveries to the table's clocks.
            let _ = self.send(ConsumerCommand::GiveBack(granted_deliveries));
        }
    }

    pub(super) fn ended(&self) -> bool {
        self.commands.is_closed()
    }
}

struct Waiter {
    ticket: Ticket,
    want: Want,
    lease: LeaseRequest,
    reply: Reply,
}

type Asking = Pin<Box<dyn Future<Output = Result<ConsumerInfo, InfoError>> + Send>>;

/// The task's own side.
pub(super) struct ConsumerTask<B: Broker> {
    lessor: Lessor<B>,
    name: ConsumerName,
    /// The way to ourselves, for answers that are not taken.
    handle: ConsumerHandle,
    commands: mpsc::UnboundedReceiver<ConsumerCommand>,
    pump: Pump<GrantedDelivery>,
    waiters: HashMap<WaiterId, Waiter>,
    tickets: HashMap<Ticket, WaiterId>,
    link: Link,
    /// The server that was connected last: another one may not know what it promised.
    server: Option<String>,
    away_since: Option<Instant>,
    asking: Option<Asking>,
    unread: Unread,
    leading: Leading,
    /// When INFO is wanted next.
    ask_at: Instant,
    /// It was not asked then, because nobody needed it.
    spared: bool,
    spec: Option<Arc<ConsumerSpec>>,
    /// Who wants to know them.
    curious: Vec<oneshot::Sender<Result<Arc<ConsumerSpec>, Error>>>,
    /// The connection that `facts` were read on.
    learned_on: Option<u64>,
    inbox: Option<B::Inbox>,
    /// The one before, if it was left in good order.
    left: Option<PreviousInbox<B::Inbox>>,
    /// The shared connection that the inbox is on, if it is not apart.
    on: Option<u64>,
    arrivals: Vec<Arrival>,
    /// Places in the table for what the open pull may still bring, and bytes of the connection.
    places: Option<OwnedSemaphorePermit>,
    turn: Turn,
    sharing: Sharing,
    /// A limit of the consumer was passed, and INFO was asked for it.
    limited: bool,
    used_at: Instant,
    draining: bool,
    quarantine: Quarantine,
    /// While this goes on, nothing is pulled.
    looking: Option<Looking>,
    /// The place of a connection of our own.
    apart: Option<OwnedSemaphorePermit>,
    sighted: Sighted,
    /// When the inbox was last pulled on.
    pulled_at: Option<Instant>,
    /// Something was there to pull, when INFO was read.
    backlog: bool,
    /// The highest consumer sequence and stream sequence that have arrived, or were there before we
    /// pulled.
    seen: (u64, u64),
}

enum Event {
    ConsumerCommand(ConsumerCommand),
    Arrived(InboxEvent),
    Late(InboxEvent),
    Info(Result<ConsumerInfo, InfoError>),
    Told,
    Looked(Looked),
    Link(Link),
    Drain,
    Tick,
}

impl<B: Broker> ConsumerTask<B> {
    /// A feed, and the task that [`ConsumerTask::run`] makes of it.
    pub(super) fn new(lessor: Lessor<B>, name: ConsumerName) -> (ConsumerHandle, Self) {
        let (sender, commands) = mpsc::unbounded_channel();
        let (now, link) = (clock::now(), lessor.broker.link());
        let limits = PullLimits {
            max_batch: 1,
            max_expires: Duration::MAX,
            max_request_bytes: None,
            park: Duration::from_secs(1),
        };
        let handle = ConsumerHandle { commands: sender, recent_info: Arc::default() };
        let task = Self {
            turn: lessor.table.turn(),
            sharing: Sharing::new(&lessor.shares, &name),
            spec: lessor.take_left(&name),
            name,
            handle: handle.clone(),
            commands,
            pump: Pump::new(limits),
            waiters: HashMap::new(),
            tickets: HashMap::new(),
            server: link.server().map(|server| server.id.clone()),
            away_since: (!matches!(link, Link::Up(_))).then_some(now),
            sighted: Sighted::new(link.server(), now),
            link,
            asking: None,
            unread: Unread::default(),
            leading: Leading::new(now),
            ask_at: now,
            spared: false,
            curious: Vec::new(),
            learned_on: None,
            inbox: None,
            left: None,
            on: None,
            arrivals: Vec::new(),
            places: None,
            limited: false,
            used_at: now,
            draining: false,
            quarantine: Quarantine::none(),
            looking: None,
            apart: None,
            pulled_at: None,
            backlog: false,
            seen: (0, 0),
            lessor,
        };
        (handle, task)
    }

    /// Runs until the consumer is gone, nobody has used it for long, or the lessor is closed; in a
    /// drain until there is nothing left to watch over.
    pub(super) async fn run(mut self) {
        let end = loop {
            self.prepare().await;
            self.perform().await;
            let now = clock::now();
            if self.drained(now) || self.idle(now) {
                break Error::Draining;
            }
            let Some(event) = self.event(now).await else { break Error::Draining };
            if let Err(end) = self.take(event) {
                break end;
            }
            self.gather().await;
        };
        self.finish(&end);
    }

    fn idle(&self, now: Instant) -> bool {
        self.pump.is_idle() && now.duration_since(self.used_at) > MAX_IDLE && self.held() == 0
    }

    fn held(&self) -> usize {
        let held =
            |spec: &Arc<ConsumerSpec>| self.lessor.table.with(|table| table.held_by(spec.id));
        self.spec.as_ref().map_or(0, held)
    }

    /// Waits for the next thing to happen. `None` once the lessor is closed.
    async fn event(&mut self, now: Instant) -> Option<Event> {
        let (deadline, bell) = (self.deadline(now), self.sharing.bell());
        let Self {
            lessor,
            commands,
            inbox,
            arrivals,
            asking,
            looking,
            left,
            link,
            draining,
            sighted,
            turn,
            ..
        } = self;
        tokio::select! {
            () = lessor.closed.cancelled() => None,
            command = commands.recv() => command.map(Event::ConsumerCommand),
            news = next(inbox, arrivals) => Some(Event::Arrived(news)),
            news = late(left) => Some(Event::Late(news)),
            info = answer(asking) => Some(Event::Info(info)),
            found = looked(looking) => Some(Event::Looked(found)),
            () = told(&mut sighted.telling) => Some(Event::Told),
            link = lessor.broker.link_change(link) => Some(Event::Link(link)),
            () = lessor.draining.cancelled(), if !*draining => Some(Event::Drain),
            () = turn.come() => Some(Event::Tick),
            () = bell.notified() => Some(Event::Tick),
            () = clock::sleep_until(Some(deadline)) => Some(Event::Tick),
        }
    }

    fn deadline(&self, now: Instant) -> Instant {
        let away =
            self.away_since.filter(|_| self.pump.waiters() > 0).map(|since| since + OUTAGE_NOTICE);
        let ask = self.asking.is_none() && self.up() && !self.spared;
        let ask = ask.then_some(self.ask_at.max(now));
        let idle = self.used_at + MAX_IDLE + Duration::from_millis(1);
        let starved = self.pump.starved().then(|| now + pull::STARVED);
        [starved, self.pump.next_deadline(now), away, ask, self.sharing.next_deadline()]
            .into_iter()
            .flatten()
            .fold(idle.max(now + Duration::from_secs(1)), Instant::min)
    }

    /// # Errors
    /// Why the feed ends.
    fn take(&mut self, event: Event) -> Result<(), Error> {
        let now = clock::now();
        match event {
            Event::ConsumerCommand(command) => self.command(command, now),
            Event::Arrived(InboxEvent::Arrived) => {
                self.sighted.sure(now);
                self.count(now);
                self.arrived(now);
            }
            Event::Arrived(InboxEvent::Lost) => self.disconnected(now),
            Event::Arrived(InboxEvent::Broken) => self.broke(now),
            Event::Late(news) => self.late(news, now),
            Event::Info(info) => self.learned(info, now)?,
            Event::Looked(found) => self.looked(&found, now),
            Event::Told => self.told(now),
            Event::Link(link) => self.linked(link, now),
            Event::Drain => {
                self.draining = true;
                self.pump.drain(now);
            }
            Event::Tick => {}
        }
        if self.away_since.is_some_and(|since| now.duration_since(since) >= OUTAGE_NOTICE) {
            self.fail_waiters(&Error::Unavailable(self.why_away()), now);
        }
        Ok(())
    }

    fn command(&mut self, command: ConsumerCommand, now: Instant) {
        match command {
            ConsumerCommand::Join { ticket, want, lease, reply } => {
                self.used_at = now;
                if let Some(refusal) = self.fenced(now).or_else(|| self.full()) {
                    return drop(reply.send(Err(refusal)));
                }
                self.join(Waiter { ticket, want, lease, reply }, now);
            }
            ConsumerCommand::Leave(ticket) => {
                if let Some(id) = self.tickets.remove(&ticket) {
                    self.waiters.remove(&id);
                    self.pump.leave(id, now);
                }
            }
            ConsumerCommand::GiveBack(granted_deliveries) => {
                self.take_back(granted_deliveries, now)
            }
            ConsumerCommand::Doubt => self.unanswered(now),
            ConsumerCommand::Heard(sighting, reply) => self.heard(sighting, reply, now),
            ConsumerCommand::Know(reply) => {
                self.used_at = now;
                self.curious.push(reply);
                self.tell_facts();
            }
        }
    }

    fn join(&mut self, waiter: Waiter, now: Instant) {
        let ticket = waiter.ticket;
        let id = self.pump.join(waiter.want.clone(), now);
        self.tickets.insert(ticket, id);
        self.waiters.insert(id, waiter);
    }

    fn up(&self) -> bool {
        matches!(self.link, Link::Up(_))
    }

    fn why_away(&self) -> String {
        match &self.link {
            Link::Up(_) => self.unread.to_string(),
            Link::Down(why) | Link::Unsupported(why) => why.to_string(),
        }
    }
}
