//! Changes of the policy, in one seed of twenty. They have dice of their own: they change no other seed.

use testkit::dice::Dice;

use super::{
    super::{Accident, Plan, Planned, When},
    below, near, short, sort,
};

/// How often in a hundred a seed has such accidents.
const SHARE: u64 = 5;

pub(super) fn apply(plan: &mut Plan) {
    let mut dice = Dice::new(plan.seed, 4);
    if !dice.percent(SHARE) {
        return;
    }
    for _ in 0..dice.within(1..4) {
        let consumer = below(plan.consumers.len(), &mut dice);
        let (pause, millis) = (dice.within(0..600), short(8_000, &mut dice));
        let at = dice.within(500..plan.trouble);
        let when = if dice.percent(50) { near(at, &mut dice) } else { When::At(at) };
        plan.accidents.push(Planned { when, what: Accident::Policy { consumer, pause, millis } });
    }
    sort(&mut plan.accidents);
}
