//! The meaning of one seed, as plain data: the cluster, its streams and consumers, the clients and the
//! accidents. A plan prints as Rust, so a test can hold the shortest plan that once failed.
//!
//! Lengths of time are in milliseconds. Times count from the beginning of the world.

mod draw;
mod outage;

use std::{
    fmt::{self, Debug},
    time::Duration,
};

pub use self::outage::Outage;
use super::{
    jetstream::{Config, Time},
    settings,
    signs::Sign,
};

/// How far the clocks of the replicas are from the right time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clocks {
    /// No two differ by more than the 250 ms that the documentation asks for.
    Near,
    /// They differ by seconds or by hours.
    Far,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaPlan {
    pub max_leases: usize,
    /// Its wall clock is ahead of the right time by so much.
    pub ahead: i64,
}

/// A stream, and the messages that are published to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamPlan {
    /// So many are there at the beginning.
    pub backlog: u64,
    /// The most messages, of all its life.
    pub messages: u64,
    /// The most messages that come at once, and the longest pause before the next.
    pub crowd: u64,
    pub pause: u64,
    /// The most bytes of a payload.
    pub size: u64,
    /// How many of a hundred are not JSON.
    pub not_json: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerPlan {
    pub stream: usize,
    /// When it is made: 0 is before everything else.
    pub made: u64,
    pub ack_wait: u64,
    pub backoff: Vec<u64>,
    pub max_deliver: Option<u64>,
    pub max_ack_pending: u64,
    pub max_batch: Option<u32>,
    pub max_bytes: Option<u64>,
    pub copies: u32,
    /// Its INFO says since when its leader leads.
    pub shows_leader: bool,
    /// Another server than the one that replicas are connected to leads it, also without copies.
    pub clustered: bool,
    /// Until a majority has a change.
    pub lag: u64,
}

impl ConsumerPlan {
    pub fn config(&self) -> Config {
        Config {
            backoff: self.backoff.iter().copied().map(Duration::from_millis).collect(),
            max_deliver: self.max_deliver,
            max_ack_pending: Some(self.max_ack_pending),
            max_batch: self.max_batch,
            max_bytes: self.max_bytes,
            replicas: self.copies,
            tells_since: self.shows_leader,
            clustered: self.clustered,
            ..Config::new(Duration::from_millis(self.ack_wait))
        }
    }
}

/// What a client is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Habit {
    /// Works on one message after the other.
    Ordinary,
    /// Settles many messages in one call, with mixed actions, some twice, some of another replica.
    Batching,
    /// Settles at the moment of an accident, and a few milliseconds around the end of a lease.
    Nervous,
    /// Asks for a long lease, works nearly all of it, and extends it.
    LongWorker,
    /// Cancels calls, and gives them short deadlines.
    Impatient,
    /// Loses answers, and says the same again at two replicas at once.
    Repeating,
    /// Says two different things of one message.
    Misusing,
    /// Keeps tokens after the end of their leases, and says something of them late.
    Keeper,
    /// Settles about the end of its lease, and up to two seconds later.
    Late,
    /// Hangs up before its settlement is answered, and says the same elsewhere.
    Leaver,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientPlan {
    /// Its dice. It keeps this number while others are left out of a plan.
    pub number: u64,
    pub consumer: usize,
    pub habit: Habit,
    /// It knows this replica alone. `None`: it roams.
    pub home: Option<usize>,
    /// The most messages of a Fetch.
    pub n: u32,
    /// The longest lease that it asks for, if it asks for one.
    pub lease: Option<u64>,
    pub linger: u64,
    /// 0: the default.
    pub max_bytes: u32,
    pub json: bool,
    /// Each of its Fetch calls waits for long.
    pub patient: bool,
    /// It does not wait for a confirmation.
    pub sent: bool,
    /// It says Ack, Nak, Term and Extend instead of Settle.
    pub unary: bool,
    /// It settles on its next Fetch.
    pub one_call: bool,
    /// It names each Fetch, and then repeats it or gives it back.
    pub names: bool,
    /// It takes and settles messages on streams.
    pub streams: bool,
    /// Its leases live as long as its streams.
    pub keeps: bool,
    /// How often in a hundred it dies with a message.
    pub dies: u64,
}

impl ClientPlan {
    /// A client without a habit, which roams, never dies, and asks for at most `n` messages.
    pub fn ordinary(number: u64, consumer: usize, n: u32) -> Self {
        Self {
            number,
            consumer,
            habit: Habit::Ordinary,
            home: None,
            n,
            lease: None,
            linger: 0,
            max_bytes: 0,
            json: false,
            patient: false,
            sent: false,
            unary: false,
            one_call: false,
            names: false,
            streams: false,
            keeps: false,
            dies: 0,
        }
    }
}

/// When an accident happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    At(u64),
    /// So long after, or before, the first sign from this time on. `there`: at the replica of the sign.
    Near {
        sign: Sign,
        from: u64,
        millis: i64,
        there: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    pub when: When,
    pub what: Accident,
}

/// Something that happens to the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accident {
    /// Nothing moves on the wires of a replica for so long: to the servers, from them.
    Stall {
        replica: usize,
        up: bool,
        down: bool,
        millis: u64,
    },
    /// The wires break; each end notices after so long. Sent frames may still arrive.
    Cut {
        replica: usize,
        client: u64,
        server: u64,
        keep: bool,
    },
    /// A replica cannot reach NATS at all for so long.
    Part {
        replica: usize,
        millis: u64,
    },
    /// A client and a replica cannot reach each other for so long.
    PartClient {
        client: u64,
        replica: usize,
        millis: u64,
    },
    /// The one server starts again, is away for so long, and forgets the newest so much, unless it stops in order.
    Restart {
        away: u64,
        forgets: u64,
        memory: bool,
        graceful: bool,
    },
    /// Another server leads the consumer; there is none for so long.
    ChangeLeader {
        consumer: usize,
        away: u64,
        forgets: u64,
        graceful: bool,
    },
    Reset {
        consumer: usize,
    },
    MakeAgain {
        consumer: usize,
    },
    /// A consumer is deleted, and made again after so long, or never.
    Delete {
        consumer: usize,
        away: Option<u64>,
    },
    DeleteMessage {
        consumer: usize,
    },
    /// All messages of a stream are removed.
    Purge {
        stream: usize,
    },
    /// From now on, messages of this age leave the stream.
    Age {
        stream: usize,
        millis: u64,
    },
    Pause {
        consumer: usize,
        millis: u64,
    },
    AckWait {
        consumer: usize,
        millis: u64,
    },
    MaxAckPending {
        consumer: usize,
        most: u64,
    },
    MaxDeliver {
        consumer: usize,
        most: Option<u64>,
    },
    Kill {
        replica: usize,
        away: u64,
    },
    Drain {
        replica: usize,
        away: u64,
    },
    /// Each replica is drained in its turn, and starts again, with another first key or not.
    Roll {
        keys: bool,
        pause: u64,
    },
    /// Another key is put before the present one, and that is taken away later. Replicas read their key file one
    /// after the other.
    RotateKeys {
        pause: u64,
        keeps: u64,
    },
    /// The policy takes all rights at a consumer away, at one replica after the other, and gives them back after so
    /// long.
    Policy {
        consumer: usize,
        pause: u64,
        millis: u64,
    },
    /// The wall clock of a replica is set.
    Clock {
        replica: usize,
        ahead: i64,
    },
    /// A replica's process stands still for so long.
    Stop {
        replica: usize,
        millis: u64,
    },
    /// The one machine of all replicas is suspended. Their monotonic clocks do not tell, and the servers go on.
    Suspend {
        millis: u64,
    },
    /// A message that breaks the connections that bring it.
    Poison {
        stream: usize,
    },
    /// Something that happens to the NATS servers.
    Outage(Outage),
}

impl Accident {
    /// The replica, the consumer, and the stream that it happens to.
    pub fn victim(&mut self) -> Victim<'_> {
        match self {
            Self::Stall { replica, .. }
            | Self::Cut { replica, .. }
            | Self::Part { replica, .. }
            | Self::PartClient { replica, .. }
            | Self::Kill { replica, .. }
            | Self::Drain { replica, .. }
            | Self::Clock { replica, .. }
            | Self::Stop { replica, .. } => Victim::Replica(replica),
            Self::ChangeLeader { consumer, .. }
            | Self::Reset { consumer }
            | Self::MakeAgain { consumer }
            | Self::Delete { consumer, .. }
            | Self::DeleteMessage { consumer }
            | Self::Pause { consumer, .. }
            | Self::AckWait { consumer, .. }
            | Self::MaxAckPending { consumer, .. }
            | Self::MaxDeliver { consumer, .. }
            | Self::Policy { consumer, .. } => Victim::Consumer(consumer),
            Self::Purge { stream } | Self::Age { stream, .. } | Self::Poison { stream } => {
                Victim::Stream(stream)
            }
            Self::Suspend { .. }
            | Self::Restart { .. }
            | Self::Roll { .. }
            | Self::RotateKeys { .. } => Victim::World,
            Self::Outage(outage) => outage.victim(),
        }
    }

    /// Its numbers that count how much of it happens: less of them is a smaller accident.
    pub fn amounts(&mut self) -> Vec<&mut u64> {
        match self {
            Self::Stall { millis, .. }
            | Self::Part { millis, .. }
            | Self::PartClient { millis, .. }
            | Self::Pause { millis, .. }
            | Self::Stop { millis, .. }
            | Self::Suspend { millis, .. } => vec![millis],
            Self::Cut { client, server, .. } => vec![client, server],
            Self::Outage(outage) => outage.amounts(),
            Self::Restart { away, forgets, .. } | Self::ChangeLeader { away, forgets, .. } => {
                vec![away, forgets]
            }
            Self::Delete { away: Some(away), .. }
            | Self::Kill { away, .. }
            | Self::Drain { away, .. }
            | Self::Roll { pause: away, .. } => vec![away],
            Self::RotateKeys { pause, keeps } => vec![pause, keeps],
            Self::Policy { pause, millis, .. } => vec![pause, millis],
            Self::Reset { .. }
            | Self::MakeAgain { .. }
            | Self::Delete { .. }
            | Self::DeleteMessage { .. }
            | Self::Purge { .. }
            | Self::Age { .. }
            | Self::AckWait { .. }
            | Self::MaxAckPending { .. }
            | Self::MaxDeliver { .. }
            | Self::Clock { .. }
            | Self::Poison { .. } => Vec::new(),
        }
    }
}

/// Whom an accident happens to.
pub enum Victim<'a> {
    Replica(&'a mut usize),
    Consumer(&'a mut usize),
    Stream(&'a mut usize),
    World,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub seed: u64,
    /// How long accidents happen, and messages come.
    pub trouble: u64,
    pub clocks: Clocks,
    pub replicas: Vec<ReplicaPlan>,
    pub streams: Vec<StreamPlan>,
    pub consumers: Vec<ConsumerPlan>,
    pub clients: Vec<ClientPlan>,
    pub accidents: Vec<Planned>,
}

impl Plan {
    /// The plan of a seed, with the clients that the settings ask for.
    pub fn of(seed: u64) -> Self {
        let (attempts, streams) = (settings::has_attempts(), settings::has_streams());
        draw::draw(seed, draw::Kinds { attempts, streams, keep: settings::has_keep() })
    }

    /// The number of NATS servers: three, if a consumer has copies or may be at another server.
    pub fn servers(&self) -> usize {
        let one_of_three = |consumer: &ConsumerPlan| consumer.copies > 1 || consumer.clustered;
        if self.consumers.iter().any(one_of_three) { 3 } else { 1 }
    }

    pub fn trouble(&self) -> Time {
        Duration::from_millis(self.trouble)
    }
}

/// As Rust, a line for each part.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, trouble, clocks, .. } = self;
        writeln!(
            f,
            "Plan {{\n    seed: {seed},\n    trouble: {trouble},\n    clocks: {clocks:?},"
        )?;
        list(f, "replicas", &self.replicas)?;
        list(f, "streams", &self.streams)?;
        list(f, "consumers", &self.consumers)?;
        list(f, "clients", &self.clients)?;
        list(f, "accidents", &self.accidents)?;
        writeln!(f, "}}")
    }
}

fn list<T: Debug>(f: &mut fmt::Formatter<'_>, name: &str, parts: &[T]) -> fmt::Result {
    writeln!(f, "    {name}: vec![")?;
    for part in parts {
        writeln!(f, "        {},", format!("{part:?}").replace('[', "vec!["))?;
    }
    writeln!(f, "    ],")
}
