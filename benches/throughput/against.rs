//! The proxy that was built, against another program of it, such as an older version. Both are alike in all else:
//! neither has TLS or a policy, and both are in front of the same nats-server.

use std::path::Path;

use testkit::pairs::Pairs;

use crate::{consumed::Streams, other::OtherProxy, proxied::Batches, rows::singles, setup::Setup};

/// Prints a row for each kind of work.
pub async fn compare(pairs: &mut Pairs, setup: &Setup, program: &Path, messages: usize) {
    let (ours, theirs) = (OtherProxy::with(setup, &[]), OtherProxy::program(setup, program));
    both(pairs, setup, [&ours, &theirs], "this / other", messages).await;
}

/// One thread and two, each with the same work.
pub async fn threads(pairs: &mut Pairs, setup: &Setup, messages: usize) {
    if !pairs.want("2 threads / 1 thread") {
        return;
    }
    let (two, one) = (["--threads", "2"], ["--threads", "1"]);
    let (two, one) = (OtherProxy::with(setup, &two), OtherProxy::with(setup, &one));
    both(pairs, setup, [&two, &one], "2 threads / 1 thread", messages).await;
}

async fn both(
    pairs: &mut Pairs,
    setup: &Setup,
    [a, b]: [&OtherProxy; 2],
    names: &str,
    messages: usize,
) {
    for (n, clients) in [(10, 8), (100, 8), (100, 64)] {
        let batches = Batches { clients, n, confirmed: true };
        pairs
            .row(
                &format!("n={n} confirmed, {clients} clients: {names}"),
                messages,
                async |run| a.batches(setup, batches, run).await,
                async |run| b.batches(setup, batches, run).await,
            )
            .await;
    }
    for clients in [1, 8, 64] {
        pairs
            .row(
                &format!("n=1 confirmed, {clients} clients: {names}"),
                singles(messages, clients),
                async |run| a.singles(setup, clients, run).await,
                async |run| b.singles(setup, clients, run).await,
            )
            .await;
    }
    for clients in [8, 64] {
        pairs
            .row(
                &format!("n=1 in one call, {clients} clients: {names}"),
                singles(messages, clients),
                async |run| a.one_call(setup, clients, run).await,
                async |run| b.one_call(setup, clients, run).await,
            )
            .await;
    }
    for (count, credit) in [(1, 1), (8, 1), (64, 1), (8, 1000)] {
        let streams = Streams { count, credit, confirmed: true };
        let messages = if credit == 1 { singles(messages, count) } else { messages };
        pairs
            .row(
                &format!("Consume, credit {credit}, {count} streams: {names}"),
                messages,
                async |run| a.consumed(setup, streams, run).await,
                async |run| b.consumed(setup, streams, run).await,
            )
            .await;
    }
}
