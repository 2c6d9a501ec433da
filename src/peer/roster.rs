//! Who else is there, by what each says once a second. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::token::{InstanceId, KeyId};

/// Replicas that are listened to: whoever may speak here can make them up.
const MOST: usize = 1024;
/// A replica that has not been heard for this long is taken for gone.
const SILENT: Duration = Duration::from_secs(4);

/// What a replica says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Said {
    /// The names that it answers for, its own first.
    pub(super) names: Vec<InstanceId>,
    /// The keys that it has.
    pub(super) keys: BTreeSet<KeyId>,
    /// When it started: milliseconds since the Unix epoch.
    pub(super) started: u64,
    pub(super) version: String,
    /// Leases that it has room for.
    pub(super) room: u64,
    pub(super) draining: bool,
}

/// The others, as they were last heard.
#[derive(Debug, Default)]
pub(super) struct Roster {
    heard: BTreeMap<InstanceId, (Instant, Said)>,
}

/// What the others make of us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing is in the way.
    Fine,
    /// We share no key with an older replica: tokens of either are nothing to the other.
    Stranger(InstanceId),
}

impl Roster {
    /// Somebody spoke. `true`: for the first time, or again after a silence.
    pub(super) fn hear(&mut self, from: InstanceId, said: Said, now: Instant) -> bool {
        self.heard.retain(|_, (at, _)| now.saturating_duration_since(*at) < SILENT);
        if self.heard.len() >= MOST && !self.heard.contains_key(&from) {
            return false;
        }
        self.heard.insert(from, (now, said)).is_none()
    }

    /// The keys that all others have who share one with us; `None` when there are no such others.
    pub(super) fn common_keys(
        &self,
        ours: &BTreeSet<KeyId>,
        now: Instant,
    ) -> Option<BTreeSet<KeyId>> {
        let akin = self.living(now).filter(|(_, said)| !said.keys.is_disjoint(ours));
        akin.map(|(_, said)| said.keys.clone()).reduce(|common, keys| &common & &keys)
    }

    /// Whether we may serve beside the others. `ours` is when we started, and who we are.
    pub(super) fn standing(
        &self,
        ours: (u64, InstanceId),
        keys: &BTreeSet<KeyId>,
        now: Instant,
    ) -> Standing {
        let elder = |id, said: &Said| (said.started, id) < ours;
        let stranger =
            self.living(now).find(|(id, said)| elder(*id, said) && said.keys.is_disjoint(keys));
        stranger.map_or(Standing::Fine, |(id, _)| Standing::Stranger(id))
    }

    /// Whether somebody answers for this name, as far as is known.
    pub(super) fn answers_for(&self, name: InstanceId, now: Instant) -> bool {
        self.living(now).any(|(_, said)| said.names.contains(&name))
    }

    /// Those that are there now.
    pub(super) fn living(&self, now: Instant) -> impl Iterator<Item = (InstanceId, &Said)> {
        let alive = move |at: &Instant| now.saturating_duration_since(*at) < SILENT;
        self.heard.iter().filter(move |(_, (at, _))| alive(at)).map(|(id, (_, said))| (*id, said))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const KEYS: [KeyId; 3] = [[1; 4], [2; 4], [3; 4]];

    fn said(keys: &[KeyId], started: u64) -> Said {
        Said {
            names: Vec::new(),
            keys: keys.iter().copied().collect(),
            started,
            version: "1".to_owned(),
            room: 1,
            draining: false,
        }
    }

    fn id(byte: u8) -> InstanceId {
        InstanceId([byte; 8])
    }

    #[test]
    fn a_key_is_common_when_every_living_replica_has_it() {
        let now = clock::now();
        let mut roster = Roster::default();
        let ours = KEYS.into();
        assert_eq!(roster.common_keys(&ours, now), None);
        roster.hear(id(1), said(&KEYS[..2], 1), now);
        roster.hear(id(2), said(&KEYS[1..], 1), now + SILENT / 2);
        let soon = now + SILENT / 2;
        assert_eq!(roster.common_keys(&ours, soon), Some([KEYS[1]].into()));
        let (later, last) = (now + SILENT, KEYS[1..].iter().copied().collect());
        assert_eq!(roster.common_keys(&ours, later), Some(last));
        assert_eq!(roster.common_keys(&ours, soon + SILENT), None, "nobody is left");
    }

    #[test]
    fn a_stranger_takes_no_key_from_those_that_share_one() {
        let now = clock::now();
        let mut roster = Roster::default();
        roster.hear(id(1), said(&KEYS[..2], 1), now);
        roster.hear(id(2), said(&[[9; 4]], 1), now);
        let ours = KEYS[..2].iter().copied().collect();
        assert_eq!(roster.common_keys(&ours, now), Some(ours));
    }

    #[test]
    fn of_two_without_a_common_key_the_younger_yields() {
        let now = clock::now();
        let mut roster = Roster::default();
        roster.hear(id(1), said(&KEYS[..1], 100), now);
        let standing = |keys: &[KeyId], started, now| {
            roster.standing((started, id(2)), &keys.iter().copied().collect(), now)
        };
        for started in [100, 101] {
            assert_eq!(standing(&KEYS[1..], started, now), Standing::Stranger(id(1)));
        }
        assert_eq!(standing(&KEYS[1..], 99, now), Standing::Fine);
        assert_eq!(standing(&KEYS, 101, now), Standing::Fine);
        assert_eq!(standing(&KEYS[1..], 101, now + SILENT), Standing::Fine, "it has gone");
    }

    #[test]
    fn whoever_took_a_name_over_answers_for_it() {
        let now = clock::now();
        let mut roster = Roster::default();
        roster.hear(id(1), Said { names: vec![id(1), id(9)], ..said(&KEYS, 1) }, now);
        assert!(roster.answers_for(id(9), now));
        assert!(!roster.answers_for(id(8), now));
        assert!(!roster.answers_for(id(9), now + SILENT));
    }
}
