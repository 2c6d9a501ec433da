//! `make bench-peers`: the work of a worker through the proxy, by the stock gRPC library of a language and by
//! its client package, and by the NATS client of the language itself, in pairs.
//!
//! Each folder here is a language, with a program that does the work and two scripts, `build` and `run`.
//! The table is Markdown. A language whose toolchain is missing is named below the table.
//!
//! ```text
//! cargo bench --bench peers [-- --pairs 7 --messages 20000 --only go]
//! ```

#![allow(clippy::disallowed_methods, reason = "a bench measures real time")]

mod peer;

use std::{path::Path, process::ExitCode};

use async_nats::jetstream;
use clap::Parser;
use peer::Peer;
use testkit::{
    backlog::Backlog,
    examples::language::{self, Built},
    measure::Processes,
    nats_server::NatsServer,
    pairs::Pairs,
    proxy::Proxy,
};

const SIZE: usize = 1024;

#[derive(Parser)]
struct Args {
    /// Pairs of each row.
    #[arg(long, default_value_t = 7)]
    pairs: usize,
    /// Messages of each half of a pair, for rows of n = 100; rows of n = 1 take an eighth or less.
    #[arg(long, default_value_t = 20_000)]
    messages: usize,
    /// Only rows whose name holds this. A name begins with the language.
    #[arg(long, default_value = "")]
    only: String,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The servers that the programs of all languages share.
struct Servers {
    nats: NatsServer,
    proxy: Proxy,
    backlog: Backlog,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let nats = NatsServer::start();
    let connection = async_nats::connect(nats.url()).await.unwrap();
    // More than any run takes, so that nobody waits for a message at its end.
    let jetstream = jetstream::new(connection);
    let backlog = Backlog::fill(&jetstream, "PEERS", SIZE, args.messages + 20_000).await;
    let proxy = Proxy::start(&nats, &["--log-level", "off"]);
    let servers = Servers { nats, proxy, backlog };
    println!(
        "{} pairs a row, 1 KiB messages, file stream, one nats-server. A is a worker with the stock gRPC \
         library of the language, or a worker of its client package. B is a worker with the NATS client of \
         the language, which confirms each message, all acks of a batch at once.",
        args.pairs
    );
    let mut pairs = Pairs::new(args.pairs, &args.only);
    let (mut unmeasured, mut failed) = (Vec::new(), Vec::new());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers");
    for language in language::within(&folder) {
        if !ROWS.iter().any(|row| pairs.want(&row.name(&language.name))) {
            continue;
        }
        match language.build().await {
            Built::Ready => {
                let peer = Peer::start(&language.folder, &servers).await;
                rows(&mut pairs, &servers, &language.name, &peer, args.messages).await;
            }
            Built::Lacking(why) => unmeasured.push(why),
            Built::Failed(why) => failed.push(format!("{}: {why}", language.name)),
        }
    }
    pairs.print_calls();
    println!();
    for why in unmeasured {
        println!("NOT MEASURED: {why}");
    }
    for why in &failed {
        println!("FAILED: {why}");
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A kind of work, done in two ways.
struct Row {
    name: &'static str,
    proxy: Way,
    native: Way,
    /// A half takes all messages, divided by this.
    part: usize,
}

/// A mode of the programs, and its number of workers.
struct Way(&'static str, usize);

const ROWS: [Row; 6] = [
    Row {
        name: "n=1 confirmed, 1 worker: proxy / native",
        proxy: Way("proxy-1", 1),
        native: Way("native-1", 1),
        part: 32,
    },
    Row {
        name: "n=1 confirmed, 8 workers: proxy / native",
        proxy: Way("proxy-1", 8),
        native: Way("native-1", 8),
        part: 8,
    },
    Row {
        name: "n=100 confirmed, 1 worker: proxy / native",
        proxy: Way("proxy-100", 1),
        native: Way("native-100", 1),
        part: 2,
    },
    Row {
        name: "n=100 confirmed, 8 workers: proxy / native",
        proxy: Way("proxy-100", 8),
        native: Way("native-100", 8),
        part: 1,
    },
    Row {
        name: "package, 16 handlers / native, 16 workers, n=1 confirmed",
        proxy: Way("package-16", 1),
        native: Way("native-1", 16),
        part: 4,
    },
    Row {
        name: "package, 16 handlers / native, 1 worker, n=16 confirmed",
        proxy: Way("package-16", 1),
        native: Way("native-16", 1),
        part: 4,
    },
];

impl Row {
    fn name(&self, language: &str) -> String {
        format!("{language}, {}", self.name)
    }
}

async fn rows(pairs: &mut Pairs, servers: &Servers, language: &str, peer: &Peer, messages: usize) {
    let others = vec![peer.pid(), servers.nats.pid()];
    let direct = Processes { proxies: Vec::new(), others };
    let proxied = Processes { proxies: vec![servers.proxy.pid()], ..direct.clone() };
    for row in &ROWS {
        let (Way(a, a_workers), Way(b, b_workers)) = (&row.proxy, &row.native);
        pairs
            .row(
                &row.name(language),
                messages / row.part,
                async |run| peer.half(servers, &proxied, a, *a_workers, run).await,
                async |run| peer.half(servers, &direct, b, *b_workers, run).await,
            )
            .await;
    }
}
