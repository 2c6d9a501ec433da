//! The subjects that this replica listens on for other replicas, over the settling connection. Requests
//! of replicas are as urgent as settlements, and fail with them.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use tokio::sync::{Mutex, mpsc, watch};

use super::{
    protocol::ServerMessage,
    settling_connection::{SettlingConnection, SubjectSubscription},
};
use crate::{
    bus::{Incoming, SUBJECT_PREFIX},
    clock,
};

/// Most messages that wait here for their reader. All others are dropped, as if they had never arrived.
const CAPACITY: usize = 65_536;

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
    pub(super) async fn listen(&self, connection: &Arc<SettlingConnection>) {
        let mut subjects = self.subjects.subscribe();
        let mut listening: BTreeMap<String, SubjectSubscription> = BTreeMap::new();
        let (since, mut denials) = (clock::now(), connection.denials.watch());
        let mut warned = false;
        loop {
            let wanted = subjects.borrow_and_update().clone();
            listening.retain(|subject, _| wanted.contains(subject));
            for subject in wanted {
                if listening.contains_key(&subject) {
                    continue;
                }
                let into = self.into.clone();
                let subscription = connection.subscribe(&subject, move |message, _| {
                    let ServerMessage { subject, reply, payload, .. } = message;
                    // A copy, because a part of a read buffer keeps the whole of it.
                    let message = Bytes::copy_from_slice(&payload);
                    let _ = into.try_send(Incoming { subject, message, reply });
                });
                listening.insert(subject, subscription);
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
