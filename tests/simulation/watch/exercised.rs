//! Counts what a run has exercised: accidents and their pairs, and who met whom. Judges nothing. Pure.

use std::time::Duration;

use super::{
    super::jetstream::Time,
    answers::Reading,
    ledger::{CallId, Ledger},
    report::Report,
    troubles::{Trouble, TroubleSpan},
};

/// Two accidents are a pair if they are this close to each other.
const NEAR: Duration = Duration::from_secs(2);

/// A process that starts is not connected for this long, which is no accident.
const START: Duration = Duration::from_millis(1_200);

/// The rows that the standard seeds must exercise.
pub const DEMANDED: &[&str] = &[
    "leader: changed",
    "leader: changed while settlements were under way",
    "settle: through another replica",
    "settle: ownerless, OUTCOME_CONFIRMED",
    "settle: ownerless, OUTCOME_SENT",
    "settle: ownerless, OWNER_UNREACHABLE",
    "settle: ownerless, LEASE_EXPIRED",
    "drain: handed over true",
    "drain: handed over false",
    "hand-over: met by a stall",
    "hand-over: met by a kill of the sender",
    "hand-over: met by a kill of another replica",
    "hand-over: met by a change of leader",
    "made again: seen by all",
    "made again: unseen by a replica",
    "give-back: lapsed",
    "give-back: not handed out",
    "fetch: cancelled, or its way was lost",
    "fetch: answer lost",
    "fetch: CONSUMER_NOT_FOUND",
    "fetch: DRAINING",
    "fetch: LEASE_LIMIT",
    "fetch: NATS_UNAVAILABLE",
    "fetch: empty, Draining",
    "fetch: empty, MaxAckPending",
    "fetch: empty, NoMessages",
    "fetch: empty, Paused",
    "fetch: empty, Rejected",
    "fetch: empty, Settle",
    "fetch: empty, FetchFailed",
    "fetch: DRAINING after settlements",
    "end: settled by a client",
    "end: removed",
    "end: attempts over",
    "end: terminated",
    "lease: ended early: LeaderChanged",
    "lease: ended early: MadeAgain",
    "lease: ended early: NotKeptAlive",
    "lease: ended early: OwnNak",
    "settle: Ack LEASE_EXPIRED",
    "settle: Ack LEASE_SETTLED",
    "settle: Ack LEASE_BUSY",
    "settle: Ack NATS_UNAVAILABLE",
    "settle: Ack OWNER_UNREACHABLE",
    "settle: Ack SETTLE_UNCONFIRMED",
    "settle: Ack JETSTREAM_DENIED",
    "settle: Ack KEY_UNKNOWN",
    "settle: Ack OUTCOME_CONFIRMED",
    "settle: Ack OUTCOME_DUPLICATE",
    "settle: Ack OUTCOME_SENT",
    "settle: Nak LEASE_EXPIRED",
    "settle: Nak LEASE_SETTLED",
    "settle: Nak LEASE_BUSY",
    "settle: Nak NATS_UNAVAILABLE",
    "settle: Nak OWNER_UNREACHABLE",
    "settle: Nak SETTLE_UNCONFIRMED",
    "settle: Nak JETSTREAM_DENIED",
    "settle: Nak KEY_UNKNOWN",
    "settle: Nak OUTCOME_CONFIRMED",
    "settle: Nak OUTCOME_DUPLICATE",
    "settle: Nak OUTCOME_SENT",
    "settle: Term LEASE_EXPIRED",
    "settle: Term LEASE_SETTLED",
    "settle: Term LEASE_BUSY",
    "settle: Term NATS_UNAVAILABLE",
    "settle: Term OWNER_UNREACHABLE",
    "settle: Term SETTLE_UNCONFIRMED",
    "settle: Term JETSTREAM_DENIED",
    "settle: Term KEY_UNKNOWN",
    "settle: Term OUTCOME_CONFIRMED",
    "settle: Term OUTCOME_DUPLICATE",
    "settle: Term OUTCOME_SENT",
    "settle: Extend LEASE_EXPIRED",
    "settle: Extend LEASE_SETTLED",
    "settle: Extend NATS_UNAVAILABLE",
    "settle: Extend OWNER_UNREACHABLE",
    "settle: Extend OUTCOME_EXTENDED",
    "accident: clock",
    "accident: drain",
    "accident: keys",
    "accident: kill",
    "accident: leader away",
    "accident: limits changed",
    "accident: made again",
    "accident: pause",
    "accident: poison",
    "accident: restart",
    "accident: stop",
    "accident: suspension",
    "accident: wire",
];

/// The same, with clients that name their Fetch calls.
pub const DEMANDED_OF_ATTEMPTS: &[&str] = &[
    "attempt: repeated",
    "attempt: same messages again",
    "attempt: same messages again, at another replica",
    "attempt: over, and repeated",
    "attempt: given back",
    "attempt: given back through another replica",
    "attempt: old token refused",
    "fetch: empty, AttemptOver",
];

/// The same, with clients on streams.
pub const DEMANDED_OF_STREAMS: &[&str] = &[
    "stream: a message for a stream that holds something",
    "stream: draining",
    "stream: half-closed",
    "stream: hung up",
    "stream: not read for a time",
    "stream: paused",
    "stream: settled after its end",
    "stream: settled on it",
];

/// The same of streams with `keep`.
pub const DEMANDED_OF_KEEP: &[&str] =
    &["stream: a kept message is back after its grace", "stream: its client hangs"];

/// An accident begins. `open`: how many settlements are under way.
pub fn trouble(ledger: &Ledger, span: &TroubleSpan, open: usize, report: &mut Report) {
    let (kind, coverage) = (span.trouble.kind(), &mut report.coverage);
    coverage.count(format!("accident: {kind}"));
    let near = |other: &TroubleSpan| {
        other.trouble.kind() != kind
            && other.from <= span.until + NEAR
            && span.from <= other.until + NEAR
    };
    for other in ledger.troubles.all().iter().filter(|other| near(other)) {
        let mut pair = [kind, other.trouble.kind()];
        pair.sort_unstable();
        coverage.count(format!("pair: {} + {}", pair[0], pair[1]));
    }
    match span.trouble {
        Trouble::LeaderAway => {
            coverage.count("leader: changed");
            if open > 0 {
                coverage.count("leader: changed while settlements were under way");
            }
        }
        // A consumer that is made for the first time surprises nobody.
        Trouble::MadeAgain if !span.from.is_zero() => {
            let deaf = ledger.troubles.all().iter().any(|other| {
                let deaf = matches!(other.trouble, Trouble::Wire { .. } | Trouble::Stopped { .. });
                let long = other.until.saturating_sub(other.from) > START;
                deaf && long && other.from <= span.from && span.from <= other.until
            });
            let seen = if deaf { "unseen by a replica" } else { "seen by all" };
            coverage.count(format!("made again: {seen}"));
        }
        _ => {}
    }
}

/// A settlement was answered.
pub fn settled(ledger: &Ledger, CallId(id, place): CallId, reading: &Reading, report: &mut Report) {
    let Some(one) = ledger.deliveries.get(&id) else { return };
    let Some(call) = one.calls.get(place).filter(|call| call.side != one.side) else { return };
    let (side, coverage) = (one.side, &mut report.coverage);
    coverage.count("settle: through another replica");
    let killed = Trouble::Killed { side };
    if ledger.troubles.happened(killed, &one.message.0, Time::ZERO, call.began)
        || ledger.ended.contains(&side)
    {
        coverage.count(format!("settle: ownerless, {}", reading.name));
    }
}

/// A drain has ended.
pub fn drained(ledger: &Ledger, side: usize, handed_over: bool, now: Time, report: &mut Report) {
    let coverage = &mut report.coverage;
    coverage.count(format!("drain: handed over {handed_over}"));
    let all = ledger.troubles.all();
    let drain = all.iter().rev().find(|span| span.trouble == Trouble::Draining { side });
    let Some(began) = drain.map(|span| span.from) else { return };
    let met = all.iter().filter(|span| span.from <= now && began <= span.until);
    let mut met: Vec<_> = met
        .filter_map(|span| match span.trouble {
            Trouble::Wire { .. } => Some("hand-over: met by a stall"),
            Trouble::Killed { side: killed } if killed == side => {
                Some("hand-over: met by a kill of the sender")
            }
            Trouble::Killed { .. } => Some("hand-over: met by a kill of another replica"),
            Trouble::LeaderAway => Some("hand-over: met by a change of leader"),
            _ => None,
        })
        .collect();
    met.sort_unstable();
    met.dedup();
    met.into_iter().for_each(|what| coverage.count(what));
}

#[cfg(test)]
mod tests {
    use fetch_proxy::pb;

    use super::{
        super::lab::{Lab, ack},
        *,
    };

    #[test]
    fn accidents_that_are_near_are_pairs() {
        let mut lab = Lab::new();
        lab.trouble(Trouble::LeaderAway, 1_000);
        lab.wait(3_000);
        lab.trouble(Trouble::Paused, 100);
        lab.wait(4_000);
        lab.trouble(Trouble::Poisoned, 100);
        assert_eq!(lab.count("pair: leader away + pause"), 1);
        assert_eq!(lab.count("pair: pause + poison"), 0);
    }

    #[test]
    fn change_of_leader_may_meet_settlements() {
        let mut lab = Lab::new();
        let id = lab.held();
        lab.trouble(Trouble::LeaderAway, 0);
        assert_eq!(lab.count("leader: changed while settlements were under way"), 0);
        lab.ask(1, id, &ack());
        lab.trouble(Trouble::LeaderAway, 0);
        assert_eq!(lab.count("leader: changed while settlements were under way"), 1);
        assert_eq!(lab.count("leader: changed"), 2);
    }

    #[test]
    fn settlement_through_another_replica_may_be_ownerless() {
        let mut lab = Lab::new();
        let id = lab.held();
        for dies in [false, true] {
            if dies {
                lab.trouble(Trouble::Killed { side: 1 }, 0);
            }
            let call = lab.ask(2, id, &ack());
            lab.succeed(call, pb::Outcome::Sent, 0);
        }
        assert_eq!(lab.count("settle: through another replica"), 2);
        assert_eq!(lab.count("settle: ownerless, OUTCOME_SENT"), 1);
    }

    #[test]
    fn hand_over_meets_the_accidents_of_its_time() {
        let mut lab = Lab::new();
        lab.trouble(Trouble::Killed { side: 2 }, 0);
        lab.wait(1);
        lab.trouble(Trouble::Draining { side: 1 }, 100_000);
        lab.trouble(Trouble::Wire { side: 3 }, 10);
        lab.trouble(Trouble::Killed { side: 1 }, 0);
        lab.watch().drained(1, false, true, lab.now);
        assert_eq!(lab.count("hand-over: met by a stall"), 1);
        assert_eq!(lab.count("hand-over: met by a kill of the sender"), 1);
        assert_eq!(lab.count("hand-over: met by a kill of another replica"), 0);
    }
}
