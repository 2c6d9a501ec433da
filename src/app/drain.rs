//! The drain: takes the service down in five steps, on SIGTERM, SIGINT or SIGHUP. Each step happens once,
//! in this order:
//!
//! 1. Health says NOT_SERVING. The service continues for the drain delay, until every load balancer has
//!    noticed.
//! 2. New Fetch calls are refused. Open Fetch calls return when their pull has ended.
//! 3. Leases are handed to a replica that stays. If there is none, settling continues until no lease is
//!    held.
//! 4. The listener accepts no more connections and sends GOAWAY on open connections. Running calls end.
//! 5. The lessor's tasks end, bytes on their way to NATS are flushed, and spans are sent.
//!
//! Steps 2 to 4 together take at most the drain timeout. Step 5 takes at most [`FINAL_STEP_TIMEOUT`] for
//! each of its parts.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::oneshot,
    task::JoinSet,
    time::{timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    broker::Broker,
    bus::Bus,
    clock,
    cluster::Cluster,
    credentials::Gatekeeper,
    grpc::ContractError,
    keys::Keys,
    lessor::Lessor,
    metrics::{FileMeter, Metrics},
    ops::Health,
    readiness::Verdict,
    tls::ServerTls,
    traces::Traces,
};

/// Longest time for each part of step 5: settlements that run, questions of other replicas, flushing to
/// NATS, spans, health checks.
const FINAL_STEP_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest time for handing leases over.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(10);

/// The tasks of the listeners.
pub(super) type Listeners = JoinSet<Result<(), ContractError>>;

/// Everything that ends with the service.
pub(super) struct Drain<'a, B: Broker + Bus> {
    pub(super) lessor: &'a Lessor<B>,
    pub(super) cluster: &'a Cluster<B>,
    pub(super) health: &'a Health,
    pub(super) background: Background,
    pub(super) nats_tasks: TaskTracker,
    pub(super) traces: &'a Traces,
    pub(super) listeners: Listeners,
    pub(super) stop_grpc: oneshot::Sender<Instant>,
    pub(super) stop_ops: oneshot::Sender<Instant>,
}

impl<B: Broker + Bus> Drain<'_, B> {
    /// Takes all steps. `delay` is the length of step 1; steps 2 to 4 end at `until`.
    pub(super) async fn run(mut self, delay: Duration, until: Instant) {
        tracing::info!(?delay, "draining");
        self.health.set(Verdict::NotServing("draining".to_owned()));
        tokio::time::sleep(delay).await;
        self.lessor.drain();
        if timeout_at(until.into(), self.lessor.drained()).await.is_err() {
            tracing::warn!("drain timeout: Fetch calls were still open");
        }
        let handed_over = self.cluster.hand_over(until.min(clock::now() + HANDOVER_TIMEOUT)).await;
        tracing::debug!(handed_over, "no more leases are granted");
        if timeout_at(until.into(), self.lessor.settled()).await.is_err() {
            let leases = self.lessor.held();
            tracing::warn!(
                leases,
                "drain timeout: leases were still held; their messages come back after their ack wait"
            );
        }
        // A listener that has ended already does not hear it.
        let _ = self.stop_grpc.send(until);
        // The listener for clients is the first to end: the other listener still runs.
        self.listeners.join_next().await;
        if timeout_at((until + FINAL_STEP_TIMEOUT).into(), self.lessor.close()).await.is_err() {
            tracing::warn!("drain timeout: settlements were still under way");
        }
        if timeout(FINAL_STEP_TIMEOUT, self.background.end(self.cluster)).await.is_err() {
            tracing::warn!("drain timeout: requests of other replicas were still open");
        }
        let nats_ends = async {
            self.lessor.broker().close(clock::now() + FINAL_STEP_TIMEOUT).await;
            self.nats_tasks.close();
            if timeout(FINAL_STEP_TIMEOUT, self.nats_tasks.wait()).await.is_err() {
                tracing::warn!("drain timeout: connections to NATS were still open");
            }
        };
        // Together, so that the end takes no longer than without traces.
        tokio::join!(nats_ends, self.traces.end(FINAL_STEP_TIMEOUT));
        // Health answers to the very end.
        let _ = self.stop_ops.send(clock::now() + FINAL_STEP_TIMEOUT);
        self.listeners.join_next().await;
    }
}

/// The tasks next to the listeners: the talk with other replicas, and the looks at files.
pub(super) struct Background {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Background {
    pub(super) fn start<B: Broker + Bus>(
        cluster: Arc<Cluster<B>>,
        keys: Arc<Keys>,
        gatekeeper: Arc<Gatekeeper>,
        tls: Option<Arc<ServerTls>>,
        metrics: &Metrics,
    ) -> Self {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        tasks.spawn(cluster.run());
        // A file that is not there has no series.
        let meter = |used: bool, name| if used { metrics.file(name) } else { FileMeter::default() };
        let (stopped, file) = (stop.clone(), meter(keys.shared(), "token_keys"));
        tasks.spawn(async move { keys.follow(stopped, file).await });
        if let Some(tls) = tls {
            let (stopped, file) = (stop.clone(), metrics.file("tls"));
            tasks.spawn(async move { tls.follow(stopped, file).await });
        }
        let has_policy = gatekeeper.rights().policy().is_some();
        let (stopped, file) = (stop.clone(), meter(has_policy, "policy"));
        tasks.spawn(async move { gatekeeper.follow(stopped, file).await });
        Self { tasks, stop }
    }

    /// Runs one more task, which ends soon after the token.
    pub(super) fn spawn<F>(&self, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tasks.spawn(task);
    }

    /// Tells the tasks to end.
    pub(super) fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }

    async fn end<B: Broker + Bus>(self, cluster: &Cluster<B>) {
        self.stop.cancel();
        cluster.close().await;
        self.tasks.close();
        self.tasks.wait().await;
    }
}
