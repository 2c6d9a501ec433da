//! Carries the sightings of consumers between replicas: those of this replica to the others, and those
//! of the others to this lessor. Decides nothing about leases: the lessor does.
//!
//! A replica that cannot be reached cannot settle either, because both use one connection. When there is
//! another connection, the replica reads its consumers again. If the connection was only stalled, it brings the
//! sighting then, so a silent replica is told, too. A replica that was not known yet is told when it is heard.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use prost::Message as _;
use tokio::{sync::mpsc::UnboundedReceiver, time::sleep};

use super::{
    channel::{Topic, Unanswered},
    replica::Replica,
};
use crate::{
    broker::{Broker, ConsumerName},
    bus::Bus,
    clock,
    lessor::{Lessor, Sighting, Telling},
    lock::lock,
    pb::peer::v1 as pb,
    token::InstanceId,
};

/// A replica has this long to answer: less than the lessor waits for the answers.
const SIGHTING_ANSWER_TIMEOUT: Duration = Duration::from_millis(900);
/// A replica between two NATS servers has no subscription for a moment. It is asked again after this.
const SIGHTING_RETRY: Duration = Duration::from_millis(100);

/// Tells all replicas that share a key with this one, and waits for their answers.
pub(super) async fn tell_others<B: Broker + Bus>(
    replica: &Replica<B>,
    Telling { sighting, told }: Telling,
) {
    let until = clock::now() + SIGHTING_ANSWER_TIMEOUT;
    let consumer = &sighting.name;
    let request = pb::Sighting {
        stream: consumer.stream.as_ref().to_owned(),
        consumer: consumer.consumer.as_ref().to_owned(),
        created: sighting.created.as_ref().to_owned(),
        delivered: sighting.delivered,
        began: sighting.began,
        again: sighting.again,
        counting: sighting.counting,
    };
    let request = request.encode_to_vec();
    // A client may call before this replica is ready.
    let others = replica.others(until).await;
    lock(&replica.recent).tell(request.clone(), others.clone(), clock::now());
    let answers = others.iter().map(|other| tell_one(replica, *other, &request, until));
    for (other, answer) in others.iter().zip(join_all(answers).await) {
        if let Err(Unanswered::Silent) = answer {
            tracing::warn!(
                %consumer,
                replica = %other,
                "a replica does not answer: it may hold older leases of this consumer"
            );
        }
    }
    let _ = told.send(());
}

/// Tells a replica that is heard again, or for the first time, what it was not told in the last moments.
pub(super) async fn repeat<B: Broker + Bus>(
    replica: &Replica<B>,
    other: InstanceId,
    uptime: Duration,
) {
    let now = clock::now();
    let untold = lock(&replica.recent).untold(other, uptime, now);
    let until = now + SIGHTING_ANSWER_TIMEOUT;
    join_all(untold.iter().map(|request| tell_one(replica, other, request, until))).await;
}

async fn tell_one<B: Broker + Bus>(
    replica: &Replica<B>,
    other: InstanceId,
    request: &[u8],
    until: Instant,
) -> Result<Vec<u8>, Unanswered> {
    match replica.channel.ask(other, Topic::Sighting, request, until).await {
        // It has gone, is of an older version, or is between two NATS servers.
        Err(Unanswered::Nobody) => {
            sleep(SIGHTING_RETRY).await;
            replica.channel.ask(other, Topic::Sighting, request, until).await
        }
        answer => answer,
    }
}

/// Gives the lessor a sighting of another replica. The answer says that no older lease is settled here.
pub(super) async fn heard<B: Broker>(lessor: &Lessor<B>, request: &[u8]) -> Option<Vec<u8>> {
    let seen = pb::Sighting::decode(request).ok()?;
    let sighting = Sighting {
        name: ConsumerName {
            stream: seen.stream.as_str().into(),
            consumer: seen.consumer.as_str().into(),
        },
        created: seen.created.as_str().into(),
        delivered: seen.delivered,
        began: seen.began,
        again: seen.again,
        counting: seen.counting,
    };
    lessor.heard_of(sighting).await;
    Some(pb::SightingAnswer {}.encode_to_vec())
}

/// The next sighting of this replica. It waits permanently if the lessor tells none.
pub(super) async fn next(sightings: &mut Option<UnboundedReceiver<Telling>>) -> Option<Telling> {
    match sightings {
        Some(sightings) => sightings.recv().await,
        None => std::future::pending().await,
    }
}
