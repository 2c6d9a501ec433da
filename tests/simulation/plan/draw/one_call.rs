//! Clients that settle on their next Fetch, in one seed of seven. They have dice of their own: they change no other
//! seed.

use testkit::dice::Dice;

use super::super::Plan;

/// How often in a hundred a seed has such clients, and how often a client of such a seed is one.
const SHARE: u64 = 14;
const CLIENTS: u64 = 60;

pub(super) fn apply(plan: &mut Plan) {
    let mut dice = Dice::new(plan.seed, 5);
    if dice.percent(SHARE) {
        plan.clients.iter_mut().for_each(|client| client.one_call = dice.percent(CLIENTS));
    }
}
