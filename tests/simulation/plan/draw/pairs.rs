//! Pairs of accidents that belong together: the second comes in the middle of what the first has begun.

use testkit::dice::Dice;

use super::super::{Accident, Plan, Planned, When};

/// How many kinds of pairs there are.
const KINDS: u64 = 13;

/// Plans a pair around a time.
pub(super) fn pair(plan: &mut Plan, at: u64, dice: &mut Dice) {
    let place = |dice: &mut Dice| dice.within(0..plan.replicas.len() as u64) as usize;
    let (replica, other) = (place(dice), place(dice));
    let consumer = dice.within(0..plan.consumers.len() as u64) as usize;
    let away = dice.within(100..4_000);
    let drain = Accident::Drain { replica, away };
    let leader = change(plan, consumer, soon(1_500, dice), dice);
    let up = dice.percent(50);
    let stall = |replica: usize, dice: &mut Dice| Accident::Stall {
        replica,
        up,
        down: !up,
        millis: dice.within(200..3_000),
    };
    let again = match dice.within(0..3) {
        0 => Accident::Reset { consumer },
        1 => Accident::MakeAgain { consumer },
        _ => Accident::Delete { consumer, away: Some(soon(400, dice)) },
    };
    let (first, second, later) = match dice.within(0..KINDS) {
        0 => (Accident::Kill { replica, away }, leader, soon(2_000, dice)),
        1 => (leader, Accident::Kill { replica, away }, soon(500, dice)),
        2 => (drain, leader, soon(500, dice)),
        3 => (drain, stall(replica, dice), soon(300, dice)),
        4 => (drain, stall(other, dice), soon(300, dice)),
        5 => (drain, Accident::Kill { replica, away }, soon(500, dice)),
        6 => (drain, Accident::Kill { replica: other, away }, soon(500, dice)),
        7 => (drain, Accident::Drain { replica: other, away }, soon(500, dice)),
        8 => (drain, Accident::Stop { replica, millis: soon(5_000, dice) }, soon(100, dice)),
        9 => (stall(replica, dice), again, soon(1_000, dice)),
        10 => {
            let millis = dice.within(500..5_000);
            (Accident::Stop { replica, millis }, again, soon(500, dice))
        }
        11 => (again, Accident::Kill { replica, away }, soon(500, dice)),
        _ => {
            // A leader that is away again and again.
            for no in 0..dice.within(3..10) {
                let away = dice.within(2_000..4_000);
                let what = change(plan, consumer, away, dice);
                plan.accidents.push(Planned { when: When::At(at + no * 4_500), what });
            }
            return;
        }
    };
    plan.accidents.push(Planned { when: When::At(at), what: first });
    plan.accidents.push(Planned { when: When::At(at + later), what: second });
}

/// Another leader, or the same server again, as it is possible for a consumer.
pub(super) fn change(plan: &Plan, consumer: usize, away: u64, dice: &mut Dice) -> Accident {
    let of = &plan.consumers[consumer];
    let graceful = dice.percent(25);
    if of.copies > 1 || of.clustered {
        Accident::ChangeLeader { consumer, away, forgets: dice.within(0..250), graceful }
    } else {
        let (forgets, memory) = (dice.within(0..100), dice.percent(80));
        Accident::Restart { away, forgets, memory, graceful }
    }
}

/// Often within a few milliseconds.
fn soon(most: u64, dice: &mut Dice) -> u64 {
    let most = if dice.percent(40) { 20.min(most) } else { most };
    dice.within(1..most)
}
