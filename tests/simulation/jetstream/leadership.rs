//! The leader of a consumer: who it is, and who reaches it.

use std::collections::BTreeSet;

use fetch_proxy::broker::{ConsumerInfo, Leader};

use super::{
    config::Config,
    types::{Connection, Time},
};

/// Longest time for which a leader without a majority answers as a leader. It looks every 10 s whether the
/// others were silent for 10 s (raft.go:307).
pub const LONGEST_STALE: Time = Time::from_secs(20);

/// Something that answers in the name of a leader.
pub enum Reached<'l> {
    Leader,
    /// A leader that was replaced, and does not know it yet.
    Replaced(&'l Replaced),
    /// No answer comes.
    Silence,
    /// Nobody listens.
    Nobody,
}

/// An old leader when another one came.
#[derive(Debug)]
pub struct Replaced {
    pub info: ConsumerInfo,
    /// The first stream sequence that it had not delivered.
    pub next: u64,
}

/// A leader that is cut off from the other servers.
#[derive(Debug)]
struct CutOff {
    /// The connections that still reach it.
    side: BTreeSet<Connection>,
    since: Time,
    replaced: Option<Replaced>,
}

#[derive(Debug)]
pub struct Leadership {
    server: u64,
    /// The term of the leader. Each start of a server is a term, too.
    since: u64,
    /// Otherwise there is no leader, and everybody has noticed.
    leads: bool,
    /// The time at which the last leader was lost.
    lost: Option<Time>,
    cut_off: Option<CutOff>,
}

impl Leadership {
    pub fn new(term: u64) -> Self {
        Self { server: 1, since: term, leads: true, lost: None, cut_off: None }
    }

    /// The leader is gone. Nobody listens in its place, also after a crash (measured on three servers of
    /// 2.15.1: a pull ends with 503 at once).
    pub fn lose(&mut self, now: Time) {
        self.leads = false;
        self.lost = self.lost.or(Some(now));
    }

    /// The leader is cut off: `side` still reaches it for some time, and nobody else.
    pub fn cut_off(&mut self, side: BTreeSet<Connection>, now: Time) {
        self.cut_off = Some(CutOff { side, since: now, replaced: None });
    }

    /// The leader is no longer cut off. It continues, if no other has come.
    pub fn heal(&mut self) {
        self.cut_off = None;
    }

    /// A leader comes. With copies it is another server. `old` is the leader that is cut off, if there is
    /// one. Returns the time of the last change that the new leader can have.
    pub fn elect(&mut self, term: u64, config: &Config, old: Replaced, now: Time) -> Time {
        if config.replicas > 1 {
            self.server = 1 + self.server % 3;
        }
        self.since = term;
        self.leads = true;
        let lost = self.lost.take().unwrap_or(now);
        let Some(cut_off) = &mut self.cut_off else { return lost };
        cut_off.replaced.get_or_insert(old);
        lost.min(cut_off.since)
    }

    /// Whether a leader hands messages out: the leader itself, or one that is cut off and not replaced yet.
    pub fn acts(&self, now: Time) -> bool {
        let cut_off = self.cut_off.as_ref().filter(|one| one.replaced.is_none());
        self.leads && cut_off.is_none_or(|one| now < one.since + LONGEST_STALE)
    }

    /// Until when a majority can have the changes of the leader. A leader that is cut off has none for a
    /// change of that moment.
    pub fn majority_until(&self, now: Time) -> Option<Time> {
        let cut_off = self.cut_off.as_ref().filter(|one| one.replaced.is_none());
        cut_off.map_or(Some(now), |one| one.since.checked_sub(Time::from_nanos(1)))
    }

    /// Whether this connection reaches the leader that is cut off, and no other.
    pub fn is_on_its_side(&self, connection: Connection) -> bool {
        self.cut_off.as_ref().is_some_and(|one| one.side.contains(&connection))
    }

    /// The one that a request on this connection reaches.
    pub fn reach(&self, from: Connection, now: Time) -> Reached<'_> {
        let direct = if self.leads { Reached::Leader } else { Reached::Nobody };
        let Some(one) = &self.cut_off else { return direct };
        match (&one.replaced, one.side.contains(&from)) {
            (_, true) if now >= one.since + LONGEST_STALE => Reached::Silence,
            (Some(old), true) => Reached::Replaced(old),
            (None, true) | (Some(_), false) => direct,
            (None, false) => Reached::Silence,
        }
    }

    /// The leader as INFO shows it.
    pub fn shown(&self, config: &Config) -> Leader {
        let since = if config.leader_shows() { self.since.to_string() } else { String::new() };
        Leader::new(&format!("n{}", self.server), &since)
    }
}
