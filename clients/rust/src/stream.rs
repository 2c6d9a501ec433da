//! One call of Consume: its frames, its credit, and which message has which number on it. It opens no next stream.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    time::Duration,
};

use tokio::{sync::mpsc::UnboundedSender, task::AbortHandle, time::Instant};

use crate::{
    Error,
    pb::{
        ConsumeCredit, ConsumeRequest, ConsumeResponse, ConsumeResult, ConsumeSettle, Outcome,
        Settlement,
    },
};

/// A frame has at most 512 KiB: so many settlements by token with the longest reason are less.
const MOST_SETTLEMENTS: usize = 400;

pub(crate) struct Stream {
    /// `None`: it is half-closed.
    send: Option<UnboundedSender<ConsumeRequest>>,
    reader: AbortHandle,
    /// When the last frame came.
    heard: Instant,
    /// The proxy has answered.
    pub is_served: bool,
    is_draining: bool,
    /// The messages that this stream has delivered, by number.
    numbers: BTreeMap<u64, u64>,
    /// Messages to settle or extend in the next frame.
    ready: BTreeSet<u64>,
    /// Without a result yet, by the id of the frame.
    sent: BTreeMap<u64, Vec<u64>>,
    last_id: u64,
    /// The number of results in a row that must be repeated.
    tries: u32,
    credit: u32,
    credit_id: u64,
    /// The id of the credit after which no message comes.
    pause_id: Option<u64>,
    is_paused: bool,
}

/// What there is to say besides settlements.
pub(crate) struct Say {
    pub credit: u32,
    pub is_stopping: bool,
    /// The stream carries no message.
    pub is_idle: bool,
    /// A frame is due, if only an empty frame.
    pub is_beat: bool,
}

/// The results of one frame.
#[derive(Default)]
pub(crate) struct Results {
    pub extended: Vec<u64>,
    pub settled: Vec<u64>,
    pub lost: Vec<(u64, Error)>,
    /// To be repeated after a wait, and why.
    pub again: Option<(Vec<u64>, Error, Duration)>,
}

impl Stream {
    /// `first` is the frame with the start, and `ready` what earlier streams have left.
    pub fn new(
        send: UnboundedSender<ConsumeRequest>,
        reader: AbortHandle,
        first: ConsumeRequest,
        ready: BTreeSet<u64>,
    ) -> Self {
        let credit = first.start.as_ref().and_then(|start| start.credit?.max_leases);
        // A receiver that is gone has told why.
        drop(send.send(first));
        Self {
            send: Some(send),
            reader,
            heard: Instant::now(),
            is_served: false,
            is_draining: false,
            numbers: BTreeMap::new(),
            ready,
            sent: BTreeMap::new(),
            last_id: 0,
            tries: 0,
            credit: credit.unwrap_or(0),
            credit_id: 0,
            pause_id: None,
            is_paused: false,
        }
    }

    /// Takes the parts of a frame that are not about messages. True: it is time for the next stream.
    pub fn hear(&mut self, frame: &ConsumeResponse) -> bool {
        (self.heard, self.is_served) = (Instant::now(), true);
        self.is_paused |= self.pause_id.is_some_and(|id| frame.credit_id >= id);
        self.is_draining |= frame.draining.is_some();
        frame.draining.is_some()
    }

    pub fn is_silent_for(&self, silence: Duration) -> bool {
        self.heard.elapsed() > silence
    }

    pub fn deliver(&mut self, number: u64, key: u64) {
        self.numbers.insert(number, key);
    }

    /// How many of its messages are in hand.
    pub fn delivered(&self) -> usize {
        self.numbers.len()
    }

    pub fn key_of(&self, number: u64) -> Option<u64> {
        self.numbers.get(&number).copied()
    }

    /// Settles or extends it in the next frame.
    pub fn send(&mut self, key: u64) {
        self.ready.insert(key);
    }

    /// It is settled or lost.
    pub fn forget(&mut self, number: u64, key: u64) {
        self.numbers.remove(&number);
        self.ready.remove(&key);
    }

    /// Sends all that is there to say: if nothing, a sign of life.
    pub fn write(&mut self, mut say: Say, part: impl Fn(u64) -> Option<Settlement>) {
        while let Some(send) = &self.send {
            let mut frame = ConsumeRequest::default();
            let is_pausing = say.is_stopping && self.pause_id.is_none();
            if is_pausing || (say.credit != self.credit && !self.is_draining) {
                (self.credit, self.credit_id) = (say.credit, self.credit_id + 1);
                self.pause_id = self.pause_id.or(is_pausing.then_some(self.credit_id));
                let max_leases = Some(say.credit);
                frame.credit =
                    Some(ConsumeCredit { id: self.credit_id, max_leases, max_bytes: None });
            }
            let next = || self.ready.pop_first();
            let keys: Vec<u64> = iter::from_fn(next).take(MOST_SETTLEMENTS).collect();
            let parts = keys.into_iter().filter_map(|key| Some((key, part(key)?)));
            let (keys, settlements): (Vec<_>, Vec<_>) = parts.unzip();
            if !keys.is_empty() {
                self.last_id += 1;
                self.sent.insert(self.last_id, keys);
                let settle = ConsumeSettle { id: self.last_id, settlements, ..Default::default() };
                frame.settle = Some(settle);
            }
            if frame == ConsumeRequest::default() && !say.is_beat {
                break;
            }
            say.is_beat = false;
            drop(send.send(frame));
        }
        if self.is_paused && say.is_idle {
            self.send = None;
        }
    }

    /// Takes the results of one frame.
    pub fn note(&mut self, result: ConsumeResult) -> Results {
        let mut noted = Results::default();
        let (mut again, mut worst) = (Vec::new(), None::<Error>);
        let keys = self.sent.remove(&result.id).unwrap_or_default();
        for (place, key) in keys.into_iter().enumerate() {
            let part = result.results.get(place);
            let refused =
                result.error.as_ref().or_else(|| part.and_then(|part| part.error.as_ref()));
            match refused.map(Error::of_part) {
                None if part.is_some_and(|part| part.outcome() == Outcome::Extended) => {
                    noted.extended.push(key);
                }
                None => noted.settled.push(key),
                Some(error) if error.can_repeat() => {
                    again.push(key);
                    if worst.as_ref().is_none_or(|worst| worst.retry_delay < error.retry_delay) {
                        worst = Some(error);
                    }
                }
                Some(error) => noted.lost.push((key, error)),
            }
        }
        if let Some(worst) = worst {
            let wait = worst.backoff(&mut self.tries);
            noted.again = Some((again, worst, wait));
        } else {
            self.tries = 0;
        }
        noted
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.reader.abort();
    }
}
