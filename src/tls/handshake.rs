//! Names the reason why a handshake failed, as far as an operator can do something about it.

use std::io;

use rustls::{Error, PeerIncompatible};

use super::certificate::UnfitCertificate;

/// The reason why there is no encrypted connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum HandshakeFailure {
    /// The client closed the connection, as a port scan or a check of the port does.
    #[error("the client closed the connection")]
    Gone,
    /// The client offers only versions of TLS that are not allowed.
    #[error("the client offers only versions of TLS below --tls-min")]
    Version,
    /// Anything else, in the words of the TLS library.
    #[error("{0}")]
    Refused(String),
}

impl From<io::Error> for HandshakeFailure {
    fn from(error: io::Error) -> Self {
        let Some(cause) = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>()) else {
            return Self::Gone;
        };
        let version = matches!(
            cause,
            Error::PeerIncompatible(
                PeerIncompatible::SupportedVersionsExtensionRequired
                    | PeerIncompatible::Tls12NotOffered
                    | PeerIncompatible::Tls12NotOfferedOrEnabled
            )
        );
        if version { Self::Version } else { Self::Refused(cause.to_string()) }
    }
}

impl From<UnfitCertificate> for HandshakeFailure {
    fn from(unfit: UnfitCertificate) -> Self {
        Self::Refused(unfit.to_string())
    }
}
