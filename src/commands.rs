//! The subcommands: what each one does, and the exit code that it ends with.

mod develop;
mod operators;
mod papers;
mod policy;
mod work;

use std::{io::Write as _, path::Path, process::ExitCode};

use tokio::runtime::Builder;

use crate::{
    access::NewApiKey,
    app, client,
    config::{
        AckArgs, BY_HAND, CallArgs, ClientTlsArgs, CodecArg, Command, ConsumerArgs, DevCommand,
        FetchArgs, GiveBackArgs, KeygenArgs, LogArgs, OperatorArgs, Serve, ServerArgs,
    },
    dev,
    metrics::LogMeter,
    pb::{self, settlement::Action},
    telemetry::{Log, LogError},
    token,
};

/// The exit code of wrong usage or configuration.
const USAGE: u8 = 2;

/// Runs a subcommand. The exit code is 0 for success, 1 for failure, 2 for wrong usage or configuration. Commands for
/// operators also have 3, for a refusal.
pub fn run(command: Command) -> ExitCode {
    // Dropped last: this writes the lines that are still queued.
    let mut log = None;
    let outcome = match command {
        Command::Guard(args) => match args.command.split_first() {
            Some((server, rest)) => {
                return dev::guard::run(Path::new(server), rest, args.remove.as_deref());
            }
            None => Err(usage("nothing to run")),
        },
        Command::Keygen(args) => keygen(args),
        Command::Policy(args) => policy::run(args.command),
        Command::Probe(args) => {
            let (addr, tls) = (args.address(), client_tls(args.tls));
            block_on(async { client::probe_by(&addr, &tls, &args.service, args.timeout).await })
                .and_then(|(status, serving)| say(&status).map(|()| if serving { 0 } else { 1 }))
        }
        Command::Completions(args) => papers::completions(args.shell),
        Command::Man(args) => papers::man(&args.dir),
        Command::Work(args) => work::run(*args),
        Command::Fetch(args) => fetch(args),
        Command::Ack(args) => settle(args, Action::Ack(pb::AckAction {})),
        Command::Nak(args) => client::pb_duration(args.delay)
            .map_err(usage)
            .and_then(|delay| settle(args.ack, Action::Nak(pb::NakAction { delay }))),
        Command::Term(args) => {
            settle(args.ack, Action::Term(pb::TermAction { reason: args.reason }))
        }
        Command::Extend(args) => args
            .lease
            .map_or(Ok(None), client::pb_duration)
            .map_err(usage)
            .and_then(|lease| settle(args.ack, Action::Extend(pb::ExtendAction { lease }))),
        Command::GiveBack(args) => give_back(args),
        Command::Consumer(args) => consumer(args),
        Command::WhoAmI(args) => who_am_i(*args),
        Command::Replicas(args) => operators::replicas(*args),
        Command::Consumers(args) => operators::consumers(*args),
        Command::Leases(args) => operators::leases(*args),
        Command::Connections(args) => operators::connections(*args),
        Command::Release(args) => operators::release(*args),
        Command::Serve { serve, log: args } => log_to(&mut log, &args).and_then(|meter| {
            let serve = Serve::load(*serve).map_err(usage)?;
            let threads = serve.threads;
            block_on_threads(threads, app::run(serve, &meter, |_| ())).map(|()| 0)
        }),
        Command::Dev { command: Some(DevCommand::Publish(args)), .. } => develop::publish(&args),
        Command::Dev { command: None, dev, log: args } => {
            log_to(&mut log, &args).and_then(|meter| develop::run(dev, &meter))
        }
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err((code, message)) => {
            match &log {
                Some(log) => log.line(&format!("error: {message}")),
                // If standard error is closed, the message has no reader.
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

/// Starts the log. Returns the meter of its lines.
fn log_to(log: &mut Option<Log>, args: &LogArgs) -> Outcome<LogMeter> {
    let started = Log::start(args).map_err(|error| match error {
        LogError::Filter(..) => usage(error),
        LogError::System(_) => failed(error),
    })?;
    let meter = started.meter().clone();
    *log = Some(started);
    Ok(meter)
}

fn say(line: &str) -> Outcome<()> {
    let printed = writeln!(std::io::stdout(), "{line}");
    printed.map_err(|error| failed(format!("cannot print: {error}")))
}

fn block_on<T, E: ToString>(run: impl Future<Output = Result<T, E>>) -> Outcome<T> {
    block_on_threads(1, run)
}

/// Runs all tasks on so many threads. One thread is the present thread, which a task never leaves.
fn block_on_threads<T, E: ToString>(
    threads: usize,
    run: impl Future<Output = Result<T, E>>,
) -> Outcome<T> {
    let mut builder = match threads {
        1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    // The first kind has no workers, and ignores the number.
    let runtime = builder.worker_threads(threads).enable_all().build().map_err(failed)?;
    let outcome = runtime.block_on(run).map_err(failed);
    // The run has waited for all tasks that must end. Dropping the runtime would also wait for a lookup
    // of the address of NATS, for as long as the name server is silent.
    runtime.shutdown_background();
    outcome
}

fn keygen(args: KeygenArgs) -> Outcome<u8> {
    let lines = match args.api_key {
        None => token::new_key_line().map_err(failed)?,
        Some(name) => {
            let key = NewApiKey::random(&name).map_err(failed)?;
            let key = key.ok_or_else(|| {
                usage(
                    "--api-key: a name has 1 to 64 of a-z, 0-9, `.`, `_` and `-`, and begins with a \
                     letter or a digit",
                )
            })?;
            format!("{}\n{}", key.secret, key.line)
        }
    };
    say(&lines).map(|()| 0)
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
        lease: args.lease.map_or(Ok(None), client::pb_duration).map_err(usage)?,
        codec: codec.into(),
        worker: "fetch-proxy fetch".to_owned(),
        attempt_id: args.attempt.unwrap_or_default(),
        attempt_again: args.again,
        ..pb::FetchRequest::default()
    };
    let term = pb::TermAction { reason: BY_HAND.to_owned() };
    let first = [
        (args.ack, Action::Ack(pb::AckAction {})),
        (args.nak, Action::Nak(pb::NakAction::default())),
        (args.term, Action::Term(term)),
    ];
    print_answer(block_on(client(args.call).fetch(request, args.max_wait, first))?)
}

fn settle(args: AckArgs, action: Action) -> Outcome<u8> {
    print_answer(block_on(client(args.call).settle(args.tokens, action))?)
}

fn give_back(GiveBackArgs { call, stream, consumer, attempt }: GiveBackArgs) -> Outcome<u8> {
    let request = pb::GiveBackRequest { stream, consumer, attempt_id: attempt };
    print_answer(block_on(client(call).give_back(request))?)
}

fn consumer(ConsumerArgs { call, stream, consumer }: ConsumerArgs) -> Outcome<u8> {
    let request = pb::GetConsumerRequest { stream, consumer };
    print_answer(block_on(client(call).consumer(request))?)
}

fn who_am_i(args: OperatorArgs) -> Outcome<u8> {
    let (client, socket) = operators::client(args)?;
    print_answer(block_on(client.who_am_i(socket.as_deref()))?)
}

fn client(CallArgs { server, json }: CallArgs) -> client::Client {
    let addr = server.address();
    let ServerArgs { tls, token_file, .. } = server;
    client::Client { addr, tls: client_tls(tls), token_file, json }
}

fn client_tls(ClientTlsArgs { ca, cert, key, server_name }: ClientTlsArgs) -> client::ClientTls {
    client::ClientTls { ca, cert, key, server_name }
}

fn print_answer((text, well): (String, bool)) -> Outcome<u8> {
    say(&text).map(|()| u8::from(!well))
}
