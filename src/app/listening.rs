//! Opens the listening sockets that the command line names: one address, a name, or all addresses.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::net::{TcpListener, TcpSocket};

use super::AppError;
use crate::config::Listen;

/// Listens on `on`.
///
/// # Errors
/// [`AppError::Listen`], with the cause.
pub(super) async fn listen(on: Listen) -> Result<TcpListener, AppError> {
    let listener = match &on {
        Listen::All(port) => or_ipv4(both(*port), *port).await,
        Listen::Address(address) => TcpListener::bind(address).await,
        Listen::Name(name, port) => named(name, *port).await,
    };
    listener.map_err(|error| AppError::Listen(on, error))
}

/// Listens on IPv6 and IPv4 at once, independent of the system's default.
fn both(port: u16) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    rustix::net::sockopt::set_ipv6_v6only(&socket, false)?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv6Addr::UNSPECIFIED, port).into())?;
    // The backlog that `TcpListener::bind` uses.
    socket.listen(1024)
}

/// Falls back to IPv4 alone if the machine has no IPv6.
async fn or_ipv4(both: io::Result<TcpListener>, port: u16) -> io::Result<TcpListener> {
    let without = |error: &io::Error| {
        error.kind() == io::ErrorKind::AddrNotAvailable
            || error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
    };
    match both {
        Err(error) if without(&error) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await,
        listener => listener,
    }
}

async fn named(name: &str, port: u16) -> io::Result<TcpListener> {
    let mut addresses: Vec<SocketAddr> = tokio::net::lookup_host((name, port)).await?.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    TcpListener::bind(&*addresses).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_addresses_are_ipv4_without_ipv6() {
        for missing in [
            io::Error::from(rustix::io::Errno::AFNOSUPPORT),
            io::ErrorKind::AddrNotAvailable.into(),
        ] {
            let address = or_ipv4(Err(missing), 0).await.unwrap().local_addr().unwrap();
            assert_eq!(address.ip(), Ipv4Addr::UNSPECIFIED);
        }
        let taken = or_ipv4(Err(io::ErrorKind::AddrInUse.into()), 0).await.unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    }
}
