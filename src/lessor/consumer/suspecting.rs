//! What becomes of a consumer whose connection broke by what it brought: it is found out whether it
//! was this consumer's, what cannot be read is terminated, and `suspicion` says where to go on. Owns
//! on which connection the consumer is.

use std::{
    collections::BTreeSet,
    future::Future,
    pin::Pin,
    time::{Duration, Instant},
};

use tokio::time::timeout_at;

use super::{
    ConsumerTask,
    quarantine::{Barred, Looked},
};
use crate::{
    broker::{
        AckKind, AckPublish, Arrival, Broker, BrokerError, Confirmation, ConnectionKind,
        ConsumerName, Denial, Inbox, InboxEvent, InfoError, Search, Unreadable,
    },
    clock,
    lessor::{Error, Lessor, Unsuitable, shares::Explained},
};

/// What a pull has brought has arrived by then: longer than it may take, and be under way.
const AFTERMATH: Duration = Duration::from_secs(10);
/// An inbox that was left is listened to this long.
const LINGER: Duration = Duration::from_secs(5);
/// Bounds one look for unreadable messages.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(5);

/// An inbox that is not pulled on any more: what its last pull has brought may come after its end.
pub(super) struct PreviousInbox<I> {
    inbox: I,
    until: Instant,
    arrivals: Vec<Arrival>,
}

pub(super) type Looking = Pin<Box<dyn Future<Output = Looked> + Send>>;

impl<B: Broker> ConsumerTask<B> {
    /// The connection broke by what it brought, to us or to another.
    pub(super) fn broke(&mut self, now: Instant) {
        self.sharing.cut(self.on);
        // On a replicated consumer what a pull brings may come after its end.
        if self.pulled_at.is_some_and(|at| now < at + AFTERMATH) {
            let own = self.apart.is_some();
            self.quarantine.accuse(if own {
                ConnectionKind::Dedicated
            } else {
                ConnectionKind::Shared
            });
            (self.learned_on, self.ask_at) = (None, now);
        }
        self.disconnected(now);
    }

    /// INFO was read after a break. Everything that JetStream has delivered since we began to pull
    /// has a higher consumer sequence; if the highest of them has arrived, the break was another's.
    pub(super) fn examine(&mut self, delivered: u64) {
        if !self.quarantine.accused() || self.looking.is_some() {
            return;
        }
        let (consumer_sequence, stream_sequence) = self.seen;
        if delivered <= consumer_sequence {
            return self.quarantine.acquit();
        }
        tracing::warn!(
            consumer = %self.name,
            "the connection broke by what it brought: looking for messages that cannot be read"
        );
        // New ones come in order, and nothing behind the one that broke it has arrived.
        let from = stream_sequence.saturating_add(1);
        let known = self.quarantine.terminated().clone();
        self.looking = Some(Box::pin(look(self.lessor.clone(), self.name.clone(), from, known)));
    }

    pub(super) fn looked(&mut self, looked: &Looked, now: Instant) {
        self.looking = None;
        let found = matches!(looked, Looked::Found { .. });
        let explained = self.sharing.explain(now).filter(|_| !found);
        if let Some(Explained { first: true, cause, bound }) = explained
            && cause.slow
        {
            tracing::warn!(
                outstanding = cause.out,
                bound,
                "NATS cut the connection for deliveries while many bytes were outstanding, and no \
                 message explains it: a slow consumer for NATS; lower --max-pull-bytes, or raise \
                 max_pending at the server"
            );
        }
        let cause = explained.map(|explained| explained.cause);
        if let Some(barred) = self.quarantine.weigh(looked, cause, now) {
            let error = self.error_of(barred);
            let consumer = &self.name;
            if matches!(error, Error::ConsumerSuspected { .. }) {
                tracing::warn!(%consumer, %error, "a connection of its own broke, and it is not known by what");
            } else {
                tracing::error!(%consumer, %error, "the consumer is fenced off for a while");
            }
            self.fail_waiters(&error, now);
        }
    }

    /// Why nobody is served now.
    pub(super) fn fenced(&self, now: Instant) -> Option<Error> {
        self.quarantine.fenced(now).map(|barred| self.error_of(barred))
    }

    fn error_of(&self, barred: Barred) -> Error {
        let name = self.name.clone();
        match barred {
            Barred::Unreadable { needs } => {
                let property = Unsuitable::Unreadable { needs };
                Error::ConsumerUnsuitable { name, property }
            }
            Barred::Suspected { needs } => Error::ConsumerSuspected { name, needs },
        }
    }

    /// Opens an inbox where the consumer belongs. While all places apart are taken, that is where
    /// everybody is.
    pub(super) async fn open(&mut self, epoch: u64, now: Instant) {
        if self.lessor.broker.link() != self.link {
            // It would be on a connection that we do not know of yet.
            return;
        }
        if self.quarantine.place() == ConnectionKind::Dedicated {
            self.apart = self.lessor.apart.clone().try_acquire_owned().ok();
        }
        let place =
            if self.apart.is_some() { ConnectionKind::Dedicated } else { ConnectionKind::Shared };
        match self.lessor.broker.open(&self.name, place).await {
            Ok(inbox) => {
                (self.inbox, self.pulled_at) = (Some(inbox), None);
                self.on = (place == ConnectionKind::Shared).then_some(epoch);
                self.sharing.move_to(place, self.backlog);
                self.pump.up(now);
            }
            // The link says so in a moment.
            Err(error) => {
                self.apart = None;
                tracing::debug!(consumer = %self.name, %error, "no inbox");
            }
        }
    }

    /// Leaves an inbox that is not where the consumer belongs: on a connection that was replaced, or
    /// apart without need any more. Its last pull has ended.
    pub(super) fn move_on(&mut self, now: Instant) {
        self.left = self.left.take().filter(|left| now < left.until);
        if !self.quiet() {
            return;
        }
        let forgiven = self.quarantine.outlived(now) && self.apart.is_some();
        if self.outdated() || forgiven {
            tracing::info!(consumer = %self.name, "it goes to the shared connection");
            let until = now + LINGER;
            self.left =
                self.inbox.take().map(|inbox| PreviousInbox { inbox, until, arrivals: Vec::new() });
            self.ask_at = now;
            self.disconnected(now);
        }
    }

    /// Something came through an inbox that was left.
    pub(super) fn late(&mut self, news: InboxEvent, now: Instant) {
        match (news, &mut self.left) {
            (InboxEvent::Arrived, Some(left)) => {
                self.arrivals.append(&mut left.arrivals);
                self.arrived(now);
            }
            _ => self.left = None,
        }
    }

    /// No pull is out that could still bring anything.
    pub(super) fn quiet(&self) -> bool {
        self.places.as_ref().is_none_or(|places| places.num_permits() == 0)
    }
}

/// Terminates what cannot be read. Nobody here can hold a lease on it, for nobody could receive it.
/// What was terminated before is so again only if there is nothing else: a server that has crashed
/// may have forgotten it.
async fn look<B: Broker>(
    lessor: Lessor<B>,
    name: ConsumerName,
    from: u64,
    known: BTreeSet<u64>,
) -> Looked {
    let until = clock::now() + SEARCH_TIMEOUT;
    let blind = Looked::Nothing { complete: false };
    // Its answers carry whole messages, on the connection that settles: few at a time.
    let Ok(Ok(_place)) = timeout_at(until.into(), lessor.looks.acquire()).await else {
        return blind;
    };
    let Search { mut found, complete } = match lessor.broker.unreadable(&name, from, until).await {
        Ok(search) => search,
        Err(InfoError::Permission(subject)) => return Looked::NotAllowed(subject),
        Err(error) => {
            tracing::debug!(consumer = %name, %error, "not looked for unreadable messages");
            return blind;
        }
    };
    if found.is_empty() {
        return Looked::Nothing { complete };
    }
    if found.iter().any(|message| !known.contains(&message.stream_sequence)) {
        found.retain(|message| !known.contains(&message.stream_sequence));
    }
    let until = clock::now() + lessor.limits.settle_timeout;
    let orders = found.iter().map(term).collect();
    let results = lessor.broker.settle(orders, Confirmation::Confirmed, until).await;
    let (mut terminated, mut needs) = (Vec::new(), None);
    for (message, result) in found.iter().zip(results) {
        let (sequence, why) = (message.stream_sequence, &*message.why);
        let ConsumerName { stream, consumer } = &name;
        match result {
            Ok(()) => {
                tracing::warn!(%stream, %consumer, sequence, why, "a message that cannot be read was terminated");
                terminated.push(sequence);
            }
            Err(error) => {
                tracing::warn!(%stream, %consumer, sequence, why, %error, "a message that \
                    cannot be read could not be terminated");
                if let BrokerError::Denied(Denial::Permission(subject)) = error {
                    needs = Some(subject);
                }
            }
        }
    }
    Looked::Found { terminated, needs }
}

fn term(message: &Unreadable) -> AckPublish {
    let kind = AckKind::Term(format!("fetch-proxy: unreadable headers: {}", message.why));
    AckPublish { ack: message.ack.clone(), kind, confirm_group: None, by: None }
}

/// What the look has led to, while there is one.
pub(super) async fn looked(looking: &mut Option<Looking>) -> Looked {
    match looking {
        Some(looking) => looking.await,
        None => std::future::pending().await,
    }
}

/// The same of an inbox that was left.
pub(super) async fn late<I: Inbox>(left: &mut Option<PreviousInbox<I>>) -> InboxEvent {
    match left {
        Some(left) => left.inbox.next(&mut left.arrivals).await,
        None => std::future::pending().await,
    }
}
