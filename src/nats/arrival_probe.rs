//! Sees to it that what was sent on the settling connection arrives in time, or never: what arrives
//! after its delivery is over would settle the next worker's.
//!
//! ```text
//!  sent, by ──▶ due ─ at half the time, or every 3 s ─▶ a message to ourselves, behind it all
//!                                                         │ comes back: all of it has arrived
//!                                                         └ not in time: the connection ends,
//!                                                           with all that it has not sent
//! ```
//! NATS reads a connection in order, so one message answers for all that was sent before it. The
//! library's own pings do not: they rest while anything comes from the server.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::watch;

use super::{plan::Request, request_mux::RequestMux};
use crate::clock;

/// How often it is asked where nothing presses.
const IDLE_PROBE_INTERVAL: Duration = Duration::from_secs(3);
/// The same where NATS does not let us write to our own inbox. Its refusal is an answer too, but it
/// is logged.
const REFUSED_PROBE_INTERVAL: Duration = Duration::from_secs(60);
/// An answer that takes longer does not come.
const ECHO_TIMEOUT: Duration = Duration::from_secs(9);
/// The least time for an answer, so that a busy machine is not taken for a dead wire.
const MIN_ECHO_TIMEOUT: Duration = Duration::from_millis(250);
/// How long to gather what one question is to stand for, at least.
const MIN_GATHER_TIME: Duration = Duration::from_millis(10);

/// When what was sent behind the last question must have arrived.
#[derive(Default)]
pub(super) struct ArrivalDeadline(watch::Sender<Option<NextProbe>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct NextProbe {
    ask_at: Instant,
    by: Instant,
}

impl ArrivalDeadline {
    /// Something was sent that must have arrived by then.
    pub(super) fn must_arrive(&self, by: Instant, now: Instant) {
        let half = by.saturating_duration_since(now) / 2;
        let new = NextProbe { ask_at: now + half.max(MIN_GATHER_TIME), by };
        self.0.send_if_modified(|pressing| match pressing {
            Some(old) if old.by <= by => false,
            Some(old) => {
                *old = NextProbe { ask_at: old.ask_at.min(new.ask_at), by };
                true
            }
            none @ None => {
                *none = Some(new);
                true
            }
        });
    }
}

impl RequestMux {
    /// Asks again and again, until the connection is lost, and ends it when no answer comes in time.
    pub(super) async fn pulse(&self) {
        self.connection.lost.run_until_cancelled(self.beats()).await;
    }

    async fn beats(&self) {
        let mut due = self.due.0.subscribe();
        let mut next = clock::now();
        loop {
            let pressing = *due.borrow_and_update();
            let at = pressing.map_or(next, |pressing| pressing.ask_at.min(next));
            tokio::select! {
                biased;
                () = clock::sleep_until(Some(at)) => {}
                // Its sender is ours.
                _ = due.changed() => continue,
            }
            let Some(pause) = self.answered(&mut due).await else { break };
            next = clock::now() + pause;
        }
        tracing::warn!(
            "what is sent to NATS does not arrive: the connection for settling is replaced"
        );
        self.connection.end();
    }

    /// Asks once, and returns when to ask again where nothing presses. `None`: no answer in time.
    async fn answered(&self, due: &mut watch::Receiver<Option<NextProbe>>) -> Option<Duration> {
        let asked_at = clock::now();
        let mut end = asked_at + ECHO_TIMEOUT;
        let mut pressing = self.due.0.send_replace(None);
        let mut echo = pin!(self.echo());
        loop {
            // What was sent meanwhile cannot arrive before the question does.
            if let Some(NextProbe { by, .. }) = pressing {
                end = end.min(by).max(asked_at + MIN_ECHO_TIMEOUT);
            }
            tokio::select! {
                biased;
                pause = &mut echo => return Some(pause),
                () = clock::sleep_until(Some(end)) => return None,
                _ = due.changed() => pressing = *due.borrow_and_update(),
            }
        }
    }

    /// Sends ourselves a message and waits for it, or for its refusal.
    async fn echo(&self) -> Duration {
        let (since, mut refusals) = (clock::now(), self.connection.denials.watch());
        let echo = self.expect_one();
        let subject = echo.subject();
        let refused = async {
            loop {
                // Its sender is the connection's.
                let _ = refusals.changed().await;
                if self.connection.denials.since(since).contains(&*subject) {
                    return;
                }
            }
        };
        let request = Request {
            subject: subject.as_str().into(),
            payload: Bytes::new(),
            line: None,
            by: None,
        };
        self.send(&request, None, since + ECHO_TIMEOUT).await;
        tokio::select! {
            () = echo.came() => IDLE_PROBE_INTERVAL,
            () = refused => REFUSED_PROBE_INTERVAL,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_all_that_was_sent_the_first_to_be_over_presses() {
        let due = ArrivalDeadline::default();
        let start = clock::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let pressing = || due.0.borrow().unwrap();
        due.must_arrive(after(10), start);
        assert_eq!(pressing(), NextProbe { ask_at: after(5), by: after(10) });
        due.must_arrive(after(20), after(1));
        assert_eq!(pressing(), NextProbe { ask_at: after(5), by: after(10) });
        due.must_arrive(after(4), after(2));
        assert_eq!(pressing(), NextProbe { ask_at: after(3), by: after(4) });
        due.must_arrive(after(1), after(2));
        assert_eq!(pressing(), NextProbe { ask_at: after(2) + MIN_GATHER_TIME, by: after(1) });
    }
}
