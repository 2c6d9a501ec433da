//! What became of every message: each delivery that a worker was handed, and what each was told
//! when it settled it. Judges at the end; decides nothing before.

use std::{
    collections::BTreeMap,
    fmt,
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
    /// How it was settled, when that was first asked, and when the call began that was told so.
    accepted: Option<(How, Instant, Instant)>,
    refused: bool,
}

/// All messages by their number, and their deliveries by theirs.
#[derive(Debug, Default)]
pub struct Books(Mutex<Pages>);

#[derive(Debug, Default)]
struct Pages {
    messages: BTreeMap<u64, BTreeMap<u64, Handed>>,
    done: usize,
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
    /// Settled by a holder whose message another had been handed before it asked.
    pub accepted_late: usize,
    /// The same, where its first try was under way before that, and nobody knew what of it.
    pub accepted_in_flight: usize,
    /// Settled for good by two of its holders.
    pub settled_twice: usize,
    /// Neither acked nor terminated.
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
        let handed = Handed { at: now, accepted: None, refused: false };
        let twin = pages.messages.entry(message).or_default().insert(delivery, handed);
        assert!(twin.is_none(), "delivery {delivery} of message {message} was handed out twice");
    }

    /// A worker was told that its settlement counts.
    pub fn accepted(&self, message: u64, delivery: u64, how: How, first: Instant, asked: Instant) {
        let mut pages = self.pages();
        let deliveries = pages.messages.get_mut(&message).unwrap();
        let done = how != How::Nak && !deliveries.values().any(Handed::is_final);
        deliveries.get_mut(&delivery).unwrap().accepted = Some((how, first, asked));
        pages.done += usize::from(done);
    }

    /// A worker was told that its lease is over.
    pub fn refused(&self, message: u64, delivery: u64) {
        let mut pages = self.pages();
        let deliveries = pages.messages.get_mut(&message).unwrap();
        deliveries.get_mut(&delivery).unwrap().refused = true;
    }

    pub fn retried(&self, reason: &str) {
        *self.pages().retried.entry(reason.to_owned()).or_default() += 1;
    }

    /// Messages that were acked or terminated.
    pub fn done(&self) -> usize {
        self.pages().done
    }

    pub fn verdict(&self, published: usize) -> Verdict {
        let pages = self.pages();
        let mut verdict = Verdict {
            published,
            lost: published - pages.done,
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
        let attempts =
            deliveries.keys().next_back().map_or(0, |last| usize::try_from(*last).unwrap());
        self.redelivered += attempts.saturating_sub(1 + nacked);
        for (number, handed) in deliveries {
            self.refused += usize::from(handed.refused);
            self.unknown += usize::from(!handed.refused && handed.accepted.is_none());
            let Some((_, first, asked)) = handed.accepted else { continue };
            let mut later = deliveries.range(number + 1..).map(|(_, later)| later.at);
            if later.clone().any(|at| at < first) {
                self.accepted_late += 1;
            } else if later.any(|at| at < asked) {
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
        row("accepted from a holder after another had it", self.accepted_late)?;
        row("  the same, under way since before that", self.accepted_in_flight)?;
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
