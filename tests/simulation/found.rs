//! Faults that the simulation has found. Each test runs a plan that failed before its cure, shrunk and then
//! written down. It names the commit that cured the fault.
//!
//! The seed of a plan decides the small choices: delays, lengths of work, who retries where. So each plan runs
//! under its own seed and under some others. It then still meets its fault after those choices have changed.

use super::{
    plan::{
        Accident, ClientPlan, Clocks, ConsumerPlan, Plan, Planned, ReplicaPlan, StreamPlan, When,
    },
    run,
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
