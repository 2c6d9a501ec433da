//! TLS of the client port: its certificate, its key, and the authorities of client certificates. They come
//! from files that are read again. A connection keeps the settings of its handshake; a later connection has
//! the new ones. Decides nothing about rights.
//!
//! ```text
//!  files unchanged ─▶ nothing
//!  changed, usable ─▶ later connections use them ─▶ an authority is gone: connections with a client
//!  │                                                certificate are asked to end
//!  └─ not usable: the old ones stay, and the log says so once
//!     └─ key and certificate of two rotations: so too, at the third look
//! ```
//! `files` makes settings of texts, `handshake` names what went wrong, `certificate` reads the leaf of a
//! client, and `outbound` is TLS to servers that this process asks. No other room names rustls.

mod certificate;
mod files;
mod handshake;
mod outbound;

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock, RwLockReadGuard},
    time::{Duration, UNIX_EPOCH},
};

use rustls::ProtocolVersion;
use tokio::{net::TcpStream, sync::watch};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use self::files::{Material, Texts, material};
pub use self::{
    certificate::{UnfitCertificate, certified_client},
    files::{ClientAuth, TlsFileError, TlsSettings, TlsVersion},
    handshake::HandshakeFailure,
    outbound::{OutboundTls, secure},
};
use crate::{
    access::CertifiedClient,
    clock,
    log_throttle::LogThrottle,
    metrics::FileMeter,
    secrets::{self, FileLooks, FileNews, Reader, Secret},
};

/// The time from one warning of an end that comes soon to the next.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// An encrypted connection of a client.
pub type TlsStream = tokio_rustls::server::TlsStream<TcpStream>;

/// The TLS of one listener.
pub struct ServerTls {
    settings: TlsSettings,
    state: RwLock<State>,
    /// How often authorities were removed. Changed only while `state` is locked.
    removals: watch::Sender<u64>,
}

struct State {
    texts: Texts,
    material: Material,
}

/// A connection after its handshake.
pub struct SecuredConnection {
    /// The connection.
    pub stream: Box<TlsStream>,
    /// The certificate that the client showed and that was verified.
    pub certificate: Option<CertifiedClient>,
    /// Changes when an authority is removed.
    pub removals: watch::Receiver<u64>,
    /// The version of TLS, like `1.3`.
    pub version: &'static str,
}

/// Leaves the texts out, because they contain the key.
impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Reads the files. Blocks for some seconds at most, so it is only for the start of the process.
    ///
    /// # Errors
    /// See [`TlsFileError`].
    pub fn load(settings: TlsSettings) -> Result<Self, TlsFileError> {
        let read = |(flag, path): (&'static str, &PathBuf)| {
            secrets::read_at_start(path).map_err(|error| unreadable(flag, path, error))
        };
        let (key, open_to) = read(settings.key_file())?;
        open_to.warn(&settings.key);
        let (cert, _) = read(settings.cert_file())?;
        let client_ca = settings.client_ca_file().map(read).transpose()?.map(|(text, _)| text);
        let texts = Texts { cert, key, client_ca };
        let material = material(&texts, &settings)?;
        let state = RwLock::new(State { texts, material });
        Ok(Self { settings, state, removals: watch::Sender::new(0) })
    }

    /// Whether clients must show a certificate. `None`: certificates of clients are not asked for.
    pub fn names_clients(&self) -> Option<ClientAuth> {
        self.settings.client_ca.as_ref().map(|_| self.settings.client_auth)
    }

    /// Reads the files again whenever they change, until `stop`.
    pub async fn follow(&self, stop: CancellationToken, meter: FileMeter) {
        let readers = Readers::new(&self.settings);
        let (mut looks, expiry) = (FileLooks::new(stop), LogThrottle::every(EXPIRY_INTERVAL));
        let look = async || self.take(readers.read().await?);
        while let Some(news) = looks.next(look()).await {
            news.iter().for_each(|news| meter.usable(*news == FileNews::Usable));
            match news {
                Some(FileNews::Unusable(error)) => tracing::error!(
                    error,
                    "the TLS files cannot be used: the certificate stays as it was"
                ),
                Some(FileNews::Usable) => tracing::info!("the TLS files can be used again"),
                None => {}
            }
            self.warn_of_expiry(&expiry);
        }
    }

    /// Warns once a day if the certificate ends soon, or has ended.
    fn warn_of_expiry(&self, said: &LogThrottle) {
        let Some((begins, ends)) = self.read().material.validity else { return };
        let left = ends.saturating_sub(clock::unix_time());
        if left < soon(ends.saturating_sub(begins)) && said.allow(clock::now()) {
            tracing::warn!(
                ends = %humantime::format_rfc3339_seconds(UNIX_EPOCH + ends),
                "the certificate of the client port ends soon"
            );
        }
    }

    /// The end of the certificate, since the Unix epoch, if it can be read.
    pub fn ends_at(&self) -> Option<Duration> {
        self.read().material.validity.map(|(_, ends)| ends)
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uses these texts for later connections.
    fn take(&self, texts: Texts) -> Result<(), TlsFileError> {
        if self.read().texts == texts {
            return Ok(());
        }
        let material = material(&texts, &self.settings)?;
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let removed = state.material.authorities.difference(&material.authorities).count();
        *state = State { texts, material };
        if removed > 0 {
            self.removals.send_modify(|removals| *removals += 1);
        }
        drop(state);
        tracing::info!(removed_authorities = removed, "the TLS files were read again");
        Ok(())
    }

    /// Makes the handshake with a client, by the settings of this moment.
    ///
    /// # Errors
    /// See [`HandshakeFailure`].
    pub async fn accept(&self, stream: TcpStream) -> Result<SecuredConnection, HandshakeFailure> {
        // Both under one lock: a removal is in these settings, or `removals` tells it later.
        let (config, removals) = {
            let state = self.read();
            (state.material.config.clone(), self.removals.subscribe())
        };
        let stream = TlsAcceptor::from(config).accept(stream).await?;
        let leaf = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
        let certificate = leaf.map(|leaf| certified_client(leaf)).transpose()?;
        let version = match stream.get_ref().1.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => "1.3",
            // No older version is offered.
            _ => "1.2",
        };
        Ok(SecuredConnection { stream: Box::new(stream), certificate, removals, version })
    }
}

/// The time before the end of a certificate of this life at which the log warns. Usual tools renew a
/// certificate when a third or a half of its life is left, and a short life is no fault.
fn soon(life: Duration) -> Duration {
    (life / 6).min(Duration::from_secs(7 * 24 * 3600))
}

fn unreadable(flag: &'static str, path: &Path, error: io::Error) -> TlsFileError {
    TlsFileError::Unreadable { flag, path: path.to_owned(), error }
}

/// Readers of the files, each with the flag that names it.
struct Readers {
    cert: (&'static str, Reader),
    key: (&'static str, Reader),
    client_ca: Option<(&'static str, Reader)>,
}

impl Readers {
    fn new(settings: &TlsSettings) -> Self {
        let reader = |(flag, path): (&'static str, &PathBuf)| (flag, Reader::new(path.clone()));
        Self {
            cert: reader(settings.cert_file()),
            key: reader(settings.key_file()),
            client_ca: settings.client_ca_file().map(reader),
        }
    }

    async fn read(&self) -> Result<Texts, TlsFileError> {
        let cert = read(&self.cert).await?;
        let key = read(&self.key).await?;
        let client_ca = match &self.client_ca {
            Some(reader) => Some(read(reader).await?.0),
            None => None,
        };
        Ok(Texts { cert: cert.0, key: key.0, client_ca })
    }
}

async fn read((flag, reader): &(&'static str, Reader)) -> Result<Secret, TlsFileError> {
    reader.read().await.map_err(|error| unreadable(flag, reader.path(), error))
}
