//! The replicas of one cluster, and how they reach each other over NATS: who is there, which keys
//! they share, and what is asked of the one that holds a lease.
//!
//! ```text
//!  _fetchproxy.<cluster>.beat               each replica, once a second, to all
//!  _fetchproxy.<cluster>.<name>.settle      to whoever answers for that name
//!  _fetchproxy.<cluster>.<replica>.handover to a replica that is to take leases over
//! ```
//! Owns the names that this replica answers for and the roster of the others. Every message is
//! sealed and bound to its subject, and an answer to its question, so the right to publish there
//! settles nothing. What is asked and answered is for `grpc` to say: here it is bytes.

mod handover;
mod names;
mod orphan;
mod roster;

use std::{
    collections::BTreeSet,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message as _;
use tokio::{
    sync::{RwLock, RwLockReadGuard},
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    handover::Prepared,
    names::Names,
    roster::{Roster, Said, Standing},
};
pub use self::{names::Whose, orphan::Orphan};
use crate::{
    broker::Broker,
    bus::{AskError, Bus, Heard, PREFIX},
    clock,
    keys::Keys,
    lease::LeaseId,
    lessor::Lessor,
    pb::peer::v1 as pb,
    seldom::Seldom,
    token::{InstanceId, KeyId},
};

const SETTLE: &str = "settle";
const HANDOVER: &str = "handover";
/// How often each replica is heard of.
const BEAT: Duration = Duration::from_secs(1);
/// An owner between two NATS servers has no subscription for a moment (seen in 12 of 20 such hops),
/// so nobody is asked again after these.
const AGAIN: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(300), Duration::from_millis(700)];
/// Until it has run for this long, a replica has not heard of all others.
const ACQUAINTED: Duration = Duration::from_secs(3);

/// This replica among the others.
pub struct Peers<B: Broker + Bus> {
    lessor: Lessor<B>,
    keys: Arc<Keys>,
    cluster: String,
    us: InstanceId,
    /// By the wall clock, in milliseconds since the Unix epoch, and by ours.
    started: (u64, Instant),
    /// Read while something is settled, written when names come or go.
    names: RwLock<Names>,
    /// The names that the others were told.
    told: Mutex<Vec<InstanceId>>,
    prepared: Mutex<Prepared>,
    roster: Mutex<Roster>,
    /// Whoever may publish to us can send what we cannot open.
    strangers: Seldom,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// The names as they are, for as long as this is held.
pub struct Still<'p>(RwLockReadGuard<'p, Names>);

impl Still<'_> {
    /// Where the lease of that owner and number is.
    pub fn whose(&self, owner: InstanceId, lease: LeaseId) -> Whose {
        self.0.whose(owner, lease)
    }

    /// Whether all that was ours is another replica's now.
    pub fn has_left(&self) -> bool {
        self.0.has_left()
    }
}

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
    /// A replica that answers for its own name. [`Peers::run`] makes it heard.
    pub fn new(lessor: Lessor<B>, keys: Arc<Keys>, cluster: &str, us: InstanceId) -> Arc<Self> {
        let unix = u64::try_from(clock::unix_time().as_millis()).unwrap_or(u64::MAX);
        Arc::new(Self {
            lessor,
            keys,
            cluster: cluster.to_owned(),
            us,
            started: (unix, clock::now()),
            names: RwLock::new(Names::new(us)),
            told: Mutex::new(vec![us]),
            prepared: Mutex::default(),
            roster: Mutex::default(),
            strangers: Seldom::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
    }

    /// Keeps the names as they are for as long as this is held: what is settled meanwhile is
    /// settled before they go to another replica. Waits while they do.
    pub async fn still(&self) -> Still<'_> {
        Still(self.names.read().await)
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
        let subject = self.subject(owner, SETTLE);
        let mut again = AGAIN.into_iter();
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
        match self.lessor.broker().ask(subject, frame.into(), until).await {
            Ok(answer) => {
                let opened = self.keys.sealer().open_frame(&answer_to(subject, nonce), &answer);
                opened.map_err(|_| Unanswered::Silent)
            }
            Err(AskError::Nobody) => Err(Unanswered::Nobody),
            Err(AskError::Unsent(_)) => Err(Unanswered::Unsent),
            Err(AskError::Silent) => Err(Unanswered::Silent),
        }
    }

    /// Says what we are once a second, hears what the others say, and lets `answer` answer what is
    /// asked of a name of ours, until [`Peers::close`]. What has no answer is not answered.
    pub async fn run<F>(self: Arc<Self>, answer: impl Fn(Vec<u8>) -> F)
    where
        F: Future<Output = Option<Vec<u8>>> + Send + 'static,
    {
        self.lessor.broker().listen(self.subjects(&[self.us]));
        let mut beat = interval(BEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = beat.tick() => self.beat().await,
                heard = self.lessor.broker().hear() => self.heard(heard, &answer),
                () = self.stop.cancelled() => return,
            }
        }
    }

    /// Hears and says nothing more; what is being answered is.
    pub async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Why this replica should not serve beside those that are there; the reason is for people.
    pub fn misfit(&self) -> Option<String> {
        let ours = (self.started.0, self.us);
        match self.roster().standing(ours, &self.key_ids(), clock::now()) {
            Standing::Fine => None,
            Standing::Stranger(_) if !self.keys.shared() => Some(
                "other replicas are there, and this one has no --token-key-file to share with them; \
                 one that is not of their kind needs a --cluster of its own"
                    .to_owned(),
            ),
            Standing::Stranger(other) => {
                Some(format!("this replica shares no token key with replica {other}"))
            }
        }
    }

    async fn beat(&self) {
        let (said, subject) = (self.said(), self.beat_subject());
        let Ok(nonce) = nonce() else { return };
        let instance = Bytes::copy_from_slice(&self.us.0);
        let keys: Vec<Bytes> = said.keys.iter().map(|key| Bytes::copy_from_slice(key)).collect();
        let body = pb::BeatBody {
            instance: instance.clone(),
            keys: keys.clone(),
            names: said.names.iter().map(|name| Bytes::copy_from_slice(&name.0)).collect(),
            version: said.version,
            room: said.room,
            draining: said.draining,
        };
        let body = self.keys.sealer().seal_frame(&subject, &body.encode_to_vec(), nonce).into();
        let beat = pb::Beat { instance, keys, started: said.started, body };
        let until = clock::now() + BEAT;
        self.lessor.broker().tell(&subject, beat.encode_to_vec().into(), until).await;
    }

    fn said(&self) -> Said {
        // While they come or go, which takes seconds at worst, what was told last is told again.
        if let Ok(mut names) = self.names.try_write() {
            names.prune(|lease| self.lessor.is_held(lease), clock::now());
            *self.told() = names.all();
        }
        Said {
            names: self.told().clone(),
            keys: self.key_ids(),
            started: self.started.0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            room: u64::from(self.lessor.room()),
            draining: self.lessor.is_draining(),
        }
    }

    fn told(&self) -> MutexGuard<'_, Vec<InstanceId>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key_ids(&self) -> BTreeSet<KeyId> {
        self.keys.sealer().ring().ids().into_iter().collect()
    }

    fn heard<F>(self: &Arc<Self>, heard: Heard, answer: &impl Fn(Vec<u8>) -> F)
    where
        F: Future<Output = Option<Vec<u8>>> + Send + 'static,
    {
        if heard.subject == self.beat_subject() {
            return self.heard_beat(&heard.message);
        }
        let Heard { subject, message, reply: Some(reply) } = heard else { return };
        let Ok(question) = self.keys.sealer().open_frame(&subject, &message) else {
            if self.strangers.may_say(clock::now()) {
                tracing::warn!(
                    subject,
                    "questions cannot be opened: whoever asks shares no token key with this replica"
                );
            }
            return;
        };
        // A frame that was opened has a nonce.
        let Some(asked) = message.get(5..29).and_then(|nonce| nonce.try_into().ok()) else {
            return;
        };
        let peers = self.clone();
        let answer: Answering = if subject.ends_with(HANDOVER) {
            let peers = self.clone();
            Box::pin(async move { peers.inherit(question).await })
        } else {
            Box::pin(answer(question))
        };
        self.tasks.spawn(async move {
            let (Some(answer), Ok(nonce)) = (answer.await, nonce()) else { return };
            let channel = answer_to(&subject, asked);
            let frame = peers.keys.sealer().seal_frame(&channel, &answer, nonce);
            let until = clock::now() + BEAT;
            peers.lessor.broker().tell(&reply, frame.into(), until).await;
        });
    }

    fn heard_beat(&self, message: &[u8]) {
        let Ok(beat) = pb::Beat::decode(message) else { return };
        let body = self.keys.sealer().open_frame(&self.beat_subject(), &beat.body).ok();
        let body = body.and_then(|body| pb::BeatBody::decode(&*body).ok());
        let Some((from, said)) = read(beat, body) else { return };
        if from == self.us {
            return;
        }
        let now = clock::now();
        let mut roster = self.roster();
        let version = said.version.clone();
        if roster.hear(from, said, now) {
            tracing::info!(replica = %from, version, "a replica is heard of");
        }
        let common = roster.common_keys(now);
        drop(roster);
        self.keys.common(common);
    }

    /// Somebody may answer for this name in a moment.
    fn may_be_there(&self, owner: InstanceId) -> bool {
        let now = clock::now();
        now.duration_since(self.started.1) < ACQUAINTED || self.roster().answers_for(owner, now)
    }

    fn roster(&self) -> MutexGuard<'_, Roster> {
        self.roster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn subject(&self, name: InstanceId, what: &str) -> String {
        format!("{PREFIX}{}.{name}.{what}", self.cluster)
    }

    /// What is listened on by a replica with these names.
    fn subjects(&self, names: &[InstanceId]) -> Vec<String> {
        let names = names.iter().map(|name| self.subject(*name, SETTLE));
        names.chain([self.beat_subject(), self.subject(self.us, HANDOVER)]).collect()
    }

    fn beat_subject(&self) -> String {
        format!("{PREFIX}{}.beat", self.cluster)
    }
}

/// An answer is sealed for its question alone.
fn answer_to(subject: &str, nonce: [u8; 24]) -> String {
    let nonce: String = nonce.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{subject} {nonce}")
}

fn nonce() -> Result<[u8; 24], Unanswered> {
    let mut nonce = [0; 24];
    getrandom::fill(&mut nonce).map_err(|_| Unanswered::Unsent)?;
    Ok(nonce)
}

/// What a beat says. A body that we cannot open is believed for nothing but that there is somebody.
fn read(beat: pb::Beat, body: Option<pb::BeatBody>) -> Option<(InstanceId, Said)> {
    let id = |bytes: &Bytes| Some(InstanceId(bytes.as_ref().try_into().ok()?));
    let key = |bytes: &Bytes| KeyId::try_from(bytes.as_ref()).ok();
    let from = id(&beat.instance)?;
    let body = body.filter(|body| body.instance == beat.instance);
    let keys = body.as_ref().map_or(&beat.keys, |body| &body.keys);
    let said = Said {
        keys: keys.iter().filter_map(key).collect(),
        started: beat.started,
        names: body.iter().flat_map(|body| &body.names).filter_map(id).collect(),
        room: body.as_ref().map_or(0, |body| body.room),
        draining: body.as_ref().is_none_or(|body| body.draining),
        version: body.map(|body| body.version).unwrap_or_default(),
    };
    Some((from, said))
}
