//! The heir's side of a hand-over: keeps what was prepared until it is committed, and makes it its
//! own in one step. Never touches its table before that.

use std::{
    collections::HashMap,
    sync::{Arc, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use prost::Message as _;

use super::{PATIENCE, wire::read};
use crate::{
    broker::{Broker, ConsumerName, Leader},
    bus::Bus,
    clock,
    lease::{LeaseId, Memories},
    lessor::{Coming, Facts, Places},
    pb::peer::v1::{self as pb, handover_request::Step},
    peer::Peers,
    token::InstanceId,
};

/// What was prepared and not committed is forgotten after this.
const FORGOTTEN: Duration = Duration::from_secs(30);

/// What is prepared here, for a hand-over that is not committed.
#[derive(Default)]
pub(in crate::peer) struct Prepared {
    pending: HashMap<[u8; 8], Pending>,
    /// The last that was committed here, and how many leases it brought: Commit may be repeated.
    done: Option<([u8; 8], u64)>,
}

struct Pending {
    since: Instant,
    leases: Vec<(InstanceId, LeaseId, Coming)>,
    memories: Vec<(InstanceId, Memories)>,
    places: Vec<Places>,
    /// Leases of consumers that are not what they were: they have ended.
    refused: u64,
}

impl<B: Broker + Bus> Peers<B> {
    /// Does a step that a leaving replica asks for.
    pub(in crate::peer) async fn inherit(&self, question: Vec<u8>) -> Option<Vec<u8>> {
        let request = pb::HandoverRequest::decode(&*question).ok()?;
        let handover = request.handover.as_ref().try_into().ok()?;
        let taken = match request.step {
            _ if self.lessor.is_draining() => Err("it is leaving too".to_owned()),
            Some(Step::Prepare(part)) => self.prepare(handover, part).await,
            Some(Step::Commit(commit)) => self.commit(handover, &commit).await,
            Some(Step::Abort(pb::Abort {})) => {
                self.prepared().pending.remove(&handover);
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
            consumers.push((self.consumer(consumer, at + PATIENCE).await, leader));
        }
        let offered = part.leases.len();
        let mut leases = Vec::with_capacity(offered);
        for lease in part.leases {
            let place = usize::try_from(lease.consumer).unwrap_or(usize::MAX);
            // One of a consumer that is not what it was has ended.
            if let Some((Some(facts), leader)) = consumers.get(place) {
                leases.extend(read(lease, facts.clone(), *leader, at));
            }
        }
        let places = self.lessor.keep_places(leases.len()).ok_or("it has no room")?;
        let memories = part.memories.into_iter().filter_map(|memory| {
            let name = InstanceId(memory.name.as_ref().try_into().ok()?);
            Some((name, Memories::new(LeaseId::new(memory.first)?, memory.nibbles.to_vec())))
        });
        let mut prepared = self.prepared();
        prepared.pending.retain(|_, pending| at.duration_since(pending.since) < FORGOTTEN);
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

    async fn consumer(&self, consumer: pb::Consumer, until: Instant) -> Option<Arc<Facts>> {
        let name = ConsumerName {
            stream: consumer.stream.as_str().into(),
            consumer: consumer.consumer.as_str().into(),
        };
        let facts = self.lessor.know(&name, until).await.ok()?;
        (*facts.created == *consumer.created).then_some(facts)
    }

    async fn commit(&self, handover: [u8; 8], commit: &pb::Commit) -> Result<u64, String> {
        // Before anything is looked at: nothing is answered by a name that is half here.
        let mut names = self.names.write().await;
        let pending = {
            let mut prepared = self.prepared();
            if let Some((done, taken)) = prepared.done
                && done == handover
            {
                return Ok(taken);
            }
            prepared.pending.remove(&handover)
        };
        let pending = pending.ok_or("nothing is prepared")?;
        if pending.leases.len() as u64 + pending.refused != commit.leases {
            return Err("not everything has arrived".to_owned());
        }
        let theirs: Vec<InstanceId> = commit
            .names
            .iter()
            .filter_map(|name| Some(InstanceId(name.as_ref().try_into().ok()?)))
            .collect();
        let under_way = Duration::from_micros(commit.under_way);
        let (mut known_as, mut coming) = (Vec::new(), Vec::new());
        for (name, id, mut lease) in pending.leases {
            // It was on its way for no longer than that.
            lease.at = lease.at.checked_sub(under_way).unwrap_or(lease.at);
            known_as.push((name, id));
            coming.push(lease);
        }
        let mut places = pending.places.into_iter().reduce(Places::and);
        let here = match &mut places {
            Some(places) => self.lessor.adopt(coming, places),
            None => Vec::new(),
        };
        let taken: Vec<_> = known_as
            .into_iter()
            .zip(here)
            .filter_map(|((name, id), here)| Some((name, id, here?)))
            .collect();
        names.inherit(&theirs, &pending.memories, &taken, clock::now());
        self.lessor.broker().listen(self.subjects(&names.all()));
        drop(names);
        let count = taken.len() as u64;
        self.prepared().done = Some((handover, count));
        tracing::info!(leases = count, names = theirs.len(), "leases taken over");
        Ok(count)
    }

    fn prepared(&self) -> MutexGuard<'_, Prepared> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
