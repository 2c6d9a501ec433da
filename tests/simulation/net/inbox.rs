//! The inbox of one consumer at one replica, where deliveries and the ends of pulls arrive.

use std::time::{Duration, Instant};

use fetch_proxy::{
    broker::{Arrival, BrokerError, ConnectionKind, ConsumerName, Inbox, InboxEvent, PullRequest},
    clock,
};
use tokio::{sync::mpsc, time::sleep};

use super::{
    super::jetstream::Connection,
    agenda::Use,
    carried::{Item, Up},
    network::Net,
    servers::Found,
};

/// The longest time to connect for one consumer, and the longest wait for the cause of a loss: the constants
/// of `src/nats`.
const DEDICATED_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
const CLOSE_CAUSE_TIMEOUT: Duration = Duration::from_secs(1);
/// To connect takes this number of ways: TCP, the server's INFO, and the answer to the first ping.
const WAYS_TO_CONNECT: u32 = 5;

pub struct SimInbox {
    net: Net,
    side: usize,
    wire: Connection,
    inbox: u64,
    name: ConsumerName,
    arrivals: mpsc::UnboundedReceiver<Item>,
    loss: Option<Loss>,
    dedicated: bool,
}

/// The wire is lost. As in `src/nats/inbox.rs`, the cause is known a moment later.
struct Loss {
    known: Instant,
    settling: Option<Connection>,
    /// A server is there, so the wire was lost alone.
    reachable: bool,
}

impl SimInbox {
    pub(super) async fn open(
        net: &Net,
        side: usize,
        name: &ConsumerName,
        kind: ConnectionKind,
    ) -> Result<Self, BrokerError> {
        let gone = || BrokerError::Unsent("no connection".to_owned());
        let shared = net.lock().sides[side].deliveries.ok_or_else(gone)?;
        let dedicated = kind == ConnectionKind::Dedicated;
        let wire = if dedicated { connect(net, side).await.ok_or_else(gone)? } else { shared };
        let (into, arrivals) = mpsc::unbounded_channel();
        let inbox = net.with(|state, _| {
            let inbox = state.agenda.number();
            let on = state.wires.get_mut(wire).filter(|on| on.ends.client)?;
            on.inboxes.insert(inbox, (name.clone(), into));
            Some(inbox)
        });
        let (net, name, inbox) = (net.clone(), name.clone(), inbox.ok_or_else(gone)?);
        Ok(Self { net, side, wire, inbox, name, arrivals, loss: None, dedicated })
    }

    /// Waits until the cause of the loss is known. A wire that was lost although a server is there, and the
    /// settling wire works, seems to have been lost by what it brought.
    async fn ended(&mut self) -> InboxEvent {
        let (net, side) = (&self.net, self.side);
        let loss = self.loss.get_or_insert_with(|| {
            net.with(|state, now| {
                let reachable = state.reaches_any(side, now);
                let ways = state.agenda.delay() * WAYS_TO_CONNECT;
                let wait = if reachable { ways } else { CLOSE_CAUSE_TIMEOUT };
                let settling = state.sides[side].settling;
                Loss { known: clock::now() + wait, settling, reachable }
            })
        });
        clock::sleep_until(Some(loss.known)).await;
        let alone = loss.settling.is_some_and(|wire| net.lock().wires.is_open(wire));
        if loss.reachable && alone { InboxEvent::Broken } else { InboxEvent::Lost }
    }
}

/// A wire for the deliveries of one consumer alone.
async fn connect(net: &Net, side: usize) -> Option<Connection> {
    let (found, wait) = net.with(|state, now| {
        let found = state.find_server(side, Use::Dedicated, now);
        (found, state.agenda.delay() * WAYS_TO_CONNECT)
    });
    let Found::Now(server) = found else {
        sleep(DEDICATED_CONNECT_TIMEOUT).await;
        return None;
    };
    sleep(wait).await;
    net.with(|state, _| {
        let up = state.servers.is_up(server) && !state.sides[side].dead;
        up.then(|| state.open_wire(side, Use::Dedicated, server))
    })
}

impl Inbox for SimInbox {
    async fn pull(&mut self, asked: PullRequest) -> Result<(), BrokerError> {
        self.net.with(|state, now| {
            if !state.wires.is_open(self.wire) {
                return Err(BrokerError::Unsent("the connection is gone".to_owned()));
            }
            let (inbox, name) = (self.inbox, self.name.clone());
            let pull = Up::Pull { inbox, name, asked };
            state.wires.send_up(self.wire, pull, now, &mut state.agenda);
            Ok(())
        })
    }

    async fn next(&mut self, into: &mut Vec<Arrival>) -> InboxEvent {
        if self.loss.is_some() {
            return self.ended().await;
        }
        let mut item = self.arrivals.recv().await;
        let had = into.len();
        let lost = loop {
            match item {
                Some(Item::Arrival(arrival)) => into.push(arrival),
                Some(Item::Lost) | None => break true,
            }
            match self.arrivals.try_recv() {
                Ok(next) => item = Some(next),
                Err(mpsc::error::TryRecvError::Empty) => break false,
                Err(mpsc::error::TryRecvError::Disconnected) => break true,
            }
        };
        if into.len() > had || !lost {
            return InboxEvent::Arrived;
        }
        self.ended().await
    }
}

impl Drop for SimInbox {
    fn drop(&mut self) {
        self.net.with(|state, _| {
            if let Some(on) = state.wires.get_mut(self.wire) {
                on.inboxes.remove(&self.inbox);
            }
            if self.dedicated {
                state.lose(self.wire);
            }
        });
    }
}
