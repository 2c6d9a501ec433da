//! Accidents that belong together: the second comes in the middle of what the first has begun.

use testkit::dice::Dice;

use super::super::{Accident, Plan, Planned, When};
use crate::signs::Sign;

/// How many kinds of pairs there are.
const KINDS: u64 = 22;

/// Those of one pair, around a time.
struct Pair<'p> {
    plan: &'p Plan,
    at: u64,
    replica: usize,
    other: usize,
    consumer: usize,
    all: Vec<Planned>,
}

/// Draws a pair around a time.
pub(super) fn pair(plan: &Plan, at: u64, dice: &mut Dice) -> Vec<Planned> {
    let place = |dice: &mut Dice| dice.within(0..plan.replicas.len() as u64) as usize;
    let (replica, other) = (place(dice), place(dice));
    let consumer = dice.within(0..plan.consumers.len() as u64) as usize;
    let mut pair = Pair { plan, at, replica, other, consumer, all: Vec::new() };
    let kind = dice.within(0..KINDS);
    match kind {
        0..10 => pair.of_drain(kind, dice),
        10..15 => pair.of_leader(kind, dice),
        15..18 => pair.of_consumer(kind, dice),
        _ => pair.of_lease(kind, dice),
    }
    pair.all
}

impl Pair<'_> {
    fn add(&mut self, later: u64, what: Accident) {
        self.all.push(Planned { when: When::At(self.at + later), what });
    }

    /// Some milliseconds after the next sign of this kind.
    fn add_near(&mut self, sign: Sign, there: bool, millis: i64, what: Accident) {
        let when = When::Near { sign, from: self.at, millis, there };
        self.all.push(Planned { when, what });
    }

    /// A replica drains, and something happens to it or to another while it hands over.
    fn of_drain(&mut self, kind: u64, dice: &mut Dice) {
        let (replica, other) = (self.replica, self.other);
        let away = dice.within(100..4_000);
        // A hand-over is three questions and answers, of some 10 ms each.
        let step = dice.within(0..30) as i64;
        self.add(0, Accident::Drain { replica, away });
        match kind {
            0 => {
                let what = self.leader(soon(1_500, dice), dice);
                self.add(soon(500, dice), what);
            }
            1 => {
                let stall = stall(replica, dice);
                self.add_near(Sign::HandingOver, true, step, stall);
            }
            2 => {
                let stall = stall(other, dice);
                self.add_near(Sign::HandingOver, false, step, stall);
            }
            3 => {
                let kill = Accident::Kill { replica, away };
                self.add_near(Sign::HandingOver, true, step, kill);
            }
            4 => {
                let kill = Accident::Kill { replica: other, away };
                self.add_near(Sign::HandingOver, false, step, kill);
            }
            5 => {
                let stop = Accident::Stop { replica, millis: soon(5_000, dice) };
                self.add_near(Sign::HandingOver, true, step, stop);
            }
            6 => {
                let stop = Accident::Stop { replica: other, millis: soon(5_000, dice) };
                self.add_near(Sign::HandingOver, false, step, stop);
            }
            7 => self.add(soon(500, dice), Accident::Drain { replica: other, away }),
            8 => {
                // A receiver that drains soon after.
                let drain = Accident::Drain { replica: other, away };
                self.add_near(Sign::HandingOver, false, step + 20, drain);
            }
            _ => {
                let kill = Accident::Kill { replica, away };
                self.add(soon(500, dice), kill);
            }
        }
    }

    fn of_leader(&mut self, kind: u64, dice: &mut Dice) {
        let (replica, away) = (self.replica, dice.within(100..4_000));
        if kind == 14 {
            // A leader that is away again and again.
            for no in 0..dice.within(3..10) {
                let what = self.leader(dice.within(2_000..4_000), dice);
                self.add(no * 4_500, what);
            }
            return;
        }
        let leader = self.leader(soon(1_500, dice), dice);
        self.add(0, leader);
        match kind {
            10 => self.add(soon(1_500, dice), Accident::Kill { replica, away }),
            11 => self.add(soon(1_500, dice), Accident::Drain { replica, away }),
            12 => self.add(soon(500, dice), stall(replica, dice)),
            _ => {
                // The replica dies first.
                self.all.clear();
                self.add(0, Accident::Kill { replica, away });
                self.add(soon(2_000, dice), leader);
            }
        }
    }

    /// A consumer is reset or made again, and a replica does not hear of it at once.
    fn of_consumer(&mut self, kind: u64, dice: &mut Dice) {
        let (replica, consumer) = (self.replica, self.consumer);
        let again = match dice.within(0..3) {
            0 => Accident::Reset { consumer },
            1 => Accident::MakeAgain { consumer },
            _ => Accident::Delete { consumer, away: Some(soon(400, dice)) },
        };
        match kind {
            15 => {
                self.add(0, stall(replica, dice));
                self.add(soon(1_000, dice), again);
            }
            16 => {
                self.add(0, again);
                self.add(soon(1_500, dice), again);
            }
            _ => {
                let away = dice.within(100..4_000);
                self.add(0, again);
                self.add(soon(500, dice), Accident::Kill { replica, away });
            }
        }
    }

    /// Something happens to the replica of a lease shortly before the lease ends, or as it is settled.
    fn of_lease(&mut self, kind: u64, dice: &mut Dice) {
        let replica = self.replica;
        let before = -(dice.within(0..1_500) as i64);
        match kind {
            18 => {
                let stop = Accident::Stop { replica, millis: soon(3_000, dice) };
                self.add_near(Sign::LeaseEnds, true, before, stop);
            }
            19 => {
                let stall = stall(replica, dice);
                self.add_near(Sign::LeaseEnds, true, before, stall);
            }
            20 => {
                // The answer of JetStream is late, and the replica leaves.
                let (stall, away) = (stall(replica, dice), dice.within(100..4_000));
                self.add_near(Sign::Settling, true, dice.within(0..12) as i64, stall);
                let drain = Accident::Drain { replica, away };
                self.add_near(Sign::Settling, true, dice.within(0..60) as i64, drain);
            }
            _ => {
                let kill = Accident::Kill { replica, away: dice.within(100..4_000) };
                self.add_near(Sign::Settling, dice.percent(50), dice.within(0..25) as i64, kill);
            }
        }
    }

    fn leader(&self, away: u64, dice: &mut Dice) -> Accident {
        change(self.plan, self.consumer, away, dice)
    }
}

fn stall(replica: usize, dice: &mut Dice) -> Accident {
    let (both, up) = (dice.percent(15), dice.percent(50));
    let most = if dice.percent(50) { 400 } else { 5_000 };
    Accident::Stall { replica, up: both || up, down: both || !up, millis: dice.within(30..most) }
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
