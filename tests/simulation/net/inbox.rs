//! The inbox of one consumer at one replica, where deliveries and the ends of pulls arrive.

use fetch_proxy::broker::{
    Arrival, BrokerError, ConnectionKind, ConsumerName, Inbox, InboxEvent, PullRequest,
};
use tokio::sync::mpsc;

use super::{
    super::jetstream::Connection,
    carried::{Item, Up},
    network::Net,
    wires::Use,
};

pub struct SimInbox {
    net: Net,
    wire: Connection,
    inbox: u64,
    name: ConsumerName,
    arrivals: mpsc::UnboundedReceiver<Item>,
    ended: Option<InboxEvent>,
    dedicated: bool,
}

impl SimInbox {
    pub(super) fn open(
        net: &Net,
        side: usize,
        name: &ConsumerName,
        kind: ConnectionKind,
    ) -> Result<Self, BrokerError> {
        net.with(|state, _| {
            let end = &state.sides[side];
            let wire = match kind {
                ConnectionKind::Shared => end.deliveries,
                ConnectionKind::Dedicated if end.reachable && state.servers.up => {
                    Some(state.open_wire(side, Use::Dedicated))
                }
                ConnectionKind::Dedicated => None,
            };
            let wire = wire.ok_or(BrokerError::Unsent("no connection".to_owned()))?;
            let inbox = state.wires.number();
            let (into, arrivals) = mpsc::unbounded_channel();
            if let Some(on) = state.wires.get_mut(wire) {
                on.inboxes.insert(inbox, into);
            }
            let (net, name) = (net.clone(), name.clone());
            let dedicated = kind == ConnectionKind::Dedicated;
            Ok(Self { net, wire, inbox, name, arrivals, ended: None, dedicated })
        })
    }
}

impl Inbox for SimInbox {
    async fn pull(&mut self, asked: PullRequest) -> Result<(), BrokerError> {
        self.net.with(|state, now| {
            if !state.wires.get(self.wire).is_some_and(|wire| wire.client) {
                return Err(BrokerError::Unsent("the connection is gone".to_owned()));
            }
            let (inbox, name) = (self.inbox, self.name.clone());
            state.wires.send_up(self.wire, Up::Pull { inbox, name, asked }, now);
            Ok(())
        })
    }

    async fn next(&mut self, into: &mut Vec<Arrival>) -> InboxEvent {
        if let Some(ended) = self.ended {
            return ended;
        }
        let mut item = self.arrivals.recv().await;
        let had = into.len();
        loop {
            match item {
                Some(Item::Arrival(arrival)) => into.push(arrival),
                Some(Item::Ended(how)) => self.ended = Some(how),
                None => self.ended = self.ended.or(Some(InboxEvent::Lost)),
            }
            match self.arrivals.try_recv() {
                Ok(next) if self.ended.is_none() => item = Some(next),
                Ok(_) | Err(_) => break,
            }
        }
        if into.len() > had { InboxEvent::Arrived } else { self.ended.unwrap_or(InboxEvent::Lost) }
    }
}

impl Drop for SimInbox {
    fn drop(&mut self) {
        self.net.with(|state, now| {
            if let Some(on) = state.wires.get_mut(self.wire) {
                on.inboxes.remove(&self.inbox);
            }
            if self.dedicated {
                state.hang_up(self.wire, now);
            }
        });
    }
}
