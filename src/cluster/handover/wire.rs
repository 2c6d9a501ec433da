//! Leases and remembered outcomes as they are on the wire between two replicas, in the pieces that a NATS
//! message can carry. Decides nothing.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message as _;

use crate::{
    access::ANONYMOUS_PRINCIPAL,
    broker::{AckSubject, ConsumerName, Leader},
    lease::{LeaseId, LeaseSnapshot, OutcomeSlice, SettleKind, SnapshotExpiry, margin},
    lessor::{ConsumerSpec, FetchCaller, IncomingLease, OutgoingLease},
    pb::peer::v1 as pb,
    token::InstanceId,
};

/// A receiver has this long for one step.
pub(super) const STEP_TIMEOUT: Duration = Duration::from_secs(2);
/// Most bytes of one step: well below the smallest payload limit of NATS in use.
const LARGEST_STEP: usize = 48 * 1024;

/// Everything that is handed over, cut into pieces.
#[derive(Default)]
pub(super) struct TransferParts {
    done: Vec<pb::Prepare>,
    part: pb::Prepare,
    size: usize,
    consumers: HashMap<(ConsumerName, Arc<str>), u32>,
    principals: HashMap<Arc<str>, u32>,
    callers: HashMap<Arc<FetchCaller>, u32>,
}

impl TransferParts {
    pub(super) fn memory(&mut self, name: InstanceId, piece: &OutcomeSlice) {
        let memory = pb::Memory {
            name: name.0.to_vec().into(),
            first: piece.first().get(),
            nibbles: piece.nibbles().to_vec().into(),
        };
        self.room_for(memory.encoded_len());
        self.part.memories.push(memory);
    }

    pub(super) fn lease(&mut self, name: InstanceId, id: LeaseId, leaving: OutgoingLease) {
        let OutgoingLease {
            name: of, created, leader, ack, principal, caller, held, snapshot, ..
        } = leaving;
        // The first lease of a consumer, of a principal, or of a caller, in a part carries it too.
        let principal_bytes = principal.as_ref().map_or(0, |principal| principal.len());
        let sent = caller.as_deref().map(sent_caller);
        let caller_bytes = sent.as_ref().map_or(0, pb::Caller::encoded_len);
        let names = of.stream.len() + of.consumer.len() + created.len() + principal_bytes;
        self.room_for(ack.0.len() + names + caller_bytes + 160);
        let callers = &mut self.part.callers;
        let caller = caller.zip(sent).map_or(0, |(caller, sent)| {
            *self.callers.entry(caller).or_insert_with(|| {
                callers.push(sent);
                u32::try_from(callers.len()).unwrap_or_default()
            })
        });
        let principals = &mut self.part.principals;
        let principal = principal.map_or(0, |principal| {
            *self.principals.entry(principal).or_insert_with_key(|principal| {
                principals.push(principal.to_string());
                u32::try_from(principals.len()).unwrap_or_default()
            })
        });
        let next = u32::try_from(self.consumers.len()).unwrap_or(u32::MAX);
        let consumers = &mut self.part.consumers;
        let consumer = *self.consumers.entry((of, created)).or_insert_with_key(|(of, created)| {
            consumers.push(pb::Consumer {
                stream: of.stream.to_string(),
                consumer: of.consumer.to_string(),
                created: created.to_string(),
                leader: leader.0,
            });
            next
        });
        self.part.leases.push(pb::MovingLease {
            name: name.0.to_vec().into(),
            lease: id.get(),
            consumer,
            ack_subject: ack.0.into(),
            sequence: snapshot.sequence,
            consumer_sequence: snapshot.consumer_sequence,
            delivery_count: snapshot.delivery_count,
            ack_by: micros(snapshot.ack_by),
            doubt: rounded_up(snapshot.doubt),
            doubt_unseen: Some(rounded_up(snapshot.doubt_unseen)),
            deadline: match snapshot.until {
                SnapshotExpiry::JetStreamEnds => None,
                SnapshotExpiry::At(left) => Some(micros(left)),
            },
            granted: Some(snapshot.granted.map_or(0, micros)),
            uncertain: settled_as(snapshot.uncertain).into(),
            ack_wait: micros(snapshot.ack_wait),
            principal,
            caller,
            held: held.map(micros),
        });
    }

    fn room_for(&mut self, bytes: usize) {
        if self.size + bytes > LARGEST_STEP && self.size > 0 {
            self.done.push(std::mem::take(&mut self.part));
            self.consumers.clear();
            self.principals.clear();
            self.callers.clear();
            self.size = 0;
        }
        self.size += bytes;
    }

    pub(super) fn done(mut self) -> Vec<pb::Prepare> {
        self.done.push(self.part);
        self.done
    }
}

impl pb::Prepare {
    /// Takes the time that has passed off all clocks. Rounded up, so that no clock gains time.
    pub(super) fn age(&mut self, by: Duration) {
        let by = micros(by) + 1;
        for lease in &mut self.leases {
            lease.ack_by = lease.ack_by.saturating_sub(by);
            lease.deadline = lease.deadline.map(|left| left.saturating_sub(by));
            lease.held = lease.held.map(|held| held.saturating_add(by));
        }
    }
}

/// A lease as it was sent, with the name and the number that it is known by. `None`: the message cannot
/// be understood.
pub(super) fn read(
    lease: pb::MovingLease,
    spec: Arc<ConsumerSpec>,
    leader: Leader,
    (principals, callers): (&[Arc<str>], &[Arc<FetchCaller>]),
    at: Instant,
) -> Option<(InstanceId, LeaseId, IncomingLease)> {
    let principal = place_in(principals, lease.principal);
    let caller = place_in(callers, lease.caller);
    let held = lease.held.map(Duration::from_micros);
    // A version that names no principal had none.
    let principal = Some(principal.unwrap_or_else(|| ANONYMOUS_PRINCIPAL.into()));
    let name = InstanceId(lease.name.as_ref().try_into().ok()?);
    let uncertain = match lease.uncertain() {
        pb::SettledAs::Unspecified => None,
        pb::SettledAs::Ack => Some(SettleKind::Ack),
        pb::SettledAs::Nak => Some(SettleKind::Nak),
        pb::SettledAs::Term => Some(SettleKind::Term),
    };
    let snapshot = LeaseSnapshot {
        sequence: lease.sequence,
        consumer_sequence: lease.consumer_sequence,
        delivery_count: lease.delivery_count,
        last_attempt: spec.max_deliver.is_some_and(|most| lease.delivery_count >= most),
        ack_wait: Duration::from_micros(lease.ack_wait),
        ack_by: Duration::from_micros(lease.ack_by),
        doubt: Duration::from_micros(lease.doubt),
        doubt_unseen: Duration::from_micros(lease.doubt_unseen.unwrap_or(lease.doubt)),
        until: match lease.deadline {
            None => SnapshotExpiry::JetStreamEnds,
            Some(left) => SnapshotExpiry::At(Duration::from_micros(left)),
        },
        granted: granted(&lease),
        uncertain,
    };
    let ack = AckSubject(lease.ack_subject.into());
    let incoming = IncomingLease { spec, leader, ack, principal, caller, held, snapshot, at };
    Some((name, LeaseId::new(lease.lease)?, incoming))
}

/// The one that a lease names by its position plus 1.
fn place_in<T: Clone>(all: &[T], position: u32) -> Option<T> {
    let place = usize::try_from(position).ok()?.checked_sub(1)?;
    all.get(place).cloned()
}

pub(in crate::cluster) fn sent_caller(caller: &FetchCaller) -> pb::Caller {
    pb::Caller {
        worker: caller.worker.to_string(),
        identity: caller.identity.to_string(),
        peer: caller.peer.map(|peer| peer.to_string()).unwrap_or_default(),
    }
}

/// The callers of a part. A name that is longer than this version keeps is cut.
pub(super) fn read_callers(callers: &[pb::Caller]) -> Vec<Arc<FetchCaller>> {
    callers.iter().map(|caller| Arc::new(read_caller(caller))).collect()
}

pub(in crate::cluster) fn read_caller(caller: &pb::Caller) -> FetchCaller {
    FetchCaller::new(&caller.worker, &caller.identity, caller.peer.parse().ok())
}

/// The length that the caller was granted. `None`: as long as the ack wait. An older replica does not
/// send it. Then it is the time that is left of the lease, but not less than the ack wait without its
/// margin.
fn granted(lease: &pb::MovingLease) -> Option<Duration> {
    let ack_wait = Duration::from_micros(lease.ack_wait);
    match lease.granted {
        Some(length) => (length > 0).then(|| Duration::from_micros(length)),
        None => lease
            .deadline
            .map(|left| Duration::from_micros(left).max(ack_wait.saturating_sub(margin(ack_wait)))),
    }
}

fn settled_as(kind: Option<SettleKind>) -> pb::SettledAs {
    match kind {
        None => pb::SettledAs::Unspecified,
        Some(SettleKind::Ack) => pb::SettledAs::Ack,
        Some(SettleKind::Nak) => pb::SettledAs::Nak,
        Some(SettleKind::Term) => pb::SettledAs::Term,
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// No doubt gets shorter on the way.
fn rounded_up(doubt: Duration) -> u64 {
    if doubt.is_zero() { 0 } else { micros(doubt).saturating_add(1) }
}

/// Rounded down, so that no clock gains time.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
