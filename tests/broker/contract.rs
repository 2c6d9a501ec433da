//! One suite, three brokers: the scripted one, the real one, and the model of the simulation.

use std::time::{Duration, Instant};

use fetch_proxy::{
    broker::{
        AckKind, AckPolicy, AckPublish, Arrival, Broker, BrokerError, Confirmation, ConnectionKind,
        ConsumerName, Delivery, Denial, Inbox, InboxEvent, InfoError, Link, PullEnd, PullRequest,
    },
    clock,
    nats::{Auth, Nats, Settings},
};
use testkit::{
    BOUND,
    fake_broker::{FakeBroker, info},
    jetstream::{Fixture, ack_wait},
    nats_server::NatsServer,
};
use tokio_util::task::TaskTracker;

use super::simulation::{
    history::History,
    jetstream::Config,
    net::{Net, SimBroker},
};

const ACK_WAIT: Duration = Duration::from_millis(1000);

/// A broker with a consumer that nothing was published to.
trait World {
    type Broker: Broker;
    fn broker(&self) -> &Self::Broker;
    fn name(&self) -> ConsumerName;
    async fn publish(&self, payload: Vec<u8>);
    /// A message that breaks whatever connection brings it.
    async fn publish_poison(&self);
    async fn delete_consumer(&self);
}

struct Fake(FakeBroker);

impl World for Fake {
    type Broker = FakeBroker;
    fn broker(&self) -> &FakeBroker {
        &self.0
    }
    fn name(&self) -> ConsumerName {
        self.0.name()
    }
    async fn publish(&self, payload: Vec<u8>) {
        self.0.publish(payload);
    }
    async fn publish_poison(&self) {
        self.0.publish_poison();
    }
    async fn delete_consumer(&self) {
        self.0.change(|info| *info = None);
    }
}

struct Real {
    fixture: Fixture,
    broker: Nats,
    tasks: TaskTracker,
}

impl World for Real {
    type Broker = Nats;
    fn broker(&self) -> &Nats {
        &self.broker
    }
    fn name(&self) -> ConsumerName {
        let (stream, consumer) = (&*self.fixture.stream, &*self.fixture.consumer);
        ConsumerName { stream: stream.into(), consumer: consumer.into() }
    }
    async fn publish(&self, payload: Vec<u8>) {
        self.fixture.publish("x", payload).await;
    }
    async fn publish_poison(&self) {
        let headers = b"NATS/1.0\r\nA: a lone\rCR\r\n\r\n";
        self.fixture.publish_raw(&NatsServer::shared().url(), headers).await;
    }
    async fn delete_consumer(&self) {
        let stream = self.fixture.jetstream.get_stream(&self.fixture.stream).await.unwrap();
        stream.delete_consumer(&self.fixture.consumer).await.unwrap();
    }
}

/// The simulation's broker, on a network where everything arrives at once.
struct Modelled {
    net: Net,
    broker: SimBroker,
}

impl World for Modelled {
    type Broker = SimBroker;
    fn broker(&self) -> &SimBroker {
        &self.broker
    }
    fn name(&self) -> ConsumerName {
        ConsumerName { stream: "S".into(), consumer: "worker".into() }
    }
    async fn publish(&self, payload: Vec<u8>) {
        self.net.with(|state, now| state.model.publish("S", payload.into(), false, now));
    }
    async fn publish_poison(&self) {
        self.net.with(|state, now| state.model.publish("S", "poison".into(), true, now));
    }
    async fn delete_consumer(&self) {
        self.net.with(|state, _| state.model.delete_consumer(&self.name()));
    }
}

async fn modelled() -> Modelled {
    let net = Net::new(1, History::new(false));
    let world = Modelled { broker: SimBroker::join(&net), net };
    world.net.with(|state, _| {
        state.model.add_stream("S");
        state.model.add_consumer(&world.name(), Config::new(ACK_WAIT));
    });
    let net = world.net.clone();
    tokio::spawn(async move { net.drive().await });
    let mut link = world.broker.link();
    while !matches!(link, Link::Up(_)) {
        link = world.broker.link_change(&link).await;
    }
    world
}

async fn fake() -> Fake {
    Fake(FakeBroker::new(info(ACK_WAIT)))
}

async fn real() -> Real {
    let fixture = Fixture::new(ack_wait(1000)).await;
    let settings = Settings {
        servers: vec![NatsServer::shared().url().parse().unwrap()],
        auth: Auth::None,
        ca: None,
        identity: None,
        domain: None,
        tls_first: false,
        inbox_prefix: "_INBOX".into(),
    };
    let tasks = TaskTracker::new();
    let broker = Nats::start(settings, &tasks);
    let mut link = broker.link();
    while !matches!(link, Link::Up(_)) {
        link = broker.link_change(&link).await;
    }
    Real { fixture, broker, tasks }
}

#[tokio::test]
async fn real_broker_leaves_no_task_behind() {
    let world = real().await;
    world.broker.close(until()).await;
    world.tasks.close();
    tokio::time::timeout(BOUND, world.tasks.wait()).await.expect("one goes on");
}

fn pull(no: u64, batch: u32) -> PullRequest {
    let expires = Duration::from_millis(300);
    PullRequest { no, batch, expires, no_wait: true, max_bytes: None }
}

fn until() -> Instant {
    clock::now() + BOUND
}

/// Collects arrivals until so many messages are there, or the pull has ended.
async fn arrivals(inbox: &mut impl Inbox, messages: usize) -> (Vec<Delivery>, Option<PullEnd>) {
    let (mut found, mut buffer) = (Vec::new(), Vec::new());
    while found.len() < messages {
        let news = tokio::time::timeout(BOUND, inbox.next(&mut buffer)).await.expect("it hangs");
        assert_eq!(news, InboxEvent::Arrived);
        for arrival in buffer.drain(..) {
            match arrival {
                Arrival::Message(delivery) => found.push(*delivery),
                Arrival::End { end, .. } => return (found, Some(end)),
            }
        }
    }
    (found, None)
}

async fn one<W: World>(world: &W) -> Delivery {
    let mut inbox = world.broker().open(&world.name(), ConnectionKind::Shared).await.unwrap();
    loop {
        inbox.pull(pull(1, 1)).await.unwrap();
        if let Some(delivery) = arrivals(&mut inbox, 1).await.0.pop() {
            return delivery;
        }
    }
}

async fn say<W: World>(world: &W, delivery: &Delivery, kind: AckKind) -> Result<(), BrokerError> {
    let orders =
        vec![AckPublish { ack: delivery.ack.clone(), kind, confirm_group: None, by: None }];
    world.broker().settle(orders, Confirmation::Confirmed, until()).await.remove(0)
}

async fn unsettled<W: World>(world: &W) -> u64 {
    world.broker().info(&world.name(), until()).await.unwrap().ack_pending
}

/// Each promise, on all brokers.
macro_rules! contract {
    ($($name:ident($world:ident) $promise:block)*) => {
        $(async fn $name<W: World>($world: W) $promise)*

        mod on_the_fake {
            $(#[tokio::test] async fn $name() { super::$name(super::fake().await).await })*
        }

        mod on_the_model {
            $(#[tokio::test(start_paused = true)]
            async fn $name() { super::$name(super::modelled().await).await })*
        }

        mod on_the_real_one {
            $(#[tokio::test] async fn $name() { super::$name(super::real().await).await })*
        }
    };
}

contract! {
    info_describes_a_consumer_and_names_a_missing_one(world) {
        world.publish(vec![1]).await;
        let info = world.broker().info(&world.name(), until()).await.unwrap();
        assert_eq!((info.ack_wait, info.ack_policy), (ACK_WAIT, AckPolicy::Explicit));
        assert_eq!((info.pending, info.ack_pending, info.delivered, info.push), (1, 0, 0, false));
        assert!(info.leader_shows, "the one server that is connected has led it all the time");
        let nobody = ConsumerName { consumer: "nobody".into(), ..world.name() };
        assert_eq!(world.broker().info(&nobody, until()).await, Err(InfoError::NoConsumer));
        let nowhere = ConsumerName { stream: "NOWHERE".into(), ..world.name() };
        assert_eq!(world.broker().info(&nowhere, until()).await, Err(InfoError::NoStream));
    }

    full_batch_ends_without_a_status_and_a_short_batch_with_one(world) {
        for number in 0..5 {
            world.publish(vec![number]).await;
        }
        let mut inbox = world.broker().open(&world.name(), ConnectionKind::Shared).await.unwrap();
        inbox.pull(pull(1, 3)).await.unwrap();
        let (first, end) = arrivals(&mut inbox, 3).await;
        assert_eq!((first.len(), end), (3, None));
        inbox.pull(pull(2, 10)).await.unwrap();
        let (rest, end) = arrivals(&mut inbox, 10).await;
        assert_eq!((rest.len(), end), (2, Some(PullEnd::Done)));
        let sequences: Vec<u64> = first.iter().chain(&rest).map(|one| one.stream_sequence).collect();
        assert_eq!(sequences, [1, 2, 3, 4, 5]);
        assert_eq!((rest[1].payload.as_ref(), rest[1].delivery_count, rest[1].pending), (&[4][..], 1, 0));
    }

    empty_pull_ends_when_it_expires(world) {
        let mut inbox = world.broker().open(&world.name(), ConnectionKind::Shared).await.unwrap();
        let began = clock::now();
        inbox.pull(pull(1, 3)).await.unwrap();
        assert_eq!(arrivals(&mut inbox, 1).await, (vec![], Some(PullEnd::Done)));
        assert!(clock::now() - began >= Duration::from_millis(250));
    }

    waiting_pull_brings_the_first_message_and_ends(world) {
        let mut inbox = world.broker().open(&world.name(), ConnectionKind::Shared).await.unwrap();
        inbox.pull(PullRequest { expires: BOUND, ..pull(1, 10) }).await.unwrap();
        let (found, ()) = tokio::join!(arrivals(&mut inbox, 10), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            world.publish(vec![7]).await;
        });
        assert_eq!((found.0.len(), found.1), (1, Some(PullEnd::Done)));
    }

    message_beyond_the_bytes_of_a_pull_is_reported_only(world) {
        world.publish(vec![0; 5000]).await;
        let mut inbox = world.broker().open(&world.name(), ConnectionKind::Shared).await.unwrap();
        inbox.pull(PullRequest { max_bytes: Some(1000), ..pull(1, 3) }).await.unwrap();
        assert_eq!(arrivals(&mut inbox, 1).await, (vec![], Some(PullEnd::TooLarge)));
    }

    ack_and_term_end_a_message(world) {
        for kind in [AckKind::Ack, AckKind::Term("no".into())] {
            world.publish(vec![1]).await;
            let delivery = one(&world).await;
            say(&world, &delivery, kind).await.unwrap();
            assert_eq!(unsettled(&world).await, 0);
        }
    }

    nak_brings_a_message_back_at_once_or_after_its_delay(world) {
        world.publish(vec![1]).await;
        let first = one(&world).await;
        say(&world, &first, AckKind::Nak(None)).await.unwrap();
        let second = one(&world).await;
        assert_eq!((second.stream_sequence, second.delivery_count), (1, 2));
        let began = clock::now();
        say(&world, &second, AckKind::Nak(Some(Duration::from_millis(500)))).await.unwrap();
        let third = one(&world).await;
        assert_eq!(third.delivery_count, 3);
        assert!(clock::now() - began >= Duration::from_millis(450));
    }

    progress_restarts_the_ack_wait(world) {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        let received = clock::now();
        tokio::time::sleep(ACK_WAIT / 2).await;
        say(&world, &delivery, AckKind::Progress).await.unwrap();
        assert_eq!(one(&world).await.delivery_count, 2);
        assert!(clock::now() - received >= ACK_WAIT * 14 / 10);
    }

    stale_ack_ends_the_delivery_of_another_worker(world) {
        world.publish(vec![1]).await;
        let stale = one(&world).await;
        let current = one(&world).await;
        assert_eq!(current.delivery_count, 2, "the ack wait of the first delivery is over");
        say(&world, &stale, AckKind::Ack).await.unwrap();
        assert_eq!(unsettled(&world).await, 0);
    }

    late_settlement_never_leaves(world) {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        let order = |by| AckPublish { ack: delivery.ack.clone(), kind: AckKind::Ack, confirm_group: None, by: Some(by) };
        for confirmation in [Confirmation::Confirmed, Confirmation::Sent] {
            let results = world.broker().settle(vec![order(clock::now())], confirmation, until()).await;
            assert!(matches!(results[..], [Err(BrokerError::Unsent(_))]), "{results:?}");
        }
        assert_eq!(unsettled(&world).await, 1);
        let results = world.broker().settle(vec![order(until())], Confirmation::Confirmed, until()).await;
        assert_eq!(results, [Ok(())]);
        assert_eq!(unsettled(&world).await, 0);
    }

    deleted_consumer_denies_settlements(world) {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        world.delete_consumer().await;
        let denied = say(&world, &delivery, AckKind::Ack).await;
        assert_eq!(denied, Err(Denial::Gone.into()));
    }

    results_keep_the_order_of_their_publishes(world) {
        for number in 0..50 {
            world.publish(vec![number]).await;
        }
        let mut inbox = world.broker().open(&world.name(), ConnectionKind::Shared).await.unwrap();
        inbox.pull(pull(1, 50)).await.unwrap();
        let (found, _) = arrivals(&mut inbox, 50).await;
        for (confirmation, half) in [Confirmation::Confirmed, Confirmation::Sent].into_iter().zip(found.chunks(25)) {
            let order = |one: &Delivery| AckPublish { ack: one.ack.clone(), kind: AckKind::Ack, confirm_group: None, by: None };
            let orders = half.iter().map(order).collect();
            let results = world.broker().settle(orders, confirmation, until()).await;
            assert_eq!(results, vec![Ok(()); 25]);
        }
        testkit::eventually("all to be settled", || async {
            (unsettled(&world).await == 0).then_some(())
        })
        .await;
    }

    unreadable_message_breaks_its_connection_and_is_terminated(world) {
        for number in 0..3 {
            world.publish(vec![number]).await;
            world.publish_poison().await;
        }
        let (mut broken, mut read) = (0, Vec::new());
        while read.len() < 3 {
            let Ok(mut inbox) = world.broker().open(&world.name(), ConnectionKind::Shared).await else {
                tokio::task::yield_now().await;
                continue;
            };
            if inbox.pull(pull(1, 1)).await.is_err() {
                continue;
            }
            let mut buffer = Vec::new();
            match inbox.next(&mut buffer).await {
                InboxEvent::Arrived => read.extend(buffer.into_iter().filter_map(|one| match one {
                    Arrival::Message(delivery) => Some(delivery.stream_sequence),
                    Arrival::End { .. } => None,
                })),
                InboxEvent::Lost => {}
                InboxEvent::Broken => broken += 1,
            }
            let search = world.broker().unreadable(&world.name(), 1, until()).await.unwrap();
            for found in search.found {
                assert_eq!(found.stream_sequence % 2, 0, "a good message is called unreadable");
                let kind = AckKind::Term("unreadable".into());
                let orders = vec![AckPublish { ack: found.ack, kind, confirm_group: None, by: None }];
                let results = world.broker().settle(orders, Confirmation::Confirmed, until()).await;
                assert_eq!(results, [Ok(())]);
            }
        }
        assert!(broken >= 2, "{broken}");
        assert_eq!(read[..1], [1]);
    }

    dedicated_connection_breaks_alone(world) {
        let mut shared = world.broker().open(&world.name(), ConnectionKind::Shared).await.unwrap();
        world.publish_poison().await;
        let link = world.broker().link();
        let mut apart = world.broker().open(&world.name(), ConnectionKind::Dedicated).await.unwrap();
        apart.pull(pull(1, 1)).await.unwrap();
        let news = tokio::time::timeout(BOUND, apart.next(&mut Vec::new())).await.unwrap();
        assert_eq!(news, InboxEvent::Broken);
        world.publish(vec![7]).await;
        shared.pull(pull(1, 1)).await.unwrap();
        assert_eq!(arrivals(&mut shared, 1).await.0.len(), 1);
        assert_eq!(world.broker().link(), link);
    }

    publishes_of_one_group_are_applied_when_the_last_is_answered(world) {
        for round in 0..20_u64 {
            for number in 0..100 {
                world.publish(vec![number]).await;
            }
            let mut inbox = world.broker().open(&world.name(), ConnectionKind::Shared).await.unwrap();
            let mut found = Vec::new();
            while found.len() < 100 {
                inbox.pull(pull(1 + found.len() as u64, 100 - found.len() as u32)).await.unwrap();
                found.extend(arrivals(&mut inbox, 100 - found.len()).await.0);
            }
            let order = |(place, one): (usize, &Delivery)| {
                let kind = if place % 2 == 0 { AckKind::Ack } else { AckKind::Term("no".into()) };
                AckPublish { ack: one.ack.clone(), kind, confirm_group: Some(7), by: None }
            };
            let orders = found.iter().enumerate().map(order).collect();
            let results = world.broker().settle(orders, Confirmation::Confirmed, until()).await;
            assert_eq!(results, vec![Ok(()); 100]);
            // At once, and not eventually.
            assert_eq!(unsettled(&world).await, 0, "round {round}");
        }
    }
}
