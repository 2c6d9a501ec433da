//! Clients that work on streams, in one seed of six. They have dice of their own: they change no other seed.

use testkit::dice::Dice;

use super::super::Plan;

/// How often in a hundred a seed has such clients, and how often a client of such a seed is one.
const SHARE: u64 = 17;
const CLIENTS: u64 = 60;

pub(super) fn apply(plan: &mut Plan) {
    let mut dice = Dice::new(plan.seed, 7);
    if dice.percent(SHARE) {
        plan.clients.iter_mut().for_each(|client| client.streams = dice.percent(CLIENTS));
    }
}
