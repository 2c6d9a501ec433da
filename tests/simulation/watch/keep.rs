//! Check: with `keep`, leases live as long as the stream, and `grace` longer. Pure.
//!
//! 1. A client with a frame of a stream that is not about to end has its leases for `grace` from the making of the frame:
//!    nobody else is sent the message before, as the check `leases` holds.
//! 2. "However the stream ends, its messages are back at JetStream after `grace`", as the checks `darkness` and
//!    `expired` hold.

use std::time::Duration;

use fetch_proxy::pb;

use super::{
    super::jetstream::{DeliveryId, Time},
    calls::OpenFetch,
    ledger::{Delivered, Ledger},
    report::Report,
    streams::Stream,
    troubles::Trouble,
};

/// The grace of a stream that sets none.
const GRACE: Duration = Duration::from_secs(10);
/// "A lease that moves to another replica with a hand-over becomes an ordinary lease of 30 s, or of `grace` if that is
/// longer."
const MOVED: Duration = Duration::from_secs(30);

/// "A settlement or a pull without an answer" is a sign of another leader, and ends leases that were granted meanwhile. It
/// is given up after 5 s.
const UNANSWERED: Duration = Duration::from_secs(6);

/// How much longer than the stream its leases live. `None`: it has no `keep`.
pub fn grace_of(start: &pb::ConsumeStart) -> Option<Duration> {
    match &start.holding {
        Some(pb::consume_start::Holding::Keep(keep)) => {
            let grace = keep.grace.and_then(|grace| grace.try_into().ok());
            Some(grace.unwrap_or(GRACE))
        }
        Some(pb::consume_start::Holding::Lease(_)) | None => None,
    }
}

/// A client has a message by a stream with this grace, as long as the stream lives. It has the frame, or the frame was
/// lost.
pub fn lent(one: &mut Delivered, grace: Option<Duration>, (made, received): (Time, bool)) {
    one.kept = grace.filter(|_| one.calls.is_empty());
    one.grace_ends = one.grace_ends.filter(|_| received);
    if let Some((grace, hold)) = one.kept.zip(one.hold.as_mut()) {
        hold.until = hold.until.min(made + grace);
        hold.longest = hold.longest.min(one.grace_ends.unwrap_or(Time::MAX));
    }
}

/// A stream has ended at its replica: "the deadline becomes `grace` from then".
pub fn ended(ledger: &mut Ledger, fetch: &OpenFetch, now: Time) {
    let Some(stream) = &fetch.stream else { return };
    let drained = Trouble::Draining { side: fetch.side };
    let moved = ledger.troubles.happened(drained, &fetch.consumer, fetch.began, Time::MAX);
    // A process that stands still notices it later.
    let side = fetch.side;
    let still = [Trouble::Stopped { side }, Trouble::Suspended { side }];
    let spans = ledger.troubles.between(&fetch.consumer, now, now);
    let spans = spans.filter(|span| still.contains(&span.trouble)).map(|span| span.until);
    let now = spans.fold(now, Time::max);
    for id in stream.ids() {
        let Some(one) = ledger.deliveries.get_mut(id) else { continue };
        let Some(grace) = one.kept.filter(|_| one.grace_ends.is_none()) else { continue };
        let left = if moved { grace.max(MOVED) } else { grace };
        if let Some(hold) = &mut one.hold {
            hold.longest = hold.longest.min(now + left);
        }
        one.grace_ends = Some(now + left);
    }
}

/// A client has a frame that was made by a stream which is not about to end: its leases live for `grace` from then.
pub fn received(ledger: &mut Ledger, stream: &Stream, frame: &pb::ConsumeResponse, made: Time) {
    let Some(grace) = stream.grace().filter(|_| !stream.is_ending()) else { return };
    if frame.messages.is_empty() && frame.idle.is_none() {
        return;
    }
    for id in stream.ids() {
        let Some(one) = ledger.deliveries.get_mut(id) else { continue };
        let relies = one.kept.is_some() && one.calls.is_empty() && one.grace_ends.is_none();
        if let Some(hold) = one.hold.as_mut().filter(|hold| relies && made < hold.until) {
            hold.until = hold.until.max(made + grace).min(hold.longest);
        }
    }
}

/// JetStream sends a message, which stands in the ledger already.
pub fn sent(ledger: &Ledger, id: DeliveryId, now: Time, report: &mut Report) {
    let last = ledger.earlier(id).last().map(|(_, one)| one);
    if last.is_some_and(|one| one.kept.is_some() && one.grace_ends.is_some_and(|at| at <= now)) {
        report.coverage.count("stream: a kept message is back after its grace");
    }
}

/// When the grace of a message ends, if no accident has touched it: "However the stream ends, its messages are back at
/// JetStream after `grace`, with any ack wait, unless they are on their last attempt."
pub fn grace_ends(ledger: &Ledger, one: &Delivered, now: Time) -> Option<Time> {
    let at = one.grace_ends.filter(|_| one.kept.is_some() && one.calls.is_empty())?;
    let touches = |side| side == one.side;
    let since = one.sent.saturating_sub(UNANSWERED);
    let calm = ledger.troubles.calm_at(&one.message.0, touches, since, now).is_none();
    let drained = Trouble::Draining { side: one.side };
    let moved = ledger.troubles.happened(drained, &one.message.0, one.sent, now);
    (calm && !moved && !ledger.is_last_attempt(one)).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            super::jetstream::Config,
            FetchEnd, FetchId, darkness,
            lab::{Lab, millis, refused},
            leases,
        },
        *,
    };

    /// A stream at process 1 whose leases live for a second longer than it. Its client has message 1.
    fn kept(lab: &mut Lab) -> (FetchId, DeliveryId) {
        lab.wait(60_000);
        lab.kept(1, 1_000)
    }

    #[test]
    fn kept_lease_holds_for_its_grace_after_each_sign_that_its_stream_lives() {
        for (sign, wait, found) in
            [(true, 1_800, vec![leases::CHECK]), (true, 2_000, vec![]), (false, 1_800, vec![])]
        {
            let mut lab = Lab::new();
            let (stream, _) = kept(&mut lab);
            lab.wait(900);
            if sign {
                let idle = Some(pb::ConsumeIdle::default());
                let frame = pb::ConsumeResponse { idle, ..Default::default() };
                lab.watch().frame_received(stream, &frame, (lab.now, lab.now));
            }
            lab.wait(wait - 900);
            lab.send(2, 2);
            assert_eq!(lab.found(), found, "{sign} {wait}");
        }
    }

    #[test]
    fn message_of_a_stream_that_has_ended_is_back_after_its_grace() {
        for (ends, attempts, killed, found) in [
            (true, 2, false, vec![darkness::CHECK]),
            (false, 2, false, vec![]),
            (true, 1, false, vec![]),
            (true, 2, true, vec![]),
        ] {
            let config = Config { max_deliver: Some(attempts), ..Config::new(millis(30_000)) };
            let mut lab = Lab::with(config);
            let (stream, _) = kept(&mut lab);
            if ends {
                lab.watch().stream_ended(stream, lab.now);
            }
            if killed {
                lab.trouble(Trouble::Killed { side: 1 }, 0);
            }
            lab.fetch(2, 300_000);
            lab.look_on(5_500, 0, false);
            assert_eq!(lab.found(), Vec::<&str>::new());
            lab.look_on(1_500, 0, false);
            assert_eq!(lab.found(), found, "{ends} {attempts} {killed}");
        }
    }

    #[test]
    fn message_of_a_stream_that_has_ended_may_be_back_later_if_the_leader_was_away_a_moment_before()
    {
        for (before, found) in [(5_500, vec![]), (6_500, vec![darkness::CHECK])] {
            let mut lab = Lab::with(Config::new(millis(30_000)));
            lab.wait(60_000 - before);
            lab.trouble(Trouble::LeaderAway, 0);
            lab.wait(before);
            let (stream, _) = lab.kept(1, 1_000);
            lab.watch().stream_ended(stream, lab.now);
            lab.fetch(2, 300_000);
            lab.look_on(7_000, 0, false);
            assert_eq!(lab.found(), found, "{before}");
        }
    }

    #[test]
    fn stream_is_silent_after_three_heartbeats_without_a_frame() {
        for (silent, found) in [(29_980, vec!["calls"]), (30_000, vec![])] {
            let mut lab = Lab::new();
            let (stream, _) = kept(&mut lab);
            lab.watch().stream_heard(stream, lab.now);
            lab.wait(silent);
            lab.watch().stream_ended(stream, lab.now);
            lab.end(stream, FetchEnd::Refused(&refused("STREAM_SILENT")));
            assert_eq!(lab.found(), found, "{silent}");
        }
    }
}
