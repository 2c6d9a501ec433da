//! The bytes that the pulls of this consumer may bring. Asks for a share of its connection's bytes, and gives
//! back the bytes that have come. Decides nothing: the appetite says how
//! much to ask for, and the budget who gets how much.
//!
//! 1. A pull is open only with a share for the bytes that it may bring.
//! 2. A share is given back when all of it has come, the pull's end was heard, or the connection is lost.
//! 3. If nothing is heard of a pull, the rest of its share stays in doubt until the end of a later pull. NATS
//!    sends in order, and a slow link can delay everything for longer than a pull lasts.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use crate::{
    broker::{ConnectionKind, ConsumerName, Delivery},
    lessor::shares::{Doubt, Explained, PullSeat, PullShare, Shares},
    pump::{Allowance, Appetite, Course, Demand, PullOutcome},
};

/// A pull with a large share lasts no longer than this if nothing comes.
const BRISK: Duration = Duration::from_millis(500);
/// Bytes in doubt are treated as gone after this. It is longer than any server tolerates a client that does
/// not read.
const DOUBTFUL: Duration = Duration::from_secs(30);
/// The bytes that JetStream and its headers may add to the largest payload of a server.
const AROUND: u64 = 16 * 1024;

/// The number of messages that a pull may ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct PullPlaces {
    pub(super) most: usize,
    /// The same, if no message is known to be there.
    pub(super) idle: usize,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Sharing {
    name: ConsumerName,
    /// The shares of the connection that all consumers use, and of a dedicated connection, if there was one.
    shared: Shares,
    own: Option<Shares>,
    seat: PullSeat,
    /// The connection that was lost last.
    cut: Option<(Shares, u64)>,
    appetite: Appetite,
    open: Option<Open>,
    doubts: Vec<(u64, Instant, Doubt)>,
}

/// The bytes that the open pull may still bring.
#[derive(Debug)]
struct Open {
    share: PullShare,
    /// `None` until it is issued.
    no: Option<u64>,
    messages_left: u32,
    /// The bytes that JetStream may still send for it. `None`: any number, or it is not known.
    bytes_left: Option<u64>,
    course: Course,
    /// How it has ended.
    end: Option<PullOutcome>,
}

impl Sharing {
    pub(super) fn new(shared: &Shares, name: &ConsumerName) -> Self {
        Self {
            name: name.clone(),
            shared: shared.clone(),
            own: None,
            seat: PullSeat::new(shared.clone(), name.clone()),
            cut: None,
            appetite: Appetite::idle(),
            open: None,
            doubts: Vec::new(),
        }
    }

    /// The inbox is on another connection. `busy`: there are messages.
    pub(super) fn move_to(&mut self, place: ConnectionKind, busy: bool) {
        self.lost();
        let shares = match place {
            ConnectionKind::Shared => &self.shared,
            // The same server is behind both connections, so its bound holds here too.
            ConnectionKind::Dedicated => self.own.get_or_insert_with(|| self.shared.another()),
        };
        self.seat = PullSeat::new(shares.clone(), self.name.clone());
        self.appetite = if busy { Appetite::hungry() } else { Appetite::idle() };
    }

    /// The connection was cut, or broke. To be called before its open share is given back. `epoch` is the
    /// number of the shared connection.
    pub(super) fn cut(&mut self, epoch: Option<u64>) {
        // The last connection of our own was another one.
        let before = self.cut.as_ref().map_or(0, |(_, epoch)| *epoch);
        let epoch = epoch.unwrap_or(before + 1);
        self.seat.shares().cut(epoch);
        self.cut = Some((self.seat.shares().clone(), epoch));
    }

    /// Whether the bytes that were on their way explain why the connection was cut.
    pub(super) fn explain(&self, now: Instant) -> Option<Explained> {
        let (shares, epoch) = self.cut.as_ref()?;
        shares.explain(*epoch, now)
    }

    /// Rings when it is worth to ask again.
    pub(super) fn bell(&self) -> Arc<Notify> {
        self.seat.bell()
    }

    /// The size that a pull may have now. `None`: not yet.
    pub(super) fn allow(
        &mut self,
        demand: &Demand,
        places: PullPlaces,
        max_payload: u64,
        now: Instant,
    ) -> Option<Allowance> {
        let messages = self.appetite.messages(demand);
        let places = if messages.idle { places.most.min(places.idle) } else { places.most };
        let most = u32::try_from(messages.most.min(places as u64)).unwrap_or(u32::MAX);
        if most == 0 {
            return None;
        }
        let largest = max_payload.saturating_add(AROUND);
        let ask = self.appetite.bytes(demand, most.into(), largest);
        if self.open.is_none() {
            let share = self.seat.ask(ask, now)?;
            self.open = Some(Open {
                share,
                no: None,
                messages_left: 0,
                bytes_left: None,
                course: Course::default(),
                end: None,
            });
        }
        let bytes = self.open.as_ref()?.share.granted;
        let wait = if ask.idle && messages.idle { Duration::MAX } else { BRISK };
        Some(Allowance { messages: most, bytes, wait })
    }

    /// A pull was issued with what was allowed.
    pub(super) fn issued(&mut self, no: u64, messages: u32, bytes: Option<u64>) {
        if let Some(open) = &mut self.open {
            (open.no, open.messages_left, open.bytes_left) = (Some(no), messages, bytes);
            if let Some(bytes) = bytes {
                open.share.give_back(open.share.granted.saturating_sub(bytes));
            }
        }
    }

    /// The pull that was allowed did not leave.
    pub(super) fn unsent(&mut self) {
        self.open = None;
    }

    /// Nothing is wanted now.
    pub(super) fn rest(&mut self) {
        match &self.open {
            Some(open) if open.no.is_some() => {}
            Some(_) => self.open = None,
            None => self.seat.leave(),
        }
    }

    /// Messages of these sizes have arrived. Returns the number of the open pull if its bytes are used up
    /// exactly. Such a pull is over, and nats-server does not say so.
    pub(super) fn arrived(&mut self, sizes: impl Iterator<Item = u64>) -> Option<u64> {
        let open = self.open.as_mut()?;
        let before = open.course.bytes;
        for size in sizes {
            open.course.count(size);
            open.messages_left = open.messages_left.saturating_sub(1);
            open.bytes_left = open.bytes_left.and_then(|left| left.checked_sub(size));
        }
        open.share.arrived(open.course.bytes - before);
        open.bytes_left.take_if(|left| *left == 0).and(open.no)
    }

    /// The end of a pull was heard.
    pub(super) fn ended(&mut self, no: u64, end: PullOutcome) {
        self.doubts.retain(|(doubtful, ..)| *doubtful > no);
        if let Some(open) = self.open.as_mut().filter(|open| open.no == Some(no)) {
            open.end = Some(end);
        }
    }

    /// Forgets bytes that were in doubt for long enough. If no pull is `open` any more, the rest of the last
    /// share is free, or in doubt.
    pub(super) fn settle(&mut self, open: bool, now: Instant) {
        self.doubts.retain(|(_, until, _)| now < *until);
        if open {
            return;
        }
        let Some(open) = self.open.take_if(|open| open.no.is_some()) else { return };
        self.appetite.after(&open.course, open.end);
        if let (None, Some(no)) = (open.end, open.no)
            && open.messages_left > 0
        {
            self.doubts.push((no, now + DOUBTFUL, open.share.doubt()));
        }
    }

    /// The connection is gone, and with it what was on its way.
    pub(super) fn lost(&mut self) {
        (self.open, self.doubts) = (None, Vec::new());
        self.seat.leave();
    }

    /// When something that is in doubt is to be taken for gone.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.doubts.iter().map(|(_, until, _)| *until).min()
    }
}

/// The size of a delivery on its connection, in bytes, about as JetStream counts them.
pub(super) fn wire_size(delivery: &Delivery) -> u64 {
    let header = |(name, values): &(String, Vec<String>)| {
        values.iter().map(|value| name.len() + value.len() + 4).sum::<usize>()
    };
    let headers: usize = delivery.headers.iter().map(header).sum();
    let version = if headers > 0 { 12 } else { 0 };
    (delivery.payload.len() + delivery.subject.len() + delivery.ack.0.len() + headers + version)
        as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    fn pull(sharing: &mut Sharing, no: u64, now: Instant) {
        let demand = Demand { messages: 10, bytes: Some(1 << 20) };
        let allowed =
            sharing.allow(&demand, PullPlaces { most: 10, idle: 10 }, 1 << 20, now).unwrap();
        sharing.issued(no, allowed.messages, Some(allowed.bytes));
    }

    #[test]
    fn pull_is_over_when_its_bytes_are_used_up_exactly() {
        let name = ConsumerName { stream: "S".into(), consumer: "c".into() };
        let mut sharing = Sharing::new(&Shares::new(1 << 20), &name);
        let now = clock::now();
        for (sizes, over) in [(vec![40, 60], true), (vec![40, 61], false), (vec![98], false)] {
            let demand = Demand { messages: 10, bytes: Some(100) };
            let places = PullPlaces { most: 10, idle: 10 };
            let allowed = sharing.allow(&demand, places, 1 << 20, now).unwrap();
            sharing.issued(7, allowed.messages, Some(100));
            assert_eq!(sharing.arrived(sizes.into_iter()), over.then_some(7));
            assert_eq!(sharing.arrived([0, 1].into_iter()), None);
            sharing.settle(false, now);
        }
    }

    /// Otherwise its deadline would be over for as long as that pull lasts, and the task would spin.
    #[test]
    fn old_doubt_is_forgotten_while_a_later_pull_is_open() {
        let name = ConsumerName { stream: "S".into(), consumer: "c".into() };
        let mut sharing = Sharing::new(&Shares::new(1 << 20), &name);
        let now = clock::now();
        pull(&mut sharing, 1, now);
        // Nothing was heard of it.
        sharing.settle(false, now);
        assert_eq!(sharing.next_deadline(), Some(now + DOUBTFUL));
        pull(&mut sharing, 2, now);
        sharing.settle(true, now + DOUBTFUL);
        assert_eq!(sharing.next_deadline(), None);
        assert!(sharing.open.is_some(), "the later pull keeps its share");
    }
}
