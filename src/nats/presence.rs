//! Whether JetStream is enabled for the proxy's account at all. If it is not, no consumer can be
//! read, although both connections work. Owns that state, and asks until JetStream is back.
//!
//! ```text
//!            no responder, or "not enabled"
//!  UNKNOWN ──────────────────────────────────▶ ABSENT, asked again each second
//!     │ any other answer                          │ any other answer
//!     └──────────────▶ THERE ◀────────────────────┘
//! ```
//! 1. Only an answer decides. Silence changes nothing, and a subject without a right to it changes
//!    nothing.
//! 2. Each connection asks once. The right to ask for INFO of the account is not needed: without it
//!    the first CONSUMER.INFO decides, and is asked again.

use std::time::Duration;

use serde::Deserialize;
use tokio::{sync::watch, time::sleep};

use super::{
    api::{ErrorBody, JetStreamApi},
    plan::RequestAnswer,
};
use crate::{
    broker::{BrokerError, JetStream},
    clock,
};

/// Time between two questions while JetStream is absent.
const ABSENT_RETRY: Duration = Duration::from_secs(1);
/// The longest wait for one answer.
const PRESENCE_TIMEOUT: Duration = Duration::from_secs(2);
/// Codes in JetStream's `errors.json`: not enabled for this account, not enabled.
const NOT_ENABLED: [u32; 2] = [10_039, 10_076];

/// The state of JetStream as a whole.
#[derive(Debug)]
pub(super) struct Presence(watch::Sender<State>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    jetstream: JetStream,
    /// The subject whose answer decided. It is asked again while JetStream is absent.
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

    /// Takes in the answer to an API call.
    pub(super) fn see(
        &self,
        api: &JetStreamApi<'_>,
        subject: &str,
        answer: &Result<RequestAnswer, BrokerError>,
    ) {
        let jetstream = match answer {
            Ok(RequestAnswer::NoResponder) => JetStream::Absent(api.no_responder().into()),
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

    /// Asks once on a new connection, and again while JetStream is absent, until the connection is
    /// lost.
    pub(super) async fn watch(&self, api: &JetStreamApi<'_>) {
        let lost = &api.requests.connection.lost;
        lost.run_until_cancelled(async {
            self.ask(api, &api.settings.api("INFO")).await;
            let mut states = self.0.subscribe();
            loop {
                let absent = |state: &State| matches!(state.jetstream, JetStream::Absent(_));
                let Ok(state) = states.wait_for(absent).await.map(|state| state.clone()) else {
                    return;
                };
                sleep(ABSENT_RETRY).await;
                self.ask(api, &state.subject).await;
            }
        })
        .await;
    }

    async fn ask(&self, api: &JetStreamApi<'_>, subject: &str) {
        let answer = api.call(subject, clock::now() + PRESENCE_TIMEOUT).await;
        self.see(api, subject, &answer);
    }
}

#[derive(Deserialize)]
struct Wire {
    error: Option<ErrorBody>,
}

fn not_enabled(body: &[u8]) -> Option<String> {
    let error = serde_json::from_slice::<Wire>(body).ok()?.error?;
    NOT_ENABLED.contains(&error.err_code).then_some(error.description)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_two_codes_for_the_account_say_that_jetstream_is_absent() {
        let body = |code: u32| {
            format!(r#"{{"type":"x","error":{{"code":503,"err_code":{code},"description":"d"}}}}"#)
        };
        for code in NOT_ENABLED {
            assert_eq!(not_enabled(body(code).as_bytes()).as_deref(), Some("d"));
        }
        // An unknown consumer, an unknown stream, and a cluster whose JetStream has no leader. Other
        // consumers may work in such a cluster.
        for code in [10_014, 10_059, 10_008] {
            assert_eq!(not_enabled(body(code).as_bytes()), None);
        }
        assert_eq!(not_enabled(br#"{"type":"x","created":"y"}"#), None);
        assert_eq!(not_enabled(b"no JSON"), None);
    }
}
