//! Proves that messages on the settling connection arrive in time. A late settlement would settle
//! the delivery of the next worker.
//!
//! ```text
//!  sent, by ──▶ deadline ─ at half the time, or every 3 s ─▶ a probe to our own inbox, behind
//!                                                            all that was sent
//!                                                             │ its echo comes: all has arrived
//!                                                             └ no echo in time: the connection
//!                                                               ends, with its queue
//! ```
//! NATS reads a connection in order, so one probe stands for everything that was sent before it. The
//! library's own pings prove less: it sends none while data comes from the server.

use std::{pin::pin, time::Duration};

use bytes::Bytes;
use tokio::sync::watch;

use super::{deadline::NextProbe, plan::Request, request_mux::RequestMux};
use crate::clock;

/// Time between two probes while no deadline is set.
const IDLE_PROBE_INTERVAL: Duration = Duration::from_secs(3);
/// The same if NATS does not let us publish to our own inbox. The refusal also proves that the probe
/// arrived, but the server logs it.
const REFUSED_PROBE_INTERVAL: Duration = Duration::from_secs(60);
/// The longest wait for an echo.
const ECHO_TIMEOUT: Duration = Duration::from_secs(9);
/// The shortest wait for an echo, so that a busy machine does not look like a dead connection.
const MIN_ECHO_TIMEOUT: Duration = Duration::from_millis(250);

/// Probes until the connection is lost. Ends the connection if an echo does not come in time.
pub(super) async fn run(mux: &RequestMux) {
    mux.connection.lost.run_until_cancelled(probe_until_silent(mux)).await;
}

async fn probe_until_silent(mux: &RequestMux) {
    let mut deadline = mux.deadline.watch();
    let mut idle_until = clock::now();
    loop {
        let next = *deadline.borrow_and_update();
        let send_at = next.map_or(idle_until, |next| next.send_at.min(idle_until));
        tokio::select! {
            biased;
            () = clock::sleep_until(Some(send_at)) => {}
            // The mux holds the sender.
            _ = deadline.changed() => continue,
        }
        let Some(pause) = probe(mux, &mut deadline).await else { break };
        idle_until = clock::now() + pause;
    }
    tracing::warn!("settlements do not arrive at NATS: the connection for settling is replaced");
    mux.connection.end();
}

/// Sends one probe and returns the time to the next one if no deadline is set. `None`: no echo came
/// in time.
async fn probe(
    mux: &RequestMux,
    deadline: &mut watch::Receiver<Option<NextProbe>>,
) -> Option<Duration> {
    let sent_at = clock::now();
    let mut end = sent_at + ECHO_TIMEOUT;
    let mut next = mux.deadline.take();
    let mut echo = pin!(echo(mux));
    loop {
        // A message that is sent after the probe cannot arrive before the probe.
        if let Some(NextProbe { by, .. }) = next {
            end = end.min(by).max(sent_at + MIN_ECHO_TIMEOUT);
        }
        tokio::select! {
            biased;
            pause = &mut echo => return Some(pause),
            () = clock::sleep_until(Some(end)) => return None,
            _ = deadline.changed() => next = *deadline.borrow_and_update(),
        }
    }
}

/// Sends a message to our own inbox. Waits for the message, or for its refusal.
async fn echo(mux: &RequestMux) -> Duration {
    let (since, mut refusals) = (clock::now(), mux.connection.denials.watch());
    let echo = mux.expect_one();
    let subject = echo.subject();
    let refused = async {
        loop {
            // The connection holds the sender.
            let _ = refusals.changed().await;
            if mux.connection.denials.since(since).contains(&*subject) {
                return;
            }
        }
    };
    let request = Request::new(&subject, Bytes::new());
    mux.send(&request, None, since + ECHO_TIMEOUT).await;
    tokio::select! {
        () = echo.came() => {
            mux.connection.meter.returned(clock::now().saturating_duration_since(since));
            IDLE_PROBE_INTERVAL
        }
        () = refused => REFUSED_PROBE_INTERVAL,
    }
}
