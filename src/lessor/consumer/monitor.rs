//! Decides what one consumer is at this moment: who leads it, when INFO is asked, whether its leases may be
//! settled, and whether it may be pulled from. The task tells the monitor what happens and does its steps.
//!
//! ```text
//!            INFO is read          INFO: no such consumer        still gone after 500 ms
//!  UNKNOWN ──────────────▶ KNOWN ─────────────────────────▶ GONE ────────────────────────▶ stop
//!                          ▲   ▲                             │
//!                          │   └── INFO is read: made again ─┘
//!      KNOWN is SURE ◀─────┴────▶ or IN DOUBT: after a sign that another server may lead,
//!                                 until an answer to a question that was asked after the sign
//! ```
//! A new leader, or a restarted one, delivers at once each unsettled message that was published more than an ack
//! wait ago, even if somebody holds its lease. JetStream reports no change of leader. The signs
//! are an unanswered settlement, a lost connection, and INFO without an answer. They count if another server
//! than the connected one can lead the consumer.
//!
//! 1. At most one question is open. A sign drops the open question, because the answer may be older.
//! 2. Doubt ends with an answer to a question that was asked after the last sign, or with all leases.
//! 3. If the answer names another leader, leases lose their trust back to the last question that named the
//!    old leader. The same follows if somebody missed the leader, and INFO does not show its absence.
//! 4. If INFO knows fewer deliveries than were known when it was asked, the unknown ones are lost after a
//!    change of leader. Without a change the consumer was reset, and all leases are void.
//! 5. An arrival whose consumer sequence is not higher than the last one voids all older leases.
//! 6. Nothing is pulled unless INFO or an arrival has shown the consumer within the last second.
//! 7. A failed question is repeated after 250 ms, or at a new sign, even if all callers were refused meanwhile.
//! 8. After [`Monitor::step`] has nothing more to do, [`Monitor::next_deadline`] is later than `now`.
//!
//! Pure; `now` is an argument and never goes back. The steps that follow from one event are done before the
//! next event.

mod contradiction;
mod counting;
mod known;
mod link_state;
mod question;
mod types;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

pub use self::known::LeftKnowledge;
pub use self::types::{CallerWants, ConsumerView, InfoAnswer, LeaderSigns, MonitorStep};
use self::{
    contradiction::Contradiction,
    counting::DeliveryCount,
    known::{Counted, Hearing, Knowledge, Known, LeaderTrust},
    link_state::LinkState,
    question::Question,
};
use crate::{broker::Server, lessor::sighting::Sighting};

/// Between two questions, if the first one failed.
const INFO_RETRY: Duration = Duration::from_millis(250);

/// See the [module](self).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Monitor {
    connection: LinkState,
    consumer: Knowledge,
    question: Question,
    contradiction: Option<Contradiction>,
    /// Steps that are decided and not done yet.
    steps: VecDeque<MonitorStep>,
}

impl Monitor {
    /// A monitor of a consumer. `server` is the present connection, if there is one; `left` is what an
    /// earlier monitor knew, if leases of the consumer are held.
    pub fn new(server: Option<&Server>, left: Option<LeftKnowledge>, now: Instant) -> Self {
        let mut monitor = Self {
            connection: LinkState::new(server, now),
            consumer: left.map_or(Knowledge::Unknown, LeftKnowledge::resume),
            question: Question::Due(now),
            contradiction: None,
            steps: VecDeque::new(),
        };
        // Since then nobody has looked who leads.
        monitor.missed(now);
        monitor
    }

    /// What a later monitor must know, if leases of the consumer are held.
    pub fn leave(&self) -> Option<LeftKnowledge> {
        self.consumer.known().map(LeftKnowledge::of)
    }

    /// The connection has changed; `None` while there is none.
    pub fn linked(&mut self, server: Option<&Server>, now: Instant) {
        let changed = self.connection.change(server, now);
        if server.is_some() && !self.is_read_here() {
            self.question.plan(now);
        }
        if changed.unheard {
            // The consumer may have been made again, and we could not hear it.
            self.start_doubt();
            self.ask_again(now);
        }
        // If the consumer has several servers, this one need not be the one that leads: INFO tells.
        let alone = self.consumer.known().is_some_and(|known| !known.view.replicated);
        if alone && changed.another_server {
            self.distrust(changed.lost_at, LeaderSigns::default());
        }
        self.doubt(now);
    }

    /// Deliveries or the end of a pull have arrived, on the inbox that is pulled on. Takes the consumer
    /// sequence and the stream sequence of each delivery, in the order of their arrival. Returns how many of
    /// them, from the first one on, are void and must not be leased. The others are leased after the steps.
    pub fn arrived(&mut self, deliveries: &[(u64, u64)], now: Instant) -> usize {
        let Some(known) = self.consumer.known_mut() else { return 0 };
        let Counted { what, sequence, void } = known.count(deliveries, now);
        if what == DeliveryCount::Again {
            self.void(now);
        }
        if what != DeliveryCount::On {
            self.announce(sequence, sequence == 1, what == DeliveryCount::Again);
        }
        if what == DeliveryCount::Perhaps {
            self.start_doubt();
            self.ask_again(now);
        }
        self.arrived_late(&deliveries[void..]);
        void
    }

    /// Deliveries have arrived on an inbox that was left. They prove nothing about the consumer as it is.
    pub fn arrived_late(&mut self, deliveries: &[(u64, u64)]) {
        if let Some(known) = self.consumer.known_mut() {
            known.arrived(deliveries);
        }
    }

    /// Leases with consumer sequences between these two were taken over from another replica. Until now perhaps
    /// nobody has needed to know who leads.
    pub fn adopted(&mut self, sequences: (u64, u64), now: Instant) {
        if let Some(known) = self.consumer.known_mut() {
            known.take_over(sequences, now);
        }
        self.ask_again(now);
    }

    /// The open question is answered. `outdated`: an inbox is still pulled on that is on an older
    /// connection, so the answer does not count as read on the present one.
    pub fn answered(&mut self, answer: InfoAnswer, outdated: bool, now: Instant) {
        let Question::Open { at, known } = self.question else { return };
        self.question = Question::Due(now + INFO_RETRY);
        match answer {
            InfoAnswer::Read(view) => self.read(view, (at, known), outdated, now),
            InfoAnswer::Silent => {
                self.missed(now);
                self.question = Question::Due(now + INFO_RETRY);
                self.connection.be_away(now);
            }
            InfoAnswer::Gone => self.steps.extend(self.consumer.gone(now)),
            InfoAnswer::Unsuitable { created } => {
                // The same consumer, unsuitable now, keeps the leases that it has.
                if self.consumer.is_made_again(&created) {
                    self.say(MonitorStep::MadeAgain);
                }
                self.say(MonitorStep::Stop);
            }
            InfoAnswer::Forbidden => self.say(MonitorStep::Stop),
        }
    }

    /// There may be another leader.
    pub fn doubt(&mut self, now: Instant) {
        if self.consumer.known().is_some_and(|known| known.view.is_led_elsewhere()) {
            self.start_doubt();
            self.ask_again(now);
        }
    }

    /// As far as can be seen, nobody leads the consumer at this moment.
    pub fn missed(&mut self, now: Instant) {
        self.consumer.missed();
        self.ask_again(now);
        self.doubt(now);
    }

    /// A settlement was not answered. `connected`: the connection was there, so the leader was not.
    pub fn unanswered(&mut self, connected: bool, now: Instant) {
        if connected && self.is_connected() { self.missed(now) } else { self.doubt(now) }
    }

    /// A pull has ended because the leader is going, or has lost the lead.
    pub fn leader_gone(&mut self, now: Instant) {
        self.distrust(now, LeaderSigns::default());
        self.missed(now);
    }

    /// Another replica has seen something of the consumer; `held`: leases of it are held here. Returns
    /// whether that replica has to wait for [`MonitorStep::AnswerReplicas`]. Otherwise it is answered after the
    /// steps.
    pub fn heard(&mut self, sighting: &Sighting, held: bool, now: Instant) -> bool {
        let Some(known) = self.consumer.known_mut() else {
            // No lease is held, and an answer on its way may be older than the sighting.
            self.distrust_answer(now);
            return false;
        };
        let Hearing { another, void, look } = known.hear(sighting, now);
        if another {
            self.contradiction = Some(Contradiction::new(sighting.created.clone(), now));
            self.start_doubt();
        } else if void {
            self.void(now);
        }
        if look && held {
            self.ask_again(now);
        } else if look {
            self.consumer.be_unsure();
        }
        look && held
    }

    /// The inbox is gone or was left, and the answer to an open question may not know what has arrived until
    /// now. `dedicated`: it was on a connection of its own, of which the link says nothing.
    pub fn inbox_lost(&mut self, dedicated: bool, now: Instant) {
        self.distrust_answer(now);
        if dedicated {
            self.reread();
            self.ask(now);
        }
    }

    /// INFO has to be read again before there is another inbox.
    pub fn reread(&mut self) {
        self.consumer.reread();
    }

    /// INFO is asked now, unless it is being asked.
    pub fn ask(&mut self, now: Instant) {
        self.question.plan(now);
    }

    /// Returns the next thing to do. To be called after every event and at [`Monitor::next_deadline`], until there
    /// is nothing more. `held` tells whether leases of the consumer are held.
    pub fn step(
        &mut self,
        wants: CallerWants,
        held: impl FnOnce() -> bool,
        now: Instant,
    ) -> Option<MonitorStep> {
        if !self.steps.is_empty() || !self.connection.is_up() {
            return self.next_step();
        }
        self.look_before_pull(wants, now);
        if !self.question.is_due(now) {
            return None;
        }
        let read = self.is_read_here() && self.connection.is_there();
        if read && !wants.waiting && !held() {
            self.question = Question::Unneeded;
            return None;
        }
        let known = self.consumer.known().map_or(0, Known::highest);
        self.question = Question::Open { at: now, known };
        Some(MonitorStep::Ask)
    }

    /// The next step that something has led to; no question is asked by this.
    pub fn next_step(&mut self) -> Option<MonitorStep> {
        self.steps.pop_front()
    }

    /// The time at which [`Monitor::step`] has something to do, or callers hear that NATS is away, if nothing
    /// else happens. `waiting`: there are callers.
    pub fn next_deadline(&self, waiting: bool) -> Option<Instant> {
        let away = self.connection.callers_told_at().filter(|_| waiting);
        let ask = self.question.due_at().filter(|_| self.connection.is_up());
        away.into_iter().chain(ask).min()
    }

    /// There is a connection.
    pub fn is_connected(&self) -> bool {
        self.connection.is_up()
    }

    /// NATS or INFO was away for so long that callers hear of it: since when, and when streams that were there
    /// before hear of it.
    pub fn away(&self, now: Instant) -> Option<(Instant, Instant)> {
        self.connection.away(now)
    }

    /// INFO was read on the present connection.
    pub fn is_read_here(&self) -> bool {
        let read_on = self.consumer.known().and_then(|known| known.read_on);
        read_on.is_some() && read_on == self.connection.number()
    }

    /// Nothing may be settled.
    pub fn in_doubt(&self) -> bool {
        self.consumer.known().is_some_and(|known| known.trust == LeaderTrust::InDoubt)
    }

    /// The view of the consumer is good enough to pull by it, if there is an inbox.
    pub fn may_pull(&self, now: Instant) -> bool {
        let good = |known: &Known| known.is_fresh(now) && known.is_sure(now);
        self.is_connected() && self.consumer.known().is_some_and(good)
    }

    /// A replica has read another consumer of this name, and it is not known which of the two is there.
    pub fn is_contradicted(&self) -> bool {
        self.contradiction.is_some()
    }

    /// INFO was read: what it was asked for at `asked_at`, when deliveries up to `known` were known.
    fn read(
        &mut self,
        view: ConsumerView,
        (asked_at, known): (Instant, u64),
        outdated: bool,
        now: Instant,
    ) {
        let again = self.consumer.is_made_again(&view.created);
        if again {
            self.say(MonitorStep::MadeAgain);
        }
        self.say(MonitorStep::Adopt);
        let (leader, delivered) = (view.leader, view.delivered);
        match &self.consumer {
            Knowledge::Known(_) if !again => self.read_again(view, (asked_at, known), now),
            Knowledge::Unknown | Knowledge::Known(_) | Knowledge::Gone { .. } => {
                let read_on = self.consumer.known().and_then(|known| known.read_on);
                self.consumer = Knowledge::Known(Known::new(view, read_on, asked_at, now));
                // Holders of older leases must know before a message of this consumer is handed out.
                self.announce(delivered, false, false);
            }
        }
        self.say(MonitorStep::Lead(leader));
        let Some(known) = self.consumer.known_mut() else { return };
        if let Some(connection) = self.connection.number().filter(|_| !outdated) {
            let first = known.read_on(connection);
            self.steps.extend(first.map(|missing_from| MonitorStep::ReadHere { missing_from }));
            self.connection.be_back();
        }
        self.question = Question::Due(now + known.refresh());
        known.be_sure(now);
        self.conclude(now);
    }

    /// The known consumer was read again: who leads it, and how much that server remembers.
    fn read_again(&mut self, view: ConsumerView, (asked_at, known): (Instant, u64), now: Instant) {
        let Some(consumer) = self.consumer.known_mut() else { return };
        let delivered = view.delivered;
        let change = consumer.read_again(view, asked_at, known, now);
        if change.signs.any() {
            self.distrust(change.since, change.signs);
        }
        if change.reset {
            self.say(MonitorStep::Void);
            self.announce(delivered, false, true);
        } else if change.lost {
            self.say(MonitorStep::LoseAfter(delivered));
        }
    }

    /// Ends the doubt after an answer, unless another replica has read a newer consumer.
    fn conclude(&mut self, now: Instant) {
        let Some(known) = self.consumer.known_mut() else { return };
        if let Some(other) = &mut self.contradiction
            && other.stands_against(&known.view.created, now)
        {
            known.be_unsure();
            other.retry_at = Some(now + INFO_RETRY);
            self.question = Question::Due(now + INFO_RETRY);
            return self.start_doubt();
        }
        self.contradiction = None;
        self.steps.extend([MonitorStep::Trust, MonitorStep::AnswerReplicas]);
    }

    /// Before a pull the consumer is read, if the last proof is too old. A consumer that cannot be read, or
    /// is gone, is asked for again anyway.
    fn look_before_pull(&mut self, wants: CallerWants, now: Instant) {
        let sure = self.consumer.known().is_none_or(|known| known.is_sure(now));
        if wants.pull && !sure && self.connection.is_there() {
            let retry_at = self.contradiction.as_ref().and_then(|other| other.retry_at);
            self.question.plan_by(retry_at.map_or(now, |at| at.max(now)));
        }
    }

    /// If a question is open, its answer does not count: it is asked again.
    fn distrust_answer(&mut self, now: Instant) {
        if self.question.is_open() {
            self.ask_again(now);
        }
    }

    /// Asks now. If a question is open, its answer does not count.
    pub fn ask_again(&mut self, now: Instant) {
        if self.question.drop_open(now) {
            self.say(MonitorStep::Cancel);
        }
    }

    fn say(&mut self, step: MonitorStep) {
        self.steps.push_back(step);
    }

    fn start_doubt(&mut self) {
        if let Some(known) = self.consumer.known_mut() {
            known.trust = LeaderTrust::InDoubt;
            self.say(MonitorStep::Doubt);
        }
    }

    fn distrust(&mut self, since: Instant, signs: LeaderSigns) {
        let known = self.consumer.known();
        self.steps.extend(known.map(|_| MonitorStep::Distrust { since, signs }));
    }

    /// Leases that were granted before are over: their messages are delivered again.
    fn void(&mut self, now: Instant) {
        if let Some(known) = self.consumer.known_mut() {
            known.void();
            self.say(MonitorStep::Void);
        }
        // An answer on its way may be older than this, or not: it does not tell.
        self.distrust_answer(now);
    }

    fn announce(&mut self, delivered: u64, began: bool, again: bool) {
        let known = self.consumer.known();
        self.steps.extend(known.map(|known| known.announcement(delivered, began, again)));
    }
}
