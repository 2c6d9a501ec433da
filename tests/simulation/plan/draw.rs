//! Draws a plan. A seed has few kinds of accidents and clients, and has them often: together they come to
//! places that one of each never reaches. Half of the accidents come in pairs, or are aimed at a sign.

mod attempts;
mod one_call;
mod pairs;
mod policies;
mod streams;
mod themes;

use testkit::dice::Dice;

use super::{
    Accident, ClientPlan, Clocks, ConsumerPlan, Habit, Outage, Plan, Planned, ReplicaPlan,
    StreamPlan, Victim, When,
};
use crate::signs::Sign;

/// How many kinds of accidents [`accident`] chooses from.
const KINDS: u64 = 36;

const HABITS: [Habit; 8] = [
    Habit::Ordinary,
    Habit::Batching,
    Habit::Nervous,
    Habit::LongWorker,
    Habit::Impatient,
    Habit::Repeating,
    Habit::Misusing,
    Habit::Keeper,
];

const SIGNS: [Sign; 8] = [
    Sign::Fetched,
    Sign::LeaseEnds,
    Sign::Settling,
    Sign::Draining,
    Sign::HandingOver,
    Sign::Leader,
    Sign::MadeAgain,
    Sign::Killed,
];

/// Which clients of their own kind there are.
#[derive(Clone, Copy)]
pub(super) struct Kinds {
    /// They name their Fetch calls.
    pub attempts: bool,
    /// They are on streams.
    pub streams: bool,
    /// They are on streams with `keep`.
    pub keep: bool,
}

/// The plan of a seed.
pub(super) fn draw(seed: u64, kinds: Kinds) -> Plan {
    let mut dice = Dice::new(seed, 1);
    let trouble = 1_000 * dice.within(15..61);
    let clocks = if dice.percent(5) { Clocks::Far } else { Clocks::Near };
    let mut plan = Plan {
        seed,
        trouble,
        clocks,
        replicas: Vec::new(),
        streams: Vec::new(),
        consumers: Vec::new(),
        clients: Vec::new(),
        accidents: Vec::new(),
    };
    let clocks_differ = clocks == Clocks::Far || dice.percent(50);
    // Nobody has room for what another hands over.
    let all_small = dice.percent(10);
    for _ in 0..dice.within(2..6) {
        let ahead = if clocks_differ { ahead(clocks, &mut dice) } else { 0 };
        let small = all_small || dice.percent(20);
        let max_leases = if small { dice.within(3..15) as usize } else { 200 };
        plan.replicas.push(ReplicaPlan { max_leases, ahead });
    }
    for _ in 0..if dice.percent(25) { 2 } else { 1 } {
        plan.streams.push(stream(&mut dice));
    }
    for _ in 0..[1, 1, 1, 2, 2, 3][below(6, &mut dice)] {
        let stream = below(plan.streams.len(), &mut dice);
        plan.consumers.push(consumer(stream, trouble, &mut dice));
    }
    // One of three servers leads each consumer, also a consumer without copies.
    if plan.servers() > 1 {
        plan.consumers.iter_mut().for_each(|one| one.clustered = one.copies == 1);
    }
    // Who has the habits of this seed.
    let habits: Vec<Habit> = (0..dice.within(1..4)).map(|_| *one(&HABITS, &mut dice)).collect();
    let homes = dice.percent(50);
    let few = if dice.percent(40) { 2..4 } else { 2..9 };
    for number in 0..dice.within(few).max(plan.consumers.len() as u64) {
        let consumer = number as usize % plan.consumers.len();
        let home = (homes && dice.percent(60)).then(|| below(plan.replicas.len(), &mut dice));
        let habit = *one(&habits, &mut dice);
        plan.clients.push(client(number, consumer, habit, home, &mut dice));
    }
    accidents(&mut plan, &mut dice);
    themes::apply(&mut plan);
    policies::apply(&mut plan);
    one_call::apply(&mut plan);
    if kinds.attempts {
        attempts::apply(&mut plan);
    }
    if kinds.streams {
        streams::apply(&mut plan);
    }
    if kinds.keep {
        streams::keep(&mut plan);
    }
    plan
}

fn stream(dice: &mut Dice) -> StreamPlan {
    StreamPlan {
        backlog: if dice.percent(30) { dice.within(10..150) } else { 0 },
        messages: 1_000,
        crowd: dice.within(1..8),
        pause: dice.within(200..3_000),
        size: if dice.percent(20) { 3_000 } else { 10 },
        not_json: if dice.percent(30) { 30 } else { 0 },
    }
}

fn consumer(stream: usize, trouble: u64, dice: &mut Dice) -> ConsumerPlan {
    let copies = if dice.percent(60) { 3 } else { 1 };
    let backoff = if dice.percent(25) { dice.within(1..4) } else { 0 };
    ConsumerPlan {
        stream,
        made: if dice.percent(15) { dice.within(1..trouble / 2) } else { 0 },
        ack_wait: if dice.percent(20) {
            dice.within(10_000..40_000)
        } else {
            dice.within(1_000..8_000)
        },
        backoff: (0..backoff).map(|_| dice.within(1_000..8_000)).collect(),
        max_deliver: dice.percent(20).then(|| dice.within(1..6)),
        max_ack_pending: if dice.percent(30) { dice.within(2..10) } else { 1_000 },
        max_batch: dice.percent(5).then(|| dice.within(1..5) as u32),
        max_bytes: dice.percent(5).then(|| dice.within(2_000..20_000)),
        copies,
        shows_leader: !dice.percent(10),
        clustered: copies == 1 && dice.percent(30),
        lag: if dice.percent(20) { dice.within(5..250) } else { dice.within(0..4) },
    }
}

fn client(
    number: u64,
    consumer: usize,
    habit: Habit,
    home: Option<usize>,
    dice: &mut Dice,
) -> ClientPlan {
    let long = habit == Habit::LongWorker;
    ClientPlan {
        number,
        consumer,
        habit,
        home,
        n: dice.within(1..if habit == Habit::Batching { 30 } else { 8 }) as u32,
        lease: (long || dice.percent(50))
            .then(|| dice.within(if long { 9_000 } else { 1_001 }..30_000)),
        linger: if dice.percent(20) { dice.within(1..1_000) } else { 0 },
        max_bytes: if dice.percent(10) { dice.within(1_024..6_000) as u32 } else { 0 },
        json: dice.percent(15),
        patient: false,
        sent: dice.percent(10),
        unary: dice.percent(25),
        one_call: false,
        names: false,
        streams: false,
        keeps: false,
        dies: if dice.percent(50) { dice.within(1..15) } else { 0 },
    }
}

fn accidents(plan: &mut Plan, dice: &mut Dice) {
    let kinds: Vec<u64> = (0..dice.within(1..5)).map(|_| dice.within(0..KINDS)).collect();
    let rolls = dice.percent(15);
    if rolls {
        let what = Accident::Roll { keys: dice.percent(50), pause: dice.within(100..3_000) };
        plan.accidents.push(Planned { when: When::At(dice.within(500..plan.trouble / 2)), what });
    }
    for _ in 0..dice.within(0..14) {
        let at = dice.within(500..plan.trouble);
        match dice.within(0..100) {
            0..30 => {
                let what = accident(*one(&kinds, dice), plan, dice);
                plan.accidents.push(Planned { when: near(at, dice), what });
            }
            30..60 => plan.accidents.extend(pairs::pair(plan, at, dice)),
            _ => {
                let what = accident(*one(&kinds, dice), plan, dice);
                plan.accidents.push(Planned { when: When::At(at), what });
                if dice.percent(30) {
                    // Another of any kind, at its side.
                    let mut other = accident(dice.within(0..KINDS), plan, dice);
                    together(what, &mut other, dice.percent(70));
                    let when = When::At(at + dice.within(0..50));
                    plan.accidents.push(Planned { when, what: other });
                }
            }
        }
    }
    sort(&mut plan.accidents);
}

fn sort(accidents: &mut [Planned]) {
    accidents.sort_by_key(|planned| match planned.when {
        When::At(at) => at,
        When::Near { from, .. } => from,
    });
}

/// Aims an accident at the victim of another.
fn together(mut first: Accident, other: &mut Accident, same: bool) {
    match (first.victim(), other.victim()) {
        (Victim::Replica(one), Victim::Replica(other))
        | (Victim::Consumer(one), Victim::Consumer(other))
        | (Victim::Stream(one), Victim::Stream(other))
            if same =>
        {
            *other = *one;
        }
        _ => {}
    }
}

fn near(from: u64, dice: &mut Dice) -> When {
    let sign = *one(&SIGNS, dice);
    let millis = match (sign, dice.within(0..3)) {
        (Sign::LeaseEnds, 0) => 0,
        (Sign::LeaseEnds, 1) => dice.within(0..20) as i64 - 10,
        (Sign::LeaseEnds, _) => dice.within(0..1_500) as i64 - 1_400,
        (_, 0) => dice.within(0..6) as i64,
        (_, 1) => dice.within(0..50) as i64,
        (_, _) => dice.within(0..1_500) as i64,
    };
    When::Near { sign, from, millis, there: dice.percent(70) }
}

fn ahead(clocks: Clocks, dice: &mut Dice) -> i64 {
    // Two replicas, and the servers, differ by 250 ms at most.
    let far = dice.within(300..20_000) as i64;
    match clocks {
        Clocks::Near => dice.within(0..250) as i64 - 125,
        Clocks::Far if dice.percent(50) => far,
        Clocks::Far => -far,
    }
}

fn accident(kind: u64, plan: &Plan, dice: &mut Dice) -> Accident {
    let replica = below(plan.replicas.len(), dice);
    let consumer = below(plan.consumers.len(), dice);
    let stream = below(plan.streams.len(), dice);
    let elsewhere = plan.consumers[consumer].copies > 1 || plan.consumers[consumer].clustered;
    match kind {
        0..3 => {
            let both = dice.percent(30);
            let up = dice.percent(50);
            Accident::Stall {
                replica,
                up: both || up,
                down: both || !up,
                millis: short(8_000, dice),
            }
        }
        3 => {
            let (client, server) = (dice.within(0..5_000), dice.within(0..12_000));
            Accident::Cut { replica, client, server, keep: dice.percent(50) }
        }
        4 => Accident::Part { replica, millis: dice.within(500..15_000) },
        5 => {
            let client = one(&plan.clients, dice).number;
            Accident::PartClient { client, replica, millis: dice.within(200..25_000) }
        }
        6..10 if elsewhere => pairs::change(plan, consumer, short(4_000, dice), dice),
        6..8 => pairs::change(plan, consumer, short(6_000, dice), dice),
        8..11 => Accident::Reset { consumer },
        11 | 12 => Accident::MakeAgain { consumer },
        13 => {
            let away = dice.percent(80).then(|| short(8_000, dice));
            Accident::Delete { consumer, away }
        }
        14 => Accident::DeleteMessage { consumer },
        15 if dice.percent(50) => Accident::Purge { stream },
        15 => Accident::Age { stream, millis: dice.within(300..20_000) },
        16 => Accident::Pause { consumer, millis: dice.within(500..8_000) },
        17 => Accident::AckWait { consumer, millis: dice.within(600..8_000) },
        18 if dice.percent(50) => Accident::MaxAckPending { consumer, most: dice.within(1..20) },
        18 => Accident::MaxDeliver { consumer, most: dice.percent(70).then(|| dice.within(1..8)) },
        19 | 20 => Accident::Kill { replica, away: short(10_000, dice) },
        21..24 => Accident::Drain { replica, away: short(10_000, dice) },
        24 => {
            Accident::RotateKeys { pause: dice.within(0..3_000), keeps: dice.within(1_000..70_000) }
        }
        25 => Accident::Clock { replica, ahead: ahead(plan.clocks, dice) },
        26 | 27 => Accident::Stop { replica, millis: short(8_000, dice) },
        28 if dice.percent(50) => Accident::Poison { stream },
        29.. => Accident::Outage(Outage::draw(plan.servers(), plan.replicas.len(), dice)),
        _ => Accident::Suspend { millis: short(8_000, dice) },
    }
}

/// Often a moment, and sometimes long.
fn short(most: u64, dice: &mut Dice) -> u64 {
    let most = match dice.within(0..3) {
        0 => 100,
        1 => 1_500,
        _ => most,
    };
    dice.within(2..most)
}

fn below(count: usize, dice: &mut Dice) -> usize {
    dice.within(0..count as u64) as usize
}

fn one<'a, T>(of: &'a [T], dice: &mut Dice) -> &'a T {
    &of[below(of.len(), dice)]
}
