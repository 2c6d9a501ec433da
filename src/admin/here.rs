//! What this replica knows, as rows of an answer: about itself, its consumers, its leases and its connections. And
//! the leases that it takes away. Answers other replicas, too.
//!
//! An answer has at most [`MOST_BYTES`]. A walk over the leases holds the lock of the table for a bounded number of
//! leases at a time, and few walks run at once, so no caller is slowed down.

use std::{sync::Arc, time::Duration, time::Instant};

use prost::Message as _;
use tokio::{sync::Semaphore, task::yield_now, time::timeout_at};

use super::{filter::MeantLeases, page::MOST_ROWS};
use crate::{
    broker::{Broker, ConsumerInfo, Link},
    clock::{self, ClockPair},
    keys::Keys,
    lease::{LeaseId, LeaseStage},
    lessor::{ConsumerState, LeaseSeen, Lessor, ReleaseOutcome, TaskState},
    net::{ConnectionSeen, OpenConnections},
    pb::{
        self,
        peer::v1::{self as wire, AdminAnswer, admin_request::Question},
        time::{duration, timestamp},
    },
    token::{InstanceId, key_name},
};

/// Most bytes of the rows of an answer: well below the smallest payload limit of NATS in use.
const MOST_BYTES: usize = 46 * 1024;
/// Most bytes of the row of a lease: names, texts that were cut, and numbers.
const LARGEST_LEASE: usize = 2 * 1024;
/// Most bytes of the row of a connection: an identity that was cut, an address, and numbers.
const LARGEST_CONNECTION: usize = 512;
/// Steps of one walk. A longer walk is continued by the next question.
const MOST_STEPS: usize = 64;
/// Walks at once.
const MOST_WALKS: usize = 2;
/// Longest wait for the tasks of consumers.
const TASK_PATIENCE: Duration = Duration::from_millis(500);

/// What the app knows of this replica.
pub struct ReplicaFacts {
    /// Its identifier.
    pub instance: InstanceId,
    /// Its name for people.
    pub name: String,
    /// Its token keys.
    pub keys: Arc<Keys>,
    /// Why it should receive no calls. `None`: it should receive calls.
    pub why_not_ready: Box<dyn Fn() -> Option<String> + Send + Sync>,
    /// The policy that it obeys, by its digest. Empty: there is none.
    pub policy_digest: Box<dyn Fn() -> String + Send + Sync>,
}

/// The leases of one replica, by the time for which their callers have had them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeaseAges {
    /// Leases that no caller has: the proxy itself has them for the next caller.
    pub without_caller: u64,
    /// Leases by age: up to each of [`LeaseAges::BOUNDS`], and older.
    pub held: [u64; LeaseAges::BOUNDS.len() + 1],
}

impl LeaseAges {
    /// The bounds of the ages, in seconds.
    pub const BOUNDS: [u64; 4] = [10, 60, 600, 3600];

    fn count(&mut self, age: Option<Duration>) {
        let Some(age) = age else {
            self.without_caller += 1;
            return;
        };
        let bound = Self::BOUNDS.iter().position(|bound| age < Duration::from_secs(*bound));
        self.held[bound.unwrap_or(Self::BOUNDS.len())] += 1;
    }
}

/// See the [module](self).
pub(super) struct Here<B: Broker> {
    pub(super) lessor: Lessor<B>,
    pub(super) facts: ReplicaFacts,
    pub(super) connections: Arc<OpenConnections>,
    started: Duration,
    walks: Semaphore,
}

impl<B: Broker> Here<B> {
    pub(super) fn new(lessor: Lessor<B>, facts: ReplicaFacts) -> Self {
        let (connections, walks) = (Arc::default(), Semaphore::new(MOST_WALKS));
        Self { lessor, facts, connections, started: clock::unix_time(), walks }
    }

    /// The answer to a question of another replica. `None`: it is not answered.
    pub(super) async fn answer_peer(&self, question: &[u8], until: Instant) -> Option<Vec<u8>> {
        let question = wire::AdminRequest::decode(question).ok()?.question?;
        Some(self.answer(question, until).await?.encode_to_vec())
    }

    /// The answer to a question. `None`: there is no answer until `until`.
    pub(super) async fn answer(&self, question: Question, until: Instant) -> Option<AdminAnswer> {
        match question {
            Question::Replica(wire::DescribeReplica {}) => {
                Some(AdminAnswer { replica: Some(self.replica()), ..AdminAnswer::default() })
            }
            Question::Consumers(question) => Some(self.consumers(&question, until).await),
            Question::Leases(question) => {
                let walk = timeout_at(until.into(), self.walks.acquire()).await;
                let _walk = walk.ok()?.ok()?;
                self.leases(&question).await
            }
            Question::Connections(question) => Some(self.connections(&question)),
            Question::Take(question) => self.take(&question),
        }
    }

    /// The leases by age. `None`: other walks are not done until `until`.
    pub(super) async fn lease_ages(&self, until: Instant) -> Option<LeaseAges> {
        let walk = timeout_at(until.into(), self.walks.acquire()).await;
        let _walk = walk.ok()?.ok()?;
        let (mut ages, mut after) = (LeaseAges::default(), None);
        loop {
            let now = clock::now();
            after = self.lessor.look_at_leases(after, |seen| {
                ages.count(seen.since.map(|since| now.saturating_duration_since(since)));
                true
            });
            if after.is_none() {
                return Some(ages);
            }
            yield_now().await;
        }
    }

    fn instance(&self) -> String {
        self.facts.instance.to_string()
    }

    fn replica(&self) -> pb::Replica {
        let link = self.lessor.broker().link();
        let why_not_ready = (self.facts.why_not_ready)();
        let sealer = self.facts.keys.sealer();
        let sealing = sealer.ring().sealing_id();
        let others = sealer.ring().ids().into_iter().filter(|id| *id != sealing);
        pb::Replica {
            instance: self.instance(),
            name: self.facts.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            start_time: Some(timestamp(self.started)),
            ready: why_not_ready.is_none(),
            why_not_ready: why_not_ready.unwrap_or_default(),
            draining: self.lessor.is_draining(),
            leases: self.lessor.held() as u64,
            max_leases: self.lessor.max_leases() as u64,
            waiters: self.lessor.waiting() as u64,
            consumers: self.lessor.consumers() as u64,
            policy_digest: (self.facts.policy_digest)(),
            key_ids: [sealing].into_iter().chain(others).map(key_name).collect(),
            nats_server: link
                .server()
                .map(|server| {
                    // A server without a name of its own has its identifier for one.
                    let name = if server.name == server.id { "" } else { &*server.name };
                    format!("{} {} {name}", server.id, server.version).trim_end().to_owned()
                })
                .unwrap_or_default(),
            nats_up: matches!(link, Link::Up(_)),
            heard_ago: None,
        }
    }

    async fn consumers(&self, question: &wire::DescribeConsumers, until: Instant) -> AdminAnswer {
        let until = until.min(clock::now() + TASK_PATIENCE);
        let mut all = self.lessor.described_consumers(until).await;
        let after = (&*question.after_stream, &*question.after_consumer);
        all.retain(|state| {
            let (stream, consumer) = (&*state.name.stream, &*state.name.consumer);
            let meant = |wanted: &str, name: &str| wanted.is_empty() || wanted == name;
            meant(&question.stream, stream)
                && meant(&question.consumer, consumer)
                && (stream, consumer) > after
        });
        all.sort_by(|one, other| one.name.cmp(&other.name));
        let (limit, now) = (most(question.limit), clock::now());
        let (mut answer, mut size, count) = (AdminAnswer::default(), 0, all.len());
        for state in all.into_iter().take(limit) {
            let row = self.consumer(state, now);
            size += row.encoded_len() + 8;
            if size > MOST_BYTES && !answer.consumers.is_empty() {
                break;
            }
            answer.consumers.push(row);
        }
        answer.more = answer.consumers.len() < count;
        answer
    }

    fn consumer(&self, state: ConsumerState, now: Instant) -> pb::Consumer {
        let ConsumerState { name, leases, oldest, task } = state;
        let share = pb::ConsumerShare {
            replica: self.instance(),
            leases,
            oldest_lease: oldest.map(|since| duration(now.saturating_duration_since(since))),
            ..pb::ConsumerShare::default()
        };
        let row = pb::Consumer {
            stream: name.stream.as_ref().to_owned(),
            consumer: name.consumer.as_ref().to_owned(),
            ..pb::Consumer::default()
        };
        let Some(TaskState { waiters, wanted, pulled, parked, info, suspended }) = task else {
            return pb::Consumer { shares: vec![share], ..row };
        };
        let share = pb::ConsumerShare {
            waiters: waiters as u64,
            wanted: wanted as u64,
            pulled: pulled as u64,
            parked: parked as u64,
            ..share
        };
        let suspended = suspended.unwrap_or_default();
        let mut row = pb::Consumer { suspended, shares: vec![share], ..row };
        if let Some((at, info)) = info {
            show_info(&mut row, &info, now.saturating_duration_since(at));
        }
        row
    }

    /// Walks over the leases. `None`: the filter cannot be read.
    async fn leases(&self, question: &wire::DescribeLeases) -> Option<AdminAnswer> {
        let filter = MeantLeases::read(&question.filter.clone().unwrap_or_default()).ok()?;
        let (limit, instance) = (most(question.limit), self.instance());
        let (mut answer, mut size) = (AdminAnswer::default(), 0);
        let mut after = LeaseId::new(question.after);
        for _ in 0..MOST_STEPS {
            let clocks = ClockPair::read();
            let end = self.lessor.look_at_leases(after, |seen| {
                if filter.means(&seen, clocks.now) {
                    let row = lease(&seen, &instance, clocks);
                    size += row.encoded_len() + 8;
                    answer.leases.push(row);
                }
                answer.leases.len() < limit && size + LARGEST_LEASE <= MOST_BYTES
            });
            let Some(last) = end else { return Some(answer) };
            (after, answer.after) = (Some(last), last.get());
            if answer.leases.len() >= limit || size + LARGEST_LEASE > MOST_BYTES {
                break;
            }
            yield_now().await;
        }
        answer.more = true;
        Some(answer)
    }

    fn connections(&self, question: &wire::DescribeConnections) -> AdminAnswer {
        let (limit, clocks) = (most(question.limit), ClockPair::read());
        let limit = limit.min(MOST_BYTES / LARGEST_CONNECTION);
        let seen = self.connections.after(question.after, limit);
        let row = |seen: &ConnectionSeen| pb::Connection {
            replica: self.instance(),
            connection: seen.number,
            peer: seen.peer.to_string(),
            identity: seen.identity.as_deref().map(cut).unwrap_or_default(),
            since: Some(timestamp(clocks.unix_at(seen.since))),
            calls_open: seen.open_calls as u64,
            calls_total: seen.calls,
            tls_version: seen.tls.unwrap_or_default().to_owned(),
            not_after: seen.certificate_end.map(timestamp),
        };
        AdminAnswer {
            more: seen.len() == limit,
            after: seen.last().map_or(question.after, |seen| seen.number),
            connections: seen.iter().map(row).collect(),
            ..AdminAnswer::default()
        }
    }

    /// Takes leases away. `None`: the question cannot be read.
    fn take(&self, question: &wire::TakeLeases) -> Option<AdminAnswer> {
        let filter = MeantLeases::read(&question.filter.clone().unwrap_or_default()).ok()?;
        let leases = question.leases.iter().take(MOST_ROWS).map(|number| LeaseId::new(*number));
        let leases: Vec<LeaseId> = leases.collect::<Option<_>>()?;
        let (delay, now) = (Duration::from_micros(question.delay), clock::now());
        let meant = |seen: &LeaseSeen<'_>| seen.since.is_some() && filter.means(seen, now);
        let forced = question.force_last_attempts;
        let outcomes = self.lessor.release_leases(&leases, delay, forced, meant);
        let taken = |outcome: &ReleaseOutcome| {
            i32::from(match outcome {
                ReleaseOutcome::Released => wire::TakenLease::Released,
                ReleaseOutcome::LastAttempt => wire::TakenLease::LastAttempt,
                ReleaseOutcome::Settling => wire::TakenLease::Settling,
                ReleaseOutcome::Gone => wire::TakenLease::Gone,
            })
        };
        let taken = outcomes.iter().map(taken).collect();
        Some(AdminAnswer { taken, ..AdminAnswer::default() })
    }
}

/// Shows INFO of this age.
pub(super) fn show_info(row: &mut pb::Consumer, info: &ConsumerInfo, age: Duration) {
    row.pending = info.pending;
    row.ack_pending = info.ack_pending;
    row.waiting_pulls = info.waiting;
    row.redelivered = info.redelivered;
    row.paused = info.paused;
    row.max_ack_pending = info.max_ack_pending.unwrap_or_default();
    row.max_deliver = info.max_deliver.unwrap_or_default();
    row.ack_wait = Some(duration(info.ack_wait));
    row.info_age = Some(duration(age));
}

fn lease(seen: &LeaseSeen<'_>, instance: &str, clocks: ClockPair) -> pb::Lease {
    let age = |since: Instant| duration(clocks.now.saturating_duration_since(since));
    let caller = seen.caller;
    let state = match seen.stage {
        LeaseStage::Held => pb::LeaseState::Held,
        LeaseStage::Settling => pb::LeaseState::Settling,
        LeaseStage::Uncertain => pb::LeaseState::Uncertain,
    };
    pb::Lease {
        replica: instance.to_owned(),
        lease: seen.id.get(),
        stream: seen.name.stream.as_ref().to_owned(),
        consumer: seen.name.consumer.as_ref().to_owned(),
        stream_sequence: seen.sequence,
        delivery_count: seen.delivery_count,
        max_deliver: seen.max_deliver.unwrap_or_default(),
        state: state.into(),
        grant_time: seen.since.map(|since| timestamp(clocks.unix_at(since))),
        expire_time: seen.expires.map(|at| timestamp(clocks.unix_at(at))),
        age: seen.since.map(age),
        principal: seen.principal.unwrap_or_default().to_owned(),
        identity: caller.map(|caller| caller.identity.as_ref().to_owned()).unwrap_or_default(),
        worker: caller.map(|caller| caller.worker.as_ref().to_owned()).unwrap_or_default(),
        peer: caller
            .and_then(|caller| caller.peer)
            .map(|peer| peer.to_string())
            .unwrap_or_default(),
        last_attempt: seen.last_attempt,
    }
}

/// The first 256 bytes of an identity.
fn cut(identity: &str) -> String {
    identity[..identity.floor_char_boundary(256)].to_owned()
}

fn most(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(MOST_ROWS).clamp(1, MOST_ROWS)
}
