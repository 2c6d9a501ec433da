//! The broker and the bus of one replica: the ports that the real code uses.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use fetch_proxy::{
    broker::{
        AckPublish, AckSubject, Broker, BrokerError, Confirmation, ConnectionKind, ConsumerInfo,
        ConsumerName, Delivery, InfoError, JetStream, Link, Search, Unreadable,
    },
    bus::{Bus, Incoming, RequestError},
};
use tokio::sync::mpsc;

use super::{
    super::jetstream,
    carried::{Answer, Up},
    inbox::SimInbox,
    network::Net,
    requests::{self, Failure},
    settle,
};

#[derive(Clone)]
pub struct SimBroker {
    net: Net,
    side: usize,
    heard: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Incoming>>>,
}

impl SimBroker {
    /// A new replica's end of the network.
    pub fn join(net: &Net) -> Self {
        let (into, heard) = mpsc::unbounded_channel();
        let side = net.with(|state, now| state.join(into, now));
        Self { net: net.clone(), side, heard: Arc::new(tokio::sync::Mutex::new(heard)) }
    }

    pub fn side(&self) -> usize {
        self.side
    }
}

impl Broker for SimBroker {
    type Inbox = SimInbox;

    fn link(&self) -> Link {
        self.net.lock().sides[self.side].link.clone()
    }

    async fn link_change(&self, seen: &Link) -> Link {
        let changed = self.net.lock().sides[self.side].link_changed.clone();
        loop {
            let notified = changed.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            let link = self.link();
            if link != *seen {
                return link;
            }
            notified.await;
        }
    }

    fn jetstream(&self) -> JetStream {
        JetStream::There
    }

    async fn info(&self, name: &ConsumerName, until: Instant) -> Result<ConsumerInfo, InfoError> {
        requests::look(&self.net, self.side, name, until).await
    }

    async fn open(
        &self,
        name: &ConsumerName,
        kind: ConnectionKind,
    ) -> Result<SimInbox, BrokerError> {
        SimInbox::open(&self.net, self.side, name, kind).await
    }

    async fn unreadable(
        &self,
        name: &ConsumerName,
        _: u64,
        until: Instant,
    ) -> Result<Search, InfoError> {
        let look = |reply| Up::Look { name: name.clone(), reply };
        let found = match requests::ask(&self.net, self.side, until, look).await {
            Ok(Answer::Found(found)) => found,
            Ok(Answer::Refused(subject)) => return Err(InfoError::Permission(subject)),
            Ok(_) | Err(_) => return Err(InfoError::Unavailable("no answer".to_owned())),
        };
        let found = found.into_iter().map(|(stream_sequence, ack)| Unreadable {
            ack: AckSubject(ack.into()),
            stream_sequence,
            why: "poison".to_owned(),
        });
        Ok(Search { found: found.collect(), complete: true })
    }

    async fn read_again(
        &self,
        deliveries: &[AckSubject],
        until: Instant,
    ) -> Result<Vec<Option<Delivery>>, InfoError> {
        let mut found = Vec::new();
        for ack in deliveries {
            let Some((name, _)) = Self::delivery_of(ack) else {
                found.push(None);
                continue;
            };
            let read = |reply| Up::Read { name, ack: ack.clone(), reply };
            match requests::ask(&self.net, self.side, until, read).await {
                Ok(Answer::Stored(stored)) => found.push(stored.map(|stored| *stored)),
                Ok(Answer::Refused(subject)) => return Err(InfoError::Permission(subject)),
                Ok(_) | Err(_) => return Err(InfoError::Unavailable("no answer".to_owned())),
            }
        }
        Ok(found)
    }

    async fn settle(
        &self,
        publishes: Vec<AckPublish>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<Result<(), BrokerError>> {
        settle::settle(&self.net, self.side, publishes, confirmation, until).await
    }

    fn delivery_of(ack: &AckSubject) -> Option<(ConsumerName, u64)> {
        jetstream::parse(&ack.0).map(|parsed| (parsed.name, parsed.delivery_count))
    }

    async fn close(&self, _: Instant) {
        self.net.accident(|network| network.kill(self.side));
    }
}

impl Bus for SimBroker {
    async fn request(
        &self,
        subject: &str,
        question: Bytes,
        until: Instant,
    ) -> Result<Bytes, RequestError> {
        let subject = subject.to_owned();
        let ask = |reply| Up::Ask { subject, message: question, reply };
        match requests::ask(&self.net, self.side, until, ask).await {
            Ok(Answer::Said(answer)) => Ok(answer),
            Ok(Answer::NoResponders | Answer::Refused(_)) => Err(RequestError::Nobody),
            Ok(_) | Err(Failure::Silent) => Err(RequestError::Silent),
            Err(Failure::Unsent) => Err(RequestError::Unsent("no connection".to_owned())),
        }
    }

    async fn publish(&self, subject: &str, message: Bytes, until: Instant) {
        let say = Up::Say { subject: subject.to_owned(), message };
        requests::tell(&self.net, self.side, until, say).await;
    }

    fn subscribe(&self, subjects: Vec<String>) {
        self.net.with(|state, now| {
            state.sides[self.side].subjects = subjects;
            state.subscribe(self.side, now);
        });
    }

    async fn next(&self) -> Incoming {
        match self.heard.lock().await.recv().await {
            Some(heard) => heard,
            None => std::future::pending().await,
        }
    }
}
