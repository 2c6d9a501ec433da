//! Requests and their answers on the settling connection. One subscription receives all answers, each
//! request has a number, and a batch of requests is waited for as a whole.
//!
//! Invariants:
//! 1. A number is given out once. Its first answer counts, and later ones are dropped.
//! 2. A request is published at most once. It is never repeated here.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Instant,
};

use tokio::sync::Notify;

use super::{
    deadline::ArrivalDeadline,
    delivery::consumer_of,
    plan::{ConfirmPlan, Request, RequestAnswer},
    protocol::ServerMessage,
    settling_connection::{SettlingConnection, SubjectSubscription},
};
use crate::{
    broker::{BrokerError, Denial},
    clock::{self, Reading},
    lock::lock,
};

/// The status of an answer that the server gives, because nobody listens on the subject.
const NO_RESPONDERS: u16 = 503;

/// The settling connection and its open requests.
pub(super) struct RequestMux {
    pub(super) connection: Arc<SettlingConnection>,
    /// `<inbox>.`, before a request's number.
    prefix: String,
    opened: Instant,
    open: Arc<Mutex<OpenRequests>>,
    _answers: SubjectSubscription,
    /// When everything that was sent must have arrived. See [`super::arrival_probe`].
    pub(super) deadline: ArrivalDeadline,
}

/// The open requests by number. Numbers are dense and leave mostly in order, so a queue finds them.
#[derive(Default)]
struct OpenRequests {
    /// The number of the first slot.
    first: u64,
    /// The batch of each request and its index there. `None`: the request is closed.
    slots: VecDeque<Option<(Arc<Batch>, usize)>>,
}

struct Batch {
    answers: Mutex<Answers>,
    done: Notify,
}

struct Answers {
    /// Each answer with the clocks at its arrival.
    received: Vec<Option<(RequestAnswer, Reading)>>,
    /// The number of requests that are still waited for.
    left: usize,
}

impl RequestMux {
    /// Subscribes to the answers.
    pub(super) fn open(connection: Arc<SettlingConnection>) -> Arc<Self> {
        let (prefix, opened) = (format!("{}.", connection.inbox), clock::now());
        let open = Arc::new(Mutex::new(OpenRequests::default()));
        let (of_answers, requests) = (prefix.clone(), open.clone());
        let answers = connection.subscribe(&format!("{prefix}*"), move |message, at| {
            let number = message.subject.strip_prefix(&*of_answers);
            if let Some(number) = number.and_then(|number| number.parse().ok()) {
                lock(&requests).close(number, Some((read(message), *at)));
            }
        });
        let deadline = ArrivalDeadline::default();
        Arc::new(Self { connection, prefix, opened, open, _answers: answers, deadline })
    }

    /// Publishes one request and waits for its answer, as [`RequestMux::ask`] does.
    pub(super) async fn ask_one(
        &self,
        request: Request,
        until: Instant,
    ) -> Result<RequestAnswer, BrokerError> {
        let results = self.ask(&[request], until).await;
        results.into_iter().next().unwrap_or(Err(BrokerError::Unconfirmed))
    }

    /// Publishes all requests and waits for their answers, until `until` or the loss of the connection.
    /// Returns one result each, in order.
    pub(super) async fn ask(
        &self,
        requests: &[Request],
        until: Instant,
    ) -> Vec<Result<RequestAnswer, BrokerError>> {
        let began = clock::now();
        // Without a right to our inbox no answer would arrive, so nothing is sent.
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
        let pending = PendingRange::new(&self.open, &batch, plan.count);
        let refused = async {
            while refusals.changed().await.is_ok() {
                self.close_refused(began, requests, &plan, pending.first);
            }
        };

        let sent = self.publish(requests, &plan, pending.first, until).await;
        batch.leave_out(plan.slots[sent..].iter().filter(|(_, asks)| *asks).count());
        tokio::select! {
            biased;
            () = batch.done() => {}
            () = clock::sleep_until(Some(until)) => {}
            () = self.connection.lost.cancelled() => {}
            () = refused => {}
        }
        drop(pending);
        plan.results(requests, &batch.take(), sent, &self.connection.denials.since(began))
    }

    /// Publishes in order and returns how many requests may have left.
    async fn publish(
        &self,
        requests: &[Request],
        plan: &ConfirmPlan,
        first: u64,
        until: Instant,
    ) -> usize {
        for (index, (request, (slot, asks))) in requests.iter().zip(&plan.slots).enumerate() {
            let reply = asks.then(|| format!("{}{}", self.prefix, first + *slot as u64));
            if !self.send(request, reply, until).await {
                return index;
            }
        }
        requests.len()
    }

    /// Hands one message to the connection. `false`: the message will never leave.
    pub(super) async fn send(
        &self,
        request: &Request,
        reply: Option<String>,
        until: Instant,
    ) -> bool {
        let (until, now) = (request.by.map_or(until, |by| by.at.min(until)), clock::now());
        let Request { subject, payload, by, .. } = request;
        // The connection reads all clocks just before it writes, for many messages at once.
        let over = by.is_some_and(|by| now >= by.at);
        if over || !self.connection.publish(subject, reply.as_deref(), payload, *by, until).await {
            return false;
        }
        if let Some(by) = by {
            self.deadline.must_arrive(by.at, now);
        }
        true
    }

    /// Ends the wait for the answers to refused requests. All other waits continue.
    fn close_refused(&self, since: Instant, requests: &[Request], plan: &ConfirmPlan, first: u64) {
        let refused = self.connection.denials.since(since);
        let consumers = plan.refused_consumers(requests, &[], &refused);
        let of_refused =
            |subject: &str| consumer_of(subject).is_some_and(|name| consumers.contains(&name));
        let mut open = lock(&self.open);
        for (request, (slot, asks)) in requests.iter().zip(&plan.slots) {
            let is_refused = refused.contains(&*request.subject)
                || !consumers.is_empty() && of_refused(&request.subject);
            if *asks && is_refused {
                open.close(first + *slot as u64, None);
            }
        }
    }
}

fn read(message: ServerMessage) -> RequestAnswer {
    match message.status {
        Some(NO_RESPONDERS) => RequestAnswer::NoResponder,
        Some(_) | None => RequestAnswer::Replied(message.payload),
    }
}

/// The numbers of requests that a caller waits for. They are forgotten when the wait ends, however it
/// ends.
struct PendingRange<'r> {
    open: &'r Mutex<OpenRequests>,
    first: u64,
    count: usize,
}

impl<'r> PendingRange<'r> {
    fn new(open: &'r Mutex<OpenRequests>, batch: &Arc<Batch>, count: usize) -> Self {
        Self { open, first: lock(open).register(batch), count }
    }
}

impl Drop for PendingRange<'_> {
    fn drop(&mut self) {
        lock(self.open).forget(self.first, self.count);
    }
}

impl OpenRequests {
    /// Gives a number to each request of the batch, and returns the first number.
    fn register(&mut self, batch: &Arc<Batch>) -> u64 {
        let number = self.first + self.slots.len() as u64;
        let count = lock(&batch.answers).received.len();
        self.slots.extend((0..count).map(|index| Some((batch.clone(), index))));
        number
    }

    /// Closes a request with its answer. `None`: there will be no answer.
    fn close(&mut self, number: u64, answer: Option<(RequestAnswer, Reading)>) {
        if let Some((batch, index)) = self.take(number) {
            batch.close(index, answer);
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
        let index = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.slots.get_mut(index)?.take()
    }

    fn shrink(&mut self) {
        while let Some(None) = self.slots.front() {
            self.slots.pop_front();
            self.first += 1;
        }
    }
}

impl Batch {
    fn new(count: usize) -> Self {
        let answers = Answers { received: vec![None; count], left: count };
        Self { answers: Mutex::new(answers), done: Notify::new() }
    }

    fn close(&self, index: usize, answer: Option<(RequestAnswer, Reading)>) {
        let mut answers = lock(&self.answers);
        answers.received[index] = answer;
        self.settle(&mut answers, 1);
    }

    /// Stops waiting for `count` requests that were never sent.
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
        std::mem::take(&mut lock(&self.answers).received)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::{clock::Deadline, metrics::Metrics, nats::settling_connection::SettlingLine};

    #[test]
    fn each_answer_finds_its_request_in_any_order_and_counts_once() {
        let mut open = OpenRequests::default();
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

    /// A server that greets, and then reads nothing, and an open connection to it.
    async fn connected() -> (Arc<RequestMux>, SettlingLine, tokio::net::TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let hello =
            "INFO {\"server_id\":\"S\",\"version\":\"2.15.1\",\"max_payload\":1000000}\r\nPONG\r\n";
        let (settings, greeted) = (settings(&address.to_string()), async {
            let (mut socket, _) = listener.accept().await.unwrap();
            socket.write_all(hello.as_bytes()).await.unwrap();
            socket
        });
        let metrics = Metrics::off();
        let made = SettlingConnection::make(&settings, "test", metrics.nats());
        let (made, socket) = tokio::join!(made, greeted);
        let (connection, line) = made.unwrap_or_else(|error| panic!("{error}"));
        (RequestMux::open(Arc::new(connection)), line, socket)
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
    async fn an_unsent_or_abandoned_request_is_forgotten() {
        let (requests, line, _server) = connected().await;
        let running = TaskTracker::new().spawn(line.run(requests.connection.clone()));
        let request = |confirm_group| Request { confirm_group, ..Request::new("s", Bytes::new()) };
        let asked = [None, Some(1), Some(1)].map(request);
        let left = tokio::time::timeout(Duration::from_millis(50), async {
            requests.ask(&asked, clock::now() + Duration::from_secs(60)).await
        });
        left.await.unwrap_err();
        assert!(lock(&requests.open).slots.is_empty(), "the caller has left");
        requests.connection.end();
        let results = requests.ask(&asked, clock::now() + Duration::from_secs(60)).await;
        assert!(results.iter().all(|result| matches!(result, Err(BrokerError::Unsent(_)))));
        assert!(lock(&requests.open).slots.is_empty(), "nothing was sent");
        running.await.unwrap();
    }

    /// This server reads nothing.
    #[tokio::test]
    async fn a_full_queue_delays_a_caller_until_its_deadline_and_no_longer() {
        let (requests, line, _server) = connected().await;
        let running = TaskTracker::new().spawn(line.run(requests.connection.clone()));
        tokio::time::pause();
        let payload = Bytes::from(vec![b'x'; 100_000]);
        let request = |_| Request::new("s", payload.clone());
        let asked: Vec<Request> = (0..1000).map(request).collect();
        let until = clock::now() + Duration::from_secs(4);
        let asking = tokio::time::timeout(Duration::from_secs(60), requests.ask(&asked, until));
        let results = asking.await.expect("the call takes too long");
        let late = clock::now().duration_since(until);
        assert!(late < Duration::from_millis(5), "{late:?}");
        let sent =
            results.iter().filter(|result| **result == Err(BrokerError::Unconfirmed)).count();
        let unsent = |result: &&Result<_, _>| matches!(result, Err(BrokerError::Unsent(_)));
        assert!((2..asked.len()).contains(&sent), "{sent} were sent");
        assert_eq!(results.iter().filter(unsent).count(), asked.len() - sent);
        requests.connection.end();
        running.await.unwrap();
    }

    /// A process that is stopped and continues writes what it has handed to the kernel, and nothing else.
    #[tokio::test]
    async fn a_message_that_waits_longer_than_its_deadline_is_not_written() {
        let (requests, line, mut server) = connected().await;
        let made = clock::reading();
        let request = |subject: &str, by: u64| Request {
            by: Some(Deadline::new(made.now + Duration::from_secs(by), made)),
            ..Request::new(subject, Bytes::new())
        };
        let until = made.now + Duration::from_secs(60);
        tokio::time::pause();
        assert!(requests.send(&request("late", 5), None, until).await);
        assert!(requests.send(&request("early", 50), None, until).await);
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(!requests.send(&request("never", 5), None, until).await);
        let running = TaskTracker::new().spawn(line.run(requests.connection.clone()));
        requests.connection.written().await;
        requests.connection.end();
        running.await.unwrap();
        let mut written = String::new();
        server.read_to_string(&mut written).await.unwrap();
        assert!(written.contains("PUB early 0\r\n"), "{written}");
        assert!(!written.contains("late") && !written.contains("never"), "{written}");
    }
}
