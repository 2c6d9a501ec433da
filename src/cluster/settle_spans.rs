//! The spans of the settlements of one call: one for each consumer and action. They link to the spans that fetched the
//! messages, which the tokens name. So every replica can make them, also without the owner. Decides nothing.

use std::collections::{BTreeMap, BTreeSet};

use super::{ownership::LeaseLocation, wire::SettleResult};
use crate::{
    broker::{AckSubject, Broker, ConsumerName},
    lessor::Action,
    token::Claims,
    traces::{SpanBytes, TracedBatch, TracedSpan},
};

/// The way of a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SettleWay {
    /// By the lease table of this replica.
    Local,
    /// By the replica that owns the lease.
    Forwarded,
    /// Without the owner.
    Ownerless,
}

/// The spans of one call that is traced.
#[derive(Default)]
pub(super) struct SettleSpans {
    batches: BTreeMap<(ConsumerName, &'static str), SettleBatch>,
}

#[derive(Default)]
struct SettleBatch {
    /// The places of its settlements in the call.
    places: BTreeSet<usize>,
    /// The spans that fetched the messages.
    fetched: BTreeSet<SpanBytes>,
    ways: BTreeSet<SettleWay>,
    span: Option<TracedSpan>,
}

impl SettleWay {
    pub(super) fn to(location: &LeaseLocation) -> Self {
        match location {
            LeaseLocation::Local(_) | LeaseLocation::Ended(_) => Self::Local,
            LeaseLocation::Remote(_) => Self::Forwarded,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Forwarded => "forwarded",
            Self::Ownerless => "ownerless",
        }
    }
}

impl SettleSpans {
    /// Adds a token that may be settled. An Extend settles nothing, so it has no span.
    pub(super) fn add<B: Broker>(
        &mut self,
        index: usize,
        claims: &Claims<'_>,
        action: &Action,
        way: SettleWay,
    ) {
        let action = match action {
            Action::Ack => "ack",
            Action::Nak(_) => "nak",
            Action::Term(_) => "term",
            Action::Extend(_) => return,
        };
        let ack = AckSubject((*claims.ack_subject).into());
        let Some((consumer, _)) = B::delivery_of(&ack) else { return };
        let batch = self.batches.entry((consumer, action)).or_default();
        batch.places.insert(index);
        batch.fetched.extend(claims.span);
        batch.ways.insert(way);
    }

    /// Begins the spans, below the span of the call.
    pub(super) fn start(&mut self, call: &TracedSpan) {
        for ((ConsumerName { stream, consumer }, action), settled) in &mut self.batches {
            let batch = TracedBatch { stream, consumer, messages: settled.places.len() };
            settled.span = call.settle(batch, action, &settled.fetched);
        }
    }

    /// These settlements went another way than was thought.
    pub(super) fn went(&mut self, places: &[usize], way: SettleWay) {
        for batch in self.batches.values_mut() {
            if way == SettleWay::Ownerless && places.iter().any(|at| batch.places.contains(at)) {
                batch.ways.remove(&SettleWay::Forwarded);
                batch.ways.insert(way);
            }
        }
    }

    /// Ends the spans.
    pub(super) fn end(self, results: &[SettleResult]) {
        for SettleBatch { places, ways, span, .. } in self.batches.into_values() {
            let Some(span) = span else { continue };
            let way = ways.first().filter(|_| ways.len() == 1);
            span.went(way.map_or("mixed", |way| way.name()));
            let refused = places.iter().find_map(|at| results.get(*at)?.as_ref().err());
            refused.iter().for_each(|refused| span.failed(refused.reason().name()));
            span.end();
        }
    }
}
