//! Gives the errors that tonic makes by itself (a request that cannot be decoded, one that is too
//! large, a method that is not there) the reasons of our table, so that a client finds one in
//! every status of ours. A status that has its reason already passes untouched.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::Service;

use super::{calls::is_ours, to_status::to_status};
use crate::{
    api_error::ApiError,
    reason::{REASON_TRAILER, Reason},
};

/// A service whose errors all have reasons; see the module.
#[derive(Clone)]
pub(super) struct Reasons<S> {
    inner: S,
}

impl<S> Reasons<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Reasons<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    S::Future: Send + 'static,
    ResBody: Default,
{
    type Response = Response<ResBody>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let ours = is_ours(request.uri().path());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let response = answer.await?;
            Ok(match renamed(response.headers(), ours) {
                None => response,
                Some(status) => status.into_http(),
            })
        })
    }
}

/// Our status for an error that tonic made itself. `ours`: it was a call of our service.
fn renamed(headers: &HeaderMap, ours: bool) -> Option<Status> {
    if headers.contains_key(REASON_TRAILER) {
        return None;
    }
    // Errors that tonic finds before a handler runs are answered in the headers.
    let status = Status::from_header_map(headers)?;
    let is = |codes: &[Code]| codes.contains(&status.code());
    let reason = if is(&[Code::Unimplemented]) {
        Reason::Unsupported
    } else if ours && is(&[Code::OutOfRange, Code::ResourceExhausted]) {
        Reason::RequestTooLarge
    } else if ours && is(&[Code::Internal, Code::InvalidArgument, Code::Unknown]) {
        Reason::Malformed
    } else {
        return None;
    };
    let message = match (reason, status.message()) {
        (Reason::Unsupported, "") => "there is no such method",
        (_, message) => message,
    };
    Some(to_status(&ApiError::Foreign(reason, message.to_owned())))
}
