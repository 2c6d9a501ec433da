//! Who else is there, by what each says once a second. Pure.
//!
//! Kin and strangers are kept apart: what is known of kin was sealed with a key of ours, and nothing
//! that is said in the clear changes it, replaces it or takes its place.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::token::{InstanceId, KeyId};

/// Kin that is listened to, and strangers: whoever may speak here can make the latter up.
const MAX_MEMBERS: usize = 1024;
/// A replica that has not been heard for this long is taken for gone: four beats.
pub(super) const MEMBER_TIMEOUT: Duration = Duration::from_secs(4);

/// How far a replica has come. Later is further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tenure {
    /// It does not serve.
    Waiting,
    /// It serves since a moment.
    Serving,
    /// It has served, with a key that it still has.
    Established,
}

/// What a replica that shares a key with us says of itself, under seal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PeerStatus {
    /// The names that it answers for, its own first.
    pub(super) names: Vec<InstanceId>,
    /// The keys that it has.
    pub(super) keys: BTreeSet<KeyId>,
    pub(super) tenure: Tenure,
    /// For people.
    pub(super) version: String,
    /// For people: where it runs.
    pub(super) name: String,
    /// Leases that it has room for.
    pub(super) room: u64,
    pub(super) draining: bool,
    /// Microseconds since it started; 0: it does not say it.
    pub(super) uptime: u64,
    /// Replicas whose clocks are too far from its own.
    pub(super) doubted: Vec<InstanceId>,
}

/// What somebody says of itself in the clear, who seals with no key of ours. Anybody can say it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claimed {
    /// The keys that it says it has.
    pub(super) keys: BTreeSet<KeyId>,
    /// It says that it has no key file.
    pub(super) keyless: bool,
    pub(super) tenure: Tenure,
    /// For people.
    pub(super) name: String,
}

/// What became of a beat of kin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// It is heard for the first time, or again after a silence.
    New,
    Known,
    /// It was said before the last one that was heard, and is passed over.
    Old,
}

/// The others, as they were last heard.
#[derive(Debug, Default)]
pub(super) struct Members {
    kin: BTreeMap<InstanceId, (Instant, PeerStatus)>,
    strangers: BTreeMap<InstanceId, (Instant, Claimed)>,
}

impl Members {
    /// A replica that shares a key with us spoke.
    pub(super) fn hear(&mut self, from: InstanceId, said: PeerStatus, now: Instant) -> Heard {
        let last = self.kin.get(&from);
        if last.is_some_and(|(_, last)| said.uptime != 0 && said.uptime <= last.uptime) {
            return Heard::Old;
        }
        let known = last.is_some_and(|(at, _)| is_living(*at, now));
        if !known && self.living(now).count() >= MAX_MEMBERS {
            return Heard::Old;
        }
        self.strangers.remove(&from);
        self.kin.insert(from, (now, said));
        if known { Heard::Known } else { Heard::New }
    }

    /// Somebody spoke who seals with no key of ours. `true`: for the first time, or again after a
    /// silence. In the name of living kin nobody else can speak.
    pub(super) fn hear_stranger(
        &mut self,
        from: InstanceId,
        claimed: Claimed,
        now: Instant,
    ) -> bool {
        self.strangers.retain(|_, (at, _)| is_living(*at, now));
        let is_kin = self.living(now).any(|(id, _)| id == from);
        let full = self.strangers.len() >= MAX_MEMBERS && !self.strangers.contains_key(&from);
        !is_kin && !full && self.strangers.insert(from, (now, claimed)).is_none()
    }

    /// Kin that has fallen silent since this was asked last.
    pub(super) fn lost(&mut self, now: Instant) -> Vec<(InstanceId, PeerStatus)> {
        let lost = self.kin.extract_if(.., |_, (at, _)| !is_living(*at, now));
        lost.map(|(id, (_, said))| (id, said)).collect()
    }

    /// The keys that all others have who share one with us; `None` when there are no such others.
    pub(super) fn common_keys(
        &self,
        ours: &BTreeSet<KeyId>,
        now: Instant,
    ) -> Option<BTreeSet<KeyId>> {
        let keys = self.kin(ours, now).map(|(_, said)| said.keys.clone());
        keys.reduce(|common, keys| &common & &keys)
    }

    /// Whether somebody answers for this name, as far as is known.
    pub(super) fn answers_for(&self, name: InstanceId, now: Instant) -> bool {
        self.living(now).any(|(_, said)| said.names.contains(&name))
    }

    /// Those that are there now, and were heard under a seal of ours.
    pub(super) fn living(&self, now: Instant) -> impl Iterator<Item = (InstanceId, &PeerStatus)> {
        let living = self.kin.iter().filter(move |(_, (at, _))| is_living(*at, now));
        living.map(|(id, (_, said))| (*id, said))
    }

    /// When each of those was heard last, and its uptime then.
    pub(super) fn heard_at(
        &self,
        now: Instant,
    ) -> impl Iterator<Item = (InstanceId, Instant, u64)> {
        let living = self.kin.iter().filter(move |(_, (at, _))| is_living(*at, now));
        living.map(|(id, (at, said))| (*id, *at, said.uptime))
    }

    /// Those of them that share a key with us still.
    pub(super) fn kin(
        &self,
        ours: &BTreeSet<KeyId>,
        now: Instant,
    ) -> impl Iterator<Item = (InstanceId, &PeerStatus)> {
        self.living(now).filter(|(_, said)| !said.keys.is_disjoint(ours))
    }

    /// Those that share none: strangers, and what was kin until our own keys changed.
    pub(super) fn strangers(
        &self,
        ours: &BTreeSet<KeyId>,
        now: Instant,
    ) -> Vec<(InstanceId, Claimed)> {
        let were_kin = self.living(now).map(|(id, said)| {
            let (keys, name) = (said.keys.clone(), said.name.clone());
            (id, Claimed { keys, keyless: false, tenure: said.tenure, name })
        });
        let strangers = self.strangers.iter().filter(|(_, (at, _))| is_living(*at, now));
        let strangers = strangers.map(|(id, (_, claimed))| (*id, claimed.clone()));
        let all = were_kin.chain(strangers);
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
            uptime,
            doubted: Vec::new(),
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
        members.hear(id(1), said(&KEYS[..2], 1), now);
        members.hear(id(2), said(&KEYS[1..], 1), now + MEMBER_TIMEOUT / 2);
        let soon = now + MEMBER_TIMEOUT / 2;
        assert_eq!(members.common_keys(&ours, soon), Some([KEYS[1]].into()));
        let (later, last) = (now + MEMBER_TIMEOUT, KEYS[1..].iter().copied().collect());
        assert_eq!(members.common_keys(&ours, later), Some(last));
        assert_eq!(members.common_keys(&ours, soon + MEMBER_TIMEOUT), None, "nobody is left");
    }

    #[test]
    fn what_is_said_in_the_clear_changes_nothing_of_what_was_sealed() {
        let now = clock::now();
        let mut members = Members::default();
        let ours: BTreeSet<_> = KEYS[..2].iter().copied().collect();
        members.hear(id(1), said(&KEYS[..2], 1), now);
        // In the name of kin, with a key of ours, and as many as there may be.
        assert!(!members.hear_stranger(id(1), claimed(&[[9; 4]]), now));
        members.hear_stranger(id(2), claimed(&KEYS[..1]), now);
        for number in 0..2 * MAX_MEMBERS as u64 {
            let made_up = InstanceId((number + 1000).to_be_bytes());
            members.hear_stranger(made_up, claimed(&[[9; 4]]), now);
        }
        assert_eq!(members.hear(id(3), said(&KEYS[..2], 1), now), Heard::New);
        assert_eq!(members.common_keys(&ours, now), Some(ours.clone()));
        assert_eq!(members.living(now).count(), 2);
        assert!(
            members.strangers(&ours, now).len() < MAX_MEMBERS,
            "the one with a key of ours is none"
        );
    }

    #[test]
    fn a_beat_that_is_repeated_by_somebody_else_is_passed_over() {
        let now = clock::now();
        let mut members = Members::default();
        assert_eq!(members.hear(id(1), said(&KEYS, 5), now), Heard::New);
        assert_eq!(members.hear(id(1), said(&KEYS, 6), now), Heard::Known);
        for uptime in [5, 6] {
            assert_eq!(
                members.hear(id(1), said(&KEYS, uptime), now + MEMBER_TIMEOUT / 2),
                Heard::Old
            );
        }
        assert_eq!(members.living(now + MEMBER_TIMEOUT).count(), 0, "nobody has kept it alive");
        assert_eq!(members.hear(id(1), said(&KEYS, 7), now + MEMBER_TIMEOUT), Heard::New);
        // A version that does not say it is believed.
        assert_eq!(members.hear(id(2), said(&KEYS, 0), now), Heard::New);
        assert_eq!(members.hear(id(2), said(&KEYS, 0), now), Heard::Known);
    }

    #[test]
    fn who_falls_silent_is_told_once() {
        let now = clock::now();
        let mut members = Members::default();
        members.hear(id(1), said(&KEYS, 1), now);
        assert_eq!(members.lost(now), []);
        assert_eq!(members.lost(now + MEMBER_TIMEOUT), [(id(1), said(&KEYS, 1))]);
        assert_eq!(members.lost(now + MEMBER_TIMEOUT), []);
    }

    #[test]
    fn kin_is_a_stranger_once_our_own_keys_have_changed() {
        let now = clock::now();
        let mut members = Members::default();
        members.hear(id(1), said(&KEYS[..1], 1), now);
        assert_eq!(members.strangers(&KEYS[..1].iter().copied().collect(), now), []);
        let strangers = members.strangers(&KEYS[1..].iter().copied().collect(), now);
        assert_eq!(strangers.len(), 1);
    }

    #[test]
    fn whoever_took_a_name_over_answers_for_it() {
        let now = clock::now();
        let mut members = Members::default();
        members.hear(id(1), PeerStatus { names: vec![id(1), id(9)], ..said(&KEYS, 1) }, now);
        assert!(members.answers_for(id(9), now));
        assert!(!members.answers_for(id(8), now));
        assert!(!members.answers_for(id(9), now + MEMBER_TIMEOUT));
    }
}
