//! The lessor on a broker that fails as scripted: the tests read what it publishes and what it
//! answers.

use std::{sync::Arc, time::Duration};

use fetch_proxy::{
    broker::{AckKind, AckPublish, Confirmation},
    clock,
    lease::{LeaseId, SettleKind},
    lessor::{
        Action, CallerDeadline, Codec, Empty, Error, FetchParams, Fetched, LeaseLimits, Lessor,
        SettleItem, Settled,
    },
};
use testkit::{
    eventually,
    fake_broker::{FakeBroker, Fault, RIGHT, info, limits},
};

fn start(ack_wait: Duration) -> (FakeBroker, Lessor<FakeBroker>) {
    let broker = FakeBroker::new(info(ack_wait));
    (broker.clone(), Lessor::start(broker, limits()))
}

pub(super) fn ask(broker: &FakeBroker, max_wait: Duration) -> FetchParams {
    FetchParams {
        name: broker.name(),
        n: 10,
        max_bytes: 4_000_000,
        max_wait,
        linger: Duration::ZERO,
        lease: None,
        principal: "anonymous".into(),
        caller: Arc::default(),
        codec: Codec::Raw,
        patience: None,
    }
}

async fn fetch(broker: &FakeBroker, lessor: &Lessor<FakeBroker>) -> Fetched {
    lessor.fetch(ask(broker, Duration::from_secs(10))).await.unwrap()
}

/// The first lease of an answer that has reached its caller.
fn taken(fetched: Fetched) -> LeaseId {
    let lease = fetched.messages()[0].id;
    fetched.delivered();
    lease
}

pub(super) async fn one(broker: &FakeBroker, lessor: &Lessor<FakeBroker>) -> LeaseId {
    broker.publish("x");
    taken(fetch(broker, lessor).await)
}

pub(super) async fn settle(
    lessor: &Lessor<FakeBroker>,
    lease: LeaseId,
    action: Action,
) -> Result<Settled, Error> {
    let until = clock::now() + Duration::from_secs(5);
    let asks = vec![SettleItem { lease, action, by: None }];
    lessor.settle(asks, Confirmation::Confirmed, until).await.remove(0)
}

pub(super) fn confirmed(result: &Result<Settled, Error>) -> bool {
    matches!(result, Ok(Settled::Done { confirmation: Confirmation::Confirmed, .. }))
}

const LONG: Duration = Duration::from_secs(30);

#[tokio::test(start_paused = true)]
async fn ack_without_an_answer_may_be_repeated() {
    let (broker, lessor) = start(LONG);
    let lease = one(&broker, &lessor).await;
    broker.script([Fault::AnswerLost]);
    assert_eq!(settle(&lessor, lease, Action::Ack).await, Err(Error::Unconfirmed));
    // Not in another way: the first may have been applied.
    let other = settle(&lessor, lease, Action::Nak(Duration::ZERO)).await;
    assert_eq!(other, Err(Error::LeaseSettled(SettleKind::Ack)));
    assert!(confirmed(&settle(&lessor, lease, Action::Ack).await));
    assert_eq!(settle(&lessor, lease, Action::Ack).await, Ok(Settled::Duplicate));
    assert_eq!(broker.published(), [AckKind::Ack, AckKind::Ack]);
}

#[tokio::test(start_paused = true)]
async fn nak_is_never_published_twice() {
    let (broker, lessor) = start(LONG);
    for fault in [Fault::Lost, Fault::AnswerLost] {
        let lease = one(&broker, &lessor).await;
        let before = broker.published().len();
        broker.script([fault]);
        let nak = || settle(&lessor, lease, Action::Nak(Duration::from_secs(60)));
        assert_eq!(nak().await, Err(Error::Unconfirmed));
        let minute = Some(Duration::from_secs(60));
        assert_eq!(nak().await, Ok(sent(minute)));
        assert_eq!(broker.published().len(), before + 1);
    }
}

/// A Nak that was lost on its way has no effect: then the ack wait brings the message back.
#[tokio::test(start_paused = true)]
async fn repeat_of_a_lost_nak_tells_when_the_message_comes_back() {
    let (broker, lessor) = start(LONG);
    let lease = one(&broker, &lessor).await;
    broker.script([Fault::Lost]);
    let nak = || settle(&lessor, lease, Action::Nak(Duration::ZERO));
    assert_eq!(nak().await, Err(Error::Unconfirmed));
    assert_eq!(nak().await, Ok(sent(Some(LONG))));
    let other = settle(&lessor, lease, Action::Ack).await;
    assert_eq!(other, Err(Error::LeaseSettled(SettleKind::Nak)));
    tokio::time::sleep(LONG).await;
    assert_eq!(nak().await, Err(Error::LeaseExpired { forgotten: false }));
    assert_eq!(broker.published().len(), 1);
}

fn sent(redelivered_in: Option<Duration>) -> Settled {
    Settled::Done { confirmation: Confirmation::Sent, redelivered_in }
}

#[tokio::test(start_paused = true)]
async fn second_mention_of_a_lease_is_answered_like_a_later_call() {
    let (broker, lessor) = start(LONG);
    let nak = || Action::Nak(Duration::ZERO);
    let minute = || Action::Extend(Some(LONG * 2));
    let until = LONG * 2;
    let extended = || Ok(Settled::Extended(clock::now() + until));
    let unsent = || Err(Error::Unavailable("scripted".into()));
    let settled = Err(Error::LeaseSettled(SettleKind::Ack));
    let done = Ok(Settled::Done { confirmation: Confirmation::Confirmed, redelivered_in: None });
    for (faults, actions, results) in [
        (
            vec![],
            vec![Action::Ack; 3],
            vec![done.clone(), Ok(Settled::Duplicate), Ok(Settled::Duplicate)],
        ),
        (
            vec![],
            vec![minute(), Action::Ack, minute(), nak()],
            vec![extended(), done.clone(), settled.clone(), settled.clone()],
        ),
        // A settlement that never left leaves the lease to the next caller.
        (
            vec![Fault::Unsent],
            vec![nak(), Action::Ack, Action::Ack],
            vec![unsent(), done.clone(), Ok(Settled::Duplicate)],
        ),
        (
            vec![Fault::AnswerLost],
            vec![Action::Ack, nak(), Action::Ack],
            vec![Err(Error::Unconfirmed), settled, done.clone()],
        ),
    ] {
        let lease = one(&broker, &lessor).await;
        broker.script(faults);
        let other = one(&broker, &lessor).await;
        let ask = |action| SettleItem { lease, action, by: None };
        let mut asks: Vec<_> = actions.into_iter().map(ask).collect();
        asks.push(SettleItem { lease: other, action: Action::Ack, by: None });
        let by = clock::now() + Duration::from_secs(1);
        let mut told = lessor.settle(asks, Confirmation::Confirmed, by).await;
        assert_eq!(told.pop(), Some(done.clone()));
        assert_eq!(told, results);
    }
}

#[tokio::test(start_paused = true)]
async fn lease_of_another_principal_is_not_settled() {
    let (broker, lessor) = start(LONG);
    let lease = one(&broker, &lessor).await;
    let settle = async |action, by: Option<&str>| {
        let ask = SettleItem { lease, action, by: by.map(Arc::from) };
        let until = clock::now() + LONG;
        lessor.settle(vec![ask], Confirmation::Confirmed, until).await.remove(0)
    };
    for action in [Action::Ack, Action::Nak(Duration::ZERO), Action::Extend(None)] {
        assert_eq!(settle(action, Some("other")).await, Err(Error::NotHolder));
    }
    assert!(settle(Action::Extend(None), Some("anonymous")).await.is_ok());
    assert!(confirmed(&settle(Action::Ack, None).await), "its name does not matter");
    assert_eq!(settle(Action::Ack, Some("other")).await, Ok(Settled::Duplicate), "it is over");
}

/// It is another call that is settling it, and this one does not wait for that.
#[tokio::test(start_paused = true)]
async fn lease_under_settlement_is_busy_for_another_call() {
    let (broker, lessor) = start(LONG);
    let lease = one(&broker, &lessor).await;
    broker.script([Fault::Slow(Duration::from_secs(2))]);
    let asks = vec![SettleItem { lease, action: Action::Ack, by: None }; 2];
    let until = clock::now() + LONG;
    let first = lessor.settle(asks.clone(), Confirmation::Confirmed, until);
    let second = lessor.settle(asks, Confirmation::Confirmed, until);
    let (first, second) = tokio::join!(first, second);
    assert_eq!(first[1], Ok(Settled::Duplicate));
    assert_eq!(second, [Err(Error::LeaseBusy), Err(Error::LeaseBusy)]);
}

#[tokio::test(start_paused = true)]
async fn unsent_settlement_is_not_applied_and_keeps_its_lease() {
    let (broker, lessor) = start(LONG);
    let lease = one(&broker, &lessor).await;
    for action in [Action::Ack, Action::Nak(Duration::ZERO), Action::Term("no".into())] {
        broker.script([Fault::Unsent]);
        let result = settle(&lessor, lease, action).await;
        assert_eq!(result, Err(Error::Unavailable("scripted".into())));
    }
    assert!(broker.published().is_empty());
    assert!(confirmed(&settle(&lessor, lease, Action::Ack).await));
}

/// INFO tells nothing about the right.
#[tokio::test(start_paused = true)]
async fn refused_right_is_remembered_until_a_settlement_is_confirmed() {
    let (broker, lessor) = start(LONG);
    let lease = one(&broker, &lessor).await;
    broker.script([Fault::Denied]);
    let refused = || Err(Error::Permission(RIGHT.to_owned()));
    assert_eq!(settle(&lessor, lease, Action::Ack).await, refused());
    // INFO is read every third of the ack wait.
    tokio::time::sleep(LONG / 2).await;
    let extend = |lease| settle(&lessor, lease, Action::Extend(Some(LONG * 2)));
    let next = one(&broker, &lessor).await;
    assert_eq!([extend(lease).await, extend(next).await], [refused(), refused()]);
    assert!(confirmed(&settle(&lessor, next, Action::Ack).await));
    assert!(matches!(extend(lease).await, Ok(Settled::Extended(_))));
}

/// The token of a dead replica is settled without its lease.
#[tokio::test(start_paused = true)]
async fn right_that_is_refused_without_a_lease_is_remembered_too() {
    let (broker, lessor) = start(LONG);
    let lease = one(&broker, &lessor).await;
    let ack = lessor.leaving()[0].ack.clone();
    let publish = async || {
        let publish =
            AckPublish { ack: ack.clone(), kind: AckKind::Ack, confirm_group: None, by: None };
        lessor.publish(vec![publish], clock::now() + LONG).await
    };
    let extend = async || settle(&lessor, lease, Action::Extend(Some(LONG * 2))).await;
    broker.script([Fault::Denied]);
    publish().await[0].as_ref().unwrap_err();
    tokio::task::yield_now().await;
    assert_eq!(extend().await, Err(Error::Permission(RIGHT.to_owned())));
    publish().await[0].as_ref().unwrap();
    tokio::task::yield_now().await;
    assert!(matches!(extend().await, Ok(Settled::Extended(_))));
}

#[tokio::test(start_paused = true)]
async fn settlement_continues_when_its_caller_leaves() {
    let (broker, lessor) = start(LONG);
    let lease = one(&broker, &lessor).await;
    broker.script([Fault::Slow(Duration::from_secs(2))]);
    let leaving = tokio::time::timeout(Duration::from_secs(1), settle(&lessor, lease, Action::Ack));
    assert!(leaving.await.is_err());
    assert_eq!(settle(&lessor, lease, Action::Ack).await, Err(Error::LeaseBusy));
    eventually("the first to end", || async {
        (settle(&lessor, lease, Action::Ack).await == Ok(Settled::Duplicate)).then_some(())
    })
    .await;
    assert_eq!(broker.published(), [AckKind::Ack]);
}

#[tokio::test(start_paused = true)]
async fn unconfirmed_progress_ends_the_lease_in_time() {
    let (broker, lessor) = start(Duration::from_secs(4));
    broker.publish("x");
    let long = FetchParams { lease: Some(Duration::from_secs(600)), ..ask(&broker, LONG) };
    let lease = taken(lessor.fetch(long).await.unwrap());
    broker.script([Fault::Lost; 20]);
    tokio::time::sleep(Duration::from_millis(3700)).await;
    let refused = settle(&lessor, lease, Action::Extend(Some(LONG))).await;
    assert_eq!(refused, Err(Error::LeaseExpired { forgotten: false }));
    assert!(broker.published().len() > 1, "it was tried more than once");
}

#[tokio::test(start_paused = true)]
async fn untaken_answer_goes_to_the_next_waiter() {
    let (broker, lessor) = start(LONG);
    broker.publish("x");
    drop(lessor.fetch(ask(&broker, LONG)).await.unwrap());
    let second = fetch(&broker, &lessor).await;
    assert_eq!(
        second.messages()[0].delivery().delivery_count,
        1,
        "it was not given back to the broker"
    );
    assert!(broker.published().is_empty());
}

#[tokio::test(start_paused = true)]
async fn call_without_a_wait_receives_available_messages() {
    let (broker, lessor) = start(LONG);
    for _ in 0..3 {
        broker.publish("x");
    }
    let began = clock::now();
    assert_eq!(lessor.fetch(ask(&broker, Duration::ZERO)).await.unwrap().messages().len(), 3);
    assert!(clock::now() - began < Duration::from_millis(100));
}

#[tokio::test(start_paused = true)]
async fn surplus_is_given_back_soon_and_a_last_attempt_never() {
    for (max_deliver, expected) in [(None, true), (Some(1), false)] {
        let (broker, lessor) = start(Duration::from_secs(4));
        broker.change(|info| info.as_mut().unwrap().max_deliver = max_deliver);
        broker.publish("x");
        drop(lessor.fetch(ask(&broker, LONG)).await.unwrap());
        tokio::time::sleep(Duration::from_secs(10)).await;
        let published = broker.published();
        assert_eq!(published.contains(&AckKind::Nak(None)), expected, "{published:?}");
        let again = fetch(&broker, &lessor).await;
        let count = again.messages()[0].delivery().delivery_count;
        assert_eq!(count, if expected { 2 } else { 1 });
    }
}

/// Otherwise they would keep every lease for ever, and nobody could take them.
#[tokio::test(start_paused = true)]
async fn last_attempts_that_nobody_took_are_handed_out_at_the_limit_of_leases() {
    for max_leases in [1, 10] {
        let broker = FakeBroker::new(info(Duration::from_secs(4)));
        let lessor = Lessor::start(broker.clone(), LeaseLimits { max_leases, ..limits() });
        broker.change(|info| info.as_mut().unwrap().max_deliver = Some(1));
        for _ in 0..max_leases {
            broker.publish("x");
        }
        // Its caller leaves at once, so that its answer is not written.
        drop(lessor.fetch(ask(&broker, LONG)).await.unwrap());
        tokio::time::sleep(LONG).await;
        let untaken = lessor.held();
        assert_eq!(fetch(&broker, &lessor).await.messages().len(), untaken, "of {max_leases}");
    }
}

#[tokio::test(start_paused = true)]
async fn replaced_connection_is_left_after_its_pull() {
    let (broker, lessor) = start(LONG);
    let waiting = fetch(&broker, &lessor);
    let replacing = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        broker.replace_shared();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(broker.opened().len(), 1, "its pull is still out");
        broker.publish("x");
    };
    let (first, ()) = tokio::join!(waiting, replacing);
    let first = taken(first);
    let second = one(&broker, &lessor).await;
    assert_eq!(broker.opened().len(), 2);
    for lease in [first, second] {
        assert!(confirmed(&settle(&lessor, lease, Action::Ack).await));
    }
}

#[tokio::test(start_paused = true)]
async fn shorter_ack_wait_counts_from_the_next_info() {
    let (broker, lessor) = start(Duration::from_secs(60));
    let lease = one(&broker, &lessor).await;
    broker.change(|info| info.as_mut().unwrap().ack_wait = Duration::from_secs(30));
    tokio::time::sleep(Duration::from_secs(29)).await;
    let refused = settle(&lessor, lease, Action::Ack).await;
    assert_eq!(refused, Err(Error::LeaseExpired { forgotten: false }));
}

/// The first caller has a longer deadline than the second.
#[tokio::test(start_paused = true)]
async fn explanation_of_an_empty_answer_keeps_each_caller_s_deadline() {
    let (broker, lessor) = start(LONG);
    one(&broker, &lessor).await;
    broker.silence(true);
    let (began, millis) = (clock::now(), Duration::from_millis);
    let patience = CallerDeadline { until: began + millis(200), answer_by: began + millis(400) };
    let patient = lessor.fetch(ask(&broker, Duration::ZERO));
    let hasty = async {
        let hasty = FetchParams { patience: Some(patience), ..ask(&broker, LONG) };
        (lessor.fetch(hasty).await, clock::now() - began)
    };
    let (patient, (hasty, took)) = tokio::join!(patient, hasty);
    for told in [patient, hasty] {
        assert!(matches!(told, Err(Error::Unavailable(_))), "{told:?}");
    }
    assert_eq!(took, millis(400));
}

/// Progress would end the delay of the Nak.
#[tokio::test(start_paused = true)]
async fn progress_that_is_due_at_a_nak_is_not_published_behind_it() {
    let (broker, lessor) = start(Duration::from_secs(10));
    broker.publish("x");
    let long = FetchParams { lease: Some(LONG), ..ask(&broker, LONG) };
    let lease = taken(lessor.fetch(long).await.unwrap());
    // The task runs after the sweep, and before the progress that the sweep has begun.
    let settled = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(5)).await;
        settle(&lessor, lease, Action::Nak(LONG)).await
    });
    settled.await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(broker.published(), [AckKind::Nak(Some(LONG))]);
}

#[tokio::test(start_paused = true)]
async fn wait_that_ends_before_the_consumer_is_read_is_no_outage() {
    let (broker, lessor) = start(LONG);
    broker.delay_info(Duration::from_millis(50));
    let empty = lessor.fetch(ask(&broker, Duration::from_millis(5))).await.unwrap();
    assert_eq!(empty.empty(), Some(Empty::NoMessages));
}

#[tokio::test(start_paused = true)]
async fn fetch_without_a_wait_keeps_its_caller_s_deadline() {
    let (broker, lessor) = start(LONG);
    one(&broker, &lessor).await;
    broker.lose_pulls(true);
    let (began, millis) = (clock::now(), Duration::from_millis);
    let patience =
        Some(CallerDeadline { until: began + millis(20), answer_by: began + millis(40) });
    let hasty = FetchParams { patience, ..ask(&broker, Duration::ZERO) };
    let empty = lessor.fetch(hasty).await.unwrap();
    assert_eq!((empty.empty(), clock::now() - began), (Some(Empty::NoMessages), millis(20)));
}

/// Otherwise a message would be delivered again before its answer, and lose its attempts.
#[tokio::test(start_paused = true)]
async fn linger_ends_at_half_of_the_ack_wait() {
    let (broker, lessor) = start(Duration::from_secs(2));
    broker.publish("x");
    let linger = FetchParams { linger: Duration::from_secs(5), ..ask(&broker, LONG) };
    let began = clock::now();
    let fetched = lessor.fetch(linger).await.unwrap();
    assert_eq!(clock::now() - began, Duration::from_secs(1));
    assert_eq!(fetched.messages().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn closing_waits_for_settlements_only() {
    let (broker, lessor) = start(LONG);
    let (lost, slow) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
    broker.script([Fault::Lost, Fault::Slow(Duration::from_secs(2))]);
    assert_eq!(settle(&lessor, lost, Action::Ack).await, Err(Error::Unconfirmed));
    let leaving = tokio::time::timeout(Duration::from_secs(1), settle(&lessor, slow, Action::Ack));
    assert!(leaving.await.is_err());
    let began = clock::now();
    lessor.close().await;
    assert_eq!(clock::now() - began, Duration::from_secs(1), "the rest of the slow one");
    assert_eq!(broker.published(), [AckKind::Ack, AckKind::Ack]);
}

/// A late confirmation may be for the delivery of the next holder.
#[tokio::test(start_paused = true)]
async fn confirmation_after_the_end_of_the_lease_is_unconfirmed() {
    const PATIENCE: Duration = Duration::from_secs(60);
    for action in [Action::Ack, Action::Nak(Duration::ZERO), Action::Term("no".into())] {
        let broker = FakeBroker::new(info(Duration::from_secs(4)));
        let limits = LeaseLimits { settle_timeout: PATIENCE, ..limits() };
        let lessor = Lessor::start(broker.clone(), limits);
        let lease = one(&broker, &lessor).await;
        broker.script([Fault::AnsweredAfter(Duration::from_secs(4))]);
        let told = settle(&lessor, lease, action.clone()).await;
        assert_eq!(told, Err(Error::Unconfirmed), "{action:?}");
        let again = settle(&lessor, lease, action.clone()).await;
        assert_eq!(again, Err(Error::LeaseExpired { forgotten: false }), "{action:?}");
        assert_eq!(broker.published().len(), 1);
    }
}

/// JetStream starts its ack timer when it sends. A delivery that waited on the wire does not say how long.
#[tokio::test(start_paused = true)]
async fn lease_is_over_before_jetstream_may_redeliver_a_slow_delivery() {
    let (broker, lessor) = start(LONG);
    let began = clock::now();
    let publishes = async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        broker.publish("x");
    };
    let (fetched, ()) = tokio::join!(fetch(&broker, &lessor), publishes);
    let deadline = fetched.messages()[0].deadline;
    assert!(deadline <= began + LONG, "{:?}", deadline - began);
}

/// JetStream does not say that such a pull has ended. Nobody waits for its time.
#[tokio::test(start_paused = true)]
async fn pull_that_has_used_up_its_bytes_holds_up_no_caller() {
    let mut spent = 0;
    for max_bytes in 3700..3900 {
        let (broker, lessor) = start(LONG);
        (0..5).for_each(|_| broker.publish(vec![b'x'; 973]));
        let began = clock::now();
        let mut taken = 0;
        while taken < 5 {
            let three = FetchParams { n: 3, max_bytes, ..ask(&broker, LONG) };
            let fetched = lessor.fetch(three).await.unwrap();
            taken += fetched.messages().len();
            fetched.delivered();
        }
        let took = clock::now() - began;
        assert!(took < Duration::from_millis(500), "{took:?} with {max_bytes} bytes");
        spent += broker.spent();
    }
    assert!(spent > 0, "no pull was of this kind");
}
