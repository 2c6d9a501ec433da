//! A stream: its messages and its consumers.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;

use super::{consumer::Consumer, types::Time};

/// A stored message.
#[derive(Debug, Clone)]
pub struct Message {
    pub subject: String,
    pub payload: Bytes,
    /// The time of its publication by the clock of the servers, since the Unix epoch.
    pub stored: Duration,
    /// It breaks every connection that brings it.
    pub poison: bool,
}

/// The messages of a stream by their sequences.
#[derive(Debug, Default)]
pub struct Messages {
    stored: BTreeMap<u64, Message>,
    last: u64,
}

impl Messages {
    /// Stores a message, and returns its sequence.
    pub fn push(&mut self, message: Message) -> u64 {
        self.last += 1;
        self.stored.insert(self.last, message);
        self.last
    }

    pub fn remove(&mut self, sequence: u64) {
        self.stored.remove(&sequence);
    }

    /// Removes the messages before this sequence, and returns their sequences.
    pub fn purge(&mut self, first: u64) -> Vec<u64> {
        let rest = self.stored.split_off(&first);
        std::mem::replace(&mut self.stored, rest).into_keys().collect()
    }

    /// The first message, if it was stored at this time or before.
    pub fn stored_by(&self, time: Duration) -> Option<u64> {
        let (sequence, message) = self.stored.first_key_value()?;
        (message.stored <= time).then_some(*sequence)
    }

    /// The time at which the first message was stored.
    pub fn oldest(&self) -> Option<Duration> {
        self.stored.first_key_value().map(|(_, message)| message.stored)
    }

    pub fn get(&self, sequence: u64) -> Option<&Message> {
        self.stored.get(&sequence)
    }

    /// The sequence of the first message, or of the next one if there is none.
    pub fn first(&self) -> u64 {
        self.stored.keys().next().copied().unwrap_or(self.last + 1)
    }

    /// The sequence of the newest message that there ever was.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// The messages with this subject from this sequence on. No filter: with all subjects.
    pub fn from(&self, sequence: u64, filter: Option<&str>) -> impl Iterator<Item = u64> {
        let found = self.stored.range(sequence..);
        let found = found.filter(move |(_, one)| filter.is_none_or(|only| one.subject == only));
        found.map(|(sequence, _)| *sequence)
    }
}

#[derive(Default)]
pub struct Stream {
    pub messages: Messages,
    /// Messages of this age leave the stream.
    pub max_age: Option<Duration>,
    pub consumers: BTreeMap<Arc<str>, Consumer>,
}

impl Stream {
    pub fn remove(&mut self, sequence: u64, now: Time) {
        self.messages.remove(sequence);
        for consumer in self.consumers.values_mut() {
            consumer.settle(sequence, now);
        }
    }

    /// Removes messages that are too old. `clock` is the time of day at the servers.
    pub fn age(&mut self, clock: Duration, now: Time) {
        let Some(oldest) = self.max_age.and_then(|age| clock.checked_sub(age)) else { return };
        while let Some(sequence) = self.messages.stored_by(oldest) {
            self.remove(sequence, now);
        }
    }

    /// The time of day at the servers when the next message is too old.
    pub fn next_aged(&self) -> Option<Duration> {
        Some(self.messages.oldest()? + self.max_age?)
    }
}
