//! The broker and the bus of one replica: the ports that the real code uses.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use fetch_proxy::{
    broker::{
        AckPublish, AckSubject, Broker, BrokerError, Confirmation, ConnectionKind, ConsumerInfo,
        ConsumerName, Denial, InfoError, JetStream, Link, Search, Unreadable,
    },
    bus::{Bus, Incoming, RequestError},
    clock,
};
use tokio::sync::mpsc;

use super::{
    super::jetstream::{self, Time},
    carried::{Answer, Up},
    inbox::SimInbox,
    network::Net,
    wires::Event,
};

#[derive(Clone)]
pub struct SimBroker {
    net: Net,
    side: usize,
    heard: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Incoming>>>,
}

enum Asked {
    Unsent,
    Silent,
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

    /// Asks on the settling connection; `None`: there is none, or no answer came.
    async fn ask(&self, until: Instant, what: impl FnOnce(u64) -> Up) -> Result<Answer, Asked> {
        let told = self.net.with(|state, now| {
            let wire = state.sides[self.side].settling?;
            let (question, told) = state.ask(wire);
            state.wires.send_up(wire, what(question), now);
            Some(told)
        });
        let told = told.ok_or(Asked::Unsent)?;
        match tokio::time::timeout_at(until.into(), told).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) | Err(_) => Err(Asked::Silent),
        }
    }

    /// Nobody listens to these settlements: the consumer is gone, or has no leader now. The real broker asks
    /// for INFO, once for all settlements of a consumer that follow each other.
    async fn look_for_a_leader(
        &self,
        orders: &[AckPublish],
        results: &mut [Result<(), BrokerError>],
        until: Instant,
    ) {
        let mut known: Option<(ConsumerName, BrokerError)> = None;
        for (order, result) in orders.iter().zip(results) {
            if *result != Err(Denial::Gone.into()) {
                continue;
            }
            let Some((name, _)) = Self::delivery_of(&order.ack) else { continue };
            let error = match known.take().filter(|(of, _)| *of == name) {
                Some((_, error)) => error,
                None => match self.info(&name, until).await {
                    Err(InfoError::NoStream | InfoError::NoConsumer) => Denial::Gone.into(),
                    Ok(_) | Err(InfoError::Unavailable(_) | InfoError::Permission(_)) => {
                        BrokerError::Unsent("the consumer has no leader".to_owned())
                    }
                },
            };
            known = Some((name, error.clone()));
            *result = Err(error);
        }
    }

    fn stand_for_the_line(
        &self,
        orders: &[AckPublish],
        asked: &[bool],
        results: &mut [Result<(), BrokerError>],
    ) {
        for place in 0..orders.len() {
            if asked[place] || results[place] != Err(BrokerError::Unconfirmed) {
                continue;
            }
            let line = orders[place].confirm_group;
            let last = (place + 1..orders.len()).find(|later| {
                asked[*later] && line.is_some() && orders[*later].confirm_group == line
            });
            if let Some(last) = last
                && results[last] == Ok(())
            {
                results[place] = Ok(());
            }
        }
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
        let asked = self.ask(until, |reply| Up::Info { name: name.clone(), reply }).await;
        match asked {
            Ok(Answer::Info(info)) => *info,
            Ok(_) | Err(_) => Err(InfoError::Unavailable("no answer".to_owned())),
        }
    }

    async fn open(
        &self,
        name: &ConsumerName,
        kind: ConnectionKind,
    ) -> Result<SimInbox, BrokerError> {
        SimInbox::open(&self.net, self.side, name, kind)
    }

    async fn unreadable(
        &self,
        name: &ConsumerName,
        _: u64,
        until: Instant,
    ) -> Result<Search, InfoError> {
        let asked = self.ask(until, |reply| Up::Look { name: name.clone(), reply }).await;
        let Ok(Answer::Found(found)) = asked else {
            return Err(InfoError::Unavailable("no answer".to_owned()));
        };
        let found = found.into_iter().map(|(stream_sequence, ack)| Unreadable {
            ack: AckSubject(ack.into()),
            stream_sequence,
            why: "poison".to_owned(),
        });
        Ok(Search { found: found.collect(), complete: true })
    }

    async fn settle(
        &self,
        orders: Vec<AckPublish>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<Result<(), BrokerError>> {
        let sent = self.net.with(|state, now| {
            let Some(wire) = state.sides[self.side].settling else {
                return orders.iter().map(|_| None).collect::<Vec<_>>();
            };
            let mut sent = Vec::new();
            let mut earliest: Option<Time> = None;
            for (place, order) in orders.iter().enumerate() {
                let by = order.by.map(|by| self.net.at(by));
                if by.is_some_and(|by| by <= now) {
                    sent.push(None);
                    continue;
                }
                earliest = [earliest, by].into_iter().flatten().min();
                // The answer to the last of a line stands for those before it.
                let later = orders[place + 1..].iter();
                let mut later =
                    later.filter(|later| later.by.is_none_or(|by| self.net.at(by) > now));
                let covered = order.confirm_group.is_some()
                    && later.any(|later| later.confirm_group == order.confirm_group);
                let asked = (!covered).then(|| state.ask(wire));
                let (reply, told) = asked.map_or((None, None), |(no, told)| (Some(no), Some(told)));
                let (subject, kind) = (order.ack.clone(), order.kind.clone());
                state.wires.send_up(wire, Up::Ack { subject, kind, reply, by, left: now }, now);
                sent.push(Some(told));
            }
            if let Some(by) = earliest {
                let (pulse, _) = state.ask(wire);
                state.wires.send_up(wire, Up::Pulse(pulse), now);
                state.wires.at(by, Event::Pulse(wire, pulse));
            }
            sent
        });
        let mut results: Vec<Result<(), BrokerError>> = Vec::new();
        let mut asked = Vec::new();
        for told in sent {
            asked.push(matches!(told, Some(Some(_))));
            results.push(match told {
                None => Err(BrokerError::Unsent("too late, or no connection".to_owned())),
                Some(_) if confirmation == Confirmation::Sent => Ok(()),
                Some(None) => Err(BrokerError::Unconfirmed),
                Some(Some(told)) => match tokio::time::timeout_at(until.into(), told).await {
                    Ok(Ok(Answer::Ok)) => Ok(()),
                    Ok(Ok(Answer::NoResponders)) => Err(Denial::Gone.into()),
                    Ok(Ok(_) | Err(_)) | Err(_) => Err(BrokerError::Unconfirmed),
                },
            });
        }
        if confirmation == Confirmation::Confirmed {
            self.stand_for_the_line(&orders, &asked, &mut results);
            self.look_for_a_leader(&orders, &mut results, until).await;
        }
        let now = clock::now();
        for (order, result) in orders.iter().zip(&mut results) {
            let late = order.by.is_some_and(|by| by <= now);
            // JetStream confirms what settled the next holder's delivery, too.
            if late && *result == Ok(()) && confirmation == Confirmation::Confirmed {
                *result = Err(BrokerError::Unconfirmed);
            }
        }
        results
    }

    fn delivery_of(ack: &AckSubject) -> Option<(ConsumerName, u64)> {
        jetstream::parse(&ack.0).map(|parsed| (parsed.name, parsed.delivery_count))
    }

    async fn close(&self, _: Instant) {
        self.net.with(|state, now| state.kill(self.side, now));
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
        match self.ask(until, |reply| Up::Ask { subject, message: question, reply }).await {
            Ok(Answer::Said(answer)) => Ok(answer),
            Ok(Answer::NoResponders) => Err(RequestError::Nobody),
            Ok(_) | Err(Asked::Silent) => Err(RequestError::Silent),
            Err(Asked::Unsent) => Err(RequestError::Unsent("no connection".to_owned())),
        }
    }

    async fn publish(&self, subject: &str, message: Bytes, _: Instant) {
        self.net.with(|state, now| {
            if let Some(wire) = state.sides[self.side].settling {
                state.wires.send_up(wire, Up::Say { subject: subject.to_owned(), message }, now);
            }
        });
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
