//! The leaders of consumers, as far as the servers know them. Pure: it draws no dice and calls no model.
//!
//! ```text
//!  LED ── its server goes, or loses the majority for long ──▶ NOBODY ── 4 to 9 s ──▶ LED by another server
//!   └──────── a partition that ends sooner: what needs a majority waits ────────▶ LED
//! ```
//! A leader that has lost the majority does not know it: it answers until it steps down, or until it hears
//! of the new leader. Its progress and Naks are answered without effect, and all else has no answer.

use std::collections::BTreeMap;

use fetch_proxy::broker::{ConsumerInfo, ConsumerName};

use super::super::jetstream::Time;

#[derive(Default)]
pub(super) struct Leaders(BTreeMap<ConsumerName, Led>);

pub(super) struct Led {
    /// The server that leads. `None`: nobody does.
    pub(super) at: Option<usize>,
    /// The server that leads, or was the last to lead.
    pub(super) last: usize,
    /// Its state has copies on other servers.
    pub(super) copies: bool,
    /// Each change of leader begins another round.
    pub(super) round: u64,
    /// There is no majority before this.
    pub(super) alone_until: Time,
    pub(super) old: Option<Old>,
}

/// A leader that does not know yet that it leads no more.
pub(super) struct Old {
    pub(super) at: usize,
    /// The INFO that it answers with.
    pub(super) info: ConsumerInfo,
    pub(super) until: Time,
}

/// The server that handles a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Handler {
    Leader(usize),
    Old(usize),
    Nobody,
}

impl Leaders {
    pub(super) fn get(&self, name: &ConsumerName) -> Option<&Led> {
        self.0.get(name)
    }

    pub(super) fn get_mut(&mut self, name: &ConsumerName) -> Option<&mut Led> {
        self.0.get_mut(name)
    }

    /// A consumer that nobody has asked for before.
    pub(super) fn meet(&mut self, name: &ConsumerName, at: usize, copies: bool) {
        let led =
            Led { at: Some(at), last: at, copies, round: 0, alone_until: Time::ZERO, old: None };
        self.0.insert(name.clone(), led);
    }

    pub(super) fn names(&self) -> Vec<ConsumerName> {
        self.0.keys().cloned().collect()
    }

    /// The server that handles a request that comes to this one.
    pub(super) fn handler(&self, name: &ConsumerName, server: usize, now: Time) -> Handler {
        let Some(led) = self.0.get(name) else { return Handler::Leader(server) };
        match (&led.old, led.at) {
            (Some(old), _) if old.at == server && now < old.until => Handler::Old(server),
            (_, Some(at)) => Handler::Leader(at),
            (_, None) => Handler::Nobody,
        }
    }

    /// Nobody leads any more. Returns the round, for the election.
    pub(super) fn lose(&mut self, name: &ConsumerName) -> u64 {
        let Some(led) = self.0.get_mut(name) else { return 0 };
        led.at = None;
        led.round += 1;
        led.round
    }

    /// All servers have started again: each leads what it has led.
    pub(super) fn restore(&mut self) {
        for led in self.0.values_mut() {
            led.at = Some(led.last);
            led.round += 1;
            (led.alone_until, led.old) = (Time::ZERO, None);
        }
    }

    pub(super) fn elect(&mut self, name: &ConsumerName, at: usize) {
        if let Some(led) = self.0.get_mut(name) {
            (led.at, led.last) = (Some(at), at);
            led.round += 1;
        }
    }
}
