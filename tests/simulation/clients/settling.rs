//! Says settlements: many in one call, or one by a method of its own. Tells the watch what was said and heard.

use std::{sync::Arc, time::Duration};

use fetch_proxy::pb::{self, fetch_service_server::FetchService, settlement::Action};
use testkit::dice::Dice;
use tonic::{Request, Response, Status};

use super::{
    answers::Heard,
    line::{Back, Trip, call},
};
use crate::{
    jetstream::DeliveryId,
    plan::{ClientPlan, Habit},
    replica::Replica,
    watch::{Kind, Told},
    world::World,
};

/// What a settlement is said with.
#[derive(Debug, Clone)]
pub struct Said {
    pub id: DeliveryId,
    pub kind: Kind,
    settlement: pb::Settlement,
}

/// Asks a replica, and tells the watch what was said and heard.
pub async fn ask(
    (world, plan): (&World, &ClientPlan),
    all: &[Said],
    replica: &Arc<Replica>,
    trip: Trip,
    dice: Dice,
) -> Vec<Heard> {
    let sent = plan.sent && !world.calm();
    for said in all {
        world.watch().called(said.id, said.kind, sent);
    }
    let confirmation = if sent { pb::Confirmation::Sent } else { pb::Confirmation::Unspecified };
    let deadline = (plan.habit == Habit::Impatient).then_some(trip.patience);
    let service = replica.service.clone();
    let settlements: Vec<_> = all.iter().map(|said| said.settlement.clone()).collect();
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
        Ok(answer.results.into_iter().map(Heard::result).collect())
    };
    let of_all = |heard: Heard| vec![heard; all.len()];
    let heard = match call(world, replica, trip, dice, method).await {
        Back::Answer(heard) => heard,
        Back::Refused(status) => of_all(Heard::status(&status)),
        Back::Unsent => of_all(Heard::nothing("not sent", Told::NotApplied)),
        Back::Lost => of_all(Heard::nothing("no answer", Told::Unknown)),
    };
    assert_eq!(heard.len(), all.len(), "one result for each settlement");
    let now = world.net.now();
    for (said, heard) in all.iter().zip(&heard) {
        let mut watch = world.watch();
        watch.answered(said.id, said.kind, heard.told, &heard.reason, now);
        if let Some(lease) = heard.lease {
            watch.extended(said.id, now, lease.saturating_sub(world.longest_way()));
        }
        drop(watch);
        world.note(format_args!(
            "client {}: {:?} {:?} at {}: {}",
            plan.number, said.kind, said.id, replica.side, heard.reason
        ));
    }
    heard
}

pub fn said(id: DeliveryId, token: &str, action: &Action) -> Said {
    let kind = match action {
        Action::Ack(_) => Kind::Ack,
        Action::Nak(_) => Kind::Nak,
        Action::Term(_) => Kind::Term,
        Action::Extend(_) => Kind::Extend,
    };
    let settlement = pb::Settlement { token: token.to_owned(), action: Some(action.clone()) };
    Said { id, kind, settlement }
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
) -> Result<Heard, Status> {
    let token = one.token;
    Ok(match one.action.unwrap() {
        Action::Ack(_) => {
            let ask = request(pb::AckRequest { token, confirmation }, deadline);
            Heard::outcome(service.ack(ask).await?.into_inner().outcome, None)
        }
        Action::Nak(pb::NakAction { delay }) => {
            let ask = request(pb::NakRequest { token, delay, confirmation }, deadline);
            Heard::outcome(service.nak(ask).await?.into_inner().outcome, None)
        }
        Action::Term(pb::TermAction { reason }) => {
            let ask = request(pb::TermRequest { token, reason, confirmation }, deadline);
            Heard::outcome(service.term(ask).await?.into_inner().outcome, None)
        }
        Action::Extend(pb::ExtendAction { lease }) => {
            let ask = request(pb::ExtendRequest { token, lease }, deadline);
            let answer = service.extend(ask).await.map(Response::into_inner)?;
            Heard::outcome(pb::Outcome::Extended.into(), answer.lease)
        }
    })
}
