//! Makes a connection to one of the NATS servers, up to the server's first answer. The library does this
//! for deliveries, and this file does it for settling.

use std::{fmt, io, net::SocketAddr, time::Duration};

use async_nats::{ServerAddr, ServerInfo};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::{
    protocol::{ServerOp, take_op},
    settings::Settings,
};
use crate::{secrets::Reader, simulated::fill_random, tls};

/// Bounds one attempt to connect to one address.
const DIAL_TIMEOUT: Duration = Duration::from_secs(3);

/// The bytes between this process and a server, encrypted or not.
pub(super) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

/// A connection that the server has accepted.
pub(super) struct Dialed {
    pub(super) stream: Box<dyn ByteStream>,
    pub(super) server: ServerInfo,
    /// What the server wrote after its first answer.
    pub(super) input: BytesMut,
}

/// The reason why there is no connection, for people.
#[derive(Debug)]
pub(super) struct DialError {
    why: String,
    /// The server was reached, and refused the proxy's identity. Other servers have the same accounts.
    refused: bool,
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl From<io::Error> for DialError {
    fn from(error: io::Error) -> Self {
        failed(error)
    }
}

fn failed(why: impl ToString) -> DialError {
    DialError { why: why.to_string(), refused: false }
}

fn refused(why: impl fmt::Display) -> DialError {
    DialError { why: format!("authorization violation: {why}"), refused: true }
}

/// A subject that nobody else uses.
pub(super) fn new_inbox(settings: &Settings) -> Result<String, DialError> {
    let mut bytes = [0; 16];
    fill_random(&mut bytes).map_err(failed)?;
    Ok(format!("{}.{:032x}", settings.inbox_prefix, u128::from_le_bytes(bytes)))
}

/// Connects to one of the servers, each of them tried once, from any one on. `name` names the connection
/// in the server's lists.
pub(super) async fn dial(settings: &Settings, name: &str) -> Result<Dialed, DialError> {
    let mut start = [0];
    fill_random(&mut start).map_err(failed)?;
    let (count, start) = (settings.servers.len(), usize::from(start[0]));
    let mut last = failed("there is no server");
    for place in 0..count {
        let server = &settings.servers[(start + place) % count];
        let addresses: Vec<SocketAddr> = match server.socket_addrs().await {
            Ok(addresses) => addresses.collect(),
            Err(error) => {
                last = failed(format!("{}: {error}", server.host()));
                continue;
            }
        };
        for address in addresses {
            match timeout(DIAL_TIMEOUT, dial_at(address, server, settings, name)).await {
                Ok(Ok(dialed)) => return Ok(dialed),
                Ok(Err(error)) if error.refused => return Err(error),
                Ok(Err(error)) => last = error,
                Err(_) => last = failed("timed out"),
            }
        }
    }
    Err(last)
}

async fn dial_at(
    address: SocketAddr,
    server: &ServerAddr,
    settings: &Settings,
    name: &str,
) -> Result<Dialed, DialError> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let wants_tls = server.tls_required() || settings.requires_tls();
    let mut input = BytesMut::new();
    let (mut stream, info) = if settings.tls_first {
        let mut stream = secure(tcp, server, settings).await?;
        let info = greeting(&mut stream, &mut input).await?;
        (stream, info)
    } else {
        let mut tcp = tcp;
        let info = greeting(&mut tcp, &mut input).await?;
        let stream: Box<dyn ByteStream> = if wants_tls || info.tls_required {
            // Bytes that came before the handshake are not the server's.
            input.clear();
            secure(tcp, server, settings).await?
        } else {
            Box::new(tcp)
        };
        (stream, info)
    };
    let auth = settings.auth_of_any().answer(info.nonce.as_bytes()).await.map_err(refused)?;
    let signature = auth.signature.map(|signature| URL_SAFE_NO_PAD.encode(signature));
    let connect = serde_json::json!({
        "verbose": false,
        "pedantic": false,
        "echo": true,
        "headers": true,
        "no_responders": true,
        "protocol": 1,
        "lang": "rust",
        "version": env!("CARGO_PKG_VERSION"),
        "name": name,
        "tls_required": wants_tls,
        "user": auth.username,
        "pass": auth.password,
        "auth_token": auth.token,
        "jwt": auth.jwt,
        "nkey": auth.nkey,
        "sig": signature,
    });
    stream.write_all(format!("CONNECT {connect}\r\nPING\r\n").as_bytes()).await?;
    stream.flush().await?;
    let mut server = info;
    loop {
        match next_op(&mut stream, &mut input).await? {
            Some(ServerOp::Pong) => return Ok(Dialed { stream, server, input }),
            Some(ServerOp::Info(json)) => server = read_info(&json)?,
            Some(ServerOp::Error(why))
                if why.to_lowercase().contains("authorization violation") =>
            {
                return Err(refused(why));
            }
            Some(ServerOp::Error(why)) => return Err(failed(why)),
            Some(ServerOp::Ping | ServerOp::Ok | ServerOp::Message(_)) => {}
            None => return Err(failed("the server closed the connection")),
        }
    }
}

/// The first line of the server.
async fn greeting<S: ByteStream>(
    stream: &mut S,
    input: &mut BytesMut,
) -> Result<ServerInfo, DialError> {
    match next_op(stream, input).await? {
        Some(ServerOp::Info(json)) => read_info(&json),
        Some(_) => Err(failed("expected INFO, got another operation")),
        None => Err(failed("expected INFO, got nothing")),
    }
}

/// The description of a server.
pub(super) fn read_info(json: &[u8]) -> Result<ServerInfo, DialError> {
    serde_json::from_slice(json).map_err(|error| failed(format!("INFO: {error}")))
}

/// The next operation. `None`: the server has closed the connection.
async fn next_op<S: ByteStream + ?Sized>(
    stream: &mut S,
    input: &mut BytesMut,
) -> Result<Option<ServerOp>, DialError> {
    loop {
        if let Some(op) = take_op(input).map_err(failed)? {
            return Ok(Some(op));
        }
        if stream.read_buf(input).await? == 0 {
            return Ok(None);
        }
    }
}

/// Encrypts the connection. The files are read for each connection, so that new ones are used.
async fn secure(
    tcp: TcpStream,
    server: &ServerAddr,
    settings: &Settings,
) -> Result<Box<dyn ByteStream>, DialError> {
    let ca = match &settings.ca {
        Some(path) => Some(Reader::new(path.clone()).read().await?.0),
        None => None,
    };
    let identity = match &settings.identity {
        Some((cert, key)) => Some((
            Reader::new(cert.clone()).read().await?.0,
            Reader::new(key.clone()).read().await?.0,
        )),
        None => None,
    };
    let identity = identity.as_ref().map(|(cert, key)| (&**cert, &**key));
    let secured = tls::secure(tcp, server.host(), ca.as_deref(), identity).await;
    Ok(Box::new(secured.map_err(|error| failed(format!("TLS: {error}")))?))
}
