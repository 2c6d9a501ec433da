//! Names each Fetch. A client that does not know what became of its Fetch repeats it, or gives it back. Sometimes it
//! asks twice at once, repeats what it has, or gives back what is on its way.

use std::sync::Arc;

use fetch_proxy::pb::{self, fetch_service_server::FetchService as _, settlement::Action};
use testkit::dice::Dice;
use tokio::time::sleep;
use tonic::Request;

use super::{
    Client, PATIENCE,
    fetching::{Fetched, First, Work, ask_for, fetch},
    line::{Back, Trip, call},
    settling::{Said, ask, said},
};
use crate::{plan::ClientPlan, replica::Replica, watch::BackEnd, world::World};

/// How often a client asks again for one attempt, or gives it back.
const TRIES: u32 = 5;
/// How many answers of a hundred such a client loses.
const LOSES: u64 = 25;

impl Client {
    /// A Fetch with a name of its own.
    pub(super) async fn fetch_named(
        &mut self,
        replica: &Arc<Replica>,
        first: First<'_>,
    ) -> Fetched {
        let mut all = Fetched::default();
        if let Some(old) = self.named.take().filter(|_| self.dice.percent(10)) {
            // Its messages are settled, or another worker has them.
            self.world.count("attempt: repeated late");
            let at = self.or_other(replica.clone(), 60);
            all.work = self.repeat_at(&at, &old).await.work;
        }
        self.attempts += 1;
        let name = format!("{}-{}", self.plan.number, self.attempts);
        let request = ask_for((&self.world, &self.plan), &mut self.dice);
        let request = pb::FetchRequest { attempt_id: name, ..request };
        let fetched = match self.dice.within(0..100) {
            0..10 => self.twice_at_once(replica, &request, first).await,
            10..20 => return self.given_back_at_once(replica, &request, first).await,
            _ => {
                let dice = &mut self.dice;
                let who = (&*self.world, &self.plan);
                fetch(who, replica, request.clone(), first, LOSES, dice).await
            }
        };
        let refused = fetched.refused;
        all.heard.clone_from(&fetched.heard);
        self.merge(&mut all, fetched);
        let mut at = replica.clone();
        for _ in 0..TRIES {
            if refused || all.answered || self.world.calm() {
                break;
            }
            at = self.or_other(at, 60);
            match self.dice.within(0..100) {
                0..60 => {
                    let again = self.repeat_at(&at, &request).await;
                    self.merge(&mut all, again);
                }
                60..90 => {
                    self.give_back(at, &request).await;
                    return all;
                }
                // It leaves the rest to the proxy.
                _ => break,
            }
        }
        if !all.work.is_empty() && self.dice.percent(20) && !self.world.calm() {
            self.world.count("attempt: repeated by a client that has its answer");
            let at = self.or_other(at, 50);
            let again = self.repeat_at(&at, &request).await;
            self.merge(&mut all, again);
        }
        self.named = Some(request);
        all
    }

    /// This replica so often in a hundred, or any.
    fn or_other(&mut self, replica: Arc<Replica>, same: u64) -> Arc<Replica> {
        let other = if self.dice.percent(same) { None } else { self.choose() };
        other.unwrap_or(replica)
    }

    /// Adds what another call of the attempt has brought. If there are two tokens, each is good.
    fn merge(&mut self, all: &mut Fetched, other: Fetched) {
        all.answered |= other.answered;
        for work in other.work {
            let known = all.work.iter_mut().find(|known| known.id == work.id);
            match known {
                None => all.work.push(work),
                Some(known) => {
                    let token = if self.dice.percent(50) { &work.token } else { &known.token };
                    *known = Work { token: token.clone(), ..work };
                }
            }
        }
    }

    async fn repeat_at(&mut self, at: &Arc<Replica>, request: &pb::FetchRequest) -> Fetched {
        self.world.count("attempt: repeated");
        let (who, dice) = ((&*self.world, &self.plan), &mut self.dice);
        fetch(who, at, repeated(request), First::NONE, LOSES, dice).await
    }

    /// The second call begins before the first has ended.
    async fn twice_at_once(
        &mut self,
        replica: &Arc<Replica>,
        request: &pb::FetchRequest,
        first: First<'_>,
    ) -> Fetched {
        self.world.count("attempt: two calls at once");
        let other = self.or_other(replica.clone(), 40);
        let (mut dice, mut others) = (self.fork(), self.fork());
        let pause = self.dice.millis(0..400);
        let who = (&*self.world, &self.plan);
        let one = fetch(who, replica, request.clone(), first, LOSES, &mut dice);
        let two = async {
            sleep(pause).await;
            fetch(who, &other, repeated(request), First::NONE, LOSES, &mut others).await
        };
        let (mut one, two) = tokio::join!(one, two);
        one.refused &= two.refused;
        self.merge(&mut one, two);
        one
    }

    /// The attempt is given back before its call has ended, and perhaps before it has begun. Its tokens are good for
    /// nothing then.
    async fn given_back_at_once(
        &mut self,
        replica: &Arc<Replica>,
        request: &pb::FetchRequest,
        first: First<'_>,
    ) -> Fetched {
        self.world.count("attempt: given back at once");
        let other = self.or_other(replica.clone(), 70);
        let (mut dice, others) = (self.fork(), self.fork());
        let (pause, trip) = (self.dice.millis(0..400), self.trip_back());
        let who = (&*self.world, &self.plan);
        let call = fetch(who, replica, request.clone(), first, LOSES, &mut dice);
        let back = async {
            sleep(pause).await;
            give_back(who, &other, request, trip, others).await
        };
        let (mut fetched, done) = tokio::join!(call, back);
        if !done {
            self.give_back(replica.clone(), request).await;
        }
        let work = std::mem::take(&mut fetched.work);
        let is_over = self.world.watch().is_given_back(&request.attempt_id);
        if is_over && self.dice.percent(60) {
            self.say_with_old_tokens(work, replica).await;
        }
        fetched
    }

    /// Gives the attempt back, until a replica says that it has.
    async fn give_back(&mut self, mut at: Arc<Replica>, request: &pb::FetchRequest) {
        for _ in 0..TRIES {
            let (trip, dice) = (self.trip_back(), self.fork());
            let who = (&*self.world, &self.plan);
            if give_back(who, &at, request, trip, dice).await {
                return;
            }
            let pause = self.dice.millis(50..600);
            sleep(pause).await;
            at = self.or_other(at, 70);
        }
    }

    fn trip_back(&mut self) -> Trip {
        let hurried = self.dice.percent(25);
        let patience = if hurried { self.dice.millis(1..60) } else { PATIENCE };
        let loses = (2, 10);
        Trip { client: self.plan.number, arrives: None, patience, hangs_up: None, loses }
    }

    async fn say_with_old_tokens(&mut self, work: Vec<Work>, replica: &Arc<Replica>) {
        let ack = Action::Ack(pb::AckAction {});
        let mut all: Vec<Said> = work.iter().map(|work| said(work.id, &work.token, &ack)).collect();
        all.iter_mut().for_each(|said| said.old = true);
        if !all.is_empty() {
            self.world.count("attempt: Ack by a token that was given back");
            let (trip, dice) = (self.trip(None), self.fork());
            ask((&self.world, &self.plan), &all, replica, trip, dice).await;
        }
    }
}

fn repeated(request: &pb::FetchRequest) -> pb::FetchRequest {
    pb::FetchRequest { attempt_again: true, ..request.clone() }
}

/// Whether the replica has said that the attempt is given back.
async fn give_back(
    (world, plan): (&World, &ClientPlan),
    replica: &Arc<Replica>,
    request: &pb::FetchRequest,
    trip: Trip,
    dice: Dice,
) -> bool {
    let (stream, consumer) = (request.stream.clone(), request.consumer.clone());
    let attempt = request.attempt_id.clone();
    let back = pb::GiveBackRequest { stream, consumer, attempt_id: attempt.clone() };
    let number = world.watch().give_back_called(&attempt, replica.side, world.net.now());
    let service = replica.service.clone();
    let method = async move { Ok(service.give_back(Request::new(back)).await?.into_inner()) };
    let patient = trip.patience >= PATIENCE;
    let back = call(world, replica, trip, dice, method).await;
    let end = match &back {
        Back::Answer(answer) => BackEnd::Done(answer.messages as usize),
        Back::Refused(status) => BackEnd::Refused(status),
        Back::GivenUp if patient => BackEnd::Overdue,
        Back::Unsent | Back::Lost(_) | Back::GivenUp => BackEnd::Gone,
    };
    world.note(format_args!("client {} gives {attempt} back: {end:?}", plan.number));
    world.watch().give_back_ended((&attempt, number), end, world.net.now());
    matches!(back, Back::Answer(_))
}
