//! The messages in hand: they wait for a place, a handler works on each, and an outcome is decided, or the lease is
//! lost. `L` is how a loop carries the lease: the loop says when it is settled and until when it lasts.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use tokio::{
    task::{self, AbortHandle, JoinError, JoinSet},
    time::Instant,
};

use crate::{Envelope, Error, Event, Failure, Nak, Rejected, Term, job::Job, outcome::Outcome, pb};

pub(crate) type Done = Result<(task::Id, Result<Result<(), Failure>, String>), JoinError>;

pub(crate) struct Hand<L> {
    pub job: Job,
    held: BTreeMap<u64, Held<L>>,
    /// Messages without a place, in their order. Some may be gone.
    waiting: VecDeque<u64>,
    handlers: JoinSet<Result<Result<(), Failure>, String>>,
    /// The message of each handler. A handler keeps its place until it returns, also if its message is gone.
    places: HashMap<task::Id, u64>,
    /// Handlers whose messages are gone.
    strays: usize,
    last_key: u64,
}

/// A message in hand, until it is settled or its lease is lost.
pub(crate) struct Held<L> {
    pub token: String,
    /// Undecided while it waits or a handler works on it.
    pub outcome: Option<Outcome>,
    /// The time after which the lease is not kept for its handler.
    pub latest: Instant,
    pub link: L,
    /// `None`: it came rejected, and was told of already.
    message: Option<Arc<Envelope>>,
    /// The handler that runs.
    handler: Option<AbortHandle>,
}

impl<L> Hand<L> {
    pub fn new(job: Job) -> Self {
        Self {
            job,
            held: BTreeMap::new(),
            waiting: VecDeque::new(),
            handlers: JoinSet::new(),
            places: HashMap::new(),
            strays: 0,
            last_key: 0,
        }
    }

    /// Takes a message, which then waits for a place. At a stop, it goes back instead.
    pub fn take(&mut self, delivery: pb::Delivery, link: L, is_stopping: bool) -> u64 {
        let message = Arc::new(Envelope::of(delivery));
        let goes_back = is_stopping && !message.is_last_attempt();
        let key = self.hold(message.token.clone(), link, goes_back.then_some(Outcome::Return));
        if let Some(held) = self.held.get_mut(&key) {
            held.message = Some(message);
        }
        self.waiting.push_back(key);
        key
    }

    /// Tells of a rejected message. If it is still leased, the message has an outcome.
    pub fn take_rejected(&mut self, rejected: pb::Rejected, link: L) -> Option<u64> {
        let rejected = Rejected::of(rejected);
        self.job.hook.tell(Event::Rejected { rejected: rejected.clone() });
        let outcome = Some(Outcome::of_rejected(&rejected));
        (!rejected.token.is_empty()).then(|| self.hold(rejected.token, link, outcome))
    }

    fn hold(&mut self, token: String, link: L, outcome: Option<Outcome>) -> u64 {
        self.last_key += 1;
        let latest = Instant::now() + self.job.at_most;
        let held = Held { token, outcome, latest, link, message: None, handler: None };
        self.held.insert(self.last_key, held);
        self.last_key
    }

    /// Begins handlers, as long as there are places for them.
    pub fn begin(&mut self) {
        while self.free() > 0
            && let Some(key) = self.waiting.pop_front()
        {
            let Some(held) = self.held.get_mut(&key) else { continue };
            let (None, Some(message)) = (&held.outcome, &held.message) else { continue };
            let handler = self.handlers.spawn(self.job.clone().handle(message.clone()));
            self.places.insert(handler.id(), key);
            held.handler = Some(handler);
        }
    }

    /// The next handler that has returned. `None`: no handler runs.
    pub async fn join(&mut self) -> Option<Done> {
        self.handlers.join_next_with_id().await
    }

    /// A handler that has returned by now.
    pub fn try_join(&mut self) -> Option<Done> {
        self.handlers.try_join_next_with_id()
    }

    /// Decides by the result of a handler. `None`: nobody wants the result, because the message is gone or goes back.
    pub fn finished(&mut self, done: Done) -> Option<u64> {
        let id = done.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let key = self.places.remove(&id)?;
        let Some(held) = self.held.get_mut(&key) else {
            self.strays -= 1;
            return None;
        };
        held.handler = None;
        let message = held.message.clone().filter(|_| held.outcome.is_none())?;
        let failure = match done {
            Ok((_, Ok(Ok(())))) => return self.decide(key, Outcome::Ack),
            Ok((_, Err(reason))) => return self.decide(key, Outcome::term(&reason)),
            Ok((_, Ok(Err(failure)))) => failure,
            // A panic ends only the handler.
            Err(panic) => panic.into(),
        };
        let outcome = if let Some(Nak { delay }) = failure.meant() {
            Outcome::nak(*delay)
        } else if let Some(Term { reason }) = failure.meant() {
            Outcome::term(reason)
        } else {
            let outcome = Outcome::failed(&message);
            self.job.hook.tell(Event::HandlerError { message, error: failure.0 });
            outcome
        };
        self.decide(key, outcome)
    }

    fn decide(&mut self, key: u64, outcome: Outcome) -> Option<u64> {
        self.held.get_mut(&key)?.outcome = Some(outcome);
        Some(key)
    }

    /// At a stop: messages that no handler has begun go back. A Nak of the last attempt would end the message.
    pub fn give_back_waiting(&mut self) -> Vec<u64> {
        let mut keys = Vec::new();
        for (key, held) in &mut self.held {
            let is_last = held.message.as_ref().is_some_and(|message| message.is_last_attempt());
            if held.outcome.is_none() && held.handler.is_none() && !is_last {
                held.outcome = Some(Outcome::Return);
                keys.push(*key);
            }
        }
        keys
    }

    /// Cancels the handlers, and gives their messages back. The first messages are returned, and the second are lost, because a
    /// Nak of the last attempt would end the message.
    pub fn give_back_by_force(&mut self) -> (Vec<u64>, Vec<u64>) {
        let (mut returned, mut lost) = (Vec::new(), Vec::new());
        for (key, held) in self.held.iter_mut().filter(|(_, held)| held.outcome.is_none()) {
            if held.message.as_ref().is_some_and(|message| message.is_last_attempt()) {
                lost.push(*key);
                continue;
            }
            held.outcome = Some(Outcome::Return);
            if let Some(handler) = &held.handler {
                handler.abort();
            }
            returned.push(*key);
        }
        (returned, lost)
    }

    /// The lease is lost. The handler is cancelled, and its result is dropped.
    pub fn lose(&mut self, key: u64, error: Error) {
        let Some(held) = self.remove(key) else { return };
        if let Some(handler) = held.handler {
            handler.abort();
        }
        if let Some(message) = held.message {
            self.job.hook.tell(Event::Lost { message, error });
        }
    }

    /// The settlement is confirmed.
    pub fn settled(&mut self, key: u64) {
        let Some(Held { message, outcome, .. }) = self.remove(key) else { return };
        if let (Some(message), Some(outcome)) = (message, outcome) {
            self.job.hook.tell(outcome.event(message));
        }
    }

    fn remove(&mut self, key: u64) -> Option<Held<L>> {
        let held = self.held.remove(&key)?;
        self.strays += usize::from(held.handler.is_some());
        Some(held)
    }

    pub fn get(&self, key: u64) -> Option<&Held<L>> {
        self.held.get(&key)
    }

    pub fn get_mut(&mut self, key: u64) -> Option<&mut Held<L>> {
        self.held.get_mut(&key)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &Held<L>)> {
        self.held.iter().map(|(key, held)| (*key, held))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut Held<L>)> {
        self.held.iter_mut().map(|(key, held)| (*key, held))
    }

    /// Messages in hand.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Handlers that run.
    pub fn running(&self) -> usize {
        self.places.len()
    }

    /// Places without a handler.
    pub fn free(&self) -> usize {
        self.job.concurrency.saturating_sub(self.places.len())
    }

    /// Handlers whose messages are gone.
    pub fn strays(&self) -> usize {
        self.strays
    }
}
