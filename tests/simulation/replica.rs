//! A replica: the real code from the service down, on a simulated machine.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fetch_proxy::{
    access::Policy,
    broker::{Broker as _, Link},
    clock,
    cluster::Cluster,
    credentials::Gatekeeper,
    grpc::Service,
    keys::Keys,
    lessor::{LeaseLimits, Lessor},
    metrics::Format,
    refusal_log::RefusalLog,
    simulated::SimulatedMachine,
    token::InstanceId,
    traces::Traces,
};
use testkit::scrape::{Books, Scrape};
use tokio::time::timeout;

use super::net::{Net, SimBroker};

pub const LONGEST_LEASE: Duration = Duration::from_secs(60);
const DRAIN: Duration = Duration::from_secs(20);

pub struct Replica {
    /// Its place in the plan, and which of all processes it is.
    pub place: usize,
    pub side: usize,
    pub machine: Arc<SimulatedMachine>,
    pub service: Arc<Service<SimBroker>>,
    pub lessor: Lessor<SimBroker>,
    pub cluster: Arc<Cluster<SimBroker>>,
    pub keys: Arc<Keys>,
    pub gatekeeper: Arc<Gatekeeper>,
    pub most: usize,
    /// Clients may be sent there.
    pub ready: AtomicBool,
    /// Its process is gone, or it has ended as it should.
    pub gone: AtomicBool,
}

impl Replica {
    pub fn start(
        net: &Net,
        machine: Arc<SimulatedMachine>,
        place: usize,
        us: InstanceId,
        keys: String,
        most: usize,
    ) -> Arc<Self> {
        let broker = SimBroker::join(net);
        let side = broker.side();
        let limits = LeaseLimits {
            max_leases: most,
            max_leases_per_consumer: usize::MAX,
            max_lease: LONGEST_LEASE,
            max_waiters: 50,
            max_pull_bytes: 16 << 20,
            settle_timeout: Duration::from_secs(5),
        };
        let replica = machine.sync(|| {
            let lessor = Lessor::start(broker, limits);
            let keys = Arc::new(Keys::of(Some("keys".into()), keys, "sim").unwrap());
            let name = format!("pod-{side}");
            let refusals = Arc::new(RefusalLog::new());
            let (members, log) = (keys.clone(), refusals.clone());
            let cluster =
                Cluster::new(lessor.clone(), members, log, "sim", (us, &name), Traces::default());
            let gatekeeper = Arc::new(Gatekeeper::open());
            let service = Service::new(
                lessor.clone(),
                cluster.clone(),
                keys.clone(),
                gatekeeper.clone(),
                refusals,
                us,
            );
            tokio::spawn(machine.run(cluster.clone().run()));
            let service = Arc::new(service);
            let (ready, gone) = (AtomicBool::new(false), AtomicBool::new(false));
            let machine = machine.clone();
            Arc::new(Self {
                place,
                side,
                machine,
                service,
                lessor,
                cluster,
                keys,
                gatekeeper,
                most,
                ready,
                gone,
            })
        });
        tokio::spawn(replica.machine.run(replica.clone().follow()));
        replica
    }

    /// The leases that it holds, none if its process is gone. The table reads the clocks of its machine.
    pub fn held(&self) -> usize {
        let gone = self.gone.load(Ordering::Relaxed);
        if gone { 0 } else { self.machine.sync(|| self.lessor.held()) }
    }

    /// The leases that began here, that ended and that are held, as its metrics tell them.
    ///
    /// # Errors
    /// The consumer whose books do not balance.
    pub fn books(&self) -> Result<Books, String> {
        let page = self.machine.sync(|| self.lessor.metrics().page(Format::Text, clock::now()));
        Scrape::read(&page).books()
    }

    /// As the app does it: meets the others once NATS is there, and then tells whether it serves.
    async fn follow(self: Arc<Self>) {
        let mut met = false;
        while !self.gone.load(Ordering::Relaxed) {
            let link = self.lessor.broker().link();
            let up = matches!(link, Link::Up(_));
            if up && !met {
                self.cluster.announce().await;
                met = true;
            }
            let serves =
                met && self.cluster.incompatibility().is_none() && !self.lessor.is_draining();
            self.ready.store(serves, Ordering::Relaxed);
            self.cluster.serves(serves && up);
            let rights = self.gatekeeper.rights();
            self.cluster.obeys(rights.policy().map(Policy::digest_bytes));
            // The end, or another verdict about the others, is noticed within half a second.
            let change = self.lessor.broker().link_change(&link);
            let _ = timeout(Duration::from_millis(500), change).await;
        }
    }

    /// The process is killed: nothing of it runs from now on.
    pub fn kill(&self, net: &Net) {
        self.gone.store(true, Ordering::Relaxed);
        self.ready.store(false, Ordering::Relaxed);
        self.machine.stop();
        net.accident(|network| network.kill(self.side));
    }

    /// Drains it as the app does. `handing_over` is called when its calls have ended.
    pub async fn drain(self: Arc<Self>, handing_over: impl FnOnce()) -> Drained {
        self.ready.store(false, Ordering::Relaxed);
        self.lessor.drain();
        let until = clock::now() + DRAIN;
        let calls_ended = timeout(DRAIN, self.lessor.drained()).await.is_ok();
        handing_over();
        let handed_over = self.cluster.hand_over(until).await;
        let left = until.saturating_duration_since(clock::now());
        let settled = timeout(left, self.lessor.settled()).await.is_ok();
        let tasks_ended = timeout(DRAIN, self.lessor.close()).await.is_ok()
            && timeout(DRAIN, self.cluster.close()).await.is_ok();
        self.gone.store(true, Ordering::Relaxed);
        self.lessor.broker().close(clock::now()).await;
        Drained { calls_ended, handed_over, settled, tasks_ended }
    }
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    pub calls_ended: bool,
    pub handed_over: bool,
    pub settled: bool,
    pub tasks_ended: bool,
}
