//! The command line of `work`, as clap parses it. `commands` gives it a meaning.
//!
//! The doc comments are the `--help` texts and `docs/reference/flags.md`.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};

use super::{client_args::ServerArgs, values};

const TAKING: &str = "Taking messages";
const COMMANDS: &str = "Commands";
const HTTP: &str = "An HTTP server in place of a command";
const FAILURE: &str = "Messages that are not done";
const STOP: &str = "Stopping";
const OUTPUT: &str = "Output";

const WORK: &str = "\
The command has the payload on its standard input. Its exit code settles the message:
  0            Ack: the message is done.
  75           Nak: it is delivered again, after a delay that grows with each attempt.
  65           Term: it is never delivered again. The last line of standard error is the reason.
  other codes  Nak, like 75. The same for a command that a signal has ended.

The command finds the message in its environment:
  FETCH_PROXY_STREAM, FETCH_PROXY_CONSUMER, FETCH_PROXY_SUBJECT
  FETCH_PROXY_SEQUENCE      the number of the message in the stream
  FETCH_PROXY_ATTEMPT       which attempt this is, from 1
  FETCH_PROXY_MAX_ATTEMPTS  the last attempt; 0 is no limit
  FETCH_PROXY_HEADER_NAME   the first value of the header NAME, in capitals and with _ for other characters
  FETCH_PROXY_HEADERS       all headers and all values, as JSON
  FETCH_PROXY_HEADERS_CUT   1 if headers are left out, because they have more than 32 KiB

With --http, the payload is the body of a POST. The status settles the message:
  2xx          Ack.
  429, 503     Nak, with the delay of Retry-After.
  422          Term. The first line of the body is the reason.
  others       Nak. The same if there is no answer.
The headers are Fetch-Proxy-Subject, -Sequence, -Attempt and so on, and Fetch-Proxy-Header-NAME.

Examples:
  fetch-proxy work ORDERS worker -- ./handle-order
      Run ./handle-order once for each message, one after the other, until Ctrl-C.

  fetch-proxy work ORDERS worker -j 10 --timeout 5m -- php handle.php
      Run up to ten at a time, and none for longer than five minutes.

  fetch-proxy work ORDERS worker --until-empty -- sh -c 'jq -r .id >> ids'
      Take what is there, and end: for cron.

  fetch-proxy work ORDERS worker -j 20 --http http://127.0.0.1:8080/orders
      Send each message to a server, twenty at a time.

  fetch-proxy work ORDERS worker --dry-run -- ./handle-order
      Look at the consumer and at the command, and take nothing.";

/// The messages to take, and the work on them.
#[derive(Debug, Args)]
#[command(after_help = WORK)]
pub struct WorkArgs {
    /// The address and the credential.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Name of the stream.
    pub stream: String,
    /// Name of a pull consumer of the stream.
    pub consumer: String,
    /// Most messages at work at a time, at most 1000.
    #[arg(short, long, default_value_t = 1, value_name = "COUNT", help_heading = TAKING,
          value_parser = values::number(1..=1000))]
    pub jobs: u32,
    /// End after this number of messages.
    #[arg(long, value_name = "COUNT", help_heading = TAKING,
          value_parser = clap::value_parser!(u64).range(1..))]
    pub max: Option<u64>,
    /// End when there is nothing to take, or when somebody has paused the consumer.
    ///
    /// A message that is to be delivered again later is not waited for. If neither the proxy nor NATS can be reached
    /// for 30 s, the command ends with an error.
    #[arg(long, help_heading = TAKING)]
    pub until_empty: bool,
    /// Take nothing: show the consumer, and say what would be done.
    #[arg(long, help_heading = TAKING)]
    pub dry_run: bool,
    /// Longest lease of a message. If it ends, the work is ended, and another worker gets the message [default: the longest lease of the replica]
    #[arg(long, value_name = "TIME", help_heading = TAKING, value_parser = values::time)]
    pub lease: Option<Duration>,
    /// How long the messages of this worker are kept for it after its connection has ended, from 3s to 1h.
    ///
    /// If this worker dies, other workers get its messages after this time. If the proxy is away for longer, the work
    /// is ended.
    #[arg(long, default_value = "10s", value_name = "TIME", help_heading = TAKING,
          value_parser = values::time)]
    pub grace: Duration,
    /// Name of this worker for operators [default: work, with the name of the host]
    #[arg(long, value_name = "NAME", help_heading = TAKING)]
    pub worker: Option<String>,
    /// Longest time of the work on one message. Then the work is ended, and the message is nacked [default: no limit, and 30s with --http]
    #[arg(long, value_name = "TIME", help_heading = TAKING, value_parser = values::time)]
    pub timeout: Option<Duration>,
    /// Time from SIGTERM to SIGKILL for a command that is ended, with its whole process group.
    #[arg(long, default_value = "5s", value_name = "TIME", help_heading = COMMANDS,
          value_parser = values::time)]
    pub kill_after: Duration,
    /// URL to which each message is posted.
    ///
    /// Redirects are not followed. While the server cannot be reached, few messages are taken.
    #[arg(long, value_name = "URL", help_heading = HTTP)]
    pub http: Option<String>,
    /// File with the certificate authorities (PEM) that the HTTP server is trusted by, in place of the system's.
    #[arg(long, requires = "http", value_name = "FILE", help_heading = HTTP)]
    pub http_ca: Option<PathBuf>,
    /// File with a bearer token for the HTTP server, read for each message.
    ///
    /// It is sent with TLS, or to this machine.
    #[arg(long, requires = "http", value_name = "FILE", help_heading = HTTP)]
    pub http_token_file: Option<PathBuf>,
    /// Delay of a Nak after the first attempt. Each further attempt doubles it.
    #[arg(long, default_value = "1s", value_name = "TIME", help_heading = FAILURE,
          value_parser = values::time)]
    pub retry_delay: Duration,
    /// Longest delay of a Nak, at most 24h.
    #[arg(long, default_value = "5m", value_name = "TIME", help_heading = FAILURE,
          value_parser = values::time)]
    pub max_retry_delay: Duration,
    /// With exit code 75, the last line of standard output is the delay: `90s`, or a number of seconds.
    #[arg(long, help_heading = FAILURE)]
    pub delay_from_output: bool,
    /// After SIGTERM or Ctrl-C, wait at most this time until all work has ended by itself.
    ///
    /// Then the work is ended, and its messages are given back. A second signal does this at once, with SIGKILL.
    #[arg(long, default_value = "30s", value_name = "TIME", help_heading = STOP,
          value_parser = values::time)]
    pub stop_timeout: Duration,
    /// Whose output is shown, below the line of its message.
    #[arg(long, default_value = "all", value_name = "MESSAGES", help_heading = OUTPUT)]
    pub output: OutputArg,
    /// Most bytes that are kept of each output of a command, the last ones, or of the body of an answer.
    #[arg(long, default_value_t = 64 * 1024, value_name = "BYTES", help_heading = OUTPUT,
          value_parser = values::number(1024..=16 * 1024 * 1024))]
    pub output_bytes: u32,
    /// Print JSON: one object for each message.
    #[arg(long, help_heading = OUTPUT)]
    pub json: bool,
    /// The command and its arguments.
    #[arg(
        last = true,
        required_unless_present = "http",
        conflicts_with = "http",
        value_name = "COMMAND"
    )]
    pub command: Vec<OsString>,
}

/// The messages whose output is shown.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum OutputArg {
    /// All messages.
    All,
    /// Messages that are not acked.
    Failed,
    /// No message.
    None,
}
