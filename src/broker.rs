//! The port to the message broker: what the lessor asks of JetStream, in the lessor's words.
//!
//! Owns the trait, its words and its errors. It must never name an implementation, a runtime or a
//! wire format. Two brokers implement it, the real one (`nats`) and a scripted one in the tests,
//! and one suite of contract tests holds both to what is written here.

use std::{
    fmt,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;

/// A JetStream pull consumer, seen from a client: it can be looked at, pulled from and settled with.
pub trait Broker: Send + Sync + 'static {
    /// Where the messages of one consumer arrive.
    type Inbox: Inbox;

    /// What is known of the connection at this moment.
    fn link(&self) -> Link;

    /// Waits until [`Broker::link`] is something other than `seen`, and returns it.
    fn link_change(&self, seen: &Link) -> impl Future<Output = Link> + Send;

    /// What is known of JetStream as a whole, beside the connection.
    fn jetstream(&self) -> JetStream;

    /// Reads the consumer's configuration and state. Bounded by `until`.
    fn info(
        &self,
        name: &ConsumerName,
        until: Instant,
    ) -> impl Future<Output = Result<ConsumerInfo, InfoError>> + Send;

    /// Opens an inbox for this consumer: on the present connection, or on one of its own, so that
    /// what it brings can hurt nobody else. Nothing is pulled yet.
    ///
    /// # Errors
    /// [`BrokerError::Unsent`] while the link is not up, or no connection is to be had.
    fn open(
        &self,
        name: &ConsumerName,
        kind: ConnectionKind,
    ) -> impl Future<Output = Result<Self::Inbox, BrokerError>> + Send;

    /// Looks among the consumer's unsettled deliveries for messages that break every connection that
    /// brings them: from the stream sequence `from` on, and from there back. Bounded by `until` and
    /// by a number of messages: what was found by then, and whether that is all.
    fn unreadable(
        &self,
        name: &ConsumerName,
        from: u64,
        until: Instant,
    ) -> impl Future<Output = Result<Search, InfoError>> + Send;

    /// Settles deliveries: one result for each order, in their order.
    ///
    /// With [`Confirmation::Confirmed`] a result is `Ok` once the broker said so, before
    /// [`AckPublish::by`]: what it says later can be of somebody else's delivery. With
    /// [`Confirmation::Sent`] once it was handed to the connection. Orders still open at `until`
    /// are [`BrokerError::Unconfirmed`] if they may have left, else [`BrokerError::Unsent`].
    /// An order is published at most once, and keeps to its [`AckPublish::by`].
    fn settle(
        &self,
        orders: Vec<AckPublish>,
        confirmation: Confirmation,
        until: Instant,
    ) -> impl Future<Output = Vec<Result<(), BrokerError>>> + Send;

    /// Whose delivery is settled there, and which attempt it is; `None`: it is no ack subject.
    fn delivery_of(ack: &AckSubject) -> Option<(ConsumerName, u64)>;

    /// Sends what is still on its way, bounded by `until`; nothing may be asked afterwards.
    fn close(&self, until: Instant) -> impl Future<Output = ()> + Send;
}

/// The messages and the ends of pulls of one consumer, for as long as one connection lives.
pub trait Inbox: Send + 'static {
    /// Asks for messages. At most one pull may be open at a time; its end arrives through
    /// [`Inbox::next`], except that nothing arrives after the last of `batch` messages. What it
    /// brings may be told to have ended, and arrive a moment later.
    ///
    /// # Errors
    /// [`BrokerError::Unsent`] when the connection is gone: nothing will arrive for this pull.
    fn pull(&mut self, pull: PullRequest) -> impl Future<Output = Result<(), BrokerError>> + Send;

    /// Waits for at least one arrival and appends what is there to `into`. Cancel-safe.
    fn next(&mut self, into: &mut Vec<Arrival>) -> impl Future<Output = InboxEvent> + Send;
}

/// On which connection an inbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionKind {
    /// The one that all consumers share.
    Shared,
    /// One of its own.
    Dedicated,
}

/// What [`Inbox::next`] has waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InboxEvent {
    /// Something has arrived.
    Arrived,
    /// The connection is gone, and everything that it brought has been read.
    Lost,
    /// The same; and it looks as if it ended by what it brought: a message that cannot be read.
    Broken,
}

/// What a look for messages that break every connection has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Search {
    /// Those that were found.
    pub found: Vec<Unreadable>,
    /// Every unsettled delivery was looked at.
    pub complete: bool,
}

/// A message that breaks every connection that brings it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Where it is settled.
    pub ack: AckSubject,
    /// The message's place in its stream.
    pub stream_sequence: u64,
    /// What cannot be read, for people.
    pub why: String,
}

/// The connection as the rest of the program sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// Both connections work.
    Up(Arc<Server>),
    /// At least one does not; the reason is for people.
    Down(Arc<str>),
    /// The server was reached and cannot be worked with; the reason is for people.
    Unsupported(Arc<str>),
}

/// Whether there is a JetStream behind the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JetStream {
    /// It was not asked yet, or has not answered.
    Unknown,
    /// It answers.
    There,
    /// Nobody can read any consumer here; the reason is for people.
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

/// The server that answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Counts connections from 1: another number is another connection.
    pub epoch: u64,
    /// The same of the connection over which replicas talk: between the two nothing was heard.
    pub bus_epoch: u64,
    /// A new one with every start of the server: another id has no memory of what the last one
    /// promised, unless it is replicated.
    pub id: String,
    /// As it names itself, like `2.15.1`.
    pub version: String,
    /// The largest message that it takes, headers and payload, in bytes.
    pub max_payload: u64,
}

/// A consumer by name.
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

/// What CONSUMER.INFO says, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerInfo {
    /// When this consumer was made. A consumer deleted and made again under its name differs.
    pub created: Arc<str>,
    /// How it wants to be acknowledged.
    pub ack_policy: AckPolicy,
    /// It delivers to a subject by itself.
    pub push: bool,
    /// Its pulls must name a priority group.
    pub priority_groups: bool,
    /// Paused by an operator.
    pub paused: bool,
    /// Time after which an unsettled delivery goes to somebody else.
    pub ack_wait: Duration,
    /// Ack waits by delivery count, where there are any.
    pub backoff: Vec<Duration>,
    /// Attempts after which a message is given up; `None` is without limit.
    pub max_deliver: Option<u64>,
    /// Deliveries that may be unsettled at once, over all clients; `None` is without limit.
    pub max_ack_pending: Option<u64>,
    /// Limits of one pull request, where the consumer has them.
    pub max_batch: Option<u32>,
    /// Longest wait of one pull request.
    pub max_expires: Option<Duration>,
    /// Most bytes that one pull request may ask for.
    pub max_request_bytes: Option<u64>,
    /// Copies of the consumer's state in the cluster.
    pub replicas: u32,
    /// Who leads it.
    pub leader: Leader,
    /// `leader` is another one after every change and every start. Otherwise nothing tells that one
    /// which was away has come back, and what it has given away by then.
    pub leader_shows: bool,
    /// Messages not delivered yet, ever.
    pub pending: u64,
    /// Deliveries unsettled now.
    pub ack_pending: u64,
    /// The highest consumer sequence that was delivered, as the server remembers it.
    pub delivered: u64,
    /// The highest stream sequence that was delivered.
    pub delivered_stream: u64,
}

/// The server that hands a consumer's messages out, and since when, as far as it tells: a digest, to
/// compare. Another one may have given away what was leased of this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Leader(pub u64);

impl Leader {
    /// `since` is empty where it is not told.
    pub fn new(name: &str, since: &str) -> Self {
        // FNV-1a, and not the standard library's: replicas of two builds must agree.
        let bytes = name.bytes().chain([b' ']).chain(since.bytes());
        Self(bytes.fold(0xcbf2_9ce4_8422_2325, |digest, byte| {
            (digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        }))
    }
}

/// JetStream's ack policies, as far as they matter here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AckPolicy {
    /// Each message by itself: the only one that a lease makes sense with.
    Explicit,
    /// Any other, by its name.
    Other(String),
}

/// One pull request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PullRequest {
    /// Names the pull in [`Arrival::End`]; unique within an inbox.
    pub no: u64,
    /// Most messages that it brings.
    pub batch: u32,
    /// The server ends it after this time.
    pub expires: Duration,
    /// End with what is there at the first message, instead of waiting for `batch`.
    pub no_wait: bool,
    /// Most bytes that it brings: subjects, headers and payloads.
    pub max_bytes: Option<u64>,
}

/// What comes through an inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arrival {
    /// A delivery; boxed, because it is handed on many times before it is looked at.
    Message(Box<Delivery>),
    /// A pull has ended.
    End {
        /// Which pull.
        no: u64,
        /// Why.
        end: PullEnd,
    },
}

/// Why a pull ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullEnd {
    /// Its time is over, or it brought all there was.
    Done,
    /// Other pulls already wait for what is pending.
    RequestsPending,
    /// The next message is larger than what is left of `max_bytes`.
    TooLarge,
    /// Its `max_bytes` are used up to the last, and there is more.
    Spent,
    /// Too many pulls wait at this consumer, or a limit of it was passed; the text is the server's.
    Busy(String),
    /// The server that led this consumer is going, or lost the lead. What it promised lately may
    /// be forgotten.
    LeaderGone,
    /// The consumer or its stream is not there any more.
    ConsumerGone,
    /// Our rights do not cover this subject.
    Permission(String),
    /// Anything else, in the server's words.
    Other(String),
}

/// One attempt to hand over one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Where it is settled.
    pub ack: AckSubject,
    /// The subject that the message was published to.
    pub subject: String,
    /// The payload. It may be a slice of a large buffer: never keep it longer than an answer takes.
    pub payload: Bytes,
    /// Headers in no particular order, each with its values in theirs.
    pub headers: Vec<(String, Vec<String>)>,
    /// The message's place in its stream.
    pub stream_sequence: u64,
    /// The delivery's place among those of its consumer.
    pub consumer_sequence: u64,
    /// 1 for the first attempt.
    pub delivery_count: u64,
    /// Messages left for this consumer when it was sent.
    pub pending: u64,
    /// When the message was stored: nanoseconds since the Unix epoch.
    pub published: u64,
}

/// The subject that settles one delivery. Whoever knows it can settle the message, so it never
/// leaves the process unsealed.
#[derive(Clone, PartialEq, Eq)]
pub struct AckSubject(pub Box<str>);

impl fmt::Debug for AckSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AckSubject(***)")
    }
}

/// One thing to publish to an ack subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AckPublish {
    /// The delivery.
    pub ack: AckSubject,
    /// What to say of it.
    pub kind: AckKind,
    /// Orders of one line are for one consumer that handles what it is told in order and keeps no
    /// copies, so the answer to a later one answers for those before it. `None`: each is answered
    /// by itself, because a change of leader can come between any two.
    pub confirm_group: Option<u32>,
    /// It arrives by then, or never: later the message may be somebody else's. A broker gives up a
    /// connection for that, with all that it has not sent yet.
    pub by: Option<Instant>,
}

/// What can be said of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AckKind {
    /// Done.
    Ack,
    /// Deliver it again; after the delay, when there is one.
    Nak(Option<Duration>),
    /// Never deliver it again, for this reason (which may be empty).
    Term(String),
    /// Still being worked on: the ack wait starts anew.
    Progress,
}

/// How sure the caller wants to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confirmation {
    /// The broker has answered.
    Confirmed,
    /// It is on its way; nobody looks whether it arrives.
    Sent,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// It never left us: it has had no effect and never will.
    #[error("not sent: {0}")]
    Unsent(String),
    /// The broker said no: it has had no effect and never will.
    #[error(transparent)]
    Denied(#[from] Denial),
    /// It left us and nobody answered: it may have had its effect, or may still have it.
    #[error("sent, and never confirmed")]
    Unconfirmed,
}

/// Why the broker said no.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The consumer, or its stream, is not there any more.
    #[error("the consumer or its stream is gone")]
    Gone,
    /// Our rights do not cover the subject.
    #[error("no permission for {0}")]
    Permission(String),
}

/// Why CONSUMER.INFO, or a stored message, was not to be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InfoError {
    /// There is no such stream.
    #[error("no such stream")]
    NoStream,
    /// The stream is there, the consumer is not.
    #[error("no such consumer")]
    NoConsumer,
    /// Our rights do not cover the subject.
    #[error("no permission for {0}")]
    Permission(String),
    /// No answer, or one that says that it cannot be had now.
    #[error("NATS is not available: {0}")]
    Unavailable(String),
}
