//! The loop with Fetch: a call for each batch. Beside it, one call at a time settles and extends what is in hand.

use std::{
    future::{Future, pending},
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use tokio::time::{self, Instant};

use crate::{
    Error, Event, Source, Stop,
    client::new_attempt,
    connection::{Connection, Proxy},
    error::{PATIENCE, duration_of, to_duration},
    hand::{Done, Hand},
    job::Job,
    lease::Lease,
    outcome::extend_action,
    pb::{
        FetchRequest, FetchResponse, GiveBackRequest, GiveBackResponse, SettleRequest,
        SettleResponse, SettleResult, Settlement,
    },
};

/// An empty answer that comes at once is asked for again after this time.
const EMPTY_PAUSE: Duration = Duration::from_millis(500);
/// The longest wait of an outcome for others. If no handler works, it does not wait.
const GATHERING: Duration = Duration::from_millis(10);
/// A call with more settlements is refused.
const MOST_SETTLEMENTS: usize = 1000;
/// The longest wait for the answer to a Settle.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
/// The wait for the answer to a call that gives a Fetch back, and the shortest wait for that to a Settle.
const SHORT_TIMEOUT: Duration = Duration::from_secs(1);

pub(crate) struct Options {
    /// The name of the worker in the logs of the proxy.
    pub name: String,
    /// The most messages that wait or are handled.
    pub batch: usize,
    pub max_wait: Duration,
    /// `None`: the ack wait of the consumer.
    pub lease: Option<Duration>,
    /// The bytes of messages in hand from which no more are taken.
    pub max_bytes: u32,
    /// The most bytes of an answer.
    pub max_frame_bytes: u32,
    pub stop_timeout: Option<Duration>,
}

type Call<A> = Option<Pin<Box<dyn Future<Output = Result<A, Error>> + Send>>>;

struct FetchLoop {
    connection: Arc<Connection>,
    options: Options,
    hand: Hand<Lease>,
    fetching: Call<FetchResponse>,
    /// The name of the Fetch that is under way, or is to be repeated. Its repeats have the same name, so they get the
    /// messages of an answer that was lost.
    attempt: Option<String>,
    is_repeat: bool,
    /// When the Fetch under way began, and when the next may begin.
    began: Instant,
    fetch_at: Instant,
    fetch_tries: u32,
    settling: Call<SettleResponse>,
    /// What the Settle under way is about, and when it was sent.
    sent: Vec<u64>,
    sent_at: Instant,
    /// If a whole call has failed, another is of no use before this time.
    quiet_until: Instant,
    settle_tries: u32,
    giving_back: Call<GiveBackResponse>,
    is_stopping: bool,
    /// Why no other Fetch is made.
    refusal: Option<Error>,
}

/// Ends when `stop` was asked for and every message is gone.
///
/// # Errors
/// The proxy refuses a Fetch, and would refuse a repeat, too.
pub(crate) async fn fetch_batches(
    connection: Arc<Connection>,
    job: Job,
    options: Options,
    stop: Stop,
) -> Result<(), Error> {
    let now = Instant::now();
    let batches = FetchLoop {
        connection,
        options,
        hand: Hand::new(job),
        fetching: None,
        attempt: None,
        is_repeat: false,
        began: now,
        fetch_at: now,
        fetch_tries: 0,
        settling: None,
        sent: Vec::new(),
        sent_at: now,
        quiet_until: now,
        settle_tries: 0,
        giving_back: None,
        is_stopping: false,
        refusal: None,
    };
    batches.run(stop).await
}

impl FetchLoop {
    async fn run(mut self, stop: Stop) -> Result<(), Error> {
        let mut forced = pin!(stop.forced(self.options.stop_timeout));
        let mut is_forced = false;
        loop {
            let now = Instant::now();
            self.lose_what_is_over(now);
            self.hand.begin();
            self.fetch(now);
            self.settle(now);
            if self.is_over() {
                return self.refusal.map_or(Ok(()), Err);
            }
            let wake = self.next_turn(now);
            tokio::select! {
                () = stop.asked(), if !self.is_stopping => self.stopping(),
                () = &mut forced, if !is_forced => {
                    is_forced = true;
                    self.forced();
                }
                answer = end_of(&mut self.fetching) => {
                    self.fetching = None;
                    self.fetched(answer);
                }
                answer = end_of(&mut self.settling) => {
                    self.settling = None;
                    self.note(answer);
                }
                // Without an answer, messages of the Fetch come back when their leases end.
                _ = end_of(&mut self.giving_back) => self.giving_back = None,
                Some(done) = self.hand.join() => self.finished(done),
                () = time::sleep_until(wake.unwrap_or(now)), if wake.is_some() => {}
            }
            while let Some(done) = self.hand.try_join() {
                self.finished(done);
            }
        }
    }

    fn is_over(&self) -> bool {
        let wants_more = !self.is_stopping && self.refusal.is_none();
        let has_call = self.settling.is_some() || self.giving_back.is_some();
        !wants_more && !has_call && self.hand.is_empty()
    }

    /// A lease that is over by our clock counts as lost, also if an outcome was decided meanwhile.
    fn lose_what_is_over(&mut self, now: Instant) {
        let over = self.hand.iter().filter(|(_, held)| held.link.ends <= now);
        let over: Vec<_> = over.map(|(key, held)| (key, held.latest <= now)).collect();
        for (key, is_too_long) in over {
            let why = if is_too_long { "its handler took too long" } else { "its time is over" };
            self.hand.lose(key, Error::lease_expired(why));
        }
    }

    /// Begins a Fetch, if a handler is free and no message waits.
    fn fetch(&mut self, now: Instant) {
        if !self.has_room() || self.fetching.is_some() || now < self.fetch_at {
            return;
        }
        self.began = now;
        let (request, connection) = (self.request(), self.connection.clone());
        let timeout = self.options.max_wait + PATIENCE;
        self.fetching = Some(Box::pin(async move {
            let call = async |mut client: Proxy, request| client.fetch(request).await;
            connection.within(timeout, request, call).await
        }));
    }

    fn has_room(&self) -> bool {
        let undecided = self.hand.iter().filter(|(_, held)| held.outcome.is_none());
        let bytes: usize = undecided.map(|(_, held)| held.link.size).sum();
        let is_wanted = !self.is_stopping && self.refusal.is_none();
        is_wanted && self.hand.free() > 0 && bytes < self.options.max_bytes as usize
    }

    fn request(&mut self) -> FetchRequest {
        let Job { source, codec, at_most, .. } = &self.hand.job;
        let attempt_id = self.attempt.get_or_insert_with(new_attempt).clone();
        let lease = self.options.lease.map(|lease| to_duration(lease.min(*at_most)));
        // Handlers whose messages are gone have their places, too.
        let n = self.options.batch.saturating_sub(self.hand.running()).max(1);
        FetchRequest {
            stream: source.stream.clone(),
            consumer: source.consumer.clone(),
            n: n.try_into().unwrap_or(1),
            max_wait: Some(to_duration(self.options.max_wait)),
            lease,
            max_bytes: self.options.max_frame_bytes,
            codec: (*codec).into(),
            attempt_id,
            attempt_again: self.is_repeat,
            worker: self.options.name.clone(),
            ..FetchRequest::default()
        }
    }

    fn fetched(&mut self, answer: Result<FetchResponse, Error>) {
        let now = Instant::now();
        match answer {
            Ok(answer) => {
                let is_empty = answer.messages.is_empty() && answer.rejected.is_empty();
                (self.attempt, self.is_repeat, self.fetch_tries) = (None, false, 0);
                // A draining proxy, for example, answers at once.
                self.fetch_at = if is_empty { self.began + EMPTY_PAUSE } else { now };
                self.take(answer, now);
            }
            Err(error) if error.can_repeat() => {
                self.is_repeat = true;
                let wait = error.backoff(&mut self.fetch_tries);
                self.fetch_at = now + wait;
                self.hand.job.hook.tell(Event::Retry { error, wait });
            }
            Err(error) => self.refusal = Some(error),
        }
    }

    fn take(&mut self, answer: FetchResponse, now: Instant) {
        let latest = now + self.hand.job.at_most;
        for message in answer.messages {
            use crate::pb::delivery::Payload;
            let size = match &message.payload {
                Some(Payload::Text(text)) => text.len(),
                Some(Payload::Data(data)) => data.len(),
                None => 0,
            };
            let granted = message.lease.map(duration_of).unwrap_or_default();
            self.hand.take(message, Lease::new(granted, size, latest, now), self.is_stopping);
        }
        for rejected in answer.rejected {
            let granted = rejected.lease.map(duration_of).unwrap_or_default();
            let lease = Lease::new(granted, 0, latest, now);
            if let Some(key) = self.hand.take_rejected(rejected, lease) {
                self.send(key);
            }
        }
    }

    fn finished(&mut self, done: Done) {
        if let Some(key) = self.hand.finished(done) {
            self.send(key);
        }
    }

    /// It is to be settled.
    fn send(&mut self, key: u64) {
        if let Some(held) = self.hand.get_mut(key) {
            held.link.due = Some(Instant::now());
        }
    }

    /// When something is due, besides answers and handlers.
    fn next_turn(&self, now: Instant) -> Option<Instant> {
        let fetch_at = Some(self.fetch_at).filter(|_| self.fetching.is_none() && self.has_room());
        let settle_at = self.hand.iter().filter_map(|(_, held)| {
            let due = self.due_of(held.outcome.is_some(), &held.link);
            Some(due.filter(|_| self.settling.is_none())?.min(held.link.ends))
        });
        let ends = self.hand.iter().map(|(_, held)| held.link.ends);
        fetch_at.into_iter().chain(settle_at).chain(ends).min().map(|wake| wake.max(now))
    }

    fn due_of(&self, is_decided: bool, lease: &Lease) -> Option<Instant> {
        let gathers = is_decided && self.hand.running() > 0;
        let due = lease.due? + if gathers { GATHERING } else { Duration::ZERO };
        Some(due.max(self.quiet_until))
    }

    /// Begins a Settle, with all outcomes and extensions that are due.
    fn settle(&mut self, now: Instant) {
        let is_due = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        let is_time = self
            .hand
            .iter()
            .any(|(_, held)| is_due(self.due_of(held.outcome.is_some(), &held.link)));
        if self.settling.is_some() || !is_time {
            return;
        }
        (self.sent, self.sent_at) = (Vec::new(), now);
        let (mut settlements, mut timeout) = (Vec::new(), SETTLE_TIMEOUT);
        let due = self.hand.iter_mut().filter(|(_, held)| is_due(held.link.due));
        for (key, held) in due.take(MOST_SETTLEMENTS) {
            held.link.is_settling = held.outcome.is_some();
            timeout = timeout.min((held.link.ends - now) / 2);
            let extend = || extend_action(held.link.extension(now, held.latest));
            let action =
                Some(held.outcome.as_ref().map_or_else(extend, |outcome| outcome.action()));
            settlements.push(Settlement { token: held.token.clone(), action, number: 0 });
            self.sent.push(key);
        }
        let request = SettleRequest { settlements, ..SettleRequest::default() };
        let connection = self.connection.clone();
        self.settling = Some(Box::pin(async move {
            let call = async |mut client: Proxy, request| client.settle(request).await;
            connection.within(timeout.max(SHORT_TIMEOUT), request, call).await
        }));
    }

    /// Records the results of a call.
    fn note(&mut self, answer: Result<SettleResponse, Error>) {
        let sent = std::mem::take(&mut self.sent);
        let (results, failure) = match answer {
            Ok(answer) => (answer.results, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        let mut results = results.into_iter();
        let (mut again, mut worst) = (Vec::new(), None::<Error>);
        for key in sent {
            let result = results.next();
            let refused = || result.as_ref()?.error.as_ref().map(Error::of_part);
            match failure.clone().or_else(refused) {
                None => self.confirmed(key, result.unwrap_or_default()),
                Some(error) if error.can_repeat() => {
                    again.push(key);
                    if worst.as_ref().is_none_or(|worst| worst.retry_delay < error.retry_delay) {
                        worst = Some(error);
                    }
                }
                Some(error) => self.hand.lose(key, error),
            }
        }
        let Some(error) = worst else {
            self.settle_tries = 0;
            return;
        };
        let wait = error.backoff(&mut self.settle_tries);
        let at = Instant::now() + wait;
        self.hand.job.hook.tell(Event::Retry { error, wait });
        for key in again {
            if let Some(held) = self.hand.get_mut(key) {
                held.link.due = Some(at);
            }
        }
        if failure.is_some() {
            self.quiet_until = at;
        }
    }

    fn confirmed(&mut self, key: u64, result: SettleResult) {
        let Some(held) = self.hand.get_mut(key) else { return };
        if held.link.is_settling {
            return self.hand.settled(key);
        }
        let length = result.lease.map(duration_of).unwrap_or_default();
        held.link.lasts(self.sent_at, length, held.latest);
        if held.outcome.is_some() {
            self.send(key);
        }
    }

    fn stopping(&mut self) {
        self.is_stopping = true;
        // This cancels the call.
        self.fetching = None;
        if let Some(attempt_id) = self.attempt.take() {
            let Source { stream, consumer, .. } = self.hand.job.source.clone();
            let request = GiveBackRequest { stream, consumer, attempt_id };
            let connection = self.connection.clone();
            self.giving_back = Some(Box::pin(async move {
                let call = async |mut client: Proxy, request| client.give_back(request).await;
                connection.within(SHORT_TIMEOUT, request, call).await
            }));
        }
        self.hand.give_back_waiting().into_iter().for_each(|key| self.send(key));
    }

    /// The second stop may come together with the first.
    fn forced(&mut self) {
        if !self.is_stopping {
            self.stopping();
        }
        let (returned, lost) = self.hand.give_back_by_force();
        returned.into_iter().for_each(|key| self.send(key));
        lost.into_iter().for_each(|key| self.hand.lose(key, Error::stopped()));
    }
}

/// The answer to a call. Never ends if there is no call.
async fn end_of<A>(call: &mut Call<A>) -> Result<A, Error> {
    match call {
        Some(call) => call.await,
        None => pending().await,
    }
}
