//! Whether this replica may serve beside others that share no key with it: a pure decision. Keeps
//! how far this replica has come, because a replica that has served does not yield.
//!
//! ```text
//!            ready                 3 s on, or beside an established replica of its keys
//!  Waiting ────────▶ Serving ─────────────────────────────────────────▶ Established
//!     ◀──────────────── not ready                        all its keys replaced ─┘
//! ```
//! Replicas with a key in common are a group. A replica that is not established, and hears no
//! established replica of its group, compares its group with each group of strangers. The larger
//! group serves; of two of one size the group that has come further; of two that have come equally
//! far the group with the lower key name, so that never all wait for each other.
//!
//! Strangers speak in the clear, so anybody may have made them up. Hence:
//!
//! 1. an established replica never yields, whatever strangers say;
//! 2. a replica that hears an established replica of its own keys never yields: beats of kin are
//!    sealed;
//! 3. a stranger without a key file never makes a replica with a key file yield;
//! 4. a replica that is alone with its keys yields to established strangers: a wrong key in a
//!    roll-out stops the roll-out;
//! 5. of groups that all hear all, at least one serves.

use std::{
    cmp::Reverse,
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::members::{Claimed, PeerStatus, Tenure};
use crate::token::{InstanceId, KeyId};

/// A replica that has served for this long has heard every other, which beat once a second. Less
/// than the time until a replica is taken for gone: who was ready because of its kin is established
/// before it can miss that kin.
const ESTABLISHED_AFTER: Duration = Duration::from_secs(3);

/// How far this replica has come, and with which keys.
#[derive(Debug, Default)]
pub(super) struct ServiceHistory {
    /// Since when it has served without a break, and the keys that it had then.
    since: Option<(Instant, BTreeSet<KeyId>)>,
    established: BTreeSet<KeyId>,
}

impl ServiceHistory {
    /// This replica serves, or does not; `vouched` is that it hears an established replica that
    /// shares a key with it. To be told at least once a second.
    pub(super) fn observe(
        &mut self,
        serving: bool,
        vouched: bool,
        keys: &BTreeSet<KeyId>,
        now: Instant,
    ) {
        if !serving {
            self.since = None;
            return;
        }
        let same = |(_, before): &(Instant, BTreeSet<KeyId>)| !before.is_disjoint(keys);
        let since = self.since.take().filter(same).map_or(now, |(since, _)| since);
        if vouched || now.saturating_duration_since(since) >= ESTABLISHED_AFTER {
            self.established.clone_from(keys);
        }
        self.since = Some((since, keys.clone()));
    }

    /// How far it has come with these keys.
    pub(super) fn tenure(&self, keys: &BTreeSet<KeyId>) -> Tenure {
        match self.since {
            _ if !self.established.is_disjoint(keys) => Tenure::Established,
            Some(_) => Tenure::Serving,
            None => Tenure::Waiting,
        }
    }
}

/// This replica, to be compared with others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Us<'r> {
    pub(super) keys: &'r BTreeSet<KeyId>,
    /// It has a key file.
    pub(super) shared: bool,
    pub(super) tenure: Tenure,
}

/// What the others make of this replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// No stranger is there.
    Fine,
    /// Strangers are there, and change nothing.
    Beside(Strangers),
    /// It must not serve: the strangers do.
    Yields(Strangers),
}

/// Who shares no key with us, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Strangers {
    /// One of them, and its name.
    pub(super) one: InstanceId,
    pub(super) name: String,
    /// How many there are.
    pub(super) count: usize,
}

/// Replicas that share keys, each with one at least.
#[derive(Debug)]
struct Group {
    size: usize,
    tenure: Tenure,
    keys: BTreeSet<KeyId>,
}

impl Group {
    fn absorb(&mut self, other: &mut Self) {
        self.size += other.size;
        self.tenure = self.tenure.max(other.tenure);
        self.keys.append(&mut other.keys);
    }

    /// The greater serves.
    fn rank(&self) -> (usize, Tenure, Reverse<Option<&KeyId>>) {
        (self.size, self.tenure, Reverse(self.keys.first()))
    }
}

/// Whether this replica may serve.
pub(super) fn decide<'s>(
    us: Us<'_>,
    kin: impl Iterator<Item = &'s PeerStatus>,
    strangers: &[(InstanceId, Claimed)],
) -> Standing {
    let Some((one, first)) = strangers.first() else { return Standing::Fine };
    let of = |(one, claimed): (&InstanceId, &Claimed)| Strangers {
        one: *one,
        name: claimed.name.clone(),
        count: strangers.len(),
    };
    let mut ours = Group { size: 1, tenure: us.tenure, keys: us.keys.clone() };
    for said in kin {
        let (tenure, mut keys) = (said.tenure, said.keys.clone());
        ours.size += 1;
        ours.tenure = ours.tenure.max(tenure);
        ours.keys.append(&mut keys);
    }
    let rivals = strangers.iter().filter(|(_, claimed)| !us.shared || !claimed.keyless);
    let rivals: Vec<_> = rivals.collect();
    let Some((rival, claimed)) = rivals.first() else { return Standing::Beside(of((one, first))) };
    if ours.tenure == Tenure::Established {
        return Standing::Beside(of((rival, claimed)));
    }
    if !us.shared
        && let Some((keyed, claimed)) = rivals.iter().find(|(_, claimed)| !claimed.keyless)
    {
        return Standing::Yields(of((keyed, claimed)));
    }
    let groups = groups(&rivals, &mut ours);
    if groups.iter().any(|group| group.rank() > ours.rank()) {
        return Standing::Yields(of((rival, claimed)));
    }
    Standing::Beside(of((rival, claimed)))
}

/// The strangers in groups. Those that share a key with kin of ours are of our group.
fn groups(strangers: &[&(InstanceId, Claimed)], ours: &mut Group) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (_, claimed) in strangers {
        let Claimed { keys, tenure, .. } = claimed;
        let mut group = Group { size: 1, tenure: *tenure, keys: keys.clone() };
        for mut same in groups.extract_if(.., |other| !other.keys.is_disjoint(keys)) {
            group.absorb(&mut same);
        }
        groups.push(group);
    }
    while let Some(place) = groups.iter().position(|group| !group.keys.is_disjoint(&ours.keys)) {
        // What strangers say of themselves makes us no older: this can only keep us serving.
        ours.absorb(&mut groups.swap_remove(place));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use proptest::prelude::*;

    use Tenure::{Established, Serving, Waiting};

    const A: KeyId = [1; 4];
    const B: KeyId = [2; 4];
    const C: KeyId = [3; 4];

    /// A replica of a whole cluster, seen from nowhere.
    #[derive(Debug, Clone)]
    struct One {
        keys: BTreeSet<KeyId>,
        keyless: bool,
        tenure: Tenure,
    }

    fn one(keys: &[KeyId], tenure: Tenure) -> One {
        One { keys: keys.iter().copied().collect(), keyless: false, tenure }
    }

    fn keyless(key: u8, tenure: Tenure) -> One {
        One { keyless: true, ..one(&[[key; 4]], tenure) }
    }

    /// Whether the replica at this place may serve, where all hear all.
    fn serves(all: &[One], place: usize) -> bool {
        let us = &all[place];
        let others = (0_u8..).zip(all).filter(|(at, _)| usize::from(*at) != place);
        let (kin, strangers): (Vec<_>, Vec<_>) =
            others.partition(|(_, other)| !other.keys.is_disjoint(&us.keys));
        let kin: Vec<_> = kin.into_iter().map(|(_, one)| said(one)).collect();
        let strangers: Vec<_> = strangers
            .into_iter()
            .map(|(at, one)| {
                let One { keys, keyless, tenure } = one.clone();
                (InstanceId([at; 8]), Claimed { keys, keyless, tenure, name: String::new() })
            })
            .collect();
        let us = Us { keys: &us.keys, shared: !us.keyless, tenure: us.tenure };
        !matches!(decide(us, kin.iter(), &strangers), Standing::Yields(_))
    }

    fn said(one: &One) -> PeerStatus {
        PeerStatus {
            names: Vec::new(),
            keys: one.keys.clone(),
            tenure: one.tenure,
            version: String::new(),
            name: String::new(),
            room: 0,
            draining: false,
            uptime: 1,
            doubted: Vec::new(),
        }
    }

    #[test]
    fn who_serves_of_replicas_that_share_no_key() {
        let table: &[(&str, Vec<One>, &[bool])] = &[
            ("alone", vec![one(&[A], Waiting)], &[true]),
            (
                "a wrong key in a roll-out",
                vec![one(&[A], Established), one(&[A], Established), one(&[B], Waiting)],
                &[true, true, false],
            ),
            (
                "a wrong key in the roll-out of a single replica",
                vec![one(&[B], Established), one(&[A], Waiting)],
                &[true, false],
            ),
            (
                "two wrong ones beside two that serve",
                vec![
                    one(&[B], Established),
                    one(&[B], Established),
                    one(&[A], Waiting),
                    one(&[A], Waiting),
                ],
                &[true, true, false, false],
            ),
            (
                "a stray with a key file, and all others started anew",
                vec![one(&[A], Established), one(&[B], Waiting), one(&[B], Waiting)],
                &[true, true, true],
            ),
            (
                "a stray with a key file, and one of the others started anew",
                vec![
                    one(&[A], Established),
                    one(&[A], Established),
                    one(&[A], Established),
                    one(&[B], Established),
                    one(&[B], Waiting),
                ],
                &[true, true, true, true, true],
            ),
            (
                "a stray without a key file that was there first",
                vec![keyless(1, Established), one(&[B], Waiting)],
                &[true, true],
            ),
            (
                "one without a key file comes to one that serves, or that waits",
                vec![keyless(1, Waiting), one(&[B], Waiting)],
                &[false, true],
            ),
            (
                "of a deployment without a key file the first serves",
                vec![keyless(2, Established), keyless(1, Waiting), keyless(3, Waiting)],
                &[true, false, false],
            ),
            (
                "three and three at once",
                vec![[one(&[B], Waiting), one(&[A], Waiting)]; 3].concat(),
                &[false, true, false, true, false, true],
            ),
            (
                "three and three at once, and one of them was quicker",
                vec![
                    one(&[A], Waiting),
                    one(&[A], Waiting),
                    one(&[B], Serving),
                    one(&[B], Waiting),
                ],
                &[false, false, true, true],
            ),
            (
                "two groups that have served meet after a partition",
                vec![one(&[A], Established), one(&[B], Established), one(&[B], Established)],
                &[true, true, true],
            ),
            (
                "in the middle of a rotation nobody is a stranger's stranger",
                vec![
                    one(&[A], Waiting),
                    one(&[A, B], Waiting),
                    one(&[B], Waiting),
                    one(&[C], Waiting),
                ],
                &[true, true, true, false],
            ),
        ];
        for (name, all, expected) in table {
            let serving: Vec<_> = (0..all.len()).map(|place| serves(all, place)).collect();
            assert_eq!(serving, *expected, "{name}");
        }
    }

    fn tenure() -> impl Strategy<Value = Tenure> {
        prop_oneof![Just(Waiting), Just(Serving), Just(Established)]
    }

    fn replica() -> impl Strategy<Value = One> {
        let keys = prop::collection::btree_set((0_u8..5).prop_map(|key| [key; 4]), 1..3);
        (keys, prop::bool::weighted(0.2), tenure()).prop_map(|(keys, keyless, tenure)| {
            // A key that was made up is nobody else's.
            let own = || [[100 + keys.first().map_or(0, |key| key[0]); 4]].into();
            One { keys: if keyless { own() } else { keys.clone() }, keyless, tenure }
        })
    }

    proptest! {
        #[test]
        fn one_that_is_established_or_hears_kin_that_is_never_yields(
            all in prop::collection::vec(replica(), 1..9), place: prop::sample::Index,
        ) {
            let place = place.index(all.len());
            let established = |one: &One| {
                one.tenure == Established && !one.keys.is_disjoint(&all[place].keys)
            };
            if all.iter().any(established) {
                prop_assert!(serves(&all, place));
            }
        }

        #[test]
        fn whoever_is_there_somebody_serves(all in prop::collection::vec(replica(), 1..9)) {
            prop_assert!((0..all.len()).any(|place| serves(&all, place)));
        }

        #[test]
        fn one_without_a_key_file_changes_nothing_for_those_that_have_one(
            all in prop::collection::vec(replica(), 1..9), tenure in tenure(),
        ) {
            let with = [&all[..], &[keyless(200, tenure)]].concat();
            for place in (0..all.len()).filter(|place| !all[*place].keyless) {
                prop_assert_eq!(serves(&all, place), serves(&with, place));
            }
        }

        #[test]
        fn a_newcomer_with_a_key_of_its_own_yields_to_one_that_is_established(
            others in prop::collection::vec(replica(), 1..9), key: bool,
        ) {
            let keyed = |one: &One| !one.keyless && one.tenure == Established;
            prop_assume!(others.iter().any(keyed));
            // Its key's name decides nothing.
            let newcomer = one(&[[if key { 0x50 } else { 0x60 }; 4]], Waiting);
            let all = [&others[..], &[newcomer]].concat();
            prop_assert!(!serves(&all, all.len() - 1));
        }

        #[test]
        fn replicas_that_start_at_once_agree_on_one_group(
            groups in prop::collection::vec(1_usize..5, 1..5), sooner in prop::option::of(0_usize..5),
        ) {
            let mut all = Vec::new();
            for (key, size) in (1_u8..).zip(&groups) {
                let quick = if sooner == Some(usize::from(key)) { Serving } else { Waiting };
                all.extend(vec![one(&[[key; 4]], quick); *size]);
            }
            let serving = (0..all.len()).filter(|place| serves(&all, *place));
            let keys: BTreeSet<_> = serving.map(|place| all[place].keys.clone()).collect();
            prop_assert_eq!(keys.len(), 1);
        }
    }

    #[test]
    fn a_replica_is_established_after_three_seconds_or_at_once_beside_its_kin() {
        let (start, keys) = (clock::now(), BTreeSet::from([A]));
        let mut service = ServiceHistory::default();
        assert_eq!(service.tenure(&keys), Waiting);
        service.observe(true, false, &keys, start);
        service.observe(true, false, &keys, start + ESTABLISHED_AFTER / 2);
        assert_eq!(service.tenure(&keys), Serving);
        service.observe(false, false, &keys, start + ESTABLISHED_AFTER);
        assert_eq!(service.tenure(&keys), Waiting, "not without a break");
        service.observe(true, false, &keys, start + ESTABLISHED_AFTER);
        service.observe(true, false, &keys, start + 2 * ESTABLISHED_AFTER);
        assert_eq!(service.tenure(&keys), Established);
        service.observe(false, false, &keys, start + 2 * ESTABLISHED_AFTER);
        assert_eq!(service.tenure(&keys), Established, "NATS was away for a moment");

        let mut vouched = ServiceHistory::default();
        vouched.observe(true, true, &keys, start);
        assert_eq!(vouched.tenure(&keys), Established);
        vouched.observe(false, true, &keys, start);
        assert_eq!(vouched.tenure(&[B].into()), Waiting);
    }

    #[test]
    fn a_rotation_keeps_what_a_replica_is_and_other_keys_make_it_a_newcomer() {
        let start = clock::now();
        let mut service = ServiceHistory::default();
        service.observe(true, true, &[A].into(), start);
        for keys in [&[A, B][..], &[B], &[B, C]] {
            let keys = keys.iter().copied().collect();
            assert_eq!(service.tenure(&keys), Established, "{keys:?}");
            service.observe(true, false, &keys, start + ESTABLISHED_AFTER);
        }
        let other = [A].into();
        assert_eq!(service.tenure(&other), Serving);
        service.observe(true, false, &other, start + 2 * ESTABLISHED_AFTER);
        assert_eq!(service.tenure(&other), Serving, "its time counts from then");
    }
}
