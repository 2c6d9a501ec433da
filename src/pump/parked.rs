//! Messages that nobody waits for at the moment, in one line.
//!
//! What nobody took comes back to the front, surplus goes to the back, and time may take any of
//! them out. Last attempts wait without end: giving one back would destroy its message.
//!
//! 1. `due` has exactly one entry for each message that does not wait without end.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use super::Item;

#[derive(Debug)]
pub(super) struct Parked<M> {
    /// By place: the front is the smallest.
    line: BTreeMap<i64, ParkedItem<M>>,
    due: BTreeSet<(Instant, i64)>,
}

/// A parked message, and until when.
#[derive(Debug)]
pub(super) struct ParkedItem<M> {
    pub(super) item: Item<M>,
    until: Option<Instant>,
}

impl<M> Parked<M> {
    pub(super) fn new() -> Self {
        Self { line: BTreeMap::new(), due: BTreeSet::new() }
    }

    /// Behind all others.
    pub(super) fn push_back(&mut self, item: Item<M>, until: Instant) {
        let place = self.line.last_key_value().map_or(0, |(last, _)| last + 1);
        self.insert(place, ParkedItem::new(item, until));
    }

    /// Before all others, in their own order.
    pub(super) fn push_front(&mut self, items: Vec<Item<M>>, until: Instant) {
        for item in items.into_iter().rev() {
            self.return_spot(ParkedItem::new(item, until));
        }
    }

    /// The front.
    pub(super) fn pop(&mut self) -> Option<ParkedItem<M>> {
        let place = *self.line.first_key_value()?.0;
        self.remove(place)
    }

    /// Undoes a [`Parked::pop`]: its time runs on.
    pub(super) fn return_spot(&mut self, spot: ParkedItem<M>) {
        let place = self.line.first_key_value().map_or(0, |(first, _)| first - 1);
        self.insert(place, spot);
    }

    /// One whose time is over.
    pub(super) fn pop_overdue(&mut self, now: Instant) -> Option<M> {
        let (_, place) = *self.due.first().filter(|(until, _)| now >= *until)?;
        self.remove(place).map(|spot| spot.item.message)
    }

    /// When the first will be overdue.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.due.first().map(|(until, _)| *until)
    }

    pub(super) fn take_all(&mut self) -> Vec<M> {
        self.due.clear();
        std::mem::take(&mut self.line).into_values().map(|spot| spot.item.message).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.line.len()
    }

    fn insert(&mut self, place: i64, spot: ParkedItem<M>) {
        self.due.extend(spot.until.map(|until| (until, place)));
        self.line.insert(place, spot);
    }

    fn remove(&mut self, place: i64) -> Option<ParkedItem<M>> {
        let spot = self.line.remove(&place)?;
        if let Some(until) = spot.until {
            self.due.remove(&(until, place));
        }
        Some(spot)
    }
}

impl<M> ParkedItem<M> {
    fn new(item: Item<M>, until: Instant) -> Self {
        let until = (!item.last_attempt).then_some(until);
        Self { item, until }
    }
}
