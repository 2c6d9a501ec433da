//! Deliveries and answers of a consumer with copies. They leave after a majority has the change that they
//! speak of (consumer.go: replicateDeliveries, addAckReply).

use std::collections::VecDeque;

use super::types::{Sent, Time};

/// Something held, the time at which its change was written, and the message if it is an answer.
struct Held {
    sent: Sent,
    at: Time,
    answers: Option<u64>,
}

#[derive(Default)]
pub struct Outbox(VecDeque<Held>);

impl Outbox {
    /// Holds a delivery whose change was written now.
    pub fn hold(&mut self, sent: Sent, now: Time) {
        self.0.push_back(Held { sent, at: now, answers: None });
    }

    /// Holds the answer to an ack of this message. Two answers of one message cannot be held: the first is
    /// never sent (measured, and consumer.go:3097).
    pub fn hold_answer(&mut self, sequence: u64, sent: Sent, now: Time) {
        let answers = Some(sequence);
        match self.0.iter_mut().find(|held| held.answers == answers) {
            Some(held) => held.sent = sent,
            None => self.0.push_back(Held { sent, at: now, answers }),
        }
    }

    /// Sends the end of a pull, but not before the last delivery of the pull (jetstream_cluster.go:8010).
    pub fn end(&mut self, end: Sent, sent: &mut Vec<Sent>) {
        let before = self.0.iter().rev().find(|held| held.sent.inbox() == end.inbox());
        match before.map(|held| held.at) {
            Some(at) => self.hold(end, at),
            None => sent.push(end),
        }
    }

    /// A majority has every change up to this time.
    pub fn release(&mut self, until: Time, sent: &mut Vec<Sent>) {
        while let Some(released) = self.0.pop_front_if(|held| held.at <= until) {
            sent.push(released.sent);
        }
    }

    /// The time at which the first held change was written.
    pub fn first(&self) -> Option<Time> {
        self.0.front().map(|held| held.at)
    }

    /// The leader is gone, and with it everything that was not sent. Returns the sequence and the attempt of
    /// each message that was counted as delivered.
    pub fn clear(&mut self) -> Vec<(u64, u64)> {
        let unsent = self.0.drain(..).filter_map(|held| match held.sent {
            Sent::Message { delivery, .. } => {
                Some((delivery.stream_sequence, delivery.delivery_count))
            }
            Sent::End { .. } | Sent::Answer { .. } => None,
        });
        unsent.collect()
    }
}
