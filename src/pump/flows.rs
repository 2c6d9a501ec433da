//! The flows: callers that stay, each with credit for the messages that it may hold at the same time.
//!
//! ```text
//!  open ──▶ IDLE: holds nothing ──hand──▶ FILLING: holds some, has room ──hand──▶ no room
//!             ▲                              │  ▲                                   │
//!             └───────────── freed ──────────┘  └──────────── freed, more ──────────┘
//! ```
//! A flow that is stalled does not read, and has no room. Two lines have the flows with room. Whoever was
//! handed a message goes to the end of its line. The number of the turn comes from the counter of the waiters,
//! so one order has both.
//!
//! A message that is being settled will soon leave room. A pull already asks for the message that follows it, so
//! the two round trips run together. The follower is parked until the room is there. What is parked is not asked for
//! again.
//!
//! 1. `idle` and `filling` have exactly one entry for each flow with room.
//! 2. `sums` are equal to the sums over all flows.
//! 3. `used` is what was handed, minus what was freed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::{Credit, FlowId, Item, OVERHEAD, Pump, WaiterId};

/// A small pull waits for this, so that it becomes a larger one. It is the resolution of the runtime's timer.
const RIPE_AFTER: Duration = Duration::from_millis(1);

#[derive(Debug)]
pub(super) struct Flows<M> {
    seats: BTreeMap<FlowId, Seat<M>>,
    idle: BTreeSet<(WaiterId, FlowId)>,
    filling: BTreeSet<(WaiterId, FlowId)>,
    /// The flows with messages that `step` has not returned yet.
    handed: BTreeSet<FlowId>,
    next: FlowId,
    sums: Sums,
    /// Since when somebody has room and no pull has ended. `None`: nobody has room.
    room_since: Option<Instant>,
}

#[derive(Debug)]
struct Seat<M> {
    most: Credit,
    used: Credit,
    /// Messages of `used` that are being settled.
    settling: u64,
    stalled: bool,
    turn: WaiterId,
    handed: Vec<Item<M>>,
}

/// The sums over all flows, as they will be once the settlements under way have ended.
#[derive(Debug, Default)]
struct Sums {
    /// Messages for which there is room.
    wanted: u64,
    /// Flows with room that hold nothing.
    idle: u64,
    /// Messages of all credit.
    most: u64,
    /// A wider integer than the room of one flow, which may be without bound.
    room: u128,
}

impl<M> Flows<M> {
    pub(super) fn new() -> Self {
        Self {
            seats: BTreeMap::new(),
            idle: BTreeSet::new(),
            filling: BTreeSet::new(),
            handed: BTreeSet::new(),
            next: FlowId(0),
            sums: Sums::default(),
            room_since: None,
        }
    }

    pub(super) fn open(&mut self, most: Credit, turn: WaiterId, now: Instant) -> FlowId {
        let id = self.next;
        self.next = FlowId(id.0 + 1);
        let used = Credit { messages: 0, bytes: 0 };
        let seat = Seat { most, used, settling: 0, stalled: false, turn, handed: Vec::new() };
        self.sums.add(&seat);
        self.seats.insert(id, seat);
        self.change(id, now, |_| {});
        id
    }

    /// Removes a flow. Returns what it was handed and has not taken.
    pub(super) fn close(&mut self, id: FlowId) -> Vec<Item<M>> {
        let Some(seat) = self.seats.remove(&id) else { return Vec::new() };
        self.sums.subtract(&seat);
        self.idle.remove(&(seat.turn, id));
        self.filling.remove(&(seat.turn, id));
        self.handed.remove(&id);
        self.room_since = self.room_since.filter(|_| self.sums.wanted > 0);
        seat.handed
    }

    pub(super) fn first(&self) -> Option<FlowId> {
        self.seats.first_key_value().map(|(id, _)| *id)
    }

    pub(super) fn set_most(&mut self, id: FlowId, most: Credit, now: Instant) {
        self.change(id, now, |seat| seat.most = most);
    }

    pub(super) fn freed(&mut self, id: FlowId, freed: Credit, now: Instant) {
        self.change(id, now, |seat| {
            debug_assert!(seat.used.messages >= freed.messages && seat.used.bytes >= freed.bytes);
            seat.used.messages = seat.used.messages.saturating_sub(freed.messages);
            seat.used.bytes = seat.used.bytes.saturating_sub(freed.bytes);
        });
    }

    pub(super) fn settling(&mut self, id: FlowId, messages: u64, now: Instant) {
        self.change(id, now, |seat| seat.settling = messages);
    }

    pub(super) fn stall(&mut self, id: FlowId, stalled: bool, now: Instant) {
        self.change(id, now, |seat| seat.stalled = stalled);
    }

    /// Hands a message to a flow with room, which goes to the end of the line.
    pub(super) fn hand(&mut self, id: FlowId, item: Item<M>, turn: WaiterId, now: Instant) {
        self.handed.insert(id);
        self.change(id, now, |seat| {
            seat.used.messages += 1;
            seat.used.bytes = seat.used.bytes.saturating_add(item.size);
            seat.turn = turn;
            seat.handed.push(item);
        });
    }

    /// The messages that some flow was handed.
    pub(super) fn pop_handed(&mut self) -> Option<(FlowId, Vec<Item<M>>)> {
        let id = self.handed.pop_first()?;
        let seat = self.seats.get_mut(&id)?;
        Some((id, std::mem::take(&mut seat.handed)))
    }

    /// The flow that holds nothing and has waited for longest.
    pub(super) fn first_idle(&self) -> Option<(WaiterId, FlowId)> {
        self.idle.first().copied()
    }

    /// The flow that holds something, has room, and has waited for longest.
    pub(super) fn first_filling(&self) -> Option<FlowId> {
        self.filling.first().map(|(_, id)| *id)
    }

    /// Whether a flow can be handed a message.
    pub(super) fn have_room(&self) -> bool {
        !self.idle.is_empty() || !self.filling.is_empty()
    }

    /// The number of messages for which there is room, or will be soon.
    pub(super) fn wanted(&self) -> u64 {
        self.sums.wanted
    }

    /// The bytes for which there is room, or will be soon.
    pub(super) fn room(&self) -> u128 {
        self.sums.room
    }

    /// Whether a pull of so many messages for the flows is worth its cost now.
    pub(super) fn is_ripe(&self, wanted: u64, now: Instant) -> bool {
        let half = 2 * wanted >= self.sums.most;
        self.sums.idle > 0 || half || self.ripe_at().is_some_and(|at| now >= at)
    }

    /// When it will be at the latest.
    pub(super) fn ripe_at(&self) -> Option<Instant> {
        self.room_since.map(|since| since + RIPE_AFTER)
    }

    /// A pull has ended. The next one is to be as large as it can be.
    pub(super) fn pull_ended(&mut self, now: Instant) {
        self.room_since = self.room_since.map(|_| now);
    }

    pub(super) fn len(&self) -> usize {
        self.seats.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.seats.is_empty()
    }

    fn change(&mut self, id: FlowId, now: Instant, change: impl FnOnce(&mut Seat<M>)) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        self.sums.subtract(seat);
        self.idle.remove(&(seat.turn, id));
        self.filling.remove(&(seat.turn, id));
        change(seat);
        self.sums.add(seat);
        if seat.room(seat.used.messages) > 0 {
            let line = if seat.used.messages == 0 { &mut self.idle } else { &mut self.filling };
            line.insert((seat.turn, id));
        }
        let since = self.room_since.unwrap_or(now);
        self.room_since = (self.sums.wanted > 0).then_some(since);
    }
}

impl Sums {
    fn add<M>(&mut self, seat: &Seat<M>) {
        self.wanted += seat.wanted();
        self.idle += u64::from(seat.will_be_idle());
        self.most += seat.usable_most();
        self.room += u128::from(seat.room(seat.unsettled()));
    }

    fn subtract<M>(&mut self, seat: &Seat<M>) {
        self.wanted -= seat.wanted();
        self.idle -= u64::from(seat.will_be_idle());
        self.most -= seat.usable_most();
        self.room -= u128::from(seat.room(seat.unsettled()));
    }
}

impl<M> Seat<M> {
    /// The messages that it holds and that nobody settles.
    fn unsettled(&self) -> u64 {
        self.used.messages.saturating_sub(self.settling)
    }

    /// The bytes that it may still be handed if it holds so many messages. The last message may pass them.
    fn room(&self, messages: u64) -> u64 {
        let left = self.most.bytes.saturating_sub(self.used.bytes);
        if self.stalled || messages >= self.most.messages { 0 } else { left }
    }

    /// The number of messages for which it has room, or will have soon: at most what fits if half of its bytes is
    /// overhead, as for a waiter.
    fn wanted(&self) -> u64 {
        match self.room(self.unsettled()) {
            0 => 0,
            room => (self.most.messages - self.unsettled()).min((room / (2 * OVERHEAD)).max(1)),
        }
    }

    fn will_be_idle(&self) -> bool {
        self.unsettled() == 0 && self.wanted() > 0
    }

    fn usable_most(&self) -> u64 {
        if self.stalled { 0 } else { self.most.messages }
    }
}

impl<M> Pump<M> {
    /// Adds a flow, with credit for messages that it may hold at the same time.
    pub fn open_flow(&mut self, most: Credit, now: Instant) -> FlowId {
        let turn = self.waiters.turn();
        self.flows.open(most, turn, now)
    }

    /// Sets the credit of a flow. What it holds beyond a lower credit stays with it.
    pub fn set_credit(&mut self, id: FlowId, most: Credit, now: Instant) {
        self.flows.set_most(id, most, now);
    }

    /// A flow does not hold these messages any more, however they left it.
    pub fn freed(&mut self, id: FlowId, freed: Credit, now: Instant) {
        self.flows.freed(id, freed, now);
    }

    /// So many of the messages that a flow holds are being settled. The number replaces the last one.
    pub fn settling(&mut self, id: FlowId, messages: u64, now: Instant) {
        self.flows.settling(id, messages, now);
    }

    /// A flow does not read now, or reads again. A stalled flow has no room.
    pub fn stall_flow(&mut self, id: FlowId, stalled: bool, now: Instant) {
        self.flows.stall(id, stalled, now);
    }

    /// Removes a flow. What it was handed, and was not yet delivered, goes to the next caller.
    pub fn close_flow(&mut self, id: FlowId, now: Instant) {
        let items = self.flows.close(id);
        self.parked.push_front(items, now + self.limits.park);
    }
}
