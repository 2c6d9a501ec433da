//! The lease table: one example of each promise, and random histories next to a reference.

mod holding;
mod keeping;
mod machine;
mod moving;
mod naive;
mod reference;
mod replies;
mod revising;
mod settling;
mod sleeping;
mod steps;
mod walking;

use std::time::{Duration, Instant};

use fetch_proxy::lease::{
    BeginResult, ConsumerId, Due, LeaseError, LeaseId, LeaseStatus, LeaseTable, PublishOutcome,
    SettleKind, Terms,
};

const CONSUMER: ConsumerId = ConsumerId(7);
const ACK_WAIT: u64 = 10_000;
/// The ack wait less its margin of a tenth.
const ACK_BY: u64 = 9_000;
/// A lease of a test is never this long, unless that is what it is about.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
const OVER: LeaseError = LeaseError::Expired { forgotten: false };

/// A table, and its time in milliseconds.
struct TimedTable {
    table: LeaseTable<&'static str>,
    origin: Instant,
}

impl TimedTable {
    fn new() -> Self {
        let origin = Instant::now();
        Self { table: LeaseTable::new(origin, LONGEST, 64), origin }
    }

    fn at(&self, millis: u64) -> Instant {
        self.origin + Duration::from_millis(millis)
    }

    fn terms(&self, sequence: u64, received: u64) -> Terms {
        Terms {
            consumer: CONSUMER,
            sequence,
            consumer_sequence: sequence,
            last_attempt: false,
            received: self.at(received),
            sent_after: None,
            age: Duration::ZERO,
            ack_wait: Duration::from_millis(ACK_WAIT),
            delivery_count: 1,
        }
    }

    /// A delivery of message 1, received at 0.
    fn granted(&mut self) -> LeaseId {
        self.table.grant(self.terms(1, 0), "one").0
    }

    /// The same, assigned at 0 for so long.
    fn assigned(&mut self, length: u64) -> LeaseId {
        let id = self.granted();
        self.table.assign(id, Some(Duration::from_millis(length)), self.origin).unwrap();
        id
    }

    fn last_attempt(&mut self) -> LeaseId {
        let terms = Terms { last_attempt: true, ..self.terms(1, 0) };
        self.table.grant(terms, "last").0
    }

    fn begin(
        &mut self,
        id: LeaseId,
        kind: SettleKind,
        now: u64,
    ) -> Result<BeginResult<'_, &'static str>, LeaseError> {
        let now = self.at(now);
        self.table.begin(id, kind, now)
    }

    fn finish(
        &mut self,
        id: LeaseId,
        outcome: PublishOutcome,
        now: u64,
    ) -> (LeaseStatus, Option<&'static str>) {
        let now = self.at(now);
        self.table.finish(id, outcome, now)
    }

    fn settle(
        &mut self,
        id: LeaseId,
        kind: SettleKind,
        outcome: PublishOutcome,
        now: u64,
    ) -> LeaseStatus {
        assert!(matches!(self.begin(id, kind, now), Ok(BeginResult::Publish(_))));
        self.finish(id, outcome, now).0
    }

    fn extend(&mut self, id: LeaseId, length: u64, now: u64) -> Result<Instant, LeaseError> {
        let now = self.at(now);
        self.table.extend(id, Some(Duration::from_millis(length)), now)
    }

    fn sweep(&mut self, now: u64) -> Vec<Due<&'static str>> {
        let now = self.at(now);
        self.table.sweep(now, 100)
    }

    fn progressed(&mut self, id: LeaseId, sent_at: u64, now: u64) {
        let (sent_at, now) = (self.at(sent_at), self.at(now));
        self.table.progressed(id, sent_at, true, now);
    }

    fn distrust(&mut self, when: u64) {
        let when = self.at(when);
        assert_eq!(self.table.distrust(CONSUMER, when, None, 100), None);
    }

    fn ack_by(&self, id: LeaseId) -> u128 {
        self.table.ack_by(id).unwrap().duration_since(self.origin).as_millis()
    }
}
