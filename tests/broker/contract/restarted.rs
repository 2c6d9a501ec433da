//! Promises of a consumer without copies whose server stops and starts again.

use std::cell::RefCell;

use fetch_proxy::{
    broker::{AckKind, Broker, BrokerError, Inbox, InfoError, PullEnd, PullRequest},
    clock,
};
use testkit::{
    BOUND,
    jetstream::{Fixture, ack_wait},
    nats_server::NatsServer,
};

use super::{
    client::{attempts, end, millis, one, open, pull, read, say, say_until, take, unsettled},
    worlds::{Modelled, Real, World, delegate, modelled_as, up},
};
use crate::simulation::{jetstream::Config, net::Stop};

/// Long enough to start a server in, in milliseconds.
const ACK_WAIT: u64 = 3_000;

/// A world with a server of its own.
trait Restarted: World {
    /// The server crashes and starts again, and the broker is connected.
    async fn crash(&self);
    /// The server stops in order.
    async fn stop(&self);
    async fn start(&self);
    /// The server leaves in lame duck mode. Its connections stay for a while.
    async fn leave(&self);
}

impl Restarted for Modelled {
    async fn crash(&self) {
        self.start().await;
    }
    async fn stop(&self) {
        self.net.accident(|network| network.stop_all(Stop::Graceful));
        // The ends of pulls are on their way.
        tokio::time::sleep(millis(1)).await;
    }
    async fn start(&self) {
        let link = self.broker().link();
        self.net.accident(|network| network.start_all(millis(100), true));
        // The connection may not know of its loss yet.
        if link.server().is_some() {
            self.broker().link_change(&link).await;
        }
        up(self.broker()).await;
    }
    async fn leave(&self) {
        self.net.with(|state, now| state.model.leave_in_lame_duck_mode(now));
    }
}

struct OneServer {
    server: RefCell<NatsServer>,
    real: Real,
}

delegate!(OneServer);

impl Restarted for OneServer {
    async fn crash(&self) {
        self.server.borrow_mut().kill();
        self.start().await;
    }
    async fn stop(&self) {
        self.server.borrow_mut().stop();
    }
    async fn start(&self) {
        let link = self.broker().link();
        self.server.borrow_mut().restart();
        // The connection may not know of its loss yet.
        if link.server().is_some() {
            self.broker().link_change(&link).await;
        }
        up(self.broker()).await;
    }
    async fn leave(&self) {
        self.server.borrow().signal("USR2");
        testkit::eventually("JetStream to be away", || async {
            let soon = clock::now() + millis(300);
            self.broker().info(&self.name(), soon).await.err()
        })
        .await;
    }
}

async fn a_server_that_crashes<W: Restarted>(world: W) {
    for number in 0..3 {
        world.publish(vec![number]).await;
    }
    let before = read(&world).await;
    tokio::time::sleep(millis(ACK_WAIT)).await;
    let delivered = clock::now();
    let found = take(&world, 3).await;
    say(&world, &found[0], AckKind::Ack).await.unwrap();
    say(&world, &found[1], AckKind::Progress).await.unwrap();
    let progress = clock::now();
    // The server writes its disk at most every 100 ms.
    tokio::time::sleep(millis(500)).await;
    world.crash().await;
    let after = read(&world).await;
    assert_eq!((after.created, after.delivered, after.ack_pending), (before.created, 3, 2));
    assert!(after.leader_shows && after.leader != before.leader);
    let third = one(&world).await;
    assert_eq!((third.stream_sequence, third.delivery_count), (3, 2));
    // On a busy machine, it may come late, and then this shows nothing.
    let early = clock::now() - delivered < millis(ACK_WAIT);
    assert!(early || world.slack() > millis(1_000), "published an ack wait ago");
    let second = one(&world).await;
    assert_eq!((second.stream_sequence, second.delivery_count), (2, 2));
    // Its progress is stored in whole seconds.
    let waited = clock::now() - progress;
    assert!(waited + millis(1_100) >= millis(ACK_WAIT), "{waited:?} after its progress");
    say(&world, &found[1], AckKind::Ack).await.unwrap();
    assert_eq!(unsettled(&world).await, 1);
}

async fn a_server_that_stops_in_order<W: Restarted>(world: W) {
    for number in 0..2 {
        world.publish(vec![number]).await;
    }
    let found = take(&world, 2).await;
    let mut inbox = open(&world).await;
    inbox.pull(PullRequest { expires: BOUND, ..pull(1, 1) }).await.unwrap();
    say(&world, &found[0], AckKind::Ack).await.unwrap();
    // A server that stops in order does not write the newest changes either, now and then.
    tokio::time::sleep(millis(500)).await;
    world.stop().await;
    assert_eq!(end(&mut inbox).await, PullEnd::LeaderGone);
    world.start().await;
    assert_eq!(unsettled(&world).await, 1);
    let second = one(&world).await;
    assert_eq!((second.stream_sequence, second.delivery_count), (2, 2));
    say(&world, &second, AckKind::Ack).await.unwrap();
    assert_eq!(attempts(&take(&world, 2).await), []);
}

/// In lame duck mode JetStream is away at once, and the connections are not.
async fn a_server_in_lame_duck_mode<W: Restarted>(world: W) {
    for number in 0..2 {
        world.publish(vec![number]).await;
    }
    let found = take(&world, 2).await;
    let (mut waiting, mut late) = (open(&world).await, open(&world).await);
    waiting.pull(PullRequest { expires: millis(1_000), ..pull(1, 1) }).await.unwrap();
    read(&world).await;
    world.leave().await;
    let soon = || clock::now() + millis(300);
    let said = say_until(&world, &found[0], AckKind::Ack, soon()).await;
    assert!(matches!(said, Err(BrokerError::Leaderless(_))), "{said:?}");
    let info = world.broker().info(&world.name(), soon()).await;
    assert!(matches!(info, Err(InfoError::Unavailable(_))), "{info:?}");
    late.pull(pull(1, 1)).await.unwrap();
    assert_eq!(end(&mut late).await, PullEnd::ConsumerGone);
    let silence = tokio::time::timeout(millis(1_200), waiting.next(&mut Vec::new())).await;
    assert!(silence.is_err(), "nothing ends a pull that waits: {silence:?}");
    assert!(world.broker().link().server().is_some());
}

#[tokio::test(start_paused = true)]
async fn servers_keep_their_promises_over_a_start_on_the_model() {
    let world = || modelled_as(Config::new(millis(ACK_WAIT)));
    a_server_that_crashes(world().await).await;
    a_server_that_stops_in_order(world().await).await;
    a_server_in_lame_duck_mode(world().await).await;
}

async fn real() -> OneServer {
    let server = NatsServer::start();
    let fixture = Fixture::on(&server, ack_wait(ACK_WAIT)).await;
    let real = Real::with(fixture, &server.url()).await;
    OneServer { server: RefCell::new(server), real }
}

#[tokio::test]
async fn server_that_crashes_keeps_its_promises_on_the_real_one() {
    a_server_that_crashes(real().await).await;
}

#[tokio::test]
async fn server_that_stops_in_order_keeps_its_promises_on_the_real_one() {
    a_server_that_stops_in_order(real().await).await;
}

#[tokio::test]
async fn server_in_lame_duck_mode_keeps_its_promises_on_the_real_one() {
    a_server_in_lame_duck_mode(real().await).await;
}
