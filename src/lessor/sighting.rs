//! Sightings: changes of a consumer that every other replica must know before this replica hands out
//! more of its messages. Owns the types and the channel to `cluster`, which sends them.
//!
//! JetStream knows a delivery by its stream sequence alone. If a consumer is created again, or its
//! deliveries are counted from 1 again, an older lease of another replica would settle the delivery that
//! this replica has now. So this replica tells the others first, and waits for their answers.

use std::{sync::Arc, time::Duration};

use tokio::sync::oneshot;

use crate::broker::ConsumerName;

/// The longest wait for the others. `cluster` logs a replica that answers later. Such a replica notices if
/// it has lost its connection to NATS, and then reads the consumer again.
pub(super) const SIGHTING_TIMEOUT: Duration = Duration::from_secs(1);

/// A change of a consumer that was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// The consumer.
    pub name: ConsumerName,
    /// The creation time of the consumer, as JetStream writes it.
    pub created: Arc<str>,
    /// The highest consumer sequence that JetStream knew as delivered, or the one that has arrived.
    pub delivered: u64,
    /// Whether the delivery with consumer sequence 1 has arrived here.
    pub began: bool,
    /// Whether consumer sequences went down, so that every earlier lease is void.
    pub again: bool,
    /// How often consumer sequences went down, as far as this replica has noticed or heard.
    pub counting: u64,
}

/// A sighting on its way to the other replicas.
#[derive(Debug)]
pub struct Telling {
    /// The sighting.
    pub sighting: Sighting,
    /// The sender drops it, or sends to it, once each replica has answered or is given up.
    pub told: oneshot::Sender<()>,
}
