//! What one replica has seen of a consumer that every other replica must know before the first one
//! hands out anything more of it. Owns the words and the way out; who is told, and how, is `peer`'s.
//!
//! JetStream knows a delivery by its stream sequence alone. When a consumer is made anew, or its
//! deliveries are counted anew, a lease that another replica granted before settles the delivery that
//! this replica has now. So this replica tells the others first, and waits until they have answered.

use std::{future::Future, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{Lessor, consumer::ConsumerCommand};
use crate::broker::{Broker, ConsumerName};

/// The longest wait for the others. A replica that answers later is logged by `peer`; it cannot have
/// lost its connection to NATS without noticing, and reads the consumer again when it has.
const SIGHTING_TIMEOUT: Duration = Duration::from_secs(1);

/// Something that was seen of a consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// The consumer.
    pub name: ConsumerName,
    /// When it was made, as JetStream writes it.
    pub created: Arc<str>,
    /// The highest consumer sequence that JetStream knew as delivered.
    pub delivered: u64,
    /// The delivery with consumer sequence 1 has arrived here.
    pub began: bool,
    /// Consumer sequences went down: every lease that was granted before is void.
    pub again: bool,
}

/// A sighting on its way to the other replicas.
#[derive(Debug)]
pub struct Telling {
    /// The sighting.
    pub sighting: Sighting,
    /// To be dropped, or sent to, once each of them has answered or is given up.
    pub told: oneshot::Sender<()>,
}

impl<B: Broker> Lessor<B> {
    /// The sightings that the other replicas are to be told from now on. Without a reader there are no
    /// other replicas. There is one reader: `None` for a second one.
    pub fn sightings(&self) -> Option<mpsc::UnboundedReceiver<Telling>> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.herald.set(sender).is_ok().then_some(receiver)
    }

    /// Tells the others, and waits for their answers for a second at most. `None`: there are no others.
    pub(super) fn tell_others(
        &self,
        sighting: Sighting,
    ) -> Option<impl Future<Output = ()> + use<B>> {
        let (told, waiting) = oneshot::channel();
        self.herald.get()?.send(Telling { sighting, told }).ok()?;
        Some(async move {
            // It was answered, it is too late, or nobody is left to tell: we go on.
            let _ = timeout(SIGHTING_TIMEOUT, waiting).await;
        })
    }

    /// Takes in what another replica has seen. When this returns, or after the wait of that replica,
    /// no lease that the sighting voids is settled here.
    pub async fn heard_of(&self, sighting: Sighting) {
        let name = sighting.name.clone();
        let (reply, answer) = oneshot::channel();
        if self.has_leased_of(&name) {
            self.tell(&name, ConsumerCommand::Heard(sighting, reply));
            // A feed that ends drops the answer, and has ended the leases that it doubted.
            let _ = timeout(SIGHTING_TIMEOUT, answer).await;
        }
    }
}
