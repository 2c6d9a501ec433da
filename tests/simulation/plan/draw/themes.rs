//! Themes: whole situations that a plan of single accidents hardly ever comes to. One seed in six has a theme. The
//! cluster, the consumer, the clients and the accidents of such a plan belong together.
//!
//! A theme has dice of its own: it changes no other seed.

use testkit::dice::Dice;

use super::super::{
    Accident, ClientPlan, Clocks, ConsumerPlan, Habit, Outage, Plan, Planned, ReplicaPlan,
    StreamPlan, When,
};
use crate::{net::Right, signs::Sign};

/// How often in a hundred a seed has a theme, and how many themes there are.
const SHARE: u64 = 16;
const THEMES: u64 = 12;
/// How many of a hundred other seeds have the last theme.
const CUT_OFF: u64 = 1;

/// Makes the plan one of a theme, if its seed has one.
pub(super) fn apply(plan: &mut Plan) {
    let mut dice = Dice::new(plan.seed, 3);
    if !dice.percent(SHARE) {
        if dice.percent(CUT_OFF) {
            Theme { plan, dice }.leader_that_is_cut_off();
        }
        return;
    }
    let mut theme = Theme { plan, dice };
    match theme.dice.within(0..THEMES) {
        0 => theme.crashes_while_nothing_comes(),
        1 => theme.pulls_that_nobody_follows(),
        2 => theme.hand_over_after_a_change_of_leader(),
        3 => theme.slow_hand_over(),
        4 => theme.settlements_that_are_left(),
        5 => theme.no_right_to_ack(),
        6 => theme.leases_that_end_without_a_leader(),
        7 => theme.suspensions(),
        8 => theme.owners_with_wrong_clocks(),
        9 => theme.servers_that_forget(),
        10 => theme.leader_that_comes_back(),
        _ => theme.progress_under_way(),
    }
}

struct Theme<'p> {
    plan: &'p mut Plan,
    dice: Dice,
}

impl Theme<'_> {
    fn within(&mut self, least: u64, most: u64) -> u64 {
        self.dice.within(least..most)
    }

    /// A cluster without accidents: so many replicas, and one consumer.
    fn begin(&mut self, replicas: u64, copies: u32, ack_wait: u64) {
        let clocks = Clocks::Near;
        let plan = &mut self.plan;
        plan.clocks = clocks;
        plan.trouble = 45_000;
        plan.replicas = vec![ReplicaPlan { max_leases: 200, ahead: 0 }; replicas as usize];
        plan.streams = vec![StreamPlan {
            backlog: 0,
            messages: 1_000,
            crowd: 4,
            pause: 1_000,
            size: 10,
            not_json: 0,
        }];
        plan.consumers = vec![ConsumerPlan {
            stream: 0,
            made: 0,
            ack_wait,
            backoff: Vec::new(),
            max_deliver: None,
            max_ack_pending: 1_000,
            max_batch: None,
            max_bytes: None,
            copies,
            shows_leader: true,
            clustered: false,
            lag: 0,
        }];
        plan.clients.clear();
        plan.accidents.clear();
    }

    fn client(&mut self, habit: Habit) -> &mut ClientPlan {
        let number = self.plan.clients.len() as u64;
        let n = self.dice.within(1..8) as u32;
        self.plan.clients.push(ClientPlan { habit, ..ClientPlan::ordinary(number, 0, n) });
        self.plan.clients.last_mut().unwrap()
    }

    fn clients(&mut self, count: u64, habit: Habit, lease: Option<u64>) {
        for _ in 0..count {
            self.client(habit).lease = lease;
        }
    }

    fn replica(&mut self) -> usize {
        self.dice.within(0..self.plan.replicas.len() as u64) as usize
    }

    fn at(&mut self, at: u64, what: Accident) {
        self.plan.accidents.push(Planned { when: When::At(at), what });
    }

    fn near(&mut self, sign: Sign, from: u64, millis: i64, what: Accident) {
        let when = When::Near { sign, from, millis, there: true };
        self.plan.accidents.push(Planned { when, what });
    }

    fn change(&mut self, away: u64) -> Accident {
        let forgets = self.within(0, 250);
        Accident::ChangeLeader { consumer: 0, away, forgets, graceful: false }
    }

    /// Times for accidents, until the trouble is over.
    fn times(&mut self, least: u64, most: u64) -> Vec<u64> {
        let mut times = Vec::new();
        let mut at = self.within(1_500, 5_000);
        while at + 3_000 < self.plan.trouble {
            times.push(at);
            at += self.within(least, most);
        }
        times
    }

    /// No pull ends as it should, for longer than bytes stay in doubt.
    fn crashes_while_nothing_comes(&mut self) {
        let ack_wait = self.within(25_000, 40_000);
        self.begin(2, 3, ack_wait);
        self.plan.trouble = 60_000;
        (self.plan.streams[0].pause, self.plan.streams[0].messages) = (90_000, 3);
        for home in 0..2 {
            let client = self.client(Habit::Ordinary);
            (client.home, client.patient) = (Some(home), true);
        }
        let (least, most) =
            *[(400, 900), (900, 2_500), (2_500, 4_500)].get(self.plan.seed as usize % 3).unwrap();
        for at in self.times(least, most) {
            let away = self.within(5, 300);
            let what = self.change(away);
            self.at(at, what);
        }
    }

    /// A leader dies with a pull, and nobody asks at that replica again for some time.
    fn pulls_that_nobody_follows(&mut self) {
        let ack_wait = self.within(10_000, 40_000);
        self.begin(5, 3, ack_wait);
        (self.plan.streams[0].pause, self.plan.streams[0].crowd) = (6_000, 2);
        // The task of the consumer lives as long as something is leased.
        self.clients(3, Habit::LongWorker, Some(30_000));
        for at in self.times(1_500, 5_000) {
            let away = self.within(5, 300);
            let what = self.change(away);
            self.at(at, what);
        }
    }

    /// A replica that has not seen the new leader hands over to one that has.
    fn hand_over_after_a_change_of_leader(&mut self) {
        let (replicas, ack_wait) = (self.within(2, 4), self.within(3_000, 8_000));
        self.begin(replicas, 3, ack_wait);
        self.plan.streams[0].backlog = 40;
        self.clients(2, Habit::LongWorker, Some(30_000));
        self.clients(2, Habit::Ordinary, Some(20_000));
        for at in self.times(9_000, 14_000) {
            let (away, replica) = (self.within(5, 500), self.replica());
            let what = self.change(away);
            self.at(at, what);
            let (later, away) = (self.within(0, 1_100) as i64, self.within(100, 2_000));
            let what = Accident::Drain { replica, away };
            let when = When::Near { sign: Sign::Leader, from: at, millis: later, there: false };
            self.plan.accidents.push(Planned { when, what });
        }
    }

    /// Leases are on their way to another replica for longer than a moment.
    fn slow_hand_over(&mut self) {
        let (replicas, ack_wait) = (self.within(2, 4), self.within(2_000, 6_000));
        self.begin(replicas, 1, ack_wait);
        self.clients(4, Habit::Late, None);
        for at in self.times(5_000, 9_000) {
            let (replica, other) = (self.replica(), self.replica());
            self.at(at, Accident::Drain { replica, away: 1_000 });
            let (step, millis, up) =
                (self.within(0, 30), self.within(300, 1_900), self.dice.percent(50));
            let stalled = if self.dice.percent(50) { replica } else { other };
            let what = Accident::Stall { replica: stalled, up, down: !up, millis };
            let when =
                When::Near { sign: Sign::HandingOver, from: at, millis: step as i64, there: false };
            self.plan.accidents.push(Planned { when, what });
        }
    }

    /// Clients hang up before JetStream answers, and their replica leaves.
    fn settlements_that_are_left(&mut self) {
        let (replicas, ack_wait) = (self.within(2, 4), self.within(3_000, 8_000));
        self.begin(replicas, 3, ack_wait);
        self.plan.consumers[0].lag = self.within(60, 250);
        self.clients(5, Habit::Leaver, None);
        for at in self.times(2_500, 5_000) {
            let replica = self.replica();
            let later = self.within(0, 60) as i64;
            self.near(Sign::Settling, at, later, Accident::Drain { replica, away: 500 });
        }
    }

    /// NATS refuses acks, and clients work for longer than the ack wait.
    fn no_right_to_ack(&mut self) {
        let (copies, ack_wait) =
            (if self.dice.percent(50) { 3 } else { 1 }, self.within(1_500, 5_000));
        self.begin(2, copies, ack_wait);
        self.clients(3, Habit::LongWorker, Some(20_000));
        self.clients(2, Habit::Ordinary, Some(10_000));
        for at in self.times(12_000, 18_000) {
            let millis = self.within(3_000, 12_000);
            self.at(at, Accident::Outage(Outage::Refuse { right: Right::Ack, millis }));
        }
    }

    /// Short leases lapse, and long ones are due, while nobody leads and their messages are old.
    fn leases_that_end_without_a_leader(&mut self) {
        let (ack_wait, long) = (self.within(2_000, 5_000), self.dice.percent(50));
        self.begin(3, 3, ack_wait);
        let stream = &mut self.plan.streams[0];
        (stream.backlog, stream.crowd, stream.pause) = (150, 20, 800);
        let (habit, lease) =
            if long { (Habit::LongWorker, 20_000) } else { (Habit::Ordinary, 1_700) };
        for _ in 0..6 {
            let client = self.client(habit);
            // Many leases that nobody settles.
            (client.lease, client.n, client.dies) = (Some(lease), 30, 70);
        }
        for at in self.times(3_500, 6_000) {
            let away = self.within(300, 3_000);
            let what = self.change(away);
            self.at(at, what);
        }
    }

    /// All machines are suspended while leases are held.
    fn suspensions(&mut self) {
        let (copies, ack_wait) =
            (if self.dice.percent(50) { 3 } else { 1 }, self.within(2_000, 8_000));
        self.begin(2, copies, ack_wait);
        self.clients(4, Habit::Late, None);
        for at in self.times(3_000, 7_000) {
            let (millis, before) = (self.within(200, 4_000), self.within(0, 1_500) as i64);
            self.near(Sign::LeaseEnds, at, -before, Accident::Suspend { millis });
        }
    }

    /// Owners with wrong clocks die, and clients settle elsewhere.
    fn owners_with_wrong_clocks(&mut self) {
        let (copies, ack_wait) =
            (if self.dice.percent(50) { 3 } else { 1 }, self.within(2_000, 6_000));
        self.begin(3, copies, ack_wait);
        self.plan.clocks = Clocks::Far;
        for place in 0..3 {
            self.plan.replicas[place].ahead = self.within(0, 8_000) as i64 - 1_000;
        }
        self.clients(4, Habit::Late, None);
        for at in self.times(8_000, 12_000) {
            let (later, replica) = (self.within(0, 2_000) as i64, self.replica());
            self.near(Sign::Fetched, at, later, Accident::Kill { replica, away: 5_000 });
        }
    }

    /// A server without copies forgets its newest deliveries.
    fn servers_that_forget(&mut self) {
        let ack_wait = self.within(3_000, 12_000);
        self.begin(3, 1, ack_wait);
        self.plan.consumers[0].clustered = self.dice.percent(70);
        self.clients(4, Habit::Late, None);
        for at in self.times(3_000, 6_000) {
            let (away, forgets, later) =
                (self.within(5, 80), self.within(60, 250), self.within(0, 40) as i64);
            let what = if self.plan.consumers[0].clustered {
                Accident::ChangeLeader { consumer: 0, away, forgets, graceful: false }
            } else {
                Accident::Restart { away, forgets: forgets.min(99), memory: true, graceful: false }
            };
            self.near(Sign::Fetched, at, later, what);
        }
    }

    /// A leader goes and comes back, and INFO does not show it.
    fn leader_that_comes_back(&mut self) {
        let ack_wait = self.within(2_000, 5_000);
        self.begin(2, 1, ack_wait);
        self.plan.consumers[0].clustered = true;
        self.plan.streams[0].backlog = 60;
        self.clients(2, Habit::LongWorker, Some(20_000));
        self.clients(2, Habit::Ordinary, Some(10_000));
        for at in self.times(6_000, 10_000) {
            let away = self.within(300, 3_500);
            let what = self.change(away);
            self.at(at, what);
        }
    }

    /// The answer to progress is on its way from the old leader when the replica learns of the new one.
    fn progress_under_way(&mut self) {
        let ack_wait = self.within(8_000, 30_000);
        self.begin(2, 3, ack_wait);
        self.clients(3, Habit::LongWorker, Some(60_000));
        self.clients(2, Habit::Ordinary, None);
        for at in self.times(4_000, 8_000) {
            for from in 0..3 {
                for to in (0..3).filter(|to| *to != from) {
                    let millis = self.within(200, 4_000);
                    if self.dice.percent(40) {
                        self.at(at, Accident::Outage(Outage::StallRoute { from, to, millis }));
                    }
                }
            }
            let (later, away) = (self.within(50, 1_500), self.within(5, 400));
            let what = self.change(away);
            self.at(at + later, what);
        }
    }

    /// A leader is cut off from the other servers, together with the replicas at its server. It answers progress and
    /// Naks, and cannot keep them.
    fn leader_that_is_cut_off(&mut self) {
        let ack_wait = self.within(3_000, 12_000);
        self.begin(4, 3, ack_wait);
        self.clients(3, Habit::LongWorker, Some(40_000));
        self.clients(2, Habit::Ordinary, Some(20_000));
        self.client(Habit::Keeper).lease = None;
        for at in self.times(14_000, 22_000) {
            let (server, millis) = (self.within(0, 3) as usize, self.within(9_000, 25_000));
            self.at(at, Accident::Outage(Outage::PartFromOthers { server, millis }));
        }
    }
}
