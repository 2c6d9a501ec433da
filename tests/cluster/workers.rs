//! Workers that choose a replica at random for every call, and try again with the same tokens until
//! they are told what became of them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use fetch_proxy::pb::{self, settlement::Action};
use testkit::{dice::Dice, jetstream::Fixture, millis, proxy::fetch};
use tokio::sync::watch;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use crate::{
    books::{Books, How},
    fleet::Fleet,
};

const BATCH: u32 = 20;
/// No call takes longer, and no settlement is tried for longer than some of them.
const CALL: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(40);

pub struct Worker {
    pub fleet: Arc<Fleet>,
    pub books: Arc<Books>,
    pub fixture: Arc<Fixture>,
    pub dice: Dice,
    /// Set when all messages are done.
    pub over: watch::Receiver<bool>,
    pub ack_wait: Duration,
    /// Some batches are worked on for so long, in milliseconds.
    pub long: std::ops::Range<u64>,
}

/// A delivery in our hands.
struct Held {
    token: String,
    message: u64,
    delivery: u64,
    how: How,
}

impl Worker {
    pub async fn work(mut self) {
        while !*self.over.borrow() {
            let held = self.take().await;
            if held.is_empty() {
                continue;
            }
            if self.dice.percent(2) {
                let long = self.dice.millis(self.long.clone());
                self.extend(&held, long + CALL).await;
                tokio::time::sleep(long).await;
            } else {
                tokio::time::sleep(self.dice.millis(0..100)).await;
            }
            self.settle(held).await;
        }
    }

    async fn take(&mut self) -> Vec<Held> {
        let mut request = Request::new(fetch(&self.fixture, BATCH, 2000));
        request.set_timeout(CALL);
        match self.fleet.any(&mut self.dice).fetch(request).await {
            Ok(answer) => {
                let messages = answer.into_inner().messages;
                messages.into_iter().map(|message| self.held(message)).collect()
            }
            Err(status) => {
                self.again(&status).await;
                Vec::new()
            }
        }
    }

    fn held(&mut self, message: pb::Delivery) -> Held {
        let (number, delivery) = (message.stream_sequence, u64::from(message.delivery_count));
        self.books.handed(number, delivery);
        let how = match self.dice.within(0..1000) {
            0..10 if delivery < 3 => How::Nak,
            10..12 => How::Term,
            _ => How::Ack,
        };
        Held { token: message.token, message: number, delivery, how }
    }

    /// Tried until it is done, or the lease may be over; then it is settled all the same, as far as
    /// that goes.
    async fn extend(&mut self, held: &[Held], length: Duration) {
        let length = i64::try_from(length.as_millis()).unwrap();
        let settlements = held.iter().map(|held| pb::Settlement {
            token: held.token.clone(),
            action: Some(Action::Extend(pb::ExtendAction { lease: millis(length) })),
        });
        let settlements: Vec<_> = settlements.collect();
        let first = Instant::now();
        while first.elapsed() < self.ack_wait {
            let settlements = settlements.clone();
            let mut request = Request::new(pb::SettleRequest { settlements, ..Default::default() });
            request.set_timeout(CALL);
            match self.fleet.any(&mut self.dice).settle(request).await {
                Ok(answer) if answer.get_ref().failed == 0 => return,
                Ok(_) => tokio::time::sleep(self.dice.millis(50..150)).await,
                Err(status) => self.again(&status).await,
            }
        }
    }

    async fn settle(&mut self, mut held: Vec<Held>) {
        let first = Instant::now();
        while !held.is_empty() && first.elapsed() < PATIENCE {
            let asked = Instant::now();
            let settlements = held.iter().map(settlement).collect();
            let mut request = Request::new(pb::SettleRequest { settlements, ..Default::default() });
            request.set_timeout(CALL);
            match self.fleet.any(&mut self.dice).settle(request).await {
                Ok(answer) => {
                    let results = answer.into_inner().results;
                    let told = held.into_iter().zip(results);
                    held = told
                        .filter_map(|(held, told)| self.told(held, told, first, asked))
                        .collect();
                    if !held.is_empty() {
                        tokio::time::sleep(self.dice.millis(50..150)).await;
                    }
                }
                Err(status) => {
                    for held in &held {
                        self.books.perhaps(held.message, held.delivery, held.how);
                    }
                    self.again(&status).await;
                }
            }
        }
    }

    /// Notes what was told of one; what may be tried again comes back.
    fn told(
        &self,
        held: Held,
        told: pb::SettleResult,
        first: Instant,
        asked: Instant,
    ) -> Option<Held> {
        let what = told.error.as_ref().map_or("accepted", |error| &error.reason);
        self.books.tried(held.message, held.delivery, asked, what);
        let Some(error) = told.error else {
            self.books.accepted(held.message, held.delivery, held.how, first);
            return None;
        };
        match &*error.reason {
            "LEASE_EXPIRED" | "LEASE_SETTLED" => {
                self.books.refused(held.message, held.delivery);
                None
            }
            reason => {
                if matches!(reason, "SETTLE_UNCONFIRMED" | "OWNER_UNREACHABLE") {
                    self.books.perhaps(held.message, held.delivery, held.how);
                }
                self.books.retried(reason);
                Some(held)
            }
        }
    }

    /// A call that failed as a whole is made again after a moment, at any replica.
    async fn again(&mut self, status: &Status) {
        // What tonic's client makes of a connection that is gone; Internal is a call that it had
        // not sent yet when the server gave notice to go.
        let transport = matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
        );
        match status.get_details_error_info() {
            Some(info) => self.books.retried(&info.reason),
            None if transport || status.code() == Code::DeadlineExceeded => {
                self.books.retried(&format!("{:?}", status.code()));
            }
            None => panic!("no reason in {status:?}"),
        }
        tokio::time::sleep(self.dice.millis(20..100)).await;
    }
}

fn settlement(held: &Held) -> pb::Settlement {
    let action = match held.how {
        How::Ack => Action::Ack(pb::AckAction {}),
        How::Nak => Action::Nak(pb::NakAction { delay: None }),
        How::Term => Action::Term(pb::TermAction { reason: "for the books".to_owned() }),
    };
    pb::Settlement { token: held.token.clone(), action: Some(action) }
}
