//! A stream: its messages and its consumers.

use std::{
    collections::{BTreeMap, btree_map},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

use super::consumer::Consumer;

/// A stored message.
#[derive(Debug, Clone)]
pub struct Message {
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

    pub fn get(&self, sequence: u64) -> Option<&Message> {
        self.stored.get(&sequence)
    }

    /// The sequence of the first message, or of the next one if there is none.
    pub fn first(&self) -> u64 {
        self.stored.keys().next().copied().unwrap_or(self.last + 1)
    }

    /// The messages from this sequence on.
    pub fn from(&self, sequence: u64) -> btree_map::Range<'_, u64, Message> {
        self.stored.range(sequence..)
    }
}

#[derive(Default)]
pub struct Stream {
    pub messages: Messages,
    pub consumers: BTreeMap<Arc<str>, Consumer>,
}
