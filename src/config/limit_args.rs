//! The limits of `serve`, as clap parses them. `config` gives them a meaning.

use std::time::Duration;

use clap::Args;

use super::values;

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitArgs {
    /// Threads that answer calls and decide about leases, at most 64.
    ///
    /// On one thread a call costs the least, because no thread waits for another. More threads let one
    /// replica use more cores. More replicas do the same, and survive the loss of a machine.
    #[arg(long, env = "FETCH_PROXY_THREADS", default_value_t = 1, value_name = "COUNT",
          value_parser = values::count)]
    pub(super) threads: usize,
    /// Longest lease, at least 1s.
    ///
    /// A longer lease is lowered to this, also if it is the ack wait of the consumer. The message of a
    /// dead worker is away for at most this time.
    #[arg(long, env = "FETCH_PROXY_MAX_LEASE", default_value = "1h", value_name = "TIME",
          value_parser = values::time)]
    pub(super) max_lease: Duration,
    /// Most messages leased at once, by all clients together.
    ///
    /// Each lease takes about 400 bytes. At the limit, a Fetch is refused with LEASE_LIMIT.
    #[arg(long, env = "FETCH_PROXY_MAX_LEASES", default_value_t = 100_000, value_name = "COUNT",
          value_parser = values::count)]
    pub(super) max_leases: usize,
    /// Most Fetch calls open at once.
    ///
    /// At the limit, a Fetch is refused with WAITER_LIMIT.
    #[arg(long, env = "FETCH_PROXY_MAX_WAITERS", default_value_t = 10_000, value_name = "COUNT",
          value_parser = values::count)]
    pub(super) max_waiters: usize,
    /// Most messages of one consumer leased at once [default: nine tenths of what is free and its own]
    ///
    /// Even with a higher value, one consumer gets at most nine tenths of the leases that are free and
    /// its own, so that other consumers find leases. At the limit, a Fetch is refused with LEASE_LIMIT.
    #[arg(long, env = "FETCH_PROXY_MAX_LEASES_PER_CONSUMER", value_name = "COUNT",
          value_parser = values::count)]
    pub(super) max_leases_per_consumer: Option<usize>,
    /// Most bytes that the open pulls of one connection to NATS may bring together.
    ///
    /// From 65536 (64 KiB) to 1073741824 (1 GiB), shared by the consumers of the connection. Keep it
    /// far below the server's max_pending (64 MB by default): the server closes a connection on which
    /// more bytes wait.
    #[arg(
        long,
        env = "FETCH_PROXY_MAX_PULL_BYTES",
        default_value_t = 16 << 20,
        value_name = "BYTES",
        value_parser = values::bytes
    )]
    pub(super) max_pull_bytes: usize,
    /// Most calls under way at once, of all kinds.
    ///
    /// At the limit, a call is refused with CALL_LIMIT. The default is twice that of --max-waiters:
    /// settlements need a place next to the open Fetch calls.
    #[arg(long, env = "FETCH_PROXY_MAX_CALLS", default_value_t = 20_000, value_name = "COUNT",
          value_parser = values::count)]
    pub(super) max_calls: usize,
    /// Most bytes of requests in memory, of all clients together, at least 8388608 (8 MiB).
    ///
    /// At the limit, a call is refused with BYTE_LIMIT.
    #[arg(
        long,
        env = "FETCH_PROXY_MAX_REQUEST_BYTES",
        default_value_t = 32 * 1024 * 1024,
        value_name = "BYTES",
        value_parser = values::bytes
    )]
    pub(super) max_request_bytes: usize,
    /// Most bytes of memory for answers that clients have not read yet, at least 33554432 (32 MiB).
    ///
    /// An answer takes twice its size. At the limit, a Fetch is refused with BYTE_LIMIT.
    #[arg(
        long,
        env = "FETCH_PROXY_MAX_ANSWER_BYTES",
        default_value_t = 96 * 1024 * 1024,
        value_name = "BYTES",
        value_parser = values::bytes
    )]
    pub(super) max_answer_bytes: usize,
    /// Most connections of clients open at once.
    ///
    /// Each connection takes a file descriptor. At the limit, a connection is refused with
    /// CONNECTION_LIMIT.
    #[arg(
        long,
        env = "FETCH_PROXY_MAX_CONNECTIONS",
        default_value_t = 10_000,
        value_name = "COUNT",
        value_parser = values::count
    )]
    pub(super) max_connections: usize,
    /// Age at which a client is asked to connect again. 0s means never.
    ///
    /// The actual age differs by up to a tenth, so that clients spread over the replicas. No call is
    /// lost.
    #[arg(long, env = "FETCH_PROXY_MAX_CONNECTION_AGE", default_value = "10m", value_name = "TIME",
          value_parser = values::time)]
    pub(super) max_connection_age: Duration,
    /// Longest wait for JetStream to confirm a settlement, at least 100ms.
    ///
    /// After that, the settlement fails with SETTLE_UNCONFIRMED. Keep it below the deadlines of
    /// clients.
    #[arg(long, env = "FETCH_PROXY_SETTLE_TIMEOUT", default_value = "5s", value_name = "TIME",
          value_parser = values::time)]
    pub(super) settle_timeout: Duration,
}
