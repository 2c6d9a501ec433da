//! The observer from outside, whom the network tells what it carries.

use fetch_proxy::broker::{AckKind, ConsumerInfo, ConsumerName};

use super::super::jetstream::{Applied, DeliveryId, Sent, Time};

pub trait Watcher: Send {
    /// A message has left the servers for a replica.
    fn sent(&mut self, now: Time, side: usize, sent: &Sent);
    /// A replica has seen a sign of another leader, or of another start of the server.
    fn learned(&mut self, now: Time, side: usize);
    /// A replica has all its connections again.
    fn linked(&mut self, _now: Time, _side: usize) {}
    /// A replica has lost a wire, or has given it up by itself.
    fn broke(&mut self, _now: Time, _side: usize) {}
    /// The message has arrived at its replica.
    fn arrived(&mut self, now: Time, id: DeliveryId);
    /// A question of a replica about a consumer is over. It was asked at `_asked`. The answer of its leader says
    /// how many deliveries it has made.
    fn looked(
        &mut self,
        (_asked, _now): (Time, Time),
        _side: usize,
        _name: &ConsumerName,
        _delivered: Option<u64>,
    ) {
    }
    /// A replica is told that it may not ack the messages of a consumer.
    fn refused(&mut self, _now: Time, _side: usize, _name: &ConsumerName) {}
    /// The servers answer a question about a consumer.
    fn told(&mut self, _now: Time, _name: &ConsumerName, _info: &ConsumerInfo) {}
    /// The servers of a consumer have lost its leader, or have elected another one by themselves.
    fn elected(&mut self, _now: Time) {}
    /// A leader that leads no more has answered an ack, which has no effect.
    fn unkept(&mut self, _now: Time, _of: DeliveryId, _kind: &AckKind) {}
    /// An ack has had its effect.
    fn applied(&mut self, now: Time, side: usize, applied: &Applied, way: Way);
}

/// How an ack has come.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    pub left: Time,
    /// It was under way for longer than it was meant to be.
    pub late: bool,
}
