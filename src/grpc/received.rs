//! The span of a Fetch that has messages. Decides nothing.

use std::time::Duration;

use super::encode::empty_reason;
use crate::{
    lessor::{Fetched, LeasedDelivery},
    pb,
    traces::{TracedBatch, TracedMessage, TracedSpan},
};

/// The prefix that all reasons have in the contract.
const EMPTY_REASON_PREFIX: &str = "EMPTY_REASON_";

/// The span of the messages of this answer, if there are messages. Otherwise the span of the call says why there are
/// none. `since` is when the call came, after the Unix epoch.
pub(super) fn received(
    call: &TracedSpan,
    request: &pb::FetchRequest,
    since: Duration,
    fetched: &Fetched,
) -> Option<TracedSpan> {
    if let Some(empty) = fetched.empty() {
        call.is_empty_by(empty_reason(empty).as_str_name().trim_start_matches(EMPTY_REASON_PREFIX));
    }
    let rejected = fetched.rejected().iter().map(|rejected| &rejected.leased);
    let messages = fetched.messages().iter().chain(rejected);
    let (stream, consumer) = (&*request.stream, &*request.consumer);
    let batch = TracedBatch { stream, consumer, messages: messages.clone().count() };
    if batch.messages == 0 {
        return None;
    }
    let span = call.receive(batch, since, messages.map(traced))?;
    span.for_worker(&request.worker);
    Some(span)
}

fn traced(leased: &LeasedDelivery) -> TracedMessage<'_> {
    let delivery = leased.delivery();
    TracedMessage {
        headers: &delivery.headers,
        stream_sequence: delivery.stream_sequence,
        delivery_count: delivery.delivery_count,
    }
}
