//! The leader of a consumer: who it is, and whether it is there.

use std::collections::BTreeSet;

use fetch_proxy::broker::{ConsumerInfo, Leader};

use super::{
    config::Config,
    types::{Connection, Time},
};

/// Longest time for which a leader without a majority still answers as one. It looks every 10 s whether
/// the others were silent for 10 s (raft.go:307).
pub const LONGEST_STALE: Time = Time::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    Leads,
    /// It is away, and nobody has noticed: no answer comes.
    Silent,
    /// It is away, and everybody has noticed: nobody listens.
    Nobody,
}

/// An old leader that is cut off from the other servers, and does not know it yet.
#[derive(Debug)]
pub struct Isolated {
    /// The connections that still reach it.
    pub side: BTreeSet<Connection>,
    until: Time,
    pub info: ConsumerInfo,
    /// The first stream sequence that it has not delivered.
    pub next: u64,
}

#[derive(Debug)]
pub struct Leadership {
    server: u64,
    /// The term of the leader. Each start of a server is a term, too.
    since: u64,
    pub presence: Presence,
    /// The time at which the last leader was lost.
    lost: Option<Time>,
    pub isolated: Option<Isolated>,
}

impl Leadership {
    pub fn new(term: u64) -> Self {
        Self { server: 1, since: term, presence: Presence::Leads, lost: None, isolated: None }
    }

    pub fn leads(&self) -> bool {
        self.presence == Presence::Leads
    }

    pub fn lose(&mut self, presence: Presence, now: Time) {
        self.presence = presence;
        self.lost = self.lost.or(Some(now));
    }

    /// The leader is cut off: `side` still reaches it for some time, and nobody else.
    pub fn isolate(&mut self, side: BTreeSet<Connection>, info: ConsumerInfo, now: Time) {
        let next = info.delivered_stream + 1;
        self.isolated = Some(Isolated { side, until: now + LONGEST_STALE, info, next });
        self.lose(Presence::Silent, now);
    }

    /// The old leader is no longer cut off. It continues, if there is no other.
    pub fn heal(&mut self) {
        let was = self.isolated.take();
        if was.is_some() && self.lost.take().is_some() {
            self.presence = Presence::Leads;
        }
    }

    /// A leader comes. With copies it is another server. Returns the time at which the last was lost.
    pub fn elect(&mut self, term: u64, config: &Config, now: Time) -> Time {
        if config.replicas > 1 {
            self.server = 1 + self.server % 3;
        }
        self.since = term;
        self.presence = Presence::Leads;
        self.lost.take().unwrap_or(now)
    }

    /// The old leader, if this connection reaches it and no other. `Err`: it has noticed, and is silent.
    pub fn stale(&self, from: Connection, now: Time) -> Option<Result<&Isolated, ()>> {
        let old = self.isolated.as_ref().filter(|old| old.side.contains(&from))?;
        Some(if now < old.until { Ok(old) } else { Err(()) })
    }

    /// The leader as INFO shows it.
    pub fn shown(&self, config: &Config) -> Leader {
        let since = if config.leader_shows() { self.since.to_string() } else { String::new() };
        Leader::new(&format!("n{}", self.server), &since)
    }
}
