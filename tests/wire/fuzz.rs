//! Every field of every request, over the wire, with any value of its type. The answer is OK or a
//! status of our table with its reason, in time, and the service continues.

use fetch_proxy::{
    pb::{self, settlement::Action},
    reason::Reason,
};
use proptest::{collection::vec, option, prelude::*, test_runner::TestRunner};
use prost_types::Duration as PbDuration;
use testkit::{
    BOUND,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, fetch, reason},
};
use tonic::Status;

#[derive(Debug, Clone)]
enum Call {
    Fetch(pb::FetchRequest),
    Ack(pb::AckRequest),
    Nak(pb::NakRequest),
    Term(pb::TermRequest),
    Extend(pb::ExtendRequest),
    Settle(pb::SettleRequest),
    GiveBack(pb::GiveBackRequest),
}

pub(crate) fn duration() -> impl Strategy<Value = Option<PbDuration>> {
    let seconds = prop_oneof![Just(0), 0..3_i64, Just(-1), Just(3600), Just(90_000), any::<i64>()];
    let nanos = prop_oneof![Just(0), 0..1_000_000_000, Just(-1), any::<i32>()];
    option::of((seconds, nanos).prop_map(|(seconds, nanos)| PbDuration { seconds, nanos }))
}

/// Short waits, so that a thousand cases end.
fn wait() -> impl Strategy<Value = Option<PbDuration>> {
    duration().prop_filter("short", |wait| wait.is_some_and(|wait| wait.seconds < 1))
}

pub(crate) fn name(known: &str) -> impl Strategy<Value = String> + use<> {
    prop_oneof![4 => Just(known.to_owned()), 1 => any::<String>(), 1 => "[A-Za-z0-9_-]{1,300}"]
}

pub(crate) fn token(known: &str) -> impl Strategy<Value = String> + use<> {
    let known = known.to_owned();
    let mutated =
        (0..known.len(), any::<char>(), Just(known.clone())).prop_map(|(at, c, token)| {
            token
                .chars()
                .enumerate()
                .map(|(place, old)| if place == at { c } else { old })
                .collect()
        });
    prop_oneof![2 => Just(known), 2 => mutated, 1 => any::<String>(), 1 => "[A-Za-z0-9_-]{0,400}"]
}

pub(crate) fn choice() -> impl Strategy<Value = i32> {
    prop_oneof![0..6_i32, any::<i32>()]
}

/// One of few, so that calls repeat each other.
fn attempt() -> impl Strategy<Value = String> {
    prop_oneof![4 => Just(String::new()), 4 => "[a-c]", 1 => any::<String>(), 1 => ".{0,300}"]
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![any::<String>(), ".{0,3000}"]
}

pub(crate) fn action() -> impl Strategy<Value = Option<Action>> {
    prop_oneof![
        Just(None),
        Just(Some(Action::Ack(pb::AckAction {}))),
        duration().prop_map(|delay| Some(Action::Nak(pb::NakAction { delay }))),
        text().prop_map(|reason| Some(Action::Term(pb::TermAction { reason }))),
        duration().prop_map(|lease| Some(Action::Extend(pb::ExtendAction { lease }))),
    ]
}

fn call(stream: &str, consumer: &str, known: &str) -> impl Strategy<Value = Call> + use<> {
    let settlement = (token(known), action()).prop_map(|(token, action)| pb::Settlement {
        number: 0,
        token,
        action,
    });
    let settlements = vec(settlement, 0..8).boxed();
    // Most Fetch calls have none, or their fields would hide the others.
    let few = prop_oneof![3 => Just(Vec::new()), 1 => settlements.clone()];
    let fetch = (
        (name(stream), name(consumer)),
        any::<u32>(),
        (wait(), duration(), duration()),
        prop_oneof![Just(0), any::<u32>()],
        (choice(), any::<String>()),
        (few, choice()),
        (attempt(), any::<bool>()),
    );
    let fetch = fetch.prop_map(
        |(
            (stream, consumer),
            n,
            (max_wait, linger, lease),
            max_bytes,
            (codec, worker),
            (settlements, confirmation),
            (attempt_id, attempt_again),
        )| {
            // A linger adds to the wait; the fuzz has no time for five seconds each.
            let linger = linger.filter(|linger| linger.seconds != 0 || linger.nanos < 50_000_000);
            let linger = linger.filter(|linger| linger.seconds <= 0);
            Call::Fetch(pb::FetchRequest {
                stream,
                consumer,
                n,
                max_wait,
                linger,
                lease,
                max_bytes,
                codec,
                worker,
                settlements,
                confirmation,
                attempt_id,
                attempt_again,
            })
        },
    );
    let ack = (token(known), choice())
        .prop_map(|(token, confirmation)| Call::Ack(pb::AckRequest { token, confirmation }));
    let nak = (token(known), duration(), choice()).prop_map(|(token, delay, confirmation)| {
        Call::Nak(pb::NakRequest { token, delay, confirmation })
    });
    let term = (token(known), text(), choice()).prop_map(|(token, reason, confirmation)| {
        Call::Term(pb::TermRequest { token, reason, confirmation })
    });
    let extend = (token(known), duration())
        .prop_map(|(token, lease)| Call::Extend(pb::ExtendRequest { token, lease }));
    let settle = (settlements, choice()).prop_map(|(settlements, confirmation)| {
        Call::Settle(pb::SettleRequest { settlements, confirmation })
    });
    let give_back = (name(stream), name(consumer), attempt());
    let give_back = give_back.prop_map(|(stream, consumer, attempt_id)| {
        Call::GiveBack(pb::GiveBackRequest { stream, consumer, attempt_id })
    });
    prop_oneof![4 => fetch, 1 => ack, 1 => nak, 1 => term, 1 => extend, 2 => settle, 1 => give_back]
}

async fn make(client: &mut Client, call: Call) -> Result<(), Status> {
    match call {
        Call::Fetch(request) => {
            let asked = request.settlements.len();
            client.fetch(request).await.map(|answer| {
                let answer = answer.into_inner();
                assert_eq!(answer.results.len(), asked, "one result for each settlement");
                each_has_one_meaning(&answer.results);
            })
        }
        Call::Ack(request) => client.ack(request).await.map(drop),
        Call::Nak(request) => client.nak(request).await.map(drop),
        Call::Term(request) => client.term(request).await.map(drop),
        Call::Extend(request) => client.extend(request).await.map(drop),
        Call::GiveBack(request) => client.give_back(request).await.map(drop),
        Call::Settle(request) => client
            .settle(request)
            .await
            .map(|answer| each_has_one_meaning(&answer.get_ref().results)),
    }
}

/// Whether a status has a reason of the table, with the code of that reason.
pub(crate) fn is_of_the_contract(status: &Status) -> Result<(), TestCaseError> {
    let (code, name) = reason(status);
    let known = Reason::ALL.iter().find(|known| known.name() == name);
    prop_assert_eq!(known.map(|known| known.code() as i32), Some(code as i32), "{:?}", status);
    Ok(())
}

pub(crate) fn each_has_one_meaning(results: &[pb::SettleResult]) {
    for result in results {
        assert_ne!(result.outcome == 0, result.error.is_none(), "exactly one of both");
    }
}

#[test]
fn every_request_has_an_answer_of_the_contract() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (_proxy, mut client, fixture, token) = runtime.block_on(async {
        let fixture = Fixture::new(config()).await;
        fixture.publish_many(50).await;
        let proxy = Proxy::start(NatsServer::shared(), &[]);
        let mut client = proxy.client().await;
        let answer = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
        let token = answer.messages[0].token.clone();
        (proxy, client, fixture, token)
    });
    let mut runner = TestRunner::new(ProptestConfig::with_cases(600));
    let calls = call(&fixture.stream, &fixture.consumer, &token);
    runner
        .run(&calls, |call| {
            let mut client = client.clone();
            let made = async { tokio::time::timeout(BOUND, make(&mut client, call)).await };
            let answer = runtime.block_on(made).map_err(|_| TestCaseError::fail("it hangs"))?;
            answer.map_or_else(|status| is_of_the_contract(&status), Ok)
        })
        .unwrap();
    let last = runtime.block_on(client.fetch(fetch(&fixture, 1, 0)));
    assert!(last.is_ok(), "{last:?}");
}
