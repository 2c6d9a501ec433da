//! The proxy that was built, against another program of it, such as an older version. Both are alike in all else:
//! neither has TLS or a policy, and both are in front of the same nats-server.

use std::path::Path;

use testkit::proxy::Proxy;

use crate::{
    Args, Half, median, proxied, row,
    setup::{Cpu, FLAGS, Setup},
};

const CLIENTS: usize = 8;

/// Prints a row for batches and for single messages, each with the CPU time of the proxy as a ratio.
pub async fn compare(args: &Args, setup: &Setup, program: &Path) {
    let ours = Proxy::start_at(&setup.nats_url(), &FLAGS);
    let theirs = Proxy::start_other(program, &setup.nats_url(), &FLAGS);
    let batches = async |proxy: &Proxy| {
        let clients = proxied::connect(&format!("http://{}", proxy.grpc), CLIENTS).await;
        let cpu = Cpu::of_one(proxy.pid());
        proxied::batches_of(setup, clients, &cpu, args.messages, true).await
    };
    let singles = async |proxy: &Proxy| {
        let clients = proxied::connect(&format!("http://{}", proxy.grpc), CLIENTS).await;
        proxied::singles_of(setup, clients, &Cpu::of_one(proxy.pid()), args.messages / 4).await
    };
    let name = format!("n=100 confirmed, {CLIENTS} clients: this / other");
    cpu_ratio(
        &row(args, &name, async || batches(&ours).await, async || batches(&theirs).await).await,
    );
    let name = format!("n=1 confirmed, {CLIENTS} clients: this / other");
    cpu_ratio(
        &row(args, &name, async || singles(&ours).await, async || singles(&theirs).await).await,
    );
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
