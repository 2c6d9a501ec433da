//! Two versions next to each other, and strangers on the bus: what is not known is passed over or
//! refused, and what is not sealed does nothing.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use fetch_proxy::{
    bus::{Bus as _, RequestError},
    clock,
    pb::{self, peer::v1 as wire},
    token::{KeyRing, Sealer, new_key_line},
};
use prost::Message as _;
use testkit::fake_broker::{FakeBroker, info};

use crate::{
    linked::{Member, Net, PATIENCE},
    moving::question,
};

/// A field that no version knows yet.
const NEWER: &[u8] = &[0xfa, 0x3f, 2, b'n', b'o'];

async fn two(key: &str) -> (Net, FakeBroker, [Member; 2]) {
    let (net, keys) = Net::new(key);
    let broker = FakeBroker::new(info(Duration::from_secs(60)));
    let one = Member::join(&net, &keys, &broker, 100).await;
    let other = Member::join(&net, &keys, &broker, 100).await;
    (net, broker, [one, other])
}

fn ack() -> pb::settlement::Action {
    pb::settlement::Action::Ack(pb::AckAction {})
}

#[tokio::test(start_paused = true)]
async fn unknown_fields_of_a_newer_replica_are_ignored() {
    let (_net, broker, [owner, newer]) = two(&new_key_line().unwrap()).await;
    let lease = owner.leased(&broker, 1).await[0];
    let question = [&*question(&owner, lease, ack()), NEWER].concat();
    let until = clock::now() + PATIENCE;
    let answer = newer.cluster.ask_to_settle(owner.us, &question, until).await.unwrap();
    let answer = wire::SettleResponse::decode(&*answer).unwrap();
    assert_eq!(answer.results[0].outcome(), pb::Outcome::Confirmed);
}

/// An older replica knows only of an Extend with a length, and takes it from this one as well.
#[tokio::test(start_paused = true)]
async fn extend_without_a_length_works_across_versions() {
    let (_net, broker, [owner, asker]) = two(&new_key_line().unwrap()).await;
    let lease = owner.leased(&broker, 1).await[0];
    let length = prost_types::Duration { seconds: 30, nanos: 0 };
    let extend = pb::settlement::Action::Extend(pb::ExtendAction { lease: Some(length) });
    let question = question(&owner, lease, extend);
    let older = wire::SettleRequest::decode(&*question).unwrap();
    let newer = wire::SettleRequest { as_granted: vec![0], ..older.clone() };
    for (question, seconds) in [(older, 30), (newer, 58)] {
        let until = clock::now() + PATIENCE;
        let answer =
            asker.cluster.ask_to_settle(owner.us, &question.encode_to_vec(), until).await.unwrap();
        let answer = wire::SettleResponse::decode(&*answer).unwrap();
        assert_eq!(answer.results[0].lease.unwrap().seconds, seconds);
    }
}

/// The answer of `receiver` to a step that `sender` sends. Each step has a number of its own.
async fn step(
    sender: &Member,
    receiver: &Member,
    request: &[u8],
    number: u8,
) -> wire::HandoverResponse {
    let subject = receiver.subject("handover");
    let frame = sender.keys.sealer().seal_frame(&subject, request, [number; 24]);
    let until = clock::now() + PATIENCE;
    let answer = sender.lessor.broker().request(&subject, frame.into(), until).await.unwrap();
    let channel = format!("{subject} {}", format!("{number:02x}").repeat(24));
    let (_, answer) = sender.keys.sealer().open_frame(&channel, &answer).unwrap();
    wire::HandoverResponse::decode(&*answer).unwrap()
}

#[tokio::test(start_paused = true)]
async fn step_of_a_newer_hand_over_is_refused_without_a_trace() {
    let (_net, _broker, [receiver, newer]) = two(&new_key_line().unwrap()).await;
    let request = wire::HandoverRequest { handover: vec![7; 8].into(), step: None };
    let request = [&*request.encode_to_vec(), NEWER].concat();
    let answer = step(&newer, &receiver, &request, 1).await;
    assert!(!answer.done && answer.why.contains("version"), "{answer:?}");
    assert!(receiver.is_empty());
}

/// An older replica does not tell who has a lease. A newer one may have longer names than this version keeps.
#[tokio::test(start_paused = true)]
async fn lease_is_taken_over_whether_its_sender_names_the_caller_or_not() {
    let (_net, broker, [receiver, sender]) = two(&new_key_line().unwrap()).await;
    // JetStream knows these deliveries.
    sender.leased(&broker, 3).await;
    let name = broker.name();
    let read = info(Duration::from_secs(60));
    let consumer = wire::Consumer {
        stream: name.stream.to_string(),
        consumer: name.consumer.to_string(),
        created: read.created.to_string(),
        leader: read.leader.0,
    };
    let lease = |sequence, caller, held| wire::MovingLease {
        name: sender.us.0.to_vec().into(),
        lease: sequence,
        ack_subject: format!("$JS.ACK.S.worker.1.{sequence}.{sequence}.1.0"),
        sequence,
        consumer_sequence: sequence,
        delivery_count: 1,
        ack_by: 50_000_000,
        ack_wait: 60_000_000,
        caller,
        held,
        ..wire::MovingLease::default()
    };
    let long =
        wire::Caller { worker: "w".repeat(1000), peer: "?".to_owned(), ..Default::default() };
    let leases = [(0, None), (1, Some(9_000_000)), (7, None)];
    let leases = (1..).zip(leases).map(|(sequence, (caller, held))| lease(sequence, caller, held));
    let prepare = wire::Prepare {
        consumers: vec![consumer],
        leases: leases.collect(),
        callers: vec![long],
        ..wire::Prepare::default()
    };
    let names = vec![sender.us.0.to_vec().into()];
    let commit = wire::Commit { names, leases: 3, ..wire::Commit::default() };
    let steps = [
        wire::handover_request::Step::Prepare(prepare),
        wire::handover_request::Step::Commit(commit),
    ];
    for (number, one) in (1..).zip(steps) {
        let request = wire::HandoverRequest { handover: vec![7; 8].into(), step: Some(one) };
        let answer = step(&sender, &receiver, &request.encode_to_vec(), number).await;
        assert!(answer.done, "{answer:?}");
    }
    let mut seen = Vec::new();
    let now = clock::now();
    receiver.lessor.look_at_leases(None, |lease| {
        let caller = lease.caller.map(|caller| (caller.worker.len(), caller.peer));
        let age = lease.since.map(|since| now.saturating_duration_since(since).as_secs());
        seen.push((lease.sequence, caller, age));
        true
    });
    assert_eq!(seen, [(1, None, Some(0)), (2, Some((64, None)), Some(9)), (3, None, Some(0))]);
}

#[tokio::test(start_paused = true)]
async fn request_sealed_for_another_subject_settles_nothing() {
    let key = new_key_line().unwrap();
    let (_net, broker, [owner, other]) = two(&key).await;
    let lease = owner.leased(&broker, 1).await[0];
    let question = question(&owner, lease, ack());
    let subject = owner.subject("settle");
    let ours = other.keys.sealer();
    let theirs = Sealer::new(KeyRing::parse(&new_key_line().unwrap()).unwrap(), "linked");
    let elsewhere = Sealer::new(KeyRing::parse(&key).unwrap(), "another");
    let frames = [
        ("plain", question.clone()),
        ("sealed with another key", theirs.seal_frame(&subject, &question, [1; 24])),
        ("of another cluster", elsewhere.seal_frame(&subject, &question, [2; 24])),
        ("for another subject", ours.seal_frame(&other.subject("settle"), &question, [3; 24])),
        ("cut", ours.seal_frame(&subject, &question, [4; 24])[..40].to_vec()),
        ("nothing", Vec::new()),
    ];
    for (what, frame) in frames {
        let until = clock::now() + PATIENCE / 10;
        let answer = other.lessor.broker().request(&subject, Bytes::from(frame), until).await;
        assert_eq!(answer, Err(RequestError::Silent), "{what}");
        assert_eq!(broker.published(), [], "{what}");
    }
    assert_eq!(owner.lessor.held(), 1);
    // The question comes twice, and is carried out once.
    let frame = Bytes::from(ours.seal_frame(&subject, &question, [5; 24]));
    let until = clock::now() + PATIENCE;
    other.lessor.broker().request(&subject, frame.clone(), until).await.unwrap();
    let again = other.lessor.broker().request(&subject, frame, until).await;
    assert_eq!((again, broker.published().len()), (Err(RequestError::Silent), 1));
}

/// A beat as version 0.1 says it: with nothing of how far it has come, or of how long it runs.
fn of_version_0_1(sealer: &Sealer) -> Bytes {
    let (instance, keys) = (Bytes::from_static(b"version1"), sealer.ring().ids());
    let keys: Vec<Bytes> = keys.iter().map(|key| Bytes::copy_from_slice(key)).collect();
    let body = wire::BeatBody {
        instance: instance.clone(),
        keys: keys.clone(),
        names: vec![instance.clone()],
        version: "0.1.0".to_owned(),
        room: 7,
        ..wire::BeatBody::default()
    };
    let body = sealer.seal_frame("_fetchproxy.linked.beat", &body.encode_to_vec(), [6; 24]);
    let beat =
        wire::Beat { instance, keys, started: 1, body: body.into(), ..wire::Beat::default() };
    beat.encode_to_vec().into()
}

#[tokio::test(start_paused = true)]
async fn request_without_a_principal_settles_only_where_everybody_may() {
    let key = new_key_line().unwrap();
    let (_net, broker, [owner, asker]) = two(&key).await;
    let leases = owner.leased(&broker, 4).await;
    let ask = async |lease: usize| {
        let question = question(&owner, leases[lease], ack());
        let until = clock::now() + PATIENCE;
        let answer = asker.cluster.ask_to_settle(owner.us, &question, until).await.unwrap();
        let answer = wire::SettleResponse::decode(&*answer).unwrap();
        let result = answer.results[0].clone();
        result.error.map_or(Ok(result.outcome), |error| Err(error.reason))
    };
    let (confirmed, denied) = (Ok(pb::Outcome::Confirmed.into()), Err("NOT_ALLOWED".to_owned()));
    assert_eq!(ask(0).await, confirmed, "the owner has no policy");
    owner.cluster.obeys(Some([7; 8]));
    assert_eq!(ask(1).await, denied, "all replicas know principals");
    assert_eq!(owner.lessor.held(), 3);
    let ring = KeyRing::parse(&key).unwrap();
    let beat = of_version_0_1(&Sealer::new(ring, "linked"));
    let until = clock::now() + PATIENCE;
    asker.lessor.broker().publish("_fetchproxy.linked.beat", beat, until).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(ask(1).await, confirmed, "a replica lets everybody settle");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(ask(2).await, denied, "that replica is gone");
    owner.cluster.obeys(None);
    assert_eq!(ask(2).await, confirmed);
}

#[tokio::test(start_paused = true)]
async fn replica_of_version_0_1_counts_as_serving() {
    let key = new_key_line().unwrap();
    let sealer = |key: &str| Sealer::new(KeyRing::parse(key).unwrap(), "linked");
    let (net, keys) = Net::new(&key);
    let broker = FakeBroker::new(info(Duration::from_secs(60)));
    let newcomer = Member::join(&net, &keys, &broker, 100).await;
    let hear = async |sealer: &Sealer| {
        let until = clock::now() + PATIENCE;
        let beat = of_version_0_1(sealer);
        newcomer.lessor.broker().publish("_fetchproxy.linked.beat", beat, until).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(newcomer.cluster.incompatibility(), None);
    hear(&sealer(&new_key_line().unwrap())).await;
    let why = newcomer.cluster.incompatibility().unwrap();
    assert!(why.contains("shares no token key"), "{why}");
    // One that has our key is kin, and heard again however often it says the same.
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(3)).await;
        hear(&sealer(&key)).await;
    }
    assert_eq!(newcomer.cluster.incompatibility(), None);
    hear(&sealer(&new_key_line().unwrap())).await;
    assert_eq!(newcomer.cluster.incompatibility(), None);
    newcomer.cluster.serves(true);
    tokio::time::sleep(Duration::from_secs(60)).await;
    hear(&sealer(&new_key_line().unwrap())).await;
    assert_eq!(newcomer.cluster.incompatibility(), None, "it has served itself");
}

/// The log of this thread, while this test runs.
#[derive(Clone, Default)]
struct ThreadLog(Arc<Mutex<Vec<u8>>>);

impl io::Write for ThreadLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn policies_that_differ_for_a_minute_are_logged() {
    let log = ThreadLog::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone());
    let _until_the_end = tracing::subscriber::set_default(subscriber.finish());
    let said = |text: &str| String::from_utf8_lossy(&log.0.lock().unwrap()).matches(text).count();
    let (differ, agree) = ("a replica obeys another policy", "obey the same policy again");
    let (_net, _broker, [one, other]) = two(&new_key_line().unwrap()).await;
    one.cluster.obeys(Some([1; 8]));
    other.cluster.obeys(Some([2; 8]));
    tokio::time::sleep(Duration::from_secs(55)).await;
    assert_eq!(said(differ), 0, "a new policy reaches one replica after the other");
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(said(differ), 2, "each of them says so");
    assert_eq!(said("ours=\"0101010101010101\" theirs=\"0202020202020202\""), 1);
    other.cluster.obeys(Some([1; 8]));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((said(differ), said(agree)), (2, 2));
}
