//! The causes that a refused settlement can have: another call, a hand-over, or an accident. Pure.

use std::time::Duration;

use super::{
    super::jetstream::{DeliveryId, Time},
    ledger::{Delivered, Kind, Ledger, SettleCall, Told},
    troubles::Trouble,
};

/// A refusal because NATS is away has its cause within this time. It is the settle timeout, and the time to
/// connect again and to ask INFO.
const CAUSE_WITHIN: Duration = Duration::from_secs(12);

/// A call without a deadline of its own ends after this: the settle timeout.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

/// The other call may have been under way at the time of this one: an unanswered call may still be. A request that
/// another replica has passed on to the owner may wait in a wire, after that replica has answered without the owner.
pub(super) fn overlaps(
    ledger: &Ledger,
    one: &Delivered,
    other: &SettleCall,
    call: &SettleCall,
) -> bool {
    let until = call.ended.map_or(Time::MAX, |(at, _)| at);
    let open = other.ended.is_none_or(|(at, told)| at >= call.began || told == Told::Unknown);
    let held_up = |side| {
        let mut spans = ledger.troubles.between(&one.message.0, other.began, call.began);
        spans
            .any(|span| [Trouble::Wire { side }, Trouble::Stopped { side }].contains(&span.trouble))
    };
    let waits = other.side != one.side && (held_up(one.side) || held_up(other.side));
    other.began <= until && (open || waits)
}

/// The process stood still meanwhile, or is gone.
pub(super) fn is_away(
    ledger: &Ledger,
    id: DeliveryId,
    side: usize,
    since: Time,
    now: Time,
) -> bool {
    let Some(one) = ledger.deliveries.get(&id) else { return true };
    let mut spans = ledger.troubles.between(&one.message.0, since, now);
    spans.any(|span| [Trouble::Stopped { side }, Trouble::Killed { side }].contains(&span.trouble))
}

pub(super) fn happened(ledger: &Ledger, id: DeliveryId, trouble: Trouble, now: Time) -> bool {
    let consumer = ledger.deliveries.get(&id).map(|one| &one.message.0);
    consumer.is_some_and(|consumer| ledger.troubles.happened(trouble, consumer, Time::ZERO, now))
}

/// Some accident a moment ago, at this replica, at the owner, or at the consumer.
pub(super) fn has_cause(ledger: &Ledger, id: DeliveryId, call: &SettleCall, now: Time) -> bool {
    let Some(one) = ledger.deliveries.get(&id) else { return true };
    let since = call.began.saturating_sub(CAUSE_WITHIN);
    let recent = ledger.troubles.between(&one.message.0, since, now).any(|span| {
        // Hand-overs: the owner is another process than the one that was sent the message.
        let drained = Trouble::Draining { side: one.side };
        let any = ledger.troubles.happened(drained, &one.message.0, one.sent, now);
        span.trouble.side().is_none_or(|side| side == one.side || side == call.side || any)
    });
    let side = one.side;
    let gone = ledger.ended.contains(&side)
        || ledger.troubles.happened(Trouble::Killed { side }, &one.message.0, one.sent, now);
    recent || gone
}

/// "A consumer that is deleted and made again, or reset, ends all leases that were granted before." "After the last delivery
/// attempt, a late Ack or Term is applied while the consumer has no delivery in flight." Until JetStream delivers the message
/// again, it does not know what the Ack is of, and says nothing.
pub(super) fn unknown_to_jetstream(
    ledger: &Ledger,
    id: DeliveryId,
    call: &SettleCall,
    now: Time,
) -> bool {
    let Some(one) = ledger.deliveries.get(&id) else { return true };
    let reset = ledger.troubles.last_begin(Trouble::Reset, &one.message.0, now);
    let Some(reset) = reset.filter(|reset| one.sent <= *reset) else { return false };
    let again = ledger.newest(&one.message).map(|newest| newest.sent).filter(|at| *at > reset);
    let late = matches!(call.kind, Kind::Ack | Kind::Term) && ledger.is_last_attempt(one);
    late && again.is_none_or(|again| call.began < again)
}

/// "At the replica that leaves, calls wait while its leases are handed over." The call has waited for all its time.
pub(super) fn waited_for_a_hand_over(
    ledger: &Ledger,
    id: DeliveryId,
    call: &SettleCall,
    now: Time,
) -> bool {
    let Some(one) = ledger.deliveries.get(&id) else { return true };
    let drains = Trouble::Draining { side: call.side };
    let waited = call.hurried || now.saturating_sub(call.began) >= SETTLE_TIMEOUT;
    waited && ledger.troubles.happened(drains, &one.message.0, call.began, now)
}
