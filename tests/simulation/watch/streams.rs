//! Check: a stream holds no more leases than its credit says, gets nothing that an idle caller could have, and gets
//! messages while it has room. Pure.
//!
//! 1. "the stream never holds more unsettled leases than the credit says" "After the id of a pause, no message comes."
//! 2. "A message goes first to a caller that has nothing to do: to an open Fetch, or to a stream that holds nothing."
//! 3. "A lease frees its credit when it ends, in whatever way." So a stream whose leases have ended asks, like a Fetch
//!    that waits: the check `darkness` holds that it gets what is there.

use std::{collections::BTreeMap, time::Duration};

use fetch_proxy::{broker::ConsumerName, pb};
use prost::Message as _;

use super::{
    super::jetstream::{DeliveryId, Time},
    calls::{FetchId, OpenFetch},
    darkness::Place,
    delivery_of, keep, leases,
    ledger::{Kind, Ledger, Told},
    report::Report,
    troubles::Trouble,
};

pub const CHECK: &str = "streams";

/// A Fetch has come to the task of its consumer within this time.
const JOINED: Duration = Duration::from_millis(300);
/// A settlement that is answered has freed its credit, and a stream that is read again is served again, within this time.
const FREED: Duration = Duration::from_millis(1_500);
/// A lease that is over has freed its credit within this time.
const LAPSED: Duration = Duration::from_secs(2);
/// The longest lease: a message without a place in the ledger may be held for so long.
const LONGEST_LEASE: Duration = Duration::from_secs(60);
/// The heartbeat of a stream that sets none.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Timers are exact to a millisecond, and a client that reads again is heard a moment later.
const TICK: Duration = Duration::from_millis(10);
/// After an accident, a replica needs so long; see `darkness`.
const RECOVERY: Duration = Duration::from_secs(8);

/// What was seen of one stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Stream {
    /// Each credit with its id.
    credits: Vec<(u64, u64)>,
    /// The place of the last credit that is in force for sure.
    in_force: usize,
    ids: Vec<DeliveryId>,
    /// Until when it may hold messages that its client cannot use.
    rejected_until: Time,
    opened_at: Option<Time>,
    /// Since when its client reads.
    reads_since: Option<Time>,
    /// Since when it did not read the last time, and how long it did not.
    unread_since: Option<Time>,
    unread_for: Duration,
    heartbeat: Duration,
    ends: bool,
    /// How much longer than the stream its leases live. `None`: it has no `keep`.
    grace: Option<Duration>,
    /// When a frame of its client came last, and the longest time without one.
    heard_at: Time,
    silent_for: Duration,
    /// When it ended at its replica.
    ended_at: Option<Time>,
}

impl Stream {
    /// A stream with its first frame.
    pub fn new(start: &pb::ConsumeStart, now: Time) -> Self {
        let credit = start.credit.unwrap_or_default();
        let most = u64::from(credit.max_leases.unwrap_or(1));
        Self {
            credits: vec![(credit.id, most)],
            in_force: 0,
            ids: Vec::new(),
            rejected_until: Time::ZERO,
            opened_at: None,
            reads_since: Some(now),
            unread_since: None,
            unread_for: Duration::ZERO,
            heartbeat: start.heartbeat.and_then(|beat| beat.try_into().ok()).unwrap_or(HEARTBEAT),
            ends: false,
            grace: keep::grace_of(start),
            heard_at: now,
            silent_for: Duration::ZERO,
            ended_at: None,
        }
    }

    pub fn grace(&self) -> Option<Duration> {
        self.grace
    }

    /// The messages that it has brought.
    pub fn ids(&self) -> &[DeliveryId] {
        &self.ids
    }

    /// Whether it takes nothing more, or is about to end.
    pub fn is_ending(&self) -> bool {
        self.ends
    }

    /// A frame of the client has come to the replica.
    pub fn heard(&mut self, now: Time) {
        self.silent_for = self.silent_for.max(now.saturating_sub(self.heard_at));
        self.heard_at = now;
    }

    /// It has ended at its replica. Returns whether that is news.
    pub fn has_ended(&mut self, now: Time) -> bool {
        self.heard(now);
        self.ended_at.replace(now).is_none()
    }

    /// "STREAM_SILENT: with `keep`, no frame came from the client for three heartbeats, or the client read nothing for three
    /// heartbeats although there was something to read".
    pub fn was_silent(&self) -> bool {
        let sends = self.grace.is_none() || self.silent_for + TICK < 3 * self.heartbeat;
        !sends || self.unread_for + TICK >= 3 * self.heartbeat
    }

    /// The credits that may be in force.
    fn may_be_in_force(&self) -> impl Iterator<Item = u64> {
        self.credits[self.in_force..].iter().map(|(_, most)| *most)
    }

    pub fn credit(&mut self, id: u64, most: u32) {
        self.credits.push((id, most.into()));
    }

    /// Its client reads from now on, or does not. A client that reads for a moment alone need not have taken anything.
    pub fn reads(&mut self, reads: bool, now: Time) {
        match self.reads_since {
            None if reads => {
                let since = self.unread_since.unwrap_or(now);
                self.unread_for = now.saturating_sub(since);
            }
            Some(since) if !reads && (now > since + TICK || self.unread_since.is_none()) => {
                self.unread_since = Some(now);
            }
            None | Some(_) => {}
        }
        self.reads_since = reads.then_some(now);
    }

    pub fn closes(&mut self) {
        self.ends = true;
    }
}

/// The request of a Fetch that takes what a stream takes.
pub fn as_fetch(start: &pb::ConsumeStart) -> pb::FetchRequest {
    let lease = match start.holding {
        Some(pb::consume_start::Holding::Lease(lease)) => Some(lease),
        Some(pb::consume_start::Holding::Keep(_)) | None => None,
    };
    pb::FetchRequest {
        stream: start.stream.clone(),
        consumer: start.consumer.clone(),
        n: 1_000,
        max_wait: Some(prost_types::Duration::default()),
        lease,
        max_bytes: start.max_frame_bytes,
        codec: start.codec,
        ..Default::default()
    }
}

/// Whether a client holds this message of a stream for sure.
fn holds(ledger: &Ledger, id: DeliveryId, since: Time, now: Time) -> bool {
    let Some(one) = ledger.deliveries.get(&id) else { return false };
    let held = one.hold.is_some_and(|hold| hold.from <= since && now < hold.longest);
    let newest = ledger.of.get(&one.message).and_then(|all| all.last()) == Some(&id);
    let (name, sequence) = &one.message;
    // "A lease counts from the pull that asked for the message, so a slow delivery makes the lease shorter."
    let side = one.side;
    let slow = [Trouble::Wire { side }, Trouble::Reconnects { side }, Trouble::Stopped { side }];
    let slow = slow.iter().any(|slow| ledger.troubles.happened(*slow, name, one.sent, now));
    held && newest
        && !slow
        && one.calls.is_empty()
        && !ledger.is_removed((&name.stream, *sequence), now)
        && !leases::ends_early(ledger, id, now)
}

/// Whether a stream may still hold this message.
fn may_hold(ledger: &Ledger, id: DeliveryId, now: Time) -> bool {
    let Some(one) = ledger.deliveries.get(&id) else { return true };
    let settled = one.calls.iter().any(|call| {
        let told = |(at, told)| told == Told::Applied && at + FREED <= now;
        call.kind != Kind::Extend && call.ended.is_some_and(told)
    });
    let lapsed = one.hold.is_some_and(|hold| hold.longest + LAPSED <= now);
    !settled && !lapsed
}

/// A frame of a stream is written: its messages are not held by its client before. Says what is wrong with it.
pub fn written(
    ledger: &Ledger,
    fetches: &BTreeMap<FetchId, OpenFetch>,
    (fetch, stream): (&OpenFetch, &mut Stream),
    frame: &pb::ConsumeResponse,
    now: Time,
    report: &mut Report,
) {
    stream.opened_at = stream.opened_at.or(frame.opened.is_some().then_some(now));
    let known = stream.credits.iter().rposition(|(id, _)| *id == frame.credit_id);
    stream.in_force = known.unwrap_or(stream.in_force).max(stream.in_force);
    stream.ends |= frame.draining.is_some();
    let mut broken = Vec::new();
    let all = stream.ids.iter().filter(|id| holds(ledger, **id, now, now));
    let all: Vec<DeliveryId> = all.copied().collect();
    let held = all.len();
    let got =
        frame.messages.len() + frame.rejected.iter().filter(|no| !no.token.is_empty()).count();
    let most = stream.may_be_in_force().max().unwrap_or_default();
    if got > 0 && (held + got) as u64 > most {
        let of = all.iter().map(|id| ledger.deliveries.get(id));
        let of: Vec<_> = of.collect();
        broken.push(format!("holds {held}, gets {got}, and has credit for {most}: {of:?}"));
    }
    if held > 0 && got > 0 {
        report.coverage.count("stream: a message for a stream that holds something");
    }
    let messages = pb::ConsumeResponse {
        messages: frame.messages.clone(),
        rejected: frame.rejected.clone(),
        ..Default::default()
    };
    if messages.encoded_len() > fetch.max_bytes {
        broken.push(format!("{} bytes in a frame", messages.encoded_len()));
    }
    for message in &frame.messages {
        let id = delivery_of(message);
        let Some(arrived) = ledger.deliveries.get(&id).and_then(|one| one.arrived) else {
            continue;
        };
        let busy = stream.ids.iter().any(|id| holds(ledger, *id, arrived, now));
        let size = message.encoded_len() + 64;
        let waits = |other: &&OpenFetch| waits_idly(other, fetch, size, (arrived, now));
        if let Some(waiting) = fetches.values().filter(|_| busy).find(waits) {
            broken.push(format!("{id:?} passes a Fetch that waits: {waiting:?}"));
        }
    }
    if frame.rejected.iter().any(|no| !no.token.is_empty()) {
        stream.rejected_until = now + LONGEST_LEASE;
    }
    stream.ids.extend(frame.messages.iter().map(delivery_of));
    for why in broken {
        report.fail(CHECK, now, format!("Consume: {why}\n  {fetch:?}\n  {frame:?}"));
    }
}

/// Whether a Fetch has waited for nothing but a message since before a message of this size arrived.
fn waits_idly(
    other: &OpenFetch,
    stream: &OpenFetch,
    size: usize,
    (arrived, now): (Time, Time),
) -> bool {
    let Some(since) = other.waits_since.filter(|_| other.stream.is_none()) else { return false };
    other.side == stream.side
        && other.consumer == stream.consumer
        && other.is_plain
        && since + JOINED < arrived
        && now + JOINED < since + other.max_wait
        && size <= other.max_bytes
}

/// Whether a stream asks for a message: it is open at its replica, is read, has room, and no accident has touched its
/// replica lately.
pub fn is_asking(
    ledger: &Ledger,
    fetch: &OpenFetch,
    name: &ConsumerName,
    places: &[Place],
    now: Time,
) -> bool {
    // Without a way to its replica, a client learns late that its stream has ended.
    let open = |stream: &&Stream| !stream.ends && stream.ended_at.is_none();
    let Some(stream) = fetch.stream.as_ref().filter(open) else { return false };
    let serves = places.iter().any(|place| place.side == fetch.side && place.serves);
    if fetch.consumer != *name || !serves {
        return false;
    }
    let past = |at: Option<Time>| at.is_some_and(|at| at + FREED <= now);
    let since = now.saturating_sub(RECOVERY);
    let calm = ledger.troubles.calm_at(name, |side| side == fetch.side, since, now).is_none();
    let least = stream.may_be_in_force().min().unwrap_or_default();
    let held = stream.ids.iter().filter(|id| may_hold(ledger, **id, now)).count();
    past(stream.opened_at)
        && past(stream.reads_since)
        && stream.rejected_until <= now
        && calm
        && (held as u64) < least
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            darkness,
            lab::{ACK_WAIT, Lab, ack, message, refused},
            rights,
        },
        *,
    };

    /// A stream at process 1 with this credit, long after the start.
    fn open(lab: &mut Lab, credit: u32) -> FetchId {
        lab.wait(60_000);
        lab.open_stream(1, credit)
    }

    /// This message comes to the process, and the stream gets it.
    fn gets(lab: &mut Lab, stream: FetchId, sequence: u64) -> DeliveryId {
        let id = lab.send_of(sequence, (1, 1), 1);
        write(lab, stream, id);
        id
    }

    fn write(lab: &Lab, stream: FetchId, id: DeliveryId) {
        write_for(lab, stream, id, ACK_WAIT);
    }

    fn write_for(lab: &Lab, stream: FetchId, id: DeliveryId, lease: u64) {
        let messages = vec![message(id, 1, lease)];
        let frame = pb::ConsumeResponse { messages, ..Default::default() };
        lab.watch().frame_written(stream, &frame, (lab.now, lab.now));
    }

    #[test]
    fn stream_holds_no_more_than_its_credit() {
        for (credit, settles, wait, found) in [
            (1, false, 1, vec![CHECK]),
            (2, false, 1, vec![]),
            (1, true, 1, vec![]),
            (1, false, ACK_WAIT, vec![]),
        ] {
            let mut lab = Lab::new();
            let stream = open(&mut lab, credit);
            let first = gets(&mut lab, stream, 1);
            if settles {
                lab.ask(1, first, &ack());
            }
            lab.wait(wait);
            gets(&mut lab, stream, 2);
            assert_eq!(lab.found(), found, "{credit} {settles} {wait}");
        }
    }

    #[test]
    fn lease_of_a_slow_delivery_may_free_its_credit_early() {
        for (trouble, found) in
            [(Trouble::Wire { side: 1 }, vec![]), (Trouble::Wire { side: 2 }, vec![CHECK])]
        {
            let mut lab = Lab::new();
            let stream = open(&mut lab, 1);
            lab.trouble(trouble, 100);
            lab.wait(50);
            gets(&mut lab, stream, 1);
            lab.wait(100);
            gets(&mut lab, stream, 2);
            assert_eq!(lab.found(), found, "{trouble:?}");
        }
    }

    #[test]
    fn lease_that_is_not_kept_alive_frees_its_credit_a_moment_before_the_ack_wait() {
        let almost = ACK_WAIT - ACK_WAIT / 10;
        for (refused, wait, found) in [
            (false, almost, vec![CHECK]),
            (true, almost, vec![]),
            (true, ACK_WAIT / 2, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            let stream = open(&mut lab, 1);
            let first = lab.send_of(1, (1, 1), 1);
            write_for(&lab, stream, first, 60_000);
            if refused {
                lab.trouble(Trouble::Refused, ACK_WAIT);
            }
            lab.wait(wait);
            gets(&mut lab, stream, 2);
            assert_eq!(lab.found(), found, "{refused} {wait}");
        }
    }

    #[test]
    fn stream_is_silent_if_its_client_has_not_read_for_three_heartbeats() {
        for (unread, read, found) in [
            (29_980, 0, vec!["calls"]),
            (30_000, 0, vec![]),
            // It read for a moment in the middle, and need not have taken anything.
            (30_000, 10, vec![]),
            (30_000, 20, vec!["calls"]),
        ] {
            let mut lab = Lab::new();
            let stream = open(&mut lab, 1);
            lab.watch().stream_reads(stream, false, lab.now);
            if read > 0 {
                lab.wait(1_000);
                lab.watch().stream_reads(stream, true, lab.now);
                lab.wait(read);
                lab.watch().stream_reads(stream, false, lab.now);
                lab.wait(unread - 1_000);
            } else {
                lab.wait(unread);
            }
            lab.watch().stream_reads(stream, true, lab.now);
            lab.end(stream, super::super::FetchEnd::Refused(&refused("STREAM_SILENT")));
            assert_eq!(lab.found(), found, "{unread} {read}");
        }
    }

    #[test]
    fn rights_are_asked_when_a_frame_is_made() {
        for (before, found) in [(true, vec![]), (false, vec![rights::CHECK])] {
            let mut lab = Lab::new();
            let stream = open(&mut lab, 1);
            let id = lab.send_of(1, (1, 1), 1);
            let early = lab.now;
            lab.wait(10);
            lab.deny(1, true);
            lab.wait(10);
            let messages = vec![message(id, 1, ACK_WAIT)];
            let frame = pb::ConsumeResponse { messages, ..Default::default() };
            let made = if before { early } else { lab.now };
            lab.watch().frame_written(stream, &frame, (made, lab.now));
            assert_eq!(lab.found(), found, "{before}");
        }
    }

    #[test]
    fn no_message_comes_after_a_pause_is_in_force() {
        for (in_force, found) in [(true, vec![CHECK]), (false, vec![])] {
            let mut lab = Lab::new();
            let stream = open(&mut lab, 2);
            lab.watch().stream_credit(stream, (2, 0));
            let credit_id = if in_force { 2 } else { 0 };
            let frame = pb::ConsumeResponse { credit_id, ..Default::default() };
            lab.watch().frame_written(stream, &frame, (lab.now, lab.now));
            gets(&mut lab, stream, 1);
            assert_eq!(lab.found(), found, "{in_force}");
        }
    }

    #[test]
    fn message_passes_no_fetch_that_waits() {
        for (holds, waits, found) in
            [(true, 400, vec![CHECK]), (true, 200, vec![]), (false, 400, vec![])]
        {
            let mut lab = Lab::new();
            let stream = open(&mut lab, 5);
            if holds {
                gets(&mut lab, stream, 1);
            }
            lab.wait(10);
            lab.fetch(1, 30_000);
            lab.wait(waits);
            gets(&mut lab, stream, 2);
            assert_eq!(lab.found(), found, "{holds} {waits}");
        }
    }

    #[test]
    fn stream_whose_leases_have_ended_asks_for_messages() {
        for (lapses, credit, found) in [
            (true, 1, vec![darkness::CHECK]),
            (false, 1, vec![]),
            (false, 2, vec![darkness::CHECK]),
        ] {
            let mut lab = Lab::new();
            let stream = open(&mut lab, credit);
            let id = lab.send_of(2, (1, 1), 1);
            write_for(&lab, stream, id, if lapses { ACK_WAIT } else { 60_000 });
            lab.wait(if lapses { ACK_WAIT + 2_000 } else { 2_000 });
            lab.look_on(4_000, 1, true);
            assert_eq!(lab.found(), found, "{lapses} {credit}");
        }
    }

    #[test]
    fn stream_that_has_ended_at_its_replica_asks_for_nothing() {
        for ends in [true, false] {
            let mut lab = Lab::new();
            let stream = open(&mut lab, 1);
            if ends {
                lab.watch().stream_ended(stream, lab.now);
            }
            lab.wait(2_000);
            lab.look_on(4_000, 1, true);
            assert_eq!(lab.found().contains(&darkness::CHECK), !ends);
        }
    }
}
