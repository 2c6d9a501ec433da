//! What was sent and never answered must not hurt the next worker: it goes with its connection.

use std::time::Duration;

use fetch_proxy::{
    broker::{Confirmation, Verdict},
    clock,
    lease::LeaseId,
    lessor::{Action, Ask, Codec, Error, FetchAsk, Lessor, Limits, Settled},
};

use super::fake::{FakeBroker, Fault, info};

const ACK_WAIT: Duration = Duration::from_secs(10);

fn start() -> (FakeBroker, Lessor<FakeBroker>) {
    let broker = FakeBroker::new(info(ACK_WAIT));
    let limits =
        Limits { max_leases: 100, max_waiters: 10, settle_timeout: Duration::from_millis(500) };
    (broker.clone(), Lessor::start(broker, limits))
}

async fn leased(
    broker: &FakeBroker,
    lessor: &Lessor<FakeBroker>,
    lease: Option<Duration>,
) -> LeaseId {
    broker.publish("x");
    let ask = FetchAsk {
        name: broker.name(),
        n: 1,
        max_bytes: 4_000_000,
        max_wait: Duration::from_secs(10),
        linger: Duration::ZERO,
        lease,
        codec: Codec::Raw,
        patience: None,
    };
    let fetched = lessor.fetch(ask).await.unwrap();
    let id = fetched.messages()[0].id;
    fetched.delivered();
    id
}

async fn settle(
    lessor: &Lessor<FakeBroker>,
    leases: &[LeaseId],
    confirmation: Confirmation,
) -> Vec<Result<Settled, Error>> {
    let until = clock::now() + ACK_WAIT;
    let ask = |lease: &LeaseId| Ask { lease: *lease, action: Action::Nak(Duration::ZERO) };
    lessor.settle(leases.iter().map(ask).collect(), confirmation, until).await
}

/// How long from now until the connection is given up, if it is within an ack wait.
async fn given_up(broker: &FakeBroker) -> Option<Duration> {
    let began = clock::now();
    while broker.abandoned() == 0 {
        if clock::now() - began > ACK_WAIT {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Some(clock::now() - began)
}

#[tokio::test(start_paused = true)]
async fn a_nak_that_was_only_sent_costs_a_silent_connection_before_its_lease_would_end() {
    let (broker, lessor) = start();
    let lease = leased(&broker, &lessor, None).await;
    broker.silence(true);
    assert!(settle(&lessor, &[lease], Confirmation::Sent).await[0].is_ok());
    let after = given_up(&broker).await.expect("it may fire into the next worker's delivery");
    assert!(after > Duration::from_secs(8) && after < ACK_WAIT, "{after:?}");
}

#[tokio::test(start_paused = true)]
async fn a_settlement_that_was_never_answered_costs_a_silent_connection_too() {
    let (broker, lessor) = start();
    let lease = leased(&broker, &lessor, None).await;
    broker.silence(true);
    broker.script([Fault::Lost]);
    let results = settle(&lessor, &[lease], Confirmation::Confirmed).await;
    assert_eq!(results, [Err(Error::Unconfirmed)]);
    let after = given_up(&broker).await.expect("it may fire into the next worker's delivery");
    assert!(after > Duration::from_secs(8) && after < ACK_WAIT, "{after:?}");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_answers_is_kept() {
    for confirmation in [Confirmation::Sent, Confirmation::Confirmed] {
        let (broker, lessor) = start();
        let lease = leased(&broker, &lessor, None).await;
        if confirmation == Confirmation::Confirmed {
            broker.script([Fault::Lost]);
        }
        settle(&lessor, &[lease], confirmation).await;
        assert_eq!(given_up(&broker).await, None, "{confirmation:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_costs_a_silent_connection_before_jetstream_would_redeliver() {
    let (broker, lessor) = start();
    leased(&broker, &lessor, Some(Duration::from_secs(3))).await;
    broker.silence(true);
    let after = given_up(&broker).await.expect("it may fire into the next worker's delivery");
    assert!(after >= Duration::from_secs(3) && after < ACK_WAIT, "{after:?}");
    assert_eq!(broker.published(), [Verdict::Nak(None)]);
}

/// How long its answer may take is told by when JetStream would redeliver, not by the margin alone.
#[tokio::test(start_paused = true)]
async fn a_release_gives_a_slow_answer_the_time_that_there_is() {
    let (broker, lessor) = start();
    leased(&broker, &lessor, Some(Duration::from_secs(3))).await;
    broker.delay_info(Duration::from_secs(4));
    assert_eq!(given_up(&broker).await, None);
    assert_eq!(broker.published(), [Verdict::Nak(None)]);
}

#[tokio::test(start_paused = true)]
async fn of_many_that_were_not_answered_the_first_to_end_counts() {
    for confirmation in [Confirmation::Confirmed, Confirmation::Sent] {
        let (broker, lessor) = start();
        let early = leased(&broker, &lessor, None).await;
        tokio::time::sleep(Duration::from_secs(8)).await;
        let late = leased(&broker, &lessor, None).await;
        broker.silence(true);
        if confirmation == Confirmation::Confirmed {
            broker.script([Fault::Lost, Fault::Lost]);
        }
        settle(&lessor, &[early, late], confirmation).await;
        let after = given_up(&broker).await.expect("it is kept");
        assert!(after < Duration::from_secs(2), "{after:?}: the earlier delivery is over");
    }
}
