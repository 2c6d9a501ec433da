//! Clients that name their Fetch calls, in one seed of six. They have dice of their own: they change no other seed.

use testkit::dice::Dice;

use super::super::{Habit, Plan};

/// How often in a hundred a seed has such clients, and how often a client of such a seed is one.
const SHARE: u64 = 17;
const CLIENTS: u64 = 70;
/// How often in a hundred such a client cancels its calls, whatever its habit was.
const CANCELS: u64 = 30;
/// How often in a hundred such a seed has messages with a single delivery attempt.
const ONE_ATTEMPT: u64 = 30;

pub(super) fn apply(plan: &mut Plan) {
    let mut dice = Dice::new(plan.seed, 6);
    if !dice.percent(SHARE) {
        return;
    }
    for client in &mut plan.clients {
        client.names = dice.percent(CLIENTS);
        if client.names && dice.percent(CANCELS) {
            client.habit = Habit::Impatient;
        }
    }
    if dice.percent(ONE_ATTEMPT) {
        plan.consumers.iter_mut().for_each(|consumer| consumer.max_deliver = Some(1));
    }
}
