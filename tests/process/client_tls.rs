//! TLS on the client port: its files and their rotation, certificates of clients, and what other
//! protocols are told there.

mod clients;
mod files;
mod protocols;
mod rights;
mod rotation;

use std::{fs, io, os::unix::fs::symlink, path::PathBuf, sync::Arc, time::Duration};

use fetch_proxy::pb::fetch_service_client::FetchServiceClient;
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    version::{TLS12, TLS13},
};
use tempfile::TempDir;
use testkit::{
    authority::{Authority, Signed},
    proxy::{Client, Proxy},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

/// No NATS is there: for tests that take no message.
const NOWHERE: &str = "nats://127.0.0.1:1";
/// How long a proxy takes at most to use new files: a look every two seconds, on a busy machine.
const SEEN: Duration = Duration::from_secs(8);

/// A folder like that of a Secret in a pod: the files are links into a folder that is swapped as a whole.
struct Mounted {
    folder: TempDir,
    version: u32,
}

impl Mounted {
    fn new(server: &Signed, client_ca: &str) -> Self {
        let mut mounted = Self { folder: tempfile::tempdir().unwrap(), version: 0 };
        for name in ["tls.crt", "tls.key", "ca.crt"] {
            symlink(format!("..data/{name}"), mounted.folder.path().join(name)).unwrap();
        }
        mounted.swap(&server.cert, &server.key, client_ca);
        mounted
    }

    /// Replaces all files at once, as the kubelet does.
    fn swap(&mut self, cert: &str, key: &str, client_ca: &str) {
        self.version += 1;
        let data = format!("..{}", self.version);
        let root = self.folder.path();
        fs::create_dir(root.join(&data)).unwrap();
        for (name, text) in [("tls.crt", cert), ("tls.key", key), ("ca.crt", client_ca)] {
            fs::write(root.join(&data).join(name), text).unwrap();
        }
        symlink(&data, root.join("..new")).unwrap();
        fs::rename(root.join("..new"), root.join("..data")).unwrap();
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// The flags for a certificate and a key.
    fn flags(&self) -> Vec<String> {
        let [cert, key] = ["tls.crt", "tls.key"].map(|name| self.file(name));
        ["--tls-cert", &cert, "--tls-key", &key].map(str::to_owned).to_vec()
    }

    /// The flags that also ask for certificates of clients.
    fn client_flags(&self) -> Vec<String> {
        let ca = ["--tls-client-ca".to_owned(), self.file("ca.crt")];
        [self.flags(), ca.to_vec()].concat()
    }
}

fn start(nats_url: &str, flags: &[String], more: &[&str]) -> Proxy {
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
    Proxy::start_at(nats_url, &flags)
}

/// A new connection of a gRPC client.
async fn client(proxy: &Proxy, ca: &str, identity: Option<&Signed>) -> Result<Client, String> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
    if let Some(Signed { cert, key, .. }) = identity {
        tls = tls.identity(Identity::from_pem(cert, key));
    }
    let endpoint = Endpoint::from_shared(format!("https://{}", proxy.grpc)).unwrap();
    let endpoint = endpoint.tls_config(tls).unwrap();
    let channel = endpoint.connect().await.map_err(|error| format!("{error:?}"))?;
    Ok(FetchServiceClient::new(channel))
}

/// A raw TLS client, which offers these protocols.
fn raw(
    ca: &Authority,
    versions: &[&'static SupportedProtocolVersion],
    alpn: &[&[u8]],
    identity: Option<&Signed>,
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        Some(Signed { der, key, .. }) => {
            let chain = vec![CertificateDer::from(der.clone())];
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    Arc::new(config)
}

/// The usual raw client.
fn h2(ca: &Authority, identity: Option<&Signed>) -> Arc<ClientConfig> {
    raw(ca, &[&TLS13, &TLS12], &[b"h2"], identity)
}

async fn connect(proxy: &Proxy, config: &Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(&proxy.grpc).await?;
    let name = ServerName::try_from("127.0.0.1").unwrap();
    TlsConnector::from(config.clone()).connect(name, stream).await
}

/// Begins HTTP/2, and waits for the SETTINGS of the server: then it has accepted the client.
async fn begin_http2(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
    stream.flush().await?;
    let read = timeout(testkit::BOUND, frame(stream)).await;
    let (kind, ..) = read.expect("neither an answer nor an end")?;
    assert_eq!(kind, SETTINGS);
    Ok(())
}

const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;

/// The kind, the flags and the content of the next frame of HTTP/2.
async fn frame(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(u8, u8, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await?;
    let mut content = vec![0; usize::from(head[1]) * 256 + usize::from(head[2])];
    stream.read_exact(&mut content).await?;
    Ok((head[3], head[4], content))
}

/// Whether the server accepts this client, and its error otherwise.
async fn is_served(proxy: &Proxy, config: &Arc<ClientConfig>) -> Result<(), String> {
    let accepted = async {
        let mut stream = connect(proxy, config).await?;
        begin_http2(&mut stream).await
    };
    accepted.await.map_err(|error| error.to_string())
}

/// The certificate that the server shows to a new connection, as DER.
async fn leaf(proxy: &Proxy, config: &Arc<ClientConfig>) -> Vec<u8> {
    let stream = connect(proxy, config).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

/// The number of log lines with this text.
fn said(proxy: &Proxy, text: &str) -> usize {
    proxy.log().matches(text).count()
}

/// A path that is not there.
fn nowhere() -> PathBuf {
    PathBuf::from("/nowhere/tls.pem")
}
