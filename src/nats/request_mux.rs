//! Requests and their answers on the settling connection: one subscription, a number for each
//! request, and a batch of requests that is waited for as a whole.
//!
//! The library's own `request` is not used: it takes two messages more for a confirmation, or
//! leaks an entry for each that is never answered.
//!
//! Invariants:
//! 1. a number is given out once; its answer is counted once, later ones fall on the floor;
//! 2. a request is published at most once, and never again by us.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use async_nats::{Message, StatusCode, Subscriber};
use futures_util::StreamExt as _;
use tokio::{sync::Notify, time::timeout_at};

pub(super) use super::plan::{Request, RequestAnswer, unsent};
use super::{
    arrival_probe::ArrivalDeadline, connection::NatsConnection, plan::ConfirmPlan,
    settle::consumer_of,
};
use crate::{
    broker::{BrokerError, Denial},
    clock::{self, Reading},
};

/// Messages that the library is given before it must have written them. A process that is stopped and
/// goes on writes what the library has by then, however late that is; all others are looked at once more.
const MAX_UNFLUSHED: usize = 32;
/// Answers that are read between two looks at anything else.
const MAX_ANSWERS_PER_READ: usize = 256;

/// The settling connection and the requests that are open on it.
pub(super) struct RequestMux {
    pub(super) connection: Arc<NatsConnection>,
    /// `<inbox>.`, before a request's number.
    prefix: String,
    opened: Instant,
    open: Mutex<Open>,
    /// Messages that the library has been given since it was last flushed, about.
    handed: AtomicUsize,
    /// See [`super::arrival_probe`].
    pub(super) due: ArrivalDeadline,
}

/// Numbers of open requests are dense and leave mostly in order, so a queue finds them.
#[derive(Default)]
struct Open {
    first: u64,
    slots: VecDeque<Option<(Arc<Batch>, usize)>>,
}

struct Batch {
    answers: Mutex<Answers>,
    done: Notify,
}

struct Answers {
    /// Each with when it came.
    of: Vec<Option<(RequestAnswer, Reading)>>,
    left: usize,
}

impl RequestMux {
    /// Subscribes; [`RequestMux::read`] must run for answers to arrive.
    pub(super) async fn open(connection: Arc<NatsConnection>) -> Option<(Arc<Self>, Subscriber)> {
        let (prefix, opened) = (format!("{}.", connection.client.new_inbox()), clock::now());
        let subscriber = connection.client.subscribe(format!("{prefix}*")).await.ok()?;
        let requests = Self {
            connection,
            prefix,
            opened,
            open: Mutex::default(),
            handed: AtomicUsize::new(0),
            due: ArrivalDeadline::default(),
        };
        Some((Arc::new(requests), subscriber))
    }

    /// Hands answers to their batches until the connection is gone.
    pub(super) async fn read(&self, subscriber: Subscriber) {
        let mut chunks = subscriber.ready_chunks(MAX_ANSWERS_PER_READ);
        let connection = &self.connection;
        while let Some(Some(chunk)) = connection.lost.run_until_cancelled(chunks.next()).await {
            let at = clock::reading();
            let mut open = lock(&self.open);
            for message in chunk {
                let number = message.subject.strip_prefix(&*self.prefix);
                if let Some(number) = number.and_then(|number| number.parse().ok()) {
                    open.close(number, Some((read(message), at)));
                }
            }
        }
        self.connection.end();
    }

    /// Publishes all and waits for their answers, until `until` or the loss of the connection.
    pub(super) async fn ask(
        &self,
        requests: &[Request],
        until: Instant,
    ) -> Vec<Result<RequestAnswer, BrokerError>> {
        let began = clock::now();
        // Without a right to our inbox nothing would ever be answered, so nothing is sent.
        let of_inbox = |refused: &str| refused.strip_prefix(&*self.prefix) == Some("*");
        if let Some(inbox) = self.connection.denials.find(self.opened, of_inbox) {
            return requests
                .iter()
                .map(|_| Err(Denial::Permission(inbox.clone()).into()))
                .collect();
        }
        let mut refusals = self.connection.denials.watch();
        let plan = ConfirmPlan::of(requests);
        let batch = Arc::new(Batch::new(plan.count));
        let asked = PendingRange::new(&self.open, &batch, plan.count);
        let refused = async {
            while refusals.changed().await.is_ok() {
                self.close_refused(began, requests, &plan, asked.first);
            }
        };

        let sent = self.publish(requests, &plan, asked.first, until).await;
        batch.leave_out(plan.slots[sent..].iter().filter(|(_, asks)| *asks).count());
        tokio::select! {
            biased;
            () = batch.done() => {}
            () = clock::sleep_until(Some(until)) => {}
            () = self.connection.lost.cancelled() => {}
            () = refused => {}
        }
        drop(asked);
        plan.results(requests, &batch.take(), sent, &self.connection.denials.since(began))
    }

    /// Publishes in order and returns how many may have left.
    async fn publish(
        &self,
        requests: &[Request],
        plan: &ConfirmPlan,
        first: u64,
        until: Instant,
    ) -> usize {
        for (place, (request, (slot, asks))) in requests.iter().zip(&plan.slots).enumerate() {
            let reply = asks.then(|| format!("{}{}", self.prefix, first + *slot as u64));
            if !self.send(request, reply, until).await {
                return place;
            }
        }
        requests.len()
    }

    /// Hands one message to the connection. `false`: it will never leave.
    pub(super) async fn send(
        &self,
        request: &Request,
        reply: Option<String>,
        until: Instant,
    ) -> bool {
        let until = request.by.map_or(until, |by| by.at.min(until));
        if !self.keep_pace(until).await {
            return false;
        }
        let reading = clock::reading();
        let over = request.by.is_some_and(|by| by.passed(&reading));
        if self.connection.lost.is_cancelled() || over {
            return false;
        }
        let (subject, payload) = (String::from(&*request.subject), request.payload.clone());
        let client = &self.connection.client;
        // A full queue of a connection that takes nothing blocks for ever: hence the bound.
        let sent = timeout_at(until.into(), async {
            match reply {
                Some(reply) => client.publish_with_reply(subject, reply, payload).await,
                None => client.publish(subject, payload).await,
            }
        });
        let sent = matches!(sent.await, Ok(Ok(())));
        if let (true, Some(by)) = (sent, request.by) {
            self.due.must_arrive(by.at, reading.now);
        }
        sent
    }

    /// Waits while the library may still have as many messages as it is given at once. `false`: it
    /// takes no more by then.
    async fn keep_pace(&self, until: Instant) -> bool {
        if self.handed.fetch_add(1, Ordering::Relaxed) < MAX_UNFLUSHED {
            return true;
        }
        self.handed.store(1, Ordering::Relaxed);
        // It is flushed to the kernel: the server is not asked.
        matches!(timeout_at(until.into(), self.connection.client.flush()).await, Ok(Ok(())))
    }

    /// A subject of ours whose first message is waited for.
    pub(super) fn expect_one(&self) -> PendingEcho<'_> {
        let batch = Arc::new(Batch::new(1));
        PendingEcho { prefix: &self.prefix, asked: PendingRange::new(&self.open, &batch, 1), batch }
    }

    /// Nobody goes on waiting for an answer to what was refused. All others do.
    fn close_refused(&self, since: Instant, requests: &[Request], plan: &ConfirmPlan, first: u64) {
        let refused = self.connection.denials.since(since);
        let whole = plan.refused_as_a_whole(requests, &[], &refused);
        let of_whole =
            |subject: &str| consumer_of(subject).is_some_and(|name| whole.contains(&name));
        let mut open = lock(&self.open);
        for (request, (slot, asks)) in requests.iter().zip(&plan.slots) {
            let is_refused = refused.contains(&*request.subject)
                || !whole.is_empty() && of_whole(&request.subject);
            if *asks && is_refused {
                open.close(first + *slot as u64, None);
            }
        }
    }
}

fn read(message: Message) -> RequestAnswer {
    match message.status {
        Some(StatusCode::NO_RESPONDERS) => RequestAnswer::NoResponder,
        Some(_) | None => RequestAnswer::Replied(message.payload),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Requests that somebody waits for: nothing is kept of them afterwards, however the waiting ends.
struct PendingRange<'r> {
    open: &'r Mutex<Open>,
    first: u64,
    count: usize,
}

impl<'r> PendingRange<'r> {
    fn new(open: &'r Mutex<Open>, batch: &Arc<Batch>, count: usize) -> Self {
        Self { open, first: lock(open).register(batch), count }
    }
}

impl Drop for PendingRange<'_> {
    fn drop(&mut self) {
        lock(self.open).forget(self.first, self.count);
    }
}

/// A message of our own that is on its way.
pub(super) struct PendingEcho<'r> {
    prefix: &'r str,
    asked: PendingRange<'r>,
    batch: Arc<Batch>,
}

impl PendingEcho<'_> {
    pub(super) fn subject(&self) -> String {
        format!("{}{}", self.prefix, self.asked.first)
    }

    pub(super) async fn came(&self) {
        self.batch.done().await;
    }
}

impl Open {
    fn register(&mut self, batch: &Arc<Batch>) -> u64 {
        let number = self.first + self.slots.len() as u64;
        let places = lock(&batch.answers).of.len();
        self.slots.extend((0..places).map(|place| Some((batch.clone(), place))));
        number
    }

    /// There is an answer, or there will be none.
    fn close(&mut self, number: u64, answer: Option<(RequestAnswer, Reading)>) {
        if let Some((batch, place)) = self.take(number) {
            batch.close(place, answer);
        }
        self.shrink();
    }

    fn forget(&mut self, first: u64, count: usize) {
        for number in first..first + count as u64 {
            self.take(number);
        }
        self.shrink();
    }

    fn take(&mut self, number: u64) -> Option<(Arc<Batch>, usize)> {
        let place = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.slots.get_mut(place)?.take()
    }

    fn shrink(&mut self) {
        while let Some(None) = self.slots.front() {
            self.slots.pop_front();
            self.first += 1;
        }
    }
}

impl Batch {
    fn new(places: usize) -> Self {
        let answers = Answers { of: vec![None; places], left: places };
        Self { answers: Mutex::new(answers), done: Notify::new() }
    }

    fn close(&self, place: usize, answer: Option<(RequestAnswer, Reading)>) {
        let mut answers = lock(&self.answers);
        answers.of[place] = answer;
        self.settle(&mut answers, 1);
    }

    /// So many were never sent: nobody waits for those.
    fn leave_out(&self, count: usize) {
        self.settle(&mut lock(&self.answers), count);
    }

    fn settle(&self, answers: &mut Answers, count: usize) {
        answers.left = answers.left.saturating_sub(count);
        if answers.left == 0 {
            self.done.notify_one();
        }
    }

    async fn done(&self) {
        while lock(&self.answers).left > 0 {
            self.done.notified().await;
        }
    }

    fn take(&self) -> Vec<Option<(RequestAnswer, Reading)>> {
        std::mem::take(&mut lock(&self.answers).of)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[test]
    fn answers_find_their_place_in_any_order_and_count_once() {
        let mut open = Open::default();
        let (a, b) = (Arc::new(Batch::new(2)), Arc::new(Batch::new(1)));
        let (first_a, first_b) = (open.register(&a), open.register(&b));

        open.close(first_b, Some((RequestAnswer::NoResponder, clock::reading())));
        open.close(first_a + 1, Some((RequestAnswer::Replied("1".into()), clock::reading())));
        open.close(first_a + 1, Some((RequestAnswer::NoResponder, clock::reading())));
        open.close(99, Some((RequestAnswer::NoResponder, clock::reading())));

        let of = |batch: &Batch| -> Vec<_> {
            batch.take().into_iter().map(|answer| answer.map(|(answer, _)| answer)).collect()
        };
        assert_eq!(of(&b), [Some(RequestAnswer::NoResponder)]);
        assert_eq!(of(&a), [None, Some(RequestAnswer::Replied("1".into()))]);
        open.forget(first_a, 2);
        assert!(open.slots.is_empty());
    }

    /// A server that says hello and takes whatever it is sent, on a connection that is open to it.
    async fn connected() -> (NatsConnection, tokio::net::TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let hello =
            "INFO {\"server_id\":\"S\",\"version\":\"2.15.1\",\"max_payload\":1000}\r\nPONG\r\n";
        let (settings, greeted) = (settings(&address.to_string()), async {
            let (mut socket, _) = listener.accept().await.unwrap();
            socket.write_all(hello.as_bytes()).await.unwrap();
            socket
        });
        tokio::join!(async { NatsConnection::make(&settings, "test").await.unwrap() }, greeted)
    }

    fn settings(address: &str) -> crate::nats::Settings {
        crate::nats::Settings {
            servers: crate::nats::parse_servers(address).unwrap(),
            auth: crate::nats::Auth::None,
            ca: None,
            identity: None,
            domain: None,
            tls_first: false,
            inbox_prefix: "_INBOX".to_owned(),
        }
    }

    #[tokio::test]
    async fn nothing_is_kept_of_what_was_never_sent_or_is_not_waited_for_any_more() {
        let (connection, _server) = connected().await;
        let (requests, _subscriber) = RequestMux::open(Arc::new(connection)).await.unwrap();
        let request = |line| Request { subject: "s".into(), payload: Bytes::new(), line, by: None };
        let asked = [None, Some(1), Some(1)].map(request);
        let left = tokio::time::timeout(Duration::from_millis(50), async {
            requests.ask(&asked, clock::now() + Duration::from_secs(60)).await
        });
        left.await.unwrap_err();
        assert!(lock(&requests.open).slots.is_empty(), "its caller has left");
        requests.connection.lost.cancel();
        let results = requests.ask(&asked, clock::now() + Duration::from_secs(60)).await;
        assert!(results.iter().all(|result| matches!(result, Err(BrokerError::Unsent(_)))));
        assert!(lock(&requests.open).slots.is_empty(), "nothing was sent");
    }

    /// The queue of a connection has 2048 places, and this server takes nothing out of the wire.
    #[tokio::test]
    async fn a_full_queue_holds_up_whoever_asks_until_their_deadline_and_no_longer() {
        let (connection, _server) = connected().await;
        let (requests, _subscriber) = RequestMux::open(Arc::new(connection)).await.unwrap();
        tokio::time::pause();
        let payload = Bytes::from(vec![b'x'; 1000]);
        let request =
            |_| Request { subject: "s".into(), payload: payload.clone(), line: None, by: None };
        let asked: Vec<Request> = (0..20_000).map(request).collect();
        let until = clock::now() + Duration::from_secs(4);
        let asking = tokio::time::timeout(Duration::from_secs(60), requests.ask(&asked, until));
        let results = asking.await.expect("it is held up");
        let late = clock::now().duration_since(until);
        assert!(late < Duration::from_millis(5), "{late:?}");
        let sent = results.iter().filter(|told| **told == Err(BrokerError::Unconfirmed)).count();
        let unsent = |told: &&Result<_, _>| matches!(told, Err(BrokerError::Unsent(_)));
        assert!(sent >= 2048, "{sent} were sent");
        assert_eq!(results.iter().filter(unsent).count(), asked.len() - sent);
    }
}
