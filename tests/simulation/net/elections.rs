//! How the servers of a consumer lose its leader, and elect another one.

use std::{ops::Range, time::Duration};

use fetch_proxy::broker::ConsumerName;

use super::{
    super::jetstream::Time,
    agenda::Event,
    desk::{Desk, NOBODY},
    leaders::{Led, Old},
};

/// A server that hears no leader stands for election after this: nats-server's least and greatest election
/// timeouts, in milliseconds.
const ELECTION: Range<u64> = 4_000..9_000;
/// A leader without a majority steps down after this: it looks every 10 s, for 10 s without one.
const STEPS_DOWN: Range<u64> = 10_000..20_000;
/// A leader that stops on purpose names another one first.
const TRANSFER: Range<u64> = 10..200;
/// The most of the newest state that another leader does not have, in milliseconds.
const FORGETS: Range<u64> = 0..250;

/// How a server stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// An operator stops it. Its leaders step down first.
    Graceful,
    /// Its process is killed. Everybody notices at once.
    Killed,
    /// Its machine is gone. Everybody notices after a while.
    Dark,
}

/// A server stops. Each consumer that it leads has no leader, until another one is elected, or until the
/// server is back if there are no copies.
pub(super) fn stopped(desk: &mut Desk<'_>, server: usize, how: Stop) {
    for name in led_at(desk, server) {
        let copies = desk.leaders.get(&name).is_some_and(|led| led.copies);
        let round = desk.leaders.lose(&name);
        if how == Stop::Graceful {
            desk.model.step_down(&name, desk.now);
        } else {
            desk.model.lose_leader(&name, desk.now);
        }
        tell(desk);
        match how {
            Stop::Graceful if copies => {
                let wait = desk.agenda.dice.millis(TRANSFER);
                desk.agenda.at(desk.now + wait, Event::Elect { name, round });
            }
            _ if copies => elect_later(desk, &name, round),
            _ => {}
        }
    }
    // Leaders elsewhere may have lost their majority.
    for name in desk.leaders.names() {
        let alone = |led: &Led| {
            led.copies && led.at.is_some_and(|at| !desk.servers.has_majority(at, desk.now))
        };
        if desk.leaders.get(&name).is_some_and(alone) {
            let round = desk.leaders.lose(&name);
            desk.model.lose_leader(&name, desk.now);
            tell(desk);
            elect_later(desk, &name, round);
        }
    }
}

/// A server is back. It leads again what has no copies elsewhere, without the changes of the time `forgets`.
pub(super) fn started(desk: &mut Desk<'_>, server: usize, forgets: Duration) {
    for name in desk.leaders.names() {
        let waits = |led: &Led| !led.copies && led.at.is_none() && led.last == server;
        if desk.leaders.get(&name).is_some_and(waits) {
            desk.model.change_leader(&name, forgets, desk.now);
            desk.leaders.elect(&name, server);
            tell(desk);
        }
    }
}

/// Some servers do not hear each other before `until`. A leader that has no majority for longer than an
/// election takes is replaced, and does not know it. A server that hears no leader can be elected, although
/// the leader has a majority.
pub(super) fn parted(desk: &mut Desk<'_>, until: Time) {
    let now = desk.now;
    for name in desk.leaders.names() {
        let Some(led) = desk.leaders.get(&name).filter(|led| led.copies) else { continue };
        let (Some(at), round) = (led.at, led.round) else { continue };
        let timeout = desk.agenda.dice.millis(ELECTION);
        let lasts = now + timeout < until;
        let deaf = (0..desk.servers.count()).any(|one| !desk.servers.in_touch(one, at, now));
        if desk.servers.has_majority(at, now) {
            if deaf && lasts && desk.agenda.dice.percent(50) {
                desk.agenda.at(now + timeout, Event::Elect { name, round });
            }
            continue;
        }
        if !lasts {
            if let Some(led) = desk.leaders.get_mut(&name) {
                led.alone_until = led.alone_until.max(until);
            }
            continue;
        }
        let info = desk.model.info(NOBODY, &name, now).and_then(Result::ok);
        let steps_down = now + desk.agenda.dice.millis(STEPS_DOWN);
        let round = desk.leaders.lose(&name);
        if let (Some(led), Some(info)) = (desk.leaders.get_mut(&name), info) {
            let until = steps_down.min(until);
            led.old = Some(Old { at, info, until });
            desk.agenda.at(until, Event::OldLeaderEnds);
        }
        desk.model.lose_leader(&name, now);
        tell(desk);
        desk.agenda.at(now + timeout, Event::Elect { name, round });
    }
}

/// An election is due.
pub(super) fn elect(desk: &mut Desk<'_>, name: &ConsumerName, round: u64) {
    let Some(led) = desk.leaders.get(name).filter(|led| led.round == round) else { return };
    let nobody = led.at.is_none();
    let forgets = desk.agenda.dice.millis(FORGETS);
    if pass_on(desk, name, forgets) {
        tell(desk);
    } else if nobody {
        elect_later(desk, name, round);
    }
}

/// Another server leads, if one reaches a majority. If no other does, the last one leads again.
pub(super) fn pass_on(desk: &mut Desk<'_>, name: &ConsumerName, forgets: Duration) -> bool {
    let Some((last, copies)) = desk.leaders.get(name).map(|led| (led.last, led.copies)) else {
        desk.model.change_leader(name, forgets, desk.now);
        return true;
    };
    if !copies {
        // A server that is down leads again when it is back.
        if desk.servers.is_up(last) {
            desk.model.change_leader(name, forgets, desk.now);
            desk.leaders.elect(name, last);
        }
        return true;
    }
    let all = 0..desk.servers.count();
    let able: Vec<usize> = all.filter(|one| desk.servers.has_majority(*one, desk.now)).collect();
    let others: Vec<usize> = able.iter().copied().filter(|one| *one != last).collect();
    let able = if others.is_empty() { able } else { others };
    if able.is_empty() {
        return false;
    }
    let at = able[desk.agenda.dice.within(0..able.len() as u64) as usize];
    desk.history.add(desk.now, format_args!("n{} leads {name}", at + 1));
    desk.model.change_leader(name, forgets, desk.now);
    desk.leaders.elect(name, at);
    true
}

/// A replica that only an old leader has answered can hear of the new leader from now on.
pub(super) fn old_leader_ends(desk: &mut Desk<'_>) {
    tell(desk);
}

/// The consumers that this server leads.
fn led_at(desk: &Desk<'_>, server: usize) -> Vec<ConsumerName> {
    let led =
        |name: &ConsumerName| desk.leaders.get(name).is_some_and(|led| led.at == Some(server));
    desk.leaders.names().into_iter().filter(led).collect()
}

pub(super) fn elect_later(desk: &mut Desk<'_>, name: &ConsumerName, round: u64) {
    let wait = desk.agenda.dice.millis(ELECTION);
    desk.agenda.at(desk.now + wait, Event::Elect { name: name.clone(), round });
}

fn tell(desk: &mut Desk<'_>) {
    let now = desk.now;
    if let Some(watcher) = &mut desk.watcher {
        watcher.elected(now);
    }
}
