//! Certificate authorities, and the certificates that they sign.

use std::{fs, path::Path, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::{
    ServerConfig,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

/// An authority with a key of its own.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, as PEM.
#[derive(Clone)]
pub struct Signed {
    pub cert: String,
    pub key: String,
    /// The certificate as DER.
    pub der: Vec<u8>,
}

impl Signed {
    /// The TLS of a server with this certificate. It asks its clients for none.
    pub fn server_tls(&self) -> Arc<ServerConfig> {
        let cert = CertificateDer::from_pem_slice(self.cert.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert], key);
        Arc::new(config.unwrap())
    }
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = pem("CERTIFICATE", params.self_signed(&key).unwrap().der());
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// The certificate of the authority, as PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for a server on this machine.
    pub fn server(&self) -> Signed {
        self.server_by(|_| ())
    }

    /// The same, with more in it.
    pub fn server_by(&self, change: impl FnOnce(&mut CertificateParams)) -> Signed {
        let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        let mut params = params(&names, ExtendedKeyUsagePurpose::ServerAuth);
        change(&mut params);
        self.sign(params)
    }

    /// A certificate for a client with this DNS name.
    pub fn client(&self, name: &str) -> Signed {
        self.client_by(name, |_| ())
    }

    /// The same, with more in it.
    pub fn client_by(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Signed {
        let mut params = params(&[name.to_owned()], ExtendedKeyUsagePurpose::ClientAuth);
        change(&mut params);
        self.sign(params)
    }

    /// A certificate for a client with this URI alone.
    pub fn workload(&self, uri: &str) -> Signed {
        self.client_by("unnamed", |params| {
            params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        })
    }

    fn sign(&self, params: CertificateParams) -> Signed {
        let key = KeyPair::generate().unwrap();
        let der = params.signed_by(&key, &self.issuer).unwrap().der().to_vec();
        let key = pem("PRIVATE KEY", &key.serialize_der());
        Signed { cert: pem("CERTIFICATE", &der), key, der }
    }
}

impl Signed {
    /// Writes `NAME.crt` and `NAME.key` into a folder.
    pub fn write(&self, folder: &Path, name: &str) {
        fs::write(folder.join(format!("{name}.crt")), &self.cert).unwrap();
        fs::write(folder.join(format!("{name}.key")), &self.key).unwrap();
    }
}

fn params(names: &[String], usage: ExtendedKeyUsagePurpose) -> CertificateParams {
    let mut params = CertificateParams::new(names).unwrap();
    params.extended_key_usages = vec![usage];
    params
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    // Some readers accept no longer lines.
    let lines = text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line));
    let text = lines.collect::<Vec<_>>().join("\n");
    format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
}
