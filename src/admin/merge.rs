//! Merges the consumers that each replica knows into one list. Pure.
//!
//! Each replica tells its consumers in the order of their names, and may tell only the first of them. So the list is
//! complete up to the earliest name at which a replica has stopped, and ends there.

use std::{cmp::Reverse, collections::BTreeMap};

use crate::pb;

/// The consumers that one replica told.
#[derive(Debug, Clone, Default)]
pub(super) struct ToldConsumers {
    /// By stream and consumer. Each has one share.
    pub(super) consumers: Vec<pb::Consumer>,
    /// The replica knows more consumers after these.
    pub(super) more: bool,
}

/// At most `limit` consumers of all replicas, by stream and consumer, and whether there may be more.
pub(super) fn merged(told: Vec<ToldConsumers>, limit: usize) -> (Vec<pb::Consumer>, bool) {
    let key = |consumer: &pb::Consumer| (consumer.stream.clone(), consumer.consumer.clone());
    let ends = told.iter().filter(|told| told.more);
    // A replica that has told nothing has stopped before the first name.
    let end = ends.map(|told| told.consumers.last().map(key)).min();
    let mut all: BTreeMap<(String, String), pb::Consumer> = BTreeMap::new();
    for consumer in told.into_iter().flat_map(|told| told.consumers) {
        let key = key(&consumer);
        let sum = match all.remove(&key) {
            None => consumer,
            Some(known) => joined(known, consumer),
        };
        all.insert(key, sum);
    }
    let complete = |key: &(String, String)| match &end {
        None => true,
        Some(end) => end.as_ref().is_some_and(|end| key <= end),
    };
    let mut rest = all.into_iter().filter(|(key, _)| complete(key)).map(|(_, consumer)| consumer);
    let rows: Vec<_> = rest.by_ref().take(limit).map(with_total).collect();
    let more = rest.next().is_some() || end.is_some();
    (rows, more)
}

/// One consumer, from what two replicas know. JetStream's part is the newer one.
fn joined(one: pb::Consumer, other: pb::Consumer) -> pb::Consumer {
    let newness = |consumer: &pb::Consumer| {
        let age = consumer.info_age;
        age.map(|age| Reverse((age.seconds, age.nanos)))
    };
    let shares = [&*one.shares, &other.shares].concat();
    let suspended = if one.suspended.is_empty() { &other.suspended } else { &one.suspended };
    let suspended = suspended.clone();
    let newer = if newness(&other) > newness(&one) { other } else { one };
    pb::Consumer { shares, suspended, ..newer }
}

fn with_total(consumer: pb::Consumer) -> pb::Consumer {
    let mut total = pb::ConsumerShare::default();
    for share in &consumer.shares {
        total.leases += share.leases;
        total.waiters += share.waiters;
        total.wanted += share.wanted;
        total.pulled += share.pulled;
        total.parked += share.parked;
        let ages = [total.oldest_lease, share.oldest_lease];
        total.oldest_lease = ages.into_iter().flatten().max_by_key(|age| (age.seconds, age.nanos));
    }
    pb::Consumer { total: Some(total), ..consumer }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn consumer(name: u8, leases: u64, age: i64) -> pb::Consumer {
        pb::Consumer {
            stream: "S".to_owned(),
            consumer: format!("{name:03}"),
            pending: u64::try_from(age).unwrap(),
            info_age: Some(prost_types::Duration { seconds: age, nanos: 0 }),
            shares: vec![pb::ConsumerShare { leases, ..pb::ConsumerShare::default() }],
            ..pb::Consumer::default()
        }
    }

    proptest! {
        /// Each replica tells at most `stop` consumers at a time.
        #[test]
        fn walk_through_all_pages_tells_each_consumer_once_with_all_shares(
            replicas in prop::collection::vec(prop::collection::btree_map(0_u8..30, (1_u64..9, 1_i64..9), 0..12), 1..4),
            stop in 1_usize..6,
            limit in 1_usize..6,
        ) {
            let (mut walked, mut after) = (Vec::new(), None::<String>);
            for _ in 0..100 {
                let tell = |known: &BTreeMap<u8, (u64, i64)>| {
                    let rest = known.iter().map(|(name, (leases, age))| consumer(*name, *leases, *age));
                    let rest = rest.filter(|one| after.as_ref().is_none_or(|after| one.consumer > *after));
                    let mut consumers: Vec<_> = rest.collect();
                    let more = consumers.len() > stop;
                    consumers.truncate(stop);
                    ToldConsumers { consumers, more }
                };
                let (rows, more) = merged(replicas.iter().map(tell).collect(), limit);
                prop_assert!(rows.len() <= limit);
                after = rows.last().map(|row| row.consumer.clone()).or(after);
                walked.extend(rows);
                if !more {
                    break;
                }
            }
            let names: BTreeSet<u8> = replicas.iter().flat_map(|known| known.keys().copied()).collect();
            prop_assert_eq!(walked.len(), names.len());
            for (name, row) in names.into_iter().zip(walked) {
                let known: Vec<_> = replicas.iter().filter_map(|known| known.get(&name)).collect();
                prop_assert_eq!(row.consumer, format!("{name:03}"));
                prop_assert_eq!(row.total.unwrap().leases, known.iter().map(|one| one.0).sum::<u64>());
                let newest = known.iter().map(|one| one.1).min().unwrap();
                prop_assert_eq!(row.pending, u64::try_from(newest).unwrap());
            }
        }
    }
}
