//! Decides when the client of a stream is silent: it sends nothing, or it reads nothing. Pure.

use std::time::{Duration, Instant};

use crate::api_error::{ApiError, SilentDirection};

/// A client may be silent for this many heartbeats.
const SILENT_HEARTBEATS: u32 = 3;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Silence {
    heartbeat: Duration,
    /// The client must send. Its last frame, or the time from which its frames are read again.
    heard_at: Option<Instant>,
    /// Frames of the client are read now.
    reads: bool,
    /// Since when the client has taken nothing of what was to be written. `None`: it waits for us.
    unread_since: Option<Instant>,
    /// The bytes that were written by then.
    written: u64,
}

impl Silence {
    pub(super) fn new(heartbeat: Duration, must_send: bool, now: Instant) -> Self {
        let heard_at = must_send.then_some(now);
        Self { heartbeat, heard_at, reads: true, unread_since: None, written: 0 }
    }

    /// A frame of the client has come.
    pub(super) fn heard(&mut self, now: Instant) {
        self.heard_at = self.heard_at.map(|_| now);
    }

    /// The client will send nothing more.
    pub(super) fn half_closed(&mut self) {
        self.heard_at = None;
    }

    /// Frames are read, or not. A frame that is not read counts as sent.
    pub(super) fn reads(&mut self, reads: bool, now: Instant) {
        if !reads || !std::mem::replace(&mut self.reads, reads) {
            self.heard(now);
        }
        self.reads = reads;
    }

    /// `waits`: the client has taken all, and waits for more. Otherwise so many bytes were written to it so far.
    pub(super) fn wrote(&mut self, waits: bool, written: u64, now: Instant) {
        if waits {
            self.unread_since = None;
        } else if self.unread_since.is_none() || written != self.written {
            self.unread_since = Some(now);
        }
        self.written = written;
    }

    /// The client is silent for too long. A frame that has come, and was not looked at, must be taken in before.
    pub(super) fn is_over(&self, now: Instant) -> Option<ApiError> {
        let over = |since: Option<Instant>| since.is_some_and(|since| now >= since + self.limit());
        let direction = if over(self.sends_by()) {
            SilentDirection::Sending
        } else if over(self.unread_since) {
            SilentDirection::Reading
        } else {
            return None;
        };
        Some(ApiError::StreamSilent(direction, self.limit()))
    }

    /// When the client will be silent for too long. `None`: it is not silent.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let since = [self.sends_by(), self.unread_since].into_iter().flatten().min();
        since.map(|since| since + self.limit())
    }

    /// This process was stopped: what has come meanwhile may not be here yet.
    pub(super) fn forgive(&mut self, now: Instant) {
        self.heard(now);
        self.unread_since = self.unread_since.map(|_| now);
    }

    /// Whether the deadline is past for so long that this process cannot have run.
    pub(super) fn was_missed(&self, now: Instant) -> bool {
        self.next_deadline().is_some_and(|at| now >= at + self.heartbeat)
    }

    fn sends_by(&self) -> Option<Instant> {
        self.heard_at.filter(|_| self.reads)
    }

    fn limit(&self) -> Duration {
        self.heartbeat * SILENT_HEARTBEATS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const BEAT: Duration = Duration::from_secs(1);

    fn direction(silence: &Silence, now: Instant) -> Option<SilentDirection> {
        let ApiError::StreamSilent(direction, _) = silence.is_over(now)? else { panic!() };
        Some(direction)
    }

    #[test]
    fn client_that_must_send_is_silent_after_three_heartbeats() {
        let start = clock::now();
        let mut silence = Silence::new(BEAT, true, start);
        silence.heard(start + BEAT);
        assert_eq!(silence.next_deadline(), Some(start + 4 * BEAT));
        assert_eq!(direction(&silence, start + 4 * BEAT - BEAT / 10), None);
        assert_eq!(direction(&silence, start + 4 * BEAT), Some(SilentDirection::Sending));
        silence.half_closed();
        assert_eq!((silence.next_deadline(), direction(&silence, start + 9 * BEAT)), (None, None));
        let silence = Silence::new(BEAT, false, start);
        assert_eq!(direction(&silence, start + 9 * BEAT), None, "without keep");
    }

    #[test]
    fn frames_that_are_not_read_are_not_missed() {
        let start = clock::now();
        let mut silence = Silence::new(BEAT, true, start);
        silence.reads(false, start + BEAT);
        assert_eq!(direction(&silence, start + 9 * BEAT), None);
        silence.reads(true, start + 9 * BEAT);
        silence.reads(true, start + 10 * BEAT);
        assert_eq!(silence.next_deadline(), Some(start + 12 * BEAT));
    }

    #[test]
    fn client_that_takes_no_byte_is_silent_after_three_heartbeats() {
        let start = clock::now();
        let mut silence = Silence::new(BEAT, false, start);
        silence.wrote(false, 10, start);
        silence.wrote(false, 20, start + 2 * BEAT);
        silence.wrote(false, 20, start + 3 * BEAT);
        assert_eq!(direction(&silence, start + 4 * BEAT), None);
        assert_eq!(direction(&silence, start + 5 * BEAT), Some(SilentDirection::Reading));
        silence.wrote(true, 20, start + 5 * BEAT);
        assert_eq!((silence.next_deadline(), direction(&silence, start + 9 * BEAT)), (None, None));
    }

    #[test]
    fn process_that_was_stopped_listens_once_more() {
        let start = clock::now();
        let mut silence = Silence::new(BEAT, true, start);
        assert!(!silence.was_missed(start + 3 * BEAT) && silence.was_missed(start + 4 * BEAT));
        silence.forgive(start + 4 * BEAT);
        assert_eq!(silence.next_deadline(), Some(start + 7 * BEAT));
    }
}
