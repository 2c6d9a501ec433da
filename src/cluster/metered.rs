//! The words of the metrics for the results of tokens. Decides nothing.

use std::{sync::Arc, time::Instant};

use super::{
    channel::Unanswered,
    replica::Replica,
    wire::{OpenedToken, SettleResult},
};
use crate::{
    broker::{AckSubject, Broker, ConsumerName},
    bus::Bus,
    clock,
    lessor::{Error, Lessor, Settled},
    metrics::{
        FamilyId, ForwardFailure, RouteMeter, SettlementKind, SettlementResult, SettlementRoute,
    },
    pb::Outcome,
    reason::Reason,
};

/// The reasons with which a table refuses, or a principal is kept from a lease.
const REFUSALS: [(Reason, SettlementResult); 4] = [
    (Reason::LeaseExpired, SettlementResult::Expired),
    (Reason::LeaseSettled, SettlementResult::Settled),
    (Reason::LeaseBusy, SettlementResult::Busy),
    (Reason::NotAllowed, SettlementResult::NotAllowed),
];

/// The parts of a token that are counted.
pub(super) struct MeteredToken {
    /// `None`: this version does not understand the ack subject.
    consumer: Option<ConsumerName>,
    kind: SettlementKind,
}

impl MeteredToken {
    pub(super) fn of<B: Broker>(token: &OpenedToken) -> Self {
        let ack = AckSubject((*token.claims.ack_subject).into());
        let consumer = B::delivery_of(&ack).map(|(consumer, _)| consumer);
        Self { consumer, kind: token.action.kind() }
    }

    /// A token was settled without a lease. Refusals are counted at the end of their call.
    pub(super) fn count<B: Broker>(&self, lessor: &Lessor<B>, result: &Result<Settled, Error>) {
        lessor.count_unleased(self.consumer.as_ref(), self.kind, result);
    }

    /// A token was refused.
    pub(super) fn count_as<B: Broker>(&self, lessor: &Lessor<B>, refusal: SettlementResult) {
        lessor.meter_of(self.consumer.as_ref()).settled(self.kind, refusal);
    }
}

/// A request to another replica has ended.
pub(super) fn forwarded(
    routes: &RouteMeter,
    answer: &Result<Vec<u8>, Unanswered>,
    tokens: usize,
    asked_at: Instant,
) {
    match answer {
        Ok(_) => {
            routes.routed(SettlementRoute::Forwarded, tokens);
            routes.answered(clock::now().saturating_duration_since(asked_at));
        }
        Err(Unanswered::Nobody) => routes.failed(ForwardFailure::Nobody),
        Err(Unanswered::Silent) => routes.failed(ForwardFailure::Silent),
        Err(Unanswered::Unsent) => routes.failed(ForwardFailure::Unsent),
    }
}

/// Shows the other replicas at each scrape, for as long as this one lives.
pub(super) fn show<B: Broker + Bus>(replica: &Arc<Replica<B>>) {
    let shown = Arc::downgrade(replica);
    replica.lessor.metrics().ask(move |sheet| {
        let Some(replica) = shown.upgrade() else { return };
        let [others, policies, keys, versions] = replica.peers.differing();
        sheet.set(FamilyId::Replicas, others as f64 + 1.0);
        for (what, count) in [("policy", policies), ("keys", keys), ("version", versions)] {
            sheet.set_of(FamilyId::ReplicasDiffering, [what], count as f64);
        }
    });
}

/// The result that a lease table refuses with. `None`: the result is none of these, or it is counted where the
/// lease is.
pub(super) fn refusal(result: &SettleResult) -> Option<SettlementResult> {
    match result {
        Ok(done) => (done.outcome == Outcome::Duplicate).then_some(SettlementResult::Duplicate),
        Err(refused) => {
            let reason = refused.reason();
            REFUSALS.iter().find(|(known, _)| *known == reason).map(|(_, refusal)| *refusal)
        }
    }
}
