//! Test: the task of a stream rests while it has nothing to do. Time that is paused never passes while a task runs.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use fetch_proxy::pb::{self, settlement::Action};
use testkit::dice::Dice;
use tokio::time::{sleep, sleep_until, timeout};

use super::{
    settling,
    stream_wire::{ClientStream, Down},
};
use crate::{
    history::History,
    jetstream::{DeliveryId, Time},
    net::{Net, Weather},
    plan::{ClientPlan, Clocks, ConsumerPlan, Plan, ReplicaPlan, StreamPlan},
    world::World,
};

const HEARTBEAT: Duration = Duration::from_secs(1);
/// One stream costs less than this in ten seconds.
const POLLS: u64 = 5_000;

fn plan() -> Plan {
    Plan {
        seed: 1,
        trouble: 0,
        clocks: Clocks::Near,
        replicas: vec![ReplicaPlan { max_leases: 10, ahead: 0 }],
        streams: vec![StreamPlan {
            backlog: 0,
            messages: 0,
            crowd: 1,
            pause: 1,
            size: 1,
            not_json: 0,
        }],
        consumers: vec![ConsumerPlan {
            stream: 0,
            made: 0,
            ack_wait: 30_000,
            backoff: Vec::new(),
            max_deliver: None,
            max_ack_pending: 10,
            max_batch: None,
            max_bytes: None,
            copies: 1,
            shows_leader: true,
            clustered: false,
            lag: 0,
        }],
        clients: vec![ClientPlan::ordinary(0, 0, 1)],
        accidents: Vec::new(),
    }
}

/// The next frame that fits, and when it was made.
async fn frame(
    stream: &mut ClientStream,
    fits: impl Fn(&pb::ConsumeResponse) -> bool,
) -> Option<(pb::ConsumeResponse, Time)> {
    let next = async {
        loop {
            match stream.next().await {
                Down::Frame(frame, made) if fits(&frame) => return Some((*frame, made)),
                Down::Frame(..) => {}
                Down::End(_) => return None,
            }
        }
    };
    timeout(Duration::from_secs(10), next).await.unwrap_or_default()
}

/// A message is to come, and leaves its stream instead. The client settles its only message so early before the
/// heartbeat. Returns whether the settlement has a result, and the replica rested until then.
async fn settled_before_the_heartbeat(early: u64) -> (bool, bool) {
    let plan = plan();
    let net = Net::new(plan.seed, History::new(false), 1);
    net.accident(|network| network.set_weather(Weather { delay: 1..2, reconnect: 50..60 }));
    let world = Arc::new(World::new(net.clone(), plan, Arc::new(Mutex::default())));
    net.with(|state, now| {
        state.model.add_stream(&world.stream(0));
        state.model.publish(&world.stream(0), "1".into(), false, now);
        state.model.publish(&world.stream(0), "2".into(), false, now);
    });
    world.make(0);
    let driver = tokio::spawn(async move { net.drive().await });
    world.start(0);
    let replica = world.replica(0);
    while !replica.ready.load(Ordering::Relaxed) {
        sleep(Duration::from_millis(10)).await;
    }
    let credit = pb::ConsumeCredit { id: 1, max_leases: Some(1), max_bytes: None };
    let start = pb::ConsumeStart {
        stream: world.stream(0),
        consumer: world.name(0).consumer.to_string(),
        credit: Some(credit),
        heartbeat: HEARTBEAT.try_into().ok(),
        ..Default::default()
    };
    let first = pb::ConsumeRequest { start: Some(start), ..Default::default() };
    let stream = ClientStream::open((&world, 0), &replica, first, &mut Dice::new(early, 1)).await;
    let mut stream = stream.expect("nothing is in the way");
    let (got, made) = frame(&mut stream, |frame| !frame.messages.is_empty()).await.unwrap();
    assert_eq!((got.messages.len(), got.pending), (1, 1));
    world.net.with(|state, now| state.model.remove(&world.stream(0), 2, now));
    sleep_until(world.at(made + HEARTBEAT - Duration::from_millis(early))).await;
    replica.machine.allow_polls(POLLS);
    let ack = Action::Ack(pb::AckAction {});
    let said = settling::said(DeliveryId(1), &got.messages[0].token, &ack);
    let settlements = settling::settlements(&[said]);
    let settle = Some(pb::ConsumeSettle { id: 7, settlements, confirmation: 0 });
    stream.send(pb::ConsumeRequest { settle, ..Default::default() });
    let result = frame(&mut stream, |frame| !frame.results.is_empty()).await;
    driver.abort();
    (result.is_some(), replica.machine.allow_polls(u64::MAX))
}

/// Results wait a moment for messages that are to come. A heartbeat that is due in this moment takes them with it.
#[test]
fn stream_rests_while_its_results_wait_and_a_heartbeat_is_due() {
    for early in 0..20 {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let (result, rested) = runtime.block_on(settled_before_the_heartbeat(early));
        assert!(result && rested, "{early} ms early: result {result}, rested {rested}");
    }
}
