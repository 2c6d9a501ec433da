//! Clients that work on streams, in one seed of six. In half of these seeds, the leases of most of them live as long as
//! their streams, if that is asked for. They have dice of their own: they change no other seed.

use testkit::dice::Dice;

use super::super::Plan;

/// How often in a hundred a seed has such clients, and how often a client of such a seed is one.
const SHARE: u64 = 17;
const CLIENTS: u64 = 60;
/// The same of clients whose leases live as long as their streams.
const KEEPING: u64 = 50;
const KEEPERS: u64 = 70;

pub(super) fn apply(plan: &mut Plan) {
    let mut dice = Dice::new(plan.seed, 7);
    if dice.percent(SHARE) {
        plan.clients.iter_mut().for_each(|client| client.streams = dice.percent(CLIENTS));
    }
}

/// The leases of some streams live as long as the streams.
pub(super) fn keep(plan: &mut Plan) {
    let mut dice = Dice::new(plan.seed, 8);
    if dice.percent(KEEPING) {
        for client in plan.clients.iter_mut().filter(|client| client.streams) {
            client.keeps = dice.percent(KEEPERS);
        }
    }
}
