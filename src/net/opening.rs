//! Opens an accepted connection: the TLS handshake, if the listener has TLS, and then the first bytes. All of
//! it has one time limit. Names in the log what a client speaks in place of that.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::TcpStream, sync::watch, time::timeout};
use tokio_util::either::Either;

use super::{
    peer::Peer,
    preface::{self, Foreign, Opened},
};
use crate::{
    clock,
    log_throttle::KeyedLogThrottle,
    metrics::{ConnectionClose, ConnectionEnd, ConnectionRefusal},
    tls::{HandshakeFailure, SecuredConnection, ServerTls, TlsStream},
};

/// Longest time from the accept to a whole HTTP/2 preface, with the TLS handshake, or to the first line of an
/// HTTP/1 request.
pub(super) const PREFACE: Duration = Duration::from_secs(5);
/// Longest time for the close of a connection without calls.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);
/// The first byte of a TLS handshake (RFC 8446, section 5.1).
const HANDSHAKE: u8 = 22;
/// How often a kind of foreign client is named in the log, and most lines about all kinds in 10 s.
const NAMED_AGAIN: Duration = Duration::from_secs(10);
const NAMED_AT_ONCE: u32 = 5;

/// A connection, with TLS or without.
pub(super) type Wire = Either<TcpStream, Box<TlsStream>>;

/// A connection that speaks HTTP as it should.
pub(super) struct OpenConnection {
    pub(super) opened: Opened<Wire>,
    pub(super) peer: Arc<Peer>,
    /// Changes when an authority of client certificates is removed. `None`: the client showed none.
    pub(super) removals: Option<watch::Receiver<u64>>,
    /// The version of TLS. `None`: there is no TLS.
    pub(super) version: Option<&'static str>,
}

/// Opens the connections of one listener.
pub(super) struct Opener {
    listener: &'static str,
    tls: Option<Arc<ServerTls>>,
    http1: bool,
    said: KeyedLogThrottle,
}

impl Opener {
    pub(super) fn new(listener: &'static str, tls: Option<Arc<ServerTls>>, http1: bool) -> Self {
        let said = KeyedLogThrottle::new(NAMED_AGAIN, NAMED_AT_ONCE);
        Self { listener, tls, http1, said }
    }

    /// Opens a connection.
    ///
    /// # Errors
    /// It was silent, or was turned away.
    pub(super) async fn open(
        &self,
        stream: TcpStream,
        address: SocketAddr,
    ) -> Result<OpenConnection, ConnectionEnd> {
        // Without this option a socket is only slower.
        let _ = stream.set_nodelay(true);
        let silent = |_| ConnectionEnd::Refused(ConnectionRefusal::Silent);
        let begun = timeout(PREFACE, self.begin(stream, address)).await.map_err(silent)?;
        let (connection, foreign) = match begun {
            Ok(begun) => begun,
            Err(failure) => {
                self.tell_failure(&failure, address);
                return Err(failed(&failure));
            }
        };
        let Some(foreign) = foreign else { return Ok(connection) };
        self.tell_foreign(foreign, connection.peer.address);
        let _ = timeout(FAREWELL, connection.opened.turn_away(foreign)).await;
        Err(ConnectionEnd::Refused(self.refusal(foreign)))
    }

    /// The connection, and what its client speaks in place of what it should.
    async fn begin(
        &self,
        stream: TcpStream,
        address: SocketAddr,
    ) -> Result<(OpenConnection, Option<Foreign>), HandshakeFailure> {
        let plain = |stream| async move {
            let peer = Arc::new(Peer { address, certificate: None });
            let opened = preface::read(Wire::Left(stream)).await?;
            Ok::<_, io::Error>(OpenConnection { opened, peer, removals: None, version: None })
        };
        let Some(tls) = &self.tls else {
            let connection = plain(stream).await?;
            let foreign = connection.opened.foreign();
            let allowed = |foreign: &Foreign| self.http1 && *foreign == Foreign::Http1;
            return Ok((connection, foreign.filter(|foreign| !allowed(foreign))));
        };
        let mut first = [0];
        if stream.peek(&mut first).await? == 0 {
            return Err(HandshakeFailure::Gone);
        }
        if first != [HANDSHAKE] {
            let connection = plain(stream).await?;
            let foreign = connection.opened.foreign();
            return Ok((connection, Some(foreign.map_or(Foreign::PlainHttp2, Foreign::plain))));
        }
        let SecuredConnection { stream, certificate, removals, version } =
            tls.accept(stream).await?;
        let removals = certificate.is_some().then_some(removals);
        let peer = Arc::new(Peer { address, certificate });
        let opened = preface::read(Wire::Right(stream)).await?;
        let foreign = opened.foreign();
        Ok((OpenConnection { opened, peer, removals, version: Some(version) }, foreign))
    }

    fn refusal(&self, foreign: Foreign) -> ConnectionRefusal {
        match foreign {
            Foreign::Tls if self.tls.is_none() => ConnectionRefusal::TlsOnPlaintext,
            Foreign::PlainHttp1 | Foreign::PlainHttp2 => ConnectionRefusal::PlaintextOnTls,
            Foreign::Http1 | Foreign::Tls | Foreign::Other => ConnectionRefusal::Protocol,
        }
    }

    fn tell_foreign(&self, foreign: Foreign, peer: SocketAddr) {
        let listener = self.listener;
        if !self.said.allow(&foreign.name(), clock::now()) {
            return;
        }
        match foreign {
            Foreign::Tls if self.tls.is_none() => {
                tracing::warn!(listener, %peer, "a client speaks TLS to a port without TLS");
            }
            Foreign::PlainHttp1 | Foreign::PlainHttp2 => {
                tracing::warn!(listener, %peer, "a client speaks without TLS to a port with TLS");
            }
            Foreign::Http1 | Foreign::Tls | Foreign::Other => {
                let spoken = foreign.name();
                tracing::info!(listener, %peer, spoken, "a client speaks another protocol");
            }
        }
    }

    fn tell_failure(&self, failure: &HandshakeFailure, peer: SocketAddr) {
        let listener = self.listener;
        let tell = *failure != HandshakeFailure::Gone && self.said.allow(failure, clock::now());
        match failure {
            HandshakeFailure::Gone => {
                tracing::debug!(listener, %peer, "a client closed its connection at once");
            }
            HandshakeFailure::Version if tell => tracing::warn!(
                listener,
                %peer,
                "a client offers only versions of TLS below --tls-min"
            ),
            HandshakeFailure::Refused(error) if tell => {
                tracing::info!(listener, %peer, error, "a TLS handshake has failed");
            }
            HandshakeFailure::Version | HandshakeFailure::Refused(_) => {}
        }
    }
}

fn failed(failure: &HandshakeFailure) -> ConnectionEnd {
    match failure {
        HandshakeFailure::Gone => ConnectionEnd::Closed(ConnectionClose::Peer),
        HandshakeFailure::Version => ConnectionEnd::Refused(ConnectionRefusal::Version),
        HandshakeFailure::Refused(_) => ConnectionEnd::Refused(ConnectionRefusal::Handshake),
    }
}
