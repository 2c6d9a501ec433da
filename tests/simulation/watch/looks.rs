//! The questions of each replica about each consumer: which had no answer. Judges nothing. Pure.
//!
//! "After any sign of a change, it stops settling, returning and extending the leases of that consumer."

use std::{collections::BTreeMap, time::Duration};

use fetch_proxy::broker::ConsumerName;

use super::super::jetstream::Time;

/// What a replica knows of the leader of a consumer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Known {
    /// The first question without an answer since the last answer.
    missed: Option<Time>,
    /// The latest question without an answer before the last answer, and that answer.
    ended: Option<(Time, Time)>,
    /// The latest answers: when each was asked for and came, and the deliveries that the leader knew.
    answers: Vec<(Time, Time, u64)>,
}

#[derive(Debug, Clone, Default)]
pub struct Looks(BTreeMap<(usize, ConsumerName), Known>);

/// A replica acts on what it has learned within this time.
const TICK: Duration = Duration::from_millis(2);
/// Answers are remembered for this long.
const REMEMBERED: Duration = Duration::from_secs(60);

impl Looks {
    pub fn looked(
        &mut self,
        (asked, now): (Time, Time),
        side: usize,
        name: &ConsumerName,
        delivered: Option<u64>,
    ) {
        let known = self.0.entry((side, name.clone())).or_default();
        let Some(delivered) = delivered else {
            known.missed.get_or_insert(now);
            return;
        };
        known.ended = known.missed.take().map(|missed| (missed, now)).or(known.ended);
        known.answers.retain(|(_, at, _)| *at + REMEMBERED >= now);
        known.answers.push((asked, now, delivered));
    }

    /// Whether the replica was told, before `at`, that the leader knows less than this delivery, which had
    /// arrived by `arrived`.
    pub fn forgotten(
        &self,
        side: usize,
        name: &ConsumerName,
        (sequence, arrived): (u64, Time),
        at: Time,
    ) -> bool {
        let all = self.0.get(&(side, name.clone())).map(|known| known.answers.as_slice());
        all.unwrap_or_default().iter().any(|(asked, answered, delivered)| {
            *delivered < sequence && arrived < *asked && *answered + TICK < at
        })
    }

    /// Whether the replica has had no answer by `at`, and none since.
    pub fn in_doubt(&self, side: usize, name: &ConsumerName, at: Time) -> bool {
        let known = self.0.get(&(side, name.clone()));
        known.and_then(|known| known.missed).is_some_and(|missed| missed + TICK < at)
    }

    /// Whether the replica has missed an answer from `since` on, and had another one before `at`.
    pub fn doubt_ended(&self, side: usize, name: &ConsumerName, since: Time, at: Time) -> bool {
        let known = self.0.get(&(side, name.clone()));
        known
            .and_then(|known| known.ended)
            .is_some_and(|(missed, answered)| missed >= since && answered + TICK < at)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::lab::{millis, name},
        *,
    };

    #[test]
    fn replica_is_in_doubt_from_a_missed_answer_to_the_next() {
        let mut looks = Looks::default();
        let mut look = |at, answered: bool| {
            looks.looked((millis(at), millis(at)), 1, &name(), answered.then_some(7));
            looks.clone()
        };
        look(100, false);
        let looks = look(200, false);
        assert!(!looks.in_doubt(1, &name(), millis(102)));
        assert!(looks.in_doubt(1, &name(), millis(103)));
        assert!(!looks.in_doubt(2, &name(), millis(103)));
        let looks = look(300, true);
        assert!(!looks.in_doubt(1, &name(), millis(400)));
        assert!(looks.doubt_ended(1, &name(), millis(100), millis(400)));
        assert!(!looks.doubt_ended(1, &name(), millis(101), millis(400)));
    }

    #[test]
    fn delivery_that_an_answer_does_not_contain_is_forgotten() {
        let mut looks = Looks::default();
        looks.looked((millis(100), millis(110)), 1, &name(), Some(7));
        let forgotten = |sequence, arrived, at| {
            looks.forgotten(1, &name(), (sequence, millis(arrived)), millis(at))
        };
        assert!(forgotten(8, 99, 113));
        assert!(!forgotten(7, 99, 113), "it is known");
        assert!(!forgotten(8, 100, 113), "it may have come after the question");
        assert!(!forgotten(8, 99, 112), "the answer has only just come");
    }
}
