//! The line from a client to a replica: delay, lost requests, lost answers, partitions, deadlines and
//! patience. One call of a method is one trip there and back.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use testkit::dice::Dice;
use tokio::time::{sleep, sleep_until, timeout};
use tonic::Status;

use crate::{jetstream::Time, replica::Replica, roads::KEEPALIVE, world::World};

/// How a call is made.
#[derive(Debug, Clone, Copy)]
pub struct Trip {
    /// Who calls.
    pub client: u64,
    /// When it arrives at the replica; `None`: after some milliseconds.
    pub arrives: Option<Time>,
    /// After so long the client hangs up.
    pub patience: Duration,
    /// It hangs up earlier: so long after the next message comes to a stream.
    pub hangs_up: Option<Duration>,
    /// So often in a hundred the request, or the answer, is lost.
    pub loses: (u64, u64),
}

/// What came back.
pub enum Back<T> {
    Answer(T),
    Refused(Status),
    /// Nobody was reached: nothing has happened.
    Unsent,
    /// Nobody knows. The answer, if it was written.
    Lost(Option<T>),
    /// The client has hung up.
    GivenUp,
}

/// Runs `method` at a replica.
pub async fn call<T: Send + 'static>(
    world: &World,
    replica: &Arc<Replica>,
    trip: Trip,
    mut dice: Dice,
    method: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Back<T> {
    let (there, back) = (dice.millis(0..5), dice.millis(0..5));
    match trip.arrives {
        Some(at) => sleep_until(world.at(at)).await,
        None => sleep(there).await,
    }
    if replica.gone.load(Ordering::Relaxed) {
        return Back::Unsent;
    }
    if !waits_for_road(world, replica, trip.client).await {
        return Back::Lost(None);
    }
    let calm = world.calm();
    if !calm && dice.percent(trip.loses.0) {
        sleep(trip.patience.min(Duration::from_secs(1))).await;
        world.count("request lost");
        return Back::Lost(None);
    }
    let began = world.net.now();
    let mut task = tokio::spawn(replica.machine.run(method));
    let at = (replica.place, replica.side);
    let number = world.roads.open(trip.client, at, began, task.abort_handle());
    let tired = async {
        if let Some(later) = trip.hangs_up {
            let _ = timeout(trip.patience, world.signs.message()).await;
            sleep(later).await;
        } else {
            sleep(trip.patience).await;
        }
    };
    let answer = tokio::select! {
        biased;
        answer = &mut task => Some(answer),
        () = tired => None,
    };
    if answer.is_none() {
        task.abort();
        world.count("call given up by its client");
    }
    world.roads.close(number);
    let road = waits_for_road(world, replica, trip.client).await;
    let back = if road { back } else { Duration::ZERO };
    sleep(back).await;
    let lost = road && !calm && dice.percent(trip.loses.1);
    if lost {
        world.count("answer lost");
    }
    match answer {
        Some(Ok(Ok(answer))) if lost || !road => Back::Lost(Some(answer)),
        Some(Ok(Ok(answer))) => Back::Answer(answer),
        Some(Ok(Err(_))) if lost || !road => Back::Lost(None),
        Some(Ok(Err(status))) => Back::Refused(status),
        // A fault of the replica is a failure of the run.
        Some(Err(ended)) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
        Some(Err(_)) => Back::Lost(None),
        None => Back::GivenUp,
    }
}

/// Waits until a partition is over; `false`: the connection was given up before.
async fn waits_for_road(world: &World, replica: &Arc<Replica>, client: u64) -> bool {
    let now = world.net.now();
    let Some(until) = world.roads.parted(client, replica.place, now) else { return true };
    world.count("call met by a partition of its client");
    sleep_until(world.at(until.min(now + KEEPALIVE))).await;
    until <= now + KEEPALIVE
}
