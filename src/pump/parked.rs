//! Messages that nobody waits for at the moment, in one queue.
//!
//! An answer that nobody took goes to the front, and surplus goes to the back. A message that is parked for
//! too long is overdue and leaves. A last attempt stays without limit, because giving it back would destroy
//! the message.
//!
//! 1. `due` has exactly one entry for each message with a time limit.
//! 2. `bytes` is the sum over all messages.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use super::Item;

#[derive(Debug)]
pub(super) struct Parked<M> {
    /// The front has the smallest key.
    queue: BTreeMap<i64, ParkedItem<M>>,
    due: BTreeSet<(Instant, i64)>,
    bytes: u64,
}

/// A parked message.
#[derive(Debug)]
pub(super) struct ParkedItem<M> {
    pub(super) item: Item<M>,
    /// When the message is overdue. `None`: never.
    until: Option<Instant>,
}

impl<M> Parked<M> {
    pub(super) fn new() -> Self {
        Self { queue: BTreeMap::new(), due: BTreeSet::new(), bytes: 0 }
    }

    /// Adds a message at the back.
    pub(super) fn push_back(&mut self, item: Item<M>, until: Instant) {
        let key = self.queue.last_key_value().map_or(0, |(last, _)| last + 1);
        self.insert(key, ParkedItem::new(item, until));
    }

    /// Adds messages at the front, in their order.
    pub(super) fn push_front(&mut self, items: Vec<Item<M>>, until: Instant) {
        for item in items.into_iter().rev() {
            self.put_back(ParkedItem::new(item, until));
        }
    }

    /// Takes the message at the front.
    pub(super) fn pop(&mut self) -> Option<ParkedItem<M>> {
        let key = *self.queue.first_key_value()?.0;
        self.remove(key)
    }

    /// Undoes a [`Parked::pop`]. The time limit stays.
    pub(super) fn put_back(&mut self, parked: ParkedItem<M>) {
        let key = self.queue.first_key_value().map_or(0, |(first, _)| first - 1);
        self.insert(key, parked);
    }

    /// Takes a message that is overdue.
    pub(super) fn pop_overdue(&mut self, now: Instant) -> Option<M> {
        let (_, key) = *self.due.first().filter(|(until, _)| now >= *until)?;
        self.remove(key).map(|parked| parked.item.message)
    }

    /// The time at which the next message is overdue.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.due.first().map(|(until, _)| *until)
    }

    pub(super) fn take_all(&mut self) -> Vec<M> {
        self.due.clear();
        self.bytes = 0;
        std::mem::take(&mut self.queue).into_values().map(|parked| parked.item.message).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// The bytes of all messages.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn insert(&mut self, key: i64, parked: ParkedItem<M>) {
        self.bytes += parked.item.size;
        self.due.extend(parked.until.map(|until| (until, key)));
        self.queue.insert(key, parked);
    }

    fn remove(&mut self, key: i64) -> Option<ParkedItem<M>> {
        let parked = self.queue.remove(&key)?;
        self.bytes -= parked.item.size;
        if let Some(until) = parked.until {
            self.due.remove(&(until, key));
        }
        Some(parked)
    }
}

impl<M> ParkedItem<M> {
    fn new(item: Item<M>, until: Instant) -> Self {
        let until = (!item.last_attempt).then_some(until);
        Self { item, until }
    }
}
