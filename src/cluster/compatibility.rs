//! Whether this replica may serve next to replicas that share no key with it: a pure decision. Remembers
//! how far this replica has come, because a replica that has served does not yield.
//!
//! ```text
//!            ready                 after 3 s, or next to an established compatible peer
//!  Waiting ────────▶ Serving ─────────────────────────────────────────▶ Established
//!     ◀──────────────── not ready                        all its keys replaced ─┘
//! ```
//! Replicas with a key in common are a group. A replica compares its group with each incompatible group,
//! unless it is established or hears an established replica of its group. The larger group serves. If two
//! groups have the same size, the group that has come further serves. If both have come equally far, the
//! group with the lower key name serves. So they never all wait for each other.
//!
//! Incompatible peers speak in the clear, so anyone can have made them up. Therefore:
//!
//! 1. An established replica never yields.
//! 2. A replica that hears an established compatible peer never yields: the heartbeats of compatible
//!    peers are sealed.
//! 3. A peer without a key file never makes a replica with a key file yield.
//! 4. A replica that is alone with its keys yields to established incompatible peers. So a wrong key in a
//!    rolling update stops the rolling update.
//! 5. If all groups hear all others, at least one group serves.

use std::{
    cmp::Reverse,
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::members::{Claimed, PeerStatus, Tenure};
use crate::token::{InstanceId, KeyId};

/// A replica that has served for this long has heard every other: each sends a heartbeat once a second.
/// It is less than the time until a replica counts as gone. So a replica that is ready because of a
/// compatible peer is established before that peer can count as gone.
const ESTABLISHED_AFTER: Duration = Duration::from_secs(3);

/// How far this replica has come, and with which keys.
#[derive(Debug, Default)]
pub(super) struct ServiceHistory {
    /// Since when it has served without a break, and the keys that it had then.
    since: Option<(Instant, BTreeSet<KeyId>)>,
    established: BTreeSet<KeyId>,
}

impl ServiceHistory {
    /// Takes note of whether this replica serves. `vouched`: it hears an established compatible peer. The
    /// caller says so at least once a second.
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
    /// This replica has a key file.
    pub(super) shared: bool,
    pub(super) tenure: Tenure,
}

/// Whether this replica serves next to the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Compatibility {
    /// No incompatible peer is there.
    Compatible,
    /// Incompatible peers are there, and this replica serves.
    Serves(Incompatible),
    /// This replica must not serve: the incompatible peers do.
    Yields(Incompatible),
}

/// The peers that share no key with this replica, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Incompatible {
    /// One of these peers, and its name.
    pub(super) one: InstanceId,
    pub(super) name: String,
    /// How many such peers there are.
    pub(super) count: usize,
}

/// Replicas that share keys, each with at least one other.
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

    /// The group with the greater rank serves.
    fn rank(&self) -> (usize, Tenure, Reverse<Option<&KeyId>>) {
        (self.size, self.tenure, Reverse(self.keys.first()))
    }
}

/// Whether this replica may serve.
pub(super) fn decide<'s>(
    us: Us<'_>,
    compatible: impl Iterator<Item = &'s PeerStatus>,
    incompatible: &[(InstanceId, Claimed)],
) -> Compatibility {
    let Some((one, first)) = incompatible.first() else { return Compatibility::Compatible };
    let of = |(one, claimed): (&InstanceId, &Claimed)| Incompatible {
        one: *one,
        name: claimed.name.clone(),
        count: incompatible.len(),
    };
    let mut ours = Group { size: 1, tenure: us.tenure, keys: us.keys.clone() };
    for status in compatible {
        let (tenure, mut keys) = (status.tenure, status.keys.clone());
        ours.size += 1;
        ours.tenure = ours.tenure.max(tenure);
        ours.keys.append(&mut keys);
    }
    let rivals = incompatible.iter().filter(|(_, claimed)| !us.shared || !claimed.keyless);
    let rivals: Vec<_> = rivals.collect();
    let Some((rival, claimed)) = rivals.first() else {
        return Compatibility::Serves(of((one, first)));
    };
    if ours.tenure == Tenure::Established {
        return Compatibility::Serves(of((rival, claimed)));
    }
    if !us.shared
        && let Some((keyed, claimed)) = rivals.iter().find(|(_, claimed)| !claimed.keyless)
    {
        return Compatibility::Yields(of((keyed, claimed)));
    }
    let groups = groups(&rivals, &mut ours);
    if groups.iter().any(|group| group.rank() > ours.rank()) {
        return Compatibility::Yields(of((rival, claimed)));
    }
    Compatibility::Serves(of((rival, claimed)))
}

/// The incompatible peers in groups. A peer that shares a key with a compatible peer joins `ours`.
fn groups(incompatible: &[&(InstanceId, Claimed)], ours: &mut Group) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (_, claimed) in incompatible {
        let Claimed { keys, tenure, .. } = claimed;
        let mut group = Group { size: 1, tenure: *tenure, keys: keys.clone() };
        for mut same in groups.extract_if(.., |other| !other.keys.is_disjoint(keys)) {
            group.absorb(&mut same);
        }
        groups.push(group);
    }
    while let Some(index) = groups.iter().position(|group| !group.keys.is_disjoint(&ours.keys)) {
        // A larger group can only keep this replica serving, so forged peers do no harm here.
        ours.absorb(&mut groups.swap_remove(index));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::cluster::agreement::ObeyedPolicy;
    use proptest::prelude::*;

    use Tenure::{Established, Serving, Waiting};

    const A: KeyId = [1; 4];
    const B: KeyId = [2; 4];
    const C: KeyId = [3; 4];

    /// One replica of a whole cluster.
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

    /// Whether the replica at this index may serve, if all hear all.
    fn serves(all: &[One], index: usize) -> bool {
        let us = &all[index];
        let others = (0_u8..).zip(all).filter(|(at, _)| usize::from(*at) != index);
        let (compatible, incompatible): (Vec<_>, Vec<_>) =
            others.partition(|(_, other)| !other.keys.is_disjoint(&us.keys));
        let compatible: Vec<_> = compatible.into_iter().map(|(_, one)| status(one)).collect();
        let incompatible: Vec<_> = incompatible
            .into_iter()
            .map(|(at, one)| {
                let One { keys, keyless, tenure } = one.clone();
                (InstanceId([at; 8]), Claimed { keys, keyless, tenure, name: String::new() })
            })
            .collect();
        let us = Us { keys: &us.keys, shared: !us.keyless, tenure: us.tenure };
        !matches!(decide(us, compatible.iter(), &incompatible), Compatibility::Yields(_))
    }

    fn status(one: &One) -> PeerStatus {
        PeerStatus {
            names: Vec::new(),
            keys: one.keys.clone(),
            tenure: one.tenure,
            version: String::new(),
            name: String::new(),
            room: 0,
            draining: false,
            counts: [0; 3],
            uptime: 1,
            doubted: Vec::new(),
            policy: ObeyedPolicy::Absent,
        }
    }

    #[test]
    fn one_group_serves_if_groups_share_no_key() {
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
                "two wrong keys next to two replicas that serve",
                vec![
                    one(&[B], Established),
                    one(&[B], Established),
                    one(&[A], Waiting),
                    one(&[A], Waiting),
                ],
                &[true, true, false, false],
            ),
            (
                "a stray with a key file, and all others restarted",
                vec![one(&[A], Established), one(&[B], Waiting), one(&[B], Waiting)],
                &[true, true, true],
            ),
            (
                "a stray with a key file, and one of the others restarted",
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
                "a replica without a key file meets a replica that waits",
                vec![keyless(1, Waiting), one(&[B], Waiting)],
                &[false, true],
            ),
            (
                "the first replica serves if no replica has a key file",
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
                "in a rotation, a chain of common keys is one group",
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
            let serving: Vec<_> = (0..all.len()).map(|index| serves(all, index)).collect();
            assert_eq!(serving, *expected, "{name}");
        }
    }

    fn tenure() -> impl Strategy<Value = Tenure> {
        prop_oneof![Just(Waiting), Just(Serving), Just(Established)]
    }

    fn replica() -> impl Strategy<Value = One> {
        let keys = prop::collection::btree_set((0_u8..5).prop_map(|key| [key; 4]), 1..3);
        (keys, prop::bool::weighted(0.2), tenure()).prop_map(|(keys, keyless, tenure)| {
            // No other replica has a random key.
            let own = || [[100 + keys.first().map_or(0, |key| key[0]); 4]].into();
            One { keys: if keyless { own() } else { keys.clone() }, keyless, tenure }
        })
    }

    proptest! {
        #[test]
        fn a_replica_with_an_established_compatible_peer_never_yields(
            all in prop::collection::vec(replica(), 1..9), index: prop::sample::Index,
        ) {
            let index = index.index(all.len());
            let established = |one: &One| {
                one.tenure == Established && !one.keys.is_disjoint(&all[index].keys)
            };
            if all.iter().any(established) {
                prop_assert!(serves(&all, index));
            }
        }

        #[test]
        fn at_least_one_replica_serves(all in prop::collection::vec(replica(), 1..9)) {
            prop_assert!((0..all.len()).any(|index| serves(&all, index)));
        }

        #[test]
        fn a_peer_without_a_key_file_changes_nothing_for_replicas_with_one(
            all in prop::collection::vec(replica(), 1..9), tenure in tenure(),
        ) {
            let with = [&all[..], &[keyless(200, tenure)]].concat();
            for index in (0..all.len()).filter(|index| !all[*index].keyless) {
                prop_assert_eq!(serves(&all, index), serves(&with, index));
            }
        }

        #[test]
        fn a_newcomer_with_another_key_yields_to_an_established_replica(
            others in prop::collection::vec(replica(), 1..9), key: bool,
        ) {
            let keyed = |one: &One| !one.keyless && one.tenure == Established;
            prop_assume!(others.iter().any(keyed));
            // The name of its key decides nothing.
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
            let serving = (0..all.len()).filter(|index| serves(&all, *index));
            let keys: BTreeSet<_> = serving.map(|index| all[index].keys.clone()).collect();
            prop_assert_eq!(keys.len(), 1);
        }
    }

    #[test]
    fn a_replica_is_established_after_three_seconds_or_if_it_is_vouched_for() {
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
    fn a_rotation_keeps_the_tenure_and_other_keys_reset_it() {
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
