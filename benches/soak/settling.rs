//! The behaviour of a worker with its messages: mostly Ack, sometimes Nak, Term or Extend, too
//! late, twice, or nothing. An uncertain settlement is repeated with the same token, as the errors
//! permit.

use std::time::Duration;

use fetch_proxy::pb::{self, Confirmation, settlement::Action};
use prost_types::Timestamp;
use testkit::{
    delivery_log::{DeliveryLog, HoldingId, Kind, Outcome, now},
    dice::Dice,
    proxy::{Client, timed},
};
use tokio::time::sleep;
use tonic::Status;

use crate::streams::StreamDesk;

/// A message in a worker's hands.
#[derive(Debug, Clone)]
pub struct Job {
    pub id: HoldingId,
    pub token: String,
    /// Its number in the stream of `desk`.
    pub number: u64,
    /// The stream that it came by, if there is one.
    pub desk: Option<StreamDesk>,
}

/// One thing to do with one message; `length` is a Nak's delay or an Extend's lease.
#[derive(Debug, Clone)]
struct Part {
    job: Job,
    kind: Kind,
    length: Duration,
}

/// Longer than this nobody works on a message, so that there are always hands free.
const LONGEST: Duration = Duration::from_secs(12);

type Answer = (Outcome, Option<Timestamp>);

/// Deals with a pile of messages, of which more than one go into one Settle.
pub async fn settle(
    client: Client,
    log: &DeliveryLog,
    pile: Vec<Job>,
    mut dice: Dice,
    draining: bool,
) {
    let fast = !draining && dice.percent(40);
    if draining {
        return insist(&client, log, parts(pile, Kind::Ack), fast, dice).await;
    }
    let left = Duration::from_micros(u64::try_from(log.least(pile[0].id) - now()).unwrap_or(0));
    match dice.within(0..100) {
        // It never comes back to these.
        0..3 => return,
        // Too late: the lease is over.
        3..6 if left > LONGEST => return,
        3..6 => sleep(left + dice.millis(20..1500)).await,
        6..12 => sleep(left.min(LONGEST).mul_f64(dice.within(1..95) as f64 / 100.0)).await,
        12..20 => {
            let mut longer = parts(pile.clone(), Kind::Extend);
            longer.iter_mut().for_each(|part| part.length = dice.millis(1000..10_000));
            insist(&client, log, longer, false, dice.clone()).await;
            sleep(dice.millis(0..4000)).await;
        }
        _ => sleep(dice.millis(0..40)).await,
    }
    let plan: Vec<Part> = pile.into_iter().map(|job| choose(job, &mut dice)).collect();
    insist(&client, log, plan.clone(), fast, dice.clone()).await;
    if dice.percent(5) {
        // Once more with the same tokens: in the same way, or in another.
        sleep(dice.millis(0..3000)).await;
        let again = if dice.percent(50) {
            plan
        } else {
            parts(plan.into_iter().map(|part| part.job).collect(), Kind::Nak)
        };
        insist(&client, log, again, false, dice).await;
    }
}

fn parts(jobs: Vec<Job>, kind: Kind) -> Vec<Part> {
    jobs.into_iter().map(|job| Part { job, kind, length: Duration::ZERO }).collect()
}

fn choose(job: Job, dice: &mut Dice) -> Part {
    let (kind, length) = match dice.within(0..100) {
        0..6 => (Kind::Nak, Duration::ZERO),
        6..10 => (Kind::Nak, dice.millis(100..3000)),
        10..14 => (Kind::Term, Duration::ZERO),
        _ => (Kind::Ack, Duration::ZERO),
    };
    Part { job, kind, length }
}

/// Tries until each has an answer that is one, and gives up some time after the lease.
async fn insist(
    client: &Client,
    log: &DeliveryLog,
    mut open: Vec<Part>,
    fast: bool,
    mut dice: Dice,
) {
    let give_up = log.least(open[0].job.id) + 3_000_000;
    loop {
        let answers = attempt(client, log, &open, fast, &mut dice).await;
        let mut again = Vec::new();
        for (part, (outcome, _)) in open.into_iter().zip(answers) {
            if repeatable(&outcome) {
                again.push(part);
            }
        }
        if again.is_empty() || now() > give_up {
            return;
        }
        open = again;
        sleep(dice.millis(50..800)).await;
    }
}

fn repeatable(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Unknown => true,
        Outcome::Refused(reason) => {
            matches!(reason.as_str(), "NATS_UNAVAILABLE" | "SETTLE_UNCONFIRMED" | "LEASE_BUSY")
        }
        _ => false,
    }
}

/// Makes one call, and logs it before and after.
async fn attempt(
    client: &Client,
    log: &DeliveryLog,
    parts: &[Part],
    fast: bool,
    dice: &mut Dice,
) -> Vec<Answer> {
    let within = if dice.percent(8) { dice.millis(30..400) } else { Duration::from_secs(8) };
    let begin = |part: &Part| log.tries(part.job.id, part.kind, fast, part.length);
    let tries: Vec<usize> = parts.iter().map(begin).collect();
    let by_stream = match &parts[0].job.desk {
        Some(desk) if dice.percent(80) => by_stream(desk, parts, fast, within, dice).await,
        _ => None,
    };
    let answers = match parts {
        _ if by_stream.is_some() => by_stream.unwrap_or_default(),
        [part] if dice.percent(80) => {
            let answer = alone(client.clone(), part, fast, within).await;
            vec![answer.unwrap_or_else(|status| (Outcome::of(Err(&status)), None))]
        }
        _ => together(client.clone(), parts, fast, within)
            .await
            .unwrap_or_else(|status| vec![(Outcome::of(Err(&status)), None); parts.len()]),
    };
    for ((part, which), (outcome, time)) in parts.iter().zip(tries).zip(&answers) {
        if let Some(wrong) = unexpected(outcome) {
            let id = part.job.id;
            log.wrong(format!("{:?} of message {} got {wrong}", part.kind, id.sequence));
        }
        log.answered(part.job.id, which, outcome.clone(), *time);
    }
    answers
}

fn unexpected(outcome: &Outcome) -> Option<&str> {
    let Outcome::Refused(reason) = outcome else { return None };
    let expected = matches!(
        reason.as_str(),
        "LEASE_EXPIRED"
            | "LEASE_SETTLED"
            | "LEASE_BUSY"
            | "NATS_UNAVAILABLE"
            | "SETTLE_UNCONFIRMED"
    );
    (!expected).then_some(reason)
}

async fn alone(
    mut client: Client,
    part: &Part,
    fast: bool,
    within: Duration,
) -> Result<Answer, Status> {
    let (token, confirmation) = (part.job.token.clone(), confirmation(fast));
    let length = Some(part.length.try_into().unwrap());
    Ok(match part.kind {
        Kind::Ack => {
            let request = timed(pb::AckRequest { token, confirmation }, within);
            (Outcome::of(Ok(client.ack(request).await?.into_inner().outcome())), None)
        }
        Kind::Nak => {
            let request = timed(pb::NakRequest { token, delay: length, confirmation }, within);
            let answer = client.nak(request).await?.into_inner();
            (Outcome::of(Ok(answer.outcome())), answer.redeliver_time)
        }
        Kind::Term => {
            let request = pb::TermRequest { token, reason: "soaked".into(), confirmation };
            (
                Outcome::of(Ok(client.term(timed(request, within)).await?.into_inner().outcome())),
                None,
            )
        }
        Kind::Extend => {
            let request = timed(pb::ExtendRequest { token, lease: length }, within);
            (Outcome::Extended, client.extend(request).await?.into_inner().lease_expire_time)
        }
    })
}

async fn together(
    mut client: Client,
    parts: &[Part],
    fast: bool,
    within: Duration,
) -> Result<Vec<Answer>, Status> {
    let settlements = parts.iter().map(|part| part.settlement(false));
    let request =
        pb::SettleRequest { settlements: settlements.collect(), confirmation: confirmation(fast) };
    let results = client.settle(timed(request, within)).await?.into_inner().results;
    assert_eq!(results.len(), parts.len(), "one result for each settlement");
    Ok(results.into_iter().map(answer).collect())
}

/// By the stream that brought the messages, each by its number or its token. `None`: the stream is over.
async fn by_stream(
    desk: &StreamDesk,
    parts: &[Part],
    fast: bool,
    within: Duration,
    dice: &mut Dice,
) -> Option<Vec<Answer>> {
    let settlements = parts.iter().map(|part| part.settlement(dice.percent(70))).collect();
    let results = desk.settle(settlements, confirmation(fast), within).await?;
    Some(match results {
        Ok(results) => {
            assert_eq!(results.len(), parts.len(), "one result for each settlement");
            results.into_iter().map(answer).collect()
        }
        Err(status) => vec![(Outcome::of(Err(&status)), None); parts.len()],
    })
}

fn answer(result: pb::SettleResult) -> Answer {
    (Outcome::of_result(&result), result.redeliver_time.or(result.lease_expire_time))
}

impl Part {
    fn settlement(&self, by_number: bool) -> pb::Settlement {
        let length = Some(self.length.try_into().unwrap());
        let action = match self.kind {
            Kind::Ack => Action::Ack(pb::AckAction {}),
            Kind::Nak => Action::Nak(pb::NakAction { delay: length }),
            Kind::Term => Action::Term(pb::TermAction { reason: "soaked".into() }),
            Kind::Extend => Action::Extend(pb::ExtendAction { lease: length }),
        };
        let (token, number) =
            if by_number { (String::new(), self.job.number) } else { (self.job.token.clone(), 0) };
        pb::Settlement { number, token, action: Some(action) }
    }
}

fn confirmation(fast: bool) -> i32 {
    if fast { Confirmation::Sent.into() } else { Confirmation::Confirmed.into() }
}
