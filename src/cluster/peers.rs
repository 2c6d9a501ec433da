//! The other replicas, as this replica knows them by their heartbeats, and the heartbeat of this
//! replica. Owns who is there, whether this replica may serve next to them, and how far their clocks
//! differ. The decisions are in `members`, `compatibility` and `clocks`, which are pure. Here they get
//! the time and a lock, and the log says what they decide.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::Notify;

use super::{
    agreement::{AgreementNews, ObeyedPolicy, PolicyAgreement},
    channel::nonce,
    clocks::{ClockNews, MAX_CLOCK_SKEW, OwnClocks, PeerClocks, PeerReading, Trust},
    compatibility::{Compatibility, Incompatible, ServiceHistory, Us, decide},
    heartbeat::{claimed, instance, instance_bytes, status, tenure_to_wire},
    members::{Heard, Members, OtherReplica, PeerStatus, Tenure},
};
use crate::{
    clock,
    keys::Keys,
    lock::lock,
    log_throttle::LogThrottle,
    pb::peer::v1 as pb,
    token::{InstanceId, KeyId},
};

/// A heartbeat echoes this many other replicas. If there are more, the next heartbeat echoes the next
/// ones.
const ECHOES: usize = 64;
/// Time between two warnings about incompatible replicas, however long those stay.
const INCOMPATIBLE_WARNING_INTERVAL: Duration = Duration::from_secs(600);
/// A replica that has run for this long has heard of all others.
const DISCOVERY_TIME: Duration = Duration::from_secs(3);

/// The value of a time of day inside a token, by the clock of this replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TimeLeft {
    /// The time comes after `left`. The clock of the owner may be ahead of this one by `margin`.
    Within { left: Duration, margin: Duration },
    /// The time has passed, also by the clock of the owner.
    Over,
    /// The clock of the owner differs too much from this one.
    Unknown,
}

/// The state of this replica that its heartbeat carries.
#[derive(Debug)]
pub(super) struct OwnStatus {
    /// The names that this replica answers for, its own first.
    pub(super) names: Vec<InstanceId>,
    /// How many more leases it has room for.
    pub(super) room: u32,
    /// It is leaving.
    pub(super) draining: bool,
    /// Leases that it holds, Fetch calls that are open, and consumers that it serves.
    pub(super) counts: [u64; 3],
}

/// The other replicas.
pub(super) struct Peers {
    us: InstanceId,
    /// For people: where this replica runs.
    name: String,
    keys: Arc<Keys>,
    /// The start of this replica: in milliseconds since the Unix epoch, and by the monotonic clock.
    started: (u64, Instant),
    members: Mutex<Members>,
    service: Mutex<ServiceHistory>,
    clocks: Mutex<PeerClocks>,
    /// The uptime in the last heartbeat of this replica, in microseconds.
    last_uptime: AtomicU64,
    /// There is news for the others, sooner than the next heartbeat.
    news: Notify,
    incompatible_warning: LogThrottle,
    /// The own policy, and since when another replica has another one.
    policy: Mutex<(ObeyedPolicy, PolicyAgreement)>,
}

impl Peers {
    pub(super) fn new(us: InstanceId, name: &str, keys: Arc<Keys>) -> Self {
        let unix = u64::try_from(clock::unix_time().as_millis()).unwrap_or(u64::MAX);
        Self {
            us,
            name: name.to_owned(),
            keys,
            started: (unix, clock::now()),
            members: Mutex::default(),
            service: Mutex::default(),
            clocks: Mutex::default(),
            last_uptime: AtomicU64::new(0),
            news: Notify::new(),
            incompatible_warning: LogThrottle::every(INCOMPATIBLE_WARNING_INTERVAL),
            policy: Mutex::default(),
        }
    }

    /// Asks for a heartbeat soon.
    pub(super) fn announce_soon(&self) {
        self.news.notify_one();
    }

    /// Waits until a heartbeat is wanted soon.
    pub(super) async fn wants_heartbeat(&self) {
        self.news.notified().await;
    }

    /// The heartbeat of this replica, sealed for this subject. `None`: there is no randomness.
    pub(super) fn heartbeat(&self, subject: &str, own: OwnStatus) -> Option<Vec<u8>> {
        let nonce = nonce().ok()?;
        let OwnStatus { names, room, draining, counts } = own;
        let instance = instance_bytes(&self.us);
        let key_ids = self.key_ids();
        let keys: Vec<Bytes> = key_ids.iter().map(|key| Bytes::copy_from_slice(key)).collect();
        let tenure = lock(&self.service).tenure(&key_ids);
        // To incompatible replicas, a replica that leaves is as good as gone.
        let public_tenure = if draining { Tenure::Waiting } else { tenure };
        let mut body = pb::BeatBody {
            instance: instance.clone(),
            keys: keys.clone(),
            names: names.iter().map(instance_bytes).collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            room: room.into(),
            draining,
            tenure: tenure_to_wire(tenure).into(),
            name: self.name.clone(),
            echoes: self.echoes(),
            doubted: self.doubted(),
            policy: self.policy().to_wire(),
            ..pb::BeatBody::default()
        };
        [body.leases, body.waiters, body.consumers] = counts;
        // The last step: others measure how long the message was under way from this stamp.
        (body.uptime, body.sent) = self.stamp();
        let body = self.keys.sealer().seal_frame(subject, &body.encode_to_vec(), nonce).into();
        let beat = pb::Beat {
            instance,
            keys,
            // Version 0.1 yields to incompatible replicas that started earlier. A replica that does
            // not serve did not start.
            started: if public_tenure == Tenure::Waiting { u64::MAX } else { self.started.0 },
            body,
            keyless: !self.keys.shared(),
            tenure: tenure_to_wire(public_tenure).into(),
            name: self.name.clone(),
        };
        Some(beat.encode_to_vec())
    }

    /// Reads the heartbeat of another replica. Returns a compatible replica that is heard for the first time, or
    /// for the first time after a silence, and how long it has run.
    pub(super) fn heard(&self, subject: &str, message: &[u8]) -> Option<(InstanceId, Duration)> {
        let beat = pb::Beat::decode(message).ok()?;
        let from = instance(&beat.instance).filter(|from| *from != self.us)?;
        let now = clock::now();
        let Ok((_, body)) = self.keys.sealer().open_frame(subject, &beat.body) else {
            let new = claimed(&beat)
                .is_some_and(|claimed| self.members().heard_in_the_clear(from, claimed, now));
            if new {
                // It may be a compatible replica that seals with a key that this one does not have yet.
                self.announce_soon();
            }
            return None;
        };
        let body = pb::BeatBody::decode(&*body).ok();
        let body = body.filter(|body| body.instance == beat.instance)?;
        let status = status(&body);
        let heard = self.members().heard(from, status.clone(), now);
        if heard == Heard::Old {
            return None;
        }
        self.compare_clocks(from, &body, &status);
        if heard == Heard::New {
            let PeerStatus { name, version, .. } = status;
            tracing::info!(replica = %from, name, version, "a replica was found");
            // That replica wants to know of this one, too.
            self.announce_soon();
        }
        self.share_keys(now);
        // An older version does not say how long it has run.
        let uptime = if body.uptime == 0 { u64::MAX } else { body.uptime };
        (heard == Heard::New).then_some((from, Duration::from_micros(uptime)))
    }

    /// Forgets replicas that have fallen silent, and says so in the log.
    pub(super) fn forget_lost(&self, now: Instant) {
        for (replica, PeerStatus { name, version, draining, .. }) in self.members().lost(now) {
            if draining {
                tracing::info!(%replica, name, version, "a replica has left");
            } else {
                tracing::warn!(%replica, name, version, "a replica is no longer heard");
            }
        }
        self.share_keys(now);
    }

    /// The reason why this replica should not serve next to the others, for people.
    pub(super) fn incompatibility(&self) -> Option<String> {
        let (now, keys) = (clock::now(), self.key_ids());
        let tenure = lock(&self.service).tenure(&keys);
        let us = Us { keys: &keys, shared: self.keys.shared(), tenure };
        let members = self.members();
        let incompatible = members.incompatible(&keys, now);
        let compatible = members.compatible(&keys, now).map(|(_, status)| status);
        let Incompatible { one, name, count } = match decide(us, compatible, &incompatible) {
            Compatibility::Compatible => return None,
            Compatibility::Yields(incompatible) => incompatible,
            Compatibility::Serves(Incompatible { one, name, count }) => {
                if self.incompatible_warning.allow(now) {
                    tracing::warn!(
                        replica = %one,
                        name,
                        count,
                        "a replica shares no token key with this replica: neither knows the \
                         tokens of the other"
                    );
                }
                return None;
            }
        };
        let cure = "give all replicas the same file, or give this replica a --cluster of its own";
        Some(if us.shared {
            let more = if count > 1 { format!(" and {} more", count - 1) } else { String::new() };
            format!(
                "this replica shares no token key with replica {one} ({name}){more}, and yields; see \
                 --token-key-file: {cure}"
            )
        } else {
            format!(
                "replica {one} ({name}) is there, and this replica has no --token-key-file to share with \
                 it: {cure}"
            )
        })
    }

    /// Takes note of whether this replica serves. The caller says so at least once a second.
    pub(super) fn serves(&self, serving: bool) {
        let (now, keys) = (clock::now(), self.key_ids());
        let established = |status: &PeerStatus| status.tenure == Tenure::Established;
        let vouched = self.members().compatible(&keys, now).any(|(_, status)| established(status));
        let mut service = lock(&self.service);
        let before = service.tenure(&keys);
        service.observe(serving, vouched, &keys, now);
        if service.tenure(&keys) != before {
            self.announce_soon();
        }
    }

    /// Takes note of the policy that this replica obeys, by its digest.
    pub(super) fn obeys(&self, digest: Option<[u8; 8]>) {
        lock(&self.policy).0 = digest.map_or(ObeyedPolicy::Absent, ObeyedPolicy::Digest);
    }

    /// Whether a request of a replica that names no principal may settle: somewhere everybody may.
    pub(super) fn everybody_may_settle(&self) -> bool {
        let unknown = |status: &PeerStatus| status.policy == ObeyedPolicy::Unknown;
        self.policy() == ObeyedPolicy::Absent
            || self.members().living(clock::now()).any(|(_, status)| unknown(status))
    }

    /// Says in the log if replicas obey different policies for long. A replica that leaves does not count.
    pub(super) fn compare_policies(&self, now: Instant) {
        let ours = self.policy();
        let members = self.members();
        let other =
            members.living(now).find(|(_, status)| !status.draining && ours.differs(status.policy));
        let news = lock(&self.policy).1.observe(other.is_some(), now);
        match (news, other) {
            (Some(AgreementNews::Differ), Some((replica, PeerStatus { name, policy, .. }))) => {
                let (ours, theirs) = (ours.digits(), policy.digits());
                tracing::warn!(%replica, name, ours, theirs, "a replica obeys another policy");
            }
            (Some(_), _) => tracing::info!("all replicas obey the same policy again"),
            (None, _) => {}
        }
    }

    /// See [`Members::differing`].
    pub(super) fn differing(&self) -> [usize; 4] {
        self.members().differing(self.policy(), &self.key_ids(), clock::now())
    }

    fn policy(&self) -> ObeyedPolicy {
        lock(&self.policy).0
    }

    /// Whether a replica may answer for this name in a moment.
    pub(super) fn may_answer(&self, owner: InstanceId) -> bool {
        let now = clock::now();
        now.duration_since(self.started.1) < DISCOVERY_TIME
            || self.members().answers_for(owner, now)
    }

    /// Whether this replica is there now, and shares a key with this one.
    pub(super) fn is_living(&self, replica: InstanceId) -> bool {
        self.members().living(clock::now()).any(|(id, _)| id == replica)
    }

    pub(super) fn others(&self) -> Vec<OtherReplica> {
        self.members().others(&self.key_ids(), clock::now())
    }

    /// The replicas that may hold leases, as far as is known.
    pub(super) fn may_hold_leases(&self) -> Vec<InstanceId> {
        self.members().may_hold_leases(clock::now())
    }

    /// The replica with the most room among those that stay, and its room.
    pub(super) fn most_room(&self, tried: &[InstanceId]) -> Option<(InstanceId, u64)> {
        let members = self.members();
        let living = members.living(clock::now());
        let staying = living.filter(|(id, status)| !status.draining && !tried.contains(id));
        staying.map(|(id, status)| (id, status.room)).max_by_key(|(_, room)| *room)
    }

    /// How long it is until `when`, in milliseconds since the Unix epoch by the clock of `owner`. If
    /// the owner was never heard, its clock counts as right, unless another replica doubts it.
    pub(super) fn time_left(&self, owner: InstanceId, when: u64) -> TimeLeft {
        let (now, ours) = (clock::now(), self.own_clocks());
        let trust = lock(&self.clocks).trust(owner, ours, now);
        let margin = match trust {
            Trust::Off { least } if when <= least / 1000 => return TimeLeft::Over,
            Trust::Off { .. } => return TimeLeft::Unknown,
            Trust::Unknown if self.is_doubted_by_others(owner, now) => return TimeLeft::Unknown,
            Trust::Unknown => MAX_CLOCK_SKEW,
            Trust::Within(most) => MAX_CLOCK_SKEW.max(most),
        };
        let left = Duration::from_millis(when).saturating_sub(clock::unix_time());
        TimeLeft::Within { left, margin }
    }

    /// Whether a living replica doubts the clock of `owner`. Only a replica whose own clock is close to
    /// this one counts.
    fn is_doubted_by_others(&self, owner: InstanceId, now: Instant) -> bool {
        let (members, clocks, ours) = (self.members(), lock(&self.clocks), self.own_clocks());
        let well = |id| matches!(clocks.trust(id, ours, now), Trust::Within(_));
        members.living(now).any(|(id, status)| status.doubted.contains(&owner) && well(id))
    }

    /// Looks at the clock of a replica that was heard just now.
    fn compare_clocks(&self, from: InstanceId, body: &pb::BeatBody, status: &PeerStatus) {
        if body.sent == 0 {
            return;
        }
        let of_us = |echo: &&pb::Echo| echo.instance == self.us.0.as_slice();
        let echo = body.echoes.iter().find(of_us).map(|echo| (echo.uptime, echo.held));
        let reading = PeerReading { sent: body.sent, echo };
        let news = lock(&self.clocks).hear(from, reading, self.own_clocks(), clock::now());
        let PeerStatus { name, .. } = status;
        match news {
            Some(ClockNews::Off(milliseconds)) => tracing::warn!(
                replica = %from,
                name,
                ahead = ?format_args!("{milliseconds}ms"),
                "the clock of a replica differs from ours: its leases are not settled without it"
            ),
            Some(ClockNews::Well) => {
                tracing::info!(
                    replica = %from,
                    name,
                    "the clock of a replica agrees with ours again"
                );
            }
            None => {}
        }
    }

    /// Tells the others that they were heard, some of them at a time.
    fn echoes(&self) -> Vec<pb::Echo> {
        let (now, uptime) = (clock::now(), self.own_clocks().uptime);
        let members = self.members();
        let all: Vec<_> = members.heard_at(now).filter(|(_, _, uptime)| *uptime != 0).collect();
        let seconds = usize::try_from(uptime / 1_000_000).unwrap_or(0);
        let first = (seconds * ECHOES).checked_rem(all.len()).unwrap_or(0);
        let some = all.iter().cycle().skip(first).take(ECHOES.min(all.len()));
        some.map(|(id, at, uptime)| pb::Echo {
            instance: instance_bytes(id),
            uptime: *uptime,
            held: micros(now.saturating_duration_since(*at)),
        })
        .collect()
    }

    /// The replicas whose clocks differ too much, as many as a heartbeat has room for.
    fn doubted(&self) -> Vec<Bytes> {
        let clocks = lock(&self.clocks);
        let off = clocks.off(self.own_clocks(), clock::now()).take(ECHOES);
        off.map(|id| instance_bytes(&id)).collect()
    }

    /// The uptime and the time of day of this replica, for a heartbeat. No two heartbeats have the same
    /// uptime.
    fn stamp(&self) -> (u64, u64) {
        let OwnClocks { uptime, time } = self.own_clocks();
        let later = |last: u64| Some(uptime.max(last + 1));
        let last = self.last_uptime.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
        (uptime.max(last.unwrap_or_default() + 1), time)
    }

    fn own_clocks(&self) -> OwnClocks {
        let uptime = micros(clock::now().saturating_duration_since(self.started.1));
        OwnClocks { uptime, time: micros(clock::unix_time()) }
    }

    /// Tells `keys` which keys all compatible replicas have.
    fn share_keys(&self, now: Instant) {
        let common = self.members().common_keys(&self.key_ids(), now);
        self.keys.common(common);
    }

    fn key_ids(&self) -> BTreeSet<KeyId> {
        self.keys.sealer().ring().ids().into_iter().collect()
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        lock(&self.members)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
