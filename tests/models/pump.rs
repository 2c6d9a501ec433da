//! The promises of the pump: one example each in `pulling`, `answering` and `flowing`; `machine` tries them all
//! at random, and `honest` with a broker that keeps JetStream's rules.

mod answering;
mod flowing;
mod honest;
mod machine;
mod pulling;
mod reference;

use std::time::{Duration, Instant};

use fetch_proxy::pump::{
    Allowance, Credit, FlowId, PullLimits, PullOutcome, Pump, Step, WaiterId, Want, Why,
};

use Step::{Answer, Deliver, Over, Overdue, Pull};

/// An answer's bytes, and a message of which many fit.
const BYTES: u64 = 4 << 20;
const SMALL: u64 = 1_000;

/// A pump that is up, and its time in milliseconds.
struct TimedPump {
    pump: Pump<u32>,
    start: Instant,
    ms: u64,
    allowed: Allowance,
}

impl TimedPump {
    fn new() -> Self {
        let start = Instant::now();
        let mut pump = Pump::new(limits());
        pump.up(start);
        Self { pump, start, ms: 0, allowed: allow(10_000) }
    }

    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.ms)
    }

    fn want(&self, n: u32, wait: u64) -> Want {
        let until = self.now() + Duration::from_millis(wait);
        Want { n, max_bytes: BYTES, until, linger: Duration::ZERO, no_wait: false }
    }

    fn join(&mut self, n: u32, wait: u64) -> WaiterId {
        self.join_with(self.want(n, wait))
    }

    fn join_with(&mut self, want: Want) -> WaiterId {
        self.pump.join(want, self.now())
    }

    fn join_impatient(&mut self, n: u32) -> WaiterId {
        self.join_with(Want { no_wait: true, ..self.want(n, 0) })
    }

    fn join_lingering(&mut self, n: u32, wait: u64, linger: u64) -> WaiterId {
        let linger = Duration::from_millis(linger);
        self.join_with(Want { linger, ..self.want(n, wait) })
    }

    fn arrive(&mut self, messages: impl IntoIterator<Item = u32>) {
        for message in messages {
            self.arrive_sized(message, SMALL);
        }
    }

    fn arrive_sized(&mut self, message: u32, size: u64) {
        self.pump.arrived(message, size, false, self.now());
    }

    fn end(&mut self, no: u64, end: PullOutcome) {
        self.pump.ended(no, end, self.now());
    }

    fn steps(&mut self) -> Vec<Step<u32>> {
        let now = self.now();
        let steps = std::iter::from_fn(|| self.pump.step(now, self.allowed)).take(1000).collect();
        assert!(self.pump.next_deadline(now).is_none_or(|next| next > now), "it would spin");
        steps
    }

    /// Runs the pump at that time and not before, as often as the pump asks for it.
    fn steps_at(&mut self, ms: u64) -> Vec<Step<u32>> {
        let end = self.start + Duration::from_millis(ms);
        while let Some(next) = self.pump.next_deadline(self.now()).filter(|next| *next < end) {
            self.ms = u64::try_from((next - self.start).as_millis()).expect("it is near");
            assert_eq!(self.steps(), [], "at {} ms", self.ms);
        }
        self.ms = ms;
        self.steps()
    }

    /// The pull that is the only thing to do, as number, batch and milliseconds.
    fn pull(&mut self) -> (u64, u32, u128) {
        let steps = self.steps();
        let [Pull { no, batch, expires, .. }] = steps[..] else { panic!("{steps:?}") };
        (no, batch, expires.as_millis())
    }

    /// Waiters that are answered now, each with its messages.
    fn answers(&mut self) -> Vec<(WaiterId, Vec<u32>)> {
        let answer = |step| match step {
            Answer { waiter, messages, .. } => Some((waiter, messages)),
            Pull { .. } | Overdue { .. } | Deliver { .. } | Over { .. } => None,
        };
        self.steps().into_iter().filter_map(answer).collect()
    }
}

fn limits() -> PullLimits {
    PullLimits {
        max_batch: 1000,
        max_unsettled: u32::MAX,
        max_expires: Duration::from_secs(60),
        max_request_bytes: None,
        park: Duration::from_secs(1),
        linger: Duration::from_secs(5),
    }
}

/// So many messages, of any size, for any time.
fn allow(messages: u32) -> Allowance {
    Allowance { messages, bytes: u64::MAX, wait: Duration::MAX }
}

fn answer(waiter: WaiterId, messages: impl Into<Vec<u32>>, why: Why) -> Step<u32> {
    Answer { waiter, messages: messages.into(), too_large: None, why }
}
