//! The subjects that this replica listens on for other replicas, over the settling connection. Requests
//! of replicas are as urgent as settlements, and fail with them.

use std::collections::BTreeMap;

use async_nats::Subscriber;
use futures_util::StreamExt as _;
use tokio::{
    sync::{Mutex, mpsc, watch},
    task::{AbortHandle, JoinSet},
};

use super::connection::NatsConnection;
use crate::{
    bus::{Incoming, SUBJECT_PREFIX},
    clock,
};

/// Most messages that wait here for their reader. All others wait in their subscription.
const CAPACITY: usize = 1024;

/// The subjects to listen on, and the messages that arrived on them.
pub(super) struct Subscriptions {
    subjects: watch::Sender<Vec<String>>,
    into: mpsc::Sender<Incoming>,
    arrived: Mutex<mpsc::Receiver<Incoming>>,
}

impl Subscriptions {
    pub(super) fn new() -> Self {
        let (into, arrived) = mpsc::channel(CAPACITY);
        Self { subjects: watch::channel(Vec::new()).0, into, arrived: Mutex::new(arrived) }
    }

    /// Listens on exactly these subjects from now on.
    pub(super) fn set(&self, subjects: Vec<String>) {
        self.subjects.send_replace(subjects);
    }

    /// The next message. Cancel-safe.
    pub(super) async fn next(&self) -> Incoming {
        match self.arrived.lock().await.recv().await {
            Some(arrived) => arrived,
            // Impossible: this struct holds a sender, too.
            None => std::future::pending().await,
        }
    }

    /// Listens on this connection until it is lost. While two connections listen, messages arrive twice.
    pub(super) async fn listen(&self, connection: &NatsConnection) {
        let mut subjects = self.subjects.subscribe();
        let mut listening: BTreeMap<String, AbortHandle> = BTreeMap::new();
        let mut tasks = JoinSet::new();
        let (since, mut denials) = (clock::now(), connection.denials.watch());
        let mut warned = false;
        loop {
            let wanted = subjects.borrow_and_update().clone();
            listening.retain(|subject, task| {
                let is_wanted = wanted.contains(subject);
                if !is_wanted {
                    // The subscription ends with its task.
                    task.abort();
                }
                is_wanted
            });
            for subject in wanted {
                if listening.contains_key(&subject) {
                    continue;
                }
                let Ok(subscriber) = connection.client.subscribe(subject.clone()).await else {
                    return;
                };
                listening.insert(subject, tasks.spawn(forward(subscriber, self.into.clone())));
            }
            tokio::select! {
                changed = subjects.changed() => if changed.is_err() { return },
                Ok(()) = denials.changed(), if !warned => {
                    let ours = |subject: &str| subject.starts_with(SUBJECT_PREFIX);
                    if let Some(subject) = connection.denials.find(since, ours) {
                        warned = true;
                        tracing::warn!(
                            subject,
                            "NATS refuses the subjects between replicas: this replica serves alone"
                        );
                    }
                }
                () = connection.lost.cancelled() => return,
            }
        }
    }
}

async fn forward(mut subscriber: Subscriber, into: mpsc::Sender<Incoming>) {
    while let Some(message) = subscriber.next().await {
        let incoming = Incoming {
            subject: message.subject.as_str().to_owned(),
            message: message.payload,
            reply: message.reply.map(|reply| reply.as_str().to_owned()),
        };
        if into.send(incoming).await.is_err() {
            return;
        }
    }
}
