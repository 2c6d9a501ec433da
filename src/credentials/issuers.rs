//! The issuers whose keys are at a URL: which of them is asked when, and how a fetch ended. Tells a fault once.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::{fetch::FetchFault, refresh::Refresh};
use crate::{
    access::Issuer,
    lock::lock,
    secrets::{FileNews, ToldFault},
};

/// The issuers of the policy in use.
#[derive(Debug, Default)]
pub(super) struct Issuers {
    by_name: Mutex<BTreeMap<Arc<str>, FollowedIssuer>>,
    /// There is something to do.
    changed: Notify,
}

#[derive(Debug)]
struct FollowedIssuer {
    issuer: Issuer,
    refresh: Refresh,
    told: ToldFault,
}

/// The work at one moment.
#[derive(Debug, Default)]
pub(super) struct IssuerWork {
    /// The keys of these are to be fetched.
    pub(super) fetches: Vec<Issuer>,
    /// The keys of these are too old.
    pub(super) outlived: Vec<Issuer>,
    /// The time of the next work.
    pub(super) next: Option<Instant>,
}

impl Issuers {
    /// Follows these issuers from now on. Issuers whose keys are the same stay as they were.
    pub(super) fn follow<'i>(&self, issuers: impl Iterator<Item = &'i Issuer>, now: Instant) {
        let mut by_name = lock(&self.by_name);
        let mut before = std::mem::take(&mut *by_name);
        for issuer in issuers {
            let known = before.remove(&issuer.name);
            let known = known.filter(|known| known.issuer.has_keys_of(issuer));
            let new = || (Refresh::new(now), ToldFault::default());
            let (refresh, told) = known.map_or_else(new, |known| (known.refresh, known.told));
            let followed = FollowedIssuer { issuer: issuer.clone(), refresh, told };
            by_name.insert(issuer.name.clone(), followed);
        }
        drop(by_name);
        self.changed.notify_one();
    }

    /// A token names a key that the issuer does not have. Whether that can change soon; see [`Refresh::ask`].
    pub(super) fn ask(&self, name: &str, now: Instant) -> bool {
        let may = lock(&self.by_name).get_mut(name).is_some_and(|it| it.refresh.ask(now));
        if may {
            self.changed.notify_one();
        }
        may
    }

    /// The ages of the keys that are here.
    pub(super) fn ages(&self, now: Instant) -> Vec<(Arc<str>, Duration)> {
        let by_name = lock(&self.by_name);
        let ages = by_name.iter();
        ages.filter_map(|(name, it)| Some((name.clone(), it.refresh.age(now)?))).collect()
    }

    /// Waits until there is other work than before.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The work at this moment. Each fetch in it counts as running.
    pub(super) fn work(&self, now: Instant) -> IssuerWork {
        let mut work = IssuerWork::default();
        for FollowedIssuer { issuer, refresh, .. } in lock(&self.by_name).values_mut() {
            if refresh.outlives(now) {
                work.outlived.push(issuer.clone());
            }
            if refresh.begins(now) {
                work.fetches.push(issuer.clone());
            }
            work.next = work.next.into_iter().chain(refresh.next()).min();
        }
        work
    }

    /// A fetch has ended. Whether the policy still has its issuer.
    pub(super) fn ended(
        &self,
        issuer: &Issuer,
        ended: Result<(), &FetchFault>,
        now: Instant,
    ) -> bool {
        let mut by_name = lock(&self.by_name);
        let followed = by_name.get_mut(&issuer.name);
        let Some(followed) = followed.filter(|it| it.issuer.has_keys_of(issuer)) else {
            return false;
        };
        let mut byte = [128; 1];
        // Without randomness all replicas ask at the same time.
        let _ = getrandom::fill(&mut byte);
        followed.refresh.ended(ended.is_ok(), now, f64::from(byte[0]) / 255.0);
        let issuer = &*issuer.name;
        match followed.told.after(ended) {
            Some(FileNews::Unusable(error)) => tracing::warn!(
                issuer,
                error,
                "the keys of an issuer cannot be fetched: keys that are here stay for a day"
            ),
            Some(FileNews::Usable) => {
                tracing::info!(issuer, "the keys of an issuer can be fetched again");
            }
            None => {}
        }
        true
    }
}
