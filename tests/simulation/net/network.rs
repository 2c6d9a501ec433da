//! The handle on the network, and the task that drives it.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Instant,
};

use fetch_proxy::clock;
use tokio::sync::Notify;

use super::{
    super::{history::History, jetstream::Time},
    accidents::Accidents,
    state::State,
};

#[derive(Clone)]
pub struct Net(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    woken: Notify,
    began: Instant,
}

impl Net {
    /// A network with this number of servers, and routes between all of them.
    pub fn new(seed: u64, history: History, servers: usize) -> Self {
        let state = Mutex::new(State::new(seed, history, servers));
        Self(Arc::new(Shared { state, woken: Notify::new(), began: clock::now() }))
    }

    pub fn began(&self) -> Instant {
        self.0.began
    }

    pub fn now(&self) -> Time {
        self.at(clock::now())
    }

    /// Does one thing to the network or the servers. Its effects happen at once.
    pub fn with<R>(&self, act: impl FnOnce(&mut State, Time) -> R) -> R {
        let now = self.now();
        let mut state = self.lock();
        state.begin(now);
        let result = act(&mut state, now);
        state.settle_down(now);
        drop(state);
        self.0.woken.notify_one();
        result
    }

    /// Makes an accident happen.
    pub fn accident<R>(&self, act: impl FnOnce(&mut Accidents<'_>) -> R) -> R {
        self.with(|state, now| act(&mut Accidents { state, now }))
    }

    /// Carries everything, for as long as it is polled.
    pub async fn drive(&self) {
        loop {
            let now = self.now();
            let next = {
                let mut state = self.lock();
                state.carry(now);
                state.next_due()
            };
            let at = next.map(|at| self.0.began + at.max(now));
            tokio::select! {
                biased;
                () = self.0.woken.notified() => {}
                () = clock::sleep_until(at) => {}
            }
        }
    }

    pub(super) fn at(&self, when: Instant) -> Time {
        when.saturating_duration_since(self.0.began)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }
}
