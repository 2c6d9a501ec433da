//! Connects to a fetch-proxy by the address that an operator types.

use std::{borrow::Cow, time::Duration};

use tonic::transport::{Channel, Endpoint};

/// Connects to a host and port, or to a URL.
///
/// # Errors
/// The reason why there is no connection, as text.
pub(super) async fn connect(addr: &str, patience: Duration) -> Result<Channel, String> {
    let addr = &*reachable(addr);
    let url = if addr.contains("://") { addr.to_owned() } else { format!("http://{addr}") };
    let wrong = |error| format!("cannot connect to {addr}: {}", chain(&error));
    let endpoint = Endpoint::from_shared(url).map_err(wrong)?.connect_timeout(patience);
    endpoint.connect().await.map_err(wrong)
}

/// Replaces the address of all interfaces by the address of this machine: nobody can connect to the former.
fn reachable(addr: &str) -> Cow<'_, str> {
    let port = ["0.0.0.0:", "[::]:", ":"].iter().find_map(|all| addr.strip_prefix(all));
    port.map_or(addr.into(), |port| format!("127.0.0.1:{port}").into())
}

/// The text of an error and of its causes. tonic's own text leaves the causes out.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
