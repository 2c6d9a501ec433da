//! One Consume of the fake: its credit, its deliveries, and the life of their leases.

use std::{collections::BTreeMap, time::Duration};

use tokio::{sync::mpsc::UnboundedSender, time::Instant};
use tonic::Status;

use super::queue::{Queue, Taken, failure};
use crate::{
    error::duration_of,
    pb::{
        Codec, ConsumeEnded, ConsumeKeep, ConsumeOpened, ConsumeResponse, ConsumeStart,
        consume_start::Holding,
    },
};

/// The default of the contract.
const GRACE: Duration = Duration::from_secs(10);

pub(super) struct FakeStream {
    tell: UnboundedSender<Result<ConsumeResponse, Status>>,
    start: ConsumeStart,
    pub credit: usize,
    last_number: u64,
    /// The tokens of the open leases, by number.
    leases: BTreeMap<u64, String>,
}

impl FakeStream {
    pub fn new(
        tell: UnboundedSender<Result<ConsumeResponse, Status>>,
        start: ConsumeStart,
    ) -> Self {
        let credit = start.credit.and_then(|credit| credit.max_leases).unwrap_or(1) as usize;
        let stream = Self { tell, start, credit, last_number: 0, leases: BTreeMap::new() };
        let opened = Some(ConsumeOpened::default());
        stream.say(ConsumeResponse { opened, ..ConsumeResponse::default() });
        stream
    }

    /// A client that is gone needs no frame.
    pub fn say(&self, frame: ConsumeResponse) {
        drop(self.tell.send(Ok(frame)));
    }

    pub fn break_off(&self) {
        drop(self.tell.send(Err(Status::unavailable("the test has cut the connection"))));
    }

    /// The token of a delivery, while its lease is open.
    pub fn token(&self, number: u64) -> Option<String> {
        self.leases.get(&number).cloned()
    }

    /// Forgets leases that are not open, and tells of those that have ended by themselves.
    pub fn look(&mut self, queue: &Queue, over: &[String]) {
        let ended = self.leases.iter().filter(|(_, token)| over.contains(token));
        let why = failure("LEASE_EXPIRED", "the lease has ended").error;
        let ended = ended.map(|(number, _)| ConsumeEnded { number: *number, why: why.clone() });
        let ended: Vec<_> = ended.collect();
        if !ended.is_empty() {
            self.say(ConsumeResponse { ended, ..ConsumeResponse::default() });
        }
        self.leases.retain(|_, token| queue.is_open(token));
    }

    /// Sends messages, for as long as there is credit.
    pub fn deliver(&mut self, queue: &mut Queue, now: Instant) {
        let mut frame = ConsumeResponse::default();
        let codec = self.start.codec();
        while self.leases.len() < self.credit {
            let token = match queue.take(now, None, codec) {
                Some(Taken::Leased(token)) => token,
                Some(Taken::Rejected(rejected)) => {
                    frame.rejected.push(*rejected);
                    continue;
                }
                None => break,
            };
            if let (Some(Holding::Keep(keep)), Some(lease)) =
                (&self.start.holding, queue.lease(&token))
            {
                lease.latest = keep.at_most.map(|at_most| now + duration_of(at_most));
                lease.ends = lease.latest;
            }
            self.last_number += 1;
            match self.delivery(queue, &token, codec) {
                Ok(message) => frame.messages.push(message),
                Err(rejected) => frame.rejected.push(*rejected),
            }
            self.leases.insert(self.last_number, token);
        }
        if !frame.messages.is_empty() || !frame.rejected.is_empty() {
            self.say(frame);
        }
    }

    fn delivery(
        &self,
        queue: &Queue,
        token: &str,
        codec: Codec,
    ) -> Result<crate::pb::Delivery, Box<crate::pb::Rejected>> {
        let number = self.last_number;
        match queue.delivery(token, codec, self.start.max_frame_bytes) {
            Ok(message) => Ok(crate::pb::Delivery { number, ..message }),
            Err(rejected) => Err(Box::new(crate::pb::Rejected { number, ..*rejected })),
        }
    }

    /// The leases outlive the stream by `grace`.
    pub fn leave(self, queue: &mut Queue, now: Instant) {
        let Some(Holding::Keep(ConsumeKeep { grace, .. })) = self.start.holding else { return };
        let ends = now + grace.map_or(GRACE, duration_of);
        for token in self.leases.values() {
            if let Some(lease) = queue.lease(token) {
                lease.ends = Some(lease.latest.map_or(ends, |latest| latest.min(ends)));
            }
        }
    }
}
