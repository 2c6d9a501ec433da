//! Leases that go to another table: no clock gains by the way, and old numbers are answered as the
//! old table would.

use std::{collections::BTreeMap, time::Duration};

use fetch_proxy::lease::{
    Adopted, AdoptedLeases, Found, LeaseSnapshot, OutcomeSlice, SnapshotExpiry,
};
use proptest::{collection::vec, prelude::*};

use super::*;

type Table = LeaseTable<&'static str>;

/// The events at the table that sends the leases, and the time of each after the one before.
#[derive(Debug, Clone)]
enum Step {
    Grant {
        sequence: u64,
        last_attempt: bool,
    },
    Assign {
        which: usize,
        length: Option<u64>,
    },
    Keep {
        which: usize,
        at_most: u64,
        grace: u64,
    },
    EndKept {
        which: usize,
    },
    Settle {
        which: usize,
        kind: SettleKind,
        outcome: PublishOutcome,
    },
    /// A settlement whose end nobody sees.
    Begin {
        which: usize,
        kind: SettleKind,
    },
    Progress {
        which: usize,
    },
    Sweep,
}

fn step() -> impl Strategy<Value = (Step, u64)> {
    let kind = || prop_oneof![Just(SettleKind::Ack), Just(SettleKind::Nak), Just(SettleKind::Term)];
    let outcome = prop_oneof![
        Just(PublishOutcome::Confirmed),
        Just(PublishOutcome::Unsent),
        Just(PublishOutcome::Unconfirmed),
        Just(PublishOutcome::Denied)
    ];
    let which = || 0..12_usize;
    let step = prop_oneof![
        4 => (1..8_u64, any::<bool>())
            .prop_map(|(sequence, last_attempt)| Step::Grant { sequence, last_attempt }),
        3 => (which(), proptest::option::of(1000..40_000_u64))
            .prop_map(|(which, length)| Step::Assign { which, length }),
        2 => (which(), 1000..80_000_u64, 0..40_000_u64)
            .prop_map(|(which, at_most, grace)| Step::Keep { which, at_most, grace }),
        1 => which().prop_map(|which| Step::EndKept { which }),
        3 => (which(), kind(), outcome)
            .prop_map(|(which, kind, outcome)| Step::Settle { which, kind, outcome }),
        1 => (which(), kind()).prop_map(|(which, kind)| Step::Begin { which, kind }),
        2 => which().prop_map(|which| Step::Progress { which }),
        1 => Just(Step::Sweep),
    ];
    (step, 0..2500_u64)
}

/// A table with a history.
struct Old {
    timed: TimedTable,
    now: u64,
    granted: Vec<LeaseId>,
}

impl Old {
    fn after(steps: &[(Step, u64)]) -> Self {
        let mut old = Self { timed: TimedTable::new(), now: 0, granted: Vec::new() };
        for (step, later) in steps {
            old.now += later;
            old.step(step);
        }
        old
    }

    fn step(&mut self, step: &Step) {
        let now = self.now;
        let id = |which: usize| self.granted.get(which).copied();
        match *step {
            Step::Grant { sequence, last_attempt } => {
                let consumer_sequence = self.granted.len() as u64 + 1;
                let terms = self.timed.terms(sequence, now);
                let age = Duration::from_millis(sequence * 700 - 700);
                let terms = Terms { last_attempt, consumer_sequence, age, ..terms };
                self.granted.push(self.timed.table.grant(terms, "x").0);
            }
            Step::Assign { which, length } => {
                let (now, length) = (self.timed.at(now), length.map(Duration::from_millis));
                let _ = id(which).map(|id| self.timed.table.assign(id, length, now));
            }
            Step::Keep { which, at_most, grace } => {
                let (now, lengths) = (self.timed.at(now), [at_most, grace]);
                let [at_most, grace] = lengths.map(Duration::from_millis);
                let _ = id(which).map(|id| self.timed.table.assign_kept(id, (at_most, grace), now));
            }
            Step::EndKept { which } => {
                let now = self.timed.at(now);
                id(which).into_iter().for_each(|id| self.timed.table.end_kept(id, now));
            }
            Step::Settle { which, kind, outcome } => {
                let Some(id) = id(which) else { return };
                if matches!(self.timed.begin(id, kind, now), Ok(BeginResult::Publish(_))) {
                    self.timed.finish(id, outcome, now);
                }
            }
            Step::Begin { which, kind } => {
                let _ = id(which).map(|id| self.timed.begin(id, kind, now).is_ok());
            }
            Step::Progress { which } => {
                let Some(id) = id(which) else { return };
                self.timed.progressed(id, now.saturating_sub(50), now);
            }
            Step::Sweep => drop(self.timed.sweep(now)),
        }
    }

    fn is_being_settled(&mut self, id: LeaseId) -> bool {
        [SettleKind::Ack, SettleKind::Nak]
            .iter()
            .any(|kind| self.timed.begin(id, *kind, self.now).err() == Some(LeaseError::Busy))
    }
}

/// All that goes, as a hand-over would send it.
fn leaving(table: &Table, now: Instant) -> (Vec<(LeaseId, LeaseSnapshot)>, Vec<OutcomeSlice>) {
    leaving_of_a_leader_seen(table, now, now)
}

/// The same, if the leader was last seen at `seen`.
fn leaving_of_a_leader_seen(
    table: &Table,
    seen: Instant,
    now: Instant,
) -> (Vec<(LeaseId, LeaseSnapshot)>, Vec<OutcomeSlice>) {
    let (mut leases, mut after) = (Vec::new(), None);
    loop {
        let (some, next) = table.leaving(after, 3, now, |_| seen);
        leases.extend(some.into_iter().map(|(id, moving, _)| (id, moving)));
        if next.is_none() {
            break;
        }
        after = next;
    }
    let (mut memories, mut after) = (Vec::new(), None);
    while let Some(piece) = table.outcomes(after) {
        after = Some(piece.last());
        memories.push(OutcomeSlice::new(piece.first(), piece.nibbles().to_vec()));
    }
    (leases, memories)
}

/// Takes all of it in, and what is then known of the old numbers.
fn taken(
    table: &mut Table,
    (leases, memories): &(Vec<(LeaseId, LeaseSnapshot)>, Vec<OutcomeSlice>),
    at: Instant,
    now: Instant,
) -> AdoptedLeases {
    let mut inheritance = AdoptedLeases::new();
    memories.iter().for_each(|piece| inheritance.remember(piece));
    for (there, moving) in leases {
        if let Adopted::Here(here, _) = table.adopt(moving, CONSUMER, at, "x", now) {
            inheritance.adopt(*there, here);
        }
    }
    inheritance
}

/// An answer of a table, without the payload.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Publish,
    Duplicate,
    NakUnconfirmed { ack_wait: Duration },
}

fn answer(
    table: &mut Table,
    id: LeaseId,
    kind: SettleKind,
    now: Instant,
) -> Result<Answer, LeaseError> {
    table.begin(id, kind, now).map(|begun| match begun {
        BeginResult::Publish(_) => Answer::Publish,
        BeginResult::Duplicate => Answer::Duplicate,
        BeginResult::NakUnconfirmed { ack_wait } => Answer::NakUnconfirmed { ack_wait },
    })
}

/// The answer to the token of an old lease.
fn answer_by(
    inheritance: &AdoptedLeases,
    table: &mut Table,
    old: LeaseId,
    kind: SettleKind,
    now: Instant,
) -> Result<Answer, LeaseError> {
    match inheritance.find(old) {
        Found::Here(here) => answer(table, here, kind, now),
        Found::Ended(LeaseError::Settled { by }) if by == kind => Ok(Answer::Duplicate),
        Found::Ended(error) => Err(error),
    }
}

proptest! {
    /// `transit`: how long all of it is on its way; it counts from when it was sent.
    #[test]
    fn lease_that_has_moved_never_ends_later(
        steps in vec(step(), 1..40),
        transit in 0..1500_u64,
        later in 0..30_000_u64,
    ) {
        let mut old = Old::after(&steps);
        let (sent, arrived) = (old.timed.at(old.now), old.timed.at(old.now + transit));
        let moving = leaving(&old.timed.table, sent);
        let mut here: Table = LeaseTable::new(old.timed.origin, LONGEST, 64);
        let inheritance = taken(&mut here, &moving, sent, arrived);
        let asked = old.timed.at(old.now + transit + later);
        for (there, moved) in &moving.0 {
            let Found::Here(id) = inheritance.find(*there) else { panic!("{there:?} is not here") };
            prop_assert!(here.ack_by(id) <= old.timed.table.ack_by(*there), "{moved:?}");
            let kind = moved.uncertain.unwrap_or(SettleKind::Ack);
            let told = answer(&mut here, id, kind, asked);
            if told.is_ok() {
                let there = answer(&mut old.timed.table, *there, kind, asked);
                prop_assert_eq!(there, told, "it ended there: {:?}", moved);
            }
        }
        // Nor when a server takes over.
        for table in [&mut here, &mut old.timed.table] {
            prop_assert_eq!(table.distrust(CONSUMER, arrived, None, 100), None);
        }
        for (there, moved) in &moving.0 {
            let Found::Here(id) = inheritance.find(*there) else { panic!("{there:?} is not here") };
            prop_assert!(here.ack_by(id) <= old.timed.table.ack_by(*there), "in doubt: {moved:?}");
        }
    }

    /// Through any number of hands.
    #[test]
    fn old_lease_id_is_answered_like_by_the_old_table(
        steps in vec(step(), 1..40),
        moves in 1..4_usize,
        kind in prop_oneof![Just(SettleKind::Ack), Just(SettleKind::Nak), Just(SettleKind::Term)],
    ) {
        let mut old = Old::after(&steps);
        let now = old.timed.at(old.now);
        // A lease that is over and not swept gets the short answer: nothing is known of it.
        old.step(&Step::Sweep);
        let mut sent = leaving(&old.timed.table, now);
        let mut hands = None;
        for _ in 0..moves {
            let mut here: Table = LeaseTable::new(old.timed.origin, LONGEST, 64);
            let mut inheritance = taken(&mut here, &sent, now, now);
            inheritance.record_ends(&here);
            // On to the next, by the old numbers.
            let numbers: BTreeMap<_, _> = inheritance.adopted().map(|(old, id)| (id, old)).collect();
            let (leases, _) = leaving(&here, now);
            let leases = leases.into_iter().map(|(id, moving)| (numbers[&id], moving)).collect();
            sent = (leases, inheritance.outcomes().cloned().collect());
            hands = Some((here, inheritance));
        }
        let (mut here, inheritance) = hands.unwrap();
        for id in old.granted.clone() {
            // Settlements under way wait for their outcome. A hand-over begins when there are none.
            if old.is_being_settled(id) {
                continue;
            }
            let told = answer_by(&inheritance, &mut here, id, kind, now);
            let wanted = answer(&mut old.timed.table, id, kind, now);
            prop_assert_eq!(told, wanted, "{:?}", id);
        }
    }
}

#[test]
fn settlement_by_a_receiver_is_known_to_the_next() {
    let (mut there, now) = (TimedTable::new(), 1000);
    let id = there.assigned(60_000);
    let at = there.at(now);
    let mut here: Table = LeaseTable::new(there.origin, LONGEST, 64);
    let mut inheritance = taken(&mut here, &leaving(&there.table, at), at, at);
    let Found::Here(its) = inheritance.find(id) else { panic!() };
    assert_eq!(answer(&mut here, its, SettleKind::Nak, at), Ok(Answer::Publish));
    here.finish(its, PublishOutcome::Confirmed, at);
    inheritance.record_ends(&here);
    assert_eq!(inheritance.adopted().count(), 0);
    assert_eq!(inheritance.find(id), Found::Ended(LeaseError::Settled { by: SettleKind::Nak }));
}

/// The settlement may have been applied or not: only the old table would have learned it.
#[test]
fn overtaken_settlement_is_not_settled_for_a_receiver() {
    for kind in [SettleKind::Ack, SettleKind::Nak, SettleKind::Term] {
        let mut there = TimedTable::new();
        let id = there.assigned(60_000);
        there.begin(id, kind, 1).unwrap();
        let redelivered = Terms { consumer_sequence: 2, ..there.terms(1, 2) };
        there.table.grant(redelivered, "two");
        let at = there.at(3);
        let mut here: Table = LeaseTable::new(there.origin, LONGEST, 64);
        let inheritance = taken(&mut here, &leaving(&there.table, at), at, at);
        assert_eq!(inheritance.find(id), Found::Ended(OVER), "{kind:?}");
    }
}

#[test]
fn receiver_never_sends_an_unconfirmed_nak_again() {
    let mut there = TimedTable::new();
    let id = there.assigned(60_000);
    there.settle(id, SettleKind::Nak, PublishOutcome::Unconfirmed, 1);
    let at = there.at(1000);
    let mut here: Table = LeaseTable::new(there.origin, LONGEST, 64);
    let inheritance = taken(&mut here, &leaving(&there.table, at), at, at);
    let Found::Here(its) = inheritance.find(id) else { panic!() };
    let ack_wait = Duration::from_millis(ACK_WAIT);
    let again = answer(&mut here, its, SettleKind::Nak, at);
    assert_eq!(again, Ok(Answer::NakUnconfirmed { ack_wait }));
}

#[test]
fn receiver_extends_by_the_granted_length() {
    for granted in [Some(4000), None] {
        let mut there = TimedTable::new();
        let id = there.granted();
        there.table.assign(id, granted.map(Duration::from_millis), there.at(100)).unwrap();
        there.extend(id, 60_000, 200).unwrap();
        let at = there.at(1000);
        let mut here: Table = LeaseTable::new(there.origin, LONGEST, 64);
        let inheritance = taken(&mut here, &leaving(&there.table, at), at, at);
        let Found::Here(its) = inheritance.find(id) else { panic!() };
        let end = there.at(1000 + granted.unwrap_or(ACK_BY));
        assert_eq!(here.extend(its, None, at), Ok(end), "{granted:?}");
    }
}

#[test]
fn lowered_deadline_moves_with_its_remaining_time() {
    let mut there = TimedTable::new();
    there.table = LeaseTable::new(there.origin, Duration::from_secs(3), 64);
    let id = there.granted();
    there.table.assign(id, None, there.at(100)).unwrap();
    let moving = leaving(&there.table, there.at(1000)).0.pop().unwrap().1;
    assert_eq!(moving.until, SnapshotExpiry::At(Duration::from_millis(2100)));
}

/// The receiver knows a leader of whom the sender has not heard. The sender has last seen its own leader at `seen`.
#[test]
fn lease_distrusted_in_transit_ends_as_if_distrusted_before() {
    for (progressed, seen) in
        [None, Some(4000), Some(4900)].into_iter().flat_map(|one| [(one, 5000), (one, 4100)])
    {
        let mut there = TimedTable::new();
        let id = there.granted();
        if let Some(confirmed) = progressed {
            there.progressed(id, confirmed - 50, confirmed);
        }
        let (seen, at) = (there.at(seen), there.at(5000));
        let leases = leaving_of_a_leader_seen(&there.table, seen, at).0;
        let on_its_way = leases[0].1.clone().distrusted();
        // Or the receiver hears of that leader after the hand-over.
        let mut here: Table = LeaseTable::new(there.origin, LONGEST, 64);
        taken(&mut here, &(leases, Vec::new()), at, at);
        here.distrust(CONSUMER, seen, None, 9);
        there.table.distrust(CONSUMER, seen, None, 9);
        let before = leaving(&there.table, at).0.pop().unwrap().1;
        assert_eq!(on_its_way.ack_by, before.ack_by, "{progressed:?}");
        let after = leaving(&here, at).0.pop().unwrap().1;
        assert_eq!(after.ack_by, before.ack_by, "{progressed:?}");
    }
}

/// Progress that was stored before the hand-over counts at a server that takes over after it.
#[test]
fn progress_that_was_stored_before_a_hand_over_outlives_a_later_change_of_leader() {
    let mut there = TimedTable::new();
    let id = there.granted();
    there.progressed(id, 4000, 4050);
    let (seen, at) = (there.at(4100), there.at(5000));
    let leases = leaving_of_a_leader_seen(&there.table, seen, at).0;
    let mut here: Table = LeaseTable::new(there.origin, LONGEST, 64);
    taken(&mut here, &(leases, Vec::new()), at, at);
    here.distrust(CONSUMER, there.at(5001), None, 9);
    there.table.distrust(CONSUMER, there.at(5001), None, 9);
    let end = |table: &Table| leaving(table, at).0.pop().unwrap().1.ack_by;
    assert_eq!(end(&here), end(&there.table));
}

#[test]
fn newer_delivery_of_a_message_stays() {
    let mut there = TimedTable::new();
    there.granted();
    let at = there.at(100);
    let moving = leaving(&there.table, at).0.pop().unwrap().1;
    assert_eq!(moving.until, SnapshotExpiry::JetStreamEnds);

    let mut here: Table = LeaseTable::new(there.origin, LONGEST, 64);
    let newer = Terms { consumer_sequence: 2, ..there.terms(1, 50) };
    let (newer, _) = here.grant(newer, "newer");
    assert_eq!(here.adopt(&moving, CONSUMER, at, "moved", at), Adopted::Not("moved"));
    assert_eq!(answer(&mut here, newer, SettleKind::Ack, at), Ok(Answer::Publish));

    let newest = LeaseSnapshot { consumer_sequence: 3, ..moving };
    let mut here: Table = LeaseTable::new(there.origin, LONGEST, 64);
    let older = here.grant(there.terms(1, 50), "older").0;
    let Adopted::Here(id, Some("older")) = here.adopt(&newest, CONSUMER, at, "moved", at) else {
        panic!("an older delivery stays")
    };
    assert_eq!(answer(&mut here, older, SettleKind::Ack, at), Err(OVER));
    assert_eq!(answer(&mut here, id, SettleKind::Ack, at), Ok(Answer::Publish));
}

#[test]
fn any_snapshot_of_another_replica_is_harmless() {
    let id = |number| LeaseId::new(number).unwrap();
    let mut inheritance = AdoptedLeases::new();
    inheritance.remember(&OutcomeSlice::new(id(u64::MAX), vec![0xff; 9]));
    inheritance.remember(&OutcomeSlice::new(id(1), Vec::new()));
    for number in [1, 2, u64::MAX] {
        assert!(matches!(inheritance.find(id(number)), Found::Ended(_)));
    }
}

#[test]
fn kept_lease_lives_for_half_a_minute_at_the_other_table() {
    for (grace, at_most, left) in
        [(0, 600, 30), (10, 600, 30), (50, 600, 50), (50, 20, 20), (0, 5, 5)]
    {
        let mut timed = TimedTable::new();
        let (id, seconds) = (timed.granted(), Duration::from_secs);
        timed.table.assign_kept(id, (seconds(at_most), seconds(grace)), timed.origin).unwrap();
        let (leases, _) = leaving(&timed.table, timed.origin);
        assert_eq!(leases[0].1.until, SnapshotExpiry::At(seconds(left)), "{grace} {at_most}");
    }
}
