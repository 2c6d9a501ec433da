//! What was sent and is not waited for must not arrive after the delivery that it is meant for is
//! over: it would settle the next worker's. So somebody looks whether it has arrived, and gives the
//! connection up if that cannot be seen in time; what it still holds goes with it.
//!
//! NATS reads a connection in order, so an answer to any question says that all that was sent
//! before has arrived. One question is enough for all that was sent in a moment.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::Lessor;
use crate::{
    broker::{Broker, ConsumerName, InfoError},
    clock,
};

/// How long to gather what one question is to stand for.
const MOMENT: Duration = Duration::from_millis(10);
/// Spaces two questions, where the first was refused at once.
const AGAIN: Duration = Duration::from_millis(250);
/// The least time for an answer: as much as JetStream's own end is later than a lease's, at least.
const LEAST: Duration = Duration::from_millis(50);

/// What was sent since the last question: whose it is, and by when it must have arrived.
#[derive(Default)]
pub(super) struct Lingering(Mutex<Option<(ConsumerName, Instant)>>);

impl Lingering {
    fn lock(&self) -> MutexGuard<'_, Option<(ConsumerName, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Broker> Lessor<B> {
    /// Something was sent for this consumer that must have arrived by then, or never arrive.
    pub(crate) fn must_arrive(&self, name: &ConsumerName, by: Instant) {
        let mut lingering = self.lingering.lock();
        if let Some((_, first)) = &mut *lingering {
            *first = by.min(*first);
            return;
        }
        *lingering = Some((name.clone(), by));
        drop(lingering);
        self.tasks.spawn(self.clone().see_it_arrive());
    }

    async fn see_it_arrive(self) {
        clock::sleep_until(Some(clock::now() + MOMENT)).await;
        let Some((name, by)) = self.lingering.lock().take() else { return };
        let by = by.max(clock::now() + LEAST);
        tokio::select! {
            biased;
            () = self.answered(&name, by) => {}
            // The connection ends with us.
            () = self.closed.cancelled() => {}
            () = clock::sleep_until(Some(by)) => self.broker.abandon_settling(),
        }
    }

    /// Any answer is one, also that there is no such consumer.
    async fn answered(&self, name: &ConsumerName, by: Instant) {
        while let Err(InfoError::Unavailable(_)) = self.broker.info(name, by).await {
            clock::sleep_until(Some(clock::now() + AGAIN)).await;
        }
    }
}
