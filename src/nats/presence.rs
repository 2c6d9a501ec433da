//! Whether JetStream is there for our account at all: while it is not, no consumer can be read, though
//! both connections work. Owns that verdict, and asks until JetStream is back.
//!
//! ```text
//!            nobody answers, or "not enabled"
//!  UNKNOWN ──────────────────────────────────▶ ABSENT, asked again each second
//!     │ any other answer                          │ any other answer
//!     └──────────────▶ THERE ◀────────────────────┘
//! ```
//! 1. only an answer decides: silence, and a subject that we have no right to, change nothing;
//! 2. each connection asks once. The right to ask for INFO of the account is no condition: without
//!    it the first CONSUMER.INFO tells, and is what is asked again.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::ServerInfo;
use bytes::Bytes;
use serde::Deserialize;
use tokio::{sync::watch, time::sleep};

use super::{
    Settings,
    plan::{Request, RequestAnswer},
    request_mux::RequestMux,
};
use crate::{
    broker::{BrokerError, JetStream},
    clock,
};

/// While JetStream is absent, it is asked again after this.
const ABSENT_RETRY: Duration = Duration::from_secs(1);
/// Bounds one question.
const PRESENCE_TIMEOUT: Duration = Duration::from_secs(2);
/// JetStream's error codes (its `errors.json`): not enabled for this account, not enabled.
const NOT_ENABLED: [u32; 2] = [10_039, 10_076];

/// What is known of JetStream as a whole.
#[derive(Debug)]
pub(super) struct Presence(watch::Sender<State>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    jetstream: JetStream,
    /// What was answered that nothing is there, and is asked again.
    subject: Box<str>,
}

impl Presence {
    pub(super) fn new() -> Self {
        let state = State { jetstream: JetStream::Unknown, subject: Box::default() };
        Self(watch::channel(state).0)
    }

    pub(super) fn get(&self) -> JetStream {
        self.0.borrow().jetstream.clone()
    }

    /// Takes in what an API call was answered.
    pub(super) fn see(
        &self,
        subject: &str,
        answer: &Result<RequestAnswer, BrokerError>,
        settings: &Settings,
        server: &ServerInfo,
    ) {
        let jetstream = match answer {
            Ok(RequestAnswer::NoResponder) => JetStream::Absent(nobody(settings, server).into()),
            Ok(RequestAnswer::Replied(body)) => match not_enabled(body) {
                Some(why) => JetStream::Absent(why.into()),
                None => JetStream::There,
            },
            Err(_) => return,
        };
        let state = State { jetstream, subject: subject.into() };
        self.0.send_if_modified(|old| {
            let changed = old.jetstream != state.jetstream;
            if changed {
                *old = state;
            }
            changed
        });
    }

    /// Asks on a connection that is new, and again while JetStream is absent, until it is lost.
    pub(super) async fn look(&self, requests: &Arc<RequestMux>, settings: &Settings) {
        let lost = &requests.connection.lost;
        lost.run_until_cancelled(async {
            self.ask(requests, settings, &settings.api("INFO")).await;
            let mut states = self.0.subscribe();
            loop {
                let absent = |state: &State| matches!(state.jetstream, JetStream::Absent(_));
                let Ok(state) = states.wait_for(absent).await.map(|state| state.clone()) else {
                    return;
                };
                sleep(ABSENT_RETRY).await;
                self.ask(requests, settings, &state.subject).await;
            }
        })
        .await;
    }

    async fn ask(&self, requests: &Arc<RequestMux>, settings: &Settings, subject: &str) {
        let request =
            Request { subject: subject.into(), payload: Bytes::new(), line: None, by: None };
        let until: Instant = clock::now() + PRESENCE_TIMEOUT;
        if let Some(answer) = requests.ask(&[request], until).await.pop() {
            self.see(subject, &answer, settings, &requests.connection.client.server_info());
        }
    }
}

/// What it means that nobody listens where JetStream would.
pub(super) fn nobody(settings: &Settings, server: &ServerInfo) -> String {
    let Some(domain) = &settings.domain else {
        return "JetStream is not enabled: nobody answers at `$JS.API`".to_owned();
    };
    let own = match &server.domain {
        Some(own) if own != domain => format!("; the domain of the connected server is `{own}`"),
        Some(_) | None => String::new(),
    };
    format!("nobody answers for JetStream domain `{domain}`, the value of --js-domain{own}")
}

#[derive(Deserialize)]
struct Wire {
    error: Option<WireError>,
}

#[derive(Deserialize)]
struct WireError {
    #[serde(default)]
    err_code: u32,
    #[serde(default)]
    description: String,
}

fn not_enabled(body: &[u8]) -> Option<String> {
    let error = serde_json::from_slice::<Wire>(body).ok()?.error?;
    NOT_ENABLED.contains(&error.err_code).then_some(error.description)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_jetstream_is_not_enabled_is_told_from_what_concerns_one_consumer() {
        let body = |code: u32| {
            format!(r#"{{"type":"x","error":{{"code":503,"err_code":{code},"description":"d"}}}}"#)
        };
        for code in NOT_ENABLED {
            assert_eq!(not_enabled(body(code).as_bytes()).as_deref(), Some("d"));
        }
        // No such consumer; JetStream of a cluster without a leader, which others may not need.
        for code in [10_014, 10_059, 10_008] {
            assert_eq!(not_enabled(body(code).as_bytes()), None);
        }
        assert_eq!(not_enabled(br#"{"type":"x","created":"y"}"#), None);
        assert_eq!(not_enabled(b"no JSON"), None);
    }
}
