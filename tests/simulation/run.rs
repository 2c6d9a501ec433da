//! One run: a plan in, a history and what was seen out.
//!
//! ```text
//!  trouble: accidents, messages, clients of all kinds ──▶ calm: all is mended, clients settle at once
//!  ──▶ every consumer is empty, or something was dark for too long ──▶ every replica drains, holding nothing
//! ```

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use testkit::dice::Dice;
use tokio::time::{sleep, sleep_until, timeout};

use super::{
    accidents,
    clients::Client,
    history::History,
    net::{Net, Weather},
    panics,
    plan::{ClientPlan, Plan},
    replica::{LONGEST_LEASE, Replica},
    watch::{Fate, Look, Place, Room, Shared, Trouble, Watch},
    world::{FOR_EVER, World},
};

/// After trouble, everything is settled within this: the longest lease, the longest ack wait, a few times
/// over for messages that replicas pass around.
const DARKEST: Duration = Duration::from_secs(120);

/// A hand-over that never ends keeps places for 30 s, and a pull whose end is never heard keeps them for less.
const PLACES_KEPT: Duration = Duration::from_secs(36);

/// Between two looks from outside.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The tasks of a replica are polled less often than this between two looks.
const MOST_POLLS: u64 = 50_000;

/// No run takes longer than this: five drains of 100 s each, one after the other, and the rest.
const LONGEST: Duration = Duration::from_secs(1_800);

/// The result of a run.
#[derive(Debug, Default)]
pub struct Outcome {
    pub history: History,
    pub watch: Watch,
}

/// Runs a plan from its beginning to its end. A panic on the way is a failure of the run.
pub fn run(plan: &Plan, keep_lines: bool) -> Outcome {
    let (outcome, panics) = panics::catch(|| run_on(plan, keep_lines));
    let mut outcome = outcome.unwrap_or_default();
    outcome.watch.panicked(panics);
    outcome
}

fn run_on(plan: &Plan, keep_lines: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let watch = Arc::new(Mutex::new(Watch::default()));
    let history = runtime.block_on(async {
        let net = Net::new(plan.seed, History::new(keep_lines), plan.servers());
        let watcher = Shared(watch.clone());
        let world = Arc::new(World::new(net.clone(), plan.clone(), watch.clone()));
        let weather = Weather { delay: 1..4, reconnect: 50..1_000 };
        net.accident(|network| network.set_weather(weather));
        net.with(|state, _| {
            state.watcher = Some(Box::new(watcher));
            for stream in 0..plan.streams.len() {
                state.model.add_stream(&world.stream(stream));
            }
        });
        let drive = net.clone();
        let driver = tokio::spawn(async move { drive.drive().await });
        let ran = tokio::spawn(live(world.clone()));
        let why = match timeout(LONGEST, ran).await {
            Ok(Ok(())) => None,
            Ok(Err(panic)) => Some(format!("a task panicked: {panic}")),
            Err(_) => Some(format!("it does not end within {LONGEST:?}")),
        };
        if let Some(why) = why {
            world.watch().fail(world.net.now(), why);
        }
        driver.abort();
        net.with(|state, _| std::mem::replace(&mut state.history, History::new(false)))
    });
    drop(runtime);
    let watch = std::mem::take(&mut *watch.lock().unwrap());
    Outcome { history, watch }
}

async fn live(world: Arc<World>) {
    for place in 0..world.plan.replicas.len() {
        world.start(place);
    }
    let mut trouble = Vec::new();
    for stream in 0..world.plan.streams.len() {
        trouble.push(tokio::spawn(publish(world.clone(), stream)));
    }
    for consumer in 0..world.plan.consumers.len() {
        trouble.push(tokio::spawn(make(world.clone(), consumer)));
    }
    let looking = tokio::spawn(look(world.clone()));
    let mut clients = Vec::new();
    for client in world.plan.clients.clone() {
        clients.push(tokio::spawn(Client::new(world.clone(), client).run()));
    }
    for planned in world.plan.accidents.clone() {
        trouble.push(tokio::spawn(accidents::meet(world.clone(), planned)));
    }
    sleep_until(world.at(world.plan.trouble())).await;
    for task in trouble {
        task.await.unwrap();
    }
    world.calm_down();
    // Whatever the clients of the plan are like, each consumer has one who works.
    for consumer in 0..world.plan.consumers.len() {
        clients.push(tokio::spawn(Client::new(world.clone(), worker(consumer)).run()));
    }
    wait_until_empty(&world).await;
    world.end();
    for client in clients {
        client.await.unwrap();
    }
    looking.await.unwrap();
    for consumer in 0..world.plan.consumers.len() {
        let name = world.name(consumer);
        // A consumer that was deleted for good has lost its messages.
        let unsent = world.net.with(|state, _| state.model.unsent(&name));
        if let Some(left) = world.net.with(|state, _| state.model.left(&name)) {
            world.watch().finished(&name, (&left, &unsent), world.net.now());
        }
    }
    end_all(&world).await;
}

/// Looks at everything from outside, from time to time.
async fn look(world: Arc<World>) {
    while !world.over() {
        let names = (0..world.plan.consumers.len()).map(|consumer| world.name(consumer));
        let looks: Vec<_> = world.net.with(|state, now| {
            let look = |consumer| {
                let (available, full) = state.model.available(&consumer, now);
                let unsettled = state.model.unsettled(&consumer);
                let next = state.model.next(&consumer);
                Look { consumer, unsettled, next, available, full }
            };
            names.map(look).collect()
        });
        let places = world.replicas().into_iter().map(|replica| {
            let ready = replica.ready.load(Ordering::Relaxed);
            Place { side: replica.side, serves: ready && replica.lessor.room() > 0 }
        });
        let (places, now) = (places.collect::<Vec<_>>(), world.net.now());
        world.watch().look(&looks, &places, now);
        look_at_rooms(&world);
        look_at_tasks(&world);
        sleep(LOOK_EVERY).await;
    }
    world.replicas().iter().for_each(|one| _ = one.machine.allow_polls(u64::MAX));
}

/// Looks at the places of each replica that serves.
fn look_at_rooms(world: &World) {
    let replicas = world.replicas().into_iter();
    let serving =
        replicas.filter(|one| !one.gone.load(Ordering::Relaxed) && !one.lessor.is_draining());
    let rooms = serving.map(|one| {
        let (held, free) = (one.held(), one.lessor.room() as usize);
        Room { side: one.side, most: one.most, held, free }
    });
    let (rooms, now) = (rooms.collect::<Vec<_>>(), world.net.now());
    world.watch().look_at_rooms(&rooms, now);
}

/// No task runs without a pause.
fn look_at_tasks(world: &World) {
    for replica in world.replicas() {
        if !replica.machine.allow_polls(MOST_POLLS) {
            let why = format!("a task of replica {} runs without a pause", replica.side);
            world.watch().fail(world.net.now(), why);
        }
    }
}

fn worker(consumer: usize) -> ClientPlan {
    ClientPlan::ordinary(1_000 + consumer as u64, consumer, 8)
}

/// Makes a consumer in its time.
async fn make(world: Arc<World>, consumer: usize) {
    let made = Duration::from_millis(world.plan.consumers[consumer].made);
    let name = world.name(consumer);
    let there_is_none = [Trouble::MadeAgain, Trouble::Absent];
    there_is_none.iter().for_each(|trouble| world.trouble_of(&name, *trouble, FOR_EVER));
    // Longer by each suspension, as everything that is planned.
    sleep_until(world.at(made)).await;
    let now = world.net.now();
    there_is_none.iter().for_each(|trouble| world.watch().first_is_over(*trouble, &name, now));
    world.make(consumer);
}

/// Messages come, now in crowds and now alone.
async fn publish(world: Arc<World>, stream: usize) {
    let mut dice = Dice::new(world.plan.seed, 20 + stream as u64);
    let plan = world.plan.streams[stream].clone();
    let stream = world.stream(stream);
    let json = world.plan.clients.iter().any(|client| client.json);
    let mut left = plan.messages;
    let mut crowd = plan.backlog;
    while left > 0 && world.net.now() < world.plan.trouble() {
        for _ in 0..crowd.min(left) {
            left -= 1;
            let length = dice.within(1..plan.size + 1) as usize;
            let not_json = dice.percent(plan.not_json);
            let text = if not_json { "no JSON" } else { "{}" };
            let payload = format!("{text:length$}");
            world.net.with(|state, now| {
                let sequence = state.model.publish(&stream, payload.into(), false, now);
                let fate = if json && not_json { Fate::Terminated } else { Fate::Plain };
                world.watch().published(&stream, sequence, fate, now);
            });
        }
        world.signs.give_message();
        sleep(dice.millis(100..plan.pause.max(101))).await;
        crowd = dice.within(1..plan.crowd + 1);
    }
}

/// Nothing is dark for longer than its bound.
async fn wait_until_empty(world: &Arc<World>) {
    let mut until = world.net.now() + DARKEST;
    let mut least = usize::MAX;
    loop {
        let left: Vec<(usize, Vec<u64>)> = (0..world.plan.consumers.len())
            .map(|one| (one, world.net.with(|state, _| state.model.unsettled(&world.name(one)))))
            .filter(|(_, left)| !left.is_empty())
            .collect();
        // A last attempt that went back waits at its replica until a worker takes it, even if it has left the stream.
        let held: usize = world.replicas().iter().map(|one| one.held()).sum();
        if left.is_empty() && held == 0 {
            return world.count("emptied");
        }
        // A large backlog with few places takes its time.
        let count = left.iter().map(|(_, left)| left.len()).sum::<usize>() + held;
        if count < least {
            (least, until) = (count, world.net.now() + DARKEST);
        }
        if world.net.now() >= until {
            let why =
                format!("dark for {DARKEST:?} without an accident: {left:?}, and {held} leases");
            return world.watch().fail(world.net.now(), why);
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// Each lease that began at a replica has ended there, or is held.
pub fn check_books(world: &World, replica: &Replica) {
    if let Err(why) = replica.books() {
        let why = format!("the books of replica {} do not balance: {why}", replica.side);
        world.watch().fail(world.net.now(), why);
    }
}

/// Every lease and place is free in the end, and every task ends.
async fn end_all(world: &Arc<World>) {
    // No worker holds anything: what is leased to those that died ends with its lease.
    let ended = world.net.now() + LONGEST_LEASE + Duration::from_secs(5);
    while world.net.now() < ended && world.replicas().iter().any(|one| one.held() > 0) {
        sleep(Duration::from_secs(1)).await;
    }
    // Each open pull and each hand-over gives its places back meanwhile.
    let taken = |one: &Arc<Replica>| {
        !one.gone.load(Ordering::Relaxed) && (one.lessor.room() as usize) < one.most
    };
    let freed = world.net.now() + PLACES_KEPT;
    while world.net.now() < freed && world.replicas().iter().any(taken) {
        sleep(Duration::from_secs(1)).await;
    }
    look_at_rooms(world);
    for replica in world.replicas() {
        if replica.gone.load(Ordering::Relaxed) {
            continue;
        }
        check_books(world, &replica);
        let (held, side) = (replica.held(), replica.side);
        if held > 0 {
            let why = format!("replica {side} holds {held} leases that are nobody's");
            world.watch().fail(world.net.now(), why);
        }
        let drained = replica.machine.run(replica.clone().drain(|| {})).await;
        if !(drained.calls_ended && drained.tasks_ended && (drained.settled || drained.handed_over))
        {
            let why = format!("replica {side} does not end: {drained:?}");
            world.watch().fail(world.net.now(), why);
        }
        check_books(world, &replica);
        let room = replica.lessor.room() as usize;
        if room != replica.most {
            let why = format!("replica {side} has {room} places of {}", replica.most);
            world.watch().fail(world.net.now(), why);
        }
    }
}
