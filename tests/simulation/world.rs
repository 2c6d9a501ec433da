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

use super::{
    jetstream::{Config, Time},
    net::Net,
    plan::Plan,
    replica::Replica,
    roads::Roads,
    signs::{Sign, Signs},
    watch::{Event, Watch},
};

/// The keys that a cluster may have: 32 bytes each.
pub const KEYS: [&str; 3] = [
    "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=",
    "ISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+P0A=",
    "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVpbXF1eX2A=",
];

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
        self.calm.store(true, Ordering::Relaxed);
    }

    pub fn over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Longest way between a client and a replica, to and fro.
    pub fn longest_way(&self) -> Duration {
        Duration::from_millis(10)
    }

    pub fn note(&self, what: fmt::Arguments<'_>) {
        self.net.with(|state, now| state.history.add(now, what));
    }

    pub fn count(&self, what: impl Into<String>) {
        self.watch().count(what);
    }

    pub fn event(&self, event: Event, lasts: Duration) {
        let until = self.net.now() + lasts;
        self.watch().event(event, until);
    }

    pub fn sign(&self, sign: Sign, place: Option<usize>) {
        self.signs.give(sign, (self.net.now(), place));
    }

    pub fn at(&self, time: Time) -> tokio::time::Instant {
        (self.net.began() + time).into()
    }

    /// Starts a replica at a place, instead of the one that is there.
    pub fn start(&self, place: usize) {
        let count = self.net.with(|state, _| state.sides());
        let seed = self.plan.seed.wrapping_mul(1_000_003).wrapping_add(count as u64);
        let machine = SimulatedMachine::new(seed, self.net.began());
        machine.set_wall_offset(self.ahead.lock().unwrap()[place] * 1_000_000);
        let us = InstanceId(seed.to_le_bytes());
        let keys = self.keys.lock().unwrap().0.clone();
        let most = self.plan.replicas[place].max_leases;
        let replica = Replica::start(&self.net, machine, place, us, keys, most);
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
        self.replica(place).machine.set_wall_offset(ahead * 1_000_000);
    }

    /// Puts the next key before the present one. Returns the key file before and after, and how it is
    /// once the old key is taken away.
    pub fn next_key(&self) -> String {
        let mut keys = self.keys.lock().unwrap();
        let (old, new) = (KEYS[keys.1], KEYS[(keys.1 + 1) % KEYS.len()]);
        *keys = (format!("{new}\n{old}"), (keys.1 + 1) % KEYS.len());
        keys.0.clone()
    }

    /// Takes all keys away but the first.
    pub fn only_key(&self) -> String {
        let mut keys = self.keys.lock().unwrap();
        keys.0 = KEYS[keys.1].to_owned();
        keys.0.clone()
    }

    /// Makes a consumer, as it is configured now.
    pub fn make(&self, consumer: usize) {
        let (name, config) = (self.name(consumer), self.configs.lock().unwrap()[consumer].clone());
        let lag = Duration::from_millis(self.plan.consumers[consumer].lag);
        self.net.with(|state, _| {
            state.model.add_consumer(&name, config);
            state.model.lag(&name, lag);
        });
    }

    /// Changes the configuration of a consumer live.
    pub fn update(&self, consumer: usize, change: impl Fn(&mut Config)) {
        let name = self.name(consumer);
        change(&mut self.configs.lock().unwrap()[consumer]);
        self.net.with(|state, now| state.model.update(&name, &change, now));
    }
}
