//! Looks after a consumer whose connection broke by a message that it brought. Searches for such messages, and
//! terminates them. Tells callers the reasons of the [`Quarantine`].

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::timeout_at;

use super::quarantine::{Quarantine, QuarantineReason, SearchResult};
use crate::{
    broker::{
        AckKind, AckPublish, Broker, BrokerError, Confirmation, ConsumerName, Denial, InfoError,
        Search, Unreadable,
    },
    clock,
    lessor::{Error, Unsuitable, core::Core, shares::Explained, underway::Underway},
};

/// The longest that one search may take.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(5);

/// See the [module](self).
pub(super) struct PoisonWatch<B: Broker> {
    core: Arc<Core<B>>,
    name: ConsumerName,
    pub(super) quarantine: Quarantine,
    /// While a search is under way, nothing is pulled.
    search: Underway<SearchResult>,
}

impl<B: Broker> PoisonWatch<B> {
    pub(super) fn new(core: Arc<Core<B>>, name: ConsumerName) -> Self {
        Self { core, name, quarantine: Quarantine::clear(), search: Underway::none() }
    }

    /// The consumer is another one: nothing is held against it.
    pub(super) fn forget(&mut self) {
        self.quarantine = Quarantine::clear();
        self.search.cancel();
    }

    /// INFO was read after a break. JetStream numbers a consumer's deliveries, and has delivered something
    /// that did not arrive, from this stream sequence on. If everything has arrived, the break was another
    /// consumer's.
    pub(super) fn examine(&mut self, missing_from: Option<u64>) {
        if !self.quarantine.is_suspect() || self.search.is_some() {
            return;
        }
        let Some(from) = missing_from else { return self.quarantine.cleared() };
        tracing::warn!(
            consumer = %self.name,
            "the connection broke by its content: searching for unreadable messages"
        );
        let known = self.quarantine.terminated().clone();
        self.search.begin(search(self.core.clone(), self.name.clone(), from, known));
    }

    pub(super) fn is_searching(&self) -> bool {
        self.search.is_some()
    }

    /// Waits for the end of the search. Never ends if there is none. Cancel-safe.
    pub(super) async fn next(&mut self) -> SearchResult {
        self.search.next().await
    }

    /// The search has ended. `cut`: what the bytes say that were on their way. Returns the error for the callers.
    pub(super) fn searched(
        &mut self,
        result: &SearchResult,
        cut: Option<Explained>,
        now: Instant,
    ) -> Option<Error> {
        if let Some(Explained { first: true, cause, bound }) = cut
            && cause.slow
        {
            tracing::warn!(
                outstanding = cause.out,
                bound,
                "NATS closed the connection for deliveries with many bytes outstanding, and no \
                 message explains it: lower --max-pull-bytes, or raise max_pending at the server"
            );
        }
        let barred = self.quarantine.assess(result, cut.map(|cut| cut.cause), now)?;
        let (error, consumer) = (self.error_of(barred), &self.name);
        if matches!(error, Error::ConsumerSuspected { .. }) {
            tracing::warn!(
                %consumer,
                %error,
                "a dedicated connection broke, and the cause is not known"
            );
        } else {
            tracing::error!(%consumer, %error, "the consumer is suspended for a while");
        }
        Some(error)
    }

    /// Why callers are not served now.
    pub(super) fn suspended(&self, now: Instant) -> Option<Error> {
        self.quarantine.suspended(now).map(|barred| self.error_of(barred))
    }

    fn error_of(&self, barred: QuarantineReason) -> Error {
        let name = self.name.clone();
        match barred {
            QuarantineReason::Unreadable { needs } => {
                let property = Unsuitable::Unreadable { needs };
                Error::ConsumerUnsuitable { name, property }
            }
            QuarantineReason::Suspected { needs } => Error::ConsumerSuspected { name, needs },
        }
    }
}

/// Searches from this stream sequence on, and terminates what cannot be read. Nobody here can hold a lease
/// on such a message, because nobody could receive it. A message that was terminated before (`known`) is
/// terminated again only if no other is found: a server that has crashed may have forgotten it.
async fn search<B: Broker>(
    core: Arc<Core<B>>,
    name: ConsumerName,
    from: u64,
    known: BTreeSet<u64>,
) -> SearchResult {
    let until = clock::now() + SEARCH_TIMEOUT;
    let blind = SearchResult::Nothing { complete: false };
    // The answers carry whole messages, on the connection that settles: few searches at a time.
    let Ok(Ok(_permit)) = timeout_at(until.into(), core.searches.acquire()).await else {
        return blind;
    };
    let Search { mut found, complete } = match core.broker.unreadable(&name, from, until).await {
        Ok(search) => search,
        Err(InfoError::Permission(subject)) => return SearchResult::NotAllowed(subject),
        Err(error) => {
            tracing::debug!(consumer = %name, %error, "unreadable messages were not searched");
            return blind;
        }
    };
    if found.is_empty() {
        return SearchResult::Nothing { complete };
    }
    if found.iter().any(|message| !known.contains(&message.stream_sequence)) {
        found.retain(|message| !known.contains(&message.stream_sequence));
    }
    let until = clock::now() + core.limits.settle_timeout;
    let terms = found.iter().map(term).collect();
    let results = core.broker.settle(terms, Confirmation::Confirmed, until).await;
    let (mut terminated, mut needs) = (Vec::new(), None);
    for (message, result) in found.iter().zip(results) {
        let (sequence, why) = (message.stream_sequence, &*message.why);
        let ConsumerName { stream, consumer } = &name;
        match result {
            Ok(()) => {
                tracing::warn!(
                    %stream,
                    %consumer,
                    sequence,
                    why,
                    "an unreadable message was terminated"
                );
                core.metrics.consumer(stream, consumer, clock::now()).unreadable();
                terminated.push(sequence);
            }
            Err(error) => {
                tracing::warn!(
                    %stream,
                    %consumer,
                    sequence,
                    why,
                    %error,
                    "an unreadable message could not be terminated"
                );
                if let BrokerError::Denied(Denial::Permission(subject)) = error {
                    needs = Some(subject);
                }
            }
        }
    }
    SearchResult::Found { terminated, needs }
}

fn term(message: &Unreadable) -> AckPublish {
    let kind = AckKind::Term(format!("fetch-proxy: unreadable headers: {}", message.why));
    AckPublish { ack: message.ack.clone(), kind, confirm_group: None, by: None }
}
