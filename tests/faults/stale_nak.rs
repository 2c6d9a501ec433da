//! A Nak that was given up on never fires later, into the delivery of somebody else: JetStream has
//! no fence against it, so it must never get there.

use std::time::{Duration, Instant};

use fetch_proxy::pb::{self, Confirmation, NakRequest, Outcome};
use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, extend, fetch, nak, reason, take, take_one, timed},
    relay::{Flow, Relay},
    stage::{Stage, served},
};
use tonic::{Code, Status};

use super::run::{all_settled, measured};

/// Long enough for a busy machine, short enough to wait for.
const ACK_WAIT: u64 = 6000;

/// A worker whose proxy's wire to NATS can be broken, and one whose proxy's cannot.
struct TwoWorkers {
    fixture: Fixture,
    wire: Relay,
    _proxies: [Proxy; 2],
    first: Client,
    second: Client,
    /// The message of the first worker.
    held: pb::Delivery,
}

impl TwoWorkers {
    async fn new() -> Self {
        let Stage { fixture, wire, proxy, client: first } = Stage::new(ack_wait(ACK_WAIT)).await;
        let (direct, second) = served(&NatsServer::shared().url()).await;
        fixture.publish("n", "x").await;
        let held = take_one(&first, &fixture).await;
        Self { fixture, wire, _proxies: [proxy, direct], first, second, held }
    }

    /// The first worker gives its message back.
    async fn nak(&mut self, confirmation: Confirmation) -> Result<Outcome, Status> {
        let nak = NakRequest { confirmation: confirmation.into(), ..nak(&self.held.token, 0) };
        self.first
            .nak(timed(nak, Duration::from_millis(600)))
            .await
            .map(|answer| answer.into_inner().outcome())
    }

    /// The second worker is given the message, then `heal` mends the wire, and the message is the
    /// second worker's for its whole ack wait.
    async fn second_keeps_its_delivery(mut self, what: &str, heal: impl FnOnce(&Relay)) {
        let began = Instant::now();
        let second = take_one(&self.second, &self.fixture).await;
        measured(&format!("stale Nak, {what}: until the next worker"), began.elapsed());
        assert_eq!(second.delivery_count, 2);
        heal(&self.wire);
        let wait = i64::try_from(ACK_WAIT).unwrap() * 8 / 10;
        // An Ack after so long would be too late on a busy machine.
        let mut keeper = self.second.clone();
        let kept = async {
            tokio::time::sleep(Duration::from_millis(ACK_WAIT / 2)).await;
            keeper.extend(extend(&second.token, ACK_WAIT.cast_signed())).await
        };
        let (third, kept) = tokio::join!(self.second.fetch(fetch(&self.fixture, 1, wait)), kept);
        kept.unwrap();
        let third = third.unwrap().into_inner();
        assert!(third.messages.is_empty(), "the Nak fired late: {:?}", third.messages);
        let answer = self.second.ack(ack(&second.token)).await.unwrap().into_inner();
        assert_eq!(answer.outcome(), Outcome::Confirmed);
        all_settled(&self.fixture).await;
        let delivered = self.fixture.info().await.delivered.consumer_sequence;
        assert_eq!(delivered, 2);
        // The first has its proxy back, and its token is over.
        let status = eventually("the first proxy to refuse", || {
            let (mut client, request) = (self.first.clone(), ack(&self.held.token));
            async move { client.ack(request).await.err() }
        })
        .await;
        let over = ["LEASE_EXPIRED", "LEASE_SETTLED"];
        assert!(over.contains(&&*reason(&status).1), "{status:?}");
    }
}

/// The proxy says so, or on a busy machine the deadline of the caller is over first.
fn is_unconfirmed(status: &Status) -> bool {
    let said = || reason(status) == (Code::DeadlineExceeded, "SETTLE_UNCONFIRMED".to_owned());
    status.code() == Code::Cancelled || said()
}

/// The window that is left: what the kernel has taken from us it sends even after a close, as soon
/// as the wire moves again. It costs an attempt, and no more.
#[tokio::test]
async fn stalled_wire_may_bring_a_nak_late_for_one_attempt() {
    let (confirmed, sent) = (Confirmation::Confirmed, Confirmation::Sent);
    let late = tokio::join!(stalled(confirmed), stalled(sent));
    measured("stale Nak, stalled: fired late of 2", late.0 + late.1);
}

async fn stalled(confirmation: Confirmation) -> usize {
    let mut two = TwoWorkers::new().await;
    two.wire.flow(Flow::Stall, Flow::Pass);
    match two.nak(confirmation).await {
        Ok(outcome) => assert_eq!(outcome, Outcome::Sent),
        Err(status) => assert!(is_unconfirmed(&status), "{status:?}"),
    }
    let second = take_one(&two.second, &two.fixture).await;
    two.wire.flow(Flow::Pass, Flow::Pass);
    let again = two.second.fetch(fetch(&two.fixture, 1, ACK_WAIT.cast_signed() / 2)).await.unwrap();
    let again = again.into_inner().messages;
    if let [third] = &*again {
        let status = two.second.ack(ack(&second.token)).await.unwrap_err();
        assert_eq!(reason(&status).1, "LEASE_EXPIRED", "two hold it: {status:?}");
        two.second.ack(ack(&third.token)).await.unwrap();
    } else {
        two.second.ack(ack(&second.token)).await.unwrap();
    }
    all_settled(&two.fixture).await;
    let delivered = two.fixture.info().await.delivered.consumer_sequence;
    assert_eq!(delivered, 2 + again.len() as u64);
    again.len()
}

#[tokio::test]
async fn nak_on_a_stalled_and_cut_wire_never_arrives_late() {
    tokio::join!(stalled_and_cut(Confirmation::Confirmed), stalled_and_cut(Confirmation::Sent));
}

async fn stalled_and_cut(confirmation: Confirmation) {
    let mut two = TwoWorkers::new().await;
    two.wire.flow(Flow::Stall, Flow::Stall);
    match two.nak(confirmation).await {
        Ok(outcome) => assert_eq!(outcome, Outcome::Sent),
        Err(status) => assert!(is_unconfirmed(&status), "{status:?}"),
    }
    two.wire.close();
    let what = format!("stalled and cut, {confirmation:?}");
    let heal = |wire: &Relay| {
        wire.flow(Flow::Pass, Flow::Pass);
        wire.open();
    };
    two.second_keeps_its_delivery(&what, heal).await;
}

#[tokio::test]
async fn nak_on_a_cut_wire_never_leaves_later() {
    tokio::join!(cut(Confirmation::Confirmed), cut(Confirmation::Sent));
}

async fn cut(confirmation: Confirmation) {
    let mut two = TwoWorkers::new().await;
    two.wire.close();
    // At once, while nobody has noticed, and again when the answer was that it was not applied.
    for _ in 0..5 {
        match two.nak(confirmation).await {
            // A repeat of a Nak that was only sent is a duplicate.
            Ok(Outcome::Duplicate) => assert_eq!(confirmation, Confirmation::Sent),
            Ok(outcome) => assert_eq!(outcome, Outcome::Sent),
            Err(status) => {
                let is_true = is_unconfirmed(&status) || reason(&status).1 == "NATS_UNAVAILABLE";
                assert!(is_true, "{status:?}");
            }
        }
    }
    two.second_keeps_its_delivery(&format!("cut, {confirmation:?}"), Relay::open).await;
}

/// Its worker has settled it, so it is not said to have let the lease end.
#[tokio::test]
async fn unconfirmed_nak_does_not_count_as_unsettled() {
    let Stage { fixture, wire, proxy, mut client } = Stage::new(ack_wait(ACK_WAIT)).await;
    fixture.publish_many(2).await;
    let held = take(&client, fetch(&fixture, 2, 10_000)).await;
    assert_eq!(held.len(), 2);
    wire.flow(Flow::Stall, Flow::Pass);
    let unanswered = timed(nak(&held[0].token, 0), Duration::from_millis(600));
    assert!(is_unconfirmed(&client.nak(unanswered).await.unwrap_err()));
    let line = eventually("the line about the other lease", || async {
        let log = proxy.log();
        log.lines().find(|line| line.contains("leases ended unsettled")).map(str::to_owned)
    })
    .await;
    assert!(line.contains("\"count\":1"), "{line}");
}
