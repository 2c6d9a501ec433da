//! One run: a plan in, a history and what was seen out.
//!
//! ```text
//!  trouble: accidents, messages, clients of all kinds ──▶ calm: all is mended, clients settle at once
//!  ──▶ the consumer is empty, or something was dark for too long ──▶ every replica drains, holding nothing
//! ```

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fetch_proxy::{broker::ConsumerName, simulated::SimulatedMachine, token::InstanceId};
use testkit::dice::Dice;
use tokio::time::{sleep, sleep_until, timeout};

use super::{
    clients::Client,
    history::History,
    jetstream::Config,
    net::{Net, Weather},
    panics,
    plan::{Accident, Plan, TROUBLE},
    replica::{LONGEST_LEASE, Replica},
    watch::{Event, Shared, Watch},
};

/// After trouble, everything is settled within this: the longest lease, the longest ack wait, a few times
/// over for messages that replicas pass around.
const DARKEST: Duration = Duration::from_secs(120);

/// No run takes longer than this.
const LONGEST: Duration = Duration::from_secs(900);

const KEYS: [&str; 2] = [
    "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=",
    "ISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+P0A=",
];

pub struct World {
    pub net: Net,
    plan: Plan,
    watch: Arc<Mutex<Watch>>,
    replicas: Mutex<Vec<Arc<Replica>>>,
    keys: Mutex<String>,
    config: Mutex<Config>,
    calm: AtomicBool,
    over: AtomicBool,
}

/// The result of a run.
#[derive(Debug, Default)]
pub struct Outcome {
    pub history: History,
    pub watch: Watch,
}

impl World {
    pub fn name(&self) -> ConsumerName {
        ConsumerName { stream: "S".into(), consumer: "worker".into() }
    }

    pub fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap()
    }

    pub fn replicas(&self) -> Vec<Arc<Replica>> {
        self.replicas.lock().unwrap().clone()
    }

    pub fn calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    pub fn over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Longest way between a client and a replica, to and fro.
    pub fn longest_way(&self) -> Duration {
        Duration::from_millis(10)
    }

    pub fn note(&self, what: fmt::Arguments<'_>) {
        self.net.with(|state, now| state.history.add(now, what));
    }

    fn start(&self, place: usize) {
        let count = self.net.with(|state, _| state.sides());
        let seed = self.plan.seed.wrapping_mul(1_000_003).wrapping_add(count as u64);
        let machine = SimulatedMachine::new(seed, self.net.began());
        let us = InstanceId(seed.to_le_bytes());
        let keys = self.keys.lock().unwrap().clone();
        let replica = Replica::start(&self.net, machine, us, keys, self.plan.max_leases);
        let mut replicas = self.replicas.lock().unwrap();
        if place < replicas.len() { replicas[place] = replica } else { replicas.push(replica) }
    }

    fn event(&self, event: Event, lasts: Duration) {
        let until = self.net.now() + lasts;
        self.watch().event(event, until);
    }

    async fn happen(self: Arc<Self>, what: Accident) {
        self.note(format_args!("accident {what:?}"));
        let kind = format!("{what:?}");
        let kind = kind.split([' ', '{']).next().unwrap_or_default().to_owned();
        self.watch().count(format!("accident {kind}"));
        let name = self.name();
        let millis = Duration::from_millis;
        let side = |replica: usize| self.replicas()[replica].side;
        match what {
            Accident::Stall { replica, up, down, millis: length } => {
                let side = side(replica);
                self.net.with(|state, now| state.stall(side, (up, down), now + millis(length)));
            }
            Accident::Cut { replica, client, server, keep } => {
                let side = side(replica);
                self.net.with(|state, now| {
                    state.cut(side, (now + millis(client), now + millis(server)), keep);
                });
            }
            Accident::Part { replica, millis: length } => {
                let side = side(replica);
                self.net.with(|state, now| {
                    state.reach(side, false);
                    state.cut(side, (now + millis(2_000), now + millis(10_000)), false);
                });
                sleep(millis(length)).await;
                self.net.with(|state, _| state.reach(side, true));
            }
            Accident::Restart { away, forgets, memory } => {
                self.event(Event::LeaderChanged, millis(away));
                self.net.with(|state, _| state.stop_server());
                sleep(millis(away)).await;
                self.net.with(|state, now| state.start_server(millis(forgets), memory, now));
            }
            Accident::ChangeLeader { away, forgets } => {
                self.event(Event::LeaderChanged, millis(away));
                self.net.with(|state, now| state.model.lose_leader(&name, now));
                sleep(millis(away)).await;
                self.net.with(|state, now| state.model.change_leader(&name, millis(forgets), now));
            }
            Accident::Reset => {
                self.event(Event::MadeAgain, Duration::ZERO);
                self.net.with(|state, now| state.model.reset(&name, 1, now));
            }
            Accident::MakeAgain => {
                self.event(Event::MadeAgain, Duration::ZERO);
                let config = self.config.lock().unwrap().clone();
                self.net.with(|state, _| state.model.add_consumer(&name, config));
            }
            Accident::DeleteMessage => self.net.with(|state, now| {
                if let Some(first) = state.model.unsettled(&name).first() {
                    state.model.remove("S", *first, now);
                }
            }),
            Accident::Pause { millis: length } => self.net.with(|state, now| {
                state.model.pause(&name, Some(now + millis(length)), now);
            }),
            Accident::AckWait { millis: length } => {
                self.event(Event::WaitLowered, Duration::ZERO);
                let mut config = self.config.lock().unwrap();
                config.ack_wait = millis(length);
                let ack_wait = config.ack_wait;
                self.net.with(|state, now| {
                    state.model.update(&name, |config| config.ack_wait = ack_wait, now);
                });
            }
            Accident::Kill { replica, away } => {
                let victim = self.replicas()[replica].clone();
                self.event(Event::Killed { side: victim.side }, Duration::ZERO);
                if victim.gone.load(Ordering::Relaxed) {
                    return;
                }
                victim.kill(&self.net);
                sleep(millis(away)).await;
                self.start(replica);
            }
            Accident::Drain { replica, away } => {
                let leaver = self.replicas()[replica].clone();
                if leaver.gone.load(Ordering::Relaxed) || leaver.lessor.is_draining() {
                    return;
                }
                // It may be killed before it has ended.
                let drain = leaver.machine.run(leaver.clone().drain());
                let drained = timeout(Duration::from_secs(100), drain).await;
                let handed_over = drained.as_ref().is_ok_and(|drained| drained.handed_over);
                self.watch().count(format!("drain handed over: {handed_over}"));
                self.note(format_args!("{drained:?}"));
                sleep(millis(away)).await;
                self.start(replica);
            }
            Accident::RotateKeys => {
                for keys in [[KEYS[1], KEYS[0]].join("\n"), KEYS[1].to_owned()] {
                    self.keys.lock().unwrap().clone_from(&keys);
                    for replica in self.replicas() {
                        sleep(millis(100)).await;
                        let _ = replica.machine.sync(|| replica.keys.retake(keys.clone()));
                    }
                    sleep(Duration::from_secs(15)).await;
                }
            }
            Accident::Clock { replica, millis } => {
                self.replicas()[replica].machine.set_wall_offset(millis * 1_000_000);
            }
            Accident::Stop { replica, millis: length } => {
                self.event(Event::Stopped { side: side(replica) }, millis(length));
                let replica = self.replicas()[replica].clone();
                if replica.gone.load(Ordering::Relaxed) {
                    return;
                }
                replica.machine.stop();
                sleep(millis(length)).await;
                if !replica.gone.load(Ordering::Relaxed) {
                    replica.machine.resume();
                }
            }
            Accident::Suspend { replica, millis: length } => {
                self.replicas()[replica].machine.suspend(millis(length));
            }
            Accident::Poison => self.net.with(|state, now| {
                let sequence = state.model.publish("S", "poison".into(), true, now);
                self.watch().poisoned("S", sequence);
            }),
        }
    }

    /// Messages come, now in crowds and now alone.
    async fn publish(self: Arc<Self>) {
        let mut dice = Dice::new(self.plan.seed, 2);
        while self.net.now() < TROUBLE {
            for _ in 0..dice.within(1..6) {
                self.net.with(|state, now| state.model.publish("S", "x".into(), false, now));
                self.watch().count("message published");
            }
            sleep(dice.millis(100..2_000)).await;
        }
    }

    async fn run(self: &Arc<Self>) {
        for place in 0..self.plan.replicas {
            self.start(place);
        }
        let publishing = tokio::spawn(self.clone().publish());
        let mut clients = Vec::new();
        for number in 0..self.plan.clients as u64 {
            let dice = Dice::new(self.plan.seed, 100 + number);
            let client = Client { world: self.clone(), number, dice };
            clients.push(tokio::spawn(client.run()));
        }
        let mut accidents = Vec::new();
        for (at, what) in self.plan.accidents.clone() {
            sleep_until((self.net.began() + at).into()).await;
            accidents.push(tokio::spawn(self.clone().happen(what)));
        }
        sleep_until((self.net.began() + TROUBLE).into()).await;
        for accident in accidents {
            accident.await.unwrap();
        }
        publishing.await.unwrap();
        self.note(format_args!("calm"));
        self.calm.store(true, Ordering::Relaxed);
        self.wait_until_empty().await;
        self.over.store(true, Ordering::Relaxed);
        for client in clients {
            client.await.unwrap();
        }
        self.end_all().await;
    }

    /// Nothing is dark for longer than its bound.
    async fn wait_until_empty(&self) {
        let name = self.name();
        let until = self.net.now() + DARKEST;
        loop {
            let left = self.net.with(|state, _| state.model.unsettled(&name));
            if left.is_empty() {
                return self.watch().count("emptied");
            }
            let now = self.net.now();
            if now >= until {
                let why = format!("dark for {DARKEST:?} without an accident: {left:?}");
                return self.watch().failures.push(why);
            }
            sleep(Duration::from_millis(500)).await;
        }
    }

    /// Every lease and place is free in the end, and every task ends.
    async fn end_all(&self) {
        // No worker holds anything: what is leased to those that died ends with its lease.
        let ended = self.net.now() + LONGEST_LEASE + Duration::from_secs(5);
        let holds = |replica: &Arc<Replica>| {
            !replica.gone.load(Ordering::Relaxed) && replica.lessor.held() > 0
        };
        while self.net.now() < ended && self.replicas().iter().any(holds) {
            sleep(Duration::from_secs(1)).await;
        }
        for replica in self.replicas() {
            if replica.gone.load(Ordering::Relaxed) {
                continue;
            }
            let (held, side) = (replica.lessor.held(), replica.side);
            if held > 0 {
                let why = format!("replica {side} holds {held} leases that are nobody's");
                self.watch().failures.push(why);
            }
            let drained = replica.machine.run(replica.clone().drain()).await;
            if !(drained.calls_ended
                && drained.tasks_ended
                && (drained.settled || drained.handed_over))
            {
                self.watch().failures.push(format!("replica {side} does not end: {drained:?}"));
            }
            let room = replica.lessor.room() as usize;
            if room != replica.most {
                let why = format!("replica {side} has {room} places of {}", replica.most);
                self.watch().failures.push(why);
            }
        }
    }
}

/// Runs a plan from its beginning to its end. A panic on the way is a failure of the run.
pub fn run(plan: &Plan, keep_lines: bool) -> Outcome {
    let (outcome, panics) = panics::catch(|| live(plan, keep_lines));
    let mut outcome = outcome.unwrap_or_default();
    outcome.watch.failures.splice(0..0, panics);
    outcome
}

fn live(plan: &Plan, keep_lines: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let watch = Arc::new(Mutex::new(Watch::default()));
    let history = runtime.block_on(async {
        let net = Net::new(plan.seed, History::new(keep_lines));
        let watcher = Shared(watch.clone());
        let world = Arc::new(World {
            net: net.clone(),
            plan: plan.clone(),
            watch: watch.clone(),
            replicas: Mutex::default(),
            keys: Mutex::new(KEYS[0].to_owned()),
            config: Mutex::new(plan.config.clone()),
            calm: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        net.with(|state, _| {
            state.watcher = Some(Box::new(watcher));
            state.set_weather(Weather { delay: 1..4, reconnect: 50..1_000 });
            state.model.add_stream("S");
            state.model.add_consumer(&world.name(), plan.config.clone());
        });
        let drive = net.clone();
        let driver = tokio::spawn(async move { drive.drive().await });
        let ran = tokio::spawn({
            let world = world.clone();
            async move { world.run().await }
        });
        let why = match timeout(LONGEST, ran).await {
            Ok(Ok(())) => None,
            Ok(Err(panic)) => Some(format!("a task panicked: {panic}")),
            Err(_) => Some(format!("it does not end within {LONGEST:?}")),
        };
        world.watch().failures.extend(why);
        driver.abort();
        net.with(|state, _| std::mem::replace(&mut state.history, History::new(false)))
    });
    drop(runtime);
    let watch = std::mem::take(&mut *watch.lock().unwrap());
    Outcome { history, watch }
}

/// The shortest part of a plan that still fails, and what came of it: accidents are left out as long as
/// one can be.
pub fn shrink(plan: &Plan) -> (Plan, Outcome) {
    let (mut best, mut outcome) = (plan.clone(), run(plan, true));
    let mut place = 0;
    while place < best.accidents.len() {
        let mut less = best.clone();
        less.accidents.remove(place);
        let tried = run(&less, true);
        if tried.watch.failures.is_empty() { place += 1 } else { (best, outcome) = (less, tried) }
    }
    (best, outcome)
}
