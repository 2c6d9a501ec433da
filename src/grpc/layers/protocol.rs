//! Answers requests that are no gRPC, before anything else is done with them: by HTTP, as the gRPC protocol
//! says. Owns the definition of a gRPC request.

use std::future::{Future, ready};

use futures_util::future::Either;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};

use crate::net::{InnerService, Middleware, Next};

/// A layer before a service that speaks gRPC alone.
#[derive(Debug, Clone, Copy)]
pub(in crate::grpc) struct GrpcOnly;

impl<S, R, B> Middleware<Request<R>, S> for GrpcOnly
where
    S: InnerService<Request<R>, Response = Response<B>>,
    R: Send + 'static,
    B: From<&'static str> + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;

    fn handle(
        &self,
        request: Request<R>,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<S::Response, S::Error>> + Send + 'static {
        match refusal(&request) {
            Some(refusal) => Either::Left(ready(Ok(refusal))),
            None => Either::Right(next.run(request)),
        }
    }
}

/// The answer to a request that is no gRPC.
fn refusal<R, B: From<&'static str>>(request: &Request<R>) -> Option<Response<B>> {
    let content = request.headers().get(header::CONTENT_TYPE);
    if request.method() != Method::POST {
        let mut answer = page(StatusCode::METHOD_NOT_ALLOWED, "gRPC calls are POST requests\n");
        answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        return Some(answer);
    }
    if content.is_some_and(|content| is_grpc(content.as_bytes())) {
        return None;
    }
    let text = "this port speaks gRPC alone: content-type must be application/grpc\n";
    Some(page(StatusCode::UNSUPPORTED_MEDIA_TYPE, text))
}

/// `application/grpc` or `application/grpc+proto`, with parameters or without.
fn is_grpc(content: &[u8]) -> bool {
    let kind = content.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    [&b"application/grpc"[..], b"application/grpc+proto"]
        .iter()
        .any(|known| known.eq_ignore_ascii_case(kind))
}

fn page<B: From<&'static str>>(status: StatusCode, text: &'static str) -> Response<B> {
    let mut answer = Response::new(text.into());
    *answer.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, plain);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_grpc_with_protobuf_is_grpc() {
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
