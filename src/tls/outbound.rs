//! TLS to a server that this process asks for something.

use std::{io, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::{net::TcpStream, task::spawn_blocking};
use tokio_rustls::TlsConnector;

/// An encrypted connection to a server.
pub type OutboundTls = tokio_rustls::client::TlsStream<TcpStream>;

/// Makes the handshake with the server of this name. `authorities` are trusted alone, as PEM. `None`: those of the
/// system. `identity` is the certificate of this process with its key, as PEM, for a server that asks for one.
///
/// # Errors
/// The authorities or the identity cannot be read, or the server is not trusted, or the connection ends.
pub async fn secure(
    stream: TcpStream,
    host: &str,
    authorities: Option<&str>,
    identity: Option<(&str, &str)>,
) -> io::Result<OutboundTls> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why.to_owned());
    let name = ServerName::try_from(host.to_owned());
    let name = name.map_err(|_| invalid("the name of the server is not a host name"))?;
    let trusted: Vec<CertificateDer<'static>> = match authorities {
        Some(pem) => {
            let read: Result<_, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
            read.map_err(|_| invalid("the authorities are not valid PEM"))?
        }
        // This reads many files.
        None => spawn_blocking(|| rustls_native_certs::load_native_certs().certs)
            .await
            .map_err(io::Error::other)?,
    };
    let mut roots = RootCertStore::empty();
    // A system can have authorities that the library does not know how to use.
    let (usable, _) = roots.add_parsable_certificates(trusted);
    if usable == 0 {
        return Err(invalid("there is no authority to trust the server by"));
    }
    // Never the default of the process: another library could have set another provider, or none.
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots);
    let config = match identity {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain: Result<_, _> =
                CertificateDer::pem_slice_iter(certificate.as_bytes()).collect();
            let chain = chain.map_err(|_| invalid("the certificate is not valid PEM"))?;
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
                .map_err(|_| invalid("the key of the certificate is not valid PEM"))?;
            config.with_client_auth_cert(chain, key).map_err(io::Error::other)?
        }
    };
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}
