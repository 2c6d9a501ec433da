//! The names that this replica answers for: its own, and those that leaving replicas handed to it,
//! each with what is known of its leases. Owns the answer to "whose is this token".

use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use tokio::sync::RwLockReadGuard;

use crate::{
    lease::{AdoptedLeases, Found, LeaseError, LeaseId, OutcomeSlice},
    lock::lock,
    token::InstanceId,
};

/// A name whose leases have all ended is answered for this long; then its tokens are nobody's:
/// what they name is over by their own time.
const IDLE_NAME_LIFETIME: Duration = Duration::from_secs(1800);

/// Where a token's lease is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseLocation {
    /// In our table, under this number.
    Ours(LeaseId),
    /// It was in the table of a replica that we answer for, and ended like this.
    Ended(LeaseError),
    /// The one to ask: its owner, or who has taken that one's leases over from us.
    Elsewhere(InstanceId),
}

/// Our leases stay ours for as long as this is held.
pub struct OwnershipGuard<'p> {
    names: &'p Mutex<Ownership>,
    _gate: RwLockReadGuard<'p, ()>,
}

impl<'p> OwnershipGuard<'p> {
    pub(super) fn new(names: &'p Mutex<Ownership>, gate: RwLockReadGuard<'p, ()>) -> Self {
        Self { names, _gate: gate }
    }

    /// Where the lease of that owner and number is.
    pub fn whose(&self, owner: InstanceId, lease: LeaseId) -> LeaseLocation {
        lock(self.names).whose(owner, lease)
    }
}

#[derive(Debug)]
pub(super) struct Ownership {
    us: InstanceId,
    /// Who has all of it since when: nothing is ours any more.
    left: Option<(InstanceId, Instant)>,
    inherited: BTreeMap<InstanceId, AdoptedName>,
}

/// What is known of a replica that we answer for.
#[derive(Debug)]
pub(super) struct AdoptedName {
    /// When it last had a living lease, as far as is known.
    used: Instant,
    leases: AdoptedLeases,
}

impl Ownership {
    pub(super) fn new(us: InstanceId) -> Self {
        Self { us, left: None, inherited: BTreeMap::new() }
    }

    /// Those that we answer for, our own first.
    pub(super) fn answered(&self) -> Vec<InstanceId> {
        if self.left.is_some() { Vec::new() } else { self.heard() }
    }

    /// Those that we listen for: what still comes for those that are another's now goes to that one.
    pub(super) fn heard(&self) -> Vec<InstanceId> {
        std::iter::once(self.us).chain(self.inherited.keys().copied()).collect()
    }

    pub(super) fn whose(&self, owner: InstanceId, lease: LeaseId) -> LeaseLocation {
        let inherited = self.inherited.get(&owner);
        if let Some((heir, _)) = self.left {
            let handed = owner == self.us || inherited.is_some();
            return LeaseLocation::Elsewhere(if handed { heir } else { owner });
        }
        if owner == self.us {
            return LeaseLocation::Ours(lease);
        }
        match inherited.map(|inherited| inherited.leases.find(lease)) {
            None => LeaseLocation::Elsewhere(owner),
            Some(Found::Here(lease)) => LeaseLocation::Ours(lease),
            Some(Found::Ended(refusal)) => LeaseLocation::Ended(refusal),
        }
    }

    /// From now on nothing is ours.
    pub(super) fn leave(&mut self, heir: InstanceId, now: Instant) {
        self.left = Some((heir, now));
        self.inherited.values_mut().for_each(|inherited| inherited.leases = AdoptedLeases::new());
    }

    /// To whom, and when, if it was all handed over.
    pub(super) fn left(&self) -> Option<(InstanceId, Instant)> {
        self.left
    }

    /// A leaving replica's names are ours from now on.
    pub(super) fn inherit(&mut self, theirs: BTreeMap<InstanceId, AdoptedName>) {
        self.inherited.extend(theirs);
    }

    pub(super) fn inherited(&mut self) -> impl Iterator<Item = (InstanceId, &mut AdoptedLeases)> {
        self.inherited.iter_mut().map(|(name, inherited)| (*name, &mut inherited.leases))
    }

    /// Those that we answer for, and how long each has had no living lease.
    pub(super) fn idle(&self, now: Instant) -> Vec<(InstanceId, Duration)> {
        let ours = (self.us, Duration::ZERO);
        let theirs = self.inherited.iter();
        let theirs = theirs.map(|(name, theirs)| (*name, now.duration_since(theirs.used)));
        std::iter::once(ours).chain(theirs).collect()
    }

    /// Lets go of names that have had no living lease for long; whether there are any. Leases that
    /// are still taken count as living.
    pub(super) fn prune(&mut self, now: Instant) -> bool {
        let before = self.inherited.len();
        self.inherited.retain(|_, inherited| {
            if inherited.leases.adopted().next().is_some() {
                inherited.used = now;
            }
            now.duration_since(inherited.used) < IDLE_NAME_LIFETIME
        });
        self.inherited.len() < before
    }
}

impl AdoptedName {
    /// Nothing is known yet of one that has had no living lease for this long.
    pub(super) fn new(idle: Duration, now: Instant) -> Self {
        Self { used: now.checked_sub(idle).unwrap_or(now), leases: AdoptedLeases::new() }
    }
}

/// What a leaving replica has handed over, by its names: how leases ended, and which are here.
pub(super) fn gather(
    mut theirs: BTreeMap<InstanceId, AdoptedName>,
    memories: &[(InstanceId, OutcomeSlice)],
    taken: &[(InstanceId, LeaseId, LeaseId)],
) -> BTreeMap<InstanceId, AdoptedName> {
    for (name, piece) in memories {
        if let Some(inherited) = theirs.get_mut(name) {
            inherited.leases.remember(piece);
        }
    }
    for (name, there, here) in taken {
        if let Some(inherited) = theirs.get_mut(name) {
            inherited.leases.adopt(*there, *here);
        }
    }
    theirs
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
        names.inherit(gather(theirs, &[], &[(GONE, lease(7), lease(9))]));
        names
    }

    #[test]
    fn whoever_has_left_names_the_heir_of_what_was_its_own_and_nothing_else() {
        let mut names = names_of_two(Duration::ZERO, clock::now());
        assert_eq!(names.whose(GONE, lease(7)), LeaseLocation::Ours(lease(9)));
        let heir = InstanceId([4; 8]);
        names.leave(heir, clock::now());
        assert_eq!(names.whose(US, lease(1)), LeaseLocation::Elsewhere(heir));
        assert_eq!(names.whose(GONE, lease(7)), LeaseLocation::Elsewhere(heir));
        assert_eq!(names.whose(OTHER, lease(1)), LeaseLocation::Elsewhere(OTHER));
        assert_eq!((names.answered().len(), names.heard()), (0, vec![US, GONE]));
    }

    #[test]
    fn a_name_without_living_leases_is_let_go_also_if_it_went_from_heir_to_heir() {
        let began = clock::now() + 2 * IDLE_NAME_LIFETIME;
        let mut names = names_of_two(Duration::ZERO, began);
        assert!(!names.prune(began + IDLE_NAME_LIFETIME), "its lease lives");
        names.inherited().for_each(|(_, leases)| *leases = AdoptedLeases::new());
        let half = began + IDLE_NAME_LIFETIME + IDLE_NAME_LIFETIME / 2;
        assert!(!names.prune(half));
        let handed_on = names.idle(half)[1].1;
        let mut names = Ownership::new(OTHER);
        names.inherit([(GONE, AdoptedName::new(handed_on, half))].into());
        assert!(!names.prune(began + 2 * IDLE_NAME_LIFETIME - Duration::from_secs(1)));
        assert!(names.prune(began + 2 * IDLE_NAME_LIFETIME));
        assert_eq!(names.whose(GONE, lease(7)), LeaseLocation::Elsewhere(GONE));
    }
}
