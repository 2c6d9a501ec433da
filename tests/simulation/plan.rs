//! The meaning of one seed: the cluster, its consumer, and the accidents, in the order of their times. A plan
//! can be cut down to some of its accidents, so that a failure is shown by the shortest one.

use std::{fmt, time::Duration};

use testkit::dice::Dice;

use super::jetstream::{Config, Time};

/// How long accidents happen.
pub const TROUBLE: Duration = Duration::from_secs(60);

/// How many kinds of accidents [`Plan::of`] chooses from; some count twice.
const KINDS: u64 = 19;

/// Something that happens to the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accident {
    /// Nothing moves on the wires of a replica for so long: to the servers, from them.
    Stall {
        replica: usize,
        up: bool,
        down: bool,
        millis: u64,
    },
    /// The wires break; each end notices after so long. Sent frames may still arrive.
    Cut {
        replica: usize,
        client: u64,
        server: u64,
        keep: bool,
    },
    /// A replica cannot reach NATS at all for so long.
    Part {
        replica: usize,
        millis: u64,
    },
    /// The one server starts anew, is away for so long, and forgets the newest so much.
    Restart {
        away: u64,
        forgets: u64,
        memory: bool,
    },
    /// Another server leads the consumer; there is none for so long.
    ChangeLeader {
        away: u64,
        forgets: u64,
    },
    Reset,
    MakeAgain,
    DeleteMessage,
    Pause {
        millis: u64,
    },
    AckWait {
        millis: u64,
    },
    Kill {
        replica: usize,
        away: u64,
    },
    Drain {
        replica: usize,
        away: u64,
    },
    /// Another key is put before the present one, and that is taken away later.
    RotateKeys,
    /// The wall clock of a replica is set wrong by so many milliseconds.
    Clock {
        replica: usize,
        millis: i64,
    },
    /// A replica's process stands still for so long.
    Stop {
        replica: usize,
        millis: u64,
    },
    /// Its machine is suspended: its monotonic clock does not tell.
    Suspend {
        replica: usize,
        millis: u64,
    },
    Poison,
}

#[derive(Clone)]
pub struct Plan {
    pub seed: u64,
    pub replicas: usize,
    pub clients: usize,
    pub config: Config,
    pub max_leases: usize,
    pub accidents: Vec<(Time, Accident)>,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "seed {}: {} replicas, {} clients, {:?}",
            self.seed, self.replicas, self.clients, self.config
        )?;
        self.accidents
            .iter()
            .try_for_each(|(at, what)| writeln!(f, "{:>9.3} {what:?}", at.as_secs_f64()))
    }
}

impl Plan {
    pub fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed, 1);
        let copies = if dice.percent(50) { 3 } else { 1 };
        let ack_wait = dice.millis(1_000..8_000);
        let mut config = Config { replicas: copies, ..Config::new(ack_wait) };
        if dice.percent(25) {
            config.backoff = (0..dice.within(1..4)).map(|_| dice.millis(1_000..8_000)).collect();
        }
        config.max_deliver = dice.percent(20).then(|| dice.within(2..6));
        config.max_ack_pending = Some(if dice.percent(30) { dice.within(2..10) } else { 1000 });
        let mut plan = Self {
            seed,
            replicas: dice.within(2..6) as usize,
            clients: dice.within(2..9) as usize,
            config,
            max_leases: if dice.percent(25) { dice.within(3..15) as usize } else { 200 },
            accidents: Vec::new(),
        };
        // Few kinds, and often: together they come to places that one of each never reaches.
        let kinds: Vec<u64> = (0..dice.within(1..5)).map(|_| dice.within(0..KINDS)).collect();
        for _ in 0..dice.within(0..16) {
            let at = dice.millis(1_000..u64::try_from(TROUBLE.as_millis()).unwrap());
            let kind = kinds[dice.within(0..kinds.len() as u64) as usize];
            let what = plan.accident(kind, &mut dice);
            plan.accidents.push((at, what));
        }
        plan.accidents.sort_by_key(|(at, _)| *at);
        plan
    }

    fn accident(&self, kind: u64, dice: &mut Dice) -> Accident {
        let replica = dice.within(0..self.replicas as u64) as usize;
        match kind {
            0 | 1 => {
                let both = dice.percent(40);
                let up = dice.percent(50);
                let (up, down) = (both || up, both || !up);
                Accident::Stall { replica, up, down, millis: dice.within(50..8_000) }
            }
            2 => Accident::Cut {
                replica,
                client: dice.within(0..5_000),
                server: dice.within(0..12_000),
                keep: dice.percent(50),
            },
            3 => Accident::Part { replica, millis: dice.within(500..15_000) },
            4 | 5 if self.config.replicas > 1 => {
                Accident::ChangeLeader { away: dice.within(0..4_000), forgets: dice.within(0..250) }
            }
            4 | 5 => Accident::Restart {
                away: dice.within(10..6_000),
                forgets: dice.within(0..100),
                memory: dice.percent(80),
            },
            6 => Accident::Reset,
            7 => Accident::MakeAgain,
            8 => Accident::DeleteMessage,
            9 => Accident::Pause { millis: dice.within(500..8_000) },
            10 => Accident::AckWait { millis: dice.within(1_000..8_000) },
            11 => Accident::Kill { replica, away: dice.within(100..10_000) },
            12 | 13 => Accident::Drain { replica, away: dice.within(100..10_000) },
            14 => Accident::RotateKeys,
            15 => Accident::Clock { replica, millis: dice.within(0..500) as i64 - 250 },
            16 => Accident::Stop { replica, millis: dice.within(100..8_000) },
            17 => Accident::Suspend { replica, millis: dice.within(100..8_000) },
            _ => Accident::Poison,
        }
    }
}
