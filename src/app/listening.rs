//! Makes the listeners, as the command line names them: one address, a name, or all addresses.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::net::{TcpListener, TcpSocket};

use super::AppError;
use crate::config::Listen;

/// # Errors
/// Why it cannot be listened on.
pub(super) async fn listen(on: Listen) -> Result<TcpListener, AppError> {
    let listener = match &on {
        Listen::All(port) => or_ipv4(both(*port), *port).await,
        Listen::Address(address) => TcpListener::bind(address).await,
        Listen::Name(name, port) => named(name, *port).await,
    };
    listener.map_err(|error| AppError::Listen(on, error))
}

/// IPv6 and IPv4 at once, whatever the system's default is.
fn both(port: u16) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    rustix::net::sockopt::set_ipv6_v6only(&socket, false)?;
    socket.set_reuseaddr(true)?;
    socket.bind((Ipv6Addr::UNSPECIFIED, port).into())?;
    // As many as the other ways to listen have.
    socket.listen(1024)
}

/// IPv4 alone, where there is no IPv6.
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
    async fn where_there_is_no_ipv6_all_addresses_are_those_of_ipv4() {
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
