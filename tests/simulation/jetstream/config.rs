//! The configuration of a consumer.

use std::time::Duration;

/// The configuration of a consumer. All of it may be changed while the consumer is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub ack_wait: Duration,
    /// The ack wait of each attempt. The first replaces `ack_wait`.
    pub backoff: Vec<Duration>,
    pub max_deliver: Option<u64>,
    pub max_ack_pending: Option<u64>,
    pub max_batch: Option<u32>,
    pub max_expires: Option<Duration>,
    pub max_bytes: Option<u64>,
    /// The number of pulls that may wait, of all clients.
    pub max_waiting: usize,
    /// The number of copies of its state.
    pub replicas: u32,
    /// With copies: its INFO says since when its leader leads (nats-server 2.12).
    pub tells_since: bool,
    /// Its server is one of several. Without copies, INFO then names the server and no start of it.
    pub clustered: bool,
    /// The one subject that the consumer takes from its stream. `None`: it takes all.
    pub filter: Option<String>,
}

impl Config {
    pub fn new(ack_wait: Duration) -> Self {
        Self {
            ack_wait,
            backoff: Vec::new(),
            max_deliver: None,
            max_ack_pending: Some(1000),
            max_batch: None,
            max_expires: None,
            max_bytes: None,
            max_waiting: 512,
            replicas: 1,
            tells_since: true,
            clustered: false,
            filter: None,
        }
    }

    /// Whether a change of leader, or a start of its server, shows in INFO.
    pub fn leader_shows(&self) -> bool {
        if self.replicas > 1 { self.tells_since } else { !self.clustered }
    }

    /// The ack wait as the server keeps it: `AckWait = BackOff[0]` (consumer.go:682).
    pub fn shown_wait(&self) -> Duration {
        self.backoff.first().copied().unwrap_or(self.ack_wait)
    }

    /// The ack wait of this attempt, counted from 1.
    pub fn wait(&self, attempt: u64) -> Duration {
        let place = usize::try_from(attempt.saturating_sub(1)).unwrap_or(usize::MAX);
        let last = self.backoff.len().saturating_sub(1);
        self.backoff.get(place.min(last)).copied().unwrap_or(self.ack_wait)
    }
}
