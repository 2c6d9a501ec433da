//! What the handlers of calls work with: the lessor, the cluster, the keys and the rights. Decides nothing.

use std::{sync::Arc, time::Instant};

use tonic::Extensions;

use super::{
    answer_memory::AnswerBudget,
    call::Call,
    settlements::{CallResults, CallSettlements},
};
use crate::{
    access::{Credential, KnownCaller, OverLimit, Rights, Settler},
    api_error::ApiError,
    audit::AuditedCall,
    broker::Broker,
    bus::Bus,
    clock,
    cluster::Cluster,
    credentials::Gatekeeper,
    keys::Keys,
    lessor::{Error, Lessor},
    metrics::Metrics,
    refusal_log::RefusalLog,
    simulated::fill_random,
    token::{InstanceId, Nonces},
    traces::TracedSpan,
};

/// See the [module](self).
pub struct Backend<B: Broker + Bus> {
    pub(super) lessor: Lessor<B>,
    pub(super) cluster: Arc<Cluster<B>>,
    pub(super) keys: Arc<Keys>,
    pub(super) gatekeeper: Arc<Gatekeeper>,
    pub(super) refusals: Arc<RefusalLog>,
    /// Names this process in the tokens that it seals.
    pub(super) owner: InstanceId,
}

impl<B: Broker + Bus> Clone for Backend<B> {
    fn clone(&self) -> Self {
        Self {
            lessor: self.lessor.clone(),
            cluster: self.cluster.clone(),
            keys: self.keys.clone(),
            gatekeeper: self.gatekeeper.clone(),
            refusals: self.refusals.clone(),
            owner: self.owner,
        }
    }
}

impl<B: Broker + Bus> Backend<B> {
    /// The metrics that it counts in.
    pub(super) fn metrics(&self) -> &Metrics {
        self.lessor.metrics()
    }

    /// The rights of callers.
    pub(super) fn gatekeeper(&self) -> &Arc<Gatekeeper> {
        &self.gatekeeper
    }

    /// The leases that this principal may still take.
    pub(super) fn leases_left(
        &self,
        rights: &Rights,
        principal: &Arc<str>,
    ) -> Result<u64, ApiError> {
        let left = rights.limits_of(principal).leases_left(|| self.lessor.held_for(principal));
        let over = |limit| OverLimit { principal: principal.clone(), limit }.into();
        left.map_err(over)
    }

    /// The caller, as the layer has left it. Without the layer, it is a caller without a credential.
    pub(super) fn caller(&self, extensions: &Extensions) -> Result<KnownCaller, ApiError> {
        let stranger = || {
            let rights = self.gatekeeper.rights();
            rights.caller(Credential::Missing, clock::unix_time())
        };
        let known = Call::of(extensions).and_then(|call| call.caller()).cloned();
        let caller = known.map_or_else(stranger, Ok);
        caller.map_err(ApiError::from)
    }

    /// Settles all, for Settle, Fetch and Consume.
    ///
    /// # Errors
    /// See [`CallSettlements::settle`].
    pub(super) async fn settle_all(
        &self,
        settlements: CallSettlements,
        call: (&AuditedCall<'_>, Option<&TracedSpan>),
        settler: &Settler,
        budget: Option<&AnswerBudget>,
        until: Instant,
    ) -> Result<CallResults, ApiError> {
        let (cluster, metrics) = (&self.cluster, self.metrics());
        settlements.settle(cluster, metrics, call, settler, budget, until).await
    }
}

/// Fresh nonces for the tokens of one answer.
pub(super) fn nonces() -> Result<Nonces, Error> {
    let mut random = [0; 24];
    fill_random(&mut random).map_err(|error| {
        Error::Unavailable(format!("no randomness to seal tokens with: {error}"))
    })?;
    Ok(Nonces::from(random))
}
