//! The other end of a connection, for the layers behind it: each request carries it. Decides nothing.

use std::{
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
};

use http::Request;
use tower::Service;

use crate::access::CertifiedClient;

/// The client at the other end of a connection. It is among the extensions of each request, as an
/// `Arc<Peer>`.
#[derive(Debug)]
pub(crate) struct Peer {
    /// The address that the connection came from. Behind a load balancer it is that of the balancer.
    pub(crate) address: SocketAddr,
    /// The verified certificate, if the client showed one.
    pub(crate) certificate: Option<CertifiedClient>,
}

/// A service whose requests carry the peer of their connection.
#[derive(Debug, Clone)]
pub(super) struct WithPeer<S> {
    pub(super) inner: S,
    pub(super) peer: Arc<Peer>,
}

impl<S, B> Service<Request<B>> for WithPeer<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> S::Future {
        request.extensions_mut().insert(self.peer.clone());
        self.inner.call(request)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        future::{Ready, ready},
    };

    use super::*;

    #[derive(Clone)]
    struct AddressOfPeer;

    impl Service<Request<()>> for AddressOfPeer {
        type Response = Option<SocketAddr>;
        type Error = Infallible;
        type Future = Ready<Result<Option<SocketAddr>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: Request<()>) -> Self::Future {
            ready(Ok(request.extensions().get::<Arc<Peer>>().map(|peer| peer.address)))
        }
    }

    #[tokio::test]
    async fn each_request_carries_the_peer_of_its_connection() {
        let address = SocketAddr::from(([192, 0, 2, 1], 4711));
        let peer = Arc::new(Peer { address, certificate: None });
        let mut service = WithPeer { inner: AddressOfPeer, peer };
        for _ in 0..2 {
            assert_eq!(service.call(Request::new(())).await, Ok(Some(address)));
        }
    }
}
