//! The promises of a monitor, over all histories of nine events: nothing is chosen by chance. The test tries
//! all that can happen to a consumer and to our connection, in every order, with equal states merged.
//! `world` says what happened, and what must hold. `scripts/mutants` shows that the walks find each mistake of
//! `monitor/mutants.txt`.

mod world;

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
};

use world::{Event, Kept, World};

/// Events of a history.
const EVENTS: usize = 9;

/// Events of the leader, and of the way to it.
const LEADING: &[Event] = &[
    Event::Tick,
    Event::Deliver,
    Event::Elected { forgets: false },
    Event::Elected { forgets: true },
    Event::Reset,
    Event::Cut,
    Event::Back { other_server: false },
    Event::Back { other_server: true },
    Event::Answered(0),
    Event::Silence,
    Event::Unanswered,
];

/// The same if a leader that starts again does not show.
const HIDDEN: &[Event] = &[
    Event::Tick,
    Event::Deliver,
    Event::Elected { forgets: false },
    Event::Restarted { forgets: false },
    Event::Restarted { forgets: true },
    Event::Answered(0),
    Event::Silence,
    Event::Unanswered,
    Event::LeaderGone,
];

/// The same for the one server that we are connected to.
const SINGLE: &[Event] = &[
    Event::Tick,
    Event::Deliver,
    Event::Restarted { forgets: false },
    Event::Restarted { forgets: true },
    Event::Cut,
    Event::Back { other_server: false },
    Event::Back { other_server: true },
    Event::Answered(0),
    Event::Silence,
    Event::Unanswered,
];

/// Events of the consumer under its name, and what other replicas say of it.
const NAMED: &[Event] = &[
    Event::Tick,
    Event::Moment,
    Event::Deliver,
    Event::Reset,
    Event::Deleted,
    Event::Created,
    Event::Answered(0),
    Event::Silence,
    Event::Unanswered,
    Event::HeardRead,
    Event::HeardAgain,
    Event::HeardBegan,
];

/// A consumer that has just been made, whose deliveries go to other replicas, too. Such a replica hands its leases over
/// to this one. Nobody needs to have told this one that the deliveries have begun.
const TAKING_OVER: &[Event] = &[
    Event::Tick,
    Event::Deliver,
    Event::DeliverElsewhere,
    Event::SettleElsewhere,
    Event::Send,
    Event::Arrive,
    Event::TakeOver,
    Event::TakeOverStale,
    Event::Reset,
    Event::Answered(0),
    Event::Silence,
    Event::HeardBegan,
    Event::HeardNewcomer,
];

struct Walk {
    alphabet: &'static [Event],
    /// States that were met with so many events left.
    met: Vec<HashSet<u64>>,
    path: Vec<Event>,
    steps: usize,
}

impl Walk {
    fn on(&mut self, world: &World) {
        let left = EVENTS - self.path.len();
        if left == 0 {
            return;
        }
        let mut hasher = DefaultHasher::new();
        world.hash(&mut hasher);
        if !self.met[left].insert(hasher.finish()) {
            return;
        }
        for event in world.possible(self.alphabet) {
            let mut next = world.clone();
            self.steps += 1;
            self.path.push(event);
            if let Err(broken) = next.happen(event) {
                panic!("{broken}\nafter {:?}\n{next:#?}", self.path);
            }
            self.on(&next);
            self.path.pop();
        }
    }
}

fn walk(replicated: bool, leader_shows: bool, alphabet: &'static [Event]) {
    walk_from(World::new(Kept { replicated, leader_shows }), alphabet);
}

fn walk_from(world: Result<World, String>, alphabet: &'static [Event]) {
    let world = world.expect("it begins well");
    let met = vec![HashSet::new(); EVENTS + 1];
    let mut walk = Walk { alphabet, met, path: Vec::new(), steps: 0 };
    walk.on(&world);
    let states: usize = walk.met.iter().map(HashSet::len).sum();
    println!("{} steps, {states} states", walk.steps);
    assert!(states > 1000, "the walk is broken");
}

#[test]
fn replicated_consumer_is_settled_only_while_its_leader_is_known() {
    walk(true, true, LEADING);
}

#[test]
fn replicated_consumer_whose_leader_hides_a_restart_is_distrusted_after_silence() {
    walk(true, false, HIDDEN);
}

#[test]
fn single_server_that_hides_a_restart_is_distrusted_after_silence() {
    walk(false, false, SINGLE);
}

#[test]
fn single_server_tells_of_its_restart_by_its_connection() {
    walk(false, true, SINGLE);
}

#[test]
fn leases_end_with_the_consumer_that_they_are_of() {
    walk(true, true, NAMED);
}

#[test]
fn leases_of_a_single_server_end_with_the_consumer_that_they_are_of() {
    walk(false, true, NAMED);
}

#[test]
fn leases_that_were_taken_over_end_with_a_reset_as_soon_as_info_or_a_replica_shows_it() {
    for replicated in [true, false] {
        walk_from(World::fresh(Kept { replicated, leader_shows: true }), TAKING_OVER);
    }
}
