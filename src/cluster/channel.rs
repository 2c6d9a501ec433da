//! Sealed messages between replicas, over the bus:
//!
//! ```text
//!  _fetchproxy.<cluster>.beat               the heartbeat of each replica, once a second, to all
//!  _fetchproxy.<cluster>.<name>.settle      a request to the replica that answers for that name
//!  _fetchproxy.<cluster>.<replica>.handover a request to a replica that is to take over leases
//!  _fetchproxy.<cluster>.<replica>.sighting a request to a replica that may hold void leases
//!  _fetchproxy.<cluster>.<replica>.admin    a question of an operator to a replica
//!  _fetchproxy.<cluster>.attempt            a question for an attempt, to all
//! ```
//! A message is sealed with a token key and bound to its subject. An answer is bound to its request.
//! So the right to publish on these subjects does not allow anyone to settle a message. Owns the seal,
//! the subjects, and the memory of requests that were received. Messages are bytes here.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::replay::RecentRequests;
use crate::{
    broker::Broker,
    bus::{Bus, Incoming, RequestError, SUBJECT_PREFIX},
    clock,
    keys::Keys,
    lessor::Lessor,
    lock::lock,
    log_throttle::LogThrottle,
    simulated::fill_random,
    token::{InstanceId, Nonce},
};

/// A message that cannot leave within this time is dropped.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(1);

/// The subject matter of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Topic {
    /// Settle these leases.
    Settle,
    /// Take over leases.
    Handover,
    /// A consumer was seen with another past.
    Sighting,
    /// A question of an operator.
    Admin,
    /// A call of an attempt has come to another replica.
    Attempt,
}

impl Topic {
    const ALL: [Self; 5] =
        [Self::Settle, Self::Handover, Self::Sighting, Self::Admin, Self::Attempt];

    fn name(self) -> &'static str {
        match self {
            Self::Settle => "settle",
            Self::Handover => "handover",
            Self::Sighting => "sighting",
            Self::Admin => "admin",
            Self::Attempt => "attempt",
        }
    }
}

/// The reason why a request has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unanswered {
    /// No replica answers for that name. The request was not received, and will not be.
    Nobody,
    /// NATS is away. The request was not sent.
    Unsent,
    /// The request may have been received.
    Silent,
}

impl Unanswered {
    /// Its name, for traces.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::Unsent => "unsent",
            Self::Silent => "silent",
        }
    }
}

/// A request of another replica, opened.
pub(super) struct PeerRequest {
    pub(super) topic: Topic,
    /// The identifier of the request: no other request has it.
    pub(super) nonce: Nonce,
    pub(super) body: Vec<u8>,
    pub(super) reply_to: ReplyTo,
}

/// The place for the answer to a request.
pub(super) struct ReplyTo {
    subject: String,
    /// Only as the answer to this request can the answer be opened.
    channel: String,
}

/// The sealed messages of one replica.
pub(super) struct Channel<B: Broker + Bus> {
    lessor: Lessor<B>,
    keys: Arc<Keys>,
    cluster: String,
    recent: Mutex<RecentRequests>,
    /// Anyone who may publish to this replica can send messages that it cannot open.
    unopened: LogThrottle,
}

impl<B: Broker + Bus> Channel<B> {
    pub(super) fn new(lessor: Lessor<B>, keys: Arc<Keys>, cluster: &str) -> Self {
        let (recent, unopened) = (Mutex::default(), LogThrottle::default());
        Self { lessor, keys, cluster: cluster.to_owned(), recent, unopened }
    }

    /// Listens to heartbeats, to requests about leases of these `names`, and to the other requests
    /// for this replica.
    pub(super) fn listen(&self, us: InstanceId, names: impl IntoIterator<Item = InstanceId>) {
        let settle = names.into_iter().map(|name| self.subject(name, Topic::Settle));
        let own = [Topic::Handover, Topic::Sighting, Topic::Admin];
        let own = own.map(|topic| self.subject(us, topic));
        let to_all = [self.heartbeat_subject(), self.attempt_subject()];
        let all = settle.chain(to_all).chain(own);
        self.lessor.broker().subscribe(all.collect());
    }

    /// The next message of another replica.
    pub(super) async fn next(&self) -> Incoming {
        self.lessor.broker().next().await
    }

    /// Asks the replica that answers for this name, once.
    ///
    /// # Errors
    /// See [`Unanswered`].
    pub(super) async fn ask(
        &self,
        name: InstanceId,
        topic: Topic,
        request: &[u8],
        until: Instant,
    ) -> Result<Vec<u8>, Unanswered> {
        self.ask_on(self.subject(name, topic), request, until).await
    }

    /// Asks all replicas for an attempt. Returns the first answer.
    ///
    /// # Errors
    /// See [`Unanswered`].
    pub(super) async fn ask_all(
        &self,
        request: &[u8],
        until: Instant,
    ) -> Result<Vec<u8>, Unanswered> {
        self.ask_on(self.attempt_subject(), request, until).await
    }

    async fn ask_on(
        &self,
        subject: String,
        request: &[u8],
        until: Instant,
    ) -> Result<Vec<u8>, Unanswered> {
        let nonce = nonce()?;
        let frame = self.keys.sealer().seal_frame(&subject, request, nonce);
        match self.lessor.broker().request(&subject, frame.into(), until).await {
            Ok(answer) => {
                let opened =
                    self.keys.sealer().open_frame(&answer_channel(&subject, nonce), &answer);
                opened.map(|(_, body)| body).map_err(|_| Unanswered::Silent)
            }
            Err(RequestError::Nobody) => Err(Unanswered::Nobody),
            Err(RequestError::Unsent(_)) => Err(Unanswered::Unsent),
            Err(RequestError::Silent) => Err(Unanswered::Silent),
        }
    }

    /// Opens a request. `None`: its sender shares no key with this replica, or the request was received
    /// before.
    pub(super) fn open(&self, incoming: Incoming) -> Option<PeerRequest> {
        let Incoming { subject, message, reply: Some(reply) } = incoming else { return None };
        let Ok((nonce, body)) = self.keys.sealer().open_frame(&subject, &message) else {
            if self.unopened.allow(clock::now()) {
                tracing::warn!(
                    subject,
                    "requests cannot be opened: their sender shares no token key with this replica"
                );
            }
            return None;
        };
        let topic = Topic::ALL.into_iter().find(|topic| subject.ends_with(topic.name()))?;
        let reply_to = ReplyTo { channel: answer_channel(&subject, nonce), subject: reply };
        self.is_new(nonce).then_some(PeerRequest { topic, nonce, body, reply_to })
    }

    /// Answers a request.
    pub(super) async fn answer(&self, ReplyTo { subject, channel }: &ReplyTo, answer: &[u8]) {
        let Ok(nonce) = nonce() else { return };
        let frame = self.keys.sealer().seal_frame(channel, answer, nonce);
        self.publish(subject, frame).await;
    }

    /// Publishes a heartbeat.
    pub(super) async fn publish_heartbeat(&self, heartbeat: Vec<u8>) {
        self.publish(&self.heartbeat_subject(), heartbeat).await;
    }

    async fn publish(&self, subject: &str, message: Vec<u8>) {
        let until = clock::now() + PUBLISH_TIMEOUT;
        self.lessor.broker().publish(subject, message.into(), until).await;
    }

    /// Whether this request is received for the first time, as far as this replica remembers. A
    /// replica that has left passes on requests that this replica may have received itself. And if
    /// one connection follows another, each request arrives twice.
    pub(super) fn is_new(&self, request: Nonce) -> bool {
        lock(&self.recent).is_new(request)
    }

    fn subject(&self, name: InstanceId, topic: Topic) -> String {
        format!("{SUBJECT_PREFIX}{}.{name}.{}", self.cluster, topic.name())
    }

    fn attempt_subject(&self) -> String {
        format!("{SUBJECT_PREFIX}{}.{}", self.cluster, Topic::Attempt.name())
    }

    pub(super) fn heartbeat_subject(&self) -> String {
        format!("{SUBJECT_PREFIX}{}.beat", self.cluster)
    }
}

/// An answer can be opened only as the answer to its request.
fn answer_channel(subject: &str, nonce: Nonce) -> String {
    let nonce: String = nonce.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{subject} {nonce}")
}

pub(super) fn nonce() -> Result<Nonce, Unanswered> {
    let mut nonce = [0; 24];
    fill_random(&mut nonce).map_err(|_| Unanswered::Unsent)?;
    Ok(nonce)
}
