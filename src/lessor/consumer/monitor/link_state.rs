//! The connection to NATS as one consumer sees it: which server is there, and since when NATS is away.

use std::time::{Duration, Instant};

use crate::broker::Server;

/// A caller with nothing hears of it when NATS has been away for this long. A reconnect is shorter, so callers
/// do not notice it. The caller still has time to try another replica.
const AWAY: Duration = Duration::from_secs(2);

/// A stream that was there before hears of it after this time: its client would lose what it holds by a new stream.
const STREAM_AWAY: Duration = Duration::from_secs(10);

/// See the [module](self).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct LinkState {
    /// The number of the connection, while there is one.
    number: Option<u64>,
    /// The id of the server that was connected last. Another server may not know what that one promised.
    server: Option<String>,
    /// The number of the connection over which the other replicas are heard.
    heard_on: Option<u64>,
    /// Since when NATS, or INFO, is not to be had.
    away_since: Option<Instant>,
}

/// The meaning of a change of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinkChange {
    /// When the connection before was lost; it is now, if it was replaced.
    pub(super) lost_at: Instant,
    /// Other replicas may have told something in between, and it was not heard.
    pub(super) unheard: bool,
    /// It is another server, or the same server has started again.
    pub(super) another_server: bool,
}

impl LinkState {
    pub(super) fn new(server: Option<&Server>, now: Instant) -> Self {
        Self {
            number: server.map(|server| server.epoch),
            server: server.map(|server| server.id.clone()),
            heard_on: server.map(|server| server.bus_epoch),
            away_since: server.is_none().then_some(now),
        }
    }

    /// The connection is another one, or there is none any more.
    pub(super) fn change(&mut self, server: Option<&Server>, now: Instant) -> LinkChange {
        let lost_at = self.away_since.unwrap_or(now);
        self.number = server.map(|server| server.epoch);
        self.away_since = server.is_none().then_some(lost_at);
        let Some(server) = server else {
            return LinkChange { lost_at, unheard: false, another_server: false };
        };
        let heard = self.heard_on.replace(server.bus_epoch);
        let last = self.server.replace(server.id.clone());
        LinkChange {
            lost_at,
            unheard: heard.is_some_and(|last| last != server.bus_epoch),
            another_server: last.is_some_and(|last| last != server.id),
        }
    }

    /// INFO is not to be had, though there may be a connection.
    pub(super) fn be_away(&mut self, now: Instant) {
        self.away_since.get_or_insert(now);
    }

    /// INFO was read.
    pub(super) fn be_back(&mut self) {
        self.away_since = None;
    }

    pub(super) fn number(&self) -> Option<u64> {
        self.number
    }

    pub(super) fn is_up(&self) -> bool {
        self.number.is_some()
    }

    /// NATS and INFO are to be had, as far as is known.
    pub(super) fn is_there(&self) -> bool {
        self.away_since.is_none()
    }

    /// If callers hear that NATS is away: since when, and when streams that were there before hear of it.
    pub(super) fn away(&self, now: Instant) -> Option<(Instant, Instant)> {
        let since = self.away_since.filter(|since| now >= *since + AWAY)?;
        Some((since, since + STREAM_AWAY))
    }

    /// The time at which callers hear that NATS is away.
    pub(super) fn callers_told_at(&self) -> Option<Instant> {
        self.away_since.map(|since| since + AWAY)
    }
}
