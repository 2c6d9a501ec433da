//! Says settlements: many in one call, or one by a method of its own. Tells the watch what was said and heard.

use std::{sync::Arc, time::Duration};

use fetch_proxy::pb::{self, fetch_service_server::FetchService, settlement::Action};
use testkit::dice::Dice;
use tonic::{Request, Response, Status};

use super::line::{Back, Trip, call};
use crate::{
    jetstream::DeliveryId,
    plan::{ClientPlan, Habit},
    replica::Replica,
    watch::{CallId, Kind, Reading},
    world::World,
};

/// What a settlement is said with.
#[derive(Debug, Clone)]
pub struct Said {
    pub id: DeliveryId,
    pub kind: Kind,
    settlement: pb::Settlement,
    /// Its token was given back.
    pub old: bool,
}

/// Asks a replica, and tells the watch what was said and heard.
pub async fn ask(
    (world, plan): (&World, &ClientPlan),
    all: &[Said],
    replica: &Arc<Replica>,
    trip: Trip,
    dice: Dice,
) -> Vec<Reading> {
    let sent = plan.sent && !world.calm();
    let deadline = (plan.habit == Habit::Impatient).then_some(trip.patience);
    let calls = called(world, all, replica, (sent, deadline.is_some()));
    let confirmation = if sent { pb::Confirmation::Sent } else { pb::Confirmation::Unspecified };
    let service = replica.service.clone();
    let settlements = settlements(all);
    let unary = plan.unary && settlements.len() == 1;
    let method = async move {
        let confirmation = confirmation.into();
        if unary {
            let one = settlements.into_iter().next().unwrap();
            return say(&*service, one, confirmation, deadline).await.map(|heard| vec![heard]);
        }
        let request = request(pb::SettleRequest { settlements, confirmation }, deadline);
        // The service has a method of its own by that name.
        let answer = FetchService::settle(&*service, request).await?.into_inner();
        Ok(answer.results.iter().map(Reading::of_result).collect())
    };
    let of_all = |heard: Reading| vec![heard; all.len()];
    let patient = !matches!(plan.habit, Habit::Impatient | Habit::Leaver);
    let heard = match call(world, replica, trip, dice, method).await {
        Back::Answer(heard) => heard,
        Back::Refused(status) => of_all(Reading::of_status(&status)),
        Back::Unsent => of_all(Reading::unsent()),
        Back::GivenUp if patient => of_all(Reading::overdue()),
        Back::GivenUp | Back::Lost(_) => of_all(Reading::nothing()),
    };
    ended((world, plan), all, replica, calls, &heard);
    heard
}

pub fn settlements(all: &[Said]) -> Vec<pb::Settlement> {
    all.iter().map(|said| said.settlement.clone()).collect()
}

/// Tells the watch what is said. `how`: without a confirmation, and under a deadline.
pub fn called(
    world: &World,
    all: &[Said],
    replica: &Replica,
    how: (bool, bool),
) -> Vec<Option<CallId>> {
    let now = world.net.now();
    let called = |said: &Said| {
        let mut watch = world.watch();
        let call = watch.settle_called(replica.side, said.id, &said.action(), how, now);
        if said.old {
            watch.by_old_token(call);
        }
        call
    };
    all.iter().map(called).collect()
}

/// Tells the watch what was heard.
pub fn ended(
    (world, plan): (&World, &ClientPlan),
    all: &[Said],
    replica: &Replica,
    calls: Vec<Option<CallId>>,
    heard: &[Reading],
) {
    assert_eq!(heard.len(), all.len(), "one result for each settlement");
    let now = world.net.now();
    for ((said, call), heard) in all.iter().zip(calls).zip(heard) {
        world.watch().settle_ended(call, heard, now);
        world.note(format_args!(
            "client {}: {:?} {:?} at {}: {}",
            plan.number, said.kind, said.id, replica.side, heard.name
        ));
    }
}

impl Said {
    /// Says it by the number of the delivery in its stream.
    pub fn by_number(mut self, number: u64) -> Self {
        self.settlement.number = number;
        self.settlement.token.clear();
        self
    }

    fn action(&self) -> Action {
        self.settlement.action.clone().unwrap()
    }
}

pub fn said(id: DeliveryId, token: &str, action: &Action) -> Said {
    let kind = match action {
        Action::Ack(_) => Kind::Ack,
        Action::Nak(_) => Kind::Nak,
        Action::Term(_) => Kind::Term,
        Action::Extend(_) => Kind::Extend,
    };
    let settlement =
        pb::Settlement { number: 0, token: token.to_owned(), action: Some(action.clone()) };
    Said { id, kind, settlement, old: false }
}

fn request<T>(message: T, deadline: Option<Duration>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(deadline) = deadline {
        request.set_timeout(deadline);
    }
    request
}

/// Says one settlement by the method of its own.
async fn say<S: FetchService>(
    service: &S,
    one: pb::Settlement,
    confirmation: i32,
    deadline: Option<Duration>,
) -> Result<Reading, Status> {
    let token = one.token;
    Ok(match one.action.unwrap() {
        Action::Ack(_) => {
            let ask = request(pb::AckRequest { token, confirmation }, deadline);
            Reading::of_outcome(service.ack(ask).await?.into_inner().outcome, None, None)
        }
        Action::Nak(pb::NakAction { delay }) => {
            let ask = request(pb::NakRequest { token, delay, confirmation }, deadline);
            let answer = service.nak(ask).await?.into_inner();
            Reading::of_outcome(answer.outcome, None, answer.redeliver_time)
        }
        Action::Term(pb::TermAction { reason }) => {
            let ask = request(pb::TermRequest { token, reason, confirmation }, deadline);
            Reading::of_outcome(service.term(ask).await?.into_inner().outcome, None, None)
        }
        Action::Extend(pb::ExtendAction { lease }) => {
            let ask = request(pb::ExtendRequest { token, lease }, deadline);
            let answer = service.extend(ask).await.map(Response::into_inner)?;
            Reading::of_outcome(pb::Outcome::Extended.into(), answer.lease, None)
        }
    })
}
