//! Parses the command line, runs what it says, and turns the outcome into an exit code: 0 done,
//! 1 failed, 2 wrong usage or configuration. Nothing else.

#![warn(clippy::print_stdout, clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

use std::{io::Write as _, path::Path, process::ExitCode};

use clap::Parser as _;
use fetch_proxy::{
    app,
    config::{AckArgs, Cli, CodecArg, Command, DevArgs, FetchArgs, LogArgs, Serve},
    dev, grpc,
    pb::{self, settlement::Action},
    telemetry::{Log, LogError},
    token,
};

/// Answers are buffers of a hundred kilobytes that come and go by the thousand; the C library's
/// allocator spends a fifth of our time on them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: u8 = 2;

fn main() -> ExitCode {
    // Dropped last: what was logged is written then.
    let mut log = None;
    let outcome = match Cli::parse().command {
        Command::Guard(args) => match args.command.split_first() {
            Some((server, rest)) => {
                return dev::guard::run(Path::new(server), rest, args.remove.as_deref());
            }
            None => Err(usage("nothing to run")),
        },
        Command::Keygen => keygen(),
        Command::Probe(args) => {
            block_on(async { grpc::probe(&args.addr, &args.service, args.timeout).await })
                .and_then(|(status, serving)| say(&status).map(|()| if serving { 0 } else { 1 }))
        }
        Command::Fetch(args) => fetch(args),
        Command::Ack(args) => settle(args, Action::Ack(pb::AckAction {})),
        Command::Nak(args) => grpc::wire(args.delay)
            .map_err(usage)
            .and_then(|delay| settle(args.ack, Action::Nak(pb::NakAction { delay }))),
        Command::Term(args) => {
            settle(args.ack, Action::Term(pb::TermAction { reason: args.reason }))
        }
        Command::Extend(args) => args
            .lease
            .map_or(Ok(None), grpc::wire)
            .map_err(usage)
            .and_then(|lease| settle(args.ack, Action::Extend(pb::ExtendAction { lease }))),
        Command::Serve { serve, log: args } => log_to(&mut log, &args).and_then(|()| {
            let serve = Serve::load(*serve).map_err(usage)?;
            block_on(async { app::run(serve, |_| ()).await }).map(|()| 0)
        }),
        Command::Dev { dev, log: args } => {
            log_to(&mut log, &args).and_then(|()| block_on(develop(dev)).map(|()| 0))
        }
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err((code, message)) => {
            match &log {
                Some(log) => log.line(&format!("error: {message}")),
                // Nobody is left to tell when standard error is closed.
                None => drop(writeln!(std::io::stderr(), "error: {message}")),
            }
            ExitCode::from(code)
        }
    }
}

type Outcome<T> = Result<T, (u8, String)>;

fn usage(message: impl ToString) -> (u8, String) {
    (USAGE, message.to_string())
}

fn failed(message: impl ToString) -> (u8, String) {
    (1, message.to_string())
}

fn log_to(log: &mut Option<Log>, args: &LogArgs) -> Outcome<()> {
    *log = Some(Log::start(args).map_err(|error| match error {
        LogError::Filter(..) => usage(error),
        LogError::System(_) => failed(error),
    })?);
    Ok(())
}

fn say(line: &str) -> Outcome<()> {
    let printed = writeln!(std::io::stdout(), "{line}");
    printed.map_err(|error| failed(format!("cannot print: {error}")))
}

fn block_on<T, E: ToString>(run: impl Future<Output = Result<T, E>>) -> Outcome<T> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(failed)?;
    let outcome = runtime.block_on(run).map_err(failed);
    // Whatever had to end has been waited for. To drop the runtime would wait for more: the address
    // of NATS may still be looked up, for as long as a name server is silent.
    runtime.shutdown_background();
    outcome
}

fn keygen() -> Outcome<u8> {
    let line = token::new_key_line().map_err(failed)?;
    say(&line).map(|()| 0)
}

fn fetch(args: FetchArgs) -> Outcome<u8> {
    let codec = match args.codec {
        CodecArg::Auto => pb::Codec::Auto,
        CodecArg::Text => pb::Codec::Text,
        CodecArg::Json => pb::Codec::Json,
    };
    let request = pb::FetchRequest {
        stream: args.stream,
        consumer: args.consumer,
        n: args.n,
        lease: args.lease.map_or(Ok(None), grpc::wire).map_err(usage)?,
        codec: codec.into(),
        worker: "fetch-proxy fetch".to_owned(),
        ..pb::FetchRequest::default()
    };
    let client = grpc::Client { addr: args.call.addr, json: args.call.json };
    shown(block_on(client.fetch(request, args.max_wait))?)
}

fn settle(args: AckArgs, action: Action) -> Outcome<u8> {
    let client = grpc::Client { addr: args.call.addr, json: args.call.json };
    shown(block_on(client.settle(args.tokens, action))?)
}

fn shown((text, well): (String, bool)) -> Outcome<u8> {
    say(&text).map(|()| u8::from(!well))
}

/// A private server, filled with samples, and the service in front of it.
async fn develop(args: DevArgs) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let server =
        dev::PrivateServer::start(args.nats_server.as_deref(), args.store_dir.as_deref()).await?;
    dev::fill(&server, args.samples as usize).await?;
    let serve = Serve::load(args.serve(server.url())?)?;
    let nats = server.url().to_owned();
    let hints = |bound: app::BoundAddresses| {
        let hints = dev::hints(bound.grpc, bound.ops, &nats, args.grpcurl.as_deref());
        // A closed terminal is no reason to stop serving, and one that takes nothing no reason to wait.
        let print = move || std::io::stdout().write_all(hints.as_bytes());
        let _ = std::thread::Builder::new().spawn(print);
    };
    app::run(serve, hints).await?;
    Ok(())
}
