//! The books of the leases: each lease that began has ended, or is held. What the metrics count is what the
//! broker and the callers have seen.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use fetch_proxy::{
    broker::{AckKind, Confirmation},
    clock,
    lease::LeaseId,
    lessor::{Action, FetchParams, Lessor, SettleItem},
    metrics::{FamilyId, Format, LeaseEnd, Metrics},
};
use testkit::{
    dice::Dice,
    fake_broker::{FakeBroker, Fault, info, limits},
    scrape::Scrape,
};

use super::faults::{ask, one, settle};

const ACK_WAIT: Duration = Duration::from_secs(10);

fn scrape(lessor: &Lessor<FakeBroker>) -> Scrape {
    Scrape::read(&lessor.metrics().page(Format::Text, clock::now()))
}

/// The sum of a family over all consumers, and over the labels that are not given.
fn sum(lessor: &Lessor<FakeBroker>, family: &str, labels: &[&str]) -> u64 {
    scrape(lessor).sum(&format!("fetchproxy_{family}"), labels) as u64
}

fn start() -> (FakeBroker, Lessor<FakeBroker>) {
    let broker = FakeBroker::new(info(ACK_WAIT));
    (broker.clone(), Lessor::start(broker, limits()))
}

/// Plays at random, and looks at the books after each step.
async fn play(seed: u64) -> [u64; 4] {
    let (broker, lessor) = start();
    let mut dice = Dice::new(seed, 0);
    let mut held: Vec<LeaseId> = Vec::new();
    for _ in 0..120 {
        match dice.within(0..10) {
            0..=2 => broker.publish("x"),
            3 | 4 => {
                let fetch = lessor.fetch(ask(&broker, Duration::from_millis(200)));
                if let Ok(Ok(fetched)) = tokio::time::timeout(Duration::from_secs(1), fetch).await
                    && dice.percent(80)
                {
                    held.extend(fetched.messages().iter().map(|leased| leased.id));
                    fetched.delivered();
                }
            }
            5 => broker.script([[Fault::Lost, Fault::AnswerLost][dice.within(0..2) as usize]]),
            6 => {
                let time = dice.millis(0..6_000);
                tokio::time::sleep(time).await;
            }
            _ if held.is_empty() => {}
            _ => {
                let count = dice.within(1..held.len() as u64 + 1) as usize;
                let action = |dice: &mut Dice| match dice.within(0..4) {
                    0 => Action::Ack,
                    1 => Action::Nak(Duration::ZERO),
                    2 => Action::Term("no".to_owned()),
                    _ => Action::Extend(Some(Duration::from_secs(20))),
                };
                let items = held.iter().take(count);
                let items: Vec<_> = items
                    .map(|lease| SettleItem { lease: *lease, action: action(&mut dice), by: None })
                    .collect();
                let until = clock::now() + Duration::from_secs(5);
                lessor.settle(items, Confirmation::Confirmed, until).await;
                if dice.percent(50) {
                    held.drain(..count);
                }
            }
        }
        let books = scrape(&lessor).books().unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        assert_eq!(books.held as usize, lessor.held(), "seed {seed}");
    }
    lessor.close().await;
    let ended = |how| sum(&lessor, "leases_ended_total", &[&format!("how=\"{how}\"")]);
    ["ack", "nak", "lapsed", "lost"].map(ended)
}

#[tokio::test(start_paused = true)]
async fn each_lease_that_began_has_ended_or_is_held() {
    let mut seen = [0; 4];
    for seed in 0..15 {
        for (seen, more) in seen.iter_mut().zip(play(seed).await) {
            *seen += more;
        }
    }
    assert!(seen.iter().all(|count| *count > 5), "too little happens: {seen:?}");
}

#[tokio::test(start_paused = true)]
async fn end_of_a_lease_is_counted_by_its_way() {
    let (broker, lessor) = start();
    let ended = |how: &str| sum(&lessor, "leases_ended_total", &[&format!("how=\"{how}\"")]);
    for (action, how) in [
        (Action::Ack, "ack"),
        (Action::Nak(Duration::from_secs(3600)), "nak"),
        (Action::Term(String::new()), "term"),
    ] {
        let lease = one(&broker, &lessor).await;
        assert_eq!(ended(how), 0);
        settle(&lessor, lease, action).await.unwrap();
        assert_eq!(ended(how), 1, "{how}");
        let kind = format!("kind=\"{how}\"");
        assert_eq!(sum(&lessor, "settlements_total", &[&kind, "outcome=\"confirmed\""]), 1);
    }
    for kind in ["ack", "nak", "term"] {
        let observed = format!("fetchproxy_settle_seconds_count{{kind=\"{kind}\"}}");
        assert_eq!(scrape(&lessor).value(&observed), 1.0);
    }
    assert_eq!(scrape(&lessor).value("fetchproxy_settle_batch_messages_sum"), 3.0);
    // The holder never settles this one. It lasts for as long as JetStream waits, so no Nak is sent.
    one(&broker, &lessor).await;
    assert_eq!(sum(&lessor, "leases", &[]), 1);
    assert_eq!(scrape(&lessor).value("fetchproxy_oldest_lease_seconds"), 0.0);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let age = scrape(&lessor).value("fetchproxy_oldest_lease_seconds");
    assert!((2.9..3.5).contains(&age), "{age}");
    tokio::time::sleep(ACK_WAIT - Duration::from_secs(2)).await;
    assert_eq!((ended("lapsed"), ended("lost")), (1, 0));
    assert_eq!(sum(&lessor, "releases_total", &[]), 0);
}

#[tokio::test(start_paused = true)]
async fn naks_of_the_proxy_are_its_releases() {
    let (broker, lessor) = start();
    broker.publish("x");
    let short = ask(&broker, Duration::from_secs(10));
    let fetched = lessor.fetch(FetchParams { lease: Some(Duration::from_secs(2)), ..short });
    fetched.await.unwrap().delivered();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let naks = || broker.published().iter().filter(|ack| matches!(ack, AckKind::Nak(_))).count();
    assert_eq!(naks(), 1);
    assert_eq!(sum(&lessor, "releases_total", &["why=\"lapsed\""]), 1);
    // Nobody takes this answer, and nobody else comes.
    let before = sum(&lessor, "messages_unwritten_total", &[]);
    broker.publish("y");
    drop(lessor.fetch(ask(&broker, Duration::from_secs(10))).await.unwrap());
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(sum(&lessor, "parked_messages", &[]) > 0, "it waits for the next caller");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(sum(&lessor, "messages_unwritten_total", &[]) > before);
    assert_eq!(sum(&lessor, "releases_total", &[]) as usize, naks());
    assert!(sum(&lessor, "releases_total", &["why=\"surplus\""]) > 0);
}

#[tokio::test(start_paused = true)]
async fn each_fetch_has_one_end() {
    let (broker, lessor) = start();
    let ends = |result: &str| sum(&lessor, "fetches_total", &[&format!("result=\"{result}\"")]);
    one(&broker, &lessor).await;
    assert_eq!(ends("messages"), 1);
    assert_eq!(scrape(&lessor).value("fetchproxy_arrival_to_answer_seconds_count"), 1.0);
    assert_eq!(scrape(&lessor).value("fetchproxy_fetch_batch_messages_sum"), 1.0);
    assert_eq!(sum(&lessor, "messages_fetched_total", &[]), 1);
    assert_eq!(sum(&lessor, "message_bytes_fetched_total", &[]), 1);
    lessor.fetch(ask(&broker, Duration::from_millis(300))).await.unwrap();
    assert_eq!(ends("no_messages"), 1);
    let waiting = lessor.fetch(ask(&broker, Duration::from_secs(60)));
    tokio::time::timeout(Duration::from_secs(1), waiting).await.unwrap_err();
    assert_eq!(ends("left"), 1);
    let waiting = lessor.fetch(ask(&broker, Duration::from_secs(2)));
    let (answer, ()) = tokio::join!(waiting, async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(sum(&lessor, "waiters", &[]), 1);
        assert_eq!(sum(&lessor, "pump_wanted_messages", &[]), 10);
        assert!(sum(&lessor, "pump_pulled_messages", &[]) > 0);
    });
    assert!(answer.unwrap().messages().is_empty());
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(sum(&lessor, "waiters", &[]), 0);
    lessor.drain();
    lessor.fetch(ask(&broker, Duration::from_millis(300))).await.unwrap_err();
    assert_eq!(ends("refused"), 1);
    assert_eq!(sum(&lessor, "fetches_total", &[]), 5);
    assert!(sum(&lessor, "pulls_total", &[]) > 0);
}

#[tokio::test(start_paused = true)]
async fn progress_of_a_long_lease_is_counted() {
    let (broker, lessor) = start();
    broker.publish("x");
    let long = FetchParams { lease: Some(5 * ACK_WAIT), ..ask(&broker, Duration::from_secs(10)) };
    let fetched = lessor.fetch(long).await.unwrap();
    let lease = fetched.messages()[0].id;
    fetched.delivered();
    let progress = |result: &str| {
        scrape(&lessor).value(&format!("fetchproxy_progress_total{{result=\"{result}\"}}"))
    };
    assert_eq!(progress("confirmed"), 0.0);
    tokio::time::sleep(3 * ACK_WAIT).await;
    let sent = || broker.published().iter().filter(|ack| **ack == AckKind::Progress).count();
    assert!(sent() > 1);
    assert_eq!(progress("confirmed"), sent() as f64);
    settle(&lessor, lease, Action::Ack).await.unwrap();
}

/// A scraper that reads while leases begin and end sees some of them late, and never the end of a lease before its
/// beginning.
#[test]
fn page_in_the_middle_of_changes_has_no_lease_that_ended_before_it_began() {
    let metrics = Metrics::default();
    let meter = metrics.consumer("S", "c", clock::now());
    let held = Arc::new(AtomicU64::new(0));
    let seen = held.clone();
    metrics.ask(move |sheet| {
        let now = seen.load(Ordering::SeqCst);
        sheet.set_of(FamilyId::Leases, ["S", "c"], now as f64);
    });
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                // As the lessor does: a lease is counted as it enters the table, and after it has left.
                meter.granted();
                held.fetch_add(1, Ordering::SeqCst);
                held.fetch_sub(1, Ordering::SeqCst);
                metrics.leases().ended(&meter, LeaseEnd::Ack, clock::now(), clock::now());
            }
        });
        for _ in 0..300 {
            let scrape = Scrape::read(&metrics.page(Format::Text, clock::now()));
            let sum = |family: &str| scrape.sum(&format!("fetchproxy_{family}"), &[]);
            let began = sum("leases_granted_total") + sum("leases_adopted_total");
            let (ended, held) = (sum("leases_ended_total"), sum("leases"));
            assert!(began >= ended + held, "{began} began, {ended} ended, {held} are held");
        }
        done.store(true, Ordering::SeqCst);
    });
}
