//! Workers that choose a replica at random for every call, and repeat a settlement with the same
//! token until its result is known.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use fetch_proxy::pb::{self, settlement::Action};
use testkit::{
    delivery_log::{DeliveryLog, HoldingId, Kind, Outcome, Terms},
    dice::Dice,
    jetstream::Fixture,
    millis,
    proxy::{fetch, timed},
};
use tokio::sync::watch;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{fleet::Fleet, verdict::Verdict};

pub const BATCH: u32 = 20;
/// No call takes longer, and no settlement is tried for longer than some of them.
const CALL: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(40);

/// Deliveries, and calls that were repeated.
pub struct Log {
    pub deliveries: DeliveryLog,
    /// The number of repeated calls, by reason.
    retried: Mutex<BTreeMap<String, usize>>,
}

impl Default for Log {
    fn default() -> Self {
        Self { deliveries: DeliveryLog::open(&[Terms::default()]), retried: Mutex::default() }
    }
}

impl Log {
    fn retried(&self, reason: &str) {
        *self.retried.lock().unwrap().entry(reason.to_owned()).or_default() += 1;
    }

    pub fn verdict(&self, published: usize) -> Verdict {
        let retried = self.retried.lock().unwrap().clone();
        Verdict::of(&self.deliveries.read(), published, retried)
    }
}

pub struct Worker {
    pub fleet: Arc<Fleet>,
    pub log: Arc<Log>,
    pub fixture: Arc<Fixture>,
    pub dice: Dice,
    /// Set when all messages are done.
    pub over: watch::Receiver<bool>,
    pub ack_wait: Duration,
    /// Some batches are worked on for so long, in milliseconds.
    pub long: std::ops::Range<u64>,
}

/// A delivery that a worker holds.
struct Held {
    token: String,
    id: HoldingId,
    kind: Kind,
}

impl Worker {
    pub async fn work(mut self) {
        while !*self.over.borrow() {
            let held = self.take().await;
            if held.is_empty() {
                continue;
            }
            if self.dice.percent(2) {
                let long = self.dice.millis(self.long.clone());
                self.extend(&held, long + CALL).await;
                tokio::time::sleep(long).await;
            } else {
                tokio::time::sleep(self.dice.millis(0..100)).await;
            }
            self.settle(held).await;
        }
    }

    async fn take(&mut self) -> Vec<Held> {
        let request = timed(fetch(&self.fixture, BATCH, 2000), CALL);
        match self.fleet.any(&mut self.dice).fetch(request).await {
            Ok(answer) => {
                let messages = answer.into_inner().messages;
                messages.into_iter().map(|message| self.held(message)).collect()
            }
            Err(status) => {
                self.again(&status).await;
                Vec::new()
            }
        }
    }

    fn held(&mut self, message: pb::Delivery) -> Held {
        let id = self.log.deliveries.handed(0, 0, None, &message);
        let kind = match self.dice.within(0..1000) {
            0..10 if message.delivery_count < 3 => Kind::Nak,
            10..12 => Kind::Term,
            _ => Kind::Ack,
        };
        Held { token: message.token, id, kind }
    }

    /// Repeats the Extend until it is done, or until the lease may be over. The messages are
    /// settled in either case.
    async fn extend(&mut self, held: &[Held], length: Duration) {
        let length = i64::try_from(length.as_millis()).unwrap();
        let settlements = held.iter().map(|held| pb::Settlement {
            token: held.token.clone(),
            action: Some(Action::Extend(pb::ExtendAction { lease: millis(length) })),
            ..pb::Settlement::default()
        });
        let settlements: Vec<_> = settlements.collect();
        let first = Instant::now();
        while first.elapsed() < self.ack_wait {
            let settlements = settlements.clone();
            let request = timed(pb::SettleRequest { settlements, ..Default::default() }, CALL);
            match self.fleet.any(&mut self.dice).settle(request).await {
                Ok(answer) if answer.get_ref().failed == 0 => return,
                Ok(_) => tokio::time::sleep(self.dice.millis(50..150)).await,
                Err(status) => self.again(&status).await,
            }
        }
    }

    async fn settle(&mut self, mut held: Vec<Held>) {
        let first = Instant::now();
        while !held.is_empty() && first.elapsed() < PATIENCE {
            let log = &self.log.deliveries;
            let begin = |held: &Held| log.tries(held.id, held.kind, false, Duration::ZERO);
            let tries: Vec<usize> = held.iter().map(begin).collect();
            let settlements = held.iter().map(settlement).collect();
            let request = timed(pb::SettleRequest { settlements, ..Default::default() }, CALL);
            let answer = self.fleet.any(&mut self.dice).settle(request).await;
            let outcomes: Vec<Outcome> = match &answer {
                Ok(answer) => answer.get_ref().results.iter().map(Outcome::of_result).collect(),
                Err(status) => vec![Outcome::of(Err(status)); held.len()],
            };
            for ((held, number), outcome) in held.iter().zip(tries).zip(&outcomes) {
                self.log.deliveries.answered(held.id, number, outcome.clone(), None);
            }
            if let Err(status) = &answer {
                self.again(status).await;
                continue;
            }
            let mut outcomes = outcomes.into_iter();
            held.retain(|_| match outcomes.next() {
                Some(Outcome::Refused(reason)) => {
                    let over = matches!(&*reason, "LEASE_EXPIRED" | "LEASE_SETTLED");
                    if !over {
                        self.log.retried(&reason);
                    }
                    !over
                }
                _ => false,
            });
            if !held.is_empty() {
                tokio::time::sleep(self.dice.millis(50..150)).await;
            }
        }
    }

    /// A call that failed as a whole is made again after a moment, at any replica.
    async fn again(&mut self, status: &Status) {
        // The codes that tonic's client gives for a lost connection. Internal means a call that was
        // not sent when the server announced its end.
        let transport = matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
        );
        match status.get_details_error_info() {
            Some(info) => self.log.retried(&info.reason),
            None if transport || status.code() == Code::DeadlineExceeded => {
                self.log.retried(&format!("{:?}", status.code()));
            }
            None => panic!("no reason in {status:?}"),
        }
        tokio::time::sleep(self.dice.millis(20..100)).await;
    }
}

fn settlement(held: &Held) -> pb::Settlement {
    let action = match held.kind {
        Kind::Ack => Action::Ack(pb::AckAction {}),
        Kind::Nak => Action::Nak(pb::NakAction { delay: None }),
        Kind::Term => Action::Term(pb::TermAction { reason: "a test".to_owned() }),
        Kind::Extend => unreachable!("an Extend settles nothing"),
    };
    let token = held.token.clone();
    pb::Settlement { token, action: Some(action), ..pb::Settlement::default() }
}
