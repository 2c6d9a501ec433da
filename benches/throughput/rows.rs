//! The rows of the main table: which work is compared with which.

use testkit::{pairs::Pairs, traces::TraceReceiver};

use crate::{
    consumed::Streams,
    direct, forwarded,
    guarded::Guarded,
    noop, one_call,
    other::OtherProxy,
    proxied::{self, Batches},
    setup::Setup,
};

/// Messages of a row of n = 1, from those of a row of n = 100: so many that a half takes about as long.
pub fn singles(messages: usize, clients: usize) -> usize {
    messages / if clients == 1 { 16 } else { 4 }
}

/// The proxy, compared with what a user would have without the proxy.
pub async fn compared(pairs: &mut Pairs, setup: &Setup, messages: usize) {
    for (n, clients, confirmed) in [
        (100, 1, true),
        (100, 8, true),
        (100, 64, true),
        (10, 8, true),
        (10, 64, true),
        (100, 1, false),
        (100, 8, false),
        (100, 64, false),
    ] {
        let batches = Batches { clients, n, confirmed };
        let (how, native) =
            if confirmed { ("confirmed", "double_ack") } else { ("sent", "async-nats ack") };
        let named = format!("n={n} {how}, {clients} clients: proxy");
        let a = async |run| proxied::batches(setup, batches, run).await;
        let b = async |run| direct::batches(setup, batches, run).await;
        pairs.row(&format!("{named} / {native}"), messages, a, b).await;
        let b = async |run| noop::batches(setup, batches, run).await;
        pairs.row(&format!("{named} / no-op gRPC"), messages, a, b).await;
    }
    for clients in [1, 8, 64] {
        let messages = singles(messages, clients);
        pairs
            .row(
                &format!("n=1 confirmed, {clients} clients: proxy / no-op gRPC"),
                messages,
                async |run| proxied::singles(setup, clients, run).await,
                async |run| noop::singles(setup, clients, run).await,
            )
            .await;
        pairs
            .row(
                &format!("n=1 confirmed, {clients} clients: proxy / double_ack"),
                messages,
                async |run| proxied::singles(setup, clients, run).await,
                async |run| direct::singles(setup, clients, run).await,
            )
            .await;
    }
    for clients in [8, 64] {
        let messages = singles(messages, clients);
        pairs
            .row(
                &format!("n=1 in one call, {clients} clients: proxy / double_ack"),
                messages,
                async |run| one_call::singles(setup, clients, run).await,
                async |run| direct::singles(setup, clients, run).await,
            )
            .await;
        pairs
            .row(
                &format!("n=1, {clients} clients: one call / two calls"),
                messages,
                async |run| one_call::singles(setup, clients, run).await,
                async |run| proxied::singles(setup, clients, run).await,
            )
            .await;
    }
}

/// Streams of Consume.
pub async fn consume(pairs: &mut Pairs, setup: &Setup, messages: usize) {
    for count in [1, 8, 64] {
        let streams = Streams { count, credit: 1, confirmed: true };
        let messages = singles(messages, count);
        pairs
            .row(
                &format!("Consume, credit 1, {count} streams: proxy / double_ack"),
                messages,
                async |run| streams.acked(setup, run).await,
                async |run| direct::singles(setup, count, run).await,
            )
            .await;
        pairs
            .row(
                &format!("Consume, credit 1, {count} streams: proxy / no-op echo"),
                messages,
                async |run| streams.acked(setup, run).await,
                async |run| streams.echoed(setup, run).await,
            )
            .await;
    }
    for count in [1, 8] {
        let confirmed = Streams { count, credit: 1000, confirmed: true };
        let sent = Streams { confirmed: false, ..confirmed };
        let batches = Batches { clients: count, n: 100, confirmed: true };
        pairs
            .row(
                &format!("Consume, credit 1000, {count} streams: proxy / double_ack"),
                messages,
                async |run| confirmed.acked(setup, run).await,
                async |run| direct::batches(setup, batches, run).await,
            )
            .await;
        pairs
            .row(
                &format!("Consume, credit 1000, {count} streams, sent: proxy / ack"),
                messages,
                async |run| sent.acked(setup, run).await,
                async |run| direct::streamed(setup, count, run).await,
            )
            .await;
        pairs
            .row(
                &format!("Consume, credit 1000, {count} streams: proxy / no-op echo"),
                messages,
                async |run| confirmed.acked(setup, run).await,
                async |run| confirmed.echoed(setup, run).await,
            )
            .await;
    }
}

/// What a switch costs, and settling at another replica.
pub async fn switches(pairs: &mut Pairs, setup: &Setup, messages: usize) {
    let guarded = Guarded::start(setup);
    let receiver = TraceReceiver::start().await;
    let traced = OtherProxy::traced(setup, &receiver);
    let unmetered = OtherProxy::with(setup, &["--metrics", "off"]);
    let batches = Batches { clients: 8, n: 100, confirmed: true };
    let plain_batches = async |run| proxied::batches(setup, batches, run).await;
    let plain_singles = async |run| proxied::singles(setup, 8, run).await;
    let one = singles(messages, 8);
    let [many_named, one_named] = ["n=100 confirmed, 8 clients", "n=1 confirmed, 8 clients"];

    let name = "TLS, policy / plain";
    let a = async |run| guarded.batches(setup, batches, run).await;
    pairs.row(&format!("{many_named}: {name}"), messages, a, plain_batches).await;
    let a = async |run| guarded.singles(setup, 8, run).await;
    pairs.row(&format!("{one_named}: {name}"), one, a, plain_singles).await;

    let name = "traces at 1 % / off";
    let a = async |run| traced.batches(setup, batches, run).await;
    pairs.row(&format!("{many_named}: {name}"), messages, a, plain_batches).await;
    let a = async |run| traced.singles(setup, 8, run).await;
    pairs.row(&format!("{one_named}: {name}"), one, a, plain_singles).await;

    let name = "metrics on / off";
    let b = async |run| unmetered.batches(setup, batches, run).await;
    pairs.row(&format!("{many_named}: {name}"), messages, plain_batches, b).await;
    let b = async |run| unmetered.singles(setup, 8, run).await;
    pairs.row(&format!("{one_named}: {name}"), one, plain_singles, b).await;

    pairs
        .row(
            "settles of 100: forwarded / at the owner",
            messages,
            async |run| forwarded::settles(setup, true, run).await,
            async |run| forwarded::settles(setup, false, run).await,
        )
        .await;
    if pairs.want("traces at 1 %") {
        println!("\n{} spans were received.", receiver.spans().len());
    }
}
