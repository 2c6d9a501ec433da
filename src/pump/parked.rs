//! Messages that nobody waits for at the moment.
//!
//! Three lines, served in this order: last attempts, which are kept until somebody takes them;
//! what came back unhanded; surplus of pulls. In each of the latter two, times are in order, so
//! that the first to be overdue is at an end.

use std::{collections::VecDeque, time::Instant};

use super::Item;

#[derive(Debug)]
pub(super) struct Parked<M> {
    kept: VecDeque<Item<M>>,
    /// Newest first.
    returned: VecDeque<(Instant, Item<M>)>,
    /// Oldest first.
    surplus: VecDeque<(Instant, Item<M>)>,
}

impl<M> Default for Parked<M> {
    fn default() -> Self {
        Self { kept: VecDeque::new(), returned: VecDeque::new(), surplus: VecDeque::new() }
    }
}

impl<M> Parked<M> {
    /// Keeps a surplus message until then.
    pub(super) fn park(&mut self, item: Item<M>, until: Instant) {
        if item.last_attempt {
            self.kept.push_back(item);
        } else {
            self.surplus.push_back((until, item));
        }
    }

    /// Puts messages in front of the others, in their order.
    pub(super) fn put_back(&mut self, items: Vec<Item<M>>, until: Instant) {
        for item in items.into_iter().rev() {
            if item.last_attempt {
                self.kept.push_front(item);
            } else {
                self.returned.push_front((until, item));
            }
        }
    }

    /// The next to be given away.
    pub(super) fn pop(&mut self) -> Option<Item<M>> {
        let kept = self.kept.pop_front();
        let returned = || self.returned.pop_front().map(|(_, item)| item);
        let surplus = || self.surplus.pop_front().map(|(_, item)| item);
        kept.or_else(returned).or_else(surplus)
    }

    /// One whose time is over.
    pub(super) fn overdue(&mut self, now: Instant) -> Option<Item<M>> {
        let returned = self.returned.pop_back_if(|(until, _)| now >= *until);
        let overdue = returned.or_else(|| self.surplus.pop_front_if(|(until, _)| now >= *until));
        overdue.map(|(_, item)| item)
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let ends = [self.returned.back(), self.surplus.front()];
        ends.into_iter().flatten().map(|(until, _)| *until).min()
    }

    pub(super) fn take_all(&mut self) -> Vec<Item<M>> {
        std::iter::from_fn(|| self.pop()).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.kept.len() + self.returned.len() + self.surplus.len()
    }
}
