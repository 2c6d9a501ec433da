//! Requests on the settling wire of a replica, one at a time, and the pace of all that is sent there.

use std::time::{Duration, Instant};

use fetch_proxy::{
    broker::{ConsumerInfo, ConsumerName, InfoError},
    clock,
};

use super::{
    super::jetstream::{Connection, Time},
    carried::{Answer, Up},
    network::Net,
};

/// The failure of a request.
pub(super) enum Failure {
    Unsent,
    Silent,
}

/// Sends a request on the settling wire, and waits for its answer.
pub(super) async fn ask(
    net: &Net,
    side: usize,
    until: Instant,
    what: impl FnOnce(u64) -> Up,
) -> Result<Answer, Failure> {
    let wire = net.lock().sides[side].settling.ok_or(Failure::Unsent)?;
    if !keep_pace(net, wire, until).await {
        return Err(Failure::Unsent);
    }
    let told = net.with(|state, now| {
        state.wires.is_open(wire).then(|| {
            let (question, told) = state.ask(wire, None);
            state.wires.send_up(wire, what(question), now, &mut state.agenda);
            told
        })
    });
    match tokio::time::timeout_at(until.into(), told.ok_or(Failure::Unsent)?).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) | Err(_) => Err(Failure::Silent),
    }
}

/// Sends something that nobody answers.
pub(super) async fn tell(net: &Net, side: usize, until: Instant, what: Up) {
    let wire = net.lock().sides[side].settling;
    let Some(wire) = wire else { return };
    if keep_pace(net, wire, until).await {
        net.with(|state, now| state.wires.send_up(wire, what, now, &mut state.agenda));
    }
}

pub(super) async fn info(
    net: &Net,
    side: usize,
    name: &ConsumerName,
    until: Instant,
) -> Result<ConsumerInfo, InfoError> {
    info_of(ask_info(net, side, name, until).await)
}

/// The same, and the watch is told what the replica learns from it.
pub(super) async fn look(
    net: &Net,
    side: usize,
    name: &ConsumerName,
    until: Instant,
) -> Result<ConsumerInfo, InfoError> {
    let asked = net.now();
    let answer = ask_info(net, side, name, until).await;
    let delivered = match &answer {
        Ok(Answer::Info { info, old: false }) => {
            // Without a consumer, nothing was forgotten.
            Some((**info).as_ref().map_or(u64::MAX, |info| info.delivered))
        }
        // A leader that leads no more has answered, and the replica cannot know.
        Ok(Answer::Info { .. }) => Some(u64::MAX),
        Ok(_) | Err(_) => None,
    };
    // A refusal for want of a right says nothing about the leader.
    let refused = matches!(answer, Ok(Answer::Refused(_)));
    net.with(|state, now| {
        if let Some(watcher) = state.watcher.as_mut().filter(|_| !refused) {
            watcher.looked((asked, now), side, name, delivered);
        }
    });
    info_of(answer)
}

async fn ask_info(
    net: &Net,
    side: usize,
    name: &ConsumerName,
    until: Instant,
) -> Result<Answer, Failure> {
    ask(net, side, until, |reply| Up::Info { name: name.clone(), reply }).await
}

fn info_of(answer: Result<Answer, Failure>) -> Result<ConsumerInfo, InfoError> {
    match answer {
        Ok(Answer::Info { info, .. }) => *info,
        Ok(Answer::Refused(subject)) => Err(InfoError::Permission(subject)),
        Ok(_) | Err(_) => Err(InfoError::Unavailable("no answer".to_owned())),
    }
}

/// Between two attempts to flush a wire that is not stalled.
const FLUSH_RETRY: Duration = Duration::from_millis(1);

/// Takes a place among the [`super::library::MAX_UNFLUSHED`] messages that the library may have. `false`: there
/// is none by `until`, or the wire is lost.
pub(super) async fn keep_pace(net: &Net, wire: Connection, until: Instant) -> bool {
    loop {
        let full: Option<Time> = {
            let mut state = net.lock();
            let open = state.wires.get_mut(wire).filter(|wire| wire.ends.client);
            let Some(wire) = open else { return false };
            (!wire.library.take_place()).then_some(wire.to_server.stalled)
        };
        let Some(stalled) = full else { return true };
        // After the end of a stall, the library still has frames for a moment.
        let again = net.instant(stalled).max(clock::now() + FLUSH_RETRY);
        clock::sleep_until(Some(again.min(until))).await;
        if clock::now() >= until {
            return false;
        }
    }
}
