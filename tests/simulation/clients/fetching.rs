//! Fetches messages, and reads the answer.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use fetch_proxy::{
    lessor::DeliveryGuard,
    pb::{self, fetch_service_server::FetchService as _},
};
use testkit::dice::Dice;
use tokio::time::sleep;
use tonic::Request;

use super::{
    line::{Back, Trip, call},
    settling::{self, Said},
};
use crate::{
    jetstream::{DeliveryId, Time},
    plan::{ClientPlan, Habit},
    replica::Replica,
    signs::Sign,
    watch::{FetchEnd, FetchId, Reading, Room, Served, Watch},
    world::World,
};

/// More than any answer takes after the wait of its Fetch.
const AFTER_WAIT: Duration = Duration::from_secs(15);

/// A message that a client has.
#[derive(Debug, Clone)]
pub struct Work {
    pub id: DeliveryId,
    pub token: String,
    pub lease: Duration,
    /// When the lease ends, by the replica.
    pub ends: Time,
}

/// What a Fetch settles first.
#[derive(Debug, Clone, Copy)]
pub struct First<'f> {
    pub all: &'f [Said],
    /// Without a confirmation.
    pub sent: bool,
}

impl First<'_> {
    /// Nothing.
    pub const NONE: Self = First { all: &[], sent: false };
}

/// A Fetch waits at its replica until this is dropped: it has an answer, or its call was aborted.
struct WaitsThere(Arc<Mutex<Watch>>, FetchId);

impl WaitsThere {
    fn new(watch: Arc<Mutex<Watch>>, fetch: FetchId, now: Time) -> Self {
        watch.lock().unwrap().fetch_waits(fetch, Some(now));
        Self(watch, fetch)
    }
}

impl Drop for WaitsThere {
    fn drop(&mut self) {
        self.0.lock().unwrap().fetch_waits(self.1, None);
    }
}

/// What a client knows after its Fetch.
#[derive(Debug, Default)]
pub struct Fetched {
    pub work: Vec<Work>,
    /// Of each settlement.
    pub heard: Vec<Reading>,
    pub answered: bool,
    pub refused: bool,
}

/// Draws a request.
pub fn ask_for((world, plan): (&World, &ClientPlan), dice: &mut Dice) -> pb::FetchRequest {
    let mut max_wait = if dice.percent(10) { 0 } else { dice.within(0..8_000) };
    if plan.patient && !world.calm() {
        max_wait += 25_000;
    }
    let name = world.name(plan.consumer);
    let lease = plan.lease.map(|most| {
        let least = if plan.habit == Habit::LongWorker { most * 3 / 4 } else { 1_000 };
        dice.within(least..most.max(least + 1)) as i64
    });
    let codec = if plan.json { pb::Codec::Json } else { pb::Codec::Unspecified };
    pb::FetchRequest {
        stream: name.stream.to_string(),
        consumer: name.consumer.to_string(),
        n: dice.within(1..u64::from(plan.n) + 1) as u32,
        max_wait: testkit::millis(max_wait as i64),
        linger: testkit::millis(plan.linger as i64),
        lease: lease.and_then(testkit::millis),
        worker: format!("client-{}", plan.number),
        max_bytes: if world.calm() { 0 } else { plan.max_bytes },
        codec: codec.into(),
        ..pb::FetchRequest::default()
    }
}

pub async fn fetch(
    (world, plan): (&World, &ClientPlan),
    replica: &Arc<Replica>,
    request: pb::FetchRequest,
    first: First<'_>,
    lost_answers: u64,
    dice: &mut Dice,
) -> Fetched {
    let max_wait = request.max_wait.and_then(|wait| Duration::try_from(wait).ok());
    let mut request = Request::new(request);
    let confirmation =
        if first.sent { pb::Confirmation::Sent } else { pb::Confirmation::Unspecified };
    request.get_mut().settlements = settling::settlements(first.all);
    request.get_mut().confirmation = confirmation.into();
    let mut trip = Trip {
        client: plan.number,
        arrives: None,
        patience: max_wait.unwrap_or_default() + AFTER_WAIT,
        hangs_up: None,
        loses: (1, lost_answers),
    };
    let mut reads = true;
    let impatient = !world.calm() && plan.habit == Habit::Impatient;
    let mut deadline = None;
    if impatient {
        trip.patience = dice.millis(1..4_000);
        match dice.within(0..4) {
            0 => {
                deadline = Some(trip.patience);
                request.set_timeout(trip.patience);
            }
            // An answer that nobody reads is given back within a moment, so nothing is dark for long.
            1 => (reads, trip.patience) = (false, dice.millis(1..1_500)),
            2 => trip.hangs_up = Some(dice.millis(0..12)),
            _ => {}
        }
    }
    let side = replica.side;
    let calls = settling::called(world, first.all, replica, (first.sent, impatient));
    let open = world.watch().fetch_called(side, request.get_ref(), deadline, world.net.now());
    let (service, net, watch) = (replica.service.clone(), world.net.clone(), world.shared_watch());
    let (lessor, most) = (replica.lessor.clone(), replica.most);
    let room = move || {
        let (held, free) = (lessor.held(), lessor.room() as usize);
        Room { side, most, held, free }
    };
    // It does not wait for messages while it settles.
    let settles = !first.all.is_empty();
    let method = async move {
        let arrived = net.now();
        watch.lock().unwrap().fetch_came(open, room(), arrived);
        let waits = (!settles).then(|| WaitsThere::new(watch.clone(), open, arrived));
        let answer = service.fetch(request).await;
        if answer.as_ref().map_or(true, |answer| answer.get_ref().error.is_some()) {
            watch.lock().unwrap().fetch_refused(open, room(), net.now());
        }
        let answer = answer?;
        drop(waits);
        if !reads {
            // It hangs up while it should read: its messages are given back.
            std::future::pending::<()>().await;
        }
        if let Some(messages) = answer.extensions().get::<Arc<DeliveryGuard>>() {
            messages.deliver();
        }
        watch.lock().unwrap().fetch_written(open, answer.get_ref(), net.now());
        Ok((answer.into_inner(), arrived, net.now()))
    };
    let own = Dice::new(dice.within(0..u64::MAX), plan.number);
    let back = call(world, replica, trip, own, method).await;
    let now = world.net.now();
    let of_all = |heard: Reading| vec![heard; first.all.len()];
    let heard = match &back {
        Back::Answer((answer, ..)) => answer.results.iter().map(Reading::of_result).collect(),
        Back::Refused(status) => of_all(Reading::of_status(status)),
        Back::Unsent => of_all(Reading::unsent()),
        Back::GivenUp if !impatient => of_all(Reading::overdue()),
        Back::GivenUp | Back::Lost(_) => of_all(Reading::nothing()),
    };
    settling::ended((world, plan), first.all, replica, calls, &heard);
    let ended = |end: FetchEnd<'_>| world.watch().fetch_ended(open, end, now);
    let answer = match back {
        Back::Answer((answer, arrived, written)) => {
            let served = Served { arrived, written };
            ended(FetchEnd::Answer { answer: &answer, served, received: true });
            Some((answer, served.written))
        }
        Back::Lost(Some((answer, arrived, written))) => {
            let served = Served { arrived, written };
            ended(FetchEnd::Answer { answer: &answer, served, received: false });
            None
        }
        Back::Refused(status) => {
            ended(FetchEnd::Refused(&status));
            sleep(Duration::from_millis(200)).await;
            return Fetched { heard, refused: true, ..Fetched::default() };
        }
        Back::GivenUp if !impatient => {
            ended(FetchEnd::Overdue);
            None
        }
        Back::GivenUp if deadline.is_some() => {
            ended(FetchEnd::Exceeded);
            None
        }
        Back::Unsent | Back::Lost(None) | Back::GivenUp => {
            ended(FetchEnd::Gone);
            None
        }
    };
    let Some((answer, written)) = answer else { return Fetched { heard, ..Fetched::default() } };
    let work = received((world, plan), answer, written, replica);
    Fetched { work, heard, answered: true, refused: false }
}

fn received(
    (world, plan): (&World, &ClientPlan),
    answer: pb::FetchResponse,
    written: Time,
    replica: &Arc<Replica>,
) -> Vec<Work> {
    for rejected in answer.rejected {
        let held = if rejected.token.is_empty() { "" } else { ", still held" };
        world.count(format!("Fetch rejected: {:?}{held}", rejected.cause()));
    }
    let mut work = Vec::new();
    let place = (world, plan, replica.place);
    for message in answer.messages {
        work.push(work_of(place, message, written));
    }
    work
}

/// A message that a client has just got from the replica at this place.
pub fn work_of(
    (world, plan, place): (&World, &ClientPlan, usize),
    message: pb::Delivery,
    written: Time,
) -> Work {
    let nanos = message.publish_time.map_or(0, |time| time.nanos);
    let id = DeliveryId::of(u64::try_from(nanos).unwrap());
    let lease: Duration = message.lease.and_then(|one| one.try_into().ok()).unwrap();
    let (now, ends) = (world.net.now(), written + lease);
    world.note(format_args!(
        "client {} has {id:?} of {} for {lease:?}",
        plan.number, message.stream_sequence
    ));
    world.signs.give(Sign::Fetched, (now, Some(place)));
    world.signs.give(Sign::LeaseEnds, (ends, Some(place)));
    Work { id, token: message.token, lease, ends }
}
