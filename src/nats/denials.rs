//! The subjects that the server refused to a connection.

use std::{
    collections::{HashSet, VecDeque},
    sync::Mutex,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::settings::Settings;
use crate::{
    clock,
    lock::lock,
    log_throttle::KeyedLogThrottle,
    metrics::{NatsMeter, NatsRight},
};

/// Refused subjects that are remembered: at least those of a whole Settle.
const DENIALS: usize = 1024;
/// The shortest time between two log lines about subjects that differ only in numbers.
const DENIAL_LOG_INTERVAL: Duration = Duration::from_secs(600);
/// Most log lines about refused subjects in ten seconds. A caller that asks for streams without a right
/// to them can cause any number of refusals.
const DENIAL_LINES_PER_TEN_SECONDS: u32 = 20;

/// The right and the subject in `Permissions Violation for Publish to "subject"`.
fn denied_subject(text: &str) -> Option<(NatsRight, &str)> {
    let rights = [("Publish", NatsRight::Publish), ("Subscription", NatsRight::Subscribe)];
    rights.into_iter().find_map(|(word, right)| {
        let (_, rest) = text.split_once(&format!("Permissions Violation for {word} to "))?;
        Some((right, rest.split('"').nth(1)?))
    })
}

/// The subjects that the server refused. The server sends a refusal to the connection, not to the request,
/// which would only time out.
#[derive(Debug)]
pub(super) struct Denials {
    recent: Mutex<VecDeque<(String, Instant)>>,
    count: watch::Sender<u64>,
    logged: KeyedLogThrottle,
    meter: NatsMeter,
    /// The prefix of our API calls.
    api: String,
}

impl Denials {
    pub(super) fn new(settings: &Settings, meter: &NatsMeter) -> Self {
        let (count, logged) = (
            watch::channel(0).0,
            KeyedLogThrottle::new(DENIAL_LOG_INTERVAL, DENIAL_LINES_PER_TEN_SECONDS),
        );
        let (recent, meter) = (Mutex::default(), meter.clone());
        Self { recent, count, logged, meter, api: settings.api("") }
    }

    /// Takes in an error of the server. `false`: it is not about the right to a subject.
    pub(super) fn take(&self, error: &str) -> bool {
        let denied = denied_subject(error);
        if let Some((right, subject)) = denied {
            self.record(subject, right, clock::now());
        }
        denied.is_some()
    }

    fn record(&self, subject: &str, right: NatsRight, now: Instant) {
        self.meter.denied(right);
        // A server of our domain names the API without the domain.
        let call = subject.strip_prefix("$JS.API.");
        let ours = call.map_or_else(|| subject.to_owned(), |call| format!("{}{call}", self.api));
        // Ack subjects of different deliveries differ only in numbers, and need the same right.
        let without_numbers: Vec<&str> =
            subject.split('.').filter(|part| part.parse::<u64>().is_err()).collect();
        // The right to INFO is optional: see `presence`.
        let needed = ours.strip_prefix(&*self.api) != Some("INFO");
        if needed && self.logged.allow(&without_numbers, now) {
            tracing::warn!(subject, "NATS refuses this subject to the proxy's user");
        }
        let subject = ours;
        let mut recent = lock(&self.recent);
        if recent.len() == DENIALS {
            recent.pop_front();
        }
        recent.push_back((subject, now));
        drop(recent);
        self.count.send_modify(|count| *count += 1);
    }

    /// Changes with every refusal.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.count.subscribe()
    }

    /// The subjects refused since `since`.
    pub(super) fn since(&self, since: Instant) -> HashSet<String> {
        let recent = lock(&self.recent);
        let since = recent.iter().rev().take_while(|(_, when)| *when >= since);
        since.map(|(subject, _)| subject.clone()).collect()
    }

    /// The first subject refused since `since` that `matches`.
    pub(super) fn find(&self, since: Instant, matches: impl Fn(&str) -> bool) -> Option<String> {
        let recent = lock(&self.recent);
        let mut since = recent.iter().filter(|(_, when)| *when >= since);
        since.find(|(subject, _)| matches(subject)).map(|(subject, _)| subject.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_subject_is_read_from_the_server_s_words() {
        let publish = r#"Permissions Violation for Publish to "$JS.ACK.S.c.1""#;
        let subscribe = r#"Permissions Violation for Subscription to "_INBOX.x.*" using queue "q""#;
        assert_eq!(denied_subject(publish), Some((NatsRight::Publish, "$JS.ACK.S.c.1")));
        assert_eq!(denied_subject(subscribe), Some((NatsRight::Subscribe, "_INBOX.x.*")));
        assert_eq!(denied_subject("Maximum Payload Violation"), None);
    }
}
