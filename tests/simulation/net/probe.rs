//! The arrival probe of a settling wire, as `src/nats/arrival_probe.rs` does it. Pure: [`Probe::turn`] decides.
//!
//! A message to itself behind the settlements, at half of the time that they have. If it does not come back
//! in time, the wire ends, and so does everything in the library.

use std::time::Duration;

use super::super::jetstream::Time;

const MIN_GATHER_TIME: Duration = Duration::from_millis(10);
const IDLE_PROBE_INTERVAL: Duration = Duration::from_secs(3);
const ECHO_TIMEOUT: Duration = Duration::from_secs(9);
const MIN_ECHO_TIMEOUT: Duration = Duration::from_millis(250);

#[derive(Default)]
pub(super) struct Probe {
    /// The next probe that a deadline demands, and that deadline.
    next: Option<(Time, Time)>,
    idle_until: Time,
    out: Option<Out>,
}

struct Out {
    number: u64,
    sent_at: Time,
    /// When the wire ends without an echo.
    end: Time,
}

pub(super) enum Turn {
    /// Send a probe with a new number, and tell it by [`Probe::sent`].
    Send,
    /// The echo is missing.
    End,
    /// There is nothing to do yet.
    Wait,
}

impl Probe {
    /// A message was sent at `now` that must arrive by `by`. Returns when the next turn is due.
    pub(super) fn must_arrive(&mut self, by: Time, now: Time) -> Time {
        let half = by.saturating_sub(now) / 2;
        let send_at = now + half.max(MIN_GATHER_TIME);
        self.next = Some(match self.next {
            Some((_, old)) if old <= by => self.next.unwrap_or((send_at, by)),
            Some((old_send, _)) => (old_send.min(send_at), by),
            None => (send_at, by),
        });
        self.bound_echo();
        self.due()
    }

    /// A message that is sent after the probe cannot arrive before the probe.
    fn bound_echo(&mut self) {
        if let (Some(out), Some((_, by))) = (&mut self.out, self.next) {
            out.end = out.end.min(by).max(out.sent_at + MIN_ECHO_TIMEOUT);
        }
    }

    fn due(&self) -> Time {
        match &self.out {
            Some(out) => out.end,
            None => self.next.map_or(self.idle_until, |(send_at, _)| send_at.min(self.idle_until)),
        }
    }

    pub(super) fn turn(&self, now: Time) -> Turn {
        let due = self.due();
        match &self.out {
            _ if now < due => Turn::Wait,
            Some(_) => Turn::End,
            None => Turn::Send,
        }
    }

    /// A probe with this number leaves. Returns when the next turn is due.
    pub(super) fn sent(&mut self, number: u64, now: Time) -> Time {
        let by = self.next.take().map(|(_, by)| by);
        let end = now + ECHO_TIMEOUT;
        let end = by.map_or(end, |by| end.min(by).max(now + MIN_ECHO_TIMEOUT));
        self.out = Some(Out { number, sent_at: now, end });
        end
    }

    /// An answer has come. If it is the echo, returns when the next turn is due.
    pub(super) fn echo(&mut self, number: u64, now: Time) -> Option<Time> {
        self.out.take_if(|out| out.number == number)?;
        self.idle_until = now + IDLE_PROBE_INTERVAL;
        Some(self.due().max(now))
    }
}
