//! `make bench`: what the proxy costs, as ratios taken in one run.
//!
//! Machines are shared and noisy, so no figure stands alone. Each row runs two things in turn, A B
//! A B …, at least seven times. It shows the median of the pairs' ratios with its spread, and the
//! CPU time of a message: in all processes that worked on it, and in the proxy alone. All tables are
//! Markdown.
//!
//! ```text
//! cargo bench --bench throughput [-- --pairs 7 --messages 40000]
//! cargo bench --bench throughput -- --only "n=1 "     rows and tables whose name holds this
//! cargo bench --bench throughput -- --against PATH    an older program of the proxy is B
//! ```

#![allow(clippy::disallowed_methods, reason = "a bench measures real time")]

mod against;
mod calls;
mod consumed;
mod direct;
mod forwarded;
mod growth;
mod guarded;
mod load;
mod memory;
mod noop;
mod one_call;
mod other;
mod proxied;
mod rows;
mod setup;
mod waiting;

use std::path::PathBuf;

use clap::Parser;
use setup::Setup;
use testkit::pairs::Pairs;

#[derive(Parser)]
struct Args {
    /// Pairs of each row.
    #[arg(long, default_value_t = 7)]
    pairs: usize,
    /// Messages of each half of a pair, for rows of n = 100; rows of n = 1 take a quarter or less.
    #[arg(long, default_value_t = 40_000)]
    messages: usize,
    /// Serve canned answers on a port that is printed; for the bench itself.
    #[arg(long, hide = true)]
    noop_server: bool,
    /// Only rows and tables whose name holds this.
    #[arg(long, default_value = "")]
    only: String,
    /// Only compare with this program of the proxy.
    #[arg(long, value_name = "PATH")]
    against: Option<PathBuf>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    growth::raise_files();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if args.noop_server {
        runtime.block_on(noop::serve());
    } else {
        runtime.block_on(run(args));
    }
}

async fn run(args: Args) {
    // More than any run takes, so that nobody waits for a message at its end.
    let setup = Setup::start(args.messages + 20_000).await;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{} pairs a row, 1 KiB messages, file stream, one nats-server, {cores} cores. A proxy µs/msg \
         is the part of the proxy in A µs/msg, which is the CPU time of all processes.",
        args.pairs
    );
    let mut pairs = Pairs::new(args.pairs, &args.only);
    let messages = args.messages;
    if let Some(program) = &args.against {
        against::compare(&mut pairs, &setup, program, messages).await;
        return pairs.print_calls();
    }
    rows::compared(&mut pairs, &setup, messages).await;
    against::threads(&mut pairs, &setup, messages).await;
    rows::consume(&mut pairs, &setup, messages).await;
    rows::switches(&mut pairs, &setup, messages).await;
    pairs.print_calls();
    calls::table(&pairs, &setup).await;
    load::table(&pairs, &setup, rows::singles(messages, 64)).await;
    waiting::table(&pairs, &setup).await;
    growth::tables(&pairs, &setup, messages).await;
    println!();
    forwarded::latency(&setup, &args.only).await;
    memory::leases(&setup, &args.only).await;
    memory::stream_leases(&setup, &args.only).await;
    memory::streams(&setup, &args.only).await;
}
