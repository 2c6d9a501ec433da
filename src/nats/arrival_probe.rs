//! Proves that messages on the settling connection arrive in time. A late settlement would settle
//! the delivery of the next worker.
//!
//! ```text
//!  sent, by ──▶ deadline ─ at half the time, or every 3 s ─▶ a probe (PING), behind all that
//!                                                            was sent
//!                                                             │ its echo (PONG): all has arrived
//!                                                             └ no echo in time: the connection
//!                                                               ends, with its queue
//! ```
//! NATS reads a connection in order, so one probe stands for everything that was sent before it.

use std::{pin::pin, time::Duration};

use tokio::sync::watch;

use super::{deadline::NextProbe, request_mux::RequestMux};
use crate::clock;

/// Time between two probes while no deadline is set.
const IDLE_PROBE_INTERVAL: Duration = Duration::from_secs(3);
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
        if !probe(mux, &mut deadline).await {
            break;
        }
        idle_until = clock::now() + IDLE_PROBE_INTERVAL;
    }
    tracing::warn!("settlements do not arrive at NATS: the connection for settling is replaced");
    mux.connection.end();
}

/// Sends one probe. `false`: no echo came in time.
async fn probe(mux: &RequestMux, deadline: &mut watch::Receiver<Option<NextProbe>>) -> bool {
    let sent_at = clock::now();
    let mut end = sent_at + ECHO_TIMEOUT;
    let mut next = mux.deadline.take();
    let mut echo = pin!(mux.connection.ping());
    loop {
        // A message that is sent after the probe cannot arrive before the probe.
        if let Some(NextProbe { by, .. }) = next {
            end = end.min(by).max(sent_at + MIN_ECHO_TIMEOUT);
        }
        tokio::select! {
            biased;
            () = &mut echo => {
                mux.connection.meter.returned(clock::now().saturating_duration_since(sent_at));
                return true;
            }
            () = clock::sleep_until(Some(end)) => return false,
            _ = deadline.changed() => next = *deadline.borrow_and_update(),
        }
    }
}
