//! The commands for operators: they print lists, and release leases.

use std::{
    io::{BufRead as _, IsTerminal as _, Write as _},
    time::Duration,
};

use super::{Outcome, block_on, client_tls, failed, say, usage};
use crate::{
    client::{Client, OperatorClient, OperatorError, Rows, pb_duration},
    config::{
        ConnectionsArgs, ConsumersArgs, LeasesArgs, OperatorArgs, ReleaseArgs, ReplicasArgs,
        WatchArgs,
    },
    pb,
};

/// The exit code if nothing matched, or if a replica did not answer.
const INCOMPLETE: u8 = 1;
/// The exit code of a refusal.
const REFUSED: u8 = 3;
/// Clears a terminal and moves to its beginning (ECMA-48).
const CLEAR: &str = "\x1b[2J\x1b[H";

/// The client, and the admin socket to call at if there is no address.
pub(super) fn client(args: OperatorArgs) -> Outcome<(Client, Option<String>)> {
    let OperatorArgs { addr, admin_socket, ops_listen, tls, token_file, json } = args;
    let socket = admin_socket.unwrap_or_default().name(ops_listen.port());
    let (addr, socket) = match (addr, socket) {
        (Some(addr), _) => (addr, None),
        (None, Some(name)) => (String::new(), Some(name)),
        (None, None) => return Err(usage("--admin-socket is off, so give --addr")),
    };
    Ok((Client { addr, tls: client_tls(tls), token_file, json }, socket))
}

pub(super) fn replicas(ReplicasArgs { operator, watch }: ReplicasArgs) -> Outcome<u8> {
    list(operator, &watch, async |client| client.replicas().await)
}

pub(super) fn consumers(args: ConsumersArgs) -> Outcome<u8> {
    let ConsumersArgs { operator, watch, stream, consumer } = args;
    let (stream, consumer) = (stream.unwrap_or_default(), consumer.unwrap_or_default());
    list(operator, &watch, async |client| client.consumers(&stream, &consumer).await)
}

pub(super) fn leases(args: LeasesArgs) -> Outcome<u8> {
    let filter = pb::LeaseFilter {
        stream: args.stream.unwrap_or_default(),
        consumer: args.consumer.unwrap_or_default(),
        principal: args.principal.unwrap_or_default(),
        worker: args.worker.unwrap_or_default(),
        replica: args.replica.unwrap_or_default(),
        older_than: span(args.older_than)?,
        expiring_within: span(args.expiring_within)?,
        ..pb::LeaseFilter::default()
    };
    let limit = args.limit;
    list(args.operator, &args.watch, async |client| client.leases(&filter, limit).await)
}

pub(super) fn connections(ConnectionsArgs { operator, watch }: ConnectionsArgs) -> Outcome<u8> {
    list(operator, &watch, async |client| client.connections().await)
}

pub(super) fn release(args: ReleaseArgs) -> Outcome<u8> {
    let request = pb::ReleaseLeasesRequest {
        filter: Some(pb::LeaseFilter {
            stream: args.stream,
            consumer: args.consumer,
            principal: args.principal.unwrap_or_default(),
            worker: args.worker.unwrap_or_default(),
            stream_sequence: args.sequence.unwrap_or_default(),
            older_than: span(args.older_than)?,
            ..pb::LeaseFilter::default()
        }),
        delay: span(Some(args.delay))?,
        force_last_attempts: args.force_last_attempts,
        ..pb::ReleaseLeasesRequest::default()
    };
    let asks = !args.yes && !args.dry_run;
    if asks && !std::io::stdin().is_terminal() {
        return Err(usage(
            "nothing is released: standard input is no terminal, so nobody can be asked. Give --yes, or --dry-run",
        ));
    }
    let (client, socket) = client(args.operator)?;
    let outcome = block_on(async {
        let client = match OperatorClient::connect(client, socket.as_deref()).await {
            Ok(client) => client,
            Err(error) => return Ok(Err(error)),
        };
        if asks || args.dry_run {
            let would = match client.would_release(&request).await {
                Ok(would) => would,
                Err(error) => return Ok(Err(error)),
            };
            if args.dry_run || would.count == 0 {
                return Ok(Ok(would));
            }
            show(&would)?;
            if !is_confirmed()? {
                return Ok(Ok(Rows { text: "nothing was released".to_owned(), ..would }));
            }
        }
        Ok::<_, String>(client.release(&request).await)
    })?;
    match outcome {
        Ok(rows) => {
            show(&rows).map_err(failed)?;
            Ok(rows.exit_code())
        }
        Err(error) => Err(failure(error)),
    }
}

/// Asks at the terminal.
fn is_confirmed() -> Result<bool, String> {
    let mut out = std::io::stdout();
    let asked = write!(out, "Release them? [y/N] ").and_then(|()| out.flush());
    let mut answer = String::new();
    let read = asked.and_then(|()| std::io::stdin().lock().read_line(&mut answer));
    read.map_err(|error| format!("cannot ask: {error}"))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Prints a list, or prints it again and again.
fn list(
    operator: OperatorArgs,
    WatchArgs { watch }: &WatchArgs,
    rows: impl AsyncFn(&OperatorClient) -> Result<Rows, OperatorError>,
) -> Outcome<u8> {
    let (client, socket) = client(operator)?;
    let outcome = block_on(async {
        let client = match OperatorClient::connect(client, socket.as_deref()).await {
            Ok(client) => client,
            Err(error) => return Ok(Err(error)),
        };
        loop {
            let rows = match rows(&client).await {
                Ok(rows) => rows,
                Err(error) => return Ok(Err(error)),
            };
            let Some(every) = watch else {
                show(&rows)?;
                return Ok::<_, String>(Ok(rows.exit_code()));
            };
            if std::io::stdout().is_terminal() {
                say(CLEAR).map_err(|(_, message)| message)?;
            }
            show(&rows)?;
            // A watch without a pause would only burden the replicas.
            tokio::time::sleep((*every).max(Duration::from_millis(100))).await;
        }
    })?;
    outcome.map_err(failure)
}

/// Prints rows, and says on standard error what is missing.
fn show(rows: &Rows) -> Result<(), String> {
    if !rows.text.is_empty() {
        say(&rows.text).map_err(|(_, message)| message)?;
    }
    for note in &rows.notes {
        // If standard error is closed, the note has no reader.
        drop(writeln!(std::io::stderr(), "{note}"));
    }
    Ok(())
}

fn failure(error: OperatorError) -> (u8, String) {
    match error {
        OperatorError::Refused(message) => (REFUSED, message),
        OperatorError::Usage(message) => usage(message),
        OperatorError::Failed(message) => failed(message),
    }
}

fn span(length: Option<Duration>) -> Outcome<Option<prost_types::Duration>> {
    length.map_or(Ok(None), pb_duration).map_err(usage)
}

impl Rows {
    fn exit_code(&self) -> u8 {
        if self.count > 0 && self.is_complete { 0 } else { INCOMPLETE }
    }
}
