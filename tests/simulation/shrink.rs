//! Shrinks a plan that fails: leaves out and cuts as much of it as it can while the same check still fails.

use std::time::{Duration, Instant};

use super::{
    plan::{Accident, Habit, Plan, Planned, Victim, When},
    run::{Outcome, run},
    watch::Finding,
};

/// The most runs, and the longest time, that shrinking takes.
const MOST_RUNS: u32 = 300;
const LONGEST: Duration = Duration::from_secs(120);

/// The kind of a failure: its check, and its words without numbers and data.
fn kind_of(finding: &Finding) -> (&'static str, String) {
    let words = finding.why.split([':', '{', '[']).next().unwrap_or_default();
    (finding.check, words.chars().filter(|letter| !letter.is_ascii_digit()).collect())
}

/// The shortest plan that was found, and what came of it.
pub fn shrink(plan: &Plan) -> (Plan, Outcome) {
    let outcome = run(plan, true);
    let kind = outcome.watch.findings().first().map(kind_of);
    let mut hunt =
        Hunt { best: plan.clone(), outcome, kind, runs: 0, until: Instant::now() + LONGEST };
    // Each round may make room for the next, until none does.
    while hunt.round() && !hunt.over() {}
    println!("shrunk in {} runs", hunt.runs);
    (hunt.best, hunt.outcome)
}

struct Hunt {
    best: Plan,
    outcome: Outcome,
    kind: Option<(&'static str, String)>,
    runs: u32,
    until: Instant,
}

impl Hunt {
    fn over(&self) -> bool {
        self.runs >= MOST_RUNS || Instant::now() >= self.until
    }

    /// Tries every smaller plan. Whether one of them still fails.
    fn round(&mut self) -> bool {
        let mut found = self.halves();
        for cut in CUTS {
            let mut place = 0;
            // A cut at this place says `None` when there is no such place.
            while let Some(less) = cut(&self.best, place).filter(|_| !self.over()) {
                if less != self.best && self.still_fails(less) { found = true } else { place += 1 }
            }
        }
        found
    }

    /// Leaves out many accidents at once while there are many.
    fn halves(&mut self) -> bool {
        let mut found = false;
        let mut size = self.best.accidents.len() / 2;
        while size > 1 {
            let mut from = 0;
            while from < self.best.accidents.len() && !self.over() {
                let mut less = self.best.clone();
                let end = (from + size).min(less.accidents.len());
                less.accidents.drain(from..end);
                if self.still_fails(less) { found = true } else { from += size }
            }
            size /= 2;
        }
        found
    }

    fn still_fails(&mut self, less: Plan) -> bool {
        self.runs += 1;
        let tried = run(&less, true);
        // The first finding may be another, which the plan has led to as well.
        let same = tried.watch.findings().iter().any(|finding| self.kind == Some(kind_of(finding)));
        if same {
            (self.best, self.outcome) = (less, tried);
        }
        same
    }
}

/// Makes a plan smaller at one place; `None`: it has no such place.
type Cut = fn(&Plan, usize) -> Option<Plan>;

const CUTS: [Cut; 10] = [
    without_accident,
    without_client,
    without_consumer,
    without_stream,
    without_replica,
    shorter,
    fewer_messages,
    plainer_client,
    plainer_rest,
    smaller_accident,
];

fn without_accident(plan: &Plan, place: usize) -> Option<Plan> {
    let mut less = plan.clone();
    (place < less.accidents.len()).then(|| less.accidents.remove(place))?;
    Some(less)
}

fn without_client(plan: &Plan, place: usize) -> Option<Plan> {
    let mut less = plan.clone();
    let gone = (place < less.clients.len()).then(|| less.clients.remove(place))?.number;
    let of =
        |what: &Accident| matches!(what, Accident::PartClient { client, .. } if *client == gone);
    less.accidents.retain(|planned| !of(&planned.what));
    Some(less)
}

/// Takes out the thing at this place; `None`: there is no such place, or nothing would be left.
fn take_out<T>(things: &mut Vec<T>, gone: usize) -> Option<()> {
    (gone < things.len() && things.len() > 1).then(|| drop(things.remove(gone)))
}

/// The place of a thing after the thing at `gone` was taken out.
fn close_gap(place: &mut usize, gone: usize) {
    *place -= usize::from(*place > gone);
}

/// What is left of the accidents if a victim of theirs goes; the places behind it move up.
fn move_up(
    accidents: &mut Vec<Planned>,
    gone: usize,
    pick: impl for<'v> Fn(Victim<'v>) -> Option<&'v mut usize>,
) {
    accidents.retain_mut(|planned| {
        let Some(place) = pick(planned.what.victim()) else { return true };
        let stays = *place != gone;
        close_gap(place, gone);
        stays
    });
}

fn without_consumer(plan: &Plan, gone: usize) -> Option<Plan> {
    let mut less = plan.clone();
    take_out(&mut less.consumers, gone)?;
    less.clients.retain(|client| client.consumer != gone);
    for client in &mut less.clients {
        close_gap(&mut client.consumer, gone);
    }
    move_up(&mut less.accidents, gone, |victim| match victim {
        Victim::Consumer(place) => Some(place),
        _ => None,
    });
    Some(less)
}

fn without_stream(plan: &Plan, gone: usize) -> Option<Plan> {
    let mut less = plan.clone();
    take_out(&mut less.streams, gone)?;
    // A stream that is used stays.
    if less.consumers.iter().any(|consumer| consumer.stream == gone) {
        return Some(plan.clone());
    }
    for consumer in &mut less.consumers {
        close_gap(&mut consumer.stream, gone);
    }
    move_up(&mut less.accidents, gone, |victim| match victim {
        Victim::Stream(place) => Some(place),
        _ => None,
    });
    Some(less)
}

fn without_replica(plan: &Plan, gone: usize) -> Option<Plan> {
    let mut less = plan.clone();
    take_out(&mut less.replicas, gone)?;
    for client in &mut less.clients {
        client.home.take_if(|home| *home == gone);
        client.home.iter_mut().for_each(|home| close_gap(home, gone));
    }
    move_up(&mut less.accidents, gone, |victim| match victim {
        Victim::Replica(place) => Some(place),
        _ => None,
    });
    Some(less)
}

/// Less trouble: a half, three quarters, nine tenths.
fn shorter(plan: &Plan, place: usize) -> Option<Plan> {
    let share = [500, 750, 900].get(place)?;
    let trouble = plan.trouble * share / 1_000;
    (trouble > 1_000).then(|| Plan { trouble, ..plan.clone() })
}

fn fewer_messages(plan: &Plan, place: usize) -> Option<Plan> {
    let mut less = plan.clone();
    let stream = less.streams.get_mut(place / 3)?;
    match place % 3 {
        0 => stream.messages = if stream.messages > 32 { 32 } else { stream.messages / 2 },
        1 => stream.crowd = 1,
        _ => (stream.size, stream.not_json) = (10, 0),
    }
    if stream.messages == 0 { Some(plan.clone()) } else { Some(less) }
}

/// A client that is more like others.
fn plainer_client(plan: &Plan, place: usize) -> Option<Plan> {
    let mut less = plan.clone();
    let client = less.clients.get_mut(place / 8)?;
    match place % 8 {
        0 => client.habit = Habit::Ordinary,
        1 => client.dies = 0,
        2 => client.n = 1,
        3 => client.lease = None,
        4 => (client.linger, client.max_bytes) = (0, 0),
        5 => (client.json, client.patient) = (false, false),
        6 => client.sent = false,
        _ => {
            (client.unary, client.one_call, client.names) = (false, false, false);
            (client.streams, client.keeps) = (false, false);
        }
    }
    Some(less)
}

/// Consumers and replicas as they usually are.
fn plainer_rest(plan: &Plan, place: usize) -> Option<Plan> {
    let mut less = plan.clone();
    if let Some(replica) = less.replicas.get_mut(place / 2) {
        match place % 2 {
            0 => replica.ahead = 0,
            _ => replica.max_leases = 200,
        }
        return Some(less);
    }
    let place = place - 2 * less.replicas.len();
    let consumer = less.consumers.get_mut(place / 5)?;
    match place % 5 {
        0 => (consumer.lag, _) = (0, consumer.backoff.clear()),
        1 => consumer.max_deliver = None,
        2 => consumer.max_ack_pending = 1_000,
        3 => consumer.made = 0,
        _ => (consumer.max_batch, consumer.max_bytes) = (None, None),
    }
    Some(less)
}

/// An accident of half its size, or at a fixed time.
fn smaller_accident(plan: &Plan, place: usize) -> Option<Plan> {
    let mut less = plan.clone();
    let planned = less.accidents.get_mut(place / 3)?;
    if place % 3 == 2 {
        if let When::Near { millis, .. } = &mut planned.when {
            *millis /= 2;
        }
        return Some(less);
    }
    if let Some(amount) = planned.what.amounts().into_iter().nth(place % 3) {
        *amount = if *amount > 20 { *amount / 2 } else { *amount };
    }
    Some(less)
}

#[test]
fn failures_of_one_kind_differ_in_numbers_and_data_alone() {
    let finding = |check, why: &str| Finding { check, at: Duration::ZERO, why: why.to_owned() };
    let first = finding("holders", "a stale Ack settles the delivery of another: DeliveryId(3)");
    let same = finding("holders", "a stale Ack settles the delivery of another: DeliveryId(77)");
    let others = [
        finding("holders", "a stale Nak settles the delivery of another: DeliveryId(3)"),
        finding("world", "a stale Ack settles the delivery of another: DeliveryId(3)"),
    ];
    assert_eq!(kind_of(&first), kind_of(&same));
    assert!(others.iter().all(|other| kind_of(other) != kind_of(&first)));
}
