//! One page of a walk over the numbered rows of all replicas: which replica is asked next, and from which row on.
//! Each replica is walked from its first row to its last, one replica after the other.

use std::time::{Duration, Instant};

use super::{fleet::KnownReplicas, page::Place};
use crate::{
    clock,
    pb::{self, peer::v1::AdminAnswer},
    token::InstanceId,
};

/// Longest time for one page. A page ends early after that, and the next page continues.
pub(super) const PAGE_TIME: Duration = Duration::from_secs(4);

/// A walk over numbered rows of all replicas.
pub(super) struct Walk {
    known: KnownReplicas,
    /// Where it continues. `None`: it is at its end.
    next: Option<Place>,
    /// Only rows of this replica.
    only: Option<InstanceId>,
    unreachable: Vec<pb::UnreachableReplica>,
    until: Instant,
    has_begun: bool,
}

impl Walk {
    /// A walk that begins at `place`, or at the first replica.
    pub(super) fn new(
        known: KnownReplicas,
        place: Option<Place>,
        only: Option<InstanceId>,
    ) -> Self {
        let first = only.or(known.keys().next().copied());
        let first = first.map(|replica| Place { replica, after: 0 });
        let until = clock::now() + PAGE_TIME;
        Self {
            known,
            next: place.or(first),
            only,
            unreachable: Vec::new(),
            until,
            has_begun: false,
        }
    }

    /// The replicas, as they were when the walk began.
    pub(super) fn known(&self) -> &KnownReplicas {
        &self.known
    }

    /// Where the next page begins. `None`: this was the last page.
    pub(super) fn next(&self) -> Option<Place> {
        self.next
    }

    /// The replicas that did not answer.
    pub(super) fn into_unreachable(self) -> Vec<pb::UnreachableReplica> {
        self.unreachable
    }

    /// The place to ask at. `None`: the walk is at its end, or its time is over. A walk asks at least once.
    pub(super) fn go_on(&mut self) -> Option<Place> {
        let late = self.has_begun && clock::now() >= self.until;
        self.has_begun = true;
        self.next.filter(|_| !late)
    }

    /// Takes the answer of the replica at `place`. `None`: it did not answer.
    pub(super) fn took(
        &mut self,
        place: Place,
        answer: Result<AdminAnswer, pb::UnreachableReplica>,
    ) -> Option<AdminAnswer> {
        match answer {
            Ok(answer) if answer.more && answer.after > place.after => {
                self.next = Some(Place { after: answer.after, ..place });
                Some(answer)
            }
            Ok(answer) => {
                self.next = self.following(place.replica);
                Some(answer)
            }
            Err(missing) => {
                self.leave(place.replica, missing);
                None
            }
        }
    }

    /// Continues at the next replica: this one is missing.
    pub(super) fn leave(&mut self, replica: InstanceId, missing: pb::UnreachableReplica) {
        self.unreachable.push(missing);
        self.next = self.following(replica);
    }

    fn following(&self, replica: InstanceId) -> Option<Place> {
        let mut later = self.known.keys().filter(|other| **other > replica);
        let next = later.next().filter(|_| self.only.is_none());
        next.map(|replica| Place { replica: *replica, after: 0 })
    }
}
