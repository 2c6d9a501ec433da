//! The broker port and the bus port on NATS. Only this folder names `async_nats`.
//!
//! ```text
//!            ┌────────────── supervisor ──────────────┐
//!   deliveries connection                    settling connection
//!   one inbox for each consumer, pulls       acks, naks, terms, progress, INFO, replicas
//!   (inbox, delivery)                        (request_mux, settle, info, poison, subscriptions)
//! ```
//!
//! There are two connections, because one stored message with a header that the client library cannot
//! parse costs the connection that brings it. Settling must not fail with that connection. All
//! connections are single-use: a lost connection is dropped with its queue, and a new one is made. The
//! library carries deliveries (`connection`). Settlements have a connection of our own
//! (`settling_connection`, `dial`, `protocol`), because the library cannot end a connection that it still
//! has something to write on, except together with its thread. A consumer that is suspected of such a message can have a dedicated connection for its
//! deliveries. The API answers in JSON, so it can still find a message that is unreadable as a delivery
//! (`poison`, `unreadable`). Nothing here decides what to pull or settle.

mod api;
mod arrival_probe;
mod auth;
mod connection;
mod deadline;
mod delivery;
mod denials;
mod dial;
mod inbox;
mod info;
mod plan;
mod poison;
mod presence;
mod protocol;
mod provision;
mod request_mux;
mod settings;
mod settle;
mod settling_connection;
mod stored;
mod subscriptions;
mod supervisor;
mod supported;
mod unreadable;

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use tokio_util::task::TaskTracker;

pub use self::{
    auth::Auth,
    inbox::NatsInbox,
    protocol::{Malformed, ServerMessage, ServerOp, take_op},
    provision::{Provisioned, Sample, provision},
    settings::{Settings, parse_servers},
    supported::OLDEST_SERVER,
    unreadable::unreadable,
};
use self::{
    plan::{Request, RequestAnswer},
    supervisor::Supervisor,
};
use crate::{
    broker::{
        AckPublish, AckSubject, Broker, BrokerError, Confirmation, ConnectionKind, ConsumerInfo,
        ConsumerName, Delivery, InfoError, JetStream, Link, Search,
    },
    bus::{Bus, Incoming, RequestError},
    metrics::{FamilyId, Metrics},
};

/// JetStream and the other replicas, behind two supervised connections.
pub struct Nats {
    supervisor: Arc<Supervisor>,
}

impl Nats {
    /// Starts to connect, and stays connected until [`Broker::close`]. Returns at once. [`Broker::link`]
    /// shows whether NATS is there.
    pub fn start(settings: Settings, tasks: &TaskTracker) -> Self {
        Self::metered(settings, tasks, &Metrics::off())
    }

    /// The same, with the metrics of its process.
    pub fn metered(settings: Settings, tasks: &TaskTracker, metrics: &Metrics) -> Self {
        let supervisor = Supervisor::start(settings, tasks, metrics.nats().clone());
        let shown = Arc::downgrade(&supervisor);
        metrics.ask(move |sheet| {
            let Some(supervisor) = shown.upgrade() else { return };
            let (deliveries, settling) = (supervisor.deliveries(), supervisor.settling());
            for (role, up) in [("deliveries", deliveries.is_ok()), ("settling", settling.is_ok())] {
                sheet.set_of(FamilyId::NatsUp, [role], f64::from(u8::from(up)));
            }
        });
        Self { supervisor }
    }

    /// The connections for deliveries and for settling, by their purpose. Each with the reason why it is down.
    pub fn connections(&self) -> [(&'static str, Option<String>); 2] {
        [
            ("deliveries", self.supervisor.deliveries().err()),
            ("settling", self.supervisor.settling().err()),
        ]
    }
}

impl Broker for Nats {
    type Inbox = NatsInbox;

    fn link(&self) -> Link {
        self.supervisor.link()
    }

    async fn link_change(&self, seen: &Link) -> Link {
        self.supervisor.link_change(seen).await
    }

    fn jetstream(&self) -> JetStream {
        self.supervisor.presence().get()
    }

    async fn info(&self, name: &ConsumerName, until: Instant) -> Result<ConsumerInfo, InfoError> {
        match self.supervisor.api() {
            Ok(api) => info::read(&api, self.supervisor.presence(), name, until).await,
            Err(why) => Err(InfoError::Unavailable(why)),
        }
    }

    async fn open(
        &self,
        name: &ConsumerName,
        kind: ConnectionKind,
    ) -> Result<NatsInbox, BrokerError> {
        let connection = match kind {
            ConnectionKind::Shared => self.supervisor.deliveries(),
            ConnectionKind::Dedicated => self.supervisor.dedicated(name).await,
        };
        let connection = connection.map_err(BrokerError::Unsent)?;
        NatsInbox::open(connection, self.supervisor.clone(), name).await
    }

    async fn unreadable(
        &self,
        name: &ConsumerName,
        from: u64,
        until: Instant,
    ) -> Result<Search, InfoError> {
        match self.supervisor.api() {
            Ok(api) => poison::find(&api, self.supervisor.presence(), name, from, until).await,
            Err(why) => Err(InfoError::Unavailable(why)),
        }
    }

    async fn read_again(
        &self,
        deliveries: &[AckSubject],
        until: Instant,
    ) -> Result<Vec<Option<Delivery>>, InfoError> {
        match self.supervisor.api() {
            Ok(api) => stored::read(&api, deliveries, until).await,
            Err(why) => Err(InfoError::Unavailable(why)),
        }
    }

    async fn settle(
        &self,
        publishes: Vec<AckPublish>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<Result<(), BrokerError>> {
        match self.supervisor.api() {
            Ok(api) => {
                let presence = self.supervisor.presence();
                settle::settle(&api, presence, publishes, confirmation, until).await
            }
            Err(why) => publishes.iter().map(|_| Err(BrokerError::Unsent(why.clone()))).collect(),
        }
    }

    fn delivery_of(ack: &AckSubject) -> Option<(ConsumerName, u64)> {
        let facts = delivery::AckFacts::parse(&ack.0)?;
        Some((facts.name(), facts.delivery_count))
    }

    async fn close(&self, until: Instant) {
        self.supervisor.close(until).await;
    }
}

impl Bus for Nats {
    async fn request(
        &self,
        subject: &str,
        question: Bytes,
        until: Instant,
    ) -> Result<Bytes, RequestError> {
        let requests = self.supervisor.settling().map_err(RequestError::Unsent)?;
        match requests.ask_one(Request::new(subject, question), until).await {
            Ok(RequestAnswer::Replied(answer)) => Ok(answer),
            Ok(RequestAnswer::NoResponder) => Err(RequestError::Nobody),
            Err(BrokerError::Unsent(why)) => Err(RequestError::Unsent(why)),
            // The server refused the request, so nobody received it.
            Err(BrokerError::Denied(_) | BrokerError::Leaderless(_)) => Err(RequestError::Nobody),
            Err(BrokerError::Late | BrokerError::Unconfirmed) => Err(RequestError::Silent),
        }
    }

    async fn publish(&self, subject: &str, message: Bytes, until: Instant) {
        if let Ok(requests) = self.supervisor.settling() {
            // A loss is harmless: the next heartbeat follows, and a requester's wait is bounded.
            let _ = requests.send(&Request::new(subject, message), None, until).await;
        }
    }

    fn subscribe(&self, subjects: Vec<String>) {
        self.supervisor.subscriptions().set(subjects);
    }

    async fn next(&self) -> Incoming {
        self.supervisor.subscriptions().next().await
    }
}
