//! Replicas in one process, on a scripted broker. The bus between them loses, delays and repeats
//! messages as a test orders.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use bytes::Bytes;
use fetch_proxy::{
    admin::{Inspector, ReplicaFacts},
    broker::{
        AckPublish, AckSubject, Broker, BrokerError, Confirmation, ConnectionKind, ConsumerInfo,
        ConsumerName, Delivery, InfoError, JetStream, Link, Search,
    },
    bus::{Bus, Incoming, RequestError},
    clock,
    cluster::Cluster,
    keys::Keys,
    lease::LeaseId,
    lessor::{Codec, FetchCaller, FetchParams, Fetched, LeaseLimits, Lessor},
    pb::peer::v1::{HandoverRequest, handover_request::Step},
    refusal_log::RefusalLog,
    token::InstanceId,
    traces::Traces,
};
use prost::Message as _;
use testkit::fake_broker::{FakeBroker, FakeInbox, limits};
use tokio::sync::{mpsc, oneshot};

pub const PATIENCE: Duration = Duration::from_secs(10);

/// The fate of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Pass,
    /// It is never heard.
    Lost,
    /// It is heard this much later.
    Late(Duration),
    /// It is heard, and the answer is lost.
    Unanswered,
}

type Rule = Box<dyn FnMut(&Step) -> Fate + Send>;

/// The bus that all are on.
#[derive(Clone)]
pub struct Net(Arc<Mutex<State>>);

struct State {
    ears: BTreeMap<InstanceId, (Vec<String>, mpsc::UnboundedSender<Incoming>)>,
    waiting: HashMap<String, oneshot::Sender<Bytes>>,
    asked: u64,
    /// For the steps of hand-overs; everything else passes.
    rule: Rule,
    /// The same for announcements about consumers, by receiver.
    sightings: Box<dyn FnMut(&str) -> Fate + Send>,
    /// So many questions of operators pass, and later ones have this fate.
    admin: (u32, Fate),
    /// Heartbeats are lost, as those of a replica that is not connected yet.
    silent: bool,
    /// All questions of hand-overs that were asked.
    record: Vec<(String, Bytes)>,
    keys: Arc<Keys>,
}

impl Net {
    pub fn new(keys: &str) -> (Self, tempfile::NamedTempFile) {
        let file = super::pair::key_file(&[keys]);
        let keys = Arc::new(Keys::load(Some(file.path().to_owned()), "linked").unwrap());
        let state = State {
            ears: BTreeMap::new(),
            waiting: HashMap::new(),
            asked: 0,
            rule: Box::new(|_| Fate::Pass),
            sightings: Box::new(|_| Fate::Pass),
            admin: (0, Fate::Pass),
            silent: false,
            record: Vec::new(),
            keys,
        };
        (Self(Arc::new(Mutex::new(state))), file)
    }

    pub fn rule(&self, rule: impl FnMut(&Step) -> Fate + Send + 'static) {
        self.lock().rule = Box::new(rule);
    }

    /// The fate of an announcement about a consumer, by its subject.
    pub fn sightings(&self, fate: impl FnMut(&str) -> Fate + Send + 'static) {
        self.lock().sightings = Box::new(fate);
    }

    /// The fate of questions of operators.
    pub fn admin(&self, fate: Fate) {
        self.admin_after(0, fate);
    }

    /// The fate of questions of operators after so many.
    pub fn admin_after(&self, passes: u32, fate: Fate) {
        self.lock().admin = (passes, fate);
    }

    /// Whether heartbeats are lost from now on.
    pub fn silence(&self, silent: bool) {
        self.lock().silent = silent;
    }

    /// Says again, to whoever listens now, what was asked in hand-overs.
    pub fn repeat_all(&self) {
        let mut state = self.lock();
        for (subject, message) in state.record.clone() {
            state.deliver(&subject, &message, Some("nobody".into()));
        }
    }

    /// From now on only its bearer hears what is said on subjects with this name.
    pub fn deafen(&self, name: &InstanceId) {
        let mut state = self.lock();
        let of_name = format!(".{name}.");
        for (us, (subjects, _)) in &mut state.ears {
            if us != name {
                subjects.retain(|subject| !subject.contains(&of_name));
            }
        }
    }

    /// Everything on this subject from now on, for an outsider.
    pub fn overhear(&self, who: InstanceId, subject: &str) -> mpsc::UnboundedReceiver<Incoming> {
        let (into, heard) = mpsc::unbounded_channel();
        self.lock().ears.insert(who, (vec![subject.to_owned()], into));
        heard
    }

    pub fn say(&self, subject: &str, message: &Bytes) {
        self.lock().deliver(subject, message, None);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl State {
    fn step(&self, subject: &str, message: &Bytes) -> Option<Step> {
        let (_, question) = self.keys.sealer().open_frame(subject, message).ok()?;
        HandoverRequest::decode(&*question).ok()?.step.filter(|_| subject.ends_with("handover"))
    }

    fn listened(&self, subject: &str) -> bool {
        self.ears.values().any(|(subjects, _)| subjects.iter().any(|one| one == subject))
    }

    fn deliver(&mut self, subject: &str, message: &Bytes, reply: Option<String>) {
        for (subjects, into) in self.ears.values() {
            if subjects.iter().any(|one| one == subject) {
                let (subject, message, reply) =
                    (subject.to_owned(), message.clone(), reply.clone());
                let _ = into.send(Incoming { subject, message, reply });
            }
        }
    }
}

/// One replica's broker, and its place on the bus.
#[derive(Clone)]
pub struct Linked {
    broker: FakeBroker,
    net: Net,
    us: InstanceId,
    heard: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Incoming>>>,
}

impl Bus for Linked {
    async fn request(
        &self,
        subject: &str,
        question: Bytes,
        until: Instant,
    ) -> Result<Bytes, RequestError> {
        let (reply, fate, answer) = {
            let mut state = self.net.lock();
            if !state.listened(subject) {
                return Err(RequestError::Nobody);
            }
            let mut fate = Fate::Pass;
            if let Some(step) = state.step(subject, &question) {
                state.record.push((subject.to_owned(), question.clone()));
                fate = (state.rule)(&step);
            }
            if subject.ends_with("sighting") {
                fate = (state.sightings)(subject);
            }
            if subject.ends_with("admin") {
                let (passes, then) = &mut state.admin;
                match passes.checked_sub(1) {
                    Some(left) => *passes = left,
                    None => fate = *then,
                }
            }
            state.asked += 1;
            let (reply, (tell, answer)) = (format!("reply.{}", state.asked), oneshot::channel());
            if fate != Fate::Unanswered {
                state.waiting.insert(reply.clone(), tell);
            }
            (reply, fate, answer)
        };
        let (net, subject) = (self.net.clone(), subject.to_owned());
        match fate {
            Fate::Lost => {}
            Fate::Late(by) => {
                tokio::spawn(async move {
                    clock::sleep_until(Some(clock::now() + by)).await;
                    net.lock().deliver(&subject, &question, Some(reply));
                });
            }
            Fate::Pass | Fate::Unanswered => net.lock().deliver(&subject, &question, Some(reply)),
        }
        let answer = tokio::time::timeout_at(until.into(), async {
            // One that nobody will answer is waited for, too.
            match answer.await {
                Ok(answer) => answer,
                Err(_) => std::future::pending().await,
            }
        });
        answer.await.map_err(|_| RequestError::Silent)
    }

    async fn publish(&self, subject: &str, message: Bytes, _: Instant) {
        let mut state = self.net.lock();
        match state.waiting.remove(subject) {
            Some(waiting) => drop(waiting.send(message)),
            None if state.silent && subject.ends_with("beat") => {}
            None => state.deliver(subject, &message, None),
        }
    }

    fn subscribe(&self, subjects: Vec<String>) {
        let mut state = self.net.lock();
        if let Some((listened, _)) = state.ears.get_mut(&self.us) {
            *listened = subjects;
        }
    }

    async fn next(&self) -> Incoming {
        match self.heard.lock().await.recv().await {
            Some(heard) => heard,
            None => std::future::pending().await,
        }
    }
}

impl Broker for Linked {
    type Inbox = FakeInbox;

    fn link(&self) -> Link {
        self.broker.link()
    }

    async fn link_change(&self, seen: &Link) -> Link {
        self.broker.link_change(seen).await
    }

    fn jetstream(&self) -> JetStream {
        self.broker.jetstream()
    }

    async fn info(&self, name: &ConsumerName, until: Instant) -> Result<ConsumerInfo, InfoError> {
        self.broker.info(name, until).await
    }

    async fn open(
        &self,
        name: &ConsumerName,
        place: ConnectionKind,
    ) -> Result<FakeInbox, BrokerError> {
        self.broker.open(name, place).await
    }

    async fn unreadable(
        &self,
        name: &ConsumerName,
        from: u64,
        until: Instant,
    ) -> Result<Search, InfoError> {
        self.broker.unreadable(name, from, until).await
    }

    async fn read_again(
        &self,
        deliveries: &[AckSubject],
        until: Instant,
    ) -> Result<Vec<Option<Delivery>>, InfoError> {
        self.broker.read_again(deliveries, until).await
    }

    async fn settle(
        &self,
        orders: Vec<AckPublish>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<Result<(), BrokerError>> {
        self.broker.settle(orders, confirmation, until).await
    }

    fn delivery_of(ack: &AckSubject) -> Option<(ConsumerName, u64)> {
        FakeBroker::delivery_of(ack)
    }

    async fn close(&self, until: Instant) {
        self.broker.close(until).await;
    }
}

/// A replica.
pub struct Member {
    pub lessor: Lessor<Linked>,
    pub cluster: Arc<Cluster<Linked>>,
    pub keys: Arc<Keys>,
    pub us: InstanceId,
    /// What it answers to operators.
    pub inspector: Inspector<Linked>,
    most: usize,
    net: Net,
}

impl Member {
    pub async fn join(
        net: &Net,
        keys: &tempfile::NamedTempFile,
        broker: &FakeBroker,
        most: usize,
    ) -> Self {
        let member = Self::new(net, keys, broker, most);
        member.cluster.announce().await;
        member
    }

    /// A replica that has not met the others yet.
    pub fn new(
        net: &Net,
        keys: &tempfile::NamedTempFile,
        broker: &FakeBroker,
        most: usize,
    ) -> Self {
        let (us, (into, heard)) = (InstanceId::random().unwrap(), mpsc::unbounded_channel());
        net.lock().ears.insert(us, (Vec::new(), into));
        let heard = Arc::new(tokio::sync::Mutex::new(heard));
        let linked = Linked { broker: broker.clone(), net: net.clone(), us, heard };
        let limits = LeaseLimits { max_leases: most, settle_timeout: PATIENCE / 2, ..limits() };
        let lessor = Lessor::start(linked, limits);
        let keys = Arc::new(Keys::load(Some(keys.path().to_owned()), "linked").unwrap());
        let refusals = Arc::new(RefusalLog::new());
        let (name, member) = ("linked", (us, "pod"));
        let cluster =
            Cluster::new(lessor.clone(), keys.clone(), refusals, name, member, Traces::default());
        tokio::spawn(cluster.clone().run());
        let facts = ReplicaFacts {
            instance: us,
            name: "pod".to_owned(),
            keys: keys.clone(),
            why_not_ready: Box::new(|| None),
            policy_digest: Box::new(String::new),
        };
        let inspector = Inspector::new(lessor.clone(), cluster.clone(), facts);
        Self { lessor, cluster, keys, us, inspector, most, net: net.clone() }
    }

    /// Leases so many new messages.
    pub async fn leased(&self, broker: &FakeBroker, count: usize) -> Vec<LeaseId> {
        let fetched = self.fetched(broker, count).await;
        let leases: Vec<_> = fetched.messages().iter().map(|leased| leased.id).collect();
        fetched.delivered();
        assert_eq!(leases.len(), count);
        leases
    }

    /// Fetches so many new messages, and nobody has them yet.
    pub async fn fetched(&self, broker: &FakeBroker, count: usize) -> Fetched {
        self.fetched_by("", broker, count).await
    }

    /// The same by this worker, for an hour.
    pub async fn fetched_by(&self, worker: &str, broker: &FakeBroker, count: usize) -> Fetched {
        (0..count).for_each(|_| broker.publish("x"));
        let peer = Some(([192, 0, 2, 1], 4711).into());
        let caller = FetchCaller { worker: worker.into(), identity: "key:a".into(), peer };
        let hour = (!worker.is_empty()).then_some(Duration::from_secs(3600));
        let ask = FetchParams {
            name: broker.name(),
            n: u32::try_from(count).unwrap(),
            max_bytes: 4_000_000,
            max_wait: PATIENCE,
            linger: Duration::from_secs(1),
            lease: hour,
            principal: "anonymous".into(),
            caller: Arc::new(caller),
            codec: Codec::Raw,
            patience: None,
        };
        self.lessor.fetch(ask).await.unwrap()
    }

    /// The subject of its requests.
    pub fn subject(&self, what: &str) -> String {
        format!("_fetchproxy.linked.{}.{what}", self.us)
    }

    /// As the app does it.
    pub async fn leave(&self) -> bool {
        self.lessor.drain();
        self.lessor.drained().await;
        self.cluster.hand_over(clock::now() + PATIENCE).await
    }

    /// No lease is held, and no place is kept.
    pub fn is_empty(&self) -> bool {
        self.lessor.held() == 0 && self.lessor.room() as usize == self.most
    }

    /// It hears neither questions of operators nor those for attempts any more, as an older version.
    pub fn is_older(&self) {
        let mut state = self.net.lock();
        let (subjects, _) = state.ears.get_mut(&self.us).unwrap();
        subjects.retain(|subject| !subject.ends_with(".admin") && !subject.ends_with(".attempt"));
    }

    /// Nobody hears of it any more.
    pub async fn vanish(&self) {
        self.cluster.close().await;
        self.net.lock().ears.remove(&self.us);
    }
}
