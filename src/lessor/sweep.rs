//! The passing of time. Keeps long leases alive, releases lapsed leases, and drops leases whose message
//! JetStream may have given away. The table returns the leases that are due.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    core::{Core, release},
    metered,
    spec::ConsumerSpec,
    table::{HeldDelivery, LEASES_PER_LOCK},
};
use crate::{
    broker::{AckKind, AckPublish, Broker, Confirmation},
    clock,
    lease::{ConsumerId, Due, LeaseId},
    metrics::{LeaseEnd, ReleaseCause},
    simulated::spawn,
};

/// The longest wait for a confirmation of progress. The table decides when progress is tried again.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(2);

/// The leases that have ended unsettled, for each worker.
#[derive(Default)]
struct Ended(BTreeMap<(ConsumerId, Arc<str>), (Arc<ConsumerSpec>, u64)>);

impl Ended {
    fn count(&mut self, hold: &HeldDelivery) {
        // If the consumer is gone, the worker did not let the lease end.
        if let Some(caller) = hold.unsettled_by().filter(|_| !hold.spec.leadership.is_over()) {
            let of = (hold.spec.id, caller.worker.clone());
            let (_, count) = self.0.entry(of).or_insert_with(|| (hold.spec.clone(), 0));
            *count += 1;
        }
    }
}

/// The task that makes time pass for the leases of one core.
pub(super) struct Sweeper<B: Broker>(pub(super) Arc<Core<B>>);

impl<B: Broker> Sweeper<B> {
    /// Runs until the lessor is closed.
    pub(super) async fn run(self) {
        loop {
            let due = self.0.table.next_due();
            tokio::select! {
                biased;
                () = self.0.closed.cancelled() => return,
                () = clock::sleep_until(due) => {}
                () = self.0.table.sooner() => continue,
            }
            // The lessor holds the sender.
            let _ = self.0.frozen.subscribe().wait_for(|frozen| !frozen).await;
            while self.step() {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Handles at most [`LEASES_PER_LOCK`] leases that are due. `true`: more may be due.
    fn step(&self) -> bool {
        let now = clock::now();
        let mut progress: BTreeMap<ConsumerId, Vec<_>> = BTreeMap::new();
        let (mut released, mut lapsed, mut lost) = (Vec::new(), Vec::new(), Vec::new());
        let mut unsettled = Ended::default();
        let count = self.0.table.with(|table| {
            if *self.0.frozen.borrow() {
                return 0;
            }
            let due = table.sweep(now, LEASES_PER_LOCK);
            let count = due.len();
            for due in due {
                match due {
                    Due::Progress { id } => {
                        // A new leader would confirm the progress, and may have given the message away.
                        let sure =
                            table.payload(id).filter(|hold| !hold.spec.leadership.in_doubt());
                        // Late progress is harmless: it only makes the next ack wait longer.
                        if let Some(hold) = sure {
                            let publish = hold.ack_publish(AckKind::Progress, None);
                            progress.entry(hold.spec.id).or_default().push((id, publish));
                        }
                    }
                    Due::Lapsed { payload, release: Some(by), .. } => {
                        unsettled.count(&payload);
                        released.push((payload, by));
                    }
                    Due::Lapsed { payload, .. } => {
                        unsettled.count(&payload);
                        lapsed.push(payload);
                    }
                    Due::Lost { payload, .. } => {
                        unsettled.count(&payload);
                        lost.push(payload);
                    }
                }
            }
            count
        });
        tracing::debug!(
            progress = progress.values().map(Vec::len).sum::<usize>(),
            lapsed = released.len() + lapsed.len(),
            lost = lost.len(),
            "swept"
        );
        // Each consumer has its own call: a consumer without an answer must not delay the others.
        for (_, leases) in progress {
            self.progress(leases);
        }
        self.tell_unsettled(unsettled, now);
        let all_lapsed = released.iter().map(|(hold, _)| hold).chain(&lapsed);
        metered::ended(&self.0.metrics, LeaseEnd::Lapsed, all_lapsed, now);
        metered::ended(&self.0.metrics, LeaseEnd::Lost, &lost, now);
        release(&self.0, released, ReleaseCause::Lapsed, Duration::ZERO);
        count == LEASES_PER_LOCK
    }

    /// Logs the workers whose leases have ended unsettled.
    fn tell_unsettled(&self, Ended(workers): Ended, now: Instant) {
        let (unsettled, lines) = &self.0.unsettled;
        for ((_, worker), (spec, count)) in workers {
            let name = &spec.name;
            let said = unsettled.ended((name.clone(), worker.clone()), count, now);
            if let Some(count) = said.filter(|_| lines.allow(now)) {
                let (stream, consumer) = (&*name.stream, &*name.consumer);
                tracing::info!(
                    stream,
                    consumer,
                    worker = &*worker,
                    count,
                    "leases ended unsettled"
                );
            }
        }
    }

    /// Sends progress for these leases.
    fn progress(&self, leases: Vec<(LeaseId, AckPublish)>) {
        let core = self.0.clone();
        spawn(&self.0.tasks, async move {
            let sent_at = clock::now();
            let wanted = core.table.with(|table| {
                let mut leases = leases;
                // A Nak may have begun since the sweep.
                leases.retain(|(id, _)| table.may_progress(*id));
                leases
            });
            if wanted.is_empty() {
                return;
            }
            let (ids, publishes): (Vec<_>, Vec<_>) = wanted.into_iter().unzip();
            let until = sent_at + PROGRESS_TIMEOUT;
            let results = core.broker.settle(publishes, Confirmation::Confirmed, until).await;
            let now = clock::now();
            let meter = core.metrics.leases();
            results.iter().for_each(|result| meter.progressed(metered::progress(result)));
            core.table.with(|table| {
                for (id, result) in ids.into_iter().zip(results) {
                    if let Some(hold) = table.payload(id) {
                        hold.spec.ack_right.learn(&result);
                    }
                    table.progressed(id, sent_at, result.is_ok(), now);
                }
            });
        });
    }
}
