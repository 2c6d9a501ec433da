//! The broker port on a real NATS: the only rooms that name `async_nats`.
//!
//! ```text
//!            ┌────────────── Supervisor ──────────────┐
//!   deliveries connection                    settling connection
//!   one inbox a consumer, pulls              acks, naks, terms, progress, INFO
//!   (inbox, delivery)                        (replies, settle, info, poison)
//! ```
//!
//! Two connections, because one stored message with a header that the client library cannot parse
//! costs the connection that brings it, and settling must not fall with it. All are single-use
//! (`connection`): when one breaks, it and everything queued on it is thrown away and a fresh one
//! is built. A consumer that is suspected of such a message may have a connection for its deliveries
//! alone; and what cannot be read as a delivery (`unreadable`) can still be found by the API, which
//! answers in JSON (`poison`). Nothing here decides what to pull or settle.

mod arrival_probe;
mod auth;
mod bus;
mod connection;
mod delivery;
mod inbox;
mod info;
mod plan;
mod poison;
mod presence;
mod provision;
mod request_mux;
mod settle;
mod supervisor;
mod unreadable;

use std::{sync::Arc, time::Instant};

use async_nats::ServerAddr;
use tokio_util::task::TaskTracker;

pub use self::auth::Auth;
pub use self::inbox::NatsInbox;
pub use self::provision::{Provisioned, Sample, provision};
use self::supervisor::Supervisor;
pub use self::unreadable::unreadable;
use crate::broker::{
    AckPublish, AckSubject, Broker, BrokerError, Confirmation, ConnectionKind, ConsumerInfo,
    ConsumerName, InfoError, JetStream, Link, Search,
};

/// Oldest nats-server that this program works with: before 2.10.16 a `+TERM` with a reason can be
/// ignored, and answered as if it were not.
pub const OLDEST_SERVER: semver::Version = semver::Version::new(2, 10, 16);

/// Where NATS is and how to get in.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Servers to try, in any order.
    pub servers: Vec<ServerAddr>,
    /// Who we are.
    pub auth: Auth,
    /// Certificate authorities to trust instead of the system's.
    pub ca: Option<std::path::PathBuf>,
    /// Client certificate and key, both PEM.
    pub identity: Option<(std::path::PathBuf, std::path::PathBuf)>,
    /// TLS begins before the server has said anything.
    pub tls_first: bool,
    /// JetStream domain, for an API prefix of `$JS.<domain>.API`.
    pub domain: Option<String>,
    /// First tokens of every inbox, so that NATS rights can be given for them.
    pub inbox_prefix: String,
}

impl Settings {
    /// Where NATS is, and how it is spoken to, without any secret: for people.
    pub fn told(&self) -> String {
        let server = |server: &ServerAddr| {
            format!("{}://{}:{}", server.scheme(), server.host(), server.port())
        };
        self.servers.iter().map(server).collect::<Vec<_>>().join(",")
    }

    /// The subject of a JetStream API call, like `CONSUMER.INFO.ORDERS.worker`.
    fn api(&self, call: &str) -> String {
        match &self.domain {
            Some(domain) => format!("$JS.{domain}.API.{call}"),
            None => format!("$JS.API.{call}"),
        }
    }
}

/// Reads a list of servers, separated by commas.
///
/// # Errors
/// What is wrong with one of them, for people.
pub fn parse_servers(urls: &str) -> Result<Vec<ServerAddr>, String> {
    if urls.split(',').any(|url| url.trim().is_empty()) {
        return Err(
            "a server is missing: the list is empty, or a comma has no server before or after it"
                .to_owned(),
        );
    }
    let servers = urls.split(',').map(|url| url.trim().parse::<ServerAddr>());
    let servers: Vec<_> = servers.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    // The library would take these for plain TCP, and skip TLS.
    if servers.iter().any(ServerAddr::is_websocket) {
        return Err("WebSocket is not supported: use nats:// or tls://".to_owned());
    }
    Ok(servers)
}

/// A JetStream behind two supervised connections.
pub struct Nats {
    supervisor: Arc<Supervisor>,
}

impl Nats {
    /// Starts to connect, and keeps connected until [`Broker::close`]. Returns at once: whether
    /// NATS is there is [`Broker::link`]'s to say.
    pub fn start(settings: Settings, tasks: &TaskTracker) -> Self {
        Self { supervisor: Supervisor::start(settings, tasks) }
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
        match self.supervisor.settling() {
            Ok(requests) => info::read(&requests, &self.supervisor, name, until).await,
            Err(why) => Err(InfoError::Unavailable(why)),
        }
    }

    async fn open(
        &self,
        name: &ConsumerName,
        place: ConnectionKind,
    ) -> Result<NatsInbox, BrokerError> {
        let connection = match place {
            ConnectionKind::Shared => self.supervisor.deliveries(),
            ConnectionKind::Dedicated => self.supervisor.apart(name).await,
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
        match self.supervisor.settling() {
            Ok(requests) => poison::find(&requests, &self.supervisor, name, from, until).await,
            Err(why) => Err(InfoError::Unavailable(why)),
        }
    }

    async fn settle(
        &self,
        publishes: Vec<AckPublish>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<Result<(), BrokerError>> {
        match self.supervisor.settling() {
            Ok(requests) => {
                settle::settle(&requests, &self.supervisor, publishes, confirmation, until).await
            }
            Err(why) => publishes.iter().map(|_| Err(BrokerError::Unsent(why.clone()))).collect(),
        }
    }

    fn delivery_of(ack: &AckSubject) -> Option<(ConsumerName, u64)> {
        let count = delivery::AckFacts::parse(&ack.0)?.delivery_count;
        Some((settle::consumer_of(&ack.0)?, count))
    }

    async fn close(&self, until: Instant) {
        self.supervisor.close(until).await;
    }
}
