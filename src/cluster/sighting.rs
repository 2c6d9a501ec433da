//! Carries what this replica has seen of a consumer to the others, and what they have seen to ours.
//! Decides nothing about leases: that is the lessor's.
//!
//! A replica that hears nothing here cannot settle either, because both go over one connection; it
//! reads its consumers again when that connection is there again.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use prost::Message as _;
use tokio::{sync::mpsc::UnboundedReceiver, time::sleep};

use super::{Peers, Unanswered};
use crate::{
    broker::{Broker, ConsumerName},
    bus::Bus,
    clock,
    lessor::{Sighting, Telling},
    pb::peer::v1 as pb,
    token::InstanceId,
};

/// Where a replica is told.
pub(super) const SIGHTING: &str = "sighting";
/// A replica has this long to answer: less than its asker waits.
const SIGHTING_ANSWER_TIMEOUT: Duration = Duration::from_millis(900);
/// A replica between two NATS servers has no subscription for a moment: it is told again after this.
const SIGHTING_RETRY: Duration = Duration::from_millis(100);

impl<B: Broker + Bus> Peers<B> {
    /// Tells all replicas that share a key with this one, and waits for them.
    pub(super) async fn pass_on(self: Arc<Self>, Telling { sighting, told }: Telling) {
        let now = clock::now();
        let akin: Vec<InstanceId> = {
            let members = self.members();
            // Only those whose beats can be opened tell their names.
            members
                .living(now)
                .filter(|(_, said)| !said.names.is_empty())
                .map(|(id, _)| id)
                .collect()
        };
        let consumer = &sighting.name;
        let question = pb::Sighting {
            stream: consumer.stream.as_ref().to_owned(),
            consumer: consumer.consumer.as_ref().to_owned(),
            created: sighting.created.as_ref().to_owned(),
            delivered: sighting.delivered,
            began: sighting.began,
            again: sighting.again,
        };
        let question = question.encode_to_vec();
        let until = now + SIGHTING_ANSWER_TIMEOUT;
        let answers = akin.iter().map(|replica| self.tell_one(*replica, &question, until));
        for (replica, answer) in akin.iter().zip(join_all(answers).await) {
            if let Err(Unanswered::Silent) = answer {
                tracing::warn!(
                    %consumer,
                    %replica,
                    "a replica does not answer: it may hold older leases of this consumer"
                );
            }
        }
        let _ = told.send(());
    }

    async fn tell_one(
        &self,
        replica: InstanceId,
        question: &[u8],
        until: Instant,
    ) -> Result<Vec<u8>, Unanswered> {
        let subject = self.subject(replica, SIGHTING);
        match self.ask_once(&subject, question, until).await {
            // It has gone, is of an older version, or is between two servers.
            Err(Unanswered::Nobody) => {
                sleep(SIGHTING_RETRY).await;
                self.ask_once(&subject, question, until).await
            }
            answer => answer,
        }
    }

    /// Another replica has seen something; the answer says that nothing older is settled here.
    pub(super) async fn sighted(&self, question: Vec<u8>) -> Option<Vec<u8>> {
        let seen = pb::Sighting::decode(&*question).ok()?;
        let sighting = Sighting {
            name: ConsumerName {
                stream: seen.stream.as_str().into(),
                consumer: seen.consumer.as_str().into(),
            },
            created: seen.created.as_str().into(),
            delivered: seen.delivered,
            began: seen.began,
            again: seen.again,
        };
        self.lessor.heard_of(sighting).await;
        Some(pb::SightingAnswer {}.encode_to_vec())
    }
}

/// The next sighting that the others are to be told.
pub(super) async fn next(sightings: &mut Option<UnboundedReceiver<Telling>>) -> Option<Telling> {
    match sightings {
        Some(sightings) => sightings.recv().await,
        None => std::future::pending().await,
    }
}
