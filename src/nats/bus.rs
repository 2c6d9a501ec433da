//! The port between replicas on a real NATS, over the settling connection: what is asked there has
//! the same urgency, and falls with it.

use std::{collections::HashMap, sync::Arc, time::Instant};

use async_nats::Subscriber;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::{
    sync::{Mutex, mpsc, watch},
    task::{AbortHandle, JoinSet},
};

use super::{
    Nats,
    connection::NatsConnection,
    request_mux::{Request, RequestAnswer},
};
use crate::{
    broker::BrokerError,
    bus::{Bus, Incoming, RequestError, SUBJECT_PREFIX},
    clock,
};

/// What was heard and not looked at yet; more than this waits in its subscription.
const CAPACITY: usize = 1024;

/// What is listened on, and what was heard.
pub(super) struct Subscriptions {
    subjects: watch::Sender<Vec<String>>,
    into: mpsc::Sender<Incoming>,
    heard: Mutex<mpsc::Receiver<Incoming>>,
}

impl Subscriptions {
    pub(super) fn new() -> Self {
        let (into, heard) = mpsc::channel(CAPACITY);
        Self { subjects: watch::channel(Vec::new()).0, into, heard: Mutex::new(heard) }
    }

    /// Listens on this connection until it is lost. While the next one listens too, things are heard
    /// twice.
    pub(super) async fn listen(&self, connection: &NatsConnection) {
        let mut subjects = self.subjects.subscribe();
        let mut listening: HashMap<String, AbortHandle> = HashMap::new();
        let mut tasks = JoinSet::new();
        let (since, mut denials) = (clock::now(), connection.denials.watch());
        let mut warned = false;
        loop {
            let wanted = subjects.borrow_and_update().clone();
            listening.retain(|subject, task| {
                let kept = wanted.contains(subject);
                if !kept {
                    // The subscription ends with its task.
                    task.abort();
                }
                kept
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
                            "NATS refuses what replicas talk over: this replica serves alone"
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
        let heard = Incoming {
            subject: message.subject.as_str().to_owned(),
            message: message.payload,
            reply: message.reply.map(|reply| reply.as_str().to_owned()),
        };
        if into.send(heard).await.is_err() {
            return;
        }
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
        let request = Request { subject: subject.into(), payload: question, line: None, by: None };
        match Arc::clone(&requests).ask(&[request], until).await.pop() {
            Some(Ok(RequestAnswer::Replied(answer))) => Ok(answer),
            Some(Ok(RequestAnswer::NoResponder)) => Err(RequestError::Nobody),
            Some(Err(BrokerError::Unsent(why))) => Err(RequestError::Unsent(why)),
            // Not even the server heard it.
            Some(Err(BrokerError::Denied(_))) => Err(RequestError::Nobody),
            Some(Err(BrokerError::Unconfirmed)) | None => Err(RequestError::Silent),
        }
    }

    async fn publish(&self, subject: &str, message: Bytes, until: Instant) {
        if let Ok(requests) = self.supervisor.settling() {
            let request =
                Request { subject: subject.into(), payload: message, line: None, by: None };
            // Nobody waits for it; the next beat, or the asker's patience, makes up for a loss.
            let _ = requests.send(&request, None, until).await;
        }
    }

    fn subscribe(&self, subjects: Vec<String>) {
        self.supervisor.ears().subjects.send_replace(subjects);
    }

    async fn next(&self) -> Incoming {
        match self.supervisor.ears().heard.lock().await.recv().await {
            Some(heard) => heard,
            // Cannot be: a sender is kept beside the receiver.
            None => std::future::pending().await,
        }
    }
}
