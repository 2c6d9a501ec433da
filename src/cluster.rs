//! The replicas of one cluster: they settle each other's tokens, hand over leases, and tell each other
//! what they see. Clients may go to any replica.
//!
//! ```text
//!              router ─────────▶ late, ownerless ─▶ lessor, JetStream
//!  cluster ──▶ receiver, sender ─▶ replica ─▶ channel ─▶ bus
//!              sighting             └ peers, ownership (with the pure rules)
//! ```
//! Owns the loop that sends heartbeats, and gives each incoming message to the file that answers it.
//! The right to publish on the subjects of the replicas does not allow anyone to settle a message: see
//! `channel`.

mod agreement;
mod attempts;
mod audited_tokens;
mod channel;
mod clocks;
mod compatibility;
mod handover;
mod heartbeat;
mod late;
mod members;
mod metered;
mod operators;
mod ownerless;
mod ownership;
mod peers;
mod replay;
mod replica;
mod router;
mod settle_spans;
mod sighting;
mod untold;
mod wire;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    sync::mpsc::UnboundedReceiver,
    time::{MissedTickBehavior, interval},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::{
    attempts::{AttemptElsewhere, NamedAttempt},
    channel::Unanswered,
    members::OtherReplica,
    operators::OperatorAnswers,
    ownership::{LeaseLocation, OwnershipGuard},
    router::TokenAction,
    wire::{OpenedToken, SettleOutcome, SettleResult, settle_result},
};
use self::{
    channel::{PeerRequest, Topic},
    handover::{Receiver, Sender},
    operators::OperatorDesk,
    replica::Replica,
    router::Router,
};
use crate::{
    access::Settler,
    audit::AuditedCall,
    broker::{Broker, Confirmation},
    bus::{Bus, Incoming},
    clock,
    keys::Keys,
    lessor::{Error, FetchCaller, Lessor, Settled, Telling},
    lock::lock,
    refusal_log::RefusalLog,
    simulated::spawn,
    token::InstanceId,
    traces::{TracedSpan, Traces},
};

/// How often each replica sends a heartbeat.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// The least time between a heartbeat and one that answers a new replica. Anyone who may publish here
/// can pose as a new replica as often as they like.
const MIN_HEARTBEAT_GAP: Duration = Duration::from_millis(100);
/// Requests that are worked on at once. Further requests get no answer, and their clients try again.
const MAX_CONCURRENT_REQUESTS: usize = 10_000;
/// A replica that has handed its leases over passes requests about them on for this long.
const FORWARDING_TIME: Duration = Duration::from_secs(1);

/// This replica as a member of its cluster.
pub struct Cluster<B: Broker + Bus> {
    replica: Arc<Replica<B>>,
    router: Router<B>,
    receiver: Receiver<B>,
    operators: OperatorDesk,
    /// The sightings of this replica. [`Cluster::run`] takes them.
    sightings: Mutex<Option<UnboundedReceiver<Telling>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
    traces: Traces,
}

impl<B: Broker + Bus> Cluster<B> {
    /// A replica of the cluster `cluster` that answers for its own name `us`. `name` tells people where
    /// it runs. [`Cluster::run`] makes it known to the others.
    pub fn new(
        lessor: Lessor<B>,
        keys: Arc<Keys>,
        refusals: Arc<RefusalLog>,
        cluster: &str,
        (us, name): (InstanceId, &str),
        traces: Traces,
    ) -> Arc<Self> {
        let sightings = Mutex::new(lessor.sightings());
        let replica = Arc::new(Replica::new(lessor, keys, cluster, (us, name)));
        metered::show(&replica);
        Arc::new(Self {
            router: Router::new(replica.clone(), refusals, traces.clone()),
            receiver: Receiver::new(replica.clone()),
            operators: OperatorDesk::default(),
            replica,
            sightings,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            traces,
        })
    }

    /// Sends heartbeats, and answers the other replicas, until [`Cluster::close`].
    pub async fn run(self: Arc<Self>) {
        self.replica.listen();
        let mut sightings = lock(&self.sightings).take();
        let mut ticks = interval(HEARTBEAT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut sent, mut send_at): (Option<Instant>, _) = (None, None);
        loop {
            // Other replicas can send without end, so their messages come last.
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                _ = ticks.tick() => {
                    let now = clock::now();
                    self.receiver.tidy(now);
                    self.replica.forget_old(now);
                    self.replica.peers.compare_policies(now);
                    send_at = Some(clock::now());
                }
                () = self.replica.peers.wants_heartbeat() => {
                    let now = clock::now();
                    send_at = Some(sent.map_or(now, |sent| now.max(sent + MIN_HEARTBEAT_GAP)));
                }
                () = clock::sleep_until(send_at) => {
                    self.replica.send_heartbeat().await;
                    (sent, send_at) = (Some(clock::now()), None);
                }
                Some(telling) = sighting::next(&mut sightings) => {
                    let replica = self.replica.clone();
                    spawn(&self.tasks, async move { sighting::tell_others(&replica, telling).await });
                }
                incoming = self.replica.channel.next() => self.incoming(incoming),
            }
        }
    }

    /// Ends [`Cluster::run`]. Answers that are under way are still sent. A replica that has handed its
    /// leases over continues to pass requests on first, until every NATS server knows that the
    /// receiver listens.
    pub async fn close(&self) {
        let handed_over_at = self.replica.ownership.lock().handed_over_at();
        if let Some(at) = handed_over_at {
            clock::sleep_until(Some(at + FORWARDING_TIME)).await;
        }
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Makes this replica known to the others, and waits until they have made themselves known.
    pub async fn announce(&self) {
        self.replica.announce().await;
    }

    /// The reason why this replica should not serve next to the others, for people.
    pub fn incompatibility(&self) -> Option<String> {
        self.replica.peers.incompatibility()
    }

    /// Takes note of whether this replica serves, and tells the others. To be called at least once a
    /// second.
    pub fn serves(&self, serving: bool) {
        self.replica.peers.serves(serving);
    }

    /// The policy that this replica obeys, by its digest, for the others. To be called when it changes.
    pub fn obeys(&self, policy: Option<[u8; 8]>) {
        self.replica.peers.obeys(policy);
    }

    /// Settles each token that `settler` may settle, at any replica: one result each, in order. `call` is
    /// for the log.
    pub async fn settle(
        &self,
        call: &AuditedCall<'_>,
        span: Option<&TracedSpan>,
        settler: &Settler,
        wanted: Vec<TokenAction>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<SettleResult> {
        self.router.settle(call, span, settler, wanted, confirmation, until).await
    }

    /// Asks the other replicas for an attempt of which nothing is known here, and lends its leases anew for `lease`
    /// from now. `None`: no replica has answered, by `until` at the latest.
    pub async fn find_attempt(
        &self,
        attempt: &NamedAttempt,
        lease: Option<Duration>,
        caller: &FetchCaller,
        until: Option<Instant>,
    ) -> Option<AttemptElsewhere> {
        attempts::find(&self.replica, attempt, lease, caller, until).await
    }

    /// Gives an attempt back at all replicas. Returns how many messages were given back, as far as is known.
    ///
    /// # Errors
    /// See [`Lessor::give_back_attempt`].
    pub async fn give_back(&self, attempt: NamedAttempt, until: Instant) -> Result<usize, Error> {
        let Replica { lessor, .. } = &*self.replica;
        match lessor.give_back_attempt(&attempt.name, attempt.key(), until).await? {
            None => attempts::give_back(&self.replica, &attempt).await,
            Some(count) => {
                // An earlier call of the attempt may have come to another replica.
                let replica = self.replica.clone();
                spawn(&self.tasks, async move {
                    let _ = attempts::give_back(&replica, &attempt).await;
                });
                Ok(count)
            }
        }
    }

    /// Hands all leases to a replica that stays. Tries each such replica until `until`. `true`: no lease
    /// is left here. `false`: no replica takes the leases, and they stay here.
    pub async fn hand_over(&self, until: Instant) -> bool {
        let _span = self.traces.hand_over();
        self.receiver.give_up();
        Sender::new(&self.replica, &self.tasks).hand_over(until).await
    }

    /// Keeps the leases of this replica here while the guard is held. For tests.
    #[doc(hidden)]
    pub async fn lock_ownership(&self) -> OwnershipGuard<'_> {
        self.replica.ownership.guard().await
    }

    /// Asks the replica that answers for `owner` to settle. For tests.
    ///
    /// # Errors
    /// See [`Unanswered`].
    #[doc(hidden)]
    pub async fn ask_to_settle(
        &self,
        owner: InstanceId,
        request: &[u8],
        until: Instant,
    ) -> Result<Vec<u8>, Unanswered> {
        self.replica.ask_to_settle(owner, request, until).await
    }

    /// Settles tokens without their owner. For tests.
    #[doc(hidden)]
    pub async fn settle_ownerless(
        &self,
        tokens: Vec<OpenedToken>,
        until: Instant,
    ) -> Vec<Option<Result<Settled, Error>>> {
        let Replica { lessor, peers, .. } = &*self.replica;
        ownerless::settle(lessor, peers, tokens, until).await
    }

    /// From now on `answers` answers the questions of operators that other replicas were asked. The first call
    /// counts. Until then no question is answered.
    pub fn answer_operators(&self, answers: OperatorAnswers) {
        self.operators.open(answers);
    }

    /// The other replicas that are there and share a token key with this one, in the order of their identifiers.
    pub fn others(&self) -> Vec<OtherReplica> {
        self.replica.peers.others()
    }

    /// Asks another replica a question of an operator, once.
    ///
    /// # Errors
    /// See [`Unanswered`].
    pub async fn ask_operators(
        &self,
        other: InstanceId,
        question: &[u8],
        until: Instant,
    ) -> Result<Vec<u8>, Unanswered> {
        operators::ask(&self.replica, other, question, until).await
    }

    fn incoming(self: &Arc<Self>, incoming: Incoming) {
        let Replica { channel, peers, .. } = &*self.replica;
        let heartbeats = channel.heartbeat_subject();
        if incoming.subject == heartbeats {
            if let Some((other, uptime)) = peers.heard(&heartbeats, &incoming.message) {
                let replica = self.replica.clone();
                let repeat = async move { sighting::repeat(&replica, other, uptime).await };
                spawn(&self.tasks, repeat);
            }
            return;
        }
        let Some(request) = channel.open(incoming) else { return };
        if self.tasks.len() >= MAX_CONCURRENT_REQUESTS {
            return;
        }
        let cluster = self.clone();
        spawn(&self.tasks, async move {
            let answer = cluster.answer(&request).await;
            if let Some(answer) = answer {
                cluster.replica.channel.answer(&request.reply_to, &answer).await;
            }
        });
    }

    /// The answer to a request. `None`: the request is not answered.
    async fn answer(
        &self,
        PeerRequest { topic, nonce, body, .. }: &PeerRequest,
    ) -> Option<Vec<u8>> {
        match topic {
            Topic::Settle => self.router.answer(*nonce, body).await,
            Topic::Handover => self.receiver.answer(body).await,
            Topic::Sighting => sighting::heard(&self.replica.lessor, body).await,
            Topic::Attempt => attempts::answer(&self.replica, body).await,
            Topic::Admin => self.operators.answer(body.clone()).await,
        }
    }
}
