//! Connects to a fetch-proxy by the address and the files that an operator types.

use std::{
    borrow::Cow,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// How a client checks the server, and who it says it is. It is used for an address with `https://` alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// The certificate authorities to trust. `None`: those of the system.
    pub ca: Option<PathBuf>,
    /// The certificate of the client.
    pub cert: Option<PathBuf>,
    /// The key of that certificate.
    pub key: Option<PathBuf>,
    /// The name in the certificate of the server. `None`: the host of the address.
    pub server_name: Option<String>,
}

/// Connects to a host and port, or to a URL.
///
/// # Errors
/// The reason why there is no connection, as text.
pub(super) async fn connect(
    addr: &str,
    tls: &ClientTls,
    patience: Duration,
) -> Result<Channel, String> {
    let connected = endpoint(addr, tls, patience)?.connect().await;
    connected.map_err(|error| {
        let (place, why) = (reachable(addr), chain(&error));
        // A port without TLS answers a handshake with a fatal alert, or with bytes that are no TLS.
        let plain = ["ProtocolVersion", "InvalidContentType"].iter().any(|said| why.contains(said));
        let cure = if plain { "; a port without TLS has an address without https://" } else { "" };
        format!("cannot connect to {place}, and nothing was sent: {why}{cure}")
    })
}

/// The place to connect to. Its files are read.
///
/// # Errors
/// The address or a file cannot be used, as text. Repeating does not help.
pub(super) fn endpoint(
    addr: &str,
    tls: &ClientTls,
    patience: Duration,
) -> Result<Endpoint, String> {
    let addr = &*reachable(addr);
    if !addr.contains("://") && !addr.contains(':') {
        return Err(format!("the address {addr} has no port: give NAME:PORT, or a URL"));
    }
    let url = if addr.contains("://") { addr.to_owned() } else { format!("http://{addr}") };
    let wrong = |error| format!("cannot connect to {addr}: {}", chain(&error));
    let endpoint = Endpoint::from_shared(url.clone()).map_err(wrong)?.connect_timeout(patience);
    if url.starts_with("https://") {
        return endpoint.tls_config(config(tls)?).map_err(wrong);
    }
    if *tls != ClientTls::default() {
        return Err(format!(
            "--ca, --cert, --key and --server-name need an address that begins with https://, and \
             {addr} does not"
        ));
    }
    Ok(endpoint)
}

/// Connects to the socket of a process on this machine: `@` and a name that is no file, or a path.
///
/// # Errors
/// The reason why there is no connection, as text.
pub(super) async fn connect_here(name: &str, patience: Duration) -> Result<Channel, String> {
    let wrong = |error| format!("cannot connect to the admin socket {name}: {}", chain(&error));
    // Nobody looks this address up: the connector decides.
    let endpoint = Endpoint::from_static("http://localhost").connect_timeout(patience);
    let path = name.strip_prefix('@').map_or_else(|| name.to_owned(), |name| format!("\0{name}"));
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    endpoint.connect_with_connector(connector).await.map_err(wrong)
}

fn config(tls: &ClientTls) -> Result<ClientTlsConfig, String> {
    let ClientTls { ca, cert, key, server_name } = tls;
    let mut config = match ca {
        Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("--ca", ca)?)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    config = match (cert, key) {
        (Some(cert), Some(key)) => {
            config.identity(Identity::from_pem(read("--cert", cert)?, read("--key", key)?))
        }
        (None, None) => config,
        _ => return Err("--cert and --key must be given together".to_owned()),
    };
    Ok(match server_name {
        Some(name) => config.domain_name(name),
        None => config,
    })
}

fn read(flag: &str, path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{flag}: cannot read {}: {error}", path.display()))
}

/// Replaces the address of all interfaces by the address of this machine: nobody can connect to the former.
pub(super) fn reachable(addr: &str) -> Cow<'_, str> {
    let port = ["0.0.0.0:", "[::]:", ":"].iter().find_map(|all| addr.strip_prefix(all));
    port.map_or(addr.into(), |port| format!("127.0.0.1:{port}").into())
}

/// The text of an error and of its causes. tonic's own text leaves the causes out, and says only where it failed.
/// The causes of hyper repeat each other.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut texts: Vec<String> = Vec::new();
    for text in causes.map(ToString::to_string) {
        match texts.last_mut() {
            Some(last) if last == "transport error" || text.starts_with(&**last) => *last = text,
            Some(last) if last.ends_with(&text) => {}
            _ => texts.push(text),
        }
    }
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use std::{error::Error, fmt};

    use super::*;

    /// An error with this text, and its cause.
    #[derive(Debug)]
    struct Said(&'static str, Option<Box<Self>>);

    impl fmt::Display for Said {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Said {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as _)
        }
    }

    #[test]
    fn cause_is_named_once() {
        for (texts, shown) in [
            (&["transport error"][..], "transport error"),
            (
                &["transport error", "dns error", "dns error: no such name"],
                "dns error: no such name",
            ),
            (&["transport error", "refused", "refused"], "refused"),
            (&["no answer: closed", "closed", "by the peer"], "no answer: closed: by the peer"),
        ] {
            let error =
                texts.iter().rev().fold(None, |cause, text| Some(Box::new(Said(text, cause))));
            assert_eq!(chain(&*error.unwrap()), shown);
        }
    }

    #[test]
    fn address_without_a_port_is_refused_unless_its_scheme_names_the_port() {
        let wait = Duration::from_secs(1);
        let error = |addr| endpoint(addr, &ClientTls::default(), wait).err();
        assert!(error("localhost").unwrap().contains("has no port"));
        for addr in ["localhost:1", ":1", "[::1]:1", "http://localhost"] {
            assert_eq!(error(addr), None, "{addr}");
        }
    }
}
