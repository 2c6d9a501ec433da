//! How many leases each principal holds. A lease counts from the moment at which a caller gets it, until it
//! ends or is taken back. Decides nothing: the caller of the lessor compares the counts with limits.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::lock::lock;

/// Accounts that are kept although they hold nothing. A policy has at most 1000 principals.
const IDLE_ACCOUNTS: usize = 4096;

/// The accounts of all principals that have leases here.
#[derive(Debug, Default)]
pub(super) struct LeaseAccounts(Mutex<BTreeMap<Arc<str>, Arc<LeaseAccount>>>);

/// The leases of one principal.
#[derive(Debug)]
pub(super) struct LeaseAccount {
    principal: Arc<str>,
    held: AtomicUsize,
}

/// The principal of a lease.
#[derive(Debug)]
pub(super) struct LeaseHolder {
    account: Arc<LeaseAccount>,
    /// Whether the lease is among those of the account.
    counts: bool,
}

impl LeaseAccounts {
    /// The account of a principal.
    pub(super) fn of(&self, principal: &Arc<str>) -> Arc<LeaseAccount> {
        let mut accounts = lock(&self.0);
        if let Some(account) = accounts.get(principal) {
            return account.clone();
        }
        if accounts.len() >= IDLE_ACCOUNTS {
            accounts.retain(|_, account| Arc::strong_count(account) > 1);
        }
        let account =
            Arc::new(LeaseAccount { principal: principal.clone(), held: AtomicUsize::new(0) });
        accounts.insert(principal.clone(), account.clone());
        account
    }

    /// The number of leases of each principal that has some.
    pub(super) fn all(&self) -> Vec<(Arc<str>, usize)> {
        let accounts = lock(&self.0);
        let held =
            accounts.iter().map(|(name, it)| (name.clone(), it.held.load(Ordering::Relaxed)));
        held.filter(|(_, held)| *held > 0).collect()
    }

    /// The number of leases of a principal.
    pub(super) fn held(&self, principal: &str) -> usize {
        lock(&self.0).get(principal).map_or(0, |account| account.held.load(Ordering::Relaxed))
    }
}

impl LeaseHolder {
    /// One more lease of this account.
    pub(super) fn new(account: &Arc<LeaseAccount>) -> Self {
        account.held.fetch_add(1, Ordering::Relaxed);
        Self { account: account.clone(), counts: true }
    }

    /// The name of the principal.
    pub(super) fn principal(&self) -> &Arc<str> {
        &self.account.principal
    }

    /// The lease was taken back. It still belongs to the principal, because somebody may have its token.
    pub(super) fn take_back(&mut self) {
        if std::mem::take(&mut self.counts) {
            self.account.held.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for LeaseHolder {
    fn drop(&mut self) {
        self.take_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_counts_until_it_is_taken_back_or_dropped() {
        let (accounts, orders) = (LeaseAccounts::default(), Arc::from("orders"));
        let account = accounts.of(&orders);
        let mut leases: Vec<_> = (0..3).map(|_| LeaseHolder::new(&account)).collect();
        assert_eq!((accounts.held("orders"), accounts.held("other")), (3, 0));
        leases[0].take_back();
        assert_eq!(accounts.held("orders"), 2);
        leases.remove(0);
        assert_eq!(accounts.held("orders"), 2, "it is not counted twice");
        leases[0] = LeaseHolder::new(&account);
        assert_eq!(accounts.held("orders"), 2);
        drop(leases);
        assert_eq!(accounts.held("orders"), 0);
        assert_eq!(&**LeaseHolder::new(&account).principal(), "orders");
    }

    #[test]
    fn account_that_holds_nothing_is_forgotten_among_many() {
        let accounts = LeaseAccounts::default();
        let lease = LeaseHolder::new(&accounts.of(&"holder".into()));
        for name in 0..2 * IDLE_ACCOUNTS {
            accounts.of(&name.to_string().into());
        }
        assert!(lock(&accounts.0).len() <= IDLE_ACCOUNTS);
        assert_eq!(accounts.held("holder"), 1);
        drop(lease);
    }
}
