//! Whether all answers to a pull arrive, or only the first one. An account can export JetStream's API as a
//! service that answers once, without `response_type: stream`. It drops all answers to a request but the first
//! one, without an error. Their messages come back after an ack wait. Pure: `now` is an argument.
//!
//! A gap in the sequences alone is no sign: other replicas and programs pull as well. The sign is a pull that
//! 1. asked for several messages and brought one;
//! 2. heard of no end until a second after the pull expired;
//! 3. was followed by a delivery with a gap before it.
//!
//! Each of these has an innocent cause. [`SIGN_AFTER_PULLS`] such pulls in a row, with no second answer to any pull
//! between them, do not.

use std::time::{Duration, Instant};

/// So many pulls in a row are a sign.
const SIGN_AFTER_PULLS: usize = 3;
/// The end of a pull that expired arrives within this time.
const END_GRACE: Duration = Duration::from_secs(1);

/// A pull that may have lost answers.
#[derive(Debug, Clone, Copy)]
struct Pulled {
    no: u64,
    batch: u32,
    expires_at: Instant,
    got: u32,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct SingleAnswer {
    open: Option<Pulled>,
    /// The last pull, if it brought one message and its end was not told.
    last: Option<Pulled>,
    /// Such pulls that were followed by a gap.
    silent: Vec<Pulled>,
    /// The sequence of the last delivery.
    sequence: u64,
    missed: u64,
    told: bool,
}

impl SingleAnswer {
    /// A pull was sent.
    pub(super) fn issued(&mut self, no: u64, batch: u32, expires_at: Instant) {
        let alone = |pulled: &Pulled| pulled.batch > 1 && pulled.got == 1;
        self.last = self.open.take().filter(alone).or(self.last);
        self.open = Some(Pulled { no, batch, expires_at, got: 0 });
    }

    /// A delivery has arrived. `Some`: only first answers arrive, and so many messages were missed.
    pub(super) fn arrived(&mut self, sequence: u64, now: Instant) -> Option<u64> {
        let gap = sequence.saturating_sub(self.sequence).saturating_sub(1);
        let again = sequence <= self.sequence;
        self.sequence = sequence;
        let open = self.open.as_mut()?;
        open.got += 1;
        if open.got > 1 || again {
            self.acquit();
            return None;
        }
        if let Some(last) = self.last.take().filter(|_| gap > 0 && !self.told) {
            self.silent.push(last);
            self.missed += gap;
        }
        let over = |pulled: &Pulled| now >= pulled.expires_at + END_GRACE;
        let told =
            self.silent.len() >= SIGN_AFTER_PULLS && self.silent.iter().all(over) && !self.told;
        self.told |= told;
        told.then_some(self.missed)
    }

    /// The end of a pull was heard, now or after another one was sent.
    pub(super) fn ended(&mut self, no: u64) {
        if let Some(open) = self.open.take_if(|open| open.no == no) {
            if open.got > 0 {
                self.acquit();
            }
        } else if self.last.iter().chain(&self.silent).any(|pulled| pulled.no == no) {
            self.acquit();
        }
    }

    /// The connection is gone, with all that was on its way.
    pub(super) fn lost(&mut self) {
        (self.open, self.sequence) = (None, 0);
        self.acquit();
    }

    /// A pull has had a second answer, or it cannot be known.
    fn acquit(&mut self) {
        (self.last, self.missed) = (None, 0);
        self.silent.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const SECOND: Duration = Duration::from_secs(1);

    /// Pulls of ten messages, two seconds one after the other, that expire after one. Each brings these
    /// sequences, and its end if there is one.
    fn after(pulls: &[(&[u64], bool)]) -> (SingleAnswer, Option<u64>) {
        let (mut single, start) = (SingleAnswer::default(), clock::now());
        let mut told = None;
        for (no, (sequences, ends)) in (0..).zip(pulls) {
            let at = start + SECOND * 2 * u32::try_from(no).unwrap();
            single.issued(no, 10, at + SECOND);
            for sequence in *sequences {
                told = told.or(single.arrived(*sequence, at));
            }
            if *ends {
                single.ended(no);
            }
        }
        (single, told)
    }

    #[test]
    fn three_pulls_with_a_single_answer_are_reported_once() {
        let pulls: &[(&[u64], bool)] = &[(&[1], false), (&[11], false), (&[21], false)];
        assert_eq!(after(pulls).1, None);
        let (mut single, told) = after(&[pulls, &[(&[31], false)]].concat());
        assert_eq!(told, Some(27));
        let now = clock::now() + SECOND * 100;
        for no in 10..20 {
            single.issued(no, 10, now);
            assert_eq!(single.arrived(no * 10, now + SECOND * 2), None);
        }
    }

    #[test]
    fn empty_pull_does_not_matter() {
        let pulls: &[(&[u64], bool)] =
            &[(&[1], false), (&[], true), (&[11], false), (&[], true), (&[21], false)];
        assert_eq!(after(&[pulls, &[(&[31], false)]].concat()).1, Some(27));
    }

    #[test]
    fn gaps_alone_are_no_sign() {
        for ends in [true, false] {
            let pull: (&[u64], bool) = (&[5], ends);
            let next: &[(&[u64], bool)] = &[(&[10, 13], ends), (&[20, 24], ends), (&[30], ends)];
            assert_eq!(after(&[&[pull], next, next].concat()).1, None, "a second answer arrives");
        }
        let told: &[(&[u64], bool)] = &[(&[1], true), (&[11], true), (&[21], true), (&[31], true)];
        assert_eq!(after(told).1, None, "the ends arrive");
    }

    #[test]
    fn no_gap_means_no_missed_message() {
        let pulls: Vec<[u64; 1]> = (1..10).map(|sequence| [sequence]).collect();
        let pulls: Vec<(&[u64], bool)> = pulls.iter().map(|one| (&one[..], false)).collect();
        assert_eq!(after(&pulls).1, None);
    }

    #[test]
    fn late_end_clears_its_pull() {
        let pulls: &[(&[u64], bool)] = &[(&[1], false), (&[11], false), (&[21], false)];
        let (mut single, _) = after(pulls);
        single.ended(0);
        let now = clock::now() + SECOND * 100;
        single.issued(3, 10, now);
        assert_eq!(single.arrived(31, now), None);
    }
}
