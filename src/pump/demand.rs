//! The pull that is due: when, for whom, and of which size. Holds nothing.
//!
//! A pull for waiters ends with the messages that are available. It also asks for what the flows have room for.
//! A pull for flows alone waits for its whole batch.

use std::time::{Duration, Instant};

use super::{
    Allowance, Demand, HEAD_START, LONGEST_PULL, NO_WAIT_PULL, OVERHEAD, Pump, SHORTEST_PULL, Step,
    pull::{Pull, PullParams},
};

impl<M> Pump<M> {
    /// The demand of the pull that is due now. `None`: no pull is due.
    pub fn demand(&self, now: Instant) -> Option<Demand> {
        self.next.not_before.is_none_or(|at| now >= at).then_some(())?;
        let for_waiters = self.wants_to_pull(now);
        let for_flows = self.flows_want() && self.flows.is_ripe(self.wanted_by_flows(), now);
        (for_waiters || for_flows).then(|| {
            let mode = self.next.mode;
            let most = match (for_waiters, mode.uncapped) {
                (_, true) => 1,
                (true, false) if mode.plain => 1,
                (true, false) => self.limits.max_batch.min(self.limits.max_unsettled),
                (false, false) => self.limits.max_batch,
            };
            let messages = u32::try_from(self.wanted()).unwrap_or(u32::MAX).min(most.max(1));
            let bytes = (!mode.uncapped).then(|| self.max_bytes(messages));
            Demand { messages, bytes }
        })
    }

    pub(super) fn issue(&mut self, now: Instant, allowed: Allowance) -> Option<Step<M>> {
        let demand = self.demand(now);
        self.starved = demand.is_some() && (allowed.messages == 0 || allowed.bytes == 0);
        let demand = demand.filter(|_| !self.starved)?;
        let for_flows = !self.wants_to_pull(now);
        let batch = demand.messages.min(allowed.messages);
        // With fewer messages, each may be larger.
        let max_bytes = demand.bytes.map(|_| self.max_bytes(batch).min(allowed.bytes));
        let limited = demand.bytes.is_some_and(|bytes| allowed.bytes < bytes);
        let expires = if for_flows { LONGEST_PULL } else { self.expires(now) };
        let asked = PullParams {
            batch,
            expires: expires.min(self.limits.max_expires).min(allowed.wait),
            mode: self.next.mode,
            short_of_bytes: limited,
            short: limited || batch < demand.messages,
            continues: self.next.more_by.is_some(),
            for_flows,
        };
        self.issued += 1;
        let no = self.issued;
        self.pull = Some(Pull::new(no, asked, self.waiters.next(), now));
        let PullParams { expires, mode, .. } = asked;
        let no_wait = !mode.plain && !for_flows;
        Some(Step::Pull { no, batch, expires, no_wait, max_bytes })
    }

    /// Whether a waiter needs a pull: it has enough time left, or no pull has served it yet. A pull for others
    /// would bring messages too late, and cost them an attempt. In a drain no waiter is left.
    pub(super) fn wants_to_pull(&self, now: Instant) -> bool {
        let fresh = self.waiters.last().is_some_and(|last| last >= self.answered_before);
        let in_time = self.waiters.last_end().is_some_and(|end| end >= now + SHORTEST_PULL);
        self.up && self.pull.is_none() && (fresh || in_time)
    }

    /// Whether a flow has room, and no pull is open. In a drain no flow is left.
    pub(super) fn flows_want(&self) -> bool {
        self.up && self.pull.is_none() && self.wanted_by_flows() > 0
    }

    /// The messages that the flows want besides those that are parked: these follow messages that are being settled.
    pub(super) fn wanted_by_flows(&self) -> u64 {
        let parked = u64::try_from(self.parked.len()).unwrap_or(u64::MAX);
        match u64::try_from(self.room_of_flows()).unwrap_or(u64::MAX) {
            0 => 0,
            room => self.flows.wanted().saturating_sub(parked).min((room / (2 * OVERHEAD)).max(1)),
        }
    }

    /// The bytes for which the flows have room, or will have soon, besides those of the parked messages.
    fn room_of_flows(&self) -> u128 {
        self.flows.room().saturating_sub(u128::from(self.parked.bytes()))
    }

    /// The earliest time of a pull for the flows, if they want one.
    pub(super) fn flows_pull_at(&self, now: Instant) -> Option<Instant> {
        let ripe_at = self.flows.ripe_at();
        let ripe_at = ripe_at.filter(|_| !self.flows.is_ripe(self.wanted_by_flows(), now));
        ripe_at.max(self.next.not_before)
    }

    fn expires(&self, now: Instant) -> Duration {
        self.waiters.last_end().map_or(NO_WAIT_PULL, |end| {
            let left = end.saturating_duration_since(now);
            left.saturating_sub(HEAD_START).clamp(SHORTEST_PULL, LONGEST_PULL)
        })
    }

    /// The room of the waiters and the flows, minus the overhead of each message. A single message that is too large
    /// for this, but fits without the others, is pulled alone and uncapped.
    fn max_bytes(&self, batch: u32) -> u64 {
        let room = self.waiters.room() + self.room_of_flows();
        let room = room.saturating_sub(u128::from(u64::from(batch) * OVERHEAD));
        let most = self.limits.max_request_bytes.unwrap_or(u64::MAX).min(i64::MAX as u64);
        u64::try_from(room).unwrap_or(u64::MAX).min(most).max(1)
    }
}
