//! The names that this replica answers for: its own, and those that leaving replicas handed to it,
//! each with what is known of its leases. Owns the answer to "whose is this token".

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::{
    lease::{Found, Inheritance, LeaseId, Memories, Refusal},
    token::InstanceId,
};

/// A name whose leases have all ended is answered for this long; then its tokens are nobody's,
/// which says the same in fewer words.
const KEPT: Duration = Duration::from_secs(1800);

/// Where a token's lease is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// In our table, under this number.
    Ours(LeaseId),
    /// It was in the table of a replica that we answer for, and ended like this.
    Ended(Refusal),
    /// Somebody else's, or nobody's.
    Others,
}

#[derive(Debug)]
pub(super) struct Names {
    us: InstanceId,
    /// All of it was handed to another replica: nothing is ours any more.
    gone: bool,
    inherited: BTreeMap<InstanceId, (Instant, Inheritance)>,
}

impl Names {
    pub(super) fn new(us: InstanceId) -> Self {
        Self { us, gone: false, inherited: BTreeMap::new() }
    }

    /// Its own first.
    pub(super) fn all(&self) -> Vec<InstanceId> {
        if self.gone {
            return Vec::new();
        }
        std::iter::once(self.us).chain(self.inherited.keys().copied()).collect()
    }

    pub(super) fn whose(&self, owner: InstanceId, lease: LeaseId) -> Whose {
        if self.gone {
            return Whose::Others;
        }
        if owner == self.us {
            return Whose::Ours(lease);
        }
        match self.inherited.get(&owner).map(|(_, inheritance)| inheritance.find(lease)) {
            None => Whose::Others,
            Some(Found::Here(lease)) => Whose::Ours(lease),
            Some(Found::Ended(refusal)) => Whose::Ended(refusal),
        }
    }

    /// From now on nothing is ours.
    pub(super) fn leave(&mut self) {
        self.gone = true;
        self.inherited.clear();
    }

    pub(super) fn has_left(&self) -> bool {
        self.gone
    }

    /// A leaving replica's names are ours from now on: how leases ended, and which are here.
    pub(super) fn inherit(
        &mut self,
        names: &[InstanceId],
        memories: &[(InstanceId, Memories)],
        taken: &[(InstanceId, LeaseId, LeaseId)],
        now: Instant,
    ) {
        for name in names {
            self.inherited.insert(*name, (now, Inheritance::new()));
        }
        for (name, piece) in memories {
            if let Some((_, inheritance)) = self.inherited.get_mut(name) {
                inheritance.remember(piece);
            }
        }
        for (name, there, here) in taken {
            if let Some((_, inheritance)) = self.inherited.get_mut(name) {
                inheritance.took(*there, *here);
            }
        }
    }

    pub(super) fn inherited(&mut self) -> impl Iterator<Item = (InstanceId, &mut Inheritance)> {
        self.inherited.iter_mut().map(|(name, (_, inheritance))| (*name, inheritance))
    }

    /// Lets go of names that have had no living lease for long.
    pub(super) fn prune(&mut self, alive: impl Fn(LeaseId) -> bool, now: Instant) {
        self.inherited.retain(|_, (used, inheritance)| {
            if inheritance.taken().any(|(_, here)| alive(here)) {
                *used = now;
            }
            now.duration_since(*used) < KEPT
        });
    }
}
