//! The fault tests' view of the delivery log. Each message was delivered to a worker and acked. The
//! view counts repeated deliveries, and the longest time without any delivery. It asserts the
//! promises that hold under every fault. Bounds are the tests' own.

use std::{
    fmt::Debug,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use fetch_proxy::pb;
use testkit::{
    delivery_log::{At, DeliveryLog, Holding, HoldingId, Kind, Outcome, Terms, Try},
    eventually,
    jetstream::Fixture,
    proxy::{Client, ack, timed},
};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

/// Prints one row of the table that `--nocapture` shows.
pub fn measured(what: &str, value: impl Debug) {
    println!("measured: {what}: {value:?}");
}

/// A run of workers on one consumer.
pub struct Run {
    log: DeliveryLog,
    /// Calls that ended with their own deadline, and not with an answer.
    cut_off: AtomicUsize,
    /// The deadline of each call.
    deadline: Duration,
}

/// The summary of a run.
#[derive(Debug)]
pub struct Summary {
    /// Deliveries beyond the first of each message.
    pub duplicates: usize,
    /// Acks that were confirmed for one message before the last one: the time of each answer.
    pub twice: Vec<At>,
    /// Longest time in which no worker received a message.
    pub dark: Duration,
    /// Calls that ended with their own deadline.
    pub cut_off: usize,
}

impl Run {
    pub fn new(deadline: Duration) -> Self {
        let (log, cut_off) = (DeliveryLog::open(&[Terms::default()]), AtomicUsize::new(0));
        Self { log, cut_off, deadline }
    }

    /// The message with the deadline of this run's calls.
    pub fn timed<T>(&self, message: T) -> Request<T> {
        timed(message, self.deadline)
    }

    /// The outcome of a call that failed.
    pub fn refused(&self, status: &Status) -> Outcome {
        let outcome = refused(status);
        self.cut_off.fetch_add(usize::from(outcome == Outcome::Unknown), Ordering::Relaxed);
        outcome
    }

    pub fn handed(&self, worker: usize, message: &pb::Delivery) -> HoldingId {
        self.log.handed(0, worker, None, message)
    }

    /// Acks a message, and repeats the Ack for as long as that may help.
    pub async fn ack(&self, holding: HoldingId, client: &mut Client, message: &pb::Delivery) {
        loop {
            let number = self.log.tries(holding, Kind::Ack, false, Duration::ZERO);
            let outcome = match client.ack(self.timed(ack(&message.token))).await {
                Ok(answer) => Outcome::of(Ok(answer.get_ref().outcome())),
                Err(status) => self.refused(&status),
            };
            self.log.answered(holding, number, outcome.clone(), None);
            match outcome {
                Outcome::Confirmed | Outcome::Duplicate => return,
                Outcome::Refused(reason) => match &*reason {
                    "NATS_UNAVAILABLE" | "SETTLE_UNCONFIRMED" => {}
                    "LEASE_EXPIRED" => return,
                    other => panic!("{other}"),
                },
                Outcome::Unknown => {}
                other => panic!("{other:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How many messages have been confirmed to a worker.
    pub fn confirmed(&self) -> usize {
        let records = self.log.read();
        let messages = records.consumers[0].messages.values();
        messages.filter(|held| held.iter().any(|holding| confirmed(holding).is_some())).count()
    }

    /// Each of the messages up to `published` was handed to a worker and acked, by the log and by
    /// JetStream.
    pub async fn close(&self, fixture: &Fixture, published: u64) -> Summary {
        all_settled(fixture).await;
        let records = self.log.read();
        let messages = &records.consumers[0].messages;
        for sequence in 1..=published {
            let held = messages.get(&sequence).unwrap_or_else(|| panic!("{sequence} was lost"));
            let acks = || held.iter().flat_map(|holding| &holding.tries);
            assert!(acks().any(|ack| !ack.outcome.not_applied()), "{sequence}: {held:?}");
        }
        let undone = |held: &Vec<Holding>| {
            let mut told: Vec<At> = held.iter().filter_map(confirmed).collect();
            told.sort_unstable();
            told.pop();
            told
        };
        let mut handed: Vec<At> = messages.values().flatten().map(|held| held.handed).collect();
        handed.sort_unstable();
        let dark = handed.windows(2).map(|two| two[1] - two[0]).max().unwrap_or(0);
        Summary {
            duplicates: messages.values().map(|held| held.len() - 1).sum(),
            twice: messages.values().flat_map(undone).collect(),
            dark: Duration::from_micros(dark.unsigned_abs()),
            cut_off: self.cut_off.load(Ordering::Relaxed),
        }
    }
}

/// The outcome of a call that failed: a reason, or the caller's own deadline. A reason that asks for
/// a repeat says when.
pub fn refused(status: &Status) -> Outcome {
    let outcome = Outcome::of(Err(status));
    if outcome == Outcome::Unknown {
        assert_eq!(status.code(), Code::Cancelled, "{status:?}");
    } else if status.code() == Code::Unavailable {
        assert!(status.get_details_retry_info().is_some(), "{status:?}");
    }
    outcome
}

/// The time of the answer that confirmed the Ack.
fn confirmed(holding: &Holding) -> Option<At> {
    let confirmed = |ack: &&Try| matches!(ack.outcome, Outcome::Confirmed | Outcome::Duplicate);
    holding.tries.iter().find(confirmed)?.answered
}

/// Waits until JetStream has neither pending nor unsettled messages for this consumer.
pub async fn all_settled(fixture: &Fixture) {
    eventually("everything to be settled", || async {
        let info = fixture.try_info().await?;
        (info.num_pending == 0 && info.num_ack_pending == 0).then_some(())
    })
    .await;
}
