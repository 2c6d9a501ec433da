//! The TLS flags of `serve`, as clap parses them. `config` gives them a meaning.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[derive(Debug, Args)]
#[command(next_help_heading = "TLS")]
pub(super) struct TlsArgs {
    /// File with the certificate of the client port (PEM), its own certificate first.
    ///
    /// With it, clients must speak TLS. The ops port has no TLS. A changed file is used for later
    /// connections within seconds. A wrong file changes nothing, and the log says so.
    #[arg(long, env = "FETCH_PROXY_TLS_CERT", value_name = "FILE")]
    pub(super) tls_cert: Option<PathBuf>,
    /// File with the key of the certificate (PEM), without a password.
    #[arg(long, env = "FETCH_PROXY_TLS_KEY", value_name = "FILE")]
    pub(super) tls_key: Option<PathBuf>,
    /// File with the certificate authorities (PEM) that sign certificates of clients.
    ///
    /// Clients then must show a certificate, and a policy knows them by its names. Give your own authority: a
    /// public one signs certificates of strangers. If an authority is removed from the file, connections with
    /// a client certificate end within seconds.
    #[arg(long, env = "FETCH_PROXY_TLS_CLIENT_CA", value_name = "FILE")]
    pub(super) tls_client_ca: Option<PathBuf>,
    /// Whether clients must show a certificate, with --tls-client-ca [default: require]
    #[arg(long, env = "FETCH_PROXY_TLS_CLIENT_AUTH", value_name = "WHEN")]
    pub(super) tls_client_auth: Option<ClientAuthArg>,
    /// Lowest version of TLS [default: 1.3]
    ///
    /// Version 1.2 is for clients that cannot speak 1.3, such as old versions of .NET.
    #[arg(long, env = "FETCH_PROXY_TLS_MIN", value_name = "VERSION")]
    pub(super) tls_min: Option<TlsMinArg>,
}

/// Whether clients must show a certificate.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum ClientAuthArg {
    /// A client without a certificate is refused.
    Require,
    /// A client may come without a certificate. A wrong certificate is refused.
    Optional,
}

/// The lowest version of TLS.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum TlsMinArg {
    #[value(name = "1.2")]
    Tls12,
    #[value(name = "1.3")]
    Tls13,
}
