//! The lease table, written without care for memory or speed. It is a list of leases that is
//! searched for everything. Each lease has the history of its clock, in whole milliseconds.
//!
//! It is written from the promises, not from the table: it has no index and no sum to keep right.

use std::collections::{BTreeMap, BTreeSet};

use fetch_proxy::lease::{ConsumerEnd, LeaseOutcome, PublishOutcome, SettleKind};

use super::{
    naive::{Lease, NEVER, State, Tries, Until, margin},
    replies::{LeaseStatus, Reply, Swept},
    steps::Arrival,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    As(SettleKind),
    Expired,
    Gone,
    Overtaken(SettleKind),
}

/// The naive table.
#[derive(Debug, Clone)]
pub(super) struct Reference {
    /// Granted so far.
    pub(super) granted: u64,
    pub(super) leases: Vec<Lease>,
    /// For each consumer name its present incarnation, and how long its attempts may take.
    pub(super) consumers: [(u32, [i64; 2]); 2],
    remembered: u64,
    pub(super) longest: i64,
    now: i64,
    ended: BTreeMap<u64, Ended>,
    dead: BTreeMap<u32, ConsumerEnd>,
    /// Dead, and not swept since.
    unburied: BTreeSet<u32>,
    distrusted: BTreeMap<u32, i64>,
}

/// The first ack wait is that of first deliveries.
pub(super) fn ack_wait(ack_waits: [i64; 2], delivery_count: u64) -> i64 {
    ack_waits[usize::from(delivery_count > 1)]
}

impl Reference {
    pub(super) fn new(remembered: u64, longest: i64, ack_waits: [i64; 2]) -> Self {
        Self {
            granted: 0,
            leases: Vec::new(),
            consumers: [(0, ack_waits), (1, ack_waits)],
            remembered,
            longest,
            now: 0,
            ended: BTreeMap::new(),
            dead: BTreeMap::new(),
            unburied: BTreeSet::new(),
            distrusted: BTreeMap::new(),
        }
    }

    /// The ack wait of a delivery of the consumer of this name.
    pub(super) fn ack_wait(&self, name: usize, delivery_count: u64) -> i64 {
        ack_wait(self.consumers[name].1, delivery_count)
    }

    /// The present incarnation under each name.
    pub(super) fn incarnations(&self) -> [u32; 2] {
        self.consumers.map(|(incarnation, _)| incarnation)
    }

    pub(super) fn advance(&mut self, now: i64) {
        self.now = self.now.max(now);
    }

    pub(super) fn grant(&mut self, arrival: &Arrival, received: i64) -> Reply {
        let Arrival { name, sequence, last_attempt, delivery_count, .. } = *arrival;
        self.advance(received);
        let consumer = self.consumers[name].0;
        let same = |lease: &Lease| lease.consumer == consumer && lease.sequence == sequence;
        let older = self.leases.iter().find(|lease| same(lease)).cloned();
        if let Some(older) = &older {
            let ended = match older.state {
                State::Settling(kind, _) => Ended::Overtaken(kind),
                State::Held | State::Uncertain(_) => Ended::Expired,
            };
            self.end(older.id, ended);
        }
        self.granted += 1;
        let mut lease = Lease {
            id: self.granted,
            consumer,
            state: State::Held,
            sequence,
            consumer_sequence: self.granted,
            delivery_count,
            last_attempt,
            ack_wait: self.ack_wait(name, delivery_count),
            starts: vec![(received - arrival.age, 0), (received, NEVER)],
            doubted: false,
            lost: false,
            until: Until::Taken,
            granted: None,
            tried: received,
        };
        lease.reclaim();
        self.leases.push(lease);
        Reply::Granted { id: self.granted, superseded: older.map(|older| older.id) }
    }

    pub(super) fn assign(&mut self, id: u64, length: Option<i64>) -> Reply {
        let (now, latest) = (self.now, self.now + self.longest);
        self.held(id).map_or_else(
            |error| error,
            |lease| {
                let ack_by = lease.ack_by();
                let deadline = length.map_or(ack_by, |length| now + length).min(latest);
                lease.granted = length;
                lease.until = match length {
                    Some(_) => Until::At(deadline),
                    None => Until::JetStreamEnds(latest),
                };
                Reply::Assigned { deadline, settle_by: deadline.min(ack_by) }
            },
        )
    }

    pub(super) fn assign_kept(&mut self, id: u64, at_most: i64, grace: i64) -> Reply {
        let (now, longest) = (self.now, self.longest);
        self.held(id).map_or_else(
            |error| error,
            |lease| {
                let deadline = now + at_most.min(longest);
                lease.granted = None;
                lease.until = Until::Kept(deadline, grace.min(longest));
                Reply::Assigned { deadline, settle_by: lease.settle_by(now) }
            },
        )
    }

    pub(super) fn end_kept(&mut self, id: u64) -> Reply {
        let now = self.now;
        let lease = self.leases.iter_mut().find(|lease| lease.id == id);
        if let Some(lease) = lease
            && let Until::Kept(at_most, grace) = lease.until
        {
            lease.until = Until::At(at_most.min(now + grace));
        }
        Reply::Nothing
    }

    pub(super) fn end_of(&self, id: u64) -> Option<LeaseOutcome> {
        Some(match self.memory(id)? {
            Ended::As(by) | Ended::Overtaken(by) => LeaseOutcome::Settled { by },
            Ended::Expired => LeaseOutcome::Expired,
            Ended::Gone => LeaseOutcome::ConsumerGone,
        })
    }

    pub(super) fn assign_again(&mut self, id: u64, length: Option<i64>) -> Reply {
        let before = match self.held(id) {
            Ok(lease) => lease.clone(),
            Err(error) => return error,
        };
        let (again, now) = (self.assign(id, length), self.now);
        let lease = self.lease(id).unwrap();
        // A lease without an end has no caller yet.
        let Some(deadline) = before.deadline().filter(|before| lease.deadline() < Some(*before))
        else {
            return again;
        };
        lease.until = before.until;
        Reply::Assigned { deadline, settle_by: lease.settle_by(now) }
    }

    pub(super) fn reissue(&mut self, id: u64) -> Reply {
        let Ok(lease) = self.held(id).map(|lease| lease.clone()) else { return Reply::Nothing };
        self.granted += 1;
        self.end(id, Ended::Expired);
        let mut lease = Lease { id: self.granted, ..lease };
        lease.reclaim();
        self.leases.push(lease);
        Reply::Granted { id: self.granted, superseded: None }
    }

    pub(super) fn extend(&mut self, id: u64, length: Option<i64>) -> Reply {
        let (now, longest) = (self.now, self.longest);
        self.held(id).map_or_else(
            |error| error,
            |lease| {
                let jetstream = lease.ack_wait - margin(lease.ack_wait);
                let length = length.or(lease.granted).unwrap_or(jetstream);
                let deadline = now + length.min(longest);
                lease.until = Until::At(deadline);
                Reply::Extended(deadline)
            },
        )
    }

    pub(super) fn reclaim(&mut self, id: u64) -> Reply {
        if let Ok(lease) = self.held(id) {
            lease.reclaim();
        }
        Reply::Nothing
    }

    pub(super) fn begin(&mut self, id: u64, kind: SettleKind) -> Reply {
        let tries = match self.standing(id) {
            Ok(State::Held) => Tries::First,
            Ok(State::Uncertain(SettleKind::Nak)) if kind == SettleKind::Nak => {
                let lease = self.lease(id).unwrap();
                return Reply::NakUnconfirmed { ack_wait: lease.ack_wait };
            }
            Ok(State::Uncertain(by)) if by == kind => Tries::Again,
            Ok(State::Uncertain(by)) => return Reply::Settled(by),
            Ok(State::Settling(..)) => return Reply::Busy,
            Err(Reply::Settled(by)) if by == kind => return Reply::Duplicate,
            Err(error) => return error,
        };
        self.lease(id).unwrap().state = State::Settling(kind, tries);
        Reply::Publish
    }

    pub(super) fn finish(&mut self, id: u64, outcome: PublishOutcome) -> Reply {
        let gone = |out| Reply::Finished { after: LeaseStatus::Gone, out };
        let Some(lease) = self.lease(id).cloned() else {
            if let Some(Ended::Overtaken(kind)) = self.memory(id) {
                let end = match outcome {
                    PublishOutcome::Confirmed => Ended::As(kind),
                    PublishOutcome::Denied => Ended::Gone,
                    PublishOutcome::Unsent | PublishOutcome::Unconfirmed => Ended::Expired,
                };
                self.ended.insert(id, end);
            }
            return gone(false);
        };
        if let State::Settling(kind, tries) = lease.state {
            let over = self.over(&lease);
            let state = match (outcome, tries) {
                (PublishOutcome::Confirmed, _) => {
                    self.end(id, Ended::As(kind));
                    return gone(true);
                }
                (PublishOutcome::Denied, _) => {
                    self.end(id, Ended::Gone);
                    return gone(true);
                }
                (PublishOutcome::Unsent | PublishOutcome::Unconfirmed, _) if over => {
                    self.end(id, Ended::Expired);
                    return gone(true);
                }
                (PublishOutcome::Unsent, Tries::First) => State::Held,
                (PublishOutcome::Unsent | PublishOutcome::Unconfirmed, _) => State::Uncertain(kind),
            };
            self.lease(id).unwrap().state = state;
        }
        let after = match self.standing(id) {
            Ok(State::Held) => LeaseStatus::Held,
            Ok(State::Settling(..) | State::Uncertain(_)) => LeaseStatus::Uncertain,
            Err(_) => LeaseStatus::Gone,
        };
        Reply::Finished { after, out: false }
    }

    pub(super) fn give_back(&mut self, id: u64) -> Reply {
        let Some(lease) = self.lease(id).filter(|lease| lease.state == State::Held).cloned() else {
            return Reply::Nothing;
        };
        self.end(id, Ended::Expired);
        Reply::GivenBack { release: self.release_by(&lease) }
    }

    pub(super) fn revoke(&mut self, id: u64, forced: bool) -> Reply {
        match self.standing(id) {
            Err(_) => return Reply::Nothing,
            Ok(State::Held) => {}
            Ok(State::Uncertain(_) | State::Settling(..)) => return Reply::Busy,
        }
        let lease = self.lease(id).cloned().unwrap();
        if lease.last_attempt && !forced {
            return Reply::LastAttempt;
        }
        self.end(id, Ended::Expired);
        // A forced end of the last attempt is released like any other.
        let release = self.release_by(&Lease { last_attempt: false, ..lease });
        Reply::GivenBack { release }
    }

    pub(super) fn sweep(&mut self, now: i64) -> Reply {
        self.advance(now);
        self.unburied.clear();
        let mut swept = BTreeSet::new();
        for lease in self.leases.clone() {
            if matches!(lease.state, State::Settling(..)) {
                continue;
            }
            let dead = self.dead.contains_key(&lease.consumer);
            if self.over(&lease) && (dead || !lease.runs_out()) {
                let gone = self.dead.get(&lease.consumer) == Some(&ConsumerEnd::Gone);
                self.end(lease.id, if gone { Ended::Gone } else { Ended::Expired });
                swept.insert(Swept::Lost(lease.id));
            } else if lease.state == State::Held && lease.past_deadline(self.now) {
                self.end(lease.id, Ended::Expired);
                swept.insert(Swept::Lapsed(lease.id, self.release_by(&lease)));
            } else if lease.is_kept_alive() && self.now >= lease.progress_at() {
                self.lease(lease.id).unwrap().tried = self.now;
                swept.insert(Swept::Progress(lease.id));
            }
        }
        Reply::Swept(swept)
    }

    pub(super) fn progressed(&mut self, id: u64, sent_at: i64, confirmed: bool) -> Reply {
        let now = self.now;
        let Some(consumer) = self.lease(id).map(|lease| lease.consumer) else {
            return Reply::Nothing;
        };
        let trusted = self.distrusted.get(&consumer).is_none_or(|forgot| sent_at > *forgot);
        let lease = self.lease(id).unwrap();
        let newer = sent_at > lease.starts.last().unwrap().0;
        if confirmed && trusted && newer && now < lease.ack_by() {
            lease.restart(sent_at, now);
        }
        Reply::Nothing
    }

    pub(super) fn end_consumer(&mut self, name: usize, how: ConsumerEnd, next: u32) {
        let old = self.consumers[name].0;
        if self.held_by(old) > 0 {
            self.unburied.insert(old);
        }
        self.dead.insert(old, how);
        self.consumers[name].0 = next;
    }

    pub(super) fn retune(&mut self, name: usize, ack_waits: [i64; 2]) -> Reply {
        self.consumers[name].1 = ack_waits;
        for lease in self.leases_of(name) {
            let ack_wait = self.ack_wait(name, lease.delivery_count);
            let late = self.now >= lease.ack_by();
            let lease = self.lease(lease.id).unwrap();
            lease.lost |= late;
            lease.ack_wait = ack_wait;
        }
        Reply::Nothing
    }

    pub(super) fn distrust(&mut self, name: usize, when: i64) -> Reply {
        self.advance(when);
        let leases = self.leases_of(name);
        if !leases.is_empty() {
            let forgot = self.distrusted.entry(self.consumers[name].0).or_insert(when);
            *forgot = when.max(*forgot);
        }
        for Lease { id, .. } in leases {
            self.lease(id).unwrap().distrust(when);
        }
        Reply::Nothing
    }

    pub(super) fn lose_after(&mut self, name: usize, delivered: u64) -> Reply {
        for lease in self.leases_of(name) {
            self.lease(lease.id).unwrap().lost |= lease.consumer_sequence > delivered;
        }
        Reply::Nothing
    }

    /// When a sweep next has something to do.
    pub(super) fn next_due(&self) -> Option<i64> {
        if !self.unburied.is_empty() {
            return Some(0);
        }
        let due = self.leases.iter().filter_map(|lease| {
            let progress = lease.is_kept_alive().then(|| lease.progress_at());
            let deadline = match lease.state {
                State::Settling(..) => return None,
                State::Held => lease.deadline(),
                State::Uncertain(_) => None,
            };
            [Some(lease.ack_by()), progress, deadline].into_iter().flatten().min()
        });
        due.min().map(|due| due.max(0))
    }

    /// The records of a consumer go with its last lease.
    pub(super) fn tidy(&mut self) {
        let used: BTreeSet<u32> = self.leases.iter().map(|lease| lease.consumer).collect();
        self.unburied.retain(|consumer| used.contains(consumer));
        self.distrusted.retain(|consumer, _| used.contains(consumer));
    }

    pub(super) fn held_by(&self, consumer: u32) -> usize {
        self.leases.iter().filter(|lease| lease.consumer == consumer).count()
    }

    fn leases_of(&self, name: usize) -> Vec<Lease> {
        let consumer = self.consumers[name].0;
        self.leases.iter().filter(|lease| lease.consumer == consumer).cloned().collect()
    }

    fn lease(&mut self, id: u64) -> Option<&mut Lease> {
        self.leases.iter_mut().find(|lease| lease.id == id)
    }

    fn over(&self, lease: &Lease) -> bool {
        self.now >= lease.ack_by() || self.dead.contains_key(&lease.consumer)
    }

    fn release_by(&self, lease: &Lease) -> Option<i64> {
        let room = lease.ack_by() - self.now > margin(lease.ack_wait);
        (room && !self.over(lease) && !lease.last_attempt).then(|| lease.ack_by())
    }

    fn standing(&self, id: u64) -> Result<State, Reply> {
        let Some(lease) = self.leases.iter().find(|lease| lease.id == id) else {
            return Err(match self.memory(id) {
                Some(Ended::As(kind)) => Reply::Settled(kind),
                Some(Ended::Expired | Ended::Gone) => Reply::Expired { forgotten: false },
                Some(Ended::Overtaken(_)) => Reply::Busy,
                None => Reply::Expired { forgotten: true },
            });
        };
        let over = match lease.state {
            State::Held => self.over(lease) || lease.past_deadline(self.now),
            State::Uncertain(_) => self.over(lease),
            State::Settling(..) => false,
        };
        if over { Err(Reply::Expired { forgotten: false }) } else { Ok(lease.state) }
    }

    fn held(&mut self, id: u64) -> Result<&mut Lease, Reply> {
        match self.standing(id)? {
            State::Held => Ok(self.lease(id).unwrap()),
            State::Uncertain(by) => Err(Reply::Settled(by)),
            State::Settling(..) => Err(Reply::Busy),
        }
    }

    fn end(&mut self, id: u64, ended: Ended) {
        self.leases.retain(|lease| lease.id != id);
        // One that was forgotten while it was held stays forgotten.
        if self.granted - id < self.remembered {
            self.ended.insert(id, ended);
        }
    }

    fn memory(&self, id: u64) -> Option<Ended> {
        let covered = id <= self.granted && self.granted - id < self.remembered;
        self.ended.get(&id).filter(|_| covered).copied()
    }
}
