//! The client of one Consume, for tests: it reads frames when it is asked to, and remembers what they had.

use std::time::Duration;

use fetch_proxy::pb::{
    self, ConsumeCredit, ConsumeRequest, ConsumeResponse, ConsumeSettle, ConsumeStart, Outcome,
    Settlement, consume_start::Holding, settlement::Action,
};
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tonic::{Status, Streaming};

use crate::{BOUND, jetstream::Fixture, proxy::Client};

/// The client of one stream. With `keep`, a task sends its signs of life.
pub struct ConsumeClient {
    send: Option<mpsc::UnboundedSender<ConsumeRequest>>,
    frames: Streaming<ConsumeResponse>,
    beats: Option<JoinHandle<()>>,
    /// What has come, and was not taken.
    pub messages: Vec<pb::Delivery>,
    pub rejected: Vec<pb::Rejected>,
    pub results: Vec<pb::ConsumeResult>,
    pub ended: Vec<pb::ConsumeEnded>,
    /// The reasons why nothing came.
    pub idle: Vec<pb::ConsumeIdle>,
    pub credit_id: u64,
    pub opened: Option<pb::ConsumeOpened>,
    pub draining: Option<pb::ConsumeDraining>,
}

impl ConsumeClient {
    pub async fn open(client: &Client, start: ConsumeStart) -> Self {
        let (send, mut receive) = mpsc::unbounded_channel();
        let requests = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
        let mut client = client.clone();
        // The headers come before anything is written.
        let frames = timeout(BOUND, client.consume(requests)).await.expect("no headers").unwrap();
        let heartbeat = start.heartbeat.map_or(10_000, |beat| beat.seconds.unsigned_abs() * 1000);
        let keeps = matches!(start.holding, Some(Holding::Keep(_)));
        send.send(ConsumeRequest { start: Some(start), ..Default::default() }).unwrap();
        let weak = send.downgrade();
        let beats = keeps.then(|| {
            tokio::spawn(async move {
                while let Some(send) = weak.upgrade() {
                    let _ = send.send(ConsumeRequest::default());
                    drop(send);
                    tokio::time::sleep(Duration::from_millis(heartbeat / 3)).await;
                }
            })
        });
        Self {
            send: Some(send),
            frames: frames.into_inner(),
            beats,
            messages: Vec::new(),
            rejected: Vec::new(),
            results: Vec::new(),
            ended: Vec::new(),
            idle: Vec::new(),
            credit_id: 0,
            opened: None,
            draining: None,
        }
    }

    /// It sends no signs of life any more.
    pub fn fall_silent(&mut self) {
        self.beats.take().into_iter().for_each(|beats| beats.abort());
    }

    pub fn send(&self, frame: ConsumeRequest) {
        self.send.as_ref().unwrap().send(frame).unwrap();
    }

    pub fn credit(&self, credit: ConsumeCredit) {
        self.send(ConsumeRequest { credit: Some(credit), ..Default::default() });
    }

    pub fn settle(&self, id: u64, settlements: Vec<Settlement>) {
        let settle = Some(ConsumeSettle { id, settlements, confirmation: 0 });
        self.send(ConsumeRequest { settle, ..Default::default() });
    }

    /// The next frame is taken in. `None`: the stream has ended with OK.
    pub async fn next(&mut self) -> Result<Option<()>, Status> {
        let next = timeout(BOUND, self.frames.message()).await.expect("no frame, and no end");
        let Some(frame) = next? else { return Ok(None) };
        self.messages.extend(frame.messages);
        self.rejected.extend(frame.rejected);
        self.results.extend(frame.results);
        self.ended.extend(frame.ended);
        self.idle.extend(frame.idle);
        self.credit_id = self.credit_id.max(frame.credit_id);
        self.opened = self.opened.take().or(frame.opened);
        self.draining = self.draining.take().or(frame.draining);
        Ok(Some(()))
    }

    pub async fn until(&mut self, what: impl Fn(&Self) -> bool) {
        while !what(self) {
            self.next().await.unwrap().expect("the stream has ended");
        }
    }

    pub async fn messages(&mut self, count: usize) -> Vec<pb::Delivery> {
        self.until(|stream| stream.messages.len() >= count).await;
        std::mem::take(&mut self.messages)
    }

    pub async fn result(&mut self, id: u64) -> pb::ConsumeResult {
        self.until(|stream| stream.results.iter().any(|result| result.id == id)).await;
        let at = self.results.iter().position(|result| result.id == id).unwrap();
        self.results.remove(at)
    }

    /// Takes in what comes in this many milliseconds.
    pub async fn listen(&mut self, ms: u64) {
        let time = Duration::from_millis(ms);
        let _ = timeout(time, async { while self.next().await.unwrap().is_some() {} }).await;
    }

    /// Half-closes, and waits for the end.
    pub async fn close(mut self) -> Self {
        self.send = None;
        while self.next().await.unwrap().is_some() {}
        self
    }

    pub async fn status(mut self) -> Status {
        loop {
            match self.next().await {
                Ok(Some(())) => {}
                Ok(None) => panic!("it ended with OK"),
                Err(status) => return status,
            }
        }
    }
}

/// A start with credit for this many leases.
pub fn start(fixture: &Fixture, leases: u32) -> ConsumeStart {
    let credit = ConsumeCredit { id: 0, max_leases: Some(leases), max_bytes: None };
    ConsumeStart {
        stream: fixture.stream.clone(),
        consumer: fixture.consumer.clone(),
        credit: Some(credit),
        ..Default::default()
    }
}

/// Credit for this many leases.
pub fn leases(id: u64, leases: u32) -> ConsumeCredit {
    ConsumeCredit { id, max_leases: Some(leases), max_bytes: None }
}

/// A settlement by number.
pub fn by_number(number: u64, action: Action) -> Settlement {
    Settlement { token: String::new(), action: Some(action), number }
}

/// An Ack by number.
pub fn acked(message: &pb::Delivery) -> Settlement {
    by_number(message.number, Action::Ack(pb::AckAction {}))
}

/// The outcomes of one frame.
pub fn outcomes(result: &pb::ConsumeResult) -> Vec<Outcome> {
    result.results.iter().map(pb::SettleResult::outcome).collect()
}

/// The start with leases that live as long as the stream, and a heartbeat of a second.
pub fn keep(fixture: &Fixture, leases: u32, grace: i64, at_most: Option<i64>) -> ConsumeStart {
    let keep = pb::ConsumeKeep { grace: Some(seconds(grace)), at_most: at_most.map(seconds) };
    let holding = Some(Holding::Keep(keep));
    ConsumeStart { holding, heartbeat: Some(seconds(1)), ..start(fixture, leases) }
}

/// A duration of a message.
pub fn seconds(seconds: i64) -> prost_types::Duration {
    prost_types::Duration { seconds, nanos: 0 }
}
