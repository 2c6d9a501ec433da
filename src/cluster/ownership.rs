//! The names that this replica answers for: its own name, and those that leaving replicas handed to it.
//! For each name it knows how leases ended, and which leases are in the table here. Owns the answer to
//! "where is the lease of this token".

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::wire::{SettleOutcome, SettleResult};
use crate::{
    lease::{AdoptedLeases, Found, LeaseError, LeaseId, OutcomeSlice, SettleKind},
    lessor::{Action, Error},
    lock::lock,
    token::InstanceId,
};

/// A name whose leases have all ended is answered for this long. After that no replica answers for it:
/// its tokens are over by their own time.
const IDLE_NAME_LIFETIME: Duration = Duration::from_secs(1800);

/// The place of a lease that a token names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseLocation {
    /// In the lease table of this replica, under this number.
    Local(LeaseId),
    /// The lease ended like this. It was in the table of a replica that this one answers for.
    Ended(LeaseError),
    /// At the replica that answers for this name: the owner, or the replica that took over from this
    /// one.
    Remote(InstanceId),
}

/// The ownership, and the gate that a hand-over closes.
pub(super) struct SharedOwnership {
    names: Mutex<Ownership>,
    /// Held for reading while something is settled, and for writing while leases are handed over.
    gate: RwLock<()>,
}

/// While this is held, leases of this replica are not handed over.
pub struct OwnershipGuard<'p> {
    names: &'p Mutex<Ownership>,
    _gate: RwLockReadGuard<'p, ()>,
}

impl SharedOwnership {
    pub(super) fn new(us: InstanceId) -> Self {
        Self { names: Mutex::new(Ownership::new(us)), gate: RwLock::new(()) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Ownership> {
        lock(&self.names)
    }

    /// Keeps the leases of this replica here. During a hand-over it waits for the end of that.
    pub(super) async fn guard(&self) -> OwnershipGuard<'_> {
        OwnershipGuard { names: &self.names, _gate: self.gate.read().await }
    }

    /// Waits for the settlements under way, and lets no other begin while the gate is held.
    pub(super) async fn close_gate(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().await
    }
}

impl OwnershipGuard<'_> {
    /// The place of the lease with this owner and number.
    pub fn locate(&self, owner: InstanceId, lease: LeaseId) -> LeaseLocation {
        lock(self.names).locate(owner, lease)
    }
}

#[derive(Debug)]
pub(super) struct Ownership {
    us: InstanceId,
    /// The replica that took over everything, and since when. `None`: nothing was handed over.
    handed_to: Option<(InstanceId, Instant)>,
    adopted: BTreeMap<InstanceId, AdoptedName>,
}

/// A name that this replica took over.
#[derive(Debug)]
pub(super) struct AdoptedName {
    /// When the name last had a living lease, as far as is known.
    used: Instant,
    leases: AdoptedLeases,
}

impl Ownership {
    pub(super) fn new(us: InstanceId) -> Self {
        Self { us, handed_to: None, adopted: BTreeMap::new() }
    }

    /// The names that this replica answers for, its own first.
    pub(super) fn answered(&self) -> Vec<InstanceId> {
        if self.handed_to.is_some() { Vec::new() } else { self.listened() }
    }

    /// The names that this replica listens for. After a hand-over it passes their requests on.
    pub(super) fn listened(&self) -> Vec<InstanceId> {
        std::iter::once(self.us).chain(self.adopted.keys().copied()).collect()
    }

    pub(super) fn locate(&self, owner: InstanceId, lease: LeaseId) -> LeaseLocation {
        let adopted = self.adopted.get(&owner);
        if let Some((receiver, _)) = self.handed_to {
            let handed_over = owner == self.us || adopted.is_some();
            return LeaseLocation::Remote(if handed_over { receiver } else { owner });
        }
        if owner == self.us {
            return LeaseLocation::Local(lease);
        }
        match adopted.map(|adopted| adopted.leases.find(lease)) {
            None => LeaseLocation::Remote(owner),
            Some(Found::Here(lease)) => LeaseLocation::Local(lease),
            Some(Found::Ended(refusal)) => LeaseLocation::Ended(refusal),
        }
    }

    /// From now on every lease belongs to `receiver`.
    pub(super) fn hand_over(&mut self, receiver: InstanceId, now: Instant) {
        self.handed_to = Some((receiver, now));
        self.adopted.values_mut().for_each(|adopted| adopted.leases = AdoptedLeases::new());
    }

    /// When everything was handed over, if it was.
    pub(super) fn handed_over_at(&self) -> Option<Instant> {
        self.handed_to.map(|(_, at)| at)
    }

    /// From now on this replica answers for the names of a leaving replica.
    pub(super) fn adopt(&mut self, names: BTreeMap<InstanceId, AdoptedName>) {
        self.adopted.extend(names);
    }

    pub(super) fn adopted(&mut self) -> impl Iterator<Item = (InstanceId, &mut AdoptedLeases)> {
        self.adopted.iter_mut().map(|(name, adopted)| (*name, &mut adopted.leases))
    }

    /// The names that this replica answers for, and how long each has had no living lease.
    pub(super) fn idle(&self, now: Instant) -> Vec<(InstanceId, Duration)> {
        let own = (self.us, Duration::ZERO);
        let adopted = self.adopted.iter();
        let adopted = adopted.map(|(name, adopted)| (*name, now.duration_since(adopted.used)));
        std::iter::once(own).chain(adopted).collect()
    }

    /// Drops names that have had no living lease for long. Returns whether there were any. A lease that
    /// is still in the table here counts as living.
    pub(super) fn prune(&mut self, now: Instant) -> bool {
        let before = self.adopted.len();
        self.adopted.retain(|_, adopted| {
            if adopted.leases.adopted().next().is_some() {
                adopted.used = now;
            }
            now.duration_since(adopted.used) < IDLE_NAME_LIFETIME
        });
        self.adopted.len() < before
    }
}

impl AdoptedName {
    /// A name that has had no living lease for `idle`. Nothing is known of its leases yet.
    pub(super) fn new(idle: Duration, now: Instant) -> Self {
        Self { used: now.checked_sub(idle).unwrap_or(now), leases: AdoptedLeases::new() }
    }
}

/// The names of a leaving replica, each with how its leases ended, and which leases are here.
pub(super) fn gather(
    mut names: BTreeMap<InstanceId, AdoptedName>,
    memories: &[(InstanceId, OutcomeSlice)],
    taken: &[(InstanceId, LeaseId, LeaseId)],
) -> BTreeMap<InstanceId, AdoptedName> {
    for (name, piece) in memories {
        if let Some(adopted) = names.get_mut(name) {
            adopted.leases.remember(piece);
        }
    }
    for (name, there, here) in taken {
        if let Some(adopted) = names.get_mut(name) {
            adopted.leases.adopt(*there, *here);
        }
    }
    names
}

/// The answer for a lease that ended at a replica that this one took over from, as that replica would
/// have given it.
pub(super) fn ended(action: &Action, refusal: LeaseError) -> SettleResult {
    let kind = match action {
        Action::Ack => Some(SettleKind::Ack),
        Action::Nak(_) => Some(SettleKind::Nak),
        Action::Term(_) => Some(SettleKind::Term),
        Action::Extend(_) => None,
    };
    match refusal {
        LeaseError::Settled { by } if Some(by) == kind => Ok(SettleOutcome::duplicate()),
        LeaseError::Settled { .. } | LeaseError::Expired { .. } | LeaseError::Busy => {
            Err(Error::from(refusal).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const US: InstanceId = InstanceId([1; 8]);
    const GONE: InstanceId = InstanceId([2; 8]);
    const OTHER: InstanceId = InstanceId([3; 8]);

    fn lease(number: u64) -> LeaseId {
        LeaseId::new(number).unwrap()
    }

    fn names_of_two(idle: Duration, now: Instant) -> Ownership {
        let mut names = Ownership::new(US);
        let theirs = [(GONE, AdoptedName::new(idle, now))].into();
        names.adopt(gather(theirs, &[], &[(GONE, lease(7), lease(9))]));
        names
    }

    #[test]
    fn a_replica_that_has_left_names_the_receiver_of_its_leases_only() {
        let mut names = names_of_two(Duration::ZERO, clock::now());
        assert_eq!(names.locate(GONE, lease(7)), LeaseLocation::Local(lease(9)));
        let receiver = InstanceId([4; 8]);
        names.hand_over(receiver, clock::now());
        assert_eq!(names.locate(US, lease(1)), LeaseLocation::Remote(receiver));
        assert_eq!(names.locate(GONE, lease(7)), LeaseLocation::Remote(receiver));
        assert_eq!(names.locate(OTHER, lease(1)), LeaseLocation::Remote(OTHER));
        assert_eq!((names.answered().len(), names.listened()), (0, vec![US, GONE]));
    }

    #[test]
    fn a_name_without_living_leases_is_dropped_also_after_two_hand_overs() {
        let began = clock::now() + 2 * IDLE_NAME_LIFETIME;
        let mut names = names_of_two(Duration::ZERO, began);
        assert!(!names.prune(began + IDLE_NAME_LIFETIME), "its lease lives");
        names.adopted().for_each(|(_, leases)| *leases = AdoptedLeases::new());
        let half = began + IDLE_NAME_LIFETIME + IDLE_NAME_LIFETIME / 2;
        assert!(!names.prune(half));
        let handed_on = names.idle(half)[1].1;
        let mut names = Ownership::new(OTHER);
        names.adopt([(GONE, AdoptedName::new(handed_on, half))].into());
        assert!(!names.prune(began + 2 * IDLE_NAME_LIFETIME - Duration::from_secs(1)));
        assert!(names.prune(began + 2 * IDLE_NAME_LIFETIME));
        assert_eq!(names.locate(GONE, lease(7)), LeaseLocation::Remote(GONE));
    }
}
