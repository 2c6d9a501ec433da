//! What the clocks of other replicas mean for what is done here: what is said of them in beats, in the
//! log, and how far a time of day inside a token can be trusted. `clocks` reads them.

use std::{
    sync::{MutexGuard, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    Peers,
    clocks::{MAX_CLOCK_SKEW, News, Ours, PeerClocks, PeerReading, Trust},
    members::PeerStatus,
};
use crate::{broker::Broker, bus::Bus, clock, lock::lock, pb::peer::v1 as pb, token::InstanceId};

/// Others that a beat tells of; where there are more, the next beat tells of the next.
const ECHOES: usize = 64;

/// What a time of day inside a token is worth here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TimeLeft {
    /// It comes in this much time, by our clock. The owner's may be ahead of ours by `margin`.
    Within { left: Duration, margin: Duration },
    /// It is over, by the owner's own clock.
    Over,
    /// Nobody knows: the owner's clock is too far from ours.
    Unknown,
}

impl<B: Broker + Bus> Peers<B> {
    /// How long it is until `when`, in milliseconds since the Unix epoch by `owner`'s clock. Of an
    /// owner that was never heard its clock is taken to be right, unless another replica knows better.
    pub(super) fn left(&self, owner: InstanceId, when: u64) -> TimeLeft {
        let (now, ours) = (clock::now(), self.ours());
        let trust = self.clocks().trust(owner, ours, now);
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

    /// A replica whose own clock is well by ours, and that is there, doubts that one's.
    fn is_doubted_by_others(&self, owner: InstanceId, now: Instant) -> bool {
        let (members, clocks, ours) = (self.members(), self.clocks(), self.ours());
        let well = |id| matches!(clocks.trust(id, ours, now), Trust::Within(_));
        members.living(now).any(|(id, said)| said.doubted.contains(&owner) && well(id))
    }

    /// Looks at the clock of a replica that was heard just now.
    pub(super) fn compare_clocks(&self, from: InstanceId, body: &pb::BeatBody, said: &PeerStatus) {
        if body.sent == 0 {
            return;
        }
        let ours_in = |echo: &&pb::Echo| echo.instance == self.us.0.as_slice();
        let echo = body.echoes.iter().find(ours_in).map(|echo| (echo.uptime, echo.held));
        let reading = PeerReading { sent: body.sent, echo };
        let news = self.clocks().hear(from, reading, self.ours(), clock::now());
        let PeerStatus { name, .. } = said;
        match news {
            Some(News::Off(milliseconds)) => tracing::warn!(
                replica = %from,
                name,
                ahead = ?format_args!("{milliseconds}ms"),
                "the clock of a replica differs from ours: its leases are not settled without it"
            ),
            Some(News::Well) => {
                tracing::info!(
                    replica = %from,
                    name,
                    "the clock of a replica agrees with ours again"
                );
            }
            None => {}
        }
    }

    /// That the others were heard, some at a time.
    pub(super) fn echoes(&self) -> Vec<pb::Echo> {
        let (now, uptime) = (clock::now(), self.ours().uptime);
        let members = self.members();
        let all: Vec<_> = members.heard_at(now).filter(|(_, _, uptime)| *uptime != 0).collect();
        let seconds = usize::try_from(uptime / 1_000_000).unwrap_or(0);
        let first = (seconds * ECHOES).checked_rem(all.len()).unwrap_or(0);
        let some = all.iter().cycle().skip(first).take(ECHOES.min(all.len()));
        some.map(|(id, at, uptime)| pb::Echo {
            instance: Bytes::copy_from_slice(&id.0),
            uptime: *uptime,
            held: micros(now.saturating_duration_since(*at)),
        })
        .collect()
    }

    /// Whose clocks are off, as many as a beat has room for.
    pub(super) fn doubted(&self) -> Vec<Bytes> {
        let clocks = self.clocks();
        let off = clocks.off(self.ours(), clock::now()).take(ECHOES);
        off.map(|id| Bytes::copy_from_slice(&id.0)).collect()
    }

    /// Our uptime and our time of day, for a beat. No two beats have the same uptime.
    pub(super) fn stamp(&self) -> (u64, u64) {
        let Ours { uptime, time } = self.ours();
        let later = |last: u64| Some(uptime.max(last + 1));
        let last = self.beaten.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
        (uptime.max(last.unwrap_or_default() + 1), time)
    }

    fn ours(&self) -> Ours {
        let uptime = micros(clock::now().saturating_duration_since(self.started.1));
        Ours { uptime, time: micros(clock::unix_time()) }
    }

    fn clocks(&self) -> MutexGuard<'_, PeerClocks> {
        lock(&self.clocks)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
