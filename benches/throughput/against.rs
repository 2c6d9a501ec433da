//! The proxy that was built, against another program of it, such as an older version. Both are alike in all else:
//! neither has TLS or a policy, and both are in front of the same nats-server.

use std::path::Path;

use testkit::proxy::Proxy;

use crate::{
    Args, Half, median, one_call, proxied, row,
    setup::{Cpu, FLAGS, Setup},
};

/// Prints a row for each kind of work, each with the CPU time of the proxy as a ratio.
pub async fn compare(args: &Args, setup: &Setup, program: &Path) {
    let ours = Proxy::start_at(&setup.nats_url(), &FLAGS);
    let theirs = Proxy::start_other(program, &setup.nats_url(), &FLAGS);
    let one = args.messages / 4;
    let connected = async |proxy: &Proxy, clients| {
        let url = format!("http://{}", proxy.grpc);
        (proxied::connect(&url, clients).await, Cpu::of_one(proxy.pid()))
    };
    let batches = async |proxy: &Proxy, clients| {
        let (clients, cpu) = connected(proxy, clients).await;
        proxied::batches_of(setup, clients, &cpu, args.messages, true).await
    };
    let singles = async |proxy: &Proxy, clients| {
        let (clients, cpu) = connected(proxy, clients).await;
        proxied::singles_of(setup, clients, &cpu, one).await
    };
    let in_one_call = async |proxy: &Proxy, clients| {
        let (clients, cpu) = connected(proxy, clients).await;
        one_call::singles_of(setup, clients, &cpu, one).await
    };
    let name = "n=100 confirmed, 8 clients: this / other";
    let (a, b) = (async || batches(&ours, 8).await, async || batches(&theirs, 8).await);
    cpu_ratio(&row(args, name, a, b).await);
    for clients in [1, 8, 64] {
        let name = format!("n=1 confirmed, {clients} clients: this / other");
        let (a, b) =
            (async || singles(&ours, clients).await, async || singles(&theirs, clients).await);
        cpu_ratio(&row(args, &name, a, b).await);
    }
    for clients in [8, 64] {
        let name = format!("n=1 in one call, {clients} clients: this / other");
        let (a, b) = (
            async || in_one_call(&ours, clients).await,
            async || in_one_call(&theirs, clients).await,
        );
        cpu_ratio(&row(args, &name, a, b).await);
    }
}

fn cpu_ratio(pairs: &[(Half, Half)]) {
    if pairs.is_empty() {
        return;
    }
    let (ratio, least, most) = median(pairs, &|(a, b)| a.cpu / b.cpu);
    let spread = format!("{least:.2} to {most:.2}");
    println!(
        "{:<44} {:>9} {:>9} {ratio:>7.2} {spread:>15}",
        "    CPU of the proxy, a message", "", ""
    );
}
