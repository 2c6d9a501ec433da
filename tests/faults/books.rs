//! The books of a run: which message was handed to whom and when, and how each was settled.
//! Asserts the promises that hold under every fault; bounds are the tests' own.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::Mutex,
    time::{Duration, Instant},
};

use fetch_proxy::pb;
use testkit::{eventually, jetstream::Fixture};

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
    /// What its Ack came to, and when that was told last.
    pub ack: Ack,
    pub told: Instant,
}

/// What is known of one Ack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    /// Not tried, or it was refused.
    Open,
    /// It may have been applied.
    Unsure,
    /// JetStream confirmed it.
    Confirmed,
}

/// How a run of workers went.
#[derive(Debug)]
pub struct Account {
    /// Handed out again although no fault of their worker's.
    pub duplicates: usize,
    /// Confirmed to more than one worker: when that was told, but the last time of each.
    pub twice: Vec<Instant>,
    /// Longest time in which no message was handed to anybody.
    pub dark: Duration,
}

impl Books {
    pub fn handed(&self, worker: usize, message: &pb::Delivery) {
        let delivery_count = message.delivery_count;
        let now = Instant::now();
        let entry = Entry { worker, delivery_count, at: now, ack: Ack::Open, told: now };
        self.0.lock().unwrap().entry(message.stream_sequence).or_default().push(entry);
    }

    pub fn acked(&self, worker: usize, message: &pb::Delivery, ack: Ack) {
        let mut entries = self.0.lock().unwrap();
        let of_ours = |entry: &&mut Entry| {
            (entry.worker, entry.delivery_count) == (worker, message.delivery_count)
        };
        let entries = entries.get_mut(&message.stream_sequence).unwrap();
        let entry = entries.iter_mut().rev().find(of_ours).unwrap();
        (entry.ack, entry.told) = (ack, Instant::now());
    }

    /// How many messages have been confirmed to somebody.
    pub fn confirmed(&self) -> usize {
        let entries = self.0.lock().unwrap();
        let confirmed = |of: &&Vec<Entry>| of.iter().any(|entry| entry.ack == Ack::Confirmed);
        entries.values().filter(confirmed).count()
    }

    /// Each of the messages up to `published` was handed out and acked by somebody, and JetStream
    /// says the same.
    pub async fn close(&self, fixture: &Fixture, published: u64) -> Account {
        all_settled(fixture).await;
        let entries = self.0.lock().unwrap();
        for sequence in 1..=published {
            let seen = entries.get(&sequence).unwrap_or_else(|| panic!("{sequence} was lost"));
            assert!(seen.iter().any(|entry| entry.ack != Ack::Open), "{sequence}: {seen:?}");
        }
        let undone = |of: &Vec<Entry>| {
            let confirmed = of.iter().filter(|entry| entry.ack == Ack::Confirmed);
            let mut told: Vec<Instant> = confirmed.map(|entry| entry.told).collect();
            told.sort();
            told.pop();
            told
        };
        let mut handed: Vec<Instant> = entries.values().flatten().map(|entry| entry.at).collect();
        handed.sort();
        Account {
            duplicates: entries.values().map(|of| of.len() - 1).sum(),
            twice: entries.values().flat_map(undone).collect(),
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
