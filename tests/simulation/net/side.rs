//! A replica's end of the network: its two connections, its link, and what it hears of other replicas.

use std::sync::Arc;

use fetch_proxy::{
    broker::{Link, Server},
    bus::Incoming,
};
use tokio::sync::{Notify, mpsc};

use super::{
    super::jetstream::Connection,
    agenda::{Event, Use},
};

pub(super) struct Side {
    pub(super) deliveries: Option<Connection>,
    pub(super) settling: Option<Connection>,
    epoch: u64,
    bus_epoch: u64,
    pub(super) link: Link,
    pub(super) link_changed: Arc<Notify>,
    pub(super) subjects: Vec<String>,
    pub(super) into: mpsc::UnboundedSender<Incoming>,
    /// Both connections go to one server, if they can.
    pub(super) together: bool,
    pub(super) dead: bool,
    /// Its process is stopped. Everything that it would do or read waits here, in order.
    pub(super) stopped: Option<Vec<Event>>,
}

impl Side {
    pub(super) fn new(into: mpsc::UnboundedSender<Incoming>, together: bool) -> Self {
        Self {
            deliveries: None,
            settling: None,
            epoch: 0,
            bus_epoch: 0,
            link: Link::Down("not connected yet".into()),
            link_changed: Arc::default(),
            subjects: Vec::new(),
            into,
            together,
            dead: false,
            stopped: None,
        }
    }

    pub(super) fn connected(&mut self, usage: Use, wire: Connection) {
        match usage {
            Use::Deliveries => {
                self.epoch += 1;
                self.deliveries = Some(wire);
            }
            Use::Settling => {
                self.bus_epoch += 1;
                self.settling = Some(wire);
            }
            Use::Dedicated => {}
        }
    }

    pub(super) fn lost(&mut self, usage: Use, wire: Connection) {
        match usage {
            Use::Deliveries => self.deliveries = self.deliveries.filter(|one| *one != wire),
            Use::Settling => self.settling = self.settling.filter(|one| *one != wire),
            Use::Dedicated => {}
        }
    }

    /// Tells the replica how its link is, if that has changed. `server` is the id of the server that its
    /// deliveries come from. Returns whether it is up from now on.
    pub(super) fn tell_link(&mut self, server: Option<String>) -> bool {
        let link = match server {
            Some(id) if self.deliveries.is_some() && self.settling.is_some() => {
                Link::Up(Arc::new(Server {
                    epoch: self.epoch,
                    bus_epoch: self.bus_epoch,
                    id,
                    version: "2.15.1".to_owned(),
                    name: String::new(),
                    max_payload: 1 << 20,
                }))
            }
            _ => Link::Down("a connection was lost".into()),
        };
        let changed = self.link != link;
        if changed {
            self.link = link;
            self.link_changed.notify_waiters();
        }
        changed && matches!(self.link, Link::Up(_))
    }
}
