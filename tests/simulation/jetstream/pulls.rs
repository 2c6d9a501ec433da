//! The pulls that wait at a consumer, of all clients.

use std::collections::{BTreeSet, VecDeque};

use fetch_proxy::broker::{PullEnd, PullRequest};

use super::{
    config::Config,
    types::{Connection, InboxId, Sent, Time},
};

/// A pull that waits.
#[derive(Debug, Clone)]
pub struct Pull {
    to: InboxId,
    asked: PullRequest,
    left: u32,
    bytes: Option<u64>,
    ends: Time,
}

impl Pull {
    pub fn new(to: InboxId, asked: PullRequest, now: Time) -> Self {
        let (left, bytes, ends) = (asked.batch, asked.max_bytes, now + asked.expires);
        Self { to, asked, left, bytes, ends }
    }

    fn is_served_shot(&self) -> bool {
        self.asked.no_wait && self.left < self.asked.batch
    }

    pub fn inbox(&self) -> InboxId {
        self.to
    }

    /// The message that this pull has ended.
    pub fn end(&self, end: PullEnd) -> Sent {
        Sent::End { to: self.to, no: self.asked.no, end }
    }
}

/// The pulls that wait, in the order in which they are served.
#[derive(Debug, Default)]
pub struct Pulls(VecDeque<Pull>);

impl Pulls {
    /// Puts a pull in line, or returns the reason why not. `available` messages could be handed out.
    pub fn add(&mut self, pull: Pull, config: &Config, available: usize) -> Option<PullEnd> {
        let refused = self.refuses(&pull.asked, config, available);
        if refused.is_none() {
            self.0.push_back(pull);
        }
        refused
    }

    fn refuses(&self, asked: &PullRequest, config: &Config, available: usize) -> Option<PullEnd> {
        let Config { max_batch, max_expires, max_bytes, max_waiting, .. } = config;
        // consumer.go:4692: the limits of one request.
        if let Some(most) = max_batch.filter(|most| asked.batch > *most) {
            return Some(PullEnd::Busy(format!("Exceeded MaxRequestBatch of {most}")));
        }
        if let Some(most) = max_expires.filter(|most| asked.expires > *most) {
            return Some(PullEnd::Busy(format!("Exceeded MaxRequestExpires of {most:?}")));
        }
        if let (Some(most), Some(bytes)) = (*max_bytes, asked.max_bytes)
            && bytes > most
        {
            return Some(PullEnd::Busy(format!("Exceeded MaxRequestMaxBytes of {most}")));
        }
        if self.0.len() >= *max_waiting {
            return Some(PullEnd::Busy("Exceeded MaxWaiting".to_owned()));
        }
        // consumer.go:4759: others wait for the pending messages.
        let wanted: usize = self.0.iter().map(|pull| pull.left as usize).sum();
        let taken = asked.no_wait && available > 0 && available < wanted;
        taken.then_some(PullEnd::RequestsPending)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next pull that may take a message of this size. Pulls with too little room end.
    pub fn next(&mut self, size: u64, sent: &mut Vec<Sent>) -> Option<Pull> {
        // consumer.go:4498: a message that is too large ends the pull, and the next pull is asked.
        let large = |pull: &Pull| pull.bytes.is_some_and(|bytes| size > bytes);
        while let Some(pull) = self.0.pop_front_if(|pull| large(pull)) {
            sent.push(pull.end(PullEnd::TooLarge));
        }
        self.0.pop_front()
    }

    /// Puts a pull that has brought a message of this size at the end of the line, if it is not over.
    /// Nothing says that it is over, neither by its messages nor by its bytes (consumer.go:4488).
    pub fn requeue(&mut self, mut pull: Pull, size: u64) {
        pull.left -= 1;
        pull.bytes = pull.bytes.map(|bytes| bytes - size);
        if pull.left > 0 && pull.bytes != Some(0) {
            self.0.push_back(pull);
        }
    }

    /// Ends pulls whose time is over. The end of one ends all with `no_wait` that have brought something,
    /// even at `max_ack_pending` (consumer.go:5588).
    pub fn expire(&mut self, sent: &mut Vec<Sent>, now: Time) {
        if self.0.iter().any(|pull| now >= pull.ends) {
            self.end(sent, |pull| now >= pull.ends || pull.is_served_shot());
        }
    }

    /// Nothing more can be handed out now: pulls with `no_wait` that have brought something end.
    pub fn end_served(&mut self, sent: &mut Vec<Sent>) {
        self.end(sent, Pull::is_served_shot);
    }

    fn end(&mut self, sent: &mut Vec<Sent>, over: impl Fn(&Pull) -> bool) {
        self.0.retain(|pull| {
            let over = over(pull);
            if over {
                sent.push(pull.end(PullEnd::Done));
            }
            !over
        });
    }

    /// Forgets all pulls of these connections. Nothing is sent.
    pub fn forget(&mut self, of: impl Fn(Connection) -> bool) {
        self.0.retain(|pull| !of(pull.to.connection));
    }

    /// Ends all pulls for this reason.
    pub fn end_all(
        &mut self,
        end: &PullEnd,
        connected: &BTreeSet<Connection>,
        sent: &mut Vec<Sent>,
    ) {
        self.forget(|connection| !connected.contains(&connection));
        sent.extend(std::mem::take(&mut self.0).iter().map(|pull| pull.end(end.clone())));
    }

    /// The time at which the next pull ends.
    pub fn next_due(&self) -> Option<Time> {
        self.0.iter().map(|pull| pull.ends).min()
    }
}
