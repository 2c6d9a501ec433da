//! The servers as a consumer sees them.

use std::{collections::BTreeSet, time::Duration};

use fetch_proxy::broker::ConsumerName;

use super::{
    stream::Messages,
    types::{Connection, Sent},
};

/// The servers as a consumer sees them, and the place of everything that it sends.
pub struct Surroundings<'s> {
    pub name: &'s ConsumerName,
    pub messages: &'s Messages,
    pub connected: &'s BTreeSet<Connection>,
    /// The time by which the clock of the servers is ahead.
    pub ahead: Duration,
    /// The number of deliveries so far, of all consumers.
    pub delivered: &'s mut u64,
    pub sent: &'s mut Vec<Sent>,
}
