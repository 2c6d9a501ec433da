//! What can be typed to take and settle messages by hand. Says nothing of what it means.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::values;

const TAKE: &str = "\
Example:
  fetch-proxy fetch ORDERS worker -n 3 --lease 5m
      Up to three messages, yours for five minutes, each with the token that settles it.

  fetch-proxy ack TOKEN
      Done with one of them. What is not settled comes back when its lease ends.

In a container that serves: kubectl exec POD -- /fetch-proxy fetch ORDERS worker";

/// Whom to ask, and how to show the answer.
#[derive(Debug, Args)]
pub struct CallArgs {
    /// Where a fetch-proxy serves.
    #[arg(
        long,
        env = "FETCH_PROXY_LISTEN",
        default_value = "127.0.0.1:50051",
        value_name = "ADDR"
    )]
    pub addr: String,
    /// Print the JSON of the contract, as grpcurl does: for programs.
    #[arg(long)]
    pub json: bool,
}

/// What to take.
#[derive(Debug, Args)]
#[command(after_help = TAKE)]
pub struct FetchArgs {
    /// Whom to ask.
    #[command(flatten)]
    pub call: CallArgs,
    /// The stream.
    pub stream: String,
    /// A pull consumer of it.
    pub consumer: String,
    /// Most messages to take, 1000 at most.
    #[arg(short, long = "count", default_value_t = 1, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(1..=values::MAX_COUNT as i64))]
    pub n: u32,
    /// How long to wait for a first message.
    #[arg(long, default_value = "5s", value_name = "TIME", value_parser = values::time)]
    pub max_wait: Duration,
    /// How long they are yours; unset: about as long as the consumer's ack wait.
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    pub lease: Option<Duration>,
    /// How payloads are checked. What fails `text` or `json` is terminated.
    #[arg(long, default_value = "auto", value_name = "CODEC")]
    pub codec: CodecArg,
}

/// How payloads are checked.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum CodecArg {
    /// Not at all; shown as text where it is text.
    Auto,
    /// Must be UTF-8.
    Text,
    /// Must be JSON.
    Json,
}

/// Which messages are done.
#[derive(Debug, Args)]
pub struct AckArgs {
    /// Whom to ask.
    #[command(flatten)]
    pub call: CallArgs,
    /// Tokens, as `fetch` printed them; blanks and quotes around them do not matter.
    #[arg(required = true, value_name = "TOKEN")]
    pub tokens: Vec<String>,
}

/// Which messages are to be delivered again.
#[derive(Debug, Args)]
pub struct NakArgs {
    /// Which.
    #[command(flatten)]
    pub ack: AckArgs,
    /// Not before this; unset: at once.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = values::time)]
    pub delay: Duration,
}

/// Which messages are never to be delivered again.
#[derive(Debug, Args)]
pub struct TermArgs {
    /// Which.
    #[command(flatten)]
    pub ack: AckArgs,
    /// Why, for JetStream's advisory.
    #[arg(long, default_value = "terminated by hand", value_name = "TEXT")]
    pub reason: String,
}

/// Which leases are to end later, or sooner.
#[derive(Debug, Args)]
pub struct ExtendArgs {
    /// Which.
    #[command(flatten)]
    pub ack: AckArgs,
    /// They end this long from now; unset, each lasts for as long as it was granted.
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    pub lease: Option<Duration>,
}
