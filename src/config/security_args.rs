//! The command line of the rights of callers, as clap parses it. `config` gives it a meaning.
//!
//! The doc comments are the `--help` texts and `docs/reference/flags.md`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::admin_socket::AdminSocket;
use crate::audit::AuditScope;

#[derive(Debug, Args)]
#[command(next_help_heading = "Security")]
pub(super) struct SecurityArgs {
    /// File that says which callers are accepted, and what each of them may do.
    ///
    /// `fetch-proxy policy --help` shows such a file. A changed file is read again. If it has a mistake,
    /// the rights stay as they were. Without a file, everybody who reaches the port may do everything.
    #[arg(long, env = "FETCH_PROXY_POLICY_FILE", value_name = "FILE")]
    pub(super) policy_file: Option<PathBuf>,
    /// Listen beyond loopback although callers need no credential.
    ///
    /// Then everybody who reaches the port can take and settle what the policy gives to callers without
    /// a credential, and without a policy everything. It includes --plaintext.
    #[arg(long, env = "FETCH_PROXY_INSECURE",
          value_parser = clap::builder::BoolishValueParser::new())]
    pub(super) insecure: bool,
    /// Listen beyond loopback although there is no TLS on this port.
    ///
    /// For a mesh or an ingress that speaks TLS in front of this port. Otherwise everybody on the way can
    /// read credentials and messages.
    #[arg(long, env = "FETCH_PROXY_PLAINTEXT",
          value_parser = clap::builder::BoolishValueParser::new())]
    pub(super) plaintext: bool,
    /// Events that have a line for auditors in the log.
    ///
    /// The lines have the field `target` with the value `audit`. --log-level does not filter them.
    #[arg(long, env = "FETCH_PROXY_AUDIT", default_value = "denied", value_name = "EVENTS")]
    pub(super) audit: AuditArg,
    /// Socket for operators on this machine: `@NAME`, a path, or `off` [default: NAME is fetch-proxy-PORT]
    ///
    /// PORT is the port of --ops-listen. Only processes of the same user and of root are served there.
    /// `@NAME` is no file, and exists on Linux alone. Elsewhere the default is a file in the temporary
    /// folder.
    #[arg(long, env = "FETCH_PROXY_ADMIN_SOCKET", value_name = "NAME")]
    pub(super) admin_socket: Option<AdminSocket>,
    /// Whether tools can read the contract from the client port.
    #[arg(long, env = "FETCH_PROXY_REFLECTION", default_value = "on", value_name = "SWITCH")]
    pub(super) reflection: SwitchArg,
}

/// A switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum SwitchArg {
    On,
    Off,
}

/// The events that have a line. Each value includes those before it.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum AuditArg {
    /// None.
    Off,
    /// Changes by operators, such as a new policy.
    Admin,
    /// Callers that are refused, and tokens that are settled by another principal.
    Denied,
    /// Calls that are allowed, one line each. Every call costs more then.
    All,
}

impl From<AuditArg> for AuditScope {
    fn from(typed: AuditArg) -> Self {
        match typed {
            AuditArg::Off => Self::Off,
            AuditArg::Admin => Self::Admin,
            AuditArg::Denied => Self::Denied,
            AuditArg::All => Self::All,
        }
    }
}
