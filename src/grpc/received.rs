//! What the spans of a Fetch and the request log say of its answer. Decides nothing.

use std::time::Duration;

use super::encode::empty_reason;
use crate::{
    api_error::ApiError,
    lessor::{Fetched, LeasedDelivery},
    pb,
    request_log::CallWork,
    traces::{TracedBatch, TracedMessage, TracedSpan},
};

/// Most characters of a name in the log. A valid name of a stream is not longer.
const MAX_SHOWN_NAME: usize = 255;
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
        empty_by(call, empty_reason(empty));
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

/// The call has no messages, by this reason.
pub(super) fn empty_by(call: &TracedSpan, reason: pb::EmptyReason) {
    call.is_empty_by(reason.as_str_name().trim_start_matches(EMPTY_REASON_PREFIX));
}

/// The call has settled, and has not fetched.
pub(super) fn failed_by(call: &TracedSpan, error: &ApiError) {
    empty_by(call, pb::EmptyReason::FetchFailed);
    call.refused_by(error.reason().name());
}

fn traced(leased: &LeasedDelivery) -> TracedMessage<'_> {
    let delivery = leased.delivery();
    TracedMessage {
        headers: &delivery.headers,
        stream_sequence: delivery.stream_sequence,
        delivery_count: delivery.delivery_count,
    }
}

/// The work of a Fetch, for the request log.
pub(super) fn fetch_work(request: &pb::FetchRequest) -> CallWork {
    let worker = Some(&request.worker).filter(|worker| !worker.is_empty());
    CallWork {
        worker: worker.map(|worker| shown(worker)),
        asked: Some(request.n),
        ..consumer_work(&request.stream, &request.consumer)
    }
}

/// The same, of a Fetch that has these results of its settlements.
pub(super) fn answered_work(request: &pb::FetchRequest, settled: &pb::FetchResponse) -> CallWork {
    let tokens = Some(settled.results.len()).filter(|tokens| *tokens > 0);
    CallWork { tokens, failed: tokens.map(|_| settled.failed), ..fetch_work(request) }
}

/// A consumer, for the request log.
pub(super) fn consumer_work(stream: &str, consumer: &str) -> CallWork {
    CallWork { stream: Some(shown(stream)), consumer: Some(shown(consumer)), ..CallWork::default() }
}

/// A name of a request. A name that is refused for its length is also too long for the log.
fn shown(name: &str) -> String {
    name.chars().take(MAX_SHOWN_NAME).collect()
}
