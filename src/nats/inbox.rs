//! The inbox of one consumer on one connection: deliveries and ends of pulls arrive there.
//!
//! An inbox is one subscription on `<prefix>.<random>.*`. It stays while a pull may be open: a pull cannot
//! be cancelled, and a message that comes after an unsubscribe is lost for a whole ack wait. Each pull has
//! its own last token. Status lines carry that token, and deliveries carry the subject of their message.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::{Duration, Instant},
};

use async_nats::Subscriber;
use futures_util::Stream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{connection::NatsConnection, delivery, supervisor::Supervisor};
use crate::{
    broker::{Arrival, BrokerError, ConsumerName, Inbox, InboxEvent, PullEnd, PullRequest},
    clock,
};

/// Most arrivals of one call of `next`: enough to make locks and wake-ups cheap, and few enough that a
/// waiter does not wait for a large pull.
const MAX_ARRIVALS_PER_CALL: usize = 256;
/// The longest wait for the cause of a lost connection. If the server is there, the cause is known at
/// once.
const CLOSE_CAUSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The inbox of one consumer on one connection.
pub struct NatsInbox {
    supervisor: Arc<Supervisor>,
    connection: Arc<NatsConnection>,
    subscriber: Subscriber,
    /// `<inbox>.`, before a pull's number.
    prefix: String,
    /// `$JS.API.CONSUMER.MSG.NEXT.<stream>.<consumer>`.
    next_subject: String,
    opened: Instant,
    refusals: watch::Receiver<u64>,
    /// The last pull, until it is known to be refused.
    pull: Option<u64>,
    /// Whether the ack subject of a delivery was checked for its domain.
    domain_checked: bool,
    /// Set when the loss is noticed.
    loss: Option<Loss>,
}

struct Loss {
    at: Instant,
    /// Cancelled when the settling connection of that moment is lost, too. A message ends only one
    /// connection.
    settling_lost: Option<CancellationToken>,
}

impl NatsInbox {
    pub(super) async fn open(
        connection: Arc<NatsConnection>,
        supervisor: Arc<Supervisor>,
        name: &ConsumerName,
    ) -> Result<Self, BrokerError> {
        let (opened, refusals) = (clock::now(), connection.denials.watch());
        let prefix = format!("{}.", connection.client.new_inbox());
        // Waits only while the connection's queue is full. A lost connection empties or ends its queue.
        let subscriber = tokio::select! {
            subscribed = connection.client.subscribe(format!("{prefix}*")) => {
                subscribed.map_err(|error| BrokerError::Unsent(error.to_string()))?
            }
            () = connection.lost.cancelled() => return Err(gone()),
        };
        let call = format!("CONSUMER.MSG.NEXT.{}.{}", name.stream, name.consumer);
        let next_subject = supervisor.settings().api(&call);
        Ok(Self {
            supervisor,
            connection,
            subscriber,
            prefix,
            next_subject,
            opened,
            refusals,
            pull: None,
            domain_checked: false,
            loss: None,
        })
    }

    /// Waits until the cause of the loss is known.
    async fn ended(&mut self) -> InboxEvent {
        let supervisor = &self.supervisor;
        let loss = self.loss.get_or_insert_with(|| Loss {
            at: clock::now(),
            settling_lost: supervisor.settling().ok().map(|mux| mux.connection.lost.clone()),
        });
        let by_content = self.connection.closed_by_content(loss.at + CLOSE_CAUSE_TIMEOUT).await;
        let alone = loss.settling_lost.as_ref().is_some_and(|lost| !lost.is_cancelled());
        if by_content && alone { InboxEvent::Broken } else { InboxEvent::Lost }
    }

    /// Waits for the first arrival and appends all that are there. `false`: the subscription has ended.
    async fn arrivals(&mut self, into: &mut Vec<Arrival>) -> bool {
        let (subscriber, prefix) = (&mut self.subscriber, &self.prefix);
        poll_fn(|cx| {
            let before = into.len();
            while into.len() - before < MAX_ARRIVALS_PER_CALL {
                match Pin::new(&mut *subscriber).poll_next(cx) {
                    Poll::Ready(Some(message)) => into.extend(delivery::read(message, prefix)),
                    Poll::Ready(None) => return Poll::Ready(into.len() > before),
                    Poll::Pending if into.len() > before => return Poll::Ready(true),
                    Poll::Pending => return Poll::Pending,
                }
            }
            Poll::Ready(true)
        })
        .await
    }

    /// If JetStream has a domain and acks do not name it, NATS carries them to every domain that it
    /// reaches. Logs this once for each connection.
    fn check_domain(&mut self, arrived: &[Arrival]) {
        let ack = arrived.iter().find_map(|arrival| match arrival {
            Arrival::Message(delivery) => Some(&delivery.ack),
            Arrival::End { .. } => None,
        });
        let Some(ack) = ack.filter(|_| !std::mem::replace(&mut self.domain_checked, true)) else {
            return;
        };
        let ours = self.supervisor.settings().domain.clone();
        let Some(domain) = ours.or_else(|| self.connection.client.server_info().domain) else {
            return;
        };
        if delivery::names_domain(ack)
            || self.connection.domain_logged.swap(true, Ordering::Relaxed)
        {
            return;
        }
        tracing::warn!(
            ack = &*ack.0,
            domain,
            "acks name no JetStream domain: they also settle a consumer with the same names in \
             another domain"
        );
    }

    /// The end of the open pull, if the server has refused the pull or the inbox.
    fn refused(&mut self) -> Option<Arrival> {
        let no = self.pull?;
        let (next, inbox) = (&self.next_subject, &self.prefix);
        let of_ours = |subject: &str| subject == next || subject.starts_with(inbox.as_str());
        let subject = self.connection.denials.find(self.opened, of_ours)?;
        self.pull = None;
        Some(Arrival::End { no, end: PullEnd::Permission(subject) })
    }
}

impl Inbox for NatsInbox {
    async fn pull(&mut self, pull: PullRequest) -> Result<(), BrokerError> {
        if self.connection.lost.is_cancelled() {
            return Err(gone());
        }
        let (subject, reply) = (self.next_subject.clone(), format!("{}{}", self.prefix, pull.no));
        self.pull = Some(pull.no);
        let body = request(&pull);
        tokio::select! {
            sent = self.connection.client.publish_with_reply(subject, reply, body.into()) => {
                sent.map_err(|error| BrokerError::Unsent(error.to_string()))
            }
            () = self.connection.lost.cancelled() => Err(gone()),
        }
    }

    async fn next(&mut self, into: &mut Vec<Arrival>) -> InboxEvent {
        loop {
            self.refusals.mark_unchanged();
            if let Some(refusal) = self.refused() {
                into.push(refusal);
                return InboxEvent::Arrived;
            }
            let lost = self.connection.lost.clone();
            let mut refusals = self.refusals.clone();
            tokio::select! {
                biased;
                // First, so that a dying connection is read to its end before it is dropped.
                alive = self.arrivals(into) => {
                    self.check_domain(into);
                    return if alive { InboxEvent::Arrived } else { self.ended().await };
                }
                () = lost.cancelled() => return self.ended().await,
                _ = refusals.changed() => {}
            }
        }
    }
}

fn gone() -> BrokerError {
    BrokerError::Unsent("the connection is gone".to_owned())
}

/// The body of a MSG.NEXT request. Durations are in nanoseconds.
fn request(pull: &PullRequest) -> String {
    let mut body = serde_json::json!({ "batch": pull.batch, "expires": nanos(pull) });
    if pull.no_wait {
        body["no_wait"] = true.into();
    }
    if let Some(max_bytes) = pull.max_bytes {
        body["max_bytes"] = max_bytes.into();
    }
    body.to_string()
}

fn nanos(pull: &PullRequest) -> u64 {
    u64::try_from(pull.expires.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_pull_is_written_as_the_server_reads_it() {
        let expires = Duration::from_secs(5);
        let pull = PullRequest { no: 7, batch: 10, expires, no_wait: true, max_bytes: Some(1000) };
        let body: serde_json::Value = serde_json::from_str(&request(&pull)).unwrap();
        let asked = serde_json::json!({
            "batch": 10, "expires": 5_000_000_000_u64, "no_wait": true, "max_bytes": 1000
        });
        assert_eq!(body, asked);

        let plain = PullRequest { no_wait: false, max_bytes: None, ..pull };
        let body: serde_json::Value = serde_json::from_str(&request(&plain)).unwrap();
        assert_eq!(body, serde_json::json!({ "batch": 10, "expires": 5_000_000_000_u64 }));
    }
}
