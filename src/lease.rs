//! The lease table: who may settle which delivery, and until when.
//!
//! ```text
//!          grant            assign, extend           begin                finish
//!  arrival ─────▶ HELD by us ──────────▶ HELD by a caller ────▶ SETTLING(kind) ────▶ gone: kind
//!                   │   ▲                  │  │        ▲          │     │   ▲
//!                   │   └──── reclaim ─────┘  │        └─ unsent ─┘     │   │ begin, the same
//!         give_back │                         │ time     unconfirmed    ▼   │ Ack or Term
//!                   ▼                         ▼                       UNCERTAIN(kind)
//!              gone: lapsed        gone: lapsed, lost ◀── ack_by ───────┘
//! ```
//! A Nak is never published twice. JetStream may have applied it, and then a second Nak would hit the next
//! holder's delivery. So a lease with an UNCERTAIN Nak waits for `ack_by`.
//!
//! Two clocks end a lease. `deadline` is the holder's clock. `ack_by` is JetStream's clock: from then on
//! somebody else may have the message. A lease is alive before the earlier of the two. If the deadline is
//! later than `ack_by`, progress moves `ack_by`. A newer delivery of the same message ends a lease in any
//! state. The end of the consumer ends a lease, too, but waits for the outcome of a running settlement.
//!
//! 1. An id is given out once, and its payload leaves the table once. The way in which a lease ended is
//!    remembered for a while.
//! 2. Only a lease that is alive can be assigned, extended, reclaimed or begun. A lease with an UNCERTAIN Ack
//!    or Term can be begun again in the same way until `ack_by`. A lease that was once refused as over stays
//!    over.
//! 3. One message of one consumer has at most one lease.
//! 4. Time does not end a SETTLING lease: the outcome of its settlement decides.
//! 5. `ack_by` moves later in two cases only: progress was confirmed before `ack_by`, counted from its
//!    sending, or the consumer has a new ack wait.
//! 6. Each lease that is not SETTLING is due exactly once. A SETTLING lease is never due.
//! 7. Time that the callers' clock did not count, because the machine was suspended, counts for every
//!    lease as soon as the table learns of it.
//! 8. The deadline of a caller is at most `longest` after the assignment or the last extension.
//!
//! Pure: no clock, no lock, no log. Callers pass `now` in, and put a lock around the table. A caller may
//! read the clock before it gets the lock, so `now` may be earlier than the `now` of an earlier call. The
//! latest one counts. Every call is bounded: a call that concerns many leases works in steps.

mod again;
mod ended;
mod entry;
mod handover;
mod kept;
mod revise;
mod store;
mod sweep;
mod time;
mod types;
mod view;

use std::{
    num::NonZeroU64,
    time::{Duration, Instant},
};

use self::{
    ended::Ended,
    entry::{Lease, State, conclude},
    store::Store,
    time::{Nanos, Origin, nanos},
};
pub use self::{
    handover::{Adopted, AdoptedLeases, Found, OutcomeSlice},
    time::{MAX_MARGIN, ack_wait_of, margin},
    types::{
        Assigned, BeginResult, ConsumerEnd, ConsumerId, Due, GivenBack, LeaseError, LeaseId,
        LeaseOutcome, LeaseSnapshot, LeaseStatus, PublishOutcome, SettleKind, SnapshotExpiry,
        Terms,
    },
    view::{LeaseStage, LeaseView, Revoked},
};

/// The leases of one replica. Each has a payload with everything that a settlement needs. See the
/// [module](self).
#[derive(Debug)]
pub struct LeaseTable<T> {
    origin: Origin,
    /// The latest time that a caller has passed.
    now: Nanos,
    /// The longest time for which a caller may have a lease, or extend it.
    longest: Nanos,
    next: LeaseId,
    store: Store<T>,
}

impl<T> LeaseTable<T> {
    /// An empty table. `origin` is not later than any time that is passed to the table. A caller has a
    /// lease for at most `longest` at a time. The ends of the last `remembered` leases are kept, at half a
    /// byte each, which are allocated at once.
    pub fn new(origin: Instant, longest: Duration, remembered: usize) -> Self {
        Self {
            origin: Origin::new(origin),
            now: 0,
            longest: nanos(longest),
            next: LeaseId(NonZeroU64::MIN),
            store: Store::new(remembered),
        }
    }

    /// Leases a new delivery to the proxy itself, as [`LeaseTable::reclaim`] does. An older lease of the
    /// same message ends and is returned: the arrival proves that JetStream gave the message away.
    pub fn grant(&mut self, terms: Terms, payload: T) -> (LeaseId, Option<(LeaseId, T)>) {
        self.advance(terms.received);
        let id = self.next_id();
        let lease = Lease::new(&terms, payload, self.origin);
        (id, self.store.insert(id, lease))
    }

    /// Assigns a lease to a caller for `length` from now. Without a length it lasts as long as JetStream
    /// waits by itself. A longer time than the table's longest lease is lowered to that.
    ///
    /// # Errors
    /// The lease is no longer held.
    pub fn assign(
        &mut self,
        id: LeaseId,
        length: Option<Duration>,
        now: Instant,
    ) -> Result<Assigned, LeaseError> {
        self.assign_by(Lease::assign, id, length, now)
    }

    fn assign_by(
        &mut self,
        assign: fn(&mut Lease<T>, Option<Nanos>, Nanos, Nanos),
        id: LeaseId,
        length: Option<Duration>,
        now: Instant,
    ) -> Result<Assigned, LeaseError> {
        let now = self.advance(now);
        let (length, latest) = (length.map(nanos), now + self.longest);
        self.assign_with(id, now, |lease| assign(lease, length, now, latest))
    }

    fn assign_with(
        &mut self,
        id: LeaseId,
        now: Nanos,
        assign: impl FnOnce(&mut Lease<T>),
    ) -> Result<Assigned, LeaseError> {
        let lease = self.change(id, now, assign)?;
        let (deadline, settle_by) = (lease.deadline(), lease.settle_by(now));
        Ok(Assigned { deadline: self.origin.at(deadline), settle_by: self.origin.at(settle_by) })
    }

    /// Moves the end of a lease to `length` from now, and returns the new end, which may be earlier.
    /// Without a length it is the length of the assignment, or the time for which JetStream waits by
    /// itself. A longer time than the table's longest lease is lowered to that.
    ///
    /// # Errors
    /// The lease is no longer held.
    pub fn extend(
        &mut self,
        id: LeaseId,
        length: Option<Duration>,
        now: Instant,
    ) -> Result<Instant, LeaseError> {
        let now = self.advance(now);
        let (length, latest) = (length.map(nanos), now + self.longest);
        let lease = self.change(id, now, |lease| lease.extend(length, now, latest))?;
        let deadline = lease.deadline();
        Ok(self.origin.at(deadline))
    }

    /// Takes a lease back from a caller, for the next caller. The lease lasts as long as JetStream waits
    /// by itself. A last attempt cannot be given back, so it is kept alive until it is assigned. Does
    /// nothing if the lease is no longer held.
    pub fn reclaim(&mut self, id: LeaseId, now: Instant) {
        let now = self.advance(now);
        // The next assignment reports that the lease is over.
        let _ = self.change(id, now, Lease::reclaim);
    }

    /// Begins a settlement, if the lease is alive and nobody else is settling it.
    ///
    /// # Errors
    /// See [`LeaseError`].
    pub fn begin(
        &mut self,
        id: LeaseId,
        kind: SettleKind,
        now: Instant,
    ) -> Result<BeginResult<'_, T>, LeaseError> {
        let now = self.advance(now);
        let standing = self.standing(id, now).map(|lease| (lease.state, lease.ack_wait()));
        let retried = match standing {
            Ok((State::Held, _)) => false,
            Ok((State::Uncertain(SettleKind::Nak), ack_wait)) if kind == SettleKind::Nak => {
                return Ok(BeginResult::NakUnconfirmed { ack_wait });
            }
            Ok((State::Uncertain(by), _)) if by == kind => true,
            Ok((State::Uncertain(by), _)) => return Err(LeaseError::Settled { by }),
            Ok((State::Settling { .. }, _)) => return Err(LeaseError::Busy),
            Err(LeaseError::Settled { by }) if by == kind => return Ok(BeginResult::Duplicate),
            Err(error) => return Err(error),
        };
        self.store.update(id, |lease| lease.state = State::Settling { kind, retried });
        let lease = self.store.get(id).ok_or(LeaseError::Expired { forgotten: true })?;
        Ok(BeginResult::Publish(&lease.payload))
    }

    /// Ends a settlement that [`LeaseTable::begin`] has begun. Returns the payload if the lease leaves
    /// the table.
    ///
    /// If a settlement was not sent and the deadline has passed, the lease is [`LeaseStatus::Gone`] for
    /// its holder. It stays for the next sweep, which may release it.
    pub fn finish(
        &mut self,
        id: LeaseId,
        outcome: PublishOutcome,
        now: Instant,
    ) -> (LeaseStatus, Option<T>) {
        let now = self.advance(now);
        let Some(lease) = self.store.get(id) else {
            self.finish_overtaken(id, outcome);
            return (LeaseStatus::Gone, None);
        };
        let State::Settling { kind, retried } = lease.state else {
            return (self.after(id, now), None);
        };
        match conclude(kind, retried, outcome, self.is_over(lease, now)) {
            Ok(state) => {
                self.store.update(id, |lease| lease.state = state);
                (self.after(id, now), None)
            }
            Err(ended) => (LeaseStatus::Gone, self.store.remove(id, ended)),
        }
    }

    /// Takes out a delivery that no caller has. `None`: it is no longer held. A last attempt is lost by
    /// this, because it must not be released. [`LeaseTable::reclaim`] it while a caller may still come.
    pub fn give_back(&mut self, id: LeaseId, now: Instant) -> Option<GivenBack<T>> {
        let now = self.advance(now);
        let lease = self.store.get(id).filter(|lease| lease.state == State::Held)?;
        let over = self.is_over(lease, now);
        let release = lease.release_by(now).filter(|_| !over).map(|by| self.origin.at(by));
        let payload = self.store.remove(id, if over { Ended::Lost } else { Ended::Lapsed })?;
        Some(GivenBack { payload, release })
    }

    /// The payload of a lease.
    pub fn payload(&self, id: LeaseId) -> Option<&T> {
        self.store.get(id).map(|lease| &lease.payload)
    }

    /// Changes the payload of a lease, if the lease is in the table.
    pub fn update_payload(&mut self, id: LeaseId, change: impl FnOnce(&mut T)) {
        self.store.update(id, |lease| change(&mut lease.payload));
    }

    /// The time until which JetStream waits for this lease, minus the margin, as far as is known.
    pub fn ack_by(&self, id: LeaseId) -> Option<Instant> {
        self.store.get(id).map(|lease| self.origin.at(lease.ack_by()))
    }

    /// The number of leases in the table.
    pub fn len(&self) -> usize {
        self.store.len()
    }

    /// Whether the table has no leases.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// For each consumer that has leases: the payload of one of them, and their number.
    pub fn consumers(&self) -> impl Iterator<Item = (&T, usize)> {
        self.store.consumers().map(|(lease, count)| (&lease.payload, count))
    }

    /// The payload of the lease that is in the table for longest.
    pub fn oldest(&self) -> Option<&T> {
        self.store.after(None).next().map(|(_, lease)| &lease.payload)
    }

    /// The number of leases that are being settled.
    pub fn settling(&self) -> usize {
        self.store.settling()
    }

    /// The number of leases of one consumer.
    pub fn held_by(&self, consumer: ConsumerId) -> usize {
        self.store.held_by(consumer)
    }

    /// Panics if an invariant does not hold for every lease. Looks at every lease: for tests.
    #[doc(hidden)]
    pub fn check(&self) {
        self.store.check_all();
    }

    fn next_id(&mut self) -> LeaseId {
        let id = self.next;
        // 2^64 leases at a million a second last for half a million years.
        self.next = LeaseId(id.0.saturating_add(1));
        id
    }

    /// The table's time, which never goes back.
    fn advance(&mut self, now: Instant) -> Nanos {
        self.now = self.now.max(self.origin.since(now));
        self.now
    }

    /// Changes a lease that is held and alive.
    fn change(
        &mut self,
        id: LeaseId,
        now: Nanos,
        change: impl FnOnce(&mut Lease<T>),
    ) -> Result<&Lease<T>, LeaseError> {
        match self.standing(id, now)?.state {
            State::Held => self.store.update(id, change),
            State::Uncertain(by) => return Err(LeaseError::Settled { by }),
            State::Settling { .. } => return Err(LeaseError::Busy),
        }
        self.store.get(id).ok_or(LeaseError::Expired { forgotten: true })
    }

    /// A lease that is not over by any clock of its state. The answer is as if the sweep had already run.
    fn standing(&self, id: LeaseId, now: Nanos) -> Result<&Lease<T>, LeaseError> {
        let lease = self.store.get(id).ok_or_else(|| self.error(id))?;
        let over = match lease.state {
            State::Held => self.is_over(lease, now) || now >= lease.deadline(),
            State::Uncertain(_) => self.is_over(lease, now),
            State::Settling { .. } => false,
        };
        if over { Err(LeaseError::Expired { forgotten: false }) } else { Ok(lease) }
    }

    /// The reason why a lease is not in the table.
    fn error(&self, id: LeaseId) -> LeaseError {
        match self.store.ended(id) {
            Some(Ended::Settled(by)) => LeaseError::Settled { by },
            Some(Ended::Lapsed | Ended::Lost | Ended::Gone) => {
                LeaseError::Expired { forgotten: false }
            }
            Some(Ended::Overtaken(_)) => LeaseError::Busy,
            None => LeaseError::Expired { forgotten: true },
        }
    }

    /// Whether somebody else may have the message.
    fn is_over(&self, lease: &Lease<T>, now: Nanos) -> bool {
        now >= lease.ack_by() || self.store.has_ended(lease.consumer)
    }

    /// The state of a lease for its holder.
    fn after(&self, id: LeaseId, now: Nanos) -> LeaseStatus {
        match self.standing(id, now).map(|lease| lease.state) {
            Ok(State::Held) => LeaseStatus::Held,
            Ok(State::Settling { .. } | State::Uncertain(_)) => LeaseStatus::Uncertain,
            Err(_) => LeaseStatus::Gone,
        }
    }

    /// Ends a settlement whose message has arrived again in the meantime. In the most common case the
    /// redelivery after a Nak is faster than the confirmation. Only the end of the lease is noted.
    fn finish_overtaken(&mut self, id: LeaseId, outcome: PublishOutcome) {
        if let Some(Ended::Overtaken(kind)) = self.store.ended(id)
            && let Err(ended) = conclude(kind, true, outcome, true)
        {
            self.store.remember(id, ended);
        }
    }
}
