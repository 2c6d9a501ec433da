//! The world of one run: its cluster, its network, and those who watch. Knows no accident and no client.

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

use super::{
    jetstream::{Config, Time},
    net::Net,
    plan::Plan,
    policies::{self, Denials},
    replica::Replica,
    roads::Roads,
    signs::{Sign, Signs},
    watch::{Trouble, Watch},
};

/// In milliseconds: "It may be at most 250 ms ahead of the clock of the proxy."
const NATS_AHEAD: i64 = 250;

/// The keys that a cluster may have: 32 bytes each.
pub const KEYS: [&str; 3] = [
    "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=",
    "ISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+P0A=",
    "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVpbXF1eX2A=",
];

/// A wire is there again after so long, at most.
pub const RECONNECT: Duration = Duration::from_millis(1_100);
/// A partition is noticed by both ends, and the wire is there again, this long after its end at most.
pub const NOTICED: Duration = Duration::from_secs(12);
/// Longer than any run.
pub const FOR_EVER: Duration = Duration::from_secs(100_000);

pub struct World {
    pub net: Net,
    pub plan: Plan,
    pub signs: Signs,
    pub roads: Roads,
    watch: Arc<Mutex<Watch>>,
    replicas: Mutex<Vec<Arc<Replica>>>,
    /// The lines of the key file, and which of [`KEYS`] is the first.
    keys: Mutex<(String, usize)>,
    /// How each consumer is configured now.
    configs: Mutex<Vec<Config>>,
    /// How far the clock of each replica's machine is ahead.
    ahead: Mutex<Vec<i64>>,
    /// Until when an outage of servers keeps replicas from them, also those that start meanwhile.
    outage_until: Mutex<Time>,
    /// The consumers at which the policy gives no right now.
    pub denials: Mutex<Denials>,
    calm: AtomicBool,
    over: AtomicBool,
}

impl World {
    pub fn new(net: Net, plan: Plan, watch: Arc<Mutex<Watch>>) -> Self {
        let configs = plan.consumers.iter().map(super::plan::ConsumerPlan::config).collect();
        let ahead = plan.replicas.iter().map(|replica| replica.ahead).collect();
        Self {
            net,
            plan,
            signs: Signs::default(),
            roads: Roads::default(),
            watch,
            replicas: Mutex::default(),
            keys: Mutex::new((KEYS[0].to_owned(), 0)),
            configs: Mutex::new(configs),
            ahead: Mutex::new(ahead),
            outage_until: Mutex::default(),
            denials: Mutex::default(),
            calm: AtomicBool::new(false),
            over: AtomicBool::new(false),
        }
    }

    pub fn stream(&self, stream: usize) -> String {
        format!("S{stream}")
    }

    pub fn name(&self, consumer: usize) -> ConsumerName {
        let stream = self.stream(self.plan.consumers[consumer].stream);
        ConsumerName { stream: stream.into(), consumer: format!("c{consumer}").into() }
    }

    pub fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap()
    }

    pub fn shared_watch(&self) -> Arc<Mutex<Watch>> {
        self.watch.clone()
    }

    pub fn replicas(&self) -> Vec<Arc<Replica>> {
        self.replicas.lock().unwrap().clone()
    }

    pub fn replica(&self, place: usize) -> Arc<Replica> {
        self.replicas.lock().unwrap()[place].clone()
    }

    /// Accidents are over: clients do nothing but their work.
    pub fn calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    pub fn calm_down(&self) {
        self.note(format_args!("calm"));
        for consumer in 0..self.plan.consumers.len() {
            let name = self.name(consumer);
            self.net.with(|state, _| state.model.lag(&name, Duration::from_millis(1)));
        }
        self.calm.store(true, Ordering::Relaxed);
    }

    pub fn over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub fn note(&self, what: fmt::Arguments<'_>) {
        self.net.with(|state, now| state.history.add(now, what));
    }

    pub fn count(&self, what: impl Into<String>) {
        self.watch().count(what);
    }

    /// An accident begins that concerns all consumers.
    pub fn trouble(&self, trouble: Trouble, lasts: Duration) {
        let now = self.net.now();
        self.watch().trouble(trouble, None, now, now + lasts);
    }

    /// An accident is over.
    pub fn accident_over(&self, trouble: Trouble) {
        let now = self.net.now();
        self.watch().over(trouble, now);
    }

    /// An outage of servers begins. It can concern every wire of every replica.
    pub fn outage(&self, lasts: Duration) {
        for replica in self.replicas() {
            self.trouble(Trouble::Wire { side: replica.side }, lasts);
        }
        let mut until = self.outage_until.lock().unwrap();
        *until = (*until).max(self.net.now() + lasts);
    }

    /// An accident begins that concerns one consumer.
    pub fn trouble_of(&self, name: &ConsumerName, trouble: Trouble, lasts: Duration) {
        let now = self.net.now();
        self.watch().trouble(trouble, Some(name), now, now + lasts);
    }

    pub fn sign(&self, sign: Sign, place: Option<usize>) {
        self.signs.give(sign, (self.net.now(), place));
    }

    pub fn at(&self, time: Time) -> tokio::time::Instant {
        self.net.instant(time).into()
    }

    /// Starts a replica at a place, instead of the one that is there.
    pub fn start(&self, place: usize) {
        let count = self.net.with(|state, _| state.sides());
        let seed = self.plan.seed.wrapping_mul(1_000_003).wrapping_add(count as u64);
        let mut random = Dice::new(seed, 0);
        let machine =
            SimulatedMachine::new(self.net.instant(self.net.skipped()), move || random.number());
        machine.suspend(self.net.skipped());
        machine.set_wall_offset(self.ahead.lock().unwrap()[place] * 1_000_000);
        let us = InstanceId(seed.to_le_bytes());
        let keys = self.keys.lock().unwrap().0.clone();
        let most = self.plan.replicas[place].max_leases;
        let replica = Replica::start(&self.net, machine, place, us, keys, most);
        policies::read(self, &replica);
        let side = replica.side;
        let outage = self.outage_until.lock().unwrap().saturating_sub(self.net.now());
        self.trouble(Trouble::Wire { side }, outage.max(RECONNECT));
        if self.ahead.lock().unwrap().iter().any(|ahead| *ahead != 0) {
            self.trouble(Trouble::ClockOff { side }, FOR_EVER);
        }
        self.note_clock(side, place);
        let mut replicas = self.replicas.lock().unwrap();
        if place < replicas.len() { replicas[place] = replica } else { replicas.push(replica) }
    }

    /// Starts a replica again, unless somebody has.
    pub fn start_again(&self, gone: &Arc<Replica>) {
        if Arc::ptr_eq(&self.replica(gone.place), gone) {
            self.start(gone.place);
        }
    }

    pub fn set_clock(&self, place: usize, ahead: i64) {
        self.ahead.lock().unwrap()[place] = ahead;
        let replica = self.replica(place);
        self.trouble(Trouble::ClockOff { side: replica.side }, FOR_EVER);
        self.note_clock(replica.side, place);
        replica.machine.set_wall_offset(ahead * 1_000_000);
    }

    fn note_clock(&self, side: usize, place: usize) {
        let ahead = self.ahead.lock().unwrap()[place];
        self.watch().clock_set(side, ahead);
        if ahead < -NATS_AHEAD {
            self.trouble(Trouble::ClockBehind { side }, FOR_EVER);
        }
    }

    /// Puts the next key before the present one. Returns the key file.
    pub fn next_key(&self) -> String {
        let mut keys = self.keys.lock().unwrap();
        if keys.0.contains('\n') {
            // A rotation is under way: the oldest key leaves the file.
            self.trouble(Trouble::KeyRemoved, FOR_EVER);
        }
        let (old, new) = (KEYS[keys.1], KEYS[(keys.1 + 1) % KEYS.len()]);
        *keys = (format!("{new}\n{old}"), (keys.1 + 1) % KEYS.len());
        keys.0.clone()
    }

    /// Takes all keys away but the first.
    pub fn only_key(&self) -> String {
        self.trouble(Trouble::KeyRemoved, FOR_EVER);
        let mut keys = self.keys.lock().unwrap();
        keys.0 = KEYS[keys.1].to_owned();
        keys.0.clone()
    }

    /// A delivery leaves its leader so much later, when the others have it.
    pub fn lag(&self, consumer: usize) -> Duration {
        Duration::from_millis(self.plan.consumers[consumer].lag)
    }

    /// Makes a consumer, as it is configured now.
    pub fn make(&self, consumer: usize) {
        let (name, config) = (self.name(consumer), self.configs.lock().unwrap()[consumer].clone());
        let lag = self.lag(consumer);
        self.watch().configured(&name, &config, self.net.now());
        self.watch().lags(&name, lag);
        self.net.with(|state, _| {
            state.model.add_consumer(&name, config);
            state.model.lag(&name, lag);
        });
    }

    /// Changes the configuration of a consumer live.
    pub fn update(&self, consumer: usize, change: impl Fn(&mut Config)) {
        let name = self.name(consumer);
        let mut configs = self.configs.lock().unwrap();
        change(&mut configs[consumer]);
        self.watch().configured(&name, &configs[consumer], self.net.now());
        self.net.with(|state, now| state.model.update(&name, &change, now));
    }
}
