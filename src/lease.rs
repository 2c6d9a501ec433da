//! The lease table: who may settle which delivery, and until when.
//!
//! ```text
//!          grant            lend, extend             begin                finish
//!  arrival ─────▶ HELD by us ──────────▶ HELD by a caller ────▶ SETTLING(kind) ────▶ gone: kind
//!                   │   ▲                  │  │        ▲          │     │   ▲
//!                   │   └────── keep ──────┘  │        └─ unsent ─┘     │   │ begin, same kind
//!         give_back │                         │ time     Ack or Term    ▼   │
//!                   ▼                         ▼          unconfirmed  UNCERTAIN(kind)
//!              gone: lapsed        gone: lapsed, lost ◀── ack_by ───────┘
//! ```
//! Two clocks end a lease: `deadline` is its holder's, `ack_by` is JetStream's (from then on
//! somebody else may have the message). It is alive before the earlier of the two. Where the
//! deadline is later than `ack_by`, progress moves `ack_by` along. A newer delivery of the same
//! message ends a lease in any state, and so does the end of its consumer, which however waits for
//! the outcome of a settlement under way.
//!
//! 1. An id is given out once, and its payload leaves the table once; how the lease ended is
//!    remembered for a while.
//! 2. Only a lease that is alive can be lent, extended, kept or begun; an UNCERTAIN one can be
//!    begun again in the same way until `ack_by`. What was once refused as over stays over.
//! 3. Of one message of one consumer there is at most one lease.
//! 4. Time does not end a SETTLING lease: its settlement is under way, and its outcome decides.
//! 5. `ack_by` moves later only by progress that was confirmed before it, counted from its sending,
//!    or by a consumer's new ack wait.
//! 6. Each lease that is not SETTLING is due exactly once, the others never.
//! 7. Time that the callers' clock did not count, because the machine was suspended, counts for every
//!    lease as soon as the table is told.
//! 7. The deadline of a caller is at most `longest` after the caller was lent the lease, or last
//!    extended it.
//!
//! Pure: no clock, no lock, no log. Callers pass `now` in, and put a lock around the table. As they
//! may read the clock before they get the lock, `now` may be earlier than one passed before; the
//! latest one counts. Every call is bounded: those that concern many leases work in steps.

mod ended;
mod entry;
mod handover;
mod revise;
mod store;
mod sweep;
mod time;
mod types;

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
        Assigned, BeginResult, ConsumerId, Due, GivenBack, LeaseError, LeaseId, LeaseSnapshot,
        LeaseStatus, PublishOutcome, SettleKind, SnapshotExpiry, Terms,
    },
};

/// The leases of one replica, each with a payload: what it takes to settle it. See the module.
#[derive(Debug)]
pub struct LeaseTable<T> {
    origin: Origin,
    /// The latest time that a caller told.
    now: Nanos,
    /// The longest time for which a caller may be lent a lease, or extend it.
    longest: Nanos,
    next: LeaseId,
    store: Store<T>,
}

impl<T> LeaseTable<T> {
    /// An empty table. `origin` is not after any time that it will be told. A caller keeps a lease
    /// for at most `longest` at a time. Of `remembered` leases it is known how they ended, at half a
    /// byte each, which are taken at once.
    pub fn new(origin: Instant, longest: Duration, remembered: usize) -> Self {
        Self {
            origin: Origin::new(origin),
            now: 0,
            longest: nanos(longest),
            next: LeaseId(NonZeroU64::MIN),
            store: Store::new(remembered),
        }
    }

    /// Leases a delivery that has just arrived to the proxy itself, as [`LeaseTable::keep`] would.
    /// An older lease of the same message ends, and comes out: JetStream gave it away, as the
    /// arrival proves.
    pub fn grant(&mut self, terms: Terms, payload: T) -> (LeaseId, Option<(LeaseId, T)>) {
        self.advance(terms.received);
        let id = self.next;
        // 2^64 leases, a million a second, take half a million years.
        self.next = LeaseId(id.0.saturating_add(1));
        let lease = Lease::new(&terms, payload, self.origin);
        (id, self.store.insert(id, lease))
    }

    /// Hands a lease to a caller, for this long from now, or for as long as JetStream waits by itself
    /// when there is no length. What is longer than the table's longest lease is lowered to it.
    ///
    /// # Errors
    /// When it is not held any more.
    pub fn assign(
        &mut self,
        id: LeaseId,
        length: Option<Duration>,
        now: Instant,
    ) -> Result<Assigned, LeaseError> {
        let now = self.advance(now);
        let (length, latest) = (length.map(nanos), now + self.longest);
        let lease = self.change(id, now, |lease| lease.assign(length, now, latest))?;
        let (deadline, ack_by) = (lease.deadline(), lease.ack_by());
        let settle_by = self.origin.at(deadline.min(ack_by));
        Ok(Assigned { deadline: self.origin.at(deadline), settle_by })
    }

    /// Moves the end of a lease to this long from now, which is returned; it may come closer. Without
    /// a length it is as long as the lease was granted, or as JetStream waits by itself if it was
    /// granted so. What is longer than the table's longest lease is lowered to it.
    ///
    /// # Errors
    /// When it is not held any more.
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

    /// Takes a lease back into the proxy's own hands, for the next caller: it lasts as long as
    /// JetStream waits by itself, and a last attempt, which cannot be given back, is kept alive
    /// until somebody takes it. Nothing happens to one that is not held any more.
    pub fn keep(&mut self, id: LeaseId, now: Instant) {
        let now = self.advance(now);
        // The next to lend it is told that it is over.
        let _ = self.change(id, now, Lease::keep);
    }

    /// Lets a settlement through, if the lease is alive and nobody else is settling it.
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
        let again = match self.standing(id, now).map(|lease| lease.state) {
            Ok(State::Held) => false,
            Ok(State::Uncertain(by)) if by == kind => true,
            Ok(State::Uncertain(by)) => return Err(LeaseError::Settled { by }),
            Ok(State::Settling { .. }) => return Err(LeaseError::Busy),
            Err(LeaseError::Settled { by }) if by == kind => return Ok(BeginResult::Duplicate),
            Err(error) => return Err(error),
        };
        self.store.update(id, |lease| lease.state = State::Settling { kind, again });
        let lease = self.store.get(id).ok_or(LeaseError::Expired { forgotten: true })?;
        Ok(BeginResult::Publish(&lease.payload))
    }

    /// What came of a settlement that [`LeaseTable::begin`] let through. The payload comes out when
    /// the lease leaves the table by this.
    ///
    /// A settlement that was not sent and finds the deadline passed leaves the lease to the next
    /// sweep, which may release it, though it is [`LeaseStatus::Gone`] for its holder.
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
        let State::Settling { kind, again } = lease.state else {
            return (self.after(id, now), None);
        };
        match conclude(kind, again, outcome, self.is_over(lease, now)) {
            Ok(state) => {
                self.store.update(id, |lease| lease.state = state);
                (self.after(id, now), None)
            }
            Err(ended) => (LeaseStatus::Gone, self.store.remove(id, ended)),
        }
    }

    /// Takes out a delivery that nobody was handed. `None` if it is not held any more. Of a last
    /// attempt this is the end, for it may not be released: [`LeaseTable::keep`] it while there is
    /// anybody left who might take it.
    pub fn give_back(&mut self, id: LeaseId, now: Instant) -> Option<GivenBack<T>> {
        let now = self.advance(now);
        let lease = self.store.get(id).filter(|lease| lease.state == State::Held)?;
        let over = self.is_over(lease, now);
        let release = lease.release_by(now).filter(|_| !over).map(|by| self.origin.at(by));
        let payload = self.store.remove(id, if over { Ended::Lost } else { Ended::Lapsed })?;
        Some(GivenBack { payload, release })
    }

    /// What is kept with a lease.
    pub fn payload(&self, id: LeaseId) -> Option<&T> {
        self.store.get(id).map(|lease| &lease.payload)
    }

    /// Changes what is kept with a lease, if it is there.
    pub fn note(&mut self, id: LeaseId, change: impl FnOnce(&mut T)) {
        self.store.update(id, |lease| change(&mut lease.payload));
    }

    /// Until when JetStream waits for this lease, less the margin, as far as is known.
    pub fn ack_by(&self, id: LeaseId) -> Option<Instant> {
        self.store.get(id).map(|lease| self.origin.at(lease.ack_by()))
    }

    /// Leases in the table.
    pub fn len(&self) -> usize {
        self.store.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Leases that are being settled.
    pub fn settling(&self) -> usize {
        self.store.settling()
    }

    /// Leases of one consumer.
    pub fn held_by(&self, consumer: ConsumerId) -> usize {
        self.store.held_by(consumer)
    }

    /// Panics if an invariant does not hold of every lease. Takes as long as there are leases: for
    /// tests.
    #[doc(hidden)]
    pub fn check(&self) {
        self.store.check_all();
    }

    /// Time as the table knows it: it never goes back.
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

    /// A lease that is not over, by any clock that applies to its state. It answers as if the
    /// sweep had already come to it.
    fn standing(&self, id: LeaseId, now: Nanos) -> Result<&Lease<T>, LeaseError> {
        let lease = self.store.get(id).ok_or_else(|| self.error(id))?;
        let over = match lease.state {
            State::Held => self.is_over(lease, now) || now >= lease.deadline(),
            State::Uncertain(_) => self.is_over(lease, now),
            State::Settling { .. } => false,
        };
        if over { Err(LeaseError::Expired { forgotten: false }) } else { Ok(lease) }
    }

    /// Why a lease that is not in the table is not.
    fn error(&self, id: LeaseId) -> LeaseError {
        match self.store.ended(id) {
            Some(Ended::Settled(by)) => LeaseError::Settled { by },
            Some(Ended::Lapsed | Ended::Lost) => LeaseError::Expired { forgotten: false },
            Some(Ended::Overtaken(_)) => LeaseError::Busy,
            None => LeaseError::Expired { forgotten: true },
        }
    }

    /// Somebody else may have the message.
    fn is_over(&self, lease: &Lease<T>, now: Nanos) -> bool {
        now >= lease.ack_by() || self.store.is_dead(lease.consumer)
    }

    /// Where a lease stands for its holder.
    fn after(&self, id: LeaseId, now: Nanos) -> LeaseStatus {
        match self.standing(id, now).map(|lease| lease.state) {
            Ok(State::Held) => LeaseStatus::Held,
            Ok(State::Settling { .. } | State::Uncertain(_)) => LeaseStatus::Uncertain,
            Err(_) => LeaseStatus::Gone,
        }
    }

    /// The outcome of a settlement whose message arrived anew meanwhile: the commonest case is a
    /// Nak whose redelivery is faster than its confirmation. It only says how the lease ended.
    fn finish_overtaken(&mut self, id: LeaseId, outcome: PublishOutcome) {
        if let Some(Ended::Overtaken(kind)) = self.store.ended(id)
            && let Err(ended) = conclude(kind, true, outcome, true)
        {
            self.store.remember(id, ended);
        }
    }
}
