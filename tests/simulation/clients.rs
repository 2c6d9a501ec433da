//! Clients: each takes messages of one consumer, works on them, and settles them, if need be at another
//! replica. [`Habit`] says how.

mod answers;
mod attempts;
mod fetching;
mod line;
mod one_call;
#[cfg(test)]
mod resting;
mod settling;
mod stream_wire;
mod streaming;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fetch_proxy::pb::{self, settlement::Action};
use testkit::dice::Dice;
use tokio::time::{sleep, sleep_until, timeout_at};

use self::{
    fetching::Work,
    line::Trip,
    settling::{Said, ask, said},
};
use super::{
    jetstream::Time,
    plan::{ClientPlan, Habit},
    replica::Replica,
    signs::Sign,
    world::World,
};

/// How often a settlement is tried.
const TRIES: u32 = 6;
/// How long a patient client waits for the answer to a settlement.
const PATIENCE: Duration = Duration::from_secs(8);
/// The most tokens that a keeper has.
const MOST_KEPT: usize = 30;

pub struct Client {
    world: Arc<World>,
    plan: ClientPlan,
    dice: Dice,
    /// Tokens that it keeps for later, if it is a keeper.
    kept: Vec<Work>,
    /// What it says on its next Fetch.
    next: Vec<Errand>,
    /// The names that it has given to Fetch calls.
    attempts: u64,
    /// Its last Fetch with a name.
    named: Option<pb::FetchRequest>,
}

/// What is to be said of a message, until it is done.
struct Errand {
    work: Work,
    action: Action,
    done: bool,
}

impl Client {
    pub fn new(world: Arc<World>, plan: ClientPlan) -> Self {
        let dice = Dice::new(world.plan.seed, 100 + plan.number);
        let (kept, next) = (Vec::new(), Vec::new());
        Self { world, plan, dice, kept, next, attempts: 0, named: None }
    }

    /// Works until the world says that it is over.
    pub async fn run(mut self) {
        while !self.world.over() {
            let Some(replica) = self.choose() else {
                sleep(Duration::from_millis(200)).await;
                continue;
            };
            if self.plan.streams && !self.world.calm() {
                self.work_on_stream(&replica).await;
                let pause = self.dice.millis(10..300);
                sleep(pause).await;
                continue;
            }
            let mut work = self.fetch(&replica).await;
            if self.plan.habit == Habit::Batching && self.dice.percent(30) {
                // Tokens of several replicas.
                if let Some(other) = self.choose() {
                    work.extend(self.fetch(&other).await);
                }
            }
            if self.plan.habit == Habit::Keeper {
                work = self.keep(work).await;
            }
            if work.is_empty() {
                let pause = self.dice.millis(10..300);
                sleep(pause).await;
                continue;
            }
            self.work_on(work, &replica).await;
        }
    }

    async fn work_on(&mut self, work: Vec<Work>, replica: &Arc<Replica>) {
        match self.plan.habit {
            _ if self.world.calm() => self.work_in_turn(work, replica).await,
            Habit::Batching => {
                let longest = work.iter().map(|one| one.lease).min().unwrap_or_default();
                let takes = self.dice.millis(0..millis(longest).clamp(1, 4_000));
                sleep(takes).await;
                self.settle_together(work, replica, None).await;
            }
            Habit::Nervous => {
                let ends = work[0].ends;
                let at = self.nervous_moment(ends).await;
                self.settle_together(work, replica, at).await;
            }
            Habit::Late => {
                self.wait_for_the_end(&work).await;
                self.settle_together(work, replica, None).await;
            }
            Habit::Ordinary
            | Habit::Leaver
            | Habit::LongWorker
            | Habit::Impatient
            | Habit::Repeating
            | Habit::Misusing
            | Habit::Keeper => self.work_in_turn(work, replica).await,
        }
    }

    /// Its own, or any that serves.
    fn choose(&mut self) -> Option<Arc<Replica>> {
        let replicas = self.world.replicas();
        if let Some(home) = self.plan.home.filter(|_| !self.world.calm()) {
            // It does not know whether that serves.
            return Some(replicas[home].clone()).filter(|one| !one.gone.load(Ordering::Relaxed));
        }
        let serves = |one: &Arc<Replica>| {
            one.ready.load(Ordering::Relaxed) && !one.gone.load(Ordering::Relaxed)
        };
        let ready: Vec<_> = replicas.into_iter().filter(serves).collect();
        (!ready.is_empty()).then(|| ready[self.dice.within(0..ready.len() as u64) as usize].clone())
    }

    fn loses(&self) -> u64 {
        if self.plan.habit == Habit::Repeating { 40 } else { 2 }
    }

    fn fork(&mut self) -> Dice {
        Dice::new(self.dice.within(0..u64::MAX), self.plan.number)
    }

    // Work.

    async fn work_in_turn(&mut self, work: Vec<Work>, replica: &Arc<Replica>) {
        for one in work {
            let calm = self.world.calm();
            if !calm && self.dice.percent(self.plan.dies) {
                // It dies; its lease lives on.
                self.world.count("client died with a message");
                continue;
            }
            self.take_time(&one, replica).await;
            let action = self.action();
            let same = self.plan.habit != Habit::Repeating && self.dice.percent(60);
            let at = if same { Some(replica.clone()) } else { self.choose() };
            self.finish(vec![Errand { work: one, action, done: false }], at, None).await;
        }
    }

    /// Works on a message for some time, and perhaps extends its lease.
    async fn take_time(&mut self, work: &Work, replica: &Arc<Replica>) {
        if self.world.calm() {
            let takes = self.dice.millis(5..20);
            return sleep(takes).await;
        }
        if self.plan.habit == Habit::LongWorker {
            let mut lease = work.lease;
            loop {
                let share = self.dice.within(60..100) as u32;
                sleep(lease * share / 100).await;
                if self.world.calm() || self.dice.percent(40) {
                    return;
                }
                match self.extend(work, replica).await {
                    Some(granted) => lease = granted,
                    None => return,
                }
            }
        }
        let longest = millis(work.lease).min(12_000);
        let takes = self.dice.millis(0..longest * 13 / 10 + 1);
        if self.dice.percent(20) {
            sleep(takes / 2).await;
            self.extend(work, replica).await;
        }
        sleep(takes / 2).await;
    }

    /// The lease that was granted.
    async fn extend(&mut self, work: &Work, replica: &Arc<Replica>) -> Option<Duration> {
        let lease = self.dice.percent(50).then(|| self.dice.within(1_000..20_000) as i64);
        let action = Action::Extend(pb::ExtendAction { lease: lease.and_then(testkit::millis) });
        let said = vec![said(work.id, &work.token, &action)];
        let (trip, dice) = (self.trip(None), self.fork());
        let heard = ask((&self.world, &self.plan), &said, replica, trip, dice).await;
        heard.first().and_then(|heard| heard.lease)
    }

    fn action(&mut self) -> Action {
        if self.world.calm() {
            return Action::Ack(pb::AckAction {});
        }
        match self.dice.within(0..100) {
            0..75 => Action::Ack(pb::AckAction {}),
            75..85 => Action::Nak(pb::NakAction { delay: None }),
            85..92 => {
                let delay = self.dice.within(100..5_000) as i64;
                Action::Nak(pb::NakAction { delay: testkit::millis(delay) })
            }
            _ => Action::Term(pb::TermAction { reason: "no use".to_owned() }),
        }
    }

    /// Keeps some tokens, of messages that it works on or not, and says something of one that it has kept
    /// for some time. What it works on now.
    async fn keep(&mut self, work: Vec<Work>) -> Vec<Work> {
        if self.world.calm() {
            self.kept.clear();
            return work;
        }
        let mut now = Vec::new();
        for one in work {
            let (works, keeps) = (self.dice.percent(60), self.dice.percent(60));
            if works {
                now.push(one.clone());
            }
            if keeps || !works {
                self.kept.push(one);
            }
        }
        let many = self.kept.len().saturating_sub(MOST_KEPT);
        self.kept.drain(..many);
        if !self.kept.is_empty() && self.dice.percent(50) {
            let place = self.dice.within(0..self.kept.len() as u64) as usize;
            let work = self.kept[place].clone();
            let (action, at) = (self.action(), self.choose());
            self.world.count("token said again after a time");
            self.finish(vec![Errand { work, action, done: false }], at, None).await;
        }
        now
    }

    /// Waits for an accident, or for the end of a lease. The moment at which the settlement is to arrive.
    async fn nervous_moment(&mut self, ends: Time) -> Option<Time> {
        // Most often a few milliseconds before or after it, and sometimes as it ends.
        let around = if self.dice.percent(30) { 6 } else { self.dice.within(0..13) };
        let at = (ends + Duration::from_millis(around)).saturating_sub(Duration::from_millis(6));
        let wake = at.saturating_sub(Duration::from_millis(1));
        let accident = self.world.signs.accident();
        if timeout_at(self.world.at(wake), accident).await.is_ok() {
            self.world.count("nervous client acts on an accident");
            let most = if self.dice.percent(50) { 4 } else { 40 };
            let wait = self.dice.millis(0..most);
            sleep(wait).await;
            return None;
        }
        self.world.count("nervous client acts on the end of a lease");
        Some(at)
    }

    /// Waits until about the end of the first lease, or for some time after it.
    async fn wait_for_the_end(&mut self, work: &[Work]) {
        let Some(ends) = work.iter().map(|one| one.ends).min() else { return };
        let after = self.dice.millis(0..2_300);
        sleep_until(self.world.at((ends + after).saturating_sub(Duration::from_millis(300)))).await;
    }

    /// Settles all in one call, with mixed actions.
    async fn settle_together(
        &mut self,
        work: Vec<Work>,
        replica: &Arc<Replica>,
        arrives: Option<Time>,
    ) {
        let mut errands = Vec::new();
        for work in work {
            if self.dice.percent(self.plan.dies) {
                self.world.count("client died with a message");
                continue;
            }
            let action = match self.dice.within(0..10) {
                0 => Action::Extend(pb::ExtendAction { lease: None }),
                _ => self.action(),
            };
            errands.push(Errand { work, action, done: false });
        }
        let at = if self.dice.percent(60) { Some(replica.clone()) } else { self.choose() };
        self.finish(errands, at, arrives).await;
    }

    // Settle.

    fn trip(&mut self, arrives: Option<Time>) -> Trip {
        let impatient = self.plan.habit == Habit::Impatient && !self.world.calm();
        let leaves =
            self.plan.habit == Habit::Leaver && !self.world.calm() && self.dice.percent(60);
        let patience = match (impatient, leaves) {
            (true, _) => self.dice.millis(1..500),
            (_, true) => self.dice.millis(8..120),
            _ => PATIENCE,
        };
        Trip {
            client: self.plan.number,
            arrives,
            patience,
            hangs_up: None,
            loses: (2, self.loses()),
        }
    }

    /// Says all now, or on the next Fetch.
    async fn finish(
        &mut self,
        errands: Vec<Errand>,
        at: Option<Arc<Replica>>,
        arrives: Option<Time>,
    ) {
        let errands = if arrives.is_none() { self.defer(errands) } else { Some(errands) };
        if let Some(errands) = errands {
            self.finish_now(errands, at, arrives).await;
        }
    }

    /// Tries until all is done, or it has no more patience.
    async fn finish_now(
        &mut self,
        mut errands: Vec<Errand>,
        mut at: Option<Arc<Replica>>,
        mut arrives: Option<Time>,
    ) {
        for _ in 0..TRIES {
            if errands.iter().all(|errand| errand.done) {
                break;
            }
            if let Some(replica) = at {
                self.settle(&mut errands, &replica, arrives.take()).await;
            }
            if errands.iter().all(|errand| errand.done) {
                break;
            }
            let pause = self.dice.millis(50..1_200);
            sleep(pause).await;
            at = self.choose();
        }
        let now = self.world.net.now();
        let mut watch = self.world.watch();
        errands.iter().for_each(|errand| watch.dropped(errand.work.id, now));
    }

    /// One round: everything that is not done yet, at one replica or two.
    async fn settle(
        &mut self,
        errands: &mut [Errand],
        replica: &Arc<Replica>,
        arrives: Option<Time>,
    ) {
        let mut open = Vec::new();
        let mut all = Vec::new();
        for (place, errand) in errands.iter().enumerate().filter(|(_, errand)| !errand.done) {
            all.push(said(errand.work.id, &errand.work.token, &errand.action));
            open.push(place);
        }
        let (habit, calm) = (self.plan.habit, self.world.calm());
        if habit == Habit::Batching && !calm {
            for place in open.clone() {
                if self.dice.percent(10) {
                    let Errand { work, action, .. } = &errands[place];
                    all.push(said(work.id, &work.token, action));
                    open.push(place);
                }
            }
        }
        self.world.sign(Sign::Settling, Some(replica.place));
        let (trip, dice) = (self.trip(arrives), self.fork());
        let second = (!calm)
            .then(|| match habit {
                Habit::Repeating if self.dice.percent(40) => self.repeat(&all),
                Habit::Misusing if self.dice.percent(50) => self.contradict(errands, &open),
                _ => None,
            })
            .flatten();
        let heard = match second {
            None => ask((&self.world, &self.plan), &all, replica, trip, dice).await,
            Some((other, second)) => {
                let (other_trip, other_dice) = (self.trip(arrives), self.fork());
                let first = ask((&self.world, &self.plan), &all, replica, trip, dice);
                let second =
                    ask((&self.world, &self.plan), &second, &other, other_trip, other_dice);
                tokio::join!(first, second).0
            }
        };
        for (place, heard) in open.into_iter().zip(heard) {
            errands[place].done |= answers::is_final(&heard);
        }
    }

    /// The same, at another replica perhaps.
    fn repeat(&mut self, all: &[Said]) -> Option<(Arc<Replica>, Vec<Said>)> {
        self.world.count("the same settlement at two replicas at once");
        Some((self.choose()?, all.to_vec()))
    }

    /// Other actions on the same tokens.
    fn contradict(
        &mut self,
        errands: &[Errand],
        open: &[usize],
    ) -> Option<(Arc<Replica>, Vec<Said>)> {
        let at = self.choose()?;
        let mut all = Vec::new();
        for place in open {
            let action = self.action();
            let work = &errands[*place].work;
            all.push(said(work.id, &work.token, &action));
        }
        self.world.count("two settlements of one message at once");
        Some((at, all))
    }
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}
