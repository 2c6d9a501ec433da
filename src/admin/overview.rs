//! All replicas for the page for operators. Each replica is asked three questions at once, and is named if one of them
//! has no answer.

use std::{cmp::Reverse, collections::BTreeMap, time::Duration, time::Instant};

use super::{
    fleet::{Fleet, KnownReplicas},
    here::LeaseAges,
    merge::{ToldConsumers, merged},
};
use crate::{
    broker::Broker,
    bus::Bus,
    clock,
    pb::{
        self,
        peer::v1::{AdminAnswer, DescribeConsumers, DescribeLeases, admin_request::Question},
        time::duration,
    },
};

/// Consumers and leases that are shown.
const MOST_CONSUMERS: usize = 50;
const MOST_LEASES: usize = 20;
/// Consumers that are counted. A larger cluster has "at least" so many.
const MOST_COUNTED: u16 = 500;

/// The cluster at one moment. Each list is bounded.
#[derive(Debug, Clone, Default)]
pub struct Overview {
    /// The time of day at which it was complete, since the Unix epoch.
    pub as_of: Duration,
    /// The replica that was asked.
    pub instance: String,
    /// All replicas, as far as they are known.
    pub replicas: Vec<pb::Replica>,
    /// The replicas that have not answered every question: rows of theirs are missing.
    pub unreachable: Vec<pb::UnreachableReplica>,
    /// The first consumers, by stream and consumer.
    pub consumers: Vec<pb::Consumer>,
    /// Further consumers, and whether there may be even more.
    pub more_consumers: (usize, bool),
    /// The leases of the replica that was asked. `None`: they could not be counted in time.
    pub ages: Option<LeaseAges>,
    /// The oldest leases that callers have, the oldest first.
    pub leases: Vec<pb::Lease>,
}

/// Collects everything but fresh INFO of the consumers.
pub(super) async fn collect<B: Broker + Bus>(fleet: &Fleet<B>, until: Instant) -> Overview {
    let (known, leases) = (fleet.replicas(), oldest_leases());
    let (described, consumers, leases, ages) = tokio::join!(
        fleet.describe(&known),
        all_consumers(fleet, &known),
        fleet.ask_all(&known, &leases),
        fleet.here.lease_ages(until),
    );
    let (mut consumers, more, silent) = consumers;
    let further = consumers.len().saturating_sub(MOST_CONSUMERS);
    consumers.truncate(MOST_CONSUMERS);
    let mut unreachable = BTreeMap::new();
    let mut missing = |replica: pb::UnreachableReplica| {
        unreachable.entry(replica.instance.clone()).or_insert(replica);
    };
    described.unreachable.into_iter().chain(silent).for_each(&mut missing);
    let mut oldest = Vec::new();
    for answer in leases {
        match answer {
            Ok(AdminAnswer { leases, .. }) => oldest.extend(leases),
            Err(replica) => missing(replica),
        }
    }
    oldest.retain(|lease| lease.age.is_some());
    oldest.sort_by_key(|lease| Reverse(lease.age.map(|age| (age.seconds, age.nanos))));
    oldest.truncate(MOST_LEASES);
    Overview {
        as_of: clock::unix_time(),
        instance: fleet.here.facts.instance.to_string(),
        replicas: described.replicas,
        unreachable: unreachable.into_values().collect(),
        consumers,
        more_consumers: (further, more),
        ages,
        leases: oldest,
    }
}

/// Asks for the oldest leases that callers have. Numbers ascend with time, so they are the first ones.
fn oldest_leases() -> Question {
    // A lease without a caller has no age.
    let filter = pb::LeaseFilter {
        older_than: Some(duration(Duration::ZERO)),
        ..pb::LeaseFilter::default()
    };
    let limit = u32::try_from(MOST_LEASES).unwrap_or(u32::MAX);
    Question::Leases(DescribeLeases { filter: Some(filter), after: 0, limit })
}

/// The first consumers of all replicas, whether there may be more, and the replicas that have not answered.
async fn all_consumers<B: Broker + Bus>(
    fleet: &Fleet<B>,
    known: &KnownReplicas,
) -> (Vec<pb::Consumer>, bool, Vec<pb::UnreachableReplica>) {
    let question = Question::Consumers(DescribeConsumers {
        limit: MOST_COUNTED.into(),
        ..DescribeConsumers::default()
    });
    let (mut told, mut silent) = (Vec::new(), Vec::new());
    for answer in fleet.ask_all(known, &question).await {
        match answer {
            Ok(AdminAnswer { consumers, more, .. }) => told.push(ToldConsumers { consumers, more }),
            Err(replica) => silent.push(replica),
        }
    }
    let (consumers, more) = merged(told, MOST_COUNTED.into());
    (consumers, more, silent)
}
