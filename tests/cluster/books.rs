//! What became of every message: each delivery that a worker was handed, and what each was told
//! when it settled it. Judges at the end; decides nothing before.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How a delivery was settled, as its worker was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    Ack,
    Nak,
    Term,
}

/// One delivery in a worker's hands.
#[derive(Debug)]
struct Handed {
    at: Instant,
    /// How it was settled, when that was first asked, and when it was told.
    accepted: Option<(How, Instant, Instant)>,
    refused: bool,
    /// A final settlement of it was asked for, and it was never said whether that was done.
    perhaps: bool,
    /// When its settlement was asked for, when that was answered, and how.
    tries: Vec<(Instant, Instant, String)>,
}

/// All messages by their number, and their deliveries by theirs.
#[derive(Debug, Default)]
pub struct Books(Mutex<Pages>);

#[derive(Debug, Default)]
struct Pages {
    messages: BTreeMap<u64, BTreeMap<u64, Handed>>,
    last: Option<Instant>,
    longest_silence: Duration,
    /// Calls that failed and were made again, by the reason that they were told.
    retried: BTreeMap<String, usize>,
}

/// The end of the books.
#[derive(Debug, Default)]
pub struct Verdict {
    pub published: usize,
    pub handed: usize,
    pub acked: usize,
    pub terminated: usize,
    pub nacked: usize,
    /// Deliveries beyond the first that no Nak had asked for.
    pub redelivered: usize,
    /// Deliveries whose token was refused.
    pub refused: usize,
    /// Handed out, and the worker never learned what became of its settlement.
    pub unknown: usize,
    /// Messages that are done by a settlement whose worker never learned of it.
    pub untold: usize,
    /// Settled by a holder whose message another had been handed before it asked.
    pub accepted_late: usize,
    /// Another was handed it between the first try to settle it for good and the answer.
    pub accepted_in_flight: usize,
    /// Settled for good by two of its holders.
    pub settled_twice: usize,
    /// Done by JetStream's account, and by no settlement.
    pub lost: usize,
    pub longest_silence: Duration,
    pub retried: BTreeMap<String, usize>,
}

impl Books {
    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker has been handed this delivery of a message.
    pub fn handed(&self, message: u64, delivery: u64) {
        let now = Instant::now();
        let mut pages = self.pages();
        let silence = pages.last.map_or(Duration::ZERO, |last| now - last);
        pages.longest_silence = pages.longest_silence.max(silence);
        pages.last = Some(now);
        let handed =
            Handed { at: now, accepted: None, refused: false, perhaps: false, tries: Vec::new() };
        let twin = pages.messages.entry(message).or_default().insert(delivery, handed);
        assert!(twin.is_none(), "delivery {delivery} of message {message} was handed out twice");
    }

    /// A worker was told that its settlement counts.
    pub fn accepted(&self, message: u64, delivery: u64, how: How, first: Instant) {
        let mut pages = self.pages();
        let deliveries = pages.messages.get_mut(&message).unwrap();
        deliveries.get_mut(&delivery).unwrap().accepted = Some((how, first, Instant::now()));
    }

    /// A worker was not told whether its settlement was done.
    pub fn perhaps(&self, message: u64, delivery: u64, how: How) {
        let mut pages = self.pages();
        let deliveries = pages.messages.get_mut(&message).unwrap();
        deliveries.get_mut(&delivery).unwrap().perhaps |= how != How::Nak;
    }

    /// A worker was told that its lease is over.
    pub fn refused(&self, message: u64, delivery: u64) {
        let mut pages = self.pages();
        let deliveries = pages.messages.get_mut(&message).unwrap();
        deliveries.get_mut(&delivery).unwrap().refused = true;
    }

    /// A worker has an answer to a settlement.
    pub fn tried(&self, message: u64, delivery: u64, asked: Instant, told: &str) {
        let mut pages = self.pages();
        let deliveries = pages.messages.get_mut(&message).unwrap();
        let tries = &mut deliveries.get_mut(&delivery).unwrap().tries;
        tries.push((asked, Instant::now(), told.to_owned()));
    }

    /// What happened to the first few messages that two have settled, or nobody, in milliseconds.
    pub fn disputes(&self) -> String {
        let pages = self.pages();
        let disputed = pages.messages.iter().filter(|(_, deliveries)| {
            let finals = deliveries.values().filter(|handed| handed.is_final()).count();
            finals > 1 || finals == 0 && !deliveries.values().any(|handed| handed.perhaps)
        });
        let mut text = String::new();
        for (number, deliveries) in disputed.take(5) {
            let began = deliveries.values().next().unwrap().at;
            let millis = |at: Instant| at.saturating_duration_since(began).as_millis();
            for (delivery, handed) in deliveries {
                let tries: Vec<_> = handed
                    .tries
                    .iter()
                    .map(|(asked, told, what)| {
                        format!("{}-{} {what}", millis(*asked), millis(*told))
                    })
                    .collect();
                let _ = writeln!(
                    text,
                    "message {number}, delivery {delivery}: handed at {}, {}",
                    millis(handed.at),
                    tries.join(", ")
                );
            }
        }
        text
    }

    pub fn retried(&self, reason: &str) {
        *self.pages().retried.entry(reason.to_owned()).or_default() += 1;
    }

    pub fn verdict(&self, published: usize) -> Verdict {
        let pages = self.pages();
        let mut verdict = Verdict {
            published,
            lost: published - pages.messages.len(),
            longest_silence: pages.longest_silence,
            retried: pages.retried.clone(),
            ..Verdict::default()
        };
        for deliveries in pages.messages.values() {
            verdict.read(deliveries);
        }
        verdict
    }
}

impl Handed {
    fn is_final(&self) -> bool {
        matches!(self.accepted, Some((How::Ack | How::Term, ..)))
    }
}

impl Verdict {
    fn read(&mut self, deliveries: &BTreeMap<u64, Handed>) {
        self.handed += deliveries.len();
        let count = |how| {
            let accepted = deliveries.values().filter_map(|handed| handed.accepted);
            accepted.filter(|(kind, ..)| *kind == how).count()
        };
        let (acked, nacked, terminated) = (count(How::Ack), count(How::Nak), count(How::Term));
        self.acked += acked;
        self.nacked += nacked;
        self.terminated += terminated;
        self.settled_twice += usize::from(acked + terminated > 1);
        if acked + terminated == 0 {
            let perhaps = deliveries.values().any(|handed| handed.perhaps);
            *(if perhaps { &mut self.untold } else { &mut self.lost }) += 1;
        }
        let attempts =
            deliveries.keys().next_back().map_or(0, |last| usize::try_from(*last).unwrap());
        self.redelivered += attempts.saturating_sub(1 + nacked);
        for (number, handed) in deliveries {
            self.refused += usize::from(handed.refused);
            self.unknown += usize::from(!handed.refused && handed.accepted.is_none());
            let Some((how, first, told)) = handed.accepted else { continue };
            let mut later = deliveries.range(number + 1..).map(|(_, later)| later.at);
            if later.clone().any(|at| at < first) {
                self.accepted_late += 1;
            } else if how != How::Nak && later.any(|at| at < told) {
                self.accepted_in_flight += 1;
            }
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |what: &str, count: usize| writeln!(out, "{what:<58} {count:>8}");
        row("published", self.published)?;
        row("handed to workers", self.handed)?;
        row("acked", self.acked)?;
        row("terminated", self.terminated)?;
        row("nacked", self.nacked)?;
        row("attempts that no Nak asked for", self.redelivered)?;
        row("told that the lease is over", self.refused)?;
        row("never told what became of it", self.unknown)?;
        row("done by a settlement that was told to be uncertain", self.untold)?;
        row("accepted from a holder after another had it", self.accepted_late)?;
        row("accepted from one while another was handed it", self.accepted_in_flight)?;
        row("settled for good by two", self.settled_twice)?;
        row("lost", self.lost)?;
        writeln!(
            out,
            "longest time in which nobody was handed anything: {:?}",
            self.longest_silence
        )?;
        write!(out, "calls made again, by reason: {:?}", self.retried)
    }
}
