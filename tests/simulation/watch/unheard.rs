//! The clocks of two replicas that never heard each other: only the time of day in a token then says whether its lease
//! has ended. Judges nothing. Pure.

use std::time::Duration;

use super::{
    ledger::{Delivered, Effect, Ledger},
    troubles::Trouble,
};

/// "The clocks of the replicas must therefore agree within 250 ms"
pub const CLOCKS: Duration = Duration::from_millis(250);
/// Two replicas that live for so long have heard each other: "Replicas compare their clocks once a second."
const HEARD: Duration = Duration::from_secs(3);

/// "A replica that never heard the owner trusts the clock of the owner": the owner was gone before the two could hear
/// each other, or from then on until a moment ago, one of the two was cut off or stood still.
pub fn never_heard(ledger: &Ledger, effect: &Effect, one: &Delivered) -> bool {
    let of =
        |trouble: Trouble| ledger.troubles.all().iter().filter(move |span| span.trouble == trouble);
    if of(Trouble::ClockOff { side: one.side }).next().is_none() {
        return false;
    }
    // A process is away from NATS as it starts.
    let started = |side| of(Trouble::Wire { side }).map(|span| span.from).min();
    let died = of(Trouble::Killed { side: one.side }).map(|span| span.from);
    // A replica that drains is gone at its end.
    let left = of(Trouble::Draining { side: one.side }).map(|span| span.until);
    let died = died.chain(left).min();
    let since = started(effect.side).map(|started| started + HEARD);
    let gone = died.is_some_and(|died| since.is_none_or(|since| died < since));
    let together = since.max(started(one.side).map(|started| started + HEARD));
    let parted = |side| {
        of(Trouble::Wire { side }).chain(of(Trouble::Stopped { side })).any(|span| {
            together.is_some_and(|together| span.from <= together)
                && span.until + HEARD >= effect.left
        })
    };
    gone || parted(effect.side) || parted(one.side)
}

/// How far the clock of the replica that has settled may have been behind the clock of the owner.
pub fn behind(ledger: &Ledger, effect: &Effect, one: &Delivered) -> Duration {
    let shown = |side| ledger.clocks.get(&side).map(Vec::as_slice).unwrap_or_default();
    let owner = shown(one.side).iter().max().copied().unwrap_or(0);
    let here = shown(effect.side).iter().min().copied().unwrap_or(0);
    Duration::from_millis(u64::try_from(owner - here).unwrap_or(0))
}
