//! What operators see of several replicas, and leases that they take away.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use fetch_proxy::{
    api_error::ApiError,
    broker::{AckKind, Confirmation, ConsumerInfo},
    clock,
    lease::LeaseId,
    lessor::{Action, Error, SettleItem, Settled},
    pb::{self, LeaseFilter, ReleaseLeasesRequest},
    token::new_key_line,
};
use testkit::fake_broker::{FakeBroker, Fault, info};

use crate::linked::{Fate, Member, Net, PATIENCE};

const ALL: &(dyn Fn(&str, &str) -> bool + Sync) = &|_, _| true;
const NONE: &(dyn Fn(&str, &str) -> bool + Sync) = &|_, _| false;

/// Two replicas, the one with the lower identifier first.
async fn two(most: usize) -> (Net, FakeBroker, [Member; 2]) {
    two_of(most, info(Duration::from_secs(60))).await
}

async fn two_of(most: usize, info: ConsumerInfo) -> (Net, FakeBroker, [Member; 2]) {
    let (net, keys) = Net::new(&new_key_line().unwrap());
    let broker = FakeBroker::new(ConsumerInfo { max_ack_pending: None, ..info });
    let mut members = Vec::new();
    for _ in 0..2 {
        members.push(Member::join(&net, &keys, &broker, most).await);
    }
    members.sort_by_key(|member| member.us);
    (net, broker, <[Member; 2]>::try_from(members).ok().unwrap())
}

/// Leases so many messages for the worker.
async fn lease(member: &Member, broker: &FakeBroker, worker: &str, count: usize) -> Vec<LeaseId> {
    let mut leases = Vec::new();
    while leases.len() < count {
        let fetched = member.fetched_by(worker, broker, (count - leases.len()).min(1000)).await;
        leases.extend(fetched.messages().iter().map(|leased| leased.id));
        fetched.delivered();
    }
    leases
}

fn page(filter: LeaseFilter, page_size: u32, page_token: &str) -> pb::ListLeasesRequest {
    pb::ListLeasesRequest { filter: Some(filter), page_size, page_token: page_token.to_owned() }
}

/// All pages, each of this size.
async fn walk(asked: &Member, filter: &LeaseFilter, size: u32) -> Vec<pb::Lease> {
    let (mut all, mut token) = (Vec::new(), String::new());
    for _ in 0..100 {
        let request = page(filter.clone(), size, &token);
        let answer = asked.inspector.list_leases(request, ALL).await.unwrap();
        assert!(answer.leases.len() <= size as usize && answer.unreachable.is_empty());
        all.extend(answer.leases);
        token = answer.next_page_token;
        if token.is_empty() {
            return all;
        }
    }
    panic!("the walk does not end");
}

fn ids(leases: &[pb::Lease]) -> Vec<(String, u64)> {
    leases.iter().map(|lease| (lease.replica.clone(), lease.lease)).collect()
}

fn of_worker(worker: &str) -> LeaseFilter {
    LeaseFilter { worker: worker.to_owned(), ..LeaseFilter::default() }
}

fn release(filter: LeaseFilter) -> ReleaseLeasesRequest {
    ReleaseLeasesRequest { filter: Some(filter), ..ReleaseLeasesRequest::default() }
}

async fn ack(member: &Member, lease: LeaseId) -> Result<Settled, Error> {
    let item = SettleItem { lease, action: Action::Ack, by: None };
    let until = clock::now() + PATIENCE;
    member.lessor.settle(vec![item], Confirmation::Confirmed, until).await.remove(0)
}

/// Lets the replicas hear each other's counts.
async fn heartbeats() {
    tokio::time::sleep(Duration::from_secs(2)).await;
}

#[tokio::test(start_paused = true)]
async fn leases_of_all_replicas_are_listed_in_pages_by_any_of_them() {
    let (_net, broker, [one, other]) = two(100).await;
    lease(&one, &broker, "a", 7).await;
    lease(&other, &broker, "b", 5).await;
    tokio::time::sleep(Duration::from_secs(90)).await;
    for asked in [&one, &other] {
        let leases = walk(asked, &LeaseFilter::default(), 3).await;
        let places = ids(&leases);
        assert!(places.len() == 12 && places.is_sorted_by(|one, next| one < next), "{places:?}");
        let lease = &leases[0];
        assert_eq!((&*lease.replica, &*lease.worker), (&*one.us.to_string(), "a"));
        assert_eq!((&*lease.stream, &*lease.consumer, lease.stream_sequence), ("S", "worker", 1));
        assert_eq!((&*lease.principal, &*lease.identity), ("anonymous", "key:a"));
        assert_eq!((&*lease.peer, lease.state()), ("192.0.2.1:4711", pb::LeaseState::Held));
        assert!(lease.age.unwrap().seconds >= 90 && lease.delivery_count == 1);
        assert_eq!(walk(asked, &of_worker("b"), 500).await.len(), 5);
    }
    let older = |seconds| LeaseFilter {
        older_than: Some(prost_types::Duration { seconds, nanos: 0 }),
        ..LeaseFilter::default()
    };
    assert_eq!(walk(&one, &older(60), 500).await.len(), 12);
    assert_eq!(walk(&one, &older(3000), 500).await.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_leases_are_paged_and_each_is_there_once() {
    let (_net, broker, [one, other]) = two(20_000).await;
    lease(&one, &broker, "a", 9000).await;
    lease(&other, &broker, "b", 1000).await;
    for size in [500, 499, 133] {
        let places = ids(&walk(&other, &LeaseFilter::default(), size).await);
        assert_eq!(places.iter().collect::<BTreeSet<_>>().len(), 10_000);
        assert_eq!(places.len(), 10_000, "none is there twice");
    }
    // A filter that means few of them looks at all of them.
    assert_eq!(walk(&other, &of_worker("b"), 100).await.len(), 1000);
}

#[tokio::test(start_paused = true)]
async fn lease_that_lives_through_a_walk_is_listed_once_while_others_come_and_go() {
    let (_net, broker, [one, other]) = two(20_000).await;
    let mut held = BTreeMap::new();
    for member in [&one, &other] {
        held.insert(member.us, lease(member, &broker, "first", 400).await);
    }
    let mut survivors: BTreeSet<(String, u64)> = held
        .iter()
        .flat_map(|(us, leases)| leases.iter().map(|lease| (us.to_string(), lease.get())))
        .collect();
    let (mut seen, mut token, mut round) = (Vec::new(), String::new(), 0);
    loop {
        let request = page(LeaseFilter::default(), 37, &token);
        let answer = other.inspector.list_leases(request, ALL).await.unwrap();
        seen.extend(ids(&answer.leases));
        token = answer.next_page_token;
        if token.is_empty() {
            break;
        }
        round += 1;
        for member in [&one, &other] {
            let leases = held.get_mut(&member.us).unwrap();
            for _ in 0..10 {
                let ended = leases.remove((round * 7) % leases.len());
                ack(member, ended).await.unwrap();
                survivors.remove(&(member.us.to_string(), ended.get()));
            }
            leases.extend(lease(member, &broker, "later", 10).await);
        }
        assert!(round < 100);
    }
    let distinct: BTreeSet<_> = seen.iter().cloned().collect();
    assert_eq!(distinct.len(), seen.len(), "none is there twice");
    assert!(survivors.len() > 300 && survivors.is_subset(&distinct));
}

#[tokio::test(start_paused = true)]
async fn replica_of_an_older_version_is_named_at_once() {
    let (_net, broker, [one, other]) = two(100).await;
    lease(&other, &broker, "b", 3).await;
    heartbeats().await;
    other.is_older();
    let began = clock::now();
    let leases = one.inspector.list_leases(page(LeaseFilter::default(), 0, ""), ALL).await.unwrap();
    let replicas = one.inspector.list_replicas().await;
    assert_eq!(clock::now(), began, "nobody waits for it");
    assert!(leases.leases.is_empty());
    for missing in [&leases.unreachable, &replicas.unreachable] {
        let [missing] = &missing[..] else { panic!("{missing:?}") };
        assert_eq!((&*missing.instance, &*missing.name), (&*other.us.to_string(), "pod"));
        assert!(missing.why.contains("too old"), "{}", missing.why);
    }
    let shown: Vec<_> = replicas.replicas.iter().map(|it| (&*it.instance, it.leases)).collect();
    assert_eq!(shown, [(&*one.us.to_string(), 0), (&*other.us.to_string(), 3)]);
}

#[tokio::test(start_paused = true)]
async fn replica_that_does_not_answer_is_named_after_a_second() {
    let (net, broker, [one, other]) = two(100).await;
    lease(&one, &broker, "a", 2).await;
    lease(&other, &broker, "b", 3).await;
    for fate in [Fate::Lost, Fate::Unanswered] {
        net.admin(fate);
        let began = clock::now();
        let request = page(LeaseFilter::default(), 0, "");
        let leases = one.inspector.list_leases(request, ALL).await.unwrap();
        assert_eq!((leases.leases.len(), clock::now() - began), (2, Duration::from_secs(1)));
        assert_eq!(leases.unreachable[0].instance, other.us.to_string());
        assert!(leases.unreachable[0].why.contains("within 1s"), "{:?}", leases.unreachable);
        let request = pb::ListConsumersRequest::default();
        let consumers = one.inspector.list_consumers(request, ALL).await.unwrap();
        assert_eq!((consumers.consumers.len(), consumers.unreachable.len()), (1, 1));
        let request = pb::ListConnectionsRequest::default();
        let connections = one.inspector.list_connections(request).await.unwrap();
        assert_eq!(connections.unreachable.len(), 1);
    }
    net.admin(Fate::Pass);
    other.vanish().await;
    let filter = LeaseFilter { replica: other.us.to_string(), ..LeaseFilter::default() };
    tokio::time::sleep(Duration::from_secs(6)).await;
    let gone = one.inspector.list_leases(page(filter, 0, ""), ALL).await.unwrap();
    assert!(gone.unreachable[0].why.contains("not there"), "{:?}", gone.unreachable);
}

#[tokio::test(start_paused = true)]
async fn place_in_a_walk_at_a_replica_that_has_gone_is_told() {
    let (_net, broker, [one, other]) = two(100).await;
    lease(&one, &broker, "a", 4).await;
    lease(&other, &broker, "b", 2).await;
    let first =
        other.inspector.list_leases(page(LeaseFilter::default(), 3, ""), ALL).await.unwrap();
    one.vanish().await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let request = page(LeaseFilter::default(), 3, &first.next_page_token);
    let second = other.inspector.list_leases(request, ALL).await.unwrap();
    assert_eq!(second.unreachable[0].instance, one.us.to_string());
    assert_eq!(second.leases.len(), 2, "the walk continues at the next replica");
}

/// The field that is refused.
fn field<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
    match result {
        Err(ApiError::Field { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn hostile_pages_and_filters_are_refused_by_their_field() {
    let (_net, broker, [one, _other]) = two(100).await;
    lease(&one, &broker, "a", 5).await;
    let inspector = &one.inspector;
    let token = inspector.list_leases(page(LeaseFilter::default(), 2, ""), ALL).await.unwrap();
    let token = token.next_page_token;
    let long = "A".repeat(100_000);
    for wrong in ["x", "=", "\0", "🦀", &token[1..], &format!("{token}A"), &long] {
        let request = page(LeaseFilter::default(), 2, wrong);
        assert_eq!(field(inspector.list_leases(request, ALL).await), "page_token", "{wrong:.20}");
        let page_token = wrong.to_owned();
        let request = pb::ListConsumersRequest { page_token, ..Default::default() };
        assert_eq!(field(inspector.list_consumers(request, ALL).await), "page_token");
        let request = pb::ListConnectionsRequest { page_token: wrong.to_owned(), page_size: 9 };
        assert_eq!(field(inspector.list_connections(request).await), "page_token");
    }
    let other_filter = page(of_worker("a"), 2, &token);
    assert_eq!(field(inspector.list_leases(other_filter, ALL).await), "page_token");
    let span = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
    let name = |length: usize| "n".repeat(length);
    let none = LeaseFilter::default;
    for (wrong, filter) in [
        ("filter.stream", LeaseFilter { stream: name(256), ..none() }),
        ("filter.consumer", LeaseFilter { consumer: name(256), ..none() }),
        ("filter.principal", LeaseFilter { principal: name(300), ..none() }),
        ("filter.worker", LeaseFilter { worker: name(5000), ..none() }),
        ("filter.replica", LeaseFilter { replica: "pod-1".to_owned(), ..none() }),
        ("filter.replica", LeaseFilter { replica: "-000000000000001".to_owned(), ..none() }),
        ("filter.older_than", LeaseFilter { older_than: span(-1, 0), ..none() }),
        ("filter.older_than", LeaseFilter { older_than: span(1, -1), ..none() }),
        ("filter.expiring_within", LeaseFilter { expiring_within: span(i64::MAX, 0), ..none() }),
        ("filter.state", LeaseFilter { state: 99, ..none() }),
        ("filter.state", LeaseFilter { state: -1, ..none() }),
    ] {
        let listed = inspector.list_leases(page(filter.clone(), 0, ""), ALL).await;
        assert_eq!(field(listed), wrong);
        assert_eq!(field(inspector.release_leases(release(filter), ALL).await), wrong);
    }
    // What no lease can have is meant by no lease.
    let nothing = LeaseFilter { worker: "'; DROP".to_owned(), stream_sequence: u64::MAX, ..none() };
    assert!(walk(&one, &nothing, 500).await.is_empty());
    assert_eq!(field(inspector.release_leases(release(none()), ALL).await), "filter");
    let request = ReleaseLeasesRequest { filter: None, ..ReleaseLeasesRequest::default() };
    assert_eq!(field(inspector.release_leases(request, ALL).await), "filter");
    for delay in [span(-1, 0), span(24 * 3600 + 1, 0), span(i64::MAX, i32::MAX)] {
        let request = ReleaseLeasesRequest { delay, ..release(of_worker("a")) };
        assert_eq!(field(inspector.release_leases(request, ALL).await), "delay");
    }
    assert_eq!(one.lessor.held(), 5, "nothing was released");
}

#[tokio::test(start_paused = true)]
async fn rows_that_the_caller_may_not_see_are_left_out() {
    let (_net, broker, [one, other]) = two(100).await;
    lease(&one, &broker, "a", 5).await;
    lease(&other, &broker, "b", 5).await;
    let answer =
        one.inspector.list_leases(page(LeaseFilter::default(), 3, ""), NONE).await.unwrap();
    assert!(answer.leases.is_empty() && answer.next_page_token.is_empty());
    let consumers = one.inspector.list_consumers(pb::ListConsumersRequest::default(), NONE).await;
    assert!(consumers.unwrap().consumers.is_empty());
    let released = one.inspector.release_leases(release(of_worker("a")), NONE).await.unwrap();
    assert_eq!((released.released, one.lessor.held()), (0, 5));
}

#[tokio::test(start_paused = true)]
async fn released_leases_are_over_for_their_holder_at_any_replica() {
    let (_net, broker, [one, other]) = two(100).await;
    let kept = lease(&other, &broker, "alive", 2).await;
    let lost = lease(&other, &broker, "dead", 3).await;
    let dry = ReleaseLeasesRequest { validate_only: true, ..release(of_worker("dead")) };
    let would = one.inspector.release_leases(dry, ALL).await.unwrap();
    assert_eq!((would.released, would.leases.len(), other.lessor.held()), (3, 3, 5));
    let delay = Some(prost_types::Duration { seconds: 30, nanos: 0 });
    let request = ReleaseLeasesRequest { delay, ..release(of_worker("dead")) };
    let done = one.inspector.release_leases(request, ALL).await.unwrap();
    assert_eq!((done.released, done.leases.len(), done.more), (3, 3, false));
    tokio::time::sleep(Duration::from_millis(10)).await;
    let naks = [const { AckKind::Nak(Some(Duration::from_secs(30))) }; 3];
    assert_eq!(broker.published(), naks);
    for lease in lost {
        assert_eq!(ack(&other, lease).await, Err(Error::LeaseExpired { forgotten: false }));
    }
    for lease in kept {
        assert!(ack(&other, lease).await.is_ok());
    }
    assert!(other.is_empty());
}

#[tokio::test(start_paused = true)]
async fn release_stops_at_its_limit_and_says_that_there_is_more() {
    let (_net, broker, [one, other]) = two(3000).await;
    lease(&one, &broker, "a", 1200).await;
    lease(&other, &broker, "a", 100).await;
    let some = ReleaseLeasesRequest { limit: 7, ..release(of_worker("a")) };
    let some = one.inspector.release_leases(some, ALL).await.unwrap();
    assert_eq!((some.released, some.more, one.lessor.held()), (7, true, 1193));
    let most = ReleaseLeasesRequest { limit: u32::MAX, ..release(of_worker("a")) };
    let most = one.inspector.release_leases(most, ALL).await.unwrap();
    assert_eq!((most.released, most.leases.len(), most.more), (1000, 100, true));
    let rest = one.inspector.release_leases(release(of_worker("a")), ALL).await.unwrap();
    assert_eq!((rest.released, rest.more), (293, false));
    assert!(one.is_empty() && other.is_empty());
}

#[tokio::test(start_paused = true)]
async fn last_attempt_is_released_by_force_alone() {
    let once = ConsumerInfo { max_deliver: Some(1), ..info(Duration::from_secs(60)) };
    let (_net, broker, [one, other]) = two_of(100, once).await;
    lease(&other, &broker, "a", 2).await;
    let kept = one.inspector.release_leases(release(of_worker("a")), ALL).await.unwrap();
    assert_eq!((kept.released, kept.skipped_last_attempt, other.lessor.held()), (0, 2, 2));
    let forced = ReleaseLeasesRequest { force_last_attempts: true, ..release(of_worker("a")) };
    let forced = one.inspector.release_leases(forced, ALL).await.unwrap();
    assert_eq!((forced.released, other.lessor.held()), (2, 0));
    assert!(forced.leases.iter().all(|lease| lease.last_attempt && lease.max_deliver == 1));
}

#[tokio::test(start_paused = true)]
async fn lease_that_is_being_settled_is_not_released() {
    let (_net, broker, [one, other]) = two(100).await;
    let leases = lease(&one, &broker, "a", 2).await;
    broker.script([Fault::AnswerLost]);
    let (settled, released) = tokio::join!(ack(&one, leases[0]), async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        other.inspector.release_leases(release(of_worker("a")), ALL).await.unwrap()
    });
    assert_eq!((released.released, released.skipped_settling), (1, 1));
    assert_eq!(settled, Err(Error::Unconfirmed));
    let again = other.inspector.release_leases(release(of_worker("a")), ALL).await.unwrap();
    assert_eq!((again.released, again.skipped_settling), (0, 1), "it may have been settled");
}

#[tokio::test(start_paused = true)]
async fn release_without_an_answer_says_that_it_may_have_happened() {
    let (net, broker, [one, other]) = two(100).await;
    lease(&other, &broker, "a", 2).await;
    net.admin_after(1, Fate::Unanswered);
    let answer = one.inspector.release_leases(release(of_worker("a")), ALL).await.unwrap();
    assert_eq!((answer.released, other.lessor.held()), (0, 0));
    assert!(answer.unreachable[0].why.contains("may have released"), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn consumer_has_the_shares_of_all_replicas_and_their_sum() {
    let (_net, broker, [one, other]) = two(100).await;
    lease(&one, &broker, "a", 3).await;
    lease(&other, &broker, "b", 4).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    let answer = one.inspector.list_consumers(pb::ListConsumersRequest::default(), ALL).await;
    let [consumer] = &answer.unwrap().consumers[..] else { panic!() };
    assert_eq!((&*consumer.stream, &*consumer.consumer), ("S", "worker"));
    let total = consumer.total.clone().unwrap();
    assert!(total.leases == 7 && total.oldest_lease.unwrap().seconds >= 20, "{total:?}");
    let shares: Vec<_> = consumer.shares.iter().map(|it| (&*it.replica, it.leases)).collect();
    assert_eq!(shares, [(&*one.us.to_string(), 3), (&*other.us.to_string(), 4)]);
    assert_eq!((consumer.ack_pending, consumer.info_age.unwrap().seconds), (7, 0), "read again");
    let named = |consumer: &str| pb::ListConsumersRequest {
        stream: "S".to_owned(),
        consumer: consumer.to_owned(),
        ..pb::ListConsumersRequest::default()
    };
    for (name, count) in [("worker", 1), ("another", 0)] {
        let answer = other.inspector.list_consumers(named(name), ALL).await.unwrap();
        assert_eq!(answer.consumers.len(), count, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn lease_names_its_worker_and_the_time_of_its_grant_after_each_hand_over() {
    let (net, keys) = Net::new(&new_key_line().unwrap());
    let broker = FakeBroker::new(info(Duration::from_secs(60)));
    let one = Member::join(&net, &keys, &broker, 100).await;
    lease(&one, &broker, "a", 2).await;
    lease(&one, &broker, "b", 1).await;
    let before = walk(&one, &LeaseFilter::default(), 500).await;
    let mut owner = one;
    for _ in 0..2 {
        let next = Member::join(&net, &keys, &broker, 100).await;
        tokio::time::sleep(Duration::from_secs(7)).await;
        assert!(owner.leave().await);
        let leases = walk(&next, &LeaseFilter::default(), 500).await;
        assert_eq!(leases.len(), before.len());
        for (lease, before) in leases.into_iter().zip(&before) {
            assert_eq!((&*lease.replica, &*lease.principal), (&*next.us.to_string(), "anonymous"));
            let names = |lease: &pb::Lease| {
                (lease.worker.clone(), lease.identity.clone(), lease.peer.clone())
            };
            assert_eq!(names(&lease), names(before));
            assert_eq!((&*lease.identity, &*lease.peer), ("key:a", "192.0.2.1:4711"));
            let (at, was) = (lease.grant_time.unwrap(), before.grant_time.unwrap());
            let moved =
                (at.seconds - was.seconds) * 1_000_000_000 + i64::from(at.nanos - was.nanos);
            assert!(moved.abs() < 1_000_000_000, "the grant has moved by {moved} ns");
        }
        assert_eq!(walk(&next, &of_worker("a"), 500).await.len(), 2);
        owner = next;
    }
}
