//! Whether this replica serves beside the others, and who of them has gone: what the roster knows, told
//! to readiness and to the log. The decision itself is `standing`'s.

use std::{sync::MutexGuard, time::Instant};

use super::{
    Peers,
    compatibility::{ServiceHistory, Standing, Strangers, Us, decide},
    members::{PeerStatus, Tenure},
};
use crate::{broker::Broker, bus::Bus, clock, lock::lock};

impl<B: Broker + Bus> Peers<B> {
    /// Why this replica should not serve beside those that are there; the reason is for people.
    pub fn misfit(&self) -> Option<String> {
        let (now, ours) = (clock::now(), self.key_ids());
        let tenure = self.service().tenure(&ours);
        let us = Us { keys: &ours, shared: self.keys.shared(), tenure };
        let members = self.members();
        let strangers = members.strangers(&ours, now);
        let kin = members.kin(&ours, now).map(|(_, said)| said);
        let Strangers { one, name, count } = match decide(us, kin, &strangers) {
            Standing::Fine => return None,
            Standing::Yields(strangers) => strangers,
            Standing::Beside(Strangers { one, name, count }) => {
                if self.strangers.allow(now) {
                    tracing::warn!(
                        replica = %one,
                        name,
                        count,
                        "a replica shares no token key with this replica: neither knows the \
                         tokens of the other"
                    );
                }
                return None;
            }
        };
        let cure = "give all the same file, or this one a --cluster of its own";
        Some(if us.shared {
            let more = if count > 1 { format!(" and {} more", count - 1) } else { String::new() };
            format!(
                "this replica shares no token key with replica {one} ({name}){more}, and yields; see \
                 --token-key-file: {cure}"
            )
        } else {
            format!(
                "replica {one} ({name}) is there, and this one has no --token-key-file to share with \
                 it: {cure}"
            )
        })
    }

    /// This replica serves, or does not; to be told at least once a second. Others are told.
    pub fn serves(&self, serving: bool) {
        let (now, keys) = (clock::now(), self.key_ids());
        let established = |said: &PeerStatus| said.tenure == Tenure::Established;
        let vouched = self.members().kin(&keys, now).any(|(_, said)| established(said));
        let mut service = self.service();
        let before = service.tenure(&keys);
        service.observe(serving, vouched, &keys, now);
        if service.tenure(&keys) != before {
            self.speak.notify_one();
        }
    }

    /// Tells of replicas that have fallen silent.
    pub(super) fn tell_of_the_lost(&self, now: Instant) {
        for (replica, PeerStatus { name, version, draining, .. }) in self.members().lost(now) {
            if draining {
                tracing::info!(%replica, name, version, "a replica has left");
            } else {
                tracing::warn!(%replica, name, version, "a replica is no longer heard");
            }
        }
    }

    pub(super) fn service(&self) -> MutexGuard<'_, ServiceHistory> {
        lock(&self.service)
    }
}
