//! Workers: take messages by Fetch or by Consume, then do what workers do with them, well and badly. All
//! answers are logged. `settling` decides what a worker does with a message.

use std::{pin::pin, sync::Arc, time::Duration};

use fetch_proxy::pb::{self, Codec, consume_start::Holding};
use testkit::{
    delivery_log::{DeliveryLog, HoldingId, Terms},
    dice::Dice,
    proxy::Client,
};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint},
};

use crate::{
    publishers::{ID, STREAM, payload},
    settling::{Job, settle},
    streams::{StreamDesk, WorkerStream, credit},
};

/// Messages in the hands of one worker.
const HANDS: usize = 300;
/// An answer that comes later than this after it should have is one that never came.
const LATEST: Duration = Duration::from_secs(15);
/// Longer than any phase.
const FOREVER: Duration = Duration::from_secs(1 << 30);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub enum Phase {
    /// Nobody goes away yet, so that the proxy can be weighed with one connection for each.
    WarmingUp,
    /// All kinds of behaviour.
    Working,
    /// Fetch and ack what is left.
    Draining,
    /// Keep the connection, and ask for nothing.
    Idle,
    Over,
}

pub struct Worker {
    pub number: usize,
    pub consumer: usize,
    pub terms: Terms,
    /// The address of the proxy.
    pub address: String,
    /// Not by a wire that is meddled with.
    pub direct: bool,
    /// Takes messages by Consume, not by Fetch.
    pub consumes: bool,
    pub log: Arc<DeliveryLog>,
    pub dice: Dice,
    pub phase: watch::Receiver<Phase>,
}

/// The request of one Fetch.
struct FetchPlan {
    request: pb::FetchRequest,
    lease: Option<Duration>,
    /// The longest that a well-behaved proxy takes.
    patience: Duration,
}

/// The road of messages to a worker, and of settlements back.
struct Way<'w> {
    client: &'w Client,
    hands: &'w Arc<Semaphore>,
    /// The stream that the messages came by.
    desk: Option<&'w StreamDesk>,
}

impl Way<'_> {
    fn job(&self, id: HoldingId, token: String, number: u64) -> Job {
        Job { id, token, number, desk: self.desk.cloned() }
    }
}

fn codec(dice: &mut Dice) -> Codec {
    match dice.within(0..10) {
        0..5 => Codec::Raw,
        5 | 6 => Codec::Auto,
        7 => Codec::Text,
        _ => Codec::Json,
    }
}

impl Worker {
    pub async fn run(mut self) {
        let hands = Arc::new(Semaphore::new(HANDS));
        let (mut client, mut jobs) = (self.connect(), JoinSet::new());
        loop {
            let phase = *self.phase.borrow();
            if phase == Phase::Idle {
                jobs.join_all().await;
                let _ = self.phase.wait_for(|phase| *phase == Phase::Over).await;
                return;
            }
            let hangs_up = if self.consumes {
                self.consume(phase, &client, &hands, &mut jobs).await
            } else {
                self.fetch_once(phase, &client, &hands, &mut jobs).await
            };
            if hangs_up {
                client = self.connect();
            }
            while jobs.try_join_next().is_some() {}
        }
    }

    /// One Fetch. Returns whether the worker hangs up.
    async fn fetch_once(
        &mut self,
        phase: Phase,
        client: &Client,
        hands: &Arc<Semaphore>,
        jobs: &mut JoinSet<()>,
    ) -> bool {
        // Waits until there is a hand free; each message takes its own below.
        drop(hands.acquire().await);
        let plan = self.plan(phase, u32::try_from(hands.available_permits()).unwrap());
        let (cancels, hangs_up) = (self.dice.percent(5), self.dice.percent(1));
        let calling = self.fetch(client.clone(), &plan);
        let answer = if (cancels || hangs_up) && phase == Phase::Working {
            timeout(self.dice.clone().millis(0..200), calling).await.ok()
        } else {
            Some(calling.await)
        };
        match answer {
            Some(Ok(answer)) => {
                let way = Way { client, hands, desk: None };
                self.take(answer.messages, answer.rejected, plan.lease, &way, jobs);
            }
            Some(Err(refused)) => self.pause(&refused).await,
            None => self.log.walked_away(self.consumer),
        }
        hangs_up
    }

    /// One stream, until the phase is over; for some seconds in the phase of all behaviours. Returns whether the
    /// worker hangs up.
    async fn consume(
        &mut self,
        phase: Phase,
        client: &Client,
        hands: &Arc<Semaphore>,
        jobs: &mut JoinSet<()>,
    ) -> bool {
        let start = self.start(phase);
        let lease = start.holding.as_ref().map(|holding| match holding {
            Holding::Lease(lease) => Duration::try_from(*lease).unwrap(),
            Holding::Keep(_) => unreachable!("no stream of the soak asks for it"),
        });
        let (leaves, hangs_up) = (self.dice.percent(20), self.dice.percent(5));
        let life = if phase == Phase::Working { self.dice.millis(50..8000) } else { FOREVER };
        let (mut stream, send) = match WorkerStream::open(client.clone(), start).await {
            Ok(opened) => opened,
            Err(refused) => {
                self.pause(&refused).await;
                return false;
            }
        };
        let (mut send, desk) = (Some(send), stream.desk.clone());
        let way = Way { client, hands, desk: Some(&desk) };
        let mut over = self.phase.clone();
        let phase_over = async { drop(over.wait_for(|now| *now != phase).await) };
        let mut ends = pin!(timeout(life, phase_over));
        loop {
            while jobs.try_join_next().is_some() {}
            tokio::select! {
                _ = &mut ends, if send.is_some() => {
                    if leaves || hangs_up {
                        self.log.walked_away(self.consumer);
                        return hangs_up;
                    }
                    // A half-close: what has begun still gets its results.
                    send = None;
                }
                frame = timeout(LATEST, stream.next()) => match frame {
                    Ok(Ok(Some(frame))) => {
                        self.take(frame.messages, frame.rejected, lease, &way, jobs);
                        if let Some(send) = send.as_ref().filter(|_| self.dice.percent(2)) {
                            let credit = Some(credit(u32::try_from(self.dice.within(0..51)).unwrap()));
                            let _ = send.send(pb::ConsumeRequest { credit, ..Default::default() });
                        }
                    }
                    Ok(Ok(None)) => return false,
                    Ok(Err(failed)) => {
                        self.pause(&failed).await;
                        return false;
                    }
                    Err(_) => {
                        if self.direct {
                            let w = self.number;
                            self.log.wrong(format!("a stream of w{w} was silent for {LATEST:?}"));
                        }
                        self.log.walked_away(self.consumer);
                        return true;
                    }
                },
            }
        }
    }

    fn start(&mut self, phase: Phase) -> pb::ConsumeStart {
        let dice = &mut self.dice;
        let mut start = pb::ConsumeStart {
            stream: STREAM.into(),
            consumer: self.terms.name.into(),
            worker: format!("w{}", self.number),
            credit: Some(credit(50)),
            heartbeat: Some(Duration::from_secs(1).try_into().unwrap()),
            ..Default::default()
        };
        if phase != Phase::Draining {
            start.credit = Some(credit(u32::try_from(dice.within(1..51)).unwrap()));
            let lease = dice.percent(50).then(|| dice.millis(1000..12_000));
            start.holding = lease.map(|lease| Holding::Lease(lease.try_into().unwrap()));
            start.max_frame_bytes = if dice.percent(5) { 64 * 1024 } else { 0 };
            start.set_codec(codec(dice));
        }
        start
    }

    fn connect(&self) -> Client {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        let endpoint = endpoint
            .connect_timeout(Duration::from_secs(2))
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(3))
            .keep_alive_while_idle(true);
        let channel: Channel = endpoint.connect_lazy();
        Client::new(channel).max_decoding_message_size(8 << 20)
    }

    fn plan(&mut self, phase: Phase, most: u32) -> FetchPlan {
        let dice = &mut self.dice;
        let mut request = pb::FetchRequest {
            stream: STREAM.into(),
            consumer: self.terms.name.into(),
            worker: format!("w{}", self.number),
            n: most.clamp(1, 50),
            ..pb::FetchRequest::default()
        };
        let (mut wait, mut linger, mut lease) = (Duration::from_secs(1), Duration::ZERO, None);
        if phase != Phase::Draining {
            request.n = u32::try_from(dice.within(1..51)).unwrap().min(most.max(1));
            wait = if dice.percent(10) { Duration::ZERO } else { dice.millis(50..5000) };
            linger = if dice.percent(30) { dice.millis(5..300) } else { Duration::ZERO };
            lease = dice.percent(50).then(|| dice.millis(1000..12_000));
            request.max_bytes = if dice.percent(5) { 64 * 1024 } else { 0 };
            request.set_codec(codec(dice));
        }
        request.max_wait = Some(wait.try_into().unwrap());
        request.linger = Some(linger.try_into().unwrap());
        request.lease = lease.map(|lease| lease.try_into().unwrap());
        FetchPlan { request, lease, patience: wait + linger + LATEST }
    }

    async fn fetch(
        &self,
        mut client: Client,
        plan: &FetchPlan,
    ) -> Result<pb::FetchResponse, Status> {
        let mut request = Request::new(plan.request.clone());
        // A deadline now and then; the proxy has to answer before it.
        if plan.request.n.is_multiple_of(5) {
            request.set_timeout(plan.patience / 2);
        }
        let answer = timeout(plan.patience, client.fetch(request)).await;
        let late = || {
            if self.direct {
                let w = self.number;
                self.log.wrong(format!("a Fetch of w{w} took over {:?}", plan.patience));
            }
            Err(Status::unknown("never answered"))
        };
        answer.unwrap_or_else(|_| late()).map(tonic::Response::into_inner)
    }

    fn take(
        &mut self,
        messages: Vec<pb::Delivery>,
        rejected: Vec<pb::Rejected>,
        lease: Option<Duration>,
        way: &Way<'_>,
        jobs: &mut JoinSet<()>,
    ) {
        let draining = *self.phase.borrow() >= Phase::Draining;
        let mut held = Vec::new();
        for delivery in messages {
            let id = self.log.handed(self.consumer, self.number, lease, &delivery);
            self.look_at(&delivery);
            held.push(way.job(id, delivery.token, delivery.number));
        }
        for rejected in rejected {
            let id = self.log.rejected(self.consumer, self.number, &rejected);
            if !rejected.token.is_empty() {
                held.push(way.job(id, rejected.token, rejected.number));
            }
        }
        let together = self.dice.percent(20);
        let mut piles: Vec<Vec<Job>> = if together || held.is_empty() {
            vec![held]
        } else {
            held.into_iter().map(|job| vec![job]).collect()
        };
        piles.retain(|pile| !pile.is_empty());
        for pile in piles {
            let (client, log) = (way.client.clone(), self.log.clone());
            let dice = Dice::new(self.dice.within(0..u64::MAX), 1);
            let hands = way.hands.clone();
            jobs.spawn(async move {
                let count = u32::try_from(pile.len()).unwrap();
                // More were asked for than there are hands: they are taken as hands come free.
                let hand = hands.try_acquire_many(count.min(HANDS as u32));
                settle(client, &log, pile, dice, draining).await;
                drop(hand);
            });
        }
    }

    /// Is it what was published?
    fn look_at(&self, delivery: &pb::Delivery) {
        let id = delivery.headers.get(ID).and_then(|values| values.values.first());
        let id = id.and_then(|id| id.parse().ok()).unwrap_or(0);
        let same = match &delivery.payload {
            Some(pb::delivery::Payload::Data(data)) => *data == payload(id),
            Some(pb::delivery::Payload::Text(text)) => text.as_bytes() == payload(id),
            None => false,
        };
        if !same || delivery.subject != format!("soak.{}", id % 7) {
            let (sequence, name) = (delivery.stream_sequence, self.terms.name);
            self.log.wrong(format!("{name}: message {sequence} is not what was published"));
        }
    }

    async fn pause(&self, refused: &Status) {
        let reason = refused.metadata().get("fetchproxy-reason");
        match reason.and_then(|reason| reason.to_str().ok()) {
            Some("NATS_UNAVAILABLE" | "CONSUMER_BUSY") => {}
            Some(other) => {
                self.log.wrong(format!("a Fetch of w{} was refused: {other}", self.number));
            }
            None => self.log.walked_away(self.consumer),
        }
        sleep(Duration::from_millis(300)).await;
    }
}
