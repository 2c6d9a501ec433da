//! Makes the settings of a TLS listener from the texts of its files. Knows which versions, protocols and
//! sessions are allowed. Reads no file.

use std::{collections::BTreeSet, io, path::PathBuf, sync::Arc, time::Duration};

use rustls::{
    Error, RootCertStore, ServerConfig, SupportedProtocolVersion,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
    version::{TLS12, TLS13},
};

use super::certificate;
use crate::secrets::FileFault;

/// The one protocol that is offered: HTTP/2. Some clients refuse a server that chooses none.
const ALPN: &[u8] = b"h2";

/// The files of a TLS listener, and what it demands.
#[derive(Debug, Clone)]
pub struct TlsSettings {
    /// The certificate chain, leaf first.
    pub cert: PathBuf,
    /// The key of the leaf.
    pub key: PathBuf,
    /// The authorities of client certificates. `None`: clients are not asked for a certificate.
    pub client_ca: Option<PathBuf>,
    /// Whether clients must show a certificate.
    pub client_auth: ClientAuth,
    /// The lowest version of TLS.
    pub min: TlsVersion,
}

/// Whether clients must show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// A client without a certificate is refused.
    Require,
    /// A client may come without a certificate. A wrong certificate is refused.
    Optional,
}

/// A version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsVersion {
    /// TLS 1.2, and versions above it.
    Tls12,
    /// TLS 1.3.
    Tls13,
}

/// The reason why the files cannot be used. It never shows a key.
#[derive(Debug, thiserror::Error)]
pub enum TlsFileError {
    /// A file cannot be read.
    #[error("{flag}: cannot read {}: {error}", path.display())]
    Unreadable {
        /// The flag that names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        error: io::Error,
    },
    /// A file contains something else.
    #[error("{flag}: {}: {why}", path.display())]
    Invalid {
        /// The flag that names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// The mistake in it.
        why: String,
    },
    /// The key does not belong to the certificate.
    #[error("--tls-key: {} is not the key of the certificate in {}", key.display(), cert.display())]
    Mismatch {
        /// The file of the certificate.
        cert: PathBuf,
        /// The file of the key.
        key: PathBuf,
    },
}

/// Looks at a key that does not belong to the certificate, until that is an error. A rotation writes two
/// files, one after the other.
const MISMATCHED_LOOKS: u32 = 3;

impl FileFault for TlsFileError {
    fn looks_until_news(&self) -> u32 {
        if matches!(self, Self::Mismatch { .. }) { MISMATCHED_LOOKS } else { 1 }
    }
}

/// The texts of the files.
#[derive(PartialEq, Eq)]
pub(super) struct Texts {
    pub(super) cert: String,
    pub(super) key: String,
    pub(super) client_ca: Option<String>,
}

impl TlsSettings {
    pub(super) fn cert_file(&self) -> (&'static str, &PathBuf) {
        ("--tls-cert", &self.cert)
    }

    pub(super) fn key_file(&self) -> (&'static str, &PathBuf) {
        ("--tls-key", &self.key)
    }

    pub(super) fn client_ca_file(&self) -> Option<(&'static str, &PathBuf)> {
        self.client_ca.as_ref().map(|path| ("--tls-client-ca", path))
    }
}

/// What the texts say.
pub(super) struct Material {
    pub(super) config: Arc<ServerConfig>,
    /// The authorities of client certificates, as DER.
    pub(super) authorities: BTreeSet<Vec<u8>>,
    /// The begin and the end of our certificate, since the Unix epoch. `None`: it cannot be read.
    pub(super) validity: Option<(Duration, Duration)>,
}

/// The settings for these texts.
///
/// # Errors
/// [`TlsFileError::Invalid`] and [`TlsFileError::Mismatch`].
pub(super) fn material(texts: &Texts, settings: &TlsSettings) -> Result<Material, TlsFileError> {
    // Never the default of the process: another library could have set another provider, or none.
    let provider = Arc::new(ring::default_provider());
    let versions: &[&SupportedProtocolVersion] = match settings.min {
        TlsVersion::Tls12 => &[&TLS13, &TLS12],
        TlsVersion::Tls13 => &[&TLS13],
    };
    let identity = identity(texts, settings, &provider)?;
    let validity = identity.end_entity_cert().ok().and_then(|leaf| certificate::validity(leaf));
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(|error| invalid(settings.cert_file(), error))?;
    let (builder, authorities) = match (settings.client_ca_file(), &texts.client_ca) {
        (Some(file), Some(text)) => {
            let authorities = certificates(file, text)?;
            let mut roots = RootCertStore::empty();
            for (place, authority) in (1..).zip(&authorities) {
                let added = roots.add(authority.clone());
                added.map_err(|error| invalid(file, format!("certificate {place}: {error}")))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let verifier = match settings.client_auth {
                ClientAuth::Require => verifier,
                ClientAuth::Optional => verifier.allow_unauthenticated(),
            };
            let verifier = verifier.build().map_err(|error| invalid(file, error))?;
            (builder.with_client_cert_verifier(verifier), authorities)
        }
        _ => (builder.with_no_client_auth(), Vec::new()),
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(identity)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    if settings.client_ca.is_some() {
        // A resumed session shows the former certificate of its client, and nobody verifies it again.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    let authorities = authorities.iter().map(|authority| authority.to_vec()).collect();
    Ok(Material { config: Arc::new(config), authorities, validity })
}

fn identity(
    texts: &Texts,
    settings: &TlsSettings,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, TlsFileError> {
    let chain = certificates(settings.cert_file(), &texts.cert)?;
    let key = PrivateKeyDer::from_pem_slice(texts.key.as_bytes()).map_err(|error| {
        let missing = matches!(error, pem::Error::NoItemsFound);
        let why = if missing {
            "no private key in PEM is in it, without a password"
        } else {
            "it is not valid PEM"
        };
        invalid(settings.key_file(), why)
    })?;
    // The key is read by itself first, so that its own fault is told as such.
    let known = provider.key_provider.load_private_key(key.clone_key());
    known.map_err(|_| invalid(settings.key_file(), "the private key cannot be used"))?;
    CertifiedKey::from_der(chain, key, provider).map_err(|error| {
        if matches!(error, Error::InconsistentKeys(_)) {
            TlsFileError::Mismatch { cert: settings.cert.clone(), key: settings.key.clone() }
        } else {
            invalid(settings.cert_file(), error)
        }
    })
}

fn certificates(
    file: (&'static str, &PathBuf),
    text: &str,
) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let read = read.map_err(|_| invalid(file, "it is not valid PEM"))?;
    if read.is_empty() { Err(invalid(file, "no certificate in PEM is in it")) } else { Ok(read) }
}

fn invalid((flag, path): (&'static str, &PathBuf), why: impl ToString) -> TlsFileError {
    TlsFileError::Invalid { flag, path: path.clone(), why: why.to_string() }
}
