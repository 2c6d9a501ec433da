//! The usual ports of a first look, which the documentation names.

use std::net::{Ipv4Addr, TcpListener, TcpStream};

/// A port that a first look has if it is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsualPort {
    /// The name of its protocol or of its users.
    pub name: &'static str,
    /// Its number.
    pub port: u16,
}

/// The port of the clients.
pub const GRPC: UsualPort = UsualPort { name: "gRPC", port: 50_051 };
/// The port of the operators.
pub const OPS: UsualPort = UsualPort { name: "ops", port: 50_052 };
/// The port of the private nats-server.
pub const NATS: UsualPort = UsualPort { name: "NATS", port: 4222 };

impl UsualPort {
    /// The port if no program of this machine has it.
    pub fn if_free(self) -> Option<u16> {
        let address = (Ipv4Addr::LOCALHOST, self.port);
        // Some systems allow to listen on one address while a program listens on all addresses. So a
        // program that answers counts, too.
        let is_free = TcpStream::connect(address).is_err() && TcpListener::bind(address).is_ok();
        is_free.then_some(self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_is_free_unless_a_program_listens_there_or_on_all_addresses() {
        for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
            let program = TcpListener::bind((address, 0)).unwrap();
            let port = program.local_addr().unwrap().port();
            let usual = UsualPort { name: "test", port };
            assert_eq!(usual.if_free(), None, "{address}");
            drop(program);
            assert_eq!(usual.if_free(), Some(port), "{address}");
        }
    }
}
