//! Whatever happens to the leases of a flow, its credit comes back: no end of a lease can forget it.

use std::time::{Duration, Instant};

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{
    clock,
    lease::{BeginResult, ConsumerEnd, ConsumerId, LeaseTable, PublishOutcome, SettleKind, Terms},
};

const CONSUMERS: usize = 2;

/// What happens to a lease, or to all.
#[derive(Debug, Clone)]
enum Happens {
    /// A message arrives for the client, which may end an older lease of it.
    Arrives {
        consumer: usize,
        sequence: u64,
        kept: bool,
    },
    Settles {
        which: usize,
        outcome: PublishOutcome,
    },
    /// A settlement begins, and its end is not seen.
    Begins {
        which: usize,
    },
    Moves {
        which: usize,
    },
    IsGivenBack {
        which: usize,
    },
    /// The task takes it back for the next caller.
    IsTakenBack {
        which: usize,
    },
    StreamEnds,
    ConsumerEnds {
        consumer: usize,
    },
    TimePasses {
        ms: u64,
    },
}

fn happens() -> impl Strategy<Value = Happens> {
    use PublishOutcome::{Confirmed, Denied, Unconfirmed, Unsent};
    let which = || 0..40_usize;
    let outcome = prop::sample::select(vec![Confirmed, Denied, Unconfirmed, Unsent]);
    prop_oneof![
        8 => (0..CONSUMERS, 0..9_u64, any::<bool>()).prop_map(|(consumer, sequence, kept)| {
            Happens::Arrives { consumer, sequence, kept }
        }),
        4 => (which(), outcome).prop_map(|(which, outcome)| Happens::Settles { which, outcome }),
        1 => which().prop_map(|which| Happens::Begins { which }),
        1 => which().prop_map(|which| Happens::Moves { which }),
        1 => which().prop_map(|which| Happens::IsGivenBack { which }),
        1 => which().prop_map(|which| Happens::IsTakenBack { which }),
        1 => Just(Happens::StreamEnds),
        1 => (0..CONSUMERS).prop_map(|consumer| Happens::ConsumerEnds { consumer }),
        3 => (0..4000_u64).prop_map(|ms| Happens::TimePasses { ms }),
    ]
}

struct World {
    account: Arc<FlowAccount>,
    table: LeaseTable<Option<Debit>>,
    /// The present consumer under each name.
    consumers: [u32; CONSUMERS],
    granted: Vec<LeaseId>,
    freed: Credit,
    ended: Vec<u64>,
    now: Instant,
}

impl World {
    fn begin(&mut self, which: usize) -> Option<LeaseId> {
        let id = *self.granted.get(which)?;
        let begun = self.table.begin(id, SettleKind::Ack, self.now);
        matches!(begun, Ok(BeginResult::Publish(_))).then_some(id)
    }

    fn happen(&mut self, happens: &Happens) {
        let now = self.now;
        let id = |which: usize| self.granted.get(which).copied();
        match *happens {
            Happens::Arrives { consumer, sequence, kept } => {
                let number = self.granted.len() as u64 + 1;
                let terms = Terms {
                    consumer: ConsumerId(self.consumers[consumer]),
                    sequence,
                    consumer_sequence: number,
                    last_attempt: false,
                    received: now,
                    sent_after: None,
                    age: Duration::ZERO,
                    ack_wait: Duration::from_secs(2),
                    delivery_count: 1,
                };
                let (id, older) = self.table.grant(terms, None);
                drop(older);
                let seconds = Duration::from_secs;
                let assigned = if kept {
                    self.table.assign_kept(id, (seconds(3), seconds(1)), now)
                } else {
                    self.table.assign(id, Some(seconds(1)), now)
                };
                assigned.unwrap();
                let debit = Debit::new(&self.account, number).lease(number, id);
                self.table.update_payload(id, |held| *held = Some(debit));
                self.granted.push(id);
            }
            Happens::Settles { which, outcome } => {
                if let Some(id) = self.begin(which) {
                    drop(self.table.finish(id, outcome, now));
                }
            }
            Happens::Begins { which } => drop(self.begin(which)),
            Happens::Moves { which } => drop(id(which).map(|id| self.table.remove_moved(id))),
            Happens::IsGivenBack { which } => {
                drop(id(which).map(|id| self.table.give_back(id, now)));
            }
            Happens::IsTakenBack { which } => {
                id(which)
                    .into_iter()
                    .for_each(|id| self.table.update_payload(id, |held| *held = None));
            }
            Happens::StreamEnds => {
                for id in self.account.leases() {
                    self.table.end_kept(id, now);
                }
            }
            Happens::ConsumerEnds { consumer } => {
                self.table.end_consumer(ConsumerId(self.consumers[consumer]), ConsumerEnd::Gone);
                self.consumers[consumer] += 2;
            }
            Happens::TimePasses { ms } => {
                self.now += Duration::from_millis(ms);
                drop(self.table.sweep(self.now, 100));
            }
        }
    }

    /// The books of the account are those of the table, at every step.
    fn check(&mut self) {
        let freed = self.account.take_freed().0;
        self.freed.messages += freed.messages;
        self.freed.bytes += freed.bytes;
        self.ended.extend(self.account.take_ended().iter().map(|ended| ended.number));
        let held =
            self.granted.iter().filter(|id| matches!(self.table.payload(**id), Some(Some(_))));
        let held = held.count() as u64;
        let count = self.granted.len() as u64;
        assert_eq!(self.account.used().messages, held);
        assert_eq!((self.account.leased() as u64, self.freed.messages), (held, count - held));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn credit_comes_back_however_leases_end(history in vec(happens(), 1..80)) {
        let now = clock::now();
        let queue = FlowQueue::new(Box::new(|_| ()));
        let mut world = World {
            account: queue.account.clone(),
            table: LeaseTable::new(now, Duration::from_secs(60), 64),
            consumers: [0, 1],
            granted: Vec::new(),
            freed: Credit::default(),
            ended: Vec::new(),
            now,
        };
        for happens in &history {
            world.happen(happens);
            world.check();
        }
        // Only settlements that have begun are left after this.
        world.happen(&Happens::TimePasses { ms: 600_000 });
        for which in 0..world.granted.len() {
            let id = world.granted[which];
            drop(world.table.finish(id, PublishOutcome::Unconfirmed, world.now));
        }
        world.happen(&Happens::TimePasses { ms: 0 });
        world.check();
        let count = world.granted.len() as u64;
        let bytes = (1..=count).sum();
        prop_assert_eq!(world.account.used(), Credit::default());
        prop_assert_eq!(world.freed, Credit { messages: count, bytes });
        world.ended.sort_unstable();
        prop_assert_eq!(world.ended, Vec::from_iter(1..=count));
    }
}
