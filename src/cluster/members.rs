//! The other replicas, as they were last heard. Pure.
//!
//! Two kinds are kept apart. A compatible peer shares a key with this replica, and its heartbeats are
//! sealed. An incompatible peer shares none, and its heartbeats are in the clear, so anyone can forge
//! them. No heartbeat in the clear changes or replaces what is known of a compatible peer.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::agreement::ObeyedPolicy;
use crate::token::{InstanceId, KeyId};

/// Peers of each kind that are remembered: anyone who may publish here can make up incompatible ones.
const MAX_MEMBERS: usize = 1024;
/// A replica that has not been heard for this long counts as gone: four heartbeats.
pub(super) const MEMBER_TIMEOUT: Duration = Duration::from_secs(4);
/// The connection of a silent replica may only be stalled. It is lost for good 12 s after it was last heard, and then
/// the replica reads its consumers again.
pub(super) const STALLED_TIME: Duration = Duration::from_secs(15);

/// How far a replica has come. Later is further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tenure {
    /// It does not serve.
    Waiting,
    /// It began to serve a moment ago.
    Serving,
    /// It has served, with a key that it still has.
    Established,
}

/// The status that a compatible peer sends of itself, under seal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PeerStatus {
    /// The names that it answers for, its own name first.
    pub(super) names: Vec<InstanceId>,
    /// The keys that it has.
    pub(super) keys: BTreeSet<KeyId>,
    pub(super) tenure: Tenure,
    /// For people.
    pub(super) version: String,
    /// For people: where it runs.
    pub(super) name: String,
    /// How many more leases it has room for.
    pub(super) room: u64,
    pub(super) draining: bool,
    /// Leases that it holds, Fetch calls that are open, and consumers that it serves.
    pub(super) counts: [u64; 3],
    /// Microseconds since it started. 0: its version does not send it.
    pub(super) uptime: u64,
    /// Replicas whose clocks differ too much from its own.
    pub(super) doubted: Vec<InstanceId>,
    /// The policy that it obeys.
    pub(super) policy: ObeyedPolicy,
}

/// Another replica, as its last heartbeat tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherReplica {
    /// Its identifier.
    pub instance: InstanceId,
    /// For people: where it runs.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Whether it should receive calls.
    pub serves: bool,
    /// Whether it is leaving.
    pub draining: bool,
    /// Leases that it holds, Fetch calls that are open, and consumers that it serves. An older version tells none.
    pub counts: [u64; 3],
    /// The policy that it obeys, by its digest. Empty: it has none, or an older version does not tell.
    pub policy: String,
    /// Its token keys.
    pub keys: Vec<KeyId>,
    /// How long ago it was heard.
    pub heard_ago: Duration,
}

/// The status that an incompatible peer sends of itself, in the clear. Anyone can send it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claimed {
    /// The keys that it claims to have.
    pub(super) keys: BTreeSet<KeyId>,
    /// It claims to have no key file.
    pub(super) keyless: bool,
    pub(super) tenure: Tenure,
    /// For people.
    pub(super) name: String,
}

/// How a heartbeat of a compatible peer compares to the earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// The first of this peer, or the first after a silence.
    New,
    Known,
    /// Sent before the last one that was heard. It is ignored.
    Old,
}

/// The others, as they were last heard.
#[derive(Debug, Default)]
pub(super) struct Members {
    compatible: BTreeMap<InstanceId, (Instant, PeerStatus)>,
    /// Compatible peers that fell silent and did not leave: when each was last heard.
    silent: BTreeMap<InstanceId, Instant>,
    incompatible: BTreeMap<InstanceId, (Instant, Claimed)>,
}

impl Members {
    /// Takes the heartbeat of a compatible peer.
    pub(super) fn heard(&mut self, from: InstanceId, status: PeerStatus, now: Instant) -> Heard {
        let last = self.compatible.get(&from);
        if last.is_some_and(|(_, last)| status.uptime != 0 && status.uptime <= last.uptime) {
            return Heard::Old;
        }
        let known = last.is_some_and(|(at, _)| is_living(*at, now));
        if !known && self.living(now).count() >= MAX_MEMBERS {
            return Heard::Old;
        }
        self.incompatible.remove(&from);
        self.compatible.insert(from, (now, status));
        if known { Heard::Known } else { Heard::New }
    }

    /// Takes the heartbeat of an incompatible peer. `true`: it is the first of this peer, or the first
    /// after a silence. A heartbeat in the name of a living compatible peer is ignored.
    pub(super) fn heard_in_the_clear(
        &mut self,
        from: InstanceId,
        claimed: Claimed,
        now: Instant,
    ) -> bool {
        let peers = &self.compatible;
        let is_compatible = peers.get(&from).is_some_and(|(at, _)| is_living(*at, now));
        self.incompatible.retain(|_, (at, _)| is_living(*at, now));
        let full = self.incompatible.len() >= MAX_MEMBERS && !self.incompatible.contains_key(&from);
        !is_compatible && !full && self.incompatible.insert(from, (now, claimed)).is_none()
    }

    /// Removes the compatible peers that have fallen silent, and returns them.
    pub(super) fn lost(&mut self, now: Instant) -> Vec<(InstanceId, PeerStatus)> {
        let lost = self.compatible.extract_if(.., |_, (at, _)| !is_living(*at, now));
        let lost: Vec<_> = lost.collect();
        let silent = lost.iter().filter(|(_, (_, status))| !status.draining);
        self.silent.extend(silent.map(|(id, (at, _))| (*id, *at)));
        self.silent.retain(|_, at| now.saturating_duration_since(*at) < STALLED_TIME);
        lost.into_iter().map(|(id, (_, status))| (id, status)).collect()
    }

    /// The peers that may hold leases: those that are there now, and those whose connection may be stalled.
    pub(super) fn may_hold_leases(&self, now: Instant) -> Vec<InstanceId> {
        let named = self.living(now).filter(|(_, status)| !status.names.is_empty());
        let stalled = self.silent.iter().filter(|(id, at)| {
            now.saturating_duration_since(**at) < STALLED_TIME && !self.compatible.contains_key(id)
        });
        named.map(|(id, _)| id).chain(stalled.map(|(id, _)| *id)).collect()
    }

    /// The keys that every compatible peer has. `None`: there is no compatible peer.
    pub(super) fn common_keys(
        &self,
        ours: &BTreeSet<KeyId>,
        now: Instant,
    ) -> Option<BTreeSet<KeyId>> {
        let keys = self.compatible(ours, now).map(|(_, status)| status.keys.clone());
        keys.reduce(|common, keys| &common & &keys)
    }

    /// Whether a living peer answers for this name, as far as is known.
    pub(super) fn answers_for(&self, name: InstanceId, now: Instant) -> bool {
        self.living(now).any(|(_, status)| status.names.contains(&name))
    }

    /// The living others: how many there are, and how many differ from this replica in their policy, their
    /// keys and their version.
    pub(super) fn differing(
        &self,
        ours: ObeyedPolicy,
        keys: &BTreeSet<KeyId>,
        now: Instant,
    ) -> [usize; 4] {
        let mut counts = [0; 4];
        for (_, status) in self.living(now) {
            let differs = [
                true,
                ours.differs(status.policy),
                status.keys != *keys,
                status.version != env!("CARGO_PKG_VERSION"),
            ];
            counts.iter_mut().zip(differs).for_each(|(count, it)| *count += usize::from(it));
        }
        counts
    }

    /// The peers that are there now, and whose heartbeats were sealed with a key of this replica.
    pub(super) fn living(&self, now: Instant) -> impl Iterator<Item = (InstanceId, &PeerStatus)> {
        let living = self.compatible.iter().filter(move |(_, (at, _))| is_living(*at, now));
        living.map(|(id, (_, status))| (*id, status))
    }

    /// The living peers that still share a key with this replica, for operators, in the order of their identifiers.
    pub(super) fn others(&self, ours: &BTreeSet<KeyId>, now: Instant) -> Vec<OtherReplica> {
        let shown = |(instance, status): (InstanceId, &PeerStatus)| OtherReplica {
            instance,
            name: status.name.clone(),
            version: status.version.clone(),
            serves: status.tenure != Tenure::Waiting && !status.draining,
            draining: status.draining,
            counts: status.counts,
            policy: status.policy.digits(),
            keys: status.keys.iter().copied().collect(),
            heard_ago: self
                .compatible
                .get(&instance)
                .map_or(Duration::ZERO, |(at, _)| now.saturating_duration_since(*at)),
        };
        self.compatible(ours, now).map(shown).collect()
    }

    /// When each living peer was heard last, and its uptime then.
    pub(super) fn heard_at(
        &self,
        now: Instant,
    ) -> impl Iterator<Item = (InstanceId, Instant, u64)> {
        let living = self.compatible.iter().filter(move |(_, (at, _))| is_living(*at, now));
        living.map(|(id, (at, status))| (*id, *at, status.uptime))
    }

    /// The living peers that still share a key with this replica.
    pub(super) fn compatible(
        &self,
        ours: &BTreeSet<KeyId>,
        now: Instant,
    ) -> impl Iterator<Item = (InstanceId, &PeerStatus)> {
        self.living(now).filter(|(_, status)| !status.keys.is_disjoint(ours))
    }

    /// The living peers that share no key with this replica. Some of them were compatible until the keys
    /// of this replica changed.
    pub(super) fn incompatible(
        &self,
        ours: &BTreeSet<KeyId>,
        now: Instant,
    ) -> Vec<(InstanceId, Claimed)> {
        let sealed = self.living(now).map(|(id, status)| {
            let (keys, name) = (status.keys.clone(), status.name.clone());
            (id, Claimed { keys, keyless: false, tenure: status.tenure, name })
        });
        let clear = self.incompatible.iter().filter(|(_, (at, _))| is_living(*at, now));
        let clear = clear.map(|(id, (_, claimed))| (*id, claimed.clone()));
        let all = sealed.chain(clear);
        all.filter(|(_, claimed)| claimed.keys.is_disjoint(ours)).collect()
    }
}

fn is_living(heard: Instant, now: Instant) -> bool {
    now.saturating_duration_since(heard) < MEMBER_TIMEOUT
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const KEYS: [KeyId; 3] = [[1; 4], [2; 4], [3; 4]];

    fn said(keys: &[KeyId], uptime: u64) -> PeerStatus {
        PeerStatus {
            names: Vec::new(),
            keys: keys.iter().copied().collect(),
            tenure: Tenure::Serving,
            version: "1".to_owned(),
            name: "pod".to_owned(),
            room: 1,
            draining: false,
            counts: [0; 3],
            uptime,
            doubted: Vec::new(),
            policy: ObeyedPolicy::Absent,
        }
    }

    fn claimed(keys: &[KeyId]) -> Claimed {
        let keys = keys.iter().copied().collect();
        Claimed { keys, keyless: false, tenure: Tenure::Serving, name: String::new() }
    }

    fn id(byte: u8) -> InstanceId {
        InstanceId([byte; 8])
    }

    #[test]
    fn a_key_is_common_when_every_living_replica_has_it() {
        let now = clock::now();
        let mut members = Members::default();
        let ours = KEYS.into();
        assert_eq!(members.common_keys(&ours, now), None);
        members.heard(id(1), said(&KEYS[..2], 1), now);
        members.heard(id(2), said(&KEYS[1..], 1), now + MEMBER_TIMEOUT / 2);
        let soon = now + MEMBER_TIMEOUT / 2;
        assert_eq!(members.common_keys(&ours, soon), Some([KEYS[1]].into()));
        let (later, last) = (now + MEMBER_TIMEOUT, KEYS[1..].iter().copied().collect());
        assert_eq!(members.common_keys(&ours, later), Some(last));
        assert_eq!(members.common_keys(&ours, soon + MEMBER_TIMEOUT), None, "nobody is left");
    }

    #[test]
    fn a_silent_replica_may_hold_leases_until_its_connection_is_lost() {
        let (now, mut members) = (clock::now(), Members::default());
        let named = |draining| PeerStatus { names: vec![id(1)], draining, ..said(&KEYS, 1) };
        members.heard(id(1), named(false), now);
        members.heard(id(2), named(true), now);
        assert_eq!(members.may_hold_leases(now), [id(1), id(2)]);
        let silent = now + MEMBER_TIMEOUT;
        assert_eq!(members.lost(silent).len(), 2);
        assert_eq!(members.may_hold_leases(silent), [id(1)], "the other has left");
        assert_eq!(members.may_hold_leases(now + STALLED_TIME), []);
        members.heard(id(1), PeerStatus { uptime: 2, ..named(false) }, silent);
        assert_eq!(members.may_hold_leases(silent), [id(1)], "it is named once");
    }

    #[test]
    fn a_heartbeat_in_the_clear_changes_no_compatible_peer() {
        let now = clock::now();
        let mut members = Members::default();
        let ours: BTreeSet<_> = KEYS[..2].iter().copied().collect();
        members.heard(id(1), said(&KEYS[..2], 1), now);
        // In the name of a compatible peer, with a key of this replica, and as many as there may be.
        assert!(!members.heard_in_the_clear(id(1), claimed(&[[9; 4]]), now));
        members.heard_in_the_clear(id(2), claimed(&KEYS[..1]), now);
        for number in 0..2 * MAX_MEMBERS as u64 {
            let made_up = InstanceId((number + 1000).to_be_bytes());
            members.heard_in_the_clear(made_up, claimed(&[[9; 4]]), now);
        }
        assert_eq!(members.heard(id(3), said(&KEYS[..2], 1), now), Heard::New);
        assert_eq!(members.common_keys(&ours, now), Some(ours.clone()));
        assert_eq!(members.living(now).count(), 2);
        assert!(
            members.incompatible(&ours, now).len() < MAX_MEMBERS,
            "a peer with a key of this replica is compatible"
        );
    }

    #[test]
    fn a_repeated_heartbeat_is_ignored() {
        let now = clock::now();
        let mut members = Members::default();
        assert_eq!(members.heard(id(1), said(&KEYS, 5), now), Heard::New);
        assert_eq!(members.heard(id(1), said(&KEYS, 6), now), Heard::Known);
        for uptime in [5, 6] {
            assert_eq!(
                members.heard(id(1), said(&KEYS, uptime), now + MEMBER_TIMEOUT / 2),
                Heard::Old
            );
        }
        assert_eq!(
            members.living(now + MEMBER_TIMEOUT).count(),
            0,
            "a repeat does not keep it alive"
        );
        assert_eq!(members.heard(id(1), said(&KEYS, 7), now + MEMBER_TIMEOUT), Heard::New);
        // A version that does not send its uptime is accepted.
        assert_eq!(members.heard(id(2), said(&KEYS, 0), now), Heard::New);
        assert_eq!(members.heard(id(2), said(&KEYS, 0), now), Heard::Known);
    }

    #[test]
    fn a_silent_replica_is_reported_once() {
        let now = clock::now();
        let mut members = Members::default();
        members.heard(id(1), said(&KEYS, 1), now);
        assert_eq!(members.lost(now), []);
        assert_eq!(members.lost(now + MEMBER_TIMEOUT), [(id(1), said(&KEYS, 1))]);
        assert_eq!(members.lost(now + MEMBER_TIMEOUT), []);
    }

    #[test]
    fn a_compatible_peer_becomes_incompatible_if_the_own_keys_change() {
        let now = clock::now();
        let mut members = Members::default();
        members.heard(id(1), said(&KEYS[..1], 1), now);
        assert_eq!(members.incompatible(&KEYS[..1].iter().copied().collect(), now), []);
        let incompatible = members.incompatible(&KEYS[1..].iter().copied().collect(), now);
        assert_eq!(incompatible.len(), 1);
    }

    #[test]
    fn a_replica_that_took_over_a_name_answers_for_it() {
        let now = clock::now();
        let mut members = Members::default();
        members.heard(id(1), PeerStatus { names: vec![id(1), id(9)], ..said(&KEYS, 1) }, now);
        assert!(members.answers_for(id(9), now));
        assert!(!members.answers_for(id(8), now));
        assert!(!members.answers_for(id(9), now + MEMBER_TIMEOUT));
    }
}
