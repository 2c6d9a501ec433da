//! The port to the message broker: everything that the lessor needs of JetStream.
//!
//! Owns the trait, its types and its errors. It must never name an implementation, a runtime or a wire
//! format. Two brokers implement it: the real one (`nats`), and a scripted one in the tests. One suite of
//! contract tests checks both against the promises here.

mod error;

use std::{
    fmt,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;

pub use self::error::{BrokerError, Denial, InfoError};

/// JetStream's pull consumers, as a client uses them: INFO, pulls and acks.
pub trait Broker: Send + Sync + 'static {
    /// The type of an inbox, where the messages of one consumer arrive.
    type Inbox: Inbox;

    /// The present state of the connection.
    fn link(&self) -> Link;

    /// Waits until [`Broker::link`] differs from `seen`, and returns the new state.
    fn link_change(&self, seen: &Link) -> impl Future<Output = Link> + Send;

    /// The state of JetStream as a whole, apart from the connection.
    fn jetstream(&self) -> JetStream;

    /// Reads the consumer's configuration and state. Bounded by `until`.
    fn info(
        &self,
        name: &ConsumerName,
        until: Instant,
    ) -> impl Future<Output = Result<ConsumerInfo, InfoError>> + Send;

    /// Opens an inbox for this consumer, on the present connection or on a dedicated one. Messages on a
    /// dedicated connection can harm no other consumer. Nothing is pulled yet.
    ///
    /// # Errors
    /// [`BrokerError::Unsent`] while the link is not up, or if a connection cannot be made.
    fn open(
        &self,
        name: &ConsumerName,
        kind: ConnectionKind,
    ) -> impl Future<Output = Result<Self::Inbox, BrokerError>> + Send;

    /// Searches the consumer's unsettled deliveries for messages that break every connection that brings
    /// them. Starts at the stream sequence `from`, and then goes back from there. Bounded by `until` and by
    /// a number of messages. Returns the messages found by then, and whether the search was complete.
    fn unreadable(
        &self,
        name: &ConsumerName,
        from: u64,
        until: Instant,
    ) -> impl Future<Output = Result<Search, InfoError>> + Send;

    /// Reads the messages of these deliveries again, as they are stored: one result each, in their order. `None`: the
    /// message is no longer stored. Bounded by `until`.
    fn read_again(
        &self,
        deliveries: &[AckSubject],
        until: Instant,
    ) -> impl Future<Output = Result<Vec<Option<Delivery>>, InfoError>> + Send;

    /// Settles deliveries: one result for each publish, in their order.
    ///
    /// With [`Confirmation::Confirmed`] a result is `Ok` if the broker confirmed it before
    /// [`AckPublish::by`]. A later confirmation can be of somebody else's delivery. With
    /// [`Confirmation::Sent`] a result is `Ok` if the publish was handed to the connection. A publish that
    /// is still open at `until` is [`BrokerError::Unconfirmed`] if it may have left, and otherwise
    /// [`BrokerError::Unsent`]. A later confirmation is [`BrokerError::Late`]. Each is published at most once, and arrives by [`AckPublish::by`] or never.
    fn settle(
        &self,
        publishes: Vec<AckPublish>,
        confirmation: Confirmation,
        until: Instant,
    ) -> impl Future<Output = Vec<Result<(), BrokerError>>> + Send;

    /// The consumer and the attempt of the delivery that an ack subject settles. `None`: no ack subject.
    fn delivery_of(ack: &AckSubject) -> Option<(ConsumerName, u64)>;

    /// Sends everything that is queued, bounded by `until`. The broker must not be used afterwards.
    fn close(&self, until: Instant) -> impl Future<Output = ()> + Send;
}

/// The messages and the ends of pulls of one consumer, while one connection lives.
pub trait Inbox: Send + 'static {
    /// Asks for messages. At most one pull may be open at a time. Its end arrives through [`Inbox::next`],
    /// but there is no end after the last of `batch` messages. Messages may arrive a moment after the end of
    /// their pull.
    ///
    /// # Errors
    /// [`BrokerError::Unsent`] if the connection is gone: nothing will arrive for this pull.
    fn pull(&mut self, pull: PullRequest) -> impl Future<Output = Result<(), BrokerError>> + Send;

    /// Waits for at least one arrival, and appends all available arrivals to `into`. Cancel-safe.
    fn next(&mut self, into: &mut Vec<Arrival>) -> impl Future<Output = InboxEvent> + Send;
}

/// The kind of connection that an inbox uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ConnectionKind {
    /// The connection that all consumers share.
    Shared,
    /// A connection for this consumer alone.
    Dedicated,
}

/// The result of [`Inbox::next`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InboxEvent {
    /// A message or the end of a pull has arrived.
    Arrived,
    /// The connection is gone, and everything that it brought has been read.
    Lost,
    /// The same, and an unreadable message seems to be the cause.
    Broken,
}

/// The result of a search for messages that break every connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Search {
    /// The messages that were found.
    pub found: Vec<Unreadable>,
    /// Whether every unsettled delivery was looked at.
    pub complete: bool,
}

/// A message that breaks every connection that brings it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The subject that settles it.
    pub ack: AckSubject,
    /// The message's sequence in its stream.
    pub stream_sequence: u64,
    /// The unreadable part, for people.
    pub why: String,
}

/// The connection as the rest of the program sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// Both connections work.
    Up(Arc<Server>),
    /// At least one connection does not work. The reason is for people.
    Down(Arc<str>),
    /// The server was reached and is not supported. The reason is for people.
    Unsupported(Arc<str>),
}

/// Whether JetStream is available behind the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JetStream {
    /// JetStream was not asked yet, or has not answered.
    Unknown,
    /// JetStream answers.
    There,
    /// No consumer can be read. The reason is for people.
    Absent(Arc<str>),
}

impl Link {
    /// The server, while the link is up.
    pub fn server(&self) -> Option<&Arc<Server>> {
        match self {
            Self::Up(server) => Some(server),
            Self::Down(_) | Self::Unsupported(_) => None,
        }
    }
}

/// The server of the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Counts connections from 1. Another number means another connection.
    pub epoch: u64,
    /// Counts the connections for messages between replicas. Messages between two numbers were missed.
    pub bus_epoch: u64,
    /// The server's id, new at every start. A server with another id does not know the state of the last
    /// one, except of replicated consumers.
    pub id: String,
    /// The server's name, which its operator gave it.
    pub name: String,
    /// The server's version, like `2.15.1`.
    pub version: String,
    /// The largest message that it accepts, headers and payload together, in bytes.
    pub max_payload: u64,
}

/// The name of a consumer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConsumerName {
    /// The stream's name.
    pub stream: Arc<str>,
    /// The consumer's name.
    pub consumer: Arc<str>,
}

impl fmt::Display for ConsumerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.stream, self.consumer)
    }
}

/// The fields of CONSUMER.INFO that are needed here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerInfo {
    /// The creation time. It differs if a consumer is deleted and created again under its name.
    pub created: Arc<str>,
    /// Its ack policy.
    pub ack_policy: AckPolicy,
    /// Whether it is a push consumer.
    pub push: bool,
    /// Whether its pulls must name a priority group.
    pub priority_groups: bool,
    /// Whether an operator has paused it.
    pub paused: bool,
    /// The time after which JetStream delivers an unsettled message again.
    pub ack_wait: Duration,
    /// Ack waits by delivery count. Empty: all deliveries have `ack_wait`.
    pub backoff: Vec<Duration>,
    /// The number of delivery attempts. `None`: no limit.
    pub max_deliver: Option<u64>,
    /// The most unsettled deliveries of all clients together. `None`: no limit.
    pub max_ack_pending: Option<u64>,
    /// Most messages of one pull request. `None`: no limit.
    pub max_batch: Option<u32>,
    /// Longest wait of one pull request. `None`: no limit.
    pub max_expires: Option<Duration>,
    /// Most bytes of one pull request. `None`: no limit.
    pub max_request_bytes: Option<u64>,
    /// The number of copies of the consumer's state in the cluster.
    pub replicas: u32,
    /// The consumer's leader.
    pub leader: Leader,
    /// Whether `leader` changes with every change of leader and every start of a server. If not, nothing
    /// shows that a leader was away, came back, and may have given messages away.
    pub leader_shows: bool,
    /// The number of messages that were never delivered.
    pub pending: u64,
    /// The number of unsettled deliveries.
    pub ack_pending: u64,
    /// The number of pulls that wait at the server.
    pub waiting: u64,
    /// The number of unsettled deliveries that are not the first of their message.
    pub redelivered: u64,
    /// The subjects that the consumer takes from its stream. Empty: all.
    pub filter_subjects: Vec<String>,
    /// The highest delivered consumer sequence that the server remembers.
    pub delivered: u64,
    /// The highest stream sequence that was delivered.
    pub delivered_stream: u64,
}

/// A digest of a consumer's leader and of the time since when it leads, as far as the server tells. Two
/// digests can be compared: another leader may have given away messages that are leased here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Leader(pub u64);

impl Leader {
    /// `since` is empty if the server does not tell it.
    pub fn new(name: &str, since: &str) -> Self {
        // FNV-1a and not the standard library's hash, because replicas of two builds must agree.
        let bytes = name.bytes().chain([b' ']).chain(since.bytes());
        Self(bytes.fold(0xcbf2_9ce4_8422_2325, |digest, byte| {
            (digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        }))
    }
}

/// JetStream's ack policies, as far as they are needed here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AckPolicy {
    /// Each message is acked by itself. Leases need this policy.
    Explicit,
    /// Any other policy, by its name.
    Other(String),
}

/// One pull request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PullRequest {
    /// The number of the pull in [`Arrival::End`], unique within an inbox.
    pub no: u64,
    /// Most messages.
    pub batch: u32,
    /// The time after which the server ends it.
    pub expires: Duration,
    /// End with the messages that are available at the first message, and do not wait for `batch`.
    pub no_wait: bool,
    /// Most bytes of subjects, headers and payloads together.
    pub max_bytes: Option<u64>,
}

/// An arrival in an inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arrival {
    /// A delivery. Boxed, because it is moved many times.
    Message(Box<Delivery>),
    /// A pull has ended.
    End {
        /// The number of the pull.
        no: u64,
        /// The reason.
        end: PullEnd,
    },
}

/// The reason for the end of a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullEnd {
    /// Its time is over, or it brought every available message.
    Done,
    /// Other pulls already wait for the pending messages.
    RequestsPending,
    /// The next message is larger than the rest of `max_bytes`.
    TooLarge,
    /// Its `max_bytes` are used up exactly. nats-server 2.15 does not say so, so the reader counts the bytes.
    Spent,
    /// Too many pulls wait at this consumer, or the pull exceeds a limit of the consumer. The text is the
    /// server's.
    Busy(String),
    /// The consumer's leader is stopping, or is no longer the leader. The latest state may be lost.
    LeaderGone,
    /// The consumer or its stream is gone.
    ConsumerGone,
    /// We have no right to this subject.
    Permission(String),
    /// Any other reason, in the server's words.
    Other(String),
}

/// One attempt to deliver one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// The subject that settles it.
    pub ack: AckSubject,
    /// The subject that the message was published to.
    pub subject: String,
    /// The payload. It may be a slice of a large buffer, so do not keep it after the answer.
    pub payload: Bytes,
    /// Headers in no particular order, each with its values in order.
    pub headers: Vec<(String, Vec<String>)>,
    /// The message's sequence in its stream.
    pub stream_sequence: u64,
    /// The delivery's sequence in its consumer.
    pub consumer_sequence: u64,
    /// The number of the attempt, from 1.
    pub delivery_count: u64,
    /// The number of messages that were left for this consumer when it was sent.
    pub pending: u64,
    /// The time at which the message was stored, in nanoseconds since the Unix epoch.
    pub published: u64,
}

/// The subject that settles one delivery. Anybody who knows it can settle the message, so it never leaves
/// the process unsealed.
#[derive(Clone, PartialEq, Eq)]
pub struct AckSubject(pub Box<str>);

impl fmt::Debug for AckSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AckSubject(***)")
    }
}

/// One publish to an ack subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AckPublish {
    /// The ack subject of the delivery.
    pub ack: AckSubject,
    /// The ack to publish.
    pub kind: AckKind,
    /// A group is one consumer that handles acks in order, and that the connected server leads alone. The
    /// confirmation of a later ack also confirms the earlier ones of its group. `None`: each ack is confirmed by
    /// itself, because its leader can be away for one ack and back for the next.
    pub confirm_group: Option<u32>,
    /// It must arrive by then or never: later the message may be somebody else's. To keep this, a broker
    /// gives up a connection with everything that is not sent yet.
    pub by: Option<Instant>,
}

/// The ack of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AckKind {
    /// The message is done.
    Ack,
    /// Deliver the message again, after the delay if there is one.
    Nak(Option<Duration>),
    /// Never deliver the message again, for this reason, which may be empty.
    Term(String),
    /// The message is still being worked on: the ack wait starts again.
    Progress,
}

/// The confirmation that the caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confirmation {
    /// The broker has confirmed it.
    Confirmed,
    /// It was sent, and nobody checks whether it arrives.
    Sent,
}
