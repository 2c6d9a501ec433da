//! Makes the accidents of a plan happen: each at its time or at its sign.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use tokio::time::{sleep, sleep_until, timeout, timeout_at};

use super::{
    net::{Lanes, Stop},
    outages,
    plan::{Accident, Planned, Victim, When},
    policies,
    replica::{Drained, Replica},
    roads::KEEPALIVE,
    run::check_books,
    signs::Sign,
    watch::{Fate, Trouble},
    world::{FOR_EVER, NOTICED, RECONNECT, World},
};

/// Poison is found and terminated within this.
const POISONED: Duration = Duration::from_secs(60);
/// A drain ends before this, whatever happens to it.
const LONGEST_DRAIN: Duration = Duration::from_secs(100);

fn millis(length: u64) -> Duration {
    Duration::from_millis(length)
}

/// Waits for the time of an accident and makes it happen, if its sign comes while there is trouble.
pub async fn meet(world: Arc<World>, planned: Planned) {
    let Planned { when, mut what } = planned;
    match when {
        When::At(at) if at >= world.plan.trouble => return,
        When::At(at) => sleep_until(world.at(millis(at))).await,
        When::Near { sign, from, millis: after, there } => {
            let end = world.at(world.plan.trouble());
            let (from, length) = (millis(from), millis(after.unsigned_abs()));
            let begins = if after < 0 { from.saturating_sub(length) } else { from };
            sleep_until(world.at(begins).min(end)).await;
            let Ok((at, place)) = timeout_at(end, world.signs.next(sign, from)).await else {
                return world.count("aimed accident whose sign never came");
            };
            let at = if after < 0 { at.saturating_sub(length) } else { at + length };
            sleep_until(world.at(at).min(end)).await;
            if let (true, Some(place), Victim::Replica(replica)) = (there, place, what.victim()) {
                *replica = place;
            }
            world.count(format!("accident aimed at {sign:?}"));
        }
    }
    happen(&world, what).await;
}

async fn happen(world: &Arc<World>, what: Accident) {
    world.note(format_args!("accident {what:?}"));
    let kind = format!("{what:?}");
    let kind = kind.split([' ', '{']).next().unwrap_or_default();
    world.count(format!("accident {kind}"));
    world.signs.give_accident();
    carry_out(world, what).await;
    // Its end is seen, too.
    world.signs.give_accident();
}

async fn carry_out(world: &Arc<World>, what: Accident) {
    match what {
        Accident::Stall { .. } | Accident::Cut { .. } | Accident::Part { .. } => {
            on_wires(world, what).await;
        }
        Accident::PartClient { client, replica, millis: length } => {
            let since = world.net.now();
            world.roads.part(client, replica, since + millis(length));
            sleep(KEEPALIVE.min(millis(length))).await;
            if millis(length) >= KEEPALIVE {
                world.roads.silent(client, replica, since);
            }
        }
        Accident::Restart { .. }
        | Accident::ChangeLeader { .. }
        | Accident::Purge { .. }
        | Accident::Age { .. }
        | Accident::Poison { .. } => at_servers(world, what).await,
        Accident::Reset { .. }
        | Accident::MakeAgain { .. }
        | Accident::Delete { .. }
        | Accident::DeleteMessage { .. }
        | Accident::Pause { .. }
        | Accident::AckWait { .. }
        | Accident::MaxAckPending { .. }
        | Accident::MaxDeliver { .. } => to_consumer(world, what).await,
        Accident::Kill { .. }
        | Accident::Drain { .. }
        | Accident::Roll { .. }
        | Accident::RotateKeys { .. } => by_operator(world, what).await,
        Accident::Policy { consumer, pause, millis: length } => {
            policies::change(world, consumer, millis(pause), millis(length)).await;
        }
        Accident::Clock { replica, ahead } => world.set_clock(replica, ahead),
        Accident::Stop { replica, millis: length } => {
            let replica = world.replica(replica);
            if replica.gone.load(Ordering::Relaxed) {
                return;
            }
            world.trouble(Trouble::Stopped { side: replica.side }, millis(length));
            replica.machine.stop();
            world.net.accident(|network| network.stop_process(replica.side));
            sleep(millis(length)).await;
            if !replica.gone.load(Ordering::Relaxed) {
                world.net.accident(|network| network.resume_process(replica.side));
                replica.machine.resume();
            }
        }
        Accident::Outage(outage) => outages::happen(world, outage).await,
        Accident::Suspend { millis: length } => {
            world.watch().jumps(millis(length), world.net.now());
            for replica in world.replicas() {
                world.trouble(Trouble::Suspended { side: replica.side }, millis(length));
                replica.machine.suspend(millis(length));
            }
            world.net.skip(length);
        }
    }
}

/// What happens between the replicas and NATS.
async fn on_wires(world: &Arc<World>, what: Accident) {
    let side = |replica: usize| world.replica(replica).side;
    match what {
        Accident::Stall { replica, up, down, millis: length } => {
            let side = side(replica);
            world.trouble(Trouble::Wire { side }, millis(length) + RECONNECT);
            let until = world.net.now() + millis(length);
            world.net.accident(|network| network.stall(side, Lanes { up, down }, until));
            sleep(millis(length)).await;
        }
        Accident::Cut { replica, client, server, keep } => {
            let side = side(replica);
            world.trouble(Trouble::Wire { side }, millis(client.max(server)) + RECONNECT);
            let now = world.net.now();
            let (client, server) = (now + millis(client), now + millis(server));
            world.net.accident(|network| network.cut(side, client, server, keep));
        }
        Accident::Part { replica, millis: length } => {
            let side = side(replica);
            world.trouble(Trouble::Wire { side }, millis(length) + NOTICED);
            let until = world.net.now() + millis(length);
            world.net.accident(|network| network.part_from_all(side, until));
            sleep(millis(length)).await;
        }
        _ => {}
    }
}

/// What happens to NATS servers and streams.
async fn at_servers(world: &Arc<World>, what: Accident) {
    match what {
        Accident::Restart { away, forgets, memory, graceful } => {
            world.trouble(Trouble::LeaderAway, millis(away));
            for (consumer, plan) in world.plan.consumers.iter().enumerate() {
                if plan.copies == 1 || !memory {
                    world.trouble_of(&world.name(consumer), Trouble::Restarted, millis(away));
                }
            }
            let how = if graceful { Stop::Graceful } else { Stop::Killed };
            world.net.accident(|network| network.stop_all(how));
            sleep(millis(away)).await;
            let forgets = if graceful { 0 } else { forgets };
            world.net.accident(|network| network.start_all(millis(forgets), memory));
            world.sign(Sign::Leader, None);
        }
        Accident::ChangeLeader { consumer, away, forgets, graceful } => {
            let name = world.name(consumer);
            world.trouble_of(&name, Trouble::LeaderAway, millis(away));
            if world.plan.consumers[consumer].copies == 1 {
                world.trouble_of(&name, Trouble::Restarted, millis(away));
            }
            world.net.accident(|network| network.lose_leader(&name, graceful));
            sleep(millis(away)).await;
            let forgets = if graceful { 0 } else { forgets };
            world.net.accident(|network| network.change_leader(&name, millis(forgets)));
            world.sign(Sign::Leader, None);
        }
        Accident::Purge { stream } => {
            let stream = world.stream(stream);
            world.net.with(|state, now| {
                state.model.purge(&stream, u64::MAX, now);
                world.watch().purged(&stream, now);
            });
        }
        Accident::Age { stream, millis: age } => {
            let stream = world.stream(stream);
            world.net.with(|state, now| {
                state.model.set_max_age(&stream, Some(millis(age)), now);
                world.watch().ages(&stream, millis(age), now);
            });
        }
        Accident::Poison { stream } => {
            let stream = world.stream(stream);
            world.net.with(|state, now| {
                let sequence = state.model.publish(&stream, "poison".into(), true, now);
                world.watch().published(&stream, sequence, Fate::Terminated, now);
            });
            world.trouble(Trouble::Poisoned, POISONED);
        }
        _ => {}
    }
}

async fn to_consumer(world: &Arc<World>, what: Accident) {
    match what {
        Accident::Reset { consumer } => {
            let name = world.name(consumer);
            world.trouble_of(&name, Trouble::MadeAgain, world.lag(consumer));
            world.trouble_of(&name, Trouble::Reset, world.lag(consumer));
            world.net.with(|state, now| state.model.reset(&name, 1, now));
            world.sign(Sign::MadeAgain, None);
        }
        Accident::MakeAgain { consumer } => {
            world.trouble_of(&world.name(consumer), Trouble::MadeAgain, world.lag(consumer));
            world.make(consumer);
            world.sign(Sign::MadeAgain, None);
        }
        Accident::Delete { consumer, away } => {
            let name = world.name(consumer);
            let lasts = away.map_or(FOR_EVER, millis);
            world.trouble_of(&name, Trouble::MadeAgain, lasts);
            world.trouble_of(&name, Trouble::Absent, lasts);
            world.net.with(|state, _| state.model.delete_consumer(&name));
            if let Some(away) = away {
                sleep(millis(away)).await;
                world.make(consumer);
                world.sign(Sign::MadeAgain, None);
            }
        }
        Accident::DeleteMessage { consumer } => {
            let name = world.name(consumer);
            world.net.with(|state, now| {
                if let Some(first) = state.model.unsettled(&name).first() {
                    state.model.remove(&name.stream, *first, now);
                    world.watch().removed(&name.stream, *first, now);
                }
            });
        }
        Accident::Pause { consumer, millis: length } => {
            let name = world.name(consumer);
            world.trouble_of(&name, Trouble::Paused, millis(length));
            world.net.with(|state, now| {
                state.model.pause(&name, Some(now + millis(length)), now);
            });
        }
        Accident::AckWait { consumer, millis: length } => {
            world.update(consumer, |config| config.ack_wait = millis(length));
        }
        Accident::MaxAckPending { consumer, most } => {
            world.update(consumer, |config| config.max_ack_pending = Some(most));
        }
        Accident::MaxDeliver { consumer, most } => {
            world.update(consumer, |config| config.max_deliver = most);
        }
        _ => {}
    }
}

async fn by_operator(world: &Arc<World>, what: Accident) {
    match what {
        Accident::Kill { replica, away } => {
            let victim = world.replica(replica);
            if victim.gone.load(Ordering::Relaxed) {
                return;
            }
            world.trouble(Trouble::Killed { side: victim.side }, Duration::ZERO);
            victim.kill(&world.net);
            world.roads.gone(victim.side);
            world.sign(Sign::Killed, Some(replica));
            sleep(millis(away)).await;
            world.start_again(&victim);
        }
        Accident::Drain { replica, away } => {
            let leaver = world.replica(replica);
            if drain(world, &leaver).await.is_some() {
                sleep(millis(away)).await;
                world.start_again(&leaver);
            }
        }
        Accident::Roll { keys, pause } => {
            if keys {
                world.next_key();
                world.trouble(Trouble::KeyAtFront, FOR_EVER);
            }
            for place in 0..world.plan.replicas.len() {
                let leaver = world.replica(place);
                if drain(world, &leaver).await.is_some() {
                    world.start_again(&leaver);
                }
                sleep(millis(pause)).await;
            }
            if keys {
                world.accident_over(Trouble::KeyAtFront);
            }
        }
        Accident::RotateKeys { pause, keeps } => {
            world.trouble(Trouble::KeyAtFront, FOR_EVER);
            retake(world, &world.next_key(), millis(pause)).await;
            world.accident_over(Trouble::KeyAtFront);
            sleep(millis(keeps)).await;
            retake(world, &world.only_key(), millis(pause)).await;
        }
        _ => {}
    }
}

/// Each replica reads its key file again, one after the other.
async fn retake(world: &Arc<World>, keys: &str, pause: Duration) {
    for replica in world.replicas() {
        sleep(pause).await;
        let _ = replica.machine.sync(|| replica.keys.retake(keys.to_owned()));
    }
}

/// `None`: it is gone or drains already. A killed replica ends its drain, too.
async fn drain(world: &Arc<World>, leaver: &Arc<Replica>) -> Option<()> {
    if leaver.gone.load(Ordering::Relaxed) || leaver.lessor.is_draining() {
        return None;
    }
    let place = leaver.place;
    let side = leaver.side;
    world.trouble(Trouble::Draining { side }, LONGEST_DRAIN);
    world.sign(Sign::Draining, Some(place));
    let sign = {
        let world = world.clone();
        move || world.sign(Sign::HandingOver, Some(place))
    };
    let ending = leaver.machine.run(leaver.clone().drain(sign));
    tokio::pin!(ending);
    let until = world.net.now() + LONGEST_DRAIN;
    let mut drained: Option<Drained> = None;
    while drained.is_none() && world.net.now() < until {
        drained = timeout(Duration::from_millis(500), &mut ending).await.ok();
        if drained.is_none() && leaver.gone.load(Ordering::Relaxed) {
            world.count("killed in a drain");
            break;
        }
    }
    if drained.is_some() {
        check_books(world, leaver);
    }
    let handed_over = drained.is_some_and(|drained| drained.handed_over);
    let left = !drained.is_some_and(|drained| handed_over || drained.settled);
    world.watch().drained(side, handed_over, left, world.net.now());
    world.note(format_args!("{drained:?}"));
    Some(())
}
