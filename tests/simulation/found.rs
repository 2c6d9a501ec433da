//! Faults that the simulation has found. Each test runs a plan that failed before its cure, shrunk and then
//! written down. It names the commit that cured the fault.
//!
//! The seed of a plan decides the small choices: delays, lengths of work, who retries where. So each plan runs
//! under its own seed and under some others. It then still meets its fault after those choices have changed.

use super::{
    plan::{
        Accident, ClientPlan, Clocks, ConsumerPlan, Habit, Plan, Planned, ReplicaPlan, StreamPlan,
        When,
    },
    run,
    signs::Sign,
};

/// Other seeds under which a plan runs.
const OTHERS: u64 = 15;

fn holds(plan: &Plan) {
    for seed in (0..=OTHERS).map(|other| plan.seed + other) {
        let plan = Plan { seed, ..plan.clone() };
        let ran = run::run(&plan, false);
        let found = ran.watch.findings();
        assert!(found.is_empty(), "under seed {seed}: {found:#?}");
    }
}

fn replicas(count: usize) -> Vec<ReplicaPlan> {
    vec![ReplicaPlan { max_leases: 200, ahead: 0 }; count]
}

/// Clients without a habit, which ask for so many messages.
fn clients(n: &[u32]) -> Vec<ClientPlan> {
    let client = |(number, n): (u64, &u32)| ClientPlan::ordinary(number, 0, *n);
    (0..).zip(n).map(client).collect()
}

fn stream(messages: u64, crowd: u64, pause: u64) -> Vec<StreamPlan> {
    vec![StreamPlan { backlog: 0, messages, crowd, pause, size: 10, not_json: 0 }]
}

/// A consumer of one server.
fn consumer(ack_wait: u64) -> ConsumerPlan {
    ConsumerPlan {
        stream: 0,
        made: 0,
        ack_wait,
        backoff: Vec::new(),
        max_deliver: None,
        max_ack_pending: 1_000,
        max_batch: None,
        max_bytes: None,
        copies: 1,
        shows_leader: true,
        clustered: false,
        lag: 0,
    }
}

fn at(time: u64, what: Accident) -> Planned {
    Planned { when: When::At(time), what }
}

/// "A second reset within two seconds ends leases too; a task leaves what its monitor knew". Leases of the time
/// between the two resets settled messages of the time after them.
#[test]
fn second_reset_ends_the_leases_of_the_first() {
    let reset = Accident::Reset { consumer: 0 };
    let pairs = (1..8).flat_map(|pair| [at(pair * 4_000, reset), at(pair * 4_000 + 600, reset)]);
    holds(&Plan {
        seed: 13_886,
        trouble: 35_000,
        clocks: Clocks::Near,
        replicas: replicas(2),
        streams: stream(200, 6, 300),
        consumers: vec![consumer(6_000)],
        clients: clients(&[1, 1, 1, 3, 3]),
        accidents: pairs.collect(),
    });
}

/// "Leases that a reset ends during a hand-over are not handed over". The old holder's Ack settled the delivery
/// of the new holder, by the replica that had adopted the lease.
#[test]
fn reset_during_a_hand_over_ends_the_leases_that_are_handed_over() {
    holds(&Plan {
        seed: 1_273,
        trouble: 2_475,
        clocks: Clocks::Near,
        replicas: replicas(4),
        streams: stream(2, 5, 1_991),
        consumers: vec![consumer(6_294)],
        clients: clients(&[1, 1, 5]),
        accidents: vec![
            at(2_426, Accident::Drain { replica: 1, away: 18 }),
            at(2_433, Accident::Reset { consumer: 0 }),
        ],
    });
}

/// "Acks share a confirmation only if the connected server leads their consumer". The leader of an unreplicated
/// consumer was away when the first ack of a batch arrived, and back when the last one did. The first was confirmed.
#[test]
fn batch_of_acks_meets_an_absent_leader_of_an_unreplicated_consumer() {
    let mut clients = clients(&[7, 5, 1, 4, 6, 1, 3]);
    clients[0].lease = Some(8_616);
    (clients[3].habit, clients[3].lease) = (Habit::Nervous, Some(13_411));
    (clients[6].habit, clients[6].lease) = (Habit::Nervous, Some(19_091));
    (clients[3].home, clients[5].home) = (Some(0), Some(0));
    let settling = When::Near { sign: Sign::Settling, from: 5_102, millis: 0, there: true };
    holds(&Plan {
        seed: 9_792,
        trouble: 28_800,
        clocks: Clocks::Near,
        replicas: replicas(1),
        streams: stream(32, 7, 2_189),
        consumers: vec![ConsumerPlan {
            backoff: vec![1_856],
            clustered: true,
            lag: 22,
            ..consumer(35_123)
        }],
        clients,
        accidents: vec![
            Planned { when: settling, what: Accident::Kill { replica: 0, away: 808 } },
            at(11_738, Accident::Kill { replica: 0, away: 9_665 }),
            at(
                27_885,
                Accident::ChangeLeader { consumer: 0, away: 8, forgets: 11, graceful: true },
            ),
        ],
    });
}

/// "GiveBack: its repeat does what a caller has left, and a repeated Fetch answers before its deadline". The repeat said
/// that the attempt was over, and the old tokens still settled its messages.
#[test]
fn give_back_that_its_caller_leaves_is_done_by_its_repeat() {
    let mut clients = clients(&[27]);
    (clients[0].habit, clients[0].names) = (Habit::Batching, true);
    holds(&Plan {
        seed: 51,
        trouble: 16_402,
        clocks: Clocks::Near,
        replicas: replicas(1),
        streams: stream(1_000, 6, 1_007),
        consumers: vec![ConsumerPlan { backoff: vec![5_656, 1_033], ..consumer(6_658) }],
        clients,
        accidents: Vec::new(),
    });
}
