//! Random histories through the table and its reference side by side; every answer has to be the
//! same. Time is dense. Ack waits are a few margins long and all times are multiples of 10 ms.
//! Steps land on a clock's edge or 10 ms away, because an off-by-one at an edge lives only there.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use fetch_proxy::lease::{
    Assigned, BeginResult, ConsumerId, Due, LeaseError, LeaseId, LeaseTable, Revoked, Terms,
};
use proptest::prelude::*;
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};

use super::{
    naive::margin,
    reference::{Reference, ack_wait},
    replies::{Reply, Swept},
    steps::{Arrival, Call, Edge, Step, ack_waits, longest, step},
};

/// How many ends are remembered: few, so that histories outlive the memory.
const REMEMBERED: u64 = 8;
/// Leases looked at in one step of a walk over a consumer: few, so that walks take several.
const STRIDE: usize = 2;

/// The world as the reference sees it.
#[derive(Debug, Clone)]
pub(super) struct World {
    table: Reference,
    /// The callers' clock, in milliseconds since the table's origin.
    clock: i64,
    /// How long that clock has stood still, and when that was noticed last, by that clock, and how long
    /// it had stood still before.
    slept: i64,
    noticed: (i64, i64),
    incarnations: u32,
    /// The lease of the last call.
    called: u64,
    /// The last answer of the reference.
    reply: Reply,
}

impl World {
    fn id(&self, back: u64) -> u64 {
        (self.table.granted + 1).saturating_sub(back).max(1)
    }

    fn call_time(&self, late: bool) -> i64 {
        (self.clock - if late { 10 } else { 0 }).max(0)
    }

    fn ago(&self, ago: i64) -> i64 {
        (self.clock - ago).max(0)
    }

    /// The time at which the callers' clock showed this. A reading from before the gap may only be
    /// used before the gap was noticed.
    fn real(&self, shown: i64) -> i64 {
        let (noticed, before) = self.noticed;
        shown + if shown < noticed { before } else { self.slept }
    }

    fn call(&mut self, id: u64, call: Call) -> Reply {
        match call {
            Call::Assign(length) => self.table.assign(id, length),
            Call::AssignKept { at_most, grace } => self.table.assign_kept(id, at_most, grace),
            Call::EndKept => self.table.end_kept(id),
            Call::AssignAgain(length) => self.table.assign_again(id, length),
            Call::Reissue => self.table.reissue(id),
            Call::Extend(length) => self.table.extend(id, length),
            Call::Reclaim => self.table.reclaim(id),
            Call::Begin(kind) => self.table.begin(id, kind),
            Call::Finish(outcome) => self.table.finish(id, outcome),
            Call::GiveBack => self.table.give_back(id),
            Call::Revoke { forced } => self.table.revoke(id, forced),
            Call::Progressed { ago, confirmed } => {
                self.table.progressed(id, self.real(self.ago(ago)), confirmed)
            }
        }
    }

    /// The next time: not earlier, and not a time that never comes.
    fn reach(&self, id: u64, edge: Edge) -> Option<i64> {
        let lease = self.table.leases.iter().find(|lease| lease.id == id)?;
        match edge {
            Edge::Deadline => lease.deadline(),
            Edge::AckBy => Some(lease.ack_by()),
            Edge::Progress => Some(lease.progress_at()),
            Edge::Release => Some(lease.ack_by() - margin(lease.ack_wait)),
        }
    }
}

impl ReferenceStateMachine for World {
    type State = Self;
    type Transition = Step;

    fn init_state() -> BoxedStrategy<Self> {
        let world = |(ack_waits, longest)| Self {
            table: Reference::new(REMEMBERED, longest, ack_waits),
            clock: 0,
            slept: 0,
            noticed: (0, 0),
            incarnations: 2,
            called: 1,
            reply: Reply::Nothing,
        };
        (ack_waits(), longest()).prop_map(world).boxed()
    }

    fn transitions(_: &Self) -> BoxedStrategy<Step> {
        step().boxed()
    }

    fn apply(mut world: Self, step: &Step) -> Self {
        let clock = world.clock;
        world.reply = match step {
            Step::Grant(arrival) => {
                let received = world.real(world.ago(arrival.ago));
                world.table.grant(arrival, received)
            }
            Step::Call { back, call, late } => {
                world.table.advance(world.real(world.call_time(*late)));
                world.called = world.id(*back);
                world.call(world.called, *call)
            }
            Step::Sweep { .. } => world.table.sweep(world.real(clock)),
            Step::EndConsumer { name, how } => {
                world.table.end_consumer(*name, *how, world.incarnations);
                world.incarnations += 1;
                Reply::Nothing
            }
            Step::Retune { name, ack_waits } => world.table.retune(*name, *ack_waits),
            Step::Distrust { name, ago } => {
                world.table.distrust(*name, world.real(world.ago(*ago)))
            }
            Step::LoseAfter { name, back } => world.table.lose_after(*name, world.id(*back)),
            Step::Reach { back, edge, offset } => {
                let at = world.reach(world.id(*back), *edge).unwrap_or(clock + world.slept);
                world.clock = clock.max(at - world.slept + offset);
                Reply::Nothing
            }
            Step::Slept(gap) => {
                world.noticed = (clock, world.slept);
                world.slept += gap;
                world.table.advance(world.real(clock));
                Reply::Nothing
            }
            Step::Tick(length) => {
                world.clock += length;
                Reply::Nothing
            }
        };
        world.table.tidy();
        world
    }
}

/// The table itself. Each lease's payload is its own number.
pub(super) struct Tested {
    table: LeaseTable<u64>,
    origin: Instant,
    /// The consumers as they were before the present step.
    consumers: [u32; 2],
    /// How long the callers' clock has stood still.
    slept: i64,
}

impl Tested {
    fn at(&self, millis: i64) -> Instant {
        self.origin + Duration::from_millis(millis.unsigned_abs())
    }

    fn millis(&self, at: Instant) -> i64 {
        let since = at.duration_since(self.origin);
        assert_eq!(since.subsec_nanos() % 1_000_000, 0, "not whole milliseconds");
        i64::try_from(since.as_millis()).unwrap() + self.slept
    }

    fn grant(&mut self, arrival: &Arrival, world: &World) -> Reply {
        let number = world.table.granted;
        let terms = Terms {
            consumer: ConsumerId(self.consumers[arrival.name]),
            sequence: arrival.sequence,
            consumer_sequence: number,
            last_attempt: arrival.last_attempt,
            received: self.at(world.ago(arrival.ago)),
            sent_after: None,
            age: duration(arrival.age),
            ack_wait: duration(world.table.ack_wait(arrival.name, arrival.delivery_count)),
            delivery_count: arrival.delivery_count,
        };
        let (id, superseded) = self.table.grant(terms, number);
        let superseded = superseded.map(|(id, payload)| own(id, payload));
        Reply::Granted { id: id.get(), superseded }
    }

    fn call(&mut self, id: LeaseId, call: Call, now: Instant, sent_at: Instant) -> Reply {
        match call {
            Call::Assign(length) => {
                let assigned = self.table.assign(id, length.map(duration), now);
                self.assigned(assigned)
            }
            Call::AssignKept { at_most, grace } => {
                let lengths = (duration(at_most), duration(grace));
                let assigned = self.table.assign_kept(id, lengths, now);
                self.assigned(assigned)
            }
            Call::EndKept => {
                self.table.end_kept(id, now);
                Reply::Nothing
            }
            Call::AssignAgain(length) => {
                let assigned = self.table.assign_again(id, length.map(duration), now);
                self.assigned(assigned)
            }
            Call::Reissue => match self.table.reissue(id, now) {
                Some(new) => {
                    self.table.update_payload(new, |payload| {
                        own(id, *payload);
                        *payload = new.get();
                    });
                    Reply::Granted { id: new.get(), superseded: None }
                }
                None => Reply::Nothing,
            },
            Call::Extend(length) => match self.table.extend(id, length.map(duration), now) {
                Ok(deadline) => Reply::Extended(self.millis(deadline)),
                Err(error) => error.into(),
            },
            Call::Reclaim => {
                self.table.reclaim(id, now);
                Reply::Nothing
            }
            Call::Begin(kind) => match self.table.begin(id, kind, now) {
                Ok(BeginResult::Publish(payload)) => {
                    own(id, *payload);
                    Reply::Publish
                }
                Ok(BeginResult::Duplicate) => Reply::Duplicate,
                Ok(BeginResult::NakUnconfirmed { ack_wait }) => {
                    Reply::NakUnconfirmed { ack_wait: ack_wait.as_millis().try_into().unwrap() }
                }
                Err(error) => error.into(),
            },
            Call::Finish(outcome) => {
                let (after, payload) = self.table.finish(id, outcome, now);
                Reply::Finished {
                    after: after.into(),
                    out: payload.map(|payload| own(id, payload)).is_some(),
                }
            }
            Call::GiveBack => match self.table.give_back(id, now) {
                Some(back) => {
                    own(id, back.payload);
                    Reply::GivenBack { release: back.release.map(|by| self.millis(by)) }
                }
                None => Reply::Nothing,
            },
            Call::Revoke { forced } => match self.table.revoke(id, forced, now) {
                Revoked::Done(payload, by) => {
                    own(id, payload);
                    Reply::GivenBack { release: by.map(|by| self.millis(by)) }
                }
                Revoked::LastAttempt => Reply::LastAttempt,
                Revoked::Settling => Reply::Busy,
                Revoked::Gone => Reply::Nothing,
            },
            Call::Progressed { confirmed, .. } => {
                self.table.progressed(id, sent_at, confirmed, now);
                Reply::Nothing
            }
        }
    }

    fn assigned(&self, assigned: Result<Assigned, LeaseError>) -> Reply {
        match assigned {
            Ok(assigned) => Reply::Assigned {
                deadline: self.millis(assigned.deadline),
                settle_by: self.millis(assigned.settle_by),
            },
            Err(error) => error.into(),
        }
    }

    /// In as many calls as it takes.
    fn sweep(&mut self, limit: usize, now: Instant) -> Reply {
        let mut all = BTreeSet::new();
        let mut calls = 0;
        while calls == 0 || self.table.next_due().is_some_and(|due| due <= now) {
            calls += 1;
            assert!(calls < 100, "sweeping does not end");
            let swept = self.table.sweep(now, limit);
            assert!(swept.len() <= limit);
            for due in swept {
                let due = match due {
                    Due::Progress { id } => Swept::Progress(id.get()),
                    Due::Lapsed { id, payload, release } => {
                        let release = release.map(|by| self.millis(by));
                        Swept::Lapsed(own(id, payload), release)
                    }
                    Due::Lost { id, payload } => Swept::Lost(own(id, payload)),
                };
                assert!(all.insert(due), "{due:?} twice in one sweep");
            }
        }
        Reply::Swept(all)
    }

    /// A walk over the leases of a consumer, in as many calls as it takes.
    fn walk(
        &mut self,
        name: usize,
        mut stride: impl FnMut(&mut LeaseTable<u64>, ConsumerId, Option<u64>) -> Option<u64>,
    ) -> Reply {
        let mut after = None;
        loop {
            after = stride(&mut self.table, ConsumerId(self.consumers[name]), after);
            if after.is_none() {
                return Reply::Nothing;
            }
        }
    }
}

impl StateMachineTest for World {
    type SystemUnderTest = Tested;
    type Reference = Self;

    fn init_test(world: &Self) -> Tested {
        let origin = Instant::now();
        let remembered = usize::try_from(REMEMBERED).unwrap();
        Tested {
            table: LeaseTable::new(origin, duration(world.table.longest), remembered),
            origin,
            consumers: world.table.incarnations(),
            slept: 0,
        }
    }

    fn apply(mut tested: Tested, world: &Self, step: Step) -> Tested {
        let reply = match step {
            Step::Grant(arrival) => tested.grant(&arrival, world),
            Step::Call { call, late, .. } => {
                let now = tested.at(world.call_time(late));
                let ago = if let Call::Progressed { ago, .. } = call { ago } else { 0 };
                let sent_at = tested.at(world.ago(ago));
                tested.call(LeaseId::new(world.called).unwrap(), call, now, sent_at)
            }
            Step::Sweep { limit } => tested.sweep(limit, tested.at(world.clock)),
            Step::EndConsumer { name, how } => {
                tested.table.end_consumer(ConsumerId(tested.consumers[name]), how);
                Reply::Nothing
            }
            Step::Retune { name, ack_waits } => {
                let ack_wait = |count| duration(ack_wait(ack_waits, count));
                tested.walk(name, |table, id, after| table.retune(id, ack_wait, after, STRIDE))
            }
            Step::Distrust { name, ago } => {
                let when = tested.at(world.ago(ago));
                tested.walk(name, |table, id, after| table.distrust(id, when, after, STRIDE))
            }
            Step::LoseAfter { name, back } => {
                let delivered = world.id(back);
                tested.walk(name, |table, id, after| table.lose_after(id, delivered, after, STRIDE))
            }
            Step::Slept(gap) => {
                tested.table.slept(duration(gap), tested.at(world.clock));
                tested.slept += gap;
                Reply::Nothing
            }
            Step::Reach { .. } | Step::Tick(_) => Reply::Nothing,
        };
        assert_eq!(reply, world.reply);
        tested.consumers = world.table.incarnations();
        tested
    }

    fn check_invariants(tested: &Tested, world: &Self) {
        tested.table.check();
        let (table, reference) = (&tested.table, &world.table);
        assert_eq!(table.len(), reference.leases.len());
        assert_eq!(table.is_empty(), reference.leases.is_empty());
        let due = table.next_due().map(|due| tested.millis(due));
        // There is no time before the origin.
        let least = tested.slept;
        assert_eq!(due, reference.next_due().map(|due| due.max(least)), "next_due");
        for number in 1..=reference.granted {
            let end = table.end_of(LeaseId::new(number).unwrap());
            assert_eq!(end, reference.end_of(number), "end of {number}");
        }
        for lease in &reference.leases {
            let id = LeaseId::new(lease.id).unwrap();
            assert_eq!(table.payload(id), Some(&lease.id));
            let ack_by = table.ack_by(id).map(|ack_by| tested.millis(ack_by));
            assert_eq!(ack_by, Some(lease.ack_by().max(least)), "ack_by of {id:?}");
            let held = reference.held_by(lease.consumer);
            assert_eq!(table.held_by(ConsumerId(lease.consumer)), held);
        }
    }
}

fn duration(millis: i64) -> Duration {
    Duration::from_millis(millis.unsigned_abs())
}

/// The payload is the one that the lease was granted with.
fn own(id: LeaseId, payload: u64) -> u64 {
    assert_eq!(id.get(), payload, "somebody else's payload");
    payload
}

prop_state_machine! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        max_shrink_iters: 4000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn table_answers_every_history_like_its_reference(sequential 1..80 => World);
}
