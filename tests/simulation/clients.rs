//! Clients: each takes messages from whichever replica it reaches, works on them, and settles them, if need
//! be by another replica. Some lose patience, and some die.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fetch_proxy::{
    lessor::DeliveryGuard,
    pb::{self, fetch_service_server::FetchService, settlement::Action},
    reason::REASON_TRAILER,
};
use testkit::dice::Dice;
use tokio::time::{sleep, timeout};
use tonic::{Request, Status};
use tonic_types::StatusExt as _;

use super::{
    jetstream::DeliveryId,
    replica::Replica,
    watch::{Kind, Told},
    world::World,
};

pub struct Client {
    pub world: Arc<World>,
    pub number: u64,
    pub dice: Dice,
}

struct Work {
    id: DeliveryId,
    token: String,
    lease: Duration,
}

impl Client {
    /// Works until the world says that it is over.
    pub async fn run(mut self) {
        while !self.world.over() {
            let Some(replica) = self.choose() else {
                sleep(Duration::from_millis(200)).await;
                continue;
            };
            let work = self.fetch(&replica).await;
            if work.is_empty() {
                let pause = self.dice.millis(10..300);
                sleep(pause).await;
            }
            for one in work {
                self.work(one, &replica).await;
            }
        }
    }

    /// Any that serves; now and then one that does not know yet that it does not.
    fn choose(&mut self) -> Option<Arc<Replica>> {
        let replicas = self.world.replicas();
        let ready: Vec<_> = replicas
            .into_iter()
            .filter(|one| one.ready.load(Ordering::Relaxed) && !one.gone.load(Ordering::Relaxed))
            .collect();
        (!ready.is_empty()).then(|| ready[self.dice.within(0..ready.len() as u64) as usize].clone())
    }

    async fn fetch(&mut self, replica: &Arc<Replica>) -> Vec<Work> {
        let calm = self.world.calm();
        let name = self.world.name();
        let max_wait = self.dice.within(0..8_000) as i64;
        let lease = self.dice.percent(50).then(|| self.dice.within(500..20_000) as i64);
        let request = pb::FetchRequest {
            stream: name.stream.to_string(),
            consumer: name.consumer.to_string(),
            n: self.dice.within(1..8) as u32,
            max_wait: testkit::millis(max_wait),
            linger: testkit::millis(if self.dice.percent(20) { 100 } else { 0 }),
            lease: lease.and_then(testkit::millis),
            worker: format!("client-{}", self.number),
            ..pb::FetchRequest::default()
        };
        sleep(self.way()).await;
        let (service, machine) = (replica.service.clone(), replica.machine.clone());
        let mut call = tokio::spawn(machine.run(async move {
            let answer = service.fetch(Request::new(request)).await;
            // If the caller has gone, this is never polled again, so the messages are given back.
            if let Some(messages) = answer
                .as_ref()
                .ok()
                .and_then(|answer| answer.extensions().get::<Arc<DeliveryGuard>>())
            {
                messages.deliver();
            }
            answer
        }));
        let patience = if !calm && self.dice.percent(10) {
            self.dice.millis(1..3_000)
        } else {
            Duration::from_millis(max_wait.unsigned_abs() + 15_000)
        };
        let Ok(answer) = timeout(patience, &mut call).await else {
            call.abort();
            self.world.watch().count("Fetch cancelled");
            return Vec::new();
        };
        let lost = !calm && self.dice.percent(2);
        sleep(self.way()).await;
        let answer = match answer {
            Ok(Ok(answer)) if !lost => answer.into_inner(),
            Ok(Err(status)) => {
                self.world.watch().count(format!("Fetch {}", reason(&status)));
                sleep(Duration::from_millis(200)).await;
                return Vec::new();
            }
            Ok(Ok(_)) | Err(_) => {
                self.world.watch().count("Fetch answer lost");
                return Vec::new();
            }
        };
        let now = self.world.net.now();
        if answer.messages.is_empty() {
            self.world.watch().count(format!("Fetch empty: {:?}", answer.empty_reason()));
        }
        let mut work = Vec::new();
        for message in answer.messages {
            let nanos = message.publish_time.map_or(0, |time| time.nanos);
            let id = DeliveryId::of(u64::try_from(nanos).unwrap());
            let lease: Duration = message.lease.and_then(|one| one.try_into().ok()).unwrap();
            // The way has cost a part of the lease.
            self.world.watch().received(id, now, lease.saturating_sub(self.world.longest_way()));
            self.world.note(format_args!(
                "client {} has {id:?} of {} for {lease:?}",
                self.number, message.stream_sequence
            ));
            work.push(Work { id, token: message.token, lease });
        }
        work
    }

    async fn work(&mut self, work: Work, replica: &Arc<Replica>) {
        let calm = self.world.calm();
        if !calm && self.dice.percent(5) {
            // It dies; its lease lives on.
            return self.world.watch().count("client died with a message");
        }
        let longest = u64::try_from(work.lease.as_millis()).unwrap().min(12_000);
        let takes = if calm { 5..20 } else { 0..longest * 13 / 10 + 1 };
        let mut takes = self.dice.millis(takes);
        if !calm && self.dice.percent(20) {
            let first = takes / 2;
            sleep(first).await;
            takes -= first;
            let lease = self.dice.percent(50).then(|| self.dice.within(500..20_000) as i64);
            let action = pb::ExtendAction { lease: lease.and_then(testkit::millis) };
            self.settle(&work, Action::Extend(action), Some(replica)).await;
        }
        sleep(takes).await;
        let action = match self.dice.within(0..100) {
            _ if calm => Action::Ack(pb::AckAction {}),
            0..75 => Action::Ack(pb::AckAction {}),
            75..85 => Action::Nak(pb::NakAction { delay: None }),
            85..92 => {
                let delay = self.dice.within(100..5_000) as i64;
                Action::Nak(pb::NakAction { delay: testkit::millis(delay) })
            }
            _ => Action::Term(pb::TermAction { reason: "no use".to_owned() }),
        };
        let same = self.dice.percent(60).then_some(replica);
        let mut at = same.cloned().or_else(|| self.choose());
        for _ in 0..6 {
            let told = self.settle(&work, action.clone(), at.as_ref()).await;
            match told {
                None => {}
                Some((Told::Applied, _)) => break,
                Some((_, reason)) if FINAL.contains(&&*reason) => break,
                Some(_) => {}
            }
            let pause = self.dice.millis(50..1_200);
            sleep(pause).await;
            at = self.choose();
        }
        let now = self.world.net.now();
        self.world.watch().let_go(work.id, now);
    }

    /// One try; `None`: there was nobody to ask.
    async fn settle(
        &mut self,
        work: &Work,
        action: Action,
        at: Option<&Arc<Replica>>,
    ) -> Option<(Told, String)> {
        let replica = at?;
        let kind = match action {
            Action::Ack(_) => Kind::Ack,
            Action::Nak(_) => Kind::Nak,
            Action::Term(_) => Kind::Term,
            Action::Extend(_) => Kind::Extend,
        };
        self.world.watch().called(work.id, kind);
        sleep(self.way()).await;
        let settlement = pb::Settlement { token: work.token.clone(), action: Some(action) };
        let request =
            pb::SettleRequest { settlements: vec![settlement], ..pb::SettleRequest::default() };
        let (service, machine) = (replica.service.clone(), replica.machine.clone());
        let mut call = tokio::spawn(machine.run(async move {
            // The service has a method of its own by that name.
            let answer = FetchService::settle(&*service, Request::new(request)).await;
            answer.map(tonic::Response::into_inner)
        }));
        let answer = timeout(Duration::from_secs(8), &mut call).await;
        if answer.is_err() {
            call.abort();
        }
        sleep(self.way()).await;
        let lost = !self.world.calm() && self.dice.percent(2);
        let now = self.world.net.now();
        let (told, reason, lease) = match answer {
            Ok(Ok(Ok(mut answer))) if !lost => read(answer.results.pop().unwrap()),
            Ok(Ok(Err(status))) if !lost => (Told::Unknown, reason(&status), None),
            Ok(_) | Err(_) => (Told::Unknown, "no answer".to_owned(), None),
        };
        let mut watch = self.world.watch();
        watch.answered(work.id, kind, told, &reason, now);
        if let Some(lease) = lease {
            watch.extended(work.id, now, lease.saturating_sub(self.world.longest_way()));
        }
        drop(watch);
        self.world.note(format_args!(
            "client {}: {kind:?} {:?} at {}: {reason}",
            self.number, work.id, replica.side
        ));
        Some((told, reason))
    }

    fn way(&mut self) -> Duration {
        self.dice.millis(0..5)
    }
}

/// Nothing more is to be had after these.
const FINAL: [&str; 5] =
    ["OUTCOME_SENT", "LEASE_EXPIRED", "LEASE_SETTLED", "JETSTREAM_DENIED", "TOKEN_INVALID"];

fn read(result: pb::SettleResult) -> (Told, String, Option<Duration>) {
    let Some(error) = result.error else {
        let lease = result.lease.and_then(|lease| lease.try_into().ok());
        let outcome = pb::Outcome::try_from(result.outcome).unwrap();
        // Nothing was sent, perhaps.
        let sent = outcome == pb::Outcome::Sent;
        let told = if sent { Told::Unknown } else { Told::Applied };
        return (told, outcome.as_str_name().to_owned(), lease);
    };
    let unknown = error.reason == "SETTLE_UNCONFIRMED"
        || error.metadata.get("applied").is_some_and(|applied| applied != "no");
    let told = if unknown { Told::Unknown } else { Told::NotApplied };
    (told, error.reason, None)
}

fn reason(status: &Status) -> String {
    let trailer = status.metadata().get(REASON_TRAILER);
    let of_details = || status.get_error_details().error_info().map(|info| info.reason.clone());
    trailer
        .and_then(|reason| reason.to_str().ok())
        .map(str::to_owned)
        .or_else(of_details)
        .unwrap_or_else(|| format!("bare {:?}", status.code()))
}
