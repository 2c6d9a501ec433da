//! One GET over HTTP/1, with TLS or on loopback. Follows no redirect, uses no proxy, and keeps no connection. The only
//! file that speaks HTTP to a server.

use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
};

use http::{
    Request, StatusCode, Uri,
    header::{ACCEPT, AUTHORIZATION, HOST, HeaderValue},
    uri::Scheme,
};
use http_body::Body as _;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

use crate::tls;

/// Largest answer, in bytes. A key set of 64 RSA keys of 8192 bits has less than 100 KiB.
const MAX_DOCUMENT_BYTES: usize = 256 * 1024;

/// The reason why there is no answer. It shows nothing of a bearer, and nothing of an answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum HttpFault {
    /// The URL has no host.
    #[error("the URL has no host")]
    Host,
    /// The bearer cannot stand in a header.
    #[error("the bearer has characters that no header may have")]
    Bearer,
    /// There is no connection.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// The handshake has failed.
    #[error("TLS: {0}")]
    Tls(io::Error),
    /// The connection ended, or brought something else than HTTP/1.
    #[error("no answer in HTTP/1: {0}")]
    Http(#[from] hyper::Error),
    /// The server points to another URL.
    #[error("the answer has the status {0}, and redirects are not followed")]
    Redirect(u16),
    /// The server refuses, or fails.
    #[error("the answer has the status {0}")]
    Status(u16),
    /// The answer is too large.
    #[error("the answer is larger than 256 KiB")]
    Large,
    /// The answer is not UTF-8.
    #[error("the answer is not a text")]
    NotText,
}

/// The answer to a GET. `authorities` are those that the server is trusted by, as PEM; `None`: those of the system.
pub(super) async fn get(
    url: &Uri,
    authorities: Option<&str>,
    bearer: Option<&str>,
) -> Result<String, HttpFault> {
    let (host, authority) = url.host().zip(url.authority()).ok_or(HttpFault::Host)?;
    let host = host.trim_matches(['[', ']']);
    let has_tls = url.scheme() == Some(&Scheme::HTTPS);
    let port = url.port_u16().unwrap_or(if has_tls { 443 } else { 80 });
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::new(String::new());
    *request.uri_mut() = path.parse().map_err(|_| HttpFault::Host)?;
    let named = HeaderValue::from_str(authority.as_str()).map_err(|_| HttpFault::Host)?;
    request.headers_mut().insert(HOST, named);
    request.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/json"));
    if let Some(bearer) = bearer {
        let bearer = HeaderValue::from_str(&format!("Bearer {bearer}"));
        let mut bearer = bearer.map_err(|_| HttpFault::Bearer)?;
        bearer.set_sensitive(true);
        request.headers_mut().insert(AUTHORIZATION, bearer);
    }
    let stream = TcpStream::connect((host, port)).await.map_err(HttpFault::Connect)?;
    if !has_tls {
        return exchange(stream, request).await;
    }
    let stream = tls::secure(stream, host, authorities, None).await.map_err(HttpFault::Tls)?;
    exchange(stream, request).await
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: Request<String>,
) -> Result<String, HttpFault> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut answered = pin!(async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        match head.status {
            StatusCode::OK => text(body).await,
            status if status.is_redirection() => Err(HttpFault::Redirect(status.as_u16())),
            status => Err(HttpFault::Status(status.as_u16())),
        }
    });
    tokio::select! {
        answer = answered.as_mut() => return answer,
        // It may end before all of the answer is read.
        _ = connection => {}
    }
    answered.await
}

async fn text(mut body: Incoming) -> Result<String, HttpFault> {
    let mut bytes = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let Ok(data) = frame?.into_data() else { continue };
        if bytes.len() + data.len() > MAX_DOCUMENT_BYTES {
            return Err(HttpFault::Large);
        }
        bytes.extend_from_slice(&data);
    }
    String::from_utf8(bytes).map_err(|_| HttpFault::NotText)
}
