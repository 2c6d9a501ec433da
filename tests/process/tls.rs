//! TLS to NATS. If TLS is required, a server without it receives nothing. With TLS, both sides
//! check certificates, and changed certificates are used without a restart.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use async_nats::ConnectOptions;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::{NatsServer, binary},
    proxy::Proxy,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::identity::fetches_and_acks;

/// An authority, one certificate of it for a server at 127.0.0.1, and one for a client, in files.
struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    fn write(folder: &Path) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        save(&folder.join("ca.crt"), "CERTIFICATE", params.self_signed(&key).unwrap().der());
        let authority = Issuer::new(params, key);
        for (name, usage) in [
            ("server", ExtendedKeyUsagePurpose::ServerAuth),
            ("client", ExtendedKeyUsagePurpose::ClientAuth),
        ] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
            params.extended_key_usages = vec![usage];
            let certificate = params.signed_by(&key, &authority).unwrap();
            save(&folder.join(format!("{name}.crt")), "CERTIFICATE", certificate.der());
            save(&folder.join(format!("{name}.key")), "PRIVATE KEY", &key.serialize_der());
        }
        Self { folder: folder.to_owned() }
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).to_str().unwrap().to_owned()
    }

    /// A server that shows its certificate, and wants to see the client's.
    fn server(&self) -> String {
        let [ca, cert, key] = ["ca.crt", "server.crt", "server.key"].map(|name| self.file(name));
        format!("tls {{ cert_file: {cert:?}, key_file: {key:?}, ca_file: {ca:?}, verify: true }}")
    }

    fn trust(&self) -> [String; 2] {
        ["--nats-ca".to_owned(), self.file("ca.crt")]
    }

    fn identity(&self) -> [String; 4] {
        let [cert, key] = ["client.crt", "client.key"].map(|name| self.file(name));
        ["--nats-cert".to_owned(), cert, "--nats-key".to_owned(), key]
    }
}

/// As PEM.
fn save(file: &Path, label: &str, der: &[u8]) {
    let text = STANDARD.encode(der);
    fs::write(file, format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")).unwrap();
}

fn start(nats_url: &str, flags: &[String]) -> Proxy {
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Proxy::start_at(nats_url, &flags)
}

#[tokio::test]
async fn both_sides_check_certificates_and_use_new_ones() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = Certificates::write(folder.path());
    let mut server = NatsServer::start_with(binary(), Some(certificates.server()));
    let options = ConnectOptions::new()
        .add_root_certificates(certificates.file("ca.crt").into())
        .add_client_certificate(
            certificates.file("client.crt").into(),
            certificates.file("client.key").into(),
        );
    let fixture = Fixture::of(options.connect(server.url()).await.unwrap(), config()).await;
    let flags = [&certificates.trust()[..], &certificates.identity()].concat();
    let proxy = start(&server.url(), &flags);
    fetches_and_acks(&proxy, &fixture).await;

    server.stop();
    Certificates::write(folder.path());
    server.restart();
    let connected = || async {
        let made = proxy.log().matches("connected to NATS").count();
        (made == 4).then_some(())
    };
    eventually("both connections to be replaced", connected).await;
}

/// Such a server says nothing before the TLS handshake.
#[tokio::test]
async fn server_with_handshake_first_needs_the_flag_that_the_log_names() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = Certificates::write(folder.path());
    let tls = certificates.server().replace("verify: true", "verify: true, handshake_first: true");
    let server = NatsServer::start_with(binary(), Some(tls));
    let without = [&certificates.trust()[..], &certificates.identity()].concat();
    let with = [&without[..], &["--nats-tls-first".to_owned()]].concat();
    let proxy = start(&server.url(), &without);
    let hint = "needs --nats-tls-first";
    eventually("the hint", || async { proxy.log().contains(hint).then_some(()) }).await;
    assert!(!proxy.log().contains("connected to NATS"), "{}", proxy.log());
    let proxy = start(&server.url(), &with);
    proxy.ready().await;
    assert!(!proxy.log().contains(hint), "{}", proxy.log());
}

#[tokio::test]
async fn untrusted_certificate_on_either_side_is_refused() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [ours, others] = [0, 1].map(|place| Certificates::write(folders[place].path()));
    let server = NatsServer::start_with(binary(), Some(ours.server()));
    for (who, flags) in [
        ("no certificate", ours.trust().to_vec()),
        ("another's certificate", [&ours.trust()[..], &others.identity()].concat()),
        ("another's server", [&others.trust()[..], &ours.identity()].concat()),
        ("an unknown authority's server", ours.identity().to_vec()),
    ] {
        let proxy = start(&server.url(), &flags);
        eventually(who, || async { proxy.log().contains("cannot be reached").then_some(()) }).await;
        assert!(!proxy.log().contains("connected to NATS"), "{who}: {}", proxy.log());
    }
}

/// Listens like a nats-server without TLS, and keeps the received text of each connection.
async fn eavesdropper() -> (u16, Arc<Mutex<Vec<Vec<u8>>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
    let hearing = heard.clone();
    let info = serde_json::json!({
        "server_id": "S", "server_name": "S", "version": "2.15.1", "go": "go", "host": "127.0.0.1",
        "port": port, "headers": true, "max_payload": 1_048_576, "proto": 1, "auth_required": true,
    });
    tokio::spawn(async move {
        while let Ok((mut peer, _)) = listener.accept().await {
            let (info, hearing) = (format!("INFO {info}\r\n"), hearing.clone());
            tokio::spawn(async move {
                let mut said = vec![0; 4096];
                peer.write_all(info.as_bytes()).await.unwrap();
                let length = peer.read(&mut said).await.unwrap_or_default();
                said.truncate(length);
                hearing.lock().unwrap().push(said);
            });
        }
    });
    (port, heard)
}

#[tokio::test]
async fn server_without_tls_receives_nothing_if_tls_is_required() {
    let folder = tempfile::tempdir().unwrap();
    let certificates = Certificates::write(folder.path());
    for (scheme, flags) in [
        ("nats", certificates.trust().to_vec()),
        ("nats", certificates.identity().to_vec()),
        ("tls", Vec::new()),
        ("nats", vec!["--nats-tls-first".to_owned()]),
    ] {
        let (port, heard) = eavesdropper().await;
        let proxy = start(&format!("{scheme}://user:hunter2@127.0.0.1:{port}"), &flags);
        // Two connections, and what follows a first failure.
        eventually("some attempts", || async { (heard.lock().unwrap().len() > 4).then_some(()) })
            .await;
        for said in heard.lock().unwrap().iter().filter(|said| !said.is_empty()) {
            let handshake = 0x16;
            assert_eq!(said[0], handshake, "{flags:?}: {}", String::from_utf8_lossy(said));
        }
        drop(proxy);
    }
    let plain = NatsServer::start();
    let proxy = start(&plain.url(), &certificates.trust());
    eventually("the refusal", || async { proxy.log().contains("cannot be reached").then_some(()) })
        .await;
    assert!(!proxy.log().contains("connected to NATS"), "{}", proxy.log());
}
