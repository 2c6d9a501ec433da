//! The task behind one consumer: it performs what its pump decides, on an inbox of the broker.
//!
//! ```text
//!            INFO read            inbox opened             connection lost
//!  LEARNING ───────────▶ KNOWN ──────────────▶ PULLING ───────────────────▶ LEARNING
//!     │ no such consumer, unsuitable, no rights: every waiter is told, and the feed ends
//! ```
//! 1. nothing is pulled before INFO was read on this very connection: a lease that the server has
//!    forgotten must end before its message can arrive anew;
//! 2. every delivery that arrives is leased in the table before anybody sees it;
//! 3. every waiter is answered once, also when the feed ends.

use std::{
    collections::HashMap,
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::{Mutex, OwnedSemaphorePermit, mpsc, oneshot};

use super::{
    Error, Lessor,
    books::Hold,
    facts::{Facts, encoded_size},
    fetch::{Leased, info_failure},
};
use crate::{
    broker::{
        Arrival, Broker, ConsumerInfo, ConsumerName, Delivery, End, Inbox, InfoError, Link, Pull,
    },
    clock,
    lease::{LeaseId, Terms},
    pump::{Limits, PullEnd, Pump, Step, WaiterId, Want, Why},
};

/// A waiter with nothing is told so when NATS has been away for this long: long enough for a
/// reconnect to go unnoticed, short enough to try another replica.
const AWAY: Duration = Duration::from_secs(2);
/// Bounds one CONSUMER.INFO, and spaces two that failed.
const INFO_TIMEOUT: Duration = Duration::from_secs(2);
const INFO_RETRY: Duration = Duration::from_millis(250);
/// Leases that are revised under one lock.
const STEP: usize = 1024;
/// A feed without waiters and leases ends after this.
const IDLE: Duration = Duration::from_secs(600);

/// Names one open Fetch to its feed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ticket(pub(super) u64);

/// A delivery on its way to a caller, with what is needed to give it back.
#[derive(Debug)]
pub(super) struct Parcel {
    pub(super) id: LeaseId,
    pub(super) delivery: Box<Delivery>,
    pub(super) facts: Arc<Facts>,
}

impl Parcel {
    fn last_attempt(&self) -> bool {
        self.facts.last_attempt(self.delivery.delivery_count)
    }
}

/// What a waiter is told. It may be dropped at any point of its way to a caller who has gone; then
/// what it carries is given back.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) messages: Vec<Leased>,
    pub(super) too_large: Option<Leased>,
    pub(super) draining: bool,
    pub(super) feed: Feed,
}

impl Drop for Answer {
    fn drop(&mut self) {
        let unhanded = self.messages.drain(..).chain(self.too_large.take());
        self.feed.give_back(unhanded.map(|leased| leased.parcel).collect());
    }
}

type Reply = oneshot::Sender<Result<Answer, Error>>;

/// What is asked of a feed.
pub(super) enum Command {
    Join { ticket: Ticket, want: Want, lease: Option<Duration>, reply: Reply },
    Leave(Ticket),
    GiveBack(Vec<Parcel>),
}

/// The way to a consumer's feed.
#[derive(Debug, Clone)]
pub(super) struct Feed {
    commands: mpsc::UnboundedSender<Command>,
    /// INFO for answers without messages, and when it was read.
    pub(super) recent_info: Arc<Mutex<Option<(Instant, ConsumerInfo)>>>,
}

impl Feed {
    /// Whether the feed is there to take it; a feed that has ended gives it back.
    pub(super) fn send(&self, command: Command) -> Result<(), Command> {
        self.commands.send(command).map_err(|refused| refused.0)
    }

    pub(super) fn leave(&self, ticket: Ticket) {
        // A feed that has ended has no waiters left.
        let _ = self.send(Command::Leave(ticket));
    }

    pub(super) fn give_back(&self, parcels: Vec<Parcel>) {
        if !parcels.is_empty() {
            // A feed that has ended leaves its deliveries to the table's clocks.
            let _ = self.send(Command::GiveBack(parcels));
        }
    }

    pub(super) fn ended(&self) -> bool {
        self.commands.is_closed()
    }
}

struct Waiter {
    ticket: Ticket,
    want: Want,
    lease: Option<Duration>,
    reply: Reply,
}

type Asking = Pin<Box<dyn Future<Output = Result<ConsumerInfo, InfoError>> + Send>>;

/// The task's own side.
pub(super) struct FeedTask<B: Broker> {
    lessor: Lessor<B>,
    name: ConsumerName,
    /// The way to ourselves, for answers that are not taken.
    feed: Feed,
    commands: mpsc::UnboundedReceiver<Command>,
    pump: Pump<Parcel>,
    waiters: HashMap<WaiterId, Waiter>,
    tickets: HashMap<Ticket, WaiterId>,
    link: Link,
    /// The server that was connected last: another one may not know what it promised.
    server: Option<String>,
    away_since: Option<Instant>,
    asking: Option<Asking>,
    /// When INFO is wanted next.
    ask_at: Instant,
    facts: Option<Arc<Facts>>,
    /// The connection that `facts` were read on.
    learned_on: Option<u64>,
    inbox: Option<B::Inbox>,
    arrivals: Vec<Arrival>,
    /// Places in the table for what the open pull may still bring.
    places: Option<OwnedSemaphorePermit>,
    /// A limit of the consumer was passed, and INFO was asked for it.
    limited: bool,
    used_at: Instant,
    draining: bool,
}

enum Event {
    Command(Command),
    Arrived(bool),
    Info(Result<ConsumerInfo, InfoError>),
    Link(Link),
    Drain,
    Tick,
}

impl<B: Broker> FeedTask<B> {
    /// A feed, and the task that [`FeedTask::run`] makes of it.
    pub(super) fn new(lessor: Lessor<B>, name: ConsumerName) -> (Feed, Self) {
        let (sender, commands) = mpsc::unbounded_channel();
        let (now, link) = (clock::now(), lessor.broker.link());
        let limits = Limits {
            max_batch: 1,
            max_expires: Duration::MAX,
            max_request_bytes: None,
            park: Duration::from_secs(1),
        };
        let feed = Feed { commands: sender, recent_info: Arc::default() };
        let task = Self {
            name,
            feed: feed.clone(),
            commands,
            pump: Pump::new(limits),
            waiters: HashMap::new(),
            tickets: HashMap::new(),
            server: match &link {
                Link::Up(server) => Some(server.id.clone()),
                Link::Down(_) | Link::Unfit(_) => None,
            },
            away_since: (!matches!(link, Link::Up(_))).then_some(now),
            link,
            asking: None,
            ask_at: now,
            facts: None,
            learned_on: None,
            inbox: None,
            arrivals: Vec::new(),
            places: None,
            limited: false,
            used_at: now,
            draining: false,
            lessor,
        };
        (feed, task)
    }

    /// Runs until the consumer is gone, nobody has used it for long, or the lessor is closed.
    pub(super) async fn run(mut self) {
        let end = loop {
            self.prepare().await;
            self.perform().await;
            let now = clock::now();
            if self.draining && self.pump.waiters() == 0 || self.idle(now) {
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

    /// Takes in who else is about to join, so that one pull is for all of them: callers that were
    /// answered together come back together.
    async fn gather(&mut self) {
        if self.pump.waiters() > 0 {
            tokio::task::yield_now().await;
        }
        while let Ok(command) = self.commands.try_recv() {
            self.command(command, clock::now());
        }
    }

    fn idle(&self, now: Instant) -> bool {
        self.pump.is_idle() && now.duration_since(self.used_at) > IDLE && self.held() == 0
    }

    fn held(&self) -> usize {
        let held = |facts: &Arc<Facts>| self.lessor.books.with(|table| table.held_by(facts.id));
        self.facts.as_ref().map_or(0, held)
    }

    /// Waits for the next thing to happen. `None` once the lessor is closed.
    async fn event(&mut self, now: Instant) -> Option<Event> {
        let deadline = self.deadline(now);
        let starved = self.pump.starved() && self.lessor.books.free() == 0;
        let Self { lessor, commands, inbox, arrivals, asking, link, draining, .. } = self;
        tokio::select! {
            biased;
            () = lessor.closed.cancelled() => None,
            command = commands.recv() => command.map(Event::Command),
            alive = next(inbox, arrivals) => Some(Event::Arrived(alive)),
            info = answer(asking) => Some(Event::Info(info)),
            link = lessor.broker.link_change(link) => Some(Event::Link(link)),
            () = lessor.draining.cancelled(), if !*draining => Some(Event::Drain),
            () = lessor.books.place_freed(), if starved => Some(Event::Tick),
            () = clock::sleep_until(Some(deadline)) => Some(Event::Tick),
        }
    }

    fn deadline(&self, now: Instant) -> Instant {
        let away = self.away_since.filter(|_| self.pump.waiters() > 0).map(|since| since + AWAY);
        let ask = (self.asking.is_none() && self.up()).then_some(self.ask_at.max(now));
        let idle = self.used_at + IDLE + Duration::from_millis(1);
        [self.pump.next_deadline(now), away, ask]
            .into_iter()
            .flatten()
            .fold(idle.max(now + Duration::from_secs(1)), Instant::min)
    }

    /// # Errors
    /// Why the feed ends.
    fn take(&mut self, event: Event) -> Result<(), Error> {
        let now = clock::now();
        match event {
            Event::Command(command) => self.command(command, now),
            Event::Arrived(true) => self.arrived(now),
            Event::Arrived(false) => self.disconnected(now),
            Event::Info(info) => self.learned(info, now)?,
            Event::Link(link) => self.linked(link, now),
            Event::Drain => {
                self.draining = true;
                self.pump.drain(now);
            }
            Event::Tick => {}
        }
        if self.away_since.is_some_and(|since| now.duration_since(since) >= AWAY) {
            self.fail_waiters(&Error::Unavailable(self.why_away()), now);
        }
        Ok(())
    }

    fn command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Join { ticket, want, lease, reply } => {
                self.used_at = now;
                self.join(Waiter { ticket, want, lease, reply }, now);
            }
            Command::Leave(ticket) => {
                if let Some(id) = self.tickets.remove(&ticket) {
                    self.waiters.remove(&id);
                    self.pump.leave(id, now);
                }
            }
            Command::GiveBack(parcels) => self.take_back(parcels, now),
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
            Link::Up(_) => "the consumer cannot be read".to_owned(),
            Link::Down(why) | Link::Unfit(why) => why.to_string(),
        }
    }

    /// Asks INFO when it is due and opens an inbox when the consumer is known.
    async fn prepare(&mut self) {
        let now = clock::now();
        let Link::Up(server) = &self.link else { return };
        let epoch = server.epoch;
        if self.asking.is_none() && now >= self.ask_at {
            let needed = self.learned_on != Some(epoch) || self.pump.waiters() > 0;
            if needed || self.held() > 0 {
                let (broker, name) = (self.lessor.clone(), self.name.clone());
                let until = now + INFO_TIMEOUT;
                self.asking = Some(Box::pin(async move { broker.broker.info(&name, until).await }));
            } else {
                self.ask_at = now + self.refresh();
            }
        }
        if self.inbox.is_none() && self.learned_on == Some(epoch) {
            match self.lessor.broker.open(&self.name).await {
                Ok(inbox) => {
                    self.inbox = Some(inbox);
                    self.pump.up(now);
                }
                // The link says so in a moment.
                Err(error) => tracing::debug!(consumer = %self.name, %error, "no inbox"),
            }
        }
    }

    fn refresh(&self) -> Duration {
        self.facts.as_ref().map_or(INFO_RETRY, |facts| facts.refresh())
    }

    /// Does what the pump says, until it has nothing more to say.
    async fn perform(&mut self) {
        loop {
            let now = clock::now();
            // While one connection is missing, or INFO is overdue, nothing new is pulled.
            let fresh = now < self.ask_at + self.refresh() + INFO_TIMEOUT;
            let permits = if self.up() && fresh { self.lessor.books.free() } else { 0 };
            match self.pump.step(now, permits) {
                None => return,
                Some(Step::Pull { no, batch, expires, no_wait, max_bytes }) => {
                    self.pull(Pull { no, batch, expires, no_wait, max_bytes }).await;
                }
                Some(Step::Answer { waiter, messages, too_large, why }) => {
                    self.answer(waiter, messages, too_large, why, now);
                }
                Some(Step::Overdue { message }) => self.release(vec![message], now),
            }
        }
    }

    async fn pull(&mut self, pull: Pull) {
        self.places = None;
        self.places = self.lessor.books.reserve(pull.batch);
        let sent = match (&self.places, &mut self.inbox) {
            (Some(_), Some(inbox)) => inbox.pull(pull).await,
            // Others took the places in between, or the connection went: the pump tries again.
            _ => Err(crate::broker::BrokerError::Unsent("no room".to_owned())),
        };
        if sent.is_err() {
            self.places = None;
            self.pump.ended(pull.no, PullEnd::Refused, clock::now());
        }
    }

    /// Leases what has arrived, and tells the pump.
    fn arrived(&mut self, now: Instant) {
        let Some(facts) = self.facts.clone() else { return };
        let arrivals: Vec<Arrival> = self.arrivals.drain(..).collect();
        let places = &mut self.places;
        let mut superseded = Vec::new();
        let mut granted: Vec<(LeaseId, Box<Delivery>)> = Vec::with_capacity(arrivals.len());
        let mut ends = Vec::new();
        self.lessor.books.with(|table| {
            for arrival in arrivals {
                match arrival {
                    Arrival::Message(delivery) => {
                        let hold = Hold {
                            ack: delivery.ack.clone(),
                            facts: facts.clone(),
                            delivery_count: delivery.delivery_count,
                            _place: places.as_mut().and_then(|places| places.split(1)),
                        };
                        let (id, older) = table.grant(terms(&facts, &delivery, now), hold);
                        superseded.extend(older);
                        granted.push((id, delivery));
                    }
                    Arrival::End { no, end } => ends.push((no, end)),
                }
            }
        });
        if !superseded.is_empty() {
            let (consumer, count) = (&self.name, superseded.len());
            tracing::info!(%consumer, count, "delivered anew while leased: the older leases ended");
        }
        for (id, delivery) in granted {
            let size = encoded_size(&delivery);
            let parcel = Parcel { id, delivery, facts: facts.clone() };
            let last_attempt = parcel.last_attempt();
            self.pump.arrived(parcel, size, last_attempt, now);
        }
        for (no, end) in ends {
            self.ended(no, end, now);
        }
    }

    /// A pull has ended. Some ends say more than that.
    fn ended(&mut self, no: u64, end: End, now: Instant) {
        self.places = None;
        let end = match end {
            End::Done => PullEnd::Done,
            End::RequestsPending => PullEnd::RequestsPending,
            End::TooLarge => PullEnd::TooLarge,
            End::Busy(why) => {
                // A limit that INFO tells is kept to from the next pull on; what it does not tell,
                // like too many pulls of others, is for the callers to know.
                if self.limited || why.contains("MaxWaiting") {
                    self.fail_waiters(&Error::ConsumerBusy(why), now);
                }
                self.limited = true;
                self.ask_at = now;
                PullEnd::Refused
            }
            End::LeaderGone => {
                self.distrust(now);
                self.ask_at = now;
                PullEnd::Refused
            }
            End::ConsumerGone => {
                self.ask_at = now;
                PullEnd::Refused
            }
            End::Permission(subject) => {
                self.fail_waiters(&Error::Permission(subject), now);
                self.disconnected(now);
                self.learned_on = None;
                PullEnd::Refused
            }
            End::Other(why) => {
                tracing::warn!(consumer = %self.name, why, "a pull was refused");
                PullEnd::Refused
            }
        };
        self.pump.ended(no, end, now);
    }

    fn disconnected(&mut self, now: Instant) {
        self.inbox = None;
        self.places = None;
        self.pump.down(now);
    }

    fn linked(&mut self, link: Link, now: Instant) {
        let lost_at = self.away_since.unwrap_or(now);
        self.away_since = match &link {
            Link::Up(_) => None,
            Link::Down(_) | Link::Unfit(_) => self.away_since.or(Some(now)),
        };
        if let Link::Up(server) = &link {
            if self.learned_on != Some(server.epoch) {
                self.ask_at = now;
            }
            if self.server.replace(server.id.clone()).is_some_and(|last| last != server.id) {
                self.distrust(lost_at);
            }
        }
        self.link = link;
    }

    /// # Errors
    /// Why the feed ends: the consumer is not there, or not one to lease from.
    fn learned(
        &mut self,
        info: Result<ConsumerInfo, InfoError>,
        now: Instant,
    ) -> Result<(), Error> {
        self.asking = None;
        let info = match info {
            Ok(info) => info,
            Err(InfoError::Unavailable(why)) => {
                tracing::debug!(consumer = %self.name, why, "INFO");
                self.ask_at = now + INFO_RETRY;
                self.away_since = self.away_since.or(Some(now));
                return Ok(());
            }
            Err(error) => {
                if matches!(error, InfoError::NoStream | InfoError::NoConsumer) {
                    self.end_leases();
                }
                return Err(info_failure(error, &self.name));
            }
        };
        if self.facts.as_ref().is_some_and(|facts| facts.created != info.created) {
            tracing::info!(consumer = %self.name, "it was made anew: the leases of the old one end");
            self.end_leases();
        }
        let known = self.facts.take();
        let id = known.as_ref().map_or_else(|| self.lessor.next_consumer(), |facts| facts.id);
        let facts = Arc::new(Facts::read(&self.name, id, &info)?);
        if let Some(known) = known.filter(|known| **known != *facts) {
            self.retune(&known, &facts);
        }
        self.pump.set_limits(facts.limits());
        self.facts = Some(facts);
        if let Link::Up(server) = &self.link {
            if self.learned_on.replace(server.epoch) != Some(server.epoch) {
                self.lessor
                    .in_steps(|table, after| table.lose_after(id, info.delivered, after, STEP));
            }
            self.away_since = None;
        }
        self.ask_at = now + self.refresh();
        Ok(())
    }

    fn answer(
        &mut self,
        id: WaiterId,
        messages: Vec<Parcel>,
        too_large: Option<Parcel>,
        why: Why,
        now: Instant,
    ) {
        let Some(waiter) = self.waiters.remove(&id) else {
            return self.take_back(messages.into_iter().chain(too_large).collect(), now);
        };
        self.tickets.remove(&waiter.ticket);
        let found = !messages.is_empty() || too_large.is_some();
        let messages = self.lend(messages, waiter.lease, now);
        let too_large = self.lend(Vec::from_iter(too_large), waiter.lease, now).pop();
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

    /// Makes the leases the caller's own. What was lost in the meantime is left out.
    fn lend(&self, parcels: Vec<Parcel>, lease: Option<Duration>, now: Instant) -> Vec<Leased> {
        self.lessor.books.with(|table| {
            let lend = |parcel: Parcel| {
                let lent = table.lend(parcel.id, lease, now).ok()?;
                let (deadline, settle_by) = (lent.deadline, lent.settle_by);
                Some(Leased { id: parcel.id, deadline, settle_by, parcel })
            };
            parcels.into_iter().filter_map(lend).collect()
        })
    }

    /// An answer that nobody took goes to the next waiter.
    fn take_back(&mut self, parcels: Vec<Parcel>, now: Instant) {
        self.lessor.books.with(|table| {
            for parcel in parcels.iter().filter(|parcel| parcel.last_attempt()) {
                table.keep(parcel.id, now);
            }
        });
        let sized = |parcel: Parcel| {
            let (size, last) = (encoded_size(&parcel.delivery), parcel.last_attempt());
            (parcel, size, last)
        };
        self.pump.unhanded(parcels.into_iter().map(sized).collect(), now);
    }

    /// Gives deliveries back to JetStream that nobody here wants.
    fn release(&self, parcels: Vec<Parcel>, now: Instant) {
        let holds: Vec<Hold> = self.lessor.books.with(|table| {
            let back = parcels.iter().filter_map(|parcel| table.give_back(parcel.id, now));
            back.filter(|ended| ended.release).map(|ended| ended.payload).collect()
        });
        self.lessor.release(&holds);
    }

    fn fail_waiters(&mut self, error: &Error, now: Instant) {
        for id in self.pump.fail(now) {
            if let Some(waiter) = self.waiters.remove(&id) {
                self.tickets.remove(&waiter.ticket);
                let _ = waiter.reply.send(Err(error.clone()));
            }
        }
    }

    /// The consumer is not the one it was: nothing that was leased from it can be settled.
    fn end_leases(&mut self) {
        if let Some(facts) = self.facts.take() {
            self.lessor.books.with(|table| table.end_consumer(facts.id));
        }
    }

    fn retune(&self, old: &Facts, new: &Facts) {
        if (old.ack_wait, &old.backoff) != (new.ack_wait, &new.backoff) {
            tracing::info!(consumer = %self.name, "its ack wait has changed");
            let ack_wait = |count| new.ack_wait_of(count);
            self.lessor.in_steps(|table, after| table.retune(new.id, ack_wait, after, STEP));
        }
    }

    /// The server may have forgotten, then or later, what it had promised just before.
    fn distrust(&self, when: Instant) {
        if let Some(facts) = &self.facts {
            self.lessor.in_steps(|table, after| table.distrust(facts.id, when, after, STEP));
        }
    }

    /// Answers whoever is left, and those who join in the last moment.
    fn finish(mut self, end: &Error) {
        self.commands.close();
        self.lessor.forget_feed(&self.name);
        let now = clock::now();
        self.fail_waiters(end, now);
        let mut unhanded = self.pump.take_parked();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Join { reply, .. } => drop(reply.send(Err(end.clone()))),
                Command::GiveBack(parcels) => unhanded.extend(parcels),
                Command::Leave(_) => {}
            }
        }
        self.release(unhanded, now);
    }
}

fn terms(facts: &Facts, delivery: &Delivery, received: Instant) -> Terms {
    Terms {
        consumer: facts.id,
        sequence: delivery.stream_sequence,
        consumer_sequence: delivery.consumer_sequence,
        last_attempt: facts.last_attempt(delivery.delivery_count),
        received,
        ack_wait: facts.ack_wait_of(delivery.delivery_count),
        delivery_count: delivery.delivery_count,
    }
}

async fn next<I: Inbox>(inbox: &mut Option<I>, into: &mut Vec<Arrival>) -> bool {
    match inbox {
        Some(inbox) => inbox.next(into).await,
        None => std::future::pending().await,
    }
}

async fn answer(asking: &mut Option<Asking>) -> Result<ConsumerInfo, InfoError> {
    match asking {
        Some(asking) => asking.await,
        None => std::future::pending().await,
    }
}
