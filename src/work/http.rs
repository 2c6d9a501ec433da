//! Sends one message to a URL by a POST over HTTP/1, with TLS or without. Follows no redirect, uses no proxy, and keeps no
//! connection.

use std::{
    fs,
    future::poll_fn,
    net::IpAddr,
    path::{Path, PathBuf},
    pin::{Pin, pin},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use http::{
    HeaderMap, Method, Request, Response, Uri,
    header::{AUTHORIZATION, HOST, HeaderValue, RETRY_AFTER},
    uri::Scheme,
};
use http_body::Body as _;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::watch,
    time::timeout,
};

use super::{
    captured::Captured,
    job::{JobEnd, JobOrder, ordered},
    verdict::{WorkEnd, retry_after},
};
use crate::{clock, tls};

/// How long the body of an answer is read. The status decides, and the body is for people.
const BODY_TIMEOUT: Duration = Duration::from_secs(2);

/// A server that does the work.
#[derive(Debug, Clone)]
pub struct WorkServer {
    host: String,
    port: u16,
    has_tls: bool,
    named: HeaderValue,
    path: Uri,
    /// The authorities to trust, as PEM. `None`: those of the system.
    authorities: Option<String>,
    /// The file with the credential, read for each message.
    token_file: Option<PathBuf>,
    timeout: Duration,
    output_bytes: usize,
}

impl WorkServer {
    /// Checks the URL, and reads the file of the authorities. `timeout` bounds the work on one message.
    ///
    /// # Errors
    /// The URL or the file cannot be used, as text.
    pub fn new(
        url: &str,
        ca: Option<&Path>,
        token_file: Option<PathBuf>,
        timeout: Duration,
        output_bytes: usize,
    ) -> Result<Self, String> {
        let wrong = |why: &str| format!("--http: {url}: {why}");
        let uri: Uri = url.parse().map_err(|_| wrong("it is no URL"))?;
        let has_tls = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            Some(scheme) if *scheme == Scheme::HTTP => false,
            _ => return Err(wrong("it must begin with http:// or https://")),
        };
        let (host, authority) =
            uri.host().zip(uri.authority()).ok_or_else(|| wrong("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("it must have no user: use --http-token-file"));
        }
        let host = host.trim_matches(['[', ']']).to_owned();
        let is_here = host == "localhost"
            || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        if token_file.is_some() && !has_tls && !is_here {
            return Err(wrong("a credential is not sent there without TLS: use https://"));
        }
        let read = |file: &Path| {
            let text = fs::read_to_string(file);
            text.map_err(|error| format!("--http-ca: cannot read {}: {error}", file.display()))
        };
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        // A URL may have a query and no path.
        let slash = if path.starts_with('/') { "" } else { "/" };
        Ok(Self {
            port: uri.port_u16().unwrap_or(if has_tls { 443 } else { 80 }),
            has_tls,
            named: HeaderValue::from_str(authority.as_str())
                .map_err(|_| wrong("it has no host"))?,
            path: format!("{slash}{path}").parse().map_err(|_| wrong("it has no path"))?,
            authorities: ca.map(read).transpose()?,
            host,
            token_file,
            timeout,
            output_bytes,
        })
    }

    /// Sends a message until there is an answer, until the time is over, or until `orders` ends it.
    pub(super) async fn post(
        &self,
        input: Bytes,
        headers: HeaderMap,
        mut orders: watch::Receiver<JobOrder>,
    ) -> JobEnd {
        let no_answer = |end| JobEnd { end, is_ended: false, is_reached: None, output: None };
        tokio::select! {
            answered = timeout(self.timeout, self.answer(input, headers)) => match answered {
                Ok(Ok((end, body))) => JobEnd {
                    is_reached: Some(true),
                    output: Some((body, Captured::new(0))),
                    ..no_answer(end)
                },
                Ok(Err(why)) => {
                    JobEnd { is_reached: Some(false), ..no_answer(WorkEnd::NoAnswer(why)) }
                }
                Err(_) => no_answer(WorkEnd::TimedOut(self.timeout)),
            },
            () = ordered(&mut orders, JobOrder::End) => {
                let end = WorkEnd::NoAnswer("the request was dropped".to_owned());
                JobEnd { is_ended: true, ..no_answer(end) }
            }
        }
    }

    async fn answer(
        &self,
        input: Bytes,
        headers: HeaderMap,
    ) -> Result<(WorkEnd, Captured), String> {
        let mut request = Request::new(Body::from(input));
        (*request.method_mut(), *request.uri_mut()) = (Method::POST, self.path.clone());
        *request.headers_mut() = headers;
        request.headers_mut().insert(HOST, self.named.clone());
        if let Some(file) = &self.token_file {
            let text = fs::read_to_string(file).map_err(|error| {
                format!("--http-token-file: cannot read {}: {error}", file.display())
            })?;
            let bearer = HeaderValue::from_str(&format!("Bearer {}", text.trim()));
            let mut bearer = bearer
                .map_err(|_| format!("--http-token-file: {} has no credential", file.display()))?;
            bearer.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, bearer);
        }
        let stream = TcpStream::connect((&*self.host, self.port)).await;
        let stream = stream.map_err(|error| format!("cannot connect: {error}"))?;
        if !self.has_tls {
            return self.exchange(stream, request).await;
        }
        let secured = tls::secure(stream, &self.host, self.authorities.as_deref(), None).await;
        self.exchange(secured.map_err(|error| format!("TLS: {error}"))?, request).await
    }

    async fn exchange(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        request: Request<Body>,
    ) -> Result<(WorkEnd, Captured), String> {
        let broken = |error: hyper::Error| format!("no answer: {error}");
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(broken)?;
        let mut answered = pin!(async {
            let answer = sender.send_request(request).await.map_err(broken)?;
            Ok(self.end(answer).await)
        });
        tokio::select! {
            answer = answered.as_mut() => return answer,
            // It may end before all of the answer is read.
            _ = connection => {}
        }
        answered.await
    }

    async fn end(&self, answer: Response<Incoming>) -> (WorkEnd, Captured) {
        let (head, body) = answer.into_parts();
        let mut bytes = Vec::new();
        // An answer that is cut has its status all the same.
        let _ = timeout(BODY_TIMEOUT, read(body, self.output_bytes, &mut bytes)).await;
        let asked = head.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let mut captured = Captured::new(self.output_bytes);
        captured.take(&bytes);
        let end = WorkEnd::Answer {
            status: head.status.as_u16(),
            retry_after: asked.and_then(|value| retry_after(value, clock::unix_time())),
            line: captured.first_line(),
        };
        (end, captured)
    }
}

async fn read(mut body: Incoming, most: usize, bytes: &mut Vec<u8>) {
    while let Some(Ok(frame)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let Ok(data) = frame.into_data() else { continue };
        bytes.extend_from_slice(&data[..data.len().min(most - bytes.len())]);
        if bytes.len() == most {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_url_is_named() {
        let new = |url: &str, token: Option<&str>| {
            WorkServer::new(url, None, token.map(PathBuf::from), BODY_TIMEOUT, 1024)
        };
        for (url, token, why) in [
            ("example", None, "it must begin with http:// or https://"),
            ("ftp://example/x", None, "it must begin with http:// or https://"),
            ("http://", None, "it is no URL"),
            ("http://user:secret@example/", None, "it must have no user"),
            ("http://example/", Some("key"), "without TLS"),
        ] {
            let error = new(url, token).unwrap_err();
            assert!(error.contains(why), "{url}: {error}");
        }
        let server = new("http://[::1]:8080?a=b", Some("key")).unwrap();
        assert_eq!((&*server.host, server.port, &*server.path.to_string()), ("::1", 8080, "/?a=b"));
        let server = new("https://example/tasks", Some("key")).unwrap();
        assert_eq!((server.port, server.has_tls, &*server.path.to_string()), (443, true, "/tasks"));
    }
}
