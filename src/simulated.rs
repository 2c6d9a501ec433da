//! A simulated machine, which a test puts in the place of the real machine: clocks, random bytes and tasks.
//! With it, one seed gives one history.
//!
//! Outside tests no task runs on a simulated machine. Each function here then costs one look at a
//! thread-local value, and uses the operating system or tokio. A task runs on the machine of the task that
//! spawned it. Several replicas in one process therefore have clocks and random bytes of their own.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use tokio_util::task::TaskTracker;

use crate::lock::lock;

/// The right time of day at the start of a simulated world: 2026-01-01, since the Unix epoch. Any time after
/// 1970 by more than the longest lease would do.
pub const EPOCH: Duration = Duration::from_secs(1_767_225_600);

tokio::task_local! {
    static MACHINE: Arc<SimulatedMachine>;
}

/// The source of a machine's random bytes.
type RandomNumbers = Box<dyn FnMut() -> u64 + Send>;

/// The machine of one replica.
pub struct SimulatedMachine {
    /// The start of the simulated world, by the monotonic clock.
    started: Instant,
    /// Nanoseconds by which the wall clock is ahead of the right time.
    wall_offset: AtomicI64,
    /// Nanoseconds that the machine was suspended so far.
    suspended: AtomicI64,
    random: Mutex<RandomNumbers>,
    /// `None` while the machine runs. While it is stopped, the tasks that were due since.
    stopped: Mutex<Option<Vec<Waker>>>,
    /// How often tasks may still be polled.
    polls_left: AtomicU64,
}

impl SimulatedMachine {
    /// A machine with a right clock, in a world that began at `started`. Its random bytes come from `random`.
    pub fn new(started: Instant, random: impl FnMut() -> u64 + Send + 'static) -> Arc<Self> {
        Arc::new(Self {
            started,
            wall_offset: AtomicI64::new(0),
            suspended: AtomicI64::new(0),
            random: Mutex::new(Box::new(random)),
            stopped: Mutex::default(),
            polls_left: AtomicU64::new(u64::MAX),
        })
    }

    /// Sets the wall clock ahead of the right time by `nanos`, or behind it if `nanos` is negative.
    pub fn set_wall_offset(&self, nanos: i64) {
        self.wall_offset.store(nanos, Ordering::Relaxed);
    }

    /// Makes the clocks show that the machine was suspended for `time`. The monotonic clock does not.
    pub fn suspend(&self, time: Duration) {
        let nanos = i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
        self.suspended.fetch_add(nanos, Ordering::Relaxed);
    }

    /// Runs a future on this machine, and each task that the future spawns with `spawn`.
    pub fn run<F: Future>(self: &Arc<Self>, future: F) -> impl Future<Output = F::Output> + use<F> {
        OnMachine { machine: self.clone(), future: Some(Box::pin(future)) }
    }

    /// Runs a function on this machine.
    pub fn sync<R>(self: &Arc<Self>, act: impl FnOnce() -> R) -> R {
        MACHINE.sync_scope(self.clone(), act)
    }

    /// Stops all tasks of the machine where they are, until [`SimulatedMachine::resume`].
    pub fn stop(&self) {
        self.stopped().get_or_insert_default();
    }

    /// Lets the tasks continue.
    pub fn resume(&self) {
        let waiting = self.stopped().take();
        waiting.into_iter().flatten().for_each(Waker::wake);
    }

    /// Lets the tasks of the machine be polled so often from now on, all together. After that the machine stops. Returns
    /// whether it has run until now. So a task that runs without a pause is found: time that is paused never passes
    /// while such a task runs.
    pub fn allow_polls(&self, polls: u64) -> bool {
        self.polls_left.swap(polls, Ordering::Relaxed) > 0
    }

    /// Whether a task may run now. If not, [`SimulatedMachine::resume`] wakes the task.
    fn may_run(&self, cx: &Context<'_>) -> bool {
        let less = |left: u64| Some(left.saturating_sub(1));
        if self.polls_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) == Ok(0) {
            self.stop();
        }
        match &mut *self.stopped() {
            None => true,
            Some(waiting) => {
                waiting.push(cx.waker().clone());
                false
            }
        }
    }

    fn stopped(&self) -> MutexGuard<'_, Option<Vec<Waker>>> {
        lock(&self.stopped)
    }

    fn clocks(&self, now: Instant) -> SimulatedClocks {
        let wall_offset = self.wall_offset.load(Ordering::Relaxed);
        let boot_ahead = self.suspended.load(Ordering::Relaxed);
        let wall_ahead = wall_offset.saturating_add(boot_ahead);
        let right = EPOCH + now.saturating_duration_since(self.started);
        let difference = Duration::from_nanos(wall_ahead.unsigned_abs());
        let wall =
            if wall_ahead < 0 { right.saturating_sub(difference) } else { right + difference };
        SimulatedClocks { wall, wall_ahead, boot_ahead }
    }

    fn fill(&self, bytes: &mut [u8]) {
        let mut random = lock(&self.random);
        for piece in bytes.chunks_mut(8) {
            piece.copy_from_slice(&random().to_le_bytes()[..piece.len()]);
        }
    }
}

/// The clocks of a simulated machine at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SimulatedClocks {
    /// The wall clock: the time since the Unix epoch.
    pub(crate) wall: Duration,
    /// Nanoseconds by which the wall clock is ahead of the monotonic clock.
    pub(crate) wall_ahead: i64,
    /// Nanoseconds by which the clock that counts suspension is ahead of the monotonic clock.
    pub(crate) boot_ahead: i64,
}

/// The clocks of the simulated machine that the present task runs on. `None`: it runs on a real machine.
pub(crate) fn clocks(now: Instant) -> Option<SimulatedClocks> {
    MACHINE.try_with(|machine| machine.clocks(now)).ok()
}

/// Fills `bytes` with random bytes, from the operating system or from the simulated machine.
///
/// # Errors
/// The operating system has no randomness.
pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<(), getrandom::Error> {
    match MACHINE.try_with(|machine| machine.fill(bytes)) {
        Ok(()) => Ok(()),
        Err(_) => getrandom::fill(bytes),
    }
}

/// Spawns a task on the machine that the present task runs on.
pub(crate) fn spawn<F>(tasks: &TaskTracker, future: F)
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    match MACHINE.try_with(Arc::clone) {
        Ok(machine) => drop(tasks.spawn(machine.run(future))),
        Err(_) => drop(tasks.spawn(future)),
    }
}

/// A future on a simulated machine.
struct OnMachine<F: Future> {
    machine: Arc<SimulatedMachine>,
    /// `None` after the drop.
    future: Option<Pin<Box<F>>>,
}

impl<F: Future> Future for OnMachine<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let Self { machine, future } = &mut *self;
        let Some(future) = future.as_mut().filter(|_| machine.may_run(cx)) else {
            return Poll::Pending;
        };
        MACHINE.sync_scope(machine.clone(), || future.as_mut().poll(cx))
    }
}

impl<F: Future> Drop for OnMachine<F> {
    /// A value that is dropped with the future may spawn a task, on the same machine.
    fn drop(&mut self) {
        let future = self.future.take();
        MACHINE.sync_scope(self.machine.clone(), || drop(future));
    }
}
