//! The view of the delivery log that these tests have: counts of all that workers received and
//! settled, and of all that must not happen.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    time::Duration,
};

use testkit::delivery_log::{At, Holding, Kind, Outcome, Records, Try};

/// The summary of a run.
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
    /// Deliveries whose worker never learned the result of its settlement.
    pub unknown: usize,
    /// Messages that were settled, though no worker knows by which settlement.
    pub untold: usize,
    /// Settlements that were accepted although another worker had the message before the first try.
    pub accepted_late: usize,
    /// Settlements that were accepted although another worker had the message before the answer.
    pub accepted_in_flight: usize,
    /// Messages that two holders acked or terminated.
    pub settled_twice: usize,
    /// Messages that JetStream has as settled, and that no worker settled.
    pub lost: usize,
    pub longest_silence: Duration,
    /// Failed calls that were repeated, by reason.
    pub retried: BTreeMap<String, usize>,
}

impl Verdict {
    pub fn of(records: &Records, published: usize, retried: BTreeMap<String, usize>) -> Self {
        let messages = &records.consumers[0].messages;
        let mut handed: Vec<At> = messages.values().flatten().map(|held| held.handed).collect();
        handed.sort_unstable();
        let silence = handed.windows(2).map(|two| two[1] - two[0]).max().unwrap_or(0);
        let mut verdict = Self {
            published,
            lost: published - messages.len(),
            longest_silence: Duration::from_micros(silence.unsigned_abs()),
            retried,
            ..Self::default()
        };
        for held in messages.values() {
            verdict.read(held);
        }
        verdict
    }

    fn read(&mut self, held: &[Holding]) {
        let count = held.len();
        let held: BTreeMap<u32, &Holding> =
            held.iter().map(|holding| (holding.attempt, holding)).collect();
        assert_eq!(held.len(), count, "one attempt was handed out twice");
        self.handed += count;
        let settled = |kind| {
            held.values().filter_map(|held| accepted(held)).filter(|done| done.kind == kind).count()
        };
        let (acked, nacked, terminated) =
            (settled(Kind::Ack), settled(Kind::Nak), settled(Kind::Term));
        self.acked += acked;
        self.nacked += nacked;
        self.terminated += terminated;
        self.settled_twice += usize::from(acked + terminated > 1);
        if acked + terminated == 0 {
            let perhaps = held.values().any(|held| perhaps_settled(held));
            *(if perhaps { &mut self.untold } else { &mut self.lost }) += 1;
        }
        let attempts = held.keys().next_back().map_or(0, |last| *last as usize);
        self.redelivered += attempts.saturating_sub(1 + nacked);
        for (attempt, holding) in &held {
            let refused = settlements(holding).any(|tried| tried.outcome.is_over());
            self.refused += usize::from(refused);
            let Some(done) = accepted(holding) else {
                self.unknown += usize::from(!refused);
                continue;
            };
            let first = settlements(holding).next().map_or(done.sent, |tried| tried.sent);
            let answered = done.answered.unwrap_or(At::MAX);
            let mut later = held.range(attempt + 1..).map(|(_, later)| later.handed);
            if later.clone().any(|handed| handed < first) {
                self.accepted_late += 1;
            } else if done.kind != Kind::Nak && later.any(|handed| handed < answered) {
                self.accepted_in_flight += 1;
            }
        }
    }
}

/// All that settles a delivery, so not an Extend.
fn settlements(holding: &Holding) -> impl Iterator<Item = &Try> {
    holding.tries.iter().filter(|tried| tried.kind != Kind::Extend)
}

/// The settlement that the worker knows to be done.
fn accepted(holding: &Holding) -> Option<&Try> {
    settlements(holding)
        .find(|tried| tried.outcome.accepted() || tried.outcome == Outcome::Duplicate)
}

/// Whether an Ack or Term may have been applied without an answer that says so.
fn perhaps_settled(holding: &Holding) -> bool {
    let unclear = |tried: &&Try| {
        let open = ["SETTLE_UNCONFIRMED", "OWNER_UNREACHABLE"];
        tried.outcome == Outcome::Unknown || open.iter().any(|reason| tried.outcome.is(reason))
    };
    settlements(holding).filter(|tried| tried.kind != Kind::Nak).any(|tried| unclear(&tried))
}

/// The histories of the first few messages that two workers have settled, or no worker.
pub fn disputes(records: &Records) -> String {
    let mut text = String::new();
    let disputed = records.consumers[0].messages.iter().filter(|(_, held)| {
        let done = held.iter().filter_map(accepted).filter(|done| done.kind != Kind::Nak).count();
        done > 1 || done == 0 && !held.iter().any(perhaps_settled)
    });
    for (sequence, held) in disputed.take(5) {
        let history = records.history(*sequence, held, held[0].handed);
        let _ = write!(text, "message {sequence}:\n{history}");
    }
    text
}

impl fmt::Display for Verdict {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |what: &str, count: usize| writeln!(out, "{what:<58} {count:>8}");
        row("published", self.published)?;
        row("received by workers", self.handed)?;
        row("acked", self.acked)?;
        row("terminated", self.terminated)?;
        row("nacked", self.nacked)?;
        row("attempts that no Nak asked for", self.redelivered)?;
        row("refused because the lease was over", self.refused)?;
        row("without an answer", self.unknown)?;
        row("settled by an uncertain settlement", self.untold)?;
        row("accepted after another worker had received it", self.accepted_late)?;
        row("accepted while another worker received it", self.accepted_in_flight)?;
        row("acked or terminated by two", self.settled_twice)?;
        row("lost", self.lost)?;
        writeln!(out, "longest time without any delivery: {:?}", self.longest_silence)?;
        write!(out, "repeated calls, by reason: {:?}", self.retried)
    }
}
