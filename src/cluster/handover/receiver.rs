//! The receiver of a hand-over. It keeps what was prepared until Commit, and takes all of it in one step.
//! It never touches its lease table before that.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use prost::Message as _;

use super::wire::{STEP_TIMEOUT, micros, read, read_callers};
use crate::{
    broker::{Broker, ConsumerName, Leader},
    bus::Bus,
    clock,
    cluster::{
        ownership::{AdoptedName, gather},
        replica::Replica,
    },
    lease::{LeaseId, OutcomeSlice},
    lessor::{ConsumerSpec, Error, IncomingLease, ReservedLeases},
    lock::lock,
    pb::peer::v1::{self as pb, handover_request::Step},
    token::InstanceId,
};

/// A hand-over that was prepared and not committed is forgotten after this.
const PREPARED_LIFETIME: Duration = Duration::from_secs(30);
/// Longest time of a hand-over in which the receiver finds out who leads, if the sender knows other leaders. The clocks
/// of the sender stand still meanwhile.
const LEADER_TIMEOUT: Duration = Duration::from_millis(500);
/// Hand-overs whose end is remembered. A replica sees one or two hand-overs of each other replica.
const REMEMBERED_HANDOVERS: usize = 1024;

/// The hand-overs that are prepared here, and how earlier ones ended. A hand-over that has ended never
/// begins again, whoever repeats its messages.
#[derive(Default)]
struct Prepared {
    pending: BTreeMap<[u8; 8], Pending>,
    ended: VecDeque<([u8; 8], Ended)>,
}

struct Pending {
    since: Instant,
    leases: Vec<(InstanceId, LeaseId, IncomingLease)>,
    memories: Vec<(InstanceId, OutcomeSlice)>,
    reserved: Vec<ReservedLeases>,
    /// Leases that have ended, because their consumer is not the same any more.
    refused: u64,
    /// Some leader was not found in time.
    leaderless: bool,
}

#[derive(Debug, Clone, Copy)]
enum Ended {
    /// Committed. This many leases were taken.
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

    /// Gives up hand-overs to which no sender has come back.
    fn tidy(&mut self, now: Instant) {
        self.pending.retain(|_, pending| now.duration_since(pending.since) < PREPARED_LIFETIME);
    }
}

/// The receiver's side.
pub(in crate::cluster) struct Receiver<B: Broker + Bus> {
    replica: Arc<Replica<B>>,
    prepared: Mutex<Prepared>,
}

impl<B: Broker + Bus> Receiver<B> {
    pub(in crate::cluster) fn new(replica: Arc<Replica<B>>) -> Self {
        Self { replica, prepared: Mutex::default() }
    }

    /// Forgets what was prepared long ago.
    pub(in crate::cluster) fn tidy(&self, now: Instant) {
        self.prepared().tidy(now);
    }

    /// Gives up everything that is prepared, with the room that is reserved for it.
    pub(in crate::cluster) fn give_up(&self) {
        self.prepared().pending.clear();
    }

    /// Does one step of a hand-over, and answers the sender.
    pub(in crate::cluster) async fn answer(&self, request: &[u8]) -> Option<Vec<u8>> {
        let since = clock::now();
        let request = pb::HandoverRequest::decode(request).ok()?;
        let handover = request.handover.as_ref().try_into().ok()?;
        let taken = match request.step {
            Some(Step::Prepare(part)) => self.prepare(handover, part, since).await,
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
        let worked = micros(clock::now().duration_since(since));
        let answer = match taken {
            Ok(taken) => pb::HandoverResponse { done: true, why: String::new(), taken, worked },
            Err(why) => pb::HandoverResponse { done: false, why, taken: 0, worked },
        };
        Some(answer.encode_to_vec())
    }

    /// `at`: when the part arrived.
    async fn prepare(
        &self,
        handover: [u8; 8],
        part: pb::Prepare,
        at: Instant,
    ) -> Result<u64, String> {
        let lessor = &self.replica.lessor;
        let leaderless = self.prepared().pending.get(&handover).is_some_and(|it| it.leaderless);
        let looked_by = if leaderless { at } else { at + LEADER_TIMEOUT };
        let mut consumers = Vec::with_capacity(part.consumers.len());
        for consumer in part.consumers {
            let leader = Leader(consumer.leader);
            let by = (looked_by, at + STEP_TIMEOUT);
            consumers.push((self.consumer(consumer, by).await?, leader));
        }
        let leaderless = clock::now() >= looked_by;
        let offered = part.leases.len();
        let principals: Vec<Arc<str>> = part.principals.into_iter().map(Arc::from).collect();
        let callers = read_callers(&part.callers);
        let mut leases = Vec::with_capacity(offered);
        for lease in part.leases {
            let index = usize::try_from(lease.consumer).unwrap_or(usize::MAX);
            // A lease whose consumer is not the same any more has ended.
            if let Some((Some(spec), leader)) = consumers.get(index) {
                let known = (&*principals, &*callers);
                leases.extend(read(lease, spec.clone(), *leader, known, at));
            }
        }
        let memories = part.memories.into_iter().filter_map(|memory| {
            let name = InstanceId(memory.name.as_ref().try_into().ok()?);
            Some((name, OutcomeSlice::new(LeaseId::new(memory.first)?, memory.nibbles.to_vec())))
        });
        let mut prepared = self.prepared();
        // The hand-over may have ended since this step was sent, or somebody else repeats the step.
        if prepared.ended(handover).is_some() {
            return Err("that is over".to_owned());
        }
        if lessor.is_draining() {
            return Err("it is leaving too".to_owned());
        }
        let reserved = lessor.reserve_leases(leases.len()).ok_or("it has no room")?;
        let pending = prepared.pending.entry(handover).or_insert_with(|| Pending {
            since: at,
            leases: Vec::new(),
            memories: Vec::new(),
            reserved: Vec::new(),
            refused: 0,
            leaderless: false,
        });
        pending.leaderless |= leaderless;
        let count = leases.len() as u64;
        tracing::debug!(leases = count, "leases prepared");
        pending.refused += (offered - leases.len()) as u64;
        pending.leases.extend(leases);
        pending.memories.extend(memories);
        pending.reserved.push(reserved);
        Ok(count)
    }

    /// The consumer of leases that are handed over. `None`: it is not the same any more, and its leases
    /// have ended.
    ///
    /// # Errors
    /// The consumer cannot be read here, so its leases cannot be kept.
    async fn consumer(
        &self,
        consumer: pb::Consumer,
        by: (Instant, Instant),
    ) -> Result<Option<Arc<ConsumerSpec>>, String> {
        let name = ConsumerName {
            stream: consumer.stream.as_str().into(),
            consumer: consumer.consumer.as_str().into(),
        };
        // If we know another consumer of that name, or another leader, ours may be the older one.
        let known = (Arc::from(consumer.created.as_str()), Leader(consumer.leader));
        match self.replica.lessor.know_for_handover(&name, known, by).await {
            Ok(spec) => Ok((*spec.created == *consumer.created).then_some(spec)),
            Err(Error::StreamNotFound(_) | Error::ConsumerNotFound(_)) => Ok(None),
            Err(error) => Err(format!("it cannot read {name}: {error}")),
        }
    }

    /// Takes everything that is prepared, in one step and under one lock. A repeated Commit waits for the
    /// same answer.
    fn commit(&self, handover: [u8; 8], commit: &pb::Commit) -> Result<u64, String> {
        let Replica { lessor, ownership, peers, .. } = &*self.replica;
        let mut prepared = self.prepared();
        match prepared.ended(handover) {
            Some(Ended::Taken(taken)) => return Ok(taken),
            Some(Ended::GivenUp) => return Err("it was given up".to_owned()),
            None => {}
        }
        if lessor.is_draining() {
            return Err("it is leaving too".to_owned());
        }
        let pending = prepared.pending.remove(&handover).ok_or("nothing is prepared")?;
        if pending.leases.len() as u64 + pending.refused != commit.leases {
            return Err("not everything has arrived".to_owned());
        }
        let under_way = Duration::from_micros(commit.under_way);
        let (mut known_as, mut incoming) = (Vec::new(), Vec::new());
        for (name, id, mut lease) in pending.leases {
            // No part was under way for longer than that.
            lease.at = lease.at.checked_sub(under_way).unwrap_or(lease.at);
            known_as.push((name, id));
            incoming.push(lease);
        }
        let mut reserved = pending.reserved.into_iter().reduce(ReservedLeases::and);
        let here = match &mut reserved {
            Some(reserved) => lessor.adopt(incoming, reserved),
            None => Vec::new(),
        };
        let taken: Vec<_> = known_as
            .into_iter()
            .zip(here)
            .filter_map(|((name, id), here)| Some((name, id, here?)))
            .collect();
        let adopted = names_of(commit, clock::now());
        let (names, count) = (adopted.len(), taken.len() as u64);
        // These names are answered from here on, and not earlier: an answer needs all that is known.
        ownership.lock().adopt(gather(adopted, &pending.memories, &taken));
        self.replica.listen();
        peers.announce_soon();
        prepared.end(handover, Ended::Taken(count));
        tracing::info!(leases = count, names, "leases taken over");
        Ok(count)
    }

    fn prepared(&self) -> MutexGuard<'_, Prepared> {
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
