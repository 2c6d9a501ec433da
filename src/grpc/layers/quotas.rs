//! Obeys the limits of each principal: calls under way, open Fetch calls, and calls in a second. It knows the
//! caller, and is before the limits of this replica: a principal that is over its limits takes no permit.
//!
//! A call counts until its answer is written, as it does in the limits of this replica.

use std::{
    collections::BTreeMap,
    future::{Future, ready},
    sync::{Arc, Mutex},
};

use futures_util::{TryFutureExt as _, future::Either};
use http::{Request, Response};

use super::held_body::HeldBody;
use crate::{
    access::{CallAccount, OverLimit, Rights},
    api_error::ApiError,
    clock,
    grpc::{call::Call, to_status::to_status},
    lock::lock,
    metrics::{FamilyId, Metrics},
    net::{InnerService, Middleware, Next},
    refusal_log::{RefusalLog, RefusedCaller},
};

/// Accounts that are kept although their principals are in no policy any more.
const OLD_ACCOUNTS: usize = 4096;

/// A layer that obeys the limits of principals; see the [module](self).
#[derive(Debug, Clone)]
pub(in crate::grpc) struct PrincipalQuotas(Arc<Quotas>);

#[derive(Debug)]
struct Quotas {
    refusals: Arc<RefusalLog>,
    /// By the name of the principal, so that an account outlives a change of the policy.
    accounts: Mutex<BTreeMap<Arc<str>, SharedAccount>>,
}

type SharedAccount = Arc<Mutex<CallAccount>>;

/// A call of a principal, until this is dropped.
pub(in crate::grpc) struct CountedCall {
    account: SharedAccount,
    is_fetch: bool,
}

impl PrincipalQuotas {
    pub(in crate::grpc) fn new(refusals: Arc<RefusalLog>) -> Self {
        Self(Arc::new(Quotas { refusals, accounts: Mutex::default() }))
    }

    /// Shows the calls of each principal in the metrics.
    pub(in crate::grpc) fn show(&self, metrics: &Metrics) {
        let (quotas, principals) = (self.0.clone(), metrics.principals().clone());
        metrics.ask(move |sheet| {
            for (principal, account) in &*lock(&quotas.accounts) {
                let (calls, waiters) = lock(account).open();
                principals.show(sheet, FamilyId::PrincipalCalls, principal, calls as f64);
                principals.show(sheet, FamilyId::PrincipalWaiters, principal, waiters as f64);
            }
        });
    }

    /// Counts a call of this caller. `None`: no principal is counted, because there is no policy, or because
    /// none matches.
    fn begin(&self, call: &Call) -> Result<Option<CountedCall>, ApiError> {
        let Some(rights) = call.rights().filter(|rights| rights.policy().is_some()) else {
            return Ok(None);
        };
        let Some(principal) = call.caller().and_then(|caller| caller.principal.as_ref()) else {
            return Ok(None);
        };
        let (account, is_fetch) = (self.account(principal, rights), call.kind.is_waiter());
        let begun = lock(&account).begin(is_fetch, &rights.limits_of(principal), clock::now());
        let refused = |limit| OverLimit { principal: principal.clone(), limit };
        begun.map_err(refused)?;
        Ok(Some(CountedCall { account, is_fetch }))
    }

    fn account(&self, principal: &Arc<str>, rights: &Rights) -> SharedAccount {
        let mut accounts = lock(&self.0.accounts);
        if let Some(account) = accounts.get(principal) {
            return account.clone();
        }
        if accounts.len() >= OLD_ACCOUNTS {
            accounts.retain(|name, account| {
                Arc::strong_count(account) > 1 || rights.has_principal(name)
            });
        }
        accounts.entry(principal.clone()).or_default().clone()
    }
}

impl Drop for CountedCall {
    fn drop(&mut self) {
        lock(&self.account).end(self.is_fetch);
    }
}

impl<S, R, B> Middleware<Request<R>, S> for PrincipalQuotas
where
    S: InnerService<Request<R>, Response = Response<B>>,
    R: Send + 'static,
    B: http_body::Body + Default + Send + 'static,
{
    type Response = Response<HeldBody<B, CountedCall>>;
    type Error = S::Error;

    fn handle(
        &self,
        request: Request<R>,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<Self::Response, S::Error>> + Send + 'static {
        let call = Call::of(request.extensions());
        let counted = match call.map(|call| self.begin(call)).transpose() {
            Ok(counted) => counted.flatten(),
            Err(refused) => {
                let caller = call.and_then(|call| call.caller());
                let principal = caller.and_then(|caller| caller.principal.as_deref());
                let caller = RefusedCaller { principal, ..RefusedCaller::default() };
                let kind = Call::kind_of(&request);
                self.0.refusals.refused(kind.name(), &caller, &refused);
                return Either::Left(ready(Ok(to_status(&refused).into_http())));
            }
        };
        let held = |answer: Response<B>| answer.map(|body| HeldBody::perhaps(body, counted));
        Either::Right(next.run(request).map_ok(held))
    }
}
