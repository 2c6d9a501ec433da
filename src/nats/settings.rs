//! The configuration of the connections to NATS.

use std::path::PathBuf;

use async_nats::ServerAddr;
use percent_encoding::percent_decode_str;

use super::auth::Auth;

/// The servers, and how to connect to them.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Servers to try, in any order.
    pub servers: Vec<ServerAddr>,
    /// The proxy's identity.
    pub auth: Auth,
    /// A PEM file of certificate authorities to trust instead of the system's.
    pub ca: Option<PathBuf>,
    /// Client certificate and key, both PEM files.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Whether TLS begins before the server's first message.
    pub tls_first: bool,
    /// JetStream domain, for an API prefix of `$JS.<domain>.API`.
    pub domain: Option<String>,
    /// First tokens of every inbox, so that NATS rights can name them.
    pub inbox_prefix: String,
}

impl Settings {
    /// The servers as URLs without user names and passwords, for people.
    pub fn redacted(&self) -> String {
        let server = |server: &ServerAddr| {
            format!("{}://{}:{}", server.scheme(), server.host(), server.port())
        };
        self.servers.iter().map(server).collect::<Vec<_>>().join(",")
    }

    /// The identity, which may stand in the URL of a server.
    pub(super) fn auth_of_any(&self) -> Auth {
        let of_url = matches!(self.auth, Auth::None)
            .then(|| self.servers.iter().find_map(user_of))
            .flatten();
        of_url.unwrap_or_else(|| self.auth.clone())
    }

    /// Whether the connection must be encrypted, whatever the server says. Otherwise an impostor would decide
    /// against TLS, and get the password.
    pub(super) fn requires_tls(&self) -> bool {
        self.ca.is_some() || self.identity.is_some() || self.tls_first
    }

    /// The subject of a JetStream API call, like `CONSUMER.INFO.ORDERS.worker`.
    pub(super) fn api(&self, call: &str) -> String {
        match &self.domain {
            Some(domain) => format!("$JS.{domain}.API.{call}"),
            None => format!("$JS.API.{call}"),
        }
    }
}

/// The user in a URL. A URL writes some characters as `%` and their number.
fn user_of(server: &ServerAddr) -> Option<Auth> {
    let read = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
    let user = read(server.username()?);
    Some(match server.password() {
        Some(password) => Auth::User(user, read(password)),
        None => Auth::Token(user),
    })
}

/// Reads a list of servers, separated by commas.
///
/// # Errors
/// The fault of the list or of one server, for people.
pub fn parse_servers(urls: &str) -> Result<Vec<ServerAddr>, String> {
    if urls.split(',').any(|url| url.trim().is_empty()) {
        return Err(
            "a server is missing: the list is empty, or a comma has no server before or after it"
                .to_owned(),
        );
    }
    let servers = urls.split(',').map(|url| url.trim().parse::<ServerAddr>());
    let servers: Vec<_> = servers.collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    // The library would connect to these over plain TCP, and skip TLS.
    if servers.iter().any(ServerAddr::is_websocket) {
        return Err("WebSocket is not supported: use nats:// or tls://".to_owned());
    }
    Ok(servers)
}
