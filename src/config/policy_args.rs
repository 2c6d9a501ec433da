//! The command line of keygen and of the policy commands, as clap parses it. `commands` gives it a meaning.
//!
//! The doc comments are the `--help` texts and `docs/reference/flags.md`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::access::{Identity, Verb};

const KEYGEN: &str = "\
Examples:
  (umask 077; fetch-proxy keygen > token-keys)
      Make a key for --token-key-file, which nobody else can read. Give the same file to every replica.

  fetch-proxy keygen --api-key laptop-anna
      Make an API key. The first line is the key, for the client. The second line is for the file of
      API keys, which a policy file names. The file has no secret: it has the SHA-256 of each key.";

const POLICY: &str = "\
A policy file says who is accepted, as which principal, and what each principal may do:

  version: 1
  authenticate:
    api_keys: {file: api-keys}           # lines that `fetch-proxy keygen --api-key NAME` prints
    jwt:                                 # JSON Web Tokens, one entry for each issuer
      - name: corp
        issuer: https://login.example    # the claim iss
        audiences: [fetch-proxy]         # the claim aud has one of them
        keys: {discovery: true}          # or {url: URL}, or {file: FILE}
  principals:
    - name: orders                       # the name in logs and in tokens
      match: [\"key:orders-*\"]            # key:NAME of an API key, jwt:ISSUER/SUB of a token,
                                         # k8s:NAMESPACE/NAME of a service account, dns:NAME or
                                         # spiffe://ID of a certificate, or anonymous
  rules:
    - principals: [orders]
      streams: [ORDERS]
      consumers: [worker, \"worker-*\"]    # `*` is any text, `?` is one character; quote a first `*`
      verbs: [work]                      # fetch, settle, extend; work is all three
                                         # others: settle-any, inspect, admin

Rules only allow. A call that no rule allows is denied. An identity is the first principal that matches.

Examples:
  fetch-proxy policy check policy.yaml
      Look for mistakes. Each mistake has its line and column.

  fetch-proxy policy check policy.yaml --as key:orders-1
      Show the principal of this identity, and the rules for it.

  fetch-proxy policy check policy.yaml --as key:orders-1 \\
                    --verb fetch --stream ORDERS --consumer worker
      Say whether this is allowed, and by which line.

  fetch-proxy policy diff old.yaml new.yaml
      Show what a new file changes, before it is used.";

/// The key to make.
#[derive(Debug, Args)]
#[command(after_help = KEYGEN)]
pub struct KeygenArgs {
    /// Make an API key with this name, in place of a key for --token-key-file.
    ///
    /// It prints two lines: the key for the client, and the line for the file of API keys. A client with
    /// the key has the identity key:NAME in a policy file. Two lines with one name are a rotation. Add
    /// expires=TIME to a line, such as expires=2027-01-31T00:00:00Z, to end a key by itself.
    #[arg(long, value_name = "NAME")]
    pub api_key: Option<String>,
}

/// The policy command to run.
#[derive(Debug, Args)]
#[command(after_help = POLICY)]
pub struct PolicyArgs {
    /// The command.
    #[command(subcommand)]
    pub command: PolicyCommand,
}

/// The commands about policy files.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Look for mistakes in a policy file, or explain a decision.
    ///
    /// The exit code is 0 for a file without a mistake, and 2 for a mistake. With --as, it is 0 for
    /// allowed and 1 for denied. Warnings are printed to standard error, and change no exit code.
    #[command(after_help = POLICY)]
    Check(PolicyCheckArgs),
    /// Show what differs between two policy files.
    ///
    /// The exit code is 0 if they mean the same, 1 if they differ, and 2 for a mistake. A line that
    /// begins with ! is a principal with a new name: its clients can no longer settle the messages that
    /// they hold.
    Diff(PolicyDiffArgs),
}

/// The policy file to check, and the decision to explain.
#[derive(Debug, Args)]
pub struct PolicyCheckArgs {
    /// The policy file.
    pub file: PathBuf,
    /// Explain what this identity may do, such as key:laptop-anna, spiffe://prod.example/ns/a,
    /// dns:worker.example or anonymous.
    #[arg(id = "as", long, value_name = "IDENTITY", value_parser = identity)]
    pub identity: Option<Identity>,
    /// Explain this verb: fetch, settle, extend, settle-any, inspect or admin.
    #[arg(long, value_name = "VERB", value_parser = verb, requires_all = ["as", "stream", "consumer"])]
    pub verb: Option<Verb>,
    /// Stream of the verb.
    #[arg(long, value_name = "STREAM", requires = "verb")]
    pub stream: Option<String>,
    /// Consumer of the verb.
    #[arg(long, value_name = "CONSUMER", requires = "verb")]
    pub consumer: Option<String>,
    /// Do not look at the files that the policy file names.
    #[arg(long)]
    pub offline: bool,
}

/// The policy files to compare.
#[derive(Debug, Args)]
pub struct PolicyDiffArgs {
    /// The policy file that is in use.
    pub old: PathBuf,
    /// The policy file that follows.
    pub new: PathBuf,
}

fn identity(text: &str) -> Result<Identity, String> {
    Identity::parse(text).map_err(|error| error.to_string())
}

fn verb(text: &str) -> Result<Verb, String> {
    Verb::named(text).ok_or_else(|| {
        let names: Vec<_> = Verb::ALL.into_iter().map(Verb::name).collect();
        format!("must be one of {}", names.join(", "))
    })
}
