//! The handle on the network, and the task that drives it.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
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
    /// Milliseconds that passed in the world while the machine of the replicas was suspended.
    skipped: AtomicU64,
}

impl Net {
    /// A network with this number of servers, and routes between all of them.
    pub fn new(seed: u64, history: History, servers: usize) -> Self {
        let state = Mutex::new(State::new(seed, history, servers));
        let (woken, began, skipped) = (Notify::new(), clock::now(), AtomicU64::new(0));
        Self(Arc::new(Shared { state, woken, began, skipped }))
    }

    /// The monotonic time at a time of the world.
    pub fn instant(&self, at: Time) -> Instant {
        self.0.began + at.saturating_sub(self.skipped())
    }

    /// The time for which the machine of the replicas was suspended so far.
    pub fn skipped(&self) -> Duration {
        Duration::from_millis(self.0.skipped.load(Ordering::Relaxed))
    }

    /// Time passes for the servers, and not for the monotonic clock: everything that is due happens now.
    pub fn skip(&self, millis: u64) {
        self.0.skipped.fetch_add(millis, Ordering::Relaxed);
        let now = self.now();
        self.lock().carry(now);
        self.0.woken.notify_one();
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
            let at = next.map(|at| self.instant(at.max(now)));
            tokio::select! {
                biased;
                () = self.0.woken.notified() => {}
                () = clock::sleep_until(at) => {}
            }
        }
    }

    /// The time of the world at a monotonic time, as far as it is known now.
    pub fn at(&self, when: Instant) -> Time {
        when.saturating_duration_since(self.0.began) + self.skipped()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }
}
