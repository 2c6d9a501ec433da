//! Settlements through the client library, as `src/nats/request_mux.rs` and `src/nats/plan.rs` send them. They
//! leave in order, with a flush after every [`super::library::MAX_UNFLUSHED`]. The last of a group asks for the
//! answer of the whole group.

use std::time::{Duration, Instant};

use fetch_proxy::{
    broker::{AckPublish, BrokerError, Confirmation, ConsumerName, Denial, InfoError},
    clock::{self, Deadline, Reading},
};
use futures_util::future::join_all;
use tokio::sync::oneshot;

use super::{
    super::jetstream::{self, Connection},
    carried::{Ack, Answer, Up},
    network::Net,
    requests::{self, keep_pace},
};

/// The most settlements that one answer confirms: `MAX_PER_CONFIRMATION` of `src/nats/plan.rs`.
const MAX_PER_CONFIRMATION: usize = 64;
/// The same name in `src/nats/settle.rs`.
const LONGEST_QUESTION: Duration = Duration::from_secs(1);

type Told = oneshot::Receiver<Answer>;

pub(super) async fn settle(
    net: &Net,
    side: usize,
    publishes: Vec<AckPublish>,
    confirmation: Confirmation,
    until: Instant,
) -> Vec<Result<(), BrokerError>> {
    let made = clock::reading();
    let by: Vec<_> = publishes.iter().map(|one| one.by.map(|by| Deadline::new(by, made))).collect();
    let Some(wire) = net.lock().sides[side].settling else {
        return publishes.iter().map(|_| Err(unsent())).collect();
    };
    if confirmation == Confirmation::Sent {
        let mut sent = Vec::new();
        for (one, by) in publishes.iter().zip(&by) {
            let left = send(net, (side, wire), one, *by, false, until).await;
            sent.push(left.map(drop).ok_or_else(unsent));
        }
        return sent;
    }
    let began = net.now();
    let confirmed_by = confirmed_by(&publishes);
    let mut told: Vec<Option<Told>> = Vec::new();
    for (place, (one, by)) in publishes.iter().zip(&by).enumerate() {
        match send(net, (side, wire), one, *by, confirmed_by[place] == place, until).await {
            Some(asked) => told.push(asked),
            None => break,
        }
    }
    let sent = told.len();
    let answers: Vec<Option<(Answer, Reading)>> = join_all(told.into_iter().map(|told| async {
        let answer = tokio::time::timeout_at(until.into(), told?).await;
        Some((answer.ok()?.ok()?, clock::reading()))
    }))
    .await;
    let refused = net.with(|state, _| {
        let refused = state.wires.get(wire).map(|wire| wire.refused.iter());
        let since = refused.into_iter().flatten().filter(|(at, _)| *at >= began);
        since.map(|(_, subject)| subject.clone()).collect::<Vec<_>>()
    });
    let mut results = Vec::new();
    // Settlements of one consumer without a responder share one INFO.
    let mut looked_at: Option<(ConsumerName, BrokerError)> = None;
    for (place, one) in publishes.iter().enumerate() {
        let asks = confirmed_by[place] == place;
        let answer = answers.get(confirmed_by[place]).and_then(Option::as_ref);
        // An earlier publish of the subject was refused, and this one was not.
        let answered = asks && matches!(answer, Some((Answer::Ok | Answer::NoResponders, _)));
        results.push(match answer {
            _ if place >= sent => Err(unsent()),
            _ if !answered && refused.iter().any(|subject| **subject == *one.ack.0) => {
                Err(Denial::Permission(one.ack.0.as_ref().to_owned()).into())
            }
            Some((Answer::NoResponders, _)) if !asks => Err(BrokerError::Unconfirmed),
            Some((Answer::NoResponders, _)) => {
                let name = jetstream::parse(&one.ack.0).map(|parsed| parsed.name);
                Err(no_responder(net, side, name, &mut looked_at, until).await)
            }
            // JetStream confirms an ack that settled the next holder's delivery, too.
            Some((_, at)) if by[place].is_some_and(|by| by.passed(at)) => Err(BrokerError::Late),
            Some((Answer::Ok, _)) => Ok(()),
            Some(_) | None => Err(BrokerError::Unconfirmed),
        });
    }
    results
}

/// Gives one settlement to the library. `None`: it will never leave.
async fn send(
    net: &Net,
    (side, wire): (usize, Connection),
    one: &AckPublish,
    by: Option<Deadline>,
    asks: bool,
    until: Instant,
) -> Option<Option<Told>> {
    let until = by.map_or(until, |by| by.at.min(until));
    let name = jetstream::parse(&one.ack.0)?.name;
    if !keep_pace(net, wire, until).await {
        return None;
    }
    let over = by.is_some_and(|by| by.passed(&clock::reading()));
    let by = by.map(|by| net.at(by.at));
    net.with(|state, left| {
        if over || !state.wires.is_open(wire) {
            return None;
        }
        let asked = asks.then(|| state.ask(wire, Some(name.clone())));
        let (reply, told) = asked.map_or((None, None), |(no, told)| (Some(no), Some(told)));
        let (subject, kind) = (one.ack.clone(), one.kind.clone());
        let ack = Up::Ack(Ack { side, name, subject, kind, reply, by, left });
        state.wires.send_up(wire, ack, left, &mut state.agenda);
        if let Some(by) = by {
            state.must_arrive(wire, by, left);
        }
        Some(told)
    })
}

/// For each settlement, the place of the one whose answer confirms it: the last of its group.
fn confirmed_by(publishes: &[AckPublish]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..publishes.len()).collect();
    let mut groups: Vec<(u32, usize, usize)> = Vec::new();
    for (place, one) in publishes.iter().enumerate().rev() {
        let Some(group) = one.confirm_group else { continue };
        match groups.iter_mut().find(|(of, ..)| *of == group) {
            Some((_, last, used)) if *used < MAX_PER_CONFIRMATION => {
                places[place] = *last;
                *used += 1;
            }
            Some((_, last, used)) => (*last, *used) = (place, 1),
            None => groups.push((group, place, 1)),
        }
    }
    places
}

/// Nobody received a settlement: the consumer is gone, or has no leader now.
async fn no_responder(
    net: &Net,
    side: usize,
    name: Option<ConsumerName>,
    looked_at: &mut Option<(ConsumerName, BrokerError)>,
    until: Instant,
) -> BrokerError {
    let Some(name) = name else { return Denial::Gone.into() };
    if let Some((_, error)) = looked_at.as_ref().filter(|(of, _)| *of == name) {
        return error.clone();
    }
    let until = until.min(clock::now() + LONGEST_QUESTION);
    let error = match requests::info(net, side, &name, until).await {
        Err(InfoError::NoStream | InfoError::NoConsumer) => Denial::Gone.into(),
        Ok(_) | Err(InfoError::Permission(_) | InfoError::Unavailable(_)) => {
            BrokerError::Leaderless("the consumer has no leader".to_owned())
        }
    };
    *looked_at = Some((name, error.clone()));
    error
}

fn unsent() -> BrokerError {
    BrokerError::Unsent("it did not leave".to_owned())
}
