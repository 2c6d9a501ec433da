//! Answers what is no gRPC, before anything is done with it: by HTTP, as the protocol has it. Owns what
//! counts as gRPC.

use std::{
    future::{Ready, ready},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::future::Either;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use tower::{Layer, Service};

use super::{answer::Body, reading::Read};

/// A layer before a service that speaks gRPC alone.
#[derive(Debug, Clone, Copy)]
pub(super) struct GrpcAlone;

/// A service behind it.
#[derive(Clone)]
pub(super) struct Checked<S>(S);

impl<S> Layer<S> for GrpcAlone {
    type Service = Checked<S>;

    fn layer(&self, inner: S) -> Checked<S> {
        Checked(inner)
    }
}

impl<S, B> Service<Request<B>> for Checked<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<Response<Body>, S::Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        match refusal(&request) {
            Some(refusal) => Either::Right(ready(Ok(refusal))),
            None => Either::Left(self.0.call(request)),
        }
    }
}

fn refusal<B>(request: &Request<B>) -> Option<Response<Body>> {
    let content = request.headers().get(header::CONTENT_TYPE);
    if request.method() != Method::POST {
        let mut answer = told(StatusCode::METHOD_NOT_ALLOWED, "gRPC calls are POST requests\n");
        answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        return Some(answer);
    }
    if content.is_some_and(|content| is_grpc(content.as_bytes())) {
        return None;
    }
    let text = "this port speaks gRPC alone: content-type must be application/grpc\n";
    Some(told(StatusCode::UNSUPPORTED_MEDIA_TYPE, text))
}

/// `application/grpc` or `application/grpc+proto`, with parameters or without.
fn is_grpc(content: &[u8]) -> bool {
    let kind = content.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    [&b"application/grpc"[..], b"application/grpc+proto"]
        .iter()
        .any(|known| known.eq_ignore_ascii_case(kind))
}

fn told(status: StatusCode, text: &'static str) -> Response<Body> {
    let body = tonic::body::Body::new(Read::new(Bytes::from_static(text.as_bytes())));
    let mut answer = Response::new(Body::new(body, None));
    *answer.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, plain);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_grpc_over_protobuf_is_grpc() {
        for content in ["application/grpc", "application/grpc+proto", "Application/gRPC; x=y"] {
            assert!(is_grpc(content.as_bytes()), "{content}");
        }
        for content in [
            "",
            "text/plain",
            "application/json",
            "application/grpc-web",
            "application/grpc-web+proto",
            "application/grpc-web-text",
            "application/grpc+json",
            "application/grpcx",
        ] {
            assert!(!is_grpc(content.as_bytes()), "{content}");
        }
    }
}
