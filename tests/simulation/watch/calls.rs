//! Check: a Fetch ends in time, with a reason that the contract lists, and its answer is as it was asked for.
//! Pure.

use std::{collections::BTreeMap, time::Duration};

use fetch_proxy::{broker::ConsumerName, pb};
use prost::Message as _;

use super::{
    super::jetstream::Time, answers, darkness::Looked, ledger::Ledger, one_call, places::Room,
    repeats, report::Report, rights, streams::Stream, troubles::Trouble,
};

pub const CHECK: &str = "calls";

/// A Fetch that is under way.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenFetch {
    pub side: usize,
    pub consumer: ConsumerName,
    pub began: Time,
    pub n: usize,
    pub max_bytes: usize,
    pub max_wait: Duration,
    pub linger: Duration,
    /// The length of its leases, if it asks for one.
    pub lease: Option<Duration>,
    /// So many settlements come first.
    pub settlements: usize,
    /// The name of its attempt.
    pub attempt: Option<String>,
    /// A field has a value that is not allowed.
    pub invalid: bool,
    /// So long after its wait it must be answered, because of the deadline of its client.
    pub explained_within: Option<Duration>,
    /// It has arrived at its replica then, and waits there.
    pub waits_since: Option<Time>,
    /// The places of its replica when it came, and when that refused it.
    pub came_to: Option<(Time, Room)>,
    pub refused_at: Option<(Time, Room)>,
    /// It waits for nothing but a message: it names no attempt, settles nothing, does not linger and takes any payload.
    pub is_plain: bool,
    /// It is a stream.
    pub stream: Option<Stream>,
}

/// Which Fetch.
pub type FetchId = u64;

/// How a Fetch ended, for its client.
#[derive(Debug, Clone, Copy)]
pub enum FetchEnd<'e> {
    /// `received`: the client has it. Otherwise it was written, and lost.
    Answer {
        answer: &'e pb::FetchResponse,
        served: Served,
        received: bool,
    },
    Refused(&'e tonic::Status),
    /// A patient client has waited for as long as any call may take.
    Overdue,
    /// The deadline of the client has passed at the replica: DEADLINE_EXCEEDED.
    Exceeded,
    /// The client did not wait for it, or the way was lost.
    Gone,
}

/// When a Fetch arrived at its replica, and when its answer was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    pub arrived: Time,
    pub written: Time,
}

/// The defaults and the bounds of the contract.
const MAX_WAIT: Duration = Duration::from_secs(30);
const LONGEST_WAIT: Duration = Duration::from_secs(300);
const MOST_MESSAGES: usize = 1000;
const MAX_BYTES: usize = (4 << 20) - 1024;
const MOST_BYTES: usize = 16 << 20;
const LEAST_BYTES: u32 = 1024;
pub const SHORTEST_LEASE: Duration = Duration::from_secs(1);

/// An empty answer says why, which takes at most the settle timeout. The rest is for the way.
const EXPLAINED: Duration = Duration::from_secs(6);
/// The settle timeout.
const SETTLED: Duration = Duration::from_secs(5);
/// Reasons of this age are still true enough: INFO may be a second old.
const RECENT: Duration = Duration::from_secs(2);
/// A call that need not wait has its refusal within this time: timers are exact to a millisecond.
const AT_ONCE: Duration = Duration::from_millis(2);
const HALF_A_SECOND: Duration = Duration::from_millis(500);
/// A refusal for want of NATS has its cause within this time.
const CAUSE_WITHIN: Duration = Duration::from_secs(12);

/// The reasons that the contract lists at Fetch, and those that any call may have, as far as they are made
/// below the edge.
const OF_FETCH: [&str; 14] = [
    "INVALID_FIELD",
    "STREAM_NOT_FOUND",
    "CONSUMER_NOT_FOUND",
    "CONSUMER_UNSUITABLE",
    "CONSUMER_SUSPECTED",
    "CONSUMER_BUSY",
    "LEASE_LIMIT",
    "WAITER_LIMIT",
    "NATS_PERMISSION",
    "NOT_ALLOWED",
    "NATS_UNAVAILABLE",
    "DRAINING",
    "BYTE_LIMIT",
    // Of a stream.
    "STREAM_SILENT",
];

fn duration(wire: Option<&prost_types::Duration>) -> Option<Duration> {
    wire.and_then(|wire| (*wire).try_into().ok())
}

impl OpenFetch {
    /// `deadline`: of the client.
    pub fn new(
        side: usize,
        request: &pb::FetchRequest,
        deadline: Option<Duration>,
        now: Time,
    ) -> Self {
        // "a tenth of the time to it is left, at least 20 ms and at most 1 s"
        let left = |deadline: Duration| {
            (deadline / 10).clamp(Duration::from_millis(20), Duration::from_secs(1))
        };
        let answers_by = deadline.map(|deadline| deadline.saturating_sub(left(deadline)));
        // A third of what is left is for the way of the answer.
        let written_by = deadline.map(|deadline| deadline.saturating_sub(left(deadline) / 3));
        let max_wait = duration(request.max_wait.as_ref()).unwrap_or(MAX_WAIT).min(LONGEST_WAIT);
        let max_bytes = if request.max_bytes == 0 { MAX_BYTES } else { request.max_bytes as usize };
        let consumer = ConsumerName {
            stream: request.stream.as_str().into(),
            consumer: request.consumer.as_str().into(),
        };
        Self {
            side,
            consumer,
            began: now,
            n: (request.n.max(1) as usize).min(MOST_MESSAGES),
            max_bytes: max_bytes.min(MOST_BYTES),
            max_wait: answers_by.map_or(max_wait, |by| by.min(max_wait)),
            linger: duration(request.linger.as_ref()).unwrap_or_default(),
            lease: duration(request.lease.as_ref()),
            settlements: request.settlements.len(),
            attempt: Some(request.attempt_id.clone()).filter(|name| !name.is_empty()),
            invalid: duration(request.lease.as_ref()).is_some_and(|lease| lease < SHORTEST_LEASE)
                || (1..LEAST_BYTES).contains(&request.max_bytes),
            explained_within: written_by
                .map(|by| by.saturating_sub(answers_by.unwrap_or(by).min(max_wait))),
            waits_since: None,
            came_to: None,
            refused_at: None,
            is_plain: request.attempt_id.is_empty()
                && request.settlements.is_empty()
                && request.linger.is_none_or(|linger| linger == prost_types::Duration::default())
                && request.codec() != pb::Codec::Json,
            stream: None,
        }
    }

    fn happened(&self, ledger: &Ledger, trouble: Trouble, since: Time, now: Time) -> bool {
        ledger.troubles.happened(trouble, &self.consumer, since, now)
    }

    /// "An open Fetch waits half a second for a new consumer of the same name". It cannot wait if it begins while
    /// there is none, because its replica need not know that there was one.
    fn misses_its_consumer(&self, ledger: &Ledger, now: Time) -> bool {
        let side = self.side;
        let of = ledger.troubles.between(&self.consumer, self.began, now);
        let mut absent: Option<(Time, Time)> = None;
        let mut slow = false;
        for span in of {
            match span.trouble {
                Trouble::Absent => {
                    let (from, until) = absent.unwrap_or((span.from, span.until));
                    absent = Some((from.min(span.from), until.max(span.until)));
                }
                // The news of its absence may be old.
                Trouble::Wire { side: of } | Trouble::Stopped { side: of } => slow |= of == side,
                _ => {}
            }
        }
        absent.is_some_and(|(from, until)| {
            let long = until.saturating_sub(from) >= HALF_A_SECOND;
            // "your deadline leaves no time" to ask again whether somebody makes it.
            let hurried = self.explained_within.is_some_and(|time| time < HALF_A_SECOND);
            slow || long || hurried || from <= self.began + ledger.round_trip
        })
    }

    /// "A process that was stopped counts the leases that ended meanwhile until it has looked at them."
    fn counts_ended_leases(&self, ledger: &Ledger, now: Time, report: &mut Report) -> bool {
        let stopped = Trouble::Stopped { side: self.side };
        let spans = ledger.troubles.between(&self.consumer, self.began, now);
        let ends = spans.filter(|span| span.trouble == stopped).map(|span| span.until);
        let since = ends.filter(|end| *end <= now).max().map(|end| now - end);
        let counts = since.is_some_and(|since| since <= ledger.round_trip);
        if counts {
            let length = since.unwrap_or_default();
            report.coverage.lasted("fetch: LEASE_LIMIT, for leases that ended in a stop", length);
        }
        counts
    }

    /// The places were taken when its replica refused it. Leases can end between the refusal and the next step of the
    /// call, so a call that is refused at once may have found them taken when it came.
    fn found_a_full_replica(&self, report: &mut Report) -> bool {
        let Some((refused, room)) = self.refused_at else { return false };
        let at_once = self.came_to.filter(|(came, _)| refused <= *came + AT_ONCE);
        let came = at_once.is_some_and(|(_, room)| room.is_full()) && !room.is_full();
        if came {
            report.coverage.count("fetch: LEASE_LIMIT, for leases that ended at that moment");
        }
        came || room.is_full()
    }

    /// The times in which its process stood still: "The monotonic clock of a process stops while its machine is
    /// suspended".
    fn stops<'l>(
        &'l self,
        ledger: &'l Ledger,
        since: Time,
        now: Time,
    ) -> impl Iterator<Item = (Time, Time)> + 'l {
        let side = self.side;
        let stops = ledger.troubles.between(&self.consumer, since, now);
        let stops = stops.filter(move |span| {
            [Trouble::Stopped { side }, Trouble::Suspended { side }].contains(&span.trouble)
        });
        stops.map(move |span| (span.from, span.until.min(now)))
    }

    /// For how long its process stood still.
    fn stopped(&self, ledger: &Ledger, now: Time) -> Duration {
        let stops = self.stops(ledger, self.began, now);
        stops.map(|(from, until)| until.saturating_sub(from.max(self.began))).sum()
    }
}

/// A Fetch has ended for its client.
pub fn ended(
    ledger: &Ledger,
    looked: &BTreeMap<ConsumerName, Looked>,
    fetch: &OpenFetch,
    end: FetchEnd<'_>,
    now: Time,
    report: &mut Report,
) {
    let mut broken = Vec::new();
    match end {
        FetchEnd::Gone => report.coverage.count("fetch: cancelled, or its way was lost"),
        FetchEnd::Overdue => {
            report.coverage.count("fetch: no answer in time");
            let side = fetch.side;
            let gone = [Trouble::Killed { side }, Trouble::Stopped { side }]
                .into_iter()
                .any(|trouble| fetch.happened(ledger, trouble, fetch.began, now));
            if !gone {
                broken.push("has no answer, and its process lives".to_owned());
            }
        }
        FetchEnd::Exceeded => {
            report.coverage.count("fetch: deadline exceeded");
            // "It is never DEADLINE_EXCEEDED."
            let killed = Trouble::Killed { side: fetch.side };
            let gone = fetch.happened(ledger, killed, fetch.began, now);
            if !gone && fetch.stopped(ledger, now).is_zero() {
                broken.push("has no answer before its deadline".to_owned());
            }
        }
        FetchEnd::Refused(status) => {
            let reason = answers::reason_of(status);
            report.coverage.count(format!("fetch: {reason}"));
            broken.extend(refusal(ledger, fetch, &reason, now, report));
        }
        FetchEnd::Answer { answer, served, received } => {
            let took = served.written.saturating_sub(served.arrived);
            // "The settlements count in the time of the call", and may take all of it.
            let settles = if fetch.settlements > 0 { SETTLED } else { Duration::ZERO };
            let wait = (fetch.max_wait + fetch.linger).max(settles);
            let bound = wait + EXPLAINED + fetch.stopped(ledger, now);
            if took > bound {
                broken.push(format!("took {took:?}, at most {bound:?}"));
            }
            report.coverage.count(if received { "fetch: answered" } else { "fetch: answer lost" });
            broken.extend(answer_of(ledger, looked, fetch, answer, served, report));
            broken.extend(one_call::wrong(fetch.settlements, answer));
            if let Some(error) = &answer.error {
                report.coverage.count(format!("fetch: {} after settlements", error.reason));
                broken.extend(refusal(ledger, fetch, &error.reason, now, report));
            }
        }
    }
    for why in broken {
        report.fail(CHECK, now, format!("Fetch: {why}\n  {fetch:?}\n  {end:?}"));
    }
}

fn refusal(
    ledger: &Ledger,
    fetch: &OpenFetch,
    reason: &str,
    now: Time,
    report: &mut Report,
) -> Option<String> {
    if !OF_FETCH.contains(&reason) {
        return Some(format!("{reason} is not listed for Fetch"));
    }
    let since = fetch.began.saturating_sub(CAUSE_WITHIN);
    let ever = Time::ZERO;
    let side = fetch.side;
    let cause = match reason {
        "INVALID_FIELD" => fetch.invalid,
        "DRAINING" => fetch.happened(ledger, Trouble::Draining { side }, ever, now),
        "CONSUMER_NOT_FOUND" => fetch.misses_its_consumer(ledger, now),
        "LEASE_LIMIT" => {
            fetch.found_a_full_replica(report) || fetch.counts_ended_leases(ledger, now, report)
        }
        "CONSUMER_UNSUITABLE" | "CONSUMER_SUSPECTED" => {
            fetch.happened(ledger, Trouble::Poisoned, ever, now)
        }
        "NATS_UNAVAILABLE" => {
            let mut spans = ledger.troubles.between(&fetch.consumer, since, now);
            // A process needs a moment from its start to its first connection.
            let hurried = fetch.explained_within.is_some_and(|time| time < ledger.round_trip);
            spans.any(|span| span.trouble.side().is_none_or(|of| of == side))
                || fetch.began < CAUSE_WITHIN
                // "or your deadline leaves no time to ask it"
                || hurried
        }
        "NATS_PERMISSION" => fetch.happened(ledger, Trouble::Refused, ever, now),
        "NOT_ALLOWED" => rights::denies(ledger, (side, fetch.consumer.clone()), fetch.began, now),
        "STREAM_SILENT" => fetch.stream.as_ref().is_some_and(Stream::was_silent),
        // Nothing in this world can cause it.
        "STREAM_NOT_FOUND" => false,
        _ => true,
    };
    (!cause).then(|| format!("{reason} without a cause"))
}

fn answer_of(
    ledger: &Ledger,
    looked: &BTreeMap<ConsumerName, Looked>,
    fetch: &OpenFetch,
    answer: &pb::FetchResponse,
    Served { arrived, written: now }: Served,
    report: &mut Report,
) -> Option<String> {
    let (got, bytes) = (answer.messages.len() + answer.rejected.len(), answer.encoded_len());
    // "Next to them, there is always room for 1 KiB of messages."
    let results = pb::FetchResponse { results: answer.results.clone(), ..Default::default() };
    let most = fetch.max_bytes.max(results.encoded_len() + LEAST_BYTES as usize);
    if got > fetch.n || bytes > most {
        return Some(format!("{got} messages, {bytes} bytes"));
    }
    let empty = answer.empty_reason();
    let unset = empty == pb::EmptyReason::Unspecified;
    if unset == answer.messages.is_empty() {
        return Some(format!("{empty:?} with {} messages", answer.messages.len()));
    }
    if unset {
        return None;
    }
    report.coverage.count(format!("fetch: empty, {empty:?}"));
    let since = now.saturating_sub(RECENT);
    // For the process, the time of a suspension has not passed.
    let stops = fetch.stops(ledger, since, now).map(|(from, until)| until.saturating_sub(from));
    let since = since.saturating_sub(stops.sum());
    let lately = |at: Option<Time>| at.is_some_and(|at| at >= since);
    let looked = looked.get(&fetch.consumer);
    let early = now.saturating_sub(arrived) < fetch.max_wait;
    let true_enough = match empty {
        pb::EmptyReason::Rejected => !answer.rejected.is_empty(),
        pb::EmptyReason::Draining => {
            fetch.happened(ledger, Trouble::Draining { side: fetch.side }, Time::ZERO, now)
        }
        pb::EmptyReason::Paused => !early && lately(looked.and_then(|looked| looked.paused_at)),
        pb::EmptyReason::MaxAckPending => {
            !early && lately(looked.and_then(|looked| looked.full_at))
        }
        pb::EmptyReason::NoMessages => !early,
        // Their results and their reason are judged by themselves.
        pb::EmptyReason::Settle | pb::EmptyReason::FetchFailed => true,
        pb::EmptyReason::AttemptOver => repeats::is_over(ledger, fetch, now),
        // For streams.
        pb::EmptyReason::Credit
        | pb::EmptyReason::LeaseLimit
        | pb::EmptyReason::NatsUnavailable => false,
        pb::EmptyReason::Unspecified => true,
    };
    (!true_enough)
        .then(|| format!("{empty:?} is not true, after {:?}", now.saturating_sub(arrived)))
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::{
        super::lab::{Lab, millis, refused},
        *,
    };

    fn empty(reason: pb::EmptyReason) -> pb::FetchResponse {
        pb::FetchResponse { empty_reason: reason.into(), ..pb::FetchResponse::default() }
    }

    /// A Fetch of process 1 for at most 2 s ends like this after `time`, long after its process has started.
    fn ends(time: u64, end: FetchEnd<'_>, trouble: Option<Trouble>) -> Vec<&'static str> {
        let mut lab = Lab::new();
        lab.wait(60_000);
        let fetch = lab.fetch(1, 2_000);
        if let Some(trouble) = trouble {
            lab.trouble(trouble, 0);
        }
        lab.wait(time);
        lab.end(fetch, end);
        lab.found()
    }

    fn answers(
        time: u64,
        answer: &pb::FetchResponse,
        trouble: Option<Trouble>,
    ) -> Vec<&'static str> {
        let arrived = millis(60_000);
        let served = Served { arrived, written: arrived + millis(time) };
        ends(time, FetchEnd::Answer { answer, served, received: true }, trouble)
    }

    #[test]
    fn fetch_ends_in_time_or_its_process_is_gone() {
        let none = empty(pb::EmptyReason::NoMessages);
        assert!(answers(7_900, &none, None).is_empty());
        assert_eq!(answers(8_100, &none, None), [CHECK]);
        assert_eq!(ends(9_000, FetchEnd::Overdue, None), [CHECK]);
        assert!(ends(9_000, FetchEnd::Overdue, Some(Trouble::Killed { side: 1 })).is_empty());
        assert!(ends(9_000, FetchEnd::Gone, None).is_empty());
    }

    #[test]
    fn fetch_is_answered_before_its_deadline_unless_its_process_stands_still() {
        assert_eq!(ends(500, FetchEnd::Exceeded, None), [CHECK]);
        assert_eq!(ends(500, FetchEnd::Exceeded, Some(Trouble::Wire { side: 1 })), [CHECK]);
        let mut lab = Lab::new();
        let fetch = lab.fetch(1, 2_000);
        lab.trouble(Trouble::Stopped { side: 1 }, 400);
        lab.wait(500);
        lab.end(fetch, FetchEnd::Exceeded);
        assert!(lab.found().is_empty());
    }

    #[test]
    fn fetch_lasts_longer_by_the_time_for_which_its_process_stands_still() {
        for (trouble, found) in [
            (Trouble::Stopped { side: 1 }, vec![]),
            (Trouble::Suspended { side: 1 }, vec![]),
            (Trouble::Suspended { side: 2 }, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            let fetch = lab.fetch(1, 2_000);
            lab.trouble(trouble, 1_000);
            lab.wait(8_900);
            let answer = empty(pb::EmptyReason::NoMessages);
            let served = Served { arrived: Time::ZERO, written: lab.now };
            lab.end(fetch, FetchEnd::Answer { answer: &answer, served, received: true });
            assert_eq!(lab.found(), found, "{trouble:?}");
        }
    }

    #[test]
    fn client_in_a_hurry_may_hear_that_nats_was_not_asked() {
        for (deadline, found) in [(12, vec![]), (30, vec![CHECK])] {
            let mut lab = Lab::new();
            lab.wait(60_000);
            let request = pb::FetchRequest::default();
            let fetch = lab.watch().fetch_called(1, &request, Some(millis(deadline)), lab.now);
            lab.wait(deadline);
            lab.end(fetch, FetchEnd::Refused(&refused("NATS_UNAVAILABLE")));
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn refusal_of_a_fetch_is_listed_and_has_its_cause() {
        for (reason, cause) in [
            ("NATS_UNAVAILABLE", Trouble::Wire { side: 1 }),
            ("DRAINING", Trouble::Draining { side: 1 }),
            ("CONSUMER_NOT_FOUND", Trouble::Absent),
            ("CONSUMER_SUSPECTED", Trouble::Poisoned),
        ] {
            let status = refused(reason);
            assert_eq!(ends(100, FetchEnd::Refused(&status), None), [CHECK], "{reason}");
            assert!(ends(100, FetchEnd::Refused(&status), Some(cause)).is_empty(), "{reason}");
        }
        for status in [refused("LEASE_EXPIRED"), refused("INTERNAL"), Status::internal("a panic")] {
            assert_eq!(ends(100, FetchEnd::Refused(&status), Some(Trouble::LeaderAway)), [CHECK]);
        }
    }

    #[test]
    fn refusal_for_want_of_places_has_its_leases() {
        let limited = |held| {
            let lab = Lab::new();
            let fetch = lab.fetch(1, 2_000);
            let room = Room { side: 1, most: 10, held, free: 0 };
            lab.watch().fetch_refused(fetch, room, lab.now);
            lab.end(fetch, FetchEnd::Refused(&refused("LEASE_LIMIT")));
            lab.found()
        };
        assert_eq!((limited(7), limited(9)), (vec![CHECK], vec![]));
    }

    #[test]
    fn process_that_was_stopped_may_count_leases_that_have_ended() {
        for (trouble, after, found) in [
            (Trouble::Stopped { side: 1 }, 10, vec![]),
            (Trouble::Stopped { side: 1 }, 11, vec![CHECK]),
            (Trouble::Stopped { side: 2 }, 10, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            lab.trouble(trouble, 1_000);
            lab.wait(500);
            let fetch = lab.fetch(1, 2_000);
            lab.wait(500 + after);
            let room = Room { side: 1, most: 10, held: 0, free: 10 };
            lab.watch().fetch_refused(fetch, room, lab.now);
            lab.end(fetch, FetchEnd::Refused(&refused("LEASE_LIMIT")));
            assert_eq!(lab.found(), found, "{trouble:?}, {after} ms after it");
        }
    }

    #[test]
    fn fetch_waits_half_a_second_for_a_consumer_that_was_there() {
        let refused_after = |before: u64, absent: u64, trouble: Option<Trouble>| {
            let mut lab = Lab::new();
            lab.wait(1_000);
            let fetch = lab.fetch(1, 2_000);
            lab.wait(before);
            lab.trouble(Trouble::Absent, absent);
            if let Some(trouble) = trouble {
                lab.trouble(trouble, 0);
            }
            lab.wait(600);
            lab.end(fetch, FetchEnd::Refused(&refused("CONSUMER_NOT_FOUND")));
            lab.found()
        };
        assert_eq!(refused_after(100, 400, None), [CHECK]);
        assert!(refused_after(100, 500, None).is_empty());
        assert!(refused_after(0, 400, None).is_empty(), "it begins while there is none");
        assert!(refused_after(100, 400, Some(Trouble::Wire { side: 1 })).is_empty());
    }

    #[test]
    fn empty_answer_tells_the_truth() {
        let [none, paused, draining, unset] = [
            pb::EmptyReason::NoMessages,
            pb::EmptyReason::Paused,
            pb::EmptyReason::Draining,
            pb::EmptyReason::Unspecified,
        ]
        .map(empty);
        assert_eq!(answers(1_900, &none, None), [CHECK], "too early");
        assert!(answers(2_000, &none, None).is_empty());
        assert_eq!(answers(2_000, &paused, Some(Trouble::Paused)), [CHECK], "INFO never said so");
        assert_eq!(answers(100, &draining, None), [CHECK]);
        assert!(answers(100, &draining, Some(Trouble::Draining { side: 1 })).is_empty());
        assert_eq!(answers(2_000, &unset, None), [CHECK]);
    }

    #[test]
    fn places_may_be_free_again_after_a_call_that_is_refused_at_once() {
        for (held, wait, found) in [(10, 2, vec![]), (10, 3, vec![CHECK]), (5, 2, vec![CHECK])] {
            let mut lab = Lab::new();
            lab.wait(60_000);
            let fetch = lab.fetch(1, 2_000);
            let room = |held| Room { side: 1, most: 10, held, free: 10 - held };
            lab.watch().fetch_came(fetch, room(held), lab.now);
            lab.wait(wait);
            lab.watch().fetch_refused(fetch, room(1), lab.now);
            lab.end(fetch, FetchEnd::Refused(&refused("LEASE_LIMIT")));
            assert_eq!(lab.found(), found, "{held} {wait}");
        }
    }

    #[test]
    fn limit_or_pause_was_seen_lately() {
        for (reason, full, paused, ago, found) in [
            (pb::EmptyReason::MaxAckPending, true, false, 1_900, vec![]),
            (pb::EmptyReason::MaxAckPending, true, false, 2_100, vec![CHECK]),
            (pb::EmptyReason::MaxAckPending, false, true, 100, vec![CHECK]),
            (pb::EmptyReason::Paused, false, true, 100, vec![]),
            (pb::EmptyReason::Paused, true, false, 100, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            let fetch = lab.fetch(1, 2_000);
            lab.wait(1_000);
            lab.tell(full, paused);
            lab.wait(ago);
            lab.wait(2_000_u64.saturating_sub(1_000 + ago));
            let answer = empty(reason);
            let served = Served { arrived: Time::ZERO, written: lab.now };
            lab.end(fetch, FetchEnd::Answer { answer: &answer, served, received: true });
            assert_eq!(lab.found(), found, "{reason:?} {ago}");
        }
    }

    #[test]
    fn limit_that_was_seen_before_a_suspension_was_seen_lately() {
        for (suspends, found) in [(true, vec![]), (false, vec![CHECK])] {
            let mut lab = Lab::new();
            let fetch = lab.fetch(1, 2_000);
            lab.tell(true, false);
            if suspends {
                lab.trouble(Trouble::Suspended { side: 1 }, 1_000);
            }
            lab.wait(2_900);
            let answer = empty(pb::EmptyReason::MaxAckPending);
            let served = Served { arrived: Time::ZERO, written: lab.now };
            lab.end(fetch, FetchEnd::Answer { answer: &answer, served, received: true });
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn wait_ends_before_the_deadline_of_the_client() {
        let request = pb::FetchRequest { max_wait: testkit::millis(9_000), ..Default::default() };
        let waits = |deadline| OpenFetch::new(1, &request, deadline, Time::ZERO).max_wait;
        assert_eq!(waits(None), millis(9_000));
        assert_eq!(waits(Some(millis(5_000))), millis(4_500));
        assert_eq!(waits(Some(millis(10))), Duration::ZERO);
    }

    #[test]
    fn invalid_field_is_refused_and_no_other() {
        for (lease, found) in [(999, vec![]), (1_000, vec![CHECK])] {
            let lab = Lab::new();
            let request = pb::FetchRequest { lease: testkit::millis(lease), ..Default::default() };
            let fetch = lab.watch().fetch_called(1, &request, None, lab.now);
            lab.end(fetch, FetchEnd::Refused(&refused("INVALID_FIELD")));
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn answer_has_no_more_messages_and_bytes_than_it_was_asked_for() {
        let answer = |count, size| pb::FetchResponse {
            messages: vec![pb::Delivery { subject: "s".repeat(size), ..Default::default() }; count],
            ..pb::FetchResponse::default()
        };
        let asked = |answer: &pb::FetchResponse| {
            let request = pb::FetchRequest { n: 2, max_bytes: 1_024, ..Default::default() };
            let fetch = OpenFetch::new(1, &request, None, Time::ZERO);
            let mut report = Report::default();
            let now = millis(10);
            let served = Served { arrived: Time::ZERO, written: now };
            let end = FetchEnd::Answer { answer, served, received: true };
            ended(&Ledger::default(), &BTreeMap::new(), &fetch, end, now, &mut report);
            report.findings.len()
        };
        assert_eq!(
            (asked(&answer(2, 100)), asked(&answer(3, 100)), asked(&answer(2, 600))),
            (0, 1, 1)
        );
    }

    #[test]
    fn reasons_are_those_of_the_contract() {
        let contract = include_str!("../../../proto/fetchproxy/v1/fetch.proto");
        for reason in OF_FETCH {
            assert!(contract.contains(reason), "{reason}");
        }
    }
}
