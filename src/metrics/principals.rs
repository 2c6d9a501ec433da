//! The series of principals. Their names come from the policy, and only so many have series of their own.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use super::{sheet::Sheet, store::SeriesStore, table::FamilyId};

/// Principals with series of their own.
const MAX_PRINCIPALS: usize = 200;
/// The name of all other principals.
const OTHERS: &str = "_other";
/// The name of callers without a principal.
const NOBODY: &str = "_none";

/// Counts what principals are refused. A copy is the same meter.
#[derive(Debug, Clone)]
pub struct PrincipalMeter(Arc<PrincipalCounts>);

#[derive(Debug)]
struct PrincipalCounts {
    store: Arc<SeriesStore>,
    known: Mutex<BTreeSet<Box<str>>>,
}

impl PrincipalMeter {
    pub(super) fn new(store: &Arc<SeriesStore>) -> Self {
        Self(Arc::new(PrincipalCounts { store: store.clone(), known: Mutex::default() }))
    }

    /// A caller does not have a right.
    pub fn denied(&self, principal: Option<&str>, verb: &'static str) {
        self.count(FamilyId::Denials, principal, verb);
    }

    /// A principal is at a limit.
    pub fn limited(&self, principal: &str, limit: &'static str) {
        self.count(FamilyId::PrincipalLimited, Some(principal), limit);
    }

    /// A credential was not accepted.
    pub fn not_accepted(&self, why: &'static str) {
        self.0.store.count(FamilyId::AuthenticationFailures, vec![why.into()]).add(1);
    }

    /// Shows a value of a principal.
    pub fn show(&self, sheet: &mut Sheet, id: FamilyId, principal: &str, value: f64) {
        sheet.add_of(id, [&self.shown(Some(principal))], value);
    }

    fn count(&self, id: FamilyId, principal: Option<&str>, what: &'static str) {
        let labels = vec![Cow::Owned(self.shown(principal)), what.into()];
        self.0.store.count(id, labels).add(1);
    }

    fn shown(&self, principal: Option<&str>) -> String {
        let Some(principal) = principal else { return NOBODY.to_owned() };
        let mut known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.contains(principal) {
            if known.len() >= MAX_PRINCIPALS {
                return OTHERS.to_owned();
            }
            known.insert(principal.into());
        }
        principal.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock,
        metrics::{Format, Metrics},
    };

    #[test]
    fn principals_beyond_the_limit_share_their_series() {
        let metrics = Metrics::default();
        for number in 0..1000 {
            metrics.principals().denied(Some(&number.to_string()), "fetch");
        }
        metrics.principals().denied(None, "ack");
        let page = metrics.page(Format::Text, clock::now());
        let denials = page.lines().filter(|line| line.starts_with("fetchproxy_denials_total"));
        assert_eq!(denials.count(), MAX_PRINCIPALS + 2);
        assert!(
            page.contains("fetchproxy_denials_total{principal=\"_other\",verb=\"fetch\"} 800\n")
        );
        assert!(page.contains("fetchproxy_denials_total{principal=\"_none\",verb=\"ack\"} 1\n"));
    }
}
