//! An address to listen on, as it is typed: an address, a name, or a port of all addresses. Looks up no
//! name.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// An address to listen on. Port 0 is any free port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// All addresses of this machine: IPv6 and IPv4, or IPv4 alone if there is no IPv6.
    All(u16),
    /// One address.
    Address(SocketAddr),
    /// The first address of this name that this machine can listen on, IPv4 before IPv6.
    Name(String, u16),
}

impl Listen {
    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::All(port) | Self::Name(_, port) => *port,
            Self::Address(address) => address.port(),
        }
    }

    /// Whether other machines may reach it. A name other than `localhost` is not looked up, and counts as
    /// such.
    pub fn is_beyond_loopback(&self) -> bool {
        match self {
            Self::All(_) => true,
            Self::Address(address) => !address.ip().to_canonical().is_loopback(),
            Self::Name(name, _) => name != "localhost",
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            let all = address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
            return Ok(if all { Self::All(address.port()) } else { Self::Address(address) });
        }
        let parts = text.rsplit_once(':').and_then(|(name, port)| Some((name, port.parse().ok()?)));
        match parts {
            Some(("", port)) => Ok(Self::All(port)),
            Some((name, port)) if !name.contains([':', '/', '[', ']', ' ']) => {
                Ok(Self::Name(name.to_owned(), port))
            }
            _ => Err("must be IP:PORT, NAME:PORT, or :PORT for all addresses".to_owned()),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All(port) => write!(f, "[::]:{port}"),
            Self::Address(address) => address.fmt(f),
            Self::Name(name, port) => write!(f, "{name}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_addresses_are_no_address_for_other_machines() {
        for (typed, beyond) in [
            ("127.0.0.1:1", false),
            ("127.8.9.1:1", false),
            ("[::1]:1", false),
            ("[::ffff:127.0.0.1]:1", false),
            ("localhost:1", false),
            (":1", true),
            ("0.0.0.0:1", true),
            ("10.0.0.1:1", true),
            ("[::ffff:10.0.0.1]:1", true),
            ("localhost.example:1", true),
        ] {
            assert_eq!(typed.parse::<Listen>().unwrap().is_beyond_loopback(), beyond, "{typed}");
        }
    }

    #[test]
    fn address_name_or_port_alone_is_accepted_and_nothing_else() {
        for (typed, meant) in [
            (":50051", Listen::All(50051)),
            ("[::]:50051", Listen::All(50051)),
            ("0.0.0.0:1", Listen::Address(([0, 0, 0, 0], 1).into())),
            ("[::1]:0", Listen::Address((Ipv6Addr::LOCALHOST, 0).into())),
            ("localhost:7", Listen::Name("localhost".to_owned(), 7)),
        ] {
            let read: Listen = typed.parse().unwrap();
            assert_eq!(read, meant);
            assert_eq!(read.to_string().parse(), Ok(meant));
        }
        for typed in ["", "nowhere", "50051", "::1:50051", "a:65536", "a:", "http://a:1", "[::1]"] {
            let error = typed.parse::<Listen>().unwrap_err();
            assert!(error.contains(":PORT for all addresses"), "{typed}: {error}");
        }
    }
}
