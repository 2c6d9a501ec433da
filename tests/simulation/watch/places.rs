//! Check: no place of a replica is taken without a lease, a Fetch or a hand-over. Pure.
//!
//! ```text
//!  the end of the last Fetch  ──▶ its pull expires ──▶ its end may be lost: 1 s ──▶ each place is free or leased
//!  a hand-over that never ends ──▶ 30 s ──▶ its places are free
//! ```

use std::{collections::BTreeMap, time::Duration};

use super::{
    super::jetstream::Time, calls::OpenFetch, ledger::Ledger, report::Report, troubles::Trouble,
};

pub const CHECK: &str = "places";

/// The places of a replica at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    pub side: usize,
    pub most: usize,
    pub held: usize,
    pub free: usize,
}

impl Room {
    /// Whether a Fetch may be refused: "only if leases are held, not if pulls have reserved them".
    pub fn is_full(&self) -> bool {
        // At nine tenths for one consumer, which is one place at least.
        let left = self.most.saturating_sub(self.held);
        self.held > 0 && left <= self.held / 9 + 1
    }
}

/// When the pulls for the Fetch calls of each process are over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pulled(BTreeMap<usize, Time>);

/// A pull counts as ended 1 s after it has expired.
const UNHEARD: Duration = Duration::from_secs(3);
/// "A pull lasts for at most a fifth of the shortest ack wait, and at most 5 s."
const LONGEST_PULL: Duration = Duration::from_secs(5);
/// The longest time for which a hand-over keeps places, and a moment.
const HANDED: Duration = Duration::from_secs(35);

impl Pulled {
    /// A Fetch has ended for its client. Its pull may last as long as the Fetch was allowed to.
    pub fn ended(&mut self, fetch: &OpenFetch, now: Time) {
        let pull = if fetch.stream.is_some() { LONGEST_PULL } else { Duration::ZERO };
        self.asks(fetch.side, (now + pull).max(fetch.began + fetch.max_wait + fetch.linger));
    }

    fn asks(&mut self, side: usize, until: Time) {
        let known = self.0.entry(side).or_default();
        *known = until.max(*known);
    }
}

/// A look at the replicas that serve.
pub fn look<'f>(
    ledger: &Ledger,
    pulled: &mut Pulled,
    fetches: impl Iterator<Item = &'f OpenFetch>,
    (rooms, now): (&[Room], Time),
    report: &mut Report,
) {
    for fetch in fetches {
        pulled.asks(fetch.side, now);
    }
    for room in rooms {
        let side = room.side;
        let over = pulled.0.get(&side).copied().unwrap_or_default() + UNHEARD;
        let since = now.saturating_sub(HANDED);
        let mut late = ledger.troubles.all().iter().filter(|span| {
            let delays = matches!(span.trouble, Trouble::Draining { .. })
                || [Trouble::Stopped { side }, Trouble::Suspended { side }].contains(&span.trouble);
            delays && span.from <= now && since <= span.until
        });
        if now < over || late.next().is_some() {
            continue;
        }
        report.coverage.count("places: of a replica at rest");
        if room.held + room.free < room.most {
            report.fail(CHECK, now, format!("nobody has asked since {over:?}: {room:?}"));
            // Once is enough.
            pulled.asks(side, Time::MAX - UNHEARD);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::lab::Lab, *};

    fn look(lab: &Lab, free: usize) {
        lab.watch().look_at_rooms(&[Room { side: 1, most: 10, held: 2, free }], lab.now);
    }

    fn found(free: usize, happens: impl FnOnce(&mut Lab)) -> Vec<&'static str> {
        let mut lab = Lab::new();
        happens(&mut lab);
        look(&lab, free);
        lab.found()
    }

    #[test]
    fn place_without_a_lease_is_free_once_the_pulls_are_over() {
        let fetched = |wait: u64| {
            move |lab: &mut Lab| {
                let fetch = lab.fetch(1, 8_000);
                lab.wait(1_000);
                lab.end(fetch, super::super::FetchEnd::Gone);
                lab.wait(wait);
            }
        };
        assert!(found(7, fetched(9_900)).is_empty());
        assert_eq!(found(7, fetched(10_000)), [CHECK]);
        assert!(found(8, fetched(10_000)).is_empty());
    }

    #[test]
    fn open_fetch_may_have_a_pull() {
        assert!(
            found(7, |lab| {
                lab.fetch(1, 1_000);
                lab.wait(60_000);
            })
            .is_empty()
        );
    }

    #[test]
    fn hand_over_and_a_process_that_stands_still_may_keep_places_for_a_time() {
        for (trouble, wait, expected) in [
            (Trouble::Draining { side: 2 }, 34_000, vec![]),
            (Trouble::Draining { side: 2 }, 36_000, vec![CHECK]),
            (Trouble::Stopped { side: 1 }, 34_000, vec![]),
            (Trouble::Stopped { side: 2 }, 34_000, vec![CHECK]),
        ] {
            let after = |lab: &mut Lab| {
                lab.trouble(trouble, 0);
                lab.wait(wait);
            };
            assert_eq!(found(7, after), expected, "{trouble:?}");
        }
    }

    #[test]
    fn replica_is_full_at_nine_tenths_for_one_consumer() {
        let full = |most, held| Room { side: 1, most, held, free: 0 }.is_full();
        assert!(full(10, 9) && full(3, 2) && full(100, 90));
        assert!(!full(10, 7) && !full(100, 88) && !full(1, 0));
    }
}
