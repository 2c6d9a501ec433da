//! Connections of clients: accepted, bounded in number, age and idle time, and closed. Owns every
//! connection and the tasks on it. Knows no contract and no gRPC.
//!
//! `listener` accepts and closes connections, `opening` makes the TLS handshake, `preface` reads the first
//! bytes, `corked` gathers small writes, `connection` is one open connection as the layers behind it see it, `peer` is its
//! other end, `connections` lists all of them, `unwritten` ends answers that make no progress. `local` is the socket for programs on this machine. `middleware` is what all layers around a service share.

mod connection;
mod connections;
mod corked;
mod listener;
mod local;
mod middleware;
mod opening;
mod peer;
mod preface;
mod unwritten;

pub(crate) use self::{
    connection::{ClientConnection, CountOpenCalls, OpenCall},
    connections::{ConnectionSeen, OpenConnections},
    listener::{Services, serve},
    local::LocalListener,
    middleware::{InnerService, LastService, Middleware, MiddlewareLayer, Next},
    peer::Peer,
    unwritten::StartedAnswer,
};
