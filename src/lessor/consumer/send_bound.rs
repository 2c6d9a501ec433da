//! The earliest time at which JetStream can have sent what arrives: after the pull that asked for it. JetStream
//! starts its ack timer when it sends, and a delivery does not say when. It can wait in a stalled connection,
//! or in the socket of a stopped process. Pure: `now` is an argument.
//!
//! ```text
//!   pull 7 ─▶ pull 8 ─▶ pull 9           what arrives now may be of pull 7
//!   the end of pull 7 arrives            what arrives now is of pull 8 at the earliest
//!   pull 8 has brought its last message  what arrives now is of pull 9 at the earliest
//! ```
//! 1. JetStream answers the pulls of an inbox in their order, and the answers keep that order.
//! 2. The bound never goes back while the inbox lives.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::broker::Delivery;

/// An end that is not heard this long after its pull has expired was lost, like the ends of an account that
/// exports single answers. A stall that is longer breaks the connection.
const LOST_END: Duration = Duration::from_secs(10);

/// A pull whose end was not heard.
#[derive(Debug, Clone, Copy)]
struct Unheard {
    no: u64,
    sent_at: Instant,
    expires_at: Instant,
    /// Messages that it may still bring.
    left: u32,
}

/// A delivery that has arrived.
#[derive(Debug)]
pub(super) struct ArrivedDelivery {
    pub(super) delivery: Box<Delivery>,
    /// JetStream did not send it before this time, and so did not start its ack timer. `None`: no pull is known.
    pub(super) sent_after: Option<Instant>,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct SendBound {
    unheard: VecDeque<Unheard>,
    /// The sending of the last pull that has ended.
    last: Option<Instant>,
}

impl SendBound {
    /// A pull was sent at `sent_at`.
    pub(super) fn pulled(&mut self, no: u64, batch: u32, sent_at: Instant, expires: Duration) {
        let expires_at = sent_at + expires;
        self.unheard.push_back(Unheard { no, sent_at, expires_at, left: batch });
    }

    /// A delivery has arrived. Returns the time before which JetStream cannot have sent it; `None` without a
    /// pull.
    pub(super) fn arrived(&mut self, now: Instant) -> Option<Instant> {
        self.forget(|pull| now >= pull.expires_at + LOST_END);
        let Some(first) = self.unheard.front_mut() else { return self.last };
        first.left = first.left.saturating_sub(1);
        let sent_at = first.sent_at;
        self.forget(|pull| pull.left == 0);
        Some(sent_at)
    }

    /// The end of a pull has arrived, and with it the ends of all pulls before it.
    pub(super) fn ended(&mut self, no: u64) {
        self.forget(|pull| pull.no <= no);
    }

    /// The inbox is gone.
    pub(super) fn lost(&mut self) {
        *self = Self::default();
    }

    fn forget(&mut self, over: impl Fn(&Unheard) -> bool) {
        while let Some(pull) = self.unheard.pop_front_if(|pull| over(pull)) {
            self.last = Some(pull.sent_at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const SECOND: Duration = Duration::from_secs(1);

    fn after(pulls: &[(u64, u32)]) -> (SendBound, impl Fn(u64) -> Instant) {
        let (mut bound, start) = (SendBound::default(), clock::now());
        for (no, batch) in pulls {
            let sent_at = start + SECOND * u32::try_from(*no).unwrap();
            bound.pulled(*no, *batch, sent_at, SECOND * 5);
        }
        (bound, move |no| start + SECOND * u32::try_from(no).unwrap())
    }

    #[test]
    fn delivery_may_be_of_the_first_pull_without_an_end() {
        let (mut bound, at) = after(&[(1, 5), (2, 5)]);
        assert_eq!(bound.arrived(at(3)), Some(at(1)));
        bound.ended(1);
        assert_eq!(bound.arrived(at(3)), Some(at(2)));
        bound.ended(2);
        assert_eq!(bound.arrived(at(3)), Some(at(2)), "a late delivery of a pull that has ended");
    }

    #[test]
    fn full_pull_has_ended() {
        let (mut bound, at) = after(&[(1, 2), (2, 5)]);
        assert_eq!(bound.arrived(at(3)), Some(at(1)));
        assert_eq!(bound.arrived(at(3)), Some(at(1)));
        assert_eq!(bound.arrived(at(3)), Some(at(2)));
    }

    #[test]
    fn end_of_a_pull_ends_the_pulls_before_it() {
        let (mut bound, at) = after(&[(1, 5), (2, 5), (3, 5)]);
        bound.ended(2);
        assert_eq!(bound.arrived(at(4)), Some(at(3)));
    }

    #[test]
    fn end_that_was_lost_counts_as_heard_after_some_time() {
        let (mut bound, at) = after(&[(1, 5), (2, 5)]);
        assert_eq!(bound.arrived(at(15)), Some(at(1)));
        assert_eq!(bound.arrived(at(16)), Some(at(2)));
    }

    #[test]
    fn delivery_without_a_pull_has_no_bound() {
        let (mut bound, at) = after(&[(1, 5)]);
        bound.lost();
        assert_eq!(bound.arrived(at(2)), None);
    }
}
