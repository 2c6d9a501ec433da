//! Sightings: changes of a consumer that every other replica must know before this replica hands out
//! more of its messages. Owns the types and the channel to `cluster`, which sends them.
//!
//! JetStream knows a delivery by its stream sequence alone. If a consumer is created again, or its
//! deliveries are counted from 1 again, an older lease of another replica would settle the delivery that
//! this replica has now. So this replica tells the others first, and waits for their answers.

use std::{future::Future, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{Lessor, consumer::ConsumerCommand};
use crate::broker::{Broker, ConsumerName};

/// The longest wait for the others. `cluster` logs a replica that answers later. Such a replica notices if
/// it has lost its connection to NATS, and then reads the consumer again.
const SIGHTING_TIMEOUT: Duration = Duration::from_secs(1);

/// A change of a consumer that was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// The consumer.
    pub name: ConsumerName,
    /// The creation time of the consumer, as JetStream writes it.
    pub created: Arc<str>,
    /// The highest consumer sequence that JetStream knew as delivered.
    pub delivered: u64,
    /// Whether the delivery with consumer sequence 1 has arrived here.
    pub began: bool,
    /// Whether consumer sequences went down, so that every earlier lease is void.
    pub again: bool,
}

/// A sighting on its way to the other replicas.
#[derive(Debug)]
pub struct Telling {
    /// The sighting.
    pub sighting: Sighting,
    /// The sender drops it, or sends to it, once each replica has answered or is given up.
    pub told: oneshot::Sender<()>,
}

impl<B: Broker> Lessor<B> {
    /// The sightings that the other replicas must learn from now on. Without a reader there are no other
    /// replicas. There is one reader: a second one gets `None`.
    pub fn sightings(&self) -> Option<mpsc::UnboundedReceiver<Telling>> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.herald.set(sender).is_ok().then_some(receiver)
    }

    /// Tells the other replicas, and waits for their answers for at most a second. `None`: there are no
    /// others.
    pub(super) fn tell_others(
        &self,
        sighting: Sighting,
    ) -> Option<impl Future<Output = ()> + use<B>> {
        let (told, waiting) = oneshot::channel();
        self.herald.get()?.send(Telling { sighting, told }).ok()?;
        Some(async move {
            // The others have answered, or the time is over, or nobody is left. We continue in any case.
            let _ = timeout(SIGHTING_TIMEOUT, waiting).await;
        })
    }

    /// Takes in a sighting of another replica. After this, or after the wait of that replica, no lease
    /// that the sighting voids is settled here.
    pub async fn heard_of(&self, sighting: Sighting) {
        let name = sighting.name.clone();
        let (reply, answer) = oneshot::channel();
        if self.has_leased_of(&name) {
            self.tell(&name, ConsumerCommand::Heard(sighting, reply));
            // A consumer task that ends drops the answer, and has ended the leases that it doubted.
            let _ = timeout(SIGHTING_TIMEOUT, answer).await;
        }
    }
}
