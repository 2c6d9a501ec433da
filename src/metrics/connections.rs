//! The meter of the connections of one listener. Each accepted connection is open, was refused, or has closed.

use std::{borrow::Cow, sync::Arc};

use super::{
    labels::{ConnectionClose, ConnectionRefusal},
    store::{Amount, Count, Counts, SeriesStore},
    table::FamilyId,
};

/// Counts connections. A copy is the same meter.
#[derive(Debug, Clone)]
pub struct ConnectionMeter(Arc<ConnectionCounts>);

#[derive(Debug)]
struct ConnectionCounts {
    accepted: Count,
    open: Amount,
    refused: Counts<ConnectionRefusal>,
    closed: Counts<ConnectionClose>,
}

/// An accepted connection, until this is dropped.
#[derive(Debug)]
pub struct MeteredConnection {
    meter: ConnectionMeter,
    end: ConnectionEnd,
}

/// The end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionEnd {
    /// Nothing was served on it.
    Refused(ConnectionRefusal),
    /// It was open.
    Closed(ConnectionClose),
}

impl ConnectionMeter {
    pub(super) fn new(store: &SeriesStore, listener: &'static str, most: usize) -> Self {
        let name = [Cow::Borrowed(listener)];
        store.level(FamilyId::ConnectionsLimit, name.to_vec()).moves(0, most);
        Self(Arc::new(ConnectionCounts {
            accepted: store.count(FamilyId::ConnectionsAccepted, name.to_vec()),
            open: store.level(FamilyId::ConnectionsOpen, name.to_vec()),
            refused: Counts::new(store, FamilyId::ConnectionsRefused, &name),
            closed: Counts::new(store, FamilyId::ConnectionsClosed, &name),
        }))
    }

    /// A connection was accepted.
    pub fn accepted(&self) -> MeteredConnection {
        self.0.accepted.add(1);
        self.0.open.moves(0, 1);
        // A task that is ended says nothing more.
        let end = ConnectionEnd::Closed(ConnectionClose::Cut);
        MeteredConnection { meter: self.clone(), end }
    }
}

impl MeteredConnection {
    /// It ends in this way. A connection that was refused stays so.
    pub fn ends(&mut self, end: ConnectionEnd) {
        if matches!(self.end, ConnectionEnd::Closed(_)) {
            self.end = end;
        }
    }
}

impl Drop for MeteredConnection {
    fn drop(&mut self) {
        self.meter.0.open.moves(1, 0);
        match self.end {
            ConnectionEnd::Refused(why) => self.meter.0.refused.of(why).add(1),
            ConnectionEnd::Closed(how) => self.meter.0.closed.of(how).add(1),
        }
    }
}
