//! The heir's side of a hand-over: keeps what was prepared until it is committed, and makes it its
//! own in one step. Never touches its table before that.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, MutexGuard},
    time::{Duration, Instant},
};

use prost::Message as _;

use super::{STEP_TIMEOUT, wire::read};
use crate::{
    broker::{Broker, ConsumerName, Leader},
    bus::Bus,
    clock,
    cluster::{
        Peers,
        ownership::{AdoptedName, gather},
    },
    lease::{LeaseId, OutcomeSlice},
    lessor::{ConsumerSpec, Error, IncomingLease, ReservedLeases},
    lock::lock,
    pb::peer::v1::{self as pb, handover_request::Step},
    token::InstanceId,
};

/// What was prepared and not committed is forgotten after this.
const PREPARED_LIFETIME: Duration = Duration::from_secs(30);
/// Hand-overs whose end is remembered: a replica sees one or two of another's life.
const REMEMBERED_HANDOVERS: usize = 1024;

/// What is prepared here, and how other hand-overs ended: none of those begins anew, whoever repeats
/// what was said then.
#[derive(Default)]
pub(in crate::cluster) struct Prepared {
    pending: HashMap<[u8; 8], Pending>,
    ended: VecDeque<([u8; 8], Ended)>,
}

struct Pending {
    since: Instant,
    leases: Vec<(InstanceId, LeaseId, IncomingLease)>,
    memories: Vec<(InstanceId, OutcomeSlice)>,
    places: Vec<ReservedLeases>,
    /// Leases of consumers that are not what they were: they have ended.
    refused: u64,
}

#[derive(Debug, Clone, Copy)]
enum Ended {
    /// Committed; so many leases were taken.
    Taken(u64),
    GivenUp,
}

impl Prepared {
    fn ended(&self, handover: [u8; 8]) -> Option<Ended> {
        self.ended.iter().find(|(id, _)| *id == handover).map(|(_, ended)| *ended)
    }

    fn end(&mut self, handover: [u8; 8], ended: Ended) {
        self.pending.remove(&handover);
        self.ended.truncate(REMEMBERED_HANDOVERS - 1);
        self.ended.push_front((handover, ended));
    }

    /// Gives up what nobody has come back to.
    pub(in crate::cluster) fn tidy(&mut self, now: Instant) {
        self.pending.retain(|_, pending| now.duration_since(pending.since) < PREPARED_LIFETIME);
    }

    /// Gives up all, and with it the places that were kept.
    pub(in crate::cluster) fn give_up(&mut self) {
        self.pending.clear();
    }
}

impl<B: Broker + Bus> Peers<B> {
    /// Does a step that a leaving replica asks for.
    pub(in crate::cluster) async fn inherit(&self, question: Vec<u8>) -> Option<Vec<u8>> {
        let request = pb::HandoverRequest::decode(&*question).ok()?;
        let handover = request.handover.as_ref().try_into().ok()?;
        let taken = match request.step {
            Some(Step::Prepare(part)) => self.prepare(handover, part).await,
            Some(Step::Commit(commit)) => self.commit(handover, &commit),
            Some(Step::Abort(pb::Abort {})) => {
                let mut prepared = self.prepared();
                if prepared.ended(handover).is_none() {
                    prepared.end(handover, Ended::GivenUp);
                }
                Ok(0)
            }
            None => Err("it is of a version that does not know this step".to_owned()),
        };
        let answer = match taken {
            Ok(taken) => pb::HandoverResponse { done: true, why: String::new(), taken },
            Err(why) => pb::HandoverResponse { done: false, why, taken: 0 },
        };
        Some(answer.encode_to_vec())
    }

    async fn prepare(&self, handover: [u8; 8], part: pb::Prepare) -> Result<u64, String> {
        let at = clock::now();
        let mut consumers = Vec::with_capacity(part.consumers.len());
        for consumer in part.consumers {
            let leader = Leader(consumer.leader);
            consumers.push((self.consumer(consumer, at + STEP_TIMEOUT).await?, leader));
        }
        let offered = part.leases.len();
        let mut leases = Vec::with_capacity(offered);
        for lease in part.leases {
            let place = usize::try_from(lease.consumer).unwrap_or(usize::MAX);
            // One of a consumer that is not what it was has ended.
            if let Some((Some(spec), leader)) = consumers.get(place) {
                leases.extend(read(lease, spec.clone(), *leader, at));
            }
        }
        let memories = part.memories.into_iter().filter_map(|memory| {
            let name = InstanceId(memory.name.as_ref().try_into().ok()?);
            Some((name, OutcomeSlice::new(LeaseId::new(memory.first)?, memory.nibbles.to_vec())))
        });
        let mut prepared = self.prepared();
        // It may have been overtaken by what came after it, or be said again by somebody else.
        if prepared.ended(handover).is_some() {
            return Err("that is over".to_owned());
        }
        if self.lessor.is_draining() {
            return Err("it is leaving too".to_owned());
        }
        let places = self.lessor.reserve_leases(leases.len()).ok_or("it has no room")?;
        let pending = prepared.pending.entry(handover).or_insert_with(|| Pending {
            since: at,
            leases: Vec::new(),
            memories: Vec::new(),
            places: Vec::new(),
            refused: 0,
        });
        let count = leases.len() as u64;
        tracing::debug!(leases = count, "leases prepared");
        pending.refused += (offered - leases.len()) as u64;
        pending.leases.extend(leases);
        pending.memories.extend(memories);
        pending.places.push(places);
        Ok(count)
    }

    /// `None`: it is not what it was, and its leases have ended.
    ///
    /// # Errors
    /// It cannot be read here, so its leases cannot be looked after.
    async fn consumer(
        &self,
        consumer: pb::Consumer,
        until: Instant,
    ) -> Result<Option<Arc<ConsumerSpec>>, String> {
        let name = ConsumerName {
            stream: consumer.stream.as_str().into(),
            consumer: consumer.consumer.as_str().into(),
        };
        match self.lessor.know(&name, until).await {
            Ok(spec) => Ok((*spec.created == *consumer.created).then_some(spec)),
            Err(Error::StreamNotFound(_) | Error::ConsumerNotFound(_)) => Ok(None),
            Err(error) => Err(format!("it cannot read {name}: {error}")),
        }
    }

    /// Makes all of it ours in one step, under the lock of what is prepared: who says it again waits
    /// for the same answer.
    fn commit(&self, handover: [u8; 8], commit: &pb::Commit) -> Result<u64, String> {
        let mut prepared = self.prepared();
        match prepared.ended(handover) {
            Some(Ended::Taken(taken)) => return Ok(taken),
            Some(Ended::GivenUp) => return Err("it was given up".to_owned()),
            None => {}
        }
        if self.lessor.is_draining() {
            return Err("it is leaving too".to_owned());
        }
        let pending = prepared.pending.remove(&handover).ok_or("nothing is prepared")?;
        if pending.leases.len() as u64 + pending.refused != commit.leases {
            return Err("not everything has arrived".to_owned());
        }
        let under_way = Duration::from_micros(commit.under_way);
        let (mut known_as, mut coming) = (Vec::new(), Vec::new());
        for (name, id, mut lease) in pending.leases {
            // It was on its way for no longer than that.
            lease.at = lease.at.checked_sub(under_way).unwrap_or(lease.at);
            known_as.push((name, id));
            coming.push(lease);
        }
        let mut places = pending.places.into_iter().reduce(ReservedLeases::and);
        let here = match &mut places {
            Some(places) => self.lessor.adopt(coming, places),
            None => Vec::new(),
        };
        let taken: Vec<_> = known_as
            .into_iter()
            .zip(here)
            .filter_map(|((name, id), here)| Some((name, id, here?)))
            .collect();
        let theirs = names_of(commit, clock::now());
        let (names, count) = (theirs.len(), taken.len() as u64);
        // Only now may anything be answered by these names: nothing is by half of what is known.
        self.names().inherit(gather(theirs, &pending.memories, &taken));
        self.listen();
        self.speak.notify_one();
        prepared.end(handover, Ended::Taken(count));
        tracing::info!(leases = count, names, "leases taken over");
        Ok(count)
    }

    pub(in crate::cluster) fn prepared(&self) -> MutexGuard<'_, Prepared> {
        lock(&self.prepared)
    }
}

fn names_of(commit: &pb::Commit, now: Instant) -> BTreeMap<InstanceId, AdoptedName> {
    let idle = commit.idle.iter().copied().map(Duration::from_millis);
    let idle = idle.chain(std::iter::repeat(Duration::ZERO));
    let names = commit.names.iter().zip(idle).filter_map(|(name, idle)| {
        let name = InstanceId(name.as_ref().try_into().ok()?);
        Some((name, AdoptedName::new(idle, now)))
    });
    names.collect()
}
