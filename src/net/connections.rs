//! All open connections of one listener, for operators. Decides nothing.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    ops::Bound,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{connection::ClientConnection, peer::Peer};
use crate::lock::lock;

/// The open connections, by their numbers, which ascend and are used once.
#[derive(Debug, Default)]
pub(crate) struct OpenConnections {
    open: Mutex<BTreeMap<u64, Listed>>,
    last: AtomicU64,
}

#[derive(Debug)]
struct Listed {
    connection: Weak<ClientConnection>,
    peer: Arc<Peer>,
    since: Instant,
    tls: Option<&'static str>,
}

/// A connection as operators see it, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConnectionSeen {
    /// Its number.
    pub(crate) number: u64,
    /// The address that it came from.
    pub(crate) peer: SocketAddr,
    /// When it was opened.
    pub(crate) since: Instant,
    /// The identity of the first call on it that was accepted.
    pub(crate) identity: Option<Arc<str>>,
    /// Calls that are open now.
    pub(crate) open_calls: usize,
    /// Calls that were opened so far.
    pub(crate) calls: u64,
    /// Its version of TLS. `None`: it is not encrypted.
    pub(crate) tls: Option<&'static str>,
    /// When the certificate of the client ends, since the Unix epoch.
    pub(crate) certificate_end: Option<Duration>,
}

/// A connection is listed until this is dropped.
#[derive(Debug)]
pub(super) struct ListedConnection {
    all: Arc<OpenConnections>,
    number: u64,
}

impl OpenConnections {
    /// Lists a connection that was opened at `since`.
    pub(super) fn list(
        self: &Arc<Self>,
        connection: &Arc<ClientConnection>,
        (peer, tls): (&Arc<Peer>, Option<&'static str>),
        since: Instant,
    ) -> ListedConnection {
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let (connection, peer) = (Arc::downgrade(connection), peer.clone());
        lock(&self.open).insert(number, Listed { connection, peer, since, tls });
        ListedConnection { all: self.clone(), number }
    }

    /// At most `limit` connections after the number `after`, in the order of their numbers.
    pub(crate) fn after(&self, after: u64, limit: usize) -> Vec<ConnectionSeen> {
        let open = lock(&self.open);
        let next = open.range((Bound::Excluded(after), Bound::Unbounded)).take(limit);
        next.map(|(number, listed)| {
            let connection = listed.connection.upgrade();
            let (identity, open_calls, calls) =
                connection.map(|connection| connection.used()).unwrap_or_default();
            ConnectionSeen {
                number: *number,
                peer: listed.peer.address,
                since: listed.since,
                identity,
                open_calls,
                calls,
                tls: listed.tls,
                certificate_end: listed.peer.certificate.as_ref().map(|client| client.not_after),
            }
        })
        .collect()
    }
}

impl Drop for ListedConnection {
    fn drop(&mut self) {
        lock(&self.all.open).remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;

    use super::*;
    use crate::clock;

    #[test]
    fn connection_is_listed_once_until_it_is_closed() {
        let (all, permits) = (Arc::<OpenConnections>::default(), Arc::new(Semaphore::new(3)));
        let peer = Arc::new(Peer { address: ([192, 0, 2, 1], 4711).into(), certificate: None });
        let connections: Vec<_> = (0..3)
            .map(|_| {
                let permit = permits.clone().try_acquire_owned().unwrap();
                Arc::new(ClientConnection::new(permit))
            })
            .collect();
        let list = |connection| all.list(connection, (&peer, Some("1.3")), clock::now());
        let mut listed: Vec<_> = connections.iter().map(list).collect();
        let numbers = |after, limit| -> Vec<u64> {
            all.after(after, limit).iter().map(|seen| seen.number).collect()
        };
        assert_eq!((numbers(0, 2), numbers(2, 2)), (vec![1, 2], vec![3]));
        drop(listed.remove(1));
        assert_eq!(numbers(0, 9), [1, 3]);
        connections[0].identified("key:a");
        connections[0].identified("key:b");
        let _call = connections[0].open_call();
        let seen = all.after(0, 1).remove(0);
        assert_eq!((seen.identity.as_deref(), seen.open_calls, seen.calls), (Some("key:a"), 1, 1));
        assert_eq!((seen.peer, seen.tls), (peer.address, Some("1.3")));
    }
}
