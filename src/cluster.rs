//! The replicas of one cluster, and how they reach each other over NATS: who is there, which keys
//! they share, and what is asked of the one that holds a lease.
//!
//! ```text
//!  _fetchproxy.<cluster>.beat               each replica, once a second, to all
//!  _fetchproxy.<cluster>.<name>.settle      to whoever answers for that name
//!  _fetchproxy.<cluster>.<replica>.handover to a replica that is to take leases over
//!  _fetchproxy.<cluster>.<replica>.sighting to a replica that may hold leases of what is no more
//! ```
//! Owns the names that this replica answers for and the roster of the others. Every message is
//! sealed and bound to its subject, and an answer to its question, so the right to publish there
//! settles nothing. What is asked and answered is for `grpc` to say: here it is bytes.

mod clocks;
mod compatibility;
mod handover;
mod heartbeat;
mod late;
mod members;
mod ownerless;
mod ownership;
mod readiness;
mod replay;
mod sighting;
mod skew;

use std::{
    collections::BTreeSet,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, atomic::AtomicU64},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, RwLock, mpsc::UnboundedReceiver},
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    clocks::PeerClocks,
    compatibility::ServiceHistory,
    handover::Prepared,
    members::Members,
    ownership::Ownership,
    replay::Recent,
    sighting::{SIGHTING, next},
};
pub use self::{
    ownerless::OwnerlessToken,
    ownership::{LeaseLocation, OwnershipGuard},
};
use crate::{
    broker::Broker,
    bus::{Bus, Incoming, RequestError, SUBJECT_PREFIX},
    clock,
    keys::Keys,
    lessor::{Lessor, Telling},
    lock::lock,
    log_throttle::LogThrottle,
    token::{InstanceId, KeyId},
};

const SETTLE_SUBJECT: &str = "settle";
const HANDOVER_SUBJECT: &str = "handover";
/// How often each replica is heard of.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// An owner between two NATS servers has no subscription for a moment (seen in 12 of 20 such hops),
/// so nobody is asked again after these.
const NOBODY_RETRIES: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(300), Duration::from_millis(700)];
/// Questions that are looked into at once; more are not answered, and asked again by their clients.
const MAX_CONCURRENT_REQUESTS: usize = 10_000;
/// A replica that has handed its leases over passes on for this long what it still hears of them.
const FORWARDING_TIME: Duration = Duration::from_secs(1);
/// From a beat to the answer to somebody new, at least: whoever may publish here can be somebody new
/// as often as they like.
const MIN_HEARTBEAT_GAP: Duration = Duration::from_millis(100);
/// Strangers are warned of once in this time, however long they stay.
const INCOMPATIBLE_WARNING_INTERVAL: Duration = Duration::from_secs(600);
/// Until it has run for this long, a replica has not heard of all others.
const DISCOVERY_TIME: Duration = Duration::from_secs(3);

/// This replica among the others.
pub struct Peers<B: Broker + Bus> {
    lessor: Lessor<B>,
    keys: Arc<Keys>,
    cluster: String,
    us: InstanceId,
    /// For people: where we run.
    name: String,
    /// By the wall clock, in milliseconds since the Unix epoch, and by ours.
    started: (u64, Instant),
    names: Mutex<Ownership>,
    /// Read while something is settled, written while our leases are handed over.
    gate: RwLock<()>,
    prepared: Mutex<Prepared>,
    /// What the others are to be told of consumers; taken by who runs.
    sightings: Mutex<Option<UnboundedReceiver<Telling>>>,
    members: Mutex<Members>,
    service: Mutex<ServiceHistory>,
    clocks: Mutex<PeerClocks>,
    /// The uptime in our last beat.
    beaten: AtomicU64,
    recent: Mutex<Recent>,
    /// There is news for the others, sooner than the next beat.
    speak: Notify,
    /// Whoever may publish to us can send what we cannot open.
    unopened: LogThrottle,
    strangers: LogThrottle,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// Names a question; each has one of its own.
pub type Nonce = [u8; 24];

type Answering = Pin<Box<dyn Future<Output = Option<Vec<u8>>> + Send>>;

/// Why the one that holds a lease said nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unanswered {
    /// Nobody answers for that name: nothing was heard, and nothing will be.
    Nobody,
    /// NATS is away: the question never left us.
    Unsent,
    /// It may have been heard.
    Silent,
}

impl<B: Broker + Bus> Peers<B> {
    /// A replica that answers for its own id; `name` tells people which one that is. [`Peers::run`]
    /// makes it heard.
    pub fn new(
        lessor: Lessor<B>,
        keys: Arc<Keys>,
        cluster: &str,
        (us, name): (InstanceId, &str),
    ) -> Arc<Self> {
        let unix = u64::try_from(clock::unix_time().as_millis()).unwrap_or(u64::MAX);
        Arc::new(Self {
            sightings: Mutex::new(lessor.sightings()),
            lessor,
            keys,
            cluster: cluster.to_owned(),
            us,
            name: name.to_owned(),
            started: (unix, clock::now()),
            names: Mutex::new(Ownership::new(us)),
            gate: RwLock::new(()),
            prepared: Mutex::default(),
            members: Mutex::default(),
            service: Mutex::default(),
            clocks: Mutex::default(),
            beaten: AtomicU64::new(0),
            recent: Mutex::default(),
            speak: Notify::new(),
            unopened: LogThrottle::default(),
            strangers: LogThrottle::every(INCOMPATIBLE_WARNING_INTERVAL),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
    }

    /// Keeps our leases here for as long as this is held: what is settled meanwhile is settled
    /// before they go to another replica. Waits while they do.
    pub async fn lock_ownership(&self) -> OwnershipGuard<'_> {
        OwnershipGuard::new(&self.names, self.gate.read().await)
    }

    /// Asks whoever answers for `owner`.
    ///
    /// # Errors
    /// See [`Unanswered`].
    pub async fn ask(
        &self,
        owner: InstanceId,
        question: &[u8],
        until: Instant,
    ) -> Result<Vec<u8>, Unanswered> {
        let subject = self.subject(owner, SETTLE_SUBJECT);
        let mut again = NOBODY_RETRIES.into_iter();
        loop {
            match self.ask_once(&subject, question, until).await {
                Err(Unanswered::Nobody) => {}
                answer => return answer,
            }
            match again.next() {
                Some(wait) if clock::now() + wait < until && self.may_be_there(owner) => {
                    sleep(wait).await;
                }
                Some(_) | None => return Err(Unanswered::Nobody),
            }
        }
    }

    async fn ask_once(
        &self,
        subject: &str,
        question: &[u8],
        until: Instant,
    ) -> Result<Vec<u8>, Unanswered> {
        let nonce = nonce()?;
        let frame = self.keys.sealer().seal_frame(subject, question, nonce);
        match self.lessor.broker().request(subject, frame.into(), until).await {
            Ok(answer) => {
                let opened = self.keys.sealer().open_frame(&answer_to(subject, nonce), &answer);
                opened.map_err(|_| Unanswered::Silent)
            }
            Err(RequestError::Nobody) => Err(Unanswered::Nobody),
            Err(RequestError::Unsent(_)) => Err(Unanswered::Unsent),
            Err(RequestError::Silent) => Err(Unanswered::Silent),
        }
    }

    /// Says what we are once a second, hears what the others say, and lets `answer` answer what is
    /// asked of a name of ours, until [`Peers::close`]. What has no answer is not answered.
    pub async fn run<F>(self: Arc<Self>, answer: impl Fn(Nonce, Vec<u8>) -> F)
    where
        F: Future<Output = Option<Vec<u8>>> + Send + 'static,
    {
        self.listen();
        let mut sightings = lock(&self.sightings).take();
        let mut beat = interval(HEARTBEAT_INTERVAL);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut spoke, mut speak_at) = (None, None);
        loop {
            tokio::select! {
                _ = beat.tick() => {
                    self.tidy();
                    speak_at = Some(clock::now());
                }
                () = self.speak.notified() => {
                    let now = clock::now();
                    speak_at = spoke.map_or(Some(now), |spoke: Instant| Some(now.max(spoke + MIN_HEARTBEAT_GAP)));
                }
                () = clock::sleep_until(speak_at) => {
                    self.beat().await;
                    (spoke, speak_at) = (Some(clock::now()), None);
                }
                heard = self.lessor.broker().next() => self.heard(heard, &answer),
                Some(telling) = next(&mut sightings) => {
                    drop(self.tasks.spawn(self.clone().pass_on(telling)));
                }
                () = self.stop.cancelled() => return,
            }
        }
    }

    /// Hears and says nothing more; what is being answered is. A replica that has handed its leases
    /// over hears on until NATS has told every server that its heir does.
    pub async fn close(&self) {
        let left = self.names().left();
        if let Some((_, left)) = left {
            clock::sleep_until(Some(left + FORWARDING_TIME)).await;
        }
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Lets go of what has had its time.
    fn tidy(&self) {
        let now = clock::now();
        self.prepared().tidy(now);
        self.tell_of_the_lost(now);
        self.keys.common(self.members().common_keys(&self.key_ids(), now));
        let mut names = self.names();
        for (_, leases) in names.inherited() {
            if !leases.adopted().any(|(_, here)| self.lessor.is_held(here)) {
                self.lessor.record_ends(leases);
            }
        }
        let pruned = names.prune(now);
        drop(names);
        if pruned {
            self.listen();
        }
    }

    fn names(&self) -> MutexGuard<'_, Ownership> {
        lock(&self.names)
    }

    fn key_ids(&self) -> BTreeSet<KeyId> {
        self.keys.sealer().ring().ids().into_iter().collect()
    }

    fn heard<F>(self: &Arc<Self>, heard: Incoming, answer: &impl Fn(Nonce, Vec<u8>) -> F)
    where
        F: Future<Output = Option<Vec<u8>>> + Send + 'static,
    {
        if heard.subject == self.beat_subject() {
            return self.heard_beat(&heard.message);
        }
        let Incoming { subject, message, reply: Some(reply) } = heard else { return };
        let Ok(question) = self.keys.sealer().open_frame(&subject, &message) else {
            if self.unopened.allow(clock::now()) {
                tracing::warn!(
                    subject,
                    "requests cannot be opened: their sender shares no token key with this replica"
                );
            }
            return;
        };
        // A frame that was opened has a nonce.
        let Some(asked) = message.get(5..29).and_then(|nonce| nonce.try_into().ok()) else {
            return;
        };
        if !self.is_new(asked) || self.tasks.len() >= MAX_CONCURRENT_REQUESTS {
            return;
        }
        let peers = self.clone();
        let answer: Answering = if subject.ends_with(HANDOVER_SUBJECT) {
            let peers = self.clone();
            Box::pin(async move { peers.inherit(question).await })
        } else if subject.ends_with(SIGHTING) {
            let peers = self.clone();
            Box::pin(async move { peers.sighted(question).await })
        } else {
            Box::pin(answer(asked, question))
        };
        self.tasks.spawn(async move {
            let (Some(answer), Ok(nonce)) = (answer.await, nonce()) else { return };
            let channel = answer_to(&subject, asked);
            let frame = peers.keys.sealer().seal_frame(&channel, &answer, nonce);
            let until = clock::now() + HEARTBEAT_INTERVAL;
            peers.lessor.broker().publish(&reply, frame.into(), until).await;
        });
    }

    /// Whether this question was not heard before: a replica that has left passes on what the heir
    /// may have heard itself, and where one connection follows another everything comes twice.
    pub fn is_new(&self, question: Nonce) -> bool {
        lock(&self.recent).is_new(question)
    }

    /// Somebody may answer for this name in a moment.
    fn may_be_there(&self, owner: InstanceId) -> bool {
        let now = clock::now();
        now.duration_since(self.started.1) < DISCOVERY_TIME
            || self.members().answers_for(owner, now)
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        lock(&self.members)
    }

    fn subject(&self, name: InstanceId, what: &str) -> String {
        format!("{SUBJECT_PREFIX}{}.{name}.{what}", self.cluster)
    }

    fn listen(&self) {
        let names = self.names().heard();
        let asked = names.into_iter().map(|name| self.subject(name, SETTLE_SUBJECT));
        let of_us = [HANDOVER_SUBJECT, SIGHTING].map(|what| self.subject(self.us, what));
        let all = std::iter::once(self.beat_subject()).chain(of_us);
        self.lessor.broker().subscribe(asked.chain(all).collect());
    }
}

/// An answer is sealed for its question alone.
fn answer_to(subject: &str, nonce: Nonce) -> String {
    let nonce: String = nonce.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{subject} {nonce}")
}

fn nonce() -> Result<Nonce, Unanswered> {
    let mut nonce = [0; 24];
    getrandom::fill(&mut nonce).map_err(|_| Unanswered::Unsent)?;
    Ok(nonce)
}
