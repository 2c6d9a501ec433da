//! The process in its metrics: its health, its runtime, its memory and files.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{
    clock,
    config::Admission,
    credentials::Gatekeeper,
    keys::Keys,
    metrics::{self, FamilyId, Metrics, RuntimeMeter, Sheet},
    ops::Health,
    readiness::Verdict,
    tls::ServerTls,
    token::key_name,
    traces::Traces,
};

/// The time from one look at the runtime to the next.
const LAG_INTERVAL: Duration = Duration::from_millis(100);

/// The state that only this room knows.
pub(super) struct Observed {
    draining: Arc<AtomicBool>,
}

impl Observed {
    /// Shows the process in `metrics` from now on.
    pub(super) fn show(
        metrics: &Metrics,
        (health, traces): (&Health, Traces),
        admission: Option<Admission>,
    ) -> Self {
        let draining = Arc::new(AtomicBool::new(false));
        let (verdict, drains) = (health.watch(), draining.clone());
        let runtime = Handle::current();
        metrics.ask(move |sheet| {
            let flag = |set| f64::from(u8::from(set));
            sheet.set_of(FamilyId::BuildInfo, [env!("CARGO_PKG_VERSION")], 1.0);
            sheet.set(FamilyId::Ready, flag(*verdict.borrow() == Verdict::Serving));
            sheet.set(FamilyId::Draining, flag(drains.load(Ordering::Relaxed)));
            sheet.set(FamilyId::Insecure, flag(admission == Some(Admission::Insecure)));
            sheet.set(FamilyId::SpansDropped, traces.dropped() as f64);
            show_runtime(&runtime, sheet);
            metrics::process(sheet);
        });
        Self { draining }
    }

    /// The drain begins.
    pub(super) fn draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }
}

/// Shows what identifies this replica and its callers, and for how long it is good.
pub(super) fn show_credentials(
    metrics: &Metrics,
    (keys, tls): (Arc<Keys>, Option<Arc<ServerTls>>),
    gatekeeper: Arc<Gatekeeper>,
) {
    metrics.ask(move |sheet| {
        let sealer = keys.sealer();
        let sealing = sealer.ring().sealing_id();
        for key in sealer.ring().ids() {
            let (name, seals) = (key_name(key), key == sealing);
            sheet.set_of(FamilyId::TokenKeys, [&name, if seals { "seals" } else { "opens" }], 1.0);
        }
        if let Some(ends) = tls.as_ref().and_then(|tls| tls.ends_at()) {
            sheet.set_of(FamilyId::CertificateEnd, ["server"], ends.as_secs_f64());
        }
        for (issuer, age) in gatekeeper.key_ages() {
            sheet.set_of(FamilyId::IssuerKeysAge, [&issuer], age.as_secs_f64());
        }
    });
}

/// The numbers of the runtime that are stable in tokio.
fn show_runtime(runtime: &Handle, sheet: &mut Sheet) {
    let metrics = runtime.metrics();
    let workers = metrics.num_workers();
    sheet.set(FamilyId::TokioWorkers, workers as f64);
    sheet.set(FamilyId::TokioTasks, metrics.num_alive_tasks() as f64);
    sheet.set(FamilyId::TokioQueue, metrics.global_queue_depth() as f64);
    for worker in 0..workers {
        let name = worker.to_string();
        let busy = metrics.worker_total_busy_duration(worker).as_secs_f64();
        sheet.set_of(FamilyId::TokioBusy, [&name], busy);
        sheet.set_of(FamilyId::TokioParks, [&name], metrics.worker_park_count(worker) as f64);
    }
}

/// Observes how late a timer is, until `stop`.
pub(super) async fn lag(meter: RuntimeMeter, stop: CancellationToken) {
    loop {
        let due = clock::now() + LAG_INTERVAL;
        tokio::select! {
            () = stop.cancelled() => return,
            () = clock::sleep_until(Some(due)) => meter.late(clock::now() - due),
        }
    }
}
