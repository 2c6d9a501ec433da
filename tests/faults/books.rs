//! The books of a run: which message was handed to whom and when, and how each was settled.
//! Asserts the promises that hold under every fault; bounds are the tests' own.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::Mutex,
    time::{Duration, Instant},
};

use fetch_proxy::pb;

use crate::support::{eventually, jetstream::Fixture};

/// One row of the table that `--nocapture` gives.
pub fn measured(what: &str, value: impl Debug) {
    println!("measured: {what}: {value:?}");
}

/// Who was handed which message of one stream, in the order in which it happened.
#[derive(Default)]
pub struct Books(Mutex<BTreeMap<u64, Vec<Entry>>>);

/// One message in one worker's hands.
#[derive(Debug, Clone)]
pub struct Entry {
    pub worker: usize,
    pub delivery_count: u32,
    pub at: Instant,
    /// When JetStream confirmed its Ack to this worker.
    pub acked: Option<Instant>,
}

/// How a run of workers went.
#[derive(Debug)]
pub struct Account {
    /// Handed out again although no fault of their worker's.
    pub duplicates: usize,
    /// Confirmed to more than one worker.
    pub twice: usize,
    /// Longest time in which no message was handed to anybody.
    pub dark: Duration,
}

impl Books {
    pub fn handed(&self, worker: usize, message: &pb::Delivery) {
        let delivery_count = message.delivery_count;
        let entry = Entry { worker, delivery_count, at: Instant::now(), acked: None };
        self.0.lock().unwrap().entry(message.stream_sequence).or_default().push(entry);
    }

    pub fn acked(&self, worker: usize, message: &pb::Delivery) {
        let mut entries = self.0.lock().unwrap();
        let of_ours = |entry: &&mut Entry| {
            (entry.worker, entry.delivery_count) == (worker, message.delivery_count)
        };
        let entry = entries.get_mut(&message.stream_sequence).unwrap().iter_mut().rev();
        entry.into_iter().find(of_ours).unwrap().acked = Some(Instant::now());
    }

    /// How many messages have been confirmed to somebody.
    pub fn settled(&self) -> usize {
        let entries = self.0.lock().unwrap();
        entries.values().filter(|of| of.iter().any(|entry| entry.acked.is_some())).count()
    }

    /// Each of the messages up to `published` was handed out and confirmed to somebody, and
    /// JetStream says the same.
    pub async fn close(&self, fixture: &Fixture, published: u64) -> Account {
        all_settled(fixture).await;
        let entries = self.0.lock().unwrap();
        for sequence in 1..=published {
            let seen = entries.get(&sequence).unwrap_or_else(|| panic!("{sequence} was lost"));
            assert!(seen.iter().any(|entry| entry.acked.is_some()), "{sequence}: {seen:?}");
        }
        let times = |of: &Vec<Entry>| of.iter().filter(|entry| entry.acked.is_some()).count();
        let mut handed: Vec<Instant> = entries.values().flatten().map(|entry| entry.at).collect();
        handed.sort();
        Account {
            duplicates: entries.values().map(|of| of.len() - 1).sum(),
            twice: entries.values().filter(|of| times(of) > 1).count(),
            dark: handed.windows(2).map(|two| two[1] - two[0]).max().unwrap_or_default(),
        }
    }
}

/// Waits until JetStream has nothing left for this consumer, in nobody's hands and in nobody's.
pub async fn all_settled(fixture: &Fixture) {
    eventually("everything to be settled", || async {
        let info = fixture.try_info().await?;
        (info.num_pending == 0 && info.num_ack_pending == 0).then_some(())
    })
    .await;
}
